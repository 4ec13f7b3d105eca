"""Whether a Metal encoder finds on this GPU what NumPy's finds: found out when it is first used.

As `ops.kernel_check` does for products. Sums are added up in another order there, and a choice between two candidates
of nearly equal error may fall otherwise: then a block differs, as often for the better as for the worse. So most blocks
have to be NumPy's to the byte, and no row may have more error than that explains.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable

import numpy as np

from mlxq.formats import ggml
from mlxq.formats.superblocks import SUPER_BLOCK
from mlxq.ops.arrays import import_mlx
from mlxq.ops.dispatch import launches_on_gpu

#: Super-blocks of each row.
_BLOCKS = 24
#: Blocks that have to be equal. In the tests 0.95 of such blocks are, whether or not products and sums are fused.
_EQUAL = 0.8
#: Error of a row, as a part of NumPy's. Blocks that differ do so by some hundredths (in the tests 0.1 at most), both
#: ways: where one in five does, the sum over a row is off by 0.2 * 0.1.
_ERROR = 1.02

_verdicts: dict[tuple[str, bool], bool] = {}
_lock = threading.Lock()

Encode = Callable[[np.ndarray, str, np.ndarray | None, str], np.ndarray]


def passes(name: str, weighted: bool, encode: Encode) -> bool:
    """Whether the Metal encoder of a type agrees with NumPy's; warns once of one that does not.

    Where something stands in for `mx.fast.metal_kernel`, in tests, there is nothing to find out.

    Args:
        name: one of `dispatch.METAL_ENCODERS`.
        weighted: with importance: that is another kernel.
        encode: `quantize` of the type's encoder.
    """
    if not launches_on_gpu():
        return True
    with _lock:
        verdict = _verdicts.get((name, weighted))
        if verdict is None:
            verdict = _verdicts[name, weighted] = _check(name, weighted, encode)
    return verdict


def _check(name: str, weighted: bool, encode: Encode) -> bool:
    try:
        wrong = _mismatch(name, weighted, encode)
    except Exception as error:  # whatever keeps it from running: the Metal compiler, mlx, the driver
        lines = str(error).strip().splitlines() or [type(error).__name__]
        wrong = next((line.strip() for line in lines if "error:" in line), lines[0])
    if wrong:
        chip = import_mlx().device_info().get("device_name", "this GPU")
        with_importance = " with importance" if weighted else ""
        warnings.warn(
            f"the Metal encoder of {name}{with_importance} is not used on {chip}, NumPy searches instead: {wrong}",
            stacklevel=6,
        )
    return not wrong


def _mismatch(name: str, weighted: bool, encode: Encode) -> str:
    """What is wrong with the encoder's blocks; empty if nothing is."""
    w, importance = _weights(), None
    if weighted:
        importance = np.random.default_rng(1).lognormal(0, 0.5, w.shape[1])
        importance = (importance / importance.mean()).astype(np.float32)
    ours, expected = (encode(w, name, importance, backend) for backend in ("metal", "numpy"))
    weights = 1.0 if importance is None else importance.astype(np.float64)
    errors, allowed = (
        (weights * (ggml.dequantize(blocks, name).astype(np.float64) - w) ** 2).sum(axis=1)
        for blocks in (ours, expected)
    )
    if not (errors <= _ERROR * allowed).all():
        worst = np.argmax(errors - _ERROR * allowed)
        return f"squared error {errors[worst]:.3g} of weights that NumPy encodes with {allowed[worst]:.3g}"
    equal = (ours == expected).reshape(len(w) * _BLOCKS, -1).all(axis=1).mean()
    return "" if equal >= _EQUAL else f"{equal:.0%} of the blocks are NumPy's, not {_EQUAL:.0%}"


def _weights() -> np.ndarray:
    """Normal ones, long tails, one sign, steps that are subnormal as float16, and zeros; float32 `[5, K]`."""
    rng = np.random.default_rng(0)
    K = _BLOCKS * SUPER_BLOCK
    normal = rng.standard_normal((2, K))
    rows = [0.02 * normal[0], 0.02 * rng.standard_t(5, K), rng.uniform(0, 1, K), 1e-4 * normal[1], np.zeros(K)]
    return np.stack(rows).astype(np.float32)
