"""Servers of OpenAI's format as they really stream, end and err. Each case stands for a kind that
was reported of a server named beside it; an Anthropic client has to see a proper message."""
import json
import re
from types import SimpleNamespace

import pytest
from support import (Gate, RawClient, Reply, call, program, proxy_environment, settled_status,
                     sse_events)

ASKED = {"model": "lab/m", "max_tokens": 100, "messages": [{"role": "user", "content": "hi"}],
         "tools": [{"name": name, "input_schema": {"type": "object"}}
                   for name in ("get_weather", "get_time")]}
USAGE = {"prompt_tokens": 100, "completion_tokens": 50, "total_tokens": 150}
RATES = {"input_cost_per_token": 2e-6, "output_cost_per_token": 10e-6}
COST = 100 * 2 + 50 * 10                             # microdollars of USAGE at RATES
PARIS, ROME = '{"city": "Paris"}', '{"city": "Rome"}'


@pytest.fixture
def lab(mock, proxy_with):
    """A proxy with the mock as a server of OpenAI's format that nothing is known of."""
    return lambda *flags: proxy_with({
        "providers": {"lab": {"base_url": mock.url, "key_env": "OPENAI_API_KEY"}},
        "prices": {"lab/m": RATES}}, *flags)


def chunk(delta=None, finish=None, usage=None, **more):
    choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": finish,
                                         **more.pop("choice", {})}]
    return {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": "m",
            "choices": choices, **({"usage": usage} if usage else {}), **more}


def tool_call(name=None, arguments="", index=0, **more):
    function = {"arguments": arguments, **({"name": name} if name is not None else {})}
    return {"tool_calls": [{**({} if index is None else {"index": index}), "function": function,
                            **more}]}


TEXT = [chunk({"role": "assistant", "content": "Hel"}), chunk({"content": "lo"})]
END = [chunk({}, "stop"), chunk(usage=USAGE), "[DONE]"]
CALLED = [chunk({}, "tool_calls"), chunk(usage=USAGE), "[DONE]"]


def stream_of(events, last=b"\n\n"):
    texts = [event if isinstance(event, str) else json.dumps(event) for event in events]
    return b"\n\n".join(b"data: " + text.encode() for text in texts) + last


def streamed(body, kind="text/event-stream", framing="chunked"):
    return Reply(headers=(("content-type", kind),), framing=framing, steps=(body,))


def message_of(answer):
    """(text, thoughts, [(name, input)], stop_reason, error) of a streamed message."""
    text, thoughts, calls, stop, error, blocks = "", "", [], None, None, {}
    for _, data in sse_events(answer.body):
        event = json.loads(data)
        if event["type"] == "content_block_start":
            blocks[event["index"]] = [event["content_block"], ""]
        elif event["type"] == "content_block_delta":
            blocks[event["index"]][1] += "".join(
                str(event["delta"].get(name, "")) for name in ("text", "thinking", "partial_json"))
        elif event["type"] == "message_delta":
            stop = event["delta"]["stop_reason"]
        elif event["type"] == "error":
            error = event["error"]["message"]
    for block, more in blocks.values():
        if block["type"] == "tool_use":
            calls.append((block["name"], json.loads(more)))
            assert block["id"], "a call needs an id"
        text += more if block["type"] == "text" else ""
        thoughts += more if block["type"] == "thinking" else ""
    ids = [block["id"] for block, _ in blocks.values() if block["type"] == "tool_use"]
    assert len(set(ids)) == len(ids), "ids of calls are unique"
    return text, thoughts, calls, stop, error


