"""Small random llamas as GPTQ's and AWQ's producers would store them: packed by `mlxq.formats`, which goldens check."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
from tiny import LLAMA, llama_shapes, random_tensors, write_tokenizer

from mlxq.formats import awq, gptq
from mlxq.formats.affine import pack
from mlxq.formats.floats import from_float32

_NAMES = {"float32": "F32", "float16": "F16", "uint16": "BF16", "int32": "I32", "int16": "I16", "uint8": "U8"}


def write_tensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    header, offset = {}, 0
    for name, a in tensors.items():
        header[name] = {
            "dtype": _NAMES[a.dtype.name],
            "shape": list(a.shape),
            "data_offsets": [offset, offset + a.nbytes],
        }
        offset += a.nbytes
    text = json.dumps(header).encode()
    data = b"".join(np.ascontiguousarray(a).tobytes() for a in tensors.values())
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def grid_of(w: np.ndarray, bits: int, group_of: np.ndarray, sym: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes `[N, K]`, scales float16 and zero points uint8 `[n_groups, N]` by minimum and maximum."""
    top, n_groups = 2**bits - 1, int(group_of.max()) + 1
    parts = [w[:, group_of == g] for g in range(n_groups)]
    low = np.minimum(np.stack([p.min(1) for p in parts]), -1e-4)
    high = np.maximum(np.stack([p.max(1) for p in parts]), 1e-4)
    if sym:
        high = np.maximum(-low, high)
        low = -high
    scales = ((high - low) / top).astype(np.float16)
    wide = scales.astype(np.float32)
    zeros = np.full(scales.shape, (top + 1) // 2) if sym else np.clip(np.rint(-low / wide), 1, top)
    codes = np.clip(np.rint(w / wide.T[:, group_of] + zeros.T[:, group_of]), 0, top)
    return codes.astype(np.uint8), scales, zeros.astype(np.uint8)


def gptq_parts(w, bits=4, group_size=32, sym=True, version=1, group_of=None) -> dict[str, np.ndarray]:
    """What GPTQ stores for one matrix."""
    K = w.shape[1]
    natural = np.arange(K) // (K if group_size == -1 else group_size)
    group_of = natural if group_of is None else group_of
    codes, scales, zeros = grid_of(w, bits, group_of, sym)
    return {
        "qweight": gptq.pack_weight(codes, bits),
        "qzeros": gptq.pack_zero_points(zeros, bits, version),
        "scales": scales,
        "g_idx": group_of.astype(np.int32),
    }


def awq_parts(w, layout="gemm", group_size=32) -> dict[str, np.ndarray]:
    """What AWQ stores for one matrix."""
    K = w.shape[1]
    group_size = K if group_size == -1 else group_size
    codes, scales, zeros = grid_of(w, 4, np.arange(K) // group_size, sym=False)
    if layout == "gemm":
        return {"qweight": awq.pack_gemm(codes.T), "qzeros": awq.pack_gemm(zeros), "scales": scales}
    width = awq.zeros_width(K // group_size, group_size)
    padded = np.zeros((len(w), 8 * width), np.float16)
    padded[:, : len(scales)] = scales.T
    if layout == "gemv":
        z = np.zeros((len(w), -(-8 * width // 32) * 32), np.uint8)
        z[:, : len(zeros)] = zeros.T
        words = {"qweight": pack(codes, 4).view(np.int32), "qzeros": pack(z, 4)[:, :width].view(np.int32)}
        return words | {"scales": padded}
    biases = np.zeros_like(padded)
    biases[:, : len(scales)] = -(scales * zeros.astype(np.float16)).T
    name = "scaled_zeros" if layout == "llm-awq" else "qzeros"
    return {"qweight": awq.pack_fast(codes), name: np.ascontiguousarray(biases.T), "scales": padded.T.copy()}


def make_packed_model(
    directory: Path,
    parts,
    settings: dict[str, Any],
    *,
    dtype: str = "F16",
    keep: tuple[str, ...] = ("lm_head",),
    seed: int = 0,
    **changes: Any,
) -> Path:
    """A llama whose projections `parts(w, name)` packs, all but those whose name holds one of `keep`."""
    names = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
    config = LLAMA | {"torch_dtype": names[dtype]} | changes
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    tensors: dict[str, np.ndarray] = {}
    for name, w in random_tensors(llama_shapes(config), seed).items():
        module = name.removesuffix(".weight")
        if not name.endswith(("_proj.weight", "lm_head.weight")) or any(k in name for k in keep):
            tensors[name] = from_float32(w, dtype)
            continue
        tensors |= {f"{module}.{part}": array for part, array in parts(w, name).items()}
    write_tensors(directory / "model.safetensors", tensors)
    write_tokenizer(directory)
    return directory


def gptq_settings(**changes: Any) -> dict[str, Any]:
    base = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
    return base | {"checkpoint_format": "gptq"} | changes


def awq_settings(**changes: Any) -> dict[str, Any]:
    return {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"} | changes
