"""Each dialect's client on each API of a provider, over real sockets: nine pairs, whole and
streamed. The provider is a mock that judges as the vendors do and bills; what a pair cannot carry
must be told, and is refused under strict.

A cell of the table: `yes`, it travels and nothing is told · `quiet`, a hint that the provider has
no use for · `sealed`, a thought that is not shown, since the dialect cannot ask for it, but comes
back · `drop:NAME` or `adj:NAME`, it is told so in the client's words, and refused under
strict · `set:NAME`, the budget needs it, which is told · `refuse:WORDS`, it is refused before
anything is sent · `-`, the client's dialect cannot say it."""
import json
import re
from dataclasses import replace
from typing import NamedTuple

import pytest
from dialects import (MODELS, PAIRS, PATHS, Ask, Heard, configured, heard, meant, model_of,
                      next_turn, request_of, whole_of)
from support import (TOKEN, Close, Cut, Gate, RawClient, Reply, anthropic_error, call,
                     openai_error, settled_status, sse, sse_events, start_proxy)
from vendor_answers import Refuse, Say, Speaker, Think, Use

NAMES = [f"{client}-on-{api}" for client, api in PAIRS]

PIXEL = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk" \
    "YPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="
PDF = "JVBERi0xLjQKMSAwIG9iago8PD4+CmVuZG9iagp0cmFpbGVyCjw8Pj4KJSVFT0YK"
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"],
          "additionalProperties": False}
OSLO, ROME = Use("weather", {"city": "Oslo"}), Use("weather", {"city": "Röm"})


class Case(NamedTuple):
    """What is asked, what the model says, and what the client hears and the provider is asked."""
    cells: str                          # of the nine pairs, client by client
    ask: Ask = Ask()
    says: tuple = (Say("Grüße 🐤, all is well."),)
    heard: Heard = Heard("Grüße 🐤, all is well.")
    meant: dict = {}                    # fields of Meant, beside the user's words
    ending: str = "end"


