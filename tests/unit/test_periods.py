"""Periods of budgets: a charge belongs to the period of its admission, whatever is reloaded when.

The model keeps a list of calls and sums it. A call is reserved, written down, settled in memory
and settled in the ledger as four steps, as in the Router, so that a reload falls between any two.
"""
import datetime
import threading
from random import Random

import pytest
from support import seeds

import ironcage_proxy as ic

DAY_S = 86_400
START_S = int(datetime.datetime(2026, 11, 29, 23, 58, tzinfo=datetime.timezone.utc).timestamp())


class Clock:
    """Unix seconds that stand still until a test moves them."""

    def __init__(self, now_s=START_S):
        self.now_s = now_s

    def __call__(self):
        return self.now_s


def start_of(period, now_s):
    """The first second of the period that holds `now_s`, by the calendar."""
    now = datetime.datetime.fromtimestamp(now_s, datetime.timezone.utc)
    first = {"total": datetime.date(1970, 1, 1), "day": now.date(),
             "week": now.date() - datetime.timedelta(days=now.weekday()),
             "month": now.date().replace(day=1)}[period]
    midnight = datetime.datetime.combine(first, datetime.time(), datetime.timezone.utc)
    return int(midnight.timestamp())


class Life:
    """One call of one token, and the next step of it."""

    def __init__(self, controller, ledger, bound, cost):
        self.controller, self.ledger, self.cost = controller, ledger, cost
        self.claim = controller.ask(ic.fixed_bound(bound), ["a"])
        self.row, self.is_settled = None, False
        self.steps = iter((self._intend, self._settle_in_memory, self._settle_in_the_ledger))

    def step(self):
        """Take the next step; False when there is none."""
        action = next(self.steps, None)
        if action is not None:
            action()
        return action is not None

    def _intend(self):
        self.row = {**dict.fromkeys(ic.LEDGER_COLUMNS), "request_id": "r", "token": "a",
                    "admitted_s": self.claim.admitted_s, "provider": "p", "model": "m",
                    "api": "chat", "stream": 0, "bound_microdollars": self.claim.microdollars}
        self.ledger.intent(self.row)

    def _settle_in_memory(self):
        self.controller.commit(self.claim, self.cost)
        self.is_settled = True

    def _settle_in_the_ledger(self):
        self.ledger.settle({**self.row, "settled_ms": 1, "cost_microdollars": self.cost,
                            "lines": [], "usage": None})


def reload(controller, ledger, limit, period):
    controller.set_scopes([ic.Scope("a", limit, period, None,
                                    lambda since_s: ledger.spent("a", since_s))])


def spent_before(rng, ledger):
    """Calls of an earlier process, up to 40 days back."""
    earlier = []
    for _ in range(rng.randrange(6)):
        admitted_s, cost = START_S - rng.randrange(40 * DAY_S), rng.randrange(500)
        row = {**dict.fromkeys(ic.LEDGER_COLUMNS), "request_id": "r", "token": "a",
               "admitted_s": admitted_s, "provider": "p", "model": "m", "api": "chat",
               "stream": 0, "bound_microdollars": cost}
        ledger.intent(row)
        ledger.settle({**row, "settled_ms": 1, "cost_microdollars": cost, "lines": [],
                       "usage": None})
        earlier.append((admitted_s, cost))
    return earlier


@pytest.fixture(params=["memory", "sqlite"])
def ledger(request, tmp_path):
    opened = ic.MemoryLedger() if request.param == "memory" \
        else ic.SqliteLedger(str(tmp_path / "cage.db"))
    yield opened
    opened.close()


@pytest.mark.parametrize("seed", seeds(20, 60))
def test_no_interleaving_of_calls_and_reloads_loses_or_doubles_a_charge(ledger, seed):
    rng, clock = Random(seed), Clock()
    earlier = spent_before(rng, ledger)
    controller, calls = ic.CostController(clock=clock), []
    period, seen_s, limit = rng.choice(ic.PERIODS), clock(), 10 ** 6
    reload(controller, ledger, limit, period)
    for _ in range(150):
        action = rng.choice(["ask"] * 3 + ["step"] * 8 + ["reload"] * 3 + ["time"] * 2)
        if action == "ask":
            bound = rng.randrange(1, 1_000)
            calls.append(Life(controller, ledger, bound, rng.randrange(bound + 1)))
        elif action == "step" and calls:
            rng.choice(calls).step()
        elif action == "reload":
            period, limit = rng.choice(ic.PERIODS), rng.choice([None, 10 ** 6])
            reload(controller, ledger, limit, period)
        elif action == "time":
            clock.now_s += rng.choice([60, 3_600, DAY_S, 9 * DAY_S, -3_600, -2 * DAY_S])
        seen_s = max(seen_s, clock())                  # a clock that goes back reopens no period
        since_s = start_of(period, seen_s)

        spent = sum(cost for admitted_s, cost in earlier if admitted_s >= since_s) + sum(
            call.cost for call in calls if call.is_settled and call.claim.admitted_s >= since_s)
        held = sum(call.claim.microdollars for call in calls
                   if not call.is_settled and call.claim.admitted_s >= since_s)
        assert ("a", limit, spent, held) == controller.budget("a")[:4]

    for call in calls:
        while call.step():
            pass
    for every in ic.PERIODS:                          # and memory ends at what is on disk
        reload(controller, ledger, None, every)
        budget = controller.budget("a")
        assert (ledger.spent("a", budget.since_s), 0) == (budget.spent, budget.reserved)


