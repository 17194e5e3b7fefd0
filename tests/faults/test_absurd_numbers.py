"""Numbers that no sane peer sends, wherever a number is read: one clear sentence, or left out.

Each table is tried on one proxy over real sockets, so that a fault would also fail what follows.
"""
import json
import logging
import urllib.parse
from dataclasses import replace
from random import Random

import pytest
from support import ADMIN_TOKEN, MockProvider, Reply, call, program, settled_status, start_proxy

ic = program()
CHAT = {"model": "gpt-4o-mini", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]}
CLAUDE = {**CHAT, "model": "claude-haiku-4-5"}
ABSURD = (
    "9" * 19, "9" * 40, "9" * 2000, "-1", "-" + "9" * 30, "+5x", "1e9999999999999999999",
    "1e-9999999999999999999", "-1e400", "99999999999999999999h", "9" * 30 + "s", "9" * 30 + "ms",
    "1h99999999999999m", "1h1h", "NaN", "Infinity", "-Infinity", "\u00b2", "\u0663", "1\u0662",
    "0x10", "1_000", " ", "--1", "1..2", "1,5", "2026-13-45T99:99:99Z", "9999-12-31T23:59:59-23:59",
    "0001-01-01T00:00:00+23:59", "275760-09-13T00:00:00Z", "\udcff")


def mutated_numbers(seed, count):
    """Numbers and near-numbers of every length, made at random."""
    rng = Random(seed)
    pieces = ["0", "9", "1", "-", "+", ".", "e", "E", "_", "h", "m", "s", "ms", "T", "Z", ":", " ",
              "\u00b2", "\u0663", "99999999999999999999", "000000000000000000000000", "2026-11-28"]
    return ["".join(rng.choices(pieces, k=rng.randint(1, 12))).strip() or "0" for _ in range(count)]


@pytest.fixture(scope="module")
def served():
    with MockProvider() as mock:
        proxy = start_proxy(mock, "--budget", "10", "--admin-token", ADMIN_TOKEN)
        yield mock, proxy
        proxy.stop()


@pytest.fixture
def quiet(caplog):
    """No trace may be in the log of a test."""
    caplog.set_level(logging.INFO, "ironcage")
    yield
    assert not [record for record in caplog.records if record.exc_info]


def on_the_wire(text):
    return text.encode("utf-8", "surrogateescape").decode("latin-1")


NUMBERED_HEADERS = ("retry-after", "retry-after-ms", "x-should-retry", "age", "date", "expires",
                    "keep-alive", "openai-processing-ms", "x-request-id")


@pytest.mark.parametrize("path, fields", [
    ("/v1/chat/completions", CHAT), ("/v1/chat/completions", CLAUDE), ("/v1/messages", CHAT),
    ("/v1/messages", {**CHAT, "stream": True})],
    ids=["same format", "for OpenAI's clients", "for Anthropic's", "streamed"])
@pytest.mark.parametrize("status", [200, 429])
def test_absurd_numbers_in_a_providers_headers_spoil_no_answer(served, quiet, path, fields, status):
    mock, proxy = served
    names = NUMBERED_HEADERS + tuple(
        pair["claude" not in fields["model"]] for pair in ic.RATE_LIMIT_HEADERS)
    for number in (*ABSURD, *mutated_numbers(status, 20)):
        def answering(request, number=on_the_wire(number)):
            reply = mock.default_reply(request)
            kept = [header for header in reply.headers if header[0] not in names]
            return replace(reply, status=status, headers=(*kept, *(
                (name, number) for name in names)))
        mock.script(answering)

        answer = call(proxy.port, "POST", path, fields)

        assert status == answer.status, (number, answer)
        for name, value in answer.headers:
            if path == "/v1/messages" and name.endswith("-reset"):
                assert ic.parse_time(value) < 2 ** 32, value


@pytest.mark.parametrize("said", [
    b"content-length: %b\r\n\r\n{}", b"transfer-encoding: chunked\r\n\r\n%b\r\n{}\r\n0\r\n\r\n"],
    ids=["length", "chunk size"])
def test_absurd_lengths_of_a_providers_answer_are_its_fault(served, quiet, said):
    mock, proxy = served
    for number in ABSURD:
        if number.strip() and number not in ("9" * 19,):
            mock.script(Reply(framing="raw", steps=(
                b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-type: application/json\r\n"
                + said % number.encode("utf-8", "surrogateescape"),)))

            answer = call(proxy.port, "POST", "/v1/chat/completions", CHAT)

            assert (502, "upstream_broke") == (answer.status, answer.json["error"]["code"]), number
    assert 0 == settled_status(proxy)["reserved_microdollars"]


@pytest.mark.parametrize("form", [
    '{"limit_usd": %s}', '{"limit_usd": "%s"}', '{"limit_usd": "1", "stop_at_usd": %s}',
    '{"stop_at_usd": "%s"}', '{"limit_usd": [%s]}', '{"limit_usd": {"usd": %s}}'])
def test_absurd_amounts_are_refused_and_change_nothing(served, quiet, form):
    _, proxy = served
    before = settled_status(proxy)["limit_microdollars"]
    for number in (*ABSURD, "9" * 1_000_000, "1e400", "0." + "0" * 100_000 + "1", "١٢", "true"):
        body = (form % number).encode("utf-8", "surrogateescape")

        answer = call(proxy.port, "PUT", "/ironcage/budget", body, token=ADMIN_TOKEN)

        assert 400 == answer.status, (number[:40], answer)
        assert len(answer.json["error"]["message"]) < 400
        assert before == call(proxy.port, "GET", "/ironcage/budget").json["limit_microdollars"]


