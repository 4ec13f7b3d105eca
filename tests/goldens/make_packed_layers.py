"""Writes packed_layers.npz: small matrices packed, and decoded, by the producers' own code.

    pip install torch gptqmodel autoawq numpy     # made with torch 2.13, GPTQModel 7.7.0, AutoAWQ 0.2.9, on a CPU
    python tests/goldens/make_packed_layers.py

Each case is `<name>/<tensor>` for what the producer stores, `<name>/settings` (JSON), and `<name>/decoded`: the SHA-256
of the float32 weights `[N, K]`, row-major, that the producer's own dequantization gives when its scales are cast to
float32. AutoAWQ's GEMV layouts have no dequantization that runs without CUDA: theirs are the weights that they were
packed from, `scales * (q - z)`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
import types
from pathlib import Path

import numpy as np
import torch

N = 32


def hollow(name: str) -> None:
    """A package without its `__init__`: AutoAWQ's imports all models, of transformers as it was."""
    spec = importlib.util.find_spec(name)
    module = types.ModuleType(name)
    module.__path__, module.__spec__ = list(spec.submodule_search_locations), spec
    sys.modules[name] = module


for package in ("awq", "awq.modules", "awq.modules.linear", "awq.utils"):
    hollow(package)

from awq.modules.linear.gemm import WQLinear_GEMM  # noqa: E402
from awq.modules.linear.gemv import WQLinear_GEMV  # noqa: E402
from awq.modules.linear.gemv_fast import WQLinear_GEMVFast  # noqa: E402
from awq.utils.packing_utils import dequantize_gemm  # noqa: E402
from gptqmodel import QuantizeConfig  # noqa: E402
from gptqmodel.nn_modules.qlinear.torch import TorchLinear  # noqa: E402
from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module  # noqa: E402


def digest(w: torch.Tensor) -> np.ndarray:
    data = np.ascontiguousarray(w.to(torch.float32).numpy()).tobytes()
    return np.array(hashlib.sha256(data).hexdigest())


def grid(w: torch.Tensor, bits: int, group_of: torch.Tensor, sym: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales (float16 numbers) and zero points, float32 `[N, n_groups]`, by minimum and maximum."""
    top = 2**bits - 1
    scales, zeros = [], []
    for g in range(int(group_of.max()) + 1):
        part = w[:, group_of == g]
        low, high = part.min(1).values.clamp(max=0), part.max(1).values.clamp(min=0)
        if sym:
            high = torch.maximum(-low, high)
            low = -high
        scale = ((high - low) / top).to(torch.float16).to(torch.float32)
        scales.append(scale)
        zeros.append(torch.full_like(scale, (top + 1) // 2) if sym else torch.round(-low / scale).clamp(0, top))
    return torch.stack(scales, 1), torch.stack(zeros, 1)


def linear(w: torch.Tensor) -> torch.nn.Linear:
    layer = torch.nn.Linear(w.shape[1], w.shape[0], bias=False)
    layer.weight.data = w.clone()
    return layer


def gptq(bits: int, group_size: int, sym: bool, desc_act: bool, version: int, w: torch.Tensor) -> dict:
    K = w.shape[1]
    size = K if group_size == -1 else group_size
    group_of = torch.arange(K) // size
    if desc_act:
        group_of = group_of[torch.randperm(K)]
    scales, zeros = grid(w, bits, group_of, sym)
    how = {"bits": bits, "group_size": group_size, "sym": sym, "desc_act": desc_act}
    layer = TorchLinear(**how, in_features=K, out_features=N, bias=False, pack_dtype=torch.int32, register_buffers=True)
    layer.pack_original(linear(w), scales, zeros, group_of.to(torch.int32))
    layer.post_init()
    stored = layer.scales
    layer.scales = stored.to(torch.float32)
    decoded = layer.dequantize_weight().T
    layer.scales = stored
    if version == 1:
        convert_gptq_v2_to_v1_format_module(layer, QuantizeConfig(bits=bits, group_size=group_size))
    settings = how | {"quant_method": "gptq", "checkpoint_format": "gptq" if version == 1 else "gptq_v2"}
    settings["meta"] = {"quantizer": ["gptqmodel:7.7.0"]}
    names = ("qweight", "qzeros", "scales", "g_idx")
    return {n: getattr(layer, n).numpy() for n in names} | {"settings": settings, "decoded": digest(decoded)}


def awq(layout: str, group_size: int, w: torch.Tensor) -> dict:
    K = w.shape[1]
    size = K if group_size == -1 else group_size
    group_of = torch.arange(K) // size
    scales, zeros = grid(w, 4, group_of, False)
    q = torch.round(w / scales[:, group_of] + zeros[:, group_of]).clamp(0, 15)
    w_hat = scales[:, group_of] * (q - zeros[:, group_of])
    kind = {"gemm": WQLinear_GEMM, "gemv": WQLinear_GEMV, "gemv_fast": WQLinear_GEMVFast}[layout]
    by_group = layout == "gemm"
    given = (scales.T.contiguous(), zeros.T.contiguous()) if by_group else (scales, zeros)
    layer = kind.from_linear(linear(w_hat), 4, size, scales=given[0], zeros=given[1])
    decoded = w_hat
    if layout == "gemm":
        decoded = dequantize_gemm(layer.qweight, layer.qzeros, layer.scales.to(torch.float32), 4, size).T
    if layout == "gemv_fast":
        n = scales.shape[1]
        stored, offsets = layer.scales[:n].T.to(torch.float32), layer.qzeros[:n].T.to(torch.float32)
        decoded = stored[:, group_of] * q + offsets[:, group_of]
    settings = {"quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": True, "version": layout}
    return {n: getattr(layer, n).numpy() for n in ("qweight", "qzeros", "scales")} | {
        "settings": settings,
        "decoded": digest(decoded),
    }


def cases() -> dict[str, dict]:
    torch.manual_seed(0)
    w = torch.randn(N, 256) * 0.05
    # Zero points of 0, which version 1 stores by borrowing.
    w[3] = w[3].abs()
    found = {}
    for bits in (2, 3, 4, 8):
        for version, sym, group_size, desc_act in (
            (1, True, 32, False),
            (1, False, -1, False),
            (1, False, 32, True),
            (2, True, 64, True),
            (2, False, 32, False),
        ):
            name = f"gptq-v{version}-{bits}bit-g{group_size}-{'sym' if sym else 'asym'}"
            found[name + "-act" * desc_act] = gptq(bits, group_size, sym, desc_act, version, w[:, :128])
    for layout in ("gemm", "gemv", "gemv_fast"):
        for group_size in (32, 64, 128, *((-1,) if layout == "gemm" else ())):
            found[f"awq-{layout}-g{group_size}"] = awq(layout, group_size, w)
    return found


def main() -> None:
    arrays = {}
    for name, parts in cases().items():
        parts["settings"] = np.array(json.dumps(parts["settings"], sort_keys=True))
        arrays |= {f"{name}/{key}": value for key, value in parts.items()}
    path = Path(__file__).with_name("packed_layers.npz")
    np.savez_compressed(path, **arrays)
    print(f"{path}: {len(arrays)} arrays, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
