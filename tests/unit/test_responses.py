"""The chapter of Responses: goldens of what is read and written, both ways; streams against a
checker that knows nothing of the writer; what was read, written and read again."""
import contextlib
import itertools
import json
from random import Random
from typing import NamedTuple, Optional

import pytest
from support import each_seed, recordings
from test_translation_fuzz import mutated
from translation_checker import check_message_stream, check_response, check_response_stream
from vendor_answers import (Answer, Refuse, Say, Search, Think, Use, answer_of, counted,
                            openai_seal)
from vendor_rules import refused_by_responses

import ironcage_proxy as ic

TERMS = ic.Terms(ic.ToolNames(64))
PNG = "data:image/png;base64,iVBORw0KGgo="
def sealed(origin, native):
    return ic.sealed(ic.Part("thought", origin=origin, native=native))


CLAUDE_THOUGHT = {"type": "thinking", "thinking": "hm", "signature": "EqQB"}
NOT_COMPARED = ("at", "pieces", "index")           # what readers and writers note for themselves


def shape(part):
    """A part as a dict of what it holds: what is empty is left out."""
    held = {name: [shape(piece) for piece in value] if name == "parts" else value
            for name, value in vars(part).items() if value and name not in NOT_COMPARED}
    return {name: tuple(map(tuple, value)) if name == "citations" else value
            for name, value in held.items()
            if part.kind != "search" or name not in ("native", "origin")}


def opened(kind, text="", **more):
    return ic.Part(kind, text, **more)


# Answers, written.

def streamed(parts, ended=ic.Ended("end"), fields=None, interleaved=False, size=3):
    """The events of an answer whose parts come in pieces; interleaved: all open side by side."""
    events = [ic.Began("msg_1", "m")]
    runs = []
    for part in parts:
        pieces = [part.text[at:at + size] for at in range(0, len(part.text), size)] \
            if part.kind not in ("search", "other") else []
        runs.append([ic.Opened(part), *(ic.More(part, piece) for piece in pieces), ic.PING,
                     ic.Closed(part)])
    turns = itertools.zip_longest(*runs) if interleaved else runs
    events += [event for turn in turns for event in turn if event is not None]
    written = [*ic.ResponsesWriter(fields or {}, 1).events([*events, ended])]
    return [event for event in written if event != {"type": "ping"}]


def items_of(response):
    """The items of a response without what is the same in all."""
    return [{name: value for name, value in item.items()
             if name not in ("id", "role") and (name, value) != ("status", "completed")}
            for item in response["output"]]


def output_text(text, *annotations):
    return {"type": "output_text", "text": text, "annotations": [*annotations], "logprobs": []}


PATCH_TOOLS = {"tools": [{"type": "apply_patch"}, {"type": "tool_search", "execution": "client"},
                         {"type": "local_shell"}, {"type": "function", "name": "shell"}]}
