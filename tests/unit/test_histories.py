"""Long histories of a ledger: what is sealed, added up and folded still counts; what was edited shows.

Days and hours are UTC's everywhere. `make_old_ledger` of the benchmark writes ledgers as 0.2.3 did.
"""
import csv
import json
import os
import random
import sqlite3
import sys
from pathlib import Path

import pytest
from support import seeds

import ironcage_proxy as ic
from test_ledger import row, settled

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
from histories import make_old_ledger

DAY = ic.DAY_S
NOW = 1_795_996_800                        # 2026-11-30 00:00 UTC
BOOK = ic.PriceBook.load(str(Path(ic.__file__).with_name("pricing.json")))


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "cage.db")


def tend(ledger):
    """All upkeep that there is to do."""
    while ledger.tend():
        pass


def spend(ledger, number, *, in_flight=False, **more):
    """A call, settled unless it is in flight."""
    call = row(request_id=f"req_{number}", **more)
    ledger.intent(call)
    if not in_flight:
        ledger.settle(settled(call, prompt=100 + number))
    return call


def filled(path, count=10, **more):
    """A ledger with some calls that was closed."""
    ledger = ic.SqliteLedger(path)
    for number in range(count):
        spend(ledger, number, admitted_s=NOW + number, **more)
    ledger.close()


def faults(path, prices=None):
    return [fault for _, fault in ic.LedgerAudit(path, prices).faults]


def edit(path, *statements):
    """What another program does to a ledger."""
    db = sqlite3.connect(path)
    for statement in statements:
        db.execute(statement)
    db.commit()
    db.close()


# The chain.

def test_a_ledger_that_nobody_edited_is_sound_while_it_is_served_and_afterwards(path):
    ledger = ic.SqliteLedger(path)
    for number in range(450):
        spend(ledger, number)
    spend(ledger, 451, in_flight=True)
    spend(ledger, 452)

    assert [] == faults(path)
    tend(ledger)
    served = ic.LedgerAudit(path)
    ledger.close()

    assert ([], 451, 1, 1) == ([], served.rows, served.unsealed, served.open)
    assert [] == faults(path)
    ic.SqliteLedger(path).close()
    after = ic.LedgerAudit(path)
    assert ([], 452, 0, 0) == (after.faults, after.rows, after.unsealed, after.open)


TAMPERED = {
    "a cost": ["UPDATE calls SET cost_microdollars = 1 WHERE id = 5"],
    "a bill that adds up": ["UPDATE calls SET lines = '[[\"output\",100,600000]]', usage = NULL, "
                            "cost_microdollars = 60 WHERE id = 5"],
    "a token": ["UPDATE calls SET token = 'bob' WHERE id = 5"],
    "a project": ["UPDATE calls SET project = 'x' WHERE id = 5"],
    "a time": ["UPDATE calls SET admitted_s = admitted_s - 86400 WHERE id = 5"],
    "a seal": ["UPDATE calls SET seal = x'00' WHERE id = 5"],
    "no seal": ["UPDATE calls SET seal = NULL, cost_microdollars = 1 WHERE id = 5"],
    "a row gone": ["DELETE FROM calls WHERE id = 5"],
    "the first row gone": ["DELETE FROM calls WHERE id = 1"],
    "the last row gone": ["DELETE FROM calls WHERE id = 10"],
    "the last rows gone": ["DELETE FROM calls WHERE id > 6"],
    "all rows gone": ["DELETE FROM calls"],
    "a row put in": ["CREATE TEMP TABLE t AS SELECT * FROM calls WHERE id = 3",
                     "UPDATE t SET id = 11", "INSERT INTO calls SELECT * FROM t"],
    "a row put in without a seal": [
        "CREATE TEMP TABLE t AS SELECT * FROM calls WHERE id = 3",
        "UPDATE t SET id = 11, seal = NULL", "INSERT INTO calls SELECT * FROM t"],
    "a row replaced": ["DELETE FROM calls WHERE id = 5",
                       "CREATE TEMP TABLE t AS SELECT * FROM calls WHERE id = 3",
                       "UPDATE t SET id = 5", "INSERT INTO calls SELECT * FROM t"],
    "two rows swapped": ["UPDATE calls SET id = 99 WHERE id = 4", "UPDATE calls SET id = 4 WHERE "
                         "id = 7", "UPDATE calls SET id = 7 WHERE id = 99"],
    "a row settled again": ["UPDATE calls SET settled_ms = NULL WHERE id = 5"],
    "totals": ["INSERT INTO daily SELECT 1, 'a', 'p', 'm', '', '', 1, 1, 1, 1, 1, 0"],
    "the chain": ["DELETE FROM chain"],
    "the chain's end": ["UPDATE chain SET seal = x'00'"],
    "a price": ["INSERT INTO prices VALUES ('ab', '{}')"],
    "a price that no proxy wrote": [
        f"INSERT INTO prices VALUES ('{ic.text_digest('{}')}', '{{}}')"],
    "a time that is a word": ["UPDATE calls SET admitted_s = 'x' WHERE id = 5"],
    "a usage that is a list": ["UPDATE calls SET usage = '[1]' WHERE id = 5"],
    "a chain of words": ["UPDATE chain SET folded_day = 'x', seal = 1"],
    "a chain without a sum": ["UPDATE chain SET tallied_microdollars = NULL"],
    "a negative cost": ["UPDATE calls SET cost_microdollars = -60, usage = NULL, lines = "
                        "'[[\"output\",-100,600000]]' WHERE id = 5"],
}


