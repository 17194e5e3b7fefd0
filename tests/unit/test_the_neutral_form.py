"""The neutral form: an answer's events, and what an error says, in whatever words a server has."""
import json

import pytest

import ironcage_proxy as ic


# Answers.

def test_events_fold_to_an_answer_with_its_parts_in_the_order_in_which_they_were_opened():
    one, two = ic.Part("text", "a"), ic.Part("call", "{}")
    began, ended = ic.Began("id", "m"), ic.Ended("calls")
    events = (ic.PING, began, ic.Opened(two), ic.Opened(one), ic.Closed(one), ic.Closed(two), ended)

    assert (began, [two, one], ended) == ic.folded(events)
    assert (ic.Began("", None), [], ic.Ended("end")) == ic.folded(())


def test_a_part_that_grows_is_all_that_came():
    part = ic.Part("text", "before")
    events = [part.opened(), part.grown("a"), part.grown("b"), part.closed()]

    assert ["Opened", "More", "More", "Closed"] == [type(event).__name__ for event in events]
    assert ("ab", "b") == (part.text, events[2].text)


# The words of an error.

@pytest.mark.parametrize("body, words", [
    ("plain", "plain"), ({}, ""), (None, ""), (7, ""), ([], ""), ({"message": 7}, ""),
    ({"error": {"message": "a"}}, "a"), ({"message": "a", "detail": "b"}, "a"),
    ({"detail": [{"msg": "a"}, {"msg": "b"}, 7]}, "a; b"),
    ({"detail": [{"msg": str(number)} for number in range(9)]}, "; ".join("01234567")),
    ({"error": "invalid", "message": "a is missing"}, "invalid: a is missing"),
    ({"error": "invalid", "detail": "a is missing"}, "invalid: a is missing"),
    ({"error": "invalid", "error_description": "why"}, "invalid: why"),
    ({"error": "invalid", "msg": "why"}, "invalid"), ({"error": "a", "message": "a"}, "a"),
    ({"error": {"message": "a"}, "message": "b"}, "a"),
    ({"message": "a", "metadata": {"raw": "b"}}, "a: b"),
    ({"message": "a", "metadata": {"raw": "a"}}, "a"), ({"metadata": {"raw": "b"}}, "b"),
    ({"message": "a", "metadata": {"raw": '{"error": {"message": "b"}}'}}, "a: b"),
    ('{"error": {"message": "a"}}', "a"), ('[{"message": "a"}]', "a"), ('{"a": 1}', '{"a": 1}'),
    ('{"message"', '{"message"'), ("[]", "[]"), ("{}", "{}"), ('"quoted"', '"quoted"'),
    ('["a"]', "a"), ("[1]", "[1]"), (" [1]", " [1]"),
])
def test_the_words_of_an_error_are_found_wherever_they_stand(body, words):
    assert words == ic.words_of(body)


def test_a_text_that_is_too_long_is_not_read_as_json():
    def padded(size):
        return '{"message": "a", "x": "%s"}' % ("x" * (size - 25))

    assert "a" == ic.words_of(padded(ic.MAX_ERROR_CHARS))
    assert ic.MAX_ERROR_CHARS + 1 == len(ic.words_of(padded(ic.MAX_ERROR_CHARS + 1)))


@pytest.mark.parametrize("wrap", [
    lambda body: {"error": body}, lambda body: [body], lambda body: {"metadata": {"raw": body}}],
    ids=["objects", "lists", "errors of other servers"])
def test_words_are_looked_for_to_a_bounded_depth(wrap):
    def nested(levels):
        body = "a"
        for _ in range(levels):
            body = wrap(body)
        return body

    reached = [bool(ic.words_of(nested(levels))) for levels in range(12)]

    assert reached == sorted(reached, reverse=True) and sum(reached) in (5, 9)
    assert ["", "a", ""] == [ic.words_of({"error": "a"}, 0), ic.words_of({"error": "a"}, 1),
                             ic.words_of({"error": {"error": "a"}}, 1)]
    assert ["", "a"] == [ic.words_of(["a"], depth) for depth in (0, 1)]


def test_a_text_within_a_text_is_one_level_more():
    body = "a"
    for _ in range(4):
        body = json.dumps({"error": body})

    assert "a" == ic.words_of(body, 8) and "a" != ic.words_of(body, 6)


