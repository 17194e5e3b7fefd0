"""Tokens of --config: their budgets, periods, models, rates and expiry; the file and its reload."""
import base64
import contextlib
import hashlib
import json
import os
import signal
import stat
import threading
import time
from random import Random

import pytest
from support import (ADMIN_TOKEN, TOKEN, Gate, RawClient, call, program, seeds, settled_status,
                     status_of, until)

ALICE, BOB = "ic_alice_canary_0123456789", "ic_bob_canary_0123456789"
CHAT = {"model": "gpt-4o-mini", "max_tokens": 100,
        "messages": [{"role": "user", "content": "hello"}]}
MESSAGE = {**CHAT, "model": "claude-haiku-4-5"}


def write_config(path, *tokens):
    """Replace the file in one step; its time differs from the last one's."""
    new = path.with_suffix(".tmp")
    new.write_text(json.dumps({"tokens": tokens}))
    os.replace(new, path)


@pytest.fixture
def config(tmp_path):
    return tmp_path / "cage.json"


@pytest.fixture
def caged(proxy_for, config):
    """Start a proxy with these tokens: caged({...}, {...}, "--budget", "1")."""
    def start(*tokens_and_flags):
        write_config(config, *(t for t in tokens_and_flags if isinstance(t, dict)))
        return proxy_for("--config", str(config), "--admin-token", ADMIN_TOKEN,
                         *(f for f in tokens_and_flags if isinstance(f, str)))
    return start


def chat(proxy, token=ALICE, fields=CHAT, path="/v1/chat/completions"):
    return call(proxy.port, "POST", path, fields, token=token)


def test_a_token_and_its_sha256_let_in_and_no_other_does(mock, caged):
    proxy = caged({"name": "alice", "token": ALICE},
                  {"name": "bob", "sha256": hashlib.sha256(BOB.encode()).hexdigest()})

    assert [200, 200, 200, 401] == [chat(proxy, token).status for token in (
        ALICE, BOB, TOKEN, "ic_eve_canary_0123456789")]
    assert {"alice", "bob", "default"} == set(status_of(proxy)["by_token"])


def test_a_token_spends_its_own_budget_and_the_proxys(mock, caged):
    proxy = caged({"name": "alice", "token": ALICE, "budget_usd": "0.000085"},
                  {"name": "bob", "token": BOB}, "--budget", "1.00")

    assert 200 == chat(proxy).status
    refused = chat(proxy)
    assert 200 == chat(proxy, BOB).status

    assert (402, "alice", 85) == (refused.status, refused.json["error"]["ironcage"]["scope"],
                                  refused.json["error"]["ironcage"]["limit_microdollars"])
    status = settled_status(proxy)
    spent = {name: counts["spent_microdollars"] for name, counts in status["by_token"].items()}
    assert status["spent_microdollars"] == sum(spent.values()) == mock.billed_microdollars
    assert set(spent) == {"alice", "bob"}


def test_a_token_with_a_budget_is_caged_also_where_the_proxy_has_none(mock, caged):
    proxy = caged({"name": "alice", "token": ALICE, "budget_usd": 1})

    statuses = [chat(proxy, token, {**CHAT, "model": "gpt-mystery"}).status
                for token in (ALICE, TOKEN)]
    unmetered = call(proxy.port, "POST", "/v1/images/generations", {}, token=ALICE)

    assert [400, 404] == statuses               # unpriced; and unknown at the provider
    assert "iron_cage_unmetered_route" == unmetered.json["error"]["type"]


def test_a_model_that_a_token_may_not_use_is_403(mock, caged):
    proxy = caged({"name": "alice", "token": ALICE, "models": ["gpt-4o-*", "anthropic/claude-h*"]})

    assert 200 == chat(proxy).status
    assert 200 == chat(proxy, fields={**CHAT, "model": "openai/gpt-4o-mini"}).status
    assert 200 == chat(proxy, fields=MESSAGE, path="/v1/messages").status
    refused = chat(proxy, fields={**CHAT, "model": "gpt-4o"})
    refused_message = chat(proxy, fields={**MESSAGE, "model": "claude-sonnet-4-5"},
                           path="/v1/messages")
    unmetered = call(proxy.port, "POST", "/v1/images/generations", {}, token=ALICE)

    assert (403, "model_not_allowed") == (refused.status, refused.json["error"]["code"])
    assert (403, "permission_error") == (refused_message.status,
                                         refused_message.json["error"]["type"])
    assert 400 == unmetered.status
    assert 3 == len(mock.seen)


