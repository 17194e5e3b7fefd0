"""Server mode: key, budget and account come from an Iron Cage server, here a small real one."""
import contextlib
import http.server
import json
import threading
import time
from random import Random

import pytest
from support import (ANTHROPIC_KEY, OPENAI_KEY, TOKEN, Served, call, program, proxy_environment,
                     run_program, seeds, until)

CHAT = {"model": "gpt-4o-mini", "max_tokens": 100,
        "messages": [{"role": "user", "content": "hello"}]}
SERVER_TOKEN = "ic_server-canary-0123456789"
KEY_PATH, EVENTS_PATH = "/api/v1/agents/provider-key", "/api/v1/analytics/events"
LEASE_PATH, RETURN_PATH = "/api/v1/budget/handshake", "/api/v1/budget/return"


class ThreadingServer(http.server.ThreadingHTTPServer):
    """Its threads are known as a mock's."""
    daemon_threads = True

    def process_request_thread(self, *args):
        threading.current_thread().name = "mock-iron-cage-call"
        super().process_request_thread(*args)


class IronCage:
    """An Iron Cage server: answers by path, which a test replaces, and what it was asked."""

    def __init__(self, base_url):
        self.asked = []                                # (path, body), as they came
        self.authorizations = set()
        self.changed = threading.Condition()
        self.grants = 0
        self.answers = {
            KEY_PATH: lambda body: (200, {"provider_key": OPENAI_KEY, "provider": "openai",
                                          "base_url": base_url}),
            LEASE_PATH: self.lease, RETURN_PATH: lambda body: (200, {}),
            EVENTS_PATH: lambda body: (202, {})}
        double = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True          # or the body waits 40 ms for an acknowledgement

            def do_POST(self):
                raw = self.rfile.read(int(self.headers["content-length"]))
                status, answer = double.answer(self.path, json.loads(raw),
                                               self.headers["authorization"])
                data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args):
                pass

        self._server = ThreadingServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,),
                                        name="mock-iron-cage", daemon=True)
        self._thread.start()

    def lease(self, body):
        self.grants += 1
        return 200, {"budget_granted": 500_000, "lease_id": f"lease_{self.grants}"}

    def answer(self, path, body, authorization):
        with self.changed:
            self.asked.append((path, body))
            self.authorizations.add(authorization)
            self.changed.notify_all()
        return self.answers[path](body)

    def bodies(self, path):
        with self.changed:
            return [body for asked, body in self.asked if asked == path]

    def wait_for(self, path, count):
        with self.changed:
            assert self.changed.wait_for(
                lambda: sum(asked == path for asked, _ in self.asked) >= count, 20), self.asked

    def close(self):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def cage(mock):
    server = IronCage(mock.url)
    yield server
    server.close()


@pytest.fixture
def proxy_of(mock, cage, proxy_for, monkeypatch):
    """A proxy in server mode, without a key of its own, which waits for nothing needlessly."""
    monkeypatch.setattr(program(), "SERVER_RETRY_S", 0)
    monkeypatch.setattr(program(), "RETRY_POLL_S", 0.01)
    monkeypatch.setattr(program(), "SERVER_STOP_S", 0.1)
    environ = {name: value for name, value in proxy_environment(mock).items()
               if not name.endswith("_API_KEY")}

    def start(*argv):
        return proxy_for("--server-url", cage.url, "--server-token", SERVER_TOKEN, *argv,
                         environ=environ)
    return start


def chat(proxy, **more):
    return call(proxy.port, "POST", "/v1/chat/completions", {**CHAT, **more})


def status(proxy):
    return call(proxy.port, "GET", "/ironcage/status").json


