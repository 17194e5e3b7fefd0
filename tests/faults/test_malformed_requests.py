"""Requests that are wrong, hostile or unfinished: one clear error, nothing sent, nothing charged.

One proxy serves each table, so that a request that broke the server would fail the next.
"""
import contextlib
import errno
import gzip
import json
import select
import threading

import pytest
from support import (ADMIN_TOKEN, TOKEN, Gate, MockProvider, RawClient, call, program,
                     settled_status, start_proxy, slot_of)

CHAT = b'{"model":"gpt-4o-mini","max_tokens":9,"messages":[{"role":"user","content":"hi"}]}'
AUTH = f"Authorization: Bearer {TOKEN}\r\n".encode()
LENGTH = b"Content-Length: %d\r\n" % len(CHAT)
POST = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n" + AUTH


@pytest.fixture(scope="module")
def served():
    """A mock and a caged proxy before it, for a whole table."""
    with MockProvider() as mock:
        proxy = start_proxy(mock, "--budget", "1", "--max-body-mb", "1", "--admin-token",
                            ADMIN_TOKEN)
        yield mock, proxy
        proxy.stop()


def check_nothing_happened(mock, proxy, sent):
    assert sent == len(mock.seen)
    status = settled_status(proxy)
    assert mock.billed_microdollars == status["spent_microdollars"]
    assert 200 == call(proxy.port, "GET", "/").status


def chat_with(**fields):
    return {**json.loads(CHAT), **fields}


def deep(levels):
    return b'{"model":"gpt-4o-mini","messages":' + b"[" * levels + b"]" * levels + b"}"


BAD_BODIES = {
    "broken JSON": b'{"model": "gpt-4o-mini",',
    "no JSON": b"hello",
    "empty": b"",
    "a list": b"[1]",
    "a string": b'"model"',
    "null": b"null",
    "two objects": b'{"model":"gpt-4o-mini"}{}',
    "duplicate key": b'{"model":"gpt-4o-mini","model":"gpt-4o","messages":[]}',
    "duplicate key inside": b'{"model":"gpt-4o-mini","messages":[{"role":"a","role":"b"}]}',
    "duplicate key behind an escape": b'{"model":"gpt-4o-mini","mod\\u0065l":"gpt-4o"}',
    "byte-order mark": b"\xef\xbb\xbf" + CHAT,
    "UTF-16": CHAT.decode().encode("utf-16"),
    "not UTF-8": CHAT.replace(b"hi", b"\xff\xfe"),
    "NaN": CHAT.replace(b"9", b"NaN"),
    "Infinity": CHAT.replace(b"9", b"-Infinity"),
    "huge float": CHAT.replace(b"9", b"1e999"),
    "huge integer": CHAT.replace(b"9", b"9" * 19),
    "integer of a million digits": CHAT.replace(b"9", b"9" * 900_000),
    "nested 201 deep": deep(200),
    "nested 100,000 deep": deep(100_000),
    "model missing": b'{"messages":[]}',
    "model null": b'{"model":null,"messages":[]}',
    "model a number": b'{"model":4,"messages":[]}',
    "model empty": b'{"model":"","messages":[]}',
    "model unknown": b'{"model":"gpt-unheard-of","messages":[]}',
    "model of 10 kB": b'{"model":"gpt-%b","messages":[]}' % (b"x" * 10_000),
    "model with a line break": b'{"model":"gpt-4o\\r\\nx-evil: 1","messages":[]}',
    "stream a string": chat_with(stream="yes"),
    "stream a number": chat_with(stream=1),
    "stream_options a list": chat_with(stream=True, stream_options=[]),
    "include_usage a string": chat_with(stream=True, stream_options={"include_usage": "no"}),
    "n zero": chat_with(n=0),
    "n negative": chat_with(n=-1),
    "n a string": chat_with(n="2"),
    "n a million": chat_with(n=10 ** 6),
    "tools an object": chat_with(tools={"type": "web_search"}),
    **{f"{name} {label}": chat_with(**{name: value})
       for name in ("max_tokens", "max_completion_tokens")
       for label, value in (("negative", -1), ("huge", 10 ** 12), ("fraction", 1.5),
                            ("string", "9"), ("true", True), ("list", [9]))},
}


