"""Requests run in one slot (Slot), so that what is slow must not be done in one: each hold-up here
lasts until the test ends it, and meanwhile another caller is served."""
import contextlib
import gzip
import json
import socket
import sqlite3
import threading

import pytest
from support import (OPENAI_KEY, PATIENCE_S, TOKEN, Gate, RawClient, Reply, call, program,
                     proxy_environment, until)

CHAT = {"model": "gpt-4o-mini", "max_tokens": 100,
        "messages": [{"role": "user", "content": "hello"}]}
LARGE_CHAT = {**CHAT, "messages": [{"role": "user", "content": "words " * 20_000}]}
ic = program()


def asking(proxy, fields=CHAT):
    thread = threading.Thread(target=lambda: call(proxy.port, "POST", "/v1/chat/completions",
                                                  fields))
    thread.start()
    return thread


@contextlib.contextmanager
def a_silent_provider(mock, proxy_for, **_):
    proxy, gate = proxy_for("--budget", "1"), Gate()
    mock.script(lambda request: mock.default_reply(request).with_steps(
        [gate, *mock.default_reply(request).steps]))
    thread = asking(proxy)
    mock.wait_for_requests(1)
    try:
        yield proxy
        assert thread.is_alive()
    finally:
        gate.event.set()
        thread.join()


@contextlib.contextmanager
def a_provider_that_accepts_no_connection(mock, proxy_for, tmp_path, monkeypatch):
    begun = threading.Event()
    connect = ic.KeepAliveHandler._connect

    def noted(handler, request, *args):
        if request.host == f"127.0.0.1:{deaf.getsockname()[1]}":
            begun.set()
        return connect(handler, request, *args)

    monkeypatch.setattr(ic.KeepAliveHandler, "_connect", noted)
    with contextlib.ExitStack() as stack:
        deaf = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(8):                     # what its queue can take, and more
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(deaf.getsockname())
        config = tmp_path / "config.json"
        config.write_text(json.dumps({"providers": {"deaf": {
            "base_url": f"http://127.0.0.1:{deaf.getsockname()[1]}", "free": True}}}))
        proxy = proxy_for("--config", str(config), timeouts={"connect_s": 1})
        thread = asking(proxy, {**CHAT, "model": "deaf/any"})
        begun.wait()
        try:
            yield proxy
            assert thread.is_alive()
        finally:
            thread.join()


@contextlib.contextmanager
def code_of_the_embedder(mock, **_):
    begun, free = threading.Event(), threading.Event()

    def on_event(event):
        if isinstance(event, ic.LlmRequestCompleted) and not begun.is_set():
            begun.set()
            free.wait()

    environ = {name: value for name, value in proxy_environment(mock).items()
               if "BASE_URL" in name}
    with ic.LlmRouter(provider_key=OPENAI_KEY, environ=environ, on_event=on_event) as router:
        ask = {"token": router.api_key}
        thread = threading.Thread(
            target=lambda: call(router.port, "POST", "/v1/chat/completions", CHAT, **ask))
        thread.start()
        begun.wait()
        try:
            yield router
            assert thread.is_alive()
        finally:
            free.set()
            thread.join()


@contextlib.contextmanager
def a_client_that_does_not_read(mock, proxy_for, monkeypatch, **_):
    proxy, begun, ready_of = proxy_for("--budget", "1"), threading.Event(), ic.ready_of

    def noted(sockets, timeout_s, *, writing=False):
        if writing:
            begun.set()
        return ready_of(sockets, timeout_s, writing=writing)

    monkeypatch.setattr(ic, "ready_of", noted)
    mock.script(Reply(headers=(("content-type", "text/event-stream"),), framing="chunked",
                      steps=(b": %s\n\n" % (b"." * 80_000),) * 400))
    with RawClient(proxy.port) as client:
        client.request("POST", "/v1/chat/completions",
                       json.dumps({**CHAT, "stream": True}).encode())
        begun.wait()
        yield proxy


@contextlib.contextmanager
def a_client_that_stops_in_its_body(mock, proxy_for, **_):
    proxy = proxy_for("--budget", "1")
    with RawClient(proxy.port) as client:
        client.send(b"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: "
                    b"Bearer " + TOKEN.encode() + b"\r\ncontent-length: 100\r\n\r\n{")
        yield proxy


@contextlib.contextmanager
def a_wait_for_budget(mock, proxy_for, **_):
    proxy, gate = proxy_for("--budget", "0.006", "--wait", "60"), Gate()
    mock.script(lambda request: mock.default_reply(request).with_steps(
        [gate, *mock.default_reply(request).steps]))
    threads = [asking(proxy, {**CHAT, "max_tokens": 9_000})]
    mock.wait_for_requests(1)
    threads.append(asking(proxy, {**CHAT, "max_tokens": 9_000}))
    until(lambda: proxy.router.controller._queue)
    try:
        yield proxy
        assert all(thread.is_alive() for thread in threads)
    finally:
        gate.event.set()
        for thread in threads:
            thread.join()


