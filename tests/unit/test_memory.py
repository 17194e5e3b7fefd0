"""Chapter 18: what bodies and answers in work may take of memory, all together."""
from __future__ import annotations

import threading
from random import Random

import pytest

import ironcage_proxy as ic

MB = 1024 * 1024


@pytest.fixture
def memory():
    return ic.Memory(64 * MB, ic.Turns())              # 16 of them are kept for small ones


def claim(memory, owner="alice", megabytes=0):
    made = ic.Claim(memory, owner)
    if megabytes:
        made.hold(megabytes * MB)
    return made


def waiting(memory, claimed, megabytes, done):
    """A thread that holds more, and then says who it is."""
    count = memory.as_json()["waiting"]

    def hold():
        claimed.hold(megabytes * MB)
        done.append(claimed.owner)

    thread = threading.Thread(target=hold)
    thread.start()
    while memory.as_json()["waiting"] == count:
        threading.Event().wait(0.001)
    return thread


def test_little_is_not_counted(memory):
    claim(memory).hold(ic.UNCOUNTED_BYTES)
    assert 0 == memory.as_json()["reserved_bytes"]


def test_what_can_never_fit_is_refused_by_name(memory):
    with pytest.raises(ic.BodyTooLarge, match="--max-memory-mb"):
        claim(memory).hold(49 * MB)

    assert {"limit_bytes": 64 * MB, "reserved_bytes": 0, "waiting": 0} == memory.as_json()


def test_what_is_given_back_is_free_for_the_next(memory):
    first, done = claim(memory, "alice", 48), []
    thread = waiting(memory, claim(memory, "bob"), 30, done)

    first.give_back()
    thread.join()

    assert (["bob"], 30 * MB) == (done, memory.as_json()["reserved_bytes"])


def test_a_wait_for_room_has_an_end(memory, monkeypatch):
    monkeypatch.setattr(ic, "MEMORY_WAIT_S", 0.01)
    claim(memory, "alice", 48)

    with pytest.raises(ic.ServerBusy) as refused:
        claim(memory, "bob").hold(30 * MB)

    assert ("retry-after", "2") in refused.value.headers
    assert {"limit_bytes": 64 * MB, "reserved_bytes": 48 * MB, "waiting": 0} == memory.as_json()


def test_who_gives_up_lets_those_behind_go_on(memory, monkeypatch):
    claim(memory, "alice", 40)
    done = []
    with monkeypatch.context() as patched:
        patched.setattr(ic, "MEMORY_WAIT_S", 0.2)
        first = threading.Thread(target=lambda: pytest.raises(
            ic.ServerBusy, claim(memory, "bob").hold, 30 * MB))
        first.start()
        while not memory.as_json()["waiting"]:
            threading.Event().wait(0.001)
    behind = waiting(memory, claim(memory, "carol"), 5, done)

    first.join()
    behind.join()

    assert ["carol"] == done


def test_a_small_claim_passes_large_ones_that_wait(memory):
    alice, done = claim(memory, "alice", 48), []
    thread = waiting(memory, claim(memory, "alice"), 20, done)

    claim(memory, "alice", 2)                          # it does not wait

    assert [] == done
    alice.give_back()
    thread.join()


def test_small_claims_take_no_more_than_their_part_from_large_ones_that_wait(memory):
    alice, done = claim(memory, "alice", 48), []
    large = waiting(memory, claim(memory, "bob"), 20, done)
    for _ in range(8):
        claim(memory, "carol", 2)
    small = waiting(memory, claim(memory, "carol"), 2, done)

    alice.give_back()
    large.join()
    small.join()

    assert {"bob", "carol"} == {*done}
    assert (20 + 9 * 2) * MB == memory.as_json()["reserved_bytes"]


def test_an_owner_leaves_a_quarter_to_those_who_hold_nothing(memory):
    flood, done = claim(memory, "flood", 30), []
    thread = waiting(memory, claim(memory, "flood"), 10, done)

    claim(memory, "alice", 18)                         # before the one that waits

    assert [] == done
    flood.give_back()
    thread.join()


def test_who_holds_least_is_next_and_then_who_came_first(memory):
    alice, other = claim(memory, "alice", 4), claim(memory, "other", 44)
    lined_up = [claim(memory, owner) for owner in ("alice", "carol", "carol")]
    threads = [waiting(memory, made, 14, []) for made in lined_up]

    def let_in():
        return [made.size // MB for made in lined_up]

    other.hold(30 * MB)
    assert [0, 14, 0] == let_in()
    other.hold(3 * MB)
    assert [14, 14, 0] == let_in()
    for made in (alice, other, *lined_up):
        made.give_back()
    for thread in threads:
        thread.join()


def test_what_is_under_way_is_let_in_first_and_may_take_all(memory):
    alice, bob = claim(memory, "alice", 30), claim(memory, "bob", 18)
    done = []
    new = waiting(memory, claim(memory, "carol"), 30, done)

    alice.hold(46 * MB)                                # more than the part for large ones

    assert (64 * MB, []) == (memory.as_json()["reserved_bytes"], done)
    alice.give_back()
    bob.give_back()
    new.join()


def test_body_and_answer_of_one_request_add_up(memory):
    mine = claim(memory, "alice", 10)

    mine.hold(5 * MB, "answer")
    mine.grow(4 * MB, "answer")                        # it is held already
    assert 15 * MB == memory.as_json()["reserved_bytes"]
    mine.grow(6 * MB, "answer")                        # twice that, so that it need not soon again
    assert 22 * MB == memory.as_json()["reserved_bytes"]
    mine.give_back()

    assert 0 == memory.as_json()["reserved_bytes"]


@pytest.mark.parametrize("seed", range(5))
def test_whatever_many_do_at_once_the_limit_holds_and_all_is_given_back(seed, monkeypatch):
    monkeypatch.setattr(ic, "MEMORY_WAIT_S", 0.05)
    memory, most = ic.Memory(64 * MB, ic.Turns()), []

    def work(number):
        rng = Random(seed * 100 + number)
        for _ in range(30):
            mine = ic.Claim(memory, rng.choice("ab"))
            try:
                for _ in range(rng.randrange(4)):
                    mine.hold(rng.randrange(30 * MB), rng.choice(["body", "answer"]))
                    most.append(memory.as_json()["reserved_bytes"])
            except (ic.ServerBusy, ic.BodyTooLarge):
                pass
            mine.give_back()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert max(most) <= 64 * MB
    assert {"limit_bytes": 64 * MB, "reserved_bytes": 0, "waiting": 0} == memory.as_json()
    assert not memory._held
