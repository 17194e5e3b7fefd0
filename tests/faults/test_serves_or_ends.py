"""It serves, or it ends: whatever goes wrong in a reload changes nothing, and where a thread fails
that serving needs, calls in flight are settled, the log says so, and the process ends."""
import errno
import json
import os
import signal
import socketserver
import sqlite3
import threading

import pytest
from support import (OPENAI_KEY, PATIENCE_S, TOKEN, Gate, Hang, RawClient, Reply, Served, call,
                     program, proxy_environment, run_program, sse, until)

ic = program()
CHAT = {"model": "gpt-4o-mini", "max_tokens": 100, "stream": True,
        "messages": [{"role": "user", "content": "hello"}]}
STREAM = Reply(headers=(("content-type", "text/event-stream"),), framing="chunked", steps=(
    sse({"id": "c", "choices": [{"index": 0, "delta": {"content": "x"}}]}), Hang()))
ALICE = "ic_alice_token_0123"


def is_refused(port):
    try:
        RawClient(port).close()
    except OSError:
        return True
    return False


def in_flight(mock, port, token=TOKEN):
    """A client whose stream has begun and will not end by itself."""
    mock.script(STREAM)
    client = RawClient(port)
    client.request("POST", "/v1/chat/completions", json.dumps(CHAT).encode(), token=token)
    assert 200 == client.read_head()[0]
    client.read_chunk()
    return client


# A thread that fails.

FAILS_AT_SIGHUP = """
import sys
import ironcage_proxy as ic
def fail(server):
    if server.reload_asked:
        raise {fault}("a fault of a test")
ic.ProxyServer.service_actions = fail
sys.exit(ic.main())
"""


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="SIGHUP is POSIX")
@pytest.mark.parametrize("fault", [RuntimeError, SystemExit], ids=lambda fault: fault.__name__)
def test_a_process_whose_accepting_thread_fails_settles_and_ends(mock, tmp_path, fault):
    ledger = str(tmp_path / "cage.db")
    code = FAILS_AT_SIGHUP.format(fault=fault.__name__)
    with Served("--token", TOKEN, "--ledger", ledger, "--budget", "1",
                code=code, environ=proxy_environment(mock)) as served, \
            in_flight(mock, served.port) as client:
        served.process.send_signal(signal.SIGHUP)
        code = served.process.wait(PATIENCE_S * 3)
        lines = served.log.splitlines()
        rest = b"".join(iter(client.read_chunk, b""))

    assert 1 == code
    assert "CRITICAL ended, since ironcage-accept failed" in lines[-1]
    assert any("CRITICAL ironcage-accept failed" in line and fault.__name__ in line
               for line in lines)
    assert b'"error"' in rest
    (row,) = ic.ledger_rows(ledger, "SELECT settled_ms, cost_microdollars FROM calls")
    assert None is not row["settled_ms"] and row["cost_microdollars"] > 0


WRAPPED = """
import sys, os, threading
import ironcage_proxy as ic
child_ran = threading.Event()
def fail(server):
    if os.path.exists(sys.argv[1]):
        raise RuntimeError
ic.ProxyServer.service_actions = fail
sys.exit(ic.main(["--", sys.executable, "-c",
                  "import sys, time; open(sys.argv[1], 'w').close(); time.sleep(60)", sys.argv[1]]))
"""


def test_a_wrapped_command_ends_with_its_proxy(tmp_path):
    done = run_program(str(tmp_path / "begun"), code=WRAPPED)

    assert 1 == done.returncode
    assert "CRITICAL ended, since ironcage-accept failed" in done.stderr.splitlines()[-1]


def failing_accept(monkeypatch, server):
    monkeypatch.setattr(server, "service_actions", fail_with(SystemExit))
    return "ironcage-accept"


def failing_poll(monkeypatch, server):
    """Of the thread that waits for the sockets of all, which a new connection wakes."""
    class Broken:
        def __init__(self, epoll):
            self._epoll = epoll

        def __getattr__(self, name):
            return getattr(self._epoll, name)

        def poll(self, timeout):
            raise OSError(errno.EBADF, "a fault of a test")
    if not hasattr(ic.select, "epoll"):
        pytest.skip("this system has no epoll")
    monkeypatch.setattr(server.slot, "_epoll", Broken(server.slot._epoll))
    RawClient(server.port).close()
    return "the wait for all sockets"


