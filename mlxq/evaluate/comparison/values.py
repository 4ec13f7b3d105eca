"""What a tensor's format stands for, in float32: what a GGUF and an MLX directory of one quantization share.

MLX's affine codes are `scales * q + biases` in float32 arithmetic; ggml's blocks are decoded as ggml does. In two cases
numbers that differ by this rule stand for the same weight. `mx.dequantize` rounds the affine sum, and the product
before it, to the dtype of the scales: another artifact may hold those floats. And a GGUF holds the norms of some
architectures with 1 added, as the model computes with them: taken off again, the last bits of small weights are gone.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from mlxq.architectures.parameters import ParameterMap
from mlxq.checkpoint.gguf.names import architecture_for, to_gguf
from mlxq.errors import CheckpointError
from mlxq.formats import affine
from mlxq.formats.floats import dtype_of, to_float32
from mlxq.types import FLOAT_BYTES, QuantizedTensor


def read_stored(parameters: ParameterMap, name: str, rows: slice | None) -> np.ndarray | QuantizedTensor:
    """What is stored, as far as it can be compared without decoding: affine codes, floats, decoded ggml blocks."""
    if parameters.tensors[name].dtype == "AFFINE":
        return parameters.read_quantized(name, rows)
    return parameters.read(name, rows)


def same_bits(a: np.ndarray | QuantizedTensor, b: np.ndarray | QuantizedTensor) -> bool:
    """Whether both are stored in one format with the same bits; False says nothing about the numbers."""
    if isinstance(a, QuantizedTensor) and isinstance(b, QuantizedTensor):
        pairs = [(a.scales, b.scales), (a.biases, b.biases), (a.w_q, b.w_q)]
        return (a.spec, a.dtype) == (b.spec, b.dtype) and all(equal_bits(x, y) for x, y in pairs)
    if isinstance(a, QuantizedTensor) or isinstance(b, QuantizedTensor):
        return False
    return a.dtype == b.dtype and equal_bits(a, b)


def equal_bits(x: np.ndarray, y: np.ndarray) -> bool:
    x, y = (np.ascontiguousarray(v).reshape(-1).view(f"u{v.itemsize}") for v in (x, y))
    return bool((x == y).all())


def decoded(values: np.ndarray | QuantizedTensor) -> np.ndarray:
    """The numbers as a flat float32 array, affine codes decoded in float32 arithmetic."""
    if isinstance(values, QuantizedTensor):
        spec = values.spec
        codes = affine.unpack(values.w_q, spec.bits, values.shape[-1])
        scales, biases = (to_float32(p, values.dtype) for p in (values.scales, values.biases))
        return affine.dequantize(codes, scales, biases, spec.bits, spec.group_size).reshape(-1)
    return np.ascontiguousarray(to_float32(values, dtype_of(values))).reshape(-1)


def is_rounded(a: ParameterMap, b: ParameterMap, name: str, parts: Iterable[slice | None]) -> bool:
    """Whether one side is floats, and exactly those that `mx.dequantize` makes of the other side's codes.

    Args:
        parts: ranges of rows that cover the tensor; taken up to the first that tells.
    """
    dtypes = [p.tensors[name].dtype for p in (a, b)]
    if "AFFINE" not in dtypes or not any(d in FLOAT_BYTES for d in dtypes):
        return False
    return all(bool((decoded(a.read(name, rows)) == decoded(b.read(name, rows))).all()) for rows in parts)


def same_with_offset(a: ParameterMap, b: ParameterMap, name: str) -> bool:
    """Whether a side is a GGUF that holds this vector with an offset added, and both are the same with it."""
    offsets = {_offset(p, name) for p in (a, b) if p.checkpoint.kind == "gguf"} - {0.0}
    if not offsets or len(a.tensors[name].shape) != 1:
        return False
    offset = np.float32(offsets.pop())
    x, y = (decoded(p.read(name)) + offset for p in (a, b))
    return bool((x == y).all())


def _offset(parameters: ParameterMap, name: str) -> float:
    try:
        mapped = to_gguf(architecture_for(parameters.checkpoint.config)[1], name)
    except CheckpointError:  # an architecture that can be read, but not written
        return 0.0
    return mapped.norm_offset if mapped else 0.0
