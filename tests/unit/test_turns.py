"""Turns: one thread runs at a time, in order, and none is forgotten; with epoll and without."""
import contextlib
import random
import select
import socket
import threading

import pytest
from support import pause, program, seeds, turn_of, until

ic = program()
LONG_S = 30


@pytest.fixture(params=["epoll", "poll"])
def turns(request, monkeypatch):
    if request.param == "poll":
        monkeypatch.delattr(select, "epoll", raising=False)
    elif not hasattr(select, "epoll"):
        pytest.skip("this system has no epoll")
    return ic.Turns()


@contextlib.contextmanager
def wires(turns):
    """A wire that takes turns, and the socket at its other end."""
    ours, theirs = socket.socketpair()
    wire = ic.Wire(ours, turns)
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


def test_who_waits_in_line_runs_in_order(turns):
    order = []

    def run(name):
        with turn_of(turns):
            order.append(name)

    threads = []
    with turn_of(turns):
        for name in "abc":
            threads += started(lambda name=name: run(name))
            until(lambda: len(turns._line) == len(threads))
        assert [] == order

    assert all_end(threads)
    assert ["a", "b", "c"] == order


def test_who_waits_for_a_socket_lets_others_run(turns):
    with wires(turns) as (wire, peer):
        got = []

        def read():
            with turn_of(turns):
                got.append(wire.receive(LONG_S))

        def write():
            with turn_of(turns):
                peer.send(b"x")

        threads = started(read)
        threads += started(write)
        assert all_end(threads)
        assert [b"x"] == got


def test_who_works_outside_the_turn_lets_others_run(turns):
    free = threading.Event()

    def work():
        with turn_of(turns), turns.outside():
            free.wait()

    def run():
        with turn_of(turns):
            free.set()

    assert all_end(started(work, run))


def test_two_who_are_outside_do_not_come_back_together(turns):
    inside, most = [], []

    def work():
        for _ in range(300):
            with turn_of(turns):
                with turns.outside():
                    pass
                inside.append(1)
                pause(0, "offers the interpreter to all who want it")
                most.append(len(inside))
                inside.pop()

    assert all_end(started(work, work, work))
    assert {1} == set(most)


def test_taking_the_turn_twice_and_leaving_it_twice_is_no_more_than_once(turns):
    turns.take()
    turns.take()
    assert turns.leave()
    assert not turns.leave()
    with turn_of(turns):
        pass


def test_a_wait_ends_at_its_deadline_whoever_waits_for_the_sockets(turns):
    """The first waits for the sockets of all, the second is parked: each in its own time."""
    ended = []

    def wait(wire, name, timeout_s):
        with turn_of(turns):
            try:
                wire.receive(timeout_s)
            except TimeoutError:
                ended.append(name)

    with wires(turns) as (first, _), wires(turns) as (second, _), wires(turns) as (third, peer):
        threads = started(lambda: wait(first, "first", 0.2))
        threads += started(lambda: wait(second, "second", 0.05))
        threads += started(lambda: wait(third, "third", LONG_S))
        until(lambda: len(ended) == 2)
        peer.send(b"x")
        assert all_end(threads)
    assert ["second", "first"] == ended


def test_when_who_waits_for_the_sockets_goes_another_does(turns):
    def read(wire, timeout_s):
        with turn_of(turns):
            wire.receive(timeout_s)

    with wires(turns) as (first, first_peer), wires(turns) as (second, second_peer):
        threads = started(lambda: read(first, LONG_S))
        until(lambda: turns._is_polling or turns._epoll is None)
        threads += started(lambda: read(second, 100 * LONG_S))
        until(lambda: turns._parked or turns._epoll is None)
        first_peer.send(b"x")
        assert all_end(threads[:1])
        second_peer.send(b"x")
        assert all_end(threads)


