"""Agents and frameworks as they are, on models of each API: the same small drill, with two calls of
a tool, on Claude, on a server that has chat completions alone, and on OpenAI's Responses. Each is
skipped where it is not installed; the programs are found as in test_agents.py."""
from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from agents import DONE, TASK, THOUGHT, Model
from dialects import MODELS, PATHS, configured
from support import TOKEN, kill_programs_of, settled_status
from vendor_answers import claude_seal, openai_seal

HERE = Path(__file__).resolve().parent
PATIENCE_S = 120
NOBODY = "http://127.0.0.1:9"           # what a client finds that tries to reach another host
NODE_MODULES = os.environ.get("IRONCAGE_NODE_MODULES", "")
CLAUDE_CODE = os.environ.get("IRONCAGE_CLAUDE_CODE") or shutil.which("claude")
CODEX = os.environ.get("IRONCAGE_CODEX") or shutil.which("codex")
PROMPT = f"{TASK}: two tools"


def python(package):
    """A script on a package of this interpreter."""
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
    if package in ("openai", "anthropic"):
        return lambda model: [sys.executable, str(HERE / "sdk_agent.py"), package, model,
                              "two tools"]
    return lambda model: [sys.executable, "-I", str(HERE / "framework_agent.py"),
                          package.replace("-slim", ""), model, "two tools"]


def node(package):
    if not NODE_MODULES or shutil.which("node") is None \
            or not (Path(NODE_MODULES) / package / "package.json").is_file():
        return None
    return lambda model: ["node", str(HERE / "sdk_agent.mjs"), package, model, "two tools"]


def codex(model):
    """Without a model it uses its default, that the configuration gives to another model."""
    line = ('exec "$0" exec --skip-git-repo-check -c model_provider=cage '
            '-c "model_providers.cage={name=\\"cage\\",base_url=\\"$OPENAI_BASE_URL\\",'
            'env_key=\\"OPENAI_API_KEY\\"}" "$@"')
    return ["sh", "-c", line, CODEX, *(["-m", model] if model else []), PROMPT]


def claude_code(model):
    return [CLAUDE_CODE, "-p", PROMPT, "--model", model, "--allowedTools", "Bash"]


# Client: its dialect, and what makes its command for a model.
AGENTS = {
    "openai (Python)": ("responses", python("openai")),
    "openai-agents": ("responses", python("openai-agents")),
    "pydantic-ai": ("responses", python("pydantic-ai-slim")),
    "openai (Node)": ("responses", node("openai")),
    "@ai-sdk/openai": ("responses", node("@ai-sdk/openai")),
    "anthropic (Python)": ("messages", python("anthropic")),
    "@anthropic-ai/sdk": ("messages", node("@anthropic-ai/sdk")),
    "@ai-sdk/anthropic": ("messages", node("@ai-sdk/anthropic")),
    "Claude Code": ("messages", CLAUDE_CODE and claude_code),
    "Codex": ("responses", CODEX and codex),
}
# Models that Codex has on its own list, and one that it does not know, are offered other tools.
CODEX_DEFAULT = "gpt-6.2-sol"


@pytest.fixture
def mock(request):
    with Model(getattr(request, "param", "two tools")) as provider:
        yield provider


def ran(proxy, folder, command):
    """What a client printed that ended well, with its home in a folder of its own."""
    process = subprocess.Popen(
        command, cwd=folder, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, start_new_session=True, env={
            "PATH": os.environ["PATH"], "HOME": str(folder), "NO_PROXY": "127.0.0.1,localhost",
            "HTTPS_PROXY": NOBODY, "HTTP_PROXY": NOBODY, "IRONCAGE_NODE_MODULES": NODE_MODULES,
            "OPENAI_BASE_URL": proxy.url + "/v1", "OPENAI_API_KEY": TOKEN,
            "ANTHROPIC_BASE_URL": proxy.url + "/v1" * ("@ai-sdk/anthropic" in command),
            "ANTHROPIC_API_KEY": TOKEN, "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
            "OPENAI_AGENTS_DISABLE_TRACING": "1"})
    try:
        out, err = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
        kill_programs_of(folder)
        process.wait()
    assert 0 == process.returncode, out + err
    return out


