"""A provider's key reaches no agent, log or ledger, in whatever form its provider repeats it."""
import gzip
import json
import logging
import re
import urllib.parse
import zlib
from random import Random

import pytest
from key_forms import FORMS, readable
from support import (ANTHROPIC_KEY, OPENAI_KEY, Close, RawClient, Reply, call, program,
                     proxy_environment, settled_status)

ic = program()
CHAT = {"model": "gpt-4o-mini", "max_tokens": 10, "messages": [{"role": "user", "content": "x"}]}
CLAUDE = {**CHAT, "model": "claude-haiku-4-5"}
STREAM = {"stream": True}
WAYS = {                     # method, path, fields, whose key is at stake
    "same format": ("POST", "/v1/chat/completions", CHAT, OPENAI_KEY),
    "Anthropic's format": ("POST", "/v1/messages", CLAUDE, ANTHROPIC_KEY),
    "responses": ("POST", "/v1/responses", {"model": "gpt-4o-mini", "input": "x"}, OPENAI_KEY),
    "for OpenAI's clients": ("POST", "/v1/chat/completions", CLAUDE, ANTHROPIC_KEY),
    "for Anthropic's clients": ("POST", "/v1/messages", CHAT, OPENAI_KEY),
    "unmetered": ("GET", "/v1/files", None, OPENAI_KEY),
}


def received(proxy, method, path, fields):
    """All bytes of an answer, to the end of its connection, its chunks joined."""
    with RawClient(proxy.port) as client:
        client.request(method, path, fields and json.dumps(fields).encode(),
                       [("Connection", "close")])
        shown = b"".join(iter(lambda: client.sock.recv(65536), b""))
    return re.sub(rb"\r\n[0-9a-f]+\r\n", b"", shown)


def answer_bodies(way, text):
    """(status, media type, body) of answers in a way's format, with a text in every place."""
    error = '{"type": "error", "error": {"message": "no %s", "type": "%s", "code": "%s"}}'
    yield 401, "application/json", error.replace("%s", text)
    yield 400, "application/json", '{"detail": ["%s", {"%s": 1}]}'.replace("%s", text)
    yield 500, "text/html", f"<html>{text}</html>"
    yield 200, "application/json", error.replace("%s", text)
    if WAYS[way][3] == ANTHROPIC_KEY:
        yield 200, "application/json", (
            '{"id": "%s", "type": "message", "role": "assistant", "model": "%s", "content": '
            '[{"type": "text", "text": "it is %s."}, {"type": "tool_use", "id": "%s", '
            '"name": "f", "input": {"%s": "%s"}}], "stop_reason": "tool_use", '
            '"usage": {"input_tokens": 1, "output_tokens": 1}}').replace("%s", text)
    else:
        yield 200, "application/json", (
            '{"id": "%s", "model": "%s", "system_fingerprint": "%s", "output": [{"id": "%s"}], '
            '"choices": [{"index": 0, "finish_reason": "tool_calls", "message": {"role": '
            '"assistant", "content": "it is %s.", "tool_calls": [{"id": "%s", "type": "function", '
            '"function": {"name": "f", "arguments": "{}"}}]}}], '
            '"usage": {"prompt_tokens": 1, "completion_tokens": 1}}').replace("%s", text)


@pytest.fixture
def told(caplog):
    """What is logged, as text."""
    caplog.set_level(logging.DEBUG, "ironcage")
    yield lambda: "".join(ic.LogFormatter("json").format(record) for record in caplog.records)


def check_kept(proxy, key, shown, told=None):
    assert shown.startswith(b"HTTP/1.1 ")
    assert key not in readable(shown), shown
    if told is None:
        return
    stored = call(proxy.port, "GET", "/ironcage/usage").body \
        + call(proxy.port, "GET", "/ironcage/status").body \
        + call(proxy.port, "GET", "/ironcage/metrics").body
    assert key not in readable(stored)
    assert key not in readable(told().encode())


def every_form_of_one_and_every_way_of_another(ways):
    """Not each form of each way: a body is looked at in one place, before it is read."""
    ways, forms = list(ways), list(FORMS)
    return [(ways[0], form) for form in forms] + [
        (way, form) for way in ways[1:] for form in (forms[0], forms[5])]


