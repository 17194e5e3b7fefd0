"""The official anthropic SDK behind the proxy: right answers, exact bills, usual exceptions.

CALLS are the SDK calls, each of which gives what it heard in one form. They are made against the
mock provider, against the echo model, and in every situation of ERRORS, the error matrix.
"""
import asyncio
import json
from dataclasses import dataclass

import pytest
import stages
from stages import BUDGET, Row, described, noting_reservations
from support import (ANTHROPIC_KEY, PATIENCE_S, TOKEN, Close, Cut, Hang, Reply, anthropic_error,
                     proxy_environment, settled_status, sse)

anthropic = pytest.importorskip("anthropic")
pydantic = pytest.importorskip("pydantic")

MODEL = "claude-haiku-4-5"
PROMPT = "Count the canaries in the cave."
PROMPT_WORDS = 6
BETA = "context-1m-2025-08-07"


# Clients.

@pytest.fixture
def client_of():
    """Make clients of a proxy; `client.sent` holds the requests that each has sent."""
    clients = []

    def make(proxy, **options):
        sent = []
        http_client = anthropic.DefaultHttpxClient(
            trust_env=False, event_hooks={"request": [sent.append]})
        settings = {"api_key": TOKEN, "max_retries": 0, "timeout": PATIENCE_S, **options}
        clients.append(anthropic.Anthropic(base_url=proxy.url, http_client=http_client,
                                           **settings))
        clients[-1].sent = sent
        return clients[-1]

    yield make
    for client in clients:
        client.close()


# The calls. Each takes a client and options of the SDK's method, and tells what it heard.

@dataclass(frozen=True)
class Heard:
    """What an SDK call gave: its text, (input, output) tokens, and the typed objects."""
    text: str
    usage: tuple
    stop_reason: str
    objects: list


@dataclass(frozen=True)
class Call:
    """One way to ask through the SDK."""
    streamed: bool
    ask: object                     # (client, fields) -> Heard

    def __call__(self, client, prompt=PROMPT, **options):
        fields = {"model": MODEL, "max_tokens": 1000,
                  "messages": [{"role": "user", "content": prompt}], **options}
        return self.ask(client, fields)


def heard_of(answer, objects):
    return Heard("".join(block.text for block in answer.content),
                 (answer.usage.input_tokens, answer.usage.output_tokens), answer.stop_reason,
                 objects)


def message(client, fields):
    answer = client.messages.create(**fields)
    return heard_of(answer, [answer])


def stream(client, fields):
    with client.messages.create(stream=True, **fields) as events:
        events = list(events)
    text = "".join(map(text_of_event, events))
    start, delta = events[0].message, events[-2]
    usage = start.usage.input_tokens, delta.usage.output_tokens
    return Heard(text, usage, delta.delta.stop_reason, events)


def helper(client, fields):
    with client.messages.stream(**fields) as events:
        text = "".join(events.text_stream)
        answer = events.get_final_message()
    assert text == answer.content[0].text == events.get_final_text()
    return heard_of(answer, [answer])


def beta_message(client, fields):
    answer = client.beta.messages.create(betas=[BETA], **fields)
    return heard_of(answer, [answer])


def beta_helper(client, fields):
    with client.beta.messages.stream(betas=[BETA], **fields) as events:
        return heard_of(events.get_final_message(), [])


def text_of_event(event):
    """The text that one event adds."""
    is_text = event.type == "content_block_delta" and event.delta.type == "text_delta"
    return event.delta.text if is_text else ""


CALLS = {
    "message": Call(False, message),
    "stream": Call(True, stream),
    "helper": Call(True, helper),
    "beta message": Call(False, beta_message),
    "beta helper": Call(True, beta_helper),
}


def validate(objects):
    """Check typed objects as their types are written: the SDK itself lets anything through."""
    for thing in objects:
        type(thing).model_validate(thing.to_dict())


# Answers.

@pytest.mark.parametrize("name", CALLS)
def test_a_call_gives_the_providers_text_and_costs_what_it_bills(mock, proxy, client_of, name):
    mock.cached_tokens, mock.cache_write_tokens = 2000, 500

    heard = CALLS[name](client_of(proxy))

    _, usage, _ = mock.bills[0]
    assert mock.output_text == heard.text
    assert (usage["input_tokens"], usage["output_tokens"]) == heard.usage
    assert "end_turn" == heard.stop_reason
    assert mock.billed_microdollars == settled_status(proxy)["spent_microdollars"] > 0
    assert 1 == len(mock.seen)


