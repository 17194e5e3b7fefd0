"""The cost controller: who is admitted, who waits, who is lowered and who is refused, in which scopes.

The line has no threads of its own: ask(), expire(), leave() and commit() are the steps, so that
every schedule can be played here one step at a time.
"""
from __future__ import annotations

from random import Random

import pytest

import ironcage_proxy as ic
from support import each_seed, seeds

DAY_S = 86_400
MONDAY_S = 1_795_996_800        # 2026-11-30 00:00 UTC


def asks(tokens, *, most=128_000, least=0, may_be_lowered=True, rate=1):
    """A request whose input is free and whose output token costs `rate` microdollars."""
    return ic.Bound((ic.Level(rates=(0, rate * 10 ** 6)),), asked_output_tokens=tokens,
                    most_output_tokens=most, least_output_tokens=least,
                    may_be_lowered=may_be_lowered)


def cap_of(bound, free, **how):
    """The output cap to reserve for while so much is free; None: not now."""
    caps = bound.fitting_caps(free, **how)
    return caps and caps.output_tokens


def state(claim):
    return "waiting" if claim.is_waiting else claim.output_cap if claim.is_open else "refused"


class Clock:
    def __init__(self, now_s=MONDAY_S):
        self.now_s = now_s

    def __call__(self):
        return self.now_s


# One scope.

def test_what_fits_is_admitted_with_the_cap_that_was_asked_for():
    controller = ic.CostController(10_000)

    claims = [controller.ask(asks(5_000), may_wait=True) for _ in range(2)]

    assert [5_000, 5_000] == list(map(state, claims))
    assert 0 == controller.available()


def test_what_would_fit_if_others_cost_less_waits_until_one_settles():
    controller = ic.CostController(10_000)
    first = controller.ask(asks(9_000), may_wait=True)
    second = controller.ask(asks(9_000), may_wait=True)
    assert "waiting" == state(second)

    controller.commit(first, 200)

    assert 9_000 == state(second)
    assert (200, 9_000, 10_000) == controller.get_full_status()


def test_a_small_request_does_not_overtake_a_big_one_that_waits():
    """Else small ones could fill every gap, and the big one would starve."""
    controller = ic.CostController(10_000)
    first = controller.ask(asks(9_000), may_wait=True)
    big = controller.ask(asks(8_000), may_wait=True)
    small = controller.ask(asks(10), may_wait=True)
    assert ["waiting", "waiting"] == [state(big), state(small)]

    controller.commit(first, 100)

    assert [8_000, 10] == [state(big), state(small)]


def test_a_big_request_does_not_keep_a_small_one_waiting_beyond_its_own_time():
    controller = ic.CostController(10_000)
    controller.ask(asks(9_500), may_wait=True)
    big = controller.ask(asks(8_000), may_wait=True)
    small = controller.ask(asks(10), may_wait=True)

    controller.expire(big)

    assert ["refused", 10] == [state(big), state(small)]


def test_where_nothing_is_in_flight_nobody_waits():
    controller = ic.CostController(10_000)
    controller.add_spend(8_000)

    assert 2_000 == state(controller.ask(asks(5_000), may_wait=True))
    controller = ic.CostController(10_000)
    controller.add_spend(9_000)
    assert "refused" == state(controller.ask(asks(5_000), may_wait=True))


def test_what_could_not_fit_even_if_all_in_flight_cost_nothing_is_refused_at_once():
    controller = ic.CostController(10_000)
    controller.add_spend(9_500)
    controller.ask(asks(400), may_wait=True)

    assert "refused" == state(controller.ask(asks(5_000), may_wait=True))


