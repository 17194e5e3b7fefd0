"""Providers and aliases of --config: where calls go, with which key, at what price."""
import json
from dataclasses import replace

import pytest
from support import OPENAI_KEY, Gate, RawClient, Reply, call, program, settled_status, until

CHAT = {"model": "gpt-4o-mini", "max_tokens": 100,
        "messages": [{"role": "user", "content": "hello"}]}
LAB_KEY = "lab-canary-0123456789"


def chat(proxy, model, path="/v1/chat/completions"):
    return call(proxy.port, "POST", path, {**CHAT, "model": model})


def test_a_provider_of_any_name_is_reached_by_its_prefix_and_by_its_path(mock, proxy_with):
    proxy = proxy_with({"providers": {"lab": {"base_url": mock.url + "/v1", "key_env": "LAB_KEY"}}},
                       environ={"LAB_KEY": OPENAI_KEY})

    first = chat(proxy, "lab/gpt-4o-mini")
    second = chat(proxy, "gpt-4o-mini", "/lab/v1/chat/completions")

    assert [200, 200] == [first.status, second.status]
    assert ["gpt-4o-mini"] * 2 == [seen.json["model"] for seen in mock.seen]
    assert {"lab"} == set(settled_status(proxy)["by_provider"])


def test_a_key_goes_to_its_own_provider_only(mock, proxy_with):
    proxy = proxy_with({"providers": {"lab": {"base_url": mock.url, "key_env": "LAB_KEY"},
                                      "open": {"base_url": mock.url}}},
                       environ={"LAB_KEY": LAB_KEY})

    for model in ("lab/gpt-4o-mini", "open/gpt-4o-mini", "gpt-4o-mini"):
        chat(proxy, model)

    assert [f"Bearer {LAB_KEY}", None, f"Bearer {OPENAI_KEY}"] == [
        seen.header("authorization") for seen in mock.seen]


@pytest.mark.parametrize("model", [None, "", 7, ["gpt-4o-mini"]])
def test_a_request_names_its_model(mock, proxy, model):
    answer = call(proxy.port, "POST", "/v1/responses", {"model": model, "input": "hello"})

    assert (400, "model") == (answer.status, answer.json["error"]["param"])
    assert [] == mock.seen


def test_a_model_that_a_stored_prompt_names_is_left_to_the_provider(mock, proxy_for):
    call(proxy_for().port, "POST", "/v1/responses", {"prompt": {"id": "pmpt_1"}})

    assert {"prompt": {"id": "pmpt_1"}} == mock.seen[0].json


def test_an_image_for_a_model_whose_context_no_price_states_is_refused(mock, proxy_with):
    """Nothing bounds what it is billed as; without a budget it passes."""
    config = {"providers": {"lab": {"base_url": mock.url + "/v1", "key_env": "OPENAI_API_KEY"}},
              "prices": {"lab/gpt-4o-mini": {"input_cost_per_token": 1e-6,
                                             "output_cost_per_token": 1e-6}}}
    image = {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}
    asked = {"model": "lab/gpt-4o-mini", "max_tokens": 10,
             "messages": [{"role": "user", "content": [image]}]}
    mock.applies_vendor_rules = False

    statuses = [call(proxy_with(config, *flags).port, "POST", "/v1/chat/completions", asked).status
                for flags in (("--budget", "1"), ())]

    assert ([400, 200], 1) == (statuses, len(mock.seen))


def test_the_echo_model_has_its_own_name_whatever_the_path(mock, proxy):
    for path in ("/v1/chat/completions", "/openai/v1/chat/completions"):
        assert "ironcage/echo" == chat(proxy, "ironcage/echo", path).json["model"]
    assert [] == mock.seen


@pytest.mark.parametrize("name, options, wanted", [
    ("deepseek", {}, True), ("lab", {"echo_reasoning": True}, True), ("lab", {}, False)])
