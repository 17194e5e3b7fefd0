"""Bodies and answers share one budget of memory: who finds none waits, or tries again; what is too
large to be read is forwarded or refused; and whatever happens, nothing stays reserved."""
import contextlib
import gzip
import json
import sys
import threading

import pytest
from support import (ROOT, TOKEN, Close, Gate, RawClient, Reply, Served, call, pause, program,
                     proxy_environment, settled_status, sse, status_of, until)

sys.path.append(str(ROOT / "tests" / "bench"))
from screenshots import conversation

MB = 1024 * 1024
CHAT = {"model": "gpt-4o-mini", "max_tokens": 100,
        "messages": [{"role": "user", "content": "hello"}]}
MESSAGE = {**CHAT, "model": "claude-haiku-4-5"}
FLOOD, ALICE = "ic_flood_canary_0123456789", "ic_alice_canary_0123456789"
USAGE = {"prompt_tokens": 9, "completion_tokens": 5, "total_tokens": 14}
ic = program()


def large(fields=CHAT, size=MB, **more):
    return {**fields, **more, "messages": [{"role": "user", "content": "word " * (size // 5)}]}


def reserved(proxy):
    return status_of(proxy)["memory"]["reserved_bytes"]


def was_estimated(proxy):
    settled_status(proxy)
    row, = call(proxy.port, "GET", "/ironcage/usage").json["rows"]
    return row["estimated"] is not None and row["cost_microdollars"] > 0


def head_of(length, token=TOKEN, path="/v1/chat/completions"):
    return (f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer {token}\r\n"
            f"content-type: application/json\r\ncontent-length: {length}\r\n\r\n").encode()


# What is taken is given back, on every way.

def ask(fields, path="/v1/chat/completions", **options):
    return lambda proxy: call(proxy.port, "POST", path, fields, **options)


def hang_up_in_the_body(proxy):
    with RawClient(proxy.port) as client:
        client.send(head_of(2 * MB) + b"{" * MB)
        until(lambda: reserved(proxy), "the body is being read")


def hang_up_in_the_answer(proxy):
    with RawClient(proxy.port) as client:
        client.request("POST", "/v1/chat/completions", json.dumps(large(stream=True)).encode())
        client.read_head()


def in_chunks(proxy):
    body = json.dumps(large()).encode()
    with RawClient(proxy.port) as client:
        client.send(head_of(0).replace(b"content-length: 0", b"transfer-encoding: chunked"))
        for at in range(0, len(body), 50_000):
            piece = body[at:at + 50_000]
            client.send(b"%x\r\n%b\r\n" % (len(piece), piece))
        client.send(b"0\r\n\r\n")
        assert 200 == client.read_answer().status


def compressed(body):
    def send(proxy):
        with RawClient(proxy.port) as client:
            client.send(head_of(len(body)).replace(
                b"content-type", b"content-encoding: gzip\r\ncontent-type") + body)
            client.read_answer()
    return send


WAYS = {
    "an answer": ask(large()),
    "a stream": ask(large(stream=True)),
    "translated": ask(large(MESSAGE)),
    "translated, streamed": ask(large(MESSAGE, stream=True)),
    "not metered": ask(large(), "/v1/moderations"),
    "tokens counted": ask(large(MESSAGE), "/v1/messages/count_tokens"),
    "the echo": ask(large(model="ironcage/echo")),
    "refused for its model": ask(large(model="no-such-model")),
    "refused for its cost": ask(large(size=3 * MB, model="gpt-5.5")),
    "not JSON": ask("[" * MB),
    "not its route": ask(large(), "/v1/files"),
    "a route of ours": ask(large(), "/ironcage/budget"),
    "in chunks": in_chunks,
    "compressed": compressed(gzip.compress(json.dumps(large()).encode())),
    "compressed, broken": compressed(b"\x1f\x8b" + b"x" * MB),
    "compressed, too large": compressed(gzip.compress(b" " * 40 * MB)),
    "the client goes in its body": hang_up_in_the_body,
    "the client goes in the answer": hang_up_in_the_answer,
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_whatever_becomes_of_a_request_its_memory_is_given_back(proxy_for, way):
    proxy = proxy_for("--budget", "1")

    way(proxy)

    until(lambda: not reserved(proxy), "nothing is reserved")


@pytest.mark.parametrize("reply", [
    Reply(answers=False), Reply(framing="chunked", steps=(b"x" * MB, Close())),
    Reply(headers=(("content-type", "text/event-stream"),), framing="chunked",
          steps=(b"data: " + b"x" * MB, Close())),
    Reply(500, steps=(b"x" * MB,))], ids=["no answer", "cut", "cut in an event", "an error"])
@pytest.mark.parametrize("fields", [CHAT, MESSAGE], ids=["same", "translated"])
def test_however_an_answer_ends_its_memory_is_given_back(mock, proxy_for, reply, fields):
    proxy = proxy_for("--budget", "1")
    mock.script(reply)

    call(proxy.port, "POST", "/v1/chat/completions", fields)

    until(lambda: not reserved(proxy), "nothing is reserved")


def test_memory_is_held_while_a_call_is_in_flight_and_seen_in_status_and_metrics(mock, proxy_for):
    proxy, gate = proxy_for("--budget", "1"), Gate()
    mock.script(lambda request: mock.default_reply(request).with_steps(
        [gate, *mock.default_reply(request).steps]))
    thread = threading.Thread(target=ask(large()), args=(proxy,))
    thread.start()
    mock.wait_for_requests(1)

    status = status_of(proxy)["memory"]
    metrics = call(proxy.port, "GET", "/ironcage/metrics").body.decode()

    assert (256 * MB, 0) == (status["limit_bytes"], status["waiting"])
    assert MB < status["reserved_bytes"] < 4 * MB
    assert f"ironcage_memory_reserved_bytes {status['reserved_bytes']}" in metrics
    gate.event.set()
    thread.join()


# Who finds no room.

@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
def test_a_body_that_can_never_fit_is_refused_unread_by_name(mock, proxy_for, path):
    proxy = proxy_for("--max-memory-mb", "4")
    with RawClient(proxy.port) as client:
        client.send(head_of(2 * MB, path=path))

        answer = client.read_answer()

    assert 413 == answer.status
    assert "--max-memory-mb" in answer.json["error"]["message"]
    assert [] == mock.seen


def test_so_is_one_whose_values_take_more_than_there_is(proxy_for):
    proxy = proxy_for("--max-memory-mb", "8")

    answer = call(proxy.port, "POST", "/v1/chat/completions", {**CHAT, "x": [{}] * 100_000})

    assert 413 == answer.status
    assert "--max-memory-mb" in answer.json["error"]["message"]


@pytest.mark.parametrize("path, kind", [("/v1/chat/completions", "server_error"),
                                        ("/v1/messages", "overloaded_error")])
def test_who_waits_too_long_may_try_again(proxy_for, monkeypatch, path, kind):
    monkeypatch.setattr(ic, "MEMORY_WAIT_S", 0.05)
    proxy = proxy_for("--max-memory-mb", "16")
    with RawClient(proxy.port) as first, RawClient(proxy.port) as second:
        first.send(head_of(3 * MB) + b"{")
        until(lambda: reserved(proxy), "the first is being read")
        second.send(head_of(3 * MB, path=path))

        refused = second.read_answer()

    assert (503, "2", kind) == (refused.status, refused.header("retry-after"),
                                refused.json["error"]["type"])


def test_a_token_that_floods_with_large_bodies_holds_up_nobody_else(mock, proxy_for, tmp_path):
    """Neither small requests of others, nor their large ones, nor small ones of its own."""
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"tokens": [
        {"name": "flood", "token": FLOOD}, {"name": "alice", "token": ALICE}]}))
    proxy = proxy_for("--config", str(config), "--max-memory-mb", "32")
    clients = [RawClient(proxy.port) for _ in range(20)]
    try:
        for client in clients:
            client.send(head_of(MB, FLOOD) + b'{"model":')
        until(lambda: status_of(proxy)["memory"]["waiting"] > 10, "they wait")

        answers = [call(proxy.port, "POST", "/v1/chat/completions", fields, token=token)
                   for token, fields in ((ALICE, CHAT), (ALICE, large(size=100_000)),
                                         (ALICE, large()), (FLOOD, CHAT),
                                         (FLOOD, large(size=100_000)))]

        assert [200] * 5 == [answer.status for answer in answers]
        assert status_of(proxy)["memory"]["waiting"] > 10
    finally:
        for client in clients:
            client.close()


def send_until_served(port, body, pace=1):
    """The statuses of one request, sent again after each 503 when its retry-after says so, or in
    a part of that."""
    statuses = []
    while not statuses or (statuses[-1] == 503 and len(statuses) < 100):
        with RawClient(port) as client:
            client.sock.settimeout(300)
            with contextlib.suppress(OSError):         # it may be refused before it is sent
                client.send(head_of(len(body)))
                client.send(body)
            answer = client.read_answer()
        statuses.append(answer.status)
        if answer.status == 503:
            pause(pace * float(answer.header("retry-after")), "as it is asked to")
    return statuses


def run_many(count, port, body, pace=1):
    results = []
    threads = [threading.Thread(target=lambda: results.append(send_until_served(port, body, pace)))
               for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_of_many_large_bodies_at_once_none_is_lost(proxy_for, monkeypatch):
    monkeypatch.setattr(ic, "MEMORY_WAIT_S", 0.1)
    proxy = proxy_for("--max-memory-mb", "8", "--budget", "100")

    results = run_many(10, proxy.port, json.dumps(large()).encode(), pace=0.1)

    assert [200] * 10 == [statuses[-1] for statuses in results]
    assert {200, 503} >= {status for statuses in results for status in statuses}
    until(lambda: not reserved(proxy), "nothing is reserved")


def one_gigabyte():
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (2 ** 30, 2 ** 30))


@pytest.mark.soak
@pytest.mark.skipif(sys.platform != "linux", reason="address space is limited there only")
def test_200_bodies_of_30_mb_at_once_fit_into_a_gigabyte_of_address_space(mock):
    body = json.dumps(conversation("chat", 30_000_000, "gpt-4o-mini")).encode()
    environ = {**proxy_environment(mock), "IRONCAGE_TOKEN": TOKEN}
    with Served("--budget", "100000", "--quiet", environ=environ,
                preexec_fn=one_gigabyte) as served:
        results = run_many(200, served.port, body)

        assert [200] * 200 == [statuses[-1] for statuses in results]
        assert {200, 503} >= {status for statuses in results for status in statuses}
        until(lambda: not reserved(served), "nothing is reserved")
        assert 0 == settled_status(served)["reserved_microdollars"]


# Answers have the limits that requests have.

def answer_with(junk, **more):
    return json.dumps({"id": "c", "model": "gpt-4o-mini", "choices": [
        {"index": 0, "message": {"role": "assistant", "content": "hi"}, "finish_reason": "stop"}],
        "usage": USAGE, **more}).encode()[:-1] + b', "junk": ' + junk + b"}"


HOSTILE = {"many values": b"[" + b",".join([b"[]"] * 400_000) + b"]",
           "deep": b"[" * 250 + b"]" * 250,
           "deeper than any parser": b"[" * 100_000 + b"]" * 100_000}


@pytest.fixture(autouse=True)
def few_values(monkeypatch):
    monkeypatch.setattr(ic, "MAX_JSON_VALUES", 500_000)


@pytest.mark.parametrize("junk", HOSTILE.values(), ids=HOSTILE)
def test_an_answer_beyond_the_limits_is_forwarded_unchanged_and_charged_by_the_rule(
        mock, proxy_for, junk):
    proxy, body = proxy_for("--budget", "1"), answer_with(junk)
    mock.script(Reply(steps=(body,)))

    answer = call(proxy.port, "POST", "/v1/chat/completions", CHAT)

    assert (200, True) == (answer.status, body == answer.body)
    assert was_estimated(proxy)
    assert not reserved(proxy)


@pytest.mark.parametrize("junk", HOSTILE.values(), ids=HOSTILE)
def test_translated_it_is_an_error_in_the_clients_dialect_and_settled(mock, proxy_for, junk):
    proxy = proxy_for("--budget", "1")
    mock.script(Reply(steps=(answer_with(junk),)))

    answer = call(proxy.port, "POST", "/v1/messages", {**MESSAGE, "model": "gpt-4o-mini"})

    assert (502, "error") == (answer.status, answer.json["type"])
    assert settled_status(proxy)["spent_microdollars"] > 0
    assert not reserved(proxy)


def test_an_answer_that_finds_no_room_is_forwarded_and_charged(mock, proxy_for):
    proxy, body = proxy_for("--budget", "1", "--max-memory-mb", "4"), answer_with(b"0" + b" " * 8 * MB)
    mock.script(Reply(steps=(body,)))

    answer = call(proxy.port, "POST", "/v1/chat/completions", CHAT)

    assert (200, True) == (answer.status, body == answer.body)
    assert was_estimated(proxy)


@pytest.mark.parametrize("asks_for_usage", [True, False])
def test_an_event_beyond_the_limits_is_forwarded_as_it_is(mock, proxy_for, monkeypatch,
                                                          asks_for_usage):
    monkeypatch.setattr(ic, "MAX_EVENT_BYTES", MB)
    proxy = proxy_for("--budget", "1")
    first = sse({"choices": [{"index": 0, "delta": {"content": "hi"}}]})
    stream = [first, b"data: ", *[b"x" * 100_000] * 15, b"\n\n", sse("[DONE]")]
    mock.script(Reply(headers=(("content-type", "text/event-stream"),), framing="chunked",
                      steps=tuple(stream)))

    answer = call(proxy.port, "POST", "/v1/chat/completions", {
        **CHAT, "stream": True, "stream_options": {"include_usage": asks_for_usage}})

    assert b"".join(stream) == answer.body
    assert was_estimated(proxy)
    assert not reserved(proxy)


def test_translated_it_ends_the_stream_with_an_error(mock, proxy_for):
    proxy = proxy_for("--budget", "1", "--max-memory-mb", "8")
    mock.script(Reply(headers=(("content-type", "text/event-stream"),), framing="chunked", steps=(
        sse({"choices": [{"index": 0, "delta": {"content": "hi"}}]}), b"data: ",
        *[b"x" * 100_000] * 40)))

    answer = call(proxy.port, "POST", "/v1/messages", {
        **MESSAGE, "model": "gpt-4o-mini", "stream": True})

    assert b"event: error" in answer.body
    assert settled_status(proxy)["spent_microdollars"] > 0
    assert not reserved(proxy)
