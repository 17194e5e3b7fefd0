"""Headers by which Claude Code and Codex show that the money is coming to its end."""
import json
import time
from datetime import datetime, timezone

import pytest
from support import Reply, call, program

ic = program()
USER = [{"role": "user", "content": "hi"}]
ANTHROPICS = "anthropic-ratelimit-unified-"
MESSAGES = ("/v1/messages", {"model": "claude-haiku-4-5", "max_tokens": 20, "messages": USER})
ON_GPT = ("/v1/messages", {**MESSAGES[1], "model": "gpt-4o-mini"})
ON_ECHO = ("/v1/messages", {**MESSAGES[1], "model": "ironcage/echo"})
RESPONSES = ("/v1/responses", {"model": "gpt-4o-mini", "max_output_tokens": 20, "input": "hi"})
ECHO_RESPONSES = ("/v1/responses", {**RESPONSES[1], "model": "ironcage/echo"})
CHAT = ("/v1/chat/completions", {"model": "gpt-4o-mini", "max_tokens": 20, "messages": USER})


def spent_before(proxy, microdollars):
    proxy.router.controller.add_spend(microdollars)
    return proxy


def notice_of(answer):
    """What an answer says about the limits, without the family's name."""
    return {name.replace(ANTHROPICS, ""): value for name, value in answer.headers
            if name.startswith((ANTHROPICS, "x-codex-"))}


@pytest.mark.parametrize("spent, told", [
    (0, {}), (500_000, {}), (749_000, {}),
    (750_000, {"overage-utilization": "0.75", "overage-surpassed-threshold": "0.75"}),
    (769_000, {"overage-utilization": "0.76", "overage-surpassed-threshold": "0.75"}),
    (949_000, {"overage-utilization": "0.94", "overage-surpassed-threshold": "0.75"}),
    (950_000, {"overage-utilization": "0.95", "overage-surpassed-threshold": "0.95"}),
    (999_000, {"overage-utilization": "0.99", "overage-surpassed-threshold": "0.95"})])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path, fields", [MESSAGES, ON_GPT, ON_ECHO],
                         ids=["same dialect", "translated", "echo"])
def test_messages_say_from_three_quarters_on_how_much_of_the_limit_is_used(
        mock, proxy_for, path, fields, stream, spent, told):
    proxy = spent_before(proxy_for("--budget", "1"), spent)

    answer = call(proxy.port, "POST", path, {**fields, "stream": stream})

    assert (200, told) == (answer.status, notice_of(answer))


@pytest.mark.parametrize("spent, told", [
    (749_000, {}), (760_000, {"x-codex-primary-used-percent": "76"}),
    (999_000, {"x-codex-primary-used-percent": "99"})])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path, fields", [RESPONSES, ECHO_RESPONSES], ids=["openai", "echo"])
def test_responses_say_it_as_codex_reads_it(mock, proxy_for, path, fields, stream, spent, told):
    proxy = spent_before(proxy_for("--budget", "1"), spent)

    answer = call(proxy.port, "POST", path, {**fields, "stream": stream})

    assert (200, told) == (answer.status, notice_of(answer))


def test_a_whole_answer_counts_itself_and_a_stream_does_not_yet(mock, proxy_for):
    mock.input_tokens, mock.output_tokens = 100, 20           # 200 microdollars
    path, fields = MESSAGES
    whole = call(spent_before(proxy_for("--budget", "1"), 749_900).port, "POST", path, fields)
    proxy = spent_before(proxy_for("--budget", "1"), 749_900)

    first, second = (call(proxy.port, "POST", path, {**fields, "stream": True})
                     for _ in range(2))

    assert "0.75" == notice_of(whole)["overage-utilization"]
    assert ({}, "0.75") == (notice_of(first), notice_of(second)["overage-utilization"])


def token_config(tmp_path, **fields):
    path = tmp_path / "cage.json"
    path.write_text(json.dumps({"tokens": [{"name": "ci", "token": "tok_0123456789", **fields}]}))
    return "--config", str(path)


