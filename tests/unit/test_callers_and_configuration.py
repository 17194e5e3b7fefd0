"""Callers and configuration: what a token may use, and a file that is read whole and strictly, or
refused in one line that names the fault and shows no secret."""
import json
import logging
import os
import re
from random import Random

import pytest
from support import seeds

import ironcage_proxy as ic

ALICE, BOB = "ic_alice_canary_0123456789", "ic_bob_canary_0123456789"


@pytest.fixture
def config(tmp_path):
    return tmp_path / "cage.json"


def write_config(path, *tokens):
    path.write_text(json.dumps({"tokens": tokens}))


# Providers.

def provider(name, **row):
    return ic.provider_from(name, row)


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


@pytest.mark.parametrize("name, row", [
    ("groq", {"path": "/v9"}), ("lab", {"base_url": "https://lab.example/v1", "path": "/v9"}),
    ("openai", {"path": ""}), ("lab", {"base_url": "https://x", "format": "anthropic", "path": "/a"}),
    ("anthropic", {"base_url": "https://x", "path": "/a"})])
def test_a_path_that_would_be_put_nowhere_is_refused(name, row):
    with pytest.raises(ValueError, match="^path: is only for a base_url"):
        provider(name, **row)


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
    ("sellers", True, "sellers", True),
    ("reasoning_beyond_caps", 80_000, "reasoning_beyond_caps", 80_000),
    ("key_as", "api-key", "key_as", "api-key"),
    ("fields", ["mine", "a.b"], "fields", ("mine", "a.b")),
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


def test_a_server_on_the_lan_without_a_key_needs_no_encryption():
    assert "http://10.0.0.9:11434/v1" == provider("ollama", base_url="http://10.0.0.9:11434"
                                                  ).base_url
    with pytest.raises(ic.Misconfigured, match="in the clear"):
        ic.with_key(provider("deepseek", base_url="http://10.0.0.9"), {})
    with pytest.raises(ic.Misconfigured, match="in the clear"):
        ic.with_key(provider("lab", base_url="https://a.example", key_env="LAB_KEY",
                                    anthropic_base_url="http://a.example"), {})


def test_a_model_is_priced_as_its_host_sells_it_whatever_the_provider_is_called():
    mine = provider("mine", base_url="https://api.deepseek.com")
    rows = {"deepseek/some-chat": {"input_cost_per_token": 1e-6, "output_cost_per_token": 2e-6,
                                   "litellm_provider": "deepseek"}}
    rows = json.loads(json.dumps(rows), parse_float=ic.exact_number)
    book = ic.PriceBook(rows).with_own({}, providers=[mine], price_as={})

    assert "deepseek/some-chat" == book.price("some-chat", "mine").key
    assert book.find("some-chat", "another") is None


# The file.

@pytest.mark.parametrize("config, fault", [
    ({"providers": {"lab": {}}}, "needs a base_url"),
    ({"providers": {"Lab": {"base_url": "https://x"}}}, "must be named with"),
    *[({"providers": {name: {"base_url": "https://x"}}}, "must be named with") for name in (
        "v1", "ironcage", "messages", "chat", "responses", "completions", "embeddings", "models",
        "healthz", "readyz")],
    ({"providers": {"lab": {"base_url": "ftp://x"}}}, "base_url: must be an http"),
    ({"providers": {"lab": {"base_url": "https://u:p@x"}}}, "base_url: must have no user name"),
    ({"providers": {"lab": {"base_url": 7}}}, "base_url: must be a URL"),
    ({"providers": {"lab": {"base_url": "http://lab.example", "key_env": "LAB"}}}, "in the clear"),
    ({"providers": {"lab": {"base_url": "https://x", "key": "sk-1234567890"}}},
     "unknown field key (did"),
    ({"providers": {"lab": {"base_url": "https://x", "format": "grpc"}}}, "format: must be openai"),
    ({"providers": {"lab": {"base_url": "https://x", "free": "yes"}}}, "free: must be true"),
    ({"providers": {"lab": {"base_url": "https://x", "key_env": "A B"}}}, "key_env: must be an"),
    ({"providers": []}, "an object of providers"), ({"models": []}, "an object of models"),
    ({"models": {"fast": 1}}, "must map names to names"),
    ({"secrets": {}}, "has an unknown field secrets; there are tokens"),
    ([], "must be an object"),
])
def test_a_fault_in_providers_or_models_is_one_line_without_a_key(tmp_path, config, fault):
    path = tmp_path / "cage.json"
    path.write_text(json.dumps(config))

    with pytest.raises(ic.Misconfigured) as caught:
        ic.load_config(str(path), {})

    assert fault in str(caught.value) and "\n" not in str(caught.value)
    assert "sk-1234567890" not in str(caught.value)


