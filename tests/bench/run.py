"""Speed, as ratios against a naive proxy of the standard library in the same run.

    python tests/bench/run.py [--quick]

The provider, the load, the naive proxy and the proxy are processes of their own; rounds are
interleaved and medians are taken, since machines are noisy. CPU comes from /proc, so from Linux.
"""
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
PROGRAM = HERE.parents[1] / "ironcage_proxy.py"
PEERS = str(HERE / "peers.py")
PROVIDER_PORT, NAIVE_PORT = 18_901, 18_902
QUICK = "--quick" in sys.argv
ROUNDS = 1 if QUICK else 3
# name -> (connections, requests, kind of request)
LOADS = {
    "small, 1 connection": (1, 300 if QUICK else 1_500, "small"),
    "small, 16 connections": (16, 320 if QUICK else 3_200, "small"),
    "small, 64 connections": (64, 320 if QUICK else 3_200, "small"),
    "400 KB, 1 connection": (1, 20 if QUICK else 100, "long"),
    "stream of 200 chunks": (1, 10 if QUICK else 60, "stream"),
}
VARIANTS = {
    "naive": None,
    "no budget": [],
    "budget": ["--budget", "1000"],
    "budget, ledger": ["--budget", "1000", "--ledger", "LEDGER"],
}
ENVIRON = {**os.environ, "OPENAI_API_KEY": "sk-bench", "IRONCAGE_TOKEN": "ic_bench_0123456789",
           "IRONCAGE_OPENAI_BASE_URL": f"http://127.0.0.1:{PROVIDER_PORT}"}


def started(*argv):
    process = subprocess.Popen([sys.executable, *argv], stdout=subprocess.PIPE, text=True,
                               stderr=subprocess.DEVNULL, env=ENVIRON)
    return process, process.stdout.readline()


def measured(flags, load):
    """One load on one variant, in fresh processes."""
    with tempfile.TemporaryDirectory() as folder:
        if flags is None:
            process, _ = started(PEERS, "naive", str(NAIVE_PORT),
                                 ENVIRON["IRONCAGE_OPENAI_BASE_URL"])
            port = NAIVE_PORT
        else:
            flags = [f"{folder}/cage.db" if flag == "LEDGER" else flag for flag in flags]
            process, line = started(str(PROGRAM), "--port", "0", "--quiet", *flags)
            port = int(re.search(r":(\d+)", line)[1])
        try:
            done = subprocess.run(
                [sys.executable, PEERS, "load", str(port), *map(str, load), str(process.pid)],
                capture_output=True, text=True, check=True)
        finally:
            process.kill()
            process.wait()
    return json.loads(done.stdout)


def start_ms():
    """Milliseconds from start to first answer, and of importing the same modules alone."""
    modules = re.findall(r"^import ([\w.]+)", PROGRAM.read_text(encoding="utf-8"), re.MULTILINE)
    starts, imports = [], []
    for _ in range(3 if QUICK else 9):
        begun = time.perf_counter()
        process, line = started("-I", "-S", str(PROGRAM), "--port", "0", "--quiet")
        starts.append(time.perf_counter() - begun)
        process.kill()
        process.wait()
        begun = time.perf_counter()
        subprocess.run([sys.executable, "-I", "-S", "-c", f"import {', '.join(modules)}"],
                       check=True)
        imports.append(time.perf_counter() - begun)
    return statistics.median(starts) * 1000, statistics.median(imports) * 1000


def main():
    provider, _ = started(PEERS, "provider", str(PROVIDER_PORT))
    try:
        for name, load in LOADS.items():
            results = {variant: [] for variant in VARIANTS}
            for _ in range(ROUNDS):
                for variant, flags in VARIANTS.items():
                    results[variant].append(measured(flags, load))
            print(f"\n{name}\n{'':16}{'req/s':>9}{'p50 us':>9}{'p99 us':>9}{'CPU us':>9}"
                  f"{'CPU/naive':>11}{'faults':>8}")
            medians = {variant: {key: statistics.median(row[key] or 0 for row in rows)
                                 for key in rows[0]} for variant, rows in results.items()}
            for variant, row in medians.items():
                ratio = row["cpu_us"] / (medians["naive"]["cpu_us"] or 1)
                print(f"{variant:16}{row['per_s']:9.0f}{row['p50_us']:9.0f}{row['p99_us']:9.0f}"
                      f"{row['cpu_us']:9.0f}{ratio:11.2f}{row['faults']:8.0f}")
    finally:
        provider.kill()
        provider.wait()
    start, imports = start_ms()
    print(f"\nstart to listening {start:.0f} ms; importing the same modules {imports:.0f} ms; "
          f"ratio {start / imports:.2f}")


if __name__ == "__main__":
    main()
