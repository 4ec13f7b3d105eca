"""One matrix by one of the methods that look at what goes into it: `search`, or `gptq`."""

from __future__ import annotations

import numpy as np

from mlxq.errors import FormatError
from mlxq.formats import affine, crossings, floats
from mlxq.quantizers import four_way as four_way_grids
from mlxq.quantizers import gptq, rtn
from mlxq.quantizers.curvature import Curvature
from mlxq.quantizers.grid_search import Grids, float_grids
from mlxq.types import QuantizedTensor, QuantSpec

#: Rows searched at a time.
_ROWS = 8192


def quantize(
    w: np.ndarray,
    spec: QuantSpec,
    dtype: str,
    *,
    curvature: Curvature | None = None,
    importance: np.ndarray | None = None,
    sweeps: int = 1,
    four_way: bool = False,
) -> tuple[QuantizedTensor, np.ndarray]:
    """Quantize float32 `w` `[N, K]`: with `curvature` by error feedback, else by a search of each group.

    Args:
        importance: float32 `[K]`, mean squares of the inputs, for the search; None: all columns count alike.
        four_way: scales and biases are to be those of integer zero points (`four_way`), of float16.

    Returns:
        The codes and grid, and the decoded weights float32 `[N, K]`.

    Raises:
        FormatError: a weight is not finite, or a scale exceeds `dtype`.
    """
    if not floats.all_finite(w):
        raise FormatError("a weight is NaN or infinite")
    grids = four_way_grids.grids(spec.bits) if four_way else float_grids(spec.bits, dtype)
    if curvature is not None:
        q, w_hat = gptq.quantize(w, curvature, spec, dtype, sweeps=sweeps, grids=grids)
    else:
        q, w_hat = _searched(w, spec, dtype, importance, grids)
    if not (floats.all_finite(q.scales) and floats.all_finite(q.biases)):
        raise FormatError(f"the weights exceed the range of {dtype} scales; choose another --dtype")
    return q, w_hat


def rounded(
    w: np.ndarray, spec: QuantSpec, dtype: str, *, four_way: bool = False
) -> tuple[QuantizedTensor, np.ndarray]:
    """The same without a look at the inputs, which every other method has to beat: by rounding to nearest, or where
    that has no grid of the asked kind by a search in which weights count alike."""
    if four_way:
        return quantize(w, spec, dtype, four_way=True)
    q = rtn.quantize(w, spec, dtype)
    return q, crossings.dequantize(q)


def _searched(
    w: np.ndarray, spec: QuantSpec, dtype: str, importance: np.ndarray | None, grids: Grids
) -> tuple[QuantizedTensor, np.ndarray]:
    N, K = w.shape
    size, top = spec.group_size, np.float32((1 << spec.bits) - 1)
    weight = np.ones(K, np.float32) if importance is None else _positive(importance)
    codes, w_hat = np.empty((N, K), np.uint8), np.empty((N, K), np.float32)
    scales, biases = (np.empty((N, K // size), np.float32) for _ in range(2))
    for start in range(0, N, _ROWS):
        rows = slice(start, start + _ROWS)
        for i in range(0, K, size):
            columns = slice(i, i + size)
            x = np.ascontiguousarray(w[rows, columns].T)
            s, b = grids.search(x, weight[columns])
            q = np.clip(np.rint((x - b) / s), 0, top)
            codes[rows, columns], w_hat[rows, columns] = q.T, (q * s + b).T
            scales[rows, i // size], biases[rows, i // size] = s, b
    stored = [floats.from_float32(a, dtype) for a in (scales, biases)]
    return QuantizedTensor(affine.pack(codes, spec.bits), *stored, spec, w.shape, dtype), w_hat


def _positive(importance: np.ndarray) -> np.ndarray:
    """Importance whose zeros, inputs that the text never had, count a little."""
    mean = float(importance.mean()) or 1.0
    return np.maximum(importance, np.float32(1e-4 * mean))
