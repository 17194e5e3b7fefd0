"""Hostile requests and broken answers: a translator refuses or carries over, and never fails."""
import copy
import json
from random import Random

import pytest
from test_translation import (CHAT_STREAMS, CHAT_TURNS, OLD, STREAMED, TO_CHAT, TO_CLAUDE, TURNS,
                              chunks_of, completion, stream_of, to_chat, to_claude)

import ironcage_proxy as ic

JUNK = (None, True, 0, -1, 1.5, "", "x", "\ud800", [], [None], ["x"], [[]], {}, {"x": 1},
        {"type": "x"}, {"type": None}, [{"type": "text"}], [{"type": "text", "text": 7}],
        [{"type": "tool_use"}], [{"type": "tool_result"}], {"type": "function"}, {"name": 7},
        [{"id": 1, "function": 2}], [{"function": {"name": None, "arguments": 7}}])


def places(value, path=()):
    """Every place in a JSON value."""
    yield path
    children = value.items() if isinstance(value, dict) else \
        enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from places(child, (*path, key))


def mutated(rng, value):
    """A JSON value with one to three places replaced by junk, or taken out."""
    value = copy.deepcopy(value)
    for _ in range(rng.randrange(1, 4)):
        path = rng.choice([path for path in places(value) if path])
        holder = value
        for key in path[:-1]:
            holder = holder[key]
        if rng.random() < 0.15:
            del holder[path[-1]]
        else:
            holder[path[-1]] = copy.deepcopy(rng.choice(JUNK))
        if not any(places(value)):
            break
    return value


CHAT_REQUESTS = [{"messages": [{"role": "user", "content": "hi"}], **row[2]} for row in TO_CLAUDE] \
    + [{"messages": row[1], "tools": []} for row in TURNS.values()]
MESSAGES_REQUESTS = [{"messages": [{"role": "user", "content": "hi"}], "max_tokens": 9, **row[3]}
                     for row in TO_CHAT] + [
    {"messages": row[0], "max_tokens": 9} for row in CHAT_TURNS.values()]


@pytest.mark.parametrize("seed", range(40))
def test_hostile_requests_are_refused_or_carried_over(seed):
    rng = Random(seed)
    for make, model, requests in ((ic.ChatOnClaude, OLD, CHAT_REQUESTS),
                                  (ic.MessagesOnChat, "gpt-4o", MESSAGES_REQUESTS)):
        for request in requests:
            fields = {**mutated(rng, request), "model": model}
            try:
                with ic.well_shaped(ic.BadRequest(ic.REQUEST_SHAPE)):
                    translator = make(fields, ic.Losses(), most_output_tokens=64_000)
            except ic.BadRequest:
                continue
            json.dumps(translator.request)


@pytest.mark.parametrize("seed", range(40))
def test_broken_answers_are_carried_over_or_said_to_be_broken(seed):
    rng = Random(seed)
    chat, claude = to_chat({})[0], to_claude({})[0]
    for answer in STREAMED.values():
        _tolerant(lambda answer=answer: claude.answer(mutated(rng, answer)))
        _tolerant(lambda answer=answer: list(claude.events(
            mutated(rng, event) for event in stream_of(answer))))
    for deltas, finish, _ in CHAT_STREAMS.values():
        _tolerant(lambda d=deltas, f=finish: list(chat.events(
            mutated(rng, chunk) for chunk in chunks_of(*d, finish=f))))
    _tolerant(lambda: chat.answer(mutated(rng, completion(content="x", tool_calls=[{}]))))


def _tolerant(carry):
    try:
        with ic.well_shaped(ic.UpstreamBroke(ic.ANSWER_SHAPE)):
            json.dumps(carry())
    except ic.UpstreamBroke:
        pass
