"""Who may do what: tokens, hosts, own routes, routes under a budget, and where keys go."""
import contextlib
import gzip
import io
import json
import logging
import re
import socket
import zlib

import pytest
from support import (ADMIN_TOKEN, ANTHROPIC_KEY, CANARIES, OPENAI_KEY, TOKEN, Close, MockProvider,
                     RawClient, Reply, anthropic_error, call, openai_error, program,
                     settled_status, sse, start_proxy)

ic = program()
CHAT = {"model": "gpt-4o-mini", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]}
MESSAGE = {**CHAT, "model": "claude-haiku-4-5"}
PATHS = {"/v1/chat/completions": CHAT, "/v1/messages": MESSAGE}


@pytest.fixture(scope="module")
def served():
    with MockProvider() as mock:
        proxy = start_proxy(mock, "--budget", "1", "--admin-token", ADMIN_TOKEN)
        yield mock, proxy
        proxy.stop()


# Tokens.

@pytest.mark.parametrize("headers, status", [
    ([("Authorization", f"Bearer {TOKEN}")], 200),
    ([("authorization", f"bearer  {TOKEN} ")], 200),
    ([("X-Api-Key", TOKEN)], 200),
    ([("x-api-key", TOKEN), ("authorization", "Bearer other")], 200),
    ([("x-api-key", "other"), ("authorization", f"Bearer {TOKEN}")], 200),
    ([], 401), ([("Authorization", "")], 401), ([("Authorization", "Bearer ")], 401),
    ([("Authorization", TOKEN)], 401), ([("Authorization", f"Basic {TOKEN}")], 401),
    ([("x-api-key", TOKEN[:-1])], 401), ([("x-api-key", TOKEN + "0")], 401),
    ([("x-api-key", TOKEN.upper())], 401), ([("x-api-key", "\xe4\xf6\xfc")], 401),
    ([("x-api-key", OPENAI_KEY)], 401), ([("cookie", f"token={TOKEN}")], 401),
])
@pytest.mark.parametrize("path", PATHS)
def test_the_token_is_taken_as_bearer_or_x_api_key_and_nothing_else(
        served, path, headers, status):
    mock, proxy = served
    sent = len(mock.seen)

    answer = call(proxy.port, "POST", path, PATHS[path], headers, token=None)

    assert status == answer.status
    assert sent + (status == 200) == len(mock.seen)
    if status == 401:
        kind = answer.json["error"]["type"]
        assert kind == ("authentication_error" if path == "/v1/messages"
                        else "invalid_request_error")
        assert "Invalid API key" in answer.json["error"]["message"]
        assert "false" == answer.header("x-should-retry")


@pytest.mark.parametrize("method, path", [
    ("POST", "/"), ("PUT", "/"), ("GET", "/x"), ("GET", "/ironcage/status"),
    ("GET", "/ironcage/budget"), ("PUT", "/ironcage/budget"), ("GET", "/v1/models"),
    ("OPTIONS", "/v1/messages"), ("GET", "//"), ("GET", "/ironcage/")])
def test_everything_but_get_and_head_of_the_root_needs_a_token(served, method, path):
    _, proxy = served

    assert 401 == call(proxy.port, method, path, b"{}", token=None).status


def test_any_method_on_the_root_is_greeted_with_a_token_as_by_the_original(served):
    _, proxy = served

    assert b"LlmRouter OK" == call(proxy.port, "POST", "/", b"{}").body


