"""The ledger: a row is on disk before its call is sent, is completed once, and adds up."""
import ast
import os
import re
import sqlite3
import stat
import sys
import threading
from fractions import Fraction

import pytest
from support import seeds
from trees import PROGRAM, tree_of, walked

import ironcage_proxy as ic

RATES = {"input": 150_000, "output": 600_000}


def row(token="default", admitted_s=1_795_996_800, bound=1_000, **more):
    return {**dict.fromkeys(ic.LEDGER_COLUMNS), "request_id": "req_1", "admitted_s": admitted_s,
            "token": token, "provider": "openai", "model": "gpt-4o-mini",
            "price_key": "gpt-4o-mini", "api": "chat", "stream": 0, "bound_microdollars": bound,
            **more}


def settled(intent, prompt=1_000, completion=100, **more):
    lines = [("input", prompt, RATES["input"]), ("output", completion, RATES["output"])]
    return {**intent, "settled_ms": 1, "cost_microdollars": ic.total_of(lines), "status": 200,
            "input_tokens": prompt, "cached_input_tokens": 0, "output_tokens": completion,
            "usage": {"prompt_tokens": prompt, "completion_tokens": completion},
            "lines": lines, **more}


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "cage.db")


@pytest.fixture(params=["memory", "sqlite"])
def ledger(request, path):
    opened = ic.MemoryLedger() if request.param == "memory" else ic.SqliteLedger(path)
    yield opened
    opened.close()


def rows(path):
    return ic.ledger_rows(path, "SELECT * FROM calls ORDER BY id")


# Both ledgers.

def test_a_call_in_flight_counts_at_its_bound_and_a_settled_one_at_its_cost(ledger):
    call = row()
    ledger.intent(call)
    assert 1_000 == ledger.spent(None, 0)

    ledger.settle(settled(call))

    assert 210 == ledger.spent(None, 0) == ledger.spent("default", 0)
    assert 0 == ledger.spent("other", 0)


def test_what_was_spent_is_told_by_token_and_period(ledger):
    day_s = 86_400
    for token, day in (("a", 1), ("a", 2), ("b", 2)):
        call = row(token, admitted_s=day * day_s + 5)
        ledger.intent(call)
        ledger.settle(settled(call))

    assert [630, 420, 0] == [ledger.spent(None, day * day_s) for day in (0, 2, 3)]
    assert [420, 210] == [ledger.spent("a", day * day_s) for day in (0, 2)]


def test_the_newest_rows_come_first_and_those_in_flight_are_left_out(ledger):
    for number in range(5):
        call = row("ab"[number % 2], request_id=f"req_{number}")
        ledger.intent(call)
        if number < 4:
            ledger.settle(settled(call))

    assert ["req_3", "req_2", "req_1"] == [r["request_id"] for r in ledger.recent(3)]
    assert ["req_3", "req_1"] == [r["request_id"] for r in ledger.recent(9, "b")]
    assert [] == ledger.recent(0)


def test_the_memory_ledger_keeps_the_last_10000_rows_and_all_of_the_spend():
    ledger = ic.MemoryLedger()
    for number in range(10_050):
        call = row(request_id=number)
        ledger.intent(call)
        ledger.settle(settled(call))

    assert 10_000 == len(ledger.recent(20_000))
    assert 10_050 * 210 == ledger.spent(None, 0)


# On disk.

def test_an_intent_is_on_disk_when_intent_returns(path):
    ledger = ic.SqliteLedger(path)
    ledger.intent(row())

    assert [(1_000, None)] == [(r["bound_microdollars"], r["settled_ms"]) for r in rows(path)]
    ledger.close()


def test_everything_comes_back_after_a_restart(path):
    for _ in range(3):
        ledger = ic.SqliteLedger(path)
        call = row()
        ledger.intent(call)
        ledger.settle(settled(call))
        ledger.close()

    ledger = ic.SqliteLedger(path)
    assert (630, 0) == (ledger.spent(None, 0), ledger.recovered)
    assert [1, 2, 3] == [r["id"] for r in rows(path)]
    ledger.close()


def test_what_was_never_settled_is_charged_at_its_bound_on_the_next_start_and_once(path):
    ledger = ic.SqliteLedger(path)
    ledger.intent(row(bound=777))
    ledger.close()

    for recovered in (1, 0):
        ledger = ic.SqliteLedger(path)
        assert (recovered, 777) == (ledger.recovered, ledger.spent(None, 0))
        ledger.close()
    [charged] = rows(path)
    assert (777, "the proxy ended") == (charged["cost_microdollars"], charged["estimated"])
    assert ic.audit_row(charged) is None


def test_a_settlement_that_comes_twice_counts_once(path):
    ledger = ic.SqliteLedger(path)
    call = row()
    ledger.intent(call)
    ledger.settle(settled(call))
    ledger.settle(settled(call, prompt=10 ** 6))

    assert 210 == ledger.spent(None, 0)
    ledger.close()


