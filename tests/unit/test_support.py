"""The mock itself: its shapes, its strictness, its bills, its scripts. Bills are worked by hand."""
import inspect
import json
import re
import threading
from dataclasses import replace

import pytest
from support import (ANTHROPIC_KEY, OPENAI_KEY, Close, Cut, Gate, MockProvider, RawClient, Reply,
                     call, each, each_seed, exact_microdollars, recordings, seeds, sse_events)
from translation_checker import (check_chat_stream, check_message_stream, check_response,
                                 check_response_stream)
from vendor_answers import Refuse, Say, Speaker, Think, Use, openai_seal
from vendor_rules import refused_by_openai, refused_by_responses

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
    streamed = "".join(text_of(path, event) for event in documents(ask(mock, path, stream=True)))

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
    mock.output_text = "la " * 20

    assert finish in ask(mock, path, **{cap: 16}).body.decode()
    assert mock.bills[-1][1].get("completion_tokens", mock.bills[-1][1].get("output_tokens")) == 16


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


THOUGHT = {"type": "reasoning", "id": "rs_1", "summary": [],
           "encrypted_content": openai_seal("a thought")}
SPOKEN = {"role": "assistant", "content": [{"type": "output_text", "text": "Hi"}]}
FUNCTION = {"type": "function", "name": "run", "parameters": {"type": "object"}}
SPACE = {"type": "namespace", "name": "cave", "description": "", "tools": [FUNCTION]}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"],
          "additionalProperties": False}
FORMAT = {"type": "json_schema", "name": "answer", "schema": SCHEMA, "strict": True}
PIXEL = "data:image/png;base64,iVBORw0KGgo="


def items(*more, **fields):
    return {"input": [*SAID, *more], "store": False, **fields}


def said(*parts):
    return {"input": [{"role": "user", "content": list(parts)}]}