@pytest.mark.parametrize("name", CALLS)
def test_an_answer_cut_at_the_cap_costs_what_the_provider_bills(mock, proxy, client_of, name):
    heard = CALLS[name](client_of(proxy), max_tokens=3)

    assert ("max_tokens", 3) == (heard.stop_reason, heard.usage[1])
    assert mock.output_text.startswith(heard.text)
    assert mock.billed_microdollars == settled_status(proxy)["spent_microdollars"] > 0


def test_the_helper_accumulates_text_and_usage_as_events_arrive(mock, proxy, client_of):
    client = client_of(proxy)
    snapshots = []

    with client.messages.stream(model=MODEL, max_tokens=1000, messages=[
            {"role": "user", "content": PROMPT}]) as events:
        for event in events:
            if event.type == "text":
                snapshots.append(event.snapshot)
            if event.type == "message_stop":
                final = event.message

    assert mock.output_text == snapshots[-1] == final.content[0].text
    assert sorted(snapshots, key=len) == snapshots
    assert mock.bills[0][1]["output_tokens"] == final.usage.output_tokens


@pytest.mark.parametrize("is_beta", [False, True])
def test_tokens_are_counted_by_the_provider_for_nothing(mock, proxy, client_of, is_beta):
    client = client_of(proxy)
    namespace = client.beta if is_beta else client

    counted = namespace.messages.count_tokens(
        model=MODEL, messages=[{"role": "user", "content": PROMPT}])

    assert 42 == counted.input_tokens
    assert "/v1/messages/count_tokens" == mock.seen[0].path
    assert 0 == settled_status(proxy)["spent_microdollars"]


def test_models_are_listed_and_retrieved_for_nothing(mock, proxy, client_of):
    client = client_of(proxy)

    listed = client.models.list(limit=100)
    one = client.models.retrieve(MODEL)

    assert {MODEL, "gpt-4o-mini", "ironcage/echo"} <= {model.id for model in listed}
    assert (MODEL, "model", []) == (one.id, one.type, mock.seen)
    assert 0 == settled_status(proxy)["spent_microdollars"]


def test_the_betas_of_the_beta_namespace_reach_the_provider(mock, proxy, client_of):
    client = client_of(proxy)

    CALLS["beta message"](client)

    assert BETA == mock.seen[0].header("anthropic-beta")
    assert client.sent[0].headers["anthropic-version"] \
        == mock.seen[0].header("anthropic-version")


def test_the_asynchronous_client_hears_the_same(mock, proxy):
    async def ask():
        http_client = anthropic.DefaultAsyncHttpxClient(trust_env=False)
        fields = {"model": MODEL, "max_tokens": 1000,
                  "messages": [{"role": "user", "content": PROMPT}]}
        async with anthropic.AsyncAnthropic(base_url=proxy.url, api_key=TOKEN, max_retries=0,
                                            http_client=http_client) as client:
            whole = await client.messages.create(**fields)
            async with client.messages.stream(**fields) as events:
                pieces = [piece async for piece in events.text_stream]
            return whole.content[0].text, "".join(pieces)

    texts = asyncio.run(ask())

    assert (mock.output_text, mock.output_text) == texts
    assert mock.billed_microdollars == settled_status(proxy)["spent_microdollars"] > 0


@pytest.mark.parametrize("options", [{"api_key": TOKEN}, {"api_key": None, "auth_token": TOKEN}],
                         ids=["api_key", "auth_token"])
def test_the_token_is_taken_as_either_kind_of_credential(
        mock, proxy, client_of, monkeypatch, options):
    monkeypatch.delenv("ANTHROPIC_API_KEY", raising=False)

    heard = CALLS["message"](client_of(proxy, **options))

    assert mock.output_text == heard.text
    assert ANTHROPIC_KEY == mock.seen[0].header("x-api-key")


def test_the_raw_response_shows_the_providers_headers_and_the_cost(mock, proxy, client_of):
    raw = client_of(proxy).messages.with_raw_response.create(
        model=MODEL, max_tokens=1000, messages=[{"role": "user", "content": PROMPT}])

    assert "req_mock" == raw.headers["request-id"] == raw.parse()._request_id
    assert "50" == raw.headers["anthropic-ratelimit-requests-limit"]
    assert str(mock.billed_microdollars) == raw.headers["x-ironcage-cost-microdollars"]


