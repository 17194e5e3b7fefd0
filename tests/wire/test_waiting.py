"""Waiting in line and lowering, over real sockets; and the ways in which other gateways let spend
pass their limits (the seven vectors), each as an attack on this one."""
import contextlib
import json
import socket
import threading
from types import SimpleNamespace

import pytest
from support import Gate, RawClient, Reply, call, program, settled_status, status_of, until

CHAT = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "hello"}]}
AGENT = {**CHAT, "max_tokens": 64_000}          # at $0.60 a million, $0.0384 and the input


def held_open(mock, gate):
    """The next answer of the mock is held back until the gate opens."""
    mock.script(lambda request: mock.default_reply(request).with_steps(
        [gate, *mock.default_reply(request).steps]))


def in_thread(port, fields, path="/v1/chat/completions"):
    answers = []
    thread = threading.Thread(
        target=lambda: answers.append(call(port, "POST", path, fields)))
    thread.start()
    return thread, answers


def wait_for_line(proxy, length):
    controller = proxy.router.controller
    until(lambda: len(controller._queue) == length, f"{length} wait in line")


def test_a_client_that_left_as_its_turn_came_is_not_served(proxy):
    """Between the decision and the sending: a call that did not wait is not looked at."""
    ic, (ours, theirs) = program(), socket.socketpair()
    request = SimpleNamespace(caller=ic.Caller("default", "0" * 64))
    with ours:
        client = ic.Wire(ours)
        theirs.close()
        for decided in (None, threading.Event()):
            call_ = SimpleNamespace(request=request,
                                    reservation=SimpleNamespace(decided=decided))
            with pytest.raises(ic.ClientGone) if decided else contextlib.nullcontext():
                proxy.router._check_is_still_wanted(call_, client)


def test_a_request_waits_for_what_another_holds_and_then_goes_as_it_is(mock, proxy_for):
    proxy = proxy_for("--budget", "0.006")
    gate = Gate()
    held_open(mock, gate)
    first, _ = in_thread(proxy.port, {**CHAT, "max_tokens": 9_000})
    mock.wait_for_requests(1)

    second, answers = in_thread(proxy.port, {**CHAT, "max_tokens": 9_000})
    wait_for_line(proxy, 1)
    gate.event.set()
    first.join(), second.join()

    assert 200 == answers[0].status
    assert 9_000 == mock.seen[1].json["max_tokens"]
    assert mock.billed_microdollars == settled_status(proxy)["spent_microdollars"]


def test_a_cap_that_does_not_fit_is_lowered_and_told(mock, proxy_for):
    proxy = proxy_for("--budget", "0.02")

    answer = call(proxy.port, "POST", "/v1/chat/completions", {
        **AGENT, "max_completion_tokens": 90_000})

    told = int(answer.header("x-ironcage-max-tokens"))
    sent = mock.seen[0].json
    assert (200, told, told) == (answer.status, sent["max_tokens"], sent["max_completion_tokens"])
    assert 8_192 < told < 16_667                        # at most half of $0.02


def test_only_the_larger_of_two_caps_is_lowered(mock, proxy_for):
    proxy = proxy_for("--budget", "0.02")

    call(proxy.port, "POST", "/v1/chat/completions", {
        **CHAT, "max_tokens": 5, "max_completion_tokens": 90_000})

    assert 5 == mock.seen[0].json["max_tokens"]
    assert 90_000 > mock.seen[0].json["max_completion_tokens"]


def test_no_fit_refuses_instead_with_the_affordable_number(mock, proxy_for):
    proxy = proxy_for("--budget", "0.02", "--no-fit")

    answer = call(proxy.port, "POST", "/v1/chat/completions", AGENT)

    assert 402 == answer.status
    affordable = answer.json["error"]["ironcage"]["affordable_output_tokens"]
    again = call(proxy.port, "POST", "/v1/chat/completions", {**AGENT, "max_tokens": affordable})
    assert (200, 1) == (again.status, len(mock.seen))


def test_wait_0_does_not_wait(mock, proxy_for):
    proxy = proxy_for("--budget", "0.006", "--wait", "0")
    gate = Gate()
    held_open(mock, gate)
    with RawClient(proxy.port) as client:
        client.request("POST", "/v1/chat/completions",
                       json.dumps({**CHAT, "max_tokens": 9_000}).encode())
        mock.wait_for_requests(1)

        answer = call(proxy.port, "POST", "/v1/chat/completions", {**CHAT, "max_tokens": 9_000})
        gate.event.set()
        client.read_answer()

    assert 402 == answer.status


def test_who_hangs_up_while_waiting_leaves_the_line_and_nothing_is_sent(mock, proxy_for):
    proxy = proxy_for("--budget", "0.006")
    gate = Gate()
    held_open(mock, gate)
    first, _ = in_thread(proxy.port, {**CHAT, "max_tokens": 9_000})
    mock.wait_for_requests(1)
    client = RawClient(proxy.port)
    client.request("POST", "/v1/chat/completions",
                   json.dumps({**CHAT, "max_tokens": 9_000}).encode())
    wait_for_line(proxy, 1)

    client.close()

    wait_for_line(proxy, 0)
    gate.event.set()
    first.join()
    assert mock.billed_microdollars == settled_status(proxy)["spent_microdollars"]
    assert 1 == len(mock.seen)


