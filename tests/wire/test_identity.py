"""Between a client and a provider of one format, bytes travel unchanged, both ways.

The request body goes up byte for byte, but for what the budget must set, spliced in; the answer
comes back byte for byte, in the provider's chunks, with its headers, each read as it was read.
"""
import hashlib
import json
from random import Random

import pytest
from support import (ANTHROPIC_KEY, OPENAI_KEY, ROOT, Gate, Raw, RawClient, Reply, call, program,
                     recordings, seeds, settled_status, sse, sse_events)

CHAT = {"model": "gpt-4o-mini", "max_tokens": 64,
        "messages": [{"role": "user", "content": "Grüße \u2028 🐤"}]}
MESSAGE = {"model": "claude-haiku-4-5", "max_tokens": 64,
           "messages": [{"role": "user", "content": "hello"}]}
METERED = {
    "/v1/chat/completions": CHAT,
    "/v1/responses": {"model": "gpt-4o-mini", "max_output_tokens": 64, "input": "hello"},
    "/v1/completions": {"model": "gpt-3.5-turbo-instruct", "max_tokens": 64, "prompt": "hello"},
    "/v1/embeddings": {"model": "text-embedding-3-small", "input": ["hello", "there"]},
    "/v1/messages": MESSAGE,
}


def sha256(data):
    return hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("path", METERED)
@pytest.mark.parametrize("spacing", [None, (",", ":"), (" ,\t", " :\n")])
def test_a_request_body_reaches_the_provider_byte_for_byte(mock, proxy, path, spacing):
    body = json.dumps(METERED[path], separators=spacing, ensure_ascii=False).encode()

    answer = call(proxy.port, "POST", path, b" \n" + body + b"\r\n")

    assert 200 == answer.status, answer.body
    assert sha256(b" \n" + body + b"\r\n") == sha256(mock.seen[0].body)


@pytest.mark.parametrize("path", METERED)
def test_an_answer_comes_back_byte_for_byte_with_its_headers(mock, proxy, path):
    expected = []
    mock.always = lambda request: expected.append(mock.default_reply(request)) or expected[-1]

    answer = call(proxy.port, "POST", path, METERED[path])

    assert expected[0].body == answer.body
    kept_back = {"set-cookie", "connection", "transfer-encoding"}
    assert [pair for pair in expected[0].headers if pair[0] not in kept_back] \
        == list(answer.headers)[:len(expected[0].headers) - sum(
            name in kept_back for name, _ in expected[0].headers)]
    assert answer.header("set-cookie") is None
    assert answer.header("x-ironcage-request-id").startswith("req_")
    assert str(mock.billed_microdollars) == answer.header("x-ironcage-cost-microdollars")


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages"])
def test_a_stream_comes_back_byte_for_byte_in_the_same_chunks(mock, proxy, path):
    expected = []
    mock.always = lambda request: expected.append(mock.default_reply(request)) or expected[-1]

    answer = call(proxy.port, "POST", path, {**METERED[path], "stream": True})

    assert expected[0].steps == answer.chunks


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_client_that_asks_for_usage_gets_the_stream_byte_for_byte(mock, proxy, path):
    fields = {**METERED[path], "stream": True, "stream_options": {"include_usage": True}}
    body = json.dumps(fields).encode()
    expected = []
    mock.always = lambda request: expected.append(mock.default_reply(request)) or expected[-1]

    answer = call(proxy.port, "POST", path, body)

    assert body == mock.seen[0].body
    assert expected[0].steps == answer.chunks


@pytest.mark.parametrize("options", [None, {}, {"include_usage": False},
                                     {"include_obfuscation": False}])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_client_that_does_not_ask_for_usage_sees_none_of_it(mock, proxy, path, options):
    """It sees what the provider would have sent had the proxy not asked either."""
    fields = {**METERED[path], "stream": True}
    if options is not None:
        fields["stream_options"] = options
    unasked = []

    def reply(request):
        without = {**request.json, "stream_options": {"include_usage": False}}
        plain = type(request)(request.method, request.target, request.headers,
                              json.dumps(without).encode(), request.connection)
        mock.input_tokens = 10
        unasked.append(mock.default_reply(plain))
        return mock.default_reply(request)

    mock.always = reply

    answer = call(proxy.port, "POST", path, fields)

    assert {**(options or {}), "include_usage": True} == mock.seen[0].json["stream_options"]
    assert unasked[0].body == answer.body
    assert mock.billed_microdollars == settled_status(proxy)["spent_microdollars"] > 0


