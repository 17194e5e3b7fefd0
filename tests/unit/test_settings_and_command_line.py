"""Settings and command line, in this process: flags, variables and words, or one sentence that says
what is wrong with them."""
import re
import shlex

import pytest
from support import ADMIN_TOKEN, TOKEN, said

import ironcage_proxy as ic


# Variables.

@pytest.mark.parametrize("environ, fault", [
    ({"OPENAI_API_KEY_FILE": "/nonexistent"}, "/nonexistent cannot be read"),
    ({"OPENAI_API_KEY_FILE": "/nonexistent/of/a/long/name"}, "/of/a/long/name cannot be read"),
    ({"OPENAI_API_KEY_FILE": "nonexistent_as_well.txt"}, "_as_well.txt cannot be read"),
    ({"OPENAI_API_KEY_FILE": "sk-s3cret-0123456789"}, "name the file of the secret"),
    ({"IRONCAGE_TOKEN_FILE": "ic_s3cret/0123456789="}, "name the file of the secret"),
    ({"OPENAI_API_KEY_FILE": "/dev/null", "OPENAI_API_KEY": "sk-x"}, "both OPENAI_API_KEY and"),
    ({"OPENAI_API_KEY_FILE": "/dev/null"}, "must hold one line"),
    ({"IRONCAGE_TOKEN_FILE": "/dev/null"}, "must hold one line"),
    ({"OPENAI_API_KEY": "'sk-s3cret'"}, "holds quotes"),
    ({"IRONCAGE_BUDGET": '"5"'}, "IRONCAGE_BUDGET: holds quotes"),
    ({"IRONCAGE_STRICT": "maybe"}, "IRONCAGE_STRICT: must be 1 or 0")])
def test_a_bad_variable_is_one_line_at_the_start(environ, fault):
    with pytest.raises(ic.Misconfigured, match=fault) as refused:
        ic.settings_from([], environ)

    assert "s3cret" not in str(refused.value)


def test_a_group_that_is_none_is_shown_only_where_it_is_short():
    for name, shown in (("modle", "modle is none"), ("sk-s3cret-0123456789", r"\? is none")):
        with pytest.raises(ic.Misconfigured, match=shown):
            ic.settings_from(["usage", "--ledger", "x.db", "--by", name], {})


def test_every_setting_has_a_variable_and_a_flag_goes_first():
    settings = ic.settings_from(["--port", "1"], {
        "IRONCAGE_PORT": "2", "IRONCAGE_HOST": "0.0.0.0", "IRONCAGE_LEDGER": "c.db",
        "IRONCAGE_CONFIG": "c.json", "IRONCAGE_ALLOW_HOST": "a.example, b.example",
        "IRONCAGE_STRICT": "true", "IRONCAGE_NO_FIT": "0", "IRONCAGE_MAX_BODY_MB": "1"})

    assert (1, "0.0.0.0", "c.db", "c.json", ("a.example", "b.example"), True, False, 1024 * 1024) \
        == (settings.port, settings.host, settings.ledger_path, settings.config_path,
            settings.allow_hosts, settings.strict, settings.no_fit, settings.max_body_bytes)


@pytest.mark.parametrize("name, meant", [
    ("BUGET", "BUDGET"), ("BUDGET_USD", "BUDGET"), ("STOPAT", "STOP_AT"), ("LEGDER", "LEDGER"),
    ("BUDGET_FILE", "BUDGET"), ("TOKN_FILE", "TOKEN_FILE"), ("OPENAI_URL", "OPENAI_BASE_URL")])
@pytest.mark.parametrize("argv", [[], ["usage"]])
def test_a_misspelled_variable_is_refused_as_a_flag_is(argv, name, meant):
    with pytest.raises(ic.Misconfigured) as refused:
        ic.settings_from(argv, {f"IRONCAGE_{name}": "5"})

    assert f"IRONCAGE_{name} sets nothing (did you mean IRONCAGE_{meant}?)" in str(refused.value)


@pytest.mark.parametrize("name", ["IRON_CAGE_BUDGET", "ironcage_budget", "Ironcage_Budget",
                                  "IRONCAGEBUDGET", "IRON_CAGE_BUGET"])
