"""The worker process and the cache: what dies is started again, and processes may compile the same at once."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from metal_on_cpu import MslError, metal_kernel, toolchain
from metal_on_cpu.process import worker

pytestmark = pytest.mark.usefixtures("checker")

_COPY = "y[thread_position_in_grid.x] = x[thread_position_in_grid.x];\n"


def _copy(x: mx.array) -> mx.array:
    shape = {"grid": (x.size, 1, 1), "threadgroup": (64, 1, 1), "output_shapes": [x.shape]}
    return metal_kernel("copy", ["x"], ["y"], _COPY)(inputs=[x], **shape, output_dtypes=[x.dtype])[0]


def test_worker_that_was_killed_is_reported_and_replaced() -> None:
    x = mx.arange(64)
    assert mx.array_equal(_copy(x), x)
    worker._process.kill()
    with pytest.raises(MslError, match="the kernel ended its process"):
        _copy(x)
    assert mx.array_equal(_copy(x), x)


def test_launches_of_several_threads_do_not_mix() -> None:
    right = []

    def launch(k: int) -> None:
        x = np.full(256, k, np.int32)
        for _ in range(4):
            if np.array_equal(np.array(_copy(mx.array(x))), x):
                right.append(k)

    threads = [threading.Thread(target=launch, args=(k,)) for k in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(right) == 16


def test_zeros_and_values_around_them_arrive() -> None:
    x = np.zeros(1 << 20, np.float32)
    x[[0, 300_000, -1]] = 1, 2, 3
    assert np.array_equal(np.array(_copy(mx.array(x))), x)


def test_processes_may_make_the_same_at_once(tmp_path: Path) -> None:
    script = (
        "import sys, time\n"
        f"sys.path.insert(0, {str(Path(__file__).parent.parent)!r})\n"
        "from metal_on_cpu import toolchain\n"
        "def make(out):\n"
        "    out.mkdir()\n"
        "    time.sleep(0.3)\n"
        "    (out / 'file').write_text('whole')\n"
        "print((toolchain.cached('key', '.kernel', make) / 'file').read_text())\n"
    )
    command = [sys.executable, "-c", script]
    running = [
        subprocess.Popen(command, env={"MLXQ_TEST_CACHE": str(tmp_path)}, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    assert [p.communicate()[0].strip() for p in running] == ["whole"] * 3
    assert [p.name for p in (tmp_path / "metal_on_cpu").iterdir()] == [
        toolchain.cached("key", ".kernel", lambda out: out.mkdir()).name
    ]


def test_what_nobody_used_for_a_while_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "CACHE", tmp_path)
    kept, old = (toolchain.cached(key, ".file", lambda out: out.touch()) for key in ("kept", "old"))
    os.utime(old, (0, 0))
    toolchain._prune.cache_clear()
    toolchain.cached("new", ".kernel", lambda out: out.mkdir())
    assert kept.exists()
    assert not old.exists()
