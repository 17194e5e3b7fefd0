"""Searches that the provider runs, under a budget: capped, bounded, charged with their fees.

The mock plays a provider that searches as often as it may, reads every result again at each
sampling, and bills the sum, as both vendors were seen to do.
"""
import json
from fractions import Fraction

import pytest
from support import ANTHROPIC_HEADERS, OPENAI_HEADERS, Reply, call, sse

SEARCH = {"type": "web_search_20250305", "name": "web_search"}
FUNCTION = {"name": "f", "input_schema": {"type": "object"}}
QUESTION = [{"role": "user", "content": "Perform a web search for: the weather in Graz"}]
USD = {"claude-sonnet-4-5": ("0.000003", "0.00000375", "0.000015"),
       "gpt-5.5": ("0.000005", "0.000005", "0.00003")}
FEE = Fraction("0.01")


class Searcher:
    """A provider that makes all the searches that it may, up to `eager`."""

    def __init__(self, eager=8, result_tokens=12_000, output=400, honours_caps=True):
        self.eager, self.result_tokens, self.output = eager, result_tokens, output
        self.honours_caps, self.billed, self.searches = honours_caps, 0, []

    def __call__(self, request):
        fields = request.json
        is_openai = request.path.endswith("/responses")
        if is_openai:
            offered, most = bool(fields.get("tools")), fields.get("max_tool_calls", 10 ** 9)
        else:
            tools = [t for t in fields.get("tools", ()) if str(t.get("type")).startswith("web_s")]
            offered, most = bool(tools), tools[0].get("max_uses", 10) if tools else 0
        uses = min(self.eager, most if self.honours_caps else 10 ** 9) * offered
        # One more try that is refused, and a sampling for it, where Claude may not search again.
        samplings = uses + 1 + int(not is_openai and 0 < uses == most)
        visible = len(request.body) // 4 + 2_250
        tokens = sum(visible + min(sampling, uses) * self.result_tokens
                     for sampling in range(samplings))
        rates = [Fraction(rate) for rate in USD[fields["model"]]]
        self.billed += -(-(tokens * rates[0] + self.output * rates[2] + uses * FEE)
                         * 10 ** 6 // 1)
        self.searches.append(uses)
        return (self._response if is_openai else self._message)(fields, tokens, uses)

    def _response(self, fields, tokens, uses):
        output = [{"type": "web_search_call", "id": f"ws_{n}", "status": "completed",
                   "action": {"type": "search", "query": "x"}} for n in range(uses)]
        whole = {"id": "resp_1", "object": "response", "status": "completed", "output": output,
                 "model": fields["model"], "usage": {
                     "input_tokens": tokens, "output_tokens": self.output,
                     "total_tokens": tokens + self.output}}
        if not fields.get("stream"):
            return Reply(headers=(("content-type", "application/json"), *OPENAI_HEADERS),
                         steps=(json.dumps(whole).encode(),))
        return Reply(headers=(("content-type", "text/event-stream"), *OPENAI_HEADERS), steps=(
            sse({"type": "response.created", "response": {**whole, "usage": None}},
                "response.created"),
            sse({"type": "response.completed", "response": whole}, "response.completed")),
            framing="chunked")

    def _message(self, fields, tokens, uses):
        whole = {"id": "msg_1", "type": "message", "role": "assistant", "model": fields["model"],
                 "content": [{"type": "text", "text": "sunny"}], "stop_reason": "end_turn",
                 "stop_sequence": None, "usage": {
                     "input_tokens": tokens, "output_tokens": self.output,
                     "server_tool_use": {"web_search_requests": uses}}}
        return Reply(headers=(("content-type", "application/json"), *ANTHROPIC_HEADERS),
                     steps=(json.dumps(whole).encode(),))


def status_of(proxy):
    return call(proxy.port, "GET", "/ironcage/status").json


def claude(**more):
    return {"model": "claude-sonnet-4-5", "max_tokens": 4000, "messages": QUESTION,
            "tools": [{**SEARCH, "max_uses": 8}], **more}


def gpt(**more):
    return {"model": "gpt-5.5", "input": QUESTION, "tools": [
        {"type": "function", "name": "exec", "parameters": {}},
        {"type": "web_search", "external_web_access": False}], **more}


def test_claudes_search_goes_upstream_as_it_was_asked_where_its_worst_case_fits(mock, proxy_for):
    proxy, mock.always = proxy_for("--budget", "20"), Searcher()

    answer = call(proxy.port, "POST", "/v1/messages", claude())

    assert 200 == answer.status and answer.header("x-ironcage-adjusted") is None
    assert claude() == mock.seen[0].json
    assert mock.always.billed == int(answer.header("x-ironcage-cost-microdollars"))


def test_its_number_is_lowered_to_what_fits_and_reported(mock, proxy_for):
    proxy, mock.always = proxy_for("--budget", "1"), Searcher()

    answer = call(proxy.port, "POST", "/v1/messages", claude())

    uses = mock.seen[0].json["tools"][0]["max_uses"]
    assert 1 <= uses < 8
    assert f"tools.web_search.max_uses={uses}" == answer.header("x-ironcage-adjusted")
    status = status_of(proxy)
    assert mock.always.billed == status["spent_microdollars"] <= 1_000_000
    assert 0 == status["reserved_microdollars"] == status["bound_exceeded"]


@pytest.mark.parametrize("budget", ["0.15", "0.6", "2", *(
    pytest.param(usd, marks=pytest.mark.soak) for usd in ("0.3", "1", "5"))])
@pytest.mark.parametrize("path, fields", [("/v1/messages", claude()), ("/v1/responses", gpt()),
                                          ("/v1/responses", gpt(stream=True))],
                         ids=["messages", "responses", "responses, streamed"])
def test_no_budget_is_passed_by_searching_until_it_is_gone(mock, proxy_for, budget, path, fields):
    proxy, mock.always = proxy_for("--budget", budget), Searcher(result_tokens=4_900)
    if path == "/v1/messages":
        mock.always.result_tokens = 15_000
    for _ in range(60):
        if call(proxy.port, "POST", path, fields).status == 402:
            break

    status = status_of(proxy)
    assert mock.always.billed == status["spent_microdollars"] <= status["limit_microdollars"]
    assert 0 == status["bound_exceeded"] == status["reserved_microdollars"]


def test_a_session_of_a_dollar_can_still_search(mock, proxy_for):
    """As Claude Code does it: a call about nothing else, with 128,000 tokens and eight uses."""
    proxy, mock.always = proxy_for("--budget", "1"), Searcher(eager=2)

    answer = call(proxy.port, "POST", "/v1/messages", claude(max_tokens=64_000))

    assert 200 == answer.status and [1] == mock.always.searches[:1]
    assert 1 == mock.seen[0].json["tools"][0]["max_uses"]


def test_openais_search_gets_a_cap_of_five(mock, proxy_for):
    proxy, mock.always = proxy_for("--budget", "60"), Searcher()

    answer = call(proxy.port, "POST", "/v1/responses", gpt())

    assert 5 == mock.seen[0].json["max_tool_calls"]
    assert "max_tool_calls=5" == answer.header("x-ironcage-adjusted")
    assert [5] == mock.always.searches
    assert mock.always.billed == int(answer.header("x-ironcage-cost-microdollars"))


def test_the_clients_own_cap_is_kept(mock, proxy_for):
    proxy, mock.always = proxy_for("--budget", "20"), Searcher()

    call(proxy.port, "POST", "/v1/responses", gpt(max_tool_calls=2))

    assert 2 == mock.seen[0].json["max_tool_calls"]


def test_a_search_that_is_only_offered_does_not_stop_a_call_that_will_not_search(mock, proxy_for):
    proxy, mock.always = proxy_for("--budget", "0.1"), Searcher(eager=0)

    answer = call(proxy.port, "POST", "/v1/responses", gpt(max_output_tokens=1000))

    assert 200 == answer.status
    assert 0 == mock.seen[0].json["max_tool_calls"]
    assert "max_tool_calls=0" == answer.header("x-ironcage-adjusted")


def test_a_compaction_without_hosted_tools_is_sent_as_it_is(mock, proxy_for):
    proxy, mock.always = proxy_for("--budget", "20"), Searcher(eager=0)

    answer = call(proxy.port, "POST", "/v1/responses", {
        "model": "gpt-5.5", "max_output_tokens": 1000,
        "input": [{"role": "user", "content": "hi"}, {"type": "compaction_trigger"}]})

    assert 200 == answer.status, answer.body
    assert "max_tool_calls" not in mock.seen[0].json
    assert answer.header("x-ironcage-adjusted") is None


def test_where_no_use_fits_claudes_search_is_left_out(mock, proxy_for):
    proxy, mock.always = proxy_for("--budget", "0.1"), Searcher()

    answer = call(proxy.port, "POST", "/v1/messages",
                  claude(max_tokens=1000, tools=[FUNCTION, SEARCH]))

    assert 200 == answer.status and [FUNCTION] == mock.seen[0].json["tools"]
    assert "tools.web_search=removed" == answer.header("x-ironcage-adjusted")


def test_a_call_about_a_search_alone_loses_tools_and_tool_choice_together(mock, proxy_for):
    proxy, mock.always = proxy_for("--budget", "0.1"), Searcher()

    call(proxy.port, "POST", "/v1/messages",
         claude(max_tokens=1000, tool_choice={"type": "auto"}))

    assert {"model", "max_tokens", "messages"} == mock.seen[0].json.keys()


def test_a_search_that_is_forced_is_refused_where_it_does_not_fit(mock, proxy_for):
    proxy = proxy_for("--budget", "0.1")

    answer = call(proxy.port, "POST", "/v1/messages", claude(
        tool_choice={"type": "tool", "name": "web_search"}))

    assert (402, []) == (answer.status, mock.seen)


def test_a_provider_that_ignores_its_cap_is_charged_in_full_and_counted(mock, proxy_for):
    """An assumption, then: no recording shows max_tool_calls at work."""
    proxy = proxy_for("--budget", "0.6")
    mock.always = Searcher(eager=12, result_tokens=1000, honours_caps=False)

    answer = call(proxy.port, "POST", "/v1/responses", gpt(max_output_tokens=1000))

    status = status_of(proxy)
    assert 200 == answer.status
    assert mock.always.billed == status["spent_microdollars"] > 600_000
    assert 1 == status["bound_exceeded"]


@pytest.mark.parametrize("flags", [("--no-hosted-tools",), ("--bound", "bytes")])
@pytest.mark.parametrize("path, fields", [("/v1/messages", claude()), ("/v1/responses", gpt())])
def test_an_operator_can_keep_searches_out(mock, proxy_for, flags, path, fields):
    proxy = proxy_for("--budget", "20", *flags)

    answer = call(proxy.port, "POST", path, fields)

    assert (400, []) == (answer.status, mock.seen)
    assert "--no-hosted-tools" in answer.json["error"]["message"]


@pytest.mark.parametrize("tool", [SEARCH, {"type": "web_fetch_20250910", "name": "web_fetch"}])
def test_a_search_that_a_message_brings_is_refused(mock, proxy, tool):
    addition = {"type": "tool_addition", "tool": {"type": "tool_definition", "definition": tool}}

    answer = call(proxy.port, "POST", "/v1/messages", claude(
        tools=[FUNCTION], messages=[*QUESTION, {"role": "system", "content": [addition]}]))

    assert (400, []) == (answer.status, mock.seen)
    assert "declare it there" in answer.json["error"]["message"]


def test_without_a_budget_nothing_is_changed(mock, proxy_for):
    proxy, mock.always = proxy_for(), Searcher()

    call(proxy.port, "POST", "/v1/responses", gpt())

    assert gpt() == mock.seen[0].json


def test_what_the_operator_lets_through_is_shown_and_counted(mock, proxy_for):
    proxy = proxy_for("--budget", "1", "--allow-field", "fan_out", "--allow-content", "hologram")
    mock.always = Searcher(eager=0)

    answer = call(proxy.port, "POST", "/v1/messages", {
        "model": "claude-sonnet-4-5", "max_tokens": 100, "fan_out": 3, "messages": [
            {"role": "user", "content": [{"type": "hologram"}]}]})

    assert 200 == answer.status
    assert {"field fan_out": 1, "content hologram": 1} == status_of(proxy)["hatches"]


def test_a_call_without_usage_costs_the_prompt_of_the_search_that_it_offers(mock, proxy_for):
    """OpenAI's search adds 4,400 tokens to the prompt, used or not."""
    proxy, costs = proxy_for("--budget", "50"), []
    for tools in ([], [{"type": "web_search"}]):
        mock.script(Reply(answers=False))
        call(proxy.port, "POST", "/v1/responses", {
            "model": "gpt-5.5", "input": "some words " * 400, "max_tool_calls": 0,
            "max_output_tokens": 16, "tools": [{"type": "function", "name": "f"}, *tools]})
        row = call(proxy.port, "GET", "/ironcage/usage?limit=1").json["rows"][0]
        costs.append(row["cost_microdollars"])

    assert costs[1] - costs[0] >= 4_400 * 5
