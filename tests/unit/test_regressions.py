"""Bugs that were found and mended before a release, each with the test that found it."""
from __future__ import annotations

import json
import socket
import time
from decimal import Decimal

import pytest

import ironcage_proxy as ic
from test_http_wire import CHUNKED_BODIES, decoded

PLAIN = {"litellm_provider": "openai", "mode": "chat", "max_input_tokens": 1_000_000,
         "max_output_tokens": 50_000, "input_cost_per_token": Decimal("0.00001"),
         "output_cost_per_token": Decimal("0.00004")}
PRICE = ic.PriceBook({"m": PLAIN}).price("m")


# Chapter tests: test_http_wire.py.

@pytest.mark.parametrize("raw, body", CHUNKED_BODIES.values(), ids=CHUNKED_BODIES)
@pytest.mark.parametrize("rest", [b"", b"GET / HTTP/1.1\r\n", b"\r\n0\r\n\r\n"])
def test_a_chunked_body_cut_anywhere_is_the_same_and_keeps_what_follows(raw, body, rest):
    stream = raw + rest
    for at in range(len(stream) + 1):
        assert (body, rest) == decoded(ic.BodyDecoder(ic.CHUNKED), [stream[:at], stream[at:]])

    assert (body, rest) == decoded(ic.BodyDecoder(ic.CHUNKED),
                                   [stream[at:at + 1] for at in range(len(stream))])


# Chapter tests: test_bounds.py.

def test_a_rejected_prediction_beyond_ascii_is_bounded_in_bytes():
    fields = {"messages": [], "max_tokens": 10,
              "prediction": {"type": "content", "content": "日" * 1_000}}
    body = ic.parse_json_object(json.dumps(fields, ensure_ascii=False).encode())

    bound = ic.bound_of_request("chat", body, PRICE)

    assert bound.unlimited_output_tokens >= 3_000


# Chapter tests: test_money.py.

@pytest.mark.parametrize("bad", ["x", [1], 5, 1.5, True], ids=repr)
@pytest.mark.parametrize("api, name", [
    ("chat", "prompt_tokens_details"), ("responses", "input_tokens_details"),
    ("embeddings", "prompt_tokens_details"), ("completions", "prompt_tokens_details")])
def test_details_that_are_no_object_are_malformed_usage_or_nothing(api, name, bad):
    usage = {"input_tokens": 9, "output_tokens": 9, "prompt_tokens": 9, "completion_tokens": 9,
             name: bad}

    try:
        cost = ic.PriceBook({"m": PLAIN}).cost("m", usage, api=api)
    except ic.MalformedUsage:
        return
    assert cost == ic.PriceBook({"m": PLAIN}).cost("m", {**usage, name: None}, api=api) > 0


@pytest.mark.parametrize("api, usage", [
    ("chat", {"prompt_tokens": 5}), ("chat", {"prompt_tokens": 5, "completion_tokens": None}),
    ("responses", {"input_tokens": 5}), ("messages", {"output_tokens": 5}),
    ("messages", {"input_tokens": None, "output_tokens": 5})])
def test_usage_without_either_main_count_is_malformed(api, usage):
    with pytest.raises(ic.MalformedUsage):
        ic.PriceBook({"m": PLAIN}).cost("m", usage, api=api)


@pytest.mark.parametrize("name", ["provider_specific_entry", "search_context_cost_per_query"])
@pytest.mark.parametrize("bad", ["x", [1], 5, True], ids=repr)
def test_a_row_whose_extras_are_no_object_is_unpriced(name, bad):
    assert ic.PriceBook({"m": {**PLAIN, name: bad}}).find("m") is None


def test_an_amount_of_many_digits_is_still_rounded_down():
    assert 1 == ic.parse_usd("0.0000019999999999999999999999999999999")


@pytest.mark.parametrize("value", ["1_000", "٥", "1_0.5"])
def test_digits_that_only_python_reads_are_no_amount(value):
    with pytest.raises(ValueError):
        ic.parse_usd(value)


# Chapter tests: test_event_streams.py.

@pytest.mark.parametrize("api, event", [
    ("chat", {"choices": 5}), ("chat", {"choices": True}), ("completions", {"choices": 1.5}),
    ("responses", {"type": "response.completed", "response": "x"}),
    ("responses", {"type": "response.completed", "response": [1]}),
    ("responses", {"type": "error", "error": "boom"}),
    ("messages", {"type": "message_start", "message": "x"}),
    ("messages", {"type": "message_start", "message": [1]}),
    ("messages", {"type": "error", "error": "boom"}),
], ids=repr)
def test_events_of_the_wrong_shape_are_read_without_a_crash(api, event):
    meter = ic.AnswerMeter(api)
    meter.read_event(json.dumps(event).encode())

    assert not meter.usage_is_final


