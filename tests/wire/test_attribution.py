"""Who spent it: names of tokens, sessions and projects in rows, logs and refusals; budgets of
sessions; and the commands that show it."""
import csv
import json
import re
import sqlite3
import sys
import time

import pytest
from support import (ADMIN_TOKEN, ROOT, TOKEN, Gate, RawClient, Served, call, program, run_program,
                     settled_status, status_of, until)

ALICE, BOB = "ic_alice_canary_0123456789", "ic_bob_canary_0123456789"
CHAT = {"model": "gpt-4o-mini", "max_tokens": 100,
        "messages": [{"role": "user", "content": "hello"}]}
MESSAGE = {**CHAT, "model": "claude-haiku-4-5"}


@pytest.fixture
def ledger(tmp_path):
    return str(tmp_path / "cage.db")


@pytest.fixture
def config(tmp_path):
    return tmp_path / "cage.json"


@pytest.fixture
def caged(proxy_for, config, ledger):
    """Start a proxy with alice, who has these limits, and bob; and with flags."""
    def start(*flags, with_ledger=True, **limits):
        config.write_text(json.dumps({"tokens": [{"name": "alice", "token": ALICE, **limits},
                                                 {"name": "bob", "token": BOB}]}))
        on_disk = ("--ledger", ledger) if with_ledger else ()
        return proxy_for("--config", str(config), "--admin-token", ADMIN_TOKEN, *on_disk, *flags)
    return start


def chat(proxy, headers=(), token=ALICE, fields=CHAT, path="/v1/chat/completions"):
    return call(proxy.port, "POST", path, fields, token=token, headers=headers)


def run(*argv):
    done = run_program(*argv)
    return done.returncode, done.stdout, done.stderr


# Rows.

@pytest.mark.parametrize("headers, expected", [
    ([], (None, None, None, None)),
    ([("x-claude-code-session-id", "s1"), ("x-claude-code-agent-id", "a1"),
      ("x-claude-code-parent-agent-id", "a0")], ("s1", "a1", "a0", None)),
    ([("session-id", "s2"), ("thread-id", "t2")], ("s2", "t2", None, None)),
    ([("x-ironcage-session", "mine"), ("session-id", "s2"), ("x-ironcage-project", "apollo")],
     ("mine", None, None, "apollo")),
    ([("x-ironcage-project", "p" * 5_000), ("x-ironcage-session", "Gr\u00fcn 'x'; --")],
     ("Gr?n 'x'; --", None, None, "p" * 128)),
    ([("x-ironcage-project", " "), ("x-ironcage-session", "")], (None, None, None, None)),
], ids=["none", "Claude Code", "Codex", "ours win", "odd", "empty"])
def test_what_clients_say_of_themselves_is_in_the_row_and_goes_no_further_if_it_is_ours(
        mock, caged, ledger, headers, expected):
    proxy = caged()

    assert 200 == chat(proxy, headers).status

    settled_status(proxy)
    [row] = program().ledger_rows(ledger, "SELECT * FROM calls")
    assert ("alice", *expected) == tuple(row[name] for name in (
        "token", "session", "agent", "parent_agent", "project"))
    assert not [name for name, _ in mock.seen[0].headers if name.startswith("x-ironcage")]
    metrics = call(proxy.port, "GET", "/ironcage/metrics", token=ADMIN_TOKEN).body.decode()
    assert 'ironcage_token_requests_total{token="alice"} 1' in metrics
    assert not [value for _, value in headers if value.strip() and value in metrics]


def test_the_log_names_token_session_and_project_of_calls_and_refusals(mock, tmp_path, config):
    config.write_text(json.dumps({"tokens": [{"name": "alice", "token": ALICE}]}))
    headers = [("x-ironcage-session", "s1\tforged level=ERROR"), ("x-ironcage-project", "apollo")]
    with Served("--token", TOKEN, "--config", str(config), "--budget", "1",
                environ={"OPENAI_API_KEY": "sk-canary"}) as served:
        chat(served, headers, fields={**CHAT, "model": "ironcage/echo"})
        chat(served, headers, fields={**CHAT, "model": "gpt-mystery\n"})
        call(served.port, "POST", "/v1/chat/completions", CHAT, token="ic_nobody_knows_this")
        _, _, log = served.stop()

    done, refused, unknown = (line for line in log.splitlines() if "completed" in line
                              or "refused" in line)
    for line in (done, refused):
        assert "token=alice" in line and "project=apollo" in line
        assert 'session="s1?forged level=ERROR"' in line
    assert 'model="gpt-mystery?"' in refused and "path=/v1/chat/completions" in refused
    assert "reason=unpriced_model" in refused and "no price is known" in refused
    assert "token=" not in unknown and "status=401" in unknown and "nobody" not in unknown


