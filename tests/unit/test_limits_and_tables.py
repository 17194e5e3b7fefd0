"""The table of providers: where each is called, compared with what its vendor documents (read 28
November 2026), in which APIs, and without its key where it is printed."""
import pytest

import ironcage_proxy as ic


def provider(name, **row):
    return ic.provider_from(name, row)


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
    rows = ic.KNOWN_PROVIDERS.values()

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


@pytest.mark.parametrize("url, region", [
    ("https://us.api.openai.com", "us"), ("https://EU.api.openai.com:443/v1", "eu"),
    ("https://api.openai.com", None), ("https://us.api.openai.com.evil.example", None),
    ("http://127.0.0.1:1/us.api.openai.com", None)])
def test_regional_hosts_of_openai_are_known(url, region):
    assert region == ic.Provider("openai", "openai", url).data_residency


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


@pytest.mark.parametrize("format, responses, api, is_spoken", [
    ("openai", True, "responses", True), ("openai", False, "responses", False),
    ("openai", False, "chat", True), ("openai", True, "messages", False),
    ("anthropic", True, "messages", True), ("anthropic", True, "chat", False)])
def test_a_provider_speaks_the_apis_of_its_format(format, responses, api, is_spoken):
    assert is_spoken is (api in ic.Provider("p", format, "https://p", responses=responses).apis)


def test_the_echo_model_speaks_every_api_that_is_metered():
    assert {*ic.METERED_APIS.values()} <= ic.ECHO_PROVIDER.apis


@pytest.mark.parametrize("key, key_as, format, sent", [
    (None, "", "openai", {}), ("k", "", "openai", {"authorization": "Bearer k"}),
    ("k", "api-key", "openai", {"api-key": "k"}), ("k", "x-api-key", "openai", {"x-api-key": "k"})])
def test_a_key_travels_as_its_provider_wants_it(key, key_as, format, sent):
    assert sent == ic.Provider("p", format, "https://p", key=key, key_as=key_as).credentials()


def test_a_provider_is_printed_without_its_key():
    assert "secret" not in repr(ic.Provider("p", "openai", "https://p", key="secret"))


@pytest.mark.parametrize("method, path, name, more, is_free", [
    ("GET", "/v1/models", "lab", {}, True), ("POST", "/v1/models", "lab", {}, False),
    ("GET", "/v1/models/a%2Fb", "lab", {}, True), ("GET", "/v1/models/a?b", "lab", {}, False),
    ("GET", "/v1/files", "lab", {"is_free": True}, False),
    ("POST", "/v1/moderations", "openai", {}, True), ("POST", "/v1/moderations", "lab", {}, False),
    ("POST", "/v1/moderations", "lab", {"is_free": True}, True),
    ("POST", "/v1/moderations", "lab", {"sold_as": ("openai",)}, True),
    ("POST", "/v1/moderations", "openai", {"base_url": "https://gateway.example/v1"}, False),
    ("POST", "/v1/moderations", "lab", {
        "sold_as": ("openai",), "base_url": "https://gateway.example/v1"}, False),
    ("POST", "/v1/moderations", "openai", {"base_url": "https://api.openai.com/v1"}, True),
    ("POST", "/v1/moderations", "lab", {"base_url": "https://eu.api.openai.com/v1"}, True),
    ("POST", "/v1/moderations", "openai", {"base_url": "http://127.0.0.1:9/v1"}, True),
    ("GET", "/v1/models", "openai", {"base_url": "https://gateway.example/v1"}, True)])
def test_a_route_is_free_at_every_provider_or_at_the_one_that_says_so(method, path, name, more,
                                                                      is_free):
    assert is_free is ic.is_free_route(method, path, ic.Provider(
        name, "openai", **{"base_url": "", **more}))
