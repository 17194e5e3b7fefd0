"""A stream cut at every byte, on the provider's side and on the client's: charged for at least
what the provider billed up to there, settled once, nothing left reserved."""
import json
import random
from dataclasses import replace

import pytest
from support import Close, Gate, Raw, RawClient, call, program, recordings, settled_status
from test_every_way_to_end import stream  # noqa: F401  (a fixture)

MANY = pytest.mark.parametrize("most", [60, pytest.param(200, marks=pytest.mark.soak)])


def cut_reply(default, offset, ending):
    """The reply up to so many bytes, then an ending; billed for the steps that were begun."""
    steps, tokens, left = [], [], offset
    for step, made in zip(default.steps, (*default.tokens_by_step, *[None] * 99)):
        if left <= 0:
            break
        steps.append(step[:left])
        tokens.append(made if made is not None else default.tokens_by_step[-1])
        left -= len(step)
    steps = steps or [Raw(b"")]
    tokens = tokens or [0]
    return replace(default, steps=(*steps, *ending), tokens_by_step=(*tokens, *[tokens[-1]] * 9))


def offsets_of(default, seed, most):
    """Edges of events and one to either side, and seeded places in between, if there are fewer."""
    edges, at = set(), 0
    for step in default.steps:
        at += len(step)
        edges |= {at - 1, at, at + 1}
    rng = random.Random(seed)
    places = edges | {rng.randrange(at) for _ in range(most - len(edges))} | {0}
    return sorted(place for place in places if place < at)


def check_settled(proxy, mock, before, offset):
    status = settled_status(proxy)
    spent, billed = status["spent_microdollars"], mock.billed_microdollars
    assert 0 == status["reserved_microdollars"]
    assert spent - before[0] >= billed - before[1], f"cut at byte {offset}"
    assert 0 == status["bound_exceeded"]
    return spent, billed


@MANY
def test_a_stream_cut_by_the_provider(mock, proxy_for, stream, most):  # noqa: F811
    path, fields = stream
    proxy = proxy_for("--budget", "100")
    call(proxy.port, "POST", path, fields)
    default = mock.default_reply(mock.seen[0])
    before = check_settled(proxy, mock, (0, 0), "none")
    for offset in offsets_of(default, 1, most):
        mock.script(cut_reply(default, offset, [Close()]))

        assert 200 == call(proxy.port, "POST", path, fields).status

        before = check_settled(proxy, mock, before, offset)


@MANY
def test_a_stream_left_by_the_client(mock, proxy_for, stream, most):  # noqa: F811
    path, fields = stream
    if path == "/v1/chat/completions":          # so that nothing is held back from the client
        fields = {**fields, "stream_options": {"include_usage": True}}
    proxy = proxy_for("--budget", "100")
    call(proxy.port, "POST", path, fields)
    default = mock.default_reply(mock.seen[0])
    before = check_settled(proxy, mock, (0, 0), "none")
    for number, offset in enumerate(offsets_of(default, 2, most), 1):
        gate = Gate()
        mock.script(cut_reply(default, offset, [gate, b"data: {}\n\n", Gate()]))
        with RawClient(proxy.port) as client:
            client.request("POST", path, json.dumps(fields).encode())
            client.read_head()
            seen = 0
            while seen < offset:
                seen += len(client.read_chunk())
            client.leave()
        mock.wait_for_hang_ups(number)
        gate.event.set()

        before = check_settled(proxy, mock, before, offset)


def recorded_streams():
    """(name, api, bytes) of the recorded streams of up to 8 KB."""
    for name, exchange in recordings():
        text = exchange["response"].get("sse")
        if text is not None and exchange["api"] in program().EVENT_READERS \
                and len(text) <= 8_192:
            yield name, exchange["api"], text.encode()


@pytest.mark.soak
def test_recorded_streams_are_read_alike_however_they_are_cut():
    """Split at every byte, the meter ends in the same state; broken off at every byte, it never
    takes a partial stream's usage for final."""
    module = program()

    def read(api, *parts):
        meter = module.AnswerMeter(api)
        reader = module.StreamReader(meter, "identity", hides_usage=False)
        for part in parts:
            reader.read([part])
        reader.finish()
        return (meter.usage, meter.usage_is_final, meter.model, meter.service_tier,
                meter.output_bytes, meter.has_ended, meter.failure, dict(meter.tool_calls))

    count = 0
    for name, api, stream_bytes in recorded_streams():
        whole = read(api, stream_bytes)
        for at in range(len(stream_bytes)):
            assert whole == read(api, stream_bytes[:at], stream_bytes[at:]), f"{name} at {at}"
        count += 1
    assert count >= 10