def drill_was_done(mock, proxy, out, api):
    """Two results came back to the model, it ended, and the bill is what the provider billed."""
    results = [asked.results for asked in mock.asked if len(asked.results) == 2]
    assert any(all(any(word in result for result in pair) for word in (
        "first of two", "second of two")) for pair in results), [a.results for a in mock.asked]
    assert DONE in out
    assert {PATHS[api]} == {seen.path for seen in mock.seen if seen.method == "POST"}
    assert not mock.lacks_what_it_needs
    assert mock.billed_microdollars == settled_status(proxy)["spent_microdollars"] > 0


# Asked for, and sent back. Codex asks for no effort of a model that it does not know.
BRINGS_THOUGHTS = {("Claude Code", "messages"), ("Claude Code", "responses"), ("Codex", "responses")}


def a_thought_came_back(mock):
    """In its vendor's seal, as it was given out."""
    seals = [claude_seal(THOUGHT), openai_seal(THOUGHT), openai_seal(THOUGHT, "final")]
    return any(seal in seen.body.decode() for seal in seals for seen in mock.seen)


@pytest.mark.parametrize("agent, api", [
    (agent, api) for agent in AGENTS for api in PATHS])
def test_an_agent_does_its_drill_on_each_api(mock, proxy_for, tmp_path, agent, api):
    _, command = AGENTS[agent]
    if not command:
        pytest.skip("it is not installed")
    proxy = proxy_for("--budget", "5", "--config", configured(mock, tmp_path))

    out = ran(proxy, tmp_path, command(MODELS[api]))

    drill_was_done(mock, proxy, out, api)
    if (agent, api) in BRINGS_THOUGHTS:
        assert a_thought_came_back(mock)


@pytest.mark.skipif(not CODEX, reason="Codex is not installed")
@pytest.mark.parametrize("api", ["chat", "messages"])
def test_codex_with_its_default_model_runs_on_another_vendors(mock, proxy_for, tmp_path, api):
    """Its tools come in a namespace, the shell as a tool that takes text in a grammar."""
    proxy = proxy_for("--budget", "5", "--config", configured(
        mock, tmp_path, models={CODEX_DEFAULT: MODELS[api]}))

    out = ran(proxy, tmp_path, codex(""))

    drill_was_done(mock, proxy, out, api)
    assert api == "chat" or a_thought_came_back(mock)
    asked = [json.loads(line) for line in [seen.body for seen in mock.seen] if line]
    assert all("exec" in json.dumps(fields["tools"]) for fields in asked[:1])


@pytest.mark.parametrize("mock", ["web search"], indirect=True)
@pytest.mark.parametrize("agent, api, kind", [
    ("Claude Code", "responses", "web_search"), ("Codex", "messages", "web_search_20250305")])
def test_an_agents_search_of_the_web_runs_at_the_other_vendor(mock, proxy_for, tmp_path, agent,
                                                             api, kind):
    _, command = AGENTS[agent]
    if not command:
        pytest.skip("it is not installed")
    proxy = proxy_for("--budget", "5", "--config", configured(mock, tmp_path))
    *line, _ = command(MODELS[api]) if agent == "Codex" else [
        CLAUDE_CODE, "--model", MODELS[api], "--allowedTools", "WebSearch", "-p", PROMPT]

    out = ran(proxy, tmp_path, [*line, f"{TASK}: web search"])

    assert DONE in out and not mock.lacks_what_it_needs
    offered = [json.loads(seen.body).get("tools") or [] for seen in mock.seen if seen.body]
    assert any(tool.get("type") == kind for tools in offered for tool in tools)
    assert mock.billed_microdollars == settled_status(proxy)["spent_microdollars"] > 0