@pytest.mark.parametrize("path, fields, reset", [(*MESSAGES, "overage-reset"),
                                                 (*RESPONSES, "x-codex-primary-reset-at")])
@pytest.mark.parametrize("period, days", [("day", 1), ("week", 7), ("month", 31)])
def test_a_tokens_period_says_when_it_begins_anew(
        mock, proxy_for, tmp_path, path, fields, reset, period, days):
    proxy = proxy_for(*token_config(tmp_path, budget_usd="1", period=period))
    proxy.router.controller.accounts.by_scope["ci"].add(int(time.time()), spent=800_000)

    answer = call(proxy.port, "POST", path, fields, token="tok_0123456789")

    at = int(notice_of(answer)[reset])
    begins = datetime.fromtimestamp(at, timezone.utc)
    assert 0 < at - time.time() <= days * 86_400 and 0 == at % 86_400
    assert period != "week" or 0 == begins.weekday()
    assert period != "month" or 1 == begins.day


@pytest.mark.parametrize("proxys, tokens, told", [
    (800_000, 100_000, "0.80"), (100_000, 800_000, "0.80"), (960_000, 800_000, "0.96"),
    (100_000, 100_000, None)])
def test_the_limit_that_will_end_first_counts(mock, proxy_for, tmp_path, proxys, tokens, told):
    proxy = spent_before(proxy_for("--budget", "1", *token_config(tmp_path, budget_usd="1")),
                         proxys)
    proxy.router.controller.accounts.by_scope["ci"].add(int(time.time()), spent=tokens)

    answer = call(proxy.port, "POST", *MESSAGES, token="tok_0123456789")

    assert told == notice_of(answer).get("overage-utilization")


PROVIDERS = (("content-type", "application/json"), (ANTHROPICS + "status", "rejected"),
             (ANTHROPICS + "overage-utilization", "0.31"), (ANTHROPICS + "5h-reset", "7"),
             ("anthropic-ratelimit-requests-limit", "50"), ("x-codex-primary-used-percent", "12"),
             ("x-codex-primary-window-minutes", "300"))


@pytest.mark.parametrize("path, fields, family, others, told", [
    (*MESSAGES, ANTHROPICS, "anthropic-ratelimit-requests-limit",
     {"overage-utilization": "0.80", "overage-surpassed-threshold": "0.75"}),
    (*RESPONSES, "x-codex-primary-", ANTHROPICS + "status", {"used-percent": "80"})])
def test_ours_stand_in_place_of_the_providers_of_that_family(
        mock, proxy_for, path, fields, family, others, told):
    def with_headers(request):
        reply = mock.default_reply(request)
        return Reply(200, PROVIDERS, reply.steps, bills=reply.bills)

    mock.script(with_headers, with_headers)
    proxy = proxy_for("--budget", "1")

    before = call(proxy.port, "POST", path, fields)
    spent_before(proxy, 800_000)
    after = call(proxy.port, "POST", path, fields)

    def of_family(headers):
        return {name[len(family):]: value for name, value in headers if name.startswith(family)}

    assert of_family(PROVIDERS) == of_family(before.headers)
    assert told == of_family(after.headers)
    assert [before.header(others)] * 2 == [after.header(others), dict(PROVIDERS)[others]]


@pytest.mark.parametrize("path, fields", [CHAT, MESSAGES])
def test_no_other_answer_says_it(mock, proxy_for, path, fields):
    proxy = spent_before(proxy_for("--budget", "1"), 990_000)
    if path == MESSAGES[0]:
        mock.script(Reply(529, (("content-type", "application/json"),), (b"{}",)))

    answer = call(proxy.port, "POST", path, fields)
    refused = call(proxy.port, "POST", MESSAGES[0], {**MESSAGES[1], "max_tokens": 10 ** 6,
                                                     "container": "container_1"})

    assert ({}, {}, 402) == (notice_of(answer), notice_of(refused), refused.status)


def test_without_a_limit_nothing_is_said(mock, proxy_for):
    assert {} == notice_of(call(spent_before(proxy_for(), 10 ** 9).port, "POST", *MESSAGES))
