"""A tool loop of three turns, through the mock of each known server, by clients of every dialect:
nothing that the server refuses is sent, and what it used is charged."""
import dialects
import pytest
from hosts import (COST, HOSTS, KEY, MESSAGES_HOSTS, REASONING, THINKING, configured, host_reply,
                   messages_reply)
from support import call, program, settled_status

TOOL = {"name": "count", "description": "counts", "parameters": {
    "type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}}
ROUTES = {"chat": "/v1/chat/completions", "messages": "/v1/messages", "responses": "/v1/responses"}


@pytest.fixture
def proxy_of(mock, proxy_with):
    def start(name, *flags):
        assert name == program().KNOWN_PROVIDERS[name].name
        return proxy_with(configured(mock, name), *flags, environ={"HOST_KEY": KEY})
    return start


def first_request(client, model, stream):
    text = "Count to two."
    if client == "messages":
        return {"model": model, "max_tokens": 900, "stream": stream, "system": "Be brief.",
                "tools": [{"name": TOOL["name"], "description": TOOL["description"],
                           "input_schema": TOOL["parameters"]}],
                "messages": [{"role": "user", "content": text}]}
    if client == "responses":
        return {"model": model, "max_output_tokens": 900, "stream": stream, "store": False,
                "instructions": "Be brief.", "tools": [{"type": "function", **TOOL}],
                "include": ["reasoning.encrypted_content"],
                "input": [{"role": "user", "content": text}]}
    return {"model": model, "max_tokens": 900, "stream": stream,
            "tools": [{"type": "function", "function": TOOL}],
            "messages": [{"role": "system", "content": "Be brief."},
                         {"role": "user", "content": text}]}


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize("client", ["messages", "responses"])
@pytest.mark.parametrize("name", HOSTS)
def test_a_tool_loop_of_three_turns_passes_translated(mock, proxy_of, name, client, stream):
    mock.always = lambda request: host_reply(HOSTS[name], request)
    proxy = proxy_of(name, "--budget", "1")
    asked = first_request(client, f"{name}/m", stream)

    for turn in range(3):
        answer = call(proxy.port, "POST", ROUTES[client], asked)
        assert 200 == answer.status, answer.body
        whole = dialects.whole_of(client, answer)
        heard = dialects.heard(client, whole)
        if turn < 2:
            assert [("count", {"n": turn})] == [*heard.calls]
            asked = dialects.next_turn(client, asked, whole, f"result {turn}")

    assert "All done." == heard.text
    assert 3 * COST == settled_status(proxy)["spent_microdollars"]
    if HOSTS[name].reasoning:
        assert REASONING in heard.thoughts


@pytest.mark.parametrize("name", HOSTS)
def test_a_client_of_the_servers_own_format_has_its_cap_moved_where_that_counts(
        mock, proxy_of, name):
    mock.always = lambda request: host_reply(HOSTS[name], request)
    proxy = proxy_of(name, "--budget", "1")
    asked = first_request("chat", f"{name}/m", True)
    asked["max_completion_tokens"] = asked.pop("max_tokens")

    answer = call(proxy.port, "POST", ROUTES["chat"], asked)

    assert 200 == answer.status, answer.body
    assert COST == settled_status(proxy)["spent_microdollars"]


# Endpoints in Anthropic's format, which a client of Messages reaches untranslated.

@pytest.fixture
def endpoint_of(mock, proxy_with):
    """A proxy that has the mock as the Anthropic-format endpoint of a known provider."""
    def start(name, *flags):
        mock.always = lambda request: messages_reply(MESSAGES_HOSTS[name], request)
        return proxy_with(
            configured(mock, name, anthropic_base_url=mock.url + MESSAGES_HOSTS[name].path),
            *flags, environ={"HOST_KEY": KEY})
    return start


def capped_sellers(name):
    """What a budget sets at a router: the price of the row."""
    return {} if name != "openrouter" else {"provider": {"max_price": {
        "prompt": "2.00", "completion": "10.00", "request": "0.00"}}}


@pytest.mark.parametrize("flags", [("--budget", "1"), ()], ids=["a budget", "no budget"])
@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize("name", MESSAGES_HOSTS)
def test_a_tool_loop_with_thoughts_passes_untranslated(mock, endpoint_of, name, stream, flags):
    proxy = endpoint_of(name, *flags)
    asked = {**first_request("messages", f"{name}/m", stream), "max_tokens": 2000,
             "thinking": {"type": "enabled", "budget_tokens": 1024}, "metadata": {"user_id": "u"}}

    for turn in range(3):
        answer = call(proxy.port, "POST", "/v1/messages", asked)
        assert 200 == answer.status, answer.body
        assert {**asked, "model": "m", **(capped_sellers(name) if flags else {})} \
            == mock.seen[-1].json
        assert answer.body == mock.always(mock.seen[-1]).body
        whole = dialects.whole_of("messages", answer)
        assert THINKING == whole["content"][0]
        if turn < 2:
            asked = dialects.next_turn("messages", asked, whole, f"result {turn}")

    assert "All done." == whole["content"][1]["text"]
    assert 3 * COST == settled_status(proxy)["spent_microdollars"]


@pytest.mark.parametrize("name", MESSAGES_HOSTS)
def test_tokens_are_counted_where_the_message_would_go(mock, endpoint_of, name):
    answer = call(endpoint_of(name, "--budget", "1").port, "POST", "/v1/messages/count_tokens",
                  {"model": f"{name}/m", "messages": [{"role": "user", "content": "hello"}]})

    assert [MESSAGES_HOSTS[name].path + "/v1/messages/count_tokens"] == [
        seen.target for seen in mock.seen]
    if MESSAGES_HOSTS[name].counts:
        assert (200, {"input_tokens": 1000}) == (answer.status, answer.json)


@pytest.mark.parametrize("name", MESSAGES_HOSTS)
def test_a_cap_beyond_the_budget_is_lowered_at_the_price_of_the_seller(mock, endpoint_of, name):
    proxy = endpoint_of(name, "--budget", "0.05")
    asked = {**first_request("messages", f"{name}/m", False), "max_tokens": 64_000}

    answer = call(proxy.port, "POST", "/v1/messages", asked)

    assert 200 == answer.status, answer.body
    sent = mock.seen[0].json
    assert {**asked, "model": "m", "max_tokens": sent["max_tokens"], **capped_sellers(name)} == sent
    assert 0 < sent["max_tokens"] <= 50_000 // 10
    assert str(COST) == answer.header("x-ironcage-cost-microdollars")
