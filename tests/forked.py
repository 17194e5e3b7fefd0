"""Processes of the program without the start of a Python: one process has imported it, and forks.

A test that is about the start itself (another Python, its flags, a user, limits) starts a real one.
"""
from __future__ import annotations

import atexit
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


def read_once(program) -> None:
    """Do once what each start would do alike: read the price table that is shipped, which no test
    changes; make the parser of command lines, and parse the same command line; and free the large
    block after which the allocator keeps such blocks (in a process that has used its memory it
    takes 4 ms)."""
    path_of_shipped, read_prices = str(Path(program.__file__).with_name("pricing.json")), \
        program.read_prices
    shipped = read_prices(path_of_shipped)
    program.read_prices = lambda path: shipped if path == path_of_shipped else read_prices(path)
    parser_of = functools.lru_cache(maxsize=None)(program._parser)
    program._parser = lambda rows, **words: parser_of(tuple(rows), **words)
    parsed = functools.lru_cache(maxsize=None)(program.parse_arguments)
    program.parse_arguments = lambda argv: dict(parsed(tuple(argv)))
    program.parse_arguments([])
    bytes(program.FREED_BLOCK_BYTES)
    program.FREED_BLOCK_BYTES = 0


def fork_for_ever(requests: socket.socket) -> None:
    """Fork the program for each request, report its process id and how it ends; returns in the
    processes that are to be the program only."""
    reports: dict[int, int] = {}                        # process id -> where its end is reported
    woken, wakes = os.pipe()
    os.set_blocking(wakes, False)
    signal.set_wakeup_fd(wakes)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    while True:
        if woken in select.select([requests, woken], [], [])[0]:
            os.read(woken, 4096)
            while reports:
                child, status = os.waitpid(-1, os.WNOHANG)
                if not child:
                    break
                report = reports.pop(child)
                with contextlib.suppress(BrokenPipeError):      # nobody waits for it
                    os.write(report, b"%d\n" % os.waitstatus_to_exitcode(status))
                os.close(report)
            continue
        asked, descriptors, _, _ = socket.recv_fds(requests, 4096, 4)
        while asked and not asked.endswith(b"\n"):
            asked += requests.recv(4096)
        if not asked:
            os._exit(0)
        stdout, errors, report, *handed = descriptors
        child = os.fork()
        if not child:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for descriptor in (requests.detach(), woken, wakes, report, *reports.values()):
                os.close(descriptor)
            return become(json.loads(asked), stdout, errors, *handed)
        reports[child] = report
        for descriptor in (stdout, errors, *handed):
            os.close(descriptor)
        os.write(report, b"%d\n" % child)


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
    try:
        exec(compile(asked["code"], "<the code of a test>", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        if isinstance(end.code, (int, type(None))):
            leave(end.code or 0)
        raise


def leave(code: int) -> None:
    """End as a Python does, but for freeing all that it has imported, which takes 20 ms of CPU.
    Returns where what was printed cannot be written, which Python has its own words for."""
    threading._shutdown()
    atexit._run_exitfuncs()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code & 255)


if __name__ == "__main__":
    sys.path[0] = str(Path(sys.argv[2]).parent)
    import ctypes  # noqa: F401  (what the program imports when it first needs it)
    import sqlite3  # noqa: F401
    import ironcage_proxy
    read_once(ironcage_proxy)
    ironcage_proxy.STOP_POLL_S, ironcage_proxy.LET_IN_TRIES = 0.01, 100       # as long in all
    ironcage_proxy.WAIT_POLL_S = 0.02
    gc.freeze()                         # or a collection copies what the processes share
    fork_for_ever(socket.socket(fileno=int(sys.argv[1])))
