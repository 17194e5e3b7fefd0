"""Speed, as ratios against a naive proxy of the standard library in the same run.

    python tests/bench/run.py [--quick] [--dialects | --shared]

`--dialects` runs the nine pairs of dialects alone: CPU as ratios to the client's own API and, where
IRONCAGE_BEFORE names another ironcage_proxy.py, to what that one takes. `--shared` runs what a budget
in an engine costs (redis-server or valkey-server on the PATH), beside one in the process, alone.

The provider, the load, the naive proxy and the proxy are processes of their own; rounds are
interleaved and medians are taken, since machines are noisy. CPU comes from /proc, so from Linux.
IRONCAGE_ORIGINAL may name a Python in which `import iron_cage` works: the Rust original's.
"""
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from peers import CHUNKS, PACE_S, memory_kb

HERE = Path(__file__).resolve().parent
PROGRAM = HERE.parents[1] / "ironcage_proxy.py"
BEFORE = os.environ.get("IRONCAGE_BEFORE")
PEERS = str(HERE / "peers.py")
PROVIDER_PORT, NAIVE_PORT = 18_901, 18_902
QUICK = "--quick" in sys.argv
ROUNDS = 1 if QUICK else 3
# name -> (connections, requests, kind of request)
LOADS = {
    "small, 1 connection": (1, 300 if QUICK else 1_500, "small"),
    "small, 16 connections": (16, 320 if QUICK else 3_200, "small"),
    "small, 64 connections": (64, 320 if QUICK else 3_200, "small"),
    "small, 256 connections": (256, 512 if QUICK else 5_120, "small"),
    "400 KB, 1 connection": (1, 20 if QUICK else 100, "long"),
    "20 MB, 1 connection": (1, 2 if QUICK else 4, "huge"),
    "20 MB of screenshots, 1 connection": (1, 3 if QUICK else 8, "screens"),
    "stream of 200 chunks": (1, 10 if QUICK else 60, "stream"),
}
STREAMS = 100 if QUICK else 500
PACED = ("naive", "budget", "budget, one CPU")
VARIANTS = {
    "naive": None,
    **({"original": None} if "IRONCAGE_ORIGINAL" in os.environ else {}),
    "no budget": [],
    "budget": ["--budget", "1000"],
    "budget, ledger": ["--budget", "1000", "--ledger", "LEDGER"],
    **({"budget, one CPU": ["--budget", "1000"]} if shutil.which("taskset") else {}),
}
ENGINE = shutil.which("redis-server") or shutil.which("valkey-server")
ENGINES = {18_903: (), 18_904: ("--appendonly", "yes", "--appendfsync", "always")}
if ENGINE:
    VARIANTS.update({name: ["--budget", "1000", "--shared", f"redis://127.0.0.1:{port}"]
                     for name, port in zip(("shared", "shared, on disk"), ENGINES)})
if "--shared" in sys.argv:
    VARIANTS = {name: VARIANTS[name] for name in ("naive", "budget", "shared", "shared, on disk")}
    LOADS = {name: LOADS[name] for name in [*LOADS][:2]}
PAIRS = [(client, api) for client in ("chat", "messages", "responses")
         for api in ("chat", "messages", "responses")]
ENVIRON = {**{name: value for name, value in os.environ.items()
             if name != "PYTHONDONTWRITEBYTECODE"},
           "OPENAI_API_KEY": "sk-bench", "IRONCAGE_TOKEN": "ic_bench_0123456789",
           "ANTHROPIC_API_KEY": "sk-ant-bench",
           "IRONCAGE_ANTHROPIC_BASE_URL": f"http://127.0.0.1:{PROVIDER_PORT}",
           "IRONCAGE_OPENAI_BASE_URL": f"http://127.0.0.1:{PROVIDER_PORT}"}


def started(*argv, python=sys.executable):
    process = subprocess.Popen([python, *argv], stdout=subprocess.PIPE, text=True,
                               stderr=subprocess.DEVNULL, env=ENVIRON, cwd=PROGRAM.parent)
    return process, process.stdout.readline()


