"""Learned counts at work: an agent's session costs its real size, not a guess at each call."""
import json
from collections import Counter

import pytest
from support import ANTHROPIC_HEADERS, OPENAI_HEADERS, TOKEN, Reply, call, status_of

HISTORY = "the proxy reads each answer and keeps what it costs. " * 60


def messages(turns, first="hello"):
    said = [{"role": ("user", "assistant")[turn % 2], "content": f"{turn} {HISTORY}"}
            for turn in range(turns)]
    return [{"role": "user", "content": first}, *said[1:]]


def fields_of(turns, **more):
    return {"model": "claude-sonnet-4-5", "max_tokens": 500, "messages": messages(turns), **more}


def tokens_of(request):
    return len(request.body) // 4


def message_reply(**more):
    """A provider that counts a quarter of the body; `more` goes into its answer."""
    def reply(request):
        return Reply(headers=(("content-type", "application/json"), *ANTHROPIC_HEADERS), steps=(
            json.dumps({"id": "msg_1", "type": "message", "role": "assistant",
                        "model": "claude-sonnet-4-5", "stop_reason": "end_turn",
                        "content": [{"type": "text", "text": "x"}],
                        **more, "usage": {"input_tokens": tokens_of(request), "output_tokens": 1,
                                          **more.get("usage", {})}}).encode(),))
    return reply


def bound_of(proxy):
    """What was reserved for the last call, in microdollars."""
    return call(proxy.port, "GET", "/ironcage/usage?limit=1").json["rows"][0]["bound_microdollars"]


def reserved_for(proxy, fields, path="/v1/messages", **options):
    answer = call(proxy.port, "POST", path, fields, **options)
    assert 200 == answer.status, answer.body
    return bound_of(proxy)


def test_a_session_is_bounded_by_what_was_counted_and_what_is_new(mock, proxy_for):
    proxy, mock.always = proxy_for("--budget", "0.5"), message_reply()

    guessed = reserved_for(proxy, fields_of(9))
    known = reserved_for(proxy, fields_of(11))

    assert known < guessed * 0.7
    assert 3.75 * tokens_of(mock.seen[1]) + 500 * 15 <= known


# What an answer can say that makes its usage no count of the prompt.
CHANGED = {
    "a tool ran at the provider": {"content": [{"type": "server_tool_use", "id": "s", "name": "x",
                                                "input": {}}]},
    "context was edited": {"context_management": {"applied_edits": [{"type": "clear"}]}},
    "several models served it": {"usage": {"iterations": [
        {"type": "message", "input_tokens": 5, "output_tokens": 1}]}},
}


@pytest.mark.parametrize("more", CHANGED.values(), ids=CHANGED)
def test_usage_that_is_no_count_of_the_prompt_is_not_learned(mock, proxy_for, more):
    proxy, mock.always = proxy_for("--budget", "0.5"), message_reply(**more)

    first = reserved_for(proxy, fields_of(9))
    second = reserved_for(proxy, fields_of(9))

    assert first == second


def test_an_estimate_is_not_learned(mock, proxy_for):
    proxy = proxy_for("--budget", "0.5")
    mock.always = lambda request: Reply(
        headers=(("content-type", "application/json"), *ANTHROPIC_HEADERS),
        steps=(json.dumps({"type": "message", "model": "claude-sonnet-4-5", "content": [],
                           "usage": {"input_tokens": 9}}).encode(),))

    assert reserved_for(proxy, fields_of(9)) == reserved_for(proxy, fields_of(9))


def test_another_tokens_session_teaches_nothing(mock, proxy_with):
    proxy = proxy_with({"tokens": [
        {"name": name, "token": f"ic_{name}_0123456789"} for name in ("alice", "bob")]},
        "--budget", "0.5")
    mock.always = message_reply()

    first, again = [reserved_for(proxy, fields_of(9), token="ic_alice_0123456789")
                    for _ in range(2)]
    other = reserved_for(proxy, fields_of(9), token="ic_bob_0123456789")

    assert again < first == other


def test_bound_bytes_guesses_nothing_and_so_learns_nothing(mock, proxy_for):
    proxy, mock.always = proxy_for("--budget", "0.5", "--bound", "bytes"), message_reply()

    assert reserved_for(proxy, fields_of(9)) == reserved_for(proxy, fields_of(9))


def test_a_restart_on_the_same_ledger_knows_the_counts(mock, proxy_for, tmp_path):
    flags, mock.always = ("--budget", "0.5", "--ledger", str(tmp_path / "cage.db")), message_reply()
    first = proxy_for(*flags)
    guessed = reserved_for(first, fields_of(9))
    first.stop()

    assert reserved_for(proxy_for(*flags), fields_of(9)) < guessed * 0.6


