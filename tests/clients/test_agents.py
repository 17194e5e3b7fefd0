"""Agents as people run them, `ironcage_proxy.py --budget 1 -- CMD`: client by model by scenario.

Each is run on its default model and on the newest of every family of models that it offers and
that pricing.json has; the bill that the wrapper prints must be what the mock provider billed. The
programs are looked for in IRONCAGE_CLAUDE_CODE, IRONCAGE_CODEX, IRONCAGE_OPENCODE and in the folder
IRONCAGE_NODE_MODULES, the Python SDKs in this interpreter. All of it runs only where
IRONCAGE_MATRIX names the file that gets the table.
"""
from __future__ import annotations

import functools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from importlib import metadata, util
from pathlib import Path
from typing import Callable, NamedTuple, Optional

import pytest
from agents import DONE, SCENARIOS, SUBTASK, SUMMARY, TASK, Model
from support import ANTHROPIC_KEY, OPENAI_KEY, ROOT, kill_programs_of, proxy_environment, rates

HERE = Path(__file__).resolve().parent
PATIENCE_S = 120                        # for a client on a busy machine
NOBODY = "http://127.0.0.1:9"           # what a client finds that tries to reach another host
PRICES = json.loads((ROOT / "pricing.json").read_text(encoding="utf-8"))
MATRIX = os.environ.get("IRONCAGE_MATRIX")
NODE_MODULES = os.environ.get("IRONCAGE_NODE_MODULES", "")
pytestmark = pytest.mark.skipif(not MATRIX, reason="IRONCAGE_MATRIX names no file for the table")


class Client(NamedTuple):
    """An agent program, or a script on an SDK."""
    name: str
    command: str                        # what the cage runs: claude, codex …
    version: str
    offered: tuple[str, ...]            # models that it names
    line: Callable[[str, str], str]     # (model, scenario) -> a line of sh
    default: bool = True                # whether it has a model of its own choice
    aliases: tuple[str, ...] = ()       # names that it gives to its newest models
    lacks: tuple[str, ...] = ()         # scenarios for which it has nothing
    refused: tuple[str, ...] = ()       # scenarios that a budget refuses, rightly
    widely: tuple[str, ...] = tuple(SCENARIOS)      # scenarios that are run on every family

    def models(self) -> list[str]:
        """The default, as "", and the newest of each family with a price."""
        return [""] * self.default + [*self.aliases, *newest_of_each_family(self.offered)]

    def cells(self) -> list[tuple[str, str]]:
        """What a client cannot do, and what a budget refuses, is the same on every model."""
        once = {*self.lacks, *self.refused, *(set(SCENARIOS) - set(self.widely))}
        return [(model, scenario) for place, model in enumerate(self.models())
                for scenario in SCENARIOS if place == 0 or scenario not in once]


# Which models.

NOT_FOR_AGENTS = re.compile(
    r"gpt-[34]|-\d{8}$|-\d{4}-\d\d-\d\d$|latest|preview|audio|search|image|realtime|/")


def newest_of_each_family(names: tuple[str, ...]) -> list[str]:
    """A family is a name without its numbers: claude-opus, gpt-mini, gpt-sol."""
    families: dict[str, tuple] = {}
    for name in names:
        if (PRICES.get(name) or {}).get("mode") in ("chat", "responses") \
                and not NOT_FOR_AGENTS.search(name):
            family = re.sub(r"-?[\d.]+", "", name)
            number = [*map(int, re.findall(r"\d+", name))]
            families[family] = max(families.get(family, ([], "")), (number, name))
    return [name for _, name in families.values()]


# Which clients. Each function returns the client, or the reason why it is not here.

def first_line(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S,
                          stdin=subprocess.DEVNULL, env=outside())
    return done.stdout


def outside() -> dict[str, str]:
    """An environment in which a client finds no home of anybody's, and no other host."""
    return {"PATH": os.environ["PATH"], "HOME": tempfile.gettempdir(), "HTTPS_PROXY": NOBODY,
            "HTTP_PROXY": NOBODY, "NO_PROXY": "127.0.0.1,localhost",
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1", "OPENCODE_DISABLE_AUTOUPDATE": "1",
            "OPENCODE_DISABLE_MODELS_FETCH": "1", "OPENCODE_DISABLE_LSP_DOWNLOAD": "1",
            "IRONCAGE_NODE_MODULES": NODE_MODULES,
            "OPENAI_API_KEY": "none", "ANTHROPIC_API_KEY": "none"}


