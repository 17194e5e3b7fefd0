"""Three clients and three readers, written from the APIs' references: what a client asks in each
dialect, what an answer says to it, and what a request means to a provider. It knows no translator.
"""
from __future__ import annotations

import json
from pathlib import Path
from typing import Mapping, NamedTuple, Optional, Sequence

from support import MockProvider, RawAnswer, sse_events
from translation_checker import (check_chat_stream, check_message_stream, check_response,
                                 check_response_stream)
from vendor_answers import opened_seal

PATHS = {"chat": "/v1/chat/completions", "messages": "/v1/messages", "responses": "/v1/responses"}
PAIRS = [(client, api) for client in PATHS for api in PATHS]
# A model for each API: of a server of OpenAI's format that has chat alone, Claude, and one of
# OpenAI's that takes tools and reasoning in Responses alone; a client of chat completions is served
# in its own API there, unless the model has none.
MODELS = {"chat": "lab/qwen3", "messages": "claude-haiku-5-5", "responses": "gpt-6.1-sol"}


def model_of(client: str, api: str) -> str:
    return "gpt-5.3-codex" if (client, api) == ("chat", "responses") else MODELS[api]


PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"],
              "additionalProperties": False}


class Ask(NamedTuple):
    """What somebody wants of a model, in no API's words."""
    words: str = "hello there"
    system: str = ""
    image: str = ""                     # a URL, or a data URL
    document: str = ""                  # a PDF in base64
    tools: Sequence[str] = ()           # "namespace.name" where it has one; "!name": takes text
    choice: str = ""                    # "required", "none", or a tool
    parallel: bool = True
    schema: Optional[dict] = None
    effort: str = ""
    cap: Optional[int] = 1_000
    stop: Sequence[str] = ()
    more: Mapping[str, object] = {}     # fields as the client's dialect has them


class Heard(NamedTuple):
    """What an answer said."""
    text: str = ""
    thoughts: str = ""
    calls: tuple = ()                   # (name, arguments)
    refusal: str = ""
    end: str = "end"                    # end, calls, length, refused, stop
    prompt: int = 0                     # cached ones among them
    cached: int = 0
    made: int = 0


def configured(mock: MockProvider, folder: Path, **more: object) -> str:
    """A configuration with a provider for each API, all of them the mock; its path."""
    path = folder / "cage.json"
    path.write_text(json.dumps({
        "price_as": {"lab/*": "gpt-4o-mini"}, **more,
        "providers": {"lab": {"base_url": mock.url + "/v1", "key_env": "OPENAI_API_KEY"}}}))
    return str(path)


# What a client sends.

def request_of(client: str, ask: Ask, model: str, stream: bool) -> dict:
    fields = {"chat": _ask_chat, "messages": _ask_messages, "responses": _ask_responses}[client](ask)
    return {"model": model, **fields, **({"stream": True} if stream else {}),
            **({"stream_options": {"include_usage": True}} if stream and client == "chat" else {}),
            **ask.more}


def _ask_chat(ask: Ask) -> dict:
    parts = _parts(ask, {"type": "text", "text": ask.words},
                   {"type": "image_url", "image_url": {"url": ask.image}},
                   {"type": "file", "file": {
                       "file_data": f"data:application/pdf;base64,{ask.document}",
                       "filename": "a.pdf"}})
    fields: dict = {"messages": [
        *([{"role": "system", "content": ask.system}] if ask.system else []),
        {"role": "user", "content": parts if len(parts) > 1 else ask.words}]}
    if ask.cap:
        fields["max_tokens"] = ask.cap
    if ask.tools:
        fields["tools"] = [
            {"type": "custom", "custom": {"name": name[1:]}} if name[0] == "!" else
            {"type": "function", "function": {"name": name, "parameters": PARAMETERS}}
            for name in ask.tools]
        if not ask.parallel:
            fields["parallel_tool_calls"] = False
    if ask.choice:
        fields["tool_choice"] = ask.choice if ask.choice in ("required", "none") else {
            "type": "function", "function": {"name": ask.choice}}
    if ask.schema:
        fields["response_format"] = {"type": "json_schema", "json_schema": {
            "name": "answer", "schema": ask.schema, "strict": True}}
    if ask.effort:
        fields["reasoning_effort"] = ask.effort
    if ask.stop:
        fields["stop"] = list(ask.stop)
    return fields


