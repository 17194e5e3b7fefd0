"""A ledger cannot be fooled into forgetting: no second server gets on a live one by any path, no
other file stands in for one, and a file that is changed under the server takes no new calls."""
import contextlib
import os
import shutil
import sqlite3
import subprocess
import sys
import threading

import pytest
from support import (PATIENCE_S, ROOT, TOKEN, MockProvider, Served, call, program,
                     proxy_environment, run_program, started)

ic = program()
PROGRAM = str(ROOT / "ironcage_proxy.py")
CHAT = {"model": "gpt-4o-mini", "max_tokens": 400,
        "messages": [{"role": "user", "content": "hello there"}]}
IN_USE = "another ironcage_proxy has it open"

posix = pytest.mark.skipif(os.name != "posix", reason="links and modes are POSIX")
linux = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the file beside it is locked")


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "cage.db")


@contextlib.contextmanager
def serving(path, *argv):
    """A server on a ledger, with a provider behind it."""
    with MockProvider() as mock, Served(
            "--token", TOKEN, "--ledger", path, "--quiet", "--budget", "10", *argv,
            environ=proxy_environment(mock)) as server:
        yield server


def chat(server):
    return call(server.port, "POST", "/v1/chat/completions", CHAT)


def spent(server):
    return call(server.port, "GET", "/ironcage/status").json["spent_microdollars"]


def start_in_vain(path, cwd=None):
    """Start a second server that does not wait: what it says, which must be one line."""
    done = run_program("--port", "0", "--ledger", path, "--no-wait-for-ledger", cwd=cwd)
    assert (2, "", 1) == (done.returncode, done.stdout, done.stderr.count("\n")), done
    return done.stderr


def row(**more):
    return {**dict.fromkeys(ic.LEDGER_COLUMNS), "request_id": "r", "admitted_s": 1, "token": "t",
            "provider": "p", "model": "m", "api": "chat", "stream": 0, "bound_microdollars": 77,
            **more}


def open_in_vain(path):
    with pytest.raises(ic.Misconfigured, match=IN_USE):
        ic.SqliteLedger(path)


def spent_in(path):
    """What a stopped ledger holds."""
    return ic.usage_report(path, 0)["total"]["cost_microdollars"]


# A second server.

def by_the_same_path(path):
    return path


def by_a_symlink(path):
    os.symlink(path, path + ".link")
    return path + ".link"


def by_a_symlinked_folder(path):
    folder = os.path.dirname(path)
    os.symlink(folder, folder + ".link")
    return os.path.join(folder + ".link", "cage.db")


def by_a_detour(path):
    return os.path.join(os.path.dirname(path), "..", os.path.basename(os.path.dirname(path)),
                        "cage.db")


def by_a_hard_link(path):
    os.link(path, path + ".hard")
    return path + ".hard"


def by_a_hard_link_in_another_folder(path):
    os.mkdir(path + ".folder")
    os.link(path, os.path.join(path + ".folder", "other.db"))
    return os.path.join(path + ".folder", "other.db")


def by_the_same_path_without_the_file_beside_it(path):
    os.unlink(path + ".lock")
    return path


def by_a_hard_link_without_the_file_beside_it(path):
    os.unlink(path + ".lock")
    return by_a_hard_link(path)


WAYS = [by_the_same_path, by_a_symlink, by_a_symlinked_folder, by_a_detour, by_a_hard_link,
        by_a_hard_link_in_another_folder, by_the_same_path_without_the_file_beside_it,
        by_a_hard_link_without_the_file_beside_it]


@linux
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_second_server_is_refused_by_every_path_and_the_first_goes_on(path, way):
    with serving(path) as server:
        assert 200 == chat(server).status
        open_in_vain(way(path))
        open_in_vain(path)
        assert 200 == chat(server).status

        before = spent(server)
        server.stop()
    assert before == spent_in(path) > 0


@linux
@pytest.mark.parametrize("way", [by_the_same_path, by_a_symlink, by_a_hard_link],
                         ids=lambda way: way.__name__)
