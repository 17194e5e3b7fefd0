"""Two limits: `--budget` is never passed; `--stop-at` ends earlier, and lets what is in flight end."""
import json
import threading

import pytest
from support import ADMIN_TOKEN, TOKEN, Gate, RawClient, call, program, settled_status, until

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