@pytest.mark.parametrize("seed", range(4))
def test_random_amounts_are_taken_exactly_or_refused(served, quiet, seed):
    _, proxy = served
    for number in mutated_numbers(seed, 40):
        for form in ("%s", '"%s"'):
            body = ('{"limit_usd": %s}' % (form % number)).encode()
            answer = call(proxy.port, "PUT", "/ironcage/budget", body, token=ADMIN_TOKEN)
            assert answer.status in (200, 400), (number, answer)
            if answer.status == 200:
                assert int(float(number) * 10 ** 6) == pytest.approx(
                    answer.json["limit_microdollars"], abs=1)
    assert 200 == call(proxy.port, "PUT", "/ironcage/budget", {"limit_usd": None},
                       token=ADMIN_TOKEN).status


@pytest.mark.parametrize("flag", ["--budget", "--stop-at", "--port", "--wait", "--max-body-mb",
                                  "--cache-ttl"])
def test_an_absurd_number_in_a_flag_is_one_line(flag, capsys):
    for number in (*ABSURD, "9" * 100_000, *mutated_numbers(flag, 30)):
        try:
            ic.settings_from([f"{flag}={number}"] + ["--budget=1"] * (flag == "--stop-at"),
                             {"OPENAI_API_KEY": "sk"})
        except ic.Misconfigured as err:
            assert str(err).startswith(flag) and len(str(err)) < 300 and "\n" not in str(err)


@pytest.mark.parametrize("path", ["/ironcage/usage?limit=", "/v1/models?limit=",
                                  "/ironcage/status?since=", "/ironcage/metrics?x="])
def test_absurd_numbers_in_a_query_are_taken_or_refused(served, quiet, path):
    _, proxy = served
    for number in ABSURD:
        asked = urllib.parse.quote(number.encode("utf-8", "surrogateescape"))
        assert call(proxy.port, "GET", path + asked).status in (200, 400), number


# Fields that money is computed from: path, fields, and where the number stands.
MESSAGE = {**CLAUDE, "max_tokens": 2000}
COUNTED_FIELDS = {
    "max_tokens": ("/v1/chat/completions", CHAT, ("max_tokens",)),
    "max_completion_tokens": ("/v1/chat/completions", CHAT, ("max_completion_tokens",)),
    "n": ("/v1/chat/completions", CHAT, ("n",)),
    "Anthropic's max_tokens": ("/v1/messages", MESSAGE, ("max_tokens",)),
    "a thinking budget": ("/v1/messages", {**MESSAGE, "thinking": {"type": "enabled"}},
                          ("thinking", "budget_tokens")),
    "max_output_tokens": ("/v1/responses", {"model": "gpt-4o-mini", "input": "x"},
                          ("max_output_tokens",)),
    "max_tool_calls": ("/v1/responses", {"model": "gpt-4o", "input": "x", "max_output_tokens": 9,
                                         "tools": [{"type": "web_search"}]}, ("max_tool_calls",)),
    "max_uses": ("/v1/messages", {**MESSAGE, "tools": [
        {"type": "web_search_20250305", "name": "web_search"}]}, ("tools", 0, "max_uses")),
    "translated max_tokens": ("/v1/chat/completions", CLAUDE, ("max_tokens",)),
    "translated the other way": ("/v1/messages", CHAT, ("max_tokens",)),
}


@pytest.mark.parametrize("name", COUNTED_FIELDS)
def test_a_field_that_money_is_computed_from_has_a_sane_number(served, quiet, name):
    mock, proxy = served
    path, fields, place = COUNTED_FIELDS[name]
    for number in ("9" * 19, "9" * 4300, "9" * 4301, "-1", "-" + "9" * 4300, "1e400", "1e18", "1.5",
                   "true", '"5"', "[1]", "{}", "NaN"):
        changed = json.loads(json.dumps(fields))
        holder = changed
        for step in place[:-1]:
            holder = holder[step]
        holder[place[-1]] = "NUMBER"
        sent = len(mock.seen)

        answer = call(proxy.port, "POST", path,
                      json.dumps(changed).replace('"NUMBER"', number).encode())

        assert 400 == answer.status, (number[:20], answer)
        assert sent == len(mock.seen)


@pytest.mark.parametrize("path, fields", [
    ("/v1/chat/completions", CHAT), ("/v1/chat/completions", CLAUDE), ("/v1/messages", CHAT),
    ("/v1/messages", MESSAGE), ("/v1/responses", {"model": "gpt-4o-mini", "input": "x"})])
@pytest.mark.parametrize("name", ["temperature", "top_p", "top_k", "seed", "metadata",
                                  "presence_penalty", "logit_bias", "user"])
def test_long_whole_numbers_elsewhere_pass_or_are_refused_and_break_nothing(
        served, quiet, path, fields, name):
    """Ruled: up to 4,300 digits."""
    mock, proxy = served
    mock.applies_vendor_rules = False
    for number in ("7" * 4300, "-" + "7" * 4300, '{"a": %s}' % ("7" * 400)):
        body = json.dumps({**fields, name: "NUMBER"}).replace('"NUMBER"', number).encode()

        answer = call(proxy.port, "POST", path, body)

        assert answer.status in ((200,) if name == "seed" and fields is CHAT and path.endswith(
            "completions") and "{" not in number else (200, 400)), answer
