"""Hostile requests and broken answers: a translator refuses or carries over, and never fails."""
import copy
import json
import re
import sys
from collections import Counter
from random import Random

import pytest
from test_chat_completions import CHAT_STREAMS, CHAT_TURNS, TO_CHAT
from test_messages import STREAMED, TO_CLAUDE, TURNS
from translated import (OLD, OPEN_SCHEMA, call, chunks_of, completion, stream_of, text, to_chat,
                        to_claude, tool)
from translation_checker import check_message_stream

import ironcage_proxy as ic
from support import each_seed

JUNK = (None, True, 0, -1, 1.5, "", "x", "\ud800", [], [None], ["x"], [[]], {}, {"x": 1},
        {"type": "x"}, {"type": None}, [{"type": "text"}], [{"type": "text", "text": 7}],
        [{"type": "tool_use"}], [{"type": "tool_result"}], {"type": "function"}, {"name": 7},
        [{"id": 1, "function": 2}], [{"function": {"name": None, "arguments": 7}}])


def places(value, path=()):
    """Every place in a JSON value."""
    yield path
    children = value.items() if isinstance(value, dict) else \
        enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from places(child, (*path, key))


def mutated(rng, value):
    """A JSON value with one to three places replaced by junk, or taken out."""
    value = copy.deepcopy(value)
    for _ in range(rng.randrange(1, 4)):
        path = rng.choice([path for path in places(value) if path])
        holder = value
        for key in path[:-1]:
            holder = holder[key]
        if rng.random() < 0.15:
            del holder[path[-1]]
        else:
            holder[path[-1]] = copy.deepcopy(rng.choice(JUNK))
        if not any(places(value)):
            break
    return value


CHAT_REQUESTS = [{"messages": [{"role": "user", "content": "hi"}], **row.fields}
                 for row in TO_CLAUDE] \
    + [{"messages": row[1], "tools": []} for row in TURNS.values()]
MESSAGES_REQUESTS = [{"messages": [{"role": "user", "content": "hi"}], "max_tokens": 9,
                      **row.fields}
                     for row in TO_CHAT] + [
    {"messages": row[0], "max_tokens": 9} for row in CHAT_TURNS.values()]


@each_seed(15, 40)
def test_hostile_requests_are_refused_or_carried_over(seed):
    rng = Random(seed)
    for client, api, model, requests in (
            ("chat", "messages", OLD, CHAT_REQUESTS),
            ("messages", "chat", "gpt-4o", MESSAGES_REQUESTS)):
        carried = 0
        for request in requests:
            fields = {**mutated(rng, request), "model": model}
            try:
                translator = ic.Translator(client, api, fields, ic.Losses(), ic.Target(64_000))
            except ic.BadRequest:
                continue
            assert json.dumps(translator.request["messages"]) != "[]"
            assert model == translator.request["model"]
            carried += 1
        assert carried > 2                 # of about a hundred: it does not refuse whatever comes


@each_seed(15, 40)
def test_broken_answers_are_carried_over_or_said_to_be_broken(seed):
    rng = Random(seed)
    wholes = [_carried(lambda answer=answer: to_claude({})[0].answer(mutated(rng, answer)))
              for answer in STREAMED.values()]
    streams = [_carried(lambda answer=answer: list(to_claude({})[0].events(_some_mutated(
        rng, stream_of(answer))))) for answer in STREAMED.values()]
    chunks = [_carried(lambda d=deltas, f=finish: list(to_chat({})[0].events(_some_mutated(
        rng, chunks_of(*d, finish=f))))) for deltas, finish, _ in CHAT_STREAMS.values()]
    completions = [_carried(lambda: to_chat({})[0].answer(mutated(rng, completion(
        content="hello", tool_calls=[call()])))) for _ in range(9)]
    for answers in (wholes, streams, chunks, completions):
        assert any(re.search(SAID, answer) for answer in answers)     # not all are broken, nor lost


