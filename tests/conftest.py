"""Fixtures: a mock provider, and proxies in front of it that are stopped after each test."""
import contextlib
import gc
import json
import logging
import os
import shutil
import sys
import threading
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent / "unit"))          # translation_checker
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engines import RealEngine
from forked import read_once
from support import MockProvider, program, proxy_environment, start_proxy, until


MEMORY_FOLDER = "/dev/shm"


read_once(program())
program().STOP_POLL_S = 0.002            # thousands of proxies are stopped: 0.05 s would add up
program().CONFIG_LOOK_S = 0.05           # hundreds of tests change a file that a proxy reads
program().RETRY_POLL_S = 0.01            # and a few wait for a second try


def pytest_configure(config):
    """Thousands of ledgers are flushed to disk: keep them in memory, where there is room."""
    config.addinivalue_line("markers", "soak: long; run with -m soak")
    if os.path.isdir(MEMORY_FOLDER) and shutil.disk_usage(MEMORY_FOLDER).free > 2 * 1024 ** 3:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", MEMORY_FOLDER)


def pytest_collection_modifyitems(config, items):
    """Leave the long tests out of a run that does not ask for them."""
    if config.getoption("-m"):
        return
    long_ones = [item for item in items if "soak" in item.keywords]
    items[:] = [item for item in items if "soak" not in item.keywords]
    config.hook.pytest_deselected(items=long_ones)


def pytest_collection(session):
    """What is collected stays: to look through it for garbage, over and over, took a tenth of a run.
    """
    gc.disable()


def pytest_collection_finish(session):
    gc.freeze()
    gc.enable()


def pytest_sessionfinish(session):
    """pytest looks for garbage five times at its end, through all that a run has kept: once is enough.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def log_as_imported():
    """The command line sets the log up for its process; a test is one of many in this one."""
    log = program().log
    log.handlers[:], log.propagate = [], True
    log.setLevel(logging.NOTSET)


@pytest.fixture
def logged(caplog):
    """Return all that the log says so far: of each record its level, its words and its fields."""
    caplog.set_level(logging.DEBUG, "ironcage")
    return lambda: "\n".join(
        f"{record.levelname} {record.getMessage()} {getattr(record, 'fields', {})}"
        for record in [*caplog.records])


@pytest.fixture
def mock():
    with MockProvider() as provider:
        yield provider


@pytest.fixture
def proxy_for(mock):
    """Start proxies: proxy_for("--budget", "1.00", timeouts={...}); all are stopped at the end."""
    before = set(threading.enumerate())
    started = []

    def start(*argv, **options):
        started.append(start_proxy(mock, *argv, **options))
        return started[-1]

    yield start
    for proxy in started:
        proxy.stop()

    def leaked():
        return [thread.name for thread in set(threading.enumerate()) - before
                if thread.is_alive() and not thread.name.startswith("mock-")]
    with contextlib.suppress(AssertionError):
        until(lambda: not leaked())              # one that failed may be at its last line
    assert leaked() == []


@pytest.fixture
def proxy_with(mock, proxy_for, tmp_path):
    """Start a proxy with a configuration; `environ` is added to that of the mock."""
    def start(config, *flags, environ=None):
        path = tmp_path / "cage.json"
        path.write_text(json.dumps(config))
        return proxy_for("--config", str(path), *flags,
                         environ={**proxy_environment(mock), **(environ or {})})
    return start


@pytest.fixture
def proxy(proxy_for):
    """A proxy with a comfortable budget of ten dollars."""
    return proxy_for("--budget", "10.00")


@pytest.fixture(scope="session")
def engine(tmp_path_factory):
    """An engine of shared budgets, which all tests of a run share; each makes its own cage."""
    started = RealEngine(tmp_path_factory.mktemp("engine"))
    yield started
    started.stop()
