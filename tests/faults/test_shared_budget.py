"""One budget for many processes, in a real engine: whoever dies, stalls, restarts or lies, spent +
reserved stays within the limit, and at rest what is spent is what was settled."""
from __future__ import annotations

import itertools
import json
import logging
import secrets
import subprocess
import threading
import time
from random import Random

import pytest
from engines import BUDGET, NIL, FakeEngine, RealEngine, free_port, many
from support import (ADMIN_TOKEN, OPENAI_KEY, PATIENCE_S, TOKEN, Gate, call, pause,
                     settled_status, status_of, until)

import ironcage_proxy as ic

CHAT = {"model": "gpt-4o-mini", "max_tokens": 500,
        "messages": [{"role": "user", "content": "hello"}]}


def fixed(microdollars):
    return ic.fixed_bound(microdollars)


@pytest.fixture
def quick(monkeypatch):
    """Heartbeats come every tenth of a second, and the dead are dead after three tenths."""
    monkeypatch.setattr(ic, "HEARTBEAT_S", 0.1)
    monkeypatch.setattr(ic, "DEAD_S", 0.3)
    monkeypatch.setattr(ic, "CATCH_UP_S", 0.05)


class Shared:
    """Accounts of one cage, as processes have them; all are closed at the end."""

    def __init__(self, engine, cage=None):
        self.engine, self.cage = engine, cage or engine.cage()
        self.all = []

    def process(self, *, ledger=None, runs=False, deadline_s=ic.ENGINE_DEADLINE_S, **options):
        accounts = ic.SharedAccounts(
            ic.Engine(ic.parse_engine_url(self.engine.url), ic.Slot(), deadline_s), self.cage,
            ledger or ic.MemoryLedger(), **options)
        self.all.append(accounts)
        if runs:
            accounts.start(lambda name: pytest.fail(name), lambda row: None)
        return ic.CostController(accounts=accounts)

    def ask(self, command, key, *words):
        return self.engine.ask(command, "{ironcage:%s}%s" % (self.cage, key), *words)

    def amounts(self, scope="proxy", period="total"):
        """(limit in force, spent, reserved), read beside the program."""
        words = iter(self.ask("HGETALL", f":scope:{scope}"))
        fields = {name.decode(): value.decode() for name, value in zip(words, words)}
        since = fields["since"]
        return tuple(int(fields.get(name, 0)) for name in (f"s{since}", f"r{since}"))

    def close(self):
        for accounts in self.all:
            accounts.close()


@pytest.fixture
def shared(engine):
    cage = Shared(engine)
    yield cage
    cage.close()


@pytest.fixture
def own_engine(tmp_path):
    started = []

    def start(*config):
        started.append(RealEngine(tmp_path, *config))
        return started[-1]
    yield start
    for one in started:
        one.stop()


# What processes share.

def test_what_one_process_reserves_and_spends_the_other_sees(shared):
    one, other = shared.process(limit=1_000), shared.process(limit=1_000)

    held = one.ask(fixed(600))

    assert (0, 600, 1_000) == other.get_full_status()
    assert not other.ask(fixed(401)).is_open
    one.commit(held, 250)
    assert (250, 0, 1_000) == other.get_full_status()
    assert other.ask(fixed(750)).is_open


def test_the_lowest_limit_that_a_process_ever_named_holds(shared, caplog):
    first = shared.process(limit=900)
    shared.process(limit=2_000)
    assert "the cage has another limit" in caplog.text
    shared.process()                                    # which names none
    lowest = shared.process(limit=500)
    lowest.accounts.close()

    assert [500, 500] == [first.budget().limit, shared.process(limit=700).budget().limit]


def test_a_put_wins_for_all_until_null_and_outlives_who_made_it(shared):
    first, second = shared.process(limit=900), shared.process(limit=900, stop_at=400)

    first.set_limits(limit=5_000, stop_at=4_000)
    assert (5_000, 4_000) == second.budget()[1::3][:2]
    assert 5_000 == shared.process(limit=100).budget().limit
    second.set_limits(limit=ic.FLAGGED, stop_at=ic.FLAGGED)

    assert (100, 400) == first.budget()[1::3][:2]


@pytest.mark.parametrize("changes", [{"limit": 400}, {"stop_at": 900}, {"stop_at": 950},
                                     {"limit": 300, "stop_at": 300}, {"limit": None}])
def test_a_stop_that_is_not_below_its_budget_changes_nothing(shared, changes):
    controller = shared.process(limit=900, stop_at=400)

    with pytest.raises(ValueError, match="must be below the budget"):
        controller.set_limits(**changes)

    assert (900, 400) == controller.budget()[1::3][:2]


def test_at_the_stop_no_process_begins_a_call_and_calls_in_flight_go_on(shared):
    one, other = shared.process(limit=1_000, stop_at=100), shared.process()
    held, late = one.ask(fixed(200)), one.ask(fixed(300))
    one.commit(held, 100)

    refused = other.ask(fixed(1), may_wait=True)

    assert ("stop_at", 100) == (refused.refused_by.ended_by, refused.refused_by.stop_at)
    one.commit(late, 300)
    assert (400, 0) == shared.amounts()


def test_what_was_to_be_half_of_what_is_free_is_not_taken_of_less(shared):
    """Decided on amounts that another process has changed meanwhile."""
    controller = shared.process(limit=1_000)
    claim = ic.Reservation(fixed(400), ("proxy",), False)

    budgets = controller.accounts.take(claim, 400, [1_001])

    assert [("proxy", 1_000, 0, 0)] == [budget[:4] for budget in budgets]
    assert (0, 0) == shared.amounts()
    assert controller.accounts.take(claim, 400, [1_000]) is None
    assert (0, 400) == shared.amounts()


def test_after_an_exchange_that_failed_those_who_come_next_do_not_wait_for_nothing(
        shared, monkeypatch):
    controller = shared.process(limit=1_000)
    controller.ask(fixed(900))
    waiting = controller.ask(fixed(800), may_wait=True)
    with monkeypatch.context() as patches:
        def fail(*_):
            raise ic.EngineFailed("away")
        patches.setattr(controller.accounts, "budgets", fail)
        controller.expire(waiting)

    with pytest.raises(ic.EngineFailed, match="away"):
        raise waiting.failure
    assert not waiting.is_waiting and controller.ask(fixed(100)).is_open


def test_a_limit_below_what_is_spent_and_reserved_is_logged(shared, caplog):
    held = shared.process(limit=900).ask(fixed(800))

    lower = shared.process(limit=500)

    assert held.is_open and lower.budget().limit == 500
    assert "the limit is below what is spent and reserved" in caplog.text
    assert not lower.ask(fixed(1)).is_open


def test_a_limit_that_a_double_cannot_hold_is_refused(shared):
    with pytest.raises(ic.Misconfigured, match="at most"):
        shared.process(limit=2 ** 53)
    with pytest.raises(ValueError, match="at most"):
        shared.process().set_budget(2 ** 53)
    assert 2 ** 53 - 1 == shared.process(limit=2 ** 53 - 1).budget().limit


def test_amounts_near_the_largest_are_exact(shared):
    controller = shared.process(limit=2 ** 53 - 1)
    controller.commit(controller.ask(fixed(2 ** 53 - 3)), 2 ** 53 - 3)

    assert not controller.ask(fixed(3)).is_open
    assert controller.ask(fixed(2)).is_open
    assert (2 ** 53 - 3, 2) == shared.amounts()


def test_a_token_whose_period_differs_is_refused_and_nothing_is_changed(shared):
    shared.process().set_scopes([ic.Scope("ci", 500, "day", None, None)])

    with pytest.raises(ic.Misconfigured, match="token ci has the period day"):
        shared.process().set_scopes([ic.Scope("new", 1, "total", None, None),
                                     ic.Scope("ci", 5, "week", None, None)])

    assert [] == shared.ask("HKEYS", ":scope:new")
    assert b"500" == shared.ask("HGET", ":scope:ci", "limit")


