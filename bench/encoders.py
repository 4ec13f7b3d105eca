"""Every ggml encoder beside ggml's own (`libgguf`): error and processor time on a checkpoint's tensors, as a table.

python bench/encoders.py CHECKPOINT [--types Q4_K Q5_K] [--rows 128] [--threads]

Error is the square root of ours over ggml's, per tensor, the worst named; with importance it is weighted by it. Time is
nanoseconds of processor time per weight, all threads together, so a busy machine does not change its meaning.
`--threads` adds the wall time of one and of two threads.
"""

import argparse
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import libgguf
import numpy as np

from mlxq.checkpoint.source import open_checkpoint
from mlxq.formats import floats
from mlxq.formats.geometry import block_format
from mlxq.quantizers.ggml import ENCODABLE, quantize

TYPES = [name for name in ENCODABLE if block_format(name).block_size > 1]


def tensors(path: Path, rows: int) -> dict[str, np.ndarray]:
    """The first rows of every matrix that divides into super-blocks, float32."""
    with open_checkpoint(path) as checkpoint:
        matrices = [t for t in checkpoint.tensors.values() if len(t.shape) == 2 and t.shape[1] % 256 == 0]
        return {t.name: floats.to_float32(checkpoint.read(t.name, slice(0, rows)), t.dtype) for t in matrices}


def timed(run: Callable[[], np.ndarray]) -> tuple[np.ndarray, float]:
    began = time.process_time()
    result = run()
    return result, time.process_time() - began


def squared_error(w: np.ndarray, blocks: np.ndarray, ggml_id: int, importance: np.ndarray | None) -> float:
    error = np.asarray(libgguf.dequantize_rows(blocks, ggml_id)).reshape(w.shape).astype(np.float64) - w
    return float((error**2 * (1 if importance is None else importance)).sum())


def compare(name: str, matrices: dict[str, np.ndarray], weighted: bool) -> str:
    """One row of the table."""
    ggml_id = block_format(name).ggml_id
    ratios, seconds = {}, np.zeros(2)
    rng = np.random.default_rng(0)
    for tensor, w in matrices.items():
        importance = np.exp(rng.standard_normal(w.shape[1])).astype(np.float32) if weighted else None
        ours, a = timed(lambda w=w, i=importance: quantize(w, name, i))
        theirs, b = timed(lambda w=w, i=importance: libgguf.quantize_rows(w, ggml_id, i))
        seconds += a, b
        errors = [squared_error(w, blocks, ggml_id, importance) for blocks in (ours, theirs)]
        ratios[tensor] = (errors[0] / errors[1]) ** 0.5
    worst = max(ratios, key=ratios.get)
    ns = seconds * 1e9 / sum(w.size for w in matrices.values())
    mean = sum(ratios.values()) / len(ratios)
    kind = "importance" if weighted else "plain"
    return f"| {name} | {kind} | {ratios[worst]:.4f} | {mean:.4f} | {ns[0]:.1f} | {ns[1]:.1f} | {worst} |"


def wall(name: str, w: np.ndarray, n_threads: int) -> float:
    """Nanoseconds of wall time per weight, the least of three."""
    parts = np.array_split(w, 8)
    best = float("inf")
    with ThreadPoolExecutor(n_threads) as pool:
        for _ in range(3):
            began = time.perf_counter()
            list(pool.map(lambda part: quantize(part, name), parts))
            best = min(best, time.perf_counter() - began)
    return best * 1e9 / w.size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--types", nargs="+", default=TYPES, choices=TYPES)
    parser.add_argument("--rows", type=int, default=128, help="rows of each tensor")
    parser.add_argument("--threads", action="store_true", help="also the wall time of one and two threads")
    args = parser.parse_args()
    matrices = tensors(args.checkpoint, args.rows)
    print("| type | | worst RMSE / ggml's | mean | ns per weight | ggml's | worst tensor |")
    print("|---|---|---|---|---|---|---|")
    for name in args.types:
        for weighted in (False, True):
            print(compare(name, matrices, weighted), flush=True)
    if args.threads:
        w = np.random.default_rng(0).standard_normal((8192, 1024)).astype(np.float32)
        for name in args.types:
            print(f"{name}: {wall(name, w, 1):.1f} ns per weight of wall time, two threads {wall(name, w, 2):.1f}")


if __name__ == "__main__":
    main()