FILE = "refuse:file|document"
CASES = {
    #                 chat on: chat messages responses · messages on … · responses on …
    "text": Case("yes yes yes  yes yes yes  yes yes yes",
                 Ask(system="Be brief."), meant={"system": "Be brief.", "cap": 1_000}),
    "an image": Case("yes yes yes  yes yes yes  yes yes yes",
                     Ask(image=PIXEL), meant={
                         "turns": (("image", PIXEL), ("user", "hello there"))}),
    "an image elsewhere": Case("yes yes yes  yes yes yes  yes yes yes",
                               Ask(image="https://cave.example/a.png"), meant={"turns": (
                                   ("image", "https://cave.example/a.png"),
                                   ("user", "hello there"))}),
    "a document": Case(f"yes yes yes  {FILE} yes yes  {FILE} yes yes",
                       Ask(document=PDF), meant={
                           "turns": (("document", PDF), ("user", "hello there"))}),
    "a thought": Case("yes yes sealed  quiet yes yes  quiet yes yes",
                      Ask(effort="high"), (Think("Hm, so."), Say("Yes.")),
                      Heard("Yes.", "Hm, so."), {"effort": "high"}),
    "two calls": Case("yes yes yes  yes yes yes  yes yes yes",
                      Ask(tools=("weather", "clock")), (Say("I look."), OSLO, ROME),
                      Heard("I look.", calls=(OSLO, ROME), end="calls"),
                      {"tools": frozenset({"weather", "clock"})}),
    "one call": Case("yes yes yes  yes yes yes  yes yes yes",
                     Ask(tools=("weather",), parallel=False), (OSLO,),
                     Heard(calls=(OSLO,), end="calls"), {"parallel": False}),
    "a forced call": Case("yes yes yes  yes yes yes  yes yes yes",
                          Ask(tools=("weather",), choice="weather"), (OSLO,),
                          Heard(calls=(OSLO,), end="calls"), {"choice": "weather"}),
    "some call": Case("yes yes yes  yes yes yes  yes yes yes",
                      Ask(tools=("weather",), choice="required"), (OSLO,),
                      Heard(calls=(OSLO,), end="calls"), {"choice": "required"}),
    "no call": Case("yes yes yes  yes yes yes  yes yes yes",
                    Ask(tools=("weather",), choice="none"), meant={"choice": "none"}),
    "JSON by a schema": Case("yes yes yes  yes yes yes  yes yes yes",
                             Ask(schema=SCHEMA), (Say('{"city": "Oslo"}'),),
                             Heard('{"city": "Oslo"}'), {"schema": SCHEMA}),
    "a refusal": Case("yes yes yes  yes yes yes  yes yes yes",
                      says=(Refuse("I will not."),),
                      heard=Heard(refusal="I will not.", end="refused")),
    "half, then filtered": Case("yes yes yes  yes yes yes  yes yes yes",
                                says=(Say("Take some"),), ending="filter",
                                heard=Heard("Take some", end="refused")),
    "the cap": Case("yes yes yes  yes yes yes  yes yes yes",
                    Ask(cap=50), (Say("So much, and"),), Heard("So much, and", end="length"),
                    {"cap": 50}, "length"),
    "a cap below the least": Case("yes yes adj:max_tokens  yes yes adj:max_tokens  yes yes -",
                                  Ask(cap=5)),
    "JSON of any shape": Case("yes adj:response_format yes  - - -  - - -", Ask(
        words="Say it in JSON.", more={"response_format": {"type": "json_object"}})),
    "JSON of any shape, asked by Responses": Case(
        "- - -  - - -  yes adj:text.format yes",
        Ask(words="Say it in JSON.", more={"text": {"format": {"type": "json_object"}}})),
    "a field that nobody knows": Case(
        "refuse:shine drop:shine drop:shine  drop:shine refuse:shine drop:shine"
        "  drop:shine drop:shine refuse:shine", Ask(more={"shine": 1})),
    "a search": Case("- - -  - - -  refuse:tools set:tools.web_search.max_uses set:max_tool_calls",
                     Ask(more={"tools": [{"type": "web_search"}]})),
    "a search of Anthropic's": Case(
        "- - -  refuse:tools yes yes  - - -",
        Ask(more={"tools": [{"type": "web_search_20250305", "name": "web_search",
                             "max_uses": 3}]})),
    "nothing at all": Case("yes yes yes  yes yes yes  yes yes yes", says=(), heard=Heard()),
    "a stop": Case("yes yes drop:stop  yes yes drop:stop_sequences  - - -",
                   Ask(stop=("END",)), heard=Heard("Grüße 🐤, all is well.", end="stop"),
                   meant={"stop": ("END",)}, ending="stop END"),
    "a text tool": Case("yes yes yes  - - -  yes yes yes",
                        Ask(tools=("!patch",)), (Use("patch", "*** Begin\né"),),
                        Heard(calls=(("patch", "*** Begin\né"),), end="calls")),
    "a namespace": Case("- - -  - - -  yes yes yes",
                        Ask(tools=("cave.weather", "weather")), (Use("cave.weather", {"city": "x"}),),
                        Heard(calls=(("cave.weather", {"city": "x"}),), end="calls")),
    "a temperature": Case("yes drop:temperature drop:temperature  yes - drop:temperature"
                          "  yes drop:temperature -", Ask(more={"temperature": 0.5})),
    "a seed": Case("yes drop:seed drop:seed  - - -  - - -", Ask(more={"seed": 7})),
    "top_k": Case("- - -  drop:top_k - drop:top_k  - - -", Ask(more={"top_k": 7})),
    "truncation": Case("- - -  - - -  drop:truncation drop:truncation yes",
                       Ask(more={"truncation": "auto"})),
    "many answers": Case("yes refuse:n refuse:n  - - -  - - -", Ask(more={"n": 2})),
    "what went before": Case("- - -  - - -  refuse:previous_response_id "
                             "refuse:previous_response_id yes",
                             Ask(more={"previous_response_id": "resp_1", "store": True})),
    "a conversation": Case("- - -  - - -  refuse:conversation refuse:conversation yes",
                           Ask(more={"conversation": "conv_1", "store": True})),
    "a stored prompt": Case("- - -  - - -  refuse:prompt refuse:prompt refuse:prompt",
                            Ask(more={"prompt": {"id": "pmpt_1"}})),
    "in the background": Case("- - -  - - -  refuse:background refuse:background -",
                              Ask(more={"background": True})),
    "servers of tools": Case("- - -  refuse:mcp_servers - refuse:mcp_servers  - - -", Ask(more={
        "mcp_servers": [{"type": "url", "name": "x", "url": "https://cave.example"}]})),
}