def test_key_and_budget_come_from_the_server_and_the_rest_goes_back(mock, cage, proxy_of):
    proxy = proxy_of()
    answer = chat(proxy)
    told = status(proxy)
    proxy.stop()

    assert (200, f"Bearer {OPENAI_KEY}") == (answer.status, mock.seen[0].header("authorization"))
    assert (500_000, mock.billed_microdollars) == (told["limit_microdollars"],
                                                   told["spent_microdollars"])
    assert ("lease_1", 500_000) == (told["server"]["lease_id"],
                                    told["server"]["granted_microdollars"])
    assert [{"ic_token": SERVER_TOKEN}] == cage.bodies(KEY_PATH)
    assert [{"ic_token": SERVER_TOKEN, "provider": "openai"}] == cage.bodies(LEASE_PATH)
    assert [{"lease_id": "lease_1", "spent_microdollars": mock.billed_microdollars}] == \
        cage.bodies(RETURN_PATH)
    assert {f"Bearer {SERVER_TOKEN}"} == cage.authorizations


def test_a_lease_is_a_limit_and_the_budget_flag_can_only_lower_it(mock, cage, proxy_of):
    cage.answers[LEASE_PATH] = lambda body: (200, {"budget_granted": 20, "lease_id": "small"})

    refused = chat(proxy_of())
    low, high = proxy_of("--budget", "0.000007"), proxy_of("--budget", "5")

    assert (402, []) == (refused.status, mock.seen)
    assert [7, 20] == [status(proxy)["limit_microdollars"] for proxy in (low, high)]


@pytest.mark.parametrize("path", [KEY_PATH, LEASE_PATH])
@pytest.mark.parametrize("answer, words", [
    ((403, {"error": "agent is suspended", "code": "AGENT_SUSPENDED"}), "AGENT_SUSPENDED"),
    ((503, {"error": "down"}), "down"), ((200, b"<html>"), "not what its protocol says"),
    ((200, {"budget_granted": True, "lease_id": "x", "provider": "openai", "provider_key": 7}),
     "not what its protocol says"),
    ((200, {"budget_granted": -1, "lease_id": "", "provider": "nobody", "provider_key": "k"}),
     "not what its protocol says"),
    ((302, b""), "302"), ((500, f"{SERVER_TOKEN}".encode()), "500")])
def test_without_a_key_or_a_lease_nothing_is_spent_until_the_server_is_back(
        mock, cage, proxy_of, path, answer, words):
    right, cage.answers[path] = cage.answers[path], lambda body: answer
    proxy = proxy_of()

    refused = chat(proxy)
    none_sent = not mock.seen
    cage.answers[path] = right
    served = chat(proxy)

    error = refused.json["error"]
    assert (502, "iron_cage_server_failed", True) == (refused.status, error["type"], none_sent)
    assert words in error["message"] and SERVER_TOKEN not in error["message"]
    assert 200 == served.status


def test_a_server_that_cannot_be_reached_is_one_clear_sentence(mock, cage, proxy_of):
    cage.close()

    answer = chat(proxy_of())

    assert 502 == answer.status
    assert "Iron Cage server" in answer.json["error"]["message"]
    assert [] == mock.seen


def test_a_burst_asks_for_the_key_once(mock, cage, proxy_of):
    right, gate = cage.answers[KEY_PATH], threading.Event()
    cage.answers[KEY_PATH] = lambda body: (503, {})
    proxy = proxy_of()                                 # its first try failed
    cage.answers[KEY_PATH] = lambda body: gate.wait(20) and right(body)
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(chat(proxy))) for _ in range(12)]
    for thread in threads:
        thread.start()
    cage.wait_for(KEY_PATH, 2)
    gate.set()
    for thread in threads:
        thread.join()

    assert [200] * 12 == [answer.status for answer in answers]
    assert (2, 1) == (len(cage.bodies(KEY_PATH)), len(cage.bodies(LEASE_PATH)))


def test_an_old_key_serves_through_an_outage_of_the_server(mock, cage, proxy_of):
    proxy = proxy_of("--cache-ttl", "0")
    cage.answers[KEY_PATH] = lambda body: (503, {"error": "down"})

    assert [200, 200] == [chat(proxy).status, chat(proxy).status]

    assert len(cage.bodies(KEY_PATH)) > 2


def test_a_key_that_is_withdrawn_is_not_used_again(mock, cage, proxy_of):
    proxy = proxy_of("--cache-ttl", "0")
    cage.answers[KEY_PATH] = lambda body: (403, {"error": "revoked", "code": "REVOKED"})

    answer = chat(proxy)

    assert (502, []) == (answer.status, mock.seen)
    assert "revoked" in answer.json["error"]["message"]


