"""The Router on scripted wires: what it refuses before it sends, what it makes of each answer, and
that a call settles once however it ends. The same over sockets: wire/ and faults/."""
import contextlib
import gc
import json
import time
import weakref
from random import Random
from types import SimpleNamespace

import pytest
from scripted_wires import ScriptedWire
from support import TOKEN, program, proxy_environment

ic = program()
USER = [{"role": "user", "content": "hi"}]
CHAT = ("/v1/chat/completions", {"model": "gpt-4o-mini", "max_tokens": 10, "messages": USER})
MESSAGES = ("/v1/messages", {"model": "claude-haiku-4-5", "max_tokens": 10, "messages": USER})
RESPONSES = ("/v1/responses", {"model": "gpt-4o-mini", "max_output_tokens": 10, "input": "hi"})
ON_GPT = ("/v1/messages", {**MESSAGES[1], "model": "gpt-4o-mini"})
ON_CLAUDE = ("/v1/chat/completions", {**CHAT[1], "model": "claude-haiku-4-5"})
STREAM = {"stream": True}
ON_GPT_STREAMED = ON_GPT[0], {**ON_GPT[1], **STREAM}
DONE = {"id": "c", "model": "gpt-4o-mini", "choices": [
    {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "hello"}}],
    "usage": {"prompt_tokens": 100, "completion_tokens": 100}}
DONE_COSTS = 75                # microdollars: 100 at $0.15, 100 at $0.60 a million
DEFAULT = ic.Caller("default", ic.token_sha256(TOKEN))
ALICE = ic.Caller("alice", "a" * 64)


def whole(body, status=200, kind="application/json", *headers):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = (f"content-type: {kind}", f"content-length: {len(data)}", "connection: close", *headers)
    return f"HTTP/1.1 {status} X\r\n".encode() + "".join(
        f"{line}\r\n" for line in lines).encode() + b"\r\n" + data


def stream(*events):
    data = b"".join(b"data: %s\n\n" % (event if isinstance(event, bytes) else json.dumps(
        event).encode()) for event in events)
    return whole(data, 200, "text/event-stream")


def delta(text, finish=None, **more):
    return {"id": "c", "model": "gpt-4o-mini", "choices": [
        {"index": 0, "delta": {"content": text}, "finish_reason": finish}], **more}


SETTINGS = ic.settings_from(["--token", TOKEN, "--budget", "1"], proxy_environment(None))
PRICES = ic.prices_under(ic.Config(), ic.load_prices(SETTINGS))


class Carrier:
    """A Router whose next new connection to a provider is scripted."""

    def __init__(self, ledger=None, **settings):
        self.ledger = ledger or ic.MemoryLedger()
        self.router = ic.Router(SETTINGS._replace(**settings), PRICES, self.ledger)
        self.router.configure(ic.Config(), PRICES)
        self.wires = []
        self.router._transport._connect = lambda request, authorization: self.wires.pop(0)

    def request(self, path, fields=None, method="POST", caller=DEFAULT, headers=(), query=None):
        body = b"" if fields is None else json.dumps(fields).encode()
        head = ic.RequestHead(method, path, query, 1, ic.Headers(headers))
        return ic.ClientRequest(head, body, "req_1", caller,
                                ic.Claim(self.router.memory, caller.name))

    @contextlib.contextmanager
    def open(self, path, fields=None, *reads, **request):
        wire = ScriptedWire(*reads)
        self.wires[:] = [wire]
        with self.router.open(self.request(path, fields, **request)) as answer:
            yield answer, wire

    def call(self, path, fields=None, *reads, **request):
        """(status, what the client reads, headers)."""
        with self.open(path, fields, *reads, **request) as (answer, _):
            body = answer.body if answer.reads is None else b"".join(
                piece for pieces in answer.reads for piece in pieces)
        return answer.status, body, dict(answer.headers)

    def refused(self, kind, path, fields=None, *reads, **request):
        """The error of a call that is refused or broken."""
        with pytest.raises(kind) as failure:
            self.call(path, fields, *reads, **request)
        return failure.value

    @property
    def rows(self):
        return self.ledger.recent(10)

    @property
    def spent(self):
        """What is spent, and what is still set aside."""
        budget = self.router.controller.budget()
        return budget.spent, budget.reserved


@pytest.fixture
def carrier():
    return Carrier()


@pytest.fixture
def pinging():
    """One whose translated streams ping at each read, for it is always time to."""
    return Carrier(timeouts=SETTINGS.timeouts._replace(ping_s=0))


@pytest.mark.parametrize("kind, fields, reads", [
    (ic.UnboundedRequest, {"a_field_that_may_cost": 1}, ()),
    (ic.BadRequest, {"model": "nonesuch"}, ()), (ic.UpstreamError, {}, (b"HTTP/1.1 2",)),
    (ic.UpstreamError, STREAM, (stream(delta("he")),))],
    ids=["refused", "unknown", "broken", "stream"])
def test_what_a_failed_call_has_read_is_freed_at_once(carrier, monkeypatch, kind, fields, reads):
    read, parsed = [], ic.ClientRequest.parsed
    monkeypatch.setattr(ic.ClientRequest, "parsed", lambda *args: read.append(
        weakref.ref(body := parsed(*args))) or body)
    gc.disable()                                   # which would free it late, beyond what is held
    try:
        carrier.call(CHAT[0], {**CHAT[1], "model": "gpt-4o", **fields}, *reads)
    except kind:
        pass                                       # pytest.raises would keep it
    finally:
        left = [body() for body in read]
        gc.enable()
    assert [None] == left


@pytest.mark.parametrize("flags, is_logged", [
    ((), False), (("--openai-base-url", "https://gateway.example"), True),
    (("--openai-chat-only",), True)])
def test_flags_of_a_provider_that_the_configuration_sets_too_are_said_to_set_nothing(
        flags, is_logged, caplog):
    router = ic.Router(ic.settings_from(flags, {}), PRICES, ic.MemoryLedger())
    router.configure(ic.Config(), PRICES)
    assert "set nothing" not in caplog.text
    router.configure(ic.Config(providers=(ic.provider_from("openai", {"fields": ["x"]}),)), PRICES)

    assert is_logged == ("--openai-base-url, set nothing" in caplog.text)


# What a request names.

