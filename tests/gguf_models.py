"""Small GGUF files for tests, written with `gguf.GGUFWriter` the way llama.cpp's converter writes them."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, LAYERS, VOCAB = 64, 4, 2, 16, 96, 2, 40


def permute(w: np.ndarray, n_heads: int) -> np.ndarray:
    """What the converter does to q and k: rows of each head from halves to pairs."""
    return w.reshape(n_heads, 2, w.shape[0] // n_heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def linear_shapes(layer: int) -> dict[str, tuple[int, int]]:
    return {
        f"model.layers.{layer}.self_attn.q_proj.weight": (HEADS * HEAD_DIM, HIDDEN),
        f"model.layers.{layer}.self_attn.k_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
        f"model.layers.{layer}.self_attn.v_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
        f"model.layers.{layer}.self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD_DIM),
        f"model.layers.{layer}.mlp.gate_proj.weight": (FFN, HIDDEN),
        f"model.layers.{layer}.mlp.up_proj.weight": (FFN, HIDDEN),
        f"model.layers.{layer}.mlp.down_proj.weight": (HIDDEN, FFN),
    }


GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def llama_weights(seed: int = 0, tied: bool = True, layers: int = LAYERS, vocab: int = VOCAB) -> dict[str, np.ndarray]:
    """A llama's float32 weights under their Hugging Face names."""
    rng = np.random.default_rng(seed)
    shapes = {"model.embed_tokens.weight": (vocab, HIDDEN), "model.norm.weight": (HIDDEN,)}
    if not tied:
        shapes["lm_head.weight"] = (vocab, HIDDEN)
    for layer in range(layers):
        shapes |= linear_shapes(layer)
        shapes[f"model.layers.{layer}.input_layernorm.weight"] = (HIDDEN,)
        shapes[f"model.layers.{layer}.post_attention_layernorm.weight"] = (HIDDEN,)
    return {n: rng.normal(1.0 if "norm" in n else 0.0, 0.1, s).astype(np.float32) for n, s in shapes.items()}


def gguf_name(name: str) -> str:
    top = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in top:
        return top[name]
    _, _, layer, rest = name.split(".", 3)
    stem, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{GGUF_NAMES[stem]}.{kind}"


def add_sizes(writer: gguf.GGUFWriter, layers: int, hidden: int, ffn: int, heads: int, kv_heads: int) -> None:
    """What every model of these tests says of its sizes."""
    writer.add_block_count(layers)
    writer.add_context_length(256)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)


def new_writer(path: Path, arch: str = "llama", layers: int = LAYERS, **numbers) -> gguf.GGUFWriter:
    writer = gguf.GGUFWriter(str(path), arch)
    add_sizes(writer, layers, HIDDEN, FFN, HEADS, KV_HEADS)
    writer.add_rope_dimension_count(HEAD_DIM)
    for key, value in numbers.items():
        writer.add_key_value(key.replace("__", "."), value, _value_type(value))
    return writer


def _value_type(value: object) -> gguf.GGUFValueType:
    kinds = {bool: gguf.GGUFValueType.BOOL, int: gguf.GGUFValueType.UINT32, float: gguf.GGUFValueType.FLOAT32}
    return kinds.get(type(value), gguf.GGUFValueType.STRING)


def add_tensor(writer: gguf.GGUFWriter, name: str, w: np.ndarray, type_name: str = "F32") -> None:
    kind = gguf.GGMLQuantizationType[type_name]
    data = gguf.quants.quantize(w, kind)
    writer.add_tensor(name, data, raw_shape=data.shape, raw_dtype=kind)


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_llama(
    path: Path,
    weights: dict[str, np.ndarray],
    type_name: str = "F32",
    arch: str = "llama",
    extra: dict[str, np.ndarray] | None = None,
    configure=None,
    **numbers,
) -> Path:
    """Write `weights` with matrices as `type_name` and vectors as F32; q and k permuted for the llama architecture."""
    layers = 1 + max(int(n.split(".")[2]) for n in weights if n.startswith("model.layers."))
    writer = new_writer(path, arch, layers, **numbers)
    if configure is not None:
        configure(writer)
        pad_vocabulary(writer, len(weights["model.embed_tokens.weight"]))
    for name, w in weights.items():
        if arch == "llama" and ".q_proj." in name:
            w = permute(w, HEADS)
        if arch == "llama" and ".k_proj." in name:
            w = permute(w, KV_HEADS)
        add_tensor(writer, gguf_name(name), w, type_name if w.ndim > 1 else "F32")
    for name, w in (extra or {}).items():
        add_tensor(writer, name, w)
    finish(writer)
    return path


def pad_vocabulary(writer: gguf.GGUFWriter, rows: int) -> None:
    """One token for every row of the embedding, as converters pad: the further ones are unused."""
    filling = {"tokens": "[PAD{}]", "token_type": 5, "scores": -1000.0}
    present = {n: writer.kv_data[0].get(f"tokenizer.ggml.{n}") for n in filling}
    if present["tokens"] is None:
        return
    numbers = range(len(present["tokens"].value), rows)
    for name, fill in filling.items():
        if present[name] is not None:
            present[name].value = [
                *present[name].value,
                *(fill.format(i) if name == "tokens" else fill for i in numbers),
            ]


def byte_alphabet() -> list[str]:
    """GPT-2's printable stand-in for each byte, by byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return [chr(b) if b in printable else chr(256 + others.index(b)) for b in range(256)]


def add_byte_tokenizer(writer: gguf.GGUFWriter, pre: str = "gpt-2", merges: list[str] | None = None) -> int:
    """A byte-level vocabulary: bytes, the merges' results, then a word that no merge makes, begin, end, a user mark."""
    merges = merges or ["a b"]
    tokens = byte_alphabet() + list(dict.fromkeys(m.replace(" ", "") for m in merges))
    n = len(tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([*tokens, "unreachable", "<|begin of text|>", "<|end of text|>", "<|user mark|>"])
    writer.add_token_types([1] * n + [1, 3, 3, 4])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(n + 1)
    writer.add_eos_token_id(n + 2)
    return n + 4
