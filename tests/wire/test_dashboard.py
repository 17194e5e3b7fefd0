"""The dashboard: a page without data or outside resources; in a real browser where there is one."""
import json
import os
import re
import time

import pytest
from support import ADMIN_TOKEN, TOKEN, RawClient, call, program, settled_status

ALICE, BOB = "ic_alice_canary_0123456789", "ic_bob_canary_0123456789"

CHAT = {"model": "gpt-4o-mini", "max_tokens": 100,
        "messages": [{"role": "user", "content": "hello"}]}


def test_the_page_needs_no_token_and_holds_no_data(mock, proxy):
    call(proxy.port, "POST", "/v1/chat/completions", CHAT)

    answer = call(proxy.port, "GET", "/ironcage/dashboard", token=None)

    assert (200, "text/html; charset=utf-8") == (answer.status, answer.header("content-type"))
    assert b"gpt-4o-mini" not in answer.body and TOKEN.encode() not in answer.body


@pytest.fixture
def caged(proxy_with):
    """A proxy with a token whose sessions are capped, one with a budget by the day, and flags."""
    config = {"tokens": [
        {"name": "alice", "token": ALICE, "session_budget_usd": "0.000085",
         "expires": "2120-01-31"},
        {"name": "bob", "token": BOB, "budget_usd": "0.0001", "period": "day"}]}
    return lambda *flags: proxy_with(config, *flags)


def chat(proxy, token=TOKEN, session=None, **fields):
    headers = [] if session is None else [("x-ironcage-session", session)]
    return call(proxy.port, "POST", "/v1/chat/completions", {**CHAT, **fields}, token=token,
                headers=headers).status


def test_every_field_that_the_page_reads_is_in_what_the_routes_say(mock, caged):
    proxy = caged("--budget", "10")
    assert [200, 402] == [chat(proxy, ALICE, "s1"), chat(proxy, ALICE, "s1")]
    page = call(proxy.port, "GET", "/ironcage/dashboard", token=None).body.decode()
    status, usage = settled_status(proxy), call(proxy.port, "GET", "/ironcage/usage").json

    def read(variable):
        return set(re.findall(rf"(?<![\w.]){variable}\.(\w+)", page)) - {"tone"}

    assert len(read("status")) > 6 and len(read("a")) > 5 and len(read("r")) > 10
    assert read("status") - {"shared"} <= set(status) and read("usage") <= set(usage)
    for amounts in (status, status["by_token"]["bob"], status["by_session"]["alice/s1"]):
        assert read("a") <= set(amounts)
    for counts in (status["by_model"]["gpt-4o-mini"], status["by_token"]["alice"]):
        assert read("c") <= set(counts) | {"scope"}
    assert read("r") <= set(usage["rows"][0]) | set(usage["refused"][0])
    assert read("t") and read("t") <= set(status["by_token"]["alice"])


def test_the_status_says_what_is_left_by_token_and_session_and_until_when(mock, caged, monkeypatch):
    monkeypatch.setattr(program(), "SESSIONS_SHOWN", 2)
    proxy = caged()
    for session in ("s1", "s2", "s3", "s1"):
        chat(proxy, ALICE, session)
    chat(proxy, BOB, "s1")
    now_s = int(time.time())

    status = settled_status(proxy)
    bobs = call(proxy.port, "GET", "/ironcage/status", token=BOB).json

    assert ["alice/s1", "alice/s3"] == list(status["by_session"])
    session, bob = status["by_session"]["alice/s1"], status["by_token"]["bob"]
    assert 85 == session["limit_microdollars"] == (
        session["spent_microdollars"] + session["available_microdollars"])
    assert ("bob", "day", 0) == (bob["scope"], bob["period"], bob["resets_s"] % 86_400)
    assert 0 <= bob["resets_s"] - now_s <= 86_400
    assert [(85, "2120-01-31T00:00:00Z", False), (None, None, False)] == [
        (token["session_limit_microdollars"], token["expires"], token["has_expired"])
        for token in (status["by_token"]["alice"], bob)]
    assert ("proxy", "total", None) == (status["scope"], status["period"], status["resets_s"])
    assert ({}, "bob", bob["resets_s"]) == (bobs["by_session"], bobs["scope"], bobs["resets_s"])


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
    """Two models, two sessions and a third of a budget; written where IRONCAGE_PICTURE says, if it does."""
    proxy = proxy_for("--budget", "0.006")
    for number in range(12):
        mock.input_tokens = 40 + 60 * number
        model = "claude-haiku-4-5" if number % 4 == 3 else "gpt-4o-mini"
        path = "messages" if number % 4 == 3 else "chat/completions"
        call(proxy.port, "POST", f"/v1/{path}", {**CHAT, "model": model, "messages": [
            {"role": "user", "content": "hello " * 60 * (number + 1)}]},
            headers=[("x-ironcage-session", f"session-{number % 2}")])
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


