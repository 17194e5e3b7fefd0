"""Requests that no honest client sends, over raw sockets, with every cell of each table filled.

For each: the exact status, the error in the client's dialect, nothing sent to the provider,
nothing charged or reserved, the connection closed or usable as it should be, and another client
still served.
"""
import gzip
import json
import select
import zlib

import pytest
from support import (ADMIN_TOKEN, PATIENCE_S, TOKEN, Gate, RawClient, Reply, anthropic_error, call,
                     settled_status, sse, status_of)

CHAT_PATH, MESSAGES_PATH = "/v1/chat/completions", "/v1/messages"
CHAT = {"model": "gpt-4o-mini", "max_tokens": 100,
        "messages": [{"role": "user", "content": "hello"}]}
MESSAGE = {"model": "claude-haiku-4-5", "max_tokens": 100,
           "messages": [{"role": "user", "content": "hello"}]}
GOOD = {CHAT_PATH: CHAT, MESSAGES_PATH: MESSAGE}
BASIC = ("iron_cage_unpriced_model", "unpriced_model")      # (type, code) of the OpenAI dialect
INVALID = ("invalid_request_error", None)
MALFORMED = ("invalid_request_error", "malformed_http")
MEGABYTE = 1024 * 1024


def body_of(path):
    return json.dumps(GOOD[path]).encode()


def raw(first_line, *headers, body=b"", host="Host: 127.0.0.1"):
    """A request as bytes, with the token."""
    lines = [first_line, *([host] if host else []), f"Authorization: Bearer {TOKEN}", *headers]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def posted(path, *headers, body=b""):
    return raw(f"POST {path} HTTP/1.1", "Content-Type: application/json", *headers, body=body)


def sized(path, *headers, body):
    return posted(path, f"Content-Length: {len(body)}", *headers, body=body)


