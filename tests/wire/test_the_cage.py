"""The budget over real sockets: what is admitted, capped, refused and charged.

The mock bills by a table and code of its own; spend at the proxy must equal that bill.
"""
import json
import re
import threading
from fractions import Fraction

import pytest
from support import (ADMIN_TOKEN, PATIENCE_S, ROOT, TOKEN, Gate, RawClient, Reply, call,
                     openai_error, program, settled_status, sse_events, status_of)

CHAT = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "hello"}]}
CAPPED_CHAT = {**CHAT, "max_tokens": 100}
MESSAGE = {"model": "claude-haiku-4-5", "max_tokens": 100,
           "messages": [{"role": "user", "content": "hello"}]}
RESPONSE = {"model": "gpt-4o-mini", "input": "hello", "max_output_tokens": 100}
METERED = {
    "/v1/chat/completions": CAPPED_CHAT, "/v1/responses": RESPONSE, "/v1/messages": MESSAGE,
    "/v1/completions": {"model": "gpt-3.5-turbo-instruct", "prompt": "hello", "max_tokens": 100},
    "/v1/embeddings": {"model": "text-embedding-3-small", "input": "hello"},
}
THREADS = [("anthropic-beta", "message-threads-2026-08-15")]
STREAMED = [path for path in METERED if path != "/v1/embeddings"]


def refusal(answer):
    """(type, code, details) of an OpenAI refusal, (type, code, details) of an Anthropic one."""
    error = answer.json["error"]
    return error["type"], error.get("code"), error["ironcage"]


# Charges.

@pytest.mark.parametrize("path", METERED)
def test_a_whole_answer_costs_what_the_provider_bills(mock, proxy, path):
    mock.cached_tokens, mock.reasoning_tokens = 3, 2

    call(proxy.port, "POST", path, METERED[path])

    assert mock.billed_microdollars == settled_status(proxy)["spent_microdollars"] > 0


@pytest.mark.parametrize("path", STREAMED)
def test_a_stream_costs_what_the_provider_bills(mock, proxy, path):
    mock.cached_tokens, mock.reasoning_tokens = 3, 2

    call(proxy.port, "POST", path, {**METERED[path], "stream": True})

    assert mock.billed_microdollars == settled_status(proxy)["spent_microdollars"] > 0


@pytest.mark.parametrize("path", STREAMED)
def test_a_stream_is_settled_before_its_client_sees_the_end(mock, proxy, path):
    with RawClient(proxy.port) as client:
        client.request("POST", path, json.dumps({**METERED[path], "stream": True}).encode())
        client.read_answer()
        status = status_of(proxy)

    assert (0, mock.billed_microdollars) == (status["reserved_microdollars"],
                                             status["spent_microdollars"])


@pytest.mark.parametrize("path", METERED)
def test_an_error_of_the_provider_costs_nothing(mock, proxy, path):
    for status in (400, 401, 403, 404, 409, 413, 422, 429, 500, 502, 503, 529):
        mock.script(openai_error(status, "no", headers=[("retry-after", "7")]))

        answer = call(proxy.port, "POST", path, METERED[path])

        assert (status, "7") == (answer.status, answer.header("retry-after"))
    status = settled_status(proxy)
    assert 0 == status["spent_microdollars"]
    assert 12 == status["failed_requests"] == status["requests"]


def test_usage_in_an_error_is_charged(mock, proxy):
    usage = {"prompt_tokens": 1000, "completion_tokens": 0, "total_tokens": 1000}
    mock.script(Reply(500, steps=(json.dumps({"error": {}, "usage": usage}).encode(),)))

    call(proxy.port, "POST", "/v1/chat/completions", CAPPED_CHAT)

    assert 150 == settled_status(proxy)["spent_microdollars"]


@pytest.mark.parametrize("usage", [
    None, "many", [], {}, {"prompt_tokens": -1, "completion_tokens": 1},
    {"prompt_tokens": True, "completion_tokens": 1}, {"prompt_tokens": 1.5},
    {"prompt_tokens": "7", "completion_tokens": 1},
    {"prompt_tokens": 7, "completion_tokens": 1,
     "prompt_tokens_details": {"cached_tokens": -4}}])