def test_more_requests_per_minute_than_allowed_are_429_with_retry_after(mock, caged):
    proxy = caged({"name": "alice", "token": ALICE, "requests_per_minute": 3})

    answers = [chat(proxy) for _ in range(5)]

    assert [200, 200, 200, 429, 429] == [answer.status for answer in answers]
    assert 0 < int(answers[-1].header("retry-after")) <= 60
    assert "rate_limit_exceeded" == answers[-1].json["error"]["code"]
    assert 200 == chat(proxy, TOKEN).status
    status = call(proxy.port, "GET", "/ironcage/status", token=ALICE)
    assert (200, 2) == (status.status, status.json["by_token"]["alice"]["refused_requests"])


def test_more_requests_in_parallel_than_allowed_are_429(mock, caged):
    proxy = caged({"name": "alice", "token": ALICE, "parallel_requests": 1})
    gate = Gate()
    mock.script(lambda request: mock.default_reply(request).with_steps(
        [gate, *mock.default_reply(request).steps]))

    with RawClient(proxy.port) as client:
        client.request("POST", "/v1/chat/completions", json.dumps(CHAT).encode(), token=ALICE)
        mock.wait_for_requests(1)
        second = chat(proxy)
        gate.event.set()
        client.read_answer()
    until(lambda: chat(proxy).status == 200, "a free place after the first was done")

    assert 429 == second.status


def test_an_expired_token_is_401_and_says_so(mock, caged):
    proxy = caged({"name": "alice", "token": ALICE, "expires": "2020-01-01"},
                  {"name": "bob", "token": BOB, "expires": "2120-01-01T00:00:00Z"})

    refused = chat(proxy)

    assert (401, "the token alice has expired") == (refused.status,
                                                    refused.json["error"]["message"])
    assert 200 == chat(proxy, BOB).status


def test_a_token_sees_its_own_part_only(mock, caged):
    proxy = caged({"name": "alice", "token": ALICE, "budget_usd": "0.5"},
                  {"name": "bob", "token": BOB}, "--budget", "1.00")
    chat(proxy), chat(proxy, BOB), chat(proxy, BOB)

    def seen(path, token):
        return call(proxy.port, "GET", path, token=token).json

    settled_status(proxy)
    own, all_of_it = seen("/ironcage/status", ALICE), seen("/ironcage/status", ADMIN_TOKEN)
    assert (500_000, 1, {"alice"}) == (own["limit_microdollars"], own["requests"],
                                       set(own["by_token"]))
    assert (1_000_000, 3, {"alice", "bob"}) == (
        all_of_it["limit_microdollars"], all_of_it["requests"], set(all_of_it["by_token"]))
    assert 500_000 == seen("/ironcage/budget", ALICE)["limit_microdollars"]
    assert ["alice"] == [row["token"] for row in seen("/ironcage/usage", ALICE)["rows"]]
    assert ["bob", "bob", "alice"] == [r["token"] for r in seen("/ironcage/usage", TOKEN)["rows"]]
    assert ["bob"] == [r["token"] for r in seen("/ironcage/usage?limit=1", TOKEN)["rows"]]
    assert 400 == call(proxy.port, "GET", "/ironcage/usage?limit=x", token=TOKEN).status


def test_a_token_of_the_file_cannot_raise_limits(mock, caged):
    proxy = caged({"name": "alice", "token": ALICE}, "--budget", "1.00")

    answer = call(proxy.port, "PUT", "/ironcage/budget", {"limit_usd": "9"}, token=ALICE)

    assert (403, 1_000_000) == (answer.status, status_of(proxy)["limit_microdollars"])


def test_a_day_budget_begins_anew_at_midnight_and_comes_back_after_a_restart(
        mock, caged, proxy_for, config, tmp_path):
    flags = ("--ledger", str(tmp_path / "cage.db"))
    alice = {"name": "alice", "token": ALICE, "budget_usd": "0.000085", "period": "day"}
    proxy = caged(alice, *flags)
    assert [200, 402] == [chat(proxy).status, chat(proxy).status]
    proxy.stop()

    proxy = caged(alice, *flags)
    assert 402 == chat(proxy).status
    proxy.router.controller.accounts._clock = lambda: time.time() + 86_400
    assert 200 == chat(proxy).status


# The file.


def test_the_token_of_the_command_line_cannot_stand_in_the_file(config):
    module = program()
    write_config(config, {"name": "alice", "token": TOKEN})
    settings = module.settings_from(["--port", "0", "--token", TOKEN, "--config", str(config)], {})

    with pytest.raises(module.Misconfigured, match="the same as --token"):
        module.ProxyServer(settings)


