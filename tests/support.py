"""What the tests share: a mock provider, a raw HTTP client, and ways to start a proxy.

The mock speaks both dialects on one port, is as strict as the vendors (it refuses unknown fields,
wrong keys and wrong types), counts what it would bill, and misbehaves on request.
"""
from __future__ import annotations

import atexit
import contextlib
import functools
import http.client
import inspect
import json
import os
import py_compile
import queue
import re
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Callable, Iterable, Iterator, Optional, Sequence, Union

import forked
import pytest
from forked import Forked
from vendor_rules import (RESPONSES_ONLY, refused_by_anthropic, refused_by_openai,
                          refused_by_responses)

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"             # recorded exchanges and figures, where they are
PATIENCE_S = 10                             # how long a test waits before it says what is missing

OPENAI_KEY = "sk-canary-openai-0123456789abcdef"
ANTHROPIC_KEY = "sk-ant-canary-0123456789abcdef"
TOKEN = "ic_canary_token_0123456789"
ADMIN_TOKEN = "ic_canary_admin_0123456789"
CANARIES = (OPENAI_KEY, ANTHROPIC_KEY, TOKEN, ADMIN_TOKEN)

# USD per token, written out independently of pricing.json: input, cached, write 5m, write 1h, out.
RATES = {
    "gpt-4o-mini": ("0.00000015", "0.000000075", "0.00000015", "0.00000015", "0.0000006"),
    "gpt-4o": ("0.0000025", "0.00000125", "0.0000025", "0.0000025", "0.00001"),
    "gpt-5.5": ("0.000005", "0.0000005", "0.000005", "0.000005", "0.00003"),
    "gpt-3.5-turbo-instruct": ("0.0000015", "0.0000015", "0.0000015", "0.0000015", "0.000002"),
    "text-embedding-3-small": ("0.00000002", "0.00000002", "0.00000002", "0.00000002", "0"),
    "qwen3": ("0.00000015", "0.000000075", "0.00000015", "0.00000015", "0.0000006"),  # a test's own
    "claude-haiku-4-5": ("0.000001", "0.0000001", "0.00000125", "0.000002", "0.000005"),
    "claude-sonnet-4-5": ("0.000003", "0.0000003", "0.00000375", "0.000006", "0.000015"),
}

# USD per million tokens: input, cached, output. A cache write costs 1.25 times the input, for an
# hour twice, at Anthropic and from gpt-5.6 on; before that, the input. From the vendors' pages of
# November 2026; gpt-6.2 from OpenAI's notes of 2026-11-17.
PER_MILLION = {
    "claude-fable-5": ("10", "1", "50"), "claude-fable-5-1": ("10", "0.25", "50"),
    "claude-fable-5-2": ("8", "0.2", "40"), "claude-mythos-5-2": ("8", "0.2", "40"),
    "claude-opus-4-8": ("5", "0.5", "25"), "claude-opus-5": ("5", "0.5", "25"),
    "claude-opus-5-5": ("4", "0.2", "20"), "claude-sonnet-4-6": ("3", "0.3", "15"),
    "claude-sonnet-5": ("2", "0.2", "10"), "claude-sonnet-5-5": ("2", "0.1", "10"),
    "claude-haiku-4-5-20251001": ("1", "0.1", "5"), "claude-haiku-5-5": ("0.1", "0.01", "0.5"),
    "gpt-5": ("1.25", "0.125", "10"), "gpt-5-mini": ("0.25", "0.025", "2"),
    "gpt-5-nano": ("0.05", "0.005", "0.4"), "gpt-5-pro": ("15", "15", "120"),
    "gpt-5.1-codex": ("1.25", "0.125", "10"), "gpt-5.1-codex-max": ("1.25", "0.125", "10"),
    "gpt-5.1-codex-mini": ("0.25", "0.025", "2"), "gpt-5.2-pro": ("21", "21", "168"),
    "gpt-5.4-pro": ("30", "30", "180"), "gpt-5.5-pro": ("30", "30", "180"),
    "gpt-5.3-codex": ("1.75", "0.175", "14"), "gpt-5.4": ("2.5", "0.25", "15"),
    "gpt-5.4-mini": ("0.75", "0.075", "4.5"), "gpt-5.4-nano": ("0.2", "0.02", "1.25"),
    "gpt-5.6": ("4", "0.4", "20"), "gpt-5.6-sol": ("4", "0.4", "20"),
    "gpt-5.6-terra": ("2", "0.2", "12"), "gpt-5.6-luna": ("0.2", "0.02", "1.2"),
    "gpt-6-astra": ("10", "1", "50"), "gpt-6-sol": ("2", "0.2", "10"),
    "gpt-6-luna": ("0.1", "0.01", "0.5"), "gpt-6.1-sol": ("2", "0.1", "10"),
    "gpt-6.1-terra": ("1", "0.05", "5"), "gpt-6.2-sol": ("2", "0.1", "10"),
    "gpt-6.2-astra": ("8", "0.4", "40"),
    "o3": ("2", "0.5", "8"), "o3-pro": ("20", "20", "80"), "o4-mini": ("1.1", "0.275", "4.4"),
}
WRITES_COST = re.compile(r"claude|gpt-5\.[6-9]|gpt-[6-9]")
SEARCH_USD = Fraction("0.01")               # for one web search, at both vendors

FREE = ("0",) * 5                           # what a model that a test made up is billed at

