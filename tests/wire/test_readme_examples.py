"""The README's examples do what it says, as written, in a folder with nothing but two files.

Each block is of one kind, and each kind is run or, where it needs another machine, read by whatever
reads it there. A block of no kind is a failure.
"""
from __future__ import annotations

import configparser
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import pytest
from support import (OPENAI_KEY, PATIENCE_S, ROOT, TOKEN, call, compiled_program, program,
                     start_proxy)

README = (ROOT / "README.md").read_text(encoding="utf-8")
A_COMMAND = re.compile(r"([A-Z_]+=\S+ +(\\\n *)?)*(python3|curl|export) ")
PORT = 8787                             # the one that the README names
ELSEWHERE = re.compile(r"https://|\.internal\b")       # names of other machines


def blocks(text):
    """(block, the words up to the next one) of each block, fenced or indented."""
    parts = re.split(r"^(```\w*\n[^`]*```\n|(?: {4}[^\n]*\n|\n(?= {4}))+)", text,
                     flags=re.MULTILINE)
    return [(re.sub(r"^(```.*\n?| {4})", "", block, flags=re.MULTILINE).strip("\n"), words)
            for block, words in zip(parts[1::2], parts[2::2])]


# What a block begins with -> its kind; the first that fits.
KINDS = {
    r"python3 -m venv ": "the test command",                 # run by .ci/run
    r"sqlite3 ": "a query",                                  # run by test_attribution.py
    A_COMMAND.pattern: "shell", r"\{": "JSON", r"scrape_configs:|readinessProbe:": "YAML",
    r"\[(Socket|Service)\]": "unit", r"FROM ": "Dockerfile", r"location |upstream ": "nginx",
    r"\S+ \{ reverse_proxy ": "Caddy", r"model_provider = ": "TOML", r"from \w+ import ": "Python",
}


def kind_of(block):
    return next((kind for start, kind in KINDS.items() if re.match(start, block)), None)


def of_kind(kind):
    return [block for block, _ in blocks(README) if kind_of(block) == kind]


def test_every_block_is_of_a_kind_and_every_kind_is_there():
    assert [] == [block for block, _ in blocks(README) if kind_of(block) is None]
    assert {*KINDS.values()} == {kind_of(block) for block, _ in blocks(README)}


# Commands.

@pytest.fixture
def folder(tmp_path):
    """The two files, and a PATH whose python3 is this one, with the program as it compiles it, and
    whose agents say what they were given."""
    if shutil.which("curl") is None:
        pytest.skip("curl is not on this machine")
    place, programs = tmp_path / "work", tmp_path / "bin"
    place.mkdir(), programs.mkdir()
    for name in ("ironcage_proxy.py", "pricing.json"):
        shutil.copy(ROOT / name, place)
    compiled = f'[ "$1" != ironcage_proxy.py ] || {{ shift; set -- "{compiled_program()}" "$@"; }}'
    for name, line in (("python3", f'{compiled}\nexec "{sys.executable}" "$@"'),
                       *((agent, 'echo "ran $0 at $ANTHROPIC_BASE_URL"')
                         for agent in ("claude", "codex", "opencode", "aider", "python"))):
        (programs / name).write_text(f"#!/bin/sh\n{line}\n")
        (programs / name).chmod(0o755)
    fcntl = pytest.importorskip("fcntl", reason="the examples are for a POSIX shell")
    with open(Path(tempfile.gettempdir()) / "ironcage-readme-examples", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)            # one port for all test runs of this machine
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", PORT))
            except OSError:
                pytest.skip(f"something else listens on port {PORT}")
        yield place