WRITTEN = {
    "a text": ([opened("text", "Hi there")], [
        {"type": "message", "content": [output_text("Hi there")]}]),
    "texts that follow each other are one message": (
        [opened("text", "a"), opened("text", "b")],
        [{"type": "message", "content": [output_text("a"), output_text("b")]}]),
    "a text after a call is another message": (
        [opened("text", "a"), opened("call", "{}", id="c", name="f"), opened("text", "b")],
        [{"type": "message", "content": [output_text("a")]},
         {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
         {"type": "message", "content": [output_text("b")]}]),
    "a text without text": ([opened("text")], [{"type": "message", "content": [output_text("")]}]),
    "a citation": (
        [opened("text", "Sky.", citations=(ic.Citation("https://x", "X", 0, 3),
                                           ic.Citation("https://y")))],
        [{"type": "message", "content": [output_text(
            "Sky.", {"type": "url_citation", "url": "https://x", "title": "X", "start_index": 0,
                     "end_index": 3},
            {"type": "url_citation", "url": "https://y", "title": "", "start_index": 0,
             "end_index": 4})]}]),
    "a refusal": ([opened("refusal", "No.")], [
        {"type": "message", "content": [{"type": "refusal", "refusal": "No."}]}]),
    "a thought that is shown, and sealed": (
        [opened("thought", "hm", native=CLAUDE_THOUGHT, origin="messages")],
        [{"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}],
          "encrypted_content": sealed("messages", CLAUDE_THOUGHT)}]),
    "a thought that is only sealed": (
        [opened("thought", native={"type": "redacted_thinking", "data": "x"}, origin="messages")],
        [{"type": "reasoning", "summary": [], "encrypted_content": sealed(
            "messages", {"type": "redacted_thinking", "data": "x"})}]),
    "a thought of a server that seals none": (
        [opened("thought", "hm")],
        [{"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}],
          "encrypted_content": None}]),
    "a call in a namespace": (
        [opened("call", '{"n": 1}', id="c", name="f", namespace="ns")],
        [{"type": "function_call", "call_id": "c", "name": "f", "namespace": "ns",
          "arguments": '{"n": 1}'}]),
    "a call of a custom tool": (
        [opened("call", "ls -l", id="c", name="sh", is_text=True)],
        [{"type": "custom_tool_call", "call_id": "c", "name": "sh", "input": "ls -l"}]),
    "a call of a custom tool without input": (
        [opened("call", "", id="c", name="sh", is_text=True)],
        [{"type": "custom_tool_call", "call_id": "c", "name": "sh", "input": ""}]),
    "a call of a tool of OpenAI's that the client runs": (
        [opened("call", '{"type": "delete_file", "path": "a"}', id="c", name="apply_patch"),
         opened("call", '{"query": "x"}', id="d", name="tool_search"),
         opened("call", '{"command": ["ls"]}', id="e", name="local_shell")],
        [{"type": "apply_patch_call", "call_id": "c",
          "operation": {"type": "delete_file", "path": "a"}},
         {"type": "tool_search_call", "call_id": "d", "execution": "client",
          "arguments": {"query": "x"}},
         {"type": "local_shell_call", "call_id": "e",
          "action": {"type": "exec", "env": {}, "command": ["ls"]}}]),
    "a call of a function of the same name": (
        [opened("call", "{}", id="c", name="shell")],
        [{"type": "function_call", "call_id": "c", "name": "shell", "arguments": "{}"}]),
    "a search": (
        [opened("search", "sky", id="s", citations=(ic.Citation("https://x"),))],
        [{"type": "web_search_call", "action": {
            "type": "search", "query": "sky", "sources": [{"type": "url", "url": "https://x"}]}}]),
    "what only its own API knows": ([opened("other", native={"type": "x"}, origin="x")], []),
}


@pytest.mark.parametrize("case", WRITTEN)
def test_parts_become_items(case):
    parts, items = WRITTEN[case]
    response = check_response_stream(streamed(parts, fields=PATCH_TOOLS))

    assert items == items_of(response)


@pytest.mark.parametrize("case", WRITTEN)
def test_a_whole_response_is_what_its_stream_ends_with(case):
    parts, _ = WRITTEN[case]
    last = streamed(parts, fields=PATCH_TOOLS)[-1]["response"]
    whole = ic.ResponsesWriter(PATCH_TOOLS, 1).whole(
        ic.Whole(ic.Began("msg_1", "m"), parts, ic.Ended("end")))

    assert {**last, "completed_at": 0} == {**check_response(whole), "completed_at": 0}


def test_typed_tools_that_come_within_the_input_have_their_typed_calls():
    parts = [opened("call", '{"type": "delete_file", "path": "a"}', id="c", name="apply_patch")]
    fields = {"input": [{"role": "user", "content": "hi"}, {
        "type": "additional_tools", "role": "developer", "tools": [{"type": "apply_patch"}]}]}

    assert ["apply_patch_call"] == [item["type"] for item in streamed(
        parts, fields=fields)[-1]["response"]["output"]]


def test_calls_that_are_open_side_by_side_fill_items_of_their_own():
    parts = [opened("text", "Both:"), opened("call", '{"a": 1}', id="a", name="f"),
             opened("call", '{"bb": 22}', id="b", name="g"), opened("text", "and more")]
    response = check_response_stream(streamed(parts, interleaved=True))

    assert ["message", "function_call", "function_call", "message"] == [
        item["type"] for item in response["output"]]
    assert ['{"a": 1}', '{"bb": 22}'] == [item["arguments"] for item in response["output"][1:3]]


@pytest.mark.parametrize("ended, status, reason", [
    (ic.Ended("end"), "completed", None), (ic.Ended("stop", stop="x"), "completed", None),
    (ic.Ended("calls"), "completed", None), (ic.Ended("length"), "incomplete", "max_output_tokens"),
    (ic.Ended("refused"), "incomplete", "content_filter")])
def test_how_an_answer_ended(ended, status, reason):
    response = check_response_stream(streamed([opened("text", "Hi")], ended))

    assert (status, reason) == (response["status"], (response["incomplete_details"] or {}).get(
        "reason"))
    assert status == response["output"][-1]["status"]


def test_a_refusal_that_was_explained_apart_is_a_part_of_the_message():
    response = check_response_stream(streamed([opened("text", "I ")],
                                              ic.Ended("refused", refusal="refused: bio")))

    assert [output_text("I "), {"type": "refusal", "refusal": "refused: bio"}] == \
        response["output"][0]["content"]


def test_usage_counts_what_was_cached_inside_the_input():
    ended = ic.Ended("end", ic.Tokens(12, 2, 3, 9, 4), tier="priority")
    response = streamed([opened("text", "Hi")], ended)[-1]["response"]

    assert {"input_tokens": 12, "output_tokens": 9, "total_tokens": 21,
            "input_tokens_details": {"cached_tokens": 2, "cache_write_tokens": 3},
            "output_tokens_details": {"reasoning_tokens": 4}} == response["usage"]
    assert "priority" == response["service_tier"]


def test_a_response_repeats_what_its_request_said():
    fields = {"instructions": "Be brief.", "metadata": {"a": "b"}, "temperature": 0.5,
              "text": {"verbosity": "low"}, "reasoning": {"effort": "low"},
              "tools": [{"type": "function", "name": "f"}], "max_output_tokens": 99}
    for event in streamed([opened("text", "Hi")], fields=fields):
        if "response" in event:
            said = event["response"]
            assert {**fields, "text": {"format": {"type": "text"}, "verbosity": "low"},
                    "reasoning": {"effort": "low", "summary": None}, "store": False,
                    "previous_response_id": None}.items() <= said.items()


def test_a_stream_that_fails_ends_with_the_error_and_with_its_response():
    writer, part = ic.ResponsesWriter({}, 1), opened("text", "Hi")
    begun = [*writer.events([ic.Began("x", "m"), ic.Opened(part), ic.More(part, "Hi")])]
    error = {"error": {"message": "overloaded", "type": "server_error", "code": None}}
    response = check_response_stream([*begun, *writer.failed(error)])

    assert {"code": "server_error", "message": "overloaded"} == response["error"]


# Answers, read.

def parts_read(events):
    return ic.folded(ic.responses_events(events, TERMS))


def test_a_ping_is_passed_on_also_before_the_answer_begins_and_an_empty_text_is_no_part():
    ping, empty = {"type": "ping"}, {"type": "message", "content": [
        {"type": "output_text", "text": ""}]}
    events = [*ic.responses_events([
        ping, {"type": "response.created", "response": {"id": "resp_1"}}, ping,
        {"type": "response.output_item.done", "output_index": 0, "item": empty},
        {"type": "response.completed", "response": {}}], TERMS)]

    assert [ic.Ping, ic.Began, ic.Ping, ic.Ended] == [*map(type, events)]


def said(*parts, fields=None, **more):
    """The events and the whole answer in which OpenAI says some parts."""
    fields = {"model": "gpt-6", **(fields or {})}
    answer = Answer(parts, counted(parts, 20, 5, 3), **more)
    [stream, whole] = [answer_of("responses", {**fields, "stream": flag}, answer)
                       for flag in (True, False)]
    return events_in(stream.steps), json.loads(whole.body)


def events_in(steps, splitter=None):
    splitter = splitter or ic.EventSplitter()
    return [json.loads(ic.event_data(event)) for step in steps for event in splitter.feed(step)]


SUMMARY = {"reasoning": {"summary": "auto"}}
READ = {
    "a text": ((Say("Hi there"),), {}, [{"kind": "text", "text": "Hi there"}], "end"),
    "a refusal": ((Refuse("No."),), {}, [{"kind": "refusal", "text": "No."}], "refused"),
    "a call": ((Use("f", {"n": 1}),), {}, [
        {"kind": "call", "id": "call_0_0", "name": "f", "text": '{"n": 1}'}], "calls"),
    "a call without arguments": ((Use("f", {}),), {}, [
        {"kind": "call", "id": "call_0_0", "name": "f", "text": "{}"}], "calls"),
    "a call of a custom tool": ((Use("f", "x y"),), {}, [
        {"kind": "call", "id": "call_0_0", "name": "f", "text": "x y", "is_text": True}], "calls"),
    "a call in a namespace": ((Use("ns.f", {}),), {}, [
        {"kind": "call", "id": "call_0_0", "name": "f", "namespace": "ns", "text": "{}"}], "calls"),
    "parallel calls": ((Say("Both."), Use("f", {"n": 1}), Use("f", {"n": 2})), {}, [
        {"kind": "text", "text": "Both."},
        {"kind": "call", "id": "call_0_1", "name": "f", "text": '{"n": 1}'},
        {"kind": "call", "id": "call_0_2", "name": "f", "text": '{"n": 2}'}], "calls"),
    "a search": ((Search("sky"), Say("Blue.")), {}, [
        {"kind": "search", "id": "ws_0_0", "text": "sky"}, {"kind": "text", "text": "Blue."}],
        "end"),
    "an answer that was cut": ((Say("Hi"),), {"ending": "length"}, [
        {"kind": "text", "text": "Hi"}], "length"),
    "an answer that a filter cut": ((Say("Hi"),), {"ending": "filter"}, [
        {"kind": "text", "text": "Hi"}], "refused"),
}


@pytest.mark.parametrize("case", READ)
def test_items_become_parts_streamed_and_whole(case):
    parts, more, expected, reason = READ[case]
    events, whole = said(*parts, **more)
    for answer in (parts_read(events), parts_read(ic.responses_stream_of(whole))):
        assert expected == [shape(part) for part in answer.parts]
        assert reason == answer.ended.reason
        assert ic.Tokens(20, 5, 3) == answer.ended.tokens._replace(output=0, thought=0)
        assert ("resp_0", "gpt-6", "default") == (answer.began.id, answer.began.model,
                                                  answer.ended.tier)


@pytest.mark.parametrize("fields, text", [({}, ""), (SUMMARY, "hm hm")])
def test_reasoning_is_a_thought_with_its_own_form_as_it_was_done(fields, text):
    events, _ = said(Think("hm hm"), Say("Hi"), fields=fields)
    thought, _ = parts_read(events).parts
    done = next(event["item"] for event in events if event["type"] == "response.output_item.done")

    assert (text, "responses", done) == (thought.text, thought.origin, thought.native)
    assert openai_seal("hm hm") == thought.native["encrypted_content"]


def test_summaries_are_paragraphs_of_one_thought():
    item = {"type": "reasoning", "id": "rs_1", "encrypted_content": "gAAAAA", "summary": [
        {"type": "summary_text", "text": "a"}, {"type": "summary_text", "text": "b"}]}
    deltas = [{"type": "response.reasoning_summary_text.delta", "output_index": 0,
               "summary_index": index, "delta": text} for index, text in enumerate("ab")]
    done = {"type": "response.output_item.done", "output_index": 0, "item": item}
    end = {"type": "response.completed", "response": {"output": [item], "status": "completed"}}

    for events in ([*deltas, done, end], [done, end], [end]):
        [thought] = parts_read(events).parts
        assert ("a\n\nb", item) == (thought.text, thought.native)


def test_reasoning_that_another_server_has_signed_is_a_thought_in_its_own_form():
    item = {"type": "reasoning", "id": "rs_1", "summary": [], "format": "anthropic-claude-v1",
            "content": [{"type": "reasoning_text", "text": "hm"}], "signature": "EqQB"}
    [thought] = parts_read(ic.responses_stream_of({"output": [item]})).parts

    assert ("hm", "responses", item) == (thought.text, thought.origin, thought.native)


def test_text_of_reasoning_of_open_models_is_shown():
    item = {"type": "reasoning", "id": "rs_1", "summary": [], "content": [
        {"type": "reasoning_text", "text": "hm hm"}]}
    delta = {"type": "response.reasoning_text.delta", "output_index": 0, "content_index": 0,
             "delta": "hm "}
    done = {"type": "response.output_item.done", "output_index": 0, "item": item}
    end = {"type": "response.completed", "response": {}}

    for events in ([delta, done, end], [done, end]):
        assert [{"kind": "thought", "text": "hm hm"}] == [
            shape(part) for part in parts_read(events).parts]


def test_a_server_that_ends_without_having_ended_its_items_is_read_whole():
    events, whole = said(Say("Hi"), Use("f", {"n": 1}))
    without = [event for event in events if event["type"] != "response.output_item.done"]
    only_the_end = [{"type": "response.completed", "response": whole}]
    deltas = [*without[:-1], {"type": "response.completed", "response": {**whole, "output": []}}]

    for sent in (without, only_the_end, deltas):
        assert [("text", "Hi"), ("call", '{"n": 1}')] == [
            (part.kind, part.text) for part in parts_read(sent).parts]


def test_every_part_is_opened_before_it_grows_and_grows_to_what_it_is():
    events, _ = said(Think("hm hm"), Say("Hi there"), Use("f", {"n": 1}), Use("g", "x"),
                     fields=SUMMARY)
    texts, open_parts = {}, set()
    for event in ic.responses_events(events, TERMS):
        kind = type(event)
        if kind is ic.Opened:
            assert event.part not in texts
            texts[event.part] = ""
            open_parts.add(event.part)
        elif kind is ic.More:
            assert event.part in open_parts and event.text
            texts[event.part] += event.text
        elif kind is ic.Closed:
            open_parts.remove(event.part)
            assert event.part.text == texts[event.part]

    assert not open_parts and 4 == len(texts)


def test_items_without_an_index_are_known_by_their_ids():
    events, whole = said(Say("Hi"), Use("f", {"n": 1}), Use("f", {"n": 2}))
    bare = [{name: value for name, value in event.items() if name != "output_index"}
            for event in events if event["type"] != "response.output_item.done"]
    in_turns = sorted(bare[:-1], key=lambda event: {"response.output_item.added": 1}.get(
        event["type"], 2 if "arguments" in event["type"] else 0))
    for sent in (bare, [*in_turns, bare[-1]], [*in_turns, {**bare[-1], "response": {
            **whole, "output": []}}]):
        assert [("text", "Hi"), ("call", '{"n": 1}'), ("call", '{"n": 2}')] == [
            (part.kind, part.text) for part in parts_read(sent).parts]


def test_what_only_the_done_events_or_the_last_one_hold_is_read():
    """Arguments that are lost are a tool that runs without them."""
    events, whole = said(Say("Hi"), Use("f", {"n": 1}), Use("f", {"n": 2}))
    no_deltas = [event for event in events if not event["type"].endswith(".delta")]
    no_items = [event for event in no_deltas if event["type"] != "response.output_item.done"]
    bare_end = {"type": "response.completed", "response": {}}
    only_text = [event for event in events[:-1] if event.get("output_index", 0) == 0]
    objects = {**whole, "output": [
        {**item, "arguments": json.loads(item["arguments"])} if "arguments" in item else item
        for item in whole["output"]]}

    for sent in (no_deltas, [*no_items[:-1], bare_end], [*only_text, events[-1]],
                 ic.responses_stream_of(objects)):
        assert [("text", "Hi"), ("call", {"n": 1}), ("call", {"n": 2})] == [
            (part.kind, json.loads(part.text) if part.kind == "call" else part.text)
            for part in parts_read(sent).parts]


@pytest.mark.parametrize("ends", [
    [{"type": "response.done", "response": {"status": "completed"}}],
    [{"type": "response.completed", "response": {}},
     {"type": "response.done", "response": {"status": "completed"}}]])
def test_what_ends_a_response_is_known_by_its_status_and_ends_it_once(ends):
    events, _ = said(Say("Hi"))
    begun = {"type": "response.created", "response": {"status": "completed"}}
    read = [*ic.responses_events([begun, *events[1:-1], *ends], TERMS)]

    assert [ic.Began, ic.Opened] == [*map(type, read[:2])] and ic.Ended is type(read[-1])
    assert ["end"] == [event.reason for event in read if isinstance(event, ic.Ended)]


@pytest.mark.parametrize("end", [
    {"type": "response.cancelled", "response": {"status": "cancelled"}},
    {"type": "response.stopped", "response": {"status": "cancelled"}},
    {"type": "response.cancelled"}])
def test_a_response_that_was_cancelled_says_so(end):
    events, _ = said(Say("Hi"))
    with pytest.raises(ic.UpstreamBroke, match="ended its answer as cancelled"):
        [*ic.responses_events([*events[:-1], end], TERMS)]


@pytest.mark.parametrize("answer", [
    {"status": "failed", "error": {"code": "server_error", "message": "x"}, "output": []},
    {"status": "cancelled", "output": []}, {"status": "in_progress", "output": []},
    {"status": "completed"}, {"foo": 1}])
def test_a_response_that_failed_is_an_error_of_the_provider(answer):
    with pytest.raises(ic.UpstreamBroke):
        parts_read(ic.responses_stream_of(answer))


@pytest.mark.parametrize("status, reason", [
    ("complete", "end"), ("COMPLETED", "end"), ("success", "end"), ("max_tokens", "length")])
def test_a_response_whose_status_is_in_a_servers_own_words_is_an_answer(status, reason):
    item = {"type": "message", "content": [{"type": "output_text", "text": "x"}]}
    answer = parts_read(ic.responses_stream_of({"status": status, "output": [item]}))

    assert (["x"], reason) == ([part.text for part in answer.parts], answer.ended.reason)


def test_a_text_that_is_done_more_than_once_is_joined_once():
    def event(step, text):
        return {"type": f"response.output_text.{step}", "output_index": 0, "content_index": 0,
                "delta" if step == "delta" else "text": text}

    reader = ic._ItemReader()
    steps = [*[event("delta", "x")] * 40, *[event("done", "x" * 40 + "y")] * 40]
    grown = [one for step in steps for one in reader._grow(step) if type(one) is ic.More]

    assert "x" * 40 + "y" == "".join(more.text for more in grown)
    assert len(grown[0].part.pieces) <= 2


def test_arguments_that_a_server_sends_as_an_object_are_those_of_their_item():
    place = {"output_index": 0, "item_id": "i"}
    item = {"type": "function_call", "id": "i", "call_id": "c", "name": "f"}
    stream = [{"type": "response.output_item.added", **place, "item": {**item, "arguments": ""}},
              {"type": "response.function_call_arguments.done", **place, "arguments": {"n": 1}},
              {"type": "response.output_item.done", **place,
               "item": {**item, "arguments": {"n": 1}}},
              {"type": "response.completed", "response": {}}]

    assert ['{"n": 1}'] == [part.text for part in parts_read(stream).parts]


@pytest.mark.parametrize("event", [
    {"type": "response.output_item.done", "output_index": 0, "item": "x"},
    {"type": "response.output_item.done", "output_index": 0, "item": {
        "type": "message", "content": [7]}},
    {"type": "response.output_item.done", "output_index": 0, "item": {
        "type": "function_call", "name": 7}},
    {"type": "response.output_text.delta", "output_index": 0, "delta": {"x": 1}},
    {"type": "response.completed", "response": {"output": "x"}},
    {"type": "response.incomplete", "response": {"incomplete_details": "x"}}])
def test_an_answer_of_another_shape_is_named(event):
    with pytest.raises(ic.UpstreamBroke, match="another shape than its API says: [a-z_]+ must be"):
        [*ic.responses_events([event], TERMS)]


def test_a_stream_cut_at_every_byte_gives_the_same_events():
    parts = (Think("hm"), Say("Grüße 🐤"), Use("f", {"n": "é"}))
    reply = answer_of("responses", {"model": "gpt-6", "stream": True, **SUMMARY},
                      Answer(parts, counted(parts, 20)))
    sent = reply.body
    whole = events_in([sent])
    expected = [shape(part) for part in parts_read(whole).parts]

    for at in range(0, len(sent), 1 + len(sent) // 500):
        cut = events_in([sent[:at], sent[at:]])
        assert whole == cut
    assert expected == [shape(part) for part in parts_read(cut).parts]


def test_recorded_streams_are_read_like_their_whole_answers_and_written_well():
    read = 0
    for name, exchange in recordings():
        if not name.startswith("openai/responses/") or "sse" not in exchange["response"]:
            continue
        events = events_in([exchange["response"]["sse"].encode()])
        ends = [event["response"] for event in events if event["type"] in (
            "response.completed", "response.incomplete")]
        outputs = [event["output_index"] for event in events
                   if event["type"] == "response.output_item.done"]
        if len(ends) != 1 or len(outputs) != len(ends[0]["output"]):     # two in one, or an error
            continue
        answer = parts_read(events)
        writer = ic.ResponsesWriter({}, 1)
        check_response_stream([*writer.events(ic.responses_events(events, TERMS))])
        whole = parts_read(ic.responses_stream_of(ends[0]))
        assert [(part.kind, part.text, part.name) for part in whole.parts] == [
            (part.kind, part.text, part.name) for part in answer.parts], name
        assert whole.ended == answer.ended
        read += 1
    assert read > 35


# Requests, read.

def read(**fields):
    return ic.read_responses_request({"model": "m", "input": "hi", **fields})


def turns_of(*items, **fields):
    """What was said; a run of the assistant, or of results, as the one turn that pairing makes."""
    def run_of(turn):
        return turn.role if turn.role == "assistant" or turn.parts[0].kind == "result" else id(turn)

    turns = read(input=[*items], **fields).turns
    return [(run[0].role, [shape(part) for turn in run for part in turn.parts])
            for run in ([*rows] for _, rows in itertools.groupby(turns, run_of))]


def test_what_a_shell_and_a_search_of_tools_gave_are_results():
    output = [{"stdout": "a", "outcome": {"type": "exit", "exit_code": 0}}]
    [(role, results)] = turns_of(
        {"type": "shell_call_output", "call_id": "a", "output": output},
        {"type": "tool_search_output", "call_id": "b", "tools": [
            {"type": "function", "name": "f"}, {"type": "custom", "name": "g"}]})

    assert ("user", ["a", "b"], [json.dumps(output), "Found: f, g"]) == (
        role, [result["id"] for result in results],
        [result["parts"][0]["text"] for result in results])


def output_text_of(text):
    return {"type": "output_text", "text": text, "annotations": []}


def message(role, *content):
    return {"type": "message", "role": role, "content": [*content]}


def said_text(text):
    return {"kind": "text", "text": text}


CALL = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}", "id": "fc_1"}
CALLED = {"kind": "call", "id": "c", "name": "f", "text": "{}"}
SEALED = {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "hm"}],
          "content": None, "encrypted_content": sealed("messages", CLAUDE_THOUGHT)}