@pytest.mark.parametrize("fields, model", [
    ({"model": "m"}, "m"), ({"prompt": {"id": "p"}}, ""), ({"model": "m", "prompt": {}}, "m")])
def test_a_request_names_a_model_or_a_stored_prompt(fields, model):
    assert model == ic.named_model(fields)


@pytest.mark.parametrize("fields", [{}, {"prompt": "text"}, {"model": ""}, {"model": 7},
                                    {"model": "", "prompt": {}}, {"model": ["m"]}])
def test_a_request_without_a_model_is_refused(fields):
    with pytest.raises(ic.BadRequest, match="a string that names a model"):
        ic.named_model(fields)


@pytest.mark.parametrize("fields, models", [
    ({"model": "m", "messages": ["model"]}, []), ({"Model": "x", "MODEL": 7}, ["x", "7"]),
    ({"models": ["a", {"model": "b"}]}, ["a", "b"]), ({"fallbacks": [{"model": "a"}]}, ["a"]),
    ({"tools": [{"model": "a"}, {"name": "f"}, 7]}, ["a"]), ({"tools": {"model": "a"}}, []),
])
def test_every_model_that_a_request_names_beside_its_own_is_found(fields, models):
    assert models == [*ic.other_models(fields)]


@pytest.mark.parametrize("fields", [
    {"model": "m" * 513}, {"model": "m", "models": ["m" * 513]}, {"model": "m", "MODEL": "m" * 513},
    {"model": "m", "tools": [{"model": "m" * 513}]}])
def test_a_name_too_long_to_look_for_is_refused(fields):
    assert "m" * 512 == ic.named_model({"model": "m" * 512})

    with pytest.raises(ic.BadRequest, match="at most 512 characters"):
        [ic.named_model(fields), *ic.other_models(fields)]


def test_no_answer_names_a_model_by_more():
    meter, name = ic.AnswerMeter("messages"), "m" * 513
    meter.read_answer(json.dumps({"model": name, "content": []}).encode())

    assert "m" * 512 == meter.model
    assert "m" * 512 == ic.usage_of("messages", {"iterations": [{
        "model": name, "input_tokens": 1, "output_tokens": 1}]}).parts[0][0]



@pytest.mark.parametrize("content_type, is_taken", [
    (None, True), ("application/json", True), ("application/json; charset=UTF-8", True),
    ('application/json; charset="utf8"', True), ("application/json; charset=latin-1", False)])
def test_a_body_in_another_charset_is_refused(carrier, content_type, is_taken):
    headers = [("content-type", content_type)] if content_type else ()
    request = carrier.request(*CHAT, headers=headers)

    with contextlib.nullcontext() if is_taken else pytest.raises(ic.UnsupportedBody):
        assert CHAT[1] == ic.json_body(request).fields


@pytest.mark.parametrize("request_of", [
    dict(query="_method=DELETE"), dict(headers=[("x-http-method-override", "GET")]),
    dict(query="a=1&%24httpHeaders=X-Vertex-AI-LLM-Shared-Request-Type%3Apriority"),
    dict(query="$http%48eaders=X-Vertex-AI-LLM-Request-Type:priority"),
    dict(query="%5fmethod=PUT"), dict(query="%25255Fmethod%20=PUT"), dict(query="_method+=PUT"),
    dict(query="X-HTTP-Method-Override=GET"), dict(query="a=%2525252525255Fmethod")])
@pytest.mark.parametrize("path, fields, method", [
    (*CHAT, "POST"), ("/v1/models", None, "GET")], ids=["metered", "unmetered"])
def test_a_method_override_is_refused_under_a_budget(carrier, path, fields, method, request_of):
    carrier.refused(ic.UnmeteredRoute, path, fields, method=method, **request_of)

    assert (0, 0) == carrier.spent


@pytest.mark.parametrize("name, dear, harmless", [
    ("x-vertex-ai-llm-shared-request-type", "priority", "flex"),
    ("x-vertex-ai-llm-request-type", "Priority", "Dedicated"),
    ("x-amzn-bedrock-service-tier", "priority", "default"),
    ("x-amzn-bedrock-servicetier", "of tomorrow", "flex"), ("service-tier", "priority", "standard"),
    ("x-amzn-bedrock-performanceconfig-latency", "optimized", "standard"),
    ("x-amzn-bedrock-guardrailidentifier", "g-1", None), ("x-ms-spillover-deployment", "d", None)])
def test_a_header_that_makes_a_call_dearer_than_its_body_says_is_refused_under_a_budget(
        carrier, name, dear, harmless):
    error = carrier.refused(ic.UnmeteredRoute, *CHAT, headers=[("x-app", "y"), (name, dear)])

    assert name in error.message
    assert (0, 0) == carrier.spent
    if harmless is not None:
        ic.check_head(carrier.request(*CHAT, headers=[(name, harmless)]))


@pytest.mark.parametrize("name, tier, is_dearer", [
    *((name, tier, True) for name in (
        "openai-project", "openai-organization", "x-goog-user-project", "chatgpt-account-id",
        "anthropic-workspace-id", "x-org-id") for tier in (None, "auto")),
    ("openai-project", "default", False), ("x-ironcage-project", None, False),
    ("x-projector", None, False)])
def test_a_header_that_chooses_an_account_is_bounded_at_the_dearest_tier_it_may_default_to(
        carrier, name, tier, is_dearer):
    fields = {**CHAT[1], "model": "gpt-4o", "service_tier": tier}
    for headers in [], [(name, "x")]:
        carrier.call(CHAT[0], fields, whole(DONE), headers=headers)

    chosen, plain = [row["bound_microdollars"] for row in carrier.rows]
    priority = 1.7                          # times the price of gpt-4o
    assert chosen == pytest.approx(plain * (priority if is_dearer else 1), abs=1)


# Values that a field of any request may be made of, and where they are put.
ODD = ([[]], [{}], {"x": []}, ["x"], [None], True, False, None, 0, -1, 1.5, 10 ** 17,
       10 ** 40, -10 ** 40, "", "x", "\0", "\ud800", "9" * 400, {"type": []}, [{"type": {}}],
       {"type": "image", "source": []}, [{"type": "tool_use", "name": {}, "input": []}])
