"""Translated calls over sockets: each dialect's client on the other's model, under a budget."""
import json
from dataclasses import replace

import pytest
from support import (ANTHROPIC_KEY, OPENAI_KEY, Close, Gate, RawClient, Reply, anthropic_error,
                     call, openai_error, program, settled_status, sse, sse_events)
from translation_checker import check_chat_stream, check_message_stream

USER = [{"role": "user", "content": "hello there"}]
ON_CLAUDE = {"model": "claude-haiku-4-5", "messages": USER, "max_tokens": 100}
ON_GPT = {"model": "gpt-4o-mini", "messages": USER, "max_tokens": 100}
CHAT, MESSAGES = "/v1/chat/completions", "/v1/messages"
EACH_WAY = pytest.mark.parametrize("path, fields", [(CHAT, ON_CLAUDE), (MESSAGES, ON_GPT)],
                                   ids=["chat on Claude", "messages on GPT"])


def test_a_chat_client_gets_claudes_answer_as_a_chat_completion(mock, proxy):
    answer = call(proxy.port, "POST", CHAT, ON_CLAUDE)

    body = answer.json
    assert (200, "chat.completion", "claude-haiku-4-5") == (answer.status, body["object"],
                                                            body["model"])
    assert body["choices"][0]["message"]["content"] and body["usage"]["prompt_tokens"] > 0
    seen = mock.seen[0]
    assert ("/v1/messages", ANTHROPIC_KEY, "2023-06-01", None) == (
        seen.path, seen.header("x-api-key"), seen.header("anthropic-version"),
        seen.header("authorization"))
    assert str(mock.billed_microdollars) == answer.header("x-ironcage-cost-microdollars")
    assert answer.header("x-request-id") == answer.header("request-id")
    assert answer.header("x-ironcage-upstream-request-id")


def test_a_messages_client_gets_gpts_answer_as_a_message(mock, proxy):
    answer = call(proxy.port, "POST", MESSAGES + "?beta=true", ON_GPT,
                  [("anthropic-version", "2023-06-01"), ("anthropic-beta", "x-2026-01-01"),
                   ("x-stainless-lang", "python")])

    body = answer.json
    assert (200, "message", "gpt-4o-mini", "end_turn") == (
        answer.status, body["type"], body["model"], body["stop_reason"])
    seen = mock.seen[0]
    assert ("/v1/chat/completions", f"Bearer {OPENAI_KEY}") == (
        seen.target, seen.header("authorization"))
    for name in ("anthropic-version", "anthropic-beta", "x-api-key", "x-stainless-lang"):
        assert seen.header(name) is None
    assert mock.billed_microdollars == settled_status(proxy)["spent_microdollars"] > 0


@EACH_WAY
@pytest.mark.parametrize("stream", [False, True])
def test_a_translated_call_costs_what_the_provider_bills(mock, proxy, path, fields, stream):
    mock.cached_tokens, mock.reasoning_tokens = 3, 2

    call(proxy.port, "POST", path, {**fields, "stream": stream})

    status = settled_status(proxy)
    assert mock.billed_microdollars == status["spent_microdollars"] > 0
    assert 0 == status["bound_exceeded"]


@pytest.mark.parametrize("asks_usage", [False, True])
def test_a_stream_of_claude_reaches_a_chat_client_as_chunks(mock, proxy, asks_usage):
    answer = call(proxy.port, "POST", CHAT, {**ON_CLAUDE, "stream": True, "stream_options": {
        "include_usage": asks_usage}})

    events = sse_events(answer.body)
    assert (None, "[DONE]") == events[-1]
    message, finish, usage = check_chat_stream([json.loads(d) for _, d in events[:-1]], asks_usage)
    assert message["content"] and "stop" == finish
    assert "text/event-stream" == answer.header("content-type")


def test_a_stream_of_gpt_reaches_a_messages_client_as_events(mock, proxy):
    answer = call(proxy.port, "POST", MESSAGES, {**ON_GPT, "stream": True})

    events = sse_events(answer.body)
    assert all(name == json.loads(data)["type"] for name, data in events)
    message = check_message_stream([json.loads(data) for _, data in events])
    assert message["content"][0]["text"] and message["usage"]["output_tokens"] > 0
    assert "gpt-4o-mini" == message["model"]
    assert {"include_usage": True} == mock.seen[0].json["stream_options"]


