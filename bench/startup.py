"""Start-up: `import mlxq` (bar 0.3 s) and `mlxq --help` (bar 0.5 s), medians of 7 processes."""

import sys
from pathlib import Path

from measure import compare, spread

RUNS = 7


def main() -> None:
    script = str(Path(sys.executable).parent / "mlxq")
    results = compare(
        {
            "python -c pass": lambda: [sys.executable, "-c", "pass"],
            "import mlxq": lambda: [sys.executable, "-c", "import mlxq"],
            "mlxq --help": lambda: [script, "--help"],
        },
        RUNS,
    )
    for name, runs in results.items():
        print(f"{name:<16} {spread([r.seconds for r in runs])} s")


if __name__ == "__main__":
    main()