OPENAIS = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "gAAAAABp"}
ITEMS = {
    "a message without a type": ([{"role": "user", "content": "hi"}], [("user", [said_text("hi")])]),
    "messages of developer and system": (
        [message("developer", {"type": "input_text", "text": "a"}), message(
            "system", {"type": "input_text", "text": "b"})],
        [("system", [said_text("a")]), ("system", [said_text("b")])]),
    "an answer with its reasoning and calls is one turn, in order": (
        [OPENAIS, message("assistant", {"type": "output_text", "text": "a", "annotations": []}),
         CALL, {**CALL, "call_id": "d"}, message("assistant", {"type": "refusal", "refusal": "r"})],
        [("assistant", [
            {"kind": "thought", "native": OPENAIS, "origin": "responses"}, said_text("a"), CALLED,
            {**CALLED, "id": "d"}, {"kind": "refusal", "text": "r"}])]),
    "outputs that follow each other are one turn, a message is another": (
        [CALL, {"type": "function_call_output", "call_id": "c", "output": "1"},
         {"type": "custom_tool_call_output", "call_id": "d", "output": [
             {"type": "input_text", "text": "2"}]}, {"role": "user", "content": "go on"}],
        [("assistant", [CALLED]), ("user", [
            {"kind": "result", "id": "c", "parts": [said_text("1")]},
            {"kind": "result", "id": "d", "parts": [said_text("2")]}]),
         ("user", [said_text("go on")])]),
    "an image and its cache mark": (
        [message("user", {"type": "input_image", "image_url": PNG, "detail": "auto",
                          "prompt_cache_breakpoint": {"mode": "explicit", "ttl": "12h"}},
                 {"type": "input_image", "image_url": "https://x/y.png", "detail": "low"})],
        [("user", [{"kind": "image", "media": "image/png", "data": "iVBORw0KGgo=", "detail": "auto",
                    "mark": {"type": "ephemeral", "ttl": "1h"}},
                   {"kind": "image", "url": "https://x/y.png", "detail": "low"}])]),
    "files": (
        [message("user", {"type": "input_file", "filename": "a.pdf",
                          "file_data": "data:application/pdf;base64,JVBERi0="},
                 {"type": "input_file", "filename": "b.txt",
                  "file_data": "data:text/plain;base64,R3LDvMOfZQ=="},
                 {"type": "input_file", "file_url": "https://x/c.pdf"})],
        [("user", [{"kind": "document", "name": "a.pdf", "media": "application/pdf",
                    "data": "JVBERi0="}, {"kind": "document", "name": "b.txt", "text": "Grüße"},
                   {"kind": "document", "url": "https://x/c.pdf"}])]),
    "an image that a tool gave": (
        [CALL, {"type": "function_call_output", "call_id": "c", "output": [
            {"type": "input_image", "image_url": "https://x/y.png", "detail": "auto"}]}],
        [("assistant", [CALLED]), ("user", [{"kind": "result", "id": "c", "parts": [
            {"kind": "image", "url": "https://x/y.png", "detail": "auto"}]}])]),
    "a custom tool's call, in a namespace": (
        [{"type": "custom_tool_call", "call_id": "c", "name": "exec", "namespace": "functions",
          "input": "ls"}],
        [("assistant", [{"kind": "call", "id": "c", "name": "exec", "namespace": "functions",
                         "text": "ls", "is_text": True}])]),
    "Claude's thought that came as ours": ([SEALED], [("assistant", [
        {"kind": "thought", "text": "hm", "native": CLAUDE_THOUGHT, "origin": "messages"}])]),
    "calls of tools of OpenAI's that the client runs": (
        [{"type": "apply_patch_call", "call_id": "c", "status": "completed",
          "operation": {"type": "delete_file", "path": "a"}},
         {"type": "apply_patch_call_output", "call_id": "c", "status": "failed"},
         {"type": "local_shell_call", "call_id": "d", "id": "l", "status": "completed",
          "action": {"type": "exec", "command": ["ls"], "env": {}}},
         {"type": "local_shell_call_output", "call_id": "d", "output": "a b"}],
        [("assistant", [{"kind": "call", "id": "c", "name": "apply_patch",
                         "text": '{"type": "delete_file", "path": "a"}'}]),
         ("user", [{"kind": "result", "id": "c", "is_error": True, "parts": [
             said_text("failed")]}]),
         ("assistant", [{"kind": "call", "id": "d", "name": "local_shell",
                         "text": '{"type": "exec", "command": ["ls"], "env": {}}'}]),
         ("user", [{"kind": "result", "id": "d", "parts": [said_text("a b")]}])]),
    "a subagent's message": (
        [{"type": "agent_message", "author": "/root", "recipient": "/root/a", "content": [
            {"type": "encrypted_content", "encrypted_content": "go"}]}],
        [("user", [said_text("[message from /root]"), said_text("go")])]),
    "a search that ran at the provider": (
        [{"type": "web_search_call", "id": "ws_1", "status": "completed", "action": {
            "type": "search", "query": "sky", "sources": [{"type": "url", "url": "https://x"}]}}],
        [("assistant", [{"kind": "search", "id": "ws_1", "text": "sky",
                         "citations": (("https://x", "", None, None),)}])]),
}