def lost_listener(monkeypatch, server):
    server.socket.close()
    return "ironcage-accept"


def fail_with(fault):
    def fail(*_, **__):
        raise fault("a fault of a test")
    return fail


@pytest.mark.parametrize("break_it", [failing_accept, failing_poll, lost_listener],
                         ids=lambda break_it: break_it.__name__)
def test_an_embedded_router_stops_and_says_so_and_its_process_lives(mock, monkeypatch, logged,
                                                                    break_it):
    events = []
    environ = {name: value for name, value in proxy_environment(mock).items()
               if "BASE_URL" in name}
    router = ic.LlmRouter(provider_key=OPENAI_KEY, environ=environ, budget="1",
                          on_event=events.append)
    client = in_flight(mock, router.port, router.api_key)
    assert router.is_running

    name = break_it(monkeypatch, router._server)
    until(lambda: isinstance(events[-1], ic.RouterStopped), "the router stops")
    client.close()
    router.stop()

    assert not router.is_running and is_refused(router.port)
    assert f"CRITICAL {name} failed" in logged()
    assert 0 == router._server.router.controller.total_reserved() < router.total_spent()
    assert 1 == sum(isinstance(event, ic.RouterStopped) for event in events)


def test_a_thread_that_sends_events_and_fails_stops_the_server(mock, proxy_for, monkeypatch):
    monkeypatch.setattr(ic, "SERVER_STOP_S", 0.1)
    monkeypatch.setattr(ic.Outbox, "_send_all", fail_with(KeyError))
    proxy = proxy_for("--server-url", "http://127.0.0.1:9", "--server-token", "ic_server_01234")

    until(lambda: is_refused(proxy.port), "nothing listens any more")
    assert "ironcage-events" == proxy.failure


# What accept() raises in passing.

@pytest.mark.parametrize("number", [
    errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.ECONNABORTED, errno.EPROTO,
    errno.EPERM, errno.EINTR], ids=errno.errorcode.get)
def test_what_accept_raises_in_passing_ends_nothing(mock, proxy_for, monkeypatch, number):
    proxy, failed = proxy_for("--budget", "1"), []
    get_request = socketserver.TCPServer.get_request

    def get_request_or_fail(server):
        if server is proxy and not failed:
            failed.append(number)
            raise OSError(number, os.strerror(number))
        return get_request(server)

    monkeypatch.setattr(socketserver.TCPServer, "get_request", get_request_or_fail)
    assert 200 == call(proxy.port, "GET", "/ironcage/status").status
    assert [number] == failed and proxy.failure is None


# A reload.

@pytest.fixture
def config(tmp_path):
    def write(*tokens, **more):
        (tmp_path / "new").write_text(json.dumps({"tokens": tokens, **more}))
        os.replace(tmp_path / "new", tmp_path / "cage.json")
        return str(tmp_path / "cage.json")
    return write


def token(name, limit, **more):
    return {"name": name, "token": f"ic_{name}_token_0123", "budget_usd": limit, **more}


def limits(proxy):
    return {scope: (account.row.limit, account.row.stop_at, account.row.period)
            for scope, account in proxy.router.controller.accounts.by_scope.items()}


def fault_of_the_second(monkeypatch, proxy):
    accounts, seen = proxy.router.controller.accounts, []
    account_of = accounts._account_of

    def fail(row):
        seen.append(row)
        if len(seen) == 2:
            raise MemoryError
        return account_of(row)
    monkeypatch.setattr(accounts, "_account_of", fail)


def fault_of_the_ledger(monkeypatch, proxy):
    monkeypatch.setattr(proxy.ledger, "spent", fail_with(sqlite3.OperationalError))


def fault_of_the_providers(monkeypatch, proxy):
    monkeypatch.setattr(ic, "ECHO_PROVIDER", None)


@pytest.mark.parametrize("break_it", [fault_of_the_second, fault_of_the_ledger,
                                      fault_of_the_providers], ids=lambda do: do.__name__)
