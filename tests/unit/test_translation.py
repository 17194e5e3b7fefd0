"""Chat completions and Messages: golden pairs for each rule of the translation, both ways; streams against
checkers that know nothing of the translators; the bugs of other gateways, each by its name."""
import base64
import collections
import json
from typing import NamedTuple

import pytest
from support import recordings
from translation_checker import check_chat_stream, check_message_stream
from vendor_rules import refused_by_anthropic, refused_by_openai

import ironcage_proxy as ic

USER = {"role": "user", "content": "hi"}
OLD, NEW = "claude-haiku-4-5", "claude-opus-5-5"       # takes sampling and budgets; takes neither
PNG = "data:image/png;base64,iVBORw0KGgo="
JPEG_CALLED_PNG = "data:image/png;base64,/9j/4AAQ"
PDF = "data:application/pdf;base64,JVBERi0="
TEXT_FILE = "data:text/plain;base64," + base64.b64encode("Grüße".encode()).decode()
OPEN_SCHEMA = {"type": "object"}
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 1}},
          "required": ["n"], "additionalProperties": False}
RECURSIVE_SCHEMA = {"type": "object", "additionalProperties": False, "properties": {
    "child": {"$ref": "#"}}}
MANY_OPTIONAL = {"type": "object", "additionalProperties": False, "properties": {
    f"p{number}": {"type": "string"} for number in range(25)}}
REFERRING_SCHEMA = {"type": "object", "additionalProperties": False, "required": ["a", "b"],
                    "properties": {"a": {"$ref": "#/$defs/X"}, "b": {"$ref": "#/$defs/X"}},
                    "$defs": {"X": {"type": "string"}}}
NODE = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"],
        "additionalProperties": False}


def to_claude(fields, model=OLD, strict=False, most=64_000):
    losses = ic.Losses(strict=strict)
    fields = {"messages": [USER], **fields, "model": model}
    translator = ic.Translator("chat", "messages", fields, losses, ic.Target(most))
    assert refused_by_anthropic(translator.request) is None
    return translator, losses


def server(is_openai, **manners):
    """OpenAI, or a server that speaks its format."""
    return ic.KNOWN_PROVIDERS["openai"] if is_openai else ic.Provider(
        "other", "openai", "http://127.0.0.1", **manners)


def to_chat(fields, model="gpt-4o", is_openai=True, strict=False, most=128_000, **manners):
    losses = ic.Losses(strict=strict)
    fields = {"messages": [USER], "max_tokens": 100, **fields, "model": model}
    translator = ic.Translator("messages", "chat", fields, losses,
                               ic.Target(most, is_openai, server(is_openai, **manners)))
    assert not is_openai or refused_by_openai(translator.request) is None
    return translator, losses


def text(words, **more):
    return {"type": "text", "text": words, **more}


def tool(name="f", **more):
    return {"type": "function", "function": {"name": name, "parameters": SCHEMA, **more}}


def call(name="f", arguments="{}", call_id="call_1"):
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


class ToClaude(NamedTuple):
    """What Claude gets of a field of chat completions."""
    rule: str
    fields: dict
    gets: dict
    model: str = OLD
    dropped: list = []
    adjusted: dict = {}


