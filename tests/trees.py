"""The syntax trees of the program and of the tests: each is parsed, and walked, once."""
from __future__ import annotations

import ast
import functools
from pathlib import Path

PROGRAM = Path(__file__).resolve().parents[1] / "ironcage_proxy.py"


@functools.lru_cache(maxsize=None)
def source_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@functools.lru_cache(maxsize=None)
def tree_of(path: Path) -> ast.Module:
    return ast.parse(source_of(path))


@functools.lru_cache(maxsize=None)
def walked(node: ast.AST) -> list[ast.AST]:
    return [*ast.walk(node)]
