"""What tests of translation ask and hear: of Claude, and of servers that speak chat completions."""
import base64
import json

from translation_checker import check_message_stream
from vendor_rules import refused_by_anthropic, refused_by_openai

import ironcage_proxy as ic

USER = {"role": "user", "content": "hi"}
OLD, NEW = "claude-haiku-4-5", "claude-opus-5-5"       # takes sampling and budgets; takes neither
PNG = "data:image/png;base64,iVBORw0KGgo="
JPEG_CALLED_PNG = "data:image/png;base64,/9j/4AAQ"
PDF = "data:application/pdf;base64,JVBERi0="
TEXT_FILE = "data:text/plain;base64," + base64.b64encode("Grüße".encode()).decode()
OPEN_SCHEMA = {"type": "object"}
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 1}},
          "required": ["n"], "additionalProperties": False}
RECURSIVE_SCHEMA = {"type": "object", "additionalProperties": False, "properties": {
    "child": {"$ref": "#"}}}
MANY_OPTIONAL = {"type": "object", "additionalProperties": False, "properties": {
    f"p{number}": {"type": "string"} for number in range(25)}}
REFERRING_SCHEMA = {"type": "object", "additionalProperties": False, "required": ["a", "b"],
                    "properties": {"a": {"$ref": "#/$defs/X"}, "b": {"$ref": "#/$defs/X"}},
                    "$defs": {"X": {"type": "string"}}}
NODE = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"],
        "additionalProperties": False}


def to_claude(fields, model=OLD, strict=False, most=64_000):
    losses = ic.Losses(strict=strict)
    fields = {"messages": [USER], **fields, "model": model}
    translator = ic.Translator("chat", "messages", fields, losses, ic.Target(most))
    assert refused_by_anthropic(translator.request) is None
    return translator, losses


def server(is_openai, **manners):
    """OpenAI, or a server that speaks its format."""
    return ic.KNOWN_PROVIDERS["openai"] if is_openai else ic.Provider(
        "other", "openai", "http://127.0.0.1", **manners)


def to_chat(fields, model="gpt-4o", is_openai=True, strict=False, most=128_000, **manners):
    losses = ic.Losses(strict=strict)
    fields = {"messages": [USER], "max_tokens": 100, **fields, "model": model}
    translator = ic.Translator("messages", "chat", fields, losses,
                               ic.Target(most, is_openai, server(is_openai, **manners)))
    assert not is_openai or refused_by_openai(translator.request) is None
    return translator, losses


def text(words, **more):
    return {"type": "text", "text": words, **more}


def tool(name="f", **more):
    return {"type": "function", "function": {"name": name, "parameters": SCHEMA, **more}}


def call(name="f", arguments="{}", call_id="call_1"):
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


# Messages to Claude: (what it shows, model, messages, expected messages, expected system)
SYSTEM = {"role": "system", "content": "S"}
THOUGHT = {"type": "thinking", "thinking": "T", "signature": "s"}

# Claude's answers.

MESSAGE_USAGE = {"input_tokens": 10, "cache_read_input_tokens": 5,
                 "cache_creation_input_tokens": 3, "output_tokens": 7,
                 "output_tokens_details": {"thinking_tokens": 2}, "service_tier": "standard"}


def message(*content, stop="end_turn", **more):
    return {"id": "msg_1", "type": "message", "role": "assistant", "model": OLD,
            "content": list(content), "stop_reason": stop, "usage": MESSAGE_USAGE, **more}


def stream_of(whole, pieces=3):
    """Anthropic's events for a whole message, with its text and JSON cut into pieces."""
    yield {"type": "message_start", "message": {
        **whole, "content": [], "stop_reason": None, "usage": {**MESSAGE_USAGE,
                                                               "output_tokens": 1}}}
    yield {"type": "ping"}
    for index, block in enumerate(whole["content"]):
        kind = block["type"]
        blank = {"text": {"text": ""}, "thinking": {"thinking": "", "signature": ""},
                 "tool_use": {"input": {}}}.get(kind, {})
        yield {"type": "content_block_start", "index": index, "content_block": {**block, **blank}}
        said = {"text": block.get("text"), "thinking": block.get("thinking"),
                "tool_use": json.dumps(block.get("input")) if block.get("input") else ""}.get(kind)
        names = {"text": ("text_delta", "text"), "thinking": ("thinking_delta", "thinking"),
                 "tool_use": ("input_json_delta", "partial_json")}
        size = max(1, len(said or "") // pieces)
        for at in range(0, len(said or ""), size):
            yield {"type": "content_block_delta", "index": index,
                   "delta": {"type": names[kind][0], names[kind][1]: said[at:at + size]}}
        if kind == "thinking":
            yield {"type": "content_block_delta", "index": index,
                   "delta": {"type": "signature_delta", "signature": block["signature"]}}
        yield {"type": "content_block_stop", "index": index}
    yield {"type": "message_delta", "delta": {"stop_reason": whole["stop_reason"],
                                              "stop_details": whole.get("stop_details")},
           "usage": {"output_tokens": MESSAGE_USAGE["output_tokens"], "input_tokens": None}}
    yield {"type": "message_stop"}


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png",
                                     "data": "iVBORw0KGgo="}}
IMAGE_URL = {"type": "image_url", "image_url": {"url": PNG}}
USE = {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "f", "input": {}}]}


def result(content=None, **more):
    return {"type": "tool_result", "tool_use_id": "t", "content": content, **more}


CHAT_USAGE = {"prompt_tokens": 20, "completion_tokens": 5, "total_tokens": 25,
              "prompt_tokens_details": {"cached_tokens": 8, "cache_write_tokens": 2},
              "completion_tokens_details": {"reasoning_tokens": 3}}


def completion(finish="stop", **said):
    return {"id": "chatcmpl-1", "model": "gpt-4o", "usage": CHAT_USAGE, "choices": [
        {"index": 0, "message": {"role": "assistant", "content": None, **said},
         "finish_reason": finish}]}


def chunks_of(*deltas, finish="stop", usage="after"):
    base = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "gpt-4o"}
    for delta in deltas:
        yield {**base, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
    yield {**base, "choices": [{"index": 0, "delta": {}, "finish_reason": finish}],
           **({"usage": CHAT_USAGE} if usage == "with" else {})}
    if usage == "after":
        yield {**base, "choices": [], "usage": CHAT_USAGE}


def piece(index=0, arguments="", **more):
    function = {"arguments": arguments, **({"name": more.pop("name")} if "name" in more else {})}
    return {"tool_calls": [{**({} if index is None else {"index": index}), **more,
                            "function": function}]}


# Found by a hostile reviewer.

def folded_stream(*deltas, finish="tool_calls", is_openai=False):
    translator, _ = to_chat({"stream": True}, "gpt-4o" if is_openai else "qwen", is_openai)
    return check_message_stream(list(translator.events(chunks_of(*deltas, finish=finish))))


def tool_uses(message):
    return [(block["name"], block["input"]) for block in message["content"]
            if block["type"] == "tool_use"]