@pytest.mark.parametrize("statements", TAMPERED.values(), ids=TAMPERED)
def test_what_was_tampered_with_shows(path, statements):
    filled(path)
    assert [] == faults(path)

    edit(path, *statements)

    assert [] != faults(path)
    assert "not sound" == json.loads(json.dumps(ic.audit_verdict(ic.LedgerAudit(path))))["verdict"]


@pytest.mark.parametrize("statements", [TAMPERED[name] for name in (
    "a cost", "a row gone", "the last row gone", "a row put in without a seal", "two rows swapped")])
def test_what_was_tampered_with_shows_for_good(path, statements):
    """Also after a proxy went on with it, which seals what comes next."""
    filled(path)
    edit(path, *statements)

    ledger = ic.SqliteLedger(path)
    for number in range(3):
        spend(ledger, number)
    ledger.close()

    assert [] != faults(path)


def test_the_last_seal_names_all_that_was_before(path):
    filled(path)
    before = ic.audit_verdict(ic.LedgerAudit(path))["last_seal"]
    edit(path, "UPDATE calls SET token = 'bob' WHERE id = 5")
    ledger = ic.SqliteLedger(path)           # somebody makes all seals anew
    ledger._db.execute("UPDATE calls SET seal = NULL")
    ledger._db.execute("UPDATE chain SET sealed = 0, sealed_id = 0, seal = x''")
    ledger.close()

    verdict = ic.audit_verdict(ic.LedgerAudit(path))
    assert "sound" == verdict["verdict"] and "keyless" in verdict["seals"]
    assert 64 == len(before) and before != verdict["last_seal"]


def test_a_process_that_died_leaves_a_chain_that_goes_on(path, tmp_path):
    """A copy of the files at any moment is what kill -9 leaves."""
    ledger = ic.SqliteLedger(path)
    for number in range(40):
        spend(ledger, number, in_flight=number % 7 == 3)
        if number % 5 == 0:
            ledger.tend()
        died = str(tmp_path / f"died{number}.db")
        for end in ("", "-wal"):
            Path(died + end).write_bytes(Path(path + end).read_bytes())
        again = ic.SqliteLedger(died)
        again.close()
        audit = ic.LedgerAudit(died)
        assert ([], number + 1, 0) == (audit.faults, audit.rows, audit.unsealed)
    ledger.close()


def test_an_intent_that_could_not_be_written_leaves_no_gap_in_the_ids(path):
    ledger = ic.SqliteLedger(path)
    spend(ledger, 0)
    with pytest.raises(ic.LedgerUnavailable):
        ledger.intent(row(bound=2 ** 70))
    spend(ledger, 1)
    ledger.close()

    assert ([1, 2], []) == ([r["id"] for r in ic.ledger_rows(path, "SELECT id FROM calls")],
                            faults(path))


