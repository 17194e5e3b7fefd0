"""Settlement: what a call costs, from how it ended; pure, so without a socket or a clock."""
import json
from types import SimpleNamespace

import pytest

import ironcage_proxy as ic

CAP = 1_000
BOOK = ic.PriceBook({
    "m": {"litellm_provider": "lab", "input_cost_per_token": ic.Decimal("0.000001"),
          "output_cost_per_token": ic.Decimal("0.000005"),
          "cache_creation_input_token_cost": ic.Decimal("0.00000125"),
          "cache_read_input_token_cost": ic.Decimal("0.0000001")},
})
LAB = ic.Provider(name="lab", format="openai", base_url="https://lab.example")


def call_of(api="chat", *, events=None, answer=None, status=200, streams=True, was_sent=True,
            provider=LAB, bound=None, level=None, **fields):
    """A call under a budget that was sent, and what came of it; its input is bounded at $0.0001."""
    body = ic.parse_json_object(json.dumps(
        {"model": "m", **({"stream": True} if streams else {}), **fields}).encode())
    call = ic.Call(None, provider, api, "m", body)
    call.price, call.status, call.was_sent = BOOK.price("m", "lab"), status, was_sent
    choices = ic._choices(api, body.fields)
    call.bound = ic.Bound(
        (ic.Level(((100, 0),), (10 ** 6, 5 * 10 ** 6 * choices), **(level or {})),), 100, asked_output_tokens=CAP, most_output_tokens=CAP,
        **(bound or {}))
    call.reservation = SimpleNamespace(microdollars=call.bound.microdollars(CAP), output_cap=CAP)
    for event in events or ():
        call.meter.read_event(event if isinstance(event, bytes) else json.dumps(event).encode())
    if answer is not None:
        call.meter.read_answer(answer if isinstance(answer, bytes) else json.dumps(answer).encode())
    return call


def cost_of(call, seconds=0):
    """(microdollars, why not exactly)."""
    charge = ic.charge_of(call, BOOK, int(seconds * 10 ** 9))
    return charge.microdollars, charge.estimated


def text(content, index=0, finish=None, **more):
    return {"choices": [{"index": index, "delta": {"content": content}, "finish_reason": finish}],
            **more}


def usage(prompt=10, completion=20, **more):
    return {"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": completion,
                                     **more}}


def start(**counts):
    return {"type": "message_start", "message": {"usage": counts}}


def delta(stop_reason="end_turn", **counts):
    return {"type": "message_delta", "delta": {"stop_reason": stop_reason}, "usage": counts}


ERROR = {"error": {"type": "server_error"}}
BODY = {"choices": [{"message": {"role": "assistant", "content": "x" * 40}}]}