def test_a_changed_file_is_read_within_a_second_or_so(mock, caged, config):
    proxy = caged({"name": "alice", "token": ALICE})
    assert [200, 401] == [chat(proxy).status, chat(proxy, BOB).status]

    write_config(config, {"name": "bob", "token": BOB, "budget_usd": "0"})

    until(lambda: chat(proxy).status == 401, "alice's token is revoked")
    assert 402 == chat(proxy, BOB).status


def test_a_broken_file_keeps_the_old_one_and_says_why(mock, caged, config, caplog):
    proxy = caged({"name": "alice", "token": ALICE})

    config.write_text("{")
    proxy.reload_asked = True
    until(lambda: "stays as it was" in caplog.text, "the log says why")

    assert 200 == chat(proxy).status


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="SIGHUP is POSIX")
def test_a_new_limit_wakes_one_who_waits(mock, caged, config):
    alice = {"name": "alice", "token": ALICE, "budget_usd": "0.0001"}
    proxy = caged(alice, "--no-fit")
    gate = Gate()
    mock.script(lambda request: mock.default_reply(request).with_steps(
        [gate, *mock.default_reply(request).steps]))
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(chat(proxy))) for _ in range(2)]
    threads[0].start()
    mock.wait_for_requests(1)
    threads[1].start()
    until(lambda: proxy.router.controller._queue, "the second waits")

    write_config(config, {**alice, "budget_usd": "5"})
    proxy.reload_asked = True

    mock.wait_for_requests(2)
    gate.event.set()
    for thread in threads:
        thread.join()
    assert [200, 200] == [answer.status for answer in answers]


def test_who_waits_in_line_when_its_token_is_withdrawn_is_not_served(mock, caged, config):
    gate, alice = Gate(), {"name": "alice", "token": ALICE}
    proxy = caged(alice, {"name": "bob", "token": BOB}, "--budget", "0.006")
    mock.script(lambda request: mock.default_reply(request).with_steps(
        [gate, *mock.default_reply(request).steps]))
    answers, long = {}, {**CHAT, "max_tokens": 9_000}
    threads = [threading.Thread(target=lambda t=token: answers.update({t: chat(proxy, t, long)}))
               for token in (ALICE, BOB)]
    threads[0].start()
    mock.wait_for_requests(1)
    threads[1].start()
    until(lambda: proxy.router.controller._queue, "bob waits in line")

    write_config(config, alice)
    proxy.reload_asked = True
    until(lambda: len(proxy.router.config.callers) == 1, "the file is read")
    gate.event.set()
    for thread in threads:
        thread.join()

    assert (200, 401, 1) == (answers[ALICE].status, answers[BOB].status, len(mock.seen))
    assert "withdrawn" in answers[BOB].json["error"]["message"]
    assert mock.billed_microdollars == settled_status(proxy)["spent_microdollars"]


def run(*argv, capsys):
    log = program().log
    handlers = log.handlers[:]
    code = program().main([*argv])
    log.handlers[:] = handlers              # not those of a stderr that is captured here only
    out, err = capsys.readouterr()
    return code, out, err


def test_of_two_edits_at_once_one_is_refused_and_none_is_lost(config, capsys, monkeypatch):
    module, flags = program(), ("--config", str(config))
    read, codes = module.read_config, []
    assert 0 == run("tokens", "add", "first", *flags, capsys=capsys)[0]

    def beside(path):
        found = read(path)
        monkeypatch.setattr(module, "read_config", read)
        codes.append(module.main(["tokens", "add", "second", *flags]))
        return found
    monkeypatch.setattr(module, "read_config", beside)
    codes.append(module.main(["tokens", "add", "third", *flags]))

    added = {name for name, code in zip(("second", "third"), codes) if code == 0}
    assert {"first", *added} == {row["name"] for row in json.loads(config.read_text())["tokens"]}
    assert [2, 0] == codes and [config.name] == [path.name for path in config.parent.glob("cage*")]


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX")
@pytest.mark.parametrize("mode", [0o640, 0o600, 0o644])
def test_a_configuration_that_is_edited_can_be_read_by_whoever_could(config, capsys, mode):
    config.write_text("{}")
    config.chmod(mode)
    with contextlib.suppress(PermissionError):
        os.chown(config, 1234, 1235)
    before = config.stat()

    assert 0 == run("tokens", "add", "ci", "--config", str(config), capsys=capsys)[0]

    after = config.stat()
    assert (mode, before.st_uid, before.st_gid) == (
        stat.S_IMODE(after.st_mode), after.st_uid, after.st_gid)