def chunked(path, *chunks, headers=()):
    return posted(path, "Transfer-Encoding: chunked", *headers, body=b"".join(
        b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n")


def refusal(answer, path):
    """(type, code) of an error as OpenAI clients know it, read in the dialect of `path`."""
    body = answer.json
    assert "application/json" == answer.header("content-type")
    assert answer.header("x-ironcage-request-id").startswith("req_")
    if path.startswith(MESSAGES_PATH):
        assert {"type", "error", "request_id"} == set(body) and "error" == body["type"]
        assert {"type", "message"} <= set(body["error"]) <= {"type", "message", "code", "ironcage"}
    else:
        assert {"error"} == set(body)
        assert {"message", "type", "param", "code"} <= set(body["error"])
    assert body["error"]["message"]
    return body["error"]["type"], body["error"].get("code")


def expected_in(path, kind, code, anthropic_type="invalid_request_error"):
    """How an error of the OpenAI dialect reads in the dialect of `path`."""
    if not path.startswith(MESSAGES_PATH):
        return kind, code
    return anthropic_type, kind if kind.startswith("iron_cage_") else None


def assert_untouched(mock, proxy):
    """Nothing was sent, charged or kept reserved, and another client is served."""
    status = status_of(proxy)
    assert [] == mock.seen
    assert (0, 0) == (status["spent_microdollars"], status["reserved_microdollars"])


def assert_still_usable(client, path=CHAT_PATH):
    client.request("POST", path, body_of(path))
    assert 200 == client.read_answer().status


# Bodies: refused, and the connection goes on.

def with_fields(**changes):
    return lambda good: json.dumps({**good, **changes}).encode()


def spliced(text):
    """The good body with members of JSON text that json.dumps would not write."""
    return lambda good: json.dumps(good)[:-1].encode() + b", " + text + b"}"


def without(name):
    return lambda good: json.dumps({n: v for n, v in good.items() if n != name}).encode()


HOSTILE_JSON = {
    "empty": (lambda good: b"", INVALID),
    "cut short": (lambda good: json.dumps(good).encode()[:-1], INVALID),
    "single quotes": (lambda good: str(good).encode(), INVALID),
    "trailing comma": (lambda good: json.dumps(good).encode()[:-1] + b",}", INVALID),
    "two documents": (lambda good: json.dumps(good).encode() * 2, INVALID),
    "a comment": (lambda good: b"/**/" + json.dumps(good).encode(), INVALID),
    "an array": (lambda good: json.dumps([good]).encode(), INVALID),
    "a string": (lambda good: b'"hello"', INVALID),
    "a number": (lambda good: b"7", INVALID),
    "null": (lambda good: b"null", INVALID),
    "form-encoded": (lambda good: b"model=gpt-4o-mini&max_tokens=1", INVALID),
    "same key twice": (spliced(b'"model": "gpt-4o-mini"'), INVALID),
    "same key twice, escaped": (spliced(b'"mod\\u0065l": "gpt-4o-mini"'), INVALID),
    "same key twice, deep": (spliced(b'"a": [{"b": {"c": 1, "c": 1}}]'), INVALID),
    "byte-order mark": (lambda good: b"\xef\xbb\xbf" + json.dumps(good).encode(), INVALID),
    "UTF-16": (lambda good: json.dumps(good).encode("utf-16"), INVALID),
    "UTF-16 without mark": (lambda good: json.dumps(good).encode("utf-16-le"), INVALID),
    "invalid UTF-8": (spliced(b'"user": "\xff\xfe"'), INVALID),
    "overlong UTF-8": (spliced(b'"user": "\xc0\xaf"'), INVALID),
    "a surrogate in UTF-8": (spliced(b'"user": "\xed\xa0\x80"'), INVALID),
    "NUL in a string": (spliced(b'"user": "a\x00b"'), INVALID),
    "NaN": (spliced(b'"temperature": NaN'), INVALID),
    "Infinity": (spliced(b'"temperature": Infinity'), INVALID),
    "-Infinity, deep": (spliced(b'"metadata": {"a": [-Infinity]}'), INVALID),
    "nested 201 deep": (spliced(b'"user": ' + b"[" * 200 + b"]" * 200), INVALID),
    "nested 100,000 deep": (spliced(b'"user": ' + b"[" * 100_000 + b"]" * 100_000), INVALID),
    "objects 100,000 deep": (spliced(b'"user": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
                             INVALID),
    "open brackets only": (lambda good: b"[" * 100_000, INVALID),
    "integer of 19 digits": (spliced(b'"seed": 1000000000000000000'), INVALID),
    "integer of 5,000 digits": (spliced(b'"seed": ' + b"9" * 5000), INVALID),
    "huge integer, deep": (spliced(b'"metadata": {"a": -' + b"9" * 19 + b"}"), INVALID),
    "model missing": (without("model"), INVALID),
    "model null": (with_fields(model=None), INVALID),
    "model a number": (with_fields(model=4), INVALID),
    "model a list": (with_fields(model=["gpt-4o-mini"]), INVALID),
    "model an object": (with_fields(model={"id": "gpt-4o-mini"}), INVALID),
    "model empty": (with_fields(model=""), INVALID),
    "stream a string": (with_fields(stream="yes"), INVALID),
    "stream a number": (with_fields(stream=1), INVALID),
    "stream a list": (with_fields(stream=[]), INVALID),
    "n zero": (with_fields(n=0), INVALID),
    "n negative": (with_fields(n=-1), INVALID),
    "n a string": (with_fields(n="2"), INVALID),
    "n a float": (with_fields(n=2.0), INVALID),
    "n true": (with_fields(n=True), INVALID),
    "n a million": (with_fields(n=10 ** 6), INVALID),
}


@pytest.mark.parametrize("path", GOOD)
@pytest.mark.parametrize("name", HOSTILE_JSON)
def test_a_hostile_body_is_refused_and_the_connection_goes_on(mock, proxy, name, path):
    make, (kind, code) = HOSTILE_JSON[name]
    with RawClient(proxy.port) as client:
        client.request("POST", path, make(GOOD[path]))
        answer = client.read_answer()

        assert 400 == answer.status
        assert expected_in(path, kind, code) == refusal(answer, path)
        assert_untouched(mock, proxy)
        assert_still_usable(client, path)


UNKNOWN_MODELS = {
    "unknown": "-nope", "10 kB long": "x" * 10_240, "control characters": "\x00\r\n\x1b[2J",
    "a forged header": "\r\nx-evil: 1", "a lone surrogate": "\ud800", "a path": "/../../v1/files",
    "a URL": "://evil.example/v1", "spaces": " ", "beyond ASCII": "ⅿ", "a quote": '"}{',
}


@pytest.mark.parametrize("path, prefix", [(CHAT_PATH, "gpt"), (MESSAGES_PATH, "claude")])
@pytest.mark.parametrize("name", UNKNOWN_MODELS)
def test_a_hostile_model_name_has_no_price(mock, proxy, path, prefix, name):
    model = prefix + UNKNOWN_MODELS[name]
    with RawClient(proxy.port) as client:
        client.request("POST", path, json.dumps({**GOOD[path], "model": model}).encode())
        answer = client.read_answer()

        assert 400 == answer.status
        assert expected_in(path, *BASIC) == refusal(answer, path)
        assert len(answer.body) < 1000, "a name is repeated only where it is short and plain"
        assert_untouched(mock, proxy)
        assert_still_usable(client, path)


BAD_CAPS = {
    "negative": -1, "10**12": 10 ** 12, "10**30": 10 ** 30, "a float": 1.5, "a whole float": 100.0,
    "a string": "100", "true": True, "false": False, "a list": [100], "an object": {"a": 1},
    "an empty string": "",
}
CAPS = [(CHAT_PATH, "max_tokens"), (CHAT_PATH, "max_completion_tokens"),
        ("/v1/responses", "max_output_tokens"), ("/v1/completions", "max_tokens"),
        (MESSAGES_PATH, "max_tokens")]
CAPPED = {**GOOD, "/v1/responses": {"model": "gpt-4o-mini", "input": "hello"},
          "/v1/completions": {"model": "gpt-3.5-turbo-instruct", "prompt": "hello"}}


@pytest.mark.parametrize("path, field", CAPS)
@pytest.mark.parametrize("value", BAD_CAPS.values(), ids=BAD_CAPS)
def test_a_hostile_output_cap_is_refused(mock, proxy, path, field, value):
    with RawClient(proxy.port) as client:
        client.request("POST", path, json.dumps({**CAPPED[path], field: value}).encode())
        answer = client.read_answer()

        assert 400 == answer.status
        assert expected_in(path, *INVALID) == refusal(answer, path)
        if isinstance(value, (str, float, list)) or value in (-1, 10 ** 12):
            assert field in answer.json["error"]["message"]
        assert_untouched(mock, proxy)
        assert_still_usable(client)


@pytest.mark.parametrize("path", [CHAT_PATH, "/v1/completions"])
@pytest.mark.parametrize("options", [[], "yes", 1, True, {"include_usage": "yes"},
                                     {"include_usage": 1}], ids=json.dumps)
def test_hostile_stream_options_are_refused(mock, proxy, path, options):
    fields = {**CAPPED[path], "stream": True, "stream_options": options}
    with RawClient(proxy.port) as client:
        client.request("POST", path, json.dumps(fields).encode())
        answer = client.read_answer()

        assert 400 == answer.status
        assert INVALID == refusal(answer, path)
        assert_untouched(mock, proxy)
        assert_still_usable(client)


def test_stream_options_mean_nothing_to_anthropic_and_travel_as_they_are(mock, proxy):
    body = json.dumps({**MESSAGE, "stream": True, "stream_options": []}).encode()

    answer = call(proxy.port, "POST", MESSAGES_PATH, body)

    assert anthropic_error(400, "stream_options: Extra inputs are not permitted").body \
        == answer.body
    assert body == mock.seen[0].body
    assert 0 == settled_status(proxy)["spent_microdollars"]


@pytest.mark.parametrize("text", ["\ud800", "\udfff\ud800", "a\x00b", "\u2028\x1b[2J\x85",
                                  "x" * 300_000], ids=ascii)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", GOOD)
def test_hostile_text_is_no_fault_of_the_echo_model(proxy, path, stream, text):
    fields = {**GOOD[path], "model": "ironcage/echo", "stream": stream,
              "messages": [{"role": "user", "content": text}]}

    answer = call(proxy.port, "POST", path, fields)

    assert 200 == answer.status
    assert b"error" not in answer.body


# HTTP that is not one clear message: refused, and the connection is closed.

LINE = f"POST {CHAT_PATH} HTTP/1.1"
EXCESS = ["X-Filler: 1"] * 96                 # beside the five that every request here has
CHAT_BODY = json.dumps(CHAT).encode()
OF_BODY = ("Content-Type: application/json", f"Content-Length: {len(CHAT_BODY)}")


def head_case(*headers, first_line=LINE, **options):
    return raw(first_line, *OF_BODY, *headers, body=CHAT_BODY, **options)


def target_case(target):
    return raw(f"GET {target} HTTP/1.1")


MALFORMED_HTTP = {
    "HTTP/0.9": b"GET /\r\n\r\n",
    "HTTP/0.9 by name": raw("GET / HTTP/0.9"),
    "HTTP/2.0": raw("GET / HTTP/2.0"),
    "HTTP/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "HTTP/1.2": raw("GET / HTTP/1.2"),
    "http/1.1": raw("GET / http/1.1"),
    "no version's number": raw("GET / HTTP"),
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\r\n\r\n",
    "an empty line first": b"\r\n\r\n" + raw("GET / HTTP/1.1"),
    "CONNECT": raw("CONNECT api.openai.com:443 HTTP/1.1"),
    "OPTIONS *": raw("OPTIONS * HTTP/1.1"),
    "method with a control": raw("GE\x01T / HTTP/1.1"),
    "method of 33 letters": raw("G" * 33 + " / HTTP/1.1"),
    "absolute URI": head_case(first_line="POST http://evil.example/v1/chat/completions HTTP/1.1"),
    "absolute URI of ours": target_case("http://127.0.0.1/ironcage/status"),
    "dot segment": target_case("/./ironcage/status"),
    "dot dot segment": target_case("/v1/../ironcage/status"),
    "encoded dot segments": target_case("/v1/models/%2e%2e/files"),
    "half-encoded dot segments": target_case("/v1/models/.%2E/files"),
    "encoded slash and dots": target_case("/v1/models/..%2f..%2ffiles"),
    "fragment": target_case("/v1/models#x"),
    "backslash": target_case("/v1/models\\..\\files"),
    "non-ASCII target": target_case("/v1/models/\xe9"),
    "control in the target": target_case("/v1/models/\x01"),
    "NUL in the target": target_case("/v1/models/\x00"),
    "tab in the target": target_case("/v1/\tmodels"),
    "space in the target": target_case("/v1/models /x"),
    "target without slash": target_case("v1/models"),
    "101 headers": head_case(*EXCESS, "X-Filler: 1"),
    "64 KiB of one header": head_case("X-Filler: " + "a" * 65_536),
    "64 KiB of many headers": head_case(*[f"X-{i}: " + "a" * 1000 for i in range(66)]),
    "64 KiB of target": target_case("/" + "a" * 65_536),
    "folded header": head_case("X-A: 1", " 2"),
    "folded by a tab": head_case("X-A: 1", "\t2"),
    "folded first header": raw(LINE, *OF_BODY, body=CHAT_BODY, host=" Host: 127.0.0.1"),
    "bare CR in a value": head_case("X-A: 1\rContent-Length: 0"),
    "bare CR as a line's end": b"GET / HTTP/1.1\rHost: 127.0.0.1\r\n\r\n",
    "bare LF as a line's end": b"GET / HTTP/1.1\nHost: 127.0.0.1\r\n\r\n",
    "bare LF between headers": head_case("X-A: 1\nX-B: 2"),
    "bare LF at the end": b"GET / HTTP/1.1\r\nHost: 127.0.0.1\n\n",
    "space before the colon": head_case("X-A : 1"),
    "space in a name": head_case("X A: 1"),
    "no colon": head_case("X-A"),
    "no name": head_case(": 1"),
    "NUL in a value": head_case("X-A: a\x00b"),
    "NUL in a name": head_case("X-\x00A: b"),
    "escape in a value": head_case("X-A: \x1b[2J"),
    "no Host": head_case(host=None),
    "two Hosts": head_case("Host: 127.0.0.1"),
    "two Hosts, one foreign": head_case("Host: evil.example"),
}


@pytest.mark.parametrize("request_bytes", MALFORMED_HTTP.values(), ids=MALFORMED_HTTP)
def test_malformed_http_is_refused_and_the_connection_is_closed(mock, proxy, request_bytes):
    with RawClient(proxy.port) as client:
        client.send(request_bytes)
        answer = client.read_answer()

        assert (400, "close") == (answer.status, answer.header("connection"))
        assert MALFORMED == refusal(answer, CHAT_PATH)
        assert client.is_closed_by_server()
    assert_untouched(mock, proxy)


def test_a_malformed_header_is_refused_in_the_dialect_of_its_path(mock, proxy):
    with RawClient(proxy.port) as client:
        client.send(posted(MESSAGES_PATH, "X-A : 1", "Content-Length: 0"))
        answer = client.read_answer()

        assert 400 == answer.status
        assert ("invalid_request_error", None) == refusal(answer, MESSAGES_PATH)


def test_100_headers_are_taken(mock, proxy):
    with RawClient(proxy.port) as client:
        client.send(head_case(*EXCESS))

        assert 200 == client.read_answer().status


@pytest.mark.parametrize("target", ["//evil.example/v1/models", "/%2e%2e%2fx%252e", "/@evil"])
def test_a_strange_path_is_a_path_and_nothing_else(mock, proxy, target):
    with RawClient(proxy.port) as client:
        client.request("GET", target)
        answer = client.read_answer()

        assert 400 == answer.status
        assert_untouched(mock, proxy)


METHODS = {
    "unknown": "BREW", "TRACE": "TRACE", "CONNECT with a path": "CONNECT", "lower-case": "post",
    "mixed case": "Post", "PROPFIND": "PROPFIND", "a token of symbols": "!#$%&'*+-.^_`|~",
}


@pytest.mark.parametrize("path", [*GOOD, "/", "/ironcage/status"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_method_that_is_not_served_is_refused(mock, proxy, path, method):
    with RawClient(proxy.port) as client:
        client.send(raw(f"{method} {path} HTTP/1.1", *OF_BODY, body=CHAT_BODY))
        answer = client.read_answer()

        assert (405, "close") == (answer.status, answer.header("connection"))
        assert expected_in(path, "invalid_request_error", "method_not_allowed") \
            == refusal(answer, path)
        assert client.is_closed_by_server()
    assert_untouched(mock, proxy)


REFUSED_HEADS = ["/ironcage/status", "/ironcage/nothing", "/v1/models", CHAT_PATH, MESSAGES_PATH]


@pytest.mark.parametrize("path", REFUSED_HEADS)
def test_a_refusal_of_head_has_no_body_that_the_next_answer_could_begin_with(mock, proxy, path):
    with RawClient(proxy.port) as client:
        client.request("HEAD", path)
        refused = client.read_answer(to_head=True)

        assert 400 <= refused.status < 500
        if refused.header("connection") != "close":
            client.request("GET", "/")
            assert b"LlmRouter OK" == client.read_answer().body


# Host.

FOREIGN_HOSTS = ["evil.example", "evil.example:8787", "127.0.0.1:8787/#@", "127.0.0.1@evil.example",
                 "127.0.0.1.evil.example", "localhost.evil.example", "evil.example:127.0.0.1", "",
                 "127.0.0.1, evil.example", "[::2]", "0.0.0.0", "169.254.169.254", "localhost\\x",
                 "\xe9vil.example", "127.0.0.1 evil.example", ":8787"]


@pytest.mark.parametrize("path", [*GOOD, "/", "/ironcage/status"])
@pytest.mark.parametrize("host", FOREIGN_HOSTS, ids=ascii)
def test_a_foreign_host_is_refused_on_every_route(mock, proxy, path, host):
    method = "POST" if path in GOOD else "GET"
    with RawClient(proxy.port) as client:
        client.send(raw(f"{method} {path} HTTP/1.1", *OF_BODY, body=CHAT_BODY,
                        host=f"Host: {host}"))
        answer = client.read_answer()

        assert 403 == answer.status
        assert expected_in(path, "invalid_request_error", "permission_denied", "permission_error") \
            == refusal(answer, path)
        assert "--allow-host" in answer.json["error"]["message"]
        assert client.is_closed_by_server()
    assert_untouched(mock, proxy)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:8787", "localhost", "LocalHost:1",
                                  "[::1]:8787", "127.0.0.2", "gateway.internal",
                                  "GATEWAY.internal:443"])
def test_a_loopback_or_allowed_host_is_served(proxy_for, host):
    proxy = proxy_for("--allow-host", "gateway.internal")
    with RawClient(proxy.port) as client:
        client.send(raw("GET /ironcage/status HTTP/1.1", host=f"Host: {host}"))

        assert 200 == client.read_answer().status


# Framing of bodies.

FRAMINGS = {
    "no content-length": ((), b"", 411, "length_required"),
    "not a number": (("Content-Length: abc",), b"{}", 400, "malformed_http"),
    "hexadecimal": (("Content-Length: 0x2",), b"{}", 400, "malformed_http"),
    "negative": (("Content-Length: -2",), b"{}", 400, "malformed_http"),
    "with a plus": (("Content-Length: +2",), b"{}", 400, "malformed_http"),
    "a decimal point": (("Content-Length: 2.0",), b"{}", 400, "malformed_http"),
    "with an underscore": (("Content-Length: 0_2",), b"{}", 400, "malformed_http"),
    "superscript digits": (("Content-Length: \xb2",), b"{}", 400, "malformed_http"),
    "empty": (("Content-Length:",), b"{}", 400, "malformed_http"),
    "a list": (("Content-Length: 2, 2",), b"{}", 400, "malformed_http"),
    "twice the same": (("Content-Length: 2",) * 2, b"{}", 400, "malformed_http"),
    "twice different": (("Content-Length: 2", "Content-Length: 3"), b"{}", 400, "malformed_http"),
    "30 digits": (("Content-Length: " + "9" * 30,), b"{}", 400, "malformed_http"),
    "with transfer-encoding": (("Content-Length: 7", "Transfer-Encoding: chunked"),
                               b"0\r\n\r\n{}", 400, "malformed_http"),
    "with transfer-encoding first": (("Transfer-Encoding: chunked", "Content-Length: 7"),
                                     b"0\r\n\r\n{}", 400, "malformed_http"),
    "transfer-encoding twice": (("Transfer-Encoding: chunked",) * 2, b"0\r\n\r\n", 400,
                                "malformed_http"),
    "transfer-encoding gzip": (("Transfer-Encoding: gzip, chunked",), b"0\r\n\r\n", 400,
                               "malformed_http"),
    "transfer-encoding identity": (("Transfer-Encoding: identity",), b"{}", 400,
                                   "malformed_http"),
    "transfer-encoding unknown": (("Transfer-Encoding: xchunked",), b"{}", 400,
                                  "malformed_http"),
    "transfer-encoding empty": (("Transfer-Encoding:",), b"0\r\n\r\n", 400, "malformed_http"),
    "a vertical tab in it": (("Transfer-Encoding: \x0bchunked",), b"0\r\n\r\n", 400, None),
    "too large": ((f"Content-Length: {MEGABYTE + 1}",), b"", 413, "request_too_large"),
    "much too large": (("Content-Length: " + "9" * 18,), b"", 413, "request_too_large"),
    "chunk size not hexadecimal": (("Transfer-Encoding: chunked",), b"x\r\n", 400,
                                   "malformed_http"),
    "chunk size negative": (("Transfer-Encoding: chunked",), b"-1\r\n", 400, "malformed_http"),
    "chunk size with 0x": (("Transfer-Encoding: chunked",), b"0x2\r\n{}\r\n", 400,
                           "malformed_http"),
    "chunk size with a plus": (("Transfer-Encoding: chunked",), b"+2\r\n{}\r\n", 400,
                               "malformed_http"),
    "chunk size empty": (("Transfer-Encoding: chunked",), b"\r\n{}\r\n", 400, "malformed_http"),
    "chunk size of 16 digits": (("Transfer-Encoding: chunked",), b"f" * 16 + b"\r\n", 400,
                                "malformed_http"),
    "chunk longer than its size": (("Transfer-Encoding: chunked",), b"2\r\n{} \r\n", 400,
                                   "malformed_http"),
    "chunk ended by LF": (("Transfer-Encoding: chunked",), b"2\n{}\n0\n\n", 400,
                          "malformed_http"),
    "chunk of 2 MB": (("Transfer-Encoding: chunked",),
                      b"200000\r\n" + b" " * (2 * MEGABYTE), 413, "request_too_large"),
    "chunks of 2 MB in all": (("Transfer-Encoding: chunked",),
                              (b"4000\r\n" + b" " * 0x4000 + b"\r\n") * 128, 413,
                              "request_too_large"),
    "chunk extension of 5 kB": (("Transfer-Encoding: chunked",), b"2;" + b"a" * 5000, 400,
                                "malformed_http"),
    "br": (("Content-Encoding: br", "Content-Length: 2"), b"{}", 415, "unsupported_media_type"),
    "zstd": (("Content-Encoding: zstd", "Content-Length: 2"), b"{}", 415,
             "unsupported_media_type"),
    "gzip twice": (("Content-Encoding: gzip, gzip", "Content-Length: 2"), b"{}", 415,
                   "unsupported_media_type"),
    "gzip bomb": (("Content-Encoding: gzip", "Content-Length: %d" % len(
        gzip.compress(b" " * (50 * MEGABYTE)))), gzip.compress(b" " * (50 * MEGABYTE)), 413,
        "request_too_large"),
    "deflate bomb": (("Content-Encoding: deflate", "Content-Length: %d" % len(
        zlib.compress(b" " * (50 * MEGABYTE)))), zlib.compress(b" " * (50 * MEGABYTE)), 413,
        "request_too_large"),
}
ANTHROPIC_TYPES = {413: "request_too_large"}


@pytest.mark.parametrize("path", GOOD)
@pytest.mark.parametrize("name", FRAMINGS)
def test_a_body_that_cannot_be_delimited_is_refused_and_the_connection_closed(
        mock, proxy_for, name, path):
    headers, body, status, code = FRAMINGS[name]
    proxy = proxy_for("--budget", "10.00", "--max-body-mb", "1")
    with RawClient(proxy.port) as client:
        client.send(posted(path, *headers, body=body))
        answer = client.read_answer()

        assert (status, "close") == (answer.status, answer.header("connection"))
        if code is None:                           # the head itself is malformed
            assert MALFORMED == refusal(answer, CHAT_PATH)
        else:
            assert refusal(answer, path) == expected_in(
                path, "invalid_request_error", code,
                ANTHROPIC_TYPES.get(status, "invalid_request_error"))
        assert client.is_closed_by_server()
    assert_untouched(mock, proxy)


BROKEN_COMPRESSION = {
    "not gzip": ("gzip", lambda body: body),
    "gzip with a wrong checksum": ("gzip", lambda body: gzip.compress(body)[:-8] + b"\0" * 8),
    "gzip cut short": ("gzip", lambda body: gzip.compress(body)[:-5]),
    "gzip with more behind it": ("gzip", lambda body: gzip.compress(body) + b"x"),
    "two gzip members": ("gzip", lambda body: gzip.compress(body[:9]) + gzip.compress(body[9:])),
    "not deflate": ("deflate", lambda body: b"\xff" + body),
    "deflate cut short": ("deflate", lambda body: zlib.compress(body)[:-3]),
}


@pytest.mark.parametrize("path", GOOD)
@pytest.mark.parametrize("name", BROKEN_COMPRESSION)
def test_a_broken_compressed_body_is_refused_and_the_connection_goes_on(mock, proxy, name, path):
    encoding, compress = BROKEN_COMPRESSION[name]
    with RawClient(proxy.port) as client:
        client.request("POST", path, compress(body_of(path)), [("content-encoding", encoding)])
        answer = client.read_answer()

        assert 400 == answer.status
        assert expected_in(path, *INVALID) == refusal(answer, path)
        assert_untouched(mock, proxy)
        assert_still_usable(client, path)


def one_byte_chunks(path):
    return chunked(path, *(bytes([byte]) for byte in body_of(path)))


UNUSUAL_BODIES = {
    "chunked": lambda path: chunked(path, body_of(path)),
    "chunked in capitals": lambda path: chunked(path, body_of(path)).replace(
        b": chunked", b": CHUNKED"),
    "chunks of one byte": one_byte_chunks,
    "chunk extension": lambda path: posted(path, "Transfer-Encoding: chunked", body=(
        b"%X ;name=\"value\";x\r\n%b\r\n000;last\r\n\r\n" % (len(body_of(path)), body_of(path)))),
    "trailer fields": lambda path: chunked(path, body_of(path))[:-2]
    + b"Authorization: Bearer x\r\nContent-Length: 3\r\n\r\n",
    "gzip": lambda path: sized(path, "Content-Encoding: gzip", body=gzip.compress(body_of(path))),
    "x-gzip in capitals": lambda path: sized(path, "Content-Encoding: X-GZIP",
                                             body=gzip.compress(body_of(path))),
    "deflate": lambda path: sized(path, "Content-Encoding: deflate",
                                  body=zlib.compress(body_of(path))),
    "gzip in chunks": lambda path: chunked(path, *(
        bytes([byte]) for byte in gzip.compress(body_of(path))),
        headers=("Content-Encoding: gzip",)),
    "identity": lambda path: sized(path, "Content-Encoding: identity", body=body_of(path)),
    "leading zeros": lambda path: posted(path, f"Content-Length: 000{len(body_of(path))}",
                                         body=body_of(path)),
}


@pytest.mark.parametrize("path", GOOD)
@pytest.mark.parametrize("name", UNUSUAL_BODIES)
def test_an_unusual_but_clear_body_reaches_the_provider_plain_with_its_length(
        mock, proxy, name, path):
    with RawClient(proxy.port) as client:
        client.send(UNUSUAL_BODIES[name](path))
        answer = client.read_answer()
        assert_still_usable(client, path)

    assert 200 == answer.status
    seen = mock.seen[0]
    assert body_of(path) == seen.body
    assert (str(len(seen.body)), None, None) == tuple(map(seen.header, (
        "content-length", "transfer-encoding", "content-encoding")))
    assert mock.billed_microdollars == settled_status(proxy)["spent_microdollars"]


@pytest.mark.parametrize("path", GOOD)
def test_bytes_behind_a_body_are_read_as_the_next_request_and_refused(mock, proxy, path):
    with RawClient(proxy.port) as client:
        client.send(sized(path, body=body_of(path)) + b"}smuggled\r\n\r\n")
        first, second = client.read_answer(), client.read_answer()

        assert (200, 400) == (first.status, second.status)
        assert MALFORMED == refusal(second, CHAT_PATH)
        assert client.is_closed_by_server()
    assert 1 == len(mock.seen)


# Expect: 100-continue.

@pytest.mark.parametrize("path", GOOD)
def test_100_continue_is_said_before_the_body_is_read(mock, proxy, path):
    body = body_of(path)
    with RawClient(proxy.port) as client:
        client.send(posted(path, f"Content-Length: {len(body)}", "Expect: 100-Continue"))
        interim = client.read_head()
        client.send(body)

        assert (100, ()) == interim
        assert 200 == client.read_answer().status
    assert mock.seen[0].header("expect") is None


EXPECTATIONS = {
    "wrong token": (("x-a: 1", "Content-Length: 2"), "wrong-token", 401),
    "too large": ((f"Content-Length: {MEGABYTE + 1}",), TOKEN, 413),
    "compressed with br": (("Content-Length: 2", "Content-Encoding: br"), TOKEN, 415),
    "no length": ((), TOKEN, 411),
    "two lengths": (("Content-Length: 2", "Content-Length: 2"), TOKEN, 400),
    "an upgrade": (("Content-Length: 2", "Upgrade: websocket"), TOKEN, 426),
}


@pytest.mark.parametrize("path", GOOD)
@pytest.mark.parametrize("headers, token, status", EXPECTATIONS.values(), ids=EXPECTATIONS)
def test_no_continue_is_said_to_what_is_refused(mock, proxy_for, path, headers, token, status):
    proxy = proxy_for("--budget", "10.00", "--max-body-mb", "1")
    with RawClient(proxy.port) as client:
        client.send(posted(path, *headers, "Expect: 100-continue").replace(
            TOKEN.encode(), token.encode()))

        assert status == client.read_head()[0]
    assert_untouched(mock, proxy)


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_no_body_is_asked_of_a_client_without_a_token(proxy, method):
    with RawClient(proxy.port) as client:
        client.send(f"{method} / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 30000000\r\n"
                    "Expect: 100-continue\r\n\r\n".encode())

        assert 100 != client.read_head()[0]


# Versions, upgrades, overrides, pipelines.

@pytest.mark.parametrize("headers", [(), ("Connection: keep-alive",)], ids=["plain", "keep-alive"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", GOOD)
def test_http_1_0_is_served_and_its_connection_closed(mock, proxy, path, stream, headers):
    body = json.dumps({**GOOD[path], "stream": stream}).encode()
    with RawClient(proxy.port) as client:
        client.send(raw(f"POST {path} HTTP/1.0", f"Content-Length: {len(body)}", *headers,
                        body=body, host=None))
        answer = client.read_answer()

        assert (200, None) == (answer.status, answer.header("transfer-encoding"))
        assert "close" == answer.header("connection")
        assert client.is_closed_by_server()
    assert (b"stop" in answer.body or b"end_turn" in answer.body) or stream
    assert mock.billed_microdollars == settled_status(proxy)["spent_microdollars"] > 0


@pytest.mark.parametrize("method, path", [("GET", "/v1/responses"), ("POST", CHAT_PATH),
                                          ("POST", MESSAGES_PATH), ("GET", "/ironcage/status")])
@pytest.mark.parametrize("protocol", ["websocket", "h2c", "HTTP/3.0, websocket"])
def test_an_upgrade_is_refused(mock, proxy, method, path, protocol):
    with RawClient(proxy.port) as client:
        client.send(raw(f"{method} {path} HTTP/1.1", f"Upgrade: {protocol}",
                        "Connection: Upgrade", "Content-Length: 0"))
        answer = client.read_answer()

        assert 426 == answer.status
        assert expected_in(path, "invalid_request_error", "upgrade_refused") \
            == refusal(answer, path)
        assert client.is_closed_by_server()
    assert_untouched(mock, proxy)


OVERRIDES = {
    "X-HTTP-Method-Override": ("", [("X-HTTP-Method-Override", "DELETE")]),
    "X-HTTP-Method": ("", [("X-HTTP-Method", "DELETE")]),
    "X-Method-Override": ("", [("x-method-override", "DELETE")]),
    "empty": ("", [("X-HTTP-Method-Override", "")]),
    "_method": ("?_method=DELETE", []),
    "_method behind another": ("?a=b&_method=DELETE", []),
    "_method encoded": ("?%5Fmethod=DELETE", []),
}


@pytest.mark.parametrize("name", OVERRIDES)
@pytest.mark.parametrize("method, path", [("POST", CHAT_PATH), ("POST", MESSAGES_PATH),
                                          ("GET", "/v1/models")])
def test_a_method_override_is_refused_under_a_budget(mock, proxy, method, path, name):
    query, headers = OVERRIDES[name]
    with RawClient(proxy.port) as client:
        client.request(method, path + query, body_of(path) if method == "POST" else None, headers)
        answer = client.read_answer()

        assert 400 == answer.status
        assert expected_in(path, "iron_cage_unmetered_route", "unmetered_route") \
            == refusal(answer, path)
        assert_untouched(mock, proxy)
        assert_still_usable(client)


def test_pipelined_requests_are_answered_in_order(mock, proxy):
    streamed = json.dumps({**CHAT, "stream": True}).encode()
    with RawClient(proxy.port) as client:
        client.send(raw("GET / HTTP/1.1") + sized(CHAT_PATH, body=streamed)
                    + sized(MESSAGES_PATH, body=b"{") + sized(MESSAGES_PATH,
                                                              body=body_of(MESSAGES_PATH))
                    + chunked(CHAT_PATH, CHAT_BODY) + raw("GET /ironcage/nothing HTTP/1.1")
                    + raw("GET /ironcage/budget HTTP/1.1"))
        answers = [client.read_answer() for _ in range(7)]

    assert [200, 200, 400, 200, 200, 404, 200] == [answer.status for answer in answers]
    assert b"LlmRouter OK" == answers[0].body
    assert answers[1].body.endswith(b"data: [DONE]\n\n")
    assert "message" == answers[3].json["type"]
    assert "chat.completion" == answers[4].json["object"]
    assert mock.billed_microdollars == answers[6].json["spent_microdollars"]


def test_nothing_behind_a_refusal_that_closes_is_served(mock, proxy):
    with RawClient(proxy.port) as client:
        client.send(head_case("X-A : 1") + sized(CHAT_PATH, body=CHAT_BODY))
        answer = client.read_answer()

        assert 400 == answer.status
        assert client.is_closed_by_server()
    assert_untouched(mock, proxy)


# Clients that are slow, silent or gone.

def test_a_client_that_says_nothing_is_left_quietly(mock, proxy_for):
    proxy = proxy_for("--budget", "1", timeouts={"head_s": 0.2})
    with RawClient(proxy.port) as client:
        assert client.is_closed_by_server()
    assert_untouched(mock, proxy)


def test_a_client_that_says_nothing_more_is_left_quietly(mock, proxy_for):
    proxy = proxy_for("--budget", "1", timeouts={"keep_alive_s": 0.2})
    with RawClient(proxy.port) as client:
        client.request("GET", "/")

        assert 200 == client.read_answer().status
        assert client.is_closed_by_server()
    assert_untouched(mock, proxy)


@pytest.mark.parametrize("is_first", [True, False], ids=["first request", "second request"])
@pytest.mark.parametrize("half", [b"P", LINE.encode(), LINE.encode() + b"\r\nHost: 127.0.0.1\r\n"],
                         ids=["one byte", "a line", "half a head"])
def test_half_a_head_is_timed_out(mock, proxy_for, half, is_first):
    proxy = proxy_for("--budget", "1", timeouts={"head_s": 0.2})
    with RawClient(proxy.port) as client:
        if not is_first:
            client.request("GET", "/")
            client.read_answer()
        client.send(half)
        answer = client.read_answer()

        assert 408 == answer.status
        assert ("invalid_request_error", "request_timeout") == refusal(answer, CHAT_PATH)
        assert client.is_closed_by_server()
    assert_untouched(mock, proxy)


@pytest.mark.parametrize("path", GOOD)
@pytest.mark.parametrize("framing", [("Content-Length: 50",), ("Transfer-Encoding: chunked",)],
                         ids=["length", "chunked"])
@pytest.mark.parametrize("half", [b"", b"5\r\n{\"a\""], ids=["no body", "half a body"])
def test_half_a_body_is_timed_out(mock, proxy_for, path, framing, half):
    proxy = proxy_for("--budget", "1", timeouts={"body_s": 0.2})
    with RawClient(proxy.port) as client:
        client.send(posted(path, *framing, body=half))
        answer = client.read_answer()

        assert 408 == answer.status
        assert expected_in(path, "invalid_request_error", "request_timeout") \
            == refusal(answer, path)
        assert client.is_closed_by_server()
    assert_untouched(mock, proxy)


def drip(client, byte):
    """Send a byte at a time, until the server says something."""
    for _ in range(PATIENCE_S * 50):
        if select.select([client.sock], [], [], 0.02)[0]:
            return
        client.send(byte)
    raise AssertionError("a client that drips is served for ever")


@pytest.mark.parametrize("start, byte", [
    (LINE.encode() + b"\r\nX-A: ", b"a"),
    (posted(CHAT_PATH, "Content-Length: 100000"), b" "),
    (posted(CHAT_PATH, "Transfer-Encoding: chunked") + b"ffff\r\n", b" "),
    (posted(CHAT_PATH, "Transfer-Encoding: chunked") + b"0\r\n", b"X: y\r\n"),
    (posted(CHAT_PATH, "Transfer-Encoding: chunked") + b"1;", b"e")],
    ids=["head", "body", "chunk", "trailers", "chunk extension"])
def test_a_client_that_drips_has_one_time_limit_in_all(mock, proxy_for, start, byte):
    proxy = proxy_for("--budget", "1", timeouts={"head_s": 0.3, "body_s": 0.3})
    with RawClient(proxy.port) as client:
        client.send(start)
        drip(client, byte)

        assert 408 == client.read_answer().status
        assert client.is_closed_by_server()
    assert_untouched(mock, proxy)


def leave_with_a_reset(client):
    client.leave()


def leave_in_order(client):
    client.close()


PARTS = {
    "before a byte": lambda path: b"",
    "inside the head": lambda path: posted(path)[:40],
    "before the body": lambda path: posted(path, "Content-Length: 500"),
    "inside the body": lambda path: posted(path, "Content-Length: 500", body=body_of(path)),
    "inside a chunk": lambda path: posted(path, "Transfer-Encoding: chunked", body=b"ff\r\n{"),
    "before the last chunk": lambda path: chunked(path, body_of(path))[:-5],
}
LEAVINGS = {"reset": leave_with_a_reset, "closed": leave_in_order}


@pytest.mark.parametrize("path", GOOD)
@pytest.mark.parametrize("leave", LEAVINGS.values(), ids=LEAVINGS)
@pytest.mark.parametrize("part", PARTS)
def test_a_request_whose_client_left_inside_it_goes_nowhere(mock, proxy, part, leave, path):
    client = RawClient(proxy.port)
    client.send(PARTS[part](path))
    leave(client)

    assert_untouched(mock, proxy)
    proxy.stop()                              # ends once each connection's thread has
    assert [] == mock.seen
    assert (0, 0) == proxy.router.controller.get_full_status()[:2]


@pytest.mark.parametrize("path", GOOD)
@pytest.mark.parametrize("leave", LEAVINGS.values(), ids=LEAVINGS)
def test_a_client_that_leaves_behind_its_request_costs_what_the_provider_bills(
        mock, proxy, leave, path):
    client = RawClient(proxy.port)
    client.send(sized(path, body=body_of(path)))
    leave(client)

    assert 200 == call(proxy.port, "GET", "/ironcage/status").status
    proxy.stop()
    assert (mock.billed_microdollars, 0) == proxy.router.controller.get_full_status()[:2]


@pytest.mark.parametrize("path", GOOD)
@pytest.mark.parametrize("leave", LEAVINGS.values(), ids=LEAVINGS)
def test_a_client_that_leaves_before_its_whole_answer_costs_what_the_provider_bills(
        mock, proxy, leave, path):
    gate = Gate()
    mock.script(lambda request: mock.default_reply(request).with_steps(
        [gate, *mock.default_reply(request).steps]))
    client = RawClient(proxy.port)
    client.send(sized(path, body=body_of(path)))
    mock.wait_for_requests(1)
    leave(client)
    gate.event.set()

    assert mock.billed_microdollars == settled_status(proxy)["spent_microdollars"] > 0


@pytest.mark.parametrize("path", GOOD)
@pytest.mark.parametrize("leave", LEAVINGS.values(), ids=LEAVINGS)
def test_a_client_that_leaves_in_mid_stream_ends_the_call_and_pays_at_least_its_bill(
        mock, proxy, leave, path):
    gate = Gate()
    mock.script(lambda request: mock.default_reply(request).with_steps(
        [*mock.default_reply(request).steps[:4], gate, *mock.default_reply(request).steps[4:]]))
    client = RawClient(proxy.port)
    client.send(sized(path, body=json.dumps({**GOOD[path], "stream": True}).encode()))
    assert 200 == client.read_head()[0]
    client.read_chunk()
    leave(client)
    mock.wait_for_hang_ups()

    assert settled_status(proxy)["spent_microdollars"] >= mock.billed_microdollars > 0
    assert 200 == call(proxy.port, "POST", path, GOOD[path]).status


FLOODS = {
    CHAT_PATH: sse({"choices": [{"delta": {"content": "x" * 60_000}}]}),
    MESSAGES_PATH: sse({"type": "content_block_delta", "index": 0,
                        "delta": {"type": "text_delta", "text": "x" * 60_000}},
                       "content_block_delta"),
}


@pytest.mark.parametrize("path", GOOD)
def test_a_client_that_does_not_read_its_stream_is_as_good_as_gone(mock, proxy_for, path):
    proxy = proxy_for("--budget", "1", timeouts={"write_stall_s": 0.2})
    mock.script(Reply(headers=(("content-type", "text/event-stream"),), framing="chunked",
                      steps=(FLOODS[path],) * 1000))
    with RawClient(proxy.port) as client:
        client.request("POST", path, json.dumps({**GOOD[path], "stream": True}).encode())
        mock.wait_for_hang_ups()

        assert settled_status(proxy)["spent_microdollars"] > 0
        assert 200 == call(proxy.port, "POST", path, GOOD[path]).status


def test_a_client_that_never_reads_a_whole_answer_is_as_good_as_gone(mock, proxy_for):
    proxy = proxy_for("--budget", "1", "--admin-token", ADMIN_TOKEN,
                      timeouts={"write_stall_s": 0.2})
    mock.script(Reply(steps=(b'{"usage": {"prompt_tokens": 1, "completion_tokens": 1}, "x": "'
                             + b"x" * 30_000_000 + b'"}',)))
    with RawClient(proxy.port) as client:
        client.request("POST", CHAT_PATH, CHAT_BODY)
        mock.wait_for_requests(1)

        assert 1 == settled_status(proxy)["spent_microdollars"]
        proxy.stop()
        assert 0 == proxy.router.controller.total_reserved()