TO_CLAUDE = [
    ToClaude("tools", {"tools": [{"type": "bash_20250124", "name": "bash"}]},
        gets={"tools": [{"type": "bash_20250124", "name": "bash"}]}),
    ToClaude("model", {}, gets={"model": OLD}),
    ToClaude("max_tokens", {"max_tokens": 7}, gets={"max_tokens": 7}),
    ToClaude("max_completion_tokens", {"max_completion_tokens": 9, "max_tokens": 7},
        gets={"max_tokens": 9}),
    ToClaude("max_tokens", {"max_tokens": 99_999}, gets={"max_tokens": 64_000},
        adjusted={"max_tokens": "64000"}),
    ToClaude("max_tokens", {}, gets={"max_tokens": 21_333}),
    ToClaude("stream", {"stream": True}, gets={"stream": True, "max_tokens": 64_000}),
    ToClaude("stream_options", {"stream": True, "stream_options": {"include_usage": True}},
        gets={}),
    ToClaude("temperature", {"temperature": 0.5}, gets={"temperature": 0.5}),
    ToClaude("temperature", {"temperature": 1.7}, gets={"temperature": 1},
        adjusted={"temperature": "1"}),
    ToClaude("temperature", {"temperature": 1}, gets={"temperature": None}, model=NEW),
    ToClaude("temperature", {"temperature": 0.5}, gets={"temperature": None}, model=NEW,
        dropped=["temperature"]),
    ToClaude("top_p", {"top_p": 0.5}, gets={"top_p": 0.5}),
    ToClaude("top_p", {"top_p": 0.5, "temperature": 0.2}, gets={"top_p": None}, dropped=["top_p"]),
    ToClaude("top_k", {"top_k": 5}, gets={"top_k": 5}),
    ToClaude("stop", {"stop": "END"}, gets={"stop_sequences": ["END"]}),
    ToClaude("stop", {"stop": ["a", " ", "\n"]}, gets={"stop_sequences": ["a"]}, dropped=["stop"]),
    ToClaude("n", {"n": 1}, gets={"n": None}),
    ToClaude("user", {"user": "u-1"}, gets={"metadata": {"user_id": "u-1"}}),
    ToClaude("user", {"user": "a@b.c"}, gets={"metadata": {"user_id": ic._hashed("a@b.c", 64)}}),
    ToClaude("safety_identifier", {"user": "u", "safety_identifier": "s"},
        gets={"metadata": {"user_id": "s"}}),
    ToClaude("metadata", {"metadata": {"user_id": "u", "k": "v"}},
        gets={"metadata": {"user_id": "u"}}, dropped=["metadata"]),
    ToClaude("service_tier", {"service_tier": "auto"}, gets={"service_tier": "auto"}),
    ToClaude("service_tier", {"service_tier": "default"}, gets={"service_tier": "standard_only"}),
    ToClaude("service_tier", {"service_tier": "flex"}, gets={"service_tier": "standard_only"},
        adjusted={"service_tier": "standard_only"}),
    ToClaude("store", {"store": False}, gets={"store": None}),
    ToClaude("store", {"store": True}, gets={"store": None}, dropped=["store"]),
    ToClaude("modalities", {"modalities": ["text"]}, gets={"modalities": None}),
    *[ToClaude(name, {name: value}, gets={name: None}) for name, value in (
        ("prediction", {"type": "content", "content": "x"}), ("prompt_cache_key", "k"),
        ("prompt_cache_retention", "24h"), ("prompt_cache_options", {}), ("seed", None),
        ("frequency_penalty", 0), ("presence_penalty", 0), ("logit_bias", {}),
        ("logprobs", False), ("top_logprobs", 0), ("verbosity", None), ("moderation", None),
        ("web_search_options", None), ("audio", None))],
    *[ToClaude(name, {name: value}, gets={name: None}, dropped=[name]) for name, value in (
        ("seed", 7), ("frequency_penalty", 0.5), ("presence_penalty", 0.5),
        ("logit_bias", {"1": 1}), ("logprobs", True), ("top_logprobs", 3), ("verbosity", "low"),
        ("moderation", {"model": "m", "policy": {"input": {"mode": "score"}, "output": None}}),
        ("web_search_options", {}), ("field_of_tomorrow", 1))],
    *[ToClaude(name, {name: value}, gets={name: value}, model=NEW) for name, value in (
        ("thinking", {"type": "adaptive"}), ("output_config", {"effort": "low"}),
        ("cache_control", {"type": "ephemeral"}), ("speed", "fast"), ("inference_geo", "us"),
        ("context_management", {"edits": []}), ("mcp_servers", []), ("container", "c"))],
    ToClaude("reasoning_effort", {"reasoning_effort": "high"}, gets={
        "thinking": {"type": "adaptive"}, "output_config": {"effort": "high"}}, model=NEW),
    ToClaude("reasoning_effort", {"reasoning_effort": "none"},
        gets={"thinking": {"type": "disabled"}}, model=NEW),
    ToClaude("reasoning_effort", {"reasoning_effort": "none"}, gets={
        "thinking": None, "output_config": {"effort": "low"}}, model="claude-fable-5",
        adjusted={"reasoning_effort": "low"}),
    ToClaude("reasoning_effort", {"reasoning_effort": "xhigh"}, gets={
        "output_config": {"effort": "high"}}, model="claude-opus-4-6",
        adjusted={"reasoning_effort": "high"}),
    ToClaude("reasoning_effort", {"reasoning_effort": "high", "max_tokens": 32_000}, gets={
        "thinking": {"type": "enabled", "budget_tokens": 16_384}}),
    ToClaude("reasoning_effort", {"reasoning_effort": "high", "max_tokens": 2_000}, gets={
        "thinking": {"type": "enabled", "budget_tokens": 1_999}}),
    ToClaude("reasoning_effort", {"reasoning_effort": "high", "max_tokens": 100}, gets={
        "thinking": None}, dropped=["reasoning_effort"]),
    ToClaude("reasoning_effort", {"reasoning_effort": "none"}, gets={"thinking": None}),
    ToClaude("response_format", {"response_format": {"type": "text"}},
        gets={"output_config": None}),
    ToClaude("response_format", {"response_format": {"type": "json_schema", "json_schema": {
        "name": "x", "schema": SCHEMA}}}, gets={"output_config": {"format": {
            "type": "json_schema", "schema": {
                "type": "object", "required": ["n"], "additionalProperties": False,
                "properties": {"n": {"type": "integer", "description": "minimum: 1"}}}}}}),
    ToClaude("response_format", {"response_format": {"type": "json_object"}}, gets={
        "system": [text("Respond with one JSON object and nothing else.")]},
        adjusted={"response_format": "instructed"}),
    ToClaude("response_format", {"response_format": {"type": "json_schema", "json_schema": {
        "schema": OPEN_SCHEMA}}}, gets={"output_config": None, "tools": [
            {"name": "json_response", "description": "The answer.", "input_schema": OPEN_SCHEMA}],
            "tool_choice": {"type": "tool", "name": "json_response",
                            "disable_parallel_tool_use": True}},
        adjusted={"response_format": "tool"}),
    ToClaude("response_format", {"response_format": {"type": "json_schema", "json_schema": {
        "schema": RECURSIVE_SCHEMA}}}, gets={"output_config": None, "tools": None}, model=NEW,
        adjusted={"response_format": "instructed"}),
    ToClaude("response_format", {"response_format": {
        "type": "json_schema", "json_schema": {"schema": SCHEMA}}, "tools": [tool()]},
        gets={"tool_choice": None}, model="claude-3-haiku",
        adjusted={"response_format": "instructed"}),
    ToClaude("response_format", {"reasoning_effort": "high", "response_format": {
        "type": "json_schema", "json_schema": {"schema": OPEN_SCHEMA}}}, gets={"tools": None},
        model="claude-opus-4-6", adjusted={"response_format": "instructed"}),
    ToClaude("response_format", {"response_format": {"type": "json_schema", "json_schema": {
        "schema": MANY_OPTIONAL}}}, gets={"output_config": None},
        adjusted={"response_format": "tool"}),
    ToClaude("response_format", {"reasoning_effort": "low", "response_format": {
        "type": "json_schema", "json_schema": {"schema": REFERRING_SCHEMA}}}, gets={
            "output_config": {"effort": "low", "format": {
                "type": "json_schema", "schema": ic.claude_schema(REFERRING_SCHEMA)}}}, model=NEW),
    ToClaude("tools", {"tools": [tool(str(n), strict=True) for n in range(21)]}, gets={},
        dropped=["tools.function.strict"]),
    ToClaude("tools", {"tools": [{"type": "function", "eager_input_streaming": True, "function": {
        "name": "f", "parameters": {"$defs": {"B": {"properties": {"b": {}}, "required": ["b", "x"]}},
                                    "properties": {"x": {}}, "anyOf": [
            {"properties": {"a": {}}, "required": ["a", "x"]}, {"$ref": "#/$defs/B"}]}}}]},
        gets={"tools": [{"name": "f", "eager_input_streaming": True, "input_schema": {
         "type": "object", "$defs": {"B": {"properties": {"b": {}}, "required": ["b", "x"]}},
         "properties": {"a": {}, "b": {}, "x": {}}, "required": ["x"]}}]},
        adjusted={"tools.function.parameters": "merged"}),
    ToClaude("tools", {"tools": [tool(parameters={"oneOf": [
        {"properties": {"kind": {"const": "file"}, "at": {"type": "string"}}, "required": ["kind"]},
        {"properties": {"kind": {"const": "url"}, "at": {"type": "string"}}, "required": ["kind"]},
        {"properties": {"kind": {"const": "url"}}, "required": ["kind"]}]})]},
        gets={"tools": [{"name": "f", "input_schema": {
         "type": "object", "required": ["kind"], "properties": {
             "kind": {"anyOf": [{"const": "file"}, {"const": "url"}]},
             "at": {"type": "string"}}}}]}, adjusted={"tools.function.parameters": "merged"}),
    ToClaude("tool_choice",
        {"tools": [tool(), tool("g"), {"type": "custom", "custom": {"name": "h"}}],
                          "tool_choice": {"type": "allowed_tools", "allowed_tools": {
        "mode": "required", "tools": [{"type": "function", "function": {"name": "g"}}]}}},
        gets={"tool_choice": {"type": "any"}, "tools": [{"name": "g", "input_schema": SCHEMA}]}),
    ToClaude("tool_choice", {"tools": [tool()], "tool_choice": "required", "max_tokens": 9000,
                          "reasoning_effort": "low"},
        gets={"tool_choice": {"type": "auto"}, "thinking": {"type": "enabled", "budget_tokens": 2048}},
        adjusted={"tool_choice": "auto"}),
    ToClaude("thinking",
        {"thinking": {"type": "enabled", "budget_tokens": 2000}, "temperature": 0.5,
                       "max_tokens": 9000}, gets={
        "temperature": None}, dropped=["temperature"]),
    ToClaude("tools", {"tools": [tool(description="d")]}, gets={"tools": [
        {"name": "f", "description": "d", "input_schema": SCHEMA}]}),
    ToClaude("tools", {"tools": [{"type": "function", "function": {"name": "f"}}]},
        gets={"tools": [
        {"name": "f", "input_schema": {"type": "object", "properties": {}}}]}),
    ToClaude("tools", {"tools": [{"type": "custom", "custom": {"name": "c"}}]}, gets={"tools": [
        {"name": "c", "input_schema": {
            "type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"],
            "additionalProperties": False}}]}),
    ToClaude("tools", {"tools": [tool(strict=True)]}, gets={"tools": [{
        "name": "f", "strict": True, "input_schema": ic.claude_schema(SCHEMA)}]}),
    ToClaude("tools", {"tools": [{"type": "function", "function": {
        "name": "f", "strict": True, "parameters": OPEN_SCHEMA}}]}, gets={"tools": [{
            "name": "f", "input_schema": OPEN_SCHEMA}]}, dropped=["tools.function.strict"]),
    ToClaude("functions", {"functions": [{"name": "f", "parameters": SCHEMA}]}, gets={"tools": [
        {"name": "f", "input_schema": SCHEMA}]}),
    ToClaude("tool_choice", {"tools": [tool()], "tool_choice": "auto"},
        gets={"tool_choice": {"type": "auto"}}),
    ToClaude("tool_choice", {"tools": [tool()], "tool_choice": "none"},
        gets={"tool_choice": {"type": "none"}}),
    ToClaude("tool_choice", {"tools": [tool()], "tool_choice": "required"},
        gets={"tool_choice": {"type": "any"}}),
    ToClaude("tool_choice", {"tools": [tool()], "tool_choice": {
        "type": "function", "function": {"name": "f"}}},
        gets={"tool_choice": {"type": "tool", "name": "f"}}),
    ToClaude("tool_choice", {"tools": [tool()], "tool_choice": "required"},
        gets={"tool_choice": {"type": "auto"}, "system": [text("Call one of the tools now.")]},
        model=NEW, adjusted={"tool_choice": "auto"}),
    ToClaude("tool_choice", {"tool_choice": "required"}, gets={"tool_choice": None}),
    ToClaude("function_call", {"functions": [{"name": "f"}], "function_call": {"name": "f"}},
        gets={"tool_choice": {"type": "tool", "name": "f", "disable_parallel_tool_use": True}}),
    ToClaude("parallel_tool_calls", {"tools": [tool()], "parallel_tool_calls": False},
        gets={"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}}),
    ToClaude("parallel_tool_calls", {"tools": [tool()], "parallel_tool_calls": False,
                                  "tool_choice": "none"}, gets={"tool_choice": {"type": "none"}}),
]
REFUSED_BY_CLAUDE = {
    **{name: {"messages": [{"role": "user", "content": [
        {"type": "file", "file": {"file_data": data}}]}]} for name, data in (
            ("a file that is neither a PDF nor text", "data:image/png;base64,iVBORw0KGgo="),
            ("a text file in another encoding", "data:text/plain;base64,/w=="))},
    "n": {"n": 2}, "audio": {"audio": {"voice": "x"}}, "modalities": {"modalities": ["audio"]},
    "tool type": {"tools": [{"type": "hologram"}]}, "effort": {"reasoning_effort": "huge"},
    "format": {"response_format": {"type": "xml"}}, "choice": {"tools": [tool()],
                                                               "tool_choice": "maybe"},
    "no messages": {"messages": []}, "no content": {"messages": [{"role": "user", "content": ""}]},
    "role": {"messages": [{"role": "oracle", "content": "x"}]},
    "http image": {"messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "http://x/y.png"}}]}]},
    "svg": {"messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "data:image/svg+xml;base64,AA=="}}]}]},
    "audio part": {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
    "an OpenAI file": {"messages": [{"role": "user", "content": [
        {"type": "file", "file": {"file_id": "file-1"}}]}]},
    "temperature": {"temperature": "hot"}, "cap": {"max_tokens": 0},
    "blocking moderation": {"moderation": {"model": "m", "policy": {"output": {"mode": "block"}}}},
}


@pytest.mark.parametrize("row", TO_CLAUDE, ids=[f"{row.rule}-{number}"
                                                for number, row in enumerate(TO_CLAUDE)])
def test_a_chat_field_on_claude(row):
    translator, losses = to_claude(row.fields, row.model)

    assert row.gets == {name: translator.request.get(name) for name in row.gets}
    assert (row.dropped, row.adjusted) == (losses.dropped, losses.adjusted)


def test_every_rule_of_chat_fields_has_a_golden_pair():
    assert set(ic.CHAT_RULES) - {row.rule for row in TO_CLAUDE} == {"messages"}


@pytest.mark.parametrize("fields", REFUSED_BY_CLAUDE.values(), ids=REFUSED_BY_CLAUDE)
def test_what_cannot_be_said_to_claude_is_refused(fields):
    with pytest.raises(ic.BadRequest):
        to_claude(fields)


@pytest.mark.parametrize("row", [row for row in TO_CLAUDE if row.dropped or row.adjusted],
                         ids=lambda row: row.rule)
def test_strict_mode_refuses_every_loss(row):
    with pytest.raises(ic.BadRequest, match="strict mode"):
        to_claude(row.fields, row.model, strict=True)


def test_losses_are_told_in_headers_that_hold_names_only():
    losses = ic.Losses()
    losses.drop("seed"), losses.drop("seed"), losses.drop("a\r\nb: c")
    losses.adjust("max_tokens", 9)

    assert [("x-ironcage-dropped-params", "seed,?"),
            ("x-ironcage-adjusted", "max_tokens=9")] == losses.headers()


# Messages to Claude: (what it shows, model, messages, expected messages, expected system)
SYSTEM = {"role": "system", "content": "S"}
TURNS = {
    "leading system and developer": (OLD, [SYSTEM, {"role": "developer", "content": "D"}, USER],
                                     [("user", [text("hi")])], [text("S"), text("D")]),
    "a later system message is told in place": (
        OLD, [USER, SYSTEM], [("user", [text("hi"), text(
            "[system instruction, not from the user]\nS")])], []),
    "a later system message stays where the model takes it": (
        NEW, [USER, SYSTEM], [("user", [text("hi")]), ("system", [text("S")])], []),
    "a later system message before the user's next words stands behind them": (
        NEW, [USER, {"role": "assistant", "content": "a"}, SYSTEM, USER,
              {"role": "assistant", "content": "b"}, USER, SYSTEM, USER],
        [("user", [text("hi")]), ("assistant", [text("a")]), ("user", [text("hi")]),
         ("system", [text("S")]), ("assistant", [text("b")]), ("user", [text("hi"), text("hi")]),
         ("system", [text("S")])], []),
    "a later system message between calls and results stands behind these": (
        NEW, [USER, {"role": "assistant", "tool_calls": [call()]}, SYSTEM,
              {"role": "tool", "tool_call_id": "call_1", "content": "R"}],
        [("user", [text("hi")]),
         ("assistant", [{"type": "tool_use", "id": "call_1", "name": "f", "input": {}}]),
         ("user", [{"type": "tool_result", "tool_use_id": "call_1", "content": "R"}]),
         ("system", [text("S")])], []),
    "a later system message between two of the assistant's is told as user": (
        NEW, [USER, {"role": "assistant", "content": "a"}, SYSTEM,
              {"role": "assistant", "content": "b"}, USER],
        [("user", [text("hi")]), ("assistant", [text("a")]), ("user", [text(
            "[system instruction, not from the user]\nS")]), ("assistant", [text("b")]),
         ("user", [text("hi")])], []),
    "what only Claude's API has comes back as it was": (
        OLD, [USER, {"role": "assistant", "content": "ab", "x_anthropic_content": [
            text("a"), {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}},
            text("b")]}, USER],
        [("user", [text("hi")]), ("assistant", [
            text("a"), {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}},
            text("b")]), ("user", [text("hi")])], []),
    "and not where the client changed the text": (
        OLD, [USER, {"role": "assistant", "content": "c", "x_anthropic_content": [text("a")]}, USER],
        [("user", [text("hi")]), ("assistant", [text("c")]), ("user", [text("hi")])], []),
    "nor where it changed the tool calls": (
        OLD, [USER, {"role": "assistant", "content": "a", "tool_calls": [call(call_id="call_2")],
                     "x_anthropic_content": [text("a"), {
                         "type": "tool_use", "id": "call_1", "name": "f", "input": {}}]},
              {"role": "tool", "tool_call_id": "call_2", "content": "R"}],
        [("user", [text("hi")]),
         ("assistant", [text("a"), {"type": "tool_use", "id": "call_2", "name": "f", "input": {}}]),
         ("user", [{"type": "tool_result", "tool_use_id": "call_2", "content": "R"}])], []),
    "thinking in OpenRouter's form, of Claude and of another model": (
        OLD, [USER, {"role": "assistant", "content": "a", "reasoning_details": [
            {"type": "reasoning.text", "text": "T", "signature": "sig",
             "format": "anthropic-claude-v1"},
            {"type": "reasoning.encrypted", "data": "D"},
            {"type": "reasoning.encrypted", "data": "E", "format": "openai-responses-v1"},
            {"type": "reasoning.summary", "summary": "S"}]}, USER],
        [("user", [text("hi")]), ("assistant", [
            {"type": "thinking", "thinking": "T", "signature": "sig"},
            {"type": "redacted_thinking", "data": "D"}, text("a")]), ("user", [text("hi")])], []),
    "only a system message": (OLD, [SYSTEM], [("user", [text("S")])], []),
    "runs of one role are one turn": (
        OLD, [USER, USER, {"role": "assistant", "content": "a"},
              {"role": "assistant", "content": "b"}, USER],
        [("user", [text("hi"), text("hi")]), ("assistant", [text("a"), text("b")]),
         ("user", [text("hi")])], []),
    "a leading assistant": (OLD, [{"role": "assistant", "content": "a"}, USER],
                            [("user", [text(".")]), ("assistant", [text("a")]),
                             ("user", [text("hi")])], []),
    "empty text and empty messages go": (
        OLD, [{"role": "user", "content": [text(""), text(" \n"), text("x")]},
              {"role": "assistant", "content": ""}, {"role": "assistant", "content": None}],
        [("user", [text("x")])], []),
    "prefill loses its trailing space": (OLD, [USER, {"role": "assistant", "content": "a \n"}],
                                         [("user", [text("hi")]), ("assistant", [text("a")])], []),
    "prefill where the model takes none": (
        NEW, [USER, {"role": "assistant", "content": "a"}],
        [("user", [text("hi")]), ("assistant", [text("a")]), ("user", [text("Continue.")])], []),
    "results come first, in the order of the calls": (
        OLD, [USER, {"role": "assistant", "content": None, "tool_calls": [
            call(call_id="a"), call(call_id="b", arguments='{"n": 1}')]},
            {"role": "tool", "tool_call_id": "b", "content": "B"}, USER,
            {"role": "tool", "tool_call_id": "a", "content": [text("A")]}],
        [("user", [text("hi")]), ("assistant", [
            {"type": "tool_use", "id": "a", "name": "f", "input": {}},
            {"type": "tool_use", "id": "b", "name": "f", "input": {"n": 1}}]),
         ("user", [{"type": "tool_result", "tool_use_id": "a", "content": "A"},
                   {"type": "tool_result", "tool_use_id": "b", "content": "B"}, text("hi")])], []),
    "a missing result is made": (
        OLD, [USER, {"role": "assistant", "tool_calls": [call()]}],
        [("user", [text("hi")]),
         ("assistant", [{"type": "tool_use", "id": "call_1", "name": "f", "input": {}}]),
         ("user", [{"type": "tool_result", "tool_use_id": "call_1", "is_error": True,
                    "content": "[no result provided]"}])], []),
    "of two results the last counts": (
        OLD, [USER, {"role": "assistant", "tool_calls": [call()]},
              {"role": "tool", "tool_call_id": "call_1", "content": "1"},
              {"role": "tool", "tool_call_id": "call_1", "content": "2"}],
        [("user", [text("hi")]),
         ("assistant", [{"type": "tool_use", "id": "call_1", "name": "f", "input": {}}]),
         ("user", [{"type": "tool_result", "tool_use_id": "call_1", "content": "2"}])], []),
    "a result without its call is text": (
        OLD, [USER, {"role": "tool", "tool_call_id": "x", "content": "R"}],
        [("user", [text("hi"), text("[result of tool call x]\nR")])], []),
    "a legacy function": (
        OLD, [USER, {"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}},
              {"role": "function", "name": "f", "content": "R"}],
        [("user", [text("hi")]),
         ("assistant", [{"type": "tool_use", "id": "f", "name": "f", "input": {}}]),
         ("user", [{"type": "tool_result", "tool_use_id": "f", "content": "R"}])], []),
    "images": (OLD, [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": JPEG_CALLED_PNG}},
        {"type": "image_url", "image_url": {"url": "https://x/y.png", "detail": "low"}}]}],
        [("user", [{"type": "image", "source": {"type": "base64", "media_type": "image/jpeg",
                                                "data": "/9j/4AAQ"}},
                   {"type": "image", "source": {"type": "url", "url": "https://x/y.png"}}])], []),
    "files": (OLD, [{"role": "user", "content": [
        {"type": "file", "file": {"file_data": PDF, "filename": "a.pdf"}},
        {"type": "file", "file": {"file_data": TEXT_FILE}}]}],
        [("user", [{"type": "document", "title": "a.pdf", "source": {
            "type": "base64", "media_type": "application/pdf", "data": "JVBERi0="}},
            {"type": "document", "source": {"type": "text", "media_type": "text/plain",
                                            "data": "Grüße"}}])], []),
    "cache marks": (OLD, [{"role": "user", "content": [
        text("a", cache_control={"type": "ephemeral", "ttl": "1h"}),
        text("b", prompt_cache_breakpoint={"mode": "explicit"})]}],
        [("user", [text("a", cache_control={"type": "ephemeral", "ttl": "1h"}),
                   text("b", cache_control={"type": "ephemeral"})])], []),
    "thinking comes back verbatim, and what no Claude signed does not": (
        OLD, [USER, {"role": "assistant", "content": "a", "thinking_blocks": [
            {"index": 0, "type": "thinking", "thinking": "T", "signature": "sig"},
            {"type": "redacted_thinking", "data": "D"},
            {"type": "thinking", "thinking": "U", "signature": "icx1.abc"}]}, USER],
        [("user", [text("hi")]), ("assistant", [
            {"type": "thinking", "thinking": "T", "signature": "sig"},
            {"type": "redacted_thinking", "data": "D"}, text("a")]), ("user", [text("hi")])], []),
    "a refusal is the assistant's text": (
        OLD, [USER, {"role": "assistant", "content": None, "refusal": "no"}, USER],
        [("user", [text("hi")]), ("assistant", [text("no")]), ("user", [text("hi")])], []),
}


@pytest.mark.parametrize("model, messages, expected, system", TURNS.values(), ids=TURNS)
def test_chat_messages_on_claude(model, messages, expected, system):
    translator, _ = to_claude({"messages": messages, "tools": [tool()]}, model)

    assert expected == [(m["role"], m["content"]) for m in translator.request["messages"]]
    assert system == translator.request.get("system", [])


def test_thinking_is_remembered_within_bounds(monkeypatch):
    now_s = [0]
    memory = ic.ThinkingMemory(clock=lambda: now_s[0])
    memory.keep(("alice", "call_1"), [THOUGHT])
    assert ([THOUGHT], []) == (memory.recall(("alice", "call_1")), memory.recall(("bob", "call_1")))

    now_s[0] = 3600
    assert [THOUGHT] == memory.recall(("alice", "call_1"))
    now_s[0] = 3601
    assert [] == memory.recall(("alice", "call_1"))

    size = len(ic.json_bytes([THOUGHT]))
    monkeypatch.setattr(ic, "THINKING_KEPT_BYTES", 2 * size)
    for key in ("a", "b", "b", "a", "c"):              # b is the oldest when c wants its room
        memory.keep((key,), [THOUGHT])
    assert [[THOUGHT], [], [THOUGHT]] == [memory.recall((key,)) for key in "abc"]
    assert 2 * size == memory._bytes


THOUGHT = {"type": "thinking", "thinking": "T", "signature": "s"}


def turns_with_memory(*requests, first="thinking"):
    """Claude answers each request with a thought and a call; what it is sent at the end."""
    kept = {}
    for number, fields in enumerate(requests):
        translator = ic.Translator("chat", "messages", {
            "model": OLD, "tools": [tool()], "reasoning_effort": "low", "max_tokens": 9000,
            **fields}, ic.Losses(), ic.Target(64_000, recall=lambda *key: kept.get(key, [])))
        assert refused_by_anthropic(translator.request) is None
        answer = [{**THOUGHT, "thinking": f"T{number}"},
                  {"type": "tool_use", "id": f"call_{number}", "name": "f", "input": {}}]
        if first == "text":
            answer.insert(0, {"type": "text", "text": "a"})
        translator.answer({"content": answer, "stop_reason": "tool_use"})
        if translator.thoughts:
            kept[translator.first_call_id, translator.terms.digest] = translator.thoughts
    return [[block["thinking"] for block in turn["content"] if block["type"] == "thinking"]
            for turn in translator.request["messages"] if turn["role"] == "assistant"]


def rebuilt(turns, first="hi", **more):
    """A request whose history has so many calls of f and their results, and no thinking."""
    messages = [{"role": "user", "content": first}]
    for number in range(turns):
        messages += [{"role": "assistant", "tool_calls": [call(call_id=f"call_{number}")]},
                     {"role": "tool", "tool_call_id": f"call_{number}", "content": "R"}]
    return {"messages": messages, **more}


MARKED = [text("hi", cache_control={"type": "ephemeral"})]


@pytest.mark.parametrize("requests, thoughts", [
    ([rebuilt(0), rebuilt(1)], [["T0"]]),
    ([rebuilt(0), rebuilt(1), rebuilt(2)], [["T0"], ["T1"]]),
    ([rebuilt(0, MARKED), rebuilt(1)], [["T0"]]),                       # a mark is no change
    ([rebuilt(0), rebuilt(1, "other")], [[]]),
    ([rebuilt(0), rebuilt(1, tools=[tool("f"), tool("g")])], [[]]),
    ([rebuilt(0), rebuilt(1, tool_choice="required")], [[]]),
    ([rebuilt(0), rebuilt(1, "other"), rebuilt(2)], [["T0"], []]),      # T1 had no T0 before it
    ([rebuilt(0), rebuilt(1, reasoning_effort=None)], [[]]),            # it does not think now
], ids=range(8))
def test_thinking_goes_back_where_nothing_before_it_has_changed(requests, thoughts):
    """Elsewhere Claude answers 400: "The block is bound to a different conversation"."""
    assert thoughts == turns_with_memory(*requests)


def test_thinking_between_other_blocks_is_not_remembered():
    """Its place among them is not known from a client's history."""
    assert [[]] == turns_with_memory(rebuilt(0), rebuilt(1), first="text")


@pytest.mark.parametrize("kinds, remembered", [
    (["thinking", "redacted_thinking", "text"], 2), (["text", "thinking"], 0),
    (["thinking", "text", "thinking"], 0)])
def test_a_streams_thinking_is_remembered_where_all_else_comes_after_it(kinds, remembered):
    translator, _ = to_claude({})
    events = [{"type": "message_start", "message": {"id": "msg_1", "model": OLD}}]
    for index, kind in enumerate(kinds):
        events += [{"type": "content_block_start", "index": index, "content_block": {"type": kind}},
                   {"type": "content_block_stop", "index": index}]
    list(translator.events([*events, {"type": "message_stop"}]))

    assert remembered == len(translator.thoughts)


@pytest.mark.parametrize("model, fields, thought, is_told", [
    ("claude-opus-5-5", {"reasoning_effort": "low"}, True, True),
    ("claude-fable-5-1-20260801", {"reasoning_effort": "low"}, True, True),
    ("claude-opus-5-5", {"reasoning_effort": "low"}, False, False),      # there is none to refuse
    ("claude-opus-5-5", {}, True, False),                                # it does not think
    ("claude-opus-5-5", {"thinking": {"type": "adaptive"}}, True, False),        # its own words
    ("claude-opus-5", {"reasoning_effort": "low"}, True, False),
    ("claude-fable-5-20260601", {"reasoning_effort": "low"}, True, False),
    (OLD, {"reasoning_effort": "low", "max_tokens": 9000}, True, False)])
def test_thinking_of_a_changed_conversation_is_left_out_where_claude_would_refuse_it(
        model, fields, thought, is_told):
    said = {"role": "assistant", "content": "a", "thinking_blocks": [THOUGHT] if thought else []}
    translator, _ = to_claude({**fields, "messages": [USER, said, USER]}, model)

    binding = translator.request.get("thinking", {}).get("block_binding")
    assert ({"prefix_mismatch_behavior": "drop_block"} if is_told else None) == binding
    assert is_told == ("thinking-binding-controls-2026-08-01" in translator.terms.betas)


def test_a_budgeted_thought_without_its_beginning_is_dropped_and_told():
    """Clients that rebuild their history lose thinking blocks; Anthropic refuses to go on."""
    called = {"role": "assistant", "tool_calls": [call()]}
    result = {"role": "tool", "tool_call_id": "call_1", "content": "R"}
    thought = {"type": "thinking", "thinking": "T", "signature": "s"}
    fields = {"tools": [tool()], "reasoning_effort": "low", "max_tokens": 9000}

    lost, losses = to_claude({**fields, "messages": [USER, called, result]})
    kept, _ = to_claude({**fields, "messages": [USER, {**called, "thinking_blocks": [thought]},
                                                result]})

    assert ("thinking" in lost.request, losses.dropped) == (False, ["thinking"])
    assert 2048 == kept.request["thinking"]["budget_tokens"]


def test_a_thinking_model_gets_no_prefill():
    translator, losses = to_claude({
        "messages": [USER, {"role": "assistant", "content": "a"}], "reasoning_effort": "low",
        "max_tokens": 9000})

    assert "user" == translator.request["messages"][-1]["role"]
    assert {"messages.prefill": "continued"} == losses.adjusted


def test_a_file_at_anthropic_brings_its_beta_along():
    translator, _ = to_claude({"messages": [{"role": "user", "content": [
        {"type": "file", "file": {"file_id": "file_1"}}]}]})

    assert ("files-api-2025-04-14",) == translator.terms.betas


@pytest.mark.parametrize("ref", ["#/default", "#/$defs", "#/$defs/A/const", "#/title/x"])
def test_a_reference_to_what_is_no_schema_is_one_to_nothing(ref):
    schema = {"anyOf": [{"$ref": ref}], "default": {"required": 7, "properties": [7]},
              "$defs": {"required": 7, "A": {"const": {"properties": 7}}}, "title": "t"}

    translator, _ = to_claude({"tools": [tool(parameters=schema)]})
    assert {} == translator.request["tools"][0]["input_schema"]["properties"]


def test_an_answer_through_a_tool_is_the_content():
    asked = {"response_format": {"type": "json_schema", "json_schema": {"schema": OPEN_SCHEMA}}}
    translator, _ = to_claude(asked)
    whole = message({"type": "tool_use", "id": "t", "name": "json_response",
                     "input": {"n": 1, "ü": [2]}}, stop="tool_use")

    choice = translator.answer(whole)["choices"][0]
    folded, finish, _ = check_chat_stream(list(translator.events(stream_of(whole))))

    assert ('{"n": 1, "ü": [2]}', "stop") == (choice["message"]["content"],
                                              choice["finish_reason"])
    assert "tool_calls" not in choice["message"]
    assert ({"n": 1, "ü": [2]}, "stop") == (json.loads(folded["content"]), finish)


def test_an_answer_through_a_tool_that_was_cut_says_so():
    asked = {"response_format": {"type": "json_schema", "json_schema": {"schema": OPEN_SCHEMA}}}
    cut = message({"type": "tool_use", "id": "t", "name": "json_response", "input": {"n": 1}},
                  stop="max_tokens")

    assert "length" == to_claude(asked)[0].answer(cut)["choices"][0]["finish_reason"]


def test_text_inside_an_object_comes_without_empty_pieces():
    translator, _ = to_claude({"tools": [{"type": "custom", "custom": {"name": "run"}}]})
    use = {"type": "tool_use", "id": "t", "name": "run", "input": {"input": "ls"}}

    chunks = [*translator.events(stream_of(message(use, stop="tool_use"), pieces=15))]
    calls = [call for chunk in chunks if "choices" in chunk
             for call in chunk["choices"][0]["delta"].get("tool_calls", ())]

    assert ["", "l", "s"] == [call["custom"]["input"] for call in calls]


def test_a_tool_choice_of_messages_that_is_not_known_is_refused():
    with pytest.raises(ic.BadRequest, match="tool_choice is not one of auto, any, tool, none"):
        ic.read_messages_request({"model": "m", "max_tokens": 9, "messages": [USER],
                                  "tool_choice": {"type": "maybe"}})


def test_an_api_that_no_provider_of_the_model_speaks_is_carried_by_none():
    anthropic = ic.KNOWN_PROVIDERS["anthropic"]

    carried = [ic.carrying_api(api, anthropic, "m", None) for api in ("embeddings", "chat")]

    assert [None, "messages"] == carried


def test_a_turn_that_was_only_our_own_thinking_is_left_out_whole():
    ours = {"type": "thinking", "thinking": "hm", "signature": ic.OWN_THINKING}
    said = [USER, {"role": "assistant", "content": [ours]},
            {"role": "assistant", "content": [ours, text("a")]}, USER]

    assert {"messages": [USER, {"role": "assistant", "content": [text("a")]}, USER]} \
        == ic.without_own_thinking("messages", {"messages": said})


@pytest.mark.parametrize("said, content", [
    ('```json\n{"a": 1}\n```', '{"a": 1}'), ('```\n{"a": 1}\n```\n', '{"a": 1}'),
    ('{"a": "```"}', '{"a": "```"}'), ("x ```json\n{}\n```", "x ```json\n{}\n```")])
def test_instructed_json_loses_its_fence(said, content):
    instructed, _ = to_claude({"response_format": {"type": "json_object"}})
    plain, _ = to_claude({})

    assert content == instructed.answer(message(text(said)))["choices"][0]["message"]["content"]
    assert said == plain.answer(message(text(said)))["choices"][0]["message"]["content"]


def test_citations_of_the_web_are_annotations():
    cited = text("sky", citations=[{"type": "web_search_result_location", "url": "https://x",
                                    "title": "X", "cited_text": "c", "encrypted_index": "e"}])
    whole = message(text("The "), cited, text("."))
    translator, _ = to_claude({"stream": True})
    expected = {"type": "url_citation", "url_citation": {
        "url": "https://x", "title": "X", "start_index": 4, "end_index": 7}}
    events = []
    for event in stream_of({**whole, "content": [text("The "), text("sky"), text(".")]}):
        if event["type"] == "content_block_stop" and event["index"] == 1:
            events.append({"type": "content_block_delta", "index": 1, "delta": {
                "type": "citations_delta", "citation": cited["citations"][0]}})
        events.append(event)

    chunks = list(translator.events(events))

    assert [expected] == translator.answer(whole)["choices"][0]["message"]["annotations"]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks if "choices" in chunk]
    assert [[{"index": 0, **expected}]] == [
        delta["annotations"] for delta in deltas if "annotations" in delta]