def test_the_greeting_does_not_read_a_body_that_nobody_vouches_for(served):
    _, proxy = served
    with RawClient(proxy.port) as client:
        client.send(b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999\r\n\r\n")
        answer = client.read_answer()

        assert (200, "close") == (answer.status, answer.header("connection"))
        assert client.is_closed_by_server()


def test_an_error_about_a_model_has_the_shape_that_its_client_reads(served):
    _, proxy = served

    theirs, ours = (call(proxy.port, "GET", "/v1/models/nope", None, headers).json
                    for headers in ([("anthropic-version", "2023-06-01")], []))

    assert ("error", "not_found_error") == (theirs["type"], theirs["error"]["type"])
    assert "type" not in ours and "code" in ours["error"]


@pytest.mark.parametrize("path", ["/ironcage/nothing", "/v1/foo", "/v1/models/none"])
def test_an_error_to_a_head_request_has_no_body_that_could_be_the_next_answer(served, path):
    _, proxy = served
    with RawClient(proxy.port) as client:
        client.request("HEAD", path)
        refused = client.read_answer(to_head=True)
        client.request("GET", "/ironcage/budget")
        after = client.read_answer()

    assert 400 <= refused.status
    assert "limit_microdollars" in after.json


# Own routes.

def test_an_unknown_own_route_is_a_404_that_names_the_known_ones(served):
    _, proxy = served

    answer = call(proxy.port, "GET", "/ironcage/secrets")

    assert 404 == answer.status
    assert "/ironcage/status" in answer.json["error"]["message"]


@pytest.mark.parametrize("method, path, allowed", [
    ("POST", "/ironcage/status", "GET"), ("DELETE", "/ironcage/budget", "GET, PUT"),
    ("POST", "/healthz", "GET, HEAD"), ("PUT", "/ironcage/dashboard", "GET, HEAD")])
def test_a_wrong_method_on_an_own_route_is_a_405_that_names_the_right_ones(
        served, method, path, allowed):
    _, proxy = served

    answer = call(proxy.port, method, path, b"{}")

    assert (405, allowed) == (answer.status, answer.header("allow"))


def put_budget(proxy, body, token=ADMIN_TOKEN, content_type="application/json"):
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    with RawClient(proxy.port) as client:
        lines = ["PUT /ironcage/budget HTTP/1.1", "Host: localhost",
                 f"Authorization: Bearer {token}", f"Content-Length: {len(raw)}"]
        if content_type is not None:
            lines.append(f"Content-Type: {content_type}")
        client.send("\r\n".join(lines).encode() + b"\r\n\r\n" + raw)
        return client.read_answer()


@pytest.mark.parametrize("body", [
    {}, [], {"limit_usd": True}, {"limit_usd": "-1"}, {"limit_usd": "NaN"},
    {"limit_usd": "1e999"}, {"limit_usd": "ten"}, {"limit_usd": {}}, {"limit_usd": ""},
    {"limit_usd": "1", "more": 1}, b'{"limit_usd": "1", "limit_usd": "2"}', b"limit_usd=1",
    b'{"limit_usd": Infinity}', b"{"], ids=repr)
def test_a_bad_limit_is_refused_and_changes_nothing(served, body):
    _, proxy = served

    answer = put_budget(proxy, body)

    assert 400 == answer.status, answer.body
    assert 1_000_000 == proxy.router.controller.budget_limit()


@pytest.mark.parametrize("many", [b"1.5", b"1e9", b'"a"', b"{}"])
def test_a_limit_of_a_million_values_is_refused_before_any_is_read(served, monkeypatch, many):
    _, proxy = served
    monkeypatch.setattr(ic, "exact_number", lambda text: pytest.fail("a number was read"))

    answer = put_budget(proxy, b'{"limit_usd": [%b]}' % b",".join([many] * 100_000))

    assert 400 == answer.status
    assert "send the amounts alone" in answer.json["error"]["message"]


@pytest.mark.parametrize("content_type, status", [
    ("text/plain", 415), ("application/x-www-form-urlencoded", 415), (None, 415),
    ("application/json; charset=utf-8", 200)])
def test_the_limit_is_set_as_json_only_so_that_no_form_can_post_it(served, content_type, status):
    _, proxy = served

    assert status == put_budget(proxy, {"limit_usd": "1.00"}, content_type=content_type).status


def test_a_callers_token_cannot_raise_its_own_limit(served):
    _, proxy = served

    answer = put_budget(proxy, {"limit_usd": "9"}, token=TOKEN)

    assert 403 == answer.status
    assert 1_000_000 == proxy.router.controller.budget_limit()


def test_without_an_admin_token_the_limit_cannot_be_set_and_the_answer_says_how(mock, proxy):
    answer = put_budget(proxy, {"limit_usd": "9"}, token=TOKEN)

    assert 403 == answer.status
    assert "--admin-token" in answer.json["error"]["message"]


@pytest.mark.parametrize("limit, microdollars", [
    ("20.00", 20_000_000), (20, 20_000_000), (0.1, 100_000), ("0.0000019", 1)])
def test_a_limit_is_exact(mock, proxy_for, limit, microdollars):
    proxy = proxy_for("--admin-token", ADMIN_TOKEN)

    answer = put_budget(proxy, {"limit_usd": limit})

    assert microdollars == answer.json["limit_microdollars"]


def test_the_admins_token_reads_the_status_but_calls_no_models(served):
    mock, proxy = served
    sent = len(mock.seen)

    status = call(proxy.port, "GET", "/ironcage/status", token=ADMIN_TOKEN)
    refused = call(proxy.port, "POST", "/v1/chat/completions", CHAT, token=ADMIN_TOKEN)

    assert (200, 403) == (status.status, refused.status)
    assert sent == len(mock.seen)


def test_no_answer_carries_cors_headers(mock, proxy):
    mock.models.add("x")
    origin = [("origin", "https://evil.example"), ("access-control-request-method", "PUT")]
    answers = [call(proxy.port, method, path, b"{}", origin) for method, path in (
        ("OPTIONS", "/ironcage/budget"), ("GET", "/ironcage/status"), ("GET", "/"),
        ("POST", "/v1/messages"))]

    assert not [name for answer in answers for name, _ in answer.headers
                if name.startswith("access-control")]


def test_a_host_of_an_embedder_that_is_none_is_refused():
    with pytest.raises(program().Misconfigured, match="--allow-host: must be a host name"):
        program().LlmRouter(environ={}, allow_hosts=("a:b",))


def test_a_name_given_with_allow_host_is_answered_to(mock, proxy_for):
    proxy = proxy_for("--allow-host", "cage.local")

    answers = [raw_status(proxy, host) for host in ("cage.local", "CAGE.local:8787",
                                                    "other.local")]

    assert [200, 200, 403] == answers


def raw_status(proxy, host):
    with RawClient(proxy.port) as client:
        client.send(f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        return client.read_answer().status


@pytest.mark.parametrize("host, stated", [
    ("2001:db8::1", "[2001:db8::1]:8787"), ("[2001:db8::2]", "[2001:DB8::2]"),
    ("cage.local:8080", "cage.local"), ("cage.local", "cage.local:9")])
def test_hosts_are_compared_without_brackets_ports_and_case(mock, proxy_for, host, stated):
    assert 200 == raw_status(proxy_for("--allow-host", host), stated)


# Routes.

@pytest.mark.parametrize("path, provider", [
    ("/openai/v1/chat/completions", "openai"), ("/anthropic/v1/messages", "anthropic")])
def test_a_first_segment_picks_the_provider(served, path, provider):
    mock, proxy = served
    fields = CHAT if provider == "openai" else MESSAGE

    answer = call(proxy.port, "POST", path, fields)

    assert 200 == answer.status
    assert "/v1/" + path.split("/v1/")[1] == mock.seen[-1].target


@pytest.mark.parametrize("behind", ["", "/v1", "/v1/v1", "/v1/v1/v1"])
@pytest.mark.parametrize("names_provider", [False, True])
@pytest.mark.parametrize("route, fields", [
    ("/chat/completions", CHAT), ("/completions", {"model": "gpt-3.5-turbo-instruct",
                                                   "prompt": "hi"}),
    ("/embeddings", {"model": "text-embedding-3-small", "input": "hi"}),
    ("/responses", {"model": "gpt-4o-mini", "input": "hi", "max_output_tokens": 20}),
    ("/messages", MESSAGE)])
def test_a_metered_route_is_metered_whatever_a_client_puts_before_it(
        mock, proxy, behind, names_provider, route, fields):
    """SDKs differ in what they put behind a base URL; the provider gets its own path."""
    segment = "/anthropic" if route == "/messages" else "/openai"

    answer = call(proxy.port, "POST", segment * names_provider + behind + route, fields)

    assert (200, "/v1" + route) == (answer.status, mock.seen[-1].target)
    assert mock.billed_microdollars == settled_status(proxy)["spent_microdollars"] > 0


@pytest.mark.parametrize("prefix", ["", "/v1", "/v1/v1", "/anthropic", "/anthropic/v1/v1"])
def test_free_routes_and_models_have_the_same_other_spellings(mock, proxy_for, prefix):
    proxy = proxy_for("--budget", "0")

    counted = call(proxy.port, "POST", prefix + "/messages/count_tokens?beta=true", {
        name: MESSAGE[name] for name in ("model", "messages")})
    models = call(proxy.port, "GET", prefix + "/models")
    one = call(proxy.port, "GET", prefix + "/models/claude-haiku-4-5")

    assert (200, {"input_tokens": 42}) == (counted.status, counted.json)
    assert "/v1/messages/count_tokens?beta=true" == mock.seen[0].target
    if prefix.startswith("/anthropic"):                     # its own list was asked for
        assert ["/v1/models", "/v1/models/claude-haiku-4-5"] == [
            seen.target for seen in mock.seen[1:]]
    else:
        assert [200, 200] == [models.status, one.status]
        assert "claude-haiku-4-5" in {row["id"] for row in models.json["data"]}


@pytest.mark.parametrize("path, sent", [
    ("/files", "/files"), ("/v1/v1/files", "/v1/v1/files"), ("/openai/files", "/files"),
    ("/v1beta/models", "/v1beta/models"), ("/openai/api/v1/x", "/api/v1/x"), ("/v1", "/v1"),
    ("/typo/v1/models", "/typo/v1/models"), ("//v1/messages", "//v1/messages")])
def test_without_a_budget_a_path_that_is_no_route_of_ours_passes_as_it_stands(
        mock, proxy_for, path, sent):
    mock.always = Reply(steps=(b"{}",))

    assert 200 == call(proxy_for().port, "GET", path).status
    assert [sent] == [seen.target for seen in mock.seen]


@pytest.mark.parametrize("path, is_anthropic", [
    ("/messages", True), ("/v1/v1/messages", True), ("/anthropic/messages", True),
    ("/openai/messages", True), ("/messages/count_tokens", True), ("/lab/v1/messages", True),
    ("/chat/completions", False), ("/anthropic/chat/completions", False),
    ("/v1/threads/thread_1/messages", False), ("/v1/messagesfoo", False)])
def test_an_error_has_the_shape_of_the_routes_dialect_however_it_is_spelled(
        served, path, is_anthropic):
    _, proxy = served

    answer = call(proxy.port, "POST", path, CHAT, token="not-a-token-of-ours")

    assert (401, is_anthropic) == (answer.status, answer.json.get("type") == "error")


@pytest.mark.parametrize("path", [
    "/anthropicfoo/v1/messages", "/openaiv1/chat/completions", "/OpenAI/v1/chat/completions",
    "/openai", "/ironcagefoo", "/openai/openai/v1/chat/completions",
    "/v1/chat/completions/", "/v1/chat/completions/x", "//v1/chat/completions",
    "/v1//chat/completions", "/v1/chat%2Fcompletions", "/%761/chat/completions",
    "/V1/chat/completions", "/v1chat/completions", "/chat%2Fcompletions", "/v1//messages",
    "//messages", "/v1/%76%31/messages", "/v1/v1%2Fmessages", "/v1//v1/messages", "/messages/",
    "/openai//chat/completions", "/openai/v1/v1", "/v1", "/v1/v1", "/v1/openai/chat/completions",
    "/typo/chat/completions", "/v1beta/messages", "/v1/images/generations", "/v1/audio/speech",
    "/v1/audio/transcriptions", "/v1/batches", "/v1/messages/batches", "/v1/files",
    "/v1/responses/compact", "/v1/responses/resp_1/x", "/v1/fine_tuning/jobs", "/v1/realtime",
    "/v1/complete", "/v1/threads"])
@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH"])
def test_under_a_budget_what_is_not_exactly_a_metered_route_is_refused(served, method, path):
    mock, proxy = served
    sent = len(mock.seen)

    answer = call(proxy.port, method, path, CHAT)

    error = answer.json["error"]
    assert 400 == answer.status
    assert "iron_cage_unmetered_route" in (error["type"], error.get("code"))
    assert sent == len(mock.seen)


@pytest.mark.parametrize("method, path", [
    ("GET", "/openai/v1/models"), ("GET", "/openai/v1/models/gpt-4o-mini"),
    ("POST", "/v1/moderations"), ("POST", "/v1/responses/input_tokens"), ("GET", "/v1/responses/resp_1"),
    ("DELETE", "/v1/responses/resp_1"), ("POST", "/v1/responses/resp_1/cancel"),
    ("POST", "/v1/messages/count_tokens")])
def test_free_routes_pass_under_any_budget_and_cost_nothing(mock, proxy_for, method, path):
    proxy = proxy_for("--budget", "0")
    mock.always = Reply(steps=(b'{"ok": true}',))

    fields = MESSAGE if "messages" in path else CHAT

    answer = call(proxy.port, method, path, fields if method == "POST" else None)

    assert (200, {"ok": True}) == (answer.status, answer.json)
    assert 0 == settled_status(proxy)["spent_microdollars"]


@pytest.mark.parametrize("provider, passes", [
    ("mistral", False), ("lab", False), ("ollama", True), ("openai", True)])
def test_moderations_pass_under_a_budget_only_where_they_are_free(
        mock, proxy_with, provider, passes):
    proxy = proxy_with({"providers": {
        name: {"base_url": mock.url, "key_env": "OPENAI_API_KEY"}
        for name in ("mistral", "lab", "ollama")}}, "--budget", "0.000001")
    mock.always = Reply(steps=(b"{}",))

    answer = call(proxy.port, "POST", f"/{provider}/v1/moderations", {"model": "m", "input": "x"})

    assert (200 if passes else 400, int(passes)) == (answer.status, len(mock.seen))


def test_an_allowed_path_passes_unmetered_and_is_named_in_the_banner(mock, proxy_for):
    mock.always = Reply(steps=(b"{}",))
    proxy = proxy_for("--budget", "1", "--allow-path", "/v1/images/*")

    statuses = [call(proxy.port, "POST", path, CHAT).status
                for path in ("/v1/images/generations", "/v1/audio/speech")]

    assert [200, 400] == statuses
    assert "/v1/images/*" in program().banner(proxy)


def test_without_a_budget_any_path_passes(mock, proxy_for):
    mock.always = Reply(steps=(b"{}",))
    proxy = proxy_for()

    for path in ("/v1/images/generations", "/v1/audio/speech", "/v1/batches", "/anything"):
        assert 200 == call(proxy.port, "POST", path, CHAT).status


@pytest.mark.parametrize("write", [
    str, lambda token: token.replace("_", "%5f"),
    lambda token: "".join(f"%{ord(char):02X}" for char in token),
    lambda token: token.replace("_", "%255F")])
@pytest.mark.parametrize("target", ["/v1/chat/completions?key={}", "/v1/chat/completions?a=1&b=x{}",
                                    "/v1/files?{}=1", "/v1/files/{}"])
def test_a_token_in_the_url_is_refused_and_reaches_no_provider(
        mock, proxy, caplog, write, target):
    method, fields, header = ("POST", CHAT, ("authorization", f"Bearer {TOKEN}")) \
        if "chat" in target else ("GET", None, ("x-api-key", TOKEN))

    answer = call(proxy.port, method, target.format(write(TOKEN)), fields, [header], token=None)

    assert 400 == answer.status and b"belongs in the Authorization header" in answer.body
    assert [] == mock.seen and TOKEN.encode() not in answer.body
    assert not any(write(TOKEN) in str(vars(record)) for record in caplog.records)


def test_a_word_beside_the_token_that_the_path_holds_is_no_token_in_the_url(mock, proxy):
    answer = call(proxy.port, "POST", "/v1/chat/completions?key=other", CHAT,
                  [("x-api-key", "completions")])

    assert 200 == answer.status


@pytest.mark.parametrize("headers, path", [
    ([("x-http-method-override", "DELETE")], "/v1/chat/completions"),
    ([("x-method-override", "POST")], "/v1/responses/resp_1"),
    ([], "/v1/responses/resp_1?_method=POST")])
def test_a_method_override_is_refused_under_a_budget(served, headers, path):
    _, proxy = served
    is_get = "resp_1" in path

    answer = call(proxy.port, "GET" if is_get else "POST", path, None if is_get else CHAT, headers)

    assert (400, "iron_cage_unmetered_route") == (answer.status, answer.json["error"]["type"])


@pytest.mark.parametrize("path, fields", [
    ("/v1/completions", MESSAGE), ("/completions", MESSAGE), ("/v1/embeddings", MESSAGE)])
def test_a_model_that_does_not_speak_the_paths_dialect_is_refused_clearly(served, path, fields):
    _, proxy = served

    answer = call(proxy.port, "POST", path, fields)

    assert 400 == answer.status
    assert "dialect" in answer.json["error"]["message"]
    assert answer.json["error"]["message"].endswith(
        " /v1/chat/completions or /v1/responses or /v1/messages")


def test_a_provider_without_a_key_is_named_with_the_variable_to_set(mock, proxy_for):
    proxy = proxy_for("--budget", "1", environ={"OPENAI_API_KEY": "sk-only"})

    answer = call(proxy.port, "POST", "/v1/messages", MESSAGE)

    assert (400, "iron_cage_no_provider_key") == (
        answer.status, answer.json["error"].get("code"))
    assert "ANTHROPIC_API_KEY" in answer.json["error"]["message"]
    assert 0 == settled_status(proxy)["reserved_microdollars"]


# Where keys go.

@pytest.mark.parametrize("path, headers, fields", [
    ("//evil.example/v1/messages", [], MESSAGE),
    ("/@evil.example/v1", [], MESSAGE),
    ("/v1/chat/completions?url=http://evil.example", [], CHAT),
    ("/v1/chat/completions", [("x-forwarded-host", "evil.example"), ("forwarded",
                              "host=evil.example"), ("x-portkey-custom-host", "evil.example"),
                              ("x-base-url", "http://evil.example")], CHAT),
    ("/v1/chat/completions", [], {**CHAT, "api_base": "http://evil.example",
                                  "base_url": "http://evil.example"}),
    ("/v1/chat/completions", [], {**CHAT, "messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "http://evil.example/x.png"}}]}]}),
    ("/openai/@evil.example", [], CHAT), ("/evil.example:443/v1", [], CHAT)])
def test_nothing_in_a_request_changes_where_it_goes(mock, proxy_for, monkeypatch, path, headers,
                                                    fields):
    proxy = proxy_for()
    mock.always = Reply(steps=(b"{}",))
    dialled, connect = [], socket.create_connection

    def noting(address, *args, **options):
        dialled.append(address)
        return connect(address, *args, **options)

    with_client = call(proxy.port, "GET", "/").status
    monkeypatch.setattr(socket, "create_connection", noting)
    import http.client
    monkeypatch.setattr(http.client.socket, "create_connection", noting)
    call(proxy.port, "POST", path, fields, headers)

    assert 200 == with_client
    assert {("127.0.0.1", proxy.port), ("127.0.0.1", mock.port)} >= set(dialled)
    assert 1 == len(mock.seen)
    assert f"127.0.0.1:{mock.port}" == mock.seen[0].header("host")


def answers_of_every_kind(mock, proxy):
    """Every answer that can be provoked here, as bytes of head and body."""
    stream = {**CHAT, "stream": True}
    scripts = [None, openai_error(400, "no"), openai_error(401, "no"), openai_error(500, "no"),
               anthropic_error(529, "no"), Reply(answers=False),
               Reply(headers=(("content-type", "text/event-stream"),), framing="chunked",
                     steps=(b"data: {}\n\n", Close())), Reply(302, (("location", "http://x"),))]
    for fields in (CHAT, stream, MESSAGE, {**CHAT, "model": 7}, {**CHAT, "model": "gpt-none"},
                   {**CHAT, "max_tokens": 10 ** 8}):
        path = "/v1/messages" if fields is MESSAGE else "/v1/chat/completions"
        for script in scripts:
            if script is not None:
                mock.script(script)
            answer = call(proxy.port, "POST", path, fields)
            yield repr(answer.headers).encode() + answer.body
            while not mock._script.empty():
                mock._script.get()
    for method, path, token in (
            ("GET", "/ironcage/status", TOKEN), ("GET", "/ironcage/budget", TOKEN),
            ("PUT", "/ironcage/budget", TOKEN), ("GET", "/ironcage/x", TOKEN),
            ("GET", "/v1/models", TOKEN), ("POST", "/v1/messages", "wrong"), ("GET", "/", None)):
        answer = call(proxy.port, method, path, b"{}" if method != "GET" else None, token=token)
        yield repr(answer.headers).encode() + answer.body


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_canary_keys_appear_nowhere_but_in_their_providers_auth_header(
        mock, proxy_for, monkeypatch, log_format):
    module, written = program(), io.StringIO()
    handler = logging.StreamHandler(written)
    handler.setFormatter(module.LogFormatter(log_format))
    module.log.addHandler(handler)
    module.log.setLevel(logging.DEBUG)
    proxy = proxy_for("--budget", "1", "--admin-token", ADMIN_TOKEN)
    try:
        shown = b"".join(answers_of_every_kind(mock, proxy))
        monkeypatch.setattr(module, "answer_headers", lambda headers: 1 / 0)
        shown += call(proxy.port, "POST", "/v1/chat/completions", CHAT).body
    finally:
        module.log.removeHandler(handler)
    monkeypatch.undo()
    everything = shown + "".join([
        written.getvalue(), module.banner(proxy), repr(proxy.settings), repr(proxy.router),
        repr(vars(proxy.router)), repr(vars(proxy)), repr(list(proxy.router.providers.values())),
    ]).encode()

    assert "ZeroDivisionError" in written.getvalue()
    assert [] == [canary for canary in CANARIES if canary.encode() in everything]
    for request in mock.seen:
        head = repr(request.headers) + request.target + request.body.decode()
        key = ANTHROPIC_KEY if request.path.startswith("/v1/messages") else OPENAI_KEY
        assert 1 == head.count(key)
        assert not [canary for canary in CANARIES if canary != key and canary in head]


# Found by a hostile reviewer.

@pytest.mark.parametrize("path, fields", [
    ("/v1/chat/completions", CHAT), ("/v1/messages", {**CHAT, "model": "gpt-4o-mini"}),
    ("/v1/files", None)], ids=["same format", "translated", "unmetered"])
@pytest.mark.parametrize("status", [200, 401, 500])
def test_a_key_that_its_provider_repeats_does_not_reach_the_agent(
        mock, proxy_for, path, fields, status):
    """Echo servers and some gateways print the credential in their error."""
    mock.always = lambda request: Reply(status, (
        ("content-type", "application/json"), ("x-debug", request.header("authorization")),
        ("x-other", "stays")), (json.dumps({"id": "x", "error": {
            "message": f"Incorrect API key: {request.header('authorization')}"},
            "choices": [{"message": {"content": OPENAI_KEY}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 1, "completion_tokens": 1}}).encode(),))

    answer = call(proxy_for().port, "POST" if fields else "GET", path, fields)

    assert status == answer.status
    assert OPENAI_KEY not in str(answer.headers) + answer.body.decode()
    assert "stays" == answer.header("x-other")


KEY_REPLIES = {          # how a provider may send what holds its key: headers, body, framing
    "compressed": (("content-encoding", "gzip"), gzip.compress, "length"),
    "compressed chunks": (("content-encoding", "gzip"), gzip.compress, "chunked"),
    "at once": ((), bytes, "length"),
    "chunks": ((), bytes, "chunked"),
    "to the end of the connection": ((), bytes, "close"),
}
MESSAGE_START = sse({"type": "message_start", "message": {
    "id": "msg_1", "type": "message", "role": "assistant", "model": "claude-haiku-4-5",
    "content": [], "stop_reason": None, "usage": {"input_tokens": 3, "output_tokens": 1}}},
    "message_start").decode()


def inflated_as_far_as_it_goes(received):
    """What a client can read of a gzip body, with the framing of small chunks in between."""
    inflate, plain = zlib.decompressobj(47), b""
    body = received[received.find(b"\x1f\x8b"):] if b"\x1f\x8b" in received else b""
    with contextlib.suppress(zlib.error):
        for byte in re.sub(rb"\r\n[0-9a-f]{1,3}\r\n", b"", body):
            plain += inflate.decompress(bytes([byte]))
    return plain


@pytest.mark.parametrize("kind", KEY_REPLIES)
@pytest.mark.parametrize("status", [200, 401])
@pytest.mark.parametrize("method, path, fields, text", [
    ("POST", "/v1/chat/completions", CHAT, '{"error": {"message": "no: %s"}}'),
    ("GET", "/v1/files", None, '{"data": ["%s"]}'),
    ("POST", "/v1/chat/completions", {**CHAT, "stream": True}, 'data: {"error": "no: %s"}\n\n'),
    ("POST", "/v1/chat/completions", {**CHAT, "stream": True, "model": "claude-haiku-4-5"},
     'event: error\ndata: {"type": "error", "error": {"message": "no: %s"}}\n\n'),
    ("POST", "/v1/chat/completions", {**CHAT, "stream": True, "model": "claude-haiku-4-5"},
     MESSAGE_START + 'event: error\ndata: {"type": "error", "error": {"message": "%s"}}\n\n')],
    ids=["whole", "unmetered", "stream", "translated error", "translated stream"])
def test_a_repeated_key_is_kept_back_in_any_framing(mock, proxy_for, kind, status, method, path,
                                                    fields, text):
    """Split at every place that a read can end in: within the key, before and behind it."""
    header, encode, framing = KEY_REPLIES[kind]
    key = ANTHROPIC_KEY if "claude" in str(fields) else OPENAI_KEY
    media = "text/event-stream" if "data: " in text else "application/json"
    body = encode((text % key).encode())
    at = body.find(key.encode())
    steps = [body[:at + 5], body[at + 5:at + 9], body[at + 9:]] if at >= 0 else \
        [body[:30], body[30:]]
    mock.always = Reply(status, (("content-type", media), *([header] if header else [])),
                        tuple(steps), framing=framing)

    with RawClient(proxy_for().port) as client:
        client.request(method, path, fields and json.dumps(fields).encode(),
                       [("Connection", "close")])
        received = b"".join(iter(lambda: client.sock.recv(65536), b""))

    assert received.startswith(b"HTTP/1.1 ")
    for seen in (received, inflated_as_far_as_it_goes(received)):
        assert key[:ic.OPEN_KEY_CHARS + 1].encode() not in seen
    if not header and "claude" not in str(fields):
        assert received.count(b"*") >= len(key) - ic.OPEN_KEY_CHARS


def test_what_only_begins_like_the_key_arrives_whole(mock, proxy_for):
    body = b'{"data": "' + OPENAI_KEY[:20].encode() + b" and " + OPENAI_KEY[:9].encode()
    mock.always = Reply(200, (("content-type", "application/json"),),
                        (body[:15], body[15:40], body[40:]), framing="chunked")

    assert body == call(proxy_for().port, "GET", "/v1/files").body


def test_a_key_that_is_a_word_is_no_secret_and_changes_no_answer(mock, proxy_for):
    mock.applies_vendor_rules = False
    proxy = proxy_for(environ={"OPENAI_API_KEY": "ollama", "IRONCAGE_OPENAI_BASE_URL": mock.url})
    mock.always = Reply(200, (("content-type", "application/json"), ("x-served-by", "ollama")),
                        (b'{"data": "this is ollama"}',))

    answer = call(proxy.port, "GET", "/v1/files")

    assert (b'{"data": "this is ollama"}', "ollama") == (answer.body, answer.header("x-served-by"))


@pytest.mark.parametrize("path, fields", [
    ("/v1/responses", {"input": "x", "tools": [{"type": "image_generation", "model": "gpt-5.5"}]}),
    ("/v1/chat/completions", {**CHAT, "models": ["gpt-5.5"]}),
    ("/v1/chat/completions", {**CHAT, "fallbacks": [{"model": "gpt-5.5"}]}),
    ("/v1/chat/completions", {**CHAT, "Model": "gpt-5.5"}),
    ("/v1/chat/completions", {**CHAT, "model": "openrouter/openai/gpt-4o-mini"}),
    ("/v1/messages/count_tokens", {**MESSAGE, "model": "claude-sonnet-4-5"}),
    ("/v1/moderations", {"model": "omni-moderation-latest", "input": "x"})])
def test_a_token_reaches_its_own_models_only_without_a_budget_too(mock, proxy_with, path, fields):
    proxy = proxy_with({
        "tokens": [{"name": "a", "token": "tok_0123456789", "models": ["openai/gpt-4o-mini"]}],
        "providers": {"openrouter": {"base_url": mock.url, "key_env": "OPENAI_API_KEY"}}})

    own = call(proxy.port, "POST", "/v1/chat/completions", CHAT, token="tok_0123456789")
    others = call(proxy.port, "POST", path, {"model": "gpt-4o-mini", **fields},
                  token="tok_0123456789")

    kind = others.json["error"].get("code") or others.json["error"]["type"]
    assert (200, 403, 1) == (own.status, others.status, len(mock.seen))
    assert kind in ("model_not_allowed", "permission_error")


@pytest.mark.parametrize("length", ["\u00b2", "9" * 5000, "-1"])
def test_an_odd_length_of_an_answer_without_a_body_is_the_providers_fault(
        mock, proxy_for, length):
    mock.always = Reply(200, (("content-length", length),), (), framing="close")

    answer = call(proxy_for().port, "HEAD", "/v1/files/x")

    assert 502 == answer.status


def test_many_tool_results_are_paired_in_linear_time():
    """A list was searched for each of them: 20,000 took seconds, before any reservation."""
    module, count = program(), 4_000
    fields = {"model": "claude-haiku-4-5", "messages": [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "tool_calls": [{"id": f"c{n}", "type": "function", "function": {
            "name": "f", "arguments": ""}} for n in range(count)]},
        *({"role": "tool", "tool_call_id": f"c{n}", "content": "R"} for n in range(count))]}
    compared = []

    class Counted(str):
        def __eq__(self, other):
            compared.append(1)
            return str.__eq__(self, other)
        __hash__ = str.__hash__

    for message in fields["messages"][2:]:
        message["tool_call_id"] = Counted(message["tool_call_id"])
    module.Translator("chat", "messages", fields, module.Losses(), module.Target(100))

    assert len(compared) < 20 * count


@pytest.mark.parametrize("url, proxy_url", [
    ("https://a..b", None), (f"https://{'a' * 64}.example", None),
    ("https://provider.example", "http://127.0.0.1:abc")], ids=["IDNA", "label", "HTTPS_PROXY"])
def test_a_host_that_is_no_name_costs_nothing_and_is_told(proxy_for, monkeypatch, url, proxy_url):
    if proxy_url is not None:
        monkeypatch.setenv("HTTPS_PROXY", proxy_url)
    proxy = proxy_for("--budget", "1", environ={
        "OPENAI_API_KEY": OPENAI_KEY, "IRONCAGE_OPENAI_BASE_URL": url})

    answer = call(proxy.port, "POST", "/v1/chat/completions", CHAT)

    assert (502, "upstream_unreachable") == (answer.status, answer.json["error"]["code"])
    assert 0 == settled_status(proxy)["spent_microdollars"]


def test_a_connection_whose_answer_had_no_body_is_not_used_again(mock, proxy_for):
    """Some servers send a body to HEAD; the next caller would read it as its answer."""
    proxy = proxy_for()
    for method in ("HEAD", "GET", "GET"):
        call(proxy.port, method, "/v1/files")

    assert 2 == mock.connections