CHAT_ONLY = {"stream_options", "n", "max_completion_tokens"}


def bad_body_cases():
    """(path, body) of each bad body at each path that knows its field."""
    for label, body in BAD_BODIES.items():
        yield pytest.param("/v1/chat/completions", body, id=f"chat-{label}")
        if isinstance(body, bytes):
            yield pytest.param("/v1/messages", body, id=f"messages-{label}")
            yield pytest.param("/v1/responses", body, id=f"responses-{label}")
        elif not CHAT_ONLY & set(body):
            claude = {**body, "model": "claude-haiku-4-5"}
            yield pytest.param("/v1/messages", claude, id=f"messages-{label}")
            capped = {"max_output_tokens" if name == "max_tokens" else name: value
                      for name, value in body.items()}
            yield pytest.param("/v1/responses", capped, id=f"responses-{label}")


@pytest.mark.parametrize("path, body", [*bad_body_cases()])
def test_a_bad_body_is_one_clear_400_and_the_connection_goes_on(served, path, body):
    mock, proxy = served
    sent = len(mock.seen)
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    with RawClient(proxy.port) as client:
        client.request("POST", path, raw)
        refused = client.read_answer()
        client.request("POST", "/v1/chat/completions", CHAT)
        good = client.read_answer()

    assert (400, 200) == (refused.status, good.status), refused.body
    error = refused.json["error"]
    assert ("invalid_request_error" if path == "/v1/messages" else None) in (error["type"], None)
    assert ("error" == refused.json.get("type")) == (path == "/v1/messages")
    assert 10 < len(error["message"]) < 400 and "\n" not in error["message"]
    check_nothing_happened(mock, proxy, sent + 1)


