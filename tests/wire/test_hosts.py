"""A tool loop of three turns, through the mock of each known server, by clients of every dialect:
nothing that the server refuses is sent, and what it used is charged."""
import json

import dialects
import pytest
from hosts import HOSTS, KEY, REASONING, USAGE, host_reply
from support import call, program, proxy_environment, settled_status

RATES = {"input_cost_per_token": 2e-6, "output_cost_per_token": 10e-6}
COST = USAGE["prompt_tokens"] * 2 + USAGE["completion_tokens"] * 10       # microdollars a turn
TOOL = {"name": "count", "description": "counts", "parameters": {
    "type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}}
ROUTES = {"chat": "/v1/chat/completions", "messages": "/v1/messages", "responses": "/v1/responses"}


@pytest.fixture
def proxy_of(mock, proxy_for, tmp_path):
    """A proxy that has the mock as one known provider, at another host."""
    def start(name, *flags):
        row = program().KNOWN_PROVIDERS[name]
        path = tmp_path / "cage.json"
        path.write_text(json.dumps({
            "providers": {name: {"base_url": mock.url, "key_env": "HOST_KEY", "free": False,
                                 "responses": False}},
            "prices": {f"{name}/m": {**RATES, "litellm_provider": name}}}))
        assert row.name == name
        return proxy_for("--config", str(path), *flags,
                         environ={**proxy_environment(mock), "HOST_KEY": KEY})
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
