"""Small random models on disk, in Hugging Face naming, for tests: `make_model` and its parts. Seeded."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np

from mlxq.formats.floats import from_float32

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": 257,
    "eos_token_id": 256,
}
#: Latent attention, which multiplies by a stack of matrices, beside experts that are chosen in groups.
DEEPSEEK: dict[str, Any] = {k: v for k, v in LLAMA.items() if k != "architectures"} | {
    "model_type": "deepseek_v3",
    "num_key_value_heads": 4,
    "moe_intermediate_size": 64,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 64,
    "q_lora_rank": 64,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "rope_scaling": None,
}


def llama_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a llama checkpoint's tensors."""
    d, f = config["hidden_size"], config["intermediate_size"]
    kv = d // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], d)}
    for i in range(config["num_hidden_layers"]):
        p = f"model.layers.{i}."
        shapes |= {p + "input_layernorm.weight": (d,), p + "post_attention_layernorm.weight": (d,)}
        shapes |= {p + f"self_attn.{n}_proj.weight": (s, d) for n, s in (("q", d), ("k", kv), ("v", kv), ("o", d))}
        shapes |= {p + "mlp.gate_proj.weight": (f, d), p + "mlp.up_proj.weight": (f, d)}
        shapes |= {p + "mlp.down_proj.weight": (d, f)}
    shapes["model.norm.weight"] = (d,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], d)
    return shapes


def random_tensors(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, np.ndarray]:
    """float32 weights of deviation 1/sqrt(in_features); norms near 1."""
    rng = np.random.default_rng(seed)
    out = {}
    for name, shape in shapes.items():
        w = rng.standard_normal(shape, dtype=np.float32)
        out[name] = w * np.float32(shape[-1] ** -0.5) if len(shape) > 1 else 1 + w * np.float32(0.1)
    return out


def write_safetensors(path: Path, tensors: dict[str, np.ndarray], dtype: str = "BF16") -> None:
    """float32 arrays stored as `dtype`; written by hand so that tests do not depend on the code under test."""
    blobs = {name: from_float32(np.ascontiguousarray(t, np.float32), dtype) for name, t in tensors.items()}
    header: dict[str, Any] = {}
    offset = 0
    for name, blob in blobs.items():
        header[name] = {"dtype": dtype, "shape": list(blob.shape), "data_offsets": [offset, offset + blob.nbytes]}
        offset += blob.nbytes
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(b.tobytes() for b in blobs.values()))


def write_tokenizer(directory: Path) -> None:
    """A byte-level tokenizer of 256 bytes, `<eos>` (256) and `<bos>` (257), without merges, with a chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<eos>", special=True), AddedToken("<bos>", special=True)])
    tokenizer.save(str(directory / "tokenizer.json"))
    template = "{% for m in messages %}<bos>{{ m.role }}: {{ m.content }}\n{% endfor %}<bos>assistant: "
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<eos>",
        "bos_token": "<bos>",
        "chat_template": template,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def make_model(
    directory: Path,
    *,
    dtype: str = "BF16",
    seed: int = 0,
    tensors: dict[str, np.ndarray] | None = None,
    tokenizer: bool = True,
    **changes: Any,
) -> Path:
    """A random llama checkpoint in `directory`; `changes` go into its config, `tensors` replace the random ones."""
    config = LLAMA | changes
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    weights = random_tensors(llama_shapes(config), seed) if tensors is None else tensors
    write_safetensors(directory / "model.safetensors", weights, dtype)
    if tokenizer:
        write_tokenizer(directory)
    return directory


def add_merge(directory: Path) -> Path:
    """Give a model's tokenizer a merge, without which llama.cpp takes none; its special tokens move up by one."""
    path = directory / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["vocab"]["th"] = 256
    tokenizer["model"]["merges"] = [["t", "h"]]
    for token in tokenizer["added_tokens"]:
        token["id"] += 1
    path.write_text(json.dumps(tokenizer))
    return directory