@contextlib.contextmanager
def group_of(command, folder):
    """The command in a shell, and its process group ended afterwards."""
    environ = {"PATH": f"{folder.parent / 'bin'}{os.pathsep}{os.environ['PATH']}",
               "HOME": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(["sh", "-c", command], cwd=folder, env=environ, text=True,
                               start_new_session=True, stdin=subprocess.DEVNULL,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(PATIENCE_S)
        process.stdout.close()


def lines_of(block):
    """The command lines of a block: each begins with a program, variables or a comment's end."""
    return [line for line in re.split(r"\n(?=(?:python3|export|curl|[A-Z_]+=))", block) if line]


def serves(command):
    """Whether it runs until it is stopped."""
    return "ironcage_proxy.py" in command and not re.search(
        r" -- |ironcage_proxy\.py [a-z]", command)


def test_the_commands_run_as_written_one_after_another(folder):
    """From the first to the last, in one folder: what one leaves is there for the next."""
    commands = [(line, words) for block, words in blocks(README) if kind_of(block) == "shell"
                and not ELSEWHERE.search(block) for line in lines_of(block)]
    assert any(serves(command) for command, _ in commands) and len(commands) > 10
    with contextlib.ExitStack() as server:
        for command, words in commands:
            if serves(command):
                server.close()                      # the reader stops the one before
                process = server.enter_context(group_of(command, folder))
                assert f"http://127.0.0.1:{PORT}" in process.stdout.readline()
                continue
            with group_of(command, folder) as process:
                said = process.communicate(timeout=PATIENCE_S * 3)[0]
            assert 0 == process.returncode, (command, said)
            claims = re.findall(r"`(x-ironcage-[a-z-]+: \S+)`", words) if "curl" in command else []
            assert [] == [claim for claim in claims if "novel" not in command
                          and "status" not in command and claim not in said], said
            assert "novel" not in command or "HTTP/1.1 402" in said
            assert " -- " not in command or "spent $" in said, said
            assert "Traceback" not in said
    assert {"ironcage_proxy.py", "pricing.json", "cage.json"} == {
        path.name for path in folder.iterdir() if not path.name.startswith("cage.db")}


def test_commands_for_other_machines_are_uses_that_parse():
    elsewhere = [block for block in of_kind("shell") if ELSEWHERE.search(block)]
    for block in elsewhere:
        exported = {}
        for command in lines_of(block):
            words = shlex.split(command.replace("\\\n", " ").replace("…", "0123456789"))
            given = dict(word.split("=", 1) for word in words if re.match("[A-Z_]+=", word))
            if words[0] == "export":
                exported.update(given)
                continue
            argv = words[words.index("ironcage_proxy.py") + 1:]
            settings = program().settings_from(argv, {**exported, **given})
            assert settings.shared or settings.server_url
    assert 3 == len(elsewhere)


def test_the_lines_to_paste_are_those_of_the_banner():
    [pasted] = [block for block in of_kind("shell") if "ANTHROPIC_AUTH_TOKEN=" in block]
    proxy = start_proxy(None)
    banner = program().banner(proxy).replace(f":{proxy.port}", f":{PORT}")
    proxy.stop()

    for line in pasted.splitlines():
        assert line.replace("ic_...", "<the token you chose>") in banner


# Files for this program and for others.

def test_each_json_is_a_configuration_or_what_the_program_says(proxy_for, tmp_path):
    module, kinds = program(), set()
    for block in of_kind("JSON"):
        fields = json.loads(block.replace('"…"', f'"{"0" * 64}"'))
        kinds.add(next(iter(fields)))
        if fields.keys() <= module.CONFIG_FIELDS.keys():
            path = tmp_path / "cage.json"
            path.write_text(json.dumps(fields))
            config = module.load_config(str(path), {})
            module.prices_under(config, module.PriceBook.load(str(ROOT / "pricing.json")))
        elif "error" in fields:
            told, shown = refusal_of_the_first_example(proxy_for), fields["error"]
            assert told.pop("message").startswith(shown.pop("message").rstrip("…"))
            assert shown == {name: told[name] for name in shown}
        else:
            alert = alert_at(proxy_for, module.Budget("alice", 10_000_000, 8_010_000, 0, None, "day"))
            assert {**alert, "at": fields["at"], "version": fields["version"]} == fields

    assert {"tokens", "providers", "prices", "error", "text"} == kinds


def refusal_of_the_first_example(proxy_for):
    """What the last request of the 60 seconds gets, byte for byte as curl sends it."""
    proxy, asked = proxy_for("--budget", "0.001"), []
    for block in of_kind("shell"):
        asked += [call(proxy.port, "POST", "/v1/chat/completions", body.encode())
                  for body in re.findall(r"-d '(\{.*?\})'", block, re.DOTALL)]
    assert [200, 402] == [answer.status for answer in asked]
    return asked[-1].json["error"]


def alert_at(proxy_for, budget):
    """The alert of a budget that has passed 80 %, as it waits for a receiver that is not there."""
    router = proxy_for("--alert-url", "http://127.0.0.1:9/").router
    assert [50] == [*router.reporter.thresholds.passed(budget._replace(spent=budget.limit // 2))]
    router.controller.accounts.known = lambda scopes: [budget]
    router.reporter._report_thresholds(())
    return router.reporter.alerts.outbox._waiting[0]


def test_the_paths_in_yaml_are_served(proxy):
    paths = re.findall(r"path: (/[\w/]+)", "\n".join(of_kind("YAML")))

    assert ["/ironcage/metrics", "/readyz", "/healthz"] == paths
    assert [200] * 3 == [call(proxy.port, "GET", path).status for path in paths]
    assert {str(PORT)} == {*re.findall(r"(?:port: |127\.0\.0\.1:)(\d+)",
                                       "\n".join(of_kind("YAML")))}


def test_the_units_start_what_parses():
    sections = {}
    for block in of_kind("unit"):
        parser = configparser.ConfigParser()
        parser.optionxform = str
        parser.read_string(block)
        sections.update({name: dict(parser[name]) for name in parser.sections()})

    settings = program().settings_from([], {})
    assert f"{settings.host}:{settings.port}" == sections["Socket"]["ListenStream"]
    _, script, *argv = shlex.split(sections["Service"]["ExecStart"])
    assert "ironcage_proxy.py" == Path(script).name
    ledger = program().settings_from(argv, {}).ledger_path
    assert f"/var/lib/{sections['Service']['StateDirectory']}" == str(Path(ledger).parent)


def test_the_container_starts_what_parses(tmp_path):
    [block] = of_kind("Dockerfile")
    steps = [line.split(" ", 1) for line in block.splitlines()]
    words = dict(steps)
    environ = dict(pair.split("=") for pair in words["ENV"].split())
    (tmp_path / "key").write_text(OPENAI_KEY)
    assert environ.pop("OPENAI_API_KEY_FILE").startswith("/run/secrets/")

    python, script, *argv = json.loads(words["CMD"])
    settings = program().settings_from(
        argv, {**environ, "OPENAI_API_KEY_FILE": str(tmp_path / "key")})
    assert ["FROM", "COPY", "RUN", "USER", "ENV", "VOLUME", "CMD"] == [step for step, _ in steps]
    assert f"install -d -o {words['USER']} {words['VOLUME']}" == words["RUN"]
    assert words["COPY"].split()[-1] + "ironcage_proxy.py" == script
    assert ("0.0.0.0", ("ironcage",), Path(words["VOLUME"])) == (
        settings.host, settings.allow_hosts, Path(settings.ledger_path).parent)


def test_nginx_takes_its_blocks(tmp_path):
    nginx = shutil.which("nginx") or "/usr/sbin/nginx"
    if not os.access(nginx, os.X_OK):
        pytest.skip("nginx is not on this machine")
    for block in of_kind("nginx"):
        inside = block if block.startswith("upstream") else f"server {{ {block} }}"
        (tmp_path / "nginx.conf").write_text(
            f"pid {tmp_path}/pid; error_log stderr; events {{}} http {{ {inside} }}")
        done = subprocess.run([nginx, "-t", "-p", str(tmp_path), "-c", str(tmp_path / "nginx.conf")],
                              capture_output=True, text=True)
        assert 0 == done.returncode, done.stderr
        assert "proxy_set_header Host $host" in block


def test_caddy_is_sent_to_where_the_proxy_listens():
    [block] = of_kind("Caddy")

    assert re.fullmatch(rf"[\w.]+ \{{ reverse_proxy 127\.0\.0\.1:{PORT} \}}", block)


def test_the_toml_of_codex_names_the_proxy_and_the_variable_of_the_token():
    tomllib = pytest.importorskip("tomllib", reason="tomllib came with Python 3.11")
    [block] = of_kind("TOML")
    config = tomllib.loads(block)

    provider = config["model_providers"][config["model_provider"]]
    assert (f"http://127.0.0.1:{PORT}/v1", "OPENAI_API_KEY") == (
        provider["base_url"], provider["env_key"])


def test_the_program_that_embeds_a_router_runs(monkeypatch, capsys):
    """With a client that only says what it was given."""
    [block] = of_kind("Python")
    monkeypatch.syspath_prepend(str(ROOT))
    seen = types.SimpleNamespace()
    names = {"openai": types.SimpleNamespace(OpenAI=lambda **given: vars(seen).update(given))}

    exec(compile(block, "README.md", "exec"), names)

    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/v1", seen.base_url) and len(seen.api_key) > 20
    assert "0.0 (0.0, 5.0) {" in capsys.readouterr().out
    assert not names["router"].is_running and TOKEN != seen.api_key