def test_a_key_that_its_provider_refuses_is_fetched_anew(mock, cage, proxy_of):
    right = cage.answers[KEY_PATH]
    cage.answers[KEY_PATH] = lambda body: (200, {**right(body)[1], "provider_key": "sk-rotated"})
    proxy = proxy_of()
    refused = chat(proxy)
    cage.answers[KEY_PATH] = right

    assert (401, 200) == (refused.status, chat(proxy).status)
    assert 2 == len(cage.bodies(KEY_PATH))


def test_the_server_can_name_anthropic(mock, cage, proxy_of):
    cage.answers[KEY_PATH] = lambda body: (200, {
        "provider_key": ANTHROPIC_KEY, "provider": "anthropic", "base_url": mock.url})

    answer = chat(proxy_of(), model="claude-haiku-4-5")

    assert (200, ANTHROPIC_KEY) == (answer.status, mock.seen[0].header("x-api-key"))


def test_a_base_url_from_the_server_must_be_safe(mock, cage, proxy_of):
    cage.answers[KEY_PATH] = lambda body: (200, {
        "provider_key": OPENAI_KEY, "provider": "openai", "base_url": "http://lab.example"})

    assert (502, []) == (chat(proxy_of()).status, mock.seen)


def test_each_call_is_told_of(mock, cage, proxy_of):
    from support import openai_error
    proxy = proxy_of("--agent-id", "agent_7")
    chat(proxy)
    mock.script(openai_error(429, "slow down"))
    chat(proxy)
    proxy.stop()

    done, failed = cage.bodies(EVENTS_PATH)
    common = {"ic_token": SERVER_TOKEN, "provider": "openai", "model": "gpt-4o-mini",
              "agent_id": "agent_7"}
    assert {**common, "event_type": "llm_request_completed",
            "cost_micros": mock.billed_microdollars}.items() <= done.items()
    assert {**common, "event_type": "llm_request_failed", "error_code": 429}.items() \
        <= failed.items()
    assert done["event_id"] != failed["event_id"] and done["input_tokens"] > 0
    assert abs(done["timestamp_ms"] / 1000 - time.time()) < 60


def test_ten_events_are_sent_at_once_and_those_that_are_refused_are_dropped(mock, cage, proxy_of):
    cage.answers[EVENTS_PATH] = lambda body: (400, {"error": "no"})
    proxy = proxy_of()
    for _ in range(10):
        assert 200 == chat(proxy).status

    cage.wait_for(EVENTS_PATH, 10)
    proxy.stop()

    assert 10 == len(cage.bodies(EVENTS_PATH))
    assert 10 == proxy.router.server.as_json()["events_dropped"]


def test_events_outlive_an_outage_and_what_has_no_room_is_counted(
        mock, cage, proxy_of, monkeypatch):
    monkeypatch.setattr(program(), "MAX_EVENTS", 3)
    cage.answers[EVENTS_PATH] = lambda body: (503, {})
    proxy = proxy_of()
    for _ in range(5):
        chat(proxy)
    told = status(proxy)["server"]
    metrics = call(proxy.port, "GET", "/ironcage/metrics").body.decode()
    cage.answers[EVENTS_PATH] = lambda body: (200, {})
    proxy.stop()

    assert (3, 2) == (told["events_waiting"], told["events_dropped"])
    assert "ironcage_server_events_dropped 2\n" in metrics
    assert 3 == len({body["event_id"] for body in cage.bodies(EVENTS_PATH)})
    assert (2, 0) == (proxy.router.server.as_json()["events_dropped"], proxy.router.server.as_json()[
        "events_waiting"])


def test_a_server_that_failed_is_left_alone_for_a_while(cage, proxy_of, monkeypatch):
    cage.answers[LEASE_PATH] = lambda body: (503, {})
    proxy, at_the_start = proxy_of(), len(cage.bodies(LEASE_PATH))
    monkeypatch.setattr(program(), "SERVER_RETRY_S", 60)

    assert [502] * 3 == [chat(proxy).status for _ in range(3)]
    assert at_the_start + 1 == len(cage.bodies(LEASE_PATH))


