"""Small GGUF models of random blocks, and what they should compute."""

from __future__ import annotations

from pathlib import Path

import gguf
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from gguf_models import add_byte_tokenizer, add_sizes
from random_blocks import random_blocks

from mlxq.architectures.parameters import ParameterMap

#: The vocabulary is `add_byte_tokenizer`'s.
HIDDEN, FFN, VOCAB, HEADS, KV_HEADS, EXPERTS = 256, 512, 261, 4, 2, 4
PROMPT = [(7 * i * i + 3 * i + 11) % VOCAB for i in range(20)]


def _shapes(arch: str, tied: bool) -> dict[str, tuple[int, ...]]:
    kv = HIDDEN // HEADS * KV_HEADS
    out = {"token_embd": (VOCAB, HIDDEN)} | ({} if tied else {"output": (VOCAB, HIDDEN)})
    for i in range(2):
        rows = {"attn_q": HIDDEN, "attn_k": kv, "attn_v": kv, "attn_output": HIDDEN}
        out |= {f"blk.{i}.{n}": (r, HIDDEN) for n, r in rows.items()}
        lead, suffix = ((), "") if arch == "llama" else ((EXPERTS,), "_exps")
        out |= {f"blk.{i}.ffn_{n}{suffix}": (*lead, FFN, HIDDEN) for n in ("gate", "up")}
        out[f"blk.{i}.ffn_down{suffix}"] = (*lead, HIDDEN, FFN)
    return out


def write(path: Path, type_name: str, arch: str = "llama", tied: bool = False) -> Path:
    """A model with every matrix of `type_name`, of random blocks: llama, or qwen3moe with stacked experts."""
    writer = gguf.GGUFWriter(str(path), arch)
    add_sizes(writer, 2, HIDDEN, FFN, HEADS, KV_HEADS)
    writer.add_key_length(HIDDEN // HEADS)
    writer.add_value_length(HIDDEN // HEADS)
    assert add_byte_tokenizer(writer) == VOCAB
    norms = {"output_norm": HIDDEN} | {f"blk.{i}.{n}_norm": HIDDEN for i in range(2) for n in ("attn", "ffn")}
    if arch == "qwen3moe":
        writer.add_expert_count(EXPERTS)
        writer.add_expert_used_count(2)
        writer.add_expert_feed_forward_length(FFN)
        norms |= {f"blk.{i}.attn_{n}_norm": HIDDEN // HEADS for i in range(2) for n in "qk"}
    rng = np.random.default_rng(5)
    for name, n in norms.items():
        writer.add_tensor(f"{name}.weight", rng.normal(1, 0.1, n).astype(np.float32))
    if arch == "qwen3moe":
        for i in range(2):
            writer.add_tensor(f"blk.{i}.ffn_gate_inp.weight", rng.normal(0, 0.3, (EXPERTS, HIDDEN)).astype(np.float32))
    kind = gguf.GGMLQuantizationType[type_name]
    for seed, (name, shape) in enumerate(_shapes(arch, tied).items()):
        blocks = random_blocks(type_name, shape, seed, size=1.0 if name == "token_embd" and not tied else None)
        writer.add_tensor(f"{name}.weight", blocks, raw_shape=blocks.shape, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def matrices(source: ParameterMap) -> list[str]:
    return [n for n, i in source.tensors.items() if i.module in ("linear", "embedding", "switch") and i.dtype != "F32"]


def logits_of(model: nn.Module, tokens: list[int]) -> np.ndarray:
    return np.array(model(mx.array([tokens]))[0])


def decoded(source: ParameterMap) -> nn.Module:
    """mlx-lm's own model with float32 weights."""
    model = source.new_model()
    model.load_weights([(n, mx.array(source.read(n).astype(np.float32))) for n in source.tensors])
    return model


def assert_same(logits: np.ndarray, expected: np.ndarray) -> None:
    # Sums of at most 512 products, rounded in another order: sqrt(512) * 2^-24 = 1.3e-6 for each of a dozen products on
    # a path through the model, of which each feeds the next: 2e-5. A wrong scale, order or expert changes everything.
    assert np.linalg.norm(logits - expected) <= 2e-5 * np.linalg.norm(expected)
    assert expected.std() > 1e-2
