"""The manners of a provider on the wire: with which key, and at which endpoint it is called."""
import json

import pytest
from support import OPENAI_KEY, Reply, call, program, proxy_environment

CHAT = {"model": "gpt-4o-mini", "max_tokens": 100,
        "messages": [{"role": "user", "content": "hello"}]}


@pytest.mark.parametrize("row, sent", [
    ({}, (f"Bearer {OPENAI_KEY}", OPENAI_KEY, None)),
    ({"key_as": "x-api-key"}, (None, OPENAI_KEY, None)),
    ({"key_as": "bearer"}, (f"Bearer {OPENAI_KEY}", None, None)),
    ({"key_as": "api-key"}, (None, None, OPENAI_KEY)),
])
def test_an_endpoint_in_anthropics_format_gets_its_key_both_ways_unless_it_is_known(
        mock, proxy_with, row, sent):
    mock.always = Reply(steps=(b"{}",))
    proxy = proxy_with({"providers": {"lab": {"base_url": mock.url, "format": "anthropic",
                                              "key_env": "OPENAI_API_KEY", **row}}})

    call(proxy.port, "POST", "/v1/messages", {**CHAT, "model": "lab/some-model"})

    assert "/v1/messages" == mock.seen[0].target
    assert sent == tuple(mock.seen[0].header(name)
                         for name in ("authorization", "x-api-key", "api-key"))


def test_a_provider_with_two_endpoints_is_called_untranslated_in_both_formats(mock, proxy_with):
    mock.always = Reply(steps=(b"{}",))
    proxy = proxy_with({"providers": {"lab": {
        "base_url": mock.url + "/openai/v9", "anthropic_base_url": mock.url + "/anthropic/v1",
        "key_env": "OPENAI_API_KEY"}}})
    body = {**CHAT, "model": "lab/some-model", "metadata": {"user_id": "u"}}

    for path in ("/v1/chat/completions", "/v1/messages", "/v1/messages/count_tokens",
                 "/lab/v1/messages"):
        call(proxy.port, "POST", path, body)

    assert ["/openai/v9/chat/completions", "/anthropic/v1/messages",
            "/anthropic/v1/messages/count_tokens", "/anthropic/v1/messages"] == [
        seen.target for seen in mock.seen]
    assert [{**body, "model": "some-model"}] * 3 == [seen.json for seen in mock.seen[:3]]
    assert ["2023-06-01"] * 3 == [seen.header("anthropic-version") for seen in mock.seen[1:]]


@pytest.mark.parametrize("model, hint", [
    ("olama/qwen3", "did you mean ollama"), ("zai/glm-5", "set ZAI_API_KEY"),
    ("vllm/qwen", "under providers in --config"), ("hf/x", "names a provider that there is not"),
    ("azure/gpt-4o", "under providers in --config"), ("github/gpt-4o", "under providers"),
    ("z-ai/glm-5", "zai is not set up")])
@pytest.mark.parametrize("flags", [(), ("--budget", "1")])
def test_a_model_of_a_provider_that_there_is_not_goes_nowhere(mock, proxy_with, model, hint,
                                                              flags):
    proxy = proxy_with({"providers": {"ollama": {}}}, *flags)

    answer = call(proxy.port, "POST", "/v1/chat/completions", {**CHAT, "model": model})
    as_anthropic = call(proxy.port, "POST", "/v1/messages", {**CHAT, "model": model})

    assert (400, "iron_cage_unknown_provider", "unknown_provider") == (
        answer.status, answer.json["error"]["type"], answer.json["error"]["code"])
    assert hint in answer.json["error"]["message"]
    assert (400, "invalid_request_error") == (as_anthropic.status,
                                              as_anthropic.json["error"]["type"])
    assert [] == mock.seen


def test_another_usual_name_of_a_provider_reaches_it(mock, proxy_with):
    proxy = proxy_with({"providers": {"together_ai": {"base_url": mock.url, "free": True,
                                                      "key_env": "OPENAI_API_KEY"}}})

    answer = call(proxy.port, "POST", "/together/v1/chat/completions", CHAT)
    by_model = call(proxy.port, "POST", "/v1/chat/completions",
                    {**CHAT, "model": "together/gpt-4o-mini"})

    assert [200, 200] == [answer.status, by_model.status]


def test_a_variable_that_people_set_for_other_things_makes_no_provider_and_stays_in_the_child(
        mock, proxy_for):
    environ = {**proxy_environment(mock), "GITHUB_TOKEN": "ghp_0123456789abcdef",
               "HF_TOKEN": "hf_0123456789abcdef", "GEMINI_API_KEY": "AIza0123456789abcdef"}
    proxy = proxy_for(environ=environ)

    kept = program().child_environment(proxy, environ, "agent")

    assert {"gemini"} == {"github", "huggingface", "gemini"} & set(proxy.router.providers)
    assert {"GITHUB_TOKEN", "HF_TOKEN"} == kept.keys() & {"GITHUB_TOKEN", "HF_TOKEN",
                                                          "GEMINI_API_KEY"}


def test_a_path_that_was_completed_before_is_named_with_both_urls(mock, proxy_with, caplog):
    proxy_with({"providers": {"lab": {"base_url": "https://lab.example/openai"},
                              "new": {"base_url": "https://new.example/v1"}, "gemini": {}}})

    assert [("lab", "https://lab.example/openai/chat/completions",
             "https://lab.example/openai/v1/chat/completions")] == [
        (record.fields["provider"], record.fields["url"], record.fields["before"])
        for record in caplog.records if "0.2.3" in record.getMessage()]


def test_check_says_which_url_would_be_called(capsys, tmp_path):
    path = tmp_path / "cage.json"
    path.write_text(json.dumps({"providers": {"deepseek": {}}}))

    assert 0 == program().main(["check", "--port", "0", "--config", str(path),
                                "deepseek/deepseek-chat", "olama/x"])

    out = capsys.readouterr().out
    assert "at https://api.deepseek.com/anthropic/v1/messages and " \
        "https://api.deepseek.com/v1/chat/completions" in out
    assert "model     olama/x is refused: the model olama/x names a provider" in out


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
def test_reasoning_that_no_cap_holds_is_set_aside_too(mock, proxy_with, path):
    mock.script(lambda request: Reply(steps=(json.dumps({
        "choices": [{"index": 0, "finish_reason": "stop",
                     "message": {"role": "assistant", "content": "hi", "reasoning_content": "so"}}],
        "usage": {"prompt_tokens": 5, "completion_tokens": 1_100, "total_tokens": 1_105}}).encode(),)))
    proxy = proxy_with({
        "providers": {"lab": {"base_url": mock.url, "reasoning_beyond_caps": 1_000}},
        "prices": {"lab/m": {"input_cost_per_token": 0, "output_cost_per_token": 1e-6,
                             "litellm_provider": "lab"}}}, "--budget", "0.0020", "--wait", "0")

    first, second = (call(proxy.port, "POST", path, {**CHAT, "model": "lab/m"}) for _ in range(2))

    assert (200, 402, 1) == (first.status, second.status, len(mock.seen))
    assert (1_100, 1_100) == (second.json["error"]["ironcage"]["spent_microdollars"],
                              second.json["error"]["ironcage"]["needed_microdollars"])
    assert "Its input and the reasoning that no cap holds alone can cost $0.001" \
        in second.json["error"]["message"]