def test_a_ping_is_passed_on_also_before_the_answer_begins():
    events = list(stream_of(message(text("a"))))
    assert ["message_start", "ping"] == [event["type"] for event in events[:2]]

    chunks = list(to_claude({"stream": True})[0].events([{"type": "ping"}, *events]))

    assert [0, 2] == [number for number, chunk in enumerate(chunks) if chunk == {"type": "ping"}]


def test_at_most_four_cache_marks_travel_the_last_ones():
    marks = [text(str(n), cache_control={"type": "ephemeral"}) for n in range(6)]
    translator, _ = to_claude({"messages": [{"role": "user", "content": marks}]})

    blocks = translator.request["messages"][0]["content"]
    assert [False, False, True, True, True, True] == ["cache_control" in b for b in blocks]


def test_history_with_tools_and_a_request_without_them_gets_their_names():
    """Bug of others: Anthropic refuses tool blocks without tools."""
    translator, _ = to_claude({"messages": [
        USER, {"role": "assistant", "tool_calls": [call("f")]},
        {"role": "tool", "tool_call_id": "call_1", "content": "R"}]})

    assert ([{"name": "f", "input_schema": {"type": "object"}}], {"type": "none"}) == (
        translator.request["tools"], translator.request["tool_choice"])


def test_a_conversation_grows_at_its_end_only():
    """Else the prompt cache breaks: turn N's messages are a prefix of turn N+1's."""
    history = [SYSTEM, USER, {"role": "assistant", "tool_calls": [call()]},
               {"role": "tool", "tool_call_id": "call_1", "content": "R"},
               {"role": "assistant", "content": "done"}, USER]
    first, _ = to_claude({"messages": history[:2], "tools": [tool()]})
    later, _ = to_claude({"messages": history, "tools": [tool()]})

    assert first.request["messages"] == later.request["messages"][:1]
    assert first.request["system"] == later.request["system"]


