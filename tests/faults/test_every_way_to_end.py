"""Every way in which a call can end settles it exactly once, for at least what was billed.

Nothing stays reserved; a refused or unsent call costs nothing; what ends without exact usage costs
its input and the output that can have been made until then, by the table below.
"""
import contextlib
import itertools
import json
import socket
import struct
import threading
from dataclasses import dataclass, field, replace
from fractions import Fraction
from random import Random
from typing import Callable, Optional

import pytest
from support import (OPENAI_KEY, PATIENCE_S, RATES, Close, Cut, Gate, Hang, MockProvider, Raw,
                     RawClient, Reply, call, each, pause, program, seeds, settled_status, sse,
                     sse_events, start_proxy)

PATHS = {
    "/v1/chat/completions": {"model": "gpt-4o-mini", "max_tokens": 200, "stream": True,
                             "messages": [{"role": "user", "content": "hello"}]},
    "/v1/responses": {"model": "gpt-4o-mini", "max_output_tokens": 200, "stream": True,
                      "input": "hello"},
    "/v1/messages": {"model": "claude-haiku-4-5", "max_tokens": 200, "stream": True,
                     "messages": [{"role": "user", "content": "hello"}]},
}
CHAT = PATHS["/v1/chat/completions"]
SSE = (("content-type", "text/event-stream"),)
JSON = (("content-type", "application/json"),)


class Clock:
    """Nanoseconds that pass only where a test says so: what charges are counted by."""

    def __init__(self):
        self.now_ns = 10 ** 18

    def __call__(self):
        return self.now_ns

    def pass_s(self, seconds):
        self.now_ns += int(seconds * 10 ** 9)


@pytest.fixture
def clock(monkeypatch):
    stopped = Clock()
    monkeypatch.setattr(program().time, "monotonic_ns", stopped)
    return stopped


@pytest.fixture(params=PATHS)
def stream(request):
    return request.param, PATHS[request.param]


def spent_before(mock, proxy):
    """What is spent so far; the mock's bills begin anew."""
    mock.bills.clear()
    return settled_status(proxy)["spent_microdollars"]


def last_row(proxy):
    return call(proxy.port, "GET", "/ironcage/usage").json["rows"][0]


def error_of(events, path):
    """The error that ends a stream, in its dialect."""
    name, data = events[-1]
    body = json.loads(data)
    if path in ("/v1/chat/completions", "/v1/completions"):
        assert name is None
    else:
        assert ("error", "error") == (name, body["type"])
    return body["error"]


# The table: every way to end, for every API, streamed or whole. `SPEED` tokens a second are what is
# assumed; the mock makes three quarters of that, most of them unseen.

SPEED = 1_000
MOCK_SPEED = 750
CAP = 5_000
HELLO = [{"role": "user", "content": "hello"}]


@dataclass(frozen=True)
class Api:
    """What the table needs to know of an API."""
    path: str
    fields: dict                        # of a request
    streams: bool = True
    starts_with_input: bool = False     # a stream's first event has the exact input

    @property
    def rates(self):
        """Microdollars a token: input, output."""
        rates = [Fraction(usd) * 10 ** 6 for usd in RATES[self.fields["model"]]]
        return rates[0], rates[-1]


APIS = {
    "chat": Api("/v1/chat/completions",
                {"model": "gpt-4o-mini", "max_tokens": CAP, "messages": HELLO}),
    "completions": Api("/v1/completions", {"model": "gpt-3.5-turbo-instruct", "max_tokens": CAP,
                                           "prompt": "hello"}),
    "embeddings": Api("/v1/embeddings", {"model": "text-embedding-3-small", "input": "hello"},
                      streams=False),
    "responses": Api("/v1/responses", {"model": "gpt-4o-mini", "max_output_tokens": CAP,
                                       "input": "hello"}),
    "messages": Api("/v1/messages", {"model": "claude-haiku-4-5", "max_tokens": CAP,
                                     "messages": HELLO}, starts_with_input=True),
}
ERRORS = {
    "responses": sse({"type": "error", "code": "overloaded", "message": "Overloaded"}, "error"),
    "messages": sse({"type": "error", "error": {"type": "overloaded_error", "message": "no"}},
                    "error"),
}
CHAT_ERROR = sse({"error": {"type": "server_error", "message": "Overloaded"}})


@dataclass(frozen=True)
class End:
    """One way to end a call."""
    made: Callable[[str, Reply], Reply]     # (API, the mock's own answer) -> what it answers
    costs: str                              # "exact", "nothing", "reserved", or "at most"
    seconds: float = 2                      # from sending to the end
    reason: Optional[str] = None            # in the row
    timeouts: dict = field(default_factory=dict)


def begun(count, *ending):
    """The mock's answer up to so many events, or bytes of a whole one; then an ending."""
    def made(api, default):
        steps, tokens = default.steps[:count], default.tokens_by_step[:count]
        if default.framing == "length":
            steps, tokens = (default.body[:count],) if count else (), (CAP,)
        model, usage = default.bills
        return replace(default, steps=(*steps, *ending), framing="chunked",
                       bills=(model, {"output_tokens": 0, **usage}),
                       tokens_by_step=(*tokens, *[tokens[-1] if tokens else 0] * len(ending)))
    return made


CLEANLY = (Raw(b"0\r\n\r\n"), Close())        # the end of a chunked body


def erring(count):
    def made(api, default):
        reply = begun(count, ERRORS.get(api, CHAT_ERROR), *CLEANLY)(api, default)
        return reply if count else replace(reply, bills=None)
    return made


def edited(usage):
    """The mock's answer with its usage edited: in the whole, or in the event that ends it."""
    def edit(value):
        if isinstance(value, dict):
            return {name: usage(child) if name == "usage" and child is not None else edit(child)
                    for name, child in value.items()}
        return value

    def made(api, default):
        if default.framing == "length":
            return replace(default, steps=(json.dumps(edit(json.loads(default.body))).encode(),))
        steps = []
        for step in default.steps:
            name, data = sse_events(step)[0]
            is_start = data == "[DONE]" or json.loads(data).get("type") == "message_start"
            steps.append(step if is_start else sse(edit(json.loads(data)), name))
        return replace(default, steps=tuple(steps))
    return made


def replied(**changes):
    return lambda api, default: replace(default, **changes)


REFUSAL = {"headers": JSON, "framing": "length", "bills": None,
           "steps": (b'{"error": {"type": "overloaded_error", "message": "Overloaded"}}',)}
