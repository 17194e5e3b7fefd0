"""Servers as their vendors run them: each refuses what it is known to refuse, streams as it streams
and wants back what it wants back. They know no line of the product.

From the vendors' references and SDKs and from public reports, read 28 November 2026; the source
stands beside each rule. None was called: a rule is as good as its source."""
from __future__ import annotations

import json
import re
from typing import Callable, Iterator, NamedTuple, Optional, Sequence

from support import MockProvider, Reply, SeenRequest, anthropic_error, sse
from vendor_answers import block_pieces

KEY = "host-canary-0123456789"
USAGE = {"prompt_tokens": 1000, "completion_tokens": 50, "total_tokens": 1050}
RATES = {"input_cost_per_token": 2e-6, "output_cost_per_token": 10e-6}
COST = USAGE["prompt_tokens"] * 2 + USAGE["completion_tokens"] * 10       # microdollars a turn
REASONING, SIGNATURE = "I think so.", "c2lnbmF0dXJl"
Rule = Callable[[dict], Optional[str]]               # the body -> why it is refused


class Host(NamedTuple):
    """One server. `events` are what it adds to a chunk or does otherwise than OpenAI."""
    path: str                                         # of a chat completion, behind the host
    rules: Sequence[Rule] = ()
    needs: Optional[Rule] = None                      # of a history with an answer of its own
    call_id: Callable[[int], str] = lambda number: f"call_{number:024d}"
    reasoning: str = ""                               # the field of its reasoning
    shows_details: bool = False                       # OpenRouter's reasoning_details
    signs_calls: bool = False                         # Gemini's extra_content
    usage: str = "asked"                              # asked, always, every, x_groq, choice
    comment: bytes = b""                              # what it sends while it thinks
    done: bool = True                                 # it ends with [DONE]
    call_at_once: bool = False                        # a call comes whole in one delta
    error: Callable[[str], object] = lambda words: {"error": {"message": words, "code": 400}}


def knows_not(*names: str) -> Rule:
    """Refuses fields that it does not know."""
    return lambda body: next((f"Extra inputs are not permitted: {name}" for name in names
                              if name in body), None)


def messages_know_not(*names: str) -> Rule:
    return lambda body: next((f"property '{name}' is unsupported in messages"
                              for message in body["messages"] for name in names
                              if name in message), None)


def no_user_behind_a_tool(body: dict) -> Optional[str]:
    roles = [message["role"] for message in body["messages"]]
    return "Unexpected role 'user' after role 'tool' (3230)" \
        if ("tool", "user") in zip(roles, roles[1:]) else None


def one_system_message_first(body: dict) -> Optional[str]:
    roles = [message["role"] for message in body["messages"]]
    return "invalid params, invalid chat setting (2013)" if "system" in roles[1:] else None


def ids_like(pattern: str) -> Rule:
    def rule(body: dict) -> Optional[str]:
        ids = [call["id"] for message in body["messages"]
               for call in message.get("tool_calls") or ()]
        ids += [message["tool_call_id"] for message in body["messages"]
                if message["role"] == "tool"]
        return next((f"Tool call id was {one} but must match {pattern}" for one in ids
                     if not re.fullmatch(pattern, one)), None)
    return rule


def results_match_calls(body: dict) -> Optional[str]:
    """What all of them refuse: a result without its call, a call without its result."""
    open_ids: list[str] = []
    for message in body["messages"]:
        if message["role"] == "tool":
            if message["tool_call_id"] not in open_ids:
                return "a tool message must follow the call that it answers"
            open_ids.remove(message["tool_call_id"])
        elif open_ids:
            return f"no result for the calls {open_ids}"
        open_ids += [call["id"] for call in message.get("tool_calls") or ()]
    return None


def text_only(body: dict) -> Optional[str]:
    return next(("content must be a string" for message in body["messages"]
                 if isinstance(message.get("content"), list)), None)


def no_content_needs_calls(body: dict) -> Optional[str]:
    return next(("invalid message content type: <nil>" for message in body["messages"]
                 if message.get("content") is None and not message.get("tool_calls")), None)


