"""Messages: golden pairs for each rule of what Claude is asked by clients of chat completions, and
its answers against a checker that knows nothing of the translators."""
import json
from typing import NamedTuple

import pytest
from translated import (JPEG_CALLED_PNG, MANY_OPTIONAL, NEW, NODE, OLD, OPEN_SCHEMA, PDF,
                        RECURSIVE_SCHEMA, REFERRING_SCHEMA, SCHEMA, SYSTEM, TEXT_FILE, THOUGHT,
                        USER, call, chunks_of, completion, folded_stream, message, piece, stream_of,
                        text, to_chat, to_claude, tool, tool_uses)
from translation_checker import check_chat_stream

import ironcage_proxy as ic


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
    ToClaude("what was said aloud", {"messages": [
        {"role": "user", "content": "x"}, {"role": "assistant", "audio": {"id": "audio_1"}},
        {"role": "user", "content": "y"}]}, gets={}, dropped=["messages.audio"]),
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


def test_a_tool_choice_of_messages_that_is_not_known_is_refused():
    with pytest.raises(ic.BadRequest, match="tool_choice is not one of auto, any, tool, none"):
        ic.read_messages_request({"model": "m", "max_tokens": 9, "messages": [USER],
                                  "tool_choice": {"type": "maybe"}})


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


@pytest.mark.parametrize("stop, finish", [
    ("end_turn", "stop"), ("stop_sequence", "stop"), ("max_tokens", "length"),
    ("tool_use", "tool_calls"), ("pause_turn", "stop"), ("refusal", "content_filter"),
    ("model_context_window_exceeded", "length"), ("compaction", "stop"), ("of_tomorrow", "stop")])
def test_stop_reasons_of_claude(stop, finish):
    translator, _ = to_claude({})

    assert finish == translator.answer(message(text("x"), stop=stop))["choices"][0][
        "finish_reason"]


def test_what_is_no_message_is_no_empty_answer():
    with pytest.raises(ic.UpstreamBroke, match="no content"):
        to_claude({})[0].answer({"result": "x"})


TOOL_USE = {"type": "tool_use", "id": "t1", "name": "f", "input": {}}


@pytest.mark.parametrize("left_out", ["content_block_start", "content_block_stop"])
def test_blocks_of_a_server_that_leaves_out_their_start_or_end_are_whole(left_out):
    events = [{"type": "message_start", "message": {}},
              {"type": "content_block_start", "index": 0, "content_block": text("")},
              {"type": "content_block_delta", "index": 0,
               "delta": {"type": "text_delta", "text": "x"}},
              {"type": "content_block_stop", "index": 0},
              {"type": "message_delta", "delta": {"stop_reason": "end_turn"}},
              {"type": "message_stop"}]
    stream = [event for event in events if event["type"] != left_out]
    read = [*ic.messages_events(stream, ic.Terms(ic.ToolNames(64)))]

    assert [ic.Began, ic.Opened, ic.More, ic.Closed, ic.Ended] == [*map(type, read)]
    assert "x" == read[1].part.text


@pytest.mark.parametrize("client", ["chat", "messages", "responses"])
@pytest.mark.parametrize("kind", ["news", "server_tool_use", "tool_use"])
def test_a_text_in_a_block_that_is_no_text_is_not_said(client, kind):
    fields = {"messages": [USER], "input": "hi", "max_tokens": 9, "model": OLD}
    translator = ic.Translator(client, "messages", fields, ic.Losses(), ic.Target(9))
    whole = message({**TOOL_USE, "type": kind, "text": "hush"}, text("x"))

    said = json.dumps([*translator.events(translator.stream_of(whole))])

    assert ("hush" in said, "x" in said) == (False, True)


def test_citations_and_signatures_in_many_pieces_are_joined_once(monkeypatch):
    class Piece(str):
        def __radd__(self, before):
            raise AssertionError("joined at each piece")

    read, read_all = [], ic._citations_of
    monkeypatch.setattr(ic, "_citations_of", lambda rows: read.append(rows) or read_all(rows))
    deltas = [{"type": "signature_delta", "signature": Piece("s")}, {
        "type": "citations_delta", "citation": {
            "type": "web_search_result_location", "url": "https://a.b"}}] * 40
    block = {"type": "thinking", "thinking": "", "signature": "S"}
    stream = [{"type": "content_block_start", "content_block": block}, *(
        {"type": "content_block_delta", "delta": delta} for delta in deltas),
        {"type": "content_block_stop"}]

    part = [*ic.messages_events(stream, None)][-1].part

    assert ("S" + "s" * 40, 40) == (part.native["signature"], len(part.citations))
    assert 2 == len(read)


