"""Places are bounded by who holds them: whoever floods the proxy with half of a request, or with
wrong tokens, is the first to be closed, and another caller is served beside it."""
import contextlib
import json
import socket
import threading
import time

import pytest
from forked import MAIN
from support import (PATIENCE_S, TOKEN, Gate, RawClient, Served, call, pause, program,
                     proxy_environment, settled_status, slot_of, until)

ic = program()
CHAT = {"model": "gpt-4o-mini", "max_tokens": 100,
        "messages": [{"role": "user", "content": "hello"}]}
CAGED, OTHER = "ic_caged_token_0123", "ic_other_token_0123"
# A server of fewer places and less patience, for it takes a second to open 1,100 connections; and
# one as it is.
FEW, FLOOD = ("import sys, ironcage_proxy as ic\nic.MAX_CONNECTIONS, ic.STRANGER_S = 256, 0.5\n"
              "sys.exit(ic.main())"), 1_100
FLOODS = [(FEW, 300), pytest.param(MAIN, FLOOD, marks=pytest.mark.soak)]
HEAD = ("POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer {}\r\n"
        "content-length: {}\r\n\r\n")
HALVES = {
    "half-sent heads": HEAD.format(CAGED, 10)[:60].encode(),
    "half-sent bodies of one token": HEAD.format(CAGED, 10_000).encode() + b"{" * 5_000,
    "wrong tokens with bodies pending": HEAD.format("ic_wrong_0123456789", 10_000).encode() + b"{",
    "nothing at all": b"",
}
HALF_BODY = HALVES["half-sent bodies of one token"]


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "cage.json"

    def write(**caged):
        path.write_text(json.dumps({"tokens": [{"name": "caged", "token": CAGED, **caged},
                                               {"name": "other", "token": OTHER}]}))
        return str(path)
    return write


def connected(port, data):
    sock = socket.create_connection(("127.0.0.1", port), PATIENCE_S)
    with contextlib.suppress(OSError):                 # it may be closed by now
        sock.sendall(data)
    return sock


def is_closed(sock):
    """Whether the proxy has ended a connection, with an answer or without."""
    sock.setblocking(False)
    try:
        while sock.recv(65_536):
            pass
        return True
    except BlockingIOError:
        return False
    except OSError:
        return True


@contextlib.contextmanager
def flooded(port, data, count):
    socks = [connected(port, data) for _ in range(count)]
    try:
        yield socks
    finally:
        for sock in socks:
            sock.close()


def timed_calls(port, token, count, answers):
    """Calls on connections of their own, and on one that is kept: (seconds, status) of each."""
    body = json.dumps(CHAT).encode()
    with RawClient(port) as kept:
        for number in range(count):
            begun_s = time.monotonic()
            if number % 2 == 0:
                kept.request("POST", "/v1/chat/completions", body, token=token)
                status = kept.read_answer().status
            else:
                status = call(port, "POST", "/v1/chat/completions", CHAT, token=token).status
            answers.append((time.monotonic() - begun_s, status))


def beside(port, data, token, flood, callers=4, count=10):
    """What callers get before, while and after a flood comes."""
    answers = []
    threads = [threading.Thread(target=timed_calls, args=(port, token, count, answers))
               for _ in range(callers)]
    threads[0].start()
    with flooded(port, data, flood):
        for thread in threads[1:]:
            thread.start()
        for thread in threads:
            thread.join()
    assert callers * count == len(answers)
    return answers


def allow_files(count):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < count:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))
        except (OSError, ValueError):
            pytest.skip(f"{count} files cannot be opened here")


@pytest.mark.parametrize("code, flood", FLOODS, ids=["few places", "all places"])
@pytest.mark.parametrize("data", HALVES.values(), ids=HALVES)
def test_beside_a_flood_another_caller_gets_its_answers(mock, config, data, code, flood):
    allow_files(2 * FLOOD)
    with Served("--token", TOKEN, "--config", config(), "--budget", "10", code=code,
                environ=proxy_environment(mock)) as served:
        answers = beside(served.port, data, OTHER, flood)

    assert {200} == {status for _, status in answers}


@pytest.fixture
def proxy_of(mock, proxy_for, config):
    """A proxy with few places, and a token of --config beside the default one."""
    def start(places, timeouts=None, **caged):
        proxy = proxy_for("--budget", "1", "--config", config(**caged), timeouts=timeouts)
        proxy.places.most = places
        return proxy
    return start