GET = b"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\n" + AUTH
BAD_HEADS = {
    "bare LF line ends": GET.replace(b"\r\n", b"\n") + b"\n",
    "one bare LF": GET + b"x-a: 1\nx-b: 2\r\n\r\n",
    "bare LF at the end": GET + b"\n",
    "bare CR": GET + b"x-a: 1\rx-b: 2\r\n\r\n",
    "folded header": GET + b"x-a: 1\r\n 2\r\n\r\n",
    "space before the colon": GET + b"x-a : 1\r\n\r\n",
    "header without a colon": GET + b"x-a\r\n\r\n",
    "header without a name": GET + b": 1\r\n\r\n",
    "NUL in a value": GET + b"x-a: \x00\r\n\r\n",
    "101 headers": GET + b"".join(b"x-%d: 1\r\n" % i for i in range(99)) + b"\r\n",
    "a header of 64 KiB": GET + b"x-a: " + b"y" * 65536 + b"\r\n\r\n",
    "64 KiB without an end": b"GET /" + b"y" * 70_000,
    "no Host": b"GET /v1/models HTTP/1.1\r\n" + AUTH + b"\r\n",
    "two Hosts": GET + b"Host: 127.0.0.1\r\n\r\n",
    "HTTP/0.9": b"GET /\r\n\r\n",
    "HTTP/2.0": GET.replace(b"HTTP/1.1", b"HTTP/2.0") + b"\r\n",
    "HTTP/1.10": GET.replace(b"HTTP/1.1", b"HTTP/1.10") + b"\r\n",
    "no version": GET.replace(b" HTTP/1.1", b"") + b"\r\n",
    "two spaces": GET.replace(b"GET ", b"GET  ") + b"\r\n",
    "absolute URI": GET.replace(b"/v1", b"http://evil.example/v1") + b"\r\n",
    "no leading slash": GET.replace(b"/v1", b"v1") + b"\r\n",
    "asterisk": GET.replace(b"/v1/models", b"*") + b"\r\n",
    "fragment": GET.replace(b"/v1/models", b"/v1/models#x") + b"\r\n",
    "backslash": GET.replace(b"/v1/models", b"/v1\\models") + b"\r\n",
    "not ASCII": GET.replace(b"/v1/models", b"/v1/m\xc3\xb6dels") + b"\r\n",
    "control character": GET.replace(b"/v1/models", b"/v1/\x01") + b"\r\n",
    "dot segments": GET.replace(b"/v1/models", b"/v1/../x") + b"\r\n",
    "encoded dot segments": GET.replace(b"/v1/models", b"/v1/%2e%2E/x") + b"\r\n",
    "length and chunked": POST + LENGTH + b"Transfer-Encoding: chunked\r\n\r\n" + CHAT,
    "two lengths": POST + LENGTH + b"Content-Length: 3\r\n\r\n" + CHAT,
    "the same length twice": POST + LENGTH + LENGTH + b"\r\n" + CHAT,
    "length with a sign": POST + b"Content-Length: +5\r\n\r\n" + CHAT,
    "negative length": POST + b"Content-Length: -5\r\n\r\n" + CHAT,
    "length not a number": POST + b"Content-Length: five\r\n\r\n" + CHAT,
    "length in hex": POST + b"Content-Length: 0x10\r\n\r\n" + CHAT,
    "length list": POST + b"Content-Length: 5, 5\r\n\r\n" + CHAT,
    "empty length": POST + b"Content-Length: \r\n\r\n" + CHAT,
    "length of 41 digits": POST + b"Content-Length: 1%b\r\n\r\n" % (b"0" * 40) + CHAT,
    "length of 60,000 digits": POST + b"Content-Length: %b\r\n\r\n" % (b"9" * 60_000),
    "length in superscript": POST + b"Content-Length: \xb2\r\n\r\n" + CHAT,
    "length in Arabic digits": POST + "Content-Length: ٣\r\n\r\n".encode() + CHAT,
    "length with an exponent": POST + b"Content-Length: 1e2\r\n\r\n" + CHAT,
    "length with an underscore": POST + b"Content-Length: 1_0\r\n\r\n" + CHAT,
    "chunk size of 40 digits": POST + b"Transfer-Encoding: chunked\r\n\r\n%b\r\n" % (b"f" * 40),
    "chunk size with a sign": POST + b"Transfer-Encoding: chunked\r\n\r\n+1\r\nx\r\n0\r\n\r\n",
    "chunk size in superscript": POST + b"Transfer-Encoding: chunked\r\n\r\n\xb2\r\nxx\r\n",
    "unknown coding": POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n" + CHAT,
    "identity coding": POST + b"Transfer-Encoding: identity\r\n\r\n" + CHAT,
    "chunk size not hex": POST + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n",
    "chunk longer than told": POST + b"Transfer-Encoding: chunked\r\n\r\n2\r\nabc\r\n0\r\n\r\n",
    "chunk size negative": POST + b"Transfer-Encoding: chunked\r\n\r\n-1\r\n\r\n",
    "chunk line end": POST + b"Transfer-Encoding: chunked\r\n\r\n2\nab\r\n0\r\n\r\n",
}


@pytest.mark.parametrize("request_bytes", BAD_HEADS.values(), ids=BAD_HEADS)
def test_what_is_not_one_clear_http_request_is_refused_and_the_connection_closed(
        served, request_bytes):
    mock, proxy = served
    sent = len(mock.seen)
    with RawClient(proxy.port) as client:
        client.send(request_bytes)
        answer = client.read_answer()
        assert client.is_closed_by_server()

    assert (400, "close") == (answer.status, answer.header("connection"))
    assert "malformed_http" == answer.json["error"]["code"]
    check_nothing_happened(mock, proxy, sent)


