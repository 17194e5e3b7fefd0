"""What a model says, as each of the three APIs would bring it: whole, or streamed in the vendors'
order of events. It knows no line of the product.

Shapes from the types of anthropic 2.14.0 and openai 3.57.0, and from recorded streams of 2025 and
2026 (order of events, which events repeat a text, encrypted reasoning that differs from event to
event)."""
from __future__ import annotations

import base64
import json
import re
from collections import deque
from typing import NamedTuple, Optional, Sequence, Union

from support import (ANTHROPIC_HEADERS, OPENAI_HEADERS, MockProvider, Reply, SeenRequest,
                     anthropic_error, openai_error, sse, streamed_reply, whole_reply)

# What a model can do.


class Say(NamedTuple):
    text: str


class Think(NamedTuple):
    """What it thinks: shown, or only sealed."""
    text: str


class Refuse(NamedTuple):
    text: str


class Use(NamedTuple):
    """A call of a tool that the client runs, "namespace.name" where it has one; a string in place
    of arguments: a custom tool."""
    name: str
    arguments: Union[dict, str]


class Find(NamedTuple):
    """A look among the tools that the client has not described yet."""
    query: str


class Search(NamedTuple):
    """A search that runs at the provider, within the call."""
    query: str


Part = Union[Say, Think, Refuse, Use, Find, Search]


class Answer(NamedTuple):
    """What a model says in one call, why it ends, and what it counts, in Anthropic's disjoint
    shape: plain, read, written; "first" is what message_start says of it."""
    parts: Sequence[Part]
    counts: dict
    number: str = "0"                   # part of the ids, so that they differ from turn to turn
    ending: str = "end"                 # end, length, filter, or "stop " and the sequence

    @property
    def calls(self) -> bool:
        return any(isinstance(part, Use) for part in self.parts)

    @property
    def prompt(self) -> int:
        return sum(self.counts[name] for name in ("plain", "read", "written"))