def test_a_second_process_is_refused_and_told_why(path):
    ledger = ic.SqliteLedger(path)

    with pytest.raises(ic.Misconfigured, match="another ironcage_proxy has it open"):
        ic.SqliteLedger(path)
    ledger.close()
    ic.SqliteLedger(path).close()


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX")
def test_the_files_are_the_users_alone(path):
    ledger = ic.SqliteLedger(path)
    ledger.intent(row())

    modes = {name: stat.S_IMODE(os.stat(os.path.join(os.path.dirname(path), name)).st_mode)
             for name in os.listdir(os.path.dirname(path))}
    assert set(modes) >= {"cage.db", "cage.db-wal", "cage.db.lock"}
    assert {0o600} == set(modes.values())
    ledger.close()


def test_a_ledger_of_a_newer_version_is_refused(path):
    ic.SqliteLedger(path).close()
    db = sqlite3.connect(path)
    db.execute("PRAGMA user_version = 99")
    db.close()

    with pytest.raises(ic.Misconfigured, match="newer version"):
        ic.SqliteLedger(path)


def test_a_ledger_whose_chain_was_emptied_is_refused(path):
    ic.SqliteLedger(path).close()
    with sqlite3.connect(path) as db:
        db.execute("DELETE FROM chain")
    db.close()

    with pytest.raises(ic.Misconfigured, match="chain is empty"):
        ic.SqliteLedger(path)


@pytest.mark.parametrize("content", [b"not a database, but long enough to be one" * 100,
                                     b"SQLite format 3\0" + b"\xff" * 4_000])
def test_a_file_that_is_no_ledger_is_refused_with_one_line(path, content):
    with open(path, "wb") as file:
        file.write(content)

    with pytest.raises(ic.Misconfigured) as caught:
        ic.SqliteLedger(path)
    assert "\n" not in str(caught.value)


def test_reading_a_ledger_changes_nothing_and_needs_no_server(path):
    ledger = ic.SqliteLedger(path)
    ledger.intent(row())
    assert 1 == len(rows(path))
    ledger.close()

    assert [None] == [r["settled_ms"] for r in rows(path)]      # not recovered by a reader


# When it cannot be written.

class Unwritable:
    """A connection that fails while told so, as with a full disk."""

    def __init__(self, db):
        self.db, self.is_full = db, False

    def execute(self, statement, *values):
        if self.is_full and statement.startswith(("INSERT", "UPDATE")):
            raise sqlite3.OperationalError("database or disk is full")
        return self.db.execute(statement, *values)

    def close(self):
        self.db.close()


def test_an_intent_that_cannot_be_written_is_refused_and_leaves_nothing_behind(path):
    ledger = ic.SqliteLedger(path)
    ledger._db = Unwritable(ledger._db)
    ledger._db.is_full = True
    with pytest.raises(ic.LedgerUnavailable, match="disk is full"):
        ledger.intent(row())

    ledger._db.is_full = False
    ledger.intent(row(request_id="req_2"))

    assert ["req_2"] == [r["request_id"] for r in rows(path)]
    ledger.close()


def test_a_lease_that_cannot_be_written_is_not_taken(path):
    ledger = ic.SqliteLedger(path)
    ledger._db = Unwritable(ledger._db)
    ledger._db.is_full = True

    with pytest.raises(ic.LedgerUnavailable, match="no budget is leased"):
        ledger.keep_lease(ic.Lease("lease", 5, 0))

    ledger._db.is_full = False
    assert [] == ledger.leases()
    ledger.close()


def test_a_row_that_sqlite_cannot_hold_fails_alone_and_blocks_nothing(path):
    ledger = ic.SqliteLedger(path)
    with pytest.raises(ic.LedgerUnavailable):
        ledger.intent(row(model="gpt-\ud800"))
    with pytest.raises(ic.LedgerUnavailable):
        ledger.intent(row(bound=2 ** 70))

    ledger.intent(row())

    assert 1 == len(rows(path))
    ledger.close()


def test_a_settlement_that_cannot_be_written_goes_with_the_next_write(path):
    ledger = ic.SqliteLedger(path)
    ledger._db = Unwritable(ledger._db)
    call = row()
    ledger.intent(call)
    ledger._db.is_full = True
    ledger.settle(settled(call))
    with pytest.raises(ic.LedgerUnavailable):
        ledger.intent(row(request_id="req_2"))
    assert [None] == [r["cost_microdollars"] for r in rows(path)]

    ledger._db.is_full = False
    ledger.intent(row(request_id="req_3"))

    assert [("req_1", 210), ("req_3", None)] == [
        (r["request_id"], r["cost_microdollars"]) for r in rows(path)]
    ledger.close()


def test_a_settlement_that_could_not_be_written_is_written_at_the_close(path):
    ledger = ic.SqliteLedger(path)
    ledger._db = Unwritable(ledger._db)
    call = row()
    ledger.intent(call)
    ledger._db.is_full = True
    ledger.settle(settled(call))
    ledger._db.is_full = False

    ledger.close()

    assert [210] == [r["cost_microdollars"] for r in rows(path)]