def test_a_limits_variable_that_begins_otherwise_is_refused_too(name):
    with pytest.raises(ic.Misconfigured, match=f"{name} sets nothing .*IRONCAGE_BUDGET"):
        ic.settings_from([], {name: "5"})


@pytest.mark.parametrize("name, empty", [
    ("BUDGET", ""), ("STOP_AT", ""), ("SHARED", ""), ("SHARED_FILE", ""), ("LEDGER", ""),
    ("BUDGET", " "), ("LEDGER", " "), ("CAGE", ""), ("CONFIG", ""), ("SERVER_URL", "")])
def test_an_empty_variable_that_would_limit_spend_is_refused(name, empty):
    with pytest.raises(ic.Misconfigured, match=f"IRONCAGE_{name} has an empty value"):
        ic.settings_from([], {"IRONCAGE_BUDGET": "2", f"IRONCAGE_{name}": empty})


@pytest.mark.parametrize("value", ["", " "])
def test_any_other_empty_variable_sets_nothing_and_is_shown(value):
    rows = [row for row in ic.SETTINGS if row.field not in ic.LIMITS_SPEND]
    empty = {row.env: value for row in rows}

    assert ic.settings_from(["--token", TOKEN], {}) == ic.settings_from(
        ["--token", TOKEN], empty)._replace(environ={})
    assert [f"{row.env} is empty, and sets nothing" for row in rows] == ic.unread_variables(empty)


def test_an_empty_twin_of_a_variable_that_is_set_is_nothing():
    settings = ic.settings_from([], {"IRONCAGE_SHARED": "redis://h", "IRONCAGE_SHARED_FILE": ""})

    assert "h" == settings.shared.host


def test_what_kubernetes_sets_for_a_service_named_ironcage_is_no_setting():
    linked = {"IRONCAGE_PORT": "tcp://10.0.0.7:8787", "IRONCAGE_SERVICE_HOST": "10.0.0.7",
              "IRONCAGE_SERVICE_PORT": "8787", "IRONCAGE_SERVICE_PORT_HTTP": "8787",
              "IRONCAGE_PORT_8787_TCP": "tcp://10.0.0.7:8787",
              "IRONCAGE_PORT_8787_TCP_PORT": "8787",
              "IRONCAGE_PORT_8787_TCP_PROTO": "tcp", "IRONCAGE_PORT_8787_TCP_ADDR": "10.0.0.7",
              "IRONCAGE_PROXY_PORT": "tcp://10.0.0.8:80", "IRONCAGE_PROXY_SERVICE_HOST": "10.0.0.8"}

    assert 8787 == ic.settings_from([], linked).port
    assert [] == ic.unread_variables(linked)


@pytest.mark.parametrize("argv, environ, is_public", [
    (["--shared", "redis://:pw@h"], {}, True), (["--shared", "redis://h"], {}, False),
    ([], {"IRONCAGE_SHARED": "redis://:pw@h"}, False)])
def test_a_password_is_public_where_it_stands_on_the_command_line(argv, environ, is_public):
    assert is_public is ic.settings_from(argv, environ).shared.is_public


def test_a_server_and_a_shared_budget_exclude_each_other():
    with pytest.raises(ic.Misconfigured, match="two places for one budget"):
        ic.settings_from(["--shared", "redis://h", "--server-url", "https://h", "--server-token",
                          TOKEN], {})