LONDON = '{"city": "Lon\\"d{o}n"}'
PARIS_CALL, ROME_CALL = ("get_weather", {"city": "Paris"}), ("get_weather", {"city": "Rome"})
TIME_CALL = ("get_time", {})
# what a server does -> (its stream, text, thoughts, calls, stop_reason)
STREAMS = {
    "no [DONE]": (stream_of([*TEXT, *END[:2]]), "Hello", "", [], "end_turn"),
    "no [DONE], usage in the last chunk": (
        stream_of([chunk({"content": "Hello"}, "stop", USAGE)]), "Hello", "", [], "end_turn"),
    "no empty line at the end": (stream_of([*TEXT, *END[:2]], b""), "Hello", "", [], "end_turn"),
    "one newline behind [DONE]": (stream_of([*TEXT, *END], b"\n"), "Hello", "", [], "end_turn"),
    "[DONE] without a finish_reason": (
        stream_of([*TEXT, *END[1:]]), "Hello", "", [], "end_turn"),
    "[DONE] behind calls without one": (
        stream_of([chunk(tool_call("get_weather", PARIS, id="a")), *END[1:]]),
        "", "", [PARIS_CALL], "tool_use"),
    "a new id in every delta (old vLLM)": (
        stream_of([chunk(tool_call("get_weather", "", id="a")),
                   chunk(tool_call(None, PARIS[:6], id="b")),
                   chunk(tool_call(None, PARIS[6:], id="c")), *CALLED]),
        "", "", [PARIS_CALL], "tool_use"),
    "two calls with one index and without ids": (
        stream_of([chunk({"tool_calls": [*tool_call("get_weather", PARIS, id="")["tool_calls"],
                                         *tool_call("get_weather", ROME, id="")["tool_calls"]]}),
                   *CALLED]), "", "", [PARIS_CALL, ROME_CALL], "tool_use"),
    "the same, a chunk each": (
        stream_of([chunk(tool_call("get_weather", PARIS, id="")),
                   chunk(tool_call("get_weather", ROME, id="")), *CALLED]),
        "", "", [PARIS_CALL, ROME_CALL], "tool_use"),
    "one id under two indexes": (
        stream_of([chunk(tool_call("get_weather", PARIS, 0, id="a")),
                   chunk(tool_call("get_time", "{}", 1, id="a")), *CALLED]),
        "", "", [PARIS_CALL, TIME_CALL], "tool_use"),
    "two ids under one index": (
        stream_of([chunk(tool_call("get_weather", PARIS, 0, id="a")),
                   chunk(tool_call("get_time", "{}", 0, id="b")), *CALLED]),
        "", "", [PARIS_CALL, TIME_CALL], "tool_use"),
    "calls without index": (
        stream_of([chunk(tool_call("get_weather", PARIS[:5], None, id="a")),
                   chunk(tool_call(None, PARIS[5:], None, id="a")),
                   chunk(tool_call("get_time", "{}", None, id="b")), *CALLED]),
        "", "", [PARIS_CALL, TIME_CALL], "tool_use"),
    "calls that interleave, a character each": (
        stream_of([chunk(tool_call("get_weather", "", 0, id="a")),
                   chunk(tool_call("get_weather", "", 1, id="b")),
                   *(chunk(tool_call(None, text[at], index)) for at in range(len(PARIS))
                     for index, text in enumerate((PARIS, ROME + " ")) if at < len(text)),
                   *CALLED]), "", "", [PARIS_CALL, ROME_CALL], "tool_use"),
    "the same, by ids alone": (
        stream_of([chunk(tool_call("get_weather", "", None, id="a")),
                   chunk(tool_call("get_weather", "", None, id="b")),
                   *(chunk(tool_call(None, text[at], None, id=own)) for at in range(len(PARIS))
                     for own, text in (("a", PARIS), ("b", ROME)) if at < len(text)),
                   *CALLED]), "", "", [PARIS_CALL, ROME_CALL], "tool_use"),
    "the same, with the name in every delta": (
        stream_of([*(chunk(tool_call("get_weather", text[at], index, id=own))
                     for at in range(len(PARIS))
                     for index, own, text in ((0, "a", PARIS), (1, "b", ROME))
                     if at < len(text)), *CALLED]),
        "", "", [PARIS_CALL, ROME_CALL], "tool_use"),
    "the name in every delta, without ids": (
        stream_of([*(chunk(tool_call("get_weather", one, 0)) for one in LONDON), *CALLED]),
        "", "", [("get_weather", {"city": 'Lon"d{o}n'})], "tool_use"),
    "a name that is null or empty in later deltas": (
        stream_of([chunk(tool_call("get_weather", "", id="a")),
                   chunk({"tool_calls": [{"index": 0, "id": None, "type": "function", "function": {
                       "name": None, "arguments": PARIS[:3]}}]}),
                   chunk(tool_call("", PARIS[3:], id="")), *CALLED]),
        "", "", [PARIS_CALL], "tool_use"),
    "a call begun behind another without a new index": (
        stream_of([chunk(tool_call("get_weather", PARIS, 0, id="a")),
                   chunk(tool_call("get_time", "", 0, id="b")),
                   chunk(tool_call(None, "{", 0)), chunk(tool_call(None, "}", 0)), *CALLED]),
        "", "", [PARIS_CALL, TIME_CALL], "tool_use"),
    "indexes that begin at 1, and are texts": (
        stream_of([chunk(tool_call("get_weather", PARIS[:4], "1", id="a")),
                   chunk(tool_call(None, PARIS[4:], "1")),
                   chunk(tool_call("get_time", "{}", "2", id="b")), *CALLED]),
        "", "", [PARIS_CALL, TIME_CALL], "tool_use"),
    "all indexes 0, interleaved by id": (
        stream_of([chunk(tool_call("get_weather", PARIS[:4], 0, id="a")),
                   chunk(tool_call("get_weather", ROME[:4], 0, id="b")),
                   chunk(tool_call(None, PARIS[4:], 0, id="a")),
                   chunk(tool_call(None, ROME[4:], 0, id="b")), *CALLED]),
        "", "", [PARIS_CALL, ROME_CALL], "tool_use"),
    "two calls with one id and one index (TGI)": (
        stream_of([chunk(tool_call("get_weather", PARIS, 0, id="0")),
                   chunk(tool_call("get_weather", ROME, 0, id="0")), *CALLED]),
        "", "", [PARIS_CALL, ROME_CALL], "tool_use"),
    "the whole call once more at the end": (
        stream_of([chunk(tool_call("get_weather", PARIS[:4], 0, id="a")),
                   chunk(tool_call(None, PARIS[4:], 0)),
                   chunk({"tool_calls": [{"index": 0, "id": "a", "type": "function", "function": {
                       "name": "get_weather", "arguments": PARIS}}]}, "tool_calls"),
                   *CALLED[1:]]), "", "", [PARIS_CALL], "tool_use"),
    "ids with quotes and line ends": (
        stream_of([chunk(tool_call("get_weather", PARIS, 0, id='a"\\\n')),
                   chunk(tool_call("get_time", "{}", 1, id="a'<b>")), *CALLED]),
        "", "", [PARIS_CALL, TIME_CALL], "tool_use"),
    "a call in the only chunk, as a message": (
        stream_of([chunk({}, "tool_calls", USAGE, choice={"delta": None, "message": {
            "role": "assistant", "content": None, "tool_calls": [
                {"id": "a", "type": "function", "function": {
                    "name": "get_weather", "arguments": PARIS}}]}})]),
        "", "", [PARIS_CALL], "tool_use"),
    "arguments that are null": (
        stream_of([chunk({"tool_calls": [{"index": 0, "id": "a", "function": {
            "name": "get_time", "arguments": None}}]}), *CALLED]),
        "", "", [TIME_CALL], "tool_use"),
    "lines that end in CRLF": (
        stream_of([*TEXT, *END]).replace(b"\n", b"\r\n"), "Hello", "", [], "end_turn"),
    "a BOM before it": (
        b"\xef\xbb\xbf" + stream_of([*TEXT, *END]), "Hello", "", [], "end_turn"),
    "a BOM and the whole answer in one event": (
        b"\xef\xbb\xbf" + stream_of([chunk({"content": "Hello"}, "stop", USAGE)]),
        "Hello", "", [], "end_turn"),
    "a BOM before one JSON answer": (
        b"\xef\xbb\xbf" + json.dumps({"id": "c", "choices": [
            {"message": {"role": "assistant", "content": "Hello"}, "finish_reason": "stop"}],
            "usage": USAGE}).encode(), "Hello", "", [], "end_turn"),
    "no space behind data:, ids and retries": (
        b"retry: 5000\n\nid: 1\n" + stream_of([*TEXT, *END]).replace(b"data: ", b"data:"),
        "Hello", "", [], "end_turn"),
    "ids that are numbers": (
        stream_of([chunk(tool_call("get_weather", PARIS, 0, id=0)),
                   chunk(tool_call("get_time", "{}", 1, id=1)), *CALLED]),
        "", "", [PARIS_CALL, TIME_CALL], "tool_use"),
    "an empty function_call in every answer (Snowflake)": (
        stream_of([chunk({"content": "Hello", "function_call": {"name": "", "arguments": ""}}),
                   *END]), "Hello", "", [], "end_turn"),
    "a function_call of 2023": (
        stream_of([chunk({"function_call": {"name": "get_weather", "arguments": PARIS[:4]}}),
                   chunk({"function_call": {"arguments": PARIS[4:]}}),
                   chunk({}, "function_call"), *END[1:]]), "", "", [PARIS_CALL], "tool_use"),
    "arguments as an object (Ollama's early ones)": (
        stream_of([chunk(tool_call("get_weather", {"city": "Paris"}, id="a")), *CALLED]),
        "", "", [PARIS_CALL], "tool_use"),
    "all once more as a message (MiniMax)": (
        stream_of([*TEXT, chunk({}, "stop", USAGE, choice={"delta": {}, "message": {
            "role": "assistant", "content": "Hello"}}), "[DONE]"]), "Hello", "", [], "end_turn"),
    "a message in the only chunk": (
        stream_of([chunk({}, "stop", USAGE, choice={"delta": None, "message": {
            "role": "assistant", "content": "Hello"}})]), "Hello", "", [], "end_turn"),
    "a summary of its reasoning only (OpenRouter)": (
        stream_of([chunk({"content": "", "reasoning_details": [
            {"type": "reasoning.summary", "summary": "Hmm."}]}), *TEXT, *END]),
        "Hello", "Hmm.", [], "end_turn"),
    "one JSON answer": (
        json.dumps({"id": "c", "object": "chat.completion", "model": "m", "choices": [
            {"index": 0, "message": {"role": "assistant", "content": "Hello"},
             "finish_reason": "stop"}], "usage": USAGE}).encode(), "Hello", "", [], "end_turn"),
    "one JSON answer behind empty lines": (
        b"\n\n \n" + json.dumps({"id": "c", "choices": [
            {"message": {"role": "assistant", "content": "Hello"}, "finish_reason": "stop"}],
            "usage": USAGE}, indent=1).encode(), "Hello", "", [], "end_turn"),
    "usage in x_groq": (
        stream_of([*TEXT, chunk({}, "stop", x_groq={"id": "r", "usage": USAGE}), "[DONE]"]),
        "Hello", "", [], "end_turn"),
    "usage in its choice (Moonshot)": (
        stream_of([*TEXT, chunk({}, "stop", choice={"usage": USAGE}), "[DONE]"]),
        "Hello", "", [], "end_turn"),
    "running totals in every chunk (Gemini, Perplexity)": (
        stream_of([chunk({"content": "Hel"}, None, {**USAGE, "completion_tokens": 10}),
                   chunk({"content": "lo"}, "stop", USAGE), "[DONE]"]),
        "Hello", "", [], "end_turn"),
    **{f"it finishes with {word}": (
        stream_of([*TEXT, chunk({}, word), *END[1:]]), "Hello", "", [], stop) for word, stop in {
            "model_length": "max_tokens", "MAX_TOKENS": "max_tokens", "eos": "end_turn",
            "content_filter: hate": "refusal", "SAFETY": "refusal", "STOP": "end_turn",
            "sensitive": "refusal", "model_context_window_exceeded": "max_tokens"}.items()},
}