def test_while_the_proxy_stops_its_server_is_asked_for_no_lease(cage, proxy_of):
    cage.answers[LEASE_PATH] = lambda body: (503, {})
    server = proxy_of().router.server
    before, server._is_stopping = len(cage.asked), True

    with pytest.raises(program().CageServerFailed, match="stopping"):
        server.check_lease()

    assert before == len(cage.asked)


def test_an_event_that_cannot_be_taken_now_is_sent_again(mock, cage, proxy_of):
    answers = iter([(503, {})])
    cage.answers[EVENTS_PATH] = lambda body: next(answers, (200, {}))
    proxy = proxy_of()
    chat(proxy)
    proxy.stop()

    assert 2 == len(cage.bodies(EVENTS_PATH))
    assert 0 == proxy.router.server.as_json()["events_dropped"]


def test_events_that_the_server_never_took_are_counted_at_the_end(mock, cage, proxy_of):
    cage.answers[EVENTS_PATH] = lambda body: (503, {})
    proxy = proxy_of()
    chat(proxy)
    proxy.stop()

    assert 1 == proxy.router.server.as_json()["events_dropped"]


def test_a_lease_that_could_not_be_given_back_is_at_the_next_start(
        mock, cage, proxy_of, tmp_path):
    ledger = str(tmp_path / "ledger.db")
    cage.answers[RETURN_PATH] = lambda body: (503, {})
    proxy = proxy_of("--ledger", ledger)
    chat(proxy)
    proxy.stop()
    spent, before = mock.billed_microdollars, len(cage.bodies(RETURN_PATH))
    cage.answers[RETURN_PATH] = lambda body: (200, {})

    again = proxy_of("--ledger", ledger)
    limit = status(again)["limit_microdollars"]
    again.stop()
    proxy_of("--ledger", ledger).stop()

    assert before > 1                                  # it was tried for a while
    assert [("lease_1", spent), ("lease_2", 0), ("lease_3", 0)] == [
        (body["lease_id"], body["spent_microdollars"]) for body in cage.bodies(RETURN_PATH)[before:]]
    assert spent + 500_000 == limit                    # the new lease counts from now


def test_of_two_leases_that_could_not_be_given_back_each_tells_its_own_spend(
        mock, cage, proxy_of, tmp_path):
    ledger = str(tmp_path / "ledger.db")
    cage.answers[RETURN_PATH] = lambda body: (503, {})
    for calls in (1, 2):
        proxy = proxy_of("--ledger", ledger)
        for _ in range(calls):
            chat(proxy)
        proxy.stop()
    cage.answers[RETURN_PATH] = lambda body: (200, {})
    before = len(cage.bodies(RETURN_PATH))
    proxy_of("--ledger", ledger).stop()

    first, second, third = (body["spent_microdollars"] for body in cage.bodies(RETURN_PATH)[before:])
    assert (mock.billed_microdollars, 2 * first, 0) == (first + second, second, third)


def test_a_lease_outlives_the_process_that_is_killed(mock, cage, tmp_path):
    """What the dead process had in flight is charged, and its lease given back with it."""
    ledger = str(tmp_path / "ledger.db")
    flags = ["--token", TOKEN, "--ledger", ledger, "--server-url", cage.url, "--server-token",
             SERVER_TOKEN]
    with Served(*flags) as first:
        assert 200 == chat(first).status
        first.process.kill()
        first.process.wait()
    with Served(*flags) as second:
        assert 200 == chat(second).status
        second.stop()

    assert [("lease_1", True), ("lease_2", True)] == [
        (body["lease_id"], body["spent_microdollars"] > 0) for body in cage.bodies(RETURN_PATH)]