def test_a_success_without_sound_usage_costs_what_can_have_been_made(
        mock, proxy, monkeypatch, usage):
    """Half a second is 500 tokens, of which the cap allows 100: all that was reserved."""
    bound, now_ns = bound_of(CAPPED_CHAT), [0]
    monkeypatch.setattr(program().time, "monotonic_ns", lambda: now_ns[0])
    body = {"id": "x", "object": "chat.completion", "model": "gpt-4o-mini", "choices": []}

    def reply(request):
        now_ns[0] += 5 * 10 ** 8
        return Reply(steps=(json.dumps({**body, "usage": usage}).encode(),))

    mock.script(reply)
    answer = call(proxy.port, "POST", "/v1/chat/completions", CAPPED_CHAT)

    assert 200 == answer.status
    cost = int(answer.header("x-ironcage-cost-microdollars"))
    assert cost == settled_status(proxy)["spent_microdollars"]
    assert bound - 3 <= cost <= bound          # where the input is known, it costs less


def bound_of(fields, api="chat"):
    """The worst case of a request in microdollars, as the program bounds it."""
    module = program()
    book = module.PriceBook.load(str(ROOT / "pricing.json"))
    body = module.parse_json_object(json.dumps(fields).encode())
    bound = module.bound_of_request(api, body, book.price(fields["model"]))
    return bound.microdollars(bound.output_tokens)


def test_explicit_zero_usage_is_zero_and_not_missing(mock, proxy):
    mock.input_tokens = mock.output_tokens = 0

    answer = call(proxy.port, "POST", "/v1/chat/completions", CAPPED_CHAT)

    assert "0" == answer.header("x-ironcage-cost-microdollars")


def test_the_answers_model_and_tier_set_the_price(mock, proxy):
    usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
    answer = {"model": "gpt-4o", "usage": usage, "service_tier": "priority", "choices": []}
    mock.script(Reply(steps=(json.dumps(answer).encode(),)))

    call(proxy.port, "POST", "/v1/chat/completions", CAPPED_CHAT)

    assert 100 * 4.25 + 10 * 17 == settled_status(proxy)["spent_microdollars"]


def test_an_answer_that_costs_more_than_its_bound_is_charged_in_full_and_counted(mock, proxy):
    usage = {"prompt_tokens": 10 ** 6, "completion_tokens": 0, "total_tokens": 10 ** 6}
    mock.script(Reply(steps=(json.dumps({"usage": usage}).encode(),)))

    call(proxy.port, "POST", "/v1/chat/completions", CAPPED_CHAT)

    status = settled_status(proxy)
    assert (150_000, 1) == (status["spent_microdollars"], status["bound_exceeded"])


# Refusals.

@pytest.mark.parametrize("path", METERED)
def test_a_zero_budget_refuses_at_once(mock, proxy_for, path):
    proxy = proxy_for("--budget", "0")

    answer = call(proxy.port, "POST", path, METERED[path])

    kind, code, details = refusal(answer)
    assert (402, "false") == (answer.status, answer.header("x-should-retry"))
    assert ("billing_error" if path == "/v1/messages" else "iron_cage_budget_exceeded") == kind
    assert ("iron_cage_budget_exceeded" if path == "/v1/messages" else "budget_exceeded") == code
    assert {"scope": "proxy", "limit": "budget", "limit_microdollars": 0,
            "spent_microdollars": 0, "reserved_microdollars": 0, "affordable_output_tokens": 0} == {
                name: value for name, value in details.items() if name != "needed_microdollars"}
    assert "Iron Cage budget limit exceeded. Spent: $0.00, Reserved: $0.00, Limit: $0.00." \
        in answer.json["error"]["message"]
    assert mock.seen == []