def test_a_second_server_waits_for_the_first_and_knows_what_it_spent(path, way):
    with serving(path) as first:
        chat(first)
        second = started("--port", "0", "--token", TOKEN, "--ledger", way(path), "--quiet")
        try:
            waiting = second.stderr.readline()
            before = spent(first)
            first.stop()
            port = int(second.stdout.readline().strip().rpartition(":")[2])

            assert "waiting for the ledger: " + IN_USE in waiting and "seconds=30" in waiting
            assert before == call(port, "GET", "/ironcage/status").json["spent_microdollars"] > 0
        finally:
            second.kill()
            second.communicate()


def test_a_second_server_that_does_not_wait_ends_in_one_line(path):
    with serving(path):
        assert IN_USE in start_in_vain(path)


def test_a_wait_ends(path):
    ledger = ic.SqliteLedger(path)

    with pytest.raises(ic.Misconfigured, match=IN_USE):
        ic.SqliteLedger(path, wait_s=0.2)
    ledger.close()
    ic.SqliteLedger(path, wait_s=1).close()


@posix
def test_of_many_that_start_at_once_on_a_new_ledger_one_serves(path):
    processes = [started("--port", "0", "--token", TOKEN, "--ledger", path, "--quiet",
                         "--no-wait-for-ledger") for _ in range(6)]
    try:
        lines = [process.stdout.readline() for process in processes]
        serving_ones = [process for process, line in zip(processes, lines) if line]

        assert 1 == len(serving_ones)
        assert {2} == {process.wait(PATIENCE_S) for process in processes
                       if process not in serving_ones}
    finally:
        for process in processes:
            process.kill()
            process.communicate()


@linux
def test_a_ledger_that_another_makes_at_the_same_moment_is_not_overwritten(path, monkeypatch):
    """The file beside it, which keeps them apart, is removed between their two steps."""
    lock_database, others = ic.LedgerLock._lock_database, []

    def overtaken(lock, *arguments):
        if not others:
            others.append(None)
            os.unlink(path + ".lock")
            others.append(ic.SqliteLedger(path))
            others[-1].intent(row())
        return lock_database(lock, *arguments)

    monkeypatch.setattr(ic.LedgerLock, "_lock_database", overtaken)
    open_in_vain(path)

    others[-1].intent(row(request_id="r2"))
    assert 154 == spent_in(path)
    others[-1].close()


@linux
@pytest.mark.parametrize("moment", ["_lock_database", "wait"])
def test_a_ledger_that_is_replaced_while_it_is_opened_is_never_served_unlocked(path, monkeypatch,
                                                                              moment):
    ic.SqliteLedger(path).close()
    step, seen = getattr(ic.LedgerLock, moment), []

    def replaced(lock, *arguments):
        outcome = step(lock, *arguments)
        if not seen:
            replace_by_a_copy(path)
        seen.append(outcome)
        return outcome

    monkeypatch.setattr(ic.LedgerLock, moment, replaced)
    try:
        ledger = ic.SqliteLedger(path)
    except ic.Misconfigured as err:
        assert "moved, removed or replaced" in str(err) or IN_USE in str(err)
    else:
        assert ledger._lock.identity == ic._identity_at(path)
        ledger.close()


def spend_and_be_killed(path):
    with serving(path) as server:
        chat(server)
        server.process.kill()
        server.process.wait(PATIENCE_S)


@posix
def test_a_ledger_whose_process_was_killed_is_free_at_once(path):
    spend_and_be_killed(path)
    with serving(path, "--no-wait-for-ledger") as server:
        assert spent(server) > 0


@linux
@pytest.mark.parametrize("folder", ["", "elsewhere"])
def test_another_name_of_a_ledger_does_not_hide_what_is_in_the_log(path, folder):
    """The log of what a killed server spent is beside the name that it was started with."""
    spend_and_be_killed(path)
    os.makedirs(os.path.join(os.path.dirname(path), folder), exist_ok=True)
    other = os.path.join(os.path.dirname(path), folder, "other.db")
    os.link(path, other)

    assert "other names (hard links)" in start_in_vain(other)
    os.unlink(other)
    with serving(path) as server:
        assert spent(server) > 0