def _ask_messages(ask: Ask) -> dict:
    mime, _, data = ask.image.partition(";base64,")
    image = {"type": "base64", "media_type": mime[len("data:"):], "data": data} if data \
        else {"type": "url", "url": ask.image}
    parts = _parts(ask, {"type": "text", "text": ask.words}, {"type": "image", "source": image},
                   {"type": "document", "title": "a.pdf", "source": {
                       "type": "base64", "media_type": "application/pdf", "data": ask.document}})
    fields: dict = {"max_tokens": ask.cap or 1_000, "messages": [
        {"role": "user", "content": parts if len(parts) > 1 else ask.words}]}
    if ask.system:
        fields["system"] = ask.system
    if ask.tools:
        fields["tools"] = [{"name": name, "input_schema": PARAMETERS} for name in ask.tools]
        choice = {"required": "any", "none": "none", "": "auto"}.get(ask.choice, "tool")
        if ask.choice or not ask.parallel:
            fields["tool_choice"] = {"type": choice,
                                     **({"name": ask.choice} if choice == "tool" else {}),
                                     **({} if ask.parallel else
                                        {"disable_parallel_tool_use": True})}
    if ask.schema:
        fields["output_config"] = {"format": {"type": "json_schema", "schema": ask.schema}}
    if ask.effort:
        fields["output_config"] = {**fields.get("output_config", {}), "effort": ask.effort}
        fields["thinking"] = {"type": "adaptive", "display": "summarized"}
    if ask.stop:
        fields["stop_sequences"] = list(ask.stop)
    return fields


def _ask_responses(ask: Ask) -> dict:
    assert not ask.stop, "the dialect has no stop sequences"
    parts = _parts(ask, {"type": "input_text", "text": ask.words},
                   {"type": "input_image", "image_url": ask.image, "detail": "auto"},
                   {"type": "input_file", "filename": "a.pdf",
                    "file_data": f"data:application/pdf;base64,{ask.document}"})
    fields: dict = {"store": False, "include": ["reasoning.encrypted_content"], "input": [
        {"role": "user", "content": parts}]}
    if ask.system:
        fields["instructions"] = ask.system
    if ask.cap:
        fields["max_output_tokens"] = ask.cap
    if ask.tools:
        spaces: dict[str, list] = {}
        for name in ask.tools:
            space, _, own = name.rpartition(".")
            spaces.setdefault(space, []).append(
                {"type": "custom", "name": own[1:]} if own[0] == "!" else
                {"type": "function", "name": own, "parameters": PARAMETERS, "strict": False})
        fields["tools"] = [*spaces.pop("", []), *(
            {"type": "namespace", "name": space, "description": "tools", "tools": tools}
            for space, tools in spaces.items())]
        if not ask.parallel:
            fields["parallel_tool_calls"] = False
    if ask.choice:
        fields["tool_choice"] = ask.choice if ask.choice in ("required", "none") else {
            "type": "function", "name": ask.choice}
    if ask.schema:
        fields["text"] = {"format": {"type": "json_schema", "name": "answer", "strict": True,
                                     "schema": ask.schema}}
    if ask.effort:
        fields["reasoning"] = {"effort": ask.effort, "summary": "auto"}
    return fields


def _parts(ask: Ask, text: dict, image: dict, document: dict) -> list[dict]:
    return [*([image] if ask.image else []), *([document] if ask.document else []), text]


def next_turn(client: str, fields: dict, whole: dict, *replies: str) -> dict:
    """The request that follows an answer, which goes back as it came: with the results of its
    calls in order, or with what the user says next."""
    said = {"chat": lambda: [whole["choices"][0]["message"]],
            "messages": lambda: [{"role": "assistant", "content": whole["content"]}],
            "responses": lambda: whole["output"]}[client]()
    ids = {"chat": lambda: [call["id"] for call in said[0].get("tool_calls") or ()],
           "messages": lambda: [block["id"] for block in whole["content"]
                                if block["type"] == "tool_use"],
           "responses": lambda: [item["call_id"] for item in said if "call_id" in item]}[client]()
    if not ids:
        [words] = replies
        said.append({"role": "user", "content": words})
    elif client == "chat":
        said += [{"role": "tool", "tool_call_id": call, "content": text}
                 for call, text in zip(ids, replies)]
    elif client == "messages":
        said.append({"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": call, "content": text}
            for call, text in zip(ids, replies)]})
    else:
        kinds = {item["call_id"]: item["type"] for item in said if "call_id" in item}
        said += [{"type": f"{kinds[call]}_output", "call_id": call, "output": text}
                 for call, text in zip(ids, replies)]
    held = "input" if client == "responses" else "messages"
    return {**fields, held: [*fields[held], *said]}


# What an answer says.

