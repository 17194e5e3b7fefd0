"""HTTP on a socket: what bodies and answers in work may take of memory, all together."""
from __future__ import annotations

import hashlib
import json
import sys
import threading
import tracemalloc
from random import Random

import pytest
from support import ROOT, seeds, until

import ironcage_proxy as ic

sys.path.append(str(ROOT / "tests" / "bench"))
from screenshots import conversation

MB = 1024 * 1024


@pytest.fixture
def memory():
    return ic.Memory(64 * MB, ic.Slot())              # 16 of them are kept for small ones


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
    until(lambda: memory.as_json()["waiting"] > count, "it waits in line")
    return thread


def test_little_is_not_counted(memory):
    claim(memory).hold(ic.UNCOUNTED_BYTES)
    assert 0 == memory.as_json()["reserved_bytes"]


def test_what_grows_by_little_waits_for_nobody(memory):
    """The answer of a call whose body is large, while the others hold all that is left."""
    mine = claim(memory, "alice", 48)
    claim(memory, "bob").hold(2 * MB)
    for _ in range(7):
        claim(memory, "carol").hold(2 * MB)

    mine.hold(ic.UNCOUNTED_BYTES, "answer")

    assert 64 * MB == memory.as_json()["reserved_bytes"]


def test_what_was_refused_is_not_asked_for_again_with_the_next_part(memory, monkeypatch):
    """It made the settlement of a call fail, which then cost all that was reserved."""
    monkeypatch.setattr(ic, "MEMORY_WAIT_S", 0.01)
    mine, _ = claim(memory, "alice", 40), [claim(memory, "bob", 2) for _ in range(8)]
    with pytest.raises(ic.ServerBusy):
        mine.hold(20 * MB, "answer")

    mine.hold(40 * MB)

    assert {"body": 40 * MB, "answer": 0} == mine.parts


@pytest.mark.parametrize("under_way, cuts, waits", [
    (False, False, False), (False, True, False), (True, False, True), (True, True, False)])
def test_at_a_stop_nobody_waits_but_what_is_under_way_until_the_cut(
        memory, under_way, cuts, waits):
    _, mine, done = claim(memory, "alice", 48), claim(memory, "bob"), []
    small = [claim(memory, "carol", 2) for _ in range(8)]
    if under_way:
        mine.hold(ic.UNCOUNTED_BYTES)

    def hold():
        try:
            mine.hold(10 * MB)
        except ic.ServerBusy as err:
            done.append(err.message)

    thread = threading.Thread(target=hold)
    thread.start()
    until(lambda: memory.as_json()["waiting"], "it waits in line")
    memory.close(cuts=cuts)
    if waits:
        for one in small:
            one.give_back()
    thread.join(10)

    assert ([] if waits else ["the proxy is stopping"]) == done and not thread.is_alive()


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


def test_no_more_than_so_many_of_one_owner_wait(memory, monkeypatch):
    """Each is a thread and a connection; nobody else is refused for them."""
    monkeypatch.setattr(ic, "MEMORY_QUEUE", 2)
    first, done = claim(memory, "alice", 48), []
    threads = [waiting(memory, claim(memory, owner), 10, done) for owner in ("alice", "alice", "bob")]

    with pytest.raises(ic.ServerBusy):
        claim(memory, "alice").hold(10 * MB)

    assert (3, []) == (memory.as_json()["waiting"], done)
    first.hold(49 * MB)                                # what is under way is let in all the same
    first.give_back()
    for thread in threads:
        thread.join()
    assert ["alice", "alice", "bob"] == sorted(done)


def test_who_gives_up_lets_those_behind_go_on(memory, monkeypatch):
    claim(memory, "alice", 40)
    done = []
    with monkeypatch.context() as patched:
        patched.setattr(ic, "MEMORY_WAIT_S", 0.2)
        first = threading.Thread(target=lambda: pytest.raises(
            ic.ServerBusy, claim(memory, "bob").hold, 30 * MB))
        first.start()
        until(lambda: memory.as_json()["waiting"], "it waits in line")
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


@pytest.mark.parametrize("seed", seeds(2, 5))
def test_whatever_many_do_at_once_the_limit_holds_and_all_is_given_back(seed, monkeypatch):
    monkeypatch.setattr(ic, "MEMORY_WAIT_S", 0.05)
    memory, most = ic.Memory(64 * MB, ic.Slot()), []

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


