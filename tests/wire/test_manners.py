"""The table of providers: where each is called, with which key, and how a configuration says
otherwise. Rows are compared with what their vendors document (read 28 November 2026)."""
import json

import pytest
from support import OPENAI_KEY, Reply, call, program, proxy_environment

CHAT = {"model": "gpt-4o-mini", "max_tokens": 100,
        "messages": [{"role": "user", "content": "hello"}]}


def provider(name, **row):
    return program().provider_from(name, row)


CHAT_URLS = {
    "openai": "https://api.openai.com/v1/chat/completions",
    "cerebras": "https://api.cerebras.ai/v1/chat/completions",
    "dashscope": "https://dashscope-intl.aliyuncs.com/compatible-mode/v1/chat/completions",
    "deepseek": "https://api.deepseek.com/v1/chat/completions",
    "fireworks_ai": "https://api.fireworks.ai/inference/v1/chat/completions",
    "gemini": "https://generativelanguage.googleapis.com/v1beta/openai/chat/completions",
    "github": "https://models.github.ai/inference/chat/completions",
    "groq": "https://api.groq.com/openai/v1/chat/completions",
    "huggingface": "https://router.huggingface.co/v1/chat/completions",
    "minimax": "https://api.minimax.io/v1/chat/completions",
    "mistral": "https://api.mistral.ai/v1/chat/completions",
    "moonshot": "https://api.moonshot.ai/v1/chat/completions",
    "nvidia_nim": "https://integrate.api.nvidia.com/v1/chat/completions",
    "openrouter": "https://openrouter.ai/api/v1/chat/completions",
    "perplexity": "https://api.perplexity.ai/chat/completions",
    "sambanova": "https://api.sambanova.ai/v1/chat/completions",
    "together_ai": "https://api.together.xyz/v1/chat/completions",
    "volcengine": "https://ark.cn-beijing.volces.com/api/v3/chat/completions",
    "xai": "https://api.x.ai/v1/chat/completions",
    "zai": "https://api.z.ai/api/paas/v4/chat/completions",
    "deepinfra": "https://api.deepinfra.com/v1/openai/chat/completions",
    "novita": "https://api.novita.ai/v3/openai/chat/completions",
    "siliconflow": "https://api.siliconflow.com/v1/chat/completions",
    "cohere": "https://api.cohere.ai/compatibility/v1/chat/completions",
    "ai21": "https://api.ai21.com/studio/v1/chat/completions",
    "llamacpp": "http://127.0.0.1:8080/v1/chat/completions",
    "lm_studio": "http://127.0.0.1:1234/v1/chat/completions",
    "ollama": "http://127.0.0.1:11434/v1/chat/completions",
    "sglang": "http://127.0.0.1:30000/v1/chat/completions",
    "vllm": "http://127.0.0.1:8000/v1/chat/completions",
}
MESSAGES_URLS = {
    "anthropic": "https://api.anthropic.com/v1/messages",
    "dashscope": "https://dashscope-intl.aliyuncs.com/apps/anthropic/v1/messages",
    "deepseek": "https://api.deepseek.com/anthropic/v1/messages",
    "fireworks_ai": "https://api.fireworks.ai/inference/v1/messages",
    "minimax": "https://api.minimax.io/anthropic/v1/messages",
    "moonshot": "https://api.moonshot.ai/anthropic/v1/messages",
    "novita": "https://api.novita.ai/anthropic/v1/messages",
    "openrouter": "https://openrouter.ai/api/v1/messages",
    "zai": "https://api.z.ai/api/anthropic/v1/messages",
    "llamacpp": "http://127.0.0.1:8080/v1/messages",
    "lm_studio": "http://127.0.0.1:1234/v1/messages",
    "ollama": "http://127.0.0.1:11434/v1/messages",
    "sglang": "http://127.0.0.1:30000/v1/messages",
    "vllm": "http://127.0.0.1:8000/v1/messages",
}


def test_every_known_provider_has_its_url_here():
    rows = program().KNOWN_PROVIDERS.values()

    assert set(CHAT_URLS) == {row.name for row in rows if row.format == "openai" and row.base_url}
    assert set(MESSAGES_URLS) == {row.name for row in rows
                                  if row.format == "anthropic" or row.anthropic_base_url}


@pytest.mark.parametrize("name, url", CHAT_URLS.items())
def test_a_chat_completion_is_called_where_its_vendor_documents_it(name, url):
    assert url == provider(name).url("/v1/chat/completions")


@pytest.mark.parametrize("name, url", MESSAGES_URLS.items())
def test_a_message_is_called_untranslated_where_its_vendor_documents_it(name, url):
    speaking = provider(name).speaking("messages")

    assert ("anthropic", url) == (speaking.format, speaking.url("/v1/messages"))