def cells(case):
    return dict(zip(PAIRS, CASES[case].cells.split()))


@pytest.fixture
def mock():
    with Speaker() as provider:
        provider.cached_tokens = 7
        yield provider


@pytest.fixture
def served(mock, proxy_for, tmp_path):
    """Start a proxy in front of the three."""
    def start(*argv, **more):
        return proxy_for("--config", configured(mock, tmp_path, **more),
                         *(argv or ("--budget", "10")))
    return start


@pytest.fixture(scope="module")
def long_lived(tmp_path_factory):
    """One provider and one proxy for the hundreds of cells: what they keep must not matter."""
    with Speaker() as provider:
        provider.cached_tokens = 7
        proxy = start_proxy(provider, "--budget", "1000", "--config",
                            configured(provider, tmp_path_factory.mktemp("cage")))
        yield provider, proxy
        proxy.stop()


@pytest.fixture
def stage(long_lived):
    """(mock, proxy); whatever is asked, all of it is billed and paid in the end."""
    mock, proxy = long_lived
    mock.forget()
    billed, spent = mock.billed_microdollars, settled_status(proxy)["spent_microdollars"]
    yield mock, proxy
    status = settled_status(proxy)
    assert (mock.billed_microdollars - billed, 0) == (
        status["spent_microdollars"] - spent, status["bound_exceeded"])


def send(proxy, client, fields, *headers):
    return call(proxy.port, "POST", PATHS[client], fields, headers)


def told(answer):
    """What an answer says was lost or changed: {"drop:stop"}."""
    names = {"drop": answer.header("x-ironcage-dropped-params"),
             "adj": answer.header("x-ironcage-adjusted")}
    return {f"{kind}:{entry.partition('=')[0]}" for kind, value in names.items() if value
            for entry in value.replace(" ", "").split(",")}


def test_every_cell_is_filled():
    assert {9} == {len(case.cells.split()) for case in CASES.values()}
    kinds = {cell.partition(":")[0] for case in CASES.values() for cell in case.cells.split()}
    assert kinds == {"yes", "quiet", "sealed", "drop", "adj", "set", "refuse", "-"}


SAYABLE = [(client, api, case) for case in CASES for client, api in PAIRS
           if cells(case)[client, api] != "-"]


@pytest.mark.parametrize("client, api, case", SAYABLE, ids=[
    f"{client}-on-{api}-{case}" for client, api, case in SAYABLE])
