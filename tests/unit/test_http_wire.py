"""HTTP on a socket: a message head or body is read in one way only, or refused; a body cut anywhere is
the same body; each read and write on a socket ends, in bytes, in a time-out or in a hang-up."""
from __future__ import annotations

import contextlib
import socket
import threading
import time
from random import Random
from typing import Iterator, Optional

import pytest

import ironcage_proxy as ic
from support import each_seed

SHORT_S = 0.05          # a time-out that is meant to happen
LONG_S = 10             # one that is not


def head(line: str = "GET /v1/models HTTP/1.1", *headers: str) -> bytes:
    return "\r\n".join([line, *(headers or ("Host: a",))]).encode("latin-1")


def target(text: str) -> bytes:
    return head(f"GET {text} HTTP/1.1")


# Request heads.

def test_a_request_head_is_read():
    parsed = ic.parse_request_head(head(
        "POST /v1/messages?beta=true HTTP/1.1", "Host: localhost:8787", "X-API-Key:k",
        "Accept: \t a, b \t ", "x-empty:", "X-Utf: gr\xfc\xdfe", "Accept: c"))

    assert ("POST", "/v1/messages", "beta=true", 1) == (
        parsed.method, parsed.path, parsed.query, parsed.minor_version)
    assert (("host", "localhost:8787"), ("x-api-key", "k"), ("accept", "a, b"), ("x-empty", ""),
            ("x-utf", "gr\xfc\xdfe"), ("accept", "c")) == parsed.headers
    assert ("a, b, c", "", None) == tuple(map(parsed.headers.get, ("accept", "x-empty", "x-none")))


@pytest.mark.parametrize("text, path, query", [
    ("/", "/", None), ("/?", "/", ""), ("/a?b?c=/../d", "/a", "b?c=/../d"),
    ("//evil.example/v1", "//evil.example/v1", None), ("/@evil.example", "/@evil.example", None),
    ("/a:80@b/c", "/a:80@b/c", None), ("/http://evil.example/", "/http://evil.example/", None),
    ("/...", "/...", None), ("/..a/.b/c.", "/..a/.b/c.", None), ("/%2e%2ea", "/%2e%2ea", None),
    ("/a%2fb%00%ff", "/a%2fb%00%ff", None), ("/%252e%252e/", "/%252e%252e/", None),
    ("/a//b/", "/a//b/", None), ("/!$&'()*+,;=~[]{}|^`\"<>", "/!$&'()*+,;=~[]{}|^`\"<>", None),
    ("/a?../..", "/a", "../.."), ("/?a=@b:c", "/", "a=@b:c"),
])
def test_a_target_is_a_path_and_a_query_as_they_were_sent(text, path, query):
    parsed = ic.parse_request_head(target(text))

    assert (path, query) == (parsed.path, parsed.query)


BAD_TARGETS = {
    "absolute": "http://evil.example/", "absolute https": "https://evil.example/v1/models",
    "other scheme": "file:///etc/passwd", "authority": "evil.example:443", "asterisk": "*",
    "empty query only": "?a=b", "no slash": "v1/models", "at sign first": "@evil.example/",
    "fragment": "/a#b", "fragment in query": "/a?b#c", "fragment alone": "/#",
    "backslash": "/a\\b", "backslash first": "\\\\evil.example\\",
    "non-ASCII": "/caf\xe9", "non-ASCII query": "/a?b=\xe9", "no-break space": "/a\xa0b",
    "next line": "/a\x85b", "NUL": "/a\x00b", "DEL": "/a\x7fb", "escape": "/a\x1bb",
    "tab": "/a\tb", "vertical tab": "/a\x0bb", "space": "/a b", "control in query": "/a?b\x01",
    "dot": "/.", "dot dot": "/..", "dot segment": "/a/./b", "dot dot segment": "/a/../b",
    "dot dot at the end": "/a/..", "encoded dots": "/a/%2e%2E/b", "half-encoded dots": "/a/.%2e/b",
    "encoded dot": "/a/%2E/b", "encoded slash and dots": "/a/..%2fb", "all encoded": "/a%2f%2e%2e",
}


