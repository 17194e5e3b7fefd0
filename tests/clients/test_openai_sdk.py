"""The official openai SDK behind the proxy: right answers, exact bills, and its usual exceptions.

CALLS are the SDK calls, each of which gives what it heard in one form. They are made against the
mock provider, against the echo model, and in every situation of ERRORS, the error matrix.
"""
import asyncio
import json
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import stages
from stages import BUDGET, Row, described, noting_reservations
from support import (OPENAI_KEY, PATIENCE_S, TOKEN, Close, Cut, Hang, openai_error,
                     proxy_environment, settled_status, sse)

openai = pytest.importorskip("openai")
pydantic = pytest.importorskip("pydantic")

PROMPT = "Count the canaries in the cave."
PROMPT_WORDS = 6
API_MODELS = {"chat": "gpt-4o-mini", "responses": "gpt-4o-mini",
              "completions": "gpt-3.5-turbo-instruct", "embeddings": "text-embedding-3-small"}
CAP_FIELDS = {"chat": "max_completion_tokens", "responses": "max_output_tokens",
              "completions": "max_tokens", "embeddings": None}


# Clients.

@pytest.fixture
def client_of():
    """Make clients of a proxy; `client.sent` holds the requests that each has sent."""
    clients = []

    def make(proxy, **options):
        sent = []
        http_client = openai.DefaultHttpxClient(
            trust_env=False, event_hooks={"request": [sent.append]})
        settings = {"api_key": TOKEN, "max_retries": 0, "timeout": PATIENCE_S, **options}
        clients.append(openai.OpenAI(base_url=proxy.url + "/v1", http_client=http_client,
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
    usage: object                   # None where the SDK showed none
    objects: list


@dataclass(frozen=True)
class Call:
    """One way to ask an API through the SDK."""
    api: str
    streamed: bool
    ask: object                     # (client, fields) -> Heard
    shows_usage: bool = True

    def __call__(self, client, prompt=PROMPT, **options):
        content = {"chat": {"messages": [{"role": "user", "content": prompt}]},
                   "completions": {"prompt": prompt}}.get(self.api, {"input": prompt})
        return self.ask(client, {"model": API_MODELS[self.api], **content, **options})


def counts(usage):
    if usage is None:
        return None
    if hasattr(usage, "input_tokens"):
        return usage.input_tokens, usage.output_tokens
    return usage.prompt_tokens, getattr(usage, "completion_tokens", 0)


def last_usage(chunks):
    shown = [chunk.usage for chunk in chunks if chunk.usage is not None]
    return counts(shown[-1]) if shown else None


def chat(client, fields):
    answer = client.chat.completions.create(**fields)
    return Heard(answer.choices[0].message.content, counts(answer.usage), [answer])


def chat_stream(client, fields):
    with client.chat.completions.create(stream=True, **fields) as stream:
        chunks = list(stream)
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    return Heard(text, last_usage(chunks), chunks)


def chat_stream_with_usage(client, fields):
    return chat_stream(client, {**fields, "stream_options": {"include_usage": True}})


def chat_helper(client, fields):
    with client.chat.completions.stream(**fields) as stream:
        chunks = [event.chunk for event in stream if event.type == "chunk"]
        answer = stream.get_final_completion()
    return Heard(answer.choices[0].message.content, counts(answer.usage), chunks)


def responses(client, fields):
    answer = client.responses.create(**fields)
    return Heard(answer.output_text, counts(answer.usage), [answer])


def responses_stream(client, fields):
    with client.responses.create(stream=True, **fields) as stream:
        events = list(stream)
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    return Heard(text, counts(events[-1].response.usage), events)


def responses_helper(client, fields):
    with client.responses.stream(**fields) as stream:
        kinds = [event.type for event in stream]
        answer = stream.get_final_response()
    assert "response.created" == kinds[0]
    return Heard(answer.output_text, counts(answer.usage), [])


def completions(client, fields):
    answer = client.completions.create(**fields)
    return Heard(answer.choices[0].text, counts(answer.usage), [answer])


def completions_stream(client, fields):
    with client.completions.create(stream=True, **fields) as stream:
        chunks = list(stream)
    text = "".join(choice.text for chunk in chunks for choice in chunk.choices)
    return Heard(text, last_usage(chunks), chunks)


def embeddings(client, fields):
    answer = client.embeddings.create(**fields)
    return Heard(answer.data[0].embedding, counts(answer.usage), [answer])


CALLS = {
    "chat": Call("chat", False, chat),
    "chat stream": Call("chat", True, chat_stream, shows_usage=False),
    "chat stream with usage": Call("chat", True, chat_stream_with_usage),
    "chat helper": Call("chat", True, chat_helper, shows_usage=False),
    "responses": Call("responses", False, responses),
    "responses stream": Call("responses", True, responses_stream),
    "responses helper": Call("responses", True, responses_helper),
    "completions": Call("completions", False, completions),
    "completions stream": Call("completions", True, completions_stream, shows_usage=False),
    "embeddings": Call("embeddings", False, embeddings),
}


def cap_of(call, tokens):
    """The option that caps a call's output, where its API has one."""
    return {CAP_FIELDS[call.api]: tokens} if CAP_FIELDS[call.api] else {}


def validate(objects):
    """Check typed objects as their types are written: the SDK itself lets anything through.

    One leniency: the type of streamed completions forbids the null that OpenAI itself sends.
    """
    for thing in objects:
        try:
            type(thing).model_validate(thing.to_dict())
        except pydantic.ValidationError as err:
            kind = getattr(thing, "object", None)
            faults = [(kind, fault["loc"][-1], fault["input"]) for fault in err.errors()]
            if faults != [("text_completion", "finish_reason", None)]:
                raise


# Answers.

@pytest.mark.parametrize("name", CALLS)
def test_a_call_gives_the_providers_text_and_costs_what_it_bills(mock, proxy, client_of, name):
    call = CALLS[name]

    heard = call(client_of(proxy))

    assert ([0.25, -0.5, 0.125] if call.api == "embeddings" else mock.output_text) == heard.text
    assert (counts(SimpleNamespace(**mock.bills[0][1])) if call.shows_usage else None) \
        == heard.usage
    assert mock.billed_microdollars == settled_status(proxy)["spent_microdollars"] > 0
    assert 1 == len(mock.seen)


@pytest.mark.parametrize("name", ["chat stream", "completions stream"])
def test_a_client_that_did_not_ask_sees_no_usage_anywhere(mock, proxy, client_of, name):
    heard = CALLS[name](client_of(proxy))

    assert True is mock.seen[0].json["stream_options"]["include_usage"]
    assert [] == [chunk for chunk in heard.objects if "usage" in chunk.to_dict()]
    assert [] == [chunk for chunk in heard.objects if not chunk.choices]


@pytest.mark.parametrize("name", ["chat stream", "completions stream"])
def test_a_client_that_asked_sees_usage_in_the_last_chunk(mock, proxy, client_of, name):
    heard = CALLS[name](client_of(proxy), stream_options={"include_usage": True})

    last = heard.objects[-1]
    assert ([], counts(SimpleNamespace(**mock.bills[0][1]))) == (last.choices, counts(last.usage))
    assert [] == [chunk for chunk in heard.objects[:-1] if chunk.usage is not None]


def test_an_embedding_as_floats_costs_what_the_provider_bills(mock, proxy, client_of):
    heard = CALLS["embeddings"](client_of(proxy), encoding_format="float")

    assert [0.25, -0.5, 0.125] == heard.text
    assert mock.billed_microdollars == settled_status(proxy)["spent_microdollars"] > 0


def test_models_are_listed_and_retrieved_for_nothing(mock, proxy, client_of):
    client = client_of(proxy)

    listed = [model.id for model in client.models.list()]
    one = client.models.retrieve("gpt-4o-mini")

    assert {"gpt-4o-mini", "claude-haiku-4-5", "ironcage/echo"} <= set(listed)
    assert ("gpt-4o-mini", "model", []) == (one.id, one.object, mock.seen)
    assert 0 == settled_status(proxy)["spent_microdollars"]


def test_the_asynchronous_client_hears_the_same(mock, proxy):
    async def ask():
        http_client = openai.DefaultAsyncHttpxClient(trust_env=False)
        fields = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": PROMPT}]}
        async with openai.AsyncOpenAI(base_url=proxy.url + "/v1", api_key=TOKEN, max_retries=0,
                                      http_client=http_client) as client:
            whole = await client.chat.completions.create(**fields)
            stream = await client.chat.completions.create(stream=True, **fields)
            pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
            return whole.choices[0].message.content, "".join(pieces)

    texts = asyncio.run(ask())

    assert (mock.output_text, mock.output_text) == texts
    assert mock.billed_microdollars == settled_status(proxy)["spent_microdollars"] > 0


def test_the_raw_response_shows_the_providers_headers_and_the_cost(mock, proxy, client_of):
    raw = client_of(proxy).chat.completions.with_raw_response.create(
        model="gpt-4o-mini", messages=[{"role": "user", "content": PROMPT}])

    assert "req_mock" == raw.headers["x-request-id"] == raw.parse()._request_id
    assert "4999" == raw.headers["x-ratelimit-remaining-requests"]
    assert str(mock.billed_microdollars) == raw.headers["x-ironcage-cost-microdollars"]


# The echo model: no key, no network, one microdollar a word read and two a word written.

ECHO = "ironcage/echo"
PROMPTS = {PROMPT: 6, "  Grüße\n\naus der\u2028H\u00f6hle \U0001f424  ": 6}     # and their words


@pytest.fixture
def echo_proxy(proxy_for):
    """A proxy that knows no provider's key."""
    return proxy_for(*BUDGET, environ={})


@pytest.mark.parametrize("prompt", PROMPTS, ids=["plain", "spaced"])
@pytest.mark.parametrize("name", [name for name in CALLS if name != "embeddings"])
def test_echo_answers_every_call_with_its_prompt(echo_proxy, client_of, name, prompt):
    call = CALLS[name]

    heard = call(client_of(echo_proxy), model=ECHO, prompt=prompt)

    assert prompt == heard.text
    words = PROMPTS[prompt]
    assert ((words, words) if call.shows_usage else None) == heard.usage
    assert words + 2 * words == settled_status(echo_proxy)["spent_microdollars"]
    validate(heard.objects)


@pytest.mark.parametrize("name", ["chat stream", "completions stream"])
def test_echo_shows_usage_in_the_last_chunk_of_a_stream_that_asked(echo_proxy, client_of, name):
    heard = CALLS[name](client_of(echo_proxy), model=ECHO,
                        stream_options={"include_usage": True})

    assert (PROMPT_WORDS, PROMPT_WORDS) == heard.usage == counts(heard.objects[-1].usage)
    assert [] == heard.objects[-1].choices
    validate(heard.objects)


def test_echo_embeds_alike_as_base64_and_as_floats(echo_proxy, client_of):
    client = client_of(echo_proxy)

    packed = CALLS["embeddings"](client, model=ECHO)
    floats = CALLS["embeddings"](client, model=ECHO, encoding_format="float")

    assert pytest.approx(floats.text, abs=1e-6) == packed.text
    assert (PROMPT_WORDS, 0) == packed.usage == floats.usage
    assert 2 * PROMPT_WORDS == settled_status(echo_proxy)["spent_microdollars"]
    validate(packed.objects + floats.objects)


@pytest.mark.parametrize("name", ["chat", "chat stream", "responses", "responses stream",
                                  "completions", "completions stream"])
def test_echo_stops_at_the_cap_and_says_so(echo_proxy, client_of, name):
    call = CALLS[name]

    heard = call(client_of(echo_proxy), model=ECHO, **cap_of(call, 3))

    assert "Count the canaries" == heard.text
    assert PROMPT_WORDS + 2 * 3 == settled_status(echo_proxy)["spent_microdollars"]
    last = heard.objects[-1]
    if call.api == "responses":
        answer = last.response if call.streamed else last
        assert ("incomplete", "max_output_tokens") \
            == (answer.status, answer.incomplete_details.reason)
    else:
        assert "length" == last.choices[0].finish_reason


def test_echo_is_parsed_as_structured_output(echo_proxy, client_of):
    said = '{"city": "Wien", "degrees": 21}'
    client = client_of(echo_proxy)

    chatted = client.chat.completions.parse(
        model=ECHO, messages=[{"role": "user", "content": said}], response_format=Weather)
    responded = client.responses.parse(model=ECHO, input=said, text_format=Weather)

    expected = Weather(city="Wien", degrees=21)
    assert (expected, expected) == (chatted.choices[0].message.parsed, responded.output_parsed)


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


QUESTION = [{"role": "user", "content": "Weather in Wien \u2014 grüß dich \U0001f424"}]


def parse_chat(client, **options):
    answer = client.chat.completions.parse(model="gpt-4o-mini", messages=QUESTION,
                                           response_format=Weather, **options)
    return answer.choices[0].message.parsed


def parse_responses(client, **options):
    return client.responses.parse(model="gpt-4o-mini", input=QUESTION, text_format=Weather,
                                  **options).output_parsed


def parse_chat_stream(client, **options):
    with client.chat.completions.stream(model="gpt-4o-mini", messages=QUESTION,
                                        response_format=Weather, **options) as stream:
        return stream.get_final_completion().choices[0].message.parsed


def parse_responses_stream(client, **options):
    with client.responses.stream(model="gpt-4o-mini", input=QUESTION, text_format=Weather,
                                 **options) as stream:
        return stream.get_final_response().output_parsed


def parse_with_a_strict_tool(client, **options):
    tools = [openai.pydantic_function_tool(Weather)]
    return parse_chat(client, tools=tools, parallel_tool_calls=False, **options)


# call -> (the option that caps its output, whether the proxy asks for usage in its place)
PARSERS = {
    parse_chat: ("max_completion_tokens", False),
    parse_responses: ("max_output_tokens", False),
    parse_chat_stream: ("max_completion_tokens", True),
    parse_responses_stream: ("max_output_tokens", False),
    parse_with_a_strict_tool: ("max_completion_tokens", False),
}


def splices(sent, got):
    """The fields that the proxy put before the client's own bytes; fails on any other change."""
    assert got.endswith(sent[1:]), (sent, got)
    added = got[:len(got) - len(sent[1:])].rstrip(b", ")
    return json.loads(added if added == b"{" + b"}" else added + b"}")


@pytest.mark.parametrize("parse", PARSERS, ids=lambda parse: parse.__name__)
def test_a_structured_output_request_with_a_cap_goes_up_byte_for_byte(
        mock, proxy, client_of, parse):
    mock.output_text = '{"city": "Wien", "degrees": 21}'
    client = client_of(proxy)
    cap, asks_usage = PARSERS[parse]

    parsed = parse(client, **{cap: 512})

    assert Weather(city="Wien", degrees=21) == parsed
    expected = {"stream_options": {"include_usage": True}} if asks_usage else {}
    assert expected == splices(client.sent[0].read(), mock.seen[-1].body)
    assert mock.billed_microdollars == settled_status(proxy)["spent_microdollars"] > 0


@pytest.mark.parametrize("parse", PARSERS, ids=lambda parse: parse.__name__)
def test_only_the_cap_and_the_usage_option_are_spliced_in_under_a_budget(
        mock, proxy, client_of, parse):
    mock.output_text = '{"city": "Wien", "degrees": 21}'
    client = client_of(proxy)
    cap, asks_usage = PARSERS[parse]

    parse(client)

    expected = {"stream_options": {"include_usage": True}} if asks_usage else {}
    assert {**expected, cap: 16384} == splices(client.sent[0].read(), mock.seen[-1].body)


@pytest.mark.parametrize("parse", PARSERS, ids=lambda parse: parse.__name__)
def test_without_a_budget_no_cap_is_spliced_in(mock, proxy_for, client_of, parse):
    mock.output_text = '{"city": "Wien", "degrees": 21}'
    client = client_of(proxy_for())

    parse(client)

    expected = {"stream_options": {"include_usage": True}} if PARSERS[parse][1] else {}
    assert expected == splices(client.sent[0].read(), mock.seen[-1].body)


@pytest.mark.parametrize("name", CALLS)
def test_an_ordinary_request_goes_up_byte_for_byte_but_for_the_usage_option(
        mock, proxy, client_of, name):
    call = CALLS[name]
    client = client_of(proxy)

    call(client, **cap_of(call, 64))

    asks_usage = call.streamed and not call.shows_usage
    expected = {"stream_options": {"include_usage": True}} if asks_usage else {}
    assert expected == splices(client.sent[0].read(), mock.seen[-1].body)


# The error matrix: what each call raises in each situation.

NO_SUCH_THING = "no such thing"     # a whole answer has no events
# fmt: off  (reads as the table that it is)
ERRORS = {
    "provider says 400": Row(
        "BadRequestError 400", "BadRequestError 400", 1, "nothing",
        "invalid_value", "Invalid value: 'purple'."),
    "provider refuses our key": Row(
        "AuthenticationError 401", "AuthenticationError 401", 1, "nothing",
        "invalid_api_key", "Incorrect API key provided."),
    "provider lacks the model": Row(
        "NotFoundError 404", "NotFoundError 404", 1, "nothing",
        "model_not_found", "does not exist"),
    "provider says 429": Row(
        "RateLimitError 429", "RateLimitError 429", 1, "nothing",
        "rate_limit_exceeded", "Rate limit reached"),
    "provider says 500": Row(
        "InternalServerError 500", "InternalServerError 500", 1, "nothing",
        None, "The server had an error"),
    "provider says 503": Row(
        "InternalServerError 503", "InternalServerError 503", 1, "nothing",
        "overloaded", "The engine is overloaded"),
    "provider says 529": Row(
        "InternalServerError 529", "InternalServerError 529", 1, "nothing",
        None, "Overloaded"),
    "request is malformed": Row(
        "BadRequestError 400", "BadRequestError 400", 0, "nothing",
        None, "must be"),
    "token is wrong": Row(
        "AuthenticationError 401", "AuthenticationError 401", 0, "nothing",
        "invalid_api_key", "this proxy takes its own token"),
    "nothing is left": Row(
        "APIStatusError 402", "APIStatusError 402", 0, "nothing",
        "budget_exceeded", "Iron Cage budget limit exceeded"),
    "request does not fit": Row(
        "APIStatusError 402", "APIStatusError 402", 0, "nothing",
        "insufficient_budget", "Iron Cage budget insufficient for this request"),
    "model has no price": Row(
        "BadRequestError 400", "BadRequestError 400", 0, "nothing",
        "unpriced_model", "gpt-unpriced-9"),
    "provider has no key here": Row(
        "BadRequestError 400", "BadRequestError 400", 0, "nothing",
        "no_provider_key", "OPENAI_API_KEY"),
    "provider is unreachable": Row(
        "InternalServerError 502", "InternalServerError 502", 0, "nothing",
        "upstream_unreachable", "provider"),
    "provider closes without an answer": Row(
        "InternalServerError 502", "InternalServerError 502", 1, "at most",
        "upstream_broke", "provider"),
    "provider never answers": Row(
        "InternalServerError 504", "InternalServerError 504", 1, "at most",
        "upstream_timeout", "provider"),
    "answer is reset in its middle": Row(
        "InternalServerError 502", "APIError in stream", 1, "at most",
        "upstream_broke", "provider"),
    "answer ends in its middle": Row(
        "InternalServerError 502", "APIError in stream", 1, "at most",
        "upstream_broke", "provider"),
    "answer stalls in its middle": Row(
        "InternalServerError 504", "APIError in stream", 1, "at most",
        "upstream_timeout", "provider"),
    "provider ends its stream with an error": Row(
        NO_SUCH_THING, "APIError in stream", 1, "at most",
        "server_is_overloaded", "The model is overloaded"),
}
# fmt: on
WHOLE_AND_STREAMED = ("chat", "chat stream", "responses", "responses stream", "completions",
                      "completions stream", "embeddings")
HELPERS = ("chat helper", "responses helper")
CELLS = [(situation, name) for situation, row in ERRORS.items()
         for name in (*WHOLE_AND_STREAMED, *(HELPERS if "in stream" in row.streamed else ()))
         if CALLS[name].streamed or row.whole != NO_SUCH_THING]


class Stage(stages.Stage):
    """What a situation sets up before a call of this SDK."""

    def __init__(self, mock, call):
        super().__init__(mock, cap_of(call, 1000))
        self.call = call

    def provider_says(self, status, message, code=None, headers=()):
        self.mock.always = openai_error(status, message, code=code, headers=headers)

    def breaks_with(self, *steps):
        super().breaks_with(*steps)
        if self.call.api == "embeddings":       # what breaks off is billed by output: it has none
            broken = self.mock.always
            self.mock.always = lambda request: replace(broken(request), bills=None)


def key_is_refused(stage):
    stage.environ = {**proxy_environment(stage.mock), "OPENAI_API_KEY": OPENAI_KEY + "-old"}


def model_is_gone(stage):
    stage.mock.models.remove(API_MODELS[stage.call.api])


def request_is_malformed(stage):
    broken = CAP_FIELDS[stage.call.api]
    stage.fields["extra_body"] = {broken: -1} if broken else {"model": ""}


def request_does_not_fit(stage):
    stage.argv = ("--budget", "0.0001", "--bound", "bytes")
    stage.fields = cap_of(stage.call, 4000) or {"prompt": "canary " * 1000}


def there_is_no_key(stage):
    stage.environ = {**proxy_environment(stage.mock)}
    del stage.environ["OPENAI_API_KEY"]


def stream_ends_with_an_error(stage):
    error = {"message": "The model is overloaded", "type": "server_error", "param": None,
             "code": "server_is_overloaded"}
    typed = {"type": "error", "error": error}       # flat ones raise nothing: a test of its own
    stage.breaks_with(sse(typed if stage.call.api == "responses" else {"error": error}), Close())


SITUATIONS = {
    **stages.SITUATIONS,
    "provider says 400": lambda stage: stage.provider_says(
        400, "Invalid value: 'purple'.", "invalid_value"),
    "provider refuses our key": key_is_refused,
    "provider lacks the model": model_is_gone,
    "provider says 429": lambda stage: stage.provider_says(
        429, "Rate limit reached", "rate_limit_exceeded", [("retry-after", "7")]),
    "provider says 500": lambda stage: stage.provider_says(500, "The server had an error"),
    "provider says 503": lambda stage: stage.provider_says(
        503, "The engine is overloaded", "overloaded"),
    "provider says 529": lambda stage: stage.provider_says(529, "Overloaded"),
    "request is malformed": request_is_malformed,
    "request does not fit": request_does_not_fit,
    "model has no price": lambda stage: stage.fields.update(model="gpt-unpriced-9"),
    "provider has no key here": there_is_no_key,
    "provider ends its stream with an error": stream_ends_with_an_error,
}


def loads_event(event):
    """One event of the mock as an object with attributes, however deep."""
    return json.loads(event.partition(b"data: ")[2], object_hook=lambda d: SimpleNamespace(**d))


def text_of_event(event):
    """The text that one chunk or event adds."""
    if hasattr(event, "choices"):
        return "".join(getattr(choice, "text", None) or
                       getattr(getattr(choice, "delta", None), "content", None) or ""
                       for choice in event.choices)
    return event.delta if event.type == "response.output_text.delta" else ""


def test_every_situation_of_the_matrix_is_set_up():
    assert {*ERRORS} == {*SITUATIONS}


@pytest.mark.parametrize("situation, name", CELLS)
def test_error_matrix(mock, proxy_for, client_of, situation, name):
    row, call = ERRORS[situation], CALLS[name]
    stage = Stage(mock, call)
    SITUATIONS[situation](stage)
    proxy = proxy_for(*stage.argv, environ=stage.environ, timeouts=stage.timeouts)
    reservations = noting_reservations(mock, proxy)
    client = client_of(proxy, **stage.client_options)

    with pytest.raises(openai.OpenAIError) as caught:
        call(client, **stage.fields)
    stage.is_over.set()

    error = caught.value
    assert (row.streamed if call.streamed else row.whole) == described(error), error
    assert row.words in error.message
    assert row.code == error.code
    assert row.attempts == len(mock.seen)
    assert 1 == len(client.sent)
    spent = settled_status(proxy)["spent_microdollars"]
    assert mock.billed_microdollars <= spent <= sum(reservations)
    assert (row.charged == "at most") == (spent > 0)


REFUSED_BY_BUDGET = ("nothing is left", "request does not fit")


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("situation", REFUSED_BY_BUDGET)
def test_a_refusal_by_the_budget_is_never_tried_again(
        mock, proxy_for, client_of, situation, name):
    stage = Stage(mock, CALLS[name])
    SITUATIONS[situation](stage)
    client = client_of(proxy_for(*stage.argv), max_retries=openai.DEFAULT_MAX_RETRIES)

    with pytest.raises(openai.APIStatusError) as caught:
        CALLS[name](client, **stage.fields)

    assert 402 == caught.value.status_code
    assert "false" == caught.value.response.headers["x-should-retry"]
    assert "iron_cage_" + caught.value.code == caught.value.type
    assert (1, 0) == (len(client.sent), len(mock.seen))


@pytest.mark.parametrize("name", ["chat", "responses stream", "completions"])
def test_what_a_refusal_says_is_affordable_is_affordable(mock, proxy_for, client_of, name):
    call = CALLS[name]
    client = client_of(proxy_for("--budget", "0.0005"))
    with pytest.raises(openai.APIStatusError) as caught:
        call(client, **cap_of(call, 999))
    told = caught.value.body["ironcage"]

    heard = call(client, **cap_of(call, told["affordable_output_tokens"]))

    assert heard.text == mock.output_text
    assert 500 == told["limit_microdollars"] < told["needed_microdollars"]
    with pytest.raises(openai.APIStatusError):
        call(client_of(proxy_for("--budget", "0.0005")),
             **cap_of(call, told["affordable_output_tokens"] + 1))


@pytest.mark.parametrize("name", WHOLE_AND_STREAMED)
def test_retry_after_and_request_id_of_the_provider_reach_the_exception(
        mock, proxy, client_of, name):
    stage = Stage(mock, CALLS[name])
    SITUATIONS["provider says 429"](stage)

    with pytest.raises(openai.RateLimitError) as caught:
        CALLS[name](client_of(proxy))

    assert "7" == caught.value.response.headers["retry-after"]
    assert "req_mock" == caught.value.request_id


@pytest.mark.parametrize("name", ["chat stream", "responses stream", "completions stream"])
@pytest.mark.parametrize("break_off", [Cut, Close, Hang])
def test_all_text_before_a_break_is_heard_before_the_error(
        mock, proxy_for, client_of, name, break_off):
    call = CALLS[name]
    stage = Stage(mock, call)
    stage.breaks_with(break_off())
    proxy = proxy_for(*BUDGET, timeouts={"between_bytes_s": 0.2})
    texts = []

    def ask(client, fields):
        method = {"chat": client.chat.completions, "responses": client.responses,
                  "completions": client.completions}[call.api]
        with method.create(stream=True, **fields) as stream:
            texts.extend(map(text_of_event, stream))

    with pytest.raises(openai.APIError):
        replace(call, ask=ask)(client_of(proxy))

    text = "".join(texts)
    steps = mock.default_reply(mock.seen[0]).steps
    sent = "".join(map(text_of_event, map(loads_event, steps[:len(steps) // 2])))
    assert sent == text != ""


def test_an_error_without_a_type_ends_a_responses_stream_too(mock, proxy, client_of):
    """The SDK raises on it, so the call has failed, whoever hangs up first (here the client)."""
    call = CALLS["responses stream"]
    error = {"message": "The model is overloaded", "type": "server_error", "code": None}
    Stage(mock, call).breaks_with(sse({"error": error}), Hang())
    reservations = noting_reservations(mock, proxy)

    with pytest.raises(openai.APIError, match="The model is overloaded"):
        call(client_of(proxy), **cap_of(call, 1000))

    status = settled_status(proxy)
    assert 0 < status["spent_microdollars"] <= sum(reservations)
    assert 1 == status["failed_requests"]


def test_a_flat_error_event_of_a_responses_stream_passes_through(mock, proxy, client_of):
    """The SDK hands these on as events; it raises for a nested `error` only."""
    event = {"type": "error", "sequence_number": 7, "code": "server_error", "param": None,
             "message": "The server had an error"}
    Stage(mock, CALLS["responses stream"]).breaks_with(sse(event, "error"), Close())

    with client_of(proxy).responses.create(model="gpt-4o-mini", input=PROMPT,
                                           stream=True) as stream:
        events = list(stream)

    assert event == events[-1].to_dict()
    assert "response.output_text.delta" == events[-2].type