def test_plain_http_to_another_machine_can_be_allowed(tmp_path):
    path = tmp_path / "cage.json"
    path.write_text(json.dumps({"providers": {"lab": {"base_url": "http://lab.example",
                                                      "key_env": "LAB_KEY"}}}))

    config = ic.load_config(str(path), {}, allow_plain_http=True)

    assert "http://lab.example/v1" == config.providers[0].base_url


@pytest.mark.parametrize("tokens, fault", [
    ([{"name": "a"}], "needs a name, and either token or sha256"),
    ([{"token": ALICE}], "needs a name"),
    ([{"name": "a", "token": ALICE, "sha256": "0" * 64}], "either token or sha256"),
    ([{"name": "a b", "token": ALICE}], "name: must be 1 to 64 letters"),
    ([{"name": "proxy", "token": ALICE}], "must not be named proxy"),
    ([{"name": "admin", "token": ALICE}], "must not be named admin"),
    ([{"name": "a", "token": "short"}], "token: must be 8 to 512"),
    ([{"name": "a", "sha256": "xyz"}], "sha256: must be 64"),
    ([{"name": "a", "token": ALICE, "budget_usd": "-1"}], "budget_usd: "),
    ([{"name": "a", "token": ALICE, "budget_usd": True}], "budget_usd: "),
    ([{"name": "a", "token": ALICE, "period": "year"}], "period: must be total or day"),
    ([{"name": "a", "token": ALICE, "models": "gpt"}], "models: must be a list"),
    ([{"name": "a", "token": ALICE, "requests_per_minute": 0}], "requests_per_minute: "),
    ([{"name": "a", "token": ALICE, "parallel_requests": 1.5}], "parallel_requests: "),
    ([{"name": "a", "token": ALICE, "expires": "soon"}], "expires: must be a date"),
    ([{"name": "a", "token": ALICE, "budget": 1}], "unknown field"),
    ([{"name": "a", "token": ALICE}, {"name": "a", "token": BOB}], "the same name"),
    ([{"name": "a", "token": ALICE}, {"name": "b", "token": ALICE}], "the same sha256"),
    (["a"], "must be an object"),
])
def test_a_fault_in_the_file_is_one_line_that_names_it(config, tokens, fault):
    write_config(config, *tokens)

    with pytest.raises(ic.Misconfigured) as caught:
        ic.load_config(str(config), {})

    assert fault in str(caught.value) and "\n" not in str(caught.value)
    assert ALICE not in str(caught.value) and BOB not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"tokens": {}}', '{"token": []}',
                                  '{"tokens": [], "tokens": []}', "\xff"])
def test_what_is_no_configuration_is_refused(config, text):
    config.write_text(text, encoding="latin-1")

    with pytest.raises(ic.Misconfigured):
        ic.load_config(str(config), {})


def any_value(rng, depth=0):
    """Any JSON, mostly not what a field wants."""
    plain = (None, True, False, 0, -1, 5, 10 ** 30, 1.5, -1e300, "", "x", "1.00", "9" * 50,
             "\ud800", "http://[", "https://a.example", "\n\x00", "gpt-*", "day", "2026-12-31",
             [[]], {"": {}})
    if depth > 2 or rng.random() < .7:
        return rng.choice(plain)
    if rng.random() < .5:
        return [any_value(rng, depth + 1) for _ in range(rng.randrange(3))]
    return {rng.choice(["a", "name", "", "budget_usd"]): any_value(rng, depth + 1)
            for _ in range(rng.randrange(3))}


