"""The cost controller: no reservation ever takes spent + reserved past the limit, under any order of calls
and any number of threads; each is settled once; the original's rules hold one by one."""
from __future__ import annotations

import sys
import threading
from random import Random
from typing import Optional

import pytest

import ironcage_proxy as ic
from support import each_seed

EMPTY = (0, 0)


def amounts(controller: ic.CostController) -> tuple[int, int]:
    spent, reserved, _ = controller.get_full_status()
    return spent, reserved


# The original's rules.

def test_a_budget_of_zero_refuses_at_once():
    controller = ic.CostController(0)

    with pytest.raises(ic.BudgetExceeded):
        controller.check_budget()
    with pytest.raises(ic.InsufficientBudget):
        controller.reserve(1)


def test_nothing_can_be_reserved_under_a_budget_of_zero():
    assert 0 == ic.CostController(0).reserve(0).microdollars


def test_exactly_what_is_available_can_be_reserved_and_not_one_more():
    controller = ic.CostController(1_000)
    controller.add_spend(100)

    with pytest.raises(ic.InsufficientBudget):
        controller.reserve(901)
    controller.reserve(900)

    assert 0 == controller.available()
    with pytest.raises(ic.InsufficientBudget):
        controller.reserve(1)


def test_reservations_add_up():
    controller = ic.CostController(1_000)
    controller.reserve(400)
    controller.reserve(600)

    assert (0, 1_000, 1_000) == controller.get_full_status()
    assert (0, 1_000, 0) == (controller.total_spent(), controller.total_reserved(),
                             controller.available())


def test_a_refused_reservation_changes_nothing():
    controller = ic.CostController(1_000)
    controller.reserve(600)
    before = controller.get_full_status()

    with pytest.raises(ic.InsufficientBudget):
        controller.reserve(401)

    assert before == controller.get_full_status()
    assert 0 == controller.bound_exceeded()


def test_a_commit_charges_the_actual_cost_and_releases_the_rest():
    controller = ic.CostController(1_000)
    reservation = controller.reserve(600)

    controller.commit(reservation, 250)

    assert (250, 0, 1_000) == controller.get_full_status()
    assert 750 == controller.available()


def test_a_commit_of_nothing_charges_nothing():
    controller = ic.CostController(1_000)

    controller.commit(controller.reserve(600), 0)

    assert EMPTY == amounts(controller)


def test_a_limit_may_be_set_below_the_stop_as_that_of_a_lease_is():
    controller = ic.CostController(1_000, stop_at=500)

    controller.set_budget(0)

    assert (0, 500, "budget") == (controller.budget_limit(), controller.budget().stop_at,
                                  controller.budget().ended_by)


def test_a_commit_adds_the_spend_before_it_releases_the_reservation():
    """Between the two the sum may be too high, and never too low: nobody can slip in."""
    written = []

    class Watched(list):
        def __setitem__(self, at: int, amount: int) -> None:
            written.append(("spent", "reserved")[at])
            super().__setitem__(at, amount)

    controller = ic.CostController(1_000)
    reservation = controller.reserve(600)
    amounts_of = controller.accounts.by_scope["proxy"]._amounts
    amounts_of.update({key: Watched(amounts) for key, amounts in amounts_of.items()})

    controller.commit(reservation, 250)

    assert ["spent", "reserved"] == written[:2]


def test_a_commit_above_its_reservation_is_charged_in_full_and_counted():
    controller = ic.CostController(1_000)

    controller.commit(controller.reserve(600), 600)
    controller.commit(controller.reserve(100), 950)

    assert (1_550, 0) == amounts(controller)
    assert 1 == controller.bound_exceeded()
    assert 0 == controller.available()


def test_a_cancelled_reservation_is_free_again():
    controller = ic.CostController(1_000)

    controller.cancel(controller.reserve(1_000))

    assert (0, 0, 1_000) == controller.get_full_status()
    assert 1_000 == controller.reserve(1_000).microdollars