def claude_code() -> Optional[Client]:
    program = os.environ.get("IRONCAGE_CLAUDE_CODE")
    if not program:
        return None

    def line(model: str, scenario: str) -> str:
        return shlex.join([program, "-p", f"{TASK}: {scenario}", *(["--model", model] * bool(model)),
                           "--allowedTools", "Bash WebSearch Agent ToolSearch"])

    return Client("Claude Code", "claude", first_line(program, "--version").split()[0], (), line,
                  aliases=("fable", "opus", "sonnet", "haiku"))


def codex() -> Optional[Client]:
    program = os.environ.get("IRONCAGE_CODEX")
    if not program:
        return None
    catalog = json.loads(first_line(program, "debug", "models"))["models"]

    def line(model: str, scenario: str) -> str:
        compacts = ["-c", "model_auto_compact_token_limit=8000"] * (scenario == "compaction")
        provider = 'model_providers.cage={name="cage",base_url="%s",env_key="OPENAI_API_KEY"}'
        return (shlex.join([program, "exec", "--skip-git-repo-check", "-c", "model_provider=cage",
                            *(["-m", model] * bool(model)), *compacts])
                + f' -c "$(printf {shlex.quote(provider)} "$OPENAI_BASE_URL")" '
                + shlex.quote(f"{TASK}: {scenario}"))

    return Client("Codex", "codex", first_line(program, "--version").split()[-1],
                  tuple(row["slug"] for row in catalog if row["visibility"] == "list"), line)


def opencode() -> Optional[Client]:
    program = os.environ.get("IRONCAGE_OPENCODE")
    if not program:
        return None
    names = re.findall(r"^(anthropic|openai)/(\S+)$", first_line(program, "models"), re.MULTILINE)
    provider_of = {name: provider for provider, name in names}

    def line(model: str, scenario: str) -> str:
        """A small context makes it compact."""
        limits = {provider: {"models": {name: {"limit": {"context": 12_000, "output": 1_000}}
                                        for name, owner in provider_of.items()
                                        if owner == provider}}
                  for provider in set(provider_of.values())} if scenario == "compaction" else {}
        named = ["-m", f"{provider_of[model]}/{model}"] if model else []
        return f"echo {shlex.quote(json.dumps({'provider': limits}))} > opencode.json\n" \
            + shlex.join([program, "run", "--auto", *named, f"{TASK}: {scenario}"])

    return Client("opencode", "opencode", first_line(program, "--version").strip(),
                  tuple(provider_of), line, widely=("two tools",))


def python_sdk(package: str) -> Optional[Client]:
    if util.find_spec(package) is None:
        return None
    types = {"openai": "types/shared/chat_model.py", "anthropic": "types/model.py"}[package]
    text = (Path(util.find_spec(package).origin).parent / types).read_text(encoding="utf-8")

    def line(model: str, scenario: str) -> str:
        return shlex.join([sys.executable, str(HERE / "sdk_agent.py"), package, model, scenario])

    return Client(f"{package} (Python)", "python-agent", metadata.version(package),
                  tuple(re.findall(r'"([^"\s]+)"', text)), line, default=False,
                  lacks=("subagent",), refused=("compaction",))


def node_sdk(package: str, types: str, lacks: tuple = (), refused: tuple = (),
             aliases: tuple = ()) -> Optional[Client]:
    folder = Path(NODE_MODULES) / package
    node = shutil.which("node")
    if not NODE_MODULES or node is None or not (folder / "package.json").is_file():
        return None
    text = (folder / types).read_text(encoding="utf-8")

    def line(model: str, scenario: str) -> str:
        return shlex.join([node, str(HERE / "sdk_agent.mjs"), package, model, scenario])

    version = json.loads((folder / "package.json").read_text(encoding="utf-8"))["version"]
    return Client(f"{package} (Node)", "node-agent", version,
                  tuple(re.findall(r"""['"]([^'"\s]+)['"]""", text)), line, default=False,
                  aliases=aliases, lacks=("subagent", *lacks), refused=refused)