@pytest.mark.parametrize("case", STREAMS)
def test_a_client_of_messages_sees_a_proper_stream_whatever_it_is_called(mock, lab, case):
    body, *expected = STREAMS[case]
    proxy, kinds = lab("--budget", "1"), ("text/event-stream", "application/json", "text/plain",
                                          "application/octet-stream")
    mock.script(*(streamed(body, kind) for kind in kinds))

    answers = {kind: call(proxy.port, "POST", "/v1/messages", {**ASKED, "stream": True})
               for kind in kinds}

    assert dict.fromkeys(kinds, (*expected, None)) == {
        kind: message_of(answer) for kind, answer in answers.items()}
    assert len(kinds) * COST == settled_status(proxy)["spent_microdollars"]


@pytest.mark.parametrize("case", STREAMS)
def test_a_client_of_the_servers_own_format_gets_its_bytes_and_the_right_bill(mock, lab, case):
    body = STREAMS[case][0]
    mock.script(streamed(body, "text/plain"))
    proxy = lab("--budget", "1")
    asked = {"model": "lab/m", "max_tokens": 100, "stream": True, "messages": ASKED["messages"],
             "stream_options": {"include_usage": True}}

    answer = call(proxy.port, "POST", "/v1/chat/completions", asked)

    assert body == answer.body
    assert COST == settled_status(proxy)["spent_microdollars"]


@pytest.mark.parametrize("kind", ["application/json", "text/event-stream", "text/plain"])
def test_a_stream_that_nobody_asked_for_is_folded(mock, lab, kind):
    mock.script(streamed(stream_of([*TEXT, *END]), kind))
    proxy = lab("--budget", "1")

    answer = call(proxy.port, "POST", "/v1/messages", ASKED)

    assert [{"type": "text", "text": "Hello"}] == answer.json["content"]
    assert COST == settled_status(proxy)["spent_microdollars"]


