"""The official openai SDK behind the proxy: right answers, exact bills, and its usual exceptions.

CALLS are the SDK calls, each of which gives what it heard in one form. They are made against the
mock provider, against the echo model, and in every situation of ERRORS, the error matrix.
"""
import asyncio
import json
import threading
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
from support import (OPENAI_KEY, PATIENCE_S, TOKEN, Close, Cut, Hang, Reply, openai_error,
                     proxy_environment, settled_status, sse, status_of)

openai = pytest.importorskip("openai")
pydantic = pytest.importorskip("pydantic")

BUDGET = ("--budget", "10.00")
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
    """Check typed objects as their types are written: the SDK itself lets anything through."""
    for thing in objects:
        type(thing).model_validate(thing.to_dict())


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

    assert sorted(mock.models) == listed
    assert ("gpt-4o-mini", "model") == (one.id, one.object)
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
def test_a_structured_output_request_with_a_cap_goes_up_byte_for_byte(mock, proxy, client_of,
                                                                     parse):
    mock.output_text = '{"city": "Wien", "degrees": 21}'
    client = client_of(proxy)
    cap, asks_usage = PARSERS[parse]

    parsed = parse(client, **{cap: 512})

    assert Weather(city="Wien", degrees=21) == parsed
    expected = {"stream_options": {"include_usage": True}} if asks_usage else {}
    assert expected == splices(client.sent[0].read(), mock.seen[-1].body)
    assert mock.billed_microdollars == settled_status(proxy)["spent_microdollars"] > 0


@pytest.mark.parametrize("parse", PARSERS, ids=lambda parse: parse.__name__)
def test_only_the_cap_and_the_usage_option_are_spliced_in_under_a_budget(mock, proxy, client_of,
                                                                        parse):
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
def test_an_ordinary_request_goes_up_byte_for_byte_but_for_the_usage_option(mock, proxy,
                                                                           client_of, name):
    call = CALLS[name]
    client = client_of(proxy)

    call(client, **cap_of(call, 64))

    asks_usage = call.streamed and not call.shows_usage
    expected = {"stream_options": {"include_usage": True}} if asks_usage else {}
    assert expected == splices(client.sent[0].read(), mock.seen[-1].body)