@pytest.mark.parametrize("text", BAD_TARGETS.values(), ids=BAD_TARGETS)
def test_a_target_that_could_lead_elsewhere_is_refused(text):
    with pytest.raises(ic.MalformedHttp) as caught:
        ic.parse_request_head(target(text))

    assert (400, True) == (caught.value.status, caught.value.must_close)


BAD_HEADS = {
    "nothing": b"",
    "HTTP/0.9": head("GET /"),
    "HTTP/0.9 by name": head("GET / HTTP/0.9"),
    "HTTP/2.0": head("GET / HTTP/2.0"),
    "HTTP/1.2": head("GET / HTTP/1.2"),
    "HTTP/1": head("GET / HTTP/1"),
    "HTTP/11": head("GET / HTTP/11"),
    "HTTP/1.10": head("GET / HTTP/1.10"),
    "http in small letters": head("GET / http/1.1"),
    "another protocol": head("GET / ICY/1.1"),
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "HTTP/2 preface": b"PRI * HTTP/2.0",
    "no method": head(" / HTTP/1.1"),
    "method with a bracket": head("GE(T / HTTP/1.1"),
    "method with a control": head("GE\x01T / HTTP/1.1"),
    "method beyond ASCII": head("G\xc9T / HTTP/1.1"),
    "method of 33 letters": head("G" * 33 + " / HTTP/1.1"),
    "two spaces": head("GET  / HTTP/1.1"),
    "two spaces behind": head("GET /  HTTP/1.1"),
    "a tab": head("GET\t/ HTTP/1.1"),
    "a space at the end": head("GET / HTTP/1.1 "),
    "a space at the start": head(" GET / HTTP/1.1"),
    "an empty line first": b"\r\n" + head(),
    "bare CR in the line": head("GET /\r HTTP/1.1"),
    "bare CR in a value": head("GET / HTTP/1.1", "Host: a", "X: a\rb"),
    "bare CR at a line's end": head("GET / HTTP/1.1", "Host: a", "X: a\r"),
    "bare CR as line end": b"GET / HTTP/1.1\rHost: a",
    "bare LF as line end": b"GET / HTTP/1.1\nHost: a",
    "bare LF between headers": b"GET / HTTP/1.1\r\nHost: a\nX: b",
    "CR CR LF": b"GET / HTTP/1.1\r\r\nHost: a",
    "NUL in a value": head("GET / HTTP/1.1", "Host: a", "X: a\0b"),
    "control in a value": head("GET / HTTP/1.1", "Host: a", "X: a\x0bb"),
    "DEL in a value": head("GET / HTTP/1.1", "Host: a", "X: a\x7fb"),
    "folded with a space": head("GET / HTTP/1.1", "Host: a", "X: a", " b"),
    "folded with a tab": head("GET / HTTP/1.1", "Host: a", "X: a", "\tb"),
    "folded first": head("GET / HTTP/1.1", " X: a", "Host: a"),
    "space before the colon": head("GET / HTTP/1.1", "Host : a"),
    "tab before the colon": head("GET / HTTP/1.1", "Host\t: a"),
    "space in a name": head("GET / HTTP/1.1", "Host: a", "X Y: b"),
    "no colon": head("GET / HTTP/1.1", "Host: a", "X"),
    "no name": head("GET / HTTP/1.1", "Host: a", ": b"),
    "name beyond ASCII": head("GET / HTTP/1.1", "Host: a", "X\xe9: b"),
    "name with a NUL": head("GET / HTTP/1.1", "Host: a", "X\0: b"),
    "name with a bracket": head("GET / HTTP/1.1", "Host: a", "X(: b"),
    "an empty line inside": b"GET / HTTP/1.1\r\nHost: a\r\n\r\nX: b",
    "no Host": head("GET / HTTP/1.1", "X: a"),
    "two Hosts": head("GET / HTTP/1.1", "Host: a", "Host: b"),
    "two equal Hosts": head("GET / HTTP/1.1", "Host: a", "X: b", "host: a"),
    "two Hosts of HTTP/1.0": head("GET / HTTP/1.0", "Host: a", "Host: b"),
    "101 headers": head("GET / HTTP/1.1", "Host: a", *["X: b"] * 100),
}


