"""A restart without a refused connection: a socket that a service manager holds is handed to one
process after another, and what our own stop cuts ends with its dialect's error event."""
import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading

import pytest
from support import (PATIENCE_S, ROOT, TOKEN, Hang, RawClient, Reply, call, pause, program,
                     proxy_environment, run_program, sse_events, start_proxy, started, until)

ic = program()
posix = pytest.mark.skipif(os.name != "posix", reason="sockets are handed over on POSIX")
PROGRAM = str(ROOT / "ironcage_proxy.py")
HANDED = """
import os, sys, ironcage_proxy
os.environ["LISTEN_PID"] = str(os.getpid())
sys.exit(ironcage_proxy.main())
"""
MESSAGES = [{"role": "user", "content": "hello"}]
CHAT = {"model": "gpt-4o-mini", "max_tokens": 100, "messages": MESSAGES}
CALLS = [                               # path, fields: translated or not, streamed or not
    ("/v1/chat/completions", CHAT),
    ("/v1/chat/completions", {**CHAT, "stream": True}),
    ("/v1/messages", {**CHAT, "model": "claude-haiku-4-5", "stream": True}),
    ("/v1/responses", {"model": "gpt-4o-mini", "input": "hello", "stream": True}),
    ("/v1/messages", {**CHAT, "stream": True}),
    ("/v1/chat/completions", {**CHAT, "model": "claude-haiku-4-5", "stream": True}),
]


class Handed:
    """The program on a socket that this process holds, as a service manager starts it."""

    def __init__(self, listener, *argv, environ=None):
        self.process = started(*argv, code=HANDED, handed=listener, environ={
            "LISTEN_FDS": "1", "LISTEN_FDNAMES": "x", **(environ or {})})
        self.errors = []
        self._reader = threading.Thread(target=lambda: self.errors.extend(self.process.stderr))
        self._reader.start()

    def wait_until_it_serves(self):
        assert "is listening on" in self.process.stdout.readline(), self.ended()

    def ended(self):
        """(exit code, what it logged), once it has ended."""
        code = self.process.wait(PATIENCE_S * 6)
        self._reader.join()
        return code, "".join(self.errors)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.ended()
        self.process.close()


@pytest.fixture
def listener():
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as sock:
        yield sock


def port_of(sock):
    return sock.getsockname()[1]


# What is handed over.

@posix
def test_a_handed_socket_wins_over_the_flags_and_the_log_says_so(listener):
    with Handed(listener, "--host", "localhost", "--port", "1", "--token", TOKEN) as handed:
        handed.wait_until_it_serves()
        answer = call(port_of(listener), "GET", "/")
        handed.process.send_signal(signal.SIGTERM)
        code, log = handed.ended()

    assert b"LlmRouter OK" == answer.body
    assert 0 == code
    assert "the socket that was handed over is used" in log
    assert f'port={port_of(listener)} unused="--host --port"' in log


@posix
@pytest.mark.parametrize("listen_pid, listen_fds", [("1", "1"), ("", "1"), (None, "0")])
def test_a_socket_for_somebody_else_is_left_alone(listen_pid, listen_fds):
    listen_pid = str(os.getpid()) if listen_pid is None else listen_pid

    assert ic.handed_listener({"LISTEN_PID": listen_pid, "LISTEN_FDS": listen_fds}) is None
    assert ic.handed_listener({}) is None


def udp():
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind(("127.0.0.1", 0))
    return sock


def unix():
    sock = socket.socket(socket.AF_UNIX)
    sock.bind("")
    sock.listen()
    return sock


def deaf():
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    return sock


def connected():
    return socket.socketpair()[0]


def file():
    return open(os.devnull)


def handed(monkeypatch, made, count="1"):
    """What is made of a descriptor, as if it were the first one handed over."""
    with contextlib.closing(made):
        monkeypatch.setattr(ic, "FIRST_HANDED", os.dup(made.fileno()))
    return ic.handed_listener({"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": count})


@posix
@pytest.mark.parametrize("make", [udp, unix, deaf, connected, file],
                         ids=lambda make: make.__name__)
def test_what_is_no_listening_tcp_socket_is_refused(monkeypatch, make):
    if make is unix and sys.platform != "linux":
        pytest.skip("a Unix socket without a name is Linux's")
    with pytest.raises(ic.Misconfigured, match="is not a TCP socket that listens"):
        handed(monkeypatch, make())


@posix
@pytest.mark.parametrize("count", ["2", "-1", "many", "1 "])
def test_any_number_of_sockets_but_one_is_refused(monkeypatch, count):
    with pytest.raises(ic.Misconfigured, match="one socket can be served"):
        handed(monkeypatch, socket.create_server(("127.0.0.1", 0)), count)


@posix
def test_a_wrong_socket_is_one_clear_line_and_exit_code_2():
    with udp() as wrong, Handed(wrong, "--token", TOKEN) as handed:
        code, log = handed.ended()

    assert (2, 1) == (code, len(log.splitlines()))


