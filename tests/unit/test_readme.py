"""The README says what the program does: settings, routes, error codes and sums are compared."""
import json
import os
import re
from pathlib import Path

import pytest
from support import ROOT, program

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_settings_table_equals_the_programs():
    module = program()
    table = README[README.index("<!-- settings"):README.index("Provider keys:")]
    rows = [tuple(cell.strip(" `") for cell in line.strip("|").split("|"))
            for line in table.splitlines() if line.startswith("| `--")]

    live = [(row.flag, row.env, row.help) for row in module.SETTINGS]
    assert live == [(flag, env, text) for flag, env, _, text in rows]


def test_the_defaults_in_the_settings_table_are_the_programs():
    settings = program().settings_from([], {})
    fields = {row.flag: row.field for row in program().SETTINGS}

    for flag, shown in re.findall(r"^\| `(--\S+)` \|[^|]*\| `([^`]+)` \|", README, re.MULTILINE):
        name = fields[flag]
        if name.endswith("_base_url"):
            provider = [p for p in settings.providers if p.name == name.split("_")[0]]
            assert shown == provider[0].base_url
        elif name in ("max_body_bytes", "max_memory_bytes"):
            assert int(shown) * 1024 * 1024 == getattr(settings, name)
        elif name != "pricing_path":
            assert shown == str(getattr(settings, name))


def error_classes(base):
    for child in base.__subclasses__():
        yield child
        yield from error_classes(child)


def test_every_error_code_is_in_the_readme():
    errors = README[README.index("\n## Errors"):README.index("\n## The ledger")]
    documented = set(re.findall(r"`([a-z_]+)`", errors))
    codes = {error.openai_code for error in error_classes(program().IroncageError)
             if error.openai_code is not None and error.status not in (408, 411, 413, 415, 426)}

    assert codes - documented == set()


def test_every_metered_and_own_route_is_in_the_readme():
    module = program()

    for path in (*module.METERED_APIS, *module.OWN_ROUTES):
        assert f"{path}" in README


def test_the_worked_sum_of_the_budget_section_is_right():
    """400 bytes, 1,000 tokens of output, gpt-4o-mini."""
    module = program()
    book = module.PriceBook.load(str(ROOT / "pricing.json"))
    start, end = b'{"model":"gpt-4o-mini","max_tokens":1000,"messages":[{"role":"user",' \
        b'"content":"', b'"}]}'
    body = start + b"x" * (400 - len(start) - len(end)) + end
    bound = module.bound_of_request("chat", module.parse_json_object(body),
                                    book.price("gpt-4o-mini"))
    usage = {"prompt_tokens": 90, "completion_tokens": 200}

    assert "670 microdollars are reserved" in README
    assert 670 == bound.microdollars(1000)
    assert "134 microdollars are charged" in README
    assert 134 == book.cost("gpt-4o-mini", usage, api="chat", provider="openai")


def test_the_refusal_of_the_60_second_start_is_the_one_shown():
    module = program()
    details = module.budget_exceeded(module.Budget("proxy", 1, 1, 0)).details

    for name in details:
        assert f'"{name}"' in README


@pytest.mark.parametrize("chapter", ["3", "4", "5", "7", "9", "10", "13", "14", "16"])
def test_the_audit_section_names_chapters_that_exist(chapter):
    contents = re.findall(r"^ +(\d+)\. ", program().__doc__, re.MULTILINE)

    assert chapter in contents


def test_the_chapters_that_the_readme_names_exist():
    contents = re.findall(r"^ +(\d+)\. ", program().__doc__, re.MULTILINE)
    named = re.findall(r"\bchapters? (\d+)(?: to (\d+))?", README)

    assert named
    assert {number for pair in named for number in pair if number} <= {*contents}


def test_the_test_command_is_one_line_that_makes_its_own_environment():
    command = re.search(r"<!-- test command -->\n```\n(.+)\n```", README)

    assert command is not None
    assert command[1].startswith("python3 -m venv ")


def matrix(text):
    """{(client, model): cells} of the table that tests/clients/test_agents.py writes."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")]
            for line in text.splitlines() if line.startswith("|")][2:]
    return {(re.sub(r" [\d.]+$", "", client), model): cells
            for client, models, *cells in rows for model in models.split(", ")}


MATRIX = Path(os.environ.get("IRONCAGE_MATRIX") or "none")


@pytest.mark.skipif(not MATRIX.is_file(), reason="IRONCAGE_MATRIX names no table of a run")
def test_the_table_of_agents_is_that_of_the_last_run():
    """Versions move on, and models come and go; what the README says of one must be so."""
    shown = matrix(README[README.index("<!-- matrix -->"):README.index("<!-- /matrix -->")])
    ran = matrix(MATRIX.read_text(encoding="utf-8"))
    missing = {client for client, model in ran if model == "not installed"}

    assert {client for client, _ in shown} == {client for client, _ in ran}
    assert {row: cells for row, cells in shown.items() if row in ran and row[0] not in missing} \
        == {row: ran[row] for row in shown if row in ran and row[0] not in missing}
    assert [] == [row for row in shown if "FAILED" in shown[row]]


def test_the_providers_without_a_price_are_named():
    module = program()
    rows = json.loads((ROOT / "pricing.json").read_text())
    sellers = {row.get("litellm_provider") for row in rows.values()} | {
        key.split("/")[0] for key in rows}
    missing = {row.name for row in module.KNOWN_PROVIDERS.values()
               if not row.is_free and sellers.isdisjoint({row.name, *row.sold_as})}

    said = re.search(r"It has no rows for (.*?): under a budget", README, re.DOTALL)[1]

    assert missing == {*re.findall(r"`(\w+)`", said)}
