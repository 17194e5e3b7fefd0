"""The mock itself: its shapes, its strictness, its bills, its scripts. Bills are worked by hand."""
import json
import re
import threading
from dataclasses import replace

import pytest
from support import (ANTHROPIC_KEY, OPENAI_KEY, Close, Cut, Gate, MockProvider, RawClient, Reply,
                     call, exact_microdollars, sse_events)

OPENAI = (("authorization", f"Bearer {OPENAI_KEY}"),)
ANTHROPIC = (("x-api-key", ANTHROPIC_KEY), ("anthropic-version", "2023-06-01"))
CHAT = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Hi"}]}
RESPONSE = {"model": "gpt-5.5", "input": "Hi"}
COMPLETION = {"model": "gpt-3.5-turbo-instruct", "prompt": "Hi"}
EMBEDDING = {"model": "text-embedding-3-small", "input": "Hi"}
MESSAGE = {"model": "claude-haiku-4-5", "max_tokens": 640,
           "messages": [{"role": "user", "content": "Hi"}]}
PATHS = {"/v1/chat/completions": CHAT, "/v1/responses": RESPONSE, "/v1/completions": COMPLETION,
         "/v1/embeddings": EMBEDDING, "/v1/messages": MESSAGE}
STREAMED = [path for path in PATHS if path != "/v1/embeddings"]


def ask(mock, path, **changes):
    fields = {name: value for name, value in {**PATHS[path], **changes}.items()
              if value is not None}
    headers = ANTHROPIC if "messages" in path else OPENAI
    return call(mock.port, "POST", path, fields, headers, token=None)


def documents(answer):
    return [json.loads(data) for _, data in sse_events(answer.body) if data != "[DONE]"]


def text_of(path, document):
    """The text that a whole answer, or one event, brings."""
    pick = {
        "/v1/chat/completions": lambda: "".join(
            (choice.get("message") or choice["delta"]).get("content") or ""
            for choice in document["choices"]),
        "/v1/completions": lambda: "".join(choice["text"] for choice in document["choices"]),
        "/v1/responses": lambda: document.get("delta") or "".join(
            part["text"] for item in document.get("output", []) for part in item["content"]),
        "/v1/messages": lambda: (document.get("delta") or {}).get("text") or "".join(
            block["text"] for block in document.get("content", [])),
    }
    return pick[path]()


@pytest.mark.parametrize("path", STREAMED)
def test_a_stream_brings_the_text_of_the_whole_answer(mock, path):
    whole = text_of(path, ask(mock, path).json)
    streamed = "".join(text_of(path, each) for each in documents(ask(mock, path, stream=True)))

    assert whole == streamed == mock.output_text


def test_a_chat_stream_tells_usage_last_and_only_if_asked(mock):
    asked = documents(ask(mock, "/v1/chat/completions", stream=True,
                          stream_options={"include_usage": True}))
    unasked = documents(ask(mock, "/v1/chat/completions", stream=True))

    assert all(chunk["usage"] is None and chunk["choices"] for chunk in asked[:-1])
    assert asked[-1]["choices"] == [] and asked[-1]["usage"]["completion_tokens"] == 13
    assert not any("usage" in chunk for chunk in unasked)


def test_an_anthropic_stream_has_the_vendors_order_of_events(mock):
    names = [name for name, _ in sse_events(ask(mock, "/v1/messages", stream=True).body)]

    assert names[:3] == ["message_start", "content_block_start", "ping"]
    assert set(names[3:-3]) == {"content_block_delta"}
    assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]


def test_a_response_stream_numbers_its_events_and_ends_without_done(mock):
    answer = ask(mock, "/v1/responses", stream=True)
    events = documents(answer)

    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [event["type"] for event in events][-1] == "response.completed"
    assert b"[DONE]" not in answer.body


