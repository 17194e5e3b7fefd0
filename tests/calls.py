"""Who calls whom in the file, from its syntax tree and annotations: `Calls(path)`.

A name is a function, a method (`Class.method`), a class (its fields) or a table of the top level.
What `x.method()` calls is found by the class of `x`, which its annotation, its assignment or the
annotation of what returned it gives; a call through a value of unknown class is not followed.

    python tests/calls.py QUESTION      print the code that a question of the file's map needs
    python tests/calls.py               print the questions

It needs the file beside `tests`, and nothing else.
"""
from __future__ import annotations

import ast
import functools
import re
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import Iterable, Iterator, Optional

PROGRAM = Path(__file__).resolve().parents[1] / "ironcage_proxy.py"
Classes = frozenset[str]
NONE: Classes = frozenset()
CONSTRUCTORS = ("__init__", "__new__", "__post_init__")
GIVES_AN_ELEMENT = ("get", "pop", "popleft", "popitem", "values", "setdefault", "copy")
BANNER = re.compile(r"^# =+ (\d+)\. (.+?) =+$", re.MULTILINE)


@functools.lru_cache(maxsize=None)
def source_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@functools.lru_cache(maxsize=None)
def tree_of(path: Path) -> ast.Module:
    return ast.parse(source_of(path))


@functools.lru_cache(maxsize=None)
def walked(node: ast.AST) -> list[ast.AST]:
    return [*ast.walk(node)]


