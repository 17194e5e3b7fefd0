"""Engines of a shared budget for tests: a real Valkey or Redis server, and one that is scripted."""
from __future__ import annotations

import contextlib
import secrets
import shutil
import signal
import socket
import subprocess
import threading
from pathlib import Path

import pytest
from support import PATIENCE_S, pause, program, until

SERVER = shutil.which("redis-server") or shutil.which("valkey-server")


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


class RealEngine:
    """A server of its own on a free port, with a folder of its own; it can be killed and come back.
    """

    def __init__(self, folder: Path, *config: str, port: int = 0) -> None:
        if SERVER is None:
            pytest.skip("neither redis-server nor valkey-server is on the PATH")
        self.folder, self.config, self.port = folder, config, port or free_port()
        self.url = f"redis://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            [SERVER, "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder),
             "--save", "", "--unixsocket", str(self.folder / "sock"), *self.config],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until(self._answers, "the engine starts")

    def _answers(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(
                ("127.0.0.1", self.port), 1) as sock:
            sock.sendall(b"PING\r\n")
            return not sock.recv(64).startswith(b"-LOADING")
        return False

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE_S)

    def pause(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def ask(self, *words: object) -> object:
        """One command, on a connection of our own."""
        client = program().Engine(program().parse_engine_url(self.url), program().Slot(), 5)
        try:
            return client.ask(words)[0]
        finally:
            client.close()

    def cage(self) -> str:
        """A new cage, by its name."""
        name = f"cage-{secrets.token_hex(6)}"
        client = program().Engine(program().parse_engine_url(self.url), program().Slot(), 5)
        program().make_cage(client, name)
        client.close()
        return name

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.go_on()
        self.kill()


RUN_ID = "0" * 40
INFO = f"# Server\r\nrun_id:{RUN_ID}\r\nmaxmemory_policy:noeviction\r\n".encode()


class FakeEngine:
    """Answers RESP by a script: `answers` maps the first word of a command, or a command and the
    name of its script, to the bytes of the reply; None hangs, "" closes the connection."""

    def __init__(self) -> None:
        self.answers = {}
        self.seen = []                          # commands, as lists of bytes
        self._sockets = []
        self._listener = socket.socket()
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen(64)
        self.port = self._listener.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}"
        threading.Thread(target=self._accept, name="mock-engine", daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                self._sockets.append(sock)
                threading.Thread(target=self._serve, args=(sock,), name="mock-engine",
                                 daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        with contextlib.suppress(OSError, ValueError), sock, sock.makefile("rb") as reader:
            while True:
                line = reader.readline()
                if not line:
                    return
                words = []
                for _ in range(int(line[1:])):
                    size = int(reader.readline()[1:])
                    words.append(reader.read(size + 2)[:-2])
                self.seen.append(words)
                reply = self.answer_to(words)
                if reply is None:
                    pause(PATIENCE_S, "it hangs")
                    return
                if reply == b"":
                    return
                sock.sendall(reply)

    def answer_to(self, words):
        name = words[0].decode()
        if name == "EVALSHA":
            digests = {digest: script for script, digest in program().SCRIPT_DIGESTS.items()}
            name = digests[words[1].decode()]
        if name in self.answers:
            answer = self.answers[name]
            return answer(words) if callable(answer) else answer
        return {
            "INFO": b"$%d\r\n%b\r\n" % (len(INFO), INFO), "HGET": b"$1\r\ng\r\n",
            "PING": b"+PONG\r\n", "CONFIG": b"*0\r\n", "restarted": many(b":1\r\n"),
            "beat": many(many(), BUDGET),
            "HDEL": b":1\r\n", "scopes": many(NIL, BUDGET), "budgets": many(NIL, BUDGET),
            "take": many(b"$18\r\n9|1795996800|proxy\r\n", BUDGET),
            "settle": many(b"$7\r\nsettled\r\n", BUDGET),
        }.get(name, b"-ERR unknown command\r\n")

    def close(self) -> None:
        self._listener.close()
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


NIL = b"$-1\r\n"
BUDGET = b"$27\r\nproxy|10000000|0|0||total|0\r\n"     # limit, spent, reserved, stop, period, since


def many(*replies: bytes) -> bytes:
    return b"*%d\r\n" % len(replies) + b"".join(replies)
