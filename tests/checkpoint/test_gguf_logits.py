"""Every architecture end to end: mlx-lm's model of what GgufCheckpoint reads predicts what llama.cpp predicts."""

import numpy as np
import pytest
from gguf_models import (
    FFN,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    add_tensor,
    finish,
    new_writer,
)
from llamacpp import LlamaCpp

from mlxq.architectures.registry import build_model
from mlxq.checkpoint.gguf import GgufCheckpoint

LAYERS = 7  # One more than Gemma 3's period of sliding and full attention.
PROMPT = [72, 101, 3, 108, 111, 7, 40, 41, 42, 9, 200, 17] * 3
Q, KV = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM

ATTENTION = {
    "attn_norm": (HIDDEN,),
    "attn_q": (Q, HIDDEN),
    "attn_k": (KV, HIDDEN),
    "attn_v": (KV, HIDDEN),
    "attn_output": (HIDDEN, Q),
}
MLP = {"ffn_norm": (HIDDEN,), "ffn_gate": (FFN, HIDDEN), "ffn_up": (FFN, HIDDEN), "ffn_down": (HIDDEN, FFN)}
POST_NORMS = {"post_attention_norm": (HIDDEN,), "post_ffw_norm": (HIDDEN,)}
QK_NORMS = {"attn_q_norm": (HEAD_DIM,), "attn_k_norm": (HEAD_DIM,)}
PHI3 = {
    "attn_norm": (HIDDEN,),
    "attn_qkv": (Q + 2 * KV, HIDDEN),
    "attn_output": (HIDDEN, Q),
    "ffn_norm": (HIDDEN,),
    "ffn_up": (2 * FFN, HIDDEN),
    "ffn_down": (HIDDEN, FFN),
}
LENGTHS = {"attention__key_length": HEAD_DIM, "attention__value_length": HEAD_DIM}
#: case -> architecture, tensors of a layer, biases of a layer, metadata, tied output
CASES = {
    "llama": ("llama", ATTENTION | MLP, (), {}, True),
    "llama untied": ("llama", ATTENTION | MLP, (), {}, False),
    "llama linear": (
        "llama",
        ATTENTION | MLP,
        (),
        {"rope__scaling__type": "linear", "rope__scaling__factor": 4.0},
        True,
    ),
    "llama yarn": (
        "llama",
        ATTENTION | MLP,
        (),
        {
            "rope__scaling__type": "yarn",
            "rope__scaling__factor": 4.0,
            "rope__scaling__original_context_length": 64,
        },
        True,
    ),
    "qwen2": ("qwen2", ATTENTION | MLP, ("attn_q", "attn_k", "attn_v"), {}, True),
    "qwen3": ("qwen3", ATTENTION | MLP | QK_NORMS, (), LENGTHS, False),
    "gemma": ("gemma", ATTENTION | MLP, (), LENGTHS, True),
    "gemma2": (
        "gemma2",
        ATTENTION | MLP | POST_NORMS,
        (),
        LENGTHS
        | {
            "attention__sliding_window": 64,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        True,
    ),
    "gemma3": (
        "gemma3",
        ATTENTION | MLP | POST_NORMS | QK_NORMS,
        (),
        # Shorter than the prompt: the window matters.
        LENGTHS | {"attention__sliding_window": 8, "rope__scaling__type": "linear", "rope__scaling__factor": 8.0},
        True,
    ),
    "phi3": ("phi3", PHI3, (), {}, False),
}


def add_words(writer, n=300) -> int:
    """Tokens that are whole ASCII words: llama.cpp's server holds back parts of characters."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(["w", "0", "w0", *(f"word{i}" for i in range(n - 3))])
    writer.add_token_types([1] * n)
    writer.add_token_merges(["w 0"])
    writer.add_bos_token_id(3)
    writer.add_eos_token_id(4)
    return n


def write(path, arch, layer, biases, numbers, tied, extra=None):
    rng = np.random.default_rng(7)
    writer = new_writer(path, arch, LAYERS, **{f"{arch}__{key}": value for key, value in numbers.items()})
    vocab = add_words(writer)

    def add(name, shape, spread):
        # Norms around 1 (as Gemma's are written too); others large enough that attention is far from uniform.
        centre = 1.0 if "norm" in name else 0.0
        add_tensor(writer, name, rng.normal(centre, spread, shape).astype(np.float32))

    add("token_embd.weight", (vocab, HIDDEN), 0.5)
    add("output_norm.weight", (HIDDEN,), 0.3)
    if not tied:
        add("output.weight", (vocab, HIDDEN), 0.2)
    for i in range(LAYERS):
        for stem, shape in layer.items():
            add(f"blk.{i}.{stem}.weight", shape, 0.3 if len(shape) == 1 else 0.15)
        for stem in biases:
            add(f"blk.{i}.{stem}.bias", (layer[stem][0],), 0.5)
    for name, values in (extra or {}).items():
        add_tensor(writer, name, values)
    finish(writer)
    return path


def predict(path) -> np.ndarray:
    import mlx.core as mx

    with GgufCheckpoint(path) as checkpoint:
        model = build_model(checkpoint.config)
        weights = {name: mx.array(checkpoint.read(name)) for name in checkpoint.tensors}
    if hasattr(model, "sanitize"):
        weights = model.sanitize(weights)
    model.load_weights(list(weights.items()))
    logits = model(mx.array([PROMPT]))[0, -1]
    return np.array(logits - mx.logsumexp(logits))


def largest_error(path) -> float:
    expected, actual = LlamaCpp(path).logprobs(PROMPT, 40), predict(path)
    assert len(expected) == 40
    assert np.std(list(expected.values())) > 0.1
    return max(abs(actual[i] - p) for i, p in expected.items())


@pytest.mark.parametrize("case", CASES)
def test_next_token(tmp_path, case):
    path = write(tmp_path / "m.gguf", *CASES[case])
    # float32 on both sides, sums of at most 96 terms (relative error 96 * 6e-8) through 7 layers: measured 2e-5.
    # ggml looks GELU up in a float16 table (relative error 5e-4), so the Gemmas differ more: measured 3e-3.
    assert largest_error(path) < (2e-2 if case.startswith("gemma") else 2e-4)


def test_llama3_rope_scaling(tmp_path):
    wavelengths = 2 * np.pi * 10000.0 ** (np.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))
    smooth = np.clip((8192 / wavelengths - 1) / 3, 0, 1)
    divisors = (1 / ((1 - smooth) / 8 + smooth)).astype(np.float32)
    path = write(tmp_path / "m.gguf", *CASES["llama"], extra={"rope_freqs.weight": divisors})
    assert largest_error(path) < 2e-4


def test_rows_in_the_wrong_order_would_be_seen(tmp_path, monkeypatch):
    path = write(tmp_path / "m.gguf", *CASES["llama"])
    monkeypatch.setattr("mlxq.checkpoint.gguf.unpermuted_rows", lambda start, stop, head_dim: np.arange(start, stop))
    assert largest_error(path) > 0.1
