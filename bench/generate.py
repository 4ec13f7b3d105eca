"""Prompt processing and decoding on the CPU, against `mlx_lm` on the same 4-bit directory. Nothing is preloaded.

    python bench/generate.py CHECKPOINT [--runs 5] [--peer-prompt 64]

mlx-lm needs minutes for 512 prompt tokens on this kind of machine, so its rate is taken on a shorter prompt. Its work
for a token grows with the tokens before it, so a short prompt flatters it. Each run is a process of its own, in turn.
Bars: prompt processing at least 10 x the peer's tokens/s, decoding at least 1.0 x.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from measure import median, spread

import mlxq

OURS = """
import json, sys, mlxq
path, n_prompt, n_tokens = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
with mlxq.load(path) as model:
    text = " the" * 2 * n_prompt
    ids = model.encode(text, chat_template=False)[:n_prompt]
    prompt = model.tokenizer.decode(ids)
    r = model.generate(prompt, chat_template=False, max_tokens=n_tokens, stop_tokens=())
assert r.prompt_tokens == n_prompt and r.generation_tokens == n_tokens, r
print(json.dumps([r.prompt_tokens_per_second, r.generation_tokens_per_second]))
"""
PEER = """
import json, sys
from mlx_lm import load, stream_generate
path, n_prompt, n_tokens = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
model, tokenizer = load(path)
tokenizer.eos_token_ids = set()
ids = tokenizer.encode(" the" * 2 * n_prompt)[:n_prompt]
for r in stream_generate(model, tokenizer, ids, max_tokens=n_tokens):
    pass
assert r.prompt_tokens == n_prompt and r.generation_tokens == n_tokens, r
print(json.dumps([r.prompt_tps, r.generation_tps]))
"""


def rates(code: str, path: Path, n_prompt: int, n_tokens: int) -> list[float]:
    """Tokens per second of prompt and generation, in a fresh process."""
    command = [sys.executable, "-c", code, str(path), str(n_prompt), str(n_tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--peer-prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=16)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as tmp:
        path = Path(tmp) / "4bit"
        how = {"tensor_types": ["embed_tokens=4"], "method": "rtn", "verify": False}
        mlxq.convert(args.checkpoint, path, bits=4, group_size=64, **how)
        ours, peer = [], []
        for _ in range(args.runs):
            ours.append(rates(OURS, path, 512, args.tokens))
            peer.append(rates(PEER, path, args.peer_prompt, args.tokens))
    for name, results in (("mlxq", ours), ("mlx_lm", peer)):
        print(f"{name:<8} prompt {spread([r[0] for r in results])} tokens/s", end="   ")
        print(f"decoding {spread([r[1] for r in results])} tokens/s")
    for i, (what, bar) in enumerate((("prompt", 10), ("decoding", 1.0))):
        ratio = median([r[i] for r in ours]) / median([r[i] for r in peer])
        print(f"{what}: {ratio:.1f} x the peer (bar {bar})")


if __name__ == "__main__":
    main()
