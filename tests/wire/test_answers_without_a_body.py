"""Answers that have no body, on every way through: the client's connection stays in step."""
import json

import pytest
from support import Close, RawClient, Reply, call, settled_status

CHAT = {"model": "gpt-4o-mini", "max_tokens": 10, "messages": [{"role": "user", "content": "x"}]}
WAYS = {            # method, path, fields
    "same format": ("POST", "/v1/chat/completions", CHAT),
    "same format, streamed": ("POST", "/v1/chat/completions", {**CHAT, "stream": True}),
    "translated for OpenAI's clients": (
        "POST", "/v1/chat/completions", {**CHAT, "model": "claude-haiku-4-5"}),
    "the same, streamed": (
        "POST", "/v1/chat/completions", {**CHAT, "model": "claude-haiku-4-5", "stream": True}),
    "translated for Anthropic's clients": ("POST", "/v1/messages", CHAT),
    "the same, in stream": ("POST", "/v1/messages", {**CHAT, "stream": True}),
    "unmetered": ("GET", "/v1/files", None),
    "unmetered HEAD": ("HEAD", "/v1/files", None),
    "unmetered DELETE": ("DELETE", "/v1/files/1", None),
}
KINDS = {"JSON": "application/json", "a stream": "text/event-stream", "nothing said": None}


def answers_in_step(proxy, method, path, fields):
    """The answer to a request, and then to one more on the same connection."""
    with RawClient(proxy.port) as client:
        client.request(method, path, fields and json.dumps(fields).encode())
        answer = client.read_answer(to_head=method == "HEAD")
        client.request("GET", "/ironcage/budget")
        return answer, client.read_answer()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("status", [204, 205, 304])
def test_an_answer_without_a_body_keeps_the_connection_in_step(mock, proxy_for, way, status):
    proxy = proxy_for()
    for kind in KINDS.values():
        for body in (b"", b'{"not": "allowed"}'):
            mock.always = Reply(status, (("content-type", kind),) if kind else (),
                                (body,) if body else ())

            answer, following = answers_in_step(proxy, *WAYS[way])

            assert (200, True) == (following.status, "limit_microdollars" in following.json)
            if not way.startswith(("same format", "unmetered")):
                assert 502 == answer.status and answer.json["error"]["message"]
            else:
                assert (status, b"") == (answer.status, answer.body)
                if status == 205 and way != "unmetered HEAD":
                    assert "0" == answer.header("content-length")
    assert 0 == settled_status(proxy)["reserved_microdollars"]


@pytest.mark.parametrize("way", [way for way in WAYS if "HEAD" not in way])
def test_interim_answers_are_read_over(mock, proxy_for, way):
    proxy = proxy_for()
    method, path, fields = WAYS[way]

    def interim(status):
        return f"HTTP/1.1 {status} Wait\r\nx-interim: 1\r\n\r\n".encode()
    final = b"HTTP/1.1 400 No\r\nconnection: close\r\ncontent-type: application/json\r\n" \
            b"content-length: 2\r\n\r\n{}"

    mock.always = Reply(framing="raw", steps=(
        interim(100) + interim(103) * 20 + interim(199) + final,))
    answer, following = answers_in_step(proxy, method, path, fields)
    assert (400, None, 200) == (answer.status, answer.header("x-interim"), following.status)

    mock.always = Reply(framing="raw", steps=(interim(102) * 5000,))     # and never the answer
    answer, following = answers_in_step(proxy, method, path, fields)
    assert (502, 200) == (answer.status, following.status)
    assert "interim" in answer.json["error"]["message"]


@pytest.mark.parametrize("answer, words", [
    (b"SSH-2.0-OpenSSH_9.9\r\n\r\n", "is not HTTP/1.1"), (b"HTTP/2 200 OK\r\n\r\n", "is not HTTP/1.1"),
    (b"HTTP/1.1 101 Switching Protocols\r\nupgrade: h2c\r\n\r\n", "with the status 101"),
    (b"HTTP/1.1 099 Early\r\n\r\n", "with the status 99"), (b"", "without an answer")])
def test_what_is_no_answer_of_http_is_named(mock, proxy_for, answer, words):
    mock.always = Reply(framing="raw", steps=(answer, Close()))

    refused = call(proxy_for("--budget", "1").port, "POST", "/v1/chat/completions", CHAT)

    assert 502 == refused.status and words in refused.json["error"]["message"]