def test_an_answer_that_calls_a_tool_ends_so_whatever_it_says():
    translator, _ = to_claude({"tools": [tool()]})
    choice = translator.answer(message(TOOL_USE, stop="end_turn"))["choices"][0]

    assert "tool_calls" == choice["finish_reason"]


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


# What a tool's arguments become that are no JSON, or not for all readers.

NOT_JSON = ["NaN", "-Infinity", "Infinity", "1e999", "-1E+400", "None", "True", "undefined"]
HAS_ONE = '{"a\\"": "NaN \\\\\\" , 1e999", "n": [%s, 1.5e3, true,-0.5 ], "z": {"é\\\\": null}}'


def input_in(pieces):
    """What a client of Messages reads in a stream of a call's arguments."""
    stream = chunks_of(*(piece(0, more, **({} if number else {"id": "a", "name": "f"}))
                         for number, more in enumerate(pieces)), finish="tool_calls")
    deltas = [event["delta"]["partial_json"] for event in to_chat({})[0].events(stream)
              if event["type"] == "content_block_delta"]
    return json.loads("".join(deltas), parse_constant=pytest.fail)


@pytest.mark.parametrize("word", NOT_JSON)
def test_a_word_that_json_lacks_is_null_inside_arguments_of_which_a_part_was_shown(word):
    given = HAS_ONE % word

    for size in range(1, 13):
        assert {'a"': 'NaN \\" , 1e999', "n": [None, 1500.0, True, -0.5], "z": {"é\\": None}} \
            == input_in([given[at:at + size] for at in range(0, len(given), size)])


@pytest.mark.parametrize("word", NOT_JSON)
def test_arguments_with_a_word_that_json_lacks_are_wrapped_where_none_was_shown(word):
    given = HAS_ONE % word

    assert {"__raw": given} == input_in([given]) == input_in([given[:1], given[1:]])


def test_arguments_that_json_has_are_shown_as_they_are_to_the_letter():
    given = '{ "a" :[ 1.50E+2,-0, "\\u0041\\\\" ],"b":{}, "c": "true", "c": false}\n'

    for size in range(1, 9):
        pieces = [given[at:at + size] for at in range(0, len(given), size)]
        stream = chunks_of(*(piece(0, more, **({} if number else {"id": "a", "name": "f"}))
                             for number, more in enumerate(pieces)), finish="tool_calls")
        assert given == "".join([event["delta"]["partial_json"]
                                 for event in to_chat({})[0].events(stream)
                                 if event["type"] == "content_block_delta"])


def test_a_tools_call_is_not_lost_for_a_key_that_comes_twice():
    """Readers of JSON take the last; of a stream its client does."""
    given = '{"a": 1, "b": {"c": 2, "c": 3}, "a": 4}'
    [block] = to_chat({})[0].answer(completion("tool_calls", tool_calls=[call(arguments=given)]))[
        "content"]

    assert {"a": 4, "b": {"c": 3}} == block["input"] == input_in([given]) == input_in(given)


def test_a_call_whose_key_comes_twice_is_whole_when_the_next_one_begins():
    message = folded_stream(piece(0, '{"x": 0, "x": 1}', id="", name="f"),
                            piece(0, '{"y": 2}', id="", name="g"))

    assert [("f", {"x": 1}), ("g", {"y": 2})] == tool_uses(message)


def test_a_word_that_comes_in_many_pieces_is_read_once(monkeypatch):
    class Tokens:
        read, sub_all = 0, ic._JSON_TOKENS.sub

        def sub(self, how, text):
            Tokens.read += len(text)
            return Tokens.sub_all(how, text)

    monkeypatch.setattr(ic, "_JSON_TOKENS", Tokens())
    shown = ic._ShownArguments(False)
    said = "".join([shown.more(more) for more in ('{"a": ', *"1" * 400, "}")])

    assert ('{"a": ' + "1" * 400 + "}", True) == (said + shown.rest(), Tokens.read < 500)