@pytest.mark.parametrize("call, seconds, expected", [
    # Nothing.
    (dict(was_sent=False, status=None), 100, (0, None)),
    (dict(status=500, answer=ERROR), 100, (0, None)),
    (dict(events=[ERROR]), 10, (0, None)),
    (dict(status=500, answer={"usage": "many"}), 0, (100, "malformed usage: it is not an object")),
    # An error event that is late, or not the first, follows the rule.
    (dict(events=[ERROR]), 10.1, (5_100, "an error in the stream")),
    (dict(events=[text("xx"), ERROR]), 0, (110, "an error in the stream")),
    (dict(events=[usage(3, 0), ERROR]), 0, (3, "an error in the stream")),
    (dict(events=[{**ERROR, "usage": {"prompt_tokens": 3, "completion_tokens": 4}}]), 0,
     (23, "an error in the stream")),
    (dict(events=[{"usage": "many"}, ERROR]), 0, (100, "malformed usage: it is not an object")),
    (dict(api="responses", events=[{"type": "response.failed", "response": {"error": {}}}]), 1,
     (0, None)),
    # A gateway that gave up on its provider, who may go on.
    (dict(status=504, streams=False, answer=ERROR), 10, (0, None)),
    (dict(status=504, streams=False, answer=ERROR), 10.1, (5_100, "no answer")),
    (dict(status=502, streams=False, answer=b"<html>"), 10.1, (5_100, "no answer")),
    (dict(status=524, answer=ERROR), 11, (5_100, "no answer")),
    (dict(status=503, streams=False, answer=ERROR), 100, (0, None)),
    # So is an error that comes as a whole answer with 200, and one of any shape.
    (dict(streams=False, answer=ERROR), 10, (0, None)),
    (dict(streams=False, answer=ERROR), 10.1, (5_100, "an error in the answer")),
    (dict(answer={"error": "overloaded"}), 10, (0, None)),
    (dict(api="messages", answer={"type": "error", **ERROR}), 10, (0, None)),
    (dict(api="responses", streams=False, answer={"status": "failed", "output": [], **ERROR}), 10,
     (0, None)),
    (dict(api="embeddings", streams=False, answer={"data": [{}], "message": "ok"}), 0.01,
     (150, "no usage in the answer")),
    (dict(streams=False, answer={**BODY, **ERROR}), 0.01, (300, "no usage in the answer")),
    (dict(events=[{"error": "overloaded"}]), 10, (0, None)),
    (dict(events=[{"message": "overloaded", "code": 503}]), 10, (0, None)),
    (dict(events=[{"detail": [{"msg": "overloaded"}]}]), 10, (0, None)),
    (dict(events=[text("xx"), {"detail": "overloaded"}]), 0, (110, "an error in the stream")),
    (dict(events=[{**text("x" * 30, finish="error"), **ERROR}]), 0,
     (250, "an error in the stream")),
    # An error event is no end: what is billed behind it is charged.
    (dict(events=[ERROR, text("x", finish="stop"), usage(), b"[DONE]"]), 100, (110, None)),
    # Exactly.
    (dict(events=[text("x", finish="stop"), usage(), b"[DONE]"]), 100, (110, None)),
    (dict(status=500, answer=usage()), 100, (110, None)),
    # The rule: input or its bound; bytes or time; the cap.
    (dict(status=None), 0, (100, "no answer")),
    (dict(status=None), 0.1, (600, "no answer")),
    (dict(status=None), 100, (5_100, "no answer")),
    (dict(events=[text("x" * 30)]), 0.01, (250, "the answer broke off")),
    (dict(events=[text("x" * 30)]), 0.04, (300, "the answer broke off")),
    (dict(events=[text("x" * 3_000)]), 0, (5_100, "the answer broke off")),
    (dict(events=[text("x" * 30), usage(4, 9)]), 0, (154, "the answer broke off")),
    (dict(events=[text("x" * 30), b"[DONE]"]), 0, (250, "no usage in the answer")),
    # Of an unstreamed call that broke off late without a byte, all that was reserved.
    (dict(status=None, streams=False), 10, (5_100, "no answer")),
    (dict(status=None, streams=False, max_tokens=1), 10.1, (5_100, "no answer")),
    (dict(streams=False, answer=BODY), 0.01, (300, "no usage in the answer")),
    # Several choices.
    (dict(status=None, n=3), 0.1, (1_600, "no answer")),
    (dict(events=[text("x" * 30), text("y" * 31, 1)], n=2), 0, (100 + 31 * 10,
                                                                "the answer broke off")),
])
def test_what_a_call_costs(call, seconds, expected):
    assert expected == cost_of(call_of(**call), seconds)


def test_what_breaks_off_late_and_unstreamed_costs_its_reservation_only_without_a_byte():
    """The cap that travels is lower here, so that the two differ."""
    empty, begun, streamed = [call_of(streams=is_stream, api="completions")
                              for is_stream in (False, False, True)]
    begun.meter.see([b' {"id":'])
    for call in (empty, begun, streamed):
        call.reservation.output_cap = 7                   # less than was reserved
    blank = call_of(streams=False)
    blank.meter.see([b"\r\n", b" "])
    blank.reservation.output_cap = 7
    ended = call_of(streams=False, answer=b"")
    ended.reservation.output_cap = 7

    assert [5_100, 135, 135, 5_100, 135] == [
        cost_of(call, 11)[0] for call in (empty, begun, streamed, blank, ended)]
    assert [135, 135] == [cost_of(call, 10)[0] for call in (empty, blank)]


BEGUN, MORE = start(input_tokens=3), {"type": "content_block_delta", "delta": {"text": "x" * 9}}


@pytest.mark.parametrize("events, expected", [
    ([BEGUN, MORE], 152), ([BEGUN, MORE, {"type": "message_stop"}], 152),
    ([BEGUN, MORE, delta(None, input_tokens=40, output_tokens=9)], 152),
    ([BEGUN, MORE, delta(output_tokens=9), {"type": "message_stop"}], 152),
    ([BEGUN, MORE, delta(input_tokens=2, output_tokens=9)], 152),
    ([BEGUN, MORE, delta(None, input_tokens=40, output_tokens=9),
      delta(input_tokens=-1, output_tokens=9)], 152),
    ([BEGUN, MORE, delta(input_tokens=40, output_tokens=9)], 85),
    ([BEGUN, MORE, delta(input_tokens=40, output_tokens=9), MORE], 130),
    ([BEGUN, MORE, delta(input_tokens=40, output_tokens=-9)], 85),
])
def test_what_a_call_that_loops_costs(events, expected):
    """Its input counts from the last report only; else its bound and the fees are charged."""
    call = call_of("messages", events=events, level={"samplings": 2,
                                                     "fees_picodollars": 7 * 10 ** 6})

    assert expected == cost_of(call)[0]


