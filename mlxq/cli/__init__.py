"""The command line: a thin shell over the Python API. Errors of a person or a file are one line and exit status 1."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from types import FrameType

#: The signals that asked the process to end: an exception of its own would not come through typer.
_received: list[int] = []


def _terminate(number: int, _: FrameType | None) -> None:
    """Work is undone as for Ctrl-C."""
    _received.append(number)
    raise KeyboardInterrupt


def _warn(message: Warning | str, *_: object, **__: object) -> None:
    if sys.stderr:
        print(f"mlxq: warning: {message}", file=sys.stderr)


def main() -> None:
    """Entry point of the `mlxq` command."""
    from mlxq.errors import MlxqError

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, _terminate)
    warnings.showwarning = _warn
    try:
        from mlxq.cli.app import run

        status = run()
        if sys.stdout:
            sys.stdout.flush()
    except MlxqError as e:
        status = _fail(" ".join(str(e).split()))
    except KeyboardInterrupt:
        status = _fail("terminated", 128 + _received[0]) if _received else _fail("interrupted", 130)
    except BrokenPipeError:
        # The reader of our output went away: silence Python's own message at exit, then end quietly.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        status = 141
    except MemoryError:
        status = _fail("out of memory")
    except OSError as e:
        where = f"{e.filename}: " if e.filename else ""
        status = _fail(f"{where}{e.strerror or e}")
    sys.exit(status)


def _fail(message: str, status: int = 1) -> int:
    print(f"mlxq: {message}", file=sys.stderr)
    return status