@pytest.mark.parametrize("raw", BAD_HEADS.values(), ids=BAD_HEADS)
def test_a_head_that_is_not_one_clear_request_is_refused(raw):
    with pytest.raises(ic.MalformedHttp) as caught:
        ic.parse_request_head(raw)

    assert (400, True) == (caught.value.status, caught.value.must_close)


GOOD_HEADS = {
    "100 headers": head("GET / HTTP/1.1", "Host: a", *["X: b"] * 99),
    "HTTP/1.0 without Host": head("GET / HTTP/1.0", "X: a"),
    "HTTP/1.0 without headers": b"GET / HTTP/1.0",
    "a strange method": head("M-SEARCH! / HTTP/1.1"),
    "an empty value": head("GET / HTTP/1.1", "Host: a", "X:"),
    "an empty Host": head("GET / HTTP/1.1", "Host:"),
    "a tab in a value": head("GET / HTTP/1.1", "Host: a", "X: a\tb"),
    "a value beyond ASCII": head("GET / HTTP/1.1", "Host: a", "X: \xe9\xff"),
    "a colon in a value": head("GET / HTTP/1.1", "Host: a", "X: a: b"),
    "a name of all signs": head("GET / HTTP/1.1", "Host: a", "!#$%&'*+-.^_`|~: b"),
}


@pytest.mark.parametrize("raw", GOOD_HEADS.values(), ids=GOOD_HEADS)
def test_a_head_that_is_unusual_but_clear_is_taken(raw):
    assert ic.parse_request_head(raw).path == "/"


@pytest.mark.parametrize("version, connection, expected", [
    ("1.1", None, True), ("1.1", "keep-alive", True), ("1.1", "close", False),
    ("1.1", "Close", False), ("1.1", "upgrade, close", False), ("1.1", "x ,CLOSE", False),
    ("1.1", "closed", True), ("1.0", None, False), ("1.0", "keep-alive", False),
])
def test_a_connection_is_kept_where_the_client_can_tell(version, connection, expected):
    headers = ["Host: a"] + ([] if connection is None else [f"Connection: {connection}"])

    assert expected is ic.parse_request_head(head(f"GET / HTTP/{version}", *headers)).keeps_alive


def test_two_connection_headers_are_one_list():
    parsed = ic.parse_request_head(head("GET / HTTP/1.1", "Host: a", "Connection: keep-alive",
                                        "Connection: close"))

    assert not parsed.keeps_alive


@each_seed(100)
def test_random_bytes_are_taken_or_refused_and_never_crash(seed):
    rng = Random(seed)
    for _ in range(50):
        raw = bytearray(GOOD_HEADS["a colon in a value"])
        for _ in range(rng.randrange(1, 4)):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
        with contextlib.suppress(ic.MalformedHttp):
            parsed = ic.parse_request_head(bytes(raw))

            assert parsed.path.startswith("/") and parsed.path.isascii()
            assert not set("\r\n\0") & set("".join(map("".join, parsed.headers)))


def test_a_head_is_written_as_it_is_read():
    written = ic.format_head("GET / HTTP/1.1", [("host", "a"), ("x", "gr\xfc\xdfe")])

    assert b"GET / HTTP/1.1\r\nhost: a\r\nx: gr\xfc\xdfe\r\n\r\n" == written
    assert (("host", "a"), ("x", "gr\xfc\xdfe")) == ic.parse_request_head(written[:-4]).headers


# Body lengths.

def lines_of(headers: list[str]) -> str:
    return "".join(f"{header}\r\n" for header in headers)


@pytest.mark.parametrize("headers, expected", [
    ([], 77), (["content-length: 0"], 0), (["content-length: 5"], 5), (["Content-Length:5"], 5),
    (["content-length: 0005"], 5), (["content-length: " + "9" * 18], 10 ** 18 - 1),
    (["transfer-encoding: chunked"], ic.CHUNKED), (["Transfer-Encoding: Chunked"], ic.CHUNKED),
    (["x-content-length: 5"], 77),
])
def test_a_head_says_how_long_its_body_is(headers, expected):
    assert expected == ic.body_length(ic.parse_headers(lines_of(headers)), otherwise=77)