@pytest.mark.parametrize("way, form", every_form_of_one_and_every_way_of_another(WAYS))
def test_a_key_in_a_body_is_masked_in_whatever_way_json_writes_it(mock, proxy_for, told, way, form):
    method, path, fields, key = WAYS[way]
    proxy = proxy_for()
    for status, media, body in answer_bodies(way, FORMS[form](key)):
        data = body.encode()
        for steps in ((data,), tuple(data[at:at + 29] for at in range(0, len(data), 29))):
            mock.always = Reply(status, (("content-type", media),), steps, framing="chunked")

            shown = received(proxy, method, path, fields)

            check_kept(proxy, key, shown)
            if way == "same format":
                assert f"HTTP/1.1 {status} ".encode() in shown and b"*" * len(key) in re.sub(
                    rb"\r\n[0-9a-f]*\r\n", b"", shown)
    check_kept(proxy, key, shown, told)
    assert 0 == settled_status(proxy)["reserved_microdollars"]


def anthropic_stream(text):
    start = MESSAGE.replace("%s", text)
    return "".join(f"event: {json.loads(data)['type']}\ndata: {data}\n\n" for data in (
        start, '{"type": "content_block_start", "index": 0, "content_block": '
        '{"type": "text", "text": "%s"}}'.replace("%s", text),
        '{"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", '
        '"text": "so %s!"}}'.replace("%s", text), '{"type": "content_block_stop", "index": 0}',
        '{"type": "message_delta", "delta": {"stop_reason": "end_turn", "stop_sequence": "%s"}, '
        '"usage": {"output_tokens": 1}}'.replace("%s", text), '{"type": "message_stop"}')).encode()


MESSAGE = ('{"type": "message_start", "message": {"id": "%s", "type": "message", "role": '
           '"assistant", "model": "%s", "content": [], "stop_reason": null, '
           '"usage": {"input_tokens": 3, "output_tokens": 1}}}')


def openai_stream(text):
    chunk = ('{"id": "%s", "model": "%s", "choices": [{"index": 0, "delta": %d, '
             '"finish_reason": %f}]}')
    return "".join(f"data: {data}\n\n".replace("%s", text) for data in (
        chunk.replace("%d", '{"role": "assistant", "content": "so %s!"}').replace("%f", "null"),
        chunk.replace("%d", '{"tool_calls": [{"index": 0, "id": "%s", "type": "function", '
                      '"function": {"name": "f", "arguments": "{}"}}]}').replace("%f", "null"),
        chunk.replace("%d", "{}").replace("%f", '"tool_calls"'), "[DONE]")).encode()


STREAMED = {
    "same format": ("/v1/chat/completions", {**CHAT, **STREAM}, OPENAI_KEY, openai_stream),
    "Anthropic's format": ("/v1/messages", {**CLAUDE, **STREAM}, ANTHROPIC_KEY, anthropic_stream),
    "for OpenAI's clients": ("/v1/chat/completions", {**CLAUDE, **STREAM}, ANTHROPIC_KEY,
                             anthropic_stream),
    "for Anthropic's clients": ("/v1/messages", {**CHAT, **STREAM}, OPENAI_KEY, openai_stream),
}


@pytest.mark.parametrize("way, form", every_form_of_one_and_every_way_of_another(STREAMED))
def test_a_key_in_an_event_is_masked_wherever_reads_cut_it(mock, proxy_for, told, way, form):
    path, fields, key, stream = STREAMED[way]
    proxy, rng = proxy_for(), Random(form)
    for round_ in range(4):
        data = stream(FORMS[form](key))
        cuts = sorted(rng.sample(range(1, len(data)), 40)) if round_ else []
        steps = tuple(data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)]))
        mock.always = Reply(200, (("content-type", "text/event-stream"),), steps,
                            framing="chunked")

        shown = received(proxy, "POST", path, fields)

        check_kept(proxy, key, shown)
        assert shown.count(b"*") > 10 and b"so " in shown, shown
    check_kept(proxy, key, shown, told)


def two_codings(data):
    return gzip.compress(gzip.compress(data))