def test_reasoning_beside_the_cap_is_charged_as_far_as_it_can_have_been_made():
    call = call_of(events=[text("x" * (CAP + 300))], bound={"reasoning_tokens": 1_000})

    assert 100 + 5 * (CAP + 300) == cost_of(call)[0]


def test_output_beside_the_cap_is_always_charged():
    """A prediction that was rejected: billed, and never seen."""
    call = call_of(status=None)
    call.bound = call.bound._replace(unlimited_output_tokens=50)

    assert 350 == cost_of(call)[0]


@pytest.mark.parametrize("events, expected", [
    # A report counts, however the call ends.
    ([text("x", usage={"prompt_tokens": 10, "completion_tokens": 90})], 460),
    ([text("x", usage={"prompt_tokens": 10, "completion_tokens": 2_000})], 10_010),
    ([text("x", usage={"prompt_tokens": 10, "completion_tokens": 1, "total_tokens": 70})], 310),
    ([usage(10, 20), {"usage": {"prompt_tokens": -1, "total_tokens": 90}}], 10 + 80 * 5),
    ([{"usage": {"prompt_tokens": -1, "completion_tokens": 3, "total_tokens": 90}}], 115),
    ([usage(10, 20), usage(9, -1)], 110), ([usage(10, 20), usage(9, 30), {"usage": 5}], 160),
    ([text("x", finish="stop"), usage(10, 20), {"usage": {"prompt_tokens": 10.0}}], 110),
    ([text("x", finish="stop"), usage(), b'{"usage":{"prompt_tokens":' + b"9" * 5_000 + b"}}"],
     110),
    # Zero is no count of the input.
    ([text("x", usage={"prompt_tokens": 0, "completion_tokens": 2})], 110),
])
def test_what_was_reported_is_not_lost(events, expected):
    cost, estimated = cost_of(call_of(events=events))

    assert expected == cost
    assert estimated is not None


@pytest.mark.parametrize("events, usage_expected", [
    ([start(input_tokens=100, cache_creation_input_tokens=60, cache_creation={
        "ephemeral_1h_input_tokens": 60, "ephemeral_5m_input_tokens": 0}),
      delta(input_tokens=100, cache_creation_input_tokens=60, output_tokens=2)],
     {"input_tokens": 100, "cache_creation_input_tokens": 60, "output_tokens": 2,
      "cache_creation": {
         "ephemeral_1h_input_tokens": 60, "ephemeral_5m_input_tokens": 0}}),
    ([start(input_tokens=10, cache_creation_input_tokens=60, cache_creation={
        "ephemeral_1h_input_tokens": 50, "ephemeral_5m_input_tokens": 10}),
      delta(input_tokens=200, cache_creation_input_tokens=40, output_tokens=2)],
     {"input_tokens": 200, "cache_creation_input_tokens": 40, "output_tokens": 2,
      "cache_creation": {
         "ephemeral_1h_input_tokens": 40, "ephemeral_5m_input_tokens": 0}}),
    # What was written after the start has the dearest lifetime that there was.
    ([start(input_tokens=10, cache_creation_input_tokens=20, cache_creation={
        "ephemeral_1h_input_tokens": 10, "ephemeral_5m_input_tokens": 10}),
      delta(input_tokens=10, cache_creation_input_tokens=60, output_tokens=2)],
     {"input_tokens": 10, "cache_creation_input_tokens": 60, "output_tokens": 2,
      "cache_creation": {
         "ephemeral_1h_input_tokens": 50, "ephemeral_5m_input_tokens": 10}}),
    ([start(input_tokens=200), delta(input_tokens=10, cache_read_input_tokens=190,
                                     output_tokens=2)],
     {"input_tokens": 10, "cache_read_input_tokens": 190, "output_tokens": 2}),
    ([start(input_tokens=10, cache_read_input_tokens=500),
      delta(input_tokens=300, cache_creation_input_tokens=400, output_tokens=2)],
     {"input_tokens": 300, "cache_creation_input_tokens": 400, "output_tokens": 2}),
    ([start(input_tokens=10), delta(output_tokens=2, server_tool_use={"web_search_requests": 3}),
      delta(output_tokens=2, server_tool_use={"web_search_requests": 1})],
     {"input_tokens": 10, "output_tokens": 2, "server_tool_use": {"web_search_requests": 3}}),
])
def test_input_is_one_set_of_counts_with_the_lifetimes_of_its_writes(events, usage_expected):
    meter = call_of("messages", events=events).meter

    assert (usage_expected, True) == (meter.usage, meter.usage_is_final)