BROKE, GONE, LATE = "the answer broke off", "client gone", 11
STREAM_ENDS = {
    "whole": End(lambda api, default: default, "exact"),
    "without an answer": End(replied(answers=False), "at most", reason="no answer"),
    "without an answer, late": End(replied(answers=False), "at most", LATE, "no answer"),
    "head, then reset": End(begun(0, Cut()), "at most", reason=BROKE),
    "head, then closed, late": End(begun(0, Close()), "at most", LATE, BROKE),
    "first event, then reset": End(begun(1, Cut()), "at most", reason=BROKE),
    "half, then closed": End(begun(7, Close()), "at most", reason=BROKE),
    "half, then closed, late": End(begun(7, Close()), "at most", LATE, BROKE),
    "half, then silence": End(begun(7, Hang()), "at most", 2, BROKE, {"between_bytes_s": 0.2}),
    "error at once": End(erring(0), "nothing"),
    "error at once, at the last moment": End(erring(0), "nothing", 10),
    "error at once, late": End(erring(0), "at most", LATE, "an error in the stream"),
    "error in the middle": End(erring(7), "at most", reason="an error in the stream"),
    "error in the middle, late": End(erring(7), "at most", LATE, "an error in the stream"),
    "half, then a clean end": End(begun(7, *CLEANLY), "at most", reason="no usage in the answer"),
    "usage missing": End(edited(lambda usage: None), "at most", reason="no usage in the answer"),
    "usage malformed": End(edited(lambda usage: dict.fromkeys(usage, -1)), "at most",
                           reason="malformed usage"),
    "usage not an object": End(edited(lambda usage: "many"), "at most", reason="malformed usage"),
    "unknown encoding": End(replied(headers=(*SSE, ("content-encoding", "br"))), "at most",
                            reason="no answer"),
    "refused": End(replied(status=529, **REFUSAL), "nothing"),
}
WHOLE_ENDS = {
    "whole": End(lambda api, default: default, "exact"),
    "without an answer": End(replied(answers=False), "at most", reason="no answer"),
    "without an answer, at the last moment": End(replied(answers=False), "at most", 10),
    "without an answer, late": End(replied(answers=False), "reserved", LATE, "no answer"),
    "head, then reset": End(begun(0, Cut()), "at most", reason=BROKE),
    "head, then reset, late": End(begun(0, Cut()), "reserved", LATE, BROKE),
    "head and an empty line, then reset, late": End(
        begun(0, b"\r\n", Cut()), "reserved", LATE, BROKE),
    "half, then closed": End(begun(60, Close()), "at most", reason=BROKE),
    "half, then closed, late": End(begun(60, Close()), "at most", LATE, BROKE),
    "silence": End(begun(0, Hang()), "at most", 2, BROKE, {"between_bytes_s": 0.2}),
    "silence, late": End(begun(0, Hang()), "reserved", LATE, BROKE, {"between_bytes_s": 0.2}),
    "empty": End(begun(0), "at most", reason="no usage in the answer"),
    "not JSON": End(replied(steps=(b"<html>",)), "at most", reason="no usage in the answer"),
    "usage missing": End(edited(lambda usage: None), "at most", reason="no usage in the answer"),
    "usage missing, late": End(edited(lambda usage: None), "at most", LATE),
    "usage malformed": End(edited(lambda usage: dict.fromkeys(usage, True)), "at most",
                           reason="malformed usage"),
    "usage not an object": End(edited(lambda usage: [1]), "at most", reason="malformed usage"),
    "unknown encoding": End(replied(headers=(*JSON, ("content-encoding", "br"))), "at most",
                            reason="no answer"),
    "refused": End(replied(status=500, **REFUSAL), "nothing"),
}
CELLS = [(api, is_stream, name)
         for api, row in APIS.items() for is_stream in (True, False) if row.streams or not is_stream
         for name in (STREAM_ENDS if is_stream else WHOLE_ENDS)]


def output_seen(api, reply):
    """UTF-8 bytes of output in what a reply shows: an oracle for the few shapes of the mock."""
    body = b"".join(step for step in reply.steps if isinstance(step, bytes))
    if reply.status != 200:
        return 0
    if ("content-encoding", "br") in reply.headers:        # the guard lets nothing of it pass
        return 0
    if reply.framing == "length" or not body.startswith((b"data", b"event")):
        try:
            whole = json.loads(body)
        except ValueError:
            return len(body.strip())
        texts = {"chat": lambda: [c["message"]["content"] for c in whole["choices"]],
                 "completions": lambda: [c["text"] for c in whole["choices"]],
                 "responses": lambda: [part["text"] for item in whole["output"]
                                       for part in item["content"]],
                 "messages": lambda: [part["text"] for part in whole["content"]],
                 "embeddings": list}[api]()
        return len("".join(texts).encode())
    texts = []
    for _, data in sse_events(body):
        event = {} if data == "[DONE]" else json.loads(data)
        for choice in event.get("choices", []):
            texts.append(choice.get("text") or choice.get("delta", {}).get("content") or "")
        delta = event.get("delta")
        if event.get("type") in ("response.output_text.delta", "content_block_delta"):
            texts.append(delta if isinstance(delta, str) else delta["text"])
    return len("".join(texts).encode())


@pytest.mark.parametrize("api, is_stream, name", CELLS)
def test_every_way_to_end(mock, proxy_for, clock, api, is_stream, name):
    row, end = APIS[api], (STREAM_ENDS if is_stream else WHOLE_ENDS)[name]
    proxy = proxy_for("--budget", "1", timeouts=end.timeouts)
    mock.reasoning_tokens = min(int(end.seconds * MOCK_SPEED), CAP - 100)
    replies = []

    def reply(request):
        replies.append(end.made(api, mock.default_reply(request)))
        clock.pass_s(end.seconds)
        return replies[0]

    mock.script(reply)

    answer = call(proxy.port, "POST", row.path, {**row.fields, **({"stream": True} if is_stream else {})})

    spent = settled_status(proxy)["spent_microdollars"]
    settled = last_row(proxy)
    input_rate, output_rate = row.rates
    cap = 0 if api == "embeddings" else CAP
    bound = settled["bound_microdollars"]
    shows_input = is_stream and row.starts_with_input and answer.status == 200 \
        and b"message_start" in replies[0].body and "encoding" not in name
    known = mock.default_reply(mock.seen[0]).bills[1].get("input_tokens") if shows_input else None
    input_cost = known * input_rate if shows_input else bound - cap * output_rate
    output = min(cap, max(output_seen(api, replies[0]), end.seconds * SPEED))
    expected = {"exact": mock.billed_microdollars, "nothing": 0, "reserved": bound,
                "at most": input_cost + output * output_rate}[end.costs]

    assert expected - (end.costs == "at most") <= spent < expected + 1
    assert mock.billed_microdollars <= spent <= bound
    assert end.costs in ("exact", "nothing") or (end.reason or "") in settled["estimated"]
    assert end.costs != "exact" or settled["estimated"] is None
    assert mock.billed_microdollars == 0 or end.costs == "reserved" \
        or name == "unknown encoding" or (name.startswith("half") and not is_stream) \
        or spent <= 2 * mock.billed_microdollars + 2 * (bound - cap * output_rate)