CODINGS = {                      # content-encoding -> what it makes of a body
    "plain, labelled gzip": ("gzip", bytes),
    "plain, labelled deflate": ("deflate", bytes),
    "plain, labelled br": ("br", bytes),
    "labelled zstd": ("zstd", bytes),
    "of a coding that nobody knows": ("x-own", bytes),
    "of a coding named like the key": (OPENAI_KEY, bytes),
    "gzip twice": ("gzip, gzip", two_codings),
    "two headers": ("identity, gzip", gzip.compress),
    "gzip": ("gzip", gzip.compress),
    "GZIP": ("GZIP", gzip.compress),
    "x-gzip": ("x-gzip", gzip.compress),
    "deflate": ("deflate", zlib.compress),
    "raw deflate": ("deflate", lambda data: zlib.compress(data)[2:-4]),
    "a second member": ("gzip", lambda data: gzip.compress(b'{"a": 1}') + gzip.compress(data)),
    "plain behind a member": ("gzip", lambda data: gzip.compress(b'{"a": 1}') + data),
    "a plain beginning": ("gzip", lambda data: data + gzip.compress(b'{"a": 1}')),
    "cut": ("gzip", lambda data: gzip.compress(data)[:-9]),
    "a bomb": ("gzip", lambda data: gzip.compress(b" " * 2_000_000 + data)),
    "escaped": ("gzip", lambda data: gzip.compress(data.replace(b"sk-", b"\\u0073k\\u002D"))),
}


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("way", ["same format", "for OpenAI's clients", "unmetered", "stream"])
def test_a_body_that_may_hold_the_key_unseen_is_not_passed_on(
        mock, proxy_for, told, monkeypatch, way, coding):
    monkeypatch.setattr(ic, "MAX_INFLATED_BYTES", 1_000_000)
    method, path, fields, key = WAYS.get(way) or ("POST", "/v1/chat/completions",
                                                  {**CHAT, **STREAM}, OPENAI_KEY)
    label, encode = CODINGS[coding]
    proxy = proxy_for()
    media = "text/event-stream" if way == "stream" else "application/json"
    body = (f'data: {{"error": "{key}"}}\n\n' if way == "stream" else f'{{"a": "{key}"}}').encode()
    mock.always = Reply(200, (("content-type", media), ("content-encoding", label)),
                        (encode(body),))

    shown = received(proxy, method, path, fields)

    check_kept(proxy, key, shown, told)
    head, _, rest = shown.partition(b"\r\n\r\n")
    if b"502" in head.split(b"\r\n")[0]:
        message = json.loads(rest)["error"]["message"]
        assert re.search("repeats its key|its key could be in it", message), message
    else:                    # the head was out before anything could be seen: it was cut
        assert way in ("unmetered", "stream") and label.lower() in ("gzip", "x-gzip", "deflate")
    assert 0 == settled_status(proxy)["reserved_microdollars"]


def test_the_provider_is_asked_for_bodies_that_can_be_seen(mock, proxy_for):
    for way in WAYS.values():
        call(proxy_for().port, *way[:3], headers=[("Accept-Encoding", "br, zstd, gzip")])
        assert "identity" == mock.seen[-1].header("accept-encoding")


@pytest.mark.parametrize("label", ["br", "zstd", "gzip, gzip"])
def test_without_a_secret_any_coding_passes(mock, proxy_for, label):
    proxy = proxy_for(environ={"OPENAI_API_KEY": "ollama", "IRONCAGE_OPENAI_BASE_URL": mock.url})
    mock.applies_vendor_rules = False
    mock.always = Reply(200, (("content-encoding", label),), (b"anything",))

    assert b"anything" == call(proxy.port, "GET", "/v1/files").body


def test_a_coding_without_a_body_is_no_fault(mock, proxy_for):
    for status in (200, 204, 304):
        mock.always = Reply(status, (("content-encoding", "br"),))
        assert status == call(proxy_for().port, "GET", "/v1/files").status