def test_a_server_that_does_not_know_stream_options_is_not_sent_them(mock, proxy_with):
    proxy = proxy_with({"providers": {"lab": {
        "base_url": mock.url, "key_env": "OPENAI_API_KEY", "stream_usage": False, "free": True}}})

    answer = call(proxy.port, "POST", MESSAGES, {**ON_GPT, "model": "lab/gpt-4o-mini",
                                                 "stream": True})

    assert 200 == answer.status
    assert "stream_options" not in mock.seen[0].json
    assert 100 == mock.seen[0].json["max_tokens"]


def test_what_was_lost_or_changed_is_told_and_strict_refuses_it(mock, proxy_for):
    proxy = proxy_for("--budget", "1")
    fields = {**ON_CLAUDE, "seed": 7, "temperature": 1.5}

    lenient = call(proxy.port, "POST", CHAT, fields)
    strict = call(proxy.port, "POST", CHAT, fields, [("x-ironcage-strict", "1")])
    flag = call(proxy_for("--budget", "1", "--strict").port, "POST", CHAT, fields)

    assert ("seed", "temperature=1") == (lenient.header("x-ironcage-dropped-params"),
                                         lenient.header("x-ironcage-adjusted"))
    assert [200, 400, 400] == [lenient.status, strict.status, flag.status]
    assert "temperature" == strict.json["error"]["param"] or "seed" == strict.json["error"]["param"]
    assert 1 == len(mock.seen)


def test_a_chat_client_without_a_cap_gets_one_that_fits_the_budget(mock, proxy_for):
    proxy = proxy_for("--budget", "0.10", "--no-fit")

    answer = call(proxy.port, "POST", CHAT, {"model": "claude-haiku-4-5", "messages": USER})

    told = int(answer.header("x-ironcage-max-tokens"))
    assert (200, told) == (answer.status, mock.seen[0].json["max_tokens"])
    assert 8_192 <= told <= 10_000                          # half of $0.10 at $5 a million


@EACH_WAY
def test_refusals_of_the_budget_come_in_the_clients_dialect(mock, proxy_for, path, fields):
    answer = call(proxy_for("--budget", "0").port, "POST", path, fields)

    kind = "billing_error" if path == MESSAGES else "iron_cage_budget_exceeded"
    assert (402, kind, []) == (answer.status, answer.json["error"]["type"], mock.seen)


@pytest.mark.parametrize("path, fields, reply, expected", [
    (CHAT, ON_CLAUDE, anthropic_error(429, "slow", "rate_limit_error",
                                      headers=[("retry-after", "7")]), (429, "requests")),
    (CHAT, ON_CLAUDE, anthropic_error(529, "busy", "overloaded_error"), (503, "server_error")),
    (MESSAGES, ON_GPT, openai_error(429, "slow", headers=[("retry-after", "7")]),
     (429, "rate_limit_error")),
    (MESSAGES, ON_GPT, openai_error(401, "bad key"), (401, "authentication_error")),
    (MESSAGES, ON_GPT, openai_error(503, "busy"), (529, "overloaded_error")),
    (MESSAGES, ON_GPT, Reply(502, (("content-type", "text/html"),), (b"<html>bad",)),
     (500, "api_error")),
])
def test_errors_of_the_provider_come_in_the_clients_dialect(mock, proxy, path, fields, reply,
                                                            expected):
    mock.script(reply)

    answer = call(proxy.port, "POST", path, fields)

    assert expected == (answer.status, answer.json["error"]["type"])
    if answer.status == 429:
        assert "7" == answer.header("retry-after")
    assert 0 == settled_status(proxy)["spent_microdollars"]