def test_rates_are_those_of_the_price_that_the_row_names(path):
    price = BOOK.price("gpt-4o-mini", "openai")
    assert price == ic.price_from_cells(price.cells())._replace(known_rates=price.known_rates)
    rates = price.every_rate()
    bill = BOOK.bill("gpt-4o-mini", {"prompt_tokens": 9, "completion_tokens": 9}, api="chat",
                     provider="openai", data_residency="eu")
    cheap = ic.stored_row({**settled(row()), "lines": [("input", 1_000, 1), ("output", 100, 1)],
                           "cost_microdollars": 1})

    assert all(rate in rates[what] for what, _, rate in bill.lines)
    assert ic.audit_row(ic.stored_row(settled(row())), rates) is None
    assert "has no such rate for input, output" in ic.audit_row(cheap, rates)


@pytest.mark.parametrize("name", ["gpt-4o-mini", "claude-sonnet-4-5", "gpt-5.5", "gpt-6.1-sol",
                                  "claude-opus-5-5", "ironcage/echo"])
@pytest.mark.parametrize("tier", [None, "default", "flex", "priority", "batch", "never heard of"])
def test_every_rate_that_can_be_billed_is_known_to_the_audit(name, tier):
    price = BOOK.price(name)
    rates = price.every_rate()

    for prompt_tokens in (10, 150_000, 250_000, 600_000):
        billed = price.rates(tier, prompt_tokens)
        assert [] == [bucket for bucket in billed if billed[bucket] not in rates[bucket]]


# Ledgers of earlier versions.

def test_a_ledger_of_an_earlier_version_is_read_as_it_is_and_sealed_by_the_next_start(path):
    make_old_ledger(path, 500)
    edit(path, "UPDATE calls SET settled_ms = NULL, cost_microdollars = NULL WHERE id = 500")
    before = open(path, "rb").read()
    report, audit = ic.usage_report(path), ic.LedgerAudit(path, BOOK)
    assert before == open(path, "rb").read()
    assert (500, 1) == (report["total"]["requests"], report["total"]["unsettled_requests"])
    assert ([], 499, 499, 1) == (audit.faults, audit.rows, audit.unsealed, audit.open)

    ledger = ic.SqliteLedger(path)
    assert (1, report["total"]["cost_microdollars"]) == (ledger.recovered, ledger.spent(None, 0))
    spend(ledger, 1)
    assert ["req_1"] == [r["request_id"] for r in ledger.recent(1)]
    assert 3 == len(ledger.recent(3, "token01"))          # also those that are not sealed yet
    ledger.close()

    audit = ic.LedgerAudit(path, BOOK)
    assert ([], 501, 0) == (audit.faults, audit.rows, audit.unsealed)
    edit(path, "UPDATE calls SET cost_microdollars = 1, usage = NULL, "
               "lines = '[[\"reserved\",1,1000000]]' WHERE id = 7")
    assert any("not as it was sealed" in fault for fault in faults(path))


@pytest.mark.parametrize("is_upgraded", [False, True])
def test_gaps_and_odd_rates_of_an_earlier_version_are_shown_and_are_no_faults(path, is_upgraded):
    """A full disk left gaps then, and the prices of then are not known: it may be in order."""
    make_old_ledger(path, 20)
    edit(path, "DELETE FROM calls WHERE id = 7",
         "UPDATE calls SET lines = '[[\"input\",100,1]]', usage = NULL, cost_microdollars = 1 "
         "WHERE id = 9")
    if is_upgraded:
        filled(path)

    audit = ic.LedgerAudit(path, BOOK)
    verdict = ic.audit_verdict(audit)
    assert ([], "sound") == (audit.faults, verdict["verdict"])
    gaps, rates = verdict["cannot_be_told"]
    assert gaps.startswith("1 ids were missing") and rates.startswith("1 rows that name no kept")
    if is_upgraded:
        edit(path, "DELETE FROM calls WHERE id = 22")
        assert "1 ids are missing" in faults(path, BOOK)