HEADERS = {
    "a value": lambda key: (("x-debug", f"Bearer {key}"),),
    "a value escaped": lambda key: (("x-debug", FORMS["all escaped"](key)),),
    "a value of a URL": lambda key: (("link", f"<https://x/?key={urllib.parse.quote(key)}>"),),
    "a value in capitals": lambda key: (("x-debug", key.upper()),),
    "a name": lambda key: ((key, "1"),),
    "a name in capitals": lambda key: ((f"X-{key.upper()}", "1"),),
    "request ids": lambda key: (("x-request-id", key), ("request-id", key)),
    "a rate limit": lambda key: (("x-ratelimit-limit-tokens", key),
                                 ("anthropic-ratelimit-tokens-limit", key)),
    "a redirect": lambda key: (("location", f"https://x/{key}"), ("content-location", key)),
    "its type": lambda key: (("content-type", f"application/json; key={key}"),),
    "connection options": lambda key: (("connection", key),),
    "one of two": lambda key: (("x-debug", "1"), ("x-debug", key)),
    "a trailer": lambda key: (("trailer", "x-debug"),),
}


@pytest.mark.parametrize("kind", HEADERS)
@pytest.mark.parametrize("way", WAYS)
def test_no_header_holds_the_key_in_value_or_name(mock, proxy_for, told, kind, way):
    method, path, fields, key = WAYS[way]
    proxy = proxy_for()
    for status, media in ((200, "text/event-stream"), (429, "application/json"), (204, "")):
        headers = "".join(f"{name}: {value}\r\n" for name, value in HEADERS[kind](key))
        body = b'data: {"id": "x"}\n\n' if "event" in media else b'{"id": "x"}'
        mock.always = Reply(framing="raw", steps=(
            f"HTTP/1.1 {status} {key}\r\ncontent-type: {media}\r\nx-other: stays\r\n"
            f"connection: close\r\n{headers}"
            f"transfer-encoding: chunked\r\n\r\n{len(body):x};ext={key}\r\n".encode()
            + body + f"\r\n0;{key}\r\nx-debug: {key}\r\n{key}: 1\r\n\r\n".encode(), Close()))

        shown = received(proxy, method, path, fields)

        assert key.lower() not in readable(shown).lower()
        if status == 429:
            assert b"x-other: stays" in shown
    check_kept(proxy, key, shown, told)


@pytest.mark.parametrize("name", ["x-ironcage-request-id", "X-IronCage-Cost-Microdollars",
                                  "x-ironcage-max-tokens", "x-ironcage-anything",
                                  "X-IRONCAGE-ADJUSTED", "x-ironcage-dropped-params"])
@pytest.mark.parametrize("way", WAYS)
def test_what_we_say_under_our_own_names_no_provider_can_say(mock, proxy_for, way, name):
    method, path, fields, _ = WAYS[way]
    mock.always = Reply(400, ((name, "forged"), ("content-type", "application/json")),
                        (b'{"error": {"message": "x"}}',))

    answer = call(proxy_for().port, method, path, fields)

    assert 400 == answer.status and "forged" not in str(answer.headers)


@pytest.mark.parametrize("key", ["key/with+signs==0123456789", "quote\"and\\slash-0123456789",
                                 "<&>-html-0123456789abcdef", "aaaaaaaaaaaaaaaaaaaaaaaa"])
@pytest.mark.parametrize("write", [
    str, lambda key: json.dumps(key)[1:-1], lambda key: json.dumps(key)[1:-1].replace("/", "\\/"),
    lambda key: urllib.parse.quote(key, safe=""), lambda key: json.dumps(json.dumps(key))[3:-3],
    lambda key: urllib.parse.quote(key, safe="").replace("%2F", "%2f").replace("%3D", "%3d"),
    urllib.parse.quote, FORMS["all escaped"], FORMS["mixed"]], ids=range(9))
def test_a_key_of_any_characters_is_found_in_any_writing(mock, proxy_for, key, write):
    proxy = proxy_for(environ={**proxy_environment(mock), "OPENAI_API_KEY": key})
    mock.applies_vendor_rules = False
    data = b'{"error": "no: ' + write(key).encode() + b' is wrong"}'
    for size in (1, 3, len(data)):
        mock.always = Reply(401, (("content-type", "application/json"),),
                            tuple(data[at:at + size] for at in range(0, len(data), size)))

        answer = call(proxy.port, "GET", "/v1/files")

        assert len(data) == len(answer.body)
        assert answer.body.startswith(b'{"error": "no: ') and answer.body.endswith(b' is wrong"}')
        assert answer.body.count(b"*") >= len(write(key)) - ic.OPEN_KEY_BYTES / 2
        assert key not in readable(answer.body) and write(key).encode() not in answer.body
