"""The model's part in a conversation with a real agent, played by a mock that bills as vendors do.

An agent program (Claude Code, Codex, opencode, a script on an SDK) asks; `Model` reads what it is
offered and what it has done so far, and answers with text, calls of the agent's own tools, or a
search that it runs itself. It knows no line of the product: usage and bills are its own.
"""
from __future__ import annotations

import json
import re
from typing import Callable, NamedTuple, Optional, Union

from support import WRITES_COST, MockProvider, Reply, SeenRequest, anthropic_error, openai_error
from vendor_answers import Answer, Find, Say, Search, Think, Use, answer_of, broken_seal
from vendor_rules import GPT_REASONS

TASK = "cage-drill"                     # in the prompt that a test gives to an agent
SUBTASK = "errand for the other agent"  # in the prompt that the model gives to a subagent
DONE = "All of it is done."
SUMMARY = "What happened so far: the drill began."
ASKS_FOR_SUMMARY = re.compile(r"Respond with TEXT ONLY|CONTEXT CHECKPOINT COMPACTION"
                              r"|[Cc]reate a (new )?(anchored )?summary|context-summary")
SEARCH_RESULT_TOKENS = 3_000            # what one search adds to what is read again
THOUGHT = "What is there to run?"       # before its first calls
TWO_COMMANDS = ("echo first of two", "echo second of two")


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
    tools.update({name.replace("__", "."): tool for name, tool in tools.items() if "__" in name})
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

Line = Union[list, Reply, None]


def shell(asked: Heard, command: str) -> Optional[Use]:
    """A call of the client's shell, in its own terms."""
    if asked.tool("functions.exec"):
        return Use("functions.exec", f"text(await tools.exec_command({{cmd: {json.dumps(command)}"
                                     "}))")
    if asked.tool("exec_command"):
        return Use("exec_command", {"cmd": command})
    name = asked.tool("Bash", "bash", "run")
    return name and Use(name, {"command": command, "description": "say it"})


def two_tools(asked: Heard) -> Line:
    """Two calls in one turn; one after the other where the client takes no parallel calls."""
    calls = [shell(asked, command) for command in TWO_COMMANDS]
    if None in calls:
        return None
    if asked.fields.get("parallel_tool_calls") is False:
        calls = calls[len(asked.results):][:1]
    return [Say(DONE)] if len(asked.results) >= 2 else [Say("I run them."), *calls]


def web_search(asked: Heard) -> Line:
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


def compaction(asked: Heard) -> Line:
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


def subagent(asked: Heard) -> Line:
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


SCENARIOS: dict[str, Callable[[Heard], Line]] = {
    "two tools": two_tools, "web search": web_search, "compaction": compaction,
    "subagent": subagent}


def thinks(asked: Heard) -> bool:
    """Whether the model brings thoughts: Claude if asked to, OpenAI's if they reason, and those of
    other servers' that chat."""
    if asked.api == "messages":
        return (asked.fields.get("thinking") or {}).get("type") in ("enabled", "adaptive")
    reasons = bool(GPT_REASONS.match(asked.fields["model"]))
    return reasons == (asked.api == "responses")


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
        if api not in ("messages", "responses", "chat"):
            return super().answer(api, request, fields)
        asked = heard(api, fields)
        broken = broken_seal(api, fields)
        if broken is not None:
            return (anthropic_error if api == "messages" else openai_error)(400, broken)
        parts = self._parts(asked)
        if isinstance(parts, Reply):
            return parts
        if thinks(asked) and any(isinstance(part, Use) for part in parts):
            parts = [Think(THOUGHT), *parts]
        self.asked.append(asked)
        return answer_of(api, fields, Answer(
            parts, self._usage(asked, request, parts), str(len(asked.results))))

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