def test_the_words_of_an_error_are_looked_for_to_a_bounded_depth(monkeypatch):
    looked, words_of = [], ic.words_of
    monkeypatch.setattr(ic, "words_of", lambda body, depth=8: looked.append(depth) or words_of(
        body, depth))
    text = '{"metadata":{"raw":' * 20 + '"x"' + "}}" * 20
    body = text
    for _ in range(8):
        body = {"error": body}

    ic.words_of(body)

    assert min(looked) >= -1 and len(looked) < 200


@pytest.mark.parametrize("status, body, message", [
    (500, {"error": "a"}, "a"), (500, {"code": 7}, '{"code": 7}'), (500, ["é"], "é"),
    (500, {"x": 1}, '{"x": 1}'), (503, None, "the provider answered with the status 503"),
    (503, {}, "the provider answered with the status 503")])
def test_an_error_without_words_is_shown_as_it_came(status, body, message):
    assert message == ic.failure_of(status, body).message


# A full context.

@pytest.mark.parametrize("status, message, code, sizes, cap", [
    (400, "This model's maximum context length is 8,192 tokens. However, your messages resulted in "
          "9,000 tokens", None, (9_000, 8_192), 0),
    (413, "maximum context length is 4096 tokens, you requested 4100 tokens (100 in the messages, "
          "4000 in the completion)", None, (4_100, 4_096), 4_000),
    (400, "maximum context length is 4096 tokens, you requested 4100 tokens (0 in the messages, "
          "4100 in the completion)", None, (4_100, 4_096), 0),         # no prompt, no cap in it
    (422, "`inputs` tokens + `max_new_tokens` must be <= 4096. Given: 4000 `inputs` tokens and 200 "
          "`max_new_tokens`", None, (4_200, 4_096), 200),
    (400, "prompt is too long", None, None, 0),
    (400, "maximum context length is 9000 tokens", None, None, 0),       # no more than it holds
    (500, "no words of it", "context_length_exceeded", None, 0),
])
def test_a_full_context_is_known_by_its_words_or_its_code(status, message, code, sizes, cap):
    failure = ic.overflow_of(ic.Failure(status, message, code), {})

    assert (400, "context_length_exceeded", sizes, cap) == (
        failure.status, failure.code, failure.sizes, failure.cap)


def test_a_full_context_is_seen_in_another_code_too():
    failure = ic.Failure(400, "no", "model_context_window_exceeded")

    assert "context_length_exceeded" == ic.overflow_of(failure, {}).code


@pytest.mark.parametrize("status, message", [
    (500, "maximum context length"), (429, "prompt is too long"), (400, "temperature is too high"),
    (400, "x" * ic.MAX_ERROR_CHARS + "prompt is too long")])
def test_another_failure_stays_what_it_is(status, message):
    failure = ic.Failure(status, message)

    assert failure is ic.overflow_of(failure, {})


def test_what_a_server_states_beside_its_words_counts():
    failure = ic.Failure(400, "the request exceeds the available context size")
    stated = {"type": "exceed_context_size_error", "n_prompt_tokens": 50, "n_ctx": 40}

    assert (50, 40) == ic.overflow_of(failure, stated).sizes
    assert None is ic.overflow_of(failure, {**stated, "n_ctx": "40"}).sizes
    assert None is ic.overflow_of(failure, {**stated, "n_ctx": 50}).sizes


ENDS = {"length": ("length", "MAX_TOKENS", "max_new_tokens", "token_limit", "context_window_exceeded",
                   "truncated"),
        "refused": ("content_filter", "content-filtered", "guardrail_intervened", "RECITATION",
                    "moderation_block"),
        "end": ("stop", "EOS", "end_turn", "completed", "tool_calls", "pause_turn"),
        "failed": ("error", "timeout", "engine_overloaded", "rate_limit", "CANCELLED",
                   "TOO_MANY_TOOL_CALLS", "MISSING_THOUGHT_SIGNATURE", "error: length", "insufficient_quota")}


@pytest.mark.parametrize("reason, word", [(reason, word) for reason in ENDS
                                          for word in ENDS[reason]])
def test_what_servers_call_the_end_of_an_answer(reason, word):
    if reason == "failed":
        with pytest.raises(ic.UpstreamBroke, match="ended in"):
            ic.reason_of_end(word, {"text"})
        return
    assert reason == ic.reason_of_end(word, {"text"})
    assert {"end": "calls"}.get(reason, reason) == ic.reason_of_end(word, {"text", "call"})