# A descriptor of a database that is closed drops SQLite's locks on it.

def visit(path):
    """Another program opens the ledger for writing, reads and leaves: without SQLite's lock on
    it, it would take the ledger's log for one that nobody uses, and delete it."""
    subprocess.run([sys.executable, "-c", "import sqlite3, sys; db = sqlite3.connect(sys.argv[1]);"
                    "print(db.execute('SELECT COUNT(*) FROM calls').fetchone()); db.close()", path],
                   check=True, capture_output=True, timeout=PATIENCE_S)


@linux
@pytest.mark.parametrize("disturb", [
    lambda path: None, open_in_vain, lambda path: open_in_vain(by_a_hard_link(path)),
    lambda path: open_in_vain(by_the_same_path_without_the_file_beside_it(path)),
    lambda path: ic.usage_report(path, 0), lambda path: ic._ledger_state(path)],
    ids=["nothing", "a second one", "by a hard link", "without the file beside it", "usage",
         "check"])
def test_nothing_in_this_process_drops_sqlites_locks_on_a_live_ledger(path, disturb):
    ledger = ic.SqliteLedger(path)
    ledger.intent(row())
    disturb(path)
    visit(path)

    assert os.path.exists(path + "-wal")
    ledger.intent(row(request_id="r2"))
    assert 154 == spent_in(path)
    ledger.close()


@linux
def test_a_ledger_can_be_opened_again_and_again_with_one_descriptor(path):
    def descriptors():
        return [name for name in os.listdir("/proc/self/fd")
                if os.path.realpath(f"/proc/self/fd/{name}").startswith(path)]

    for _ in range(5):
        ledger = ic.SqliteLedger(path)
        open_in_vain(path)
        ledger.close()

    assert 1 == len(descriptors())


# Beside a running proxy.

@posix
def test_check_usage_and_audit_work_beside_a_running_proxy_and_leave_it_alone(path):
    with serving(path) as server:
        chat(server)
        flags = ("--ledger", path)
        done = [run_program(*argv, *flags) for argv in (
            ("check", "--port", str(server.port)), ("usage",), ("audit",))]
        assert [0, 0, 0] == [one.returncode for one in done], [one.stderr for one in done]
        check, usage, audit = (one.stdout for one in done)

        assert f"port {server.port} is served by a proxy now" in check
        assert "ledger    1 calls, $0.0" in check
        assert "1 rows" in audit and "gpt-4o-mini" in usage
        open_in_vain(path)
        visit(path)
        assert os.path.exists(path + "-wal")
        assert 200 == chat(server).status


@posix
def test_check_makes_no_file_and_says_what_it_finds(path):
    new = run_program("check", "--port", "0", "--ledger", path)
    nowhere = run_program("check", "--port", "0", "--ledger", path + "/no/folder.db")
    with open(path, "wb"):
        pass
    empty = run_program("check", "--port", "0", "--ledger", path)

    assert (0, 2, 2) == (new.returncode, nowhere.returncode, empty.returncode)
    assert "none yet" in new.stdout
    assert "no folder" in nowhere.stderr and "empty" in empty.stderr
    assert ["cage.db"] == os.listdir(os.path.dirname(path))


# Another file in its place.

def another_database(path, *statements):
    db = sqlite3.connect(path, isolation_level=None)
    for statement in statements:
        db.execute(statement)
    db.close()


NO_LEDGERS = {
    "empty": lambda path: open(path, "wb").close(),
    "text": lambda path: shutil.copy(PROGRAM, path),
    "a broken header": lambda path: open(path, "wb").write(b"SQLite format 3\0" + b"\xff" * 4_000),
    "another program's": lambda path: another_database(path, "CREATE TABLE notes (text)"),
    "another program's, with versions": lambda path: another_database(
        path, "CREATE TABLE notes (text)", "PRAGMA user_version = 1"),
    "another program's, with calls": lambda path: another_database(
        path, "CREATE TABLE calls (number, at)", "PRAGMA user_version = 1"),
    "another program's, in WAL mode": lambda path: another_database(
        path, "PRAGMA journal_mode = WAL", "CREATE TABLE notes (text)"),
    "a database without tables": lambda path: another_database(
        path, "CREATE TABLE notes (text)", "DROP TABLE notes"),
    "a device": lambda path: os.symlink("/dev/zero", path),
    "a pipe": os.mkfifo if os.name == "posix" else None,
    "a folder": os.mkdir,
}