def test_reasoning_goes_back_to_the_servers_that_want_it(mock, proxy_with, name, options, wanted):
    """DeepSeek answers 400 to an assistant's message without the reasoning that it gave."""
    proxy = proxy_with({"providers": {name: {"base_url": mock.url, "key_env": "OPENAI_API_KEY",
                                             "free": True, **options}}})
    history = [*CHAT["messages"], {"role": "assistant", "content": [
        {"type": "thinking", "thinking": "T", "signature": "icx1.Y2hhdA"},
        {"type": "text", "text": "a"}]}, *CHAT["messages"]]

    call(proxy.port, "POST", "/v1/messages", {**CHAT, "model": f"{name}/gpt-4o-mini",
                                              "messages": history})

    assert ("T" if wanted else None) == mock.seen[0].json["messages"][1].get("reasoning_content")


def test_a_conversation_moves_from_another_model_to_claude(mock, proxy):
    """Claude refuses thinking that it has not signed: that of the other model stays behind."""
    question = {"role": "user", "content": "hello"}
    ours = {"type": "thinking", "thinking": "T", "signature": "icx1.Y2hhdA"}
    theirs = {"type": "thinking", "thinking": "U", "signature": "EqQB"}
    said = {"type": "text", "text": "a"}
    fields = {"model": "claude-haiku-4-5", "max_tokens": 10, "messages": [
        question, {"role": "assistant", "content": [ours, said]}, question,
        {"role": "assistant", "content": [theirs, said]}, question,
        {"role": "assistant", "content": [ours]}, question]}

    answer = call(proxy.port, "POST", "/v1/messages", fields)

    assert (200, "messages.thinking=removed") == (answer.status,
                                                  answer.header("x-ironcage-adjusted"))
    assert [question, {"role": "assistant", "content": [said]}, question,
            {"role": "assistant", "content": [theirs, said]}, question, question] == \
        mock.seen[0].json["messages"]


def test_a_provider_whose_key_is_not_set_is_refused_by_name(mock, proxy_with):
    proxy = proxy_with({"providers": {"lab": {"base_url": mock.url, "key_env": "LAB_KEY"}}})

    answer = chat(proxy, "lab/gpt-4o-mini")

    assert (400, "no_provider_key") == (answer.status, answer.json["error"]["code"])
    assert "LAB_KEY" in answer.json["error"]["message"]


def test_the_models_of_a_free_provider_pass_at_any_budget_and_cost_nothing(mock, proxy_with):
    mock.models.add("qwen-of-tomorrow")
    proxy = proxy_with({"providers": {"lab": {"base_url": mock.url, "free": True,
                                              "key_env": "LAB_KEY"}}},
                       "--budget", "0", environ={"LAB_KEY": OPENAI_KEY})

    answer = chat(proxy, "lab/qwen-of-tomorrow")

    assert (200, "0") == (answer.status, answer.header("x-ironcage-cost-microdollars"))
    assert {"lab/*"} == set(settled_status(proxy)["by_model"])
    assert 402 == chat(proxy, "gpt-4o-mini").status


def test_the_models_of_other_providers_need_a_price_under_a_budget(mock, proxy_with):
    proxy = proxy_with({"providers": {"lab": {"base_url": mock.url}}}, "--budget", "1")

    assert "unpriced_model" == chat(proxy, "lab/qwen-of-tomorrow").json["error"]["code"]


def test_a_server_of_this_machine_is_known_only_where_the_configuration_names_it(
        mock, proxy_with, proxy_for):
    """Else an agent could reach whatever listens there."""
    plain, named = proxy_for(), proxy_with({"providers": {"ollama": {"base_url": mock.url}}})

    refused = chat(plain, "ollama/gpt-4o-mini")
    chat(named, "ollama/gpt-4o-mini")

    assert (400, "unknown_provider") == (refused.status, refused.json["error"]["code"])
    assert ["gpt-4o-mini"] == [seen.json["model"] for seen in mock.seen]
    assert named.router.providers["ollama"].is_free
    assert "http://127.0.0.1:11434/v1" == program().provider_from("ollama", {}).base_url


def test_a_known_host_is_there_where_its_key_is(mock, proxy_for):
    from support import proxy_environment
    with_key = proxy_for(environ={**proxy_environment(mock), "GROQ_API_KEY": "gsk_0123456789"})

    assert "https://api.groq.com/openai/v1" == with_key.router.providers["groq"].base_url
    assert "groq" not in proxy_for().router.providers