def any_configuration(rng):
    """A configuration in which single values, rows or whole parts are something else."""

    def row(good, fields):
        changed = {rng.choice([*fields, "zz"]): any_value(rng) for _ in range(rng.randrange(1, 3))}
        return {**good, **changed} if rng.random() < .85 else any_value(rng)
    price = {"input_cost_per_token": 1e-6, "output_cost_per_token": 2e-6, "max_input_tokens": 9999}
    parts = {
        "tokens": [row({"name": f"a{n}", "token": f"abcdefgh{n}"}, ic.TOKEN_FIELDS)
                   for n in range(rng.randrange(3))],
        "providers": {rng.choice(["ollama", "mine", "v1", "", "openai", "Ä"]): row(
            {"base_url": "https://a.example"}, ic.PROVIDER_FIELDS)},
        "models": {rng.choice(["m*", "", "["]): rng.choice(["x/y", any_value(rng)])},
        "prices": {rng.choice(["m", "", "a/b"]): row(price, [
            *price, "litellm_provider", "mode", "cache_read_input_token_cost", "tiered_pricing",
            "search_context_cost_per_query", "input_cost_per_token_above_200k_tokens"])},
        "price_as": {rng.choice(["m*", "", "["]): rng.choice(["gpt-4o", any_value(rng)])}}
    return {name: any_value(rng) if rng.random() < .1 else part
            for name, part in parts.items() if rng.random() < .5}


@pytest.mark.parametrize("seed", seeds(8, 20))
def test_any_json_as_a_configuration_is_taken_or_one_line(config, seed):
    rng = Random(seed)
    settings = ic.settings_from(["--budget", "1"], {})
    book = ic.load_prices(settings)
    for _ in range(60):
        text = json.dumps(any_configuration(rng))
        if rng.random() < .3:
            text = re.sub(r"(?<=: )-?\d[\d.e+-]*", lambda number: rng.choice([
                number[0], "1e999", "1e-999999999999", "9" * 200_000, "-0", "NaN"]), text)
        config.write_text(text)
        try:
            taken = ic.load_config(str(config), {"OPENAI_API_KEY": "sk-x"})
            router = ic.Router(settings, book, ic.MemoryLedger())
            router.configure(taken, ic.prices_under(taken, book))
            for model in ("gpt-4o", "m", "x"):
                ic.model_text(router, model)
        except ic.Misconfigured as err:
            assert len(str(err)) < 600 and str(err).isprintable(), text[:300]
            assert "integer string conversion" not in str(err)
        except ic.IroncageError:                   # of the resolution
            pass


# Requests.

def test_a_place_comes_free_a_minute_after_its_request():
    now = [0.0]
    traffic = ic.Traffic(lambda: now[0])
    caller = ic.Caller("alice", "", requests_per_minute=2)

    def enter():
        with traffic.entered(caller):
            pass

    for at in (0, 30):
        now[0] = at
        enter()
    now[0] = 59.5
    with pytest.raises(ic.TooManyRequests) as caught:
        enter()
    assert (("retry-after", "1"),) == caught.value.headers
    now[0] = 60
    enter()
    with pytest.raises(ic.TooManyRequests):
        enter()


def test_a_token_without_limits_of_traffic_is_not_counted():
    traffic = ic.Traffic()
    with traffic.entered(ic.Caller("alice", "")):
        assert ({}, {}) == (dict(traffic._in_flight), traffic._times)


def test_a_place_is_free_again_after_its_request_though_that_failed():
    traffic, caller = ic.Traffic(), ic.Caller("alice", "", parallel_requests=1)
    with pytest.raises(RuntimeError), traffic.entered(caller):
        with pytest.raises(ic.TooManyRequests, match="1 requests at a time"), \
                traffic.entered(caller):
            pass
        raise RuntimeError
    with traffic.entered(caller):
        pass


@pytest.mark.parametrize("patterns, provider_name, model, may", [
    ((), "openai", "any", True), (("gpt-*",), "openai", "gpt-4o", True),
    (("gpt-*",), "openai", "o3", False), (("openai/*",), "openai", "gpt-4o", True),
    (("openai/*",), "openrouter", "openai/gpt-4o", False),
    (("openrouter/*",), "openrouter", "openai/gpt-4o", True),
    (("lab/*",), "openrouter", "lab/m", True)])