def _some_mutated(rng, events):
    return (mutated(rng, event) if rng.random() < 0.2 else event for event in events)


def chat_conversation(rng):
    """A conversation as chat clients send it, and as careless ones do."""
    messages, open_ids, number = [], [], 0
    for _ in range(rng.randrange(1, 9)):
        kind = rng.choice(("user", "user", "assistant", "calls", "tool", "system", "prefill"))
        words = rng.choice(("hello", "", " ", "so be it \n", [text("alpha"), text("")], None))
        if kind == "calls":
            open_ids = [f"{rng.choice(('call', 'toolu', 'x.y', 'é'))}_{number + n}"
                        for n in range(rng.randrange(1, 4))]
            number += len(open_ids)
            messages.append({"role": "assistant", "content": words, "tool_calls": [
                call(rng.choice(("f", "a.b")), '{"n": 1}', call_id) for call_id in open_ids]})
        elif kind == "tool":
            for call_id in rng.sample(open_ids, rng.randrange(len(open_ids) + 1)) or ["nobody"]:
                messages.append({"role": "tool", "tool_call_id": call_id, "content": words})
        else:
            messages.append({"role": {"prefill": "assistant"}.get(kind, kind), "content": words})
    return messages


def messages_conversation(rng):
    """A conversation as Anthropic's clients send it, and as careless ones do."""
    messages, open_ids, number = [], [], 0
    for _ in range(rng.randrange(1, 9)):
        kind = rng.choice(("user", "assistant", "calls", "results", "system"))
        content = [text(rng.choice(("hello", "", "so be it")))]
        if kind == "calls":
            open_ids = [f"toolu_{number + n}" + "x" * rng.choice((0, 40)) for n in range(2)]
            number += 2
            content += [{"type": "tool_use", "id": call_id, "name": "f", "input": {}}
                        for call_id in open_ids]
        elif kind == "results":
            content = [{"type": "tool_result", "tool_use_id": call_id, "content": "alpha"}
                       for call_id in rng.sample(open_ids, rng.randrange(len(open_ids) + 1))] \
                + rng.choice(([], content)) or content
        messages.append({"role": {"calls": "assistant", "results": "user"}.get(kind, kind),
                         "content": content})
    return messages


def words_in(value):
    """How often each of the words of the generators stands in a value."""
    return Counter(re.findall("hello|so be it|alpha", json.dumps(value)))


def check_carried(translate, fields, model):
    """Nothing that was said is lost or doubled, but for results that another replaced; and a
    conversation is refused only where nothing was said."""
    said = words_in(fields["messages"])
    try:
        translator, losses = translate(fields, model)
    except ic.BadRequest:
        assert not said
        return
    carried = words_in([translator.request.get("system"), translator.request["messages"]])
    assert carried == said or (not carried - said and "paired" in losses.adjusted.values())


@each_seed(100, 300)
def test_what_is_carried_over_meets_the_other_vendors_rules(seed):
    """to_claude and to_chat hold what comes out against them."""
    rng = Random(seed)
    for model in ("claude-3-haiku", OLD, "claude-opus-4-6", "claude-opus-4-8", "claude-opus-5-5"):
        check_carried(to_claude, {"messages": chat_conversation(rng), "max_tokens": 9000,
                                  **rng.choice((
            {}, {"reasoning_effort": "high"}, {"tools": [tool(), tool("a.b")]},
            {"tools": [tool(), tool("a.b")], "tool_choice": "required",
             "reasoning_effort": "low"}, {"temperature": 0.3, "top_p": 0.5},
            {"response_format": {"type": "json_schema", "json_schema": {
                "schema": OPEN_SCHEMA}}}))}, model)
    for model in ("gpt-4o", "o3", "gpt-5-mini", "gpt-5.5", "gpt-5.6"):
        check_carried(to_chat, {"messages": messages_conversation(rng), **rng.choice((
            {}, {"tools": [{"name": "f"}]}, {"thinking": {"type": "disabled"}},
            {"tools": [{"name": "f"}], "output_config": {"effort": "max"}},
            {"temperature": 0.3, "stop_sequences": ["x"]}))}, model)


