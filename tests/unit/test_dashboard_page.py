"""The page of the dashboard: it loads nothing, and only its own script and style may run."""
import base64
import hashlib
import re

import ironcage_proxy as ic

ANSWER = ic.dashboard_answer()
HEADERS, PAGE = dict(ANSWER.headers), ANSWER.body.decode()


def test_its_policy_lets_only_its_own_script_and_style_run():
    policy = HEADERS["content-security-policy"]

    for kind in ("script", "style"):
        [inline] = re.findall(rf"<{kind}>(.*?)</{kind}>", PAGE, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    for rule in ("default-src 'none'", "frame-ancestors 'none'", "base-uri 'none'",
                 "form-action 'none'", "connect-src 'self'"):
        assert rule in policy
    assert not re.search(r"https?://|src=|innerHTML|localStorage|eval\(", PAGE)


def test_it_is_kept_by_no_browser_and_names_itself_to_nobody():
    assert ("no-store", "nosniff", "no-referrer") == tuple(HEADERS[name] for name in (
        "cache-control", "x-content-type-options", "referrer-policy"))


def test_each_part_of_the_page_that_the_script_looks_for_is_there_once():
    wanted = {*re.findall(r"at\('(\w+)'\)", ic.DASHBOARD_SCRIPT)}
    ids = re.findall(r'id="(\w+)"', ic.DASHBOARD_BODY)

    assert wanted and wanted <= {*ids} and len(ids) == len({*ids})
