"""What calibration is worth: KL divergence from the float model at equal bits per weight, as a Markdown table.

    python bench/quality_calibrated.py CHECKPOINT TEXT [--budgets 4.5 5 ...] [--scratch DIR]

Calibrated on the first 300 kB of TEXT (64 sequences of 512 tokens), measured on its last 12 x 512 tokens, second half
of each sequence. The yardstick is mlx-lm's default, 4 bits in groups of 64 by rounding to nearest. All results are
directories that stock mlx-lm loads. Each conversion is a process of its own; its time and peak memory are shown.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from measure import Run, run

import mlxq

_CALIBRATED = 300_000


def cases(budgets: list[float]) -> list[tuple[str, list[str]]]:
    """Names and options of `mlxq convert`."""
    uniform = [
        (
            "`--method search`, 4 bits, groups of 64",
            ["--bits", "4", "--tensor-type", "embed=4:64", "--method", "search"],
        ),
        ("`--method gptq`, 4 bits, groups of 64", ["--bits", "4", "--tensor-type", "embed=4:64", "--method", "gptq"]),
    ]
    return uniform + [(f"`--target-bpw {b:g}`", ["--target-bpw", f"{b:g}"]) for b in budgets]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--budgets", type=float, nargs="*", default=[6.0, 5.0, 4.5, 4.0, 3.5, 2.5])
    parser.add_argument("--scratch", type=Path, help="keep measured costs and results here")
    args = parser.parse_args()
    print("| result | bpw | KL, nats per token | beside mlx-lm's default | top-1 changed | perplexity | s | peak MB |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        scratch = args.scratch or Path(temporary)
        scratch.mkdir(parents=True, exist_ok=True)
        calib = scratch / "calibration.txt"
        calib.write_bytes(args.text.read_bytes()[:_CALIBRATED])
        peer = scratch / "peer"
        if not peer.exists():
            source = ["--hf-path", str(args.checkpoint), "--mlx-path", str(peer), "-q"]
            took = run([sys.executable, "-m", "mlx_lm", "convert", *source])
        else:
            took = Run(float("nan"), float("nan"))
        yardstick = show("mlx-lm's default", peer, args, took, None)
        for name, options in cases(args.budgets):
            out = scratch / "ours"
            common = ["--calib", str(calib), "--calib-sequences", "64", "--no-verify", "--overwrite", "-o", str(out)]
            costs = ["--costs", str(scratch / "costs.npz")] if "--target-bpw" in options else []
            mlxq_command = [str(Path(sys.executable).with_name("mlxq")), "convert", str(args.checkpoint)]
            took = run([*mlxq_command, *common, *options, *costs])
            show(name, out, args, took, yardstick)


def show(name: str, result: Path, args: argparse.Namespace, took: Run, yardstick: float | None) -> float:
    """Print a row; its KL."""
    q = mlxq.evaluate_model(result, reference=args.checkpoint, text=args.text, sequences=12, length=512, from_end=True)
    kl = q.kl_mean.value
    ratio = "" if yardstick is None else f"{kl / yardstick:.3f}"
    print(
        f"| {name} | {q.bpw:.2f} | {kl:.4f} ± {q.kl_mean.se:.4f} | {ratio} | "
        f"{100 * (1 - q.agreement.value):.1f} % | {q.perplexity.value:.2f} | {took.seconds:.0f} | {took.peak_mb:.0f} |",
        flush=True,
    )
    return kl


if __name__ == "__main__":
    main()