def test_rate_limits_come_in_the_clients_names_and_forms(mock, proxy):
    mock.script(lambda request: replace(mock.default_reply(request), headers=(
        ("content-type", "application/json"), ("anthropic-ratelimit-requests-remaining", "7"),
        ("anthropic-ratelimit-tokens-reset", "2020-01-01T00:00:00Z"),
        ("anthropic-ratelimit-requests-reset", "soon"))))
    chat = call(proxy.port, "POST", CHAT, ON_CLAUDE)
    mock.script(lambda request: replace(mock.default_reply(request), headers=(
        ("content-type", "application/json"), ("x-ratelimit-limit-tokens", "9"),
        ("x-ratelimit-reset-requests", "1m0s"))))
    message = call(proxy.port, "POST", MESSAGES, ON_GPT)

    assert ("7", "0s", None) == tuple(chat.header(f"x-ratelimit-{name}") for name in (
        "remaining-requests", "reset-tokens", "reset-requests"))
    assert "9" == message.header("anthropic-ratelimit-tokens-limit")
    assert message.header("anthropic-ratelimit-requests-reset").startswith("20")


SSE = (("content-type", "text/event-stream"),)


def test_an_error_as_the_first_event_is_a_status_not_a_broken_stream(mock, proxy):
    mock.script(Reply(headers=SSE, framing="chunked", steps=(sse({
        "type": "error", "error": {"type": "overloaded_error", "message": "busy"}}, "error"),)))

    answer = call(proxy.port, "POST", CHAT, {**ON_CLAUDE, "stream": True})

    assert (503, "busy") == (answer.status, answer.json["error"]["message"])


@EACH_WAY
def test_an_error_in_the_middle_ends_the_stream_in_the_clients_dialect(mock, proxy, path, fields):
    error = sse({"type": "error", "error": {"type": "overloaded_error", "message": "busy"}},
                "error") if path == CHAT else sse({"error": {"message": "busy", "type": "x"}})
    mock.script(lambda request: replace(
        mock.default_reply(request), steps=(*mock.default_reply(request).steps[:4], error)))

    events = sse_events(call(proxy.port, "POST", path, {**fields, "stream": True}).body)

    name, data = events[-1]
    assert (None if path == CHAT else "error") == name
    assert "busy" == json.loads(data)["error"]["message"]
    assert 0 == settled_status(proxy)["reserved_microdollars"]


@EACH_WAY
def test_a_stream_that_breaks_off_ends_with_an_error_and_is_charged(mock, proxy, path, fields):
    mock.script(lambda request: replace(
        mock.default_reply(request), steps=(*mock.default_reply(request).steps[:4], Close())))

    events = sse_events(call(proxy.port, "POST", path, {**fields, "stream": True}).body)

    assert "error" in json.loads(events[-1][1])
    status = settled_status(proxy)
    assert status["spent_microdollars"] >= mock.billed_microdollars > 0


@EACH_WAY
def test_a_client_that_leaves_a_translated_stream_ends_the_call(mock, proxy, path, fields):
    gate = Gate()
    mock.script(lambda request: replace(
        mock.default_reply(request), steps=(*mock.default_reply(request).steps[:5], gate)))
    with RawClient(proxy.port) as client:
        client.request("POST", path, json.dumps({**fields, "stream": True}).encode())
        client.read_head()
        client.read_chunk()
        client.leave()

        mock.wait_for_hang_ups()

    status = settled_status(proxy)
    assert status["spent_microdollars"] >= mock.billed_microdollars


@EACH_WAY
def test_a_quiet_provider_is_covered_by_pings(mock, proxy_for, path, fields):
    """A client that hears nothing for long gives up; Anthropic pings, others keep silent."""
    proxy = proxy_for("--budget", "1", timeouts={"ping_s": 0.05})
    gate = Gate()

    def stop_in_the_middle(request):
        reply = mock.default_reply(request)
        return replace(reply, steps=(*reply.steps[:4], gate, *reply.steps[4:]))

    mock.script(stop_in_the_middle)
    ping = b"event: ping" if path == MESSAGES else b": ping\n\n"
    with RawClient(proxy.port) as client:
        client.request("POST", path, json.dumps({**fields, "stream": True}).encode())
        client.read_head()
        pings = 0
        while pings < 3:
            pings += ping in client.read_chunk()
        gate.event.set()
        rest = b"".join(iter(client.read_chunk, b""))

    assert (b"[DONE]" if path == CHAT else b"message_stop") in rest
    status = settled_status(proxy)
    assert mock.billed_microdollars == status["spent_microdollars"] > 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_for_no_output_is_answered_here(mock, proxy, stream):
    """It warms Anthropic's cache; elsewhere there is none to warm, and nothing to pay."""
    answer = call(proxy.port, "POST", MESSAGES, {**ON_GPT, "max_tokens": 0, "stream": stream})

    body = check_message_stream([json.loads(data) for _, data in sse_events(answer.body)]) \
        if stream else answer.json
    assert (200, [], "max_tokens", "gpt-4o-mini") == (
        answer.status, body["content"], body["stop_reason"], body["model"])
    assert ([], 0) == (mock.seen, settled_status(proxy)["spent_microdollars"])