@pytest.mark.parametrize("first", ["commit", "cancel"])
@pytest.mark.parametrize("second", ["commit", "cancel"])
def test_a_reservation_settles_once(first, second):
    controller = ic.CostController(1_000)
    reservation = controller.reserve(600)

    def settle(how: str) -> None:
        if how == "commit":
            controller.commit(reservation, 100)
        else:
            controller.cancel(reservation)

    settle(first)
    after = controller.get_full_status()
    with pytest.raises(ValueError, match="settled already"):
        settle(second)

    assert after == controller.get_full_status()
    assert not reservation.is_open


def test_a_budget_can_be_lowered_to_block_and_raised_to_unblock():
    controller = ic.CostController(1_000)
    controller.add_spend(500)

    controller.set_budget(500)
    with pytest.raises(ic.BudgetExceeded):
        controller.check_budget()
    with pytest.raises(ic.InsufficientBudget):
        controller.reserve(1)
    controller.set_budget(501)
    controller.check_budget()

    assert (500, 501) == controller.get_status()
    assert 1 == controller.reserve(1).microdollars


def test_what_is_reserved_stays_reserved_when_the_budget_is_lowered_below_it():
    controller = ic.CostController(1_000)
    reservation = controller.reserve(800)

    controller.set_budget(100)

    assert (0, 800, 100) == controller.get_full_status()
    assert 0 == controller.available()
    controller.commit(reservation, 700)
    assert (700, 0, 100) == controller.get_full_status()


@pytest.mark.parametrize("spent, reserved, is_over", [
    (0, 0, False), (999, 0, False), (1_000, 0, True), (1_001, 0, True), (0, 1_000, True),
    (400, 599, False), (400, 600, True),
])
def test_the_quick_check_counts_what_is_reserved(spent, reserved, is_over):
    controller = ic.CostController(1_000)
    controller.reserve(reserved)
    controller.add_spend(spent)
    refused = []

    try:
        controller.check_budget()
    except ic.BudgetExceeded as error:
        refused.append(error)

    assert is_over == bool(refused)


def test_spend_without_a_reservation_is_charged_also_beyond_the_limit():
    controller = ic.CostController(1_000)

    controller.add_spend(5_000)

    assert (5_000, 0) == amounts(controller)
    assert 0 == controller.available()


def test_a_limit_of_none_counts_and_refuses_nothing():
    controller = ic.CostController()
    controller.check_budget()

    controller.commit(controller.reserve(10 ** 15), 10 ** 14)
    controller.reserve(10 ** 18)

    assert (10 ** 14, 10 ** 18, None) == controller.get_full_status()
    assert (None, None) == (controller.available(), controller.budget_limit())
    controller.check_budget()


def test_a_limit_can_come_and_go():
    controller = ic.CostController()
    controller.add_spend(700)

    controller.set_budget(1_000)
    assert 300 == controller.available()
    controller.set_budget(None)

    assert controller.available() is None
    assert 10 ** 9 == controller.reserve(10 ** 9).microdollars


# What a refusal says.

def test_a_refusal_of_one_request_gives_the_numbers():
    controller = ic.CostController(1_000_000)
    controller.add_spend(400_000)
    controller.reserve(500_000)

    with pytest.raises(ic.InsufficientBudget) as caught:
        controller.reserve(250_000)

    assert (402, "iron_cage_insufficient_budget", "insufficient_budget", "billing_error") == (
        caught.value.status, caught.value.openai_type, caught.value.openai_code,
        caught.value.anthropic_type)
    assert {"scope": "proxy", "limit": "budget", "limit_microdollars": 1_000_000, "spent_microdollars": 400_000,
            "reserved_microdollars": 500_000, "needed_microdollars": 250_000,
            "affordable_output_tokens": 0} == caught.value.details
    assert "Available: $0.10, Estimated max cost: $0.25." in caught.value.message
    assert (("x-should-retry", "false"),) == caught.value.headers


def test_a_refusal_when_nothing_is_left_gives_the_numbers():
    controller = ic.CostController(1_000_000)
    controller.add_spend(1_000_001)

    with pytest.raises(ic.BudgetExceeded) as caught:
        controller.check_budget()

    assert (402, "iron_cage_budget_exceeded", "budget_exceeded", "billing_error") == (
        caught.value.status, caught.value.openai_type, caught.value.openai_code,
        caught.value.anthropic_type)
    assert "Spent: $1.000001, Reserved: $0.00, Limit: $1.00." in caught.value.message
    assert 1_000_001 == caught.value.details["spent_microdollars"]
    assert (("x-should-retry", "false"),) == caught.value.headers