@pytest.mark.parametrize(("path", "cap", "finish"), [
    ("/v1/chat/completions", "max_tokens", '"finish_reason": "length"'),
    ("/v1/completions", "max_tokens", '"finish_reason": "length"'),
    ("/v1/responses", "max_output_tokens", '"reason": "max_output_tokens"'),
    ("/v1/messages", "max_tokens", '"stop_reason": "max_tokens"')])
def test_an_answer_stops_at_the_cap_and_says_so(mock, path, cap, finish):
    assert finish in ask(mock, path, **{cap: 3}).body.decode()
    assert mock.bills[-1][1].get("completion_tokens", mock.bills[-1][1].get("output_tokens")) == 3


@pytest.mark.parametrize(("path", "changes", "status", "words"), [
    ("/v1/chat/completions", {"surprise": 1}, 400, "Unknown parameter: 'surprise'"),
    ("/v1/chat/completions", {"messages": None}, 400, "Missing required parameter: 'messages'"),
    ("/v1/chat/completions", {"stream_options": {}}, 400, "stream_options"),
    ("/v1/chat/completions", {"max_tokens": 0}, 400, "max_tokens"),
    ("/v1/chat/completions", {"model": "gpt-none"}, 404, "gpt-none"),
    ("/v1/responses", {"input": None}, 400, "'input'"),
    ("/v1/messages", {"surprise": 1}, 400, "surprise: Extra inputs are not permitted"),
    ("/v1/messages", {"max_tokens": None}, 400, "max_tokens: Field required"),
    ("/v1/messages", {"model": "claude-none"}, 404, "model: claude-none")])
def test_what_a_vendor_refuses_is_refused_and_free(mock, path, changes, status, words):
    answer = ask(mock, path, **changes)

    assert answer.status == status and words in answer.json["error"]["message"]
    assert ("request_id" in answer.json) == (path == "/v1/messages")
    assert mock.bills == []


@pytest.mark.parametrize(("path", "headers", "status"), [
    ("/v1/chat/completions", (), 401),
    ("/v1/chat/completions", (("authorization", "Bearer sk-other"),), 401),
    ("/v1/messages", ANTHROPIC[:1], 400),
    ("/v1/messages", ANTHROPIC[1:], 401),
    ("/v1/messages", (*ANTHROPIC, *OPENAI), 400)])
def test_the_key_must_be_right_and_alone(mock, path, headers, status):
    answer = call(mock.port, "POST", path, PATHS[path], headers, token=None)

    assert answer.status == status


@pytest.mark.parametrize(("path", "microdollars"), [
    # 1,000 tokens in, of them 400 cached (Anthropic: 400 cached beside them), 100 tokens out.
    ("/v1/chat/completions", 180),     # 600 * 0.15 + 400 * 0.075 + 100 * 0.6
    ("/v1/responses", 6200),           # 600 * 5 + 400 * 0.5 + 100 * 30
    ("/v1/completions", 1700),         # 1,000 * 1.5 + 100 * 2
    ("/v1/embeddings", 20),            # 1,000 * 0.02
    ("/v1/messages", 1540)])           # 1,000 * 1 + 400 * 0.1 + 100 * 5
def test_a_bill_is_what_the_price_list_says(mock, path, microdollars):
    mock.input_tokens, mock.output_tokens = 1000, 100
    mock.cached_tokens = 0 if path in ("/v1/completions", "/v1/embeddings") else 400
    ask(mock, path)

    assert mock.billed_microdollars == microdollars


def test_a_bill_is_rounded_up_once(mock):
    mock.input_tokens, mock.output_tokens = 1, 1          # 0.15 + 0.6
    ask(mock, "/v1/chat/completions")

    assert mock.billed_microdollars == 1


def test_cached_tokens_never_make_a_bill_smaller_than_nothing(mock):
    mock.cached_tokens = 5000
    ask(mock, "/v1/chat/completions")

    assert mock.bills[-1][1]["prompt_tokens"] >= 5000 and mock.billed_microdollars > 0