ONCE = [{"type": "message", "input_tokens": 10, "output_tokens": 2},
        {"type": "compaction", "input_tokens": 900, "output_tokens": 30}]


@pytest.mark.parametrize("late", [
    {"output_tokens": 3}, {"output_tokens": 2, "iterations": [{"input_tokens": -1}]},
    {"output_tokens": 2, "iterations": ONCE[:1]}])
def test_iterations_that_were_reported_are_not_lost(late):
    """Without them the charge is not exact, and the input counts as not known."""
    exact = call_of("messages", events=[start(input_tokens=10), delta(
        input_tokens=10, output_tokens=2, iterations=ONCE)])
    after = call_of("messages", events=[start(input_tokens=10), delta(
        input_tokens=10, output_tokens=2, iterations=ONCE), delta(**late)])

    assert (910 + 32 * 5, None) == cost_of(exact)
    assert cost_of(after, 1)[0] == (910 + 32 * 5 if late.get("iterations") == ONCE[:1]
                                    else 100 + CAP * 5)


def test_a_model_without_a_price_that_served_part_of_it_leaves_the_input_unknown():
    advised = [{"input_tokens": 10, "output_tokens": 2},
               {"input_tokens": 10, "output_tokens": 2, "model": "unknown"}]
    call = call_of("messages", events=[
        start(input_tokens=10), delta(input_tokens=10, output_tokens=2, iterations=advised)])

    assert (100 + 500 * 5, "a model without a price served it") == cost_of(call, 0.5)


def test_a_call_without_a_bound_costs_what_was_reported():
    """No budget is set: nothing was reserved, and spend is only counted."""
    call = call_of(events=[usage(10, 20), usage(10, -1)])
    call.bound, call.reservation = None, SimpleNamespace(microdollars=0, output_cap=0)
    silent = call_of(status=None)
    silent.bound, silent.reservation = None, call.reservation

    assert (110, "malformed usage: completion_tokens is not a token count") == cost_of(call, 9)
    assert (0, "no answer") == cost_of(silent, 9)
    silent.model, silent.price = "unknown", None
    assert (0, "no answer") == cost_of(silent, 9)


def test_running_usage_is_final_once_all_choices_have_finished_and_the_body_has_ended():
    counts = {"prompt_tokens": 10, "completion_tokens": 5}
    cut, ended = [call_of(events=[text("Hello", finish="stop", usage=counts)]) for _ in range(2)]
    half = call_of(n=2, events=[text("a", 1), text("Hello", finish="stop", usage=counts)])
    early = call_of(n=2, events=[text("a", 1), text("Hello", finish="stop"), usage(10, 5)])
    for call in (ended, half):
        call.meter.end_body()

    assert [True, False, True, True] == [
        cost_of(call)[1] is not None for call in (cut, ended, half, early)]


@pytest.mark.parametrize("streams", [True, False])
@pytest.mark.parametrize("outputs, more, output_tokens, is_exact", [
    ((5, 7), {}, 12, True), ((5, None), {}, 5, False), ((5, -1), {}, 5, False),
    ((5, "7"), {}, 5, False),
    ((5, None), {"usage": {"prompt_tokens": 10, "completion_tokens": 12}}, 12, True),
    ((5, 7), {"x_groq": {"usage": {"prompt_tokens": 10, "completion_tokens": 12}}}, 12, True)])
def test_usage_that_each_of_several_choices_has_is_added_up(streams, outputs, more, output_tokens,
                                                            is_exact):
    choices = [{"index": index, "delta": {"content": "a"}, "finish_reason": "stop",
                "usage": completion and {"prompt_tokens": 10, "completion_tokens": completion,
                                         "total_tokens": 15}}
               for index, completion in enumerate(outputs)]
    call = call_of(n=2, streams=streams, **(
        {"events": [*({"choices": [choice]} for choice in choices), {"choices": [], **more},
                    b"[DONE]"]} if streams else {"answer": {"choices": choices, **more}}))

    assert output_tokens == call.meter.reported.completion_tokens
    microdollars, reason = cost_of(call)
    assert is_exact == (reason is None)
    assert 10 + 5 * output_tokens == microdollars if is_exact else 10 + 5 * 5 <= microdollars


