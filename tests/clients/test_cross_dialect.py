"""The official SDKs on the other vendor's models: helpers, tool loops, structured output, errors."""
import json

import pytest
from support import TOKEN, Reply, anthropic_error, openai_error, settled_status, sse

openai = pytest.importorskip("openai")
anthropic = pytest.importorskip("anthropic")
pydantic = pytest.importorskip("pydantic")

USER = [{"role": "user", "content": "hello"}]
CLAUDE, GPT = "claude-haiku-4-5", "gpt-4o-mini"
WEATHER = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"],
           "additionalProperties": False}
SSE = (("content-type", "text/event-stream"),)


@pytest.fixture
def openai_client(proxy):
    with openai.OpenAI(base_url=proxy.url + "/v1", api_key=TOKEN, max_retries=0) as client:
        yield client


@pytest.fixture
def anthropic_client(proxy):
    with anthropic.Anthropic(base_url=proxy.url, api_key=TOKEN, max_retries=0) as client:
        yield client


def claude_says(*content, stop="end_turn"):
    usage = {"input_tokens": 10, "output_tokens": 5}
    return Reply(steps=(json.dumps({
        "id": "msg_1", "type": "message", "role": "assistant", "model": CLAUDE,
        "content": content, "stop_reason": stop, "stop_sequence": None,
        "usage": usage}).encode(),), bills=(CLAUDE, usage))


def gpt_says(finish="stop", **said):
    usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
    return Reply(steps=(json.dumps({
        "id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": GPT,
        "choices": [{"index": 0, "finish_reason": finish, "logprobs": None,
                     "message": {"role": "assistant", "content": None, **said}}],
        "usage": usage}).encode(),), bills=(GPT, usage))


# The openai SDK on Claude.

def test_openai_create_and_stream_on_claude(mock, proxy, openai_client):
    whole = openai_client.chat.completions.create(model=CLAUDE, messages=USER, max_tokens=50)
    with openai_client.chat.completions.stream(
            model=CLAUDE, messages=USER, max_tokens=50,
            stream_options={"include_usage": True}) as stream:
        folded = stream.get_final_completion()

    assert whole.choices[0].message.content == folded.choices[0].message.content != ""
    assert "stop" == whole.choices[0].finish_reason == folded.choices[0].finish_reason
    assert whole.usage.completion_tokens == folded.usage.completion_tokens > 0
    assert mock.billed_microdollars == settled_status(proxy)["spent_microdollars"]


def test_openai_tool_loop_with_two_parallel_calls_on_claude(mock, openai_client):
    tools = [{"type": "function", "function": {"name": "get.weather", "parameters": WEATHER}}]
    mock.script(lambda request: claude_says(
        {"type": "text", "text": "Looking."},
        *[{"type": "tool_use", "id": f"toolu_{city}", "name": request.json["tools"][0]["name"],
           "input": {"city": city}} for city in ("Oslo", "Rome")], stop="tool_use"))
    first = openai_client.chat.completions.create(
        model=CLAUDE, messages=USER, tools=tools, max_tokens=50)
    said = first.choices[0].message
    assert [("get.weather", "Oslo"), ("get.weather", "Rome")] == [
        (c.function.name, json.loads(c.function.arguments)["city"]) for c in said.tool_calls]

    openai_client.chat.completions.create(
        model=CLAUDE, tools=tools, max_tokens=50, messages=[
            *USER, said, *({"role": "tool", "tool_call_id": c.id, "content": "sunny"}
                           for c in reversed(said.tool_calls))])

    turns = mock.seen[1].json["messages"]
    assert ["user", "assistant", "user"] == [turn["role"] for turn in turns]
    assert ["text", "tool_use", "tool_use"] == [b["type"] for b in turns[1]["content"]]
    assert ["toolu_Oslo", "toolu_Rome"] == [b["tool_use_id"] for b in turns[2]["content"]]