@pytest.mark.parametrize("period", ic.PERIODS)
def test_the_engine_begins_periods_where_we_do(engine, period):
    """Its own arithmetic, over eighty years, against that of chapter 13."""
    rng = Random(period)
    times = [rng.randrange(80 * 366 * ic.DAY_S) for _ in range(300)] + [
        ic.parse_time(day) + late for day in (
            "1970-01-01", "2000-02-29", "2000-03-01", "2026-11-30", "2027-01-01", "2028-02-29",
            "2028-03-01", "2100-03-01") for late in (-1, 0, 1) if day > "1970" or late >= 0]
    helper = ic.PRELUDE[ic.PRELUDE.index("local function start"):ic.PRELUDE.index(
        "local function scope")]
    script = helper + "local out = {} for i, at in ipairs(ARGV) do " \
        f"out[i] = start('{period}', tonumber(at)) end return out"

    assert [ic.period_start(period, at) for at in times] == engine.ask("EVAL", script, 0, *times)


def move_scope(shared, scope, seconds):
    """As if the scope's current period had begun, and all in it been admitted, so long ago."""
    key, words = f":scope:{scope}", iter(shared.ask("HGETALL", f":scope:{scope}"))
    fields = {name.decode(): value.decode() for name, value in zip(words, words)}
    since = int(fields["since"])
    for what in "sr":
        if f"{what}{since}" in fields:
            shared.ask("HSET", key, f"{what}{since - seconds}", fields[f"{what}{since}"])
            shared.ask("HDEL", key, f"{what}{since}")
    shared.ask("HSET", key, "since", since - seconds)


def test_a_new_day_begins_with_nothing_and_forgets_older_ones(shared):
    controller = shared.process(limit=10_000)
    controller.set_scopes([ic.Scope("ci", 500, "day", None, None)])
    for _ in range(3):
        controller.commit(controller.ask(fixed(500), ["ci"]), 500)
        assert not controller.ask(fixed(1), ["ci"]).is_open
        move_scope(shared, "ci", ic.DAY_S)

    assert controller.ask(fixed(500), ["ci"]).is_open
    kept = [name for name in shared.ask("HKEYS", ":scope:ci") if name[:1] in b"sr" and name[1:2]
            in b"123456789"]
    assert len(kept) <= 3 and 1_500 == controller.total_spent()


def test_a_clock_that_goes_back_reopens_no_period(shared):
    controller = shared.process()
    controller.set_scopes([ic.Scope("ci", 500, "day", None, None)])
    tomorrow = ic.period_start("day", int(time.time())) + ic.DAY_S + 60
    shared.ask("HSET", "", "seen", tomorrow)                 # the engine was there already

    held = controller.ask(fixed(400), ["ci"])

    assert ic.DAY_S <= held.admitted_s - ic.period_start("day", int(time.time()))
    controller.commit(held, 300)
    assert (300, 0) == controller.budget("ci")[2:4]


def test_cages_do_not_know_each_other(engine, shared):
    other = Shared(engine)
    shared.process(limit=1_000).ask(fixed(900))

    assert other.process(limit=1_000).ask(fixed(900)).is_open
    other.close()


def test_all_keys_of_a_cage_carry_one_hash_tag(engine, shared):
    controller = shared.process(limit=1_000)
    controller.commit(controller.ask(fixed(9)), 9)
    controller.ask(fixed(9))

    _, keys = engine.ask("SCAN", 0, "MATCH", f"*{shared.cage}*", "COUNT", 100_000)
    assert len(keys) >= 4
    assert all(key.startswith(b"{ironcage:%b}" % shared.cage.encode()) for key in keys)


# What is sent twice, late, or out of order.

def tell(controller, number, cost, record="", process=None, **more):
    accounts = controller.accounts
    accounts._settle_there(ic.Settlement(process or accounts._process, number, record, cost, **more))


def test_a_settlement_told_twice_counts_once(shared):
    controller = shared.process(limit=1_000)
    held = controller.ask(fixed(600))
    record = held.shared.split("/")[3]

    for cost in (250, 250, 600):
        tell(controller, held.number, cost, record)

    assert (250, 0) == shared.amounts()


def test_a_reservation_asked_for_twice_is_taken_once(shared):
    """As after a reply that was lost: the same id, on another connection."""
    controller = shared.process(limit=1_000)
    words = ("take", controller.accounts._process, 77, 600, "proxy", 600)

    first, again = (controller.accounts._run(*words)[0] for _ in range(2))

    assert first == again and (0, 600) == shared.amounts()


def test_a_reservation_that_was_cancelled_before_it_came_is_refused(shared):
    controller = shared.process(limit=1_000)
    tell(controller, 77, 0)

    with pytest.raises(ic.EngineFailed, match="given up"):
        controller.accounts._run("take", controller.accounts._process, 77, 600, "proxy", 600)

    assert (0, 0) == shared.amounts()


def test_a_settlement_of_a_call_that_the_engine_forgot_is_charged_once(shared):
    controller = shared.process(limit=1_000)
    record = f"600|{int(time.time())}|proxy"

    for _ in range(2):
        tell(controller, 77, 250, record)

    assert (250, 0) == shared.amounts()


def test_a_settlement_older_than_every_tombstone_is_logged_and_not_charged(shared, caplog):
    controller = shared.process(limit=1_000)

    tell(controller, 77, 250, f"600|{int(time.time()) - ic.TOMBSTONE_S - 10}|proxy")

    assert (0, 0) == shared.amounts()
    assert "not charged: its bound stands" in caplog.text


def test_tombstones_outlive_the_day_in_which_they_are_believed(shared):
    controller = shared.process(limit=1_000)
    controller.commit(controller.ask(fixed(9)), 9)

    left_s = shared.ask("TTL", f":done:{controller.accounts._process}")
    assert left_s > ic.TOMBSTONE_S + 3_600


def charge(survivor, dead):
    """What a judge does once the dead one is known to be that."""
    accounts = survivor.accounts
    beats = iter(accounts._run("beat", accounts._process, "proxy", 0)[0])
    known = {name.decode(): beat.decode() for name, beat in zip(beats, beats)}
    accounts._charge_dead(dead.accounts._process, known[dead.accounts._process])


def test_open_calls_of_the_dead_are_charged_and_a_late_settlement_corrects_that_once(shared,
                                                                                    caplog):
    dead, judge = shared.process(limit=1_000), shared.process(limit=1_000)
    held = dead.ask(fixed(600))

    charge(judge, dead)
    assert (600, 0) == shared.amounts()
    dead.commit(held, 250)                                   # it was only asleep
    tell(dead, held.number, 250, held.shared.split("/")[3])

    assert (250, 0) == shared.amounts()
    assert "corrects what was charged" in caplog.text
    assert dead.ask(fixed(750)).is_open                      # and it goes on


def test_many_open_calls_of_the_dead_are_charged_at_once(shared):
    dead, judge = shared.process(limit=10 ** 6), shared.process(limit=10 ** 6)
    for _ in range(450):
        dead.ask(fixed(7))

    charge(judge, dead)

    assert (450 * 7, 0) == shared.amounts()
    assert shared.ask("HGET", ":beats", dead.accounts._process) is None


def test_a_worst_case_that_the_engine_cannot_add_up_poisons_nothing(shared):
    controller = shared.process()
    claim = controller.ask(fixed(10 ** 18))                  # of a call that nothing limits

    controller.commit(claim, 7)

    assert (7, 0) == shared.amounts()
    limited = shared.process(limit=ic.MOST_SHARED)
    assert not limited.ask(fixed(10 ** 18)).is_open


def test_what_cannot_be_settled_by_one_that_stops_is_charged_as_of_the_dead(shared, quick):
    shared.process(runs=True, limit=1_000)
    leaving = shared.process()
    claim, tombs = leaving.ask(fixed(500)), f":done:{leaving.accounts._process}"
    shared.ask("HSET", tombs, "no", "bitmap")

    leaving.commit(claim, 200)
    leaving.accounts.close()
    assert (0, 500) == shared.amounts()
    shared.ask("DEL", tombs)

    until(lambda: shared.amounts() == (500, 0), "the bound is charged")


