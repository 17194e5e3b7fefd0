"""The map in the file's docstring: for each question the code that answers it, and nothing missing."""
import ast
import re

import pytest
from calls import mapped, show
from support import ROOT
from trees import walked

MOST_LINES = {"overspend": 3_600, "shared": 890, "leaves": 700, "changed": 1_100}
# What sets money aside, settles it or moves a limit.
MONEY = [
    *(f"CostController.{name}" for name in (
        "reserve", "cancel", "commit", "add_spend", "set_budget", "set_limits", "set_scopes")),
    *(f"Accounts.{name}" for name in (
        "settle", "take", "set_limits", "set_scopes", "session")),
    "Account.add", *(f"SharedAccounts.{name}" for name in (
        "settle", "take", "set_limits", "set_scopes"))]
SENDING = ("posted", "Router._send")                  # what opens them, for who asks for it
CONNECTS = ("create_connection", "connect", "connect_ex", "sendto", "urlopen")
# What replaces bytes of a message in its own API.
CHANGES = ("JsonBody.spliced", "without_usage", "with_notice")


def code_of(name):
    calls, asked = mapped()
    return asked[name].code(calls)


def outward(calls):
    """Functions that open connections; SQLite's are none, and serving opens none."""
    return {name for name, nodes in calls.nodes.items() for node in nodes for call in walked(node)
            if isinstance(call, ast.Call) and (
                getattr(call.func, "attr", "") in CONNECTS
                or getattr(call.func, "attr", "") == "open"
                and ast.unparse(call.func).endswith("opener.open"))
            and not ast.unparse(call.func).startswith("sqlite3.")}


def test_each_question_names_code_that_there_is():
    calls, asked = mapped()

    assert {*MOST_LINES} == {*asked}
    assert [] == [name for name in (*MONEY, *CHANGES, *SENDING) if name not in calls.nodes]
    assert [] == [root for question in asked.values() for root in question.roots
                  if root not in calls.nodes]


@pytest.mark.parametrize("name", MOST_LINES)
def test_an_answer_fits_an_auditors_day(name):
    calls, _ = mapped()

    assert len(calls.lines(code_of(name))) <= MOST_LINES[name]


def test_the_readme_says_how_much_each_answer_is_at_most():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = re.findall(r"tests/calls\.py (\w+) \| less +# .+\? ([\d,]+)", readme)

    assert {name: f"{most:,}" for name, most in MOST_LINES.items()} == dict(shown)


def test_whatever_moves_money_or_a_limit_is_in_the_answer_to_overspend():
    """In that, or for many processes to "shared"; what starts or shows a server moves nothing."""
    calls, _ = mapped()
    movers = calls.users(MONEY)

    assert {"Router._settle", "CostController.set_budget"} <= movers
    assert {"Router.__init__"} >= movers - code_of("overspend") - code_of("shared")


def test_each_call_that_the_chapters_of_the_cage_make_of_their_own_is_followed():
    """But for those of locks and events, whose methods have names that others have too."""
    calls, _ = mapped()
    own = {name.partition(".")[2] for name in calls.nodes if calls.nodes[name]
           and calls.chapter_of(name) in (16, 24)} - {"wait", "release", "error", "close"}

    assert {"Account.add", "Account.budget", "Budget.free"} <= code_of("overspend")
    assert [] == [(method, user) for method, user in calls.unknown
                  if method in own and calls.chapter_of(user) in (16, 24)]


def test_whatever_opens_a_connection_and_whatever_uses_that_is_in_the_answer_to_leaves():
    calls, _ = mapped()
    openers = outward(calls)
    senders = calls.users(SENDING) | openers

    assert openers >= {*SENDING}
    assert set() == senders - code_of("leaves")


def test_whatever_replaces_bytes_is_in_the_answer_to_changed():
    calls, _ = mapped()

    assert set() == calls.users(CHANGES) - code_of("changed") - {"Router._unmetered"}


def test_the_code_of_a_question_can_be_printed(capsys):
    show("changed")

    shown = capsys.readouterr().out
    assert "def spliced" in shown and "def _price_reached" not in shown