def test_null_usage_of_the_chunk_is_what_goes_and_not_another():
    chunk = {"usage": None, "x": {"a": 1, "usage": None}}

    kept = ic.without_usage(ic.format_event(chunk), chunk)

    assert {"x": {"a": 1, "usage": None}} == json.loads(ic.event_data(kept))


# Chapter tests: test_bounds.py.

@pytest.mark.parametrize("api, fields", [
    ("responses", {"input": [{"id": "msg_1"}]}),                        # `type` is optional here
    ("responses", {"input": [{"id": "msg_1", "type": None}]}),
    ("responses", {"input": [{"type": "reasoning", "id": "rs_1", "summary": []}]}),
    ("chat", {"messages": [{"role": "assistant", "audio": {"id": "audio_1"}}]}),
], ids=repr)
def test_input_that_is_named_by_its_id_counts_as_the_whole_context(api, fields):
    body = ic.parse_json_object(json.dumps(fields).encode())

    assert 1_000_000 == ic.bound_of_request(api, body, PRICE).input_tokens


@pytest.mark.parametrize("fields", [
    {"tools": [{"type": "shell", "environment": {"type": "container_auto"}}]},
    {"tools": [{"type": "shell", "environment": {"type": "container_reference"}}]},
    {"tools": [{"type": "namespace", "name": "n", "tools": [{"type": "mcp"}]}]},
    {"tools": {"type": "web_search"}},
    {"context_management": {"edits": [{"type": "compact_20260112"}]}},
    {"context_management": [{"type": "compaction", "compact_threshold": 1_000}]},
], ids=repr)
def test_work_that_the_provider_does_by_itself_is_refused(fields):
    with pytest.raises(ic.BadRequest):
        ic.check_boundable("responses", ic.parse_json_object(json.dumps(fields).encode()), PRICE)


# Chapter tests: test_http_wire.py.

@pytest.mark.parametrize("raw", [
    b"GET / HTTP/1.1\r\nHost: a\r\n\nX", b"GET / HTTP/1.1\r\nHost: a\n\r\nX",
    b"GET / HTTP/1.1\r\nHost: a\n\nX"])
def test_a_head_that_ends_in_a_bare_lf_is_refused(raw):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.send(raw)

        with pytest.raises(ic.MalformedHttp):
            ic.parse_request_head(ic.Wire(ours).read_head(time.monotonic() + 5))


# Chapter tests: test_json_bodies.py.

@pytest.mark.parametrize("number", ["1e999", "-1e999"])
def test_a_number_that_python_reads_as_infinite_is_refused(number):
    with pytest.raises(ic.BadRequest):
        ic.parse_json_object(b'{"temperature":%b}' % number.encode())


# Chapter tests: test_cost_controller.py.

@pytest.mark.parametrize("amount", [-1, 0.5, True])
def test_what_is_no_amount_cannot_be_reserved(amount):
    controller = ic.CostController(1_000)

    with pytest.raises(ValueError):
        controller.reserve(amount)

    assert (0, 0, 1_000) == controller.get_full_status()


# Found by the money review: counts that run are not the last ones.

def read_events(api, *events):
    meter = ic.AnswerMeter(api)
    for event in events:
        meter.read_event(json.dumps(event).encode())
    return meter


def test_running_usage_of_a_chat_stream_is_not_final():
    """Also not when a chunk without choices comes after it."""
    running = {"choices": [{"delta": {"content": "x"}}],
               "usage": {"prompt_tokens": 9, "completion_tokens": 1}}

    meter = read_events("chat", running, {"choices": []})
    assert (1, False) == (meter.usage["completion_tokens"], meter.usage_is_final)

    meter.read_event(b"[DONE]")
    assert meter.usage_is_final


def test_a_message_delta_without_a_stop_reason_is_not_final():
    start = {"type": "message_start", "message": {"usage": {"input_tokens": 9,
                                                            "output_tokens": 1}}}
    running = {"type": "message_delta", "delta": {"stop_reason": None},
               "usage": {"output_tokens": 3}}
    last = {"type": "message_delta", "delta": {"stop_reason": "end_turn"},
            "usage": {"output_tokens": 900}}

    assert not read_events("messages", start, running).usage_is_final
    assert read_events("messages", start, running, last).usage_is_final
    assert read_events("messages", start, running, {"type": "message_stop"}).usage_is_final