def test_at_the_stop_those_who_wait_get_503(mock, proxy_for):
    proxy = proxy_for("--budget", "0.006")
    gate = Gate()
    held_open(mock, gate)
    first, held = in_thread(proxy.port, {**CHAT, "max_tokens": 9_000})
    mock.wait_for_requests(1)
    second, answers = in_thread(proxy.port, {**CHAT, "max_tokens": 9_000})
    wait_for_line(proxy, 1)

    stopping = threading.Thread(target=proxy.stop)
    stopping.start()
    second.join()
    gate.event.set()
    first.join(), stopping.join()

    assert (503, 200) == (answers[0].status, held[0].status)


def test_status_does_not_queue_behind_model_calls(mock, proxy_for):
    proxy = proxy_for("--budget", "0.006")
    gate = Gate()
    held_open(mock, gate)
    first, _ = in_thread(proxy.port, {**CHAT, "max_tokens": 9_000})
    mock.wait_for_requests(1)
    second, _ = in_thread(proxy.port, {**CHAT, "max_tokens": 9_000})
    wait_for_line(proxy, 1)

    assert status_of(proxy)["reserved_microdollars"] > 5_000
    gate.event.set()
    first.join(), second.join()


# (budget, thinking tokens asked for, sent)
LOWERED_THINKING = [("0.03", 4_000, 4_000), ("0.03", 6_000, 3_000), ("0.03", 31_999, 3_999),
                    ("0.012", 31_999, 1_024), ("0.012", 1_024, 1_024), ("1", 31_999, 31_999)]


@pytest.mark.parametrize("budget, asked, sent", LOWERED_THINKING)
def test_a_thinking_budget_falls_with_the_cap_by_halves(mock, proxy_for, budget, asked, sent):
    proxy = proxy_for("--budget", budget)
    fields = {"model": "claude-haiku-4-5", "max_tokens": 32_000,
              "messages": [{"role": "user", "content": "hello"}],
              "thinking": {"type": "enabled", "budget_tokens": asked}}

    answer = call(proxy.port, "POST", "/v1/messages", fields)

    assert 200 == answer.status, answer.body
    seen = mock.seen[0].json
    assert {"type": "enabled", "budget_tokens": sent} == seen["thinking"]
    assert seen["thinking"]["budget_tokens"] < seen["max_tokens"]
    assert (None if asked == sent else f"thinking.budget_tokens={sent}") == \
        answer.header("x-ironcage-adjusted")


def test_what_leaves_no_room_for_the_least_thinking_is_refused(mock, proxy_for):
    answer = call(proxy_for("--budget", "0.01").port, "POST", "/v1/messages", {
        "model": "claude-haiku-4-5", "max_tokens": 32_000,
        "messages": [{"role": "user", "content": "hello"}],
        "thinking": {"type": "enabled", "budget_tokens": 31_999}})

    assert (402, []) == (answer.status, mock.seen)


def test_4_concurrent_calls_at_64000_tokens_on_half_a_dollar_none_refused_none_over(
        mock, proxy_for):
    """The complaint about gateways that reserve: calls 3 and 4 were refused while the real spend
    was a tenth of a cent. gpt-4o: $10 a million tokens of output."""
    proxy = proxy_for("--budget", "0.50")
    calls = [in_thread(proxy.port, {**AGENT, "model": "gpt-4o"}) for _ in range(4)]
    while any(thread.is_alive() for thread, _ in calls):
        status = status_of(proxy)
        assert status["spent_microdollars"] + status["reserved_microdollars"] <= 500_000
    for thread, _ in calls:
        thread.join()

    assert [200] * 4 == [answers[0].status for _, answers in calls]
    assert mock.billed_microdollars == settled_status(proxy)["spent_microdollars"] < 1_000


# The seven vectors.

def test_vector_a_a_request_without_a_cap_is_capped_at_the_provider_too(mock, proxy_for):
    proxy = proxy_for("--budget", "0.02")
    gate = Gate()
    held_open(mock, gate)
    client, _ = in_thread(proxy.port, CHAT)
    mock.wait_for_requests(1)

    reserved = status_of(proxy)["reserved_microdollars"]
    gate.event.set()
    client.join()

    cap = mock.seen[0].json["max_completion_tokens"]
    assert cap * 600_000 <= reserved * 10 ** 6 <= (cap + 1_000) * 600_000


