"""Event streams, and the usage of answers: a stream cut anywhere gives the same events and loses no byte; what an answer
says of its usage is read by each API's own rules, whole or streamed; and hiding usage from a client
that did not ask for it changes nothing else."""
from __future__ import annotations

import gzip
import json
import zlib
from random import Random
from typing import Optional

import pytest

import ironcage_proxy as ic
from support import each_seed

APIS = ("chat", "completions", "responses", "messages", "embeddings")


def spec_events(stream: bytes) -> list[tuple[str, bytes]]:
    """(event name, data) of each event: the WHATWG algorithm (9.2.6), step by step."""
    lines, line, after_cr = [], b"", False
    for number in stream:
        byte = bytes([number])
        if byte == b"\n" and after_cr:
            after_cr = False
        elif byte in b"\r\n":
            lines.append(line)
            line, after_cr = b"", byte == b"\r"
        else:
            line, after_cr = line + byte, False
    events, name, data = [], b"", b""
    for line in lines:
        field, _, value = line.partition(b":")
        value = value[1:] if value.startswith(b" ") else value
        if not line:
            if data:
                events.append((name.decode(), data[:-1]))
            name, data = b"", b""
        elif field == b"event":
            name = value
        elif field == b"data":
            data += value + b"\n"
    return events


def split(reads: list[bytes]) -> tuple[list[bytes], bytes]:
    """(events, rest) of a stream that comes in these reads."""
    splitter = ic.EventSplitter()
    events = [event for read in reads for event in splitter.feed(read)]
    return events, splitter.rest


SAMPLE = (
    ': a comment\n'
    'event: first\n'
    'data: {"text":"Grüße 日本 🐤 \u2028"}\n'
    '\n'
    'data:no space\n'
    'data:  two spaces\n'
    'id: 7\n'
    '\n'
    '\n'
    ': only a comment\n'
    '\n'
    'data: [DONE]\n'
    '\n'
    'data: cut o').encode()
STREAMS = {
    "LF": SAMPLE, "CRLF": SAMPLE.replace(b"\n", b"\r\n"), "CR": SAMPLE.replace(b"\n", b"\r"),
    "mixed": SAMPLE.replace(b"\n\n", b"\n\r\n").replace(b"t\n", b"t\r").replace(b"]\n", b"]\r\n"),
    "line ends only": b"\n\r\r\n\n\r\n\r\n\r\r\n\n\n",
    "nothing": b"",
}


# Cutting.

@pytest.mark.parametrize("stream", STREAMS.values(), ids=STREAMS)
def test_a_stream_cut_in_two_anywhere_gives_the_same_events(stream):
    expected = split([stream])

    cut = [split([stream[:at], stream[at:]]) for at in range(len(stream) + 1)]

    assert [expected] * (len(stream) + 1) == cut


@pytest.mark.parametrize("stream", STREAMS.values(), ids=STREAMS)
def test_a_stream_that_comes_byte_by_byte_gives_the_same_events(stream):
    assert split([stream]) == split([stream[at:at + 1] for at in range(len(stream))])


@pytest.mark.parametrize("name", ["LF", "CRLF", "CR", "mixed"])
def test_events_have_the_data_that_the_specification_says(name):
    events, rest = split([STREAMS[name]])

    data = [data for data in map(ic.event_data, events) if data]

    assert ['{"text":"Grüße 日本 🐤 \u2028"}'.encode(), b"no space\n two spaces", b"[DONE]"] == data
    assert [data for _, data in spec_events(STREAMS[name])] == data
    assert rest.endswith(b"data: cut o")


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_an_event_is_told_as_soon_as_its_empty_line_is_sure(end):
    """A CR may yet become a CRLF, so that its event waits for one more byte."""
    event = b"data: x" + end + end
    splitter = ic.EventSplitter()

    told = [splitter.feed(event[at:at + 1]) for at in range(len(event))]
    late = splitter.feed(b"d")

    if end == b"\r":
        assert ([[]] * len(event), [event]) == (told, late)
    else:
        assert ([[]] * (len(event) - 1) + [[event]], []) == (told, late)


def random_stream(rng: Random) -> bytes:
    """Lines of all kinds, with any line ends, well-formed or not."""
    lines = [b"data: x", b"data:", b"data: {\"a\":1}", b": comment", b"event: e", b"", b"", b"id",
             "data: é日🐤".encode(), b"\xff\xfe", b"data: \x00", b" data: y"]
    return b"".join(rng.choice(lines) + rng.choice([b"\n", b"\r", b"\r\n"])
                    for _ in range(rng.randrange(30)))