def test_a_request_that_does_not_fit_is_told_what_would(mock, proxy_for):
    proxy = proxy_for("--budget", "0.0001", "--bound", "bytes")
    asked = {**CHAT, "max_tokens": 16_000}

    answer = call(proxy.port, "POST", "/v1/chat/completions", asked)

    kind, code, details = refusal(answer)
    assert (402, "iron_cage_insufficient_budget", "insufficient_budget") == (
        answer.status, kind, code)
    assert bound_of({**asked, "max_tokens": 1024}) == details["needed_microdollars"]
    affordable = details["affordable_output_tokens"]
    assert answer.json["error"]["message"] == (
        "Iron Cage budget insufficient for this request. Available: $0.0001, Estimated max cost: "
        f"$0.000639. Its input fits, its output does not: reduce max_tokens to {affordable} or "
        "less, or raise the limit to $0.000639 or more.")
    again = call(proxy.port, "POST", "/v1/chat/completions", {**CHAT, "max_tokens": affordable})
    assert 200 == again.status
    assert 1 == len(mock.seen)


@pytest.mark.parametrize("path", [path for path in METERED if "embeddings" not in path])
@pytest.mark.parametrize("words, part", [(1, "output"), (4_000, "input")])
def test_a_refusal_names_the_part_that_does_not_fit_and_a_limit_that_would_do(
        mock, proxy_for, path, words, part):
    """One call was paid for before; the limit named counts that too, and is the least."""
    fields = {name: ("word " * words if name in ("input", "prompt") else
                     [{"role": "user", "content": "word " * words}] if name == "messages" else value)
              for name, value in METERED[path].items()}
    fields = {name: 8_000 if "max" in name else value for name, value in fields.items()}
    proxy = proxy_for("--budget", "0.002", "--bound", "bytes", "--wait", "0")
    proxy.router.controller.add_spend(1_500)

    message = call(proxy.port, "POST", path, fields).json["error"]["message"]
    limit = re.search(r"raise the limit to \$([0-9.]+) or more", message)[1]
    fault = {"output": "Its input fits, its output does not", "input": "Its input alone can cost"}

    assert fault[part] in message
    too_little = f"{float(limit) - 0.000001:.6f}"
    for usd, status in ((too_little, 402), (limit, 200)):
        proxy.router.controller.set_budget(program().parse_usd(usd))
        assert status == call(proxy.port, "POST", path, fields).status


@pytest.mark.parametrize("words", ["prompt is too long", "context limit", "maximum context length",
                                   "context_length_exceeded", "exceeds the context window"])
def test_no_refusal_for_want_of_money_makes_a_client_compact(mock, proxy_for, words):
    proxy = proxy_for("--budget", "0.0001")
    for path, fields in METERED.items():
        for more in ({}, {"max_tokens": 9_000}):
            answer = call(proxy.port, "POST", path, {**fields, **more})

            assert words not in answer.body.decode() and answer.header("retry-after") is None


def test_exactly_the_available_amount_is_admitted_and_one_token_more_is_not(mock, proxy_for):
    fields = {**CHAT, "max_tokens": 50_00}
    bound = bound_of(fields)
    proxy = proxy_for("--budget", f"0.{bound:06d}", "--wait", "0")
    gate = Gate()
    mock.script(lambda request: mock.default_reply(request).with_steps(
        [gate, *mock.default_reply(request).steps]))

    with RawClient(proxy.port) as client:
        client.request("POST", "/v1/chat/completions", json.dumps(fields).encode())
        mock.wait_for_requests(1)
        full = status_of(proxy)
        refused = call(proxy.port, "POST", "/v1/embeddings", METERED["/v1/embeddings"])
        gate.event.set()
        client.read_answer()

    assert (bound, 0) == (full["reserved_microdollars"], full["available_microdollars"])
    assert 402 == refused.status
    assert mock.billed_microdollars == settled_status(proxy)["spent_microdollars"]


def test_one_microdollar_less_than_the_bound_refuses(mock, proxy_for):
    fields = {**CHAT, "max_tokens": 5000}
    proxy = proxy_for("--budget", f"0.{bound_of(fields) - 1:06d}", "--no-fit")

    answer = call(proxy.port, "POST", "/v1/chat/completions", fields)

    assert 402 == answer.status