@pytest.mark.parametrize("asked, sent", [
    ("fast", "gpt-4o-mini"), ("claude-haiku-9", "gpt-4o"), ("claude-haiku-4-5", "gpt-3.5-turbo"),
    ("lab/fast", "fast"), ("gpt-4o", "gpt-4o"),
])
def test_aliases_are_exact_names_first_and_then_patterns_in_order(mock, proxy_with, asked, sent):
    proxy = proxy_with({
        "providers": {"lab": {"base_url": mock.url, "key_env": "OPENAI_API_KEY"}},
        "models": {"claude-*": "lab/gpt-4o", "claude-haiku-4-5": "gpt-3.5-turbo",
                   "fast": "openai/gpt-4o-mini"}})

    chat(proxy, asked)

    assert sent == mock.seen[0].json["model"]


def test_a_tokens_model_patterns_look_at_what_an_alias_stands_for(mock, proxy_with):
    proxy = proxy_with({"models": {"gpt-4o": "gpt-4o-mini", "cheap": "gpt-4o"},
                        "tokens": [{"name": "a", "token": "ic_alice_0123456789",
                                    "models": ["gpt-4o-mini"]}]})

    def status(model):
        return call(proxy.port, "POST", "/v1/chat/completions", {**CHAT, "model": model},
                    token="ic_alice_0123456789").status

    assert [200, 403] == [status("gpt-4o"), status("cheap")]


def test_providers_and_aliases_change_while_serving(mock, proxy_with, tmp_path):
    proxy = proxy_with({"models": {"fast": "gpt-4o"}})
    chat(proxy, "fast")

    (tmp_path / "cage.json").write_text(json.dumps({"models": {"fast": "gpt-4o-mini"}}))
    proxy.reload_asked = True
    until(lambda: proxy.router.config.aliases == {"fast": "gpt-4o-mini"}, "it is read")
    chat(proxy, "fast")

    assert ["gpt-4o", "gpt-4o-mini"] == [seen.json["model"] for seen in mock.seen]


def test_a_provider_that_a_reload_removes_finishes_what_it_began(mock, proxy_with):
    row = {"input_cost_per_token": 1.5e-7, "output_cost_per_token": 6e-7,
           "cache_read_input_token_cost": 7.5e-8}
    proxy = proxy_with({"providers": {"lab": {"base_url": mock.url, "key_env": "LAB_KEY"}},
                        "prices": {"lab/gpt-4o-mini": row}},
                       "--budget", "1", environ={"LAB_KEY": OPENAI_KEY})
    gate = Gate()

    def wait_first(request):
        reply = mock.default_reply(request)
        return replace(reply, steps=(gate, *reply.steps))

    mock.script(wait_first)
    with RawClient(proxy.port) as client:
        client.request("POST", "/lab/v1/messages", json.dumps({**CHAT, "stream": True}).encode())
        mock.wait_for_requests(1)
        proxy.router.providers = {name: provider for name, provider
                                  in proxy.router.providers.items() if name != "lab"}
        gate.event.set()
        client.read_head()
        stream = b"".join(iter(client.read_chunk, b""))

    assert b"message_stop" in stream
    assert mock.billed_microdollars == settled_status(proxy)["spent_microdollars"]


# Caps: the field that a provider honours.

def caps_seen(mock, proxy_with, tmp_path, provider, caps, budget=("--budget", "1")):
    """The caps of a request as they arrive at a provider, and the answer."""
    row = {"input_cost_per_token": 1e-6, "output_cost_per_token": 2e-6, "max_output_tokens": 90_000,
           "litellm_provider": provider}
    (tmp_path / "prices.json").write_text(json.dumps({f"{provider}/m": row, "m": row}))
    proxy = proxy_with({"providers": {provider: {"base_url": mock.url + "/v1",
                                                 "key_env": "OPENAI_API_KEY"}}},
                       "--pricing", str(tmp_path / "prices.json"), *budget)
    mock.models.add("m")
    answer = call(proxy.port, "POST", f"/{provider}/v1/chat/completions", {
        "model": "m", "messages": CHAT["messages"], **caps})
    assert 200 == answer.status, answer.body
    return {name: value for name, value in mock.seen[-1].json.items() if "max" in name}, answer