@pytest.mark.parametrize("case", ITEMS)
def test_items_become_turns(case):
    items, turns = ITEMS[case]
    assert turns == turns_of(*items)


def test_tools_that_come_along_are_nobodys_result():
    added = read(input=[
        {"type": "additional_tools", "tools": [{"type": "function", "name": "f"}]},
        {"type": "tool_search_output", "tools": [{"type": "function", "name": "g"}]}])

    assert (["f", "g"], []) == ([tool.name for tool in added.tools], added.turns)


def test_instructions_are_the_first_system_turn_and_a_string_is_the_users():
    conversation = read(instructions="Be brief.", input="hi")

    assert [("system", "Be brief."), ("user", "hi")] == [
        (role, parts[0].text) for role, parts in conversation.turns]


def test_the_caps_and_switches_of_a_request():
    conversation = read(
        max_output_tokens=99, temperature=0.5, top_p=0.9, parallel_tool_calls=False, stream=True,
        service_tier="flex", user="u", safety_identifier="s", reasoning={
            "effort": "low", "summary": "auto"}, text={"format": {
                "type": "json_schema", "name": "n", "strict": True, "schema": {"type": "object"}}})

    assert (99, {"temperature": 0.5, "top_p": 0.9}, True, True, "flex", "s", "low", "auto") == (
        conversation.output_cap, conversation.sampling, conversation.one_call_at_a_time,
        conversation.streams, conversation.tier, conversation.user, conversation.effort,
        conversation.summary)
    assert ic.Format({"type": "object"}, "n", "", True) == conversation.format


