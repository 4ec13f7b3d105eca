"""The compiler, the cache of what it made, and the two things that every kernel shares: the shim and the runtime."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx

from metal_on_cpu.tokens import MslError

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CACHE = Path(os.environ.get("MLXQ_TEST_CACHE", ROOT / ".cache")) / "metal_on_cpu"
MLX_INCLUDE = Path(mx.__file__).parent / "include"
_KEPT = 7 * 24 * 3600  # seconds
CLANG = "clang++-19"
SYMBOLIZER = "llvm-symbolizer-19"

_COMPILING = ("compile", "counting", "lint", "tokens", "toolchain", "translate", "widths")
#: The names under which Metal's standard library can be included: all are the shim.
_STANDARD_HEADERS = (
    *("array", "atomic", "common", "compute", "config", "geometric", "integer", "limits", "logging", "math", "matrix"),
    *("numeric", "pack", "quadgroup", "relational", "simdgroup", "simdgroup_matrix", "stdlib", "type_traits", "types"),
)


def unavailable() -> str | None:
    """Why the checker cannot run here, or None."""
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "aarch64"):
        return f"the checker of Metal kernels runs on Linux (x86-64, aarch64), not on {platform.platform()}"
    missing = [tool for tool in (CLANG, SYMBOLIZER) if not shutil.which(tool)]
    if missing:
        return f"{' and '.join(missing)} not found: install clang-19 and llvm-19"
    return None


def run(command: list[str | Path], folder: Path | None = None) -> str:
    """Runs a tool, in a folder, and returns what it printed.

    Raises:
        MslError: it failed; the message is what it said.
    """
    done = subprocess.run([str(c) for c in command], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise MslError(f"{command[0]} failed:\n{done.stderr}")
    return done.stdout


def cached(key: str, suffix: str, make: Callable[[Path], None]) -> Path:
    """The cached file or folder for a key; `make` writes it under a temporary name, and a rename publishes it.

    Processes that make the same at once each write their own; the first or the last stays, and they are equal.
    """
    path = CACHE / (hashlib.sha256(key.encode()).hexdigest()[:24] + suffix)
    if path.exists():
        os.utime(path)
        return path
    CACHE.mkdir(parents=True, exist_ok=True)
    _prune()
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="tmp-") as folder:
        made = Path(folder) / path.name
        make(made)
        try:
            os.replace(made, path)
        except OSError:  # a folder that another process published first
            if not path.exists():
                raise
    return path


@cache
def _prune() -> None:
    """Removes, once in a process, what nobody used for a while."""
    for path in CACHE.iterdir():
        with contextlib.suppress(OSError):  # another process may remove it too
            if time.time() - path.stat().st_mtime > _KEPT:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


@cache
def identity() -> str:
    """What a compiled kernel depends on beside its text: the compiler, mlx's headers, the shim, and the steps here."""
    own = [*sorted((HERE / "shim").iterdir()), *(HERE / f"{name}.py" for name in _COMPILING)]
    texts = [run([CLANG, "--version"]), version("mlx"), str(MLX_INCLUDE), *(p.read_text() for p in own)]
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


@cache
def shim() -> tuple[Path, Path]:
    """Folders of system headers: the shim's own, and the generated ones (standard names, swizzles of vectors)."""

    def make(folder: Path) -> None:
        folder.mkdir()
        for name in _STANDARD_HEADERS:
            (folder / f"metal_{name}").write_text('#include "msl_shim.h"\n')
        for n in (2, 3, 4):
            (folder / f"msl_swizzle{n}.inc").write_text(_swizzles(n))

    return HERE / "shim", cached("shim " + Path(__file__).read_text(), ".shim", make)


@cache
def runtime() -> Path:
    """The shared library that runs kernels, compiled once."""
    folder = HERE / "runtime"
    key = "\0".join(p.read_text() for p in sorted(folder.iterdir())) + run([CLANG, "--version"])
    flags = ["-std=c++17", "-O2", "-g1", "-fPIC", "-shared"]
    return cached(key, ".runtime.so", lambda out: run([CLANG, *flags, folder / "runtime.cpp", "-o", out]) and None)


def _swizzles(n: int) -> str:
    """Properties `v.xy`, `v.wzyx = ...`, `v.rgb` of a vector of n components."""
    out = []
    for length in (2, 3, 4):
        for index in itertools.product(range(n), repeat=length):
            name = "".join("xyzw"[i] for i in index)
            values = ", ".join(f"v[{i}]" for i in index)
            out.append(f"vec<T, {length}> _g{name}() const {{ return vec<T, {length}>({values}); }}")
            accessors = f"get=_g{name}"
            if len(set(index)) == length:
                stores = " ".join(f"v[{i}] = a.v[{k}];" for k, i in enumerate(index))
                out.append(f"void _p{name}(vec<T, {length}> a) {{ {stores} }}")
                accessors += f", put=_p{name}"
            names = [name, "rgba"[:length]] if list(index) == list(range(length)) else [name]
            out += [f"__declspec(property({accessors})) vec<T, {length}> {x};" for x in names]
    return "\n".join(out) + "\n"