def test_a_model_without_a_price_is_refused_under_a_budget_and_passes_without(mock, proxy_for):
    mock.models.add("gpt-mystery")
    fields = {**CAPPED_CHAT, "model": "gpt-mystery"}

    caged = call(proxy_for("--budget", "1").port, "POST", "/v1/chat/completions", fields)
    free = proxy_for()
    passed = call(free.port, "POST", "/v1/chat/completions", fields)

    assert (400, "iron_cage_unpriced_model") == (caged.status, caged.json["error"]["type"])
    assert '"gpt-mystery"' in caged.json["error"]["message"]
    assert (200, "0") == (passed.status, passed.header("x-ironcage-cost-microdollars"))


def test_a_free_model_passes_when_nothing_is_left(mock, proxy_for, tmp_path):
    prices = tmp_path / "prices.json"
    prices.write_text('{"gpt-free": {"input_cost_per_token": 0, "output_cost_per_token": 0}}')
    mock.models.add("gpt-free")
    proxy = proxy_for("--budget", "0", "--pricing", str(prices))

    answer = call(proxy.port, "POST", "/v1/chat/completions", {**CHAT, "model": "gpt-free"})

    assert 200 == answer.status
    assert "max_completion_tokens" not in mock.seen[0].json


def test_without_a_budget_spend_is_counted_and_nothing_is_refused(mock, proxy_for):
    proxy = proxy_for()

    call(proxy.port, "POST", "/v1/chat/completions", CHAT)

    status = settled_status(proxy)
    assert (None, None) == (status["limit_microdollars"], status["available_microdollars"])
    assert mock.billed_microdollars == status["spent_microdollars"] > 0
    assert CHAT == mock.seen[0].json


# Output caps.

@pytest.mark.parametrize("path, fields, name, most", [
    ("/v1/chat/completions", CHAT, "max_completion_tokens", 16_384),
    ("/v1/responses", {"model": "gpt-4o-mini", "input": "hello"}, "max_output_tokens", 16_384),
    ("/v1/messages", {**MESSAGE, "max_tokens": None}, "max_tokens", 64_000),
    ("/v1/completions", {"model": "gpt-3.5-turbo-instruct", "prompt": "hello"}, "max_tokens", 16),
])
def test_a_request_without_a_cap_gets_the_models_own_when_money_is_no_object(
        mock, proxy_for, path, fields, name, most):
    proxy = proxy_for("--budget", "1000")

    answer = call(proxy.port, "POST", path, fields)

    assert (200, str(most)) == (answer.status, answer.header("x-ironcage-max-tokens"))
    assert most == mock.seen[0].json[name]


def test_a_default_cap_takes_at_most_half_while_that_is_comfortable(mock, proxy_for):
    """0.6 microdollars an output token: 8,192 of them in half of it need about a cent."""
    proxy = proxy_for("--budget", "0.0102")

    answer = call(proxy.port, "POST", "/v1/chat/completions", CHAT)

    cap = int(answer.header("x-ironcage-max-tokens"))
    assert 8192 <= cap < 8500
    assert cap * Fraction("0.6") <= 5100


def test_a_default_cap_takes_what_is_left_when_half_is_too_little(mock, proxy_for):
    proxy = proxy_for("--budget", "0.003")

    answer = call(proxy.port, "POST", "/v1/chat/completions", CHAT)

    cap = int(answer.header("x-ironcage-max-tokens"))
    assert 2950 <= cap * Fraction("0.6") <= 3000


def test_a_default_cap_below_1024_is_refused_with_what_would_fit(mock, proxy_for):
    proxy = proxy_for("--budget", "0.0005")

    answer = call(proxy.port, "POST", "/v1/chat/completions", CHAT)

    assert 402 == answer.status
    assert 700 < answer.json["error"]["ironcage"]["affordable_output_tokens"] < 1024


def test_the_clients_own_cap_is_left_alone(mock, proxy):
    answer = call(proxy.port, "POST", "/v1/chat/completions", CAPPED_CHAT)

    assert answer.header("x-ironcage-max-tokens") is None
    assert CAPPED_CHAT == mock.seen[0].json


def test_the_largest_of_several_caps_is_reserved_for(mock, proxy_for):
    fields = {**CHAT, "max_tokens": 5, "max_completion_tokens": 9_000}
    proxy = proxy_for("--budget", "0.003", "--no-fit")

    answer = call(proxy.port, "POST", "/v1/chat/completions", fields)

    assert 402 == answer.status