def test_names_and_ids_that_anthropic_refuses_are_replaced_and_come_back():
    translator, _ = to_claude({"tools": [tool("a.b"), tool("a_b")], "messages": [
        USER, {"role": "assistant", "tool_calls": [call("a.b", call_id="x:1")]},
        {"role": "tool", "tool_call_id": "x:1", "content": "R"}]})
    names = [row["name"] for row in translator.request["tools"]]
    use = translator.request["messages"][1]["content"][0]
    result = translator.request["messages"][2]["content"][0]

    assert names[1] == "a_b" and names[0] == use["name"] != "a_b"
    assert use["id"] == result["tool_use_id"] and use["id"].startswith("toolu_")
    answer = translator.answer({"id": "msg_1", "content": [
        {"type": "tool_use", "id": "t", "name": names[0], "input": {}}]})
    assert "a.b" == answer["choices"][0]["message"]["tool_calls"][0]["function"]["name"]


# Claude's answers.

MESSAGE_USAGE = {"input_tokens": 10, "cache_read_input_tokens": 5,
                 "cache_creation_input_tokens": 3, "output_tokens": 7,
                 "output_tokens_details": {"thinking_tokens": 2}, "service_tier": "standard"}


def message(*content, stop="end_turn", **more):
    return {"id": "msg_1", "type": "message", "role": "assistant", "model": OLD,
            "content": list(content), "stop_reason": stop, "usage": MESSAGE_USAGE, **more}


@pytest.mark.parametrize("stop, finish", [
    ("end_turn", "stop"), ("stop_sequence", "stop"), ("max_tokens", "length"),
    ("tool_use", "tool_calls"), ("pause_turn", "stop"), ("refusal", "content_filter"),
    ("model_context_window_exceeded", "length"), ("compaction", "stop"), ("of_tomorrow", "stop")])
def test_stop_reasons_of_claude(stop, finish):
    translator, _ = to_claude({})

    assert finish == translator.answer(message(text("x"), stop=stop))["choices"][0][
        "finish_reason"]


def test_an_answer_of_claude_as_a_chat_completion():
    translator, _ = to_claude({"tools": [tool(), {"type": "custom", "custom": {"name": "c"}}]})
    thinking = {"type": "thinking", "thinking": "T", "signature": "s"}

    answer = translator.answer(message(
        thinking, text("a"), text("b"), {"type": "tool_use", "id": "t1", "name": "f",
                                         "input": {"n": 1}},
        {"type": "tool_use", "id": "t2", "name": "c", "input": {"input": "raw"}}, stop="tool_use"))

    said = answer["choices"][0]["message"]
    assert ("chatcmpl-1", "ab", "T", [thinking], "default") == (
        answer["id"], said["content"], said["reasoning_content"], said["thinking_blocks"],
        answer["service_tier"])
    assert [{"id": "t1", "type": "function", "function": {"name": "f", "arguments": '{"n": 1}'}},
            {"id": "t2", "type": "custom", "custom": {"name": "c", "input": "raw"}}] \
        == said["tool_calls"]
    assert (18, 7, 25, 5, 3, 2) == (
        answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"],
        answer["usage"]["total_tokens"],
        answer["usage"]["prompt_tokens_details"]["cached_tokens"],
        answer["usage"]["prompt_tokens_details"]["cache_write_tokens"],
        answer["usage"]["completion_tokens_details"]["reasoning_tokens"])


def test_content_is_null_with_calls_and_empty_without_anything():
    translator, _ = to_claude({})

    calls = translator.answer(message({"type": "tool_use", "id": "t", "name": "f", "input": {}}))
    assert calls["choices"][0]["message"]["content"] is None
    assert "" == translator.answer(message())["choices"][0]["message"]["content"]


def test_a_legacy_client_gets_a_function_call():
    translator, _ = to_claude({"functions": [{"name": "f"}]})

    choice = translator.answer(message({"type": "tool_use", "id": "t", "name": "f", "input": {}},
                                       stop="tool_use"))["choices"][0]

    assert ("function_call", {"name": "f", "arguments": "{}"}) == (
        choice["finish_reason"], choice["message"]["function_call"])


def test_a_legacy_client_gets_a_function_call_in_pieces():
    translator, _ = to_claude({"functions": [{"name": "f"}], "stream": True})
    use = {"type": "tool_use", "id": "t", "name": "f", "input": {}}
    chunks = [*translator.events(ic.messages_stream_of(message(use, stop="tool_use")))]

    assert [{"name": "f", "arguments": ""}, {"arguments": "{}"}] == [
        choice["delta"]["function_call"] for chunk in chunks for choice in chunk["choices"]
        if "function_call" in choice["delta"]]


def test_openai_itself_has_tools_of_text_and_their_grammars_in_chat_as_well():
    grammar = {"type": "grammar", "syntax": "lark", "definition": "start: /a+/"}
    losses = ic.Losses()
    translator = ic.Translator("responses", "chat", {
        "model": "gpt-4o", "tools": [{"type": "custom", "name": "patch", "format": grammar}],
        "tool_choice": {"type": "custom", "name": "patch"}, "input": [
            {"role": "user", "content": "hi"},
            {"type": "custom_tool_call", "call_id": "call_1", "name": "patch", "input": "aa"},
            {"type": "custom_tool_call_output", "call_id": "call_1", "output": "ok"}]},
        losses, ic.Target(1000, True, server(True)))
    request = translator.request

    assert refused_by_openai(request) is None and not losses.adjusted
    assert ([{"type": "custom", "custom": {"name": "patch", "format": grammar}}],
            {"type": "custom", "custom": {"name": "patch"}}) == (
        request["tools"], request["tool_choice"])
    assert [{"id": "call_1", "type": "custom", "custom": {"name": "patch", "input": "aa"}}] \
        == request["messages"][1]["tool_calls"]


def test_a_refusal_in_a_chat_history_is_said_to_claude_as_text():
    said = {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}
    translator, _ = to_claude({"messages": [USER, said, USER]})

    assert [text("No.")] == translator.request["messages"][1]["content"]


def test_another_vendors_own_tools_are_reported_and_claudes_searches_are_shown():
    losses = ic.Losses()
    translator = ic.Translator("responses", "messages", {
        "model": NEW, "input": "hi", "tools": [
            {"type": "code_interpreter"}, {"type": "web_search"}]}, losses, ic.Target(1000))
    searched = translator.answer(message(
        {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {"query": "q"}},
        {"type": "web_search_tool_result", "tool_use_id": "s", "content": []}, text("Found.")))

    assert ["tools.code_interpreter"] == losses.dropped
    assert ("web_search_call", "q") == (searched["output"][0]["type"],
                                        searched["output"][0]["action"]["query"])


