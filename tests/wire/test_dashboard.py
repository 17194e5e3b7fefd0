"""The dashboard: a page without data or outside resources; in a real browser where there is one."""
import base64
import hashlib
import json
import os
import re

import pytest
from support import TOKEN, RawClient, call, settled_status

CHAT = {"model": "gpt-4o-mini", "max_tokens": 100,
        "messages": [{"role": "user", "content": "hello"}]}


def test_the_page_needs_no_token_and_holds_no_data(mock, proxy):
    call(proxy.port, "POST", "/v1/chat/completions", CHAT)

    answer = call(proxy.port, "GET", "/ironcage/dashboard", token=None)

    assert (200, "text/html; charset=utf-8") == (answer.status, answer.header("content-type"))
    assert b"gpt-4o-mini" not in answer.body and TOKEN.encode() not in answer.body


def test_its_policy_lets_only_its_own_script_and_style_run(proxy):
    answer = call(proxy.port, "GET", "/ironcage/dashboard", token=None)
    policy, page = answer.header("content-security-policy"), answer.body.decode()

    for kind in ("script", "style"):
        [inline] = re.findall(rf"<{kind}>(.*?)</{kind}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    for rule in ("default-src 'none'", "frame-ancestors 'none'", "base-uri 'none'",
                 "form-action 'none'"):
        assert rule in policy
    assert not re.search(r"https?://|src=|innerHTML|localStorage|eval\(", page)


def test_a_foreign_host_gets_no_page(proxy):
    with RawClient(proxy.port) as client:
        client.send(b"GET /ironcage/dashboard HTTP/1.1\r\nHost: evil.example\r\n\r\n")

        assert 403 == client.read_answer().status


def test_calls_that_were_refused_are_told_beside_those_that_cost(mock, proxy_for):
    proxy = proxy_for("--budget", "0.00001")
    call(proxy.port, "POST", "/v1/chat/completions", CHAT)
    call(proxy.port, "POST", "/v1/chat/completions", {**CHAT, "model": "nobody-knows"})
    call(proxy.port, "GET", "/ironcage/nothing")

    unpriced, too_dear = call(proxy.port, "GET", "/ironcage/usage").json["refused"]

    assert (400, "unpriced_model") == (unpriced["status"], unpriced["reason"])
    assert (402, "insufficient_budget", "default") == (
        too_dear["status"], too_dear["reason"], too_dear["token"])
    assert "input alone" in too_dear["message"] and too_dear["refused_ms"] > 0


@pytest.fixture
def page(request):
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as run:
        try:
            browser = run.chromium.launch(executable_path=os.environ.get("IRONCAGE_CHROMIUM"), args=[
                "--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader", "--in-process-gpu"])
        except playwright.Error:
            pytest.skip("Chromium is not installed")
        with browser.new_page() as page:
            yield page
        browser.close()


@pytest.mark.parametrize("width", [1280, 390])
def test_it_shows_spend_and_updates_by_itself(mock, proxy, page, width, tmp_path):
    faults = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda line: faults.append(line.text) if line.type == "error" else None)
    page.set_viewport_size({"width": width, "height": 800})
    page.goto(proxy.url + "/ironcage/dashboard")
    page.fill("#token", TOKEN)
    page.click("button")
    page.wait_for_selector("#page:not([hidden])")

    call(proxy.port, "POST", "/v1/chat/completions", CHAT)
    settled_status(proxy)
    page.wait_for_selector("#rows td")

    call(proxy.port, "POST", "/v1/chat/completions", {**CHAT, "model": "<b>nobody</b>"})
    page.wait_for_selector("#rows td:has-text('refused')")

    assert "gpt-4o-mini" in page.inner_text("#rows")
    assert 0 == page.locator("#rows b").count()
    assert "free of $10.00" in page.inner_text("#amounts")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert [] == faults
    page.screenshot(path=str(tmp_path / f"dashboard-{width}.png"))


def test_the_picture_of_the_readme(mock, proxy_for, page):
    """Two models, a refusal and half a budget; written where IRONCAGE_PICTURE says, if it does."""
    proxy = proxy_for("--budget", "0.004")
    for number in range(12):
        mock.input_tokens = 40 + 60 * number
        model = "claude-haiku-4-5" if number % 4 == 3 else "gpt-4o-mini"
        path = "messages" if number % 4 == 3 else "chat/completions"
        call(proxy.port, "POST", f"/v1/{path}", {**CHAT, "model": model, "messages": [
            {"role": "user", "content": "hello " * 60 * (number + 1)}]})
        page.wait_for_timeout(40)
    call(proxy.port, "POST", "/v1/chat/completions", {**CHAT, "model": "nobody-knows"})
    page.set_viewport_size({"width": 900, "height": 760})
    page.goto(proxy.url + "/ironcage/dashboard")
    page.fill("#token", TOKEN)
    page.click("button")
    page.wait_for_selector("#rows td")

    assert "no price" in page.inner_text("#rows")
    if "IRONCAGE_PICTURE" in os.environ:
        page.screenshot(path=os.environ["IRONCAGE_PICTURE"])


def test_a_wrong_token_is_asked_for_again(proxy, page):
    page.goto(proxy.url + "/ironcage/dashboard")
    page.fill("#token", "ic_wrong_0123456789")
    page.click("button")
    page.wait_for_selector("#note:not(:empty)")

    assert page.is_visible("#ask") and page.evaluate("sessionStorage.length") == 0
    assert json.dumps(page.inner_text("#note")) == '"That token is not known here."'