BAD_LENGTHS = {
    "length and coding": ["content-length: 5", "transfer-encoding: chunked"],
    "coding and length": ["transfer-encoding: chunked", "content-length: 5"],
    "two lengths": ["content-length: 5", "content-length: 6"],
    "two equal lengths": ["content-length: 5", "Content-Length: 5"],
    "two codings": ["transfer-encoding: chunked", "transfer-encoding: chunked"],
    "identity and chunked": ["transfer-encoding: identity", "transfer-encoding: chunked"],
    "a list of lengths": ["content-length: 5, 5"],
    "plus": ["content-length: +5"], "minus": ["content-length: -5"],
    "hexadecimal": ["content-length: 0x5"], "empty": ["content-length:"],
    "a space inside": ["content-length: 5 5"], "a point": ["content-length: 5.0"],
    "an exponent": ["content-length: 5e1"], "an underscore": ["content-length: 1_0"],
    "a word": ["content-length: five"], "a superscript": ["content-length: \xb2"],
    "19 digits": ["content-length: 1" + "0" * 18],
    "5,000 digits": ["content-length: " + "1" * 5000],
    "gzip": ["transfer-encoding: gzip"], "gzip, chunked": ["transfer-encoding: gzip, chunked"],
    "chunked, gzip": ["transfer-encoding: chunked, gzip"],
    "chunked twice": ["transfer-encoding: chunked, chunked"],
    "identity": ["transfer-encoding: identity"], "no coding": ["transfer-encoding:"],
    "xchunked": ["transfer-encoding: xchunked"], "chunked;q=1": ["transfer-encoding: chunked;q=1"],
    "quoted": ['transfer-encoding: "chunked"'], "a comma": ["transfer-encoding: chunked,"],
    "a control": ["transfer-encoding: \tchunked\t\xa0"],
}


@pytest.mark.parametrize("headers", BAD_LENGTHS.values(), ids=BAD_LENGTHS)
def test_a_body_length_that_two_parsers_can_read_differently_is_refused(headers):
    with pytest.raises(ic.MalformedHttp):
        ic.body_length(ic.parse_headers(lines_of(headers)), otherwise=0)


# Bodies.

def decoded(decoder: ic.BodyDecoder, reads: list[bytes]) -> tuple[bytes, bytes]:
    """(body, what came after it); reads beyond the end are not fed, as on a socket."""
    pieces, later = [], b""
    for read in reads:
        if decoder.is_done:
            later += read
        else:
            pieces += decoder.feed(read)
    assert all(pieces), "an empty piece"
    return b"".join(pieces), decoder.rest + later


CHUNKED_BODIES = {
    "plain": (b"5\r\nhello\r\n6\r\n world\r\n0\r\n\r\n", b"hello world"),
    "empty": (b"0\r\n\r\n", b""),
    "extensions": (b"5;a=b;c=\"d\"\r\nhello\r\n1 ;x\r\n!\r\n0;last\r\n\r\n", b"hello!"),
    "hexadecimal": (b"A\r\n0123456789\r\n0b\r\nabcdefghijk\r\n000\r\n\r\n",
                    b"0123456789abcdefghijk"),
    "line ends inside": (b"8\r\n\r\n0\r\n\r\n\r\r\n0\r\n\r\n", b"\r\n0\r\n\r\n\r"),
    "trailers": (b"1\r\nx\r\n0\r\nX-A: b\r\nX-C: d\r\n\r\n", b"x"),
    "spaces behind the size": (b"1 \t\r\nx\r\n0 \r\n\r\n", b"x"),
}


@pytest.mark.parametrize("raw, body", CHUNKED_BODIES.values(), ids=CHUNKED_BODIES)
@pytest.mark.parametrize("rest", [b"", b"GET / HTTP/1.1\r\n", b"\r\n0\r\n\r\n"])
def test_a_chunked_body_is_read_and_what_follows_is_kept(raw, body, rest):
    assert (body, rest) == decoded(ic.BodyDecoder(ic.CHUNKED), [raw + rest])


