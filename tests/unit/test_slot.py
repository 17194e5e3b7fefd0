"""The slot: one thread runs at a time, in order, and none is forgotten; with epoll and without."""
import contextlib
import random
import select
import socket
import threading

import pytest
from support import pause, program, seeds, slot_of, until

ic = program()
LONG_S = 30


@pytest.fixture(params=["epoll", "poll"])
def slot(request, monkeypatch):
    if request.param == "poll":
        monkeypatch.delattr(select, "epoll", raising=False)
    elif not hasattr(select, "epoll"):
        pytest.skip("this system has no epoll")
    return ic.Slot()


@contextlib.contextmanager
def wires(slot):
    """A wire that takes slot, and the socket at its other end."""
    ours, theirs = socket.socketpair()
    wire = ic.Wire(ours, slot)
    yield wire, theirs
    wire.close()
    theirs.close()


def started(*targets):
    threads = [threading.Thread(target=target, daemon=True) for target in targets]
    for thread in threads:
        thread.start()
    return threads


def all_end(threads):
    for thread in threads:
        thread.join(LONG_S)
    return not any(thread.is_alive() for thread in threads)


def test_who_waits_in_line_runs_in_order(slot):
    order = []

    def run(name):
        with slot_of(slot):
            order.append(name)

    threads = []
    with slot_of(slot):
        for name in "abc":
            threads += started(lambda name=name: run(name))
            until(lambda: len(slot._queue) == len(threads))
        assert [] == order

    assert all_end(threads)
    assert ["a", "b", "c"] == order


def test_who_waits_for_a_socket_lets_others_run(slot):
    with wires(slot) as (wire, peer):
        got = []

        def read():
            with slot_of(slot):
                got.append(wire.receive(LONG_S))

        def write():
            with slot_of(slot):
                peer.send(b"x")

        threads = started(read)
        threads += started(write)
        assert all_end(threads)
        assert [b"x"] == got


def test_who_works_outside_the_slot_lets_others_run(slot):
    free = threading.Event()

    def work():
        with slot_of(slot), slot.outside():
            free.wait()

    def run():
        with slot_of(slot):
            free.set()

    assert all_end(started(work, run))


def test_two_who_are_outside_do_not_come_back_together(slot):
    inside, most = [], []

    def work():
        for _ in range(300):
            with slot_of(slot):
                with slot.outside():
                    pass
                inside.append(1)
                pause(0, "offers the interpreter to all who want it")
                most.append(len(inside))
                inside.pop()

    assert all_end(started(work, work, work))
    assert {1} == set(most)


def test_taking_the_slot_twice_and_leaving_it_twice_is_no_more_than_once(slot):
    slot.take()
    slot.take()
    assert slot.leave()
    assert not slot.leave()
    with slot_of(slot):
        pass


def test_a_wait_ends_at_its_deadline_whoever_waits_for_the_sockets(slot):
    """The first waits for the sockets of all, the second is parked: each in its own time."""
    ended = []

    def wait(wire, name, timeout_s):
        with slot_of(slot):
            try:
                wire.receive(timeout_s)
            except TimeoutError:
                ended.append(name)

    with wires(slot) as (first, _), wires(slot) as (second, _), wires(slot) as (third, peer):
        threads = started(lambda: wait(first, "first", 0.2))
        threads += started(lambda: wait(second, "second", 0.05))
        threads += started(lambda: wait(third, "third", LONG_S))
        until(lambda: len(ended) == 2)
        peer.send(b"x")
        assert all_end(threads)
    assert ["second", "first"] == ended


def test_when_who_waits_for_the_sockets_goes_another_does(slot):
    def read(wire, timeout_s):
        with slot_of(slot):
            wire.receive(timeout_s)

    with wires(slot) as (first, first_peer), wires(slot) as (second, second_peer):
        threads = started(lambda: read(first, LONG_S))
        until(lambda: slot._is_polling or slot._epoll is None)
        threads += started(lambda: read(second, 100 * LONG_S))
        until(lambda: slot._parked or slot._epoll is None)
        first_peer.send(b"x")
        assert all_end(threads[:1])
        second_peer.send(b"x")
        assert all_end(threads)


