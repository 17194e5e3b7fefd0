"""Four processes on one cage while they, and the engine, are killed: never over at any poll, and at
rest what is spent is what their ledgers say, with the bounds of those that left no row."""
from __future__ import annotations

import contextlib
import json
import signal
import threading
import time
from random import Random

import pytest
from engines import RealEngine
from forked import MAIN
from support import Gate, MockProvider, Served, call, pause, proxy_environment, until

import ironcage_proxy as ic

# The program with short heartbeats: what takes half a minute in a cage takes a second or two.
QUICK = """
import sys, ironcage_proxy as ic
ic.HEARTBEAT_S, ic.DEAD_S, ic.CATCH_UP_S = 0.2, 1, 0.1
sys.exit(ic.main())
"""
TOKENS = [("day", "day", "0.8"), ("week", "week", "0.9"), ("total", "total", "1")]
PATIENCE_S = 30


def secret(name):
    return f"tok-{name}-0123456789"


class Fleet:
    """Processes on one cage of an engine, each with a ledger of its own, that come back."""

    def __init__(self, folder, engine, mock, budget, count=4, code=QUICK):
        self.folder, self.engine, self.mock, self.code = folder, engine, mock, code
        self.cage = engine.cage()
        self.limit = ic.parse_usd(budget)
        self.limits = {"proxy": self.limit}
        rows = []
        for name, period, share in TOKENS:
            limit = int(self.limit * float(share))
            self.limits[name] = limit
            rows.append({"name": name, "token": secret(name), "period": period,
                         "budget_usd": f"{limit / 10 ** 6:.6f}"})
        self.config = folder / f"{self.cage}.json"
        self.config.write_text(json.dumps({"tokens": rows}))
        self.flags = ["--shared", engine.url, "--cage", self.cage, "--budget", budget, "--config",
                      str(self.config), "--wait", "1"]
        self.ledgers = [folder / f"{self.cage}-{number}.db" for number in range(count)]
        self.processes = [self.started(number) for number in range(count)]

    def started(self, number):
        for _ in range(100):                    # the engine may be away just now
            with contextlib.suppress(AssertionError):
                return Served(*self.flags, "--ledger", str(self.ledgers[number]),
                              code=self.code, environ=proxy_environment(self.mock))
            pause(0.1, "the engine may be away")
        raise AssertionError("a process did not start")

    def kill(self, number):
        self.processes[number].__exit__()
        self.processes[number] = self.started(number)

    def call(self, number, token, most=200):
        with contextlib.suppress(OSError, AssertionError, ValueError):
            call(self.processes[number].port, "POST", "/v1/chat/completions", {
                "model": "gpt-4o-mini", "max_tokens": most,
                "messages": [{"role": "user", "content": "hello"}]}, token=secret(token))

    def amounts(self, scope="proxy"):
        words = iter(self.engine.ask("HGETALL", "{ironcage:%s}:scope:%s" % (self.cage, scope)))
        fields = {name.decode(): value.decode() for name, value in zip(words, words)}
        return tuple(int(fields.get(what + fields["since"], 0)) for what in "sr")

    def at_rest(self):
        """(spent, of which by calls that are in no ledger), once nothing is reserved."""
        def is_still():
            with contextlib.suppress(ic.IroncageError):
                return not self.amounts()[1]
        until(is_still, "nothing is reserved")
        client = ic.Engine(ic.parse_engine_url(self.engine.url), ic.Slot(), 10)
        report = ic.shared_usage(client, self.cage, 0)
        client.close()
        assert self.amounts()[0] == report["total"]["cost_microdollars"]
        return self.amounts()[0], sum(row["cost_microdollars"] for row in report["by_model"]
                                      if row["model"] == "cut off")

    def rows(self):
        return sum(ic.ledger_rows(str(path), "SELECT COALESCE(SUM(COALESCE(cost_microdollars, "
                                  "bound_microdollars)), 0) AS s FROM calls")[0]["s"]
                   for path in self.ledgers)

    def stop(self):
        for process in self.processes:
            process.__exit__()