def test_who_waits_for_the_sockets_does_not_run_beside_who_took_the_turn_meanwhile(turns):
    begun, got = threading.Event(), []

    def read():
        with turn_of(turns):
            begun.set()
            got.append(wire.receive(LONG_S))

    with wires(turns) as (wire, peer):
        threads = started(read)
        begun.wait()
        with turn_of(turns):                   # so it waits for its socket now
            peer.send(b"x")
            until(lambda: turns._line)
            assert [] == got
        assert all_end(threads)
        assert [b"x"] == got


def test_bytes_that_nobody_reads_wake_nobody_twice(turns, monkeypatch):
    polls, poll = [], turns._poll
    monkeypatch.setattr(turns, "_poll", lambda *args: (polls.append(1), poll(*args)))
    with wires(turns) as (wire, peer), wires(turns) as (client, client_peer), turn_of(turns):
        client_peer.send(b"the next request")
        peer.send(b"x")
        wire.receive(LONG_S, client)
        for _ in range(10):
            with pytest.raises(TimeoutError):
                wire.receive(0.001, client)
    assert len(polls) <= 2 * 11


def test_a_deadline_that_has_passed_still_looks_once(turns):
    with wires(turns) as (wire, peer), turn_of(turns):
        peer.send(b"x")
        assert b"x" == wire.receive(0)
        with pytest.raises(TimeoutError):
            wire.receive(0)


def test_an_end_is_read_like_bytes_by_who_watches_and_by_who_reads(turns):
    with wires(turns) as (wire, _), wires(turns) as (client, client_peer), turn_of(turns):
        client_peer.close()
        with pytest.raises(ic.ClientGone):
            wire.receive(LONG_S, client)
        assert b"" == client.receive(LONG_S)


def test_bytes_of_a_watched_client_are_kept_and_no_end_is_waited_for(turns):
    with wires(turns) as (wire, peer), wires(turns) as (client, client_peer), turn_of(turns):
        client_peer.send(b"the next request")
        sender = threading.Timer(0.05, peer.send, [b"x"])
        sender.start()
        assert b"x" == wire.receive(LONG_S, client)
        assert b"the next request" == client.receive(LONG_S)
        sender.join()


def test_a_socket_with_the_number_of_a_closed_one_is_another(turns):
    for _ in range(3):
        with wires(turns) as (wire, peer), turn_of(turns):
            peer.send(b"x")
            assert b"x" == wire.receive(LONG_S)
        assert {} == turns._wires


def test_a_fault_in_a_turn_passes_it_on(turns):
    def fail():
        with contextlib.suppress(ZeroDivisionError), turn_of(turns):
            raise ZeroDivisionError

    assert all_end(started(fail))
    with turn_of(turns):
        pass


@pytest.mark.parametrize("seed", seeds(2, 4))
def test_many_who_read_write_time_out_and_work_outside(turns, seed):
    """Pairs pass bytes to and fro, in turns, and now and then leave the turn, wait in vain, or go
    on over a new connection: one runs at a time, no wake-up is lost, nobody remains."""
    running, overlaps, rounds = [], [], []

    def check():
        running.append(1)
        overlaps.append(len(running) > 1)
        pause(0, "offers the interpreter to all who want it")
        running.pop()

    def play(wire, begins, rng):
        with turn_of(turns):
            for number in range(40):
                if begins:
                    wire.send(b"ping", LONG_S)
                if rng.random() < 0.2:
                    with turns.outside():
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
        first, second = ic.Wire(one, turns), ic.Wire(two, turns)
        threads = started(lambda: play(first, True, rng), lambda: play(second, False, rng))
        return threads, first, second

    pairs = [pair(random.Random(seed * 100 + number)) for number in range(12)]
    assert all_end([thread for threads, _, _ in pairs for thread in threads])
    for _, first, second in pairs:
        first.close()
        second.close()
    assert 12 * 2 * 40 == len(rounds)
    assert not any(overlaps)
    assert not turns._line and not turns._parked and not turns._wires and not turns._is_taken