def counted(parts: Sequence[Part], prompt: int, read: int = 0, written: int = 0) -> dict:
    """Counts for parts: a token for every four characters, and one for each part."""
    made = sum(len(json.dumps(part)) // 4 + 1 for part in parts)
    return {"plain": prompt - read - written, "read": read, "written": written, "made": made,
            "searches": 0, "first": prompt - read - written,
            "thought": sum(len(part.text) // 4 for part in parts if isinstance(part, Think))}


def answer_of(api: str, fields: dict, answer: Answer) -> Reply:
    parts = [as_offered(api, fields, part) for part in answer.parts]
    return {"messages": _messages, "responses": _responses, "chat": _chat}[api](
        fields, answer._replace(parts=parts))


def as_offered(api: str, fields: dict, part: Part) -> Part:
    """A call as a model makes it that knows a tool by the name and kind that it was offered: in one
    word where there are no namespaces, and with {"input": text} where it is a function."""
    if not isinstance(part, Use) or api == "responses":
        return part
    offered = {(tool.get(tool["type"], tool) if api == "chat" else tool)["name"]:
               tool.get("type", "function") for tool in fields.get("tools") or ()}
    name = next((name for name in offered if re.sub(r"\W|_", "", name)
                 == re.sub(r"\W|_", "", part.name)), part.name)
    is_text = isinstance(part.arguments, str) and offered.get(name) == "custom" and api == "chat"
    return Use(name, part.arguments if is_text or isinstance(part.arguments, dict)
               else {"input": part.arguments})


# Seals: what makes a thought the vendor's own.

def claude_seal(text: str) -> str:
    return "EqQB" + base64.b64encode(f"claude thought: {text}".encode()).decode()


def openai_seal(text: str, salt: str = "") -> str:
    """Fernet-like, and longer than the text; `salt`: it is encrypted anew for every event."""
    return "gAAAAABp" + base64.urlsafe_b64encode(f"{salt}|{text}|".encode()).decode().rstrip("=")


def opened_seal(seal: str) -> Optional[str]:
    """The thought within, or None: no seal of ours."""
    try:
        if seal.startswith("EqQB"):
            found = base64.b64decode(seal[4:], validate=True).decode()
            return found[len("claude thought: "):]
        inner = seal[len("gAAAAABp"):]
        found = base64.urlsafe_b64decode(inner + "=" * (-len(inner) % 4)).decode()
        return found.split("|", 1)[1][:-1] if found.endswith("|") else None
    except ValueError:
        return None


def pieces(text: str) -> list[str]:
    """A text as a model brings it: word by word, and other characters than ASCII apart."""
    return re.findall(r"\s*[!-~]+|\s*[^\s!-~]+|\s+$", text) or [text][:len(text)]


def thirds(text: str) -> list[str]:
    """JSON as it is streamed: an empty piece first, then cut anywhere."""
    size = len(text) // 3 + 1
    return ["", *(text[at:at + size] for at in range(0, len(text), size))]


def _shares(weights: Sequence[int], made: int) -> list[int]:
    """Tokens made when each event is shown, by the characters that it brings."""
    total, shown, shares = sum(weights) or 1, 0, []
    for weight in weights:
        shown += weight
        shares.append(-(-made * shown // total))
    return shares


def _in_events(events: Sequence[tuple[bytes, int]], made: int, bills: tuple, headers: tuple
               ) -> Reply:
    return streamed_reply([event for event, _ in events],
                          _shares([weight for _, weight in events], made), bills, headers)


# Anthropic.

def _messages(fields: dict, answer: Answer) -> Reply:
    counts = answer.counts
    usage = {"input_tokens": counts["plain"], "cache_creation_input_tokens": counts["written"],
             "cache_read_input_tokens": counts["read"],
             "cache_creation": {"ephemeral_5m_input_tokens": counts["written"],
                                "ephemeral_1h_input_tokens": 0},
             "output_tokens": counts["made"], "service_tier": "standard",
             "inference_geo": "global"}
    if counts.get("thought"):
        usage["output_tokens_details"] = {"thinking_tokens": counts["thought"]}
    if counts["searches"]:
        usage["server_tool_use"] = {"web_search_requests": counts["searches"],
                                    "web_fetch_requests": 0}
    blocks = [block for place, part in enumerate(answer.parts)
              for block in _blocks(part, f"{answer.number}_{place}")]
    refusals = [part.text for part in answer.parts if isinstance(part, Refuse)]
    ending, _, stop = answer.ending.partition(" ")
    reason = {"end": "tool_use" if answer.calls else "end_turn", "length": "max_tokens",
              "filter": "refusal", "stop": "stop_sequence"}["filter" if refusals else ending]
    ended = {"stop_reason": reason, "stop_sequence": stop or None, "stop_details": {
        "type": "refusal", "category": None, "explanation": (refusals or [None])[0]}
        if reason == "refusal" else None}
    whole = {"model": fields["model"], "id": f"msg_{answer.number}", "type": "message",
             "role": "assistant", "content": blocks, **ended, "usage": usage}
    bills = (fields["model"], usage)
    if not fields.get("stream"):
        return whole_reply(whole, bills, ANTHROPIC_HEADERS)

    def event(kind: str, weight: int = 0, **members: object) -> tuple[bytes, int]:
        return sse({"type": kind, **members}, kind), weight

    first = {**usage, "input_tokens": counts["first"], "output_tokens": 1}
    first.pop("server_tool_use", None)
    events = [event("message_start", message={**whole, "content": [], "stop_reason": None,
                                              "stop_sequence": None, "stop_details": None,
                                              "usage": first}), event("ping")]
    for index, block in enumerate(blocks):
        start, deltas = block_pieces(block)
        events.append(event("content_block_start", index=index, content_block=start))
        events += [event("content_block_delta", len(str(delta)), index=index, delta=delta)
                   for delta in deltas]
        events.append(event("content_block_stop", index=index))
    final = {name: count for name, count in usage.items()
             if name.endswith("_tokens") or name in ("server_tool_use", "output_tokens_details")}
    events += [event("message_delta", delta=ended, usage=final), event("message_stop")]
    return _in_events(events, counts["made"], bills, ANTHROPIC_HEADERS)


def _blocks(part: Part, name: str) -> list[dict]:
    if isinstance(part, Say):
        return [{"type": "text", "text": part.text}]
    if isinstance(part, Think):
        return [{"type": "thinking", "thinking": part.text, "signature": claude_seal(part.text)}]
    if isinstance(part, Refuse):
        return []                       # stop_details says it
    if isinstance(part, Use):
        return [{"type": "tool_use", "id": f"toolu_{name}", "name": part.name,
                 "input": part.arguments, "caller": {"type": "direct"}}]
    found = {"type": "web_search_result", "title": "Canaries", "url": "https://cave.example/",
             "encrypted_content": "EugCCioIEhgCIiQw", "page_age": None}
    return [{"type": "server_tool_use", "id": f"srvtoolu_{name}", "name": "web_search",
             "input": {"query": part.query}},
            {"type": "web_search_tool_result", "tool_use_id": f"srvtoolu_{name}",
             "content": [found]}]


def block_pieces(block: dict) -> tuple[dict, list[dict]]:
    if block["type"] == "text":
        return {**block, "text": ""}, [{"type": "text_delta", "text": text}
                                       for text in pieces(block["text"])]
    if block["type"] == "thinking":
        return {**block, "thinking": "", "signature": ""}, [
            *({"type": "thinking_delta", "thinking": text} for text in pieces(block["thinking"])),
            {"type": "signature_delta", "signature": block["signature"]}]
    if block["type"] in ("tool_use", "server_tool_use"):
        return {**block, "input": {}}, [{"type": "input_json_delta", "partial_json": text}
                                        for text in thirds(json.dumps(block["input"]))]
    return block, []


# OpenAI's Responses.

def _responses(fields: dict, answer: Answer) -> Reply:
    counts = answer.counts
    usage = {"input_tokens": answer.prompt, "input_tokens_details": {
        "cached_tokens": counts["read"], "cache_write_tokens": counts["written"]},
        "output_tokens": counts["made"],
        "output_tokens_details": {"reasoning_tokens": counts.get("thought", 0)},
        "total_tokens": answer.prompt + counts["made"]}
    shows = bool((fields.get("reasoning") or {}).get("summary"))
    items = [item for place, part in enumerate(answer.parts)
             for item in [_item(part, f"{answer.number}_{place}", shows)]]
    reason = {"length": "max_output_tokens", "filter": "content_filter"}.get(answer.ending)
    if reason and items and "status" in items[-1]:
        items[-1]["status"] = "incomplete"
    status = "incomplete" if reason else "completed"
    whole = {"id": f"resp_{answer.number}", "object": "response", "created_at": 1795846678,
             "status": status, "background": False, "completed_at": 1795846679, "error": None,
             "incomplete_details": {"reason": reason} if reason else None,
             "instructions": fields.get("instructions"), "metadata": fields.get("metadata") or {},
             "model": fields["model"], "max_output_tokens": fields.get("max_output_tokens"),
             "max_tool_calls": None, "output": [_sealed_anew(item, "final") for item in items],
             "parallel_tool_calls": fields.get("parallel_tool_calls", True),
             "previous_response_id": None,
             "reasoning": {"effort": None, "summary": None, **(fields.get("reasoning") or {})},
             "safety_identifier": None, "service_tier": "default",
             "store": fields.get("store", True), "temperature": 1.0,
             "text": {"format": {"type": "text"}, "verbosity": "medium"},
             "tool_choice": fields.get("tool_choice", "auto"), "tools": fields.get("tools") or [],
             "top_logprobs": 0, "top_p": 1.0, "truncation": "disabled", "usage": usage,
             "user": None}
    bills = (fields["model"], {**usage, "web_searches": counts["searches"]})
    if not fields.get("stream"):
        return whole_reply(whole, bills, OPENAI_HEADERS)
    opened = {**whole, "status": "in_progress", "output": [], "usage": None, "completed_at": None,
              "incomplete_details": None, "service_tier": fields.get("service_tier") or "auto"}
    named: list[tuple[str, dict]] = [("response.created", {"response": opened}),
                                     ("response.in_progress", {"response": opened})]
    for index, item in enumerate(items):
        named += [(name, {"output_index": index, **rest}) for name, rest in _item_events(item)]
    named.append((f"response.{status}", {"response": whole}))
    return _in_events(
        [(sse({"type": name, "sequence_number": number, **rest}, name), len(rest.get("delta", "")))
         for number, (name, rest) in enumerate(named)], counts["made"], bills, OPENAI_HEADERS)


def _sealed_anew(item: dict, salt: str) -> dict:
    if item["type"] != "reasoning":
        return item
    return {**item, "encrypted_content": openai_seal(opened_seal(item["encrypted_content"]), salt)}


def _item(part: Part, name: str, shows: bool) -> dict:
    if isinstance(part, (Say, Refuse)):
        said = {"type": "output_text", "text": part.text, "annotations": [], "logprobs": []} \
            if isinstance(part, Say) else {"type": "refusal", "refusal": part.text}
        return {"id": f"msg_{name}", "type": "message", "status": "completed",
                "role": "assistant", "content": [said]}
    if isinstance(part, Think):
        return {"id": f"rs_{name}", "type": "reasoning", "summary": [
            {"type": "summary_text", "text": part.text}] if shows else [],
            "encrypted_content": openai_seal(part.text)}
    if isinstance(part, Search):
        return {"id": f"ws_{name}", "type": "web_search_call", "status": "completed",
                "action": {"type": "search", "query": part.query}}
    if isinstance(part, Find):
        return {"id": f"tsc_{name}", "type": "tool_search_call", "execution": "client",
                "call_id": f"call_{name}", "status": "completed",
                "arguments": {"query": part.query}}
    namespace, _, tool = part.name.rpartition(".")
    call = {"call_id": f"call_{name}", "name": tool, "status": "completed",
            **({"namespace": namespace} if namespace else {})}
    if isinstance(part.arguments, str):
        return {**call, "id": f"ctc_{name}", "type": "custom_tool_call", "input": part.arguments}
    return {**call, "id": f"fc_{name}", "type": "function_call",
            "arguments": json.dumps(part.arguments)}


TEXTS = {"output_text": ("text", {"logprobs": []}), "refusal": ("refusal", {})}


def _item_events(item: dict) -> list[tuple[str, dict]]:
    where, kind = {"item_id": item["id"]}, item["type"]
    opened, between = {**item, **({"status": "in_progress"} if "status" in item else {})}, []
    if kind == "message":
        [part] = item["content"]
        text, more = TEXTS[part["type"]]
        opened["content"] = []
        inside = {**where, "content_index": 0}
        between = [("content_part.added", {**inside, "part": {**part, text: ""}}),
                   *((f"{part['type']}.delta", {**inside, "delta": piece, **more})
                     for piece in pieces(part[text])),
                   (f"{part['type']}.done", {**inside, text: part[text], **more}),
                   ("content_part.done", {**inside, "part": part})]
    elif kind == "reasoning":
        opened.update(summary=[], encrypted_content=openai_seal("not all of it yet", "added"))
        for index, part in enumerate(item["summary"]):
            inside = {**where, "summary_index": index}
            between += [
                ("reasoning_summary_part.added", {**inside, "part": {**part, "text": ""}}),
                *(("reasoning_summary_text.delta", {**inside, "delta": piece})
                  for piece in pieces(part["text"])),
                ("reasoning_summary_text.done", {**inside, "text": part["text"]}),
                ("reasoning_summary_part.done", {**inside, "part": part})]
    elif kind == "web_search_call":
        del opened["action"]
        between = [(f"web_search_call.{state}", where)
                   for state in ("in_progress", "searching", "completed")]
    elif kind in ("function_call", "custom_tool_call"):
        name = "arguments" if kind == "function_call" else "input"
        opened[name] = ""
        events = "function_call_arguments" if name == "arguments" else "custom_tool_call_input"
        between = [*((f"{events}.delta", {**where, "delta": piece})
                     for piece in thirds(item[name])[1:]),
                   (f"{events}.done", {**where, name: item[name]})]
    return [("response.output_item.added", {"item": opened}),
            *((f"response.{name}", rest) for name, rest in between),
            ("response.output_item.done", {"item": item})]


# OpenAI's chat completions, and servers that speak its format.

SHOWS_NO_THOUGHTS = re.compile(r"gpt-|o\d")       # OpenAI's own models only count them


def _chat(fields: dict, answer: Answer) -> Reply:
    counts, model = answer.counts, fields["model"]
    usage = {"prompt_tokens": answer.prompt, "completion_tokens": counts["made"],
             "total_tokens": answer.prompt + counts["made"], "prompt_tokens_details": {
                 "cached_tokens": counts["read"], "cache_write_tokens": counts["written"]},
             "completion_tokens_details": {"reasoning_tokens": counts.get("thought", 0)}}
    said = {kind: "".join(part.text for part in answer.parts if isinstance(part, kind))
            for kind in (Say, Think, Refuse)}
    thoughts = {} if SHOWS_NO_THOUGHTS.match(model) or not said[Think] \
        else {"reasoning_content": said[Think]}
    calls = [_chat_call(part, f"call_{answer.number}_{place}")
             for place, part in enumerate(answer.parts) if isinstance(part, Use)]
    finish = {"length": "length", "filter": "content_filter"}.get(
        answer.ending, "tool_calls" if calls else "stop")
    base = {"id": f"chatcmpl-{answer.number}", "created": 1795846678, "model": model,
            "service_tier": "default", "system_fingerprint": None}
    bills = (model, usage)
    if not fields.get("stream"):
        message = {"role": "assistant", "content": said[Say] or None,
                   "refusal": said[Refuse] or None, **thoughts,
                   **({"tool_calls": calls} if calls else {})}
        return whole_reply({**base, "object": "chat.completion", "usage": usage, "choices": [
            {"index": 0, "message": message, "logprobs": None, "finish_reason": finish}]},
            bills, OPENAI_HEADERS)
    deltas: list[dict] = [{"role": "assistant", "content": None if calls else "", "refusal": None}]
    deltas += [{name: piece} for name, text in (
        ("reasoning_content", thoughts.get("reasoning_content", "")), ("content", said[Say]),
        ("refusal", said[Refuse])) for piece in pieces(text)]
    for index, call in enumerate(calls):
        kind = call["type"]
        text = "arguments" if kind == "function" else "input"
        deltas.append({"tool_calls": [{**call, "index": index, kind: {**call[kind], text: ""}}]})
        deltas += [{"tool_calls": [{"index": index, kind: {text: piece}}]}
                   for piece in thirds(call[kind][text])[1:]]
    chunks = [{**base, "object": "chat.completion.chunk", "choices": [
        {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}]}
        for delta, reason in [*((delta, None) for delta in deltas), ({}, finish)]]
    if (fields.get("stream_options") or {}).get("include_usage"):
        chunks = [{**chunk, "usage": None} for chunk in chunks]
        chunks.append({**base, "object": "chat.completion.chunk", "choices": [], "usage": usage})
    events = [(sse(chunk), len(json.dumps([choice["delta"] for choice in chunk["choices"]])) - 4)
              for chunk in chunks]
    return _in_events([*events, (sse("[DONE]"), 0)], counts["made"], bills, OPENAI_HEADERS)


def _chat_call(part: Use, call_id: str) -> dict:
    if isinstance(part.arguments, str):
        return {"id": call_id, "type": "custom",
                "custom": {"name": part.name, "input": part.arguments}}
    return {"id": call_id, "type": "function", "function": {
        "name": part.name, "arguments": json.dumps(part.arguments)}}


# A provider whose models say what a test has them say.

class Speaker(MockProvider):
    """A mock that says a test's lines in whichever API it is asked, and takes back no thought that
    is not sealed as it gave it out."""

    def __init__(self) -> None:
        super().__init__()
        self._lines: deque[tuple] = deque()
        self.id_of_answers = ""                      # some servers give each answer the same

    def says(self, *parts: Part, ending: str = "end", **counts: int) -> None:
        """The next answer; `counts` replaces what its parts would count."""
        self._lines.append((parts, ending, counts))

    def forget(self) -> None:
        """Leave nothing of one test to the next: what was seen, and what was to be said."""
        self.seen.clear()
        self._lines.clear()
        self.id_of_answers = ""

    def answer(self, api: str, request: SeenRequest, fields: dict) -> Reply:
        if not self._lines or api not in ("chat", "responses", "messages"):
            return super().answer(api, request, fields)
        broken = broken_seal(api, fields)
        if broken is not None:
            return (anthropic_error if api == "messages" else openai_error)(400, broken)
        parts, ending, counts = self._lines.popleft()
        prompt = -(-len(request.body) // 4)
        made = {**counted(parts, prompt, min(self.cached_tokens, prompt)), **counts}
        return answer_of(api, fields, Answer(
            parts, made, self.id_of_answers or str(len(self.seen)), ending))


def broken_seal(api: str, fields: dict) -> Optional[str]:
    """The vendors' refusal of a thought that came back changed, or from elsewhere."""
    if api == "messages":
        for number, message in enumerate(fields["messages"]):
            for place, block in enumerate(message["content"]):
                if isinstance(block, dict) and block["type"] == "thinking" \
                        and opened_seal(block["signature"]) != block["thinking"]:
                    return f"messages.{number}.content.{place}: Invalid `signature` in `thinking`" \
                        " block"
    if api == "responses":
        for item in fields["input"] if isinstance(fields["input"], list) else ():
            seal = item.get("encrypted_content")
            if item.get("type") == "reasoning" and seal and (
                    opened_seal(seal) in (None, "not all of it yet")):
                return f"The encrypted content {seal[:4]}...{seal[-4:]} could not be verified. " \
                    "Reason: Encrypted content could not be decrypted or parsed."
    return None
