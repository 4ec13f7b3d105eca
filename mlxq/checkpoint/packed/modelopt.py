"""Checkpoints of NVIDIA's ModelOpt: FP8 and NVFP4, settled in `hf_quant_config.json` or in config.json.

    quant_algo    tensors of a module
    FP8           weight E4M3, weight_scale [] (per tensor) or [N]; also FP8_PER_CHANNEL_PER_TOKEN
    FP8_PB_WO     weight E4M3, weight_scale of 128 x 128 blocks (axes of 1 between)
    NVFP4         weight uint8 [N, K / 2], weight_scale E4M3 [N, K / 16], weight_scale_2 float32 []
    MXFP8         weight E4M3, weight_scale uint8 [N, K / 32] (E8M0)

`w_hat = code * weight_scale`, and of NVFP4 `code * (weight_scale * weight_scale_2)` (source: TensorRT-Model-Optimizer,
`modelopt/torch/quantization/qtensor/nvfp4_tensor.py` dequantize, `export/quant_utils.py`). `pre_quant_scale`, which the
AWQ variants apply to activations, is refused: no model has a place for it.
"""

from __future__ import annotations

import fnmatch
from typing import Any

from mlxq.checkpoint.packed import fp8
from mlxq.checkpoint.packed.base import Packed, Scheme, Source, part
from mlxq.checkpoint.packed.floats import ModeMatrix, float32_of, mode_spec
from mlxq.checkpoint.safetensors import Entry, quoted
from mlxq.errors import CheckpointError
from mlxq.types import TensorInfo

#: `quant_algo` -> rows and columns of a block of scales, None where the scales themselves tell.
_FP8 = {"FP8": None, "FP8_PER_CHANNEL_PER_TOKEN": None, "FP8_PB_WO": (128, 128), "FP8_PB_REAL_QUANT": (128, 128)}
_ALGORITHMS = (*_FP8, "NVFP4", "MXFP8")
_MIXED = "MIXED_PRECISION"
#: Weights in a group of NVFP4.
_GROUP = 16


def check(settings: dict[str, Any], where: str) -> None:
    """Refuse algorithms that are not in the table."""
    inner = _inner(settings)
    algorithm = inner.get("quant_algo")
    layers = _layers(inner, where)
    named = list(layers.values()) if algorithm == _MIXED else [algorithm]
    for name in named:
        if not isinstance(name, str) or name.upper() not in _ALGORITHMS:
            raise CheckpointError(
                f"{where}: the weights are quantized by ModelOpt's {quoted(name)}, which cannot be read; the algorithms"
                f" that can are {', '.join(_ALGORITHMS)}"
            )
    group = inner.get("group_size")
    if algorithm == "NVFP4" and group not in (None, _GROUP):
        raise CheckpointError(f"{where}: NVFP4 has groups of {_GROUP}, but group_size is {quoted(group)}")


