#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""ironcage_proxy: put it between AI agents and the model providers.

Agents get a token and a base URL, never the real key; what they spend can never pass a limit.

    agent --token--> [ read strictly, authenticate ]                          chapters 3, 18, 19, 27
                     [ route; bound the worst case; reserve it, or refuse ]   chapters 4, 5, 16, 25
                     [ write the intent down ]                                chapter 17
                     [ send with the provider's key ] --key--> provider       chapters 20, 25
                     [ forward what comes back, as it comes; read its usage ] chapters 6-14, 25
    agent <--bytes-- [ settle: the exact cost, once, whatever happened ]      chapters 4, 16, 17, 21

    python ironcage_proxy.py --port 8787 --budget 2.00       # serve
    python ironcage_proxy.py --budget 2.00 -- claude -p "…"  # run one command inside the cage
    with LlmRouter(budget="5.00") as router: ...             # embed

Promises, each with the test that attacks it first:

    Never over: spent + reserved never passes a limit by an admission
        tests/wire/test_the_cage.py::test_64_threads_never_pass_a_budget_that_fits_a_few_requests
    Never under-counted: with a ledger a reservation is on disk before its call is sent
        tests/faults/test_crashes.py
    Exact: a finished call costs what the price table says for the usage that was reported
        tests/unit/test_money.py::test_a_charge_is_the_exact_sum_or_less_than_a_microdollar_above_it
    Settled once: every request settles exactly once, whatever happens
        tests/faults/test_every_way_to_end.py::test_every_way_to_end
    Fail closed: a model, route, field or price that is not known is refused under a budget
        tests/wire/test_the_cage.py::test_what_no_bound_covers_is_refused_under_a_budget
    Keys stay: a provider's key goes to its provider's host and appears nowhere else
        tests/wire/test_keys.py::test_a_key_in_a_body_is_masked_in_whatever_way_json_writes_it
    Transparent: between a client and a provider of one format bytes travel unchanged, but for
    fields that the budget must set, which are spliced in
        tests/wire/test_identity.py::test_a_request_body_reaches_the_provider_byte_for_byte
    Quiet: connections are opened to the configured providers, Iron Cage server, receiver of alerts
    and engine of a shared budget, or to the proxy that the environment names for all but the last,
    and to nobody else (`check` greets its own address)
        tests/wire/test_tls_and_proxies.py::test_no_connection_is_opened_but_to_configured_providers
    Self-contained: only the standard library is used
        tests/unit/test_house.py::test_only_known_modules_of_the_standard_library_are_imported

That a request cannot cost more than its bound rests on assumptions, which the README lists and
which stand beside their figures in chapters 5 and 21.

Contents (each chapter uses only names of chapters above it):

     1. Limits and tables
     2. Errors
     3. JSON bodies
     4. Money
     5. Bounds
     6. Event streams
     7. Usage of answers
     8. The neutral form
     9. Names, ids and losses
    10. JSON schemas
    11. Chat completions
    12. Messages
    13. Responses
    14. Translators
    15. The echo model
    16. Cost controller
    17. Ledger
    18. Callers and configuration
    19. HTTP on a socket
    20. Upstream
    21. Settlement
    22. Events and metrics
    23. Iron Cage server
    24. Shared budget
    25. Router
    26. Dashboard
    27. Server
    28. Settings and command line
    29. Embedding

An API is one of "chat", "responses", "completions", "embeddings" and "messages".

Which code answers a question: `python tests/calls.py overspend` prints it, with the headings and
comments above it, for it follows the calls; tests/unit/test_map.py sees that nothing is missing.

    overspend: Can it overspend? What these use of chapters 3 to 7, 16, 17 and 21.
        CostController: __doc__ __init__ admit reserve commit cancel close add_spend set_budget
        set_limits set_scopes check_budget; AnswerMeter; StreamReader; KnownCounts;
        PriceBook: _find price bill; SqliteLedger: intent settle spent; LlmRouter: set_budget;
        ProxyServer: put_budget; Router: _session _carried _admitted _planned _translated
        _bound _tight_bound _reserved _upstream_body _settle _take_lease configure
    unmetered: What passes under a budget without being counted? What these use of chapters 1, 2
        and 18.
        Router: open _unmetered _check_unmetered; check_head; may_be_metered; check_models;
        named_model; check_sessions
    shared: Can it overspend where many processes share a budget? What these use of chapter 24.
        SharedAccounts; accounts_for; make_cage
    leaves: What leaves this machine? What these use of chapters 1, 18 and 20.
        KeepAliveHandler; EnvironmentProxies; build_opener; check_encrypted; posted; Router: _sent
        _send _passed_through; CageServer: _post; Alerts: _is_done; EngineLink; row_shown;
        refusal_row; child_environment
    changed: Is my message changed, where its API is the provider's own? What these use of chapters
        1, 3, 6, 7, 20 and 21.
        parse_json_object; JsonBody: spliced; upstream_headers; answer_headers; Router:
        _upstream_body _answered _first_headers _whole_answer _streamed _reads _to_its_end _unread
        _counted_here; UpstreamResponse; StreamReader; without_usage; Changes;
        without_own_thinking; and, where it is translated, chapters 8 to 14
"""
from __future__ import annotations     # a SyntaxError here: Python 3.9 or newer is needed

import base64
import bisect
import contextlib
import datetime
import errno
import fnmatch
import functools
import hashlib
import heapq
import http.client
import http.server
import itertools
import json
import logging
import operator
import os
import re
import secrets
import select
import signal
import socket
import socketserver
import ssl
import stat
import struct
import sys
import threading
import time
import unicodedata
import urllib.parse
import urllib.request
import zlib
from collections import Counter, deque
from decimal import Decimal
from fractions import Fraction
from types import MappingProxyType
from typing import (TYPE_CHECKING, Any, Callable, Collection, Container, ContextManager, Iterable,
                    Iterator, Mapping, NamedTuple, NoReturn, Optional, Sequence, TypeVar, Union)

if TYPE_CHECKING:            # at run time where a command line is read, and a ledger opened
    import argparse
    import sqlite3

__all__ = ["BudgetThresholdReached", "CostController", "IroncageError", "LlmRequestCompleted",
           "LlmRequestFailed", "LlmRouter", "PriceBook", "ProxyServer", "RouterStarted",
           "RouterStopped", "Settings", "UnpricedModel", "input_tokens_upper_bound", "main",
           "settings_from"]
__version__ = "0.4.2"

if sys.version_info < (3, 9):
    sys.exit("ironcage_proxy needs Python 3.9 or newer; this is "
             + sys.version.split()[0])
log = logging.getLogger("ironcage")
_T = TypeVar("_T")


# ==== 1. Limits and tables ======================================================================
#
# What bounds memory, time and threads, with the reason beside each figure, and the tables that
# say which header, path and model goes where. A further API needs a row in METERED_APIS and
# FORMAT_APIS here, USAGE_READERS (4), MAX_TOKENS_FIELDS (5), EVENT_READERS (7) and DIALECTS (14).
# A pattern that few requests need is a string, which `re` compiles at its first use.

MAX_HEAD_BYTES = 64 * 1024                # request or answer line plus headers
MAX_HEADERS = 100
MAX_INTERIM_ANSWERS = 100                 # of status 1xx, before the answer itself
MAX_JSON_DEPTH = 200                      # deeper bodies are attacks, not prompts
MAX_JSON_VALUES = 1_000_000               # more hold the interpreter for over 0.2 s
MAX_INTEGER_DIGITS = 4300                 # as Python reads and writes; what costs has less room
MAX_MODEL_CHARS = 512                     # of a model's name, a client's or an answer's
MAX_EVENT_BYTES = 32 * 1024 * 1024        # one SSE event; image streams carry megabytes in one
MAX_ANSWER_BYTES = 64 * 1024 * 1024       # an answer that is metered whole is held in memory
MAX_INFLATED_BYTES = 64 * 1024 * 1024     # a compressed answer, inflated to read its usage
READ_BYTES = 16 * 1024                    # one read from a socket: room for most messages
LARGE_READ_BYTES = 64 * 1024              # and where it was full, the next
BODY_READ_BYTES = 1024 * 1024             # those of a body that is read beside other requests
LONG_WORK_BYTES = 64 * 1024               # a larger body is worked on beside other requests
COPIES = 3                                # of a body: as it came, parsed, and while it is
UNCOUNTED_BYTES = 16 * 1024               # of memory: MAX_CONNECTIONS times that is 16 MB
SMALL_CLAIM_BYTES = 2 * 1024 * 1024       # a quarter of the memory is kept for these
# glibc gives free memory back to the system beyond twice the largest block that was freed, and to
# get it again took 30 ms of CPU for each body of 20 MB: so one of the largest that count is made,
# never written to, and freed.
FREED_BLOCK_BYTES = 32 * 1024 * 1024 - 64 * 1024
MEMORY_WAIT_S = 20                        # in the queue for it; then the client may try again
MEMORY_QUEUE = 64                         # of one token's requests; each is a thread that waits
INFLATED_AT_ONCE = 1024                   # compressed bytes, which can be a thousand times more
LEAST_KEY_CHARS = 16                      # a shorter key may be a word of an answer
OPEN_KEY_CHARS = 8                        # the start of a key, as "sk-proj-", is no secret
LEAST_BYTES_PER_S = 8192           # of a body, that a peer must take or send, but for a wait
JOINED_WRITE_BYTES = 256 * 1024           # head and body go out in one write up to this size

MAX_CONNECTIONS = 1024                    # one thread each, and two sockets
THREAD_STACK_BYTES = 2 * 1024 * 1024      # JSON nested too deep ends Python 3.13 with half of that
SPARE_FILES = 64                          # beside those, for the ledger, the log and the embedder
STRANGERS_PART = 4                        # one in so many may have shown no token
STRANGER_S = 1                            # how long one that is beyond that part may be silent
LET_IN_TRIES = 20                         # more, before a 503, while others are not looked at
LISTEN_BACKLOG = 1024                     # the default of 5 drops bursts of connections
POOLED_CONNECTIONS_PER_HOST = 256
POOL_IDLE_S = 15                          # below the 20 s and more of providers' load balancers
STOP_POLL_S = 0.05                        # how soon serve_forever sees that it should stop
CUT_JOIN_S = 5                            # after a cut, how long handlers may take to settle
LAST_REQUEST_S = 1                        # at a restart, for a request that is on its way
WAIT_POLL_S = 0.1                         # how soon a waiting request sees its client go
CONFIG_LOOK_S = 1                         # how often configuration and ledger are looked at
GREETING_S = 2                            # how long `check` waits for a proxy that may serve


class Timeouts(NamedTuple):
    """Seconds after which a silent or slow peer is given up. No single wait is without an end."""
    head_s: float = 10          # a whole request head, from its first byte (or from connecting)
    body_s: float = 120         # a whole request body
    body_stall_s: float = 20    # behind LEAST_BYTES_PER_S in a request body
    keep_alive_s: float = 75    # between two requests of one connection
    write_stall_s: float = 60   # no progress in writing to a peer
    connect_s: float = 10       # TCP and TLS to a provider
    first_byte_s: float = 600   # from the last byte sent to the first byte of the answer
    between_bytes_s: float = 300
    ping_s: float = 15          # of silence in a translated stream, before the client hears of it
    call_s: float = 3600        # one upstream call in all
    drain_s: float = 30         # at stop, for the requests in flight
    linger_s: float = 2         # reading on after a refusal, so that the client can read it


METERED_APIS = MappingProxyType({
    "/v1/chat/completions": "chat",
    "/v1/responses": "responses",
    "/v1/completions": "completions",
    "/v1/embeddings": "embeddings",
    "/v1/messages": "messages",
})
# Which dialects a provider of each format speaks by itself.
FORMAT_APIS = MappingProxyType({
    "openai": frozenset({"chat", "responses", "completions", "embeddings"}),
    "anthropic": frozenset({"messages"}),
    "echo": frozenset({"chat", "responses", "completions", "embeddings", "messages"}),
})
# Routes that count what the input of a call in an API would be.
COUNTING_ROUTES = MappingProxyType({
    "/v1/messages/count_tokens": "messages",
    "/v1/responses/input_tokens": "responses",
})
# Routes that cost nothing, since no model runs: (method, pattern). Where one does, it is free at
# the providers in a third place alone: OpenAI's moderations are (its guide, November 2026), others'
# have a price. Every other unmetered route is refused under a budget.
FREE_ROUTES: Sequence[tuple[str, ...]] = (
    ("GET", r"/v1/models"),
    ("GET", r"/v1/models/([A-Za-z0-9._:/-]|%2[Ff]|%3[Aa])+(?i:\[1m\]|%5b1m%5d)?"),
    ("POST", r"/v1/messages/count_tokens"),
    ("POST", r"/v1/responses/input_tokens"),
    ("POST", r"/v1/moderations", "openai"),
    ("GET", r"/v1/responses/[A-Za-z0-9_-]+"),
    ("DELETE", r"/v1/responses/[A-Za-z0-9_-]+"),
    ("POST", r"/v1/responses/[A-Za-z0-9_-]+/cancel"),
)
# What a path of ours can begin with, so that no provider may be named like it.
RESERVED_PROVIDERS = frozenset({
    "v1", "ironcage", "messages", "chat", "responses", "completions", "embeddings", "models",
    "healthz", "readyz",
})
# First match wins; a name that matches none goes to openai, as in the original.
MODEL_PREFIXES = (("claude", "anthropic"),)
ECHO_MODEL = "ironcage/echo"
MODEL_APIS = ("chat", "responses", "messages")      # in which one talks with a model

class Provider(NamedTuple):
    """Where calls go, with which key, and the manners of the server there.

    A cell that nobody has documented keeps its default. Each can be set in --config, by the names
    of PROVIDER_FIELDS.
    """
    name: str
    format: str                                # the dialect it speaks: a key of FORMAT_APIS
    base_url: str            # what stands before /chat/completions, or before /v1/messages
    key: Optional[str] = None
    key_env: str = ""                          # the environment variable that holds the key
    key_file: str = ""                         # the file that does, instead
    default_service_tier: str = "default"      # assumed where a request leaves it open
    max_output_tokens_per_s: Optional[int] = None      # None: by the tables of chapter 21
    is_free: bool = False                      # none of its models costs anything
    stream_usage: bool = True                  # it knows stream_options.include_usage
    key_as: str = ""                           # a key of KEY_HEADERS; "": as its format has it
    path: str = "/v1"                          # what a base URL without a path gets
    anthropic_base_url: str = ""               # of its endpoint in Anthropic's format, if any
    responses: bool = False                    # it speaks OpenAI's Responses
    caps: tuple[str, ...] = ("max_tokens",)    # of a chat completion, honoured; the first is set
    zero_is_a_cap: bool = False                # a cap of 0 is one, and not the same as none
    reasoning_beyond_caps: int = 0             # tokens of it that no cap of a chat or message holds
    file_tools: bool = False                   # it runs tools of its own over a file, for a fee
    sellers: bool = False                      # it sends a call to one of many, up to a max_price
    fields: Optional[tuple[str, ...]] = ()     # it knows beside OpenAI's and COMPATIBLE_FIELDS
    reasoning_field: str = ""                  # of a past answer that it wants its reasoning in
    user_after_tool: bool = True               # a user's message may follow a tool's
    cache_marks: bool = False                  # it takes Anthropic's cache_control on its parts
    call_ids: Optional[str] = None             # the form of a tool call's id; None: any text
    sold_as: tuple[str, ...] = ()              # further names in price tables, beside its own
    hosts: tuple[str, ...] = ()                # patterns of its further hosts
    is_named_only: bool = False                # used only where --config names it

    def __repr__(self) -> str:
        return f"<Provider {self.name} at {self.base_url}>"                 # without its key

    @property
    def host(self) -> str:
        """Return what a Host header says to it."""
        return _host_and_region(self.base_url)[0]

    @property
    def data_residency(self) -> Optional[str]:
        """Return "us", "eu" and the like for OpenAI's regional hosts, which cost more."""
        return _host_and_region(self.base_url)[1]

    @property
    def apis(self) -> frozenset:
        """Return the APIs that it speaks by itself."""
        without = {"responses"} if self.format == "openai" and not self.responses else set()
        return FORMAT_APIS[self.format] - without

    def speaking(self, api: Optional[str]) -> Provider:
        """Return it as it is called in an API: its other endpoint, where that speaks it."""
        if api != "messages" or not self.anthropic_base_url or self.format == "anthropic":
            return self
        return self._replace(format="anthropic", base_url=self.anthropic_base_url, key_as="")

    def url(self, path: str) -> str:
        """Return where a path of ours is called."""
        if self.format != "openai":
            return self.base_url + path
        if path.startswith("/v1/"):
            return self.base_url + path[len("/v1"):]
        return re.sub("/v1$", "", self.base_url) + path

    def credentials(self) -> dict[str, str]:
        """Return the headers that carry the key; none for a provider that needs no key."""
        if self.key is None:
            return {}
        usual = "both" if self.format == "anthropic" else "bearer"
        return {name: scheme + self.key for name, scheme in KEY_HEADERS[self.key_as or usual]}


KEY_HEADERS = MappingProxyType({
    "bearer": (("authorization", "Bearer "),),
    "x-api-key": (("x-api-key", ""),),
    "api-key": (("api-key", ""),),
    "both": (("authorization", "Bearer "), ("x-api-key", "")),
})
REGIONAL_HOST = r"(?i)https?://([a-z]{2})\.api\.openai\.com(?![\w.-])"


@functools.lru_cache(maxsize=64)
def _host_and_region(base_url: str) -> tuple[str, Optional[str]]:
    region = re.match(REGIONAL_HOST, base_url)
    return urllib.parse.urlsplit(base_url).netloc, region[1].lower() if region else None


ECHO_PROVIDER = Provider(name="ironcage", format="echo", base_url="")
# One with a key is used where its variable is set; the others, of which some are servers on this
# machine that cost nothing, only where the configuration names them. Names are LiteLLM's, as in
# price tables. No server was called: the rows say what was read on 2026-11-28 in the vendors' API
# references and SDKs (mistralai 3.7, groq 1.7, cerebras-cloud-sdk 1.91, together 3.1), the sources
# of vLLM 0.33, SGLang 0.5.23, Ollama and llama.cpp, in the clients litellm 1.110.2, pi-ai 1.6.0,
# vercel/ai and pydantic-ai (August 2026), and in reports of refusals.
# Caps: DeepSeek ignores max_completion_tokens (measured: 76 tokens where 5 were asked for), and so
# does Ollama; Mistral refuses it. A cap of 0 is none to servers that cannot see it from none.
# At DashScope, SiliconFlow and Volcengine max_tokens may cap the answer alone, by model (notice of
# DashScope's, 2 November 2026): the README says so, and `reasoning_beyond_caps` bounds it.
# Files: xAI adds a search of them to the call, a loop with a fee (docs.x.ai/developers/files), and
# OpenRouter reads them by a parser with a fee where the model cannot (its PDF guide).
# Sellers: OpenRouter prefers the cheapest and falls back to dearer ones, in all of its APIs, unless
# provider.max_price is set (its provider routing and API reference).
_BOTH_CAPS = ("max_completion_tokens", "max_tokens")
# Google's guides to the OpenAI libraries (Gemini, Vertex); what else stands there can cost more.
_GOOGLE_FIELDS = ("extra_body.google.thinking_config",)
KNOWN_PROVIDERS: Mapping[str, Provider] = MappingProxyType({row.name: row for row in (
    Provider("openai", "openai", "https://api.openai.com/v1", key_env="OPENAI_API_KEY",
             responses=True, caps=_BOTH_CAPS, zero_is_a_cap=True, fields=None,
             sold_as=("text-completion-openai",), hosts=("*.api.openai.com",)),
    Provider("anthropic", "anthropic", "https://api.anthropic.com", key_env="ANTHROPIC_API_KEY",
             key_as="x-api-key", zero_is_a_cap=True),
    Provider("azure", "openai", "", key_env="AZURE_OPENAI_API_KEY", path="/openai/v1",
             responses=True, caps=_BOTH_CAPS, zero_is_a_cap=True, fields=None,
             sold_as=("azure_text", "azure_ai"), hosts=("*.openai.azure.com",)),
    Provider("cerebras", "openai", "https://api.cerebras.ai/v1", key_env="CEREBRAS_API_KEY",
             caps=_BOTH_CAPS),
    Provider("dashscope", "openai", "https://dashscope-intl.aliyuncs.com/compatible-mode/v1",
             anthropic_base_url="https://dashscope-intl.aliyuncs.com/apps/anthropic",
             key_env="DASHSCOPE_API_KEY", path="/compatible-mode/v1", sold_as=("qwencloud",),
             cache_marks=True,
             hosts=("dashscope*.aliyuncs.com", "*.maas.aliyuncs.com")),
    Provider("deepseek", "openai", "https://api.deepseek.com/v1", key_env="DEEPSEEK_API_KEY",
             anthropic_base_url="https://api.deepseek.com/anthropic",
             reasoning_field="reasoning_content"),
    Provider("fireworks_ai", "openai", "https://api.fireworks.ai/inference/v1",
             anthropic_base_url="https://api.fireworks.ai/inference", path="/inference/v1",
             key_env="FIREWORKS_API_KEY", responses=True,
             sold_as=("fireworks_ai-embedding-models",)),
    Provider("gemini", "openai", "https://generativelanguage.googleapis.com/v1beta/openai",
             key_env="GEMINI_API_KEY", path="/v1beta/openai", fields=_GOOGLE_FIELDS),
    Provider("github", "openai", "https://models.github.ai/inference", key_env="GITHUB_TOKEN",
             path="/inference", sold_as=("github_models",), is_named_only=True),
    Provider("groq", "openai", "https://api.groq.com/openai/v1", key_env="GROQ_API_KEY",
             path="/openai/v1", responses=True, caps=_BOTH_CAPS),
    Provider("huggingface", "openai", "https://router.huggingface.co/v1", key_env="HF_TOKEN",
             responses=True, is_named_only=True),
    Provider("minimax", "openai", "https://api.minimax.io/v1", key_env="MINIMAX_API_KEY",
             anthropic_base_url="https://api.minimax.io/anthropic", hosts=("api.minimaxi.com",)),
    Provider("mistral", "openai", "https://api.mistral.ai/v1", key_env="MISTRAL_API_KEY",
             responses=True, stream_usage=False, user_after_tool=False,
             call_ids="[A-Za-z0-9]{9}"),
    Provider("moonshot", "openai", "https://api.moonshot.ai/v1", key_env="MOONSHOT_API_KEY",
             anthropic_base_url="https://api.moonshot.ai/anthropic", responses=True,
             reasoning_field="reasoning_content", hosts=("api.moonshot.cn", "api.kimi.com")),
    Provider("nvidia_nim", "openai", "https://integrate.api.nvidia.com/v1",
             key_env="NVIDIA_API_KEY"),
    Provider("openrouter", "openai", "https://openrouter.ai/api/v1", key_env="OPENROUTER_API_KEY",
             anthropic_base_url="https://openrouter.ai/api", path="/api/v1", responses=True,
             file_tools=True, sellers=True, cache_marks=True, hosts=("*.openrouter.ai",)),
    Provider("perplexity", "openai", "https://api.perplexity.ai", key_env="PERPLEXITY_API_KEY",
             path="", responses=True),
    Provider("sambanova", "openai", "https://api.sambanova.ai/v1", key_env="SAMBANOVA_API_KEY"),
    Provider("together_ai", "openai", "https://api.together.xyz/v1", key_env="TOGETHER_API_KEY",
             hosts=("api.together.ai",)),
    Provider("vertex", "openai", "", key_env="VERTEX_ACCESS_TOKEN", is_named_only=True,
             fields=_GOOGLE_FIELDS,
             sold_as=("vertex_ai", "vertex_ai-openai_models", "vertex_ai-language-models",
                      "vertex_ai-anthropic_models", "vertex_ai-embedding-models"),
             hosts=("*aiplatform.googleapis.com", "aiplatform.*.rep.googleapis.com")),
    Provider("volcengine", "openai", "https://ark.cn-beijing.volces.com/api/v3",
             key_env="ARK_API_KEY", path="/api/v3", responses=True),
    Provider("xai", "openai", "https://api.x.ai/v1", key_env="XAI_API_KEY", responses=True,
             file_tools=True),
    Provider("zai", "openai", "https://api.z.ai/api/paas/v4", key_env="ZAI_API_KEY",
             anthropic_base_url="https://api.z.ai/api/anthropic", path="/api/paas/v4",
             reasoning_field="reasoning_content", hosts=("open.bigmodel.cn",),
             sold_as=("bigmodel",)),
    Provider("deepinfra", "openai", "https://api.deepinfra.com/v1/openai",
             key_env="DEEPINFRA_API_KEY", path="/v1/openai"),
    Provider("novita", "openai", "https://api.novita.ai/v3/openai", key_env="NOVITA_API_KEY",
             anthropic_base_url="https://api.novita.ai/anthropic", path="/v3/openai"),
    Provider("siliconflow", "openai", "https://api.siliconflow.com/v1",
             key_env="SILICONFLOW_API_KEY", hosts=("api.siliconflow.cn",)),
    Provider("cohere", "openai", "https://api.cohere.ai/compatibility/v1", key_env="CO_API_KEY",
             path="/compatibility/v1", stream_usage=False, sold_as=("cohere_chat",)),
    Provider("ai21", "openai", "https://api.ai21.com/studio/v1", key_env="AI21_API_KEY",
             path="/studio/v1"),
    Provider("bedrock", "openai", "", sold_as=("bedrock_converse", "bedrock_mantle")),
    Provider("llamacpp", "openai", "http://127.0.0.1:8080/v1", is_free=True, responses=True,
             anthropic_base_url="http://127.0.0.1:8080", caps=_BOTH_CAPS, zero_is_a_cap=True,
             sold_as=("llamafile",)),
    Provider("lm_studio", "openai", "http://127.0.0.1:1234/v1", is_free=True, responses=True,
             anthropic_base_url="http://127.0.0.1:1234"),
    Provider("ollama", "openai", "http://127.0.0.1:11434/v1", is_free=True, responses=True,
             anthropic_base_url="http://127.0.0.1:11434"),
    Provider("sglang", "openai", "http://127.0.0.1:30000/v1", is_free=True, responses=True,
             anthropic_base_url="http://127.0.0.1:30000", caps=_BOTH_CAPS, zero_is_a_cap=True),
    Provider("vllm", "openai", "http://127.0.0.1:8000/v1", is_free=True, responses=True,
             anthropic_base_url="http://127.0.0.1:8000", caps=_BOTH_CAPS, zero_is_a_cap=True,
             sold_as=("hosted_vllm",)),
)})
# What else people call them.
PROVIDER_ALIASES = MappingProxyType({
    "azure_openai": "azure", "fireworks": "fireworks_ai", "github_models": "github",
    "google": "gemini", "hosted_vllm": "vllm", "kimi": "moonshot", "llama_cpp": "llamacpp",
    "lmstudio": "lm_studio", "mistralai": "mistral", "moonshotai": "moonshot",
    "nvidia": "nvidia_nim", "qwen": "dashscope", "together": "together_ai",
    "vertex_ai": "vertex", "x-ai": "xai", "z-ai": "zai",
})


@functools.lru_cache(maxsize=256)
def manners_of(name: str, base_url: str = "") -> Provider:
    """Return the row of a provider: by its name, else its manners by its host, else those of a
    server of which nothing is known."""
    row = KNOWN_PROVIDERS.get(PROVIDER_ALIASES.get(name, name))
    if row is not None:
        return row._replace(name=name)
    host = re.sub(r"\.?(:443)?$", "", _host_and_region(base_url)[0].lower())
    host = re.sub(r"^(localhost|\[::1\])(?=:)", "127.0.0.1", host)
    row = next((row for row in KNOWN_PROVIDERS.values() if host and any(
        fnmatch.fnmatchcase(host, known) for known in (row.host, *row.hosts))), None)
    if row is None:
        return Provider(name, "openai", "")
    return row._replace(name=name, base_url="", anthropic_base_url="", key_env="", is_free=False,
                        sold_as=(row.name, *row.sold_as))


def is_free_route(method: str, path: str, provider: Provider) -> bool:
    """Whether a route costs nothing at a provider: where that is one that is named, it has its host
    too, or one of the operator's own."""
    names = {provider.name, *provider.sold_as}
    host = urllib.parse.urlsplit(provider.base_url).hostname
    if host and not re.fullmatch(OWN_HOST, host):
        names = {*manners_of("", provider.base_url).sold_as}
    return any(known == method and re.fullmatch(pattern, path)
               and (provider.is_free or not there or not names.isdisjoint(there))
               for known, pattern, *there in FREE_ROUTES)


METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
BODY_METHODS = frozenset({"POST", "PUT", "PATCH"})     # of requests that say what is to be done
HOP_BY_HOP_HEADERS = frozenset({
    "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection",
    "te", "trailer", "transfer-encoding", "upgrade", "http2-settings",
})
# What browsers, and proxies on the way to us, say of this side, of who is there and how they let
# them in. Source: what Caddy, nginx, Cloudflare, AWS, Tailscale, oauth2-proxy add, November 2026.
LOCAL_HEADERS = frozenset({"forwarded", "via", "referer", "origin", "x-real-ip", "remote-user"})
LOCAL_HEADERS_BEGIN = ("x-forwarded-", "cf-", "x-amzn-oidc-", "x-auth-request-", "tailscale-")
LOCAL_HEADERS_END = "-client-ip"
# Beside those: the client's credentials and cookies, and what the sender writes itself.
REQUEST_HEADERS_KEPT_BACK = HOP_BY_HOP_HEADERS | LOCAL_HEADERS | {
    "host", "content-length", "content-encoding", "accept-encoding", "expect",
    "authorization", "x-api-key", "api-key", "cookie",
}
ANSWER_HEADERS_KEPT_BACK = HOP_BY_HOP_HEADERS | {
    "content-length", "set-cookie", "set-cookie2", "x-accel-buffering"}
OWN_HEADERS = "x-ironcage-"               # they say what we say, in either direction
KEPT_BACK_BEGIN = (OWN_HEADERS, *LOCAL_HEADERS_BEGIN)
VENDOR_HEADER = re.compile(r"(anthropic|openai|x-stainless|x-claude|x-codex|x-app)(-|$)|"
                           r"content-type$")
# Rate-limit headers: (Anthropic's, OpenAI's). A reset is a time for one, a duration for the other.
RATE_LIMIT_HEADERS = tuple(
    (f"anthropic-ratelimit-{what}-{amount}", f"x-ratelimit-{amount}-{what}")
    for what in ("requests", "tokens") for amount in ("limit", "remaining", "reset"))
REWRITTEN_HEADERS = frozenset({"content-type", "content-encoding", "x-request-id", "request-id"})
# Headers by which a call becomes another one, or costs more than its body says: (pattern, values
# that do not). Priority and optimized latency have prices of their own, guardrails a fee, and a
# spillover goes to another deployment. Sources: the guides of Vertex AI (Priority and Flex PayGo),
# Bedrock (service tiers, latency, guardrails) and Azure (spillover), read in November 2026.
COSTLY_HEADERS = (
    (r"x-http-method(-override)?|x-method-override|x-(original|rewrite)-url", ""),
    (r"x-vertex-ai-llm-(shared-)?request-type", "dedicated|shared|standard|flex"),
    (r"(.*-)?service-?tier", "default|standard|flex|reserved"),
    (r"x-amzn-bedrock-performanceconfig.*", "standard"),
    (r"x-amzn-bedrock-guardrail.*|x-ms-spillover-.*", ""),
)
COSTLY_HEADER = re.compile("\n({})(?=\n)".format("|".join(name for name, _ in COSTLY_HEADERS)))
# Headers that choose an account, or a project of it, whose defaults are not the key's: OpenAI's
# projects have a default service tier (its reference, project service tier settings, 2026-11-28).
ACCOUNT_HEADER = re.compile(
    r"\n(?!x-ironcage-)([\w-]+-)?(account|org|organization|project|tenant|workspace)"
    r"(-(id|key|name|number|slug))?\n")
# In a query: what Google's APIs take for headers, and others for another method.
COSTLY_QUERY = r"(?i)(_|http-?)method(-override)?\s*=|httpheaders\s*="
DEFAULT_ANTHROPIC_VERSION = "2023-06-01"

LOOPBACK_HOST = re.compile(r"localhost|127(\.\d{1,3}){3}|\[::1\]|::1", re.IGNORECASE)
# Hosts that nobody else serves: private and link-local addresses (RFC 1918, 3927, 4193, 6598), and
# names that no public DNS has.
OWN_HOST = (
    "(?i)" + LOOPBACK_HOST.pattern +
    r"|0\.0\.0\.0|(10\.\d{1,3}|192\.168|169\.254|172\.(1[6-9]|2\d|3[01])"
    r"|100\.(6[4-9]|[7-9]\d|1[01]\d|12[0-7]))(\.\d{1,3}){2}"
    r"|(f[cd][\da-f]{2}|fe[89ab][\da-f]):[\da-f:]*"
    r"|[a-z][\w-]*|[\w.-]+\.(localhost|local|lan|internal|home\.arpa)")
PRINTABLE_NAME = re.compile(r"[A-Za-z0-9_.:/@+\[\]-]{1,128}")
UNPRINTABLE = r"[^ -~]"


# ==== 2. Errors =================================================================================
#
# One class for each thing that a caller would do differently. An error knows its HTTP status and
# its names in both dialects, so that handlers never guess. A message says what happened, the
# value, and what to do; it never holds a secret, a prompt or an answer.
# Sources: OpenAI and Anthropic error references; the 402 types are the original's (iron_runtime).


# Status -> type in Anthropic's words.
ANTHROPIC_ERRORS = MappingProxyType({
    400: "invalid_request_error", 401: "authentication_error", 402: "billing_error",
    403: "permission_error", 404: "not_found_error", 409: "conflict_error",
    413: "request_too_large", 429: "rate_limit_error", 504: "timeout_error",
    529: "overloaded_error",
})


def anthropic_error_type(status: int) -> str:
    """Return the type that an error of a status has in Anthropic's words."""
    return ANTHROPIC_ERRORS.get(status, "api_error" if status >= 500 else "invalid_request_error")


class IroncageError(Exception):
    """A request that we end ourselves.

    `param` names the field at fault, `details` becomes `error.ironcage` in the body, `headers`
    are sent along. `must_close` says that the connection cannot be used for another request.
    `model` is what the request asked for, once that is known. A class below is a row: a cell that
    it does not state is its base's; the code of an iron_cage_ type is the rest of that.
    """
    status = 500
    openai_type = "server_error"
    openai_code: Optional[str] = "internal_error"
    anthropic_details: Optional[Mapping[str, Any]] = None    # what their SDKs act on
    must_close = False
    model: Optional[str] = None

    def __init_subclass__(cls, *, status: Optional[int] = None, code: Optional[str] = None,
                          type: Optional[str] = None, closes: Optional[bool] = None) -> None:
        cls.status = status or cls.status
        cls.openai_type = type or cls.openai_type
        own_code = type[10:] if type and type.startswith("iron_cage_") else None
        cls.openai_code = code or own_code or cls.openai_code
        cls.must_close = cls.must_close if closes is None else closes

    def __init__(self, message: str, *, param: Optional[str] = None,
                 details: Optional[Mapping[str, Any]] = None,
                 headers: Sequence[tuple[str, str]] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.details = details
        self.headers = tuple(headers)

    @property
    def anthropic_type(self) -> str:
        """Its type in Anthropic's words, in which to be overloaded is a status of its own."""
        return anthropic_error_type(529 if self.openai_code == "overloaded" else self.status)


# fmt: off  (one class after the other reads as the table that it is)
class BadRequest(IroncageError, status=400, type="invalid_request_error"):
    """The request itself is at fault; sent again unchanged it fails again."""
    openai_code: Optional[str] = None
class MalformedHttp(BadRequest, code="malformed_http", closes=True):
    """Bytes that are not one clear HTTP/1.1 message."""
class Unauthorized(BadRequest, status=401, code="invalid_api_key", closes=True):
    """No token, or none that is known and valid."""
class Forbidden(BadRequest, status=403, code="permission_denied", closes=True):
    """What this token, or any under this Host name, may not do."""
class NotFound(BadRequest, status=404, code="not_found"):
    """No route, or thing, of ours."""
class MethodNotAllowed(BadRequest, status=405, code="method_not_allowed"):
    """The path does not take this method."""
class UnknownMethod(MethodNotAllowed, closes=True):
    """No path takes it, so that it is not known what follows."""
class RequestTimedOut(BadRequest, status=408, code="request_timeout", closes=True):
    """The client was too slow with its request."""
class LengthRequired(BadRequest, status=411, code="length_required", closes=True):
    """A body of no stated length."""
class BodyTooLarge(BadRequest, status=413, code="request_too_large", closes=True):
    """A body beyond --max-body-mb or the memory for all."""
class UnsupportedBody(BadRequest, status=415, code="unsupported_media_type", closes=True):
    """A body of a type or an encoding that is not read."""
class UpgradeRefused(BadRequest, status=426, code="upgrade_refused", closes=True):
    """Another protocol is asked for, such as websockets."""
class UnpricedModel(BadRequest, type="iron_cage_unpriced_model"):
    """No price is known, so no cost can be bounded."""
class UnmeteredRoute(BadRequest, type="iron_cage_unmetered_route"):
    """A route whose cost we cannot read, under a budget."""
class UnboundedRequest(BadRequest, type="iron_cage_unbounded_request"):
    """A request whose worst case cannot be known, likewise."""
class ThreadRefused(BadRequest, code="thread_unsupported_request"):
    """A stored conversation, in place of which the SDKs then send the whole history."""
    anthropic_details = MappingProxyType({
        "error_code": "thread_unsupported_request", "unsupported": ("thread",)})
class NoProviderKey(BadRequest, type="iron_cage_no_provider_key"):
    """The provider's key is not set, or is another provider's."""
class UnknownProvider(BadRequest, type="iron_cage_unknown_provider"):
    """The model names a provider that is not set up."""
class Untranslatable(BadRequest, code="unsupported_dialect"):
    """The model's provider does not speak the path's dialect."""
class ModelForbidden(BadRequest, status=403, code="model_not_allowed"):
    """The caller's token is not for this model."""
class TooManyRequests(BadRequest, status=429, type="rate_limit_error", code="rate_limit_exceeded",
                      closes=True):
    """The caller's own limits are reached; the body is not read."""
class BudgetExceeded(BadRequest, status=402, type="iron_cage_budget_exceeded"):
    """Nothing is left."""
class InsufficientBudget(BudgetExceeded, type="iron_cage_insufficient_budget"):
    """Something is left, but the worst case does not fit."""
class ProxyFailed(IroncageError, closes=True):
    """A fault of ours."""
class ServerBusy(IroncageError, status=503, code="overloaded", closes=True):
    """No room, or the proxy is stopping; later it may work."""
class LedgerUnavailable(IroncageError, status=503, type="iron_cage_ledger_unavailable"):
    """What cannot be written down is not sent."""
class CageServerFailed(IroncageError, status=502, type="iron_cage_server_failed"):
    """No key, or no lease of budget, came from the Iron Cage server."""
    is_final = False                      # it said no, rather than nothing
class UpstreamError(IroncageError):
    """The provider's side failed. `may_be_billed`: it may have begun to work on the request."""
    may_be_billed = True
class UpstreamBroke(UpstreamError, status=502, code="upstream_broke"):
    """An answer that ends early, or is none."""
class UpstreamUnreachable(UpstreamError, status=502, code="upstream_unreachable"):
    """No connection was made."""
    may_be_billed = False
class UpstreamRedirected(UpstreamError, status=502, code="upstream_redirected"):
    """A redirect, which is never followed."""
    may_be_billed = False
class UpstreamTimedOut(UpstreamError, status=504, code="upstream_timeout"):
    """The provider was silent for too long."""
class UpstreamConnectTimedOut(UpstreamTimedOut):
    """Likewise, before anything was sent."""
    may_be_billed = False
# fmt: on


class ClientGone(Exception):
    """The client hung up or stopped reading; there is nobody to answer."""


class Misconfigured(Exception):
    """Settings that cannot be served with; the message is one line for the command line."""


class Housekeeper(threading.Thread):
    """A thread without which nothing may be served: `on_fault` is called if a fault ends it."""

    def __init__(self, name: str, work: Callable[[], None],
                 on_fault: Callable[[str], None]) -> None:
        super().__init__(name=name, daemon=True)
        self._work, self._on_fault = work, on_fault

    def run(self) -> None:
        """Do the work. SystemExit is a fault too: threads end by it without a word."""
        try:
            self._work()
        except BaseException:
            self._on_fault(self.name)


@contextlib.contextmanager
def checking(what: str) -> Iterator[None]:
    """Raise a ValueError of a check as Misconfigured, behind `what` it is about."""
    try:
        yield
    except ValueError as err:
        raise Misconfigured(f"{what} {err}") from None


def _reason(err: BaseException) -> str:
    """Return why a connection failed, in words; of an exception without words, its name."""
    return getattr(err, "strerror", None) or str(err) or type(err).__name__


def shown_name(name: str) -> str:
    """Return a name from outside as it may stand in a message or a header."""
    return name if PRINTABLE_NAME.fullmatch(name) else "?"


def split_path(path: str) -> tuple[str, str]:
    """Return the provider that a path's first segment may name, or "", and the path behind it.

    A route of ours comes out as providers spell it, with one /v1, however many it came with:
    clients differ in what they put behind a base URL. Any other path stays as it is.
    """
    first, has_rest, rest = path[1:].partition("/")
    named = first if has_rest and first not in RESERVED_PROVIDERS else ""
    behind = "/" + rest if named else path
    if behind in METERED_APIS:
        return named, behind
    route = "/v1" + re.sub("^(/v1(?=/))+", "", behind)
    is_ours = route in METERED_APIS or any(re.fullmatch(row[1], route) for row in FREE_ROUTES)
    return named, route if is_ours else behind


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a hint at the known name that is nearest to a wrong one; "" where none is near."""
    if not PRINTABLE_NAME.fullmatch(name):       # of megabytes, to compare took seconds, and more
        return ""
    import difflib               # here only: few need it
    near = difflib.get_close_matches(name, list(known), 1)
    return f" (did you mean {shown_name(near[0])}?)" if near else ""


def dialect_of(path: str, headers: Mapping[str, str] = MappingProxyType({})) -> str:
    """Return the dialect in which a client of `path` reads errors: "anthropic" or "openai". Of
    routes that both vendors have, it is said by a header of Anthropic's clients."""
    route = re.fullmatch(r"/*([^/]+/)??(v1/)*(messages|models|files)(/.*)?", path)
    is_anthropic = route and (route[3] == "messages" or "anthropic-version" in headers)
    return "anthropic" if is_anthropic else "openai"


def error_object(error: IroncageError, dialect: str, request_id: str) -> dict:
    """Return the JSON body of an error in a dialect.

    Shape: OpenAI {"error": {message, type, param, code}}; Anthropic {"type": "error",
    "error": {type, message, details}, "request_id"}. `ironcage` is added where there are details.
    """
    extra: dict = {} if error.details is None else {"ironcage": dict(error.details)}
    if dialect == "anthropic":
        if error.openai_type.startswith("iron_cage_"):
            extra["code"] = error.openai_type
        if error.anthropic_details is not None:
            extra["details"] = dict(error.anthropic_details)
        return {"type": "error", "request_id": request_id,
                "error": {"type": error.anthropic_type, "message": error.message, **extra}}
    return {"error": {"message": error.message, "type": error.openai_type,
                      "param": error.param, "code": error.openai_code, **extra}}


# ==== 3. JSON bodies ============================================================================
#
# Request bodies are read once, strictly, and changed by splicing: the fields that the budget must
# set are written into the client's own text, and every other byte stays. What two parsers could
# read differently is refused here, so that what we bound is what the provider reads.


# A string this long of nothing but such bytes needs no parser. Images come so, in the source or
# the URL of a part; screenshots are nearly all of what computer-using agents send at each turn.
LEAST_DATA_BYTES = 4096
DATA_SLICE_BYTES = 64 * 1024     # looked at at a time: what is larger leaves the processor's cache
_DATA_BYTES = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/=_-"
_DATA_WORD = re.compile(rb"(data[0-9a-f]{22})")
_DATA_URL_START = re.compile(rb"(data:[A-Za-z0-9/+.;=-]{1,128},)?")


class JsonBody:
    """A JSON object as received: its bytes and its fields."""

    def __init__(self, raw: bytes, fields: Mapping[str, Any], text: Optional[bytes] = None,
                 data: Mapping[bytes, tuple[str, memoryview]] = MappingProxyType({})) -> None:
        self.raw = raw                        # UTF-8
        # The same, with a word for each of `data`; without data, with blanks for what is no JSON.
        self.text = raw if text is None else text
        self.data = data                      # word -> long string of data, and its bytes in `raw`
        self.data_bytes = {id(string): part for string, part in data.values()}    # in `fields`
        self.fields = fields
        self.contents: Optional[Contents] = None        # see contents_of()

    def spliced(self, changes: Mapping[str, Any],
                without: frozenset = frozenset()) -> list[bytes]:
        """Return the bytes, in pieces, with some fields set and others left out: all else stays as
        it was, but for the white space where a field goes, and is not copied."""
        text, inside = memoryview(self.text if self.data else self.raw), self.text.index(b"{") + 1
        new = {name: value for name, value in changes.items() if name not in self.fields}
        added = _written(new)[1:-1] if new else b""
        pieces = [text[:inside], added, b"," if added and self.fields.keys() - without else b""]
        done, is_first, left = inside, True, self.fields.keys() & {*changes, *without}
        for name, at, start, end in _members(self.text) if left else ():
            if name not in without:           # what stands before the first has no comma
                pieces += [text[done:at] if done == inside or not is_first else b"", text[at:start],
                           _written(changes[name]) if name in changes else text[start:end]]
                is_first = False
            done = end
            left.discard(name)
            if not left and not is_first:     # behind it all stays
                break
        pieces.append(text[done:])
        if not self.data:
            return pieces
        return [self.data[part][1] if part in self.data else part
                for piece in pieces for part in _DATA_WORD.split(piece)]


_scan_json = json.JSONDecoder().scan_once          # type: ignore[attr-defined]
_json_sign = re.compile(r"[ \t\n\r]*[{,:}][ \t\n\r]*").match


def _members(text: bytes) -> Iterator[tuple[str, int, int, int]]:
    """Yield (name, where it stands, where its value does, its end) of each member of an object that
    is known to be JSON, or the first of a list that is."""
    chars = str(text, "latin-1")              # a character a byte, so that places are the same
    at = _json_sign(chars, chars.index("{")).end()
    while chars.startswith('"', at):
        behind = _scan_json(chars, at)[1]
        start = _json_sign(chars, behind).end()
        end = _scan_json(chars, start)[1]
        yield json.loads(text[at:behind]), at, start, end
        at = _json_sign(chars, end).end()


def _written(value: Any) -> bytes:
    return json.dumps(value).encode("ascii")


def _object_without_duplicates(pairs: list) -> dict:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise BadRequest("the request body has the same key twice in one JSON object")
    return result


def _bounded_integer(digits: str) -> int:
    if len(digits.lstrip("-")) > MAX_INTEGER_DIGITS:
        raise BadRequest(f"the request body has an integer of more than {MAX_INTEGER_DIGITS} "
                         "digits")
    return int(digits)


def _finite_number(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise BadRequest("the request body has a number too large for a parser to hold")
    return number


def _no_constant(name: str) -> Any:
    raise BadRequest(f"the request body contains {name}, which is not JSON")


def _decoder(hook: Callable[[list], dict]) -> json.JSONDecoder:
    return json.JSONDecoder(object_pairs_hook=hook, parse_int=_bounded_integer,
                            parse_float=_finite_number, parse_constant=_no_constant)


_STRICT_JSON = _decoder(_object_without_duplicates)


def _data_spans(raw: bytes) -> Iterator[tuple[int, int]]:
    """Yield where the long strings of data in a body stand, each the value of a member.

    Only one byte in each LEAST_DATA_BYTES is looked at, for the quotes around it.
    """
    at, end = LEAST_DATA_BYTES, 0
    while at < len(raw):
        start, end = raw.rfind(b'"', end, at) + 1, raw.find(b'"', at)
        if end < 0:
            return
        if end - start >= LEAST_DATA_BYTES and raw[start - 8:start - 1].rstrip().endswith(b":"):
            first = _DATA_URL_START.match(raw, start).end()
            edges = [first, *range(first + 64, end, DATA_SLICE_BYTES), end]
            if not any(raw[one:other].translate(None, _DATA_BYTES)
                       for one, other in zip(edges, edges[1:])):
                yield start, end
        at = end + LEAST_DATA_BYTES


def _set_aside(raw: bytes) -> tuple[bytes, dict[bytes, tuple[str, memoryview]], json.JSONDecoder]:
    """Return a body with a word for each long string of data, the data by its word, and what
    decodes that."""
    spans = [*_data_spans(raw)]
    if not spans:
        return raw, {}, _STRICT_JSON
    view, mark, done = memoryview(raw), secrets.token_hex(8), 0           # that no client can know
    pieces: list = []
    words: dict[str, tuple[str, memoryview]] = {}
    for start, end in spans:
        word, data = f"data{mark}{len(words):06x}", view[start:end]
        words[word] = str(data, "ascii"), data
        pieces += [view[done:start], word.encode()]
        done = end
    decoder = _decoder(lambda pairs: _object_without_duplicates(
        [(name, words[value][0] if type(value) is str and value in words else value)
         for name, value in pairs]))
    return b"".join([*pieces, view[done:]]), {
        word.encode(): row for word, row in words.items()}, decoder


COUNTED_BYTES = 64 * 1024        # of a longer text to count the brackets takes longer than to walk


def _is_too_deep(value: Any, text: bytes) -> bool:
    """Whether a value, read from a text, is nested deeper than MAX_JSON_DEPTH."""
    return (len(text) > COUNTED_BYTES or text.count(b"{") + text.count(b"[") > MAX_JSON_DEPTH) \
        and _nested_deeper_than(value, MAX_JSON_DEPTH)


def _nested_deeper_than(value: Any, depth: int) -> bool:
    level = [value]
    for _ in range(depth):
        level = [child for parent in level
                 for child in (parent.values() if isinstance(parent, dict) else parent)
                 if isinstance(child, (dict, list))]
        if not level:
            return False
    return True


# What a parser makes of JSON, in bytes, measured with Python 3.9 to 3.13: the most for each mark of
# its structure, also of those that stand in strings; and for each byte of text, by its widest
# character, twice: in the text as it is decoded and in the strings.
BYTES_OF_MARKS = ((b"[", 96), (b"{", 256), (b",", 80), (b":", 256))
_NO_MARKS = bytes(set(range(256)) - set(b"[{,:"))
_WIDE_STARTS = b"\xf0\xf1\xf2\xf3\xf4"


def bytes_to_parse(text: bytes) -> int:
    """Return the most memory that parsing takes. Raises BadRequest beyond MAX_JSON_VALUES."""
    marks = text.translate(None, _NO_MARKS)
    if len(marks) - marks.count(b":") > MAX_JSON_VALUES:
        raise BadRequest(f"the request body may hold more than {MAX_JSON_VALUES} values: so "
                         "many commas and opening brackets are in it")
    width = 1 if text.isascii() else 4 if any(first in text for first in _WIDE_STARTS) else 2
    return 2 * width * len(text) + len(marks) * 64 * (width > 1) \
        + sum(marks.count(mark) * size for mark, size in BYTES_OF_MARKS)


def parse_json_object(raw: bytes, hold: Callable[[int], Any] = abs) -> JsonBody:
    """Read a request body strictly; `hold` is called with the memory that this takes beyond it.

    Raises: BadRequest for what is not UTF-8, not JSON, not an object, or ambiguous (byte-order
    mark, duplicate keys at any depth, NaN, Infinity, huge integers, nesting beyond 200) or
    would hold up others (more than MAX_JSON_VALUES); what `hold` raises.
    """
    text, data, decoder = _set_aside(raw)
    hold(bytes_to_parse(text) + len(raw) - len(text))
    try:
        fields = decoder.decode(str(text, "utf-8"))
    except UnicodeDecodeError as err:
        raise BadRequest(f"the request body is not UTF-8 (byte {err.start})") from None
    except RecursionError:
        raise BadRequest(f"the request body is nested deeper than {MAX_JSON_DEPTH}") from None
    except json.JSONDecodeError as err:
        raise BadRequest(f"the request body is not JSON: {err}") from None
    if not isinstance(fields, dict):
        raise BadRequest("the request body must be a JSON object")
    if _is_too_deep(fields, text):
        raise BadRequest(f"the request body is nested deeper than {MAX_JSON_DEPTH}")
    return JsonBody(raw, fields, text, data)


def optional_count(fields: Mapping[str, Any], name: str, *, least: int = 0,
                   most: int = 10 ** 9) -> Optional[int]:
    """Return a whole number of the fields; absent and null are None. Raises BadRequest."""
    value = fields.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise BadRequest(f"{name} must be a whole number from {least} to {most}", param=name)
    return value


def optional_flag(fields: Mapping[str, Any], name: str) -> bool:
    """Return a boolean of the fields; absent and null are False. Raises BadRequest."""
    value = fields.get(name)
    if value is not None and not isinstance(value, bool):
        raise BadRequest(f"{name} must be true or false", param=name)
    return bool(value)


def json_object(value: Any) -> dict:
    """Return a value that should be an object; an empty one where it is something else."""
    return value if isinstance(value, dict) else {}


def _json_writer(**style: Any) -> Callable[[Any], str]:
    """Return what writes JSON. NaN and Infinity, which some providers send and no client reads,
    become null."""
    encode = json.JSONEncoder(allow_nan=False, **style).encode     # json.dumps makes one a call

    def write(value: Any) -> str:
        try:
            return encode(value)
        except ValueError:
            return encode(json.loads(json.dumps(value), parse_constant=lambda name: None))
    return write


compact_json = _json_writer(separators=(",", ":"))
plain_json = _json_writer(ensure_ascii=False)


def json_bytes(value: Any) -> bytes:
    """Write JSON as we send it: compact, ASCII only."""
    return compact_json(value).encode("ascii")


# ==== 4. Money ==================================================================================
#
# Amounts are int microdollars (1 USD = 1,000,000). Rates are picodollars (1e-12 USD) per token:
# int where whole, as every price of OpenAI and Anthropic is, else Fraction. Sums are exact and are
# rounded up once, at the end. No float comes near. This chapter is pure, but for load().
# Sources: the price table is LiteLLM's format (pricing.json says which version); how usage turns
# into buckets follows the providers' usage and pricing references, read November 2026.

PICODOLLARS_PER_USD = 10 ** 12
PICODOLLARS_PER_MICRODOLLAR = 10 ** 6
MICRODOLLARS_PER_USD = 10 ** 6
MOST_USD = 10 ** 12               # in one amount or price; more is a slip

Rate = Union[int, Fraction]
_USD = r"\+?([0-9]{1,13}(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]{1,3})?"
_LIKE_USD = r"[-+$.,0-9eE ]{0,20}( USD)?"          # what is refused and may be shown: no secret


def parse_usd(value: Any) -> int:
    """Return microdollars of a USD amount (str, int, Decimal, float by its repr), rounded down.

    Raises: ValueError when it is not a finite number >= 0.
    """
    text = str(value).strip()
    if isinstance(value, bool) or not re.fullmatch(_USD, text) or Decimal(text) > MOST_USD:
        shown = repr(text) if re.fullmatch(_LIKE_USD, text) else "this"
        raise ValueError(f"{shown} is not an amount in USD from 0 up")
    return int(Fraction(text) * MICRODOLLARS_PER_USD)


def exact_number(text: str) -> Union[Decimal, str]:
    """Read a JSON number as it is written. One that no price or amount can be stays text, and is
    refused where it is used: to compute with an exponent of many digits would take for ever."""
    is_usual = re.fullmatch(r"-?[0-9]{1,40}(\.[0-9]{1,80})?([eE][+-]?[0-9]{1,2})?", text)
    return Decimal(text) if is_usual else text


def exact_integer(digits: str) -> Union[int, str]:
    """Read a whole number likewise: reading one of many digits takes long, or is refused."""
    return int(digits) if len(digits) <= 40 else digits


def format_usd(microdollars: int) -> str:
    """Return "$1.25", "$0.000301": at least two decimals, at most six, exact."""
    sign = "-" if microdollars < 0 else ""
    whole, rest = divmod(abs(microdollars), MICRODOLLARS_PER_USD)
    decimals = f"{rest:06d}".rstrip("0").ljust(2, "0")
    return f"{sign}${whole}.{decimals}"


class MalformedUsage(ValueError):
    """A provider's usage object holds something that is not a token count."""


# What a call is billed by: (bucket of tokens, its price key, the bucket whose rate it takes where
# a row has no price of its own). Buckets do not overlap; cache writes are split by lifetime.
BUCKETS = (
    ("input", "input_cost_per_token", None),
    ("cache_read", "cache_read_input_token_cost", "input"),
    ("cache_write", "cache_creation_input_token_cost", "input"),           # 5 or 30 minutes
    ("cache_write_1h", "cache_creation_input_token_cost_above_1hr", "cache_write"),
    ("cache_write_12h", "cache_creation_input_token_cost_above_12hr", "cache_write"),
    ("audio_input", "input_cost_per_audio_token", "input"),
    ("audio_read", "cache_read_input_audio_token_cost", "audio_input"),
    ("image_input", "input_cost_per_image_token", "input"),
    ("image_read", "cache_read_input_image_token_cost", "image_input"),
    ("output", "output_cost_per_token", None),
    ("reasoning", "output_cost_per_reasoning_token", "output"),
    ("audio_output", "output_cost_per_audio_token", "output"),
    ("image_output", "output_cost_per_image_token", "output"),
)
PRICE_KEYS = MappingProxyType({bucket: key for bucket, key, _ in BUCKETS})
INPUT_PRICE, OUTPUT_PRICE = PRICE_KEYS["input"], PRICE_KEYS["output"]
READ_BUCKETS = ("cache_read", "audio_read", "image_read")
UNWRITTEN_BUCKETS = (*READ_BUCKETS, "input", "audio_input", "image_input")     # of the input
# Kinds of tokens -> the buckets that hold those of each of theirs where usage has no such kind.
HIDDEN_IN: Mapping[str, Mapping[str, str]] = MappingProxyType({
    "audio_input": {"audio_input": "input", "audio_read": "cache_read"},
    "image_input": {"image_input": "input", "image_read": "cache_read"},
    "audio_output": {"audio_output": "output"}, "image_output": {"image_output": "output"}})


class Usage(NamedTuple):
    """What a provider reports of one call: bills, rows, events and metrics take their counts here.
    """
    prompt_tokens: int                  # everything read, cached or not: thresholds look at it
    completion_tokens: int              # everything written, reasoning and audio included
    searches: int                       # web searches, where usage counts them
    buckets: Mapping[str, int]          # the tokens, as they are billed
    parts: Sequence[tuple[Optional[str], Usage]] = ()     # (model, usage) that are billed apart

    @property
    def cached_tokens(self) -> int:
        return sum([self.buckets.get(bucket, 0) for bucket in READ_BUCKETS])


def _count(holder: Any, name: str, *, is_required: bool = False) -> int:
    """Return a count in a usage object; absent and null are 0. Raises MalformedUsage."""
    value = holder.get(name) if isinstance(holder, dict) else None
    if value is None and not is_required:
        return 0
    if type(value) is not int or not 0 <= value < MOST_TOKENS:
        raise MalformedUsage(f"{name} is not a token count")
    return value


def usage_from_openai(usage: Mapping[str, Any], prompt_name: str = "prompt_tokens",
                      completion_name: str = "completion_tokens") -> Usage:
    """Read usage of OpenAI's format: cached, audio and image tokens are inside prompt_tokens.

    Where it is not reported which tokens were cached, those of images were not. Audio and images
    have buckets only where they are reported: a seller that leaves them out may have had some.
    """
    prompt = _count(usage, prompt_name, is_required=True)
    completion = _count(usage, completion_name, is_required=True)
    completion += max(0, _count(usage, "total_tokens") - prompt - completion)    # xAI's reasoning
    read, made = (json_object(usage.get(f"{name}_details"))
                  for name in (prompt_name, completion_name))
    if not read and not made:
        return Usage(prompt, completion, 0, {"input": prompt, "output": completion})
    cached, audio = _count(read, "cached_tokens"), _count(read, "audio_tokens")
    written, of_cached = _count(read, "cache_write_tokens"), read.get("cached_tokens_details")
    written_12h = min(written, _count(read.get("cache_write_tokens_details"), "ttl_12h_tokens"))
    audio_read = min(cached, audio, max(_count(of_cached, "audio_tokens"),
                                        audio - max(0, prompt - cached - written)))
    image_read = min(cached - audio_read, _count(of_cached, "image_tokens"))
    plain = max(0, prompt - cached - written - (audio - audio_read))
    seen = min(plain, max(0, _count(read, "image_tokens") - image_read))
    spoken = min(completion, _count(made, "audio_tokens"))
    drawn = min(completion - spoken, _count(made, "image_tokens"))
    reasoned = min(completion - spoken - drawn, _count(made, "reasoning_tokens"))
    reported = {"audio_input": (audio - audio_read, read.get("audio_tokens")),
                "image_input": (seen, read.get("image_tokens")),
                "audio_output": (spoken, made.get("audio_tokens")),
                "image_output": (drawn, made.get("image_tokens"))}
    return Usage(prompt, completion, 0, {
        "input": plain - seen, "cache_read": cached - audio_read - image_read,
        "cache_write": written - written_12h, "cache_write_12h": written_12h,
        "audio_read": audio_read, "image_read": image_read,
        "output": completion - spoken - drawn - reasoned, "reasoning": reasoned,
        **{bucket: count for bucket, (count, of) in reported.items() if of is not None}})


def usage_from_anthropic(usage: Mapping[str, Any]) -> Usage:
    """Read usage of Messages: cached and written tokens are outside input_tokens, and are added.

    `cache_creation` splits the writes by lifetime; what it leaves open is taken as 5 minutes.
    """
    plain = _count(usage, "input_tokens", is_required=True)
    read = _count(usage, "cache_read_input_tokens")
    split = usage.get("cache_creation")
    written_1h = _count(split, "ephemeral_1h_input_tokens")
    written = max(_count(usage, "cache_creation_input_tokens"),
                  written_1h + _count(split, "ephemeral_5m_input_tokens"))
    output = _count(usage, "output_tokens", is_required=True)
    reasoned = min(output, _count(usage.get("output_tokens_details"), "thinking_tokens"))
    searches = _count(usage.get("server_tool_use"), "web_search_requests")
    return Usage(plain + read + written, output, searches, {
        "input": plain, "cache_read": read, "cache_write": written - written_1h,
        "cache_write_1h": written_1h, "output": output - reasoned, "reasoning": reasoned})


USAGE_READERS: Mapping[str, Callable[[Mapping[str, Any]], Usage]] = MappingProxyType({
    "chat": usage_from_openai,
    "completions": usage_from_openai,
    "embeddings": lambda usage: usage_from_openai({"completion_tokens": 0, **usage}),
    "responses": lambda usage: usage_from_openai(usage, "input_tokens", "output_tokens"),
    "messages": usage_from_anthropic,
})
NO_TOKENS: Mapping[str, int] = dict.fromkeys(
    ("prompt_tokens", "completion_tokens", "input_tokens", "output_tokens"), 0)
MOST_TOKENS = 10 ** 12            # in one count of one call; more is an error of the provider
MOST_ITERATIONS = 1_000           # of one call, likewise


def usage_of(api: str, stated: Mapping[str, Any]) -> Usage:
    """Read a provider's usage object. Raises MalformedUsage.

    Anthropic's `iterations`, where present and not less, hold all that was billed (compaction and
    advisor turns are missing in the top-level counts), each at its own model's price.
    """
    read, iterations = USAGE_READERS[api], stated.get("iterations")
    if api != "messages" or not isinstance(iterations, list) or not iterations:
        return read(stated)
    if len(iterations) > MOST_ITERATIONS:
        raise MalformedUsage("there are too many iterations")
    whole = read({**NO_TOKENS, **stated})
    parts = [(entry["model"][:MAX_MODEL_CHARS] if isinstance(entry.get("model"), str) else None,
              read(entry)) for entry in map(json_object, iterations)]
    prompt = sum([part.prompt_tokens for _, part in parts])
    completion = sum([part.completion_tokens for _, part in parts])
    if prompt < whole.prompt_tokens or completion < whole.completion_tokens:
        return whole
    return Usage(prompt, completion, whole.searches,
                 sum([Counter(part.buckets) for _, part in parts], Counter()), parts)


# The tier that served a call -> the suffix of its price keys; "" has the prices without a suffix.
TIER_SUFFIXES = MappingProxyType({
    "default": "", "standard": "", "standard_only": "", "auto": "", "on_demand": "", "scale": "",
    "flex": "_flex", "priority": "_priority", "fast": "_priority", "ultrafast": "_ultrafast",
    "balanced": "_balanced", "batch": "_batches",
})
BATCH_SUFFIX, CHEAP_SUFFIXES = "_batches", frozenset({"_batches", "_flex"})
UNKNOWN_TIER = "?"
# (seller, tier): capacity that was bought beforehand; its tokens have no price of their own.
# Source: Anthropic's service tiers, read November 2026.
PREPAID_TIERS = frozenset({("anthropic", "priority")})


def tier_suffix(tier: Optional[str], seller: str) -> str:
    """Return the suffix of a tier's price keys at a seller; UNKNOWN_TIER for an unknown tier."""
    if not tier or (seller, tier) in PREPAID_TIERS:
        return ""
    return TIER_SUFFIXES.get(tier, UNKNOWN_TIER)


# What else a row's price keys say. A row with a key that is in no table here is unpriced: it would
# be billed by something that we do not count. Sources: LiteLLM 1.110.2, and the vendors' pages.
_SEARCHES = "search_context_cost_per_query"
_PRICE_KEY = re.compile("({})(?:_above_([0-9]+)k_tokens)?({})?".format(
    "|".join(PRICE_KEYS.values()), "|".join(set(TIER_SUFFIXES.values()) - {""})))
_MAY_BE_PRICE = re.compile(r"cost|pric(e|ing)|multiplier|charge|(^|_)(fees?|rates?|usd)(_|$)")
_RESIDENCY = re.compile("regional_processing_uplift_multiplier_([a-z]{2})")
CALL_FEES = ("input_cost_per_request", "input_cost_per_query")
# Keys that no call is billed by which we let through under a budget.
UNBILLED_KEYS = re.compile(
    r"(google_maps_grounding|file_search|vector_store|code_interpreter)_cost_per_.*"   # tools
    r"|.*_decisions"                        # OpenAI's /v1/decisions, which is not metered
    r"|(input|output)_dbu_cost_per_token"   # Databricks: the same price in another unit
    r"|fedramp_uplift_multiplier")          # OpenAI: a host of its own, which we do not know
# Keys of a price that is never above that of another key, which is taken.
TAKEN_AS = MappingProxyType({
    "input_cost_per_token_cache_hit": INPUT_PRICE,
    "explicit_cache_read_input_token_cost": PRICE_KEYS["cache_read"],
    "cache_creation_input_audio_token_cost": PRICE_KEYS["audio_input"],
})
# The same images by the piece, in rows that price their tokens.
BY_THE_PIECE = MappingProxyType({"output_cost_per_image": PRICE_KEYS["image_output"],
                                 "input_cost_per_image": PRICE_KEYS["image_input"]})
# Rows that price the choice of a model, and not the model that was chosen.
ROUTER_KEY = re.compile(r"(^|/)model[_-]router(/|$)")
SEARCHES_EACH_CALL = frozenset({"perplexity"})    # its fee for a search is one for each request
# Providers whose usage says what a call cost: (where, in how many parts of a USD). Sources:
# OpenRouter's usage accounting, Perplexity's API reference, docs.x.ai/developers/cost-tracking
# (the exact charge, with tools); read November 2026.
REPORTED_COSTS = MappingProxyType({
    "openrouter": (("cost",), 1), "perplexity": (("cost", "total_cost"), 1),
    "xai": (("cost_in_usd_ticks",), 10 ** 10)})

WEB_SEARCH_PICODOLLARS = 10 ** 10       # Anthropic and OpenAI: $0.01, where a row does not say
FILE_SEARCH_PICODOLLARS = 25 * 10 ** 8  # OpenAI: $0.0025 each call
CONTAINER_PICODOLLARS = 3 * 10 ** 10    # OpenAI code interpreter: $0.03 each session


def _exact(value: Union[Decimal, Rate], factor: int = 1) -> Rate:
    exact = Fraction(value) * factor
    return exact.numerator if exact.denominator == 1 else exact


class Price(NamedTuple):
    """One row of the price table.

    `amounts` maps LiteLLM's price keys to picodollars per token, where ..._above_272k_tokens is
    ..._above_272000_tokens. A key that is absent has no price of its own; an explicit 0 is a price.
    """
    key: str
    provider: str                             # LiteLLM's name of the seller, may be ""
    amounts: Mapping[str, Rate]
    thresholds: tuple[int, ...]               # prompt tokens, ascending
    call_picodollars: Rate                    # each call, beside its tokens
    searches: Mapping[str, Rate]              # each web search, by size of context if given
    us_multiplier: Rate                       # Anthropic inference_geo "us"
    fast_multiplier: Rate                     # Anthropic speed "fast"
    residency_multipliers: Mapping[str, Rate]         # OpenAI's regional hosts: "us", "eu", ...
    max_input_tokens: Optional[int]
    max_output_tokens: Optional[int]
    known_rates: dict                         # what rates() and dearest_rates() worked out already
    is_for_responses: bool = False            # the model is called in OpenAI's Responses only
    is_stand_in: bool = False                 # by price_as, for a model without a price of its own

    def _reached(self, prompt_tokens: int) -> tuple[int, ...]:
        """Return the thresholds that are passed; at xAI "once its prompt reaches" one."""
        beyond = prompt_tokens + (self.provider == "xai")
        return self.thresholds and tuple([t for t in self.thresholds if beyond > t])

    def rates(self, tier: Optional[str], prompt_tokens: int) -> Mapping[str, Rate]:
        """Return picodollars per token of each bucket, for a call that `tier` served."""
        return self._rates(tier_suffix(tier, self.provider), self._reached(prompt_tokens))[0]

    def _rates(self, suffix: str, reached: tuple) -> tuple[Mapping[str, Rate], frozenset]:
        """Return (rates, the buckets for which they are a guess) of a tier beyond thresholds. A
        price that the tier has not is the standard one, but for batches.

        What a dear or unknown tier has no price for is guessed from above: at the highest that the
        row has for it, or in proportion to what the tier does to the bucket it falls back to.
        A row without batch prices costs half of its live ones, as all of Anthropic does; in others
        a bucket without one takes the price of the bucket it falls back to (OpenAI's older models
        have no batch price for cached input: it costs what input does).
        """
        if (suffix, reached) in self.known_rates:
            return self.known_rates[suffix, reached]
        live = self._rates("", reached)[0] if suffix else {}
        halves = suffix == BATCH_SUFFIX and (self.provider == "anthropic" or not any(
            name.endswith(BATCH_SUFFIX) for name in self.amounts))
        places = ["", *[f"_above_{tokens}_tokens" for tokens in reached]]
        stated = {}             # key -> (price, whether it is the tier's): a long one replaces it
        for place, tier in itertools.product(
                places, [suffix] if suffix == BATCH_SUFFIX else ["", suffix]):
            stated.update({key: (self.amounts[f"{key}{place}{tier}"], tier == suffix)
                           for key in PRICE_KEYS.values() if f"{key}{place}{tier}" in self.amounts})
        rates: dict[str, Rate] = {}
        guessed = set()
        for bucket, key, fallback in BUCKETS:
            amount, is_own = stated.get(key, (None, True))
            if is_own and amount is not None:
                rates[bucket] = amount
            elif halves:
                rates[bucket] = Fraction(live[bucket]) / 2
            elif amount is None:
                rates[bucket] = rates.get(fallback or "", 0)
            else:
                guessed.add(bucket)
                rates[bucket] = live[bucket] if suffix in CHEAP_SUFFIXES else max(
                    *[self.amounts.get(f"{key}{place}{tier}", 0) for place in places
                      for tier in {*TIER_SUFFIXES.values()}],
                    live[bucket] if not live.get(fallback or "")
                    else _exact(Fraction(live[bucket] * rates[fallback], live[fallback])))
        return self.known_rates.setdefault((suffix, reached), (
            rates, frozenset(guessed) if any(self.amounts.values()) else frozenset()))

    def dearest_rates(self, tiers: Iterable[Optional[str]], most_tokens: int) -> Mapping[str, Rate]:
        """Return the highest rate of each bucket in any of the tiers, for a prompt up to a size."""
        suffixes = frozenset(tier_suffix(tier, self.provider) for tier in tiers)
        reached = self._reached(most_tokens)
        if (suffixes, reached) not in self.known_rates:
            cases = self._cases(suffixes, reached)
            self.known_rates[suffixes, reached] = {
                bucket: max(rates[bucket] for rates in cases) for bucket in PRICE_KEYS}
        return self.known_rates[suffixes, reached]

    def _cases(self, suffixes: Iterable[str], reached: tuple) -> list[Mapping[str, Rate]]:
        return [self._rates(suffix, reached[:passed])[0] for suffix in suffixes
                for passed in range(len(reached) + 1)]

    @property
    def search_picodollars(self) -> Rate:
        """Return the most that one web search costs."""
        return max(self.searches.values(), default=WEB_SEARCH_PICODOLLARS)

    def call_fee(self, usage: Mapping[str, Any]) -> Rate:
        """Return picodollars of a finished call beside its tokens and tools."""
        if not self.searches or self.provider not in SEARCHES_EACH_CALL:
            return self.call_picodollars
        size = f"search_context_size_{usage.get('search_context_size')}"
        return self.call_picodollars + self.searches.get(size, self.search_picodollars)

    def every_rate(self) -> Mapping[str, frozenset]:
        """Return all rates that a token of a bucket, or a fee, can be billed at: in any tier, size
        of prompt, place and speed."""
        cases = self._cases({*TIER_SUFFIXES.values(), UNKNOWN_TIER}, self.thresholds)
        cases += [{**rates, plain: rates[dear]} for rates in cases
                  for hidden in HIDDEN_IN.values() for dear, plain in hidden.items()]
        multipliers = {1, self.us_multiplier, self.fast_multiplier,
                       self.us_multiplier * self.fast_multiplier,
                       *self.residency_multipliers.values()}
        return {"web_search": frozenset({self.search_picodollars}), **{
            bucket: frozenset({rates[bucket] * multiplier for rates in cases
                               for multiplier in multipliers}) for bucket in PRICE_KEYS}}

    def cells(self) -> str:
        """Write all that it says as JSON, in which a rate that is not whole is "n/d"."""
        return json.dumps(
            {**self._asdict(), "known_rates": {}}, sort_keys=True,
            default=lambda value: dict(value) if isinstance(value, Mapping) else str(value))

    def per_million(self) -> tuple[str, str]:
        """Return input and output in USD for a million tokens, to be read by people."""
        rates = self.rates(None, 0)
        return (format_usd(microdollars_ceil(rates["input"] * 10 ** 6)),
                format_usd(microdollars_ceil(rates["output"] * 10 ** 6)))


def price_from_cells(text: str) -> Price:
    """Read back what Price.cells() wrote."""
    cells = json.loads(text, object_hook=lambda found: {
        name: Fraction(value) if isinstance(value, str) and name not in ("key", "provider")
        else value for name, value in found.items()})
    return Price(**{**cells, "thresholds": tuple(cells["thresholds"])})


def microdollars_ceil(picodollars: Rate) -> int:
    """Return whole microdollars, rounded up: the one place where money is rounded."""
    return -int(-picodollars // PICODOLLARS_PER_MICRODOLLAR)


BillLine = tuple[str, int, Rate]          # what was used, how many, picodollars for each


class Charge:
    """What a call is charged, line by line, and why not exactly, if so."""
    __slots__ = ("lines", "estimated", "price", "microdollars")

    def __init__(self, lines: Sequence[BillLine] = (), estimated: Optional[str] = None,
                 price: Optional[Price] = None) -> None:
        self.lines, self.estimated = lines, estimated
        self.price = price                    # by which they were made; None: by assumptions
        self.microdollars = total_of(lines)


def total_of(lines: Iterable[BillLine]) -> int:
    """Return microdollars of a bill, rounded up once: what is charged is the sum of some bill."""
    return microdollars_ceil(sum([count * rate for _, count, rate in lines]))


def _is_amount(value: Any) -> bool:
    return isinstance(value, (int, Decimal)) and not isinstance(value, bool) \
        and Decimal(value).is_finite() and 0 <= value < MOST_USD


def _checked(row: Mapping[str, Any], name: str, default: Any = None, parts: int = 1) -> Rate:
    """Return an amount in a row, in parts of its unit. Raises ValueError, naming its field."""
    value = row.get(name, default)
    if not _is_amount(value):
        raise ValueError(f"{name} must be a number from 0 up")
    return _exact(value, parts)


def _multiplier_of(row: Mapping[str, Any], name: str) -> Rate:
    multiplier = _checked(row, name, 1)
    if not multiplier:
        raise ValueError(f"{name} must not be 0")
    return multiplier


def _object_in(row: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = row.get(name) or {}
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} must be an object")
    return value


def _token_prices(row: Mapping[str, Any]) -> dict[str, Rate]:
    """Read picodollars of tokens in a row, with thresholds in tokens. Raises ValueError.

    The ranges of `tiered_pricing` become thresholds: the first holds from 0 on.
    """
    prices = {}
    for name in row:
        found = _PRICE_KEY.fullmatch(name)
        if found is not None:
            place = f"_above_{int(found[2]) * 1000}_tokens" if found[2] else ""
            prices[f"{found[1]}{place}{found[3] or ''}"] = _checked(
                row, name, parts=PICODOLLARS_PER_USD)
    tiers = row.get("tiered_pricing") or []
    for tier in tiers if isinstance(tiers, list) else [tiers]:
        start = tier["range"][0] if isinstance(tier, Mapping) and isinstance(
            tier.get("range"), list) and tier["range"] else None
        if not _is_amount(start) or set(tier) - {"range", *PRICE_KEYS.values()}:
            raise ValueError("tiered_pricing must be a list of ranges of prompt tokens with prices")
        place = f"_above_{int(start)}_tokens" if start else ""
        prices.update({f"{name}{place}": _checked(tier, name, parts=PICODOLLARS_PER_USD)
                       for name in tier if name != "range"})
    return prices


def _check_all_is_read(key: str, row: Mapping[str, Any]) -> None:
    """Raises ValueError, naming it, where a call may be billed by something that is not read."""
    if ROUTER_KEY.search(key):
        raise ValueError("prices a router, and not the models that it calls")
    for name in row:
        if _PRICE_KEY.fullmatch(name) or not row[name] or not _MAY_BE_PRICE.search(name):
            continue
        dearer = TAKEN_AS.get(name)
        is_read = name in (_SEARCHES, "tiered_pricing", *CALL_FEES) or _RESIDENCY.fullmatch(name) \
            or UNBILLED_KEYS.fullmatch(name) or row.get(BY_THE_PIECE.get(name, "")) \
            or (dearer is not None and _checked(row, name) <= _checked(row, dearer, 0)) \
            or (name == "off_peak_pricing" and all(
                _checked(row[name], cell) <= _checked(row, cell, 0)
                for cell in _object_in(row, name) if _MAY_BE_PRICE.search(cell)))
        if not is_read:
            raise ValueError(f"{name} is a price that is not known, so that the row is not enough")
    for name, value in _object_in(row, "provider_specific_entry").items():
        if name not in ("us", "fast") and _is_amount(value) and value != 1:
            raise ValueError(f"provider_specific_entry.{name} is not known")


def price_from_row(key: str, row: Any) -> Price:
    """Return the Price in one row of LiteLLM's table. Raises ValueError, naming the wrong field.

    A row with a negative, infinite or non-numeric price anywhere is not a price at all, nor is
    one with a price that is not read.
    """
    if not isinstance(row, Mapping):
        raise ValueError("must be an object")
    prices = _token_prices(row)
    for name in (INPUT_PRICE,) if row.get("mode") == "embedding" else (INPUT_PRICE, OUTPUT_PRICE):
        if name not in prices:
            raise ValueError(f"{name} must be a number from 0 up")
    _check_all_is_read(key, row)
    extras, searches = _object_in(row, "provider_specific_entry"), _object_in(row, _SEARCHES)
    most = {name: int(row[name]) for name in ("max_input_tokens", "max_output_tokens", "max_tokens")
            if _is_amount(row.get(name)) and row[name]}
    return Price(
        key=key, provider=str(row.get("litellm_provider") or ""),
        amounts=MappingProxyType(prices),
        thresholds=tuple(sorted({int(tokens) for name in prices
                                 for tokens in re.findall("_above_([0-9]+)_tokens", name)})),
        call_picodollars=sum([_checked(row, name, 0, PICODOLLARS_PER_USD) for name in CALL_FEES]),
        searches=MappingProxyType({size: _checked(searches, size, parts=PICODOLLARS_PER_USD)
                                   for size in searches}),
        us_multiplier=_multiplier_of(extras, "us"),
        fast_multiplier=_multiplier_of(extras, "fast"),
        residency_multipliers=MappingProxyType({
            found[1]: _multiplier_of(row, found[0])
            for found in map(_RESIDENCY.fullmatch, row) if found}),
        max_input_tokens=most.get("max_input_tokens"),
        max_output_tokens=most.get("max_output_tokens", most.get("max_tokens")),
        known_rates={}, is_for_responses=row.get("mode") == "responses")


# The embedded model has a price under any table, so that budgets can be tried without a provider.
ECHO_ROW = MappingProxyType({
    "litellm_provider": "ironcage", "mode": "chat",
    INPUT_PRICE: Decimal("1e-6"), OUTPUT_PRICE: Decimal("2e-6"),
    "max_input_tokens": 1_000_000, "max_output_tokens": 100_000,
})
FREE_ROW = MappingProxyType({INPUT_PRICE: 0, OUTPUT_PRICE: 0})

# Endings of a name that leave the price as it is: none, a date, "latest". A month and a day do not:
# gpt-3.5-turbo's versions differ. gpt-4's cost the same (OpenAI's pricing, read November 2026).
NAME_ENDINGS: Sequence[str] = (
    "", r"-[0-9]{4}-[0-9]{2}-[0-9]{2}|[-@][0-9]{8}|@default|(?<=^gpt-4)-0(314|613)", "-latest")


class PriceBook:
    """Prices by model name, in LiteLLM's format. Rows are read when they are first asked for.

    Names resolve to a row exactly or not at all: what is not found is unpriced, never free.
    A book does not change: with_own() makes another, and a call keeps the one it began with.
    """

    def __init__(self, rows: Mapping[str, Any], *, providers: Iterable[Provider] = (),
                 price_as: Mapping[str, str] = MappingProxyType({})) -> None:
        self._rows = {**rows, ECHO_MODEL: ECHO_ROW}
        self._providers, self._price_as = {row.name: row for row in providers}, price_as
        self._own: Mapping[str, Any] = {}                  # the rows that the operator has added
        self._base: Optional[PriceBook] = None             # which has read the others, or will
        self._prices: dict[str, Union[Price, str]] = {}    # a race computes a row twice, alike
        self.find = functools.lru_cache(maxsize=1024)(self._find)

    @classmethod
    def load(cls, path: str) -> PriceBook:
        """Read a price file. Raises OSError, or ValueError where it is not a JSON object."""
        with open(path, encoding="utf-8-sig") as file:
            rows = json.load(file, parse_float=exact_number, parse_int=exact_integer)
        if not isinstance(rows, dict):
            raise ValueError("a price file is a JSON object of model names")
        rows.pop("sample_spec", None)
        return cls(rows)

    def keys(self) -> list[str]:
        """Return the names of all rows that price tokens, sorted."""
        return sorted(key for key in self._rows if self.row(key) is not None)

    def cells(self, key: str) -> dict[str, Any]:
        """Return what a row that prices tokens says of prices and limits; nothing of another."""
        return {} if self.row(key) is None else {
            name: value for name, value in self._rows[key].items()
            if _MAY_BE_PRICE.search(name) or name.startswith("max_")
            or name in ("alias_of", "litellm_provider", "provider_specific_entry")}

    def with_own(self, rows: Mapping[str, Any], *, providers: Iterable[Provider],
                 price_as: Mapping[str, str]) -> PriceBook:
        """Return this book with an operator's prices: rows that replace those of the same name, the
        providers whose models all cost nothing, and the rows that stand in for models without a
        price (pattern -> row). Raises ValueError where such a row has no price itself."""
        book = PriceBook({**self._rows, **rows}, providers=providers, price_as=price_as)
        book._own, book._base = rows, self
        for pattern, key in price_as.items():
            if book.row(key) is None:
                shown = re.sub(UNPRINTABLE, "?", pattern)
                raise ValueError(f"price_as {shown}: there is no price for {shown_name(key)}"
                                 f"{did_you_mean(key, book._rows)}")
        return book

    def row(self, key: str) -> Optional[Price]:
        """Return the price in the row of exactly this name; None where it has none."""
        read = self._read(key) if key in self._rows else None
        return read if isinstance(read, Price) else None

    def _read(self, key: str) -> Union[Price, str]:
        """Return the price in a row, or why it is none; read once, also where the base has it."""
        if key not in self._prices:
            row = self._rows[key]
            named = str(row.get("alias_of", key) if isinstance(row, Mapping) else key)
            if self._base is not None and not {key, named} & self._own.keys():
                self._prices[key] = self._base._read(key)
            else:
                try:
                    self._prices[key] = price_from_row(named, self._rows.get(named))
                except ValueError as err:
                    self._prices[key] = str(err)
        return self._prices[key]

    def _find(self, model: str, provider: str = "") -> Optional[Price]:
        """Return the price of a model as a provider sells it: its own, else the one that stands in
        for it, else None. A pattern with a slash is about provider/model, others about a model.

        A provider that is free has rows of the operator's only, and at a server that is usually
        free also those of the table; that the table calls such a server free is no price where it
        is not.
        """
        price, row = self._listed_price(model, provider), self._providers.get(provider)
        if row is not None and (price is None or price.key not in self._own):
            is_usually_free = manners_of(provider).is_free
            if row.is_free and (price is None or not is_usually_free):
                return price_from_row(f"{provider}/*", FREE_ROW)
            if price is not None and is_usually_free and not row.is_free \
                    and not any(price.amounts.values()):
                price = None
        if price is not None:
            return price
        full_name = f"{provider}/{model}" if provider else model
        key = next((key for pattern, key in self._price_as.items()
                    if fnmatch.fnmatchcase(full_name if "/" in pattern else model, pattern)), None)
        return None if key is None else self.row(key)._replace(is_stand_in=True, known_rates={})

    def _listed_price(self, model: str, provider: str) -> Optional[Price]:
        """Return the price of a model in the rows, or None.

        Tried in order: the name itself, and without a prefix that names the provider again; then
        each less its date, then less "-latest"; a fine-tuned model only by its `ft:BASE`. Of each
        its row under provider/name; else one under the name that is about this provider: one that
        names no seller is an operator's own, and about whoever serves the model.
        """
        prefix, slash, rest = model.partition("/")
        names = [model, rest] if slash and prefix in ("models", provider) else [model]
        endings, sellers = NAME_ENDINGS, self.sellers(provider) if provider else ()
        if model.startswith("ft:"):
            names, endings = [":".join(model.split(":")[:2])], NAME_ENDINGS[:1]
        for name in [re.sub(f"({ending})$", "", name) for ending in endings for name in names]:
            for key in (*[f"{seller}/{name}" for seller in sellers], name):
                price = self.row(key)
                if price is not None and (key != name or not provider or price.provider in sellers):
                    return price
                if price is not None and not price.provider:
                    return price._replace(provider=provider, known_rates={})
        return None

    def sellers(self, provider: str) -> tuple[str, ...]:
        """Return the names that price tables have for a provider."""
        return (provider, *(self._providers.get(provider) or manners_of(provider)).sold_as)

    def price(self, model: str, provider: str = "") -> Price:
        """Return as find(), but raise UnpricedModel, naming the key to add."""
        price = self.find(model, provider)
        if price is None:
            for key in self._rows.keys() & {model, f"{provider}/{model}"}:
                if self.row(key) is None:
                    raise UnpricedModel(f"the price of {shown_name(key)} cannot be used: "
                                        f"{self._read(key)}; mend that row", param="model")
            shown = shown_name(model if self.row(model) is None else f"{provider}/{model}")
            key = f'the key "{shown}"' if shown != "?" else "its name as a key"
            raise UnpricedModel(
                f"no price is known for the model {shown}: add {key} with {INPUT_PRICE} and "
                f"{OUTPUT_PRICE} to pricing.json or to prices in --config, or name a model that "
                'has one; a provider that costs nothing needs "free": true there', param="model")
        return price

    def cost(self, model: str, stated: Mapping[str, Any], **options: Any) -> int:
        """Return the total of a bill() in microdollars: exact, and rounded up once."""
        return self.bill(model, stated, **options).microdollars

    def bill(self, model: str, stated: Mapping[str, Any], *, api: str, provider: str = "",
             service_tier: Optional[str] = None, data_residency: Optional[str] = None,
             tool_calls: Mapping[str, int] = MappingProxyType({}), held: Iterable[str] = (),
             usage: Optional[Usage] = None) -> Charge:
        """Return what one finished call is charged for, line by line.

        Shape: `stated` is the provider's own usage object, and `usage` its counts if they are read;
        `service_tier` is the one that served (the answer's, where it says); `data_residency` "us"
        or "eu" for OpenAI's regional hosts; `tool_calls` counts OpenAI's hosted-tool items by type,
        which its usage leaves out; `held` are kinds of HIDDEN_IN that the call may have had: where
        usage does not break them out, the dearer rate counts. Any model may have made images.
        Raises: UnpricedModel; MalformedUsage.
        """
        price, usage = self.price(model, provider), usage or usage_of(api, stated)
        tier = stated.get("service_tier") if api == "messages" else None
        tier = tier if isinstance(tier, str) else service_tier
        lines: list[BillLine] = []
        doubt = None
        for part_model, part in usage.parts or ((None, usage),):
            own = price if part_model in (None, model) else self.price(part_model, provider)
            known, guessed = own._rates(tier_suffix(tier, own.provider),
                                        own._reached(part.prompt_tokens))
            rates, multiplier = known, _multiplier(own, stated, api, data_residency)
            for kind in ("image_output", *held):
                if kind not in part.buckets and known[kind] > known[HIDDEN_IN[kind][kind]]:
                    rates = {**rates, **{plain: max(rates[plain], known[dear])
                                         for dear, plain in HIDDEN_IN[kind].items()}}
            lines += [(bucket, count, rates[bucket] * multiplier)
                      for bucket, count in part.buckets.items() if count]
            if any([part.buckets.get(bucket) for bucket in guessed]):
                doubt = f"no price is known for the tier {shown_name(str(tier))}"
        searches = usage.searches + tool_calls.get("web_search_call", 0)
        fee = price.call_fee(stated)
        fees = (("call", int(bool(fee)), fee), ("web_search", searches, price.search_picodollars),
                ("file_search", tool_calls.get("file_search_call", 0), FILE_SEARCH_PICODOLLARS),
                ("container", int(bool(tool_calls.get("code_interpreter_call"))),
                 CONTAINER_PICODOLLARS))
        lines += [line for line in fees if line[1]]
        more = _reported_picodollars(stated, self.sellers(provider))
        more = more and more - sum([count * rate for _, count, rate in lines])
        if more > 0:
            lines.append(("reported beyond that", 1, more))
        return Charge(lines, doubt, price)


def _multiplier(price: Price, usage: Mapping[str, Any], api: str,
                data_residency: Optional[str]) -> Rate:
    if api != "messages":            # of a regional host that the row does not name, the highest
        known = price.residency_multipliers
        return 1 if data_residency is None else known.get(data_residency,
                                                          max(known.values(), default=1))
    place = price.us_multiplier if usage.get("inference_geo") == "us" else 1
    return place * (price.fast_multiplier if usage.get("speed") == "fast" else 1)


def _reported_picodollars(stated: Mapping[str, Any], names: Iterable[str]) -> Rate:
    """Return what a provider of these names says that a call cost; 0 where that is no amount."""
    path, parts = next((REPORTED_COSTS[name] for name in names if name in REPORTED_COSTS), ((), 1))
    value = functools.reduce(lambda holder, name: json_object(holder).get(name), path, stated)
    amount = exact_number(str(value)) if path else None
    return _exact(amount, PICODOLLARS_PER_USD // parts) \
        if isinstance(amount, Decimal) and 0 <= amount < MOST_USD * parts else 0


# ==== 5. Bounds =================================================================================
#
# The most that a request can cost, computed from its body before anything is sent, in six steps:
#
#   1. What a text can count. By bytes: a token of a byte-level tokenizer is at least one byte, and
#      a JSON body is never shorter than the text in it, so the body's length bounds all text, keys
#      and schemas in it; that is a proof. Or by the measured rule: a weight for each pair of
#      adjacent bytes, fitted until no text of two corpora, prose or made to beat it, had more.
#   2. What a request consists of: its parts, and the tools that it declares.
#   3. What no bound covers, which is refused: fields, content and tools that are not known.
#   4. What its input can count: text; what is not text, by a table or as the model's whole context;
#      and what the provider adds.
#   5. What it can cost: input and output at their dearest, which caps fit into what is free, and
#      how they travel upstream. Tools that the provider runs make it read its input again.
#   6. What a provider has counted before, which need not be guessed again.
#
# Assumed: the provider honours its max-token field; the price table is right; the measured rule
# holds for texts that nobody measured (--bound bytes does without that one).

# 1. What a text can count.

# The measured rule: what a byte adds to a text's tokens, by what it is and by the byte before it,
# in hundredths of a token, for (OpenAI, Anthropic). Fitted by linear programming to o200k, cl100k
# and Claude 2's tokenizer, November 2026: little on prose and code, and enough for texts made to
# beat it, such as random words of few letters (the README says how far that was tested).
CENTITOKENS = MappingProxyType({
    "word": (101, 101),           # a first letter
    "escape": (46, 82),           # the letter of \n or \t in place of that, which JSON may mean
    "hump": (116, 105),           # a capital after a small letter
    "capital": (10, 17),          # any, besides
    "digit": (34, 42),
    "first digit": (69, 66),      # of a number, besides
    "mark": (75, 75),
    "first mark": (26, 26),       # of several, besides
    "newline": (52, 95),          # or tab, or carriage return
    "first newline": (46, 20),
    "backslash": (49, 49),
    "first backslash": (63, 63),
    "space": (1, 1),
    "spaced": (100, 100),         # a digit or an other after a space, besides
    "other": (102, 103),          # a byte beyond ASCII, a control character
})
# A letter after a letter, of any case: a row for the first, a column for the second, a to z.
LETTER_PAIRS = MappingProxyType({
    "a": "99 62 51 23 55 70 27 62 47 53 40 29 54 10 81 54 82 10 19 28 48 42 79 70 29 49",
    "b": "38 66 81 52 20 79 65 99 34 71 99 16 76 51 10 80 99 37 83 65 54 87 99 99 10 99",
    "c": "42 99 64 54 28 99 97 10 34 88 62 41 84 75 10 79 75 92 83 44 44 65 89 62 35 99",
    "d": "60 75 81 61 34 88 77 69 74 99 99 61 67 89 24 87 99 49 67 78 99 63 99 57 43 99",
    "e": "71 85 60 46 55 56 98 99 99 99 78 73 88 22 96 86 58 65 71 55 99 74 99 54 55 99",
    "f": "56 99 99 70 24 63 90 99 69 99 65 72 94 68 22 99 99 21 83 81 46 99 99 99 80 99",
    "g": "99 96 96 99 10 83 66 52 55 99 83 99 61 52 28 99 99 32 54 68 54 99 99 99 53 56",
    "h": "29 99 99 79 10 64 99 72 39 99 63 99 86 64 59 74 99 64 95 63 85 99 97 99 22 99",
    "i": "60 55 61 10 62 59 50 99 63 86 66 49 56 10 35 88 63 33 25 38 91 69 89 68 99 50",
    "j": "39 99 99 99 16 99 99 99 55 99 99 99 99 99 64 83 99 99 50 69 54 99 90 99 99 99",
    "k": "99 99 99 82 48 85 84 99 33 88 99 74 99 72 75 99 99 84 69 69 99 99 79 99 31 99",
    "l": "52 96 99 61 10 93 99 99 30 99 99 61 97 72 30 97 99 75 69 69 87 66 84 99 58 86",
    "m": "25 61 81 45 11 99 50 62 25 58 52 90 62 72 47 76 99 99 34 64 60 99 99 99 23 99",
    "n": "54 99 62 59 36 78 53 75 64 87 64 61 70 61 71 99 94 82 58 63 91 68 87 85 39 60",
    "o": "77 68 67 56 94 64 56 99 74 77 64 47 52 10 62 65 99 10 64 58 53 64 93 85 60 99",
    "p": "27 98 55 76 10 86 76 62 20 99 58 25 99 71 10 61 57 23 69 63 49 73 99 54 15 99",
    "q": "99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 61 62 61 79 58 99 74 99 99 99",
    "r": "74 99 72 58 10 88 71 99 49 99 72 63 70 72 75 87 99 66 53 59 77 60 99 99 53 99",
    "s": "64 86 30 67 10 99 99 41 27 99 34 34 75 69 43 40 55 99 61 25 55 56 72 99 40 99",
    "t": "54 73 60 56 22 92 82 30 43 98 30 62 52 62 30 76 99 35 61 82 46 80 88 69 46 61",
    "u": "99 51 72 56 71 90 99 99 50 99 47 10 56 10 84 50 99 16 25 52 67 99 93 61 99 99",
    "v": "38 99 81 99 10 99 78 99 12 99 93 99 99 52 24 94 99 76 67 70 99 99 99 99 99 99",
    "w": "46 70 61 61 19 98 99 56 37 99 61 62 99 61 30 99 99 55 55 61 58 99 62 99 99 99",
    "x": "72 99 72 89 61 91 99 99 52 99 75 99 96 99 72 66 99 99 76 54 77 99 99 74 99 96",
    "y": "99 99 99 99 69 91 99 99 94 99 99 71 99 84 64 97 99 77 99 92 99 97 89 99 99 96",
    "z": "67 99 99 99 10 99 99 99 54 99 99 99 88 66 58 99 99 99 99 99 84 99 99 99 99 55",
})
# Claude's tokenizers since Opus 4.7 are not published; seen by others to make up to 1.47 times as
# many tokens as the measured one. 3/2 covers that.
ANTHROPIC_FACTOR = Fraction(3, 2)
ESTIMATE_SLACK_TOKENS = 8
ESTIMATE_SLICE_BYTES = 32 * 1024        # scanned at a time, in some 100 times as much memory
_ONLY_SPACES = bytes(ord("s" if chr(byte) == " " else ".") for byte in range(256))


def _byte_kind(byte: int) -> str:
    """Return a letter itself, for other bytes what they are."""
    char = chr(byte)
    named = {" ": "space", "\\": "backslash", "\n": "newline", "\r": "newline", "\t": "newline"}
    if char in named:
        return named[char]
    if not 32 < byte < 127:
        return "other"
    return char if char.isalpha() else "digit" if char.isdigit() else "mark"


@functools.lru_cache(maxsize=2)
def _pair_costs(column: int) -> Sequence[int]:
    """Return what the second of two bytes adds, by both as a native 16-bit number; then a 0."""
    weights = {name: columns[column] for name, columns in CENTITOKENS.items()}
    pairs = {first + chr(97 + at): int(cost) for first, row in LETTER_PAIRS.items()
             for at, cost in enumerate(row.split())}

    @functools.lru_cache(maxsize=None)
    def cost(last: str, kind: str) -> int:
        """Return what a byte adds after another, both by their kinds."""
        if len(kind) > 1:
            return weights[kind] + weights.get("first " + kind, 0) * (kind != last) \
                + weights["spaced"] * (last == "space" and kind in ("digit", "other"))
        capital = weights["capital"] * kind.isupper()
        if len(last) > 1:
            is_escape = last == "backslash" and kind in "nt"
            return capital + weights["escape" if is_escape else "word"]
        if last.islower() and kind.isupper():
            return capital + weights["hump"]
        return capital + pairs[(last + kind).lower()]

    kinds = [*map(_byte_kind, range(256))]
    ordered = [code.to_bytes(2, sys.byteorder) for code in range(1 << 16)]
    return [cost(kinds[first], kinds[second]) for first, second in ordered] + [0]


def _centitokens(text: bytes, costs: Sequence[int]) -> int:
    """Return what all bytes but the first add, and runs of spaces; no Python runs for each byte."""
    total = 0
    for start in (0, 1):
        pairs = struct.unpack_from(f"={len(text) - start >> 1}H", text, start)
        total += sum(operator.itemgetter(-1, -1, *pairs)(costs))
    spaces = text.translate(_ONLY_SPACES)
    return total + 100 * (spaces.count(b".ss") + spaces.startswith(b"ss"))


def input_tokens_upper_bound(text: str, provider: str = "openai") -> int:
    """Return the most tokens of a text, by the measured rule; never above a token a byte.

    JSON text may be given as it stands: its escapes count for no less than what they stand for.
    """
    if provider == "anthropic" and not text.isascii():
        text = max(text, unicodedata.normalize("NFKC", text), key=len)
    return _measured_tokens(text.encode("utf-8", "surrogatepass"), provider)


def _measured_tokens(raw: bytes, provider: str) -> int:
    """Apply the rule to slices, each with the byte before it: no cut lowers the sum."""
    costs, size = _pair_costs(int(provider == "anthropic")), ESTIMATE_SLICE_BYTES
    total = _centitokens(b"\0" + raw[:size], costs) + sum(
        _centitokens(raw[at - 1:at + size], costs) for at in range(size, len(raw), size))
    tokens: Rate = min(len(raw), -(-total // 100))
    if provider == "anthropic":
        tokens = -int(-tokens * ANTHROPIC_FACTOR // 1)
    return int(tokens) + ESTIMATE_SLACK_TOKENS


# 2. What a request consists of.

# Content whose tokens its own bytes bound; content whose input those do not show, which counts as
# a whole context; and results of hosted searches, which count as text and as one more result. Any
# other type may set off work at the provider, and is refused (--allow-content counts it as a whole
# context). Source: the types of openai 3.57.0 and anthropic 2.14.0, read 2026-11-28.
TEXT_PART_TYPES = frozenset({
    "text", "input_text", "output_text", "summary_text", "reasoning_text", "refusal",
    "message", "function", "function_call", "function_call_output", "custom",
    "custom_tool_call", "custom_tool_call_output", "reasoning", "local_shell_call",
    "local_shell_call_output", "shell_call", "shell_call_output", "apply_patch_call",
    "apply_patch_call_output", "tool_use", "tool_result", "thinking", "redacted_thinking",
    "search_result", "tool_reference", "tool_search_call", "tool_search_output",
    "reasoning.text", "reasoning.summary", "reasoning.encrypted",       # of OpenRouter
    "additional_tools", "agent_message", "configuration_update", "compaction",
    "compaction_trigger", "encrypted_content",
    "tool_addition", "tool_removal", "fallback", "browser_state", "server_tool_use",
    "web_search_result", "web_search_tool_result_error", "web_search_result_location",
    "content", "web_fetch_result", "web_fetch_tool_result_error", "tool_search_tool_result",
    "tool_search_tool_search_result", "tool_search_tool_result_error",
})
UNSEEN_PART_TYPES = (
    r"(input_|computer_)?(image|file|audio|video|document|screenshot)(_url|_file)?|base64|url"
    r"|container_upload|item_reference|compaction_summary"
    r"|(file_search|code_interpreter|image_generation|computer)"
    r"_call(_output)?|computer_call_safety_check|web_search_call_output"
    r"|(web_search|web_fetch|advisor|(bash_|text_editor_)?code_execution|tool_search)"
    r"(_tool)?(_search)?(_result|_result_error)|encrypted_.*")
FILE_PART_TYPES = r"(input_)?(file|document)(_url|_file)?"
HOSTED_RESULT_TYPES = frozenset({
    "web_search_call", "web_search_tool_result", "web_fetch_tool_result"})
IMAGE_PART_TYPES = frozenset({"image", "image_url", "input_image", "computer_screenshot"})
IMAGE_SOURCES = (None, "base64", "url", "file")
RECONFIGURING_TYPE = "configuration_update"     # content that changes reasoning, or the format
PROMPT_FIELDS = ("messages", "input", "system", "instructions", "prediction")
# What hangs on content without being content: who called, what was cited, arguments, how a tool
# of the client ran and ended, and the format of the answers that follow.
NOT_CONTENT_FIELDS = frozenset({
    "cache_control", "caller", "action", "actions", "operation", "environment", "outcome",
    "state_changes", "citations", "annotations", "logprobs", "parameters", "arguments", "metadata",
    "format",
})
# Fields that make an object without a type an image or a file (vLLM; multimodal embeddings).
MEDIA_FIELDS = MappingProxyType({
    **dict.fromkeys(("image", "image_url", "input_image"), "image"),
    **dict.fromkeys(("audio", "audio_url", "document", "document_url", "file", "file_data",
                     "file_id", "file_url", "image_embeds", "image_pil", "inline_data",
                     "input_audio", "input_file", "video", "video_url"), "file")})
# Content that declares tools -> the member that holds them, and that is not content itself.
TOOL_BRINGERS = MappingProxyType({
    "additional_tools": "tools", "tool_search_output": "tools", "tool_addition": "tool",
    "tool_removal": "tool"})
NOT_CONTENT_OF = MappingProxyType({**TOOL_BRINGERS, "tool_use": "input",
                                   "server_tool_use": "input"})
READ_MEMBERS = frozenset({"type", "id", "content", "source", "citations", "encrypted_content",
                          "output_config", "tool", "tools", "tool_name", *MEDIA_FIELDS})
STORED_STATE_FIELDS = frozenset({"previous_response_id", "conversation", "container"})
SPOKEN_FIELDS = frozenset({"audio", "modalities"})          # with one, the answer may be audio
# Tools that the client runs.
CLIENT_TOOL_TYPES = (
    r"function|custom|local_shell|apply_patch|computer(_use_preview)?|namespace"
    r"|(bash|text_editor|memory|computer)_\d{8}|(computer|browser)_toolset_20260801")
# Their members. With these alone a tool is theirs: Gemini's own have no type, as
# {"google_search": {}}, which may stand beside a function too. Moonshot's have names with a $.
CLIENT_TOOL_MEMBERS = frozenset("""
    type function name description parameters input_schema output_schema strict cache_control
    defer_loading allowed_callers eager_input_streaming input_examples custom format tools
    environment execution display_width display_height display_width_px display_height_px
    display_number enable_zoom max_characters configs default_config""".split())
# (type, where it says that it runs) of those that may run at the provider too.
CLIENT_TOOL_PLACES = (("tool_search", "client"), ("shell", "local"))
SPELLED_OUT_TOOL_TYPES = frozenset({"function", "custom", "namespace"})     # the request has all


class HostedTool(NamedTuple):
    """A tool that the provider runs, sampling the model again to read each result."""
    api: str                            # a key of HOSTED_TOOL_SELLERS
    types: str                          # a pattern of its types
    models: str                         # a pattern of the price rows it holds for
    prompt_tokens: int                  # what it adds to every sampling
    result_tokens: int                  # what one use adds to every later one; assumed
    has_fee: bool                       # each use costs what a search does
    loops_freely: bool                  # its uses do not bound the samplings


# First match wins; others are refused. The tokens are assumptions, from above of what 95 recorded
# exchanges of 2025 and 2026 were billed (at most 16,900 a result; Anthropic's tools add up to 2,400
# to the prompt, OpenAI's 4,400); no vendor documents a cap on a result. Anthropic samples at most
# ten times and once more, and once more than max_uses where the model tries again.
HOSTED_TOOL_SELLERS = MappingProxyType({"messages": "anthropic", "responses": "openai"})
HOSTED_TOOLS = (
    HostedTool("messages", r"web_search_20250305", "", 4096, 16_000, True, False),
    HostedTool("messages", r"web_search_(20260209|20260318)", "", 4096, 16_000, True, True),
    HostedTool("messages", r"web_fetch_20250910", "", 4096, 0, False, False),
    HostedTool("messages", r"web_fetch_(20260209|20260309|20260318)", "", 4096, 0, False, True),
    HostedTool("messages", r"tool_search_tool_(bm25|regex)(_20251119)?", "", 4096, 0, False, True),
    HostedTool("responses", r"web_search(_2025_08_26)?", r"gpt-([5-9]|\d\d)", 5000, 5000,
               True, False),
    HostedTool("responses", r"web_search(_2025_08_26)?", "", 5000, 17_000, True, False),
)


def _has_any(fields: Mapping[str, Any], names: frozenset) -> bool:
    """Whether a request states one of these fields."""
    return not names.isdisjoint(fields) and any([fields.get(name) is not None for name in names])


class Contents:
    """What a request consists of: one walk through its tools and its prompt finds all of it."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self.kinds: set[str] = set()            # the types of its parts
        self.images: list[dict] = []
        # (field, type, part) of those that bring input that their own bytes do not bound
        self.unseen: list[tuple[str, str, dict]] = []
        self.has_state = _has_any(fields, STORED_STATE_FIELDS)      # likewise
        self.cited: list[dict] = []             # documents and search results: read again in pieces
        self.results = 0                        # of hosted searches
        self.sets_format = False                # a message does, for the answers that follow
        self.loads: list[str] = []              # the names of tools, as often as parts load them
        self.tools: list[tuple[str, str, Mapping[str, Any]]] = []     # (field, type, tool)
        for name in ("tools", "functions"):
            if name in fields:
                self._declare(name, fields[name])
        for name in PROMPT_FIELDS:
            waiting = [fields[name]] if name in fields else []
            for value in waiting:               # which grows as we go
                if isinstance(value, list):
                    waiting += value
                elif isinstance(value, dict):
                    waiting += self._seen(name, value)

    def _seen(self, field: str, part: dict) -> list:
        """Note a part, wherever in the prompt it stands; return what in it may be parts too."""
        kind, is_elsewhere = part.get("type"), False
        if _is_oddly_named(part) or not (kind is None or isinstance(kind, str)):
            kind = "?"
        if kind is not None:
            self._note(field, kind, part)
            is_elsewhere = kind in ("reasoning", "compaction") \
                and not part.get("encrypted_content") \
                and not (kind == "compaction" and part.get("content") and "id" not in part)
        else:                                  # servers take the type from the field that is there
            for name in part:
                if name in MEDIA_FIELDS and part[name] is not None:
                    self._note(field, MEDIA_FIELDS[name], part)
            is_elsewhere = "id" in part and part.get("content") is None
        if is_elsewhere:                       # kept there, under its id
            self._note(field, "item_reference", part)
        if "output_config" in part:
            self.sets_format |= bool(json_object(part["output_config"]).get("format"))
        skipped = [NOT_CONTENT_OF.get(kind)]
        if kind in IMAGE_PART_TYPES:           # whose data stands there, and nothing else
            skipped += ["image_url"] if _source_type(part) not in IMAGE_SOURCES \
                else ["image_url", "source"]
        return [child for name, child in part.items() if isinstance(child, (dict, list))
                and name not in NOT_CONTENT_FIELDS and name not in skipped]

    def _note(self, field: str, kind: str, part: dict) -> None:
        """Note a part under a type, and what it says of tools."""
        self.kinds.add(kind)
        if kind in IMAGE_PART_TYPES:
            self.images.append(part)
        elif kind in HOSTED_RESULT_TYPES:
            self.results += 1
        elif kind not in TEXT_PART_TYPES and not (
                kind == "document" and _source_type(part) in ("text", "content")):
            self.unseen.append((field, kind, part))
        if kind in ("document", "search_result") \
                and json_object(part.get("citations")).get("enabled"):
            self.cited.append(part)
        elif kind in ("tool_reference", "tool_addition"):
            loaded = part if kind == "tool_reference" else json_object(part.get("tool"))
            self.loads.append(str(loaded.get("tool_name") or loaded.get("name")))
            if loaded.get("type") != "tool_reference":         # it is defined here
                self._declare(field, [loaded.get("definition")])
        elif TOOL_BRINGERS.get(kind) == "tools":
            self._declare(field, part.get("tools"))

    def _declare(self, field: str, tools: Any) -> None:
        """Note each tool of a list, and those that stand in others, as in namespaces: in the field
        "tools.tools"; of the type "?" what is no tool."""
        for tool in tools if isinstance(tools, list) else [] if tools is None else [None]:
            fields = json_object(tool)
            kind = fields.get("type")
            if kind is None and fields.keys() <= CLIENT_TOOL_MEMBERS:
                kind = "function"
            if not isinstance(tool, dict) or not isinstance(kind, str) \
                    or str(json_object(fields.get("function", tool)).get("name")).startswith("$") \
                    or any([name != name.casefold() for name in tool]):
                kind = "?"
            self.tools.append((field, kind, fields))
            if "tools" in fields:
                self._declare(f"{field}.tools", fields["tools"])

    @property
    def is_unseen(self) -> bool:
        """Whether it brings input that its own bytes do not bound."""
        return self.has_state or bool(self.unseen)


def contents_of(body: JsonBody) -> Contents:
    """Return what a request consists of, looked for once."""
    if body.contents is None:
        body.contents = Contents(body.fields)
    return body.contents


def _is_oddly_named(part: Mapping[str, Any]) -> bool:
    """Whether a part has, in other letters or with spaces, a member that is looked at here: a
    server that reads it regardless would see another part."""
    names = "".join(part)
    return not (names.isascii() and names.islower() and names.isidentifier()) and any(
        [name not in READ_MEMBERS and name.strip().casefold() in READ_MEMBERS for name in part])


def _source_type(part: Mapping[str, Any]) -> Any:
    return json_object(part.get("source")).get("type")


def _runs_at_client(kind: str, tool: Mapping[str, Any]) -> bool:
    place = tool.get("execution") if kind == "tool_search" else \
        json_object(tool.get("environment")).get("type")
    return re.fullmatch(CLIENT_TOOL_TYPES, kind) is not None or (kind, place) in CLIENT_TOOL_PLACES


def hosted_tool(api: str, kind: str, price: Price) -> Optional[HostedTool]:
    """Return what is known of a type of tool that the provider of a price row runs."""
    return next((row for row in HOSTED_TOOLS
                 if row.api == api and HOSTED_TOOL_SELLERS[api] == price.provider
                 and re.fullmatch(row.types, kind)
                 and re.match(row.models, price.key.rpartition("/")[2])), None)


def mapped_strings(value: Any, change: Callable[[str], str]) -> Any:
    """Return a value with its strings changed, but for names."""
    if isinstance(value, list):
        return [mapped_strings(child, change) for child in value]
    if isinstance(value, dict):
        return {name: mapped_strings(child, change) for name, child in value.items()}
    return change(value) if isinstance(value, str) else value


def strings_in(value: Any, without: frozenset = frozenset()) -> list[str]:
    """Return all strings in a value, but for names, and for what stands under some names."""
    found, waiting = [], [value]
    for part in waiting:                       # which grows as we go
        if isinstance(part, str):
            found.append(part)
        elif isinstance(part, list):
            waiting += part
        elif isinstance(part, dict):
            waiting += [child for name, child in part.items() if name not in without]
    return found


def _listed(value: Any) -> list:
    return value if isinstance(value, list) else [] if value is None else [value]


def _is_deferred(tool: Any) -> bool:
    """Whether a tool, or one in it, counts only once it is loaded."""
    fields = json_object(tool)
    return bool(fields.get("defer_loading")) or any(map(_is_deferred, _listed(fields.get("tools"))))


# 3. What no bound covers.

# Top-level fields of a request under a budget. None: it costs nothing beyond what the bound
# counts (text, caps, choices, tier). An object of rules: the members that it may have. A function
# of (value, price): whether that value is bounded. A field that is not here is refused.
# Source: the types of openai 3.57.0 and anthropic 2.14.0, read 2026-11-28.
FieldRule = Union[None, Mapping[str, Any], Callable[[Any, "Price"], bool]]


def _is_text(value: Any, price: Price) -> bool:
    return isinstance(value, str)


def _is_scalar(value: Any, price: Price) -> bool:
    return not isinstance(value, (dict, list))


def _one_of(*values: Any) -> FieldRule:
    return lambda value, price: value in values


def _only_clears(value: Any, price: Price) -> bool:
    """Whether edits of the context leave things out, and nothing is summarized."""
    return isinstance(value, list) and all(
        isinstance(edit, dict) and edit.keys() <= _EDIT_MEMBERS
        and str(edit.get("type")).startswith(("clear_thinking_", "clear_tool_uses_"))
        for edit in value)


def _has_a_priced_tier(value: Any, price: Price) -> bool:
    suffix = tier_suffix(str(value), price.provider)
    return (price.provider, str(value)) not in PREPAID_TIERS and (      # which cannot be asked for
        not suffix or any(key.endswith(suffix) for key in price.amounts))


def _rules(names: str, scalars: str = "", **guarded: FieldRule) -> Mapping[str, FieldRule]:
    """Return rules: None for `names`, _is_scalar for `scalars`, and the given ones."""
    return MappingProxyType({**dict.fromkeys(names.split()),
                             **dict.fromkeys(scalars.split(), _is_scalar), **guarded})


_NO_RULE = object()
_OFF = _one_of(None, False, [])
_MODERATION = _rules("policy", model=lambda value, price: "moderation" in str(value))
_STREAM_OPTIONS = _rules("include_usage include_obfuscation continuous_usage_stats")
_CACHE_OPTIONS = _rules("mode ttl comparison_response_id prewarm")
_EDIT_MEMBERS = frozenset({"type", "keep", "trigger", "clear_at_least", "exclude_tools",
                           "clear_tool_inputs"})
FIELD_RULES: Mapping[str, Mapping[str, FieldRule]] = MappingProxyType({
    "chat": _rules(
        "audio function_call functions logit_bias messages metadata modalities prediction "
        "response_format stop tool_choice tools",
        "frequency_penalty logprobs max_completion_tokens max_tokens model n parallel_tool_calls "
        "presence_penalty prompt_cache_key prompt_cache_retention safety_identifier seed store "
        "stream temperature top_logprobs top_p user verbosity",
        moderation=_MODERATION, stream_options=_STREAM_OPTIONS, service_tier=_has_a_priced_tier,
        prompt_cache_options=_CACHE_OPTIONS, web_search_options=_OFF,
        reasoning_effort=_is_text),
    "responses": _rules(
        "client_metadata conversation include input instructions metadata tool_choice tools",
        "max_output_tokens max_tool_calls model parallel_tool_calls previous_response_id "
        "prompt_cache_key prompt_cache_retention safety_identifier store stream temperature "
        "top_logprobs top_p truncation user",
        moderation=_MODERATION, stream_options=_STREAM_OPTIONS, service_tier=_has_a_priced_tier,
        prompt_cache_options=_CACHE_OPTIONS, image=_rules("context_compression"),
        reasoning=_rules("context generate_summary summary", effort=_is_text,
                         mode=_one_of("standard")),
        text=_rules("format verbosity"), prompt=_is_text, background=_OFF, background_options=_OFF,
        context_management=_OFF, access_programs=_OFF,
        multi_agent=lambda value, price: json_object(value).get("enabled") is False),
    "completions": _rules(
        "logit_bias prompt stop",
        "best_of echo frequency_penalty logprobs max_tokens model n presence_penalty seed stream "
        "suffix temperature top_p user", stream_options=_STREAM_OPTIONS),
    "embeddings": _rules("input", "dimensions encoding_format model user"),
    "messages": _rules(
        "billing_policy cache_control container diagnostics messages metadata output_format "
        "stop_sequences system thread tool_choice tools",
        "fallback_credit_token max_tokens model stream temperature top_k top_p user_profile_id "
        "workspace_id",
        thinking=_rules("type budget_tokens display block_binding"),
        output_config=_rules("format task_budget", effort=_is_text),
        context_management=_rules("", edits=_only_clears), inference_geo=_one_of("global", "us"),
        speed=lambda value, price: value == "standard" or (
            value == "fast" and price.fast_multiplier != 1),
        service_tier=_has_a_priced_tier, compaction=_OFF, fallbacks=_OFF, mcp_servers=_OFF),
})
# What servers of OpenAI's format know beside OpenAI's fields (vLLM, SGLang, llama.cpp, OpenRouter,
# Mistral, Z.ai, DeepSeek, DashScope, Cerebras, Groq; HTTP references and SDKs, read 2026-11-28).
# Searches, other models and other caps on the output are not among them.
COMPATIBLE_FIELDS = _rules(
    "top_k top_a min_p typical_p tfs repetition_penalty repeat_penalty length_penalty min_tokens "
    "ignore_eos stop_token_ids bad_words skip_special_tokens spaces_between_special_tokens "
    "include_stop_str_in_output add_generation_prompt continue_final_message add_special_tokens "
    "chat_template_kwargs enable_thinking include_reasoning reasoning_format reasoning_split "
    "disable_reasoning thinking_budget guided_json guided_regex guided_choice guided_grammar "
    "structured_outputs grammar json_schema regex ebnf cache_prompt mirostat mirostat_eta "
    "mirostat_tau safe_prompt random_seed prompt_mode do_sample tool_stream request_id user_id "
    "session_id priority usage safety_settings documents client_metadata input_type truncate",
    reasoning=_rules("effort max_tokens exclude enabled summary"),
    thinking=_rules("type budget_tokens clear_thinking keep"),
    # of OpenRouter, with Changes.cap_sellers(); its provider routing, read in November 2026
    provider=_rules("allow_fallbacks data_collection enforce_distillable_text ignore max_price "
                    "quantizations require_parameters zdr"))
# Their options that cost nothing beyond that. Sources: the types of openai 3.57.0 and anthropic
# 2.14.0; Codex 0.171; read 2026-11-28.
HOSTED_OPTIONS = frozenset("""
    type name allowed_callers allowed_domains blocked_domains cache_control citations defer_loading
    eager_input_streaming external_web_access filters image_settings indexed_web_access
    max_content_tokens max_uses response_inclusion search_content_types search_context_size strict
    url_sources use_cache user_location""".split())
# Models that search, or run others, by themselves: xAI bills the tokens of all its agents, and
# Groq's compound those of all its models and tools; OpenRouter's variant :online searches for a
# fee, and a preset there has a model and plugins of its own. Sources: their model pages, and
# openrouter.ai/docs/features/web-search and /presets, November 2026.
SEARCHING_MODEL = (r"(?i)-search-(preview|api)|deep-research|multi-agent|(^|[/-])compound"
                   r"|:online(:|@|$)|@preset/")
# The caps a client can put on its answer, by API; the first is set when a client puts none.
MAX_TOKENS_FIELDS = MappingProxyType({
    "chat": ("max_completion_tokens", "max_tokens"),
    "responses": ("max_output_tokens",),
    "completions": ("max_tokens",),
    "messages": ("max_tokens",),
    "embeddings": (),
})
PLAIN_PROMPTS = MappingProxyType({"completions": "prompt", "embeddings": "input"})
# What begins a thread; the request itself still holds all of the conversation. The newest
# anthropic SDKs' tool_runner sends it by default (Python 2.14, Node 1.14; November 2026).
NEW_THREAD = MappingProxyType({"type": "create"})


HATCH_NAME = r"[A-Za-z0-9_.-]{1,64}"
HATCH_HINTS = MappingProxyType({
    "field": "the operator can let it through with --allow-field ",
    "content": "the operator can count it as a whole context with --allow-content "})
# (the field that no bound covers, why not, the hatch that would let it through or "")
Unbounded = Iterator[tuple[str, str, str]]


def check_thread(fields: Mapping[str, Any]) -> None:
    """Refuse a thread that goes on from a conversation kept at the provider."""
    if fields.get("thread") not in (None, NEW_THREAD):
        raise ThreadRefused("thread, as asked for here, goes on from a conversation that is kept "
                            "at the provider; send all of its messages, without thread",
                            param="thread")


def check_boundable(api: str, body: JsonBody, price: Price, *,
                    provider: Provider = KNOWN_PROVIDERS["openai"],
                    model: str = "", hatches: Container[str] = (),
                    hosted_tools: bool = True) -> list[str]:
    """Refuse what no bound covers; return the hatches that let something through. `model` is the
    name that goes upstream, which the price may not have.

    Raises UnboundedRequest, naming the field and what to do.
    """
    check_thread(body.fields)
    opened = []
    for field, reason, hatch in _unbounded(api, body, price, provider, model, hosted_tools):
        if hatch not in hatches:
            kind, _, name = hatch.partition(" ")
            if hatch:
                reason += "; " + (HATCH_HINTS[kind] + name if re.fullmatch(HATCH_NAME, name)
                                  else "leave it out")
            raise UnboundedRequest(reason, param=shown_name(field))
        opened.append(hatch)
    return opened


def _unbounded(api: str, body: JsonBody, price: Price, provider: Provider, model: str,
               hosted_tools: bool) -> Unbounded:
    """Find all that no bound covers. Models that are free may have fields that are not known."""
    fields, contents, costs = body.fields, contents_of(body), any(price.amounts.values())
    rules = _rules_for(api, None if api == "messages" else provider.fields)
    for name, is_known in _unbounded_fields(rules, fields, price, ""):
        if is_known:
            yield name, f"{shown_name(name)}, as asked for here, cannot be used under a budget: " \
                "what it costs cannot be bounded before it is sent", ""
        elif costs:
            yield name, f"{shown_name(name)} is not known here, so what it costs cannot be " \
                "bounded under a budget", f"field {name}"
    if _searches(price.key) or _searches(model):
        yield "model", "a model that searches by itself, or runs others, cannot be used under a " \
            "budget: what it does cannot be bounded", ""
    if api in PLAIN_PROMPTS and not _is_plain(fields.get(PLAIN_PROMPTS[api])):
        yield PLAIN_PROMPTS[api], "what is neither text nor tokens cannot be bounded here under " \
            "a budget", ""
    if costs and not provider.zero_is_a_cap \
            and any([fields.get(name) == 0 for name in MAX_TOKENS_FIELDS[api]]):
        yield MAX_TOKENS_FIELDS[api][0], "a cap of 0 is no cap to some servers, so it bounds " \
            "nothing; ask for at least 1", ""
    for field, kind, _ in contents.unseen:
        works_on_it = provider.file_tools and re.fullmatch(FILE_PART_TYPES, kind)
        if works_on_it or not re.fullmatch(UNSEEN_PART_TYPES, kind):
            fault = "is worked on by tools of this provider" if works_on_it else "is not known"
            yield field, f"content of the type {shown_name(kind)} {fault}, so it cannot be " \
                "bounded under a budget", f"content {kind}"
    for field, kind, tool in contents.tools:
        # OpenAI and Anthropic refuse members of a tool that they do not know.
        known: Container = CLIENT_TOOL_MEMBERS if costs and provider.fields is not None else tool
        if not _runs_at_client(kind, tool):
            known = HOSTED_OPTIONS
            yield from _unbounded_tool(api, field, kind, tool, price, hosted_tools)
        for option in [name for name in tool if name not in known and tool[name] is not None]:
            yield "tools", f"{shown_name(option)} of the tool type {shown_name(kind)} is not " \
                "known here, so what it costs cannot be bounded under a budget", f"field {option}"


@functools.lru_cache(maxsize=1024)
def _searches(model: str) -> bool:
    """Whether a model searches by itself, or runs others."""
    return re.search(SEARCHING_MODEL, model) is not None


@functools.lru_cache(maxsize=256)
def _rules_for(api: str, paths: Optional[tuple[str, ...]]) -> Mapping[str, FieldRule]:
    """Return the rules of an API's fields; with `paths`, of a compatible server's, which lets those
    fields pass too, also ones inside others: a.b.c."""
    rules: dict = {}
    for path in sorted(paths or (), key=len, reverse=True):
        *outer, last = path.split(".")
        inner = rules
        for name in outer:
            inner = inner.setdefault(name, {})
        inner[last] = None
    return FIELD_RULES[api] if paths is None else {**COMPATIBLE_FIELDS, **rules, **FIELD_RULES[api]}


def _unbounded_fields(rules: Mapping[str, FieldRule], fields: Mapping[str, Any], price: Price,
                      inside: str) -> Iterator[tuple[str, bool]]:
    """Yield (name, whether it is known) of what the rules do not bound, also inside objects."""
    for name, value in fields.items():
        rule: Any = rules.get(name, _NO_RULE)
        if value is None or rule is None:
            continue
        if rule is _NO_RULE:
            yield inside + name, False
        elif callable(rule):
            if not rule(value, price):
                yield inside + name, True
        else:
            for row in value if isinstance(value, list) else [value]:
                if isinstance(row, dict):
                    yield from _unbounded_fields(rule, row, price, f"{inside}{name}.")
                elif row not in ("auto", "default", "none", "", False):
                    yield inside + name, True


def _is_plain(prompt: Any) -> bool:
    """Whether a prompt is text or tokens, or lists of those."""
    return all(map(_is_plain, prompt)) if isinstance(prompt, list) \
        else prompt is None or isinstance(prompt, (str, int))


def _unbounded_tool(api: str, field: str, kind: str, tool: Mapping[str, Any], price: Price,
                    hosted_tools: bool) -> Unbounded:
    """Likewise of a tool that runs at the provider: its uses must be capped and counted, and its
    options known."""
    name, runs = field.partition(".")[0], f"the tool type {shown_name(kind)} runs at the provider,"
    if kind == "?":
        yield name, "a tool has no type that is known, so it cannot be bounded under a budget", ""
    if hosted_tool(api, kind, price) is None:
        yield name, f"{runs} which a budget cannot bound; remove it from {name}", ""
    if not hosted_tools:
        yield name, f"{runs} and this proxy was started with --no-hosted-tools or --bound " \
            f"bytes; remove it from {name}", ""
    if field != "tools" and api == "messages":
        yield name, f"{runs} and its uses can be capped in tools only, not inside other tools; " \
            "declare it there", ""


# 4. What its input can count.

# What a provider adds to the prompt unseen: message framing, and the system prompts that come
# with tools and structured output. Anthropic documents up to 530 tokens for tools in general; its
# memory tool was seen to add about 1,500 (a recorded exchange). The rest is margin, assumed.
FRAMING_TOKENS = 64
TOOL_PROMPT_TOKENS = 4096
TOOLSET_PROMPT_TOKENS = 8192            # of each toolset, whose schemas the provider has; assumed
HOSTED_RESULT_TOKENS = 17_000           # the largest result_tokens of HOSTED_TOOLS
# A provider writes a prompt of its own for these (Mistral's and the templates of open models too).
PROMPTING_FIELDS = frozenset({"tools", "functions", "response_format", "text", "output_config",
                              "output_format", "prompt_mode", "safe_prompt", "documents",
                              "chat_template_kwargs"})
# The most that one image is billed as, by LiteLLM's provider and how the row begins; elsewhere an
# image counts as a whole context. Sources: Anthropic's vision guide (at most 4,784 tokens, images
# are scaled down to that); OpenAI's (at most 10,000 patches at up to 2.46 tokens; gpt-4o-mini
# bills 2,833 tokens and 5,667 for each of at most 8 tiles). Read November 2026.
IMAGE_TOKENS = (("anthropic", "", 5_000), ("openai", r"(.*[:/])?gpt-4o-mini", 50_000),
                ("openai", "", 25_000))
INLINE_IMAGE_CHARS = 256        # a longer string in an image is its data, if it looks like that
INLINE_DATA = r"(data:[A-Za-z0-9/+.;=-]+,)?[A-Za-z0-9+/=_\s-]+"


def input_tokens_bound(body: JsonBody, price: Price, *, measured: bool = False,
                       window: int = 0) -> int:
    """Return the most tokens that a request is billed for as input. Raises UnboundedRequest.

    By bytes, in no time; or, `measured`, by a scan of the text, which is two to four times lower.
    `window` is a context window that the request asks for beyond the model's own, in tokens.
    """
    contents, context = contents_of(body), max(price.max_input_tokens or 0, window)
    per_image = next((tokens for provider, start, tokens in IMAGE_TOKENS
                      if price.provider == provider and re.match(start, price.key)),
                     None) if contents.images else 0
    if contents.is_unseen or per_image is None:
        if price.max_input_tokens is None and any(price.amounts.values()):
            raise UnboundedRequest(
                "the request has content other than text, and the price table has no "
                f"max_input_tokens for {price.key} to bound it with")
        return context
    tokenizer = "anthropic" if "claude" in price.key else price.provider      # whoever sells it
    tokens = _text_tokens(body, tokenizer, measured) + _unseen_tokens(body.fields, contents) \
        + len(contents.images) * per_image
    return min(tokens, context) if contents.images and price.max_input_tokens else tokens


def _text_tokens(body: JsonBody, tokenizer: str, measured: bool) -> int:
    """Return the tokens of all text beside images that are known: by its bytes, or by a scan."""
    text, utf8_bytes, contents = body.text, len(body.raw), contents_of(body)
    if tokenizer == "anthropic" and (b"\\u" in text or not text.isascii()):
        # Claude 2's tokenizer took the NFKC form, in which one character can become many.
        fields = mapped_strings(body.fields, lambda string: "" if id(string) in body.data_bytes
                                else string) if body.data else body.fields
        text = unicodedata.normalize("NFKC", json.dumps(fields, ensure_ascii=False)) \
            .encode("utf-8", "surrogatepass")
        utf8_bytes = max(utf8_bytes, len(text) + sum(map(len, body.data_bytes.values())))
    of_images = {id(data): data for data in _inline_data(body, contents.images)}
    again = [plain_json(cited).encode("utf-8", "surrogatepass") for cited in contents.cited]
    utf8_bytes += sum(map(len, again)) - sum(map(len, of_images.values()))
    if not measured:
        return utf8_bytes
    other_data = [data for key, data in body.data_bytes.items() if key not in of_images]
    return min(utf8_bytes, _measured_tokens(b"".join([text, *other_data, *again]), tokenizer))


def _inline_data(body: JsonBody, images: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the data of images that is in the request itself; all else about them is text."""
    for image in images:
        url, source = image.get("image_url"), json_object(image.get("source"))
        for data in (url, json_object(url).get("url"), source.get("data")):
            if id(data) in body.data_bytes or (
                    isinstance(data, str) and len(data) > INLINE_IMAGE_CHARS
                    and re.fullmatch(INLINE_DATA, data)):
                yield data


def _unseen_tokens(fields: Mapping[str, Any], contents: Contents) -> int:
    """Return what the provider adds to a prompt that is text and images: framing, prompts of tools
    and of formats, and what results of hosted searches may hold beyond their own text."""
    is_prompted = contents.tools or contents.cited or contents.sets_format \
        or RECONFIGURING_TYPE in contents.kinds \
        or any([fields[name] for name in PROMPTING_FIELDS & fields.keys()])
    return (TOOL_PROMPT_TOKENS if is_prompted else FRAMING_TOKENS) \
        + contents.results * HOSTED_RESULT_TOKENS + _loaded_bytes(contents.loads, contents.tools) \
        + TOOLSET_PROMPT_TOKENS * sum(["_toolset_" in kind for _, kind, _ in contents.tools])


def _loaded_bytes(loads: Sequence[str], tools: Iterable[tuple[str, str, Mapping]]) -> int:
    """Return the size of the tools that content loads by name, once for each time that it does; but
    for the first of a deferred one, which does not count where it is declared."""
    times = Counter(loads) if loads else {}
    return sum([len(json_bytes(tool)) * max(0, times[name] - (
                    field.startswith("tools") and _is_deferred(tool)))
                for field, _, tool in tools if times
                for name in [str(tool.get("name"))] if name in times])


# 5. What it can cost.

DEFAULT_COMPLETIONS_TOKENS = 16         # the API's own default
UNKNOWN_MAX_OUTPUT_TOKENS = 128_000     # for a price row without max_output_tokens
LONG_WINDOW_TOKENS = 1_000_000          # what Anthropic's beta context-1m-… asks for
# How Claude Code names a model with that window. It takes this off, and sends the beta, before it
# calls a provider; in some calls it forgets to (2.1.332, November 2026).
LONG_WINDOW_SUFFIX = re.compile(r"\[1m\]$", re.IGNORECASE)
LONG_WINDOW_BETA = "context-1m-2025-08-07"
COMFORTABLE_OUTPUT_TOKENS = 8192        # a default cap leaves half of what is free, above this
LEAST_OUTPUT_TOKENS = 1024              # below this an answer is not worth sending for
LEAST_RESPONSES_TOKENS = 16             # OpenAI refuses a lower max_output_tokens
LEAST_THINKING_TOKENS = 1024            # Anthropic refuses a lower thinking budget
LITTLE_OF_WHAT_IS_FREE = 8              # input below an eighth of it is not worth a scan
SEARCH_TOOL_TYPES = r"web_(search|fetch)_\d{8}"        # of Anthropic: with a max_uses of its own
DEFAULT_HOSTED_USES, MOST_HOSTED_USES = 5, 32
MOST_SAMPLINGS = 11                     # of one Anthropic call
# (samplings beyond the uses, the most samplings) of one call; other APIs have no hosted tools.
SAMPLINGS = MappingProxyType({"responses": (1, 1 + MOST_HOSTED_USES),
                              "messages": (2, MOST_SAMPLINGS)})
DEFAULT_FETCHED_TOKENS = 25_000         # web_fetch's max_content_tokens, where it has none
FETCHED_TOKENS_MARGIN = Fraction(11, 10)         # the documentation calls that cap approximate


class Caps(NamedTuple):
    """What a request may use at most, as it is admitted."""
    output_tokens: int
    hosted_uses: int = 0                    # of each hosted tool


class Level(NamedTuple):
    """The worst case of a request with so many uses of each hosted tool."""
    # (tokens, tokens for each one of output) of all input: it is on the lowest of these.
    input_lines: tuple[tuple[int, int], ...] = ((0, 0),)
    rates: tuple[Rate, Rate] = (0, 0)       # picodollars a token of (input, output in every choice)
    fees_picodollars: Rate = 0              # of the call, and of all uses
    samplings: int = 1                      # of the model, each of which reads its input


class Bound(NamedTuple):
    """The worst case of one request, linear in its output tokens, by its uses of hosted tools."""
    levels: tuple[Level, ...]           # for no use, one, ... up to those asked for; or as admitted
    input_tokens: int = 0
    unlimited_output_tokens: int = 0    # output beside max_tokens: rejected predictions
    reasoning_tokens: int = 0           # likewise, where no cap holds them
    asked_output_tokens: Optional[int] = None       # the client's cap, or the API's default
    most_output_tokens: int = 0         # what an answer without a cap of its own can be
    least_output_tokens: int = 0        # a lower cap would not be a valid request
    may_be_lowered: bool = True         # the client's caps, to what is free
    uses_are_asked: bool = True         # the client set the number of uses of all hosted tools
    has_use_caps: bool = False          # there is a number of uses to set
    least_uses: int = 0                 # 0: it is a valid request without a use
    is_all_hosted: bool = False         # it has no tools but such as have these uses

    # What an admitted bound is charged by, where no usage comes.

    @property
    def input_picodollars(self) -> Rate:
        """Return what all input costs at its dearest."""
        return self.input_tokens * self.levels[-1].rates[0]

    @property
    def output_picodollars(self) -> Rate:
        """Return what one output token in every choice costs at its dearest."""
        return self.levels[-1].rates[1]

    @property
    def fees_picodollars(self) -> Rate:
        return self.levels[-1].fees_picodollars

    @property
    def loops(self) -> bool:
        """Whether the model may run again: early usage is not its input."""
        return self.levels[-1].samplings > 1

    def admitted(self, caps: Caps) -> Bound:
        """Return the bound of the request with these caps."""
        level = self.levels[caps.hosted_uses]
        return self._replace(levels=(level,), input_tokens=min(
            [tokens + caps.output_tokens * each for tokens, each in level.input_lines]))

    # What it costs.

    @property
    def output_tokens(self) -> int:
        """Return the output cap that holds when we set none: the client's, as it travels upstream.

        A model's maximum does not lower it: some betas raise that beyond the price table's.
        """
        return self.most_output_tokens if self.asked_output_tokens is None \
            else self.asked_output_tokens

    @property
    def asked_caps(self) -> Caps:
        """Return the caps that hold when we set none."""
        return Caps(self.output_tokens, len(self.levels) - 1)

    @property
    def takes_what_it_asks(self) -> bool:
        """Whether all that is free may go for the client's own caps: other caps take half of it."""
        return self.asked_output_tokens is not None and self.uses_are_asked

    @property
    def worthwhile_output_tokens(self) -> int:
        """Return the least cap worth sending for: 1,024, or the client's if that is less."""
        if self.asked_output_tokens is not None and not self.may_be_lowered:
            return self.asked_output_tokens
        return max(min(LEAST_OUTPUT_TOKENS, self.output_tokens), self.least_output_tokens)

    def _lines(self, uses: int) -> list[tuple[Rate, Rate]]:
        """Return (picodollars, those a token of output): the cost is on the lowest of them."""
        level, beside = self.levels[uses], self.unlimited_output_tokens + self.reasoning_tokens
        input_rate, output_rate = level.rates
        lines = [(tokens * input_rate + level.fees_picodollars, each * input_rate + output_rate)
                 for tokens, each in level.input_lines]
        return [(fixed + beside * each, each) for fixed, each in lines]

    def microdollars(self, output_tokens: int, uses: int = 0) -> int:
        """Return the worst cost with those caps, rounded up."""
        return microdollars_ceil(min([fixed + output_tokens * each
                                      for fixed, each in self._lines(uses)]))

    def affordable_output_tokens(self, microdollars: int, uses: int = 0) -> int:
        """Return the largest output cap whose worst cost fits into an amount; below 0 if none."""
        left = [(microdollars * PICODOLLARS_PER_MICRODOLLAR - fixed, each)
                for fixed, each in self._lines(uses)]
        return max([-1 if free < 0 else int(free // each) if each else self.output_tokens
                    for free, each in left])

    def fitting_caps(self, free_microdollars: Optional[int], *, at_last: bool,
                     shares: bool = False) -> Optional[Caps]:
        """Return the caps to reserve for while so much is free: the first of _offers() that fits;
        None: not now."""
        if free_microdollars is None:
            return self.asked_caps
        for uses, microdollars, least in self._offers(free_microdollars, at_last, shares):
            cap = min(self.affordable_output_tokens(microdollars, uses), self.output_tokens)
            if cap >= least:
                return Caps(cap, uses)
        return None

    def _offers(self, free: int, at_last: bool, shares: bool) -> Iterator[tuple[int, int, int]]:
        """Yield (uses of hosted tools, microdollars, the least output cap) to reserve for.

        First the client's own caps. A default or a lowered one takes at most half of what is free
        while that is a comfortable answer, so that one call does not keep all others waiting;
        `at_last`, all that is free, if it is worth sending for; and where it `shares` with calls in
        flight, first half, while that is worth sending for. Uses of hosted tools fall before the
        output, to one; then, after it, to none, though not where the request is about nothing else
        and may wait.
        """
        half, own, worthwhile = free // 2, self.output_tokens, self.worthwhile_output_tokens
        asked = self.asked_caps.hosted_uses
        yield asked, free if self.takes_what_it_asks else half, own
        if asked and self.uses_are_asked and not self.may_be_lowered:
            return
        for uses in range(asked, 1, -1):
            yield uses, half, own
        comfortable = max(worthwhile, min(COMFORTABLE_OUTPUT_TOKENS, own))
        for uses in range(min(1, asked), self.least_uses - 1, -1):
            if uses == 0 < asked and self.is_all_hosted and not at_last:
                return
            if self.asked_output_tokens is not None:
                yield uses, free, own
            yield uses, half, worthwhile if at_last and shares else comfortable
            if at_last:
                yield uses, free, worthwhile


def fixed_bound(microdollars: int) -> Bound:
    """Return the bound of what costs an amount at most, whatever it answers."""
    return Bound((Level(fees_picodollars=microdollars * PICODOLLARS_PER_MICRODOLLAR),),
                 asked_output_tokens=0)


def bound_of_request(api: str, body: JsonBody, price: Price, *,
                     provider: Provider = KNOWN_PROVIDERS["openai"], measured: bool = False,
                     window: int = 0, may_be_lowered: bool = True,
                     input_tokens: Optional[int] = None, said_choice: Any = None) -> Bound:
    """Return the worst case of a request at a price; `input_tokens` is a bound on its input, if
    known, `said_choice` a tool_choice in words. Raises BadRequest, UnboundedRequest."""
    fields = body.fields
    if input_tokens is None:
        input_tokens = input_tokens_bound(body, price, measured=measured, window=window)
    multiplier = _multiplier(price, {
        "inference_geo": None if fields.get("inference_geo") == "global" else "us",
        "speed": None if fields.get("speed") is None else "fast"}, api, provider.data_residency)
    answers = _choices(api, fields)

    def rates_up_to(most_tokens: int) -> tuple[Rate, Rate]:
        dearest = _dearest_rates(price, body, api, most_tokens, provider.default_service_tier)
        return dearest[0] * multiplier, dearest[1] * multiplier * answers

    least = LEAST_RESPONSES_TOKENS if api == "responses" else 1
    if api == "messages":           # above its budget for thinking, which falls with it
        least += _thinking_budget(fields)
        least = min(least, 2 * LEAST_THINKING_TOKENS) if may_be_lowered else least
    return Bound(
        input_tokens=input_tokens, may_be_lowered=may_be_lowered, least_output_tokens=least,
        unlimited_output_tokens=len(body.raw) if fields.get("prediction") is not None else 0,
        reasoning_tokens=provider.reasoning_beyond_caps if api in ("chat", "messages") else 0,
        asked_output_tokens=0 if api == "embeddings" else asked_output_tokens(api, fields),
        most_output_tokens=price.max_output_tokens or UNKNOWN_MAX_OUTPUT_TOKENS,
        **_by_hosted_uses(api, body, price, input_tokens, window, rates_up_to,
                          said_choice or fields.get("tool_choice")))


def _choices(api: str, fields: Mapping[str, Any]) -> int:
    """Return how many answers a request asks for."""
    n = optional_count(fields, "n", least=1, most=128) or 1
    if api != "completions":
        return n if api == "chat" else 1
    prompt = fields.get("prompt")
    several = isinstance(prompt, list) and prompt and not isinstance(prompt[0], int)
    prompts = len(prompt) if several else 1
    return prompts * max(n, optional_count(fields, "best_of", least=1, most=128) or 1)


def asked_output_tokens(api: str, fields: Mapping[str, Any]) -> Optional[int]:
    """Return the largest of the client's caps on its answer, or None. Raises BadRequest."""
    caps = [optional_count(fields, name) for name in MAX_TOKENS_FIELDS[api] if name in fields]
    asked = max([cap for cap in caps if cap is not None], default=None)
    return DEFAULT_COMPLETIONS_TOKENS if asked is None and api == "completions" else asked


def _thinking_budget(fields: Mapping[str, Any]) -> int:
    return optional_count(json_object(fields.get("thinking")), "budget_tokens") or 0


def kinds_held(body: JsonBody) -> frozenset:
    """Return the kinds of HIDDEN_IN that a call with this body may have tokens of."""
    contents, is_heard = contents_of(body), False
    for _, kind, part in contents.unseen:       # PDFs and texts that say so hold no audio
        data = [text for text in strings_in(part) if text.startswith("data:")]
        is_heard |= "audio" in kind or not data or not all(
            [text.startswith(("data:application/pdf", "data:text/")) for text in data])
    held = {"audio_input": is_heard or contents.has_state,
            "image_input": contents.is_unseen or contents.images,
            "audio_output": _has_any(body.fields, SPOKEN_FIELDS)}
    return frozenset([kind for kind, is_held in held.items() if is_held])


def _dearest_rates(price: Price, body: JsonBody, api: str, input_tokens: int,
                   default_tier: str) -> tuple[Rate, Rate]:
    """Return the highest (input, output) rates that a request can meet.

    A JSON escape can hide a word, so a body with escapes counts as having it.
    """
    def may_say(*words: bytes) -> bool:
        return any(word in body.text for word in (b"\\u", *words))

    asked = body.fields.get("service_tier")
    tier = default_tier if asked in (None, "auto") else asked if isinstance(asked, str) \
        else UNKNOWN_TIER                       # which may be any
    dearest = price.dearest_rates((None, tier), input_tokens)
    output = max(dearest["output"], dearest["reasoning"], dearest["image_output"])
    if _has_any(body.fields, SPOKEN_FIELDS):
        output = max(output, dearest["audio_output"])
    # The body is searched only for what would change the rate.
    plain = max([dearest[bucket] for bucket in UNWRITTEN_BUCKETS])
    write, long_write = dearest["cache_write"], max(dearest["cache_write_1h"],
                                                    dearest["cache_write_12h"])
    if max(write, long_write) > plain and (api != "messages" or may_say(b"cache_control")):
        plain = max(plain, write)
        if long_write > plain and may_say(*(b'"1h"',) if api == "messages" else (b'"ttl"',)):
            plain = long_write
    return plain, output


def _by_hosted_uses(api: str, body: JsonBody, price: Price, visible: int, window: int,
                    rates_up_to: Callable[[int], tuple[Rate, Rate]],
                    choice: Any) -> dict[str, Any]:
    """Return the levels of a bound, by the uses of hosted tools that the request asks for, and what
    else a bound says of these uses.

    Raises BadRequest for a number of uses that is no whole number from 0 up.
    """
    contents, call_fee = contents_of(body), price.call_fee({})
    declared = [(kind, tool, row) for _, kind, tool in contents.tools
                for row in [None if _runs_at_client(kind, tool) else hosted_tool(api, kind, price)]
                if row is not None]
    compacts = "compaction_trigger" in contents.kinds
    if not declared and not compacts:
        return {"levels": (Level(((visible, 0),), rates_up_to(visible), call_fee),)}
    capped = [(tool, row) for kind, tool, row in declared if kind.startswith("web_")]
    caps = [optional_count(body.fields, "max_tool_calls") if api == "responses" else
            optional_count(tool, "max_uses") for tool, _ in capped]
    tools = [(min(DEFAULT_HOSTED_USES if cap is None else cap, MOST_HOSTED_USES),
              row.result_tokens or _fetched_tokens(tool), row)
             for cap, (tool, row) in zip(caps, capped)]
    if api == "responses" and tools:        # one cap for all of them
        tools = [max(tools, key=operator.itemgetter(1))]
    asked = max([uses for uses, *_ in tools], default=0)
    visible += sum(row.prompt_tokens for *_, row in declared) + TOOL_PROMPT_TOKENS * compacts
    # Usage is summed over the samplings, so that any long-context price may hold.
    rates, (more, most) = (rates_up_to(visible), rates_up_to(MOST_TOKENS)), SAMPLINGS.get(
        api, (0, 1))
    # Tool search and compaction read again without any use.
    least_later = MOST_SAMPLINGS - 1 if len(capped) < len(declared) else int(compacts)

    def level(uses: int) -> Level:
        """Return the worst case with so many uses of each tool. The first sampling reads what is
        visible; each later one that, all results and all output before it; none more than the
        context."""
        counted = [(min(uses, asked), result, row) for asked, result, row in tools]
        total = sum([count for count, _, _ in counted])
        loops_freely = any([count and row.loops_freely for count, _, row in counted])
        later = most if loops_freely else min(total + more, most) if total else 1
        later = max(later - 1, least_later)
        context = max(price.max_input_tokens, window) if price.max_input_tokens else sys.maxsize
        first, results = min(visible, context), sum([count * size for count, size, _ in counted])
        lines = (first + later * min(visible + results, context), later), \
            (first + later * context, 0)
        searches = sum([count for count, _, row in counted if row.has_fee])
        return Level(lines if price.max_input_tokens else lines[:1], rates[later > 0],
                     call_fee + price.search_picodollars * searches, 1 + later)

    return {"levels": tuple(map(level, range(1 + asked))),
            "uses_are_asked": all([cap is not None and cap <= MOST_HOSTED_USES for cap in caps]),
            "has_use_caps": bool(tools), "is_all_hosted": len(capped) == len(contents.tools),
            "least_uses": min(asked, _forces_hosted(choice, [tool for tool, _ in capped]))}


def _forces_hosted(choice: Any, hosted: Iterable[Mapping[str, Any]]) -> bool:
    """Whether a tool_choice leaves the model no way but a hosted tool."""
    kind = choice if isinstance(choice, str) else json_object(choice).get("type")
    if kind == "tool":
        return str(json_object(choice).get("name")) in [str(tool.get("name")) for tool in hosted]
    return kind not in (None, "auto", "none", "function", "custom")


def _fetch_cap(tool: Mapping[str, Any]) -> int:
    """Return the max_content_tokens that goes upstream: no cap, and one of 0, is our own."""
    return optional_count(tool, "max_content_tokens") or DEFAULT_FETCHED_TOKENS


def _fetched_tokens(tool: Mapping[str, Any]) -> int:
    """Return what one fetch can add: a text that is to be cited counts twice, as in the request."""
    times = 2 if json_object(tool.get("citations")).get("enabled") else 1
    return -int(-_fetch_cap(tool) * times * FETCHED_TOKENS_MARGIN // 1)


class Changes:
    """The fields of a request that go upstream otherwise than its client wrote them."""

    def __init__(self, api: str, fields: Mapping[str, Any]) -> None:
        self._api, self._fields = api, fields
        self.set: dict[str, Any] = {}
        self.left_out: set[str] = set()
        self.reported: dict[str, Any] = {}

    def cap_output(self, provider: Provider, cap: Optional[int]) -> None:
        """Have the provider heed the client's caps, and `cap`: one in a field that it does not
        honour is moved to the one that it does."""
        honoured = provider.caps if self._api == "chat" else MAX_TOKENS_FIELDS[self._api]
        asked = {name: self._fields[name] for name in MAX_TOKENS_FIELDS[self._api]
                 if self._fields.get(name) is not None}
        caps = {name: value for name, value in asked.items() if name in honoured}
        if not caps and (asked or cap is not None):
            caps = {honoured[0]: max(asked.values(), default=cap)}
        for name, value in caps.items():
            lowest = value if cap is None else min(cap, value)
            if self._fields.get(name) != lowest:
                self.set[name] = lowest
        for name in asked.keys() - {*honoured}:
            self.left_out.add(name)
            self.reported[name] = honoured[0]
        if self._api == "messages" and cap is not None:
            self._lower_thinking(cap)

    def _lower_thinking(self, cap: int) -> None:
        """Lower the budget for thinking with a cap. It is halved, so that it changes seldom: each
        change makes Anthropic write its cache anew."""
        asked = lowered = _thinking_budget(self._fields)
        while lowered + LEAST_OUTPUT_TOKENS > cap and lowered > LEAST_THINKING_TOKENS:
            lowered = max(LEAST_THINKING_TOKENS, lowered // 2)
        if lowered != asked:
            self.set["thinking"] = {**self._fields["thinking"], "budget_tokens": lowered}
            self.reported["thinking.budget_tokens"] = lowered

    def cap_sellers(self, price: Price, input_tokens: int, are_many: bool = False) -> None:
        """Set provider.max_price, in USD a million tokens and a call, where a router has many
        sellers or a request chooses among them: a dearer one could serve it. What is lower stays.
        """
        chosen = self._fields.get("provider")
        if not (are_many or isinstance(chosen, dict)) or not any(price.amounts.values()):
            return
        chosen = json_object(chosen)
        rates, caps = price.dearest_rates((None,), input_tokens), {}
        asked = json_object(chosen.get("max_price"))
        for name, microdollars in (
                ("prompt", rates["input"]), ("completion", rates["output"]),
                ("request", price.call_picodollars // PICODOLLARS_PER_MICRODOLLAR)):
            cap, stated = format_usd(int(microdollars))[1:], exact_number(str(asked.get(name)))
            if not isinstance(stated, Decimal) or not 0 <= stated <= Decimal(cap):
                caps[name] = self.reported[f"provider.max_price.{name}"] = cap
        if caps:
            self.set["provider"] = {**chosen, "max_price": {**asked, **caps}}

    def cap_uses(self, uses: int) -> None:
        """Have no hosted tool used more often: by one cap, or by one of each tool of Anthropic's,
        which is left out where it may have no use."""
        if self._api == "responses":
            if self._fields.get("max_tool_calls") != uses:
                self.set["max_tool_calls"] = self.reported["max_tool_calls"] = uses
            return
        tools: list[dict] = []
        reported: dict[str, Any] = {}
        for tool in self._fields.get("tools") or ():
            kind, name, caps = str(tool.get("type")), f"tools.{tool.get('name')}", {}
            if re.fullmatch(SEARCH_TOOL_TYPES, kind):
                own = optional_count(tool, "max_uses")
                if uses == 0 != own:
                    reported[name] = "removed"
                    continue
                caps["max_uses"] = uses if own is None else min(own, uses)
                if kind.startswith("web_fetch"):
                    caps["max_content_tokens"] = _fetch_cap(tool)
            tools.append({**tool, **caps})
            reported.update((f"{name}.{cap}", value) for cap, value in caps.items()
                            if tool.get(cap) != value)
        if reported and tools:
            self.set["tools"] = tools
        elif reported:
            self.left_out |= {"tools", "tool_choice"}
        self.reported.update(reported)


# 6. What a provider has counted.

# What a provider has counted need not be guessed again. A request is a chain of digests, one for
# each message: of a later request whose beginning was counted the rule bounds only the rest.
# Assumed: a tokenizer does not change under one name. Seen in 1,835 pairs of recorded requests: the
# longer one is never counted for more than 700 tokens beyond the shorter one and the rule.
COUNTED_SLACK_TOKENS = 700
REFERRED_ITEM_TOKENS = 32               # what frames an item that is named by its id; assumed
LEAST_COUNTED_BYTES = 2048              # below it a guess costs little
MOST_COUNTS, COUNTS_KEPT_S = 5000, 86_400
DIGEST_BYTES = 16
CONVERSATION_FIELDS = MappingProxyType({"chat": "messages", "messages": "messages",
                                        "responses": "input"})
# Fields that change no count of the input; those of the two below are compared part by part.
UNCOUNTED_FIELDS = frozenset("""
    billing_policy cache_control client_metadata diagnostics fallback_credit_token frequency_penalty
    include inference_geo logit_bias logprobs max_completion_tokens max_output_tokens max_tokens
    max_tool_calls metadata model presence_penalty previous_response_id prompt_cache_key
    prompt_cache_options prompt_cache_retention safety_identifier seed service_tier speed stop
    stop_sequences store stream stream_options temperature top_k top_logprobs top_p user
    user_profile_id workspace_id""".split())
COUNTED_PARTS = ("system", "instructions", "tools", "functions")
UNSTABLE_MODEL = re.compile(r"(^|[-_/])(auto|router|latest)$")
KEPT_THINKING = r"clear_thinking_\d{8}"
KEPT_ELSEWHERE = ("url", "file", "item_reference", "container_upload")
URL_ELSEWHERE = r"\s*(?!data:)[A-Za-z][A-Za-z0-9+.-]*:"


class Counted(NamedTuple):
    """What a provider reported of a prompt that it has read."""
    tokens: int
    parts: frozenset = frozenset()          # digests of its system parts and tools
    has_tools: bool = False


class Prompt(NamedTuple):
    """A request as digests: its beginnings, message by message, and its system parts and tools."""
    chain: tuple[bytes, ...]                # of all that must be equal, and so many messages
    parts: Mapping[bytes, tuple[str, Any]]       # (field, part) of those always counted
    uncounted: tuple                        # likewise tools that count only once they are loaded
    has_tools: bool
    is_stable: bool                         # its count holds for what it begins


def _digest(*values: Any) -> bytes:
    return hashlib.blake2b(json_bytes(values), digest_size=DIGEST_BYTES).digest()


def without_cache_marks(value: Any) -> Any:
    """Return a message or part without cache_control, which agents move at each call.

    Elsewhere, as in the input of a tool, that is a name like any other, and what it holds counts.
    """
    if isinstance(value, list):
        return [without_cache_marks(child) for child in value]
    if isinstance(value, dict):
        return {name: without_cache_marks(child) if name in ("content", "source") else child
                for name, child in value.items() if name != "cache_control"}
    return value


def prompt_of(api: str, body: JsonBody, scope: Sequence[str]) -> Optional[Prompt]:
    """Return a request as digests; None where no count can be known. `scope` says whose it is:
    token, provider, model, and the headers that change a count."""
    fields, contents = body.fields, contents_of(body)
    messages = fields.get(CONVERSATION_FIELDS.get(api, ""))
    if not isinstance(messages, list) or UNSTABLE_MODEL.search(scope[2]) \
            or STORED_STATE_FIELDS & fields.keys():
        return None
    if b"cache_control" in body.text or b"\\u" in body.text:
        messages = without_cache_marks(messages)
    apart = {*UNCOUNTED_FIELDS, *COUNTED_PARTS, CONVERSATION_FIELDS[api]}
    equal = {name: value for name, value in fields.items()
             if value is not None and name not in apart}
    if isinstance(equal.get("thinking"), dict):           # its budget is a cap
        equal["thinking"] = {**equal["thinking"], "budget_tokens": None}

    def with_hash(text: str) -> str:
        """Return a string for a digest: of data its hash, which no other string can look like."""
        data = body.data_bytes.get(id(text))
        if data is not None:
            return "\0" + hashlib.sha256(data).hexdigest()     # fastest, of so much
        return "\0" + text if text.startswith("\0") else text

    chain = [_digest(api, *scope, equal)]
    for message in messages:
        content = json_object(message).get("content")
        if isinstance(content, str):        # a cache mark makes it a block, and back
            message = {**message, "content": [{"type": "text", "text": content}]}
        hashed = mapped_strings(message, with_hash) if body.data else message
        chain.append(_digest(chain[-1].hex(), hashed, hashed != message))
    declared = [(name, part) for name in COUNTED_PARTS for part in _listed(fields.get(name))]
    parts, alike = {}, Counter()
    for name, part in declared:
        if not _is_deferred(part):
            digest = _digest(without_cache_marks(part))
            alike[digest] += 1              # the same part again counts again
            parts[_digest(digest.hex(), alike[digest])] = (name, part)
    edits = json_object(fields.get("context_management")).get("edits") or []
    is_stable = fields.get("truncation") in (None, "disabled") \
        and fields.get("tool_choice") not in ("none", {"type": "none"}) \
        and all(re.fullmatch(KEPT_THINKING, str(edit.get("type"))) and edit.get("keep") == "all"
                for edit in map(json_object, edits)) \
        and not any(map(_is_kept_elsewhere, contents.images)) \
        and not any([kind in KEPT_ELSEWHERE or _is_kept_elsewhere(part)
                     for _, kind, part in contents.unseen])
    return Prompt(tuple(chain[1:]), parts, tuple(row for row in declared if _is_deferred(row[1])),
                  bool(fields.get("tools") or fields.get("functions")), is_stable)


def _is_kept_elsewhere(part: Mapping[str, Any]) -> bool:
    """Whether an image, or what is unseen, names what can change behind its name: a URL, a file."""
    return _source_type(part) in KEPT_ELSEWHERE or "file_id" in part or "file_url" in part \
        or any([re.match(URL_ELSEWHERE, text) for text in strings_in(part)])


FindCounts = Callable[[Sequence[bytes]], Sequence[Optional[Counted]]]


# (tokens that were counted, the fields of the rest, which was not)
KnownPart = Optional[tuple[int, dict]]


def known_input_tokens(api: str, body: JsonBody, price: Price, find: FindCounts,
                       prompt: Callable[[], Optional[Prompt]], window: int = 0) -> Optional[int]:
    """Return a bound on a request's input from what its provider counted before; None: it did not.

    `find` says what is known of each digest, `prompt` makes those of the request. Raises
    UnboundedRequest.
    """
    fields, part = body.fields, None
    previous = fields.get("previous_response_id")
    if previous is not None and fields.get("truncation") in (None, "disabled"):
        before = find([response_digest(previous, fields)])[0]
        if before is not None:
            part = before.tokens, {name: value for name, value in fields.items()
                                   if name != "previous_response_id"}
    else:
        known = prompt()
        if known is not None:
            part = _referred_part(body, find) or _beginning(api, body, known, find)
    if part is None:
        return None
    rest = parse_json_object(json_bytes(part[1]))
    if RECONFIGURING_TYPE in contents_of(rest).kinds:     # it reads all before it in another way
        return None
    more = input_tokens_bound(rest, price, measured=True, window=window)
    return more if contents_of(rest).is_unseen else part[0] + COUNTED_SLACK_TOKENS + more


def _beginning(api: str, body: JsonBody, prompt: Prompt, find: FindCounts) -> KnownPart:
    """Return the longest beginning of a conversation that was counted, with the prompts and the
    definitions that the rest adds to it."""
    known, name = find(prompt.chain), CONVERSATION_FIELDS[api]
    length = next((size for size in range(len(known), 0, -1) if known[size - 1] is not None), 0)
    if not length:
        return None
    counted, rest = known[length - 1], body.fields[name][length:]
    added = [*(row for digest, row in prompt.parts.items() if digest not in counted.parts),
             *prompt.uncounted]
    tools = [part for field, part in added if field in ("tools", "functions")]
    kinds = {kind for _, kind, _ in Contents({"tools": tools}).tools} - SPELLED_OUT_TOOL_TYPES
    tool_prompt = TOOLSET_PROMPT_TOKENS * sum("_toolset_" in kind for kind in kinds) \
        + TOOL_PROMPT_TOKENS * bool(kinds or (prompt.has_tools and not counted.has_tools))
    loaded = _loaded_bytes(Contents({name: rest}).loads, contents_of(body).tools)
    return counted.tokens + tool_prompt + loaded, {
        name: rest, "added": tools,
        "system": [part for field, part in added if field in ("system", "instructions")]}


def response_digest(response_id: Any, fields: Mapping[str, Any]) -> bytes:
    """Return what the size of a stored response is known under: its id, and which of the reasoning
    before it a request reads again."""
    reasoning = json_object(fields.get("reasoning"))
    return _digest("response", response_id, reasoning.get("context") or "auto",
                   reasoning.get("effort") in (None, "none"))


def _referred_part(body: JsonBody, find: FindCounts) -> KnownPart:
    """Return what items of earlier responses, named by their ids, count at most: what those
    responses made. None where none is named, or one that is not known or is sent along as well."""
    references = {id(part) for _, kind, part in contents_of(body).unseen
                  if kind == "item_reference"}
    named, others = [], []
    for item in _listed(body.fields.get("input")):
        (named if id(item) in references else others).append(item)
    times = Counter(_digest("item", item.get("id")) for item in named)
    known = find(list(times))
    if not named or None in known or any(
            _digest("item", json_object(item).get("id")) in times for item in others):
        return None
    made = sum({digest: counted.tokens for counted in known for digest in counted.parts}.values())
    kept = [{name: value for name, value in item.items() if name not in ("type", "id")}
            for item in named]
    return made * max(times.values()) + REFERRED_ITEM_TOKENS * len(named), {
        **body.fields, "input": others + kept}


class CountRow(NamedTuple):
    """One count, as it is kept: whose it is, of what, and when."""
    scope: str                              # token, provider and model, as JSON
    digest: bytes
    counted: Counted
    model: str                              # the name in the answer
    learned_s: int                          # Unix seconds


class KnownCounts:
    """What providers have counted, for a day: by token, provider and model, and by digest.

    A model whose answers name another model than before is a name that moves: nothing is known of
    it again.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock                        # Unix seconds
        self._lock = threading.Lock()              # guards the next two
        self._counts: dict[tuple, tuple[int, Counted]] = {}        # the oldest first
        self._answered: dict[str, str] = {}        # scope -> the model that answers; "": it moves

    def learn(self, row: CountRow) -> None:
        """Remember a count, and forget the oldest where there are too many."""
        scope = row.scope
        with self._lock:
            if self._answered.setdefault(scope, row.model) != row.model:
                self._answered[scope] = ""
            self._counts.pop((scope, row.digest), None)
            self._counts[scope, row.digest] = (row.learned_s, row.counted)
            if len(self._counts) > MOST_COUNTS:
                del self._counts[next(iter(self._counts))]
            if len(self._answered) > MOST_COUNTS:
                del self._answered[next(iter(self._answered))]

    def find(self, scope: str, digests: Sequence[bytes]) -> list[Optional[Counted]]:
        """Return what is known of each digest."""
        since_s = self._clock() - COUNTS_KEPT_S
        with self._lock:
            is_steady = self._answered.get(scope)
            found = [self._counts.get((scope, digest)) if is_steady else None for digest in digests]
        return [None if row is None or row[0] < since_s else row[1] for row in found]


# ==== 6. Event streams ==========================================================================
#
# Server-sent events: bytes -> events, and back. Lines end in CR, LF or CRLF, an event in an empty
# line; both may be split anywhere over reads. Nothing here knows a provider.
# Source: WHATWG HTML, "Server-sent events", 9.2.5 and 9.2.6.

_LINE_END = rb"(?:\r\n|\n|\r(?=[^\n]))"      # a CR at the end of what came may yet be a CRLF
_EVENT_END = re.compile(_LINE_END + _LINE_END)
_ANY_LINE_END = re.compile(rb"\r\n|\n|\r")
BOM = b"\xef\xbb\xbf"


class EventSplitter:
    """Cuts a byte stream into events, each with the bytes that it came in."""

    def __init__(self) -> None:
        self.rest = bytearray()           # what came after the last whole event

    def feed(self, received: bytes) -> list[bytes]:
        """Return events that `received` completes. Raises UpstreamBroke beyond MAX_EVENT_BYTES."""
        events, start, search_from = [], 0, max(0, len(self.rest) - 3)
        if self.rest:
            self.rest += received         # in place: an event of many reads is not copied at each
            received = b""
            if _EVENT_END.search(self.rest, search_from):
                received, self.rest = bytes(self.rest), bytearray()
        for end in _EVENT_END.finditer(received, search_from):
            events.append(received[start:end.end()])
            start = end.end()
        self.rest += received[start:]
        if len(self.rest) > MAX_EVENT_BYTES:
            raise UpstreamBroke(f"the provider sent an event of more than {MAX_EVENT_BYTES} bytes")
        return events


def event_data(event: bytes) -> bytes:
    """Return the data of an event: its `data:` lines joined by newlines, b"" if it has none."""
    if event.startswith(b"data: ") and event.find(b"\n") == len(event) - 2 and b"\r" not in event:
        return event[6:-2]                   # the usual event, in half the time
    lines, text = [], event.lstrip(BOM)
    for line in text.split(b"\n") if b"\r" not in text else _ANY_LINE_END.split(text):
        if line.startswith(b"data:"):
            lines.append(line[6:] if line[5:6] == b" " else line[5:])
    return b"\n".join(lines)


BLANKS = BOM + b" \t\r\n"                      # what may stand before a body
EVENT_START = re.compile(rb"[%b]*(data|event|id|retry)?:" % BLANKS)      # labelled as it may be
SSE_PING = b": ping\n\n"                           # a comment, which keeps a connection alive


def format_event(data: Union[dict, str], name: Optional[str] = None) -> bytes:
    """Write one event; no other place writes any. A dict is sent as JSON."""
    text = data if isinstance(data, str) else compact_json(data)
    prefix = f"event: {name}\n" if name else ""
    return f"{prefix}data: {text}\n\n".encode("utf-8")


def error_event(error: IroncageError, api: Optional[str], request_id: str) -> bytes:
    """Write the event that ends a broken stream, in the form that each API's SDK raises on.

    It opens with an empty line, which ends whatever event was cut short before it.
    """
    body = error_object(error, "anthropic" if api == "messages" else "openai", request_id)
    is_named = api in ("messages", "responses")
    return b"\n\n" + (format_event({"type": "error", **body}, "error") if is_named
                      else format_event(body))


# ==== 7. Usage of answers =======================================================================
#
# Reads from an answer, whole or streamed, what it will be billed by: usage, the model and tier
# that served, hosted-tool calls; and what a stream has shown so far, should it break off. The
# answer itself is not touched, but for the usage chunk of a client that did not ask for one.
# Whatever a provider sends as usage, nothing here raises: what is malformed is noted and left out.
# Source: OpenAI and Anthropic streaming references; facts of 380 recorded exchanges.


def usage_in(result: Mapping[str, Any]) -> Any:
    """Return the usage of an answer or a chunk: where it belongs, else where some servers put it
    (Groq in x_groq, Moonshot in its choice)."""
    usage, choices = result.get("usage"), result.get("choices")
    if usage is None and "x_groq" in result:
        usage = json_object(result["x_groq"]).get("usage")
    if usage is None and choices and isinstance(choices, list):
        usage = json_object(choices[0]).get("usage")
    return usage


def error_in(body: Mapping[str, Any]) -> Optional[Mapping[str, Any]]:
    """Return the error that an event, or an answer with 200, holds or is; None if there is none."""
    error = body.get("error")
    if error or isinstance(error, dict):
        return error if isinstance(error, dict) else {"message": error}
    has_words = isinstance(body.get("message"), str) or body.get("detail")      # as FastAPI's
    is_bare = has_words and not body.get("data") and not body.keys() & {
        "type", "object", "choices", "content", "output", "usage"}
    return body if "error" in (body.get("type"), body.get("object")) or is_bare else None


ANSWER_ENDS = ("completed", "incomplete")          # of a response; others are failures


def response_end(response: Mapping[str, Any], kind: str = "") -> str:
    """Return how a response is over, by its event's type, its status or its error; or ""."""
    if kind.endswith((".created", ".in_progress", ".queued")):   # some write the last status there
        return ""
    said = (kind.partition(".")[2], response.get("status"), response.get("error") and "failed")
    return next((end for end in said if end in (*ANSWER_ENDS, "failed", "cancelled")), "")


_parse_json = json.JSONDecoder().decode      # json.loads, without its look at the encoding

# The parts of a usage object. Of two reports the larger part counts, as a whole: the input with
# cache reads and writes (a first report may hold all of it as plain input), the output, others.
_CHAT_PARTS = (("prompt_tokens", "prompt_tokens_details"),
               ("completion_tokens", "completion_tokens_details"), ("total_tokens",))
USAGE_PARTS: Mapping[str, tuple] = MappingProxyType({
    "chat": _CHAT_PARTS,
    "completions": _CHAT_PARTS,
    "embeddings": (_CHAT_PARTS[0], (), *_CHAT_PARTS[1:]),           # no output is expected
    "responses": (("input_tokens", "input_tokens_details"),
                  ("output_tokens", "output_tokens_details"), ("total_tokens",)),
    "messages": (("input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens",
                  "cache_creation"), ("output_tokens", "output_tokens_details"),
                 ("iterations",), ("server_tool_use",)),
})


def _with_lifetimes(part: dict, before: Mapping[str, Any]) -> dict:
    """Add the lifetimes of cache writes to a part of Messages usage: only the start has them. What
    was written since has the dearest of them."""
    split, written = before.get("cache_creation"), part.get("cache_creation_input_tokens")
    if not isinstance(split, dict) or not written or "cache_creation" in part:
        return part
    hour, short = (_count(split, f"ephemeral_{life}_input_tokens") for life in ("1h", "5m"))
    short = min(short, max(0, written - hour))
    return {**part, "cache_creation": {
        **split, "ephemeral_1h_input_tokens": written - short if hour else 0,
        "ephemeral_5m_input_tokens": short}}


# What answers consist of: items of Responses, and blocks of Messages. Any other is made by the
# provider's own work, and comes with more input.
PLAIN_TYPES = frozenset({
    "message", "reasoning", "function_call", "custom_tool_call", "local_shell_call", "shell_call",
    "apply_patch_call", "computer_call", "tool_search_call",
    "text", "thinking", "redacted_thinking", "tool_use"})


class AnswerMeter:
    """What one answer says about its cost.

    A choice finishes with its finish reason. An answer has ended with its last event, or with its
    body where its choices have finished; for its client it is over then, and after an error.
    """
    usage: Optional[dict] = None                # what is well-formed in all reports of it
    malformed: Optional[str] = None             # what is wrong in one of them
    input_is_last = False                       # the last report has the input that counts
    usage_is_last = False                       # none can follow that report
    model: Optional[str] = None
    answer_id: Optional[str] = None
    item_ids: Sequence[str] = ()                # of what a response consists of
    events: Sequence[dict] = ()                 # of an answer that was read whole and is a stream
    changed_its_input = False                   # by tools that the provider ran, or by edits
    service_tier: Optional[str] = None
    tool_calls: Mapping[str, int] = MappingProxyType({})      # OpenAI hosted-tool items by type
    output_bytes = 0                            # UTF-8 bytes of generated text seen
    has_ended = False
    failure: Optional[str] = None               # the type of an error in it; more may follow
    body_has_ended = False                      # in order, whatever it held
    is_beyond_limits = False                    # a part that might be JSON was not parsed
    hold: Callable[[int], Any] = staticmethod(abs)       # called with the memory that it takes
    _counts: Optional[Usage] = None             # those of `usage`, once they are read
    _bytes_at_usage = 0                         # `output_bytes` at the last report
    _done_bytes = 0                             # of those, what whole items of a response hold

    def __init__(self, api: str, choices: int = 1) -> None:
        self.api, self._choices = api, choices  # that were asked for
        self._finished: dict[str, bool] = {}    # by choice: its finish_reason came, and no more
        self._usages: dict[str, Any] = {}       # by choice, where each of several has its own

    @property
    def usage_is_final(self) -> bool:
        """Whether `usage` is all that will be billed."""
        of_input, of_output, *_ = USAGE_PARTS[self.api]
        return self.usage is not None and self.malformed is None and self.usage_is_last \
            and self.output_bytes == self._bytes_at_usage \
            and not (self._usages and self._finished.keys() - self._usages.keys()) \
            and all([name in self.usage for name in (*of_input[:1], *of_output[:1])])

    @property
    def is_over(self) -> bool:
        return self.has_ended or self.failure is not None

    @property
    def reported(self) -> Usage:
        """Return the counts of `usage`; what was not reported is 0. A total needs its input."""
        if self._counts is None:
            usage, (of_input, *_) = self.usage or {}, USAGE_PARTS[self.api]
            total = usage.get("total_tokens") if of_input[0] in usage else None
            self._counts = usage_of(self.api, {**NO_TOKENS, **usage, "total_tokens": total})
        return self._counts

    @property
    def is_blank(self) -> bool:
        """Whether neither usage nor any output was seen."""
        return self.usage is None and self.malformed is None and not self.output_bytes

    def read_answer(self, answer: bytes) -> Any:
        """Read a whole JSON answer, and return it parsed, or one that is a stream of events; what
        is not a JSON object leaves the usage missing."""
        self.body_has_ended = True
        if EVENT_START.match(answer):
            self.output_bytes = 0
            events = map(event_data, EventSplitter().feed(answer + b"\n\n"))
            self.events = [event for event in map(self.read_event, events) if event is not None]
            return self.end_body()
        parsed = self._parsed(answer[3:] if answer.startswith(BOM) else answer)
        if isinstance(parsed, dict):
            self.output_bytes = sum([_text_bytes(parsed[name])
                                     for name in ("choices", "content", "output")
                                     if name in parsed])
            self._read_result(parsed, self._usages_in(parsed))
            self._end()
            self._bytes_at_usage = self.output_bytes
            error, end = error_in(parsed), response_end(parsed) if self.api == "responses" else ""
            if end not in ("", *ANSWER_ENDS) or (error is not None and not self.output_bytes):
                self._fail({"code": end, **(error or {})})
        return parsed

    def read_event(self, data: bytes) -> Optional[dict]:
        """Read the data of one streamed event, and return it parsed; None if it is no object."""
        if data == b"[DONE]":
            if self.api in ENDED_BY_DONE:
                self._end()
            return None
        parsed = self._parsed(data)
        if not isinstance(parsed, dict):
            if self.is_beyond_limits:                # all of it may be output
                self.output_bytes += len(data)
            return None
        EVENT_READERS[self.api](self, parsed)
        error = error_in(parsed)
        if error is not None:                        # it may end what has begun
            if parsed.get("usage") is not None and self.api not in ENDED_BY_DONE:
                self._report(parsed["usage"])        # which those have read
            self._fail(error)
        return parsed

    def see(self, pieces: Iterable[bytes]) -> None:
        """Count as output what came of a whole body, until it can be read."""
        self.output_bytes += sum([len(piece.strip()) for piece in pieces])

    def end_body(self) -> None:
        """Note that the body ended in order."""
        self.body_has_ended = True
        if self._have_finished(1):       # some servers make one choice, whatever is asked for
            self._end()

    def _end(self) -> None:
        """Note that all of the answer was seen, so that no more usage will come."""
        self.has_ended = self.usage_is_last = True

    def _have_finished(self, least: int) -> bool:
        """Whether each choice that a stream has begun has finished, and there are so many."""
        return len(self._finished) >= least and all(self._finished.values())

    def _parsed(self, text: bytes) -> Any:
        """Return the JSON in a text that has the limits of a request's, or None."""
        try:
            if len(text) > UNCOUNTED_BYTES:
                self.hold(COPIES * len(text) + bytes_to_parse(text))
            parsed = _parse_json(text.decode("utf-8"))
            if _is_too_deep(parsed, text):
                raise RecursionError
        except (ValueError, RecursionError, BadRequest, ServerBusy) as err:
            self.is_beyond_limits |= not isinstance(err, ValueError)
            if b'"usage"' in text:
                self.malformed = self.malformed or "it cannot be read"
            return None
        first = parsed[0] if isinstance(parsed, list) and parsed else None
        return first if "error" in json_object(first) else parsed        # as Gemini sends errors

    def _read_result(self, result: Mapping[str, Any], usages: Iterable[Any]) -> None:
        """Read what whole answers, chat chunks and `response` objects have in common."""
        for usage in usages:
            self._report(usage)
        if isinstance(result.get("model"), str):
            self.model = result["model"][:MAX_MODEL_CHARS]
        if isinstance(result.get("id"), str):
            self.answer_id = result["id"]
        if isinstance(result.get("service_tier"), str):
            self.service_tier = result["service_tier"]
        made = result.get("output", result.get("content"))
        if isinstance(made, list):
            items = [item for item in made if isinstance(json_object(item).get("type"), str)]
            self.item_ids = [item["id"] for item in items if isinstance(item.get("id"), str)]
            self.tool_calls = Counter(self.tool_calls) | Counter([item["type"] for item in items])
            self._note_changes(result, items)

    def _note_changes(self, holder: Mapping[str, Any], items: Iterable[dict]) -> None:
        """Note what makes a provider count more, or less, than the prompt as it was sent."""
        if json_object(holder.get("context_management")).get("applied_edits") \
                or any([str(item["type"]) not in PLAIN_TYPES for item in items]):
            self.changed_its_input = True

    def _usages_in(self, result: Mapping[str, Any]) -> Sequence[Any]:
        """Return the reports of usage in an answer or a chunk. Where each of several choices has
        its own, the output of all counts, and their input once."""
        usage, choices = usage_in(result), result.get("choices")
        if self._choices == 1 or not isinstance(choices, list):
            return () if usage is None else (usage,)
        own = {str(choice.get("index", at)): choice.get("usage")
               for at, choice in enumerate(map(json_object, choices))}
        self._finished = {**dict.fromkeys(own, False), **self._finished}
        if usage is not None and all([usage is not one for one in own.values()]):
            self._usages = {}                                # it is that of all
            return (usage,)
        stated = {index: one for index, one in own.items() if isinstance(one, dict)}
        if not stated:
            return ()
        self._usages.update(stated)
        of_output = USAGE_PARTS[self.api][1][0]
        made = [one.get(of_output) for one in self._usages.values()]
        made = sum(made) if {*map(type, made)} == {int} else made
        return [*stated.values(), {**stated.popitem()[1], of_output: made}]

    def _report(self, usage: Any) -> None:
        """Take one report of usage: of each part, the larger one of it and of those before."""
        if not isinstance(usage, dict):
            self.malformed, usage = self.malformed or "it is not an object", {}
        known = self.usage or {}
        stated = {name: value for name, value in usage.items() if value is not None}
        if "iterations" in known and "iterations" not in stated:
            self.malformed = self.malformed or "its iterations are gone"
        self._counts = None
        if self.usage is None:
            with contextlib.suppress(MalformedUsage):        # else each part is looked at
                self._counts = usage_of(self.api, stated)
                self.usage, self.input_is_last = stated, True
                self._bytes_at_usage = self.output_bytes
                return
        merged, counted = {**known, **stated}, []
        for names in USAGE_PARTS[self.api]:
            before = {name: known[name] for name in names if name in known}
            part = {name: stated[name] for name in names if name in stated}
            try:
                now, then = [usage_of(self.api, {**NO_TOKENS, **one}) for one in (part, before)]
                counts = bool(part) and sum(now[:3]) >= sum(then[:3])
            except MalformedUsage as err:
                counts, self.malformed = False, self.malformed or str(err)
            for name in names:
                merged.pop(name, None)
            merged.update(_with_lifetimes(part, before) if counts else before)
            counted.append(counts)
        self.usage, self.input_is_last = merged or self.usage, counted[0]
        if counted[1]:
            self._bytes_at_usage = self.output_bytes

    def _read_chat_event(self, chunk: dict) -> None:
        choices = chunk.get("choices")
        for at, choice in enumerate(choices if isinstance(choices, list) else ()):
            choice = json_object(choice)
            index = str(choice.get("index", at))
            shown = _text_bytes([choice[name] for name in ("delta", "text", "message")
                                 if name in choice])
            self.output_bytes += shown
            self._finished[index] = choice.get("finish_reason") is not None or (
                not shown and self._finished.get(index, False))
        usages = self._usages_in(chunk)
        if usages:              # running usage beside choices is not the last before the end
            self.usage_is_last = not choices and self._have_finished(self._choices)
        self._read_result(chunk, usages)

    def _read_responses_event(self, event: dict) -> None:
        kind, response = str(event.get("type")), json_object(event.get("response"))
        end = response_end(response, kind)
        if end:
            self._read_result(response, self._usages_in(response))
            self._end()
            if end not in ANSWER_ENDS:
                self._fail({"code": end, **json_object(response.get("error"))})
        elif kind == "response.output_item.done":         # what it holds may have come in deltas
            self._done_bytes += _text_bytes(event.get("item"))
            self.output_bytes = max(self.output_bytes, self._done_bytes)
        else:
            self.output_bytes += _text_bytes(event.get("delta"))

    def _read_messages_event(self, event: dict) -> None:
        kind = event.get("type")
        if kind == "message_start":
            # Its output_tokens are no count of the output, and its iterations are not over.
            message = json_object(event.get("message"))
            usage = message.get("usage")
            if isinstance(usage, dict):
                usage = {name: value for name, value in usage.items()
                         if name not in ("output_tokens", "output_tokens_details", "iterations")}
            self._read_result(message, () if usage is None else (usage,))
            self.input_is_last = False
        elif kind == "message_delta":
            has_finished = json_object(event.get("delta")).get("stop_reason") is not None
            self._finished = {"0": has_finished}
            if event.get("usage") is not None:
                self._report(event["usage"])
                self._note_changes(event, ())
                self.usage_is_last = has_finished
        elif kind == "message_stop":
            self._end()
        elif kind != "ping":
            self._finished.clear()
            block = json_object(event.get("content_block"))
            if "type" in block:
                self._note_changes({}, [block])
            if not str(block.get("type")).endswith("_result"):     # of a tool: that is input
                self.output_bytes += _text_bytes([event.get("delta"), block])

    def _fail(self, error: Mapping[str, Any]) -> None:
        """Note an error's type; Responses has "error" there, as an event, and then a code."""
        self.failure = next((error[name] for name in ("type", "code") if isinstance(
            error.get(name), str) and error[name] not in ("", "error")), "error")


ENDED_BY_DONE = frozenset({"chat", "completions", "embeddings"})
EVENT_READERS = MappingProxyType({
    **dict.fromkeys(ENDED_BY_DONE, AnswerMeter._read_chat_event),
    "responses": AnswerMeter._read_responses_event,
    "messages": AnswerMeter._read_messages_event,
})


# What hangs on output without being made by the model.
NOT_OUTPUT_FIELDS = frozenset({"type", "role", "id", "call_id", "status"})


def _text_bytes(value: Any) -> int:
    """Count UTF-8 bytes of text in a part of an answer: at least the tokens that made it."""
    return sum([len(text if text.isascii() else text.encode("utf-8", "surrogatepass"))
                for text in strings_in(value, NOT_OUTPUT_FIELDS)])


class Inflater:
    """Inflates a gzip or deflate body piece by piece, up to a size."""

    def __init__(self, most_bytes: int) -> None:
        self._inflate = zlib.decompressobj(47)         # zlib or gzip, as its header says
        self._left = most_bytes

    def steps(self, data: bytes) -> Iterator[bytes]:
        """Inflate a piece by little and little, as it may become a thousand times as large.
        Raises as feed()."""
        return map(self.feed, (data[at:at + INFLATED_AT_ONCE]
                               for at in range(0, len(data), INFLATED_AT_ONCE)))

    def feed(self, data: bytes) -> bytes:
        """Raises zlib.error for broken data, OverflowError beyond the size."""
        inflated = self._inflate.decompress(data, self._left + 1)
        self._left -= len(inflated)
        if self._left < 0:
            raise OverflowError("the body inflates beyond its limit")
        if self._inflate.unused_data:        # some clients would inflate that too
            raise zlib.error("more follows the end of the compressed body")
        return inflated

    @property
    def is_complete(self) -> bool:
        return self._inflate.eof


INFLATABLE = frozenset({"gzip", "x-gzip", "deflate"})


def inflating(encoding: str) -> Optional[Callable[[bytes], Iterable[bytes]]]:
    """Return what takes a content-encoding off a piece of a body, in steps; None for one that is
    not known."""
    if encoding in INFLATABLE:
        return Inflater(MAX_INFLATED_BYTES).steps
    return (lambda data: (data,)) if encoding == "identity" else None


def gathered(steps: Iterable[bytes], hold: Callable[[int], None]) -> bytearray:
    """Return all steps in one; `hold` is called with its size while it grows."""
    plain = bytearray()
    for step in steps:
        plain += step
        hold(len(plain))
    return plain


def inflated(body: bytes, encoding: str, hold: Callable[[int], None]) -> bytes:
    """Return a body without its content-encoding; b"" where that cannot be done."""
    if encoding == "identity":
        return body
    inflate = inflating(encoding)
    try:
        return b"" if inflate is None else gathered(inflate(body), hold)
    except (zlib.error, OverflowError, BadRequest, ServerBusy):
        return b""


def stated_status(answer: Any, otherwise: int) -> int:
    """Return the status that an error in a 200 says, as OpenRouter's do."""
    code = json_object(error_in(json_object(answer))).get("code")
    return code if type(code) is int and 400 <= code < 600 else otherwise


_USAGE_NULL = re.compile(rb',\s*"usage"\s*:\s*null')
_BESIDE_DATA = re.compile(rb"(?:\A[%b]*|[\r\n]+)(?:data: ?|(?!data:)[^\r\n]*)" % BOM)


def without_usage(event: bytes, chunk: Optional[dict]) -> bytes:
    """Return a chat stream's event as it would be without a request for usage; b"" for none.

    Asked, providers add `"usage": null` to every chunk, and one chunk with usage and no choices.
    """
    if chunk is None or "usage" not in chunk:
        return event
    if chunk["usage"] is not None and chunk.get("choices") == [] \
            and not set(chunk) - USAGE_CHUNK_FIELDS:
        return b""
    if chunk["usage"] is None:
        # Inside a JSON string these quotes would be escaped: the match is the field itself.
        without, found = _USAGE_NULL.subn(b"", event)
        if found == event.count(b'"usage"') == 1:
            return without
    shape = _BESIDE_DATA.sub(lambda found: b" " * len(found[0]), event)
    return b"".join(JsonBody(event, chunk, shape).spliced({}, frozenset({"usage"})))


USAGE_CHUNK_FIELDS = frozenset({
    "id", "object", "created", "model", "choices", "usage", "system_fingerprint", "service_tier",
    "obfuscation",
})


BEYOND_LIMITS = "the provider's answer is larger, or nested deeper, than this proxy can read"


class StreamReader:
    """The side pass over a stream: meters its events, and hides usage that was not asked for.

    A body that is one JSON answer, though a stream was asked for, is metered at its end.
    """

    def __init__(self, meter: AnswerMeter, encoding: str, *, hides_usage: bool) -> None:
        self._meter = meter
        self._splitter = EventSplitter()
        self._inflate = inflating(encoding)
        self.can_read = self._inflate is not None
        self._hides_usage = hides_usage and encoding == "identity"
        self._room = UNCOUNTED_BYTES            # for what is held of an event
        self._has_begun = False
        self._whole: Optional[bytearray] = None      # the JSON answer, if it is one

    @property
    def holds_much(self) -> bool:
        """Whether an event, or an answer, is long, so that to read it takes long."""
        return len(self._splitter.rest if self._whole is None else self._whole) > LONG_WORK_BYTES

    def read(self, pieces: list[bytes]) -> list[bytes]:
        """Return what to forward of one read; what is beyond the limits is not read."""
        events: list = []
        try:
            if self.can_read:
                events += self._metered(pieces)       # those before a fault stay
        except (zlib.error, OverflowError, UpstreamBroke):
            self.can_read = False
            if self._hides_usage and self._whole is None:      # nothing of the last was forwarded
                pieces, self._splitter.rest = [bytes(self._splitter.rest)], bytearray()
            self._whole = None
        if not self.can_read or self._whole is not None:
            self._meter.output_bytes += sum(map(len, pieces))
        is_read = self.can_read and self._whole is None
        return [*(without_usage(*event) for event in events), *(() if is_read else pieces)] \
            if self._hides_usage else pieces

    def parsed(self, pieces: list[bytes]) -> Iterator[dict]:
        """Yield the JSON events of one read, metered. Raises UpstreamBroke."""
        try:
            yield from (chunk for _, chunk in self._metered(pieces) if chunk is not None)
        except (zlib.error, OverflowError):
            raise UpstreamBroke("the provider's compressed stream is broken") from None
        if self._meter.is_beyond_limits:
            raise UpstreamBroke(BEYOND_LIMITS)

    def _metered(self, pieces: list[bytes]) -> Iterator[tuple[bytes, Optional[dict]]]:
        """Meter each event of one read, and return it with its JSON."""
        for data in self._inflate(b"".join(pieces)):
            if not self._has_begun and data.strip(BLANKS):
                self._has_begun = True
                if data.lstrip(BLANKS)[:1] in (b"{", b"["):
                    held, self._splitter.rest = self._splitter.rest, bytearray()
                    self._whole = bytearray()
                    yield held, None           # blanks, which go before it
            if self._whole is not None:
                self._whole += data
                self._make_room(len(self._whole))
                continue
            for event in self._splitter.feed(data):
                data = event_data(event)
                yield event, self._meter.read_event(data) if data else None
            self._make_room(len(self._splitter.rest))

    def _make_room(self, held_bytes: int) -> None:
        """Have room for what is held, or give it back. Raises UpstreamBroke."""
        if held_bytes > self._room or (not held_bytes and self._room > UNCOUNTED_BYTES):
            self._room = max(UNCOUNTED_BYTES, 2 * held_bytes)
            try:
                self._meter.hold(COPIES * self._room if held_bytes else 0)
            except (BadRequest, ServerBusy):
                raise UpstreamBroke(BEYOND_LIMITS) from None
        if held_bytes > MAX_ANSWER_BYTES:
            raise UpstreamBroke(BEYOND_LIMITS)

    def finish(self) -> bytes:
        """Read an event that no empty line ended, and return what to forward of it."""
        event = self.finished_events()[0]
        return without_usage(self._splitter.rest, event) if self._hides_usage else b""

    def finished_events(self) -> tuple[Optional[dict], Optional[dict]]:
        """Read what the end of the stream completes: (an event, or else a whole answer)."""
        event = whole = None
        if self._whole is not None:
            value = self._meter.read_answer(self._whole)
            whole = value if isinstance(value, dict) else None
        elif self._splitter.rest and self.can_read:
            event = self._meter.read_event(event_data(self._splitter.rest))
        self._meter.end_body()
        return event, whole


# ==== 8. The neutral form =======================================================================
#
# What a conversation, its answer and an error are when no API's words are left. Each API has one
# reader and one writer of each, around this form, so that no code knows two of them. A call that
# its provider's own API carries never comes here: its bytes travel as they are.
#
#     request  --reader--> Conversation --writer--> request of the provider's API, and its Terms
#     answer   --reader--> events, freed of what the Terms say --writer--> answer of the client's
#     error    --reader--> Failure      --writer--> error
#
# A reader hands over all that it read; a writer names in Losses what it could not write. Readers
# check shapes where they read, and raise with the field's name: BadRequest for a client's, and
# UpstreamBroke for a provider's. So any other exception is a fault of ours: a 500, and a trace.


class Part:
    """One piece of a turn or of an answer.

    `kind`, and what counts beside it:
      text, refusal  text; citations, once it is closed
      image          url, or media and data (base64); detail, OpenAI's word
      document       text (plain), or media and data, url or file_id; name is its title
      thought        text; native, where the provider wants its own form of it back
      call           id, name, namespace; text: its arguments as JSON, or as they are (`is_text`)
      result         id, of its call; parts; is_error
      search         a search of the web that the provider ran: id; text, the query; citations
      other          native, of what only the API that it came from knows
    """
    text = id = name = namespace = media = data = url = file_id = detail = ""
    is_text = is_error = False
    parts: Sequence[Part] = ()
    citations: tuple[Citation, ...] = ()
    native: Any = MappingProxyType({})                     # verbatim, in the form of `origin`
    origin = ""                          # the API of `native`: "messages", "responses", "chat"
    maker = ""                           # the provider of `native`, where that is known
    mark: Optional[Mapping[str, Any]] = None               # Anthropic's cache_control
    index = 0                            # its place in an answer
    pieces: list[str]                    # of its text, while it is read or written as a stream
    beside: Mapping[str, list]           # of its citations and signature, then
    at: str                              # its place in an answer of Responses that is read
    carried_id: str                      # of a call that is written, where it has another there
    given_id: str                        # of a call that is read in pieces: the server's,
    number: int                          # how many calls came before it
    is_open: bool                        # and how far that is
    is_closed: bool

    def __init__(self, kind: str, text: str = "", **more: Any) -> None:
        self.kind, self.text = kind, text
        if more:
            self.__dict__.update(more)

    def opened(self) -> Opened:
        """Begin, in an answer that is read, without a text."""
        self.pieces, self.text = [], ""
        return Opened(self)

    def grown(self, text: str) -> More:
        """Go on."""
        self.pieces.append(text)
        return tuple.__new__(More, (self, text))       # as More(self, text), in half the time

    def closed(self) -> Closed:
        """End: the text is all that came."""
        self.text = "".join(self.pieces)
        return Closed(self)


class Citation(NamedTuple):
    """A place of the web that a text goes back to."""
    url: str
    title: str = ""
    start: Optional[int] = None          # characters of the part's text; None: all of it
    end: Optional[int] = None


class Turn(NamedTuple):
    """What one side said: "system", "user" (with the results of tools) or "assistant"."""
    role: str
    parts: list[Part]


class Tool(NamedTuple):
    """A tool that the model may call."""
    kind: str                            # function, text (its input is no JSON), search or other
    name: str
    description: str = ""
    schema: Mapping[str, Any] = MappingProxyType({})        # of its input, as the client wrote it
    strict: bool = False                 # its input must match the schema
    namespace: str = ""
    syntax: Mapping[str, Any] = MappingProxyType({})        # that the input of a text tool follows
    search: Mapping[str, Any] = MappingProxyType({})        # allowed_domains, blocked_domains,
    # user_location and max_uses, as Anthropic spells them
    native: Mapping[str, Any] = MappingProxyType({})        # what else the client wrote of it
    origin: str = ""                     # the API whose form `native` has


class Choice(NamedTuple):
    """Whether, and which, tool has to be called."""
    mode: str                            # auto, none, required or tool
    name: str = ""                       # of the tool, where the mode is that
    namespace: str = ""


class Format(NamedTuple):
    """The form that the answer's text must have: JSON, of a schema unless that is None."""
    schema: Any
    name: str = ""
    description: str = ""
    strict: bool = False


class Conversation:
    """A request. What has no place here is in `rest` under the client's name of the field."""
    choice: Optional[Choice] = None
    one_call_at_a_time = streams = False
    format: Optional[Format] = None
    effort: Optional[str] = None                 # one of EFFORTS, as asked
    summary: Optional[str] = None                # of thoughts: auto, concise or detailed
    output_cap: Optional[int] = None
    sampling: Mapping[str, Any] = MappingProxyType({})    # temperature, top_p and top_k
    stops: Sequence[str] = ()
    user: Optional[str] = None
    tier: Optional[str] = None                   # OpenAI's word: auto, default, flex, priority

    def __init__(self, model: str) -> None:
        self.model = model                       # as the provider names it
        self.turns: list[Turn] = []              # each message, in order; a system prompt is first
        self.tools: list[Tool] = []              # those that are allowed
        self.known_tools: set[tuple] = set()     # kind, name and namespace, while they are read
        self.changed: dict[str, str] = {}        # what the reader had to change, to be reported
        self.names: dict[str, str] = {}          # of losses, where not the API's usual ones
        self.rest: dict[str, Any] = {}           # lost, and reported, where a writer has no place
        self.hints: dict[str, Any] = {}          # lost without a word: the answer is the same


class Target(NamedTuple):
    """For whom a request is written."""
    most_output_tokens: int
    is_openai: bool = False              # OpenAI itself, and not one that speaks its format
    manners: Provider = Provider("", "openai", "")         # of the server
    # Thinking that was kept by the call behind it and a digest of all before; and its keeper.
    recall: Callable[[str, str], list[dict]] = lambda call_id, digest: []
    keep: Callable[..., None] = lambda call_id, digest, thoughts: None


class Terms:
    """What a writer arranged in a request, and its answer has to be freed of."""

    stops: Sequence[str] = ()                    # as the client gave them
    calls_in_order = False                       # the provider never goes back to a call
    answers_by_tool = False                      # the answer comes as the input of ANSWER_TOOL
    unfences = False                             # JSON was asked for in words: it may be fenced
    betas: tuple[str, ...] = ()                  # for the header anthropic-beta
    said_choice: Any = None                      # a tool_choice that became words
    digest = ""                                  # of all that the answer's thinking is bound to
    ids: Iterable[str] = frozenset()             # of the calls there were, as the client has them

    def __init__(self, names: ToolNames) -> None:
        self.names = names                       # of tools, as the provider knows them


# An answer is a series of events: Began, then parts, then Ended. A part is opened, grows by More,
# and is closed; then, not before, its text and all else of it are complete. Parts may be open side
# by side: writers for an API that has one open at a time hold the others back. A whole answer is
# the same series. PING may stand anywhere.


class Tokens(NamedTuple):
    """Usage, in one counting: what was cached is inside `input`, what was thought in `output`."""
    input: int = 0
    cached: int = 0                      # read from a cache
    written: int = 0                     # to a cache
    output: int = 0
    thought: int = 0


class Began(NamedTuple):
    """The first event of an answer."""
    id: str                              # as the provider gave it; "" where it did not
    model: Any
    tier: Optional[str] = None           # OpenAI's word for the one that served
    tokens: Tokens = Tokens()            # as far as they are known by then


class Opened(NamedTuple):
    """A part begins: of a call with id, name, namespace and is_text; of others with its kind."""
    part: Part


class More(NamedTuple):
    """A part goes on; `text` is never empty. Of a call it is arguments, as in Part.text."""
    part: Part
    text: str


class Closed(NamedTuple):
    """A part is over and complete: Part.text is all that More brought, or was in it at once."""
    part: Part


class Ended(NamedTuple):
    """The last event of an answer."""
    reason: str                          # end, stop, length, calls or refused
    tokens: Tokens = Tokens()
    stop: Optional[str] = None           # the stop sequence that was met
    refusal: Optional[str] = None        # why it was refused, where that was said apart
    tier: Optional[str] = None           # as in Began, where it came at the end


# What servers call the end of an answer -> our reason; the first that is found counts. Their words
# are OpenAI's, Anthropic's, those of Gemini, Mistral, Cohere, Bedrock, Z.ai, DeepSeek and MiniMax,
# and of gateways before them (their SDKs and reports, November 2026).
_END_WORDS = (
    ("failed", "error|abort|fail|cancel|time_?out|overload|quota|rate_?limit|insufficient"
     "|unavailable|malformed|unexpected|interrupt|too_many|missing"),
    ("refused", "filter|refus|safety|sensitive|recitation|block|prohibited|spii|guardrail"
     "|moderation|toxic|violation|language"),
    ("length", "length|tokens|limit|context|truncat|incomplete"),
    ("calls", "tool|function"), ("end", "stop|end|eos|complete|finish|done|normal"))


@functools.lru_cache(maxsize=64)
def _end_said_by(word: str) -> str:
    return next((reason for reason, words in _END_WORDS if re.search(words, word.lower())), "")


def reason_of_end(word: str, kinds: Collection[str], words: str = "") -> str:
    """Return why an answer that consists of parts of these kinds is over.

    Raises UpstreamBroke, with more `words` of the provider's, where what it says is a failure, or
    means nothing and nothing came before it.
    """
    reason = _end_said_by(word[:80])               # which are kept, so that they must be short
    if reason == "failed" or not (reason or kinds):
        raise UpstreamBroke("the provider's answer ended in " + shown_name(word.replace(" ", ""))
                            + (words and f": {words}"))
    if "refusal" in kinds:
        return "refused"
    return reason if reason in ("refused", "length") else "calls" if "call" in kinds else "end"


class Ping(NamedTuple):
    """Nothing yet; the connection is alive."""


PING = Ping()
AnswerEvent = Union[Began, Opened, More, Closed, Ended, Ping]


NO_LAST_EVENT = "the provider's stream ended without its last event"


class Whole(NamedTuple):
    """An answer at once."""
    began: Began
    parts: Sequence[Part]
    ended: Ended


def folded(events: Iterable[AnswerEvent]) -> Whole:
    """Return an answer at once. Its parts are in the order in which they were opened."""
    newest: dict = {}
    parts = []
    for event in events:
        newest[type(event)] = event
        if type(event) is Opened:
            parts.append(event.part)
    return Whole(newest.get(Began) or Began("", None), parts, newest.get(Ended) or Ended("end"))


class AnswerWriter:
    """Writes an answer in a client's API, made for one request. A subclass has a method for each
    event, and `whole`, which returns an answer at once."""
    _began: Callable
    _opened: Callable
    _more: Callable
    _closed: Callable
    _ended: Callable
    whole: Callable

    def events(self, events: Iterable[AnswerEvent]) -> Iterator[dict]:
        """Return an answer as the stream's events; a ping is {"type": "ping"}."""
        steps = {Began: self._began, Opened: self._opened, More: self._more,
                 Closed: self._closed, Ended: self._ended, Ping: lambda ping: ({"type": "ping"},)}
        return itertools.chain.from_iterable(steps[type(event)](event) for event in events)

    def failed(self, body: dict) -> Iterable[dict]:
        """Return what ends a stream after an error, given as the client's API has it."""
        return [body]

    # What tells the ids of items apart where a server gives each answer the same one.
    end_of_ids: Callable[[], str] = staticmethod(lambda: "")

    # Takes an item that its client may name by its id alone; Translator says where to.
    keep: Callable = staticmethod(lambda item: None)


class Failure(NamedTuple):
    """An error of a provider."""
    status: int                          # 402: nothing is left there; 529: it is overloaded
    message: str
    code: Optional[str] = None           # OpenAI's, as context_length_exceeded
    param: Optional[str] = None
    sizes: Optional[tuple[int, int]] = None      # of an overflow: tokens asked for, and the most
    cap: int = 0                         # the output among those that were asked for


# Where servers put the words of an error, outermost first. What stands behind `raw` is the error of
# another server, as text (OpenRouter's metadata).
_WORDS = ("error", "response", "message", "detail", "error_description", "msg", "error_message",
          "errors", "title", "status", "metadata", "raw")
MAX_ERROR_CHARS = 8192                   # of words that are looked through; vendors' are shorter
# How servers say that a prompt is longer than the context, and what the most is. Sources: their
# code and reports (HOSTS of 28 November 2026: vLLM, SGLang, llama.cpp, Ollama, LM Studio, TGI,
# DeepSeek, Mistral, Moonshot, MiniMax, Z.ai, xAI, Gemini, DashScope, OpenRouter, Together, GitHub,
# Vertex, Bedrock, Cohere, Copilot, Volcengine, Baidu).
OVERFLOW = (
    r"(?i)maximum context length|context_length_exceeded|exceed_context_size|\bn_ctx\b"
    r"|exceed[^.]{0,200}context[ _-]?(length|window|size|limit)"
    r"|context[ _-]?(length|window|size|)[^.]{0,200}(exceed|is full|overflow)|context the overflows"
    r"|\b(prompt|input|conversation|messages?|text)( is| are| length| tokens?){0,2} too long"
    r"|\b(prompt|input|conversation|messages?|request's|total)\b.{0,60}\b(tokens?|length)\b"
    r".{0,120}(exceed|(larger|greater) than|over the|not fit|only supports up to)"
    r"|prompt exceeds max length|longer than the model|model token limit"
    r"|maximum (supported |allowed )?(prompt|input|model|sequence) length|range of input length"
    r"|with [\d,]+ maximum context"
    r"|tokens[^.]{0,60} exceed (max message tokens|the configured limit)"
    r"|too many (input )?tokens\b[.:]|tokens in request more than max tokens"
    r"|`inputs` must have less than [\d,]+ tokens|`inputs` tokens \+ `max_new_tokens` must be"
    r"|request body too large for [^.]* model\. max size|reduce the length of the messages"
    r"|tokens to keep from the initial prompt|current length is \d+ while limit is")
_LIMIT = (
    r"(?i)(?:context[ _-]?(?:length|window|size|limit:.{1,40}>)|token limit|length limit"
    r"|maximum \w* ?(?:prompt|model|input|sequence|allowed) length|tokens allowed|max\w* size"
    r"|limit (?:is|of)|<=|\[1,|less than|input tokens:|supports up to|(?:cannot|should not) exceed"
    r"|n_ctx).{0,60}?(\d[\d,]{3,17})|(\d[\d,]{3,17}) maximum context")
# How they say which part of it is the cap, and which the prompt.
_CAP = (r"(\d{1,9}) (?:tokens )?(?:in the (?:completion|output)|for the completion"
        r"|output tokens|`max_new_tokens`)|is too large: (\d{1,9})"
        r"|exceed context limit: \d{1,9} \+ (\d{1,9})")
_PROMPT = r"(\d{1,9}) (?:input|`inputs`) tokens|limit: (\d{1,9}) \+|(\d{1,9}) `inputs`"


def words_of(body: Any, depth: int = 8) -> str:
    """Return what an error says in words, wherever they stand in it; "" where there are none."""
    if isinstance(body, str):
        return words_of(_parsed_error(body), depth - 1) or body
    if depth < 1 or not isinstance(body, (list, dict)):
        return ""
    if isinstance(body, list):
        return "; ".join(filter(None, (words_of(value, depth - 1) for value in body[:8])))
    said = [words_of(body.get(name), depth - 1) for name in _WORDS]
    words = next(filter(None, said), "")
    more = next(filter(None, said[2:5]), "") if isinstance(body.get("error"), str) else \
        words_of(json_object(body.get("metadata")).get("raw"), depth - 1)
    return f"{words}: {more}" if more and more != words else words


def _parsed_error(text: str) -> Any:
    """Return the error that a text holds as JSON, for some pass on that of another server so."""
    if not 2 < len(text) <= MAX_ERROR_CHARS or text[0] not in "[{":
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


QUOTA_CODES = frozenset({"insufficient_quota", "billing_hard_limit_reached"})


def failure_of(status: int, body: Any) -> Failure:
    """Read an error of a provider, in its API's form or in another of its own."""
    body = body[0] if isinstance(body, list) and body else body
    holder = json_object(body)
    inner = json_object(holder.get("error") or json_object(holder.get("response")).get("error")
                        or body)
    code, param, kind = (value if isinstance(value, str) else None for value in (
        inner.get("code") or json_object(inner.get("details")).get("error_code"),
        inner.get("param"), inner.get("type")))
    if code in QUOTA_CODES or kind == "billing_error":
        status = 402
    message = words_of(body) or (json.dumps(body, ensure_ascii=False)[:500] if body else "") \
        or f"the provider answered with the status {status}"
    return overflow_of(Failure(status, message, code, param), inner)


def overflow_of(failure: Failure, inner: Mapping[str, Any]) -> Failure:
    """Return a failure as that of a full context, where its words or its code say so."""
    words = failure.message[:MAX_ERROR_CHARS]
    if failure.code != "context_length_exceeded" and (
            failure.status not in (400, 413, 422)
            or not re.search(OVERFLOW, f"{inner.get('type')} {failure.code} {words}")):
        return failure
    asked, most, cap = _sizes_in(words)
    stated = [inner.get(name) for name in ("n_prompt_tokens", "n_ctx")]      # llama.cpp's
    if all(type(number) is int for number in stated):
        asked, most = stated
    return failure._replace(status=400, code="context_length_exceeded", cap=cap,
                            sizes=(asked, most) if asked > most else None)


def _sizes_in(words: str) -> tuple[int, int, int]:
    """Return what the words of an overflow say: (tokens asked for, the most, the cap among the
    first); 0 for what they do not."""
    def number(match: Optional[re.Match]) -> int:
        return int(next(filter(None, match.groups())).replace(",", "")) if match else 0

    most, cap, prompt = (number(re.search(how, words)) for how in (_LIMIT, _CAP, _PROMPT))
    asked = max([int(digits.replace(",", "")) for digits in re.findall(r"\d[\d,]{3,17}", words)
                 ], default=0)
    if asked <= most and cap and prompt:
        asked = prompt + cap
    return (asked, most, cap if asked > cap else 0) if most else (0, 0, 0)


# ==== 9. Names, ids and losses ==================================================================
#
# Lossless or loud: what could not be carried over is named in a header, or refused under --strict
# before it is sent. Names and ids of tools and calls fit both sides, and come back as they were.


class Losses:
    """What a translation could not carry over. With `strict`, a loss raises BadRequest.

    A name is a field of the client's, or a word for one that its API spells out in `names`.
    """

    def __init__(self, *, strict: bool = False) -> None:
        self._strict = strict
        self.names: Mapping[str, str] = {}       # word -> field of the client's API
        self._dropped: dict[str, None] = {}      # fields of the client's request, in order
        self.adjusted: dict[str, str] = {}       # field -> what it became

    def drop(self, name: str) -> None:
        """Report a field that the provider has no place for."""
        self._dropped[self._checked(name, "cannot be carried over to this model's provider")] = None

    @property
    def dropped(self) -> list[str]:
        """Return the fields that were dropped."""
        return [*self._dropped]

    def adjust(self, name: str, became: Any) -> None:
        """Report a field whose value had to change; `became` is a number or a word of ours."""
        self.report(self._checked(
            name, f"would have to become {became} for this model's provider"), became)

    def report(self, name: str, became: Any) -> None:
        """Report a field that the budget, and no translation, changed."""
        self.adjusted[name] = str(became)

    def _checked(self, name: str, fault: str) -> str:
        name = self.names.get(name, name)
        if self._strict:
            raise BadRequest(f"{shown_name(name)} {fault}, and strict mode is on",
                             param=shown_name(name))
        return name

    def headers(self) -> list[tuple[str, str]]:
        """Return the headers that show them."""
        changes = [f"{shown_name(name)}={shown_name(value)}"
                   for name, value in self.adjusted.items()]
        lines = (("x-ironcage-dropped-params", [*map(shown_name, self.dropped)]),
                 ("x-ironcage-adjusted", changes))
        return [(header, ",".join(names)[:2048]) for header, names in lines if names]


# What a value of the wrong shape raises: made from the name of a field, and what it must be.
Fault = Callable[[str, str], IroncageError]


@functools.lru_cache(maxsize=64)
def in_request(field: str) -> Fault:
    """Return what is raised for a wrong shape inside a field of a client's request."""
    return lambda name, kind: BadRequest(
        f"{shown_name(name)} in {field} must be {kind}" if name != field
        else f"{field} must be {kind}", param=field)


def IN_ANSWER(name: str, kind: str) -> IroncageError:
    """Return what is raised for a wrong shape in a provider's answer."""
    return UpstreamBroke(f"the provider's answer has another shape than its API says: "
                         f"{shown_name(name)} must be {kind}")


IN_MESSAGES, IN_TOOLS = in_request("messages"), in_request("tools")


def _absent(value: Any, blank: _T, name: str, fault: Optional[Fault], words: str) -> _T:
    """Return what stands for a member that is absent or null. Raises what `fault` makes for any
    other, which is in_request(name) unless that is given."""
    if value is None:
        return blank
    raise (fault or in_request(name))(name, words)


def text_in(holder: Mapping[str, Any], name: str, fault: Optional[Fault] = None) -> str:
    """Return a string among fields, or an empty one; see _absent()."""
    value = holder.get(name)
    return value if isinstance(value, str) else _absent(value, "", name, fault, "a string")


def object_in(holder: Mapping[str, Any], name: str, fault: Optional[Fault] = None) -> dict:
    """Return an object among fields, or an empty one; see _absent()."""
    value = holder.get(name)
    return value if isinstance(value, dict) else _absent(value, {}, name, fault, "an object")


def rows_in(holder: Mapping[str, Any], name: str, fault: Optional[Fault] = None) -> list[dict]:
    """Return a list of objects among fields, or an empty one; see _absent()."""
    value = holder.get(name)
    if isinstance(value, list) and all([isinstance(row, dict) for row in value]):
        return value
    return _absent(value, [], name, fault, "a list of objects")


def texts_in(fields: Mapping[str, Any], name: str) -> list[str]:
    """Return a string, or a list of them, among a request's fields. Raises BadRequest."""
    value = fields.get(name)
    texts = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(text, str) for text in texts):
        raise in_request(name)(name, "a list of strings")
    return texts


def count_or_zero(usage: Any, name: str) -> int:
    """Return a count in a usage object that is carried over; 0 where there is none."""
    value = usage.get(name) if isinstance(usage, dict) else 0
    return value if type(value) is int and value > 0 else 0


def _parts_of(content: Any) -> list[dict]:
    """Return a message's content as a list of parts; a string is a text part, null is none."""
    rows = content if isinstance(content, list) else (content,)
    return [row if isinstance(row, dict) else {"type": "text", "text": row}
            for row in rows if isinstance(row, (dict, str))]


def _content_of(holder: Mapping[str, Any], name: str = "content") -> Any:
    """Return what a message, or another, holds. Raises BadRequest where it is no text, list or
    null."""
    content = holder.get(name)
    if content is not None and not isinstance(content, (str, list)):
        raise BadRequest(f"a message's {name} must be a string or a list of parts",
                         param="messages" if name == "content" else name)
    return content


def _text_of(content: Any, separator: str = "") -> str:
    return separator.join(str(part.get("text") or "") for part in _parts_of(content)
                          if part.get("type") in (None, "text", "input_text"))


def by_rules(fields: Mapping[str, Any],
             rules: Mapping[str, tuple]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the top-level fields of a request that have no place in the form: those whose loss
    is reported, and the hints, whose loss nobody can see. Raises BadRequest.

    A rule is (action, neutral values): "own" is read elsewhere, "rest" and "hint" come back,
    "refuse" ends the request. Null is always neutral. A field without a rule is "rest".
    """
    kept: dict[str, dict[str, Any]] = {"rest": {}, "hint": {}}
    for name, value in fields.items():
        rule = rules.get(name, ("rest",))
        action = rule[0]
        if action == "own" or value is None or value in rule[1:]:
            continue
        if action == "refuse":
            raise BadRequest(f"{shown_name(name)}, as asked for here, cannot be carried over to "
                             "this model's provider", param=shown_name(name))
        kept[action][name] = value
    return kept["rest"], kept["hint"]


def begun(fields: Mapping[str, Any], rules: Mapping[str, tuple]) -> Conversation:
    """Return a conversation with what all APIs have under the same names. Raises BadRequest."""
    conversation = Conversation(str(fields["model"]))
    conversation.rest, conversation.hints = by_rules(fields, rules)
    conversation.streams = optional_flag(fields, "stream")
    conversation.sampling = {name: fields[name] for name in ("temperature", "top_p", "top_k")
                             if fields.get(name) is not None}
    for name, value in conversation.sampling.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise in_request(name)(name, "a number")
    return conversation


def _hashed(text: str, length: int) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:length]


EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")       # rising


def lowered_effort(asked: str, taken: Sequence[str]) -> str:
    """Return the highest effort that a model takes up to the one asked for; else the least."""
    known = [name for name in EFFORTS[:EFFORTS.index(asked) + 1] if name in taken]
    return known[-1] if known else taken[0]


_LAST_KEY_COUNTS = _decoder(dict)                  # as all readers of JSON have it that take two


def parsed_inside(text: str, decoder: json.JSONDecoder = _STRICT_JSON) -> Any:
    """Return JSON that stands as text in a body, and can stand there as itself. Raises ValueError.
    """
    try:
        value = decoder.decode(text)
    except (RecursionError, BadRequest) as err:
        raise ValueError("JSON that others may not read") from err
    most = MAX_JSON_DEPTH - 16
    if text.count("[") + text.count("{") > most and _nested_deeper_than([value], most):
        raise ValueError("nested too deep")
    return value


def arguments_to_input(text: str, decoder: json.JSONDecoder = _LAST_KEY_COUNTS) -> dict:
    """Return a call's arguments as an object; what is none is wrapped until its return."""
    try:
        value = parsed_inside(text, decoder) if text.strip() else {}
    except ValueError:
        return {"__raw": text}
    return value if isinstance(value, dict) else {"__value": value}


def input_to_arguments(value: Any) -> str:
    """Return the text that arguments_to_input() made an object of."""
    fields = json_object(value)
    if len(fields) == 1:
        if isinstance(fields.get("__raw"), str):
            return fields["__raw"]
        fields = fields.get("__value", fields)
    return plain_json(fields)


def call_input(call: Part) -> dict:
    """Return the input of a call as an object."""
    return {"input": call.text} if call.is_text else arguments_to_input(call.text)


TEXT_TOOL_SCHEMA = MappingProxyType({
    "type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"],
    "additionalProperties": False})
TEXT_TOOL_START = r'\s*\{\s*"input"\s*:\s*"'
# What of a JSON string can be read for sure: no half of an escape, nor of a surrogate pair.
TEXT_TOOL_CHARS = (r'(?:[^"\\]|\\["\\/bfnrt]|\\u(?![dD][89a-fA-F])[0-9a-fA-F]{4}'
                   r'|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2})*')


class TextInput:
    """The text inside {"input": "…"}, as it comes."""

    def __init__(self) -> None:
        self._json, self._has_begun = "", False      # of the object, what was not read yet
        self._pieces: list[str] = []                 # what was read

    def more(self, json_text: str) -> str:
        """Return what another piece of the object adds to the text."""
        self._json += json_text
        if not self._has_begun:
            start = re.match(TEXT_TOOL_START, self._json)
            if start is None:
                return ""
            self._has_begun, self._json = True, self._json[start.end():]
        chars = re.match(TEXT_TOOL_CHARS, self._json)[0]
        self._json, more = self._json[len(chars):], json.loads(f'"{chars}"', strict=False)
        self._pieces.append(more)
        return more

    def rest(self, whole: str) -> str:
        """Return what the whole object says beyond the text so far."""
        given, shown = arguments_to_input(whole), self.text
        text = str(given.get("input", given.get("__raw", "")))
        return text[len(shown):] if text.startswith(shown) else ""

    @property
    def text(self) -> str:
        """Return what was read."""
        return "".join(self._pieces)


FOREIGN_CHAR = re.compile("[^A-Za-z0-9_-]")       # in names and ids, for both vendors


class OwnName(NamedTuple):
    """A tool's name as its client knows it."""
    name: str
    namespace: str = ""
    is_text: bool = False        # its input is text, and travels as {"input": text}


class ToolNames:
    """Names of tools as a provider takes them, and back."""

    def __init__(self, most_chars: int) -> None:
        self._most = most_chars
        self._own: dict[str, OwnName] = {}         # name at the provider -> the client's
        self._fitting: dict[tuple[str, str], str] = {}     # and back

    def fitting(self, name: str, namespace: str = "", is_text: bool = False) -> str:
        """Return a name as the provider takes it; a changed one ends in a hash, so that none
        collide."""
        fitting = self._fitting.get((name, namespace))
        if fitting is None:
            own = f"{namespace}__{name}" if namespace else name
            fits = len(own) <= self._most and own not in self._own and not FOREIGN_CHAR.search(own)
            fitting = own if fits else \
                f"{FOREIGN_CHAR.sub('_', own)[:self._most - 9]}_{_hashed(own, 8)}"
            self._fitting[name, namespace] = fitting
            self._own[fitting] = OwnName(name, namespace, is_text)
        return fitting

    def own(self, fitting: str) -> OwnName:
        """Return the client's name of a tool that the provider names."""
        return self._own.get(fitting) or OwnName(fitting)


class CallIds:
    """Ids of calls as a provider takes them, each but once."""

    def __init__(self, pattern: str, prefix: str) -> None:
        self._fits, self._prefix = re.compile(pattern).fullmatch, prefix
        self._uses: dict[str, int] = {}            # of each of the provider's ids
        self.given: set[str] = set()               # those that the client has in their place

    def fitting(self, own: str) -> str:
        """Return the id of one call; a changed one depends on the client's alone."""
        again = self._uses.get(own, 0)
        self._uses[own] = again + 1
        if not again and self._fits(own):
            return own
        hashed = _hashed(f"{own}#{again}" if again else own, 24)
        return next(filter(self._fits, (self._prefix + hashed, hashed[:9])), own)


LEGAL_CALL_ID = r"(?!icid)[A-Za-z0-9_-]{1,64}"     # for both vendors
CARRIED_ID = r"icid[0-9]*_([A-Za-z0-9_-]+)"


def _packed(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).decode("ascii").rstrip("=")


def carried_call_id(given: str, used: Collection[str]) -> str:
    """Return the id of a call as every client and vendor takes it, unlike the ones in use. One
    that is changed can be had back with own_call_id()."""
    if given not in used and re.fullmatch(LEGAL_CALL_ID, given):
        return given
    packed = _packed(given.encode("utf-8", "surrogatepass"))
    if not given or len(packed) > 48:
        packed = secrets.token_hex(12)
    return next(own for number in itertools.chain(("",), itertools.count(len(used)))
                for own in (f"icid{number}_{packed}",) if own not in used)


def own_call_id(carried: str) -> str:
    """Return the id that a provider gave a call."""
    match = re.fullmatch(CARRIED_ID, carried) if carried.startswith("icid") else None
    try:
        return match and base64.b64decode(match[1] + "==", b"-_").decode(
            "utf-8", "surrogatepass") or carried
    except ValueError:
        return carried


_ID_PREFIX = re.compile("^(msg|resp)_")


def id_stem(own: str) -> str:
    """Return what of an answer's id can stand in another API's; a new one where there is none."""
    return FOREIGN_CHAR.sub("_", _ID_PREFIX.sub("", own)) or secrets.token_hex(12)


NO_RESULT = "[no result provided]"


def paired(turns: Iterable[Turn], ids: CallIds, losses: Losses) -> list[Turn]:
    """Return turns in which each call has one result, in the turn right behind it, in the order
    of the calls and before all else; and each result a call. Runs of the assistant are one turn.

    A result belongs to the oldest call of its id that has none, since the assistant spoke last;
    else to the one that had the last. One without a call becomes the user's text. The ids of
    calls and results become those that the provider takes.
    """
    rounds: list[tuple[list[Part], list[Turn]]] = [([], [])]     # the assistant's, what follows
    for turn in turns:
        if not turn.parts and turn.role != "system":
            continue
        if turn.role != "assistant":
            rounds[-1][1].append(turn)
        elif rounds[-1][1]:
            rounds.append(([*turn.parts], []))
        else:
            rounds[-1][0].extend(turn.parts)
    return [turn for said, after in rounds for turn in _paired_round(said, after, ids, losses)]


def _paired_round(said: list[Part], after: Sequence[Turn], ids: CallIds,
                  losses: Losses) -> list[Turn]:
    calls = [part for part in said if part.kind == "call"]
    waiting: dict[str, deque[Part]] = {}           # id -> its calls: the last, and, before it,
    for call in calls:                             # those without a result
        waiting.setdefault(call.id, deque()).append(call)
    results: dict[Part, Part] = {}
    behind = []
    for role, parts in after:
        rest: list[Part] = []
        for part in parts:
            if part.kind != "result":
                rest.append(part)
            elif part.id in waiting:
                queue = waiting[part.id]
                call = queue.popleft() if len(queue) > 1 else queue[0]
                if call in results:
                    losses.adjust("results", "paired")
                results[call] = part
            else:
                losses.adjust("results", "text")
                text = "".join([piece.text for piece in part.parts if piece.kind == "text"])
                rest += [Part("text", f"[result of tool call {part.id}]\n{text}"),
                         *(piece for piece in part.parts if piece.kind != "text")]
        if rest:
            behind.append(Turn(role, rest))
    if len(results) < len(calls):
        losses.adjust("results", "paired")
    front = []
    for call in calls:
        result = results.get(call) or Part("result", is_error=True, parts=[Part("text", NO_RESULT)])
        call.carried_id = call.id
        ids.given.add(call.id)
        call.id = result.id = ids.fitting(own_call_id(call.id))
        result.name, result.namespace, result.is_text = call.name, call.namespace, call.is_text
        front.append(result)
    if front and behind and behind[0].role == "user":
        front += behind.pop(0).parts
    return [Turn(role, parts) for role, parts in (("assistant", said), ("user", front)) if parts
            ] + behind


# What a client brings back of another provider's thinking.

OWN_SIGNATURE = "icx1."                            # of thinking that no Claude has signed
OWN_THINKING = OWN_SIGNATURE + _packed(b"chat")
# API -> types of a thought in its form.
THOUGHT_TYPES = MappingProxyType({
    "messages": ("thinking", "redacted_thinking"), "responses": ("reasoning",), "chat": (None,)})


def sealed(part: Part) -> str:
    """Return a thought in its provider's own form as a signature, for clients that bring back
    nothing else."""
    return OWN_SIGNATURE + _packed(json_bytes(
        {"from": part.origin, "by": part.maker, "native": part.native}))


def unseal(thought: Part, seal: str) -> None:
    """Give a thought the form that sealed() packed; none where that cannot be read."""
    try:
        packed = parsed_inside(base64.urlsafe_b64decode(
            (seal[len(OWN_SIGNATURE):] + "==").encode("ascii")).decode("utf-8"))
    except ValueError:
        packed = None
    said = json_object(packed)
    thought.origin, thought.maker = str(said.get("from") or ""), str(said.get("by") or "")
    native = json_object(said.get("native"))
    if native.get("type") in THOUGHT_TYPES.get(thought.origin, ()):      # else it is made up
        thought.native = native


def thinking_block(part: Part) -> dict:
    """Return a thought as Claude's block; another's carries its own form as the signature."""
    if part.origin == "messages":
        return part.native
    return {"type": "thinking", "thinking": part.text,
            "signature": sealed(part) if part.native else OWN_THINKING}


def thought_of(block: Mapping[str, Any]) -> Part:
    """Return what a client brings back as Claude's block: Claude's own, or what that carries."""
    signature, text = str(block.get("signature") or ""), block.get("thinking")
    thought = Part("thought", text if isinstance(text, str) else "")
    if not signature.startswith(OWN_SIGNATURE):
        thought.native, thought.origin = block, "messages"
    elif signature != OWN_THINKING:
        unseal(thought, signature)
    return thought


LATER_SYSTEM = "[system instruction, not from the user]\n"
FENCED = r"(?s)\s*```(?:json)?[ \t]*\n(.*?)\n?```\s*"
DATA_URL = r"(?i)data:([a-z]+/[a-z0-9.+-]+)(?:;[a-z-]+=[^;,]*)*;base64,"
IMAGE_MEDIA = ("image/jpeg", "image/png", "image/gif", "image/webp")
# The first bytes of an image, in base64, and what they say it is.
IMAGE_MAGIC = (("/9j/", "image/jpeg"), ("iVBORw0KGgo", "image/png"), ("R0lGOD", "image/gif"),
               ("UklGR", "image/webp"))
SEARCH_OPTIONS = ("allowed_domains", "blocked_domains", "user_location", "max_uses")


class RequestWriter:
    """Writes a conversation as a request of a provider's API, once. A subclass has `request`,
    which returns it, and `_tool`, which returns a tool, or None where that has no place there."""
    api, most_name_chars = "", 64
    takes_text = False                           # as the input of a tool
    request: Callable
    _tool: Callable

    def __init__(self, conversation: Conversation, target: Target, losses: Losses) -> None:
        self._asked, self._target, self._losses = conversation, target, losses
        self._names = ToolNames(self.most_name_chars)
        self.terms = Terms(self._names)
        self.terms.stops, self.terms.calls_in_order = conversation.stops, target.is_openai

    def _paired(self, ids: CallIds) -> list[Turn]:
        """Return the turns, in which calls and results are paired and have ids that fit."""
        self.terms.ids = ids.given
        return paired(self._asked.turns, ids, self._losses)

    def _left_over(self, takes: Container[str]) -> dict:
        """Return what a target takes under the client's name; the rest is reported as lost."""
        asked = self._asked
        for name in asked.rest:
            if name not in takes:
                self._losses.drop(name)
        return {name: value for given in (asked.hints, asked.rest)
                for name, value in given.items() if name in takes}

    def _cap(self) -> Optional[int]:
        """Return the output cap that was asked for, or the target's where that is less."""
        cap, most = self._asked.output_cap, self._target.most_output_tokens
        if cap is not None and cap > most:
            self._losses.adjust("output_cap", most)
            return most
        return cap

    def _written_tools(self) -> list[dict]:
        return [row for row in map(self._tool, map(self._taken, self._asked.tools))
                if row is not None]

    def _taken(self, tool: Tool) -> Tool:
        """Return a tool; where none takes text, one that does as a function, with the text inside
        its input and the syntax, which nobody enforces, in its description."""
        if tool.kind != "text" or self.takes_text:
            return tool
        self._names.fitting(tool.name, tool.namespace, True)
        text = tool.description
        if tool.syntax:
            self._losses.adjust("syntax", "described")
            text = f"{text}\n{json.dumps(tool.syntax)}".strip()
        return tool._replace(kind="function", description=text, schema=TEXT_TOOL_SCHEMA)

    def _goes_back(self, thought: Part) -> bool:
        """Whether a thought is in the form of this API and of this provider's making."""
        return bool(thought.native) and thought.origin == self.api \
            and thought.maker in ("", self._target.manners.name)

    def _thought(self, part: Part) -> Optional[Mapping[str, Any]]:
        if self._goes_back(part):
            return part.native
        if part.native:
            self._losses.adjust("thoughts", "removed")
        return None

    def _other(self, part: Part) -> Optional[dict]:
        """Return what is the API's own; the traces of another vendor's tools are left out."""
        if part.origin == self.api:
            return dict(part.native)
        self._losses.drop(f"{'input' if part.origin == 'responses' else 'messages'}."
                          f"{part.native.get('type')}")
        return None


def document_text(part: Part) -> str:
    """Return a document of plain text as text."""
    return f"<document title={part.name}>\n{part.text}\n</document>"


def untaken(part: Part) -> BadRequest:
    """Return the refusal of a part that a target has no place for."""
    kind = str(part.native.get("type") or part.kind)
    return BadRequest(f"content of the type {shown_name(kind)}, as it stands here, cannot be "
                      "carried over to this model's provider", param="messages")


# ==== 10. JSON schemas ==========================================================================
#
# What of a JSON schema each vendor can hold a model to, and a schema as the vendor takes it.

# What a request may ask to be enforced, by their documentation of structured outputs.
MOST_ENFORCED = MappingProxyType({"strict tools": 20, "optional properties": 24, "unions": 16})
# Of JSON schemas, what can be enforced, by their documentation and what their SDK leaves in.
SCHEMA_KEYWORDS = frozenset({"$defs", "$ref", "type", "enum", "const", "anyOf", "allOf", "default",
                             "properties", "required", "items", "title", "description"})
SCHEMA_MAPS = ("properties", "$defs", "definitions")        # name -> schema
SCHEMA_VALUES = ("enum", "const", "default")                # no schema stands in them
SCHEMA_FORMATS = frozenset({"date-time", "time", "date", "duration", "email", "hostname", "uri",
                            "ipv4", "ipv6", "uuid"})
UNTAKEN_PATTERN = r"\(\?[^:]|\\[bB1-9]"           # look-around, references back, word boundaries
WRAPPER_KEYWORDS = frozenset({"allOf", "title", "description", "default"})
ALTERNATIVES = ("anyOf", "oneOf", "allOf")
# Of JSON schemas, what OpenAI's strict mode refuses, and what it wants one of. From its guide to
# structured outputs, and reports of its 400s ("'default' is not permitted").
UNSTRICT_KEYWORDS = frozenset({
    "oneOf", "allOf", "not", "if", "then", "else", "default", "dependentRequired",
    "dependentSchemas", "patternProperties", "propertyNames", "minProperties", "maxProperties",
    "contains", "minContains", "maxContains", "uniqueItems", "unevaluatedProperties",
    "unevaluatedItems"})
SHAPE_KEYWORDS = frozenset({"type", "$ref", "anyOf", "enum", "const"})
SCHEMA_SHAPES = MappingProxyType({
    **dict.fromkeys(SCHEMA_MAPS, (dict, "an object")),
    **dict.fromkeys(("required", "enum", *ALTERNATIVES), (list, "a list")),
    "$ref": (str, "a string")})


def schemas_in(schema: Any) -> Iterator[dict]:
    """Yield a schema, and all that stand inside it; values that are no objects are none."""
    waiting = [schema]
    for one in waiting:                            # which grows as we go
        if isinstance(one, list):
            waiting += one
        elif isinstance(one, dict):
            yield one
            for name, value in one.items():
                if name in SCHEMA_MAPS:
                    waiting += value.values()
                elif name not in SCHEMA_VALUES and isinstance(value, (dict, list)):
                    waiting.append(value)


def checked_schema(schema: Any, fault: Fault) -> Any:
    """Return a schema in which what is looked at here has the shape that it must have."""
    for one in schemas_in(schema):
        for name, value in one.items():
            kind, words = SCHEMA_SHAPES.get(name, (object, ""))
            if not isinstance(value, kind):
                raise fault(name, words)
        if not all([isinstance(name, str) for name in one.get("required", ())]):
            raise fault("required", "a list of strings")
    return schema


def tool_schema(row: Mapping[str, Any], name: str) -> tuple[dict, bool]:
    """Return the schema of a tool's input, and whether it is to be enforced. One that is not goes
    on as it stands, unread. Raises BadRequest."""
    schema = object_in(row, name, IN_TOOLS)
    if row.get("strict"):
        checked_schema(schema, IN_TOOLS)
    return schema, bool(row.get("strict"))


def _is_object(schema: Mapping[str, Any]) -> bool:
    kind = schema.get("type")
    return kind == "object" or (isinstance(kind, list) and "object" in kind)


def _unwrapped(schema: Any) -> Any:
    """Return a schema that does no more than wrap another in allOf, as pydantic does, as that."""
    while isinstance(schema, dict) and len(schema.get("allOf", ())) == 1 \
            and schema.keys() <= WRAPPER_KEYWORDS:
        inner = json_object(schema["allOf"][0])
        schema = {**{name: schema[name] for name in schema if name != "allOf"}, **inner}
    return schema


def _referred(ref: str, root: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the schema that a local reference points to; an empty one where there is none."""
    target, is_map = root, False
    for step in ref[2:].split("/"):
        if step in SCHEMA_VALUES and not is_map:
            return {}
        target, is_map = json_object(target.get(step)), step in SCHEMA_MAPS and not is_map
    return {} if is_map else target


def with_root(schema: Any) -> Any:
    """Return a schema whose root is a reference into itself with its target as the root."""
    fields = json_object(schema)
    if not str(fields.get("$ref")).startswith("#/"):
        return schema
    return {**_referred(fields["$ref"], fields),
            **{name: fields[name] for name in ("$defs", "definitions") if name in fields}}


def claude_schema(schema: Any) -> Any:
    """Return a schema in the part of the language that Anthropic takes; the rest becomes words."""
    schema = _unwrapped(schema)
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return {"$ref": schema["$ref"]}
    kept: dict = {}
    words = []
    for name, value in schema.items():
        if name in SCHEMA_MAPS:
            kept[name] = {key: claude_schema(child) for key, child in value.items()}
        elif name in ALTERNATIVES:
            kept["anyOf" if name == "oneOf" else name] = [*map(claude_schema, value)]
        elif name == "items":
            kept[name] = claude_schema(value)
        elif name in SCHEMA_KEYWORDS or (name == "format" and str(value) in SCHEMA_FORMATS) \
                or (name == "minItems" and value in (0, 1)) \
                or (name == "pattern" and not re.search(UNTAKEN_PATTERN, str(value))):
            kept[name] = value
        elif name not in ("additionalProperties", "$schema", "$id", "strict"):
            words.append(f"{name}: {json.dumps(value)}")
    if _is_object(kept) or "properties" in kept:
        kept["additionalProperties"] = False
    if words:
        kept["description"] = "; ".join(
            [text for text in (kept.get("description"), *words) if isinstance(text, str)])
    return kept


def is_enforceable(schema: Any) -> bool:
    """Whether Claude can be held to a schema: it is closed, has a shape everywhere, does not
    refer to itself, and has values and alternatives that Anthropic takes."""
    return isinstance(schema, dict) and not _is_recursive(schema) \
        and all(map(_is_closed, schemas_in(schema)))


def _is_closed(schema: Mapping[str, Any]) -> bool:
    """Whether one level of a schema allows nothing but what Anthropic can enforce."""
    branches = schema.get("allOf", ()) if schema is _unwrapped(schema) else ()
    return not ((_is_object(schema) and not schema.get("properties"))
                or schema.get("additionalProperties") not in (None, False)
                or {"anyOf", "oneOf"} <= schema.keys() or isinstance(schema.get("items"), list)
                or any(isinstance(value, (dict, list))
                       for value in (schema.get("const"), *schema.get("enum", ())))
                or any("$ref" in branch for branch in _parts_of(branches)))


def _is_recursive(schema: Mapping[str, Any]) -> bool:
    """Whether a schema refers to itself, or to anything outside."""
    def refs_in(inner: Any) -> Iterator[str]:
        return iter({one["$ref"]: 0 for one in schemas_in(inner) if "$ref" in one})

    done: set[str] = set()
    path = {"": refs_in(schema)}                   # a chain of references -> those still to follow
    while path:
        at, refs = next(reversed(path.items()))
        ref = next(refs, None)
        if ref is None:
            done.add(at)
            del path[at]
        elif ref in path or not ref.startswith("#/"):
            return True
        elif ref not in done:
            path[ref] = refs_in(_referred(ref, schema))
    return False


def size_of(schema: Any) -> Counter:
    """Return how much of MOST_ENFORCED a schema takes up."""
    size: Counter = Counter()
    for one in schemas_in(schema):
        size["optional properties"] += len(one.get("properties", {}).keys()
                                           - set(one.get("required", ())))
        size["unions"] += isinstance(one.get("type"), list) or "anyOf" in one or "oneOf" in one
    return size


def object_schema(schema: Mapping[str, Any]) -> dict:
    """Return a tool's schema with one object at its top, where Anthropic takes no alternatives:
    a property can be as any of them has it, and what all require is required."""
    if schema.keys().isdisjoint(ALTERNATIVES):
        return {"type": "object", **schema}
    checked_schema(schema, IN_TOOLS)
    branches = [_referred(branch["$ref"], schema) if "$ref" in branch else branch
                for name in ALTERNATIVES for branch in _parts_of(schema.get(name))]
    own = {name: value for name, value in schema.items() if name not in ALTERNATIVES}
    if not branches:
        return {"type": "object", **own}
    variants: dict[str, dict[str, Any]] = {}       # of each property, by their JSON
    for branch in branches:
        for name, child in branch.get("properties", {}).items():
            variants.setdefault(name, {}).setdefault(compact_json(child), child)
    properties = {**{name: children[0] if len(children) == 1 else {"anyOf": children}
                     for name, children in ((name, [*each.values()])
                                            for name, each in variants.items())},
                  **own.get("properties", {})}
    in_all = set.intersection(*(set(branch.get("required", ())) for branch in branches))
    required = sorted(in_all.union(own.get("required", ())))
    return {"type": "object", **own, "properties": properties,
            **({"required": required} if required else {})}


def plain_schema(schema: Mapping[str, Any]) -> dict:
    """Return a tool's schema as an object at least, without the name of its dialect."""
    return {"type": "object", "properties": {}, **{
        name: value for name, value in schema.items() if name != "$schema"}}


def is_strict(schema: Any) -> bool:
    """Whether a schema meets OpenAI's strict mode: all properties required, no others allowed,
    a shape everywhere, and no keyword that it refuses."""
    return all(map(_is_strict_level, schemas_in(schema)))


def _is_strict_level(schema: Mapping[str, Any]) -> bool:
    properties = schema.get("properties")
    inner = [*(properties or {}).values(), *schema.get("anyOf", ()), schema.get("items", {})]
    if UNSTRICT_KEYWORDS & schema.keys() or not SHAPE_KEYWORDS & schema.keys() \
            or not all(isinstance(child, dict) for child in inner):      # none of them true
        return False
    return (properties is None and not _is_object(schema)) or (
        schema.get("additionalProperties") is False and properties is not None
        and set(schema.get("required", ())) == properties.keys())


# ==== 11. Chat completions ======================================================================
#
# The format of OpenAI, and of the many servers that speak it, know fewer fields, and send sloppier
# streams.


class Gpt(NamedTuple):
    """What a family of OpenAI's models takes, in chat completions and, where said, in Responses."""
    efforts: tuple[str, ...] = ()              # of reasoning, rising; (): it does not reason
    effort_with_tools: Optional[str] = "any"   # beside function tools: any, "none" or no field
    responses_adds: tuple[str, ...] = ()       # efforts that only Responses takes

    @property
    def responses_efforts(self) -> tuple[str, ...]:
        """Return the efforts of reasoning that the Responses API takes, rising."""
        return (*self.efforts, *self.responses_adds)


# First match wins; newer ones are taken to be like the newest. From their 400s, as reported:
# gpt-5.2 to 5.5 take tools without the field only, gpt-5.6 with "none" only (livekit/agents 7169,
# 8 September 2026). "max" is for Responses only, from gpt-5.6 on (experiential 764, 3 September);
# gpt-6-astra has no "none", and in chat completions takes no tools at all (genkit 6303,
# 8 September; litellm-docs 1173, 3 September); gpt-6.1-sol neither (read in November). -pro by
# their pages (opencode 3474); -codex were asked one by one on 10 July (big-AGI 1159).
GPT_FAMILIES = (
    (r"gpt-5-chat", Gpt()),
    (r"o\d", Gpt(("low", "medium", "high"))),
    (r"gpt-5\.\d+-chat", Gpt(("medium",))),
    (r"gpt-5-pro", Gpt(("high",))),
    (r"gpt-5\.\d+-pro", Gpt(("medium", "high", "xhigh"))),
    (r"gpt-5\.1-codex-max|gpt-5\.[2-5]-codex", Gpt(("low", "medium", "high", "xhigh"))),
    (r"gpt-5\.1-codex", Gpt(("low", "medium", "high"))),
    (r"gpt-5(-mini|-nano)?(-\d{4}|$)", Gpt(("minimal", "low", "medium", "high"))),
    (r"gpt-5\.1(-|$)", Gpt(("none", "low", "medium", "high"))),
    (r"gpt-5\.[2-5](-|$)", Gpt(("none", "low", "medium", "high", "xhigh"), None)),
    (r"gpt-5\.([6-9]|\d\d)(-|$)",
     Gpt(("none", "low", "medium", "high", "xhigh"), "none", ("max",))),
    (r"gpt-([6-9]|\d\d)", Gpt(("low", "medium", "high", "xhigh"), "none", ("max",))),
    (r"gpt-5|codex", Gpt(("none", "low", "medium", "high", "xhigh"), "none")),
    (r"", Gpt()),
)


@functools.lru_cache(maxsize=64)
def gpt_of(model: str) -> Gpt:
    """Return the family that a model belongs to."""
    return next(family for pattern, family in GPT_FAMILIES if re.match(pattern, model))


CHAT_RULES = MappingProxyType({
    **dict.fromkeys((
        "model", "messages", "max_tokens", "max_completion_tokens", "stream", "temperature",
        "top_p", "top_k", "stop", "tools", "functions", "tool_choice", "function_call",
        "parallel_tool_calls", "response_format", "reasoning_effort", "user",
        "safety_identifier", "metadata", "service_tier"), ("own",)),
    **dict.fromkeys((
        "stream_options", "prediction", "prompt_cache_key", "prompt_cache_retention",
        "prompt_cache_options"), ("hint",)),
    "n": ("refuse", 1), "audio": ("refuse",), "modalities": ("refuse", ["text"], []),
    "store": ("rest", False), "seed": ("rest",), "frequency_penalty": ("rest", 0),
    "presence_penalty": ("rest", 0), "logit_bias": ("rest", {}), "logprobs": ("rest", False),
    "top_logprobs": ("rest", 0), "verbosity": ("rest",), "moderation": ("rest",),
    "web_search_options": ("rest",),
})
CHAT_NAMES = MappingProxyType({
    "output_cap": "max_tokens", "effort": "reasoning_effort", "stops": "stop",
    "format": "response_format", "choice": "tool_choice", "strict": "tools.function.strict",
    "schema": "tools.function.parameters", "syntax": "tools.custom.format",
    "results": "messages.tool", "later_system": "messages.system",
    "prefill": "messages.prefill", "thoughts": "messages.thinking", "turns": "messages",
    "tier": "service_tier"})
CALL_MEMBERS = (("function", "arguments"), ("custom", "input"))      # custom: of one that is text
# What is carried of a tool beside its function, in Anthropic's form.
TOOL_EXTRAS = ("cache_control", "defer_loading", "input_examples", "eager_input_streaming")
SEARCH_TYPES = r"web_search(_preview)?(_\d{4}_\d\d_\d\d)?"
ANTHROPIC_TOOL = r"_\d{8}$"                        # how the types of its own tools end


def read_chat_request(fields: Mapping[str, Any]) -> Conversation:
    """Read a chat completions request. Raises BadRequest."""
    conversation = begun(fields, CHAT_RULES)
    policies = object_in(object_in(fields, "moderation"), "policy", in_request("moderation"))
    if any(json_object(policy).get("mode") == "block" for policy in policies.values()):
        raise BadRequest("moderation that blocks cannot be carried over to this model's provider",
                         param="moderation")
    for name in ("max_tokens", "max_completion_tokens"):      # the latter counts
        cap = optional_count(fields, name, least=1)
        if cap:
            conversation.output_cap, conversation.names["output_cap"] = cap, name
    conversation.stops = texts_in(fields, "stop")
    conversation.effort = effort_of(fields.get("reasoning_effort"), "reasoning_effort")
    set_user(conversation, fields)
    conversation.format = format_of(object_in(fields, "response_format"), "response_format",
                                    "json_schema")
    functions = rows_in(fields, "functions")
    conversation.tools = [_tool_of(row) for row in rows_in(fields, "tools", IN_TOOLS) or [
        {"type": "function", "function": function} for function in functions]]
    conversation.one_call_at_a_time = fields.get("parallel_tool_calls") is False or bool(functions)
    read_choice(fields.get("tool_choice", fields.get("function_call")), conversation)
    conversation.turns = [_turn_of(message) for message in messages_in(fields, "messages")]
    return conversation


def effort_of(effort: Any, field: str) -> Optional[str]:
    """Return an effort of reasoning. Raises BadRequest."""
    if effort is not None and effort not in EFFORTS:
        raise BadRequest(f"{field} is not one of {', '.join(EFFORTS)}", param=field)
    return effort


def set_user(conversation: Conversation, fields: Mapping[str, Any]) -> None:
    """Read who asks, in which tier, and the rest of the metadata, from a request of OpenAI's."""
    conversation.tier = text_in(fields, "service_tier") or None
    metadata = {**object_in(fields, "metadata")}
    named = metadata.pop("user_id", None)
    user = fields.get("safety_identifier") or fields.get("user") or named
    conversation.user = user if isinstance(user, str) else None
    if metadata:
        conversation.rest["metadata"] = metadata


def messages_in(fields: Mapping[str, Any], name: str) -> list[dict]:
    """Return the messages of a request. Raises BadRequest."""
    if not isinstance(fields.get(name), list) or not fields[name]:
        raise in_request(name)(name, "a list of at least one message")
    return rows_in(fields, name)


def format_of(row: Mapping[str, Any], field: str, inside: str = "") -> Optional[Format]:
    """Return the form of the text that OpenAI's `field` asks for; a schema may stand `inside`.
    Raises BadRequest."""
    fault, kind = in_request(field), row.get("type", "text")
    if kind not in ("text", "json_object", "json_schema"):
        raise BadRequest(f"{field} has a type that is not known", param=field)
    holder = object_in(row, inside, fault) if inside else row
    return None if kind == "text" else Format(
        checked_schema(holder.get("schema"), fault), text_in(holder, "name", fault),
        text_in(holder, "description", fault), holder.get("strict") is True)


def read_choice(wanted: Any, conversation: Conversation) -> None:
    """Read tool_choice of either of OpenAI's APIs; tools that it does not allow are left out. What
    is a tool's stands inside its type in one; its own are named by their type. Raises
    BadRequest."""
    def named(row: Mapping[str, Any]) -> str:
        kind = str(row.get("type"))
        return text_in(json_object(row.get(kind)) or row, "name", fault) \
            or re.sub(SEARCH_TYPES, "web_search", kind)

    rule, fault = json_object(wanted), in_request("tool_choice")
    if rule.get("type") == "allowed_tools":
        rule = object_in(rule, "allowed_tools", fault) or rule
        names = {*map(named, rows_in(rule, "tools", fault))}
        conversation.tools = [tool for tool in conversation.tools if tool.name in names]
        wanted = rule.get("mode", "auto")
    if wanted in ("auto", "none", "required"):
        conversation.choice = Choice(str(wanted))
    elif isinstance(wanted, dict):
        conversation.choice = Choice("tool", named(wanted), text_in(wanted, "namespace", fault))
    elif wanted is not None:
        raise BadRequest("tool_choice is not one of auto, none, required, or a tool",
                         param="tool_choice")


def _tool_of(row: Mapping[str, Any]) -> Tool:
    kind = row.get("type", "function")
    if "input_schema" in row or (isinstance(kind, str) and re.search(ANTHROPIC_TOOL, kind)):
        return Tool("other", str(row.get("name") or ""), native=row, origin="messages")
    inner = json_object(row.get(str(kind)))
    extras = {key: holder[key] for holder in (row, inner) for key in TOOL_EXTRAS if key in holder}
    return openai_tool(kind, inner, native=extras, origin="messages")


def openai_tool(kind: Any, row: Mapping[str, Any], **more: Any) -> Tool:
    """Read a function, or a tool that takes text, with `more` that is known of it. Raises
    BadRequest."""
    name = text_in(row, "name", IN_TOOLS)
    own = {"description": text_in(row, "description", IN_TOOLS), **more}
    if kind not in ("function", "custom") or not name:
        raise BadRequest("a tool must be a function or a custom tool with a name", param="tools")
    if kind == "custom":
        syntax = object_in(row, "format", IN_TOOLS)
        return Tool("text", name, syntax=syntax if syntax.get("type") == "grammar" else {}, **own)
    schema, strict = tool_schema(row, "parameters")
    return Tool("function", name, schema=schema, strict=strict, **own)


def _turn_of(message: Mapping[str, Any]) -> Turn:
    role = message.get("role")
    if role in ("user", "system", "developer"):
        return Turn("user" if role == "user" else "system", _chat_parts(message))
    if role == "assistant":
        return Turn("assistant", _said_parts(message))
    if role not in ("tool", "function"):
        raise BadRequest("a message has a role that is not known", param="messages")
    call_id = message.get("tool_call_id", message.get("name"))
    return Turn("user", [Part("result", id=str(call_id or ""), parts=_chat_parts(message),
                              mark=_mark_of(message))])


def _said_parts(message: Mapping[str, Any]) -> list[Part]:
    """Return what the assistant said: thoughts, text, a refusal and calls, in that order."""
    rows = rows_in(message, "tool_calls", IN_MESSAGES)
    if message.get("function_call"):
        function = object_in(message, "function_call", IN_MESSAGES)
        rows = [{"id": function.get("name"), "function": function}]
    calls = [_call_part(row) for row in rows]
    own = _parts_of(message.get("x_anthropic_content"))        # what ChatWriter put there
    if own and all(isinstance(block.get("type"), str) for block in own) \
            and _text_of(own) == _text_of(message.get("content")) \
            and [block.get("id") for block in own if block.get("type") == "tool_use"] \
            == [call.id for call in calls]:
        in_order = iter(calls)
        return [next(in_order) if block.get("type") == "tool_use"
                else Part("other", native=block, origin="messages") for block in own]
    blocks = _parts_of(message.get("thinking_blocks")) \
        or _thoughts_of(message.get("reasoning_details"))
    said = [thought_of({name: value for name, value in block.items() if name != "index"})
            for block in blocks if block.get("type") == "redacted_thinking"
            or (block.get("type") == "thinking" and block.get("signature"))]
    refusal = text_in(message, "refusal", IN_MESSAGES)
    if message.get("audio"):                           # what was said aloud is at OpenAI
        calls.append(Part("other", native={"type": "audio"}, origin="chat"))
    return [*said, *_chat_parts(message), *([Part("refusal", refusal)] if refusal else []), *calls]


def _thoughts_of(details: Any) -> list[dict]:
    """Return Claude's thinking blocks in OpenRouter's form, which may hold other models' too."""
    return [{"type": "thinking", "thinking": row.get("text") or "", "signature": row["signature"]}
            if row.get("signature") else {"type": "redacted_thinking", "data": row["data"]}
            for row in _parts_of(details) if row.get("signature") or row.get("data")
            if str(row.get("format", "anthropic")).startswith("anthropic")]


def _call_part(row: Mapping[str, Any]) -> Part:
    kind = row.get("type", "function")
    inner = object_in(row, str(kind), IN_MESSAGES)
    arguments = inner.get("input" if kind == "custom" else "arguments")
    if isinstance(arguments, dict):                    # as some servers send them
        arguments = plain_json(arguments)
    return Part("call", text_in({"arguments": arguments}, "arguments", IN_MESSAGES),
                id=str(row.get("id") or ""), name=text_in(inner, "name", IN_MESSAGES),
                is_text=kind == "custom")


def _mark_of(holder: Mapping[str, Any]) -> Optional[dict]:
    """Return the cache mark of a part, Anthropic's or OpenAI's, as the former."""
    mark = holder.get("cache_control")
    if mark is None and holder.get("prompt_cache_breakpoint") is not None:
        is_long = json_object(holder["prompt_cache_breakpoint"]).get("ttl") == "12h"
        mark = {"type": "ephemeral", **({"ttl": "1h"} if is_long else {})}
    return mark


def _chat_parts(message: Mapping[str, Any]) -> list[Part]:
    content, parts = _content_of(message), []
    if isinstance(content, str):
        return [Part("text", content)] if content else []
    for row in _parts_of(content):
        part = openai_part(row, IN_MESSAGES)
        if row.get("type") == "thinking":                      # Mistral's
            part = Part("thought", _reasoning_of({"content": [row]}))
        if part is None:
            raise BadRequest(f"content of the type {shown_name(str(row.get('type')))} cannot be "
                             "carried over to this model's provider", param="messages")
        if part.kind not in ("text", "refusal") or part.text:
            parts.append(part)
    return parts


TEXT_MEMBERS = MappingProxyType({                  # type of a part -> the member with its text
    **dict.fromkeys(("text", "input_text", "output_text"), "text"), "refusal": "refusal",
    "encrypted_content": "encrypted_content"})     # of subagents; only OpenAI encrypts it


def openai_part(row: Mapping[str, Any], fault: Fault) -> Optional[Part]:
    """Read text, a refusal, an image or a file of OpenAI's APIs; None for another type. What an
    image or a file is stands in the part, in Responses, or in a member of it, in chat."""
    kind, image = str(row.get("type")), row.get("image_url")
    if kind in TEXT_MEMBERS:
        part = Part("refusal" if kind == "refusal" else "text",
                    text_in(row, TEXT_MEMBERS[kind], fault))
    elif kind in ("image_url", "input_image") and not row.get("file_id"):
        url, detail = (text_in(image, name, fault) for name in ("url", "detail")) \
            if isinstance(image, dict) else (text_in(row, name, fault)
                                             for name in ("image_url", "detail"))
        data = re.match(DATA_URL, url)
        part = Part("image", detail=detail, **(
            {"media": data[1].lower(), "data": url[data.end():]} if data else {"url": url}))
    elif kind in ("file", "input_file"):
        part = _file_part(object_in(row, "file", fault) if kind == "file" else row, fault)
    else:
        return None
    part.mark = _mark_of(row)
    return part


def _file_part(file: Mapping[str, Any], fault: Fault) -> Part:
    """Return a file: a PDF, or text, in base64; or where it is."""
    data, title, file_id, url = (text_in(file, name, fault) for name in (
        "file_data", "filename", "file_id", "file_url"))
    if url or (file_id and not data):
        return Part("document", url=url, file_id=file_id, name=title)
    header = re.match(DATA_URL, data)
    media, encoded = (header[1].lower(), data[header.end():]) if header \
        else ("application/pdf", data)
    if not encoded or encoded.startswith("data:") \
            or not (media == "application/pdf" or media.startswith("text/")):
        raise fault("file_data", "a PDF or text, inline")
    if media == "application/pdf":
        return Part("document", media=media, data=encoded, name=title)
    try:
        return Part("document", base64.b64decode(encoded).decode("utf-8"), name=title)
    except ValueError:
        raise fault("file_data", "base64 of UTF-8") from None


# Requests that are written for OpenAI, or for a server that speaks its format.

MAX_STOPS = 4
# Fields that OpenAI takes as they are, in both of its APIs; others know few of them.
OPENAI_TAKES = frozenset({"metadata", "verbosity", "prompt_cache_key", "prompt_cache_retention",
                          "prompt_cache_options"})


class _OpenAIRequest(RequestWriter):
    """What is written for OpenAI or a server in its place, in either of its APIs."""
    open_choice: Optional[str] = None              # tool_choice where any tool may be called
    takes_text = True

    def __init__(self, conversation: Conversation, target: Target, losses: Losses) -> None:
        super().__init__(conversation, target, losses)
        self._is_openai = target.is_openai
        self._gpt = gpt_of(conversation.model) if target.is_openai else Gpt()

    def _effort(self, taken: Sequence[str], beside_tools: Optional[str] = "any") -> Optional[str]:
        """Return the effort that was asked for, or the next lower that the model takes, beside
        tools if need be. A model that does not reason has none."""
        asked = self._asked.effort
        if not taken:
            return None
        effort = beside_tools if beside_tools != "any" else asked and lowered_effort(asked, taken)
        if effort is None and asked not in (None, "none"):
            self._losses.drop("effort")
        elif effort not in (None, asked):
            self._losses.adjust("effort", effort)
        return effort

    def _extras(self, effort: Optional[str]) -> dict:
        """Return the sampling that goes with an effort, who asks, as a hash, and what OpenAI takes
        as the client wrote it."""
        asked, is_openai = self._asked, self._is_openai
        samples, kept = not self._gpt.efforts or effort == "none", {}
        for name, value in asked.sampling.items():
            if samples and name != "top_k":
                kept[name] = value
            elif value != 1 or name == "top_k":
                self._losses.drop(name)
        if is_openai and asked.user:
            kept["safety_identifier"] = _hashed(asked.user, 64)
        if is_openai and asked.tier:
            kept["service_tier"] = asked.tier
        # Models that do not reason have one verbosity, and refuse all others.
        takes = OPENAI_TAKES if self._gpt.efforts else OPENAI_TAKES - {"verbosity"}
        return {**kept, **self._left_over(takes if is_openai else ())}

    def _tool_fields(self) -> dict:
        """Return the tools, and how they are called; a request that has only another vendor's own
        is refused."""
        asked, tools = self._asked, self._written_tools()
        if not tools and asked.tools:
            raise BadRequest("the tools are all of one provider's own, which this model's "
                             "provider does not have", param="tools")
        fields = {"tools": tools, "tool_choice": self._choice(tools),
                  "parallel_tool_calls": False if asked.one_call_at_a_time else None}
        return {name: value for name, value in fields.items() if value is not None} if tools else {}

    def _choice(self, tools: list[dict]) -> Any:
        """Return the row of the tool that must be called, or a word; None where all is open."""
        choice = self._asked.choice
        if choice is None or choice.mode != "tool":
            return choice and choice.mode
        name = self._names.fitting(choice.name, choice.namespace)
        for row in tools:
            kind = row["type"]
            own = row.get(kind, row)               # chat completions have it inside
            if own.get("name", "web_search") == name:
                named = {"name": name} if "name" in own else {}
                return {"type": kind, **(named if own is row else {kind: named})}
        self._losses.adjust("choice", "auto")
        return self.open_choice

    def _turns(self, ids: CallIds) -> tuple[list[Part], list[Turn]]:
        """Return the system prompt, and the turns behind it."""
        turns = self._paired(ids)
        start = next((at for at, turn in enumerate(turns) if turn.role != "system"), len(turns))
        return [part for turn in turns[:start] for part in turn.parts], turns[start:]

    def _openai_tool(self, tool: Tool) -> tuple[str, dict]:
        """Return the type of a tool, and what OpenAI has to know of it."""
        kind = "custom" if tool.kind == "text" else "function"
        row: dict = {"name": self._names.fitting(tool.name, tool.namespace)}
        if tool.description:
            row["description"] = tool.description
        if kind == "custom":
            return kind, {**row, "format": tool.syntax} if tool.syntax else row
        schema = plain_schema(tool.schema)
        enforced = tool.strict and self.takes_text and is_strict(schema)
        if tool.strict and self.takes_text and not enforced:       # which others do not know
            self._losses.drop("strict")
        return kind, {**row, "parameters": schema, "strict": enforced}

    def _format(self) -> tuple[dict, str]:
        """Return the form of the text, as Responses has it; or words that ask for it, where a
        schema is of no object, which OpenAI does not take."""
        wanted = self._asked.format
        if wanted is None or wanted.schema is None:
            return {"type": "json_object"} if wanted else {}, ""
        schema = with_root(wanted.schema)
        if self._is_openai and json_object(schema).get("type") != "object":
            self._losses.adjust("format", "instructed")
            return {}, "Respond with JSON and nothing else, which matches this JSON schema:\n" \
                + json.dumps(schema)
        about = {"description": wanted.description} if wanted.description else {}
        return {"type": "json_schema", "name": wanted.name or "output", "schema": schema,
                "strict": is_strict(schema), **about}, ""


class _ChatRequest(_OpenAIRequest):
    """Writes chat completions requests: for OpenAI, or a server that knows less."""
    api = "chat"

    def __init__(self, conversation: Conversation, target: Target, losses: Losses) -> None:
        super().__init__(conversation, target, losses)
        self.takes_text = target.is_openai
        self._messages: list[dict] = []

    def request(self) -> dict:
        """Return the request."""
        asked, gpt = self._asked, self._gpt
        tools = self._tool_fields()
        self._write_messages()
        cap, stops = self._cap(), asked.stops[:0 if gpt.efforts else MAX_STOPS]
        if len(asked.stops) > len(stops):
            self._losses.drop("stops")
        effort = self._effort(gpt.efforts, gpt.effort_with_tools if tools else "any")
        wanted, words = self._format()
        if words:
            self._messages.insert(0, self._system_message([words]))
        kind = wanted.pop("type", None)
        optional = {
            self._target.manners.caps[0]: cap, **tools, "stop": stops or None,
            "stream": asked.streams or None, "reasoning_effort": effort,
            "response_format": kind and {"type": kind, **({kind: wanted} if wanted else {})},
            **self._extras(effort)}
        return {"model": asked.model, "messages": self._messages, **{
            name: value for name, value in optional.items() if value is not None}}

    def _tool(self, tool: Tool) -> Optional[dict]:
        if tool.kind not in ("function", "text"):
            self._losses.drop(f"tools.{tool.native.get('type')}")
            return None
        kind, row = self._openai_tool(tool)
        if not row.get("strict", True):            # which is what it takes an absent one for
            del row["strict"]
        return {"type": kind, kind: row}

    def _write_messages(self) -> None:
        write = {"system": self._system, "user": self._user, "assistant": self._assistant}
        system, turns = self._turns(
            CallIds(self._target.manners.call_ids or "(?s).{0,40}", "call_"))
        self._system(system)
        for role, parts in turns:
            write[role](parts)
        if not self._messages:
            raise BadRequest("messages have no content", param="messages")
        if self._messages[-1]["role"] == "assistant":
            self._losses.adjust("prefill", "kept")
        for message in self._messages:
            rows = message["content"]
            if message["role"] == "user" and (len(rows) == 1 or not self._is_openai) \
                    and all([row.keys() == _PLAIN_TEXT for row in rows]):    # some take no list
                message["content"] = "\n\n".join([row["text"] for row in rows])

    def _add(self, role: str, content: Any, **more: Any) -> None:
        """Add a message. Chat templates of local models want the user's and the assistant's to
        alternate, and those of some servers do not have the user speak behind a tool."""
        last = self._messages[-1] if self._messages else {"role": ""}
        if role == "user" == last["role"] and not self._is_openai:
            last["content"] += content
            return
        if (last["role"], role) == ("tool", "user") and not self._target.manners.user_after_tool:
            self._messages.append({"role": "assistant", "content": "I have the results."})
            self._losses.adjust("turns", "bridged")
        self._messages.append({"role": role, "content": content, **more})

    def _system_message(self, texts: list[str]) -> dict:
        content = [{"type": "text", "text": text} for text in texts] \
            if len(texts) > 1 and self._is_openai else "\n\n".join(texts)
        return {"role": "developer" if self._gpt.efforts else "system", "content": content}

    def _system(self, parts: list[Part]) -> None:
        """Write a system message in place. Chat templates of other servers want it first, or not
        at all; there it is said as the user."""
        texts = [part.text for part in parts if part.text]
        if not texts:
            return
        if self._target.manners.cache_marks and any(part.mark for part in parts):
            self._add("system", [self._part(part) for part in parts])
        elif self._is_openai or not self._messages:
            self._add(**self._system_message(texts))
        else:
            self._losses.adjust("later_system", "user")
            self._add("user", [{"type": "text", "text": LATER_SYSTEM + "\n\n".join(texts)}])

    def _assistant(self, parts: list[Part]) -> None:
        text, thought, calls, backs = "", "", [], []
        field = self._target.manners.reasoning_field
        for part in parts:
            if part.kind == "call":
                calls.append(self._call(part))
            elif part.kind in ("text", "refusal"):
                text += part.text
            elif part.kind == "thought":
                thought += part.text
                if not field or self._goes_back(part):         # else its words are enough
                    backs += filter(None, [self._thought(part)])
            else:
                self._other(part)
        if not text and not calls:
            return
        if calls and not backs:
            first = next(part for part in parts if part.kind == "call")
            backs = self._target.recall(first.carried_id, "")
        said: dict = {}
        extras: dict[str, dict] = {}                   # of calls, by their number
        for back in backs:                             # which a client may have made up
            for number, extra in json_object(back.get("calls")).items():
                extras.setdefault(number, {}).update(opaque_in(json_object(extra)))
            said.update((name, back[name]) for name in GOES_BACK & back.keys())
        for number, call in enumerate(calls):
            call.update(extras.get(str(number), {}))
        if field:
            said[field] = thought
        self._add("assistant", text or None, **said, **({"tool_calls": calls} if calls else {}))

    def _call(self, call: Part) -> dict:
        is_wrapped = call.is_text and not self.takes_text
        name = self._names.fitting(call.name, call.namespace, is_wrapped)
        kind, member = CALL_MEMBERS[call.is_text and not is_wrapped]
        text = plain_json(call_input(call)) if is_wrapped else call.text
        return {"id": call.id, "type": kind, kind: {"name": name, member: text}}

    def _user(self, parts: list[Part]) -> None:
        """Write a user's turn: its tool results as messages of their own, first; then the rest."""
        content: list[dict] = []
        for part in parts:
            if part.kind == "result":
                content += self._result(part)
            else:
                content.append(self._part(part))
        if content:
            self._add("user", content)

    def _result(self, result: Part) -> list[dict]:
        """Write the result of a call, which is text only, and return what the user says of it."""
        texts, beside = [], []
        for shown in map(self._part, result.parts):
            if "text" in shown:
                texts.append(shown["text"])
                continue
            kind = shown["type"].partition("_")[0]
            texts.append(f"[{kind}]")
            beside += [{"type": "text", "text": f"{kind.capitalize()} from tool "
                        f"{self._names.fitting(result.name, result.namespace)}:"}, shown]
        text = "\n".join(texts)
        if result.is_error and text != NO_RESULT and not text.startswith("Error"):
            text = f"Error: {text}"
        self._add("tool", text, tool_call_id=result.id)
        return beside

    def _part(self, part: Part) -> dict:
        if part.kind == "text":
            row: dict = {"type": "text", "text": part.text}
            if part.mark is not None and self._target.manners.cache_marks:
                row["cache_control"] = part.mark
            return row
        inline = f"data:{part.media};base64,{part.data}" if part.data else ""
        if part.kind == "image" and (inline or part.url):
            detail = {"detail": part.detail} if part.detail else {}
            return {"type": "image_url", "image_url": {"url": inline or part.url, **detail}}
        if part.kind == "document" and inline and self._is_openai:
            return {"type": "file", "file": {"filename": part.name or "document.pdf",
                                             "file_data": inline}}
        if part.kind == "document" and part.text:
            return {"type": "text", "text": document_text(part)}
        raise untaken(part)


_PLAIN_TEXT = {"type", "text"}                     # the members of a part that is no more


# Its answers: (the finish_reason of an answer, our reason), both ways.
FINISH_REASONS = MappingProxyType({"end": "stop", "stop": "stop", "length": "length",
                                   "calls": "tool_calls", "refused": "content_filter"})


def chat_tokens(usage: Any, prompt_name: str = "prompt_tokens",
                completion_name: str = "completion_tokens") -> Tokens:
    """Return usage of OpenAI's format in our counting. Where a server's total is more than prompt
    and completion, the rest was reasoning; some have a name of their own for cache writes."""
    prompt, usage = count_or_zero(usage, prompt_name), json_object(usage)
    read, made = usage.get(f"{prompt_name}_details"), usage.get(f"{completion_name}_details")
    return Tokens(
        prompt, count_or_zero(read, "cached_tokens"),
        count_or_zero(read, "cache_write_tokens") or count_or_zero(read, "cache_creation_tokens"),
        max(count_or_zero(usage, completion_name), count_or_zero(usage, "total_tokens") - prompt),
        count_or_zero(made, "reasoning_tokens"))


def chat_usage(tokens: Tokens) -> dict:
    """Return usage as chat completions have it."""
    return {"prompt_tokens": tokens.input, "completion_tokens": tokens.output,
            "total_tokens": tokens.input + tokens.output,
            "prompt_tokens_details": {"cached_tokens": tokens.cached,
                                      "cache_write_tokens": tokens.written, "audio_tokens": 0},
            "completion_tokens_details": {
                "reasoning_tokens": tokens.thought, "audio_tokens": 0,
                "accepted_prediction_tokens": 0, "rejected_prediction_tokens": 0}}


def chat_stream_of(completion: dict) -> Iterable[dict]:
    """Return a whole completion as a stream. Raises UpstreamBroke where it is none."""
    if not _first_choice(completion):
        raise UpstreamBroke("the provider's answer has no choices")
    return (completion, {"type": "done"})


def chat_events(stream: Iterable[Mapping[str, Any]], terms: Terms) -> Iterator[AnswerEvent]:
    """Read a stream of chunks: of OpenAI, and of servers that take liberties with its format."""
    reader = _ChunkReader(terms)
    yield from itertools.chain.from_iterable(map(reader.read, stream))
    yield from reader.finish()


class _ChunkReader:
    """The state of one stream of chunks. Texts and thoughts are open one at a time; a call until
    another part begins and its arguments are whole, for calls may come interleaved."""

    def __init__(self, terms: Terms) -> None:
        self._terms = terms
        self._has_begun = self._is_done = False
        self._events: list[AnswerEvent] = []         # of the chunk that is read
        self._kinds: set[str] = set()                # of the parts there were
        self._said: Optional[Part] = None            # the text or thought that is open
        self._back: dict[str, Any] = {}              # what the server wants back, not yet carried
        self._calls = 0                              # how many there were
        self._unclosed: dict[Part, None] = {}        # those that are not closed, in order
        self._waiting: dict[Part, None] = {}         # of these, those that are not open yet
        self._newest: dict[Any, Part] = {}           # of each index of the provider's
        self._by_id: dict[str, Part] = {}
        self._touched: set[Part] = set()             # the calls of the delta that is read
        self._grown: set[Part] = set()               # those that may be whole since
        self._usage: Any = None
        self._tier: Any = None
        self._choice: dict = {}                      # what the finish said

    def read(self, chunk: Mapping[str, Any]) -> list[AnswerEvent]:
        """Return the events of one chunk."""
        kind, self._events = chunk.get("type"), []
        if kind in ("done", "ping"):
            self._is_done |= kind == "done"
            return [PING] if kind == "ping" else []
        self._tier = chunk.get("service_tier") or self._tier
        if not self._has_begun:
            self._has_begun = True
            self._events.append(Began(str(chunk.get("id") or ""), chunk.get("model"), self._tier))
        choice = _first_choice(chunk)
        if chunk.get("usage") or "x_groq" in chunk or "usage" in choice:
            usage = usage_in(chunk)
            self._usage = usage if isinstance(usage, dict) else self._usage
        delta = choice.get("delta")
        if not delta:                                # what says all once more, if anything is new
            message = json_object(choice.get("message"))
            delta = message if not self._kinds else "call" not in self._kinds and {
                "tool_calls": message.get("tool_calls")}
        if isinstance(delta, dict):
            self._read_delta(delta)
        if choice.get("finish_reason"):
            self._choice = choice
        return self._events

    def _read_delta(self, delta: Mapping[str, Any]) -> None:
        text = delta.get("content")
        if len(delta) == 1 and isinstance(text, str):        # as nearly all are
            self._say("text", text)
            return
        if delta.keys() != _CALLS_ALONE:
            thought = _reasoning_of(delta)
            for name in ("reasoning_details", "thinking_blocks"):
                if delta.get(name):
                    self._back.setdefault(name, []).extend(_parts_of(delta[name]))
            self._back.update(opaque_in(delta))
            self._say("thought", thought)
            for kind, said in (("text", text), ("refusal", delta.get("refusal"))):
                if said:
                    self._say(kind, said if isinstance(said, str) else _text_of(said))
        self._touched.clear()
        rows = _parts_of(delta.get("tool_calls") or ())
        if isinstance(delta.get("function_call"), dict):
            rows.append({"index": 0, "function": delta["function_call"]})
        for row in rows:
            self._read_call(row)

    def _say(self, kind: str, text: str) -> None:
        part = self._said
        if not text:
            return
        if part is None or part.kind != kind:
            self._close_said()
            self._close_calls(whole_only=not self._terms.calls_in_order)
            part = self._said = Part(kind)
            self._kinds.add(kind)
            self._events.append(part.opened())
        self._events.append(part.grown(text))

    def _close_said(self) -> None:
        part, self._said = self._said, None
        if part is not None:
            if part.kind == "thought" and self._back:
                part.native, part.origin = self._taken_back(), "chat"
            self._events.append(part.closed())

    def _taken_back(self) -> dict:
        """Return what the server wants back, once: thinking in blocks, which came in pieces that
        end in a signature."""
        back, self._back = self._back, {}
        blocks: list[dict] = []
        pieces: list[str] = []
        for row in back.pop("thinking_blocks", ()):
            pieces.append(str(row.get("thinking") or ""))
            if row.get("signature") or row.get("type") != "thinking":
                blocks.append({**row, "thinking": "".join(pieces)} if row.get("signature") else row)
                pieces = []
        return {**back, "thinking_blocks": blocks} if blocks else back

    def _carry_back(self) -> None:
        """Have a thought without words carry what the server wants back."""
        if self._back:
            part = Part("thought", native=self._taken_back(), origin="chat")
            self._events += (part.opened(), part.closed())

    def _call_of(self, call_id: str, index: Any, name: str, more: str) -> Part:
        """Return the call that a delta belongs to; servers get ids and indexes wrong.

        A delta goes on with the newest call of its index, or with that of its id where the newest
        has another. One with a name begins another call where its id is new, where the call is
        whole, and behind one of the same delta.
        """
        call, known = self._newest.get(index), self._by_id.get(call_id)
        if known is not None and (call.given_id != call_id if call is not None
                                  else index is None or not name):
            call = known
        if call is not None and name:
            is_other = call_id != call.given_id if call_id and call.given_id else \
                call in self._touched
            call = None if is_other or (more.strip() and _is_whole(call)) else call
        if call is None:
            call = Part("call", pieces=[], is_open=False, is_closed=False, given_id="",
                        number=self._calls)
            self._calls += 1
            self._unclosed[call] = self._waiting[call] = None
        if call_id and not call.given_id:
            call.given_id = call_id
            call.id = f"{call_id}_{self._calls}" if call_id in self._by_id else call_id
            self._by_id.setdefault(call_id, call)
        self._newest[index] = call
        self._touched.add(call)
        self._grown.add(call)
        return call

    def _read_call(self, row: Mapping[str, Any]) -> None:
        inner = json_object(row.get("function", row.get("custom")))
        name, more = inner.get("name"), inner.get("arguments", inner.get("input"))
        name = name if isinstance(name, str) else ""
        more = more if isinstance(more, str) else "" if more is None else plain_json(more)
        index, call_id = row.get("index"), row.get("id")
        call_id = "" if call_id is None else str(call_id)
        index = index if isinstance(index, (int, str)) else None
        said = self._newest.get(index) if call_id and name and more else None
        if not (call_id or name or more) or (       # some send an empty call in every answer
                said is not None and (said.given_id, said.name) == (call_id, name)
                and len(said.pieces) <= len(more)   # for none is empty: else each delta joins all
                and "".join(said.pieces) == more):  # or a whole call once more at its end
            return
        call = self._call_of(call_id, index, name, more)
        if opaque_in(row):
            self._back.setdefault("calls", {})[str(call.number)] = opaque_in(row)
        if call.is_closed and more.strip():
            raise UpstreamBroke("the provider went on with a tool call after another block")
        if call.is_open:
            if more and not call.is_closed:
                self._events.append(call.grown(more))
            return
        if name:                                     # which may come in pieces, or in each delta
            self._kinds.add("call")
            call.name = name if name.startswith(call.name) else call.name + name
            call.is_text = "input" in inner
        if more:
            if call.pieces == _NO_ARGUMENTS:         # with which some begin, whatever follows
                call.pieces.clear()
            call.pieces.append(more)
        if call.name and call.pieces:
            if call.pieces == _NO_ARGUMENTS:
                self._close_said()
            else:
                self._open_call(call)

    def _open_call(self, call: Part) -> None:
        """Open a call, after those that were named before it."""
        self._close_said()
        self._close_calls(whole_only=True)
        self._carry_back()
        for waiting in [*self._waiting]:
            if waiting.name or waiting is call:
                del self._waiting[waiting]
                self._grown.add(waiting)
                waiting.is_open, waited = True, waiting.pieces
                self._events += (waiting.opened(), *map(waiting.grown, waited))
            if waiting is call:
                return

    def _close_calls(self, *, whole_only: bool) -> None:
        """Close the calls that are open, and those that wait; what says nothing of one is none."""
        calls = sorted(self._grown, key=lambda call: call.number) if whole_only \
            else [*self._unclosed]
        self._grown.clear()
        for call in calls:
            if call.is_closed or not (call.name or call.pieces) \
                    or (whole_only and not ((call.is_open or call.pieces == _NO_ARGUMENTS)
                                            and _is_whole(call))):
                continue
            if not call.is_open:
                self._open_call(call)
            call.is_closed = True
            del self._unclosed[call]
            if not call.is_text and not any(map(str.strip, call.pieces)):
                self._events.append(call.grown("{}"))
            self._events.append(call.closed())

    def finish(self) -> list[AnswerEvent]:
        """Return what ends the answer. Raises UpstreamBroke where the provider never did."""
        self._events = []
        finish = self._choice.get("finish_reason")
        if finish is None and not self._is_done:
            raise UpstreamBroke("the provider's stream ended without a finish reason")
        reason, stop = reason_of_end(str(finish or "stop"), self._kinds, words_of(
            {"error": self._choice.get("error")})[:MAX_ERROR_CHARS]), None     # OpenRouter's
        self._close_said()
        self._close_calls(whole_only=False)
        self._carry_back()
        matched = self._choice.get("stop_reason")            # as vLLM and others add it
        if reason == "end" and matched in self._terms.stops:
            reason, stop = "stop", matched
        return [*self._events, Ended(reason, chat_tokens(self._usage), stop, tier=self._tier)]


_NO_ARGUMENTS = ["{}"]                             # pieces of a call that may yet have some
# What a server signs its calls and messages with, and refuses the next turn without: Gemini's
# (ai.google.dev, thought signatures), and that of Copilot's gateway; read November 2026.
OPAQUE_FIELDS = frozenset({"extra_content", "thought_signature", "reasoning_opaque",
                           "provider_specific_fields"})
GOES_BACK = OPAQUE_FIELDS | {"reasoning_details", "thinking_blocks"}       # with a message
_CALLS_ALONE = {"tool_calls"}                        # as most deltas with calls are


def opaque_in(holder: Mapping[str, Any]) -> dict:
    """Return what has to go back to a server as it came, with a call or a message."""
    return {name: holder[name] for name in OPAQUE_FIELDS & holder.keys()
            if holder[name] is not None}


def _is_whole(call: Part) -> bool:
    """Whether a call's arguments so far are JSON, so that no more can come."""
    if not next(filter(str.strip, reversed(call.pieces)), "").rstrip().endswith("}"):
        return False
    try:
        json.loads("".join(call.pieces))
    except (ValueError, RecursionError):
        return False
    return True


def _first_choice(body: Mapping[str, Any]) -> dict:
    choices = body.get("choices")
    for choice in choices if isinstance(choices, list) else ():
        if isinstance(choice, dict) and choice.get("index") in (0, None):
            return choice
    return {}


_REASONING = ("reasoning_content", "reasoning", "reasoning_text", "thinking")
REASONING_FIELDS = frozenset({*_REASONING, "reasoning_details"})


def _reasoning_of(said: Mapping[str, Any]) -> str:
    """Return the reasoning that compatible servers show, under any of its names."""
    content = said.get("content")
    if REASONING_FIELDS.isdisjoint(said) and not isinstance(content, list):
        return ""
    for name in _REASONING:
        if isinstance(said.get(name), str) and said[name]:
            return said[name]
    rows = [*_parts_of(said.get("reasoning_details")), *(
        inner for part in (_parts_of(content) if isinstance(content, list) else ())
        if part.get("type") == "thinking" for inner in _parts_of(part.get("thinking")))]
    return "".join(str(row.get("text") or row.get("summary") or "") for row in rows)


class ChatWriter(AnswerWriter):
    """Writes an answer as a chat completion, whole or as chunks; [DONE] is the Router's."""

    def __init__(self, fields: Mapping[str, Any], created_at: int) -> None:
        self._is_legacy = bool(fields.get("functions"))
        self._reasons = {**FINISH_REASONS, **({"calls": "function_call"} if self._is_legacy
                                              else {})}
        self._base: dict = {"created": created_at, "system_fingerprint": None}
        self._wants_usage = bool(json_object(fields.get("stream_options")).get("include_usage"))
        if self._wants_usage:
            self._base["usage"] = None
        self._length = self._calls = self._annotations = 0       # of the text so far; how many
        self._places: dict[Part, int] = {}           # where a text begins in it; a call's number

    def whole(self, answer: Whole) -> dict:
        """Return an answer as a chat.completion."""
        began, parts, ended = answer
        texts, calls, thoughts, refusals = (
            [part for part in parts if part.kind == kind]
            for kind in ("text", "call", "thought", "refusal"))
        content = "".join([part.text for part in texts])
        refusal = "".join([ended.refusal or "", *(part.text for part in refusals)])
        said: dict = {"role": "assistant", "refusal": refusal or None,
                      "content": content if texts or not calls else None}
        starts = itertools.accumulate((len(part.text) for part in texts), initial=0)
        annotations = [row for part, at in zip(texts, starts) for row in _chat_notes(part, at)]
        if annotations:
            said["annotations"] = annotations
        if calls:
            rows = [_chat_call(part, part.text) for part in calls]
            said.update({"function_call": rows[0][rows[0]["type"]]} if self._is_legacy
                        else {"tool_calls": rows})
        if thoughts:
            said["thinking_blocks"] = [thinking_block(part) for part in thoughts]
            said["reasoning_content"] = "\n".join(
                part.text for part in thoughts if part.text) or None
        if any(part.kind in ("other", "search") and part.origin == "messages" for part in parts):
            said["x_anthropic_content"] = [part.native for part in parts]
        return {**self._base, "id": "chatcmpl-" + id_stem(began.id), "object": "chat.completion",
                "model": began.model, "service_tier": ended.tier or began.tier,
                "usage": chat_usage(ended.tokens),
                "choices": [{"index": 0, "message": said, "logprobs": None,
                             "finish_reason": self._reasons[ended.reason]}]}

    def _chunk(self, delta: dict, finish_reason: Optional[str] = None) -> dict:
        return {**self._base, "choices": [{"index": 0, "delta": delta, "logprobs": None,
                                           "finish_reason": finish_reason}]}

    def _call_chunk(self, part: Part, row: Mapping[str, Any]) -> dict:
        return self._chunk({"function_call": row[CALL_MEMBERS[part.is_text][0]]} if self._is_legacy
                           else {"tool_calls": [{"index": self._places[part], **row}]})

    def _began(self, event: Began) -> Iterable[dict]:
        self._base.update(id="chatcmpl-" + id_stem(event.id), object="chat.completion.chunk",
                          model=event.model)
        return [self._chunk({"role": "assistant", "content": "", "refusal": None})]

    def _opened(self, event: Opened) -> Iterable[dict]:
        part = event.part
        if part.kind != "call":
            self._places[part] = self._length
            return ()
        self._places[part], self._calls = self._calls, self._calls + 1
        return [self._call_chunk(part, _chat_call(part, ""))]

    def _more(self, event: More) -> Iterable[dict]:
        part, text = event
        if part.kind == "call":
            kind, member = CALL_MEMBERS[part.is_text]
            return [self._call_chunk(part, {kind: {member: text}})]
        if part.kind == "text":
            self._length += len(text)
        return [self._chunk({_CHUNK_FIELDS[part.kind]: text})]

    def _closed(self, event: Closed) -> Iterator[dict]:
        part = event.part
        if part.kind == "thought":
            yield self._chunk({"thinking_blocks": [{"index": part.index, **thinking_block(part)}]})
        rows = _chat_notes(part, self._places[part])
        if rows:
            yield self._chunk({"annotations": [
                {"index": number, **row} for number, row in enumerate(rows, self._annotations)]})
            self._annotations += len(rows)

    def _ended(self, event: Ended) -> Iterator[dict]:
        if event.refusal:
            yield self._chunk({"refusal": event.refusal})
        yield self._chunk({}, self._reasons[event.reason])
        if self._wants_usage:
            yield {**self._base, "choices": [], "usage": chat_usage(event.tokens)}


_CHUNK_FIELDS = MappingProxyType({
    "text": "content", "thought": "reasoning_content", "refusal": "refusal"})


def _chat_call(part: Part, text: str) -> dict:
    kind, member = CALL_MEMBERS[part.is_text]
    return {"id": part.id, "type": kind, kind: {"name": part.name, member: text}}


def _chat_notes(part: Part, at: int) -> list[dict]:
    return [{"type": "url_citation", "url_citation": row} for row in annotations_of(part, at)]


def annotations_of(part: Part, at: int = 0) -> list[dict]:
    """Return the citations of a text as OpenAI has them, where it begins at `at`."""
    return [{"url": row.url, "title": row.title, "start_index": at + (row.start or 0),
             "end_index": at + (len(part.text) if row.end is None else row.end)}
            for row in part.citations if part.kind == "text"]


# Status -> (type, code) in OpenAI's words.
OPENAI_ERRORS = MappingProxyType({
    400: ("invalid_request_error", None), 401: ("invalid_request_error", "invalid_api_key"),
    402: ("insufficient_quota", "insufficient_quota"),
    403: ("invalid_request_error", "permission_denied"),
    404: ("invalid_request_error", "model_not_found"),
    413: ("invalid_request_error", "request_too_large"),
    429: ("requests", "rate_limit_exceeded"), 500: ("server_error", None),
    503: ("server_error", "overloaded"), 504: ("server_error", "timeout"),
    529: ("server_error", "overloaded")})


def openai_error(failure: Failure, request_id: str) -> tuple[int, dict]:
    """Return an error in OpenAI's words, with its status."""
    status = failure.status
    kind, code = OPENAI_ERRORS.get(status, (
        "server_error" if status >= 500 else "invalid_request_error", None))
    return {402: 429, 529: 503}.get(status, status), {"error": {
        "message": failure.message, "type": kind, "param": failure.param,
        "code": failure.code or code}}


# ==== 12. Messages ==============================================================================
#
# Anthropic's Messages API.


class Claude(NamedTuple):
    """What a family of Claude models takes."""
    sampling: bool = False           # temperature and the like
    prefill: bool = False            # a last message of the assistant
    manual_thinking: bool = False    # a budget of tokens; else adaptive
    may_not_think: bool = True       # thinking can be disabled
    efforts: tuple[str, ...] = ("low", "medium", "high", "xhigh", "max")
    later_system: bool = True        # system messages after the first user's
    forced_tools: bool = False       # tool_choice any or tool
    schemas: bool = True             # structured output


# First match wins; newer ones are taken to be like the newest.
CLAUDE_FAMILIES = (
    (r"claude-(3|2|instant)|claude-(opus|sonnet)-4(-0|-1|-\d{8}|$)", Claude(
        True, True, True, efforts=(), later_system=False, forced_tools=True, schemas=False)),
    (r"claude-opus-4-5", Claude(True, True, True, efforts=("low", "medium", "high"),
                                later_system=False, forced_tools=True)),
    (r"claude-(sonnet|haiku)-4-5", Claude(True, True, True, efforts=(), later_system=False,
                                          forced_tools=True)),
    (r"claude-(opus|sonnet)-4-6", Claude(True, efforts=("low", "medium", "high", "max"),
                                         later_system=False, forced_tools=True)),
    (r"claude-opus-4-7", Claude(later_system=False, forced_tools=True)),
    (r"claude-opus-4-8|claude-(opus|sonnet)-5(-\d{8}|$)|claude-haiku-5-5",
     Claude(forced_tools=True)),
    (r"claude-(fable|mythos)-5(-\d{8}|$)", Claude(may_not_think=False, forced_tools=True)),
    (r"claude-(fable|mythos)", Claude(may_not_think=False)),
    (r"", Claude()),
)
THINKING_BUDGETS = MappingProxyType({
    "minimal": 1024, "low": 2048, "medium": 8192, "high": 16384, "xhigh": 24576, "max": 32000})
# Models that can be told to leave out thinking whose beginning has changed, where they would answer
# 400. Source: Anthropic's "Preserved thinking", November 2026.
BINDING_MODELS = r"(.*/)?claude-((fable|mythos)-5-[12]|(opus|sonnet|haiku)-5-5)(-|$)"
BINDING_BETA, FILES_BETA = "thinking-binding-controls-2026-08-01", "files-api-2025-04-14"
MAX_CACHE_MARKS = 4
ANSWER_TOOL = "json_response"                      # takes the answer where no schema is enforced
UNSTREAMED_OUTPUT_TOKENS = 21_333                  # more may take over ten minutes (their SDKs)
SEARCH_TOOL = MappingProxyType({"type": "web_search_20250305", "name": "web_search"})


def object_of(required: Sequence[str] = (), **properties: Mapping[str, Any]) -> dict:
    """Return the schema of a tool that its client runs, and its vendor's models know."""
    return {"type": "object", "properties": properties,
            **({"required": [*required]} if required else {})}


STRING, INTEGER, STRINGS = {"type": "string"}, {"type": "integer"}, {
    "type": "array", "items": {"type": "string"}}
_EDITOR_FIELDS: dict = {
    **dict.fromkeys(("path", "file_text", "old_str", "new_str", "insert_text"), STRING),
    "insert_line": INTEGER, "view_range": {"type": "array", "items": INTEGER},
    "command": {**STRING, "enum": ["view", "create", "str_replace", "insert", "undo_edit"]}}
_MEMORY_FIELDS = {
    **_EDITOR_FIELDS, "old_path": STRING, "new_path": STRING, "command": {
        **STRING, "enum": ["view", "create", "str_replace", "insert", "delete", "rename"]}}
# Tools of Anthropic's that the client runs; Claude knows their schemas: (of the type, as a
# function: description, schema). Source: their tool documentation and SDK's types.
CLIENT_TOOLS = (
    ("bash_", "Run a command in a bash session that lasts; restart starts it anew.",
     object_of(command=STRING, restart={"type": "boolean"})),
    ("text_editor_", "View, create and edit text files.",
     object_of(("command", "path"), **_EDITOR_FIELDS)),
    ("memory_", "Keep notes in files under /memories: view, create, str_replace, insert, delete, "
     "rename.", object_of(("command",), **_MEMORY_FIELDS)),
)
DEFERRED_TOOLS = "DeferredToolPlaceholder"               # Claude Code's; here all tools are sent
CLAUDE_CODE_BILLING = "x-anthropic-billing-header:"      # its first system block; spoils caching


@functools.lru_cache(maxsize=64)
def claude_of(model: str) -> Claude:
    """Return the family that a model belongs to."""
    name = model.rpartition("/")[2]
    return next(family for pattern, family in CLAUDE_FAMILIES if re.match(pattern, name))


MESSAGES_RULES = MappingProxyType({
    **dict.fromkeys((
        "model", "max_tokens", "system", "messages", "tools", "tool_choice", "stop_sequences",
        "temperature", "top_p", "top_k", "stream", "thinking", "output_config", "output_format",
        "metadata", "service_tier", "context_management"), ("own",)),
    "cache_control": ("hint",), "speed": ("rest", "standard"),
    "mcp_servers": ("refuse", []), "container": ("refuse",), "skills": ("refuse", []),
    "compaction": ("refuse",), "thread": ("refuse", NEW_THREAD),
})
MESSAGES_NAMES = MappingProxyType({
    "output_cap": "max_tokens", "effort": "output_config.effort", "stops": "stop_sequences",
    "format": "output_config.format", "choice": "tool_choice", "strict": "tools.strict",
    "results": "messages.tool_result", "later_system": "messages.system",
    "prefill": "messages.prefill", "thoughts": "messages.thinking", "turns": "messages",
    "tier": "service_tier"})
# Fields of Anthropic's that clients of other APIs may give as well.
MESSAGES_TAKES = frozenset({
    "thinking", "output_config", "cache_control", "speed", "inference_geo", "context_management",
    "mcp_servers", "container"})
THINKING_EFFORTS = ((2048, "minimal"), (8192, "low"), (16384, "medium"), (32768, "high"))
MESSAGES_CHOICES = MappingProxyType({"auto": "auto", "any": "required", "none": "none",
                                     "tool": "tool"})


def read_messages_request(fields: Mapping[str, Any]) -> Conversation:
    """Read a Messages request. Raises BadRequest."""
    asked = begun(fields, MESSAGES_RULES)
    asked.output_cap = optional_count(fields, "max_tokens", least=1)
    if asked.output_cap is None:
        raise BadRequest("max_tokens must be a whole number from 1 up", param="max_tokens")
    asked.stops = texts_in(fields, "stop_sequences")
    asked.tier = {"auto": "auto", "standard_only": "default"}.get(str(fields.get("service_tier")))
    messages = messages_in(fields, "messages")
    system = [part for part in _message_parts(fields, "system")
              if not part.text.startswith(CLAUDE_CODE_BILLING)]
    asked.turns = [Turn("system", system)] if system else []
    asked.turns += _message_turns(messages)
    asked.tools = [_tool_of_claude(row, asked) for row in _tools_at_last(fields, messages)]
    _read_output_config(fields, messages, asked)
    user = object_in(fields, "metadata").get("user_id")
    if isinstance(user, str):
        asked.user = user
        session = re.search(r"session(?:_id)?[\"_: ]+([0-9a-f-]{36})", user)   # Claude Code's
        if session:
            asked.hints["prompt_cache_key"] = session[1]
    edits = object_in(fields, "context_management").get("edits")
    if any(str(edit.get("type")).startswith("compact") for edit in _parts_of(edits)):
        asked.rest["context_management"] = edits
    choice = object_in(fields, "tool_choice")
    mode = MESSAGES_CHOICES.get(str(choice.get("type")))
    if mode is not None:
        asked.choice = Choice(mode, text_in(choice, "name", in_request("tool_choice")))
    elif choice:
        raise BadRequest("tool_choice is not one of auto, any, tool, none", param="tool_choice")
    asked.one_call_at_a_time = choice.get("disable_parallel_tool_use") is True
    return asked


def _read_output_config(fields: Mapping[str, Any], messages: Sequence[Mapping[str, Any]],
                        conversation: Conversation) -> None:
    """Read effort and form of the answer: the last message that says an effort counts."""
    output, thinking = object_in(fields, "output_config"), object_in(fields, "thinking")
    asked = output.get("effort")
    for message in messages:
        if "output_config" in message:
            asked = json_object(message["output_config"]).get("effort", asked)
    if asked is None and thinking.get("type") not in (None, "adaptive"):
        conversation.names["effort"] = "thinking"
        budget = optional_count(thinking, "budget_tokens") or 0
        asked = next((name for most, name in THINKING_EFFORTS if budget < most), "xhigh") \
            if thinking["type"] == "enabled" else "none"
    conversation.effort = effort_of(asked, "output_config.effort")
    if thinking.get("display") == "summarized":
        conversation.summary = "auto"
    if "task_budget" in output:
        conversation.rest["output_config.task_budget"] = output["task_budget"]
    wanted = json_object(output.get("format") or fields.get("output_format"))
    if wanted.get("type") == "json_schema":
        conversation.format = Format(
            checked_schema(wanted.get("schema"), in_request("output_config")))


def _message_turns(messages: Sequence[Mapping[str, Any]]) -> Iterator[Turn]:
    last_user = max((at for at, message in enumerate(messages) if message.get("role") == "user"),
                    default=-1)
    for at, message in enumerate(messages):
        role = message.get("role")
        if role not in ("user", "assistant", "system"):
            raise BadRequest("a message has a role that is not known", param="messages")
        parts = _message_parts(message)
        if role == "system" and message.get("clear_at") == "next_user_message" and at < last_user:
            parts = []
        yield Turn(role, parts)


def _tools_at_last(fields: Mapping[str, Any],
                   messages: Sequence[Mapping[str, Any]]) -> list[dict]:
    """Return the tools after all that were added and removed within the conversation."""
    rows, removed = [*rows_in(fields, "tools", IN_TOOLS)], {DEFERRED_TOOLS}
    for change in (part for message in messages if message["role"] == "system"
                   for part in _parts_of(message.get("content"))):
        tool = json_object(change.get("tool"))
        if change.get("type") == "tool_removal":
            removed.add(str(tool.get("name")))
        elif change.get("type") == "tool_addition":
            removed.discard(str(tool.get("name")))
            rows += [tool["definition"]] if isinstance(tool.get("definition"), dict) else []
    return [row for row in rows if str(row.get("name")) not in removed]


def _tool_of_claude(row: Mapping[str, Any], conversation: Conversation) -> Tool:
    kind, name = str(row.get("type") or "custom"), text_in(row, "name", IN_TOOLS)
    own: dict[str, Any] = {"native": row, "origin": "messages"}
    if kind == "custom":
        return Tool("function", name, text_in(row, "description", IN_TOOLS),
                    *tool_schema(row, "input_schema"), **own)
    for start, description, schema in CLIENT_TOOLS:
        if kind.startswith(start):
            conversation.changed[f"tools.{kind}"] = "function"
            return Tool("function", name, description, schema, **own)
    return Tool("search" if kind.startswith("web_search_") else "other", name, **own, search={
        key: row[key] for key in SEARCH_OPTIONS if row.get(key)})


def _message_parts(holder: Mapping[str, Any], name: str = "content") -> list[Part]:
    """Return the parts of a message, a result or a system prompt. Raises BadRequest."""
    content = _content_of(holder, name)
    if isinstance(content, str):
        return [Part("text", content)] if content else []
    parts: list[Part] = []
    for row in content or ():
        row = row if isinstance(row, dict) else {"type": "text", "text": row}
        kind = row.get("type")
        if kind == "text":                         # as most are
            text = text_in(row, "text", IN_MESSAGES)
            parts += (Part("text", text),) if text else ()
        else:
            read = _BLOCKS_READ.get(str(kind))
            parts += (Part("other", native=row, origin="messages"),) if read is None else read(row)
        if parts and row.get("cache_control") is not None:
            parts[-1].mark = row["cache_control"]
    return parts


# Where the content of an image or a document is: (what it is of a part, its member), both ways.
_SOURCES = MappingProxyType({
    "base64": (("data", "data"), ("media", "media_type")), "text": (("text", "data"),),
    "url": (("url", "url"),), "file": (("file_id", "file_id"),)})


def _media_parts(row: Mapping[str, Any]) -> list[Part]:
    """Return an image or a document; one that consists of parts as those."""
    source = object_in(row, "source", IN_MESSAGES)
    if source.get("type") == "content":
        return _message_parts(source)
    members = {name: text_in(source, member, IN_MESSAGES)
               for name, member in _SOURCES.get(str(source.get("type")), ())}
    return [Part(row["type"], **{"text": "", **members}, native=row, origin="messages",
                 name=text_in(row, "title", IN_MESSAGES))]


def _tool_result_parts(row: Mapping[str, Any]) -> list[Part]:
    if isinstance(row.get("content"), list):
        row = {**row, "content": [
            piece if str(piece.get("type")) in RESULT_BLOCKS else {
                "type": "text", "text": json.dumps(piece)} for piece in _parts_of(row["content"])]}
    return [Part("result", id=str(row.get("tool_use_id") or ""), parts=_message_parts(row),
                 is_error=row.get("is_error") is True)]


_BLOCKS_READ = MappingProxyType({
    "compaction": _message_parts,                  # of all before it
    "search_result": lambda row: [Part("text", f"{row.get('title')} ({row.get('source')})\n"
                                       + _text_of(row.get("content"), "\n"))],
    "image": _media_parts, "document": _media_parts, "tool_result": _tool_result_parts,
    "tool_use": lambda row: [Part("call", input_to_arguments(row.get("input")),
                                  id=str(row.get("id") or ""),
                                  name=text_in(row, "name", IN_MESSAGES))],
    **dict.fromkeys(("thinking", "redacted_thinking"), lambda row: [thought_of(row)]),
    **dict.fromkeys(("tool_addition", "tool_removal"), lambda row: [])})    # _tools_at_last()
RESULT_BLOCKS = frozenset({"text", "image", "document", "search_result"})


# Requests that are written for Claude.


class _MessagesRequest(RequestWriter):
    """Writes Messages requests for Claude, by the rules of the model's family."""
    api, most_name_chars = "messages", 128

    def __init__(self, conversation: Conversation, target: Target, losses: Losses) -> None:
        super().__init__(conversation, target, losses)
        self._claude = claude_of(conversation.model)
        self._enforced: Counter = Counter()        # of MOST_ENFORCED
        self._system: list[dict] = []
        self._thinking: Mapping[str, Any] = {}     # what the request says of it

    def request(self) -> dict:
        """Return the request."""
        asked, most = self._asked, self._target.most_output_tokens
        passed = self._left_over(MESSAGES_TAKES)
        cap = self._cap() or (most if asked.streams else min(most, UNSTREAMED_OUTPUT_TOKENS))
        request: dict = {"model": asked.model, "max_tokens": cap}
        tools = self._written_tools()
        self._set_thinking(request, passed.pop("thinking", None))
        messages = request["messages"] = self._messages()
        self._carry_thinking(messages, tools)
        if self._thinking:
            request["thinking"] = self._thinking
        if tools:
            request["tools"] = tools
            self._set_tool_choice(request)
        else:
            names = {block["name"] for turn in messages for block in turn["content"]
                     if block["type"] == "tool_use"}
            if names:
                request.update(tool_choice={"type": "none"}, tools=[
                    {"name": name, "input_schema": {"type": "object"}} for name in sorted(names)])
        self._set_format(request)
        self._set_sampling(request)
        if "output_config" in passed:              # the client's own, and what was derived
            passed["output_config"] = {**request.get("output_config", {}),
                                       **json_object(passed["output_config"])}
        request.update(self._optional(), **passed)
        self._limit_cache_marks(request)
        return request

    def _optional(self) -> dict:
        """Return the fields that go on in another form, where there are any."""
        asked, user = self._asked, self._asked.user
        stops = [text for text in asked.stops if text.strip()]
        if len(stops) < len(asked.stops):
            self._losses.drop("stops")
        tier = asked.tier and ("standard_only" if asked.tier in ("default", "flex") else "auto")
        if asked.tier not in (None, "default", "auto"):
            self._losses.adjust("tier", tier)
        optional = {
            "system": self._system, "stop_sequences": stops, "service_tier": tier,
            "stream": asked.streams,
            "metadata": user and {
                "user_id": _hashed(user, 64) if len(user) > 256 or re.search(r"@|^\+?\d{7,}$", user)
                else user}}
        return {name: value for name, value in optional.items() if value}

    @property
    def _thinks(self) -> bool:
        return self._thinking.get("type") in ("enabled", "adaptive")

    def _set_sampling(self, request: dict) -> None:
        takes = self._claude.sampling and not self._thinks
        for name, value in self._asked.sampling.items():
            if not takes or (name == "top_p" and "temperature" in request):
                if takes or value != 1 or name == "top_k":
                    self._losses.drop(name)
                continue
            if name == "temperature" and value > 1:
                self._losses.adjust(name, 1)
                value = 1
            request[name] = value

    def _set_thinking(self, request: dict, own: Any) -> None:
        """Set what a client says in Claude's own field, else its effort. A field as other servers
        have it, without a budget, is an effort too."""
        claude, effort = self._claude, self._asked.effort
        kind, budget = map(json_object(own).get, ("type", "budget_tokens"))
        if kind == "disabled" or (type(budget) is int if kind == "enabled"
                                  else kind == "adaptive" and not claude.manual_thinking):
            self._thinking = own
        elif own is not None:
            effort = effort or ("medium" if own else "none")
            self._losses.adjust("thinking", effort)
        if effort is None:
            return
        if self._thinking:                         # the client's own counts
            self._losses.drop("effort")
        elif effort == "none":
            if not claude.may_not_think:
                self._losses.adjust("effort", "low")
                request["output_config"] = {"effort": "low"}
            elif not claude.manual_thinking:
                self._thinking = {"type": "disabled"}
        elif claude.manual_thinking:
            if request["max_tokens"] <= THINKING_BUDGETS["minimal"]:
                self._losses.drop("effort")
                return
            self._thinking = {"type": "enabled", "budget_tokens": min(
                THINKING_BUDGETS[effort], request["max_tokens"] - 1)}
        else:
            lowered = lowered_effort(effort, claude.efforts)
            if effort not in ("minimal", lowered):
                self._losses.adjust("effort", lowered)
            self._thinking = {"type": "adaptive"}
            request["output_config"] = {"effort": lowered}
        if self._asked.summary and self._thinks:
            self._thinking = {**self._thinking, "display": "summarized"}

    def _carry_thinking(self, messages: list[dict], tools: list[dict]) -> None:
        """Have the history's thinking as Claude takes it."""
        asked = self._asked
        if self._thinks or not self._claude.may_not_think:
            self._recall_thinking(messages, [
                self._system, tools, asked.choice, asked.one_call_at_a_time, asked.format])
        # A budgeted thought goes on after a tool's result only where its beginning came along.
        last = next((turn["content"] for turn in reversed(messages)
                     if turn["role"] == "assistant"), [])
        if self._thinking.get("type") == "enabled" \
                and any(block["type"] == "tool_use" for block in last) \
                and "thinking" not in last[0]["type"]:
            self._losses.drop("thinking")
            self._thinking = {}
        # Clients of other APIs that bring thinking back may change what was before it (a date, a
        # shorter history), unaware: what is bound to that is left out.
        if "thinking" not in asked.rest and self._thinks \
                and re.match(BINDING_MODELS, asked.model) and any(
                    "thinking" in block["type"] for turn in messages for block in turn["content"]):
            self._thinking = {**self._thinking, "block_binding": {
                "prefix_mismatch_behavior": "drop_block"}}
            self.terms.betas = (*self.terms.betas, BINDING_BETA)

    def _recall_thinking(self, messages: list[dict], before: Any) -> None:
        """Give turns their thinking back that the client left out. Claude takes it only where
        nothing before it has changed since, so it is looked up by a digest of that."""
        digest = hashlib.sha256(json_bytes(before))
        for turn in messages:
            calls = [block for block in turn["content"] if block["type"] == "tool_use"]
            if calls and "thinking" not in turn["content"][0]["type"]:
                turn["content"][:0] = self._target.recall(calls[0]["id"], digest.hexdigest())
            digest.update(json_bytes([turn["role"], *(
                {name: value for name, value in block.items() if name != "cache_control"}
                for block in turn["content"])]))
        self.terms.digest = digest.hexdigest()

    def _can_enforce(self, schema: Any, *, strict_tools: int = 0) -> bool:
        """Whether the model can be held to a schema; what it adds to the request is counted."""
        if not self._claude.schemas or not is_enforceable(schema):
            return False
        size = self._enforced + size_of(schema) + Counter({"strict tools": strict_tools})
        if any(size[what] > most for what, most in MOST_ENFORCED.items()):
            return False
        self._enforced = size
        return True

    def _set_format(self, request: dict) -> None:
        wanted = self._asked.format
        if wanted is None:
            return
        schema = with_root(wanted.schema)
        if isinstance(schema, dict) and wanted.description:
            schema = {"description": wanted.description, **schema}
        if self._can_enforce(schema):
            request.setdefault("output_config", {})["format"] = {
                "type": "json_schema", "schema": claude_schema(schema)}
            return
        if json_object(schema).get("type") == "object" and self._claude.forced_tools \
                and not self._thinking and "tools" not in request:
            self._losses.adjust("format", "tool")
            self.terms.answers_by_tool = True
            request["tools"] = [{"name": ANSWER_TOOL, "input_schema": object_schema(schema),
                                 "description": str(schema.get("description", "The answer."))}]
            request["tool_choice"] = {"type": "tool", "name": ANSWER_TOOL,
                                      "disable_parallel_tool_use": True}
            return
        self._losses.adjust("format", "instructed")
        self.terms.unfences = True
        text = "Respond with one JSON object and nothing else."
        if schema is not None:
            text += f" It must match this JSON schema:\n{json.dumps(schema)}"
        self._system.append({"type": "text", "text": text})

    def _tool(self, tool: Tool) -> Optional[dict]:
        if tool.kind in ("other", "search"):
            if tool.origin == "messages":
                return dict(tool.native)
            if tool.kind == "search":
                return {**SEARCH_TOOL, **tool.search}
            self._losses.drop(f"tools.{tool.native.get('type')}")
            return None
        given = tool.schema or {"type": "object", "properties": {}}
        schema = object_schema(given)
        if schema.keys() - {"type"} != given.keys() - {"type"}:
            self._losses.adjust("schema", "merged")
        written: dict[str, Any] = {"name": self._names.fitting(tool.name, tool.namespace),
                                   "input_schema": schema}
        if tool.description:
            written["description"] = tool.description
        if tool.origin == "messages":
            written.update(tool.native)
        if tool.strict:
            if self._can_enforce(schema, strict_tools=1):
                written.update(strict=True, input_schema=claude_schema(schema))
            else:
                self._losses.drop("strict")
        return written

    def _set_tool_choice(self, request: dict) -> None:
        choice: dict[str, Any] = {}
        wanted = self._asked.choice
        if wanted is not None:
            choice = {"type": {"required": "any"}.get(wanted.mode, wanted.mode)}
            if wanted.mode == "tool":
                choice["name"] = self._names.fitting(wanted.name, wanted.namespace)
        if self._asked.one_call_at_a_time and choice.get("type") != "none":
            choice = {"type": "auto", **choice, "disable_parallel_tool_use": True}
        if choice.get("type") in ("any", "tool") and (
                self._thinking.get("type") == "enabled" or not self._claude.forced_tools):
            self.terms.said_choice = {**choice}
            which = f"the tool {choice.pop('name')}" if "name" in choice else "one of the tools"
            self._losses.adjust("choice", "auto")
            self._system.append({"type": "text", "text": f"Call {which} now."})
            choice["type"] = "auto"
        if choice:
            request["tool_choice"] = choice

    def _messages(self) -> list[dict]:
        """Return the messages; the system prompt is kept aside."""
        written = ((role, self._blocks(parts))
                   for role, parts in self._paired(CallIds(r"[A-Za-z0-9_-]+", "toolu_")))
        rows = [(role, blocks) for role, blocks in written if blocks]
        while rows and rows[0][0] == "system":
            self._system += rows.pop(0)[1]
        if not rows and self._system:              # there must be one
            rows = [("user", [self._system.pop()])]
        if not rows:
            raise BadRequest("messages have no content", param="messages")
        if rows[0][0] == "assistant":
            self._losses.adjust("turns", "user-first")
            rows.insert(0, ("user", [{"type": "text", "text": "."}]))
        messages = [message for _, run in itertools.groupby(rows, lambda row: row[0] == "assistant")
                    for message in self._merged([*run])]
        last = messages[-1]
        if last["role"] == "assistant" and (self._thinks or not self._claude.prefill):
            self._losses.adjust("prefill", "continued")
            messages.append({"role": "user", "content": [{"type": "text", "text": "Continue."}]})
        elif last["role"] == "assistant" and last["content"][-1]["type"] == "text":
            last["content"][-1]["text"] = str(last["content"][-1].get("text") or "").rstrip()
        return messages

    def _merged(self, run: Sequence[tuple[str, list[dict]]]) -> list[dict]:
        """Return what is said up to the other side's turn: one message of each role. A system
        message stands behind a user's only; elsewhere it is said as the user."""
        merged: dict[str, list[dict]] = {}
        takes_system = self._claude.later_system and any(role == "user" for role, _ in run)
        for role, blocks in run:
            if role == "system" and not takes_system:
                self._losses.adjust("later_system", "user")
                role, blocks = "user", [
                    {**block, "text": LATER_SYSTEM + block["text"]} if "text" in block else block
                    for block in blocks]
            merged.setdefault(role, []).extend(blocks)
        return [{"role": role, "content": merged[role]}
                for role in ("assistant", "user", "system") if role in merged]

    @staticmethod
    def _limit_cache_marks(request: Mapping[str, Any]) -> None:
        """Leave the last marks that Anthropic takes, in the order in which it reads a request."""
        blocks = [*request.get("tools", ()), *request.get("system", ())]
        for turn in request["messages"]:
            for block in turn["content"]:
                inner = block.get("content")
                blocks += [*_parts_of(inner), block] if isinstance(inner, list) else [block]
        marked = [block for block in blocks if block.get("cache_control") is not None]
        most = MAX_CACHE_MARKS - ("cache_control" in request)
        for block in marked[:-most]:
            del block["cache_control"]

    def _blocks(self, parts: Iterable[Part]) -> list[dict]:
        blocks = []
        for part in parts:
            block: Any = _BLOCKS_WRITTEN[part.kind](self, part)
            if block is not None:
                if part.mark is not None:
                    block["cache_control"] = part.mark
                blocks.append(block)
        return blocks

    def _text(self, part: Part) -> Optional[dict]:
        """Return a text block; Anthropic refuses empty text."""
        return {"type": "text", "text": part.text} if part.text.strip() else None

    def _media(self, part: Part) -> dict:
        """Return an image or a document. Raises BadRequest where Claude does not read it."""
        kind = next((kind for kind, ((name, _), *_) in _SOURCES.items() if getattr(part, name)), "")
        source = {member: getattr(part, name) for name, member in _SOURCES.get(kind, ())}
        if part.kind == "image":
            media = next((media for magic, media in IMAGE_MAGIC if part.data.startswith(magic)),
                         part.media)
            if media not in IMAGE_MEDIA if part.data else not part.url.startswith("https://"):
                raise BadRequest("an image must be an https:// URL, or a data: URL of a JPEG, PNG, "
                                 "GIF or WebP", param="messages")
            source.update({"media_type": media} if part.data else {})
        elif kind == "text":
            source["media_type"] = "text/plain"
        elif kind == "file" and part.file_id.startswith("file_"):
            self.terms.betas = (FILES_BETA,)
        elif kind in ("", "file"):
            raise BadRequest("a file must be inline, a PDF or text, for Claude", param="messages")
        title = {"title": part.name} if part.kind == "document" and part.name \
            and not part.file_id else {}
        return {"type": part.kind, **title, "source": {"type": kind, **source}}

    def _call(self, part: Part) -> dict:
        return {"type": "tool_use", "id": part.id,
                "name": self._names.fitting(part.name, part.namespace, part.is_text),
                "input": {"input": part.text} if part.is_text
                else arguments_to_input(part.text, _STRICT_JSON)}      # to come back to the letter

    def _result(self, part: Part) -> dict:
        result: dict = {"type": "tool_result", "tool_use_id": part.id}
        content = self._blocks(part.parts)
        if content:
            is_plain = len(content) == 1 and content[0].keys() == {"type", "text"}
            result["content"] = content[0]["text"] if is_plain else content
        if part.is_error:
            result["is_error"] = True
        return result


_BLOCKS_WRITTEN = MappingProxyType({
    "text": _MessagesRequest._text, "refusal": _MessagesRequest._text,
    "image": _MessagesRequest._media, "document": _MessagesRequest._media,
    "thought": _MessagesRequest._thought, "call": _MessagesRequest._call,
    "result": _MessagesRequest._result, "other": _MessagesRequest._other,
    "search": _MessagesRequest._other})


# Its answers.
STOP_REASONS = MappingProxyType({"end": "end_turn", "stop": "stop_sequence",
                                 "length": "max_tokens", "calls": "tool_use",
                                 "refused": "refusal"})
SERVED_TIERS = MappingProxyType({"standard": "default", "priority": "priority",
                                 "batch": "default"})
BLOCK_KINDS = MappingProxyType({"text": "text", "thinking": "thought", "tool_use": "call",
                                "redacted_thinking": "thought", "server_tool_use": "search"})


def messages_tokens(usage: Mapping[str, Any]) -> Tokens:
    """Return Anthropic's usage in our counting."""
    read, written = (count_or_zero(usage, "cache_read_input_tokens"),
                     count_or_zero(usage, "cache_creation_input_tokens"))
    return Tokens(count_or_zero(usage, "input_tokens") + read + written, read, written,
                  count_or_zero(usage, "output_tokens"),
                  count_or_zero(usage.get("output_tokens_details"), "thinking_tokens"))


def messages_usage(tokens: Tokens, tier: Any = None) -> dict:
    """Return usage as Anthropic counts it: what was cached is beside input_tokens."""
    return {"input_tokens": max(0, tokens.input - tokens.cached - tokens.written),
            "cache_creation_input_tokens": tokens.written,
            "cache_read_input_tokens": tokens.cached,
            "cache_creation": {"ephemeral_5m_input_tokens": tokens.written,
                               "ephemeral_1h_input_tokens": 0},
            "output_tokens": tokens.output,
            "output_tokens_details": {"thinking_tokens": tokens.thought}, "server_tool_use": None,
            "service_tier": "priority" if tier == "priority" else "standard"}


def messages_stream_of(message: dict) -> Iterator[dict]:
    """Return a whole message as a stream of its blocks, each whole at its start. Raises
    UpstreamBroke where it is none."""
    if "content" not in message:
        raise UpstreamBroke("the provider's answer has no content")
    yield {"type": "message_start", "message": message}
    for index, block in enumerate(_parts_of(message.get("content"))):
        yield {"type": "content_block_start", "index": index, "content_block": block}
        yield {"type": "content_block_stop", "index": index}
    yield {"type": "message_delta", "delta": message}
    yield {"type": "message_stop"}


def messages_events(stream: Iterable[Mapping[str, Any]], terms: Terms) -> Iterator[AnswerEvent]:
    """Read Anthropic's stream of an answer."""
    usage: dict = {}
    end: dict = {}                                   # what the last delta said
    is_over = False
    parts: dict[str, Part] = {}                      # that are open, by the index of their blocks
    kinds: set[str] = set()                          # of those there were
    for event in stream:
        kind, index = event.get("type"), str(event.get("index"))
        part = parts.get(index)
        begun = _part_begun(event) if part is None or kind == "content_block_start" else None
        if begun is not None:
            if part is not None:                     # some do not announce its end
                yield from _block_over(part)
            part = parts[index] = begun
            kinds.add(part.kind)
            yield from _block_begun(part)
        if kind == "content_block_delta":
            grown = part and _block_grown(part, json_object(event.get("delta")))
            if grown:
                yield grown
        elif kind == "content_block_stop" and part is not None:
            yield from _block_over(parts.pop(index))
        elif kind == "ping":
            yield PING
        elif kind == "message_start":
            message = json_object(event.get("message"))
            usage.update(json_object(message.get("usage")))
            yield Began(str(message.get("id") or ""), message.get("model"),
                        SERVED_TIERS.get(str(usage.get("service_tier"))))
        elif kind == "message_delta":
            usage.update((name, value) for name, value in json_object(event.get("usage")).items()
                         if value is not None)
            end.update(json_object(event.get("delta")))
        elif kind in ("message_stop", "done") and not is_over:
            is_over = True
            for part in parts.values():
                yield from _block_over(part)
            yield _end_of_message(end, usage, kinds)


def _part_begun(event: Mapping[str, Any]) -> Optional[Part]:
    """Return the part that begins with an event: where its start is not announced, with a text."""
    if event.get("type") == "content_block_start":
        return _part_of_block(event.get("content_block"))
    delta = json_object(event.get("delta"))
    name = _DELTA_FIELDS.get(str(delta.get("type")))
    return _part_of_block({"type": name}) if name in _WHOLE_TEXTS.values() and delta.get(name) \
        and event.get("type") == "content_block_delta" else None


def _part_of_block(block: Any) -> Part:
    native = {**json_object(block)}
    kind = BLOCK_KINDS.get(str(native.get("type")), "other")
    own = {"id": str(native.get("id") or ""), "name": str(native.get("name") or "")} \
        if kind in ("call", "search") else {}
    return Part(kind, native=native, origin="messages", **own,
                beside={"citation": [], "signature": []},
                citations=_citations_of(native.get("citations")))


def _citations_of(rows: Any) -> tuple[Citation, ...]:
    return () if not rows else tuple(
        Citation(str(row.get("url") or ""), str(row.get("title") or ""))
        for row in _parts_of(rows) if row.get("type") == "web_search_result_location")


def _block_begun(part: Part) -> Iterator[AnswerEvent]:
    yield part.opened()
    text = part.native.get(_WHOLE_TEXTS.get(part.kind))
    if isinstance(text, str) and text:
        yield part.grown(text)


def _block_grown(part: Part, delta: Mapping[str, Any]) -> Optional[More]:
    """Add a delta to the part of its block; return what a client sees of that, if anything."""
    name = _DELTA_FIELDS.get(str(delta.get("type")))
    more = delta.get(name)
    if not more:
        return None
    if name != "citation" and not isinstance(more, str):
        raise IN_ANSWER(str(name), "a string")
    if name in part.beside:
        part.beside[name].append(more)
    elif part.kind in _STREAMED_KINDS:
        return part.grown(more)
    else:
        part.pieces.append(more)
    return None


def _block_over(part: Part) -> Iterator[AnswerEvent]:
    if part.native.get("type") == "tool_use" and not part.pieces:      # without arguments
        yield part.grown(input_to_arguments(part.native.get("input")))
    over, cited, signed = part.closed(), part.beside["citation"], part.beside["signature"]
    part.citations += _citations_of(cited)
    if signed:
        part.native["signature"] = "".join([str(part.native.get("signature") or ""), *signed])
    if part.kind == "search":
        given = arguments_to_input(part.text) or json_object(part.native.get("input"))
        part.text = str(given.get("query") or "")
    elif part.native.get("type") == "thinking":
        part.native["thinking"] = part.text
    yield over


def _end_of_message(end: Mapping[str, Any], usage: Mapping[str, Any], kinds: set[str]) -> Ended:
    word, refusal = str(end.get("stop_reason") or "end"), None
    if word == "refusal":
        details = json_object(end.get("stop_details"))
        refusal = str(details.get("explanation")
                      or f"refused: {details.get('category') or 'no reason given'}")
    reason = {"stop_sequence": "stop", "tool_use": "calls"}.get(word) or reason_of_end(word, kinds)
    return Ended(reason, messages_tokens(usage), end.get("stop_sequence"), refusal,
                 SERVED_TIERS.get(str(usage.get("service_tier"))))


# Kind of a part -> the member of its block that may hold all of its text.
_WHOLE_TEXTS = MappingProxyType({"text": "text", "thought": "thinking"})
_DELTA_FIELDS = MappingProxyType({
    "text_delta": "text", "thinking_delta": "thinking", "input_json_delta": "partial_json",
    "citations_delta": "citation", "signature_delta": "signature"})
_STREAMED_KINDS = frozenset({"text", "thought", "call"})


def one_at_a_time(events: Iterable[AnswerEvent]) -> Iterator[AnswerEvent]:
    """Yield an answer's events with one part open at a time: what comes of the others is held
    back until that is closed."""
    held: dict[Part, list[AnswerEvent]] = {}
    first: Optional[Part] = None                     # the part that is open
    for event in events:
        part = getattr(event, "part", first)
        first = first or part
        if part is not first:
            held.setdefault(part, []).append(event)
            continue
        yield event
        while type(event) is Closed:
            first = next(iter(held), None)
            if first is None:
                break
            for event in held.pop(first):
                yield event


# Of JSON: a string, or what there is of it, perhaps with half of an escape; or a word.
_JSON_TOKENS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*(?:"|(?P<half>\\?)\Z)'
                          r'|(?P<word>[^\s"{}\[\],:]+)', re.DOTALL)
_WORD_GOES_ON = re.compile(r'[^\s"{}\[\],:]+').fullmatch
_OBJECT_START = re.compile(r'\s*\{\s*["}]')


def _json_word(word: str) -> str:
    try:
        parsed_inside(word)
    except ValueError:
        return "null"
    return word


class _ShownArguments:
    """The arguments of a call as a stream shows them: an object, in JSON that all readers take.

    What does not begin as one, or with a word that JSON lacks, as NaN, is not shown: it comes
    wrapped at the end. Behind what was shown such a word is null.
    """

    def __init__(self, is_text: bool) -> None:
        self.is_shown, self._is_wrapped = False, is_text
        self._held: list[str] = []                   # pieces of a word, or a start, that may go on
        self._inside = ""                            # of a string that goes on, shown before: its
        # quote, and perhaps half of an escape

    def more(self, text: str) -> str:
        """Return what can be shown of them now."""
        if self._inside == '"' and '"' not in text and "\\" not in text:
            return text
        if self._held and (_WORD_GOES_ON(text) if self.is_shown else text.isspace()):
            self._held.append(text)                  # joined at each, it would take its square
            return ""
        text = "".join([*self._held, text])
        if not self.is_shown and (self._is_wrapped or not _OBJECT_START.match(text)):
            self._is_wrapped |= text.strip("{ \t\r\n") != ""
            self._held = [] if self._is_wrapped else [text]
            return ""
        held = half = None

        def checked(token: re.Match) -> str:
            nonlocal held, half
            held = token["word"] if token.end() == len(token.string) else None
            half = token["half"]
            return token[0] if held or token["word"] is None else _json_word(token[0])

        shown = _JSON_TOKENS.sub(checked, self._inside + text)[len(self._inside):]
        if shown != text and not self.is_shown:
            self._is_wrapped = True
            return ""
        self._held, self._inside = [held] if held else [], "" if half is None else '"' + half
        self.is_shown = True
        return shown[:len(shown) - len(held or "")]

    def rest(self) -> str:
        """Return what was held back at the end."""
        return _json_word("".join(self._held)) if self._held else ""


class MessagesWriter(AnswerWriter):
    """Writes an answer as a message, whole or as a stream, where one block is open at a time."""

    def __init__(self, fields: Mapping[str, Any], created_at: int) -> None:
        self._index = 0                              # of the block that is open, or the next
        self._arguments = _ShownArguments(False)     # of the call that is open

    def events(self, events: Iterable[AnswerEvent]) -> Iterator[dict]:
        """Return an answer as the stream's events."""
        return super().events(one_at_a_time(events))

    def whole(self, answer: Whole) -> dict:
        """Return an answer as a message."""
        began, parts, ended = answer
        content = [block for part in parts for block in _answer_blocks(part)]
        return {**_message_start(began), "content": content, **_stop_of(ended),
                "usage": messages_usage(ended.tokens, ended.tier)}

    def _began(self, event: Began) -> Iterable[dict]:
        return [{"type": "message_start", "message": {
            **_message_start(event), "usage": messages_usage(event.tokens, event.tier)}},
            {"type": "ping"}]

    def _opened(self, event: Opened) -> Iterable[dict]:
        part, row = event.part, _STREAMED_BLOCKS.get(event.part.kind)
        if row is None:                              # it is written at its end
            return ()
        block = {**row[0]}
        if part.kind == "call":
            self._arguments = _ShownArguments(part.is_text)
            block.update(id=part.id, name=part.name)
        return [{"type": "content_block_start", "index": self._index, "content_block": block}]

    def _more(self, event: More) -> Iterable[dict]:
        part, text = event
        row = _STREAMED_BLOCKS.get(part.kind)
        if part.kind == "call":
            text = self._arguments.more(text)
        return [self._delta(row[1], row[2], text)] if row and text else ()

    def _delta(self, kind: str, name: str, text: str) -> dict:
        return {"type": "content_block_delta", "index": self._index,
                "delta": {"type": kind, name: text}}

    def _closed(self, event: Closed) -> Iterator[dict]:
        part, arguments = event.part, self._arguments
        if part.kind not in _STREAMED_BLOCKS:
            for block in _answer_blocks(part):
                yield {"type": "content_block_start", "index": self._index, "content_block": block}
                yield self._stop()
            return
        if part.kind == "thought":
            signature = str(thinking_block(part).get("signature") or "")
            yield self._delta("signature_delta", "signature", signature)
        elif part.kind == "call":
            rest = arguments.rest() if arguments.is_shown else plain_json(call_input(part))
            if rest:
                yield self._delta("input_json_delta", "partial_json", rest)
        yield self._stop()

    def _stop(self) -> dict:
        self._index += 1
        return {"type": "content_block_stop", "index": self._index - 1}

    def _ended(self, event: Ended) -> Iterable[dict]:
        return [{"type": "message_delta", "delta": _stop_of(event),
                 "usage": messages_usage(event.tokens, event.tier)}, {"type": "message_stop"}]


# Kind of a part -> its block before it goes on; type and member of what that goes on by.
_STREAMED_BLOCKS: Mapping[str, tuple] = MappingProxyType({
    **dict.fromkeys(("text", "refusal"), ({"type": "text", "text": ""}, "text_delta", "text")),
    "thought": ({"type": "thinking", "thinking": "", "signature": ""},
                "thinking_delta", "thinking"),
    "call": ({"type": "tool_use", "input": {}}, "input_json_delta", "partial_json")})


def _message_start(began: Began) -> dict:
    return {"id": f"msg_{id_stem(began.id)}", "type": "message", "role": "assistant",
            "model": began.model, "content": [], "stop_reason": None, "stop_sequence": None}


def _stop_of(ended: Ended) -> dict:
    """Return stop_reason and stop_sequence of an answer."""
    stop: dict = {"stop_reason": STOP_REASONS[ended.reason], "stop_sequence": ended.stop}
    if ended.reason == "refused":
        stop["stop_details"] = {"type": "refusal", "category": None, "explanation": ended.refusal}
    return stop


def _answer_blocks(part: Part) -> list[dict]:
    """Return the blocks of a part of an answer; of what only another API knows, none."""
    if part.kind in ("text", "refusal"):
        return [{"type": "text", "text": part.text}] if part.text else []
    if part.kind == "thought":
        return [thinking_block(part)]
    if part.kind == "call":
        return [{"type": "tool_use", "id": part.id, "name": part.name, "input": call_input(part)}]
    if part.kind == "search":
        search_id = f"srvtoolu_{id_stem(part.id)}"
        return [{"type": "server_tool_use", "id": search_id, "name": "web_search",
                 "input": {"query": part.text}},
                {"type": "web_search_tool_result", "tool_use_id": search_id, "content": [
                    {"type": "web_search_result", "url": found.url, "encrypted_content": "",
                     "title": found.title or found.url, "page_age": None}
                    for found in part.citations]}]
    return []


def anthropic_error(failure: Failure, request_id: str) -> tuple[int, dict]:
    """Return an error in Anthropic's words, with its status."""
    text = failure.message
    status = {422: 400, 502: 500, 503: 529}.get(failure.status, failure.status)
    if failure.code == "context_length_exceeded" and "prompt is too long" not in text:
        asked, most = failure.sizes or (0, 0)
        sizes = f": {asked} tokens > {most} maximum" if asked else ""
        smaller = "" if not (asked and failure.cap) else (      # with which it tries again, first
            f" input length and `max_tokens` exceed context limit: {asked - failure.cap} + "
            f"{failure.cap} > {most}.")
        text = f"prompt is too long{sizes}.{smaller} {text}"   # Claude Code compacts on these words
    return status, {"type": "error", "request_id": request_id,
                    "error": {"type": anthropic_error_type(status), "message": text}}


# ==== 13. Responses =============================================================================
#
# OpenAI's Responses API: a conversation of items in place of messages, and a stream of numbered
# events. Source: its API reference, the types of openai 3.57.0 and the accumulator of its stream,
# what Codex 0.171 sends, and 127 recorded exchanges (November 2026).

RESPONSES_RULES = MappingProxyType({
    **dict.fromkeys((
        "model", "input", "instructions", "stream", "tools", "tool_choice", "parallel_tool_calls",
        "max_output_tokens", "temperature", "top_p", "reasoning", "text", "user",
        "safety_identifier", "metadata", "service_tier", "max_tool_calls"), ("own",)),
    **dict.fromkeys(("include", "stream_options", "client_metadata", "prompt_cache_key",
                     "prompt_cache_retention", "prompt_cache_options"), ("hint",)),
    "store": ("rest", False), "truncation": ("rest", "disabled"), "top_logprobs": ("rest", 0),
    "context_management": ("rest", []), "background": ("refuse", False),
    "previous_response_id": ("refuse",), "conversation": ("refuse",), "prompt": ("refuse",),
})
# Of what stands inside these fields, the same; Codex asks for all_turns, which is what happens.
INNER_RULES: Mapping[str, Mapping[str, tuple]] = MappingProxyType({
    "reasoning": {"effort": ("own",), "summary": ("own",), "generate_summary": ("own",),
                  "context": ("rest", "auto", "all_turns"), "mode": ("rest", "standard")},
    "text": {"format": ("own",), "verbosity": ("hint",)}})
RESPONSES_NAMES = MappingProxyType({
    "output_cap": "max_output_tokens", "effort": "reasoning.effort", "format": "text.format",
    "choice": "tool_choice", "strict": "tools.strict", "schema": "tools.parameters",
    "syntax": "tools.format", "results": "input.function_call_output",
    "later_system": "input.system", "prefill": "input.prefill", "thoughts": "input.reasoning",
    "thinking": "reasoning", "turns": "input", "tier": "service_tier"})
IN_INPUT = in_request("input")
MIN_RESPONSE_TOKENS = 16                           # the least max_output_tokens that it takes


class ClientTool(NamedTuple):
    """A tool that OpenAI has a type for, and the client runs: elsewhere it is a function."""
    call: str                            # type of the item that calls it
    prefix: str                          # of that item's id
    member: str                          # of that item: what the function's arguments are
    result: str                          # type of the item that answers
    description: str
    schema: Mapping[str, Any]
    blank: Mapping[str, Any] = MappingProxyType({})     # of the member, where nothing is said
    item: Mapping[str, Any] = MappingProxyType({})      # what the calling item has beside it


OPENAI_CLIENT_TOOLS = MappingProxyType({
    "local_shell": ClientTool(
        "local_shell_call", "lsh", "action", "local_shell_call_output",
        "Run a command on the machine.", object_of(
            ("command",), command=STRINGS, working_directory=STRING, timeout_ms=INTEGER),
        {"type": "exec", "env": {}}),
    "shell": ClientTool(
        "shell_call", "sh", "action", "shell_call_output", "Run shell commands, each on its own.",
        object_of(("commands",), commands=STRINGS, timeout_ms=INTEGER, max_output_length=INTEGER)),
    "apply_patch": ClientTool(
        "apply_patch_call", "apc", "operation", "apply_patch_call_output",
        "Create, update or delete a file; diff is in the V4A format, and left out to delete.",
        object_of(("type", "path"), path=STRING, diff=STRING, type={
            **STRING, "enum": ["create_file", "update_file", "delete_file"]})),
    "tool_search": ClientTool(
        "tool_search_call", "tsc", "arguments", "tool_search_output", "Find further tools.",
        object_of(query=STRING), item={"execution": "client"}),
})
_CLIENT_CALLS = MappingProxyType({row.call: kind for kind, row in OPENAI_CLIENT_TOOLS.items()})


# How its items show what is said.


class _Shown(NamedTuple):
    """How Responses shows a kind of part: by an item, its events, and perhaps a part inside it."""
    item: str                            # the item's type
    prefix: str                          # of its id
    begins: Callable[[Part], dict]       # what the item has from its start,
    ends: Callable[[Part], dict] = lambda part: {}          # and at its end
    member: str = ""                     # that holds the whole text, in the item or the part there
    event: str = ""                      # of which there are .delta and .done; "": none
    notes: Mapping[str, Any] = MappingProxyType({})     # what those have beside it
    inside: str = ""                     # the item's list, if it has one of parts
    blank: Mapping[str, Any] = MappingProxyType({})     # a part there, but for its text


def _message_shown(member: str, event: str, blank: dict, **more: Any) -> _Shown:
    return _Shown("message", "msg", lambda part: {"role": "assistant", "content": []},
                  member=member, event=event, inside="content", blank=blank, **more)


def _call_shown(item: str, prefix: str, member: str, event: str) -> _Shown:
    return _Shown(
        item, prefix, lambda part: {
            "call_id": part.id, "name": part.name, member: "",
            **({"namespace": part.namespace} if part.namespace else {})},
        lambda part: {member: part.text}, member, event)


def _client_call_shown(tool: ClientTool) -> _Shown:
    return _Shown(tool.call, tool.prefix, lambda part: {"call_id": part.id, **tool.item},
                  lambda part: {tool.member: {**tool.blank, **arguments_to_input(part.text)}})


_SHOWN = MappingProxyType({
    "text": _message_shown("text", "response.output_text", {
        "type": "output_text", "annotations": [], "logprobs": []}, notes={"logprobs": []}),
    "refusal": _message_shown("refusal", "response.refusal", {"type": "refusal"}),
    "thought": _Shown(
        "reasoning", "rs", lambda part: {"summary": []},
        lambda part: {"encrypted_content": sealed(part) if part.native else None},
        "text", "response.reasoning_summary_text", {}, "summary", {"type": "summary_text"}),
    "call": _call_shown("function_call", "fc", "arguments", "response.function_call_arguments"),
    "text call": _call_shown("custom_tool_call", "ctc", "input", "response.custom_tool_call_input"),
    "search": _Shown("web_search_call", "ws", lambda part: {}, lambda part: {"action": {
        "type": "search", "query": part.text,
        "sources": [{"type": "url", "url": row.url} for row in part.citations]}}),
    **{kind: _client_call_shown(tool) for kind, tool in OPENAI_CLIENT_TOOLS.items()},
})
# A list of parts -> what begins the names of the events of one: .added and .done.
_INSIDE = MappingProxyType({"content": "response.content_part",
                            "summary": "response.reasoning_summary_part"})
# Events that bring more of a part -> its kind, the member with its place in the item, and the one
# with its text: some servers send all of it as one that is done, and no deltas.
_GROWING = MappingProxyType({
    "response.reasoning_text.delta": ("thought", "content_index", "delta"),
    **{f"{row.event}.{step}": (kind.split()[-1], f"{row.inside}_index", member)
       for kind, row in _SHOWN.items() if row.event
       for step, member in (("delta", "delta"), ("done", row.member)) if f"{kind} {step}"
       != "thought done"}})                        # of which there are many


# Its requests, read.


def read_responses_request(fields: Mapping[str, Any]) -> Conversation:
    """Read a request of Responses. Raises BadRequest."""
    conversation = begun(fields, RESPONSES_RULES)
    for name, rules in INNER_RULES.items():
        rest, hints = by_rules(object_in(fields, name), rules)
        conversation.rest.update((f"{name}.{key}", value) for key, value in rest.items())
        conversation.hints.update(hints)
    reasoning = object_in(fields, "reasoning")
    conversation.summary = next((summary for summary in (
        text_in(reasoning, name, in_request("reasoning"))
        for name in ("summary", "generate_summary")) if summary), None)
    conversation.output_cap = optional_count(fields, "max_output_tokens", least=1)
    conversation.one_call_at_a_time = fields.get("parallel_tool_calls") is False
    set_user(conversation, fields)
    _set_manner(fields, conversation)
    _add_tools(rows_in(fields, "tools", IN_TOOLS), conversation)
    _read_input(fields, conversation)
    most = optional_count(fields, "max_tool_calls")
    if most is not None:                           # of OpenAI's own tools: here, searches
        conversation.tools = [
            tool._replace(search={**tool.search, "max_uses": most}) if tool.kind == "search"
            else tool for tool in conversation.tools if most or tool.kind != "search"]
    read_choice(fields.get("tool_choice"), conversation)
    chosen = conversation.choice
    if chosen and chosen.mode == "tool" and all(
            tool.name != chosen.name or tool.kind == "other" for tool in conversation.tools):
        raise BadRequest("tool_choice must be auto, none, required, or a tool of this request that "
                         "can be carried over to this model's provider", param="tool_choice")
    return conversation


def with_kept_items(fields: Mapping[str, Any], recall: Callable[[str, str], list[dict]]
                    ) -> Mapping[str, Any]:
    """Return a request with the items of answers of ours that it names by their ids alone, as
    clients do that take them to be stored; what is not kept stays named."""
    def kept(item: Any) -> list:
        row = json_object(item)
        is_name = row.get("type") == "item_reference" or (len(row) == 1 and "id" in row)
        return (recall(str(row.get("id")), KEPT_ITEM) if is_name else []) or [item]

    given = fields.get("input")
    return fields if not isinstance(given, list) else {
        **fields, "input": [one for item in given for one in kept(item)]}


def _set_manner(holder: Mapping[str, Any], conversation: Conversation, field: str = "") -> None:
    """Read the effort and the form of the text, of a request or of an item that changes them: the
    last one counts. Raises BadRequest, which names `field` where that is given."""
    reasoning, text = (object_in(holder, name, in_request(field or name)) for name in INNER_RULES)
    if "effort" in reasoning:
        conversation.effort = effort_of(reasoning["effort"], field or "reasoning.effort")
    if "format" in text:
        field = field or "text.format"
        conversation.format = format_of(object_in(text, "format", in_request(field)), field)


def _read_input(fields: Mapping[str, Any], conversation: Conversation) -> None:
    """Read all that was said. Raises BadRequest."""
    instructions, given = text_in(fields, "instructions"), fields.get("input")
    turns = [Turn("system", [Part("text", instructions)] if instructions else [])]
    items = [{"role": "user", "content": given}] if isinstance(given, str) \
        else rows_in(fields, "input", IN_INPUT)
    for item in items:
        kind = str(item.get("type") or ("message" if "role" in item else "item_reference"))
        role, read = _ITEMS_READ.get(kind, ("", None))
        if kind == "message":
            role = _ROLES.get(str(item.get("role")), "")
            if not role:
                raise BadRequest("a message has a role that is not known", param="input")
        elif kind in ("item_reference", "compaction_trigger"):
            raise BadRequest(f"an item of the type {shown_name(kind)} refers to what OpenAI has "
                             "stored, or would store, which this model's provider cannot see: "
                             "send the items themselves", param="input")
        elif kind == "configuration_update":
            _set_manner(item, conversation, "input")
        elif kind in ("additional_tools", "tool_search_output"):
            names = _add_tools(rows_in(item, "tools", IN_INPUT), conversation)
            item = {**item, "output": f"Found: {', '.join(names)}"}
        elif read is None:                         # what a provider's tools did, or unknown
            conversation.rest[f"input.{kind}"] = item
        if read is not None:
            turns.append(Turn(role, read(item, IN_INPUT)))
    conversation.turns = [turn for turn in turns if turn.parts]


_ROLES = MappingProxyType({"developer": "system", "system": "system", "user": "user",
                           "assistant": "assistant"})


def _add_tools(rows: Iterable[Mapping[str, Any]], conversation: Conversation, space: str = "",
               about: str = "") -> list[str]:
    """Add tools that are not known yet, and return the names of all. What is said of a namespace
    stands before its first."""
    known, names = conversation.known_tools, []
    for row in rows:
        if row.get("type") == "namespace":
            names += _add_tools(rows_in(row, "tools", IN_TOOLS), conversation,
                                *(text_in(row, name, IN_TOOLS) for name in ("name", "description")))
            continue
        tool = _tool_of_item(row, space, about)
        names.append(tool.name)
        if (tool.kind, tool.name, space) not in known:
            known.add((tool.kind, tool.name, space))
            conversation.tools.append(tool)
        about = ""
        if tool.kind == "search":
            conversation.rest.update(
                (f"tools.web_search.{name}", value) for name, value in row.items()
                if value is not None and name not in ("type", "filters", *SEARCH_OPTIONS))
    return names


def _tool_of_item(row: Mapping[str, Any], space: str, about: str) -> Tool:
    kind, words = text_in(row, "type", IN_TOOLS), text_in(row, "description", IN_TOOLS)
    known, words = OPENAI_CLIENT_TOOLS.get(kind), f"{about}\n\n{words}".strip()
    if kind in ("function", "custom"):
        return openai_tool(kind, row, description=words, namespace=space)
    schema = checked_schema(object_in(row, "parameters", IN_TOOLS), IN_TOOLS)
    if re.fullmatch(SEARCH_TYPES, kind):
        options = {**row, **object_in(row, "filters", IN_TOOLS)}
        return Tool("search", "web_search", native=row, origin="responses", search={
            key: options[key] for key in SEARCH_OPTIONS if options.get(key)})
    if known is None or not _runs_at_client(kind, row):
        return Tool("other", kind, native=row, origin="responses")
    return Tool("function", kind, words or known.description, schema or known.schema)


# What its items say, in a history and in an answer. Readers raise what `fault` makes.


def _content_parts(holder: Mapping[str, Any], fault: Fault,
                   name: str = "content") -> list[Part]:
    value = holder.get(name)
    if isinstance(value, str):
        return [Part("text", value)]
    return [_content_part(row, fault) for row in rows_in(holder, name, fault)]


def _content_part(row: Mapping[str, Any], fault: Fault) -> Part:
    """Read a part of a message, or of a result."""
    part = openai_part(row, fault)
    if part is None or (fault is IN_ANSWER and part.kind in ("image", "document")):
        raise fault("content", "text, an image or a file, and of a type and in a form that can be "
                    "carried over to this model's provider")
    if row.get("annotations"):
        part.citations = tuple(
            Citation(text_in(note, "url", fault), text_in(note, "title", fault), *(
                note[name] if isinstance(note.get(name), int) else None
                for name in ("start_index", "end_index")))
            for note in rows_in(row, "annotations", fault) if note.get("type") == "url_citation")
    return part


def _agent_parts(item: Mapping[str, Any], fault: Fault) -> list[Part]:
    return [Part("text", f"[message from {item.get('author')}]"), *_content_parts(item, fault)]


def _reasoning_parts(item: Mapping[str, Any], fault: Fault) -> list[Part]:
    """Read a reasoning item: OpenAI's, or another's thought that came as one of ours."""
    seal = text_in(item, "encrypted_content", fault)
    texts = [text_in(row, "text", fault) for name in ("summary", "content")
             for row in rows_in(item, name, fault)]
    part = Part("thought", "\n\n".join(texts[:len(item.get("summary") or texts)]))
    if seal.startswith(OWN_SIGNATURE):
        unseal(part, seal)
    elif seal or item.get("signature"):            # OpenRouter's, of what Claude has signed
        part.origin, part.native = "responses", {
            name: item[name] for name in ("type", "id", "summary", "content", "encrypted_content",
                                          "signature", "format") if item.get(name) is not None}
    return [part]


def _call_parts(item: Mapping[str, Any], fault: Fault) -> list[Part]:
    is_text = item.get("type") == "custom_tool_call"
    if isinstance(item.get("arguments"), dict):        # as some servers send them
        item = {**item, "arguments": plain_json(item["arguments"])}
    text = text_in(item, "input" if is_text else "arguments", fault)
    return [Part("call", text if text or is_text else "{}", is_text=is_text,
                 id=text_in(item, "call_id", fault) or text_in(item, "id", fault),
                 name=text_in(item, "name", fault), namespace=text_in(item, "namespace", fault))]


def _client_call_parts(item: Mapping[str, Any], fault: Fault) -> list[Part]:
    name = _CLIENT_CALLS[str(item["type"])]
    arguments = item.get(OPENAI_CLIENT_TOOLS[name].member)
    return [Part("call", json.dumps(arguments), name=name, id=str(item["call_id"]))] \
        if item.get("call_id") else []             # else it ran at OpenAI


def _result_parts(item: Mapping[str, Any], fault: Fault) -> list[Part]:
    kind, output, status = item.get("type"), item.get("output"), item.get("status")
    if kind == "shell_call_output":
        output = json.dumps(output)                # streams and exit codes, command by command
    elif kind == "apply_patch_call_output":
        output = output or status
    elif kind == "tool_search_output" and not item.get("call_id"):
        return []                                  # it ran at OpenAI
    return [Part("result", id=str(item.get("call_id") or item.get("id") or ""),
                 parts=_content_parts({"output": output}, fault, "output"),
                 is_error=status == "failed")]


def _search_parts(item: Mapping[str, Any], fault: Fault) -> list[Part]:
    action = object_in(item, "action", fault)
    query = next((action[name] for name in ("query", "url", "pattern")
                  if isinstance(action.get(name), str)), "")
    found = tuple(Citation(text_in(row, "url", fault))
                  for row in rows_in(action, "sources", fault))
    return [Part("search", query, id=text_in(item, "id", fault), citations=found,
                 native=item, origin="responses")]


# Items that an answer consists of -> their reader; and all that a history does: (whose turn each
# is, its reader), where a message says that itself.
_ITEM_PARTS: Mapping[str, Callable] = MappingProxyType({
    "message": _content_parts, "reasoning": _reasoning_parts, "function_call": _call_parts,
    "custom_tool_call": _call_parts, "web_search_call": _search_parts})
_ITEMS_READ: Mapping[str, tuple[str, Any]] = MappingProxyType({
    **{kind: ("assistant", read) for kind, read in _ITEM_PARTS.items()},
    "agent_message": ("user", _agent_parts),
    **dict.fromkeys(_CLIENT_CALLS, ("assistant", _client_call_parts)),
    **dict.fromkeys(("function_call_output", "custom_tool_call_output",
                     *(row.result for row in OPENAI_CLIENT_TOOLS.values())),
                    ("user", _result_parts))})


# Its answers, read.


def _ended_as(end: str) -> UpstreamBroke:
    return UpstreamBroke(f"the provider ended its answer as {shown_name(end)}, not as completed")


def responses_failure(status: int, body: Any) -> Failure:
    """Read an error of Responses; one of a response that says no more than how it ended."""
    holder = json_object(body)
    response = json_object(holder.get("response") or body)
    end = response_end(response, str(holder.get("type")))
    if end in ("", *ANSWER_ENDS) or words_of(response.get("error")):
        return failure_of(status, body)
    return Failure(status, _ended_as(end).message)


def responses_stream_of(answer: dict) -> Iterable[dict]:
    """Return a whole response as a stream of its last event. Raises UpstreamBroke where it did not
    end well."""
    status = str(answer.get("status") or "completed")
    reason = _end_said_by(status[:80])             # of which some have words of their own
    if answer.get("error") or reason == "failed" or status in ("queued", "in_progress"):
        raise _ended_as("failed" if status in ANSWER_ENDS else status)
    if "output" not in answer:
        raise UpstreamBroke("the provider's answer has no output")
    end = "incomplete" if reason in _INCOMPLETE else "completed"
    return [{"type": f"response.{end}", "response": answer}]


def responses_events(stream: Iterable[Mapping[str, Any]],
                     terms: Terms) -> Iterator[AnswerEvent]:
    """Read a stream of Responses. Raises UpstreamBroke."""
    reader = None
    for event in stream:
        kind = str(event.get("type"))
        read = _RESPONSE_READERS.get(kind)
        if kind == "ping":
            yield PING
            continue
        if reader is None:
            reader, response = _ItemReader(), object_in(event, "response", IN_ANSWER)
            yield Began(text_in(response, "id", IN_ANSWER), response.get("model"),
                        _served_tier(response))
        if read is not None:
            yield from read(reader, event)
            continue
        end = response_end(json_object(event.get("response")), kind)
        if end in ANSWER_ENDS and not reader.is_over:
            yield from reader.finish(event, end)
        elif end not in ("", *ANSWER_ENDS):
            raise _ended_as(end)


class _ItemReader:
    """The state of one stream of Responses: parts are closed when their item is done."""

    def __init__(self) -> None:
        self.is_over = False
        self._open: dict[tuple[str, str], Part] = {}     # by the place of item and part
        self._done: set[str] = set()               # places and ids of items
        self._items_done = 0
        self._kinds: set[str] = set()              # of the parts there were

    def _opened(self, key: tuple[str, str], part: Part) -> AnswerEvent:
        self._open[key] = part
        self._kinds.add(part.kind)
        return part.opened()

    def _begin_item(self, event: Mapping[str, Any]) -> Iterable[AnswerEvent]:
        """Open the call that an item is; other parts are opened by what comes of them."""
        item = object_in(event, "item", IN_ANSWER)
        if _ITEM_PARTS.get(str(item.get("type"))) is not _call_parts:
            return ()
        return [self._opened((_place_of(event, item.get("id")), "0"),
                             *_call_parts(item, IN_ANSWER))]

    def _grow(self, event: Mapping[str, Any]) -> Iterable[AnswerEvent]:
        kind, place, member = _GROWING[event["type"]]
        if isinstance(event.get(member), dict) and member != "delta":
            return ()                              # arguments, as some send them: the item has them
        at, text = str(event.get(place) or 0), text_in(event, member, IN_ANSWER)
        key = (_place_of(event, event.get("item_id")), at if place == "content_index"
               and kind != "thought" else "0")
        part, before = self._open.get(key), []
        if part is None:
            if kind == "call" or key[0] in self._done or (member != "delta" and not text):
                return ()                          # a call has no name yet: its item comes whole
            part = Part(kind)
            before = [self._opened(key, part)]
        if member != "delta":                      # all of it: some send it at once
            shown = "".join(part.pieces)
            part.pieces = [shown] if shown else []             # so that it is joined once
            text = text[len(shown):] if text.startswith(shown) else ""
        if kind == "thought" and part.pieces and part.at != at:
            text = "\n\n" + text
        part.at = at
        return [*before, part.grown(text)] if text else before

    def _end_item(self, event: Mapping[str, Any]) -> Iterable[AnswerEvent]:
        self._items_done += 1
        item = object_in(event, "item", IN_ANSWER)
        place = _place_of(event, item.get("id"))
        self._done.update((place, str(item.get("id"))))
        return self._whole_item(place, item)

    def _whole_item(self, place: str, item: Mapping[str, Any]) -> Iterator[AnswerEvent]:
        """Close the parts of an item, after what no event before has brought of them."""
        read = _ITEM_PARTS.get(str(item.get("type")))
        parts = [Part("other", native=item, origin="responses")] if read is None \
            else read(item, IN_ANSWER)
        for number, whole in enumerate(parts):
            key, text = (place, str(number)), whole.text
            if key not in self._open:
                if not text and not whole.native and whole.kind in ("text", "refusal", "thought"):
                    continue
                yield self._opened(key, whole)
            part = self._open.pop(key)
            shown = "".join(part.pieces)
            part.__dict__.update(whole.__dict__, pieces=part.pieces)
            if part.kind not in ("search", "other") and text != shown and text.startswith(shown):
                yield part.grown(text[len(shown):])
            over = part.closed()
            part.text = part.text or text
            yield over

    def finish(self, event: Mapping[str, Any], end: str) -> Iterator[AnswerEvent]:
        """Yield what ends the answer."""
        self.is_over = True
        response = object_in(event, "response", IN_ANSWER)
        items, known = rows_in(response, "output", IN_ANSWER), {place for place, _ in self._open}
        for number, item in enumerate(items if len(items) > self._items_done else ()):
            item_id = str(item.get("id"))          # a whole answer, or a server ends not every one
            if self._done.isdisjoint((str(number), item_id)):
                yield from self._whole_item(item_id if item_id in known else str(number), item)
        for part in self._open.values():
            if part.kind == "call" and not part.is_text and not part.pieces:
                yield part.grown("{}")
            yield part.closed()
        why = object_in(response, "incomplete_details", IN_ANSWER).get("reason")
        reason = reason_of_end(f"{end} {why}" if why else end, self._kinds)
        yield Ended(reason, chat_tokens(response.get("usage"), "input_tokens", "output_tokens"),
                    tier=_served_tier(response))


def _place_of(event: Mapping[str, Any], item_id: Any) -> str:
    """Return which item an event is about. Some servers leave out its index, some its id, and those
    of some have another id in each event."""
    index = event.get("output_index")
    return str((item_id or 0) if index is None else index)


_RESPONSE_READERS = MappingProxyType({
    "response.output_item.added": _ItemReader._begin_item,
    "response.output_item.done": _ItemReader._end_item,
    **dict.fromkeys(_GROWING, _ItemReader._grow)})


def _served_tier(response: Mapping[str, Any]) -> Optional[str]:
    tier = response.get("service_tier")
    return tier if isinstance(tier, str) and tier != "auto" else None


# Its answers, written.


# Fields of the request that a response repeats -> what is said of those that were not given.
_ECHOED = MappingProxyType({
    "instructions": None, "metadata": {}, "tools": [], "tool_choice": "auto", "temperature": None,
    "top_p": None, "parallel_tool_calls": True, "max_output_tokens": None, "max_tool_calls": None,
    "truncation": "disabled", "user": None, "safety_identifier": None, "prompt_cache_key": None})
_INCOMPLETE = MappingProxyType({"length": "max_output_tokens", "refused": "content_filter"})


class _Item:
    """An item of a response that is written: what it is so far, and where it stands."""

    def __init__(self, body: dict, index: int) -> None:
        self.body, self.where = body, {"item_id": body["id"], "output_index": index}
        self.parts = 0                             # of it that are open


KEPT_ITEM = "item"                                 # in place of a digest, beside an item's id
_NOT_SHOWN: tuple = (_Shown("", "", lambda part: {}), None, {})        # of a part without a place


class ResponsesWriter(AnswerWriter):
    """Writes an answer as a response, whole or as a stream of numbered events.

    Texts that follow each other are parts of one message, which is done when another item begins.
    """

    def __init__(self, fields: Mapping[str, Any], created_at: int) -> None:
        self._number = 0                             # of the next event
        self._stem = ""                              # of the items' ids
        self._may_be_named = fields.get("store") is not False
        self._response: dict = {
            "object": "response", "created_at": created_at, "status": "in_progress",
            "model": fields.get("model"), "background": False, "error": None, "store": False,
            "incomplete_details": None, "previous_response_id": None, "usage": None, "output": [],
            **{name: blank if fields.get(name) is None else fields[name]
               for name, blank in _ECHOED.items()},
            "reasoning": {"effort": None, "summary": None, **json_object(fields.get("reasoning"))},
            "text": {"format": {"type": "text"}, **json_object(fields.get("text"))}}
        self._client_tools = OPENAI_CLIENT_TOOLS.keys() & {
            str(row.get("type")) for holder in (fields, *_parts_of(fields.get("input")))
            for row in _parts_of(holder.get("tools"))}
        self._output: list[dict] = []                # items; empty until they are done
        self._message: Optional[_Item] = None        # that takes the next text
        self._open: dict[Part, tuple[_Shown, _Item, dict]] = {}    # with where each stands

    def whole(self, answer: Whole) -> dict:
        """Return an answer as a response."""
        parts = (event for part in answer.parts
                 for event in (Opened(part), More(part, part.text), Closed(part)))
        *_, last = self.events(itertools.chain((answer.began,), parts, (answer.ended,)))
        return last["response"]

    def failed(self, body: dict) -> Iterator[dict]:
        """Yield what ends a stream after an error: as OpenAI does, the error and its response."""
        error = json_object(body.get("error"))
        if "id" not in self._response:               # OpenAI's SDK wants a start before anything
            yield from self._began(Began("", self._response["model"]))
        yield self._event("error", **body)
        yield self._event("response.failed", response={
            **self._response, "status": "failed", "output": [*filter(None, self._output)],
            "error": {"code": error.get("code") or "server_error",
                      "message": error.get("message")}})

    def _event(self, kind: str, **members: Any) -> dict:
        self._number += 1
        return {"type": kind, "sequence_number": self._number - 1, **members}

    def _began(self, event: Began) -> Iterable[dict]:
        own = id_stem(event.id)[:40]                 # ids have at most 64 characters
        self._stem = own + self.end_of_ids()
        self._response.update(id=f"resp_{own}", model=event.model,
                              service_tier=event.tier or "default")
        return [self._event(f"response.{kind}", response={**self._response})
                for kind in ("created", "in_progress")]

    def _opened(self, event: Opened) -> Iterator[dict]:
        part, item = event.part, self._message
        typed = part.name in self._client_tools and not part.namespace
        row = _SHOWN.get(part.kind if part.kind != "call" else part.name if typed
                         else "text call" if part.is_text else "call")
        if row is None:
            return
        if row.item != "message" or item is None or item.parts:
            self._message = None
            if item is not None and not item.parts:      # else it ends with the text that is open
                yield from self._end_item(item)
            index = len(self._output)
            self._output.append({})
            item = _Item({"id": f"{row.prefix}_{self._stem}_{index}", "type": row.item,
                          **row.begins(part)}, index)
            yield self._event("response.output_item.added", output_index=index,
                              item={**item.body, **row.begins(part), "status": "in_progress"})
        item.parts += 1
        self._open[part] = row, item, {**item.where}
        if row.item == "message":
            self._message = item
            yield self._begin_inside(part)
        elif part.kind == "search":
            for step in ("in_progress", "searching"):
                yield self._event(f"response.{row.item}.{step}", **item.where)

    def _begin_inside(self, part: Part) -> dict:
        row, item, where = self._open[part]
        rows = item.body[row.inside]
        where[f"{row.inside}_index"] = len(rows)
        rows.append({**row.blank, row.member: ""})
        return self._event(f"{_INSIDE[row.inside]}.added", **where, part={**rows[-1]})

    def _more(self, event: More) -> Iterator[dict]:
        part, text = event
        row, _, where = self._open.get(part, _NOT_SHOWN)
        if not row.event or not text:
            return
        if row.inside == "summary" and "summary_index" not in where:       # now there is one
            yield self._begin_inside(part)
        self._number += 1                            # as _event() does, which is slower
        yield {"type": f"{row.event}.delta", "sequence_number": self._number - 1, **where,
               "delta": text, **row.notes}

    def _closed(self, event: Closed) -> Iterator[dict]:
        part = event.part
        row, item, where = self._open.pop(part, _NOT_SHOWN)
        if item is None:
            return
        at = where.get(f"{row.inside}_index")
        notes = [{"type": "url_citation", **note} for note in annotations_of(part)]
        if row.event and (at is not None or not row.inside):
            for number, note in enumerate(notes):
                yield self._event(f"{row.event}.annotation.added", **where,
                                  annotation_index=number, annotation=note)
            yield self._event(f"{row.event}.done", **where, **{row.member: part.text}, **row.notes)
        if at is not None:
            inside = item.body[row.inside][at]
            inside.update({row.member: part.text}, **({"annotations": notes} if notes else {}))
            yield self._event(f"{_INSIDE[row.inside]}.done", **where, part={**inside})
        item.parts -= 1
        if item is not self._message and not item.parts:
            if part.kind == "search":
                yield self._event(f"response.{row.item}.completed", **item.where)
            yield from self._end_item(item, row.ends(part))

    def _end_item(self, item: _Item, ends: Mapping[str, Any] = MappingProxyType({}),
                  status: str = "completed") -> Iterable[dict]:
        index, body = item.where["output_index"], {**item.body, **ends, "status": status}
        self._output[index] = body
        if self._may_be_named:
            self.keep(body)
        return [self._event("response.output_item.done", item=body, output_index=index)]

    def _ended(self, event: Ended) -> Iterator[dict]:
        why, tokens = _INCOMPLETE.get(event.reason), event.tokens
        status = "incomplete" if why else "completed"
        if event.refusal:
            part = Part("refusal", event.refusal)
            yield from [*self._opened(Opened(part)), *self._more(More(part, part.text)),
                        *self._closed(Closed(part))]
        if self._message is not None:
            yield from self._end_item(self._message, status=status)
        self._response.update(
            status=status, incomplete_details={"reason": why} if why else None,
            completed_at=None if why else int(time.time()), output=self._output,
            usage={"input_tokens": tokens.input, "output_tokens": tokens.output,
                   "input_tokens_details": {"cached_tokens": tokens.cached,
                                            "cache_write_tokens": tokens.written},
                   "output_tokens_details": {"reasoning_tokens": tokens.thought},
                   "total_tokens": tokens.input + tokens.output},
            service_tier=event.tier or self._response["service_tier"])
        yield self._event(f"response.{status}", response={**self._response})


# Its requests, written.


class _ResponsesRequest(_OpenAIRequest):
    """Writes requests of Responses: nothing is stored, and reasoning comes back sealed."""
    api, open_choice = "responses", "auto"

    def request(self) -> dict:
        """Return the request."""
        asked, losses, reasons = self._asked, self._losses, bool(self._gpt.efforts)
        system, turns = self._turns(CallIds("(?s).{1,64}", "call_"))
        if turns and turns[-1].role == "assistant":
            losses.adjust("prefill", "kept")
        items = [item for turn in turns for item in self._items(turn)]
        wanted, words = self._format()
        texts = [part for part in (*system, Part("text", words)) if part.text]
        if wanted == {"type": "json_object"} and "json" not in json.dumps(items).lower():
            items += self._items(Turn("system", [Part("text", "Respond with JSON.")]))
        if not items:                              # there must be one
            items, texts = self._items(Turn("system", texts)), []
        if not items:
            raise BadRequest("messages have no content", param="messages")
        cap = self._cap()
        if cap is not None and cap < MIN_RESPONSE_TOKENS:
            losses.adjust("output_cap", MIN_RESPONSE_TOKENS)
            cap = MIN_RESPONSE_TOKENS
        if asked.stops:
            losses.drop("stops")
        effort = self._effort(self._gpt.responses_efforts)
        searches = [tool.search for tool in asked.tools if tool.kind == "search"]
        extras = self._extras(effort)
        return {"model": asked.model, "input": items, "store": False, "stream": asked.streams,
                **_said({
                    "instructions": "\n\n".join([part.text for part in texts]),
                    "max_output_tokens": cap, **self._tool_fields(),
                    "max_tool_calls": next((search["max_uses"] for search in searches
                                            if "max_uses" in search), None),
                    "include": ["reasoning.encrypted_content"] * reasons
                    + ["web_search_call.action.sources"] * bool(searches),
                    "reasoning": _said({"effort": effort,
                                        "summary": asked.summary if reasons else None}),
                    "text": _said({"verbosity": extras.pop("verbosity", None), "format": wanted}),
                    **extras})}

    def _tool(self, tool: Tool) -> Optional[dict]:
        if tool.kind == "other":
            self._losses.drop(f"tools.{tool.native.get('type')}")
            return None
        if tool.kind == "search":
            if tool.search.get("blocked_domains"):
                self._losses.drop("tools.web_search.blocked_domains")
            domains, place = map(tool.search.get, ("allowed_domains", "user_location"))
            return {"type": "web_search",
                    **({"filters": {"allowed_domains": domains}} if domains else {}),
                    **({"user_location": place} if place else {})}
        kind, row = self._openai_tool(tool)
        return {"type": kind, **row}

    def _items(self, turn: Turn) -> list[dict]:
        """Return the items of a turn: what follows each other in it is one message."""
        items: list[dict] = []
        for is_content, parts in itertools.groupby(
                turn.parts, lambda part: part.kind in _CONTENT_KINDS):
            if is_content:
                items.append({
                    "type": "message", "role": {"system": "developer"}.get(turn.role, turn.role),
                    "content": [self._content(part, turn.role) for part in parts]})
            else:
                items += filter(None, [_ITEMS_WRITTEN[part.kind](self, part) for part in parts])
        while items and items[-1]["type"] == "reasoning":    # it needs what came of it
            self._losses.adjust("thoughts", "removed")
            items.pop()
        return items

    def _call(self, part: Part) -> dict:
        row = {"call_id": part.id, "name": self._names.fitting(part.name, part.namespace)}
        return {"type": "custom_tool_call", **row, "input": part.text} if part.is_text else {
            "type": "function_call", **row, "arguments": part.text}

    def _result(self, part: Part) -> dict:
        """Return what a tool gave: one text where it is no more than text."""
        rows = [self._content(piece, "user") for piece in part.parts]
        text = str(rows[0].get("text", "")) if rows else ""
        if part.is_error and text != NO_RESULT and not text.startswith("Error"):
            rows[:bool(text)] = [_text_row(f"Error: {text}".strip(), "user")]
        output = "\n".join(row["text"] for row in rows) \
            if all(row["type"] == "input_text" for row in rows) else rows
        kind = "custom_tool_call" if part.is_text else "function_call"
        return {"type": f"{kind}_output", "call_id": part.id, "output": output}

    def _content(self, part: Part, role: str) -> dict:
        """Return a part of a message or of an output. Raises BadRequest for one without a place."""
        url = part.url or (f"data:{part.media};base64,{part.data}" if part.data else "")
        if part.kind == "refusal":
            return {"type": "refusal", "refusal": part.text}
        if part.kind == "text" or (part.kind == "document" and part.text):
            return _text_row(part.text if part.kind == "text" else document_text(part), role)
        if role == "assistant" or not url:
            raise untaken(part)
        if part.kind == "image":
            return {"type": "input_image", "image_url": url, "detail": part.detail or "auto"}
        return {"type": "input_file", "file_url": url} if part.url else {
            "type": "input_file", "file_data": url, "filename": part.name or "document.pdf"}


_CONTENT_KINDS = frozenset({"text", "refusal", "image", "document"})
_ITEMS_WRITTEN = MappingProxyType({
    "call": _ResponsesRequest._call, "result": _ResponsesRequest._result,
    "thought": _ResponsesRequest._thought, "search": _ResponsesRequest._other,
    "other": _ResponsesRequest._other})


def _text_row(text: str, role: str) -> dict:
    return {"type": "output_text", "text": text, "annotations": []} if role == "assistant" \
        else {"type": "input_text", "text": text}


def _said(fields: Mapping[str, Any]) -> dict:
    """Return the fields that say something."""
    return {name: value for name, value in fields.items() if value not in (None, "", {}, [])}


# ==== 14. Translators ===========================================================================
#
# A translator is made from one request and carries it, its answer, its stream and its errors from
# the client's API to the provider's and back. It does no I/O: dicts in, dicts out.


class Dialect(NamedTuple):
    """How an API is read and written; see chapter 8."""
    path: str
    names: Mapping[str, str]                     # words for losses -> fields of the API
    read_request: Callable[[Mapping[str, Any]], Conversation]
    request_writer: Callable[[Conversation, Target, Losses], RequestWriter]
    read_answer: Callable[[Iterable[Mapping[str, Any]], Terms], Iterator[AnswerEvent]]
    stream_of: Callable[[dict], Iterable[dict]]
    writer: Callable[[Mapping[str, Any], int], AnswerWriter]
    read_error: Callable[[int, Any], Failure]
    write_error: Callable[[Failure, str], tuple[int, dict]]


DIALECTS = MappingProxyType({
    "chat": Dialect("/v1/chat/completions", CHAT_NAMES, read_chat_request, _ChatRequest,
                    chat_events, chat_stream_of, ChatWriter, failure_of, openai_error),
    "messages": Dialect("/v1/messages", MESSAGES_NAMES, read_messages_request,
                        _MessagesRequest, messages_events, messages_stream_of,
                        MessagesWriter, failure_of, anthropic_error),
    "responses": Dialect("/v1/responses", RESPONSES_NAMES, read_responses_request,
                         _ResponsesRequest, responses_events, responses_stream_of,
                         ResponsesWriter, responses_failure, openai_error),
})


def carrying_api(api: str, provider: Provider, model: str,
                 price: Optional[Price]) -> Optional[str]:
    """Return the API in which a model is called for a client of another: that one itself where
    the provider speaks it; None where none carries it.

    Models of OpenAI's that reason are called in Responses: chat refuses tools beside an effort.
    """
    spoken = provider.apis & DIALECTS.keys()
    is_for_responses = "responses" in spoken and price is not None and price.is_for_responses
    if api in provider.apis and not (api == "chat" and is_for_responses):
        return api
    if api not in DIALECTS:
        return None
    if "messages" in spoken:
        return "messages"
    if is_for_responses or ("responses" in spoken and gpt_of(model).efforts):
        return "responses"
    return "chat"


def begun_late(events: Iterator[AnswerEvent]) -> Iterator[AnswerEvent]:
    """Yield an answer's events, of which those that say nothing yet wait for more, or for a ping: a
    call that fails before has a status. A first one that is missing is made."""
    held: list[AnswerEvent] = []
    for event in events:
        if event is PING and not held:
            yield event
            continue
        held += (event,) if held or isinstance(event, Began) else (Began("", None), event)
        if not isinstance(event, (Began, Opened)):
            yield from held
            break
    yield from events


class Translator:
    """Carries one call of a client's API over its provider's. Raises BadRequest."""

    def __init__(self, client_api: str, api: str, fields: Mapping[str, Any], losses: Losses,
                 target: Target, asked_model: Optional[str] = None) -> None:
        self.client_api, self.api = client_api, api
        self._client, self._provider = DIALECTS[client_api], DIALECTS[api]
        self._asked_model, self._target = asked_model, target      # what the client called it
        conversation = self._client.read_request(with_kept_items(fields, target.recall))
        losses.names = {**self._client.names, **conversation.names} if conversation.names \
            else self._client.names
        for name, became in conversation.changed.items():
            losses.adjust(name, became)
        try:
            writer = self._provider.request_writer(conversation, target, losses)
            self.request, self.terms = writer.request(), writer.terms
        except BadRequest as err:                    # writers do not know what the client calls it
            err.param = self._client.names["turns"] if err.param == "messages" else err.param
            raise
        self._writer = self._client.writer(fields, int(time.time()))
        self._writer.end_of_ids = lambda: f"_{secrets.token_hex(4)}"
        self._writer.keep = lambda item: target.keep(item["id"], KEPT_ITEM, thoughts=[item])
        self.thoughts: list[Mapping[str, Any]] = []        # the answer's, where all is behind them
        self.first_call_id = ""                      # in the answer

    def stream_of(self, body: dict) -> Iterable[dict]:
        """Return a whole answer as a stream of the provider's. Raises UpstreamBroke."""
        return self._provider.stream_of(body)

    def answer(self, body: dict) -> dict:
        """Return a whole answer. Raises UpstreamBroke."""
        return self.answer_of(self.stream_of(body))

    def answer_of(self, stream: Iterable[Mapping[str, Any]]) -> dict:
        """Return a streamed answer as a whole one. Raises UpstreamBroke."""
        whole = folded(self._freed(self._provider.read_answer(stream, self.terms)))
        if self.terms.unfences:
            texts = [part for part in whole.parts if part.kind == "text"]
            fenced = re.fullmatch(FENCED, "".join(part.text for part in texts))
            for number, part in enumerate(texts if fenced else ()):
                part.text = "" if number else fenced[1]
        return self._writer.whole(whole)

    def events(self, stream: Iterable[Mapping[str, Any]]) -> Iterator[dict]:
        """Yield the events of a streamed answer. Raises UpstreamBroke."""
        return self._writer.events(self._freed(self._provider.read_answer(stream, self.terms)))

    def error(self, status: int, body: Any, request_id: str) -> tuple[int, dict]:
        """Return an error, with its status."""
        return self._client.write_error(self._provider.read_error(status, body), request_id)

    def failed(self, body: dict) -> Iterable[dict]:
        """Return what ends a stream after an error in the client's words."""
        return self._writer.failed(body)

    def _freed(self, events: Iterable[AnswerEvent]) -> Iterator[AnswerEvent]:
        """Yield an answer's events as if the request had gone as its client wrote it.

        Raises UpstreamBroke where the last one is missing.
        """
        opened, has_ended = 0, False
        wrapped: dict[Part, TextInput] = {}          # the parts whose text is inside an object
        self._used_ids = {*self.terms.ids}
        for event in begun_late(iter(events)):
            kind = type(event)
            if kind is More:
                if wrapped and event.part in wrapped:
                    event = More(event.part, wrapped[event.part].more(event.text))
                    if not event.text:
                        continue
            elif kind is Opened:
                event.part.index, opened = opened, opened + 1
                if event.part.kind == "call" and self._free_call(event.part):
                    wrapped[event.part] = TextInput()
            elif kind is Closed:
                yield from self._over(event.part, wrapped.get(event.part))
            elif isinstance(event, Began):
                event = Began(event.id, self._asked_model or event.model, event.tier, event.tokens)
            elif isinstance(event, Ended):
                has_ended = True
                if event.reason == "calls" and self.terms.answers_by_tool:
                    event = event._replace(reason="end")
                elif event.reason == "calls" and self.thoughts:    # before the client sees that
                    self._target.keep(self.first_call_id, self.terms.digest, thoughts=self.thoughts)
            yield event
        if not has_ended:
            raise UpstreamBroke(NO_LAST_EVENT)

    def _free_call(self, call: Part) -> bool:
        """Give a call its client's name, or make it the answer; whether its text is wrapped."""
        if self.terms.answers_by_tool:
            call.kind = "text"
            return False
        if not call.name:
            raise UpstreamBroke("the provider called a tool without a name")
        call.name, call.namespace, is_wrapped = self.terms.names.own(call.name)
        call.id = carried_call_id(call.id or f"toolu_{secrets.token_hex(12)}", self._used_ids)
        self._used_ids.add(call.id)
        self.first_call_id = self.first_call_id or call.id
        is_wrapped = is_wrapped and not call.is_text
        call.is_text |= is_wrapped
        return is_wrapped

    def _over(self, part: Part, inside: Optional[TextInput]) -> Iterator[AnswerEvent]:
        """Unwrap what is left of a text; and note a thought that begins the answer."""
        if inside is not None:
            rest = inside.rest(part.text)
            part.text = inside.text + rest
            yield from [More(part, rest)] if rest else []
        if part.kind != "thought":
            return
        part.maker = self._target.manners.name
        if part.origin == "chat" and part.native:
            self.thoughts.append(part.native)
        elif part.origin == "messages":
            if part.index == len(self.thoughts):
                self.thoughts.append(part.native)
            else:                                    # what comes between would be lost
                self.thoughts.clear()


THINKING_KEPT_BYTES, THINKING_KEPT_S = 64 * 1024 * 1024, 3600


class ThinkingMemory:
    """What clients leave to their provider to remember: the thinking behind tool calls, that Claude
    wants again as it was signed, and items of Responses that are named by their ids alone. In
    memory only.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()              # guards the next two
        self._kept: dict[tuple, tuple[float, int, list[dict]]] = {}        # the oldest first
        self._bytes = 0

    def keep(self, key: tuple, thoughts: list[dict]) -> None:
        """Remember them for THINKING_KEPT_S; the oldest go first where there is no room."""
        now_s, size = self._clock(), len(json_bytes(thoughts))
        with self._lock:
            self._bytes += size - self._kept.pop(key, (0, 0))[1]
            self._kept[key] = (now_s, size, thoughts)
            while self._kept:
                oldest, (since_s, size, _) = next(iter(self._kept.items()))
                if self._bytes <= THINKING_KEPT_BYTES and now_s - since_s <= THINKING_KEPT_S:
                    break
                del self._kept[oldest]
                self._bytes -= size

    def recall(self, key: tuple) -> list[dict]:
        """Return what was kept under a key; nothing where that is too long ago."""
        with self._lock:
            since_s, _, thoughts = self._kept.get(key, (0, 0, []))
        return thoughts if self._clock() - since_s <= THINKING_KEPT_S else []


# Where a conversation stands, the member of its rows or their content that seals a thought, and
# what its client calls those.
SEALS = MappingProxyType({"messages": ("messages", "signature", "messages.thinking"),
                          "responses": ("input", "encrypted_content", "input.reasoning")})


def without_own_thinking(api: str, fields: Mapping[str, Any]) -> dict:
    """Return what replaces a conversation with thinking that an answer of ours brought from another
    provider: nobody takes what they have not sealed themselves."""
    name, member, _ = SEALS[api]

    def is_ours(row: Any) -> bool:
        return str(json_object(row).get(member)).startswith(OWN_SIGNATURE)

    rows, kept = fields.get(name), []
    for row in rows if isinstance(rows, list) else ():
        content = json_object(row).get("content")
        if isinstance(content, list) and any(map(is_ours, content)):
            row = {**row, "content": [one for one in content if not is_ours(one)]}
            if not row["content"]:
                continue
        if not is_ours(row):
            kept.append(row)
    return {name: kept} if kept and kept != rows else {}


STREAM_ENDS = MappingProxyType(dict.fromkeys(("chat", "completions"), (b"data: [DONE]\n\n",)))


def wire_event(api: str, event: dict) -> bytes:
    """Return an event of a client's API as bytes; a ping is a comment where it has none."""
    kind = event.get("type")
    if kind == "ping" and api != "messages":
        return SSE_PING
    return format_event(event) if api in STREAM_ENDS else format_event(event, event["type"])


# Over 814 texts in many languages and formats o200k's median is a token for 3.67 bytes.
ESTIMATE_BYTES_PER_TOKEN = Fraction(36, 10)
ESTIMATED_IMAGE_TOKENS = 1600


def estimated_input_tokens(fields: Mapping[str, Any]) -> int:
    """Return a best estimate, not a bound, of the input of a Messages or Responses request."""
    images = Contents(fields).images
    names = ("system", "messages", "tools", "instructions", "input")
    sizes = sum(len(text.encode("utf-8", "surrogatepass")) for name in names
                for text in strings_in(fields.get(name)))
    sizes -= sum(map(len, strings_in(images)))
    messages = fields.get("messages", fields.get("input"))
    count = len(messages) if isinstance(messages, list) else 0
    return -int(-max(0, sizes) // ESTIMATE_BYTES_PER_TOKEN) + 8 * count \
        + ESTIMATED_IMAGE_TOKENS * len(images)


# The type of an error inside a stream -> the status that it would have had.
ERROR_STATUSES = MappingProxyType({
    **{kind: status for status, kind in ANTHROPIC_ERRORS.items()},
    "server_error": 500, "insufficient_quota": 429, "rate_limit_exceeded": 429, "requests": 429,
    "tokens": 429, "invalid_prompt": 400, "context_length_exceeded": 400})


# ==== 15. The echo model ========================================================================
#
# `ironcage/echo` answers inside this process, offline, in every API that is metered: the last
# text of the request comes back. A token is a word with the space before it. Same request, same
# answer, but for ids and times, which are passed in. It is bounded, metered and billed on the
# same path as a provider's answer (its price is ECHO_ROW).

_ECHO_TOKEN = r"\s*\S+|\s+\Z"
ECHO_GREETING = "Hello from ironcage/echo."      # the answer to a request without text
ECHO_DIMENSIONS = 8                              # of an embedding, unless asked


def _texts(value: Any) -> Iterator[str]:
    """Yield all text of a prompt, in order: strings, and the text of content parts."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, dict):
        for name in ("text", "content", "output"):
            yield from _texts(value.get(name))


def echo_input_tokens(fields: Mapping[str, Any]) -> int:
    """Count the words in everything that the echo model reads."""
    read = [fields.get(name) for name in ("system", "instructions", "messages", "input", "prompt")]
    return sum(len(re.findall(_ECHO_TOKEN, text)) for text in _texts(read))


class EchoAnswer(NamedTuple):
    """What the echo model says to one request."""
    text: str
    tokens: tuple[str, ...]         # the text, cut into them
    is_cut: bool                    # at the request's cap
    usage: Tokens
    answer_id: str                  # 24 characters, without a prefix
    created_at: int                 # Unix seconds
    fields: Mapping[str, Any]       # the request's

    def events(self) -> Iterator[AnswerEvent]:
        """Yield the answer, token by token."""
        part = Part("text", self.text)
        yield Began(self.answer_id, ECHO_MODEL, tokens=self.usage._replace(output=0))
        yield Opened(part)
        yield from (More(part, token) for token in self.tokens)
        yield Closed(part)
        yield Ended("length" if self.is_cut else "end", self.usage)


def echo(api: str, fields: Mapping[str, Any], *, answer_id: str,
         created_at: int) -> EchoAnswer:
    """Return the answer to a request. Raises BadRequest for more than one choice."""
    if api != "embeddings" and _choices(api, fields) != 1:
        raise BadRequest(f"{ECHO_MODEL} gives one answer to one prompt", param="n")
    source = next((fields[name] for name in ("messages", "input", "prompt") if name in fields), "")
    last = source[-1] if isinstance(source, list) and source else source
    text = "".join(_texts(last)) or ECHO_GREETING
    tokens = tuple(re.findall(_ECHO_TOKEN, text))
    cap = asked_output_tokens(api, fields)
    kept = tokens if cap is None else tokens[:cap]
    usage = Tokens(echo_input_tokens(fields), output=len(kept))
    return EchoAnswer("".join(kept), kept, kept != tokens, usage, answer_id, created_at, fields)


def _echo_completion(answer: EchoAnswer) -> dict:
    return {"id": f"cmpl-{answer.answer_id}", "object": "text_completion",
            "created": answer.created_at, "model": ECHO_MODEL,
            "choices": [{"index": 0, "text": answer.text, "logprobs": None,
                         "finish_reason": "length" if answer.is_cut else "stop"}],
            "usage": chat_usage(answer.usage)}


def _echo_completion_events(answer: EchoAnswer) -> Iterator[dict]:
    whole = _echo_completion(answer)
    [choice], usage = whole["choices"], whole.pop("usage")
    wants_usage = json_object(answer.fields.get("stream_options")).get("include_usage")
    base = {**whole, "usage": None} if wants_usage else whole
    for token in answer.tokens:
        yield {**base, "choices": [{**choice, "text": token, "finish_reason": None}]}
    yield {**base, "choices": [{**choice, "text": ""}]}
    if wants_usage:
        yield {**base, "choices": [], "usage": usage}


def _echo_vector(text: str, dimensions: int) -> list[float]:
    """Return a unit vector that depends on the text alone."""
    stream = hashlib.shake_256(text.encode("utf-8", "surrogatepass")).digest(dimensions)
    raw = [byte - 127.5 for byte in stream]
    length = sum(x * x for x in raw) ** 0.5
    return [x / length for x in raw]


def _echo_embeddings(answer: EchoAnswer) -> dict:
    fields = answer.fields
    source = fields.get("input", "")
    is_one = not isinstance(source, list) or (      # a text, as it is or as the ids of its tokens
        source and all(isinstance(item, int) for item in source))
    dimensions = optional_count(fields, "dimensions", least=1, most=4096) or ECHO_DIMENSIONS
    rows = []
    for index, text in enumerate([source] if is_one else source):
        vector: Union[str, list[float]] = _echo_vector(
            text if isinstance(text, str) else json.dumps(text), dimensions)
        if fields.get("encoding_format") == "base64":
            vector = base64.b64encode(struct.pack(f"<{dimensions}f", *vector)).decode("ascii")
        rows.append({"object": "embedding", "index": index, "embedding": vector})
    return {"object": "list", "model": ECHO_MODEL, "data": rows, "usage": {
        "prompt_tokens": answer.usage.input, "total_tokens": answer.usage.input}}


def echo_whole(api: str, answer: EchoAnswer) -> dict:
    """Return the echo model's answer as a whole answer of an API."""
    if api in DIALECTS:
        return DIALECTS[api].writer(answer.fields, answer.created_at).whole(
            folded(answer.events()))
    return _echo_embeddings(answer) if api == "embeddings" else _echo_completion(answer)


def echo_stream(api: str, answer: EchoAnswer) -> Iterator[bytes]:
    """Yield the echo model's answer as a stream of an API."""
    events = _echo_completion_events(answer) if api == "completions" else \
        DIALECTS[api].writer(answer.fields, answer.created_at).events(answer.events())
    for event in events:
        yield wire_event(api, event)
    yield from STREAM_ENDS.get(api, ())


# ==== 16. Cost controller =======================================================================
#
# The cage itself: what each scope (the proxy, and each token of --config) may spend, has spent and
# has set aside, in microdollars, behind one lock that is held for arithmetic only. The names and
# rules are the original's (iron_runtime's CostController); scopes, periods, the queue are ours.
#
# The queue: a request that does not fit now, but would if calls in flight cost less than they set
# aside, waits. Rule: first come, first served, in every scope. One that waits holds up only later
# requests that need a scope it lacks, small or big; so a big one is not starved by small ones that
# fit into every gap, and a small one waits no longer than the big one's --wait, at the end of
# which that one is lowered or refused. While nothing is in flight no request waits: for nothing.

PROXY_SCOPE = "proxy"
PERIODS = ("total", "day", "week", "month")
DAY_S = 86_400
MOST_TAKES = 100                              # tries of one reservation, while others are quicker
MOST_SESSIONS = 10_000                        # whose budgets are known at a time; clients name them
FLAGGED = object()                            # a limit as the flag or the configuration has it
# The SDKs honour it, and Claude Code, which otherwise repeats a 401 for three minutes.
DO_NOT_RETRY = (("x-should-retry", "false"),)


def period_start(period: str, now_s: int) -> int:
    """Return when the UTC day, week (Monday) or month began, in Unix seconds; 0 for "total"."""
    now = time.gmtime(now_s)
    days = {"day": 0, "week": now.tm_wday, "month": now.tm_mday - 1}.get(period)
    return 0 if days is None else now_s - now_s % DAY_S - days * DAY_S


def period_end(period: str, since_s: int) -> Optional[int]:
    """Return when a period that began then ends, in Unix seconds; None for "total"."""
    days = {"day": 1, "week": 7, "month": 31}.get(period)         # 31 are enough to be in the next
    return None if days is None else period_start(period, since_s + days * DAY_S)


def check_stop(limit: Optional[int], stop_at: Optional[int]) -> None:
    """Raise ValueError for a stop that is not below the budget of its scope."""
    if stop_at is not None and (limit is None or stop_at >= limit):
        raise ValueError(f"a stop at {format_usd(stop_at)} must be below the budget, which is "
                         f"{'not set' if limit is None else format_usd(limit)}")


class Budget(NamedTuple):
    """The amounts of one scope at one instant, in microdollars; a limit of None refuses nothing."""
    scope: str
    limit: Optional[int]
    spent: int
    reserved: int
    stop_at: Optional[int] = None
    period: str = "total"
    since_s: int = 0                          # when its current period began, in Unix seconds

    @property
    def ended_by(self) -> Optional[str]:
        """Name the limit that is spent, so that no call begins; None while neither is."""
        if self.limit is not None and self.spent >= self.limit:
            return "budget"
        return "stop_at" if self.stop_at is not None and self.spent >= self.stop_at else None

    @property
    def free(self) -> Optional[int]:
        """Return what can be reserved; below 0 after a lower limit; None without one."""
        if self.stop_at is not None and self.spent >= self.stop_at:
            return 0
        return None if self.limit is None else self.limit - self.spent - self.reserved

    def as_json(self) -> dict:
        """Return the five amounts under their public names."""
        free = self.free
        return {"limit_microdollars": self.limit, "stop_at_microdollars": self.stop_at,
                "spent_microdollars": self.spent, "reserved_microdollars": self.reserved,
                "available_microdollars": None if free is None else max(0, free)}

    def standing(self) -> dict:
        """Return the amounts with their scope and period, which ends at these Unix seconds."""
        return {**self.as_json(), "scope": self.scope, "period": self.period,
                "resets_s": period_end(self.period, self.since_s)}


class Decision(NamedTuple):
    """What is to become of a request: one of the three."""
    caps: Optional[Caps] = None               # it is to be reserved for these
    lacking: tuple[str, ...] = ()             # it waits for these scopes
    refused_by: Optional[Budget] = None


def decision_on(bound: Bound, budgets: Sequence[Budget], *, may_wait: bool,
                blocked: Container[str] = frozenset()) -> Decision:
    """Decide about a request's bound while its scopes hold these amounts. Pure.

    `blocked` scopes are those that a request further ahead waits for. Where a request cannot
    wait, or waiting would bring nothing, all that is free may be taken. What is free passes.
    """
    caps, lacking = bound.asked_caps, []
    for budget in budgets:
        is_busy = budget.reserved > 0
        fitting = None if budget.scope in blocked and budget.limit is not None \
            else bound.fitting_caps(budget.free, at_last=not (may_wait and is_busy), shares=is_busy)
        if fitting is None:
            lacking.append(budget)
        elif fitting != caps:
            caps = Caps(*map(min, caps, fitting))
    if not lacking or not bound.microdollars(*bound.asked_caps):
        return Decision(caps)
    hopeless = [budget for budget in lacking            # even if all in flight cost nothing
                if bound.fitting_caps(budget._replace(reserved=0).free, at_last=True) is None]
    if may_wait and not hopeless:
        return Decision(lacking=tuple(budget.scope for budget in lacking))
    return Decision(refused_by=(hopeless or lacking)[0])


class Reservation:
    """One request's claim on its scopes: in the queue, then a part set aside, then settled.

    Guarded by its controller's lock once it is in the queue; before, one thread knows it.
    """

    def __init__(self, bound: Bound, scopes: Sequence[str], may_wait: bool) -> None:
        self.bound, self.scopes, self.may_wait = bound, scopes, may_wait
        self.microdollars = 0                 # what is set aside in every scope
        self.caps = bound.asked_caps          # what it is set aside for
        self.admitted_s = 0                   # Unix seconds: what it costs belongs to that period
        self.number = 0                       # by which accounts of several processes know it,
        self.shared: Optional[str] = None     # and all that they know, for the ledger
        self.is_open = False                  # set aside and not settled
        self.is_limited = False               # one of its scopes had a limit
        self.refused_by: Optional[Budget] = None
        self.failure: Optional[IroncageError] = None         # nothing can be decided about it
        self.decided: Optional[threading.Event] = None       # made for one that has to wait

    @property
    def output_cap(self) -> int:
        """Return the output tokens that it is set aside for."""
        return self.caps.output_tokens

    @property
    def is_waiting(self) -> bool:
        return not self.is_open and self.refused_by is None and self.failure is None


class Scope(NamedTuple):
    """What is configured of a scope; amounts in microdollars."""
    name: str
    limit: Optional[int]
    period: str
    stop_at: Optional[int]
    spent_since: Callable[[int], int]         # what the ledger says it spent since a time


@functools.lru_cache(maxsize=64)
def _periods_of(day: int) -> Mapping[str, tuple[str, int]]:
    """Return the periods that hold a day: {"week": ("week", when that began), ...}."""
    return {period: (period, period_start(period, day * DAY_S)) for period in PERIODS}


class Account:
    """One scope's money. Guarded by the lock of its Accounts.

    Invariant: each amount is in the day, the week, the month and the total in which its call was
    admitted. So another period of the scope is another look: it can neither lose nor double a
    charge, nor a call in flight.
    """

    def __init__(self, row: Scope, now_s: int) -> None:
        self.row = row                        # its limits and its period
        self.users = 0                        # requests under way that name it as a session
        self._seen_s = now_s                  # the latest time
        self._amounts = {key: [row.spent_since(key[1]), 0]        # [spent, reserved]
                         for key in _periods_of(now_s // DAY_S).values()}

    def budget(self, now_s: int) -> Budget:
        """Return what it holds, in the period of now. A clock that goes back reopens none."""
        self._seen_s, row = max(self._seen_s, now_s), self.row
        key = _periods_of(self._seen_s // DAY_S)[row.period]
        spent, reserved = self._amounts.get(key, (0, 0))
        return Budget(row.name, row.limit, spent, reserved, row.stop_at, *key)

    def add(self, admitted_s: int, *, spent: int = 0, reserved: int = 0) -> None:
        """Change what the calls of a day spent and hold: first spend, then release."""
        for key in _periods_of(admitted_s // DAY_S).values():
            amounts = self._amounts.setdefault(key, [0, 0])
            amounts[0] += spent
            amounts[1] += reserved


class Accounts:
    """The money of all scopes in this process: each change is one step, behind one lock.

    Another engine needs its methods and no more; those of that one may raise LedgerUnavailable,
    but for settle(), which keeps what it cannot enter. `known` is what was seen last, and asks
    no engine. `is_shared`: others change the amounts too, so that waiting requests look again.
    """
    is_shared = False

    def __init__(self, limit: Optional[int], stop_at: Optional[int], spent_microdollars: int,
                 clock: Callable[[], float]) -> None:
        self._clock = clock               # Unix seconds
        self._lock = threading.Lock()     # guards all below, and every Account
        self._flags = {"limit": limit, "stop_at": stop_at}
        self.by_scope: dict[str, Account] = {PROXY_SCOPE: Account(Scope(
            PROXY_SCOPE, limit, "total", stop_at, lambda since_s: spent_microdollars), 0)}
        self._sessions: dict[str, Account] = {}     # those that clients name, the last used last

    def take(self, claim: Reservation, microdollars: int,
             least_free: Sequence[int]) -> Optional[list[Budget]]:
        """Set an amount aside in all scopes of a claim, if so much is free in each; where not,
        return what they hold. An amount of 0 is always there."""
        now_s = int(self._clock())
        with self._lock:
            budgets = [self.by_scope[scope].budget(now_s) for scope in claim.scopes]
            if microdollars and any([budget.free is not None and budget.free < least
                                     for budget, least in zip(budgets, least_free)]):
                return budgets
            claim.microdollars = microdollars
            claim.admitted_s = max([now_s, *[budget.since_s for budget in budgets]])
            claim.is_limited |= any([budget.limit is not None for budget in budgets])
            for scope in claim.scopes:
                self.by_scope[scope].add(claim.admitted_s, reserved=microdollars)
        return None

    def settle(self, claim: Reservation, microdollars: int,
               row: Optional[Mapping[str, Any]] = None) -> None:
        """Charge what a claim cost, and release what was set aside. `row`: as in the ledger."""
        with self._lock:
            for scope in claim.scopes:
                self.by_scope[scope].add(claim.admitted_s, spent=microdollars,
                                         reserved=-claim.microdollars)

    def budgets(self, scopes: Sequence[str]) -> list[Budget]:
        """Return what scopes hold, all at one instant."""
        now_s = int(self._clock())
        with self._lock:
            return [self.by_scope[scope].budget(now_s) for scope in scopes]

    known = budgets

    def _nothing(self, *_: Any) -> None:
        """Do nothing: there is no engine to keep up, and no other process to inform."""

    start = keep_count = as_json = close = _nothing

    def set_limits(self, changes: Mapping[str, Any], *, must_fit: bool = True) -> None:
        """Set the proxy's `limit` or `stop_at`, or both in one step; FLAGGED is what the flag
        says, and what is not named stays.

        Raises ValueError, and changes nothing, where the stop must be below the limit and is not.
        """
        with self._lock:
            account = self.by_scope[PROXY_SCOPE]
            named: dict[str, Any] = {name: self._flags[name] if amount is FLAGGED else amount
                                     for name, amount in changes.items()}
            row = account.row._replace(**named)
            if must_fit:
                check_stop(row.limit, row.stop_at)
            account.row = row

    def set_scopes(self, rows: Sequence[Scope]) -> None:
        """Open scopes, or change their limits and periods, in one step, after what can fail."""
        accounts = [*map(self._account_of, rows)]
        with self._lock:
            for account, row in zip(accounts, rows):
                self.by_scope.setdefault(row.name, account).row = row

    def _account_of(self, row: Scope) -> Account:
        """Return a scope's account. What a new one spent before is asked for, from the beginning
        of each period on; one that is there knows it, also what the ledger does not hold yet."""
        return self.by_scope.get(row.name) or Account(row, int(self._clock()))

    @contextlib.contextmanager
    def session(self, row: Scope) -> Iterator[None]:
        """Keep the scope of a session while a request is under way in it.

        Beyond MOST_SESSIONS the one used longest ago in which none is under way is forgotten.
        """
        account = self._account_of(row)
        with self._lock:
            account = self.by_scope.setdefault(row.name, account)
            account.row = row
            account.users += 1
            self._sessions[row.name] = self._sessions.pop(row.name, account)
        try:
            yield
        finally:
            with self._lock:
                account.users -= 1
                idle = (name for name, one in self._sessions.items() if not one.users)
                oldest = next(idle, None) if len(self._sessions) > MOST_SESSIONS else None
                if oldest is not None:
                    del self._sessions[oldest], self.by_scope[oldest]

    def sessions(self, tokens: Container[str], most: int) -> list[Budget]:
        """Return the amounts of sessions of these tokens, the last used first."""
        now_s = int(self._clock())
        with self._lock:
            names = [name for name in reversed(self._sessions)
                     if name.partition("/")[0] in tokens]
            return [self._sessions[name].budget(now_s) for name in names[:most]]


def _check_amount(microdollars: int) -> None:
    if isinstance(microdollars, bool) or not isinstance(microdollars, int) or microdollars < 0:
        raise ValueError(f"{microdollars!r} is not a whole number of microdollars from 0 up")


class CostController:
    """Admits requests while spent + reserved stays within the limit, in each of their scopes.

    Invariant: no admission ever makes spent + reserved exceed a limit. Only three things can:
    a lower limit (set_budget), spending without a reservation (add_spend), and an answer that
    cost more than its reservation (commit; counted in `bound_exceeded`). A limit of None counts
    and refuses nothing. Once `stop_at` is spent in a scope no call begins there, and what waits is
    refused; what is in flight may go on, up to the limit. A charge belongs to the period in which
    its request was admitted.

    The money is in `accounts`, which take or refuse an amount in one step; here is what to take,
    and which request is next. No lock is held while accounts are asked, since they may be far away.
    """

    def __init__(self, limit_microdollars: Optional[int] = None, *,
                 stop_at: Optional[int] = None, spent_microdollars: int = 0,
                 clock: Callable[[], float] = time.time,
                 accounts: Any = None) -> None:
        self.accounts = accounts or Accounts(limit_microdollars, stop_at, spent_microdollars,
                                             clock)
        self._lock = threading.Lock()     # guards all below, and each Reservation there
        self._queue: list[Reservation] = []         # what waits, in the order of arrival
        self._blocked: frozenset = frozenset()      # the scopes that it waits for
        self._serving = threading.Lock()            # held while it is decided about; never awaited
        self._must_serve = False                    # it is to be decided about (again)
        self._served_s: float = 0                      # when that was last begun, monotonic
        self._bound_exceeded = 0
        self._is_closed = False

    # Admission.

    def ask(self, bound: Bound, scopes: Sequence[str] = (), *,
            may_wait: bool = False) -> Reservation:
        """Return a reservation for a request's bound: open, refused, or in the queue.

        It belongs to the proxy's scope and to `scopes`. What costs nothing always passes.
        """
        claim = Reservation(bound, (PROXY_SCOPE, *scopes), may_wait and not self._is_closed)
        blocked, budgets = self._blocked, None
        if not blocked.isdisjoint(claim.scopes) and bound.microdollars(*claim.caps):
            budgets = self.accounts.budgets(claim.scopes)
        if not self._lacking(claim, budgets, blocked):
            claim.is_open = claim.refused_by is None
            return claim
        claim.decided = threading.Event()
        with self._lock:
            claim.may_wait = not self._is_closed
            self._queue.append(claim)
        with contextlib.ExitStack() as undo:
            undo.callback(self.leave, claim)           # where an interrupt breaks this off
            self._serve_queue()
            undo.pop_all()
        return claim

    def _lacking(self, claim: Reservation, budgets: Optional[Sequence[Budget]],
                 blocked: Container[str]) -> Sequence[str]:
        """Set money aside for a claim, or refuse it; or return the scopes that it has to wait for.

        Without known budgets it is first tried as it was asked for, which needs no look at them.
        What is decided on amounts that have changed meanwhile is decided anew.
        """
        bound, takes_half = claim.bound, [not claim.bound.takes_what_it_asks] * len(claim.scopes)
        for _ in range(MOST_TAKES):
            if budgets is not None:
                decision = decision_on(bound, budgets, may_wait=claim.may_wait, blocked=blocked)
                if decision.caps is None:
                    claim.refused_by = decision.refused_by
                    return decision.lacking
                claim.caps = decision.caps
            microdollars = bound.microdollars(*claim.caps)
            if budgets is not None:                     # what was half of it stays that
                takes_half = [budget.free is None or 2 * microdollars <= budget.free
                              for budget in budgets]
            budgets = self.accounts.take(claim, microdollars, [
                microdollars * (1 + is_half) for is_half in takes_half])
            if budgets is None:
                return ()
        raise LedgerUnavailable("the amounts of the budget change faster than a reservation can "
                                "be made; try again", headers=[("retry-after", "1")])

    def admit(self, bound: Bound, scopes: Sequence[str] = (), *, wait_s: int = 0,
              has_left: Callable[[], bool] = lambda: False,
              waiting: Callable[[], ContextManager] = contextlib.nullcontext) -> Reservation:
        """Do as ask(), waiting up to `wait_s` seconds in the queue, while the client has not left.

        A wait is done inside the context `waiting`. Raises: BudgetExceeded, InsufficientBudget;
        ServerBusy when the proxy stops; LedgerUnavailable; ClientGone.
        """
        claim = self.ask(bound, scopes, may_wait=wait_s > 0)
        if claim.is_waiting:
            with contextlib.ExitStack() as undo:
                undo.callback(self.leave, claim)         # whatever breaks the wait off
                with waiting():
                    self._await_decision(claim, time.monotonic() + wait_s, has_left)
                undo.pop_all()
        if claim.failure is not None:
            raise claim.failure
        if claim.refused_by is not None:
            if self._is_closed:
                raise ServerBusy("the proxy is stopping")
            raise budget_refusal(claim.refused_by, bound)
        return claim

    def _await_decision(self, claim: Reservation, deadline_s: float,
                        has_left: Callable[[], bool]) -> None:
        while claim.is_waiting:
            now_s = time.monotonic()
            if now_s >= deadline_s:
                self.expire(claim)
            elif has_left():
                raise ClientGone
            elif self.accounts.is_shared and now_s >= self._served_s + WAIT_POLL_S:
                self._serve_queue()
            claim.decided.wait(min(max(deadline_s - now_s, 0) or WAIT_POLL_S, WAIT_POLL_S))

    def reserve(self, max_cost_microdollars: int) -> Reservation:
        """Set an amount aside at once. Raises InsufficientBudget if it does not fit;
        BudgetExceeded where the stop is reached."""
        _check_amount(max_cost_microdollars)
        claim = self.ask(fixed_bound(max_cost_microdollars))
        if claim.refused_by is not None:
            raise budget_exceeded(claim.refused_by) if claim.refused_by.ended_by == "stop_at" \
                else insufficient_budget(claim.refused_by, claim.bound)
        return claim

    def expire(self, claim: Reservation) -> None:
        """End a claim's time in the queue: it takes what is free, or is refused."""
        with self._lock:
            claim.may_wait = False
        self._serve_queue()

    def leave(self, claim: Reservation) -> None:
        """Take a claim whose client is gone from the queue, or release what it was given."""
        with self._lock:
            was_open, claim.is_open = claim.is_open, False
            if claim in self._queue:
                self._queue.remove(claim)
        if was_open:
            self.accounts.settle(claim, 0)
        self._serve_queue()

    def close(self) -> None:
        """Refuse all requests that wait, and let none wait from now on."""
        with self._lock:
            self._is_closed = True
        for claim in [*self._queue]:
            self._end_wait(claim, ServerBusy("the proxy is stopping"))
        self._serve_queue()

    def _serve_queue(self) -> None:
        """Have all in the queue decided about, by this thread or by the one that is at it."""
        if not (self._queue or self._blocked):
            return
        self._must_serve = True
        while self._must_serve and self._serving.acquire(blocking=False):
            try:
                self._must_serve = False
                self._serve_once()
            except IroncageError as err:
                for claim in [*self._queue]:
                    self._end_wait(claim, err)
                with self._lock:
                    self._blocked = frozenset()
            finally:
                self._serving.release()

    def _serve_once(self) -> None:
        """Decide about all in the queue, in order: set aside, refuse, or leave waiting."""
        with self._lock:
            queue, self._served_s = [*self._queue], time.monotonic()
        scopes = [*{scope: None for claim in queue for scope in claim.scopes}]
        budgets = dict(zip(scopes, self.accounts.budgets(scopes) if queue else ()))
        blocked: set[str] = set()             # the scopes that one further ahead waits for
        for claim in queue:
            lacking = self._lacking(claim, [budgets[scope] for scope in claim.scopes], blocked)
            blocked.update(lacking)
            if not lacking:
                self._end_wait(claim)
                for scope in claim.scopes if claim.refused_by is None else ():
                    held = budgets[scope].reserved + claim.microdollars
                    budgets[scope] = budgets[scope]._replace(reserved=held)
        with self._lock:
            self._blocked = frozenset(blocked)

    def _end_wait(self, claim: Reservation, failure: Optional[IroncageError] = None) -> None:
        """Wake the request of a claim that is decided, or cannot be; for one that has left
        meanwhile, give back what it was given."""
        is_given = claim.refused_by is None and failure is None
        with self._lock:
            is_here = claim in self._queue
            if is_here:
                self._queue.remove(claim)
                claim.is_open, claim.failure = is_given, failure
                claim.decided.set()
        if is_given and not is_here:
            self.accounts.settle(claim, 0)

    # Settlement.

    def commit(self, reservation: Reservation, actual_microdollars: int,
               row: Optional[Mapping[str, Any]] = None) -> None:
        """Charge the actual cost and release the reservation. Raises ValueError if settled.

        `row` is the call's, as in the ledger, for accounts that count by model too.
        """
        _check_amount(actual_microdollars)
        with self._lock:
            if not reservation.is_open:
                raise ValueError("this reservation is settled already")
            reservation.is_open = False
            self._bound_exceeded += actual_microdollars > reservation.microdollars
        self.accounts.settle(reservation, actual_microdollars, row)
        self._serve_queue()

    def cancel(self, reservation: Reservation) -> None:
        """Release a reservation and charge nothing. Raises ValueError if settled."""
        self.commit(reservation, 0)

    def add_spend(self, microdollars: int) -> None:
        """Charge the proxy's scope an amount that nothing was reserved for."""
        _check_amount(microdollars)
        self.accounts.settle(self.ask(fixed_bound(0)), microdollars)

    # Limits.

    def set_budget(self, limit_microdollars: Optional[int]) -> None:
        """Set the proxy's limit, at any time; it can block and unblock."""
        self.accounts.set_limits({"limit": limit_microdollars}, must_fit=False)
        self._serve_queue()

    def set_limits(self, **changes: Any) -> None:
        """Set the proxy's `limit` or `stop_at`, or both in one step, as Accounts has it."""
        self.accounts.set_limits(changes)
        self._serve_queue()

    def set_scopes(self, rows: Sequence[Scope]) -> None:
        """Open scopes, or change their limits and periods."""
        self.accounts.set_scopes(rows)
        self._serve_queue()

    # What it holds.

    def budgets(self, scopes: Sequence[str]) -> list[Budget]:
        """Return the amounts of scopes at one instant; as seen last, if none can be asked."""
        try:
            return self.accounts.budgets(scopes)
        except LedgerUnavailable:
            return self.accounts.known(scopes)

    def budget(self, scope: str = PROXY_SCOPE) -> Budget:
        """Return a scope's amounts."""
        return self.budgets([scope])[0]

    def check_budget(self) -> None:
        """Raise BudgetExceeded when spent + reserved has reached the limit, or spent the stop."""
        budget = self.budget()
        if budget.free is not None and budget.free <= 0:
            raise budget_exceeded(budget)

    def available(self, scopes: Sequence[str] = ()) -> Optional[int]:
        """Return what can be reserved in all of the scopes, from 0 up; None without a limit."""
        known = [budget.free for budget in self.accounts.known((PROXY_SCOPE, *scopes))]
        return min([max(0, free) for free in known if free is not None], default=None)

    def standings(self, scopes: Sequence[str] = ()) -> list[tuple[int, int, Optional[int]]]:
        """Return (spent, limit, when that begins anew) of each limit that a request is under."""
        return [(budget.spent, budget.limit, period_end(budget.period, budget.since_s))
                for budget in self.accounts.known((PROXY_SCOPE, *scopes))
                if budget.limit is not None]

    def total_spent(self) -> int:
        return self.budget().spent

    def total_reserved(self) -> int:
        return self.budget().reserved

    def budget_limit(self) -> Optional[int]:
        return self.budget().limit

    def bound_exceeded(self) -> int:
        """Return how many answers cost more than what was reserved for them."""
        with self._lock:
            return self._bound_exceeded

    def get_status(self) -> tuple[int, Optional[int]]:
        """Return (spent, limit) at one instant."""
        return self.get_full_status()[::2]

    def get_full_status(self) -> tuple[int, int, Optional[int]]:
        """Return (spent, reserved, limit) at one instant."""
        budget = self.budget()
        return budget.spent, budget.reserved, budget.limit


def session_scope(token: str, session: Optional[str]) -> str:
    """Name the scope of a session of a token, as no token is named; calls without one share it."""
    return f"{token}/{session or ''}"


def _refusal(kind: type, words: str, budget: Budget, needed: int, affordable: int) -> IroncageError:
    """Make a refusal by a scope, which says whose it is where that is a session's."""
    token, is_session, session = budget.scope.partition("/")
    which = f"the session {session}" if session else "calls that name no session"
    whose = f" This is the budget of {which} under the token {token} (session_budget_usd)."
    return kind(words + whose * bool(is_session), headers=DO_NOT_RETRY, details={
        "scope": budget.scope, "limit": budget.ended_by or "budget",
        "limit_microdollars": budget.limit, "spent_microdollars": budget.spent,
        "reserved_microdollars": budget.reserved, "needed_microdollars": needed,
        "affordable_output_tokens": max(0, affordable)})


def budget_exceeded(budget: Budget, needed: int = 0) -> IroncageError:
    """Make the refusal when nothing is left, in the original's words."""
    name, raised, amount = ("Stop at", "stop", budget.stop_at) if budget.ended_by == "stop_at" \
        else ("Limit", "limit", budget.limit)
    return _refusal(
        BudgetExceeded, f"Iron Cage budget limit exceeded. Spent: {format_usd(budget.spent)}, "
        f"Reserved: {format_usd(budget.reserved)}, {name}: {format_usd(amount)}. "
        f"Raise the {raised} to go on.", budget, needed, 0)


def insufficient_budget(budget: Budget, bound: Bound) -> IroncageError:
    """Make the refusal of a request whose worst case does not fit; the original's words come first.

    It says which part does not fit, and what would. Its cost is the least that would be admitted.
    """
    uses, free = bound.least_uses, budget.limit - budget.spent - budget.reserved
    needed = bound.microdollars(bound.worthwhile_output_tokens, uses)
    affordable = min(bound.affordable_output_tokens(free, uses), bound.most_output_tokens)
    if affordable < max(1, bound.least_output_tokens):
        tools = " and what tools at the provider add to it", ", fewer uses of them (max_uses)"
        why, less = tools if bound.loops or len(bound.levels) > 1 else ("", "")
        why += " and the reasoning that no cap holds" if bound.reasoning_tokens else ""
        advice = f"Its input{why} alone can cost {format_usd(bound.microdollars(0, uses))}: send " \
            f"less input{less}"
    else:
        advice = "Its input fits, its output does not: reduce max_tokens to " \
            f"{affordable} or less"
    waits = ", or wait for in-flight requests to complete" if budget.reserved else ""
    return _refusal(
        InsufficientBudget, "Iron Cage budget insufficient for this request. "
        f"Available: {format_usd(max(0, free))}, Estimated max cost: {format_usd(needed)}. {advice}"
        f", or raise the limit to {format_usd(budget.spent + budget.reserved + needed)} or more"
        f"{waits}.", budget, needed, affordable)


def budget_refusal(budget: Budget, bound: Bound) -> IroncageError:
    """Make the refusal of a request's bound in a scope."""
    if budget.ended_by is None:
        return insufficient_budget(budget, bound)
    return budget_exceeded(budget, bound.microdollars(bound.worthwhile_output_tokens,
                                                      bound.least_uses))


# ==== 17. Ledger ================================================================================
#
# What every call cost, one row each. A row is written before the first byte of its call goes
# upstream (the intent), and completed when the call settles. A row that was never settled, since
# the process died, is charged at its bound on the next start. What was refused is kept beside.
#
# Upkeep, in the order of the ids up to the first call that is in flight, and a step at a time: rows
# are sealed, each with a digest of all that it holds and of the seal before; they are added up by
# day (`daily`), which is all that budgets and most reports read; and with --keep-days the oldest
# are deleted. An edit, a deletion, an insertion or a swap of sealed rows shows in `audit`, for as
# long as nobody computes all later seals anew: there is no key. Ids have no gap, and sealing no
# index: calls write the same pages as without it.
#
# A ledger must not be fooled into forgetting. It is new only where its path does not exist; it is
# made under another name, so that a crash on the way leaves no half of one. One process at a time
# has it, whatever the path that it came by; and a file that is moved, removed, replaced or cut
# under the process takes no further intent. A copy is another ledger, and a lost -wal cannot be
# seen from inside.

# Those of 0.2.3, which programs outside may read: the intent's, and from "settled_ms" on the
# settlement's.
_FIRST_COLUMNS = MappingProxyType({
    "id": "INTEGER PRIMARY KEY", "request_id": "TEXT NOT NULL",
    "admitted_s": "INTEGER NOT NULL",         # Unix seconds; decides the period
    "token": "TEXT NOT NULL", "provider": "TEXT NOT NULL", "model": "TEXT NOT NULL",
    "price_key": "TEXT", "api": "TEXT NOT NULL", "stream": "INTEGER NOT NULL",
    "bound_microdollars": "INTEGER NOT NULL",
    "settled_ms": "INTEGER",                  # Unix milliseconds; null: in flight, or lost
    "cost_microdollars": "INTEGER",
    "estimated": "TEXT",                      # why the cost is not exact; null: it is
    "status": "INTEGER",                      # of the provider's answer; null: there was none
    "input_tokens": "INTEGER", "cached_input_tokens": "INTEGER", "output_tokens": "INTEGER",
    "usage": "TEXT",                          # the provider's own usage object, as JSON
    "lines": "TEXT",                          # the bill, [[what, how many, picodollars each], ...]
    "provider_request_id": "TEXT", "latency_ms": "INTEGER", "first_byte_ms": "INTEGER",
})
# The client's words about itself, which nothing vouches for; then the settlement's, and upkeep's.
_LATER_COLUMNS = MappingProxyType({
    "session": "TEXT", "agent": "TEXT", "parent_agent": "TEXT", "project": "TEXT",
    "price_row": "TEXT",                      # the digest of the price that the bill was made by
    "seal": "BLOB",
})
LEDGER_COLUMNS = MappingProxyType({**_FIRST_COLUMNS, **_LATER_COLUMNS})
_NO_ROW = dict.fromkeys(LEDGER_COLUMNS)
_SETTLED_COLUMNS = (*tuple(_FIRST_COLUMNS)[[*_FIRST_COLUMNS].index("settled_ms"):],
                    "price_row")
TOKEN_COUNTS = ("input_tokens", "cached_input_tokens", "output_tokens")
_SUMS = ("requests", *TOKEN_COUNTS, "cost_microdollars", "estimated_requests")
_COUNTED = (                                  # what each row counts for
    "SELECT admitted_s AS at_s, token, provider, COALESCE(price_key, 'other') AS model, "
    "COALESCE(session, '') AS session, COALESCE(project, '') AS project, 1 AS requests, "
    + ", ".join(f"COALESCE({name}, 0) AS {name}" for name in TOKEN_COUNTS)
    + ", COALESCE(cost_microdollars, bound_microdollars) AS cost_microdollars, estimated IS NOT "
    "NULL AS estimated_requests, settled_ms IS NULL AS unsettled_requests FROM calls WHERE {}")
_ADD_UP = (
    f"INSERT INTO daily SELECT at_s / {DAY_S}, token, provider, model, session, project, "
    + ", ".join(f"SUM({name})" for name in _SUMS) + f" FROM ({_COUNTED}) GROUP BY 1, 2, 3, 4, 5, 6")
# Each brings a ledger one version on (PRAGMA user_version). What stands here never changes.
MIGRATIONS = (
    "CREATE TABLE calls (" + ", ".join(map(" ".join, _FIRST_COLUMNS.items())) + ")",
    "CREATE TABLE leases (lease_id TEXT PRIMARY KEY, granted INTEGER NOT NULL, "
    "spent_before INTEGER NOT NULL)",
    "CREATE TABLE counts (scope TEXT NOT NULL, digest BLOB NOT NULL, tokens INTEGER NOT NULL, "
    "parts BLOB NOT NULL, has_tools INTEGER NOT NULL, model TEXT NOT NULL, "
    "learned_s INTEGER NOT NULL, PRIMARY KEY (scope, digest))",
    # Calls under a shared budget: what its engine knows them by, and whether it knows their end.
    "CREATE TABLE shared_calls (id INTEGER PRIMARY KEY, shared TEXT NOT NULL, "
    "is_confirmed INTEGER NOT NULL)",
    *(f"ALTER TABLE calls ADD COLUMN {name} {kind}" for name, kind in _LATER_COLUMNS.items()),
    "CREATE INDEX calls_by_token ON calls (token, admitted_s) WHERE seal IS NOT NULL",
    "CREATE TABLE daily (day INTEGER NOT NULL, token TEXT NOT NULL, provider TEXT NOT NULL, "
    "model TEXT NOT NULL, session TEXT NOT NULL, project TEXT NOT NULL, "
    + ", ".join(f"{name} INTEGER NOT NULL" for name in _SUMS)
    + ", PRIMARY KEY (token, session, day, model, provider, project)) WITHOUT ROWID",
    _ADD_UP.format("id > 0"),
    # Rows of earlier versions: how many, the last id. What is sealed, and the last seal; what was
    # deleted of it; what `daily` holds. Whether a proxy closed it, and rows put in while it was so.
    "CREATE TABLE chain (base INTEGER, base_id INTEGER, sealed INTEGER, sealed_id INTEGER, "
    "seal BLOB, folded INTEGER, folded_id INTEGER, folded_seal BLOB, folded_day INTEGER, "
    "tallied INTEGER, tallied_id INTEGER, tallied_microdollars INTEGER, closed INTEGER, "
    "foreign_rows INTEGER)",
    "INSERT INTO chain SELECT n, id, 0, 0, x'', 0, 0, x'', -1, n, id, cost, 0, 0 FROM (SELECT "
    "COUNT(*) AS n, COALESCE(MAX(id), 0) AS id, COALESCE(SUM(cost_microdollars), 0) AS cost "
    "FROM calls)",
    "CREATE TABLE refusals (id INTEGER PRIMARY KEY, refused_ms INTEGER NOT NULL, request_id TEXT, "
    "token TEXT NOT NULL, model TEXT, path TEXT, status INTEGER NOT NULL, reason TEXT NOT NULL, "
    "message TEXT NOT NULL, scope TEXT, limit_microdollars INTEGER, spent_microdollars INTEGER, "
    "reserved_microdollars INTEGER, needed_microdollars INTEGER, session TEXT, agent TEXT, "
    "parent_agent TEXT, project TEXT)",
    "CREATE TABLE prices (digest TEXT PRIMARY KEY, cells TEXT NOT NULL)",
)
REFUSAL_COLUMNS = (
    "refused_ms", "request_id", "token", "model", "path", "status", "reason", "message", "scope",
    "limit_microdollars", "spent_microdollars", "reserved_microdollars", "needed_microdollars",
    "session", "agent", "parent_agent", "project")
REFUSALS_KEPT = 100_000                       # in a ledger
REFUSALS_WAITING = 1_000                      # in memory: all there are without a ledger
STEP_ROWS = 200                               # in one transaction of upkeep: a few milliseconds
STEP_PAUSE_S = 0.05                           # between two of them
STEPS_AT_CLOSE = 500                          # a history of an earlier version is sealed later
MOST_SECONDS = 10 ** 12                       # later than any call
LEDGER_BUSY_S = 2                             # how long to wait for another program's write
LEDGER_WAIT_S = 30                            # and for a proxy to let go: as long as one drains
# An flock of the database file: elsewhere it can clash with SQLite's own locks, or is not there.
LOCKS_DATABASE = sys.platform == "linux"
UNFINISHED = ".unfinished"                    # the end of a ledger's name while it is made
MEMORY_ROWS = 10_000
_INSERT = (f"INSERT INTO calls ({', '.join(LEDGER_COLUMNS)}) "
           f"VALUES ({', '.join(f':{name}' for name in LEDGER_COLUMNS)})")
_SETTLE = (f"UPDATE calls SET {', '.join(f'{name} = :{name}' for name in _SETTLED_COLUMNS)} "
           "WHERE id = :id AND settled_ms IS NULL")
_INSERT_SHARED = "INSERT INTO shared_calls VALUES (last_insert_rowid(), ?, 0)"
_UNCONFIRMED = ("SELECT * FROM shared_calls JOIN calls USING (id) WHERE NOT is_confirmed "
                "AND settled_ms IS NOT NULL ORDER BY id")
_RECOVER = ("UPDATE calls SET settled_ms = ?, cost_microdollars = bound_microdollars, estimated = "
            "'the proxy ended', lines = '[[\"reserved\",' || bound_microdollars || ',1000000]]' "
            "WHERE id > ? AND settled_ms IS NULL")
_REFUSE = (f"INSERT INTO refusals ({', '.join(REFUSAL_COLUMNS)}) "
           f"VALUES ({', '.join(f':{name}' for name in REFUSAL_COLUMNS)})")
_ADD_UP_MORE = _ADD_UP.format("id > ? AND id <= ?") + " ON CONFLICT DO UPDATE SET " + ", ".join(
    f"{name} = {name} + excluded.{name}" for name in _SUMS)
_SPENT = (                                    # what is added up, and what is not yet
    "SELECT SUM(cost) FROM (SELECT cost_microdollars AS cost FROM daily WHERE day >= :day{0} "
    "UNION ALL SELECT COALESCE(cost_microdollars, bound_microdollars) FROM calls "
    "WHERE id > (SELECT tallied_id FROM chain) AND admitted_s >= :since_s{0})")


class Lease(NamedTuple):
    """Budget that an Iron Cage server lent, in microdollars, and what was spent before it."""
    lease_id: str
    granted: int
    spent_before: int


def parse_ledger_path(text: str) -> str:
    """Read what --ledger names. Raises ValueError for what SQLite has its own meaning of."""
    if text == ":memory:" or text.startswith("file:"):
        raise ValueError("must be the path of a file; leave it out to keep the ledger in memory")
    return text


def lines_to_json(lines: Iterable[BillLine]) -> str:
    """Write a bill as a ledger stores it; rates that are not whole as "n/d"."""
    return compact_json([[what, count, rate if isinstance(rate, int) else str(rate)]
                         for what, count, rate in lines])


def lines_from_json(text: str) -> list[BillLine]:
    """Read a stored bill. Raises ValueError, TypeError."""
    return [(what, count, rate if isinstance(rate, int) else Fraction(rate))
            for what, count, rate in json.loads(text)]


def stored_row(row: Mapping[str, Any]) -> dict:
    """Return a settled row as the columns take it: its usage and its bill as JSON."""
    return {**row, "lines": lines_to_json(row["lines"]),
            "usage": None if row["usage"] is None else json.dumps(row["usage"])}


def row_json(row: Mapping[str, Any]) -> str:
    """Return a stored row as a JSON object; its usage and its bill are JSON already."""
    plain = {name: value.hex() if isinstance(value, bytes) else value
             for name, value in row.items() if name not in ("usage", "lines")}
    usage, lines = row["usage"] or "null", row["lines"] or "null"
    return f'{json.dumps(plain)[:-1]}, "usage": {usage}, "lines": {lines}}}'


def seal_of(row: Any, before: bytes) -> bytes:
    """Return the digest of a settled row and of the seal before it.

    Absent values are left out, so that a further column changes no seal that was made.
    """
    held = {name: str(row[name]) for name in LEDGER_COLUMNS
            if name != "seal" and row[name] is not None}
    return hashlib.sha256(before + json_bytes(held)).digest()


class MemoryLedger:
    """Does as SqliteLedger, until the process ends: the last rows, and what each token spent on
    each day, calls in flight in full."""

    def __init__(self) -> None:
        self._lock = threading.Lock()         # guards the fields below
        self._rows: deque = deque(maxlen=MEMORY_ROWS)
        self._refusals: deque = deque(maxlen=REFUSALS_WAITING)
        self._spent: Counter = Counter()      # (token, day since 1970) -> microdollars
        self._leases: list[Lease] = []

    def intent(self, row: dict, shared: Optional[str] = None) -> None:
        with self._lock:
            self._spent[row["token"], row["admitted_s"] // DAY_S] += row["bound_microdollars"]

    def settle(self, row: dict) -> None:
        saved = row["bound_microdollars"] - row["cost_microdollars"]
        with self._lock:
            self._spent[row["token"], row["admitted_s"] // DAY_S] -= saved
            self._rows.append(row)

    def spent(self, token: Optional[str], since_s: int) -> int:
        with self._lock:
            return sum(amount for (name, day), amount in self._spent.items()
                       if token in (None, name) and day * DAY_S >= since_s)

    def spent_in_session(self, token: str, session: Optional[str]) -> int:
        with self._lock:
            return sum(row["cost_microdollars"] for row in self._rows
                       if (row["token"], row["session"]) == (token, session))

    def recent(self, most: int, token: Optional[str] = None) -> list[dict]:
        with self._lock:
            rows = [row for row in self._rows if token in (None, row["token"])]
        return [*map(stored_row, rows[:-most - 1:-1])]

    def refuse(self, row: Mapping[str, Any]) -> None:
        with self._lock:
            self._refusals.append(row)

    def refusals(self, most: int, token: Optional[str] = None) -> list[dict]:
        with self._lock:
            rows = [row for row in self._refusals if token in (None, row["token"])]
        return rows[:-most - 1:-1]

    def leases(self) -> list[Lease]:
        with self._lock:
            return [*self._leases]

    def keep_lease(self, lease: Lease) -> None:
        with self._lock:
            self._leases.append(lease)

    def forget_lease(self, lease: Lease) -> None:
        with self._lock:
            self._leases.remove(lease)

    def counts(self) -> list:
        """Return nothing of earlier processes: it is gone with them."""
        return []

    unconfirmed = counts

    def _nothing(self, *_: Any) -> None:
        """Do nothing: there is no later, and nothing is in the way of a write."""

    keep_price = keep_count = confirm = tend = look = is_failing = try_to_write = close = _nothing


class _Write:
    """Statements that wait to be committed together."""

    def __init__(self, *statements: tuple[str, Any], is_intent: bool = False) -> None:
        self.statements = statements
        self.is_intent = is_intent            # it is given up where it cannot be written at once
        self.is_written = False
        self.error: Optional[Exception] = None


class LedgerLock:
    """Keeps a second server off a ledger, by an OS lock that ends with the process.

    A file beside the ledger is locked, which any version of this program respects; on Linux the
    database too, so that a link, another mount or a removed file beside it leads nobody past.
    No descriptor of a database is closed before exit: closing any drops the locks that SQLite
    holds on the file in this process, and then its log could be deleted by whoever reads it.
    """
    _kept: dict[tuple[int, int], int] = {}              # a database's identity -> its descriptor
    _taken: dict[tuple[int, int], LedgerLock] = {}      # those that this process has locked

    def __init__(self, path: str) -> None:
        self._path = path
        self._beside: Optional[int] = None              # the descriptor of the file beside it
        self.identity: Optional[tuple[int, int]] = None       # of the database, where it is locked

    def wait(self, most_s: int) -> None:
        """Take the lock, and make the ledger if there is none. Raises OSError, sqlite3.Error."""
        deadline_s, is_logged = time.monotonic() + most_s, False
        while not self._take():
            if time.monotonic() >= deadline_s:
                raise OSError("another ironcage_proxy has it open; stop that one, or give this "
                              "one a ledger of its own")
            if not is_logged:
                log.warning("waiting for the ledger: another ironcage_proxy has it open",
                            extra={"fields": {"ledger": self._path, "seconds": most_s}})
            is_logged = True
            time.sleep(WAIT_POLL_S)

    def release(self) -> None:
        """Let others have it. SQLite must have closed the database."""
        if self.identity is not None:
            import fcntl
            fcntl.flock(self._kept[self.identity], fcntl.LOCK_UN)
            del self._taken[self.identity]
        if self._beside is not None:
            os.close(self._beside)
        self.identity = self._beside = None

    def _take(self) -> bool:
        """Lock the file beside, then the ledger itself, or what becomes it; False where another
        has one, or moved the ledger meanwhile."""
        with contextlib.ExitStack() as undo:
            undo.callback(self.release)
            self._beside = _locked_file(self._path + ".lock")
            if self._beside is None:
                return False
            is_new = not os.path.exists(self._path)
            if is_new and os.path.exists(self._path + "-wal"):
                raise OSError(f"its log {self._path}-wal is there, but not the ledger; put that "
                              "back, or remove the log too to begin at 0")
            path, flags = (self._path + UNFINISHED, os.O_CREAT) if is_new else (self._path, 0)
            if LOCKS_DATABASE and not (self._lock_database(path, flags)
                                       and is_new != os.path.exists(self._path)):
                return False
            if is_new:
                _make_ledger(self._path)
            undo.pop_all()
        return True

    def _lock_database(self, path: str, flags: int) -> bool:
        import fcntl                          # here only: Windows has none
        handle = self._kept.get(_identity_at(path))
        if handle is None:
            handle = os.open(path, os.O_RDWR | flags, 0o600)
        identity = _identity_of(os.fstat(handle))
        handle = self._kept.setdefault(identity, handle)
        if self._taken.setdefault(identity, self) is not self:      # an flock is the process's
            return False
        self.identity = identity
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def _identity_of(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def _state_at(path: str) -> Optional[os.stat_result]:
    try:
        return os.stat(path)
    except OSError:
        return None


def _identity_at(path: str) -> Optional[tuple[int, int]]:
    """Return which file a path leads to; None where it leads to none."""
    found = _state_at(path)
    return found and _identity_of(found)


def _locked_file(path: str) -> Optional[int]:
    """Return a descriptor whose file is locked until it is closed; None where another has it."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        if os.name == "nt":
            import msvcrt
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        else:
            import fcntl
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as err:
        os.close(handle)
        if isinstance(err, (BlockingIOError, PermissionError)):
            return None
        raise
    return handle


def _make_ledger(path: str) -> None:
    """Make an empty ledger under another name, and give it its own once it is whole."""
    import sqlite3
    new = path + UNFINISHED
    if not os.path.exists(new):
        os.close(os.open(new, os.O_RDWR | os.O_CREAT, 0o600))
    os.truncate(new, 0)                       # SQLite ignores the journal of an empty database
    with contextlib.closing(sqlite3.connect(new, isolation_level=None)) as db:
        _migrate(db)
    os.rename(new, path)


def _migrate(db: sqlite3.Connection) -> None:
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if version > len(MIGRATIONS):
        raise OSError("it was written by a newer version of this program")
    db.execute("BEGIN IMMEDIATE")             # all or none: no reader sees half of a history
    for script in MIGRATIONS[version:]:
        db.execute(script)
    db.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
    db.execute("COMMIT")


BEGIN_ANEW = "put the right one back, or name a path that does not exist to begin at 0"
_NEEDED_COLUMNS = frozenset(("admitted_s", "token", "bound_microdollars", "settled_ms",
                             "cost_microdollars"))


def _check_ledger_file(path: str) -> os.stat_result:
    """Look at a file. Raises OSError for one that cannot be a ledger."""
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise OSError("it is not a regular file")
    if not found.st_size:
        raise OSError(f"it is empty, which no ledger ever is; {BEGIN_ANEW}")
    return found


def _check_only_name(path: str, found: os.stat_result) -> None:
    """Raise OSError for a hard link whose newest charges may be in the log beside another name."""
    if found.st_nlink == 1:
        return
    with os.scandir(os.path.dirname(path)) as entries:
        names = [entry.path for entry in entries if entry.inode() == found.st_ino]
    is_unseen = len(names) < found.st_nlink and not os.path.exists(path + "-wal")
    if is_unseen or any(os.path.exists(name + "-wal") for name in names if name != path):
        raise OSError("it has other names (hard links), and the newest charges may be in the log "
                      "beside one of them; start with that name, or remove the others")


def _check_is_ledger(db: sqlite3.Connection) -> None:
    """Raise OSError for a database of something else, before anything is written to it."""
    import sqlite3
    try:
        columns = {row[1] for row in db.execute("PRAGMA table_info(calls)")}
    except sqlite3.OperationalError:          # locked, or not readable
        raise
    except sqlite3.DatabaseError as err:
        raise OSError(f"it is not a ledger, or a broken one ({err}); {BEGIN_ANEW}") from err
    if not _NEEDED_COLUMNS <= columns:
        raise OSError(f"it is not a ledger of ironcage_proxy; {BEGIN_ANEW}")


def count_cells(row: CountRow) -> tuple:
    """Return a count as it is kept, in the order of the columns of `counts`."""
    return (row.scope, row.digest, row.counted.tokens, b"".join(sorted(row.counted.parts)),
            int(row.counted.has_tools), row.model, row.learned_s)


def count_from_cells(scope: str, digest: bytes, tokens: int, parts: bytes, has_tools: int,
                     model: str, learned_s: int) -> CountRow:
    """Make a count of what was kept of it."""
    digests = frozenset(parts[at:at + DIGEST_BYTES] for at in range(0, len(parts), DIGEST_BYTES))
    return CountRow(scope, digest, Counted(tokens, digests, bool(has_tools)), model, learned_s)


# Upkeep. Each step is inside one transaction, knows the row of `chain`, and returns whether it did
# something.

def _keep_refused(rows: Sequence[Mapping[str, Any]], db: sqlite3.Connection,
                  state: Mapping[str, Any]) -> bool:
    """Write calls that were refused, and forget the oldest."""
    for row in rows:
        with contextlib.suppress(ValueError, OverflowError):   # one that SQLite cannot hold
            db.execute(_REFUSE, row)
    if rows:
        db.execute("DELETE FROM refusals WHERE id <= (SELECT MAX(id) FROM refusals) - ?",
                   (REFUSALS_KEPT,))
    return bool(rows)


def _settled_after(db: sqlite3.Connection, last_id: Any) -> list[sqlite3.Row]:
    """Return the next rows in the order of their ids, up to the first that is in flight."""
    rows = db.execute("SELECT * FROM calls WHERE id > ? ORDER BY id LIMIT ?", (last_id, STEP_ROWS))
    return [*itertools.takewhile(lambda row: row["settled_ms"] is not None, rows)]


def _seal_rows(db: sqlite3.Connection, state: Mapping[str, Any]) -> bool:
    """Give the next rows their seals."""
    rows, seal = _settled_after(db, state["sealed_id"]), state["seal"]
    for row in rows:
        seal = seal_of(row, seal)
        db.execute("UPDATE calls SET seal = ? WHERE id = ?", (seal, row["id"]))
    if rows:
        db.execute("UPDATE chain SET sealed = sealed + ?, sealed_id = ?, seal = ?",
                   (len(rows), rows[-1]["id"], seal))
    return bool(rows)


def _add_up_rows(least: int, db: sqlite3.Connection, state: Mapping[str, Any]) -> bool:
    """Add the next rows to the totals of their days, once there are so many."""
    rows = _settled_after(db, state["tallied_id"])
    if len(rows) < least:
        return False
    ids = (state["tallied_id"], rows[-1]["id"])
    db.execute(_ADD_UP_MORE, ids)
    db.execute("UPDATE chain SET tallied = tallied + ?, tallied_id = ?, tallied_microdollars = "
               "tallied_microdollars + (SELECT SUM(cost_microdollars) FROM calls "
               "WHERE id > ? AND id <= ?)", (len(rows), ids[1], *ids))
    return True


def _fold_rows(keep_days: int, db: sqlite3.Connection, state: Mapping[str, Any]) -> bool:
    """Delete the next rows, as long as they are old: the totals have them."""
    end_day = int(time.time()) // DAY_S - keep_days
    rows = db.execute(
        f"SELECT id, seal, admitted_s / {DAY_S} AS day, id IN (SELECT id FROM shared_calls "
        "WHERE NOT is_confirmed) AS is_owed FROM calls WHERE id > ? AND id <= ? "
        "ORDER BY id LIMIT ?",
        (state["folded_id"], min(state["tallied_id"], state["sealed_id"]), STEP_ROWS))
    old = [*itertools.takewhile(lambda row: row["day"] < end_day and not row["is_owed"], rows)]
    if old:
        db.execute("DELETE FROM calls WHERE id <= ?", (old[-1]["id"],))
        db.execute("UPDATE chain SET folded = folded + ?, folded_id = ?, folded_seal = ?, "
                   "folded_day = MAX(folded_day, ?)", (
                       len(old), old[-1]["id"], old[-1]["seal"], max([row["day"] for row in old])))
    return bool(old)


class SqliteLedger:
    """A ledger in an SQLite file, in WAL mode: what is committed survives the process, and with
    `fsync` a loss of power too. One process at a time has it open for writing; another waits for
    `wait_s` seconds.

    Opening it charges what an earlier process left unsettled. A write that can take long (for
    `fsync`, or while another program writes) is done inside the context `aside`. Whoever reads has
    a connection of its own, and holds up no write. tend() is upkeep, in short transactions: rows
    that were admitted more than `keep_days` days ago are folded into totals. Raises Misconfigured.
    """

    def __init__(self, path: str, *, fsync: bool = False, wait_s: int = 0,
                 keep_days: Optional[int] = None,
                 aside: Callable[[], ContextManager] = contextlib.nullcontext) -> None:
        import sqlite3                        # here only: most runs do not need it
        self._errors, self._unwritable = sqlite3.Error, (sqlite3.Error, ValueError, OverflowError)
        self._is_quick, self._aside = not fsync, aside
        self._turn = threading.Lock()         # one transaction at a time
        self._queue: list[_Write] = []        # appended by all, emptied under _turn
        self._refusals: deque = deque(maxlen=REFUSALS_WAITING)      # likewise
        self._kept_prices: set[str] = set()   # by their digests
        self._reading = threading.Lock()      # one query at a time on a connection of its own
        self._upkeep: list[Callable] = [_seal_rows, functools.partial(_add_up_rows, STEP_ROWS)] \
            if keep_days is None else [_seal_rows, functools.partial(_add_up_rows, 1),
                                       functools.partial(_fold_rows, keep_days)]
        self._path = path = os.path.realpath(path)
        self._lock = LedgerLock(path)
        with contextlib.ExitStack() as undo:
            try:
                self._lock.wait(wait_s)
                undo.callback(self._lock.release)
                _check_only_name(path, _check_ledger_file(path))
                self._db = sqlite3.connect(path, timeout=LEDGER_BUSY_S, isolation_level=None,
                                           check_same_thread=False)
                undo.callback(self._db.close)
                self._open_database(fsync)
                self._reader = undo.enter_context(contextlib.closing(_reading_connection(path)))
            except (OSError, sqlite3.Error) as err:
                raise Misconfigured(f"the ledger {path} cannot be used: {_reason(err)}") from err
            undo.pop_all()

    def _open_database(self, fsync: bool) -> None:
        import sqlite3
        self._db.row_factory = sqlite3.Row
        _check_is_ledger(self._db)
        if self._db.execute("PRAGMA journal_mode = WAL").fetchone()[0] != "wal":
            raise OSError("its file system cannot hold SQLite's write-ahead log")
        self._db.execute(f"PRAGMA synchronous = {'FULL' if fsync else 'NORMAL'}")
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        self.recovered = self._recover(0) if version < len(MIGRATIONS) else 0
        _migrate(self._db)                    # which adds up all that there is
        for (name,) in self._db.execute("SELECT name FROM sqlite_master WHERE type = 'table'"):
            self._db.execute(f"SELECT * FROM {name}").fetchone()       # a broken one is found now
        state = self._db.execute("SELECT * FROM chain").fetchone()
        if state is None:
            raise OSError("its table chain is empty: somebody edited it; restore a copy")
        last_id = self._db.execute("SELECT COALESCE(MAX(id), 0) FROM calls").fetchone()[0]
        foreign = max(0, last_id - state["sealed_id"]) if state["closed"] else 0
        self._db.execute("UPDATE chain SET closed = 0, foreign_rows = foreign_rows + ?", (foreign,))
        if foreign:
            log.error("rows were put into the ledger while no proxy had it", extra={
                "fields": {"ledger": self._path, "rows": foreign}})
        self._newest = max(last_id, state["sealed_id"])      # the id of a deleted row comes no more
        self.recovered += self._recover(state["tallied_id"])
        self._waits_s = LEDGER_BUSY_S         # for other programs, as of now
        beside = () if LOCKS_DATABASE else (self._path + ".lock",)
        self._watched = {name: _identity_at(name) for name in (
            self._path, self._path + "-wal", self._path + "-shm", *beside)}
        self._watched[self._path] = self._lock.identity or self._watched[self._path]
        self._least_bytes, self._was_cut, self._fault = 1, False, ""
        self._has_failed = False                # to write, the last time
        if self.look() is not None:
            raise OSError(self._fault)

    def _recover(self, after_id: int) -> int:
        """Charge what an earlier process left unsettled at its bounds; return how many calls."""
        return self._db.execute(_RECOVER, (time.time_ns() // 10 ** 6, after_id)).rowcount

    def counts(self) -> list[CountRow]:
        """Return what providers have counted within COUNTS_KEPT_S, the oldest first."""
        since_s = int(time.time()) - COUNTS_KEPT_S
        with self._turn:
            self._db.execute("DELETE FROM counts WHERE learned_s < ?", (since_s,))
            rows = self._db.execute("SELECT * FROM counts ORDER BY learned_s").fetchall()
        return [count_from_cells(*row) for row in rows]

    def keep_count(self, row: CountRow) -> None:
        """Write a count with the next commit: to lose one costs nothing but a guess."""
        self._queue.append(_Write(("INSERT OR REPLACE INTO counts VALUES (?, ?, ?, ?, ?, ?, ?)",
                                   count_cells(row))))

    def look(self) -> Optional[OSError]:
        """Say why the files are not as we left them, and log what is new; None: they are."""
        least_bytes = self._least_bytes       # read before the size, as a ledger only grows
        states = {name: _state_at(name) for name in self._watched}
        moved = next((name for name, found in states.items()
                      if found is None or _identity_of(found) != self._watched[name]), None)
        size, fault = getattr(states[self._path], "st_size", 0), ""
        self._was_cut |= moved is None and size < least_bytes      # it may grow back with holes
        if moved is not None:
            fault = f"{os.path.basename(moved)} was moved, removed or replaced under the " \
                "running proxy; put it back"
        elif self._was_cut:
            fault = f"{os.path.basename(self._path)} was cut short under the running proxy; stop " \
                "it and restore the file"
        else:
            self._least_bytes = size
        if fault != self._fault:
            self._fault = fault
            log.error("the ledger takes no new calls" if fault else "the ledger is back", extra={
                "fields": {"ledger": self._path, "reason": fault or "it is as it was"}})
        return OSError(fault) if fault else None

    def intent(self, row: dict, shared: Optional[str] = None) -> None:
        """Put a call on disk before it is sent, with what the engine of a shared budget knows it
        by. Raises LedgerUnavailable: it must not be sent."""
        known = () if shared is None else ((_INSERT_SHARED, (shared,)),)
        self._write_first(_Write((_INSERT, row), *known, is_intent=True),
                          "nothing is sent to providers")

    def unconfirmed(self) -> list[dict]:
        """Return settled calls whose end the engine of a shared budget may not know."""
        with self._turn:
            return [*map(dict, self._db.execute(_UNCONFIRMED))]

    def confirm(self, row_id: int) -> None:
        """Note with the next commit that it knows. Were that lost, it would be settled again."""
        self._queue.append(_Write(("UPDATE shared_calls SET is_confirmed = 1 WHERE id = ?",
                                   (row_id,))))

    def settle(self, row: dict) -> None:
        """Complete a call's row. Where that fails it is kept, and goes with the next write."""
        error = self._write(_Write((_SETTLE, stored_row(row))))
        if error is not None:
            log.error("a settlement is not in the ledger yet", extra={"fields": {
                "request_id": row["request_id"], "reason": _reason(error)}})

    def _write_first(self, write: _Write, otherwise: str) -> None:
        error = self._write(write)
        if error is not None:
            raise LedgerUnavailable("the proxy's ledger cannot be written, so that "
                                    f"{otherwise}: {_reason(error)}")

    def _write(self, write: _Write) -> Optional[Exception]:
        """Commit statements, together with all that others queued meanwhile; or say why not."""
        fault = self.look() if write.is_intent else None
        if fault is not None:
            return fault
        self._queue.append(write)
        if self._is_quick and self._turn.acquire(blocking=False):
            try:                    # it takes 50 us; to go aside for it would take as long again
                self._commit()
            finally:
                self._turn.release()
        if not write.is_written:
            with self._aside(), self._turn:
                if not write.is_written and write.error is None:
                    self._commit(is_patient=True)
        return write.error

    @contextlib.contextmanager
    def _transaction(self, wait_s: int = 0) -> Iterator[None]:
        """Write all that is executed inside, or nothing of it; wait so long for other programs."""
        try:
            if wait_s != self._waits_s:
                self._db.execute(f"PRAGMA busy_timeout = {wait_s * 1000}")
                self._waits_s = wait_s
            self._db.execute("BEGIN IMMEDIATE")
            yield
            self._db.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(self._errors):
                self._db.execute("ROLLBACK")
            raise

    def _commit(self, *, is_patient: bool = False) -> None:
        """Write all that is queued. One that is patient waits for other programs; where it fails,
        intents leave the queue, and settlements stay in it.

        Ids are given here, and count once it is committed: so there is no gap.
        """
        batch, newest = self._queue[:], self._newest
        try:
            with self._transaction(LEDGER_BUSY_S if is_patient else 0):
                for statement, row in [pair for write in batch for pair in write.statements]:
                    if statement is _INSERT:
                        newest += 1
                        row["id"] = newest
                    self._db.execute(statement, row)
        except self._unwritable as err:
            if is_patient:
                self._has_failed = True
                for write in batch:
                    write.error = err
                self._queue[:len(batch)] = [write for write in batch if not write.is_intent]
            return
        self._newest, self._has_failed = newest, False
        for write in batch:
            write.error, write.is_written = None, True
        del self._queue[:len(batch)]

    def is_failing(self) -> bool:
        """Whether the last write failed, or the files are not as we left them."""
        return self._has_failed or bool(self._fault)

    def try_to_write(self) -> Optional[Exception]:
        """Say why nothing can be written now; None: it can be, and what waited is."""
        return self._write(_Write(("UPDATE chain SET closed = 0", ()), is_intent=True))

    def _sum(self, which: str, since_s: int, failure: type, **values: Optional[str]) -> int:
        """Return what some rows cost. On the connection that writes: a slow reader is not in the
        way of a call that asks."""
        known = {**values, "since_s": since_s, "day": since_s // DAY_S}
        try:
            with self._aside(), self._turn:
                return self._db.execute(_SPENT.format(which), known).fetchone()[0] or 0
        except self._errors as err:
            raise failure("the proxy's ledger cannot be read for what was spent: "
                          + _reason(err)) from err

    def spent(self, token: Optional[str], since_s: int) -> int:
        """Return what one token, or None for all, spent since a day began; calls in flight at their
        bound. Raises Misconfigured."""
        which = "" if token is None else " AND token = :token"
        return self._sum(which, since_s, Misconfigured, token=token)

    def spent_in_session(self, token: str, session: Optional[str]) -> int:
        """Return what one session of a token, or all of its calls without one, spent. Raises
        LedgerUnavailable."""
        return self._sum(" AND token = :token AND COALESCE(session, '') = :session", 0,
                         LedgerUnavailable, token=token, session=session or "")

    def recent(self, most: int, token: Optional[str] = None) -> list[dict]:
        """Return the newest settled rows, of one token or of all."""
        settled = "SELECT * FROM calls WHERE settled_ms IS NOT NULL"
        queries = (f"{settled} ORDER BY id DESC",) if token is None else (
            f"{settled} AND id > (SELECT sealed_id FROM chain) AND token = :token ORDER BY id DESC",
            "SELECT * FROM calls WHERE seal IS NOT NULL AND token = :token "
            "ORDER BY admitted_s DESC, id DESC")          # by the index
        with self._reading:
            rows = itertools.chain.from_iterable(self._reader.execute(
                f"{query} LIMIT :most", {"token": token, "most": most}) for query in queries)
            return [*map(dict, itertools.islice(rows, most))]

    def refuse(self, row: Mapping[str, Any]) -> None:
        """Keep a call that was refused here: in memory, until tend() writes it.

        A ledger that cannot be written keeps the last REFUSALS_WAITING; the log has them all.
        """
        self._refusals.append(row)

    def refusals(self, most: int, token: Optional[str] = None) -> list[dict]:
        """Return the newest calls that were refused here, of one token or of all."""
        waiting = [row for row in [*self._refusals] if token in (None, row["token"])]
        with self._reading:
            kept = [*map(dict, self._reader.execute(
                f"SELECT {', '.join(REFUSAL_COLUMNS)} FROM refusals WHERE ? IN ('', token) "
                "ORDER BY id DESC LIMIT ?", (token or "", most)))]
        written = {row["request_id"] for row in kept}
        return [*(row for row in waiting[::-1] if row["request_id"] not in written), *kept][:most]

    def keep_price(self, digest: str, price: Price) -> None:
        """Write what a price says with the next commit, once for each price."""
        if digest not in self._kept_prices:
            self._kept_prices.add(digest)
            self._queue.append(_Write(("INSERT OR IGNORE INTO prices VALUES (?, ?)",
                                       (digest, price.cells()))))

    # Upkeep.

    def tend(self) -> bool:
        """Do a step of upkeep in short transactions, and return whether there may be more to do.

        What cannot be written now is left to the next time.
        """
        refused = [*self._refusals][:STEP_ROWS]
        is_kept = self._step(functools.partial(_keep_refused, refused))
        for row in refused if is_kept else ():
            if self._refusals and self._refusals[0] is row:   # else it has fallen out meanwhile
                self._refusals.popleft()
        return any([is_kept, *map(self._step, self._upkeep)])

    def _step(self, work: Callable[[sqlite3.Connection, Mapping[str, Any]], bool]) -> bool:
        """Do work in one transaction, and return whether there was some; no if it fails."""
        try:
            with self._turn, self._transaction():
                return work(self._db, self._db.execute("SELECT * FROM chain").fetchone())
        except self._unwritable:
            return False

    def leases(self) -> list[Lease]:
        """Return those that were not given back, of earlier processes too."""
        with self._turn:
            return [Lease(*row) for row in self._db.execute("SELECT * FROM leases")]

    def keep_lease(self, lease: Lease) -> None:
        """Remember on disk that it must be given back. Raises LedgerUnavailable."""
        self._write_first(_Write(("INSERT OR REPLACE INTO leases VALUES (?, ?, ?)", lease),
                                 is_intent=True), "no budget is leased")

    def forget_lease(self, lease: Lease) -> None:
        """Forget one that was given back. Else it would be given back twice, and refused."""
        self._write(_Write(("DELETE FROM leases WHERE lease_id = ?", [lease.lease_id]),
                           is_intent=True))

    def close(self) -> None:
        """Write what is still queued, and let go of the file."""
        with self._turn:
            if self._queue:
                self._commit(is_patient=True)
        for _ in range(STEPS_AT_CLOSE):
            if not self.tend():
                break
        with self._turn, self._reading:
            with contextlib.suppress(self._errors):
                self._db.execute("UPDATE chain SET closed = 1 WHERE sealed_id = ?", (self._newest,))
            self._reader.close()
            self._db.close()
        self._lock.release()


Ledger = Union[MemoryLedger, SqliteLedger]


# Reading a ledger without serving: `usage` and `audit`.

# What can be grouped by; a folded day has no hours, and counts as its first.
USAGE_GROUPS = MappingProxyType({
    **{name: name for name in ("token", "model", "provider", "session", "project")},
    "day": "date(at_s, 'unixepoch')", "hour": "strftime('%Y-%m-%d %H:00', at_s, 'unixepoch')",
})
USAGE_TABLES = ("model", "token", "day")      # what is shown where nothing is said
_SPEND = (
    f"SELECT day * {DAY_S} AS at_s, token, provider, model, session, project, {', '.join(_SUMS)}, "
    "0 AS unsettled_requests FROM daily WHERE day <= :last_day UNION ALL "
    + _COUNTED.format("id > (SELECT tallied_id FROM chain){}"))
_FINER = f" OR admitted_s >= (:last_day + 1) * {DAY_S}"
SPEND_COUNTS = (*_SUMS, "unsettled_requests")
_SPEND_SUMS = ", ".join(f"COALESCE(SUM({name}), 0) AS {name}" for name in SPEND_COUNTS)


def _reading_connection(path: str) -> sqlite3.Connection:
    """Open a ledger to be read only. A statement waits LEDGER_BUSY_S for another program.

    Where its folder is read-only too and there is no log, nobody writes, and nothing is locked.
    """
    import sqlite3
    is_still = not (os.access(os.path.dirname(path), os.W_OK) or os.path.exists(path + "-wal"))
    db = sqlite3.connect(f"file:{urllib.parse.quote(path)}?mode=ro&immutable={int(is_still)}",
                         uri=True,
                         timeout=LEDGER_BUSY_S, isolation_level=None, check_same_thread=False)
    db.row_factory = sqlite3.Row
    return db


@contextlib.contextmanager
def reading_ledger(path: str) -> Iterator[sqlite3.Connection]:
    """Open a ledger to be read only, as it is at one moment, whatever version wrote it.

    Raises Misconfigured, also for what fails inside.
    """
    import sqlite3
    try:
        _check_ledger_file(os.path.realpath(path))
        with contextlib.closing(_reading_connection(os.path.realpath(path))) as db:
            _check_is_ledger(db)
            db.execute("BEGIN")
            _show_as_newest(db)
            yield db
    except (OSError, sqlite3.Error) as err:
        raise Misconfigured(f"the ledger {path} cannot be read: {_reason(err)}") from err


def _show_as_newest(db: sqlite3.Connection) -> None:
    """Let a ledger that an earlier version wrote read as one of ours: what it lacks is temporary.
    """
    there = {row["name"] for row in db.execute("PRAGMA table_info(calls)")}
    lacking = [f"NULL AS {name}" for name in LEDGER_COLUMNS if name not in there]
    if lacking:
        db.execute(f"CREATE TEMP VIEW calls AS SELECT *, {', '.join(lacking)} FROM main.calls")
    for script in MIGRATIONS[db.execute("PRAGMA user_version").fetchone()[0]:]:
        if script.startswith(("CREATE TABLE", "INSERT INTO chain")):
            db.execute(script.replace("CREATE TABLE", "CREATE TEMP TABLE", 1))
    if lacking:                               # nothing is added up: some may be in flight
        db.execute("UPDATE chain SET tallied = 0, tallied_id = 0, tallied_microdollars = 0")


def ledger_rows(path: str, query: str, values: Any = ()) -> list[dict]:
    """Return the rows of a query on a ledger, which is only read. Raises Misconfigured."""
    with reading_ledger(path) as db:
        return [dict(row) for row in db.execute(query, values)]


def usage_by(path: str, groups: Sequence[str], since_s: int = 0,
             until_s: int = MOST_SECONDS) -> list[dict]:
    """Return what was spent from one time up to another, by some of USAGE_GROUPS; by none: in all.

    Calls count at the time of their admission. Whole days come from their totals; of a part of a
    day, or by the hour, only days that are folded do, and those as if at their beginning.
    """
    is_whole = "hour" not in groups and since_s % DAY_S == 0 and (
        until_s % DAY_S == 0 or until_s == MOST_SECONDS)
    names = ", ".join(f"{USAGE_GROUPS[name]} AS {name}" for name in groups)
    numbers = ", ".join(map(str, range(1, len(groups) + 1)))
    by = f" GROUP BY {numbers} ORDER BY {numbers}" if groups else ""
    with reading_ledger(path) as db:
        folded_day = db.execute("SELECT folded_day FROM chain").fetchone()[0]
        return [dict(row) for row in db.execute(
            f"SELECT {names}{', ' if groups else ''}{_SPEND_SUMS} FROM "
            f"({_SPEND.format('' if is_whole else _FINER)}) "
            f"WHERE at_s >= :since_s AND at_s < :until_s{by}",
            {"last_day": MOST_SECONDS if is_whole else folded_day,
             "since_s": since_s, "until_s": until_s})]


def total_spend(rows: Iterable[Mapping]) -> dict[str, int]:
    """Return the sums of all counts of rows."""
    sums = Counter(dict.fromkeys(SPEND_COUNTS, 0))
    for row in rows:
        sums.update({name: row[name] for name in SPEND_COUNTS})
    return dict(sums)


def overview_of(rows: Sequence[Mapping]) -> dict:
    """Add rows by model, token and day up: {"by_model" | "by_token" | "by_day": [...],
    "total": {...}}."""
    report: dict = {}
    for group in USAGE_TABLES:
        key = operator.itemgetter(group)
        report[f"by_{group}"] = [{group: name, **total_spend(some)} for name, some in
                                 itertools.groupby(sorted(rows, key=key), key)]
    return {**report, "total": total_spend(rows)}


def usage_report(path: str, since_s: int = 0, until_s: int = MOST_SECONDS) -> dict:
    """Return what was spent, as overview_of() has it."""
    return overview_of(usage_by(path, USAGE_TABLES, since_s, until_s))


AUDIT_FAULTS = 1_000                          # of which the words are kept; all are counted


def text_digest(text: str) -> str:
    """Return a short name for a text, by which it can be known again."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:32]


def audit_row(row: Mapping[str, Any],
              rates: Optional[Mapping[str, frozenset]] = None) -> Optional[str]:
    """Say what is wrong with a settled row, recomputed from what it stores; None if nothing is.

    `rates` are all that its price can bill; None: not known.
    """
    try:
        lines = lines_from_json(row["lines"])
        if total_of(lines) != row["cost_microdollars"]:
            return f"its lines come to {total_of(lines)} microdollars"
        columns = ("bound_microdollars", "cost_microdollars", *TOKEN_COUNTS)
        if min([*(row.get(name) or 0 for name in columns), *(
                amount for _, *pair in lines for amount in pair)]) < 0:
            return "it holds a negative amount"
        usage = {} if row["usage"] is None else json.loads(row["usage"])
        odd = [what for what, _, rate in lines if rates is not None and "iterations" not in usage
               and rate not in rates.get(what, (rate,))]
        if odd:
            return f"its price {row['price_key']} has no such rate for {', '.join(odd)}"
        if row["estimated"] is not None or row["usage"] is None:
            return None
        billed, used = Counter(), Counter()
        for what, count, _ in lines:
            billed[what] += count
        used.update(usage_of(row["api"], usage).buckets)
        different = [bucket for bucket, _, _ in BUCKETS if billed[bucket] != used[bucket]]
    except (ValueError, TypeError, LookupError, AttributeError) as err:
        return f"it cannot be read: {type(err).__name__}"
    return f"it bills other counts than its usage: {', '.join(different)}" if different else None


class LedgerAudit:
    """All that can be wrong with a ledger, found in one pass that holds one row at a time.

    `faults` are (row, fault) of which AUDIT_FAULTS are kept, row being None for the whole. What
    an earlier version left open is no fault: `doubts` say what cannot be known of it.
    """

    def __init__(self, path: str, prices: Optional[PriceBook] = None) -> None:
        self.faults: list[tuple[Optional[Mapping[str, Any]], str]] = []
        self.fault_count = self.rows = self.cost_microdollars = self.estimated = self.open = 0
        self.unsealed = self.unchecked = 0             # rows; the latter without known rates
        self.repriced = 0                              # rows at rates that today's table has not
        self.doubts: list[str] = []
        self.total_microdollars = 0                    # of these rows, and of what was folded
        self._prices = prices
        self._days: dict[int, list[int]] = {}          # (calls, cost) of the rows, by day
        self._rates: dict[Any, Optional[Mapping[str, frozenset]]] = {}
        with reading_ledger(path) as db:
            self.state = dict(db.execute("SELECT * FROM chain").fetchone() or {})
            if not self.state or any(type(value) is not (bytes if name.endswith("seal") else int)
                                     for name, value in self.state.items()):
                self.state = {}
                self.fault(None, "its table chain is not as a proxy leaves it")
                return
            for look in (self._read_prices, self._walk, self._check_sums, self._check_ids):
                try:
                    look(db)
                except (TypeError, ValueError, LookupError, OverflowError) as err:
                    self.fault(None, "it holds what no proxy wrote: "
                               f"{look.__name__.strip('_')}: {type(err).__name__}")

    def fault(self, row: Optional[Mapping[str, Any]], text: str) -> None:
        self.fault_count += 1
        if len(self.faults) < AUDIT_FAULTS:
            self.faults.append((row, text))

    def _read_prices(self, db: sqlite3.Connection) -> None:
        for digest, cells in db.execute("SELECT digest, cells FROM prices"):
            if digest != text_digest(cells):
                self.fault(None, f"the price {shown_name(digest)} is not as it was kept")
            else:
                self._rates[digest] = price_from_cells(cells).every_rate()

    def _walk(self, db: sqlite3.Connection) -> None:
        """Look at each settled row, and at the seals of those that have one by now."""
        state = self.state
        last_id, seal = state["folded_id"], state["folded_seal"]
        for row in map(dict, db.execute("SELECT * FROM calls WHERE settled_ms IS NOT NULL "
                                        "ORDER BY id")):
            self._check(row)
            if row["id"] > state["sealed_id"]:
                self.unsealed += 1
                continue
            if last_id < row["id"] and seal_of(row, seal) == row["seal"]:
                pass
            elif row["id"] > last_id + 1 and row["seal"] is not None:
                self.fault(None, f"{row['id'] - last_id - 1} rows before row {row['id']} are gone")
            else:
                self.fault(row, "it is not as it was sealed, or was put in")
            last_id, seal = row["id"], row["seal"] or b""
        if last_id < state["sealed_id"]:
            self.fault(None, f"{state['sealed_id'] - last_id} rows at the end are gone")
        elif seal != state["seal"]:
            self.fault(None, "the last seal is not what it was")
        if state["closed"] and self.unsealed:
            self.fault(None, f"{self.unsealed} rows were put in after the proxy had stopped")
        if state["foreign_rows"]:
            self.fault(None, f"{state['foreign_rows']} rows were put in while no proxy had it")

    def _check(self, row: dict) -> None:
        """Look at one row by itself, and count it."""
        cost = row["cost_microdollars"] if isinstance(row["cost_microdollars"], int) else 0
        self.rows += 1
        self.cost_microdollars += cost
        self.estimated += row["estimated"] is not None
        if row["id"] <= self.state["tallied_id"]:
            day = self._days.setdefault(row["admitted_s"] // DAY_S, [0, 0])
            day[0] += 1
            day[1] += cost
        rates = self._rates_of(row)
        self.unchecked += rates is None
        fault = audit_row(row, rates)
        if fault is not None and row["price_row"] is None and audit_row(row) is None:
            self.repriced += 1                # its own price is not known: today's may be another
        elif fault is not None:
            self.fault(row, fault)

    def _rates_of(self, row: Mapping[str, Any]) -> Optional[Mapping[str, frozenset]]:
        """Return all rates of the price that a row was billed by: as kept, else as of today."""
        digest, key = row["price_row"], row["price_key"]
        if digest is not None or key is None or self._prices is None:
            return self._rates.get(digest)
        if key not in self._rates:
            price = self._prices.row(key)
            self._rates[key] = None if price is None else price.every_rate()
        return self._rates[key]

    def _check_sums(self, db: sqlite3.Connection) -> None:
        """Compare the totals by day with the rows of the days that are not folded."""
        state, total, nothing = self.state, [0, 0], [0, 0]
        days = {day: sums for day, *sums in db.execute(
            "SELECT day, SUM(requests), SUM(cost_microdollars) FROM daily GROUP BY day")}
        for day in sorted({*days, *self._days}):
            sums, rows = days.get(day, nothing), self._days.get(day, nothing)
            total = [*map(operator.add, total, sums)]
            if rows != sums if day > state["folded_day"] else rows[0] > sums[0]:
                self._differ(time.strftime("%Y-%m-%d", time.gmtime(day * DAY_S)), sums, rows)
        self.total_microdollars = self.cost_microdollars + total[1] - sum(
            cost for _, cost in self._days.values())
        if total != [state["tallied"], state["tallied_microdollars"]]:
            self._differ("all days", total, [state["tallied"], state["tallied_microdollars"]])

    def _differ(self, of: str, sums: Sequence[int], rows: Sequence[int]) -> None:
        self.fault(None, "the totals of {} say {} calls, {} microdollars; they should say {} "
                         "calls, {} microdollars".format(of, *sums, *rows))

    def _check_ids(self, db: sqlite3.Connection) -> None:
        """Look for gaps: ids are given one by one, so that each is a row that vanished."""
        state, old_gaps = self.state, self.state["base_id"] - self.state["base"]
        last, there = db.execute("SELECT COALESCE(MAX(id), 0), COUNT(*) FROM calls").fetchone()
        self.open = there - self.rows
        gaps = max(last, state["sealed_id"]) - old_gaps - state["folded"] - there
        if gaps:
            self.fault(None, f"{abs(gaps)} ids are {'missing' if gaps > 0 else 'too many'}")
        if old_gaps:
            self.doubts.append(f"{old_gaps} ids were missing when this version first had it: calls "
                               "that a full disk kept out, or rows that vanished before")
        if self.repriced:
            self.doubts.append(f"{self.repriced} rows that name no kept price have rates that "
                               "today's table lacks: an earlier price, or an edit before a seal")


# ==== 18. Callers and configuration =============================================================
#
# Whose requests are served, for how much and where they go: the tokens of --config, and the two of
# the command line; Settings; Routes. A file is read whole and strictly; one that is broken changes
# nothing. Tokens are kept as SHA-256.

TOKEN_NAME = r"[A-Za-z0-9_.-]{1,64}"
RESERVED_NAMES = frozenset({"default", "admin", PROXY_SCOPE})
PROVIDER_NAME = r"[a-z0-9_-]{1,64}"
RATE_WINDOW_S = 60
MAX_SECRET_BYTES = 16 * 1024


def _url_parts(text: str) -> urllib.parse.SplitResult:
    try:
        parts = urllib.parse.urlsplit(text)
        usable = (parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
                  and re.fullmatch(r"[!-~]+", text) and "\\" not in text)
    except ValueError:
        usable = False
    if not usable:
        raise ValueError("must be an http:// or https:// URL with a host")
    return parts


def parse_alert_url(text: str) -> str:
    """Return a URL that takes alerts, which may hold a secret anywhere. Raises ValueError."""
    parts = _url_parts(text)
    if parts.username is not None or parts.fragment:
        raise ValueError("must have no user name and no fragment")
    return text


def parse_base_url(text: str) -> str:
    """Return a base URL without its final slash. Raises ValueError."""
    parts = _url_parts(text)
    if parts.username is not None or parts.query or parts.fragment:
        raise ValueError("must have no user name, query or fragment")
    endpoint = re.search(f"({'|'.join(METERED_APIS)})$".replace("/v1", ""), text.rstrip("/"))
    if endpoint:
        raise ValueError(f"must end before {endpoint[0]}: what is called is put behind it")
    return text.rstrip("/")


def without_v1(url: str) -> str:
    """Return the base URL of an endpoint in Anthropic's format, whose routes begin with /v1."""
    return re.sub("(/v1)+$", "", url)


def at_base_url(provider: Provider, url: str) -> Provider:
    """Return a provider at another base URL, where only one endpoint of it is known.

    In OpenAI's format a URL with a path stays as it is, and a bare host gets the provider's usual
    path.
    """
    if provider.format == "openai":
        base_url = url if urllib.parse.urlsplit(url).path else url + provider.path
    else:
        base_url = without_v1(url)
    return provider._replace(base_url=base_url, anthropic_base_url="")


def check_encrypted(name: str, url: str, allow_plain_http: bool) -> None:
    """Raise Misconfigured where a key would travel over a network as it is."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme == "http" and not LOOPBACK_HOST.fullmatch(parts.hostname or "") \
            and not allow_plain_http:
        raise Misconfigured(f"the URL of {name}: http:// would send its secrets in the clear; "
                            "use https://, or say --allow-plain-http")


def check_unquoted(text: str) -> None:
    """Raise ValueError for a value with the quotes that a shell would have taken off."""
    if re.match("[\"']|.*[\"']$", text):
        raise ValueError("holds quotes, which only a shell takes off: leave them out")


def check_can_be_reread(path: Optional[str]) -> None:
    """Raise Misconfigured for a pipe, which would hold up whoever opens it."""
    if path is not None and os.path.exists(path) and not os.path.isfile(path):
        raise Misconfigured(f"{path} is not a file, and can be read at the start only")


def named_file(name: str, environ: Mapping[str, str]) -> str:
    """Return the file of a secret, as a variable names it for another; "" where none does."""
    path = environ.get(f"{name}_FILE", "") if name else ""
    if path and environ.get(name):
        raise Misconfigured(f"both {name} and {name}_FILE are set: leave one out")
    return path


def secret_in(path: str, held: Mapping[str, str],
              read: Callable = lambda text: text) -> str:
    """Read the secret that a file holds on its one line. A fault says nothing of what it is.

    `held`: what files held before, by their paths: one that is broken now changes nothing, which
    is logged. Raises Misconfigured.
    """
    try:
        if path in held:
            check_can_be_reread(path)
        with checking(f"the file {path}"), open(path, "rb") as file:
            text = file.read(MAX_SECRET_BYTES + 1)
            line = re.fullmatch(rb"(?:\xef\xbb\xbf)?\s*([!-~]+)\s*", text)
            if line is None or len(text) > MAX_SECRET_BYTES:
                raise ValueError("must hold one line of printable characters without spaces")
            check_unquoted(line[1].decode())
            return read(line[1].decode())
    except (OSError, Misconfigured) as err:
        is_path = len(path) < LEAST_KEY_CHARS or os.path.exists(path) \
            or re.search(r"^([/~]|[A-Za-z]:)|\.[a-z]{2,4}$", path)
        shown = path if is_path else "? (name the file of the secret, not the secret)"
        reason = str(err) if isinstance(err, Misconfigured) else \
            f"the file {shown} cannot be read: {_reason(err)}"
        if path not in held:
            raise Misconfigured(reason) from None
        log.error("a secret stays as it was", extra={"fields": {"reason": reason}})
        return held[path]


def with_key(provider: Provider, environ: Mapping[str, str], *, allow_plain_http: bool = False,
             held: Mapping[str, str] = MappingProxyType({})) -> Provider:
    """Return a provider with its key, if there is one: of its file, or of its variable or the file
    that this names. `held` is as for secret_in(). Raises Misconfigured."""
    name, path = provider.key_env, provider.key_file or named_file(provider.key_env, environ)
    key = secret_in(path, held) if path else environ.get(name, "").strip()
    with checking(name):
        check_unquoted(key)
        if not re.fullmatch(r"[!-~]*", key):
            raise ValueError("holds a character that a key cannot have")
    for url in (provider.base_url, provider.anthropic_base_url) if name or path else ():
        check_encrypted(provider.name, url, allow_plain_http)
    return provider._replace(key=key or None, key_file=path)


class Caller(NamedTuple):
    """A token: its name, and what its requests may do."""
    name: str
    sha256: str
    budget_microdollars: Optional[int] = None      # None: as much as the proxy's budget allows
    period: str = "total"
    models: tuple[str, ...] = ()                   # patterns with * and ?; none: any model
    requests_per_minute: Optional[int] = None
    parallel_requests: Optional[int] = None
    expires_s: Optional[int] = None                # Unix seconds
    stop_at_microdollars: Optional[int] = None     # once this is spent no call begins
    session_budget_microdollars: Optional[int] = None      # of each session; advisory

    def __repr__(self) -> str:
        return f"<Caller {self.name}>"                                      # without its token

    @property
    def scopes(self) -> tuple[str, ...]:
        """Return the scopes that its calls belong to, beside the proxy's."""
        return () if self.name in RESERVED_NAMES else (self.name,)

    def has_expired(self) -> bool:
        """Whether its time is over."""
        return self.expires_s is not None and time.time() >= self.expires_s

    def terms(self) -> dict:
        """Return what it may do beside spend, for status and `tokens list`."""
        return {"session_limit_microdollars": self.session_budget_microdollars,
                "expires": utc_text(self.expires_s), "has_expired": self.has_expired(),
                "requests_per_minute": self.requests_per_minute,
                "parallel_requests": self.parallel_requests, "models": [*self.models]}

    def may_use(self, provider: str, model: str) -> bool:
        """Whether its patterns allow a model, by its name upstream, with or without provider/.

        A pattern that begins with a provider's name is about that provider only: openai/* is not
        openrouter's openai/….
        """
        return not self.models or any(
            fnmatch.fnmatchcase(f"{provider}/{model}", pattern)
            or (fnmatch.fnmatchcase(model, pattern)
                and not any(pattern.startswith(f"{known}/") for known in KNOWN_PROVIDERS))
            for pattern in self.models)


# Column of the ledger -> the headers in which clients say it, the first that is there. They are
# their words only: of bounded length, printable, and never a metric's label. Sources: Claude Code
# 2.1.332 and Codex 0.171, seen in November 2026.
ATTRIBUTION_HEADERS = MappingProxyType({
    "session": ("x-ironcage-session", "x-claude-code-session-id", "session-id"),
    "agent": ("x-claude-code-agent-id", "thread-id"),
    "parent_agent": ("x-claude-code-parent-agent-id",),
    "project": ("x-ironcage-project",),
})
_ATTRIBUTING = frozenset(itertools.chain(*ATTRIBUTION_HEADERS.values()))
MOST_ATTRIBUTION_CHARS = 128


def attribution_of(headers: Headers) -> dict[str, Optional[str]]:
    """Return what a request says of its sender and its purpose, by ledger column; None: nothing."""
    found = dict.fromkeys(ATTRIBUTION_HEADERS)
    if _ATTRIBUTING.isdisjoint(headers.values):
        return found                                 # at a third of the time
    for column, names in ATTRIBUTION_HEADERS.items():
        said = next(filter(None, map(headers.get, names)), None)
        found[column] = said and re.sub(UNPRINTABLE, "?", said)[:MOST_ATTRIBUTION_CHARS]
    return found


# Claude Code heeds our warnings (NOTICES) from a bearer of three parts only, the second of which
# says {"aud":"claude-gateway"}; it checks no signature (2.1.332, November 2026). To all other
# clients it is one more token. The secret is the third part.
TOKEN_START = "ic_.eyJhdWQiOiJjbGF1ZGUtZ2F0ZXdheSJ9."


def new_token() -> str:
    """Return a token for a caller, made at random."""
    return TOKEN_START + secrets.token_urlsafe(24)


def token_sha256(token: str) -> str:
    """Return what is stored of a token."""
    return hashlib.sha256(token.encode("utf-8")).hexdigest()


def value_like(fits: Callable[[Any], Any], meaning: str,
               made: Callable = lambda value: value) -> Callable[[Any], Any]:
    """Make a reader of values that fit. A fault says what one must be, not what it was: that may
    be a secret."""
    def read(value: Any) -> Any:
        if not fits(value):
            raise ValueError(f"must be {meaning}")
        return made(value)
    return read


def text_like(pattern: str, meaning: str) -> Callable[[Any], str]:
    """Make a reader of text of one form."""
    return value_like(lambda value: isinstance(value, str) and re.fullmatch(pattern, value),
                      meaning)


parse_token = text_like(r"[!-~]{8,512}", "8 to 512 printable ASCII characters without spaces")
_config_flag = value_like(lambda value: isinstance(value, bool), "true or false")
_config_count = value_like(lambda value: type(value) is int and 1 <= value <= 10 ** 6,
                           "a whole number from 1 up")


def _config_url(value: Any) -> str:
    return parse_base_url(text_like(r".{1,2048}", "a URL")(value))


def list_like(pattern: str, meaning: str, *, least: int = 1) -> Callable[[Any], Any]:
    """Make a reader of lists of texts of one form."""
    return value_like(
        lambda value: isinstance(value, list) and len(value) >= least and all(
            isinstance(one, str) and re.fullmatch(pattern, one) for one in value),
        f"a list of {meaning}", tuple)


_config_patterns = list_like("(?s).*", 'patterns, such as ["gpt-*"]')


def _is_a_pattern(value: Any) -> bool:
    try:
        return isinstance(value, str) and len(value) < 200 and bool(re.compile(value))
    except (re.error, RecursionError, OverflowError):
        return False


def parse_time(value: Any) -> int:
    """Read "2026-12-31" or "2026-12-31T23:59:59Z", in UTC unless it says, as Unix seconds."""
    try:
        at = datetime.datetime.fromisoformat(re.sub(r"[Zz]$", "+00:00", str(value)))
    except ValueError:
        raise ValueError("must be a date such as 2026-12-31 or 2026-12-31T23:59:59Z") from None
    utc = at if at.tzinfo is not None else at.replace(tzinfo=datetime.timezone.utc)
    return int(utc.timestamp())


def utc_text(at_s: Optional[float]) -> Optional[str]:
    """Return Unix seconds as parse_time() reads them; None as it is."""
    return None if at_s is None else time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at_s))


# Field of a token in the file -> how it is read.
TOKEN_FIELDS: Mapping[str, Callable] = MappingProxyType({
    "name": text_like(TOKEN_NAME, "1 to 64 letters, digits, _, . or -"),
    "token": lambda value: token_sha256(parse_token(value)),
    "sha256": text_like(r"[0-9a-f]{64}", "64 lower-case hexadecimal digits"),
    "budget_usd": parse_usd, "stop_at_usd": parse_usd, "session_budget_usd": parse_usd,
    "period": text_like("|".join(PERIODS), " or ".join(PERIODS)),
    "models": _config_patterns,
    "requests_per_minute": _config_count, "parallel_requests": _config_count,
    "expires": parse_time,
})
# The same for a provider.
PROVIDER_FIELDS: Mapping[str, Callable] = MappingProxyType({
    "base_url": _config_url,
    "anthropic_base_url": lambda url: without_v1(_config_url(url)),
    "path": text_like(r"(/[!-~]+)?", "empty, or a path such as /v1"),
    "format": text_like("openai|anthropic", "openai or anthropic"),
    "key_env": text_like(r"[A-Za-z_][A-Za-z0-9_]{0,127}", "an environment variable"),
    "key_file": text_like(r"[^\0]{1,4096}", "the path of a file"),
    "key_as": text_like("|".join(KEY_HEADERS), " or ".join(KEY_HEADERS)),
    **dict.fromkeys(("free", "stream_usage", "responses", "zero_is_a_cap", "file_tools",
                     "sellers", "user_after_tool", "cache_marks"), _config_flag),
    "caps": list_like("|".join(MAX_TOKENS_FIELDS["chat"]), " or ".join(MAX_TOKENS_FIELDS["chat"])),
    "reasoning_beyond_caps": value_like(
        lambda value: type(value) is int and 0 <= value <= 10 ** 6, "a number of tokens"),
    "fields": list_like(r"\w{1,64}(\.\w{1,64})*", "names of fields that cost nothing", least=0),
    "echo_reasoning": lambda value: "reasoning_content" if _config_flag(value) else "",
    "reasoning_field": text_like("(reasoning(_content)?)?",
                                 "reasoning_content, reasoning or empty"),
    "call_ids": value_like(_is_a_pattern, "a regular expression"),
    "sold_as": _config_patterns,
    "default_service_tier": text_like("[a-z]{1,32}", "a service tier"),
    "max_output_tokens_per_s": _config_count,
})
# Of an own price, what is no amount: in a table of LiteLLM's anything may stand there.
OWN_PRICE_FIELDS: Mapping[str, Callable] = MappingProxyType({
    **dict.fromkeys(("max_input_tokens", "max_output_tokens", "max_tokens"), value_like(
        lambda value: type(value) is int and value >= 0, "a whole number of tokens")),
    **dict.fromkeys(("mode", "litellm_provider"), text_like(r"[!-~]{1,64}", "a name")),
})
# Those that have another name here, where a unit is in the name.
READ_AS = MappingProxyType({
    "token": "sha256", "budget_usd": "budget_microdollars", "stop_at_usd": "stop_at_microdollars",
    "session_budget_usd": "session_budget_microdollars", "expires": "expires_s",
    "free": "is_free", "echo_reasoning": "reasoning_field"})


def _unknown_field(name: str, known: Iterable[str]) -> str:
    """Say what is wrong with a field that there is not; what may be a secret is not shown."""
    shown = name if re.fullmatch(r"[A-Za-z_]{1,32}", name) else "?"
    return f"has an unknown field {shown}{did_you_mean(name, known)}; there are {', '.join(known)}"


def _read_fields(row: Any, fields: Mapping[str, Callable]) -> dict:
    """Read the values of an object in the file, by the names of our fields. Raises ValueError."""
    if not isinstance(row, dict):
        raise ValueError("must be an object")
    values: dict = {}
    for name, value in row.items():
        if name not in fields:
            raise ValueError(_unknown_field(name, fields))
        try:
            values[READ_AS.get(name, name)] = fields[name](value)
        except ValueError as err:                      # which says nothing of a token itself
            raise ValueError(f"{name}: {err}") from None
    return values


def caller_from(row: Any) -> Caller:
    """Read one token of a configuration. Raises ValueError, naming the field."""
    values = _read_fields(row, TOKEN_FIELDS)
    if "name" not in values or ("token" in row) == ("sha256" in row):
        raise ValueError("needs a name, and either token or sha256")
    if values["name"] in RESERVED_NAMES:
        raise ValueError(f"must not be named {values['name']}")
    caller = Caller(**values)
    check_stop(caller.budget_microdollars, caller.stop_at_microdollars)
    return caller


def provider_from(name: str, row: Any) -> Provider:
    """Read one provider of the file, without its key. Raises ValueError, naming the field."""
    if not re.fullmatch(PROVIDER_NAME, name) or name in RESERVED_PROVIDERS:
        raise ValueError("must be named with a-z, 0-9, _ and -, and not as one of "
                         + ", ".join(sorted(RESERVED_PROVIDERS)))
    values = _read_fields(row, PROVIDER_FIELDS)
    known = manners_of(name, values.get("base_url", ""))
    if values.get("format", known.format) != known.format:
        known = Provider(name, values["format"], known.anthropic_base_url, key_env=known.key_env,
                         sold_as=known.sold_as)
    if "path" in values and (known.format != "openai" or "base_url" not in values
                             or urllib.parse.urlsplit(values["base_url"]).path):
        raise ValueError("path: is only for a base_url in OpenAI's format that is a bare host; "
                         "write it into the base_url")
    at_url = known if "base_url" not in values else at_base_url(
        known._replace(path=values.pop("path", known.path)), values.pop("base_url"))
    if not at_url.base_url:
        raise ValueError("needs a base_url")
    made = at_url._replace(**values)
    hosts = [_url_parts(url).hostname or ""
             for url in (made.base_url, made.anthropic_base_url) if url]
    return made._replace(is_free=values.get(
        "is_free", made.is_free and all(re.fullmatch(OWN_HOST, host) for host in hosts)))


class Config(NamedTuple):
    """What a configuration file says."""
    callers: tuple[Caller, ...] = ()
    providers: tuple[Provider, ...] = ()
    aliases: Mapping[str, str] = MappingProxyType({})             # pattern -> provider/model
    prices: Mapping[str, Any] = MappingProxyType({})           # name -> row of a price table
    price_as: Mapping[str, str] = MappingProxyType({})            # pattern -> name of such a row

    def aliased(self, model: str) -> str:
        """Return the model that a name stands for: that of the first matching alias, or itself."""
        if model in self.aliases:
            return self.aliases[model]
        return next((target for pattern, target in self.aliases.items()
                     if fnmatch.fnmatchcase(model, pattern)), model)


def _own_price(name: str, row: Any) -> Any:
    """Return the operator's row of a price as it is. Raises ValueError, naming the wrong field."""
    price_from_row(name, row)
    _read_fields({field: value for field, value in row.items()
                  if field in OWN_PRICE_FIELDS and value is not None}, OWN_PRICE_FIELDS)
    return row


def _target(name: str, row: Any) -> str:
    if not isinstance(row, str) or not row:
        raise ValueError("must map names to names")
    return row


# Part of the file -> (its kind, the field of Config, what a fault is about, how one row is read, by
# its name or number).
CONFIG_FIELDS: Mapping[str, tuple[type, str, str, Callable]] = MappingProxyType({
    "tokens": (list, "callers", "token {} in {}", lambda number, row: caller_from(row)),
    "providers": (dict, "providers", "the provider {} in {}", provider_from),
    "models": (dict, "aliases", "models in {1}", _target),
    "prices": (dict, "prices", "the price of {} in {}:", _own_price),
    "price_as": (dict, "price_as", "price_as in {1}", _target),
})


def read_config(path: str) -> dict:
    """Read the JSON object in a configuration file. Raises Misconfigured."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            parsed = json.load(file, parse_float=exact_number, parse_int=exact_integer,
                               object_pairs_hook=_object_without_duplicates)
    except OSError as err:
        raise Misconfigured(f"the configuration {path} cannot be read: {_reason(err)}") from err
    except (ValueError, RecursionError, BadRequest) as err:
        raise Misconfigured(f"the configuration {path} is not usable JSON: {err}") from None
    if not isinstance(parsed, dict):
        raise Misconfigured(f"the configuration {path} must be an object")
    for name, value in parsed.items():
        if name not in CONFIG_FIELDS:
            raise Misconfigured(f"the configuration {path} {_unknown_field(name, CONFIG_FIELDS)}")
        if not isinstance(value, CONFIG_FIELDS[name][0]):
            kind = "a list" if CONFIG_FIELDS[name][0] is list else "an object"
            raise Misconfigured(f"{name} in {path} must be {kind} of {name}")
    return parsed


def load_config(path: str, environ: Mapping[str, str], *, allow_plain_http: bool = False,
                held: Mapping[str, str] = MappingProxyType({})) -> Config:
    """Read a configuration file, with keys as with_key() has them. Raises Misconfigured, which
    says in one line what is wrong."""
    parsed = read_config(path)
    parts: dict[str, Any] = {}
    for part, (kind, field, about, read) in CONFIG_FIELDS.items():
        rows, found = parsed.get(part, kind()), {}
        for name, row in enumerate(rows, 1) if kind is list else rows.items():
            with checking(about.format(shown_name(str(name)), path)):
                found[name] = read(name, row)
        parts[field] = found if kind is dict and field != "providers" else tuple(found.values())
    for what in ("name", "sha256"):
        if len({getattr(caller, what) for caller in parts["callers"]}) != len(parts["callers"]):
            raise Misconfigured(f"two tokens in {path} have the same {what}")
    parts["providers"] = tuple([
        with_key(provider, environ, held=held, allow_plain_http=allow_plain_http)
        for provider in parts["providers"]])
    return Config(**parts)


NOTHING_HELD = contextlib.nullcontext()


class Traffic:
    """How many requests each token has in flight, and has made within the last minute."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()                  # guards the fields below
        self._in_flight: Counter = Counter()
        self._times: dict[str, deque] = {}

    def entered(self, caller: Caller) -> ContextManager[None]:
        """Hold a place for one request. Raises TooManyRequests, saying when to come back."""
        is_free = caller.requests_per_minute is None and caller.parallel_requests is None
        return NOTHING_HELD if is_free else self._entered(caller)

    @contextlib.contextmanager
    def _entered(self, caller: Caller) -> Iterator[None]:
        rate, parallel = caller.requests_per_minute, caller.parallel_requests
        now_s, allowed, wait_s = self._clock(), None, 1
        with self._lock:
            times = self._times.setdefault(caller.name, deque())
            while times and times[0] <= now_s - RATE_WINDOW_S:
                times.popleft()
            if rate is not None and len(times) >= rate:
                allowed = f"{rate} requests per minute"
                wait_s = int(times[0] + RATE_WINDOW_S - now_s) + 1
            elif parallel is not None and self._in_flight[caller.name] >= parallel:
                allowed = f"{parallel} requests at a time"
            else:
                self._in_flight[caller.name] += 1
                times.extend([now_s] if rate is not None else ())
        if allowed is not None:
            raise TooManyRequests(f"the token {caller.name} may make {allowed}",
                                  headers=[("retry-after", str(wait_s))])
        try:
            yield
        finally:
            with self._lock:
                self._in_flight[caller.name] -= 1


class Settings(NamedTuple):
    """Everything that a server is started with."""
    providers: tuple[Provider, ...]
    token: str                                         # what callers authenticate with
    host: str = "127.0.0.1"
    port: int = 8787                                   # 0: any free one
    listener: Optional[socket.socket] = None           # that another process opened for us
    budget_microdollars: Optional[int] = None          # None: count, and refuse nothing
    stop_at_microdollars: Optional[int] = None         # once this is spent no call begins
    admin_token: Optional[str] = None
    token_is_generated: bool = False
    config_path: Optional[str] = None                  # tokens, providers and aliases
    environ: Mapping[str, str] = MappingProxyType({})  # for its keys
    secret_files: Mapping[str, str] = MappingProxyType({})       # field below -> where it is from
    allow_plain_http: bool = False
    ledger_path: Optional[str] = None                  # None: in memory
    fsync: bool = False                                # the ledger survives a loss of power
    keep_days: Optional[int] = None                    # then rows become totals; None: never
    no_wait_for_ledger: bool = False                   # refuse at once one that is in use
    pricing_path: Optional[str] = None                 # None: pricing.json beside this file
    allow_hosts: tuple[str, ...] = ()
    allow_paths: tuple[str, ...] = ()
    allow_fields: tuple[str, ...] = ()                 # let through though nothing is known of them
    allow_contents: tuple[str, ...] = ()               # likewise types of content
    no_hosted_tools: bool = False
    bound: str = "measured"                            # or "bytes"
    wait_s: int = 30                                   # in the queue for what calls in flight hold
    no_fit: bool = False                               # never lower a client's output cap
    strict: bool = False                               # refuse what a translation would lose
    shared: Optional[EngineAddress] = None             # where many processes keep one budget
    cage: str = "default"                              # under this name
    server_url: Optional[str] = None                   # of an Iron Cage server
    server_token: Optional[str] = None                 # there; None: `token`
    cache_ttl_s: int = 300                             # how long its key is kept
    max_body_bytes: int = 32 * 1024 * 1024
    max_memory_bytes: int = 256 * 1024 * 1024          # half of a small container of 512 MB
    agent_id: Optional[str] = None                     # in events, instead of the token's name
    provider_id: Optional[str] = None                  # in events, instead of the provider's name
    on_event: Optional[Callable[[Event], None]] = None
    alert_url: Optional[str] = None                    # a secret: anybody can post there
    log_format: str = "text"
    quiet: bool = False
    timeouts: Timeouts = Timeouts()

    def __repr__(self) -> str:
        return f"<Settings for {self.host} port {self.port}>"               # without their tokens


class Routes(NamedTuple):
    """Where requests go: by their path, and by the model that they name."""
    providers: Mapping[str, Provider]
    config: Config

    def in_path(self, path: str) -> tuple[Optional[Provider], str]:
        """Return the provider that a path's first segment names, and the path to call there."""
        name, behind = split_path(path)
        provider = self._provider(name)
        return provider, behind if provider or not name else path

    def of_client(self, request: ClientRequest) -> Provider:
        """Return the provider of a request that names neither a provider nor a model."""
        return self.providers[request.dialect]

    def of_model(self, model: str, named: Optional[Provider] = None) -> tuple[Provider, str]:
        """Return the provider of a model, and the model's name there.

        provider/model names both; else an alias; else the prefix of the name. Raises
        UnknownProvider.
        """
        if model not in self.config.aliases:
            model = LONG_WINDOW_SUFFIX.sub("", model)
        prefix, slash, rest = model.partition("/")
        if named is None and not (slash and self._provider(prefix)):
            model = LONG_WINDOW_SUFFIX.sub("", self.config.aliased(model))
            prefix, slash, rest = model.partition("/")
        if model == ECHO_MODEL:
            return ECHO_PROVIDER, model
        provider = self._provider(prefix) if slash else None
        if provider is not None and named in (None, provider):
            return provider, rest
        if named is not None:
            return named, model
        if slash:
            raise self._unknown(prefix, model)
        name = next((name for start, name in MODEL_PREFIXES if model.startswith(start)), "openai")
        return self.providers[name], model

    def window_betas(self, model: str, provider: Provider) -> tuple[str, ...]:
        """Return what asks a provider for the long window that a model's name asks for."""
        is_long = any(map(LONG_WINDOW_SUFFIX.search, (model, self.config.aliased(model))))
        return (LONG_WINDOW_BETA,) if is_long and provider.format == "anthropic" else ()

    def known_models(self, prices: PriceBook, caller: Caller, of_server: Optional[str],
                     asked: str = "") -> dict[str, tuple[str, Price]]:
        """Return the priced models of the providers that can be called, aliases, and the one that
        is asked for, by any name that a call can give it: (provider, price). `of_server` names the
        provider whose key an Iron Cage server gave."""
        ready = {name for name, provider in self.providers.items()
                 if provider.key is not None or not provider.key_env or name == of_server}
        owners = {seller: name for name in self.providers if name in ready
                  for seller in prices.sellers(name)}
        models = {}
        for key in prices.keys():
            price, (prefix, _, rest) = prices.price(key), key.partition("/")
            owner = owners.get(price.provider or prefix)
            model = rest if owners.get(prefix) == owner and key != ECHO_MODEL else key
            if owner is not None and caller.may_use(owner, model):
                plain = model == key and owner in ("openai", "anthropic", ECHO_PROVIDER.name)
                models[key if plain else f"{owner}/{model}"] = (owner, price)
        for name in filter(None, (*self.config.aliases, asked)):
            with contextlib.suppress(UnknownProvider):
                provider, model = self.of_model(name)
                found = prices.find(model, provider.name)
                if found is not None and not re.search("[*?[]", name) and provider.name in ready \
                        and caller.may_use(provider.name, model):
                    models[name] = (provider.name, found)
        return models

    def _provider(self, name: str) -> Optional[Provider]:
        return self.providers.get(name) or self.providers.get(PROVIDER_ALIASES.get(name, ""))

    def _unknown(self, name: str, model: str) -> UnknownProvider:
        """Make the error for a provider that is not set up, or that nobody knows."""
        row = KNOWN_PROVIDERS.get(PROVIDER_ALIASES.get(name, name))
        if row is None:
            return UnknownProvider(
                f"the model {shown_name(model)} names a provider that there is not"
                f"{did_you_mean(name, self.providers)}: before a / stands one of "
                f"{', '.join(self.providers)}", param="model")
        is_by_key = row.key_env and row.base_url and not row.is_named_only
        return UnknownProvider(
            f"the provider {row.name} is not set up: " + (
                f"set {row.key_env} in the proxy's environment" if is_by_key
                else "name it under providers in --config"), param="model")


# ==== 19. HTTP on a socket ======================================================================
#
# HTTP/1.1 messages read strictly from a socket, for both sides: requests of clients and answers
# of providers pass the same parser and the same body decoders. http.server's own parser takes
# folded headers, bare CRs and two lengths, waits per read instead of in all, and http.client's
# hands bytes on in blocks of its own; a proxy that holds keys can afford neither. A thread
# that must wait for a socket lets another run: see Slot.
# Source: RFC 9112 (HTTP/1.1), section numbers beside the rules.

_HEAD_END = re.compile(rb"\r?\n\r?\n")
_EMPTY_LINES = re.compile(rb"(?:\r\n)*")
_HEADER_LINE = re.compile(r"^([!#$%&'*+\-.^_`|~0-9A-Za-z]+):([^\x00-\x08\x0a-\x1f\x7f]*)\r\n",
                          re.MULTILINE)
_REQUEST_LINE = re.compile(r"([!#$%&'*+\-.^_`|~0-9A-Za-z]{1,32}) (\S+) HTTP/1\.([01])")
_STATUS_LINE = re.compile(r"HTTP/1\.([01]) (\d{3})(?: [^\x00-\x08\x0a-\x1f\x7f]*)?")
_TARGET = re.compile(r"(/[!-\"$->@-\[\]-~]*)(?:\?([!-\"$-~]*))?")     # no space, "#" or "\"
_SIZE_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[^\r\n]*)?\r\n")
_DATA_END = re.compile(rb"\r\n")
_TRAILER_LINE = re.compile(rb"([^\r\n]*)\r\n")
# What a chunk of one to nine bytes holds, or, where there is none, nothing of all that follows: so
# those in a row are found in one go. A step for each would take 4 us, which floods are made of.
_SMALL_CHUNK = re.compile(rb"(?s)[1-9]\r\n(%b)\r\n|.+" % b"|".join(
    b"(?<=%d\r\n).{%d}" % (size, size) for size in range(1, 10)))
MAX_CHUNK_LINE_BYTES = 4096


class Headers(tuple):
    """A message's headers, (lower-case name, value), in order.

    `values` has them by name, and `get` one of them, or None; several of one name are joined by
    ", " (5.3). `options` is what a Connection header names, in lower case (7.6.1).
    """

    def __init__(self, pairs: Iterable[tuple[str, str]]) -> None:
        self.values = dict(self)
        if len(self.values) < len(self):
            self.values = {name: ", ".join(v for n, v in self if n == name) for name, _ in self}
        self.get = self.values.get
        options = self.get("connection")
        self.options = [] if options is None else [
            option.strip(" \t") for option in options.lower().split(",")]


def parse_headers(lines: str) -> Headers:
    """Return the headers in lines that each end in CRLF. Raises MalformedHttp for what is not one
    clear header: bare CR or LF (2.2), a space before ":" (5.1), folding (5.2)."""
    found, count = _HEADER_LINE.findall(lines), lines.count("\n")
    if count > MAX_HEADERS:
        raise MalformedHttp(f"more than {MAX_HEADERS} headers")
    if len(found) != count:                # no match is longer than a line, or less than one
        raise MalformedHttp("a header line is malformed")
    names, values = zip(*found) if found else ((), ())
    return Headers(zip(map(str.lower, names), map(str.strip, values, itertools.repeat(" \t"))))


class RequestHead(NamedTuple):
    """The head of a client's request."""
    method: str
    path: str                  # as sent: not decoded, no query
    query: Optional[str]
    minor_version: int         # 0 or 1
    headers: Headers

    @property
    def keeps_alive(self) -> bool:
        return self.minor_version == 1 and "close" not in self.headers.options


# Java's HttpClient offers HTTP/2 in every request over plain HTTP, and takes an answer over
# HTTP/1.1. A 426 says what is spoken instead (RFC 9110, 7.8 and 15.5.22).
IGNORED_UPGRADES = re.compile(r"(?i)[, \t]*(h2c([, \t]+|$))*")
UPGRADES_SERVED = (("upgrade", "HTTP/1.1"), ("connection", "upgrade"))


def content_encoding(headers: Headers) -> str:
    """Return how a body is encoded, in lower case; "identity" where it is not."""
    encoding = headers.get("content-encoding")
    return encoding.lower() if encoding else "identity"


def media_type(headers: Headers) -> str:
    """Return the type of a body, in lower case and without parameters; "" where it is not said."""
    return (headers.get("content-type") or "").partition(";")[0].strip().lower()


def parse_request_head(head: bytes) -> RequestHead:
    """Raises MalformedHttp for anything but one clear HTTP/1.0 or 1.1 request head."""
    first, end, rest = head.decode("latin-1").partition("\r\n")
    line = _REQUEST_LINE.fullmatch(first)
    if line is None:
        raise MalformedHttp("the request line is not METHOD /path HTTP/1.1")
    target = _TARGET.fullmatch(line[2])
    if target is None:
        raise MalformedHttp("the request target must be a path of printable ASCII characters")
    if "/." in target[1] or "%" in target[1]:
        segments = urllib.parse.unquote(target[1]).split("/")
        if "." in segments or ".." in segments:
            raise MalformedHttp("the path has a . or .. segment")
    headers = parse_headers(rest + end)
    host = headers.get("host")
    if (host is None and line[3] == "1") or "," in (host or ""):
        raise MalformedHttp("there must be one Host header")
    return RequestHead(line[1], target[1], target[2], int(line[3]), headers)


BODILESS_STATUSES = frozenset({204, 304})          # whatever their heads say of a length (6.3)
CHUNKED = -1            # body lengths: bytes, or one of these two
UNTIL_CLOSE = -2


def body_length(headers: Headers, *, otherwise: int) -> int:
    """Return the bytes of a message's body, or CHUNKED, or `otherwise` where the head does not say.

    Raises MalformedHttp for two lengths, or a length that is not plain digits (6.1, 6.3).
    """
    length = headers.get("content-length")
    coding = headers.get("transfer-encoding")
    if coding is not None:
        if length is not None:
            raise MalformedHttp("there must be a content-length or a transfer-encoding, not both")
        if coding.lower() != "chunked":
            raise MalformedHttp("the only transfer-encoding taken is chunked")
        return CHUNKED
    if length is None:
        return otherwise
    if not (length.isascii() and length.isdigit() and len(length) <= 18):
        raise MalformedHttp("content-length is not one number of bytes")
    return int(length)


class BodyDecoder:
    """A message body: so many bytes, UNTIL_CLOSE, or CHUNKED (7.1), in the pieces that came.

    Of a chunked one a line that matches `_expected` is next, once the `_left` bytes of its chunk
    are in.
    """

    def __init__(self, length: int) -> None:
        self.is_done = length == 0
        self.rest = b""                       # received and not used; at the end, what came after
        self._may_end = length == UNTIL_CLOSE
        self._left = max(0, length) if length != UNTIL_CLOSE else sys.maxsize
        self._expected = _SIZE_LINE if length == CHUNKED else None

    def feed(self, data: bytes) -> list[bytes]:
        """Return the pieces of the body in some bytes. Raises MalformedHttp."""
        if self._expected is not None:
            return self._chunks_in(data)
        piece, self.rest = data[:self._left], data[self._left:]
        self._left -= len(piece)
        self.is_done = not self._left
        return [piece] if piece else []

    def _chunks_in(self, data: bytes) -> list[bytes]:
        data, at, pieces = self.rest + data, 0, []
        while not self.is_done and at < len(data):
            if self._left:
                piece = data[at:at + self._left]
                pieces.append(piece)
                at += len(piece)
                self._left -= len(piece)
                continue
            expected = self._expected
            if expected is _SIZE_LINE and data.startswith(b"\r", at + 1):
                small = [*filter(None, _SMALL_CHUNK.findall(data, at))]
                pieces += small
                at += sum(map(len, small)) + len(small) * len(b"1\r\n\r\n")
            line = expected.match(data, at)
            if line is None or line.end() - at > MAX_CHUNK_LINE_BYTES:
                if line or b"\n" in data[at:] or len(data) - at > MAX_CHUNK_LINE_BYTES:
                    raise MalformedHttp("a line of the chunked body is malformed")
                break
            at = line.end()
            if expected is _SIZE_LINE:
                self._left = int(line[1], 16)
                behind = at + self._left
                if self._left and data.startswith(b"\r\n", behind):     # all of the chunk is here
                    pieces.append(data[at:behind])
                    at, self._left = behind + len(b"\r\n"), 0
                else:
                    self._expected = _DATA_END if self._left else _TRAILER_LINE
            elif expected is _DATA_END:
                self._expected = _SIZE_LINE
            else:
                self.is_done = not line[1]    # trailer fields are read and dropped
        self.rest = data[at:]
        return pieces

    def end(self) -> bool:
        """Whether the body is whole, now that the connection was closed."""
        return self.is_done or self._may_end


def format_chunks(pieces: Iterable[bytes]) -> bytes:
    """Write each piece as one chunk of a chunked body."""
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces if piece)


LAST_CHUNK = b"0\r\n\r\n"


def format_head(first_line: str, headers: Iterable[tuple[str, str]]) -> bytes:
    """Write a message head. Names and values were checked when they were parsed."""
    return "\r\n".join([first_line, *map(": ".join, headers), "\r\n"]).encode("latin-1")


def ready_of(sockets: Sequence[socket.socket], timeout_s: float, *,
             writing: bool = False) -> list[socket.socket]:
    """Return those that can be read (or written), or have ended, now or within a time."""
    timeout_s = max(0.0, timeout_s)
    if not hasattr(select, "poll"):                   # Windows
        readable, writable, broken = select.select([] if writing else sockets,
                                                   sockets if writing else [], sockets, timeout_s)
        return [*{*readable, *writable, *broken}]
    poll = select.poll()
    for sock in sockets:
        poll.register(sock, select.POLLOUT if writing else select.POLLIN)
    ready = {number for number, _ in poll.poll(timeout_s * 1000)}
    return [sock for sock in sockets if sock.fileno() in ready]


def has_hung_up(sock: socket.socket) -> Optional[bool]:
    """Whether the peer of an unencrypted socket closed it; None if it sent bytes instead."""
    try:
        return None if sock.recv(1, socket.MSG_PEEK) else True
    except BlockingIOError:
        return False
    except OSError:
        return True


class Waiter:
    """A thread that may have to wait for the slot."""
    __slots__ = ("wake", "has_slot")

    def __init__(self) -> None:
        self.wake = threading.Lock()         # taken while the thread waits; released to wake it
        self.wake.acquire()
        self.has_slot = False


class _Here(threading.local):
    """The waiter that the thread is which asks."""

    def __init__(self) -> None:
        self.waiter = Waiter()


class Slot:
    """Has one thread run at a time, from each wait for a socket to its next.

    Python runs one thread at a time anyway, but offers the interpreter to the others at every
    system call: with 16 connections a small request took 12 switches of threads, and takes 2.
    (Measured: 250 us of CPU rather than 420.) A thread that must wait for a socket hands the slot
    to the first in the queue, or, where nobody is, waits for the sockets of all. What can block or
    takes long is done outside the slot, among the other threads of the process: connecting, files,
    waiting for budget, large bodies, code of others. No lock is held from one wait to the next.

    A thread that takes part   goes on to
      runs (one at most)       polls, parked: it waits for a socket; outside: leave()
      polls (one at most)      runs: something came, and nobody runs; else queued, or parked
      parked                   queued: its socket is ready, or its time is over; polls: nobody does
      queued, first come       runs
      outside                  queued: take()
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()                # guards all but the last
        self._epoll: Optional[select.epoll] = None   # made by the first wait; Linux only
        self._wires: dict[int, Wire] = {}            # that it knows, by file descriptor
        self._queue: deque[Waiter] = deque()         # those that can go on, in order
        self._parked: set[Waiter] = set()            # those that wait for sockets
        self._is_taken = False                       # somebody runs, or was woken to
        self._is_polling = False                     # somebody waits for the sockets of all
        self._here = _Here()
        self.on_fault: Callable[[str], None] = lambda name: None       # a thread of ours failed

    def take(self) -> None:
        """Wait in the queue for the slot, unless this thread has it."""
        waiter = self._here.waiter
        if not waiter.has_slot:
            with self._lock:
                self._queue.append(waiter)
                self._pass_on_locked()
            waiter.wake.acquire()
            waiter.has_slot = True

    def leave(self) -> bool:
        """Let others run beside this thread; False if they do already."""
        waiter = self._here.waiter
        had_slot, waiter.has_slot = waiter.has_slot, False
        if had_slot:
            with self._lock:
                self._is_taken = False
                self._pass_on_locked()
        return had_slot

    @contextlib.contextmanager
    def outside(self, is_inside: bool = False) -> Iterator[None]:
        """Do what can block or takes long while others run; with `is_inside`, what only one
        connection may do at a time."""
        had_slot = self._here.waiter.has_slot
        (self.take if is_inside else self.leave)()
        try:
            yield
        finally:
            (self.take if had_slot else self.leave)()

    def inside(self) -> ContextManager[None]:
        """Do something that no connection may do at the same time."""
        return self.outside(is_inside=True)

    def wait(self, wires: Sequence[Wire], deadline_s: float) -> list[Wire]:
        """Wait for one to two wires, and return those that can be read; none at a monotonic time.
        """
        waiter = self._here.waiter
        if not waiter.has_slot or not hasattr(select, "epoll"):
            with self.outside():
                readable = ready_of([wire.sock for wire in wires], deadline_s - time.monotonic())
            return [wire for wire in wires if wire.sock in readable]
        for wire in wires:                           # if it was just shown, it is armed once more
            wire.waiter, wire.is_ready = waiter, False
        is_late = False
        while True:
            with self._lock:
                ready = [wire for wire in wires if wire.is_ready]
                if ready or is_late:
                    return ready
                self._arm_locked(wires)
                self._is_taken, polls = False, not (self._queue or self._is_polling)
                if polls:
                    self._is_polling = True
                else:
                    self._parked.add(waiter)
                    self._pass_on_locked()
            if not (polls and self._poll(waiter, wires, deadline_s)):
                self._await_slot(waiter, deadline_s)
            is_late = time.monotonic() >= deadline_s

    def _arm_locked(self, wires: Sequence[Wire]) -> None:
        """Have the next poll show, once, which of these can be read."""
        self._epoll = self._epoll or select.epoll()
        for wire in wires:
            if not wire.is_armed:
                is_known = self._wires.get(wire.number) is wire
                arm = self._epoll.modify if is_known else self._epoll.register
                arm(wire.number, select.EPOLLIN | select.EPOLLONESHOT)
                self._wires[wire.number], wire.is_armed = wire, True

    def forget(self, wire: Wire) -> None:
        """Know no more of a wire, which is about to be closed."""
        with self._lock:
            if self._wires.get(wire.number) is wire:
                del self._wires[wire.number]
                self._epoll.unregister(wire.number)

    def _poll(self, waiter: Waiter, wires: Sequence[Wire], deadline_s: float) -> bool:
        """Wait for the sockets of all, and queue those they wake; True if `waiter` runs on."""
        try:
            events = self._epoll.poll(max(0.0, deadline_s - time.monotonic()))
        except BaseException:
            with self._lock:
                self._is_polling = waiter.has_slot = False
                self._pass_on_locked()
            self.on_fault("the wait for all sockets")
            raise
        with self._lock:
            self._is_polling = False
            for number, _ in events:
                wire = self._wires.get(number)
                if wire is not None:
                    wire.is_armed, wire.is_ready = False, True
                    if wire.waiter in self._parked:
                        self._parked.remove(wire.waiter)
                        self._queue.append(wire.waiter)
            if not (self._is_taken or self._queue):
                self._is_taken = True
                return True
            is_ready = any([wire.is_ready for wire in wires])
            (self._queue.append if is_ready else self._parked.add)(waiter)
            self._pass_on_locked()
        return False

    def _await_slot(self, waiter: Waiter, deadline_s: float) -> None:
        """Wait until the slot is free; from the end of the queue, where a deadline passes first."""
        if not waiter.wake.acquire(timeout=max(0.0, deadline_s - time.monotonic())):
            with self._lock:
                if waiter in self._parked:
                    self._parked.remove(waiter)
                    self._queue.append(waiter)
                    self._pass_on_locked()
            waiter.wake.acquire()

    def _pass_on_locked(self) -> None:
        """Give the slot, if nobody runs, to the first in the queue, or to one that will wait for
        the sockets of all."""
        if self._is_taken:
            return
        self._is_taken = True
        if self._queue:
            self._queue.popleft().wake.release()
        elif self._parked and not self._is_polling:
            self._parked.pop().wake.release()
        else:
            self._is_taken = False


class Wire:
    """One connected socket: reads against deadlines, writes to the last byte.

    The socket is non-blocking; each wait is here, and each has an end. One thread uses a wire;
    only shut_down() may be called from another.
    """

    def __init__(self, sock: socket.socket, slot: Optional[Slot] = None) -> None:
        sock.setblocking(False)
        self.sock, self.number = sock, sock.fileno()
        self._slot = slot or Slot()
        self.waiter: Optional[Waiter] = None               # these three are kept by Slot
        self.is_armed = self.is_ready = False
        self._decrypted = getattr(sock, "pending", int)       # bytes that TLS has read ahead
        self._unwatched: Optional[Wire] = None         # it sent its next request: no more to learn
        self._room = READ_BYTES
        self.received = b""             # read from the socket and not yet used
        self.sent_bytes = 0

    def begin(self) -> None:
        """Begin an exchange: nothing is sent, and nobody watched."""
        self.sent_bytes, self._unwatched = 0, None

    def is_readable(self) -> bool:
        """Whether the socket has something to read, or has ended."""
        return bool(ready_of([self.sock], 0))

    def receive(self, timeout_s: float, watched: Optional[Wire] = None,
                most_bytes: int = LARGE_READ_BYTES) -> bytes:
        """Return some bytes, or b"" at the end. `watched` is a client to give up with.

        Raises: TimeoutError; OSError; ClientGone when the watched peer hangs up first.
        """
        if self.received:
            data, self.received = self.received, b""
            return data
        deadline_s = time.monotonic() + timeout_s
        if not self._decrypted():
            self._wait_to_read(deadline_s, watched)
        while True:
            try:
                data = self.sock.recv(self._room)
                break
            except (BlockingIOError, ssl.SSLWantReadError):
                self._wait_to_read(deadline_s, watched)
            except ssl.SSLWantWriteError:
                self._wait_to_write(deadline_s)
        self._room = min(4 * self._room, most_bytes) if len(data) == self._room else READ_BYTES
        return data

    def _wait_to_read(self, deadline_s: float, watched: Optional[Wire]) -> None:
        while True:
            wires = (self,) if watched is None or watched is self._unwatched else (self, watched)
            ready = self._slot.wait(wires, deadline_s)
            if not ready:
                raise TimeoutError("timed out")
            if self in ready:
                return
            if has_hung_up(watched.sock):
                raise ClientGone
            self._unwatched = watched

    def _wait_to_write(self, deadline_s: float) -> None:
        with self._slot.outside():
            ready = ready_of([self.sock], deadline_s - time.monotonic(), writing=True)
        if not ready:
            raise TimeoutError("timed out")

    def await_bytes(self, timeout_s: float, watched: Optional[Wire] = None) -> bool:
        """Wait until something came in; False if the peer closed first. Raises as receive()."""
        if not self.received:
            self.received = self.receive(timeout_s, watched)
        return bool(self.received)

    def await_line(self, deadline_s: float) -> bool:
        """Wait until a line began that is not empty (2.2); False if the peer closed first."""
        while True:
            if self.received[:1] == b"\r":
                self.received = self.received[_EMPTY_LINES.match(self.received).end():]
            if self.received not in (b"", b"\r"):
                return True
            begun, self.received = self.received, b""
            more = self.receive(deadline_s - time.monotonic())
            if not more:
                return False
            self.received = begun + more

    def read_head(self, deadline_s: float, watched: Optional[Wire] = None) -> bytes:
        """Read a message head, without the empty line that ends it, by a monotonic time.

        Raises: MalformedHttp beyond MAX_HEAD_BYTES; TimeoutError; OSError; EOFError inside it.
        """
        data, self.received, search_from = self.received, b"", 0
        while True:
            end = _HEAD_END.search(data, search_from)
            if end is not None and end[0] != b"\r\n\r\n":
                raise MalformedHttp("a line of the head does not end in CRLF")
            if end is not None and end.start() <= MAX_HEAD_BYTES:
                self.received = data[end.end():]
                return data[:end.start()]
            if len(data) > MAX_HEAD_BYTES:
                raise MalformedHttp(f"the head is longer than {MAX_HEAD_BYTES} bytes")
            more = self.receive(deadline_s - time.monotonic(), watched)
            if not more:
                raise EOFError("the connection ended inside a head")
            search_from = max(0, len(data) - 3)
            data += more

    def send(self, data: bytes, stall_s: float) -> None:
        """Write all of `data`. Raises TimeoutError after `stall_s` without progress, or where the
        peer reads more slowly than LEAST_BYTES_PER_S; OSError."""
        view = memoryview(data)
        slowest_s: Optional[float] = None      # once the peer has made us wait
        while view:
            try:
                sent = self.sock.send(view)
            except (BlockingIOError, ssl.SSLWantWriteError, ssl.SSLWantReadError) as err:
                now_s = time.monotonic()
                slowest_s = slowest_s or now_s + stall_s + len(view) / LEAST_BYTES_PER_S
                by_s = min(now_s + stall_s, slowest_s)
                if isinstance(err, ssl.SSLWantReadError):
                    self._wait_to_read(by_s, None)
                else:
                    self._wait_to_write(by_s)
            else:
                self.sent_bytes += sent
                view = view[sent:]

    def linger(self, most_s: float) -> None:
        """End our side and read on for a moment, so that a last answer is not reset away."""
        deadline_s = time.monotonic() + most_s
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)
            self.received = b""
            while self.receive(deadline_s - time.monotonic()):
                pass

    def shut_down(self) -> None:
        """End both directions, waking whoever waits on this wire."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)

    def forget(self) -> None:
        """Take the wire from its Slot, before its socket is closed."""
        self._slot.forget(self)

    def close(self) -> None:
        self.forget()
        with contextlib.suppress(OSError):
            self.sock.close()


class Claim:
    """What one request holds of the Memory of all. One thread uses it."""

    def __init__(self, memory: Memory, owner: str) -> None:
        self._memory, self.owner = memory, owner
        self.parts = {"body": 0, "answer": 0}
        self.size, self.is_small = 0, False            # these three are kept by Memory
        self.is_under_way = False

    def hold(self, size: int, part: str = "body") -> None:
        """Hold so much for a part, waiting for it if need be. Raises BodyTooLarge, ServerBusy, and
        then holds what it held before."""
        before, self.parts[part] = self.parts[part], size
        total = sum(self.parts.values())
        if self.size <= total <= self.size + UNCOUNTED_BYTES:
            self.is_under_way = True
            return
        try:
            self._memory.hold(self, total)
        except IroncageError:
            self.parts[part] = before
            raise

    def grow(self, size: int, part: str = "body") -> None:
        """Hold enough for a part that grows; more than that, so that it need not do so often."""
        if size > self.parts[part]:
            self.hold(size * 2, part)

    def give_back(self) -> None:
        self.parts = dict.fromkeys(self.parts, 0)
        if self.size:
            self._memory.hold(self, 0)


def out_of_memory() -> ServerBusy:
    """Return the error of a request that finds no room."""
    return ServerBusy("the memory for bodies is in use; try again in a moment, or start the proxy "
                      "with more --max-memory-mb", headers=[("retry-after", "2")])


class Memory:
    """The bytes that all bodies and answers in work may take together.

    A request that is under way may take all that is free, and is let in first. Of others a small
    one may take the part that is kept for small ones; any may take the rest, but for the last
    quarter of that an owner who holds something there already. They wait in order of arrival, the
    owner who holds least first: a flood of large bodies waits behind all others.
    """

    def __init__(self, limit_bytes: int, slot: Slot) -> None:
        bytes(FREED_BLOCK_BYTES)
        self.limit_bytes, self._slot = limit_bytes, slot
        self.small_bytes = limit_bytes // 4
        self.common_bytes = limit_bytes - self.small_bytes
        self._lock = threading.Lock()                  # guards the rest
        self._used = [0, 0]                            # of the common part, and by small ones
        self._held: Counter = Counter()                # of the common part, by owner
        self._queue: list[tuple[Claim, int, threading.Event]] = []
        self._is_closed = self._is_cut = False

    def hold(self, claim: Claim, size: int) -> None:
        """Let a claim hold so much. Raises BodyTooLarge where it never can, ServerBusy."""
        if size > (self.limit_bytes if claim.is_under_way else self.common_bytes):
            raise BodyTooLarge(
                f"this would take {size} bytes of memory, with what is made of it, and the proxy "
                f"may use {self.common_bytes} for one request; --max-memory-mb sets the limit")
        place = claim, size, threading.Event()
        with self._lock:
            if size < claim.size:
                self._set_locked(claim, size, claim.is_small)
            else:
                self._queue.append(place)
            self._let_in_locked()
            if size == claim.size:
                return
            is_full = sum(other.owner == claim.owner for other, *_ in self._queue) > MEMORY_QUEUE
            may_wait = self._may_wait_locked(claim) and (claim.is_under_way or not is_full)
        with self._slot.outside():
            place[2].wait(MEMORY_WAIT_S if may_wait else 0)
        with self._lock:
            if place in self._queue:
                self._queue.remove(place)
                self._let_in_locked()
                raise out_of_memory() if self._may_wait_locked(claim) else \
                    ServerBusy("the proxy is stopping")

    def close(self, *, cuts: bool = False) -> None:
        """Let nobody wait any more, but for requests that are under way, unless those are cut."""
        with self._lock:
            self._is_closed, self._is_cut = True, cuts
            for claim, _, wake in self._queue:
                if not self._may_wait_locked(claim):
                    wake.set()

    def _may_wait_locked(self, claim: Claim) -> bool:
        return not (self._is_cut if claim.is_under_way else self._is_closed)

    def _let_in_locked(self) -> None:
        """Give room to those in the queue who are next and fit; small ones pass a large one."""
        is_blocked = False
        for place in sorted(self._queue, key=lambda place: (
                not place[0].is_under_way, self._held[place[0].owner])):
            claim, size, has_room = place
            is_small = self._room_locked(claim, size)
            if is_small is None or (is_blocked and not is_small):
                is_blocked = True
                continue
            self._queue.remove(place)
            self._set_locked(claim, size, is_small)
            has_room.set()

    def _room_locked(self, claim: Claim, size: int) -> Optional[bool]:
        """Whether it is the room of the small ones that a claim fits into; None: it fits nowhere.
        """
        common, small = self._used
        if common + small - claim.size + size > self.limit_bytes:
            return None
        if claim.is_under_way:
            return False
        if size <= SMALL_CLAIM_BYTES and small + size <= self.small_bytes:
            return True
        part = self.common_bytes * 3 // 4 if self._held[claim.owner] else self.common_bytes
        return False if common + size <= part else None

    def _set_locked(self, claim: Claim, size: int, is_small: bool) -> None:
        self._used[claim.is_small] -= claim.size
        self._used[is_small] += size
        self._held[claim.owner] += size * (not is_small) - claim.size * (not claim.is_small)
        if not self._held[claim.owner]:
            del self._held[claim.owner]
        claim.size, claim.is_small, claim.is_under_way = size, is_small, True

    def as_json(self) -> dict:
        """Return what is in use, for the status."""
        with self._lock:
            return {"limit_bytes": self.limit_bytes, "reserved_bytes": sum(self._used),
                    "waiting": len(self._queue)}


# ==== 20. Upstream ==============================================================================
#
# The one place that opens connections. An ordinary urllib opener with handlers of ours, which
# keep connections alive: proxies from the environment and the system's CAs work as everywhere.
# No redirect is followed, nothing is retried: once a byte of a request is written, it is never
# written again. Keys travel in the headers that the Router made, to the URL that it made.


class KeepAliveHandler(urllib.request.BaseHandler):
    """urllib's http and https handlers, over pooled connections.

    `open` returns an UpstreamResponse for any status. Raises UpstreamUnreachable when nothing of
    the request was written, else UpstreamBroke or UpstreamTimedOut; ClientGone.
    """

    def __init__(self, timeouts: Timeouts, slot: Optional[Slot] = None) -> None:
        self._timeouts, self._slot = timeouts, slot or Slot()
        self._lock = threading.Lock()      # guards the three fields below
        self._idle: dict[tuple, list[tuple[float, Wire]]] = {}
        self._busy: set[Wire] = set()
        self._is_closed = False

    def http_open(self, request: UpstreamRequest) -> UpstreamResponse:
        """Make one exchange, on a connection that was kept or a new one; raises as said above."""
        headers, body, proxy_authorization = request.headers, request.body, None
        if request._tunnel_host:                     # else it is this request's own header
            proxy_authorization = headers.pop("Proxy-authorization", None)
        head = format_head(f"{request.method} {request.selector} HTTP/1.1", headers.items())
        place = (request.type, request.host, request._tunnel_host)
        for wire in self._idle_wires(place):
            response = self._exchange(wire, place, head, body, request)
            if response is not None:
                return response
        with self._slot.outside():
            wire = self._connect(request, proxy_authorization)
        response = self._exchange(wire, place, head, body, request)
        if response is None:
            raise UpstreamUnreachable("the provider closed the connection before the request")
        return response

    https_open = http_open

    def _idle_wires(self, place: tuple) -> Iterator[Wire]:
        """Yield pooled connections that are still open, newest first, each taken out of the pool.
        """
        while True:
            with self._lock:
                pooled = self._idle.get(place)
                since_s, wire = pooled.pop() if pooled else (0.0, None)
            if wire is None:
                return
            if time.monotonic() - since_s < POOL_IDLE_S and not wire.is_readable():
                yield wire
            else:
                wire.close()                # too old, or the provider closed it or sent bytes

    def _connect(self, request: UpstreamRequest, proxy_authorization: Optional[str]) -> Wire:
        """Open a connection, through a tunnel where urllib's ProxyHandler asked for one."""
        options: dict = {"timeout": self._timeouts.connect_s}
        headers = {"Proxy-Authorization": proxy_authorization} if proxy_authorization else {}
        try:
            if request.type == "https":
                connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                    request.host, context=self._tls_context, **options)
            else:
                connection = http.client.HTTPConnection(request.host, **options)
            if request._tunnel_host:
                connection.set_tunnel(request._tunnel_host, headers=headers)
            connection.connect()
        except (TimeoutError, socket.timeout) as err:       # two classes before Python 3.10
            raise UpstreamConnectTimedOut("connecting to the provider timed out") from err
        except (OSError, http.client.HTTPException, ValueError) as err:      # not a host name
            # An HTTP proxy's words are left out: they may repeat what it was sent.
            reason = type(err).__name__ if isinstance(err, http.client.HTTPException) else \
                re.sub(r"(?s)(Tunnel connection failed: \d+).*", r"\1", _reason(err))
            raise UpstreamUnreachable(f"the provider cannot be reached: {reason}") from err
        return Wire(connection.sock, self._slot)

    @functools.cached_property
    def _tls_context(self) -> ssl.SSLContext:
        context = ssl.create_default_context()
        context.set_alpn_protocols(["http/1.1"])
        return context

    def _exchange(self, wire: Wire, place: tuple, head: bytes, body: Sequence[bytes],
                  request: UpstreamRequest) -> Optional[UpstreamResponse]:
        """Send a request and read the head of its answer; None if no byte could be written."""
        wire.begin()
        with self._lock:
            self._busy.add(wire)
            closed = self._is_closed
        try:
            if closed:
                raise UpstreamUnreachable("the proxy is stopping")
            try:
                parts = [head, *body]
                is_small = sum(map(len, parts)) <= JOINED_WRITE_BYTES
                for part in [b"".join(parts)] if is_small else parts:
                    wire.send(part, self._timeouts.write_stall_s)
            except TimeoutError as err:
                raise UpstreamTimedOut("the provider stopped reading the request") from err
            except OSError:
                if not wire.sent_bytes:
                    self.give_back(wire, place, reusable=False)
                    return None
                # A provider may refuse a request, and close, before it has read all of it.
            response = UpstreamResponse(wire, place, self, self._timeouts, request)
        except BaseException:
            self.give_back(wire, place, reusable=False)
            raise
        return response

    def give_back(self, wire: Wire, place: tuple, *, reusable: bool) -> None:
        """End the use of a wire: into the pool, or closed, with one that was idle for long."""
        now_s, closing = time.monotonic(), wire
        with self._lock:
            self._busy.discard(wire)
            pooled = self._idle.setdefault(place, [])
            if reusable and not self._is_closed:
                pooled.append((now_s, wire))
                is_over = len(pooled) > POOLED_CONNECTIONS_PER_HOST \
                    or now_s - pooled[0][0] > POOL_IDLE_S
                closing = pooled.pop(0)[1] if is_over else None
        if closing is not None:
            closing.close()

    def shut_down(self) -> None:
        """Close idle connections and cut busy ones; their users get UpstreamBroke."""
        with self._lock:
            self._is_closed = True
            idle = [wire for pooled in self._idle.values() for _, wire in pooled]
            self._idle.clear()
            busy = [*self._busy]
        for wire in idle:
            wire.close()
        for wire in busy:
            wire.shut_down()


@functools.lru_cache(maxsize=64)
def _request_to(url: str) -> urllib.request.Request:
    """Return what urllib reads from a URL, kept since it is read from few of them again and again.
    """
    return urllib.request.Request(url)


class UpstreamRequest(urllib.request.Request):
    """A request to a provider. `body` is in pieces, `watched` the client's wire, whose hang-up
    ends the wait, and `key` what its answer must not hold."""
    _tunnel_host: Optional[str]              # the base class's, for a proxy on the way

    def __init__(self, url: str, *, method: str, headers: Mapping[str, str], body: Sequence[bytes],
                 watched: Optional[Wire], key: Optional[str] = None) -> None:
        vars(self).update(vars(_request_to(url)))
        self.body, self.method, self.watched, self.key = body, method, watched, key
        self.headers = {**headers}          # as they are: add_header() would capitalize each


ESCAPED_BYTES = 32                      # one character of a key, escaped again and again
OPEN_KEY_BYTES = ESCAPED_BYTES * (OPEN_KEY_CHARS + 1)
ESCAPE_BEGUN = re.compile(rb"\\(?:u[0-9A-Fa-f]{0,3})?\Z")
ESCAPE_LEVELS = 4                       # JSON within JSON within a URL within a URL


def _unescaped(text: bytes) -> bytes:
    """Return a text without the escapes of JSON and of URLs, nor those within them."""
    for _ in range(ESCAPE_LEVELS):
        escaped = text
        if b"%" in text or b"\\u00" in text:             # most have neither
            text = urllib.parse.unquote_to_bytes(text.replace(b"\\u00", b"%"))
        if text == escaped:
            break
    return text.replace(b"\\", b"")


def is_within(secret: str, text: str) -> bool:
    """Whether a text holds a secret, as it is or as JSON and URLs escape it."""
    return secret in text or _unescaped(secret.encode()) in _unescaped(text.encode())


KEY_IN_ANSWER = "the provider's answer repeats its key; it is not passed on"


def is_secret(key: Optional[str]) -> bool:
    """Whether a key is one, and not a word for a server that wants none, as "ollama"."""
    return key is not None and len(key) >= LEAST_KEY_CHARS


class KeyGuard:
    """Keeps a provider's key out of an answer of that provider, which may repeat it.

    It looks at what a client can make of the bytes: without their content-encoding, and without
    the escapes of JSON or of a URL. Asterisks take the key's place; a compressed body that holds
    it is refused, as is one that cannot be inflated. A read that ends in more than the key's first
    letters, or within an escape, waits for the next.
    """

    def __init__(self, key: Optional[str], encoding: str) -> None:
        self._raw = key.encode() if is_secret(key) else b""
        self._key = _unescaped(self._raw)
        self._inflate = inflating(encoding) if encoding != "identity" else None
        self._seen = b""                     # the end of the text before what waits
        self.waiting = b""                  # what is not passed on yet
        if self._key and encoding != "identity" and self._inflate is None:
            raise UpstreamBroke("the provider's answer has another content-encoding than gzip or "
                                "deflate: its key could be in it unseen, so it is not passed on")

    def read(self, pieces: list[bytes]) -> list[bytes]:
        """Return what may be passed on of one read. Raises UpstreamBroke."""
        if not self._key:
            return pieces
        came, at = b"".join(pieces), len(self._seen)
        if self.waiting:
            pieces = [self.waiting + came]
        if self._inflate is not None:
            text = self._inflated(came)
        else:
            text = self._seen + b"".join(pieces)
            if self._is_in(text):
                text = self._masked(text)
                pieces = [text[at:]]
                if self._is_in(text):
                    raise UpstreamBroke(KEY_IN_ANSWER)
        waits = self._must_wait(text)
        self.waiting = b"".join(pieces) if waits else b""
        self._seen = text[-OPEN_KEY_BYTES:] if not waits else \
            text if self._inflate is not None else self._seen
        return [] if waits else pieces

    def _inflated(self, came: bytes) -> bytes:
        """Return the end of the text, with what came inflated. Raises UpstreamBroke."""
        text = self._seen
        try:
            for step in self._inflate(came):
                text += step
                if self._is_in(text):
                    raise UpstreamBroke(KEY_IN_ANSWER)
                text = text[-ESCAPED_BYTES * len(self._key):]
        except (zlib.error, OverflowError):
            raise UpstreamBroke("the provider's answer cannot be inflated: its key could be in it "
                                "unseen, so it is not passed on") from None
        return text

    def kept(self, headers: Headers) -> Headers:
        """Return the headers that may be passed on: none under a name of ours, and none that holds
        the key, in its name either."""
        lines = "\n".join(map(": ".join, headers))
        if OWN_HEADERS not in lines and not self._is_in_line(lines):
            return headers
        return Headers(pair for pair in headers if not pair[0].startswith(OWN_HEADERS)
                       and not self._is_in_line(": ".join(pair)))

    def _is_in_line(self, line: str) -> bool:
        """Whether the key stands in a header, in letters of any case: names lose theirs."""
        text = _unescaped(line.encode("latin-1"))
        return bool(self._key) and self._key.lower() in text.lower()

    def _is_in(self, text: bytes) -> bool:
        return self._raw in text or self._key in _unescaped(text)

    def _masked(self, text: bytes) -> bytes:
        """Return a text with asterisks in place of the key, one a byte: lengths are stated already.
        """
        code = rb"(?:u00|%)(?:25)*"
        chars = (rb"(?:\\|%b5[Cc]){0,15}(?:%b|%b(?i:%02x))" % (
            code, re.escape(bytes([char])), code, char) for char in self._key)
        return re.sub(b"".join(chars), lambda key: b"*" * len(key[0]), text)

    def _must_wait(self, text: bytes) -> bool:
        """Whether a text ends within an escape, or in more of the key than may be known."""
        if ESCAPE_BEGUN.search(text[-8:]):              # cut there, asterisks would break it
            return True
        tail = _unescaped(text[-ESCAPED_BYTES * len(self._key):])
        if self._key[:OPEN_KEY_CHARS + 1] not in tail:
            return False
        begun = len(tail) - len(re.search(rb"(?:[%u][%u0-9A-Fa-f]*)?\Z", tail[-8:])[0])
        return any(tail.endswith(self._key[:size], 0, end)
                   for end in range(begun, len(tail) + 1)
                   for size in range(OPEN_KEY_CHARS + 1, len(self._key)))


class UpstreamResponse:
    """The answer of a provider: status and headers at once, the body as it arrives."""

    def __init__(self, wire: Wire, place: tuple, pool: KeepAliveHandler, timeouts: Timeouts,
                 request: UpstreamRequest) -> None:
        self._wire, self._place, self._pool, self._timeouts = wire, place, pool, timeouts
        self._watched = request.watched
        self._deadline_s = time.monotonic() + timeouts.call_s
        self._is_open = True
        try:
            self.status, self._reusable, self.headers = self._read_head()
            bodiless = request.method == "HEAD" or self.status in BODILESS_STATUSES
            self.stated_length = body_length(self.headers, otherwise=0 if bodiless
                                             else UNTIL_CLOSE)
        except SOCKET_FAILURES as err:
            raise upstream_failure(err) from err
        self._reusable &= not bodiless       # some servers send a body there, and it comes later
        self._decoder = BodyDecoder(0 if bodiless else self.stated_length)
        self._guard = KeyGuard(request.key, "identity" if self._decoder.is_done
                               else content_encoding(self.headers))
        self.headers = self._guard.kept(self.headers)

    def _read_head(self) -> tuple[int, bool, Headers]:
        first_byte_by_s = min(time.monotonic() + self._timeouts.first_byte_s, self._deadline_s)
        for _ in range(MAX_INTERIM_ANSWERS):
            if not self._wire.await_bytes(first_byte_by_s - time.monotonic(), self._watched):
                raise UpstreamBroke("the provider closed the connection without an answer")
            head_by_s = min(time.monotonic() + self._timeouts.between_bytes_s, self._deadline_s)
            head = self._wire.read_head(head_by_s, self._watched).decode("latin-1")
            first, end, rest = head.partition("\r\n")
            line = _STATUS_LINE.fullmatch(first)
            if line is None:
                raise UpstreamBroke("the provider's answer is not HTTP/1.1")
            status, headers = int(line[2]), parse_headers(rest + end)
            if status == 101 or status < 100:
                raise UpstreamBroke(f"the provider answered with the status {status}")
            if status >= 200:
                return status, line[1] == "1" and "close" not in headers.options, headers
        raise UpstreamBroke(f"the provider sent {MAX_INTERIM_ANSWERS} interim answers and no other")

    def reads(self, tick_s: float = threading.TIMEOUT_MAX) -> Iterator[list[bytes]]:
        """Yield the body: for each read from the socket, its pieces, split as the provider split
        them; and an empty list after each `tick_s` without a byte.

        Raises: UpstreamBroke when the body ends early; UpstreamTimedOut; ClientGone.
        """
        decoder = self._decoder
        last_s = time.monotonic()
        while not decoder.is_done:
            now_s = time.monotonic()
            left_s = min(self._deadline_s, last_s + self._timeouts.between_bytes_s) - now_s
            try:
                if self._deadline_s <= now_s:              # though bytes may be there
                    raise TimeoutError
                data = self._wire.receive(min(left_s, tick_s), self._watched)
                pieces = decoder.feed(data) if data else []
            except SOCKET_FAILURES as err:
                if isinstance(err, TimeoutError) and left_s > tick_s:
                    yield []
                    continue
                raise upstream_failure(err) from err
            last_s = time.monotonic()
            if pieces:
                yield self._guard.read(pieces)
            if not data:
                self._reusable = False
                if not decoder.end():
                    raise UpstreamBroke("the provider's answer broke off")
                break
        if self._guard.waiting:
            yield [self._guard.waiting]

    def close(self) -> None:
        """Give the connection back: to be used again if the body was read to its end."""
        if self._is_open:
            self._is_open = False
            whole = self._decoder.is_done and not self._decoder.rest and not self._wire.received
            self._pool.give_back(self._wire, self._place, reusable=whole and self._reusable)


def whole_body(reads: Iterable[list[bytes]], most_bytes: int,
               see: Callable[[list[bytes]], None] = lambda read: None,
               grow: Callable[[int], Any] = abs) -> tuple[bytes, bool]:
    """Return all of an answer's body, or as much as there is room for, and whether it is all.

    Each read is shown to `see`; `grow` is called with the size while it grows. What is left can
    still be read. Raises UpstreamError.
    """
    body = bytearray()
    for read in reads:
        see(read)
        body += b"".join(read)
        try:
            grow(len(body))
        except (BadRequest, ServerBusy):
            return body, False
        if len(body) > most_bytes:
            return body, False
    return body, True


SOCKET_FAILURES = (OSError, EOFError, MalformedHttp)          # TimeoutError is an OSError


def upstream_failure(err: Exception) -> UpstreamError:
    """Return what one of SOCKET_FAILURES means for a call that was already sent."""
    if isinstance(err, TimeoutError):
        return UpstreamTimedOut("the provider did not answer in time")
    if isinstance(err, MalformedHttp):
        return UpstreamBroke(f"the provider's answer is malformed: {err.message}")
    if isinstance(err, EOFError):
        return UpstreamBroke("the provider's answer broke off")
    return UpstreamBroke(f"the connection to the provider broke: {_reason(err)}")


class EnvironmentProxies(urllib.request.ProxyHandler):
    """HTTPS_PROXY, HTTP_PROXY and NO_PROXY as urllib reads them, but never for this machine."""

    def proxy_open(self, req: urllib.request.Request, proxy: str, type: str) -> Any:
        host = urllib.parse.urlsplit(f"//{req.host}").hostname or ""
        return None if LOOPBACK_HOST.fullmatch(host) else super().proxy_open(req, proxy, type)


def build_opener(transport: KeepAliveHandler) -> urllib.request.OpenerDirector:
    """Make the opener for all upstream calls: no redirects, no cookies, no error processing."""
    opener = urllib.request.OpenerDirector()
    opener.add_handler(EnvironmentProxies())
    opener.add_handler(transport)
    return opener


def posted(opener: urllib.request.OpenerDirector, url: str, body: bytes, key: Optional[str] = None,
           headers: Mapping[str, str] = MappingProxyType({})) -> UpstreamResponse:
    """POST JSON to a server that is no provider. Raises UpstreamError."""
    headers = {"host": urllib.parse.urlsplit(url).netloc, "content-type": "application/json",
               "content-length": str(len(body)), "accept-encoding": "identity",
               "user-agent": f"ironcage_proxy/{__version__}", **headers}
    return opener.open(UpstreamRequest(url, method="POST", body=[body], headers=headers,
                                       watched=None, key=key))


# How a key begins that only one provider makes: their SDKs and consoles, read November 2026.
KEY_FORMS = re.compile("(?P<anthropic>sk-ant-)|(?P<openrouter>sk-or-)|(?P<openai>sk-proj-)|"
                       "(?P<groq>gsk_)|(?P<gemini>AIza)|(?P<xai>xai-)|(?P<perplexity>pplx-)")


def check_key(provider: Provider) -> None:
    """Raises NoProviderKey, naming the environment variable to set, where there is no key, or at a
    provider's own address one that another made."""
    where = f"{provider.key_env} in the proxy's environment"
    if provider.key is None and provider.key_env:
        raise NoProviderKey(f"no key for the provider {provider.name} is known: set {where}")
    form, known = KEY_FORMS.match(provider.key or ""), KNOWN_PROVIDERS.get(provider.name)
    maker = form and form.lastgroup
    if maker and known and maker != provider.name \
            and provider.base_url in (known.base_url, known.anthropic_base_url):
        raise NoProviderKey(
            f"the key of the provider {provider.name} is one of {maker}'s, by how it begins, and "
            f"was not sent: set it as {KNOWN_PROVIDERS[maker].key_env}, and {provider.name}'s own "
            f"as {where}")


def anthropic_betas(head: RequestHead, added: Iterable[str]) -> str:
    """Return the features of Anthropic that a call asks for: its client's, and those we add."""
    asked = head.headers.get("anthropic-beta") or ""
    return ",".join(filter(None, [asked, *(beta for beta in added if beta not in asked)]))


def offered_tokens(headers: Headers) -> list[str]:
    """Return what a client shows to be let in."""
    scheme, _, bearer = headers.get("authorization", "").partition(" ")
    offered = [bearer.strip()] if scheme.lower() == "bearer" else []
    return [*filter(None, (*offered, headers.get("x-api-key")))]


def is_token_in_path(head: RequestHead) -> bool:
    """Whether a path holds a client's token, and not a word that is one as well."""
    return any(is_secret(token) and is_within(token, head.path)
               for token in offered_tokens(head.headers))


def check_target(head: RequestHead) -> None:
    """Raises BadRequest where a client's token would travel on in the URL."""
    if is_token_in_path(head) or any(len(token) >= 8 and is_within(token, head.query or "")
                                     for token in offered_tokens(head.headers)):
        raise BadRequest("the token belongs in the Authorization header: the URL, which holds it "
                         "too, goes to the provider; take it out there")


def upstream_headers(head: RequestHead, provider: Provider, body_bytes: int,
                     translator: Optional[Translator] = None,
                     added_betas: Iterable[str] = ()) -> dict[str, str]:
    """Return the headers of an upstream call: the client's end-to-end ones, and the provider's key.

    The client's token stays behind in whatever header it stands. A translated call is the proxy's
    own: what one vendor's clients say to it stays behind, but for the features of Anthropic that a
    client of OpenAI's names.
    """
    headers = {name: value for name, value in head.headers.values.items()
               if name not in REQUEST_HEADERS_KEPT_BACK and not name.startswith(KEPT_BACK_BEGIN)
               and not name.endswith(LOCAL_HEADERS_END)}
    kept_back = [*head.headers.options]
    for token in offered_tokens(head.headers):
        if len(token) >= 8 and is_within(token, "\n".join(headers.values())):        # as each has
            kept_back += [name for name, value in headers.items() if is_within(token, value)]
    if translator is not None:
        kept_back += filter(VENDOR_HEADER.match, headers)
    for name in kept_back:
        headers.pop(name, None)
    headers = {"host": provider.host, **headers, **provider.credentials()}
    if provider.format == "anthropic":
        betas = anthropic_betas(head, added_betas)
        headers.update({"anthropic-beta": betas} if betas else {})
        headers.setdefault("anthropic-version", DEFAULT_ANTHROPIC_VERSION)
    headers["accept-encoding"] = "identity"
    if body_bytes or head.method in BODY_METHODS:
        headers["content-length"] = str(body_bytes)
        headers.setdefault("content-type", "application/json")
    return headers


def answer_headers(headers: Headers) -> list[tuple[str, str]]:
    """Return the end-to-end headers of an answer."""
    return [(name, value) for name, value in headers
            if name not in ANSWER_HEADERS_KEPT_BACK and name not in headers.options]


def own_ids(request_id: str) -> Sequence[tuple[str, str]]:
    """Return the headers in which SDKs look for an answer's id, for one that is ours."""
    return ("x-request-id", request_id), ("request-id", request_id)


def translated_rate_limits(headers: Iterable[tuple[str, str]],
                           upstream_api: str) -> list[tuple[str, str]]:
    """Return a provider's headers with its rate limits in the other vendor's names and forms."""
    to_openai = upstream_api == "messages"
    names = {(ours if to_openai else theirs): (theirs if to_openai else ours)
             for ours, theirs in RATE_LIMIT_HEADERS}
    now_s = int(time.time())
    translated = []
    for name, value in headers:
        if name in names and "reset" in name:
            try:
                value = f"{max(0, parse_time(value) - now_s)}s" if to_openai \
                    else utc_text(now_s + duration_s(value))
            except ValueError:
                continue                           # a form that is not known says nothing
        translated.append((names.get(name, name), value))
    return translated


# How agents learn that their money ends: API of the client -> (family of the provider's headers,
# which would speak of the key's quota instead; what is used, of 1 or of 100; the step passed; when
# it begins anew). Source: the gateway protocol in Claude Code 2.1.332, and Codex 0.171.0, both
# seen on their screens in November 2026. Claude Code wants less than 1 while calls are admitted.
NOTICES = MappingProxyType({
    "messages": ("anthropic-ratelimit-unified-", "overage-utilization", "0.{:02d}",
                 "overage-surpassed-threshold", "overage-reset"),
    "responses": ("x-codex-primary-", "used-percent", "{}", None, "reset-at"),
})
NOTICE_STEPS = ((95, "0.95"), (75, "0.75"))           # percent, as the headers say it


def with_notice(headers: Iterable[tuple[str, str]], api: str,
                standings: Iterable[tuple[int, int, Optional[int]]]) -> list[tuple[str, str]]:
    """Return an answer's headers with those by which agents show that a limit comes near.

    `standings` are (used, limit, when it begins anew); the one with the highest share is shown.
    """
    headers = [*headers]
    shares = [(Fraction(used, limit) if limit else Fraction(1), reset_s)
              for used, limit, reset_s in standings]
    share, reset_s = max(shares, key=operator.itemgetter(0), default=(Fraction(0), None))
    percent = int(share * 100)
    step = next((text for least, text in NOTICE_STEPS if percent >= least), None)
    if step is None:
        return headers
    family, used, form, passed, reset = NOTICES[api]
    shown = [(used, form.format(min(percent, 99))), (passed, step), (reset, reset_s)]
    return [(name, value) for name, value in headers if not name.startswith(family)] \
        + [(family + name, str(value)) for name, value in shown if None not in (name, value)]


def duration_s(text: str) -> int:
    """Return whole seconds of "1s", "6m0s" or "120ms", rounded up. Raises ValueError."""
    match = re.fullmatch(r"(?:(\d{1,5})h)?(?:(\d{1,6})m(?!s))?(?:(\d{1,9})(?:\.\d+)?s)?"
                         r"(?:(\d{1,9})ms)?", text, re.ASCII)
    if match is None or not text:
        raise ValueError("not a duration")
    hours, minutes, seconds, _ = (int(part or 0) for part in match.groups())
    return hours * 3600 + minutes * 60 + seconds + ("." in text or match[4] is not None)


# ==== 21. Settlement ============================================================================
#
# What a call is charged, from how it ended: one pure function, charge_of(). A charge is a bill,
# whose lines add up to it; the ledger keeps them, so that `audit` can add them up again. What ends
# without exact usage costs the most that it can have used until then: one rule, _most_bill().
# Assumed: no answer makes more tokens a second than the tables below say, and SOON_NS.


class ClientRequest(NamedTuple):
    """A request of an authenticated client, read whole."""
    head: RequestHead
    body: bytes
    request_id: str
    caller: Caller
    memory: Claim

    @property
    def dialect(self) -> str:
        return dialect_of(self.head.path, self.head.headers.values)

    @property
    def scopes(self) -> tuple[str, ...]:
        """Return the scopes that it belongs to beside the proxy's: its token's, and its session's
        where the token caps each."""
        caller = self.caller
        return caller.scopes if caller.session_budget_microdollars is None else (
            *caller.scopes, session_scope(caller.name, self.attribution["session"]))

    def parsed(self, other: Optional[bytes] = None, beside: int = 0) -> JsonBody:
        """Read its body as JSON, or another that is sent in its place, while `beside` bytes are
        held for others. Raises BadRequest, ServerBusy."""
        raw, hold = self.body if other is None else other, self.memory.hold
        body = parse_json_object(raw, lambda size: hold(beside + len(raw) + size))
        hold(max(0, self.memory.parts["body"] - len(body.text)))        # as it was decoded
        return body

    @property
    def attribution(self) -> dict[str, Optional[str]]:
        return attribution_of(self.head.headers)


class Call:
    """One metered call from its admission to its settlement. One thread uses it."""

    prices: PriceBook                                 # what it was admitted by: it settles by it
    price: Optional[Price] = None                     # None: unpriced, and no budget is set
    bound: Optional[Bound] = None                     # None: it has no bound, and no budget is set
    translator: Optional[Translator] = None           # where the provider speaks another API
    scopes: tuple[str, ...] = ()                      # that it was admitted in
    reservation: Optional[Reservation] = None         # set by its admission
    set_output_cap: Optional[int] = None              # the cap that we put into the request
    set_hosted_uses: Optional[int] = None             # likewise
    prompt: Optional[Prompt] = None                   # as digests, once they were needed
    added_betas: tuple[str, ...] = ()                 # beside those of its anthropic-beta header
    hides_usage = False                               # the client did not ask for usage chunks
    was_sent = False                                  # the provider may have seen it
    status: Optional[int] = None                      # of the provider's answer
    first_byte_ms: Optional[int] = None               # from sending to the head of the answer
    provider_request_id: Optional[str] = None
    heard_s = 0.0                                     # when its client last heard something
    failed_ns = 0                                     # when an error came in its stream
    client_left = False
    charge: Optional[Charge] = None                   # set when it is settled
    row: Optional[dict] = None                        # in the ledger, once the intent is written

    def __init__(self, request: ClientRequest, provider: Provider, api: str, model: str,
                 body: JsonBody) -> None:
        self.request, self.provider, self.api, self.body = request, provider, api, body
        self.model = model                            # the name that goes upstream
        self.losses = Losses()                        # what a translator could not carry over
        self.wants_stream = optional_flag(body.fields, "stream")
        choices = 1
        with contextlib.suppress(BadRequest):         # an odd number is the provider's to refuse
            choices = _choices(api, body.fields)
        self.meter = AnswerMeter(api, choices)
        self.sent_ns = time.monotonic_ns()            # set anew as it is sent

    def intent_row(self) -> dict:
        """Return the ledger's row as it is before the call is sent."""
        return {**_NO_ROW, **self.request.attribution, "request_id": self.request.request_id,
                "admitted_s": self.reservation.admitted_s, "token": self.request.caller.name,
                "provider": self.provider.name, "model": ascii(self.model[:256])[1:-1],
                "price_key": self.price.key if self.price is not None else None,
                "api": self.api, "stream": int(self.wants_stream),
                "bound_microdollars": self.reservation.microdollars}

    @property
    def client_api(self) -> str:
        """Return the API that its client speaks."""
        return self.api if self.translator is None else self.translator.client_api

    @property
    def has_failed(self) -> bool:
        return self.status is None or not 200 <= self.status < 300 \
            or self.meter.failure is not None


def reserved_in_full(call: Call) -> list[BillLine]:
    """Return the bill of a call that costs what was set aside for it."""
    return [("reserved", call.reservation.microdollars, PICODOLLARS_PER_MICRODOLLAR)]


# The most output tokens a second that one answer is assumed to make; a row is well above what its
# source states. Its name is looked for in the provider's name and in its host.
MOST_TOKENS_PER_S = 1_000
PROVIDER_TOKENS_PER_S = (
    ("cerebras", 4_000),     # about 3,000, gpt-oss-120b: inference-docs.cerebras.ai, October 2026
    ("groq", 2_000),         # 1,000, gpt-oss-20b: console.groq.com/docs/models, 2026
    ("sambanova", 3_000),    # 2,382, Llama 3.2 1B: its record, 2024; up to 717 in May 2026
    ("inception", 2_000),    # "more than 1,000", mercury-2: openrouter.ai, March 2026
    ("openrouter", 4_000),   # it can send a call to any of these: its `:nitro`, 2026
    ("huggingface", 4_000),  # so can its router: huggingface.co/docs/inference-providers, 2026
)
# By service tier or Anthropic's `speed`; asked for, the provider's default, or the one that served.
TIER_TOKENS_PER_S = MappingProxyType({
    "fast": 2_500,           # "up to 2.5 times": platform.claude.com, fast mode, November 2026
    "priority": 2_500,       # the same, under the former name: openai.com/api-fast-mode, 2026
    "performance": 2_500,    # Groq's; no figure is stated, taken as fast
    "ultrafast": 8_000,      # "up to 8 times": developers.openai.com, ultrafast mode, 2026
})
# An error that comes this soon, before any output or usage, is taken as not billed; an unstreamed
# call that breaks off later without a byte, as one that its provider may finish unseen.
SOON_NS = 10 * 10 ** 9
# A gateway's word that it has no answer of the provider's, who may go on (524: Cloudflare's).
NO_ANSWER_STATUSES = frozenset({502, 504, 524})


def tokens_per_s(call: Call) -> int:
    """Return the most output tokens a second in each choice of a call."""
    provider, fields = call.provider, call.body.fields
    if provider.max_output_tokens_per_s is not None:
        return provider.max_output_tokens_per_s
    place = f"{provider.name} {provider.host}".lower()
    tiers = (fields.get("service_tier"), fields.get("speed"), provider.default_service_tier,
             call.meter.service_tier)
    return max(MOST_TOKENS_PER_S,
               *(speed for name, speed in PROVIDER_TOKENS_PER_S if name in place),
               *(TIER_TOKENS_PER_S.get(tier, 0) for tier in tiers if isinstance(tier, str)))


def charge_of(call: Call, prices: PriceBook, elapsed_ns: int) -> Charge:
    """Return what a call costs, from how it ended. Pure.

    Nothing: not sent; refused without usage; ended soon by an error before all else, in a stream or
    in a 200.
    Exactly: by final usage, which for a call that loops at the provider has its input.
    Its reservation: not streamed, and broken off late without a byte, which a gateway may say.
    All else: _most_bill().
    """
    meter, is_soon = call.meter, elapsed_ns <= SOON_NS
    gave_up = not is_soon and call.status in NO_ANSWER_STATUSES
    refused = call.status is not None and not 200 <= call.status < 300 and not gave_up
    reported = meter.usage is not None or meter.malformed is not None
    if not call.was_sent or (refused and not reported) \
            or (meter.failure is not None and meter.is_blank and is_soon):
        return Charge()
    reason = ""
    if meter.usage_is_final and (meter.input_is_last or not (call.bound and call.bound.loops)):
        try:
            return _metered_bill(call, prices, meter.usage, meter.reported)
        except UnpricedModel:
            reason = "a model without a price served it" if call.price is not None \
                else "no price is known"
    broke_off = meter.is_blank and not is_soon and not meter.body_has_ended
    if (broke_off or gave_up) and not call.wants_stream:
        return Charge(reserved_in_full(call), reason or _end_of(call))
    return Charge(_most_bill(call, prices, elapsed_ns), reason or _end_of(call))


def _end_of(call: Call) -> str:
    """Say in a few words how a call without exact usage ended."""
    meter = call.meter
    ends = ((meter.malformed is not None, f"malformed usage: {meter.malformed}"),
            (call.client_left, "client gone"),
            (call.status is None or call.status in NO_ANSWER_STATUSES, "no answer"),
            (meter.failure is not None,
             f"an error in the {'stream' if call.wants_stream else 'answer'}"),
            (not (meter.has_ended or meter.body_has_ended), "the answer broke off"))
    return next((reason for is_so, reason in ends if is_so), "no usage in the answer")


def _most_bill(call: Call, prices: PriceBook, elapsed_ns: int) -> Sequence[BillLine]:
    """Bill the most that a call without exact usage can have cost.

    Input: as reported, else its bound and all fees. Output, in each choice: a token is at least a
    byte of what was seen; what was not seen (reasoning, read-ahead) was made since sending, at
    tokens_per_s(); never more than was reserved, and never less than was reported.
    """
    meter, bound, usage = call.meter, call.bound, call.meter.usage or {}
    reported = meter.reported
    knows_input = bound is None or (reported.prompt_tokens and "iterations" not in usage and (
        not bound.loops or (meter.input_is_last and meter.usage_is_last)))
    lines: Sequence[BillLine] = ()
    if knows_input:
        of_output = ("output_", "completion_", "total_") if bound is not None else ()
        with contextlib.suppress(UnpricedModel):
            lines = _metered_bill(call, prices, {
                **NO_TOKENS, **{name: usage[name] for name in usage
                                if not name.startswith(of_output)}}).lines
    if bound is None:                                   # nothing was reserved
        return lines
    if not lines:
        lines = [("input at most", 1, bound.input_picodollars)]
        if bound.fees_picodollars:
            lines.append(("fees at most", 1, bound.fees_picodollars))
    choices = _choices(call.api, call.body.fields)
    made = max(-(-meter.output_bytes // choices),
               -(-elapsed_ns * tokens_per_s(call) // 10 ** 9))
    output_tokens = max(-(-reported.completion_tokens // choices),
                        min(call.reservation.output_cap + bound.reasoning_tokens, made))
    return [*lines, ("output at most", output_tokens + bound.unlimited_output_tokens,
                     bound.output_picodollars)]


def _metered_bill(call: Call, prices: PriceBook, stated: Mapping[str, Any],
                  usage: Optional[Usage] = None) -> Charge:
    """Make the bill of a usage object: by the answer's model, tier, speed and place; where it names
    none, or names a model that this provider does not sell, by the request's. Raises UnpricedModel.
    """
    asked, answered, served = call.body.fields, call.meter.model, call.meter.service_tier
    sold = prices.find(answered, call.provider.name) if answered is not None else None
    knows = sold is not None and (call.price is None or sold.provider == call.price.provider)
    if served in (None, "auto"):
        served = asked.get("service_tier")
        if served in (None, "auto"):
            served = call.provider.default_service_tier
        if served in ("flex", "batch") or not isinstance(served, str):
            served = None                         # a discount has to be stated
    if call.api == "messages":
        stated = {**{name: asked.get(name) for name in ("speed", "inference_geo")},
                  **{name: value for name, value in stated.items() if value is not None}}
    return prices.bill(answered if knows else call.model, stated, api=call.api,
                       provider=call.provider.name, service_tier=served,
                       data_residency=call.provider.data_residency,
                       tool_calls=call.meter.tool_calls, held=kinds_held(call.body), usage=usage)


def count_scope(call: Call) -> tuple[str, str, str]:
    """Say whose counts a call's are: those of its token, provider and model."""
    return call.request.caller.name, call.provider.name, call.model


def call_prompt(call: Call) -> Optional[Prompt]:
    """Return a call's prompt as digests, made once; None where no count of it can be known, or
    where there is no memory for the copies that they are made of."""
    if call.prompt is None:
        headers, memory = call.request.head.headers, call.request.memory
        before, copies = memory.parts["body"], 2 if call.body.text.isascii() else 6      # escaped
        try:
            memory.hold(before + copies * len(call.body.text))
            call.prompt = prompt_of(call.api, call.body, (
                *count_scope(call), anthropic_betas(call.request.head, call.added_betas),
                headers.get("openai-beta") or ""))
        except (BodyTooLarge, ServerBusy):
            return None
        finally:
            memory.hold(before)
    return call.prompt


def counts_of(call: Call, now_s: int) -> list[CountRow]:
    """Return what the exact usage of a settled call teaches of its prompt, and of its response."""
    meter, charge = call.meter, call.charge
    if charge.estimated is not None or not charge.lines or call.has_failed \
            or meter.changed_its_input or "iterations" in (meter.usage or {}) \
            or meter.model is None or not call.reservation.is_limited \
            or (call.api != "responses" and len(call.body.raw) < LEAST_COUNTED_BYTES):
        return []
    counted, learned = meter.reported, []
    if call.api == "responses" and meter.answer_id is not None \
            and call.body.fields.get("truncation") in (None, "disabled"):
        learned.append((response_digest(meter.answer_id, call.body.fields),
                        Counted(counted.prompt_tokens + counted.completion_tokens)))
        if call.provider.name == "openai":         # whose ids are never a client's own: assumed
            learned += [(_digest("item", item), Counted(
                counted.completion_tokens, frozenset({_digest("response", meter.answer_id)})))
                for item in meter.item_ids if counted.completion_tokens]
    prompt = call_prompt(call) if len(call.body.raw) >= LEAST_COUNTED_BYTES else None
    if prompt is not None and prompt.is_stable and prompt.chain:
        learned.append((prompt.chain[-1], Counted(counted.prompt_tokens, frozenset(prompt.parts),
                                                  prompt.has_tools)))
    scope = json.dumps(count_scope(call))
    return [CountRow(scope, digest, known, meter.model, now_s) for digest, known in learned]


def complete_row(row: dict, call: Call, charge: Charge, elapsed_ns: int) -> None:
    """Fill the settlement's columns of a ledger row."""
    usage = None if call.meter.usage is None else call.meter.reported
    counts = (None, None, None) if usage is None else (
        usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens)
    row.update(
        zip(TOKEN_COUNTS, counts), settled_ms=time.time_ns() // 10 ** 6, status=call.status,
        cost_microdollars=charge.microdollars, estimated=charge.estimated,
        usage=call.meter.usage, lines=charge.lines, latency_ms=elapsed_ns // 10 ** 6,
        provider_request_id=call.provider_request_id, first_byte_ms=call.first_byte_ms)


# ==== 22. Events and metrics ====================================================================
#
# What happened, for those who watch: values for `on_event`, counts for the status, text for
# Prometheus. Nothing here holds a secret, a prompt or an answer. The first five are the original's.


class LlmRequestCompleted(NamedTuple):
    """A call that a provider answered with success, settled. Times in milliseconds."""
    agent_id: str                  # the token's name, or --agent-id
    provider_id: str               # --provider-id, or the provider's name
    request_id: str
    model: str
    provider: str
    input_tokens: int
    output_tokens: int
    cost_micros: int
    is_estimated: bool
    duration_ms: int


class LlmRequestFailed(NamedTuple):
    """A call that failed, settled: by the provider's status, or without an answer."""
    agent_id: str
    provider_id: str
    request_id: str
    model: str
    provider: str
    error_code: Optional[int]      # the provider's HTTP status; None: there was no answer
    error_message: str
    cost_micros: int
    duration_ms: int


class BudgetThresholdReached(NamedTuple):
    """The proxy's spend passed 50, 80, 90 or 100 percent of its limit."""
    percent: int
    spent_microdollars: int
    limit_microdollars: int


class RouterStarted(NamedTuple):
    """The proxy serves."""
    port: int
    limit_microdollars: Optional[int]


class RouterStopped(NamedTuple):
    """The proxy has stopped, and everything is settled. Totals since its start."""
    requests: int
    failed_requests: int
    input_tokens: int
    output_tokens: int
    spent_microdollars: int


Event = Union[LlmRequestCompleted, LlmRequestFailed, BudgetThresholdReached, RouterStarted,
              RouterStopped]
BUDGET_THRESHOLDS = (50, 80, 90, 100)
# Upper bounds of the histograms' buckets, in milliseconds.
HISTOGRAM_MS = (10, 50, 100, 250, 500, 1_000, 2_500, 5_000, 10_000, 30_000, 60_000, 300_000)
HISTOGRAM_BOUNDS = (*(f"{most / 1000:g}" for most in HISTOGRAM_MS), "+Inf")       # in seconds


def event_name(event: Event) -> str:
    """Return "llm_request_completed" for LlmRequestCompleted."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", type(event).__name__).lower()


def bucket_of(milliseconds: int) -> str:
    """Return the bucket of a histogram that a time falls into, by its upper bound in seconds."""
    return HISTOGRAM_BOUNDS[bisect.bisect_left(HISTOGRAM_MS, milliseconds)]


class Counts(NamedTuple):
    """What is counted of calls."""
    requests: int = 0
    failed_requests: int = 0
    refused_requests: int = 0                         # by a limit: of spend, rate or places
    estimated_requests: int = 0                       # charged by an estimate
    input_tokens: int = 0
    cached_input_tokens: int = 0
    output_tokens: int = 0
    cost_microdollars: int = 0

    def plus(self, other: Counts) -> Counts:
        return Counts(*map(operator.add, self, other))


class Totals:
    """Counts since the start, by model, provider and token. Names come from closed sets."""

    def __init__(self) -> None:
        self._lock = threading.Lock()                 # guards the fields below
        self._cells: dict[tuple[str, str, str], Counts] = {}      # (token, provider, model)
        self._seen: Counter = Counter()               # (metric, label, label) for metrics()

    def add(self, names: tuple[str, str, str], counts: Counts,
            observed: Iterable[tuple] = ()) -> None:
        """Add counts for a (token, provider, model), of which the last two may be ""; and count
        each (metric, label, ...) once, for metrics()."""
        with self._lock:
            before = self._cells.get(names)
            self._cells[names] = counts if before is None else before.plus(counts)
            self._seen.update(observed)

    def observe(self, observation: tuple) -> None:
        """Count one (metric, label, ...) once, for metrics()."""
        with self._lock:
            self._seen[observation] += 1

    def observed(self) -> dict:
        """Return how often each observation was made."""
        with self._lock:
            return dict(self._seen)

    def snapshot(self, token: Optional[str] = None) -> dict:
        """Return the counts as JSON members of the status; of one token, or of all."""
        with self._lock:
            cells = [(names, counts) for names, counts in sorted(self._cells.items())
                     if token in (None, names[0])]
        by: dict[str, dict] = {"by_token": {}, "by_provider": {}, "by_model": {}}
        total = Counts()
        for names, counts in cells:
            total = total.plus(counts)
            for kind, name in zip(by, names):
                if name:
                    by[kind][name] = by[kind].get(name, Counts()).plus(counts)
        return {**{name: getattr(total, name)
                   for name in ("requests", "failed_requests", "refused_requests")},
                "tokens": {name: getattr(total, name) for name in TOKEN_COUNTS},
                **{kind: {name: counts._asdict() for name, counts in named.items()}
                   for kind, named in by.items()}}


def _family(name: str, kind: str, text: str, samples: Iterable[tuple]) -> list[str]:
    """Return the lines of a metric in Prometheus's text format; none without samples, which are
    (labels, value) or (labels, value, the end of its name)."""
    name, lines = f"ironcage_{name}", []
    for labels, value, *end in samples:
        inside = ",".join(f'{label}="{shown}"' for label, shown in labels.items())
        lines.append(f"{name}{''.join(end)}{f'{{{inside}}}' if inside else ''} {value}")
    return [f"# HELP {name} {text}", f"# TYPE {name} {kind}", *lines] if lines else []


def _histogram(observed: Mapping[tuple, int], metric: str) -> Iterator[tuple]:
    """Yield the samples of a histogram by provider; buckets count all below them."""
    for provider in sorted({key[1] for key in observed if key[0] == metric}):
        total = 0
        for bound in HISTOGRAM_BOUNDS:
            total += observed.get((metric, provider, bound), 0)
            yield {"provider": provider, "le": bound}, total, "_bucket"
        yield {"provider": provider}, total, "_count"


# What is counted: (name, of what, by which labels), of what Totals observes and of its cells.
OBSERVED_METRICS = (("request", "requests", "Calls", ("provider", "model", "status")),
                    ("refusal", "refusals", "Requests that the proxy refused", ("reason",)),
                    ("token_refusal", "token_refusals", "Refusals", ("token", "reason")))
COUNTED_METRICS = (("cost_microdollars", "cost_microdollars", "Cost in microdollars", "model"),
                   ("estimated_requests", "estimated_requests", "Estimated charges", "provider"),
                   ("requests", "token_requests", "Calls", "token"),
                   ("cost_microdollars", "token_cost_microdollars", "Cost in microdollars",
                    "token"))
HISTOGRAMS = (("latency", "request", "From sending a call to its settlement."),
              ("first_byte", "first_byte", "From sending a call to its answer's head."))
GAUGES = MappingProxyType({
    "in_flight": "Requests that are being served.",
    "memory_reserved_bytes": "Memory held for bodies and answers in work.",
    "bound_exceeded": "Answers that cost more than their bound.",
    "shared_usable": "Whether the engine of the shared budget answers.",
    "shared_unconfirmed": "Settlements that it does not know yet.",
    "server_events_waiting": "Events that the Iron Cage server has not got yet.",
    "server_events_dropped": "Events that it will never get.",
    "uptime_seconds": "Seconds since the start.",
})


def metrics_text(totals: Totals, budgets: Sequence[Budget], gauges: Mapping[str, int]) -> str:
    """Write everything that is counted, in Prometheus's text format 0.0.4.

    Labels come from closed sets: names of providers, priced models and tokens, statuses, reasons.
    """
    counts, observed, lines = totals.snapshot(), totals.observed(), []
    for metric, name, text, labels in OBSERVED_METRICS:
        lines += _family(f"{name}_total", "counter", f"{text} by {', '.join(labels)}.", [
            (dict(zip(labels, key[1:])), count) for key, count in sorted(observed.items())
            if key[0] == metric])
    lines += _family("tokens_total", "counter", "Tokens by model and kind.", [
        ({"model": model, "kind": name.replace("_tokens", "")}, cell[name])
        for model, cell in counts["by_model"].items() for name in TOKEN_COUNTS])
    for field, name, text, label in COUNTED_METRICS:
        lines += _family(f"{name}_total", "counter", f"{text} by {label}.", [
            ({label: named}, cell[field]) for named, cell in counts[f"by_{label}"].items()])
    for metric, name, text in HISTOGRAMS:
        lines += _family(f"{name}_seconds", "histogram", text, _histogram(observed, metric))
    for amount in ("limit", "spent", "reserved"):
        lines += _family(f"{amount}_microdollars", "gauge", f"What is {amount}, by scope.", [
            ({"scope": budget.scope}, getattr(budget, amount)) for budget in budgets
            if getattr(budget, amount) is not None])
    for name, text in GAUGES.items():
        lines += _family(name, "gauge", text, [({}, gauges[name])] if name in gauges else ())
    return "\n".join(lines) + "\n"


class Thresholds:
    """How many of BUDGET_THRESHOLDS each scope has passed: each is reported once, in a period and
    of a limit."""

    def __init__(self) -> None:
        self._lock = threading.Lock()                 # guards the next field
        self._passed: dict[str, tuple[int, dict]] = {}     # scope -> (its period's start, by limit)

    def begin(self, budgets: Iterable[Budget]) -> None:
        """Note what scopes that are new here have passed, which was reported before."""
        for budget in budgets:
            if budget.scope not in self._passed:
                self.passed(budget)

    def passed(self, budget: Budget) -> Sequence[int]:
        """Return the percentages that were passed since the last look."""
        limit = budget.limit
        count = 0 if limit is None else bisect.bisect_right(
            BUDGET_THRESHOLDS, budget.spent * 100 // limit if limit else 100)
        with self._lock:
            since_s, by_limit = self._passed.get(budget.scope, (None, {}))
            by_limit = by_limit if since_s == budget.since_s else {}
            before = by_limit.get(limit, 0)
            by_limit[limit] = max(before, count)
            self._passed[budget.scope] = (budget.since_s, by_limit)
        return BUDGET_THRESHOLDS[before:count]


OUTSIDE_TIMEOUTS = Timeouts(connect_s=5, first_byte_s=10, between_bytes_s=10, call_s=15)
MAX_BACKOFF_S = 60
RETRY_POLL_S = 0.5                            # at the end, between two tries


class Outbox:
    """What is sent elsewhere, oldest first, on a thread of its own: nothing waits for it.

    `send`, called with an item and whether none failed in the last round, returns whether it is
    done with: taken, or never to be. If not it is tried again, less and less often. They are sent
    as soon as there are `at_once`, or each `every_s`; where there are `most`, the oldest goes.
    """

    def __init__(self, name: str, send: Callable[[Mapping, bool], bool],
                 on_fault: Callable[[str], None], *, most: int, at_once: int = 1,
                 every_s: Optional[float] = None) -> None:
        self._name, self._send, self._most = name, send, most
        self._at_once, self._every_s = at_once, every_s
        self._changed = threading.Condition()         # guards the fields below
        self._waiting: deque = deque()
        self._dropped = 0
        self._stop_by_s: Optional[float] = None       # set at the end
        self._thread = Housekeeper(name, self._send_all, on_fault)
        self.start = self._thread.start

    def put(self, item: Mapping[str, Any]) -> None:
        """Queue an item."""
        with self._changed:
            self._waiting.append(item)
            if len(self._waiting) > self._most:
                self._waiting.popleft()
                self._dropped += 1
            self._changed.notify_all()

    def counts(self) -> tuple[int, int]:
        """Return how many items wait, and how many were dropped."""
        with self._changed:
            return len(self._waiting), self._dropped

    def stop(self, retry_s: float, wait_s: Optional[float] = None) -> None:
        """Send what waits: once, and again for so long. Wait for the end of that, or `wait_s`."""
        with self._changed:
            self._stop_by_s = time.monotonic() + retry_s
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(wait_s)

    def _send_all(self) -> None:
        """Send items until the end; the thread runs this."""
        backoff_s = 0
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._stop_by_s is not None or (
                        len(self._waiting) >= self._at_once and not backoff_s),
                    backoff_s or self._every_s)
                items, stop_by_s = [*self._waiting], self._stop_by_s
            is_sent = all(self._is_sent(item, not backoff_s) for item in items)
            backoff_s = 0 if is_sent else min(MAX_BACKOFF_S, 2 * backoff_s or 1)
            if stop_by_s is not None:
                if is_sent or time.monotonic() >= stop_by_s:
                    break
                time.sleep(RETRY_POLL_S)
        with self._changed:
            self._dropped = dropped = self._dropped + len(self._waiting)
            self._waiting.clear()
        if dropped:
            log.warning(f"{self._name}: some were not sent", extra={"fields": {
                "dropped": dropped}})

    def _is_sent(self, item: Mapping[str, Any], is_first: bool) -> bool:
        is_done = self._send(item, is_first)
        with self._changed:
            if is_done and self._waiting and self._waiting[0] is item:    # it was not dropped
                self._waiting.popleft()
        return is_done

    def drop(self) -> None:
        """Count an item that is not taken."""
        with self._changed:
            self._dropped += 1


MAX_ALERTS = 100                              # kept while the receiver does not take them
ALERT_STOP_S = 2                              # at the end, for those that wait


class Alerts:
    """POSTs to a URL what an operator should know. A 4xx or a redirect is a no.

    The URL is a secret, of which only the host is logged; `secrets` are what no alert may hold.
    """

    def __init__(self, url: str, secrets: Callable[[], Iterable[Optional[str]]],
                 on_fault: Callable[[str], None]) -> None:
        self.url, self._secrets = url, secrets
        self._transport = KeepAliveHandler(OUTSIDE_TIMEOUTS)
        self._opener = build_opener(self._transport)
        self.outbox = Outbox("ironcage-alerts", self._is_done, on_fault, most=MAX_ALERTS)

    def tell(self, event: str, text: str, fields: Mapping[str, Any]) -> None:
        """Queue an alert; `text` is what chat programs show."""
        self.outbox.put({"text": f"ironcage: {text}", "event": event, **fields,
                         "version": __version__, "at": utc_text(time.time())})

    def stop(self) -> None:
        """Send what waits, for at most ALERT_STOP_S."""
        self.outbox.stop(0, ALERT_STOP_S)
        self._transport.shut_down()
        self.outbox.stop(0, ALERT_STOP_S)

    def _is_done(self, alert: Mapping[str, Any], is_first: bool) -> bool:
        """Whether the receiver took an alert, or never will."""
        body, url = json_bytes(alert), self.url
        for secret in filter(is_secret, (url, *self._secrets())):
            body = body.replace(json_bytes(secret)[1:-1], b"***")
        try:
            response = posted(self._opener, url, body)
            response.close()
            status, reason = response.status, f"it answered with the status {response.status}"
        except UpstreamError as err:
            status, reason = 0, re.sub("the provider('s)?", "it", err.message)
        is_final = 300 <= status < 500 and status not in (408, 429)
        if not 200 <= status < 300 and (is_first or is_final):
            log.warning("an alert was refused" if is_final else "an alert is not delivered yet",
                        extra={"fields": {"event": alert["event"], "reason": reason,
                                          "host": urllib.parse.urlsplit(url).netloc}})
        return is_final or 200 <= status < 300


def row_shown(row: Mapping[str, Any]) -> dict:
    """Return what the log says of a settled call, in the original's words."""
    said = {name: row[name] for name in ATTRIBUTION_HEADERS if row[name] is not None}
    shown = {"request_id": row["request_id"], "token": row["token"], **said,
             "model": row["price_key"] or "other", "provider": row["provider"],
             "status": row["status"],
             "input_tokens": row["input_tokens"] or 0, "output_tokens": row["output_tokens"] or 0,
             "cost_usd": format_usd(row["cost_microdollars"])[1:], "duration_ms": row["latency_ms"]}
    return shown if row["estimated"] is None else {**shown, "estimated": row["estimated"]}


class Reporter:
    """Reports what happens to all that watch: counts, the log, alerts and events."""

    def __init__(self, settings: Settings, slot: Slot, accounts: Accounts,
                 secrets: Callable[[], Iterable[Optional[str]]]) -> None:
        self.settings = settings
        self.totals, self.thresholds = Totals(), Thresholds()
        self.alerts = None if settings.alert_url is None else Alerts(
            settings.alert_url, secrets, lambda name: slot.on_fault(name))
        self.tell_server: Callable[[Event], None] = lambda event: None
        self._slot, self._accounts = slot, accounts
        self._telling = threading.local()              # what this thread hands to on_event

    def settled(self, call: Call, row: Mapping[str, Any]) -> None:
        """Count a settled call, log it, and report it."""
        model, cost = row["price_key"] or "other", row["cost_microdollars"]
        provider, has_failed = row["provider"], call.has_failed
        observed = [("request", provider, model, str(call.status or "none")),
                    ("latency", provider, bucket_of(row["latency_ms"]))]
        if call.first_byte_ms is not None:
            observed.append(("first_byte", provider, bucket_of(call.first_byte_ms)))
        self.totals.add((row["token"], provider, model), Counts(
            requests=1, failed_requests=int(has_failed),
            estimated_requests=int(row["estimated"] is not None),
            input_tokens=row["input_tokens"] or 0, output_tokens=row["output_tokens"] or 0,
            cached_input_tokens=row["cached_input_tokens"] or 0, cost_microdollars=cost), observed)
        if log.isEnabledFor(logging.INFO):
            log.info("LLM request failed" if has_failed else "LLM request completed",
                     extra={"fields": row_shown(row)})
        if cost > row["bound_microdollars"] and call.bound is not None:
            log.warning("bound exceeded", extra={"fields": {
                **row_shown(row), "bound_usd": format_usd(row["bound_microdollars"])[1:]}})
            self.alert("bound_exceeded", f"a call to {model} cost {format_usd(cost)}, more than "
                       f"its bound of {format_usd(row['bound_microdollars'])}; the limit may be "
                       "passed", scope=PROXY_SCOPE, token=row["token"], model=model,
                       request_id=row["request_id"], cost_microdollars=cost,
                       bound_microdollars=row["bound_microdollars"])
        self._report_thresholds(call.request.caller.scopes)
        self.emit(self._event_of(call, row))

    def _event_of(self, call: Call, row: Mapping[str, Any]) -> Event:
        settings = self.settings
        common = {"agent_id": settings.agent_id or row["token"], "request_id": row["request_id"],
                  "provider_id": settings.provider_id or row["provider"],
                  "model": call.model if call.price is not None else "other",
                  "provider": row["provider"], "cost_micros": row["cost_microdollars"],
                  "duration_ms": row["latency_ms"]}
        if call.has_failed:
            reason = call.meter.failure or (
                f"status {call.status}" if call.status is not None else "no answer")
            return LlmRequestFailed(error_code=call.status, error_message=reason, **common)
        return LlmRequestCompleted(
            input_tokens=row["input_tokens"] or 0, output_tokens=row["output_tokens"] or 0,
            is_estimated=row["estimated"] is not None, **common)

    def _report_thresholds(self, scopes: Sequence[str]) -> None:
        """Report each part of a limit that the proxy's spend, or that of scopes, has passed."""
        for budget in self._accounts.known((PROXY_SCOPE, *scopes)):
            for percent in self.thresholds.passed(budget):
                spent, limit = format_usd(budget.spent), format_usd(budget.limit)
                log.warning("budget threshold reached", extra={"fields": {
                    "scope": budget.scope, "percent": percent, "spent_usd": spent[1:],
                    "limit_usd": limit[1:]}})
                whose = "the proxy" if budget.scope == PROXY_SCOPE else f"the token {budget.scope}"
                self.alert("budget_threshold", f"{whose} has spent {spent} of {limit} "
                           f"({percent} % reached)", scope=budget.scope, percent=percent,
                           period=budget.period, spent_microdollars=budget.spent,
                           limit_microdollars=budget.limit)
                if budget.scope == PROXY_SCOPE:
                    self.emit(BudgetThresholdReached(percent, budget.spent, budget.limit))

    def alert(self, event: str, text: str, **fields: Any) -> None:
        """Report to --alert-url, if there is one."""
        if self.alerts is not None:
            self.alerts.tell(event, text, fields)

    def emit(self, event: Event) -> None:
        """Hand an event to `on_event`, whose faults are logged and end nothing, and to the server.
        """
        self.tell_server(event)
        if self.settings.on_event is None:
            return
        try:
            before, self._telling.event = self.is_in_on_event(), True
            with self._slot.outside():
                self.settings.on_event(event)
        except Exception:
            log.exception("on_event failed", extra={"fields": {"event": event_name(event)}})
        finally:
            self._telling.event = before

    def is_in_on_event(self) -> bool:
        """Whether this is called from `on_event`."""
        return getattr(self._telling, "event", False)


# ==== 23. Iron Cage server ======================================================================
#
# With --server-url the provider's key, the budget and the account of it all are another machine's:
# an Iron Cage server, by the original's protocol. The key is fetched and kept for a while, budget
# is leased before anything is spent, what is left goes back at the end, and each call is reported.
# Nothing here is waited for by a call that has what it needs.

SERVER_RETRY_S = 5                            # after a failure, before the server is asked again
SERVER_STOP_S = 10                            # at the end, for events and for the lease
EVENTS_EVERY_S = 30
EVENTS_AT_ONCE = 10                           # as many waiting are sent before that
MAX_EVENTS = 10_000                           # kept while the server does not take them
MAX_SERVER_ANSWER_BYTES = 1024 * 1024
NEVER_S = -1e9                                # before any time of the monotonic clock


@contextlib.contextmanager
def tried(lock: threading.Lock, timeout_s: float) -> Iterator[bool]:
    """Whether a lock was free within a time, or is waited for (-1); it is held until the end."""
    is_held = lock.acquire(timeout=timeout_s)
    try:
        yield is_held
    finally:
        if is_held:
            lock.release()


def failed_ask(reason: str, status: int) -> CageServerFailed:
    """Return what is raised where the server gave nothing. It is in no variable of its own trace,
    and new each time: else it kept the call."""
    failure = CageServerFailed(f"the Iron Cage server has not given what a call needs: {reason}")
    failure.is_final = 400 <= status < 500
    return failure


class CageServer:
    """An Iron Cage server, seen from here. `take` is called with each lease that it grants.

    A server that is away, slow or talks nonsense changes nothing for a key that is known and a
    lease that is held; one that says no (4xx) is believed.
    """

    def __init__(self, url: str, token: str, ledger: Ledger, take: Callable[[Lease], None], *,
                 cache_ttl_s: int = 300, allow_plain_http: bool = False,
                 timeouts: Timeouts = OUTSIDE_TIMEOUTS,
                 on_fault: Callable[[str], None] = lambda name: None) -> None:
        self.url, self.token, self._ledger, self._take = url, token, ledger, take
        self._cache_ttl_s, self._allow_plain_http = cache_ttl_s, allow_plain_http
        # Refuses a server that would be sent its token in the clear, as a provider its key.
        check_encrypted("the Iron Cage server", url, allow_plain_http)
        self._transport = KeepAliveHandler(timeouts)
        self._opener = build_opener(self._transport)
        self._asking = threading.Lock()       # one asks the server; the others take what comes
        self._held: Optional[Provider] = None          # with its key
        self.provider_name: Optional[str] = None       # of the last key that was given
        self._fetched_s = self._fresh_until_s = NEVER_S
        self._refused_key: Optional[str] = None        # by its provider
        self.lease: Optional[Lease] = None
        self._failure = ("", 0)                        # why, and the status of the answer
        self._failed_until_s = NEVER_S
        self._is_stopping = False
        self.events = Outbox("ironcage-events", self._is_taken, on_fault, most=MAX_EVENTS,
                             at_once=EVENTS_AT_ONCE, every_s=EVENTS_EVERY_S)

    # Its protocol.

    def _post(self, path: str, fields: Mapping[str, Any]) -> tuple[int, dict]:
        """Make one call, and return (status, body). Raises UpstreamError."""
        response = posted(self._opener, self.url + path, json_bytes(fields), self.token,
                          {"authorization": f"Bearer {self.token}"})
        try:
            raw, _ = whole_body(response.reads(), MAX_SERVER_ANSWER_BYTES)
        finally:
            response.close()
        try:
            return response.status, json_object(json.loads(raw))
        except (ValueError, RecursionError):
            return response.status, {}

    def _ask(self, path: str, fields: Mapping[str, Any],
             read: Callable[[dict], Any] = lambda body: None, *, for_call: bool = False) -> Any:
        """Return what `read` makes of an answer. Raises CageServerFailed, `is_final` where it was a
        no. `for_call`: a failure stands for SERVER_RETRY_S, in which the server is left alone."""
        if for_call and self._is_stopping:
            raise CageServerFailed("the proxy is stopping")
        if for_call and time.monotonic() < self._failed_until_s:
            raise failed_ask(*self._failure)
        try:
            status, body = self._post(path, fields)
            if 200 <= status < 300:
                return read(body)
        except UpstreamError as err:
            reason = err.message.replace("the provider's", "its").replace("the provider", "it")
            status = 0
        except (ValueError, Misconfigured):
            reason = "its answer is not what its protocol says"
        else:
            reason = self._without_keys(body.get("error"), body) \
                or f"it answered with the status {status}"
            code = self._without_keys(body.get("code"), body)
            reason += f" ({shown_name(code)})" if code else ""
        if for_call:
            self._failure = reason, status
            self._failed_until_s = time.monotonic() + SERVER_RETRY_S
        raise failed_ask(reason, status)

    def _without_keys(self, words: Any, body: Mapping[str, Any]) -> str:
        """Return some words of an answer, without the keys that we hold or that it gives."""
        text, given = "" if words is None else str(words), body.get("provider_key")
        keys = (self._held and self._held.key, given if isinstance(given, str) else None)
        for key in (self.token, *filter(is_secret, keys)):
            text = text.replace(key, "***")
        return re.sub(UNPRINTABLE, "?", text)[:300]

    def _read_provider(self, body: Mapping[str, Any]) -> Provider:
        name, key = body.get("provider"), body.get("provider_key")
        known = KNOWN_PROVIDERS.get(name) if isinstance(name, str) else None
        if known is None or not isinstance(key, str) or not key.strip():
            raise ValueError("not a provider with its key")
        if body.get("base_url") not in (None, ""):
            known = at_base_url(known, _config_url(body["base_url"]))
        return with_key(known._replace(key_env="IRONCAGE_SERVER_KEY"),
                        {"IRONCAGE_SERVER_KEY": key},
                        allow_plain_http=self._allow_plain_http)

    def _read_lease(self, body: Mapping[str, Any]) -> Lease:
        granted, lease_id = body.get("budget_granted"), body.get("lease_id")
        if type(granted) is not int or not 0 <= granted <= MOST_USD * MICRODOLLARS_PER_USD \
                or not isinstance(lease_id, str) or not re.fullmatch("[!-~]{1,256}", lease_id) \
                or lease_id != self._without_keys(lease_id, body):
            raise ValueError("not a lease")
        return Lease(lease_id, granted, self._ledger.spent(None, 0))

    # What a call needs.

    def provider(self) -> Provider:
        """Return the provider with its key. Raises CageServerFailed.

        A key is asked for once for all that need it; whoever has one, though an old one, does not
        wait for it.
        """
        held = self._usable()
        with tried(self._asking, -1 if held is None else 0) as may_ask:
            held = self._usable() if may_ask else held           # it may have come meanwhile
            if not may_ask or (held is not None and time.monotonic() < self._fresh_until_s):
                return held
            try:
                held = self._ask("/api/v1/agents/provider-key", {"ic_token": self.token},
                                 self._read_provider, for_call=True)
            except CageServerFailed as err:
                if held is None or err.is_final:
                    self._held = None
                    raise
                log.warning("the key is kept", extra={"fields": {"reason": err.message}})
                self._fresh_until_s = time.monotonic() + SERVER_RETRY_S
                return held
            self._held, self.provider_name, self._refused_key = held, held.name, None
            self._fetched_s = time.monotonic()
            self._fresh_until_s = self._fetched_s + self._cache_ttl_s
            return held

    def _usable(self) -> Optional[Provider]:
        """Return the provider whose key is known, and was not refused."""
        held = self._held
        return None if held is None or held.key == self._refused_key else held

    def refused(self, provider: Provider) -> None:
        """Note that a provider answered 401: its key is fetched anew, unless that was done just
        now."""
        if time.monotonic() - self._fetched_s >= SERVER_RETRY_S:
            self._refused_key = provider.key

    def check_lease(self) -> None:
        """Ask for a lease, unless there is one. Raises CageServerFailed."""
        if self.lease is not None:
            return
        name = self.provider().name
        with self._asking:
            if self.lease is not None:
                return
            lease = self._ask("/api/v1/budget/handshake", {
                "ic_token": self.token, "provider": name}, self._read_lease, for_call=True)
            try:
                self._ledger.keep_lease(lease)
            except LedgerUnavailable:
                self._give_back(lease, 0)
                raise
            if self._is_stopping:                      # stop() gives this back
                raise CageServerFailed("the proxy is stopping")
            self._take(lease)
            self.lease = lease
            log.info("budget leased", extra={"fields": {
                "lease_id": lease.lease_id, "granted_usd": format_usd(lease.granted)[1:]}})

    # Its beginning and its end.

    def start(self) -> None:
        """Give back what a process that died held, ask for a lease, and begin to send events."""
        for lease, spent in self._held_leases():
            self._give_back(lease, spent)
        try:
            self.check_lease()
        except CageServerFailed as err:
            log.warning("nothing can be spent yet", extra={"fields": {"reason": err.message}})
        self.events.start()

    def _held_leases(self) -> list[tuple[Lease, int]]:
        """Return leases that were not given back, and what was spent of each: until the next began.
        """
        held = sorted(self._ledger.leases(), key=lambda lease: lease.spent_before)
        ends = [*(lease.spent_before for lease in held[1:]), self._ledger.spent(None, 0)]
        return [(lease, end - lease.spent_before) for lease, end in zip(held, ends)]

    def _give_back(self, lease: Lease, spent: int) -> bool:
        """Report what was spent of a lease; whether the server knows now. Its no is final."""
        try:
            self._ask("/api/v1/budget/return", {
                "lease_id": lease.lease_id, "spent_microdollars": spent})
        except CageServerFailed as err:
            log.warning("a lease is not given back", extra={"fields": {
                "lease_id": lease.lease_id, "reason": err.message}})
            if not err.is_final:
                return False
        self._ledger.forget_lease(lease)
        return True

    def stop(self) -> None:
        """Send the events that wait and give the lease back, for at most SERVER_STOP_S."""
        deadline_s = time.monotonic() + SERVER_STOP_S
        self._is_stopping = True
        self.events.stop(SERVER_STOP_S)
        # A call that asks for a lease just now gets it first, and finds that we are stopping.
        with tried(self._asking, max(0, deadline_s - time.monotonic())):
            for lease, spent in self._held_leases():
                while not self._give_back(lease, spent) and time.monotonic() < deadline_s:
                    time.sleep(RETRY_POLL_S)
        self._transport.shut_down()

    # Its events.

    def tell(self, event: Event) -> None:
        """Queue an event of a call."""
        if isinstance(event, (LlmRequestCompleted, LlmRequestFailed)):
            self.events.put({"event_type": event_name(event), "event_id": event.request_id,
                             "timestamp_ms": time.time_ns() // 10 ** 6, **event._asdict()})

    def _is_taken(self, event: Mapping[str, Any], is_first: bool) -> bool:
        """Whether the server took an event, or will never: what it answers 4xx to is dropped."""
        try:
            self._ask("/api/v1/analytics/events", {**event, "ic_token": self.token})
        except CageServerFailed as err:
            if not err.is_final:
                return False
            self.events.drop()
            log.warning("an event is refused", extra={"fields": {"reason": err.message}})
        return True

    def as_json(self) -> dict:
        """Return what /ironcage/status says of it."""
        lease, (waiting, dropped) = self.lease, self.events.counts()
        return {"url": self.url, "lease_id": None if lease is None else lease.lease_id,
                "granted_microdollars": 0 if lease is None else lease.granted,
                "events_waiting": waiting, "events_dropped": dropped}


# ==== 24. Shared budget =========================================================================
#
# With --shared the money is in a Valkey or Redis server, the engine, so that many processes on many
# machines keep one limit: the same steps as Accounts, each an atomic script there. A named cage
# holds, for each scope, its limits and what it spent and reserved in each period; by process, the
# open calls, and a bit for each call that has ended (its tombstone), so that whatever is sent twice
# counts once; and the totals of each day. Numbers there stay below 2 ** 53.
#
# Death: a process whose heartbeat has not changed for DEAD_S, as seen by another that has itself
# been heard all the while, is taken for dead, and its open calls are charged at their bounds.
# Should it come back, its settlement corrects that, once. Restart: a server with another
# run_id may have forgotten the last writes, so each process first enters again what it knows, and
# no call is admitted meanwhile. Replacement: a cage is known by a random generation.
#
# Sources: RESP2 (redis.io/docs/reference/protocol-spec), EVALSHA, WAITAOF; read November 2026.

ENGINE_PORT = 6379
ENGINE_DEADLINE_S = 1                         # for one exchange, also to connect
DISK_DEADLINE_MS = 2_000                      # for --fsync, where the engine flushes each second
HEARTBEAT_S = 5
DEAD_S = 30
CATCH_UP_S = 0.5                              # between two tries to settle what is not settled yet
TOMBSTONE_S = DAY_S                           # at least; a later settlement is not believed
ENGINE_CONNECTIONS_KEPT = 64
MAX_REPLY_BYTES = 512 * 1024 * 1024           # one string; the server's own limit
MAX_REPLY_DEPTH = 8
COUNTS_WAITING = 500                          # of what providers have counted, to be shared
MOST_SHARED_COUNTS = 4_000
MAX_COUNT_BYTES = 64 * 1024
AT_ONCE = 200                                 # scopes in one exchange, which holds up everybody
MOST_SHARED = 2 ** 53 - 1                     # microdollars, in a limit or a reservation
UNNAMED_TOKEN = "default"                     # the name of --token, which has no scope of its own
NOT_A_REPLY = "what it answers is not Redis' protocol"
Reply = Any                    # None, int, bytes, EngineError or a list of these


class EngineError(NamedTuple):
    """An error that the engine replied."""
    text: str


class EngineAddress(NamedTuple):
    """Where the engine is. Neither repr nor str shows the password."""
    scheme: str                               # "redis", "rediss" (TLS) or "unix"
    host: str                                 # or the path of a socket
    port: int
    database: int
    user: Optional[str]
    password: Optional[str]
    is_public: bool = False                   # the password came by the command line

    def __str__(self) -> str:
        return f"unix://{self.host}" if self.scheme == "unix" \
            else f"{self.scheme}://{self.host}:{self.port}/{self.database}"

    def __repr__(self) -> str:
        return str(self)


def parse_engine_url(text: str) -> EngineAddress:
    """Read where `--shared` leads. Raises ValueError, which shows nothing of it."""
    try:
        parts = urllib.parse.urlsplit(text)
        user, password = (urllib.parse.unquote(part or "")
                          for part in (parts.username, parts.password))
        is_unix = parts.scheme == "unix"
        host = parts.path.rstrip("/") if is_unix and not parts.hostname else \
            None if is_unix else parts.hostname
        database = re.fullmatch(r"/?(\d{0,4})", "" if is_unix else parts.path)
        port = parts.port or ENGINE_PORT
    except ValueError:
        host = database = None
    if not host or not database or parts.query or parts.fragment or (user and not password) \
            or parts.scheme not in ("redis", "rediss", "unix"):
        raise ValueError("must be redis://[[user]:password@]host[:port][/db], the same with "
                         "rediss://, or unix://PATH")
    return EngineAddress(parts.scheme, host, port, int(database[1] or 0), user, password)


# What an error of the engine means, by the word in it. The last five are of our own scripts.
ENGINE_ERRORS = MappingProxyType({
    "WRONGPASS": "it refuses the user name or the password",
    "AUTH": "it has no password set, but --shared names one",
    "NOAUTH": "it wants a password: put it into IRONCAGE_SHARED",
    "NOPERM": "its user may not run a command, or touch a key, that is needed",
    "READONLY": "it is a replica, which takes no writes; name the primary",
    "MOVED": "it is a cluster, which is not supported; name a single primary",
    "CLUSTERDOWN": "it is a cluster, which is not supported; name a single primary",
    "OOM": "it is out of memory",
    "LOADING": "it is still loading its data",
    "MASTERDOWN": "it is a replica that has lost its primary; name the primary",
    "MISCONF": "it cannot write its data to disk",
    "BUSY": "a script of somebody else keeps it busy",
    "NOREPLICAS": "it has fewer replicas than it wants",
    "CAGE": "the cage is gone or was made anew; `cage new` makes one, then restart all proxies",
    "SCOPE": "the cage has lost an account; `cage new` makes it anew",
    "RESTARTED": "it was restarted, and what it may have forgotten is entered again",
    "HELD": "it was restarted, and waits for all proxies to enter what it may have forgotten",
    "CANCELLED": "the reservation was given up meanwhile",
})


class EngineFailed(LedgerUnavailable):
    """The engine did not do what it was asked. `code`: the word in its error; "" where there was
    no reply. `was_sent`: it may have done it."""

    def __init__(self, reason: str, code: str = "", *, was_sent: bool = False) -> None:
        super().__init__("the shared budget cannot be used, so that nothing is sent to providers: "
                         + reason, headers=[("retry-after", "1")])
        self.reason, self.code, self.was_sent = reason, code, was_sent


@contextlib.contextmanager
def replied() -> Iterator[None]:
    """Raise EngineFailed where a reply does not fit what was asked."""
    try:
        yield
    except (AttributeError, LookupError, TypeError, ValueError) as err:
        raise EngineFailed(NOT_A_REPLY, was_sent=True) from err


def engine_failure(error: EngineError, secret: str) -> EngineFailed:
    """Say what an error of the engine means, in one line; it may repeat what it was sent."""
    words = re.findall(r"[A-Z]{3,}", error.text)
    code = next((code for code in ENGINE_ERRORS if code in words), words[0] if words else "ERR")
    said = error.text.replace(secret, "***") if secret else error.text
    said = re.sub(UNPRINTABLE, "?", said[:100])
    return EngineFailed(ENGINE_ERRORS.get(code, f"it says {said!r}"), code,
                        was_sent=code not in ENGINE_ERRORS)


# RESP2, the engine's protocol.

def format_command(words: Sequence[Union[str, bytes, int]]) -> bytes:
    """Write a command as the engine reads it."""
    parts = [word if isinstance(word, bytes) else str(word).encode("utf-8") for word in words]
    return b"*%d\r\n" % len(parts) + b"".join(
        [b"$%d\r\n%b\r\n" % (len(part), part) for part in parts])


def read_reply(part: Callable[..., bytes], depth: int = 0) -> Reply:
    """Read one reply, by a reader of the next line or, given a size, of so many bytes.

    Raises ValueError for anything else.
    """
    text = part()
    kind, rest = text[:1], text[1:]
    if kind in (b"+", b"-"):
        return rest if kind == b"+" else EngineError(rest.decode("utf-8", "replace"))
    if kind not in (b":", b"$", b"*") or not re.fullmatch(rb"-?\d{1,19}", rest):
        raise ValueError(NOT_A_REPLY)
    size = int(rest)
    if kind == b":" or size == -1:
        return size if kind == b":" else None
    if not 0 <= size <= MAX_REPLY_BYTES or depth > MAX_REPLY_DEPTH:
        raise ValueError(NOT_A_REPLY)
    if kind == b"*":
        return [read_reply(part, depth + 1) for _ in range(size)]
    return part(size)


class EngineLink:
    """One connection to the engine: connected, authenticated, and its run_id known.

    Raises EngineFailed; OSError, EOFError and ValueError where an exchange breaks.
    """

    def __init__(self, address: EngineAddress, slot: Slot, deadline_s: float) -> None:
        with slot.outside():
            sock = self._connected(address, max(0.001, deadline_s - time.monotonic()))
        self.wire, self._secret = Wire(sock, slot), address.password
        self._data, self._at, self._deadline_s = b"", 0, deadline_s
        self.is_whole = False                 # all that was asked for came, and nothing else
        login = [[*(("AUTH", address.user) if address.user else ("AUTH",)), address.password]] \
            if address.password else []
        select_database = [["SELECT", address.database]] if address.database else []
        try:
            *_, info = self.exchange([*login, *select_database, ["INFO", "server"]], deadline_s)
            with replied():
                self.run_id = re.search(rb"run_id:(\w+)", info)[1].decode("ascii")
        except BaseException:
            self.wire.close()
            raise

    @staticmethod
    def _connected(address: EngineAddress, timeout_s: float) -> socket.socket:
        if address.scheme == "unix":
            sock = socket.socket(socket.AF_UNIX)
            sock.settimeout(timeout_s)
            sock.connect(address.host)
            return sock
        sock = socket.create_connection((address.host, address.port), timeout_s)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock if address.scheme == "redis" else ssl.create_default_context().wrap_socket(
            sock, server_hostname=address.host)

    def exchange(self, commands: Sequence[Sequence], deadline_s: float) -> list[Reply]:
        """Send commands in one write, and read all of their replies. Raises EngineFailed for one
        that is an error."""
        self._deadline_s, self.is_whole = deadline_s, False
        self.wire.send(b"".join(map(format_command, commands)), deadline_s - time.monotonic())
        replies = [read_reply(self._part) for _ in commands]
        self.is_whole = self._at == len(self._data)
        for reply in replies:
            if isinstance(reply, EngineError):
                raise engine_failure(reply, self._secret)
        return replies

    def _part(self, size: int = -1) -> bytes:
        """Read a line, or so many bytes, without the CRLF behind it."""
        while True:
            end = self._data.find(b"\r\n", self._at) if size < 0 else self._at + size
            if 0 <= end <= len(self._data) - 2:
                break
            more = self.wire.receive(self._deadline_s - time.monotonic())
            if not more:
                raise EOFError("it closed the connection")
            self._data, self._at = self._data[self._at:] + more, 0
            if size < 0 and len(self._data) > MAX_HEAD_BYTES + LARGE_READ_BYTES:
                raise ValueError(NOT_A_REPLY)
        part, behind, self._at = self._data[self._at:end], self._data[end:end + 2], end + 2
        if behind != b"\r\n":
            raise ValueError(NOT_A_REPLY)
        return part


class Engine:
    """The engine, over a pool of connections; none is held while a provider answers.

    What is asked must be harmless to ask twice: what breaks on a connection that was idle is asked
    again on a new one. Raises EngineFailed.
    """

    def __init__(self, address: EngineAddress, slot: Slot,
                 deadline_s: float = ENGINE_DEADLINE_S) -> None:
        self.address, self._slot, self._deadline_s = address, slot, deadline_s
        self._lock = threading.Lock()              # guards the next
        self._idle: list[EngineLink] = []
        self.run_id = ""                           # of the server that was asked last

    def ask(self, *commands: Sequence, run_id: Optional[str] = None,
            extra_s: float = 0) -> list[Reply]:
        """Return the replies to commands, by a server of that run_id, if one is named."""
        deadline_s, may_be_done = time.monotonic() + self._deadline_s + extra_s, False
        while True:
            link, was_sent = self._pooled(), False
            is_old = link is not None
            try:
                link = link or EngineLink(self.address, self._slot, deadline_s)
                self.run_id = link.run_id
                if run_id not in (None, link.run_id):
                    raise EngineFailed(ENGINE_ERRORS["RESTARTED"], "RESTARTED")
                was_sent = True
                return link.exchange(commands, deadline_s)
            except EngineFailed as err:
                err.was_sent |= may_be_done
                raise
            except (OSError, EOFError, ValueError) as err:
                may_be_done |= was_sent
                is_late = isinstance(err, (TimeoutError, socket.timeout))    # two before 3.10
                if is_old and not is_late:
                    continue
                reason = "it does not answer in time" if is_late else _reason(err)
                raise EngineFailed(f"{self.address}: {reason}", was_sent=may_be_done) from err
            finally:
                if link is not None:
                    self._give_back(link)

    def _pooled(self) -> Optional[EngineLink]:
        while True:
            with self._lock:
                link = self._idle.pop() if self._idle else None
            if link is None or not link.wire.is_readable():       # open and silent
                return link
            link.wire.close()

    def _give_back(self, link: EngineLink) -> None:
        with self._lock:
            keeps = link.is_whole and len(self._idle) < ENGINE_CONNECTIONS_KEPT
            if keeps:
                self._idle.append(link)
        if not keeps:
            link.wire.close()

    def close(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for link in idle:
            link.wire.close()


@contextlib.contextmanager
def usable_engine(engine: Engine) -> Iterator[None]:
    """Raise Misconfigured for what an engine does not do, or does not reply."""
    try:
        with replied():
            yield
    except EngineFailed as err:
        raise Misconfigured(
            f"the shared budget at {engine.address} cannot be used: {err.reason}") from err


# The scripts. Each begins with the same: the cage must be the one of its generation, known under
# the run_id that the engine has. A call's record is "bound|admitted|scope|scope". Each replies what
# it found, and the amounts of scopes.

PRELUDE = """
local cage, clock = KEYS[1], redis.call('TIME')
local known = redis.call('HMGET', cage, 'generation', 'run_id', 'held_until', 'seen')
if known[1] ~= ARGV[1] then return redis.error_reply('CAGE') end
local now = math.max(tonumber(clock[1]), tonumber(known[4] or 0))  -- going back reopens no period
local function key(...) return table.concat({cage, ...}, ':') end
local function start(period, at)
  local day = math.floor(at / 86400)
  if period == 'day' then return day * 86400 end
  if period == 'week' then return (day - (day + 3) % 7) * 86400 end
  if period ~= 'month' then return 0 end
  local z = day + 719468                        -- days since March of the year 0
  local doe = z % 146097
  local yoe = math.floor((doe - math.floor(doe / 1460) + math.floor(doe / 36524)
                          - math.floor(doe / 146096)) / 365)
  local doy = doe - 365 * yoe - math.floor(yoe / 4) + math.floor(yoe / 100)
  local month = math.floor((5 * doy + 2) / 153)
  return (day - doy + math.floor((153 * month + 2) / 5)) * 86400
end
local function scope(name)                      -- its amounts, in the period of now
  local at = key('scope', name)
  local f = redis.call('HMGET', at, 'period', 'since', 'limit', 'stop_at', 'put_limit',
                       'put_stop_at')
  if not f[1] then error('SCOPE', 0) end
  local since, before = start(f[1], now), tonumber(f[2])
  if since > before then                        -- what is older than the last period goes
    for _, field in ipairs(redis.call('HKEYS', at)) do
      local of = tonumber(string.match(field, '^[sr](%d+)$'))
      if of and of < before then redis.call('HDEL', at, field) end
    end
    redis.call('HSET', at, 'since', since)
    redis.call('HSET', cage, 'seen', now)
  end
  local limit, stop_at = f[5] or f[3], f[6] or f[4]
  local amounts = redis.call('HMGET', at, 's' .. since, 'r' .. since)
  return {name = name, at = at, since = since, period = f[1], limit = limit ~= '-' and limit,
          stop_at = stop_at ~= '-' and stop_at, spent = amounts[1] or 0, reserved = amounts[2] or 0}
end
local function scopes(names)                    -- those of "proxy|ci"
  local found = {}
  for name in string.gmatch(names, '[^|]+') do found[#found + 1] = scope(name) end
  return found
end
local function reply(outcome, found)            -- amounts in the order of Budget's fields
  local words = {outcome}
  for i, one in ipairs(found) do
    words[i + 1] = string.format('%s|%s|%d|%d|%s|%s|%d', one.name, one.limit or '', one.spent,
                                 one.reserved, one.stop_at or '', one.period, one.since)
  end
  return words
end
local function parts(record)
  local bound, admitted, names = string.match(record, '^(%d+)|(%d+)|(.+)$')
  return tonumber(bound), tonumber(admitted), names or ''
end
local function add(record, what, amount)        -- to all scopes, in the period of its admission
  local _, admitted, names = parts(record)
  for name in string.gmatch(names, '[^|]+') do
    local at = key('scope', name)
    redis.call('HINCRBY', at, what .. start(redis.call('HGET', at, 'period'), admitted), amount)
  end
end
local function entomb(process, number)
  redis.call('SETBIT', key('done', process), number, 1)
  redis.call('EXPIRE', key('done', process), 2 * TOMBSTONE_S)
end
local function close(process, number, record, cost)
  add(record, 's', cost)
  add(record, 'r', 0 - parts(record))
  redis.call('HDEL', key('open', process), number)
end
local function count(record, label, counts, sign)      -- into the totals of its day
  local _, admitted = parts(record)
  local at = key('day', math.floor(admitted / 86400))
  for i = 1, #counts, 2 do
    redis.call('HINCRBY', at, label .. '|' .. counts[i],
               string.format('%d', sign * counts[i + 1]))
  end
end
local function count_cut_off(record, sign)      -- of a dead process: nobody knows the model
  local bound, _, names = parts(record)
  count(record, (string.match(names, '|(.+)$') or 'default') .. '|cut off', {
    'requests', 1, 'estimated_requests', 1, 'cost_microdollars', bound}, sign)
end
local function cut_off(process, number)         -- charged at its bound, which may be corrected
  local record = redis.call('HGET', key('open', process), number)
  close(process, number, record, (parts(record)))
  entomb(process, number)
  count_cut_off(record, 1)
  redis.call('HSET', key('lost', process), number, record)
  redis.call('EXPIRE', key('lost', process), 2 * TOMBSTONE_S)
end
"""
SAME_SERVER = "if known[2] ~= ARGV[2] then return redis.error_reply('RESTARTED') end"
SCRIPTS = {name: (PRELUDE + ("" if name == "restarted" else SAME_SERVER) + text).replace(
    "TOMBSTONE_S", str(TOMBSTONE_S)) for name, text in {
    # process, number, amount, scopes, the least that must be free in each
    "take": """
local held_s = tonumber(known[3] or 0) - now      -- more: the clock was set back meanwhile
if held_s > 0 and held_s < 60 then return redis.error_reply('HELD') end
local process, number, amount, found = ARGV[3], ARGV[4], tonumber(ARGV[5]), scopes(ARGV[6])
local taken = redis.call('HGET', key('open', process), number)      -- asked for again
if taken then return reply(taken, found) end
if redis.call('GETBIT', key('done', process), number) == 1 then
  return redis.error_reply('CANCELLED')
end
for i, one in ipairs(found) do
  local free = one.limit and one.limit - one.spent - one.reserved
  if one.stop_at and tonumber(one.spent) >= tonumber(one.stop_at) then free = 0 end
  if amount > 0 and free and free < tonumber(ARGV[6 + i]) then return reply(false, found) end
end
taken = string.format('%s|%d|%s', ARGV[5], now, ARGV[6])
redis.call('HSETNX', key('beats'), process, clock[1] .. '.' .. clock[2])
redis.call('HSET', key('open', process), number, taken)
for _, one in ipairs(found) do
  one.reserved = redis.call('HINCRBY', one.at, 'r' .. one.since, amount)
end
return reply(taken, found)
""",
    # process, number, record, cost, label, then (what, how many) each, for the totals of the day
    "settle": """
local process, number, record, cost = ARGV[3], ARGV[4], ARGV[5], tonumber(ARGV[6])
local open = redis.call('HGET', key('open', process), number)
local lost = redis.call('HGET', key('lost', process), number)
local outcome, _, admitted, names = 'settled', parts(lost or open or record)
if lost then
  add(lost, 's', cost - parts(lost))
  count_cut_off(lost, -1)
  redis.call('HDEL', key('lost', process), number)
  outcome = 'corrected'
elseif redis.call('GETBIT', key('done', process), number) == 1 then
  outcome = 'known'
elseif open then
  close(process, number, open, cost)
elseif admitted then
  if admitted < now - TOMBSTONE_S then return reply('old', {}) end
  add(record, 's', cost)
end
entomb(process, number)
if outcome ~= 'known' and ARGV[7] ~= '' then
  count(lost or open or record, ARGV[7], {unpack(ARGV, 8)}, 1)
end
return reply(outcome, scopes(names))
""",
    # process, scope to look at, the last number that the process gave, then (number, record) of
    # each call it knows: those that the engine forgot are entered again, others are cut off
    "beat": """
local process, open, ours = ARGV[3], key('open', ARGV[3]), {}
for at = 6, #ARGV, 2 do
  local number, record = ARGV[at], ARGV[at + 1]
  ours[number] = true
  if record ~= '' and redis.call('GETBIT', key('done', process), number) == 0
      and redis.call('HSETNX', open, number, record) == 1 then
    add(record, 'r', (parts(record)))
  end
end
for _, number in ipairs(redis.call('HKEYS', open)) do
  if not ours[number] and tonumber(number) <= tonumber(ARGV[5]) then cut_off(process, number) end
end
redis.call('HSET', key('beats'), process, clock[1] .. '.' .. clock[2])
return reply(redis.call('HGETALL', key('beats')), scopes(ARGV[4]))
""",
    # process, its last heartbeat, if it is dead
    "charge": """
if redis.call('HGET', key('beats'), ARGV[3]) == ARGV[4] then
  for _, number in ipairs(redis.call('HKEYS', key('open', ARGV[3]))) do
    cut_off(ARGV[3], number)
  end
  redis.call('HDEL', key('beats'), ARGV[3])
end
return {1}
""",
    # (scope, period, limit, stop) each; the lowest limit that was ever named holds
    "scopes": """
local names = {}
for i = 3, #ARGV, 4 do
  names[#names + 1] = ARGV[i]
  local period = redis.call('HGET', key('scope', ARGV[i]), 'period')
  if period and period ~= ARGV[i + 1] then return {ARGV[i] .. '|' .. period} end
end
for i = 3, #ARGV, 4 do
  local at = key('scope', ARGV[i])
  redis.call('HSETNX', at, 'period', ARGV[i + 1])
  redis.call('HSETNX', at, 'since', start(ARGV[i + 1], now))
  for step, name in ipairs({'limit', 'stop_at'}) do
    local given, held = ARGV[i + 1 + step], redis.call('HGET', at, name)
    if given ~= '' and not (held and tonumber(held) <= tonumber(given)) then
      redis.call('HSET', at, name, given)
    end
  end
end
return reply(false, scopes(table.concat(names, '|')))
""",
    # scope, limit, stop_at: '' changes nothing, '-' is none, '=' what the flags say
    "limits": """
local at, held, is_put = key('scope', ARGV[3]), {}, false
for i, name in ipairs({'limit', 'stop_at'}) do
  local put = ARGV[3 + i] ~= '' and ARGV[3 + i] or redis.call('HGET', at, 'put_' .. name) or '='
  is_put = is_put or put ~= '='
  held[i] = tonumber(put == '=' and redis.call('HGET', at, name) or put)
end
if is_put and held[2] and (not held[1] or held[2] >= held[1]) then
  return {string.format('%s|%d', held[1] and string.format('%d', held[1]) or '', held[2])}
end
for i, name in ipairs({'put_limit', 'put_stop_at'}) do
  if ARGV[3 + i] == '=' then redis.call('HDEL', at, name)
  elseif ARGV[3 + i] ~= '' then redis.call('HSET', at, name, ARGV[3 + i]) end
end
return reply(false, scopes(ARGV[3]))
""",
    # scopes
    "budgets": """
return reply(false, scopes(ARGV[3]))
""",
    # how long no call is admitted, in seconds
    "restarted": """
if known[2] ~= ARGV[2] then
  known[3] = now + tonumber(ARGV[3])
  redis.call('HSET', cage, 'run_id', ARGV[2], 'held_until', known[3])
end
return {tonumber(known[3] or 0) - now}
""",
}.items()}
SCRIPT_DIGESTS = {name: hashlib.sha1(text.encode("ascii"), usedforsecurity=False).hexdigest()
                  for name, text in SCRIPTS.items()}


_FLUSH = ("WAITAOF", 1, 0, DISK_DEADLINE_MS)
FORGETS: Mapping[Optional[bytes], str] = MappingProxyType({       # by its appendfsync
    b"always": "nothing: it flushes each write to its disk", b"everysec": "its last second or two",
    b"no": "its last half minute",
    b"": "all that its last snapshot does not hold",              # its appendonly is off
    None: "everything, for all that it lets us read",
})
_LATE = MappingProxyType({b"old": "is not charged: its bound stands",
                          b"corrected": "corrects what was charged"})


class Settlement(NamedTuple):
    """The end of one call, as the engine takes it; taken again, it changes nothing."""
    process: str
    number: int
    record: str                               # "" where the reservation may never have come there
    microdollars: int
    label: str = ""                           # token|model, for the totals of its day
    counts: tuple = ()                        # (what, how many, what, ...)
    row_id: Optional[int] = None              # in this process' own ledger


def _limit_word(amount: Optional[int]) -> str:
    if amount is not None and amount > MOST_SHARED:
        raise ValueError(f"a shared limit is at most {format_usd(MOST_SHARED)}")
    return "" if amount is None else str(amount)


def _row_settlement(row: Mapping[str, Any], process: str, number: int, record: str,
                    ) -> Settlement:
    """Make what the engine is to know of a settled call, from its row in the ledger."""
    counts = {"requests": 1, "estimated_requests": int(row["estimated"] is not None),
              "cost_microdollars": row["cost_microdollars"],
              **{name: row[name] or 0 for name in TOKEN_COUNTS}}
    return Settlement(process, number, record, row["cost_microdollars"],
                      f"{row['token']}|{row['price_key'] or 'other'}",
                      tuple(word for pair in counts.items() if pair[1] for word in pair),
                      row.get("id"))


def count_to_json(row: CountRow) -> str:
    """Write a count as the engine keeps it; digests in hexadecimal."""
    return json.dumps([cell.hex() if isinstance(cell, bytes) else cell
                       for cell in count_cells(row)])


def count_from_json(text: bytes) -> CountRow:
    """Read a count that another process kept. Raises ValueError, TypeError."""
    scope, digest, tokens, parts, *rest = json.loads(text)
    return count_from_cells(str(scope), bytes.fromhex(digest), int(tokens), bytes.fromhex(parts),
                            *rest)


def _budget_from(text: bytes) -> Budget:
    """Read the amounts of a scope as a script replies them. Raises ValueError and the like."""
    scope, limit, spent, reserved, stop_at, period, since_s = text.decode("ascii").split("|")
    return Budget(scope, int(limit) if limit else None, int(spent), int(reserved),
                  int(stop_at) if stop_at else None, period, int(since_s))


def in_steps(rows: Sequence[_T], most: int) -> Iterator[Sequence[_T]]:
    """Yield rows in parts of so many."""
    return (rows[at:at + most] for at in range(0, len(rows), most))


class Watch:
    """Which processes are dead, from what this one has seen of their heartbeats. Pure.

    None is, before this process has itself been heard for DEAD_S without a break: one that was
    stopped, or was cut off, begins to watch anew. The clocks of others play no part.
    """

    def __init__(self, dead_s: float, break_s: float) -> None:
        self._dead_s, self._break_s = dead_s, break_s
        self._heard_s = NEVER_S                           # when it was heard last, monotonic
        self._seen: dict[tuple[str, str], float] = {}     # (process, heartbeat) -> since when

    def forget(self) -> None:
        """Begin anew: the engine was restarted."""
        self._heard_s = NEVER_S

    def dead(self, beats: Mapping[str, str], now_s: float) -> dict[str, str]:
        """Return the dead, each with its last heartbeat, after one's own was heard."""
        if now_s - self._heard_s > self._break_s:
            self._seen = {}
        self._heard_s = now_s
        self._seen = {beat: self._seen.get(beat, now_s) for beat in beats.items()}
        return dict(beat for beat, since_s in self._seen.items() if now_s - since_s >= self._dead_s)


class SharedAccounts:
    """Accounts in the engine, for all processes of one cage; see the head of this chapter.

    Invariant: a number is in `_open` from before its reservation is sent, and in `_ending` from
    then until the engine has confirmed its end, so that each of our calls which the engine knows
    is in one of them. Raises Misconfigured.
    """
    is_shared = True

    def __init__(self, engine: Engine, cage: str, ledger: Ledger, *, limit: Optional[int] = None,
                 stop_at: Optional[int] = None, fsync: bool = False) -> None:
        self.engine, self.cage, self._ledger = engine, cage, ledger
        self._process = secrets.token_hex(8)
        self._key = f"{{ironcage:{cage}}}"
        self._lock = threading.Lock()              # guards the next five
        self._last_number = 0                      # that a call of ours was given
        self._open: dict[int, str] = {}            # number -> record; "": not confirmed yet
        self._ending: dict[int, Settlement] = {}   # number -> not confirmed yet
        self._ended: deque[tuple[float, Settlement]] = deque()    # confirmed a moment ago
        self._known: dict[str, Budget] = {}
        self._watch = Watch(DEAD_S, 2 * HEARTBEAT_S)
        self._learn_count: Optional[Callable[[CountRow], None]] = None
        self._counted: deque[CountRow] = deque(maxlen=COUNTS_WAITING)     # to be shared
        self._counts_seen = "0"                    # the last that was learned, in a stream
        self._wakes, self._is_stopping, self._is_closed = threading.Event(), False, False
        self._is_entering = True                   # what a restart may have forgotten
        self._held_until_s = NEVER_S               # for the others to enter it
        self._thread: Optional[threading.Thread] = None
        self.fault: Optional[str] = None           # why it could not be used last; None: it can
        with usable_engine(self.engine):
            self._generation, self._run_id = self._found_cage()
            self.durability, self._waits_for_disk = self._checked_engine(fsync)
            self._acknowledge()
            self.set_scopes([Scope(PROXY_SCOPE, limit, "total", stop_at, lambda since_s: 0)])
            self._settle_unconfirmed()
            self._beat()
        self._is_entering = False

    # Its beginning.

    def _found_cage(self) -> tuple[str, str]:
        """Return the cage's generation, and the run_id of the engine. Raises Misconfigured."""
        found = self.engine.ask(["HGET", self._key, "generation"])[0]
        if not isinstance(found, bytes):
            raise Misconfigured(
                f"there is no cage {self.cage} at {self.engine.address}; make it with "
                f"`ironcage_proxy.py cage new {self.cage} --shared URL`")
        return found.decode("ascii", "replace"), self.engine.run_id

    def _checked_engine(self, fsync: bool) -> tuple[str, bool]:
        """Find what a crash of the engine can forget, and whether reservations wait for its disk.

        Raises Misconfigured where it may evict, or cannot give what --fsync asks for.
        """
        info = self.engine.ask(["INFO", "memory"])[0]
        policy = re.search(rb"maxmemory_policy:([\w-]+)", info or b"")
        if policy is None or policy[1] != b"noeviction":
            raise Misconfigured(
                f"the engine at {self.engine.address} may evict what it holds (maxmemory-policy "
                f"{policy[1].decode('ascii') if policy else 'unknown'}); set it to noeviction")
        setting: dict = {}
        with contextlib.suppress(EngineFailed):            # often closed: then it counts as none
            words = iter(self.engine.ask(["CONFIG", "GET", "append*"])[0])
            setting = dict(zip(words, words))
        flushes = setting.get(b"appendfsync")
        if setting.get(b"appendonly") != b"yes":
            flushes = b"" if setting else None
        forgets = FORGETS.get(flushes, FORGETS[None])
        if not fsync or flushes == b"always":
            return forgets, False
        with contextlib.suppress(EngineFailed):            # it lacks WAITAOF, or never flushes
            _, (flushed, _) = self.engine.ask(["HSET", self._key, "asked_to_flush", 1], _FLUSH,
                                              extra_s=DISK_DEADLINE_MS // 1000)
            if flushed:
                return "nothing: reservations wait for its disk", True
        raise Misconfigured(f"--fsync: the engine at {self.engine.address} does not flush to its "
                            "disk; set appendonly yes and appendfsync always (or use one with "
                            "WAITAOF), or leave --fsync out")

    def _settle_unconfirmed(self) -> None:
        """Enter what an earlier process on this ledger settled, and could not say here."""
        strange = 0
        for row in self._ledger.unconfirmed():
            generation, process, number, record = row["shared"].split("/")
            if generation != self._generation:
                strange += 1
            else:
                self._settle_there(_row_settlement(row, process, int(number), record))
        if strange:
            log.warning("calls of another cage stay as they are in the ledger", extra={
                "fields": {"cage": self.cage, "calls": strange}})

    def start(self, on_fault: Callable[[str], None],
              learn: Callable[[CountRow], None]) -> None:
        """Begin to send heartbeats, and to `learn` what providers have counted for others."""
        self._learn_count = learn
        self._thread = Housekeeper("ironcage-shared", self._keep_up, on_fault)
        self._thread.start()

    # Asking the engine.

    def _run(self, name: str, *words: Any, flushed: bool = False) -> tuple:
        """Run a script of the cage; return what it found, and the amounts of scopes, which are
        kept as known; `flushed`: and have the engine's disk hold it. Raises EngineFailed."""
        then, extra_s = ([_FLUSH], DISK_DEADLINE_MS // 1000) if flushed else ([], 0)
        replies: list[Reply] = []
        for how, script in (("EVALSHA", SCRIPT_DIGESTS[name]), ("EVAL", SCRIPTS[name])):
            try:
                replies = self.engine.ask(
                    [how, script, 1, self._key, self._generation, self._run_id, *words], *then,
                    run_id=self._run_id, extra_s=extra_s)
                break
            except EngineFailed as err:
                if (how, err.code) == ("EVALSHA", "NOSCRIPT"):
                    continue
                self._is_entering |= err.code == "RESTARTED"
                if err.code != "HELD":
                    self._note(err.reason)
                raise
        self._note(None)
        with replied():
            (found, *amounts), *disk = replies
            budgets = [_budget_from(text) for text in amounts]
            is_late = flushed and not disk[0][0]
        with self._lock:
            self._known.update((budget.scope, budget) for budget in budgets)
        if is_late:
            raise EngineFailed("its disk is too slow", was_sent=True)
        return found, budgets

    def _note(self, fault: Optional[str]) -> None:
        """Log that the engine can no longer be used, or that it can again."""
        before, self.fault = self.fault, fault
        if before is None and fault is not None:
            log.error("the shared budget cannot be used", extra={"fields": {
                "cage": self.cage, "reason": fault}})
            self._wakes.set()
        elif before is not None and fault is None:
            log.warning("the shared budget is usable again", extra={"fields": {
                "cage": self.cage}})

    # What Accounts can do.

    def take(self, claim: Reservation, microdollars: int,
             least_free: Sequence[int]) -> Optional[list[Budget]]:
        """Do as Accounts.take, by one exchange. One without a reply is cancelled."""
        if self._is_entering:
            raise EngineFailed(ENGINE_ERRORS["RESTARTED"], "RESTARTED")
        microdollars = min(microdollars, MOST_SHARED)
        with self._lock:
            self._last_number = number = self._last_number + 1
            self._open[number] = ""
        try:
            taken, budgets = self._run("take", self._process, number, microdollars,
                                       "|".join(claim.scopes), *least_free,
                                       flushed=self._waits_for_disk)
            with replied():
                if len(budgets) != len(claim.scopes):
                    raise ValueError(NOT_A_REPLY)
                record = "" if taken is None else taken.decode("ascii")
                admitted_s = int(record.split("|")[1]) if record else 0
        except EngineFailed as err:
            self._end(Settlement(self._process, number, "", 0), is_new=err.was_sent)
            raise
        with self._lock:
            if not record:
                del self._open[number]
                return budgets
            self._open[number] = record
        claim.number, claim.microdollars, claim.admitted_s = number, microdollars, admitted_s
        claim.is_limited |= any(budget.limit is not None for budget in budgets)
        claim.shared = f"{self._generation}/{self._process}/{number}/{record}"
        return None

    def _end(self, settlement: Settlement, *, is_new: bool = True) -> None:
        """End a call of ours here; the engine is to hear of it, unless it cannot know the call."""
        with self._lock:
            self._open.pop(settlement.number, None)
            if is_new:
                self._ending[settlement.number] = settlement

    def settle(self, claim: Reservation, microdollars: int,
               row: Optional[Mapping[str, Any]] = None) -> None:
        """Do as Accounts.settle. While the engine is away the settlement is kept."""
        with self._lock:
            record = self._open.get(claim.number, "")
        settlement = Settlement(self._process, claim.number, record, microdollars) \
            if row is None else _row_settlement(row, self._process, claim.number, record)
        self._end(settlement)
        if self.fault is None:
            try:
                self._settle_there(settlement)
            except EngineFailed:
                self._wakes.set()                          # tell it soon, not at a heartbeat

    def _settle_there(self, settlement: Settlement) -> None:
        """Settle a call in the engine. Raises EngineFailed."""
        outcome, _ = self._run("settle", settlement.process, settlement.number, settlement.record,
                               settlement.microdollars, settlement.label, *settlement.counts)
        if outcome in _LATE:
            log.warning(f"a late settlement {_LATE[outcome]}", extra={"fields": {
                "cage": self.cage, "process": settlement.process,
                "usd": format_usd(settlement.microdollars)[1:]}})
        elif outcome not in (b"settled", b"known"):
            raise EngineFailed(NOT_A_REPLY, was_sent=True)
        now_s = time.monotonic()
        with self._lock:
            if self._ending.get(settlement.number) is settlement:     # not of an earlier process
                del self._ending[settlement.number]
            self._ended.append((now_s, settlement))
            while self._ended[0][0] < now_s - self._hold_s:
                self._ended.popleft()
        if settlement.row_id is not None:
            self._ledger.confirm(settlement.row_id)

    @property
    def _hold_s(self) -> float:
        """Return for how long a restart bars admissions: a heartbeat, and the time to be heard."""
        return HEARTBEAT_S + 2 * ENGINE_DEADLINE_S

    def budgets(self, scopes: Sequence[str]) -> list[Budget]:
        """Return what scopes hold, all at one instant. Raises EngineFailed."""
        if self._is_closed:
            return self.known(scopes)
        for some in in_steps(scopes, AT_ONCE):
            self._run("budgets", "|".join(some))
        return self.known(scopes)

    def known(self, scopes: Sequence[str]) -> list[Budget]:
        """Return what was seen of scopes last, without asking."""
        with self._lock, replied():
            return [self._known[scope] for scope in scopes]

    def set_limits(self, changes: Mapping[str, Any], *, must_fit: bool = True) -> None:
        """Do as Accounts.set_limits, for all processes; here a stop must always fit."""
        words = ["" if name not in changes else "=" if changes[name] is FLAGGED
                 else _limit_word(changes[name]) or "-" for name in ("limit", "stop_at")]
        refused, _ = self._run("limits", PROXY_SCOPE, *words)
        if refused is not None:
            with replied():
                limit, stop_at = (int(amount) if amount else None for amount in refused.split(b"|"))
            check_stop(limit, stop_at)

    def set_scopes(self, rows: Sequence[Scope]) -> None:
        """Open scopes, or lower their limits: the lowest that any process named holds.

        Raises Misconfigured for a period that is another in the cage.
        """
        for some in in_steps(rows, AT_ONCE):
            with checking("--shared:"):
                words = [word for row in some for word in (
                    row.name, row.period, _limit_word(row.limit), _limit_word(row.stop_at))]
            with usable_engine(self.engine):
                other, budgets = self._run("scopes", *words)
                if other is not None:
                    name, _, period = other.decode("ascii").partition("|")
                    raise Misconfigured(f"the token {name} has the period {period} in the cage "
                                        f"{self.cage}; it must be the same in every process")
                if len(budgets) != len(some):
                    raise ValueError(NOT_A_REPLY)
            for row, budget in zip(some, budgets):
                shown = {"scope": row.name, "cage": self.cage, **{
                    f"{what}_usd": "none" if amount is None else format_usd(amount)[1:]
                    for what, amount in (("own", row.limit), ("cage_limit", budget.limit))}}
                if row.limit not in (None, budget.limit):
                    log.warning("the cage has another limit, which holds", extra={"fields": shown})
                if budget.limit is not None and budget.spent + budget.reserved > budget.limit:
                    log.warning("the limit is below what is spent and reserved",
                                extra={"fields": shown})

    def sessions(self, tokens: Container[str], most: int) -> list[Budget]:
        """Return none: their budgets are not held with --shared."""
        return []

    # Heartbeats.

    def _keep_up(self) -> None:
        """Send heartbeats, and what could not be said at once, until the end."""
        beat_s = 0.0
        while not self._is_stopping:
            now_s = time.monotonic()
            with contextlib.suppress(EngineFailed):
                if self.fault is not None or self._ending:
                    self._catch_up()
            with contextlib.suppress(EngineFailed):        # also where a call cannot be settled
                if self.fault is not None or now_s >= beat_s:
                    beat_s = now_s + HEARTBEAT_S
                    self._beat()
                    self._share_counts()
            is_behind = self.fault is not None or self._ending
            self._wakes.wait(min(HEARTBEAT_S, CATCH_UP_S) if is_behind
                             else max(0.0, beat_s - time.monotonic()))
            self._wakes.clear()

    def _catch_up(self) -> None:
        """Have an engine that was restarted know again all that we know, and settle what is not
        settled yet."""
        with self._lock:
            ended, ending = [settlement for _, settlement in self._ended], [*self._ending.values()]
        if self._is_entering:
            run_id = self._run_id
            try:
                self._acknowledge()
                for settlement in ended:
                    self._settle_there(settlement)
                self._beat()
            except EngineFailed:
                self._run_id = run_id
                raise
            self._is_entering = False
        for settlement in ending:
            try:
                self._settle_there(settlement)
            except EngineFailed as err:
                if not err.code:                           # else it is about this one, perhaps
                    raise

    def _acknowledge(self) -> None:
        """Let the cage know the engine's run_id; if it is new, no call is admitted for a while."""
        self.engine.ask(["PING"])
        self._watch.forget()
        self._run_id = self.engine.run_id
        held_s, _ = self._run("restarted", self._hold_s)
        if 0 < held_s <= self._hold_s:
            self._held_until_s = time.monotonic() + held_s
            log.warning("the shared budget admits no call yet", extra={"fields": {
                "cage": self.cage, "seconds": held_s, "reason": ENGINE_ERRORS["HELD"]}})

    def _beat(self) -> None:
        """Say that we live, and of which calls; and charge those of the dead at their bounds."""
        with self._lock:
            last, ours = self._last_number, {**self._open, **dict.fromkeys(self._ending, "")}
        with replied():
            beats, _ = self._run("beat", self._process, PROXY_SCOPE, last,
                                 *itertools.chain(*ours.items()))
            words = iter([word.decode("ascii") for word in beats])
        for process, beat in self._watch.dead(dict(zip(words, words)), time.monotonic()).items():
            if process != self._process:
                self._charge_dead(process, beat)

    def _charge_dead(self, process: str, beat: str) -> None:
        log.warning("a process of the cage is gone; its open calls are charged at their bounds",
                    extra={"fields": {"cage": self.cage, "process": process}})
        self._run("charge", process, beat)

    def keep_count(self, row: CountRow) -> None:
        """Have the others know it by the heartbeat after the next."""
        self._counted.append(row)

    def _share_counts(self) -> None:
        """Show the others what providers counted for us, and learn what they did for them."""
        key = f"{self._key}:counts"
        mine = [count_to_json(self._counted.popleft()) for _ in range(len(self._counted))]
        self.engine.ask(*(["XADD", key, "MAXLEN", MOST_SHARED_COUNTS, "*", "count", text]
                          for text in mine if len(text) <= MAX_COUNT_BYTES),
                        ["EXPIRE", key, TOMBSTONE_S])
        found: Reply = None
        while self._learn_count is not None and found != []:
            found = self.engine.ask(["XRANGE", key, f"({self._counts_seen}", "+", "COUNT",
                                     AT_ONCE])[0]
            with replied():
                for number, (_, text) in found:
                    self._counts_seen = number.decode("ascii")       # a broken one is met once
                    self._learn_count(count_from_json(text))

    def as_json(self) -> dict:
        """Return what /ironcage/status says of it."""
        is_held = time.monotonic() < self._held_until_s
        with self._lock:
            return {"engine": str(self.engine.address), "cage": self.cage,
                    "fault": self.fault or (ENGINE_ERRORS["HELD"] if is_held else None),
                    "amounts_are": "of the cage", "calls_are": "of this process",
                    "unconfirmed_settlements": len(self._ending)}

    def close(self) -> None:
        """Settle what is left to settle, and leave the cage."""
        self._is_stopping = True
        self._wakes.set()
        if self._thread is not None:
            self._thread.join()
        with contextlib.suppress(EngineFailed):
            self._catch_up()
            if not self._open and not self._ending:        # else it is charged, as of the dead
                self.engine.ask(["HDEL", f"{self._key}:beats", self._process])
        if self._ending:
            log.error("settlements are not in the shared budget", extra={"fields": {
                "cage": self.cage, "settlements": len(self._ending)}})
        self._is_closed = True
        self.engine.close()


def accounts_for(settings: Settings, ledger: Ledger, slot: Slot) -> Optional[SharedAccounts]:
    """Open the shared accounts that the settings name; None: this process keeps its own.

    Raises Misconfigured.
    """
    address = settings.shared
    if address is None:
        return None
    for is_so, warning in (
            (address.is_public, "the password of the shared budget is in the command line, where "
             "every process of this machine can read it; put the URL into IRONCAGE_SHARED"),
            (address.scheme == "redis" and not LOOPBACK_HOST.fullmatch(address.host),
             "redis:// sends the password of the shared budget, and what is spent, in the clear: "
             "use rediss:// over a network that others can read"),
            (not address.password, "the engine of the shared budget has no password: an agent that "
             "can reach it can change its budget")):
        if is_so:
            log.warning(warning, extra={"fields": {"engine": str(address)}})
    return SharedAccounts(Engine(address, slot), settings.cage, ledger, fsync=settings.fsync,
                          limit=settings.budget_microdollars,
                          stop_at=settings.stop_at_microdollars)


def make_cage(engine: Engine, cage: str) -> bool:
    """Make a cage, with nothing spent and no limits; return whether there was one, now forgotten.

    Processes that use it take no new calls until they are started again. Raises EngineFailed.
    """
    key, cursor = f"{{ironcage:{cage}}}", b"0"
    there_was = engine.ask(["DEL", key])[0] == 1
    while True:
        cursor, keys = engine.ask(["SCAN", cursor, "MATCH", f"{key}:*", "COUNT", 1_000])[0]
        if keys:
            engine.ask(["UNLINK", *keys])
        if cursor == b"0":
            break
    engine.ask(["HSET", key, "generation", secrets.token_hex(16), "run_id", engine.run_id,
                "created", int(time.time())])
    return there_was


def shared_usage(engine: Engine, cage: str, since_s: int) -> dict:
    """Return what a whole cage spent since a day, as usage_report() has it of a ledger.

    Raises EngineFailed; Misconfigured where there is none.
    """
    key = f"{{ironcage:{cage}}}"
    created_s = engine.ask(["HGET", key, "created"])[0]
    if created_s is None:
        raise Misconfigured(f"there is no cage {cage} at {engine.address}")
    first, last = max(int(created_s), since_s) // DAY_S, int(time.time()) // DAY_S + 1
    cells: dict[tuple[str, str, str], Counter] = {}       # (token, model, day) -> counts
    for day in range(first, last + 1):
        words = iter(engine.ask(["HGETALL", f"{key}:day:{day}"])[0])
        shown = utc_text(day * DAY_S)[:10]
        for field, amount in zip(words, words):
            token, _, rest = field.decode("utf-8").partition("|")
            model, _, what = rest.rpartition("|")
            cells.setdefault((token, model, shown), Counter())[what] += int(amount)
    for process in engine.ask(["HKEYS", f"{key}:beats"])[0]:
        for record in engine.ask(["HVALS", f"{key}:open:{process.decode('ascii')}"])[0]:
            bound, admitted_s, *scopes = record.decode("ascii").split("|")
            shown = utc_text(int(admitted_s))[:10]
            token = scopes[-1] if len(scopes) > 1 else UNNAMED_TOKEN
            cells.setdefault((token, "in flight", shown), Counter()).update(
                requests=1, unsettled_requests=1, cost_microdollars=int(bound))
    return overview_of([{"token": token, "model": model, "day": day,
                         **{what: counts[what] for what in SPEND_COUNTS}}
                        for (token, model, day), counts in cells.items()
                        if any(counts.values())])          # else it was corrected away


# ==== 25. Router ================================================================================
#
# The life of a call is Router._carried(): route, bound, reserve, write down, send, forward while
# metering, settle. Money, network and record meet here only. Whatever happens to a call, it settles
# once, in _settle().


class Answer(NamedTuple):
    """What goes back to the client: a whole body, or reads as they arrive."""
    status: int
    headers: Iterable[tuple[str, str]]
    body: Optional[bytes] = None
    reads: Optional[Iterator[list[bytes]]] = None
    length: int = UNTIL_CLOSE                  # bytes in `reads`, where known


def made_answer(request_id: str, body: bytes, kind: str = "application/json",
                headers: Iterable[tuple[str, str]] = ()) -> Answer:
    """Return an answer that no provider had a part in."""
    return Answer(200, (("content-type", kind), *own_ids(request_id), *headers), body)


class EchoResponse:
    """An answer of the echo model, with the manners of an UpstreamResponse."""
    status = 200

    def __init__(self, api: str, body: JsonBody, request_id: str) -> None:
        answer = echo(api, body.fields, created_at=int(time.time()),
                      answer_id=hashlib.sha256(request_id.encode()).hexdigest()[:24])
        streamed = api != "embeddings" and optional_flag(body.fields, "stream")
        self._reads = ([event] for event in echo_stream(api, answer)) if streamed \
            else iter([[json_bytes(echo_whole(api, answer))]])
        kind = "text/event-stream; charset=utf-8" if streamed else "application/json"
        self.headers = Headers([("content-type", kind), *own_ids(request_id)])

    def reads(self, tick_s: float = threading.TIMEOUT_MAX) -> Iterator[list[bytes]]:
        return self._reads

    def close(self) -> None:
        """Nothing to give back."""


Response = Union[UpstreamResponse, EchoResponse]


class ProviderFailed(Exception):
    """The provider answered a translated call with an error, which is here in its client's words.
    """

    def __init__(self, status: int, body: dict) -> None:
        super().__init__(status)
        self.status, self.body = status, body


def _bounded_name(model: str, param: str) -> str:
    """Return a model's name, which is looked for, kept and logged. Raises BadRequest."""
    if len(model) > MAX_MODEL_CHARS:
        raise BadRequest(f"{param}: a model's name has at most {MAX_MODEL_CHARS} characters",
                         param=param)
    return model


def named_model(fields: Mapping[str, Any]) -> str:
    """Return the model that a request names; "" where a prompt stored at the provider names it.

    Raises BadRequest.
    """
    model = fields.get("model")
    if model is None and isinstance(fields.get("prompt"), dict):
        return ""
    if not isinstance(model, str) or not model:
        raise BadRequest("model must be a string that names a model", param="model")
    return _bounded_name(model, "model")


def other_models(fields: Mapping[str, Any]) -> Iterator[str]:
    """Yield models that a request names beside its own: in tools, as fallbacks, in another case.

    Raises BadRequest.
    """
    for name, value in fields.items():
        if name in ("models", "fallbacks", "tools"):
            for row in value if isinstance(value, list) else ():
                model = row if isinstance(row, str) else json_object(row).get("model")
                if model is not None:
                    yield _bounded_name(str(model), name)
        elif name != "model" and name.lower() == "model":
            yield _bounded_name(str(value), name)


_CHARSET = r"(?i)charset=\"?([^\s;\"]+)"


def json_body(request: ClientRequest) -> JsonBody:
    """Return the body of a metered request. Raises BadRequest, ServerBusy."""
    kind = request.head.headers.get("content-type") or ""
    charset = re.search(_CHARSET, kind) if "=" in kind else None
    if charset is not None and charset[1].lower() not in ("utf-8", "utf8"):
        raise UnsupportedBody("a JSON body is UTF-8; its content-type says otherwise")
    return request.parsed()


def answer_to_warming(fields: Mapping[str, Any], request_id: str) -> Answer:
    """Return the answer to a Messages call for no output. It is made to warm Anthropic's cache:
    another provider has none to warm."""
    writer, began, ended = MessagesWriter(fields, 0), Began("", fields["model"]), Ended("length")
    if not optional_flag(fields, "stream"):
        return made_answer(request_id, json_bytes(writer.whole(Whole(began, (), ended))))
    return made_answer(request_id, b"".join(wire_event("messages", event)
                                            for event in writer.events((began, ended))),
                       "text/event-stream")


def model_in(path: str) -> str:
    """Return the model that /v1/models/{id} asks for; "" for the list of all."""
    named = urllib.parse.unquote(path[len("/v1/models"):]).strip("/")
    return LONG_WINDOW_SUFFIX.sub("", named)


def models_answer(path: str, dialect: str, models: Mapping[str, tuple[str, Price]]) -> dict:
    """Return the answer to /v1/models or /v1/models/{id}; models: name -> (provider, price).

    Raises NotFound for a model that is not among them.
    """
    def entry(name: str) -> dict:
        owner, price = models[name]
        if dialect == "anthropic":
            return {"type": "model", "id": name, "display_name": name, "lifecycle": "active",
                    "created_at": "1970-01-01T00:00:00Z", "capabilities": None,
                    "max_input_tokens": price.max_input_tokens,
                    "max_tokens": price.max_output_tokens}
        return {"id": name, "object": "model", "created": 0, "owned_by": owner}

    named = model_in(path)
    if named:
        if named not in models:
            raise NotFound("no such model is known here: it has no price, or its provider's key "
                           "is not set")
        return entry(named)
    data = [entry(name) for name in models]
    if dialect == "anthropic":
        names = [*models] or [None]                # a token may be for none of them
        return {"data": data, "has_more": False, "first_id": names[0], "last_id": names[-1]}
    return {"object": "list", "data": data}


def without_escapes(text: str) -> tuple[str, bool]:
    """Return a part of a URL without its escapes, and whether none is left: whoever writes more of
    them, within each other, hides something."""
    for _ in range(4):
        text, before = urllib.parse.unquote(text), text
    return text, text == before


def may_be_metered(path: str) -> bool:
    """Whether some server may read a path as a metered route, behind whatever it begins with: in
    another case, with escapes within escapes, empty or dot segments, parameters, an extension."""
    path, is_plain = without_escapes(path)
    text = unicodedata.normalize("NFKC", re.split(r"[?#\0]", path)[0]).casefold()
    words = re.findall(r"[/\\]\W*?(\.\.|\w+)[^/\\]*", re.sub(r";[^/\\]*", "", text))
    return not is_plain or ".." in words or words[-1:] in [
        route.split("/")[-1:] for route in METERED_APIS]


def check_head(request: ClientRequest) -> None:
    """Raises UnmeteredRoute where a request's head may make it another one, or a dearer one, than
    its body says."""
    values = request.head.headers.values
    for name, *_ in COSTLY_HEADER.findall("\n{}\n".format("\n".join(values))):
        harmless = next(row[1] for row in COSTLY_HEADERS if re.fullmatch(row[0], name))
        if not re.fullmatch(harmless, values[name].lower()):
            raise UnmeteredRoute(f"the header {name}, by which a call becomes another one or has "
                                 "another price, cannot be used under a budget; leave it out")
    query, is_plain = without_escapes((request.head.query or "").replace("+", " "))
    if not is_plain or re.search(COSTLY_QUERY, query):
        raise UnmeteredRoute("a method override, or headers in the query, cannot be used under a "
                             "budget")


def check_models(caller: Caller, provider: Provider, models: Iterable[str]) -> None:
    """Raises ModelForbidden where a token is not for one of them."""
    if not all(caller.may_use(provider.name, model) for model in models):
        raise ModelForbidden(f"the token {caller.name} may use only {', '.join(caller.models)}",
                             param="model")


def check_sessions(config: Config, settings: Settings) -> None:
    """Raise Misconfigured where budgets of sessions would have to be held with those of others."""
    for caller in config.callers if settings.shared is not None else ():
        if caller.session_budget_microdollars is not None:
            raise Misconfigured(f"the token {caller.name} has a session_budget_usd, which is not "
                                "held with --shared; leave one of them out")


NO_RESPONSES = ' (if this server has no /v1/responses, give its provider "responses": false in ' \
               "--config, or start with --openai-chat-only where it stands in for OpenAI)"


class Router:
    """Carries requests to providers under one budget.

    open() is the way in. _carried() is the life of a metered call, a step a line.
    """

    def __init__(self, settings: Settings, prices: PriceBook, ledger: Ledger,
                 slot: Optional[Slot] = None) -> None:
        self.settings, self.prices, self.ledger = settings, prices, ledger
        self.slot = slot or Slot()
        self.memory = Memory(settings.max_memory_bytes, self.slot)
        self.hatches = {*(f"field {name}" for name in settings.allow_fields),
                        *(f"content {kind}" for kind in settings.allow_contents)}
        self.config, self.providers = Config(), {}
        self.controller = CostController(
            settings.budget_microdollars, stop_at=settings.stop_at_microdollars,
            spent_microdollars=ledger.spent(None, 0),
            accounts=accounts_for(settings, ledger, self.slot))
        self.reporter = Reporter(settings, self.slot, self.controller.accounts, self._secrets)
        self.totals = self.reporter.totals
        self.thinking = ThinkingMemory()
        self.counts = KnownCounts()
        for row in ledger.counts():
            self.counts.learn(row)
        self._is_cut = False
        self._transport = KeepAliveHandler(settings.timeouts, self.slot)
        self._opener = build_opener(self._transport)
        self.server: Optional[CageServer] = None
        if settings.server_url is not None:
            self.controller.set_budget(0)              # until there is a lease
            self.server = CageServer(
                settings.server_url, settings.server_token or settings.token, ledger,
                self._take_lease, cache_ttl_s=settings.cache_ttl_s,
                allow_plain_http=settings.allow_plain_http,
                on_fault=lambda name: self.slot.on_fault(name))
            self.reporter.tell_server = self.server.tell

    def _secrets(self) -> Iterator[Optional[str]]:
        """Yield our tokens and the keys of our own providers: no alert may hold them."""
        yield from (self.settings.token, self.settings.admin_token, self.settings.server_token)
        yield from (provider.key for provider in self.providers.values())

    def _take_lease(self, lease: Lease) -> None:
        """Set the limit that a lease allows, which --budget can lower."""
        limit, granted = self.settings.budget_microdollars, lease.spent_before + lease.granted
        self.controller.set_budget(granted if limit is None else min(limit, granted))

    def configure(self, config: Config, prices: PriceBook,
                  settings: Optional[Settings] = None) -> None:
        """Take a configuration: the scopes of its tokens, its providers, aliases and prices; and
        the secrets of settings. What is in flight keeps what it has.

        What can fail comes first, and then all is changed.
        """
        settings = settings or self.settings
        if settings.alert_url is not None:
            check_encrypted("the alerts", settings.alert_url, settings.allow_plain_http)
        providers = {provider.name: provider for provider in (
            *settings.providers, *config.providers, ECHO_PROVIDER)}
        check_sessions(config, settings)
        self.controller.set_scopes([Scope(
            caller.name, caller.budget_microdollars, caller.period, caller.stop_at_microdollars,
            functools.partial(self.ledger.spent, caller.name)) for caller in config.callers])
        self.reporter.thresholds.begin(self.controller.accounts.known(
            (PROXY_SCOPE, *(caller.name for caller in config.callers))))
        self._log_providers(providers, settings.providers)
        self.providers, self.config, self.prices = providers, config, prices
        self.settings = self.reporter.settings = settings
        if self.server is not None:
            self.server.token = settings.server_token or settings.token
        if self.reporter.alerts is not None:
            self.reporter.alerts.url = settings.alert_url

    def _log_providers(self, providers: Mapping[str, Provider],
                       beside: Sequence[Provider]) -> None:
        """Log which keys have changed, and which base URLs may not be as they were meant: `beside`
        is what the configuration goes before."""
        for name in providers.keys() & self.providers.keys():
            if providers[name].key != self.providers[name].key:
                log.warning("the key of a provider was changed", extra={"fields": {
                    "provider": name}})
        place = operator.attrgetter("base_url", "responses")
        for provider in beside:
            used = providers[provider.name]
            if place(used) != place(provider) != place(manners_of(provider.name)):
                log.warning("the configuration says where this provider is; its flags, such as "
                            "--openai-base-url, set nothing", extra={"fields": {
                                "provider": provider.name, "url": used.base_url,
                                "set_beside": provider.base_url}})
        for provider in providers.values():
            if provider.format == "openai" and not provider.base_url.endswith("/v1") \
                    and provider.base_url != manners_of(provider.name).base_url:
                log.warning("this base URL is used as it stands; 0.2.3 put /v1 behind it",
                            extra={"fields": {
                                "provider": provider.name,
                                "url": provider.url("/v1/chat/completions"),
                                "before": f"{provider.base_url}/v1/chat/completions"}})

    @property
    def routes(self) -> Routes:
        """Return where requests go, as it is configured now."""
        return Routes(self.providers, self.config)

    def shut_down(self) -> None:
        """Cut all calls that are under way; each settles as its thread sees it."""
        self._is_cut = True
        self._transport.shut_down()
        self.memory.close(cuts=True)

    def _fault(self, err: IroncageError) -> IroncageError:
        """Return what a client reads of a call that broke: our own stop is not its provider's."""
        if not (self._is_cut and isinstance(err, UpstreamError)):
            return err
        fault = ServerBusy("the proxy was stopped before this call had ended")
        fault.model = err.model
        return fault

    # The life of a request.

    @contextlib.contextmanager
    def open(self, request: ClientRequest, client: Optional[Wire] = None) -> Iterator[Answer]:
        """Yield the answer to a request; leaving the context settles the call and ends it upstream.

        `client` is looked at while a stream is awaited, so that a call ends with its client.
        Raises: any IroncageError; ClientGone.
        """
        if self._is_cut:
            raise ServerBusy("the proxy is stopping")
        named, path = self.routes.in_path(request.head.path)
        is_metered = request.head.method == "POST" and path in METERED_APIS
        carry = self._carried if is_metered else self._unmetered
        with self._session(request):
            yield from carry(request, named, path, client)

    def _session(self, request: ClientRequest) -> ContextManager[None]:
        """Keep the budget of a request's session, where its token caps each. Raises
        LedgerUnavailable."""
        caller, limit = request.caller, request.caller.session_budget_microdollars
        if limit is None:
            return NOTHING_HELD
        session = request.attribution["session"]
        return self.controller.accounts.session(Scope(
            request.scopes[-1], limit, "total", None, lambda since_s: 0 if since_s else
            self.ledger.spent_in_session(caller.name, session)))

    def _carried(self, request: ClientRequest, named: Optional[Provider], path: str,
                 client: Optional[Wire]) -> Iterator[Answer]:
        """Carry a metered call, from its body to its settlement: the steps of its life.

        Once money is set aside for it, it is settled on every way out.
        """
        api, body = METERED_APIS[path], json_body(request)
        asked_model, call = named_model(body.fields), None
        try:
            provider, model = self.routes.of_model(asked_model, named)
            provider = provider.speaking(api)
            if request.caller.models:
                check_models(request.caller, provider, [model, *other_models(body.fields)])
            if api == "messages" and provider.format == "openai" \
                    and body.fields.get("max_tokens") == 0:
                yield answer_to_warming(body.fields, request.request_id)
                return
            call = self._admitted(request, api, body, self._ready(provider), model, client)
            pieces = self._upstream_body(call)
            self._check_is_still_wanted(call, client)
            row = call.intent_row()
            self.ledger.intent(row, call.reservation.shared)
            call.row = row
            response = self._sent(call, path, pieces, client)
            try:
                yield self._answered(call, response)
            finally:
                response.close()
        except ClientGone:
            if call is not None:
                call.client_left = True
            raise
        except IroncageError as err:
            err.model = asked_model
            if self._fault(err) is err:        # from itself it would be a cycle, which keeps the
                raise                          # body until garbage is collected
            raise self._fault(err) from err
        finally:
            if call is not None:
                self._settle(call)

    def _ready(self, provider: Provider) -> Provider:
        """Return a provider with its key, from the Iron Cage server if there is one; then there is
        a lease too. Raises NoProviderKey, CageServerFailed."""
        if self.server is not None:
            with self.slot.outside():
                self.server.check_lease()
                known = self.server.provider()
            provider = known if known.name == provider.name else provider
        check_key(provider)
        return provider

    # What is not metered.

    def _unmetered(self, request: ClientRequest, named: Optional[Provider], path: str,
                   client: Optional[Wire]) -> Iterator[Answer]:
        """Answer what costs nothing: tokens of a model that nobody counts and the list of models
        here; all else at its provider. What counts a call's tokens goes where that call would."""
        self._check_unmetered(request, named, path)
        method, api = request.head.method, COUNTING_ROUTES.get(path)
        provider, pieces = named or self.routes.of_client(request), [request.body]
        betas: Sequence[str] = ()
        if api is not None and method == "POST":
            body = request.parsed()
            asked_model = named_model(body.fields)
            provider, model = self.routes.of_model(asked_model, named)
            provider = provider.speaking(api)
            if provider.format == "echo" or api not in provider.apis:
                yield self._counted_here(request.request_id, api, provider, body.fields)
                return
            changes = {} if model == asked_model else {"model": model}
            pieces = body.spliced(changes, frozenset())
            betas = self.routes.window_betas(asked_model, provider)
        elif method == "GET" and re.match(r"/v1/models(/|$)", path) \
                and (named is None or named.key is None):      # else the provider's own list
            models = self.routes.known_models(self.prices, request.caller,
                                              self.server.provider_name if self.server else None,
                                              model_in(path))
            yield made_answer(request.request_id, json_bytes(
                models_answer(path, request.dialect, models)))
            return
        yield from self._passed_through(request, self._ready(provider), path, pieces, betas, client)

    def _check_unmetered(self, request: ClientRequest, named: Optional[Provider],
                         path: str) -> None:
        """Refuse, under a budget, all but the routes that are free. Raises UnmeteredRoute."""
        caller, method = request.caller, request.head.method
        if not caller.models and self.controller.available(request.scopes) is None:
            return
        check_head(request)
        if caller.models and request.body:
            fields = request.parsed().fields
            if fields.get("model") is not None:
                provider, model = self.routes.of_model(named_model(fields), named)
                check_models(caller, provider, [model])
        is_allowed = any(fnmatch.fnmatchcase(path, p) for p in self.settings.allow_paths) \
            and not (method in BODY_METHODS and may_be_metered(path))
        if not is_allowed and not is_free_route(
                method, path, named or self.routes.of_client(request)):
            raise UnmeteredRoute(
                f"{method} {path[:100]} is not metered, so it cannot be used under a budget; "
                "--allow-path lets a path through, unless a provider may read it as a metered one")

    @staticmethod
    def _counted_here(request_id: str, api: str, provider: Provider,
                      fields: Mapping[str, Any]) -> Answer:
        """Answer how many tokens a call's input has: exactly for the echo model, else about."""
        is_echo = provider.format == "echo"
        body: dict = {"input_tokens": echo_input_tokens(fields) if is_echo
                      else estimated_input_tokens(fields)}
        if api == "responses":
            body["object"] = "response.input_tokens"
        return made_answer(request_id, json_bytes(body),
                           headers=() if is_echo else [("x-ironcage-estimated", "1")])

    def _passed_through(self, request: ClientRequest, provider: Provider, path: str,
                        pieces: Sequence[bytes], betas: Iterable[str],
                        client: Optional[Wire]) -> Iterator[Answer]:
        """Send an unmetered call and yield its answer, once: forwarded both ways as it is."""
        response = self._send(request, provider, path, pieces, client, added_betas=betas)
        self.totals.add((request.caller.name, provider.name, ""), Counts(
            requests=1, failed_requests=int(response.status >= 400)))
        log.info("request passed through unmetered", extra={"fields": {
            "request_id": request.request_id, "token": request.caller.name,
            "provider": provider.name, "path": path[:100], "status": response.status}})
        try:
            yield Answer(response.status, answer_headers(response.headers),
                         reads=response.reads(), length=response.stated_length)
        finally:
            response.close()

    # Admission: bound and reserve, or refuse.

    def _admitted(self, request: ClientRequest, api: str, body: JsonBody, provider: Provider,
                  model: str, client: Optional[Wire]) -> Call:
        """Set aside the worst case of a call. Raises BadRequest and its kin, BudgetExceeded."""
        while True:
            free = self.controller.available(request.scopes)
            call = self._planned(request, api, body, provider, model, free)
            call.scopes = request.scopes
            call.reservation = self._reserved(call, client)
            if free is not None or not call.reservation.is_limited:
                break
            self.controller.cancel(call.reservation)   # a budget came meanwhile: by its rules
        if call.price is not None and call.price.is_stand_in:
            self.totals.observe(("priced_as",))
        return call

    def _planned(self, request: ClientRequest, api: str, body: JsonBody, provider: Provider,
                 model: str, free: Optional[int]) -> Call:
        """Make a call as it will be sent, with its price and its bound; under a limit it has both.

        Raises BadRequest and its kin.
        """
        prices, limited = self.prices, free is not None        # one book for all of this call
        price = prices.find(model, provider.name)
        carrier = carrying_api(api, provider, model, price)
        call = Call(request, provider, api, model, body) if carrier == api else \
            self._translated(request, provider, (api, carrier), model, body, price, limited)
        call.prices = prices
        call.meter.hold = functools.partial(request.memory.hold, part="answer")
        call.added_betas += self.routes.window_betas(named_model(body.fields), provider)
        asked_output_tokens(call.api, call.body.fields)      # which is a number at any price
        if limited:
            check_head(request)
            price = price or prices.price(model, provider.name)
            for opened in check_boundable(call.api, call.body, price, provider=provider,
                                          model=model, hatches=self.hatches, hosted_tools=not (
                                              self.settings.no_hosted_tools
                                              or self.settings.bound == "bytes")):
                self.totals.observe(("hatch", opened))
        call.price = price
        if price is not None:
            try:
                call.bound = self._bound(call, price, free)
            except UnboundedRequest:
                if limited:
                    raise
        return call

    def _translated(self, request: ClientRequest, provider: Provider,
                    apis: tuple[str, Optional[str]], model: str, body: JsonBody,
                    price: Optional[Price], limited: bool) -> Call:
        """Make a call in the API that its provider speaks. Raises BadRequest, Untranslatable.

        Under a limit a cap that the client did not set is left to the reservation.
        """
        check_thread(body.fields)
        api, carrier = apis
        if carrier is None:
            paths = [path for path, one in METERED_APIS.items()
                     if carrying_api(one, provider, model, None)]
            raise Untranslatable(
                f"the model is served by {provider.name}, which does not speak this path's "
                f"dialect; call it at {' or '.join(paths)}", param="model")
        most = price.max_output_tokens if price is not None else None
        losses = Losses(strict=self.settings.strict
                        or request.head.headers.get("x-ironcage-strict") == "1")
        before = request.memory.parts["body"]
        request.memory.hold(before + COPIES * len(request.body))
        whose = (request.caller.name, provider.name, model)
        target = Target(
            most or UNKNOWN_MAX_OUTPUT_TOKENS, provider.fields is None, provider,
            lambda *key: self.thinking.recall((*whose, *key)),
            lambda *key, thoughts: self.thinking.keep((*whose, *key), thoughts))
        translator = Translator(api, carrier, {**body.fields, "model": model}, losses, target,
                                str(body.fields["model"]))
        fields = translator.request
        if limited and asked_output_tokens(api, body.fields) is None:
            fields = {name: value for name, value in fields.items() if name != "max_tokens"}
        call = Call(request, provider, translator.api, model,
                    request.parsed(json_bytes(fields), before))
        call.translator, call.losses = translator, losses
        call.added_betas = translator.terms.betas
        return call

    def _bound(self, call: Call, price: Price, free: Optional[int]) -> Bound:
        """Return a call's worst case: by bytes while that is little of what is free, else measured.
        """
        betas = anthropic_betas(call.request.head, call.added_betas)
        provider = call.provider
        if ACCOUNT_HEADER.search("\n{}\n".format("\n\n".join(call.request.head.headers.values))):
            provider = provider._replace(default_service_tier=UNKNOWN_TIER)
        options: dict = {"provider": provider, "may_be_lowered": not self.settings.no_fit,
                         "said_choice": call.translator and call.translator.terms.said_choice,
                         "window": LONG_WINDOW_TOKENS if "context-1m" in betas.lower() else 0}
        bound = bound_of_request(call.api, call.body, price, **options)
        if free is None or self.settings.bound == "bytes" \
                or bound.microdollars(0) * LITTLE_OF_WHAT_IS_FREE <= free:
            return bound
        known = known_input_tokens(
            call.api, call.body, price,
            functools.partial(self.counts.find, json.dumps(count_scope(call))),
            functools.partial(call_prompt, call), options["window"])
        return bound_of_request(call.api, call.body, price, measured=True, input_tokens=known,
                                **options)

    def _tight_bound(self, call: Call) -> Optional[Bound]:
        """Return the bound of a call that is charged by it, where a closer look can pay."""
        bound = call.bound
        if bound is None or bound.loops or len(call.body.raw) < LEAST_COUNTED_BYTES:
            return bound
        caps = Caps(call.reservation.output_cap, call.set_hosted_uses or 0)
        return min(bound, self._bound(call, call.price, 0).admitted(caps),
                   key=lambda one: one.input_picodollars)

    def _reserved(self, call: Call, client: Optional[Wire]) -> Reservation:
        """Set a call's worst case aside in all of its scopes, waiting if need be.

        Under a limit a call without an output cap, or with one that does not fit, gets one that
        does. Raises BudgetExceeded, InsufficientBudget; ServerBusy; ClientGone.
        """
        bound = call.bound or fixed_bound(0)
        claim = self.controller.admit(
            bound, call.scopes, wait_s=self.settings.wait_s,
            has_left=lambda: client is not None and bool(has_hung_up(client.sock)),
            waiting=self.slot.outside)
        names = MAX_TOKENS_FIELDS[call.api]
        if claim.is_limited and bound.output_picodollars and names \
                and (claim.output_cap < bound.output_tokens
                     or all([call.body.fields.get(name) is None for name in names])):
            call.set_output_cap = claim.output_cap
        if claim.is_limited and bound.has_use_caps:
            call.set_hosted_uses = claim.caps.hosted_uses
        call.bound = call.bound and bound.admitted(claim.caps)
        return claim

    # Sending.

    def _upstream_body(self, call: Call) -> Sequence[bytes]:
        """Return the client's bytes in pieces, with only the fields changed that must be."""
        fields, changes = call.body.fields, Changes(call.api, call.body.fields)
        if fields.get("model", "") != call.model:
            changes.set["model"] = call.model
        if call.wants_stream and call.api in ("chat", "completions") \
                and call.provider.stream_usage:
            options = fields.get("stream_options")
            if options is not None and not isinstance(options, dict):
                raise BadRequest("stream_options must be an object", param="stream_options")
            call.hides_usage = not optional_flag(options or {}, "include_usage")
            if call.hides_usage:
                changes.set["stream_options"] = {**(options or {}), "include_usage": True}
        if call.reservation.is_limited:
            if call.bound.output_picodollars:
                changes.cap_output(call.provider, call.set_output_cap)
            changes.cap_sellers(call.price, call.bound.input_tokens, call.provider.sellers)
            if call.set_hosted_uses is not None:
                changes.cap_uses(call.set_hosted_uses)
        for name, value in changes.reported.items():
            call.losses.report(name, value)
        if call.api in SEALS and call.translator is None \
                and OWN_SIGNATURE.encode("ascii") in call.body.raw:
            kept = without_own_thinking(call.api, fields)
            changes.set.update(kept)
            if kept:
                call.losses.adjust(SEALS[call.api][2], "removed")
        return call.body.spliced(changes.set, frozenset(changes.left_out))

    def _check_is_still_wanted(self, call: Call, client: Optional[Wire]) -> None:
        """Whether, if a call waited, its client is still there, and its token valid.

        Raises ClientGone, Unauthorized.
        """
        caller = call.request.caller
        if call.reservation.decided is None:
            return
        if client is not None and has_hung_up(client.sock):
            raise ClientGone
        if caller.scopes and not any(row.sha256 == caller.sha256 and not row.has_expired()
                                     for row in self.config.callers):
            raise Unauthorized(f"the token {caller.name} was withdrawn while its call waited",
                               headers=DO_NOT_RETRY)

    def _sent(self, call: Call, path: str, pieces: Sequence[bytes],
              client: Optional[Wire]) -> Response:
        """Send a call, and note what the head of its answer says. Raises UpstreamError, ClientGone.
        """
        request = call.request
        if call.provider.format == "echo":
            response: Response = EchoResponse(call.api, parse_json_object(b"".join(pieces)),
                                              request.request_id)
            call.was_sent = True
        else:
            call.was_sent, call.sent_ns = True, time.monotonic_ns()
            try:
                response = self._send(
                    request, call.provider, path if call.translator is None
                    else DIALECTS[call.api].path, pieces, client if call.wants_stream else None,
                    call.translator, call.added_betas)
            except UpstreamError as err:
                call.was_sent = err.may_be_billed
                raise
        call.status = response.status
        if call.status == 401 and self.server is not None:
            self.server.refused(call.provider)
        call.first_byte_ms = (time.monotonic_ns() - call.sent_ns) // 10 ** 6
        stated_id = response.headers.get("x-request-id") or response.headers.get("request-id") or ""
        call.provider_request_id = stated_id if PRINTABLE_NAME.fullmatch(stated_id) else None
        return response

    def _send(self, request: ClientRequest, provider: Provider, path: str, body: Sequence[bytes],
              watched: Optional[Wire], translator: Optional[Translator] = None,
              added_betas: Iterable[str] = ()) -> UpstreamResponse:
        """Make one upstream call. Raises UpstreamError, ClientGone."""
        query = "" if request.head.query is None or translator else f"?{request.head.query}"
        headers = upstream_headers(request.head, provider, sum(map(len, body)), translator,
                                   added_betas)
        response = self._opener.open(UpstreamRequest(
            provider.url(path) + query, method=request.head.method, body=body, headers=headers,
            watched=watched, key=provider.key))
        if 300 <= response.status < 400 and response.status != 304:
            response.close()
            raise UpstreamRedirected(
                f"the provider answered with a redirect ({response.status}), which is never "
                "followed: check the provider's base URL")
        return response

    # Forwarding: as it came, or translated. What a client reads last is settled before.

    def _answered(self, call: Call, response: Response) -> Answer:
        """Return the answer to send on: a stream as it arrives, anything else whole and settled.

        Raises UpstreamError.
        """
        is_fine, headers = 200 <= response.status < 300, self._first_headers(call, response)
        try:
            if is_fine and (call.wants_stream or (             # labelled as whatever it is
                    call.translator is None
                    and media_type(response.headers) == "text/event-stream")):
                reads = self._streamed(call, response)
                if call.translator is not None:            # a status waits: for an error, perhaps
                    reads = itertools.chain([next(reads, [])], reads)
                    headers.append(("content-type", "text/event-stream"))
                answer = Answer(response.status, (), reads=self._to_its_end(call, reads))
            else:
                answer = self._whole_answer(call, response)
        except ProviderFailed as err:
            self._settle(call)
            no_retry = DO_NOT_RETRY if err.status == 402 or json_object(err.body["error"]).get(
                "code") == "insufficient_quota" else ()
            answer = Answer(err.status, (*no_retry, ("content-type", "application/json")),
                            json_bytes(err.body))
        headers += answer.headers
        if call.charge is not None:
            headers.append(("x-ironcage-cost-microdollars", str(call.charge.microdollars)))
        if 200 <= answer.status < 300 and call.client_api in NOTICES:
            headers = with_notice(headers, call.client_api, self.controller.standings(call.scopes))
        return Answer(answer.status, headers, answer.body, answer.reads, answer.length)

    def _first_headers(self, call: Call, response: Response) -> list[tuple[str, str]]:
        """Return the headers that an answer has however it goes on. Raises UpstreamBroke."""
        headers = answer_headers(response.headers)
        if call.translator is not None:
            if response.status in {205, *BODILESS_STATUSES}:
                raise UpstreamBroke("the provider answered without a body: with the status "
                                    f"{response.status}")
            headers = [header for header in translated_rate_limits(headers, call.api)
                       if header[0] not in REWRITTEN_HEADERS]
            headers += own_ids(call.request.request_id)
            if call.provider_request_id:
                headers.append(("x-ironcage-upstream-request-id", call.provider_request_id))
        headers += call.losses.headers()
        if call.set_output_cap is not None:
            headers.append(("x-ironcage-max-tokens", str(call.set_output_cap)))
        return headers

    @staticmethod
    def _checked(call: Call, answer: Any, status: int = 200) -> Any:
        """Return what came, an event or an answer. Raises ProviderFailed where it, its status, or
        what came before it, says that the call has failed."""
        failure, is_fine = call.meter.failure, 200 <= status < 300
        if failure is None and is_fine:
            return answer
        if is_fine:
            status = stated_status(answer, ERROR_STATUSES.get(failure, 502))
        shown, body = call.translator.error(status, answer, call.request.request_id)
        if status == 404 and call.api == "responses":
            body["error"]["message"] += NO_RESPONSES
        raise ProviderFailed(shown, body)

    def _whole_answer(self, call: Call, response: Response) -> Answer:
        """Read an answer, meter and settle it. One that is too large to be read is forwarded as it
        comes, and cannot be translated. Raises UpstreamError, ProviderFailed."""
        reads = response.reads()
        grow = functools.partial(call.request.memory.grow, part="answer")
        body, is_whole = whole_body(reads, MAX_ANSWER_BYTES, call.meter.see,
                                    lambda size: grow(COPIES * size))
        if len(body) > LONG_WORK_BYTES:
            self.slot.leave()
        if not is_whole:
            if call.translator is not None:
                raise UpstreamBroke(BEYOND_LIMITS)
            return Answer(response.status, (), length=response.stated_length,
                          reads=self._unread(call, body, reads))
        plain = inflated(body, content_encoding(response.headers),
                         lambda size: grow(COPIES * (len(body) + size)))
        value = call.meter.read_answer(plain)
        self._settle(call)
        if call.translator is None:
            return Answer(response.status, (), body)
        return Answer(200, (("content-type", "application/json"),),
                      json_bytes(self._translated_whole(call, response.status, plain, value)))

    @staticmethod
    def _unread(call: Call, begun: bytes, reads: Iterable[list[bytes]]) -> Iterator[list[bytes]]:
        """Forward an answer that is too large to be read as it comes; it is charged for its bytes.
        """
        for at in range(0, len(begun), JOINED_WRITE_BYTES):
            yield [begun[at:at + JOINED_WRITE_BYTES]]
        for read in reads:
            call.meter.see(read)
            yield read
        call.meter.end_body()

    def _translated_whole(self, call: Call, status: int, plain: bytes, value: Any) -> dict:
        """Translate a whole answer, which may have come as a stream. Raises UpstreamBroke,
        ProviderFailed."""
        events = call.meter.events
        value = events[-1] if events else value
        if value is None:
            value = plain[:500].decode("utf-8", "replace")
        self._checked(call, value, status)
        if events and not call.meter.has_ended:
            raise UpstreamBroke(NO_LAST_EVENT)
        if not isinstance(value, dict):
            raise UpstreamBroke(BEYOND_LIMITS if call.meter.is_beyond_limits
                                else "the provider's answer is not JSON")
        return call.translator.answer_of((*events, {"type": "done"})) if events \
            else call.translator.answer(value)

    def _streamed(self, call: Call, response: Response) -> Iterator[list[bytes]]:
        """Yield a stream as its client reads it: metered, and translated if need be.

        Raises UpstreamError, where it breaks or has no last event; ProviderFailed.
        """
        reader = StreamReader(call.meter, content_encoding(response.headers),
                              hides_usage=call.hides_usage)
        if call.translator is None:
            yield from map(reader.read, self._reads(call, response, reader))
            yield [reader.finish()]
            if not call.meter.is_over and reader.can_read:
                raise UpstreamBroke(NO_LAST_EVENT)
            return
        for event in call.translator.events(self._provider_events(call, response, reader)):
            yield [wire_event(call.client_api, event)]
            call.heard_s = time.monotonic()
        yield [*STREAM_ENDS.get(call.client_api, ())]

    def _reads(self, call: Call, response: Response, reader: StreamReader,
               tick_s: float = threading.TIMEOUT_MAX) -> Iterator[list[bytes]]:
        """Yield a stream's reads, of which long ones are worked on outside the slot. That it breaks
        after its last event is nobody's loss."""
        try:
            for pieces in response.reads(tick_s):
                if reader.holds_much:
                    self.slot.leave()
                yield pieces
        except UpstreamError:
            if not call.meter.is_over:
                raise

    def _provider_events(self, call: Call, response: Response,
                         reader: StreamReader) -> Iterator[dict]:
        """Yield what the provider streams, metered, up to its end or its error; and, in place of
        its pings, one where the client has heard nothing for ping_s, whatever the provider sends.

        Raises UpstreamError, ProviderFailed.
        """
        ping_s = self.settings.timeouts.ping_s
        call.heard_s = time.monotonic()

        for pieces in self._reads(call, response, reader, ping_s / 4):
            if time.monotonic() - call.heard_s >= ping_s:
                yield {"type": "ping"}
            yield from (self._checked(call, event) for event in reader.parsed(pieces)
                        if event.get("type") != "ping")
        last, whole = reader.finished_events()
        self._checked(call, last or whole)
        if whole is not None:                  # one JSON answer, though a stream was asked for
            yield from call.translator.stream_of(whole)
        elif last is not None:
            yield last
        if not call.meter.has_ended:
            raise UpstreamBroke(NO_LAST_EVENT)
        yield {"type": "done"}

    def _to_its_end(self, call: Call, reads: Iterable[list[bytes]]) -> Iterator[list[bytes]]:
        """Yield a stream, settled before its client can see that it is over. One that breaks ends
        with an error event of its client's API."""
        try:
            for pieces in reads:
                if call.meter.has_ended:
                    self._settle(call)
                elif call.meter.failure is not None and not call.failed_ns:
                    call.failed_ns = time.monotonic_ns()
                if any(pieces):
                    yield pieces
            self._settle(call)
        except ProviderFailed as err:
            self._settle(call)
            yield [wire_event(call.client_api, event) for event in call.translator.failed(err.body)]
        except UpstreamError as err:
            request = call.request
            log.warning("stream broke", extra={"fields": {
                "request_id": request.request_id, "reason": err.message}})
            self._settle(call)
            yield [error_event(self._fault(err), call.api, request.request_id)] \
                if call.translator is None \
                else [wire_event(call.client_api, event) for event in call.translator.failed(
                    error_object(self._fault(err), request.dialect, request.request_id))]

    # Settlement.

    def _settle(self, call: Call) -> Charge:
        """End a call's money: charge what it cost and release its reservation, once.

        Called as soon as the cost is known, and again on the way out, where it then does nothing.
        """
        if call.charge is not None:
            return call.charge
        elapsed_ns = (call.meter.is_blank and call.failed_ns or time.monotonic_ns()) - call.sent_ns
        try:
            if call.was_sent and not call.meter.usage_is_final:
                call.bound = self._tight_bound(call)
            call.charge = charge_of(call, call.prices, elapsed_ns)
        finally:
            call.charge = call.charge or Charge(reserved_in_full(call), "a fault of the proxy")
            try:
                row = call.row or call.intent_row()
                complete_row(row, call, call.charge, elapsed_ns)
                row["price_row"] = self._kept_price(call.charge.price)
                if call.row is not None:           # first: a restart can report it to others
                    self.ledger.settle(row)
            finally:
                self.controller.commit(call.reservation, call.charge.microdollars, call.row)
            self.reporter.settled(call, row)
        for count in counts_of(call, int(time.time())):
            self.counts.learn(count)
            self.ledger.keep_count(count)
            self.controller.accounts.keep_count(count)
        return call.charge

    def _kept_price(self, price: Optional[Price]) -> Optional[str]:
        """Return the name of the price that a bill was made by, which the ledger keeps with it."""
        if price is None:
            return None
        if "digest" not in price.known_rates:
            price.known_rates["digest"] = text_digest(price.cells())
        self.ledger.keep_price(price.known_rates["digest"], price)
        return price.known_rates["digest"]


# ==== 26. Dashboard =============================================================================
#
# One page without data and without an outside resource; it asks for a token, keeps it in the tab,
# and shows what the status and usage routes say. Text goes in as text only. A scope is red where
# its limit is spent, or where a call that was refused in the last day would be refused again; it
# is amber from three quarters of its limit on.

DASHBOARD_STYLE = """
:root { color-scheme: light dark; --line: #8886; --tone: #2a78d6; }
.near { --tone: #c77700; } .red { --tone: #d03b3b; } span.red { color: var(--tone); }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 72rem; padding: 1rem;
       overflow-wrap: anywhere; }
h1 { font-size: 1.2rem; } h2 { font-size: 1rem; margin-top: 1.6rem; } #note { min-height: 1.5em; }
.gauge { display: flex; height: .8rem; border: 1px solid var(--line); overflow: hidden; }
.gauge div, #bars div { background: var(--tone); } .gauge .reserved { opacity: .4; }
#state div { border-left: .4rem solid var(--tone); padding: .2rem .6rem; margin: .3rem 0; }
table { border-collapse: collapse; width: 100%; } tr { border-bottom: 1px solid var(--line); }
th, td { padding: .25rem .5rem; text-align: right; font-variant-numeric: tabular-nums; }
:is(th, td):is(:first-child, .model, .token, .limit, .note) { text-align: left; }
th, .cost, .time { white-space: nowrap; } .model, .token { min-width: 7rem; }
#chart { display: grid; grid-template-columns: auto 1fr; gap: 0 .5rem; font-size: .85rem; }
#x, #y, #bars { display: flex; justify-content: space-between; } #x { grid-column: 2; }
#y { flex-direction: column; } #bars div { flex: 1; }
#bars { align-items: flex-end; gap: 2px; height: 5rem; border-bottom: 1px solid var(--line); }
input, button { font: inherit; padding: .3rem .6rem; } [hidden] { display: none; }
pre { white-space: pre-wrap; }
@media (max-width: 50rem) {
  tr { display: flex; flex-wrap: wrap; gap: 0 1rem; padding: .4rem 0; }
  th, td:empty { display: none; } td { padding: 0; } .limit, .note { flex-basis: 100%; }
  td + td:not(.model, .token, .limit, .note)::before { content: attr(data-head) ' '; opacity: .6; }
}
"""
DASHBOARD_SCRIPT = """
const at = id => document.getElementById(id);
const made = (kind, name = '', ...parts) => {   // strings among the parts become text
  const box = document.createElement(kind);
  box.className = name;
  box.append(...parts.map(part => part ?? ''));
  return box;
};
const listed = parts => parts.filter(Boolean).join(', ');
const usd = n => '$' + (n / 1e6).toLocaleString('en', {minimumFractionDigits: 2,
                                                      maximumFractionDigits: 6});
const when = ms => new Date(ms).toLocaleString([], {dateStyle: 'short', timeStyle: 'medium'});
const fill = (id, head, rows) => at(id).replaceChildren(...[head, ...rows].map((cells, y) =>
  made('tr', '', ...cells.map((cell, x) => {
    const box = made(y ? 'td' : 'th', head[x], cell);
    box.dataset.head = head[x];
    return box;
  }))));
const get = async path => {
  const headers = {authorization: 'Bearer ' + sessionStorage.getItem('token')};
  const answer = await fetch(path, {headers});
  if (!answer.ok) throw answer.status;
  return answer.json();
};
const counts = ['calls', 'input', 'cached', 'output'];
const counted = c => [c.requests, c.input_tokens, c.cached_input_tokens, c.output_tokens];
const end = a => Math.min(a.limit_microdollars ?? Infinity, a.stop_at_microdollars ?? Infinity);
const standing = (a, ...more) => {
  const bar = made('div', 'gauge ' + a.tone), whole = Math.max(
    end(a), a.spent_microdollars + a.reserved_microdollars, 1);
  for (const name of ['spent', 'reserved'])
    bar.appendChild(made('div', name)).style.width = 100 * a[name + '_microdollars'] / whole + '%';
  return made('div', '', bar, listed([
    usd(a.spent_microdollars) + ' spent', usd(a.reserved_microdollars) + ' reserved',
    a.limit_microdollars === null ? 'no limit'
      : usd(a.available_microdollars) + ' free of ' + usd(a.limit_microdollars),
    a.stop_at_microdollars != null && 'stop at ' + usd(a.stop_at_microdollars),
    a.resets_s != null && 'until ' + when(1e3 * a.resets_s)]), ...more);
};
const limits = t => standing(t, made('div', '', listed([
  t.session_limit_microdollars != null && usd(t.session_limit_microdollars) + ' a session',
  t.expires && (t.has_expired ? 'expired ' : 'expires ') + when(Date.parse(t.expires))])));
const judged = (a, refusals) => {
  const share = a.spent_microdollars / Math.max(end(a), 1), isOver = a.spent_microdollars >= end(a);
  const again = refusals.filter(r => r.scope === a.scope
    && r.needed_microdollars > (a.available_microdollars ?? Infinity));
  a.tone = isOver || again.length ? 'red' : share >= .75 ? 'near' : '';
  return !a.tone ? '' : made('div', a.tone, a.scope + ': ' + (isOver ? 'calls are refused, ' : '')
    + Math.floor(100 * share) + ' % of ' + usd(end(a)) + ' is spent' + (again.length ? '; '
      + again.length + ' refused for want of budget in the last day. The last: '
      + again[0].message : ''));
};
const draw = rows => {
  const times = rows.map(r => r.settled_ms), ends = [Math.min(...times), Math.max(...times)];
  const step = Math.max((ends[1] - ends[0]) / 39, 1), sums = Array(40).fill(0);
  for (const r of rows) sums[Math.floor((r.settled_ms - ends[0]) / step)] += r.cost_microdollars;
  const most = Math.max(...sums, 1), words = texts => texts.map(text => made('span', '', text));
  at('bars').replaceChildren(...sums.map(() => made('div')));
  sums.forEach((sum, n) => at('bars').children[n].style.height = 100 * sum / most + '%');
  at('y').replaceChildren(...words([usd(most), '$0']));
  at('x').replaceChildren(...words(rows.length ? [
    when(ends[0]), 'a bar: ' + Number((step / 1e3).toPrecision(3)) + ' s', when(ends[1])] : []));
};
const show = (status, usage) => {
  const refusals = usage.refused.filter(r => r.status === 402 && r.refused_ms > Date.now() - 864e5);
  const scopes = {[status.scope]: status, ...status.by_token, ...status.by_session};
  for (const r of refusals) scopes[r.scope] ??= {...r, available_microdollars: Math.max(0,
    r.limit_microdollars - r.spent_microdollars - r.reserved_microdollars)};
  at('state').replaceChildren(...Object.values(scopes).map(a => judged(a, refusals)),
    status.shared?.fault ? made('div', 'red', 'shared budget: ' + status.shared.fault) : '');
  at('amounts').replaceChildren(standing(scopes[status.scope]));
  at('facts').textContent = (status.shared ? 'Money of the shared cage ' + status.shared.cage
    + ', calls of this process. ' : '') + 'Since ' + when(Date.now() - 1e3 * status.uptime_s)
    + ': calls ' + status.requests + ', failed ' + status.failed_requests
    + ', refused by a limit ' + status.refused_requests;
  at('first').hidden = usage.rows.length + usage.refused.length + status.requests > 0;
  at('called').hidden = !at('first').hidden;
  draw(usage.rows);
  fill('tokens', ['token', 'cost', 'limit', 'refused', ...counts],
    Object.entries(status.by_token).map(([name, c]) => [name, usd(c.cost_microdollars ?? 0),
      c.scope && limits(scopes[name]), c.refused_requests, ...counted(c)]));
  const sessions = {};
  for (const name in status.by_session) sessions[name] = [0, 0];
  for (const r of usage.rows.filter(r => r.session !== null)) {
    const [cost, calls] = sessions[r.token + '/' + r.session] ?? [0, 0];
    sessions[r.token + '/' + r.session] = [cost + r.cost_microdollars, calls + 1];
  }
  fill('sessions', ['session', 'cost', 'limit', 'calls'], Object.entries(sessions).map(
    ([name, [cost, calls]]) => [name, usd(cost), scopes[name] && standing(scopes[name]), calls]));
  fill('models', ['model', 'cost', ...counts], Object.entries(status.by_model).map(
    ([name, c]) => [name, usd(c.cost_microdollars), ...counted(c)]));
  const lines = [...usage.rows.map(r => [r.settled_ms, usd(r.cost_microdollars), r.model, r.token,
      r.status ?? 'none', r.input_tokens, r.output_tokens,
      r.estimated && 'estimated: ' + r.estimated]),
    ...usage.refused.map(r => [r.refused_ms, '', r.model, r.token, r.status, '', '',
      made('span', 'red', 'refused: ' + r.message)])].sort((a, b) => b[0] - a[0]);
  fill('rows', ['time', 'cost', 'model', 'token', 'status', 'input', 'output', 'note'],
    lines.map(([ms, ...rest]) => [when(ms), ...rest]));
};
const tick = async () => {
  const known = sessionStorage.getItem('token') !== null;
  at('ask').hidden = known;
  at('page').hidden = !known;
  if (!known) return;
  try {
    show(await get('status'), await get('usage?limit=200'));
    at('note').textContent = '';
  } catch (fault) {
    at('note').textContent = fault === 401 ? 'That token is not known here.'
      : 'The proxy does not answer.';
    if (fault !== 401) return;
    sessionStorage.removeItem('token');
    at('page').hidden = !(at('ask').hidden = false);
  }
};
at('ask').addEventListener('submit', event => {
  event.preventDefault();
  sessionStorage.setItem('token', at('token').value);
  at('token').value = '';
  tick();
});
const base = location.href.split('/ironcage/')[0];
at('paste').textContent = 'export OPENAI_BASE_URL=' + base + '/v1 OPENAI_API_KEY=ic_...\\n'
  + 'export ANTHROPIC_BASE_URL=' + base + ' ANTHROPIC_AUTH_TOKEN=ic_...';
tick();
setInterval(tick, 2000);
"""
DASHBOARD_BODY = """
<h1>ironcage</h1><p id="note" role="status"></p>
<form id="ask"><p>The token that the proxy printed at its start, or one of its configuration:</p>
<label>Token <input id="token" type="password" autocomplete="off"></label>
<button>Show</button></form>
<main id="page" hidden><div id="state"></div><div id="amounts"></div><p id="facts"></p>
<div id="first" hidden><h2>Nothing was called yet</h2>
<p>Paste the line of your client into the shell that starts the agent, with your token in place of
ic_...:</p><pre id="paste"></pre></div><div id="called"><h2>Spend of the last calls</h2>
<div id="chart"><div id="y"></div><div id="bars"></div><div id="x"></div></div>
<h2>By token</h2><table id="tokens"></table>
<h2>By session, of the last 200 calls or capped</h2><table id="sessions"></table>
<h2>By model</h2><table id="models"></table>
<h2>Last calls and refusals</h2><table id="rows"></table>
</div></main>
"""


def dashboard_answer() -> Answer:
    """Return the page, under a policy that lets nothing else run, load or frame it."""
    def hashed(text: str) -> str:
        digest = hashlib.sha256(text.encode("utf-8")).digest()
        return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"

    policy = (f"default-src 'none'; script-src {hashed(DASHBOARD_SCRIPT)}; "
              f"style-src {hashed(DASHBOARD_STYLE)}; connect-src 'self'; base-uri 'none'; "
              "form-action 'none'; frame-ancestors 'none'")
    body = ('<!doctype html><html lang="en"><head><meta charset="utf-8"><title>ironcage</title>'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<style>{DASHBOARD_STYLE}</style></head><body>{DASHBOARD_BODY}"
            f"<script>{DASHBOARD_SCRIPT}</script></body></html>")
    headers = (("content-type", "text/html; charset=utf-8"), ("content-security-policy", policy),
               ("cache-control", "no-store"), ("x-content-type-options", "nosniff"),
               ("referrer-policy", "no-referrer"))
    return Answer(200, headers, body.encode("utf-8"))


# ==== 27. Server ================================================================================
#
# The client's side: reads requests strictly and within limits, says who may do what, hands them
# to the Router and writes what it answers. A handler knows no provider and no price.


CALLER, ADMIN = "default", "admin"           # the names of the two tokens of the command line
MOST_REFUSAL_CHARS = 1_000                   # of each text that is kept of a refusal
MAX_BUDGET_BYTES = 4096                    # of a new limit: a longer one would be read for seconds
SESSIONS_SHOWN = 50                          # of those with a budget of their own


@functools.lru_cache(maxsize=64)
def host_name(authority: str) -> str:
    """Return the host of `host`, `host:port` or `[address]:port`, in lower case; "?" for anything
    else."""
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([^:\[\]]+))(?::\d{1,5})?", authority)
    return (match[1] or match[2]).lower() if match else "?"


def own_host(name: str) -> str:
    """Return a host of our own, which a setting names, as host_name() does."""
    return host_name(f"[{name}]" if name.count(":") > 1 and "[" not in name else name)


IDLE, READING, SERVING, LEAVING, CLOSED = "idle", "reading", "serving", "leaving", "closed"
CAN_GO = frozenset({IDLE, READING, LEAVING})       # closed without harm to a call


class Place:
    """A connection's place among all that there are: who holds it, and what for.

    It does                         when places are short     when the proxy stops
      IDLE     no request           it can be closed          it is closed
      READING  a request            it can be closed          it goes on, until the cut
      SERVING  a request            it stays                  it goes on, until after the cut
      LEAVING  after a last answer  it is closed before all   it goes on, until the cut
      CLOSED   nothing any more
    """
    __slots__ = ("does", "holder", "behind_s")

    def __init__(self) -> None:
        self.does = IDLE
        self.holder = ""                     # the name of the token that it showed last
        self.behind_s = time.monotonic()     # strange, silent, or slower than the least speed


def open_files_limit(wanted: int = 0) -> int:
    """Return how many files this process may have open, once so many are allowed if they can be."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource          # here only: Windows has none
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        soft, hard = (sys.maxsize if limit == resource.RLIM_INFINITY else limit for limit in limits)
        if soft < min(wanted, hard):
            soft = min(wanted, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, limits[1]))
        return soft
    return sys.maxsize


def most_connections() -> int:
    """Return MAX_CONNECTIONS, or as many as this process may have two sockets for."""
    return max(1, min(MAX_CONNECTIONS, (open_files_limit() - SPARE_FILES) // 2))


class Places:
    """The places of all connections: `most` at once, and of which one is given up where they are
    short."""

    def __init__(self) -> None:
        self.most = most_connections()
        self._lock = threading.Lock()                  # guards the last
        self._changed = threading.Condition(self._lock)
        self._places: dict[socket.socket, Place] = {}

    def open(self, sock: socket.socket) -> None:
        with self._lock:
            self._places[sock] = Place()

    def forget(self, sock: socket.socket) -> None:
        with self._lock:
            self._places.pop(sock, None)
            self._changed.notify_all()

    def await_change(self) -> None:
        """Wait for a connection to end, but for a moment only."""
        with self._lock:
            self._changed.wait(STOP_POLL_S)

    def sockets(self) -> list[socket.socket]:
        with self._lock:
            return [*self._places]

    def of(self, sock: socket.socket) -> Place:
        """Return the place that a connection was let in to."""
        with self._lock:
            return self._places[sock]

    def count(self, which: Callable[[Place], bool] = lambda place: True) -> int:
        """Return how many places are taken, in all or by such."""
        with self._lock:
            return sum(place.does != CLOSED and which(place) for place in self._places.values())

    def close_some(self, most: int, which: Callable[[Place], bool] = lambda place: True,
                    silent_s: float = 0) -> int:
        """Close up to so many connections that can be spared, and return how many were closed.

        First go those that have their last answer, then those that showed no token for a while,
        then those of the token (or of none) that has most; of these the one that was silent, or too
        slow, for longest. One that is served stays; one that has sent what was not looked at yet
        stays, and so do all that would go after its holder's.
        """
        closed, now_s, stays = 0, time.monotonic(), None
        with self._lock:
            held = Counter(place.holder for place in self._places.values())
            spare = [] if most <= 0 else [
                (place.does != LEAVING, bool(place.holder) or now_s - place.behind_s < STRANGER_S,
                 -held[place.holder], bool(place.holder), place.behind_s, id(sock), sock, place)
                for sock, place in self._places.items()
                if place.does in CAN_GO and place.behind_s <= now_s - silent_s and which(place)]
        heapq.heapify(spare)                                     # few of them are wanted
        while spare and closed < most:
            *_, sock, place = heapq.heappop(spare)
            if stays not in (None, place.holder):
                break
            with contextlib.suppress(OSError, ValueError):       # it may be closed meanwhile
                if place.does != LEAVING and ready_of([sock], 0):
                    stays = place.holder
                    continue
                with self._lock:
                    can_go = place.does in CAN_GO
                    place.does = CLOSED if can_go else place.does
                if can_go:
                    sock.shutdown(socket.SHUT_RDWR)
                    closed += 1
        return closed

    def take(self, place: Place, caller: Caller, is_alone: bool) -> None:
        """Note whose token a connection showed. Raises TooManyRequests where that one has all the
        places that a token may have, if it is not alone, and none of them is silent."""
        place.holder, place.behind_s = caller.name, time.monotonic()
        most = self.most - self.most // STRANGERS_PART
        if is_alone or len(self._places) <= most:
            return
        over = self.count(lambda other: other.holder == caller.name) - most
        if over > 0 and not self.close_some(
                over, lambda other: other.holder == caller.name, silent_s=STRANGER_S):
            raise TooManyRequests(f"the token {caller.name} has {most} of the proxy's {self.most} "
                                  "connections in use", headers=[("retry-after", "1")])

    def note(self, place: Place, does: str) -> None:
        """Note what a connection does from now on. Raises ClientGone where its place is taken."""
        with self._lock:
            if place.does == CLOSED:
                raise ClientGone
            place.does = does
            if place.holder:
                place.behind_s = time.monotonic()


class ProxyHandler(http.server.BaseHTTPRequestHandler):
    """One client connection, on a thread of its own."""
    server: ProxyServer
    disable_nagle_algorithm = True           # else small writes wait 40 ms for delayed ACKs

    def setup(self) -> None:
        super().setup()
        self.wire = Wire(self.connection, self.server.slot)
        self.place = self.server.places.of(self.connection)
        self._served = 0                     # requests on this connection
        self._may_stay_open = False          # the client lets this connection be used again
        self._head_written = False           # of the answer to the current request

    def handle(self) -> None:
        """Serve requests until the connection ends, in one slot with the other connections."""
        slot = self.server.slot
        slot.take()
        try:
            super().handle()
        finally:
            slot.leave()
            self.wire.forget()

    def handle_one_request(self) -> None:
        """Read one request and answer it. The one boundary where any exception ends."""
        self.close_connection, self._head_written, self._may_stay_open = True, False, False
        self._asked: Optional[RequestHead] = None
        self._caller: Optional[Caller] = None
        self._memory: Optional[Claim] = None
        self._request_id = f"req_{self.server.run_id}{next(self.server.request_numbers):08x}"
        try:
            raw_head = self._next_head()
            if raw_head is not None:
                self._asked = parse_request_head(raw_head)
                self._serve(self._asked)
        except IroncageError as err:
            self._refuse(err)
        except (ClientGone, OSError, EOFError):
            self.close_connection = True
        except MemoryError:                  # of what others of this machine left us
            self._refuse(out_of_memory())
        except Exception:
            log.exception("a request failed by a fault of the proxy",
                          extra={"fields": {"request_id": self._request_id}})
            self._refuse(ProxyFailed("the proxy failed on this request; its log says why"))
        finally:
            if self._memory is not None:
                self._memory.give_back()

    def _next_head(self) -> Optional[bytes]:
        """Read the next request's head; None when the client has no more, or says nothing."""
        timeouts = self.server.settings.timeouts
        first = self._served == 0
        self.server.slot.take()      # if the last request left it
        deadline_s = time.monotonic() + timeouts.head_s
        self.server.places.note(self.place, IDLE)
        try:
            if not self.wire.await_line(
                    deadline_s if first else time.monotonic() + timeouts.keep_alive_s):
                return None
        except TimeoutError:
            return None
        self.server.places.note(self.place, READING)
        self._served += 1
        try:
            return self.wire.read_head(
                deadline_s if first else time.monotonic() + timeouts.head_s)
        except TimeoutError:
            raise RequestTimedOut("the request's head did not arrive in time") from None

    def _serve(self, head: RequestHead) -> None:
        """Take the steps of every request: method, host, who asks, what for."""
        self._may_stay_open = head.keeps_alive
        if head.method not in METHODS:
            raise UnknownMethod(f"the method {head.method} is not served")
        is_open = head.path in OPEN_ROUTES and head.method in OPEN_METHODS
        if not is_open or head.path not in PROBES:     # which come by any name, and learn nothing
            self._check_host(head)
        if is_open:
            # A body stays unread: nobody vouches for it.
            self._may_stay_open &= body_length(head.headers, otherwise=0) == 0
            return self._write_answer(OPEN_ROUTES[head.path](self.server))
        caller = self._authenticated(head)
        if not IGNORED_UPGRADES.fullmatch(head.headers.get("upgrade", "")):
            raise UpgradeRefused("protocol upgrades are not served; use plain HTTP requests",
                                 headers=UPGRADES_SERVED)
        is_own = head.path in OPEN_ROUTES or f"{head.path}/".startswith("/ironcage/")
        if caller.name == ADMIN and not is_own:
            raise Forbidden("the admin's token cannot call models; use a caller's token")
        if not is_own:
            check_target(head)
        self._caller = None if is_own else caller
        with NOTHING_HELD if is_own else self.server.traffic.entered(caller):
            self.server.places.take(self.place, caller, len(self.server.callers) == 1)
            self._memory = Claim(self.server.router.memory, caller.name)
            request = ClientRequest(head, self._read_body(head, self._memory), self._request_id,
                                    caller, self._memory)
            self.server.places.note(self.place, SERVING)
            if head.path == "/":
                return self._write_answer(OPEN_ROUTES["/"](self.server))
            if is_own:
                self.server.slot.leave()
                return self._write_own(request)
            with self.server.router.open(request, self.wire) as answer:
                self._write_answer(answer)

    # Whose token it is.

    def _check_host(self, head: RequestHead) -> None:
        """Refuse names that are not ours, so that no web page reaches us by DNS rebinding."""
        stated = head.headers.get("host")
        if stated is None:                             # HTTP/1.0; no browser sends it
            return
        host = host_name(stated)
        if not LOOPBACK_HOST.fullmatch(host) and host not in self.server.allowed_hosts:
            shown = host if PRINTABLE_NAME.fullmatch(host) else "NAME"
            raise Forbidden("the Host header does not name this proxy; if it is right, start the "
                            f"proxy with --allow-host {shown}")

    def _authenticated(self, head: RequestHead) -> Caller:
        """Return whose token a request has. Raises Unauthorized."""
        for credential in offered_tokens(head.headers):
            # Looked up by its hash, so that the time says nothing of how much of it was right.
            caller = self.server.callers.get(token_sha256(credential))
            if caller is not None and caller.has_expired():
                self._caller = caller                  # the refusal is about this one
                raise Unauthorized(f"the token {caller.name} has expired", headers=DO_NOT_RETRY)
            if caller is not None:
                return caller
        raise Unauthorized("Invalid API key: this proxy takes its own token, as "
                           "Authorization: Bearer or x-api-key, not a provider's key",
                           headers=DO_NOT_RETRY)

    # Reading the body.

    def _read_body(self, head: RequestHead, memory: Claim) -> bytes:
        """Read the body, whole and without its content-encoding, with memory held for it. Raises
        400, 408, 411, 413, 415, 503."""
        settings = self.server.settings
        length = body_length(head.headers, otherwise=0)
        if length == 0 and head.method in BODY_METHODS \
                and head.headers.get("content-length") is None:
            raise LengthRequired(f"{head.method} needs a content-length or a chunked body")
        if length > settings.max_body_bytes:
            raise self._too_large()
        encoding = content_encoding(head.headers)
        if encoding != "identity" and encoding not in INFLATABLE:
            raise UnsupportedBody(f"a request body in {shown_name(encoding)} cannot be read: send "
                                  "it as it is, or with gzip or deflate")
        memory.hold(COPIES * max(0, length))
        if length and (head.headers.get("expect") or "").lower() == "100-continue":
            self.wire.send(b"HTTP/1.1 100 Continue\r\n\r\n", settings.timeouts.write_stall_s)
        body = self._received_body(length, memory)
        if encoding == "identity" or not body:
            return body
        self.server.slot.leave()
        inflater = Inflater(settings.max_body_bytes)
        try:
            plain = gathered(inflater.steps(body), lambda size: memory.grow(COPIES * size))
        except OverflowError:
            raise self._too_large() from None
        except zlib.error:
            raise BadRequest("the compressed request body is broken") from None
        if not inflater.is_complete:
            raise BadRequest("the compressed request body is incomplete")
        return plain

    def _too_large(self) -> BodyTooLarge:
        return BodyTooLarge(f"the request body is larger than {self.server.settings.max_body_bytes}"
                            " bytes; --max-body-mb sets the limit")

    def _received_body(self, length: int, memory: Claim) -> bytes:
        received = self.wire.received
        if 0 <= length <= len(received):     # all of it came with its head, as most do
            self.wire.received = received[length:]
            return received[:length]
        began_s, timeouts = time.monotonic(), self.server.settings.timeouts     # memory is held
        decoder, size = BodyDecoder(length), 0
        body = bytearray()                   # not a list: a read can be a byte
        most_bytes = LARGE_READ_BYTES        # of a read
        while not decoder.is_done:
            now_s = time.monotonic()
            self.place.behind_s = min(now_s, began_s + size / LEAST_BYTES_PER_S)
            by_s = min(began_s + timeouts.body_s, self.place.behind_s + timeouts.body_stall_s)
            try:
                data = self.wire.receive(by_s - now_s, None, most_bytes)
            except TimeoutError:
                raise RequestTimedOut("the request's body did not arrive in time") from None
            if not data:
                raise ClientGone
            size += len(data)
            body += b"".join(decoder.feed(data))
            if len(body) > self.server.settings.max_body_bytes:
                raise self._too_large()
            memory.grow(COPIES * len(body))
            if max(length, len(body)) > LONG_WORK_BYTES:
                self.server.slot.leave()
                most_bytes = BODY_READ_BYTES
        self.wire.received = decoder.rest
        return body

    # Answering.

    def _write_own(self, request: ClientRequest) -> None:
        path = request.head.path
        methods = OWN_ROUTES.get(path) or dict.fromkeys(OPEN_METHODS if path in OPEN_ROUTES else ())
        if not methods:
            raise NotFound(f"there is no {path[:100]} here; the proxy's own routes are "
                           f"{', '.join((*OWN_ROUTES, *OPEN_ROUTES))}")
        action = methods.get(request.head.method)
        if action is None:
            raise MethodNotAllowed(f"{path} takes {' and '.join(methods)}",
                                   headers=[("allow", ", ".join(methods))])
        kind, body = action(self.server, request)
        headers = (("content-type", kind), ("cache-control", "no-store"))
        self._write_answer(Answer(200, headers, body))

    def _refuse(self, error: IroncageError) -> None:
        """Answer with an error, or cut the connection if an answer is under way already."""
        self.close_connection = True
        if self._head_written:
            return
        dialect = "openai" if self._asked is None else dialect_of(
            self._asked.path, self._asked.headers.values)
        body = json_bytes(error_object(error, dialect, self._request_id))
        self._note_refusal(error)
        with contextlib.suppress(ClientGone):
            self._write_answer(Answer(error.status, (
                ("content-type", "application/json"), *own_ids(self._request_id), *error.headers),
                body), must_close=error.must_close)
            if error.must_close:             # the client may still be sending its request
                self.server.places.note(self.place, LEAVING)
                self.wire.linger(self.server.settings.timeouts.linger_s)

    def _note_refusal(self, error: IroncageError) -> None:
        """Count and log a refusal; one of a known token is kept as well."""
        token = self._caller.name if self._caller is not None else ""
        row = refusal_row(error, self._request_id, token, self._asked)
        totals = self.server.router.totals
        totals.observe(("refusal", row["reason"]))
        if token:
            totals.observe(("token_refusal", token, row["reason"]))
            if isinstance(error, (BudgetExceeded, TooManyRequests)):
                totals.add((token, "", ""), Counts(refused_requests=1))
            self.server.ledger.refuse(row)
            self.server.has_refused.set()
        shown = {"error" if name == "message" else name: row[name] for name in REFUSAL_COLUMNS[1:]
                 if row[name] not in (None, "")}           # a line of JSON has a message of its own
        log.log(logging.INFO if error.status < 500 else logging.WARNING, "request refused",
                extra={"fields": shown})

    def _write_answer(self, answer: Answer, *, must_close: bool = False) -> None:
        """Write an answer, whole or as it arrives. Raises ClientGone, UpstreamError."""
        if answer.status == 205:             # its body is empty, and says so (RFC 9110, 15.3.6)
            answer = answer._replace(body=b"", reads=None)
        length = answer.length if answer.body is None else len(answer.body)
        has_length = answer.status not in BODILESS_STATUSES
        asked = self._asked
        bodiless = not has_length or (asked is not None and asked.method == "HEAD")
        chunked = length < 0 and not bodiless and asked is not None and asked.minor_version == 1
        must_close |= not self._may_stay_open or self.server.is_stopping \
            or (length < 0 and not chunked and not bodiless)
        framing = [("transfer-encoding", "chunked")] if chunked else \
            [("content-length", str(length))] if length >= 0 and has_length else []
        framing += [("connection", "close")] if must_close else []
        framing.append(("x-ironcage-request-id", self._request_id))
        if answer.reads is not None and length < 0:    # nginx would gather a stream's events
            framing.append(("x-accel-buffering", "no"))
        reason = http.client.responses.get(answer.status, "")
        head = format_head(f"HTTP/1.1 {answer.status} {reason}", (*answer.headers, *framing))
        self._write(head if bodiless else head + (answer.body or b""))
        if not bodiless:
            for pieces in answer.reads or ():
                self._write(format_chunks(pieces) if chunked else b"".join(pieces))
            if chunked:
                self._write(LAST_CHUNK)
        self.close_connection = must_close

    def _write(self, data: bytes) -> None:
        self._head_written = True
        try:
            self.wire.send(data, self.server.settings.timeouts.write_stall_s)
        except OSError:
            raise ClientGone from None


def refusal_row(error: IroncageError, request_id: str, token: str,
                head: Optional[RequestHead]) -> dict:
    """Return what the ledger and the log say of a refusal: text that can be stored, of bounded
    length."""
    stated = {"request_id": request_id, "token": token, "model": error.model,
              "path": head and ("?" if is_token_in_path(head) else head.path),
              "reason": error.openai_code or error.openai_type,
              "message": error.message, **(attribution_of(head.headers) if head else {})}
    amounts = {name: (error.details or {}).get(name) for name in REFUSAL_COLUMNS}
    texts = {name: text and re.sub(UNPRINTABLE, "?", text[:MOST_REFUSAL_CHARS].encode(
        "ascii", "backslashreplace").decode("ascii")) for name, text in stated.items()}
    return {**amounts, **texts, "status": error.status, "refused_ms": time.time_ns() // 10 ** 6}


TEXT = ("content-type", "text/plain; charset=utf-8")


def probe_answer(fault: Optional[str]) -> Answer:
    """Return what an orchestrator asks: a 200, or a 503 that says why not."""
    return Answer(503 if fault else 200, (TEXT, ("cache-control", "no-store")),
                  (fault or "ok").encode() + b"\n")


PROBES = frozenset({"/healthz", "/readyz"})
# path -> what makes the answer, without a token, to a GET or a HEAD
OPEN_METHODS = ("GET", "HEAD")
OPEN_ROUTES: Mapping[str, Callable[[ProxyServer], Answer]] = MappingProxyType({
    "/": lambda server: Answer(200, (TEXT,), b"LlmRouter OK"),
    "/ironcage/dashboard": lambda server: dashboard_answer(),
    "/healthz": lambda server: probe_answer(None),
    "/readyz": lambda server: probe_answer(server.unreadiness()),
})


LISTENER_LOST = frozenset({errno.EBADF, errno.EINVAL, errno.ENOTSOCK, errno.EOPNOTSUPP})
OUT_OF_RESOURCES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


class ProxyServer(http.server.ThreadingHTTPServer):
    """The proxy as a server. It listens once made; start() serves, stop() drains and ends.

    Raises: CannotListen; Misconfigured when the price table cannot be read.
    """
    daemon_threads = True
    request_queue_size = LISTEN_BACKLOG
    allow_reuse_address = os.name == "posix"
    allow_reuse_port = False

    reload_asked = False                               # by SIGHUP
    is_stopping = False
    cuts_now = False                                   # a second signal: do not wait
    failure: Optional[str] = None                      # the thread that failed: nothing is served
    _thread: Optional[threading.Thread] = None
    _tending: Optional[threading.Thread] = None
    _unready: Optional[str] = None                     # what unreadiness() found,
    _tried_s = NEVER_S                                 # and when

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.callers: Mapping[str, Caller] = {}        # by the SHA-256 of their tokens
        self._files_seen = {path: _file_state(path) for path in (
            settings.config_path, prices_path(settings), *_secret_paths(settings)) if path}
        self._files_warned_of: set[str] = set()
        self._table, self._table_seen = load_prices(settings), self._files_seen[
            prices_path(settings)]
        config = self._read_config()
        prices = prices_under(config, self._table)
        self.slot = Slot()                           # of the threads that serve connections
        self.ledger: Ledger = MemoryLedger() if settings.ledger_path is None else SqliteLedger(
            settings.ledger_path, fsync=settings.fsync, aside=self.slot.outside,
            keep_days=settings.keep_days,
            wait_s=0 if settings.no_wait_for_ledger else LEDGER_WAIT_S)
        with contextlib.ExitStack() as undo:
            undo.callback(self.ledger.close)
            self.router = Router(settings, prices, self.ledger, self.slot)
            undo.callback(self.router.controller.accounts.close)
            self._take_config(config, prices)
            self._listen()
            undo.pop_all()
        self._looked_s = time.monotonic()
        self.allowed_hosts = {*map(own_host, (settings.host, *settings.allow_hosts))} - {"?"}
        self.started_s = time.monotonic()
        self.on_failure: Callable[[], Any] = lambda: None
        self.slot.on_fault = self.fail
        self._stopping = threading.Lock()              # held by who sets is_stopping
        self._has_stopped = threading.Event()
        self._is_over = threading.Event()              # nothing is tended any more
        self.has_refused = threading.Event()           # there is a refusal to write down
        self.places = Places()
        self.run_id = secrets.token_hex(8)             # with a number, the id of a request
        self.request_numbers = itertools.count(1)
        self.traffic = Traffic()

    def _listen(self) -> None:
        """Have the socket. Raises CannotListen."""
        host, port = self.settings.host, self.settings.port
        try:
            if not 0 <= port <= 65535:                 # or getaddrinfo takes its last 16 bits
                raise OverflowError("there is no such port")
            self.address_family, _, _, _, address = socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
            super().__init__(address[:2], ProxyHandler)      # type: ignore[arg-type]
        except (OSError, OverflowError, ValueError, TypeError) as err:      # of an embedder's port
            hint = "an address of this machine with --host" if isinstance(err, socket.gaierror) \
                or getattr(err, "errno", None) == errno.EADDRNOTAVAIL else \
                "another with --port, from 0 to 65535 (8787 is the default of other gateways too)"
            raise CannotListen(f"cannot listen on {host} port {port}: {_reason(err)}; choose "
                               f"{hint}") from err

    @property
    def port(self) -> int:
        return self.server_address[1]

    @property
    def url(self) -> str:
        host = f"[{self.settings.host}]" if ":" in self.settings.host else self.settings.host
        return f"http://{host}:{self.port}"

    def server_bind(self) -> None:
        """Bind without http.server's reverse DNS look-up of our own name, unless we were handed a
        socket that listens already."""
        if self.settings.listener is not None:
            self.socket.close()
            self.socket = self.settings.listener
            self.server_address = self.socket.getsockname()
        else:
            if hasattr(socket, "SO_EXCLUSIVEADDRUSE"):     # Windows: nobody may take over our port
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
            socketserver.TCPServer.server_bind(self)
        self.socket.setblocking(False)
        self.server_name, self.server_port = self.settings.host, self.server_address[1]

    def server_activate(self) -> None:
        """Listen. A socket that was handed over keeps its own backlog."""
        if self.settings.listener is None:
            super().server_activate()

    def start(self) -> None:
        """Serve, on a thread of our own, until stop()."""
        self._thread = Housekeeper("ironcage-accept", lambda: self.serve_forever(STOP_POLL_S),
                                   self.fail)
        self._thread.start()
        if isinstance(self.ledger, SqliteLedger):
            self._tending = Housekeeper("ironcage-ledger", self._tend_ledger, self.fail)
            self._tending.start()
        if self.router.server is not None:
            self.router.server.start()
        self.router.controller.accounts.start(self.fail, self.router.counts.learn)
        if self.router.reporter.alerts is not None:
            self.router.reporter.alerts.outbox.start()
        self.router.reporter.emit(RouterStarted(self.port, self.settings.budget_microdollars))

    def fail(self, thread: str) -> None:
        """Serve no more, since a thread has failed that serving needs: cut, settle and stop."""
        log.critical(f"{thread} failed: nothing is served any more", exc_info=True)
        self.failure, self.cuts_now = self.failure or thread, True
        self.on_failure()
        threading.Thread(target=self.stop, name="ironcage-stop", daemon=True).start()

    def stop(self) -> None:
        """Stop accepting, let requests in flight finish for a while, then cut and settle them.

        Whoever calls this while another does waits for the end of it; `on_event` waits for nothing.
        """
        if self.router.reporter.is_in_on_event():               # whose call is to end first
            threading.Thread(target=self.stop, name="ironcage-stop").start()
            return
        with self._stopping:
            is_first, self.is_stopping = not self.is_stopping, True
        if not is_first:
            self._has_stopped.wait()
            return
        try:
            self._stop()
        finally:
            self._has_stopped.set()

    def _stop(self) -> None:
        self.router.controller.close()
        self.router.memory.close()
        if self._thread is not None:
            self.shutdown()
            self._thread.join()
            self._thread = None
        self.server_close()
        self._end_connections(self.settings.timeouts.drain_s, lambda place: place.does == IDLE)
        self.router.shut_down()
        self.cuts_now = False                          # streams end with an error event
        self._end_connections(CUT_JOIN_S)
        for sock in self.places.sockets():
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        self._end_connections(CUT_JOIN_S)
        if self.router.server is not None:
            self.router.server.stop()
        self.router.controller.accounts.close()
        self._is_over.set()
        self.has_refused.set()
        if self._tending is not None:
            self._tending.join()
            self._tending = None
        if self.router.reporter.alerts is not None:
            self.router.reporter.alerts.stop()
        self.ledger.close()
        counts = self.router.totals.snapshot()
        self.router.reporter.emit(RouterStopped(
            counts["requests"], counts["failed_requests"], counts["tokens"]["input_tokens"],
            counts["tokens"]["output_tokens"], self.router.controller.total_spent()))

    def __enter__(self) -> ProxyServer:
        if self._thread is None:
            self.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()

    def _end_connections(self, most_s: float,
                         ending: Callable[[Place], bool] = lambda place: True) -> None:
        """Close such connections until none is left at all, the time is up, or a second signal
        comes. Where another process will accept, requests on their way to us are awaited."""
        deadline_s = time.monotonic() + most_s
        silent_s = 0 if self.settings.listener is None else LAST_REQUEST_S
        while self.places.sockets() and time.monotonic() < deadline_s and not self.cuts_now:
            with self.slot.inside():
                self.places.close_some(self.places.most, ending, silent_s)
            self.places.await_change()

    # The configuration, which may change while we serve.

    def _read_config(self, held: Mapping[str, str] = MappingProxyType({})) -> Config:
        """Read the configuration; once more where it names files that were not watched before,
        whose states are to be those before they are read."""
        settings = self.settings
        for _ in range(2 if settings.config_path is not None else 0):
            config = load_config(settings.config_path, settings.environ, held=held,
                                 allow_plain_http=settings.allow_plain_http)
            fresh = [path for path in _secret_paths(config) if path not in self._files_seen]
            self._files_seen.update({path: _file_state(path) for path in fresh})
            if not fresh:
                return config
        return Config() if settings.config_path is None else config

    def _take_config(self, config: Config, prices: PriceBook,
                     settings: Optional[Settings] = None) -> None:
        """Serve by these from now on. Raises Misconfigured, and changes nothing."""
        settings = settings or self.settings
        known = [*(Caller(name, token_sha256(token)) for name, token in
                   ((CALLER, settings.token), (ADMIN, settings.admin_token)) if token is not None),
                 *config.callers]
        callers = {caller.sha256: caller for caller in known}
        if len(callers) != len(known):
            raise Misconfigured("a token of --config is the same as --token or --admin-token, or "
                                "those two are")
        self.router.configure(config, prices, settings)
        self.settings, self.callers = settings, callers
        for path in {*_secret_paths(settings), *_secret_paths(config)} - self._files_warned_of:
            found = self._files_seen.get(path)
            if os.name == "posix" and found is not None and found[-1] & stat.S_IROTH:
                self._files_warned_of.add(path)
                log.warning("a file with a secret can be read by others: chmod o-r", extra={
                    "fields": {"file": path}})

    def service_actions(self) -> None:
        """Look, in each round of serve_forever, whether a file was changed, and read it; and what
        became of the ledger's."""
        if time.monotonic() - self._looked_s < CONFIG_LOOK_S and not self.reload_asked:
            return
        self._looked_s = time.monotonic()
        with _old_stays("what is known of the ledger"):
            self.ledger.look()
        with _old_stays("the configuration"):
            states = {path: _file_state(path) for path in self._files_seen}
            if states != self._files_seen or self.reload_asked:
                is_asked, self.reload_asked, self._files_seen = self.reload_asked, False, states
                self._reload(is_asked or states[prices_path(self.settings)] != self._table_seen)

    def _reload(self, reads_table: bool) -> None:
        """Read the files of secrets, the configuration, and the price table if need be.

        One that is broken changes nothing, and holds up no change of the others.
        """
        held = {**{provider.key_file: provider.key for provider in self.router.providers.values()
                   if provider.key_file},
                **{path: getattr(self.settings, name)
                   for name, path in self.settings.secret_files.items()}}
        settings = with_secrets_of_files(self.settings, held)
        config, prices = self.router.config, (self._table, self._table_seen)
        with _old_stays("the configuration"):
            check_can_be_reread(settings.config_path)
            config = self._read_config(held)
        if reads_table:
            with _old_stays("the price table"):
                path = prices_path(settings)
                check_can_be_reread(path)
                prices = read_prices(path), self._files_seen[path]
        self._take_config(config, prices_under(config, prices[0]), settings)
        self._table, self._table_seen = prices
        log.warning("configuration read", extra={"fields": {"tokens": len(config.callers)}})

    def unreadiness(self) -> Optional[str]:
        """Return why no call can be admitted, which is tried once a second at most; None: one can
        be."""
        if self.is_stopping:
            return "the proxy is stopping"
        if time.monotonic() - self._tried_s >= CONFIG_LOOK_S:
            self._tried_s = time.monotonic()
            with self.slot.outside():
                self._unready = self._tried()
        return self._unready

    def _tried(self) -> Optional[str]:
        try:
            self.router.controller.budget()        # which asks the engine of a shared budget
        except IroncageError:
            return "the shared budget cannot be asked"
        shared = self.router.controller.accounts.as_json()
        if shared is not None and shared["fault"] is not None:
            return "the shared budget admits no call yet"    # not where it is: anybody reads this
        return "the ledger cannot be written" if self.ledger.try_to_write() else None

    def _tend_ledger(self) -> None:
        """Keep the ledger up: each second, as soon as something was refused, and step by step as
        long as there is more. Each step is in the connections' slot, as a thread without it
        could be left waiting while it holds the ledger; but for one that waits for a disk."""
        is_more, is_lost, tried_s = True, False, NEVER_S
        while not self._is_over.wait(STEP_PAUSE_S):
            if not is_more:
                self.has_refused.wait(CONFIG_LOOK_S)
            self.has_refused.clear()
            with NOTHING_HELD if self.settings.fsync else self.slot.inside():
                is_more = self.ledger.tend()
            if self.ledger.is_failing() and time.monotonic() - tried_s >= CONFIG_LOOK_S:
                tried_s = time.monotonic()
                with self.slot.inside():
                    fault = self.ledger.try_to_write()
                if fault is not None and not is_lost:
                    is_lost = True
                    self.router.reporter.alert("ledger_unavailable", "the ledger cannot be written "
                                      f"({_reason(fault)}): no call is admitted until it can be",
                                      scope=PROXY_SCOPE)
            if is_lost and not self.ledger.is_failing():
                is_lost = False
                self.router.reporter.alert("ledger_available", "the ledger can be written again",
                                  scope=PROXY_SCOPE)

    # Connections: one thread each, and a bound on them.

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept a connection; out of file descriptors, make room, and wait rather than spin.

        Raises: OSError, which serve_forever passes over; RuntimeError where none can come any more.
        """
        try:
            return super().get_request()
        except OSError as err:
            if err.errno in LISTENER_LOST:
                raise RuntimeError("the listening socket is lost") from err
            if err.errno in OUT_OF_RESOURCES:
                self.places.close_some(1)
            if not isinstance(err, BlockingIOError):
                time.sleep(STOP_POLL_S)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        """Let in a connection, and at once all that wait behind it.

        It takes the slot as the connections do: where many ask, a thread without it gets the
        interpreter so rarely that the last of 256 would wait for two seconds. Where no place is
        free, those that just came in have a moment to say what they want.
        """
        arrived = deque([(request, client_address), *self._waiting_outside()])
        for pause_s in (0, *[STOP_POLL_S] * LET_IN_TRIES):
            time.sleep(pause_s)
            with self.slot.inside():
                self.places.close_some(
                    self.places.count(lambda place: not place.holder)
                    - self.places.most // STRANGERS_PART,
                    lambda place: not place.holder, silent_s=STRANGER_S)
                for closes in (False, True):         # once all that find a place have come in
                    self.places.close_some(len(arrived) if closes else 0)
                    for _ in range(min(len(arrived), self.places.most - self.places.count())):
                        self._let_in(*arrived.popleft())
            if not arrived or not self.places.count(lambda place: place.does != SERVING):
                break
        for sock, _ in arrived:
            self._turn_away(sock)

    def _waiting_outside(self) -> Iterator[tuple[socket.socket, Any]]:
        """Yield the connections that can be accepted now, as many as there are files for."""
        files = open_files_limit() - SPARE_FILES - 2 * most_connections()
        with contextlib.suppress(OSError):
            for _ in range(min(LISTEN_BACKLOG, max(SPARE_FILES // 2, files))):
                yield self.socket.accept()

    def _let_in(self, request: socket.socket, client_address: Any) -> None:
        """Start a connection's thread."""
        self.places.open(request)
        try:
            super().process_request(request, client_address)
        except RuntimeError:                           # out of threads
            log.error("a connection was closed, since no thread could be started for it")
            self.shutdown_request(request)

    def _turn_away(self, request: socket.socket) -> None:
        error = ServerBusy(f"the proxy serves {self.places.most} connections already")
        body = json_bytes(error_object(error, "openai", "req_none"))
        head = format_head("HTTP/1.1 503 Service Unavailable",
                           [("content-type", "application/json"), ("retry-after", "1"),
                            ("content-length", str(len(body))), ("connection", "close")])
        with contextlib.suppress(OSError):
            request.setblocking(False)
            request.send(head + body)
        self.shutdown_request(request)

    def shutdown_request(self, request: Any) -> None:
        """End a connection and forget it."""
        super().shutdown_request(request)
        self.places.forget(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log an exception outside a request, for socketserver; never to stderr raw."""
        log.exception("a connection failed by a fault of the proxy")

    # Own routes.

    def metrics(self, request: ClientRequest) -> str:
        """Write the counts for Prometheus: the callers and the admin of the command line may read
        it."""
        if request.caller.scopes:
            raise Forbidden("metrics are read with --token or --admin-token")
        scopes = [PROXY_SCOPE, *(c.name for c in self.callers.values() if c.scopes)]
        in_flight = self.places.count(lambda place: place.does in (READING, SERVING))
        of_server = {} if self.router.server is None else self.router.server.as_json()
        shared = self.router.controller.accounts.as_json()
        return metrics_text(
            self.router.totals, self.router.controller.budgets(scopes),
            {"in_flight": in_flight,
             "memory_reserved_bytes": self.router.memory.as_json()["reserved_bytes"],
             "bound_exceeded": self.router.controller.bound_exceeded(),
             "uptime_seconds": int(time.monotonic() - self.started_s),
             **({} if shared is None else {
                 "shared_unconfirmed": shared["unconfirmed_settlements"],
                 "shared_usable": int(shared["fault"] is None)}),
             **{f"server_{name}": count for name, count in of_server.items()
                if name.startswith("events_")}})

    def status(self, request: ClientRequest) -> dict:
        """Return the whole state: amounts in microdollars, counts since the start.

        A token of --config sees its own part.
        """
        token = next(iter(request.caller.scopes), None)
        counts = self.router.totals.snapshot(token)
        shared = self.router.controller.accounts.as_json()
        terms = {caller.name: caller.terms() for caller in self.callers.values()
                 if caller.scopes and token in (None, caller.name)}
        own, *budgets = self.router.controller.budgets([token or PROXY_SCOPE, *terms])
        for budget in budgets:
            counts["by_token"][budget.scope] = {**counts["by_token"].get(budget.scope, {}),
                                                **budget.standing(), **terms[budget.scope]}
        return {**own.standing(), **counts,
                "by_session": {
                    budget.scope: budget.standing() for budget in
                    self.router.controller.accounts.sessions(terms, SESSIONS_SHOWN)},
                **({"server": self.router.server.as_json()} if self.router.server else {}),
                **({"shared": shared} if shared is not None else {}),
                "bound_exceeded": self.router.controller.bound_exceeded(),
                "hatches": {key[1]: count for key, count in self.router.totals.observed().items()
                            if key[0] == "hatch"},
                "priced_as": self.router.totals.observed().get(("priced_as",), 0),
                "memory": self.router.memory.as_json(),
                "uptime_s": int(time.monotonic() - self.started_s), "version": __version__}

    def get_budget(self, request: ClientRequest) -> dict:
        """Return the five amounts: the proxy's, or those of a token of --config."""
        scope = next(iter(request.caller.scopes), PROXY_SCOPE)
        return self.router.controller.budget(scope).as_json()

    def usage(self, request: ClientRequest) -> bytes:
        """Return the newest rows of the ledger, `?limit=` of them, and as many calls that were
        refused here: all, or those of one's own token."""
        asked = urllib.parse.parse_qs(request.head.query or "").get("limit", ["100"])[-1]
        if not re.fullmatch(r"\d{1,4}", asked, re.ASCII):
            raise BadRequest("limit must be a number of rows from 0 to 9999", param="limit")
        token = next(iter(request.caller.scopes), None)
        rows = ", ".join(map(row_json, self.ledger.recent(int(asked), token)))
        refused = ", ".join(map(json.dumps, self.ledger.refusals(int(asked), token)))
        return f'{{"rows": [{rows}], "refused": [{refused}]}}'.encode("utf-8")

    def put_budget(self, request: ClientRequest) -> dict:
        """Set the limit, the stop or both: the admin's token only, until a restart.

        Shape: {"limit_usd"?: "20.00", "stop_at_usd"?: "18.00"}; null is what the flag says.
        """
        if self.settings.admin_token is None:
            raise Forbidden("the budget cannot be changed over HTTP: start the proxy with "
                            "--admin-token to allow it")
        if request.caller.name != ADMIN:
            raise Forbidden("the budget is changed with the admin's token, not a caller's")
        if self.router.server is not None:
            raise Forbidden("the budget is leased from the Iron Cage server, and changed there")
        if media_type(request.head.headers) != "application/json":
            raise UnsupportedBody("send the new limit as application/json")
        if len(request.body) > MAX_BUDGET_BYTES:
            raise BadRequest(f"send the amounts alone, in at most {MAX_BUDGET_BYTES} bytes")
        request.parsed()                               # strict: no duplicate keys
        fields = json.loads(request.body, parse_float=exact_number)
        names = {"limit_usd": "limit", "stop_at_usd": "stop_at"}
        if not fields or not fields.keys() <= names.keys():
            raise BadRequest('the body must be {"limit_usd": "20.00"}, with or without a '
                             '"stop_at_usd"', param="limit_usd")
        try:
            limits = {}
            for name, value in fields.items():
                limits[names[name]] = FLAGGED if value is None else parse_usd(value)
            self.router.controller.set_limits(**limits)
        except ValueError as err:
            raise BadRequest(f"{name}: {err}", param=name) from None
        budget = self.router.controller.budget()
        log.warning("budget set", extra={"fields": {
            name: "none" if amount is None else format_usd(amount)[1:]
            for name, amount in (("limit_usd", budget.limit), ("stop_at_usd", budget.stop_at))}})
        return budget.as_json()


def _as_json(action: Callable) -> Callable[..., tuple[str, bytes]]:
    return lambda server, request: ("application/json", json_bytes(action(server, request)))


# path -> method -> what makes the (content type, body) of the answer
OWN_ROUTES = MappingProxyType({
    "/ironcage/status": {"GET": _as_json(ProxyServer.status)},
    "/ironcage/usage": {"GET": lambda server, request: (
        "application/json", server.usage(request))},
    "/ironcage/budget": {"GET": _as_json(ProxyServer.get_budget),
                         "PUT": _as_json(ProxyServer.put_budget)},
    "/ironcage/metrics": {"GET": lambda server, request: (
        "text/plain; version=0.0.4; charset=utf-8", server.metrics(request).encode("utf-8"))},
})


class CannotListen(Misconfigured):
    """The address cannot be listened on."""


def _file_state(path: str) -> Optional[tuple[int, int, int, int]]:
    """Return what changes when a file is written, replaced, or opened to others (its mode, the
    last); None where there is none."""
    found = _state_at(path)
    return found and (found.st_mtime_ns, found.st_size, found.st_ino, found.st_mode)


# The settings that a file can hold, and how they are read from it, as by secret_in().
SECRETS: Mapping[str, Callable] = MappingProxyType({
    name: functools.partial(secret_in, read=read) for name, read in (
        ("token", parse_token), ("admin_token", parse_token), ("server_token", parse_token),
        ("alert_url", parse_alert_url), ("shared", parse_engine_url))})


def _secret_paths(named: Union[Settings, Config]) -> set[str]:
    """Return the files that hold secrets of settings or of a configuration."""
    return {*(provider.key_file for provider in named.providers if provider.key_file),
            *getattr(named, "secret_files", {}).values()}


def with_secrets_of_files(settings: Settings, held: Mapping[str, str]) -> Settings:
    """Return settings with what their files hold now; one that is broken changes nothing."""
    return settings._replace(
        providers=tuple(provider if not provider.key_file else with_key(
            provider, settings.environ, held=held, allow_plain_http=settings.allow_plain_http)
            for provider in settings.providers),
        **{name: SECRETS[name](path, held) for name, path in settings.secret_files.items()})


@contextlib.contextmanager
def _old_stays(what: str) -> Iterator[None]:
    """Log any fault in a file that is read anew, and go on: the accepting thread must not end.

    Of a fault that nobody foresaw only kind and place are logged: its text may hold a secret.
    """
    try:
        yield
    except Misconfigured as err:
        log.error(f"{what} stays as it was", extra={"fields": {"reason": str(err)}})
    except Exception as err:
        place = err.__traceback__
        while place.tb_next is not None:
            place = place.tb_next
        log.error(f"{what} stays as it was", extra={"fields": {
            "reason": f"a fault of the proxy: {type(err).__name__} in line {place.tb_lineno} of "
                      f"{os.path.basename(place.tb_frame.f_code.co_filename)}"}})


def prices_path(settings: Settings) -> str:
    """Return where the price table is: --pricing, else pricing.json beside this file."""
    return settings.pricing_path or os.path.join(
        os.path.dirname(os.path.abspath(__file__)), "pricing.json")


def read_prices(path: str) -> PriceBook:
    """Read a price table. Raises Misconfigured where it cannot be read."""
    try:
        return PriceBook.load(path)
    except FileNotFoundError as err:
        raise Misconfigured(f"the price table {path} does not exist") from err
    except OSError as err:
        raise Misconfigured(f"the price table {path} cannot be read: {_reason(err)}") from err
    except (ValueError, RecursionError) as err:
        raise Misconfigured(f"the price table {path} is not usable: {err}") from err


def prices_under(config: Config, book: PriceBook) -> PriceBook:
    """Return the prices that hold under a configuration. Raises Misconfigured."""
    with checking("the configuration:"):
        return book.with_own(config.prices, price_as=config.price_as,
                             providers=config.providers)


def load_prices(settings: Settings) -> PriceBook:
    """Read the price table of the settings. Raises Misconfigured where it cannot be read.

    Without --pricing and without a pricing.json beside this file there are no prices: that
    serves without a budget only.
    """
    path = prices_path(settings)
    if settings.pricing_path is None and settings.budget_microdollars is None \
            and not os.path.exists(path):
        log.warning("there is no pricing.json beside the program: nothing is priced")
        return PriceBook({})
    return read_prices(path)


# ==== 28. Settings and command line =============================================================
#
# One table gives every flag, its environment variable, its check and its line of help. The first
# of these that is set counts: flag, environment, default. Provider keys come from the environment
# or from files. Nothing above reads a variable (but urllib, for its proxies), prints, or ends the
# process.


def _number_like(meaning: str, least: int, most: int, unit: int = 1) -> Callable[[str], int]:
    """Make a reader of whole numbers, which returns them in a smaller unit."""
    return value_like(lambda text: re.fullmatch(r"[0-9]{1,6}", text) and least <= int(text) <= most,
                      meaning, lambda text: int(text) * unit)


_parse_port = _number_like("a port number from 0 to 65535", 0, 65535)
_parse_seconds = _number_like("a whole number of seconds", 0, 99_999)
_parse_days = _number_like("a whole number of days from 1 up", 1, 99_999)
_parse_megabytes = _number_like("a whole number of megabytes from 1 up", 1, 999_999, 1024 * 1024)
_parse_host_name = value_like(
    lambda text: re.fullmatch(r"[A-Za-z0-9._:\[\]-]{1,255}", text) and own_host(text) != "?",
    "a host name or an address")
_parse_id = text_like(TOKEN_NAME, "1 to 64 letters, digits, _, . or -")
_parse_field = text_like(HATCH_NAME, "the name of a field, such as top_k or a.b")


def parse_moment(text: str, now_s: Optional[int] = None) -> int:
    """Return the Unix seconds of a --since or --until: of a day or month its beginning, in UTC."""
    now_s = int(time.time()) if now_s is None else now_s
    today_s = period_start("day", now_s)
    span = re.fullmatch(r"([0-9]{1,5})([dh])", text)
    if span is not None:
        return today_s - int(span[1]) * DAY_S if span[2] == "d" else now_s - int(span[1]) * 3600
    if text in ("today", "yesterday"):
        return today_s - DAY_S * (text == "yesterday")
    with contextlib.suppress(ValueError):
        return parse_time(f"{text}-01" if re.fullmatch("[0-9]{4}-[0-9]{2}", text) else text)
    raise ValueError("must be a date such as 2026-12-31 or 2026-12-31T23:59:59Z, a month such as "
                     "2026-12, today, yesterday, or a time back from now such as 7d or 24h")


def _parse_groups(text: str) -> list[str]:
    groups = text.split(",")
    for group in groups:
        if group not in USAGE_GROUPS:
            raise ValueError(f"{_shown_word(group)} is none of {', '.join(USAGE_GROUPS)}, each once"
                             + did_you_mean(group, USAGE_GROUPS))
        if groups.count(group) > 1:
            raise ValueError(f"{group} is given twice; take each once")
    return groups


class Setting(NamedTuple):
    """One row of the settings: a flag, what it is for, and how its value is read."""
    flag: str
    help: str
    metavar: str = ""                                     # "": a switch, without a value
    parse: Callable[[Any], Any] = str
    own_field: str = ""                                   # where it is not named as the flag
    repeats: bool = False                                 # may be given several times
    commands: str = "serve check"                         # that use it

    @property
    def field(self) -> str:
        """The field of Settings that it sets: the plural of the flag's name where that repeats."""
        return self.own_field or self.flag[2:].replace("-", "_") + "s" * self.repeats

    @property
    def env(self) -> str:
        """Its environment variable."""
        return "IRONCAGE_" + self.flag[2:].replace("-", "_").upper()

    def read(self, given: Any) -> Any:
        """Return the value of its field of text, or of several where it repeats. What is no text
        is a value already. Raises ValueError."""
        if self.repeats:
            return tuple(map(self.parse, [given] if isinstance(given, str) else given))
        return self.parse(given) if isinstance(given, str) else given


SETTINGS = (
    Setting("--host", "address to listen on (127.0.0.1)", "ADDRESS", _parse_host_name),
    Setting("--port", "port to listen on (8787); 0 takes any free one", "PORT", _parse_port),
    Setting("--token", "what agents authenticate with; without it one is made and shown", "TOKEN",
            parse_token),
    Setting("--admin-token", "what PUT /ironcage/budget needs; without it that route is closed",
            "TOKEN", parse_token),
    Setting("--budget", "the most to spend, in USD, exact; without it spend is only counted",
            "USD", parse_usd, own_field="budget_microdollars"),
    Setting("--stop-at", "begin no call once this much is spent; calls in flight may go on up to "
            "--budget, which must be more", "USD", parse_usd, own_field="stop_at_microdollars"),
    Setting("--shared", "a Valkey or Redis server in which many processes keep one budget: "
            "redis://[[user]:password@]host[:port][/db], rediss:// or unix://PATH", "URL",
            parse_engine_url, commands="serve check usage cage"),
    Setting("--cage", "which of the budgets there (default); `cage new` makes one", "NAME",
            _parse_id, commands="serve check usage"),
    Setting("--ledger", "SQLite file that keeps what every call cost; without it a restart forgets",
            "FILE", parse_ledger_path, own_field="ledger_path",
            commands="serve check usage audit tokens"),
    Setting("--fsync", "let the ledger, and a shared budget, survive a loss of power too, at a "
            "disk flush for each call"),
    Setting("--keep-days", "fold what is older in the ledger into totals by day; without it every "
            "row is kept", "DAYS", _parse_days),
    Setting("--no-wait-for-ledger", "end at once where another proxy has the ledger, rather than "
            "wait 30 seconds for it"),
    Setting("--config", "JSON file with tokens, providers, aliases and own prices", "FILE",
            own_field="config_path", commands="serve check tokens models audit"),
    Setting("--wait", "seconds that a request may wait for money that calls in flight hold (30)",
            "SECONDS", _parse_seconds, own_field="wait_s"),
    Setting("--no-fit", "refuse a request whose max_tokens does not fit, rather than lower it"),
    Setting("--strict", "refuse a translated request that would lose or change a field"),
    Setting("--bound", "how text is bounded: measured, by a rule that plausible texts do not beat; "
            "or bytes, a token a byte, which is a proof", "RULE",
            text_like("measured|bytes", "measured or bytes")),
    Setting("--pricing", "price table in LiteLLM's format, instead of pricing.json", "FILE",
            own_field="pricing_path", commands="serve check models audit"),
    Setting("--openai-base-url", "where OpenAI calls go; a bare host gets /v1", "URL",
            parse_base_url),
    Setting("--openai-chat-only", "what answers in OpenAI's place has chat completions only"),
    Setting("--anthropic-base-url", "where Anthropic calls go", "URL", parse_base_url),
    Setting("--allow-plain-http", "send keys to a base URL that is neither https nor on this "
            "machine", commands="serve check models audit"),
    Setting("--server-url", "an Iron Cage server, which knows the provider's key and lends budget",
            "URL", parse_base_url),
    Setting("--server-token", "what the proxy authenticates with there; without it --token is used",
            "TOKEN", parse_token),
    Setting("--cache-ttl", "seconds that a key from there is kept (300)", "SECONDS",
            _parse_seconds, own_field="cache_ttl_s"),
    Setting("--max-body-mb", "largest request body, in megabytes (32)", "MB", _parse_megabytes,
            own_field="max_body_bytes"),
    Setting("--max-memory-mb", "memory for the bodies and answers in work, all together, in "
            "megabytes (256); more of them wait", "MB", _parse_megabytes,
            own_field="max_memory_bytes"),
    Setting("--agent-id", "who asks, in events, instead of the token's name", "NAME", _parse_id),
    Setting("--provider-id", "the provider, in events, instead of its name", "NAME", _parse_id),
    Setting("--allow-host", "a further Host name to answer to", "NAME", _parse_host_name,
            repeats=True),
    Setting("--allow-path", "a path (* and ? match) to let through unmetered under a budget",
            "PATTERN", repeats=True),
    Setting("--allow-field", "a request field of unknown cost to let through under a budget",
            "NAME", _parse_field, repeats=True),
    Setting("--allow-content", "a type of content of unknown size to let through under a budget, "
            "as a whole context", "TYPE", _parse_field, repeats=True),
    Setting("--no-hosted-tools", "refuse under a budget the searches that a provider runs, rather "
            "than cap them"),
    Setting("--alert-url", "POST alerts there as JSON: at 50, 80, 90 and 100 % of a budget, when a "
            "bound was exceeded, and when the ledger cannot be written", "URL", parse_alert_url),
    Setting("--log-format", "text or json", "FORMAT", text_like("text|json", "text or json")),
    Setting("--quiet", "no banner and no line for each request"),
)
# Flags of one command or the other, which no variable sets.
OPTIONS = (
    Setting("--json", "print JSON", commands="usage audit tokens"),
    Setting("--csv", "print CSV", commands="usage"),
    Setting("--compare", "print what another price table would change", "FILE", commands="models"),
    Setting("--since", "from this time on (UTC): a date, with a time or not, a month (2026-11), "
            "today, yesterday, 7d, 24h", "WHEN", parse_moment, commands="usage"),
    Setting("--until", "up to this time, which is the beginning of a date or month", "WHEN",
            parse_moment, commands="usage"),
    Setting("--by", f"one table by one or several, joined by commas, of {', '.join(USAGE_GROUPS)}",
            "NAMES", _parse_groups, commands="usage"),
    Setting("--refused", "what was refused, and why", commands="usage"),
    Setting("--help", "what a command does and takes"),
    Setting("--version", "print the version"),
)
FLAGS: Mapping[str, Setting] = MappingProxyType({row.flag: row for row in (*SETTINGS, *OPTIONS)})


# A shell, or `docker compose`, makes an empty value of a variable of its own that is not set. It
# sets nothing, but where that would mean no limit, or another one.
EMPTY = "has an empty value; leave it out if none is meant"
LIMITS_SPEND = frozenset({"budget_microdollars", "stop_at_microdollars", "shared", "cage",
                          "ledger_path", "config_path", "server_url"})
GIVEN_FIELDS = ("name", "token", "sha256")     # of a token: none is a word of `tokens add`


def _flags_of(command: str) -> list[Setting]:
    return [row for row in (*SETTINGS, *OPTIONS)
            if command in row.commands.split() or row.field == "help"]


ABOUT_VARIABLES = """

Each setting has a variable, IRONCAGE_BUDGET for --budget and so on (1 for a switch, commas
between several values); a flag goes first. IRONCAGE_TOKEN_FILE names a file that holds the value.
Provider keys come from the environment, or from the file that OPENAI_API_KEY_FILE and so on name:
"""


def _parser(rows: Iterable[Setting], **words: Any) -> argparse.ArgumentParser:
    """Make a parser of flags and words whose complaints are one line, without a value."""
    import argparse              # here only: an embedder needs none
    parser = argparse.ArgumentParser(
        allow_abbrev=False, add_help=False,
        formatter_class=argparse.RawDescriptionHelpFormatter, **words)
    for row in rows:
        kind: dict = {"action": "store_true", "default": None} if not row.metavar else {
            "action": "append" if row.repeats else "store", "metavar": row.metavar}
        parser.add_argument(row.flag, *["-h"][:row.flag == "--help"], dest=row.field,
                            help=row.help.replace("%", "%%"), **kind)
    parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    parser.error = _complain                           # type: ignore[method-assign]
    return parser


def _complain(message: str) -> NoReturn:
    flag = re.findall("--[a-z-]+", message)[0]           # "argument --port: expected one argument"
    raise Misconfigured(f"{flag} needs a value: {FLAGS[flag].metavar}" if FLAGS[flag].metavar
                        else f"{flag} takes no value")


def help_text(name: str) -> str:
    """Return what --help prints of a command; for `serve`, the default, of the program."""
    command = COMMANDS[name]
    about = command.about if name != "serve" else (
        "A proxy between AI agents and model providers that holds the keys and never lets spend "
        "pass a limit.\n\ncommands (COMMAND --help says what one takes):\n" + table(
            [(f"  {name}", one.about.split("\n")[0]) for name, one in COMMANDS.items()], lefts=2))
    variables = "" if name not in SERVERS else ABOUT_VARIABLES + ", ".join(
        filter(None, (row.key_env for row in KNOWN_PROVIDERS.values()))) + "."
    return _parser(
        _flags_of(name), usage=f"ironcage_proxy.py {name} [FLAG ...] {command.words}".rstrip(),
        description=about,
        epilog=f"example:\n  ironcage_proxy.py {command.example}{variables}").format_help()


def _shown_word(word: str) -> str:
    """Return a word that is out of place as it may be shown: a long one may be a secret."""
    return shown_name(word) if len(word) < LEAST_KEY_CHARS or os.path.exists(word) else "?"


def _known_command(words: Sequence[str]) -> str:
    """Return the command that begins the words of a command line. Raises Misconfigured."""
    command = words[0] if words else "serve"
    if command not in COMMANDS:
        shown = _shown_word(command)
        raise Misconfigured(
            f"there is no command {shown}{did_you_mean(command, COMMANDS)}; there are "
            f"{', '.join(COMMANDS)}. To run a program inside the cage, put -- before it: "
            f"ironcage_proxy.py [FLAG ...] -- {shown} ...")
    return command


def _unknown_flag(command: str, flag: str, value: str = "...") -> Misconfigured:
    """Make the error for a flag that a command, or all of them, has no use for."""
    shown = flag if re.fullmatch("--?[a-z-]{1,32}", flag) else "?"
    name = flag[2:].replace("-", "_")
    field = next(filter((TOKEN_FIELDS.keys() - GIVEN_FIELDS).__contains__, (name, f"{name}_usd")),
                 None)
    if command == "tokens" and field is not None:
        value = value if re.fullmatch(r"[0-9.]{1,20}", value) else "..."
        return Misconfigured(f"{shown} limits the proxy, not a token; a token's own limit is a "
                             f"word: {field}={value}")
    users = FLAGS[flag].commands.split() if flag in FLAGS else ()
    hint = f"; it is for {', '.join(users)}" if users \
        else did_you_mean(flag, [row.flag for row in _flags_of(command)])
    return Misconfigured(f"{command} takes no flag {shown}{hint} ({command} --help lists what "
                         "it takes)")


def parse_arguments(argv: Sequence[str]) -> dict:
    """Return the command line by names: values of SETTINGS as text, of OPTIONS as they are read;
    `command` and its `words`. Raises Misconfigured.

    `wrapped` is what follows a --, the command to run; None where there is no --.
    """
    end = [*argv, "--"].index("--")
    own = [*argv[:end]]
    found, unknown = _parser(FLAGS.values()).parse_known_intermixed_args(own)
    given = {**vars(found), "wrapped": [*argv[end + 1:]] if argv[end:] else None}
    words = given["words"]
    if unknown:                  # the command is a word before it
        known = words if words and own.index(words[0]) < own.index(unknown[0]) else ()
        raise _unknown_flag(_known_command(known), unknown[0].partition("=")[0])
    if words[:1] == ["help"]:
        words, given["help"] = words[1:], True
    command = "version" if given["version"] else _known_command(words)
    given.update(command=command, words=words[1:])
    if given["help"] or given["version"]:
        return given
    wrapped, words = given["wrapped"], given["words"]
    if wrapped is not None and (command != "serve" or words or not wrapped):
        raise Misconfigured("after -- there must be a command to run, and before it flags only")
    for row in FLAGS.values():
        value = given[row.field]
        if value is not None and command not in row.commands.split():
            raise _unknown_flag(command, row.flag, str(value))
        if isinstance(value, str) and not value.strip():
            raise Misconfigured(f"{row.flag} {EMPTY}")
        if row in OPTIONS and row.metavar and value is not None:
            with checking(f"{row.flag}:"):
                given[row.field] = row.parse(value)
    if words and (command == "serve" or not COMMANDS[command].words):
        raise Misconfigured(f"{command} takes no further words ({_shown_word(words[0])})")
    return given


_parse_switch = value_like(lambda text: re.fullmatch("(?i)1|true|yes|on|0|false|no|off", text),
                           "1 or 0", lambda text: text.lower() in ("1", "true", "yes", "on"))
# What Kubernetes sets for services whose names begin with ironcage.
_OF_A_SERVICE = (r"(?s)IRONCAGE_((\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_[0-9]+_\w+)=.*"
                 r"|(\w+_)?PORT=(tcp|udp|sctp)://.*)")


def _value_of_variable(row: Setting, environ: Mapping[str, str]) -> Any:
    """Return what its variable makes of a setting, or None. Raises Misconfigured."""
    text = environ.get(row.env, "")
    if not text.strip():
        for name in (row.env, f"{row.env}_FILE"):
            if row.field in LIMITS_SPEND and name in environ:
                raise Misconfigured(f"{name} {EMPTY}: a limit on spend hangs on it")
        return None
    if re.fullmatch(_OF_A_SERVICE, f"{row.env}={text}"):
        return None
    with checking(f"{row.env}:"):
        check_unquoted(text)
        return row.read([part.strip() for part in text.split(",") if part.strip()] if row.repeats
                        else text if row.metavar else _parse_switch(text))


def unread_variables(environ: Mapping[str, str]) -> list[str]:
    """Return what is to be said of variables that are named like settings and set none.

    Raises Misconfigured for one that looks like a misspelled setting: a limit that is not set
    would be no limit.
    """
    known = [row.env for row in SETTINGS]
    known += [f"{row.env}_FILE" for row in SETTINGS if row.field in SECRETS]
    said = []
    for name, value in environ.items():
        found = re.match("IRON_?CAGE_?", name, re.IGNORECASE)
        if name in known and not value.strip():
            said.append(f"{name} is empty, and sets nothing")
        if not found or name in known or re.fullmatch(_OF_A_SERVICE, f"{name}={value}"):
            continue
        start = len("IRONCAGE_")
        hint = did_you_mean(name[found.end():].upper(), [one[start:] for one in known])
        if hint:
            raise Misconfigured(f"the variable {shown_name(name)} sets nothing"
                                + hint.replace("mean ", "mean IRONCAGE_"))
        said.append(f"no setting reads {shown_name(name)}")
    return said


def _providers_from(values: dict, environ: Mapping[str, str]) -> tuple[Provider, ...]:
    """Return the known providers that can be called; what is about them is taken from `values`."""
    providers = []
    for name, provider in KNOWN_PROVIDERS.items():
        url = values.pop(f"{name}_base_url", None)
        if values.pop(f"{name}_chat_only", False):
            provider = provider._replace(responses=False)
        is_set = provider.base_url and not provider.is_named_only and (
            environ.get(provider.key_env) or named_file(provider.key_env, environ))
        if name in ("openai", "anthropic") or is_set:
            providers.append(with_key(
                at_base_url(provider, url) if url else provider, environ,
                allow_plain_http=bool(values.get("allow_plain_http"))))
    return tuple(providers)


def settings_of(given: Mapping[str, Any], environ: Mapping[str, str], command: str = "serve", *,
                named: str = "{0.flag}", **usual: Any) -> Settings:
    """Return the settings that a command uses: those that are given, as Setting.read() takes them;
    else those of variables; else `usual` ones. `named` is how a message names the row of one that
    was given. Raises Misconfigured.
    """
    used = [row for row in SETTINGS if command in row.commands.split()]
    if used:
        unread_variables(environ)
    values, files = usual, {}
    for row in used:
        value = given.get(row.field)
        path = named_file(row.env, environ) if value is None and row.field in SECRETS else ""
        if path:
            files[row.field], value = path, SECRETS[row.field](path, {})
        elif value is None:
            value = _value_of_variable(row, environ)
        elif isinstance(value, str) and not value.strip():
            raise Misconfigured(f"{row.flag} {EMPTY}")
        else:
            with checking(f"{named.format(row)}:"):
                value = row.read(value)
        if value is not None:
            values[row.field] = value
    environ = environ if command in SERVERS else {}                  # others need no key
    providers = _providers_from(values, environ)
    with checking("--stop-at:"):
        check_stop(values.get("budget_microdollars"), values.get("stop_at_microdollars"))
    if "server_url" in values and "shared" in values:
        raise Misconfigured("--server-url and --shared are two places for one budget; use one")
    if "server_url" in values and not {"token", "server_token"} & values.keys():
        raise Misconfigured("--server-url needs --server-token: what to authenticate with there")
    if "token" not in values:
        values.update(token=new_token(), token_is_generated=True)
    return Settings(**{"providers": providers, "environ": environ, "secret_files": files, **values})


def settings_on_line(given: Mapping[str, Any], environ: Mapping[str, str]) -> Settings:
    """Return the settings of a command line, as parse_arguments() has it. Raises Misconfigured."""
    usual: dict[str, Any] = {} if given["wrapped"] is None else {"port": 0, "quiet": True}
    on_line = [row.env for row in SETTINGS if given["wrapped"] is not None and given[row.field]
               and row.field in SECRETS.keys() - {"token", "shared"}]
    if on_line:
        raise Misconfigured(f"with -- CMD set {' and '.join(on_line)} in the environment: the "
                            "command could read it on our command line")
    settings = settings_of(given, environ, given["command"], **usual)
    shared = settings.shared if given["shared"] else None
    return settings if shared is None else settings._replace(
        shared=shared._replace(is_public=bool(shared.password)))


def settings_from(argv: Sequence[str], environ: Optional[Mapping[str, str]] = None) -> Settings:
    """Return settings from command-line arguments and the environment: those that the command
    uses. Raises Misconfigured.
    """
    return settings_on_line(parse_arguments(argv), os.environ if environ is None else environ)


class LogFormatter(logging.Formatter):
    """One line a record: text with name=value pairs, or JSON. Values cannot forge a line."""

    def __init__(self, log_format: str) -> None:
        super().__init__()
        self._as_json = log_format == "json"

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record, with the pairs of its `fields`."""
        fields = dict(getattr(record, "fields", {}))
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        at = utc_text(record.created)
        if self._as_json:
            return json.dumps({"time": at, "level": record.levelname,
                               "message": record.getMessage(), **fields})
        pairs = "".join(f" {name}={self._shown(value)}" for name, value in fields.items())
        return f"{at} {record.levelname} {record.getMessage()}{pairs}"

    @staticmethod
    def _shown(value: Any) -> str:
        text = str(value)
        return text if re.fullmatch(r"[A-Za-z0-9_.:/@+-]+", text) else json.dumps(text)


def _prepare_process() -> None:
    """Make this process fit to hold keys and to serve on many threads, as far as it can be.

    On Linux no other process of this user reads its memory and environment any more. A thread
    takes less address space: 8 MB of stack is the default, and glibc keeps up to 128 MB apart for
    each of its arenas, which only one thread can use at a time.
    """
    threading.stack_size(THREAD_STACK_BYTES)
    if sys.platform == "linux":
        import ctypes            # here only: it costs a millisecond and a megabyte
        library, pr_set_dumpable, m_arena_max = ctypes.CDLL(None), 4, -8    # prctl.h, malloc.h
        library.prctl(pr_set_dumpable, 0, 0, 0, 0)
        with contextlib.suppress(AttributeError):      # a C library without it
            library.mallopt(m_arena_max, 1)


LISTEN_VARIABLES = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")
FIRST_HANDED = 3                         # the descriptor; sd_listen_fds(3), read 2026-11-28


def handed_listener(environ: Mapping[str, str]) -> Optional[socket.socket]:
    """Return the listening socket that a service manager opened for this process, if it did.

    Raises Misconfigured for anything but one listening TCP socket.
    """
    count = environ.get("LISTEN_FDS", "0")
    if environ.get("LISTEN_PID") != str(os.getpid()) or count == "0":
        return None
    if count != "1":
        raise Misconfigured(f"LISTEN_FDS is {count[:20]!r}, but one socket can be served: give the "
                            "unit one ListenStream= (a port alone takes IPv4 and IPv6)")
    is_right: Any = False
    with contextlib.suppress(OSError):
        sock = socket.socket(fileno=FIRST_HANDED)
        is_right = sock.family in (socket.AF_INET, socket.AF_INET6) \
            and sock.type == socket.SOCK_STREAM \
            and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    if not is_right:
        raise Misconfigured(f"descriptor {FIRST_HANDED}, which LISTEN_FDS hands over, is not a "
                            "TCP socket that listens: give the unit ListenStream=HOST:PORT")
    sock.set_inheritable(False)
    return sock


def on_handed_listener(settings: Settings, given: Mapping[str, Any]) -> Settings:
    """Return settings that serve on the socket which was handed over, if one was; it wins over
    --host and --port, which is logged. Raises Misconfigured."""
    listener = handed_listener(settings.environ)
    if listener is None:
        return settings
    host, port = listener.getsockname()[:2]
    unused = [flag for flag in ("host", "port") if given[flag] is not None]
    more = {"unused": " ".join(f"--{flag}" for flag in unused)} if unused else {}
    log.log(logging.WARNING if unused else logging.INFO, "the socket that was handed over is used",
            extra={"fields": {"host": host, "port": port, **more}})
    return settings._replace(listener=listener, host=host, port=port, allow_hosts=(
        *settings.allow_hosts, *([settings.host] if "host" in unused else [])))


def budget_text(settings: Settings) -> str:
    """Return the budget in words, with its stop if it has one."""
    if settings.budget_microdollars is None:
        return "none: spend is counted, not limited"
    limit = format_usd(settings.budget_microdollars)
    return limit if settings.stop_at_microdollars is None \
        else f"{limit}, stopping at {format_usd(settings.stop_at_microdollars)}"


def let_through(server: ProxyServer) -> list[tuple[str, str]]:
    """Return what the operator lets through or prices by hand, and what sets nothing: (what,
    names)."""
    settings = server.settings
    rows = (("unmetered paths", settings.allow_paths), ("unbounded fields", settings.allow_fields),
            ("unbounded content", settings.allow_contents))
    return [*((what, ", ".join(names)) for what, names in rows if names),
            *(("priced as another", re.sub(UNPRINTABLE, "?", f"{pattern} as {key}"))
              for pattern, key in server.router.config.price_as.items()),
            *(("warning", text) for text in unread_variables(settings.environ))]


def banner(server: ProxyServer) -> str:
    """Return what a person needs to know at the start, and to paste into a shell."""
    return "\n".join([f"ironcage_proxy {__version__} is listening on {server.url}", *(
        f"  {what + ':':19} {text}" for what, text in (*_banner_rows(server),
                                                      *let_through(server)))])


def _banner_rows(server: ProxyServer) -> Iterator[tuple[str, str]]:
    settings, router, shared = server.settings, server.router, server.router.controller.accounts
    token = settings.token if settings.token_is_generated else "<the token you chose>"
    found = [provider.key_file or provider.key_env
             for provider in router.providers.values() if provider.key is not None]
    spent = f", of which {format_usd(router.controller.total_spent())} are spent" \
        if settings.ledger_path or settings.shared else \
        " (kept in memory: a restart forgets spend)"
    yield "OpenAI clients", f"export OPENAI_BASE_URL={server.url}/v1 OPENAI_API_KEY={token}"
    yield "Anthropic clients", f"export ANTHROPIC_BASE_URL={server.url} " \
                               f"ANTHROPIC_AUTH_TOKEN={token}"
    yield "provider keys", ", ".join(found) or f"none found; {ECHO_MODEL} needs none"
    yield "budget", budget_text(settings) + (
        spent if settings.budget_microdollars is not None else "")
    if router.server is not None:
        lease = router.server.lease
        yield "Iron Cage server", f"{settings.server_url}, " + (
            "no lease yet: nothing can be spent" if lease is None
            else f"{format_usd(lease.granted)} leased")
        if settings.server_token is None:
            yield "warning", "agents hold the token of the Iron Cage server; give the proxy its " \
                             "own with --server-token"
    if shared.is_shared:
        limit, spent_by_all = shared.known([PROXY_SCOPE])[0][1:3]
        yield "shared budget", (
            f"the cage {shared.cage} at {shared.engine.address}: "
            f"{'no limit' if limit is None else format_usd(limit)}, {format_usd(spent_by_all)} "
            f"spent by all; a crash there forgets {shared.durability}")
    if isinstance(server.ledger, SqliteLedger):
        cut_off = server.ledger.recovered
        yield "ledger", settings.ledger_path + (
            f" ({cut_off} calls were cut off by the last exit and are charged at their bounds)"
            if cut_off else "")
    if settings.config_path is not None:
        yield "tokens", f"{len(router.config.callers)} in {settings.config_path}"
    if settings.host in ("0.0.0.0", "::") and not settings.allow_hosts:
        yield "warning", "every address is listened on, but only loopback names are answered to; " \
                         "add --allow-host NAME"


def _on_signals(action: Callable[[int], None], *names: str) -> None:
    """Do something on signals, those of them that this system has."""
    for name in names:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), lambda number, frame: action(number))


def _say(text: str, file: Any) -> None:
    """Print to a file that may be full, or a pipe that nobody reads: that ends no server."""
    try:
        print(text, file=file, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())       # for what it has buffered


def _stopped(server: ProxyServer) -> bool:
    """Stop a server, and say in the log what it spent. Whether that was as it should be."""
    server.stop()
    spent = {"spent_usd": format_usd(server.router.controller.total_spent())[1:]}
    if server.failure is None:
        log.info("stopped", extra={"fields": spent})
    else:
        log.critical(f"ended, since {server.failure} failed", extra={"fields": spent})
    return server.failure is None


def run_serve(settings: Settings, given: Mapping[str, Any]) -> int:
    """Serve until SIGINT or SIGTERM, then drain; a second signal cuts."""
    _prepare_process()
    open_files_limit(2 * MAX_CONNECTIONS + SPARE_FILES)      # the usual 1,024 are too few
    settings = on_handed_listener(settings, given)
    server, signals = ProxyServer(settings), []
    asked_to_stop = threading.Lock()       # an Event's own lock may be held as a signal comes
    asked_to_stop.acquire()

    def on_signal(number: int) -> None:
        server.cuts_now = bool(signals)
        signals.append(number)
        if not server.cuts_now:
            asked_to_stop.release()

    _on_signals(on_signal, "SIGINT", "SIGTERM", "SIGBREAK")
    _on_signals(lambda number: setattr(server, "reload_asked", True), "SIGHUP")
    server.start()
    short = f"{server.url} {settings.token if settings.token_is_generated else ''}".strip()
    if not settings.quiet or settings.token_is_generated or settings.port == 0:
        _say(short if settings.quiet else banner(server), sys.stdout)
    while server.failure is None and not asked_to_stop.acquire(timeout=1):
        pass                               # in slices: Windows cannot interrupt a longer wait
    return 0 if _stopped(server) else 1


# Clients read one of two variables; interactive Claude Code asks about the second, its default
# answer is No, and then it is not logged in (2.1.332, November 2026).
ANTHROPIC_TOKENS = ("ANTHROPIC_AUTH_TOKEN", "ANTHROPIC_API_KEY")
ONE_TOKEN_COMMANDS = r"(?is)(.*[/\\])?claude(\.exe|\.cmd)?"


def child_environment(server: ProxyServer, environ: Mapping[str, str],
                      command: str) -> dict[str, str]:
    """Return what a wrapped command gets: the proxy's address and token, no key that we hold."""
    settings = server.settings
    password = settings.shared.password if settings.shared is not None else None
    keys = [provider.key for provider in server.router.providers.values()]
    words = [*filter(None, (password, *keys))]
    held = [*filter(None, (settings.admin_token, settings.server_token, settings.alert_url)),
            *filter(is_secret, words)]
    hidden = {row.env for row in SETTINGS} | {*LISTEN_VARIABLES} | {
        row.key_env for row in KNOWN_PROVIDERS.values() if not row.is_named_only} | {
        provider.key_env for provider in server.router.providers.values()}
    kept = {name: value for name, value in environ.items()
            if re.sub("_FILE$", "", name) not in hidden and name not in hidden
            and value not in words and not any(is_within(secret, value) for secret in held)}
    direct = [environ.get("NO_PROXY") or environ.get("no_proxy"), "127.0.0.1", "localhost"]
    no_proxy = ",".join(filter(None, direct))
    takes_one = re.fullmatch(ONE_TOKEN_COMMANDS, command) is not None
    return {**kept, "NO_PROXY": no_proxy, "no_proxy": no_proxy,
            "OPENAI_BASE_URL": f"{server.url}/v1", "OPENAI_API_BASE": f"{server.url}/v1",
            "OPENAI_API_KEY": settings.token, "ANTHROPIC_BASE_URL": server.url,
            **dict.fromkeys(ANTHROPIC_TOKENS[:1] if takes_one else ANTHROPIC_TOKENS,
                            settings.token)}


def bill(server: ProxyServer) -> str:
    """Return what a wrapped command used and cost, as text."""
    counts, budget = server.router.totals.snapshot(), server.router.controller.budget()
    shared, refused = server.router.controller.accounts.as_json(), counts["refused_requests"]
    cost = sum([cell["cost_microdollars"] for cell in counts["by_token"].values()])
    rows = [{"ironcage": name, **cell} for name, cell in counts["by_model"].items()]
    total = {"ironcage": "total", **counts, **counts["tokens"], "cost_microdollars": cost}
    limit = "no limit" if budget.limit is None else f"of {format_usd(budget.limit)}"
    before = f"; {format_usd(budget.spent)} by all of the cage {shared['cage']}" \
        if shared is not None else \
        f"; the ledger held {format_usd(budget.spent - cost)} before" if budget.spent > cost else ""
    return report_table({"ironcage": "ironcage", **SPEND_COLUMNS, "requests": "calls"},
                        [*rows, total]) \
        + f"\nspent {format_usd(cost)}, {limit}{before}" \
        + (f"; refused by a limit: {refused}" if refused else "")


def run_wrapped(settings: Settings, given: Mapping[str, Any]) -> int:
    """Run a command with the cage around it; return its exit code, print the bill on stderr.

    Signals go to the command; before there is one, they end this process as they always do, or
    wait for it, so that it is never left alone.
    """
    import subprocess            # here only: serving does not need it
    _prepare_process()
    server, command, child, signals = ProxyServer(settings), given["wrapped"], None, []

    def pass_on(*came: int) -> None:
        signals.extend(came)
        while child is not None and signals:
            number = signals.pop()
            # A terminal sends it to both, but for what came before there was a command.
            if not came or number != signal.SIGINT or not sys.stdin.isatty():
                child.send_signal(number)

    _on_signals(pass_on, "SIGINT", "SIGTERM", "SIGHUP")
    server.start()
    try:
        child = subprocess.Popen(command, env=child_environment(server, os.environ, command[0]))
    except OSError as err:
        server.stop()
        print(f"ironcage_proxy: cannot run {command[0]}: {_reason(err)}", file=sys.stderr)
        return 127 if isinstance(err, FileNotFoundError) else 126
    server.on_failure = child.terminate
    pass_on()
    code = child.wait()
    server.stop()
    _say(bill(server), sys.stderr)
    return 1 if not _stopped(server) else code if code >= 0 else 128 - code


def model_text(router: Router, model: str) -> str:
    """Say where a model would go, at which price, and what a small request would reserve."""
    try:
        provider, name = router.routes.of_model(model)
    except UnknownProvider as err:
        return f"{model} is refused: {err.message}"
    urls = {api.url(path) for path, asked in METERED_APIS.items() if asked in MODEL_APIS
            for api in [provider.speaking(asked)] if asked in api.apis}
    price = router.prices.find(name, provider.name)
    start, end = f"{model} -> {provider.name}/{name}, ", f", at {' and '.join(sorted(urls))}"
    if price is None:
        return f"{start}no price is known, so it is refused under a budget{end}"
    shown = "input {}, output {} for a million tokens".format(*price.per_million()) \
        + (f", as {price.key} (price_as)" if price.is_stand_in else "")
    body = parse_json_object(json_bytes({
        "model": name, "messages": [{"role": "user", "content": "x" * 1000}]}))
    try:
        bound = bound_of_request(
            "messages" if provider.format == "anthropic" else "chat", body, price,
            provider=provider, measured=router.settings.bound != "bytes")
    except BadRequest:                                 # as of a model that only embeds
        return start + shown + end
    return (f"{start}{shown}{end}; 1,000 bytes with max_tokens 1000 reserve "
            f"{format_usd(bound.microdollars(1000))}")


def run_check(settings: Settings, given: Mapping[str, Any]) -> None:
    """Say what is configured and whether it can serve, without serving."""
    for what, text in _check_lines(settings, given["words"]):
        print(f"{what:9} {text}")


def _check_lines(settings: Settings, models: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the lines of `check`: (what, how it is). Raises Misconfigured.

    A proxy that serves already is left alone: its port and its ledger's lock are not taken.
    """
    is_served = _is_served(settings)
    server = ProxyServer(settings._replace(
        ledger_path=None, shared=None, port=0 if is_served else settings.port))
    server.server_close()                              # it has what it was asked for: its port
    router = server.router
    yield "address", f"{settings.host} port {settings.port} is served by a proxy now" \
        if is_served else f"{server.url} is free"
    for name, provider in router.providers.items():
        state = f"key from {provider.key_file}" if provider.key_file else \
            f"{provider.key_env} is {'set' if provider.key is not None else 'not set'}" \
            if provider.key_env else "no key needed"
        urls = " and ".join(filter(None, (provider.base_url, provider.anthropic_base_url)))
        yield "provider", f"{name}: {urls or 'built in'}, {state}"
    largest = min(settings.max_body_bytes, router.memory.common_bytes // COPIES)
    yield "prices", f"{len(router.prices.keys())} models have a price"
    yield "budget", budget_text(settings)
    yield "memory", f"{settings.max_memory_bytes >> 20} MB for bodies and answers in work; the " \
                    f"largest body is {largest >> 20} MB"
    yield "tokens", str(len(router.config.callers))
    for what, names in let_through(server):
        yield {"priced as another": "price_as"}.get(what, what), names
    if settings.alert_url is not None:
        yield "alerts", f"go to {urllib.parse.urlsplit(settings.alert_url).netloc}"
    if settings.server_url is not None:
        yield "server", f"{settings.server_url} is asked for the key and for budget"
    for name in models or router.config.aliases:
        yield "model", model_text(router, name)
    if settings.ledger_path is not None:
        yield "ledger", _ledger_state(settings.ledger_path)
    if settings.shared is not None:
        check_sessions(router.config, settings)
        total = _cage_usage(settings, 0)["total"]
        yield "shared", f"the cage {settings.cage} at {settings.shared}: {total['requests']} " \
                        f"calls, {format_usd(total['cost_microdollars'])}"


def _is_served(settings: Settings) -> bool:
    """Whether a proxy answers at the address of the settings."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)
    with contextlib.closing(http.client.HTTPConnection(
            host, settings.port, timeout=GREETING_S)) as connection, \
            contextlib.suppress(OSError, http.client.HTTPException):
        connection.request("GET", "/")
        return connection.getresponse().read(64) == b"LlmRouter OK"
    return False


def _ledger_state(path: str) -> str:
    """Say what a ledger holds, which is only read. Raises Misconfigured where it cannot be one."""
    if os.path.exists(path):
        [total] = usage_by(path, [])
        return f"{total['requests']} calls, {format_usd(total['cost_microdollars'])}"
    folder = os.path.dirname(os.path.realpath(path))
    if not os.access(folder, os.W_OK):
        raise Misconfigured(f"the ledger {path} cannot be made: {folder} is no folder that can be "
                            "written to")
    return "none yet: the first start makes it"


def _ledger_path(settings: Settings) -> str:
    if settings.ledger_path is None:
        raise Misconfigured("say which ledger to read, with --ledger FILE")
    if not os.path.exists(settings.ledger_path):
        raise Misconfigured(f"there is no ledger {settings.ledger_path}")
    return settings.ledger_path


def table(rows: Sequence[Sequence[Any]], lefts: int = 1) -> str:
    """Return rows as text in columns, the first ones to the left and the others to the right."""
    cells = [[re.sub(UNPRINTABLE, "?", str(value)) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join("  ".join(
        value.ljust(width) if number < lefts else value.rjust(width)
        for number, (value, width) in enumerate(zip(row, widths))).rstrip() for row in cells)


def shown_value(name: str, value: Any) -> str:
    """Return a field of a report as text: an amount in USD, a time in UTC; "-" where there is
    none."""
    if value is None or value == "":
        return "-"
    if name.endswith("_ms"):
        return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(value // 1000))
    return format_usd(value) if name.endswith("_microdollars") else str(value)


def report_table(columns: Mapping[str, str], rows: Iterable[Mapping]) -> str:
    """Return fields of rows as text, each in a column under its head."""
    return table([[*columns.values()],
                  *([shown_value(name, row[name]) for name in columns] for row in rows)])


# Field -> the head of its column, where what was spent, or a token, is shown.
SPEND_COLUMNS = MappingProxyType({
    "requests": "requests", "input_tokens": "input", "cached_input_tokens": "cached",
    "output_tokens": "output", "cost_microdollars": "cost"})
TOKEN_COLUMNS = MappingProxyType({
    "name": "name", "limit_microdollars": "budget", "stop_at_microdollars": "stop",
    "period": "period", "spent_microdollars": "spent", "left_microdollars": "left",
    "resets": "resets", "session_limit_microdollars": "session",
    "requests_per_minute": "a minute", "parallel_requests": "at once", "expires": "expires",
    "models": "models"})
REFUSAL_SHOWN = ("refused_ms", "token", "status", "reason", "model", "path", "message")


def csv_text(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """Return rows as CSV (RFC 4180), for spreadsheets that divide by ";" too. What one would take
    for a formula begins with a quote."""
    def cell(value: Any) -> str:
        text = re.sub(r"^(?=[=+@\t\r]|-(?!\d+$))", "'", "" if value is None else str(value))
        return '"' + text.replace('"', '""') + '"' if re.search('[",;\\r\\n]', text) else text

    return "\r\n".join([",".join(columns), *(
        ",".join(cell(row[column]) for column in columns) for row in rows)])


def _print_report(given: Mapping[str, Any], record: Any, text: str,
                  columns: Sequence[str] = (), rows: Iterable[Mapping] = ()) -> None:
    """Print what a command found: as text, as --json does, or as --csv."""
    print(json.dumps(record, indent=2) if given["json"]
          else csv_text(columns, rows) if given["csv"] else text)


def run_usage(settings: Settings, given: Mapping[str, Any]) -> None:
    """Print what was spent, by model, token and day or by what --by says; or what was refused."""
    since_s = 0 if given["since"] is None else given["since"]
    until_s = MOST_SECONDS if given["until"] is None else given["until"]
    if since_s >= until_s:
        raise Misconfigured("--until must be later than --since")
    if given["csv"] and given["json"]:
        raise Misconfigured("--csv and --json are two forms of one report; use one")
    if settings.shared is not None and (given["shared"] or not given["ledger_path"]):
        if any(given[flag] for flag in ("by", "csv", "refused", "until")):
            raise Misconfigured("of a shared budget there is no --by, --until, --csv or --refused: "
                                "ask a ledger, with --ledger and without --shared")
        report = _cage_usage(settings, since_s)
        return _print_report(given, report, overview_text(report))
    path = _ledger_path(settings)
    if given["refused"]:
        rows = ledger_rows(
            path, f"SELECT {', '.join(REFUSAL_COLUMNS)} FROM refusals WHERE refused_ms >= ? AND "
            "refused_ms < ? ORDER BY id", (since_s * 1000, until_s * 1000))
        lines = ("  ".join(shown_value(name, row[name]) for name in REFUSAL_SHOWN) for row in rows)
        text = "\n".join(re.sub(UNPRINTABLE, "?", line) for line in lines) or "nothing was refused"
        return _print_report(given, {"refused": rows}, text, REFUSAL_COLUMNS, rows)
    groups = given["by"] or (["day", "token", "model"] if given["csv"] else [])
    if not groups:
        report = usage_report(path, since_s, until_s)
        return _print_report(given, report, overview_text(report))
    rows = usage_by(path, groups, since_s, until_s)
    total = total_spend(rows)
    last = {**dict.fromkeys(groups, " "), groups[0]: "total", **total}
    columns = {**dict(zip(groups, groups)), **SPEND_COLUMNS}
    _print_report(given, {"rows": rows, "total": total}, report_table(columns, [*rows, last]),
                  [*groups, *total], rows)


def overview_text(report: Mapping[str, Any]) -> str:
    """Return what overview_of() makes, as text."""
    total = report["total"]
    return "\n".join([
        *(report_table({group: group, **SPEND_COLUMNS},
                       [*report[f"by_{group}"], {group: "total", **total}]) + "\n"
          for group in USAGE_TABLES),
        f"{total['estimated_requests']} of the costs are estimates, "
        f"{total['unsettled_requests']} calls are in flight or were cut off"])


def _cage_usage(settings: Settings, since_s: int) -> dict:
    """Return what the whole cage spent. Raises Misconfigured."""
    with _engine(settings) as engine:
        return shared_usage(engine, settings.cage, since_s)


@contextlib.contextmanager
def _engine(settings: Settings) -> Iterator[Engine]:
    """Open the engine of a shared budget, for a command. Raises Misconfigured."""
    if settings.shared is None:
        raise Misconfigured("say where the shared budget is, with --shared URL or IRONCAGE_SHARED")
    engine = Engine(settings.shared, Slot())
    try:
        with usable_engine(engine):
            yield engine
    finally:
        engine.close()


def run_cage(settings: Settings, given: Mapping[str, Any]) -> None:
    """Make a cage in the engine of --shared, or begin it anew: `cage new NAME`."""
    words: Sequence[str] = given["words"]
    action, name, *more = [*words, "", ""]
    if action != "new" or not name or any(more):
        raise Misconfigured("cage takes: new NAME")
    with checking("the cage's name:"):
        _parse_id(name)
    with _engine(settings) as engine:
        there_was = make_cage(engine, name)
    print(f"the cage {name} at {settings.shared} is new" + (
        "; what it knew is forgotten, and its proxies must be started again" if there_was else ""))


def _prices_of(settings: Settings) -> PriceBook:
    config = Config() if settings.config_path is None else load_config(
        settings.config_path, settings.environ, allow_plain_http=settings.allow_plain_http)
    return prices_under(config, load_prices(settings))


def run_audit(settings: Settings, given: Mapping[str, Any]) -> int:
    """Look at every row of a ledger, its chain and its totals; 1 where anything is not right."""
    path = _ledger_path(settings)
    audit = LedgerAudit(path, _prices_of(settings))
    verdict = audit_verdict(audit)
    lines = [fault if row is None else f"row {row['id']} "
             f"({re.sub(UNPRINTABLE, '?', str(row['request_id']))}): {fault}"
             for row, fault in audit.faults]
    lines += [f"cannot be told: {doubt}" for doubt in audit.doubts]
    lines.append(f"{audit.rows} rows, {format_usd(audit.cost_microdollars)}, {audit.estimated} of "
                 f"them estimated; {audit.fault_count} faults")
    lines += [f"  {name.replace('_', ' ') + ':':28} {value}" for name, value in verdict.items()
              if name not in ("faults", "cannot_be_told", "rows", "cost_microdollars")]
    _print_report(given, {"ledger": path, **verdict}, "\n".join(lines))
    return 1 if audit.fault_count else 0


def audit_verdict(audit: LedgerAudit) -> dict:
    """Return what can be filed of an audit."""
    state = audit.state
    return {
        "verdict": "not sound" if audit.fault_count else "sound",
        "audited_at": utc_text(time.time()),
        "rows": audit.rows, "cost_microdollars": audit.cost_microdollars,
        "estimated_rows": audit.estimated, "open_rows": audit.open,
        "folded_rows": state.get("folded", 0), "folded_until": None if state.get(
            "folded_day", -1) < 0 else utc_text((state["folded_day"] + 1) * DAY_S)[:10],
        "total_microdollars": audit.total_microdollars,
        "sealed_rows": state.get("sealed", 0), "unsealed_rows": audit.unsealed,
        "last_seal": (state.get("seal") or b"").hex(),
        "seals": "keyless: they show edits, but for those of somebody who computes all later seals "
                 "anew; keep last_seal elsewhere, and it shows these too",
        "rows_with_unknown_rates": audit.unchecked, "cannot_be_told": audit.doubts,
        "fault_count": audit.fault_count,
        "faults": [{"row": row and row["id"], "request_id": row and row["request_id"],
                    "fault": fault} for row, fault in audit.faults]}


def token_standing(caller: Caller, ledger_path: Optional[str], now_s: int) -> dict:
    """Return a token's limits and, where a ledger is given, what it spent and has left."""
    since_s, limit = period_start(caller.period, now_s), caller.budget_microdollars
    spent = None if ledger_path is None else sum(
        row["cost_microdollars"] for row in usage_by(ledger_path, ["token"], since_s)
        if row["token"] == caller.name)
    return {"name": caller.name, "limit_microdollars": limit,
            "stop_at_microdollars": caller.stop_at_microdollars, "period": caller.period,
            "spent_microdollars": spent, "left_microdollars": None if None in (limit, spent)
            else max(0, limit - spent),
            "resets": utc_text(period_end(caller.period, since_s)), **caller.terms()}


def run_tokens(settings: Settings, given: Mapping[str, Any]) -> None:
    """Show or edit the tokens of --config: `list`, `add NAME [field=value ...]`, `revoke NAME`."""
    path, (action, *words) = settings.config_path, given["words"] or ["list"]
    if path is None:
        raise Misconfigured("say which configuration holds the tokens, with --config FILE")
    if action == "list" and not words:
        ledger = None if settings.ledger_path is None else _ledger_path(settings)
        rows = [token_standing(caller, ledger, int(time.time()))
                for caller in load_config(path, {}).callers]
        return _print_report(given, {"tokens": rows}, report_table(TOKEN_COLUMNS, ({
            **row, "models": ",".join(row["models"]) or "any",
            "expires": f"{row['expires']} (over)" if row["has_expired"] else row["expires"]}
            for row in rows)))
    if action not in ("add", "revoke") or not words or (action == "revoke" and len(words) > 1):
        raise Misconfigured("tokens takes: list, add NAME [field=value ...], or revoke NAME")
    shown = shown_name(words[0])
    with _edited(path) as config:
        tokens = config.setdefault("tokens", [])
        known = [row for row in tokens if isinstance(row, dict) and row.get("name") == words[0]]
        if bool(known) is (action == "add"):
            raise Misconfigured(f"there is a token named {shown} in {path} already" if known
                                else f"there is no token named {shown} in {path}")
        if action == "revoke":
            config["tokens"] = [row for row in tokens if row not in known]
            said = f"{shown} is revoked"
        else:
            token = new_token()
            tokens.append(_token_row(words[0], token, words[1:]))
            said = f"{token}\n  is the token {shown}; it is not shown again"
    print(said)


def _token_row(name: str, token: str, words: Sequence[str]) -> dict[str, Any]:
    """Return a token's row in a configuration, of words like budget_usd=5.00. Raises
    Misconfigured."""
    row: dict[str, Any] = {"name": name, "sha256": token_sha256(token)}
    with checking(f"{shown_name(name)}:"):
        for word in words:
            field, is_pair, value = word.partition("=")
            if field in row or not is_pair:
                raise ValueError("is described by words like budget_usd=5.00, each field once; its "
                                 "name comes first, and what it authenticates with is made here")
            is_count = TOKEN_FIELDS.get(field) is _config_count
            row[field] = list(filter(None, value.split(","))) if field == "models" else \
                int(value) if is_count and re.fullmatch("[0-9]{1,7}", value) else value
        if caller_from(row).has_expired():
            raise ValueError("it would have expired already")
    return row


@contextlib.contextmanager
def _edited(path: str) -> Iterator[dict]:
    """Yield a configuration to change, and put it in place in one step: a reader sees the old file
    or the new one, and of two edits at once one is refused. Raises Misconfigured."""
    path = os.path.realpath(path)
    with contextlib.ExitStack() as undo:
        try:
            handle = os.open(path + ".new", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            undo.callback(os.unlink, path + ".new")
            with open(handle, "w", encoding="utf-8") as file:
                config = read_config(path) if os.path.exists(path) else {}
                yield config
                if os.name == "posix" and os.path.exists(path):       # a proxy must still read it
                    old = os.stat(path)
                    with contextlib.suppress(PermissionError):        # a file of somebody else
                        os.fchown(handle, old.st_uid, old.st_gid)
                    os.fchmod(handle, stat.S_IMODE(old.st_mode))
                json.dump(config, file, indent=2, default=float)      # of a Decimal: as it was read
                file.write("\n")
            os.replace(path + ".new", path)
            undo.pop_all()
        except FileExistsError:
            raise Misconfigured(f"{path}.new exists: another edit is under way, or was cut off and "
                                "left it; remove it then") from None
        except OSError as err:
            raise Misconfigured(f"{path} cannot be written: {_reason(err)}") from err


# The self-test: each guarantee tried on a real server against a fake provider, in this process.


class _FakeProvider(http.server.BaseHTTPRequestHandler):
    """Answers as the echo model does, and keeps what it was sent."""
    seen: list[tuple[str, bytes, str]] = []        # (path, body, credentials)

    def do_POST(self) -> None:
        """Keep the request, and answer it in its path's dialect."""
        body = self.rfile.read(int(self.headers["content-length"]))
        key = f"{self.headers['authorization']} {self.headers['x-api-key']}"
        self.seen.append((self.path, body, key))
        api, fields = METERED_APIS[self.path], json.loads(body)
        answer = echo_whole(api, echo(api, fields, answer_id="1", created_at=0))
        data = json_bytes({**answer, "model": fields["model"]})
        self.wfile.write(format_head("HTTP/1.1 200 OK", [
            ("content-type", "application/json"), ("content-length", str(len(data))),
            ("connection", "close")]) + data)


class _Laboratory:
    """A proxy in front of the fake provider, with canary keys, and all that it ever answered."""
    KEYS = ("sk-canary-openai-0123456789", "sk-ant-canary-0123456789")
    # 20 tokens in at $0.15 a million and 10 out at $0.60 a million are 9 microdollars.
    PRICES = """{"gpt-4o-mini": {"input_cost_per_token": 1.5e-7, "output_cost_per_token": 6e-7,
                                 "max_input_tokens": 128000, "max_output_tokens": 16384},
                 "claude-haiku-4-5": {"input_cost_per_token": 1e-6, "output_cost_per_token": 5e-6,
                                      "max_input_tokens": 200000, "max_output_tokens": 64000}}"""
    CHAT = MappingProxyType({"model": "gpt-4o-mini", "max_tokens": 10,
                             "messages": [{"role": "user", "content": " hi" * 20}]})

    def __init__(self, folder: str) -> None:
        self.seen = _FakeProvider.seen = []
        self.folder, self.answered = folder, b""
        self.fake = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _FakeProvider)
        threading.Thread(target=self.fake.serve_forever, args=(STOP_POLL_S,), daemon=True).start()
        url = f"http://127.0.0.1:{self.fake.server_address[1]}"
        prices = os.path.join(folder, "prices.json")
        with open(prices, "w", encoding="utf-8") as file:
            file.write(self.PRICES)
        self.server = ProxyServer(settings_from(
            ["--port", "0", "--budget", "0.001", "--pricing", prices, "--openai-base-url", url,
             "--anthropic-base-url", url, "--wait", "0"],
            {"OPENAI_API_KEY": self.KEYS[0], "ANTHROPIC_API_KEY": self.KEYS[1]}))
        self.server.start()

    def call(self, path: str = "/v1/chat/completions", token: Optional[str] = None,
             strict: bool = False, **fields: Any) -> tuple[int, Mapping[str, str], bytes]:
        """Send one POST, a chat with other fields; return (status, headers, body)."""
        with contextlib.closing(http.client.HTTPConnection(
                "127.0.0.1", self.server.port, timeout=10)) as connection:
            connection.request("POST", path, json.dumps({**self.CHAT, **fields}), {
                "authorization": f"Bearer {token or self.server.settings.token}",
                "content-type": "application/json", "x-ironcage-strict": str(int(strict))})
            answer = connection.getresponse()
            body = answer.read()
        self.answered += str(answer.headers).encode() + body
        return answer.status, {k.lower(): v for k, v in answer.headers.items()}, body

    def close(self) -> None:
        self.server.stop()
        self.fake.shutdown()
        self.fake.server_close()


def _keeps_keys(lab: _Laboratory) -> bool:
    lab.call("/v1/messages", model="claude-haiku-4-5")
    lab.call()
    sent = {("messages" in path, key) for path, _, key in lab.seen}
    return sent == {(False, f"Bearer {lab.KEYS[0]} None"), (True, f"None {lab.KEYS[1]}")} \
        and not any(key.encode() in lab.answered for key in lab.KEYS)


def _is_never_over(lab: _Laboratory) -> bool:
    threads = [threading.Thread(target=lambda: [lab.call() for _ in range(15)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    budget = lab.server.router.controller.budget()
    return budget.spent == 9 * len(lab.seen) <= budget.limit and budget.reserved == 0 \
        and lab.call(max_tokens=20_000)[0] == 402


def _is_never_under_counted(lab: _Laboratory) -> bool:
    path = os.path.join(lab.folder, "cage.db")
    ledger = SqliteLedger(path)
    ledger.intent({**_NO_ROW, "request_id": "r", "admitted_s": 1, "token": "t", "stream": 0,
                   "provider": "p", "model": "m", "api": "chat", "bound_microdollars": 77})
    ledger.close()                                     # as after a crash: it was never settled
    with contextlib.closing(SqliteLedger(path)) as again:
        return (again.recovered, again.spent(None, 0)) == (1, 77)


SELF_TESTS: Sequence[tuple[str, str, Callable[[_Laboratory], bool]]] = (
    ("exact", "a call costs its price to the microdollar",
     lambda lab: lab.call()[1]["x-ironcage-cost-microdollars"] == "9"),
    ("transparent", "bytes travel unchanged between clients and providers of one format",
     lambda lab: json.loads(lab.call(user="\u00fc  x")[2])["id"] == "chatcmpl-1"
     and lab.seen[-1][1] == json.dumps({**lab.CHAT, "user": "\u00fc  x"}).encode()),
    ("lossless or loud", "what a translation loses is named, or refused",
     lambda lab: lab.call(model="claude-haiku-4-5", seed=7)[1]["x-ironcage-dropped-params"]
     == "seed" and lab.call(model="claude-haiku-4-5", seed=7, strict=True)[0] == 400),
    ("fail closed", "what cannot be priced, metered or vouched for is refused",
     lambda lab: [lab.call(model="gpt-mystery")[0], lab.call("/v1/images/generations")[0],
                  lab.call("/v1/responses", input="x", background=True)[0],
                  lab.call(token="wrong")[0]] == [400, 400, 400, 401]),
    ("keys stay", "keys go to their provider and appear in no answer", _keeps_keys),
    ("never over", "many threads spend no more than the limit", _is_never_over),
    ("never under-counted", "an unsettled call is charged on the next start",
     _is_never_under_counted),
    ("quiet", "only this machine is listened to",
     lambda lab: LOOPBACK_HOST.fullmatch(str(lab.server.server_address[0])) is not None),
)


def run_selftest(settings: Settings, given: Mapping[str, Any]) -> int:
    """Try every guarantee against a fake provider inside the process; 1 where any is broken."""
    import tempfile              # here only: serving does not need it
    log.setLevel(logging.CRITICAL)
    broken = 0
    for name, meaning, holds in SELF_TESTS:
        is_held = False
        with tempfile.TemporaryDirectory() as folder, \
                contextlib.closing(_Laboratory(folder)) as lab, \
                contextlib.suppress(OSError, ValueError, LookupError, http.client.HTTPException):
            is_held = holds(lab)
        broken += not is_held
        print(f"{'held  ' if is_held else 'BROKEN'}  {name}: {meaning}")
    return 1 if broken else 0


def price_changes(old: PriceBook, new: PriceBook) -> Iterator[str]:
    """Yield a line for each difference that a newer price table would make: "+" a model that it
    adds, "-" one that it lacks, "~" a cell that differs."""
    for key in sorted({*old.keys(), *new.keys()}):
        was, becomes = old.cells(key), new.cells(key)
        if not was or not becomes:
            rates = "input {}, output {}".format(*(old if was else new).price(key).per_million())
            yield f"{'-' if was else '+'} {key}: {rates}"
            continue
        for cell in sorted({*was, *becomes}):
            if was.get(cell) != becomes.get(cell):
                yield f"~ {key}: {cell} {was.get(cell, 'absent')} -> {becomes.get(cell, 'absent')}"


def run_models(settings: Settings, given: Mapping[str, Any]) -> None:
    """List what is priced, in USD for a million tokens; or what another table would change."""
    prices = _prices_of(settings)
    if given["compare"] is not None:
        lines = [*price_changes(prices, read_prices(given["compare"]))]
        kinds = Counter(line[0] for line in lines)
        print(*(re.sub(UNPRINTABLE, "?", line) for line in lines), f"{kinds['+']} models added, "
              f"{kinds['-']} removed, {kinds['~']} cells changed", sep="\n")
        return
    priced = ((key, prices.price(key)) for key in prices.keys())
    print(table([("model", "provider", "input", "output"), *(
        (key, price.provider, *price.per_million()[:2]) for key, price in priced)], lefts=2)
        + "\nin USD for a million tokens")


class Command(NamedTuple):
    """What a word of the command line does."""
    run: Callable[[Settings, Mapping[str, Any]], Optional[int]]     # the exit code; None is 0
    about: str
    words: str = ""                           # what may follow it
    example: str = ""


SERVERS = ("serve", "check")                  # they use the settings of a server, and keys
COMMANDS: Mapping[str, Command] = MappingProxyType({
    "serve": Command(run_serve, "serve (the default); with -- CMD run one command in the cage",
                     "[-- CMD ...]", "--budget 2 -- claude -p \"fix the failing test\""),
    "check": Command(run_check, "what is configured, and what would happen to a model",
                     "[MODEL ...]", "check --config cage.json gpt-4o-mini"),
    "usage": Command(run_usage, "what was spent, or refused, from --ledger or --shared", "",
                     "usage --ledger cage.db --since 7d --by token,day"),
    "cage": Command(run_cage, "make a budget in the engine of --shared, or begin it anew",
                    "new NAME", "cage new team --shared redis://10.0.0.5"),
    "audit": Command(run_audit, "look at every row of --ledger, its chain and its totals", "",
                     "audit --ledger cage.db"),
    "tokens": Command(run_tokens, "the tokens of --config\n\nFIELD is one of "
                      + ", ".join(field for field in TOKEN_FIELDS if field not in GIVEN_FIELDS),
                      "list | add NAME [FIELD=VALUE ...] | revoke NAME",
                      "tokens add alice budget_usd=5 period=day --config cage.json"),
    "selftest": Command(run_selftest, "try every guarantee against a fake provider in the process",
                        "", "selftest"),
    "models": Command(run_models, "what is priced, and how", "",
                      "models --compare newer_prices.json"),
    "version": Command(lambda settings, given: print(f"ironcage_proxy {__version__}"),
                       "print the version", "", "version"),
})


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command line. Returns the exit code: 0 fine, 1 runtime failure, 2 usage."""
    try:
        given = parse_arguments(sys.argv[1:] if argv is None else argv)
        if given["help"]:
            print(help_text(given["command"]), end="")
            return 0
        settings = settings_on_line(given, os.environ)
        log.handlers[:], log.propagate = [logging.StreamHandler()], False
        log.handlers[0].setFormatter(LogFormatter(settings.log_format))
        log.setLevel(logging.WARNING if settings.quiet else logging.INFO)
        run = COMMANDS[given["command"]].run
        return (run if given["wrapped"] is None else run_wrapped)(settings, given) or 0
    except Misconfigured as err:
        line = "".join(char if char.isprintable() else "?" for char in str(err))
        print(f"ironcage_proxy: {line}", file=sys.stderr)
        return 1 if isinstance(err, CannotListen) else 2
    except BrokenPipeError:                    # `models | head`
        return 0
    except OSError as err:                     # as of a full disk behind our output
        print(f"ironcage_proxy: {_reason(err)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:                  # before it served, as while it waits for a ledger
        return 1
    except Exception:
        log.exception("ironcage_proxy failed")
        return 1


# ==== 29. Embedding =============================================================================
#
# The original's Python class, over a server of ours. It shows amounts in USD as float, as that one
# did; inside they are microdollars.

_amount_of = value_like(lambda value: type(value) is int and 0 <= value <= 10 ** 18,
                        "an integer from 0 up")
_seconds_of = value_like(lambda value: type(value) in (int, float) and 0 <= value <= 10 ** 9,
                         "a number from 0 up")
_text_of_argument = value_like(
    lambda value: isinstance(value, (str, int, float, Decimal, os.PathLike))
    and not isinstance(value, bool), "text", str)
# How the arguments are read that are not text as a flag takes it, but values of their fields.
VALUE_ARGUMENTS: Mapping[str, Callable] = MappingProxyType({
    **{row.field: _config_flag for row in SETTINGS if not row.metavar},
    **dict.fromkeys(("budget_microdollars", "stop_at_microdollars", "max_body_bytes",
                     "max_memory_bytes"), _amount_of),
    "wait_s": _seconds_of, "cache_ttl_s": _seconds_of,
    "port": lambda value: value if type(value) is int else _text_of_argument(value),
    "on_event": value_like(callable, "a function"),
    "environ": value_like(lambda value: isinstance(value, Mapping), "a mapping of variables"),
    "listener": value_like(lambda value: isinstance(value, socket.socket), "a socket that listens"),
    "timeouts": value_like(lambda value: isinstance(value, Timeouts) and all(
        type(part) in (int, float) and 0 <= part <= 10 ** 9 for part in value),
        "Timeouts of seconds"),
    "providers": value_like(lambda value: isinstance(value, (list, tuple)) and all(
        isinstance(part, Provider) for part in value), "a tuple of Provider", tuple),
})
ARGUMENT_NAMES = MappingProxyType({              # where that is not the field's
    "token": "api_key", "ledger_path": "ledger", "cache_ttl_s": "cache_ttl_seconds"})


def argument_of(field: str, value: Any) -> Any:
    """Return an argument of LlmRouter as Setting.read() takes it. Raises Misconfigured for one that
    there is not, or that is of another type."""
    row = next((row for row in SETTINGS if row.field == field), None)
    if row is None and field not in VALUE_ARGUMENTS:
        known = [*(row.field for row in SETTINGS), *VALUE_ARGUMENTS]
        raise Misconfigured(f"LlmRouter has no {shown_name(field)}{did_you_mean(field, known)}")
    shown = ARGUMENT_NAMES.get(field, field)
    with checking(f"wrong {shown}: {shown}"):
        if row is not None and row.repeats and isinstance(value, (list, tuple, set, frozenset)):
            return [*map(_text_of_argument, value)]
        return VALUE_ARGUMENTS.get(field, _text_of_argument)(value)


class LlmRouter:
    """A proxy inside this process, ready when the constructor returns.

    `api_key` is what clients authenticate with (made where absent); `provider_key` goes to
    Anthropic if it starts with "sk-ant-", else to OpenAI; without one, keys come from the Iron
    Cage server at `server_url`, where `api_key` (or `server_token`) is the credential, or else
    from the environment. `budget` and `stop_at` are in USD (str, Decimal, int, or float by its
    repr); `ledger` is a path; `shared` and `cage` are as --shared and --cage;
    `on_event` gets each event; `more` are fields of Settings, in their units, of which `providers`
    go before those of the same name that are set otherwise. Raises Misconfigured.
    """

    def __init__(self, api_key: Optional[str] = None, server_url: Optional[str] = None,
                 cache_ttl_seconds: int = 300, budget: Any = None,
                 provider_key: Optional[str] = None, *, stop_at: Any = None,
                 shared: Optional[str] = None, cage: str = "default",
                 ledger: Optional[str] = None,
                 on_event: Optional[Callable[[Event], None]] = None,
                 environ: Optional[Mapping[str, str]] = None, **more: Any) -> None:
        for field, text in (("api_key", api_key), ("provider_key", provider_key)):
            if not isinstance(text, (str, type(None))):
                raise Misconfigured(f"{field} must be text")
        for name, value, field in (
                ("api_key", api_key or None, "token"), ("ledger", ledger, "ledger_path"),
                ("budget", budget, "budget_microdollars"),
                ("stop_at", stop_at, "stop_at_microdollars")):
            if value is not None and more.pop(field, None) is not None:
                raise Misconfigured(f"{name} and {field} are two names of one argument; use one")
        name = "anthropic" if (provider_key or "").startswith("sk-ant-") else "openai"
        hidden = {"IRONCAGE_TOKEN", *(known.key_env for known in KNOWN_PROVIDERS.values()
                                      if provider_key is not None)}
        given = os.environ if environ is None else argument_of("environ", environ)
        environ = {variable: value for variable, value in given.items()
                   if re.sub("_FILE$", "", variable) not in hidden}
        arguments = {"port": 0, "quiet": True, "token": api_key or None, "cage": cage,
                     "shared": shared, "ledger_path": ledger, "on_event": on_event, **more}
        if provider_key is not None:
            environ[KNOWN_PROVIDERS[name].key_env] = provider_key
        elif server_url is not None:
            if api_key is None and more.get("server_token") is None:
                raise Misconfigured("server_url needs an api_key: the token of that server")
            arguments = {"server_url": server_url, "cache_ttl_s": cache_ttl_seconds, **arguments}
        in_usd = {"budget_microdollars": budget, "stop_at_microdollars": stop_at}
        values: dict[str, Any] = {field: str(usd) for field, usd in in_usd.items()
                                  if usd is not None}
        values.update({field: argument_of(field, value) for field, value in arguments.items()
                       if value is not None})
        settings = settings_of(values, environ, named="{0.field}, as {0.flag}")
        self._server = ProxyServer(settings._replace(**{
            **{field: value for field, value in values.items()
               if field not in {row.field for row in SETTINGS}},
            "providers": (*settings.providers, *values.get("providers", ()))}))
        self._provider = name
        self._is_running = True
        self._server.start()

    @property
    def base_url(self) -> str:
        """Where an OpenAI client calls; an Anthropic one takes it without its /v1."""
        return f"{self._server.url}/v1"

    @property
    def api_key(self) -> str:
        return self._server.settings.token

    @property
    def port(self) -> int:
        return self._server.port

    @property
    def provider(self) -> str:
        """"openai" or "anthropic"; in server mode asked for there. Raises CageServerFailed."""
        server = self._server.router.server
        return self._provider if server is None else server.provider().name

    @property
    def is_running(self) -> bool:
        """Whether it serves: not after stop(), nor after a fault, which is logged."""
        return self._is_running and self._server.failure is None

    @property
    def budget(self) -> Optional[float]:
        """The limit in USD, or None."""
        status = self.budget_status
        return status and status[1]

    @property
    def budget_status(self) -> Optional[tuple[float, float]]:
        """What is spent and the limit, in USD; None without a limit."""
        spent, limit = self._server.router.controller.get_status()
        return None if limit is None else (spent / MICRODOLLARS_PER_USD,
                                           limit / MICRODOLLARS_PER_USD)

    def total_spent(self) -> float:
        """Return what is spent, in USD."""
        return self._server.router.controller.total_spent() / MICRODOLLARS_PER_USD

    def set_budget(self, usd: Any) -> None:
        """Set the limit in USD; it can block and unblock. Raises ValueError."""
        if self._server.router.server is not None:
            raise ValueError("the budget is leased from the Iron Cage server, and changed there")
        self._server.router.controller.set_budget(parse_usd(usd))

    def usage(self) -> dict:
        """Return amounts in microdollars, and counts since the start by model, provider, token."""
        return {**self._server.router.controller.budget().as_json(),
                **self._server.router.totals.snapshot()}

    def stop(self) -> None:
        """Let requests in flight finish, settle everything, free the port. Again: nothing. Within
        `on_event` it only begins that, since the event's own call is in flight."""
        self._is_running = False
        self._server.stop()

    def __enter__(self) -> LlmRouter:
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()


if __name__ == "__main__":
    sys.exit(main())
