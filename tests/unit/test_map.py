"""The map in the file's docstring: for each question the code that answers it, and nothing missing."""
import ast
import os
import re
import shutil
import subprocess
import sys

import pytest
from calls import mapped, show
from support import ROOT
from trees import walked

MOST_LINES = {"overspend": 3_600, "unmetered": 460, "shared": 900, "leaves": 800, "changed": 1_340}
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
# What decides that a request is not counted, or that one is refused for that.
UNCOUNTED = ("UnmeteredRoute", "FREE_ROUTES", "COSTLY_HEADER", "COSTLY_QUERY", "is_free_route",
             "may_be_metered", "check_head", "Router._check_unmetered", "Router._unmetered")
# Further code without which an answer is none: tables that it decides by, and their readers.
BELONGS = {
    "unmetered": ("METERED_APIS", "KNOWN_PROVIDERS", "COSTLY_HEADERS", "check_sessions",
                  "split_path", "Router.open", *UNCOUNTED),
    "leaves": ("REQUEST_HEADERS_KEPT_BACK", "KNOWN_PROVIDERS", "Provider.credentials",
               "Provider.url", "EnvironmentProxies.proxy_open", "build_opener", "check_encrypted",
               "upstream_headers"),
    "changed": ("REQUEST_HEADERS_KEPT_BACK", "upstream_headers", "answer_headers",
                "Router._first_headers", "_set_aside"),
}
PROGRAM_WITH_A_MAP = '''"""Small.

    first: What is in the cage? What these use of chapter 1.
        Cage: opened
"""
# ==== 1. Cages ====
#
# They hold.

import functools

UNUSED = 1
# Source: measured.
BARS = 2


# A cage has bars.
class Cage(
        object):
    # Not of a method that is shown.
    def closed(self):
        return UNUSED

    # Whoever asks may know.
    @property
    @functools.lru_cache()
    def opened(self):
        return BARS


# ==== 2. Birds ====
BIRD = BARS
'''


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
    """In that, where a request comes in ("unmetered"), or for many processes in "shared"; what starts
    or shows a server moves nothing."""
    calls, _ = mapped()
    movers = calls.users(MONEY)

    assert {"Router._settle", "CostController.set_budget"} <= movers
    answers = code_of("overspend") | code_of("shared") | {"Router.open"}
    assert {"Router.__init__"} >= movers - answers


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


def test_whatever_decides_that_a_request_is_not_counted_is_in_the_answer_to_unmetered():
    """That a metered one is refused for its head too is for "overspend"."""
    calls, _ = mapped()

    assert {"Router._planned"} >= calls.users(UNCOUNTED) - code_of("unmetered")


@pytest.mark.parametrize("name", BELONGS)
def test_an_answer_holds_the_tables_that_it_is_decided_by(name):
    assert [] == [one for one in BELONGS[name] if one not in code_of(name)]


@pytest.mark.parametrize("name", MOST_LINES)
def test_each_method_is_printed_with_its_class_and_its_decorators(name):
    calls, _ = mapped()
    code = code_of(name)
    shown = calls.shown(code)

    assert shown >= calls.lines(code)
    assert [] == [one for one in code for node in calls.nodes[one] if not shown >= {
        decorator.lineno for decorator in getattr(node, "decorator_list", ())}]
    assert [] == [one for one in code if "." in one
                  and calls.classes[one.partition(".")[0]].lineno not in shown]


def run_alone(tmp_path, *arguments, output=subprocess.PIPE):
    """Run a copy of the command with a small program and nothing else beside it."""
    (tmp_path / "tests").mkdir()
    copy = shutil.copy(ROOT / "tests" / "calls.py", tmp_path / "tests")
    (tmp_path / "ironcage_proxy.py").write_text(PROGRAM_WITH_A_MAP, encoding="utf-8")
    return subprocess.run([sys.executable, copy, *arguments], stdout=output, text=True,
                          stderr=subprocess.PIPE, timeout=60)


def test_the_command_needs_nothing_but_the_program(tmp_path):
    """It prints the heading of a class, and comments only above what it prints."""
    done = run_alone(tmp_path, "first")

    assert (0, "") == (done.returncode, done.stderr)
    assert """\
# ==== 1. Cages ====
#
# They hold.
# Source: measured.
BARS = 2
# A cage has bars.
class Cage(
        object):
    # Whoever asks may know.
    @property
    @functools.lru_cache()
    def opened(self):
        return BARS
""" == "".join(line[7:] + "\n" for line in done.stdout.splitlines() if line)


@pytest.mark.skipif(os.name == "nt", reason="a pipe without a reader is a signal on POSIX")
def test_a_pager_can_be_left_before_the_end(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    done = run_alone(tmp_path, "first", output=writer)
    os.close(writer)

    assert done.stderr == ""


@pytest.mark.parametrize("arguments", [(), ("second",), ("first", "second")])
def test_the_command_lists_the_questions_where_it_is_asked_none_of_them(tmp_path, arguments):
    done = run_alone(tmp_path, *arguments)

    assert done.returncode == 1
    assert done.stderr.split("\n", 1)[1].split() == "first What is in the cage?".split()


def test_the_code_of_a_question_can_be_printed(capsys):
    show("changed")

    shown = capsys.readouterr().out
    assert "def spliced" in shown and "def _price_reached" not in shown