def test_rates_of_a_kept_price_are_faults_and_other_faults_of_old_rows_are_no_doubts(path):
    make_old_ledger(path, 3)
    edit(path, "UPDATE calls SET lines = '[[\"input\",100,1]]', cost_microdollars = 1 WHERE id = 2")
    assert ["it bills other counts than its usage: input, output"] \
        == [fault.replace("has no such rate", "") for fault in faults(path)]
    assert 1 == len(faults(path, BOOK))


def test_a_process_that_dies_while_it_brings_an_old_ledger_up_to_date_leaves_the_old_one(
        path, monkeypatch):
    """Else `usage` would take half of the new tables for all."""
    make_old_ledger(path, 300)
    for number in range(4, len(ic.MIGRATIONS)):
        with monkeypatch.context() as dying:
            dying.setattr(ic, "MIGRATIONS", (*ic.MIGRATIONS[:number], "no SQL: here it dies"))
            with pytest.raises(ic.Misconfigured):
                ic.SqliteLedger(path)
        assert 300 == ic.usage_report(path)["total"]["requests"]
        assert ([], 300) == (ic.LedgerAudit(path, BOOK).faults, ic.LedgerAudit(path).rows)


# Adding up and folding.

def random_history(rng, ledger, count):
    """Calls of all kinds over 40 days, some late, some by a clock that goes back."""
    for number in range(count):
        spend(ledger, number, token=rng.choice("ab"), session=rng.choice((None, "s1", "s2")),
              project=rng.choice((None, "p")), price_key=rng.choice(("m1", "m2", None)),
              admitted_s=NOW - 40 * DAY + number * 40 * DAY // count + rng.randrange(-DAY, DAY),
              in_flight=rng.random() < 0.02)


def every_report(path):
    """All that can be asked by whole days."""
    spans = [(0, ic.MOST_SECONDS), (NOW - 20 * DAY, NOW - 5 * DAY), (NOW - 30 * DAY, NOW)]
    groups = [[], ["token"], ["day"], ["model", "provider"], ["session", "project"],
              ["day", "token", "session"]]
    return [ic.usage_by(path, by, *span) for by in groups for span in spans]


def every_sum(ledger):
    """All that budgets ask: by token and period, by session."""
    starts = [0, NOW - 30 * DAY, NOW - 7 * DAY, NOW]
    return [ledger.spent(token, since_s) for token in (None, "a", "b") for since_s in starts] \
        + [ledger.spent_in_session(token, session)
           for token in "ab" for session in (None, "s1", "s2", "none")]


@pytest.mark.parametrize("seed", seeds(3, 6))
def test_what_is_added_up_and_folded_counts_as_before(path, seed, monkeypatch):
    rng = random.Random(seed)
    monkeypatch.setattr(ic, "STEP_ROWS", rng.choice((1, 7, 50)))
    monkeypatch.setattr(ic.time, "time", lambda: NOW)
    ledger = ic.SqliteLedger(path)
    random_history(rng, ledger, 150)
    reports, sums = every_report(path), every_sum(ledger)
    ledger.close()
    ledger = ic.SqliteLedger(path, keep_days=rng.choice((1, 10, 30)))
    recovered, reports = every_report(path), every_report(path)

    for _ in range(400):
        if not ledger.tend():
            break
        if rng.random() < 0.1:
            assert (recovered, sums) == (every_report(path), every_sum(ledger))
    kept = ledger._db.execute("SELECT COUNT(*) FROM calls").fetchone()[0]
    ledger.close()

    assert (recovered, 0 < kept < 150) == (reports, True)
    assert [] == faults(path)
    assert 150 == kept + ic.LedgerAudit(path).state["folded"]
    again = ic.SqliteLedger(path)
    assert (recovered, sums) == (every_report(path), every_sum(again))
    spend(again, 1)
    assert 151 == again._newest                # the id of a row that was folded comes no more
    again.close()
    assert [] == faults(path)


