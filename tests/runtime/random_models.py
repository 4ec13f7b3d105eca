"""Small random models of several architectures, float and quantized, and what unmodified mlx-lm makes of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from tiny import DEEPSEEK, LLAMA

from mlxq.architectures.registry import build_model

BASE = {k: v for k, v in LLAMA.items() if k not in ("architectures", "model_type")}

#: name -> config, and the bits to quantize to (None: float).
ZOO: dict[str, tuple[dict[str, Any], int | None]] = {
    "llama": (LLAMA, None),
    "llama_4bit": (LLAMA, 4),
    "llama_tied_3bit": (LLAMA | {"tie_word_embeddings": True}, 3),
    "qwen2_bias_8bit": (BASE | {"model_type": "qwen2"}, 8),
    "gemma2_softcap_6bit": (
        BASE
        | {
            "model_type": "gemma2",
            "head_dim": 32,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "query_pre_attn_scalar": 32.0,
        },
        6,
    ),
    "gemma3_sliding": (
        BASE | {"model_type": "gemma3_text", "head_dim": 32, "sliding_window": 8, "sliding_window_pattern": 2},
        None,
    ),
    "mixtral": (BASE | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}, None),
    "qwen3_moe_4bit": (
        BASE
        | {
            "model_type": "qwen3_moe",
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "moe_intermediate_size": 64,
            "head_dim": 32,
            "norm_topk_prob": True,
        },
        4,
    ),
    # MultiLinear, which only these models have.
    "deepseek_v3_4bit": (DEEPSEEK, 4),
    # Attention sinks, sliding windows, and experts with a bias.
    "gpt_oss_8bit": (
        BASE
        | {
            "model_type": "gpt_oss",
            "head_dim": 32,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 8,
            "rope_theta": 150000,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 32.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 4096,
            },
        },
        8,
    ),
}


def save_random(directory: Path, config: dict[str, Any], bits: int | None, dtype: mx.Dtype = mx.float32) -> Path:
    """A model with mlx's own random weights, quantized by mlx itself, as an MLX directory."""
    directory.mkdir(parents=True)
    mx.random.seed(1)
    model = build_model(config)
    model.set_dtype(dtype)
    config = dict(config)
    if bits is not None:
        nn.quantize(model, group_size=32, bits=bits)
        config["quantization"] = {"group_size": 32, "bits": bits, "mode": "affine"}
    mx.save_safetensors(
        str(directory / "model.safetensors"), dict(tree_flatten(model.parameters())), metadata={"format": "mlx"}
    )
    (directory / "config.json").write_text(json.dumps(config))
    return directory


#: 24 prompt tokens, then 2 more with the cache; well beyond the sliding window of 8.
PROMPT = [(7 * i * i + 3 * i + 11) % 250 for i in range(24)]
CONTINUATION = [5, 77]

_STOCK = """
import json, sys
import mlx.core as mx, numpy as np
from pathlib import Path
from mlx_lm.utils import load_model
from mlx_lm.models.cache import make_prompt_cache
job = json.loads(sys.argv[1])
out = {}
for name, path in job["models"].items():
    model, _ = load_model(Path(path), lazy=True)
    if job["float32"]:
        model.set_dtype(mx.float32)
    cache = make_prompt_cache(model)
    parts = [model(mx.array([job["prompt"]]), cache=cache)]
    parts += [model(mx.array([[t]]), cache=cache) for t in job["continuation"]]
    out[name] = np.array(mx.concatenate(parts, axis=1)[0].astype(mx.float32))
np.savez(job["out"], **out)
"""


def stock_logits(models: dict[str, Path], out: Path, float32: bool = False) -> dict[str, np.ndarray]:
    """Logits `[len(PROMPT) + len(CONTINUATION), vocab]` of unmodified mlx-lm, in a process of its own.

    In the directory's dtype, or with every float parameter cast to float32.
    """
    job = {
        "models": {name: str(path) for name, path in models.items()},
        "prompt": PROMPT,
        "continuation": CONTINUATION,
        "out": str(out),
        "float32": float32,
    }
    done = subprocess.run([sys.executable, "-c", _STOCK, json.dumps(job)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    with np.load(out) as arrays:
        return dict(arrays)