def stream_of(whole, pieces=3):
    """Anthropic's events for a whole message, with its text and JSON cut into pieces."""
    yield {"type": "message_start", "message": {
        **whole, "content": [], "stop_reason": None, "usage": {**MESSAGE_USAGE,
                                                               "output_tokens": 1}}}
    yield {"type": "ping"}
    for index, block in enumerate(whole["content"]):
        kind = block["type"]
        blank = {"text": {"text": ""}, "thinking": {"thinking": "", "signature": ""},
                 "tool_use": {"input": {}}}.get(kind, {})
        yield {"type": "content_block_start", "index": index, "content_block": {**block, **blank}}
        said = {"text": block.get("text"), "thinking": block.get("thinking"),
                "tool_use": json.dumps(block.get("input")) if block.get("input") else ""}.get(kind)
        names = {"text": ("text_delta", "text"), "thinking": ("thinking_delta", "thinking"),
                 "tool_use": ("input_json_delta", "partial_json")}
        size = max(1, len(said or "") // pieces)
        for at in range(0, len(said or ""), size):
            yield {"type": "content_block_delta", "index": index,
                   "delta": {"type": names[kind][0], names[kind][1]: said[at:at + size]}}
        if kind == "thinking":
            yield {"type": "content_block_delta", "index": index,
                   "delta": {"type": "signature_delta", "signature": block["signature"]}}
        yield {"type": "content_block_stop", "index": index}
    yield {"type": "message_delta", "delta": {"stop_reason": whole["stop_reason"],
                                              "stop_details": whole.get("stop_details")},
           "usage": {"output_tokens": MESSAGE_USAGE["output_tokens"], "input_tokens": None}}
    yield {"type": "message_stop"}


def calls_in(said):
    """Tool calls with their arguments parsed: JSON may be written in more than one way."""
    return [(c["id"], c["type"], c[c["type"]]["name"], c[c["type"]].get("input")
             or json.loads(c[c["type"]]["arguments"])) for c in said.get("tool_calls", ())]


STREAMED = {
    "text": message(text("hello there")),
    "nothing": message(),
    "thinking, text, tools": message(
        {"type": "thinking", "thinking": "Thinking", "signature": "sig"}, text("so"),
        {"type": "tool_use", "id": "t1", "name": "f", "input": {"n": 1}},
        {"type": "tool_use", "id": "t2", "name": "f", "input": {}}, stop="tool_use"),
    "text after a tool": message({"type": "tool_use", "id": "t1", "name": "f",
                                  "input": {"a": "ü"}},
                                 text("and"), stop="tool_use"),
    "a custom tool": message({"type": "tool_use", "id": "t1", "name": "c",
                              "input": {"input": "raw"}}, stop="tool_use"),
    "a refusal": message(text("I"), stop="refusal",
                         stop_details={"type": "refusal", "explanation": "no"}),
    "redacted": message({"type": "redacted_thinking", "data": "D"}, text("x")),
}


@pytest.mark.parametrize("asks_usage", [False, True])
@pytest.mark.parametrize("whole", STREAMED.values(), ids=STREAMED)
def test_a_stream_of_claude_folds_to_its_whole_answer(whole, asks_usage):
    fields = {"stream": True, "stream_options": {"include_usage": asks_usage},
              "tools": [tool(), {"type": "custom", "custom": {"name": "c"}}]}
    translator, _ = to_claude(fields)

    folded, finish, usage = check_chat_stream(
        list(translator.events(stream_of(whole))), asks_usage)

    expected = translator.answer(whole)
    said = expected["choices"][0]["message"]
    assert (said["content"] or "", expected["choices"][0]["finish_reason"]) == (
        folded["content"], finish)
    assert calls_in(said) == calls_in(folded)
    assert (said.get("refusal"), said.get("reasoning_content")) == (
        folded.get("refusal"), folded.get("reasoning_content"))
    assert said.get("thinking_blocks") == ([
        {name: value for name, value in block.items() if name != "index"}
        for block in folded.get("thinking_blocks", ())] or None)
    assert usage == (expected["usage"] if asks_usage else None)


@pytest.mark.parametrize("status, kind, told, expected", [
    (400, "invalid_request_error", "bad", (400, "invalid_request_error", None)),
    (400, "invalid_request_error", "prompt is too long: 2 tokens",
     (400, "invalid_request_error", "context_length_exceeded")),
    (401, "authentication_error", "no", (401, "invalid_request_error", "invalid_api_key")),
    (402, "billing_error", "pay", (429, "insufficient_quota", "insufficient_quota")),
    (403, "permission_error", "no", (403, "invalid_request_error", "permission_denied")),
    (404, "not_found_error", "?", (404, "invalid_request_error", "model_not_found")),
    (413, "request_too_large", "big", (413, "invalid_request_error", "request_too_large")),
    (429, "rate_limit_error", "slow", (429, "requests", "rate_limit_exceeded")),
    (500, "api_error", "oops", (500, "server_error", None)),
    (504, "timeout_error", "late", (504, "server_error", "timeout")),
    (529, "overloaded_error", "busy", (503, "server_error", "overloaded")),
    (418, "teapot", "short", (418, "invalid_request_error", None)),
])
def test_errors_of_claude_in_openais_words(status, kind, told, expected):
    translator, _ = to_claude({})

    got, body = translator.error(status, {"type": "error", "error": {
        "type": kind, "message": told}}, "req_1")

    assert expected == (got, body["error"]["type"], body["error"]["code"])
    assert told == body["error"]["message"]


class ToChat(NamedTuple):
    """What a server of chat completions gets of a field of Messages."""
    rule: str
    fields: dict
    gets: dict
    model: str = "gpt-4o"
    is_openai: bool = True
    dropped: list = []
    adjusted: dict = {}


TO_CHAT = [
    ToChat("model", {}, gets={"model": "gpt-4o"}),
    ToChat("max_tokens", {}, gets={"max_completion_tokens": 100}),
    ToChat("max_tokens", {}, gets={"max_tokens": 100, "max_completion_tokens": None}, model="qwen",
        is_openai=False),
    ToChat("max_tokens", {"max_tokens": 10 ** 6}, gets={"max_completion_tokens": 128_000},
        adjusted={"max_tokens": "128000"}),
    ToChat("stop_sequences", {"stop_sequences": ["a"]}, gets={"stop": ["a"]}),
    ToChat("stop_sequences", {"stop_sequences": list("abcde")}, gets={"stop": list("abcd")},
        dropped=["stop_sequences"]),
    ToChat("stop_sequences", {"stop_sequences": ["a"]}, gets={"stop": None}, model="gpt-5.5",
        dropped=["stop_sequences"]),
    ToChat("temperature", {"temperature": 0.5}, gets={"temperature": 0.5}),
    ToChat("temperature", {"temperature": 0.5}, gets={"temperature": None}, model="gpt-5.5",
        dropped=["temperature"]),
    ToChat("temperature", {"temperature": 1}, gets={"temperature": None}, model="gpt-5.5"),
    ToChat("top_p", {"top_p": 0.5}, gets={"top_p": 0.5}),
    ToChat("top_k", {"top_k": 5}, gets={"top_k": None}, dropped=["top_k"]),
    ToChat("stream", {"stream": True}, gets={"stream": True}),
    ToChat("thinking", {"thinking": {"type": "enabled", "budget_tokens": 10_000}},
        gets={"reasoning_effort": "medium"}, model="gpt-5.5"),
    ToChat("thinking", {"thinking": {"type": "enabled", "budget_tokens": 10_000}},
        gets={"reasoning_effort": None}),
    ToChat("output_config", {"output_config": {"effort": "max"}},
        gets={"reasoning_effort": "xhigh"}, model="gpt-5.5",
        adjusted={"output_config.effort": "xhigh"}),
    ToChat("output_config", {"output_config": {"task_budget": {}}}, gets={}, model="gpt-5.5",
        dropped=["output_config.task_budget"]),
    ToChat("output_config", {"output_config": {"format": {
        "type": "json_schema", "schema": SCHEMA}}}, gets={"response_format": {
            "type": "json_schema", "json_schema": {"name": "output", "schema": SCHEMA,
                                                   "strict": True}}}),
    ToChat("output_format", {"output_format": {
        "type": "json_schema", "schema": {"type": "object", "properties": {"n": {}}}}},
        gets={"response_format": {"type": "json_schema", "json_schema": {
         "name": "output", "schema": {"type": "object", "properties": {"n": {}}},
         "strict": False}}}),
    *[ToChat("output_config", {"output_config": {"effort": asked}}, gets={"reasoning_effort": told},
        model=model, adjusted={} if told == asked else {"output_config.effort": told})
      for model, asked, told in (
          ("o3", "xhigh", "high"), ("gpt-5-mini", "low", "low"), ("gpt-5.1", "max", "high"),
          ("gpt-5.2", "xhigh", "xhigh"), ("gpt-5.1-chat-latest", "low", "medium"),
          ("gpt-6-astra", "max", "xhigh"), ("gpt-5.6-luna", "max", "xhigh"),
          ("gpt-6.1-sol", "none", "low"), ("gpt-6-astra", "minimal", "low"),
          ("gpt-5.6", "none", "none"), ("gpt-7", "none", "low"))],
    *[ToChat("thinking", {"thinking": thinking}, gets={"reasoning_effort": told}, model=model,
        adjusted={"thinking": told} if changed else {})
      for model, thinking, told, changed in (
          ("gpt-5.5", {"type": "disabled"}, "none", False), ("o3", {"type": "disabled"}, "low", True),
          ("gpt-5", {"type": "disabled"}, "minimal", True),
          ("gpt-5.5", {"type": "between_tools"}, "none", False),
          ("gpt-5", {"type": "enabled", "budget_tokens": 1024}, "minimal", False),
          ("o3", {"type": "enabled", "budget_tokens": 1024}, "low", True),
          ("gpt-5.5", {"type": "enabled", "budget_tokens": 40_000}, "xhigh", False),
          ("gpt-5.5", {"type": "adaptive"}, None, False))],
    # OpenAI's 400s of reasoning beside tools
    ToChat("output_config", {"tools": [{"name": "f"}], "output_config": {
        "effort": "high"}}, gets={"reasoning_effort": None}, model="gpt-5.5",
        dropped=["output_config.effort"]),
    ToChat("thinking", {"tools": [{"name": "f"}], "thinking": {
        "type": "enabled", "budget_tokens": 4096}}, gets={"reasoning_effort": None},
        model="gpt-5.4", dropped=["thinking"]),
    ToChat("thinking", {"tools": [{"name": "f"}], "thinking": {"type": "disabled"}},
        gets={"reasoning_effort": None}, model="gpt-5.4"),
    ToChat("output_config", {"tools": [{"name": "f"}], "output_config": {
        "effort": "high"}}, gets={"reasoning_effort": "none"}, model="gpt-5.6-terra",
        adjusted={"output_config.effort": "none"}),
    ToChat("output_config", {"tools": [{"name": "f"}]}, gets={"reasoning_effort": "none"},
        model="gpt-6-sol", adjusted={"output_config.effort": "none"}),
    ToChat("output_config", {"tools": [{"name": "f"}], "output_config": {
        "effort": "high"}}, gets={"reasoning_effort": "high"}, model="gpt-5.1"),
    ToChat("temperature", {"tools": [{"name": "f"}], "temperature": 0.5},
        gets={"temperature": 0.5}, model="gpt-5.6", adjusted={"output_config.effort": "none"}),
    ToChat("metadata", {"metadata": {"user_id": json.dumps({
        "device_id": "d", "session_id": "01234567-89ab-cdef-0123-456789abcdef"})}},
        gets={"prompt_cache_key": "01234567-89ab-cdef-0123-456789abcdef"}),
    ToChat("metadata", {"metadata": {
        "user_id": "user_ab_account__session_01234567-89ab-cdef-0123-456789abcdef"}},
        gets={"prompt_cache_key": "01234567-89ab-cdef-0123-456789abcdef"}),
    ToChat("metadata", {"metadata": {"user_id": "u"}},
        gets={"safety_identifier": ic._hashed("u", 64)}),
    ToChat("metadata", {"metadata": {"user_id": "u"}}, gets={"safety_identifier": None},
        model="qwen", is_openai=False),
    ToChat("service_tier", {"service_tier": "standard_only"}, gets={"service_tier": "default"}),
    ToChat("speed", {"speed": "fast"}, gets={"speed": None}, dropped=["speed"]),
    ToChat("cache_control", {"cache_control": {"type": "ephemeral"}},
        gets={"cache_control": None}),
    ToChat("context_management", {"context_management": {"edits": [
        {"type": "clear_thinking_20251015"}]}}, gets={"context_management": None}),
    ToChat("context_management", {"context_management": {"edits": [
        {"type": "compact_20260112"}]}}, gets={}, dropped=["context_management"]),
    ToChat("mcp_servers", {"mcp_servers": []}, gets={"mcp_servers": None}),
    ToChat("skills", {"skills": []}, gets={"skills": None}),
    *[ToChat(name, {name: None}, gets={name: None})
      for name in ("container", "compaction", "thread")],
    ToChat("thread", {"thread": {"type": "create"}}, gets={"thread": None}),
    ToChat("unknown", {"fallbacks": ["x"]}, gets={"fallbacks": None}, dropped=["fallbacks"]),
    ToChat("system", {"system": "S"}, gets={"messages": [
        {"role": "system", "content": "S"}, USER]}),
    ToChat("system", {"system": [text("x-anthropic-billing-header: v1"), text("S"),
                                            text("T")]},
        gets={"messages": [{"role": "developer", "content": [text("S"), text("T")]}, USER]},
        model="gpt-5.5"),
    ToChat("system", {"system": [text("S"), text("T")]},
        gets={"messages": [{"role": "system", "content": "S\n\nT"}, USER]}, model="qwen",
        is_openai=False),
    ToChat("tools", {"tools": [{"name": "f", "description": "d",
                                          "input_schema": SCHEMA}]},
        gets={"tools": [{"type": "function", "function": {
         "name": "f", "parameters": SCHEMA, "description": "d"}}]}),
    ToChat("tools", {"tools": [
        {"name": "DeferredToolPlaceholder", "defer_loading": True},
        {"name": "f", "input_schema": {"$schema": "x", **SCHEMA}, "strict": True,
         "cache_control": {"type": "ephemeral"}, "input_examples": [{}]}]},
        gets={"tools": [{"type": "function", "function": {"name": "f", "parameters": SCHEMA,
                                                  "strict": True}}]}),
    ToChat("tools", {"tools": [{"name": "f", "strict": True, "input_schema": {
        "type": "object", "properties": {"n": {}}}}]}, gets={"tools": [{
            "type": "function", "function": {"name": "f", "parameters": {
                "type": "object", "properties": {"n": {}}}}}]}, dropped=["tools.strict"]),
    ToChat("tools", {"tools": [
        {"type": "web_search_20250305", "name": "web_search"}, {"name": "f"}]},
        gets={"tools": [{"type": "function", "function": {
         "name": "f", "parameters": {"type": "object", "properties": {}}}}]},
        dropped=["tools.web_search_20250305"]),
    ToChat("tools", {"tools": [{"type": "bash_20250124", "name": "bash"}]},
        gets={"tools": [{"type": "function", "function": {
         "name": "bash", "parameters": ic.CLIENT_TOOLS[0][2],
         "description": ic.CLIENT_TOOLS[0][1]}}]}, adjusted={"tools.bash_20250124": "function"}),
    ToChat("tool_choice", {"tools": [{"name": "f"}], "tool_choice": {
        "type": "tool", "name": "gone"}}, gets={"tool_choice": None},
        adjusted={"tool_choice": "auto"}),
    *[ToChat("tool_choice", {"tools": [{"name": "f"}], "tool_choice": {"type": kind}},
        gets={"tool_choice": told}) for kind, told in (
           ("auto", "auto"), ("any", "required"), ("none", "none"))],
    ToChat("output_config", {"output_config": {"effort": "high"}, "messages": [
        {**USER, "output_config": {"effort": "low"}}]}, gets={"reasoning_effort": "low"},
        model="gpt-5.1"),
    ToChat("tool_choice", {"tools": [{"name": "f"}], "tool_choice": {
        "type": "tool", "name": "f", "disable_parallel_tool_use": True}},
        gets={"tool_choice": {"type": "function", "function": {"name": "f"}},
      "parallel_tool_calls": False}),
]


@pytest.mark.parametrize("row", TO_CHAT, ids=[f"{row.rule}-{number}"
                                              for number, row in enumerate(TO_CHAT)])
def test_a_messages_field_on_chat(row):
    translator, losses = to_chat(row.fields, row.model, row.is_openai)

    assert row.gets == {name: translator.request.get(name) for name in row.gets}
    assert (row.dropped, row.adjusted) == (losses.dropped, losses.adjusted)


LOW_TO_XHIGH = ("low", "medium", "high", "xhigh")


@pytest.mark.parametrize("model, efforts", [
    *[(name, ("none", *LOW_TO_XHIGH, "max")) for name in (
        "gpt-5.6", "gpt-5.6-sol", "gpt-5.6-luna-2026-07-09", "gpt-5.10")],
    *[(name, (*LOW_TO_XHIGH, "max")) for name in (
        "gpt-6-astra", "gpt-6-sol", "gpt-6.1-sol", "gpt-6.2-astra", "gpt-7", "gpt-10-x")],
    ("gpt-5.5", ("none", *LOW_TO_XHIGH)), ("gpt-5-codex", ("none", *LOW_TO_XHIGH)),
    ("gpt-5.1", ("none", "low", "medium", "high")), ("o3", ("low", "medium", "high")),
    ("gpt-4o", ())])
def test_the_greatest_effort_is_for_the_newest_families_in_responses(model, efforts):
    family = ic.gpt_of(model)

    assert efforts == family.responses_efforts
    assert "max" not in family.efforts


def test_every_rule_of_messages_fields_has_a_golden_pair():
    assert set(ic.MESSAGES_RULES) - {row.rule for row in TO_CHAT} == {"messages"}


@pytest.mark.parametrize("fields", [
    {"mcp_servers": [{"url": "x"}]}, {"container": "c"}, {"skills": ["s"]},
    {"compaction": {}}, {"thread": "t"}, {"max_tokens": None}, {"messages": []},
    {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
    {"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "file"}}]}]},
    {"messages": [{"role": "oracle", "content": "x"}]}])
def test_what_cannot_be_said_to_a_chat_server_is_refused(fields):
    with pytest.raises(ic.BadRequest):
        to_chat(fields)


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png",
                                     "data": "iVBORw0KGgo="}}
IMAGE_URL = {"type": "image_url", "image_url": {"url": PNG}}
CALLED = {"role": "assistant", "content": None, "tool_calls": [call(call_id="t", arguments="{}")]}
USE = {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "f", "input": {}}]}