def test_totals_of_folded_days_cannot_be_edited_unseen(path, monkeypatch):
    monkeypatch.setattr(ic.time, "time", lambda: NOW + 90 * DAY)
    filled(path)
    ledger = ic.SqliteLedger(path, keep_days=1)
    ledger.close()
    assert 10 == ic.LedgerAudit(path).state["folded"]

    edit(path, "UPDATE daily SET cost_microdollars = cost_microdollars - 1")

    assert any("the totals of all days" in fault for fault in faults(path))
    for word in ("cost_microdollars", "day"):
        edit(path, f"UPDATE daily SET {word} = 'x'")
        assert any("it holds what no proxy wrote" in fault or "'x'" in fault or "0.0" in fault
                   for fault in faults(path))


def test_a_row_whose_end_a_shared_budget_does_not_know_is_not_folded(path, monkeypatch):
    monkeypatch.setattr(ic.time, "time", lambda: NOW + 90 * DAY)
    ledger = ic.SqliteLedger(path, keep_days=1)
    for number in range(3):
        call = row(request_id=f"req_{number}", admitted_s=NOW)
        ledger.intent(call, shared=f"call {number}")
        ledger.settle(settled(call))
    for row_id in (1, 3):
        ledger.confirm(row_id)
    spend(ledger, 4, admitted_s=NOW)
    tend(ledger)
    assert [2] == [owed["id"] for owed in ledger.unconfirmed()]

    ledger.confirm(2)
    spend(ledger, 5, admitted_s=NOW + 90 * DAY)
    tend(ledger)
    assert [5] == [r["id"] for r in ledger.recent(9)]
    ledger.close()
    assert [] == faults(path)


def test_a_session_is_opened_while_others_read_the_ledger(path):
    ledger = ic.SqliteLedger(path)
    spend(ledger, 1, session="s")
    cost = ic.usage_by(path, [])[0]["cost_microdollars"]
    with ledger._reading:
        assert cost == ledger.spent_in_session("default", "s") > 0
    ledger.close()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write")
def test_a_ledger_in_a_folder_that_is_read_only_can_be_read(path):
    filled(path)
    os.chmod(os.path.dirname(path), 0o555)
    try:
        assert ([], 10) == (faults(path), ic.usage_by(path, [])[0]["requests"])
    finally:
        os.chmod(os.path.dirname(path), 0o755)


def test_a_part_of_a_day_and_hours_come_from_rows_and_of_folded_days_from_their_totals(
        path, monkeypatch):
    monkeypatch.setattr(ic.time, "time", lambda: NOW)
    ledger = ic.SqliteLedger(path, keep_days=10)
    for number, (days, hour) in enumerate([(20, 5), (20, 9), (2, 5), (2, 9), (1, 5)]):
        spend(ledger, number, admitted_s=NOW - days * DAY + hour * 3600)
    tend(ledger)

    def hours(*span):
        return [(r["hour"], r["requests"]) for r in ic.usage_by(path, ["hour"], *span)]

    assert [("2026-11-10 00:00", 2), ("2026-11-28 05:00", 1), ("2026-11-28 09:00", 1),
            ("2026-11-29 05:00", 1)] == hours()
    assert [("2026-11-28 09:00", 1)] == hours(NOW - 2 * DAY + 6 * 3600, NOW - DAY)
    assert [2] == [r["requests"] for r in ic.usage_by(path, [], NOW - 2 * DAY + 6 * 3600)]
    assert 5 == ic.usage_by(path, [])[0]["requests"]
    ledger.close()


def test_queries_of_the_way_of_a_call_and_of_a_start_use_keys(path):
    ledger = ic.SqliteLedger(path)
    seen = []
    ledger._db.set_trace_callback(seen.append)
    ledger._reader.set_trace_callback(seen.append)
    spend(ledger, 1)
    ledger.spent("default", 0), ledger.spent_in_session("default", "s"), ledger.recent(5, "default")
    ledger.tend()

    plans = [step["detail"] for query in seen if query.startswith(("SELECT", "UPDATE", "DELETE"))
             for step in ledger._db.execute(f"EXPLAIN QUERY PLAN {query}")]
    ledger.close()
    assert [] == [plan for plan in plans if plan.startswith("SCAN calls")]
    assert any("calls_by_token" in plan for plan in plans)
    recover = ic._RECOVER.replace("?", "1")
    db = sqlite3.connect(path)
    assert [] == [plan for *_, plan in db.execute(f"EXPLAIN QUERY PLAN {recover}")
                  if plan == "SCAN calls"]
    db.close()