def wants_reasoning(field: str) -> Rule:
    return lambda body: next((
        f"The {field} in the thinking mode must be passed back to the API."
        for message in body["messages"] if message["role"] == "assistant"
        and not message.get(field)), None)


def wants_signatures(body: dict) -> Optional[str]:
    for message in body["messages"]:
        for call in (message.get("tool_calls") or ())[:1]:
            google = (call.get("extra_content") or {}).get("google") or {}
            if google.get("thought_signature") != SIGNATURE:
                return "Function call is missing a thought_signature in functionCall parts"
    return None


def wants_details(body: dict) -> Optional[str]:
    return next(("reasoning_details must be passed back unchanged"
                 for message in body["messages"] if message["role"] == "assistant"
                 and message.get("reasoning_details") != details()), None)


def details() -> list[dict]:
    return [{"type": "reasoning.encrypted", "data": SIGNATURE, "format": "google-gemini-v1",
             "index": 0}]


def letters_9(number: int) -> str:
    return f"{number:09d}".translate(str.maketrans("0123456789", "aBcDeFgHiJ"))


NO_CAP_2 = knows_not("max_completion_tokens")
HOSTS = {
    # openai SDK's azure client; learn.microsoft.com, API version lifecycle
    "azure": Host("/openai/v1/chat/completions"),
    # cerebras-cloud-sdk 1.91.0; hexdocs req_llm 1.10
    "cerebras": Host("/v1/chat/completions", [knows_not("frequency_penalty", "logit_bias"),
                                              messages_know_not("reasoning_content")],
                     reasoning="reasoning"),
    # litellm 1.110.2 llms/dashscope; recorded stream of vercel/ai, 2026-02-10
    "dashscope": Host("/compatible-mode/v1/chat/completions", [NO_CAP_2]),
    # litellm llms/deepseek; api-docs.deepseek.com rate_limit; recorded stream 2025-12-02
    "deepseek": Host("/v1/chat/completions", [], wants_reasoning("reasoning_content"),
                     lambda number: f"call_00_{number:024d}", "reasoning_content",
                     comment=b": keep-alive\n\n"),
    # nextlevelbuilder/goclaw#660, 2026-04-03; nullclaw#231
    "fireworks_ai": Host("/inference/v1/chat/completions", [
        knows_not("store"), lambda body: "must have stream=true" if body.get("max_tokens", 0) > 4096
        and not body.get("stream") else None]),
    # googleapis/js-genai#1275; ogx-ai/ogx#5122 (usage in every chunk); 0xsline/OpenChatCut#6
    "gemini": Host("/v1beta/openai/chat/completions", [], wants_signatures, signs_calls=True,
                   usage="every", error=lambda words: [{"error": {
                       "code": 400, "message": words, "status": "INVALID_ARGUMENT"}}]),
    "github": Host("/inference/chat/completions"),
    # groq 1.7.0; SimonSchubert/Kai#265; recorded stream 2026-02-11
    "groq": Host("/openai/v1/chat/completions", [
        knows_not("logprobs", "logit_bias", "top_logprobs"),
        messages_know_not("reasoning_content", "name")], None,
        lambda number: letters_9(number).lower(), "reasoning", usage="x_groq", call_at_once=True),
    "huggingface": Host("/v1/chat/completions"),
    # can1357/oh-my-pi#954 (live, 2026-05-07); MiniMax-AI/MiniMax-M2.5#2
    "minimax": Host("/v1/chat/completions", [one_system_message_first]),
    # mistralai 3.7.0; mistral-common#169; openai-agents-python#442; crush#1590; opencode#1680
    "mistral": Host("/v1/chat/completions", [
        NO_CAP_2, knows_not("stream_options", "store"), messages_know_not("reasoning_content"),
        no_user_behind_a_tool, ids_like("[a-zA-Z0-9]{9}")], None, letters_9, usage="always",
        call_at_once=True, error=lambda words: {"object": "error", "message": {"detail": [
            {"type": "extra_forbidden", "loc": ["body"], "msg": words}]}}),
    # litellm llms/moonshot; AstrBot#6614; claude-code-router#1808; continue#11600
    "moonshot": Host("/v1/chat/completions", [NO_CAP_2], wants_reasoning("reasoning_content"),
                     lambda number: f"functions.f:{number}", "reasoning_content", usage="choice"),
    # NVIDIA/garak#748
    "nvidia_nim": Host("/v1/chat/completions", [NO_CAP_2], error=lambda words: {
        "type": "about:blank", "title": "Unprocessable", "status": 422, "detail": words}),
    # openrouter.ai/docs streaming, reasoning; microsoft/agent-framework#2947
    "openrouter": Host("/api/v1/chat/completions", [], wants_details, shows_details=True,
                       reasoning="reasoning", comment=b": OPENROUTER PROCESSING\n\n"),
    # perplexityai 0.46.1; recorded stream 2026-02-11
    "perplexity": Host("/chat/completions", [NO_CAP_2], usage="every"),
    # litellm llms/sambanova
    "sambanova": Host("/v1/chat/completions", [text_only]),
    "together_ai": Host("/v1/chat/completions", [NO_CAP_2]),
    # litellm llms/volcengine
    "volcengine": Host("/api/v3/chat/completions", [NO_CAP_2]),
    # recorded stream 2026-02-11; NativeTavern#83, 2026-09-15
    "xai": Host("/v1/chat/completions", [knows_not("presence_penalty", "frequency_penalty",
                                                   "stop")],
                None, lambda number: f"call_{number:08d}", "reasoning_content",
                call_at_once=True),
    # litellm llms/zai; pydantic-ai providers/zai
    "zai": Host("/api/paas/v4/chat/completions", [NO_CAP_2], wants_reasoning("reasoning_content"),
                reasoning="reasoning_content"),
    # ollama@fb30760: unknown fields are ignored; max_completion_tokens is one
    "ollama": Host("/v1/chat/completions", [no_content_needs_calls], None,
                   lambda number: f"call_{number:08d}", "reasoning", call_at_once=True),
    # vllm 0.33.0
    "vllm": Host("/v1/chat/completions", [], None, lambda number: f"chatcmpl-tool-{number:032d}",
                 "reasoning_content", error=lambda words: {"object": "error", "message": words,
                                                           "type": "BadRequestError",
                                                           "code": 400}),
    # sglang 0.5.23
    "sglang": Host("/v1/chat/completions", [], None, lambda number: f"call_{number:024x}",
                   "reasoning_content"),
    # llama.cpp tools/server, sse_ping_interval
    "llamacpp": Host("/v1/chat/completions", reasoning="reasoning_content", comment=b":\n\n"),
    "lm_studio": Host("/v1/chat/completions", error=lambda words: {"error": words}),
}


