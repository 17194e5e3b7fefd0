"""The bugs of other gateways in translating between the dialects, each by where it was reported.

Only what can be stated as an exchange; those of Claude Code itself are in
tests/clients/test_claude_code.py, the budget's in tests/wire/test_waiting.py.
"""
import json

import pytest
from translated import (CHAT_USAGE, IMAGE, NEW, OLD, SCHEMA, USE, USER, call, chunks_of, completion,
                        message, piece, result, stream_of, text, to_chat, to_claude, tool)
from translation_checker import check_chat_stream, check_message_stream

import ironcage_proxy as ic


def streamed_to_messages(*deltas, finish="stop", is_openai=True):
    return check_message_stream(list(to_chat({}, is_openai=is_openai)[0].events(
        chunks_of(*deltas, finish=finish))))


def test_litellm_25321_arguments_that_come_with_the_block_are_not_lost():
    """The tool's input stands in content_block_start, and no delta follows."""
    whole = message({"type": "tool_use", "id": "t", "name": "f", "input": {"n": 1}})
    events = [event for event in stream_of(whole)
              if event.get("delta", {}).get("type") != "input_json_delta"]
    events = [{**e, "content_block": whole["content"][0]} if "content_block" in e else e
              for e in events]

    said, _, _ = check_chat_stream(list(to_claude({})[0].events(events)))

    assert {"n": 1} == json.loads(said["tool_calls"][0]["function"]["arguments"])


def test_claude_code_router_129_argument_deltas_are_joined_as_they_are():
    parts = ['{"a": "', "\\u00e4 ", '{\\"', 'b\\": 1}', '"}']

    said = streamed_to_messages(piece(0, id="x", name="f"), *(piece(0, p) for p in parts),
                                finish="tool_calls")

    assert json.loads("".join(parts)) == said["content"][0]["input"]


@pytest.mark.parametrize("is_openai", [True, False])
def test_litellm_15307_17425_portkey_1275_parallel_calls_keep_a_state_each(is_openai):
    deltas = [piece(n, id=f"c{n}", name="f") for n in range(3)] + [
        piece(n, part) for part in ('{"n"', ": ", "7}") for n in (2, 0, 1)]

    said = streamed_to_messages(*deltas, finish="tool_calls", is_openai=is_openai)

    assert [("c0", {"n": 7}), ("c1", {"n": 7}), ("c2", {"n": 7})] == [
        (block["id"], block["input"]) for block in said["content"]]


def test_cliproxyapi_5058_a_missing_index_does_not_join_two_calls():
    said = streamed_to_messages(
        piece(None, id="a", name="f", arguments='{"n": 1}'),
        piece(None, id="b", name="g", arguments='{"n": 2}'), finish="tool_calls")

    assert [{"n": 1}, {"n": 2}] == [block["input"] for block in said["content"]]


def test_cliproxyapi_5229_tool_indexes_are_dense_whatever_stands_between_them():
    whole = message(text("a"), {"type": "tool_use", "id": "t1", "name": "f", "input": {}},
                    text("b"), {"type": "tool_use", "id": "t2", "name": "f", "input": {}})

    said, _, _ = check_chat_stream(list(to_claude({})[0].events(stream_of(whole))))

    assert [0, 1] == [c["index"] for c in said["tool_calls"]]


def test_ogx_6367_results_come_before_the_users_text():
    translator, _ = to_chat({"messages": [USER, USE, {"role": "user", "content": [
        text("and?"), result("R")]}]})

    assert ["user", "assistant", "tool", "user"] == [
        turn["role"] for turn in translator.request["messages"]]


def test_litellm_23712_16195_20403_an_image_in_a_result_is_not_dropped():
    translator, _ = to_chat({"messages": [USER, USE, {"role": "user", "content": [
        result([text("R"), IMAGE])]}]})

    assert "image_url" in json.dumps(translator.request["messages"][-1])
    back, _ = to_claude({"messages": [USER, {"role": "assistant", "tool_calls": [call()]}, {
        "role": "tool", "tool_call_id": "call_1", "content": [
            {"type": "image_url", "image_url": {"url": "https://x/y.png"}}]}]})
    assert "image" == back.request["messages"][-1]["content"][0]["content"][0]["type"]


@pytest.mark.parametrize("block, travels", [
    ({"type": "thinking", "thinking": "T", "signature": "Eq/+=="}, True),
    ({"type": "redacted_thinking", "data": "D"}, True),
    ({"type": "thinking", "thinking": "T"}, False),
    ({"type": "thinking", "thinking": "T", "signature": ""}, False),
    ({"type": "thinking", "thinking": "T", "signature": ic.OWN_THINKING}, False)])
def test_cliproxyapi_2172_4514_ccs_415_thinking_is_verbatim_or_not_at_all(block, travels):
    translator, _ = to_claude({"messages": [
        USER, {"role": "assistant", "content": "a", "thinking_blocks": [block]}, USER]})

    sent = translator.request["messages"][1]["content"]
    assert ([block, text("a")] if travels else [text("a")]) == sent


def test_litellm_32357_one_message_start_and_thinking_in_a_block_of_its_own():
    said = streamed_to_messages({"content": "a"}, {"reasoning_content": "T"}, {"content": "b"})

    assert ["text", "thinking", "text"] == [block["type"] for block in said["content"]]