LARK = {"type": "grammar", "syntax": "lark", "definition": "start: /x/"}
NAMESPACE = {"type": "namespace", "name": "ns", "description": "About ns.", "tools": [
    {"type": "custom", "name": "exec", "description": "Run.", "format": LARK},
    {"type": "function", "name": "wait", "parameters": {"type": "object"}, "strict": False}]}
SPACED = [ic.Tool("text", "exec", "About ns.\n\nRun.", namespace="ns", syntax=LARK),
          ic.Tool("function", "wait", schema={"type": "object"}, namespace="ns")]


@pytest.mark.parametrize("fields", [
    {"tools": [NAMESPACE]},
    {"input": [{"type": "additional_tools", "role": "developer", "tools": [NAMESPACE]}]},
    {"input": [{"type": "tool_search_output", "call_id": None, "execution": "server",
                "tools": [NAMESPACE]}], "tools": [NAMESPACE]}])
def test_tools_are_read_wherever_they_stand_but_once(fields):
    assert SPACED == read(**fields).tools


def test_a_search_is_read_with_its_options_and_other_hosted_tools_by_their_type():
    row = {"type": "web_search", "filters": {"allowed_domains": ["x.org"]},
           "user_location": {"type": "approximate", "city": "Oslo"}, "external_web_access": False}
    conversation = read(tools=[row, {"type": "file_search", "vector_store_ids": ["v"]}])
    search, other = conversation.tools

    assert ("search", "web_search", {"allowed_domains": ["x.org"], "user_location": {
        "type": "approximate", "city": "Oslo"}}) == (search.kind, search.name, search.search)
    assert ["tools.web_search.external_web_access"] == [*conversation.rest]
    assert ("other", "file_search") == (other.kind, other.name)


@pytest.mark.parametrize("most, uses", [(3, [3]), (0, []), (None, [None])])
def test_a_cap_of_openais_own_calls_is_one_of_searches(most, uses):
    tools = read(tools=[{"type": "web_search"}, {"type": "function", "name": "f"}],
                 max_tool_calls=most).tools

    assert uses == [tool.search.get("max_uses") for tool in tools if tool.kind == "search"]
    assert "f" == tools[-1].name


def test_the_clients_own_typed_tools_are_functions_and_those_that_run_at_openai_are_not():
    tools = read(tools=[{"type": "local_shell"}, {"type": "apply_patch"}, {
        "type": "shell", "environment": {"type": "local"}}, {
            "type": "shell", "environment": {"type": "container_auto"}}, {
            "type": "tool_search", "execution": "client", "description": "Find.",
            "parameters": {"type": "object"}}, {"type": "tool_search"}]).tools

    assert [("function", "local_shell"), ("function", "apply_patch"), ("function", "shell"),
            ("other", "shell"), ("function", "tool_search"), ("other", "tool_search")] == [
                (tool.kind, tool.name) for tool in tools]


@pytest.mark.parametrize("wanted, choice, left", [
    ("auto", ic.Choice("auto"), 3), ("none", ic.Choice("none"), 3),
    ("required", ic.Choice("required"), 3),
    ({"type": "function", "name": "wait"}, ic.Choice("tool", "wait"), 3),
    ({"type": "custom", "name": "exec", "namespace": "ns"}, ic.Choice("tool", "exec", "ns"), 3),
    ({"type": "web_search"}, ic.Choice("tool", "web_search"), 3),
    ({"type": "allowed_tools", "mode": "required", "tools": [
        {"type": "function", "name": "wait"}, {"type": "web_search_preview"}]},
     ic.Choice("required"), 2)])
def test_the_forms_of_tool_choice(wanted, choice, left):
    conversation = read(tools=[NAMESPACE, {"type": "web_search"}], tool_choice=wanted)

    assert (choice, left) == (conversation.choice, len(conversation.tools))


def test_a_configuration_that_changes_within_the_input_counts_from_there():
    conversation = read(reasoning={"effort": "low"}, input=[
        {"role": "user", "content": "hi"}, {"type": "configuration_update", "reasoning": {
            "effort": "high"}, "text": {"format": {"type": "json_object"}}}])

    assert ("high", ic.Format(None)) == (conversation.effort, conversation.format)


