"""Quantize a model from Python: plan first, then convert with typed progress events.

python examples/convert_with_progress.py SOURCE OUTPUT
"""

import sys

import mlxq


def show(event: mlxq.Progress) -> None:
    print(f"\r{event.stage}: {100 * event.done / max(event.total, 1):3.0f} %", end="", file=sys.stderr)


def main(source: str, output: str) -> None:
    plan = mlxq.convert(source, dry_run=True, recipe="mixed").plan
    print(f"{plan.n_weights / 1e6:.0f}M weights at {plan.bpw:.2f} bits: {plan.nbytes / 1e6:.0f} MB")
    try:
        result = mlxq.convert(source, output, recipe="mixed", progress=show)
    except mlxq.MlxqError as e:
        raise SystemExit(f"\n{e}") from e
    print(f"\n{result.path}: KL divergence {result.verification.kl:.4f} nats")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    main(sys.argv[1], sys.argv[2])