def test_only_the_spliced_fields_differ_from_the_clients_bytes(mock, proxy):
    body = b'{ "messages":[{"role":"user","content":"h\\u0069"}] , "model":"openai/gpt-4o-mini",' \
           b'"stream":true, "max_completion_tokens" : null}'

    call(proxy.port, "POST", "/v1/chat/completions", body)

    sent = mock.seen[0].body
    cap = mock.seen[0].json["max_completion_tokens"]
    assert b'{"stream_options": {"include_usage": true}, "messages":[{"role":"user",' \
           b'"content":"h\\u0069"}] , "model":"gpt-4o-mini","stream":true, ' \
           b'"max_completion_tokens" : %d}' % cap == sent
    assert 16384 == cap


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/v1/messages"])
def test_the_client_has_the_first_event_while_the_provider_withholds_the_rest(mock, proxy, path):
    gate = Gate()

    def reply(request):
        default = mock.default_reply(request)
        return default.with_steps([default.steps[0], gate, *default.steps[1:]])

    mock.always = reply
    with RawClient(proxy.port) as client:
        client.request("POST", path, json.dumps({**METERED[path], "stream": True}).encode())
        client.read_head()
        first = client.read_chunk()
        gate.event.set()
        rest = list(iter(client.read_chunk, b""))

    assert sse_events(first)
    assert rest


def test_half_an_event_is_forwarded_as_soon_as_it_is_read(mock, proxy):
    gate = Gate()
    event = sse({"type": "message_stop"}, "message_stop")
    mock.script(Reply(headers=(("content-type", "text/event-stream"),), framing="chunked",
                      steps=(event[:9], gate, event[9:])))
    with RawClient(proxy.port) as client:
        client.request("POST", "/v1/messages", json.dumps({**MESSAGE, "stream": True}).encode())
        client.read_head()
        first = client.read_chunk()
        gate.event.set()
        rest = b"".join(iter(client.read_chunk, b""))

    assert event[:9] == first
    assert rest.startswith(event[9:])


@pytest.mark.parametrize("seed", seeds(8, 20))
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/v1/messages"])
def test_odd_chunks_change_neither_bytes_nor_money(mock, proxy, path, seed):
    """The provider's stream arrives cut at random places, also inside a character."""
    rng = Random(seed)
    expected = []

    def reply(request):
        default = mock.default_reply(request)
        expected.append(default.body)
        cuts = sorted(rng.sample(range(1, len(default.body)), 40))
        steps = [default.body[a:b] for a, b in zip([0, *cuts], [*cuts, len(default.body)])]
        return default.with_steps(steps)

    mock.always = reply
    fields = {**METERED[path], "stream": True}
    if path == "/v1/chat/completions":
        fields["stream_options"] = {"include_usage": True}

    answer = call(proxy.port, "POST", path, fields)

    assert expected[0] == answer.body
    assert mock.billed_microdollars == settled_status(proxy)["spent_microdollars"] > 0


REQUEST_HEADERS = (
    ("anthropic-beta", "a-2025-01-01"), ("anthropic-beta", "b-2025-01-01"),
    ("anthropic-version", "2026-10-21"), ("openai-organization", "org-1"),
    ("user-agent", "test/1"), ("x-stainless-retry-count", "0"), ("x-custom", "kept"),
    ("cookie", "session=1"), ("te", "trailers"), ("connection", "x-named"), ("x-named", "1"),
    ("keep-alive", "5"), ("proxy-authorization", "Basic x"), ("accept-encoding", "gzip, br"),
    ("x-ironcage-strict", "1"),
)


@pytest.mark.parametrize("path, key_header", [("/v1/messages", ("x-api-key", ANTHROPIC_KEY)),
                                              ("/v1/chat/completions",
                                               ("authorization", f"Bearer {OPENAI_KEY}"))])
def test_end_to_end_headers_travel_up_and_the_others_stay(mock, proxy, path, key_header):
    call(proxy.port, "POST", path, METERED[path], REQUEST_HEADERS)

    request = mock.seen[0]
    assert "a-2025-01-01, b-2025-01-01" == request.header("anthropic-beta")
    assert ["2026-10-21", "org-1", "test/1", "0", "kept"] == [request.header(name) for name in (
        "anthropic-version", "openai-organization", "user-agent", "x-stainless-retry-count",
        "x-custom")]
    names = {name for name, _ in request.headers}
    assert not names & {"cookie", "te", "connection", "x-named", "keep-alive",
                        "proxy-authorization", "x-ironcage-strict"}
    assert "identity" == request.header("accept-encoding")
    assert key_header in request.headers
    assert f"127.0.0.1:{mock.port}" == request.header("host")


def test_a_missing_anthropic_version_is_added(mock, proxy):
    call(proxy.port, "POST", "/v1/messages", MESSAGE)

    assert "2023-06-01" == mock.seen[0].header("anthropic-version")