# What each rule of Responses lets pass and what it refuses, with words of the refusal.
RULES_OF_RESPONSES = {
    "reasoning comes before what it led to": (
        items(THOUGHT, SPOKEN), items(THOUGHT), "without its required following item"),
    "reasoning is not followed by a user": (
        items(THOUGHT, CALL, RESULT), items(THOUGHT, *SAID), "required following item"),
    "what is stored is followed by the very item": (
        items(THOUGHT, {**SPOKEN, "id": "msg_1"}, store=None),
        items(THOUGHT, SPOKEN, store=None), "required following item"),
    "reasoning that is stored nowhere brings its content": (
        items({**THOUGHT, "content": None}, SPOKEN),
        items({**THOUGHT, "encrypted_content": None}, SPOKEN), "not persisted"),
    "reasoning is OpenAI's own": (
        items(THOUGHT, SPOKEN), items({**THOUGHT, "encrypted_content": "icx1.e30"}, SPOKEN),
        "could not be verified"),
    "reasoning has a summary": (
        items(THOUGHT, SPOKEN),
        items({name: value for name, value in THOUGHT.items() if name != "summary"}, SPOKEN),
        "Missing required parameter: 'input[1].summary'"),
    "ids are not used twice": (
        items(THOUGHT, CALL, RESULT), items(THOUGHT, THOUGHT, SPOKEN), "Duplicate item found"),
    "ids tell their kind": (
        items({**CALL, "id": "fc_1"}, RESULT), items({**CALL, "id": "call_1"}, RESULT),
        "Expected an ID that begins with 'fc'"),
    "ids of calls have 64 characters": (
        items({**CALL, "call_id": "c" * 64}, {**RESULT, "call_id": "c" * 64}),
        items({**CALL, "call_id": "c" * 65}, {**RESULT, "call_id": "c" * 65}), "string too long"),
    "results of tools are parts that go in": (
        items(CALL, {**RESULT, "output": [{"type": "input_image", "image_url": PIXEL}]}),
        items(CALL, {**RESULT, "output": [{"type": "output_text", "text": "x"}]}), "output_text"),
    "calls say their namespace": (
        items({**CALL, "namespace": "cave"}, RESULT, tools=[SPACE]),
        items(CALL, RESULT, tools=[SPACE]), "Missing namespace for function_call 'run'"),
    "an image is a URL": (
        said({"type": "input_image", "image_url": PIXEL}),
        said({"type": "input_image", "image_url": {"url": PIXEL}}), "Expected a valid URL"),
    "a file has a name": (
        said({"type": "input_file", "filename": "a.pdf",
              "file_data": "data:application/pdf;base64,JVBERg=="}),
        said({"type": "input_file", "file_data": "data:application/pdf;base64,JVBERg=="}),
        "Missing required parameter: 'input[0].content[0].filename'"),
    "a file is a data URL": (
        said({"type": "input_file", "file_url": "https://cave.example/a.pdf"}),
        said({"type": "input_file", "filename": "a.pdf", "file_data": "JVBERg=="}), "data URL"),
    "parts have known fields": (
        said({"type": "input_text", "text": "Hi"}),
        said({"type": "input_text", "text": "Hi", "cache_control": {"type": "ephemeral"}}),
        "Unknown parameter: 'input[0].content[0].cache_control'"),
    "objects have known fields": (
        {"reasoning": {"effort": "low"}}, {"reasoning": {"budget_tokens": 1024}},
        "Unknown parameter: 'reasoning.budget_tokens'"),
    "only what can be included is asked for": (
        {"include": ["reasoning.encrypted_content"]}, {"include": ["reasoning.content"]},
        "Supported values are"),
    "an effort is the family's": (
        {"reasoning": {"effort": "xhigh"}}, {"reasoning": {"effort": "max"}},
        "Unsupported value: 'max' is not supported with the 'gpt-5.5' model"),
    "the newest families always reason": (
        {"model": "gpt-6.1-sol", "reasoning": {"effort": "max"}},
        {"model": "gpt-6.1-sol", "reasoning": {"effort": "none"}}, "Unsupported value: 'none'"),
    "what does not reason has no effort": (
        {"model": "gpt-4o-mini"}, {"model": "gpt-4o-mini", "reasoning": {"effort": "low"}},
        "'reasoning.effort' is not supported with this model"),
    "what does not reason encrypts nothing": (
        {"model": "gpt-4o-mini"},
        {"model": "gpt-4o-mini", "include": ["reasoning.encrypted_content"]},
        "Encrypted content is not supported"),
    "what reasons is not sampled": (
        {"model": "gpt-4o-mini", "temperature": 0.5}, {"temperature": 0.5},
        "'temperature' is not supported with this model"),
    "a cap is 16 or more": (
        {"max_output_tokens": 16}, {"max_output_tokens": 15}, "Expected a value >= 16"),
    "a format is flat and has a name": (
        {"text": {"format": FORMAT}},
        {"text": {"format": {"type": "json_schema", "json_schema": FORMAT}}},
        "Unknown parameter: 'text.format.json_schema'"),
    "a strict schema is closed": (
        {"text": {"format": {**FORMAT, "strict": False, "schema": {"type": "object"}}}},
        {"text": {"format": {**FORMAT, "schema": {"type": "object"}}}}, "additionalProperties"),
    "JSON is asked for by name": (
        {"input": "Say it in JSON.", "text": {"format": {"type": "json_object"}}},
        {"text": {"format": {"type": "json_object"}}}, "must contain the word 'json'"),
    "a function takes an object": (
        {"tools": [FUNCTION]}, {"tools": [{**FUNCTION, "parameters": {"type": "string"}}]},
        "schema must be a JSON Schema of 'type: \"object\"'"),
    "a function is flat": (
        {"tools": [FUNCTION]}, {"tools": [{"type": "function", "function": {"name": "run"}}]},
        "Unknown parameter: 'tools[0].function'"),
    "a forced tool is offered": (
        {"tools": [FUNCTION], "tool_choice": {"type": "function", "name": "run"}},
        {"tools": [FUNCTION], "tool_choice": {"type": "function", "name": "walk"}},
        "Tool choice 'function' not found"),
    "some tool is offered": (
        {"tool_choice": "auto"}, {"tool_choice": "required"}, "must be specified with 'tools'"),
    "there are no stop sequences": ({"user": "me"}, {"stop": ["END"]}, "Unknown parameter: 'stop'"),
    "usage is not asked for": (
        {"stream": True, "stream_options": {"include_obfuscation": False}},
        {"stream": True, "stream_options": {"include_usage": True}},
        "Unknown parameter: 'stream_options.include_usage'"),
    "metadata are strings": (
        {"metadata": {"a": "1"}}, {"metadata": {"a": 1}}, "Invalid 'metadata'"),
}


@pytest.mark.parametrize("rule", RULES_OF_RESPONSES)
def test_responses_are_refused_as_openai_refuses_them(mock, rule):
    passes, refused, words = RULES_OF_RESPONSES[rule]
    answer, error = (ask(mock, "/v1/responses", **fields) for fields in (passes, refused))

    assert (200, 400) == (answer.status, error.status), answer.body
    assert words in error.json["error"]["message"]


