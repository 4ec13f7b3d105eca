"""The `mlxq` command run as a process, for tests of what a person meets."""

from __future__ import annotations

import os
import subprocess
import sys

CODE = "import sys; from mlxq.cli import main; sys.argv[0] = 'mlxq'; main()"


def mlxq(*arguments, stdin="", **env):
    """Run `mlxq arguments`, offline. Its streams are text, or bytes when `stdin` is bytes."""
    return subprocess.run(
        [sys.executable, "-c", CODE, *(a if isinstance(a, bytes) else str(a) for a in arguments)],
        input=stdin,
        capture_output=True,
        text=isinstance(stdin, str),
        check=False,
        timeout=120,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "200", "NO_COLOR": "1"} | env,
    )