def test_a_ledger_that_another_program_locks_refuses_and_then_goes_on(path, monkeypatch):
    monkeypatch.setattr(ic, "LEDGER_BUSY_S", 0)
    ledger = ic.SqliteLedger(path)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")

    with pytest.raises(ic.LedgerUnavailable, match="locked"):
        ledger.intent(row())
    other.execute("COMMIT")
    other.close()
    ledger.intent(row())

    assert 1 == len(rows(path))
    ledger.close()


def test_many_threads_write_each_row_once(path):
    """They commit in groups; all that intent() returned for is on disk."""
    ledger = ic.SqliteLedger(path)
    usual_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    start = threading.Barrier(16)

    def write(number):
        start.wait()
        for count in range(20):
            call = row(request_id=f"{number}-{count}")
            ledger.intent(call)
            ledger.settle(settled(call))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(usual_s)

    written = rows(path)
    assert 320 == len({r["request_id"] for r in written}) == len(written)
    assert 320 * 210 == ledger.spent(None, 0)
    ledger.close()


@pytest.mark.parametrize("seed", seeds(8, 20))
def test_a_torn_log_loses_the_last_writes_only_and_never_half_of_one(path, tmp_path, seed):
    """What a loss of power may leave: the write-ahead log, cut at any place."""
    ledger = ic.SqliteLedger(path)
    for number in range(12):
        call = row(request_id=number)
        ledger.intent(call)
        if number % 3:
            ledger.settle(settled(call))
    torn = str(tmp_path / "torn.db")
    with open(path, "rb") as db, open(path + "-wal", "rb") as log:
        whole, wal = db.read(), log.read()
    ledger.close()
    with open(torn, "wb") as db, open(torn + "-wal", "wb") as log:
        db.write(whole)
        log.write(wal[:len(wal) * (seed + 1) // 21 - seed])

    try:
        ledger = ic.SqliteLedger(torn)
    except ic.Misconfigured:
        pytest.fail("a torn log makes the ledger unusable")
    kept = rows(torn)

    assert [r["request_id"] for r in kept] == [str(n) for n in range(len(kept))]
    assert all(r["cost_microdollars"] in (210, 1_000) for r in kept)
    assert all(ic.audit_row(r) is None for r in kept)
    ledger.close()


# Auditing.

def test_a_row_that_adds_up_is_right():
    assert ic.audit_row(ic.stored_row(settled(row()))) is None


@pytest.mark.parametrize("change, fault", [
    ({"cost_microdollars": 209}, "come to 210"),
    ({"lines": '[["input",1000,150000]]', "cost_microdollars": 150}, "output"),
    ({"lines": '[["input",1000,150000],["output",101,600000]]', "cost_microdollars": 211},
     "output"),
    ({"usage": '{"prompt_tokens": 1, "completion_tokens": 100}'}, "input"),
    ({"usage": "{"}, "cannot be read"), ({"lines": "[[1]]"}, "cannot be read"),
    ({"lines": None}, "cannot be read"), ({"api": "nonsense"}, "cannot be read"),
    ({"bound_microdollars": -1}, "negative"),
])
def test_a_row_that_was_tampered_with_is_found(change, fault):
    assert fault in ic.audit_row({**ic.stored_row(settled(row())), **change})


def test_rates_that_are_not_whole_are_kept_exactly():
    lines = [("input", 3, Fraction(1, 3)), ("output", 1, 7)]

    assert lines == ic.lines_from_json(ic.lines_to_json(lines))


def test_the_report_groups_by_model_token_and_day(path):
    ledger = ic.SqliteLedger(path)
    for token, model, at in (("a", "m1", 0), ("a", "m2", 86_400), ("b", "m1", 86_400)):
        call = row(token, admitted_s=1_795_996_800 + at, price_key=model)
        ledger.intent(call)
        ledger.settle(settled(call))
    ledger.intent(row("c", admitted_s=1_795_996_800, price_key=None))

    report = ic.usage_report(path, 0)
    later = ic.usage_report(path, 1_795_996_800 + 86_400)

    assert [("m1", 420), ("m2", 210), ("other", 1_000)] == [
        (r["model"], r["cost_microdollars"]) for r in report["by_model"]]
    assert [("a", 2), ("b", 1), ("c", 1)] == [(r["token"], r["requests"])
                                              for r in report["by_token"]]
    assert ["2026-11-30", "2026-12-01"] == [r["day"] for r in report["by_day"]]
    assert (1_630, 1) == (report["total"]["cost_microdollars"],
                          report["total"]["unsettled_requests"])
    assert 420 == later["total"]["cost_microdollars"]
    ledger.close()


def test_no_placeholder_of_a_statement_has_a_number():
    """Where one is bound to a sequence Python 3.12.0 warns, and announces that 3.14 refuses it."""
    texts = [node.value for node in walked(tree_of(PROGRAM))
             if isinstance(node, ast.Constant) and isinstance(node.value, str)]

    assert [] == [text for text in texts if re.search(r"(=|>|<|\(|,|\+) ?\?\d", text)]