def test_no_text_of_a_prompt_is_kept(mock, proxy_for, tmp_path):
    proxy = proxy_for("--budget", "0.5", "--ledger", str(tmp_path / "cage.db"))
    mock.always = message_reply()
    reserved_for(proxy, fields_of(9))
    proxy.stop()

    kept = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"claude-sonnet-4-5" in kept and b"what it costs" not in kept
    assert TOKEN.encode() not in kept


# Responses: the prompt, and what a response id stands for.

def response_reply(request):
    """One that keeps 4,000 tokens of hidden reasoning, which its total counts."""
    asked = tokens_of(request) + 4_000 * ("previous_response_id" in request.json)
    return Reply(headers=(("content-type", "application/json"), *OPENAI_HEADERS), steps=(
        json.dumps({"id": f"resp_{len(request.body)}", "object": "response", "status": "completed",
                    "model": "gpt-5.5", "output": [{"type": "message", "content": []}],
                    "usage": {"input_tokens": asked, "output_tokens": 4_000,
                              "total_tokens": asked + 4_000}}).encode(),))


def test_a_stored_response_costs_its_total_not_a_whole_context(mock, proxy_for):
    proxy, mock.always = proxy_for("--budget", "5"), response_reply
    fields = {"model": "gpt-5.5", "input": "hello", "max_output_tokens": 4_000}
    first = call(proxy.port, "POST", "/v1/responses", fields)

    known = call(proxy.port, "POST", "/v1/responses", {
        **fields, "previous_response_id": first.json["id"]})
    unknown = call(proxy.port, "POST", "/v1/responses", {**fields, "previous_response_id": "resp_x"})

    assert (200, 200, 402) == (first.status, known.status, unknown.status)
    assert 0 == status_of(proxy)["bound_exceeded"]


def reasoning_reply(request):
    """A response that consists of reasoning and a message, and counts 3,000 tokens for both."""
    named = Counter(item["id"] for item in request.json["input"] if "id" in item)
    kept = 3_000 * max(named.values(), default=0)
    return Reply(headers=(("content-type", "application/json"), *OPENAI_HEADERS), steps=(
        json.dumps({"id": "resp_1", "object": "response", "status": "completed",
                    "model": "gpt-5.5",
                    "output": [{"type": "reasoning", "id": "rs_1", "summary": []},
                               {"type": "message", "id": "msg_1", "content": []}],
                    "usage": {"input_tokens": tokens_of(request) + kept, "output_tokens": 3_000,
                              "total_tokens": tokens_of(request) + kept + 3_000}}).encode(),))


REASONING, MESSAGE = ({"type": "reasoning", "id": "rs_1", "summary": []},
                      {"type": "item_reference", "id": "msg_1"})
ASKED = {"type": "message", "role": "user", "content": "hello"}


@pytest.mark.parametrize("items, status", [
    ([REASONING], 200), ([REASONING, MESSAGE], 200), ([MESSAGE] * 3, 200),
    ([{**REASONING, "id": "rs_2"}], 402), ([REASONING, {**MESSAGE, "id": None}], 402),
    ([REASONING, {**ASKED, "content": [{"type": "input_file", "file_id": "file_1"}]}], 402),
    ([{**REASONING, "content": None, "summary": [{"type": "summary_text", "text": HISTORY * 400}]}],
     402)])
def test_items_that_a_response_made_cost_no_more_than_it_counted(mock, proxy_for, items, status):
    """Agents send reasoning back by its id alone; without its size that is a whole context."""
    proxy, mock.always = proxy_for("--budget", "1"), reasoning_reply
    fields = {"model": "gpt-5.5", "input": [ASKED], "max_output_tokens": 3_000}
    unknown = call(proxy.port, "POST", "/v1/responses", {**fields, "input": [ASKED, *items]})
    first = call(proxy.port, "POST", "/v1/responses", fields)

    answer = call(proxy.port, "POST", "/v1/responses", {**fields, "input": [ASKED, *items]})

    assert (402, 200, status) == (unknown.status, first.status, answer.status), answer.body
    assert 0 == status_of(proxy)["bound_exceeded"]


def test_an_item_that_is_named_again_counts_again(mock, proxy_for):
    proxy, mock.always = proxy_for("--budget", "5"), reasoning_reply
    fields = {"model": "gpt-5.5", "input": [ASKED], "max_output_tokens": 3_000}
    call(proxy.port, "POST", "/v1/responses", fields)

    once, thrice = (reserved_for(proxy, {**fields, "input": [ASKED, *[REASONING] * times]},
                                 "/v1/responses") for times in (1, 3))

    assert thrice - once >= 2 * 3_000 * 5