@pytest.mark.parametrize("prompt, is_whole", [
    ("a", True), (["a"], True), ([1, 2], True), (["a", "b"], False), ([[1], [2]], False)])
def test_a_stream_that_is_cut_after_one_of_several_prompts_is_no_exact_count(prompt, is_whole):
    events = [{"choices": [{"index": 0, "text": "x", "finish_reason": "stop"}]}, usage(10, 1)]

    assert is_whole == (cost_of(call_of("completions", prompt=prompt, events=events))[1] is None)


@pytest.mark.parametrize("api", sorted(ic.EVENT_READERS))
def test_an_event_that_is_an_error_reports_its_usage_once(api, monkeypatch):
    reports, report = [], ic.AnswerMeter._report
    monkeypatch.setattr(ic.AnswerMeter, "_report", lambda meter, counts: (
        reports.append(counts), report(meter, counts)))
    error = {"type": "error", "error": {"type": "overloaded"}, "choices": [],
             "usage": {"prompt_tokens": 9, "input_tokens": 9}}

    meter = call_of(api, events=[error]).meter

    assert ([error["usage"]], "overloaded") == (reports, meter.failure)


@pytest.mark.parametrize("events, size", [
    ([{"type": "response.output_text.delta", "delta": "abc"},
      {"type": "response.output_item.done", "item": {"type": "message", "id": "msg_1", "content": [
          {"type": "output_text", "text": "abcd"}]}}], 4),
    ([{"type": "response.output_item.done", "item": {"type": "reasoning", "id": "rs_1",
                                                     "encrypted_content": "x" * 90}},
      {"type": "response.output_text.delta", "delta": "abc"},
      {"type": "response.output_item.done", "item": {"content": [{"text": "abc"}]}}], 93),
])
def test_items_that_are_done_count_as_output_but_once(events, size):
    assert size == call_of("responses", events=events).meter.output_bytes


def test_results_of_tools_and_names_of_types_are_no_output():
    events = [{"type": "content_block_start", "content_block": {
        "type": "web_search_tool_result", "content": [{"encrypted_content": "x" * 900}]}},
        {"type": "content_block_start", "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "delta": {"type": "text_delta", "text": "abc"}}]

    assert 3 == call_of("messages", events=events).meter.output_bytes
    assert 0 == call_of(events=[{"choices": [{"delta": {"role": "assistant"}}]}]).meter.output_bytes


@pytest.mark.parametrize("depth, counted", [(150, 1), (400, None), (100_000, None)])
def test_output_that_is_nested_deeply_is_counted_without_recursion(depth, counted):
    nested = b'{"choices":[{"index":0,"delta":' + b'{"a":' * depth + b'"b"' + b"}" * depth + b"}]}"

    assert (counted or len(nested)) == call_of(events=[nested]).meter.output_bytes


@pytest.mark.parametrize("api", sorted(ic.EVENT_READERS))
@pytest.mark.parametrize("value", [-1, 1.5, 1e15, 10 ** 20, True, "9", [9], {"a": 9}, None, {}, [],
                                   {"input_tokens": {"a": 1}}], ids=repr)
def test_no_usage_makes_a_meter_raise(api, value):
    names = ("input_tokens", "output_tokens", "prompt_tokens", "completion_tokens", "total_tokens",
             "cache_creation", "iterations", "server_tool_use", "prompt_tokens_details")
    for usages in ([value, value], [{name: value} for name in names],
                   [dict.fromkeys(names, value), dict.fromkeys(names, 5), {names[0]: value}]):
        for shape in (lambda u: {"usage": u}, lambda u: {**text("x"), "usage": u},
                      lambda u: {"type": "message_start", "message": {"usage": u}},
                      lambda u: {"type": "message_delta", "usage": u}, lambda u: {
                          "type": "response.completed", "response": {"usage": u}}):
            call = call_of(api, events=[*map(shape, usages)])
            call.meter.read_answer(json.dumps(shape(usages[0])).encode())

            charge = ic.charge_of(call, BOOK, 10 ** 8)
            assert charge.microdollars == ic.total_of(charge.lines)
            row = {}
            ic.complete_row(row, call, charge, 10 ** 8)
            assert ic.audit_row({**row, "model": "m", "api": api,
                                 "usage": json.dumps(row["usage"]) if row["usage"] else None,
                                 "lines": ic.lines_to_json(row["lines"])}) is None