# The echo model: no key, no network, one microdollar a word read and two a word written.

ECHO = "ironcage/echo"
PROMPTS = {PROMPT: 6, "  Grüße\n\naus der\u2028H\u00f6hle \U0001f424  ": 6}     # and their words


@pytest.fixture
def echo_proxy(proxy_for):
    """A proxy that knows no provider's key."""
    return proxy_for(*BUDGET, environ={})


@pytest.mark.parametrize("prompt", PROMPTS, ids=["plain", "spaced"])
@pytest.mark.parametrize("name", CALLS)
def test_echo_answers_every_call_with_its_prompt(echo_proxy, client_of, name, prompt):
    heard = CALLS[name](client_of(echo_proxy), model=ECHO, prompt=prompt)

    words = PROMPTS[prompt]
    assert (prompt, (words, words), "end_turn") == (heard.text, heard.usage, heard.stop_reason)
    assert words + 2 * words == settled_status(echo_proxy)["spent_microdollars"]
    validate(heard.objects)


@pytest.mark.parametrize("name", CALLS)
def test_echo_stops_at_the_cap_and_says_so(echo_proxy, client_of, name):
    heard = CALLS[name](client_of(echo_proxy), model=ECHO, max_tokens=3)

    assert ("Count the canaries", (PROMPT_WORDS, 3), "max_tokens") \
        == (heard.text, heard.usage, heard.stop_reason)
    assert PROMPT_WORDS + 2 * 3 == settled_status(echo_proxy)["spent_microdollars"]


@pytest.mark.parametrize("is_beta", [False, True])
def test_echo_counts_the_tokens_that_it_bills(echo_proxy, client_of, is_beta):
    client = client_of(echo_proxy)
    fields = {"model": ECHO, "system": "Be brief, canary.",
              "messages": [{"role": "user", "content": [{"type": "text", "text": PROMPT}]}]}

    counted = (client.beta if is_beta else client).messages.count_tokens(**fields)
    billed = client.messages.create(max_tokens=1000, **fields).usage

    assert 3 + PROMPT_WORDS == counted.input_tokens == billed.input_tokens
    validate([counted])


def test_echo_is_parsed_as_structured_output(echo_proxy, client_of):
    said = '{"city": "Wien", "degrees": 21}'

    parsed = client_of(echo_proxy).messages.parse(
        model=ECHO, max_tokens=1000, messages=[{"role": "user", "content": said}],
        output_format=Weather).parsed_output

    assert Weather(city="Wien", degrees=21) == parsed


def test_echo_is_the_only_model_that_a_proxy_without_keys_lists(echo_proxy, client_of):
    """Agents ask for the models first; the one that needs no key must be among them."""
    client = client_of(echo_proxy)

    listed = client.models.list()
    one = client.models.retrieve(ECHO)

    assert [ECHO] == [model.id for model in listed]
    assert ECHO == one.id
    validate([*listed, one])


# What the SDK sends, and what the provider gets.

class Weather(pydantic.BaseModel):
    """What structured outputs are asked for here."""
    city: str
    degrees: int


def parse(client, **fields):
    return client.messages.parse(output_format=Weather, **fields).parsed_output


def parse_stream(client, **fields):
    with client.messages.stream(output_format=Weather, **fields) as events:
        return events.get_final_message().parsed_output


def parse_with_a_tool(client, **fields):
    tools = [{"name": "weather", "description": "Größe des Wetters", "strict": True,
              "input_schema": {**Weather.model_json_schema(), "additionalProperties": False}}]
    return parse(client, tools=tools, tool_choice={"type": "auto"}, **fields)


@pytest.mark.parametrize("ask", [parse, parse_stream, parse_with_a_tool])
@pytest.mark.parametrize("budget", [BUDGET, ()], ids=["budget", "no budget"])
def test_a_structured_output_request_goes_up_byte_for_byte(
        mock, proxy_for, client_of, ask, budget):
    mock.output_text = '{"city": "Wien", "degrees": 21}'
    client = client_of(proxy_for(*budget))
    question = [{"role": "user", "content": "Weather in Wien \u2014 grüß dich \U0001f424"}]

    parsed = ask(client, model=MODEL, max_tokens=1000, messages=question)

    assert Weather(city="Wien", degrees=21) == parsed
    assert client.sent[0].read() == mock.seen[-1].body


