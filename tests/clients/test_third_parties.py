"""Third-party clients of each dialect on the other vendor's models; skipped where not installed."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import TOKEN, settled_status

LLM = Path(sys.executable).with_name("llm")


@pytest.mark.skipif(not LLM.exists(), reason="llm is not installed")
@pytest.mark.parametrize("stream", [[], ["--no-stream"]], ids=["streamed", "whole"])
def test_llm_on_claude(mock, proxy_for, tmp_path, stream):
    config = tmp_path / "cage.json"
    config.write_text('{"models": {"gpt-4o-mini": "claude-haiku-4-5"}}')
    proxy = proxy_for("--budget", "1", "--config", str(config))

    done = subprocess.run(
        [str(LLM), "-m", "gpt-4o-mini", "--no-log", *stream, "say PONG"], capture_output=True,
        text=True, timeout=60, stdin=subprocess.DEVNULL, env={
            "PATH": os.environ["PATH"], "HOME": str(tmp_path), "OPENAI_API_KEY": TOKEN,
            "OPENAI_BASE_URL": proxy.url + "/v1"})

    assert (0, True) == (done.returncode, bool(done.stdout.strip())), done.stderr
    assert ["/v1/messages"] == [seen.path for seen in mock.seen]
    assert mock.billed_microdollars == settled_status(proxy)["spent_microdollars"] > 0


def test_langchain_anthropic_on_gpt(mock, proxy):
    chat = pytest.importorskip("langchain_anthropic").ChatAnthropic(
        model="gpt-4o-mini", base_url=proxy.url, api_key=TOKEN, max_tokens=50, max_retries=0)

    whole = chat.invoke("hello").content
    streamed = "".join(chunk.text if isinstance(chunk.text, str) else chunk.text()
                       for chunk in chat.stream("hello"))

    assert whole and whole == streamed
    assert ["/v1/chat/completions"] * 2 == [seen.path for seen in mock.seen]
    assert mock.billed_microdollars == settled_status(proxy)["spent_microdollars"]


def test_langchain_openai_on_claude(mock, proxy):
    chat = pytest.importorskip("langchain_openai").ChatOpenAI(
        model="claude-haiku-4-5", base_url=proxy.url + "/v1", api_key=TOKEN, max_tokens=50,
        max_retries=0)

    whole = chat.invoke("hello").content
    streamed = "".join(chunk.content for chunk in chat.stream("hello"))

    assert whole and whole == streamed
    assert {"/v1/messages"} == {seen.path for seen in mock.seen}