def sloppy_stream(rng):
    """A chat server's stream with the liberties that servers take, and what it says:
    (deltas, finish, thinking, text, calls)."""
    deltas, thinking, said, calls = [], "", "", []
    for _ in range(rng.randrange(3)):
        thinking += "hm "
        deltas.append({rng.choice(("reasoning_content", "reasoning")): "hm "})
    for _ in range(rng.randrange(3)):
        said += "ab "
        deltas.append({"content": "ab ", **rng.choice(({}, {"role": "assistant"},
                                                       {"tool_calls": []}))})
    count, style = rng.randrange(4), rng.choice(("whole", "pieces", "mixed", "no index"))
    pending = []
    for number in range(count):
        arguments = json.dumps({"n": number, "text": "ü{}\\" * rng.randrange(3)})
        name, call_id = f"f{number}", f"c{number}"
        calls.append((name, call_id, json.loads(arguments)))
        cut = [] if style == "whole" else sorted(rng.sample(range(1, len(arguments)), 2))
        parts = [arguments[a:b] for a, b in zip([0, *cut], [*cut, None])]
        if style != "whole" and rng.random() < 0.5:
            parts.insert(0, "")
        place = {} if style == "no index" else {"index": number}
        rows = [{**place, "id": call_id, "type": "function",
                 "function": {"name": name, "arguments": parts[0]}}]
        for part in parts[1:]:
            again = rng.choice(({}, {"id": call_id} if style != "no index" else {}))
            rows.append({**place, **again, "function": {
                "arguments": part, **rng.choice(({}, {"name": None}))}})
        pending.append(rows)
    if style == "mixed":                               # parallel calls, each in its own order
        while any(pending):
            deltas.append({"tool_calls": [rng.choice([p for p in pending if p]).pop(0)]})
    elif style == "whole" and count:
        deltas.append({"tool_calls": [rows[0] for rows in pending]})
    else:
        deltas += [{"tool_calls": [row]} for rows in pending for row in rows]
    return deltas or [{"content": ""}], rng.choice(("stop", "tool_calls")), thinking, said, calls


@pytest.mark.parametrize("is_openai", [True, False])
@each_seed(200)
def test_a_sloppy_stream_says_the_same_as_a_message(seed, is_openai):
    deltas, finish, thinking, said, calls = sloppy_stream(Random(seed))
    translator, _ = to_chat({"stream": True}, "gpt-4o" if is_openai else "qwen", is_openai)

    message = check_message_stream(list(translator.events(
        chunks_of(*deltas, finish=finish, usage=Random(seed).choice(("after", "with", "none"))))))

    content = message["content"]
    assert thinking == "".join(b["thinking"] for b in content if b["type"] == "thinking")
    assert said == "".join(b["text"] for b in content if b["type"] == "text")
    assert calls == sorted(((b["name"], b["id"], b["input"]) for b in content
                            if b["type"] == "tool_use"), key=lambda call: call[1])
    assert ("tool_use" if calls else "end_turn") == message["stop_reason"]


SAID = r'"(name": "|hel|he"|Th|so|raw|and)'             # by the answers that are mutated


def _carried(carry):
    """What an answer became, as JSON; "" where it is said to be broken."""
    try:
        return json.dumps(carry())
    except ic.UpstreamBroke:
        return ""


NAMES = ("a", "b", "properties", "required", "anyOf", "type", "default")     # keywords too