def _inner(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings themselves: `hf_quant_config.json` has them one level deeper."""
    nested = settings.get("quantization")
    return nested if isinstance(nested, dict) else settings


def _layers(inner: dict[str, Any], where: str) -> dict[str, Any]:
    """Module -> algorithm, where they differ."""
    layers = inner.get("quantized_layers") or {}
    if not isinstance(layers, dict) or not all(isinstance(v, dict) for v in layers.values()):
        raise CheckpointError(f"{where}: quantized_layers must map modules to their settings")
    return {module: how.get("quant_algo") for module, how in layers.items()}


def collect(source: Source) -> dict[str, Packed]:
    """Every weight with a `weight_scale`."""
    inner = _inner(source.settings)
    layers = _layers(inner, source.where)
    found: dict[str, Packed] = {}
    for name, weight in source.raw.entries.items():
        module = name.removesuffix(".weight")
        if module == name or weight.dtype not in ("U8", "F8_E4M3"):
            continue
        algorithm = str(layers.get(module) or inner.get("quant_algo")).upper()
        if f"{module}.pre_quant_scale" in source.raw.entries:
            raise CheckpointError(
                f"{source.where}: {quoted(module)} scales its input first (pre_quant_scale), which cannot be followed"
            )
        found[name] = _tensor(source, name, weight, algorithm)
    _check_excluded(source, inner, found)
    fp8.attach_cache_scales(source, found)
    return found


def _tensor(source: Source, name: str, weight: Entry, algorithm: str) -> Packed:
    wanted = "U8" if algorithm == "NVFP4" else "F8_E4M3"
    if weight.dtype != wanted:
        raise CheckpointError(
            f"{source.where}: {quoted(name)} is {weight.dtype}, but the settings say {algorithm}, which is {wanted}"
        )
    if algorithm in _FP8:
        return fp8.matrix(source, name, weight, f"{name}_scale", _FP8[algorithm])
    others = fp8.activations(source, name)
    if algorithm == "NVFP4":
        return nvfp4(source, name, name, f"{name}_scale", f"{name}_scale_2", others, divides=False)
    return mx(source, name, name, f"{name}_scale", others, "mxfp8")


def nvfp4(
    source: Source, name: str, codes: str, scale: str, factor: str, others: tuple[str, ...], *, divides: bool
) -> ModeMatrix:
    """A matrix of NVFP4 with a scale for the whole tensor; `divides` as the producer means that one.

    MLX's layers do not take that scale: they hold the weights only where it is 1.

    Raises:
        CheckpointError: a part is missing, or of another dtype or shape.
    """
    weight = part(source, codes, ("U8", "I8"))
    _check_matrix(source, codes, weight)
    *lead, K = *weight.shape[:-1], weight.shape[-1] * 2
    if K % 32:
        raise CheckpointError(f"{source.where}: {quoted(codes)} has rows of {K} codes; NVFP4 is read 32 at a time")
    scales = part(source, scale, ("F8_E4M3",), (*lead, K // _GROUP))
    whole = part(source, factor, ("F32", "BF16", "F16"))
    if whole.nbytes not in (2, 4):
        raise CheckpointError(f"{source.where}: {quoted(factor)} is {list(whole.shape)}, but must be a single number")
    held = float32_of(source.raw.rows(factor), whole.dtype).reshape(-1)[0] == 1
    spec, dtype = (mode_spec("nvfp4"), "nvfp4") if held else (None, "NVFP4+scale")
    info = TensorInfo(name, (*lead, K), dtype, weight.nbytes + scales.nbytes + whole.nbytes, spec=spec)
    return ModeMatrix(info, "nvfp4", codes, scale, (factor, whole.dtype, divides), others)


def mx(source: Source, name: str, codes: str, scale: str, others: tuple[str, ...], mode: str) -> ModeMatrix:
    """A matrix of MXFP4 or MXFP8, which MLX holds as it is.

    Raises:
        CheckpointError: a part is missing, or of another dtype or shape.
    """
    spec = mode_spec(mode)
    weight = part(source, codes, ("U8", "I8") if spec.bits == 4 else ("F8_E4M3", "U8"))
    _check_matrix(source, codes, weight)
    *lead, K = *weight.shape[:-1], weight.shape[-1] * 8 // spec.bits
    if K % spec.group_size:
        raise CheckpointError(f"{source.where}: {quoted(codes)} has rows of {K} codes, not groups of {spec.group_size}")
    scales = part(source, scale, ("U8", "F8_E8M0"), (*lead, K // spec.group_size))
    info = TensorInfo(name, (*lead, K), mode, weight.nbytes + scales.nbytes, spec=spec)
    return ModeMatrix(info, mode, codes, scale, others=others)


def _check_matrix(source: Source, name: str, weight: Entry) -> None:
    if len(weight.shape) < 2 or 0 in weight.shape:
        raise CheckpointError(f"{source.where}: {quoted(name)} is {list(weight.shape)}, but must be a matrix")


def _check_excluded(source: Source, inner: dict[str, Any], found: dict[str, Packed]) -> None:
    patterns = inner.get("exclude_modules") or inner.get("ignore") or []
    if not isinstance(patterns, list):
        raise CheckpointError(f"{source.where}: exclude_modules is {quoted(patterns)}, but must be a list of modules")
    for name in found:
        module = name.removesuffix(".weight")
        hit = next((p for p in patterns if isinstance(p, str) and fnmatch.fnmatchcase(module, p)), None)
        if hit is not None:
            raise CheckpointError(
                f"{source.where}: {quoted(module)} is quantized, but exclude_modules ({quoted(hit)}) says it is not"
            )


SCHEME = Scheme(check, collect)
