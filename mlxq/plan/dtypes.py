"""Float types of a result: of scales, of kept tensors, and what is rounded on the way. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from mlxq.formats.geometry import BLOCK_FORMATS
from mlxq.types import DTYPE_NAMES, FLOAT_BYTES, QuantSpec, TensorInfo


def narrows(source: str, stored: str) -> bool:
    """Whether numbers of one float type (`F32`, `F16`, `BF16`) may have to be rounded in another."""
    return source != stored and stored != "F32"


def model_dtype(infos: Iterable[TensorInfo], asked: str | None, of_config: str | None) -> str:
    """The float type of scales and kept tensors (`F32`, `F16`, `BF16`).

    It is the one `asked` for, else the one that holds most of the source's weights (of its scales, where MLX quantized
    it). Other formats count for `of_config`, what the model was made to compute in; where that says nothing, for the
    type of its norms and biases, or float16 for ggml blocks, whose norms are always float32.
    """
    if asked is not None:
        return _key(asked)
    infos = list(infos)
    of_blocks = _key(of_config) if of_config in DTYPE_NAMES.values() else _beside(infos)
    weights: dict[str, int] = {}
    for info in infos:
        if info.module != "other":
            is_float = info.dtype in FLOAT_BYTES
            own = info.scales_dtype if info.dtype == "AFFINE" else None
            dtype = info.dtype if is_float else own or of_blocks
            weights[dtype] = weights.get(dtype, 0) + info.size
    return max(weights, key=lambda d: weights[d]) if weights else "F32"


def _beside(infos: list[TensorInfo]) -> str:
    """The float type of what is not quantized, or float16."""
    kinds = [i.dtype for i in infos if i.dtype in FLOAT_BYTES and i.module == "other"]
    if not kinds or any(i.dtype in BLOCK_FORMATS and i.dtype not in FLOAT_BYTES for i in infos):
        return "F16"
    return max(set(kinds), key=kinds.count)


def scales_dtype(info: TensorInfo, spec: QuantSpec, dtype: str, asked: str | None) -> str:
    """The float type of scales and biases in an affine grid: the model's.

    Codes of another tool's format (GPTQ's, say) keep the one that alone holds their scales and biases exactly, unless
    one is `asked` for: their weights stay those that the tool made.
    """
    foreign = info.dtype not in BLOCK_FORMATS and info.dtype != "AFFINE"
    if asked is None and foreign and info.spec == spec and info.scales_dtype and narrows(info.scales_dtype, dtype):
        return info.scales_dtype
    return dtype


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