def test_each_item_that_is_named_counts_its_frame_too(mock, proxy_for):
    """400 messages of 3 tokens: output counts them bare, input with what separates them."""
    def reply(request):
        named = sum(1 for item in request.json["input"] if "id" in item)
        asked = tokens_of(request) * (not named) + named * (3 + 6)
        return Reply(headers=(("content-type", "application/json"), *OPENAI_HEADERS), steps=(
            json.dumps({"id": "resp_1", "object": "response", "status": "completed",
                        "model": "gpt-5.5", "output": [
                            {"type": "message", "id": f"msg_{n}", "content": []}
                            for n in range(400)],
                        "usage": {"input_tokens": asked, "output_tokens": 1_200,
                                  "total_tokens": asked + 1_200}}).encode(),))

    proxy, mock.always = proxy_for("--budget", "1"), reply
    fields = {"model": "gpt-5.5", "input": [ASKED], "max_output_tokens": 1_200}
    call(proxy.port, "POST", "/v1/responses", fields)

    answer = call(proxy.port, "POST", "/v1/responses", {**fields, "input": [
        ASKED, *({"type": "item_reference", "id": f"msg_{n}"} for n in range(400))]})

    assert 200 == answer.status, answer.body
    assert 0 == status_of(proxy)["bound_exceeded"]


def test_an_id_that_the_request_gives_to_something_else_is_not_known(mock, proxy_for):
    proxy, mock.always = proxy_for("--budget", "1"), reasoning_reply
    fields = {"model": "gpt-5.5", "input": [ASKED], "max_output_tokens": 3_000}
    call(proxy.port, "POST", "/v1/responses", fields)

    answers = [call(proxy.port, "POST", "/v1/responses", {**fields, "input": [
        {**ASKED, "id": name, "content": HISTORY}, MESSAGE]}) for name in ("msg_1", "msg_2")]

    assert [402, 200] == [answer.status for answer in answers]


def test_a_truncated_conversation_is_not_known(mock, proxy_for):
    proxy, mock.always = proxy_for("--budget", "5"), response_reply
    fields = {"model": "gpt-5.5", "input": "hello", "max_output_tokens": 100}
    first = call(proxy.port, "POST", "/v1/responses", fields)

    answer = call(proxy.port, "POST", "/v1/responses", {
        **fields, "previous_response_id": first.json["id"], "truncation": "auto"})

    assert 402 == answer.status


def test_a_response_whose_prompt_may_have_been_truncated_is_not_known(mock, proxy_for):
    proxy, mock.always = proxy_for("--budget", "5"), response_reply
    fields = {"model": "gpt-5.5", "input": "hello", "max_output_tokens": 100}
    first = call(proxy.port, "POST", "/v1/responses", {**fields, "truncation": "auto"})

    answer = call(proxy.port, "POST", "/v1/responses", {
        **fields, "previous_response_id": first.json["id"]})

    assert (200, 402) == (first.status, answer.status)


def test_a_response_is_not_known_to_a_call_that_reads_more_of_its_reasoning(mock, proxy_for):
    """Its own prompt may have left out the reasoning of the turns before it."""
    proxy, mock.always = proxy_for("--budget", "5"), response_reply
    fields = {"model": "gpt-5.5", "input": "hello", "max_output_tokens": 4_000}
    first = call(proxy.port, "POST", "/v1/responses", {
        **fields, "reasoning": {"context": "current_turn"}})

    statuses = [call(proxy.port, "POST", "/v1/responses", {
        **fields, "previous_response_id": first.json["id"],
        "reasoning": {"context": context}}).status for context in ("all_turns", "current_turn")]

    assert [402, 200] == statuses


def test_codex_as_it_grows_is_bounded_by_what_was_counted(mock, proxy_for):
    proxy, mock.always = proxy_for("--budget", "1"), response_reply
    items = [{"type": "additional_tools", "role": "developer", "tools": [
        {"type": "custom", "name": "exec"}]},
        *({"type": "message", "role": "user", "content": f"{n} {HISTORY}"} for n in range(9))]
    fields = {"model": "gpt-5.5", "input": items, "max_output_tokens": 4_000}
    guessed = reserved_for(proxy, fields, "/v1/responses")
    items += [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
              {"type": "function_call_output", "call_id": "c", "output": "done"}]

    output = 4_000 * 30
    assert reserved_for(proxy, fields, "/v1/responses") - output < (guessed - output) * 0.6


def test_a_call_without_usage_is_charged_by_the_closest_bound_not_by_the_quickest(mock, proxy_for):
    """While money is plenty a body is bounded by its bytes, which is four times its tokens."""
    proxy = proxy_for("--budget", "50")
    mock.always = message_reply()
    reserved_for(proxy, fields_of(9))
    mock.always = None
    mock.script(Reply(answers=False))

    call(proxy.port, "POST", "/v1/messages", fields_of(11))

    row = call(proxy.port, "GET", "/ironcage/usage?limit=1").json["rows"][0]
    counted = tokens_of(mock.seen[0])
    assert row["estimated"] and 3.75 * counted < row["cost_microdollars"] < 2.5 * 3.75 * counted
    assert row["cost_microdollars"] * 1.8 < row["bound_microdollars"] - 500 * 15