@pytest.mark.parametrize("fields, rest", [
    ({"store": True}, ["store"]), ({"store": False, "truncation": "disabled", "metadata": {}}, []),
    ({"truncation": "auto", "max_tool_calls": 3}, ["truncation"]),
    ({"reasoning": {"context": "all_turns"}}, []),
    ({"reasoning": {"context": "current_turn", "mode": "pro"}},
     ["reasoning.context", "reasoning.mode"]),
    ({"include": ["reasoning.encrypted_content"], "prompt_cache_key": "k", "client_metadata": {
        "a": "b"}, "text": {"verbosity": "low"}}, []),
    ({"surprise": 1}, ["surprise"]),
    ({"input": [{"type": "compaction", "encrypted_content": "x"}, {"type": "mcp_call"},
                {"type": "brand_new"}]}, ["input.compaction", "input.mcp_call",
                                          "input.brand_new"])])
def test_what_has_no_place_is_kept_to_be_reported(fields, rest):
    assert rest == [*read(**fields).rest]


@pytest.mark.parametrize("fields, param", [
    ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ({"conversation": "conv_1"}, "conversation"), ({"prompt": {"id": "p"}}, "prompt"),
    ({"background": True}, "background"),
    ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input"),
    ({"input": [{"id": "msg_1"}]}, "input"), ({"input": [{"type": "compaction_trigger"}]}, "input"),
    ({"input": [message("user", {"type": "input_audio", "input_audio": {}})]}, "input"),
    ({"input": [message("user", {"type": "input_image", "file_id": "file_1"})]}, "input"),
    ({"input": [message("tool", {"type": "input_text", "text": "x"})]}, "input"),
    ({"input": 7}, "input"), ({"input": ["hi"]}, "input"),
    ({"input": [{"role": "user", "content": 7}]}, "input"),
    ({"input": [{"role": "user", "content": [{"type": "input_text", "text": 7}]}]}, "input"),
    ({"input": [{"type": "function_call", "call_id": 7, "name": "f"}]}, "input"),
    ({"instructions": ["x"]}, "instructions"), ({"reasoning": "low"}, "reasoning"),
    ({"text": []}, "text"), ({"text": {"format": {"type": "xml"}}}, "text.format"),
    ({"tools": {}}, "tools"), ({"tools": [{"type": "function"}]}, "tools"),
    ({"tool_choice": "any"}, "tool_choice"),
    ({"tool_choice": {"type": "function", "name": "f"}}, "tool_choice"),
    ({"tool_choice": {"type": "file_search"}, "tools": [{"type": "file_search"}]}, "tool_choice"),
    ({"tool_choice": 7}, "tool_choice"), ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"service_tier": 7}, "service_tier")])
def test_what_cannot_be_carried_over_or_has_another_shape_is_refused_by_its_name(fields, param):
    with pytest.raises(ic.BadRequest) as refused:
        read(**fields)

    assert param == refused.value.param


def test_recorded_requests_are_read_or_refused_by_name():
    read_ones = 0
    for name, exchange in recordings():
        fields = exchange["request"].get("body")
        if not name.startswith("openai/responses/") or not fields:
            continue
        try:
            ic.read_responses_request({"model": "m", **fields})
            read_ones += 1
        except ic.BadRequest as err:
            assert err.param in ("previous_response_id", "conversation", "prompt", "background") \
                or "docx" in name, name
    assert read_ones > 70


# Requests, written.

def turn(role, *parts):
    return ic.Turn(role, [ic.Part("text", part) if isinstance(part, str) else part
                          for part in parts])


def asked(*turns, model="gpt-6.1-sol", **more):
    conversation = ic.Conversation(model)
    conversation.turns = [*turns] or [turn("user", "hi")]
    for name, value in more.items():
        setattr(conversation, name, value)
    return conversation


def written(conversation, strict=False, is_openai=True, most=128_000):
    losses = ic.Losses(strict=strict)
    writer = ic.DIALECTS["responses"].request_writer(
        conversation, ic.Target(most, is_openai), losses)
    request = writer.request()
    assert not is_openai or refused_by_responses(request) is None
    return request, losses, writer.terms


def input_text(text):
    return {"type": "input_text", "text": text}


A_CALL = {"id": "c", "name": "f"}
WRITTEN_ITEMS = {
    "a user's text": ([turn("user", "hi")], [message("user", input_text("hi"))]),
    "a later system message stands where it stood": (
        [turn("user", "hi"), turn("system", "Now French."), turn("user", "go on")],
        [message("user", input_text("hi")), message("developer", input_text("Now French.")),
         message("user", input_text("go on"))]),
    "texts, calls and results, in order": (
        [turn("user", "hi"), turn("assistant", "a", opened("call", "{}", **A_CALL), "b"),
         turn("user", opened("result", id="c", parts=[opened("text", "r")]), "go on")],
        [message("user", input_text("hi")), message("assistant", output_text_of("a")),
         {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
         message("assistant", output_text_of("b")),
         {"type": "function_call_output", "call_id": "c", "output": "r"},
         message("user", input_text("go on"))]),
    "a custom tool's call and its result": (
        [turn("assistant", opened("call", "ls", is_text=True, **A_CALL)),
         turn("user", opened("result", id="c", parts=[opened("text", "a"), opened("text", "b")]))],
        [{"type": "custom_tool_call", "call_id": "c", "name": "f", "input": "ls"},
         {"type": "custom_tool_call_output", "call_id": "c", "output": "a\nb"}]),
    "a result that failed, and one with an image": (
        [turn("assistant", opened("call", "{}", **A_CALL), opened("call", "{}", id="d", name="f")),
         turn("user", opened("result", id="c", is_error=True, parts=[opened("text", "r")]),
              opened("result", id="d", parts=[opened("text", "see"), opened("image", url=PNG)]))],
        [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
         {"type": "function_call", "call_id": "d", "name": "f", "arguments": "{}"},
         {"type": "function_call_output", "call_id": "c", "output": "Error: r"},
         {"type": "function_call_output", "call_id": "d", "output": [
             input_text("see"), {"type": "input_image", "image_url": PNG, "detail": "auto"}]}]),
    "images and documents": (
        [turn("user", opened("image", media="image/png", data="iVBORw0KGgo="),
              opened("document", media="application/pdf", data="JVBERi0=", name="a.pdf"),
              opened("document", url="https://x/c.pdf"), opened("document", "words", name="n"))],
        [message("user", {"type": "input_image", "image_url": PNG, "detail": "auto"},
                 {"type": "input_file", "filename": "a.pdf",
                  "file_data": "data:application/pdf;base64,JVBERi0="},
                 {"type": "input_file", "file_url": "https://x/c.pdf"},
                 input_text("<document title=n>\nwords\n</document>"))]),
    "reasoning of OpenAI's comes back as it was": (
        [turn("assistant", opened("thought", native=OPENAIS, origin="responses"), "a"),
         turn("user", "go on")],
        [OPENAIS, message("assistant", output_text_of("a")), message("user", input_text("go on"))]),
    "a thought that nobody sealed": (
        [turn("assistant", opened("thought", "hm"), "a"), turn("user", "go on")],
        [message("assistant", output_text_of("a")), message("user", input_text("go on"))]),
    "a refusal": (
        [turn("assistant", opened("refusal", "No.")), turn("user", "why")],
        [message("assistant", {"type": "refusal", "refusal": "No."}),
         message("user", input_text("why"))]),
}


@pytest.mark.parametrize("case", WRITTEN_ITEMS)
def test_turns_become_items(case):
    turns, items = WRITTEN_ITEMS[case]
    request, losses, _ = written(asked(*turns))

    assert items == request["input"]
    assert not losses.dropped and not losses.adjusted


def test_nothing_is_stored_and_reasoning_comes_back_sealed():
    request, _, _ = written(asked(effort="high", summary="auto", streams=True))

    assert {"model": "gpt-6.1-sol", "input": [message("user", input_text("hi"))], "store": False,
            "stream": True, "include": ["reasoning.encrypted_content"],
            "reasoning": {"effort": "high", "summary": "auto"}} == request


def test_leading_system_turns_are_the_instructions_or_the_input_where_there_is_no_other():
    both, _, _ = written(asked(turn("system", "a", "b"), turn("system", "c"), turn("user", "hi")))
    alone, _, _ = written(asked(turn("system", "a", "b")))

    assert "a\n\nb\n\nc" == both["instructions"]
    assert [message("developer", input_text("a"), input_text("b"))] == alone["input"]
    assert "instructions" not in alone


STRICT = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"],
          "additionalProperties": False}