def doing(proxy, does):
    return proxy.places.count(lambda place: place.does == does)


def reads(proxy, count):
    until(lambda: doing(proxy, ic.READING) == count, f"{count} requests are being read")


def ask(client, token=TOKEN):
    client.request("POST", "/v1/chat/completions", json.dumps(CHAT).encode(), token=token)


def chat(proxy, token=TOKEN):
    return call(proxy.port, "POST", "/v1/chat/completions", CHAT, token=token)


@contextlib.contextmanager
def being_served(mock, proxy, count, token=TOKEN):
    """Clients whose answers come when the block ends; all are 200."""
    gate, seen = Gate(), len(mock.seen)
    for _ in range(count):
        mock.script(lambda request: mock.default_reply(request).with_steps(
            [gate, *mock.default_reply(request).steps]))
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(RawClient(proxy.port)) for _ in range(count)]
        for client in clients:
            ask(client, token)
        mock.wait_for_requests(seen + count)
        yield
        gate.event.set()
        assert [200] * count == [client.read_answer().status for client in clients]


# Who goes first.

def test_who_showed_no_token_keeps_a_quarter_of_the_places_once_somebody_comes(mock, proxy_of,
                                                                               monkeypatch):
    proxy, strangers = proxy_of(20), []
    with contextlib.ExitStack() as stack:
        for count in range(1, 13):
            strangers.append(stack.enter_context(connected(proxy.port, b"POST")))
            reads(proxy, count)
        monkeypatch.setattr(ic, "STRANGER_S", 0)
        assert 200 == call(proxy.port, "GET", "/ironcage/status").status

        until(lambda: sum(is_closed(sock) for sock in strangers) == 7)
        assert not any(is_closed(sock) for sock in strangers[7:])      # they were silent least


def test_a_stranger_that_came_just_now_is_not_closed_while_there_are_places(mock, proxy_of):
    proxy = proxy_of(20)
    with flooded(proxy.port, b"POST", 12) as strangers:
        reads(proxy, 12)
        assert 200 == call(proxy.port, "GET", "/ironcage/status").status
        assert not any(is_closed(sock) for sock in strangers)


def test_strangers_go_before_callers_and_half_a_request_before_anybody_gets_a_503(
        mock, proxy_of, monkeypatch):
    proxy = proxy_of(3)
    with contextlib.ExitStack() as stack:
        idle, half, stranger = [stack.enter_context(RawClient(proxy.port)) for _ in range(3)]
        idle.request("GET", "/ironcage/status", token=OTHER)
        assert 200 == idle.read_answer().status
        until(lambda: doing(proxy, ic.IDLE) == 3)
        half.send(HALVES["half-sent bodies of one token"])
        stranger.send(b"POST")
        reads(proxy, 2)
        monkeypatch.setattr(ic, "STRANGER_S", 0)

        for closed in (stranger, idle, half):
            stack.enter_context(being_served(mock, proxy, 1))
            assert closed.is_closed_by_server()
        assert 503 == chat(proxy).status


def test_of_the_token_with_most_places_the_one_that_is_furthest_behind_goes_first(
        mock, proxy_of, monkeypatch):
    """Not the one that keeps up, though it began first; nor an idle one of another token."""
    proxy = proxy_of(4)
    body = json.dumps(CHAT).encode()
    clients = [RawClient(proxy.port) for _ in range(4)]
    idle, steady, slow, slower = clients
    idle.request("GET", "/ironcage/status", token=OTHER)
    assert 200 == idle.read_answer().status
    for count, client in enumerate((steady, slower, slow), 1):
        client.send(HEAD.format(CAGED, len(body)).encode())
        reads(proxy, count)
    monkeypatch.setattr(ic, "LEAST_BYTES_PER_S", 0.1)
    place = next(place for place in proxy.places._places.values() if place.holder == "caged")
    before_s = place.behind_s
    steady.send(body[:1])
    until(lambda: place.behind_s > before_s, "the steady one's byte is read")

    for closed in (slower, slow):
        clients.append(RawClient(proxy.port))
        assert closed.is_closed_by_server()
    steady.send(body[1:])
    assert 200 == steady.read_answer().status
    idle.request("GET", "/ironcage/status", token=OTHER)
    assert 200 == idle.read_answer().status
    for client in clients:
        client.close()


