"""Timing whole processes in turn: A, B, A, B, ... so that a drifting machine touches both alike."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Run:
    seconds: float
    peak_mb: float


def run(command: list[str]) -> Run:
    """Wall time and peak resident memory of one process (`ru_maxrss` as the kernel counted it).

    A process starts with its parent's peak, so a small one stands between this program and the command.
    """
    done = subprocess.run([sys.executable, __file__, *command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed: {done.stderr[-2000:]}")
    return Run(*json.loads(done.stdout))


def _run_here(command: list[str]) -> int:
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    unit = 1 if sys.platform == "darwin" else 1024
    print(json.dumps([seconds, usage.ru_maxrss * unit / 1e6]))
    return os.waitstatus_to_exitcode(status)


def compare(commands: dict[str, Callable[[], list[str]]], runs: int) -> dict[str, list[Run]]:
    """Runs of each command, in turn, after one warm-up of each."""
    out: dict[str, list[Run]] = {name: [] for name in commands}
    for i in range(runs + 1):
        for name, command in commands.items():
            result = run(command())
            if i:
                out[name].append(result)
    return out


def median(values: list[float]) -> float:
    return statistics.median(values)


def spread(values: list[float]) -> str:
    """`median (min - max)`."""
    return f"{median(values):.2f} ({min(values):.2f} - {max(values):.2f})"


if __name__ == "__main__":
    sys.exit(_run_here(sys.argv[1:]))