def test_what_travels_between_a_client_and_an_api(stage, client, api, case):
    cell, given = cells(case)[client, api], CASES[case]
    mock, proxy = stage
    kind, _, words = cell.partition(":")
    for stream in (False, True):
        fields = request_of(client, given.ask, model_of(client, api), stream)
        mock.says(*given.says, ending=given.ending)
        answer = send(proxy, client, fields)
        if kind == "refuse":
            assert (400, []) == (answer.status, mock.seen)
            assert re.search(words, answer.body.decode())
            continue
        assert 200 == answer.status, answer.body
        assert ({cell.replace("set:", "adj:")} - {"yes", "quiet", "sealed"}) == told(answer)
        seen = mock.seen[-1]
        assert PATHS[api] == seen.path
        wanted = {"turns": (("user", given.ask.words),), **(given.meant if kind in ("yes", "sealed") else {})}
        asked = meant(api, seen.json)._asdict()
        assert wanted == {name: asked[name] for name in wanted}
        model, usage, _ = mock.bills[-1]
        said = heard(client, whole_of(client, answer))
        if "refused" == said.end and not given.heard.refusal:       # no words for it: any will do
            said = said._replace(text=said.text or said.refusal, refusal="")
        expected = given.heard._replace(
            prompt=-(-len(seen.body) // 4), cached=7,
            made=usage.get("output_tokens", usage.get("completion_tokens")))
        if kind == "sealed":
            expected = expected._replace(thoughts="")
        if expected.end == "stop" and not client == api == "messages":
            expected = expected._replace(end="end")     # the others do not tell it from an end
        assert expected == said


@pytest.mark.parametrize("client, api", PAIRS, ids=NAMES)
def test_strict_refuses_what_would_be_told_and_nothing_else(mock, served, client, api):
    proxy = served("--budget", "10", "--strict")
    for case, given in CASES.items():
        kind, _, words = cells(case)[client, api].partition(":")
        if kind in ("drop", "adj"):
            mock.seen.clear()
            answer = send(proxy, client, request_of(client, given.ask, model_of(client, api), False))
            assert (case, 400, []) == (case, answer.status, mock.seen)
            assert words in answer.json["error"].get("param", answer.json["error"]["message"])
    mock.says(Say("Yes."))
    assert 200 == send(proxy, client, request_of(
        client, Ask(tools=("weather",), system="Be brief.", effort="high"), model_of(client, api), False)
    ).status


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("client, api", PAIRS, ids=NAMES)
def test_three_turns_with_calls_results_and_thoughts(stage, client, api, stream):
    """Thoughts come back to where they came from, word for word; a server that seals none gets
    none back from another dialect."""
    mock, proxy = stage
    turns = [("user", "hello there")]
    if api != "chat" or client == "chat":
        thoughts = [("thought", "Both, then."), ("thought", "Warm.")]
    else:
        thoughts = []
    fields = request_of(client, Ask(tools=("weather",), effort="high"), model_of(client, api), stream)

    mock.says(Think("Both, then."), Say("I look."), OSLO, ROME)
    first = whole_of(client, send(proxy, client, fields))
    fields = next_turn(client, fields, first, "cold", "warm")
    mock.says(Think("Warm."), Say("Take Röm."))
    second = whole_of(client, send(proxy, client, fields))
    fields = next_turn(client, fields, second, "Why?")
    mock.says(Say("It is warm."))
    third = send(proxy, client, fields)

    assert "It is warm." == heard(client, whole_of(client, third)).text
    turns += [*thoughts[:1], ("said", "I look."), ("call", *OSLO), ("call", *ROME),
              ("result", 0, "cold"), ("result", 1, "warm"), *thoughts[1:],
              ("said", "Take Röm."), ("user", "Why?")]
    assert tuple(turns) == meant(api, mock.seen[2].json).turns
    assert set() == told(third)


SWITCHED = {"messages": "responses", "responses": "messages"}     # to the API of another vendor


@pytest.mark.parametrize("client, api", [
    pair for pair in PAIRS if pair[1] in SWITCHED], ids=lambda value: value)
def test_thoughts_of_one_vendor_never_go_to_the_other(stage, client, api):
    """They are left out there, which is told; what was said and done goes on."""
    mock, proxy = stage
    fields = request_of(client, Ask(tools=("weather",), effort="high"), model_of(client, api), False)
    mock.says(Think("Hm."), OSLO)
    first = whole_of(client, send(proxy, client, fields))
    fields = next_turn(client, fields, first, "cold")
    mock.says(Say("Cold."))
    mock.says(Say("Cold."))
    elsewhere = send(proxy, client, {**fields, "model": model_of(client, SWITCHED[api])})
    back = send(proxy, client, fields)

    assert (200, 200) == (elsewhere.status, back.status), (elsewhere.body, back.body)
    rest = (("user", "hello there"), ("call", *OSLO), ("result", 0, "cold"))
    assert rest == meant(SWITCHED[api], mock.seen[1].json).turns
    assert (rest[0], ("thought", "Hm."), *rest[1:]) == meant(api, mock.seen[2].json).turns
    assert {"adj:input.reasoning" if client == "responses" else "adj:messages.thinking"} \
        == told(elsewhere)
    assert set() == told(back)


@pytest.mark.parametrize("client, api", [pair for pair in PAIRS if pair[0] != pair[1]],
                         ids=lambda value: value)
def test_a_thought_that_came_to_nothing_does_not_end_the_conversation(stage, client, api):
    """Cut at the cap before a word was said: OpenAI refuses a thought that nothing follows."""
    mock, proxy = stage
    fields = request_of(client, Ask(effort="high"), model_of(client, api), False)
    mock.says(Think("So far"), ending="length")
    first = whole_of(client, send(proxy, client, fields))
    mock.says(Say("Further."))
    fields = next_turn(client, fields, first, "Go on.")

    assert "Further." == heard(client, whole_of(client, send(proxy, client, fields))).text
    assert meant(api, mock.seen[1].json).turns[-1][1].endswith("Go on.")


def named(items):
    """Items of an answer as a client sends them back that takes them to be stored."""
    return [{"type": "item_reference", "id": item["id"]} if item["type"] != "function_call" else item
            for item in items]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("api", ["chat", "messages"])
def test_items_that_a_client_names_by_their_ids_are_found_again(stage, api, stream):
    """Vercel's openai() does so unless it is told store: false. Whatever ids a server gives."""
    mock, proxy = stage
    mock.id_of_answers = "always-this"
    fields = request_of("responses", Ask(tools=("weather",), effort="high"), MODELS[api], stream)
    del fields["store"]
    mock.says(Think("Hm."), Say("I look."), OSLO)
    first = whole_of("responses", send(proxy, "responses", fields))
    mock.says(Think("Well."), Say("I look elsewhere."), ROME)
    assert 200 == send(proxy, "responses", fields).status
    mock.says(Say("Cold."))
    second = send(proxy, "responses", next_turn(
        "responses", fields, {"output": named(first["output"])}, "cold"))

    assert "Cold." == heard("responses", whole_of("responses", second)).text
    thought = [("thought", "Hm.")] if api == "messages" else []
    assert (("user", "hello there"), *thought, ("said", "I look."), ("call", *OSLO),
            ("result", 0, "cold")) == meant(api, mock.seen[-1].json).turns


@pytest.mark.parametrize("asked, store", [("its own", False), ("another caller", True),
                                          ("an id of its own making", True)])
def test_items_that_are_not_kept_for_a_client_are_refused(mock, served, tmp_path, asked, store):
    other = ("authorization", "Bearer ic_another_0123456789")
    proxy = served("--budget", "1", tokens=[{"name": "other", "token": other[1][7:]}])
    fields = {**request_of("responses", Ask(), MODELS["messages"], False), "store": store}
    mock.says(Say("A secret."))
    [item] = whole_of("responses", send(proxy, "responses", fields))["output"]
    name = {"type": "item_reference", "id": "msg_1" if "making" in asked else item["id"]}

    answer = call(proxy.port, "POST", PATHS["responses"], {**fields, "input": [
        name, *fields["input"]]}, [other] if "caller" in asked else [],
        token=None if "caller" in asked else TOKEN)

    assert (400, "input", 1) == (answer.status, answer.json["error"]["param"], len(mock.seen))
    assert "send the items themselves" in answer.json["error"]["message"]


PICTURES = {
    "messages": lambda call, image: {"role": "user", "content": [
        {"type": "tool_result", "tool_use_id": call, "content": [
            {"type": "text", "text": "seen"}, {"type": "image", "source": {
                "type": "base64", "media_type": "image/png", "data": image.partition(",")[2]}}]}]},
    "responses": lambda call, image: {"type": "function_call_output", "call_id": call, "output": [
        {"type": "input_text", "text": "seen"}, {"type": "input_image", "image_url": image}]}}


@pytest.mark.parametrize("client, api", [pair for pair in PAIRS if pair[0] in PICTURES],
                         ids=lambda value: value)
def test_a_picture_that_a_tool_made_is_seen(stage, client, api):
    """Chat has text alone in a result; the picture comes from the user behind it."""
    mock, proxy = stage
    fields = request_of(client, Ask(tools=("weather",)), model_of(client, api), False)
    mock.says(OSLO)
    fields = next_turn(client, fields, whole_of(client, send(proxy, client, fields)), "seen")
    held = fields["input" if client == "responses" else "messages"]
    ids = re.findall(r'"(?:tool_use_id|call_id)": "([^"]+)"', json.dumps(held[-1]))
    held[-1] = PICTURES[client](ids[0], PIXEL)
    mock.says(Say("A cave."))

    assert 200 == send(proxy, client, fields).status
    sent = json.dumps(mock.seen[1].json)
    assert 1 == sent.count(PIXEL.partition(",")[2]) and "seen" in sent


def chunk(delta, finish=None, **more):
    return sse({"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": "qwen3",
                "choices": [{"index": 0, "delta": delta, "finish_reason": finish}], **more})


@pytest.mark.parametrize("client", ["messages", "responses"])
def test_calls_that_a_server_interleaves_come_whole(mock, served, client):
    """Their events are legal all the same: the checkers see to that."""
    def call_chunk(index, arguments, **more):
        return chunk({"tool_calls": [{"index": index, "function": {
            "arguments": arguments, **more}, **({"id": f"c{index}"} if more else {})}]})

    usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
    mock.script(Reply(headers=(("content-type", "text/event-stream"),), framing="chunked", steps=(
        chunk({"reasoning_content": "Both."}), call_chunk(0, "", name="weather"),
        call_chunk(1, "", name="weather"), call_chunk(0, '{"city"'), call_chunk(1, '{"city": "R'),
        call_chunk(0, ': "Oslo"}'), call_chunk(1, 'öm"}'), chunk({"content": "So."}),
        chunk({}, "stop", usage=usage), sse("[DONE]"))))

    answer = send(served(), client, request_of(client, Ask(tools=("weather",)),
                                               model_of(client, "chat"), True))

    said = heard(client, whole_of(client, answer))
    assert ("Both.", "So.", (OSLO, ROME), "calls") == (
        said.thoughts, said.text, said.calls, said.end)


@pytest.mark.parametrize("client, api, path", [
    (client, api, path) for client, path in (("messages", "/v1/messages/count_tokens"),
                                             ("responses", "/v1/responses/input_tokens"))
    for api in PATHS if api != client], ids=lambda value: value.split("/")[-1])
def test_tokens_are_counted_for_a_model_of_another_api(stage, client, api, path):
    fields = request_of(client, Ask(words="word " * 50), model_of(client, api), False)
    mock, proxy = stage

    answer = call(proxy.port, "POST", path, {name: fields[name] for name in (
        "model", "messages", "input") if name in fields})

    assert 200 == answer.status and 40 < answer.json["input_tokens"] < 400, answer.body
    assert mock.seen == []


# What goes wrong.

def error_of(api, status, message, headers=()):
    """A provider's error, in its own shape."""
    kinds = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error",
             404: "not_found_error", 429: "rate_limit_error", 500: "api_error",
             529: "overloaded_error"}
    if api == "messages":
        return anthropic_error(status, message, kinds[status], headers)
    return openai_error({529: 503}.get(status, status), message, headers=headers)