def test_a_reload_that_fails_half_way_has_changed_nothing(mock, proxy_for, config, monkeypatch,
                                                          logged, break_it):
    proxy = proxy_for("--budget", "10", "--config", config(token("alice", "1"),
                                                           token("bob", "2", period="day")))
    before = (limits(proxy), proxy.router.config, proxy.router.prices, proxy.router.providers,
              proxy.callers, proxy._table)

    with monkeypatch.context() as patches:
        break_it(patches, proxy)
        config(token("alice", "3", stop_at_usd="1", period="week"), token("carol", "1"),
               token("bob", "4"), providers={"lab": {"base_url": "http://127.0.0.1:9"}})
        proxy.reload_asked = True
        until(lambda: "the configuration stays as it was" in logged(), "the log says why")
    assert before == (limits(proxy), proxy.router.config, proxy.router.prices,
                      proxy.router.providers, proxy.callers, proxy._table)

    proxy.reload_asked = True
    until(lambda: len(proxy.callers) == 4, "the mended configuration is taken")
    assert (3_000_000, 1_000_000, "week") == limits(proxy)["alice"]
    assert proxy.failure is None


@pytest.mark.parametrize("name, fault", [
    ("look", MemoryError), ("_file_state", ValueError), ("load_config", RecursionError)])
def test_a_look_that_fails_ends_nothing_and_the_next_one_sees_the_change(
        mock, proxy_for, config, monkeypatch, logged, name, fault):
    proxy = proxy_for("--config", config(token("alice", "1")))
    with monkeypatch.context() as patches:
        if name == "look":
            patches.setattr(proxy.ledger, "look", fail_with(fault))
        elif name == "_file_state":
            patches.setattr(ic, "_file_state", fail_with(fault))
        else:
            patches.setattr(ic, "load_config", fail_with(fault))
        proxy.reload_asked = True
        until(lambda: f"a fault of the proxy: {fault.__name__} in line" in logged())

    config(token("bob", "1"))
    until(lambda: "bob" in {caller.name for caller in proxy.callers.values()})
    assert proxy.failure is None


@pytest.mark.parametrize("content", [
    b"[" * 100_000, b'{"tokens": ' + b"[" * 100_000, b"\xff\xfe{}", b"\x00", b"",
    b'{"tokens": [{"name": "a", "token": "ic_\\ud8000123456789"}]}',
    b'{"models": {"[": "\\ud800"}, "price_as": {"a": "b"}}',
    b'{"tokens": [{"name": "a", "token": "ic_0123456789", "requests_per_minute": 1e9999999999}]}',
], ids=range(8))
def test_a_file_of_whatever_bytes_leaves_the_old_one(mock, proxy_for, config, tmp_path, logged,
                                                     content):
    proxy = proxy_for("--budget", "1", "--config", config(token("alice", "1")))
    (tmp_path / "new").write_bytes(content)
    os.replace(tmp_path / "new", tmp_path / "cage.json")
    proxy.reload_asked = True

    until(lambda: "stays as it was" in logged())
    assert 200 == call(proxy.port, "GET", "/ironcage/status", token=ALICE).status
    assert proxy.failure is None


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with names are POSIX")
def test_a_pipe_in_the_place_of_the_configuration_holds_up_nothing(mock, proxy_for, config,
                                                                   logged, tmp_path):
    proxy = proxy_for("--config", config(token("alice", "1")))
    os.unlink(tmp_path / "cage.json")
    os.mkfifo(tmp_path / "cage.json")
    proxy.reload_asked = True

    until(lambda: "cage.json is not a file" in logged())
    assert 200 == call(proxy.port, "GET", "/ironcage/status", token=ALICE).status


def test_a_second_stop_waits_for_the_first(mock, proxy_for):
    proxy, gate = proxy_for("--budget", "1"), Gate()
    mock.script(lambda request: mock.default_reply(request).with_steps(
        [mock.default_reply(request).steps[0], gate, *mock.default_reply(request).steps[1:]]))
    with RawClient(proxy.port) as client:
        client.request("POST", "/v1/chat/completions", json.dumps(CHAT).encode())
        client.read_head()
        stops = [threading.Thread(target=proxy.stop) for _ in range(2)]
        for thread in stops:
            thread.start()
        until(lambda: is_refused(proxy.port))
        assert all(thread.is_alive() for thread in stops)
        gate.event.set()
        client.read_chunk()
        for thread in stops:
            thread.join(PATIENCE_S)

    assert not any(thread.is_alive() for thread in stops)