# Top-level fields that each endpoint knows (openai 3.57.0, anthropic 2.14.0 with its betas, which
# vendor_rules.py wants in a header; client_metadata is Codex').
KNOWN_FIELDS = {
    "chat": """audio frequency_penalty function_call functions logit_bias logprobs
        max_completion_tokens max_tokens messages metadata modalities model moderation n
        parallel_tool_calls prediction presence_penalty prompt_cache_key prompt_cache_options
        prompt_cache_retention reasoning_effort response_format safety_identifier seed
        service_tier stop store stream stream_options temperature tool_choice tools top_logprobs
        top_p user verbosity web_search_options""",
    "responses": """access_programs background background_options context_management conversation image include
        input instructions max_output_tokens max_tool_calls metadata model moderation
        parallel_tool_calls previous_response_id prompt prompt_cache_key prompt_cache_options
        prompt_cache_retention reasoning safety_identifier service_tier store stream
        stream_options temperature text tool_choice tools top_logprobs top_p truncation user
        client_metadata""",
    "completions": """best_of echo frequency_penalty logit_bias logprobs max_tokens model n
        presence_penalty prompt seed stop stream stream_options suffix temperature top_p user""",
    "embeddings": "dimensions encoding_format input model user",
    "messages": """billing_policy cache_control compaction container context_management diagnostics
        fallback_credit_token fallbacks inference_geo max_tokens mcp_servers messages metadata
        model output_config service_tier speed stop_sequences stream system temperature thinking
        thread tool_choice tools top_k top_p""",
    "count_tokens": """billing_policy cache_control compaction context_management mcp_servers
        messages model output_config speed system thinking tool_choice tools""",
}
ENDPOINTS = {
    "/v1/chat/completions": "chat", "/v1/responses": "responses",
    "/v1/completions": "completions", "/v1/embeddings": "embeddings",
    "/v1/messages": "messages", "/v1/messages/count_tokens": "count_tokens",
}
REQUIRED_FIELDS = {
    "chat": ("model", "messages"), "responses": ("model", "input"),
    "completions": ("model", "prompt"), "embeddings": ("model", "input"),
    "messages": ("model", "max_tokens", "messages"), "count_tokens": ("model", "messages"),
}
MAX_TOKENS_FIELDS = ("max_completion_tokens", "max_tokens", "max_output_tokens")


# What a reply can do, step by step.

@dataclass(frozen=True)
class Gate:
    """Wait until the test opens the gate."""
    event: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True)
class Raw:
    """Bytes written as they are, outside the framing."""
    data: bytes


class Cut:
    """Reset the connection."""


class Close:
    """End the connection in an orderly way, with the body unfinished."""


class Hang:
    """Say nothing more until the proxy hangs up."""


Step = Union[bytes, Gate, Raw, Cut, Close, Hang]


@dataclass(frozen=True)
class Reply:
    """An answer of the mock: `steps` are performed in order, each bytes step as one write.

    framing: "length" (all bytes known first), "chunked" (one chunk a step), "close" or "raw" (the
    steps are all there is, head and all).
    `bills` is what the provider charges when the answer is taken whole: (model, usage).
    `tokens_by_step[i]` is how many output tokens were made when step i was written.
    """
    status: int = 200
    headers: tuple[tuple[str, str], ...] = (("content-type", "application/json"),)
    steps: tuple[Step, ...] = ()
    framing: str = "length"
    bills: Optional[tuple[str, dict]] = None
    tokens_by_step: tuple[int, ...] = ()
    answers: bool = True                    # False: close without a byte of answer

    def with_steps(self, steps: Sequence[Step]) -> Reply:
        """The same reply in other steps; it is then billed whole or, if cut, for its input."""
        return replace(self, steps=tuple(steps), tokens_by_step=())

    @property
    def body(self) -> bytes:
        return b"".join(step for step in self.steps if isinstance(step, bytes))


@dataclass(frozen=True)
class SeenRequest:
    """A request as the mock read it."""
    method: str
    target: str
    headers: tuple[tuple[str, str], ...]    # lower-case names
    body: bytes
    connection: int                         # which TCP connection it came on, from 0

    @property
    def path(self) -> str:
        return self.target.partition("?")[0]

    @property
    def json(self) -> dict:
        return json.loads(self.body)

    def header(self, name: str) -> Optional[str]:
        values = [value for header, value in self.headers if header == name]
        assert len(values) <= 1, f"header {name} came {len(values)} times"
        return values[0] if values else None


def openai_error(status: int, message: str, kind: str = "invalid_request_error",
                 code: Optional[str] = None, headers: Sequence[tuple[str, str]] = ()) -> Reply:
    body = {"error": {"message": message, "type": kind, "param": None, "code": code}}
    return Reply(status, (("content-type", "application/json"), ("x-request-id", "req_mock"),
                          *headers), (json.dumps(body, indent=2).encode(),))


def anthropic_error(status: int, message: str, kind: str = "invalid_request_error",
                    headers: Sequence[tuple[str, str]] = ()) -> Reply:
    body = {"type": "error", "error": {"type": kind, "message": message},
            "request_id": "req_mock"}
    return Reply(status, (("content-type", "application/json"), ("request-id", "req_mock"),
                          *headers), (json.dumps(body).encode(),))


def sse(data: Union[dict, str], name: Optional[str] = None) -> bytes:
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
    return ((f"event: {name}\n" if name else "") + f"data: {text}\n\n").encode()


def rates(model: str) -> tuple[Fraction, ...]:
    """USD per token: input, cached, write 5m, write 1h, out."""
    if model not in PER_MILLION:
        return tuple(map(Fraction, RATES.get(model, FREE)))
    plain, cached, out = (Fraction(usd) / 1_000_000 for usd in PER_MILLION[model])
    write = (plain * 5 / 4, plain * 2) if WRITES_COST.match(model) else (plain, plain)
    return (plain, cached, *write, out)


