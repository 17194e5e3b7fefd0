"""Shared budget without an engine: its URL and replies, who is taken for dead, and what is kept."""
from random import Random

import pytest
from support import each_seed

import ironcage_proxy as ic


# RESP.

def replies(data):
    rest = [data]

    def part(size=-1):
        end = rest[0].index(b"\r\n") if size < 0 else size
        text, rest[0] = rest[0][:end], rest[0][end + 2:]
        return text
    return ic.read_reply(part)


@pytest.mark.parametrize("data, reply", [
    (b"+OK\r\n", b"OK"), (b":-12\r\n", -12), (b"$-1\r\n", None), (b"*-1\r\n", None),
    (b"$5\r\na\r\nbc\r\n", b"a\r\nbc"), (b"$0\r\n\r\n", b""), (b"*0\r\n", []),
    (b"*3\r\n:1\r\n*1\r\n$1\r\nx\r\n$-1\r\n", [1, [b"x"], None]),
    (b"-ERR no\r\n", ic.EngineError("ERR no")), (b"*1\r\n-ERR x\r\n", [ic.EngineError("ERR x")]),
])
def test_replies_are_read(data, reply):
    assert reply == replies(data)


@pytest.mark.parametrize("data", [
    b"\r\n", b"OK\r\n", b"%1\r\n", b"_\r\n", b":\r\n", b":1.5\r\n", b": 1\r\n", b":+1\r\n",
    b"$x\r\n", b"$-2\r\n", b"*-2\r\n", b"$536870913\r\n", b"*536870913\r\n",
    b":99999999999999999999\r\n", b"*1\r\n" * 12 + b":1\r\n"])
def test_what_is_no_reply_is_not_read(data):
    with pytest.raises(ValueError):
        replies(data)


def test_a_command_is_written_with_the_length_of_each_word():
    assert b"*3\r\n$3\r\nSET\r\n$3\r\n\xc3\xbcx\r\n$1\r\n7\r\n" == ic.format_command(
        ["SET", "\u00fcx", 7])


# Its URL.

@pytest.mark.parametrize("url, parts", [
    ("redis://h", ("redis", "h", 6379, 0, "", "")),
    ("redis://:p%40ss@h:1/3", ("redis", "h", 1, 3, "", "p@ss")),
    ("rediss://me:pw@h.example:6380/0", ("rediss", "h.example", 6380, 0, "me", "pw")),
    ("redis://[::1]:7/", ("redis", "::1", 7, 0, "", "")),
    ("unix:///run/redis.sock", ("unix", "/run/redis.sock", 6379, 0, "", "")),
    ("unix://:pw@/run/redis.sock", ("unix", "/run/redis.sock", 6379, 0, "", "pw")),
])
def test_the_url_of_an_engine_is_read(url, parts):
    address = ic.parse_engine_url(url)

    assert parts == address[:6]
    assert not address.password or address.password not in f"{address} {address!r} {[address]}"


@pytest.mark.parametrize("url", [
    "", "redis://", "http://h", "redis:h", "redis://h:x", "redis://h:99999", "redis://h/x",
    "redis://h/1/2", "redis://me@h", "redis://h?db=1", "unix://", "unix://host", "redis://h#x",
    "redis://[::1", "//h"])
def test_what_is_no_url_of_an_engine_is_refused_without_showing_it(url):
    secret = url.replace("h", "s3cr3t-word")

    with pytest.raises(ValueError) as caught:
        ic.parse_engine_url(secret)
    assert "s3cr3t" not in str(caught.value)


@pytest.mark.parametrize("url, is_warned", [
    ("redis://:pw@engine.internal", True), ("redis://:pw@10.0.0.1:7", True),
    ("rediss://:pw@engine.internal", False), ("redis://:pw@127.0.0.1", False),
    ("redis://:pw@[::1]:7", False), ("redis://:pw@localhost", False), ("unix://:pw@/s", False)])
def test_a_password_that_would_cross_a_network_in_the_clear_is_warned_about(
        monkeypatch, caplog, url, is_warned):
    monkeypatch.setattr(ic, "SharedAccounts", lambda *_, **settings: settings)

    ic.accounts_for(ic.settings_from([], {"IRONCAGE_SHARED": url}), None, None)

    assert is_warned is ("in the clear: use rediss://" in caplog.text)


# Who is dead.

@each_seed(100)
def test_nobody_is_dead_before_he_was_silent_for_so_long_while_the_watch_was_unbroken(seed):
    """Against the plainest account of who was heard when."""
    rng, watch = Random(seed), ic.Watch(30, 10)
    now_s, beats, last_change, unbroken_since, heard_s = 1000.0, {}, {}, None, None
    for _ in range(200):
        now_s += rng.choice([1, 5, 5, 9, 11, 60])
        for name in rng.sample("abcd", rng.randrange(5)):
            beats[name] = str(now_s)
        if rng.random() < 0.05:
            beats.pop(rng.choice("abcd"), None)
        if rng.random() < 0.03:
            watch.forget()
            heard_s = None
        if heard_s is None or now_s - heard_s > 10:
            last_change, unbroken_since = {}, now_s
        heard_s = now_s
        for name in set(last_change) - set(beats):
            del last_change[name]
        for name, beat in beats.items():
            if last_change.get(name, ("", 0))[0] != beat:
                last_change[name] = (beat, now_s)

        dead = watch.dead(beats, now_s)

        assert dead == {name: beat for name, (beat, since_s) in last_change.items()
                        if now_s - since_s >= 30}
        assert not dead or now_s - unbroken_since >= 30


def test_a_count_is_the_same_after_it_was_kept():
    for row in (
            ic.CountRow("s", b"d" * 16, ic.Counted(7, frozenset({b"p" * 16}), True), "m", 1),
            ic.CountRow("s", b"d" * 16, ic.Counted(7), "m", 1)):
        assert row == ic.count_from_json(ic.count_to_json(row).encode())
