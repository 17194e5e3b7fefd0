"""The model's part in a conversation with a real agent, played by a mock that bills as vendors do.

An agent program (Claude Code, Codex, opencode, a script on an SDK) asks; `Model` reads what it is
offered and what it has done so far, and answers with text, calls of the agent's own tools, or a
search that it runs itself. It knows no line of the product: usage and bills are its own.
"""
from __future__ import annotations

import json
import re
from typing import Callable, NamedTuple, Optional, Union

from support import (ANTHROPIC_HEADERS, OPENAI_HEADERS, WRITES_COST, MockProvider, Reply,
                     SeenRequest, anthropic_error, sse, streamed_reply, whole_reply)

TASK = "cage-drill"                     # in the prompt that a test gives to an agent
SUBTASK = "errand for the other agent"  # in the prompt that the model gives to a subagent
DONE = "All of it is done."
SUMMARY = "What happened so far: the drill began."
ASKS_FOR_SUMMARY = re.compile(r"Respond with TEXT ONLY|CONTEXT CHECKPOINT COMPACTION"
                              r"|[Cc]reate a (new )?(anchored )?summary|context-summary")
SEARCH_RESULT_TOKENS = 3_000            # what one search adds to what is read again
TWO_COMMANDS = ("echo first of two", "echo second of two")


# What the model can do.

class Say(NamedTuple):
    text: str


class Use(NamedTuple):
    """A call of a tool that the client runs; a string in place of arguments: a custom tool."""
    name: str
    arguments: Union[dict, str]


class Find(NamedTuple):
    """A look among the tools that the client has not described yet."""
    query: str


class Search(NamedTuple):
    """A search that runs at the provider, within the call."""
    query: str


Part = Union[Say, Use, Find, Search]


class Heard(NamedTuple):
    """A request as the model reads it, whatever the API."""
    api: str
    fields: dict
    words: str                          # all text of the conversation
    last: str                           # the text of its last message
    results: tuple[str, ...]            # of tools, in order
    tools: dict[str, dict]              # what the client runs, "namespace.name" where it has one
    hosts_search: bool                  # whether a search that runs here is offered
    finds_tools: bool                   # whether the client can describe further tools

    @property
    def is_streamed(self) -> bool:
        return bool(self.fields.get("stream"))

    def tool(self, *names: str) -> Optional[str]:
        """The first of these tools that is offered, by its whole name."""
        return next((name for name in names if name in self.tools), None)


def heard(api: str, fields: dict) -> Heard:
    messages = fields.get("messages", fields.get("input"))
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    offered = [*(fields.get("tools") or []), *(
        tool for item in messages if item.get("type") in ("additional_tools", "tool_search_output")
        for tool in item["tools"])]
    tools: dict[str, dict] = {}
    for tool in offered:
        tool = tool.get("function", tool)
        inner = {f"{tool['name']}.{t['name']}": t for t in tool.get("tools", ())}
        if inner or tool.get("type") in (None, "function", "custom"):
            tools.update(inner or {tool["name"]: tool})
    said = [message for message in messages if message.get("role") != "system"]
    return Heard(api, fields, _text(messages), _text(said[-1:]), tuple(_results(messages)), tools,
                 *(any(str(tool.get("type")).startswith(kind) for tool in offered)
                   for kind in ("web_search", "tool_search")))


def _text(value: object) -> str:
    if isinstance(value, dict):
        value = [value.get(name) for name in ("text", "content", "output", "encrypted_content")]
    if isinstance(value, list):
        return "\n".join(filter(None, map(_text, value)))
    return value if isinstance(value, str) else ""


def _results(messages: list) -> list[str]:
    return [_text(block) for message in messages
            for block in [message, *(message["content"] if isinstance(
                message.get("content"), list) else ())]
            if block.get("role") == "tool" or block.get("type") in (
                "tool_result", "function_call_output", "custom_tool_call_output")]


# What it does in each scenario: functions from what it heard to the parts of its answer, or to a
# refusal. None: the client does not offer what the scenario needs.