class Calls:
    """`nodes` are the definitions of each name, `used` the names that each uses."""

    def __init__(self, path: Path) -> None:
        source = self.source = source_of(path)
        self.tree = tree_of(path)
        self.chapters = [(int(match[1]), match[2], source.count("\n", 0, match.start()) + 1)
                         for match in BANNER.finditer(source)]
        self.nodes: dict[str, list[ast.AST]] = {}
        self.classes: dict[str, ast.ClassDef] = {}
        self.methods: set[str] = set()
        self.unknown: Counter = Counter()        # (method, user): calls that were not followed
        self._bases: dict[str, list[str]] = {}
        self._fields: dict[tuple[str, str], Classes] = {}
        self._returns: dict[str, Optional[ast.AST]] = {}
        self._unions: dict[str, ast.AST] = {}
        for node in self.tree.body:
            self._define(node)
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Subscript) \
                    and getattr(node.value.value, "id", "") in ("Union", "Optional"):
                self._unions[node.targets[0].id] = node.value
        self._derived = {name: [other for other, bases in self._bases.items() if name in bases]
                         for name in self._bases}
        self._read_annotations()
        for _ in range(3):                       # a field may get its class from another's
            for name, nodes in self.nodes.items():
                if "." in name:
                    self._read_assignments(nodes[0], name.split(".")[0])
        self.used = {name: set(self._used_by(name)) for name in self.nodes}

    def chapter_of(self, name: str) -> int:
        line = self.nodes[name][0].lineno
        return sum(start <= line for _, _, start in self.chapters)

    def of_class(self, name: str) -> set[str]:
        return {other for other in self.nodes if other == name or other.startswith(name + ".")}

    def reached(self, roots: Iterable[str], beyond: Iterable[str] = ()) -> set[str]:
        """The roots and all that they use, directly or not; not through the names `beyond`."""
        beyond, found, waiting = set(beyond), set(), list(roots)
        while waiting:
            name = waiting.pop()
            if name not in found and name not in beyond:
                found.add(name)
                waiting += self.used[name]
        return found

    def users(self, names: Iterable[str]) -> set[str]:
        names = set(names)
        return {name for name, used in self.used.items() if used & names}

    def lines(self, names: Iterable[str]) -> set[int]:
        """The lines of code of names: functions with their decorators, tables, fields.

        What an answer is counted by. The headings and comments that `shown` adds are read at a
        glance, and the heading of a class is repeated in each answer that has a method of it.
        """
        return {line for name in names for node in self.nodes[name]
                for line in range(_first_line(node), node.end_lineno + 1)}

    def shown(self, names: Iterable[str]) -> set[int]:
        """Their lines, and what says whose they are and why: the headings of their classes and
        chapters, and the comments that stand directly above them."""
        names, rows = {*names}, ["", *self.source.splitlines(), ""]
        is_comment = {line for line, row in enumerate(rows) if row.lstrip().startswith("#")}
        shown, begins = self.lines(names), {_first_line(node) for name in names
                                            for node in self.nodes[name]}
        for owner in {name.partition(".")[0] for name in names} & {*self.classes}:
            node = self.classes[owner]
            end = max(node.lineno + 1, _first_line(node.body[0]))
            shown |= {line for line in range(_first_line(node), end)
                      if rows[line].strip() and line not in is_comment}
            begins.add(_first_line(node))
        for line in begins:
            while line - 1 in is_comment:
                line -= 1
                shown.add(line)
        for (_, _, line), following in zip(self.chapters, [
                *(start for _, _, start in self.chapters[1:]), len(rows)]):
            if not shown.isdisjoint(range(line, following)):
                while line in is_comment:
                    shown.add(line)
                    line += 1
        return shown

    # Definitions.

    def _define(self, node: ast.AST) -> None:
        if isinstance(node, ast.ClassDef):
            self._bases[node.name] = [base.id for base in node.bases
                                      if isinstance(base, ast.Name)]
            self.nodes[node.name], self.classes[node.name] = [], node
            for part in node.body:
                if isinstance(part, ast.FunctionDef):
                    self.methods.add(part.name)
                    self.nodes[f"{node.name}.{part.name}"] = [part]
                    self._returns[f"{node.name}.{part.name}"] = part.returns
                elif isinstance(part, ast.Assign) and f"{node.name}.{ast.unparse(part.value)}" \
                        in self._returns:                # another name of a method
                    named = f"{node.name}.{ast.unparse(part.value)}"
                    for target in part.targets:
                        self.nodes[f"{node.name}.{ast.unparse(target)}"] = self.nodes[named]
                        self._returns[f"{node.name}.{ast.unparse(target)}"] = self._returns[named]
                else:
                    self.nodes[node.name].append(part)
        elif isinstance(node, ast.FunctionDef):
            self.nodes[node.name], self._returns[node.name] = [node], node.returns
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            for target in getattr(node, "targets", None) or [node.target]:
                for part in ast.walk(target):
                    if isinstance(part, ast.Name):
                        self.nodes.setdefault(part.id, []).append(node)

    def _read_annotations(self) -> None:
        for name, nodes in self.nodes.items():
            for node in nodes:
                owner, _, method = name.partition(".")
                if isinstance(node, ast.AnnAssign) and name in self._bases:
                    self._fields[name, node.target.id] = self._named(node.annotation)
                if method and any("property" in ast.unparse(one)
                                  for one in getattr(node, "decorator_list", ())):
                    self._fields[owner, method] = self._named(node.returns)

    def _read_assignments(self, function: ast.FunctionDef, owner: str) -> None:
        fields = [row for row in _assignments(function) if isinstance(row[0], ast.Attribute)
                  and isinstance(row[0].value, ast.Name) and row[0].value.id == "self"]
        known = self._variables(function, owner) if fields else {}
        for target, value, annotation in fields:
            classes = self._named(annotation) or self._classes(value, known, owner)
            place = owner, target.attr
            self._fields[place] = self._fields.get(place, NONE) | classes

    # Classes of expressions.

    @functools.lru_cache(maxsize=None)  # noqa: B019  (as long-lived as the test)
    def _family(self, name: str) -> list[str]:
        """A class, those it derives from, and those that derive from it."""
        found: list[str] = []
        for relatives in (self._bases, self._derived):
            waiting = [name]
            while waiting:
                one = waiting.pop()
                if one in self._bases and (one not in found or one == name):
                    found += [one] * (one not in found)
                    waiting += relatives[one]
        return found

    @functools.lru_cache(maxsize=None)  # noqa: B019
    def _named(self, annotation: Optional[ast.AST]) -> Classes:
        if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
            annotation = ast.parse(annotation.value, mode="eval")
        named = {node.id for node in ast.walk(annotation)
                 if isinstance(node, ast.Name)} if annotation is not None else set()
        for alias in named & {*self._unions}:
            named |= {node.id for node in ast.walk(self._unions[alias])
                      if isinstance(node, ast.Name)}
        return frozenset(named & {*self._bases})

    def _field(self, classes: Classes, name: str) -> Classes:
        return frozenset().union(*(self._fields.get((one, name), NONE)
                                   for each in classes for one in self._family(each)))

    def _methods(self, classes: Classes, name: str) -> list[str]:
        found = {f"{one}.{name}" for each in classes for one in self._family(each)}
        return [one for one in found if one in self.nodes]

    def _classes(self, node: Optional[ast.AST], known: dict, owner: str) -> Classes:
        """The classes of the file that an expression, or its elements, may be of."""
        if isinstance(node, ast.Name):
            if node.id in ("self", "cls"):
                return frozenset([owner]) if owner else NONE
            return frozenset([node.id]) if node.id in self._bases else known.get(node.id, NONE)
        if isinstance(node, ast.Attribute):
            return self._field(self._classes(node.value, known, owner), node.attr)
        if isinstance(node, ast.Subscript):
            return self._classes(node.value, known, owner)
        if isinstance(node, (ast.ListComp, ast.GeneratorExp)):
            return self._classes(node.elt, known, owner)
        if isinstance(node, (ast.IfExp, ast.BoolOp, ast.List, ast.Starred)):
            parts = getattr(node, "values", None) or getattr(node, "elts", None) or (
                [node.body, node.orelse] if isinstance(node, ast.IfExp)
                else [node.value] if isinstance(node, ast.Starred) else [])
            return frozenset().union(*(self._classes(part, known, owner) for part in parts))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id in self._returns:
                return self._named(self._returns[node.func.id])
            if node.func.id in ("iter", "next", "list", "tuple", "sorted", "reversed", "zip",
                                "enumerate"):
                return frozenset().union(*(self._classes(part, known, owner)
                                           for part in node.args))
            return self._classes(node.func, known, owner)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            classes = self._classes(node.func.value, known, owner)
            found = self._methods(classes, node.func.attr)
            if found:
                return frozenset().union(*(self._named(self._returns[name]) for name in found))
            return classes if node.func.attr in (*GIVES_AN_ELEMENT, "_replace") else NONE
        return NONE

    def _variables(self, function: ast.AST, owner: str) -> dict[str, Classes]:
        known: dict[str, Classes] = {}
        for node in walked(function):
            if isinstance(node, ast.arg):
                known[node.arg] = self._named(node.annotation)
        for _ in range(2):
            for target, value, annotation in _assignments(function):
                if isinstance(target, ast.Name):
                    known[target.id] = known.get(target.id, NONE) | (
                        self._named(annotation) or self._classes(value, known, owner))
        return known

    # Uses.

    def _used_by(self, name: str) -> Iterator[str]:
        owner = name.partition(".")[0] if "." in name else ""
        for definition in self.nodes[name]:
            known = self._variables(definition, owner)
            unread = {id(part) for node in walked(definition)
                      if isinstance(node, (ast.arg, ast.AnnAssign, ast.FunctionDef))
                      for annotation in (getattr(node, "annotation", None),
                                         getattr(node, "returns", None)) if annotation is not None
                      for part in ast.walk(annotation)}
            for node in walked(definition):
                if id(node) in unread:
                    continue
                if isinstance(node, ast.Name) and node.id in self.nodes:
                    yield node.id
                    for constructor in CONSTRUCTORS if node.id in self._bases else ():
                        yield from self._methods(frozenset([node.id]), constructor)
                elif isinstance(node, ast.Attribute):
                    yield from self._attribute(node, known, owner, name)

    def _attribute(self, node: ast.Attribute, known: dict, owner: str, user: str) -> list[str]:
        if isinstance(node.value, ast.Call) and getattr(node.value.func, "id", "") == "super":
            return self._methods(frozenset(self._bases[owner]), node.attr)
        classes = self._classes(node.value, known, owner)
        if not classes and node.attr in self.methods:
            self.unknown[node.attr, user] += 1
        return self._methods(classes, node.attr)


