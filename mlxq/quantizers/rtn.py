"""Round to nearest on the min/max grid: no statistics, one pass over the weights, rows independent."""

from __future__ import annotations

import numpy as np

from mlxq import ops
from mlxq.errors import FormatError
from mlxq.formats import floats
from mlxq.types import QuantizedTensor, QuantSpec


def quantize(w: np.ndarray, spec: QuantSpec, dtype: str) -> QuantizedTensor:
    """Quantize `w` `[..., N, K]` (float32, float16, or uint16 bfloat16 bits) with scales and biases of `dtype`.

    The grid is `mx.quantize`'s, of the weights rounded to `dtype` first, as stock MLX does.

    Raises:
        FormatError: a weight, or a scale that follows from the weights, is not finite.
    """
    source_dtype = floats.dtype_of(w)
    if source_dtype != dtype:
        cast = floats.from_float32(floats.to_float32(w, source_dtype), dtype)
        if not floats.all_finite(cast) and floats.all_finite(w):
            raise FormatError(f"the weights exceed the range of {dtype}; choose another dtype")
        w = cast
    w_q, scales, biases = ops.quantize(w, bits=spec.bits, group_size=spec.group_size)
    if not (floats.all_finite(scales) and floats.all_finite(biases)):
        raise FormatError(f"the weights exceed the range of {dtype} scales")
    return QuantizedTensor(w_q, scales, biases, spec, w.shape, dtype)