def result(content=None, **more):
    return {"type": "tool_result", "tool_use_id": "t", "content": content, **more}


LONG_ID = "call_" + ic._hashed("t" * 41, 24)
CHAT_TURNS = {
    "what was searched and documents of parts are text": (
        [{"role": "user", "content": [
            {"type": "document", "source": {"type": "content", "content": [text("a"), text("")]}},
            {"type": "search_result", "title": "T", "source": "https://x", "content": [
                text("b"), text("c")]}]}],
        [{"role": "user", "content": [text("a"), text("T (https://x)\nb\nc")]}]),
    "text": ([USER], [USER]),
    "parts": ([{"role": "user", "content": [text("a"), IMAGE]}],
              [{"role": "user", "content": [text("a"), IMAGE_URL]}]),
    "results stand alone and before the rest": (
        [USER, USE, {"role": "user", "content": [text("so"), result("R")]}],
        [USER, CALLED, {"role": "tool", "tool_call_id": "t", "content": "R"},
         {"role": "user", "content": "so"}]),
    "an image in a result follows as the user's": (
        [USER, USE, {"role": "user", "content": [result([text("R"), IMAGE])]}],
        [USER, CALLED, {"role": "tool", "tool_call_id": "t", "content": "R\n[image]"},
         {"role": "user", "content": [text("Image from tool f:"), IMAGE_URL]}]),
    "an error says so": ([USER, USE, {"role": "user", "content": [result("R", is_error=True)]}],
                         [USER, CALLED, {"role": "tool", "tool_call_id": "t",
                                         "content": "Error: R"}]),
    "an absent result is empty": ([USER, USE, {"role": "user", "content": [result()]}],
                                  [USER, CALLED, {"role": "tool", "tool_call_id": "t",
                                                  "content": ""}]),
    "thinking stays behind": ([USER, {"role": "assistant", "content": [
        {"type": "thinking", "thinking": "T", "signature": "s"}, text("a"), text("b")]}, USER],
        [USER, {"role": "assistant", "content": "ab"}, USER]),
    "a system message in place": (
        [USER, {"role": "system", "content": "S"}, USER],
        [USER, {"role": "system", "content": "S"}, USER]),
    "a system message between call and result goes behind": (
        [USER, USE, {"role": "system", "content": [text("S")]},
         {"role": "user", "content": [result("R")]}],
        [USER, CALLED, {"role": "tool", "tool_call_id": "t", "content": "R"},
         {"role": "system", "content": "S"}]),
    "a missing result is made": (
        [USER, USE, USER],
        [USER, CALLED, {"role": "tool", "tool_call_id": "t", "content": "[no result provided]"},
         USER]),
    "a result without its call is text": (
        [{"role": "user", "content": [result("R")]}, {"role": "assistant", "content": "a"},
         {"role": "user", "content": [result("S")]}],
        [{"role": "user", "content": "[result of tool call t]\nR"},
         {"role": "assistant", "content": "a"},
         {"role": "user", "content": "[result of tool call t]\nS"}]),
    "results in two turns stand behind their calls": (
        [USER, {"role": "assistant", "content": [USE["content"][0],
                                                 {**USE["content"][0], "id": "u"}]},
         {"role": "user", "content": [{**result("U"), "tool_use_id": "u"}, text("so")]},
         {"role": "user", "content": [result("R")]}],
        [USER, {**CALLED, "tool_calls": [call(call_id="t"), call(call_id="u")]},
         {"role": "tool", "tool_call_id": "t", "content": "R"},
         {"role": "tool", "tool_call_id": "u", "content": "U"}, {"role": "user", "content": "so"}]),
    "ids that are too long are hashed, of call and result alike": (
        [USER, {"role": "assistant", "content": [{**USE["content"][0], "id": "t" * 41}]},
         {"role": "user", "content": [{**result("R"), "tool_use_id": "t" * 41}]}],
        [USER, {**CALLED, "tool_calls": [call(call_id=LONG_ID)]},
         {"role": "tool", "tool_call_id": LONG_ID, "content": "R"}]),
    "an assistant that said nothing goes": (
        [USER, {"role": "assistant", "content": [{"type": "redacted_thinking", "data": "x"}]}, USER],
        [USER, USER]),
    "a system message for one turn only": (
        [USER, {"role": "system", "content": "S", "clear_at": "next_user_message"},
         {"role": "assistant", "content": "a"}, USER,
         {"role": "system", "content": "T", "clear_at": "next_user_message"}],
        [USER, {"role": "assistant", "content": "a"}, USER, {"role": "system", "content": "T"}]),
    "documents": ([{"role": "user", "content": [
        {"type": "document", "title": "a.pdf", "source": {
            "type": "base64", "media_type": "application/pdf", "data": "JVBERi0="}},
        {"type": "document", "title": "N", "source": {"type": "text", "data": "words"}}]}],
        [{"role": "user", "content": [
            {"type": "file", "file": {"filename": "a.pdf", "file_data": PDF}},
            text("<document title=N>\nwords\n</document>")]}]),
}


@pytest.mark.parametrize("messages, expected", CHAT_TURNS.values(), ids=CHAT_TURNS)
def test_messages_turns_on_chat(messages, expected):
    assert expected == to_chat({"messages": messages})[0].request["messages"]


def test_other_servers_get_no_later_system_message_and_alternating_roles():
    """Chat templates of local models raise on both."""
    translator, losses = to_chat({"system": "S", "messages": [
        USER, {"role": "system", "content": "T"}, USE,
        {"role": "user", "content": [result([text("R"), IMAGE]), text("so")]}, USER]},
        "qwen", is_openai=False)

    assert [{"role": "system", "content": "S"},
            {"role": "user", "content": "hi\n\n[system instruction, not from the user]\nT"}, CALLED,
            {"role": "tool", "tool_call_id": "t", "content": "R\n[image]"},
            {"role": "user", "content": [text("Image from tool f:"), IMAGE_URL, text("so"),
                                         text("hi")]}] == translator.request["messages"]
    assert {"messages.system": "user"} == losses.adjusted


def test_a_server_that_wants_its_reasoning_back_gets_it_of_every_answer():
    said = {"role": "assistant", "content": [
        {"type": "thinking", "thinking": "T", "signature": "icx1.abc"}, *USE["content"]]}
    translator, _ = to_chat({"messages": [
        USER, said, {"role": "user", "content": [result("R")]},
        {"role": "assistant", "content": "a"}, USER]}, "deepseek-v4", is_openai=False,
        reasoning_field="reasoning_content")

    assert ["T", ""] == [turn["reasoning_content"] for turn in translator.request["messages"]
                         if turn["role"] == "assistant"]


def test_tools_added_and_removed_within_the_conversation():
    def change(kind, tool):
        return {"role": "system", "content": [{"type": kind, "tool": tool}]}

    translator, _ = to_chat({"tools": [{"name": "f"}, {"name": "g"}, {"name": "h"}], "messages": [
        USER, change("tool_removal", {"type": "tool_reference", "name": "g"}),
        change("tool_removal", {"type": "tool_reference", "name": "h"}),
        change("tool_addition", {"type": "tool_reference", "name": "h"}),
        change("tool_addition", {"type": "tool_definition", "definition": {"name": "i"}})]})

    assert ["f", "h", "i"] == [tool["function"]["name"] for tool in translator.request["tools"]]


@pytest.mark.parametrize("kind, properties", [
    ("bash_20250124", {"command", "restart"}),
    ("text_editor_20250728", {"command", "path", "file_text", "old_str", "new_str", "insert_text",
                              "insert_line", "view_range"}),
    ("memory_20250818", {"command", "path", "file_text", "old_str", "new_str", "insert_text",
                         "insert_line", "view_range", "old_path", "new_path"})])
def test_tools_that_claude_knows_by_heart_are_spelt_out_for_others(kind, properties):
    tool = to_chat({"tools": [{"type": kind, "name": "x"}]})[0].request["tools"][0]["function"]

    assert properties == set(tool["parameters"]["properties"]) and tool["description"]


def test_arguments_that_come_after_another_block_break_the_stream():
    translator, _ = to_chat({"stream": True})

    with pytest.raises(ic.UpstreamBroke):
        list(translator.events(chunks_of(piece(arguments='{"n":', id="c", name="f"),
                                         {"content": "words"}, piece(arguments=" 1}"))))


def test_a_ping_reaches_a_client_of_messages_also_before_the_message_begins():
    chunks = [{"type": "ping"}, *chunks_of({"content": "a"})]
    chunks.insert(2, {"type": "ping"})

    kinds = [event["type"] for event in to_chat({"stream": True})[0].events(chunks)]

    assert ["ping", "message_start", "ping", "content_block_start", "content_block_delta", "ping",
            "content_block_stop"] == kinds[:7]


def test_a_long_tool_name_is_cut_for_openai_and_comes_back():
    name = "mcp__" + "x" * 80
    translator, _ = to_chat({"tools": [{"name": name}]})
    short = translator.request["tools"][0]["function"]["name"]

    answer = translator.answer({"choices": [{"message": {"tool_calls": [call(short)]},
                                             "finish_reason": "tool_calls"}]})

    assert len(short) == 64 and name == answer["content"][0]["name"]


CHAT_USAGE = {"prompt_tokens": 20, "completion_tokens": 5, "total_tokens": 25,
              "prompt_tokens_details": {"cached_tokens": 8, "cache_write_tokens": 2},
              "completion_tokens_details": {"reasoning_tokens": 3}}


def completion(finish="stop", **said):
    return {"id": "chatcmpl-1", "model": "gpt-4o", "usage": CHAT_USAGE, "choices": [
        {"index": 0, "message": {"role": "assistant", "content": None, **said},
         "finish_reason": finish}]}


@pytest.mark.parametrize("said, finish, stop", [
    ({"content": "x"}, "stop", "end_turn"), ({"content": "x"}, "length", "max_tokens"),
    ({"tool_calls": [call()]}, "tool_calls", "tool_use"), ({"tool_calls": [call()]}, "stop",
                                                           "tool_use"),
    ({"content": "x"}, "tool_calls", "end_turn"), ({"content": "x"}, "content_filter", "refusal"),
    ({"refusal": "no"}, "stop", "refusal"), ({"content": "x"}, "eos", "end_turn"),
    ({"function_call": {"name": "f", "arguments": "{}"}}, "function_call", "tool_use")])
def test_finish_reasons_of_chat_servers(said, finish, stop):
    assert stop == to_chat({})[0].answer(completion(finish, **said))["stop_reason"]


def test_an_answer_of_a_chat_server_as_a_message():
    answer = to_chat({})[0].answer(completion(
        "tool_calls", content="a", reasoning_content="T",
        tool_calls=[call(arguments='{"n": 1}'), call(call_id=None)]))

    thinking, said, first, second = answer["content"]
    assert ("T", "a") == (thinking["thinking"], said["text"])
    assert thinking["signature"].startswith("icx1.")
    assert ({"n": 1}, "call_1") == (first["input"], first["id"])
    assert second["id"].startswith("toolu_")
    assert {"input_tokens": 10, "cache_read_input_tokens": 8, "cache_creation_input_tokens": 2,
            "cache_creation": {"ephemeral_5m_input_tokens": 2, "ephemeral_1h_input_tokens": 0},
            "output_tokens": 5, "output_tokens_details": {"thinking_tokens": 3},
            "server_tool_use": None, "service_tier": "standard"} == answer["usage"]


def test_reasoning_that_only_the_total_counts_is_output_for_the_client_too():
    """xAI's completion_tokens leave it out."""
    usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 40}
    assert 30 == ic.messages_usage(ic.chat_tokens(usage))["output_tokens"]
    assert 5 == ic.messages_usage(ic.chat_tokens({**usage, "total_tokens": 15}))["output_tokens"]
    assert 5 == ic.messages_usage(ic.chat_tokens({**usage, "total_tokens": None}))["output_tokens"]


@pytest.mark.parametrize("tier, told", [
    ("priority", "priority"), ("default", "standard"), ("flex", "standard"), (None, "standard")])
def test_the_service_tier_of_a_chat_server_is_told(tier, told):
    translator, _ = to_chat({})
    whole = translator.answer({**completion("stop", content="a"), "service_tier": tier})
    chunks = [{**chunk, "service_tier": tier} for chunk in chunks_of({"content": "a"})]
    events = [*translator.events(chunks)]

    assert told == whole["usage"]["service_tier"]
    assert [told, told] == [event["message"]["usage"]["service_tier"] if "message" in event
                            else event["usage"]["service_tier"]
                            for event in events if event["type"] in ("message_start",
                                                                     "message_delta")]