def test_a_pattern_with_a_providers_name_is_about_that_one(patterns, provider_name, model, may):
    assert may is ic.Caller("alice", "", models=patterns).may_use(provider_name, model)


@pytest.mark.parametrize("expires_s, has_expired", [(None, False), (1, True), (9 ** 12, False)])
def test_a_token_ends_at_its_time(expires_s, has_expired):
    assert has_expired is ic.Caller("alice", "", expires_s=expires_s).has_expired()


@pytest.mark.parametrize("headers, said", [
    ([], {}), ([("user-agent", "x")], {}), ([("session-id", "s")], {"session": "s"}),
    ([("x-ironcage-session", "a"), ("session-id", "b")], {"session": "a"}),
    ([("x-ironcage-session", ""), ("session-id", "b")], {"session": "b"}),
    ([("thread-id", "é\tx" * 99)], {"agent": ("??x" * 99)[:ic.MOST_ATTRIBUTION_CHARS]}),
    ([("x-ironcage-project", "p")], {"project": "p"})])
def test_what_a_request_says_of_its_sender_is_short_and_printable(headers, said):
    assert {**dict.fromkeys(ic.ATTRIBUTION_HEADERS), **said} == ic.attribution_of(
        ic.Headers(headers))


# Secrets and their files.

@pytest.mark.parametrize("content", [b"", b"two words", b"two\nlines", b"\xff" * 9, b'"quoted"',
                                     b"'quoted'"])
def test_a_file_that_holds_no_secret_is_refused_without_showing_it(tmp_path, content):
    path = tmp_path / "key"
    path.write_bytes(content)

    with pytest.raises(ic.Misconfigured) as failure:
        ic.secret_in(str(path), {})
    assert str(path) in str(failure.value) and "quoted" not in str(failure.value)


@pytest.mark.parametrize("content", [b"secret", b"\xef\xbb\xbfsecret\r\n", b"\n secret \n"])
def test_a_secret_is_the_one_line_of_its_file(tmp_path, content):
    path = tmp_path / "key"
    path.write_bytes(content)

    assert "secret" == ic.secret_in(str(path), {})


def test_a_file_that_is_broken_later_changes_nothing_and_is_logged(tmp_path, caplog):
    path = str(tmp_path / "gone")

    assert "before" == ic.secret_in(path, {path: "before"})
    assert [logging.ERROR] == [record.levelno for record in caplog.records]
    with pytest.raises(ic.Misconfigured, match="cannot be read"):
        ic.secret_in(path, {})


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes with names here")
def test_a_pipe_is_not_read_again(tmp_path):
    path = str(tmp_path / "pipe")
    os.mkfifo(path)

    with pytest.raises(ic.Misconfigured, match="is not a file"):
        ic.check_can_be_reread(path)
    assert "before" == ic.secret_in(path, {path: "before"})
    assert None is ic.check_can_be_reread(None) is ic.check_can_be_reread(str(tmp_path / "gone"))


def test_a_secret_comes_from_its_variable_or_its_file_and_not_from_both():
    assert "/f" == ic.named_file("KEY", {"KEY_FILE": "/f"})
    assert "" == ic.named_file("KEY", {"KEY": "k"}) == ic.named_file("", {"_FILE": "/f"})
    with pytest.raises(ic.Misconfigured, match="both KEY and KEY_FILE"):
        ic.named_file("KEY", {"KEY_FILE": "/f", "KEY": "k"})


@pytest.mark.parametrize("environ, fault", [
    ({"OPENAI_API_KEY": "sk-1\x012345"}, "holds a character that a key cannot have"),
    ({"OPENAI_API_KEY": "'sk-12345'"}, "holds quotes"),
    ({"OPENAI_API_KEY": "sk-12345", "OPENAI_API_KEY_FILE": "/k"}, "leave one out"),
])
def test_a_key_that_cannot_be_one_is_refused_and_not_shown(environ, fault):
    provider = ic.KNOWN_PROVIDERS["openai"]

    with pytest.raises(ic.Misconfigured, match=fault) as refused:
        ic.with_key(provider, environ)

    assert "sk-1" not in str(refused.value)