def test_recorded_requests_of_responses_pass_the_rules_as_they_passed_the_vendor():
    """But those with a prompt of the vendor's own, that need no input. What was refused for more
    than the shape of the request (keys, models, temperatures) is not judged."""
    counts = {True: 0, False: 0}
    for name, exchange in recordings():
        fields, status = exchange["request"]["body"], exchange["response"]["status"]
        if name.startswith("openai/responses") and isinstance(fields, dict) and "input" in fields \
                and exchange["request"]["path"].endswith("/responses"):
            fault = refused_by_responses(fields)
            if status == 200:
                assert fault is None, name
            counts[fault is None] += 1

    assert counts[True] > 90 and counts[False] >= 1


# Recorded streams from before the events had numbers, and files that were shortened by hand.
NOT_AS_STREAMED = {"response-function-call-streamed", "response-tools-stream",
                   "async-model-schema", "openai-responses-stream-1", "openai-apply-patch-tool.1",
                   "openai-phase.1", "openai-phase.1---fixtures-", "openai-shell-tool.1",
                   "programmatic-tool-calling.2", "openai-previous-response-id-auto-mode",
                   "openai-responses-model-mcp-list-tools-stream-backfills-missing-results"}


def test_recorded_responses_pass_the_checker():
    count = 0
    for name, exchange in recordings():
        answer = exchange["response"]
        if not name.startswith("openai/responses") \
                or name[:-len(".json")].partition("--")[2] in NOT_AS_STREAMED:
            continue
        body = answer.get("body")
        if "sse" in answer:
            check_response_stream([json.loads(data) for _, data in sse_events(
                answer["sse"].encode())])
        elif isinstance(body, dict) and body.get("object") == "response" \
                and body["status"] != "queued":
            check_response(body)
        count += 1

    assert count > 100


EVENTS_BROKEN = {
    "a number is missing": lambda events: events[:3] + events[4:],
    "nothing was created": lambda events: events[1:],
    "a delta is lost": lambda events: without(events, "response.output_text.delta"),
    "arguments are lost": lambda events: without(events, "response.function_call_arguments.delta"),
    "a summary is lost": lambda events: without(events, "response.reasoning_summary_text.delta"),
    "a part is left open": lambda events: without(events, "response.content_part.done"),
    "an item is left open": lambda events: without(events, "response.output_item.done"),
    "an item is never opened": lambda events: without(events, "response.output_item.added"),
    "arguments are never done": lambda events: without(
        events, "response.function_call_arguments.done"),
    "it ends twice": lambda events: [*events, events[-1]],
    "something follows the end": lambda events: [*events, events[1]],
    "it does not end": lambda events: events[:-1],
    "the whole lacks an item": lambda events: [*events[:-1], {**events[-1], "response": {
        **events[-1]["response"], "output": events[-1]["response"]["output"][1:]}}],
    "an index is skipped": lambda events: [
        {**event, "output_index": event["output_index"] + (event["output_index"] > 0)}
        if "output_index" in event else event for event in events],
}


def without(events, kind):
    """The events without the last one of a kind."""
    last = max(place for place, event in enumerate(events) if event["type"] == kind)
    return events[:last] + events[last + 1:]


@pytest.fixture
def speaker():
    with Speaker() as provider:
        yield provider


EVERYTHING = (Think("Hm, so it is."), Say("Grüße 🐤."), Use("run", {"command": "echo é"}),
              Use("cave.patch", "*** Begin\n"), Think("And?"), Say("Done."))


@pytest.mark.parametrize("broken", EVENTS_BROKEN)
def test_the_checker_of_responses_sees_what_is_wrong(speaker, broken):
    speaker.says(*EVERYTHING)
    events = documents(ask(speaker, "/v1/responses", stream=True,
                           reasoning={"summary": "auto"}))
    assert check_response_stream(events)
    events = EVENTS_BROKEN[broken](events)
    numbers = {} if broken == "a number is missing" else {"renumber": True}

    with pytest.raises((AssertionError, KeyError, IndexError)):
        check_response_stream([{**event, "sequence_number": number} if numbers else event
                               for number, event in enumerate(events)])


@pytest.mark.parametrize("ending", ["end", "length", "filter"])
@pytest.mark.parametrize("parts", [EVERYTHING, (Say("Yes."),), (Refuse("No, never."),),
                                   (Use("run", {}),), ()])