def test_reasoning_is_part_of_a_capped_output(mock):
    mock.reasoning_tokens = 100
    usage = ask(mock, "/v1/chat/completions", max_tokens=10).json["usage"]

    assert usage["completion_tokens"] == 10
    assert usage["completion_tokens_details"]["reasoning_tokens"] == 10


def held_at(reply, at, gate):
    """The reply with a gate before its step `at`."""
    tokens = reply.tokens_by_step
    return replace(reply, steps=(*reply.steps[:at], gate, *reply.steps[at:]),
                   tokens_by_step=(*tokens[:at], *tokens[at - 1:at], *tokens[at:]))


@pytest.mark.parametrize(("shown", "read_ahead", "output_tokens"), [
    (0, 0, 40), (0, 5, 45), (1, 0, 50), (4, 0, 80), (10, 0, 140), (10, 500, 140)])
def test_a_cut_stream_is_billed_for_what_was_made_of_it(mock, shown, read_ahead, output_tokens):
    mock.output_text = " ".join("abcdefghij")             # ten pieces
    mock.output_tokens, mock.reasoning_tokens = 100, 40   # ten tokens each, and forty unseen
    mock.read_ahead_tokens = read_ahead
    gate = Gate()

    mock.script(lambda request: held_at(mock.default_reply(request), 1 + shown, gate))
    with RawClient(mock.port) as client:
        client.request("POST", "/v1/chat/completions",
                       json.dumps({**CHAT, "stream": True}).encode(), OPENAI, token=None)
        client.read_head()
        for _ in range(1 + shown):
            client.read_chunk()
        client.leave()
        mock.wait_for_hang_ups()

    assert mock.bills[-1][1]["completion_tokens"] == output_tokens


def test_a_gate_holds_what_comes_after_it(mock):
    gate = Gate()
    mock.script(Reply(steps=(b"a", gate, b"b"), framing="chunked"))
    with RawClient(mock.port) as client:
        client.request("GET", "/", token=None)
        client.read_head()
        first = client.read_chunk()
        gate.event.set()

        assert (first, client.read_chunk(), client.read_chunk()) == (b"a", b"b", b"")


@pytest.mark.parametrize(("step", "error"), [(Cut(), ConnectionResetError),
                                             (Close(), (AssertionError, ValueError))])
def test_a_cut_stream_ends_without_its_last_chunk(mock, step, error):
    mock.script(Reply(steps=(b"a", step), framing="chunked"))
    with RawClient(mock.port) as client:
        client.request("GET", "/", token=None)
        with pytest.raises(error):
            client.read_answer()


@pytest.mark.parametrize("path", STREAMED)
def test_a_stream_in_pieces_of_one_byte_is_the_same_stream(mock, path):
    def crumbled(request):
        reply = mock.default_reply(request)
        return reply.with_steps([bytes([byte]) for byte in reply.body])

    whole = ask(mock, path, stream=True)
    mock.script(crumbled)
    crumbs = ask(mock, path, stream=True)

    assert crumbs.body == whole.body and set(map(len, crumbs.chunks)) == {1}
    assert mock.bills[0] == mock.bills[1]


@pytest.mark.parametrize("end", ["\n", "\r", "\r\n"])
def test_events_are_parsed_whatever_ends_their_lines(end):
    stream = end.join(["event: a", "data: 1", "data: 2", "", "data:3", "", ""]).encode()

    assert sse_events(stream) == [("a", "1\n2"), (None, "3")]


def test_a_request_that_no_vendor_would_read_fails_the_test():
    with pytest.raises(AssertionError, match="faults inside the mock"):
        with MockProvider() as mock, RawClient(mock.port) as client:
            client.send(b"GET / HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n")
            assert client.is_closed_by_server()


def test_the_mock_leaves_no_thread_behind():
    before = set(threading.enumerate())
    with MockProvider() as mock, RawClient(mock.port):
        assert [thread for thread in threading.enumerate()
                if re.match("mock-accept", thread.name)]

    assert set(threading.enumerate()) - before == set()