def random_reads(rng: Random, stream: bytes) -> list[bytes]:
    cuts = sorted(rng.randrange(len(stream) + 1) for _ in range(rng.randrange(12)))
    return [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)])]


@each_seed(300)
def test_random_streams_lose_no_byte_and_do_not_depend_on_their_reads(seed):
    rng = Random(seed)
    for stream in (random_stream(rng), bytes(rng.choices(b"\r\n\nda: ", k=rng.randrange(40)))):
        expected = split([stream])

        events, rest = split(random_reads(rng, stream))

        assert stream == b"".join(events) + rest
        assert expected == (events, rest)


@each_seed(300)
def test_random_streams_have_the_data_that_the_specification_says(seed):
    """All line ends, and data that is not empty: an empty event tells nothing to a meter."""
    rng = Random(seed)
    stream = b"".join(
        line + rng.choice([b"\n", b"\r", b"\r\n"]) for _ in range(rng.randrange(20))
        for line in rng.choice([[b"data: x", b""], [b"data: x", b"data:y", b""], [b""],
                                [b": c", b""], [b"event: e", "data: é".encode(), b""]]))

    events, rest = split([stream, b"data: end\n\n"])

    assert [data for _, data in spec_events(stream + b"data: end\n\n")] == [
        data for data in map(ic.event_data, events) if data]
    assert b"" == rest


def test_an_event_that_grows_beyond_the_limit_breaks_the_stream(monkeypatch):
    monkeypatch.setattr(ic, "MAX_EVENT_BYTES", 100)
    splitter = ic.EventSplitter()
    splitter.feed(b"data: " + b"x" * 94)

    with pytest.raises(ic.UpstreamBroke, match="an event of more than 100 bytes"):
        splitter.feed(b"x")


def test_many_events_in_one_read_may_be_longer_than_the_limit_together(monkeypatch):
    monkeypatch.setattr(ic, "MAX_EVENT_BYTES", 100)

    events, rest = split([b"data: x\n\n" * 100 + b"data: y"])

    assert (100, b"data: y") == (len(events), rest)


@pytest.mark.parametrize("event, data", [
    (b"data: x\n\n", b"x"), (b"data:x\n\n", b"x"), (b"data:  x\n\n", b" x"), (b"data: \n\n", b""),
    (b"data: x", b"x"), (b"data: x\r\n\r\n", b"x"), (b"data: x\r\r", b"x"),
    (b"data: a\ndata: b\n\n", b"a\nb"), (b"data: a\r\ndata:\r\ndata: c\r\n\r\n", b"a\n\nc"),
    (b"event: e\ndata: x\nid: 1\nretry: 5\n\n", b"x"), (b": data: x\n\n", b""),
    (b" data: x\n\n", b""), (b"Data: x\n\n", b""), (b"database: x\n\n", b""), (b"\n\n", b""),
    (b"", b""), ("data: é\u2028\x85\n\n".encode(), "é\u2028\x85".encode()),
    (b"data: a\x0bb\x0cc\x1cd\n\n", b"a\x0bb\x0cc\x1cd"), (b"data: a:b: c\n\n", b"a:b: c"),
    (b"\n\ndata: x\n\n", b"x"),
])
def test_the_data_of_an_event_is_its_data_lines(event, data):
    assert data == ic.event_data(event)


# Writing.

@pytest.mark.parametrize("value, name, expected", [
    ("[DONE]", None, b"data: [DONE]\n\n"), ({"a": 1}, None, b'data: {"a":1}\n\n'),
    ({"a": "é\n\u2028"}, "e", b'event: e\ndata: {"a":"\\u00e9\\n\\u2028"}\n\n'),
])
def test_an_event_is_written_in_one_way(value, name, expected):
    assert expected == ic.format_event(value, name)


@pytest.mark.parametrize("text", ["", "x", "a\nb\r\nc\rd", "é日🐤\u2028\u2029\x85", "\0", "data: y"])
def test_an_event_that_is_written_reads_back(text):
    event = ic.format_event({"text": text}, "delta")

    (name, data), = spec_events(event)

    assert ("delta", {"text": text}) == (name, json.loads(data))
    assert ([event], b"") == split([event])