@pytest.mark.parametrize("finish", ["error", "insufficient_system_resource", "network_error",
                                    "MALFORMED_FUNCTION_CALL", "abort",
                                    "function_call_filter: MALFORMED_FUNCTION_CALL"])
def test_an_answer_that_failed_at_the_provider_is_an_error(mock, lab, finish):
    body = stream_of([*TEXT, chunk({}, finish), *END[1:]])
    mock.script(streamed(body), streamed(body))
    proxy = lab("--budget", "1")

    text, _, _, stop, error = message_of(
        call(proxy.port, "POST", "/v1/messages", {**ASKED, "stream": True}))
    whole = call(proxy.port, "POST", "/v1/messages", ASKED)

    assert ("Hello", None) == (text, stop)
    assert finish.replace(" ", "") in error
    assert (502 if whole.status == 502 else 500, "error") == (whole.status, whole.json["type"])
    assert 2 * COST == settled_status(proxy)["spent_microdollars"]


def test_an_end_that_nobody_knows_without_any_answer_is_an_error(mock, lab):
    mock.script(streamed(stream_of([chunk({"content": ""}), chunk({}, "weather"), *END[1:]])))

    answer = call(lab().port, "POST", "/v1/messages", {**ASKED, "stream": True})

    assert answer.status >= 500 and "weather" in answer.json["error"]["message"]


def test_a_stream_that_breaks_off_in_an_event_is_no_end(mock, lab):
    mock.script(streamed(stream_of([*TEXT, chunk({}, "stop")])[:-40]))

    _, _, _, stop, error = message_of(
        call(lab().port, "POST", "/v1/messages", {**ASKED, "stream": True}))

    assert stop is None and "without its last event" in error