def test_a_lease_that_is_granted_while_the_proxy_stops_goes_back_too(
        mock, cage, proxy_of, monkeypatch):
    monkeypatch.setattr(program(), "SERVER_STOP_S", 20)
    monkeypatch.setattr(program(), "CUT_JOIN_S", 0)
    cage.answers[LEASE_PATH] = lambda body: (503, {})          # none at the start
    proxy = proxy_of()
    server = proxy.router.server

    def granted_late(body):
        until(lambda: server._is_stopping)
        return cage.lease(body)

    def asked():
        with contextlib.suppress(OSError, AssertionError):     # it is cut
            chat(proxy)

    cage.answers[LEASE_PATH] = granted_late
    client = threading.Thread(target=asked)
    client.start()
    cage.wait_for(LEASE_PATH, 2)
    proxy.cuts_now = True
    proxy.stop()
    client.join()

    assert [{"lease_id": "lease_1", "spent_microdollars": 0}] == cage.bodies(RETURN_PATH)
    assert 0 == mock.billed_microdollars


def test_a_lease_that_cannot_be_written_down_goes_back_at_once(
        mock, cage, proxy_of, tmp_path, monkeypatch):
    cage.answers[LEASE_PATH] = lambda body: (503, {})          # none at the start
    proxy = proxy_of("--ledger", str(tmp_path / "ledger.db"))
    cage.answers[LEASE_PATH] = cage.lease

    def full_disk(lease):
        raise program().LedgerUnavailable("the disk is full")

    monkeypatch.setattr(proxy.ledger, "keep_lease", full_disk)
    answer = chat(proxy)

    assert (503, []) == (answer.status, mock.seen)
    assert [{"lease_id": "lease_1", "spent_microdollars": 0}] == cage.bodies(RETURN_PATH)


def test_no_lease_is_asked_for_once_the_proxy_has_stopped(cage, proxy_of):
    cage.answers[LEASE_PATH] = lambda body: (503, {})
    proxy = proxy_of()
    proxy.stop()

    with pytest.raises(program().CageServerFailed, match="stopping"):
        proxy.router.server.check_lease()
    assert 1 == len(cage.bodies(LEASE_PATH))


def test_the_budget_cannot_be_changed_here(cage, proxy_of):
    proxy = proxy_of("--admin-token", "admin-canary-0123456789")

    answer = call(proxy.port, "PUT", "/ironcage/budget", {"limit_usd": "9"},
                  token="admin-canary-0123456789")

    assert (403, 500_000) == (answer.status, status(proxy)["limit_microdollars"])


def test_models_of_the_servers_provider_are_listed(cage, proxy_of):
    ids = [row["id"] for row in call(proxy_of().port, "GET", "/v1/models").json["data"]]

    assert "gpt-4o-mini" in ids and not any(name.startswith("claude") for name in ids)


@pytest.mark.parametrize("flags, words", [
    (["--server-url", "http://127.0.0.1:1"], "--server-token"),
    (["--server-url", "http://cage.example", "--server-token", SERVER_TOKEN], "http"),
    (["--server-url", "nonsense", "--server-token", SERVER_TOKEN], "--server-url")])
def test_wrong_settings_are_one_line(flags, words):
    done = run_program("--port", "0", *flags)

    assert (2, "") == (done.returncode, done.stdout)
    assert words in done.stderr and 1 == done.stderr.count("\n")
    assert SERVER_TOKEN not in done.stderr


def test_an_embedded_router_in_server_mode(mock, cage):
    with program().LlmRouter(api_key=SERVER_TOKEN, server_url=cage.url, environ={}) as router:
        answer = call(router.port, "POST", "/v1/chat/completions", CHAT, token=SERVER_TOKEN)
        seen = (answer.status, router.provider, router.budget, router.total_spent())
        with pytest.raises(ValueError, match="leased"):
            router.set_budget("9")

    assert (200, "openai", 0.5, mock.billed_microdollars / 1_000_000) == seen
    assert 1 == len(cage.bodies(RETURN_PATH))


def test_no_secret_reaches_the_log(mock, cage, tmp_path):
    cage.answers[EVENTS_PATH] = lambda body: (400, {"error": f"bad {SERVER_TOKEN} {OPENAI_KEY}"})
    with Served("--token", TOKEN, "--server-url", cage.url, "--server-token",
                SERVER_TOKEN) as proxy:
        assert 200 == chat(proxy).status
        _, _, log = proxy.stop()

    assert "an event is refused" in log
    assert SERVER_TOKEN not in log