@pytest.mark.parametrize("thinking, effort, sent, adjusted", [
    ({"type": "enabled"}, None, {"type": "enabled", "budget_tokens": 3999}, "thinking=medium"),
    ({"type": "enabled", "budget_tokens": None}, "minimal",
     {"type": "enabled", "budget_tokens": 1024}, "thinking=minimal"),
    ({"type": "adaptive"}, None, {"type": "enabled", "budget_tokens": 3999}, "thinking=medium"),
    (True, None, {"type": "enabled", "budget_tokens": 3999}, "thinking=medium"),
    (False, None, None, "thinking=none"),
    ({"type": "disabled"}, None, {"type": "disabled"}, None),
    ({"type": "enabled", "budget_tokens": 2000}, None,
     {"type": "enabled", "budget_tokens": 2000}, None)])
def test_thinking_without_a_budget_as_other_servers_have_it_is_an_effort(
        mock, proxy, thinking, effort, sent, adjusted):
    asked = {**ON_CLAUDE, "max_completion_tokens": 4000, "thinking": thinking,
             **({"reasoning_effort": effort} if effort else {})}

    answer = call(proxy.port, "POST", CHAT, asked)

    assert 200 == answer.status, answer.body
    assert (sent, adjusted) == (mock.seen[0].json.get("thinking"),
                                answer.header("x-ironcage-adjusted"))


def test_a_chat_client_can_name_features_of_anthropic(mock, proxy_for):
    """With the header of their SDK, as with extra_body; a file of theirs brings its own."""
    proxy, named = proxy_for(), [("anthropic-beta", "x-2026-01-01")]
    part = {"type": "file", "file": {"file_id": "file_1"}}

    call(proxy.port, "POST", CHAT, ON_CLAUDE, named)
    call(proxy.port, "POST", CHAT, {**ON_CLAUDE, "messages": [
        {"role": "user", "content": [part]}]}, named)

    assert ["x-2026-01-01", "x-2026-01-01,files-api-2025-04-14"] == [
        seen.header("anthropic-beta") for seen in mock.seen]


@pytest.mark.parametrize("model", ["gpt-5.5", "gpt-5.6-terra", "gpt-6-astra", "gpt-6.1-sol"])
def test_a_messages_client_thinks_beside_tools_on_models_whose_chat_refuses_that(
        mock, proxy, model):
    """What Claude Code sends; OpenAI takes tools beside an effort in Responses alone."""
    mock.models.add(model)
    answer = call(proxy.port, "POST", MESSAGES, {
        **ON_GPT, "model": model, "thinking": {"type": "adaptive"},
        "output_config": {"effort": "high"},
        "tools": [{"name": "f", "input_schema": {"type": "object"}}]})

    assert (200, "/v1/responses") == (answer.status, mock.seen[0].path)
    sent = mock.seen[0].json
    assert ({"effort": "high"}, "f", False) == (
        sent["reasoning"], sent["tools"][0]["name"], sent["store"])
    assert answer.header("x-ironcage-adjusted") is None


RESPONSES = "/v1/responses"
ASKED = {CHAT: {"messages": USER}, MESSAGES: {"messages": USER, "max_tokens": 50},
         RESPONSES: {"input": "hi"}}