def chunks_of(*deltas, finish="stop", usage="after"):
    base = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "gpt-4o"}
    for delta in deltas:
        yield {**base, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
    yield {**base, "choices": [{"index": 0, "delta": {}, "finish_reason": finish}],
           **({"usage": CHAT_USAGE} if usage == "with" else {})}
    if usage == "after":
        yield {**base, "choices": [], "usage": CHAT_USAGE}


def piece(index=0, arguments="", **more):
    function = {"arguments": arguments, **({"name": more.pop("name")} if "name" in more else {})}
    return {"tool_calls": [{**({} if index is None else {"index": index}), **more,
                            "function": function}]}


# what it shows -> (deltas, finish, expected content as (kind, value) pairs)
CHAT_STREAMS = {
    "role and text": ([{"role": "assistant", "content": ""}, {"content": "he"}, {"content": "y"}],
                      "stop", [("text", "hey")]),
    "no role chunk": ([{"content": "hey"}], "stop", [("text", "hey")]),
    "nothing": ([{"role": "assistant"}], "stop", []),
    "reasoning, text, tool": (
        [{"reasoning_content": "T"}, {"content": "x"}, piece(id="a", name="f"),
         piece(arguments='{"n"'), piece(arguments=": 1}")], "tool_calls",
        [("thinking", "T"), ("text", "x"), ("tool_use", {"n": 1})]),
    "text after a tool is a new block": (
        [{"content": "x"}, piece(id="a", name="f", arguments="{}"), {"content": "y"}],
        "tool_calls", [("text", "x"), ("tool_use", {}), ("text", "y")]),
    "a call without arguments": ([piece(id="a", name="f")], "tool_calls", [("tool_use", {})]),
    "two parallel calls": (
        [piece(0, id="a", name="f", arguments='{"n": 1}'),
         piece(1, id="b", name="g", arguments='{"n": 2}')], "tool_calls",
        [("tool_use", {"n": 1}), ("tool_use", {"n": 2})]),
    "two interleaved calls": (
        [piece(0, id="a", name="f"), piece(1, id="b", name="g"), piece(0, '{"n":'),
         piece(1, '{"n":'), piece(0, " 1}"), piece(1, " 2}")], "tool_calls",
        [("tool_use", {"n": 1}), ("tool_use", {"n": 2})]),
    "a missing index": ([piece(None, id="a", name="f", arguments='{"n"'),
                         piece(None, arguments=": 1}"),
                         piece(None, id="b", name="g", arguments="{}")], "tool_calls",
                        [("tool_use", {"n": 1}), ("tool_use", {})]),
    "a name and an id that are repeated": (
        [piece(0, id="a", name="f", arguments='{"n": '),
         piece(0, id="a", name="f", arguments="1}")], "tool_calls", [("tool_use", {"n": 1})]),
    "a missing id": ([piece(0, name="f", arguments="{}")], "tool_calls", [("tool_use", {})]),
    "finish says stop although there were tools": (
        [piece(0, id="a", name="f", arguments="{}")], "stop", [("tool_use", {})]),
    "empty tool_calls beside content": ([{"content": "x", "tool_calls": []}], "stop",
                                        [("text", "x")]),
    "content and a call in one chunk": ([{"content": "x", **piece(0, id="a", name="f")}],
                                        "tool_calls", [("text", "x"), ("tool_use", {})]),
    "a refusal": ([{"refusal": "no"}], "stop", [("text", "no")]),
}


@pytest.mark.parametrize("is_openai", [True, False])
@pytest.mark.parametrize("usage", ["after", "with", "none"])
@pytest.mark.parametrize("deltas, finish, content", CHAT_STREAMS.values(), ids=CHAT_STREAMS)
def test_a_stream_of_a_chat_server_as_a_message(deltas, finish, content, usage, is_openai):
    translator, _ = to_chat({}, is_openai=is_openai)

    folded = check_message_stream(list(translator.events(
        chunks_of(*deltas, finish=finish, usage=usage))))

    assert content == [(b["type"], b.get("text", b.get("thinking", b.get("input"))))
                       for b in folded["content"]]
    has_tools = any(kind == "tool_use" for kind, _ in content)
    assert ("refusal" if "refusal" in deltas[0] else "tool_use" if has_tools else "end_turn") \
        == folded["stop_reason"]
    if usage != "none":
        assert (10, 5) == (folded["usage"]["input_tokens"], folded["usage"]["output_tokens"])


def test_arguments_of_a_sloppy_server_that_are_no_json_are_wrapped():
    """Bug of others: invalid JSON in a stream crashes the Anthropic SDK."""
    translator, _ = to_chat({}, is_openai=False)

    folded = check_message_stream(list(translator.events(
        chunks_of(piece(0, id="a", name="f", arguments="{bad"), finish="tool_calls"))))

    assert {"__raw": "{bad"} == folded["content"][0]["input"]


def test_a_stream_without_a_finish_is_broken_and_never_an_end_turn():
    translator, _ = to_chat({})
    chunks = list(chunks_of({"content": "x"}))[:1]

    with pytest.raises(ic.UpstreamBroke):
        list(translator.events(chunks))


@pytest.mark.parametrize("status, inner, expected", [
    (400, {"message": "bad"}, (400, "invalid_request_error")),
    (401, {"message": "no"}, (401, "authentication_error")),
    (403, {"message": "no"}, (403, "permission_error")),
    (404, {"message": "?"}, (404, "not_found_error")),
    (409, {"message": "?"}, (409, "conflict_error")),
    (413, {"message": "big"}, (413, "request_too_large")),
    (422, {"message": "odd"}, (400, "invalid_request_error")),
    (429, {"message": "slow"}, (429, "rate_limit_error")),
    (429, {"message": "pay", "code": "insufficient_quota"}, (402, "billing_error")),
    (500, {"message": "oops"}, (500, "api_error")), (502, {"message": "x"}, (500, "api_error")),
    (503, {"message": "busy"}, (529, "overloaded_error")),
    (504, {"message": "late"}, (504, "timeout_error")),
])
def test_errors_of_chat_servers_in_anthropics_words(status, inner, expected):
    got, body = to_chat({})[0].error(status, {"error": inner}, "req_1")

    assert expected == (got, body["error"]["type"])
    assert (inner["message"], "req_1") == (body["error"]["message"], body["request_id"])


def test_a_context_overflow_has_the_words_on_which_claude_code_compacts():
    _, body = to_chat({})[0].error(400, {"error": {
        "code": "context_length_exceeded", "message":
        "This model's maximum context length is 128,000 tokens, your messages are 150,000."}}, "r")

    assert body["error"]["message"].startswith(
        "prompt is too long: 150000 tokens > 128000 maximum")


# There and back.

@pytest.mark.parametrize("said", [
    {"content": "x"}, {"content": None, "tool_calls": [call(arguments='{"n": 1}'),
                                                       call("g", "[1]", "call_2")]},
    {"content": "x", "tool_calls": [call(arguments="{bad")]}])
def test_an_answer_survives_the_way_there_and_back(said):
    finish = "tool_calls" if "tool_calls" in said else "stop"
    there = to_chat({})[0].answer(completion(finish, **said))
    back = to_claude({})[0].answer(there)["choices"][0]

    assert said == {name: back["message"].get(name) for name in said}
    assert finish == back["finish_reason"]


def test_every_recorded_request_is_carried_over_by_the_other_vendors_rules():
    """What real clients sent: refused here with a reason, or taken there."""
    count = 0
    for name, exchange in recordings():
        fields = exchange["request"]["body"]
        if exchange["api"] not in ("messages", "chat") or not isinstance(fields, dict):
            continue
        make = to_chat if exchange["api"] == "messages" else to_claude
        try:
            make(fields, model="gpt-5.6" if make is to_chat else OLD)
            count += 1
        except ic.BadRequest as err:
            assert err.message, name
    assert count > 150


def test_an_estimate_counts_text_and_images_not_their_bytes():
    plain = ic.estimated_input_tokens({"messages": [{"role": "user", "content": "word " * 360}]})
    with_image = ic.estimated_input_tokens({"messages": [{"role": "user", "content": [
        text("word " * 360), {"type": "image", "source": {
            "type": "base64", "media_type": "image/png", "data": "A" * 100_000}}]}]})

    assert 500 <= plain <= 520 and 2_090 <= with_image <= 2_130


# Found by a hostile reviewer.

def folded_stream(*deltas, finish="tool_calls", is_openai=False):
    translator, _ = to_chat({"stream": True}, "gpt-4o" if is_openai else "qwen", is_openai)
    return check_message_stream(list(translator.events(chunks_of(*deltas, finish=finish))))


def tool_uses(message):
    return [(block["name"], block["input"]) for block in message["content"]
            if block["type"] == "tool_use"]


BOTH_CALLS = [("f", {"x": 1}), ("g", {"y": 2})]


@pytest.mark.parametrize("deltas", [
    [piece(0, '{"x": 1}', id="a", name="f"), piece(0, '{"y": 2}', id="b", name="g")],
    [piece(None, '{"x": 1}', id="", name="f"), piece(None, '{"y": 2}', id="", name="g")],
    [{"tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1}'}},
                     {"function": {"name": "g", "arguments": '{"y": 2}'}}]}],
    [piece(None, '{"x":', id="a", name="f"), piece(None, " 1}"),
     piece(None, '{"y":', id="b", name="g"), piece(None, " 2}")]],
    ids=["one index", "no index", "no index in one chunk", "no index in pieces"])
def test_calls_that_share_an_index_or_have_none_are_not_glued(deltas):
    assert BOTH_CALLS == tool_uses(folded_stream(*deltas))


def test_arguments_behind_a_thought_reach_their_call():
    message = folded_stream(piece(0, "", id="a", name="f"), {"reasoning_content": "hm"},
                            piece(0, '{"x":'), {"content": "\n"}, piece(0, " 1}"))

    assert [("f", {"x": 1})] == tool_uses(message)


@pytest.mark.parametrize("names, name", [
    (("get_", "weather"), "get_weather"), (("get_", "get_weather"), "get_weather"),
    (("f", "f"), "f"), (("", "f"), "f"), (("a", "b", "c"), "abc")])
def test_a_name_in_pieces_is_one_as_is_one_that_is_repeated(names, name):
    first, *more = [piece(0, "", name=text) for text in names]

    message = folded_stream({**first, **piece(0, "", id="a", name=names[0])}, *more,
                            piece(0, "{}"), {"tool_calls": [{"index": 0, "function": None}]})

    assert [(name, {})] == tool_uses(message)


def test_calls_keep_the_order_in_which_they_were_named():
    message = folded_stream(
        piece(0, "", id="a", name="f"), piece(1, '{"y": 2}', id="b", name="g"),
        piece(0, '{"x": 1}'))

    assert BOTH_CALLS == tool_uses(message)


@pytest.mark.parametrize("nothing", [{"function": None}, {"function": {}}, {"type": "function"},
                                     {"function": {"name": None, "arguments": ""}}])
def test_what_says_nothing_of_a_call_but_its_id_is_none(nothing):
    message = folded_stream({"content": "x"}, {"tool_calls": [{"index": 0, "id": "a", **nothing}]})

    assert ([], "end_turn") == (tool_uses(message), message["stop_reason"])


@pytest.mark.parametrize("answer", [
    lambda: to_chat({})[0].answer(completion(tool_calls=[{"id": "a", "function": {
        "arguments": '{"x": 1}'}}])),
    lambda: to_claude({})[0].answer(message({"type": "tool_use", "id": "a", "input": {"x": 1}}))],
    ids=["chat", "messages"])
def test_a_call_without_a_name_is_no_answer(answer):
    with pytest.raises(ic.UpstreamBroke, match="without a name"):
        answer()


@pytest.mark.parametrize("functions", [True, False])
def test_ids_that_come_again_are_other_calls_for_claude(functions):
    if functions:
        said = {"role": "assistant", "content": None,
                "function_call": {"name": "f", "arguments": "{}"}}
        results = [{"role": "function", "name": "f", "content": text} for text in "12"]
    else:
        said = {"role": "assistant", "tool_calls": [call(call_id="call_0")]}
        results = [{"role": "tool", "tool_call_id": "call_0", "content": text} for text in "12"]
    translator, losses = to_claude({"messages": [USER, said, results[0], said, results[1], USER],
                                    "tools": [tool()]})

    blocks = [block for turn in translator.request["messages"] for block in turn["content"]]
    ids = [block["id"] for block in blocks if block["type"] == "tool_use"]
    assert 2 == len(set(ids)) and {} == losses.adjusted
    assert list(zip(ids, "12")) == [(block["tool_use_id"], block["content"]) for block in blocks
                                    if block["type"] == "tool_result"]


def test_calls_without_an_id_get_their_results_in_order():
    translator, _ = to_claude({"tools": [tool()], "messages": [
        USER, {"role": "assistant", "tool_calls": [call("f", call_id=""), call("f", call_id="")]},
        {"role": "tool", "tool_call_id": "", "content": "1"}, {"role": "tool", "content": "2"}]})

    assert ["1", "2"] == [block["content"] for block in
                          translator.request["messages"][-1]["content"]]


@pytest.mark.parametrize("arguments", [
    '{"id": 1234567890123456789}', '{"x": NaN}', '{"x": 1e999}', '{"a": 1, "a": 2}',
    '{"x": ' + "[" * 190 + "]" * 190 + "}"])
def test_arguments_that_our_own_reader_refuses_travel_as_text_and_come_back(arguments):
    """Else one call of the model with a long number ends the session for good."""
    translator, _ = to_claude({"tools": [tool()], "messages": [
        USER, {"role": "assistant", "tool_calls": [call(arguments=arguments)]},
        {"role": "tool", "tool_call_id": "call_1", "content": "ok"}]})

    ic.parse_json_object(ic.json_bytes(translator.request))
    block = translator.request["messages"][1]["content"][0]
    assert arguments == ic.input_to_arguments(block["input"])


