"""Two limits: `--budget` is never passed; `--stop-at` ends earlier, and lets what is in flight end."""
import json
import threading
from random import Random

import pytest
from support import (ADMIN_TOKEN, TOKEN, Gate, RawClient, call, each_seed, program, settled_status,
                     until)

ic = program()
CHAT = {"model": "gpt-4o-mini", "max_tokens": 400,
        "messages": [{"role": "user", "content": "hello there"}]}


def chat(proxy, token=TOKEN, **more):
    return call(proxy.port, "POST", "/v1/chat/completions", {**CHAT, **more}, token=token)


def spend_until(proxy, status, **more):
    """Call until an answer has this status: (how many did not, that answer)."""
    for count in range(500):
        answer = chat(proxy, **more)
        if answer.status == status:
            return count, answer
    raise AssertionError("it goes on and on")


def put(proxy, **fields):
    return call(proxy.port, "PUT", "/ironcage/budget", fields, token=ADMIN_TOKEN)


def fixed(amount):
    return ic.fixed_bound(amount)


# The controller.

def test_once_the_stop_is_spent_no_call_begins_and_before_that_all_of_the_budget_can_be_reserved():
    controller = ic.CostController(2_000, stop_at=1_000)
    controller.add_spend(999)
    last = controller.reserve(1_001)
    controller.commit(last, 1)

    with pytest.raises(ic.BudgetExceeded) as refused:
        controller.reserve(1)
    with pytest.raises(ic.BudgetExceeded):
        controller.check_budget()
    assert type(refused.value) is ic.BudgetExceeded
    assert "stop_at" == refused.value.details["limit"]
    assert "Spent: $0.001, Reserved: $0.00, Stop at: $0.001." in refused.value.message
    assert 0 == controller.available() == controller.budget().as_json()["available_microdollars"]
    assert 0 == controller.ask(fixed(0)).microdollars              # what is free always passes


@pytest.mark.parametrize("spent, ended_by", [
    (0, None), (999, None), (1_000, "stop_at"), (1_999, "stop_at"), (2_000, "budget"),
    (9_999, "budget")])
def test_a_refusal_says_which_limit_ended_it(spent, ended_by):
    assert ended_by == ic.Budget("proxy", 2_000, spent, 0, 1_000).ended_by


def test_those_who_wait_are_refused_when_the_stop_is_reached_and_no_sooner():
    controller = ic.CostController(2_000, stop_at=1_000)
    flights = [controller.reserve(900), controller.reserve(900)]
    waiting = [controller.ask(fixed(1_000), may_wait=True) for _ in range(3)]
    controller.commit(flights[0], 600)
    assert all(claim.is_waiting for claim in waiting)

    controller.commit(flights[1], 400)

    assert ["stop_at"] * 3 == [claim.refused_by.ended_by for claim in waiting]
    assert all(claim.decided.is_set() for claim in waiting)


def test_new_limits_decide_at_once_about_those_who_wait():
    controller = ic.CostController(1_000)
    controller.reserve(900)
    first, second = (controller.ask(fixed(500), may_wait=True) for _ in range(2))

    controller.set_limits(limit=1_500)
    assert first.is_open and second.is_waiting
    controller.set_limits(stop_at=0)

    assert "stop_at" == second.refused_by.ended_by


def test_a_stop_without_a_limit_stops_too():
    """No setting makes one; the controller does not rest on that."""
    controller = ic.CostController(stop_at=1_000)
    controller.commit(controller.reserve(10 ** 9), 1_000)

    with pytest.raises(ic.BudgetExceeded, match="Stop at"):
        controller.reserve(1)


def test_limits_are_set_together_or_not_at_all():
    controller = ic.CostController(2_000, stop_at=1_000)

    for changes in ({"limit": 1_000}, {"stop_at": 2_000}, {"limit": None},
                    {"limit": 500, "stop_at": 600}):
        with pytest.raises(ValueError, match="must be below the budget"):
            controller.set_limits(**changes)
        assert (2_000, 1_000) == (controller.budget().limit, controller.budget().stop_at)
    controller.set_limits(stop_at=None)
    controller.set_limits(limit=500)

    assert (500, None) == (controller.budget().limit, controller.budget().stop_at)