@pytest.mark.parametrize("name", CALLS)
def test_an_ordinary_request_goes_up_byte_for_byte(mock, proxy, client_of, name):
    client = client_of(proxy)

    CALLS[name](client)

    assert client.sent[0].read() == mock.seen[-1].body


# The error matrix: what each call raises in each situation.

NO_SUCH_THING = "no such thing"     # a whole answer has no events
# fmt: off  (reads as the table that it is)
ERRORS = {
    "provider says 400": Row(
        "BadRequestError 400", "BadRequestError 400", 1, "nothing",
        "invalid_request_error", "tools.0: purple"),
    "provider refuses our key": Row(
        "AuthenticationError 401", "AuthenticationError 401", 1, "nothing",
        "authentication_error", "invalid x-api-key"),
    "provider lacks the model": Row(
        "NotFoundError 404", "NotFoundError 404", 1, "nothing",
        "not_found_error", "model: claude-haiku-4-5"),
    "provider says 429": Row(
        "RateLimitError 429", "RateLimitError 429", 1, "nothing",
        "rate_limit_error", "This request would exceed"),
    "provider says 500": Row(
        "InternalServerError 500", "InternalServerError 500", 1, "nothing",
        "api_error", "Internal server error"),
    "provider says 529": Row(
        "OverloadedError 529", "OverloadedError 529", 1, "nothing",
        "overloaded_error", "Overloaded"),
    "request is malformed": Row(
        "BadRequestError 400", "BadRequestError 400", 0, "nothing",
        "invalid_request_error", "max_tokens must be"),
    "token is wrong": Row(
        "AuthenticationError 401", "AuthenticationError 401", 0, "nothing",
        "authentication_error", "this proxy takes its own token"),
    "nothing is left": Row(
        "PaymentRequiredError 402", "PaymentRequiredError 402", 0, "nothing",
        "billing_error", "Iron Cage budget limit exceeded"),
    "request does not fit": Row(
        "PaymentRequiredError 402", "PaymentRequiredError 402", 0, "nothing",
        "billing_error", "Iron Cage budget insufficient for this request"),
    "model has no price": Row(
        "BadRequestError 400", "BadRequestError 400", 0, "nothing",
        "invalid_request_error", "claude-unpriced-9"),
    "provider has no key here": Row(
        "BadRequestError 400", "BadRequestError 400", 0, "nothing",
        "invalid_request_error", "ANTHROPIC_API_KEY"),
    "provider is unreachable": Row(
        "InternalServerError 502", "InternalServerError 502", 0, "nothing",
        "api_error", "provider"),
    "provider closes without an answer": Row(
        "InternalServerError 502", "InternalServerError 502", 1, "at most",
        "api_error", "provider"),
    "provider never answers": Row(
        "GatewayTimeoutError 504", "GatewayTimeoutError 504", 1, "at most",
        "timeout_error", "provider"),
    "answer is reset in its middle": Row(
        "InternalServerError 502", "APIStatusError 200", 1, "at most",
        "api_error", "provider"),
    "answer ends in its middle": Row(
        "InternalServerError 502", "APIStatusError 200", 1, "at most",
        "api_error", "provider"),
    "answer stalls in its middle": Row(
        "GatewayTimeoutError 504", "APIStatusError 200", 1, "at most",
        "timeout_error", "provider"),
    "provider ends its stream with an error": Row(
        NO_SUCH_THING, "APIStatusError 200", 1, "at most",
        "overloaded_error", "Overloaded"),
}
# fmt: on
CELLS = [(situation, name) for situation, row in ERRORS.items() for name in CALLS
         if CALLS[name].streamed or row.whole != NO_SUCH_THING]
# Classes that older SDKs lack, and what they raise in their place.
FORMERLY = {"PaymentRequiredError": "APIStatusError", "OverloadedError": "InternalServerError",
            "GatewayTimeoutError": "InternalServerError"}


class Stage(stages.Stage):
    """What a situation sets up before a call of this SDK."""

    def provider_says(self, status, text, kind, headers=()):
        self.mock.always = anthropic_error(status, text, kind, headers)


