"""What `mlxq bench --kernels` measured on this machine, stored, and what it says: is our affine kernel faster here?

One small JSON file in the user's cache directory, or in the one that `MLXQ_CACHE_DIR` names:

    {"format": 1, "measured": {CHIP: {MLX_VERSION: {KERNELS: {PRODUCT: {ROWS: {"metal": s, "mlx": s}}}}}}}

CHIP is what mlx calls the GPU's architecture, KERNELS a digest of our kernels' text, PRODUCT says format, dtype and
shape, ROWS are those of x, and s are seconds. Another chip, mlx or kernel has measurements of its own, or none, and
mlx's kernels are used.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Mapping
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from mlxq.errors import OutputError
from mlxq.ops.arrays import import_mlx
from mlxq.types import FLOAT_BYTES

ENVIRONMENT_VARIABLE = "MLXQ_CACHE_DIR"
#: Our kernel is taken if its time is at most this part of mlx's: medians of one machine differ by some percent.
MARGIN = 0.97

#: Seconds that no product takes.
_LONGEST = 1e6
_FORMAT = 1
_FILE = "kernels.json"

#: Seconds of a product by back end, for each number of rows of x.
Times = Mapping[int, Mapping[str, float]]


class Product(NamedTuple):
    """A product `x @ w_hat.T` with affine weights `[N, K]`, of which a stack has `experts`; 0 is no stack.

    `dtype` is that of x, scales and biases.
    """

    bits: int
    group_size: int
    dtype: str
    N: int
    K: int
    experts: int = 0

    def __str__(self) -> str:
        stack = f"{self.experts}x" if self.experts else ""
        return f"affine_{self.dtype}_gs_{self.group_size}_b_{self.bits}_{stack}{self.N}x{self.K}"


def cache_directory() -> Path:
    """Where mlxq keeps what it can find out again; it need not exist."""
    if named := os.environ.get(ENVIRONMENT_VARIABLE):
        return Path(named).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "mlxq"
    # The XDG specification has a relative path ignored.
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(xdg) if os.path.isabs(xdg) else Path.home() / ".cache") / "mlxq"


def path() -> Path:
    """The file of measurements."""
    return cache_directory() / _FILE


@lru_cache(maxsize=4096)
def is_faster(product: Product, rows: int) -> bool:
    """Whether our Metal kernel was measured to be faster than mlx's: at the measured numbers of rows on both sides.

    More rows than any measured count as the most that were; fewer than any are not known, and so not faster.
    """
    faster = _verdicts().get(str(product), {})
    below = max((r for r in faster if r <= rows), default=None)
    if below is None:
        return False
    return faster[below] and faster[min((r for r in faster if r >= rows), default=below)]


def ever_faster(product: Product) -> bool:
    """Whether our kernel is faster for any number of rows of x, and any dtype."""
    every = (product._replace(dtype=dtype) for dtype in FLOAT_BYTES)
    return any(any(_verdicts().get(str(p), {}).values()) for p in every)


def store(measured: Mapping[Product, Times]) -> Path:
    """Add measurements of this machine to the file, in the place of older ones of the same products; returns its path.

    Raises:
        OutputError: the file cannot be written.
    """
    chip, version, kernels = _here()
    content = _read()
    products = content.setdefault(chip, {}).setdefault(version, {}).setdefault(kernels, {})
    for product, times in measured.items():
        products[str(product)] = {str(rows): dict(seconds) for rows, seconds in sorted(times.items())}
    _write(path(), {"format": _FORMAT, "measured": content})
    forget()
    return path()


def forget() -> None:
    """Read the file again when it is asked for next."""
    is_faster.cache_clear()
    _verdicts.cache_clear()


@cache
def _verdicts() -> dict[str, dict[int, bool]]:
    """For each product that was measured on this machine, and each number of rows: is ours faster?"""
    if not path().is_file():
        return {}
    chip, version, kernels = _here()
    return {
        product: {int(rows): seconds["metal"] <= MARGIN * seconds["mlx"] for rows, seconds in times.items()}
        for product, times in _read().get(chip, {}).get(version, {}).get(kernels, {}).items()
    }


def _here() -> tuple[str, str, str]:
    """Chip, mlx's version, and a digest of the text of our affine kernels."""
    from mlxq.ops.metal_source import header, metal_directory

    mx = import_mlx()
    names = sorted(p.stem for p in metal_directory().glob("affine*.h"))
    digest = hashlib.sha256(header(*names).encode()).hexdigest()
    return chip(), mx.__version__, digest[:16]


def chip() -> str:
    """What mlx calls the architecture of its default device, such as `applegpu_g16s`."""
    return str(import_mlx().device_info().get("architecture") or "unknown")


def _read() -> dict[str, Any]:
    """What is stored under `measured`; nothing, and a warning, where the file is not what it should be."""
    try:
        content = json.loads(path().read_text())
        _check(content)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, RecursionError) as error:
        warnings.warn(
            f"{path()}: not read, so mlx's kernels are used: {_one_line(error)}; `mlxq bench --kernels` makes it anew",
            stacklevel=2,
        )
        return {}
    return content["measured"]


def _check(content: Any) -> None:
    """Raises ValueError for anything that `store` does not write."""
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"format {_FORMAT} expected, got {found!r}")
    level = [content.get("measured")]
    for what in ("chips", "versions of mlx", "kernels", "products", "rows", "back ends"):
        if not all(isinstance(part, dict) for part in level):
            raise ValueError(f"an object of {what} expected")
        if what == "back ends":
            break
        if what == "rows" and not all(rows.isdecimal() and len(rows) < 10 for part in level for rows in part):
            raise ValueError("a number of rows expected")
        level = [value for part in level for value in part.values()]
    for times in level:
        for name in ("metal", "mlx"):
            seconds = times.get(name)
            if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds < _LONGEST:
                raise ValueError(f"seconds of {name} expected, got {seconds!r}")


def _one_line(error: Exception) -> str:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(reason.split())[:200]


def _write(target: Path, content: dict[str, Any]) -> None:
    """Whole or not at all: a temporary sibling takes the file's place."""
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=target.parent, prefix=f".{target.name}.", delete=False) as file:
            temporary = Path(file.name)
            json.dump(content, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except OSError as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink()
        raise OutputError(
            f"{target}: cannot be written: {_one_line(error)}; {ENVIRONMENT_VARIABLE} may name another directory"
        ) from error