# Refusals.

def test_refusals_are_kept_with_reason_model_path_and_amounts_and_survive_a_restart(
        mock, caged, ledger):
    proxy = caged(budget_usd="0.000085")
    headers = [("x-ironcage-session", "s1"), ("x-ironcage-project", "apollo")]
    chat(proxy)
    refused = chat(proxy, headers)
    chat(proxy, headers, BOB, {**MESSAGE, "model": "claude-x", "max_tokens": 0.5}, "/v1/messages")
    shown = call(proxy.port, "GET", "/ironcage/usage", token=ALICE).json["refused"]
    proxy.stop()

    proxy = caged(budget_usd="0.000085")
    again = call(proxy.port, "GET", "/ironcage/usage", token=ALICE).json["refused"]
    everyones = call(proxy.port, "GET", "/ironcage/usage", token=TOKEN).json["refused"]

    assert shown == again and ["bob", "alice"] == [row["token"] for row in everyones]
    [row] = again
    details = refused.json["error"]["ironcage"]
    assert (402, "insufficient_budget", "gpt-4o-mini", "/v1/chat/completions", "s1", "apollo",
            refused.json["error"]["message"], refused.header("x-ironcage-request-id")) == tuple(
        row[name] for name in ("status", "reason", "model", "path", "session", "project",
                               "message", "request_id"))
    assert all(row[name] == details[name] for name in (
        "scope", "limit_microdollars", "spent_microdollars", "reserved_microdollars",
        "needed_microdollars"))

    code, out, _ = run("usage", "--refused", "--ledger", ledger)
    assert (0, 2) == (code, out.count("\n"))
    assert "alice  402  insufficient_budget  gpt-4o-mini  /v1/chat/completions  Iron Cage" in out
    listed = json.loads(run("usage", "--refused", "--json", "--ledger", ledger)[1])["refused"]
    assert ["alice", "bob"] == [row["token"] for row in listed]
    assert "nothing was refused\n" == run("usage", "--refused", "--until", "yesterday",
                                          "--ledger", ledger)[1]


def test_what_an_expired_token_asks_is_kept_under_its_name(mock, caged):
    proxy = caged(expires="2020-01-01", with_ledger=False)

    assert 401 == chat(proxy).status

    [row] = call(proxy.port, "GET", "/ironcage/usage", token=TOKEN).json["refused"]
    assert ("alice", "invalid_api_key") == (row["token"], row["reason"])


