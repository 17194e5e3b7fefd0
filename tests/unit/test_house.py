"""The house rules that keep one file readable and honest, checked on its syntax tree.

Contents equal the chapters; a chapter uses only chapters above it; nothing blocks under a lock;
only known modules of the standard library are imported; no float touches money; exceptions are
caught broadly in five places; import does nothing.
"""
import ast
import re
import subprocess
import sys

import pytest
from trees import PROGRAM, source_of, tree_of, walked

SOURCE, TREE = source_of(PROGRAM), tree_of(PROGRAM)
NODES = walked(TREE)
BANNER = re.compile(r"^# =+ (\d+\. .+?) =+$", re.MULTILINE)

STDLIB_IMPORTS = {
    "__future__", "argparse", "base64", "bisect", "collections", "contextlib", "ctypes",
    "datetime", "decimal", "difflib", "errno", "fcntl", "fnmatch", "fractions", "functools", "hashlib", "heapq", "http.client",
    "http.server", "itertools", "json", "logging", "msvcrt", "operator", "os", "re", "resource", "secrets",
    "select", "signal", "socket", "socketserver", "sqlite3", "ssl", "stat", "struct", "subprocess", "sys",
    "tempfile", "threading",
    "time", "types", "typing", "unicodedata", "urllib.parse", "urllib.request", "zlib",
}
BLOCKING_CALLS = {
    "sleep", "urlopen", "open", "execute", "send", "sendall", "recv", "receive", "connect",
    "print", "log", "info", "warning", "error", "exception", "join", "shutdown", "shut_down",
    "close", "write", "read",
}
MAX_FUNCTION_LINES = 60


# [(title, first line)] in the order of the file
CHAPTERS = [(match[1], SOURCE.count("\n", 0, match.start()) + 1)
            for match in BANNER.finditer(SOURCE)]


def chapter_of(line):
    return sum(start <= line for _, start in CHAPTERS)


def chapter_tree(title):
    number = [name for name, _ in CHAPTERS].index(title) + 1
    return [node for node in TREE.body if chapter_of(node.lineno) == number]


def definitions():
    """{name: chapter} of every name that the file defines at its top level."""
    found = {}
    for node in TREE.body:
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        names = [node.name] if hasattr(node, "name") else [
            name.id for target in targets if target is not None
            for name in ast.walk(target) if isinstance(name, ast.Name)]
        for name in names:
            found.setdefault(name, chapter_of(node.lineno))
    return found


def test_contents_list_equals_the_chapters():
    contents = re.findall(r"^ +(\d+\. .+)$", ast.get_docstring(TREE, clean=False), re.MULTILINE)

    assert [title for title, _ in CHAPTERS] == contents


def test_no_name_is_defined_twice():
    names = [name for node in TREE.body for name in (
        [node.name] if hasattr(node, "name") else
        [part.id for target in getattr(node, "targets", [getattr(node, "target", None)]) if target
         for part in ast.walk(target) if isinstance(part, ast.Name)])]

    assert [] == [name for name in set(names) if names.count(name) > 1]


def test_chapters_are_numbered_in_order():
    numbers = [int(title.split(".")[0]) for title, _ in CHAPTERS]

    assert list(range(1, len(numbers) + 1)) == numbers


def test_a_chapter_uses_only_names_of_chapters_above_it():
    """Annotations are left out: they are never evaluated, and say where a thing is going."""
    home = definitions()
    annotations = set()
    for node in NODES:
        for part in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            if part is not None:
                annotations.update(id(inner) for inner in ast.walk(part))

    downward = [(node.lineno, node.id) for node in NODES
                if isinstance(node, ast.Name) and id(node) not in annotations
                and home.get(node.id, 0) > chapter_of(node.lineno)]

    assert downward == []


def test_nothing_blocks_or_calls_out_under_a_lock():
    loud = []
    for node in NODES:
        holds = isinstance(node, ast.With) and any(
            re.search("lock|_changed", ast.unparse(item.context_expr)) for item in node.items)
        for call in (inner for statement in node.body for inner in ast.walk(statement)
                     if isinstance(inner, ast.Call)) if holds else ():
            name = getattr(call.func, "attr", getattr(call.func, "id", ""))
            if name in BLOCKING_CALLS:
                loud.append((call.lineno, name))

    assert loud == []


def test_only_known_modules_of_the_standard_library_are_imported():
    imported = set()
    for node in NODES:
        if isinstance(node, ast.Import):
            imported.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)

    assert imported <= STDLIB_IMPORTS


