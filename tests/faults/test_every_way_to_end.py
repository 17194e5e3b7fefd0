"""Every way in which a call can end settles it exactly once, for at least what was billed.

Nothing stays reserved; a refused or unsent call costs nothing; what is sent and not accounted for
costs its whole reservation; a stream whose client left costs what can have been made until then.
"""
import contextlib
import itertools
import json
import socket
import threading
from dataclasses import replace

import pytest
from support import (PATIENCE_S, Close, Cut, Gate, Hang, MockProvider, Raw, RawClient, Reply, call,
                     program, settled_status, sse, sse_events, start_proxy, status_of)

PATHS = {
    "/v1/chat/completions": {"model": "gpt-4o-mini", "max_tokens": 200, "stream": True,
                             "messages": [{"role": "user", "content": "hello"}]},
    "/v1/responses": {"model": "gpt-4o-mini", "max_output_tokens": 200, "stream": True,
                      "input": "hello"},
    "/v1/messages": {"model": "claude-haiku-4-5", "max_tokens": 200, "stream": True,
                     "messages": [{"role": "user", "content": "hello"}]},
}
CHAT = PATHS["/v1/chat/completions"]
SSE = (("content-type", "text/event-stream"),)


def reserved_for(proxy, mock, path, fields):
    """What one such request reserves, seen while the mock withholds its answer."""
    gate = Gate()
    mock.script(lambda request: mock.default_reply(request).with_steps(
        [gate, *mock.default_reply(request).steps]))
    with RawClient(proxy.port) as client:
        client.request("POST", path, json.dumps(fields).encode())
        mock.wait_for_requests(len(mock.seen) + 1 if not mock.seen else 1)
        reserved = status_of(proxy)["reserved_microdollars"]
        gate.event.set()
        client.read_answer()
    mock.bills.clear()
    return reserved


@pytest.fixture(params=PATHS)
def stream(request):
    return request.param, PATHS[request.param]


def error_of(events, path):
    """The error that ends a stream, in its dialect."""
    name, data = events[-1]
    body = json.loads(data)
    if path == "/v1/chat/completions":
        assert name is None
    else:
        assert ("error", "error") == (name, body["type"])
    return body["error"]


# The provider's side.

@pytest.mark.parametrize("ending", [Cut(), Close()], ids=["reset", "closed"])
def test_a_stream_that_breaks_ends_with_an_error_event_and_costs_its_reservation(
        mock, proxy, stream, ending):
    path, fields = stream
    reserved = reserved_for(proxy, mock, path, fields)
    spent = settled_status(proxy)["spent_microdollars"]
    mock.script(lambda request: replace(
        mock.default_reply(request), steps=(*mock.default_reply(request).steps[:4], ending)))

    answer = call(proxy.port, "POST", path, fields)

    assert "broke" in error_of(sse_events(answer.body), path)["message"]
    charged = settled_status(proxy)["spent_microdollars"] - spent
    assert reserved == charged >= mock.billed_microdollars


def test_a_stream_that_ends_without_its_last_event_is_a_broken_stream(mock, proxy, stream):
    path, fields = stream
    mock.script(lambda request: mock.default_reply(request).with_steps(
        mock.default_reply(request).steps[:-2]))

    answer = call(proxy.port, "POST", path, fields)

    assert "without its last event" in error_of(sse_events(answer.body), path)["message"]


def test_an_error_inside_a_stream_passes_as_it_is_and_costs_the_reservation(mock, proxy, stream):
    path, fields = stream
    reserved = reserved_for(proxy, mock, path, fields)
    spent = settled_status(proxy)["spent_microdollars"]
    error = {"error": {"type": "overloaded_error", "message": "Overloaded"}}
    event = sse(error) if path == "/v1/chat/completions" else sse({"type": "error", **error},
                                                                  "error")
    mock.script(lambda request: mock.default_reply(request).with_steps(
        [*mock.default_reply(request).steps[:2], event]))

    answer = call(proxy.port, "POST", path, fields)

    assert answer.body.endswith(event)
    status = settled_status(proxy)
    assert reserved == status["spent_microdollars"] - spent
    assert 1 == status["failed_requests"]


