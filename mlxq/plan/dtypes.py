"""Float types of a result: of scales, of kept tensors, and what is rounded on the way. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from mlxq.types import DTYPE_NAMES, FLOAT_BYTES, TensorInfo


def narrows(source: str, stored: str) -> bool:
    """Whether numbers of one float type (`F32`, `F16`, `BF16`) may have to be rounded in another."""
    return source != stored and stored != "F32"


def model_dtype(infos: Iterable[TensorInfo], asked: str | None, of_config: str | None) -> str:
    """The float type of scales and kept tensors (`F32`, `F16`, `BF16`).

    It is the one `asked` for, else the one that holds most of the source's weights (of its scales, where MLX quantized
    it). ggml blocks count for `of_config`, what the model was made to compute in, or float16 where that says nothing.
    """
    if asked is not None:
        return _key(asked)
    of_blocks = _key(of_config) if of_config in DTYPE_NAMES.values() else "F16"
    weights: dict[str, int] = {}
    for info in infos:
        if info.module != "other":
            is_float = info.dtype in FLOAT_BYTES
            dtype = info.dtype if is_float else info.scales_dtype if info.dtype == "AFFINE" else of_blocks
            weights[dtype] = weights.get(dtype, 0) + info.size
    return max(weights, key=lambda d: weights[d]) if weights else "F32"


def kept_dtype(info: TensorInfo, dtype: str, protected: frozenset[str]) -> tuple[str, str]:
    """Float dtype of a kept tensor, and the rest of its reason: the model's, as stock mlx-lm's own conversion does.

    One float32 norm makes every activation behind it float32; bfloat16 beside float16 does the same.
    """
    is_float = info.dtype in FLOAT_BYTES
    if info.name in protected:
        return info.dtype if is_float else "F32", "; the architecture asks for its own dtype"
    if not is_float:
        return dtype, f"; decoded from {info.dtype}"
    if info.dtype == dtype:
        return dtype, ""
    own, stored = DTYPE_NAMES[info.dtype], DTYPE_NAMES[dtype]
    if dtype == "F32":
        return dtype, f"; stored as {stored} like the model's other weights"
    return dtype, f"; stored as {stored}: {own} beside {stored} would promote activations"


def _key(name: str) -> str:
    return next(k for k, v in DTYPE_NAMES.items() if v == name)