@pytest.mark.parametrize("charset, status", [
    ("utf-8", 200), ('"UTF-8"', 200), ("utf-16", 415), ("latin1", 415)])
def test_a_charset_under_which_the_provider_could_read_another_body_is_refused(
        mock, proxy, charset, status):
    body = json.dumps(CAPPED_CHAT).encode()
    with RawClient(proxy.port) as client:
        client.send(b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: "
                    b"Bearer " + TOKEN.encode() + b"\r\nContent-Type: application/json; charset="
                    + charset.encode() + b"\r\nContent-Length: %d\r\n\r\n" % len(body) + body)

        assert status == client.read_answer().status


# What cannot be bounded.

@pytest.mark.parametrize("path, more, param", [
    ("/v1/responses", {"background": True}, "background"),
    ("/v1/responses", {"prompt": {"id": "pmpt_1"}}, "prompt"),
    ("/v1/responses", {"tools": [{"type": "web_search_preview"}]}, "tools"),
    ("/v1/responses", {"tools": [{"type": "mcp", "server_url": "x"}]}, "tools"),
    ("/v1/chat/completions", {"web_search_options": {}}, "web_search_options"),
    ("/v1/chat/completions", {"model": "gpt-4o-search-preview"}, "model"),
    ("/v1/messages", {"tools": [{"type": "code_execution_20260521", "name": "x"}]}, "tools"),
    ("/v1/messages", {"mcp_servers": [{"url": "x"}]}, "mcp_servers"),
    ("/v1/messages", {"fallbacks": ["claude-opus-4-8"]}, "fallbacks"),
    ("/v1/messages", {"context_management": {"edits": [{"type": "compact_20260112"}]}},
     "context_management"),
    ("/v1/responses", {"context_management": [{"type": "compaction"}]}, "context_management"),
    ("/v1/responses", {"input": [{"type": "additional_tools", "tools": [
        {"type": "mcp"}]}]}, "input"),
    ("/v1/responses", {"multi_agent": {"enabled": True}}, "multi_agent"),
    ("/v1/responses", {"reasoning": {"mode": "pro"}}, "reasoning"),
    ("/v1/responses", {"context_management": [{"compact_threshold": 1000}]}, "context_management"),
    ("/v1/responses", {"input": [{"type": "tool_search_output", "tools": [{"type": "mcp"}]}]},
     "tools"),
    ("/v1/messages", {"messages": [{"role": "system", "content": [{
        "type": "tool_addition", "tool": {"type": "tool_definition"}}]}]}, "messages"),
    ("/v1/responses", {"access_programs": {"cyber": "x"}}, "access_programs"),
    ("/v1/messages", {"speed": "fast"}, "speed"),
    ("/v1/messages", {"service_tier": "flex"}, "service_tier"),
    ("/v1/messages", {"service_tier": "of tomorrow"}, "service_tier"),
    ("/v1/chat/completions", {"MAX_TOKENS": 16_000}, "MAX_TOKENS"),
])
def test_what_no_bound_covers_is_refused_under_a_budget(mock, proxy, path, more, param):
    answer = call(proxy.port, "POST", path, {**METERED[path], **more})

    assert 400 == answer.status, answer.body
    assert param in answer.json["error"]["message"] or param in ("tools", "messages", "input")
    assert mock.seen == []


def test_content_other_than_text_is_reserved_for_as_a_full_context(mock, proxy_for):
    audio = {"type": "input_audio", "input_audio": {"data": "AA==", "format": "wav"}}
    fields = {**CAPPED_CHAT, "messages": [{"role": "user", "content": [audio]}]}

    refused = call(proxy_for("--budget", "0.019").port, "POST", "/v1/chat/completions", fields)
    passed = call(proxy_for("--budget", "0.020").port, "POST", "/v1/chat/completions", fields)

    assert (402, 200) == (refused.status, passed.status)
    assert 128_000 * 0.15 < refused.json["error"]["ironcage"]["needed_microdollars"] < 20_000


