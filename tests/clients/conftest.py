"""Writes the table of test_agents.py to the file that IRONCAGE_MATRIX names."""
import os
from pathlib import Path

COLUMNS = ("two tools", "web search", "compaction", "subagent")


def pytest_terminal_summary(terminalreporter):
    rows = {}                               # (client, model) -> {column: cell}
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, ()):
            found = dict(getattr(report, "user_properties", ()))
            if report.when == "call" and "row" in found:
                cells = rows.setdefault(tuple(found["row"]), {})
                if "column" in found:
                    cells[found["column"]] = "FAILED" if outcome == "failed" \
                        else found.get("cell", "yes")
    if os.environ.get("IRONCAGE_MATRIX") and rows:
        Path(os.environ["IRONCAGE_MATRIX"]).write_text(table(rows), encoding="utf-8")


def default_first(row):
    (_, model), _ = row
    return "default" not in model, model


def table(rows):
    """Models of one client with the same cells share a line; what is the same on every model of a
    client (nothing offered, or refused) is run on the first alone."""
    lines = ["| client | models | " + " | ".join(COLUMNS) + " |", "|---" * 6 + "|"]
    for client in sorted({client for client, _ in rows}, key=str.lower):
        known = {column: cell for (name, _), cells in rows.items() if name == client
                 for column, cell in cells.items() if cell in ("not offered", "refused")
                 and sum(column in other for (owner, _), other in rows.items()
                         if owner == client) == 1}
        alike = {}                          # cells -> models
        for (name, model), cells in sorted(rows.items(), key=default_first):
            if name == client:
                cells = {**known, **cells} if cells else cells
                alike.setdefault(tuple(cells.get(column, "") for column in COLUMNS),
                                 []).append(model)
        lines += [f"| {client} | {', '.join(models)} | {' | '.join(cells)} |"
                  for cells, models in alike.items()]
    return "\n".join(lines) + "\n"
