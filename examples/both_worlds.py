"""One quantization for MLX and for llama.cpp: a directory and a GGUF file whose weights decode to the same numbers.

python examples/both_worlds.py SOURCE NAME
"""

import sys

import mlxq


def main(source: str, name: str) -> None:
    outputs = [f"{name}-mlx", f"{name}.gguf"]
    try:
        result = mlxq.convert(source, outputs, recipe="portable", modelfile=True)
        comparison = mlxq.compare(*outputs)
    except mlxq.MlxqError as e:
        raise SystemExit(f"{e}") from e
    print(f"{result.path} and {result.gguf}: KL divergence {result.verification.kl:.4f} nats from the source")
    print("the two are the same model" if comparison.passed else comparison.failure)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    main(sys.argv[1], sys.argv[2])