@pytest.mark.parametrize("rule, status", [("bytes", 402), ("measured", 200)])
def test_a_long_prompt_fits_by_the_measured_rule_where_bytes_would_not(
        mock, proxy_for, rule, status):
    """40 kB of prose are at most 40,000 tokens by bytes, and about half of that by the rule."""
    prose = "The quick brown fox jumps over the lazy dog, again and again. " * 650
    fields = {**CAPPED_CHAT, "messages": [{"role": "user", "content": prose}]}
    proxy = proxy_for("--budget", "0.005", "--bound", rule)

    answer = call(proxy.port, "POST", "/v1/chat/completions", fields)

    assert status == answer.status
    assert mock.billed_microdollars == settled_status(proxy)["spent_microdollars"] <= 5000


def test_state_kept_at_the_provider_is_reserved_for_as_a_full_context(mock, proxy_for):
    answer = call(proxy_for("--budget", "0.05").port, "POST", "/v1/messages",
                  {**MESSAGE, "container": "container_1"})

    assert 402 == answer.status
    assert 200_000 <= answer.json["error"]["ironcage"]["needed_microdollars"]


def test_a_new_thread_holds_no_state_and_is_bounded_as_the_text_that_it_is(mock, proxy_for):
    created = {**MESSAGE, "thread": {"type": "create"}}

    answer = call(proxy_for("--budget", "0.05").port, "POST", "/v1/messages", created,
                  headers=THREADS)

    assert 200 == answer.status
    assert created["thread"] == mock.seen[0].json["thread"]


@pytest.mark.parametrize("thread", [
    {"type": "continue", "previous_message_id": "msg_1"}, {"type": "create", "from": "msg_1"},
    {"type": "fork"}, {}, "thread_1", [], False, 0])
@pytest.mark.parametrize("model", ["claude-haiku-4-5", "gpt-4o-mini", "ironcage/echo"])
def test_any_other_thread_is_refused_in_the_words_that_the_sdks_act_on(
        mock, proxy_for, model, thread):
    answer = call(proxy_for("--budget", "0.05").port, "POST", "/v1/messages",
                  {**MESSAGE, "model": model, "thread": thread})

    error = answer.json["error"]
    assert (400, "invalid_request_error") == (answer.status, error["type"])
    assert {"error_code": "thread_unsupported_request", "unsupported": ["thread"]} \
        == error["details"]
    assert "send all of its messages" in error["message"]
    assert [] == mock.seen


def test_without_a_budget_only_a_translation_refuses_a_thread(mock, proxy_for):
    proxy = proxy_for()
    thread = {"thread": {"type": "continue", "previous_message_id": "msg_1"}}

    passed = call(proxy.port, "POST", "/v1/messages", {**MESSAGE, **thread}, headers=THREADS)
    refused = call(proxy.port, "POST", "/v1/messages", {**MESSAGE, **thread,
                                                        "model": "gpt-4o-mini"})

    assert [200, 400] == [passed.status, refused.status]
    assert "thread_unsupported_request" == refused.json["error"]["details"]["error_code"]
    assert [thread["thread"]] == [seen.json["thread"] for seen in mock.seen]


def test_a_tool_call_that_says_who_called_it_is_bounded_as_the_text_that_it_is(mock, proxy_for):
    """Clients send back what the provider answered, with `caller` and the like."""
    turns = [{"role": "user", "content": "hi"},
             {"role": "assistant", "content": [{
                 "type": "tool_use", "id": "toolu_1", "name": "f", "caller": {"type": "direct"},
                 "input": {"type": "anything", "path": "x"}}]},
             {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_1",
                                           "content": "done"}]}]

    answer = call(proxy_for("--budget", "0.02").port, "POST", "/v1/messages",
                  {**MESSAGE, "messages": turns,
                   "tools": [{"name": "f", "input_schema": {"type": "object"}}]})

    assert 200 == answer.status, answer.body