@pytest.mark.parametrize("free, asked, at_once, at_last", [
    (100_000, 64_000, 64_000, 64_000),            # it fits
    (60_000, 64_000, 30_000, 30_000),             # half of what is free is comfortable
    (16_384, 64_000, 8_192, 8_192),
    (16_383, 64_000, None, 16_383),               # it is not: wait, then take what is there
    (1_024, 64_000, None, 1_024), (1_023, 64_000, None, None),
    (900, 500, 500, 500), (499, 500, None, None),          # less than 1,024 was asked for
    (9_000, 10_000, None, 9_000),
    (60_000, None, 30_000, 30_000), (16_383, None, None, 16_383), (1_023, None, None, None),
])
def test_how_far_a_cap_is_lowered(free, asked, at_once, at_last):
    bound = asks(asked)

    assert at_once == cap_of(bound, free, at_last=False)
    assert at_last == cap_of(bound, free, at_last=True)


def test_a_cap_stays_above_anthropics_thinking_budget():
    bound = asks(32_000, least=16_001)

    assert 16_001 == cap_of(bound, 16_001, at_last=True)
    assert cap_of(bound, 16_000, at_last=True) is None
    assert cap_of(bound, 32_000 - 1, at_last=False) is None      # half is below it


def test_the_least_cap_of_a_request_comes_from_its_fields():
    book = ic.PriceBook({"claude-x": {"input_cost_per_token": 1, "output_cost_per_token": 1}})

    def least(api, text, **options):
        body = ic.parse_json_object(text.encode())
        return ic.bound_of_request(api, body, book.price("claude-x"), **options).least_output_tokens

    thinking = '{"max_tokens": 32000, "thinking": {"type": "enabled", "budget_tokens": %d}}'
    assert (1_501, 2_048) == (least("messages", thinking % 1_500),      # it falls with the cap
                              least("messages", thinking % 16_000))
    assert 16_001 == least("messages", thinking % 16_000, may_be_lowered=False)
    assert 1 == least("messages", '{"max_tokens": 32000, "thinking": {"type": "adaptive"}}')
    assert 16 == least("responses", '{"max_output_tokens": 32000}')
    assert 1 == least("chat", '{"max_tokens": 32000}')


def test_without_fitting_a_cap_is_never_lowered():
    controller = ic.CostController(10_000)
    first = controller.ask(asks(5_000), may_wait=True)
    second = controller.ask(asks(6_000, may_be_lowered=False), may_wait=True)
    third = controller.ask(asks(60_000, may_be_lowered=False), may_wait=True)
    assert ["waiting", "refused"] == [state(second), state(third)]

    controller.expire(second)

    assert "refused" == state(second)
    controller.commit(first, 0)
    assert 6_000 == state(controller.ask(asks(6_000, may_be_lowered=False)))


def test_at_its_deadline_a_request_takes_what_is_really_free():
    controller = ic.CostController(10_000)
    controller.ask(asks(5_000), may_wait=True)
    waiting, next_one = (controller.ask(asks(64_000), may_wait=True) for _ in range(2))
    assert ["waiting", "waiting"] == [state(waiting), state(next_one)]

    controller.expire(waiting)
    assert 2_500 == state(waiting)              # half, while others are in flight
    controller.expire(next_one)
    assert 1_250 == state(next_one)
    last = controller.ask(asks(64_000))
    assert 1_250 == state(last)                 # all, since half is not worth sending for


def test_one_that_leaves_the_line_lets_the_next_one_pass():
    controller = ic.CostController(10_000)
    controller.ask(asks(5_000), may_wait=True)
    big, small = (controller.ask(asks(n), may_wait=True) for n in (9_000, 10))

    controller.leave(big)

    assert 10 == state(small)
    controller.leave(small)                 # it was admitted meanwhile: released
    assert (0, 5_000, 10_000) == controller.get_full_status()


def test_a_raised_limit_wakes_the_line_and_a_lower_one_refuses_it():
    controller = ic.CostController(10_000)
    controller.ask(asks(9_000), may_wait=True)
    first, second = (controller.ask(asks(8_000), may_wait=True) for _ in range(2))

    controller.set_budget(17_000)
    assert [8_000, "waiting"] == [state(first), state(second)]
    controller.set_budget(500)

    assert "refused" == state(second)


def test_at_the_stop_all_who_wait_are_refused_and_nobody_waits_any_more():
    controller = ic.CostController(10_000)
    controller.ask(asks(9_000), may_wait=True)
    waiting = controller.ask(asks(8_000), may_wait=True)

    controller.close()

    assert "refused" == state(waiting)
    with pytest.raises(ic.ServerBusy):
        controller.admit(asks(8_000), wait_s=60)