@posix
@pytest.mark.parametrize("name", NO_LEDGERS)
def test_what_is_no_ledger_is_refused_in_one_sentence_and_not_touched(path, name):
    NO_LEDGERS[name](path)
    regular = os.path.isfile(path)
    before = open(path, "rb").read() if regular else None

    for use in (ic.SqliteLedger, lambda path: ic.usage_report(path, 0), ic._ledger_state):
        with pytest.raises(ic.Misconfigured) as caught:
            use(path)
        message = str(caught.value)
        assert path in message.replace("/dev/zero", path) and "\n" not in message
        assert any(words in message for words in ("it is ", "Is a directory"))
    if regular:
        assert before == open(path, "rb").read()


def test_a_ledger_that_is_broken_inside_is_refused_in_one_sentence(path):
    """What was spent is read by the Router; the file's head and its newest rows are whole."""
    ledger = ic.SqliteLedger(path)
    for _ in range(300):
        ledger.intent(row(request_id="x" * 500))
    ledger.close()
    with open(path, "r+b") as file:
        file.seek(10 * 4_096)
        file.write(b"\xff" * 4_096)

    assert "malformed" in start_in_vain(path)


def test_what_was_spent_that_cannot_be_read_is_one_sentence_too(path):
    """As in a reload, which then changes nothing."""
    ledger = ic.SqliteLedger(path)
    ledger._db.close()

    with pytest.raises(ic.Misconfigured, match="cannot be read"):
        ledger.spent("a", 0)
    ledger.close()


@posix
def test_an_emptied_ledger_does_not_begin_at_0_and_its_log_is_kept(path):
    spend_and_be_killed(path)
    os.truncate(path, 0)

    assert "it is empty" in start_in_vain(path)
    assert os.path.getsize(path + "-wal") > 0


@posix
def test_a_log_without_its_ledger_is_no_new_ledger(path):
    spend_and_be_killed(path)
    os.rename(path, path + ".away")

    assert "cage.db-wal is there" in start_in_vain(path)
    os.rename(path + ".away", path)
    with serving(path) as server:
        assert spent(server) > 0


DIE = """
import os, sys
import ironcage_proxy as ic
where, path = sys.argv[1:]
def die(*_): os._exit(9)
if where == "before":
    os.rename = die
elif where == "after":
    rename = os.rename
    os.rename = lambda *names: (rename(*names), die())
elif where == "open":
    ic.SqliteLedger._open_database = die
elif where == "truncate":
    os.truncate = die
else:
    def half(db):
        db.execute("BEGIN")
        db.execute("CREATE TABLE half (a)")
        db.execute("INSERT INTO half VALUES (zeroblob(100000))")
        if where == "whole":
            db.execute("COMMIT")
        die()
    ic._migrate = half
ic.SqliteLedger(path)
"""


@posix
@pytest.mark.parametrize("where", ["truncate", "half", "whole", "before", "after", "open"])
def test_a_crash_while_a_ledger_is_made_locks_nobody_out(path, where):
    died = run_program(where, path, code=DIE)
    assert 9 == died.returncode

    ledger = ic.SqliteLedger(path)
    ledger.intent(row())
    assert 77 == ledger.spent(None, 0)
    ledger.close()
    assert [] == [name for name in os.listdir(os.path.dirname(path)) if "unfinished" in name]


# Changed under a running server.

def move(path):
    os.rename(path, path + ".away")


def remove(path):
    os.unlink(path)


def replace_by_a_copy(path):
    shutil.copy(path, path + ".copy")
    os.replace(path + ".copy", path)


def replace_by_nothing(path):
    open(path + ".empty", "wb").close()
    os.replace(path + ".empty", path)


def empty(path):
    os.truncate(path, 0)