def test_a_query_travels_as_it_is(mock, proxy):
    call(proxy.port, "POST", "/v1/messages?beta=true&x=%20a", MESSAGE)

    assert "/v1/messages?beta=true&x=%20a" == mock.seen[0].target


def test_a_base_url_with_a_path_is_kept_and_v1_is_not_doubled(mock, proxy_for):
    mock.always = Reply(steps=(b"{}",))
    proxy = proxy_for(environ={"OPENAI_API_KEY": OPENAI_KEY,
                               "IRONCAGE_OPENAI_BASE_URL": mock.url + "/gateway/v1/"})

    call(proxy.port, "POST", "/openai/v1/chat/completions", CHAT)

    assert "/gateway/v1/chat/completions" == mock.seen[0].target


def test_unmetered_answers_pass_as_they_arrive(mock, proxy_for):
    gate = Gate()
    mock.script(Reply(headers=(("content-type", "audio/mpeg"),), framing="chunked",
                      steps=(b"\x00\x01", gate, b"\xff" * 100_000)))
    proxy = proxy_for()
    with RawClient(proxy.port) as client:
        client.request("POST", "/v1/audio/speech", b'{"model":"tts-1","input":"hi"}')
        status, headers = client.read_head()
        first = client.read_chunk()
        gate.event.set()
        rest = b"".join(iter(client.read_chunk, b""))

    assert (200, "audio/mpeg") == (status, dict(headers)["content-type"])
    assert b"\x00\x01" == first
    assert b"\xff" * 100_000 == rest


def test_an_unmetered_upload_of_any_type_passes_unread(mock, proxy_for):
    mock.script(Reply(steps=(b"{}",)))
    proxy = proxy_for()
    body = b"--x\r\n\x00\xff" * 1000

    with RawClient(proxy.port) as client:
        client.request("POST", "/v1/files", None, [("content-type", "multipart/form-data; b=x"),
                                                   ("content-length", str(len(body)))])
        client.send(body)
        answer = client.read_answer()

    assert 200 == answer.status
    assert body == mock.seen[0].body
    assert "multipart/form-data; b=x" == mock.seen[0].header("content-type")


def test_one_connection_to_the_provider_serves_many_requests(mock, proxy):
    with RawClient(proxy.port) as client:
        for _ in range(5):
            client.request("POST", "/v1/chat/completions", json.dumps(CHAT).encode())
            assert 200 == client.read_answer().status

    assert 1 == mock.connections


def test_a_pooled_connection_that_the_provider_closed_is_found_before_use(mock, proxy):
    mock.script(lambda request: Reply(framing="close", steps=mock.default_reply(request).steps))
    statuses = [call(proxy.port, "POST", "/v1/chat/completions", CHAT).status for _ in range(3)]

    assert [200, 200, 200] == statuses
    assert 3 == len(mock.seen)


@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_bytes_after_an_answer_are_never_taken_for_the_next_ones_answer(mock, proxy, framing):
    """A provider, or who poses as one, cannot plant an answer for another client."""
    planted = b"HTTP/1.1 200 OK\r\ncontent-length: 7\r\n\r\nplanted"
    ending = b"0\r\n\r\n" if framing == "chunked" else b""

    def reply(request):
        default = mock.default_reply(request)
        return Reply(headers=default.headers, framing=framing,
                     steps=(default.body, Raw(ending + planted)))

    mock.script(reply)
    first = call(proxy.port, "POST", "/v1/chat/completions", CHAT)
    second = call(proxy.port, "POST", "/v1/chat/completions", CHAT)

    assert (200, 200) == (first.status, second.status)
    assert "choices" in first.json and "choices" in second.json
    assert 2 == mock.connections


# Real exchanges.

METERED_RECORDINGS = {"/v1/chat/completions", "/v1/responses", "/v1/messages", "/v1/embeddings"}
NOT_REPLAYED = {"transfer-encoding", "content-length", "connection", "content-encoding",
                "set-cookie"}


def replayed(exchange):
    """The recorded answer as a Reply; streams in chunks of 700 bytes, which cut events."""
    response = exchange["response"]
    headers = tuple((name.lower(), value) for name, value in response["headers"].items()
                    if name.lower() not in NOT_REPLAYED)
    if "sse" not in response:
        body = json.dumps(response["body"], ensure_ascii=False).encode("utf-8")
        return Reply(response["status"], headers, (body,))
    body = response["sse"].encode("utf-8")
    chunks = tuple(body[at:at + 700] for at in range(0, len(body), 700))
    return Reply(response["status"], headers, chunks, "chunked")