# words of an overflow (who says them: HOSTS of November 2026) -> (tokens asked for, the most)
OVERFLOWS = {
    "Requested generation length 1024 is not possible! The provided prompt is 16000 tokens long, so "
    "generating 1024 tokens requires a sequence length of 17024, but the maximum supported sequence "
    "length is just 16384!": (17024, 16384),
    "Request prompt has 5000 tokens in total, larger than the model input length limit 4096.":
        (5000, 4096),
    "the number of input tokens 5000 cannot exceed the total tokens limit 4096": (5000, 4096),
    "The sum of prompt length (9000.0), query length (0) should not exceed max_num_tokens (8192)":
        (9000, 8192),
    "number of tokens in the prompt (9000) is greater than n_ctx (8192)": (9000, 8192),
    "Total message token length exceed model limit": None,
    "Total length of messages is too long": None,
    "This model's maximum context length is 131072 tokens. However, you requested 140000 tokens "
    "(139000 in the messages, 1000 in the completion).": (140000, 131072),
    "This model's maximum context length is 8192 tokens. However, your prompt contains 9,000 "
    "input tokens": (9000, 8192),
    "Prompt too long: 32799 tokens exceeds max context window of 32768 tokens": (32799, 32768),
    "Your request exceeded model token limit: 262144 (requested: 300000)": (300000, 262144),
    "The input token count (1200000) exceeds the maximum number of tokens allowed (1048576).":
        (1200000, 1048576),
    "Range of input length should be [1, 129024]": None,
    "Prompt contains 140000 tokens, too large for model with 131072 maximum context length":
        (140000, 131072),
    "This model's maximum prompt length is 131072 but the request contains 140000 tokens.":
        (140000, 131072),
    "The input (9000 tokens) is longer than the model's context length (8192 tokens).":
        (9000, 8192),
    "the request exceeds the available context size, try increasing it": None,
    "invalid params, context window exceeds limit": None,
    "Prompt exceeds max length": None,
    "The number of tokens to keep from the initial prompt is greater than the context length":
        None,
    "The maximum context length of Meta-Llama-3.1-8B-Instruct is 16384. However, answering your "
    "request will take 20000 tokens": (20000, 16384),
    "Current length is 9000 while limit is 8192": (9000, 8192),
    "Please reduce the length of the messages or completion.": None,
    # cline/cline#13194, 2026-08-12
    "This model's maximum context length is 262144 tokens. However, your messages resulted in "
    "262897 tokens. Please reduce the length of the messages.": (262897, 262144),
    # vllm 0.33.0, and before
    "The decoder prompt (length 9000) is longer than the maximum model length of 8192. Make sure "
    "that `max_model_len` is no smaller than the number of text tokens.": (9000, 8192),
    # Vertex, Bedrock (Nova, and Claude there), Cohere, Anthropic behind a gateway
    "Unable to submit request because the input token count is 1100000 but the model only "
    "supports up to 1048576. Reduce the input token count and try again.": (1100000, 1048576),
    "Input Tokens Exceeded: Number of input tokens exceeds maximum length.": None,
    "Too many input tokens. Max input tokens: 131072, request input token count: 140000":
        (140000, 131072),
    "too many tokens: total number of tokens in the prompt cannot exceed 4081 - received 6000.":
        (6000, 4081),
    "Input is too long for requested model.": None,
    "Your input exceeds the context window of this model. Please adjust your input and try again.":
        None,
    "input length and `max_tokens` exceed context limit: 190000 + 32000 > 200000, decrease input "
    "length or `max_tokens` and try again": (222000, 200000),
    "litellm.ContextWindowExceededError: litellm.BadRequestError: too much": None,
    "Requested input length 140000 exceeds maximum input length 131072": (140000, 131072),
    # SGLang's validate_input_length
    "Input length (9000 tokens) exceeds the maximum allowed length (8192 tokens). Use a shorter "
    "input or enable --allow-auto-truncate.": (9000, 8192),
    # huggingface/text-generation-inference#695
    "Input validation error: `inputs` must have less than 4096 tokens. Given: 5000": (5000, 4096),
    # lmstudio-ai/lmstudio-bug-tracker#546, 2025-03-24
    "Trying to keep the first 5000 tokens when context the overflows. However, the model is loaded "
    "with context length of only 4096 tokens, which is not enough. Try to load the model with a "
    "larger context length, or provide a shorter input": (5000, 4096),
    # Volcengine, OpenAI, Moonshot's list of errors, Copilot, Baidu; as clients look for them
    "Total tokens of image and text exceed max message tokens. Request id: 0217": None,
    "Input tokens exceed the configured limit of 272000 tokens. Your messages resulted in 300000 "
    "tokens.": (300000, 272000),
    "Input token length too long": None,
    "prompt token count of 140000 exceeds the limit of 128000": (140000, 128000),
    "Prompt tokens too long": None,
}
# Of those: words from which it can be seen that a smaller cap would do -> Anthropic's sums of them.
CAPS = {
    "This model's maximum context length is 8192 tokens. However, you requested 9000 tokens (8000 "
    "in the messages, 1000 in the completion). Please reduce the length.": (8000, 1000, 8192),
    # earendil-works/pi#6378, 2026-07-06 (OpenRouter)
    "This endpoint's maximum context length is 262000 tokens. However, you requested about 263390 "
    "tokens (658 of text input, 732 of tool input, 262000 in the output).": (1390, 262000, 262000),
    # anomalyco/opencode#36481, 2026-07-12 (vLLM)
    "This model's maximum context length is 262144 tokens. However, you requested 32000 output "
    "tokens and your prompt contains at least 230145 input tokens, for a total of at least 262145 "
    "tokens.": (230145, 32000, 262144),
    # musistudio/claude-code-router#1799, 2026-09-15 (SGLang)
    "Requested token count exceeds the model's maximum context length of 262144 tokens. You "
    "requested a total of 262462 tokens: 230462 tokens from the input messages and 32000 tokens "
    "for the completion.": (230462, 32000, 262144),
    # canfieldjuan/finetunelab.ai, 2025-11-30 (vLLM)
    "'max_tokens' or 'max_completion_tokens' is too large: 2000. This model's maximum context "
    "length is 4096 tokens and your request has 2104 input tokens (2000 > 4096 - 2104).":
        (2104, 2000, 4096),
    # TGI
    "`inputs` tokens + `max_new_tokens` must be <= 8193. Given: 8000 `inputs` tokens and 1000 "
    "`max_new_tokens`": (8000, 1000, 8193),
}
# Neighbouring refusals, which have nothing to do with the context.
NO_OVERFLOWS = (
    "Tool description too long: maximum is 1024",
    "max_completion_tokens exceeds the limit of this model: 32768",
    "Invalid 'user': string too long. Expected a string with maximum length 64",
    "Tool name exceeds maximum length of 64", "max_new_tokens must be at most 4096",
    "string too long. Expected a string with maximum length 1048576",
    "Too many tokens per minute: the limit of 10000 is exceeded", "stop must have less than 5 items",
)
BODIES = {
    "OpenAI's": lambda words: {"error": {"message": words, "type": "BadRequestError",
                                         "code": 400}},
    "flat": lambda words: {"object": "error", "message": words, "type": "BadRequest", "code": 400},
    "a list": lambda words: [{"error": {"code": 400, "message": words, "status": "INVALID"}}],
    "detail": lambda words: {"detail": words},
    "details": lambda words: {"object": "error", "message": {"detail": [
        {"type": "value_error", "loc": ["body"], "msg": words}]}},
    "a text": lambda words: {"error": words},
    "problem+json": lambda words: {"type": "about:blank", "title": "Bad Request", "status": 400,
                                   "detail": words},
    "Anthropic's": lambda words: {"type": "error", "error": {"type": "bad_request_error",
                                                             "message": words}},
    "errors": lambda words: {"errors": [{"message": words}]},
    "MiniMax's own": lambda words: {"base_resp": {"status_code": 1004, "status_msg": words}},
    "a gateway's": lambda words: {"fault": {"faultstring": words}},
    # openrouter.ai/docs, errors; cline/cline#13194
    "another server's, as a text in OpenRouter's": lambda words: {"error": {
        "message": "Provider returned error", "code": 400, "metadata": {
            "raw": json.dumps({"error": {"message": words, "code": 400}}),
            "provider_name": "Nvidia"}}},
    "another server's, as words in OpenRouter's": lambda words: {"error": {
        "message": "Provider returned error", "code": 400, "metadata": {"raw": words}}},
    "another server's, as a text in a text": lambda words: {"error": {
        "message": json.dumps({"error": {"message": words}}), "code": 400}},
}


def refusal(body, status=400, kind="application/json"):
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    return Reply(status=status, headers=(("content-type", kind),), steps=(body,))


@pytest.mark.parametrize("status", [400, 413, 422])
@pytest.mark.parametrize("words", OVERFLOWS)
def test_a_full_context_is_said_in_the_words_on_which_claude_code_compacts(mock, lab, words,
                                                                           status):
    mock.script(refusal(BODIES["OpenAI's"](words), status))

    answer = call(lab().port, "POST", "/v1/messages", ASKED)

    sizes = OVERFLOWS[words]
    start = "prompt is too long" if sizes is None else \
        "prompt is too long: {} tokens > {} maximum".format(*sizes)
    assert (400, "invalid_request_error") == (answer.status, answer.json["error"]["type"])
    assert answer.json["error"]["message"].startswith(start)
    assert words in answer.json["error"]["message"]


@pytest.mark.parametrize("words", NO_OVERFLOWS)
def test_another_refusal_is_no_full_context(words):
    failure = program().overflow_of(program().Failure(400, words), {})

    assert (None, words) == (failure.code, failure.message)