def test_one_that_waits_for_accounts_that_cannot_be_asked_is_not_admitted(monkeypatch):
    controller = ic.CostController(10_000)
    controller.ask(asks(9_000))

    def away(scopes):
        raise ic.LedgerUnavailable("away")
    monkeypatch.setattr(controller.accounts, "budgets", away)

    with pytest.raises(ic.LedgerUnavailable, match="away"):
        controller.admit(asks(8_000), wait_s=60)


@pytest.mark.parametrize("left", [KeyboardInterrupt, ic.ClientGone, ValueError])
def test_whatever_breaks_a_wait_off_holds_nothing(left):
    controller = ic.CostController(10_000)
    held = controller.ask(asks(9_000))

    def interrupted():
        raise left

    with pytest.raises(left):
        controller.admit(asks(8_000), wait_s=60, has_left=interrupted)
    controller.commit(held, 0)

    assert (0, 0, 10_000) == controller.get_full_status()


def test_what_is_set_aside_while_the_proxy_closes_is_given_back(monkeypatch):
    controller = ic.CostController(10_000)
    held = controller.ask(asks(9_000))
    waiting = controller.ask(asks(8_000), may_wait=True)
    take = controller.accounts.take

    def closing(*arguments):
        taken = take(*arguments)
        controller.close()                           # on another thread, as the money is taken
        return taken
    monkeypatch.setattr(controller.accounts, "take", closing)
    controller.commit(held, 0)

    assert not waiting.is_open
    assert (0, 0, 10_000) == controller.get_full_status()


def test_an_interrupt_while_a_request_is_asked_for_leaves_nothing_in_the_queue(monkeypatch):
    controller = ic.CostController(10_000)
    held = controller.ask(asks(9_000))

    def interrupt():                     # as Ctrl-C does; a run in the background ignores that one
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(controller, "_serve_queue", interrupt)
        with pytest.raises(KeyboardInterrupt):
            controller.ask(asks(8_000), may_wait=True)
    controller.commit(held, 0)

    assert (0, 0, 10_000) == controller.get_full_status()


def test_a_scope_whose_limit_was_taken_away_is_lacked_by_nobody():
    """Who waited for it may still stand in the queue: that is looked through in a moment."""
    free = ic.Budget("proxy", None, spent=0, reserved=9_000)

    for may_wait in (True, False):
        assert asks(8_000).asked_caps == ic.decision_on(
            asks(8_000), [free], may_wait=may_wait, blocked={"proxy"}).caps


def test_what_costs_nothing_passes_also_when_others_wait_and_nothing_is_left():
    controller = ic.CostController(10_000)
    controller.ask(asks(9_000), may_wait=True)
    controller.ask(asks(8_000), may_wait=True)
    controller.add_spend(50_000)

    free = controller.ask(asks(64_000, rate=0), may_wait=True)

    assert (64_000, 0) == (state(free), free.microdollars)


# Several scopes.

def two_tokens(limit=10_000, a=5_000, b=5_000, clock=None):
    controller = ic.CostController(limit, clock=clock or Clock())
    controller.set_scopes([ic.Scope("a", a, "day", None, lambda since_s: 0),
                           ic.Scope("b", b, "total", None, lambda since_s: 0)])
    return controller


def test_a_request_is_set_aside_in_all_of_its_scopes_or_in_none():
    controller = two_tokens(a=1_000)

    refused = controller.ask(asks(2_000, may_be_lowered=False), ["a"])
    admitted = controller.ask(asks(1_000), ["a"])

    assert ("refused", "a") == (state(refused), refused.refused_by.scope)
    assert 1_000 == state(admitted)
    assert [1_000, 1_000, 0] == [controller.budget(scope).reserved
                                 for scope in ("proxy", "a", "b")]
    controller.commit(admitted, 7)
    assert [7, 7, 0] == [controller.budget(scope).spent for scope in ("proxy", "a", "b")]