@pytest.mark.parametrize("path, model, flags, called", [
    (CHAT, "gpt-6.1-sol", (), CHAT), (RESPONSES, "gpt-4o-mini", (), RESPONSES),
    (MESSAGES, "gpt-4o-mini", (), CHAT), (MESSAGES, "gpt-5.5", (), RESPONSES),
    (MESSAGES, "o3", (), RESPONSES), (MESSAGES, "gpt-5.5", ("--openai-chat-only",), CHAT),
    (RESPONSES, "gpt-5.5", ("--openai-chat-only",), CHAT),
    (CHAT, "claude-haiku-4-5", (), MESSAGES), (RESPONSES, "claude-haiku-4-5", (), MESSAGES),
    # Price rows say of these that they are called in Responses only.
    (CHAT, "gpt-5-pro", (), RESPONSES), (MESSAGES, "gpt-5-pro", (), RESPONSES)])
def test_a_model_is_called_in_an_api_that_its_provider_has_for_it(
        mock, proxy_for, path, model, flags, called):
    proxy = proxy_for("--budget", "100", *flags)

    answer = call(proxy.port, "POST", path, {**ASKED[path], "model": model})

    assert (200, [called]) == (answer.status, [request.path for request in mock.seen])
    assert mock.billed_microdollars == settled_status(proxy)["spent_microdollars"] > 0


@pytest.mark.parametrize("streams", [False, True])
def test_a_gateway_without_responses_is_told_by_its_404_what_to_set(mock, proxy, streams):
    mock.script(openai_error(404, "no such route"))

    answer = call(proxy.port, "POST", MESSAGES, {
        **ASKED[MESSAGES], "model": "gpt-5.5", "stream": streams})

    assert (404, "not_found_error") == (answer.status, answer.json["error"]["type"])
    assert "--openai-chat-only" in answer.json["error"]["message"]
    assert 0 == settled_status(proxy)["spent_microdollars"]


def test_the_tokens_of_a_model_elsewhere_are_estimated_and_said_so(mock, proxy):
    answer = call(proxy.port, "POST", "/v1/messages/count_tokens?beta=true",
                  {"model": "gpt-4o-mini", "messages": USER})

    assert (200, "1") == (answer.status, answer.header("x-ironcage-estimated"))
    assert 5 < answer.json["input_tokens"] < 30
    assert ([], 0) == (mock.seen, settled_status(proxy)["spent_microdollars"])


@pytest.mark.parametrize("cut", [1, 7, 64])
def test_events_that_are_cut_anywhere_are_translated_alike(mock, proxy, cut):
    def chopped(request):
        body = mock.default_reply(request).body
        return replace(mock.default_reply(request), tokens_by_step=(), steps=tuple(
            body[at:at + cut] for at in range(0, len(body), cut)))

    whole = call(proxy.port, "POST", CHAT, {**ON_CLAUDE, "stream": True}).body
    mock.script(chopped)
    pieces = call(proxy.port, "POST", CHAT, {**ON_CLAUDE, "stream": True}).body

    def said(body):
        return [json.loads(data)["choices"][0]["delta"] for _, data in sse_events(body)
                if data != "[DONE]"]

    assert said(whole) == said(pieces)


def test_the_echo_model_answers_each_dialect_without_translation(proxy_for):
    proxy = proxy_for(environ={})

    for path in (CHAT, MESSAGES):
        assert 200 == call(proxy.port, "POST", path, {**ON_GPT, "model": program().ECHO_MODEL}
                           ).status