@pytest.mark.parametrize("form", BODIES)
def test_the_words_of_an_error_are_found_in_every_form(mock, lab, form):
    words = "Prompt too long: 32799 tokens exceeds max context window of 32768 tokens"
    mock.script(refusal(BODIES[form](words)), refusal(BODIES[form]("Function call is missing.")))
    proxy = lab()

    full, other = (call(proxy.port, "POST", "/v1/messages", ASKED).json["error"]
                   for _ in range(2))

    said = "Provider returned error: " if "OpenRouter" in form else ""
    whole = form in ("MiniMax's own", "a gateway's")            # no name for it is known: as it came
    assert full["message"] == "prompt is too long: 32799 tokens > 32768 maximum. " + (
        json.dumps(BODIES[form](words)) if whole else said + words)
    assert "Function call is missing." in other["message"]
    assert whole or f"{said}Function call is missing." == other["message"]


@pytest.mark.parametrize("body", [
    {"error": "Bad Request", "message": "it is wrong", "statusCode": 400},
    {"error": "Bad Request", "detail": [{"msg": "it is wrong", "loc": ["body"]}]},
    {"error": "Bad Request", "error_description": "it is wrong"}])
def test_a_text_that_only_names_an_error_does_not_hide_its_words(body):
    assert "Bad Request: it is wrong" == program().failure_of(400, body).message


@pytest.mark.parametrize("words", CAPS)
def test_a_cap_that_does_not_fit_is_said_in_the_words_on_which_claude_code_lowers_it(mock, lab,
                                                                                     words):
    """It sends the same again with C - A - 1000; it compacts where that is too little."""
    mock.script(refusal(BODIES["OpenAI's"](words)))

    said = call(lab().port, "POST", "/v1/messages", ASKED).json["error"]["message"]

    asked, cap, most = CAPS[words]
    assert said.startswith(f"prompt is too long: {asked + cap} tokens > {most} maximum. input "
                           f"length and `max_tokens` exceed context limit: {asked} + {cap} > "
                           f"{most}. ")
    assert said.endswith(words)


@pytest.mark.parametrize("words", [
    "exceed " * 150_000, "context size " * 80_000, "context length " + "9" * 5000,
    "maximum context length is " + "1," * 5000, "[1," * 300_000, "x" * 1_000_000,
    "prompt is too long: 1 tokens > " + "8" * 4400])
def test_an_error_of_any_length_keeps_its_words(words):
    """None is looked through for longer than it takes to read."""
    failure = program().failure_of(400, BODIES["OpenAI's"](words))

    assert program().anthropic_error(failure, "req_1")[1]["error"]["message"].endswith(words)


@pytest.mark.parametrize("client", ["/v1/messages", "/v1/responses"])
def test_the_page_of_a_proxy_before_a_server_is_an_error_of_its_status(mock, lab, client):
    page = b"<html><head><title>502 Bad Gateway</title></head><body>nginx</body></html>" * 9000
    asked = ASKED if client == "/v1/messages" else {"model": "lab/m", "input": "hi"}
    mock.script(refusal(page, 502, "text/html"), refusal(page, 200, "text/html"),
                refusal(page, 200, "text/html"))
    proxy = lab("--budget", "1")

    for stream in (False, False, True):
        answer = call(proxy.port, "POST", client, {**asked, "stream": stream})
        assert 500 <= answer.status < 600 and len(answer.body) < 2000, answer.body[:3000]
        assert answer.json["error"]["message"]


def test_the_numbers_of_llamacpp_stand_beside_its_words(mock, lab):
    mock.script(refusal({"error": {"code": 400, "message": "the request exceeds it",
                                   "type": "exceed_context_size_error",
                                   "n_prompt_tokens": 9000, "n_ctx": 8192}}))

    answer = call(lab().port, "POST", "/v1/messages", ASKED)

    assert answer.json["error"]["message"].startswith(
        "prompt is too long: 9000 tokens > 8192 maximum")


@pytest.mark.parametrize("status, words", [
    (429, "Request too large for model in organization on tokens per minute (TPM): Limit 6000, "
          "Requested 7000"), (413, "Request too large: tokens per minute Limit 6000"),
    (400, "max_tokens must be below 8192"), (400, "the context is missing"),
    (500, "maximum context length is 8192")])
def test_other_refusals_are_no_full_context(mock, lab, status, words):
    mock.script(refusal(BODIES["OpenAI's"](words), status))

    answer = call(lab().port, "POST", "/v1/messages", ASKED)

    assert words == answer.json["error"]["message"]


def test_a_text_that_is_no_json_keeps_its_words(mock, lab):
    mock.script(refusal(b"upstream connect error", 503, "text/plain"))

    answer = call(lab().port, "POST", "/v1/messages", ASKED)

    assert (529, "upstream connect error") == (answer.status, answer.json["error"]["message"])


@pytest.mark.parametrize("form", [lambda error: error, lambda error: [error]],
                         ids=["an object", "a list"])
@pytest.mark.parametrize("kind", ["application/json", "text/event-stream", "text/plain",
                                  "text/html; charset=utf-8", ""])
@pytest.mark.parametrize("stream", [False, True])
def test_an_error_in_a_200_has_the_status_that_it_says(mock, lab, stream, kind, form):
    error = form({"error": {"code": 429, "message": "slow down", "metadata": {}}})
    proxy = lab()

    for reply in (refusal(error, 200, kind), streamed(stream_of([error]), kind)):
        mock.script(reply)
        answer = call(proxy.port, "POST", "/v1/messages", {**ASKED, "stream": stream})
        assert (429, "rate_limit_error", "slow down") == (
            answer.status, answer.json["error"]["type"], answer.json["error"]["message"])


def test_a_null_beside_an_answer_is_no_error(mock, lab):
    whole = {"id": "c", "error": None, "usage": USAGE, "choices": [
        {"message": {"role": "assistant", "content": "Hello"}, "finish_reason": "stop"}]}
    mock.script(refusal(whole, 200))

    assert 200 == call(lab().port, "POST", "/v1/messages", ASKED).status