def measured(variant, load, program=PROGRAM):
    """One load on one variant, in fresh processes."""
    with tempfile.TemporaryDirectory() as folder:
        url = ENVIRON["IRONCAGE_OPENAI_BASE_URL"]
        if variant == "naive":
            process, line = started(PEERS, "naive", str(NAIVE_PORT), url)
        elif variant == "original":
            process, line = started(PEERS, "original", url,
                                    python=os.environ["IRONCAGE_ORIGINAL"])
        else:
            config = Path(folder, "cage.json")
            config.write_text(json.dumps({
                "price_as": {"lab/*": "gpt-4o-mini"},
                "providers": {"lab": {"base_url": url + "/v1", "key_env": "OPENAI_API_KEY"}}}))
            flags = [{"LEDGER": f"{folder}/cage.db", "CONFIG": str(config)}.get(flag, flag)
                     for flag in VARIANTS.get(variant, ["--budget", "1000", "--config", "CONFIG"])]
            place = ["taskset", "-c", "0"] if "one CPU" in variant else []
            python, *argv = *place, sys.executable, str(program), "--port", "0", "--quiet", *flags
            process, line = started(*argv, python=python)
        found = re.search(r":(\d+)", line)
        port = int(found[1]) if found else NAIVE_PORT
        try:
            done = subprocess.run(
                [sys.executable, PEERS, "load", str(port), *map(str, load), str(process.pid)],
                capture_output=True, text=True, check=True)
        finally:
            process.kill()
            process.wait()
    return json.loads(done.stdout)


def timed_start(*argv):
    """Milliseconds until the program listens, and what it then has resident, in MB."""
    begun = time.perf_counter()
    process, _ = started("-S", *argv, "--port", "0", "--quiet")
    took_ms = (time.perf_counter() - begun) * 1000
    resident_mb = (memory_kb(process.pid, "VmRSS") or 0) / 1024
    process.kill()
    process.wait()
    return took_ms, resident_mb


def timed_imports():
    """Milliseconds that importing the same modules takes alone."""
    modules = re.findall(r"^(?:import|from)(?! __future__) ([\w.]+)",
                         PROGRAM.read_text(encoding="utf-8"), re.MULTILINE)
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-S", "-c", f"import {', '.join(modules)}"], check=True)
    return (time.perf_counter() - begun) * 1000


def print_starts():
    rows = [(timed_start(str(PROGRAM)), timed_start("-m", PROGRAM.stem), timed_imports())
            for _ in range(3 if QUICK else 9)]
    script, module, imports = zip(*rows)
    base = statistics.median(imports)
    print(f"\nstart to listening; importing the same modules alone takes {base:.0f} ms")
    for name, times in (("python ironcage_proxy.py", script), ("python -m ironcage_proxy", module)):
        ms, mb = (statistics.median(column) for column in zip(*times))
        print(f"{name:26}{ms:6.0f} ms, ratio {ms / base:.2f}, {mb:.0f} MB resident")


def print_paced():
    for streams in (1, STREAMS):
        print(f"\n{streams} streams at once, a chunk every {PACE_S * 1000:.0f} ms\n{'':16}"
              f"{'p50 ms':>9}{'p99 ms':>9}{'first ms':>9}{'CPU us':>9}{'MB':>9}{'faults':>8}"
              "   (late; CPU a chunk)")
        for variant in [name for name in VARIANTS if name in PACED]:
            rows = [measured(variant, (streams, 0, "paced")) for _ in range(ROUNDS)]
            row = {key: statistics.median(one[key] or 0 for one in rows) for key in rows[0]}
            print(f"{variant:16}{row['p50_ms']:9.2f}{row['p99_ms']:9.2f}{row['first_ms']:9.2f}"
                  f"{row['cpu_us']:9.0f}{row['rss_mb']:9.0f}{row['faults']:8.0f}")