@pytest.mark.parametrize("status, kind", [
    (400, "invalid_request_error"), (401, "authentication_error"), (403, "permission_error"),
    (404, "not_found_error"), (429, "rate_limit_error"), (500, "api_error"),
    (529, "overloaded_error")])
@pytest.mark.parametrize("client, api", PAIRS, ids=NAMES)
def test_an_error_comes_in_the_clients_dialect_and_is_free(stage, client, api, status, kind):
    mock, proxy = stage
    for stream in (False, True):
        mock.script(error_of(api, status, "it went wrong", [("retry-after", "7")]))
        answer = send(proxy, client, request_of(client, Ask(), model_of(client, api), stream))

        error = answer.json["error"]
        shown = status if client == "messages" or status != 529 else 503
        assert (shown, True) == (answer.status, "it went wrong" in error["message"])
        assert answer.header("retry-after") == "7"
        if client == "messages":
            assert ("error", kind) == (answer.json["type"], error["type"])
        else:
            assert {"message", "type", "param", "code"} == set(error)
        assert answer.header("request-id") or answer.header("x-request-id")


def broken_at(mock, step, *rest):
    """The next stream of the mock breaks off behind some steps."""
    def reply(request):
        whole = mock.default_reply(request)
        return replace(whole, steps=(*whole.steps[:step], *rest))
    mock.script(reply)


