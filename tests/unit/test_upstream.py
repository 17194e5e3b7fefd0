"""Upstream, on wires that are scripted: which connection a request takes, what of an answer is
waited for and passed on, without the provider's key, and which headers travel either way."""
import gzip
import time
import zlib
from random import Random

import pytest
from key_forms import FORMS, readable
from scripted_wires import ScriptedWire
from support import each_seed

import ironcage_proxy as ic

KEY = "sk-canary-0123456789abcdef"
URL = "http://provider.example/v1/chat/completions"
PLACE = ("http", "provider.example", None)
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
CUT = OSError("reset by peer")


@pytest.fixture
def pool():
    return ic.KeepAliveHandler(ic.Timeouts())


def request_to(url=URL, body=(), method="POST", key=None):
    return ic.UpstreamRequest(url, method=method, headers={"host": "x"}, body=body, watched=None,
                              key=key)


def opened(pool, wire, **request):
    """What a pool answers where its next new connection is this one."""
    pool._connect = lambda request, authorization: wire
    return pool.http_open(request_to(**request))


def answer(*reads, method="POST", key=None, **timeouts):
    """A provider's answer that comes in these reads."""
    pool = ic.KeepAliveHandler(ic.Timeouts(**timeouts))
    return opened(pool, ScriptedWire(*reads), method=method, key=key)


def idle(pool):
    return [wire for _, wire in pool._idle.get(PLACE, ())]


# Which connection.

def test_of_a_bursts_connections_one_goes_with_each_that_comes_back_later(pool):
    old, new = ScriptedWire(), ScriptedWire()
    pool._idle[PLACE] = [(time.monotonic() - ic.POOL_IDLE_S - 1, old)]

    pool.give_back(new, PLACE, reusable=True)

    assert ([new], True, False) == (idle(pool), old.is_closed, new.is_closed)


def test_a_full_pool_keeps_the_newest(pool, monkeypatch):
    monkeypatch.setattr(ic, "POOLED_CONNECTIONS_PER_HOST", 1)
    old, new = ScriptedWire(), ScriptedWire()

    pool.give_back(old, PLACE, reusable=True)
    pool.give_back(new, PLACE, reusable=True)

    assert ([new], True, False) == (idle(pool), old.is_closed, new.is_closed)


def test_a_kept_connection_is_used_before_a_new_one(pool):
    kept, new = ScriptedWire(OK), ScriptedWire(OK)
    pool.give_back(kept, PLACE, reusable=True)

    assert 200 == opened(pool, new).status
    assert (1, []) == (len(kept.sent), new.sent)


@pytest.mark.parametrize("age_s, waits", [(ic.POOL_IDLE_S + 1, False), (0, True)],
                         ids=["too old", "closed, or bytes that nobody asked for"])
def test_a_kept_connection_that_may_be_over_is_closed_and_not_used(pool, age_s, waits):
    kept, new = ScriptedWire(OK, waits=waits), ScriptedWire(OK)
    pool._idle[PLACE] = [(time.monotonic() - age_s, kept)]

    assert 200 == opened(pool, new).status
    assert ([], True, 1) == (kept.sent, kept.is_closed, len(new.sent))


def test_a_kept_connection_that_takes_no_byte_is_replaced_by_a_new_one(pool):
    kept, new = ScriptedWire(takes=False), ScriptedWire(OK)
    pool.give_back(kept, PLACE, reusable=True)

    response = opened(pool, new)
    response.close()

    assert (200, True) == (response.status, kept.is_closed)
    assert set() == pool._busy


def test_a_new_connection_that_takes_no_byte_is_unreachable_and_no_call_was_made(pool):
    wire = ScriptedWire(takes=False)

    with pytest.raises(ic.UpstreamUnreachable, match="closed the connection before") as failure:
        opened(pool, wire)

    assert (False, True, set()) == (failure.value.may_be_billed, wire.is_closed, pool._busy)