def survives(tmp_path, mock, *, seconds, threads, kill_every_s, kill_engine_every_s, budget):
    engine = RealEngine(tmp_path, "--appendonly", "yes", "--appendfsync", "always")
    fleet, tight = (Fleet(tmp_path, engine, mock, amount, count) for amount, count in (
        (budget, 4), ("0.0005", 1)))
    rng, over, polls, ends_s = Random(7), [], [0], time.monotonic() + seconds
    starts = threading.Lock()                   # a process that starts needs its engine

    def spend(number):
        own = Random(number)
        while time.monotonic() < ends_s:
            fleet.call(own.randrange(4), own.choice(TOKENS)[0], own.choice([5, 200, 2_000]))
            if number == 0:
                tight.call(0, "total", 300)

    def poll():
        while time.monotonic() < ends_s:
            for one in (fleet, tight):
                for scope, limit in one.limits.items():
                    with contextlib.suppress(ic.IroncageError):
                        spent, reserved = one.amounts(scope)
                        polls[0] += 1
                        if spent + reserved > limit or min(spent, reserved) < 0:
                            over.append((scope, spent, reserved, limit))
            pause(0.01, "between two looks")

    def break_engine():
        while kill_engine_every_s and time.monotonic() + kill_engine_every_s < ends_s:
            pause(kill_engine_every_s, "load of some length")
            with starts:
                engine.kill()
                pause(0.3, "the engine is away")
                engine.start()

    running = [threading.Thread(target=spend, args=(number,)) for number in range(threads)] + [
        threading.Thread(target=poll), threading.Thread(target=break_engine)]
    try:
        for thread in running:
            thread.start()
        while time.monotonic() + kill_every_s < ends_s:
            pause(kill_every_s, "load of some length")
            with starts:
                fleet.kill(rng.randrange(4))
        for thread in running:
            thread.join()
        spent, cut_off = fleet.at_rest()
        tight_spent, _ = tight.at_rest()
        for one in (fleet, tight):
            for process in one.processes:
                process.stop()
        assert [] == over and polls[0] > 10
        assert mock.billed_microdollars <= spent + tight_spent
        assert spent <= fleet.limit and 0 < tight_spent <= tight.limit
        assert spent == fleet.rows() + cut_off
        assert 0 < spent
    finally:
        fleet.stop()
        tight.stop()
        engine.stop()


def test_processes_and_the_engine_are_killed_and_no_limit_is_passed(tmp_path, mock):
    survives(tmp_path, mock, seconds=1.8, threads=8, kill_every_s=0.4, kill_engine_every_s=0.8,
             budget="2")


@pytest.mark.soak
def test_for_two_minutes_processes_and_the_engine_are_killed(tmp_path, mock):
    survives(tmp_path, mock, seconds=120, threads=128, kill_every_s=1, kill_engine_every_s=30,
             budget="20")


@pytest.mark.parametrize("code, stalled_s", [
    (QUICK, 0), pytest.param(MAIN, 60, marks=pytest.mark.soak)])
def test_a_process_that_is_stopped_and_goes_on_settles_late_and_is_corrected(
        tmp_path, engine, code, stalled_s):
    with MockProvider() as mock:
        fleet = Fleet(tmp_path, engine, mock, "1", 2, code)
        gate = Gate()
        mock.script(lambda request: mock.default_reply(request).with_steps(
            [gate, *mock.default_reply(request).steps]))
        try:
            thread = threading.Thread(target=fleet.call, args=(0, "day", 4_000))
            thread.start()
            mock.wait_for_requests(1)
            _, bound = fleet.amounts("day")

            fleet.processes[0].process.send_signal(signal.SIGSTOP)
            gate.event.set()
            pause(stalled_s, "until it is taken for dead")
            until(lambda: fleet.amounts("day") == (bound, 0), "it is charged at its bound")
            fleet.processes[0].process.send_signal(signal.SIGCONT)
            until(lambda: fleet.amounts("day")[0] < bound, "that is corrected")
            thread.join()

            assert (mock.billed_microdollars, 0) == fleet.amounts("day") == fleet.amounts()
            fleet.call(0, "day")
            until(lambda: fleet.amounts() == (mock.billed_microdollars, 0), "and it goes on")
        finally:
            fleet.stop()
