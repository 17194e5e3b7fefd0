"""Mutation testing of the file, chapter by chapter: `python tests/bench/mutants.py --help`.

A mutant differs from the file in one place: a comparison, a condition, a sign, a bound by one, or
a safety branch (an `if` that raises, returns or continues) that is taken out. It is killed where a
test of its chapter fails. Never part of the default run; figures of the last run: tests/README.md.
"""
from __future__ import annotations

import argparse
import ast
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Iterator, NamedTuple

HERE = Path(__file__).resolve().parents[2]
FILE = "ironcage_proxy.py"
# Title of a chapter -> its tests, which are to kill its mutants, quickest first.
TESTS = {
    "Limits and tables": "unit/test_limits_and_tables.py unit/test_errors.py "
                         "wire/test_providers.py wire/test_manners.py",
    "Errors": "unit/test_errors.py",
    "JSON bodies": "unit/test_json_bodies.py unit/test_regressions.py",
    "Money": "unit/test_money.py",
    "Bounds": "unit/test_bounds.py unit/test_hosted_tools.py unit/test_known_counts.py "
              "unit/test_admission.py",
    "Event streams": "unit/test_event_streams.py unit/test_settlement.py",
    "Usage of answers": "unit/test_event_streams.py unit/test_settlement.py wire/test_identity.py "
                        "faults/test_every_way_to_end.py",
    "The neutral form": "unit/test_the_neutral_form.py unit/test_messages.py "
                        "unit/test_chat_completions.py unit/test_translators.py "
                        "unit/test_translation_fuzz.py",
    "Names, ids and losses": "unit/test_names_ids_and_losses.py unit/test_messages.py "
                             "unit/test_chat_completions.py unit/test_translators.py "
                             "unit/test_responses.py unit/test_peer_bugs.py "
                             "wire/test_sloppy_servers.py unit/test_translation_fuzz.py "
                             "wire/test_translated_calls.py",
    "JSON schemas": "unit/test_json_schemas.py unit/test_messages.py "
                    "unit/test_chat_completions.py unit/test_responses.py "
                    "unit/test_translation_fuzz.py",
    "Chat completions": "unit/test_chat_completions.py unit/test_peer_bugs.py "
                        "unit/test_messages.py unit/test_translators.py "
                        "wire/test_sloppy_servers.py unit/test_translation_fuzz.py "
                        "wire/test_hosts.py wire/test_three_dialects.py",
    "Messages": "unit/test_messages.py unit/test_chat_completions.py unit/test_translators.py "
                "unit/test_responses.py wire/test_three_dialects.py",
    "Responses": "unit/test_responses.py unit/test_chat_completions.py unit/test_messages.py "
                 "wire/test_three_dialects.py",
    "Translators": "unit/test_translators.py unit/test_messages.py unit/test_responses.py "
                   "unit/test_chat_completions.py wire/test_three_dialects.py "
                   "wire/test_translated_calls.py",
    "The echo model": "unit/test_the_echo_model.py wire/test_the_cage.py "
                      "wire/test_three_dialects.py",
    "Cost controller": "unit/test_cost_controller.py unit/test_admission.py unit/test_periods.py "
                       "wire/test_stop_at.py",
    "Ledger": "unit/test_ledger.py unit/test_histories.py faults/test_one_ledger_one_server.py "
              "faults/test_crashes.py",
    "Callers and configuration": "unit/test_callers_and_configuration.py wire/test_tokens.py "
                                 "wire/test_providers.py wire/test_keys.py wire/test_manners.py "
                                 "wire/test_operations.py",
    "HTTP on a socket": "unit/test_http_wire.py unit/test_memory.py unit/test_slot.py "
                        "faults/test_malformed_requests.py",
    "Upstream": "unit/test_upstream.py unit/test_http_wire.py wire/test_keys.py "
                "wire/test_identity.py wire/test_answers_without_a_body.py "
                "faults/test_every_way_to_end.py",
    "Settlement": "unit/test_settlement.py wire/test_learned_counts.py "
                  "faults/test_every_way_to_end.py",
    "Events and metrics": "unit/test_events_and_metrics.py wire/test_embedding.py "
                          "wire/test_operations.py",
    "Iron Cage server": "unit/test_iron_cage_server.py wire/test_server_mode.py",
    "Shared budget": "unit/test_shared_engine.py faults/test_shared_budget.py",
    "Router": "unit/test_router.py wire/test_the_cage.py wire/test_waiting.py "
              "wire/test_providers.py wire/test_translated_calls.py wire/test_access.py "
              "wire/test_learned_counts.py wire/test_money_attacks.py "
              "faults/test_every_way_to_end.py",
    "Dashboard": "unit/test_dashboard_page.py wire/test_dashboard.py",
    "Server": "unit/test_server.py faults/test_malformed_requests.py faults/test_places.py "
              "wire/test_access.py wire/test_operations.py wire/test_tokens.py wire/test_stop_at.py",
    "Settings and command line": "unit/test_settings_and_command_line.py "
                                 "wire/test_command_line.py wire/test_operations.py "
                                 "wire/test_attribution.py wire/test_tokens.py wire/test_prices.py "
                                 "faults/test_restarts.py faults/test_serves_or_ends.py",
    "Embedding": "unit/test_embedded_router.py wire/test_embedding.py wire/test_server_mode.py",
}
SWAPPED = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
           ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn,
           ast.NotIn: ast.In, ast.Add: ast.Sub, ast.Sub: ast.Add, ast.And: ast.Or, ast.Or: ast.And}