def test_threads_that_call_while_periods_change_end_at_what_the_ledger_holds(ledger):
    clock, rng = Clock(), Random(5)
    controller = ic.CostController(clock=clock)
    reload(controller, ledger, None, "day")
    start = threading.Barrier(9)

    def call_often(number):
        own = Random(number)
        start.wait()
        for _ in range(60):
            life = Life(controller, ledger, 500, own.randrange(501))
            while life.step():
                pass

    threads = [threading.Thread(target=call_often, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    start.wait()
    while any(thread.is_alive() for thread in threads):
        clock.now_s += rng.choice([60, 3_600, 40_000])
        reload(controller, ledger, None, rng.choice(ic.PERIODS))
    for thread in threads:
        thread.join()

    for period in ic.PERIODS:
        reload(controller, ledger, None, period)
        budget = controller.budget("a")
        assert (ledger.spent("a", budget.since_s), 0) == (budget.spent, budget.reserved)


def test_a_period_that_changes_before_the_intent_is_written_forgets_no_money(ledger):
    """A reservation is not in the ledger yet: it is no part of what the ledger says was spent."""
    controller = ic.CostController(clock=Clock())
    reload(controller, ledger, 1_000, "day")
    spent = Life(controller, ledger, 700, 700)
    while spent.step():
        pass
    held = Life(controller, ledger, 300, 300)

    reload(controller, ledger, 1_000, "week")

    assert ("a", 1_000, 700, 300) == controller.budget("a")[:4]
    assert not controller.ask(ic.fixed_bound(1), ["a"]).is_open
    assert held.claim.is_open


def test_yesterdays_call_in_flight_holds_nothing_of_today_when_the_period_becomes_a_day(ledger):
    clock = Clock()
    controller = ic.CostController(clock=clock)
    reload(controller, ledger, 1_000, "total")
    late = Life(controller, ledger, 600, 600)
    clock.now_s += DAY_S

    reload(controller, ledger, 1_000, "day")
    today = controller.budget("a")
    while late.step():
        pass
    after = controller.budget("a")
    reload(controller, ledger, 1_000, "total")

    assert [(0, 0), (0, 0), (600, 0)] == [
        (amounts.spent, amounts.reserved) for amounts in (today, after, controller.budget("a"))]


def test_a_token_that_is_withdrawn_and_comes_back_finds_its_account(ledger):
    """Its name is its account, and what it spent meanwhile is counted once."""
    controller = ic.CostController(clock=Clock())
    reload(controller, ledger, 1_000, "day")
    call = Life(controller, ledger, 400, 250)
    call.step()

    reload(controller, ledger, 900, "month")          # back, under another period, call in flight
    held = controller.budget("a")
    while call.step():
        pass

    assert [(0, 400), (250, 0)] == [
        (amounts.spent, amounts.reserved) for amounts in (held, controller.budget("a"))]


@pytest.mark.parametrize("now_s", range(START_S, START_S + 70 * DAY_S, 5 * DAY_S + 7_000))
def test_what_was_spent_before_has_the_right_sum_in_every_period_now_and_later(ledger, now_s):
    rng, clock = Random(now_s), Clock(now_s)
    rows = [(now_s - rng.randrange(80 * DAY_S), rng.randrange(500)) for _ in range(40)]
    controller = ic.CostController(clock=clock)
    controller.set_scopes([ic.Scope("a", None, "total", None, lambda since_s: sum(
        cost for admitted_s, cost in rows if admitted_s >= since_s))])

    for _ in range(12):
        for period in ic.PERIODS:
            reload(controller, ledger, None, period)
            expected = sum(cost for admitted_s, cost in rows
                           if admitted_s >= start_of(period, clock()))
            assert expected == controller.budget("a").spent, period
        clock.now_s += rng.randrange(4 * DAY_S)