# Usage that is malformed, or reported twice.

MALFORMED = (-1, 51.0, 1e15, 10 ** 15, True, "51", [51], {"tokens": 51})
STREAMED = [name for name, row in APIS.items() if row.streams]
# The counts that a second report of usage can have, and the event around it.
SECOND_REPORTS = {
    "chat": (("prompt_tokens", "completion_tokens", "total_tokens"),
             lambda usage: sse({"choices": [], "usage": usage})),
    "completions": (("prompt_tokens", "completion_tokens"),
                    lambda usage: sse({"choices": [], "usage": usage})),
    "responses": (("input_tokens", "output_tokens"), lambda usage: sse(
        {"type": "response.completed", "response": {"usage": usage}}, "response.completed")),
    "messages": (("input_tokens", "output_tokens", "cache_read_input_tokens"), lambda usage: sse(
        {"type": "message_delta", "delta": {}, "usage": usage}, "message_delta")),
}


def streamed_with(mock, clock, api, events, at, seconds=2):
    """A call whose stream has further events at a place; (what was sent, what came)."""
    replies = []

    def reply(request):
        default = mock.default_reply(request)
        place = len(default.steps) + at if at < 0 else at
        # In one write, so that what follows the last event of a response is read as well.
        body = b"".join((*default.steps[:place], *events, *default.steps[place:]))
        replies.append(replace(default, steps=(body,)))
        clock.pass_s(seconds)
        return replies[0]

    mock.script(reply)
    return replies


def fields_of(api):
    extra = {"stream_options": {"include_usage": True}} if api in ("chat", "completions") else {}
    return {**APIS[api].fields, "stream": True, **extra}


@each("value", MALFORMED)
@pytest.mark.parametrize("api, count", [
    (api, count) for api in STREAMED for count in SECOND_REPORTS[api][0]], ids=str)
def test_malformed_usage_that_comes_late_harms_neither_the_bytes_nor_the_charge(
        mock, proxy, clock, api, count, value):
    before = spent_before(mock, proxy)
    late = SECOND_REPORTS[api][1]({count: value})
    replies = streamed_with(mock, clock, api, [late], 10 ** 6 if api == "responses" else -1)

    answer = call(proxy.port, "POST", APIS[api].path, fields_of(api))

    assert replies[0].body == answer.body
    spent, row = settled_status(proxy)["spent_microdollars"] - before, last_row(proxy)
    input_rate, output_rate = APIS[api].rates
    usage = mock.bills[0][1]
    asked = usage.get("input_tokens", usage.get("prompt_tokens"))
    expected = asked * input_rate + 2 * SPEED * output_rate
    assert expected <= spent < expected + 1
    assert "malformed usage" in row["estimated"]


@each("value", MALFORMED)
@pytest.mark.parametrize("count", ["input_tokens", "cache_read_input_tokens",
                                   "cache_creation_input_tokens"])
def test_malformed_usage_that_comes_first_does_not_harm_what_comes_later(
        mock, proxy, clock, count, value):
    """The last report is whole, but what it belongs to cannot be trusted: it is no exact charge."""
    before = spent_before(mock, proxy)
    first = sse({"type": "message_start", "message": {
        "model": "claude-haiku-4-5", "usage": {count: value}}}, "message_start")
    streamed_with(mock, clock, "messages", [first], 0)

    call(proxy.port, "POST", "/v1/messages", fields_of("messages"))

    spent, row = settled_status(proxy)["spent_microdollars"] - before, last_row(proxy)
    assert mock.billed_microdollars <= spent <= mock.billed_microdollars + 2 * SPEED * 5
    assert "malformed usage" in row["estimated"]


