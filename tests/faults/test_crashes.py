"""What survives: kill -9 at any moment, a full disk, a limit changed in between.

The provider's bill is the mock's, which outlives the proxy and goes on counting what it made.
"""
import json
import os
import random
import sqlite3
import threading
import time

import pytest
from support import (PATIENCE_S, TOKEN, Gate, MockProvider, RawClient, Served, call, pause,
                     program, proxy_environment)

CHAT = {"model": "gpt-4o-mini", "max_tokens": 400,
        "messages": [{"role": "user", "content": "hello there"}]}
MESSAGE = {**CHAT, "model": "claude-haiku-4-5"}

IMPATIENT = """
import sys, ironcage_proxy as ic
ic.LEDGER_BUSY_S = 0.2
sys.exit(ic.main())
"""

posix = pytest.mark.skipif(os.name != "posix", reason="SIGKILL and file limits are POSIX")


def served(mock, path, *argv, **options):
    return Served("--token", TOKEN, "--ledger", path, "--quiet", *argv,
                  environ=proxy_environment(mock), **options)


def charged(path):
    """What a ledger holds, read as `usage` reads it: settled costs, and bounds of the others."""
    return program().usage_report(path, 0)["total"]["cost_microdollars"]


def load(port, is_over, seed):
    """Calls of all kinds until the server is gone; some clients hang up in the middle."""
    rng = random.Random(seed)
    while not is_over.is_set():
        fields = {**rng.choice([CHAT, MESSAGE]), "stream": rng.random() < 0.5}
        path = "/v1/messages" if fields["model"] == MESSAGE["model"] else "/v1/chat/completions"
        try:
            with RawClient(port) as client:
                client.request("POST", path, json.dumps(fields).encode())
                if rng.random() < 0.8:
                    client.read_answer()
        except (OSError, EOFError, AssertionError, ValueError):
            pause(0.002, "the server is being killed")


def kill_under_load(mock, path, rng, *argv):
    """One round: serve, load from 6 threads, kill -9 at a random moment."""
    with served(mock, path, *argv) as server:
        is_over = threading.Event()
        threads = [threading.Thread(target=load, args=(server.port, is_over, rng.random()))
                   for _ in range(6)]
        for thread in threads:
            thread.start()
        pause(rng.uniform(0.01, 0.4), "load of some length")
        server.process.kill()
        server.process.wait(PATIENCE_S)
        is_over.set()
    return threads


def settle_down(mock):
    """Wait until the mock has no connection of the dead proxy left, so that its bill is final."""
    before = -1
    while before != mock.billed_microdollars:
        before = mock.billed_microdollars
        pause(0.05, "the mock bills what it has sent")
    return before


def rounds_of_kill_9(tmp_path, rounds, limit="0.03"):
    rng, path = random.Random(rounds), str(tmp_path / "cage.db")
    limit_microdollars = program().parse_usd(limit)
    recoveries_ms = []
    with MockProvider() as mock:
        for number in range(rounds):
            threads = kill_under_load(mock, path, rng, "--budget", limit, "--wait", "1")
            began = time.monotonic()
            ledger = program().SqliteLedger(path)           # what the next start does
            recoveries_ms.append((time.monotonic() - began) * 1000)
            in_ledger = ledger.spent(None, 0)
            ledger.close()
            for thread in threads:
                thread.join()
            bill = settle_down(mock)
            assert bill <= in_ledger <= limit_microdollars, f"round {number}"
        assert in_ledger > limit_microdollars // 4, "the load was too light"
    rows = program().ledger_rows(path, "SELECT * FROM calls")
    assert [] == [row["id"] for row in rows if program().audit_row(row) is not None]
    assert [] == program().LedgerAudit(path).faults
    cut_off = sum(row["estimated"] == "the proxy ended" for row in rows)
    print(f"{rounds} rounds, {len(rows)} calls, {cut_off} cut off; billed {bill}, in the ledger "
          f"{in_ledger} of {limit_microdollars}; recovery at most {max(recoveries_ms):.1f} ms")


@posix
def test_kill_9_under_load_never_loses_a_charge_and_never_passes_the_limit(tmp_path):
    rounds_of_kill_9(tmp_path, 4, limit="0.004")