# What the vendors' newest types refuse.

SAID = [{"role": "user", "content": "Hi"}]
CALL = {"type": "function_call", "call_id": "c1", "name": "run", "arguments": "{}"}
RESULT = {"type": "function_call_output", "call_id": "c1", "output": "ok"}
SPAWNED = {"type": "agent_message", "author": "/root", "recipient": "/root/errand",
           "content": [{"type": "encrypted_content", "encrypted_content": "go"}]}
TOOLS = {"type": "namespace", "name": "functions", "tools": [
    {"type": "custom", "name": "exec", "format": {"type": "grammar", "syntax": "lark"}}]}


@pytest.mark.parametrize("field, value, beta", [
    ("context_management", {"edits": []}, "context-management-2025-06-27"),
    ("thread", {"type": "create"}, "message-threads-2026-08-12"),
    ("compaction", {"type": "summarize"}, "compact-2026-09-04"),
    ("messages", [*SAID, {"role": "system", "content": "now", "output_config": {"effort": "low"}}],
     "per-turn-control-2026-07-01"),
    ("messages", [*SAID, {"role": "system", "content": [
        {"type": "tool_addition", "tool": {"type": "tool_reference", "name": "x"}}]}],
     "mid-conversation-tool-changes-2026-07-01")])
def test_a_beta_feature_needs_its_header(mock, field, value, beta):
    fields = {**MESSAGE, field: value}
    answers = [call(mock.port, "POST", "/v1/messages", fields, [*ANTHROPIC, *more], token=None)
               for more in ([], [("anthropic-beta", f"other-2026-01-01,{beta}")])]

    assert [400, 200] == [answer.status for answer in answers], answers


@pytest.mark.parametrize("role, block", [
    ("user", {"type": "tool_use", "id": "t1", "name": "run", "input": {}}),
    ("user", {"type": "thinking", "thinking": "", "signature": "s"}),
    ("assistant", {"type": "image", "source": {"type": "url", "url": "https://cave.example/"}}),
    ("user", {"type": "input_text", "text": "Hi"}),
    ("user", {"type": "text", "text": "Hi", "annotations": []})])
def test_a_block_that_is_misplaced_or_unknown_is_refused(mock, role, block):
    messages = [*SAID, {"role": role, "content": [block]}, *SAID]

    assert 400 == ask(mock, "/v1/messages", messages=messages).status


@pytest.mark.parametrize("status, items", [
    (200, [CALL, RESULT]), (400, [CALL]), (400, [RESULT]),
    (400, [{**RESULT, "type": "custom_tool_call_output"}, CALL]),
    (400, [{"role": "assistant", "content": [{"type": "input_text", "text": "Hi"}]}]),
    (400, [{"type": "tool_use", "id": "t1"}]),
    (200, [{"type": "additional_tools", "role": "developer", "tools": [TOOLS]}, SPAWNED]),
    (400, [{"type": "additional_tools", "role": "developer", "tools": [{**TOOLS, "kind": 1}]}])])
def test_the_items_of_a_response_are_judged(mock, status, items):
    assert status == ask(mock, "/v1/responses", input=[*SAID, *items]).status


def test_searches_and_cache_writes_are_billed():
    """gpt-6.2-sol: $2, cached 0.10, written 2.50, out 10 a million; a search is a cent."""
    usage = {"input_tokens": 1_000, "output_tokens": 10, "web_searches": 2,
             "input_tokens_details": {"cached_tokens": 400, "cache_write_tokens": 100}}
    claude = {"input_tokens": 1_000, "output_tokens": 10,
              "server_tool_use": {"web_search_requests": 1}}

    assert 1_000 + 40 + 250 + 100 + 20_000 == exact_microdollars("gpt-6.2-sol", usage)
    assert 4_000 + 200 + 10_000 == exact_microdollars("claude-opus-5-5", claude)