ERROR_EVENTS = {
    "chat": sse({"error": {"message": "busy", "type": "server_error", "param": None,
                           "code": None}}),
    "messages": sse({"type": "error", "error": {"type": "overloaded_error", "message": "busy"}},
                    "error"),
    "responses": sse({"type": "error", "sequence_number": 6, "error": {
        "type": "server_error", "code": "server_error", "message": "busy", "param": None}},
        "error")}


def ended_badly(client, answer):
    """The error that ends a stream: the last event that a client of this dialect looks at."""
    name, data = sse_events(answer.body)[-1]
    last = json.loads(data)
    if client == "responses":
        assert ("response.failed", "failed") == (name, last["response"]["status"])
        return last["response"]["error"]
    assert ("error" if client == "messages" else None) == name
    return last["error"]


@pytest.mark.parametrize("client, api", [pair for pair in PAIRS if pair[0] != pair[1]],
                         ids=lambda value: value)
@pytest.mark.parametrize("end", ["error", "close", "cut"])
def test_a_stream_that_breaks_off_ends_with_an_error_and_is_charged(mock, served, client, api, end):
    proxy = served()
    broken_at(mock, 6, {"error": ERROR_EVENTS[api], "close": Close(), "cut": Cut()}[end])

    answer = send(proxy, client, request_of(client, Ask(), model_of(client, api), True))

    error = ended_badly(client, answer)
    assert error["message"] and (end != "error" or "busy" in error["message"])
    status = settled_status(proxy)
    assert status["spent_microdollars"] >= mock.billed_microdollars > 0
    if client == "responses":
        numbers = [json.loads(data)["sequence_number"] for _, data in sse_events(answer.body)]
        assert [*range(len(numbers))] == numbers