HOLDING = {
    "chat": {**CHAT[1], "prediction": {"type": "content", "content": "x"}, "n": 1,
             "audio": {"voice": "x"}, "stream": False, "tools": [
                 {"type": "function", "function": {"name": "f", "parameters": {}}}]},
    "responses": {**RESPONSES[1], "model": "gpt-5.5", "max_tool_calls": 1, "reasoning": {
        "effort": "low"}, "tools": [
            {"type": "web_search", "filters": {}}, {"type": "function", "name": "f"},
            {"type": "namespace", "name": "n", "tools": [{"type": "custom", "name": "c"}]}],
                  "input": [{"type": "function_call_output", "call_id": "c", "output": "x"},
                            {"type": "tool_search_output", "tools": [{"type": "function"}]}]},
    "messages": {**MESSAGES[1], "thinking": {"type": "enabled", "budget_tokens": 1024},
                 "context_management": {"edits": [{"type": "clear_thinking_20251015"}]},
                 "messages": [{"role": "user", "content": [
                     {"type": "document", "source": {"type": "text", "data": "x"},
                      "citations": {"enabled": True}},
                     {"type": "image", "source": {"type": "base64", "data": "AAAA"}},
                     {"type": "tool_addition", "tool": {"type": "x", "definition": {}}}]}],
                 "tools": [{"type": "web_search_20250305", "name": "web_search", "max_uses": 2},
                           {"type": "web_fetch_20250910", "name": "f", "citations": {}},
                           {"name": "g", "input_schema": {}, "defer_loading": True}]},
    "completions": {"model": "gpt-3.5-turbo-instruct", "prompt": "x", "n": 1},
    "embeddings": {"model": "text-embedding-3-small", "input": "x"},
}


def odd_bodies(value, rng):
    """A body again and again, with some odd values in place of each member that it holds."""
    for name in value if isinstance(value, dict) else range(
            len(value) if isinstance(value, list) else 0):
        for inner in ([], {}, *rng.sample(ODD, 3), *odd_bodies(value[name], rng)):
            changed = {**value} if isinstance(value, dict) else [*value]
            changed[name] = inner
            yield changed


@pytest.mark.parametrize("api", HOLDING)
def test_any_value_in_any_field_is_admitted_or_refused_in_one_sentence(carrier, api):
    fields = HOLDING[api]
    bodies = [*odd_bodies({**dict.fromkeys(ic.FIELD_RULES[api]), **fields}, Random(api)),
              *({**fields, "tool_choice": {"type": "tool", "name": odd}} for odd in ODD)]
    path, seen = next(path for path, name in ic.METERED_APIS.items() if name == api), set()

    for body in bodies:
        request = carrier.request(path, body)
        try:
            call = carrier.router._admitted(
                request, api, request.parsed(), carrier.router.providers[
                    "anthropic" if api == "messages" else "openai"], fields["model"], None)
            carrier.router._upstream_body(call)
            carrier.router._settle(call)
            seen.add(200)
        except ic.IroncageError as err:
            assert err.status in (400, 402), body
            seen.add(err.status)

    assert {200, 400} <= seen
    assert (0, 0) == carrier.spent


def test_a_token_for_some_models_gets_no_other_by_any_name(carrier):
    caller = DEFAULT._replace(models=("gpt-4o*",))

    assert 200 == carrier.call(*CHAT, whole(DONE), caller=caller)[0]
    for more in ({"model": "gpt-4.1"}, {"models": ["gpt-4.1"]}, {"Model": "gpt-4.1"}):
        error = carrier.refused(ic.ModelForbidden, CHAT[0], {**CHAT[1], **more}, caller=caller)
        assert "gpt-4o*" in error.message
    carrier.refused(ic.ModelForbidden, "/v1/messages/count_tokens", MESSAGES[1], caller=caller)


# Admission.

def test_once_it_is_cut_nothing_is_taken(carrier):
    carrier.router.shut_down()

    assert "stopping" in carrier.refused(ic.ServerBusy, *CHAT).message


def test_what_cannot_be_bounded_is_refused_under_a_budget_alone(carrier, monkeypatch):
    def unbounded(*args, **options):
        raise ic.UnboundedRequest("it has no bound")

    monkeypatch.setattr(ic, "bound_of_request", unbounded)

    carrier.refused(ic.UnboundedRequest, *CHAT)
    carrier.router.controller.set_budget(None)
    assert 200 == carrier.call(*CHAT, whole(DONE))[0]
    assert (DONE_COSTS, 0) == carrier.spent


@pytest.mark.parametrize("more", [{}, {"max_tokens": None}])
def test_a_call_without_price_or_bound_that_breaks_off_settles_for_nothing(carrier, more):
    carrier.router.controller.set_budget(None)
    fields = {**CHAT[1], "model": "gpt-of-no-table", "messages": [
        {"role": "user", "content": "x" * ic.LEAST_COUNTED_BYTES}], **more}

    carrier.refused(ic.UpstreamBroke, CHAT[0], fields, b"")

    assert [(0, "no answer")] == [(row["cost_microdollars"], row["estimated"])
                                  for row in carrier.rows]


def test_an_api_that_no_provider_of_the_model_speaks_is_refused_with_those_that_one_does(carrier):
    error = carrier.refused(ic.Untranslatable, "/v1/embeddings",
                            {"model": "claude-haiku-4-5", "input": "x"})

    assert "served by anthropic" in error.message and "/v1/messages" in error.message
    assert (0, 0) == carrier.spent


def test_a_bound_by_bytes_is_one_however_little_is_free():
    fields = {**CHAT[1], "messages": [{"role": "user", "content": "word " * 2_000}]}
    bounds = []
    for how, budget in (("bytes", 2_000), ("measured", 2_000), ("measured", 10 ** 9)):
        carrier = Carrier(bound=how, budget_microdollars=budget)
        carrier.call(CHAT[0], fields, whole(DONE))
        bounds.append(carrier.rows[0]["bound_microdollars"])

    by_bytes, measured, of_little = bounds
    assert by_bytes == of_little > 2 * measured


