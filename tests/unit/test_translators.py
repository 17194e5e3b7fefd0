"""A call's way there and back: what was arranged for its provider is gone from its answer; what is
remembered, recognised and estimated beside it."""
import json

import pytest
from support import recordings
from translated import (NEW, OLD, OPEN_SCHEMA, PNG, THOUGHT, USER, call, completion, message,
                        stream_of, text, to_chat, to_claude, tool)
from translation_checker import check_chat_stream
from vendor_rules import refused_by_anthropic

import ironcage_proxy as ic


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


def test_a_ping_is_passed_on_also_before_the_answer_begins():
    events = list(stream_of(message(text("a"))))
    assert ["message_start", "ping"] == [event["type"] for event in events[:2]]

    chunks = list(to_claude({"stream": True})[0].events([{"type": "ping"}, *events]))

    assert [0, 2] == [number for number, chunk in enumerate(chunks) if chunk == {"type": "ping"}]


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


def test_a_long_tool_name_is_cut_for_openai_and_comes_back():
    name = "mcp__" + "x" * 80
    translator, _ = to_chat({"tools": [{"name": name}]})
    short = translator.request["tools"][0]["function"]["name"]

    answer = translator.answer({"choices": [{"message": {"tool_calls": [call(short)]},
                                             "finish_reason": "tool_calls"}]})

    assert len(short) == 64 and name == answer["content"][0]["name"]


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


@pytest.mark.parametrize("answer", [
    lambda: to_chat({})[0].answer(completion(tool_calls=[{"id": "a", "function": {
        "arguments": '{"x": 1}'}}])),
    lambda: to_claude({})[0].answer(message({"type": "tool_use", "id": "a", "input": {"x": 1}}))],
    ids=["chat", "messages"])
def test_a_call_without_a_name_is_no_answer(answer):
    with pytest.raises(ic.UpstreamBroke, match="without a name"):
        answer()


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