@pytest.mark.parametrize("key, fault", [
    ("two words", "a character that a key cannot have"), ("k\u00e9", "a character"),
    ('"k"', "holds quotes"), ("k'", "holds quotes")])
def test_a_key_that_no_header_can_hold_is_refused(key, fault):
    with pytest.raises(ic.Misconfigured, match=fault):
        ic.with_key(provider("lab", base_url="https://lab.example", key_env="LAB"), {"LAB": key})


@pytest.mark.parametrize("url", ["https://u@x", "https://x#f", "ftp://x", "https://", "x",
                                 "https://x:0", "https://x/a b", "https://[x", "https://x\\y"])
def test_what_takes_no_alerts_is_refused(url):
    with pytest.raises(ValueError):
        ic.parse_alert_url(url)
    assert "https://x/?secret=1" == ic.parse_alert_url("https://x/?secret=1")


@pytest.mark.parametrize("url, allowed, fault", [
    ("http://lab.example", False, True), ("http://lab.example", True, False),
    ("https://lab.example", False, False), ("http://127.0.0.1:1", False, False),
    ("http://[::1]", False, False), ("http://localhost.evil.example", False, True)])
def test_a_key_travels_in_the_clear_within_this_machine_or_where_that_is_said(url, allowed, fault):
    try:
        ic.check_encrypted("lab", url, allowed)
    except ic.Misconfigured as err:
        assert fault and "--allow-plain-http" in str(err)
    else:
        assert not fault


# Where requests go.

def routes(*names, **aliases):
    rows = {name: ic.KNOWN_PROVIDERS[name] for name in ("openai", "anthropic", *names)}
    return ic.Routes(rows, ic.Config(aliases=aliases))


@pytest.mark.parametrize("model, named, expected", [
    ("gpt-4o", None, ("openai", "gpt-4o")), ("claude-x", None, ("anthropic", "claude-x")),
    ("claude-x[1m]", None, ("anthropic", "claude-x")), ("groq/m", None, ("groq", "m")),
    ("m", "groq", ("groq", "m")), ("groq/m", "groq", ("groq", "m")),
    ("openai/m", "groq", ("groq", "openai/m")), ("lab/m", "groq", ("groq", "lab/m")),
    ("fast", None, ("groq", "m")), (ic.ECHO_MODEL, None, (ic.ECHO_PROVIDER.name, ic.ECHO_MODEL)),
    ("unknown", None, ("openai", "unknown"))])
def test_a_model_goes_to_its_provider(model, named, expected):
    found = routes("groq", fast="groq/m")
    provider, name = found.of_model(model, named and found.providers[named])

    assert expected == (provider.name, name)


@pytest.mark.parametrize("model, target", [
    ("fast", "exact"), ("faster", "a/pattern"), ("slow", "slow"), ("f", "f")])
def test_an_alias_is_an_exact_name_first_and_then_the_first_pattern(model, target):
    aliases = {"fa*": "a/pattern", "fast": "exact", "fas*": "another/pattern"}

    assert target == ic.Config(aliases=aliases).aliased(model)


@pytest.mark.parametrize("model, words", [
    ("grok/m", "did you mean groq"), ("mistral/m", "set MISTRAL_API_KEY"),
    ("azure/m", "under providers in --config"), ("\x00/m", "names a provider that there is not")])
def test_a_model_of_a_provider_that_there_is_not_is_refused(model, words):
    with pytest.raises(ic.UnknownProvider, match=words):
        routes("groq").of_model(model)


def test_a_secret_too_long_for_its_file_is_refused_not_cut(tmp_path):
    path = tmp_path / "key"
    path.write_bytes(b"k" * ic.MAX_SECRET_BYTES)
    assert "k" * ic.MAX_SECRET_BYTES == ic.secret_in(str(path), {})

    path.write_bytes(b"k" * (ic.MAX_SECRET_BYTES + 1))
    with pytest.raises(ic.Misconfigured, match="one line"):
        ic.secret_in(str(path), {})