def test_a_budget_that_comes_between_the_plan_and_the_reservation_is_kept_to(carrier, monkeypatch):
    """The plan was made without a limit, so without its rules: it is made again."""
    controller, planned = carrier.router.controller, []
    controller.set_budget(None)
    plan = carrier.router._planned

    def plan_and_limit(*args):
        planned.append(args[-1])
        call = plan(*args)
        controller.set_budget(10 ** 6)
        return call

    monkeypatch.setattr(carrier.router, "_planned", plan_and_limit)

    assert 200 == carrier.call(*CHAT, whole(DONE))[0]
    assert [None, 10 ** 6] == planned
    assert (DONE_COSTS, 0) == carrier.spent


def test_the_budget_of_a_session_holds_for_it_alone(carrier):
    caller = DEFAULT._replace(session_budget_microdollars=100)
    one, other = [("x-ironcage-session", "one")], [("x-ironcage-session", "other")]

    carrier.call(*CHAT, whole(DONE), caller=caller, headers=one)
    carrier.refused(ic.BudgetExceeded, CHAT[0], {**CHAT[1], "max_tokens": 10 ** 4}, caller=caller,
                    headers=one)
    assert 200 == carrier.call(*CHAT, whole(DONE), caller=caller, headers=other)[0]


def test_stream_options_that_are_no_object_are_refused_and_nothing_is_set_aside(carrier):
    carrier.router.controller.set_budget(None)                 # under one it is refused before
    error = carrier.refused(ic.BadRequest, CHAT[0], {**CHAT[1], **STREAM, "stream_options": 1})

    assert "stream_options must be an object" in error.message
    assert (0, 0) == carrier.spent


def waited_call(caller, waited=True):
    return SimpleNamespace(request=SimpleNamespace(caller=caller), reservation=SimpleNamespace(
        decided=object() if waited else None))


@pytest.mark.parametrize("configured, is_wanted", [
    ([ALICE], True), ([], False), ([ALICE._replace(sha256="b" * 64)], False),
    ([ALICE._replace(expires_s=1)], False)], ids=["as before", "gone", "replaced", "expired"])
def test_a_token_that_is_withdrawn_while_its_call_waits_spends_no_more(carrier, configured,
                                                                       is_wanted):
    carrier.router.config = ic.Config(callers=tuple(configured))
    check = carrier.router._check_is_still_wanted

    check(waited_call(ALICE, waited=False), None)              # it was looked up a moment before
    check(waited_call(DEFAULT), None)                          # it is not in the configuration
    with contextlib.nullcontext() if is_wanted else pytest.raises(
            ic.Unauthorized, match="alice was withdrawn while its call waited"):
        check(waited_call(ALICE), None)


def test_a_call_that_waited_is_not_sent_for_a_client_that_is_gone(carrier, monkeypatch):
    monkeypatch.setattr(ic, "has_hung_up", lambda sock: True)
    check, client = carrier.router._check_is_still_wanted, SimpleNamespace(sock=None)

    check(waited_call(DEFAULT, waited=False), client)
    with pytest.raises(ic.ClientGone):
        check(waited_call(DEFAULT), client)


def test_what_a_ledger_knows_of_counts_is_known_at_the_start():
    ledger = ic.MemoryLedger()
    row = ic.CountRow(json.dumps(["default", "openai", "m"]), b"d" * 16, ic.Counted(7), "m",
                      int(time.time()))
    ledger.counts = lambda: [row]

    assert [row.counted] == Carrier(ledger=ledger).router.counts.find(row.scope, [row.digest])


@pytest.mark.parametrize("truncation, is_known", [(None, True), ("disabled", True),
                                                  ("auto", False)])
def test_a_stored_response_counts_as_its_provider_counted_it_unless_it_may_be_cut(
        carrier, truncation, is_known):
    fields = {**RESPONSES[1], "previous_response_id": "resp_1"}
    fields.update({"truncation": truncation} if truncation else {})
    request = carrier.request(RESPONSES[0], fields)
    call = ic.Call(request, carrier.router.providers["openai"], "responses", "gpt-4o-mini",
                   request.parsed())
    carrier.router.counts.learn(ic.CountRow(
        json.dumps(ic.count_scope(call)), ic.response_digest("resp_1", fields), ic.Counted(1_000),
        "gpt-4o-mini", int(time.time())))
    price = PRICES.price("gpt-4o-mini", "openai")

    bound = carrier.router._bound(call, price, 0)

    assert (1_000 < bound.input_tokens < price.max_input_tokens) is is_known


# Whole answers.

def test_an_answer_passes_as_it_came_and_is_settled_at_its_cost(carrier):
    status, body, headers = carrier.call(*CHAT, whole(DONE))

    assert (200, DONE, str(DONE_COSTS)) == (status, json.loads(body),
                                            headers["x-ironcage-cost-microdollars"])
    assert (DONE_COSTS, 0) == carrier.spent
    assert [DONE_COSTS] == [row["cost_microdollars"] for row in carrier.rows]


def test_audio_that_an_answer_does_not_count_apart_costs_the_rate_of_audio():
    carrier = Carrier(budget_microdollars=10 ** 8)
    heard = {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}
    fields = {**CHAT[1], "model": "gpt-4o-audio-preview-2024-12-17",
              "messages": [{"role": "user", "content": [heard]}]}

    for details in ({}, {"prompt_tokens_details": {"audio_tokens": 0}}):
        answer = {**DONE, "model": fields["model"], "usage": {**DONE["usage"], **details}}
        carrier.call(CHAT[0], fields, whole(answer))

    assert [1_250, 5_000] == sorted(row["cost_microdollars"] for row in carrier.rows)


def test_a_call_settles_once(carrier):
    with carrier.open(*CHAT, whole(DONE)) as (answer, _):
        before = carrier.spent, len(carrier.rows)

    assert before == (carrier.spent, len(carrier.rows)) == ((DONE_COSTS, 0), 1)


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_never_followed_and_costs_nothing(carrier, status):
    error = carrier.refused(ic.UpstreamRedirected, *CHAT, whole(b"", status))

    assert f"redirect ({status})" in error.message
    assert (0, 0) == carrier.spent


@pytest.mark.parametrize("path, fields", [ON_GPT, ON_CLAUDE], ids=["on gpt", "on claude"])
@pytest.mark.parametrize("more", [{}, STREAM], ids=["whole", "stream"])
@pytest.mark.parametrize("status", [204, 205, 304])
def test_an_answer_without_a_body_cannot_be_translated(carrier, path, fields, more, status):
    error = carrier.refused(ic.UpstreamBroke, path, {**fields, **more},
                            f"HTTP/1.1 {status} X\r\n\r\n".encode())

    assert f"without a body: with the status {status}" in error.message
    assert 1 == len(carrier.rows) and 0 == carrier.spent[1]