def test_answers_of_neighbouring_shapes_are_read():
    """Arguments as an object (Ollama), content in parts (Mistral)."""
    translator, _ = to_chat({}, "qwen", is_openai=False)
    parts = [{"type": "thinking", "thinking": [text("hm")]}, text("hello")]

    called = translator.answer(completion("tool_calls", tool_calls=[
        {"id": "a", "function": {"name": "f", "arguments": {"x": 1}}}]))
    whole = translator.answer(completion(content=parts))
    streamed = folded_stream({"content": parts}, finish="stop")

    assert [("f", {"x": 1})] == tool_uses(called)
    for message in (whole, streamed):
        assert ["hm", "hello"] == [block.get("thinking", block.get("text"))
                                   for block in message["content"]]


@pytest.mark.parametrize("finish", ["", "error"])
def test_a_stream_that_ends_in_no_or_a_bad_finish_is_broken(finish):
    with pytest.raises(ic.UpstreamBroke):
        folded_stream({"content": "par"}, finish=finish)


def test_an_empty_finish_does_not_undo_the_one_before():
    base = {"id": "c", "model": "m"}
    translator, _ = to_chat({"stream": True}, "qwen", is_openai=False)

    message = check_message_stream(list(translator.events([
        {**base, "choices": [{"index": 0, "delta": {"content": "p"}, "finish_reason": "length"}]},
        {**base, "choices": [{"index": 0, "delta": {}, "finish_reason": ""}]}])))

    assert "max_tokens" == message["stop_reason"]


@pytest.mark.parametrize("answer", [
    {"choices": []}, {"error": {"message": "boom"}},
    {"choices": [{"message": {"content": "par"}, "finish_reason": "error"}]}])
def test_a_broken_whole_answer_is_no_message(answer):
    with pytest.raises(ic.UpstreamBroke):
        to_chat({})[0].answer(answer)


def test_only_a_stop_that_was_asked_for_is_a_stop_sequence():
    translator, _ = to_chat({"stop_sequences": ["END"]}, "qwen", is_openai=False)
    stops = [translator.answer({"choices": [{"message": {"content": "x"}, "finish_reason": "stop",
                                             "stop_reason": told}]})["stop_sequence"]
             for told in ("END", "eos_token", 7, None)]

    assert ["END", None, None, None] == stops


@pytest.mark.parametrize("schema", [{"type": "object"}, {}, None])
def test_a_tool_without_properties_gets_them_for_openai(schema):
    tools = to_chat({"tools": [{"name": "f", "input_schema": schema}]})[0].request["tools"]

    assert {"type": "object", "properties": {}} == tools[0]["function"]["parameters"]


@pytest.mark.parametrize("schema, is_strict", [
    ({"type": "object", "additionalProperties": False}, True),                 # no arguments
    ({"type": "object"}, False),
    ({"properties": {"properties": {"type": "string"}}, "required": ["properties"],
      "additionalProperties": False}, True),                                   # a name, no keyword
    ({"properties": {"a": {"const": {"type": "object"}}}, "required": ["a"],
      "additionalProperties": False}, True),                                   # a value, no schema
    ({"properties": {"a": {"type": "object", "additionalProperties": False}}, "required": ["a"],
      "additionalProperties": False}, False),
    ({"properties": {"a": {"type": "string"}}, "required": [], "additionalProperties": False},
     False),
    ({"properties": {"a": {"$ref": "#/$defs/a"}}, "required": ["a"],
      "additionalProperties": False, "$defs": {"a": {"type": "object"}}}, False),
    ({"properties": {"a": {"anyOf": [{"type": "string"}, {"type": "null"}]}}, "required": ["a"],
      "additionalProperties": False}, True),
    ({"properties": {"a": {"oneOf": [{"type": "string"}, {"type": "null"}]}}, "required": ["a"],
      "additionalProperties": False}, False),
    ({"properties": {"a": {"type": "string", "default": "x"}}, "required": ["a"],
      "additionalProperties": False}, False),
    ({"properties": {"default": {"type": "string"}}, "required": ["default"],
      "additionalProperties": False}, True),
    ({"properties": {"a": {"description": "of no shape"}}, "required": ["a"],
      "additionalProperties": False}, False),
    ({"properties": {"a": True}, "required": ["a"], "additionalProperties": False}, False),
    ({"properties": {"a": {"type": "array", "items": [{"type": "string"}]}}, "required": ["a"],
      "additionalProperties": False}, False),
])
def test_a_tool_is_strict_for_openai_where_its_schema_lets_it_be(schema, is_strict):
    translator, losses = to_chat({"tools": [{"name": "f", "input_schema": schema,
                                             "strict": True}]})
    assert is_strict is translator.request["tools"][0]["function"].get("strict", False)
    assert ([] if is_strict else ["tools.strict"]) == losses.dropped


@pytest.mark.parametrize("schema, is_sent", [
    (NODE, True), ({"$ref": "#/$defs/N", "$defs": {"N": NODE}}, True),
    ({"type": "array", "items": NODE}, False), ({"anyOf": [NODE, {"type": "null"}]}, False)])
def test_an_output_schema_whose_root_openai_does_not_take_is_told_in_words(schema, is_sent):
    fields = {"system": "S", "output_config": {"format": {"type": "json_schema",
                                                          "schema": schema}}}
    translator, losses = to_chat(fields)
    sent, asked = translator.request.get("response_format"), translator.request["messages"][0]

    assert is_sent == (sent is not None) == ("JSON schema" not in asked["content"])
    assert ({} if is_sent else {"output_config.format": "instructed"}) == losses.adjusted
    if is_sent:
        assert ("object", True) == (sent["json_schema"]["schema"]["type"],
                                    sent["json_schema"]["strict"])
    others, _ = to_chat(fields, is_openai=False)       # vLLM and the like take any
    assert "response_format" in others.request


def test_an_open_output_schema_is_not_strict_for_openai():
    translator, _ = to_chat({"output_config": {"format": {
        "type": "json_schema", "schema": OPEN_SCHEMA}}})

    assert translator.request["response_format"]["json_schema"]["strict"] is False


@pytest.mark.parametrize("schema, enforced", [
    ({"$ref": "#/$defs/N", "$defs": {"N": NODE}}, True),
    ({**NODE, "properties": {"n": {"type": ["object", "null"]}}}, False),
    ({**NODE, "properties": {"n": {"type": ["object", "null"],
        "properties": {"m": {"type": "string"}}, "required": ["m"]}}}, True),
    ({**NODE, "properties": {"default": {"type": "object"}}, "required": ["default"]}, False),
    ({**NODE, "properties": {"n": {"anyOf": [{}], "oneOf": [{}]}}}, False),
    ({**NODE, "properties": {"n": {"enum": ["a", 1, None, True]}}}, True),
    ({**NODE, "properties": {"n": {"enum": ["a", {"b": 1}]}}}, False),
    ({**NODE, "properties": {"n": {"const": ["a"]}}}, False),
    ({**NODE, "properties": {"n": {"default": None, "allOf": [{"$ref": "#/$defs/N"}]}},
      "$defs": {"N": NODE}}, True),                    # as pydantic writes a field with a default
    ({**NODE, "properties": {"n": {"allOf": [{"$ref": "#/$defs/N"}, {"title": "t"}]}},
      "$defs": {"N": NODE}}, False),
    ({**NODE, "properties": {"n": {"type": "string", "pattern": r"^(?!x)\w+$"}}}, True),
    ({**NODE, "properties": {"required": True, "properties": {"type": "string"}}}, True),
    ({**NODE, "properties": {"n": {"type": "array", "items": [{"type": "string"}]}}}, False)])
def test_only_what_claude_can_enforce_is_sent_as_a_schema(schema, enforced):
    request = to_claude({"response_format": {"type": "json_schema", "json_schema": {
        "schema": schema}}})[0].request

    assert enforced == ("output_config" in request)
    if enforced:
        sent = json.dumps(request["output_config"])
        assert "$ref" not in sent or '"$defs"' in sent


@pytest.mark.parametrize("schema", [NODE, {"type": "object"}])
def test_what_a_response_format_says_of_itself_is_told_to_claude(schema):
    for model in (OLD, NEW):
        request = to_claude({"response_format": {"type": "json_schema", "json_schema": {
            "name": "n", "description": "a count of sheep", "schema": schema}}}, model)[0].request
        assert "a count of sheep" in json.dumps(request)
        own = to_claude({"response_format": {"type": "json_schema", "json_schema": {
            "description": "a count of sheep", "schema": {**schema, "description": "own"}}}},
            model)[0].request
        assert '"own"' in json.dumps(own).replace("\\", "")


def test_marks_on_tools_and_told_system_messages_count_among_the_four():
    mark = {"cache_control": {"type": "ephemeral"}}
    texts = [text(str(n), **mark) for n in range(4)]
    for model in (OLD, NEW):
        request = to_claude({"tools": [{**tool(), **mark}], "messages": [
            USER, {"role": "system", "content": [text("s", **mark)]},
            {"role": "user", "content": texts}]}, model)[0].request
        assert 4 == json.dumps(request).count("cache_control")
    assert "cache_control" not in request["tools"][0]


def test_a_run_of_the_assistants_messages_is_one_for_openai():
    def use(call_id):
        return {"role": "assistant", "content": [{**USE["content"][0], "id": call_id}]}

    translator, _ = to_chat({"messages": [USER, use("a"), use("b"), use("c"), {
        "role": "user", "content": [{**result(i), "tool_use_id": i} for i in "abc"]}]})

    assert ["user", "assistant", "tool", "tool", "tool"] == [
        turn["role"] for turn in translator.request["messages"]]


def test_a_file_in_a_tool_result_follows_as_the_users():
    document = {"type": "document", "source": {
        "type": "base64", "media_type": "application/pdf", "data": "JVBERi0="}}
    *_, told, users = to_chat({"messages": [USER, USE, {"role": "user", "content": [
        result([text("R"), document])]}]})[0].request["messages"]

    assert "R\n[file]" == told["content"]
    assert [text("File from tool f:"), {"type": "file", "file": {
        "filename": "document.pdf", "file_data": PDF}}] == users["content"]


def test_small_things_a_reviewer_saw():
    typed = "data:text/plain;charset=utf-8;base64,aGk="
    [file] = to_claude({"messages": [{"role": "user", "content": [
        {"type": "file", "file": {"file_data": typed}}]}]})[0].request["messages"][0]["content"]
    assert "hi" == file["source"]["data"]
    _, losses = to_claude({"thinking": {"type": "adaptive"}, "reasoning_effort": "low"}, NEW)
    assert ["reasoning_effort"] == losses.dropped
    [turn] = to_claude({"messages": [{"role": "user", "content": ["important"]}]})[0].request[
        "messages"]
    assert [text("important")] == turn["content"]
    assert 4 == ic.messages_usage(ic.chat_tokens({"prompt_tokens": 9, "prompt_tokens_details": {
        "cache_creation_tokens": 4}}))["cache_creation_input_tokens"]
    image = {"type": "image_url", "image_url": {"url": PNG}}
    [turn] = to_claude({"messages": [{"role": "tool", "tool_call_id": "x", "content": [image]}]})[
        0].request["messages"]
    assert ["text", "image"] == [block["type"] for block in turn["content"]]


@pytest.mark.parametrize("make", [to_claude, to_chat])
@pytest.mark.parametrize("content", [{"temp": 21}, 7, True])
def test_content_that_is_neither_text_nor_parts_is_refused(make, content):
    with pytest.raises(ic.BadRequest):
        make({"messages": [{"role": "user", "content": content}]})


def test_a_message_between_cleared_system_messages_is_not_lost():
    said = [{"role": "assistant", "content": words} for words in ("a", "", "b")]
    gone = {"role": "system", "content": "S", "clear_at": "next_user_message"}
    translator, _ = to_chat({"messages": [USER, said[0], gone, said[1], said[2], USER]})

    assert ["a", "b"] == [turn["content"] for turn in translator.request["messages"]
                          if turn["role"] == "assistant"]


def test_deltas_of_a_kind_that_is_not_known_and_empty_ones_add_nothing():
    deltas = [{"type": "text_delta", "text": "a"}, {"type": "news_delta", "news": "b"},
              {"type": "text_delta", "text": None}, {"type": "text_delta", "text": ""}]
    start, stop = ({"type": f"content_block_{which}", "index": 0, "content_block": text("")}
                   for which in ("start", "stop"))
    stream = [start, *({"type": "content_block_delta", "index": 0, "delta": delta}
                       for delta in deltas), stop]

    events = [*ic.messages_events(stream, None)]

    assert ["Opened", "More", "Closed"] == [type(event).__name__ for event in events]
    assert "a" == events[-1].part.text


# What a provider or a client can make costly, or odd.


class CountedJoins(collections.UserList):
    joins = 0

    def __iter__(self):
        self.joins += 1
        return iter(self.data)


def test_a_call_whose_name_is_repeated_in_each_delta_is_not_joined_at_each():
    reader = ic._ChunkReader(ic.Terms(ic.ToolNames(64)))

    def events_of(arguments):
        return [*reader.read({"choices": [{"index": 0, "delta": {"tool_calls": [{
            "index": 0, "id": "call_1", "type": "function",
            "function": {"name": "f", "arguments": arguments}}]}}]})]
    events_of('{"a')
    part = reader._newest[0]
    part.pieces = joined = CountedJoins(part.pieces)
    for _ in range(100):
        events_of("bbb")

    assert 101 == len(part.pieces)
    assert joined.joins <= 3