def test_openai_streamed_tool_calls_on_claude(mock, openai_client):
    def event(kind, **more):
        return sse({"type": kind, **more}, kind)

    def block(index, city):
        yield event("content_block_start", index=index, content_block={
            "type": "tool_use", "id": f"toolu_{city}", "name": "weather", "input": {}})
        for part in ('{"ci', f'ty": "{city}"', "}"):
            yield event("content_block_delta", index=index, delta={
                "type": "input_json_delta", "partial_json": part})
        yield event("content_block_stop", index=index)

    usage = {"input_tokens": 10, "output_tokens": 5}
    mock.script(Reply(headers=SSE, framing="chunked", bills=(CLAUDE, usage), steps=(
        event("message_start", message={
            "id": "msg_1", "type": "message", "role": "assistant", "model": CLAUDE, "content": [],
            "stop_reason": None, "stop_sequence": None, "usage": usage}),
        *block(0, "Oslo"), *block(1, "Rome"),
        event("message_delta", delta={"stop_reason": "tool_use", "stop_sequence": None},
              usage={"output_tokens": 5}), event("message_stop"))))

    with openai_client.chat.completions.stream(
            model=CLAUDE, messages=USER, max_tokens=50, tools=[
                {"type": "function", "function": {"name": "weather", "parameters": WEATHER,
                                                  "strict": True}}]) as stream:
        calls = stream.get_final_completion().choices[0].message.tool_calls

    assert [("toolu_Oslo", {"city": "Oslo"}), ("toolu_Rome", {"city": "Rome"})] == [
        (c.id, c.function.parsed_arguments) for c in calls]


def test_openai_parse_with_a_pydantic_schema_on_claude(mock, openai_client):
    class Answer(pydantic.BaseModel):
        city: str
        degrees: int

    mock.script(claude_says({"type": "text", "text": '{"city": "Oslo", "degrees": 7}'}))

    parsed = openai_client.chat.completions.parse(
        model=CLAUDE, messages=USER, max_tokens=50, response_format=Answer)

    assert Answer(city="Oslo", degrees=7) == parsed.choices[0].message.parsed
    sent = mock.seen[0].json["output_config"]["format"]
    assert ("json_schema", False) == (sent["type"], sent["schema"]["additionalProperties"])


def test_thinking_survives_an_openai_clients_history(mock, openai_client):
    thinking = {"type": "thinking", "thinking": "Hm.", "signature": "sig-1"}
    mock.script(claude_says(thinking, {"type": "text", "text": "Yes."}))
    first = openai_client.chat.completions.create(model=CLAUDE, messages=USER, max_tokens=50)

    openai_client.chat.completions.create(model=CLAUDE, max_tokens=50, messages=[
        *USER, first.choices[0].message, *USER])

    assert [thinking, {"type": "text", "text": "Yes."}] == mock.seen[1].json["messages"][1][
        "content"]


@pytest.mark.parametrize("reply, exception", [
    (anthropic_error(400, "bad"), "BadRequestError"),
    (anthropic_error(401, "no", "authentication_error"), "AuthenticationError"),
    (anthropic_error(403, "no", "permission_error"), "PermissionDeniedError"),
    (anthropic_error(404, "?", "not_found_error"), "NotFoundError"),
    (anthropic_error(429, "slow", "rate_limit_error"), "RateLimitError"),
    (anthropic_error(529, "busy", "overloaded_error"), "InternalServerError")])
def test_openai_raises_what_its_users_expect_of_claudes_errors(mock, openai_client, reply,
                                                               exception):
    mock.script(reply)

    with pytest.raises(getattr(openai, exception)) as caught:
        openai_client.chat.completions.create(model=CLAUDE, messages=USER, max_tokens=50)
    assert caught.value.request_id


# The anthropic SDK on GPT.