def test_one_that_waits_for_its_tokens_budget_does_not_hold_up_another_token():
    controller = two_tokens()
    controller.ask(asks(4_000), ["a"])
    waiting = controller.ask(asks(5_000), ["a"], may_wait=True)
    other = controller.ask(asks(5_000), ["b"], may_wait=True)

    assert ["waiting", 5_000] == [state(waiting), state(other)]


def test_one_that_waits_for_the_proxys_budget_holds_up_every_token():
    controller = two_tokens(limit=6_000)
    controller.ask(asks(4_000), ["a"])
    waiting = controller.ask(asks(5_000), ["b"], may_wait=True)
    other = controller.ask(asks(100), ["a"], may_wait=True)

    assert ["waiting", "waiting"] == [state(waiting), state(other)]


def test_the_tightest_scope_says_how_far_a_cap_is_lowered():
    controller = two_tokens(limit=100_000, a=40_000)

    assert 20_000 == state(controller.ask(asks(64_000), ["a"]))


def test_the_refusal_names_the_scope_and_what_would_fit():
    controller = two_tokens(a=500)

    with pytest.raises(ic.InsufficientBudget) as caught:
        controller.admit(asks(4_000), ["a"])

    assert ("a", 500, 1_024, 500) == tuple(caught.value.details[name] for name in (
        "scope", "limit_microdollars", "needed_microdollars", "affordable_output_tokens"))


# Periods.

@pytest.mark.parametrize("period, now, start", [
    ("total", "2026-11-25T12:00:00Z", "1970-01-01"),
    ("day", "2026-11-25T23:59:59Z", "2026-11-25"), ("day", "2026-11-25", "2026-11-25"),
    ("week", "2026-11-25T12:00:00Z", "2026-11-23"), ("week", "2026-11-23", "2026-11-23"),
    ("week", "2026-11-22T23:59:59Z", "2026-11-16"),
    ("month", "2026-11-25T12:00:00Z", "2026-11-01"), ("month", "2028-02-29", "2028-02-01"),
    ("month", "2027-01-01T00:00:00Z", "2027-01-01"),
])
def test_a_period_begins_at_midnight_utc(period, now, start):
    assert ic.parse_time(start) == ic.period_start(period, ic.parse_time(now))


def test_a_new_day_begins_with_nothing_spent():
    clock = Clock()
    controller = two_tokens(clock=clock)
    controller.commit(controller.ask(asks(5_000), ["a"]), 5_000)
    assert "refused" == state(controller.ask(asks(10), ["a"]))

    clock.now_s += DAY_S

    assert 10 == state(controller.ask(asks(10), ["a"]))
    assert 5_000 == controller.total_spent()          # the proxy's own never begins anew


def test_a_charge_belongs_to_the_period_of_its_admission():
    clock = Clock(MONDAY_S + DAY_S - 1)
    controller = two_tokens(clock=clock)
    late = controller.ask(asks(4_000), ["a"])

    clock.now_s += 2
    assert (0, 0) == controller.budget("a")[2:4]
    controller.commit(late, 3_000)

    assert (0, 0) == controller.budget("a")[2:4]
    assert (3_000, 0) == controller.budget("proxy")[2:4]


def test_a_clock_that_goes_back_reopens_no_period():
    clock = Clock()
    controller = two_tokens(clock=clock)
    controller.commit(controller.ask(asks(5_000), ["a"]), 5_000)

    clock.now_s -= 5 * DAY_S
    assert "refused" == state(controller.ask(asks(10), ["a"]))
    held = controller.ask(asks(10), ["b"])
    controller.commit(held, 10)

    clock.now_s += 5 * DAY_S
    assert "refused" == state(controller.ask(asks(10), ["a"]))
    assert (0, 10) == (controller.total_reserved(), controller.budget("b").spent)


def test_a_reservation_taken_while_the_clock_is_back_is_released_all_the_same():
    clock = Clock()
    controller = two_tokens(clock=clock)
    clock.now_s -= DAY_S

    controller.commit(controller.ask(asks(1_000), ["a"]), 10)

    assert (10, 0) == controller.budget("a")[2:4]