def random_schema(rng, depth=0):
    """A valid JSON schema, of the keywords that real tools use."""
    def inner():
        return random_schema(rng, depth + 1)

    leaves = [
        lambda: {"type": rng.choice(["string", "integer", "number", "boolean", "null"])},
        lambda: {"type": ["string", "null"], "format": rng.choice(["date", "tea-time"])},
        lambda: {"type": "string", "pattern": rng.choice(["^a+$", "^(?!b)"]), "maxLength": 9},
        lambda: {"enum": rng.sample(["a", 1, None, {"x": 1}, ["y"]], 2)},
        lambda: {"const": rng.choice(["a", {"type": "object"}])},
        lambda: {"$ref": rng.choice(["#/$defs/A", "#", "elsewhere.json"])},
        lambda: rng.choice([{}, {"description": "d"}, {"type": "integer", "default": 7}])]
    branches = [
        lambda: {"type": "array", "items": inner(), "minItems": rng.randrange(3)},
        lambda: {rng.choice(["anyOf", "oneOf", "allOf"]): [inner(), inner()][rng.randrange(2):]},
        lambda: {"not": inner()},
        lambda: {"type": "object", "additionalProperties": rng.choice([True, False, inner()])},
        lambda: random_object(rng, depth + 1)]
    return rng.choice(leaves if depth > 3 else leaves + branches * 2)()


def random_object(rng, depth=0):
    properties = {name: random_schema(rng, depth) for name in rng.sample(NAMES, rng.randrange(4))}
    schema = {"type": "object", "properties": properties}
    if rng.random() < 0.6:
        schema["required"] = [*properties]
    if rng.random() < 0.6:
        schema["additionalProperties"] = False
    if rng.random() < 0.3:
        schema["$defs"] = {"A": random_schema(rng, depth + 1)}
    return schema


@each_seed(12, 40)
def test_every_valid_schema_is_carried_as_the_other_vendor_takes_it(seed):
    """to_claude() and to_chat() ask the vendors' rules; strict or not, nobody is refused."""
    rng = Random(seed)
    for _ in range(20):
        schema, strict = random_object(rng), rng.random() < 0.7
        for model in (OLD, "claude-sonnet-4-6", "claude-opus-5-5"):
            to_claude({"tools": [tool(parameters=schema, strict=strict)]}, model)
            to_claude({"response_format": {"type": "json_schema", "json_schema": {
                "name": "n", "schema": schema}}}, model)
        to_chat({"tools": [{"name": "f", "input_schema": schema, "strict": strict}]})
        to_chat({"output_config": {"format": {"type": "json_schema", "schema": schema}}})


# What grows faster than what comes in would hold up everybody.

USER = {"role": "user", "content": "hi"}
WIDE_REQUESTS = {
    "tools": ("responses", "chat", lambda n: {"input": "hi", "tools": [
        {"type": "function", "name": f"f{i}", "parameters": {}} for i in range(n)]}),
    "images of one side": ("messages", "chat", lambda n: {"max_tokens": 9, "messages": [
        {"role": "user", "content": [{"type": "image", "source": {
            "type": "url", "url": "https://a.b"}}]}] * n}),
}


