"""The Iron Cage server as it is seen from here: what is believed of its answers, kept and given
back. Its calls are replaced; those over sockets: wire/test_server_mode.py."""
import contextlib
import gc
import threading
import weakref

import pytest

import ironcage_proxy as ic

TOKEN = "ic_server-canary-0123456789"
KEY = "sk-canary-0123456789abcdef"
GIVES = {"provider_key": KEY, "provider": "openai"}
LEASES = {"budget_granted": 500, "lease_id": "lease_1"}


class Server:
    """A CageServer whose answers are scripted by path: (status, body), or an exception."""

    def __init__(self, ledger=None, **options):
        self.asked, self.taken, self.ledger = [], [], ledger or Ledger()
        self.answers = {"provider-key": (200, GIVES), "handshake": (200, LEASES),
                        "return": (200, {}), "events": (202, {})}
        self.cage = ic.CageServer("https://cage.example", TOKEN, self.ledger, self.taken.append,
                                  **options)
        self.cage._post = self.post

    def post(self, path, fields):
        name = path.rpartition("/")[2]
        self.asked.append((name, fields))
        answer = self.answers[name]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def names(self):
        return [name for name, _ in self.asked]


class Ledger(ic.MemoryLedger):
    """A ledger that keeps leases, as the one in a file does; it can fail."""

    def __init__(self):
        super().__init__()
        self.held, self.is_broken, self.spends = [], False, 0

    def spent(self, token, since_s):
        return self.spends

    def keep_lease(self, lease):
        if self.is_broken:
            raise ic.LedgerUnavailable("it is broken")
        self.held.append(lease)

    def leases(self):
        return [*self.held]

    def forget_lease(self, lease):
        self.held.remove(lease)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(ic, "RETRY_POLL_S", 0)
    monkeypatch.setattr(ic, "SERVER_STOP_S", 0)
    return Server()


def away():
    return ic.UpstreamUnreachable("the provider cannot be reached: refused")


# Its key.

def test_a_key_is_asked_for_once_and_kept_for_a_while(server):
    first, second = server.cage.provider(), server.cage.provider()

    assert ("openai", KEY) == (first.name, first.key) and first is second
    assert [("provider-key", {"ic_token": TOKEN})] == server.asked
    server.cage._fresh_until_s = ic.NEVER_S
    server.cage.provider()
    assert 2 == len(server.asked)


@pytest.mark.parametrize("body", [
    {}, {**GIVES, "provider": "nobody"}, {**GIVES, "provider": 7}, {**GIVES, "provider_key": ""},
    {**GIVES, "provider_key": " "}, {**GIVES, "provider_key": 7}, {**GIVES, "provider_key": "a b"},
    {**GIVES, "base_url": "ftp://x"}, {**GIVES, "base_url": "http://far.example"}])
def test_what_is_no_key_is_refused_without_showing_it(server, body):
    server.answers["provider-key"] = (200, body)

    with pytest.raises(ic.CageServerFailed, match="not what its protocol says") as failure:
        server.cage.provider()
    assert KEY not in str(failure.value) and not failure.value.is_final


def test_an_old_key_serves_where_the_server_is_away_but_not_where_it_says_no(server):
    old = server.cage.provider()
    server.answers["provider-key"], server.cage._fresh_until_s = away(), ic.NEVER_S
    assert old is server.cage.provider()

    server.answers["provider-key"] = (403, {"error": f"{KEY} and {TOKEN} are withdrawn"})
    server.cage._fresh_until_s = server.cage._failed_until_s = ic.NEVER_S
    with pytest.raises(ic.CageServerFailed, match=r"\*\*\* and \*\*\* are withdrawn"):
        server.cage.provider()
    assert None is server.cage._held


def test_who_holds_a_key_waits_for_nobody_that_asks_for_a_new_one(server):
    old = server.cage.provider()
    server.cage._fresh_until_s = ic.NEVER_S

    with server.cage._asking:                            # held by one who asks just now
        assert old is server.cage.provider()


def test_a_key_that_its_provider_refused_is_fetched_anew_but_not_at_once_again(server):
    provider = server.cage.provider()
    server.cage.refused(provider)
    assert provider is server.cage.provider()            # it was fetched just now

    server.cage._fetched_s = ic.NEVER_S
    server.cage.refused(provider)
    server.cage.provider()
    assert 2 == len(server.asked)


def test_a_call_that_the_server_gave_nothing_is_freed_at_once(server):
    def asked():
        body = ic.JsonBody(b"{}", {})
        with contextlib.suppress(ic.CageServerFailed):
            server.cage.provider()
        return weakref.ref(body)

    server.answers["provider-key"] = 503, {}
    gc.disable()                                   # which would free it late
    try:
        assert [None, None] == [asked()(), asked()()] and 1 == len(server.asked)
    finally:
        gc.enable()


def test_a_server_that_failed_is_left_alone_for_a_while(server):
    server.answers["provider-key"], depths = away(), []
    for _ in range(4):
        with pytest.raises(ic.CageServerFailed, match="it cannot be reached: refused") as refused:
            server.cage.provider()
        depths.append(len(refused.traceback))
    assert 1 == len(server.asked)
    assert depths[1] == depths[-1]             # what was refused before is not kept

    server.cage._failed_until_s, server.answers["provider-key"] = ic.NEVER_S, (200, GIVES)
    assert KEY == server.cage.provider().key