# Refusals.

def refusal(number, **more):
    return {**dict.fromkeys(ic.REFUSAL_COLUMNS), "refused_ms": number, "request_id": f"req_{number}",
            "token": "a", "status": 402, "reason": "budget_exceeded", "message": "no", **more}


def test_refusals_are_shown_at_once_written_by_upkeep_and_bounded(path, monkeypatch):
    monkeypatch.setattr(ic, "REFUSALS_KEPT", 30)
    ledger = ic.SqliteLedger(path)
    for number in range(50):
        ledger.refuse(refusal(number))
    assert ["req_49", "req_48"] == [r["request_id"] for r in ledger.refusals(2)]
    tend(ledger)
    ledger.refuse(refusal(50, token="b"))

    assert ["req_50", "req_49"] == [r["request_id"] for r in ledger.refusals(2)]
    assert ["req_50"] == [r["request_id"] for r in ledger.refusals(9, "b")]
    ledger.close()
    assert 30 == ic.ledger_rows(path, "SELECT COUNT(*) AS n FROM refusals")[0]["n"]


def test_refusals_that_cannot_be_written_wait_in_memory_the_last_thousand_of_them(path):
    ledger = ic.SqliteLedger(path)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    for number in range(1_500):
        ledger.refuse(refusal(number))
    assert not ledger.tend()
    other.execute("COMMIT")
    other.close()
    ledger.refuse(refusal(1_500, message=2 ** 70))    # SQLite cannot hold it: that one is dropped
    tend(ledger)
    ledger.close()

    kept = ic.ledger_rows(path, "SELECT request_id FROM refusals ORDER BY id")
    assert ("req_501", 999) == (kept[0]["request_id"], len(kept))


# Moments.

@pytest.mark.parametrize("text, expected", [
    ("2026-11-02", "2026-11-02T00:00:00"), ("2026-11-02T13:30:00Z", "2026-11-02T13:30:00"),
    ("2026-11-02T13:30:00+02:00", "2026-11-02T11:30:00"), ("2026-11", "2026-11-01T00:00:00"),
    ("today", "2026-11-30T00:00:00"), ("yesterday", "2026-11-29T00:00:00"),
    ("7d", "2026-11-23T00:00:00"), ("0d", "2026-11-30T00:00:00"), ("24h", "2026-11-29T15:00:00"),
    ("36h", "2026-11-29T03:00:00"),
])
def test_moments_are_dates_months_and_times_back_from_now_in_utc(text, expected):
    assert ic.parse_time(expected) == ic.parse_moment(text, NOW + 15 * 3600)


@pytest.mark.parametrize("text", ["", "tomorrow", "7", "d", "-1d", "2026", "2026-13", "2026-02-30",
                                  "7 d", "last week", "1e3h"])
def test_what_is_no_moment_is_refused(text):
    with pytest.raises(ValueError, match="must be a date"):
        ic.parse_moment(text, NOW)


def test_csv_can_be_read_back_and_holds_no_formula():
    rows = [{"a": text, "b": number} for number, text in enumerate(
        ["plain", 'a "b", c', "two\nlines", "=1+1", "+x", "-x", "-5", "@x", "\tx", None])]
    assert '"x;=1+1"' == ic.csv_text(["a"], [{"a": "x;=1+1"}]).split("\r\n")[1]

    read = [*csv.reader(ic.csv_text(["a", "b"], rows).splitlines(keepends=True))]

    assert [["a", "b"], ["plain", "0"], ['a "b", c', "1"], ["two\nlines", "2"], ["'=1+1", "3"],
            ["'+x", "4"], ["'-x", "5"], ["-5", "6"], ["'@x", "7"], ["'\tx", "8"], ["", "9"]] == read


def test_a_verdict_can_be_filed_as_json(path):
    filled(path)

    verdict = json.loads(json.dumps(ic.audit_verdict(ic.LedgerAudit(path))))

    assert ("sound", 10, 10, 0) == (verdict["verdict"], verdict["rows"], verdict["sealed_rows"],
                                    verdict["fault_count"])
    assert verdict["cost_microdollars"] == verdict["total_microdollars"] > 0