CLIENTS: dict[str, Callable[[], Optional[Client]]] = {
    "Claude Code": claude_code, "Codex": codex, "opencode": opencode,
    "openai (Python)": lambda: python_sdk("openai"),
    "anthropic (Python)": lambda: python_sdk("anthropic"),
    "openai (Node)": lambda: node_sdk("openai", "resources/shared.d.ts", refused=("compaction",)),
    "@anthropic-ai/sdk (Node)": lambda: node_sdk(
        "@anthropic-ai/sdk", "resources/messages/messages.d.ts", refused=("compaction",)),
    "@ai-sdk/openai (Node)": lambda: node_sdk("@ai-sdk/openai", "dist/index.d.ts", ("compaction",)),
    "@ai-sdk/anthropic (Node)": lambda: node_sdk(
        "@ai-sdk/anthropic", "dist/index.d.ts", refused=("compaction",)),
    "@ai-sdk/openai-compatible (Node)": lambda: node_sdk(
        "@ai-sdk/openai-compatible", "dist/index.d.ts",
        ("compaction", "web search"), aliases=("gpt-4o-mini",)),
}


@functools.lru_cache(maxsize=None)
def client(name: str) -> Optional[Client]:
    return CLIENTS[name]() if MATRIX else None


def pytest_generate_tests(metafunc):
    if "cell" in metafunc.fixturenames:
        cells = [(name, model, scenario) for name in CLIENTS if client(name)
                 for model, scenario in client(name).cells()]
        metafunc.parametrize("cell", cells, ids=[
            f"{name}, {model or 'default'}, {scenario}" for name, model, scenario in cells])


# A run.

class Ran(NamedTuple):
    """What a client left behind."""
    code: int
    out: str
    err: str
    environment: str                    # of the client
    status: dict                        # of the cage, once the client had ended

    @property
    def printed_microdollars(self) -> int:
        [spent] = re.findall(r"^spent \$([\d.]+), of \$\d\.00", self.err, re.MULTILINE)
        dollars, _, rest = spent.partition(".")
        return int(dollars) * 1_000_000 + int(rest.ljust(6, "0"))


SCRIPT = """#!/bin/sh
env > ../environment
{line}
code=$?
{python} - > ../status <<'END'
import json, os, time, urllib.request
url = os.environ["OPENAI_BASE_URL"][:-len("/v1")] + "/ironcage/status"
token = os.environ.get("ANTHROPIC_AUTH_TOKEN") or os.environ["OPENAI_API_KEY"]
ask = urllib.request.Request(url, headers={{"Authorization": "Bearer " + token}})
until, status = time.monotonic() + 10, {{"reserved_microdollars": None}}
while status["reserved_microdollars"] != 0 and time.monotonic() < until:
    status = json.load(urllib.request.urlopen(ask))
print(json.dumps(status))
END
exit $code
"""