Answer = Union[list, Reply, None]


def shell(asked: Heard, command: str) -> Optional[Use]:
    """A call of the client's shell, in its own terms."""
    if asked.tool("functions.exec"):
        return Use("functions.exec", f"text(await tools.exec_command({{cmd: {json.dumps(command)}"
                                     "}))")
    if asked.tool("exec_command"):
        return Use("exec_command", {"cmd": command})
    name = asked.tool("Bash", "bash", "run")
    return name and Use(name, {"command": command, "description": "say it"})


def two_tools(asked: Heard) -> Answer:
    """Two calls in one turn; one after the other where the client takes no parallel calls."""
    calls = [shell(asked, command) for command in TWO_COMMANDS]
    if None in calls:
        return None
    if asked.fields.get("parallel_tool_calls") is False:
        calls = calls[len(asked.results):][:1]
    return [Say(DONE)] if len(asked.results) >= 2 else calls


def web_search(asked: Heard) -> Answer:
    if asked.hosts_search:
        return [Search("canaries in caves"), Say(DONE)]
    if asked.results and "WebSearch" in asked.tools and DONE in asked.results[-1]:
        return [Say(DONE)]
    if len(asked.results) > 2:
        return [Say("It found nothing.")]
    if asked.tool("WebSearch"):
        return [Use("WebSearch", {"query": "canaries in caves"})]
    if asked.tool("ToolSearch"):
        return [Use("ToolSearch", {"query": "select:WebSearch", "max_results": 1})]
    return None


def compaction(asked: Heard) -> Answer:
    """One call after another, until the client has made the conversation shorter.

    Claude Code does so when the vendor says that it is too long, Codex and opencode when the usage
    passes what their configuration allows.
    """
    if SUMMARY in asked.words:
        return [Say(DONE)]
    if asked.results and "Bash" in asked.tools:
        return anthropic_error(400, "prompt is too long: 212543 tokens > 200000 maximum")
    call = shell(asked, 'seq -f "line %05g of a long story" 1 1000')
    return call and [call if len(asked.results) < 5 else Say("It never became shorter.")]


def subagent(asked: Heard) -> Answer:
    if asked.results and asked.tool("Agent", "task", "functions.exec") \
            and "collaboration.wait_agent" not in asked.tools:
        return [Say(DONE)]
    spawn = asked.tool(*SPAWNS)
    if spawn is None:
        return [Find("spawn agent")] if asked.finds_tools else None
    if not asked.results:
        return [Use(spawn, SPAWNS[spawn])]
    if len(asked.results) > 1:
        return [Say(DONE)]
    found = re.search(r'"agent_id":\s*"([^"]+)"', asked.results[0])
    return [Use(spawn.replace("spawn", "wait"),
                {"targets": [found[1]]} if found else {"timeout_ms": 20_000})]


SPAWNS: dict[str, Union[dict, str]] = {
    "Agent": {"description": "an errand", "prompt": SUBTASK, "run_in_background": False,
              "subagent_type": "general-purpose"},
    "task": {"description": "an errand", "prompt": SUBTASK, "subagent_type": "general"},
    "collaboration.spawn_agent": {"task_name": "errand", "message": SUBTASK, "fork_turns": "none"},
    "multi_agent_v1.spawn_agent": {"message": SUBTASK},
    "functions.exec": f'''
        const agent = await tools.multi_agent_v1__spawn_agent({{message: {json.dumps(SUBTASK)}}});
        text(await tools.multi_agent_v1__wait_agent({{targets: [agent.agent_id]}}));'''}


SCENARIOS: dict[str, Callable[[Heard], Answer]] = {
    "two tools": two_tools, "web search": web_search, "compaction": compaction,
    "subagent": subagent}