OTHER_REFUSALS = {
    "no length": (411, POST + b"\r\n"),
    "body over the limit": (413, POST + b"Content-Length: 1048577\r\n\r\n"),
    "body far over the limit": (413, POST + b"Content-Length: 999999999999\r\n\r\n"),
    "chunked body over the limit": (413, POST + b"Transfer-Encoding: chunked\r\n\r\n" + (
        b"40000\r\n" + b"x" * 0x40000 + b"\r\n") * 5),
    "brotli": (415, POST + b"Content-Encoding: br\r\n" + LENGTH + b"\r\n" + CHAT),
    "zstd": (415, POST + b"Content-Encoding: zstd\r\n" + LENGTH + b"\r\n" + CHAT),
    "unknown method": (405, GET.replace(b"GET", b"BREW") + b"\r\n"),
    "lower-case method": (405, GET.replace(b"GET", b"get") + b"\r\n"),
    "TRACE": (405, GET.replace(b"GET", b"TRACE") + b"\r\n"),
    "CONNECT": (405, GET.replace(b"GET", b"CONNECT") + b"\r\n"),
    "websocket": (426, GET + b"Connection: upgrade\r\nUpgrade: websocket\r\n\r\n"),
    "websocket among others": (426, GET + b"Connection: upgrade\r\n"
                               b"Upgrade: h2c, WebSocket\r\n\r\n"),
    "foreign Host": (403, GET.replace(b"127.0.0.1", b"evil.example") + b"\r\n"),
    "Host with more": (403, GET.replace(b"127.0.0.1", b"127.0.0.1:1/#@") + b"\r\n"),
    "Host with a port of 40 digits": (403, GET.replace(b"127.0.0.1", b"127.0.0.1:" + b"9" * 40)
                                      + b"\r\n"),
    "Host with a port in Arabic digits": (403, GET.replace(b"127.0.0.1", "[::1]:٣".encode())
                                          + b"\r\n"),
    "Host that ends like ours": (403, GET.replace(b"127.0.0.1", b"127.0.0.1.evil.io") + b"\r\n"),
    "no token": (401, GET.replace(AUTH, b"") + b"\r\n"),
    "no token and a huge body": (401, POST.replace(AUTH, b"")
                                 + b"Content-Length: 99999999\r\n\r\n"),
    "wrong token and expect": (401, POST.replace(TOKEN.encode(), b"ic_wrong") + LENGTH
                               + b"Expect: 100-continue\r\n\r\n"),
    "expect and too large": (413, POST + b"Content-Length: 1048577\r\n"
                             b"Expect: 100-continue\r\n\r\n"),
}


@pytest.mark.parametrize("status, request_bytes", OTHER_REFUSALS.values(), ids=OTHER_REFUSALS)
def test_a_refusal_before_the_body_is_read_closes_the_connection(served, status, request_bytes):
    mock, proxy = served
    sent = len(mock.seen)
    with RawClient(proxy.port) as client:
        client.send(request_bytes)
        answer = client.read_answer()
        assert client.is_closed_by_server()

    assert status == answer.status, answer.body
    assert answer.json["error"]["message"]
    check_nothing_happened(mock, proxy, sent)


def test_a_refused_upgrade_says_which_protocol_is_spoken(served):
    _, proxy = served
    with RawClient(proxy.port) as client:
        client.send(OTHER_REFUSALS["websocket"][1])
        answer = client.read_answer()

    assert "HTTP/1.1" == answer.header("upgrade")
    assert {"close", "upgrade"} == {value for name, value in answer.headers
                                    if name == "connection"}


GOOD_REQUESTS = {
    "Java's offer of HTTP/2": POST + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
    b"HTTP2-Settings: AAEAAEAAAAIAAAAA\r\n" + LENGTH + b"\r\n" + CHAT,
    "the same in capitals": POST + b"Upgrade: H2C ,\r\n" + LENGTH + b"\r\n" + CHAT,
    "chunked": POST + b"Transfer-Encoding: chunked\r\n\r\n" + b"".join(
        b"%x;ext=1\r\n%b\r\n" % (1, CHAT[i:i + 1]) for i in range(len(CHAT)))
    + b"0\r\nx-trailer: 1\r\n\r\n",
    "gzip": POST + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(
        gzip.compress(CHAT)) + gzip.compress(CHAT),
    "x-api-key": POST.replace(b"Authorization: Bearer", b"x-api-key:") + LENGTH + b"\r\n" + CHAT,
    "an empty line before it": b"\r\n" + POST + LENGTH + b"\r\n" + CHAT,
    "many empty lines before it": b"\r\n" * 40_000 + POST + LENGTH + b"\r\n" + CHAT,
    "loopback name": POST.replace(b"127.0.0.1", b"LocalHost:8787") + LENGTH + b"\r\n" + CHAT,
    "IPv6 loopback": POST.replace(b"127.0.0.1", b"[::1]:1") + LENGTH + b"\r\n" + CHAT,
}


