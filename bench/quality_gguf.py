"""What each GGUF file type costs, written by mlxq and by llama.cpp's quantizer, as a Markdown table.

    python bench/quality_gguf.py CHECKPOINT [--types Q4_K_M ...]

Both files have the same tensor types and bytes. The figures are the proof's: mlxq runs the checkpoint, then the file.
"""

import argparse
import tempfile
from pathlib import Path

from gguf_files import ours, peer
from measure import run

from mlxq.checkpoint.source import open_checkpoint
from mlxq.evaluate.verify import VerificationResult, verify

TYPES = ["Q6_K", "Q5_K_M", "Q4_K_M", "Q4_K_S", "IQ4_XS", "Q3_K_M", "Q2_K"]


def proof(checkpoint: Path, result: Path) -> VerificationResult:
    with open_checkpoint(checkpoint) as source:
        return verify(source, result)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--types", nargs="+", default=TYPES)
    args = parser.parse_args()
    print("| file type | bits per weight | MB | KL, mlxq | KL, llama.cpp | top-1, mlxq | top-1, llama.cpp |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        original, a, b = (Path(scratch, f"{name}.gguf") for name in ("original", "ours", "peer"))
        run(ours(args.checkpoint, original, "BF16"))
        for file_type in args.types:
            run(ours(args.checkpoint, a, file_type))
            run(peer(original, b, file_type))
            found = [proof(args.checkpoint, path) for path in (a, b)]
            kl, top = [f"{v.kl:.4f} ± {v.kl_se:.4f}" for v in found], [f"{100 * v.agreement:.1f} %" for v in found]
            size = a.stat().st_size / 1e6
            cells = [f"`{file_type}`", f"{found[0].bpw:.2f}", f"{size:.0f}", *kl, *top]
            print(f"| {' | '.join(cells)} |", flush=True)
            b.unlink()


if __name__ == "__main__":
    main()