def configured(mock: MockProvider, name: str, **row: object) -> dict:
    """The configuration of a proxy that has the mock as one known provider, at another host."""
    return {"providers": {name: {"base_url": mock.url, "key_env": "HOST_KEY", "free": False,
                                 "responses": False, **row}},
            "prices": {f"{name}/m": {**RATES, "litellm_provider": name}}}


def called(names: Sequence[str], turn: int) -> tuple[str, dict]:
    """What is called of what a client offers: its shell, to say something, or else the first."""
    if "Bash" in names:
        return "Bash", {"command": f"echo result {turn}", "description": "say it"}
    return names[0], {"n": turn}


def host_reply(host: Host, request: SeenRequest) -> Reply:
    """What a host answers: a call of a tool until two results are there, then text."""
    body = request.json
    refused = refusal_of(host, request, body)
    if refused:
        return Reply(status=400, steps=(json.dumps(host.error(refused)).encode(),))
    turn = sum(message["role"] == "tool" for message in body["messages"])
    message = {"role": "assistant", "content": None if turn < 2 else "All done."}
    if host.reasoning:
        message[host.reasoning] = REASONING
    if host.shows_details:
        message["reasoning_details"] = details()
    if turn < 2:
        name, arguments = called([tool["function"]["name"] for tool in body["tools"]], turn)
        call = {"id": host.call_id(turn + 1), "type": "function",
                "function": {"name": name, "arguments": json.dumps(arguments)}}
        if host.signs_calls:
            call["extra_content"] = {"google": {"thought_signature": SIGNATURE}}
        message["tool_calls"] = [call]
    finish = "tool_calls" if turn < 2 else "stop"
    if body.get("stream"):
        events = b"".join([*stream_of(host, message, finish, bool(
            (body.get("stream_options") or {}).get("include_usage")))])
        return Reply(headers=(("content-type", "text/event-stream"),), framing="chunked",
                     steps=(host.comment + events,) if host.comment else (events,))
    return Reply(steps=(json.dumps({
        "id": "c1", "object": "chat.completion", "created": 1, "model": body["model"],
        "choices": [{"index": 0, "message": message, "finish_reason": finish}],
        "usage": USAGE}).encode(),))


