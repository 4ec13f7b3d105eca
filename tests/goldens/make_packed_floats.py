"""Writes packed_floats.npz: small matrices packed, and decoded, by the producers' own code.

    pip install torch compressed-tensors bitsandbytes transformers numpy
    python tests/goldens/make_packed_floats.py    # torch 2.13, compressed-tensors 0.20, bitsandbytes 0.50, on a CPU

Each case is `<name>/<tensor>|<dtype>` for what the producer stores (floats as bits), `<name>/settings` (JSON, the
`quantization_config`), and `<name>/decoded|<dtype>`: the SHA-256 of the float32 weights that the producer's own
dequantization gives, in that dtype. FP8 by DeepSeek's formula (`inference/kernel.py` weight_dequant, a Triton kernel)
and NVFP4 by ModelOpt's (`nvfp4_tensor.py` dequantize) are computed with torch's own float8; both need CUDA.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import numpy as np
import torch
from bitsandbytes.backends.default import ops as default
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

N, K = 32, 256
NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.int32: "I32",
    torch.int64: "I64",
}
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
cases: dict[str, np.ndarray] = {}


def stored(t: torch.Tensor) -> np.ndarray:
    t = t.contiguous()
    if t.dtype == torch.bfloat16:
        return t.view(torch.int16).numpy().view(np.uint16)
    return t.view(torch.uint8).numpy() if t.dtype == torch.float8_e4m3fn else t.numpy()


def add(name: str, settings: dict[str, Any], tensors: dict[str, torch.Tensor], decoded: torch.Tensor) -> None:
    for key, t in tensors.items():
        cases[f"{name}/{key}|{NAMES[t.dtype]}"] = stored(t)
    cases[f"{name}/settings"] = np.array(json.dumps(settings))
    data = np.ascontiguousarray(decoded.float().numpy()).tobytes()
    cases[f"{name}/decoded|{NAMES[decoded.dtype]}"] = np.array(hashlib.sha256(data).hexdigest())


def compressed(name: str, format_: str, dtype: torch.dtype = torch.bfloat16, **args: Any) -> None:
    """A layer of compressed-tensors, scales and zero points by minimum and maximum."""
    w = torch.randn(N, K).to(dtype)
    how = QuantizationArgs(**args)
    scheme = QuantizationScheme(targets=["Linear"], weights=how)
    blocks = {"tensor": (N, K), "channel": (1, K), "block": tuple(how.block_structure or (0, 0))}
    rows, columns = blocks.get(how.strategy, (1, how.group_size))
    parts = w.float().reshape(N // rows, rows, K // columns, columns)
    low, high = parts.amin((1, 3)), parts.amax((1, 3))
    factor = None
    if how.strategy == "tensor_group":
        factor = (448 * 6 / w.float().abs().max()).reshape(1)
    scale, zero = calculate_qparams(low, high, how, global_scale=factor)
    if how.strategy == "tensor":
        scale, zero = scale.reshape(1), zero.reshape(1)
    if format_ in ("pack-quantized", "int-quantized", "float-quantized"):
        scale = scale.to(dtype)
    state = {"weight": w, "weight_scale": scale, "weight_zero_point": zero}
    if factor is not None:
        state["weight_global_scale"] = factor
    compressor = BaseCompressor.get_value_from_registry(format_)
    packed = compressor.compress(state, scheme)
    decoded = compressor.decompress(dict(packed), scheme)["weight"]
    group = {"targets": ["Linear"], "weights": json.loads(how.model_dump_json()), "format": format_}
    settings = {"quant_method": "compressed-tensors", "format": format_, "config_groups": {"group_0": group}}
    add(name, settings, {k: v for k, v in packed.items() if v is not None}, decoded)


def four_bits(name: str, kind: str, dtype: torch.dtype, nested: bool, blocksize: int = 64, shape: Any = (N, K)) -> None:
    w = torch.randn(shape).to(dtype)
    packed, state = bnb.quantize_4bit(w, blocksize=blocksize, compress_statistics=nested, quant_type=kind)
    tensors = {"weight": packed} | {f"weight.{k}": v for k, v in state.as_dict(packed=True).items()}
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}
    decoded = bnb.dequantize_4bit(packed, state)
    if shape[1] % blocksize:
        # bitsandbytes' CPU kernel takes other magnitudes than its CUDA kernel and its reference in torch do, where
        # blocks do not end with rows: the reference it is.
        absmax = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
        decoded = default._dequantize_4bit_compute(packed.reshape(-1), absmax, state.code, blocksize, shape, dtype)
    add(name, settings, tensors, decoded)


def eight_bits() -> None:
    codes, scb, _ = bnb.int8_vectorwise_quant(torch.randn(N, K).half())
    tensors = {"weight": codes, "SCB": scb, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    decoded = bnb.int8_vectorwise_dequant(codes, scb)
    add("bnb-int8", {"quant_method": "bitsandbytes", "load_in_8bit": True}, tensors, decoded)


def fp8(name: str, block: tuple[int, int], settings: dict[str, Any], key: str, powers_of_two: bool = False) -> None:
    rows, columns = 40, 160
    w = torch.randn(rows, columns)
    padded = torch.zeros(-(-rows // block[0]) * block[0], -(-columns // block[1]) * block[1])
    padded[:rows, :columns] = w
    parts = padded.reshape(len(padded) // block[0], block[0], -1, block[1])
    scale = parts.abs().amax((1, 3)) / 448
    if powers_of_two:
        scale = torch.exp2(torch.ceil(torch.log2(scale)))
    wide = scale.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[:rows, :columns]
    codes = (w / wide).to(torch.float8_e4m3fn)
    kept = scale.reshape([]) if scale.numel() == 1 else scale
    add(name, settings, {"weight": codes, key: kept}, codes.float() * wide)


def gpt_oss() -> None:
    blocks = torch.randint(0, 256, (2, 64, K // 32, 16), dtype=torch.uint8)
    scales = torch.randint(118, 130, (2, 64, K // 32), dtype=torch.uint8)
    tensors = {"gate_up_proj_blocks": blocks, "gate_up_proj_scales": scales}
    decoded = convert_moe_packed_tensors(blocks.clone(), scales.clone(), dtype=torch.bfloat16)
    # transformers keeps the input first.
    add("gpt-oss", {"quant_method": "mxfp4"}, tensors, decoded.transpose(1, 2))


def modelopt_nvfp4() -> None:
    codes = torch.randint(0, 16, (N, K), dtype=torch.uint8)
    scale = (torch.rand(N, K // 16) * 400 + 1).to(torch.float8_e4m3fn)
    factor = torch.tensor(0.00012345)
    wide = scale.float() * factor
    decoded = (E2M1[codes.long()].reshape(N, K // 16, 16) * wide[..., None]).reshape(N, K)
    tensors = {"weight": codes[:, ::2] | codes[:, 1::2] << 4, "weight_scale": scale, "weight_scale_2": factor}
    tensors["input_scale"] = torch.tensor(0.5)
    settings = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "group_size": 16}}
    add("modelopt-nvfp4", settings, tensors, decoded)


def make() -> None:
    torch.manual_seed(0)
    ints, whole = {"num_bits": 4, "type": "int"}, {"num_bits": 8, "type": "int"}
    pack = "pack-quantized"
    compressed("ct-int4-g128", pack, **ints, strategy="group", group_size=128)
    compressed("ct-int4-g32-asym", pack, torch.float16, **ints, strategy="group", group_size=32, symmetric=False)
    compressed("ct-int4-channel", pack, **ints, strategy="channel")
    compressed("ct-int4-channel-asym", pack, **ints, strategy="channel", symmetric=False)
    compressed("ct-int8-g64-asym", pack, torch.float32, **whole, strategy="group", group_size=64, symmetric=False)
    compressed("ct-int3-g64", pack, num_bits=3, type="int", strategy="group", group_size=64)
    compressed("ct-int8-channel", "int-quantized", **whole, strategy="channel")
    compressed("ct-int8-tensor", "int-quantized", **whole, strategy="tensor")
    compressed("ct-int8-channel-asym", "int-quantized", **whole, strategy="channel", symmetric=False)
    floats = {"num_bits": 8, "type": "float"}
    compressed("ct-fp8-tensor", "float-quantized", **floats, strategy="tensor")
    compressed("ct-fp8-channel", "float-quantized", torch.float32, **floats, strategy="channel")
    compressed("ct-fp8-block", "float-quantized", **floats, strategy="block", block_structure=[16, 64])
    compressed("ct-mxfp8", "mxfp8-quantized", **floats, strategy="group", group_size=32, scale_dtype=torch.uint8)
    four = {"num_bits": 4, "type": "float"}
    compressed("ct-mxfp4", "mxfp4-pack-quantized", **four, strategy="group", group_size=32, scale_dtype=torch.uint8)
    compressed(
        "ct-nvfp4",
        "nvfp4-pack-quantized",
        **four,
        strategy="tensor_group",
        group_size=16,
        scale_dtype=torch.float8_e4m3fn,
    )
    four_bits("bnb-nf4", "nf4", torch.float32, nested=False)
    four_bits("bnb-nf4-nested", "nf4", torch.bfloat16, nested=True)
    four_bits("bnb-fp4", "fp4", torch.float16, nested=False, blocksize=128)
    # Blocks that do not end where rows do, a last one that is short, and more than 256 blocks.
    four_bits("bnb-fp4-nested", "fp4", torch.float32, nested=True, shape=(181, 96))
    eight_bits()
    method = {"quant_method": "fp8"}
    blocks = method | {"weight_block_size": [16, 64]}
    fp8("fp8-blocks", (16, 64), blocks, "weight_scale_inv")
    fp8("fp8-ue8m0", (16, 64), blocks | {"scale_fmt": "ue8m0"}, "weight_scale_inv", powers_of_two=True)
    fp8("fp8-tensor", (40, 160), method, "weight_scale")
    fp8("fp8-rows", (1, 160), {"quant_method": "fbgemm_fp8"}, "weight_scale")
    gpt_oss()
    modelopt_nvfp4()
    np.savez_compressed(Path(__file__).with_name("packed_floats.npz"), **cases)


if __name__ == "__main__":
    make()
