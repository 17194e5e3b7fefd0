"""Every recorded exchange of one dialect, translated to the other, is what that SDK's types say."""
import collections
import json

import pytest
from support import program, recordings

pydantic = pytest.importorskip("pydantic")
anthropic = pytest.importorskip("anthropic")
openai = pytest.importorskip("openai")

from anthropic.types import Message, RawMessageStreamEvent
from anthropic.types.message_create_params import (
    MessageCreateParamsNonStreaming, MessageCreateParamsStreaming)
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.chat.completion_create_params import (
    CompletionCreateParamsNonStreaming, CompletionCreateParamsStreaming)

MESSAGES = {False: MessageCreateParamsNonStreaming, True: MessageCreateParamsStreaming}
CHAT = {False: CompletionCreateParamsNonStreaming, True: CompletionCreateParamsStreaming}
ic = program()


def valid(types, request):
    wanted = types[bool(request.get("stream"))]
    pydantic.TypeAdapter(wanted).validate_python(request)
    known = {"temperature", "top_p", "top_k"}       # of the API's version 2023-06-01, which we say
    for base in wanted.__mro__:
        known |= set(getattr(base, "__annotations__", ()))
    assert set(request) <= known, set(request) - known


def chat_on_claude(fields, model="claude-opus-5-5"):
    return ic.Translator("chat", "messages", {**fields, "model": model}, ic.Losses(),
                         ic.Target(64_000))


def messages_on_chat(fields, is_openai=True):
    return ic.Translator("messages", "chat", {**fields, "model": "gpt-5.5"}, ic.Losses(),
                         ic.Target(128_000, is_openai, ic.KNOWN_PROVIDERS[
                             "openai" if is_openai else "together_ai"]))


@pytest.mark.parametrize("model", [
    "claude-sonnet-4-20250514", "claude-haiku-4-5", "claude-opus-4-6", "claude-opus-4-8",
    "claude-fable-5", "claude-opus-5-5"])
def test_recorded_chat_requests_are_messages_requests(model):
    counts = collections.Counter()
    for _, exchange in recordings():
        fields = exchange["request"]["body"]
        if exchange["api"] == "chat" and fields:
            try:
                valid(MESSAGES, chat_on_claude(fields, model).request)
                counts["valid"] += 1
            except ic.BadRequest:
                counts["refused"] += 1

    assert counts["valid"] > 90 and counts["refused"] < 15


@pytest.mark.parametrize("is_openai", [True, False])
def test_recorded_messages_requests_are_chat_requests(is_openai):
    counts = collections.Counter()
    for _, exchange in recordings():
        fields = exchange["request"]["body"]
        if exchange["api"] == "messages" and fields:
            try:
                valid(CHAT, messages_on_chat(fields, is_openai).request)
                counts["valid"] += 1
            except ic.BadRequest:                      # Anthropic's own tools, mostly
                counts["refused"] += 1

    assert counts["valid"] > 80 and counts["refused"] < 40


def recorded_events(exchange):
    """The JSON events of a recorded stream."""
    splitter = ic.EventSplitter()
    for event in splitter.feed(exchange["response"]["sse"].encode() + b"\n\n"):
        data = ic.event_data(event)
        if data and data != b"[DONE]":
            yield json.loads(data)


def test_recorded_messages_are_chat_completions():
    count = 0
    for name, exchange in recordings():
        body = exchange["response"].get("body")
        if exchange["api"] != "messages" or not isinstance(body, dict) \
                or body.get("type") != "message":
            continue
        answer = chat_on_claude({"messages": [{"role": "user", "content": "x"}]}).answer(body)
        parsed = ChatCompletion.model_validate(answer, strict=True)
        texts = "".join(b["text"] for b in body["content"] if b["type"] == "text")
        calls = [(b["id"], b["name"], b["input"]) for b in body["content"]
                 if b["type"] == "tool_use"]
        said = parsed.choices[0].message
        assert (name, texts) == (name, said.content or "")
        assert calls == [(c.id, c.function.name, json.loads(c.function.arguments))
                         for c in said.tool_calls or ()]
        assert parsed.usage.completion_tokens == body["usage"]["output_tokens"]
        count += 1

    assert count > 30


def test_recorded_message_streams_are_chat_streams():
    count = 0
    for name, exchange in recordings():
        if exchange["api"] != "messages" or "sse" not in exchange["response"]:
            continue
        events = list(recorded_events(exchange))
        if any(event["type"] == "error" for event in events):
            continue
        translator = chat_on_claude({"messages": [{"role": "user", "content": "x"}],
                                     "stream_options": {"include_usage": True}})
        chunks = [ChatCompletionChunk.model_validate(chunk) for chunk in
                  translator.events(iter(events)) if chunk != {"type": "ping"}]
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        told = "".join(e["delta"]["text"] for e in events
                       if e["type"] == "content_block_delta" and e["delta"]["type"] == "text_delta")
        assert (name, told) == (name, text)
        finishes = [c.choices[0].finish_reason for c in chunks if c.choices
                    and c.choices[0].finish_reason]
        assert 1 == len(finishes) and chunks[-1].usage is not None
        arguments = collections.defaultdict(str)
        for chunk in chunks:
            for call in (chunk.choices[0].delta.tool_calls or ()) if chunk.choices else ():
                arguments[call.index] += (call.function and call.function.arguments) or ""
        assert list(range(len(arguments))) == sorted(arguments)
        assert all(isinstance(json.loads(text), dict) for text in arguments.values())
        count += 1

    assert count > 20


def test_recorded_chat_completions_are_messages():
    count = 0
    for name, exchange in recordings():
        body = exchange["response"].get("body")
        if exchange["api"] != "chat" or not isinstance(body, dict) or "choices" not in body:
            continue
        translator = messages_on_chat({"max_tokens": 9, "messages": [
            {"role": "user", "content": "x"}]})
        parsed = Message.model_validate(translator.answer(body))
        said = body["choices"][0].get("message", {})
        texts = "".join(block.text for block in parsed.content if block.type == "text")
        assert (name, (said.get("content") or "") + (said.get("refusal") or "")) == (name, texts)
        assert [c[c["type"]]["name"] for c in said.get("tool_calls") or ()] \
            + [c["name"] for c in [said.get("function_call")] if c] \
            == [block.name for block in parsed.content if block.type == "tool_use"]
        assert parsed.stop_reason is not None
        count += 1

    assert count > 30


def test_recorded_chat_streams_are_message_streams():
    from translation_checker import check_message_stream
    adapter = pydantic.TypeAdapter(RawMessageStreamEvent)
    count = 0
    for name, exchange in recordings():
        if exchange["api"] != "chat" or "sse" not in exchange["response"]:
            continue
        chunks = list(recorded_events(exchange))
        if any("error" in chunk for chunk in chunks) or not any(
                choice.get("finish_reason") for chunk in chunks
                for choice in chunk.get("choices") or ()):
            continue
        for is_openai in (True, False):
            translator = messages_on_chat({"max_tokens": 9, "messages": [
                {"role": "user", "content": "x"}]}, is_openai)
            events = list(translator.events(iter(chunks)))
            for event in events:
                if event["type"] != "ping":
                    adapter.validate_python(event)
            folded = check_message_stream(events)
            told = "".join((c["choices"][0]["delta"].get("content") or "")
                           for c in chunks if c.get("choices")
                           and c["choices"][0].get("index", 0) == 0)
            texts = "".join(b["text"] for b in folded["content"] if b["type"] == "text")
            assert (name, told) == (name, texts) or "refusal" in exchange["response"]["sse"]
        count += 1

    assert count > 20