BROKE = ic.UpstreamBroke("it broke\nin two \"lines\" é")


@pytest.mark.parametrize("cut", [b"", b"data: {\"half", b"event: x\n", b"data: {}\n", b"data: {}\r",
                                 b"event: x\r\ndata: {\"a\":\"\xe2"])
@pytest.mark.parametrize("api, name", [("chat", ""), ("completions", ""), ("responses", "error"),
                                       ("messages", "error"), (None, "")])
def test_an_error_event_stands_apart_from_whatever_was_cut_before_it(cut, api, name):
    events = spec_events(cut + ic.error_event(BROKE, api, "req_1"))

    assert name == events[-1][0]
    assert "error" in json.loads(events[-1][1])
    assert [data for _, data in events[:-1]] == ([cut.split(b"data: ")[1].rstrip(b"\r\n")]
                                                 if b"data: " in cut else [])


@pytest.mark.parametrize("api, expected", [
    ("chat", {"error": {"message": BROKE.message, "type": "server_error", "param": None,
                        "code": "upstream_broke"}}),
    ("responses", {"type": "error", "error": {
        "message": BROKE.message, "type": "server_error", "param": None,
        "code": "upstream_broke"}}),
    ("messages", {"type": "error", "request_id": "req_1", "error": {
        "type": "api_error", "message": BROKE.message}}),
])
def test_an_error_event_has_the_form_that_its_sdk_raises_on(api, expected):
    (_, data), = spec_events(ic.error_event(BROKE, api, "req_1"))

    assert expected == json.loads(data)


@pytest.mark.parametrize("api", ["chat", "responses", "messages"])
def test_our_own_error_event_is_a_failure_to_our_own_meter(api):
    meter = ic.AnswerMeter(api)

    meter.read_event(ic.event_data(ic.error_event(BROKE, api, "req_1").lstrip()))

    assert meter.is_over
    assert meter.failure in ("server_error", "api_error")


# Metering.

def metered(api: str, *events: object) -> ic.AnswerMeter:
    """A meter that has read a stream of these events' data."""
    meter = ic.AnswerMeter(api)
    for event in events:
        meter.read_event(event if isinstance(event, bytes)
                         else json.dumps(event, ensure_ascii=False).encode())
    return meter


def known(meter: ic.AnswerMeter) -> tuple[Optional[dict], bool]:
    return meter.usage, meter.usage_is_final


def test_the_last_usage_of_a_chat_stream_wins():
    meter = metered("chat", {"choices": [], "usage": {"prompt_tokens": 1}},
                    {"choices": [], "usage": {"prompt_tokens": 2, "completion_tokens": 3}},
                    {"choices": [], "usage": None}, b"[DONE]")

    assert ({"prompt_tokens": 2, "completion_tokens": 3}, True) == known(meter)
    assert meter.has_ended


@pytest.mark.parametrize("api", ["chat", "completions"])
def test_null_usage_is_missing_and_zero_usage_is_not(api):
    zero = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}

    assert (None, False) == known(metered(api, {"choices": [], "usage": None}, b"[DONE]"))
    assert (zero, True) == known(metered(api, {"choices": [], "usage": zero}, b"[DONE]"))


def test_a_chat_stream_says_which_model_and_tier_served():
    meter = metered("chat", {"model": "m-1", "service_tier": None, "choices": []},
                    {"model": "m-2", "service_tier": "flex", "choices": []}, {"choices": []})

    assert ("m-2", "flex") == (meter.model, meter.service_tier)


def test_a_chat_stream_without_its_done_has_not_ended():
    assert not metered("chat", {"choices": [{"delta": {"content": "x"}}]}).has_ended


@pytest.mark.parametrize("kind", ["completed", "incomplete", "failed"])
def test_a_responses_stream_ends_in_the_event_that_holds_the_whole(kind):
    usage = {"input_tokens": 0, "output_tokens": 0}
    meter = metered(
        "responses", {"type": "response.created", "response": {"usage": None, "model": "m"}},
        {"type": f"response.{kind}", "response": {
            "model": "m-1", "service_tier": "priority", "usage": usage, "output": [
                {"type": "web_search_call"}, {"type": "message"}, {"type": "web_search_call"},
                {"type": 5}, None]}})

    assert (usage, True) == known(meter)
    assert ("m-1", "priority", True) == (meter.model, meter.service_tier, meter.has_ended)
    assert {"web_search_call": 2, "message": 1} == meter.tool_calls


