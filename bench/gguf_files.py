"""Quantize a checkpoint to GGUF against llama.cpp's quantizer, and import a GGUF file.

    python bench/gguf_files.py CHECKPOINT [--types Q4_K_M Q8_0] [--gguf FILE] [--runs 3]

llama.cpp's quantizer (`cyllama`, two threads) reads a BF16 GGUF file of the checkpoint, mlxq reads the checkpoint.
Both write every tensor in the same type. Bars: Q4_K_M in at most 1.0 x the peer's wall time; for every tensor an RMSE
of at most 1.00 x the peer's; files of one size. FILE is imported into an MLX directory; bar: 3 s.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import gguf
import numpy as np
from measure import compare, median, run, spread

THREADS = 2


def ours(source: Path, out: Path, file_type: str) -> list[str]:
    how = "method='rtn', verify=False, overwrite=True"
    code = f"import sys, mlxq; mlxq.convert(sys.argv[1], sys.argv[2], type=sys.argv[3], {how})"
    return [sys.executable, "-c", code, str(source), str(out), file_type]


def peer(source: Path, out: Path, file_type: str) -> list[str]:
    code = (
        "import sys; from cyllama.llama.llama_cpp import LlamaModelQuantizeParams, model_quantize; "
        "p = LlamaModelQuantizeParams(); p.ftype, p.nthread = int(sys.argv[3]), int(sys.argv[4]); "
        "model_quantize(sys.argv[1], sys.argv[2], p)"
    )
    number = gguf.LlamaFileType[f"MOSTLY_{file_type}"].value
    return [sys.executable, "-c", code, str(source), str(out), str(number), str(THREADS)]


def import_gguf(source: Path, out: Path) -> list[str]:
    code = "import sys, mlxq; mlxq.convert(sys.argv[1], sys.argv[2], verify=False, overwrite=True)"
    return [sys.executable, "-c", code, str(source), str(out)]


def tensors(path: Path) -> dict[str, gguf.ReaderTensor]:
    return {t.name: t for t in gguf.GGUFReader(path).tensors}


def squared_error(tensor: gguf.ReaderTensor, w: np.ndarray) -> float:
    difference = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(w.shape) - w
    return float(np.vdot(difference, difference))


def quality(original: Path, a: Path, b: Path) -> None:
    """RMSE of every quantized tensor of `a` over that of `b`, both against `original`."""
    exact, ours, peers = tensors(original), tensors(a), tensors(b)
    ratios, totals = {}, [0.0, 0.0]
    for name, tensor in peers.items():
        if tensor.tensor_type != ours[name].tensor_type:
            print(f"  {name}: {ours[name].tensor_type.name}, the peer's is {tensor.tensor_type.name}")
        w = gguf.quants.dequantize(exact[name].data, exact[name].tensor_type)
        errors = squared_error(ours[name], w), squared_error(tensor, w)
        totals = [t + e for t, e in zip(totals, errors, strict=True)]
        if errors[1]:
            ratios[name] = (errors[0] / errors[1]) ** 0.5
    worst = max(ratios, key=lambda n: ratios[n])
    middle = median(list(ratios.values()))
    print(f"  RMSE over the peer's: {middle:.4f} in the middle, {ratios[worst]:.4f} at most ({worst})")
    print(f"  of all weights together: {(totals[0] / totals[1]) ** 0.5:.4f}")
    sizes = a.stat().st_size, b.stat().st_size
    data = [sum(t.n_bytes for t in part.values()) for part in (ours, peers)]
    print(f"  bytes: {sizes[0]:,} and {sizes[1]:,}; of the tensors alone {data[0]:,} and {data[1]:,}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--types", nargs="+", default=["Q4_K_M"])
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        original = Path(scratch, "original.gguf")
        run(ours(args.checkpoint, original, "BF16"))
        for file_type in args.types:
            a, b = Path(scratch, "ours.gguf"), Path(scratch, "peer.gguf")
            times = compare(
                {
                    "mlxq": lambda a=a, t=file_type: ours(args.checkpoint, a, t),
                    "llama.cpp": lambda b=b, t=file_type: peer(original, b, t),
                },
                args.runs,
            )
            print(file_type)
            for name, runs in times.items():
                peak = median([r.peak_mb for r in runs])
                print(f"  {name:<10} {spread([r.seconds for r in runs])} s, peak {peak:.0f} MB")
            ratio = median([r.seconds for r in times["mlxq"]]) / median([r.seconds for r in times["llama.cpp"]])
            print(f"  wall time over the peer's: {ratio:.2f}")
            quality(original, a, b)
        if args.gguf:
            done = [run(import_gguf(args.gguf, Path(scratch, "mlx"))) for _ in range(args.runs)]
            peak = median([r.peak_mb for r in done])
            print(f"import of {args.gguf.name}: {spread([r.seconds for r in done])} s, peak {peak:.0f} MB")


if __name__ == "__main__":
    main()