def recorded_request(exchange):
    """Method, path and body of a recorded request, made up where it was not recorded.

    Chat streams ask for usage, so that the recorded stream is what this client wants.
    """
    request, is_stream = exchange["request"], "sse" in exchange["response"]
    fields = request["body"]
    if fields is None and request["method"] == "POST":
        fields = {"model": exchange["model"] or "gpt-4o", "messages": [], "input": "x",
                  "max_tokens": 9, "max_output_tokens": 9, "stream": is_stream}
    if exchange["api"] == "chat" and is_stream:
        fields = {**fields, "stream": True, "stream_options": {"include_usage": True}}
    path = f"/{exchange['provider']}{request['path']}"
    return request["method"], path, fields


def told_usage(exchange, body):
    """(usage, model, tier, hosted tool calls) that an answer tells, read independently.

    A stream tells them up to its terminal event; Anthropic's delta overrides its start.
    """
    if "sse" not in exchange["response"]:
        answer = json.loads(body)
        return (answer.get("usage"), answer.get("model"), answer.get("service_tier"),
                answer.get("output") or [])
    usage, model, tier, output, is_final = {}, None, None, [], False
    for _, data in sse_events(body):
        event = json.loads(data) if data.startswith("{") else {}
        inner = event.get("response") or event.get("message") or event
        told = event.get("usage") or inner.get("usage") or {}
        usage = {**usage, **{name: count for name, count in told.items() if count is not None}}
        model, tier = inner.get("model") or model, inner.get("service_tier") or tier
        is_final = is_final or (bool(told) and event.get("type") != "message_start")
        output = inner.get("output") or output
        if event.get("type") in ("response.completed", "response.incomplete"):
            break
    return (usage if is_final else None), model, tier, output


def expected_charge(book, exchange, fields, body):
    """Microdollars of a recorded success, or None where it tells no usage or has no price."""
    usage, model, tier, output = told_usage(exchange, body)
    provider = exchange["provider"]
    names = [name for name in (model, (fields or {}).get("model"))
             if name and book.find(name, provider) is not None]
    if not names or not isinstance(usage, dict):
        return None
    kinds = [item.get("type") for item in output]
    return book.cost(names[0], usage, api=exchange["api"], provider=provider, service_tier=tier,
                     tool_calls={kind: kinds.count(kind) for kind in set(kinds)})


def test_every_recorded_exchange_comes_out_byte_identical_and_is_charged(mock, proxy_for):
    """Charged by its usage where it is a success on a metered route with a price; errors and
    unmetered routes cost nothing. Without a budget, as some use what a budget refuses."""
    proxy, charged, free, spent = proxy_for(), 0, 0, 0
    with RawClient(proxy.port) as client:
        for name, exchange in recordings():
            method, path, fields = recorded_request(exchange)
            reply = replayed(exchange)
            mock.script(reply)
            client.request(method, path, None if fields is None else json.dumps(fields).encode())
            answer = client.read_answer()
            before, spent = spent, settled_status(proxy)["spent_microdollars"]
            settled = spent - before

            assert (name, reply.status, reply.body) == (name, answer.status, answer.body)
            if reply.status >= 400 or exchange["request"]["path"].partition("?")[0] \
                    not in METERED_RECORDINGS:
                assert (name, 0) == (name, settled)
                free += 1
                continue
            expected = expected_charge(proxy.router.prices, exchange, fields, reply.body)
            if expected is not None:
                assert (name, expected) == (name, settled)
                charged += 1

    assert charged > 290 and free > 40


def most_input_tokens(bound) -> int:
    """Of all samplings, where a hosted tool makes the provider read the prompt again and again."""
    return min(tokens + bound.output_tokens * each
               for tokens, each in bound.levels[-1].input_lines)


def test_no_recorded_prompt_was_billed_for_more_input_than_its_bound():
    """Over all recorded successes that a budget would admit."""
    module, checked = program(), 0
    book = module.PriceBook.load(str(ROOT / "pricing.json"))
    for name, exchange in recordings():
        fields, provider = exchange["request"]["body"], exchange["provider"]
        price = fields and book.find(fields.get("model") or "", provider)
        if not price or exchange["request"]["path"].partition("?")[0] not in METERED_RECORDINGS:
            continue
        usage = told_usage(exchange, replayed(exchange).body)[0]
        body = module.parse_json_object(json.dumps(fields).encode())
        try:
            module.check_boundable(exchange["api"], body, price)
            bound = module.bound_of_request(exchange["api"], body, price)
        except module.UnboundedRequest:
            continue
        if usage:
            counts = module.USAGE_READERS[exchange["api"]](usage)
            assert counts.prompt_tokens <= most_input_tokens(bound), name
            assert counts.completion_tokens <= bound.output_tokens * max(
                1, fields.get("n") or 1), name
            checked += 1

    assert checked > 190