@pytest.mark.parametrize("body", [b"<html>", b"7", b"[1]", b"null"])
def test_what_is_no_answer_is_not_translated(carrier, body):
    error = carrier.refused(ic.UpstreamBroke, *ON_GPT, whole(body))

    assert "is not JSON" in error.message
    assert 1 == len(carrier.rows) and 0 == carrier.spent[1]


def test_an_answer_beyond_the_limits_passes_but_cannot_be_translated(carrier, monkeypatch):
    data = whole({**DONE, "x": "y" * 2_000})
    monkeypatch.setattr(ic, "MAX_ANSWER_BYTES", 1_000)

    status, body, headers = carrier.call(*CHAT, data)
    error = carrier.refused(ic.UpstreamBroke, *ON_GPT, data)

    assert (200, True) == (status, data.endswith(body))
    assert "x-ironcage-cost-microdollars" not in headers
    assert ic.BEYOND_LIMITS == error.message and 0 == carrier.spent[1]


@pytest.mark.parametrize("status, body, shown", [
    (400, {"error": {"message": "no", "type": "invalid_request_error"}}, 400),
    (200, {"error": {"message": "no", "code": 429}}, 429), (200, {"error": {"message": "no"}}, 500),
    (500, b"<html>no", 500)])
def test_an_error_is_translated_whatever_its_status(carrier, status, body, shown):
    told, answer, _ = carrier.call(*ON_GPT, whole(body, status))

    assert (shown, "error") == (told, json.loads(answer)["type"])
    assert "no" in json.loads(answer)["error"]["message"] and 0 == carrier.spent[1]


@pytest.mark.parametrize("status, body, says_no_retry", [
    (402, {"error": {"message": "no"}}, True), (500, {"error": {"message": "no"}}, False),
    (429, {"error": {"message": "no", "code": "insufficient_quota"}}, True)])
def test_where_nothing_is_left_at_a_provider_nobody_is_to_try_again(carrier, status, body,
                                                                    says_no_retry):
    headers = carrier.call(*ON_CLAUDE, whole(body, status))[2] if status == 402 else \
        carrier.call(*ON_GPT, whole(body, status))[2]

    assert says_no_retry is (dict(ic.DO_NOT_RETRY).items() <= headers.items())


# Streams.

GOOD = [delta("hello"), delta("", "stop"),
        {"choices": [], "usage": {"prompt_tokens": 100, "completion_tokens": 100}}, b"[DONE]"]


def test_a_stream_without_a_body_to_read_whole_passes_and_is_settled_before_it_is_over(carrier):
    with carrier.open(CHAT[0], {**CHAT[1], **STREAM}, stream(*GOOD)) as (answer, _):
        first = next(answer.reads)

        assert b"hello" in b"".join(first) and [DONE_COSTS] == [
            row["cost_microdollars"] for row in carrier.rows]
    assert (DONE_COSTS, 0) == carrier.spent


@pytest.mark.parametrize("path, fields", [CHAT, ON_GPT], ids=["as it is", "translated"])
@pytest.mark.parametrize("events", [GOOD[:1], [*GOOD[:1], delta("more")]])
def test_a_stream_without_its_last_event_ends_in_an_error_that_the_client_sees(carrier, path,
                                                                              fields, events):
    status, body, _ = carrier.call(path, {**fields, **STREAM}, stream(*events))

    assert 200 == status and ic.NO_LAST_EVENT in body.decode()
    assert carrier.rows[0]["estimated"] is not None
    assert 0 < carrier.spent[0] and 0 == carrier.spent[1]


ERROR_EVENT = {"error": {"type": "server_error", "message": "x"}}


@pytest.mark.parametrize("event", [
    {"error": "no room left"}, {"detail": "no room left"}, {"message": "no room left", "code": 503}])
def test_an_error_event_of_any_shape_keeps_its_words(carrier, event):
    status, body, _ = carrier.call(*ON_GPT_STREAMED, stream(delta("he"), event))

    assert (200, 1) == (status, body.count(b"event: error"))
    assert b"no room left" in body

    _, body, _ = carrier.call(CHAT[0], {**CHAT[1], **STREAM}, stream(delta("he"), event))
    assert body.endswith(json.dumps(event).encode() + b"\n\n")     # and none of ours behind it


@pytest.mark.parametrize("path, fields", [MESSAGES, ON_CLAUDE])
def test_a_message_with_a_stop_reason_and_an_end_is_whole(carrier, path, fields):
    events = [{"type": "message_start", "message": {"usage": {"input_tokens": 9}}},
              {"type": "content_block_start", "index": 0,
               "content_block": {"type": "text", "text": "he"}},
              {"type": "content_block_stop", "index": 0},
              {"type": "message_delta", "delta": {"stop_reason": "end_turn"},
               "usage": {"output_tokens": 3}}, {"type": "ping"}]
    done = [b"[DONE]"]
    for end in ([], done):
        _, body, _ = carrier.call(path, {**fields, **STREAM}, stream(*events, *end))
        assert b'"error"' not in body and (b"end_turn" in body or b'"stop"' in body)

        _, body, _ = carrier.call(path, {**fields, **STREAM}, stream(*events[:-2], *end))
        assert b"ended without its last event" in body


def test_what_a_provider_bills_behind_an_error_event_is_charged(carrier):
    body = stream(ERROR_EVENT, delta("hello", "stop"), {**DONE, "choices": []}, b"[DONE]")

    assert 200 == carrier.call(CHAT[0], {**CHAT[1], **STREAM}, body)[0]

    assert DONE_COSTS == carrier.router.controller.get_status()[0]


def test_an_error_event_that_came_soon_is_free_however_long_its_stream_stays_open(
        carrier, monkeypatch):
    now = [10 ** 9]
    monkeypatch.setattr(ic.time, "monotonic_ns", lambda: now[0])
    with carrier.open(CHAT[0], {**CHAT[1], **STREAM}, stream(ERROR_EVENT)) as (answer, _):
        reads = iter(answer.reads)
        assert b"server_error" in b"".join(next(reads))
        now[0] += 60 * 10 ** 9
        list(reads)

    assert 0 == carrier.router.controller.get_status()[0]