@pytest.mark.parametrize("request_bytes", GOOD_REQUESTS.values(), ids=GOOD_REQUESTS)
def test_an_unusual_but_clear_request_reaches_the_provider_as_a_plain_one(served, request_bytes):
    mock, proxy = served
    with RawClient(proxy.port) as client:
        client.send(request_bytes)
        answer = client.read_answer()

    assert 200 == answer.status, answer.body
    assert CHAT == mock.seen[-1].body
    assert str(len(CHAT)) == mock.seen[-1].header("content-length")
    for name in ("content-encoding", "upgrade", "http2-settings", "connection"):
        assert mock.seen[-1].header(name) is None


@pytest.mark.parametrize("body, status", [
    (gzip.compress(CHAT)[:-9], 400), (b"not gzip at all", 400),
    (gzip.compress(b" " * 2_000_000), 413)], ids=["truncated", "broken", "bomb"])
def test_a_compressed_body_that_is_broken_or_a_bomb_is_refused(served, body, status):
    mock, proxy = served
    sent = len(mock.seen)

    answer = call(proxy.port, "POST", "/v1/chat/completions", body,
                  [("content-encoding", "gzip")])

    assert status == answer.status
    check_nothing_happened(mock, proxy, sent)


def test_empty_lines_between_requests_are_skipped_wherever_they_are_cut(served):
    """Old clients end a body with a line more than its length says."""
    mock, proxy = served
    with RawClient(proxy.port) as client:
        for before in (b"", b"\r\n", b"\r\n\r\n\r\n"):
            for byte in before:
                client.send(bytes([byte]))
            client.send(POST + LENGTH + b"\r\n" + CHAT)
            assert 200 == client.read_answer().status
        client.send(b"\r\n\r")                         # a pause in the middle of a line end
        client.send(b"\n" + POST + LENGTH + b"\r\n" + CHAT + b"\r\n")
        assert 200 == client.read_answer().status


@pytest.mark.parametrize("before", [b"\n", b"\r", b"\r\r\n", b" \r\n"], ids=repr)
def test_what_is_no_empty_line_before_a_request_is_refused(served, before):
    _, proxy = served
    with RawClient(proxy.port) as client:
        client.send(before + POST + LENGTH + b"\r\n" + CHAT)
        assert 400 == client.read_answer().status
        assert client.is_closed_by_server()


def test_empty_lines_without_end_are_given_up_like_silence(proxy_for):
    proxy = proxy_for(timeouts={"head_s": 0.2, "keep_alive_s": 0.2})
    with RawClient(proxy.port) as client, contextlib.suppress(OSError):
        while not ready_to_read(client):
            client.send(b"\r\n")
        assert client.is_closed_by_server()


def ready_to_read(client):
    return bool(select.select([client.sock], [], [], 0.001)[0])


def test_http_1_0_is_served_and_closed(served):
    _, proxy = served
    with RawClient(proxy.port) as client:
        client.send(b"POST /v1/chat/completions HTTP/1.0\r\n" + AUTH + LENGTH + b"\r\n" + CHAT)

        assert 200 == client.read_answer().status
        assert client.is_closed_by_server()