def run(command: list, environ: dict, cwd: Path) -> tuple[int, str, str]:
    """Run it in a process group of its own, of which nothing is left."""
    process = subprocess.Popen(command, env=environ, cwd=cwd, text=True, start_new_session=True,
                               stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    try:
        out, err = process.communicate(timeout=PATIENCE_S)
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        kill_programs_of(Path(environ["HOME"]))
        process.wait()
    return process.returncode, out, err


def budget_for(model: str) -> str:
    """A dollar; the -pro models, at up to $30 and $180 a million, spend that on one turn."""
    return "5" if model.endswith("-pro") else "1"


def run_caged(agent: Client, model: str, scenario: str, mock: Model, folder: Path) -> Ran:
    (folder / "work").mkdir()
    (folder / "home").mkdir()
    script = folder / agent.command
    script.write_text(SCRIPT.format(line=agent.line(model, scenario),
                                    python=shlex.quote(sys.executable)))
    script.chmod(0o755)
    code, out, err = run(
        [sys.executable, str(ROOT / "ironcage_proxy.py"), "--budget", budget_for(model), "--",
         str(script)],
        {**outside(), "HOME": str(folder / "home"), **proxy_environment(mock)}, folder / "work")
    status = (folder / "status").read_text()
    return Ran(code, out, err, (folder / "environment").read_text(), json.loads(status or "{}"))


def lacks_it_outside_the_cage_too(agent: Client, model: str, scenario: str, folder: Path) -> bool:
    """Whether the client itself does not offer what the scenario needs."""
    (folder / "outside").mkdir()
    with Model(scenario) as mock:
        run(["sh", "-c", agent.line(model, scenario)], {
            **outside(), "HOME": str(folder / "outside"), "OPENAI_API_KEY": OPENAI_KEY,
            "ANTHROPIC_API_KEY": ANTHROPIC_KEY, "OPENAI_BASE_URL": mock.url + "/v1",
            "ANTHROPIC_BASE_URL": mock.url + "/v1" * (agent.name == "opencode")},
            folder / "outside")
        return mock.lacks_what_it_needs


# What shows that a scenario took place.

def two_results_came_back(mock: Model) -> bool:
    """In the order in which the tools came to an end."""
    return any(len(asked.results) == 2 and all(
        any(word in result for result in asked.results)
        for word in ("first of two", "second of two")) for asked in mock.asked)


def it_searched(mock: Model) -> bool:
    return any(asked.hosts_search for asked in mock.asked) and sum(
        usage.get("web_searches") or (usage.get("server_tool_use") or {}).get(
            "web_search_requests", 0) for _, usage, _ in mock.bills) == 1


def it_went_on_from_a_summary(mock: Model) -> bool:
    return any(SUMMARY in asked.words and "a long story" not in asked.words
               for asked in mock.asked)


def a_subagent_answered(mock: Model) -> bool:
    return any(SUBTASK in asked.words and TASK not in asked.words for asked in mock.asked) \
        and any("errand is run" in asked.words and TASK in asked.words for asked in mock.asked)


TOOK_PLACE = {"two tools": two_results_came_back, "web search": it_searched,
              "compaction": it_went_on_from_a_summary, "subagent": a_subagent_answered}


# The matrix.

def test_the_bill_of_an_agent_is_what_the_provider_billed(cell, tmp_path, record_property):
    name, model, scenario = cell
    agent = client(name)
    record_property("row", (f"{name} {agent.version}", model or "its default"))
    record_property("column", scenario)
    if scenario in agent.lacks:
        return record_property("cell", "not offered")
    with Model(scenario) as mock:
        ran = run_caged(agent, model, scenario, mock, tmp_path)
        told = f"{ran.out}\n{ran.err}"
        if model != mock.main_model and model in ("", *agent.aliases):
            record_property("row", (f"{name} {agent.version}", f"{mock.main_model or '?'} "
                                    f"({model or 'default'})"))

        assert not [key for key in (OPENAI_KEY, ANTHROPIC_KEY)
                    if key in told + ran.environment], "a provider's key came out"
        assert 0 == ran.status["reserved_microdollars"], told
        if scenario in agent.refused:
            assert "budget" in told and "400" in told and mock.seen == [], told
            assert (0, 0) == (mock.billed_microdollars, ran.printed_microdollars)
            return record_property("cell", "refused")
        assert 0 == ran.code, told
        if mock.lacks_what_it_needs:
            assert lacks_it_outside_the_cage_too(agent, model, scenario, tmp_path)
            record_property("cell", "not offered")
        else:
            assert TOOK_PLACE[scenario](mock), f"{told}\n{[a.results for a in mock.asked]}"
            assert DONE in ran.out, told
        assert [] == [name for name, _, _ in mock.bills if not any(rates(name))], "rates unknown"
        assert mock.billed_microdollars == ran.printed_microdollars > 0, told


@pytest.mark.parametrize("name", CLIENTS)
def test_every_client_is_in_the_table(name, record_property):
    """One that is not installed has a row that says so."""
    if client(name) is None:
        record_property("row", (name, "not installed"))
    else:
        assert client(name).models(), "no model of it has a price"


@pytest.mark.skipif(not os.environ.get("IRONCAGE_CLAUDE_CODE"), reason="it is not installed")
def test_claude_code_offers_the_families_that_are_run(tmp_path):
    agent = client("Claude Code")
    with Model("two tools") as mock:
        run_caged(agent, "", "two tools", mock, tmp_path)
        properties = mock.asked[0].tools["Agent"]["input_schema"]["properties"]

    assert set(agent.aliases) == set(properties["model"]["enum"])