@pytest.mark.parametrize("path", [":memory:", "file:cage.db", "file::memory:?cache=shared"])
def test_a_name_that_sqlite_takes_for_no_path_is_refused_as_a_ledger(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    with pytest.raises(ic.Misconfigured, match="must be the path of a file; leave it out to keep"):
        ic.LlmRouter(ledger=path, environ={"OPENAI_API_KEY": "sk-x"})
    assert [] == [*tmp_path.iterdir()]


# Commands.

@pytest.mark.parametrize("name", ["serve", "check", "usage", "audit", "tokens", "selftest",
                                  "models", "version", "cage"])
def test_the_help_of_a_command_has_its_own_flags_and_an_example(capsys, name):
    code, out, err = said(capsys, name, "--help")

    flags = set(re.findall(r"^  (--[a-z-]+)", out, re.MULTILINE))
    used = {row.flag for row in (*ic.SETTINGS, *ic.OPTIONS) if name in row.commands.split()}
    assert (0, "") == (code, err)
    assert used | {"--help"} == flags
    assert f"usage: ironcage_proxy.py {name}" in out
    assert "example:\n  ironcage_proxy.py " in out
    assert said(capsys, "help", name)[1] == out


def test_an_example_of_the_help_is_a_use_that_parses():
    for command in ic.COMMANDS.values():
        words = shlex.split(command.example)
        assert ic.parse_arguments(words)["command"] in ic.COMMANDS, words


@pytest.mark.parametrize("argv, fault", [
    (["usage", "--budget", "5"], "usage takes no flag --budget; it is for serve, check"),
    (["selftest", "--ledger", "x"], "selftest takes no flag --ledger"),
    (["serve", "--since", "7d"], "serve takes no flag --since; it is for usage"),
    (["tokens", "add", "alice", "--budget", "5"], "budget_usd=5"),
    (["tokens", "add", "alice", "--models", "gpt-*"], "models=..."),
    (["tokens", "add", "alice", "--token", "ic_s3cret_token"], "takes no flag --token"),
    (["--buget", "5"], "did you mean --budget?"), (["usag"], "did you mean usage?"),
    (["usage", "--ledgr=x"], "did you mean --ledger?"),
    (["--sk-s3cret-0123", "5"], "takes no flag ?"),
    (["claude", "-p", "fix it"], "ironcage_proxy.py [FLAG ...] -- claude ..."),
    (["--budget", "2", "codex", "exec", "--full-auto"], "-- codex ..."),
    (["version", "now"], "takes no further words"), (["--port"], "--port needs a value"),
    (["--port", "--budget", "5"], "--port needs a value"),
    (["--strict=yes"], "--strict takes no value"), (["usage", "--budget="], "takes no flag --budget"),
    (["usage", "--since="], "--since has an empty value"),
    (["--token=", "ic_s3cret-0123456789"], "there is no command ?"),
    (["usage", "ic_s3cret-0123456789"], "takes no further words (?)")])
def test_a_flag_or_word_that_is_out_of_place_is_one_sentence(capsys, argv, fault):
    code, out, err = said(capsys, *argv)

    assert (2, "", 1) == (code, out, err.count("\n"))
    assert fault in err and "s3cret" not in err


SHARED = ["--shared", "redis://127.0.0.1:1"]


@pytest.mark.parametrize("argv, fault", [
    (["--server-url", "https://x", *SHARED], "two places for one budget"),
    (["--server-url", "https://x"], "--server-url needs --server-token"),
    (["--admin-token", ADMIN_TOKEN, "--", "x"], "set IRONCAGE_ADMIN_TOKEN in the environment"),
    (["usage"], "say which ledger"), (["audit", "--ledger", "none.db"], "no ledger none.db"),
    (["usage", "--since", "today", "--until", "yesterday"], "--until must be later than --since"),
    (["usage", *SHARED, "--by", "day"], "of a shared budget there is no --by"),
    (["usage", *SHARED, "--until", "today"], "of a shared budget there is no --by"),
    (["usage", "--shared", "redis://127.0.0.1:1"], "redis://127.0.0.1:1/0 cannot be used"),
    (["cage", "new", "team"], "say where the shared budget is"), (["cage", *SHARED], "cage takes"),
    (["cage", "new", "a", "b", *SHARED], "cage takes"), (["cage", "old", "a"], "cage takes"),
    (["cage", "new", "a b", *SHARED], "the cage's name: must be"),
    (["tokens", "list"], "say which configuration"), (["--"], "there must be a command"),
    (["tokens", "list", "now", "--config", "none.json"], "tokens takes"),
    (["tokens", "revoke", "a", "b", "--config", "none.json"], "tokens takes"),
    (["models", "gpt-4o"], "models takes no further words")])
def test_what_a_command_cannot_do_is_one_sentence(capsys, monkeypatch, tmp_path, argv, fault):
    monkeypatch.chdir(tmp_path)
    code, out, err = said(capsys, *argv)

    assert (2, "", 1) == (code, out, err.count("\n"))
    assert fault in err and ADMIN_TOKEN not in err


def test_the_version_is_a_flag_and_a_command(capsys):
    assert said(capsys, "--version") == said(capsys, "version") == (
        0, f"ironcage_proxy {ic.__version__}\n", "")