def test_a_stream_to_http_1_0_ends_with_the_connection(served):
    _, proxy = served
    body = json.dumps(chat_with(stream=True)).encode()
    with RawClient(proxy.port) as client:
        client.send(b"POST /v1/chat/completions HTTP/1.0\r\n" + AUTH
                    + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        answer = client.read_answer()

    assert answer.header("transfer-encoding") is None
    assert answer.body.endswith(b"data: [DONE]\n\n")


def test_expect_100_continue_is_answered_once_the_request_may_come(served):
    _, proxy = served
    with RawClient(proxy.port) as client:
        client.send(POST + LENGTH + b"Expect: 100-continue\r\n\r\n")
        interim, _ = client.read_head()
        client.send(CHAT)

        assert (100, 200) == (interim, client.read_answer().status)


def test_pipelined_requests_are_answered_in_order(served):
    _, proxy = served
    one = b"GET /ironcage/budget HTTP/1.1\r\nHost: localhost\r\n" + AUTH + b"\r\n"
    with RawClient(proxy.port) as client:
        client.send(POST + LENGTH + b"\r\n" + CHAT + one + GET + b"\r\n")
        answers = [client.read_answer() for _ in range(3)]

    assert [200, 200, 200] == [answer.status for answer in answers]
    assert "choices" in answers[0].json and "limit_microdollars" in answers[1].json


def test_a_body_longer_than_its_length_is_the_next_request_and_is_refused(served):
    _, proxy = served
    with RawClient(proxy.port) as client:
        client.send(POST + LENGTH + b"\r\n" + CHAT + b"{}\r\n\r\n")
        answers = [client.read_answer() for _ in range(2)]

    assert [200, 400] == [answer.status for answer in answers]


def test_head_and_get_of_the_root_need_no_token(served):
    _, proxy = served

    greeting = call(proxy.port, "GET", "/", token=None)
    head = call(proxy.port, "HEAD", "/", token=None)

    assert (200, b"LlmRouter OK") == (greeting.status, greeting.body)
    assert (200, b"", "12") == (head.status, head.body, head.header("content-length"))


@pytest.mark.parametrize("said", [b"", b"POST /v1/chat/comp", POST + LENGTH + b"\r\n" + CHAT[:9]],
                         ids=["nothing", "half a head", "half a body"])
def test_a_client_that_stops_in_the_middle_is_given_up(mock, proxy_for, said):
    proxy = proxy_for("--budget", "1", timeouts={"head_s": 0.2, "body_s": 0.2, "linger_s": 0.1})
    with RawClient(proxy.port) as client:
        client.send(said)
        if said:
            assert 408 == client.read_answer().status
        assert client.is_closed_by_server()

    check_nothing_happened(mock, proxy, 0)


@pytest.mark.parametrize("said", [b"", b"POST /v1", POST + LENGTH + b"\r\n" + CHAT[:9]],
                         ids=["before", "in the head", "in the body"])
@pytest.mark.parametrize("leave", [RawClient.close, RawClient.leave])
def test_a_client_that_leaves_before_its_request_is_whole_costs_nothing(served, said, leave):
    mock, proxy = served
    sent = len(mock.seen)
    client = RawClient(proxy.port)
    client.send(said)

    leave(client)

    check_nothing_happened(mock, proxy, sent)


def test_too_many_connections_close_the_longest_idle_and_then_get_a_503(mock, proxy_for,
                                                                        monkeypatch):
    import ironcage_proxy
    monkeypatch.setattr(ironcage_proxy, "MAX_CONNECTIONS", 2)
    proxy = proxy_for("--budget", "1")
    gates = [Gate(), Gate()]
    mock.script(*(lambda request, gate=gate: mock.default_reply(request).with_steps(
        [gate, *mock.default_reply(request).steps]) for gate in gates))
    first, second = RawClient(proxy.port), RawClient(proxy.port)
    first.request("POST", "/v1/chat/completions", CHAT)
    mock.wait_for_requests(1)

    third = RawClient(proxy.port)                # takes the place of the idle second
    assert second.is_closed_by_server()
    third.request("POST", "/v1/chat/completions", CHAT)
    mock.wait_for_requests(2)
    with RawClient(proxy.port) as fourth:        # all are busy now
        refused = fourth.read_answer()
    for gate in gates:
        gate.event.set()

    assert (503, "1") == (refused.status, refused.header("retry-after"))
    assert [200, 200] == [client.read_answer().status for client in (first, third)]
    for client in (first, second, third):
        client.close()


def test_an_idle_connection_whose_next_request_waits_is_not_closed(mock, proxy_for):
    proxy = proxy_for("--budget", "1")
    proxy.places.most = 2
    first, second = RawClient(proxy.port), RawClient(proxy.port)
    for client in (first, second):
        client.request("POST", "/v1/chat/completions", CHAT)
        assert 200 == client.read_answer().status

    with slot_of(proxy.slot):
        first.request("POST", "/v1/chat/completions", CHAT)
        third = RawClient(proxy.port)

    assert 200 == first.read_answer().status
    assert second.is_closed_by_server()
    for client in (first, second, third):
        client.close()


@pytest.mark.parametrize("files, expected", [
    (1_024, 480), (100, 18), (10, 1), (1 << 20, 1_024)])
def test_connections_are_bounded_by_the_files_that_may_be_open(monkeypatch, files, expected):
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (files, files))
    assert expected == program().most_connections()


