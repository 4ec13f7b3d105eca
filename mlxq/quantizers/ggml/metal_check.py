"""Whether a Metal encoder finds on this GPU what NumPy's finds: found out by `ops.kernel_check` when it is first used.

Sums are added up in another order there, and a choice between two candidates of nearly equal error may fall otherwise:
then a block differs, as often for the better as for the worse. So most blocks have to be NumPy's to the byte, and no
row may have more error than that explains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np

from mlxq.formats import ggml
from mlxq.formats.superblocks import SUPER_BLOCK
from mlxq.ops import kernel_check

#: Super-blocks of each row.
_BLOCKS = 24
#: Blocks that have to be equal. In the tests nine in ten of such blocks are, with products and sums fused or not.
_EQUAL = 0.8
#: Error of a row, as a part of NumPy's. Blocks that differ do so by some hundredths (in the tests 0.1 at most), both
#: ways: where one in five does, the sum over a row is off by 0.2 * 0.1.
_ERROR = 1.02

Encode = Callable[[np.ndarray, str, np.ndarray | None, str], np.ndarray]


class Encoder(NamedTuple):
    """What shares a verdict: with importance it is another kernel."""

    name: str
    weighted: bool

    def __str__(self) -> str:
        return f"encoding {self.name}" + (" with importance" if self.weighted else "")


class _Comparison(NamedTuple):
    """What is wrong with the encoder's blocks; empty if nothing is."""

    complaint: str


def passes(name: str, weighted: bool, encode: Encode) -> bool:
    """Whether the Metal encoder of a type agrees with NumPy's; warns once of one that does not.

    Args:
        name: one of `dispatch.METAL_ENCODERS`.
        weighted: with importance.
        encode: `quantize` of the type's encoder.
    """
    return kernel_check.agrees(Encoder(name, weighted), partial(compared, encode), "NumPy searches")


def compared(encode: Encode, encoder: Encoder) -> Iterator[_Comparison]:
    """Run the encoder on a few rows with both back ends."""
    w, importance = _weights(), None
    if encoder.weighted:
        importance = np.random.default_rng(1).lognormal(0, 0.5, w.shape[1])
        importance = (importance / importance.mean()).astype(np.float32)
    ours, expected = (encode(w, encoder.name, importance, backend) for backend in ("metal", "numpy"))
    weights = 1.0 if importance is None else importance.astype(np.float64)
    errors, allowed = (
        (weights * (ggml.dequantize(blocks, encoder.name).astype(np.float64) - w) ** 2).sum(axis=1)
        for blocks in (ours, expected)
    )
    if not (errors <= _ERROR * allowed).all():
        worst = np.argmax(errors - _ERROR * allowed)
        yield _Comparison(f"squared error {errors[worst]:.3g} of weights that NumPy encodes with {allowed[worst]:.3g}")
    equal = (ours == expected).reshape(len(w) * _BLOCKS, -1).all(axis=1).mean()
    yield _Comparison("" if equal >= _EQUAL else f"{equal:.0%} of the blocks are NumPy's, not {_EQUAL:.0%}")


def _weights() -> np.ndarray:
    """Normal ones, long tails, one sign, steps that are subnormal as float16, and zeros; float32 `[5, K]`."""
    rng = np.random.default_rng(0)
    K = _BLOCKS * SUPER_BLOCK
    normal = rng.standard_normal((2, K))
    rows = [0.02 * normal[0], 0.02 * rng.standard_t(5, K), rng.uniform(0, 1, K), 1e-4 * normal[1], np.zeros(K)]
    return np.stack(rows).astype(np.float32)