@contextlib.contextmanager
def leaving_and_reading(proxy):
    """A client that has its last answer, and a stranger in its head."""
    with RawClient(proxy.port) as wrong, RawClient(proxy.port) as stranger:
        stranger.send(b"POST")
        reads(proxy, 1)
        wrong.send(HALVES["wrong tokens with bodies pending"])
        assert 401 == wrong.read_answer().status
        until(lambda: doing(proxy, ic.LEAVING) == 1)
        yield wrong, stranger


def test_who_has_a_last_answer_and_goes_on_sending_is_the_first_to_go(mock, proxy_of):
    proxy = proxy_of(2, timeouts={"linger_s": PATIENCE_S})
    with leaving_and_reading(proxy) as (wrong, stranger):
        with slot_of(proxy.slot):
            wrong.send(b"more of the body")
            newcomer = RawClient(proxy.port)
            until(lambda: proxy.slot._queue, "the newcomer is about to be let in")
        newcomer.request("GET", "/ironcage/status")
        assert 200 == newcomer.read_answer().status
        newcomer.close()
        assert not is_closed(stranger.sock)


def test_it_goes_though_it_has_sent_what_nobody_has_looked_at(mock, proxy_of):
    proxy = proxy_of(2, timeouts={"linger_s": PATIENCE_S})
    with leaving_and_reading(proxy) as (wrong, stranger):
        left = next(sock for sock, place in proxy.places._places.items() if place.does == ic.LEAVING)
        with slot_of(proxy.slot):
            wrong.send(b"more of the body")
            until(lambda: ic.ready_of([left], 0), "it has come")

            assert 1 == proxy.places.close_some(1)

        assert not is_closed(stranger.sock)


def test_a_stranger_that_came_just_now_does_not_go_before_what_one_token_holds(mock, proxy_of):
    proxy = proxy_of(4)
    with contextlib.ExitStack() as stack:
        halves = [stack.enter_context(RawClient(proxy.port)) for _ in range(3)]
        for half in halves:
            half.send(HALF_BODY)
        reads(proxy, 3)
        fresh = stack.enter_context(RawClient(proxy.port))
        until(lambda: proxy.places.count() == 4)
        with being_served(mock, proxy, 1):
            until(lambda: sum(is_closed(half.sock) for half in halves) == 1)
            ask(fresh)
            assert 200 == fresh.read_answer().status


def test_a_request_that_is_whole_is_served_though_places_are_short(mock, proxy_of):
    """Its connection is closed while it is read, or it is answered: never sent and then closed."""
    proxy = proxy_of(1)
    with RawClient(proxy.port) as client:
        ask(client)
        assert 200 == client.read_answer().status
        place = next(iter(proxy.places._places.values()))
        until(lambda: place.does == ic.IDLE)
        place.does = ic.CLOSED                         # between its last answer and its next head
        ask(client)
        assert client.is_closed_by_server()
    assert 1 == len(mock.seen)


def test_an_idle_caller_stays_while_it_is_not_known_what_strangers_want(mock, proxy_of):
    proxy = proxy_of(3)
    with contextlib.ExitStack() as stack:
        idle = stack.enter_context(RawClient(proxy.port))
        idle.request("GET", "/ironcage/status", token=OTHER)
        assert 200 == idle.read_answer().status
        with slot_of(proxy.slot):
            for _ in range(2):
                stack.enter_context(connected(proxy.port, b"POST"))
            newcomer = stack.enter_context(RawClient(proxy.port))
        ask(newcomer)
        assert 200 == newcomer.read_answer().status
        idle.request("GET", "/ironcage/status", token=OTHER)
        assert 200 == idle.read_answer().status


# One token.

def test_one_token_does_not_hold_all_places_where_there_are_others(mock, proxy_of):
    proxy = proxy_of(4)
    with being_served(mock, proxy, 3, CAGED):
        refused = chat(proxy, CAGED)

        assert (429, "1") == (refused.status, refused.header("retry-after"))
        assert "has 3 of the proxy's 4 connections in use" in refused.json["error"]["message"]
        assert 200 == chat(proxy, OTHER).status


def test_one_token_alone_holds_all_places(mock, proxy_for):
    proxy = proxy_for("--budget", "1")
    proxy.places.most = 4
    with being_served(mock, proxy, 4):
        assert 503 == chat(proxy).status


