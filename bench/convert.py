"""Round a checkpoint to 4-bit group 64, without the proof, against `mlx_lm.convert`, and with twice the layers.

    python bench/convert.py CHECKPOINT [--runs 5]

Both write the same bits for every tensor (`--tensor-type embed_tokens=4` lowers mlxq's embedding to the peer's 4).
Bars: wall time and peak memory at most 0.5 x the peer's; the same peak memory for twice the layers.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from measure import compare, median, spread

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}


def synthetic(path: Path, tokenizer: Path, layers: int) -> Path:
    """A random llama with `layers` blocks of 16M weights each."""
    from make_reference import write_safetensors

    rng = np.random.default_rng(0)
    c = CONFIG | {"num_hidden_layers": layers}
    d, f, kv = c["hidden_size"], c["intermediate_size"], c["hidden_size"] // 4
    shapes = {"model.embed_tokens.weight": (c["vocab_size"], d), "model.norm.weight": (d,)}
    for i in range(layers):
        p = f"model.layers.{i}."
        shapes |= {p + "input_layernorm.weight": (d,), p + "post_attention_layernorm.weight": (d,)}
        shapes |= {p + f"self_attn.{n}_proj.weight": (s, d) for n, s in (("q", d), ("k", kv), ("v", kv), ("o", d))}
        shapes |= {
            p + "mlp.gate_proj.weight": (f, d),
            p + "mlp.up_proj.weight": (f, d),
            p + "mlp.down_proj.weight": (d, f),
        }
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(c))
    write_safetensors(
        path / "model.safetensors",
        {n: rng.standard_normal(s, dtype=np.float32) * np.float32(0.02) for n, s in shapes.items()},
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, path / name)
    return path


def ours(source: Path, out: Path) -> list[str]:
    code = (
        "import sys, mlxq; mlxq.convert("
        "sys.argv[1], sys.argv[2], bits=4, group_size=64, tensor_types=['embed_tokens=4'], method='rtn', verify=False)"
    )
    shutil.rmtree(out, ignore_errors=True)
    return [sys.executable, "-c", code, str(source), str(out)]


def peer(source: Path, out: Path) -> list[str]:
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "mlx_lm", "convert", "--hf-path", str(source), "--mlx-path", str(out)]
    return [*command, "-q", "--q-bits", "4", "--q-group-size", "64"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as tmp:
        work = Path(tmp)
        results = compare(
            {
                "mlxq": lambda: ours(args.checkpoint, work / "ours"),
                "mlx_lm.convert": lambda: peer(args.checkpoint, work / "peer"),
            },
            args.runs,
        )
        for name, runs in results.items():
            seconds, peak = [r.seconds for r in runs], [r.peak_mb for r in runs]
            print(f"{name:<16} {spread(seconds)} s   {spread(peak)} MB")
        a, b = results.values()
        time_ratio = median([r.seconds for r in a]) / median([r.seconds for r in b])
        peak_ratio = median([r.peak_mb for r in a]) / median([r.peak_mb for r in b])
        print(f"mlxq / peer: time {time_ratio:.2f} (bar 0.5), peak memory {peak_ratio:.2f} (bar 0.5)")

        small = synthetic(work / "12", args.checkpoint, 12)
        large = synthetic(work / "24", args.checkpoint, 24)
        layers = compare(
            {"12 layers": lambda: ours(small, work / "o12"), "24 layers": lambda: ours(large, work / "o24")}, args.runs
        )
        for name, runs in layers.items():
            print(f"{name:<16} {spread([r.seconds for r in runs])} s   {spread([r.peak_mb for r in runs])} MB")


if __name__ == "__main__":
    main()