def refusal_of(host: Host, request: SeenRequest, body: dict) -> Optional[str]:
    if request.target != host.path:
        return f"no route {request.target}"
    if request.header("authorization") != f"Bearer {KEY}":
        return "no key"
    rules = [*host.rules, results_match_calls]
    if host.needs and any(message["role"] == "assistant" for message in body["messages"]):
        rules.append(host.needs)
    return next(filter(None, (rule(body) for rule in rules)), None)


def stream_of(host: Host, message: dict, finish: str, asks_usage: bool) -> Iterator[bytes]:
    usage = {"usage": USAGE} if host.usage == "every" else {}

    def chunk(delta: Optional[dict], finish: Optional[str] = None, choice: Optional[dict] = None,
              **more: object) -> bytes:
        choices = [] if delta is None else [
            {"index": 0, "delta": delta, "finish_reason": finish, **(choice or {})}]
        return b"data: " + json.dumps({
            "id": "c1", "object": "chat.completion.chunk", "created": 1, "model": "m",
            "choices": choices, **usage, **more}).encode() + b"\n\n"

    yield chunk({"role": "assistant", "content": ""})
    shown = {name: message[name] for name in (host.reasoning, "reasoning_details")
             if name and name in message}
    if shown:
        yield chunk(shown)
    if message["content"]:
        yield chunk({"content": message["content"][:4]})
        yield chunk({"content": message["content"][4:]})
    for call in message.get("tool_calls", ()):
        if host.call_at_once:
            yield chunk({"tool_calls": [{"index": 0, **call}]})
        else:
            arguments = call["function"]["arguments"]
            begun = {**call, "function": {**call["function"], "arguments": ""}}
            yield chunk({"tool_calls": [{"index": 0, **begun}]})
            for part in (arguments[:3], arguments[3:]):
                yield chunk({"tool_calls": [{"index": 0, "function": {"arguments": part}}]})
    ends = {"x_groq": {"x_groq": {"id": "r", "usage": USAGE}}, "always": {"usage": USAGE},
            "choice": {"choice": {"usage": USAGE}}}.get(host.usage, {})
    yield chunk({}, finish, **ends)
    if host.usage == "asked" and asks_usage:
        yield chunk(None, usage=USAGE)
    if host.done:
        yield b"data: [DONE]\n\n"


class MessagesHost(NamedTuple):
    """An endpoint in Anthropic's format, which reads its key in one place alone."""
    path: str                                         # before /v1/messages
    key_header: str
    counts: bool = True                               # it has count_tokens


