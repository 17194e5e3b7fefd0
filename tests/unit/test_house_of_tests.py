"""The house rules of the tests, checked on their syntax trees.

Each test asserts something; none sleeps to wait for something, nor asserts that something was quick;
long rows name their fields; each chapter has its tests, and each promise the test that attacks it.
"""
import ast
import functools
import re
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
sys.path.insert(0, str(TESTS / "bench"))

from mutants import TESTS as TESTS_OF_CHAPTERS, chapters
from trees import tree_of, walked

PROGRAM = (ROOT / "ironcage_proxy.py").read_text(encoding="utf-8")
FILES = {str(path.relative_to(TESTS)): tree_of(path)
         for path in sorted(TESTS.rglob("*.py")) if path.parent.name != "bench"}
TEST_FILES = {name: tree for name, tree in FILES.items() if "/test_" in name}
CLOCKS = {"time.monotonic", "time.perf_counter", "time.process_time", "time.thread_time"}
ASSERTING = {"pytest.raises", "pytest.fail"}
MAY_SLEEP = {"support.py", "clients/terminal.py"}      # until() and pause(); what a screen shows
UNNAMED_FIELDS = 5                                     # in a row of a table; more have names
# Of no one chapter: rules, the map, the README, the mock, and bugs by where they were found.
UNIT_FILES_OF_ALL = {"unit/test_house.py", "unit/test_house_of_tests.py", "unit/test_map.py",
                     "unit/test_peer_bugs.py", "unit/test_readme.py", "unit/test_regressions.py",
                     "unit/test_support.py"}
# Else the unit file of a chapter is named after it. No two files have one name.
UNIT_FILES_OF_OTHER_NAMES = {
    "Usage of answers": "test_event_streams.py", "HTTP on a socket": "test_http_wire.py",
    "Shared budget": "test_shared_engine.py", "Dashboard": "test_dashboard_page.py",
    "Embedding": "test_embedded_router.py"}


@functools.lru_cache(maxsize=None)
def functions(tree):
    return {node.name: node for node in walked(tree) if isinstance(node, ast.FunctionDef)}


def dotted(node):
    """What is called, as it is written: "time.sleep", "threading.Event().wait"."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return dotted(node.func) + "()" if isinstance(node, ast.Call) else getattr(node, "id", "?")


@functools.lru_cache(maxsize=None)
def calls(node):
    return [inner for inner in walked(node) if isinstance(inner, ast.Call)]


def names_called(node):
    """The helpers that may be called, which are not the program's own functions."""
    return {getattr(call.func, "attr", getattr(call.func, "id", "")) for call in calls(node)
            if not dotted(call.func).startswith(("ic.", "module.", "program()."))}


def asserts(node):
    return any(isinstance(inner, ast.Assert) for inner in walked(node)) or any(
        dotted(call.func) in ASSERTING for call in calls(node))


def asserting_helpers():
    """The names of all functions that assert something, themselves or by one that they call."""
    called = [(name, names_called(node)) for tree in FILES.values()
              for name, node in functions(tree).items()]
    found = {name for tree in FILES.values() for name, node in functions(tree).items()
             if asserts(node)}
    while True:
        more = {name for name, names in called if names & found} - found
        if not more:
            return found
        found |= more


def is_at_least(test):
    return isinstance(test, ast.Compare) and isinstance(test.ops[0], (ast.Gt, ast.GtE))


def test_no_test_is_without_an_assertion():
    helpers = asserting_helpers()
    idle = [(file, name) for file, tree in TEST_FILES.items()
            for name, node in functions(tree).items()
            if name.startswith("test_") and not asserts(node) and not names_called(node) & helpers]

    assert [] == idle


def test_nothing_is_waited_for_by_sleeping():
    sleeps = [(file, call.lineno) for file, tree in FILES.items() if file not in MAY_SLEEP
              for call in calls(tree)
              if dotted(call.func) in ("time.sleep", "sleep", "threading.Event().wait")]

    assert [] == sleeps


def test_no_test_asserts_that_something_was_quick():
    """That something waits at least so long is no matter of the machine's speed."""
    timed = []
    for file, tree in TEST_FILES.items():
        for node in functions(tree).values():
            taken = {target.id for inner in walked(node) if isinstance(inner, ast.Assign)
                     for target in inner.targets if isinstance(target, ast.Name)
                     if any(dotted(call.func) in CLOCKS for call in calls(inner.value))}
            timed += [(file, inner.lineno) for inner in walked(node)
                      if isinstance(inner, ast.Assert) and not is_at_least(inner.test) and any(
                          dotted(part) in CLOCKS or getattr(part, "id", None) in taken
                          for part in walked(inner.test))]

    assert [] == timed


def call_tables(node):
    """The rows that a parametrize(), or an each(), has in it."""
    return node.args[1:2] if isinstance(node, ast.Call) \
        and dotted(node.func) in ("pytest.mark.parametrize", "each") else []


def test_long_rows_of_a_table_name_their_fields():
    tables = [(file, table) for file, tree in TEST_FILES.items() for node in walked(tree)
              for table in (
                  [node.value] if isinstance(node, ast.Assign) and node in tree.body else
                  call_tables(node))]
    unnamed = [(file, row.lineno) for file, table in tables
               if isinstance(table, (ast.List, ast.Tuple)) for row in table.elts
               if isinstance(row, ast.Tuple) and len(row.elts) > UNNAMED_FIELDS]

    assert [] == unnamed


# Chapters.

def rows():
    return {title: files.split() for title, files in TESTS_OF_CHAPTERS.items()}


def test_each_chapter_has_its_tests_and_each_unit_file_its_chapter():
    in_rows = {file for files in rows().values() for file in files}

    assert [*chapters(PROGRAM)] == [*rows()]
    assert [] == [file for file in in_rows if not (TESTS / file).is_file()]
    assert {file for file in TEST_FILES if file.startswith("unit/")} == UNIT_FILES_OF_ALL | {
        file for file in in_rows if file.startswith("unit/")}


@pytest.mark.parametrize("title", TESTS_OF_CHAPTERS)
def test_each_chapter_has_its_unit_file_which_is_the_first_of_its_tests(title):
    named = "test_" + re.sub(r"\W+", "_", title.lower()) + ".py"

    assert f"unit/{UNIT_FILES_OF_OTHER_NAMES.get(title, named)}" == rows()[title][0]


# Promises.

@functools.lru_cache(maxsize=None)
def promises_of_the_program():
    """{title: the test that attacks it, or a file of them} of the file's docstring."""
    return dict(re.findall(r"^ {4}([A-Z][^:\n]+): .*?\n {8}tests/(\S+)$",
                           PROGRAM.split('"""')[1], re.MULTILINE | re.DOTALL))


def promises_of_the_readme():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.split("\n## What it guarantees")[1].split("\n**What \"never over\"")[0]
    return {re.match(r"\*\*(.+?)[.,]", item)[1]: re.findall(r"`tests/(\S+?)`", item)
            for item in re.split(r"\n\d\. ", section)[1:]}


def test_the_docstring_and_the_readme_promise_the_same_and_name_the_same_tests():
    assert {title: [test] for title, test in promises_of_the_program().items()} \
        == promises_of_the_readme()


@pytest.mark.parametrize("title", promises_of_the_program())
def test_the_test_that_attacks_a_promise_is_there_and_runs_by_default(title):
    file, _, name = promises_of_the_program()[title].partition("::")
    tests = [node for found, node in functions(TEST_FILES[file]).items()
             if found == name or not name and found.startswith("test_")]

    assert any("soak" not in "".join(map(ast.unparse, node.decorator_list)) for node in tests)