def test_who_waits_for_the_sockets_does_not_run_beside_who_took_the_slot_meanwhile(slot):
    begun, got = threading.Event(), []

    def read():
        with slot_of(slot):
            begun.set()
            got.append(wire.receive(LONG_S))

    with wires(slot) as (wire, peer):
        threads = started(read)
        begun.wait()
        with slot_of(slot):                   # so it waits for its socket now
            peer.send(b"x")
            until(lambda: slot._queue)
            assert [] == got
        assert all_end(threads)
        assert [b"x"] == got


def test_bytes_that_nobody_reads_wake_nobody_twice(slot, monkeypatch):
    polls, poll = [], slot._poll
    monkeypatch.setattr(slot, "_poll", lambda *args: (polls.append(1), poll(*args)))
    with wires(slot) as (wire, peer), wires(slot) as (client, client_peer), slot_of(slot):
        client_peer.send(b"the next request")
        peer.send(b"x")
        wire.receive(LONG_S, client)
        for _ in range(10):
            with pytest.raises(TimeoutError):
                wire.receive(0.001, client)
    assert len(polls) <= 2 * 11


def test_a_deadline_that_has_passed_still_looks_once(slot):
    with wires(slot) as (wire, peer), slot_of(slot):
        peer.send(b"x")
        assert b"x" == wire.receive(0)
        with pytest.raises(TimeoutError):
            wire.receive(0)


def test_an_end_is_read_like_bytes_by_who_watches_and_by_who_reads(slot):
    with wires(slot) as (wire, _), wires(slot) as (client, client_peer), slot_of(slot):
        client_peer.close()
        with pytest.raises(ic.ClientGone):
            wire.receive(LONG_S, client)
        assert b"" == client.receive(LONG_S)


def test_bytes_of_a_watched_client_are_kept_and_no_end_is_waited_for(slot):
    with wires(slot) as (wire, peer), wires(slot) as (client, client_peer), slot_of(slot):
        client_peer.send(b"the next request")
        sender = threading.Timer(0.05, peer.send, [b"x"])
        sender.start()
        assert b"x" == wire.receive(LONG_S, client)
        assert b"the next request" == client.receive(LONG_S)
        sender.join()


def test_a_socket_with_the_number_of_a_closed_one_is_another(slot):
    for _ in range(3):
        with wires(slot) as (wire, peer), slot_of(slot):
            peer.send(b"x")
            assert b"x" == wire.receive(LONG_S)
        assert {} == slot._wires


def test_a_fault_in_the_slot_passes_it_on(slot):
    def fail():
        with contextlib.suppress(ZeroDivisionError), slot_of(slot):
            raise ZeroDivisionError

    assert all_end(started(fail))
    with slot_of(slot):
        pass


@pytest.mark.parametrize("seed", seeds(2, 4))
def test_many_who_read_write_time_out_and_work_outside(slot, seed):
    """Pairs pass bytes to and fro, in turn, and now and then leave the slot, wait in vain, or go
    on over a new connection: one runs at a time, no wake-up is lost, nobody remains."""
    running, overlaps, rounds = [], [], []

    def check():
        running.append(1)
        overlaps.append(len(running) > 1)
        pause(0, "offers the interpreter to all who want it")
        running.pop()

    def play(wire, begins, rng):
        with slot_of(slot):
            for number in range(40):
                if begins:
                    wire.send(b"ping", LONG_S)
                if rng.random() < 0.2:
                    with slot.outside():
                        pause(rng.random() / 2000, "work of another length each time")
                if rng.random() < 0.1:
                    with contextlib.suppress(TimeoutError):
                        wire.received = wire.receive(rng.random() / 1000)
                check()
                got = b""
                while len(got) < 4:
                    got += wire.receive(LONG_S)
                if not begins:
                    wire.send(b"pong", LONG_S)
                check()
                rounds.append(number)

    def pair(rng):
        one, two = socket.socketpair()
        first, second = ic.Wire(one, slot), ic.Wire(two, slot)
        threads = started(lambda: play(first, True, rng), lambda: play(second, False, rng))
        return threads, first, second

    pairs = [pair(random.Random(seed * 100 + number)) for number in range(12)]
    assert all_end([thread for threads, _, _ in pairs for thread in threads])
    for _, first, second in pairs:
        first.close()
        second.close()
    assert 12 * 2 * 40 == len(rounds)
    assert not any(overlaps)
    assert not slot._queue and not slot._parked and not slot._wires and not slot._is_taken
