"""Load an AWQ checkpoint to run it, and convert it, against mlx-lm's path for AWQ on the same file.

    python bench/packed.py CHECKPOINT [--runs 5] [--layers 20]

Two models: CHECKPOINT (float) packed as AWQ's GEMM layout with groups of 128, its embedding and head left float as
AutoAWQ leaves them; and a random llama of 61M weights a layer with a small vocabulary, since in a small model floats
are most of the memory. Both programs end with every parameter evaluated. Times are of the call alone (`load`,
`convert`), and of the process with its imports; the peak is the process's resident memory, in which mapped pages of
libraries count too: that of a process that only imports is given beside it.
Bars: time of the call and peak memory at most 0.5 x the peer's.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from measure import Run, compare, median, spread

from mlxq.checkpoint.source import open_checkpoint
from mlxq.formats import awq
from mlxq.formats.floats import to_float32

GROUP = 128
SETTINGS = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
RANDOM = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
}
_DTYPES = {"float16": "F16", "int32": "I32"}

#: A child appends the seconds of its call to a file: its output belongs to the programs.
_TIMED = "import sys, time; source, out, times = sys.argv[1:]; {imports}; began = time.perf_counter(); {call}; "
_TIMED += "open(times, 'a').write(f'{{time.perf_counter() - began}}\\n')"
LOADS = {
    "mlxq": _TIMED.format(imports="import mlxq", call="model = mlxq.load(source)"),
    "mlx-lm": _TIMED.format(imports="import mlx_lm", call="model = mlx_lm.load(source)"),
    "mlxq, imports": _TIMED.format(imports="import mlxq.runtime.load, transformers", call="pass"),
    "mlx-lm, imports": _TIMED.format(imports="import mlx_lm", call="pass"),
}
CONVERTS = {
    "mlxq": _TIMED.format(imports="import mlxq", call="mlxq.convert(source, out, verify=False)"),
    "mlx-lm": _TIMED.format(imports="import mlx_lm", call="mlx_lm.convert(source, out)"),
}

Part = tuple[str, np.ndarray]


def packed_checkpoint(source: Path, out: Path) -> Path:
    """The float checkpoint `source` as AWQ's, rounded to the nearest code between each group's extremes."""
    with open_checkpoint(source) as checkpoint:
        shapes = {name: info.shape for name, info in checkpoint.tensors.items()}

        def parts() -> Iterator[Part]:
            for name, info in checkpoint.tensors.items():
                w = to_float32(checkpoint.read(name), info.dtype)
                if name.endswith("_proj.weight"):
                    yield from _awq_parts(name.removesuffix(".weight"), w)
                else:
                    yield name, w.astype(np.float16)

        return _write(out, checkpoint.config | {"dtype": "float16"}, shapes, parts(), source)


def _awq_parts(module: str, w: np.ndarray) -> Iterator[Part]:
    groups = w.reshape(len(w), -1, GROUP)
    low, high = np.minimum(groups.min(-1), 0), np.maximum(groups.max(-1), 0)
    scales = np.maximum((high - low) / 15, 1e-6).astype(np.float16)
    zeros = np.clip(np.rint(-low / scales), 0, 15)
    codes = np.clip(np.rint(groups / scales[..., None].astype(np.float32) + zeros[..., None]), 0, 15)
    yield f"{module}.qweight", awq.pack_gemm(codes.reshape(w.shape).astype(np.uint8).T)
    yield f"{module}.qzeros", awq.pack_gemm(zeros.astype(np.uint8).T)
    yield f"{module}.scales", np.ascontiguousarray(scales.T)


def random_checkpoint(out: Path, layers: int, tokenizer: Path) -> Path:
    """A llama of random codes: quick to make, and no smaller to load than a trained one."""
    rng = np.random.default_rng(0)
    d, f, kv = RANDOM["hidden_size"], RANDOM["intermediate_size"], RANDOM["hidden_size"] // 4
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (RANDOM["vocab_size"], d)}
    for p in (f"model.layers.{i}." for i in range(layers)):
        shapes |= {p + "input_layernorm.weight": (d,), p + "post_attention_layernorm.weight": (d,)}
        shapes |= {p + f"self_attn.{n}_proj.weight": (s, d) for n, s in (("q", d), ("k", kv), ("v", kv), ("o", d))}
        shapes |= {p + f"mlp.{n}_proj.weight": s for n, s in (("gate", (f, d)), ("up", (f, d)), ("down", (d, f)))}
    shapes |= {"model.norm.weight": (d,), "lm_head.weight": (RANDOM["vocab_size"], d)}

    def words(*shape: int) -> np.ndarray:
        return np.frombuffer(rng.bytes(4 * int(np.prod(shape))), np.int32).reshape(shape)

    def parts() -> Iterator[Part]:
        for name, shape in shapes.items():
            if not name.endswith("_proj.weight"):
                yield name, np.full(shape, 0.02, np.float16)
                continue
            module, (N, K) = name.removesuffix(".weight"), shape
            yield f"{module}.qweight", words(K, N // 8)
            yield f"{module}.qzeros", words(K // GROUP, N // 8)
            yield f"{module}.scales", rng.uniform(0.001, 0.01, (K // GROUP, N)).astype(np.float16)

    return _write(out, RANDOM | {"num_hidden_layers": layers}, shapes, parts(), tokenizer)


def _write(
    out: Path, config: dict[str, object], shapes: dict[str, tuple[int, ...]], parts: Iterator[Part], tokenizer: Path
) -> Path:
    """A directory with these tensors, one in memory at a time; the header is made of the shapes alone."""
    header, offset = {}, 0
    for name, dtype, shape in _layout(shapes):
        nbytes = np.dtype(dtype).itemsize * int(np.prod(shape))
        header[name] = {"dtype": _DTYPES[dtype], "shape": shape, "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    text = json.dumps({"__metadata__": {"format": "pt"}} | header).encode()
    out.mkdir()
    with open(out / "model.safetensors", "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for expected, (name, array) in zip(header.items(), parts, strict=True):
            assert (name, list(array.shape)) == (expected[0], list(expected[1]["shape"])), name
            f.write(array.tobytes())
    (out / "config.json").write_text(json.dumps(config | {"quantization_config": SETTINGS}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, out / name)
    return out


def _layout(shapes: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    for name, shape in shapes.items():
        if not name.endswith("_proj.weight"):
            yield name, "float16", shape
            continue
        module, (N, K) = name.removesuffix(".weight"), shape
        yield f"{module}.qweight", "int32", (K, N // 8)
        yield f"{module}.qzeros", "int32", (K // GROUP, N // 8)
        yield f"{module}.scales", "float16", (K // GROUP, N)


def measure(programs: dict[str, str], source: Path, work: Path, runs: int) -> None:
    """Each program `runs` times, in turn; the first two are ours and the peer."""

    def command(name: str) -> list[str]:
        shutil.rmtree(work / "out", ignore_errors=True)
        return [sys.executable, "-c", programs[name], str(source), str(work / "out"), str(work / f"{name}.times")]

    for name in programs:
        (work / f"{name}.times").unlink(missing_ok=True)
    results = compare({name: lambda name=name: command(name) for name in programs}, runs)
    calls = {name: list(map(float, (work / f"{name}.times").read_text().split()))[1:] for name in programs}
    for name, found in results.items():
        process, peak = [r.seconds for r in found], [r.peak_mb for r in found]
        print(f"  {name:<16} call {spread(calls[name])} s   process {spread(process)} s   peak {spread(peak)} MB")
    ours, peer = list(programs)[:2]
    print(
        f"  mlxq / mlx-lm: call {median(calls[ours]) / median(calls[peer]):.2f} (bar 0.5),"
        f" process {_ratio(results[ours], results[peer], 'seconds'):.2f},"
        f" peak memory {_ratio(results[ours], results[peer], 'peak_mb'):.2f} (bar 0.5)",
        flush=True,
    )


def _ratio(ours: list[Run], peer: list[Run], field: str) -> float:
    return median([getattr(r, field) for r in ours]) / median([getattr(r, field) for r in peer])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--layers", type=int, default=20, help="of the random model")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as tmp:
        work = Path(tmp)
        models = {
            f"{args.checkpoint.name} as AWQ": packed_checkpoint(args.checkpoint, work / "packed"),
            f"random, {args.layers} layers of 61M weights": random_checkpoint(
                work / "random", args.layers, args.checkpoint
            ),
        }
        for what, programs in (("load", LOADS), ("convert", CONVERTS)):
            for name, source in models.items():
                print(f"{what} {name} ({sum(f.stat().st_size for f in source.iterdir()) / 1e6:.0f} MB)")
                measure(programs, source, work, args.runs)


if __name__ == "__main__":
    main()