@pytest.mark.parametrize("asked, told, microdollars", [
    ({"service_tier": "priority"}, {}, 100 * 4.25 + 10 * 17),
    ({"service_tier": "priority"}, {"service_tier": "default"}, 100 * 2.5 + 10 * 10),
    ({"service_tier": "flex"}, {}, 100 * 2.5 + 10 * 10),
    ({}, {"model": "ironcage/echo"}, 100 * 2.5 + 10 * 10),
    ({}, {"model": "groq/llama-3.1-8b-instant"}, 100 * 2.5 + 10 * 10),
])
def test_what_an_answer_does_not_tell_is_charged_as_it_was_asked(
        mock, proxy_for, asked, told, microdollars):
    proxy = proxy_for()
    usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
    mock.script(Reply(steps=(json.dumps({"model": "gpt-4o", "usage": usage, **told}).encode(),)))

    call(proxy.port, "POST", "/v1/chat/completions", {**CAPPED_CHAT, "model": "gpt-4o", **asked})

    assert microdollars == settled_status(proxy)["spent_microdollars"]


# Many at once.

def test_64_threads_never_pass_a_budget_that_fits_a_few_requests(mock, proxy_for):
    """At every poll spent + reserved <= limit; at the end spent equals the provider's bill."""
    fields = {**CHAT, "max_tokens": 72}
    limit = 4 * bound_of(fields)
    proxy = proxy_for("--budget", f"0.{limit:06d}")
    statuses, polls, done = [], [], threading.Event()

    def poll():
        while not done.wait(0.0005):                 # which leaves the others the interpreter
            spent, reserved, _ = proxy.router.controller.get_full_status()
            polls.append(spent + reserved)

    def spend(number):
        with RawClient(proxy.port) as client:
            for i in range(8):
                body = {**fields, "stream": True} if (number + i) % 2 else fields
                client.request("POST", "/v1/chat/completions", json.dumps(body).encode())
                statuses.append(client.read_answer().status)

    poller = threading.Thread(target=poll)
    spenders = [threading.Thread(target=spend, args=(number,)) for number in range(64)]
    poller.start()
    for thread in spenders:
        thread.start()
    for thread in spenders:
        thread.join(PATIENCE_S * 3)
    done.set()
    poller.join(PATIENCE_S)

    assert 64 * 8 == len(statuses) and set(statuses) == {200, 402}
    assert max(polls) <= limit
    assert mock.billed_microdollars == settled_status(proxy)["spent_microdollars"] <= limit


def test_set_budget_blocks_and_unblocks_at_once(mock, proxy_for):
    proxy = proxy_for("--budget", "1", "--admin-token", ADMIN_TOKEN)

    def set_to(usd):
        return call(proxy.port, "PUT", "/ironcage/budget", {"limit_usd": usd}, token=ADMIN_TOKEN)

    answers = []
    for usd in ("1", "0", "0.5"):
        assert 200 == set_to(usd).status
        answers.append(call(proxy.port, "POST", "/v1/chat/completions", CAPPED_CHAT).status)

    assert [200, 402, 200] == answers


@pytest.mark.parametrize("more, code", [
    ({"model": "gpt-9-unknown"}, "unpriced_model"), ({"swarm": 12}, "unbounded_request"),
    ({"web_search_options": {}}, "unbounded_request"), ({}, None)])
def test_a_budget_that_is_set_in_the_middle_of_an_admission_holds_for_it(
        mock, proxy_for, monkeypatch, more, code):
    """The request was let in where nothing was limited; it is judged again before it is sent."""
    proxy = proxy_for()
    reserved, mock.applies_vendor_rules = proxy.router._reserved, False

    def after_a_put(*args):
        proxy.router.controller.set_budget(1_000_000)
        return reserved(*args)

    monkeypatch.setattr(proxy.router, "_reserved", after_a_put)
    answer = call(proxy.port, "POST", "/v1/chat/completions", {**CHAT, **more})

    if code is None:
        assert 200 == answer.status and "max_completion_tokens" in mock.seen[0].json
    else:
        assert (400, code) == (answer.status, answer.json["error"]["code"])
        assert [] == mock.seen
    assert mock.billed_microdollars == settled_status(proxy)["spent_microdollars"]