def test_anthropic_create_and_stream_on_gpt(mock, proxy, anthropic_client):
    whole = anthropic_client.messages.create(model=GPT, messages=USER, max_tokens=50)
    with anthropic_client.messages.stream(model=GPT, messages=USER, max_tokens=50) as stream:
        folded = stream.get_final_message()

    assert whole.content[0].text == folded.content[0].text != ""
    assert "end_turn" == whole.stop_reason == folded.stop_reason
    assert whole.usage.output_tokens == folded.usage.output_tokens > 0
    assert whole.usage.input_tokens > 0 and folded.usage.input_tokens > 0
    assert mock.billed_microdollars == settled_status(proxy)["spent_microdollars"]


def test_anthropic_tool_loop_with_two_parallel_calls_on_gpt(mock, anthropic_client):
    tools = [{"name": "weather", "input_schema": WEATHER}]
    mock.script(gpt_says("tool_calls", content="Looking.", tool_calls=[
        {"id": f"call_{city}", "type": "function",
         "function": {"name": "weather", "arguments": json.dumps({"city": city})}}
        for city in ("Oslo", "Rome")]))
    first = anthropic_client.messages.create(model=GPT, messages=USER, tools=tools, max_tokens=50)
    uses = [block for block in first.content if block.type == "tool_use"]
    assert ["Oslo", "Rome"] == [use.input["city"] for use in uses]
    assert "tool_use" == first.stop_reason

    anthropic_client.messages.create(model=GPT, tools=tools, max_tokens=50, messages=[
        *USER, {"role": "assistant", "content": first.content},
        {"role": "user", "content": [
            *({"type": "tool_result", "tool_use_id": use.id, "content": "sunny"} for use in uses),
            {"type": "text", "text": "And?"}]}])

    sent = mock.seen[1].json["messages"]
    assert ["user", "assistant", "tool", "tool", "user"] == [m["role"] for m in sent]
    assert ["call_Oslo", "call_Rome"] == [m["tool_call_id"] for m in sent[2:4]]


def test_anthropic_streamed_reasoning_and_tools_of_a_sloppy_server(mock, anthropic_client):
    def chunk(delta, finish=None, **more):
        return sse({"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": GPT,
                    "choices": [{"index": 0, "delta": delta, "finish_reason": finish}], **more})

    usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
    mock.script(Reply(headers=SSE, framing="chunked", bills=(GPT, usage), steps=(
        chunk({"reasoning_content": "Hm."}), chunk({"content": "I"}), chunk({"content": " look."}),
        chunk({"tool_calls": [{"id": "a", "function": {"name": "weather", "arguments": ""}}]}),
        chunk({"tool_calls": [{"function": {"arguments": '{"city": '}}]}),
        chunk({"tool_calls": [{"function": {"arguments": '"Oslo"}'}}]}),
        chunk({}, "stop", usage=usage), sse("[DONE]"))))

    with anthropic_client.messages.stream(model=GPT, messages=USER, max_tokens=50) as stream:
        message = stream.get_final_message()

    thinking, said, use = message.content
    assert ("Hm.", "I look.", {"city": "Oslo"}, "tool_use") == (
        thinking.thinking, said.text, use.input, message.stop_reason)
    assert (10, 5) == (message.usage.input_tokens, message.usage.output_tokens)


@pytest.mark.parametrize("reply, exception", [
    (openai_error(400, "bad"), "BadRequestError"), (openai_error(401, "no"), "AuthenticationError"),
    (openai_error(403, "no"), "PermissionDeniedError"), (openai_error(404, "?"), "NotFoundError"),
    (openai_error(429, "slow"), "RateLimitError"),
    (openai_error(503, "busy"), "OverloadedError"),
    (openai_error(500, "oops"), "InternalServerError")])
def test_anthropic_raises_what_its_users_expect_of_openais_errors(mock, anthropic_client, reply,
                                                                  exception):
    mock.script(reply)
    expected = getattr(anthropic, exception, anthropic.APIStatusError)

    with pytest.raises(expected) as caught:
        anthropic_client.messages.create(model=GPT, messages=USER, max_tokens=50)
    assert caught.value.request_id


def test_anthropic_counts_tokens_of_a_gpt_model(anthropic_client):
    assert anthropic_client.messages.count_tokens(model=GPT, messages=USER).input_tokens > 0