def print_dialects():
    """CPU of each pair, and the ratio to the client's own API, which is not translated."""
    counts = {"": 300 if QUICK else 1_500, ", streamed": 10 if QUICK else 60}
    programs = [PROGRAM, BEFORE] if BEFORE else [PROGRAM]
    found = {(program, pair, kind): [] for pair in PAIRS for kind in counts
             for program in programs}
    for _ in range(ROUNDS):
        for program, pair, kind in found:
            found[program, pair, kind].append(measured(
                "dialects", (1, counts[kind], " on ".join(pair) + kind), program))
    cpu = {key: statistics.median(row["cpu_us"] or 0 for row in rows)
           for key, rows in found.items()}
    faults = {key: sum(row["faults"] for row in rows) for key, rows in found.items()}
    print(f"\n{'client on API':24}" + 2 * f"{'CPU us':>10}{'ratio':>8}{'before':>8}"
          + f"{'faults':>8}   (a request; an event of a stream)")
    for pair in PAIRS:
        cells = ""
        for kind, each in (("", 1), (", streamed", CHUNKS)):
            us = cpu[PROGRAM, pair, kind]
            before = us / (cpu[BEFORE, pair, kind] or 1) \
                if BEFORE and not faults[BEFORE, pair, kind] else None
            cells += (f"{us / each:10.1f}{us / (cpu[PROGRAM, (pair[0], pair[0]), kind] or 1):8.2f}"
                      + (f"{before:8.2f}" if before else f"{'-':>8}"))
        print(f"{' on '.join(pair):24}{cells}"
              f"{sum(faults[PROGRAM, pair, kind] for kind in counts):8}")


def start_engines(folder):
    """Engines, each with a new cage."""
    engines = []
    for port, flags in ENGINES.items() if ENGINE else ():
        engines.append(subprocess.Popen(
            [ENGINE, "--port", str(port), "--save", "", "--dir", folder, *flags,
             "--appenddirname", f"aof-{port}"], stdout=subprocess.DEVNULL))
        for _ in range(100):
            done = subprocess.run([sys.executable, str(PROGRAM), "cage", "new", "default",
                                   "--shared", f"redis://127.0.0.1:{port}"], capture_output=True)
            if not done.returncode:
                break
            time.sleep(0.05)
    return engines


def main():
    provider, _ = started(PEERS, "provider", str(PROVIDER_PORT))
    with tempfile.TemporaryDirectory() as folder:
        engines = start_engines(folder)
        try:
            measure_all()
        finally:
            for process in (provider, *engines):
                process.kill()
                process.wait()
    if "--shared" not in sys.argv:
        print_starts()


def measure_all():
    if "--shared" not in sys.argv:
        print_dialects()
    if "--dialects" in sys.argv:
        return
    for name, load in LOADS.items():
        # The original takes no body over 10 MB, and keeps streams back to their end.
        variants = [variant for variant in VARIANTS
                    if variant != "original" or load[2] in ("small", "long")]
        results = {variant: [] for variant in variants}
        for _ in range(ROUNDS):
            for variant in variants:
                results[variant].append(measured(variant, load))
        print(f"\n{name}\n{'':16}{'req/s':>9}{'p50 us':>9}{'p99 us':>9}{'max ms':>9}"
              f"{'CPU us':>9}{'CPU/naive':>11}{'MB':>6}{'most':>6}{'faults':>8}")
        medians = {variant: {key: statistics.median(row[key] or 0 for row in rows)
                             for key in rows[0]} for variant, rows in results.items()}
        for variant, row in medians.items():
            ratio = row["cpu_us"] / (medians["naive"]["cpu_us"] or 1)
            print(f"{variant:16}{row['per_s']:9.0f}{row['p50_us']:9.0f}{row['p99_us']:9.0f}"
                  f"{row['max_us'] / 1000:9.0f}{row['cpu_us']:9.0f}{ratio:11.2f}"
                  f"{row['rss_mb']:6.0f}{row['most_mb']:6.0f}{row['faults']:8.0f}")
    if "--shared" not in sys.argv:
        print_paced()


if __name__ == "__main__":
    main()
