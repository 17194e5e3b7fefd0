"""The official Node SDKs behind the proxy, each call in a node process of its own.

The packages `openai` and `@anthropic-ai/sdk` are looked for in the folder that the environment
variable IRONCAGE_NODE_MODULES names; without them, or without node, these tests are skipped.
"""
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from support import TOKEN, settled_status

SCRIPT = Path(__file__).with_name("node_sdks.mjs")
NODE = shutil.which("node")
FOLDER = os.environ.get("IRONCAGE_NODE_MODULES")
PATIENCE_S = 30                     # for a whole node process on a busy machine

MODELS = {"chat": "gpt-4o-mini", "chat stream": "gpt-4o-mini", "responses stream": "gpt-4o-mini",
          "message": "claude-haiku-4-5", "message stream": "claude-haiku-4-5"}


def run_node(call, url="-", model="-"):
    """What the script prints for one call, parsed; None where it cannot run."""
    done = subprocess.run(
        [NODE, str(SCRIPT), call, url, TOKEN, model], capture_output=True, text=True,
        encoding="utf-8", timeout=PATIENCE_S,
        env={"PATH": os.environ["PATH"], "IRONCAGE_NODE_MODULES": FOLDER})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module", autouse=True)
def node_with_sdks():
    """Skip all of this unless node is here and finds both SDKs."""
    if NODE is None:
        pytest.skip("node is not on the PATH")
    if not FOLDER:
        pytest.skip("IRONCAGE_NODE_MODULES names no folder with openai and @anthropic-ai/sdk")
    try:
        run_node("resolve")
    except AssertionError as err:
        if "MODULE_NOT_FOUND" not in str(err):
            raise
        pytest.skip(f"openai and @anthropic-ai/sdk are not both installed in {FOLDER}")


@pytest.mark.parametrize("call", MODELS)
def test_a_call_gives_the_providers_text_and_costs_what_it_bills(mock, proxy, call):
    heard = run_node(call, proxy.url, MODELS[call])

    assert mock.output_text == heard.get("text") == heard.get("final", mock.output_text), heard
    usage = mock.bills[0][1]
    shown = {name: count for name, count in usage.items() if name.endswith("_tokens")}
    assert heard["usage"] is None if call == "chat stream" \
        else shown.items() <= heard["usage"].items()
    assert mock.billed_microdollars == settled_status(proxy)["spent_microdollars"] > 0
    assert (1, 1) == (heard["requests"], len(mock.seen))


@pytest.mark.parametrize("call", MODELS)
def test_echo_answers_with_the_prompt_and_without_a_key(proxy_for, call):
    proxy = proxy_for("--budget", "1.00", environ={})

    heard = run_node(call, proxy.url, "ironcage/echo")

    assert "Count the canaries in the cave." == heard.get("text"), heard
    assert 6 + 2 * 6 == settled_status(proxy)["spent_microdollars"]


@pytest.mark.parametrize("call", MODELS)
def test_a_refusal_by_the_budget_is_an_exception_and_never_tried_again(mock, proxy_for, call):
    proxy = proxy_for("--budget", "0")

    heard = run_node(call, proxy.url, MODELS[call])

    error = heard["error"]
    name, kind = ("PaymentRequiredError", "billing_error") if "message" in call \
        else ("APIError", "iron_cage_budget_exceeded")
    assert (name, 402, kind) == (error["name"], error["status"], error["type"])
    assert "Iron Cage budget limit exceeded" in error["message"]
    assert error["requestID"].startswith("req_")
    assert (1, 0) == (heard["requests"], len(mock.seen))
