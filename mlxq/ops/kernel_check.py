"""Whether a Metal kernel computes on this GPU what the reference does: found out when it is first used.

Our kernels are checked on the CPU in every run of the tests, but not by Apple's compiler, nor on every chip. So the
first product of each kind in a process is preceded by a small seeded one (milliseconds, mostly those of a compiler that
had to run anyway), compared with NumPy's. A kernel that is wrong, or does not compile, is not used again.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from mlxq.ops.arrays import import_mlx
from mlxq.ops.dispatch import launches_on_gpu
from mlxq.ops.kernel_cases import Affine, Blocks, Case, Outcome, case_of, outcomes

_verdicts: dict[Any, bool] = {}
_lock = threading.Lock()


def passes(op: str, weights: Blocks | Affine, rows: int) -> bool:
    """Whether the Metal kernel of a call agrees with NumPy; warns once of one that does not.

    Where something stands in for `mx.fast.metal_kernel`, in tests, there is nothing to find out.

    Args:
        op: an operation of `mlxq.ops` that has kernels.
        weights: blocks of a type in `dispatch.METAL_TYPES`, or affine ones.
        rows: of x; 0 where there is no x.
    """
    case = case_of(op, weights, rows)
    return agrees(case, outcomes, _instead(case))


def agrees(case: Any, run: Callable[[Any], Iterator[Outcome]], instead: str) -> bool:
    """Whether the kernels of a case agree with NumPy; otherwise warns, the first time, what is done `instead`."""
    verdict = _verdicts.get(case)
    if verdict is None:
        if not launches_on_gpu():
            return True
        with _lock:
            verdict = _verdicts.get(case)
            if verdict is None:
                verdict = _verdicts[case] = _check(case, run, instead)
    return verdict


def _check(case: Any, run: Callable[[Any], Iterator[Outcome]], instead: str) -> bool:
    try:
        wrong = next(filter(None, (outcome.complaint for outcome in run(case))), "")
    except Exception as error:  # whatever keeps it from running: the Metal compiler, mlx, the driver
        wrong = _told_by(error)
    if wrong:
        chip = import_mlx().device_info().get("device_name", "this GPU")
        warnings.warn(f"the Metal kernel for {case} is not used on {chip}, {instead} instead: {wrong}", stacklevel=6)
    return not wrong


def _instead(case: Case) -> str:
    if isinstance(case.weights, Blocks):
        return "NumPy decodes the blocks"
    return "NumPy computes it" if case.weights.group_size == 16 else "mlx's own is"


def _told_by(error: Exception) -> str:
    """One line of an error: of a compiler's many the first that names one."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return next((line.strip() for line in lines if "error:" in line), lines[0])