def test_a_stream_that_breaks_after_its_last_event_is_whole(carrier):
    data = stream(*GOOD).replace(b"content-length: ", b"content-length: 1")

    status, body, _ = carrier.call(CHAT[0], {**CHAT[1], **STREAM}, data)

    assert 200 == status and b"error" not in body
    assert (DONE_COSTS, 0) == carrier.spent


def test_a_stream_that_breaks_before_it_says_what_broke(carrier):
    data = stream(*GOOD[:1]).replace(b"content-length: ", b"content-length: 1")

    _, body, _ = carrier.call(CHAT[0], {**CHAT[1], **STREAM}, data)

    assert b"the provider's answer broke off" in body and b"upstream_broke" in body


@pytest.mark.parametrize("events, status, words", [
    ([{"error": {"message": "too much", "code": 429}}], 429, "too much"),
    ([*GOOD[:1], {"error": {"message": "too much", "code": 429}}], 200, "too much"),
    ([{"error": {"message": "no"}}], 500, "no")],
    ids=["at once", "later", "without a status"])
def test_an_event_that_is_an_error_ends_a_translated_stream(carrier, events, status, words):
    told, body, _ = carrier.call(ON_GPT[0], {**ON_GPT[1], **STREAM}, stream(*events, b"[DONE]"))

    assert status == told and words in body.decode() and b'"error"' in body
    assert b"message_stop" not in body and 0 == carrier.spent[1]


def test_a_whole_error_where_a_stream_was_asked_for_is_one(carrier):
    status, shown, _ = carrier.call(ON_GPT[0], {**ON_GPT[1], **STREAM},
                                    whole({"error": {"message": "no", "code": 429}}))

    assert 429 == status and "no" in json.loads(shown)["error"]["message"]


ON_GPT_5 = {"/v1/messages": {**MESSAGES[1], "model": "gpt-5.5", **STREAM},
            CHAT[0]: {**CHAT[1], "model": "gpt-5-codex", **STREAM}}
CREATED = {"type": "response.created", "response": {"id": "resp_1", "status": "in_progress"}}
MESSAGE_START = {"type": "message_start", "message": {"id": "msg_1", "model": "m", "content": []}}


def failed(code):
    return {"type": "response.failed", "response": {
        **CREATED["response"], "status": "failed", "error": {"code": code, "message": "no, sorry"}}}


@pytest.mark.parametrize("path", ON_GPT_5)
@pytest.mark.parametrize("code, status", [("context_length_exceeded", 400),
                                          ("rate_limit_exceeded", 429), ("server_error", 500)])
def test_a_translated_stream_that_only_begins_before_its_error_has_a_status(carrier, path, code,
                                                                            status):
    shown, body, _ = carrier.call(path, ON_GPT_5[path], stream(CREATED, {
        **CREATED, "type": "response.in_progress"}, failed(code)))

    assert status == shown and "no, sorry" in json.loads(body)["error"]["message"]


def test_a_response_that_fails_after_a_ping_has_a_start_before_its_error(pinging):
    data = stream({"type": "error", "error": {"type": "overloaded_error", "message": "no, sorry"}})
    at = data.index(b"\r\n\r\n") + 4
    fields = {**RESPONSES[1], "model": "claude-haiku-4-5", **STREAM}

    _, body, _ = pinging.call(RESPONSES[0], fields, data[:at], TimeoutError(), data[at:])

    assert ["response.created", "response.in_progress", "error", "response.failed"] == [
        line[7:].decode() for line in body.splitlines() if line.startswith(b"event: ")]


def test_an_error_inside_a_choice_keeps_its_words(carrier):
    choice = {"index": 0, "message": {"content": "par"}, "finish_reason": "error",
              "error": {"code": 502, "message": "no, sorry"}}

    assert "in error: no, sorry" in carrier.refused(
        ic.UpstreamBroke, *ON_GPT, whole({**DONE, "choices": [choice]})).message


@pytest.mark.parametrize("path", ON_GPT_5)
def test_a_stream_that_only_begins_is_heard_of_at_the_first_ping(pinging, path):
    data = stream(CREATED, failed("server_error"))
    at = data.index(b"\n\n") + 2

    status, body, _ = pinging.call(path, ON_GPT_5[path], data[:at], TimeoutError(), data[at:])

    assert 200 == status and b"ping" in body and b"no, sorry" in body


@pytest.mark.parametrize("path", ON_GPT_5)
@pytest.mark.parametrize("output", [[], [{"type": "message", "content": [
    {"type": "output_text", "text": "half"}]}]], ids=["nothing", "a half"])
@pytest.mark.parametrize("code, status", [("context_length_exceeded", 400),
                                          ("rate_limit_exceeded", 429), ("server_error", 500)])
def test_a_whole_response_that_failed_keeps_its_code_and_words(carrier, path, output, code, status):
    answer = {**failed(code)["response"], "output": output}

    for asks_for_stream in (False, True):
        shown, body, _ = carrier.call(path, {**ON_GPT_5[path], "stream": asks_for_stream},
                                      whole(answer))
        assert status == shown and "no, sorry" in json.loads(body)["error"]["message"]


@pytest.mark.parametrize("path, fields", [ON_CLAUDE, (
    RESPONSES[0], {**RESPONSES[1], "model": "claude-haiku-4-5"})], ids=["chat", "responses"])
def test_a_message_that_only_begins_and_pings_before_its_error_has_a_status(carrier, path, fields):
    status, body, _ = carrier.call(path, {**fields, **STREAM}, stream(
        MESSAGE_START, {"type": "content_block_start", "index": 0, "content_block": {
            "type": "text", "text": ""}}, {"type": "ping"},
        {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}))

    assert 503 == status and "Overloaded" in json.loads(body)["error"]["message"]


def test_a_chunk_with_a_role_only_before_an_error_begins_nothing(carrier):
    role = delta("")
    role["choices"][0]["delta"]["role"] = "assistant"

    status, _, _ = carrier.call(ON_GPT[0], {**ON_GPT[1], **STREAM}, stream(
        role, {"error": {"type": "rate_limit_exceeded", "message": "slow down"}}))

    assert 429 == status


