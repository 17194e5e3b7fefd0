"""Claude Code in print mode on a model of OpenAI's format: it finishes, uses a tool, and sends no
call twice. Looks for the program in IRONCAGE_CLAUDE_CODE, else as `claude` on the PATH."""
import json
import os
import shutil
import subprocess

import pytest
from support import TOKEN, Reply, settled_status, sse

CLAUDE = os.environ.get("IRONCAGE_CLAUDE_CODE") or shutil.which("claude")
pytestmark = pytest.mark.skipif(CLAUDE is None, reason="Claude Code is not installed")
USAGE = {"prompt_tokens": 9_000, "completion_tokens": 5, "total_tokens": 9_005}


def streamed(*deltas, finish="stop"):
    def chunk(delta, reason=None):
        return sse({"id": "c1", "object": "chat.completion.chunk", "created": 1,
                    "model": "gpt-4o-mini", "choices": [
                        {"index": 0, "delta": delta, "finish_reason": reason}]})
    usage = sse({"id": "c1", "object": "chat.completion.chunk", "created": 1,
                 "model": "gpt-4o-mini", "choices": [], "usage": USAGE})
    return Reply(headers=(("content-type", "text/event-stream"),), framing="chunked",
                 bills=("gpt-4o-mini", USAGE),
                 steps=(chunk({"role": "assistant", "content": ""}),
                        *(chunk(delta) for delta in deltas), chunk({}, finish), usage,
                        sse("[DONE]")))


def claude_code(proxy, tmp_path, prompt, *flags, model="gpt-4o-mini"):
    done = subprocess.run(
        [CLAUDE, "-p", prompt, *flags], stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=90, cwd=tmp_path, env={
            "PATH": os.environ["PATH"], "HOME": str(tmp_path), "ANTHROPIC_BASE_URL": proxy.url,
            "ANTHROPIC_API_KEY": TOKEN, "ANTHROPIC_MODEL": model,
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1"})
    assert 0 == done.returncode, done.stdout + done.stderr
    return done.stdout


def test_it_answers_with_one_call(mock, proxy_for, tmp_path):
    proxy = proxy_for("--budget", "1.00")
    mock.script(streamed({"content": "PO"}, {"content": "NG"}))

    said = claude_code(proxy, tmp_path, "say PONG")

    assert "PONG" in said
    assert ["/v1/chat/completions"] == [seen.path for seen in mock.seen]
    assert mock.billed_microdollars == settled_status(proxy)["spent_microdollars"] > 0


def test_it_runs_a_tool_and_sends_no_call_twice(mock, proxy_for, tmp_path):
    proxy = proxy_for("--budget", "1.00")
    call = {"index": 0, "id": "call_1", "type": "function", "function": {
        "name": "Bash", "arguments": ""}}
    more = json.dumps({"command": "echo made-by-the-tool", "description": "say it"})
    mock.script(
        streamed({"tool_calls": [call]}, *({"tool_calls": [
            {"index": 0, "function": {"arguments": part}}]} for part in (more[:20], more[20:])),
            finish="tool_calls"),
        streamed({"content": "It said so."}))

    said = claude_code(proxy, tmp_path, "run it", "--allowedTools", "Bash")

    assert "It said so." in said
    first, second = mock.seen
    assert len(second.json["messages"]) > len(first.json["messages"])
    [result] = [m for m in second.json["messages"] if m["role"] == "tool"]
    assert ("call_1", True) == (result["tool_call_id"], "made-by-the-tool" in result["content"])
    assert mock.billed_microdollars == settled_status(proxy)["spent_microdollars"]


@pytest.mark.parametrize("model", ["gpt-5.5", "gpt-5.6", "lab/qwen3"])
def test_it_reaches_models_with_rules_of_their_own(mock, proxy_for, tmp_path, model):
    """The mock refuses what they refuse: reasoning beside tools, later system messages."""
    config = tmp_path / "cage.json"
    config.write_text(json.dumps({"providers": {"lab": {
        "base_url": mock.url, "key_env": "OPENAI_API_KEY", "free": True}}}))
    mock.models |= {"gpt-5.5", "gpt-5.6", "qwen3"}
    mock.output_text = "PONG"
    proxy = proxy_for("--config", str(config))

    assert "PONG" in claude_code(proxy, tmp_path, "say PONG", model=model)
    assert mock.seen[0].json["tools"]
    asked = mock.seen[0].json
    if model == "lab/qwen3":
        assert ["system", "user"] == [message["role"] for message in asked["messages"]]
    else:
        assert "/v1/responses" == mock.seen[0].path and asked["reasoning"]["effort"]