@pytest.mark.parametrize("raw, body", CHUNKED_BODIES.values(), ids=CHUNKED_BODIES)
def test_a_chunked_body_that_is_cut_is_not_whole(raw, body):
    for at in range(len(raw)):
        decoder = ic.BodyDecoder(ic.CHUNKED)
        decoder.feed(raw[:at])

        assert not decoder.end() and not decoder.is_done

    decoder.feed(raw[-1:])

    assert decoder.end() and decoder.is_done


def test_chunks_come_out_as_they_came_in():
    decoder = ic.BodyDecoder(ic.CHUNKED)

    pieces = decoder.feed(b"5\r\nhello\r\n6\r\n world\r\n3\r\nab")

    assert [b"hello", b" world", b"ab"] == pieces
    assert [b"c"] == decoder.feed(b"c")


BAD_CHUNKS = {
    "no size": b"\r\nhello\r\n", "a letter": b"g\r\n", "minus": b"-1\r\n",
    "plus": b"+5\r\nhello\r\n",
    "0x": b"0x5\r\nhello\r\n", "a space first": b" 5\r\nhello\r\n", "an underscore": b"1_0\r\n",
    "16 digits": b"0" * 15 + b"5\r\nhello\r\n", "2 ** 64": b"10000000000000005\r\nhello\r\n",
    "bare LF behind the size": b"5\nhello\r\n", "bare CR in the size": b"5\r5\r\n",
    "bare CR in an extension": b"5;a\rb\r\nhello\r\n",
    "bare LF behind a chunk": b"5\r\nhello\n0\r\n",
    "longer than its size": b"5\r\nhello!\r\n", "shorter than its size": b"5\r\nhell\r\n0\r\n\r\n",
    "two sizes": b"5 5\r\nhello\r\n", "a comma": b"5,5\r\nhello\r\n",
    "a NUL": b"5\x00\r\nhello\r\n",
    "a size in another script": "٥\r\nhello\r\n".encode(),
    "bare LF at the end": b"0\r\n\n", "bare LF behind the last size": b"0\n\r\n",
    "bare LF in the trailers": b"0\r\nX: a\n\r\n",
    "an endless size line": b"5;" + b"x" * 5_000,
    "a long size line": b"5;" + b"x" * 5_000 + b"\r\n",
    "an endless trailer": b"0\r\nX: " + b"x" * 5_000,
    "an endless line end": b"5\r\nhello" + b"x" * 5_000,
}


@pytest.mark.parametrize("raw", BAD_CHUNKS.values(), ids=BAD_CHUNKS)
def test_a_malformed_chunk_is_refused_in_one_read_or_in_many(raw):
    with pytest.raises(ic.MalformedHttp):
        ic.BodyDecoder(ic.CHUNKED).feed(raw)
    decoder = ic.BodyDecoder(ic.CHUNKED)
    with pytest.raises(ic.MalformedHttp):
        for at in range(len(raw)):
            decoder.feed(raw[at:at + 1])

    assert not decoder.is_done


@each_seed(100)
def test_chunks_that_are_written_read_back(seed):
    rng = Random(seed)
    pieces = [rng.choice([b"", b"\r\n", b"0\r\n\r\n", bytes(rng.choices(range(256), k=17)),
                          b"x" * rng.choice([1, 15, 16, 255, 256, 70_000])])
              for _ in range(rng.randrange(8))]
    written = ic.format_chunks(pieces) + ic.LAST_CHUNK
    cuts = sorted(rng.randrange(len(written) + 1) for _ in range(rng.randrange(6)))

    whole = ic.BodyDecoder(ic.CHUNKED).feed(written)
    body, rest = decoded(ic.BodyDecoder(ic.CHUNKED),
                         [written[a:b] for a, b in zip([0, *cuts], [*cuts, len(written)])])

    assert [piece for piece in pieces if piece] == whole
    assert (b"".join(pieces), b"") == (body, rest)