BEARER, X_API_KEY = "authorization", "x-api-key"
MESSAGES_HOSTS = {
    # developersdigest.tech, api-compatibility (ANTHROPIC_AUTH_TOKEN), November 2026
    "zai": MessagesHost("/api/anthropic", BEARER, counts=False),
    "openrouter": MessagesHost("/api", BEARER, counts=False),
    # NousResearch/hermes-agent#4028, anomalyco/models.dev#1398: 401 without Bearer
    "minimax": MessagesHost("/anthropic", BEARER, counts=False),
    # novita.ai/docs llm-anthropic-compatibility, 2026-08-10
    "novita": MessagesHost("/anthropic", BEARER, counts=False),
    # what pi-ai 1.6.0 and alibabacloud.com's guide of 2026-03-15 send
    "deepseek": MessagesHost("/anthropic", X_API_KEY, counts=False),
    "fireworks_ai": MessagesHost("/inference", X_API_KEY, counts=False),
    "moonshot": MessagesHost("/anthropic", X_API_KEY),
    "dashscope": MessagesHost("/apps/anthropic", X_API_KEY),
    # sources of vllm 0.33.0, sglang 0.5.23, llama.cpp
    "vllm": MessagesHost("", BEARER), "sglang": MessagesHost("", BEARER),
    "llamacpp": MessagesHost("", X_API_KEY)}
MESSAGES_USAGE = {"input_tokens": 1000, "output_tokens": 50}
THINKING = {"type": "thinking", "thinking": REASONING, "signature": SIGNATURE}


def messages_reply(host: MessagesHost, request: SeenRequest) -> Reply:
    """What it answers: thoughts, and a call of a tool until two results are there, then text."""
    body = request.json
    refused = messages_refusal_of(host, request, body)
    if refused:
        return anthropic_error(401 if refused == "no key" else 400, refused)
    if request.path.endswith("/count_tokens"):
        return Reply(steps=(b'{"input_tokens": 1000}',))
    turn = sum(map(len, results_in(body)))
    blocks: list[dict] = [THINKING] if "thinking" in body else []
    if turn < 2:
        name, arguments = called([tool["name"] for tool in body["tools"]], turn)
        blocks.append({"type": "tool_use", "id": f"toolu_{turn}", "name": name, "input": arguments})
    else:
        blocks.append({"type": "text", "text": "All done."})
    message = {"id": "msg_1", "type": "message", "role": "assistant", "model": body["model"],
               "content": blocks, "stop_reason": "tool_use" if turn < 2 else "end_turn",
               "stop_sequence": None, "usage": MESSAGES_USAGE}
    if not body.get("stream"):
        return Reply(steps=(json.dumps(message).encode(),))
    return Reply(headers=(("content-type", "text/event-stream"),), framing="chunked",
                 steps=(b"".join(message_events(message)),))


def results_in(body: dict) -> list[list[dict]]:
    return [[block for block in message["content"] if block["type"] == "tool_result"]
            for message in body["messages"] if isinstance(message["content"], list)]


def messages_refusal_of(host: MessagesHost, request: SeenRequest, body: dict) -> Optional[str]:
    routes = ("/v1/messages", *(("/v1/messages/count_tokens",) if host.counts else ()))
    if request.path not in [host.path + route for route in routes]:
        return f"no route {request.path}"
    if request.header(host.key_header) != ("Bearer " * (host.key_header == BEARER)) + KEY:
        return "no key"
    if request.header("anthropic-version") is None:
        return "anthropic-version is required"
    said = [message["content"] for message in body["messages"] if message["role"] == "assistant"]
    if "thinking" in body and any(content[:1] != [THINKING] for content in said):
        return "thinking blocks cannot be modified"
    return None


def message_events(message: dict) -> Iterator[bytes]:
    def event(kind: str, **fields: object) -> bytes:
        return sse({"type": kind, **fields}, kind)

    begun = {"content": [], "stop_reason": None, "usage": {**MESSAGES_USAGE, "output_tokens": 1}}
    yield event("message_start", message={**message, **begun})
    for index, block in enumerate(message["content"]):
        start, deltas = block_pieces(block)
        yield event("content_block_start", index=index, content_block=start)
        for delta in deltas:
            yield event("content_block_delta", index=index, delta=delta)
        yield event("content_block_stop", index=index)
    yield event("message_delta", delta={"stop_reason": message["stop_reason"],
                                        "stop_sequence": None}, usage=MESSAGES_USAGE)
    yield event("message_stop")