# What a body takes.

SHAPES = {
    "empty lists": lambda n: b",".join([b"[]"] * n),
    "nested lists": lambda n: b",".join([b"[[[[[]]]]]"] * (n // 5)),
    "empty objects": lambda n: b",".join([b"{}"] * n),
    "objects of one": lambda n: b",".join(b'{"%x":0}' % i for i in range(n)),
    "one object": lambda n: b"{" + b",".join(b'"%d":"%d"' % (i, i) for i in range(n)) + b"}",
    "numbers": lambda n: b",".join(b"%d" % (i + 10 ** 9) for i in range(n)),
    "strings": lambda n: b",".join(b'"%d"' % i for i in range(n)),
    "wide strings": lambda n: b",".join(b'"\xf0\x9f\x98\x80%d"' % i for i in range(n)),
    "text": lambda n: b'"' + b"some words, " * n + b'"',
}


def peak_of(work):
    tracemalloc.start()
    try:
        kept = work()
        return tracemalloc.get_traced_memory()[1], kept
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_to_parse_a_body_takes_no_more_than_is_held_for_it(shape):
    raw, held = b'{"a":[' + shape(20_000) + b"]}", []

    peak, _ = peak_of(lambda: ic.parse_json_object(raw, held.append))

    assert peak <= held[0] + 20_000


@pytest.mark.parametrize("api", ["chat", "responses", "messages"])
def test_a_body_of_screenshots_takes_at_most_three_times_its_size(api):
    raw = bytearray(json.dumps(conversation(api, 6_000_000, "m"), ensure_ascii=False).encode())

    def work():
        body = ic.parse_json_object(raw)
        ic.prompt_of(api, body, ("token", "provider", "model"))
        return body, body.spliced({"max_tokens": 7, "stream": True}, frozenset())

    peak, (body, pieces) = peak_of(work)

    assert peak + len(raw) <= 3 * len(raw)
    assert {**json.loads(raw), "max_tokens": 7, "stream": True} == json.loads(b"".join(pieces))
    assert json.loads(raw) == body.fields
    assert 8 == len(body.data)
    assert len(body.text) < 50_000


def test_known_counts_tell_data_from_a_text_that_looks_like_its_hash():
    data = "A" * 5_000
    forged = "\0" + hashlib.sha256(data.encode()).hexdigest()

    def digest(text):
        body = ic.parse_json_object(json.dumps({"model": "m", "messages": [
            {"role": "user", "content": [{"type": "text", "text": text}]},
            {"role": "user", "content": [{"type": "text", "text": "B" * 5_000}]}]}).encode())
        return ic.prompt_of("chat", body, ("token", "provider", "model")).chain[0]

    assert 3 == len({digest(data), digest(forged), digest("\0" + forged)})


def test_data_in_a_text_is_counted_as_text_and_an_images_is_not():
    price = ic.PriceBook.load(str(ROOT / "pricing.json")).price("gpt-5.5", "openai")

    def bound(part):
        body = ic.parse_json_object(json.dumps({"model": "gpt-5.5", "messages": [
            {"role": "user", "content": [part]}]}).encode())
        return ic.input_tokens_bound(body, price, measured=True)

    data = "abcdefgh" * 50_000

    assert bound({"type": "text", "text": data}) > 100_000
    assert bound({"type": "image_url", "image_url": {
        "url": "data:image/png;base64," + data}}) < 26_000


class CountedEnds:
    """The pattern of an event's end, which counts the bytes that it is asked to search."""
    searched = 0
    pattern = ic._EVENT_END

    def search(self, data, at=0):
        self.searched += len(data) - at
        return self.pattern.search(data, at)

    def finditer(self, data, at=0):
        self.searched += len(data) - at
        return self.pattern.finditer(data, at)


def test_one_event_of_many_reads_is_searched_and_joined_once(monkeypatch):
    ends = CountedEnds()
    monkeypatch.setattr(ic, "_EVENT_END", ends)
    event = b"data: " + b"x" * 4_000_000 + b"\n\n"
    splitter, events = ic.EventSplitter(), []
    splitter.feed(event[:1_000])
    buffer = splitter.rest

    for at in range(1_000, len(event), 1_000):
        events += splitter.feed(event[at:at + 1_000])
        assert splitter.rest is buffer or events       # it grows in place

    assert [event] == events
    assert ends.searched < 2 * len(event)
