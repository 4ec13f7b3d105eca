"""FP8 checkpoints (`quant_method` fp8 and fbgemm_fp8): DeepSeek-V3, Qwen3 FP8, Mistral, AutoFP8, fbgemm.

A quantized tensor `X` is E4M3 beside its scales `X_scale_inv` or `X_scale` (`q_proj.weight`, `q_proj.weight_scale`),
which broadcast by `weight_block_size`, by row, or as a scalar; all multiply. Layout: `mlxq.formats.float8`.
"""

from __future__ import annotations

from typing import Any

from mlxq.checkpoint.packed.base import Packed, Scheme, Source, part
from mlxq.checkpoint.packed.floats import SCALES, Fp8Matrix
from mlxq.checkpoint.safetensors import Entry, quoted
from mlxq.errors import CheckpointError
from mlxq.formats.float8 import block_grid

#: Ends of names of tensors that say how activations and the cache are rounded, not what the weights are.
ACTIVATIONS = ("input_scale", "activation_scale", "output_scale", "input_global_scale", "input_zero_point")
_CACHE = (".k_scale", ".v_scale", ".q_scale", ".kv_scale", ".prob_scale")


def check(settings: dict[str, Any], where: str) -> None:
    """Refuse another float than E4M3, and blocks that are none."""
    kind = settings.get("fmt", "e4m3")
    if kind != "e4m3":
        raise CheckpointError(f"{where}: FP8 weights of the format {quoted(kind)}, which cannot be read; e4m3 can")
    scale_fmt = settings.get("scale_fmt")
    if scale_fmt not in (None, "ue8m0", "float"):
        raise CheckpointError(f"{where}: FP8 scales of the format {quoted(scale_fmt)}; ue8m0 and float can be read")
    block = settings.get("weight_block_size")
    if block is not None:
        valid_block(block, f"{where}: weight_block_size")


def valid_block(block: Any, where: str) -> tuple[int, int]:
    """Rows and columns of a block.

    Raises:
        CheckpointError: not two positive integers.
    """
    if not isinstance(block, list) or len(block) != 2 or not all(type(b) is int and b > 0 for b in block):
        raise CheckpointError(f"{where} is {quoted(block)}, but must be two positive integers")
    return tuple(block)


def collect(source: Source) -> dict[str, Packed]:
    """Every E4M3 tensor with its scales."""
    block = source.settings.get("weight_block_size")
    ue8m0 = source.settings.get("scale_fmt") == "ue8m0"
    found: dict[str, Packed] = {}
    for name, weight in source.raw.entries.items():
        if not weight.dtype.startswith("F8_") or name.endswith(("_scale_inv", "_scale")):
            continue
        part(source, name, ("F8_E4M3",))
        scale_name = f"{name}_scale_inv" if f"{name}_scale_inv" in source.raw.entries else f"{name}_scale"
        found[name] = matrix(source, name, weight, scale_name, tuple(block) if block else None, ue8m0)
    attach_cache_scales(source, found)
    return found


def matrix(
    source: Source, name: str, weight: Entry, scale_name: str, block: tuple[int, int] | None, ue8m0: bool = False
) -> Fp8Matrix:
    """An E4M3 tensor whose scales are for `block` rows and columns, or (None) for rows or the tensor, as they are many.

    Raises:
        CheckpointError: no scales, or ones that are for neither.
    """
    scale = part(source, scale_name, (*SCALES, "F8_E8M0"))
    if len(weight.shape) < 2 or 0 in weight.shape:
        raise CheckpointError(f"{source.where}: {quoted(name)} is {list(weight.shape)}, but must be a matrix")
    N, K = weight.shape[-2:]
    shape = tuple(n for n in scale.shape if n != 1)
    blocks = {"tensor": (N, K), "row": (1, K)} if block is None else {"block": block, "tensor": (N, K)}
    for size in blocks.values():
        grid = block_grid(weight.shape, size)
        if tuple(n for n in grid if n != 1) == shape:
            return Fp8Matrix(
                name, weight, scale_name, scale, size, activations(source, name), ue8m0 or scale.dtype == "F8_E8M0"
            )
    wanted = " or ".join(f"{list(block_grid(weight.shape, size))} ({what})" for what, size in blocks.items())
    raise CheckpointError(
        f"{source.where}: {quoted(scale_name)} is {list(scale.shape)}, but scales of {list(weight.shape)} weights"
        f" are {wanted}"
    )


def activations(source: Source, name: str) -> tuple[str, ...]:
    """Stored scales of the activations that go into the layer of a weight."""
    module = name.rpartition(".")[0]
    found = (f"{module}.{end}" for end in ACTIVATIONS)
    return tuple(n for n in found if n in source.raw.entries)


def attach_cache_scales(source: Source, found: dict[str, Packed]) -> None:
    """Let scales of the key-value cache belong to a weight near them: no model here has a place for them."""
    owners = {name.rpartition(".")[0].rpartition(".")[0]: packed for name, packed in found.items()}
    for name in source.raw.entries:
        if name.endswith(_CACHE):
            above = name.rpartition(".")[0]
            owner = owners.get(above) or owners.get(above.rpartition(".")[0]) or next(iter(found.values()), None)
            if owner is not None and name not in owner.parts:
                owner.parts += (name,)


SCHEME = Scheme(check, collect)
