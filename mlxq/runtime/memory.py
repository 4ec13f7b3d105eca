"""How much memory this process has used."""

from __future__ import annotations

import resource
import sys


def peak_memory() -> int:
    """Bytes at the highest point so far: of mlx on a GPU, of the whole process (`ru_maxrss`) on the CPU."""
    from mlxq.runtime.weights import on_accelerator

    if on_accelerator():
        import mlx.core as mx

        return mx.get_peak_memory()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