@posix
def test_ipv6_is_served_too():
    try:
        listener = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError:
        pytest.skip("this machine has no IPv6")
    with listener, Handed(listener, "--token", TOKEN) as handed:
        handed.wait_until_it_serves()
        with socket.create_connection(("::1", port_of(listener))) as client:
            client.sendall(b"GET / HTTP/1.1\r\nhost: [::1]\r\nconnection: close\r\n\r\n")
            assert b"LlmRouter OK" in client.makefile("rb").read()


@posix
def test_a_wrapped_command_gets_no_variable_of_it(listener):
    with Handed(listener, "--", "sh", "-c", "env") as handed:
        out, _ = handed.process.stdout.read(), handed.ended()

    assert "OPENAI_BASE_URL=" in out
    assert "LISTEN_" not in out


# A restart.

@posix
def test_a_new_process_accepts_nothing_before_it_has_the_ledger(listener, tmp_path):
    flags = "--token", TOKEN, "--ledger", str(tmp_path / "cage.db")
    ledger = ic.SqliteLedger(flags[-1])
    with Handed(listener, *flags) as handed, RawClient(port_of(listener)) as client:
        client.request("GET", "/ironcage/status")
        until(lambda: any("waiting for the ledger" in line for line in handed.errors))
        client.sock.settimeout(0.2)
        with pytest.raises(socket.timeout):
            client.sock.recv(1, socket.MSG_PEEK)           # it waits in the backlog
        client.sock.settimeout(PATIENCE_S)
        ledger.close()

        assert 200 == client.read_answer().status


@posix
def test_without_waiting_a_taken_ledger_ends_a_new_process_at_once(listener, tmp_path):
    flags = "--token", TOKEN, "--ledger", str(tmp_path / "cage.db")
    ledger = ic.SqliteLedger(flags[-1])
    with Handed(listener, *flags, "--no-wait-for-ledger") as handed:
        code, log = handed.ended()
    ledger.close()

    assert 2 == code and "another ironcage_proxy has it open" in log


def hanging_or_not(mock, hanging):
    """Every fifth stream ends by a cut only, and is put down in `hanging`."""
    numbers = itertools.count()

    def reply(request):
        whole = mock.default_reply(request)
        if len(whole.steps) < 4 or next(numbers) % 5:
            return whole
        hanging.append(request)
        return whole.with_steps([*whole.steps[:2], Hang()])
    return reply


class Caller(threading.Thread):
    """Makes calls, on connections of their own and on one that is kept, until it is stopped."""

    def __init__(self, port, number, stopping):
        super().__init__(name=f"mock-caller-{number}")
        self.port, self.number, self.stopping = port, number, stopping
        self.outcomes, self.fault = [], None

    def run(self):
        try:
            while not self.stopping.is_set():
                with RawClient(self.port) as client:
                    for _ in range(1 + self.number % 3):
                        if self.ask(client):
                            break
        except Exception as err:
            self.fault = err

    def ask(self, client):
        """Make one call; whether the server said that it closes."""
        path, fields = CALLS[(self.number + len(self.outcomes)) % len(CALLS)]
        client.sock.settimeout(PATIENCE_S * 6)
        client.request("POST", path, json.dumps(fields).encode())
        answer = client.read_answer()
        self.outcomes.append(outcome(path, fields, answer))
        return answer.header("connection") == "close"


def outcome(path, fields, answer):
    if answer.status != 200:
        return answer.status
    if not fields.get("stream"):
        assert answer.json["usage"]
        return "whole"
    events = sse_events(answer.body)
    name, data = events[-1]
    if path == "/v1/messages":
        assert name in ("message_stop", "error"), events
        return "cut" if name == "error" else "whole"
    if path == "/v1/responses":
        kind = json.loads(data)["type"]
        assert kind in ("response.completed", "error", "response.failed"), events
        return "whole" if kind == "response.completed" else "cut"
    assert data == "[DONE]" or "error" in json.loads(data), events
    return "whole" if data == "[DONE]" and not any('"error"' in d for _, d in events) else "cut"


