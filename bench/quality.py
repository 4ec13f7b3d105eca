"""What rounding to nearest costs: the proof's figures at each number of bits, group 64, as a Markdown table.

python bench/quality.py CHECKPOINT
"""

import argparse
import tempfile
from pathlib import Path

import mlxq

CASES = [
    ("`--bits 8`", {"bits": 8}),
    ("`--bits 6`", {"bits": 6}),
    ("`--bits 5`", {"bits": 5}),
    ("`--bits 4 --recipe mixed`", {"bits": 4, "recipe": "mixed"}),
    ("`--bits 4 --group-size 32`", {"bits": 4, "group_size": 32}),
    ("`--bits 4`", {"bits": 4}),
    ("`--bits 3`", {"bits": 3}),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    args = parser.parse_args()
    print("| options | bits per weight | MB | KL, nats per token | top-1 agreement | perplexity |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as tmp:
        for name, options in CASES:
            r = mlxq.convert(args.checkpoint, Path(tmp) / "out", method="rtn", overwrite=True, **options)
            v = r.verification
            print(
                f"| {name} | {r.plan.bpw:.2f} | {r.plan.nbytes / 1e6:.0f} | {v.kl:.4f} ± {v.kl_se:.4f} | "
                f"{100 * v.agreement:.1f} % | {v.perplexity_source:.2f} → {v.perplexity_result:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
