"""`-- CMD`: agents that people use, run inside the cage; each is skipped where it is not installed.

Codex and aider are looked for in IRONCAGE_CODEX and IRONCAGE_AIDER, else on the PATH."""
import os
import shutil
import subprocess
import sys

import pytest
from support import ANTHROPIC_KEY, OPENAI_KEY, ROOT, proxy_environment

CODEX = os.environ.get("IRONCAGE_CODEX") or shutil.which("codex")
AIDER = os.environ.get("IRONCAGE_AIDER") or shutil.which("aider")
CLAUDE = os.environ.get("IRONCAGE_CLAUDE_CODE") or shutil.which("claude")
LLM = shutil.which("llm", path=os.path.dirname(sys.executable))
CODEX_LINE = """exec "$0" exec --skip-git-repo-check -c model_provider=cage \
    -c "model_providers.cage={name=\\"cage\\",base_url=\\"$OPENAI_BASE_URL\\",env_key=\\"OPENAI_API_KEY\\"}" \
    -c web_search=disabled -m gpt-5.5 "say PONG" """
AGENTS = {
    "Codex": (CODEX, "/v1/responses", lambda: ["sh", "-c", CODEX_LINE, CODEX]),
    "aider": (AIDER, "/v1/chat/completions", lambda: [
        AIDER, "--model", "openai/gpt-4o-mini", "--message", "say PONG", "--no-git", "--yes",
        "--no-check-update", "--analytics-disable", "--no-show-model-warnings"]),
    "Claude Code": (CLAUDE, "/v1/messages", lambda: [CLAUDE, "-p", "say PONG"]),
    "llm": (LLM, "/v1/chat/completions", lambda: [LLM, "-m", "gpt-4o-mini", "--no-log", "say PONG"]),
}


@pytest.mark.parametrize("program, path, command", AGENTS.values(), ids=AGENTS)
def test_an_agent_runs_inside_the_cage_and_gets_its_bill(mock, tmp_path, program, path, command):
    if program is None:
        pytest.skip("it is not installed")
    mock.output_text = "PONG"
    mock.models |= {"claude-opus-4-8", "claude-opus-5-5", "claude-sonnet-5-5", "claude-haiku-5-5"}

    done = subprocess.run(
        [sys.executable, str(ROOT / "ironcage_proxy.py"), "--budget", "3", "--", *command()],
        capture_output=True, text=True, timeout=120, cwd=tmp_path, stdin=subprocess.DEVNULL,
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), **proxy_environment(mock),
             "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1"})

    assert 0 == done.returncode, done.stdout + done.stderr
    assert "PONG" in done.stdout
    assert path in {seen.path for seen in mock.seen}
    assert "of $3.00" in done.stderr.splitlines()[-1]
    assert f"${mock.billed_microdollars / 1_000_000:.6f}".rstrip("0") in done.stderr
    assert OPENAI_KEY not in done.stdout + done.stderr
    assert ANTHROPIC_KEY not in done.stdout + done.stderr