def _first_line(node: ast.AST) -> int:
    return min([node.lineno, *(one.lineno for one in getattr(node, "decorator_list", ()))])


@functools.lru_cache(maxsize=None)
def _assignments(function: ast.AST) -> list[tuple]:
    return list(_each_assignment(function))


def _each_assignment(function: ast.AST) -> Iterator[tuple]:
    """(target, value, annotation) of all that a function assigns; pairs are taken apart."""
    for node in walked(function):
        if isinstance(node, ast.Assign):
            pairs = [(target, node.value) for target in node.targets]
        elif isinstance(node, (ast.AnnAssign, ast.NamedExpr)):
            yield node.target, node.value, getattr(node, "annotation", None)
            continue
        elif isinstance(node, (ast.For, ast.comprehension)):
            pairs = [(node.target, node.iter)]
        elif isinstance(node, ast.With):
            pairs = [(item.optional_vars, item.context_expr) for item in node.items]
        else:
            continue
        for target, value in pairs:
            if isinstance(target, ast.Tuple):
                values = value.elts if isinstance(value, ast.Tuple) \
                    and len(value.elts) == len(target.elts) else [value] * len(target.elts)
                yield from ((one, other, None) for one, other in zip(target.elts, values))
            else:
                yield target, value, None


class Question:
    """A question of the file's map: its roots, and the chapters in which what they use is followed."""
    ROW = re.compile(r"^    ([a-z]+): ([A-Z][^?]{5,120}\?) What these use of chapters?\s+([\d, toand\n]+)\.\n"
                     r"((?: {8}.+\n)+)", re.MULTILINE)

    def __init__(self, calls: Calls, match: re.Match) -> None:
        self.name, self.words = match[1], " ".join(match[2].split())
        self.chapters: set[int] = set()
        for first, last in re.findall(r"(\d+)(?: to (\d+))?", match[3]):
            self.chapters |= {*range(int(first), int(last or first) + 1)}
        self.roots: set[str] = set()
        for group in " ".join(match[4].split()).partition("; and")[0].split(";"):
            owner, _, methods = group.strip().partition(": ")
            names = [f"{owner}.{method}" for method in methods.split() if method != "__doc__"]
            self.roots |= {*names} if names else calls.of_class(owner) or {owner}
            if "__doc__" in methods:                     # with the fields, but not all methods
                self.roots.add(owner)

    def code(self, calls: Calls) -> set[str]:
        """The names that answer it."""
        return calls.reached(self.roots, {name for name, nodes in calls.nodes.items() if nodes
                                          and calls.chapter_of(name) not in self.chapters}
                             - self.roots)


def questions(calls: Calls) -> dict[str, Question]:
    return {match[1]: Question(calls, match)
            for match in Question.ROW.finditer(ast.get_docstring(calls.tree, clean=False))}


@functools.lru_cache(maxsize=None)
def mapped() -> tuple[Calls, dict[str, Question]]:
    """The program's calls, and the questions of its map."""
    calls = Calls(PROGRAM)
    return calls, questions(calls)


def show(name: str) -> None:
    calls, asked = mapped()
    rows, last = calls.source.splitlines(), 0
    for number in sorted(calls.shown(asked[name].code(calls))):
        if number != last + 1:
            print()
        print(f"{number:6} {rows[number - 1]}")
        last = number


def main(arguments: list[str]) -> None:
    _, asked = mapped()
    if len(arguments) != 1 or arguments[0] not in asked:
        sys.exit("\n".join(["usage: python tests/calls.py QUESTION, which is one of", *(
            f"    {name:10} {question.words}" for name, question in asked.items())]))
    show(arguments[0])


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)        # a pager may be left at any line
    main(sys.argv[1:])