def test_an_error_that_says_so_as_its_object_ends_a_stream(carrier):
    event = {"object": "error", "message": "no room left", "type": "BadRequestError", "code": 400}
    _, body, _ = carrier.call(ON_GPT[0], {**ON_GPT[1], **STREAM}, stream(delta("he"), event))

    assert 1 == body.count(b"event: error") and b"no room left" in body


CANCELLED = {"id": "resp_1", "status": "cancelled", "usage": {
    "input_tokens": 9, "output_tokens": 3, "total_tokens": 12}}


@pytest.mark.parametrize("end, words", [
    ({"type": "response.cancelled", "response": CANCELLED}, "ended its answer as cancelled"),
    ({"type": "response.expired", "response": CANCELLED}, "ended its answer as cancelled"),
    ({"type": "response.expired", "response": {"error": {"message": "too late"}}}, "too late")])
def test_a_response_that_ends_otherwise_is_an_error_in_the_clients_words(carrier, end, words):
    begun = (CREATED, {"type": "response.output_text.delta", "delta": "hello"})
    for path, fields in ON_GPT_5.items():
        status, body, _ = carrier.call(path, fields, stream(*begun, end))
        assert 200 == status and b"hello" in body and words.encode() in body
        answer = {"object": "response", "output": [], **end["response"]}
        status, body, _ = carrier.call(path, {**fields, "stream": False}, whole(answer))
        assert status >= 500 and words.encode() in body

    _, body, _ = carrier.call(RESPONSES[0], {**RESPONSES[1], **STREAM}, stream(*begun, end))
    assert body.endswith(json.dumps(end).encode() + b"\n\n")      # and none of ours behind it


@pytest.mark.parametrize("path, events", [
    *((path, (CREATED, {"type": "response.output_text.delta", "delta": "hello"}))
      for path in ON_GPT_5),
    ("/v1/responses", (MESSAGE_START, {"type": "content_block_start", "index": 0,
                                       "content_block": {"type": "text", "text": "hello"}}))])
@pytest.mark.parametrize("end", [(), (b"[DONE]",)], ids=["nothing", "[DONE]"])
def test_a_translated_answer_without_its_last_event_is_broken_off(carrier, path, events, end):
    fields = ON_GPT_5.get(path, {**RESPONSES[1], "model": "claude-haiku-4-5", **STREAM})
    data = stream(*events, *end)

    status, body, _ = carrier.call(path, fields, data)
    whole_one = carrier.refused(ic.UpstreamBroke, path, {**fields, "stream": False}, data)

    assert 200 == status and b"hello" in body and b"without its last event" in body
    assert ic.NO_LAST_EVENT == whole_one.message
    carrier.refused(ic.UpstreamBroke, path, fields, stream(*events[:-1], *end))


@pytest.mark.parametrize("model", ["claude-opus-5-5", "claude-opus-4-5", "gpt-5.5"])
def test_a_search_that_is_forced_is_refused_rather_than_taken_away(model):
    """Also where the model cannot be forced, and is asked for it in words."""
    fields = {"model": model, "max_output_tokens": 1000, "input": "hi",
              "tools": [{"type": "web_search"}], "tool_choice": {"type": "web_search"}}
    carrier = Carrier(budget_microdollars=100_000)

    assert carrier.refused(ic.InsufficientBudget, "/v1/responses", fields).details
    carrier.call("/v1/responses", {**fields, "tool_choice": "auto"}, whole({"error": {}}, 400))


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/responses"])
def test_a_chat_stream_of_its_end_alone_is_an_empty_answer(carrier, path):
    fields = {**ON_GPT[1], "max_output_tokens": 10, "input": "hi", **STREAM}
    carrier.router.providers["openai"] = carrier.router.providers["openai"]._replace(
        responses=False)

    status, body, _ = carrier.call(path, fields, stream(b"[DONE]"))

    assert 200 == status and (b"message_stop" in body or b"response.completed" in body)
    assert b"message_start" in body or b"response.created" in body


def test_a_whole_answer_where_a_stream_was_asked_for_is_streamed(carrier):
    status, body, _ = carrier.call(ON_GPT[0], {**ON_GPT[1], **STREAM}, whole(DONE))

    assert 200 == status and b"hello" in body and b"message_stop" in body
    assert (DONE_COSTS, 0) == carrier.spent


def test_a_stream_that_nobody_asked_for_passes_and_is_metered(carrier):
    status, body, _ = carrier.call(*CHAT, stream(*GOOD))

    assert 200 == status and b"[DONE]" in body
    assert (DONE_COSTS, 0) == carrier.spent


def test_a_translated_stream_pings_when_it_is_time_to_whatever_its_provider_sends(carrier, pinging):
    data = stream(*GOOD)
    at = data.index(b"\n\n") + 2
    reads = [data[:at], TimeoutError(), data[at:]]

    early, due = [one.call(ON_GPT[0], {**ON_GPT[1], **STREAM}, *reads)[1].count(b"event: ping")
                  for one in (carrier, pinging)]

    assert early + len(reads) == due


@pytest.mark.parametrize("model, reads", [
    ("nobody/gpt-4o", []), ("gpt-4o-mini", [b""]), ("gpt-4o-mini", [OSError("reset by peer")])])
def test_an_error_notes_what_model_the_request_asked_for(carrier, model, reads):
    error = carrier.refused(ic.IroncageError, CHAT[0], {**CHAT[1], "model": model}, *reads)

    assert model == error.model


# What is not metered.

@pytest.mark.parametrize("method, path", [
    ("GET", "/v1/files"), ("POST", "/v1/files"), ("DELETE", "/v1/models/x"),
    ("GET", "/v1/batches/1")])
def test_under_a_budget_only_what_costs_nothing_or_is_named_passes(carrier, method, path):
    assert 200 == carrier.call("/openai/v1/models/x", None, whole(b"{}"), method="GET")[0]
    assert path in carrier.refused(ic.UnmeteredRoute, path, None, method=method).message
    for pattern in (path, "/v1/*"):
        named = Carrier(allow_paths=(pattern,))
        assert 200 == named.call(path, None, whole(b"{}"), method=method)[0]