@pytest.mark.parametrize("name, row, url", [
    ("lab", {"base_url": "https://lab.example"}, "https://lab.example/v1/chat/completions"),
    ("lab", {"base_url": "https://lab.example/"}, "https://lab.example/v1/chat/completions"),
    ("lab", {"base_url": "https://lab.example/v1/"}, "https://lab.example/v1/chat/completions"),
    ("lab", {"base_url": "https://lab.example/api/paas/v4"},
     "https://lab.example/api/paas/v4/chat/completions"),
    ("lab", {"base_url": "https://lab.example/openai"},
     "https://lab.example/openai/chat/completions"),
    ("lab", {"base_url": "https://lab.example", "path": ""},
     "https://lab.example/chat/completions"),
    ("lab", {"base_url": "https://lab.example", "path": "/v3"},
     "https://lab.example/v3/chat/completions"),
    ("azure", {"base_url": "https://mine.openai.azure.com"},
     "https://mine.openai.azure.com/openai/v1/chat/completions"),
    ("azure", {"base_url": "https://mine.openai.azure.com/openai/v1/"},
     "https://mine.openai.azure.com/openai/v1/chat/completions"),
    ("vertex", {"base_url": "https://eu-aiplatform.googleapis.com/v1/projects/p/locations/eu/"
                            "endpoints/openapi"},
     "https://eu-aiplatform.googleapis.com/v1/projects/p/locations/eu/endpoints/openapi"
     "/chat/completions"),
    ("perplexity", {"base_url": "https://api.perplexity.ai"},
     "https://api.perplexity.ai/chat/completions"),
    ("google", {}, "https://generativelanguage.googleapis.com/v1beta/openai/chat/completions"),
])
def test_a_base_url_with_a_path_is_used_as_it_stands(name, row, url):
    assert url == provider(name, **row).url("/v1/chat/completions")


@pytest.mark.parametrize("url", ["https://lab.example", "https://lab.example/v1",
                                 "https://lab.example/v1/v1"])
def test_an_endpoint_in_anthropics_format_has_one_v1(url):
    lab = provider("lab", base_url=url, format="anthropic")

    assert "https://lab.example/v1/messages" == lab.url("/v1/messages")
    assert "https://lab.example/v1/messages" == provider(
        "lab", base_url="https://other.example", anthropic_base_url=url
    ).speaking("messages").url("/v1/messages")


@pytest.mark.parametrize("end", ["/chat/completions", "/v1/chat/completions/", "/messages",
                                 "/v1/responses", "/embeddings", "/v1/completions"])
def test_a_base_url_that_goes_on_to_an_endpoint_is_refused(end):
    with pytest.raises(ValueError, match="must end before /"):
        provider("lab", base_url="https://lab.example" + end)


def test_a_known_provider_at_another_host_loses_the_endpoint_that_is_known_at_its_own():
    moved = provider("deepseek", base_url="https://gateway.example/v1")

    assert moved == moved.speaking("messages")
    assert "reasoning_content" == moved.reasoning_field


@pytest.mark.parametrize("url, manners, seller", [
    ("https://api.mistral.ai/v1", {"stream_usage": False, "user_after_tool": False}, "mistral"),
    ("https://eu.openrouter.ai/api/v1", {"caps": ("max_tokens",)}, "openrouter"),
    ("https://api.moonshot.cn/v1", {"reasoning_field": "reasoning_content"}, "moonshot"),
    ("https://mine.openai.azure.com/openai/v1", {"zero_is_a_cap": True}, "azure"),
    ("https://API.Mistral.ai:443/v1", {"stream_usage": False}, "mistral"),
    ("https://api.mistral.ai./v1", {"stream_usage": False}, "mistral"),
    ("http://localhost:8000/v1", {"zero_is_a_cap": True, "is_free": False}, "vllm"),
    ("http://[::1]:8000/v1", {"zero_is_a_cap": True, "is_free": False}, "vllm"),
    ("http://127.0.0.1:8000/v1", {"zero_is_a_cap": True, "is_free": False}, "vllm"),
])
def test_a_provider_of_another_name_has_the_manners_of_its_host(url, manners, seller):
    mine = provider("mine", base_url=url)

    assert manners == {name: getattr(mine, name) for name in manners}
    assert (url, "", seller) == (mine.base_url, mine.key_env, mine.sold_as[0])


def test_a_host_that_only_looks_like_a_known_one_has_no_manners():
    for url in ("https://api.mistral.ai.evil.example", "https://xapi.mistral.ai",
                "https://openai.azure.com.evil.example"):
        assert () == provider("mine", base_url=url).sold_as


