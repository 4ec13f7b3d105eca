"""How much memory this process has used, and may keep resident on a GPU."""

from __future__ import annotations

import contextlib
import os
import resource
import sys


def physical_memory() -> int:
    """Bytes of the machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peak_memory() -> int:
    """Bytes at the highest point so far: of mlx on a GPU, of the whole process (`ru_maxrss`) on the CPU."""
    from mlxq.runtime.weights import on_accelerator

    if on_accelerator():
        import mlx.core as mx

        return mx.get_peak_memory()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class WiredLimit:
    """Keeps weights resident on Apple's GPUs while a text is generated, as mlx-lm's `wired_limit` does.

    Otherwise macOS pages out large models between tokens. It is a setting of mlx for the process, so it is put back
    to what it was as soon as nothing is generated. No effect elsewhere.
    """

    def __init__(self) -> None:
        self._asked = False
        self._before: int | None = None

    def raise_(self) -> None:
        """Allow what the device recommends; no effect when this was done already."""
        if self._asked:
            return
        self._asked = True
        # Speed is all that depends on it: a system that refuses generates all the same.
        with contextlib.suppress(RuntimeError, ValueError):
            limit = _recommended()
            if limit is not None:
                import mlx.core as mx

                self._before = mx.set_wired_limit(limit)

    def restore(self) -> None:
        """Put the limit back to what it was before `raise_`."""
        before, self._before, self._asked = self._before, None, False
        if before is not None:
            import mlx.core as mx

            with contextlib.suppress(RuntimeError, ValueError):
                # It must not change while something is computed.
                mx.synchronize()
                mx.set_wired_limit(before)


def _recommended() -> int | None:
    """Bytes that the GPU can keep resident, or None where there is no such limit."""
    import mlx.core as mx

    from mlxq.runtime.weights import on_accelerator

    if not (on_accelerator() and mx.metal.is_available()):
        return None
    return mx.device_info().get("max_recommended_working_set_size")
