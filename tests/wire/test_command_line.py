"""The program as people run it: a process with flags, an environment, signals and exit codes.

A fault of the user is one clear line and exit code 2 (1 where the machine is at fault), never a
traceback. Stopping drains and settles.
"""
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from engines import free_port
from support import (ADMIN_TOKEN, PATIENCE_S, ROOT, TOKEN, Gate, Hang, RawClient, Reply, Served,
                     call, compiled_program, program, proxy_environment, run_program, said, started,
                     until)

PROGRAM = str(ROOT / "ironcage_proxy.py")
CHAT = {"model": "gpt-4o-mini", "max_tokens": 9, "stream": True,
        "messages": [{"role": "user", "content": "hi"}]}
ECHO = {"model": "ironcage/echo", "max_tokens": 9,
        "messages": [{"role": "user", "content": "one two"}]}


def run(*argv, environ=None, cwd=None):
    """A finished run: (exit code, stdout, stderr)."""
    done = run_program(*argv, environ=environ, cwd=cwd)
    return done.returncode, done.stdout, done.stderr


# One line, no traceback.

BAD_USES = {
    "unknown flag": ["--prot", "1"],
    "unknown command": ["server"],
    "abbreviated flag": ["--budg", "1"],
    "port not a number": ["--port", "x"],
    "port too high": ["--port", "65536"],
    "negative port": ["--port=-1"],
    "budget not a number": ["--budget", "ten"],
    "negative budget": ["--budget=-1"],
    "infinite budget": ["--budget", "inf"],
    "budget of a variable that is not set": ["--budget", ""],
    "stop of a variable that is not set": ["--budget", "1", "--stop-at="],
    "a group twice": ["usage", "--by", "token,token"],
    "two forms of a report": ["usage", "--csv", "--json"],
    "a token that has expired": ["tokens", "add", "x", "expires=2020-01-01", "--config", "new.json"],
    "ledger of blanks": ["--ledger", " "],
    "token with a space": ["--token", "a b c d e f g h"],
    "short token": ["--token", "abc"],
    "one token twice": ["--token", TOKEN, "--admin-token", TOKEN],
    "base URL of another scheme": ["--openai-base-url", "ftp://x"],
    "base URL without a host": ["--openai-base-url", "https://"],
    "base URL with credentials": ["--openai-base-url", "https://user:pass@x"],
    "base URL with a query": ["--anthropic-base-url", "https://x/?a=1"],
    "base URL in the clear": ["--openai-base-url", "http://api.example.com"],
    "body limit of zero": ["--max-body-mb", "0"],
    "log format": ["--log-format", "xml"],
    "rule of bounds": ["--bound", "guess"],
    "price file that is not there": ["--pricing", "/nonexistent.json"],
    "price file that is a folder": ["--pricing", "/"],
    "host name": ["--host", "a b"],
    "host with a port that is none": ["--allow-host", "a:b"],
    "half a bracket": ["--allow-host", "[::1"],
}


def test_a_file_that_windows_marked_as_utf_8_is_read(tmp_path):
    config = tmp_path / "cage.json"
    config.write_bytes(b'\xef\xbb\xbf{"tokens": []}')

    assert 0 == run("check", "--port", "0", "--config", str(config))[0]


@pytest.mark.parametrize("argv", BAD_USES.values(), ids=BAD_USES)
def test_a_bad_use_is_one_line_and_exit_code_2(argv):
    code, out, err = run(*argv)

    assert (2, "") == (code, out)
    assert 1 == err.count("\n") and err.startswith("ironcage_proxy: ")
    assert not [secret for secret in (TOKEN, "a b c d", "user:pass") if secret in err]


@pytest.mark.parametrize("content", ["", "[]", "{", '{"a": }', "[" * 100_000])
def test_a_broken_price_file_is_one_line_and_exit_code_2(tmp_path, content):
    path = tmp_path / "prices.json"
    path.write_text(content)

    code, _, err = run("check", "--port", "0", "--pricing", str(path))

    assert (2, 1) == (code, err.count("\n"))
    assert str(path) in err


