"""What an embedder may not ask for: one clear error, before anything listens."""
import pytest

import ironcage_proxy as ic


@pytest.mark.parametrize("port", [99999, -1, 2 ** 70])
def test_an_embedders_port_that_is_none_is_one_clear_error(port):
    with pytest.raises(ic.Misconfigured, match="cannot listen on 127.0.0.1 port"):
        ic.LlmRouter(port=port, environ={})


def test_an_embedders_setting_that_there_is_not_is_named():
    with pytest.raises(ic.Misconfigured, match="did you mean wait_s"):
        ic.LlmRouter(waits=3, environ={})


def test_an_embedded_routers_server_must_be_one_that_can_be_asked():
    for arguments in ({"server_url": "nonsense", "api_key": "ic_server-canary-0123456789"},
                      {"server_url": "https://cage.example"}):
        with pytest.raises(ic.Misconfigured, match="server_url"):
            ic.LlmRouter(environ={}, **arguments)


@pytest.mark.parametrize("field, value, words", [
    ("max_body_bytes", "5", "an integer"), ("max_memory_bytes", 1.5, "an integer"),
    ("budget_microdollars", True, "an integer"), ("wait_s", "5", "a number"),
    ("cache_ttl_seconds", "300", "a number"), ("environ", 5, "a mapping"), ("port", True, "text"),
    ("wait_s", 10 ** 12, "a number"),
    ("providers", 5, "a tuple of Provider"), ("providers", ["openai"], "a tuple of Provider"),
    ("timeouts", 5, "Timeouts"), ("timeouts", ic.Timeouts(call_s="1"), "Timeouts"),
    ("listener", 3, "a socket"), ("on_event", "print", "a function"), ("ledger", {}, "text"),
    ("alert_url", b"https://x", "text"), ("config_path", True, "text"), ("quiet", 1, "true or false"),
    ("allow_fields", [None], "text"), ("shared", 5.5j, "text")])
def test_an_embedders_argument_of_another_type_or_unit_is_one_sentence(field, value, words):
    server = {"server_url": "https://cage.example", "api_key": "ic_server-canary-0123456789"}
    with pytest.raises(ic.Misconfigured) as refused:
        ic.LlmRouter(**{"environ": {}, **(server if "ttl" in field else {}), field: value})

    assert f"{field} must be {words}" in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("field", ["secret_files", "token_is_generated", "environment"])
def test_what_no_setting_is_an_embedder_cannot_give(field):
    with pytest.raises(ic.Misconfigured, match=f"LlmRouter has no {field}"):
        ic.LlmRouter(environ={}, **{field: {}})


@pytest.mark.parametrize("providers", [(), [ic.KNOWN_PROVIDERS["groq"]]], ids=["none", "another"])
def test_an_embedders_providers_stand_beside_those_that_there_are_always(providers):
    with ic.LlmRouter(environ={}, providers=providers) as router:
        known = router._server.router.providers

    assert {"openai", "anthropic", "ironcage", *(row.name for row in providers)} == {*known}


KEY = "ic_mine-0123456789"


@pytest.mark.parametrize("name, value, field, other, kept", [
    ("api_key", KEY, "token", "ic_other-0123456789", KEY),
    ("ledger", "a.db", "ledger_path", "b.db", "a.db"),
    ("budget", "5", "budget_microdollars", 7_000_000, 5_000_000),
    ("stop_at", "1", "stop_at_microdollars", 2_000_000, 1_000_000)])
def test_an_argument_by_two_names_is_refused_and_none_is_not_given(
        name, value, field, other, kept, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    more = {"environ": {"IRONCAGE_BUDGET": "9"}, name: value}
    with pytest.raises(ic.Misconfigured, match=f"{name} and {field} are two names"):
        ic.LlmRouter(**more, **{field: other})
    with ic.LlmRouter(**more, **{field: None}) as router:
        assert kept == getattr(router._server.settings, field)


def test_the_keys_time_of_an_embedder_is_not_lost_beside_a_server():
    with ic.LlmRouter(KEY, "https://cage.example", environ={}, cache_ttl_s=5) as router:
        assert 5 == router._server.settings.cache_ttl_s