def test_new_api_4795_reasoning_of_a_tool_turn_is_kept():
    said = streamed_to_messages({"reasoning_content": "T"},
                                piece(0, id="a", name="f", arguments="{}"), finish="tool_calls")

    assert [("thinking", "T"), ("tool_use", None)] == [
        (block["type"], block.get("thinking")) for block in said["content"]]


@pytest.mark.parametrize("deltas", [
    [{"role": "assistant", "content": ""}], [{"content": ""}, {"content": None}],
    [{"content": ""}, piece(0, id="a", name="f", arguments="{}")]])
def test_claude_code_88536_hermes_11929_no_empty_text_block_ever(deltas):
    said = streamed_to_messages(*deltas)
    whole = to_chat({})[0].answer(completion(content=""))

    assert [] == [b for b in said["content"] + whole["content"] if b["type"] == "text"]


@pytest.mark.parametrize("model, role", [("gpt-4o", "system"), ("gpt-5.5", "developer")])
def test_envoy_2189_omniroute_6954_colibri_725_a_later_system_message_is_no_assistants(model,
                                                                                       role):
    translator, _ = to_chat({"messages": [USER, {"role": "system", "content": "S"}]}, model)

    assert {"role": role, "content": "S"} == translator.request["messages"][1]


def test_litellm_15097_temperature_and_top_p_do_not_go_together():
    translator, losses = to_claude({"temperature": 0.2, "top_p": 0.9}, OLD)

    assert "top_p" not in translator.request and ["top_p"] == losses.dropped


def test_litellm_26444_newer_models_get_no_temperature():
    assert "temperature" not in to_claude({"temperature": 0.2}, NEW)[0].request


def test_new_api_3124_no_sampling_beside_thinking():
    translator, losses = to_claude({"top_p": 0.9, "reasoning_effort": "high",
                                    "max_tokens": 32_000}, OLD)

    assert "top_p" not in translator.request and ["top_p"] == losses.dropped


@pytest.mark.parametrize("status, kind", [(503, "overloaded_error"), (429, "rate_limit_error"),
                                          (400, "invalid_request_error")])
def test_litellm_36655_errors_have_anthropics_shape_and_a_type(status, kind):
    _, body = to_chat({})[0].error(status, {"error": {"message": "m", "type": None}}, "req_1")

    assert {"type": "error", "request_id": "req_1",
            "error": {"type": kind, "message": "m"}} == body


def test_litellm_28735_8450_the_usage_chunk_has_no_choices_and_comes_last():
    translator, _ = to_claude({"stream_options": {"include_usage": True}})

    chunks = list(translator.events(stream_of(message(text("x")))))

    assert ([], None) == (chunks[-1]["choices"], chunks[-2]["usage"])
    assert 7 == chunks[-1]["usage"]["completion_tokens"]


def test_litellm_25410_usage_after_the_finish_is_not_lost():
    said = streamed_to_messages({"content": "x"})

    assert CHAT_USAGE["completion_tokens"] == said["usage"]["output_tokens"]


def test_litellm_41424_36091_cache_marks_and_cache_usage_are_kept():
    translator, _ = to_claude({"messages": [{"role": "user", "content": [
        text("a", cache_control={"type": "ephemeral"})]}], "tools": [
            {**tool(), "cache_control": {"type": "ephemeral"}}]})

    assert "cache_control" in translator.request["messages"][0]["content"][0]
    assert "cache_control" in translator.request["tools"][0]
    usage = translator.answer(message(text("x")))["usage"]["prompt_tokens_details"]
    assert (5, 3) == (usage["cached_tokens"], usage["cache_write_tokens"])


def test_litellm_25825_cut_output_is_never_an_end_turn():
    assert "max_tokens" == streamed_to_messages({"content": "x"}, finish="length")["stop_reason"]
    assert "max_tokens" == to_chat({})[0].answer(completion("length", content="x"))["stop_reason"]
    _, finish, _ = check_chat_stream(list(to_claude({})[0].events(
        stream_of(message(text("x"), stop="max_tokens")))))
    assert "length" == finish


def test_litellm_35061_a_probe_of_one_token_is_not_refused():
    assert 1 == to_chat({"max_tokens": 1})[0].request["max_completion_tokens"]


def test_litellm_25931_context_management_does_not_travel():
    translator, _ = to_chat({"context_management": {"edits": [
        {"type": "clear_thinking_20251015", "keep": "all"}]}})

    assert "context_management" not in translator.request


@pytest.mark.parametrize("is_openai, name", [(True, "max_completion_tokens"),
                                             (False, "max_tokens")])
def test_copilot_api_222_each_server_gets_the_cap_that_it_knows(is_openai, name):
    request = to_chat({}, is_openai=is_openai)[0].request

    assert {name} == {key for key in request if "max" in key}


def test_bifrost_3596_a_forced_tool_is_among_the_tools_under_its_name_there():
    name = "mcp__server__" + "x" * 70
    request = to_chat({"tools": [{"name": name, "input_schema": SCHEMA}],
                       "tool_choice": {"type": "tool", "name": name}})[0].request

    assert request["tools"][0]["function"]["name"] == request["tool_choice"]["function"]["name"]