def test_a_key_that_cannot_be_one_is_named_and_not_shown():
    code, _, err = run("check", environ={"OPENAI_API_KEY": "sk-sec ret\nX: y"})

    assert (2, 1) == (code, err.count("\n"))
    assert "OPENAI_API_KEY" in err and "sec" not in err


def test_a_bad_value_in_the_environment_is_named_by_its_variable():
    code, _, err = run(environ={"IRONCAGE_OPENAI_BASE_URL": "nowhere"})

    assert 2 == code
    assert "IRONCAGE_OPENAI_BASE_URL" in err


def test_a_taken_port_is_one_line_and_exit_code_1():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])

        code, out, err = run("--port", port, "--token", TOKEN)

    assert (1, "", 1) == (code, out, err.count("\n"))
    assert port in err and "--port" in err


@pytest.mark.parametrize("host", ["192.0.2.7", "no.such.host.invalid"])
def test_an_address_of_another_machine_is_one_line_that_says_so(capsys, host):
    code, out, err = said(capsys, "--port", "0", "--host", host)

    assert (1, "", 1) == (code, out, err.count("\n"))
    assert host in err and "--host" in err and "--port" not in err


# Other commands.

def test_version_check_models_and_help_say_what_they_should():
    version = run("version")
    check = run("check", "--port", "0", "--budget", "2", environ={"OPENAI_API_KEY": "sk-canary"})
    models = run("models")
    usage = run("--help")

    assert [0, 0, 0, 0] == [version[0], check[0], models[0], usage[0]]
    assert re.fullmatch(r"ironcage_proxy \d+\.\d+\.\d+\n", version[1])
    assert "OPENAI_API_KEY is set" in check[1] and "ANTHROPIC_API_KEY is not set" in check[1]
    assert "$2.00" in check[1] and "sk-canary" not in check[1] + check[2]
    assert re.search(r"^gpt-4o-mini +openai +\$0\.15 +\$0\.60$", models[1], re.MULTILINE)
    assert "ironcage/echo" in models[1]
    assert "--anthropic-base-url" in usage[1]


def test_check_tells_where_models_go_and_at_which_price(tmp_path):
    config = tmp_path / "cage.json"
    config.write_text(json.dumps({"providers": {"ollama": {}},
                                  "models": {"fast": "gpt-4o-mini", "local": "ollama/qwen3"}}))

    aliases = run("check", "--port", "0", "--config", str(config))[1]
    named = run("check", "--port", "0", "claude-haiku-4-5", "nobody-knows")[1]

    assert "model     fast -> openai/gpt-4o-mini, input $0.15, output $0.60 for a million tokens" \
        in aliases
    assert "model     local -> ollama/qwen3, input $0.00, output $0.00 for" in aliases
    assert "claude-haiku-4-5 -> anthropic/claude-haiku-4-5, input $1.00, output $5.00" in named
    assert "nobody-knows -> openai/nobody-knows, no price is known" in named


@pytest.mark.parametrize("path", ["no/such/folder/x.db", ""])
def test_check_says_when_a_ledger_cannot_be_used(tmp_path, path):
    code, _, err = run("check", "--port", "0", "--ledger", str(tmp_path / path))

    assert (2, 1) == (code, err.count("\n")) and "ledger" in err


# Serving.

def test_two_files_in_an_empty_folder_are_enough(tmp_path):
    """`-I -S`: no site packages, no environment, no user folder."""
    for name in ("ironcage_proxy.py", "pricing.json"):
        shutil.copy(ROOT / name, tmp_path)
    with Served("--token", TOKEN, "--budget", "1", cwd=tmp_path,
                python=(sys.executable, "-I", "-S"), program="ironcage_proxy.py") as served:
        answer = call(served.port, "POST", "/v1/chat/completions", ECHO)
        code, _, err = served.stop()

    assert (200, 0) == (answer.status, code)
    assert "one two" == answer.json["choices"][0]["message"]["content"]
    assert "Traceback" not in err