def test_a_stop_by_period_begins_anew_with_it():
    now_s = [10 * ic.DAY_S]
    controller = ic.CostController(10_000, clock=lambda: now_s[0])
    controller.set_scopes([program().Scope("a", 500, "day", 100, lambda since_s: 0)])
    controller.commit(controller.ask(fixed(200), ["a"]), 150)
    stopped = controller.ask(fixed(1), ["a"])
    now_s[0] += ic.DAY_S

    assert ("a", "stop_at") == (stopped.refused_by.scope, stopped.refused_by.ended_by)
    assert controller.ask(fixed(1), ["a"]).is_open


@each_seed(40)
def test_any_schedule_admits_nothing_past_the_stop_and_never_passes_the_budget(seed):
    rng = Random(seed)
    limit = rng.randrange(1_000, 5_000)
    stop_at = rng.randrange(limit)
    controller, flights, line = ic.CostController(limit, stop_at=stop_at), [], []
    for _ in range(200):
        spent = controller.total_spent()
        if rng.random() < 0.5:
            line.append(controller.ask(fixed(rng.randrange(1, 900)), may_wait=rng.random() < 0.6))
            assert spent < stop_at or line[-1].refused_by is not None
        elif flights:
            flight = flights.pop(rng.randrange(len(flights)))
            controller.commit(flight, rng.randrange(flight.microdollars + 1) // 3)
        flights += [claim for claim in line if claim.is_open]
        line = [claim for claim in line if claim.is_waiting]

        budget = controller.budget()
        assert budget.spent + budget.reserved <= limit
        assert not line or budget.spent < stop_at


# Over HTTP.

def test_the_stop_ends_calls_in_each_dialect_and_the_status_shows_it(mock, proxy_for):
    proxy = proxy_for("--budget", "2", "--stop-at", "0.0005")
    count, refused = spend_until(proxy, 402)
    status = settled_status(proxy)
    message = call(proxy.port, "POST", "/v1/messages", {**CHAT, "model": "claude-haiku-4-5"})

    assert count > 1
    assert ("iron_cage_budget_exceeded", "budget_exceeded", "stop_at") == (
        refused.json["error"]["type"], refused.json["error"]["code"],
        refused.json["error"]["ironcage"]["limit"])
    assert "false" == refused.header("x-should-retry")
    assert (402, "billing_error", "stop_at") == (
        message.status, message.json["error"]["type"], message.json["error"]["ironcage"]["limit"])
    assert (500, 2_000_000, 0) == (status["stop_at_microdollars"], status["limit_microdollars"],
                                   status["available_microdollars"])
    assert 500 <= status["spent_microdollars"] == mock.billed_microdollars


def test_a_spent_budget_is_told_from_a_stop(mock, proxy_for):
    proxy = proxy_for("--budget", "0")

    assert "budget" == chat(proxy).json["error"]["ironcage"]["limit"]
    assert None is call(proxy.port, "GET", "/ironcage/budget").json["stop_at_microdollars"]


def test_many_clients_pass_the_stop_by_what_was_in_flight_and_never_the_budget(mock, proxy_for):
    """A poller looks all the while: once the stop is spent, nothing more is ever sent."""
    proxy = proxy_for("--budget", "0.004", "--stop-at", "0.002")
    controller, sent_late, too_much, is_over = proxy.router.controller, [], [], threading.Event()
    seen_at_stop = []

    def poll():
        while not is_over.wait(0.0005):               # which leaves the others the interpreter
            spent, reserved, limit = controller.get_full_status()
            if spent + reserved > limit:
                too_much.append((spent, reserved))
            if spent >= 2_000 and reserved == 0:
                seen_at_stop.append(len(mock.seen))

    def client():
        while True:
            spent = controller.total_spent()
            answer = chat(proxy)
            if answer.status == 402:
                return
            if spent >= 2_000:
                sent_late.append(spent)

    poller = threading.Thread(target=poll)
    threads = [threading.Thread(target=client) for _ in range(12)]
    for thread in (poller, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    is_over.set()
    poller.join()
    status = settled_status(proxy)

    assert ([], []) == (sent_late, too_much)
    assert len(set(seen_at_stop)) <= 1
    assert 2_000 <= status["spent_microdollars"] == mock.billed_microdollars <= 4_000


def test_a_call_that_waits_is_refused_at_once_when_the_stop_is_reached(mock, proxy_for):
    """Long before its --wait is over: the test would not end in time."""
    proxy = proxy_for("--budget", "0.0005", "--stop-at", "0.00001", "--wait", "3600", "--no-fit")
    gate = Gate()
    mock.script(lambda request: mock.default_reply(request).with_steps(
        [gate, *mock.default_reply(request).steps]))
    with RawClient(proxy.port) as first, RawClient(proxy.port) as second:
        first.request("POST", "/v1/chat/completions", json.dumps(CHAT).encode())
        mock.wait_for_requests(1)
        second.request("POST", "/v1/chat/completions", json.dumps({**CHAT, "max_tokens": 700}
                                                                  ).encode())
        until(lambda: proxy.router.controller._queue, "one waits in line")
        gate.event.set()
        answered, refused = first.read_answer(), second.read_answer()

    assert (200, 402) == (answered.status, refused.status)
    assert "stop_at" == refused.json["error"]["ironcage"]["limit"]
    assert 1 == len(mock.seen)


# Settings.

@pytest.mark.parametrize("argv, environ", [
    (["--stop-at", "1"], {}), (["--budget", "1", "--stop-at", "1"], {}),
    (["--budget", "1", "--stop-at", "1.000001"], {}), (["--budget", "1", "--stop-at", "x"], {}),
    (["--budget", "0", "--stop-at", "0"], {}), (["--budget", "1"], {"IRONCAGE_STOP_AT": "2"}),
    ([], {"IRONCAGE_STOP_AT": "2"}), (["--stop-at", "3"], {"IRONCAGE_BUDGET": "2"}),
    ([], {"IRONCAGE_BUDGET": "two"})], ids=repr)
def test_a_stop_that_is_not_below_a_budget_is_refused_at_the_start(argv, environ, capsys,
                                                                   monkeypatch):
    for name, value in environ.items():
        monkeypatch.setenv(name, value)

    assert 2 == ic.main(["check", "--port", "0", *argv])
    message = capsys.readouterr().err
    assert 1 == message.count("\n")
    assert "--stop-at: " in message or "IRONCAGE_" in message


def test_both_limits_can_come_from_the_environment_and_a_flag_wins():
    environ = {"IRONCAGE_BUDGET": "5", "IRONCAGE_STOP_AT": "4"}

    both, flagged = ic.settings_from([], environ), ic.settings_from(["--stop-at", "3"], environ)

    assert [(5_000_000, 4_000_000), (5_000_000, 3_000_000)] == [
        (one.budget_microdollars, one.stop_at_microdollars) for one in (both, flagged)]


def test_the_banner_and_check_name_the_stop(proxy_for, capsys):
    proxy = proxy_for("--budget", "2", "--stop-at", "1.5")

    assert 0 == ic.main(["check", "--port", "0", "--budget", "2", "--stop-at", "1.5"])
    assert "$2.00, stopping at $1.50" in capsys.readouterr().out
    assert "$2.00, stopping at $1.50" in ic.banner(proxy)


def test_an_embedded_router_takes_a_stop(mock):
    environ = {"OPENAI_API_KEY": "sk-test-0123456789abcdef",
               "IRONCAGE_OPENAI_BASE_URL": mock.url + "/v1"}
    with ic.LlmRouter(budget="2", stop_at=0.5, environ=environ) as router:
        assert 500_000 == router.usage()["stop_at_microdollars"]
    for amounts in ({"stop_at": 1}, {"budget": 1, "stop_at": "1"}, {"budget": 1, "stop_at": "x"}):
        with pytest.raises(ic.Misconfigured, match="stop-at"):
            ic.LlmRouter(**amounts, environ=environ)
    with ic.LlmRouter(environ={**environ, "IRONCAGE_BUDGET": "2"}) as router:
        assert 2.0 == router.budget


# By PUT, until a restart.

@pytest.fixture
def with_admin(proxy_for):
    return proxy_for("--budget", "2", "--stop-at", "1", "--admin-token", ADMIN_TOKEN)


def limits(answer):
    return answer.json["limit_microdollars"], answer.json["stop_at_microdollars"]


def test_a_put_of_one_field_leaves_the_other_and_null_is_what_the_flag_says(with_admin):
    assert (3_000_000, 1_000_000) == limits(put(with_admin, limit_usd="3"))
    assert (3_000_000, 2_500_000) == limits(put(with_admin, stop_at_usd=2.5))
    assert (9_000_000, 8_000_000) == limits(put(with_admin, stop_at_usd="8", limit_usd="9"))
    assert (9_000_000, 1_000_000) == limits(put(with_admin, stop_at_usd=None))
    assert (2_000_000, 1_000_000) == limits(put(with_admin, limit_usd=None))


@pytest.mark.parametrize("fields", [
    {"limit_usd": "1"}, {"stop_at_usd": "2"}, {"limit_usd": "5", "stop_at_usd": "5"},
    {"stop_at_usd": "-1"}, {"stop_at_usd": True}, {"stop_at_usd": "x", "limit_usd": "9"},
    {"limit_usd": "9", "stop_at_usd": []}, {"stop_at": "1"}, {"limit_usd": "9", "more": 1}], ids=repr)
def test_a_put_that_does_not_add_up_is_400_and_changes_nothing(with_admin, fields):
    answer = put(with_admin, **fields)

    assert 400 == answer.status
    assert (2_000_000, 1_000_000) == limits(call(with_admin.port, "GET", "/ironcage/budget"))


def test_null_where_there_is_no_flag_takes_a_limit_away_unless_a_stop_needs_it(proxy_for):
    proxy = proxy_for("--admin-token", ADMIN_TOKEN)
    put(proxy, limit_usd="2", stop_at_usd="1")

    assert 400 == put(proxy, limit_usd=None).status
    assert (None, None) == limits(put(proxy, limit_usd=None, stop_at_usd=None))


def test_a_put_stops_and_lets_go_on(mock, with_admin):
    chat(with_admin)
    put(with_admin, stop_at_usd="0.000001")
    stopped = chat(with_admin)
    put(with_admin, stop_at_usd="1.5")

    assert (402, 200) == (stopped.status, chat(with_admin).status)


# A token's own.

ALICE = "tok-alice-0123456789"


def write(config, **fields):
    config.write_text(json.dumps({"tokens": [{"name": "alice", "token": ALICE, **fields}]}))


def test_a_token_stops_by_itself_and_a_reload_moves_its_stop(mock, proxy_for, tmp_path):
    config = tmp_path / "cage.json"
    write(config, budget_usd="1", stop_at_usd="0.0002", period="day")
    proxy = proxy_for("--budget", "10", "--config", str(config))
    _, refused = spend_until(proxy, 402, token=ALICE)
    details = refused.json["error"]["ironcage"]
    status = call(proxy.port, "GET", "/ironcage/status").json

    assert ("alice", "stop_at") == (details["scope"], details["limit"])
    assert 200 == status["by_token"]["alice"]["stop_at_microdollars"]
    assert 200 == chat(proxy).status                     # nobody else is stopped

    write(config, budget_usd="1", stop_at_usd="0.9", period="day")
    reload(proxy)
    assert 200 == chat(proxy, token=ALICE).status


def reload(proxy):
    """Look at the configuration now, and not within a second: what the log would say of it."""
    try:
        proxy._take_config(proxy._read_config(), proxy.router.prices)
    except ic.Misconfigured as err:
        return str(err)


@pytest.mark.parametrize("fields", [
    {"stop_at_usd": "1"}, {"budget_usd": "1", "stop_at_usd": "1"},
    {"budget_usd": "1", "stop_at_usd": "x"}], ids=repr)
def test_a_tokens_stop_needs_its_own_budget_at_the_start_and_in_a_reload(proxy_for, tmp_path, capsys,
                                                                         fields):
    config = tmp_path / "cage.json"
    write(config, **fields)
    assert 2 == ic.main(["check", "--port", "0", "--config", str(config)])
    assert "alice" not in capsys.readouterr().out

    write(config, budget_usd="3", stop_at_usd="2")
    proxy = proxy_for("--config", str(config))
    write(config, **fields)
    assert "token 1" in reload(proxy)

    budget = proxy.router.controller.budget("alice")
    assert (3_000_000, 2_000_000) == (budget.limit, budget.stop_at)