def test_a_process_that_beats_again_is_not_charged(shared):
    dead, judge = shared.process(limit=1_000), shared.process(limit=1_000)
    held = dead.ask(fixed(600))
    accounts = judge.accounts
    before = shared.ask("HGET", ":beats", dead.accounts._process).decode()

    dead.accounts._beat()
    accounts._charge_dead(dead.accounts._process, before)

    assert (0, 600) == shared.amounts() and held.is_open


def test_a_process_that_was_taken_for_dead_is_judged_again_if_it_dies_later(shared):
    dead, judge = shared.process(limit=1_000), shared.process(limit=1_000)
    charge(judge, dead)
    held = dead.ask(fixed(600))                              # no heartbeat since

    charge(judge, dead)

    assert held.is_open and (600, 0) == shared.amounts()


def test_a_heartbeat_charges_what_the_engine_holds_of_us_and_we_do_not_know(shared):
    controller = shared.process(limit=1_000)
    controller.accounts._run("take", controller.accounts._process, 77, 600, "proxy", 600)
    known = controller.ask(fixed(100))
    controller.accounts._beat()
    assert (0, 700) == shared.amounts()                      # it may be on its way back to us

    controller.accounts._last_number = 77                    # it is not
    controller.accounts._beat()

    assert (600, 100) == shared.amounts() and known.is_open


def test_a_heartbeat_enters_again_what_the_engine_lost_of_us(shared):
    controller = shared.process(limit=1_000)
    held = controller.ask(fixed(600))
    shared.ask("DEL", f":open:{controller.accounts._process}")
    shared.ask("HSET", ":scope:proxy", "r0", 0)

    for _ in range(2):
        controller.accounts._beat()

    assert (0, 600) == shared.amounts()
    controller.commit(held, 50)
    assert (50, 0) == shared.amounts()


def test_a_call_that_has_ended_is_not_entered_again(shared):
    controller = shared.process(limit=1_000)
    held = controller.ask(fixed(600))
    record = held.shared.split("/")[3]
    controller.commit(held, 5)

    controller.accounts._open[held.number] = record
    controller.accounts._beat()

    assert (5, 0) == shared.amounts()


def test_a_call_that_is_being_taken_is_not_entered_by_force(shared):
    controller = shared.process(limit=1_000)
    controller.accounts._open[77] = ""                       # sent, and not answered yet

    controller.accounts._beat()

    assert (0, 0) == shared.amounts()
    assert 0 == shared.ask("HEXISTS", f":open:{controller.accounts._process}", 77)


# Threads, processes, and the limit at every instant.

