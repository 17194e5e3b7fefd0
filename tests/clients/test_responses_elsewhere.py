"""The openai SDK's Responses on models of each API, and the anthropic SDK on OpenAI's Responses:
create, stream and parse, tool loops with thoughts in their own objects, errors as exceptions."""
import json
from dataclasses import replace

import pytest
from dialects import MODELS, PATHS, configured, meant
from support import TOKEN, Close, anthropic_error, openai_error, settled_status
from translation_checker import check_response
from vendor_answers import Refuse, Say, Speaker, Think, Use

openai = pytest.importorskip("openai")
anthropic = pytest.importorskip("anthropic")
pydantic = pytest.importorskip("pydantic")

from openai.types.responses import Response, ResponseStreamEvent

EACH_API = pytest.mark.parametrize("api", PATHS)
WEATHER = {"type": "function", "name": "weather", "strict": True, "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"],
    "additionalProperties": False}}
OSLO, ROME = Use("weather", {"city": "Oslo"}), Use("weather", {"city": "Rome"})
LOOP = ((Think("Both, then."), Say("I look."), OSLO, ROME), (Think("Warm."), Say("Take Rome.")),
        (Say("It is warm."),))


class Place(pydantic.BaseModel):
    city: str
    degrees: int


@pytest.fixture
def mock():
    with Speaker() as provider:
        yield provider


@pytest.fixture
def proxy(mock, proxy_for, tmp_path):
    return proxy_for("--budget", "10", "--config", configured(mock, tmp_path))


@pytest.fixture
def responses(proxy):
    with openai.OpenAI(base_url=proxy.url + "/v1", api_key=TOKEN, max_retries=0) as client:
        yield client.responses


@pytest.fixture
def messages(proxy):
    with anthropic.Anthropic(base_url=proxy.url, api_key=TOKEN, max_retries=0) as client:
        yield client.messages


def valid(response):
    """The answer, once it is what the SDK's own types say, to the last field."""
    whole = response.to_dict(mode="json")
    Response.model_validate(whole)
    check_response(whole)
    return response


@EACH_API
def test_create_and_stream_say_the_same(mock, proxy, responses, api):
    for _ in range(2):
        mock.says(Say("Grüße 🐤, "), Say("all is well."))
    asked = {"model": MODELS[api], "input": "hello", "max_output_tokens": 500}
    whole = valid(responses.create(**asked))
    events, adapter = [], pydantic.TypeAdapter(ResponseStreamEvent)
    for event in responses.create(**asked, stream=True):
        events.append(adapter.validate_python(event.to_dict(mode="json")))
    mock.says(Say("Grüße 🐤, "), Say("all is well."))
    with responses.stream(**asked) as stream:
        helped = valid(stream.get_final_response())

    final = events[-1].response
    assert "Grüße 🐤, all is well." == whole.output_text == helped.output_text
    assert ("completed", "completed") == (whole.status, final.status)
    assert "Grüße 🐤, all is well." == "".join(
        event.delta for event in events if event.type == "response.output_text.delta")
    assert whole.usage.output_tokens == final.usage.output_tokens > 0
    assert whole.model == MODELS[api]
    assert mock.billed_microdollars == settled_status(proxy)["spent_microdollars"] > 0


@EACH_API
def test_parse_gives_an_object(mock, responses, api):
    for _ in range(2):
        mock.says(Say('{"city": "Oslo", "degrees": 7}'))
    asked = {"model": MODELS[api], "input": "hello", "text_format": Place}

    parsed = responses.parse(**asked).output_parsed
    with responses.stream(**asked) as stream:
        streamed = stream.get_final_response().output_parsed

    assert Place(city="Oslo", degrees=7) == parsed == streamed
    assert {"city", "degrees"} == set(meant(api, mock.seen[0].json).schema["properties"])


@EACH_API
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_tool_loop_with_thoughts_in_the_sdks_own_objects(mock, proxy, responses, api, stream):
    def turn():
        asked = {"model": MODELS[api], "input": said, "tools": [WEATHER], "store": False,
                 "reasoning": {"effort": "high", "summary": "auto"},
                 "include": ["reasoning.encrypted_content"]}
        if not stream:
            return valid(responses.create(**asked))
        with responses.stream(**asked) as running:
            return valid(running.get_final_response())

    for parts in LOOP:
        mock.says(*parts)
    said = [{"role": "user", "content": "Where to?"}]
    first = turn()
    calls = [item for item in first.output if item.type == "function_call"]
    assert [{"city": "Oslo"}, {"city": "Rome"}] == [json.loads(c.arguments) for c in calls]
    said += [*first.output, *({"type": "function_call_output", "call_id": call.call_id,
                               "output": text} for call, text in zip(calls, ("cold", "warm")))]
    second = turn()
    said += [*second.output, {"role": "user", "content": "Why?"}]

    assert "It is warm." == turn().output_text
    thoughts = [item for item in first.output if item.type == "reasoning"]
    assert ["Both, then."] == [part.text for item in thoughts for part in item.summary]
    seals = [("thought", "Both, then."), ("thought", "Warm.")] if api != "chat" else []
    assert (("user", "Where to?"), *seals[:1], ("said", "I look."), ("call", *OSLO),
            ("call", *ROME), ("result", 0, "cold"), ("result", 1, "warm"), *seals[1:],
            ("said", "Take Rome."), ("user", "Why?")) == meant(api, mock.seen[2].json).turns
    assert mock.billed_microdollars == settled_status(proxy)["spent_microdollars"] > 0