def test_status_names_everything_that_the_product_promises(mock, proxy):
    call(proxy.port, "POST", "/v1/chat/completions", CAPPED_CHAT)

    status = settled_status(proxy)

    assert {"limit_microdollars", "spent_microdollars", "reserved_microdollars",
            "available_microdollars", "requests", "failed_requests", "tokens", "by_model",
            "by_provider", "by_token", "uptime_s", "version"} <= set(status)
    assert status["spent_microdollars"] == status["by_model"]["gpt-4o-mini"]["cost_microdollars"]
    assert 1 == status["by_provider"]["openai"]["requests"] == status["requests"]
    assert mock.bills[0][1]["prompt_tokens"] == status["tokens"]["input_tokens"]


# The echo model.

ECHO = [("/v1/chat/completions", {"messages": [{"role": "user", "content": "one two three"}]}),
        ("/v1/responses", {"input": "one two three"}),
        ("/v1/completions", {"prompt": "one two three", "max_tokens": 9}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "one two three"}],
                          "max_tokens": 9})]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path, fields", ECHO)
def test_the_echo_model_answers_and_bills_without_key_or_network(proxy_for, path, fields, stream):
    proxy = proxy_for("--budget", "0.05", environ={})

    answer = call(proxy.port, "POST", path, {"model": "ironcage/echo", "stream": stream, **fields})

    assert 200 == answer.status
    assert b"three" in answer.body
    assert 3 * 1 + 3 * 2 == settled_status(proxy)["spent_microdollars"]


def test_the_echo_model_embeds_under_a_budget_for_its_input(proxy_for):
    """Its row has a price of output, and embeddings have no cap that could be lowered."""
    proxy = proxy_for("--budget", "0.05", environ={})

    answer = call(proxy.port, "POST", "/v1/embeddings",
                  {"model": "ironcage/echo", "input": "one two three"})

    assert 200 == answer.status and answer.json["data"][0]["embedding"]
    assert 3 == settled_status(proxy)["spent_microdollars"]


@pytest.mark.parametrize("path, fields", ECHO)
def test_the_echo_model_cuts_at_the_cap(proxy_for, path, fields):
    proxy = proxy_for(environ={})
    cap = "max_output_tokens" if path == "/v1/responses" else "max_tokens"

    answer = call(proxy.port, "POST", path, {"model": "ironcage/echo", **fields, cap: 2})

    assert b"one two" in answer.body and b"three" not in answer.body
    assert 3 * 1 + 2 * 2 == settled_status(proxy)["spent_microdollars"]


def test_the_echo_model_embeds_the_same_text_alike(proxy_for):
    proxy = proxy_for(environ={})
    fields = {"model": "ironcage/echo", "input": ["same words", "same words", "others"],
              "dimensions": 4}

    data = call(proxy.port, "POST", "/v1/embeddings", fields).json["data"]

    assert data[0]["embedding"] == data[1]["embedding"] != data[2]["embedding"]
    assert 4 == len(data[0]["embedding"])


def test_the_echo_model_refuses_several_choices_and_charges_nothing(proxy_for):
    proxy = proxy_for("--budget", "1", environ={})

    answer = call(proxy.port, "POST", "/v1/chat/completions",
                  {"model": "ironcage/echo", "n": 2, **ECHO[0][1]})

    assert 400 == answer.status
    assert 0 == settled_status(proxy)["spent_microdollars"]


def test_a_budget_of_a_few_echoes_ends_in_a_refusal(proxy_for):
    proxy = proxy_for("--budget", "0.000400", environ={})
    fields = {"model": "ironcage/echo", "max_tokens": 20, **ECHO[0][1]}

    statuses = [call(proxy.port, "POST", "/v1/chat/completions", fields).status
                for _ in range(40)]

    assert 200 == statuses[0] and 402 == statuses[-1]
    assert settled_status(proxy)["spent_microdollars"] <= 400


def test_the_echo_model_says_at_the_start_of_a_message_what_it_read(proxy):
    answer = call(proxy.port, "POST", "/v1/messages", {
        "model": "ironcage/echo", "max_tokens": 9, "stream": True,
        "messages": [{"role": "user", "content": "one two three"}]})

    start = json.loads(sse_events(answer.body)[0][1])
    assert ("message_start", 3) == (start["type"], start["message"]["usage"]["input_tokens"])