# The promises, by name.

def test_four_streams_of_a_minute_at_64000_tokens_on_half_a_dollar_none_refused_none_over():
    """PEERS 0.3: calls 3 and 4 were refused while the real spend was under a tenth of a cent.

    $15 a million tokens: 64,000 tokens are $0.96, nearly twice the limit. On an injected clock
    each stream takes a minute and costs 240 microdollars.
    """
    controller = ic.CostController(500_000)
    claims = [controller.ask(asks(64_000, rate=15), may_wait=True) for _ in range(4)]
    assert [16_666, 8_333, "waiting", "waiting"] == list(map(state, claims))

    for claim in claims[2:]:                                  # 30 s later, at their deadlines
        controller.expire(claim)

    assert [16_666, 8_333, 4_167, 2_083] == list(map(state, claims))
    spent, reserved, limit = controller.get_full_status()
    assert spent + reserved <= limit
    for claim in claims:                                      # after a minute
        controller.commit(claim, 240)
    assert (960, 0, 500_000) == controller.get_full_status()


def test_an_agent_that_asks_for_32000_tokens_and_uses_300_works_until_the_money_is_gone():
    """$2 at $15 a million: a call of 300 tokens costs 4,500 microdollars."""
    controller = ic.CostController(2_000_000)
    calls = 0
    while True:
        claim = controller.ask(asks(32_000, rate=15), may_wait=True)
        if claim.refused_by is not None:
            break
        controller.commit(claim, 4_500)
        calls += 1

    assert controller.available() < 1_024 * 15
    assert calls >= 440


# Any schedule, against the plainest model.

SCOPES = ("proxy", "a", "b")


class Model:
    """What was admitted and charged, in lists; sums are made anew for every question."""

    def __init__(self, limits):
        self.limits = dict(limits)
        self.charges = []               # (scopes, microdollars)
        self.open = {}                  # claim -> scopes

    def spent(self, scope):
        return sum(amount for scopes, amount in self.charges if scope in scopes)

    def reserved(self, scope):
        return sum(claim.microdollars for claim, scopes in self.open.items() if scope in scopes)

    def free(self, scope):
        limit = self.limits[scope]
        return None if limit is None else limit - self.spent(scope) - self.reserved(scope)


def check_line(controller, model, line):
    """Those who wait must: first come, first served, and only where waiting can help."""
    blocked = set()
    for claim, scopes in line:
        lacking = {scope for scope in scopes if scope in blocked or claim.bound.fitting_caps(
            model.free(scope), at_last=not model.reserved(scope)) is None}
        assert lacking, "one waits that could be admitted"
        for scope in lacking:
            assert claim.bound.fitting_caps(model.limits[scope] - model.spent(scope),
                                           at_last=True) is not None, "one waits in vain"
        blocked |= lacking


class InThisProcess:
    """Accounts that begin, after a crash, with what the ledger says."""

    def __init__(self):
        self.clock, self.ledger = Clock(), ic.MemoryLedger()

    def started(self, limits):
        controller = ic.CostController(limits["proxy"], clock=self.clock,
                                       spent_microdollars=self.ledger.spent(None, 0))
        for scope in ("a", "b"):
            controller.set_scopes([ic.Scope(
                scope, limits[scope], "total", None,
                lambda since_s, scope=scope: self.ledger.spent(scope, since_s))])
        return controller

    def limit(self, before, limit):
        return limit