FUNCTION = ic.Tool("function", "f.x", "About.", STRICT, True)


def test_tools_and_which_is_called():
    request, losses, terms = written(asked(
        tools=[FUNCTION, ic.Tool("text", "exec", syntax=LARK), ic.Tool(
            "search", "web_search", search={"allowed_domains": ["x.org"], "max_uses": 3,
                                            "blocked_domains": ["y.org"]})],
        choice=ic.Choice("tool", "f.x"), one_call_at_a_time=True))
    name = request["tools"][0]["name"]

    assert [{"type": "function", "name": name, "description": "About.", "parameters": STRICT,
             "strict": True}, {"type": "custom", "name": "exec", "format": LARK},
            {"type": "web_search", "filters": {"allowed_domains": ["x.org"]}}] == request["tools"]
    assert ({"type": "function", "name": name}, False, 3) == (
        request["tool_choice"], request["parallel_tool_calls"], request["max_tool_calls"])
    assert "web_search_call.action.sources" in request["include"]
    assert ic.OwnName("f.x") == terms.names.own(name)
    assert ["tools.web_search.blocked_domains"] == losses.dropped


@pytest.mark.parametrize("choice, wanted", [
    (ic.Choice("auto"), "auto"), (ic.Choice("none"), "none"), (ic.Choice("required"), "required"),
    (ic.Choice("tool", "web_search"), {"type": "web_search"}),
    (ic.Choice("tool", "exec"), {"type": "custom", "name": "exec"}),
    (ic.Choice("tool", "gone"), "auto")])
def test_which_tool_is_to_be_called(choice, wanted):
    request, losses, _ = written(asked(tools=[ic.Tool("text", "exec"), ic.Tool(
        "search", "web_search")], choice=choice))

    assert wanted == request["tool_choice"]
    assert ({"choice": "auto"} if choice.name == "gone" else {}) == losses.adjusted


def test_only_tools_of_one_vendor_are_refused_and_one_among_others_is_reported():
    other = ic.Tool("other", "code", native={"type": "code_execution_20250825"}, origin="messages")
    _, losses, _ = written(asked(tools=[other, FUNCTION]))

    assert ["tools.code_execution_20250825"] == losses.dropped
    with pytest.raises(ic.BadRequest) as refused:
        written(asked(tools=[other]))
    assert "tools" == refused.value.param


@pytest.mark.parametrize("form, sent", [
    (ic.Format(None), {"type": "json_object"}),
    (ic.Format(STRICT, "n", "About."), {"type": "json_schema", "name": "n", "schema": STRICT,
                                        "strict": True, "description": "About."}),
    (ic.Format({"type": "object"}), {"type": "json_schema", "name": "output", "strict": False,
                                     "schema": {"type": "object"}})])
def test_forms_of_the_text(form, sent):
    request, _, _ = written(asked(format=form))

    assert {"format": sent} == request["text"]
    assert ("json" in json.dumps(request["input"]).lower()) == (form.schema is None)


def test_a_form_that_is_no_object_is_asked_for_in_words():
    request, losses, _ = written(asked(format=ic.Format({"type": "array"})))

    assert '{"type": "array"}' in request["instructions"] and "text" not in request
    assert {"format": "instructed"} == losses.adjusted


class Family(NamedTuple):
    """What a model is asked for, and what it gets."""
    model: str
    effort: Optional[str] = None
    sampling: dict = {}
    reasoning: Optional[dict] = None
    adjusted: dict = {}
    dropped: list = []


@pytest.mark.parametrize("row", [
    Family("gpt-6.1-sol"),
    Family("gpt-6.1-sol", "max", reasoning={"effort": "max"}),
    Family("gpt-6.1-sol", "none", reasoning={"effort": "low"}, adjusted={"effort": "low"}),
    Family("gpt-6.1-sol", "low", {"temperature": 0.5, "top_p": 1}, reasoning={"effort": "low"},
           dropped=["temperature"]),
    Family("gpt-5.6-terra", "none", {"temperature": 0.5}, reasoning={"effort": "none"}),
    Family("gpt-5-pro", "low", reasoning={"effort": "high"}, adjusted={"effort": "high"}),
    Family("gpt-5.3-codex", "max", reasoning={"effort": "xhigh"}, adjusted={"effort": "xhigh"}),
    Family("gpt-4o", "high", {"temperature": 0.5, "top_k": 3}, dropped=["top_k"])])
def test_efforts_and_sampling_by_family(row):
    request, losses, _ = written(asked(model=row.model, effort=row.effort, sampling=row.sampling))

    assert (row.reasoning, row.adjusted, row.dropped) == (
        request.get("reasoning"), losses.adjusted, losses.dropped)
    assert ("temperature" in request) == ("temperature" in row.sampling
                                          and "temperature" not in row.dropped)


@pytest.mark.parametrize("model, sent", [("gpt-6.1-sol", {"verbosity": "low"}), ("gpt-4o", None)])
def test_models_that_do_not_reason_get_no_verbosity(model, sent):
    as_hint, hinted, _ = written(asked(model=model, hints={"verbosity": "low"}))
    _, asked_for, _ = written(asked(model=model, rest={"verbosity": "low"}))
    chat = ic.DIALECTS["chat"].request_writer(asked(model=model, hints={"verbosity": "low"}),
                                              ic.Target(64_000, True), ic.Losses()).request()

    assert (sent, []) == (as_hint.get("text"), hinted.dropped)
    assert ([] if sent else ["verbosity"]) == asked_for.dropped
    assert (sent or {}).get("verbosity") == chat.get("verbosity")


@pytest.mark.parametrize("cap, sent, told", [(99, 99, {}), (3, 16, {"output_cap": "16"}),
                                             (10 ** 6, 64_000, {"output_cap": "64000"})])
def test_the_cap_is_between_the_least_and_the_models_most(cap, sent, told):
    request, losses, _ = written(asked(output_cap=cap), most=64_000)

    assert (sent, told) == (request["max_output_tokens"], losses.adjusted)


@pytest.mark.parametrize("more, dropped, adjusted", [
    ({"stops": ["x"]}, ["stops"], {}), ({"rest": {"seed": 1, "metadata": {"a": "b"}}}, ["seed"], {}),
    ({"turns": [turn("assistant", "a", opened("thought", native=OPENAIS, origin="responses"))]},
     [], {"thoughts": "removed", "prefill": "kept"}),
    ({"turns": [turn("assistant", opened("thought", native=CLAUDE_THOUGHT, origin="messages"), "a"),
                turn("user", "b")]}, [], {"thoughts": "removed"}),
    ({"turns": [turn("assistant", opened("other", native={"type": "mcp_tool_use"},
                                         origin="messages"), "a"), turn("user", "b")]},
     ["messages.mcp_tool_use"], {})])
def test_what_is_lost_is_named_and_refused_in_strict_mode(more, dropped, adjusted):
    _, losses, _ = written(asked(**more))

    assert (dropped, adjusted) == (losses.dropped, losses.adjusted)
    with pytest.raises(ic.BadRequest):
        written(asked(**more), strict=True)


@pytest.mark.parametrize("turns", [[turn("user")], [turn("system", "")]])
def test_a_request_without_content_is_refused(turns):
    with pytest.raises(ic.BadRequest):
        written(asked(*turns))


