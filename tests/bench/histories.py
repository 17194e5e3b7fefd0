"""Long histories: a ledger of 2,000,000 rows, made by SQL in seconds, and what it costs to use it.

    python tests/bench/histories.py [--rows 2000000] [--made FILE]

It prints, for a ledger as 0.2.3 wrote it and for the same one afterwards, what a start, `usage`,
`audit` and folding take, each in a process of its own: CPU, which other work on the machine changes
less than the clock, the clock, and the most memory; and the latency of calls beside four readers.
FILE is where the first ledger is kept for the next time.
"""
from __future__ import annotations

import argparse
import os
import shutil
import sqlite3
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import ironcage_proxy as ic

TOKENS, DAYS = 20, 200
# Columns and rows as 0.2.3 wrote them, with usage and bills that add up at gpt-4o-mini's price.
ROWS = """
WITH RECURSIVE counted(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM counted WHERE n < :rows),
called AS (SELECT n, :start + n * :seconds / :rows AS at_s, 200 + n % 5000 AS input,
                  20 + n % 700 AS output FROM counted)
INSERT INTO calls SELECT n, printf('req_%016x', n), at_s, printf('token%02d', n % :tokens), 'openai',
  'gpt-4o-mini', 'gpt-4o-mini', 'chat', n % 2, 5000, at_s * 1000 + 900,
  (input * 150000 + output * 600000 + 999999) / 1000000, NULL, 200, input, 0, output,
  printf('{"prompt_tokens": %d, "completion_tokens": %d, "total_tokens": %d, '
         || '"prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0}}',
         input, output, input + output),
  printf('[["input",%d,150000],["output",%d,600000]]', input, output),
  printf('req_%016x', n * 7919), 900, 300 FROM called"""


def make_old_ledger(path: str, rows: int, days: int = DAYS) -> None:
    """A ledger of 0.2.3 (version 3) with this many settled rows over the last days."""
    with open(path, "wb"):
        pass
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = OFF")
    for script in ic.MIGRATIONS[:3]:
        db.execute(script)
    db.execute("PRAGMA user_version = 3")
    now = int(time.time())
    db.execute(ROWS, {"rows": rows, "start": now - days * ic.DAY_S, "seconds": days * ic.DAY_S,
                      "tokens": TOKENS})
    db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    db.close()


def measured(what: str, action) -> None:
    """Do it in a child, whose memory and CPU are its own; a command's are its child's."""
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        try:
            action()
        finally:
            sys.stdout.flush()
            os._exit(0 if sys.exc_info()[0] is None else 1)
    _, status, used = os.wait4(child, 0)
    assert status == 0, what
    print(f"{what:52} {used.ru_utime + used.ru_stime:8.2f} s CPU {time.monotonic() - began:8.2f} s "
          f"{used.ru_maxrss // 1024:5} MB", flush=True)


def start(path: str) -> ic.SqliteLedger:
    """What a server with a period for each of 20 tokens asks of a ledger at its start."""
    ledger = ic.SqliteLedger(path)
    controller = ic.CostController(spent_microdollars=ledger.spent(None, 0))
    for number in range(TOKENS):
        name = f"token{number:02}"
        controller.set_scopes([ic.Scope(
            name, 10 ** 9, "month", None,
            lambda since_s, name=name: ledger.spent(name, since_s))])
    return ledger


def run(*argv: str) -> None:
    """A command of the program, in place of this process; it prints to a file."""
    os.dup2(os.open("/dev/null", os.O_WRONLY), 1)
    os.execv(sys.executable, [sys.executable, str(ROOT / "ironcage_proxy.py"), *argv])


def tend(ledger: ic.SqliteLedger) -> None:
    """All of its upkeep, without pauses."""
    while ledger.tend():
        pass
    ledger.close()


def latencies(path: str, readers: int, seconds: float) -> None:
    """Calls of the echo model, one after another, while others read what was used."""
    from support import TOKEN, call, start_proxy, MockProvider
    with MockProvider() as mock:
        proxy = start_proxy(mock, "--ledger", path)
        over, took = threading.Event(), []

        def read() -> None:
            while not over.is_set():
                call(proxy.port, "GET", "/ironcage/usage?limit=200")

        threads = [threading.Thread(target=read) for _ in range(readers)]
        for thread in threads:
            thread.start()
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            began = time.monotonic()
            answer = call(proxy.port, "POST", "/v1/chat/completions", {
                "model": ic.ECHO_MODEL, "max_tokens": 9,
                "messages": [{"role": "user", "content": "hi"}]}, token=TOKEN)
            took.append(time.monotonic() - began)
            assert answer.status == 200
        over.set()
        for thread in threads:
            thread.join()
        proxy.stop()
    took.sort()
    print(f"calls beside {readers} readers of /ironcage/usage: {len(took)}, "
          f"p50 {took[len(took) // 2] * 1000:.1f} ms, p99 {took[len(took) * 99 // 100] * 1000:.1f}"
          f" ms, longest {took[-1] * 1000:.1f} ms", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--made")
    given = parser.parse_args()
    rows = given.rows
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "cage.db")
        made = given.made or os.path.join(folder, "made.db")
        if not os.path.exists(made):
            measured(f"{rows} rows as 0.2.3 wrote them", lambda: make_old_ledger(made, rows))
        shutil.copy(made, path)
        print(f"    {os.path.getsize(path) / 1e6:.0f} MB")
        measured("usage of it, which writes nothing", lambda: run("usage", "--ledger", path))
        measured("the first start, which brings it up to date", lambda: start(path).close())
        measured("sealing the rest", lambda: tend(ic.SqliteLedger(path)))
        measured("a start, 20 tokens with periods", lambda: start(path).close())
        measured("usage", lambda: run("usage", "--ledger", path))
        measured("usage --by token,day --since 7d",
                 lambda: run("usage", "--ledger", path, "--by", "token,day", "--since", "7d"))
        measured("usage --by project,hour --since 24h",
                 lambda: run("usage", "--ledger", path, "--by", "project,hour", "--since", "24h"))
        measured("audit", lambda: run("audit", "--ledger", path))
        for readers in (0, 4):
            latencies(path, readers, 5)
        measured("folding all but 30 days", lambda: tend(ic.SqliteLedger(path, keep_days=30)))
        measured("usage", lambda: run("usage", "--ledger", path))
        measured("audit", lambda: run("audit", "--ledger", path))


if __name__ == "__main__":
    main()
