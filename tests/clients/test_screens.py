"""What people see: Claude Code and Codex on a screen of their own (tmux), at the start and as the
money ends. Skipped where tmux or the program is missing.

Programs are looked for in IRONCAGE_CLAUDE_CODE and IRONCAGE_CODEX, else on the PATH."""
import json
import os
import re
import shutil

import pytest
from support import TOKEN, kill_programs_of, program
from terminal import TMUX, Terminal

ic = program()
CLAUDE = os.environ.get("IRONCAGE_CLAUDE_CODE") or shutil.which("claude")
CODEX = os.environ.get("IRONCAGE_CODEX") or shutil.which("codex")
pytestmark = pytest.mark.skipif(TMUX is None, reason="tmux is not installed")
needs_codex = pytest.mark.skipif(CODEX is None, reason="Codex is not installed")
needs_claude = pytest.mark.skipif(CLAUDE is None, reason="Claude Code is not installed")
CLAUDES = ("claude-opus-4-8", "claude-opus-5-5", "claude-sonnet-5-5", "claude-haiku-5-5")
READY = r"(?m)^❯"
SAID = "PONG, says the canary"
LIMIT = 100_000_000                 # microdollars: "--budget 100"


def shell_lines(proxy):
    """The variables that the banner gives to Anthropic clients."""
    [line] = [line for line in ic.banner(proxy).splitlines() if "Anthropic clients:" in line]
    line = line.replace("<the token you chose>", TOKEN)
    return dict(word.split("=", 1) for word in line.partition(" export ")[2].split())


@pytest.fixture(autouse=True)
def nothing_left(tmp_path):
    yield
    kill_programs_of(tmp_path)


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
    mock.output_text = SAID

    with claude_code(shell_lines(proxy)) as terminal:
        started = terminal.wait_for(READY)
        terminal.type("say PONG")
        answered = terminal.wait_for(SAID)

    assert not re.search("(?i)custom API key|not logged in|/login", started + answered)
    assert {"/v1/messages"} == {seen.path for seen in mock.seen}


def nearly_spent(mock, proxy_for, percent, token=TOKEN):
    """A proxy of which so much of the limit is spent, in front of a mock that costs little."""
    mock.output_text, mock.input_tokens = SAID, 100
    proxy = proxy_for("--budget", "100", "--token", token)
    proxy.router.controller.add_spend(LIMIT * percent // 100)
    return proxy


@needs_claude
@pytest.mark.parametrize("percent, told", [(50, None), (76, "76%"), (96, "96%")])
def test_claude_code_shows_how_much_is_used_to_a_token_of_ours(
        mock, proxy_for, claude_code, percent, told):
    token = ic.new_token()
    proxy = nearly_spent(mock, proxy_for, percent, token)

    with claude_code({"ANTHROPIC_BASE_URL": proxy.url, "ANTHROPIC_AUTH_TOKEN": token}) as terminal:
        terminal.wait_for(READY)
        terminal.type("say PONG")
        screen = terminal.wait_for(f"You've used {told} of" if told else SAID)
        if not told:                                   # a notice would stand by the next answer
            terminal.type("once more")
            screen = terminal.wait_for(f"(?s){SAID}.*once more.*{SAID}")

    assert bool(told) == ("usage credits" in screen)


@needs_claude
def test_claude_code_asks_once_and_shows_the_whole_refusal(mock, proxy_for, claude_code):
    token = ic.new_token()
    proxy = nearly_spent(mock, proxy_for, 100, token)

    with claude_code({"ANTHROPIC_BASE_URL": proxy.url, "ANTHROPIC_AUTH_TOKEN": token}) as terminal:
        terminal.wait_for(READY)
        terminal.type("say PONG")
        screen = terminal.wait_for(r"API Error: 402[^❯]*❯")

    assert "Iron Cage budget limit exceeded. Spent: $100.00" in screen
    assert [] == mock.seen
    refused = [row["status"] for row in proxy.ledger.refusals(100)]
    assert 1 == refused.count(402) and {402, 400} >= {*refused}     # 400: see `safeguards`, README


@pytest.fixture
def codex(tmp_path):
    """Start Codex in a home whose questions of the first start are answered."""
    def start(proxy):
        (tmp_path / ".codex").mkdir()
        (tmp_path / ".codex" / "config.toml").write_text(f"""
            model = "gpt-5.5"
            model_provider = "cage"
            web_search = "disabled"
            check_for_update_on_startup = false
            notice.model_migrations = {{ "gpt-5.5" = "gpt-6-sol" }}
            [model_providers.cage]
            name = "cage"
            base_url = "{proxy.url}/v1"
            env_key = "OPENAI_API_KEY"
            wire_api = "responses"
            [projects."{tmp_path}"]
            trust_level = "trusted"
            """)
        return Terminal([CODEX], {"PATH": os.environ["PATH"], "HOME": str(tmp_path),
                                  "OPENAI_API_KEY": TOKEN}, tmp_path)
    return start


def ask_codex(terminal):
    terminal.wait_for("GPT-5.5 default")               # until then it takes no Enter
    terminal.type("say PONG", enter=False)
    terminal.wait_for("› say PONG")
    terminal.press("Enter")


@needs_codex
@pytest.mark.parametrize("percent, told", [(50, None), (76, "25%"), (96, "5%")])
def test_codex_shows_how_much_is_left(mock, proxy_for, codex, percent, told):
    with codex(nearly_spent(mock, proxy_for, percent)) as terminal:
        ask_codex(terminal)
        screen = terminal.wait_for(
            f"{SAID}(?s:.*)less than {told} of your usage limit left" if told
            else f"{SAID}(?s:.*)Worked for")

    assert bool(told) == ("Heads up" in screen)


@needs_codex
def test_codex_shows_the_whole_refusal(mock, proxy_for, codex):
    with codex(nearly_spent(mock, proxy_for, 100)) as terminal:
        ask_codex(terminal)
        screen = terminal.wait_for("402 Payment Required: Iron Cage budget limit exceeded")

    assert "Spent: $100.00" in re.sub(r"\s+", " ", screen)
    assert [] == mock.seen
