"""Processes of the program without the start of a Python: one process has imported it, and forks.

A test that is about the start itself (another Python, its flags, a user, limits) starts a real one.
"""
from __future__ import annotations

import contextlib
import functools
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Optional, Sequence

ONE_AT_A_TIME = threading.Lock()
MAIN = "import sys, ironcage_proxy; sys.exit(ironcage_proxy.main())"


class Forked:
    """A process of the program, or of `code` that imports it, used like a subprocess.Popen whose
    stdout and stderr are pipes, or the file that is given. `handed` is a socket, its descriptor 3.
    """

    def __init__(self, program: str, argv: Sequence[str], environ: dict, *, cwd: Optional[str] = None,
                 stderr: Optional[object] = None, code: str = MAIN,
                 handed: Optional[socket.socket] = None) -> None:
        import resource
        outlet, stdout = os.pipe()
        self.stdout, self.stderr = os.fdopen(outlet), None
        with contextlib.ExitStack() as theirs:
            theirs.callback(os.close, stdout)
            if stderr is None:
                outlet, errors = os.pipe()
                self.stderr = os.fdopen(outlet)
                theirs.callback(os.close, errors)
            else:
                errors = stderr.fileno()
            self._report, report = os.pipe()
            theirs.callback(os.close, report)
            asked = json.dumps({
                "argv": [program, *argv], "environ": environ, "cwd": str(cwd or os.getcwd()),
                "code": code, "files": resource.getrlimit(resource.RLIMIT_NOFILE)})
            self._said, self.returncode = b"", None
            with ONE_AT_A_TIME:
                socket.send_fds(_parent_of(program)[0], [asked.encode() + b"\n"], [
                    stdout, errors, report, *([] if handed is None else [handed.fileno()])])
                self.pid = int(self._line(None))

    def _line(self, timeout: Optional[float]) -> bytes:
        """The next line of what is reported: the process id, then the exit code."""
        while b"\n" not in self._said:
            if not select.select([self._report], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("the program", timeout)
            more = os.read(self._report, 64)
            assert more, "the process that forks is gone"
            self._said += more
        line, _, self._said = self._said.partition(b"\n")
        return line

    def wait(self, timeout: Optional[float] = None) -> int:
        if self.returncode is None:
            self.returncode = int(self._line(timeout))
            os.close(self._report)
        return self.returncode

    def poll(self) -> Optional[int]:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: Optional[float] = None) -> tuple[str, str]:
        """All that it still says on stdout and stderr, to its end."""
        texts: dict = {}
        readers = [threading.Thread(target=lambda file=file: texts.update({file: file.read()}),
                                    daemon=True) for file in (self.stdout, self.stderr)]
        for reader in readers:
            reader.start()
        self.wait(timeout)
        for reader in readers:
            reader.join(timeout)
        self.close()
        return texts[self.stdout], texts[self.stderr]

    def close(self) -> None:
        for file in (self.stdout, self.stderr):
            if file is not None:
                file.close()


@functools.lru_cache(maxsize=None)
def _parent_of(program: str) -> tuple[socket.socket, subprocess.Popen]:
    """A process that has imported the program and forks at each request on this socket; it ends
    when the socket is closed, with this process at the latest."""
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen([sys.executable, __file__, str(theirs.fileno()), program],
                                   pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL,
                                   env={"PATH": os.environ["PATH"]})
    return ours, process


def fork_for_ever(requests: socket.socket) -> None:
    """Fork for each request; returns in the processes that are to be the program only."""
    while True:
        asked, descriptors, _, _ = socket.recv_fds(requests, 4096, 4)
        while asked and not asked.endswith(b"\n"):
            asked += requests.recv(4096)
        if not asked:
            os._exit(0)
        if not os.fork():
            requests.close()
            return watch(json.loads(asked), *descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        with contextlib.suppress(ChildProcessError):       # watchers that have ended
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def watch(asked: dict, stdout: int, errors: int, report: int, *handed: int) -> None:
    """Fork the program, report its process id and how it ends; returns in the program."""
    child = os.fork()
    if not child:
        os.close(report)
        return become(asked, stdout, errors, *handed)
    for descriptor in (stdout, errors, *handed):
        os.close(descriptor)
    os.write(report, b"%d\n" % child)
    os.write(report, b"%d\n" % os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    os._exit(0)


def become(asked: dict, stdout: int, errors: int, *handed: int) -> None:
    """Be what was asked for, as if a Python had been started for it."""
    import resource
    resource.setrlimit(resource.RLIMIT_NOFILE, asked["files"])
    kept = [os.dup(descriptor) for descriptor in (stdout, errors, *handed)]
    for number, descriptor in enumerate(kept, 1):
        os.dup2(descriptor, number)
    os.closerange(len(kept) + 1, max(kept) + 1)
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["environ"])
    sys.stdout = open(1, "w", closefd=False)
    sys.stderr = open(2, "w", closefd=False, buffering=1, errors="backslashreplace")
    sys.argv = asked["argv"]
    exec(compile(asked["code"], "<the code of a test>", "exec"), {"__name__": "__main__"})


if __name__ == "__main__":
    sys.path[0] = str(Path(sys.argv[2]).parent)
    import ctypes  # noqa: F401  (what the program imports when it first needs it)
    import sqlite3  # noqa: F401
    import ironcage_proxy  # noqa: F401
    gc.freeze()                         # or a collection copies what the processes share
    fork_for_ever(socket.socket(fileno=int(sys.argv[1])))