def test_a_request_that_is_not_taken_in_time_may_be_billed(pool):
    with pytest.raises(ic.UpstreamTimedOut, match="stopped reading") as failure:
        opened(pool, ScriptedWire(takes=TimeoutError()))

    assert failure.value.may_be_billed


def test_after_the_cut_nothing_is_sent_and_what_is_busy_or_idle_ends(pool):
    busy, kept, late = ScriptedWire(OK), ScriptedWire(), ScriptedWire(OK)
    opened(pool, busy)
    pool.give_back(kept, PLACE, reusable=True)

    pool.shut_down()

    with pytest.raises(ic.UpstreamUnreachable, match="stopping"):
        opened(pool, late)
    assert ("shut down", True, []) == (busy.sent[-1], kept.is_closed, late.sent)
    pool.give_back(busy, PLACE, reusable=True)
    assert ([], True) == (idle(pool), busy.is_closed)


@pytest.mark.parametrize("reads, is_kept", [
    ([OK], True), ([OK[:-2], b"o", b"k"], True), ([OK + b"more"], False), ([OK[:-1]], False),
    ([OK.replace(b"1.1", b"1.0")], False),
    ([OK.replace(b"OK\r\n", b"OK\r\nconnection: close\r\n")], False),
    ([b"HTTP/1.1 204 No Content\r\n\r\n"], False), ([b"HTTP/1.1 200 OK\r\n\r\nto the end"], False),
])
def test_a_connection_is_used_again_after_a_whole_answer_only(pool, reads, is_kept):
    wire = ScriptedWire(*reads)
    response = opened(pool, wire)
    try:
        list(response.reads())
    except ic.UpstreamBroke:
        pass
    response.close()
    response.close()

    assert ([wire] if is_kept else []) == idle(pool)
    assert is_kept is not wire.is_closed


def test_a_large_request_is_not_joined_in_memory(pool):
    body = [b"x" * ic.JOINED_WRITE_BYTES]
    small, large = ScriptedWire(OK), ScriptedWire(OK)
    opened(pool, small, body=[b"x"])
    opened(pool, large, body=body)

    assert (1, 2) == (len(small.sent), len(large.sent))
    assert large.sent[1] is body[0]


@pytest.mark.parametrize("host, is_direct", [
    ("127.0.0.1:11434", True), ("localhost", True), ("[::1]:80", True), ("api.example", False)])
def test_this_machine_is_never_called_through_a_proxy(monkeypatch, host, is_direct):
    monkeypatch.setenv("http_proxy", "http://squid.example:3128")
    request = request_to(f"http://{host}/v1/models")

    ic.EnvironmentProxies().proxy_open(request, "http://squid.example:3128", "http")

    assert is_direct is (request.host == host)


# The head of an answer.

@pytest.mark.parametrize("reads, words", [
    ([b""], "closed the connection without an answer"),
    ([b"HTTP/1.1 200 OK\r\n"], "the provider's answer broke off"),
    ([CUT], "the connection to the provider broke: reset by peer"),
    ([b"SSH-2.0-OpenSSH\r\n\r\n"], "is not HTTP/1.1"),
    ([b"HTTP/1.1 200 OK\r\na b: c\r\n\r\n"], "is malformed: a header line is malformed"),
    ([b"HTTP/1.1 200 OK\r\ncontent-length: -1\r\n\r\n"], "is malformed: "),
    ([b"HTTP/1.1 101 Switching Protocols\r\n\r\n"], "with the status 101"),
    ([b"HTTP/1.1 099 Odd\r\n\r\n"], "with the status 99"),
    ([b"HTTP/1.1 103 Early Hints\r\n\r\n" * 100], "sent 100 interim answers and no other"),
])
def test_what_is_no_answer_breaks_the_call_in_plain_words(pool, reads, words):
    wire = ScriptedWire(*reads)

    with pytest.raises(ic.UpstreamBroke) as failure:
        opened(pool, wire)

    assert words in failure.value.message
    assert (True, True, set()) == (failure.value.may_be_billed, wire.is_closed, pool._busy)


