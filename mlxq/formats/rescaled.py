"""What other scales do to the weights of the same codes, without decoding them: sums over groups are enough.

A weight `s q + b` becomes `(s + ds) q + (b + db)`. The squares of the changes of one group add up to
`ds^2 sum(q^2) + 2 ds db sum(q) + n db^2`, and its weights' own squares to the same with `s` and `b`.
"""

from __future__ import annotations

import numpy as np

from mlxq.formats.affine import unpack
from mlxq.formats.floats import to_float32
from mlxq.types import QuantizedTensor

#: Weights worked on at a time, so that temporaries stay in the second-level cache.
_CHUNK = 1 << 16


def squares(q: QuantizedTensor, rescaled: QuantizedTensor) -> tuple[float, float]:
    """Sums of squares of the changes, and of the weights of `q`: float64, exact but for the last bits.

    Args:
        q, rescaled: the same codes and grid; scales and biases in any float type, finite.
    """
    K, group_size = q.shape[-1], q.spec.group_size
    old, new = _columns(q), _columns(rescaled)
    change = [a - b for a, b in zip(new, old, strict=True)]
    n_rows = q.w_q.size // q.w_q.shape[-1]
    words = q.w_q.reshape(n_rows, -1)
    sums, sums_of_squares = (np.empty(n_rows * K // group_size, np.float32) for _ in range(2))
    ones = np.ones(group_size, np.float32)
    step, per_row = max(_CHUNK // K, 1), K // group_size
    for start in range(0, n_rows, step):
        # Both sums are integers below 2^24: exact in float32, whatever the order.
        codes = unpack(words[start : start + step], q.spec.bits, K).reshape(-1, group_size).astype(np.float32)
        part = slice(start * per_row, start * per_row + len(codes))
        np.matmul(codes, ones, out=sums[part])
        np.einsum("ij,ij->i", codes, codes, out=sums_of_squares[part])
    return tuple(
        max(float(np.sum(s * s * sums_of_squares + 2 * s * b * sums + group_size * b * b)), 0.0)
        for s, b in (change, old)
    )


def _columns(q: QuantizedTensor) -> list[np.ndarray]:
    """Scales and biases by the group, float64."""
    return [to_float32(a, q.dtype).reshape(-1).astype(np.float64) for a in (q.scales, q.biases)]