def test_what_is_said_is_the_same_whole_and_streamed(speaker, ending, parts):
    for path in ("/v1/responses", "/v1/messages", "/v1/chat/completions"):
        said = [part for part in parts if "messages" not in path or not isinstance(part, Use)
                or isinstance(part.arguments, dict)]               # Claude has no custom tools
        for _ in range(2):
            speaker.says(*said, ending=ending)
        whole = ask(speaker, path).json
        more = {"stream_options": {"include_usage": True}} if "chat" in path else {}
        events = documents(ask(speaker, path, stream=True, **more))

        if path == "/v1/responses":
            folded = check_response_stream(events)
            assert [shape(item) for item in whole["output"]] == [
                shape(item) for item in folded["output"]]
        elif path == "/v1/messages":
            folded = check_message_stream(events)
            assert [shape(block) for block in whole["content"]] == [
                shape(block) for block in folded["content"]]
        else:
            folded, finish, _ = check_chat_stream(events, asks_usage=True)
            message = whole["choices"][0]["message"]
            assert (finish, message["content"] or "") == (
                whole["choices"][0]["finish_reason"], folded["content"])
            assert len(message.get("tool_calls", ())) == len(folded.get("tool_calls", ()))
        made = [usage.get("output_tokens", usage.get("completion_tokens"))
                for _, usage, _ in speaker.bills[-2:]]
        assert made[0] == made[1]


def shape(value):
    """An item or block without its ids and what is encrypted anew."""
    return {name: inner for name, inner in value.items()
            if name not in ("id", "call_id", "encrypted_content")}


def test_a_thought_that_came_back_changed_is_refused(speaker):
    speaker.says(Think("Hm."), Say("Yes."))
    speaker.says(Say("Again."))
    speaker.says(Say("Again."))
    said = ask(speaker, "/v1/messages").json["content"]
    changed = [{**said[0], "thinking": "Hm"}, said[1]]

    answers = [ask(speaker, "/v1/messages", messages=[
        *SAID, {"role": "assistant", "content": content}, *SAID]) for content in (said, changed)]

    assert [200, 400] == [answer.status for answer in answers]
    assert "Invalid `signature`" in answers[1].json["error"]["message"]


def test_models_of_responses_alone_refuse_chat(mock):
    answer = ask(mock, "/v1/chat/completions", model="gpt-5.4-pro")

    assert (404, True) == (answer.status, "only supported in v1/responses" in answer.json["error"][
        "message"])


def test_a_function_of_chat_takes_an_object_too():
    tool = {"type": "function", "function": {"name": "run", "parameters": {"type": "array"}}}

    assert "type: \"object\"" in refused_by_openai({**CHAT, "tools": [tool]})


def test_searches_and_cache_writes_are_billed():
    """gpt-6.2-sol: $2, cached 0.10, written 2.50, out 10 a million; a search is a cent."""
    usage = {"input_tokens": 1_000, "output_tokens": 10, "web_searches": 2,
             "input_tokens_details": {"cached_tokens": 400, "cache_write_tokens": 100}}
    claude = {"input_tokens": 1_000, "output_tokens": 10,
              "server_tool_use": {"web_search_requests": 1}}

    assert 1_000 + 40 + 250 + 100 + 20_000 == exact_microdollars("gpt-6.2-sol", usage)
    assert 4_000 + 200 + 10_000 == exact_microdollars("claude-opus-5-5", claude)


# Rows in one test.

def test_each_row_of_a_table_is_tried_and_the_failure_names_those_that_failed():
    tried = []

    @each("number, word", [(1, "one"), (2, "two"), (3, "three"), (4, "four")])
    def even(number, word, tmp_path):
        tried.append((number, word, tmp_path))
        assert number % 2 == 0

    assert ["tmp_path"] == [*inspect.signature(even).parameters]
    with pytest.raises(AssertionError) as caught:
        even(tmp_path="folder")
    assert "with number=1, word='one'; number=3, word='three' (2 of 4)" == str(caught.value)
    assert [(1, "one", "folder"), (4, "four", "folder")] == [tried[0], tried[-1]]


def test_a_row_that_does_not_raise_as_it_should_is_named_too():
    @each_seed(2)
    def raises(seed):
        with pytest.raises(ValueError):
            int(str(seed) * seed or "none")

    with pytest.raises(AssertionError, match=r"seed=1 \(1 of 2\)"):
        raises()


def test_seeds_after_the_first_are_long_tests():
    @each_seed(3, 5)
    def tried(seed):
        assert seed < 3

    first, others = tried.pytestmark[0].args[1]
    tried(seeds=first)
    with pytest.raises(AssertionError, match="seed=3; seed=4"):
        tried(*others.values)
    assert ["soak"] == [mark.name for mark in others.marks]
    assert [0, 1] == seeds(2, 3)[:2] and (2,) == seeds(2, 3)[2].values