# (provider, caps of the client, caps upstream, what is reported)
CAPS = [
    ("deepseek", {"max_completion_tokens": 5}, {"max_tokens": 5}, "max_completion_tokens=max_tokens"),
    ("mistral", {"max_completion_tokens": 5, "max_tokens": 7}, {"max_tokens": 7},
     "max_completion_tokens=max_tokens"),
    ("lab", {"max_completion_tokens": 5}, {"max_tokens": 5}, "max_completion_tokens=max_tokens"),
    ("lab", {"max_tokens": 5}, {"max_tokens": 5}, None),
    ("groq", {"max_completion_tokens": 5}, {"max_completion_tokens": 5}, None),
    ("groq", {"max_tokens": 5}, {"max_tokens": 5}, None),
]


@pytest.mark.parametrize("provider, caps, upstream, reported", CAPS)
def test_a_cap_goes_in_the_field_that_the_provider_honours(mock, proxy_with, tmp_path, provider,
                                                           caps, upstream, reported):
    seen, answer = caps_seen(mock, proxy_with, tmp_path, provider, caps)

    assert (upstream, reported) == (seen, answer.header("x-ironcage-adjusted"))


@pytest.mark.parametrize("provider, name", [("mistral", "max_tokens"), ("lab", "max_tokens"),
                                            ("groq", "max_completion_tokens")])
@pytest.mark.parametrize("caps", [{}, {"max_completion_tokens": 90_000}], ids=["none", "too large"])
def test_a_cap_of_ours_goes_there_too(mock, proxy_with, tmp_path, provider, name, caps):
    seen, answer = caps_seen(mock, proxy_with, tmp_path, provider, caps, ("--budget", "0.05"))

    assert {name: int(answer.header("x-ironcage-max-tokens"))} == seen
    assert 1_000 < seen[name] < 25_000


def test_without_a_budget_a_cap_stays_where_it_was(mock, proxy_with, tmp_path):
    seen, _ = caps_seen(mock, proxy_with, tmp_path, "deepseek", {"max_completion_tokens": 5}, ())

    assert {"max_completion_tokens": 5} == seen


def test_a_server_that_heeds_one_cap_only_cannot_be_made_to_pass_the_budget(mock, proxy_with,
                                                                            tmp_path):
    """DeepSeek and Ollama ignore max_completion_tokens: a hundred calls with it once spent 55
    times a budget."""
    usage = {"prompt_tokens": 10, "completion_tokens": 0}

    def heeds_max_tokens(request):
        usage["completion_tokens"] = min(20_000, request.json.get("max_tokens", 20_000))
        return Reply(steps=(json.dumps({"object": "chat.completion", "model": "m", "choices": [
            {"index": 0, "finish_reason": "stop", "message": {"content": "x"}}],
            "usage": usage}).encode(),))

    mock.always = heeds_max_tokens
    for _ in range(3):
        caps_seen(mock, proxy_with, tmp_path, "deepseek", {"max_completion_tokens": 1},
                  ("--budget", "0.001"))

        assert 1 == usage["completion_tokens"]
# Claude Code's suffix for the long window.

WINDOW = "context-1m-2025-08-07"
MESSAGE = {"max_tokens": 20, "messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.parametrize("asked", ["claude-haiku-4-5[1m]", "anthropic/claude-haiku-4-5[1M]",
                                   "long", "long-x", "exact[1m]"])
@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens",
                                  "/v1/chat/completions"])
def test_the_suffix_of_the_long_window_becomes_the_beta_that_asks_for_it(
        mock, proxy_with, path, asked):
    proxy = proxy_with({"models": {
        "long": "claude-haiku-4-5[1m]", "long-*": "anthropic/claude-haiku-4-5[1m]",
        "exact[1m]": "claude-haiku-4-5[1m]"}})
    fields = {**MESSAGE, "model": asked}
    if path.endswith("count_tokens"):
        del fields["max_tokens"]

    answer = call(proxy.port, "POST", path, fields)

    assert (200, "claude-haiku-4-5") == (answer.status, mock.seen[0].json["model"])
    assert WINDOW == mock.seen[0].header("anthropic-beta")