def test_a_slow_server_makes_nobody_wait_who_holds_a_key(mock, cage, proxy_of):
    right, gate = cage.answers[KEY_PATH], threading.Event()
    proxy = proxy_of("--cache-ttl", "0")
    cage.answers[KEY_PATH] = lambda body: gate.wait(20) and right(body)
    first = threading.Thread(target=chat, args=(proxy,))       # it asks for a fresh key, and waits
    first.start()
    cage.wait_for(KEY_PATH, 2)

    others = [chat(proxy).status for _ in range(3)]
    waits = first.is_alive()
    gate.set()
    first.join()

    assert ([200] * 3, True) == (others, waits)


def test_events_of_many_threads_arrive_once_each(mock, cage, proxy_of):
    proxy = proxy_of()
    long_prompt = [{"role": "user", "content": "word " * 2_000}]

    def work():
        for _ in range(5):
            chat(proxy, messages=long_prompt, max_tokens=10)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    proxy.stop()

    events = cage.bodies(EVENTS_PATH)
    assert 40 == len(events) == len({event["event_id"] for event in events})
    assert mock.billed_microdollars == sum(event["cost_micros"] for event in events)
    assert 0 == proxy.router.server.as_json()["events_dropped"]


# Whatever it answers: one clear line, no trace, and no thread that ended.

KEY = "sk-held-by-the-server-0123456789"
ODD = (None, True, False, 0, -1, 5, 10 ** 18, 10 ** 30, 1.5, 1e300, "", " ", "x", "\ud800", "a\nb",
       "\x00", "x" * 5000, "http://[", "ftp://x", "http://10.0.0.1", "https://u:p@x", [], [1], {},
       {"a": [{}]}, [[[[]]]], "Infinity")
GOOD_ANSWERS = {
    KEY_PATH: {"provider_key": KEY, "provider": "openai", "base_url": None},
    LEASE_PATH: {"budget_granted": 500_000, "lease_id": "lease_1"}}
TAKEN = {           # of these: what a key, or the name of a lease, can be
    "provider_key": ["x", "x" * 5000, "http://[", "ftp://x", "http://10.0.0.1", "https://u:p@x",
                     "Infinity"], "provider": [],
    "base_url": [None, "", "absent"], "budget_granted": [0, 5, 10 ** 18],
    "lease_id": ["x", "http://[", "ftp://x", "http://10.0.0.1", "https://u:p@x", "Infinity"]}
BODIES = {          # what is no answer of its protocol at all
    "empty": b"", "no JSON": b"<html>502 Bad Gateway</html>", "not UTF-8": b"\xff\xfe{",
    "half of it": b'{"provider_key": "sk-', "null": b"null", "a list": b"[]", "a number": b"5",
    "text": b'"x"', "many digits": b"9" * 900_000, "deep": b"[" * 900_000,
    "NaN": b'{"budget_granted": NaN, "lease_id": Infinity}',
    "huge": b'{"provider_key": "sk-0123456789abcdef0", "provider": "openai", "budget_granted": 9, '
            b'"lease_id": "lease_9", "a": "' + b"x" * 2_000_000 + b'"}',
    "twice": b'{"provider": "openai", "provider": 5}'}


@pytest.fixture
def traces(caplog):
    """The log holds no trace, and no line holds a secret."""
    caplog.set_level("DEBUG", "ironcage")
    yield
    assert [] == [record.getMessage() for record in caplog.records if record.exc_info]
    logged = "".join(f"{record.getMessage()} {vars(record).get('fields')}"
                     for record in caplog.records)
    assert KEY not in logged and SERVER_TOKEN not in logged


def check_refused(proxy, answer):
    assert 502 == answer.status, answer
    message = answer.json["error"]["message"]
    assert "iron_cage_server_failed" == answer.json["error"]["type"]
    assert message.startswith("the Iron Cage server has not given") and len(message) < 500
    assert message.isprintable()
    assert KEY not in str(answer) and SERVER_TOKEN not in str(answer)
    assert 200 == call(proxy.port, "GET", "/ironcage/status").status