@pytest.mark.parametrize("part", [
    opened("document", file_id="file_1"), opened("image"), opened("document")])
def test_content_without_a_place_is_refused(part):
    with pytest.raises(ic.BadRequest):
        written(asked(turn("user", part)))


def test_a_request_that_was_written_is_read_and_written_again_as_it_was():
    conversation = asked(
        turn("system", "Be brief."), *WRITTEN_ITEMS["texts, calls and results, in order"][0],
        *WRITTEN_ITEMS["images and documents"][0], tools=[FUNCTION._replace(name="f")],
        choice=ic.Choice("tool", "f"), effort="low", output_cap=99, streams=True,
        format=ic.Format(STRICT, "n", "About.", True), tier="flex")
    once, _, _ = written(conversation)
    twice, _, _ = written(ic.read_responses_request(once))

    assert once == twice


# The text of text tools, from models that know objects only.

@pytest.mark.parametrize("text", ["", "ls -l", 'a "b" \\ \n\t/', "Grüße 🐤 \u2028", "\\u0041 \ud83d"])
def test_a_text_inside_an_object_is_read_as_it_comes(text):
    for ascii_only, indent in itertools.product((True, False), (None, 1)):
        sent = json.dumps({"input": text}, ensure_ascii=ascii_only, indent=indent)
        for size in (1, 2, 3, 7, 100):
            inside = ic.TextInput()
            pieces = [inside.more(sent[at:at + size]) for at in range(0, len(sent), size)]

            assert text == "".join(pieces) + inside.rest(sent)
            assert len(text) < 5 or "\ud83d" in text or "".join(pieces) == text


@pytest.mark.parametrize("sent, text", [
    ("ls -l", "ls -l"), ('{"command": "ls"}', ""), ('{"input": "a', "a"), ("", ""),
    ('{"input": 7}', "7")])
def test_what_is_no_such_object_is_kept_as_far_as_it_goes(sent, text):
    inside = ic.TextInput()

    assert text == inside.more(sent) + inside.rest(sent)


# There and back again.

def random_parts(rng):
    """Parts that Responses can say, with texts of all lengths."""
    def words():
        return "".join(rng.choice(["a", " ", "é", "\n", "🐤", '"', "\\"])
                       for _ in range(rng.randrange(1, 12)))

    kinds = [
        lambda number: opened("text", words()), lambda number: opened("refusal", words()),
        lambda number: opened("call", json.dumps({words(): words()}), id=f"c{number}", name="f"),
        lambda number: opened("call", words(), id=f"c{number}", name="f", namespace="ns",
                              is_text=True),
        lambda number: opened("thought", words(), origin="messages", native={
            "type": "thinking", "thinking": words(), "signature": "x"}),
        lambda number: opened("search", words(), id=f"s{number}")]
    return [rng.choice(kinds)(number) for number in range(rng.randrange(1, 7))]


@each_seed(40)
def test_what_was_written_is_read_again_as_it_was(seed):
    rng = Random(seed)
    parts = random_parts(rng)
    before = [shape(part) for part in parts]
    events = streamed(parts, size=rng.randrange(1, 5))
    check_response_stream(events)

    for sent in (events, ic.responses_stream_of(events[-1]["response"])):
        after = [shape(part) for part in parts_read(sent).parts]
        for part in [*before, *after]:
            if part["kind"] == "search":
                part.pop("id", None)
        assert before == after


def test_arguments_of_a_call_that_was_not_announced_come_with_its_name():
    item = {"type": "function_call", "call_id": "c", "name": "f", "arguments": '{"a": 1}'}
    names = [event.part.name for event in ic.responses_events([
        {"type": "response.created", "response": {}},
        {"type": "response.function_call_arguments.delta", "output_index": 0, "delta": '{"a"'},
        {"type": "response.output_item.done", "output_index": 0, "item": item}], TERMS)
        if isinstance(event, ic.Opened)]

    assert ["f"] == names


def test_a_search_at_the_provider_is_two_blocks_of_messages_and_what_only_it_knows_is_none():
    search = ic.Part("search", "ice", id="ws_1", citations=(ic.Citation("https://x/y"),))
    other = ic.Part("other", native={"type": "image_generation_call"}, origin="responses")
    began, ended = ic.Began("1", "m"), ic.Ended("end")
    steps = [step(part) for part in (search, other) for step in (ic.Opened, ic.Closed)]

    whole = ic.MessagesWriter({}, 1).whole(ic.Whole(began, [search, other], ended))
    events = [*ic.MessagesWriter({}, 1).events([began, *steps, ended])]

    check_message_stream(events)
    assert [{"type": "server_tool_use", "id": "srvtoolu_ws_1", "name": "web_search",
             "input": {"query": "ice"}},
            {"type": "web_search_tool_result", "tool_use_id": "srvtoolu_ws_1", "content": [{
                "type": "web_search_result", "url": "https://x/y", "title": "https://x/y",
                "encrypted_content": "", "page_age": None}]}] == whole["content"]
    assert whole["content"] == [event["content_block"] for event in events
                                if event["type"] == "content_block_start"]


# Hostile requests and broken answers.

HOSTILE = [{"model": "m", "input": items, "tools": [NAMESPACE, {"type": "web_search", "filters": {
    "allowed_domains": ["x"]}}, {"type": "shell", "environment": {"type": "local"}}],
    "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [
        {"type": "function", "name": "wait"}]}, "reasoning": {"effort": "low"},
    "text": {"format": {"type": "json_schema", "name": "n", "schema": STRICT}}}
    for items, _ in ITEMS.values()]


@each_seed(20)
def test_a_mutilated_request_is_carried_or_refused(seed):
    rng, carried = Random(seed), 0
    for _ in range(40):
        fields = {**mutated(rng, rng.choice(HOSTILE)), "model": "claude-haiku-4-5"}
        with contextlib.suppress(ic.BadRequest):
            ic.Translator("responses", rng.choice(["messages", "chat"]), fields, ic.Losses(),
                          ic.Target(64_000))
            carried += 1

    assert carried                                                 # or nothing was tried


@each_seed(20)
def test_a_mutilated_answer_is_read_or_breaks_the_stream(seed):
    rng, written = Random(seed), 0
    streams = [said(*parts, fields=SUMMARY, **more)[0] for parts, more, _, _ in READ.values()]
    for _ in range(20):
        events = [mutated(rng, event) if rng.random() < 0.3 else event
                  for event in rng.choice(streams)]
        with contextlib.suppress(ic.UpstreamBroke):
            for writer in (ic.MessagesWriter, ic.ChatWriter, ic.ResponsesWriter):
                [*writer({}, 1).events(ic.responses_events(
                    [event for event in events if isinstance(event, dict)], TERMS))]
                written += 1

    assert written                                                 # or nothing was tried


@pytest.mark.parametrize("maker, goes_back", [("anthropic", True), ("", True), ("lab", False)])
@pytest.mark.parametrize("api", ["messages", "responses"])
def test_a_thought_goes_back_to_the_provider_that_sealed_it_only(api, maker, goes_back):
    native = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "E"} \
        if api == "responses" else CLAUDE_THOUGHT
    seal = ic.sealed(ic.Part("thought", "hm", origin=api, maker=maker, native=native))
    losses = ic.Losses(strict=False)

    sent = ic.Translator("chat", api, {"model": "m", "max_tokens": 9, "messages": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "thinking_blocks": [
            {"type": "thinking", "thinking": "hm", "signature": seal}]},
        {"role": "user", "content": "c"}]}, losses, ic.Target(
            1000, manners=ic.Provider("anthropic", "anthropic", ""))).request

    assert goes_back == (json.dumps(native)[1:-1] in json.dumps(sent))
    assert goes_back != any("removed" in value for _, value in losses.headers())