def exact_microdollars(model: str, usage: dict) -> int:
    """What a call costs by RATES, rounded up: an oracle that shares no code with the product."""
    plain, cached, write_5m, write_1h, out = rates(model)
    if "prompt_tokens" in usage or "input_tokens_details" in usage:
        prompt = usage.get("prompt_tokens", usage.get("input_tokens"))
        details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or {}
        read = details.get("cached_tokens") or 0
        written = details.get("cache_write_tokens") or 0
        made = usage.get("completion_tokens", usage.get("output_tokens", 0))
        usd = (prompt - read - written) * plain + read * cached + written * write_5m + made * out
    else:
        split = usage.get("cache_creation") or {}
        hour = split.get("ephemeral_1h_input_tokens") or 0
        written = usage.get("cache_creation_input_tokens") or 0
        usd = (usage["input_tokens"] * plain + (written - hour) * write_5m + hour * write_1h
               + (usage.get("cache_read_input_tokens") or 0) * cached
               + usage["output_tokens"] * out)
    usd += SEARCH_USD * (usage.get("web_searches") or (usage.get("server_tool_use") or {}).get(
        "web_search_requests", 0))
    microdollars = usd * 1_000_000
    return -(-microdollars.numerator // microdollars.denominator)


class MockProvider:
    """A scriptable provider on a free loopback port. Use as a context manager."""

    def __init__(self, tls: Optional[ssl.SSLContext] = None) -> None:
        self._tls = tls
        self.models = {*RATES, *PER_MILLION}
        self.applies_vendor_rules = True
        self.output_text = "Grüße aus der Höhle — the canary sings 🐤 and all is well."
        self.input_tokens: Optional[int] = None      # None: one for every four bytes of body
        self.output_tokens: Optional[int] = None     # None: one for every piece of text
        self.cached_tokens = 0
        self.cache_write_tokens = 0
        self.reasoning_tokens = 0                    # made unseen, and billed
        self.read_ahead_tokens = 0                   # made beyond what a cut stream has shown
        self.seen: list[SeenRequest] = []
        self.bills: list[tuple[str, dict, int]] = []         # (model, usage, microdollars)
        self.connections = 0
        self.hang_ups = 0                            # streams that the proxy cut
        self.always: Optional[Union[Reply, Callable[[SeenRequest], Reply]]] = None
        self.faults: list[str] = []                  # assertions of the mock's own threads
        self._script: queue.SimpleQueue = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._sockets: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._is_stopping = threading.Event()
        self._listener = socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen(512)
        self.port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}" if tls is None \
            else f"https://localhost:{self.port}"

    # For tests.

    def script(self, *replies: Union[Reply, Callable[[SeenRequest], Reply]]) -> None:
        """Answers for the next requests, one each, before the default ones."""
        for reply in replies:
            self._script.put(reply)

    @property
    def billed_microdollars(self) -> int:
        with self._changed:
            return sum(microdollars for _, _, microdollars in self.bills)

    def wait_for(self, condition: Callable[[MockProvider], bool], what: str) -> None:
        """Wait until a condition holds. Raises AssertionError saying what did not happen."""
        with self._changed:
            assert self._changed.wait_for(lambda: condition(self), PATIENCE_S), \
                f"never happened: {what}"

    def wait_for_requests(self, count: int) -> None:
        self.wait_for(lambda mock: len(mock.seen) >= count, f"{count} requests at the mock")

    def wait_for_hang_ups(self, count: int = 1) -> None:
        self.wait_for(lambda mock: mock.hang_ups >= count, f"{count} hang-ups by the proxy")

    def refuse_connections(self) -> None:
        """From now on nobody listens at the mock's address."""
        try:
            self._listener.shutdown(socket.SHUT_RDWR)      # wakes accept(), which holds it open
        except OSError:
            pass
        self._listener.close()

    def default_reply(self, request: SeenRequest) -> Reply:
        """What the mock answers when nothing is scripted."""
        return _default_reply(self, request)

    def answer(self, api: str, request: SeenRequest, fields: dict) -> Reply:
        """What it answers to a call that no rule of the vendor refuses."""
        return _ANSWERS[api](self, request, fields)

    # Serving.

    def __enter__(self) -> MockProvider:
        self._acceptor = self._start(self._accept, "mock-accept")
        return self

    def __exit__(self, *_: object) -> None:
        self._is_stopping.set()
        self.refuse_connections()
        self._acceptor.join(PATIENCE_S)      # it may be taking one more connection
        with self._changed:
            sockets, threads = [*self._sockets], [*self._threads]
        for sock in sockets:
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
        for thread in threads:
            thread.join(PATIENCE_S)
        assert not [thread.name for thread in threads if thread.is_alive()], "the mock leaked"
        assert not self.faults, f"faults inside the mock: {self.faults}"

    def _start(self, target: Callable, name: str, *args: object) -> threading.Thread:
        thread = threading.Thread(target=target, args=args, name=name, daemon=True)
        with self._changed:
            self._threads = [t for t in self._threads if t.is_alive()] + [thread]
        thread.start()
        return thread

    def _accept(self) -> None:
        while not self._is_stopping.is_set():
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            try:
                if self._tls is not None:
                    sock = self._tls.wrap_socket(sock, server_side=True)
            except OSError:               # the proxy did not trust us
                sock.close()
                continue
            with self._changed:
                self._sockets.add(sock)
                number, self.connections = self.connections, self.connections + 1
            self._start(self._serve, f"mock-{number}", sock, number)

    def _serve(self, sock: socket.socket, number: int) -> None:
        reader = sock.makefile("rb")
        try:
            while True:
                request = _read_request(reader, number)
                if request is None:
                    return
                with self._changed:
                    self.seen.append(request)
                    self._changed.notify_all()
                if not self._answer(sock, request):
                    return
        except OSError:
            pass
        except Exception as err:      # lost in a thread: __exit__ raises it
            self.faults.append(f"{type(err).__name__}: {err}")
        finally:
            reader.close()
            sock.close()
            with self._changed:
                self._sockets.discard(sock)

    def _answer(self, sock: socket.socket, request: SeenRequest) -> bool:
        """Answer one request; whether the connection can be used again."""
        try:
            reply = self._script.get_nowait()
        except queue.Empty:
            reply = self.always or self.default_reply
        if callable(reply):
            reply = reply(request)
        shown, is_billed = 0, False
        try:
            if not reply.answers:
                return False
            if reply.framing != "raw":
                sock.sendall(_reply_head(reply))
            for number, step in enumerate(reply.steps):
                if number == len(reply.steps) - 1 and isinstance(step, bytes):
                    self._bill(reply, None)      # before the end is seen: tests compare then
                    is_billed = True
                if not self._perform(sock, step, reply.framing):
                    self._bill(reply, shown)
                    return False
                shown = (reply.tokens_by_step[number] if number < len(reply.tokens_by_step)
                         else shown)
            if reply.framing == "chunked":
                sock.sendall(b"0\r\n\r\n")
            return reply.framing not in ("close", "raw")
        except OSError:
            if not is_billed:
                self._bill(reply, shown)
            with self._changed:
                self.hang_ups += 1
                self._changed.notify_all()
            return False

    def _perform(self, sock: socket.socket, step: Step, framing: str) -> bool:
        """One step of a reply; False when it ends the connection. Raises OSError if hung up."""
        if isinstance(step, Gate):
            assert _open_or_gone(step.event, sock), "the gate was never opened"
        elif isinstance(step, Raw):
            sock.sendall(step.data)
        elif isinstance(step, Cut):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return False
        elif isinstance(step, Close):
            return False
        elif isinstance(step, Hang):
            sock.settimeout(None)
            if not sock.recv(1):
                raise OSError("the proxy hung up")
        elif framing == "chunked":
            sock.sendall(b"%x\r\n%b\r\n" % (len(step), step))
        else:
            sock.sendall(step)
        return True

    def _bill(self, reply: Reply, shown_tokens: Optional[int]) -> None:
        """Bill a reply: whole, or for what was made when it broke off."""
        if reply.bills is None:
            return
        model, usage = reply.bills
        if shown_tokens is not None:
            name = "completion_tokens" if "completion_tokens" in usage else "output_tokens"
            made = shown_tokens + self.read_ahead_tokens + self.reasoning_tokens
            usage = {**usage, name: min(usage[name], made)}
        with self._changed:
            self.bills.append((model, usage, exact_microdollars(model, usage)))
            self._changed.notify_all()