@pytest.mark.parametrize("reply, status, code", [
    (Reply(answers=False), 502, "upstream_broke"),
    (Reply(framing="chunked", steps=(Cut(),)), 502, "upstream_broke"),
    (Reply(framing="chunked", steps=(b'{"usage"', Close())), 502, "upstream_broke"),
    (Reply(framing="chunked", steps=(Raw(b"zz\r\n"), Hang())), 502, "upstream_broke"),
    (Reply(framing="chunked", steps=(Hang(),)), 504, "upstream_timeout"),
], ids=["no answer", "reset", "cut", "malformed", "silent"])
def test_a_call_that_was_sent_and_not_answered_costs_its_reservation(
        mock, proxy_for, reply, status, code):
    proxy = proxy_for("--budget", "1", timeouts={"first_byte_s": 0.3, "between_bytes_s": 0.3})
    fields = {**CHAT, "stream": False}
    reserved = reserved_for(proxy, mock, "/v1/chat/completions", fields)
    spent = settled_status(proxy)["spent_microdollars"]
    mock.script(reply)

    answer = call(proxy.port, "POST", "/v1/chat/completions", fields)

    assert (status, code) == (answer.status, answer.json["error"]["code"])
    assert reserved == settled_status(proxy)["spent_microdollars"] - spent > 0


def test_a_stream_that_falls_silent_is_given_up(mock, proxy_for, stream):
    path, fields = stream
    proxy = proxy_for("--budget", "1", timeouts={"between_bytes_s": 0.2})
    mock.script(lambda request: mock.default_reply(request).with_steps(
        [*mock.default_reply(request).steps[:3], Hang()]))

    answer = call(proxy.port, "POST", path, fields)

    assert "in time" in error_of(sse_events(answer.body), path)["message"]
    mock.wait_for_hang_ups()
    assert settled_status(proxy)["spent_microdollars"] > 0


def test_a_provider_that_cannot_be_reached_costs_nothing(mock, proxy):
    mock.refuse_connections()

    answer = call(proxy.port, "POST", "/v1/chat/completions", CHAT)

    assert (502, "upstream_unreachable") == (answer.status, answer.json["error"]["code"])
    assert 0 == settled_status(proxy)["spent_microdollars"]


def test_a_provider_that_never_accepts_is_a_timeout_and_costs_nothing(mock, proxy_for):
    full = socket.socket()                       # a backlog that is full: connects hang
    full.bind(("127.0.0.1", 0))
    full.listen(0)
    fillers = [socket.socket() for _ in range(3)]
    for filler in fillers:
        filler.setblocking(False)
        filler.connect_ex(full.getsockname())
    proxy = proxy_for("--budget", "1", timeouts={"connect_s": 0.3}, environ={
        "OPENAI_API_KEY": "sk-x",
        "IRONCAGE_OPENAI_BASE_URL": f"http://127.0.0.1:{full.getsockname()[1]}"})

    answer = call(proxy.port, "POST", "/v1/chat/completions", CHAT)

    assert (504, "upstream_timeout") == (answer.status, answer.json["error"]["code"])
    assert 0 == settled_status(proxy)["spent_microdollars"]
    for sock in (*fillers, full):
        sock.close()


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed_and_costs_nothing(mock, proxy, status):
    with MockProvider() as elsewhere:
        mock.script(Reply(status, (("location", elsewhere.url + "/v1/chat/completions"),)))

        answer = call(proxy.port, "POST", "/v1/chat/completions", CHAT)

        assert 502 == answer.status
        assert [] == elsewhere.seen
    assert 0 == settled_status(proxy)["spent_microdollars"]


def test_a_post_is_never_sent_twice(mock, proxy):
    """A pooled connection that dies after the request was written is not tried again."""
    call(proxy.port, "POST", "/v1/chat/completions", CHAT)
    mock.script(Reply(answers=False))

    answer = call(proxy.port, "POST", "/v1/chat/completions", CHAT)

    assert 502 == answer.status
    assert 2 == len(mock.seen)


def test_an_exception_of_our_own_settles_and_answers_500(mock, proxy, monkeypatch):
    monkeypatch.setattr(program(), "answer_headers", lambda headers: 1 / 0)

    answer = call(proxy.port, "POST", "/v1/chat/completions", CHAT)

    assert (500, "internal_error") == (answer.status, answer.json["error"]["code"])
    status = settled_status(proxy)
    assert status["spent_microdollars"] > 0


# The client's side.

def leave_in_mid_stream(proxy, mock, path, fields, steps_seen):
    """A client that hangs up after so many steps while the provider goes on; the charge."""
    gate = Gate()

    def reply(request):
        default = mock.default_reply(request)
        steps = [*default.steps[:steps_seen], gate, *default.steps[steps_seen:]]
        tokens = [*default.tokens_by_step[:steps_seen],
                  default.tokens_by_step[min(steps_seen, len(default.tokens_by_step)) - 1]]
        return replace(default, steps=tuple(steps), tokens_by_step=tuple(tokens))

    mock.script(reply)
    with RawClient(proxy.port) as client:
        client.request("POST", path, json.dumps(fields).encode())
        client.read_head()
        for _ in range(steps_seen):
            client.read_chunk()
        client.leave()
    mock.wait_for_hang_ups()
    gate.event.set()
    return settled_status(proxy)


