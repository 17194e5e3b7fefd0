"""How much of a budget an agent's session can use before its first refusal.

    python tests/bench/session.py

One session as coding agents have them: a first call of 85 KB (system prompt and tools), then calls
that each add what the model wrote (200 to 1,500 tokens) and a tool's result of 1 to 8 KB; the
provider caches as the vendors do, and one call in twenty breaks off and is made again. The mock
counts tokens by a rule of its own, text of the standard library at 3.3 bytes a token for Claude
and 4 for GPT. It prints the share of the budget that was spent, by the mock's own bill too.
"""
from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import http.client
import logging
import subprocess

from support import (ANTHROPIC_HEADERS, OPENAI_HEADERS, Cut, MockProvider, Reply, call, program, sse,
                     start_proxy)

TEXT = "".join(map(inspect.getsource, (argparse, subprocess, http.client, logging)))
MODELS = ("claude-opus-5-5", "claude-sonnet-5-5", "claude-haiku-5-5", "gpt-6.1-sol")
BUDGETS = (("0.50",), ("1",), ("2",), ("5",), ("2", "--stop-at", "1"))
HICCUPS = 0.05
MOST_CALLS = 3000


def text(rng: Random, size: int) -> str:
    start = rng.randrange(len(TEXT) - 100_000)
    return (TEXT[start:] * (1 + size // 100_000))[:size]


class Provider:
    """Counts, caches, bills and now and then breaks off."""

    def __init__(self, model: str, prices) -> None:
        self.rng, self.model, self.prices = Random(model), model, prices
        self.is_claude = model.startswith("claude")
        self.cached, self.billed, self.calls, self.output = 0, 0, 0, 0

    def tokens(self, fields: dict) -> int:
        parts = [fields.get(name) for name in ("system", "instructions", "tools", "messages",
                                               "input")]
        return int(sum(len(json.dumps(part)) for part in parts if part)
                   / (3.3 if self.is_claude else 4))

    def __call__(self, request) -> Reply:
        fields = request.json
        asked = self.tokens(fields)
        self.output = min(self.rng.randrange(200, 1500),
                          fields.get("max_tokens") or fields.get("max_output_tokens"))
        read = min(self.cached, asked)
        is_cut = self.rng.random() < HICCUPS
        made = self.rng.randrange(self.output) if is_cut else self.output
        usage = {"input_tokens": 0, "cache_read_input_tokens": read,
                 "cache_creation_input_tokens": asked - read, "output_tokens": made} \
            if self.is_claude else {
                "input_tokens": asked, "input_tokens_details": {"cached_tokens": read},
                "output_tokens": made, "total_tokens": asked + made}
        api = "messages" if self.is_claude else "responses"
        self.billed += self.prices.cost(self.model, usage, api=api,
                                        provider="anthropic" if self.is_claude else "openai")
        self.cached, self.calls = asked, self.calls + 1
        events = (self._message if self.is_claude else self._response)(usage)
        return Reply(headers=(("content-type", "text/event-stream"), *(
            ANTHROPIC_HEADERS if self.is_claude else OPENAI_HEADERS)), framing="chunked",
            steps=(*events[:2], Cut()) if is_cut else events)

    def _message(self, usage: dict) -> tuple:
        start = {"id": "msg_1", "type": "message", "role": "assistant", "model": self.model,
                 "content": [], "usage": {**usage, "output_tokens": 1}}
        return (sse({"type": "message_start", "message": start}, "message_start"),
                sse({"type": "content_block_delta", "index": 0, "delta": {
                    "type": "text_delta", "text": "x" * self.output}}, "content_block_delta"),
                sse({"type": "message_delta", "delta": {"stop_reason": "tool_use"},
                     "usage": usage}, "message_delta"),
                sse({"type": "message_stop"}, "message_stop"))

    def _response(self, usage: dict) -> tuple:
        whole = {"id": "resp_1", "object": "response", "status": "completed", "output": [],
                 "model": self.model, "usage": usage}
        return (sse({"type": "response.created", "response": {**whole, "usage": None}}),
                sse({"type": "response.output_text.delta", "delta": "x" * self.output}),
                sse({"type": "response.completed", "response": whole}))


class Agent:
    """What a coding agent sends, call by call."""

    def __init__(self, model: str) -> None:
        self.rng, self.model = Random(model + "agent"), model
        self.system = text(self.rng, 25_000)
        self.tools = [{"name": f"tool_{n}", "description": text(self.rng, 2_800),
                       "input_schema": {"type": "object"}} for n in range(20)]
        self.turns = [{"role": "user", "content": text(self.rng, 2_000)}]

    def fields(self) -> dict:
        if self.model.startswith("claude"):
            marked = {"type": "text", "cache_control": {"type": "ephemeral"}}
            last = self.turns[-1]
            return {"model": self.model, "max_tokens": 128_000, "stream": True,
                    "system": [{**marked, "text": self.system}], "tools": self.tools,
                    "messages": [*self.turns[:-1], {**last, "content": [
                        {**marked, "text": last["content"]}]}]}
        return {"model": self.model, "stream": True, "instructions": self.system,
                "tools": [{"type": "function", "name": tool["name"], "parameters": {},
                           "description": tool["description"]} for tool in self.tools],
                "input": self.turns}

    def hear(self, output_tokens: int) -> None:
        self.turns = [*self.turns, {"role": "assistant", "content": text(
            self.rng, output_tokens * 3)}, {"role": "user", "content": text(
                self.rng, self.rng.randrange(1_000, 8_000))}]


def session(model: str, *budget: str) -> tuple[float, float, int]:
    """(share spent, share billed, calls) at the first refusal."""
    limit = float(budget[-1]) * 1e6
    with MockProvider() as mock:
        proxy = start_proxy(mock, "--budget", *budget, "--quiet")
        try:
            provider = mock.always = Provider(model, proxy.router.prices)
            agent, path = Agent(model), "/v1/messages" if "claude" in model else "/v1/responses"
            for _ in range(MOST_CALLS):
                answer = call(proxy.port, "POST", path, agent.fields())
                if answer.status == 402:
                    break
                assert answer.status == 200, answer.body
                if b"message_stop" in answer.body or b"response.completed" in answer.body:
                    agent.hear(provider.output)
            spent = proxy.router.controller.budget()
            assert provider.billed <= spent.spent <= spent.limit, (provider.billed, spent)
            return spent.spent / limit, provider.billed / limit, provider.calls
        finally:
            proxy.stop()


def main() -> None:
    program().log.setLevel(logging.CRITICAL)
    print("| budget | " + " | ".join(MODELS) + " |\n|---" * 1 + "|---" * len(MODELS) + "|")
    for budget in BUDGETS:
        shares = [session(model, *budget) for model in MODELS]
        print(f"| ${' '.join(budget)} | " + " | ".join(
            f"{spent:.0%} ({billed:.0%} billed, {calls} calls)" for spent, billed, calls in shares)
            + " |", flush=True)


if __name__ == "__main__":
    main()