@EACH_API
@pytest.mark.parametrize("parts, ending, status, reason", [
    ((Say("So much"),), "length", "incomplete", "max_output_tokens"),
    ((Say("Half"),), "filter", "incomplete", "content_filter"),
    ((Say("All."),), "end", "completed", None)])
def test_an_answer_says_why_it_ended(mock, responses, api, parts, ending, status, reason):
    mock.says(*parts, ending=ending)
    answer = valid(responses.create(model=MODELS[api], input="hello"))

    assert (status, reason) == (
        answer.status, answer.incomplete_details and answer.incomplete_details.reason)


@EACH_API
def test_a_refusal_is_a_part_of_its_own(mock, responses, api):
    mock.says(Refuse("I will not."))
    answer = valid(responses.create(model=MODELS[api], input="hello"))

    assert ["I will not."] == [part.refusal for item in answer.output for part in item.content]


@EACH_API
@pytest.mark.parametrize("status, kind, exception", [
    (400, "invalid_request_error", "BadRequestError"),
    (401, "authentication_error", "AuthenticationError"),
    (403, "permission_error", "PermissionDeniedError"), (404, "not_found_error", "NotFoundError"),
    (429, "rate_limit_error", "RateLimitError"), (500, "api_error", "InternalServerError"),
    (529, "overloaded_error", "InternalServerError")])
def test_errors_are_the_exceptions_that_users_expect(mock, responses, api, status, kind, exception):
    mock.script(anthropic_error(status, "it went wrong", kind) if api == "messages"
                else openai_error({529: 503}.get(status, status), "it went wrong"))

    with pytest.raises(getattr(openai, exception), match="it went wrong") as caught:
        responses.create(model=MODELS[api], input="hello")
    assert caught.value.request_id


@EACH_API
def test_a_stream_that_breaks_off_never_looks_whole(mock, responses, api):
    def broken(request):
        whole = mock.default_reply(request)
        return replace(whole, steps=(*whole.steps[:6], Close()))
    mock.script(broken)

    kinds = []
    with pytest.raises(openai.APIError):
        for event in responses.create(model=MODELS[api], input="hello", stream=True):
            kinds.append(event.type)
    assert "response.created" in kinds and "response.completed" not in kinds


# The anthropic SDK on OpenAI's Responses.

@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("api", ["messages", "responses"])
def test_thinking_survives_three_turns_of_the_anthropic_sdk(mock, proxy, messages, api, stream):
    def turn():
        asked = {"model": MODELS[api], "max_tokens": 4_000, "messages": said,
                 "tools": [{"name": "weather", "input_schema": WEATHER["parameters"]}],
                 "thinking": {"type": "adaptive", "display": "summarized"},
                 "output_config": {"effort": "high"}}
        if not stream:
            return messages.create(**asked)
        with messages.stream(**asked) as running:
            return running.get_final_message()

    for parts in LOOP:
        mock.says(*parts)
    said = [{"role": "user", "content": "Where to?"}]
    first = turn()
    assert ("tool_use", "Both, then.", "I look.") == (
        first.stop_reason, first.content[0].thinking, first.content[1].text)
    uses = [block for block in first.content if block.type == "tool_use"]
    said += [{"role": "assistant", "content": first.content}, {"role": "user", "content": [
        {"type": "tool_result", "tool_use_id": use.id, "content": text}
        for use, text in zip(uses, ("cold", "warm"))]}]
    second = turn()
    said += [{"role": "assistant", "content": second.content}, {"role": "user", "content": "Why?"}]

    assert "It is warm." == turn().content[-1].text
    assert (("user", "Where to?"), ("thought", "Both, then."), ("said", "I look."), ("call", *OSLO),
            ("call", *ROME), ("result", 0, "cold"), ("result", 1, "warm"), ("thought", "Warm."),
            ("said", "Take Rome."), ("user", "Why?")) == meant(api, mock.seen[2].json).turns
    assert {PATHS[api]} == {seen.path for seen in mock.seen}
    assert mock.billed_microdollars == settled_status(proxy)["spent_microdollars"] > 0


def test_the_anthropic_sdk_counts_tokens_of_a_model_behind_responses(messages):
    assert messages.count_tokens(model=MODELS["responses"], messages=[
        {"role": "user", "content": "hello"}]).input_tokens > 0