def test_out_of_files_the_longest_idle_connection_makes_room(mock, proxy_for, monkeypatch):
    import socketserver
    proxy, fail = proxy_for("--budget", "1"), threading.Event()
    get_request = socketserver.TCPServer.get_request

    def get_request_or_fail(server):
        if server is proxy and fail.is_set():
            fail.clear()
            raise OSError(errno.EMFILE, "Too many open files")
        return get_request(server)

    monkeypatch.setattr(socketserver.TCPServer, "get_request", get_request_or_fail)
    idle = RawClient(proxy.port)
    idle.request("POST", "/v1/chat/completions", CHAT)
    assert 200 == idle.read_answer().status
    with slot_of(proxy.slot):                   # so the first is idle by now
        fail.set()
    with RawClient(proxy.port) as client:
        client.request("POST", "/v1/chat/completions", CHAT)
        assert 200 == client.read_answer().status
    assert idle.is_closed_by_server()
    idle.close()


def test_who_comes_in_and_who_asks_again_are_both_served_in_turn(mock, proxy_for):
    proxy = proxy_for("--budget", "1")
    known = RawClient(proxy.port)
    known.request("POST", "/v1/chat/completions", CHAT)
    assert 200 == known.read_answer().status

    with slot_of(proxy.slot):
        known.request("POST", "/v1/chat/completions", CHAT)
        others = [RawClient(proxy.port) for _ in range(20)]
        for other in others:
            other.request("POST", "/v1/chat/completions", CHAT)

    assert [200] * 21 == [client.read_answer().status for client in (known, *others)]
    for client in (known, *others):
        client.close()


def test_a_connection_that_gets_no_thread_is_closed_and_the_next_is_served(mock, proxy_for,
                                                                           monkeypatch):
    proxy = proxy_for("--budget", "1")
    refused, start = [], threading.Thread.start

    def start_but_not_the_first(thread):
        if not refused:
            refused.append(thread)
            raise RuntimeError("can't start new thread")
        start(thread)

    with slot_of(proxy.slot):
        monkeypatch.setattr(threading.Thread, "start", start_but_not_the_first)
        clients = [RawClient(proxy.port) for _ in range(3)]
        for client in clients[1:]:
            client.request("POST", "/v1/chat/completions", CHAT)

    assert [200, 200] == [client.read_answer().status for client in clients[1:]]
    assert clients[0].is_closed_by_server()
    for client in clients:
        client.close()


def test_more_who_come_in_than_are_let_in_together_are_all_served(mock, proxy_for, monkeypatch):
    import ironcage_proxy
    monkeypatch.setattr(ironcage_proxy, "LISTEN_BACKLOG", 2)
    proxy = proxy_for("--budget", "1")

    with slot_of(proxy.slot):
        clients = [RawClient(proxy.port) for _ in range(10)]
        for client in clients:
            client.request("POST", "/v1/chat/completions", CHAT)

    assert [200] * 10 == [client.read_answer().status for client in clients]
    for client in clients:
        client.close()