def key_is_refused(stage):
    stage.environ = {**proxy_environment(stage.mock), "ANTHROPIC_API_KEY": ANTHROPIC_KEY + "-old"}


def request_does_not_fit(stage):
    stage.argv = ("--budget", "0.001", "--bound", "bytes")
    stage.fields = {"max_tokens": 20000}


def there_is_no_key(stage):
    stage.environ = {**proxy_environment(stage.mock)}
    del stage.environ["ANTHROPIC_API_KEY"]


def stream_ends_with_an_error(stage):
    error = {"type": "overloaded_error", "message": "Overloaded", "details": None}
    stage.breaks_with(sse({"type": "error", "error": error}, "error"), Close())


SITUATIONS = {
    **stages.SITUATIONS,
    "provider says 400": lambda stage: stage.provider_says(
        400, "tools.0: purple", "invalid_request_error"),
    "provider refuses our key": key_is_refused,
    "provider lacks the model": lambda stage: stage.mock.models.remove(MODEL),
    "provider says 429": lambda stage: stage.provider_says(
        429, "This request would exceed your limit", "rate_limit_error", [("retry-after", "7")]),
    "provider says 500": lambda stage: stage.provider_says(
        500, "Internal server error", "api_error"),
    "provider says 529": lambda stage: stage.provider_says(529, "Overloaded", "overloaded_error"),
    "request is malformed": lambda stage: stage.fields.update(extra_body={"max_tokens": -1}),
    "request does not fit": request_does_not_fit,
    "model has no price": lambda stage: stage.fields.update(model="claude-unpriced-9"),
    "provider has no key here": there_is_no_key,
    "provider ends its stream with an error": stream_ends_with_an_error,
}


def named(expected):
    """A class and status of the table, in the names of the SDK that is installed."""
    name, _, status = expected.partition(" ")
    return f"{name if hasattr(anthropic, name) else FORMERLY[name]} {status}"


def test_every_situation_of_the_matrix_is_set_up():
    assert {*ERRORS} == {*SITUATIONS}


@pytest.mark.parametrize("situation, name", CELLS)
def test_error_matrix(mock, proxy_for, client_of, situation, name):
    row, call = ERRORS[situation], CALLS[name]
    stage = Stage(mock)
    SITUATIONS[situation](stage)
    proxy = proxy_for(*stage.argv, environ=stage.environ, timeouts=stage.timeouts)
    reservations = noting_reservations(mock, proxy)
    client = client_of(proxy, **stage.client_options)

    with pytest.raises(anthropic.AnthropicError) as caught:
        call(client, **stage.fields)
    stage.is_over.set()

    error = caught.value
    assert named(row.streamed if call.streamed else row.whole) == described(error), error
    assert row.words in error.body["error"]["message"] and row.words in str(error)
    assert row.code == error.body["error"]["type"]
    assert row.attempts == len(mock.seen)
    assert 1 == len(client.sent)
    spent = settled_status(proxy)["spent_microdollars"]
    assert mock.billed_microdollars <= spent <= sum(reservations)
    assert (row.charged == "at most") == (spent > 0)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("situation", ["nothing is left", "request does not fit"])
def test_a_refusal_by_the_budget_is_never_tried_again(
        mock, proxy_for, client_of, situation, name):
    stage = Stage(mock)
    SITUATIONS[situation](stage)
    client = client_of(proxy_for(*stage.argv), max_retries=anthropic.DEFAULT_MAX_RETRIES)

    with pytest.raises(anthropic.APIStatusError) as caught:
        CALLS[name](client, **stage.fields)

    assert 402 == caught.value.status_code
    assert "false" == caught.value.response.headers["x-should-retry"]
    assert caught.value.body["error"]["code"] in ("iron_cage_budget_exceeded",
                                                  "iron_cage_insufficient_budget")
    assert (1, 0) == (len(client.sent), len(mock.seen))


@pytest.mark.parametrize("name", ["message", "stream"])
def test_what_a_refusal_says_is_affordable_is_affordable(mock, proxy_for, client_of, name):
    with pytest.raises(anthropic.APIStatusError) as caught:
        CALLS[name](client_of(proxy_for("--budget", "0.002")), max_tokens=999)
    told = caught.value.body["error"]["ironcage"]
    affordable = told["affordable_output_tokens"]

    heard = CALLS[name](client_of(proxy_for("--budget", "0.002")), max_tokens=affordable)

    assert heard.text == mock.output_text
    assert 2000 == told["limit_microdollars"] < told["needed_microdollars"]
    with pytest.raises(anthropic.APIStatusError):
        CALLS[name](client_of(proxy_for("--budget", "0.002")), max_tokens=affordable + 1)