# Its lease.

def test_a_lease_is_written_down_before_it_is_used(server):
    server.cage.check_lease()
    server.cage.check_lease()

    assert ["provider-key", "handshake"] == server.names()
    assert [("lease_1", 500, 0)] == [(*lease,) for lease in server.taken] == server.ledger.held


@pytest.mark.parametrize("body", [
    {}, {**LEASES, "budget_granted": -1}, {**LEASES, "budget_granted": True},
    {**LEASES, "budget_granted": 1.5}, {**LEASES, "budget_granted": 10 ** 20},
    {**LEASES, "lease_id": ""}, {**LEASES, "lease_id": "a b"}, {**LEASES, "lease_id": "x" * 257},
    {**LEASES, "lease_id": 7}, {**LEASES, "lease_id": f"lease-{KEY}"},
    {**LEASES, "lease_id": TOKEN}])
def test_what_is_no_lease_is_refused(server, body):
    server.answers["handshake"] = (200, body)

    with pytest.raises(ic.CageServerFailed, match="not what its protocol says"):
        server.cage.check_lease()
    assert ([], []) == (server.taken, server.ledger.held)


def test_a_lease_that_cannot_be_written_down_goes_back_and_is_not_used(server):
    server.ledger.is_broken = True
    server.ledger.forget_lease = lambda lease: None

    with pytest.raises(ic.LedgerUnavailable):
        server.cage.check_lease()
    assert ("return", {"lease_id": "lease_1", "spent_microdollars": 0}) == server.asked[-1]
    assert ([], None) == (server.taken, server.cage.lease)


def test_a_lease_that_is_granted_while_the_proxy_stops_is_not_used(server):
    server.cage.provider()
    post = server.cage._post

    def post_and_stop(path, fields):
        server.cage._is_stopping = True
        return post(path, fields)

    server.cage._post = post_and_stop
    with pytest.raises(ic.CageServerFailed, match="stopping"):
        server.cage.check_lease()
    assert ([], 1) == (server.taken, len(server.ledger.held))          # stop() gives it back

    with pytest.raises(ic.CageServerFailed, match="stopping"):
        server.cage.check_lease()
    assert 2 == len(server.asked)                                      # it is not asked again


def test_of_two_that_need_a_lease_one_asks(server):
    server.cage.provider()
    thread = threading.Thread(target=server.cage.check_lease)
    with server.cage._asking:
        thread.start()
        server.cage.lease = ic.Lease("lease_0", 1, 0)                  # it came meanwhile
    thread.join()

    assert "handshake" not in server.names()


@pytest.mark.parametrize("answer, is_forgotten", [
    ((200, {}), True), ((404, {}), True), ((500, {}), False), (away(), False)])
def test_a_lease_is_forgotten_once_the_server_knows_or_says_no(server, answer, is_forgotten):
    server.cage.check_lease()
    server.ledger.spends, server.answers["return"] = 7, answer
    server.cage.stop()

    assert {"lease_id": "lease_1", "spent_microdollars": 7} == server.asked[-1][1]
    assert ([] if is_forgotten else [server.taken[0]]) == server.ledger.held


def test_of_two_leases_each_has_its_own_spend(server):
    first, second = ic.Lease("a", 9, 0), ic.Lease("b", 9, 4)
    server.ledger.held, server.ledger.spends = [second, first], 10

    assert [(first, 4), (second, 6)] == server.cage._held_leases()


# Its events.

@pytest.mark.parametrize("answer, is_done, dropped", [
    ((202, {}), True, 0), ((400, {}), True, 1), ((503, {}), False, 0), (away(), False, 0)])
def test_an_event_is_sent_until_it_is_taken_or_refused(server, answer, is_done, dropped):
    server.answers["events"] = answer

    assert is_done is server.cage._is_taken({"event_id": "r"}, True)
    assert ("events", {"event_id": "r", "ic_token": TOKEN}) == server.asked[-1]
    assert (0, dropped) == server.cage.events.counts()


def test_only_events_of_calls_are_told():
    server = Server()
    server.cage.tell(ic.RouterStarted(1, None))
    server.cage.tell(ic.LlmRequestFailed("a", "p", "r", "m", "openai", 500, "no", 0, 1))

    [event] = server.cage.events._waiting
    assert ("llm_request_failed", "r", "no") == (event["event_type"], event["event_id"],
                                                 event["error_message"])
    assert 1 == server.cage.as_json()["events_waiting"]


@pytest.mark.parametrize("words, shown", [
    ({"error": "no"}, "no"), ({"error": "no", "code": "C1"}, r"no \(C1\)"),
    ({"error": "a\x00b"}, r"a\?b"), ({}, "it answered with the status 500"),
    ({"error": f"a {KEY}", "provider_key": KEY}, r"a \*\*\*")])
def test_what_the_server_says_is_shown_without_keys(server, words, shown):
    server.answers["provider-key"] = (500, words)

    with pytest.raises(ic.CageServerFailed, match=f"needs: {shown}$"):
        server.cage.provider()
