"""Small random models as producers of FP8, MX, NVFP4, compressed-tensors and bitsandbytes would store them.

Encoders as short as can be: what the bytes mean is checked against the producers by `goldens/packed_floats.npz`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from packed_cases import write
from tiny import LLAMA, add_merge, llama_shapes, random_tensors, write_tokenizer

from mlxq.formats import affine, float8, float_modes, nf4
from mlxq.formats.floats import from_float32

Parts = dict[str, tuple[str, np.ndarray]]
_E4M3 = float8.E4M3[np.arange(256) & 0x7F != 0x7F]


def nearest(x: np.ndarray, values: np.ndarray, codes: np.ndarray | None = None) -> np.ndarray:
    """Code of each number's nearest value."""
    codes = np.arange(len(values)) if codes is None else codes
    order = np.argsort(values, kind="stable")
    table = values[order]
    return codes[order][np.searchsorted((table[1:] + table[:-1]) / 2, x)].astype(np.uint8)


def e4m3(x: np.ndarray) -> np.ndarray:
    return nearest(x, _E4M3, np.flatnonzero(np.arange(256) & 0x7F != 0x7F))


def fp8_blocks(w: np.ndarray, powers_of_two: bool = False) -> Parts:
    """128 x 128 blocks."""
    grid = float8.block_grid(w.shape, (128, 128))
    padded = np.zeros((grid[0] * 128, grid[1] * 128), np.float32)
    padded[: w.shape[0], : w.shape[1]] = w
    scales = np.abs(padded).reshape(grid[0], 128, grid[1], 128).max((1, 3)) / 448
    scales = (np.exp2(np.ceil(np.log2(scales))) if powers_of_two else scales).astype(np.float32)
    codes = e4m3(w / float8.spread(scales, w.shape, (128, 128)))
    return {"weight": ("F8_E4M3", codes), "weight_scale_inv": ("F32", scales)}


def fp8_rows(w: np.ndarray) -> Parts:
    scales = (np.abs(w).max(1, keepdims=True) / 448).astype(np.float32)
    return {"weight": ("F8_E4M3", e4m3(w / scales)), "weight_scale": ("F32", scales)}


def fp8_tensor(w: np.ndarray) -> Parts:
    scale = np.float32(np.abs(w).max() / 448)
    parts = {"weight": ("F8_E4M3", e4m3(w / scale)), "weight_scale": ("F32", np.array(scale))}
    return parts | {"input_scale": ("F32", np.array(np.float32(1)))}