@pytest.mark.parametrize("field, given, name, value", [
    ("caps", ["max_completion_tokens"], "caps", ("max_completion_tokens",)),
    ("stream_usage", True, "stream_usage", True),
    ("responses", False, "responses", False),
    ("user_after_tool", True, "user_after_tool", True),
    ("cache_marks", True, "cache_marks", True),
    ("call_ids", "[a-z]+", "call_ids", "[a-z]+"),
    ("reasoning_field", "reasoning", "reasoning_field", "reasoning"),
    ("echo_reasoning", True, "reasoning_field", "reasoning_content"),
    ("zero_is_a_cap", True, "zero_is_a_cap", True), ("file_tools", True, "file_tools", True),
    ("reasoning_beyond_caps", 80_000, "reasoning_beyond_caps", 80_000),
    ("key_as", "api-key", "key_as", "api-key"),
    ("fields", ["mine"], "fields", ("mine",)),
    ("sold_as", ["mistralai"], "sold_as", ("mistralai",)),
    ("anthropic_base_url", "https://lab.example/v1", "anthropic_base_url", "https://lab.example"),
])
def test_a_configuration_can_say_each_manner(field, given, name, value):
    assert value == getattr(provider("mistral", **{field: given}), name)


@pytest.mark.parametrize("field, wrong", [
    ("caps", []), ("caps", ["max_output_tokens"]), ("caps", "max_tokens"), ("caps", [1]),
    ("responses", "yes"), ("call_ids", "["), ("call_ids", 5), ("call_ids", "(" * 500),
    ("key_as", "basic"), ("fields", ["a b"]), ("fields", [{}]), ("path", "v1"), ("path", None),
    ("anthropic_base_url", "lab.example"), ("sold_as", []), ("reasoning_field", "thoughts"),
    ("reasoning_beyond_caps", -1), ("reasoning_beyond_caps", True)])
def test_a_manner_that_is_none_is_refused_by_its_name(field, wrong):
    with pytest.raises(ValueError, match=f"^{field}: must "):
        provider("mistral", **{field: wrong})


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


def test_a_server_on_the_lan_without_a_key_needs_no_encryption(mock, proxy_with):
    assert "http://10.0.0.9:11434/v1" == provider("ollama", base_url="http://10.0.0.9:11434"
                                                  ).base_url
    with pytest.raises(program().Misconfigured, match="in the clear"):
        program().with_key(provider("deepseek", base_url="http://10.0.0.9"), {})
    with pytest.raises(program().Misconfigured, match="in the clear"):
        program().with_key(provider("lab", base_url="https://a.example", key_env="LAB_KEY",
                                    anthropic_base_url="http://a.example"), {})


@pytest.mark.parametrize("host, is_free", [
    *[(host, True) for host in (
        "127.0.0.1:8000", "localhost", "[::1]:8000", "0.0.0.0", "10.0.0.9", "192.168.1.7",
        "172.31.0.1", "169.254.1.1", "100.100.1.2", "[fd00::1]", "[fe80::1]", "gpu-box", "ollama",
        "box.local", "a.b.lan", "x.internal", "x.home.arpa", "host.docker.internal")],
    *[(host, False) for host in (
        "ollama.com", "8.8.8.8", "172.32.0.1", "100.128.1.1", "192.169.1.1", "10.0.0.9.nip.io",
        "134744072", "0x08080808", "[2001:db8::1]", "[fd::1]", "localhost.example", "local.com")]])
def test_a_server_that_is_usually_free_is_so_at_a_host_of_ones_own(host, is_free):
    at_host = {"base_url": f"https://{host}"}

    assert is_free == provider("vllm", **at_host).is_free
    assert is_free == provider("ollama", anthropic_base_url=f"https://{host}").is_free
    assert provider("vllm", **at_host, free=True).is_free
    assert not provider("vllm", **at_host, free=False).is_free
    assert not provider("lab", **at_host).is_free


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


def test_a_model_is_priced_as_its_host_sells_it_whatever_the_provider_is_called():
    mine = provider("mine", base_url="https://api.deepseek.com")
    rows = {"deepseek/some-chat": {"input_cost_per_token": 1e-6, "output_cost_per_token": 2e-6,
                                   "litellm_provider": "deepseek"}}
    rows = json.loads(json.dumps(rows), parse_float=program().exact_number)
    book = program().PriceBook(rows).with_own({}, providers=[mine], price_as={})

    assert "deepseek/some-chat" == book.price("some-chat", "mine").key
    assert book.find("some-chat", "another") is None


def test_check_says_which_url_would_be_called(mock, proxy_with, capsys, tmp_path):
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