def test_tokens_are_added_listed_and_revoked_on_the_command_line(config, capsys):
    flags = ("--config", str(config))
    code, out, _ = run("tokens", "add", "ci", "budget_usd=5.00", "period=day",
                       "models=gpt-*,claude-h*", "requests_per_minute=60", "parallel_requests=4",
                       "expires=2027-01-31", *flags, capsys=capsys)
    token = out.split()[0]
    assert 0 == code and token.startswith("ic_")
    assert {"aud": "claude-gateway"} == json.loads(base64.urlsafe_b64decode(token.split(".")[1]))
    assert token not in config.read_text()
    [caller] = program().load_config(str(config), {}).callers
    assert program().Caller(
        "ci", hashlib.sha256(token.encode()).hexdigest(), 5_000_000, "day",
        ("gpt-*", "claude-h*"), 60, 4, 1_801_353_600) == caller
    if os.name == "posix":
        assert 0o600 == stat.S_IMODE(config.stat().st_mode)

    assert (2, "") == run("tokens", "add", "ci", *flags, capsys=capsys)[:2]
    _, listed, _ = run(*flags, "tokens", "list", capsys=capsys)
    assert "ci" in listed and "$5.00" in listed and token not in listed
    assert 0 == run("tokens", "revoke", "ci", *flags, capsys=capsys)[0]
    assert () == program().load_config(str(config), {}).callers


@pytest.mark.parametrize("words, fault", [
    (["tokens", "add"], "tokens takes"), (["tokens", "fly"], "tokens takes"),
    (["tokens", "add", "ci", "color=red"], "unknown field"),
    (["tokens", "add", "ci", "--budget", "5"], "own limit is a word: budget_usd=5"),
    (["tokens", "add", "ci", "--stop-at", "1", "--budget", "2"], "a word: budget_usd=2"),
    (["tokens", "add", "ci", "period=never"], "period: must be"),
    (["tokens", "revoke", "nobody"], "no token named nobody"),
    (["serve", "fast"], "takes no further words"), (["fly"], "there is no command"),
])
def test_a_wrong_command_is_one_line_and_exit_code_2(config, capsys, words, fault):
    write_config(config, {"name": "alice", "token": ALICE})

    code, out, err = run(*words, "--config", str(config), capsys=capsys)

    assert (2, "", 1) == (code, out, err.count("\n"))
    assert fault in err


def test_two_edits_at_once_do_not_lose_one(config, capsys):
    (config.parent / "cage.json.new").write_text("")

    code, _, err = run("tokens", "add", "ci", "--config", str(config), capsys=capsys)

    assert 2 == code and "another edit is under way" in err


def test_usage_and_audit_read_the_ledger(mock, proxy_for, tmp_path, capsys):
    path = str(tmp_path / "cage.db")
    proxy = proxy_for("--budget", "1.00", "--ledger", path)
    chat(proxy, TOKEN), chat(proxy, TOKEN, MESSAGE, "/v1/messages")
    settled_status(proxy)

    code, out, _ = run("usage", "--ledger", path, capsys=capsys)
    _, as_json, _ = run("usage", "--ledger", path, "--json", "--since", "2026-01-01",
                        capsys=capsys)
    audit, told, _ = run("audit", "--ledger", path, capsys=capsys)

    assert 0 == code
    assert {"gpt-4o-mini", "claude-haiku-4-5", "default", "total"} <= set(out.split())
    report = json.loads(as_json)
    assert mock.billed_microdollars == report["total"]["cost_microdollars"]
    assert (0, "2 rows") == (audit, told[:6])
    proxy.stop()
    import sqlite3
    db = sqlite3.connect(path)
    db.execute("UPDATE calls SET cost_microdollars = 1 WHERE id = 2")
    db.commit()
    db.close()
    assert 1 == run("audit", "--ledger", path, capsys=capsys)[0]


@pytest.mark.parametrize("argv, fault", [
    (["usage"], "--ledger"), (["audit", "--ledger", "/nonexistent/x.db"], "there is no ledger"),
    (["usage", "--ledger", __file__], "cannot be read"),
    (["usage", "--ledger", __file__, "--since", "soon"], "--since: must be a date"),
    (["serve", "--port", "0", "--ledger", "/nonexistent/x.db"], "cannot be used"),
    (["serve", "--port", "0", "--config", "/nonexistent/x.json"], "cannot be read"),
])
def test_a_ledger_or_configuration_that_cannot_be_used_is_one_line(capsys, argv, fault):
    code, _, err = run(*argv, capsys=capsys)

    assert (2, 1) == (code, err.count("\n"))
    assert fault in err