def whole_of(client: str, answer: RawAnswer) -> dict:
    """A whole answer, also of a stream, which is checked event by event."""
    if not (answer.header("content-type") or "").startswith("text/event-stream"):
        return answer.json if client != "responses" else check_response(answer.json)
    events = sse_events(answer.body)
    if client == "chat":
        assert (None, "[DONE]") == events.pop()
        message, finish, usage = check_chat_stream([json.loads(data) for _, data in events], True)
        return {"choices": [{"message": {"role": "assistant", **message}, "finish_reason": finish}],
                "usage": usage}
    documents = [json.loads(data) for _, data in events]
    assert [name for name, _ in events] == [event["type"] for event in documents]
    return (check_message_stream if client == "messages" else check_response_stream)(documents)


def heard(client: str, whole: dict) -> Heard:
    return {"chat": _hear_chat, "messages": _hear_message, "responses": _hear_response}[client](
        whole)


def _hear_chat(whole: dict) -> Heard:
    [choice] = whole["choices"]
    message, usage = choice["message"], whole["usage"]
    calls = tuple((call[call["type"]]["name"], json.loads(call["function"]["arguments"])
                   if call["type"] == "function" else call["custom"]["input"])
                  for call in message.get("tool_calls") or ())
    end = {"stop": "end", "length": "length", "tool_calls": "calls",
           "content_filter": "refused"}[choice["finish_reason"]]
    refusal = message.get("refusal") or ""
    return Heard(message.get("content") or "", message.get("reasoning_content") or "", calls,
                 refusal, "refused" if refusal else end, usage["prompt_tokens"],
                 (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
                 usage["completion_tokens"])


def _hear_message(whole: dict) -> Heard:
    blocks, usage = whole["content"], whole["usage"]
    end = {"end_turn": "end", "tool_use": "calls", "max_tokens": "length", "refusal": "refused",
           "stop_sequence": "stop"}[whole["stop_reason"]]
    texts = {kind: "".join(block[kind] for block in blocks if block["type"] == kind)
             for kind in ("text", "thinking")}
    calls = tuple((block["name"], block["input"]) for block in blocks
                  if block["type"] == "tool_use")
    said = "" if end == "refused" else texts["text"]
    refusal = texts["text"] or (whole.get("stop_details") or {}).get("explanation") or "" \
        if end == "refused" else ""
    cached = usage.get("cache_read_input_tokens") or 0
    return Heard(said, texts["thinking"], calls, refusal, end, usage["input_tokens"] + cached
                 + (usage.get("cache_creation_input_tokens") or 0), cached, usage["output_tokens"])


def _hear_response(whole: dict) -> Heard:
    items, usage = whole["output"], whole["usage"]
    parts = [part for item in items if item["type"] == "message" for part in item["content"]]
    thoughts = "\n\n".join(part["text"] for item in items if item["type"] == "reasoning"
                           for part in item["summary"])
    calls = tuple(
        (".".join(filter(None, (item.get("namespace"), item["name"]))),
         json.loads(item["arguments"]) if item["type"] == "function_call" else item["input"])
        for item in items if item["type"] in ("function_call", "custom_tool_call"))
    reason = (whole["incomplete_details"] or {}).get("reason")
    end = {"max_output_tokens": "length", "content_filter": "refused",
           None: "calls" if calls else "end"}[reason]
    refusal = "".join(part.get("refusal", "") for part in parts)
    return Heard("".join(part.get("text", "") for part in parts), thoughts, calls, refusal,
                 "refused" if refusal else end, usage["input_tokens"],
                 usage["input_tokens_details"]["cached_tokens"], usage["output_tokens"])


# What a request means to the provider that reads it.

class Meant(NamedTuple):
    """A request, in no API's words. A turn is ("user", text), ("image", URL), ("document", base64),
    ("said", text), ("thought", text), ("call", name, arguments) or ("result", which call, text)."""
    system: str
    turns: tuple
    tools: frozenset
    choice: str
    parallel: bool
    schema: Optional[dict]
    effort: str
    cap: Optional[int]
    stop: tuple


def meant(api: str, fields: dict) -> Meant:
    return {"chat": _read_chat, "messages": _read_messages, "responses": _read_responses}[api](
        fields)


def _read_chat(fields: dict) -> Meant:
    system, turns, calls = [], [], {}
    for message in fields["messages"]:
        role, content = message["role"], message.get("content")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content or []
        if role in ("system", "developer"):
            system += [part["text"] for part in parts]
        elif role == "tool":
            turns.append(("result", calls[message["tool_call_id"]],
                          "".join(part["text"] for part in parts)))
        elif role == "user":
            turns += [("image", part["image_url"]["url"]) if part["type"] == "image_url" else
                      ("document", part["file"]["file_data"].partition(",")[2])
                      if part["type"] == "file" else ("user", part["text"]) for part in parts]
        else:
            if message.get("reasoning_content"):
                turns.append(("thought", message["reasoning_content"]))
            turns += [("said", part["text"]) for part in parts if part["text"]]
            for call in message.get("tool_calls") or ():
                calls[call["id"]] = len(calls)
                inner = call[call["type"]]
                turns.append(("call", inner["name"], json.loads(inner["arguments"])
                              if "arguments" in inner else inner["input"]))
    form = fields.get("response_format") or {}
    choice = fields.get("tool_choice") or ""
    return Meant("\n\n".join(system), tuple(turns),
                 frozenset(tool[tool["type"]]["name"] for tool in fields.get("tools") or ()),
                 choice["function"]["name"] if isinstance(choice, dict) else
                 choice.replace("auto", ""), fields.get("parallel_tool_calls") is not False,
                 (form.get("json_schema") or {}).get("schema"), fields.get("reasoning_effort", ""),
                 fields.get("max_completion_tokens", fields.get("max_tokens")),
                 tuple(fields.get("stop") or ()))


def _read_messages(fields: dict) -> Meant:
    system = fields.get("system") or []
    system = [system] if isinstance(system, str) else [block["text"] for block in system]
    turns, calls = [], {}
    for message in fields["messages"]:
        content = message["content"]
        for block in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            kind = block["type"]
            if message["role"] == "system":
                system.append(block["text"])
            elif kind == "text":
                turns.append(("user" if message["role"] == "user" else "said", block["text"]))
            elif kind == "image":
                source = block["source"]
                turns.append(("image", source.get("url")
                              or f"data:{source['media_type']};base64,{source['data']}"))
            elif kind == "document":
                turns.append(("document", block["source"]["data"]))
            elif kind == "thinking":
                assert opened_seal(block["signature"]) == block["thinking"]
                turns.append(("thought", block["thinking"]))
            elif kind == "tool_use":
                calls[block["id"]] = len(calls)
                turns.append(("call", block["name"], block["input"]))
            elif kind == "tool_result":
                turns.append(("result", calls[block["tool_use_id"]], _text(block["content"])))
            else:
                raise AssertionError(f"a block of type {kind}")
    choice, config = fields.get("tool_choice") or {}, fields.get("output_config") or {}
    return Meant("\n\n".join(system), tuple(turns),
                 frozenset(tool["name"] for tool in fields.get("tools") or ()),
                 {"auto": "", "any": "required", "none": "none", "tool": choice.get("name"),
                  None: ""}[choice.get("type")], not choice.get("disable_parallel_tool_use"),
                 (config.get("format") or {}).get("schema"), config.get("effort", ""),
                 fields["max_tokens"], tuple(fields.get("stop_sequences") or ()))


def _read_responses(fields: dict) -> Meant:
    system, turns, calls = [fields.get("instructions") or ""], [], {}
    items = fields["input"]
    for item in [{"role": "user", "content": items}] if isinstance(items, str) else items:
        kind = item.get("type", "message")
        if kind == "message":
            content = item["content"]
            for part in [{"text": content}] if isinstance(content, str) else content:
                if item["role"] in ("system", "developer"):
                    system.append(part["text"])
                elif part.get("type") == "input_image":
                    turns.append(("image", part["image_url"]))
                elif part.get("type") == "input_file":
                    turns.append(("document", part["file_data"].partition(",")[2]))
                else:
                    turns.append(("user" if item["role"] == "user" else "said",
                                  part.get("text", part.get("refusal"))))
        elif kind == "reasoning":
            turns.append(("thought", opened_seal(item["encrypted_content"])))
        elif kind in ("function_call", "custom_tool_call"):
            calls[item["call_id"]] = len(calls)
            name = ".".join(filter(None, (item.get("namespace"), item["name"])))
            turns.append(("call", name, json.loads(item["arguments"])
                          if kind == "function_call" else item["input"]))
        else:
            assert kind in ("function_call_output", "custom_tool_call_output"), kind
            turns.append(("result", calls[item["call_id"]], _text(item["output"])))
    choice = fields.get("tool_choice") or ""
    form = (fields.get("text") or {}).get("format") or {}
    tools = frozenset(
        ".".join(filter(None, (space, tool["name"]))) for outer in fields.get("tools") or ()
        for space, inner in [(outer["name"], outer["tools"]) if outer["type"] == "namespace"
                             else ("", [outer])] for tool in inner if "name" in tool)
    return Meant("\n\n".join(filter(None, system)), tuple(turns), tools,
                 choice["name"] if isinstance(choice, dict) else choice.replace("auto", ""),
                 fields.get("parallel_tool_calls") is not False, form.get("schema"),
                 (fields.get("reasoning") or {}).get("effort") or "",
                 fields.get("max_output_tokens"), ())


def _text(content: object) -> str:
    return content if isinstance(content, str) else "".join(
        part["text"] for part in content or ())