@each_seed(300)
def test_small_chunks_in_a_row_are_read_as_they_are_one_byte_at_a_time(seed):
    """Those are taken in one go; what is not quite a chunk of theirs may not pass among them."""
    def read(parts):
        decoder, pieces = ic.BodyDecoder(ic.CHUNKED), []
        try:
            for part in parts:
                pieces += decoder.feed(part) if not decoder.is_done else [part]
        except ic.MalformedHttp:
            return "malformed"
        return b"".join(pieces), decoder.is_done

    rng = Random(seed)
    raw = bytearray(b"".join(
        rng.choice([b"%x\r\n%b\r\n", b"%x;\r\n%b\r\n", b"0%x\r\n%b\r\n"]) % (len(data), data)
        for data in (bytes(rng.choices(b"\r\n1;x", k=rng.randint(1, 12))) for _ in range(40))))
    if seed % 3:
        raw[rng.randrange(len(raw))] = rng.choice(b"\r\n12;x")

    expected = read([raw[at:at + 1] for at in range(len(raw))])

    assert expected == read([bytes(raw)])
    assert (expected == "malformed") <= bool(seed % 3)


def test_an_empty_piece_is_not_written_for_it_would_end_the_body():
    assert b"1\r\nx\r\n" == ic.format_chunks([b"", b"x", b""])


@pytest.mark.parametrize("length", [0, 1, 5, 11])
@pytest.mark.parametrize("rest", [b"", b"GET / HTTP/1.1"])
def test_a_body_of_a_length_cut_anywhere_is_the_same_and_keeps_what_follows(length, rest):
    stream = b"hello world"[:length] + rest
    for at in range(len(stream) + 1):
        assert (stream[:length], rest) == decoded(
            ic.BodyDecoder(length), [stream[:at], stream[at:]])


@pytest.mark.parametrize("length", [1, 5, 11])
def test_a_body_of_a_length_is_whole_at_its_last_byte(length):
    decoder = ic.BodyDecoder(length)
    ends = []

    for _ in range(length):
        ends.append((decoder.end(), decoder.is_done))
        decoder.feed(b"x")

    assert [(False, False)] * length == ends
    assert (True, True) == (decoder.end(), decoder.is_done)


def test_a_body_until_the_close_takes_all_and_is_whole_when_it_ends():
    decoder = ic.BodyDecoder(ic.UNTIL_CLOSE)

    assert [[b"a"], [b"bc"]] == [decoder.feed(b"a"), decoder.feed(b"bc")]
    assert (False, True, b"") == (decoder.is_done, decoder.end(), decoder.rest)


# Sockets.

@pytest.fixture
def pair() -> Iterator[tuple[ic.Wire, socket.socket]]:
    """A wire and its peer."""
    ours, theirs = socket.socketpair()
    theirs.settimeout(LONG_S)
    with ours, theirs:
        yield ic.Wire(ours), theirs


