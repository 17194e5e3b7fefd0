"""What an operator relies on: alerts, keys in files that are rotated, and probes of readiness."""
import http.server
import json
import os
import queue
import socket
import sqlite3
import threading

import pytest
from support import (ADMIN_TOKEN, ANTHROPIC_KEY, OPENAI_KEY, PATIENCE_S, TOKEN, Gate, RawClient,
                     call, program, proxy_environment, start_proxy, until)

CHAT = {"model": "gpt-4o-mini", "max_tokens": 100,
        "messages": [{"role": "user", "content": "hello"}]}
ALICE = "ic_alice_canary_0123456789"
NEW_KEY = "sk-canary-rotated-0123456789abcdef"


def chat(proxy, token=TOKEN, **more):
    return call(proxy.port, "POST", "/v1/chat/completions", {**CHAT, **more}, token=token)


# Alerts.

class Receiver:
    """Takes alerts; answers with the scripted statuses, and then with 200."""

    def __init__(self, *statuses):
        self.taken, left = queue.Queue(), [*statuses]

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(handler):
                body = handler.rfile.read(int(handler.headers["content-length"]))
                status = left.pop(0) if left else 200
                self.taken.put((status, handler.path, json.loads(body)))
                handler.send_response(status)
                handler.send_header("location", "http://127.0.0.1:9/elsewhere")
                handler.send_header("content-length", "0")
                handler.end_headers()

            def log_message(handler, *_):
                pass

        self.server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/hook/T0/s3cret-path?sig=s3cret"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), name="mock-receiver",
                         daemon=True).start()

    def next(self):
        return self.taken.get(timeout=PATIENCE_S)

    def close(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def receiver_of():
    made = []

    def make(*statuses):
        made.append(Receiver(*statuses))
        return made[-1]

    yield make
    for receiver in made:
        receiver.close()


def config_of(path, *tokens, **more):
    new = path.with_suffix(".tmp")
    new.write_text(json.dumps({"tokens": tokens, **more}))
    os.replace(new, path)
    return str(path)


def test_each_threshold_of_the_proxy_and_of_a_token_is_posted_once(mock, proxy_for, receiver_of,
                                                                   tmp_path):
    receiver, config = receiver_of(), tmp_path / "cage.json"
    alice = {"name": "alice", "token": ALICE, "budget_usd": "0.0002"}
    proxy = proxy_for("--budget", "1", "--alert-url", receiver.url,
                      "--config", config_of(config, alice))

    while chat(proxy, ALICE, max_tokens=10).status == 200:
        config_of(config, alice, prices={})                       # reloads on the way change nothing
        proxy.reload_asked = True
        until(lambda: not proxy.reload_asked, "a reload")
    proxy.stop()

    posted = [body for _, _, body in receiver.taken.queue]
    spent = proxy.router.controller.budget("alice").spent
    expected = [percent for percent in (50, 80, 90, 100) if spent * 100 >= percent * 200]
    assert expected[:2] == [50, 80]
    assert [("budget_threshold", "alice", 200, percent) for percent in expected] == [
        tuple(body[name] for name in ("event", "scope", "limit_microdollars", "percent"))
        for body in posted]
    assert all(body["text"].startswith("ironcage: the token alice has spent $0.000") and
               body["at"].endswith("Z") and body["version"] for body in posted)


def test_a_threshold_comes_once_in_a_period_and_of_a_limit_in_whatever_order_it_is_seen():
    thresholds, budget = program().Thresholds(), program().Budget("a", 100, 0, 0, None, "day", 7)

    seen = [[*thresholds.passed(budget._replace(**amounts))] for amounts in (
        {"spent": 85}, {"spent": 40}, {"spent": 85},               # the second was read before
        {"spent": 85, "limit": 200}, {"spent": 120, "limit": 200}, {"spent": 85},
        {"spent": 60, "since_s": 8}, {"spent": 0, "limit": 0, "since_s": 8},
        {"spent": 9, "limit": None, "since_s": 8})]

    assert [[50, 80], [], [], [], [50], [], [50], [50, 80, 90, 100], []] == seen


def test_a_restart_repeats_no_threshold_that_was_passed(mock, proxy_for, receiver_of, tmp_path):
    receiver = receiver_of()
    flags = ["--budget", "0.0002", "--alert-url", receiver.url, "--ledger", str(tmp_path / "c.db")]
    first = proxy_for(*flags)
    while first.router.controller.total_spent() < 100:
        assert 200 == chat(first).status
    first.stop()
    before = receiver.taken.qsize()
    again = proxy_for(*flags)
    passed = sum(again.router.controller.total_spent() >= 2 * p for p in (50, 80, 90, 100))
    chat(again)
    again.stop()
    now_passed = sum(again.router.controller.total_spent() >= 2 * p for p in (50, 80, 90, 100))

    assert 1 <= passed == before
    assert now_passed - passed == receiver.taken.qsize() - before


def test_an_alert_is_sent_again_until_it_is_taken_and_a_no_is_final(
        proxy_for, receiver_of, caplog, monkeypatch):
    monkeypatch.setattr(program(), "MAX_BACKOFF_S", 0.05)
    receiver = receiver_of(500, 429, 200, 302, 404, 200)
    proxy = proxy_for("--alert-url", receiver.url)

    for name in ("one", "two", "three", "four"):
        proxy.router.reporter.alert(name, "something happened")
    seen = [receiver.next() for _ in range(6)]

    assert [(500, "one"), (429, "one"), (200, "one"), (302, "two"), (404, "three"), (200, "four")] \
        == [(status, body["event"]) for status, _, body in seen]
    assert {"/hook/T0/s3cret-path?sig=s3cret"} == {path for _, path, _ in seen}
    logged = " ".join(f"{record.getMessage()} {getattr(record, 'fields', '')}"
                      for record in caplog.records)
    assert "s3cret" not in logged and "127.0.0.1" in logged


def test_a_receiver_that_never_answers_holds_up_no_call_and_the_queue_is_bounded(
        mock, proxy_for, monkeypatch):
    monkeypatch.setattr(program(), "ALERT_STOP_S", 0.1)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        proxy = proxy_for("--budget", "1",
                          "--alert-url", f"http://127.0.0.1:{silent.getsockname()[1]}/")
        for number in range(3 * program().MAX_ALERTS):
            proxy.router.reporter.alert("test", str(number))

        assert 200 == chat(proxy).status
        assert program().MAX_ALERTS == proxy.router.reporter.alerts.outbox.counts()[0]
        proxy.stop()


def test_an_alert_holds_no_key_and_a_bound_that_was_exceeded_is_one(mock, proxy_for, receiver_of):
    receiver = receiver_of()
    proxy = proxy_for("--budget", "1", "--alert-url", receiver.url, "--admin-token", ADMIN_TOKEN)
    mock.script(lambda request: mock.default_reply(request).__class__(
        steps=(json.dumps({"id": "x", "object": "chat.completion", "model": "gpt-4o-mini",
                           "choices": [{"index": 0, "finish_reason": "stop", "message": {
                               "role": "assistant", "content": "hi"}}],
                           "usage": {"prompt_tokens": 100_000, "completion_tokens": 9,
                                     "total_tokens": 100_009}}).encode(),)))

    chat(proxy)
    proxy.router.reporter.alert("test", f"{OPENAI_KEY} {ANTHROPIC_KEY} {ADMIN_TOKEN} {receiver.url}")
    exceeded, hidden = receiver.next()[2], receiver.next()[2]

    assert ("bound_exceeded", "default", "gpt-4o-mini") == tuple(
        exceeded[name] for name in ("event", "token", "model"))
    assert exceeded["cost_microdollars"] > exceeded["bound_microdollars"]
    assert "ironcage: *** *** *** ***" == hidden["text"]


def test_a_ledger_that_cannot_be_written_is_reported_and_again_when_it_can(mock, proxy_for,
                                                                          receiver_of, tmp_path):
    receiver, path = receiver_of(), tmp_path / "cage.db"
    proxy = proxy_for("--budget", "1", "--ledger", str(path), "--alert-url", receiver.url)

    assert 200 == call(proxy.port, "GET", "/readyz").status
    os.rename(path, tmp_path / "away.db")
    until(lambda: call(proxy.port, "GET", "/readyz").status == 503, "not ready")
    lost = receiver.next()[2]
    os.rename(tmp_path / "away.db", path)
    back = receiver.next()[2]

    assert ["ledger_unavailable", "ledger_available"] == [lost["event"], back["event"]]
    until(lambda: call(proxy.port, "GET", "/readyz").status == 200, "ready again")
    assert 200 == chat(proxy).status


def test_an_alert_thread_that_fails_ends_the_proxy_as_any_other_does(proxy_for, receiver_of):
    proxy = proxy_for("--alert-url", receiver_of().url)
    proxy.router.reporter.alerts.outbox._send = lambda *_: 1 / 0

    proxy.router.reporter.alert("test", "text")

    until(lambda: proxy.failure == "ironcage-alerts", "the end")


@pytest.mark.parametrize("url, fault", [
    ("http://hooks.example.com/s3cret", "in the clear"), ("ftp://x/s3cret", "must be an http"),
    ("https://user:s3cret@x/", "no user name")])
def test_an_alert_url_that_is_refused_is_not_shown(url, fault):
    with pytest.raises(program().Misconfigured, match=fault) as refused:
        start_proxy(None, "--alert-url", url)

    assert "s3cret" not in str(refused.value)


# Keys in files.

def replaced(path, text):
    new = path.with_suffix(".new")
    new.write_text(text)
    os.replace(new, path)


@pytest.mark.parametrize("way", ["variable", "config"])
def test_a_key_in_a_file_is_read_again_and_a_broken_one_changes_nothing(mock, proxy_for, tmp_path,
                                                                        caplog, way):
    path = tmp_path / "key"
    path.write_text(OPENAI_KEY + "\n")
    environ = {"IRONCAGE_OPENAI_BASE_URL": mock.url + "/v1", "OPENAI_API_KEY_FILE": str(path)}
    flags = []
    if way == "config":
        del environ["OPENAI_API_KEY_FILE"]
        flags = ["--config", config_of(tmp_path / "c.json", providers={"openai": {
            "base_url": mock.url + "/v1", "key_file": str(path)}})]
    proxy = proxy_for("--budget", "1", *flags, environ=environ)
    assert 200 == chat(proxy).status

    def reloaded(text):
        caplog.clear()
        replaced(path, text)
        until(lambda: "configuration read" in caplog.text, "a reload")
        return caplog.text

    for broken in ("", "two words", '"' + NEW_KEY + '"', "sk-\x01canary"):
        told = reloaded(broken)
        assert "a secret stays as it was" in told and NEW_KEY not in told
        assert 1 == len([r for r in caplog.records if r.levelname == "ERROR"])
        assert 200 == chat(proxy).status
    assert "the key of a provider was changed" in reloaded(NEW_KEY)
    refused = chat(proxy).status                      # the mock knows the old key only

    assert (401, f"Bearer {NEW_KEY}") == (refused, mock.seen[-1].header("authorization"))
    assert NEW_KEY not in caplog.text


def test_a_stream_in_flight_keeps_its_key_and_a_removed_file_does_too(mock, proxy_for, tmp_path):
    path, gate = tmp_path / "key", Gate()
    path.write_text(OPENAI_KEY)
    mock.script(lambda request: mock.default_reply(request).with_steps(
        [mock.default_reply(request).steps[0], gate, *mock.default_reply(request).steps[1:]]))
    proxy = proxy_for(environ={"IRONCAGE_OPENAI_BASE_URL": mock.url + "/v1",
                               "OPENAI_API_KEY_FILE": str(path)})
    with RawClient(proxy.port) as client:
        client.request("POST", "/v1/chat/completions",
                       json.dumps({**CHAT, "stream": True}).encode())
        status, headers = client.read_head()
        client.read_chunk()
        replaced(path, NEW_KEY)
        until(lambda: proxy.router.providers["openai"].key == NEW_KEY, "the new key")
        gate.event.set()
        rest = b"".join(iter(client.read_chunk, b""))
    path.unlink()
    until(lambda: proxy._files_seen[str(path)] is None, "the look")

    assert rest.endswith(b"data: [DONE]\n\n") and ("x-accel-buffering", "no") in headers
    assert NEW_KEY == proxy.router.providers["openai"].key


def test_the_proxys_own_token_is_rotated_by_its_file(mock, proxy_for, tmp_path):
    path = tmp_path / "token"
    path.write_text("ic_first_0123456789\n")
    settings = program().settings_from(["--port", "0"], {
        **proxy_environment(mock), "IRONCAGE_TOKEN_FILE": str(path),
        "IRONCAGE_ADMIN_TOKEN": ADMIN_TOKEN})
    with program().ProxyServer(settings) as proxy:
        first = chat(proxy, "ic_first_0123456789").status
        replaced(path, ADMIN_TOKEN)                    # which would make every caller the admin
        until(lambda: proxy._files_seen == {
            name: program()._file_state(name) for name in proxy._files_seen}, "the look")
        still = chat(proxy, "ic_first_0123456789").status
        replaced(path, "ic_second_0123456789")
        until(lambda: chat(proxy, "ic_second_0123456789").status == 200, "the new token")

        assert (200, 200, 401) == (first, still, chat(proxy, "ic_first_0123456789").status)


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX")
def test_a_secret_that_others_can_read_is_warned_of_once(proxy_for, tmp_path, caplog):
    for name, mode in (("open", 0o644), ("closed", 0o600)):
        (tmp_path / name).write_text(NEW_KEY)
        os.chmod(tmp_path / name, mode)

    proxy_for(environ={"OPENAI_API_KEY_FILE": str(tmp_path / "open"),
                       "ANTHROPIC_API_KEY_FILE": str(tmp_path / "closed")})

    warned = [record.fields["file"] for record in caplog.records if "others" in record.message]
    assert [str(tmp_path / "open")] == warned


def test_a_variable_that_is_like_no_setting_is_shown_at_the_start_and_by_check(proxy_for, capsys,
                                                                               monkeypatch):
    monkeypatch.setenv("IRONCAGE_LIMIT", "5")

    banner = program().banner(proxy_for(environ=dict(os.environ)))
    code = program().main(["check", "--port", "0"])

    assert "  warning:            no setting reads IRONCAGE_LIMIT" in banner.splitlines()
    assert (0, True) == (code, "warning   no setting reads IRONCAGE_LIMIT\n"
                         in capsys.readouterr().out)


def test_another_empty_variable_sets_nothing_and_is_shown_at_the_start(proxy_for):
    banner = program().banner(proxy_for(environ={"IRONCAGE_ALERT_URL": ""}))

    assert "  warning:            IRONCAGE_ALERT_URL is empty, and sets nothing" \
        in banner.splitlines()


def test_a_shared_budget_that_admits_no_call_yet_is_not_ready(proxy_for, monkeypatch):
    proxy = proxy_for()
    monkeypatch.setattr(proxy.router.controller.accounts, "as_json",
                        lambda: {"fault": "redis://engine.internal waits"})

    answer = call(proxy.port, "GET", "/readyz")

    assert (503, b"the shared budget admits no call yet\n") == (answer.status, answer.body)


# Probes.

@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_a_probe_needs_no_token_and_no_host_of_ours(proxy, path, method):
    with RawClient(proxy.port) as client:
        client.send(f"{method} {path} HTTP/1.1\r\nhost: 10.1.2.3:8787\r\n\r\n".encode())
        answer = client.read_answer(to_head=method == "HEAD")

    assert (200, b"" if method == "HEAD" else b"ok\n") == (answer.status, answer.body)


def test_a_probe_learns_nothing_and_opens_nothing_else(proxy):
    with RawClient(proxy.port) as client:
        client.send(b"GET / HTTP/1.1\r\nhost: 10.1.2.3\r\n\r\n")
        assert 403 == client.read_answer().status
    assert 401 == call(proxy.port, "POST", "/healthz", {}, token="ic_nobody_0123456789").status


def test_a_ledger_that_another_program_holds_is_not_ready(proxy_for, tmp_path, monkeypatch):
    monkeypatch.setattr(program(), "LEDGER_BUSY_S", 0.1)
    path = tmp_path / "cage.db"
    proxy = proxy_for("--ledger", str(path))
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")

    answer = call(proxy.port, "GET", "/readyz")
    healthy = call(proxy.port, "GET", "/healthz").status
    other.execute("ROLLBACK")
    other.close()

    assert (503, b"the ledger cannot be written\n", 200) == (answer.status, answer.body, healthy)
    until(lambda: call(proxy.port, "GET", "/readyz").status == 200, "ready")


def test_a_proxy_that_stops_is_not_ready(proxy):
    with RawClient(proxy.port) as client:
        client.send(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n")
        client.read_answer()
        proxy.is_stopping = True
        client.send(b"GET /readyz HTTP/1.1\r\nhost: x\r\n\r\n")
        answer = client.read_answer()
    proxy.is_stopping = False

    assert (503, b"the proxy is stopping\n") == (answer.status, answer.body)