@pytest.mark.parametrize("response", [None, {}, {"usage": None}, {"usage": []}, {"usage": "x"}])
def test_a_responses_stream_can_end_without_usage(response):
    meter = metered("responses", {"type": "response.failed", "response": response})

    assert (None, False) == known(meter)
    assert meter.has_ended


def message_start(**usage: object) -> dict:
    return {"type": "message_start", "message": {"model": "claude-1", "usage": usage}}


def message_delta(**usage: object) -> dict:
    return {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": usage}


@pytest.mark.parametrize("start, delta, expected", [
    ({"input_tokens": 10, "output_tokens": 1}, {"output_tokens": 50},
     {"input_tokens": 10, "output_tokens": 50}),
    ({"input_tokens": 10, "output_tokens": 1}, {"input_tokens": 99, "output_tokens": 50},
     {"input_tokens": 99, "output_tokens": 50}),
    ({"input_tokens": 10, "output_tokens": 1}, {"input_tokens": None, "output_tokens": 0},
     {"input_tokens": 10, "output_tokens": 0}),
    ({"input_tokens": 10, "cache_read_input_tokens": 5, "output_tokens": 1},
     {"cache_read_input_tokens": 0, "output_tokens": 2},
     {"input_tokens": 10, "cache_read_input_tokens": 5, "output_tokens": 2}),
    ({"input_tokens": 10, "output_tokens": 1, "service_tier": "batch"},
     {"output_tokens": 2, "server_tool_use": {"web_search_requests": 3}},
     {"input_tokens": 10, "output_tokens": 2, "service_tier": "batch",
      "server_tool_use": {"web_search_requests": 3}}),
])
def test_a_message_delta_overrides_what_the_start_said_and_null_keeps_it(start, delta, expected):
    meter = metered("messages", message_start(**start), message_delta(**delta))

    assert (expected, True) == known(meter)
    assert "claude-1" == meter.model


@pytest.mark.parametrize("deltas", [[], [{}], [{"output_tokens": None}], [{"input_tokens": 9}]])
def test_the_starts_count_of_output_is_not_the_ends(deltas):
    """It is a placeholder; a stream that never tells more has no usage."""
    meter = metered("messages", message_start(input_tokens=10, output_tokens=1),
                    *(message_delta(**delta) for delta in deltas), {"type": "message_stop"})

    assert (True, False) == (meter.has_ended, meter.usage_is_final)


def test_a_count_that_shrinks_does_not_and_old_iterations_go():
    start = message_start(input_tokens=10, output_tokens=1, iterations=[{"input_tokens": 10}])
    meter = metered("messages", start, message_delta(output_tokens=9),
                    message_delta(output_tokens=5))

    assert ({"input_tokens": 10, "output_tokens": 9}, True) == known(meter)


def test_usage_before_the_last_text_is_not_final():
    def chunk(text=None, **more):
        choices = [] if text is None else [{"index": 0, "delta": {"content": text}}]
        return {"id": "c", "choices": choices, **more}

    usage = {"prompt_tokens": 10, "completion_tokens": 1}
    early = metered("chat", chunk(usage=usage), chunk("x" * 100), b"[DONE]")
    running = metered("chat", chunk("x", usage=usage), chunk("y", usage=usage), b"[DONE]")

    assert (False, True) == (early.usage_is_final, running.usage_is_final)


def test_the_last_of_several_message_deltas_wins_because_counts_are_cumulative():
    meter = metered("messages", message_start(input_tokens=10, output_tokens=1),
                    message_delta(output_tokens=5), message_delta(output_tokens=9))

    assert {"input_tokens": 10, "output_tokens": 9} == meter.usage


def test_a_message_start_alone_is_not_final():
    meter = metered("messages", message_start(input_tokens=10, output_tokens=1))

    assert ({"input_tokens": 10}, False) == known(meter)
    assert not meter.has_ended


@pytest.mark.parametrize("delta", [{"type": "message_delta"}, {"type": "message_delta",
                                                               "usage": None}])
def test_a_message_delta_without_usage_leaves_it_open(delta):
    meter = metered("messages", message_start(input_tokens=10, output_tokens=1), delta)

    assert not meter.usage_is_final


def test_a_messages_stream_ends_in_message_stop():
    assert metered("messages", message_start(), {"type": "message_stop"}).has_ended


@pytest.mark.parametrize("api, event, failure", [
    ("chat", {"error": {"type": "server_error", "message": "x"}}, "server_error"),
    ("chat", {"error": {"code": "overloaded"}}, "overloaded"), ("chat", {"error": {}}, "error"),
    ("chat", {"error": {"code": 500}}, "error"),
    ("completions", {"error": {"type": "x"}}, "x"),
    ("responses", {"type": "error", "code": "rate_limit", "message": "x"}, "rate_limit"),
    ("responses", {"type": "error", "error": {"type": "server_error"}}, "server_error"),
    ("messages", {"type": "error", "error": {"type": "overloaded_error"}}, "overloaded_error"),
    ("messages", {"type": "error"}, "error"), ("messages", {"type": "error", "error": None},
                                               "error"),
])
def test_an_error_event_is_a_failure_and_all_that_a_client_waits_for(api, event, failure):
    meter = metered(api, event)

    assert (failure, False, True) == (meter.failure, meter.has_ended, meter.is_over)


GARBAGE = (b"", b"{", b"null", b"5", b"[]", b'"x"', b"true", b"[DONE", b"\xff\xfe", b"{}", b"NaN",
           b"1" * 10_000, b'{"type":null,"choices":null}',
           b'{"type":[],"choices":{},"usage":5,"model":7,"service_tier":[],"delta":7}',
           b'{"choices":[null,5,"x",[],{},{"delta":null},{"delta":5},{"text":{}}]}')


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("data", GARBAGE, ids=lambda data: repr(data[:30]))
def test_data_that_says_nothing_is_ignored(api, data):
    meter = metered(api, data)

    assert (None, False, None, None, False, None, 0) == (
        meter.usage, meter.usage_is_final, meter.model, meter.service_tier, meter.has_ended,
        meter.failure, meter.output_bytes)


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("data", [b"[" * 100_000, b'{"a":' * 100_000], ids=["lists", "objects"])
def test_an_event_that_is_too_deep_to_be_read_may_be_output(api, data):
    meter = metered(api, data)

    assert (None, False, len(data)) == (meter.usage, meter.has_ended, meter.output_bytes)


@pytest.mark.parametrize("data, parsed", [
    (b'{"a":1}', {"a": 1}), (b"[DONE]", None), (b"[1]", None), (b"{", None)])
def test_an_event_is_returned_parsed_where_it_is_an_object(data, parsed):
    assert parsed == ic.AnswerMeter("chat").read_event(data)


def shown_events(api: str, piece: str, rng: Random) -> list[dict]:
    """A piece of output as events of an API; in some, not as plain text."""
    if api == "chat":
        return [{"choices": [{"index": 0, "delta": rng.choice([
            {"content": piece}, {"role": "assistant", "content": piece}, {"refusal": piece},
            {"reasoning_content": piece},
            {"tool_calls": [{"index": 0, "function": {"arguments": piece}}]}])}]}]
    if api == "completions":
        return [{"choices": [{"index": 0, "text": piece}]}]
    if api == "responses":
        return [{"type": f"response.{kind}.delta", "delta": piece} for kind in [rng.choice(
            ["output_text", "refusal", "function_call_arguments", "reasoning_summary_text",
             "custom_tool_call_input"])]]
    start = {"type": "content_block_start", "content_block": {"type": "text", "text": piece}}
    delta = {"type": "content_block_delta", "delta": rng.choice([
        {"type": "text_delta", "text": piece}, {"type": "thinking_delta", "thinking": piece},
        {"type": "input_json_delta", "partial_json": piece},
        {"type": "signature_delta", "signature": piece}])}
    return [rng.choice([start, delta])]


@pytest.mark.parametrize("api", ["chat", "completions", "responses", "messages"])
@each_seed(40)
def test_at_least_the_bytes_that_were_shown_are_counted(api, seed):
    rng = Random(seed)
    pieces = ["".join(rng.choices("ab \n\"é日🐤\u2028", k=rng.randrange(12)))
              for _ in range(rng.randrange(1, 30))]
    events = [event for piece in pieces for event in shown_events(api, piece, rng)]

    meter = metered(api, *events)

    assert meter.output_bytes >= len("".join(pieces).encode()) >= len("".join(pieces))


def test_half_a_surrogate_in_a_stream_is_counted():
    meter = metered("chat", b'{"choices":[{"delta":{"content":"\\ud83d"}}]}')

    assert meter.output_bytes >= 1


# Whole answers.

@pytest.mark.parametrize("api, usage", [
    ("chat", {"prompt_tokens": 1, "completion_tokens": 2}),
    ("embeddings", {"prompt_tokens": 1}), ("messages", {"input_tokens": 1, "output_tokens": 0}),
    ("responses", {"input_tokens": 0, "output_tokens": 0}),
])
def test_a_whole_answer_tells_its_usage(api, usage):
    meter = ic.AnswerMeter(api)

    meter.read_answer(json.dumps({"model": "m", "service_tier": "flex", "usage": usage, "output": [
        {"type": "file_search_call"}]}, indent=2).encode())

    assert (usage, True) == known(meter)
    assert ("m", "flex", True) == (meter.model, meter.service_tier, meter.has_ended)
    assert {"file_search_call": 1} == meter.tool_calls


@pytest.mark.parametrize("answer", [
    b"", b"{", b"[]", b"null", b"<html>", b"\xff", b"[" * 100_000, b'{"usage":null}',
    b'{"usage":[]}', b'{"usage":"x"}', b'{"error":{"message":"x"}}', b'{"choices":[]}',
    b'{"output":{},"usage":7}', b'{"usage":{}}', b'{"usage":{"prompt_tokens":' + b"9" * 5_000 + b"}"])
def test_an_answer_without_usage_leaves_it_missing(answer):
    meter = ic.AnswerMeter("chat")

    meter.read_answer(answer)

    assert (None, False) == known(meter)


# Hiding usage.

@pytest.mark.parametrize("event, expected", [
    (b'data: {"id":"x","choices":[{"delta":{}}],"usage":null}\n\n',
     b'data: {"id":"x","choices":[{"delta":{}}]}\n\n'),
    (b'data: { "id" : "x" , "usage" : null , "choices" : [ ] }\r\n\r\n',
     b'data: { "id" : "x"  , "choices" : [ ] }\r\n\r\n'),
    (b'event: e\nid: 5\ndata: {"id":"x",\t"usage": null}\n\n',
     b'event: e\nid: 5\ndata: {"id":"x"}\n\n'),
    (b'data:{"id":"x","usage":null,"obfuscation":"ab"}\r\r',
     b'data:{"id":"x","obfuscation":"ab"}\r\r'),
    ('data: {"choices":[{"delta":{"content":"日"}}],"usage":null}\n\n'.encode(),
     'data: {"choices":[{"delta":{"content":"日"}}]}\n\n'.encode()),
])
def test_null_usage_is_cut_out_and_every_other_byte_stays(event, expected):
    chunk = json.loads(ic.event_data(event))

    assert expected == ic.without_usage(event, chunk)


SPOKEN = 'as JSON: {"a":1,"usage":null} , "usage" : null'


@pytest.mark.parametrize("with_usage", [False, True])
def test_text_that_speaks_of_usage_stays_as_it_is(with_usage):
    chunk = {"choices": [{"delta": {"content": SPOKEN}}], **({"usage": None} if with_usage else {})}
    event = ic.format_event(chunk)

    hidden = ic.without_usage(event, chunk)

    assert {"choices": chunk["choices"]} == json.loads(ic.event_data(hidden))
    assert event.replace(b',"usage":null}\n\n', b"}\n\n") == hidden


@pytest.mark.parametrize("event", [
    b"data: [DONE]\n\n", b": ping\n\n", b"data: {broken\n\n", b"data: [1]\n\n", b"\n\n",
    b'data: {"id":"x","choices":[]}\n\n', b'data: {"choices":[{"usage":null}]}\n\n'])
def test_an_event_without_usage_stays_as_it_is(event):
    chunk = ic.AnswerMeter("chat").read_event(ic.event_data(event))

    assert event == ic.without_usage(event, chunk)


@pytest.mark.parametrize("extra", [{}, {"id": "x", "object": "chat.completion.chunk", "created": 1,
                                        "model": "m", "system_fingerprint": None,
                                        "service_tier": "default", "obfuscation": "ab"}])
def test_the_chunk_that_usage_brought_is_dropped(extra):
    chunk = {**extra, "choices": [], "usage": {"prompt_tokens": 1}}

    assert b"" == ic.without_usage(ic.format_event(chunk), chunk)


@pytest.mark.parametrize("rest", [
    {"choices": [], "prompt_filter_results": [{"prompt_index": 0}]},
    {"choices": [], "citations": ["x"]},
    {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
    {"id": "x"}, {"choices": None}, {"choices": {}},
])
def test_a_chunk_that_says_more_than_usage_is_kept_without_it(rest):
    chunk = {"usage": {"prompt_tokens": 1}, **rest}

    kept = ic.without_usage(ic.format_event(chunk), chunk)

    assert rest == json.loads(ic.event_data(kept))
    assert ([kept], b"") == split([kept])


@pytest.mark.parametrize("chunk", [
    {"usage": None}, {"usage": None, "id": "x", "choices": []},
    {"choices": [{"delta": {}, "usage": None}], "id": "x", "usage": None},
])
def test_null_usage_that_cannot_be_cut_out_safely_is_left_out_all_the_same(chunk):
    kept = ic.without_usage(ic.format_event(chunk), chunk)

    assert {name: value for name, value in chunk.items() if name != "usage"} == \
        json.loads(ic.event_data(kept))


USED = b'"usage":{"prompt_tokens":5,"x":[{"usage":1}]}'


@pytest.mark.parametrize("event, without", [
    (b'id: 9\ndata: {"p":1.10,"t":"\\u00e9\xc3\xa9 {", "choices":[{"usage":1e2}], %b }\nx: 7\n\n',
     b", %b"),
    (b': {"usage":1}\r\ndata:{"choices":[{}],%b,"id":-0}\r\n\r\n', b",%b"),
    (b'\xef\xbb\xbfdata: { %b , "id":1.0}\n\n', b" %b , "),
    (b'event: e\rdata: { %b }\r\r', b" %b"),
    (b'data: {"id":1.0,\nid: 9\ndata:  "choices":[],\ndata: %b,\ndata: "x":1e2\ndata: }\n\n',
     b',\ndata: %b'),
    (b'data: [{"error":{},"code":1.0,%b}]\n\n', b",%b"),
    (b'data: {"id":1.0,"us\\u0061ge":{}}\n\n', b',"us\\u0061ge":{}')])
def test_of_an_event_that_says_more_only_usage_goes(event, without):
    event, without = (text.replace(b"%b", USED) for text in (event, without))
    chunk = ic.AnswerMeter("chat").read_event(ic.event_data(event))

    assert event.replace(without, b"") == ic.without_usage(event, chunk)


# Inflating.

PLAIN_BODY = ("data: Grüße 🐤\n\n" * 200).encode()
PACKED = {"gzip": gzip.compress(PLAIN_BODY, mtime=0), "x-gzip": gzip.compress(PLAIN_BODY, mtime=0),
          "deflate": zlib.compress(PLAIN_BODY)}


@pytest.mark.parametrize("encoding", PACKED)
def test_a_compressed_body_cut_anywhere_inflates_to_the_same(encoding):
    packed = PACKED[encoding]
    for at in range(len(packed) + 1):
        inflater = ic.Inflater(len(PLAIN_BODY))

        inflated = inflater.feed(packed[:at]) + inflater.feed(packed[at:])

        assert PLAIN_BODY == inflated
        assert inflater.is_complete


@pytest.mark.parametrize("encoding", PACKED)
def test_a_compressed_body_that_is_cut_is_not_complete(encoding):
    inflater = ic.Inflater(len(PLAIN_BODY))

    inflater.feed(PACKED[encoding][:-1])

    assert not inflater.is_complete


@pytest.mark.parametrize("cut_before_end", [0, 1, 5])
def test_a_compressed_body_with_something_behind_it_is_refused(cut_before_end):
    """Some clients would inflate that too, and see what we did not."""
    inflater, cut = ic.Inflater(len(PLAIN_BODY)), len(PACKED["gzip"]) - cut_before_end
    inflater.feed(PACKED["gzip"][:cut])

    with pytest.raises(zlib.error):
        inflater.feed(PACKED["gzip"][cut:] + b"x")


@pytest.mark.parametrize("encoding", PACKED)
@pytest.mark.parametrize("piece_bytes", [1, 10, 10 ** 6])
def test_a_body_that_inflates_by_one_byte_too_many_is_refused(encoding, piece_bytes):
    packed, inflater = PACKED[encoding], ic.Inflater(len(PLAIN_BODY) - 1)

    with pytest.raises(OverflowError):
        for at in range(0, len(packed), piece_bytes):
            inflater.feed(packed[at:at + piece_bytes])


def test_a_bomb_is_inflated_no_further_than_its_limit():
    bomb = gzip.compress(b"\0" * 50_000_000)

    with pytest.raises(OverflowError):
        ic.Inflater(1_000).feed(bomb)


@pytest.mark.parametrize("data", [
    b"not compressed", b"\x1f\x8b\x08\x00broken-broken-broken", PACKED["gzip"][:-8] + b"x" * 8,
], ids=["plain", "broken", "wrong checksum"])
def test_broken_data_is_refused(data):
    with pytest.raises(zlib.error):
        ic.Inflater(10 ** 6).feed(data)


def test_an_empty_body_can_be_inflated_into_nothing():
    inflater = ic.Inflater(0)

    assert b"" == inflater.feed(gzip.compress(b""))
    assert inflater.is_complete


@pytest.mark.parametrize("encoding, body, plain", [
    ("identity", PLAIN_BODY, PLAIN_BODY), ("br", PLAIN_BODY, b""), ("gzip", PLAIN_BODY, b""),
    *((encoding, packed, PLAIN_BODY) for encoding, packed in PACKED.items())])
def test_a_body_is_freed_of_its_encoding_or_not_read(encoding, body, plain):
    assert plain == ic.inflated(body, encoding, abs)


def test_a_body_without_an_encoding_is_not_copied():
    assert PLAIN_BODY is ic.inflated(PLAIN_BODY, "identity", abs)


def test_a_whole_answer_that_is_a_stream_is_read_event_by_event():
    usage = {"prompt_tokens": 9, "completion_tokens": 2}
    chunks = [{"choices": [{"index": 0, "delta": {"content": "hi"}, "finish_reason": "stop"}]},
              {"choices": [], "usage": usage}]
    meter = ic.AnswerMeter("chat")

    assert meter.read_answer(b"".join(map(ic.format_event, chunks))) is None
    assert (chunks, usage, True) == (meter.events, meter.usage, meter.usage_is_final)


def test_a_json_answer_is_metered_at_its_end_though_a_stream_was_asked_for():
    usage = {"prompt_tokens": 9, "completion_tokens": 2}
    answer = json.dumps({"choices": [], "usage": usage}).encode()
    meter = ic.AnswerMeter("chat")
    reader = ic.StreamReader(meter, "identity", hides_usage=True)

    assert [b"\n\n"] == reader.read([b"\n\n "])
    assert [b" ", answer[:9]] == reader.read([answer[:9]])
    assert [answer[9:]] == reader.read([answer[9:]])
    assert not meter.has_ended
    assert (b"", usage) == (reader.finish(), meter.usage)


def test_a_json_answer_in_a_stream_is_held_up_to_a_limit(monkeypatch):
    monkeypatch.setattr(ic, "MAX_ANSWER_BYTES", 100)
    reader = ic.StreamReader(ic.AnswerMeter("chat"), "identity", hides_usage=False)

    assert [] == [*reader.parsed([b"{" + b" " * 99])]
    with pytest.raises(ic.UpstreamBroke, match="larger"):
        list(reader.parsed([b"}"]))


def test_a_usage_chunk_that_no_empty_line_ends_is_hidden_too():
    reader = ic.StreamReader(ic.AnswerMeter("chat"), "identity", hides_usage=True)
    usage = {"choices": [], "usage": {"prompt_tokens": 2, "completion_tokens": 1}}

    reader.read([b"data: " + json.dumps(usage).encode()])

    assert b"" == reader.finish()


def test_a_choice_that_never_began_keeps_the_usage_from_being_final():
    meter = ic.AnswerMeter("chat", choices=2)
    done = {"choices": [{"index": 0, "delta": {"content": "x"}, "finish_reason": "stop"}]}
    for event in (done, {"choices": [], "usage": {"prompt_tokens": 2, "completion_tokens": 1}}):
        meter.read_event(json.dumps(event).encode())
    assert not meter.usage_is_final

    meter.end_body()                       # a server that makes one choice only, whatever is asked
    assert meter.usage_is_final