@pytest.mark.parametrize("path", GOOD_ANSWERS)
@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_an_answer_that_is_no_answer_is_one_clear_line(cage, proxy_of, traces, path, body):
    base_url = cage.answers[KEY_PATH]
    cage.answers[path] = lambda asked: (200, body)
    proxy = proxy_of()

    check_refused(proxy, chat(proxy))

    cage.answers = {**cage.answers, KEY_PATH: base_url, LEASE_PATH: cage.lease}
    assert 200 == chat(proxy).status                   # nothing ended of it


@pytest.mark.parametrize("path, field", [(path, field) for path, answer in GOOD_ANSWERS.items()
                                         for field in answer])
def test_any_value_in_any_field_is_taken_or_one_clear_line(cage, traces, path, field):
    module = program()
    cage.answers[KEY_PATH] = lambda asked: (200, GOOD_ANSWERS[KEY_PATH])
    for value in (*ODD, "absent"):
        changed = {**GOOD_ANSWERS[path], field: value}
        if value == "absent":
            del changed[field]
        cage.answers[path] = lambda asked: (200, changed)
        server = module.CageServer(cage.url, SERVER_TOKEN, module.MemoryLedger(),
                                   lambda lease: None)
        try:
            server.check_lease()
        except module.CageServerFailed as err:
            assert json.dumps(value) not in map(json.dumps, TAKEN[field]), value
            assert "its answer is not what its protocol says" in err.message
        else:
            assert json.dumps(value) in map(json.dumps, TAKEN[field]), value


@pytest.mark.parametrize("seed", seeds(3, 6))
def test_random_answers_of_any_status_end_nothing(mock, cage, proxy_of, traces, seed):
    rng = Random(seed)
    answers = dict(cage.answers)

    def anything(path):
        def answer(asked):
            fields = dict(GOOD_ANSWERS.get(path, {}))
            for name in rng.sample(["provider_key", "provider", "base_url", "budget_granted",
                                    "lease_id", "error", "code", "x"], rng.randint(1, 4)):
                fields[name] = rng.choice(ODD + ("openai", f"no: {KEY}", [KEY]))
            body = rng.choice([fields, fields, [fields], b"", *BODIES.values()])
            status = rng.choice([200, 200, 201, 204, 301, 302, 400, 401, 403, 404, 429, 500, 503])
            return status, body
        return answer
    proxy = proxy_of()
    chat(proxy)
    cage.answers = {path: anything(path) for path in answers}
    for _ in range(15):
        answer = chat(proxy)
        assert answer.status in (200, 401, 402, 502), answer
        assert KEY not in str(answer)
    assert proxy.router.server.events._thread.is_alive()
    cage.answers = answers


@pytest.mark.parametrize("status", [400, 401, 403, 404, 500, 503])
@pytest.mark.parametrize("words", [
    {"error": f"key {KEY} is locked", "provider_key": KEY},
    {"error": {"message": [KEY]}, "provider_key": KEY}, {"error": "x" * 280 + KEY},
    {"code": KEY, "provider_key": KEY}, {"error": f"token {SERVER_TOKEN}", "code": SERVER_TOKEN},
    json.dumps({"error": f"token {SERVER_TOKEN}"}).replace("ic_", "\\u0069\\u0063_").encode()],
    ids=range(6))
def test_no_secret_is_in_what_a_server_says(cage, proxy_of, traces, status, words):
    """A key that it gave before, too."""
    good = cage.answers[KEY_PATH]({})[1]
    cage.answers[KEY_PATH] = lambda asked: (200, {**good, "provider_key": KEY})
    cage.answers[LEASE_PATH] = lambda asked: (status, words)
    proxy = proxy_of()

    check_refused(proxy, chat(proxy))


def test_a_lease_that_is_named_like_the_key_is_none(cage, proxy_of, traces):
    good = cage.answers[KEY_PATH]({})[1]
    cage.answers[KEY_PATH] = lambda asked: (200, {**good, "provider_key": KEY})
    cage.answers[LEASE_PATH] = lambda asked: (200, {"budget_granted": 5, "lease_id": f"l-{KEY}"})
    proxy = proxy_of()

    check_refused(proxy, chat(proxy))