# Many threads.

@pytest.fixture
def restless():
    """Threads take turns a thousand times as often as usual."""
    usual_s = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    yield
    sys.setswitchinterval(usual_s)


@pytest.mark.usefixtures("restless")
def test_32_threads_never_take_the_sum_past_the_limit():
    """A poller looks at the sum all the while; in the end it must add up exactly."""
    limit = 100_000
    controller = ic.CostController(limit)
    start, is_over = threading.Barrier(33), threading.Event()
    charged, refusals, polls, too_much = [0] * 32, [0] * 32, [0], []

    def spender(number: int) -> None:
        rng = Random(number)
        held: list[ic.Reservation] = []
        start.wait()
        for _ in range(200):
            try:
                held.append(controller.reserve(rng.randrange(6_000)))
            except ic.InsufficientBudget:
                refusals[number] += 1
            if held and rng.random() < 0.7:
                reservation = held.pop(rng.randrange(len(held)))
                if rng.random() < 0.5:
                    actual = rng.randrange(reservation.microdollars // 50 + 1)
                    controller.commit(reservation, actual)
                    charged[number] += actual
                else:
                    controller.cancel(reservation)
        for reservation in held:
            controller.cancel(reservation)

    def poller() -> None:
        start.wait()
        while True:
            spent, reserved, _ = controller.get_full_status()
            polls[0] += 1
            if spent + reserved > limit or min(spent, reserved) < 0:
                too_much.append((spent, reserved))
            if is_over.is_set():
                return

    threads = [threading.Thread(target=spender, args=(number,)) for number in range(32)]
    polling = threading.Thread(target=poller)
    for thread in (*threads, polling):
        thread.start()
    for thread in threads:
        thread.join()
    is_over.set()
    polling.join()

    assert [] == too_much
    assert (sum(charged), 0, limit) == controller.get_full_status()
    assert polls[0] >= 1
    assert sum(refusals) > 0
    assert 0 == controller.bound_exceeded()


@each_seed(10, 20)
def test_of_many_threads_that_want_the_last_amount_one_gets_it(seed):
    controller = ic.CostController(1_000)
    controller.add_spend(Random(seed).randrange(1_000))
    last = controller.available()
    start, won, refused = threading.Barrier(16), [], []

    def grab() -> None:
        start.wait()
        try:
            won.append(controller.reserve(last))
        except ic.InsufficientBudget as error:
            refused.append(error)

    threads = [threading.Thread(target=grab) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert (1, 15) == (len(won), len(refused))
    assert 1_000 == sum(amounts(controller))


def test_of_many_threads_that_settle_one_reservation_one_does():
    controller = ic.CostController(1_000)
    reservation = controller.reserve(600)
    start, settled, refused = threading.Barrier(16), [], []

    def settle() -> None:
        start.wait()
        try:
            controller.commit(reservation, 100)
            settled.append(True)
        except ValueError as error:
            refused.append(error)

    threads = [threading.Thread(target=settle) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert (1, 15) == (len(settled), len(refused))
    assert (100, 0) == amounts(controller)


# Against a model that keeps lists, and sums them.

class Model:
    """The same rules, written the plainest way."""

    def __init__(self, limit: Optional[int]) -> None:
        self.limit = limit
        self.charges: list[int] = []
        self.open: dict[int, int] = {}

    def free(self) -> Optional[int]:
        return None if self.limit is None else \
            self.limit - sum(self.charges) - sum(self.open.values())

    def status(self) -> tuple[int, int, Optional[int]]:
        return sum(self.charges), sum(self.open.values()), self.limit


@each_seed(70, 200)
def test_any_sequence_of_calls_agrees_with_the_model(seed):
    rng = Random(seed)
    limit = rng.choice([None, 0, 1, 1_000, 50_000])
    controller, model = ic.CostController(limit), Model(limit)
    reservations: dict[int, ic.Reservation] = {}
    exceeded = 0
    for step in range(100):
        call = rng.choice(["reserve"] * 4 + ["commit"] * 2 + ["cancel", "again", "add", "limit"])
        free = model.free()
        if call == "reserve":
            exact = [free, free + 1] if free is not None and free >= 0 else []
            amount = rng.choice([0, 1, rng.randrange(3_000), *exact])
            try:
                reservations[step] = controller.reserve(amount)
                model.open[step] = amount
                assert free is None or amount <= free or amount == 0
            except ic.InsufficientBudget:
                assert free is not None and amount > free and amount > 0
        elif call in ("commit", "cancel") and model.open:
            which = rng.choice(sorted(model.open))
            amount = model.open.pop(which)
            if call == "commit":
                actual = rng.choice([0, amount, rng.randrange(amount + 1), amount + 1])
                controller.commit(reservations[which], actual)
                model.charges.append(actual)
                exceeded += actual > amount
            else:
                controller.cancel(reservations[which])
        elif call == "again" and len(reservations) > len(model.open):
            which = rng.choice(sorted(set(reservations) - set(model.open)))
            with pytest.raises(ValueError):
                rng.choice([controller.cancel, lambda r: controller.commit(r, 5)])(
                    reservations[which])
        elif call == "add":
            model.charges.append(rng.randrange(100))
            controller.add_spend(model.charges[-1])
        elif call == "limit":
            model.limit = rng.choice([None, 0, rng.randrange(60_000)])
            controller.set_budget(model.limit)

        free = model.free()
        assert model.status() == controller.get_full_status()
        assert (None if free is None else max(0, free)) == controller.available()
        assert exceeded == controller.bound_exceeded()


@pytest.mark.parametrize("amount", [-1, 1.5, True, "1", None])
def test_an_amount_that_is_not_a_whole_number_from_0_up_is_refused_and_changes_nothing(amount):
    controller = ic.CostController(1_000)
    held = controller.reserve(100)

    for change in (controller.reserve, controller.add_spend,
                   lambda amount: controller.commit(held, amount)):
        with pytest.raises(ValueError, match="not a whole number"):
            change(amount)

    assert (0, 100, 1_000) == controller.get_full_status()


# Sessions, which clients name.

def test_a_session_that_a_request_is_in_is_kept_and_others_are_forgotten_the_oldest_first(
        monkeypatch):
    monkeypatch.setattr(ic, "MOST_SESSIONS", 2)
    controller = ic.CostController(1_000)

    def session(name):
        return controller.accounts.session(ic.Scope(name, 500, "total", None, lambda since_s: 0))
    with session("a/1"):
        for number in range(2, 6):
            with session(f"a/{number}"):
                pass
        held = controller.ask(ic.fixed_bound(400), ["a/1"])

    assert ["a/5", "a/1"] == [budget.scope for budget in controller.accounts.sessions("a", 9)]
    assert 400 == controller.budget("a/1").reserved == held.microdollars


# The stop, which is another limit: below the budget, and not for what is in flight.

def fixed(amount):
    return ic.fixed_bound(amount)


def test_once_the_stop_is_spent_no_call_begins_and_before_that_all_of_the_budget_can_be_reserved():
    controller = ic.CostController(2_000, stop_at=1_000)
    controller.add_spend(999)
    last = controller.reserve(1_001)
    controller.commit(last, 1)

    with pytest.raises(ic.BudgetExceeded) as refused:
        controller.reserve(1)
    with pytest.raises(ic.BudgetExceeded):
        controller.check_budget()
    assert type(refused.value) is ic.BudgetExceeded
    assert "stop_at" == refused.value.details["limit"]
    assert "Spent: $0.001, Reserved: $0.00, Stop at: $0.001." in refused.value.message
    assert 0 == controller.available() == controller.budget().as_json()["available_microdollars"]
    assert 0 == controller.ask(fixed(0)).microdollars              # what is free always passes


@pytest.mark.parametrize("spent, ended_by", [
    (0, None), (999, None), (1_000, "stop_at"), (1_999, "stop_at"), (2_000, "budget"),
    (9_999, "budget")])
def test_a_refusal_says_which_limit_ended_it(spent, ended_by):
    assert ended_by == ic.Budget("proxy", 2_000, spent, 0, 1_000).ended_by


def test_those_who_wait_are_refused_when_the_stop_is_reached_and_no_sooner():
    controller = ic.CostController(2_000, stop_at=1_000)
    flights = [controller.reserve(900), controller.reserve(900)]
    waiting = [controller.ask(fixed(1_000), may_wait=True) for _ in range(3)]
    controller.commit(flights[0], 600)
    assert all(claim.is_waiting for claim in waiting)

    controller.commit(flights[1], 400)

    assert ["stop_at"] * 3 == [claim.refused_by.ended_by for claim in waiting]
    assert all(claim.decided.is_set() for claim in waiting)


def test_new_limits_decide_at_once_about_those_who_wait():
    controller = ic.CostController(1_000)
    controller.reserve(900)
    first, second = (controller.ask(fixed(500), may_wait=True) for _ in range(2))

    controller.set_limits(limit=1_500)
    assert first.is_open and second.is_waiting
    controller.set_limits(stop_at=0)

    assert "stop_at" == second.refused_by.ended_by


def test_a_stop_without_a_limit_stops_too():
    """No setting makes one; the controller does not rest on that."""
    controller = ic.CostController(stop_at=1_000)
    controller.commit(controller.reserve(10 ** 9), 1_000)

    with pytest.raises(ic.BudgetExceeded, match="Stop at"):
        controller.reserve(1)


def test_limits_are_set_together_or_not_at_all():
    controller = ic.CostController(2_000, stop_at=1_000)

    for changes in ({"limit": 1_000}, {"stop_at": 2_000}, {"limit": None},
                    {"limit": 500, "stop_at": 600}):
        with pytest.raises(ValueError, match="must be below the budget"):
            controller.set_limits(**changes)
        assert (2_000, 1_000) == (controller.budget().limit, controller.budget().stop_at)
    controller.set_limits(stop_at=None)
    controller.set_limits(limit=500)

    assert (500, None) == (controller.budget().limit, controller.budget().stop_at)


def test_a_stop_by_period_begins_anew_with_it():
    now_s = [10 * ic.DAY_S]
    controller = ic.CostController(10_000, clock=lambda: now_s[0])
    controller.set_scopes([ic.Scope("a", 500, "day", 100, lambda since_s: 0)])
    controller.commit(controller.ask(fixed(200), ["a"]), 150)
    stopped = controller.ask(fixed(1), ["a"])
    now_s[0] += ic.DAY_S

    assert ("a", "stop_at") == (stopped.refused_by.scope, stopped.refused_by.ended_by)
    assert controller.ask(fixed(1), ["a"]).is_open


@each_seed(40)
def test_any_schedule_admits_nothing_past_the_stop_and_never_passes_the_budget(seed):
    rng = Random(seed)
    limit = rng.randrange(1_000, 5_000)
    stop_at = rng.randrange(limit)
    controller, flights, line = ic.CostController(limit, stop_at=stop_at), [], []
    for _ in range(200):
        spent = controller.total_spent()
        if rng.random() < 0.5:
            line.append(controller.ask(fixed(rng.randrange(1, 900)), may_wait=rng.random() < 0.6))
            assert spent < stop_at or line[-1].refused_by is not None
        elif flights:
            flight = flights.pop(rng.randrange(len(flights)))
            controller.commit(flight, rng.randrange(flight.microdollars + 1) // 3)
        flights += [claim for claim in line if claim.is_open]
        line = [claim for claim in line if claim.is_waiting]

        budget = controller.budget()
        assert budget.spent + budget.reserved <= limit
        assert not line or budget.spent < stop_at


@pytest.mark.parametrize("spent, stop_at, kind", [
    (9, None, ic.InsufficientBudget), (10, None, ic.BudgetExceeded), (9, 9, ic.BudgetExceeded)])
def test_a_limit_that_is_spent_and_one_that_is_too_low_for_a_call_are_two_refusals(spent, stop_at,
                                                                                   kind):
    assert kind is type(ic.budget_refusal(ic.Budget("proxy", 10, spent, 0, stop_at), fixed(5)))
