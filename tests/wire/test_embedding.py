"""LlmRouter as the original's users know it, events, metrics, and a command inside the cage."""
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
from support import (ADMIN_TOKEN, ANTHROPIC_KEY, OPENAI_KEY, PATIENCE_S, ROOT, TOKEN, call,
                     openai_error, program, proxy_environment, run_program, settled_status, started)

CHAT = {"model": "gpt-4o-mini", "max_tokens": 100,
        "messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture
def router_for(mock):
    """Make routers in front of the mock; all are stopped at the end."""
    made = []

    def make(**options):
        environ = {name: value for name, value in proxy_environment(mock).items()
                   if "BASE_URL" in name}
        made.append(program().LlmRouter(environ=environ, **{
            "provider_key": OPENAI_KEY, **options}))
        return made[-1]

    before = set(threading.enumerate())
    yield make
    for router in made:
        router.stop()
    assert [] == [thread.name for thread in set(threading.enumerate()) - before
                  if not thread.name.startswith("mock-")]


def ask(router, fields=CHAT, path="/v1/chat/completions"):
    return call(router.port, "POST", path, fields, token=router.api_key)


# The situations of the original's own tests.

def test_a_router_serves_when_its_constructor_returns(router_for):
    router = router_for()

    assert b"LlmRouter OK" == call(router.port, "GET", "/", token=None).body
    assert router.is_running and router.base_url == f"http://127.0.0.1:{router.port}/v1"
    router.stop()
    router.stop()
    assert not router.is_running
    with pytest.raises(OSError):
        call(router.port, "GET", "/", token=None)


def test_a_router_is_a_context_manager_and_many_live_side_by_side(router_for):
    with router_for() as first, router_for() as second:
        assert first.port != second.port and first.api_key != second.api_key
        assert [200, 200] == [ask(router).status for router in (first, second)]
    assert not first.is_running and not second.is_running


def test_an_invalid_token_is_401(router_for):
    assert 401 == call(router_for().port, "POST", "/v1/chat/completions", CHAT,
                       token="ic_wrong_0123456789").status


@pytest.mark.parametrize("key, provider, path, fields", [
    (OPENAI_KEY, "openai", "/v1/chat/completions", CHAT),
    (ANTHROPIC_KEY, "anthropic", "/v1/messages", {**CHAT, "model": "claude-haiku-4-5"}),
])
def test_the_key_says_which_provider_it_belongs_to(mock, router_for, key, provider, path, fields):
    router = router_for(provider_key=key)

    assert (provider, 200) == (router.provider, ask(router, fields, path).status)


def test_spend_is_tracked_to_the_microdollar(mock, router_for):
    router = router_for(budget="1.00")

    for _ in range(3):
        ask(router)

    assert (mock.billed_microdollars / 10 ** 6, 1.0) == router.budget_status
    assert router.total_spent() == mock.billed_microdollars / 10 ** 6
    usage = router.usage()
    assert (3, mock.billed_microdollars) == (usage["requests"], usage["spent_microdollars"])


@pytest.mark.parametrize("budget", ["0.50", 0.5, __import__("decimal").Decimal("0.5")])
def test_a_budget_is_a_string_a_decimal_or_a_number(router_for, budget):
    assert 0.5 == router_for(budget=budget).budget


def test_without_a_budget_spend_is_counted(mock, router_for):
    router = router_for()
    ask(router)

    assert (None, None) == (router.budget, router.budget_status)
    assert router.total_spent() > 0


@pytest.mark.parametrize("budget", ["many", -1, True, "inf"])
def test_a_budget_that_is_no_amount_is_refused(router_for, budget):
    with pytest.raises(program().Misconfigured, match="budget: "):
        router_for(budget=budget)


@pytest.mark.parametrize("field, value, words", [
    ("bound", "foo", "--bound: must be measured or bytes"), ("wait_s", -1, "wait_s: "),
    ("wait_s", float("nan"), "wait_s: "), ("keep_days", 0, "--keep-days: "),
    ("max_body_bytes", -1, "max_body_bytes: "), ("log_format", "xml", "--log-format: "),
    ("alert_url", "ftp://x", "--alert-url: "), ("port", "many", "--port: "), ("port", -1, "listen"),
    ("api_key", "short", "--token: "), ("api_key", "abcdefgh\r\nx: y", "--token: "),
    ("provider_key", 5, "provider_key must be text"), ("allow_fields", ["a b"], "--allow-field: "),
    ("strict", "yes", "strict")])
def test_what_an_embedder_sets_is_looked_at_as_a_flag_is(router_for, field, value, words):
    with pytest.raises(program().Misconfigured, match=words):
        router_for(**{field: value})


def test_an_embedder_sets_what_a_flag_sets(router_for):
    router = router_for(port="0", wait_s=0.5, max_body_bytes=70_000, allow_hosts="myhost", strict=True,
                        allow_fields=("one", "two"), api_key="12345678")
    settings = router._server.settings

    assert (0.5, 70_000, ("myhost",), True, ("one", "two"), "12345678") == (
        settings.wait_s, settings.max_body_bytes, settings.allow_hosts, settings.strict,
        settings.allow_fields, router.api_key)


def test_an_embedders_amounts_are_in_microdollars_where_the_setting_is(router_for):
    router = router_for(budget_microdollars=5_000_000, stop_at_microdollars=1_250_000)

    assert 5.0 == router.budget
    assert 1_250_000 == router._server.router.controller.budget().stop_at
    with pytest.raises(program().Misconfigured, match="budget_microdollars must be an integer"):
        router_for(budget_microdollars="5")


def test_an_embedders_sets_are_lists_and_its_engine_is_on_no_command_line(router_for, monkeypatch):
    router = router_for(allow_fields=frozenset({"top_k"}))
    assert ("top_k",) == router._server.settings.allow_fields

    seen = []
    monkeypatch.setattr(program(), "ProxyServer", lambda settings: seen.append(settings) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        router_for(shared="redis://u:canary-password@127.0.0.1:1")
    assert not seen[0].shared.is_public


def test_a_handler_of_events_can_stop_the_router_and_its_call_ends(router_for):
    made = []
    router = router_for(on_event=lambda event: made[0].stop() if type(event).__name__
                        == "LlmRequestCompleted" else None)
    made.append(router)

    assert 200 == ask(router).status

    router.stop()                              # waits for what the handler began
    with pytest.raises(OSError):
        call(router.port, "GET", "/", token=None)


def test_an_empty_budget_is_refused_not_none(router_for):
    with pytest.raises(program().Misconfigured, match="--budget has an empty value"):
        router_for(budget="")


def test_an_exceeded_budget_is_402_and_set_budget_unblocks(router_for):
    router = router_for(budget=0)
    assert 402 == ask(router).status

    router.set_budget("1.00")

    assert 200 == ask(router).status


def test_five_threads_on_one_budget_never_overspend(mock, router_for):
    router = router_for(budget="0.0005", wait_s=0)
    statuses = []

    def spend():
        for _ in range(20):
            statuses.append(ask(router).status)

    threads = [threading.Thread(target=spend) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert {200, 402} == set(statuses)
    assert router.total_spent() * 10 ** 6 == pytest.approx(mock.billed_microdollars)
    assert mock.billed_microdollars <= 500


def test_a_ledger_brings_the_spend_back(mock, router_for, tmp_path):
    path = str(tmp_path / "cage.db")
    with router_for(ledger=path) as router:
        ask(router)
        spent = router.total_spent()

    assert spent == router_for(ledger=path).total_spent() > 0


def test_an_embedded_router_leaves_the_hosts_logging_alone(router_for):
    before = logging.getLogger().handlers[:], program().log.handlers[:], program().log.propagate
    router_for()

    assert before == (logging.getLogger().handlers[:], program().log.handlers[:],
                      program().log.propagate)


# Events.

def test_the_five_events_come_in_order_with_what_happened(mock, router_for):
    events = []
    router = router_for(budget="0.001", on_event=events.append, agent_id="tester",
                        provider_id="lab")
    ask(router)
    mock.script(openai_error(429, "slow down"))
    ask(router)
    router.stop()

    kinds = [type(event).__name__ for event in events]
    assert ["RouterStarted", "LlmRequestCompleted", "LlmRequestFailed", "RouterStopped"] == kinds
    started, completed, failed, stopped = events
    assert (router.port, 1_000) == (started.port, started.limit_microdollars)
    assert ("tester", "lab", "openai", mock.billed_microdollars, False) == (
        completed.agent_id, completed.provider_id, completed.provider, completed.cost_micros,
        completed.is_estimated)
    assert completed.input_tokens > 0 and completed.output_tokens > 0
    assert (429, 0) == (failed.error_code, failed.cost_micros)
    assert (2, 1, mock.billed_microdollars) == (stopped.requests, stopped.failed_requests,
                                                stopped.spent_microdollars)
    with pytest.raises(AttributeError):
        completed.cost_micros = 0
    assert not any(secret in repr(events) for secret in (OPENAI_KEY, router.api_key, "hello"))


def test_each_threshold_is_told_once_and_again_after_a_raise(mock, router_for):
    told = []
    router = router_for(budget="0.001", on_event=lambda event: told.append(event.percent)
                        if isinstance(event, program().BudgetThresholdReached) else None)
    mock.input_tokens, mock.output_tokens = 600, 1           # 91 microdollars a call
    big = {**CHAT, "messages": [{"role": "user", "content": "x" * 100}]}
    while ask(router, big).status == 200:
        pass
    assert [50, 80] == told[:2] and sorted(set(told)) == told

    router.set_budget("0.0025")
    for _ in range(4):
        ask(router, big)
    assert told.count(50) == 2


def test_a_fault_in_on_event_ends_nothing(mock, router_for, caplog):
    def fail(event):
        raise RuntimeError("of the host")

    router = router_for(on_event=fail)

    assert 200 == ask(router).status
    assert "on_event failed" in caplog.text


# Metrics.

def test_metrics_say_what_happened_in_prometheus_text(mock, proxy_for):
    proxy = proxy_for("--budget", "1.00", "--admin-token", ADMIN_TOKEN)
    call(proxy.port, "POST", "/v1/chat/completions", CHAT)
    mock.script(openai_error(500, "no"))
    call(proxy.port, "POST", "/v1/chat/completions", CHAT)
    call(proxy.port, "POST", "/v1/chat/completions", {**CHAT, "model": "gpt-mystery"})
    settled_status(proxy)

    answer = call(proxy.port, "GET", "/ironcage/metrics", token=ADMIN_TOKEN)
    text = answer.body.decode()

    assert answer.header("content-type").startswith("text/plain; version=0.0.4")
    samples = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert "1" == samples[
        'ironcage_requests_total{provider="openai",model="gpt-4o-mini",status="200"}']
    assert "1" == samples[
        'ironcage_requests_total{provider="openai",model="gpt-4o-mini",status="500"}']
    assert "1" == samples['ironcage_refusals_total{reason="unpriced_model"}']
    assert str(mock.billed_microdollars) == samples[
        'ironcage_cost_microdollars_total{model="gpt-4o-mini"}']
    assert ("2", "1") == tuple(samples[f"ironcage_token_{what}"] for what in (
        'requests_total{token="default"}',
        'refusals_total{token="default",reason="unpriced_model"}'))
    assert "1000000" == samples['ironcage_limit_microdollars{scope="proxy"}']
    assert "2" == samples['ironcage_request_seconds_bucket{provider="openai",le="+Inf"}']
    assert "2" == samples['ironcage_request_seconds_count{provider="openai"}']
    assert "1" == samples["ironcage_in_flight"]              # this very request


def test_metrics_are_valid_prometheus_text(mock, proxy):
    """Every family has one HELP and one TYPE before its samples; histograms are cumulative."""
    call(proxy.port, "POST", "/v1/chat/completions", CHAT)
    text = call(proxy.port, "GET", "/ironcage/metrics").body.decode()

    family, seen = None, set()
    for line in text.splitlines():
        match = re.fullmatch(r"# (HELP|TYPE) (\w+) (.+)", line)
        if match and match[1] == "HELP":
            family = match[2]
            assert family not in seen
            seen.add(family)
        elif match:
            assert (family, True) == (match[2], match[3] in ("counter", "gauge", "histogram"))
        else:
            assert re.fullmatch(r'\w+(\{(\w+="[^"\\\n]*",?)+\})? \d+', line)
            assert line.startswith(family)
    buckets = [int(line.rsplit(" ", 1)[1]) for line in text.splitlines()
               if line.startswith("ironcage_request_seconds_bucket")]
    assert buckets == sorted(buckets)


def test_metrics_parse_with_prometheus_own_parser(mock, proxy):
    parser = pytest.importorskip("prometheus_client.parser")
    call(proxy.port, "POST", "/v1/chat/completions", CHAT)

    text = call(proxy.port, "GET", "/ironcage/metrics").body.decode()

    assert {"ironcage_requests", "ironcage_request_seconds"} <= {
        family.name for family in parser.text_string_to_metric_families(text)}


# One command inside the cage.

def wrapped(mock, *argv, environ=None):
    return run_program(*argv, environ={**os.environ, **proxy_environment(mock), **(environ or {})})


AGENT = """
import json, os, sys, urllib.request, urllib.error
body = json.dumps({"model": "gpt-4o-mini", "max_tokens": 100,
                   "messages": [{"role": "user", "content": "hello"}]}).encode()
for _ in range(int(sys.argv[1])):
    request = urllib.request.Request(os.environ["OPENAI_BASE_URL"] + "/chat/completions", body, {
        "authorization": "Bearer " + os.environ["OPENAI_API_KEY"],
        "content-type": "application/json"})
    try:
        print(urllib.request.urlopen(request).status)
    except urllib.error.HTTPError as err:
        print(err.code)
        sys.exit(3)
"""


def test_a_command_works_until_the_money_is_gone_and_the_bill_is_printed(mock):
    done = wrapped(mock, "--budget", "0.0003", "--", sys.executable, "-c", AGENT, "100")

    assert 3 == done.returncode, done.stderr
    assert {"200", "402"} == set(done.stdout.split())
    assert "gpt-4o-mini" in done.stderr and "of $0.0003" in done.stderr
    assert "refused by a limit: 1" in done.stderr
    assert 0 < mock.billed_microdollars <= 300


def test_the_child_sees_no_key_of_ours_wherever_it_stands(mock):
    show = "import json, os; print(json.dumps(dict(os.environ)))"
    done = wrapped(mock, "--", sys.executable, "-c", show, environ={
        "MY_COPY": OPENAI_KEY, "URL_WITH_KEY": f"https://u:{ANTHROPIC_KEY}@x",
        "IRONCAGE_ADMIN_TOKEN": ADMIN_TOKEN, "IRONCAGE_SERVER_TOKEN": "ic_server_0123", "GROQ_API_KEY": "gsk_0123456789", "PLAIN": "stays"})

    child = json.loads(done.stdout)
    assert not any(secret in done.stdout for secret in (
        OPENAI_KEY, ANTHROPIC_KEY, ADMIN_TOKEN, "gsk_0123456789", "ic_server_0123"))
    assert "stays" == child["PLAIN"]
    assert {"MY_COPY", "URL_WITH_KEY", "IRONCAGE_ADMIN_TOKEN", "GROQ_API_KEY",
            "IRONCAGE_OPENAI_BASE_URL"}.isdisjoint(child)
    assert child["OPENAI_BASE_URL"] == child["OPENAI_API_BASE"] == child["ANTHROPIC_BASE_URL"] \
        + "/v1"
    assert child["OPENAI_API_KEY"] == child["ANTHROPIC_API_KEY"] == child["ANTHROPIC_AUTH_TOKEN"]
    assert "127.0.0.1" in child["NO_PROXY"]


def test_a_word_that_stands_for_a_key_takes_no_other_variable_away(proxy_for):
    proxy = proxy_for("--admin-token", "adm/n@0123456789", environ={"OPENAI_API_KEY": "local"})
    given = {"PATH": "/usr/local/bin", "MY_KEY": "local", "URL": "https://u:adm%2Fn%400123456789@x",
             "HEADER": "Bearer adm/n@0123456789"}

    kept = program().child_environment(proxy, given, "agent")

    assert {"PATH"} == kept.keys() & given.keys()


def test_a_word_that_is_the_password_of_the_engine_takes_no_other_variable_away(proxy_for):
    proxy, ic = proxy_for(), program()
    given = {"PATH": "/usr/bin", "MINE": "bin", "COPY": "redis://:long-pass%2Fw0rd-01@x"}
    kept = {}
    for password in ("bin", "long-pass/w0rd-01"):
        shared = ic.EngineAddress("redis", "x", 6379, 0, None, password)
        server = SimpleNamespace(url=proxy.url, router=proxy.router,
                                 settings=proxy.settings._replace(shared=shared))
        kept[password] = ic.child_environment(server, given, "agent").keys() & given.keys()

    assert {"bin": {"PATH", "COPY"}, "long-pass/w0rd-01": {"PATH", "MINE"}} == kept


@pytest.mark.skipif(os.name != "posix", reason="a script is made to stand for the program")
@pytest.mark.parametrize("name, has_key", [
    ("claude", False), ("claude.cmd", False), ("Claude.EXE", False), ("claude-x", True),
    ("aclaude", True), ("claude.py", True)])
def test_claude_code_gets_the_one_variable_that_it_does_not_ask_about(
        mock, tmp_path, name, has_key):
    command = tmp_path / "claude" / name
    command.parent.mkdir()
    command.write_text("#!/bin/sh\nenv\n")
    command.chmod(0o755)

    done = wrapped(mock, "--token", TOKEN, "--", str(command))

    child = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    assert TOKEN == child["ANTHROPIC_AUTH_TOKEN"], done.stderr
    assert (TOKEN if has_key else None) == child.get("ANTHROPIC_API_KEY")


def test_a_secret_is_not_taken_on_the_command_line_that_the_command_can_read(mock):
    done = wrapped(mock, "--admin-token", ADMIN_TOKEN, "--", sys.executable, "-c", "")

    assert (2, True) == (done.returncode, "IRONCAGE_ADMIN_TOKEN" in done.stderr)
    assert ADMIN_TOKEN not in done.stderr


@pytest.mark.parametrize("code", [0, 1, 42])
def test_the_exit_code_passes_through(mock, code):
    assert code == wrapped(mock, "--", sys.executable, "-c", f"raise SystemExit({code})").returncode


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX")
@pytest.mark.parametrize("name, code", [("SIGTERM", 143), ("SIGINT", 130)])
def test_signals_pass_to_the_command(mock, name, code):
    wait = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_DFL); " \
        "print('up', flush=True); time.sleep(60)"
    process = started("--", sys.executable, "-c", wait,
                      environ={**os.environ, **proxy_environment(mock)})
    assert "up\n" == process.stdout.readline()

    process.send_signal(getattr(signal, name))
    _, err = process.communicate(timeout=PATIENCE_S)

    assert code == process.returncode
    assert "spent $0.00" in err


SIGNALLED_AS_IT_STARTS = """
import os, signal, sys
import ironcage_proxy
start = ironcage_proxy.ProxyServer.start
def signalled(self):
    start(self)
    os.kill(os.getpid(), signal.SIGTERM)
ironcage_proxy.ProxyServer.start = signalled
sys.exit(ironcage_proxy.main())
"""


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX")
def test_a_signal_that_comes_before_the_command_runs_ends_that_too(mock):
    process = started("--", sys.executable, "-c", "import time; time.sleep(60)",
                      code=SIGNALLED_AS_IT_STARTS)
    _, err = process.communicate(timeout=PATIENCE_S)

    assert 143 == process.returncode
    assert "spent $0.00" in err


@pytest.mark.parametrize("argv, code, said", [
    (["--", "/nonexistent/agent"], 127, "cannot run /nonexistent/agent"),
    (["--"], 2, "there must be a command"), (["usage", "--", "x"], 2, "flags only"),
    (["--budget", "much", "--", "x"], 2, "--budget"),
])
def test_a_command_that_cannot_run_is_one_line(mock, argv, code, said):
    done = wrapped(mock, *argv)

    assert (code, 1) == (done.returncode, done.stderr.count("\n"))
    assert said in done.stderr


def test_the_token_of_the_cage_is_not_in_the_output(mock):
    done = wrapped(mock, "--token", TOKEN, "--", sys.executable, "-c", AGENT, "1")

    assert 0 == done.returncode and TOKEN not in done.stdout + done.stderr


# The self-test.

def test_the_selftest_holds_every_guarantee_in_an_empty_environment(tmp_path):
    done = subprocess.run([sys.executable, "-I", str(ROOT / "ironcage_proxy.py"), "selftest"],
                          capture_output=True, text=True, timeout=60, cwd=tmp_path, env={})

    lines = done.stdout.splitlines()
    assert (0, len(program().SELF_TESTS)) == (done.returncode, len(lines)), done.stdout
    assert all(line.startswith("held ") for line in lines)
    assert "" == done.stderr and [] == list(tmp_path.iterdir())


@pytest.mark.parametrize("name, break_it", [
    ("exact", lambda ic, patch: patch.setattr(ic, "microdollars_ceil", lambda amount: 1)),
    ("keys stay", lambda ic, patch: patch.setattr(
        ic.Provider, "credentials", lambda self: {"authorization": "Bearer sk-canary-both"})),
    ("fail closed", lambda ic, patch: patch.setattr(
        ic.Router, "_check_unmetered", lambda *_: None)),
    ("transparent", lambda ic, patch: patch.setattr(
        ic.Router, "_upstream_body", lambda self, call: [call.request.body, b" "])),
])
def test_the_selftest_sees_a_guarantee_that_is_broken(monkeypatch, tmp_path, name, break_it):
    module = program()
    break_it(module, monkeypatch)
    [holds] = [test for title, _, test in module.SELF_TESTS if title == name]
    lab = module._Laboratory(str(tmp_path))
    try:
        assert not holds(lab)
    finally:
        lab.close()
