"""Converted tensors of several architectures against what unmodified mlx-lm loads from the same checkpoint.

Checkpoints are written as Hugging Face has them (no head where it is tied, experts one by one, weights transposed
where a model has them so), so that every `sanitize` has its work to do.
"""

import json
import subprocess
import sys

import mlx.core as mx
import pytest
import tiny
from covering import quick_first
from mlx.utils import tree_flatten

import mlxq
from mlxq.architectures.registry import build_model

BASE = {k: v for k, v in tiny.LLAMA.items() if k not in ("architectures", "model_type")}


def tied(weights):
    return {name: w for name, w in weights.items() if not name.startswith("lm_head")}


def recurrent_gemma(weights):
    return tied({name: w.moveaxis(1, 2) if "conv_1d.weight" in name else w for name, w in weights.items()})


def split_experts(weights):
    names = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
    out = {}
    for name, w in weights.items():
        path, _, rest = name.partition(".switch_mlp.")
        if rest:
            linear = names[rest.removesuffix(".weight")]
            out |= {f"{path}.experts.{e}.{linear}.weight": w[e] for e in range(w.shape[0])}
        else:
            out[name] = w
    return out


def gpt2(weights):
    turned = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    return {n.removeprefix("model."): w.T if n.endswith(turned) else w for n, w in weights.items()}


#: name -> config, and what turns mlx-lm's parameters into a Hugging Face checkpoint.
ZOO = {
    "gemma3_text tied": (
        BASE | {"model_type": "gemma3_text", "head_dim": 32, "sliding_window": 8, "sliding_window_pattern": 2},
        tied,
    ),
    "gemma3_text with a head": (
        BASE | {"model_type": "gemma3_text", "head_dim": 32, "sliding_window": 8, "sliding_window_pattern": 2},
        dict,
    ),
    "qwen2 tied, with biases": (BASE | {"model_type": "qwen2", "tie_word_embeddings": True}, dict),
    "recurrent_gemma tied": (
        BASE
        | {
            "model_type": "recurrent_gemma",
            "attention_bias": False,
            "conv1d_width": 4,
            "logits_soft_cap": 30.0,
            "num_key_value_heads": 1,
            "attention_window_size": 16,
            "block_types": ["recurrent", "attention"],
        },
        recurrent_gemma,
    ),
    "mixtral": (BASE | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}, split_experts),
    "gpt2": (
        {
            "model_type": "gpt2",
            "n_ctx": 64,
            "n_embd": 128,
            "n_head": 4,
            "n_layer": 2,
            "n_positions": 64,
            "layer_norm_epsilon": 1e-5,
            "vocab_size": 320,
        },
        gpt2,
    ),
}

_COMPARE = """
import json, sys
import mlx.core as mx
from pathlib import Path
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model
job = json.loads(sys.argv[1])
wanted = dict(tree_flatten(load_model(Path(job["source"]), lazy=True)[0].parameters()))
result, _ = load_model(Path(job["result"]), lazy=True)
found = dict(tree_flatten(result.parameters()))
bits = {n: [m.group_size, m.bits] for n, m in result.named_modules() if hasattr(m, "bits")}
wrong = []
for name, w in wanted.items():
    path = name.rpartition(".")[0]
    if name in job["specs"]:
        if bits.get(path) != job["specs"][name]:
            wrong.append(f"{path}: {bits.get(path)}")
            continue
        parts = zip(("weight", "scales", "biases"), mx.quantize(w, *bits[path], stream=mx.cpu))
        expected = {f"{path}.{part}": a for part, a in parts}
    else:
        expected = {name: w}
    for part, a in expected.items():
        b = found.pop(part, None)
        if b is None or a.dtype != b.dtype or a.shape != b.shape or not mx.array_equal(a, b).item():
            wrong.append(part)
logits = result(mx.array([[1, 2, 3]]))
print(json.dumps({"wrong": wrong, "left": list(found), "finite": mx.isfinite(logits).all().item()}))
"""


@pytest.mark.parametrize("name", quick_first(ZOO, 3))
def test_converted_tensors_are_what_stock_mlx_quantizes(name, tmp_path):
    config, unsanitize = ZOO[name]
    source = tmp_path / "source"
    source.mkdir()
    mx.random.seed(0)
    weights = {}
    for key, a in tree_flatten(build_model(config).parameters()):
        noise = mx.random.normal(a.shape)
        w = noise * a.shape[-1] ** -0.5 if a.ndim > 1 else a + 0.1 * noise
        weights[key] = w.astype(mx.bfloat16)
    mx.save_safetensors(str(source / "model.safetensors"), unsanitize(weights), metadata={"format": "pt"})
    (source / "config.json").write_text(json.dumps(config))
    tiny.write_tokenizer(source)

    result = mlxq.convert(source, tmp_path / "result", bits=4, group_size=32, recipe="mixed", verify=False)
    specs = {p.info.name: [p.spec.group_size, p.spec.bits] for p in result.plan.tensors if p.spec}
    assert len(specs) > 8
    job = {"source": str(source), "result": str(tmp_path / "result"), "specs": specs}
    done = subprocess.run([sys.executable, "-c", _COMPARE, json.dumps(job)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout) == {"wrong": [], "left": [], "finite": True}