@pytest.mark.parametrize("hidden", [0, 50])
@pytest.mark.parametrize("steps_seen", [1, 4, 9])
def test_a_client_that_leaves_in_mid_stream_ends_the_call_and_pays_for_it(
        mock, proxy_for, stream, steps_seen, hidden):
    """The charge covers hidden and read-ahead tokens, and stays within the reservation."""
    path, fields = stream
    proxy = proxy_for("--budget", "1")
    proxy.router.providers = {name: provider._replace(max_output_tokens_per_s=10 ** 9)
                              for name, provider in proxy.router.providers.items()}
    mock.reasoning_tokens = mock.read_ahead_tokens = hidden

    status = leave_in_mid_stream(proxy, mock, path, fields, steps_seen)

    assert 0 == status["reserved_microdollars"]
    assert 0 < mock.billed_microdollars <= status["spent_microdollars"]
    assert 1 == status["by_provider"][
        "anthropic" if path == "/v1/messages" else "openai"]["estimated_requests"]


def test_a_client_that_leaves_early_does_not_pay_for_the_whole_reservation(mock, proxy_for):
    path, fields = "/v1/messages", {**PATHS["/v1/messages"], "max_tokens": 60_000}
    proxy = proxy_for("--budget", "10")

    status = leave_in_mid_stream(proxy, mock, path, fields, 5)

    assert mock.billed_microdollars <= status["spent_microdollars"] < 60_000 * 5 / 2


def test_exact_usage_wins_when_it_came_before_the_client_left(mock, proxy):
    def reply(request):
        default = mock.default_reply(request)
        tokens = [*default.tokens_by_step, *[default.bills[1]["output_tokens"]] * 9]
        return replace(default, steps=(*default.steps[:-1], Gate(), default.steps[-1]),
                       tokens_by_step=tuple(tokens))

    mock.script(reply)
    with RawClient(proxy.port) as client:
        client.request("POST", "/v1/messages", json.dumps(PATHS["/v1/messages"]).encode())
        client.read_head()
        while b"message_delta" not in client.read_chunk():
            pass
        client.leave()
    mock.wait_for_hang_ups()

    assert mock.billed_microdollars == settled_status(proxy)["spent_microdollars"]


def test_a_client_that_leaves_while_a_stream_is_awaited_ends_the_call(mock, proxy, stream):
    path, fields = stream
    mock.script(Reply(headers=SSE, framing="chunked", steps=(Hang(),)))
    with RawClient(proxy.port) as client:
        client.request("POST", path, json.dumps(fields).encode())
        mock.wait_for_requests(1)

    mock.wait_for_hang_ups()
    assert settled_status(proxy)["spent_microdollars"] > 0


def test_a_client_that_leaves_a_whole_answer_pays_exactly(mock, proxy):
    """The answer is still read, so that its usage is known."""
    gate = Gate()
    mock.script(lambda request: replace(
        mock.default_reply(request), steps=(gate, *mock.default_reply(request).steps)))
    with RawClient(proxy.port) as client:
        client.request("POST", "/v1/chat/completions",
                       json.dumps({**CHAT, "stream": False}).encode())
        mock.wait_for_requests(1)
    gate.event.set()

    status = settled_status(proxy)
    assert mock.billed_microdollars == status["spent_microdollars"] > 0
    assert 0 == status["by_provider"]["openai"]["estimated_requests"]


def test_a_client_that_does_not_read_its_stream_is_gone_after_a_while(mock, proxy_for):
    proxy = proxy_for("--budget", "1", timeouts={"write_stall_s": 0.2})
    flood = sse({"choices": [{"delta": {"content": "x" * 60_000}}]})
    mock.script(Reply(headers=SSE, framing="chunked", steps=(flood,) * 1000))
    with RawClient(proxy.port) as client:
        client.request("POST", "/v1/chat/completions", json.dumps(CHAT).encode())
        mock.wait_for_hang_ups()

        assert settled_status(proxy)["spent_microdollars"] > 0


# Every offset.