def test_without_a_price_table_a_budget_is_refused_and_none_is_warned_of(tmp_path):
    program = shutil.copy(compiled_program(), tmp_path)

    refused = subprocess.run([sys.executable, program, "--budget", "1"], capture_output=True,
                             text=True, env={})
    with Served("--token", TOKEN, program=program) as served:
        answer = call(served.port, "POST", "/v1/chat/completions", ECHO)
        _, _, err = served.stop()

    assert (2, 1) == (refused.returncode, refused.stderr.count("\n"))
    assert 200 == answer.status
    assert "nothing is priced" in err


def test_a_token_that_was_made_is_shown_once_and_works():
    with Served() as served:
        banner = served.first_line + served.process.stdout.readline()
        token = re.search(r"OPENAI_API_KEY=(ic_\S{20,})", banner)[1]
        answer = call(served.port, "GET", "/ironcage/status", token=token)
        code, out, err = served.stop()

    assert (200, 0) == (answer.status, code)
    assert token not in err


def test_a_token_that_was_given_is_never_shown():
    with Served("--token", TOKEN, environ={"IRONCAGE_ADMIN_TOKEN": ADMIN_TOKEN}) as served:
        call(served.port, "GET", "/ironcage/status")
        _, out, err = served.stop()

    assert not [t for t in (TOKEN, ADMIN_TOKEN) if t in served.first_line + out + err]


def test_the_banner_says_address_shell_lines_keys_and_budget():
    with Served("--token", TOKEN, "--budget", "2.5",
                environ={"ANTHROPIC_API_KEY": "sk-ant-canary"}) as served:
        _, out, _ = served.stop()

    banner = served.first_line + out
    url = f"http://127.0.0.1:{served.port}"
    assert f"export OPENAI_BASE_URL={url}/v1 OPENAI_API_KEY=" in banner
    assert f"export ANTHROPIC_BASE_URL={url} ANTHROPIC_AUTH_TOKEN=" in banner
    assert "ANTHROPIC_API_KEY" in banner.split("provider keys:")[1]
    assert "$2.50" in banner and "restart" in banner and "sk-ant-canary" not in banner


def test_quiet_prints_only_what_cannot_be_known_otherwise():
    with Served("--quiet", "--token", TOKEN) as served:
        call(served.port, "POST", "/v1/chat/completions", ECHO)
        _, out, err = served.stop()

    assert f"http://127.0.0.1:{served.port}\n" == served.first_line
    assert ("", "") == (out, err)


full_disk = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full is Linux's")


ON_A_FULL_DISK = """
import sys
sys.stdout = open("/dev/full", "w", buffering=1)
import ironcage_proxy
sys.exit(ironcage_proxy.main())
"""


@full_disk
def test_a_full_disk_behind_the_output_is_one_line():
    done = run_program("models", code=ON_A_FULL_DISK)

    assert (1, 1) == (done.returncode, done.stderr.count("\n"))
    assert "No space left" in done.stderr and "Traceback" not in done.stderr


@full_disk
def test_a_full_disk_behind_the_output_ends_no_server():
    port = free_port()
    process = started("--port", str(port), "--token", TOKEN, code=ON_A_FULL_DISK)
    try:
        call_until_it_serves(port, process)
    finally:
        process.send_signal(signal.SIGTERM)

    assert 0 == process.wait(PATIENCE_S * 3)


def call_until_it_serves(port, process):
    def serves():
        assert process.poll() is None
        with contextlib.suppress(OSError):
            return 200 == call(port, "GET", "/healthz", token=None).status
    until(serves, "it serves")


@full_disk
def test_a_bill_that_cannot_be_printed_does_not_hide_how_the_command_ended():
    with open("/dev/full", "w") as full:
        process = started("--", sys.executable, "-c", "raise SystemExit(3)", stderr=full)

        assert 3 == process.wait(PATIENCE_S * 3)


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_finished_call_is_logged_in_the_originals_words(log_format):
    with Served("--token", TOKEN, "--log-format", log_format) as served:
        call(served.port, "POST", "/v1/chat/completions", ECHO)
        _, _, err = served.stop()

    line = next(line for line in err.splitlines() if "LLM request completed" in line)
    if log_format == "json":
        fields = json.loads(line)
        assert ("ironcage/echo", 2, 2, "0.000006") == tuple(fields[name] for name in (
            "model", "input_tokens", "output_tokens", "cost_usd"))
    else:
        for pair in ("model=ironcage/echo", "input_tokens=2", "cost_usd=0.000006"):
            assert pair in line
    assert "one two" not in err