@pytest.mark.parametrize("noise", [
    b": keep-alive\n\n", stream_of([chunk({"content": ""})]),
    stream_of([chunk({"role": "assistant"})]), b": half a comment "],
    ids=["comments", "empty deltas", "roles", "half an event"])
def test_a_client_hears_pings_while_a_provider_sends_only_noise(monkeypatch, noise):
    """Every 15 s since it last heard something, whatever is read meanwhile (on a clock of ours)."""
    module, now_s = program(), [100.0]
    router = object.__new__(module.Router)
    router.settings = SimpleNamespace(timeouts=module.Timeouts())
    response = SimpleNamespace(headers=module.Headers([]), reads=lambda tick_s: noisy())
    translator = SimpleNamespace(events=lambda stream: (
        event for event in stream if event.get("type") == "ping"))
    call_ = SimpleNamespace(meter=module.AnswerMeter("chat"), translator=translator,
                            client_api="messages", hides_usage=False)

    def noisy():
        for _ in range(9):
            now_s[0] += 5
            yield [noise]
        yield [b"\n\n" + stream_of(END)]

    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now_s[0]))
    reads = module.Router._streamed(router, call_, response)

    assert [115, 130, 145] == [now_s[0] for read in reads if any(read)]


# What a server wants back on the next turn.

SIGNED = {"extra_content": {"google": {"thought_signature": "SIG=="}}}
DETAILS = [{"type": "reasoning.encrypted", "data": "ENC==", "id": "a", "index": 0}]
FIRST = {
    "Gemini's signature of a call": ([chunk(tool_call("get_weather", PARIS, id="a", **SIGNED))],
                                     {}, SIGNED),
    "a signature that comes behind its call": (
        [chunk(tool_call("get_weather", PARIS, id="a")), chunk(tool_call(None, "", id="a",
                                                                         **SIGNED))], {}, SIGNED),
    "OpenRouter's reasoning, all of it sealed": (
        [chunk({"reasoning_details": DETAILS}), chunk(tool_call("get_weather", PARIS, id="a"))],
        {"reasoning_details": DETAILS}, {}),
    "both, behind words": (
        [chunk({"reasoning": "Hmm.", "reasoning_details": DETAILS}),
         chunk(tool_call("get_weather", PARIS, id="a", **SIGNED))],
        {"reasoning_details": DETAILS}, SIGNED),
}


def whole_of(events):
    """The same answer at once, as a server gives it where no stream is asked for."""
    message = {"role": "assistant", "content": None}
    for event in events:
        delta = event["choices"][0]["delta"]
        for row in delta.get("tool_calls", ()):
            message.setdefault("tool_calls", [{}])[0].update(
                {name: value for name, value in row.items() if name != "function"
                 or value["arguments"]})
        message.update((name, value) for name, value in delta.items() if name != "tool_calls")
    return {"id": "c", "choices": [{"message": message, "finish_reason": "tool_calls"}],
            "usage": USAGE}


def said_by(answer):
    """The content of a message, streamed or whole, as a client puts it into its history."""
    if answer.body.startswith(b"{"):
        return answer.json["content"]
    blocks = {}
    for _, data in sse_events(answer.body):
        event = json.loads(data)
        if event["type"] == "content_block_start":
            blocks[event["index"]] = dict(event["content_block"])
        elif event["type"] == "content_block_delta":
            for name, more in event["delta"].items():
                if name != "type":
                    block = blocks[event["index"]]
                    block[name] = block.get(name, "") + more
    for block in blocks.values():
        if "partial_json" in block:
            block["input"] = json.loads(block.pop("partial_json"))
    return [*blocks.values()]


def next_turn(content):
    calls = [block for block in content if block["type"] == "tool_use"]
    return {**ASKED, "messages": [*ASKED["messages"], {"role": "assistant", "content": content},
                                  {"role": "user", "content": [
                                      {"type": "tool_result", "tool_use_id": block["id"],
                                       "content": "R"} for block in calls]}]}


@pytest.mark.parametrize("keeps_thoughts", [True, False], ids=["kept", "forgotten"])
@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize("case", FIRST)
def test_what_a_server_wants_back_comes_back_also_from_clients_that_forget_it(
        mock, lab, case, stream, keeps_thoughts):
    events, of_message, of_call = FIRST[case]
    mock.script(streamed(stream_of([*events, *CALLED])) if stream else refusal(whole_of(events),
                                                                              200))
    proxy = lab()

    said = said_by(call(proxy.port, "POST", "/v1/messages", {**ASKED, "stream": stream}))
    if not keeps_thoughts:
        said = [block for block in said if block["type"] == "tool_use"]
    call(proxy.port, "POST", "/v1/messages", next_turn(said))

    message = next(m for m in mock.seen[1].json["messages"] if m["role"] == "assistant")
    assert of_message == {name: message[name] for name in ("reasoning_details",) if name in message}
    assert of_call == {name: message["tool_calls"][0][name] for name in SIGNED
                       if name in message["tool_calls"][0]}


def test_what_one_server_wants_back_does_not_reach_another(mock, proxy_with):
    events = FIRST["both, behind words"][0]
    mock.script(streamed(stream_of([*events, *CALLED])))
    row = {"base_url": mock.url, "key_env": "OPENAI_API_KEY", "free": True}
    proxy = proxy_with({"providers": {"lab": row, "other": row}})

    said = said_by(call(proxy.port, "POST", "/v1/messages", {**ASKED, "stream": True}))
    answer = call(proxy.port, "POST", "/v1/messages", {**next_turn(said), "model": "other/m"})
    refused = call(proxy.port, "POST", "/v1/messages", {**next_turn(said), "model": "other/m"},
                   headers=[("x-ironcage-strict", "1")])

    message = next(m for m in mock.seen[1].json["messages"] if m["role"] == "assistant")
    assert {"role", "content", "tool_calls"} == set(message)
    assert "messages.thinking=removed" in answer.header("x-ironcage-adjusted")
    assert 400 == refused.status