def test_a_stream_cut_by_the_provider_at_many_offsets_settles_once_each_time(mock, proxy, stream):
    path, fields = stream
    request = None
    call(proxy.port, "POST", path, fields)
    request = mock.seen[0]
    whole = mock.default_reply(request).body
    mock.bills.clear()
    offsets = range(0, len(whole), max(1, len(whole) // 60))
    spent = settled_status(proxy)["spent_microdollars"]
    for offset in offsets:
        mock.script(Reply(headers=SSE, framing="chunked", steps=(whole[:offset] or Raw(b""),
                                                                 Close())))

        answer = call(proxy.port, "POST", path, fields)

        assert 200 == answer.status
        now = settled_status(proxy)
        assert now["spent_microdollars"] > spent, f"cut at {offset}"
        spent = now["spent_microdollars"]
        assert b"error" in answer.body or b"[DONE]" in answer.body or b"message_stop" \
            in answer.body or b"response.completed" in answer.body


# Stopping.

def test_stop_lets_requests_in_flight_finish_and_settles_them(mock):
    proxy = start_proxy(mock, "--budget", "1")
    gate = Gate()
    mock.script(lambda request: mock.default_reply(request).with_steps(
        [mock.default_reply(request).steps[0], gate, *mock.default_reply(request).steps[1:]]))
    with RawClient(proxy.port) as client, RawClient(proxy.port) as idle:
        client.request("POST", "/v1/chat/completions", json.dumps(CHAT).encode())
        client.read_head()
        client.read_chunk()
        stopping = threading.Thread(target=proxy.stop)
        stopping.start()
        assert idle.is_closed_by_server()
        gate.event.set()
        rest = b"".join(iter(client.read_chunk, b""))
        stopping.join(PATIENCE_S)

    assert rest.endswith(b"data: [DONE]\n\n")
    assert not stopping.is_alive()
    assert (mock.billed_microdollars, 0) == proxy.router.controller.get_full_status()[:2]


@pytest.mark.parametrize("is_stream", [True, False])
def test_stop_cuts_what_does_not_finish_and_settles_it(mock, is_stream):
    proxy = start_proxy(mock, "--budget", "1", timeouts={"drain_s": 0.1})
    mock.script(Reply(headers=SSE, framing="chunked", steps=(Hang(),)))
    with RawClient(proxy.port) as client:
        client.request("POST", "/v1/chat/completions",
                       json.dumps({**CHAT, "stream": is_stream}).encode())
        mock.wait_for_requests(1)

        proxy.stop()

        spent, reserved, _ = proxy.router.controller.get_full_status()
        assert spent > 0 == reserved


def test_new_connections_are_refused_while_stopping(mock):
    proxy = start_proxy(mock)
    port = proxy.port
    proxy.stop()

    with pytest.raises(ConnectionRefusedError):
        RawClient(port)


def test_a_client_that_reads_by_drops_does_not_hold_a_call_for_ever(mock, proxy_for, monkeypatch):
    """It makes progress before every stall, but more slowly than anybody has to wait for."""
    monkeypatch.setattr(program(), "LEAST_BYTES_PER_S", 100_000_000)
    proxy = proxy_for("--budget", "1", timeouts={"write_stall_s": 0.3})
    mock.always = Reply(200, (("content-type", "application/json"),), (
        json.dumps({"usage": {"prompt_tokens": 1, "completion_tokens": 1},
                    "junk": "x" * 30_000_000}).encode(),))
    with RawClient(proxy.port) as client:
        client.request("POST", "/v1/chat/completions", json.dumps(CHAT).encode())
        read = 0
        with contextlib.suppress(OSError):
            while "it reads":
                slowly = read < 200_000
                data = client.sock.recv(1_000 if slowly else 1_000_000)
                read += len(data)
                if not data:
                    break
                threading.Event().wait(0.005 if slowly else 0)

    assert 200_000 <= read < 30_000_000
    assert 0 == settled_status(proxy)["reserved_microdollars"]


def test_a_stream_does_not_outlive_the_longest_call(mock, proxy_for):
    """Though bytes keep coming: each wait is short, the whole is bounded."""
    proxy = proxy_for("--budget", "1", timeouts={"call_s": 0.5})
    chunk = sse({"id": "c", "choices": [{"index": 0, "delta": {"content": "x"}}]})
    mock.always = Reply(200, (("content-type", "text/event-stream"),),
                        tuple(itertools.repeat(chunk, 400_000)), framing="chunked")

    answer = call(proxy.port, "POST", "/v1/chat/completions", {**CHAT, "stream": True})

    assert b"upstream_timeout" in answer.body[-300:]
    assert 0 == settled_status(proxy)["reserved_microdollars"]