@pytest.mark.parametrize("late, seen", [
    ({"input_tokens": 0, "output_tokens": 60}, (40, 0, 60)),         # the larger of each
    ({"input_tokens": 41, "output_tokens": 0}, (41, 0, 12)),
    ({"input_tokens": 10, "cache_read_input_tokens": 30, "output_tokens": 12}, (10, 30, 12)),
    ({"input_tokens": 10, "cache_read_input_tokens": 29, "output_tokens": 12}, (40, 0, 12)),
    ({"output_tokens": 61}, (40, 0, 61)),
])
def test_of_two_reports_the_larger_input_counts_as_a_set_and_the_larger_output(
        mock, proxy, clock, late, seen):
    mock.input_tokens, mock.output_tokens = 40, 12
    event = sse({"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": late},
                "message_delta")
    streamed_with(mock, clock, "messages", [event], -1)

    call(proxy.port, "POST", "/v1/messages", fields_of("messages"))

    spent, row = settled_status(proxy)["spent_microdollars"], last_row(proxy)
    plain, read, output = seen
    assert -(-(plain * 10 + read + output * 50) // 10) == spent
    assert row["estimated"] is None


def test_a_first_report_of_no_input_is_none(mock, proxy, clock):
    """As of servers that count only at the end: cut before that, the input costs its bound."""
    start = sse({"type": "message_start", "message": {
        "model": "claude-haiku-4-5", "usage": {"input_tokens": 0, "output_tokens": 0}}})
    mock.script(Reply(headers=SSE, framing="chunked", steps=(start, Cut())))

    call(proxy.port, "POST", "/v1/messages", fields_of("messages"))

    settled_status(proxy)
    row = last_row(proxy)
    assert row["bound_microdollars"] - CAP * 5 == row["cost_microdollars"] > 0


def test_usage_beside_the_last_choice_of_a_stream_without_a_done_is_exact(mock, proxy, clock):
    usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
    mock.script(Reply(headers=SSE, framing="chunked", steps=(
        sse({"choices": [{"index": 0, "delta": {"content": "Hel"}, "finish_reason": None}]}),
        sse({"choices": [{"index": 0, "delta": {"content": "lo"}, "finish_reason": "stop"}],
             "usage": usage}))))

    call(proxy.port, "POST", "/v1/chat/completions", fields_of("chat"))

    assert -(-(10 * 15 + 5 * 60) // 100) == settled_status(proxy)["spent_microdollars"]
    assert last_row(proxy)["estimated"] is None


@pytest.mark.parametrize("cut", ["after the first's end", "after the usage"])
def test_usage_is_not_all_while_another_choice_goes_on(mock, proxy, clock, cut):
    """Running usage; two choices, of which one has finished, in a body that seems to end well."""
    usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}

    def chunk(index, text, finish, **more):
        return sse({"choices": [{"index": index, "delta": {"content": text},
                                 "finish_reason": finish}], **more})

    steps = [chunk(0, "a", None), chunk(1, "b", None), chunk(0, "", "stop", usage=usage)]
    if cut == "after the usage":
        steps.append(sse({"choices": [], "usage": usage}))

    def reply(request):
        clock.pass_s(1)
        return Reply(headers=SSE, framing="close", steps=tuple(steps))

    mock.script(reply)
    call(proxy.port, "POST", "/v1/chat/completions", {**fields_of("chat"), "n": 2})

    expected = Fraction(10 * 15, 100) + 2 * SPEED * Fraction(6, 10)
    assert expected <= settled_status(proxy)["spent_microdollars"] < expected + 1


def test_a_translated_stream_is_charged_by_its_last_event_also_without_an_empty_line(
        mock, proxy, clock):
    def reply(request):
        default = mock.default_reply(request)
        return replace(default, steps=(*default.steps[:-2], default.steps[-2].rstrip()))

    mock.script(reply)
    answer = call(proxy.port, "POST", "/v1/messages",
                  {**APIS["messages"].fields, "model": "gpt-4o-mini", "stream": True})

    assert b"event: error" not in answer.body
    assert answer.body.endswith(b'event: message_stop\ndata: {"type":"message_stop"}\n\n')
    assert mock.billed_microdollars == settled_status(proxy)["spent_microdollars"]
    assert last_row(proxy)["estimated"] is None


# Tools that loop at the provider.

FEES = 30_000                               # microdollars, of all uses that are admitted


@pytest.fixture
def looping(monkeypatch):
    """Every call has a tool that makes the provider run the model several times."""
    router = program().Router
    bound_of = router._bound

    def looping_bound(*args):
        bound = bound_of(*args)
        return bound._replace(levels=tuple(level._replace(
            samplings=2, fees_picodollars=FEES * 10 ** 6) for level in bound.levels))

    monkeypatch.setattr(router, "_bound", looping_bound)


START = sse({"type": "message_start", "message": {"model": "claude-haiku-4-5", "usage": {
    "input_tokens": 24, "output_tokens": 1}}}, "message_start")
TEXT = sse({"type": "content_block_delta", "index": 0, "delta": {
    "type": "text_delta", "text": "found"}}, "content_block_delta")


def delta(stop_reason, **usage):
    return sse({"type": "message_delta", "delta": {"stop_reason": stop_reason}, "usage": usage},
               "message_delta")


END = sse({"type": "message_stop"}, "message_stop")


@pytest.mark.parametrize("events, counted", [
    ((START, TEXT), None),
    ((START, delta(None, input_tokens=40, output_tokens=9), TEXT), None),
    ((START, TEXT, delta("end_turn", output_tokens=9), END), None),
    ((START, TEXT, delta("end_turn", input_tokens=0, output_tokens=9), END), None),
    ((START, TEXT, delta("end_turn", input_tokens=-1, output_tokens=9), END), None),
    ((START, delta(None, input_tokens=30, output_tokens=9),
      delta("end_turn", input_tokens=True, output_tokens=9), END), None),
    ((START, TEXT, delta("end_turn", input_tokens=45, output_tokens=9)), "exact"),
    ((START, TEXT, delta("end_turn", input_tokens=45, output_tokens=9), END), "exact"),
    ((START, TEXT, delta("end_turn", input_tokens=45, output_tokens=-9), END), 45),
    ((START, TEXT, delta("end_turn", input_tokens=45, output_tokens=9), TEXT), 45),
])
def test_early_usage_of_a_call_that_loops_is_not_its_input(
        mock, proxy, clock, looping, events, counted):
    def reply(request):
        clock.pass_s(1)
        return Reply(headers=SSE, framing="chunked", steps=(*events, Close()))

    mock.script(reply)
    call(proxy.port, "POST", "/v1/messages", fields_of("messages"))

    spent, row = settled_status(proxy)["spent_microdollars"], last_row(proxy)
    input_bound = row["bound_microdollars"] - CAP * 5 - FEES
    expected = {"exact": 45 + 9 * 5, 45: 45 + SPEED * 5,
                None: input_bound + FEES + SPEED * 5}[counted]
    assert expected == spent
    assert (counted == "exact") == (row["estimated"] is None)


def test_a_response_that_loops_counts_from_its_completed_event(mock, proxy, clock, looping):
    call(proxy.port, "POST", "/v1/responses", fields_of("responses"))
    exact = settled_status(proxy)["spent_microdollars"]
    mock.script(lambda request: begun(9, Close())("responses", mock.default_reply(request)))
    call(proxy.port, "POST", "/v1/responses", fields_of("responses"))

    assert mock.bills[0][2] == exact
    assert settled_status(proxy)["spent_microdollars"] - exact > FEES


# Speeds, and several choices.

@pytest.mark.parametrize("provider, fields, speed", [
    ({}, {}, 1_000), ({}, {"service_tier": "auto"}, 1_000), ({}, {"service_tier": 5}, 1_000),
    ({}, {"service_tier": "flex"}, 1_000), ({}, {"service_tier": "priority"}, 2_500),
    ({}, {"service_tier": "fast"}, 2_500), ({}, {"service_tier": "ultrafast"}, 8_000),
    ({}, {"speed": "fast"}, 2_500), ({"default_service_tier": "priority"}, {}, 2_500),
    ({"name": "cerebras"}, {}, 4_000), ({"name": "groq"}, {}, 2_000),
    ({"name": "sambanova"}, {}, 3_000), ({"name": "openrouter"}, {}, 4_000),
    ({"name": "mine", "base_url": "https://api.cerebras.ai"}, {}, 4_000),
    ({"name": "groq"}, {"service_tier": "ultrafast"}, 8_000),
    ({"name": "cerebras", "max_output_tokens_per_s": 70}, {"service_tier": "fast"}, 70),
    ({"max_output_tokens_per_s": 90_000}, {}, 90_000),
])
def test_the_speed_that_is_assumed_is_the_most_of_provider_and_tier(provider, fields, speed):
    module = program()
    body = module.parse_json_object(json.dumps({"model": "m", **fields}).encode())
    given = {"name": "lab", "format": "openai", "base_url": "https://lab.example", **provider}

    assert speed == module.tokens_per_s(
        module.Call(None, module.Provider(**given), "chat", "m", body))


def test_the_tier_that_served_counts_as_well(mock, proxy, clock):
    chunk = sse({"service_tier": "priority", "choices": [{"index": 0, "delta": {"content": "x"}}]})

    def reply(request):
        clock.pass_s(1)
        return Reply(headers=SSE, framing="chunked", steps=(chunk, Close()))

    mock.script(reply)
    call(proxy.port, "POST", "/v1/chat/completions", {**fields_of("chat"), "model": "gpt-4o-mini"})

    settled_status(proxy)
    row = last_row(proxy)
    output = row["cost_microdollars"] - (row["bound_microdollars"] - CAP * Fraction(6, 10))
    assert abs(output - 2_500 * Fraction(6, 10)) <= 1


@pytest.mark.parametrize("api, more, choices", [
    ("chat", {"n": 3}, 3), ("completions", {"best_of": 4}, 4),
    ("completions", {"prompt": ["a", "b"], "n": 2}, 4)])
def test_each_choice_makes_tokens_at_that_speed(mock, proxy, clock, api, more, choices):
    def reply(request):
        clock.pass_s(1)
        return Reply(answers=False)

    mock.script(reply)
    call(proxy.port, "POST", APIS[api].path, {**APIS[api].fields, **more})

    settled_status(proxy)
    row = last_row(proxy)
    unused = (CAP - SPEED) * choices * APIS[api].rates[1]
    assert abs(row["bound_microdollars"] - unused - row["cost_microdollars"]) <= 1


# What a bad day costs.

def test_a_bad_day_of_codex_costs_what_it_used(mock, proxy_for):
    """One stream is cut, Codex tries again, and goes on. Seen: $0.64 charged of $0.43 billed."""
    proxy = proxy_for("--budget", "3")
    fields = {"model": "gpt-5.5", "stream": True, "instructions": "Be a good agent. " * 2_000,
              "input": "word and word. " * 1_500}
    mock.script(lambda request: begun(8, Cut())("responses", mock.default_reply(request)))

    statuses = [call(proxy.port, "POST", "/v1/responses", fields).status for _ in range(6)]

    spent = settled_status(proxy)["spent_microdollars"]
    assert [200] * 6 == statuses
    assert mock.billed_microdollars <= spent <= max(2 * mock.billed_microdollars,
                                                    mock.billed_microdollars + 100_000)


def test_a_cut_and_a_good_retry_of_claude_code_cost_two_calls(mock, proxy_for):
    """Seen: $0.208 charged of $0.208 billed; $1.55 before this rule."""
    proxy = proxy_for("--budget", "3")
    fields = {"model": "claude-sonnet-4-5", "max_tokens": 32_000, "stream": True,
              "system": [{"type": "text", "text": "Be a good agent. " * 4_000,
                          "cache_control": {"type": "ephemeral"}}],
              "messages": HELLO}
    mock.cache_write_tokens = 14_000
    mock.script(lambda request: begun(8, Cut())("messages", mock.default_reply(request)))

    statuses = [call(proxy.port, "POST", "/v1/messages", fields).status for _ in range(2)]

    spent = settled_status(proxy)["spent_microdollars"]
    assert [200, 200] == statuses
    assert mock.billed_microdollars <= spent <= max(2 * mock.billed_microdollars,
                                                    mock.billed_microdollars + 100_000)


@pytest.mark.parametrize("shown", [0, 1, 2])
def test_four_overloaded_errors_in_a_row_leave_the_budget(mock, proxy_for, shown):
    proxy = proxy_for("--budget", "3")
    fields = {"model": "claude-sonnet-4-5", "max_tokens": 64_000, "stream": True,
              "messages": HELLO}
    mock.script(*[lambda request: erring(shown)("messages", mock.default_reply(request))] * 4)

    answers = [call(proxy.port, "POST", "/v1/messages", fields) for _ in range(4)]

    spent = settled_status(proxy)["spent_microdollars"]
    assert all(b"overloaded_error" in answer.body for answer in answers)
    assert mock.billed_microdollars <= spent <= max(2 * mock.billed_microdollars,
                                                    mock.billed_microdollars + 100_000)


# Any end at all.

@pytest.mark.parametrize("seed", seeds(15, 40))
def test_no_random_end_costs_less_than_was_billed_or_more_than_was_reserved(
        mock, proxy, clock, seed):
    """By mocks that make up to a thousand tokens a second, most of them unseen."""
    rng, charged = Random(seed), 0
    for _ in range(6):
        api = rng.choice([*APIS])
        row, is_stream = APIS[api], APIS[api].streams and rng.random() < 0.7
        fields = {**row.fields, **({"stream": True} if is_stream else {})}
        if api == "chat":
            fields["n"] = rng.randint(1, 3)
        seconds = rng.choice([0, 0.01, 0.5, 3, 9, 12, 100])
        mock.reasoning_tokens = max(0, int(seconds * rng.randint(1, SPEED)) - 20)
        mock.cached_tokens = rng.choice([0, 5])
        ends = [begun(rng.randrange(20), rng.choice([Cut(), Close()])), begun(rng.randrange(20), *CLEANLY),
                erring(rng.randrange(6, 20)), edited(lambda usage: rng.choice([None, "x", {}])),
                edited(lambda usage: {**usage, rng.choice([*usage]): rng.choice(MALFORMED)}),
                lambda api, default: default]
        end = rng.choice(ends)

        def reply(request):
            clock.pass_s(seconds)
            return end(api, mock.default_reply(request))

        mock.script(reply)
        before, billed = charged, mock.billed_microdollars
        call(proxy.port, "POST", row.path, fields)

        charged = settled_status(proxy)["spent_microdollars"]
        reserved = last_row(proxy)["bound_microdollars"]
        assert mock.billed_microdollars - billed <= charged - before <= reserved


# The provider's side.

@pytest.mark.parametrize("ending", [Cut(), Close()], ids=["reset", "closed"])
def test_a_stream_that_breaks_ends_with_an_error_event(mock, proxy, stream, ending):
    path, fields = stream
    mock.script(lambda request: replace(
        mock.default_reply(request), steps=(*mock.default_reply(request).steps[:4], ending)))

    answer = call(proxy.port, "POST", path, fields)

    assert "broke" in error_of(sse_events(answer.body), path)["message"]
    assert 0 < mock.billed_microdollars <= settled_status(proxy)["spent_microdollars"]


def test_a_stream_that_ends_without_its_last_event_is_a_broken_stream(mock, proxy, stream):
    path, fields = stream
    last = 3 if "chat" in path else 2          # a finish_reason and a clean end are an end
    mock.script(lambda request: mock.default_reply(request).with_steps(
        mock.default_reply(request).steps[:-last]))

    answer = call(proxy.port, "POST", path, fields)

    assert "without its last event" in error_of(sse_events(answer.body), path)["message"]


def test_an_error_inside_a_stream_passes_as_it_is_and_counts_as_a_failure(mock, proxy, stream):
    path, fields = stream
    error = {"error": {"type": "overloaded_error", "message": "Overloaded"}}
    event = sse(error) if path == "/v1/chat/completions" else sse({"type": "error", **error},
                                                                  "error")
    mock.script(lambda request: mock.default_reply(request).with_steps(
        [*mock.default_reply(request).steps[:2], event]))

    answer = call(proxy.port, "POST", path, fields)

    assert answer.body.endswith(event)
    assert 1 == settled_status(proxy)["failed_requests"]


@pytest.mark.parametrize("reply, status, code", [
    (Reply(answers=False), 502, "upstream_broke"),
    (Reply(framing="chunked", steps=(Cut(),)), 502, "upstream_broke"),
    (Reply(framing="chunked", steps=(b'{"usage"', Close())), 502, "upstream_broke"),
    (Reply(framing="chunked", steps=(Raw(b"zz\r\n"), Hang())), 502, "upstream_broke"),
    (Reply(framing="chunked", steps=(Hang(),)), 504, "upstream_timeout"),
], ids=["no answer", "reset", "cut", "malformed", "silent"])
def test_a_call_that_was_sent_and_not_answered_is_an_error(mock, proxy_for, reply, status, code):
    proxy = proxy_for("--budget", "1", timeouts={"first_byte_s": 0.3, "between_bytes_s": 0.3})
    mock.script(reply)

    answer = call(proxy.port, "POST", "/v1/chat/completions", {**CHAT, "stream": False})

    assert (status, code) == (answer.status, answer.json["error"]["code"])
    assert settled_status(proxy)["spent_microdollars"] > 0


def test_an_answer_that_is_too_long_is_forwarded_unread_and_charged_for_what_was_reserved(
        mock, proxy, monkeypatch):
    monkeypatch.setattr(program(), "MAX_ANSWER_BYTES", 10_000)
    mock.script(Reply(framing="chunked", steps=(b"x" * 6_000, b"y" * 6_000, b"z" * 6_000)))

    answer = call(proxy.port, "POST", "/v1/chat/completions", {**CHAT, "stream": False})

    assert (200, b"x" * 6_000 + b"y" * 6_000 + b"z" * 6_000) == (answer.status, answer.body)
    settled_status(proxy)
    row = last_row(proxy)
    assert (row["bound_microdollars"], "no usage in the answer") == (
        row["cost_microdollars"], row["estimated"])


def test_an_error_after_the_end_of_a_stream_changes_nothing(mock, proxy, stream):
    """The last event is there; that the connection then breaks is nobody's loss."""
    path, fields = stream
    mock.script(lambda request: replace(mock.default_reply(request), steps=(
        *mock.default_reply(request).steps, Cut())))

    answer = call(proxy.port, "POST", path, fields)

    assert mock.default_reply(mock.seen[0]).steps[-1] == answer.body[
        -len(mock.default_reply(mock.seen[0]).steps[-1]):]
    settled_status(proxy)
    assert last_row(proxy)["estimated"] is None


def test_a_fault_of_ours_in_the_charge_costs_the_reservation_and_is_in_the_ledger(
        mock, proxy, monkeypatch):
    monkeypatch.setattr(program(), "charge_of", lambda *args: 1 / 0)

    answer = call(proxy.port, "POST", "/v1/chat/completions", {**CHAT, "stream": False})

    assert (500, "internal_error") == (answer.status, answer.json["error"]["code"])
    spent, row = settled_status(proxy)["spent_microdollars"], last_row(proxy)
    assert row["bound_microdollars"] == row["cost_microdollars"] == spent > 0
    assert "a fault of the proxy" == row["estimated"]


def test_a_stream_that_falls_silent_is_given_up(mock, proxy_for, stream):
    path, fields = stream
    proxy = proxy_for("--budget", "1", timeouts={"between_bytes_s": 0.2})
    mock.script(lambda request: mock.default_reply(request).with_steps(
        [*mock.default_reply(request).steps[:3], Hang()]))

    answer = call(proxy.port, "POST", path, fields)

    assert "in time" in error_of(sse_events(answer.body), path)["message"]
    mock.wait_for_hang_ups()
    assert settled_status(proxy)["spent_microdollars"] > 0


def test_a_provider_that_cannot_be_reached_costs_nothing(mock, proxy):
    mock.refuse_connections()

    answer = call(proxy.port, "POST", "/v1/chat/completions", CHAT)

    assert (502, "upstream_unreachable") == (answer.status, answer.json["error"]["code"])
    assert 0 == settled_status(proxy)["spent_microdollars"]


def test_a_provider_that_never_accepts_is_a_timeout_and_costs_nothing(mock, proxy_for):
    full = socket.socket()                       # a backlog that is full: connects hang
    full.bind(("127.0.0.1", 0))
    full.listen(0)
    fillers = [socket.socket() for _ in range(3)]
    for filler in fillers:
        filler.setblocking(False)
        filler.connect_ex(full.getsockname())
    proxy = proxy_for("--budget", "1", timeouts={"connect_s": 0.3}, environ={
        "OPENAI_API_KEY": "sk-x",
        "IRONCAGE_OPENAI_BASE_URL": f"http://127.0.0.1:{full.getsockname()[1]}"})

    answer = call(proxy.port, "POST", "/v1/chat/completions", CHAT)

    assert (504, "upstream_timeout") == (answer.status, answer.json["error"]["code"])
    assert 0 == settled_status(proxy)["spent_microdollars"]
    for sock in (*fillers, full):
        sock.close()


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed_and_costs_nothing(mock, proxy, status):
    with MockProvider() as elsewhere:
        mock.script(Reply(status, (("location", elsewhere.url + "/v1/chat/completions"),)))

        answer = call(proxy.port, "POST", "/v1/chat/completions", CHAT)

        assert 502 == answer.status
        assert [] == elsewhere.seen
    assert 0 == settled_status(proxy)["spent_microdollars"]


def test_a_post_is_never_sent_twice(mock, proxy):
    """A pooled connection that dies after the request was written is not tried again."""
    call(proxy.port, "POST", "/v1/chat/completions", CHAT)
    mock.script(Reply(answers=False))

    answer = call(proxy.port, "POST", "/v1/chat/completions", CHAT)

    assert 502 == answer.status
    assert 2 == len(mock.seen)


def test_a_post_of_which_a_part_was_sent_is_never_sent_again(proxy_for):
    """The pooled connection is reset while it is written to: some of it was read, and may count."""
    listener, accepted = socket.create_server(("127.0.0.1", 0)), []
    answer = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"

    def serve():
        with contextlib.suppress(OSError):                      # closed at the end
            while True:
                sock, _ = listener.accept()
                accepted.append(sock)
                request = b""
                while not request.endswith(b"}"):
                    request += sock.recv(65536)
                sock.sendall(answer)
                sock.recv(1024)                                 # of the next request
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                sock.close()

    server = threading.Thread(target=serve, name="mock-reset", daemon=True)
    server.start()
    proxy = proxy_for(environ={"OPENAI_API_KEY": OPENAI_KEY, "IRONCAGE_OPENAI_BASE_URL":
                               f"http://127.0.0.1:{listener.getsockname()[1]}"})
    large = {"model": "gpt-x", "messages": [{"role": "user", "content": "x" * (16 << 20)}]}

    statuses = [call(proxy.port, "POST", "/v1/chat/completions", fields).status
                for fields in ({**CHAT, "model": "gpt-x"}, large)]
    listener.close()

    assert ([200, 502], 1) == (statuses, len(accepted))


def test_an_exception_of_our_own_settles_and_answers_500(mock, proxy, monkeypatch):
    monkeypatch.setattr(program(), "answer_headers", lambda headers: 1 / 0)

    answer = call(proxy.port, "POST", "/v1/chat/completions", CHAT)

    assert (500, "internal_error") == (answer.status, answer.json["error"]["code"])
    status = settled_status(proxy)
    assert status["spent_microdollars"] > 0


# What a translator does wrong, where.
FAULTS = {"the request": ("_ChatRequest", "request", False),
          "the whole answer": ("MessagesWriter", "whole", False),
          "the first event of a stream": ("_ChunkReader", "read", True),
          "an event of a stream": ("MessagesWriter", "_delta", True)}


@pytest.mark.parametrize("where", FAULTS)
def test_a_fault_of_a_translator_is_ours_and_not_the_clients(
        mock, proxy, monkeypatch, caplog, where):
    """It was a 400 that blamed the request, without a trace."""
    name, method, streams = FAULTS[where]

    def fails(*args, **named):
        raise KeyError("tools")

    monkeypatch.setattr(getattr(program(), name), method, fails)
    fields = {**APIS["messages"].fields, "model": "gpt-4o-mini", "stream": streams}
    if where == "an event of a stream":
        with pytest.raises((EOFError, ConnectionError, ValueError)):       # cut: it never looks complete
            call(proxy.port, "POST", "/v1/messages", fields)
    else:
        answer = call(proxy.port, "POST", "/v1/messages", fields)
        assert (500, "api_error") == (answer.status, answer.json["error"]["type"])

    status = settled_status(proxy)
    assert [KeyError] == [record.exc_info[0] for record in caplog.records if record.exc_info]
    assert (status["spent_microdollars"] > 0) == bool(mock.seen)
    assert mock.billed_microdollars <= status["spent_microdollars"]


# The client's side.

def leave_in_mid_stream(proxy, mock, path, fields, steps_seen, before_leaving=lambda: None):
    """A client that hangs up after so many steps while the provider goes on; the charge."""
    gate = Gate()

    def reply(request):
        default = mock.default_reply(request)
        steps = [*default.steps[:steps_seen], gate, *default.steps[steps_seen:]]
        tokens = [*default.tokens_by_step[:steps_seen],
                  default.tokens_by_step[min(steps_seen, len(default.tokens_by_step)) - 1]]
        return replace(default, steps=tuple(steps), tokens_by_step=tuple(tokens))

    mock.script(reply)
    with RawClient(proxy.port) as client:
        client.request("POST", path, json.dumps(fields).encode())
        client.read_head()
        for _ in range(steps_seen):
            client.read_chunk()
        before_leaving()
        client.leave()
    mock.wait_for_hang_ups()
    gate.event.set()
    return settled_status(proxy)


@pytest.mark.parametrize("hidden", [0, 50])
@pytest.mark.parametrize("steps_seen", [1, 4, 9])
def test_a_client_that_leaves_in_mid_stream_ends_the_call_and_pays_for_it(
        mock, proxy_for, stream, steps_seen, hidden):
    """The charge covers hidden and read-ahead tokens, and stays within the reservation."""
    path, fields = stream
    proxy = proxy_for("--budget", "1")
    proxy.router.providers = {name: provider._replace(max_output_tokens_per_s=10 ** 9)
                              for name, provider in proxy.router.providers.items()}
    mock.reasoning_tokens = mock.read_ahead_tokens = hidden

    status = leave_in_mid_stream(proxy, mock, path, fields, steps_seen)

    assert 0 == status["reserved_microdollars"]
    assert 0 < mock.billed_microdollars <= status["spent_microdollars"]
    assert 1 == status["by_provider"][
        "anthropic" if path == "/v1/messages" else "openai"]["estimated_requests"]


@pytest.mark.parametrize("seconds", [0, 0.05, 2, 60])
def test_a_client_that_leaves_pays_for_what_was_seen_or_can_have_been_made(
        mock, proxy, clock, stream, seconds):
    path, fields = stream
    api = next(name for name, row in APIS.items() if row.path == path)

    status = leave_in_mid_stream(proxy, mock, path, {**fields, **APIS[api].fields}, 9,
                                 lambda: clock.pass_s(seconds))

    row = last_row(proxy)
    input_rate, output_rate = APIS[api].rates
    default = mock.default_reply(mock.seen[0])
    seen = output_seen(api, replace(default, steps=default.steps[:9]))
    input_cost = default.bills[1]["input_tokens"] * input_rate if api == "messages" \
        else row["bound_microdollars"] - CAP * output_rate
    expected = input_cost + min(CAP, max(seen, seconds * SPEED)) * output_rate
    assert expected - 1 < status["spent_microdollars"] < expected + 1
    assert GONE == row["estimated"]


def test_a_client_that_leaves_early_does_not_pay_for_the_whole_reservation(mock, proxy_for):
    path, fields = "/v1/messages", {**PATHS["/v1/messages"], "max_tokens": 60_000}
    proxy = proxy_for("--budget", "10")

    status = leave_in_mid_stream(proxy, mock, path, fields, 5)

    assert mock.billed_microdollars <= status["spent_microdollars"] < 60_000 * 5 / 2


def test_exact_usage_wins_when_it_came_before_the_client_left(mock, proxy):
    def reply(request):
        default = mock.default_reply(request)
        tokens = [*default.tokens_by_step, *[default.bills[1]["output_tokens"]] * 9]
        return replace(default, steps=(*default.steps[:-1], Gate(), default.steps[-1]),
                       tokens_by_step=tuple(tokens))

    mock.script(reply)
    with RawClient(proxy.port) as client:
        client.request("POST", "/v1/messages", json.dumps(PATHS["/v1/messages"]).encode())
        client.read_head()
        while b"message_delta" not in client.read_chunk():
            pass
        client.leave()
    mock.wait_for_hang_ups()

    assert mock.billed_microdollars == settled_status(proxy)["spent_microdollars"]


def test_a_client_that_leaves_while_a_stream_is_awaited_ends_the_call(mock, proxy, stream):
    path, fields = stream
    mock.script(Reply(headers=SSE, framing="chunked", steps=(Hang(),)))
    with RawClient(proxy.port) as client:
        client.request("POST", path, json.dumps(fields).encode())
        mock.wait_for_requests(1)

    mock.wait_for_hang_ups()
    assert settled_status(proxy)["spent_microdollars"] > 0


def test_a_client_that_leaves_a_whole_answer_pays_exactly(mock, proxy):
    """The answer is still read, so that its usage is known."""
    gate = Gate()
    mock.script(lambda request: replace(
        mock.default_reply(request), steps=(gate, *mock.default_reply(request).steps)))
    with RawClient(proxy.port) as client:
        client.request("POST", "/v1/chat/completions",
                       json.dumps({**CHAT, "stream": False}).encode())
        mock.wait_for_requests(1)
    gate.event.set()

    status = settled_status(proxy)
    assert mock.billed_microdollars == status["spent_microdollars"] > 0
    assert 0 == status["by_provider"]["openai"]["estimated_requests"]


def test_a_client_that_does_not_read_its_stream_is_gone_after_a_while(mock, proxy_for):
    proxy = proxy_for("--budget", "1", timeouts={"write_stall_s": 0.2})
    flood = sse({"choices": [{"delta": {"content": "x" * 60_000}}]})
    mock.script(Reply(headers=SSE, framing="chunked", steps=(flood,) * 1000))
    with RawClient(proxy.port) as client:
        client.request("POST", "/v1/chat/completions", json.dumps(CHAT).encode())
        mock.wait_for_hang_ups()

        assert settled_status(proxy)["spent_microdollars"] > 0


# Every offset.

def test_a_stream_cut_by_the_provider_at_many_offsets_settles_once_each_time(mock, proxy, stream):
    path, fields = stream
    request = None
    call(proxy.port, "POST", path, fields)
    request = mock.seen[0]
    whole = mock.default_reply(request).body
    mock.bills.clear()
    offsets = range(0, len(whole), max(1, len(whole) // 25))
    spent = settled_status(proxy)["spent_microdollars"]
    for offset in offsets:
        mock.script(Reply(headers=SSE, framing="chunked", steps=(whole[:offset] or Raw(b""),
                                                                 Close())))

        answer = call(proxy.port, "POST", path, fields)

        assert 200 == answer.status
        now = settled_status(proxy)
        assert now["spent_microdollars"] > spent, f"cut at {offset}"
        spent = now["spent_microdollars"]
        assert b"error" in answer.body or b"[DONE]" in answer.body or b"message_stop" \
            in answer.body or b"response.completed" in answer.body


# Stopping.

def test_stop_lets_requests_in_flight_finish_and_settles_them(mock):
    proxy = start_proxy(mock, "--budget", "1")
    gate = Gate()
    mock.script(lambda request: mock.default_reply(request).with_steps(
        [mock.default_reply(request).steps[0], gate, *mock.default_reply(request).steps[1:]]))
    with RawClient(proxy.port) as client, RawClient(proxy.port) as idle:
        client.request("POST", "/v1/chat/completions", json.dumps(CHAT).encode())
        client.read_head()
        client.read_chunk()
        stopping = threading.Thread(target=proxy.stop)
        stopping.start()
        assert idle.is_closed_by_server()
        gate.event.set()
        rest = b"".join(iter(client.read_chunk, b""))
        stopping.join(PATIENCE_S)

    assert rest.endswith(b"data: [DONE]\n\n")
    assert not stopping.is_alive()
    assert (mock.billed_microdollars, 0) == proxy.router.controller.get_full_status()[:2]


@pytest.mark.parametrize("is_stream", [True, False])
def test_stop_cuts_what_does_not_finish_and_settles_it(mock, is_stream):
    proxy = start_proxy(mock, "--budget", "1", timeouts={"drain_s": 0.1})
    mock.script(Reply(headers=SSE, framing="chunked", steps=(Hang(),)))
    with RawClient(proxy.port) as client:
        client.request("POST", "/v1/chat/completions",
                       json.dumps({**CHAT, "stream": is_stream}).encode())
        mock.wait_for_requests(1)

        proxy.stop()

        spent, reserved, _ = proxy.router.controller.get_full_status()
        assert spent > 0 == reserved


def test_new_connections_are_refused_while_stopping(mock):
    proxy = start_proxy(mock)
    port = proxy.port
    proxy.stop()

    with pytest.raises(ConnectionRefusedError):
        RawClient(port)


def test_a_client_that_reads_by_drops_does_not_hold_a_call_for_ever(mock, proxy_for, monkeypatch):
    """It makes progress before every stall, but more slowly than anybody has to wait for."""
    monkeypatch.setattr(program(), "LEAST_BYTES_PER_S", 100_000_000)
    proxy = proxy_for("--budget", "1", timeouts={"write_stall_s": 0.1})
    mock.always = Reply(200, (("content-type", "application/json"),), (
        json.dumps({"usage": {"prompt_tokens": 1, "completion_tokens": 1},
                    "junk": "x" * 15_000_000}).encode(),))
    with RawClient(proxy.port) as client:
        client.request("POST", "/v1/chat/completions", json.dumps(CHAT).encode())
        read = 0
        with contextlib.suppress(OSError):
            while "it reads":
                slowly = read < 100_000
                data = client.sock.recv(1_000 if slowly else 1_000_000)
                read += len(data)
                if not data:
                    break
                pause(0.005 if slowly else 0, "it reads slowly")

    assert 100_000 <= read < 15_000_000
    assert 0 == settled_status(proxy)["reserved_microdollars"]


def test_a_stream_does_not_outlive_the_longest_call(mock, proxy_for):
    """Though bytes keep coming: each wait is short, the whole is bounded."""
    proxy = proxy_for("--budget", "1", timeouts={"call_s": 0.5})
    chunk = sse({"id": "c", "choices": [{"index": 0, "delta": {"content": "x"}}]})
    mock.always = Reply(200, (("content-type", "text/event-stream"),),
                        tuple(itertools.repeat(chunk, 400_000)), framing="chunked")

    answer = call(proxy.port, "POST", "/v1/chat/completions", {**CHAT, "stream": True})

    assert b"upstream_timeout" in answer.body[-300:]
    assert 0 == settled_status(proxy)["reserved_microdollars"]


def test_after_the_cut_no_call_begins(proxy):
    """Not one either that this process could answer."""
    proxy.router.shut_down()

    answer = call(proxy.port, "POST", "/v1/chat/completions", {**CHAT, "model": "ironcage/echo"})

    assert (503, 0) == (answer.status, settled_status(proxy)["requests"])