def test_vector_b_a_reservation_is_never_smaller_than_what_the_call_may_cost(mock, proxy_for):
    """Others resize the reservation to what is left, and send the request as it is."""
    proxy = proxy_for("--budget", "0.02")
    mock.output_tokens = 10 ** 6                       # it uses all that it is allowed to

    mock.script(lambda request: Reply(steps=(json.dumps({
        "model": "gpt-4o-mini", "choices": [], "usage": {
            "prompt_tokens": 9, "completion_tokens": request.json["max_tokens"]}}).encode(),)))
    call(proxy.port, "POST", "/v1/chat/completions", AGENT)

    status = settled_status(proxy)
    assert status["spent_microdollars"] <= 20_000
    assert 0 == status["bound_exceeded"]


@pytest.mark.parametrize("row", [None, {"input_cost_per_token": "cheap"},
                                 {"input_cost_per_token": -1, "output_cost_per_token": 1}])
def test_vector_c_a_model_without_a_usable_price_is_not_admitted(mock, proxy_for, tmp_path, row):
    pricing = tmp_path / "pricing.json"
    pricing.write_text(json.dumps({"gpt-4o-mini": row} if row else {}))
    proxy = proxy_for("--budget", "1", "--pricing", str(pricing))

    answer = call(proxy.port, "POST", "/v1/chat/completions", AGENT)

    assert (400, []) == (answer.status, mock.seen)


@pytest.mark.parametrize("usage", [
    {"input_tokens": 0, "cache_creation_input_tokens": 3_000, "output_tokens": 50},
    {"input_tokens": 0, "cache_creation_input_tokens": 3_000, "output_tokens": 50,
     "cache_creation": {"ephemeral_1h_input_tokens": 3_000}},
])
def test_vector_d_input_is_bounded_at_the_rate_of_writing_it_to_a_cache(mock, proxy, usage):
    text = "x" * 6_000
    fields = {"model": "claude-haiku-4-5", "max_tokens": 50, "messages": [{
        "role": "user", "content": [{"type": "text", "text": text,
                                     "cache_control": {"type": "ephemeral", "ttl": "1h"}}]}]}
    mock.script(Reply(steps=(json.dumps({
        "type": "message", "model": "claude-haiku-4-5", "content": [],
        "usage": usage}).encode(),)))

    call(proxy.port, "POST", "/v1/messages", fields)

    assert 0 == settled_status(proxy)["bound_exceeded"]


@pytest.mark.parametrize("path, fields", [
    ("/v1/messages", {"model": "claude-haiku-4-5", "max_tokens": 10, "system": "TEXT",
                      "messages": [{"role": "user", "content": "hi"}]}),
    ("/v1/messages", {"model": "claude-haiku-4-5", "max_tokens": 10,
                      "messages": [{"role": "user", "content": "hi"}], "tools": [
                          {"name": "t", "description": "TEXT",
                           "input_schema": {"type": "object"}}]}),
    ("/v1/responses", {"model": "gpt-4o-mini", "max_output_tokens": 16, "input": "hi",
                       "instructions": "TEXT"}),
    ("/v1/responses", {"model": "gpt-4o-mini", "max_output_tokens": 16, "input": "hi",
                       "tools": [{"type": "function", "name": "t", "description": "TEXT"}]}),
    ("/v1/chat/completions", {**CHAT, "max_tokens": 10, "response_format": {
        "type": "json_schema", "json_schema": {"name": "TEXT", "schema": {}}}}),
])
def test_vector_e_every_text_in_the_body_is_in_the_bound(mock, proxy_for, path, fields):
    """System prompts, instructions, tools and schemas: 20,000 bytes do not fit into a cent."""
    text = json.dumps(fields).replace("TEXT", "some words " * 20_000)
    proxy = proxy_for("--budget", "0.01")

    refused = call(proxy.port, "POST", path, json.loads(text))
    admitted = call(proxy.port, "POST", path, fields)

    assert (402, 200) == (refused.status, admitted.status)


def test_vector_f_what_cannot_be_written_down_is_not_sent(mock, proxy_for, tmp_path):
    proxy = proxy_for("--budget", "1", "--ledger", str(tmp_path / "cage.db"))
    proxy.ledger._db.close()

    answer = call(proxy.port, "POST", "/v1/chat/completions", AGENT)

    assert (503, "iron_cage_ledger_unavailable") == (answer.status, answer.json["error"]["type"])
    assert ([], 0) == (mock.seen, settled_status(proxy)["spent_microdollars"])


@pytest.mark.parametrize("path", ["/v1/batches", "/v1/messages/batches"])
def test_vector_g_batches_are_refused_under_a_budget(mock, proxy, path):
    assert 400 == call(proxy.port, "POST", path, {"input_file_id": "f"}).status
    assert [] == mock.seen


def test_vector_g_amounts_are_whole_microdollars_and_scopes_are_taken_together():
    controller = program().CostController(10)
    controller.set_scopes([program().Scope("a", 5, "total", None, lambda since_s: 0)])

    refused = controller.ask(program().fixed_bound(6), ["a"])

    assert refused.refused_by.scope == "a"
    assert (0, 0) == (controller.total_reserved(), controller.budget("a").reserved)
    with pytest.raises(ValueError):
        controller.reserve(0.5)