@pytest.mark.parametrize("name", CALLS)
def test_retry_after_and_request_id_of_the_provider_reach_the_exception(
        mock, proxy, client_of, name):
    stage = Stage(mock)
    SITUATIONS["provider says 429"](stage)

    with pytest.raises(anthropic.RateLimitError) as caught:
        CALLS[name](client_of(proxy))

    assert "7" == caught.value.response.headers["retry-after"]
    assert "req_mock" == caught.value.request_id


@pytest.mark.parametrize("break_off", [Cut, Close, Hang])
def test_all_text_before_a_break_is_heard_before_the_error(
        mock, proxy_for, client_of, break_off):
    Stage(mock).breaks_with(break_off())
    proxy = proxy_for(*BUDGET, timeouts={"between_bytes_s": 0.2})
    texts = []

    def ask(client, fields):
        with client.messages.create(stream=True, **fields) as events:
            texts.extend(map(text_of_event, events))

    with pytest.raises(anthropic.APIStatusError):
        Call(True, ask)(client_of(proxy))

    steps = mock.default_reply(mock.seen[0]).steps
    events = [json.loads(step.partition(b"data: ")[2]) for step in steps[:len(steps) // 2]]
    sent = "".join(event.get("delta", {}).get("text", "") for event in events)
    assert sent == "".join(texts) != ""


# Threads: tool_runner begins one by default, and goes on from it while the server lets it.

def reply_to(request, calls_tool):
    """What each vendor answers, whole: a call of the tool, or the last words."""
    model = request.json["model"]
    if request.path == "/v1/messages":
        block = {"type": "tool_use", "id": "toolu_1", "name": "canary", "input": {}} \
            if calls_tool else {"type": "text", "text": "All is well."}
        usage = {"input_tokens": 50, "output_tokens": 10}
        answer = {"id": "msg_1", "type": "message", "role": "assistant", "model": model,
                  "content": [block], "stop_sequence": None, "usage": usage,
                  "stop_reason": "tool_use" if calls_tool else "end_turn"}
    else:
        call = {"id": "call_1", "type": "function", "function": {"name": "canary",
                                                                 "arguments": "{}"}}
        message = {"content": None, "tool_calls": [call]} if calls_tool \
            else {"content": "All is well."}
        usage = {"prompt_tokens": 50, "completion_tokens": 10}
        answer = {"id": "c1", "object": "chat.completion", "created": 1, "model": model,
                  "usage": usage, "choices": [
                      {"index": 0, "message": {"role": "assistant", **message},
                       "finish_reason": "tool_calls" if calls_tool else "stop"}]}
    return Reply(steps=(json.dumps(answer).encode(),), bills=(model, usage))


@pytest.mark.parametrize("model", [MODEL, "gpt-4o-mini"])
def test_tool_runner_sends_the_whole_history_where_a_thread_is_refused(
        mock, proxy_for, client_of, model):
    pytest.importorskip("anthropic.lib.threads")
    proxy, heard = proxy_for(*BUDGET), []
    client = client_of(proxy)
    mock.script(lambda request: reply_to(request, True), lambda request: reply_to(request, False))

    @anthropic.beta_tool
    def canary() -> str:
        """Ask the canary how it is."""
        heard.append("asked")
        return "It sings."

    last = client.beta.messages.tool_runner(
        model=model, max_tokens=1000, tools=[canary],
        messages=[{"role": "user", "content": PROMPT}]).until_done()

    asked = [json.loads(request.content) for request in client.sent]
    assert ["create", "continue", None] == [
        fields.get("thread", {}).get("type") for fields in asked]
    assert [1, 1, 3] == [len(fields["messages"]) for fields in asked]
    assert "All is well." == last.content[0].text and ["asked"] == heard
    assert [1, 3] == [len(seen.json["messages"]) for seen in mock.seen]
    assert [{"type": "create"} if model == MODEL else None, None] == [
        seen.json.get("thread") for seen in mock.seen]
    assert mock.billed_microdollars == settled_status(proxy)["spent_microdollars"] > 0