@pytest.fixture
def watched() -> Iterator[tuple[ic.Wire, socket.socket]]:
    """A client's wire to watch while another is waited for, and the client."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ic.Wire(ours), theirs


@contextlib.contextmanager
def meanwhile(target: object, *args: object) -> Iterator[None]:
    thread = threading.Thread(target=target, args=args)
    thread.start()
    try:
        yield
    finally:
        thread.join(LONG_S)
        assert not thread.is_alive()


def read_all(sock: socket.socket, at_once: int) -> bytes:
    return b"".join(iter(lambda: sock.recv(at_once), b""))


def test_five_megabytes_reach_a_slow_reader_whole(pair):
    wire, peer = pair
    sent = bytes(Random(0).choices(range(256), k=5_000)) * 1_000
    got = []
    with meanwhile(lambda: got.append(read_all(peer, 3_000))):
        wire.send(sent, LONG_S)
        wire.close()

    assert sent == got[0]
    assert len(sent) == wire.sent_bytes


def test_writing_to_a_peer_that_never_reads_times_out(pair):
    wire, _ = pair

    with pytest.raises(TimeoutError):
        wire.send(b"x" * 5_000_000, SHORT_S)

    assert 0 < wire.sent_bytes < 5_000_000


def test_writing_to_a_peer_that_is_gone_fails(pair):
    wire, peer = pair
    peer.close()

    with pytest.raises(OSError):
        wire.send(b"x" * 5_000_000, LONG_S)


def test_reading_from_a_peer_that_says_nothing_times_out(pair):
    wire, _ = pair
    started_s = time.monotonic()

    with pytest.raises(TimeoutError):
        wire.receive(SHORT_S)

    assert time.monotonic() - started_s >= SHORT_S / 2


@pytest.mark.parametrize("timeout_s", [0, -1])
def test_what_is_there_can_be_read_without_time_and_nothing_else_can(pair, timeout_s):
    wire, peer = pair
    peer.send(b"here")

    assert b"here" == wire.receive(timeout_s)
    with pytest.raises(TimeoutError):
        wire.receive(timeout_s)


def test_the_end_of_a_connection_is_read_as_nothing(pair):
    wire, peer = pair
    peer.send(b"last")
    peer.close()

    assert [b"last", b"", b""] == [wire.receive(LONG_S) for _ in range(3)]


def test_bytes_that_were_read_too_far_come_first(pair):
    wire, peer = pair
    peer.send(b"second")
    wire.received = b"first"

    assert [b"first", b"second"] == [wire.receive(LONG_S) for _ in range(2)]


def test_waiting_for_bytes_does_not_use_them_up(pair):
    wire, peer = pair
    peer.send(b"x")

    assert wire.await_bytes(LONG_S)
    assert wire.await_bytes(0)
    assert b"x" == wire.receive(0)


def test_waiting_for_bytes_ends_with_the_connection(pair):
    wire, peer = pair
    peer.close()

    assert not wire.await_bytes(LONG_S)


def test_a_reader_is_woken_by_bytes_that_come_late(pair):
    wire, peer = pair
    timer = threading.Timer(SHORT_S, peer.send, (b"late",))
    timer.start()

    assert b"late" == wire.receive(LONG_S)
    timer.join()


def test_a_reader_gives_up_with_a_watched_client_that_is_gone(pair, watched):
    wire, _ = pair
    client_wire, client = watched
    client.close()

    with pytest.raises(ic.ClientGone):
        wire.receive(LONG_S, client_wire)


def test_a_reader_gives_up_with_a_watched_client_that_goes_while_it_waits(pair, watched):
    wire, _ = pair
    client_wire, client = watched
    timer = threading.Timer(SHORT_S, client.close)
    timer.start()

    with pytest.raises(ic.ClientGone):
        wire.await_bytes(LONG_S, client_wire)
    timer.join()


def test_bytes_that_are_there_win_over_a_client_that_is_gone(pair, watched):
    wire, peer = pair
    client_wire, client = watched
    peer.send(b"x")
    client.close()

    assert b"x" == wire.receive(LONG_S, client_wire)


def test_a_watched_client_that_sends_early_is_left_alone_with_its_bytes(pair, watched):
    wire, _ = pair
    client_wire, client = watched
    client.send(b"next request")

    with pytest.raises(TimeoutError):
        wire.receive(SHORT_S, client_wire)

    assert b"next request" == client_wire.receive(0)


def test_a_reader_is_woken_when_its_wire_is_shut_down_elsewhere(pair):
    wire, _ = pair
    timer = threading.Timer(SHORT_S, wire.shut_down)
    timer.start()

    assert b"" == wire.receive(LONG_S)
    timer.join()


@pytest.mark.parametrize("sent, expected", [(None, False), (b"x", None), (b"", True)])
def test_a_hang_up_is_told_from_silence_and_from_bytes(pair, sent, expected):
    wire, peer = pair
    if sent == b"":
        peer.close()
    elif sent:
        peer.send(sent)

    assert expected is ic.has_hung_up(wire.sock)


def test_a_wire_can_be_closed_and_shut_down_twice(pair):
    wire, _ = pair

    for end in (wire.shut_down, wire.shut_down, wire.close, wire.close, wire.shut_down):
        end()

    assert -1 == wire.sock.fileno()


def test_lingering_reads_on_until_the_peer_ends(pair):
    wire, peer = pair
    peer.send(b"the rest of a refused body")
    got = []
    with meanwhile(lambda: (got.append(read_all(peer, 100)), peer.close())):
        wire.linger(LONG_S)

    assert [b""] == got


def test_lingering_ends_by_itself(pair):
    wire, _ = pair

    wire.linger(SHORT_S)

    assert b"" == wire.received


# Heads on sockets.

RAW_HEAD = b"GET / HTTP/1.1\r\nHost: a"


def head_of(wire: ic.Wire, timeout_s: float = LONG_S, client: Optional[ic.Wire] = None) -> bytes:
    return wire.read_head(time.monotonic() + timeout_s, client)


def test_a_head_is_read_and_what_follows_is_kept(pair):
    wire, peer = pair
    peer.send(RAW_HEAD + b"\r\n\r\nbody\r\n\r\n")

    assert RAW_HEAD == head_of(wire)
    assert b"body\r\n\r\n" == wire.received


def test_a_head_that_comes_byte_by_byte_is_the_same(pair):
    wire, peer = pair

    def trickle() -> None:
        for number in RAW_HEAD + b"\r\n\r\n":
            peer.send(bytes([number]))

    with meanwhile(trickle):
        got = head_of(wire)

    assert (RAW_HEAD, b"") == (got, wire.received)


def test_two_heads_in_one_read_are_two(pair):
    wire, peer = pair
    peer.send(RAW_HEAD + b"\r\n\r\n" + RAW_HEAD + b"2\r\n\r\n")

    assert [RAW_HEAD, RAW_HEAD + b"2"] == [head_of(wire), head_of(wire)]


@pytest.mark.parametrize("sent", [b"", b"G", RAW_HEAD, RAW_HEAD + b"\r\n", RAW_HEAD + b"\r\n\r"])
def test_a_connection_that_ends_inside_a_head_is_told_apart(pair, sent):
    wire, peer = pair
    peer.send(sent)
    peer.close()

    with pytest.raises(EOFError):
        head_of(wire)


@pytest.mark.parametrize("sent", [b"", RAW_HEAD + b"\r\n"])
def test_a_head_that_never_ends_times_out(pair, sent):
    wire, peer = pair
    peer.send(sent)

    with pytest.raises(TimeoutError):
        head_of(wire, SHORT_S)


def test_a_head_has_one_time_limit_in_all_and_not_one_for_each_read(pair):
    wire, peer = pair
    is_over = threading.Event()

    def trickle() -> None:
        while not is_over.wait(SHORT_S / 10):
            peer.send(b"x")

    with meanwhile(trickle):
        with pytest.raises(TimeoutError):
            head_of(wire, SHORT_S)
        is_over.set()


@pytest.mark.parametrize("size, is_taken", [(0, True), (1, False), (100_000, False)])
@pytest.mark.parametrize("ends", [True, False])
def test_a_head_is_read_up_to_its_limit(pair, size, is_taken, ends):
    wire, peer = pair
    long_head = b"x" * (ic.MAX_HEAD_BYTES + size)
    end = b"\r\n\r\n" if ends or is_taken else b"x"
    outcome = []
    with meanwhile(peer.sendall, long_head + end):
        try:
            outcome.append(head_of(wire))
        except ic.MalformedHttp as error:
            outcome.append(str(error))
            wire.shut_down()

    assert [long_head if is_taken else "the head is longer than 65536 bytes"] == outcome


def test_a_wait_for_a_head_ends_with_a_watched_client(pair, watched):
    wire, _ = pair
    client_wire, client = watched
    client.close()

    with pytest.raises(ic.ClientGone):
        head_of(wire, LONG_S, client_wire)


def test_any_of_several_sockets_that_are_ready_is_found(pair, watched):
    wire, peer = pair
    other, _ = watched
    peer.send(b"x")

    assert [wire.sock] == ic.ready_of([wire.sock, other.sock], LONG_S)
    assert [other.sock] == ic.ready_of([other.sock], LONG_S, writing=True)
    assert [] == ic.ready_of([other.sock], SHORT_S)


def test_a_client_that_sent_its_next_request_early_is_watched_again_in_that_one(pair, watched):
    wire, peer = pair
    client_wire, client = watched
    client.send(b"next")
    with pytest.raises(TimeoutError):
        wire.receive(SHORT_S, client_wire)         # it is there, as its bytes say
    assert b"next" == client_wire.receive(LONG_S)
    wire.begin()
    client.close()

    with pytest.raises(ic.ClientGone):
        wire.receive(LONG_S, client_wire)