def test_interim_answers_are_passed_over():
    response = answer(b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n" * 99 + OK)

    assert (200, None) == (response.status, response.headers.get("link"))
    assert [[b"ok"]] == list(response.reads())


def test_a_provider_that_says_nothing_has_timed_out():
    with pytest.raises(ic.UpstreamTimedOut, match="did not answer in time"):
        answer(TimeoutError())


@pytest.mark.parametrize("timeouts, head_s", [
    ({"first_byte_s": 5}, 5), ({"first_byte_s": 5, "call_s": 2}, 2)])
def test_the_head_of_an_answer_has_its_time(timeouts, head_s):
    pool, wire = ic.KeepAliveHandler(ic.Timeouts(**timeouts)), ScriptedWire(OK)
    opened(pool, wire)

    assert head_s - 1 < wire.timeouts_s[0] <= head_s


@pytest.mark.parametrize("method, status", [("HEAD", 200), ("POST", 204), ("POST", 304)])
def test_an_answer_without_a_body_ends_at_its_head(method, status):
    response = answer(b"HTTP/1.1 %d X\r\ncontent-encoding: br\r\n\r\nlate" % status,
                      method=method, key=KEY)

    assert [] == list(response.reads())


# The body of an answer.

def test_silence_yields_nothing_at_each_tick_and_ends_the_call_at_the_limit_alone():
    response = answer(OK[:-2], TimeoutError(), b"o", TimeoutError(), b"k")

    assert [[], [b"o"], [], [b"k"]] == list(response.reads(tick_s=0.01))


@pytest.mark.parametrize("tick_s", [1, ic.threading.TIMEOUT_MAX], ids=["ticking", "not"])
def test_silence_beyond_the_limit_is_a_time_out(tick_s):
    response = answer(OK[:-1], TimeoutError(), between_bytes_s=0.5)

    reads = response.reads(tick_s)
    assert [b"o"] == next(reads)
    with pytest.raises(ic.UpstreamTimedOut, match="did not answer in time"):
        next(reads)


def test_a_call_has_an_end_though_bytes_still_come():
    response = answer(OK[:-2], b"o", b"k")
    response._deadline_s = time.monotonic() - 1

    with pytest.raises(ic.UpstreamTimedOut):
        next(response.reads(tick_s=0.01))


@pytest.mark.parametrize("ending, kind, words", [
    (b"", ic.UpstreamBroke, "the provider's answer broke off"),
    (CUT, ic.UpstreamBroke, "the connection to the provider broke: reset by peer"),
    (TimeoutError(), ic.UpstreamTimedOut, "the provider did not answer in time"),
])
def test_a_body_that_breaks_says_how(ending, kind, words):
    reads = answer(OK[:-1], ending).reads()

    assert [b"o"] == next(reads)
    with pytest.raises(kind, match=words):
        next(reads)


def test_a_malformed_chunk_is_the_providers_fault():
    response = answer(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n")

    with pytest.raises(ic.UpstreamBroke, match="answer is malformed"):
        next(response.reads())


@pytest.mark.parametrize("grow_fails", [ic.BadRequest, ic.ServerBusy])
def test_no_more_of_an_answer_is_taken_than_there_is_room_for(grow_fails):
    def full(size):
        if size > 6:
            raise grow_fails("full")

    reads = iter([[b"a" * 6], [b"b" * 6], [b"c"]])

    assert (b"a" * 6 + b"b" * 6, False) == ic.whole_body(reads, 10)
    assert [[b"c"]] == [*reads]
    assert (b"c", True) == ic.whole_body(iter([[b"c"]]), 10)
    assert (b"a" * 10, True) == ic.whole_body(iter([[b"a" * 10]]), 10)
    assert (b"a" * 6 + b"bc", False) == ic.whole_body(
        iter([[b"a" * 6], [b"b", b"c"], [b"d"]]), 10, grow=full)


# The key in an answer.

@each_seed(60)
def test_random_texts_in_random_reads_lose_the_key_and_nothing_else(seed):
    """The guard alone: all that is not the key is passed on, byte for byte."""
    rng = Random(seed)
    key = "sk-" + "".join(rng.choices("abAB01_-/+=", k=rng.randint(20, 40)))
    parts, expected = [], []
    for _ in range(rng.randint(1, 12)):
        kind = rng.randrange(5)
        if kind == 0:
            text = rng.choice([*FORMS.values()])(key) if seed % 2 else key
            parts.append(text)
            expected.append(None)
        else:
            text = "".join(rng.choices(["a", "sk-", key[:8], key[:12], key[5:], "\\n", '\\"', "%20",
                                        "\\u0073", "\\u003c", "é", " ", "\\\\"], k=9)) + " "
            parts.append(text + "|")
            expected.append(text + "|")
    data = "".join(parts).encode()
    guard, shown, at = ic.KeyGuard(key, "identity"), b"", 0
    while at < len(data):
        size = rng.choice([1, 2, 5, 40, 300])
        shown += b"".join(guard.read([data[at:at + size]]))
        at += size
    shown += guard.waiting

    assert len(data) == len(shown)
    assert key not in readable(shown)
    position = 0
    for part, kept in zip(parts, expected):
        piece = shown[position:position + len(part.encode())]
        position += len(part.encode())
        assert kept is None or kept.encode() == piece


@pytest.mark.parametrize("escape", ["%%%02x", "%%%02X", "%%25%02x", "%%2525%02X", "\\u00%02x",
                                    "\\\\u00%02X", "\\u005cu00%02x", "\\u0025%02X",
                                    "%%5Cu00%02x", "%%255c%%255Cu00%02x"])
def test_no_escape_of_one_character_hides_the_key_wherever_a_read_ends(escape):
    for at, char in enumerate(KEY):
        text = f"{KEY[:at]}{escape % ord(char)}{KEY[at + 1:]}".encode()
        for cut in range(len(text) + 1):
            guard = ic.KeyGuard(KEY, "identity")
            shown = b"".join(guard.read([text[:cut]]) + guard.read([text[cut:]])) + guard.waiting

            assert len(text) == len(shown), (text, cut)
            assert shown.count(b"*") >= len(KEY) - ic.OPEN_KEY_CHARS, (text, cut, shown)


@pytest.mark.parametrize("at", [0, 3, 12, len(KEY) - 1])
def test_a_key_in_escapes_that_are_not_masked_ends_the_answer_wherever_a_read_ends(at):
    escape = "".join(f"%{ord(char):02X}" for char in f"\\u{ord(KEY[at]):04x}")
    text = f"{KEY[:at]}{escape}{KEY[at + 1:]}".encode()
    for cut in range(len(text) + 1):
        guard = ic.KeyGuard(KEY, "identity")
        with pytest.raises(ic.UpstreamBroke, match="repeats its key"):
            guard.read([text[:cut]])
            guard.read([text[cut:]])


def test_reads_without_the_key_pass_as_the_same_pieces():
    guard = ic.KeyGuard(KEY, "identity")
    for pieces in ([b"a", b"", b"b\\u0073"], [b"sk-canar"], [b"y"] * 3, [KEY[9:].encode()]):
        assert pieces is guard.read(pieces) or pieces == guard.read([]) + pieces


def test_a_key_that_cannot_be_masked_ends_the_answer(monkeypatch):
    monkeypatch.setattr(ic.KeyGuard, "_masked", lambda guard, text: text)

    with pytest.raises(ic.UpstreamBroke, match="repeats its key"):
        ic.KeyGuard(KEY, "identity").read([KEY.encode()])


@pytest.mark.parametrize("text, waits", [
    (KEY[:ic.OPEN_KEY_CHARS], False),                  # no secret, and as often no key at all
    (KEY[:ic.OPEN_KEY_CHARS + 1], True), (KEY[:-1], True), (KEY[1:-1], False),
    (f"{KEY[:12]} and so on", False), ("%73" + KEY[1:12], True), (KEY[:12] + "%", True),
    (KEY[:12] + "%3", True), ("\\", True), ("\\u", True), ("\\u00", True), ("\\u007", True),
    ("\\u0073", False), ("\\n", False), ("a plain end", False),
])
def test_a_read_waits_for_the_next_where_it_ends_in_more_of_the_key_than_is_open(text, waits):
    guard = ic.KeyGuard(KEY, "identity")
    pieces = [b"before ", text.encode()]

    assert ([] if waits else pieces) == guard.read(pieces)
    assert (b"before " + text.encode() if waits else b"") == guard.waiting


@pytest.mark.parametrize("encoding", ["br", "zstd", "gzip, gzip"])
def test_a_coding_in_which_the_key_could_hide_is_not_passed_on(encoding):
    with pytest.raises(ic.UpstreamBroke, match="its key could be in it"):
        ic.KeyGuard(KEY, encoding)


@pytest.mark.parametrize("write", [gzip.compress, zlib.compress])
def test_a_compressed_body_is_passed_on_unless_it_holds_the_key(write):
    encoding = "gzip" if write is gzip.compress else "deflate"
    fine, bad = write(b"no key"), write(f"the key {KEY}".encode())

    assert [fine] == ic.KeyGuard(KEY, encoding).read([fine])
    with pytest.raises(ic.UpstreamBroke, match="repeats its key"):
        ic.KeyGuard(KEY, encoding).read([bad])


def test_no_header_of_an_answer_holds_the_key_or_a_name_of_ours():
    fine = ic.Headers([("server", "lab"), ("x-request-id", "r")])
    kept = ic.KeyGuard(KEY, "identity").kept

    assert fine is kept(fine)
    assert [*fine] == [*kept(ic.Headers([
        *fine, ("x-ironcage-cost-microdollars", "0"), ("x-debug", f"key={KEY}"),
        (f"x-{KEY.lower()}", "1"), ("x-url", KEY.replace("-", "%2d")),
        ("x-json", KEY.replace("s", "\\u0073"))]))]


@pytest.mark.parametrize("key", [None, "", "ollama", "x" * (ic.LEAST_KEY_CHARS - 1)])
def test_a_word_that_is_no_secret_is_not_looked_for(key):
    pieces = [b"ask ollama ", b"x" * 15]

    assert pieces is ic.KeyGuard(key, "br").read(pieces)


# Headers.

HEAD = [("host", "proxy"), ("user-agent", "sdk/1"), ("authorization", "Bearer ic-token"),
        ("x-api-key", "ic-token"), ("cookie", "a=b"), ("connection", "keep-alive, x-hop"),
        ("x-hop", "1"), ("accept-encoding", "gzip"), ("x-ironcage-session", "s"),
        ("x-stainless-lang", "js"), ("openai-organization", "org-1"), ("content-type", "text/odd")]


def sent_up(headers=(), method="POST", format="openai", body_bytes=5, translator=None, betas=()):
    head = ic.RequestHead(method, "/v1/x", None, 1, ic.Headers(HEAD + [*headers]))
    provider = ic.Provider("p", format, "https://p.example", key=KEY)
    return ic.upstream_headers(head, provider, body_bytes, translator, betas)


def test_what_travels_up_is_end_to_end_and_the_providers_own_key():
    assert {"host": "p.example", "user-agent": "sdk/1", "authorization": f"Bearer {KEY}",
            "x-stainless-lang": "js", "openai-organization": "org-1", "content-type": "text/odd",
            "accept-encoding": "identity", "content-length": "5"} == sent_up()


@pytest.mark.parametrize("name, value", [
    ("x-forwarded-for", "10.1.2.3"), ("forwarded", "for=10.1.2.3"), ("via", "1.1 caddy"),
    ("x-real-ip", "10.1.2.3"), ("referer", "https://wiki.internal/page"),
    ("origin", "https://wiki.internal"), ("x-goog-api-key", "ic-token"),
    ("x-forwarded-access-token", "secret"), ("cf-access-jwt-assertion", "secret"),
    ("true-client-ip", "10.1.2.3"), ("tailscale-user-login", "me@example"),
    ("x-custom", "Token ic-token;v=1"), ("x-custom", "key=ic%2Dtoken"),
    ("x-custom", '{"key": "ic\\u002dtoken"}')])
def test_nothing_says_who_stands_before_the_proxy_nor_its_token(name, value):
    assert name not in sent_up([(name, value)])


def test_a_word_beside_the_token_takes_no_header_away():
    head = ic.RequestHead("POST", "/v1/x", None, 1, ic.Headers([
        ("authorization", "Bearer ic-token"), ("x-api-key", "1"), ("user-agent", "sdk/1")]))
    provider = ic.Provider("p", "openai", "https://p.example", key=KEY)

    assert "sdk/1" == ic.upstream_headers(head, provider, 5)["user-agent"]


def test_what_one_vendors_client_says_to_it_stays_behind_in_a_translated_call():
    assert {"host": "p.example", "user-agent": "sdk/1", "authorization": f"Bearer {KEY}",
            "accept-encoding": "identity", "content-length": "5",
            "content-type": "application/json"} == sent_up(translator=object())


@pytest.mark.parametrize("method, body_bytes, length", [
    ("GET", 0, None), ("DELETE", 0, None), ("GET", 3, "3"), ("POST", 0, "0"), ("PATCH", 0, "0")])
def test_a_body_is_announced_where_there_can_be_one(method, body_bytes, length):
    assert length == sent_up(method=method, body_bytes=body_bytes).get("content-length")


@pytest.mark.parametrize("headers, betas, version, asked", [
    ([], [], ic.DEFAULT_ANTHROPIC_VERSION, None),
    ([("anthropic-version", "2024-01-01"), ("anthropic-beta", "one-1")], [], "2024-01-01", "one-1"),
    ([("anthropic-beta", "one-1")], ["one-1", "two-2"], ic.DEFAULT_ANTHROPIC_VERSION,
     "one-1,two-2"),
    ([], ["two-2"], ic.DEFAULT_ANTHROPIC_VERSION, "two-2"),
])
def test_anthropic_is_asked_for_the_features_of_the_client_and_for_ours(headers, betas, version,
                                                                        asked):
    sent = sent_up(headers, format="anthropic", betas=betas)

    assert (KEY, version, asked) == (sent["x-api-key"], sent["anthropic-version"],
                                     sent.get("anthropic-beta"))


def test_what_comes_down_is_end_to_end():
    assert [("content-type", "a/b"), ("x-request-id", "r")] == ic.answer_headers(ic.Headers([
        ("content-type", "a/b"), ("connection", "x-hop"), ("x-hop", "1"), ("x-request-id", "r"),
        ("content-length", "3"), ("set-cookie", "a=b"), ("transfer-encoding", "chunked")]))


def test_a_provider_without_its_key_is_named_with_the_variable_to_set():
    provider = ic.Provider("lab", "openai", "https://lab.example", key_env="LAB_API_KEY")

    with pytest.raises(ic.NoProviderKey, match="lab .* LAB_API_KEY"):
        ic.check_key(provider)
    assert None is ic.check_key(provider._replace(key="k"))
    assert None is ic.check_key(provider._replace(key_env=""))             # it wants none


@pytest.mark.parametrize("name, maker, key", [
    ("openai", "anthropic", "sk-ant-canary"), ("anthropic", "openai", "sk-proj-canary"),
    ("openai", "openrouter", "sk-or-v1-canary"), ("openai", "groq", "gsk_canary"),
    ("anthropic", "gemini", "AIzacanary")])
def test_a_key_that_another_provider_made_is_not_sent_and_both_are_named(name, maker, key):
    provider = ic.KNOWN_PROVIDERS[name]._replace(key=key)

    with pytest.raises(ic.NoProviderKey) as refused:
        ic.check_key(provider)
    assert ic.KNOWN_PROVIDERS[maker].key_env in refused.value.message
    assert provider.key_env in refused.value.message and key not in refused.value.message
    assert None is ic.check_key(provider._replace(base_url="https://gateway.example"))
    with pytest.raises(ic.NoProviderKey):
        ic.check_key(ic.KNOWN_PROVIDERS["deepseek"].speaking("messages")._replace(
            key=key.replace("AIza", "gsk_")))
    assert None is ic.check_key(ic.KNOWN_PROVIDERS[maker]._replace(key=key))


@pytest.mark.parametrize("text, seconds", [
    ("1s", 1), ("6m0s", 360), ("120ms", 1), ("1h2m3s", 3723), ("0.5s", 1), ("2m", 120),
    ("1s1ms", 2), ("0s", 0)])
def test_durations_of_rate_limits(text, seconds):
    assert seconds == ic.duration_s(text)


@pytest.mark.parametrize("text", ["", "soon", "-1s", "1d", "1", "1234567890s", "١s"])
def test_what_is_no_duration(text):
    with pytest.raises(ValueError):
        ic.duration_s(text)


@pytest.mark.parametrize("api, headers, expected", [
    ("messages", [("anthropic-ratelimit-tokens-limit", "9"), ("x", "y")],
     [("x-ratelimit-limit-tokens", "9"), ("x", "y")]),
    ("messages", [("anthropic-ratelimit-requests-reset", "2026-01-01T00:01:00Z")],
     [("x-ratelimit-reset-requests", "60s")]),
    ("messages", [("anthropic-ratelimit-requests-reset", "2025-12-31T00:00:00Z")],
     [("x-ratelimit-reset-requests", "0s")]),
    ("messages", [("anthropic-ratelimit-requests-reset", "soon")], []),
    ("chat", [("x-ratelimit-remaining-requests", "1")],
     [("anthropic-ratelimit-requests-remaining", "1")]),
    ("chat", [("x-ratelimit-reset-tokens", "1m0s")],
     [("anthropic-ratelimit-tokens-reset", "2026-01-01T00:01:00Z")]),
    ("chat", [("x-ratelimit-reset-tokens", "soon"), ("retry-after", "7")], [("retry-after", "7")]),
])
def test_rate_limits_are_told_in_the_other_vendors_names_and_forms(monkeypatch, api, headers,
                                                                   expected):
    monkeypatch.setattr(ic.time, "time", lambda: ic.parse_time("2026-01-01T00:00:00Z"))

    assert expected == ic.translated_rate_limits(headers, api)


def test_a_limit_of_nothing_is_used_up():
    told = ic.with_notice([], "messages", [(0, 0, None)])

    assert ("anthropic-ratelimit-unified-overage-utilization", "0.99") in told


@pytest.mark.parametrize("standings, percent", [
    ([(74, 100, None), (80, 100, 7), (79, 100, 9)], "80"), ([(3, 4, None)], "75"),
    ([(5, 4, None)], "99"), ([], None), ([(74_999, 100_000, None)], None)])
def test_any_kind_of_limit_can_join(standings, percent):
    told = dict(ic.with_notice([("a", "b")], "responses", standings))

    assert ("b", percent) == (told["a"], told.get("x-codex-primary-used-percent"))
    assert ("7" if percent == "80" else None) == told.get("x-codex-primary-reset-at")