@EACH_WAY
@pytest.mark.parametrize("wrong", [
    {"tools": "many"}, {"tools": [{"type": {}}]}, {"stop": 7, "stop_sequences": 7},
    {"messages": [{"role": "user", "content": 7}]}, {"messages": ["x"]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": {}}]}]}])
def test_a_request_of_the_wrong_shape_is_a_400_and_nothing_is_spent(mock, proxy, path, fields,
                                                                    wrong):
    answer = call(proxy.port, "POST", path, {**fields, **wrong})

    assert answer.status in (200, 400)
    assert answer.status == 200 or "invalid_request_error" == answer.json["error"]["type"]
    status = settled_status(proxy)
    assert mock.billed_microdollars == status["spent_microdollars"]


@EACH_WAY
def test_an_answer_of_the_wrong_shape_is_a_502_and_is_charged(mock, proxy, path, fields):
    usage = {"input_tokens": 5, "output_tokens": 5} if path == CHAT else {
        "prompt_tokens": 5, "completion_tokens": 5}
    mock.script(Reply(steps=(json.dumps({
        "content": [{"type": "tool_use", "name": {}}], "usage": usage, "stop_details": 7,
        "choices": [{"index": 0, "message": {"tool_calls": [{"function": {"name": {}}}]}}],
    }).encode(),)))

    answer = call(proxy.port, "POST", path, fields)

    assert answer.status in (200, 502)
    assert settled_status(proxy)["spent_microdollars"] > 0


def test_an_error_under_a_200_is_an_error(mock, proxy):
    """OpenRouter answers so when its provider fails; it is never an empty message."""
    mock.script(Reply(200, steps=(json.dumps({"error": {"message": "boom", "code": 502}}).encode(),)))

    answer = call(proxy.port, "POST", MESSAGES, ON_GPT)

    assert (500, "error", "boom") == (answer.status, answer.json["type"],
                                      answer.json["error"]["message"])
    assert 0 == settled_status(proxy)["reserved_microdollars"]


THOUGHT = {"type": "thinking", "thinking": "hm", "signature": "signed-by-claude"}
CALLED = {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {}}


def thoughtful_call(stream):
    """Claude thinks, and calls a tool."""
    usage = {"input_tokens": 5, "output_tokens": 5}
    message = {"id": "msg_1", "type": "message", "role": "assistant", "model": "claude-haiku-4-5",
               "stop_sequence": None, "usage": usage}
    if not stream:
        return Reply(steps=(json.dumps({**message, "stop_reason": "tool_use",
                                        "content": [THOUGHT, CALLED]}).encode(),))
    return Reply(headers=SSE, framing="chunked", steps=tuple(sse(event, event["type"]) for event in (
        {"type": "message_start", "message": {**message, "stop_reason": None, "content": []}},
        {"type": "content_block_start", "index": 0, "content_block": {
            "type": "thinking", "thinking": "", "signature": ""}},
        {"type": "content_block_delta", "index": 0, "delta": {
            "type": "thinking_delta", "thinking": "hm"}},
        {"type": "content_block_delta", "index": 0, "delta": {
            "type": "signature_delta", "signature": "signed-by-claude"}},
        {"type": "content_block_stop", "index": 0},
        {"type": "content_block_start", "index": 1, "content_block": CALLED},
        {"type": "content_block_stop", "index": 1},
        {"type": "message_delta", "delta": {"stop_reason": "tool_use"}, "usage": usage},
        {"type": "message_stop"})))


@pytest.mark.parametrize("stream", [False, True])
def test_thinking_behind_a_tool_call_goes_back_to_claude_though_its_client_forgot_it(
        mock, proxy, stream):
    tools = [{"type": "function", "function": {"name": "f"}}]
    asked = {**ON_CLAUDE, "tools": tools, "reasoning_effort": "low", "max_tokens": 4000}
    rebuilt = {**asked, "messages": [*USER, {"role": "assistant", "tool_calls": [
        {"id": "toolu_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "toolu_1", "content": "R"}]}
    mock.script(thoughtful_call(stream))

    call(proxy.port, "POST", CHAT, {**asked, "stream": stream})
    again = call(proxy.port, "POST", CHAT, rebuilt)
    elsewhere = call(proxy.port, "POST", CHAT, {**rebuilt, "model": "claude-sonnet-4-5"})

    sent, other = (seen.json for seen in mock.seen[1:])
    assert ([THOUGHT, CALLED], "enabled") == (sent["messages"][1]["content"],
                                              sent["thinking"]["type"])
    assert ([CALLED], False) == (other["messages"][1]["content"], "thinking" in other)
    assert (None, "thinking") == (again.header("x-ironcage-dropped-params"),
                                  elsewhere.header("x-ironcage-dropped-params"))


@pytest.mark.parametrize("path, fields, param", [
    ("/v1/responses", {"input": [{"role": "user", "content": [
        {"type": "input_image", "image_url": "http://x/y.png", "detail": "auto"}]}]}, "input"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "http://x/y.png"}}]}]}, "messages")])
def test_content_that_claude_does_not_take_is_refused_by_the_clients_name_of_it(
        mock, proxy, path, fields, param):
    answer = call(proxy.port, "POST", path, {"model": "claude-haiku-4-5", **fields})

    assert (400, param) == (answer.status, answer.json["error"]["param"])
    assert not mock.seen