class InAnEngine:
    """Accounts in a real engine, in which another process charges what a crashed one left."""

    def __init__(self, engine):
        self.url, self.cage = ic.parse_engine_url(engine.url), engine.cage()
        self.engine, self.accounts = engine, None
        self.ledger = ic.MemoryLedger()

    def started(self, limits):
        dead, self.accounts = self.accounts, ic.SharedAccounts(
            ic.Engine(self.url, ic.Slot(), 10), self.cage, self.ledger, limit=limits["proxy"])
        if dead is not None:
            key = "{ironcage:%s}:beats" % self.cage
            beat = self.engine.ask("HGET", key, dead._process).decode()
            self.accounts._charge_dead(dead._process, beat)
            assert self.engine.ask("HGET", key, dead._process) is None
            dead.engine.close()
        controller = ic.CostController(accounts=self.accounts)
        for scope in ("a", "b"):
            controller.set_scopes([ic.Scope(scope, limits[scope], "total", None,
                                            lambda since_s: 0)])
        return controller

    def limit(self, before, limit):
        """The lowest that was ever configured holds."""
        return min((amount for amount in (before, limit) if amount is not None), default=None)


@each_seed(100, 300)
def test_any_schedule_keeps_every_scope_within_its_limit(seed):
    any_schedule(seed, InThisProcess())


@pytest.mark.parametrize("seed", seeds(12, 40))
def test_any_schedule_keeps_every_scope_of_a_shared_budget_within_its_limit(seed, engine):
    any_schedule(seed, InAnEngine(engine))


def any_schedule(seed, place):
    """Thousands of steps of ask, expire, leave, commit, lower and raise, crash and restart."""
    rng = Random(seed)
    limits = {scope: rng.choice([None, 0, 900, 5_000, 40_000, 40_000]) for scope in SCOPES}
    model = Model(limits)
    line, rows = [], {}
    controller = place.started(model.limits)
    for _ in range(60):
        step = rng.choice(["ask"] * 5 + ["commit"] * 4 + ["expire", "leave", "limit", "crash"])
        before = {scope: model.free(scope) for scope in SCOPES}
        if step == "ask":
            scopes = rng.choice([("proxy",), ("proxy", "a"), ("proxy", "b")])
            asked = rng.choice([None, 5, 500, 3_000, 64_000])
            claim = controller.ask(asks(asked, may_be_lowered=rng.random() < 0.7,
                                        rate=rng.choice([0, 1, 1, 3])),
                                   scopes[1:], may_wait=rng.random() < 0.7)
            line.append((claim, scopes))
        elif step == "commit" and model.open:
            claim = rng.choice([*model.open])
            scopes = model.open.pop(claim)
            row = rows.pop(claim)
            actual = rng.choice([0, claim.microdollars, rng.randrange(claim.microdollars + 1)])
            controller.commit(claim, actual)
            model.charges.append((scopes, actual))
            place.ledger.settle({**row, "cost_microdollars": actual})
        elif step in ("expire", "leave") and line:
            number = rng.randrange(len(line))
            claim, _ = line.pop(number) if step == "leave" else line[number]
            getattr(controller, step)(claim)
        elif step == "limit":
            scope = rng.choice(SCOPES)
            limit = rng.choice([None, 0, 2_000, 50_000])
            if scope == "proxy":
                model.limits[scope] = limit
                controller.set_budget(limit)
            else:
                model.limits[scope] = place.limit(model.limits[scope], limit)
                controller.set_scopes([ic.Scope(scope, limit, "total", None, lambda since_s: 0)])
        elif step == "crash":
            # What was in flight is charged at its bound; who waited was never sent.
            model.charges += [(scopes, claim.microdollars)
                              for claim, scopes in model.open.items()]
            model.open.clear()
            line.clear()
            controller = place.started(model.limits)

        for claim, scopes in line[:]:
            if claim.is_waiting:
                continue
            line.remove((claim, scopes))
            if claim.is_open:
                assert claim.microdollars == claim.bound.microdollars(claim.output_cap)
                model.open[claim] = scopes
                rows[claim] = {"token": scopes[-1], "admitted_s": claim.admitted_s,
                               "bound_microdollars": claim.microdollars}
                place.ledger.intent(rows[claim])
        for scope in SCOPES:
            assert (model.limits[scope], model.spent(scope), model.reserved(scope)) \
                == controller.budget(scope)[1:4]
            free = model.free(scope)
            # Only a lower limit takes a scope below nothing free; no admission ever does.
            if free is not None and free < 0 and step != "limit":
                assert before[scope] is not None and free >= before[scope]
        check_line(controller, model, line)