def test_no_float_arithmetic_in_money():
    """True division is allowed on a Fraction only."""
    floats, divisions = [], []
    annotations = {id(inner) for node in NODES
                   for part in (getattr(node, "annotation", None), getattr(node, "returns", None))
                   if part is not None for inner in ast.walk(part)}
    for node in (inner for top in chapter_tree("4. Money") + chapter_tree("16. Cost controller")
                 for inner in ast.walk(top)):
        if isinstance(node, ast.Constant) and isinstance(node.value, float):
            floats.append(node.lineno)
        if isinstance(node, ast.Name) and node.id == "float" \
                and id(node) not in annotations:
            floats.append(node.lineno)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div) \
                and not ast.unparse(node.left).startswith("Fraction("):
            divisions.append(node.lineno)

    assert ([], []) == (floats, divisions)


def test_exceptions_are_caught_broadly_at_the_five_boundaries_only():
    """The request's, the command line's, on_event's, a reload's, and that of a thread which serving
    needs; BaseException only there, and to clean up and raise."""
    broad = []
    for function in NODES:
        for node in ast.iter_child_nodes(function) if isinstance(function, ast.Try) else ():
            if isinstance(node, ast.ExceptHandler):
                name = "bare" if node.type is None else ast.unparse(node.type)
                raises_again = isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None
                if name in ("bare", "Exception") or (name == "BaseException"
                                                     and not raises_again):
                    broad.append(name)

    assert ["BaseException"] + ["Exception"] * 4 == sorted(broad)


def test_no_assert_guards_behaviour():
    assert [] == [node.lineno for node in NODES if isinstance(node, ast.Assert)]


def test_every_public_function_and_class_has_a_docstring_or_is_pure_variation():
    undocumented = []
    for node in NODES:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_") \
                and ast.get_docstring(node) is None:
            one_liner = node.end_lineno - node.lineno <= 8
            if not one_liner:
                undocumented.append((node.lineno, node.name))

    assert undocumented == []


def test_functions_are_short():
    lengths = sorted((node.end_lineno - node.lineno + 1, node.name) for node in NODES
                     if isinstance(node, ast.FunctionDef))

    assert lengths[-1][0] <= MAX_FUNCTION_LINES, lengths[-3:]
    assert lengths[len(lengths) * 9 // 10][0] <= 35


def test_lines_are_at_most_100_columns():
    assert [] == [number for number, line in enumerate(SOURCE.splitlines(), 1) if len(line) > 100]


def test_every_signature_is_typed():
    untyped = []
    for node in NODES:
        if isinstance(node, ast.FunctionDef):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            bare = [argument.arg for argument in arguments
                    if argument.annotation is None and argument.arg not in ("self", "cls")]
            if bare or node.returns is None:
                untyped.append((node.lineno, node.name, bare))

    assert untyped == []


def test_import_reads_nothing_and_starts_nothing():
    """No environment, file, socket or thread: an audit hook sees what the import does."""
    program = (
        "import sys, threading\n"
        "sys.path.insert(0, sys.argv[1]); sys.dont_write_bytecode = True\n"
        "import argparse, base64, contextlib, fnmatch, hashlib, hmac, http.client, http.server\n"
        "import json, logging, secrets, select, signal, socket, socketserver, ssl, struct, time\n"
        "import urllib.parse, urllib.request, zlib, fractions, decimal\n"
        "seen = []\n"
        "sys.addaudithook(lambda event, args: seen.append((event, args)))\n"
        "import ironcage_proxy\n"
        "bad = [e for e in seen if e[0].startswith(('socket.', 'subprocess.', 'os.putenv'))\n"
        "       or (e[0] == 'open' and not str(e[1][0]).endswith(('.py', '.pyc')))]\n"
        "assert not bad, bad\n"
        "assert threading.active_count() == 1\n")

    done = subprocess.run([sys.executable, "-I", "-c", program, str(PROGRAM.parent)],
                          capture_output=True, text=True)

    assert 0 == done.returncode, done.stderr


@pytest.mark.parametrize("name", ["ironcage_proxy.py", "pricing.json", "README.md", "LICENSE"])
def test_top_level_holds_what_the_product_promises(name):
    assert (PROGRAM.parent / name).is_file()


def test_top_level_holds_nothing_else():
    listed = subprocess.run(["git", "ls-files"], cwd=PROGRAM.parent, capture_output=True,
                            text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    top = {line.split("/")[0] for line in listed.stdout.splitlines()}

    assert {name for name in top if not name.startswith(".")} <= {
        "ironcage_proxy.py", "pricing.json", "README.md", "LICENSE", "tests"}