def open_calls(n):
    return [{"choices": [{"index": 0, "delta": {"tool_calls": [{
        "index": i, "id": f"c{i}", "function": {"name": "f", "arguments": "{"}}]}}]}
        for i in range(n)] + [{"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}]


def work_of(action):
    """How many lines the interpreter runs for something; a loop within a line counts each round.
    (Lines and not opcodes: Python 3.12 does not count those of every function.)"""
    steps = 0

    def trace(frame, event, argument):
        nonlocal steps
        steps += 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
        steps = 0                    # the second time only: the first also fills what is kept
        action()
    finally:
        sys.settrace(before)
    return steps


def test_the_measure_of_work_sees_a_loop_in_a_loop():
    few, many = (work_of(lambda n=n: [[0 for _ in range(n)] for _ in range(n)]) for n in (40, 160))

    assert many > 12 * few


@pytest.mark.parametrize("name", [*WIDE_REQUESTS])
def test_the_work_for_a_request_grows_with_its_length_and_no_faster(name):
    client, api, made = WIDE_REQUESTS[name]
    few, many = (work_of(lambda n=n: ic.Translator(
        client, api, {"model": "m", **made(n)}, ic.Losses(), ic.Target(100))) for n in (40, 160))

    assert many < 4.4 * few


def open_blocks(n):
    blocks = ({"type": "text", "text": "a"}, {"type": "thinking", "thinking": "b"},
              {"type": "tool_use", "id": "t", "name": "f", "input": {}})
    return [{"type": "message_start", "message": {}},
            *({"type": "content_block_start", "index": i, "content_block": blocks[i % 3]}
              for i in range(n)),
            *({"type": "content_block_stop", "index": i} for i in range(n)),
            {"type": "message_stop"}]


def open_items(n):
    calls = [{"type": "response.output_item.added", "output_index": i, "item": {
        "type": "function_call", "call_id": "c", "name": "f"}} for i in range(n)]
    texts = [{"type": f"response.{kind}.delta", "output_index": at * n, "content_index": i,
              "delta": "x"} for i in range(n)
             for at, kind in ((1, "output_text"), (2, "refusal"), (3, "reasoning_text"))]
    return [*calls, *texts, {"type": "response.completed", "response": {}}]


WIDE_ANSWERS = {"chat": open_calls, "messages": open_blocks, "responses": open_items}


@pytest.mark.parametrize("client", [*WIDE_ANSWERS])
@pytest.mark.parametrize("api", [*WIDE_ANSWERS])
def test_the_work_for_an_answer_grows_with_its_length_and_no_faster(client, api):
    fields = {"model": "m", "max_tokens": 9, "input": "x", "messages": [
        {"role": "user", "content": "x"}]}

    def carry(n):
        translator = ic.Translator(client, api, fields, ic.Losses(), ic.Target(100))
        return [*translator.events(WIDE_ANSWERS[api](n))]

    few, many = (work_of(lambda n=n: carry(n)) for n in (40, 160))
    assert many < 4.4 * few


def test_of_many_calls_with_one_id_each_gets_its_own_at_the_first_try():
    class Asked(set):
        asked = 0

        def __contains__(self, one):
            self.asked += 1
            return super().__contains__(one)
    used = Asked()

    for _ in range(100):
        used.add(ic.carried_call_id("call_1", used))

    assert (100, True) == (len(used), used.asked <= 300)
    assert {"call_1"} == {ic.own_call_id(one) for one in used}


@pytest.mark.parametrize("client", ["chat", "responses"])
@pytest.mark.parametrize("is_whole", [True, False])
def test_an_answer_whose_start_its_server_left_out_is_carried_over(client, is_whole):
    events = [*stream_of(STREAMED["text"])][1:]
    translator = ic.Translator(client, "messages", {
        "model": "m", "messages": [USER], "input": "hi"}, ic.Losses(), ic.Target(100))

    said = translator.answer_of(events) if is_whole else [*translator.events(events)]

    assert "hel" in json.dumps(said)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_no_number_that_json_lacks_reaches_a_client_in_a_tools_arguments(number):
    answer = completion(tool_calls=[call(arguments='{"a": %s}' % number)], content=None)
    block = to_chat({})[0].answer(answer)["content"][0]

    assert {"__raw": '{"a": %s}' % number} == block["input"]


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_no_number_that_json_lacks_is_written_whoever_sent_it(number):
    def no_constant(name):
        raise AssertionError(name)

    sent = json.loads('{"type": "tool_use", "id": "a", "name": "f", "input": {"n": [%s]}}' % number)
    translator = ic.Translator("chat", "messages", {"model": "m", "messages": [USER]},
                               ic.Losses(), ic.Target(100))
    said = translator.answer({"content": [sent], "stop_reason": "tool_use", "model": sent["input"]})
    arguments = said["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"]

    assert {"n": [None]} == json.loads(arguments, parse_constant=no_constant)
    assert {"n": [None]} == json.loads(ic.json_bytes(said), parse_constant=no_constant)["model"]