def _open_or_gone(event: threading.Event, sock: socket.socket) -> bool:
    """Wait for a gate, noticing a peer that leaves. Raises OSError if it left."""
    for _ in range(int(PATIENCE_S / 0.002)):
        if event.wait(0.002):
            return True
        try:
            is_gone = not sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            continue
        if is_gone:
            raise OSError("the proxy hung up")
    return False


def _read_request(reader, connection: int) -> Optional[SeenRequest]:
    """One request, read as strictly as a vendor's front end does; None at the end."""
    line = reader.readline()
    if not line:
        return None
    method, target, version = line.decode("latin-1").rstrip("\r\n").split(" ")
    assert version == "HTTP/1.1", version
    headers = []
    while True:
        line = reader.readline()
        assert line.endswith(b"\r\n"), "a header of the proxy does not end in CRLF"
        if line == b"\r\n":
            break
        name, value = line.decode("latin-1").rstrip("\r\n").split(":", 1)
        headers.append((name.lower(), value.strip()))
    names = [name for name, _ in headers]
    assert names.count("host") == 1 and names.count("content-length") <= 1, names
    assert "transfer-encoding" not in names, "the proxy sends bodies with their length"
    body = reader.read(int(dict(headers).get("content-length", 0)))
    return SeenRequest(method, target, tuple(headers), body, connection)


def _reply_head(reply: Reply) -> bytes:
    framing = {"chunked": [("transfer-encoding", "chunked")],
               "close": [("connection", "close")],
               "length": [("content-length", str(len(reply.body)))]}[reply.framing]
    lines = [f"{name}: {value}" for name, value in (*reply.headers, *framing)]
    reason = http.client.responses.get(reply.status, "")
    return (f"HTTP/1.1 {reply.status} {reason}\r\n" + "\r\n".join(lines) + "\r\n\r\n").encode()


# The default answers, in the vendors' shapes.

def _default_reply(mock: MockProvider, request: SeenRequest) -> Reply:
    anthropic = request.path.startswith("/v1/messages") or (
        request.path.startswith("/v1/models") and request.header("anthropic-version"))
    refusal = _refused_auth(request, bool(anthropic))
    if refusal is not None:
        return refusal
    if request.path.startswith("/v1/models") and request.method == "GET":
        return _models(mock, request, bool(anthropic))
    api = ENDPOINTS.get(request.path) if request.method == "POST" else None
    if api is None:
        return anthropic_error(404, "Not found", "not_found_error") if anthropic \
            else openai_error(404, f"Invalid URL ({request.method} {request.path})")
    try:
        fields = json.loads(request.body)
    except ValueError:
        fields = None
    refusal = _refused_fields(mock, api, fields, request.header("anthropic-beta") or "")
    return refusal if refusal is not None else mock.answer(api, request, fields)


def _refused_auth(request: SeenRequest, anthropic: bool) -> Optional[Reply]:
    if anthropic:
        if request.header("authorization") is not None:
            return anthropic_error(400, "two kinds of credentials")
        if request.header("x-api-key") != ANTHROPIC_KEY:
            return anthropic_error(401, "invalid x-api-key", "authentication_error")
        if request.header("anthropic-version") is None:
            return anthropic_error(400, "anthropic-version: header is required")
    elif request.header("authorization") != f"Bearer {OPENAI_KEY}" \
            or request.header("x-api-key") is not None:
        return openai_error(401, "Incorrect API key provided.", code="invalid_api_key")
    return None


def _refused_fields(mock: MockProvider, api: str, fields: object, betas: str
                    ) -> Optional[Reply]:
    """The vendors' strictness: unknown fields, missing ones, wrong types, unknown models."""
    anthropic = api in ("messages", "count_tokens")
    error = anthropic_error if anthropic else openai_error
    if not isinstance(fields, dict):
        return error(400, "We could not parse the JSON body of your request.")
    for name in fields:
        if name not in KNOWN_FIELDS[api].split():
            return error(400, f"{name}: Extra inputs are not permitted" if anthropic
                         else f"Unknown parameter: '{name}'.")
    for name in REQUIRED_FIELDS[api]:
        if fields.get(name) is None:
            return error(400, f"{name}: Field required" if anthropic
                         else f"Missing required parameter: '{name}'.")
    caps = [fields[name] for name in MAX_TOKENS_FIELDS if fields.get(name) is not None]
    if any(isinstance(cap, bool) or not isinstance(cap, int) or cap < 1 for cap in caps):
        return error(400, "max_tokens is not a positive integer")
    if fields.get("stream_options") is not None and fields.get("stream") is not True:
        return error(400, "The 'stream_options' parameter is only allowed when 'stream' is on.")
    rules = {"messages": lambda: refused_by_anthropic(fields, betas),
             "chat": lambda: refused_by_openai(fields),
             "responses": lambda: refused_by_responses(fields)}.get(api)
    fault = rules() if rules and mock.applies_vendor_rules else None
    if fault is not None:
        return error(400, fault)
    if api == "chat" and mock.applies_vendor_rules and RESPONSES_ONLY.match(str(fields["model"])):
        return openai_error(404, "This model is only supported in v1/responses and not in "
                                 "v1/chat/completions.")
    if fields["model"] not in mock.models:
        return anthropic_error(404, f"model: {fields['model']}", "not_found_error") \
            if anthropic else openai_error(404, f"The model `{fields['model']}` does not exist.",
                                           code="model_not_found")
    return None