@pytest.mark.parametrize("limit", [50_000, 10 ** 9])
def test_threads_of_four_processes_never_pass_the_limit(shared, limit):
    processes = [shared.process(limit=limit, runs=True, deadline_s=10) for _ in range(4)]
    for process in processes:
        process.set_scopes([ic.Scope("ci", limit // 2, "day", None, None)])
    charged, over, start = [0] * 16, [], threading.Barrier(17)

    def spend(number):
        rng, controller = Random(number), processes[number % 4]
        start.wait()
        held = []
        for _ in range(25):
            claim = controller.ask(fixed(rng.randrange(6_000)), rng.choice([(), ("ci",)]))
            if claim.is_open:
                held.append(claim)
            if held and rng.random() < 0.7:
                claim = held.pop(rng.randrange(len(held)))
                actual = rng.choice([0, rng.randrange(claim.microdollars // 50 + 1)])
                controller.commit(claim, actual)
                charged[number] += actual
        for claim in held:
            controller.cancel(claim)

    threads = [threading.Thread(target=spend, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    start.wait()
    while any(thread.is_alive() for thread in threads):
        spent, reserved = shared.amounts()
        if spent + reserved > limit or min(spent, reserved) < 0:
            over.append((spent, reserved))
    for thread in threads:
        thread.join()

    assert [] == over
    assert (sum(charged), 0) == shared.amounts()


def test_one_that_waits_is_admitted_when_another_process_settles(shared):
    one, other = shared.process(limit=1_000), shared.process(limit=1_000)
    held, admitted = one.ask(fixed(900)), []
    thread = threading.Thread(target=lambda: admitted.append(
        other.admit(fixed(900), wait_s=6 * PATIENCE_S)), daemon=True)
    thread.start()
    until(lambda: other._queue, "it waits")

    one.commit(held, 10)
    thread.join(PATIENCE_S)

    assert admitted and admitted[0].is_open and (10, 900) == shared.amounts()


def test_one_that_waits_hears_of_a_limit_that_another_process_raises(shared):
    one, other = shared.process(limit=1_000), shared.process(limit=1_000)
    one.ask(fixed(900))
    admitted = []
    thread = threading.Thread(target=lambda: admitted.append(
        other.admit(fixed(900), wait_s=6 * PATIENCE_S)), daemon=True)
    thread.start()
    until(lambda: other._queue, "it waits")

    one.set_budget(2_000)
    thread.join(PATIENCE_S)

    assert admitted and admitted[0].is_open


def test_one_that_leaves_while_its_reservation_is_under_way_holds_nothing(shared, monkeypatch):
    controller = shared.process(limit=1_000)
    first = controller.ask(fixed(900))
    waiting = controller.ask(fixed(800), may_wait=True)
    take = controller.accounts.take

    def take_and_meanwhile(claim, *rest):
        done = take(claim, *rest)
        if claim is waiting and done is None:
            controller.leave(waiting)
        return done
    monkeypatch.setattr(controller.accounts, "take", take_and_meanwhile)
    controller.commit(first, 0)

    assert not waiting.is_open and (0, 0) == shared.amounts()


# The engine goes away, comes back, or is another.

def test_while_the_engine_is_away_nothing_is_admitted_and_what_ends_is_told_later(
        own_engine, quick):
    engine = own_engine("--appendonly", "yes", "--appendfsync", "always")
    shared = Shared(engine)
    controller = shared.process(limit=1_000, runs=True)
    held = controller.ask(fixed(600))

    engine.kill()
    controller.commit(held, 250)
    with pytest.raises(ic.EngineFailed) as caught:
        controller.ask(fixed(1))
    assert 503 == caught.value.status and ("retry-after", "1") in caught.value.headers
    assert 1 == controller.accounts.as_json()["unconfirmed_settlements"]
    engine.start()
    until(lambda: not controller.accounts.as_json()["unconfirmed_settlements"], "it is told")

    assert (250, 0) == shared.amounts()
    shared.close()


def test_after_a_restart_nobody_is_admitted_before_all_could_enter_what_was_forgotten(
        own_engine, monkeypatch):
    """The engine comes back as of its last snapshot, as after a crash with everysec."""
    monkeypatch.setattr(ic, "CATCH_UP_S", 0.05)
    engine = own_engine()
    shared = Shared(engine)
    one, other = (shared.process(limit=1_000) for _ in range(2))
    engine.ask("SAVE")
    held, done = one.ask(fixed(500)), one.ask(fixed(300))
    one.commit(done, 200)                                    # both are forgotten
    engine.kill()
    engine.start()
    assert (0, 0) == shared.amounts()

    with pytest.raises(ic.EngineFailed, match="restarted"):
        other.ask(fixed(900))                                # it would be too much
    other.accounts._catch_up()
    with pytest.raises(ic.EngineFailed, match="waits for all"):
        other.ask(fixed(900))
    with pytest.raises(ic.EngineFailed, match="restarted"):
        one.accounts._beat()
    one.accounts._catch_up()

    assert (200, 500) == shared.amounts()
    shared.ask("HSET", "", "held_until", 0)
    assert not other.ask(fixed(900)).is_open and other.ask(fixed(300)).is_open
    one.commit(held, 20)
    assert (220, 300) == shared.amounts()
    shared.close()


def test_a_start_on_a_restarted_engine_begins_the_wait_too_and_says_so(own_engine, caplog):
    engine = own_engine("--appendonly", "yes", "--appendfsync", "always")
    shared = Shared(engine)
    early = shared.process(limit=1_000)
    assert early.accounts.as_json()["fault"] is None and "admits no call" not in caplog.text
    engine.kill()
    engine.start()

    late = shared.process(limit=1_000)

    with pytest.raises(ic.EngineFailed, match="waits for all"):
        late.ask(fixed(1))
    assert "waits for all" in late.accounts.as_json()["fault"]
    assert "the shared budget admits no call yet" in caplog.text
    shared.close()


def test_older_data_under_the_same_server_is_a_restart_too(own_engine, quick):
    """As by a restore: the run_id in the cage is not the server's."""
    engine = own_engine()
    shared = Shared(engine)
    controller = shared.process(limit=1_000, runs=True)
    held = controller.ask(fixed(600))
    engine.ask("EVAL", "redis.call('HSET', KEYS[1], 'run_id', ARGV[1]) "       # between two beats
               "redis.call('DEL', KEYS[1] .. ':open:' .. ARGV[2]) "
               "redis.call('HSET', KEYS[1] .. ':scope:proxy', 'r0', 0)", 1,
               "{ironcage:%s}" % shared.cage, "b" * 40, controller.accounts._process)

    with pytest.raises(ic.EngineFailed, match="restarted"):
        controller.ask(fixed(900))
    until(lambda: shared.amounts() == (0, 600), "what it forgot is entered again")

    controller.commit(held, 7)
    assert (7, 0) == shared.amounts()
    shared.close()


def test_a_clock_that_is_set_back_after_a_restart_does_not_keep_everybody_waiting(shared):
    controller = shared.process(limit=1_000)
    for ahead_s, is_open in ((5, False), (3_600, True)):
        shared.ask("HSET", "", "held_until", int(time.time()) + ahead_s)
        if is_open:
            assert controller.ask(fixed(1)).is_open
        else:
            with pytest.raises(ic.EngineFailed, match="waits for all"):
                controller.ask(fixed(1))


def test_a_restart_is_seen_on_a_connection_that_outlives_it_nowhere(own_engine):
    """A pooled connection ends with the server: the first question meets the new one."""
    engine = own_engine("--appendonly", "yes", "--appendfsync", "always")
    shared = Shared(engine)
    controller = shared.process(limit=1_000)
    controller.ask(fixed(1))
    engine.kill()
    engine.start()

    with pytest.raises(ic.EngineFailed, match="restarted"):
        controller.ask(fixed(1))
    assert b"1" == shared.ask("HGET", ":scope:proxy", "r0")
    shared.close()


@pytest.mark.parametrize("loss", ["FLUSHALL", "cage new", "DEL"])
def test_a_cage_that_is_gone_or_another_takes_nothing(own_engine, loss):
    engine = own_engine()
    shared = Shared(engine)
    controller = shared.process(limit=1_000)
    held = controller.ask(fixed(600))

    if loss == "cage new":
        ic.make_cage(ic.Engine(ic.parse_engine_url(engine.url), ic.Slot()), shared.cage)
    else:
        engine.ask("FLUSHALL") if loss == "FLUSHALL" else shared.ask("DEL", "")
    with pytest.raises(ic.EngineFailed, match="cage new"):
        controller.ask(fixed(1))
    controller.commit(held, 250)

    assert 1 == controller.accounts.as_json()["unconfirmed_settlements"]
    if loss == "cage new":
        assert (250, 0) != shared.process(limit=1_000).get_full_status()[:2]
    else:
        with pytest.raises(ic.Misconfigured, match="cage new"):
            shared.process(limit=1_000)
    shared.close()


def test_a_scope_that_is_lost_admits_nothing(shared):
    controller = shared.process(limit=1_000)
    shared.ask("DEL", ":scope:proxy")

    with pytest.raises(ic.EngineFailed, match="lost an account"):
        controller.ask(fixed(1))


def test_a_dead_process_is_charged_by_one_that_watched_it_long_enough(own_engine, quick):
    engine = own_engine()
    shared = Shared(engine)
    dead = shared.process(limit=1_000)                       # it never beats again
    dead.ask(fixed(600))

    shared.process(limit=1_000, runs=True)
    until(lambda: shared.amounts() == (600, 0), "the dead one is charged")
    shared.close()


def test_an_engine_that_stalls_makes_nobody_dead(own_engine, quick):
    engine = own_engine()
    shared = Shared(engine)
    processes = [shared.process(limit=10_000, runs=True, deadline_s=1) for _ in range(3)]
    for process in processes:
        process.ask(fixed(100))
    engine.pause()
    pause(0.6, "twice what makes one dead")
    engine.go_on()
    until(lambda: all(process.accounts.fault is None for process in processes), "all are back")
    pause(0.4, "they would be charged by now")

    assert (0, 300) == shared.amounts()
    shared.close()


def test_a_script_that_the_engine_forgot_is_sent_again(engine, shared):
    controller = shared.process(limit=1_000)
    engine.ask("SCRIPT", "FLUSH")

    held = controller.ask(fixed(600))
    engine.ask("SCRIPT", "FLUSH")
    controller.commit(held, 5)

    assert (5, 0) == shared.amounts()


# An engine that lies or fails, by a script.

@pytest.fixture
def fake():
    one = FakeEngine()
    yield one
    one.close()


# What is answered -> what the one line says.
HOSTILE = {
    b"-WRONGPASS invalid username-password pair\r\n": "refuses the user name or the password",
    b"-NOAUTH Authentication required.\r\n": "wants a password",
    b"-ERR AUTH <password> called without any password configured\r\n": "has no password set",
    b"-NOPERM this user has no permissions to run the 'evalsha' command\r\n": "may not run",
    b"-READONLY You can't write against a read only replica.\r\n": "is a replica",
    b"-MOVED 3999 10.0.0.1:6381\r\n": "is a cluster",
    b"-OOM command not allowed when used memory > 'maxmemory'.\r\n": "out of memory",
    b"-LOADING Redis is loading the dataset in memory\r\n": "still loading",
    b"-MASTERDOWN Link with MASTER is down\r\n": "lost its primary",
    b"-MISCONF Redis is configured to save RDB snapshots\r\n": "cannot write its data",
    b"-BUSY Redis is busy running a script.\r\n": "keeps it busy",
    b"-NOREPLICAS Not enough good replicas to write.\r\n": "fewer replicas",
    b"-ERR something\x1b[31m new\r\n": "it says 'ERR something?",
    b"HTTP/1.1 200 OK\r\n\r\n": "not Redis' protocol",
    b"*-7\r\n": "not Redis' protocol",
    b":12x\r\n": "not Redis' protocol",
    b"$99999999999\r\n": "not Redis' protocol",
    b"$3\r\nabcd\r\n": "not Redis' protocol",
    b"*1\r\n" * 20: "not Redis' protocol",
    b":7\r\n": "not Redis' protocol",
    b"$-1\r\n": "not Redis' protocol",
    b"*2\r\n$1\r\nx\r\n*0\r\n": "not Redis' protocol",
    many(b"$3\r\n9|x\r\n", BUDGET): "not Redis' protocol",
    many(b"$9\r\n9|5|proxy\r\n", b":1\r\n"): "not Redis' protocol",
    None: "does not answer in time",
    b"": "closed",
}


@pytest.fixture
def soon(monkeypatch):
    """What was not told is told soon, and an engine has time enough for a busy machine."""
    monkeypatch.setattr(ic.Engine.__init__, "__defaults__", (PATIENCE_S,))
    monkeypatch.setattr(ic, "CATCH_UP_S", 0.05)


def answering(proxy, fake, script, answer):
    """From now on a script gets this answer; where there is none, that is seen soon."""
    fake.answers[script] = answer
    if answer is None:
        proxy.router.controller.accounts.engine._deadline_s = 0.3


@pytest.mark.parametrize("answer", HOSTILE, ids=lambda answer: str(answer)[:30])
def test_whatever_a_hostile_engine_says_to_a_reservation_is_503_and_nothing_is_sent(
        mock, proxy_for, fake, soon, caplog, answer):
    proxy = proxy_for("--shared", fake.url)
    answering(proxy, fake, "take", answer)

    refused = call(proxy.port, "POST", "/v1/chat/completions", CHAT)

    assert (503, "ledger_unavailable") == (refused.status, refused.json["error"]["code"])
    assert HOSTILE[answer] in refused.json["error"]["message"]
    assert "1" == refused.header("retry-after") and [] == mock.seen
    del fake.answers["take"]
    proxy.router.controller.accounts.engine._deadline_s = PATIENCE_S
    until(lambda: proxy.router.controller.accounts.fault is None, "it is back")
    assert 200 == call(proxy.port, "POST", "/v1/chat/completions", CHAT).status


@pytest.mark.parametrize("answer", HOSTILE, ids=lambda answer: str(answer)[:30])
def test_whatever_a_hostile_engine_says_to_a_settlement_the_answer_goes_out_and_it_is_told_later(
        mock, proxy_for, fake, soon, answer):
    proxy = proxy_for("--shared", fake.url)
    answering(proxy, fake, "settle", answer)

    answered = call(proxy.port, "POST", "/v1/chat/completions", CHAT)

    assert 200 == answered.status
    assert 1 == status_of(proxy)["shared"]["unconfirmed_settlements"]
    del fake.answers["settle"]
    proxy.router.controller.accounts.engine._deadline_s = PATIENCE_S
    until(lambda: not status_of(proxy)["shared"]["unconfirmed_settlements"], "it is told")


@pytest.mark.parametrize("command", ["INFO", "HGET", "scopes", "beat"])
@pytest.mark.parametrize("answer", HOSTILE, ids=lambda answer: str(answer)[:30])
def test_a_start_on_a_hostile_engine_is_one_line(fake, soon, capsys, monkeypatch, command,
                                                 answer):
    if answer is None:
        monkeypatch.setattr(ic.Engine.__init__, "__defaults__", (0.3,))
    fake.answers[command] = answer

    code = ic.main(["serve", "--port", "0", "--shared", fake.url.replace("//", "//:s3cr3t-word@"),
                    "--token", TOKEN])
    out, err = capsys.readouterr()

    assert 2 == code
    assert 1 == len([line for line in err.splitlines() if line.startswith("ironcage_proxy: ")])
    assert "Traceback" not in err and "s3cr3t" not in err + out


@pytest.mark.parametrize("answer", [
    many(b"$18\r\n9|1795996800|proxy\r\n"), many(NIL), b"+" + b"x" * 300_000], ids=len)
def test_a_reply_without_amounts_or_without_an_end_is_no_reply(fake, soon, answer):
    controller = Shared(fake, "x").process()
    fake.answers.update({"take": answer, "scopes": answer})

    with pytest.raises(ic.EngineFailed, match="not Redis' protocol"):
        controller.ask(fixed(9))
    with pytest.raises(ic.Misconfigured):
        controller.set_scopes([ic.Scope("ci", None, "day", None, None)])


def test_what_is_settled_is_not_tried_for_each_call_while_the_engine_is_away(fake, monkeypatch):
    accounts, asked = Shared(fake, "x").process().accounts, []
    for number in range(3):
        accounts._end(ic.Settlement(accounts._process, number, "", 0))

    def away(*words, **options):
        asked.append(words)
        raise ic.EngineFailed("away")
    monkeypatch.setattr(accounts.engine, "ask", away)

    with pytest.raises(ic.EngineFailed):
        accounts._catch_up()
    assert 1 == len(asked)


def test_while_a_process_enters_what_may_be_forgotten_it_reserves_nothing(shared):
    controller = shared.process(limit=1_000)
    controller.accounts._is_entering = True

    with pytest.raises(ic.EngineFailed, match="restarted"):
        controller.ask(fixed(1))
    assert (0, 0) == shared.amounts()


def test_after_its_end_a_process_asks_the_engine_nothing(fake, soon):
    controller = Shared(fake, "x").process()
    controller.accounts.close()
    seen = len(fake.seen)

    assert (10_000_000, seen) == (controller.budget().limit, len(fake.seen))


def test_an_engine_that_offers_money_and_never_gives_it_is_not_asked_for_ever(fake, mock,
                                                                             proxy_for, soon):
    proxy = proxy_for("--shared", fake.url)
    fake.answers["take"] = many(NIL, BUDGET)

    refused = call(proxy.port, "POST", "/v1/chat/completions", CHAT)

    assert (503, []) == (refused.status, mock.seen)
    assert "change faster" in refused.json["error"]["message"]


@pytest.mark.parametrize("words", [["usage"], ["cage", "new", "x"]], ids=repr)
@pytest.mark.parametrize("answer", HOSTILE, ids=lambda answer: str(answer)[:30])
def test_a_command_to_a_hostile_engine_ends_in_one_line(fake, capsys, monkeypatch, words, answer):
    monkeypatch.setattr(ic.Engine.__init__, "__defaults__",
                        (0.3 if answer is None else PATIENCE_S,))
    fake.answers.update({"HGET": answer, "DEL": answer})

    code = ic.main([*words, "--shared", fake.url])
    _, err = capsys.readouterr()

    assert (2, 1) == (code, err.count("ironcage_proxy: ")) and "Traceback" not in err


def test_what_was_corrected_leaves_no_row_in_the_usage(shared):
    dead, judge = shared.process(limit=1_000), shared.process(limit=1_000)
    held = dead.ask(fixed(600))
    charge(judge, dead)

    def models():
        report = ic.shared_usage(judge.accounts.engine, shared.cage, 0)
        return {row["model"]: row["cost_microdollars"] for row in report["by_model"]}
    assert {"cut off": 600} == models()
    dead.commit(held, 50, {"estimated": None, "cost_microdollars": 50, "input_tokens": 5,
                           "cached_input_tokens": None, "output_tokens": 7, "token": "ci",
                           "price_key": "a|b"})

    assert {"a|b": 50} == models()


def test_an_engine_that_is_away_is_asked_now_and_then_and_not_in_a_tight_loop(own_engine,
                                                                              monkeypatch):
    monkeypatch.setattr(ic, "CATCH_UP_S", 0.1)
    engine = own_engine()
    shared, asked = Shared(engine), []
    controller = shared.process(limit=1_000, runs=True)
    engine.kill()
    with pytest.raises(ic.EngineFailed):
        controller.ask(fixed(1))
    ask = ic.Engine.ask
    monkeypatch.setattr(ic.Engine, "ask", lambda *args, **more: (asked.append(1), ask(
        *args, **more))[1])

    until(lambda: asked, "it is asked again")
    pause(2 * ic.CATCH_UP_S, "it would be asked for ever")

    assert len(asked) <= 20
    shared.close()


def test_one_settlement_that_cannot_be_told_holds_up_neither_the_others_nor_the_heartbeat(
        own_engine, quick):
    engine = own_engine()
    shared = Shared(engine)
    controller = shared.process(limit=1_000, runs=True)
    controller.set_scopes([ic.Scope("odd", None, "total", None, None)])
    bad, good = controller.ask(fixed(10), ["odd"]), controller.ask(fixed(20))
    shared.ask("HSET", ":scope:odd", "s0", "not a number")
    before = shared.ask("HGET", ":beats", controller.accounts._process)

    controller.commit(bad, 1)
    controller.commit(good, 2)
    until(lambda: controller.accounts.as_json()["unconfirmed_settlements"] == 1, "one is told")
    until(lambda: shared.ask("HGET", ":beats", controller.accounts._process) != before, "a beat")

    shared.ask("HSET", ":scope:odd", "s0", 0)
    until(lambda: not controller.accounts.as_json()["unconfirmed_settlements"], "both are")
    shared.close()


def test_a_reply_that_never_comes_is_cancelled_by_its_number(shared, monkeypatch):
    """The reservation was made, its reply was lost twice: the money is not held for ever."""
    controller = shared.process(limit=1_000, runs=True)
    controller.cancel(controller.ask(fixed(1)))              # the engine knows the scripts
    exchange, lost = ic.EngineLink.exchange, []

    def lossy(self, commands, deadline_s):
        replies = exchange(self, commands, deadline_s)
        if commands[0][1:2] == [ic.SCRIPT_DIGESTS["take"]] and len(lost) < 2:
            lost.append(commands)
            raise TimeoutError("timed out") if len(lost) == 2 else EOFError("closed")
        return replies
    monkeypatch.setattr(ic.EngineLink, "exchange", lossy)

    with pytest.raises(ic.EngineFailed):
        controller.ask(fixed(600))

    assert 2 == len(lost)
    until(lambda: shared.amounts() == (0, 0), "it is cancelled")
    assert controller.ask(fixed(1_000)).is_open


# RESP.


@pytest.mark.parametrize("size", range(1, 9))
def test_replies_are_read_however_they_are_cut(fake, monkeypatch, size):
    fake.answers["CUT"] = many(b"$6\r\na\r\nb\r\n\r\n", b":5\r\n", b"*1\r\n$-1\r\n")
    engine, receive = ic.Engine(ic.parse_engine_url(fake.url), ic.Slot()), ic.Wire.receive

    def few(self, timeout_s, watched=None):
        data = receive(self, timeout_s, watched)
        self.received = data[size:] + self.received
        return data[:size]
    monkeypatch.setattr(ic.Wire, "receive", few)

    assert [[b"a\r\nb\r\n", 5, [None]]] == engine.ask(["CUT"])
    engine.close()


def test_what_a_broken_connection_carried_may_be_done_also_where_the_next_is_refused(fake):
    engine = ic.Engine(ic.parse_engine_url(fake.url), ic.Slot())
    engine.ask(["PING"])                                  # and the connection is kept
    fake.answers["PING"] = b""
    fake.answers["INFO"] = b"-LOADING Redis is loading the dataset in memory\r\n"

    with pytest.raises(ic.EngineFailed) as failed:
        engine.ask(["PING"])

    assert failed.value.was_sent
    engine.close()


# The program.

@pytest.fixture
def two(proxy_for, engine):
    """Two proxies on one cage."""
    cage = engine.cage()
    pair = [proxy_for("--shared", engine.url, "--cage", cage, "--budget", "0.0008",
                      "--admin-token", ADMIN_TOKEN) for _ in range(2)]
    return (*pair, cage)


def test_two_proxies_spend_one_budget_and_bill_what_the_provider_does(mock, two, engine):
    one, other, cage = two
    statuses = [call(proxy.port, "POST", "/v1/chat/completions", CHAT).status
                for proxy in itertools.islice(itertools.cycle((one, other)), 80)]

    status = settled_status(one)
    assert {200, 402} == {*statuses}
    assert mock.billed_microdollars == status["spent_microdollars"] <= 800
    assert status["spent_microdollars"] == status_of(other)["spent_microdollars"]
    assert statuses.count(200) == len(mock.seen)
    assert {"cage": cage, "fault": None, "amounts_are": "of the cage",
            "calls_are": "of this process"}.items() <= status["shared"].items()


def test_a_put_changes_the_limit_for_all_at_once(mock, two):
    one, other, _ = two

    def put(proxy, limit):
        return call(proxy.port, "PUT", "/ironcage/budget", {"limit_usd": limit},
                    token=ADMIN_TOKEN).json["limit_microdollars"]
    assert 1 == put(one, "0.000001")
    assert 402 == call(other.port, "POST", "/v1/chat/completions", CHAT).status
    assert 5_000_000 == put(other, "5")
    assert 200 == call(one.port, "POST", "/v1/chat/completions", CHAT).status
    assert 800 == put(one, None)


def test_usage_prints_the_whole_cage_by_token_model_and_day(mock, two, engine, capsys):
    one, other, cage = two
    for proxy in (one, other, one):
        call(proxy.port, "POST", "/v1/chat/completions", CHAT)
    spent = settled_status(one)["spent_microdollars"]

    assert 0 == ic.main(["usage", "--shared", engine.url, "--cage", cage, "--json"])
    report = json.loads(capsys.readouterr().out)
    assert (3, spent) == tuple(report["total"][name] for name in ("requests", "cost_microdollars"))
    assert ["gpt-4o-mini"] == [row["model"] for row in report["by_model"]]
    assert ["default"] == [row["token"] for row in report["by_token"]]
    assert 3 * status_of(other)["tokens"]["output_tokens"] == report["total"]["output_tokens"]
    assert 0 == ic.main(["usage", "--shared", engine.url, "--cage", cage])
    assert "gpt-4o-mini" in capsys.readouterr().out


def test_metrics_and_check_and_banner_show_the_cage(mock, two, engine, capsys):
    one, _, cage = two
    call(one.port, "POST", "/v1/chat/completions", CHAT)

    metrics = call(one.port, "GET", "/ironcage/metrics").body.decode()
    assert "ironcage_shared_usable 1" in metrics
    assert 'ironcage_limit_microdollars{scope="proxy"} 800' in metrics
    assert f"the cage {cage} at redis://127.0.0.1" in ic.banner(one)
    assert "spent by all" in ic.banner(one) and "snapshot" in ic.banner(one)
    assert 0 == ic.main(["check", "--port", "0", "--shared", engine.url, "--cage", cage])
    assert f"shared    the cage {cage} at" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["check", "serve"])
def test_a_budget_of_sessions_is_refused_by_check_as_by_a_start(engine, capsys, tmp_path, command):
    path = tmp_path / "cage.json"
    path.write_text(json.dumps({"tokens": [
        {"name": "ci", "token": "ic_0123456789", "session_budget_usd": "1"}]}))

    assert 0 == ic.main(["cage", "new", "of-sessions", "--shared", engine.url])

    code = ic.main([command, "--port", "0", "--shared", engine.url, "--cage", "of-sessions",
                    "--config", str(path)])

    assert (2, True) == (code, "not held with --shared" in capsys.readouterr().err)


def test_a_start_that_finds_no_cage_names_the_command_which_makes_one(engine, capsys):
    flags = ["--shared", engine.url, "--cage", "never-made"]

    assert 2 == ic.main(["serve", "--port", "0", *flags])
    assert "cage new never-made --shared URL" in capsys.readouterr().err
    assert 2 == ic.main(["usage", *flags])
    assert "there is no cage never-made" in capsys.readouterr().err
    for words in ([], ["old"], ["new"], ["new", "a", "b"], ["new", "a b"]):
        assert 2 == ic.main(["cage", *words, "--shared", engine.url])
    assert 2 == ic.main(["cage", "new", "x"])
    capsys.readouterr()
    assert 0 == ic.main(["cage", "new", "never-made", "--shared", engine.url])
    assert "is new" in capsys.readouterr().out
    assert 0 == ic.main(["cage", "new", "never-made", "--shared", engine.url])
    assert "must be started again" in capsys.readouterr().out


@pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-ttl"])
def test_an_engine_that_may_evict_is_refused(own_engine, policy):
    engine = own_engine("--maxmemory-policy", policy)

    with pytest.raises(ic.Misconfigured, match=f"may evict.*{policy}"):
        Shared(engine).process()


@pytest.mark.parametrize("config, forgets", [
    (("--appendonly", "yes", "--appendfsync", "always"), "nothing"),
    (("--appendonly", "yes", "--appendfsync", "everysec"), "second or two"),
    (("--appendonly", "yes", "--appendfsync", "no"), "half minute"), ((), "snapshot"),
    (("--rename-command", "CONFIG", ""), "everything, for all that it lets us read")])
def test_durability_is_asked_for_and_fsync_wants_a_disk(own_engine, config, forgets):
    shared = Shared(own_engine(*config))
    can_wait = "everysec" in config and [None] != shared.engine.ask("COMMAND", "INFO", "WAITAOF")

    assert forgets in shared.process().accounts.durability
    if forgets == "nothing" or can_wait:                  # as Valkey, and Redis from 7.2 on
        assert shared.process(fsync=True).ask(fixed(1)).is_open
    else:
        with pytest.raises(ic.Misconfigured, match="--fsync.*appendfsync always"):
            shared.process(fsync=True)
    shared.close()


def test_fsync_waits_for_the_disk_where_the_engine_can_be_asked_to(fake, soon):
    """WAITAOF came with Redis 7.2; here it is scripted. With appendfsync no it waits in vain."""
    fake.answers["HSET"] = b":1\r\n"
    fake.answers["WAITAOF"] = many(b":0\r\n", b":0\r\n")
    shared = Shared(fake, "x")
    with pytest.raises(ic.Misconfigured, match="--fsync.*does not flush to its disk"):
        shared.process(fsync=True)
    fake.answers["WAITAOF"] = many(b":1\r\n", b":0\r\n")
    controller = shared.process(fsync=True)
    assert controller.ask(fixed(9)).is_open

    fake.answers["WAITAOF"] = many(b":0\r\n", b":0\r\n")
    with pytest.raises(ic.EngineFailed, match="disk is too slow"):
        controller.ask(fixed(9))
    controller.accounts._catch_up()

    settled = [words for words in fake.seen
               if words[1:2] == [ic.SCRIPT_DIGESTS["settle"].encode()]]
    assert 1 == len(settled) and b"0" == settled[0][9]
    shared.close()


def test_a_password_is_used_and_never_shown(own_engine, caplog, capsys, proxy_for, monkeypatch):
    secret = "s3cr3t-" + secrets.token_hex(8)
    engine = own_engine("--requirepass", secret)
    open_url, engine.url = engine.url, engine.url.replace("//", f"//:{secret}@")
    cage = engine.cage()
    caplog.set_level(logging.INFO)

    proxy = proxy_for("--shared", engine.url, "--cage", cage, "--budget", "1")

    assert "is in the command line" in caplog.text
    assert 200 == call(proxy.port, "POST", "/v1/chat/completions", CHAT).status
    with pytest.raises(ic.Misconfigured, match="wants a password"):
        proxy_for("--shared", open_url, "--cage", cage)
    with pytest.raises(ic.Misconfigured, match="refuses the user name or the password"):
        proxy_for("--shared", open_url.replace("//", f"//:x{secret}@"), "--cage", cage)
    shown = caplog.text + ic.banner(proxy) + repr(proxy.settings) + repr(
        proxy.settings.shared) + json.dumps(status_of(proxy)) + capsys.readouterr().err
    assert secret not in shown
    environment = ic.child_environment(proxy, {
        "IRONCAGE_SHARED": engine.url, "MINE": f"x {secret} x", "HOME": "/"}, "sh")
    assert secret not in json.dumps(environment) and "HOME" in environment


def test_an_error_that_repeats_the_password_does_not_show_it(fake, capsys):
    fake.answers["AUTH"] = lambda words: b"-ERR unknown command 'AUTH', with args: '%b'\r\n" \
        % words[-1]

    assert 2 == ic.main(["usage", "--shared", fake.url.replace("//", "//:s3cr3t-word@")])

    err = capsys.readouterr().err
    assert "s3cr3t" not in err and "has no password set" in err
    fake.answers["AUTH"] = lambda words: b"-ERR what is '%b'\r\n" % words[-1]
    assert 2 == ic.main(["usage", "--shared", fake.url.replace("//", "//me:s3cr3t-word@")])
    assert "what is '***'" in capsys.readouterr().err
    assert [b"AUTH", b"me", b"s3cr3t-word"] in fake.seen


def test_an_engine_without_a_password_is_warned_about(two, caplog, engine, proxy_for):
    caplog.clear()
    proxy_for("--shared", engine.url, "--cage", two[2])

    assert "has no password: an agent that can reach it" in caplog.text


def test_an_engine_is_reached_by_a_unix_socket(engine):
    address = ic.parse_engine_url(f"unix://{engine.folder}/sock")
    client = ic.Engine(address, ic.Slot())

    assert [b"PONG"] == client.ask(["PING"])
    client.close()


def test_an_engine_is_reached_by_tls_whose_certificate_is_checked(engine, tmp_path, monkeypatch):
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    done = subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt",
                           "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", key,
                           "-out", certificate, "-days", "2", "-subj", "/CN=localhost",
                           "-addext", "subjectAltName=DNS:localhost"], capture_output=True)
    if done.returncode:
        pytest.skip("no openssl")
    port = free_port()
    (tmp_path / "tls").mkdir()
    secure = RealEngine(tmp_path / "tls", "--tls-port", str(port), "--tls-cert-file",
                        str(certificate), "--tls-key-file", str(key), "--tls-auth-clients", "no",
                        "--tls-ca-cert-file", str(certificate))
    client = ic.Engine(ic.parse_engine_url(f"rediss://localhost:{port}"), ic.Slot())
    try:
        with pytest.raises(ic.EngineFailed, match="(?i)certificate"):
            client.ask(["PING"])
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert [b"PONG"] == client.ask(["PING"])
        assert [b"x" * 300_000] == client.ask(["ECHO", "x" * 300_000])
    finally:
        client.close()
        secure.stop()


def test_an_embedded_router_takes_a_cage(mock, engine):
    environ = {"OPENAI_API_KEY": OPENAI_KEY, "IRONCAGE_OPENAI_BASE_URL": mock.url + "/v1"}
    cage = engine.cage()
    with ic.LlmRouter(budget=1, shared=engine.url, cage=cage, environ=environ) as one, \
            ic.LlmRouter(shared=engine.url, cage=cage, environ=environ) as other:
        assert 200 == call(one.port, "POST", "/v1/chat/completions", CHAT, token=one.api_key).status
        assert one.total_spent() == other.total_spent() > 0
        other.set_budget("0.5")
        assert 0.5 == one.budget
    with pytest.raises(ic.Misconfigured, match="shared:"):
        ic.LlmRouter(shared="http://h", environ=environ)


def test_tokens_budgets_are_shared_by_name(mock, proxy_for, engine, tmp_path):
    config = tmp_path / "cage.json"
    config.write_text(json.dumps({"tokens": [
        {"name": "ci", "token": "tok-ci-0123456789", "budget_usd": "0.0004", "period": "day"}]}))
    cage = engine.cage()
    one, other = (proxy_for("--shared", engine.url, "--cage", cage, "--config", str(config))
                  for _ in range(2))
    statuses = [call(proxy.port, "POST", "/v1/chat/completions", CHAT, token="tok-ci-0123456789")
                .status for proxy in (one, other) * 12]

    assert {200, 402} == {*statuses}
    amounts = settled_status(other)["by_token"]["ci"]
    assert mock.billed_microdollars == amounts["spent_microdollars"] <= 400

    config.write_text(config.read_text().replace('"day"', '"week"'))
    with pytest.raises(ic.Misconfigured, match="token ci has the period day"):
        proxy_for("--shared", engine.url, "--cage", cage, "--config", str(config))


@pytest.mark.parametrize("fault", ["no cage", "period", "port"])
def test_a_start_that_fails_lets_go_of_its_ledger_and_of_the_cage(proxy_for, engine, tmp_path,
                                                                 fault):
    shared, config = Shared(engine), tmp_path / "cage.json"
    config.write_text(json.dumps({"tokens": [
        {"name": "ci", "token": "tok-ci-0123456789", "period": "day"}]}))
    flags = ["--ledger", str(tmp_path / "own.db"), "--shared", engine.url, "--config", str(config),
             "--no-wait-for-ledger"]
    shared.process().set_scopes([ic.Scope("ci", None, "week" if fault == "period" else "day", None,
                                          None)])
    taken = proxy_for()
    bad = ["--cage", "none-such"] if fault == "no cage" else ["--cage", shared.cage]

    with pytest.raises(ic.Misconfigured):
        proxy_for(*flags, *bad, *(["--port", str(taken.port)] if fault == "port" else []))

    assert 1 == len(shared.ask("HKEYS", ":beats"))           # of shared.process()
    again = proxy_for("--ledger", str(tmp_path / "own.db"), "--no-wait-for-ledger")
    assert 200 == call(again.port, "GET", "/").status


# What providers have counted.

def count(number, parts=3):
    return ic.CountRow('["ci", "openai", "gpt-5.5"]', bytes([number % 256]) * 16, ic.Counted(
        1_000 + number, frozenset(part.to_bytes(2, "big") * 8 for part in range(parts)), True),
        "gpt-5.5", 1_795_996_800)


def test_what_a_provider_counted_for_one_process_all_others_know_and_those_that_come_later(shared):
    learned = [[], [], []]
    one, other, late = (shared.process().accounts for _ in range(3))
    for accounts, rows in zip((one, other, late), learned):
        accounts._learn_count = rows.append
    for number in range(250):
        one.keep_count(count(number))
    one._share_counts()
    other._share_counts()
    other.keep_count(count(999))
    other._share_counts()

    late._share_counts()
    one._share_counts()

    assert [*map(count, range(250))] == learned[1][:250]
    assert 251 == len(learned[2]) == len(learned[0]) and count(999) == learned[0][-1]
    one._share_counts()
    assert 251 == len(learned[0])                            # each once


def test_counts_are_bounded_in_number_and_size(shared, monkeypatch):
    monkeypatch.setattr(ic, "MOST_SHARED_COUNTS", 20)
    accounts, learned = shared.process().accounts, []
    accounts._learn_count = learned.append
    for number in range(50):
        accounts.keep_count(count(number))
    accounts.keep_count(count(50, 3_000))
    accounts._share_counts()

    assert 20 == shared.ask("XLEN", ":counts")
    assert [*map(count, range(30, 50))] == learned


def test_a_replica_bounds_by_what_another_has_counted(mock, proxy_for, engine, quick):
    cage, text = engine.cage(), "Long enough to be worth it: " + "word after word, " * 400
    one, other = (proxy_for("--shared", engine.url, "--cage", cage, "--budget", "1")
                  for _ in range(2))
    call(one.port, "POST", "/v1/chat/completions", {**CHAT, "messages": [
        {"role": "user", "content": text}]})

    until(lambda: other.router.counts._counts, "the other knows the count")
    assert one.router.counts._counts.keys() == other.router.counts._counts.keys()


# With a ledger of one's own.

def test_what_could_not_be_told_is_told_by_the_next_start_on_that_ledger(
        mock, proxy_for, own_engine, tmp_path, quick):
    engine = own_engine("--appendonly", "yes", "--appendfsync", "always")
    shared, path = Shared(engine), str(tmp_path / "own.db")
    flags = ("--shared", engine.url, "--cage", shared.cage, "--ledger", path)
    proxy = proxy_for(*flags, "--budget", "1")
    gate = Gate()
    mock.script(lambda request: mock.default_reply(request).with_steps(
        [gate, *mock.default_reply(request).steps]))
    answers = []
    thread = threading.Thread(target=lambda: answers.append(
        call(proxy.port, "POST", "/v1/chat/completions", CHAT)))
    thread.start()
    mock.wait_for_requests(1)

    engine.kill()
    gate.event.set()
    thread.join()
    proxy.stop()
    engine.start()
    assert 200 == answers[0].status and 0 == shared.amounts()[0] < shared.amounts()[1]
    again = proxy_for(*flags)

    assert (mock.billed_microdollars, 0) == shared.amounts()
    again.stop()
    proxy_for(*flags).stop()                                 # and only once
    assert (mock.billed_microdollars, 0) == shared.amounts()


def test_a_ledger_that_was_used_alone_enters_nothing_into_a_cage(mock, proxy_for, engine,
                                                                 tmp_path):
    path, shared = str(tmp_path / "own.db"), Shared(engine)
    alone = proxy_for("--ledger", path, "--budget", "1")
    call(alone.port, "POST", "/v1/chat/completions", CHAT)
    alone.stop()

    together = proxy_for("--ledger", path, "--shared", engine.url, "--cage", shared.cage)
    assert (0, 0) == shared.amounts()
    call(together.port, "POST", "/v1/chat/completions", CHAT)
    together.stop()
    first, second = (bill[2] for bill in mock.bills)
    assert (second, 0) == shared.amounts()

    again = proxy_for("--ledger", path, "--budget", "1")     # alone, it counts all that is there
    assert first + second == status_of(again)["spent_microdollars"]
    assert (second, 0) == shared.amounts()


def test_calls_of_another_cage_are_not_entered(mock, proxy_for, engine, tmp_path, caplog):
    path, first, second = str(tmp_path / "own.db"), Shared(engine), Shared(engine)
    ledger = ic.SqliteLedger(path)
    controller = first.process(ledger=ledger)
    held = controller.ask(fixed(600))
    ledger.intent({**dict.fromkeys(ic.LEDGER_COLUMNS), "request_id": "r", "token": "a",
                   "admitted_s": held.admitted_s, "provider": "p", "model": "m", "api": "chat",
                   "stream": 0, "bound_microdollars": 600}, held.shared)
    ledger.close()

    proxy_for("--ledger", path, "--shared", engine.url, "--cage", second.cage)

    assert (0, 0) == second.amounts()
    assert "calls of another cage stay as they are" in caplog.text


def test_a_process_that_died_with_an_open_call_is_charged_by_its_own_next_start(
        proxy_for, engine, tmp_path):
    path, shared = str(tmp_path / "own.db"), Shared(engine)
    ledger = ic.SqliteLedger(path)
    held = shared.process(ledger=ledger, limit=1_000).ask(fixed(600))
    ledger.intent({**dict.fromkeys(ic.LEDGER_COLUMNS), "request_id": "r", "token": "default",
                   "admitted_s": held.admitted_s, "provider": "p", "model": "m", "api": "chat",
                   "stream": 0, "bound_microdollars": 600}, held.shared)
    ledger.close()
    assert (0, 600) == shared.amounts()

    proxy_for("--ledger", path, "--shared", engine.url, "--cage", shared.cage)

    assert (600, 0) == shared.amounts()


# What it costs.

def commands_of(engine, do):
    """How many commands the engine runs for something."""
    def count():
        rows = engine.ask("INFO", "commandstats").decode().split()
        return {row.split(":")[0]: int(row.split("calls=")[1].split(",")[0])
                for row in rows if row.startswith("cmdstat_") and "cmdstat_info" not in row}
    before = count()
    do()
    return {name: calls - before.get(name, 0) for name, calls in count().items()
            if calls != before.get(name, 0)}


def full_cage(shared, tokens, calls):
    controller = shared.process(limit=10 ** 12)
    controller.set_scopes([ic.Scope(f"t{number}", 10 ** 9, "day", None, None)
                           for number in range(tokens)])
    accounts = controller.accounts
    process, now_s = "f" * 16, int(time.time())
    for at in range(0, calls, 500):
        accounts._run("beat", process, "proxy", 0, *(word for number in range(at, at + 500) for word in (
            number, f"7|{now_s}|proxy|t{number}")))
    return controller


def test_a_full_cage_admits_and_settles_by_as_many_commands_as_an_empty_one(own_engine):
    engine = own_engine()
    counts = []
    for tokens, calls in ((1, 0), (3_000, 2_000)):
        controller = full_cage(Shared(engine), tokens, calls)

        def one_call():
            controller.commit(controller.ask(fixed(9), ["t0"]), 3)
        one_call()
        counts.append(commands_of(engine, one_call))
    empty, full = counts

    assert empty == full and 2 == empty["cmdstat_evalsha"]