@pytest.mark.soak
@posix
def test_50_rounds_of_kill_9(tmp_path):
    rounds_of_kill_9(tmp_path, 50, limit="0.20")


@posix
def test_a_call_that_was_cut_off_is_charged_at_its_bound_on_the_next_start(tmp_path):
    path = str(tmp_path / "cage.db")
    gate = Gate()
    with MockProvider() as mock:
        mock.script(lambda request: mock.default_reply(request).with_steps(
            [gate, *mock.default_reply(request).steps]))
        with served(mock, path, "--budget", "1") as server, RawClient(server.port) as client:
            client.request("POST", "/v1/chat/completions", json.dumps(CHAT).encode())
            mock.wait_for_requests(1)
            assert 1 == program().usage_report(path, 0)["total"]["unsettled_requests"]
            server.process.kill()
            server.process.wait(PATIENCE_S)
        gate.event.set()
        with served(mock, path, "--budget", "1") as server:
            status = call(server.port, "GET", "/ironcage/status").json
            rows = call(server.port, "GET", "/ironcage/usage").json["rows"]

    [row] = rows
    assert ("the proxy ended", row["bound_microdollars"]) == (row["estimated"],
                                                              row["cost_microdollars"])
    assert status["spent_microdollars"] == row["bound_microdollars"] > 200


def test_the_budget_counts_all_time_in_the_ledger(tmp_path):
    path = str(tmp_path / "cage.db")
    with MockProvider() as mock:
        for expected in (200, 402):
            with served(mock, path, "--budget", "0.0003") as server:
                answer = call(server.port, "POST", "/v1/chat/completions", CHAT)
                assert expected == answer.status
                mock.input_tokens = 200
                while expected == 200 and call(
                        server.port, "POST", "/v1/chat/completions", CHAT).status == 200:
                    pass
                server.stop()
        assert mock.billed_microdollars == charged(path)


@posix
def test_a_full_disk_refuses_new_calls_and_loses_none(tmp_path):
    """A limit on the size of files stands for the full disk; writes beyond it fail."""
    path = str(tmp_path / "cage.db")

    def small_files():
        import resource
        import signal
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (512 * 1024, 512 * 1024))

    with MockProvider() as mock:
        with served(mock, path, "--budget", "10", preexec_fn=small_files) as server:
            statuses = []
            while len(statuses) < 2_000 and 503 not in statuses:
                statuses.append(call(server.port, "POST", "/v1/chat/completions", CHAT).status)
            again = call(server.port, "POST", "/v1/chat/completions", CHAT)
            sent = len(mock.seen)
            status = call(server.port, "GET", "/ironcage/status").json
            server.stop()

        assert 503 in statuses and statuses.count(200) > 20
        assert "iron_cage_ledger_unavailable" == again.json["error"]["type"]
        assert statuses.count(200) == sent
        assert mock.billed_microdollars == status["spent_microdollars"] <= charged(path)


def test_a_ledger_locked_by_another_program_refuses_and_goes_on_afterwards(tmp_path):
    path = str(tmp_path / "cage.db")
    with MockProvider() as mock, served(mock, path, "--budget", "10", code=IMPATIENT) as server:
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        refused = call(server.port, "POST", "/v1/chat/completions", CHAT)
        other.execute("COMMIT")
        other.close()
        admitted = call(server.port, "POST", "/v1/chat/completions", CHAT)

        assert (503, 200) == (refused.status, admitted.status)
        assert mock.billed_microdollars == charged(path)


def test_a_put_budget_lasts_until_the_restart(tmp_path):
    from support import ADMIN_TOKEN
    path = str(tmp_path / "cage.db")
    with MockProvider() as mock:
        flags = ("--budget", "1.00", "--admin-token", ADMIN_TOKEN)
        with served(mock, path, *flags) as server:
            put = call(server.port, "PUT", "/ironcage/budget", {"limit_usd": "20.00"},
                       token=ADMIN_TOKEN)
            assert 20_000_000 == put.json["limit_microdollars"]
        with served(mock, path, *flags) as server:
            assert 1_000_000 == call(server.port, "GET",
                                     "/ironcage/budget").json["limit_microdollars"]