LEAVES = (ast.Raise, ast.Return, ast.Continue, ast.Break)


class Mutant(NamedTuple):
    line: int
    what: str
    source: str


def chapters(source: str) -> dict[str, range]:
    """Title -> lines of each chapter."""
    starts = [(number, match[1]) for number, line in enumerate(source.splitlines(), 1)
              for match in [re.match(r"# ==== \d+\. (.*?) =+$", line)] if match]
    ends = [number for number, _ in starts[1:]] + [source.count("\n") + 1]
    return {title: range(number, end) for (number, title), end in zip(starts, ends)}


def mutants(source: str, lines: range) -> Iterator[Mutant]:
    """All mutants of some lines."""
    rows, tree = source.splitlines(keepends=True), ast.parse(source)
    docs = {id(node.body[0].value) for node in ast.walk(tree)
            if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)) and node.body
            and isinstance(node.body[0], ast.Expr)}
    for node in ast.walk(tree):
        if getattr(node, "lineno", 0) not in lines or id(node) in docs:
            continue
        if isinstance(node, ast.If) and not node.orelse and isinstance(node.body[-1], LEAVES):
            yield _with(rows, node.test, "False", "safety branch")
        if isinstance(node, ast.Compare) and len(node.ops) == 1 \
                and type(node.ops[0]) in SWAPPED:
            swapped = ast.Compare(node.left, [SWAPPED[type(node.ops[0])]()], node.comparators)
            yield _with(rows, node, f"({ast.unparse(swapped)})", "comparison")
        elif isinstance(node, ast.BoolOp):
            swapped = ast.BoolOp(SWAPPED[type(node.op)](), node.values)
            yield _with(rows, node, f"({ast.unparse(swapped)})", "condition")
        elif isinstance(node, ast.BinOp) and type(node.op) in SWAPPED:
            swapped = ast.BinOp(node.left, SWAPPED[type(node.op)](), node.right)
            yield _with(rows, node, f"({ast.unparse(swapped)})", "sign")
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            yield _with(rows, node, f"({ast.unparse(node.operand)})", "not")
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("min", "max"):
            other = "max" if node.func.id == "min" else "min"
            yield _with(rows, node.func, other, "bound")


def _with(rows: list[str], node: ast.expr, text: str, what: str) -> Mutant:
    """The source with a node in other words."""
    first, last = node.lineno - 1, node.end_lineno - 1
    before = rows[first].encode()[:node.col_offset].decode()
    after = rows[last].encode()[node.end_col_offset:].decode()
    more = "\n" * (last - first)            # so that lines keep their numbers
    flat = " ".join(text.split())
    changed = before + flat + after.rstrip("\n") + "\n" + more
    return Mutant(node.lineno, f"{what}: {flat[:60]}",
                  "".join([*rows[:first], changed, *rows[last + 1:]]))


def survives(folder: Path, mutant: Mutant, tests: list[str], patience_s: int) -> bool:
    """Whether no test fails. One that hangs, or does not compile, counts as killed."""
    try:
        compile(mutant.source, FILE, "exec")
    except SyntaxError:
        return False
    (folder / FILE).write_text(mutant.source, encoding="utf-8")
    try:
        done = subprocess.run([sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider",
                               *tests], cwd=folder, capture_output=True, timeout=patience_s,
                              env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"})
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("titles", nargs="*", metavar="CHAPTER", help="titles; all of TESTS if none")
    parser.add_argument("--sample", type=int, default=40, help="mutants a chapter (0: all)")
    parser.add_argument("--only", default="", help="kinds that begin so, as 'safety'")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--lines", type=int, nargs="*", default=[],
                        help="mutants of these lines only, as those of the survivors of a run")
    parser.add_argument("--patience", type=int, default=300, help="seconds for one mutant's tests")
    asked = parser.parse_args()
    source = (HERE / FILE).read_text(encoding="utf-8")
    places = chapters(source)
    for title in asked.titles or TESTS:
        found = [one for one in mutants(source, places[title]) if one.what.startswith(asked.only)
                 and (not asked.lines or one.line in asked.lines)]
        chosen = random.Random(asked.seed).sample(found, min(asked.sample or len(found),
                                                            len(found)))
        tests = [f"tests/{name}" for name in TESTS[title].split()]
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "project"
            shutil.copytree(HERE, folder, ignore=shutil.ignore_patterns(".git", "*.pyc", ".venv"))
            began, alive = time.monotonic(), []
            if not survives(folder, Mutant(0, "no mutant", source), tests, 2 * asked.patience):
                sys.exit(f"{title}: its tests fail without a mutant, and would kill every one")
            for mutant in sorted(chosen):
                if survives(folder, mutant, tests, asked.patience):
                    alive.append(mutant)
                    print(f"   survived, line {mutant.line}, {mutant.what}", flush=True)
        print(f"{title}: {len(chosen) - len(alive)} of {len(chosen)} killed (of {len(found)} "
              f"possible), {time.monotonic() - began:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
