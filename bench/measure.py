"""Timing whole processes in turn: A, B, A, B, ... so that a drifting machine touches both alike."""

from __future__ import annotations

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
    """Wall time and peak resident memory of one process (`ru_maxrss` as the kernel counted it)."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    text = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - began
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed: {text.decode()[-2000:]}")
    unit = 1 if sys.platform == "darwin" else 1024
    return Run(seconds, usage.ru_maxrss * unit / 1e6)


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