def test_a_refusal_in_a_log_of_json_has_the_words_of_the_log_and_those_of_the_client():
    with Served("--token", TOKEN, "--budget", "1", "--log-format", "json") as served:
        refused = call(served.port, "POST", "/v1/chat/completions", {**ECHO, "n": 0})
        _, _, err = served.stop()

    lines = [json.loads(line) for line in err.splitlines() if line.startswith("{")]
    assert [refused.json["error"]["message"]] == [
        line["error"] for line in lines if line["message"] == "request refused"]


# Signals.

posix = pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")


@posix
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_stream_in_flight_finish_and_exits_0(mock, number):
    gate = Gate()
    mock.script(lambda request: mock.default_reply(request).with_steps(
        [mock.default_reply(request).steps[0], gate, *mock.default_reply(request).steps[1:]]))
    with Served("--token", TOKEN, "--budget", "1",
                environ=proxy_environment(mock)) as served, RawClient(served.port) as client:
        client.request("POST", "/v1/chat/completions", json.dumps(CHAT).encode())
        client.read_head()
        client.read_chunk()
        stopped = []
        stopping = threading.Thread(target=lambda: stopped.append(served.stop(number)))
        stopping.start()
        gate.event.set()
        rest = b"".join(iter(client.read_chunk, b""))
        stopping.join(PATIENCE_S * 3)

    assert rest.endswith(b"data: [DONE]\n\n")
    assert 0 == stopped[0][0]
    assert f"spent_usd=0.{mock.billed_microdollars:06d}" in stopped[0][2].replace('"', "")


@posix
def test_a_second_signal_cuts_at_once_settles_and_exits_0(mock):
    mock.script(Reply(headers=(("content-type", "text/event-stream"),), framing="chunked",
                      steps=(b": wait\n\n", Hang())))
    with Served("--token", TOKEN, "--budget", "1",
                environ=proxy_environment(mock)) as served, RawClient(served.port) as client:
        client.request("POST", "/v1/chat/completions", json.dumps(CHAT).encode())
        client.read_head()
        client.read_chunk()
        served.process.send_signal(signal.SIGTERM)
        refused = None
        while refused is None:                    # the first signal has been taken
            try:
                RawClient(served.port).close()
            except ConnectionError as err:        # refused, or reset as the listener closes
                refused = err
        code, _, log = served.stop()

    assert 0 == code
    assert "estimated" in log and "stopped" in log


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
@pytest.mark.skipif(getattr(os, "geteuid", lambda: 1)() != 0, reason="needs root to be others")
def test_a_process_of_the_same_user_cannot_read_the_environment_of_the_proxy():
    """Run as nobody, beside another process of nobody: /proc/PID/environ is closed to it."""
    nobody, python = 65534, "/usr/bin/python3"         # root's own Python is closed to nobody
    if not os.access(python, os.X_OK):
        pytest.skip(f"there is no {python} that nobody could run")
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        program = shutil.copy(PROGRAM, folder)
        with Served("--token", TOKEN, program=program, python=(python,), user=nobody,
                    environ={"OPENAI_API_KEY": "sk-canary"}) as served:
            read = subprocess.run(["cat", f"/proc/{served.process.pid}/environ"], user=nobody,
                                  capture_output=True)

    assert 0 != read.returncode
    assert b"sk-canary" not in read.stdout