def restarts(mock, listener, ledger, rounds, threads, cuts):
    """Calls go on through so many restarts: (outcomes, exits)."""
    hanging: list = []
    mock.always = hanging_or_not(mock, hanging) if cuts else None
    flags = "--token", TOKEN, "--budget", "100", "--ledger", ledger
    environ, stopping, exits = proxy_environment(mock), threading.Event(), []
    with contextlib.ExitStack() as stack:
        serving = stack.enter_context(Handed(listener, *flags, environ=environ))
        serving.wait_until_it_serves()
        callers = [Caller(port_of(listener), number, stopping) for number in range(threads)]
        for caller in callers:
            caller.start()
        for _ in range(rounds):
            count = sum(len(caller.outcomes) for caller in callers)
            following = stack.enter_context(Handed(listener, *flags, environ=environ))
            while not any(caller.fault for caller in callers) and (
                    sum(len(caller.outcomes) for caller in callers) < count + threads // 2
                    or (cuts and not hanging)):
                pause(0.01, "between two looks at load that may take long")
            exits.append(stopped(serving, hanging))
            following.wait_until_it_serves()
            serving = following
        stopping.set()
        mock.always = None
        if cuts:
            exits.append(stopped(serving, hanging))
            serving = stack.enter_context(Handed(listener, *flags, environ=environ))
            serving.wait_until_it_serves()
        for caller in callers:
            caller.join(PATIENCE_S * 6)
        assert [] == [caller.fault for caller in callers if caller.fault is not None]
        exits.append(stopped(serving, []))
    return [kind for caller in callers for kind in caller.outcomes], exits


def stopped(serving, hanging):
    """Stop a process, which lets calls finish or, where some hang, cuts them at a second signal."""
    serving.process.send_signal(signal.SIGTERM)
    for patience_s in (0.2, 5, 5):               # of two signals that come at once one is seen
        with contextlib.suppress(subprocess.TimeoutExpired):
            serving.process.wait(patience_s)
            break
        if hanging:
            serving.process.send_signal(signal.SIGTERM)
    hanging.clear()
    return serving.ended()


def check_restarts(mock, listener, ledger, rounds, threads, cuts):
    outcomes, exits = restarts(mock, listener, ledger, rounds, threads, cuts)

    assert {0} == {code for code, _ in exits}, exits
    if cuts:
        assert {"whole", "cut"} <= set(outcomes) <= {"whole", "cut", 503}
    else:
        assert {"whole"} == set(outcomes)
    rows = ic.ledger_rows(ledger, "SELECT * FROM calls")
    assert [] == [row for row in rows if row["settled_ms"] is None
                  or row["estimated"] == "the proxy ended"]
    assert len(mock.seen) <= len(rows) == len({row["request_id"] for row in rows}) <= len(outcomes)
    assert sum(row["cost_microdollars"] for row in rows) >= mock.billed_microdollars
    audit = run_program("audit", "--ledger", ledger)
    assert 0 == audit.returncode, audit.stdout
    print({kind: outcomes.count(kind) for kind in set(outcomes)})


@posix
@pytest.mark.parametrize("cuts", [False, True])
def test_two_restarts_under_load_refuse_and_reset_nobody(mock, listener, tmp_path, cuts):
    check_restarts(mock, listener, str(tmp_path / "cage.db"), 2, 8, cuts)


@posix
@pytest.mark.soak
@pytest.mark.parametrize("cuts", [False, True])
def test_twenty_restarts_under_sixteen_threads_refuse_and_reset_nobody(mock, listener, tmp_path,
                                                                       cuts):
    check_restarts(mock, listener, str(tmp_path / "cage.db"), 20, 16, cuts)


# What our own stop cuts.

@pytest.mark.parametrize("path, fields", CALLS[1:], ids=[
    "chat", "messages", "responses", "messages on OpenAI", "chat on Claude"])
def test_a_stream_that_our_stop_cuts_ends_with_its_dialects_error_and_is_settled_once(
        mock, path, fields):
    proxy = start_proxy(mock, "--budget", "1", timeouts={"drain_s": 0.1})
    mock.always = lambda request: mock.default_reply(request).with_steps(
        [*mock.default_reply(request).steps[:4], Hang()])
    settled = []
    commit = proxy.router.controller.commit
    proxy.router.controller.commit = lambda *args: (settled.append(args), commit(*args))
    with RawClient(proxy.port) as client:
        client.request("POST", path, json.dumps(fields).encode())
        status, _ = client.read_head()
        first = client.read_chunk()
        proxy.stop()
        body = first + b"".join(iter(client.read_chunk, b""))
        assert client.is_closed_by_server()

    name, data = [event for event in sse_events(body) if event[1] != "[DONE]"][-1]
    assert 200 == status and "the proxy was stopped" in data
    assert "overloaded" in data
    assert name == {"/v1/messages": "error", "/v1/responses": "error"}.get(path)
    assert 1 == len(settled) and settled[0][1] > 0
    assert 0 == proxy.router.controller.total_reserved()


def test_a_call_without_a_stream_that_our_stop_cuts_is_a_503(mock):
    proxy = start_proxy(mock, "--budget", "1", timeouts={"drain_s": 0.1})
    mock.always = Reply(framing="chunked", steps=(b"{", Hang()))
    with RawClient(proxy.port) as client:
        client.request("POST", "/v1/chat/completions", json.dumps(CHAT).encode())
        mock.wait_for_requests(1)
        proxy.stop()
        answer = client.read_answer()

    assert (503, "overloaded") == (answer.status, answer.json["error"]["code"])
