"""What people see: Claude Code and Codex on a screen of their own (tmux), at the start and as the
money ends. Skipped where tmux or the program is missing.

Programs are looked for in IRONCAGE_CLAUDE_CODE and IRONCAGE_CODEX, else on the PATH."""
import json
import os
import re
import shutil

import pytest
from support import TOKEN, program
from terminal import TMUX, Terminal

ic = program()
CLAUDE = os.environ.get("IRONCAGE_CLAUDE_CODE") or shutil.which("claude")
CODEX = os.environ.get("IRONCAGE_CODEX") or shutil.which("codex")
pytestmark = pytest.mark.skipif(TMUX is None, reason="tmux is not installed")
needs_claude = pytest.mark.skipif(CLAUDE is None, reason="Claude Code is not installed")
CLAUDES = ("claude-opus-4-8", "claude-opus-5-5", "claude-sonnet-5-5", "claude-haiku-5-5")
READY = r"(?m)^❯"


def shell_lines(proxy):
    """The variables that the banner gives to Anthropic clients."""
    [line] = [line for line in ic.banner(proxy).splitlines() if "Anthropic clients:" in line]
    line = line.replace("<the token you chose>", TOKEN)
    return dict(word.split("=", 1) for word in line.partition(" export ")[2].split())


@pytest.fixture
def claude_code(mock, tmp_path):
    """Start Claude Code in a home whose questions of the first start are answered."""
    mock.models |= {*CLAUDES}
    (tmp_path / ".claude.json").write_text(json.dumps({
        "hasCompletedOnboarding": True, "theme": "dark",
        "projects": {str(tmp_path): {"hasTrustDialogAccepted": True}}}))

    def start(environ, *words):
        return Terminal([CLAUDE, *words], {
            "PATH": os.environ["PATH"], "HOME": str(tmp_path),
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1", **environ}, tmp_path)
    return start


@needs_claude
def test_claude_code_starts_clean_with_the_banners_line(mock, proxy, claude_code):
    mock.output_text = "PONG, says the canary"

    with claude_code(shell_lines(proxy)) as terminal:
        started = terminal.wait_for(READY)
        terminal.type("say PONG")
        answered = terminal.wait_for("PONG, says the canary")

    assert not re.search("(?i)custom API key|not logged in|/login", started + answered)
    assert {"/v1/messages"} == {seen.path for seen in mock.seen}