SIGNALLED_INSIDE = """
import os, signal, sys, threading
import ironcage_proxy
wait = threading.Condition.wait
def wait_signalled(self, timeout=None):
    if timeout == 1:                              # the wait of the main thread
        os.kill(os.getpid(), signal.SIGTERM)      # while an Event's lock is held by this thread
    return wait(self, timeout)
threading.Condition.wait = wait_signalled
sys.exit(ironcage_proxy.main())
"""


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX")
def test_a_signal_stops_it_at_whatever_moment_it_comes():
    with Served("--token", TOKEN, code=SIGNALLED_INSIDE) as served:
        served.process.send_signal(signal.SIGTERM)

        assert 0 == served.process.wait(PATIENCE_S * 3)


# What a command takes.


def test_check_says_what_a_small_request_reserves(capsys):
    _, out, _ = said(capsys, "check", "--port", "0", "--bound", "bytes", "gpt-4o-mini")

    body = b'{"model":"gpt-4o-mini","messages":[{"role":"user","content":"' + b"x" * 1000 + b'"}]}'
    input_tokens = len(body) + 64                      # a little more, for what frames a message
    reserved = re.search(r"1,000 bytes with max_tokens 1000 reserve \$(\d\.\d+)", out)
    assert 600 + .15 * 1000 < float(reserved[1]) * 1e6 < 600 + .15 * (input_tokens + 100)
    assert "https://api.openai.com/v1/chat/completions" in out


def test_check_works_beside_a_proxy_that_serves_with_the_same_settings(tmp_path):
    ledger = str(tmp_path / "cage.db")
    with Served("--token", TOKEN, "--ledger", ledger) as served:
        code, out, err = run("check", "--port", str(served.port), "--ledger", ledger, "gpt-4o-mini")

    assert (0, "") == (code, err)
    assert "is served by a proxy now" in out and "0 calls" in out and "gpt-4o-mini ->" in out


def test_a_bad_variable_of_a_server_is_nothing_to_a_command_that_does_not_use_it(tmp_path):
    environ = {"IRONCAGE_BUDGET": "ten", "OPENAI_API_KEY": '"quoted"'}

    assert 0 == run("version", environ=environ)[0]
    assert 0 == run("models", environ=environ)[0]
    assert 2 == run("check", environ=environ)[0]


@pytest.mark.parametrize("more", [{"token": TOKEN}, {"quiet": False}, {"wait_s": 3}], ids=repr)
def test_an_embedder_may_name_any_setting(more):
    with program().LlmRouter(**more, environ={}) as router:
        assert more == {name: getattr(router._server.settings, name) for name in more}


def test_an_embedders_ledger_may_come_from_the_environment_as_its_budget_may(tmp_path):
    path = str(tmp_path / "cage.db")
    with program().LlmRouter(environ={"IRONCAGE_LEDGER": path, "IRONCAGE_BUDGET": "2"}) as router:
        assert (path, 2.0) == (router._server.settings.ledger_path, router.budget)


def old_python(version):
    """A Python of that version that runs, or the test is skipped."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    found = [*pyenv.glob(f"versions/{version}.*/bin/python"), shutil.which(f"python{version}")]
    for python in filter(None, found):
        if 0 == subprocess.run([python, "-c", ""], capture_output=True).returncode:
            return python
    pytest.skip(f"there is no Python {version}")


@pytest.mark.parametrize("argv", [[PROGRAM], ["-m", "ironcage_proxy"]])
@pytest.mark.parametrize("version", ["3.7", "3.8"])
def test_an_old_python_gets_one_line(version, argv):
    done = subprocess.run([old_python(version), *argv, "--version"], capture_output=True, text=True,
                          cwd=ROOT, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"})

    assert (1, 1, "") == (done.returncode, done.stderr.count("\n"), done.stdout)
    assert "needs Python 3.9 or newer" in done.stderr


def test_python_3_6_which_cannot_read_the_file_shows_the_line_that_says_what_is_needed():
    """It compiles the whole file before it runs any of it, and knows no annotations of the future."""
    done = subprocess.run([old_python("3.6"), PROGRAM], stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, encoding="utf-8")

    assert 1 == done.returncode
    assert "Python 3.9 or newer is needed" in done.stdout.splitlines()[1]