def cut(path):
    os.truncate(path, os.path.getsize(path) // 2)


def remove_the_log(path):
    os.unlink(path + "-wal")


def remove_its_index(path):
    os.unlink(path + "-shm")


def move_the_folder(path):
    os.rename(os.path.dirname(path), os.path.dirname(path) + ".away")


@linux
@pytest.mark.parametrize("change", [
    move, remove, replace_by_a_copy, replace_by_nothing, empty, cut, remove_the_log,
    remove_its_index, move_the_folder], ids=lambda change: change.__name__)
def test_a_ledger_that_is_changed_under_the_server_takes_no_new_calls(path, change, mock,
                                                                      proxy_for, logged):
    server = proxy_for("--ledger", path, "--budget", "10")
    assert 200 == chat(server).status
    change(path)
    refused = [chat(server) for _ in range(2)]

    assert [503, 503] == [answer.status for answer in refused]
    assert "iron_cage_ledger_unavailable" == refused[0].json["error"]["type"]
    assert "cage.db" in refused[0].json["error"]["message"]
    assert 1 == logged().count("the ledger takes no new calls")
    assert 1 == len(mock.seen) and spent(server) == mock.billed_microdollars


@linux
def test_a_ledger_that_is_put_back_takes_calls_again_and_has_lost_nothing(path, mock, proxy_for,
                                                                          logged):
    server = proxy_for("--ledger", path)
    chat(server)
    os.rename(path, path + ".away")
    refused = chat(server)
    os.rename(path + ".away", path)
    again = chat(server)
    server.stop()

    assert (503, 200) == (refused.status, again.status)
    assert "the ledger is back" in logged()
    assert mock.billed_microdollars == spent_in(path) > 0


def test_a_ledger_that_was_cut_short_is_not_trusted_when_it_has_grown_again(path):
    ledger = ic.SqliteLedger(path)
    whole = os.path.getsize(path)
    for size in (0, whole + 4_096):
        os.truncate(path, size)

        with pytest.raises(ic.LedgerUnavailable, match="cut short"):
            ledger.intent(row())
    ledger.close()


def test_what_happens_to_a_ledger_is_logged_also_while_nobody_calls(path, logged):
    server = ic.ProxyServer(ic.settings_from(["--port", "0", "--ledger", path], {}))
    try:
        os.rename(path, path + ".away")
        server._looked_s = 0
        server.service_actions()

        assert "the ledger takes no new calls" in logged()
    finally:
        os.rename(path + ".away", path)
        server.stop()


@linux
def test_a_ledger_that_grows_in_many_threads_is_not_taken_for_a_shorter_one(path):
    ledger = ic.SqliteLedger(path)
    refused = []

    def write(number):
        for count in range(150):
            try:
                ledger.intent(row(request_id=f"{number}-{count}" + "x" * 300))
            except ic.LedgerUnavailable as err:
                refused.append(err)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert [] == refused
    assert 8 * 150 * 77 == ledger.spent(None, 0)
    ledger.close()


# Where a database cannot be locked itself: Windows, macOS.

@pytest.fixture
def without_flock(monkeypatch):
    monkeypatch.setattr(ic, "LOCKS_DATABASE", False)


@pytest.mark.usefixtures("without_flock")
def test_elsewhere_the_file_beside_it_is_locked(path):
    ledger = ic.SqliteLedger(path)
    open_in_vain(path)
    ledger.intent(row())
    ledger.close()

    ledger = ic.SqliteLedger(path)
    assert 77 == ledger.spent(None, 0)
    ledger.close()


@posix
@pytest.mark.usefixtures("without_flock")
def test_elsewhere_a_server_whose_file_beside_it_is_gone_takes_no_new_calls(path):
    first = ic.SqliteLedger(path)
    first.intent(row())
    os.unlink(path + ".lock")
    second = ic.SqliteLedger(path)

    with pytest.raises(ic.LedgerUnavailable, match="cage.db.lock was moved, removed or replaced"):
        first.intent(row(request_id="r2"))
    second.intent(row(request_id="r3"))
    assert 154 == second.spent(None, 0)
    second.close()
    first.close()