def mxfp4(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bytes of codes `[N, K / 2]` and of scales `[N, K / 32]`."""
    groups = w.reshape(len(w), -1, 32)
    exponents = np.floor(np.log2(np.abs(groups).max(-1))) - 2
    codes = nearest(groups / np.exp2(exponents)[..., None], float_modes.E2M1)
    return affine.pack(codes.reshape(w.shape), 4).view(np.uint8), (exponents + 127).astype(np.uint8)


def ct_mxfp4(w: np.ndarray) -> Parts:
    codes, scales = mxfp4(w)
    return {"weight_packed": ("U8", codes), "weight_scale": ("U8", scales)}


def nvfp4(w: np.ndarray, names: tuple[str, str], divides: bool) -> Parts:
    factor = np.float32(np.abs(w).max() / (6 * 448))
    groups = w.reshape(len(w), -1, 16)
    scales = e4m3(np.abs(groups).max(-1) / 6 / factor)
    codes = nearest(groups / (float8.E4M3[scales] * factor)[..., None], float_modes.E2M1)
    packed = affine.pack(codes.reshape(w.shape), 4).view(np.uint8)
    whole = np.array([1 / factor if divides else factor], np.float32)
    return {names[0]: ("U8", packed), "weight_scale": ("F8_E4M3", scales), names[1]: ("F32", whole)}


def ct_int4(w: np.ndarray, group_size: int = 32) -> Parts:
    groups = w.reshape(len(w), -1, group_size)
    scales = from_float32((np.abs(groups).max(-1) / 7).astype(np.float32), "BF16")
    wide = (scales.astype(np.uint32) << 16).view(np.float32)[..., None]
    codes = (np.clip(np.rint(groups / wide), -8, 7) + 8).astype(np.uint8).reshape(w.shape)
    return {
        "weight_packed": ("I32", affine.pack(codes, 4).view(np.int32)),
        "weight_scale": ("BF16", scales),
        "weight_shape": ("I64", np.array(w.shape)),
    }


def ct_int8(w: np.ndarray) -> Parts:
    scales = from_float32((np.abs(w).max(1, keepdims=True) / 127).astype(np.float32), "BF16")
    codes = np.clip(np.rint(w / (scales.astype(np.uint32) << 16).view(np.float32)), -128, 127).astype(np.int8)
    return {"weight": ("I8", codes), "weight_scale": ("BF16", scales)}


def bnb_nf4(w: np.ndarray) -> Parts:
    blocks = w.reshape(-1, 64)
    absmax = np.abs(blocks).max(1)
    codes = nearest(blocks / absmax[:, None], nf4.TABLES["nf4"]).reshape(-1)
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(w.shape)}
    text = np.frombuffer(json.dumps(state).encode(), np.uint8)
    return {
        "weight": ("U8", (codes[0::2] << 4 | codes[1::2])[:, None]),
        "weight.absmax": ("F32", absmax),
        "weight.quant_map": ("F32", nf4.TABLES["nf4"]),
        "weight.quant_state.bitsandbytes__nf4": ("U8", text),
    }


def bnb_int8(w: np.ndarray) -> Parts:
    largest = np.abs(w).max(1)
    codes = np.rint(w / largest[:, None] * 127).astype(np.int8)
    return {"weight": ("I8", codes), "SCB": ("F32", largest), "weight_format": ("U8", np.array(0, np.uint8))}


def ct_settings(format_: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "symmetric": True} | weights}
    return {
        "quant_method": "compressed-tensors",
        "format": format_,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


BLOCKS = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
#: Name -> packer and `quantization_config`.
PACKERS: dict[str, tuple[Callable[[np.ndarray], Parts], dict[str, Any]]] = {
    "fp8-blocks": (fp8_blocks, BLOCKS),
    "fp8-ue8m0": (lambda w: fp8_blocks(w, True), BLOCKS | {"scale_fmt": "ue8m0"}),
    "fp8-tensor": (fp8_tensor, {"quant_method": "fp8", "activation_scheme": "static"}),
    "fp8-rows": (fp8_rows, {"quant_method": "fbgemm_fp8"}),
    "ct-mxfp4": (ct_mxfp4, ct_settings("mxfp4-pack-quantized", type="float", strategy="group", group_size=32)),
    "ct-nvfp4": (
        lambda w: nvfp4(w, ("weight_packed", "weight_global_scale"), True),
        ct_settings("nvfp4-pack-quantized", type="float", strategy="tensor_group", group_size=16),
    ),
    "modelopt-nvfp4": (
        lambda w: nvfp4(w, ("weight", "weight_scale_2"), False),
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16, "ignore": ["lm_head"]},
    ),
    "modelopt-fp8": (fp8_tensor, {"quant_method": "modelopt", "quant_algo": "FP8"}),
    "ct-int4": (ct_int4, ct_settings("pack-quantized", strategy="group", group_size=32)),
    "ct-int8": (ct_int8, ct_settings("int-quantized", num_bits=8, strategy="channel")),
    "bnb-nf4": (bnb_nf4, {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
    "bnb-int8": (bnb_int8, {"quant_method": "bitsandbytes", "load_in_8bit": True}),
}


def make_packed_floats(directory: Path, name: str, seed: int = 0, **changes: Any) -> Path:
    """A llama whose projections one of `PACKERS` packs; the rest is bfloat16."""
    packer, settings = PACKERS[name]
    config = LLAMA | {"torch_dtype": "bfloat16"} | changes
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    tensors: Parts = {}
    for full, w in random_tensors(llama_shapes(config), seed).items():
        if full.endswith("_proj.weight"):
            tensors |= {f"{full.removesuffix('.weight')}.{k}": v for k, v in packer(w).items()}
        else:
            tensors[full] = ("BF16", from_float32(w, "BF16"))
    write(directory / "model.safetensors", tensors)
    write_tokenizer(directory)
    return add_merge(directory)


GPT_OSS = {
    "model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "num_local_experts": 4, "num_experts_per_tok": 2, "vocab_size": 320, "rms_norm_eps": 1e-5, "rope_theta": 150000.0,
    "sliding_window": 16, "tie_word_embeddings": False, "layer_types": ["sliding_attention", "full_attention"],
    "max_position_embeddings": 131072, "torch_dtype": "bfloat16", "bos_token_id": 257, "eos_token_id": 256,
    "attention_bias": True, "swiglu_limit": 7.0,
    "rope_scaling": {
        "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
        "original_max_position_embeddings": 4096,
    },
}  # fmt: skip


def make_gpt_oss(directory: Path) -> Path:
    """gpt-oss as OpenAI publishes it: experts in MXFP4, their biases and all else in bfloat16."""
    rng = np.random.default_rng(0)
    c, tensors = GPT_OSS, {}

    def add(name: str, *shape: int) -> None:
        w = rng.standard_normal(shape, dtype=np.float32) * np.float32(shape[-1] ** -0.5)
        tensors[name] = ("BF16", from_float32(w + (name.endswith("norm.weight")), "BF16"))

    d, f, e = c["hidden_size"], c["intermediate_size"], c["num_local_experts"]
    add("model.embed_tokens.weight", c["vocab_size"], d)
    for i in range(c["num_hidden_layers"]):
        p = f"model.layers.{i}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            add(f"{p}{norm}.weight", d)
        for n, rows, columns in (("q", 128, d), ("k", 64, d), ("v", 64, d), ("o", d, 128)):
            add(f"{p}self_attn.{n}_proj.weight", rows, columns)
            add(f"{p}self_attn.{n}_proj.bias", rows)
        add(f"{p}self_attn.sinks", 4)
        add(f"{p}mlp.router.weight", e, d)
        add(f"{p}mlp.router.bias", e)
        for n, rows, columns in (("gate_up_proj", 2 * f, d), ("down_proj", d, f)):
            codes, scales = mxfp4(rng.standard_normal((e * rows, columns), dtype=np.float32) * columns**-0.5)
            tensors[f"{p}mlp.experts.{n}_blocks"] = ("U8", codes.reshape(e, rows, columns // 32, 16))
            tensors[f"{p}mlp.experts.{n}_scales"] = ("U8", scales.reshape(e, rows, columns // 32))
            add(f"{p}mlp.experts.{n}_bias", e, rows)
    add("model.norm.weight", d)
    add("lm_head.weight", c["vocab_size"], d)
    directory.mkdir()
    settings = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    (directory / "config.json").write_text(json.dumps(c | {"quantization_config": settings}))
    write(directory / "model.safetensors", tensors)
    write_tokenizer(directory)
    return add_merge(directory)


QWEN3_MOE = {
    "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 128, "intermediate_size": 256,
    "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "num_experts": 4,
    "num_experts_per_tok": 2, "decoder_sparse_step": 1, "mlp_only_layers": [], "moe_intermediate_size": 64,
    "norm_topk_prob": True, "vocab_size": 320, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "tie_word_embeddings": False,
    "max_position_embeddings": 512, "torch_dtype": "bfloat16", "bos_token_id": 257, "eos_token_id": 256,
}  # fmt: skip


def make_packed_experts(directory: Path, name: str) -> Path:
    """A mixture of experts whose matrices one of `PACKERS` packs, each expert a tensor of its own."""
    packer, settings = PACKERS[name]
    layer = "model.layers.0."
    shapes = {"model.embed_tokens": (320, 128), "lm_head": (320, 128), f"{layer}mlp.gate": (4, 128)}
    shapes |= {"model.norm": (128,), f"{layer}input_layernorm": (128,), f"{layer}post_attention_layernorm": (128,)}
    shapes |= {f"{layer}self_attn.q_norm": (32,), f"{layer}self_attn.k_norm": (32,)}
    shapes |= {f"{layer}self_attn.{n}_proj": (s, 128) for n, s in (("q", 128), ("k", 64), ("v", 64), ("o", 128))}
    for e in range(4):
        expert = f"{layer}mlp.experts.{e}."
        shapes |= {f"{expert}gate_proj": (64, 128), f"{expert}up_proj": (64, 128), f"{expert}down_proj": (128, 64)}
    tensors: Parts = {}
    for module, w in random_tensors(shapes).items():
        if module.endswith("_proj"):
            tensors |= {f"{module}.{k}": v for k, v in packer(w).items()}
        else:
            tensors[f"{module}.weight"] = ("BF16", from_float32(w, "BF16"))
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(QWEN3_MOE | {"quantization_config": settings}))
    write(directory / "model.safetensors", tensors)
    write_tokenizer(directory)
    return add_merge(directory)