@contextlib.contextmanager
def a_locked_ledger(mock, proxy_for, tmp_path, **_):
    path, begun = tmp_path / "cage.db", threading.Event()
    proxy = proxy_for("--budget", "1", "--ledger", str(path))
    intent = proxy.ledger.intent
    proxy.ledger.intent = lambda *args: (begun.set(), intent(*args))
    other = sqlite3.connect(path)
    other.execute("BEGIN IMMEDIATE")
    thread = asking(proxy)
    begun.wait()
    try:
        yield proxy
        assert thread.is_alive()
    finally:
        other.rollback()
        other.close()
        thread.join()


LARGE = b" " * (2 * ic.LONG_WORK_BYTES)
SSE = (("content-type", "text/event-stream"),)
# What is long at work: (the function's home, its name, what is asked, what a provider answers).
LONG_WORK = {
    "a body is parsed": (ic, "parse_json_object", LARGE_CHAT, None),
    "a body is inflated": (ic.Inflater, "feed", gzip.compress(json.dumps(LARGE_CHAT).encode()), None),
    "its input is bounded": (ic, "bound_of_request", LARGE_CHAT, None),
    "its input is measured": (ic, "prompt_of", LARGE_CHAT, None),
    "it is translated": (ic, "Translator", {**LARGE_CHAT, "model": "claude-haiku-4-5"}, None),
    "an answer is read": (ic.AnswerMeter, "read_answer", CHAT, Reply(steps=(LARGE,))),
    "an answer is one JSON, though a stream was asked for": (
        ic.AnswerMeter, "read_answer", {**CHAT, "stream": True},
        Reply(headers=SSE, steps=(b"{" + LARGE + b"}",))),
    "likewise, translated": (
        ic.AnswerMeter, "read_answer", {**CHAT, "model": "claude-haiku-4-5", "stream": True},
        Reply(headers=SSE, steps=(b"{" + LARGE + b"}",))),
    "an event is read": (ic.AnswerMeter, "read_event", {**CHAT, "stream": True},
                         Reply(headers=SSE, steps=(b"data: {" + LARGE + b"}\n\n",))),
}


def large_work(home, name, asked, reply):
    @contextlib.contextmanager
    def at_work(mock, proxy_for, monkeypatch, **_):
        begun, free, work = threading.Event(), threading.Event(), getattr(home, name)

        def slow(*args, **options):
            if not begun.is_set():
                begun.set()
                free.wait()
            return work(*args, **options)

        proxy = proxy_for("--budget", "0.02")          # too little for a bound by bytes
        monkeypatch.setattr(home, name, slow)
        if reply is not None:
            mock.script(reply)
        thread = threading.Thread(target=lambda: call(
            proxy.port, "POST", "/v1/chat/completions", asked,
            headers=[("content-encoding", "gzip")] if isinstance(asked, bytes) else []))
        thread.start()
        assert begun.wait(PATIENCE_S)
        try:
            yield proxy
            assert thread.is_alive()
        finally:
            free.set()
            thread.join()
    return at_work


@contextlib.contextmanager
def a_long_look_at_the_usage(mock, proxy_for, monkeypatch, **_):
    proxy, begun, free = proxy_for("--budget", "1"), threading.Event(), threading.Event()
    recent = proxy.ledger.recent
    monkeypatch.setattr(proxy.ledger, "recent",
                        lambda *args: (begun.set(), free.wait(), recent(*args))[2])
    thread = threading.Thread(target=lambda: call(proxy.port, "GET", "/ironcage/usage"))
    thread.start()
    begun.wait()
    try:
        yield proxy
        assert thread.is_alive()
    finally:
        free.set()
        thread.join()


HOLD_UPS = [a_silent_provider, a_provider_that_accepts_no_connection, code_of_the_embedder,
            a_client_that_does_not_read, a_client_that_stops_in_its_body, a_wait_for_budget,
            a_locked_ledger, a_long_look_at_the_usage]


@pytest.mark.parametrize("hold_up", [*HOLD_UPS, *(large_work(*row) for row in LONG_WORK.values())],
                         ids=[*(hold_up.__name__ for hold_up in HOLD_UPS), *LONG_WORK])
def test_another_caller_is_served_meanwhile(mock, proxy_for, tmp_path, monkeypatch, hold_up):
    with hold_up(mock=mock, proxy_for=proxy_for, tmp_path=tmp_path,
                 monkeypatch=monkeypatch) as proxy:
        token = {"token": proxy.api_key} if hasattr(proxy, "api_key") else {}
        for path in ("/ironcage/status", "/v1/models"):
            assert 200 == call(proxy.port, "GET", path, **token).status