class Model(MockProvider):
    """A mock provider whose models act out one scenario."""

    def __init__(self, scenario: str) -> None:
        super().__init__()
        self.act = SCENARIOS[scenario]
        self.asked: list[Heard] = []                # the calls that were answered, as heard
        self.lacks_what_it_needs = False            # the client does not offer it
        self._last_prompt: dict[str, int] = {}      # model -> tokens of its last prompt, cached

    @property
    def main_model(self) -> Optional[str]:
        """The model that the agent itself was run on, not that of a title or a subagent."""
        return next((asked.fields["model"] for asked in self.asked
                     if TASK in asked.words and (asked.tools or asked.hosts_search)), None)

    def answer(self, api: str, request: SeenRequest, fields: dict) -> Reply:
        if api not in WRITERS:
            return super().answer(api, request, fields)
        asked = heard(api, fields)
        parts = self._parts(asked)
        if isinstance(parts, Reply):
            return parts
        self.asked.append(asked)
        return WRITERS[api](asked, parts, self._usage(asked, request, parts))

    def _parts(self, asked: Heard) -> Union[list, Reply]:
        if ASKS_FOR_SUMMARY.search(asked.last):
            return [Say(f"<summary>{SUMMARY}</summary>")]
        if SUBTASK in asked.words and TASK not in asked.words:
            return [Say("The errand is run.")]
        if not asked.tools and not asked.hosts_search:          # a title, a topic
            return [Say("A drill in a cave")]
        parts = self.act(asked)
        self.lacks_what_it_needs |= parts is None
        return [Say("It cannot be done here.")] if parts is None else parts

    def _usage(self, asked: Heard, request: SeenRequest, parts: list) -> dict:
        """Counts in Anthropic's disjoint shape: what was cached before is read, a part written."""
        model, prompt = asked.fields["model"], -(-len(request.body) // 4)
        caches = asked.api != "messages" or b'"cache_control"' in request.body
        read = min(self._last_prompt.get(model, 0), prompt // 2) if caches else 0
        written = prompt // 4 if caches and WRITES_COST.match(model) else 0
        self._last_prompt[model] = prompt
        searches = sum(isinstance(part, Search) for part in parts)
        made = sum(len(json.dumps(part)) // 4 + 1 for part in parts)
        again = searches * (prompt + SEARCH_RESULT_TOKENS)      # read once more with the results
        return {"plain": prompt - read - written + again, "read": read, "written": written,
                "made": made, "searches": searches, "first": prompt - read - written}


# Writers of the three APIs, whole or streamed, in the vendors' order of events.

def _messages(asked: Heard, parts: list, counts: dict) -> Reply:
    usage = {"input_tokens": counts["plain"], "cache_creation_input_tokens": counts["written"],
             "cache_read_input_tokens": counts["read"],
             "cache_creation": {"ephemeral_5m_input_tokens": counts["written"],
                                "ephemeral_1h_input_tokens": 0},
             "output_tokens": counts["made"], "service_tier": "standard",
             "inference_geo": "global"}
    if counts["searches"]:
        usage["server_tool_use"] = {"web_search_requests": counts["searches"],
                                    "web_fetch_requests": 0}
    number = len(asked.results)
    blocks = [block for place, part in enumerate(parts)
              for block in _blocks(part, f"{number}_{place}")]
    stop = "tool_use" if any(block["type"] == "tool_use" for block in blocks) else "end_turn"
    whole = {"model": asked.fields["model"], "id": f"msg_{number}", "type": "message",
             "role": "assistant", "content": blocks, "stop_reason": stop, "stop_sequence": None,
             "stop_details": None, "usage": usage}
    bills = (asked.fields["model"], usage)
    if not asked.is_streamed:
        return whole_reply(whole, bills, ANTHROPIC_HEADERS)

    def event(kind: str, **members: object) -> bytes:
        return sse({"type": kind, **members}, kind)

    first = {**usage, "input_tokens": counts["first"], "output_tokens": 1}
    first.pop("server_tool_use", None)
    events = [event("message_start", message={**whole, "content": [], "stop_reason": None,
                                              "usage": first}), event("ping")]
    for index, block in enumerate(blocks):
        start, delta = _block_pieces(block)
        events.append(event("content_block_start", index=index, content_block=start))
        if delta is not None:
            events.append(event("content_block_delta", index=index, delta=delta))
        events.append(event("content_block_stop", index=index))
    final = {name: count for name, count in usage.items()
             if name.endswith("_tokens") or name == "server_tool_use"}
    events += [event("message_delta", delta={"stop_reason": stop, "stop_sequence": None,
                                             "stop_details": None}, usage=final),
               event("message_stop")]
    return streamed_reply(events, (), bills, ANTHROPIC_HEADERS)


def _blocks(part: Part, name: str) -> list[dict]:
    if isinstance(part, Say):
        return [{"type": "text", "text": part.text}]
    if isinstance(part, Use):
        return [{"type": "tool_use", "id": f"toolu_{name}", "name": part.name,
                 "input": part.arguments, "caller": {"type": "direct"}}]
    found = {"type": "web_search_result", "title": "Canaries", "url": "https://cave.example/",
             "encrypted_content": "EugCCioIEhgCIiQw", "page_age": None}
    return [{"type": "server_tool_use", "id": f"srvtoolu_{name}", "name": "web_search",
             "input": {"query": part.query}},
            {"type": "web_search_tool_result", "tool_use_id": f"srvtoolu_{name}",
             "content": [found]}]


def _block_pieces(block: dict) -> tuple[dict, Optional[dict]]:
    if block["type"] == "text":
        return {**block, "text": ""}, {"type": "text_delta", "text": block["text"]}
    if block["type"] in ("tool_use", "server_tool_use"):
        return {**block, "input": {}}, {"type": "input_json_delta",
                                        "partial_json": json.dumps(block["input"])}
    return block, None


def _responses(asked: Heard, parts: list, counts: dict) -> Reply:
    prompt = counts["plain"] + counts["read"] + counts["written"]
    usage = {"input_tokens": prompt, "input_tokens_details": {
        "cached_tokens": counts["read"], "cache_write_tokens": counts["written"]},
        "output_tokens": counts["made"], "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": prompt + counts["made"]}
    number, fields = len(asked.results), asked.fields
    items = [_item(part, f"{number}_{place}") for place, part in enumerate(parts)]
    whole = {"id": f"resp_{number}", "object": "response", "created_at": 1795846678,
             "status": "completed", "background": False, "error": None, "instructions": None,
             "metadata": {}, "incomplete_details": None, "model": fields["model"],
             "max_output_tokens": fields.get("max_output_tokens"), "output": items,
             "parallel_tool_calls": True, "previous_response_id": None,
             "reasoning": {"effort": None, "summary": None}, "service_tier": "default",
             "store": False, "temperature": 1.0, "text": {"format": {"type": "text"}},
             "tool_choice": "auto", "tools": [], "top_p": 1.0, "truncation": "disabled",
             "usage": usage, "user": None}
    bills = (fields["model"], {**usage, "web_searches": counts["searches"]})
    if not asked.is_streamed:
        return whole_reply(whole, bills, OPENAI_HEADERS)
    opened = {**whole, "status": "in_progress", "output": [], "usage": None}
    named = [("response.created", {"response": opened}),
             ("response.in_progress", {"response": opened})]
    for index, item in enumerate(items):
        named += [(name, {"output_index": index, **rest}) for name, rest in _item_events(item)]
    named.append(("response.completed", {"response": whole}))
    return streamed_reply([sse({"type": name, "sequence_number": i, **rest}, name)
                      for i, (name, rest) in enumerate(named)], (), bills, OPENAI_HEADERS)


def _item(part: Part, name: str) -> dict:
    if isinstance(part, Say):
        return {"id": f"msg_{name}", "type": "message", "status": "completed",
                "role": "assistant", "content": [{"type": "output_text", "text": part.text,
                                                  "annotations": [], "logprobs": []}]}
    if isinstance(part, Search):
        return {"id": f"ws_{name}", "type": "web_search_call", "status": "completed",
                "action": {"type": "search", "query": part.query}}
    if isinstance(part, Find):
        return {"id": f"ts_{name}", "type": "tool_search_call", "execution": "client",
                "call_id": f"call_{name}", "status": "completed",
                "arguments": {"query": part.query}}
    namespace, _, tool = part.name.rpartition(".")
    call = {"id": f"fc_{name}", "call_id": f"call_{name}", "name": tool, "status": "completed",
            **({"namespace": namespace} if namespace else {})}
    if isinstance(part.arguments, str):
        return {**call, "type": "custom_tool_call", "input": part.arguments}
    return {**call, "type": "function_call", "arguments": json.dumps(part.arguments)}


def _item_events(item: dict) -> list[tuple[str, dict]]:
    where = {"item_id": item["id"]}
    opened = {**item, "status": "in_progress"}
    if item["type"] == "message":
        [part] = item["content"]
        inside = {**where, "content_index": 0}
        opened["content"] = []
        between = [("content_part.added", {**inside, "part": {**part, "text": ""}}),
                   ("output_text.delta", {**inside, "delta": part["text"], "logprobs": []}),
                   ("output_text.done", {**inside, "text": part["text"], "logprobs": []}),
                   ("content_part.done", {**inside, "part": part})]
    elif item["type"] == "tool_search_call":
        between = []
    elif item["type"] == "web_search_call":
        del opened["action"]
        between = [(f"web_search_call.{state}", where)
                   for state in ("in_progress", "searching", "completed")]
    else:
        name = "arguments" if item["type"] == "function_call" else "input"
        opened[name] = ""
        kind = "function_call_arguments" if name == "arguments" else "custom_tool_call_input"
        between = [(f"{kind}.delta", {**where, "delta": item[name]}),
                   (f"{kind}.done", {**where, name: item[name]})]
    return [("response.output_item.added", {"item": opened}),
            *((f"response.{name}", rest) for name, rest in between),
            ("response.output_item.done", {"item": item})]


def _chat(asked: Heard, parts: list, counts: dict) -> Reply:
    prompt = counts["plain"] + counts["read"] + counts["written"]
    usage = {"prompt_tokens": prompt, "completion_tokens": counts["made"],
             "total_tokens": prompt + counts["made"], "prompt_tokens_details": {
                 "cached_tokens": counts["read"], "cache_write_tokens": counts["written"]}}
    number, fields = len(asked.results), asked.fields
    text = "".join(part.text for part in parts if isinstance(part, Say))
    calls = [{"id": f"call_{number}_{place}", "type": "function", "function": {
        "name": part.name, "arguments": json.dumps(part.arguments)}}
        for place, part in enumerate(parts) if isinstance(part, Use)]
    finish = "tool_calls" if calls else "stop"
    base = {"id": f"chatcmpl-{number}", "created": 1795846678, "model": fields["model"],
            "service_tier": "default", "system_fingerprint": None}
    bills = (fields["model"], usage)
    if not asked.is_streamed:
        message = {"role": "assistant", "content": text or None, "refusal": None,
                   **({"tool_calls": calls} if calls else {})}
        return whole_reply({**base, "object": "chat.completion", "usage": usage, "choices": [
            {"index": 0, "message": message, "logprobs": None, "finish_reason": finish}]},
            bills, OPENAI_HEADERS)
    deltas = [{"role": "assistant", "content": text or None},
              *({"tool_calls": [{"index": place, **call}]} for place, call in enumerate(calls))]
    chunks = [{**base, "object": "chat.completion.chunk", "choices": [
        {"index": 0, "delta": delta, "finish_reason": reason}]}
        for delta, reason in [*((delta, None) for delta in deltas), ({}, finish)]]
    if (fields.get("stream_options") or {}).get("include_usage"):
        chunks.append({**base, "object": "chat.completion.chunk", "choices": [], "usage": usage})
    return streamed_reply([*map(sse, chunks), sse("[DONE]")], (), bills, OPENAI_HEADERS)


WRITERS = {"messages": _messages, "responses": _responses, "chat": _chat}