READ_AS_METERED = (
    "/v1/Chat/Completions", "/v1//chat//completions", "//v1/chat/completions",
    "/v1/chat/completions/", "/v1/chat/completions;x=1", "/v1/chat;x/completions",
    "/v1/%63hat/completion%73", "/v1/chat%2Fcompletions", "/v1/chat/completion%2573",
    "/v1/chat/completion%25252525252573", "/v1/chat%5Ccompletions", "/v1/chat/completions/%2e",
    "/v1/chat/x/%252e%252e/completions", "/v1/chat/completions/x/..;/", "/v1/completions.json",
    "/v1/chat/completions%20", "/v1/completions%00.png", "/v1/completions%3F/x",
    "/v1/completions%0D%0Ax", "/v1/%EF%BD%83ompletions", "/v1/messages/", "/V1/MESSAGES",
    "/v1/chat/completions/;x", "/v1/messages/%3bx=1/;y", "/v1/;x/messages;/;x",
    "/v1/responses//", "/v1/Embeddings", "/v1/openai/deployments/x/chat/completions")


@pytest.mark.parametrize("prefix", ["", "/openai"])
def test_no_spelling_of_a_metered_route_goes_unmetered_where_every_path_is_let_through(prefix):
    carrier = Carrier(allow_paths=("*",))

    for path in READ_AS_METERED:
        carrier.refused(ic.UnmeteredRoute, prefix + path, CHAT[1])
    for path in ("/v1/messages/batches", "/v1/chat/completions/abc", "/v1/images/generations"):
        assert 200 == carrier.call(prefix + path, CHAT[1], whole(b"{}"))[0]
    assert 200 == carrier.call("/v1/chat/completions/", None, whole(b"{}"), method="GET")[0]


def test_a_token_for_some_models_is_held_to_them_and_to_free_routes_without_a_budget():
    carrier = Carrier()
    carrier.router.controller.set_budget(None)

    assert 200 == carrier.call("/v1/files", None, whole(b"{}"), method="GET")[0]
    carrier.refused(ic.UnmeteredRoute, "/v1/files", None, method="GET",
                    caller=DEFAULT._replace(models=("gpt-4o*",)))


def test_tokens_are_counted_here_where_the_provider_does_not_and_marked_as_an_estimate(carrier):
    count = "/v1/messages/count_tokens"
    here = carrier.call(count, {"model": "gpt-4o-mini", "messages": USER})
    echo = carrier.call(count, {"model": "ironcage/echo", "messages": USER})
    there = carrier.call(count, MESSAGES[1], whole({"input_tokens": 3}))

    assert "1" == here[2]["x-ironcage-estimated"] and 0 < json.loads(here[1])["input_tokens"]
    assert "x-ironcage-estimated" not in echo[2] and 0 < json.loads(echo[1])["input_tokens"]
    assert {"input_tokens": 3} == json.loads(there[1])


def test_models_are_listed_here_unless_a_provider_with_its_key_is_named(carrier):
    here = json.loads(carrier.call("/v1/models", None, method="GET")[1])
    there = json.loads(carrier.call("/openai/v1/models", None, whole({"data": 7}), method="GET")[1])

    assert "gpt-4o-mini" in {row["id"] for row in here["data"]}
    assert {"data": 7} == there


@pytest.mark.parametrize("name", [
    "gpt-4o", "openai/gpt-4o", "anthropic/claude-haiku-4-5", "anthropic%2Fclaude-haiku-4-5[1m]"])
def test_a_model_is_found_by_every_name_that_a_call_can_give_it(carrier, name):
    model = json.loads(carrier.call(f"/v1/models/{name}", None, method="GET")[1])

    assert name.replace("%2F", "/").replace("[1m]", "") == model["id"]


@pytest.mark.parametrize("name", ["nope", "nobody/gpt-4o", "groq/gpt-4o", "openai/", "openai/nope"])
def test_a_model_that_no_call_could_name_is_not_found(carrier, name):
    for caller in (DEFAULT, DEFAULT._replace(models=("nope",))):
        carrier.refused(ic.NotFound, f"/v1/models/{name}", None, method="GET", caller=caller)
    carrier.refused(ic.NotFound, "/v1/models/openai/gpt-4o", None, method="GET",
                    caller=DEFAULT._replace(models=("gpt-4o-mini",)))


def test_a_call_for_no_output_that_warms_anthropics_cache_costs_nothing_elsewhere(carrier):
    fields = {**ON_GPT[1], "max_tokens": 0}
    told = carrier.call(ON_GPT[0], fields)
    streamed = carrier.call(ON_GPT[0], {**fields, **STREAM})

    assert "message" == json.loads(told[1])["type"] and b"message_stop" in streamed[1]
    assert ([], (0, 0)) == (carrier.rows, carrier.spent)
    carrier.call(MESSAGES[0], {**MESSAGES[1], "max_tokens": 0},
                 whole({"type": "message", "usage": {"input_tokens": 1, "output_tokens": 0}}))
    assert 1 == len(carrier.rows)


# Settings.

def test_a_session_budget_is_refused_beside_a_shared_one():
    config = ic.Config(callers=(ALICE._replace(session_budget_microdollars=1),))
    ic.check_sessions(config, SETTINGS)

    with pytest.raises(ic.Misconfigured, match="alice has a session_budget_usd"):
        ic.check_sessions(config, SETTINGS._replace(shared=("redis", "h", 6379, 0, "", "")))


def test_a_refused_key_is_reported_to_the_server_that_gave_it(carrier):
    refused = []
    carrier.router.server = SimpleNamespace(
        check_lease=lambda: None, provider=lambda: carrier.router.providers["openai"],
        refused=refused.append, tell=lambda *args: None)

    carrier.call(*CHAT, whole(DONE))
    assert [] == refused
    carrier.call(*CHAT, whole({"error": {"message": "no"}}, 401))
    assert ["openai"] == [provider.name for provider in refused]


def test_without_a_price_nothing_is_kept_of_one():
    carrier = Carrier()
    carrier.router.controller.set_budget(None)

    carrier.call(CHAT[0], {**CHAT[1], "model": "gpt-of-no-table"},
                 whole({**DONE, "model": "gpt-of-no-table"}))
    carrier.call(*CHAT, whole(DONE))

    assert [False, True] == [row["price_row"] is None for row in carrier.rows]