@pytest.mark.parametrize("given", ["functions.get_weather:0", "call|a b", "ü", "x" * 70, "0", "a"])
def test_ids_are_legal_and_new_for_the_client_and_the_servers_own_on_the_way_back(
        mock, lab, given):
    for _ in range(2):
        mock.script(streamed(stream_of([
            chunk(tool_call("get_weather", PARIS, id=given)), *CALLED])))
    proxy = lab()

    first = said_by(call(proxy.port, "POST", "/v1/messages", {**ASKED, "stream": True}))
    asked = next_turn(first)
    second = said_by(call(proxy.port, "POST", "/v1/messages", {**asked, "stream": True}))

    ids = [block["id"] for block in first + second]
    assert 2 == len(set(ids)) and all(re.fullmatch("[A-Za-z0-9_-]{1,64}", one) for one in ids)
    sent = mock.seen[1].json["messages"]
    assert sent[1]["tool_calls"][0]["id"] == sent[2]["tool_call_id"]
    if len(given) <= 40:
        assert given == sent[2]["tool_call_id"]


def test_mistral_gets_its_ids_its_order_of_messages_and_no_stream_options(mock, proxy_with):
    proxy = proxy_with({"providers": {"mistral": {
        "base_url": mock.url, "key_env": "OPENAI_API_KEY"}}, "prices": {"mistral/m": RATES}},
        "--budget", "1")
    mock.script(streamed(stream_of([*TEXT, chunk({}, "stop", USAGE), "[DONE]"])))
    asked = next_turn([{"type": "tool_use", "id": "toolu_01", "name": "get_weather",
                        "input": {"city": "Paris"}}])
    asked["messages"][-1]["content"].append({"type": "text", "text": "and?"})

    answer = call(proxy.port, "POST", "/v1/messages",
                  {**asked, "model": "mistral/m", "stream": True})

    sent = mock.seen[0].json
    assert ["user", "assistant", "tool", "assistant", "user"] == [
        message["role"] for message in sent["messages"]]
    assert re.fullmatch("[A-Za-z0-9]{9}", sent["messages"][2]["tool_call_id"])
    assert sent["messages"][1]["tool_calls"][0]["id"] == sent["messages"][2]["tool_call_id"]
    assert (100, False) == (sent["max_tokens"], "stream_options" in sent)
    assert "messages=bridged" in answer.header("x-ironcage-adjusted")
    assert COST == settled_status(proxy)["spent_microdollars"]


@pytest.mark.parametrize("model", ["lab/m", "claude-haiku-4-5", "gpt-5.3-codex"])
def test_mistrals_thoughts_in_a_history_hold_up_no_other_model(mock, lab, model):
    asked = {"model": model, "messages": [
        ASKED["messages"][0], {"role": "assistant", "content": [
            {"type": "thinking", "thinking": [{"type": "text", "text": "Hmm."}]},
            {"type": "text", "text": "Hello"}]}, {"role": "user", "content": "again"}]}
    mock.models.add("m")

    answer = call(lab().port, "POST", "/v1/chat/completions", asked)

    assert 200 == answer.status, answer.body
    assert "Hello" in mock.seen[0].body.decode()
    assert (model == "lab/m") == ("Hmm." in mock.seen[0].body.decode())


def test_a_client_hears_of_its_stream_though_its_provider_sends_only_comments(mock, proxy_for,
                                                                              tmp_path):
    path, gate = tmp_path / "cage.json", Gate()
    path.write_text(json.dumps({"providers": {"lab": {"base_url": mock.url, "free": True}}}))
    mock.script(Reply(headers=(("content-type", "text/event-stream"),), framing="chunked",
                      steps=(b": keep-alive\n\n", gate, stream_of([*TEXT, *END]))))
    proxy = proxy_for("--config", str(path), environ=proxy_environment(mock),
                      timeouts={"ping_s": 0.05})

    with RawClient(proxy.port) as client:
        client.request("POST", "/v1/messages", json.dumps({**ASKED, "stream": True}).encode())
        client.read_head()
        pinged = client.read_chunk()
        gate.event.set()
        rest = b"".join(iter(client.read_chunk, b""))

    assert b"event: ping" in pinged and b"message_stop" in rest


def test_cache_marks_reach_a_server_that_takes_them_at_the_price_of_a_write(mock, proxy_with):
    proxy = proxy_with({
        "providers": {"openrouter": {"base_url": mock.url, "key_env": "OPENAI_API_KEY"}},
        "prices": {"openrouter/m": {**RATES, "cache_creation_input_token_cost": 4e-6}}},
        "--budget", "1")
    mark = {"cache_control": {"type": "ephemeral"}}
    text = {"type": "text", "text": "a" * 4000, **mark}
    mock.script(refusal(whole_of([chunk({"content": "Hello"})]), 200))

    call(proxy.port, "POST", "/v1/messages", {
        "model": "openrouter/m", "max_tokens": 10, "system": [text],
        "messages": [{"role": "user", "content": [text]}]})

    assert [[text], [text]] == [m["content"] for m in mock.seen[0].json["messages"]]
    (row,) = proxy.ledger.recent(1)
    assert row["bound_microdollars"] >= 8000 // 4 * 4


def test_a_summary_of_all_before_is_carried_as_text(mock, lab):
    asked = {**ASKED, "messages": [
        *ASKED["messages"],
        {"role": "assistant", "content": [{"type": "compaction", "content": "SUMMARY: Ada"}]},
        {"role": "user", "content": "What is my name?"}]}

    call(lab().port, "POST", "/v1/messages", asked, headers=[("x-ironcage-strict", "1")])

    assert "SUMMARY: Ada" == mock.seen[0].json["messages"][1]["content"]