@pytest.mark.parametrize("own, sent", [
    ("x-2026-01-01", f"x-2026-01-01,{WINDOW}"), (WINDOW, WINDOW),
    (f"x-2026-01-01, {WINDOW}", f"x-2026-01-01, {WINDOW}")])
def test_the_beta_of_the_long_window_is_put_beside_the_clients_own_once(
        mock, proxy, own, sent):
    call(proxy.port, "POST", "/v1/messages", {**MESSAGE, "model": "claude-haiku-4-5[1m]"},
         [("anthropic-beta", own)])

    assert sent == mock.seen[0].header("anthropic-beta")


@pytest.mark.parametrize("model, headers", [
    ("claude-haiku-4-5[1m]", []), ("claude-haiku-4-5", [("anthropic-beta", WINDOW)])])
def test_a_whole_context_is_the_long_window_where_that_is_asked_for(
        mock, proxy_for, model, headers):
    answer = call(proxy_for("--budget", "0.05").port, "POST", "/v1/messages", {
        **MESSAGE, "model": model, "container": "container_1"}, headers)

    assert 402 == answer.status
    assert 1_000_000 <= answer.json["error"]["ironcage"]["needed_microdollars"]


@pytest.mark.parametrize("name", ["claude-haiku-4-5[1m]", "claude-haiku-4-5%5B1m%5D",
                                  "claude-haiku-4-5%5b1M%5d"])
@pytest.mark.parametrize("root", ["/v1/models", "/models"])
def test_a_model_is_looked_up_under_its_name_with_the_suffix_too(mock, proxy, root, name):
    answer = call(proxy.port, "GET", f"{root}/{name}")

    assert (200, "claude-haiku-4-5") == (answer.status, answer.json["id"])
    assert 404 == call(proxy.port, "GET", f"{root}/claude-none[1m]").status


def test_the_suffix_says_nothing_to_other_providers(mock, proxy):
    answer = call(proxy.port, "POST", "/v1/messages", {**MESSAGE, "model": "gpt-4o-mini[1m]"})

    assert (200, "gpt-4o-mini") == (answer.status, mock.seen[0].json["model"])
    assert mock.seen[0].header("anthropic-beta") is None


@pytest.mark.parametrize("model", ["claude-opus-9[beta]", "@cf/meta/llama", "gpt-x@20260101",
                                   "qwen+tools", "claude-opus-9[1m]"])
def test_a_refusal_shows_the_name_of_the_model_that_was_asked_for(proxy, model):
    answer = call(proxy.port, "POST", "/v1/messages", {**MESSAGE, "model": model})

    assert 400 == answer.status
    assert model.replace("[1m]", "") in answer.json["error"]["message"]


def test_what_a_call_counts_as_is_asked_where_the_call_would_go(mock, proxy_with):
    proxy = proxy_with({"models": {"fast": "claude-haiku-4-5"}, "providers": {"lab": {
        "base_url": mock.url, "format": "anthropic", "key_env": "ANTHROPIC_API_KEY",
        "key_as": "x-api-key"}}})

    for model in ("fast", "lab/claude-haiku-4-5", "anthropic/claude-haiku-4-5"):
        answer = call(proxy.port, "POST", "/v1/messages/count_tokens",
                      {"model": model, "messages": MESSAGE["messages"]})
        assert (200, {"input_tokens": 42}) == (answer.status, answer.json)
    assert ["claude-haiku-4-5"] * 3 == [seen.json["model"] for seen in mock.seen]


def test_the_input_tokens_of_a_response_by_a_model_elsewhere_are_estimated(mock, proxy):
    answer = call(proxy.port, "POST", "/v1/responses/input_tokens", {
        "model": "claude-haiku-4-5", "instructions": "Be brief.", "input": "How are you today?"})

    assert (200, "1") == (answer.status, answer.header("x-ironcage-estimated"))
    assert "response.input_tokens" == answer.json["object"]
    assert 5 < answer.json["input_tokens"] < 30
    assert [] == mock.seen