def test_a_token_that_holds_its_part_loses_its_own_half_sent_bodies_first(mock, proxy_of,
                                                                          monkeypatch):
    monkeypatch.setattr(ic, "STRANGER_S", 0)
    proxy = proxy_of(4)
    with RawClient(proxy.port) as half:
        half.send(HALVES["half-sent bodies of one token"])
        reads(proxy, 1)
        with being_served(mock, proxy, 2, CAGED):
            assert 200 == chat(proxy, CAGED).status
            assert half.is_closed_by_server()


def test_a_body_that_is_half_sent_counts_as_one_of_its_tokens_requests(mock, proxy_of):
    proxy = proxy_of(100, parallel_requests=1)
    with RawClient(proxy.port) as half:
        half.send(HALF_BODY)
        reads(proxy, 1)
        assert 429 == chat(proxy, CAGED).status
        assert 200 == call(proxy.port, "GET", "/ironcage/status", token=CAGED).status
    until(lambda: chat(proxy, CAGED).status == 200, "its place is free once its client is gone")


def test_a_minutes_requests_are_counted_from_their_heads(mock, proxy_of):
    proxy = proxy_of(100, requests_per_minute=2)
    with flooded(proxy.port, HALF_BODY, 2):
        reads(proxy, 2)
        assert 429 == chat(proxy, CAGED).status
    assert 429 == chat(proxy, CAGED).status


@pytest.mark.parametrize("sent, status", [
    (HALF_BODY, 408), (HEAD.format(CAGED, 10 ** 9).encode(), 413),
    (HALF_BODY.replace(b"content-length: 10000", b"host: 127.0.0.1"), 400),
    (HALF_BODY.replace(b"content-length: 10000", b"x: y"), 411),
    (HALF_BODY.replace(b"content-length: 10000", b"content-length: 1\r\ncontent-encoding: br"), 415),
    (HALF_BODY.replace(b"content-length: 10000", b"transfer-encoding: chunked"), 400),
])
def test_a_tokens_place_is_free_again_whatever_came_of_its_body(mock, proxy_of, sent, status):
    proxy = proxy_of(100, parallel_requests=1, timeouts={"body_stall_s": 0.1, "linger_s": 0})
    for _ in range(2):
        with RawClient(proxy.port) as client:
            client.send(sent)
            assert status == client.read_answer().status
    assert 200 == chat(proxy, CAGED).status


# Progress.

def test_a_body_that_stalls_is_dropped_long_before_its_time_is_over(mock, proxy_for):
    proxy = proxy_for("--budget", "1", timeouts={"body_s": 1_000, "body_stall_s": 0.1})
    with RawClient(proxy.port) as client:
        client.send(HEAD.format(TOKEN, 10).encode() + b"{")

        assert 408 == client.read_answer().status


def test_a_body_that_comes_by_drops_is_dropped(mock, proxy_for, monkeypatch):
    monkeypatch.setattr(ic, "LEAST_BYTES_PER_S", 10 ** 9)
    proxy = proxy_for("--budget", "1", timeouts={"body_s": 1_000, "body_stall_s": 0.2})
    with RawClient(proxy.port) as client:
        client.send(HEAD.format(TOKEN, 10 ** 6).encode())
        client.sock.settimeout(0.01)
        answer = b""
        while not answer:
            client.send(b" ")
            with contextlib.suppress(socket.timeout):
                answer = client.sock.recv(100)

    assert answer.startswith(b"HTTP/1.1 408")


def test_a_slow_body_that_keeps_up_is_served_however_long_it_takes(mock, proxy_for, monkeypatch):
    """Far longer than it may stall for."""
    monkeypatch.setattr(ic, "LEAST_BYTES_PER_S", 100)
    proxy = proxy_for("--budget", "1", timeouts={"body_stall_s": 0.15})
    body = json.dumps(CHAT).encode() + b" " * 200
    with RawClient(proxy.port) as client:
        client.send(HEAD.format(TOKEN, len(body)).encode())
        for at in range(0, len(body), 10):
            client.send(body[at:at + 10])
            pause(0.015, "650 bytes a second, half a second in all")

        assert 200 == client.read_answer().status
    assert 0 == settled_status(proxy)["reserved_microdollars"]