@pytest.mark.parametrize("client, api", [pair for pair in PAIRS if pair[0] != pair[1]],
                         ids=lambda value: value)
def test_an_error_as_the_first_event_is_a_status(mock, served, client, api):
    proxy = served()
    mock.script(Reply(headers=(("content-type", "text/event-stream"),), framing="chunked",
                      steps=(ERROR_EVENTS[api],)))

    answer = send(proxy, client, request_of(client, Ask(), model_of(client, api), True))

    assert answer.status >= 500 and "busy" in answer.json["error"]["message"]


def test_an_error_event_of_responses_as_its_sdk_types_it_has_the_status_of_its_code(mock, served):
    proxy = served()
    event = {"type": "error", "code": "rate_limit_exceeded", "message": "slow down", "param": None,
             "sequence_number": 0}
    mock.script(Reply(headers=(("content-type", "text/event-stream"),), framing="chunked",
                      steps=(sse(event, "error"),)))

    answer = send(proxy, "messages", request_of("messages", Ask(), MODELS["responses"], True))

    assert (429, "rate_limit_error") == (answer.status, answer.json["error"]["type"])
    assert "slow down" in answer.json["error"]["message"]


@pytest.mark.parametrize("client, api", PAIRS, ids=NAMES)
def test_a_client_that_leaves_a_stream_ends_the_call(mock, served, client, api):
    proxy, gate = served(), Gate()
    broken_at(mock, 7, gate)
    with RawClient(proxy.port) as leaving:
        leaving.request("POST", PATHS[client], json.dumps(
            request_of(client, Ask(), model_of(client, api), True)).encode())
        leaving.read_head()
        leaving.read_chunk()
        leaving.leave()
        mock.wait_for_hang_ups()

    status = settled_status(proxy)
    assert status["spent_microdollars"] >= mock.billed_microdollars > 0


@pytest.mark.parametrize("client, api", PAIRS, ids=NAMES)
def test_a_cap_is_lowered_to_what_the_budget_holds(mock, served, client, api):
    """It goes upstream in the provider's field, and the client is told what it became."""
    usd = {"chat": "0.002", "messages": "0.002", "responses": "0.05"}[api]
    proxy = served("--budget", usd)

    answer = send(proxy, client, request_of(client, Ask(cap=60_000), model_of(client, api), False))

    assert 200 == answer.status, answer.body
    cap = meant(api, mock.seen[0].json).cap
    assert str(cap) == answer.header("x-ironcage-max-tokens") and 16 <= cap < 60_000
    assert mock.billed_microdollars == settled_status(proxy)["spent_microdollars"]


@pytest.mark.parametrize("client, api", PAIRS, ids=NAMES)
def test_a_budget_that_is_spent_is_said_in_the_clients_dialect(mock, served, client, api):
    answer = send(served("--budget", "0"), client, request_of(client, Ask(), model_of(client, api), False))

    kind = "billing_error" if client == "messages" else "iron_cage_budget_exceeded"
    assert (402, kind, []) == (answer.status, answer.json["error"]["type"], mock.seen)
