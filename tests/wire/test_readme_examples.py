"""The README's first examples do what it says, as written, in a folder with nothing but two files."""
from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from support import PATIENCE_S, ROOT

fcntl = pytest.importorskip("fcntl", reason="the examples are for a POSIX shell")
README = (ROOT / "README.md").read_text(encoding="utf-8")
A_COMMAND = re.compile(r"([A-Z_]+=\S+ +(\\\n *)?)*(python3|curl|export) ")
PORT = 8787                             # the one that the README names


def shell_examples(text):
    """(command, the words up to the next block) of each block that a shell can run offline."""
    parts = re.split(r"^(```\w*\n[^`]*```\n|(?: {4}[^\n]*\n)+)", text, flags=re.MULTILINE)
    blocks = [(re.sub(r"^(```.*\n| {4})", "", block, flags=re.MULTILINE), words)
              for block, words in zip(parts[1::2], parts[2::2])]
    return [(command, words) for command, words in blocks
            if A_COMMAND.match(command) and "https://" not in command]


@pytest.fixture
def folder(tmp_path):
    """The two files, and a PATH whose python3 is this one and whose agents say what they were given."""
    if shutil.which("curl") is None:
        pytest.skip("curl is not on this machine")
    place, programs = tmp_path / "work", tmp_path / "bin"
    place.mkdir(), programs.mkdir()
    for name in ("ironcage_proxy.py", "pricing.json"):
        shutil.copy(ROOT / name, place)
    for name, line in (("python3", f'exec "{sys.executable}" "$@"'),
                       *((agent, 'echo "ran $0 at $ANTHROPIC_BASE_URL"')
                         for agent in ("claude", "codex", "opencode", "aider", "python"))):
        (programs / name).write_text(f"#!/bin/sh\n{line}\n")
        (programs / name).chmod(0o755)
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


def serves(command):
    """Whether it runs until it is stopped."""
    return "ironcage_proxy.py" in command and not re.search(
        r" -- |ironcage_proxy\.py [a-z]", command)


def test_the_first_three_examples_run_as_written(folder):
    examples = shell_examples(README)[:3]
    assert 3 == len(examples) and any(serves(command) for command, _ in examples)
    with contextlib.ExitStack() as server:
        for command, words in examples:
            if serves(command):
                server.close()                      # the reader stops the one before
                process = server.enter_context(group_of(command, folder))
                assert f"http://127.0.0.1:{PORT}" in process.stdout.readline()
                continue
            with group_of(command, folder) as process:
                said = process.communicate(timeout=PATIENCE_S * 3)[0]
            assert 0 == process.returncode, said
            claims = re.findall(r"`(x-ironcage-[a-z-]+: \S+)`", words)
            assert [] == [claim for claim in claims if claim not in said], said
            assert not re.search(r"\b402\b", words) or "HTTP/1.1 402" in said
            assert " -- " not in command or "spent $" in said, said
            assert "Traceback" not in said
    assert {"ironcage_proxy.py", "pricing.json"} == {path.name for path in folder.iterdir()}