def enter(page, proxy, token=TOKEN):
    """Open the page at a telephone's width, with a token; wait for what it shows."""
    page.set_viewport_size({"width": 390, "height": 800})
    page.goto(proxy.url + "/ironcage/dashboard")
    page.fill("#token", token)
    page.click("button")
    page.wait_for_selector("#amounts .gauge")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_before_the_first_call_it_says_what_to_paste(proxy, page):
    enter(page, proxy)

    pasted = page.inner_text("#paste")
    assert f"export OPENAI_BASE_URL={proxy.url}/v1 OPENAI_API_KEY=ic_..." in pasted
    assert f"export ANTHROPIC_BASE_URL={proxy.url} ANTHROPIC_AUTH_TOKEN=ic_..." in pasted
    assert page.is_visible("#first") and not page.is_visible("#called")
    assert TOKEN not in page.content()

    chat(proxy)
    page.wait_for_selector("#called:not([hidden])")
    assert not page.is_visible("#first")


@pytest.mark.parametrize("share, tone, words", [
    (50, "", ""), (80, "near", "is spent"),
    (96, "red", "1 refused for want of budget in the last day. The last: Iron Cage budget insuf")])
def test_its_colour_and_words_are_of_what_is_refused(mock, proxy_for, page, share, tone, words):
    proxy = proxy_for("--budget", "10", "--admin-token", ADMIN_TOKEN)
    long = [{"role": "user", "content": "hello " * 2_000}]
    assert 200 == chat(proxy, messages=long)
    spent = settled_status(proxy)["spent_microdollars"]
    set_budget(proxy, spent * 100 // share)
    if tone == "red":
        assert 402 == chat(proxy, messages=long)

    enter(page, proxy)
    assert ["gauge", *tone.split()] == page.get_attribute("#amounts .gauge", "class").split()
    assert words in page.inner_text("#state") and bool(words) == bool(page.inner_text("#state"))

    set_budget(proxy, 10 ** 7)
    page.wait_for_selector("#amounts .gauge:not(.red, .near)")     # it would not be refused again
    assert "" == page.inner_text("#state")


def set_budget(proxy, microdollars):
    answer = call(proxy.port, "PUT", "/ironcage/budget", token=ADMIN_TOKEN,
                  fields={"limit_usd": program().format_usd(microdollars)[1:]})
    assert 200 == answer.status, answer


def test_a_token_sees_why_it_is_refused_also_by_the_proxys_limit(mock, caged, page):
    proxy = caged("--budget", "0.00001")
    assert [402] * 2 == [chat(proxy, BOB), chat(proxy, BOB)]

    enter(page, proxy, BOB)

    assert "proxy: 0 % of $0.00001 is spent; 2 refused" in page.inner_text("#state")
    assert page.is_visible("#rows td:has-text('refused: Iron Cage')")


def test_a_token_shows_what_each_session_may_spend_and_when_it_ends(mock, caged, page):
    proxy = caged()
    assert 200 == chat(proxy, ALICE, "s1")

    enter(page, proxy)
    page.wait_for_selector("#tokens td")

    shown = page.inner_text("#tokens")
    assert "$0.000085 a session, expires " in shown and "20" in shown.split("expires ")[1]
    assert 1 == shown.count("a session")
