"""Chat completions: golden pairs for each rule of what servers are asked by clients of Messages, and
their answers, sloppy ones too, against a checker that knows nothing of the translators."""
import collections
import json
from typing import NamedTuple

import pytest
from translated import (IMAGE, IMAGE_URL, NODE, OPEN_SCHEMA, PDF, SCHEMA, USE, USER, call,
                        chunks_of, completion, folded_stream, piece, result, server, text, to_chat,
                        tool_uses)
from translation_checker import check_message_stream
from vendor_rules import refused_by_openai

import ironcage_proxy as ic


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


CALLED = {"role": "assistant", "content": None, "tool_calls": [call(call_id="t", arguments="{}")]}
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


@pytest.mark.parametrize("deltas, content", [
    ([piece(0, id="a", name="f", arguments="{}"), piece(0, arguments='{"n": 1}')],
     [("tool_use", {"n": 1})]),                    # as gateways to Claude begin
    ([piece(0, id="a", name="f", arguments="{}"), piece(1, id="b", name="f", arguments="{}"),
      {"content": "x"}], [("tool_use", {}), ("tool_use", {}), ("text", "x")]),
    ([{"reasoning_text": "hm"}, {"content": "x"}], [("thinking", "hm"), ("text", "x")])])
def test_what_other_servers_begin_with_is_no_more_than_that(deltas, content):
    streamed = folded_stream(*deltas, finish="stop")

    assert content == [(block["type"], block.get("input", block.get("thinking", block.get("text"))))
                       for block in streamed["content"]]


def test_signed_thinking_of_a_gateway_goes_back_as_the_block_that_came_in_pieces():
    """LiteLLM sends Claude's so; Claude refuses the next turn of a tool without it."""
    pieces = [{"reasoning_content": text, "thinking_blocks": [
        {"type": "thinking", "thinking": text, **more}]} for text, more in (
            ("h", {"signature": None}), ("m", {}), ("", {"signature": "EqQB"}))]
    said = folded_stream(*pieces, piece(0, id="a", name="f", arguments="{}"))
    translator, _ = to_chat({"messages": [
        {"role": "user", "content": "x"}, {"role": "assistant", "content": said["content"]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a"}]}]},
        is_openai=False)

    unsigned = folded_stream(*pieces[:2], {"content": "x"})
    assert ic.OWN_THINKING == unsigned["content"][0]["signature"]
    assert [{"type": "thinking", "thinking": "hm", "signature": "EqQB"}] \
        == translator.request["messages"][1]["thinking_blocks"]


def test_a_call_that_only_the_message_at_the_end_has_is_a_call():
    row = {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"n": 1}'}}
    last = {"choices": [{"index": 0, "finish_reason": "tool_calls", "message": {
        "content": "x", "tool_calls": [row]}}]}
    streamed = check_message_stream([*to_chat({})[0].events(
        [*chunks_of({"content": "x"}, finish=None), last])])

    assert ["text", "tool_use"] == [block["type"] for block in streamed["content"]]
    assert "tool_use" == streamed["stop_reason"]


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


def test_a_message_between_cleared_system_messages_is_not_lost():
    said = [{"role": "assistant", "content": words} for words in ("a", "", "b")]
    gone = {"role": "system", "content": "S", "clear_at": "next_user_message"}
    translator, _ = to_chat({"messages": [USER, said[0], gone, said[1], said[2], USER]})

    assert ["a", "b"] == [turn["content"] for turn in translator.request["messages"]
                          if turn["role"] == "assistant"]


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