@pytest.mark.parametrize("model", ["gpt-\ud800", "x" * 512, "a\nb", "\u202e"])
def test_a_strange_model_name_cannot_break_the_ledger(mock, proxy_for, tmp_path, model):
    proxy = proxy_for("--ledger", str(tmp_path / "cage.db"))

    chat(proxy, TOKEN, {**CHAT, "model": model})

    assert 200 == chat(proxy, TOKEN).status
    [strange, plain] = program().ledger_rows(str(tmp_path / "cage.db"),
                                             "SELECT model FROM calls ORDER BY id")
    assert strange["model"].isascii() and len(strange["model"]) < 3_000
    assert "gpt-4o-mini" == plain["model"]


def test_every_row_of_the_ledger_adds_up_and_holds_no_text_of_prompts(mock, proxy_for, tmp_path):
    path = str(tmp_path / "cage.db")
    proxy = proxy_for("--budget", "1.00", "--ledger", path)
    secret = {**CHAT, "messages": [{"role": "user", "content": "PROMPT_CANARY"}]}
    chat(proxy, TOKEN, secret), chat(proxy, TOKEN, {**secret, "stream": True})
    settled_status(proxy)

    rows = program().ledger_rows(path, "SELECT * FROM calls")
    assert [None, None] == [program().audit_row(row) for row in rows]
    assert [(0, 200), (1, 200)] == [(row["stream"], row["status"]) for row in rows]
    assert all(row["first_byte_ms"] <= row["latency_ms"] for row in rows)
    proxy.stop()
    stored = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    assert b"PROMPT_CANARY" not in stored and TOKEN.encode() not in stored


WORDS = ("=", "==", ",", "-", "--x", "a", "ci", "name", "sha256", "token", "budget_usd", "stop_at_usd",
         "period", "models", "requests_per_minute", "parallel_requests", "expires", "5", "5.00",
         "\u00b2", "\u0663", "1e9999999999", "9" * 5000, "NaN", " ", "\n", "\x00", "\udcff", "é", "*",
         "gpt-*", "[", "2026-12-31", "day", "add", "list", "revoke", "--budget", "--json", "--port",
         "'", '"', "%s", "{}", "@x", "fast", "true")


@pytest.mark.parametrize("seed", seeds(4, 12))
def test_tokens_with_any_words_is_done_or_one_line_and_exit_code_2(config, capsys, seed):
    rng = Random(seed)
    for _ in range(40):
        config.unlink(missing_ok=True)
        words = ["".join(rng.choices(WORDS, k=rng.randrange(4))) for _ in range(rng.randrange(5))]
        if rng.random() < .5:
            words = ["ci", *(f"{rng.choice(WORDS)}={rng.choice(WORDS)}" for _ in range(2))]

        code, out, err = run("tokens", rng.choice(["add", "add", "list", "revoke", "x"]), *words,
                             "--config", str(config), capsys=capsys)

        assert (code, err.count("\n"), bool(out)) in ((0, 0, True), (2, 1, False)), (words, err)
        assert "Traceback" not in err and len(err) < 700
        if code == 0 and config.exists():
            program().load_config(str(config), {})


@pytest.mark.parametrize("words, fault", [
    (["requests_per_minute=fast"], "requests_per_minute: must be a whole number"),
    (["parallel_requests=\u00b2"], "parallel_requests: must be a whole number"),
    (["requests_per_minute=99999999999999999999"], "requests_per_minute: must be a whole number"),
    (["budget_usd=1", "budget_usd=2"], "each field once"), (["budget_usd"], "words like"),
    (["name=bob"], "its name comes first"), (["sha256=" + "0" * 64], "made here"),
    (["token=12345678"], "needs a name, and either"), (["models="], "models"),
    (["expires=99999-01-01"], "expires: must be a date"), (["=5"], "unknown field"),
])
def test_a_token_that_is_described_wrongly_is_one_line(config, capsys, words, fault):
    code, out, err = run("tokens", "add", "ci", *words, "--config", str(config), capsys=capsys)

    assert (2, "", 1) == (code, out, err.count("\n"))
    assert fault in err
    assert not config.exists() or "ci" not in config.read_text()