def _models(mock: MockProvider, request: SeenRequest, anthropic: bool) -> Reply:
    if anthropic:
        rows = [{"type": "model", "id": name, "display_name": name, "lifecycle": "active",
                 "created_at": "2025-10-01T00:00:00Z"} for name in sorted(mock.models)]
        whole = {"data": rows, "has_more": False, "first_id": rows[0]["id"],
                 "last_id": rows[-1]["id"]}
    else:
        rows = [{"id": name, "object": "model", "created": 1715367049, "owned_by": "system"}
                for name in sorted(mock.models)]
        whole = {"object": "list", "data": rows}
    one = request.path[len("/v1/models/"):]
    if not one:
        return Reply(steps=(json.dumps(whole).encode(),))
    named = [row for row in rows if row["id"] == one]
    if not named:
        return anthropic_error(404, f"model: {one}", "not_found_error") if anthropic \
            else openai_error(404, f"The model '{one}' does not exist", code="model_not_found")
    return Reply(steps=(json.dumps(named[0]).encode(),))


def _text_and_counts(mock: MockProvider, request: SeenRequest, fields: dict
                     ) -> tuple[list[str], int, int, bool]:
    """(pieces of text, input tokens, output tokens, cut at the cap) of an answer."""
    pieces = re.findall(r"\s*\S+", mock.output_text)
    caps = [fields[name] for name in MAX_TOKENS_FIELDS if fields.get(name) is not None]
    cap = max(caps, default=10 ** 6)
    made = (len(pieces) if mock.output_tokens is None else mock.output_tokens)
    made += mock.reasoning_tokens
    asked = -(-len(request.body) // 4) if mock.input_tokens is None else mock.input_tokens
    asked = max(asked, mock.cached_tokens)       # OpenAI counts cached ones within the prompt
    return pieces[:cap], asked, min(made, cap), made > cap


def _shares(mock: MockProvider, made: int, pieces: int) -> list[int]:
    """Tokens made when each piece is shown: _bill() adds the hidden ones."""
    shown = max(0, made - mock.reasoning_tokens)
    return [-(-shown * count // pieces) for count in range(1, pieces + 1)]


OPENAI_HEADERS = (("x-request-id", "req_mock"), ("openai-processing-ms", "12"),
                  ("openai-version", "2020-10-01"), ("x-ratelimit-limit-requests", "5000"),
                  ("x-ratelimit-remaining-requests", "4999"), ("set-cookie", "__cf_bm=secret"))
ANTHROPIC_HEADERS = (("request-id", "req_mock"), ("anthropic-organization-id", "org"),
                     ("anthropic-ratelimit-requests-limit", "50"))


def whole_reply(body: dict, bills: Optional[tuple[str, dict]], headers: tuple) -> Reply:
    return Reply(200, (("content-type", "application/json"), *headers),
                 (json.dumps(body, indent=1, ensure_ascii=False).encode(),), bills=bills)


def streamed_reply(events: Sequence[bytes], tokens: Sequence[int], bills: tuple[str, dict],
              headers: tuple) -> Reply:
    return Reply(200, (("content-type", "text/event-stream; charset=utf-8"), *headers),
                 tuple(events), "chunked", bills, tuple(tokens))


def _chat(mock: MockProvider, request: SeenRequest, fields: dict) -> Reply:
    pieces, asked, made, is_cut = _text_and_counts(mock, request, fields)
    n = fields.get("n") or 1
    usage = {"prompt_tokens": asked, "completion_tokens": made * n,
             "total_tokens": asked + made * n,
             "prompt_tokens_details": {"cached_tokens": mock.cached_tokens, "audio_tokens": 0},
             "completion_tokens_details": {"reasoning_tokens": min(mock.reasoning_tokens, made) * n,
                                           "audio_tokens": 0, "accepted_prediction_tokens": 0,
                                           "rejected_prediction_tokens": 0}}
    bills = (fields["model"], usage)
    finish = "length" if is_cut else "stop"
    base = {"id": "chatcmpl-mock", "object": "chat.completion", "created": 1766265207,
            "model": fields["model"]}
    tail = {"service_tier": "default", "system_fingerprint": "fp_mock"}
    if not fields.get("stream"):
        message = {"role": "assistant", "content": "".join(pieces), "refusal": None,
                   "annotations": []}
        choices = [{"index": i, "message": message, "logprobs": None, "finish_reason": finish}
                   for i in range(n)]
        return whole_reply({**base, "choices": choices, "usage": usage, **tail}, bills,
                      OPENAI_HEADERS)
    asks_usage = (fields.get("stream_options") or {}).get("include_usage") is True
    base = {**base, "object": "chat.completion.chunk", **tail}

    def chunk(delta: Optional[dict], finish: Optional[str] = None, i: int = 0) -> bytes:
        choices = [] if delta is None else [{"index": i, "delta": delta, "logprobs": None,
                                             "finish_reason": finish}]
        body = {**base, "choices": choices}
        if asks_usage:
            body["usage"] = usage if delta is None else None
        return sse({**body, "obfuscation": "x7"})

    events = [chunk({"role": "assistant", "content": "", "refusal": None}, i=i) for i in range(n)]
    tokens = [0] * n
    for piece, share in zip(pieces, _shares(mock, made, len(pieces))):
        events += [chunk({"content": piece}, i=i) for i in range(n)]
        tokens += [share * n] * n
    events += [chunk({}, finish, i) for i in range(n)]
    events += ([chunk(None)] if asks_usage else []) + [sse("[DONE]")]
    return streamed_reply(events, tokens, bills, OPENAI_HEADERS)


def _completion(mock: MockProvider, request: SeenRequest, fields: dict) -> Reply:
    pieces, asked, made, is_cut = _text_and_counts(mock, request, fields)
    usage = {"prompt_tokens": asked, "completion_tokens": made, "total_tokens": asked + made}
    base = {"id": "cmpl-mock", "object": "text_completion", "created": 1766265207,
            "model": fields["model"]}

    def choice(text: str, finish: Optional[str]) -> list:
        return [{"text": text, "index": 0, "logprobs": None, "finish_reason": finish}]

    finish = "length" if is_cut else "stop"
    if not fields.get("stream"):
        return whole_reply({**base, "choices": choice("".join(pieces), finish), "usage": usage},
                      (fields["model"], usage), OPENAI_HEADERS)
    events = [sse({**base, "choices": choice(piece, None)}) for piece in pieces]
    events.append(sse({**base, "choices": choice("", finish)}))
    if (fields.get("stream_options") or {}).get("include_usage"):
        events.append(sse({**base, "choices": [], "usage": usage}))
    tokens = _shares(mock, made, len(pieces))
    return streamed_reply([*events, sse("[DONE]")], tokens, (fields["model"], usage),
                     OPENAI_HEADERS)


def _embeddings(mock: MockProvider, request: SeenRequest, fields: dict) -> Reply:
    _, asked, _, _ = _text_and_counts(mock, request, fields)
    vector: object = [0.25, -0.5, 0.125]
    if fields.get("encoding_format") == "base64":
        import base64
        vector = base64.b64encode(struct.pack("<3f", 0.25, -0.5, 0.125)).decode()
    usage = {"prompt_tokens": asked, "total_tokens": asked}
    body = {"object": "list", "data": [{"object": "embedding", "index": 0, "embedding": vector}],
            "model": fields["model"], "usage": usage}
    return whole_reply(body, (fields["model"], usage), OPENAI_HEADERS)


def _responses(mock: MockProvider, request: SeenRequest, fields: dict) -> Reply:
    pieces, asked, made, is_cut = _text_and_counts(mock, request, fields)
    usage = {"input_tokens": asked, "input_tokens_details": {"cached_tokens": mock.cached_tokens},
             "output_tokens": made, "total_tokens": asked + made,
             "output_tokens_details": {"reasoning_tokens": min(mock.reasoning_tokens, made)}}
    part = {"type": "output_text", "text": "".join(pieces), "annotations": [], "logprobs": []}
    item = {"id": "msg_mock", "type": "message", "status": "completed", "role": "assistant",
            "content": [part]}
    whole = {"id": "resp_mock", "object": "response", "created_at": 1766265207,
             "status": "incomplete" if is_cut else "completed", "background": False,
             "error": None, "instructions": fields.get("instructions"), "metadata": {},
             "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
             "max_output_tokens": fields.get("max_output_tokens"), "model": fields["model"],
             "output": [item], "parallel_tool_calls": True, "previous_response_id": None,
             "reasoning": {"effort": None, "summary": None}, "service_tier": "default",
             "store": False, "temperature": 1.0, "text": {"format": {"type": "text"}},
             "tool_choice": "auto", "tools": [], "top_p": 1.0, "truncation": "disabled",
             "usage": usage, "user": None}
    bills = (fields["model"], usage)
    if not fields.get("stream"):
        return whole_reply(whole, bills, OPENAI_HEADERS)
    opened = {**whole, "status": "in_progress", "output": [], "usage": None,
              "incomplete_details": None, "service_tier": "auto"}
    where = {"item_id": "msg_mock", "output_index": 0, "content_index": 0}
    parts = [("response.created", {"response": opened}),
             ("response.in_progress", {"response": opened}),
             ("response.output_item.added", {
                 "output_index": 0, "item": {**item, "status": "in_progress", "content": []}}),
             ("response.content_part.added", {**where, "part": {**part, "text": ""}})]
    opening = len(parts)
    parts += [("response.output_text.delta", {**where, "delta": piece, "logprobs": []})
              for piece in pieces]
    parts += [("response.output_text.done", {**where, "text": part["text"], "logprobs": []}),
              ("response.content_part.done", {**where, "part": part}),
              ("response.output_item.done", {"output_index": 0, "item": item}),
              (f"response.{whole['status']}", {"response": whole})]
    events = [sse({"type": name, "sequence_number": i, **rest}, name)
              for i, (name, rest) in enumerate(parts)]
    tokens = [0] * opening + _shares(mock, made, len(pieces))
    return streamed_reply(events, tokens, bills, OPENAI_HEADERS)


def _messages(mock: MockProvider, request: SeenRequest, fields: dict) -> Reply:
    pieces, asked, made, is_cut = _text_and_counts(mock, request, fields)
    usage = {"input_tokens": asked, "cache_creation_input_tokens": mock.cache_write_tokens,
             "cache_read_input_tokens": mock.cached_tokens,
             "cache_creation": {"ephemeral_5m_input_tokens": mock.cache_write_tokens,
                                "ephemeral_1h_input_tokens": 0},
             "output_tokens": made, "service_tier": "standard", "inference_geo": "global"}
    stop = "max_tokens" if is_cut else "end_turn"
    whole = {"model": fields["model"], "id": "msg_01mock", "type": "message",
             "role": "assistant", "content": [{"type": "text", "text": "".join(pieces)}],
             "stop_reason": stop, "stop_sequence": None, "usage": usage}
    bills = (fields["model"], usage)
    if not fields.get("stream"):
        return whole_reply(whole, bills, ANTHROPIC_HEADERS)
    start = {**whole, "content": [], "stop_reason": None, "usage": {**usage, "output_tokens": 1}}
    final = {name: count for name, count in usage.items() if name.endswith("_tokens")}

    def event(kind: str, **members: object) -> bytes:
        return sse({"type": kind, **members}, kind)

    events = [event("message_start", message=start),
              event("content_block_start", index=0, content_block={"type": "text", "text": ""}),
              event("ping"),
              *(event("content_block_delta", index=0, delta={"type": "text_delta", "text": piece})
                for piece in pieces),
              event("content_block_stop", index=0),
              event("message_delta", delta={"stop_reason": stop, "stop_sequence": None},
                    usage=final),
              event("message_stop")]
    tokens = [0, 0, 0] + _shares(mock, made, len(pieces))
    return streamed_reply(events, tokens, bills, ANTHROPIC_HEADERS)


def _count_tokens(mock: MockProvider, request: SeenRequest, fields: dict) -> Reply:
    return whole_reply({"input_tokens": 42}, None, ANTHROPIC_HEADERS)


_ANSWERS = {"chat": _chat, "completions": _completion, "embeddings": _embeddings,
            "responses": _responses, "messages": _messages, "count_tokens": _count_tokens}


# Clients.

@dataclass(frozen=True)
class RawAnswer:
    """An answer as it stood on the wire."""
    status: int
    headers: tuple[tuple[str, str], ...]      # lower-case names
    body: bytes
    chunks: tuple[bytes, ...] = ()            # where the body was chunked

    def header(self, name: str) -> Optional[str]:
        values = [value for header, value in self.headers if header == name]
        assert len(values) <= 1, f"header {name} came {len(values)} times"
        return values[0] if values else None

    @property
    def json(self) -> dict:
        return json.loads(self.body)


class RawClient:
    """A client that can say anything, and reads answers strictly. Each read waits for three times PATIENCE_S
    at most: large bodies travel slowly on a busy machine."""

    def __init__(self, port: int) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port), 3 * PATIENCE_S)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._reader = self.sock.makefile("rb")

    def __enter__(self) -> RawClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def request(self, method: str, target: str, body: Optional[bytes] = None,
                headers: Sequence[tuple[str, str]] = (), token: Optional[str] = TOKEN) -> None:
        """Send a whole, ordinary request."""
        lines = [f"{method} {target} HTTP/1.1", "Host: 127.0.0.1"]
        if token is not None:
            lines.append(f"Authorization: Bearer {token}")
        if body is not None:
            lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
        lines += [f"{name}: {value}" for name, value in headers]
        self.send("\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + (body or b""))

    def read_head(self) -> tuple[int, tuple[tuple[str, str], ...]]:
        line = self._reader.readline()
        match = re.fullmatch(rb"HTTP/1\.1 (\d{3}) [^\r\n]*\r\n", line)
        assert match, f"not a status line: {line!r}"
        headers = []
        while True:
            line = self._reader.readline()
            assert line.endswith(b"\r\n"), f"not a header line: {line!r}"
            if line == b"\r\n":
                break
            name, value = line.decode("latin-1").rstrip("\r\n").split(":", 1)
            headers.append((name.lower(), value.strip()))
        names = [name for name, _ in headers]
        assert names.count("content-length") + names.count("transfer-encoding") <= 1, names
        return int(match[1]), tuple(headers)

    def read_chunk(self) -> bytes:
        """One chunk of a chunked body; b"" for the last."""
        size = int(self._reader.readline().rstrip(b"\r\n"), 16)
        chunk = self._reader.read(size)
        assert len(chunk) == size and self._reader.readline() == b"\r\n", "a chunk is cut"
        return chunk

    def read_answer(self, to_head: bool = False) -> RawAnswer:
        """A whole answer; `to_head`: it answers a HEAD request."""
        status, headers = self.read_head()
        told = dict(headers)
        if to_head or status in (204, 304):
            return RawAnswer(status, headers, b"")
        if told.get("transfer-encoding") == "chunked":
            chunks = tuple(iter(self.read_chunk, b""))
            return RawAnswer(status, headers, b"".join(chunks), chunks)
        if "content-length" in told:
            body = self._reader.read(int(told["content-length"]))
            assert len(body) == int(told["content-length"]), "the body is cut"
            return RawAnswer(status, headers, body)
        return RawAnswer(status, headers, self._reader.read())

    def is_closed_by_server(self) -> bool:
        """Whether the server ends the connection (waits for it to)."""
        try:
            return self._reader.read(1) == b""
        except ConnectionError:
            return True

    def leave(self) -> None:
        """Hang up with a reset."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()

    def close(self) -> None:
        self._reader.close()
        self.sock.close()


def call(port: int, method: str, target: str, fields: Optional[object] = None,
         headers: Sequence[tuple[str, str]] = (), token: Optional[str] = TOKEN) -> RawAnswer:
    """One request on a connection of its own; `fields` is sent as JSON."""
    body = fields if isinstance(fields, (bytes, type(None))) else json.dumps(fields).encode()
    with RawClient(port) as client:
        client.request(method, target, body, headers, token)
        return client.read_answer(to_head=method == "HEAD")


def sse_events(stream: bytes) -> list[tuple[Optional[str], str]]:
    """(event name, data) of each event: a parser of its own, for complete streams."""
    events = []
    text = re.sub(r"\r\n|\r", "\n", stream.decode("utf-8"))
    for block in text.split("\n\n"):
        fields = [line.partition(":") for line in block.split("\n")]
        data = [value[1:] if value.startswith(" ") else value
                for name, _, value in fields if name == "data"]
        if data:
            names = [value.strip() for name, _, value in fields if name == "event"]
            events.append((names[-1] if names else None, "\n".join(data)))
    return events


def each(names: str, rows: Iterable) -> Callable:
    """Run a test with each row in turn, as one test; a failure says with which rows. As with
    pytest.mark.parametrize, but the fixtures are made once: what one row does must not matter to
    the next.
    """
    fields = re.findall(r"\w+", names)
    rows = [row if len(fields) > 1 else (row,) for row in rows]
    assert rows and all(len(row) == len(fields) for row in rows), "no rows, or one of another length"
    table = [dict(zip(fields, row)) for row in rows]

    def decorated(test: Callable) -> Callable:
        @functools.wraps(test)
        def run(*arguments: object, **fixtures: object) -> None:
            failed = []
            for row in table:
                try:
                    test(*arguments, **row, **fixtures)
                except (Exception, pytest.fail.Exception) as err:      # "DID NOT RAISE" is none
                    failed.append((row, err))
            if failed:
                shown = "; ".join(", ".join(f"{name}={value!r:.80}" for name, value in row.items())
                                  for row, _ in failed[:20])
                raise AssertionError(f"with {shown} ({len(failed)} of {len(table)})"
                                     ) from failed[0][1]
        signature = inspect.signature(test)
        run.__signature__ = signature.replace(parameters=[        # or pytest takes it for a fixture
            parameter for name, parameter in signature.parameters.items() if name not in fields])
        return run
    return decorated


def each_seed(count: int, most: int = 0) -> Callable:
    """Run a test with the seeds from 0 on, as each() does; with those up to `most` if it is long.
    """
    if not most:
        return each("seed", range(count))

    def decorated(test: Callable) -> Callable:
        @functools.wraps(test)
        def run(seeds: range, **fixtures: object) -> None:
            each("seed", seeds)(test)(**fixtures)
        signature = inspect.signature(test)
        run.__signature__ = signature.replace(parameters=[
            parameter.replace(name="seeds") if name == "seed" else parameter
            for name, parameter in signature.parameters.items()])
        return pytest.mark.parametrize("seeds", [range(count), pytest.param(
            range(count, most), marks=pytest.mark.soak)], ids=["first", "others"])(run)
    return decorated


def seeds(count: int, most: int) -> list:
    """Rows for parametrize(): the seeds from 0 on, of which all after `count` are long tests."""
    return [*range(count), *(pytest.param(seed, marks=pytest.mark.soak)
                             for seed in range(count, most))]


def until(condition: Callable[[], object], what: str = "it came to that") -> None:
    """Wait until a condition holds. Raises AssertionError saying what did not happen."""
    for _ in range(int(PATIENCE_S / 0.003)):
        if condition():
            return
        threading.Event().wait(0.003)
    raise AssertionError(f"never happened: {what}")


def pause(seconds: float, why: str) -> None:
    """Let time pass that is part of a test, which says why; to wait for something, use until()."""
    assert why
    time.sleep(seconds)


# The proxy.

def kill_programs_of(folder: Path) -> None:
    """End what clients have left running from a folder of theirs: Codex starts a daemon that is in
    no process group of ours. Where /proc is missing, nothing is done."""
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if str(folder).encode() in place.read_bytes() and int(place.parts[2]) != os.getpid():
                os.kill(int(place.parts[2]), signal.SIGKILL)


def program():
    """The module under test."""
    sys.path.insert(0, str(ROOT))
    try:
        import ironcage_proxy
    finally:
        sys.path.remove(str(ROOT))
    return ironcage_proxy


def said(capsys, *argv: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a command, in this process."""
    code = program().main([*argv])
    return (code, *capsys.readouterr())


def proxy_environment(mock: Optional[MockProvider]) -> dict[str, str]:
    url = "http://127.0.0.1:9" if mock is None else mock.url
    return {"OPENAI_API_KEY": OPENAI_KEY, "ANTHROPIC_API_KEY": ANTHROPIC_KEY,
            "IRONCAGE_OPENAI_BASE_URL": url + "/v1", "IRONCAGE_ANTHROPIC_BASE_URL": url}


def start_proxy(mock: Optional[MockProvider], *argv: str, environ: Optional[dict] = None,
                timeouts: Optional[dict] = None):
    """A served ProxyServer in front of a mock. `timeouts` changes fields of Timeouts."""
    module = program()
    settings = module.settings_from(
        ["--port", "0", "--token", TOKEN, *argv],
        proxy_environment(mock) if environ is None else environ)
    settings = settings._replace(timeouts=settings.timeouts._replace(**(timeouts or {})))
    server = module.ProxyServer(settings)
    server.start()
    return server


@functools.lru_cache(maxsize=None)
def compiled_program() -> str:
    """The program as Python compiles it, with its prices beside it: it starts in half the time."""
    folder = Path(tempfile.mkdtemp(prefix="ironcage-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    shutil.copy(ROOT / "pricing.json", folder)
    return py_compile.compile(str(ROOT / "ironcage_proxy.py"), doraise=True,
                              cfile=str(folder / "ironcage_proxy.pyc"))


def started(*argv: str, environ: Optional[dict] = None, **options: object) -> Forked:
    """A process of the program, with nothing of our environment but the PATH: see Forked."""
    return Forked(compiled_program(), argv, {"PATH": os.environ["PATH"], **(environ or {})},
                  **options)


def run_program(*argv: str, **options: object) -> subprocess.CompletedProcess:
    """The program, run to its end: see Forked."""
    process = started(*argv, **options)
    try:
        out, err = process.communicate(timeout=PATIENCE_S * 3)
    finally:
        process.kill()
    return subprocess.CompletedProcess(argv, process.returncode, out, err)


class Served:
    """The program, serving: its process, port and the first lines that it printed. With `program`,
    `python` or any option of Popen a Python is started for it."""

    def __init__(self, *argv, environ=None, cwd=None, code=forked.MAIN, program=None,
                 python=(sys.executable,), **options):
        self._log = tempfile.TemporaryFile("w+")
        argv = ("--port", "0", *argv)
        if program is None and python == (sys.executable,) and not options:
            self.process = started(*argv, environ=environ, cwd=cwd, code=code, stderr=self._log)
        else:
            self.process = subprocess.Popen(
                [*python, program or compiled_program(), *argv], text=True, cwd=cwd,
                stdout=subprocess.PIPE, stderr=self._log,
                env={"PATH": os.environ["PATH"], **(environ or {})}, **options)
        self.first_line = self.process.stdout.readline()
        match = re.search(r"http://127\.0\.0\.1:(\d+)", self.first_line)
        assert match, self.first_line + self.log
        self.port = int(match[1])

    @property
    def log(self):
        self._log.seek(0)
        return self._log.read()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait(PATIENCE_S)
        self.process.stdout.close()
        self._log.close()

    def stop(self, number=signal.SIGTERM):
        """Signal it and wait: (exit code, the rest of stdout, stderr)."""
        self.process.send_signal(number)
        code = self.process.wait(PATIENCE_S * 3)
        return code, self.process.stdout.read(), self.log


@contextlib.contextmanager
def slot_of(slot) -> Iterator[None]:
    """This thread has the slot: no connection of the proxy is served meanwhile."""
    slot.take()
    try:
        yield
    finally:
        slot.leave()


def status_of(proxy) -> dict:
    answer = call(proxy.port, "GET", "/ironcage/status")
    assert answer.status == 200, answer
    return answer.json


def is_at_rest(proxy) -> bool:
    """Whether a proxy of this process works on no request; waits a moment for that. What another
    process does is not seen from here: False."""
    module = program()
    if not isinstance(proxy, module.ProxyServer):
        return False
    for _ in range(20):
        if not proxy.places.count(lambda place: place.does in (module.READING, module.SERVING)):
            return True
        threading.Event().wait(0.001)
    return False


def settled_status(proxy) -> dict:
    """The status once nothing is reserved any more, and the counts, which come after the money,
    stand still: no request is in work, or two looks in succession saw the same."""
    before: dict = {}
    for _ in range(int(PATIENCE_S / 0.01)):
        rests = is_at_rest(proxy)
        status = status_of(proxy)
        if status["reserved_microdollars"] == 0 and (
                rests or before == {**status, "uptime_s": 0}):
            return status
        before = {**status, "uptime_s": 0}
        threading.Event().wait(0.01)
    raise AssertionError(f"a reservation was never settled: {status}")


def recordings() -> Iterator[tuple[str, dict]]:
    """(name, exchange) of each recorded exchange; skips the test where they are absent."""
    folder = SHARED / "recordings"
    if not folder.is_dir():
        pytest.skip("the recorded exchanges are not beside this checkout")
    for path in sorted(folder.glob("*/*/*.json")):
        yield str(path.relative_to(folder)), json.loads(path.read_text(encoding="utf-8"))