def test_a_ledger_that_cannot_be_written_fails_no_refusal(mock, caged, ledger):
    proxy = caged(budget_usd="0")
    other = sqlite3.connect(ledger, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    assert [402] * 3 == [chat(proxy).status for _ in range(3)]
    other.execute("COMMIT")
    other.close()
    proxy.stop()

    assert 3 == program().ledger_rows(ledger, "SELECT COUNT(*) AS n FROM refusals")[0]["n"]


# Budgets of sessions.

def session(name):
    return [("x-claude-code-session-id", name)] if name else []


@pytest.mark.parametrize("with_ledger", [True, False])
def test_each_session_of_a_token_has_its_own_budget(mock, caged, with_ledger):
    proxy = caged(session_budget_usd="0.000085", with_ledger=with_ledger)

    statuses = [chat(proxy, session(name)).status for name in (
        "s1", "s1", "s2", "s2", None, None)]
    others = [chat(proxy, session("s1"), token).status for token in (BOB, TOKEN)]

    assert ([200, 402] * 3, [200, 200]) == (statuses, others)
    refused = chat(proxy, session("s1"))
    assert "alice/s1" == refused.json["error"]["ironcage"]["scope"]
    assert "the budget of the session s1 under the token alice (session_budget_usd)" \
        in refused.json["error"]["message"]
    assert "the budget of calls that name no session" in chat(proxy).json["error"]["message"]
    assert {"alice", "bob"} <= set(status_of(proxy)["by_token"]) <= {"alice", "bob", "default"}


def test_a_session_goes_on_where_it_was_after_a_restart_and_after_folding(
        mock, caged, ledger, monkeypatch):
    proxy = caged(session_budget_usd="0.000085")
    assert 200 == chat(proxy, session("s1")).status
    proxy.stop()
    module, now = program(), time.time()
    monkeypatch.setattr(module.time, "time", lambda: now + 9 * 86_400)
    module.SqliteLedger(ledger, keep_days=1).close()
    assert 1 == module.LedgerAudit(ledger).state["folded"]

    proxy = caged(session_budget_usd="0.000085")
    assert [402, 200] == [chat(proxy, session(name)).status for name in ("s1", "s2")]


def test_a_session_budget_is_counted_in_the_tokens_too(mock, caged):
    proxy = caged(budget_usd="0.000085", session_budget_usd="0.5")

    assert 200 == chat(proxy, session("s1")).status
    refused = chat(proxy, session("s2"))

    assert (402, "alice") == (refused.status, refused.json["error"]["ironcage"]["scope"])
    status = settled_status(proxy)
    assert mock.billed_microdollars == status["by_token"]["alice"]["spent_microdollars"]


def test_sessions_are_bounded_in_number_and_one_in_flight_is_not_forgotten(
        mock, caged, monkeypatch):
    monkeypatch.setattr(program(), "MOST_SESSIONS", 5)
    proxy = caged(session_budget_usd="0.000085")
    gate = Gate()
    mock.script(lambda request: mock.default_reply(request).with_steps(
        [gate, *mock.default_reply(request).steps]))

    with RawClient(proxy.port) as client:
        client.request("POST", "/v1/chat/completions", json.dumps(CHAT).encode(), token=ALICE,
                       headers=session("held"))
        mock.wait_for_requests(1)
        assert [200] * 20 == [chat(proxy, session(f"s{n}")).status for n in range(20)]
        scopes = [name for name in proxy.router.controller.accounts.by_scope if "/" in name]
        assert "alice/held" in scopes and len(scopes) <= 6
        gate.event.set()
        client.read_answer()

    assert [402, 402] == [chat(proxy, session(name)).status for name in ("held", "s0")]


def test_a_changed_session_budget_holds_for_sessions_that_are_known(mock, caged, config):
    proxy = caged(session_budget_usd="0.000085")
    assert [200, 402] == [chat(proxy, session("s1")).status for _ in range(2)]

    config.write_text(config.read_text().replace("0.000085", "0.5"))
    proxy.reload_asked = True
    until(
        lambda: proxy.router.config.callers[0].session_budget_microdollars == 500_000)

    assert 200 == chat(proxy, session("s1")).status


# Commands.

@pytest.fixture
def spent(mock, caged, ledger):
    """A ledger with calls of two tokens, sessions and projects, of today and of yesterday."""
    proxy = caged()
    for token, name, project in ((ALICE, "s1", "apollo"), (ALICE, "s2", "=apollo"), (BOB, "s1", "")):
        chat(proxy, [*session(name), ("x-ironcage-project", project)], token)
    settled_status(proxy)
    proxy.stop()
    db = sqlite3.connect(ledger)
    db.execute("UPDATE calls SET admitted_s = admitted_s - 86400 WHERE id = 1")
    db.commit()
    db.close()
    return ledger


def test_yesterday_by_project_can_be_asked(spent):
    code, out, _ = run("usage", "--ledger", spent, "--since", "yesterday", "--until", "today",
                       "--by", "project", "--json")

    asked = json.loads(out)
    assert (0, ["apollo"], 1) == (code, [row["project"] for row in asked["rows"]],
                                  asked["total"]["requests"])


def test_usage_by_several_names_is_a_table_json_or_csv(spent):
    today = time.strftime("%Y-%m-%d", time.gmtime())
    command = ("usage", "--ledger", spent, "--by", "token,day,session,project,model,provider")

    text, [*rows] = run(*command)[1], csv.DictReader(run(*command, "--csv")[1].splitlines())
    parsed = json.loads(run(*command, "--json")[1])

    assert 3 == len(rows) == len(parsed["rows"])
    assert [("alice", "s1", "apollo"), ("alice", "s2", "'=apollo"), ("bob", "s1", "")] == [
        (row["token"], row["session"], row["project"]) for row in rows]
    assert [row["cost_microdollars"] for row in rows] == [
        str(row["cost_microdollars"]) for row in parsed["rows"]]
    assert today in text and "=apollo" in text and "total" in text.splitlines()[-1]
    assert 2 == json.loads(run("usage", "--ledger", spent, "--by", "token,hour", "--since", "today",
                               "--json")[1])["total"]["requests"]


@pytest.mark.parametrize("argv, fault", [
    (["--by", "tokens"], "--by: tokens is none of token, model, provider, session, project, day, "
     "hour, each once (did you mean token?)"),
    (["--by", "day,day"], "each once"), (["--by", ""], "--by has an empty value"),
    (["--since", "soon"], "--since: must be a date"), (["--until", "13h ago"], "--until: must be"),
])
def test_a_question_that_cannot_be_asked_is_one_sentence(spent, argv, fault):
    code, out, err = run("usage", "--ledger", spent, *argv)

    assert (2, "", 1) == (code, out, err.count("\n"))
    assert fault in err


def test_an_audit_names_what_was_edited_and_can_be_filed(spent):
    code, out, _ = run("audit", "--ledger", spent, "--json")
    verdict = json.loads(out)

    assert (1, "not sound", 3) == (code, verdict["verdict"], verdict["rows"])
    assert [1] == [fault["row"] for fault in verdict["faults"] if fault["row"] is not None]
    code, out, _ = run("audit", "--ledger", spent)
    assert 1 == code and "it is not as it was sealed" in out and "verdict:" in out


def test_an_audit_beside_a_running_proxy_finds_nothing(mock, caged, ledger):
    proxy = caged()
    chat(proxy), chat(proxy, path="/v1/messages", fields=MESSAGE)
    settled_status(proxy)

    code, out, _ = run("audit", "--ledger", ledger, "--json")

    verdict = json.loads(out)
    assert (0, "sound", 2, 0) == (code, verdict["verdict"], verdict["rows"],
                                  verdict["rows_with_unknown_rates"])
    assert mock.billed_microdollars == verdict["cost_microdollars"]


def test_tokens_list_shows_limits_what_is_left_and_when_it_resets(mock, caged, config, ledger):
    proxy = caged(budget_usd="1", stop_at_usd="0.5", period="day", session_budget_usd="0.1",
                  requests_per_minute=60, parallel_requests=4, expires="2120-01-01",
                  models=["gpt-*"])
    chat(proxy)
    settled_status(proxy)

    for _ in range(2):                                    # beside the proxy, and without it
        listed = run("tokens", "list", "--config", str(config), "--ledger", ledger, "--json")[1]
        alice, bob = json.loads(listed)["tokens"]
        table = run("tokens", "list", "--config", str(config), "--ledger", ledger)[1]
        spent = mock.billed_microdollars
        assert (1_000_000, 500_000, 100_000, spent, 1_000_000 - spent, "2120-01-01T00:00:00Z") == \
            tuple(alice[name] for name in (
                "limit_microdollars", "stop_at_microdollars", "session_limit_microdollars",
                "spent_microdollars", "left_microdollars", "expires"))
        tomorrow = time.strftime("%Y-%m-%dT00:00:00Z", time.gmtime(time.time() + 86_400))
        assert tomorrow == alice["resets"] and bob["resets"] is None
        assert (0, None) == (bob["spent_microdollars"], bob["left_microdollars"])
        assert all(word in table.splitlines()[1] for word in (
            "alice", "$1.00", "$0.50", "day", "$0.10", "60", tomorrow, "2120-01-01", "gpt-*"))
        assert ["gpt-*", "any"] == [row.split()[-1] for row in table.splitlines()[1:]]
        proxy.stop()
    assert "-" in run("tokens", "list", "--config", str(config))[1].splitlines()[1].split()
    assert "there is no ledger typo.db" in run(
        "tokens", "list", "--config", str(config), "--ledger", "typo.db")[2]


def test_a_wrapped_commands_bill_is_of_that_command_alone(ledger):
    child = ("import os, json, urllib.request as u; u.urlopen(u.Request("
             "os.environ['OPENAI_BASE_URL'] + '/chat/completions', json.dumps({'model': "
             "'ironcage/echo', 'max_tokens': 9, 'messages': [{'role': 'user', 'content': 'hi'}]})"
             ".encode(), {'authorization': 'Bearer ' + os.environ['OPENAI_API_KEY']}))")
    for number in range(2):
        code, _, err = run("--budget", "1", "--ledger", ledger, "--", sys.executable, "-c", child)

        assert 0 == code
        assert "spent $0.000003, of $1.00" in err
        assert ("the ledger held $0.000003 before" in err) is bool(number)


@pytest.mark.skipif(sqlite3.sqlite_version_info < (3, 38), reason="unixepoch() came with 3.38")
def test_the_query_of_the_readme_answers(spent):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    query = re.search(r'sqlite3 cage\.db "(SELECT [^"]+)"', readme)[1]

    rows = program().ledger_rows(spent, query)

    assert {"apollo", "=apollo", None} == {row["project"] for row in rows}
    assert all(0 < row["usd"] < 0.001 for row in rows)


def test_the_readme_names_every_column_of_the_ledger():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = readme[readme.index("| columns |"):readme.index("sqlite3 cage.db")]

    assert [] == [name for name in program().LEDGER_COLUMNS if f"`{name}`" not in table]
