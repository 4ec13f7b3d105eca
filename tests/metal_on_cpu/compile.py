"""Metal text to a shared library: preprocess, translate, lint, compile as C++ for OpenCL, cache by content.

C++ for OpenCL is the mode of clang whose address spaces mean what Metal's mean, and on a CPU all of them are plain
memory, so that one compilation both checks the text and gives code that the sanitizers can instrument.
"""

from __future__ import annotations

import json
import platform
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from metal_on_cpu import toolchain
from metal_on_cpu.counting import instrument
from metal_on_cpu.lint import Fault, lint
from metal_on_cpu.tokens import MslError
from metal_on_cpu.translate import translate
from metal_on_cpu.widths import access_widths

_LANGUAGE = [
    *("-x", "clcpp", "-cl-std=clc++2021", "-cl-no-stdinc", "-fdeclspec", "-nostdinc"),
    *("-D__METAL__", "-D__METAL_VERSION__=320", "-cl-single-precision-constant"),
    *("-Xclang", "-ffloat16-excess-precision=none"),  # half rounds after each operation
    *("-Xclang", "-cl-ext=+all"),  # x86 has all extensions on, aarch64 none
    *("-Wno-unknown-attributes", "-Wno-unused-value", "-Werror=return-type"),
    *("-Werror=uninitialized", "-Werror=sometimes-uninitialized"),
]
_TARGET = ["-mf16c", "-mfma", "-mavx2"] if platform.machine() == "x86_64" else []
# The optimization level comes first: after -fno-slp-vectorize it would turn that on again, and the thread sanitizer
# passes over accesses of more than 16 bytes.
_CODE = ["-fPIC", "-g1", "-fno-vectorize", "-fno-slp-vectorize", "-fno-strict-aliasing"]
_ACCESSES = [
    *("-fsanitize=thread", "-mllvm", "-tsan-instrument-func-entry-exit=0"),
    *("-mllvm", "-tsan-instrument-read-before-write=1", "-mllvm", "-tsan-distinguish-volatile=0"),
]
_UNDEFINED = [
    "-fsanitize=alignment,shift,bounds,integer-divide-by-zero,float-cast-overflow,local-bounds",
    "-ftrivial-auto-var-init=pattern",
]
#: What each mode instruments. The branches of `check` keep the compiler from merging loads: bytes and instructions are
#: counted in `count`, findings are sought in `check`.
MODES: dict[str, list[str]] = {"fast": [], "count": _ACCESSES, "check": [*_ACCESSES, *_UNDEFINED]}
_PRELUDE = '#include <metal_stdlib>\n#include "mlx/backend/metal/kernels/utils.h"\n'


@dataclass(frozen=True)
class Build:
    """How to compile: the mode (see `MODES`), optimization, contraction of a*b+c, and how `simd_sum` adds lanes.

    The lint is of mode `check` only. `dry` stops where code would be made.
    """

    mode: str = "check"
    opt: str = "-O2"
    contract: str = "off"
    simd_order: int = 0
    lint: bool = True
    dry: bool = False
    function_constants: tuple[tuple[int, int], ...] = ()
    extra: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode {self.mode!r}: the modes are {', '.join(MODES)}")


def compile_kernel(text: str, entry: str, build: Build, user_files: tuple[str, ...]) -> Path:
    """The shared library of a kernel, with its table of instruction counts beside it (`.json`, mode `count`).

    Args:
        text: Metal text as mlx would hand it to Apple's compiler, less mlx's own prelude.
        entry: the C++ function `__msl_entry` that calls the kernel with a launch's buffers.
        build: how to compile.
        user_files: names in `#line` directives whose text is linted.

    Raises:
        MslError: the text does not compile, or the lint rejects it; the message gives file and line.
    """
    key = "\0".join([text, entry, repr(build), repr(user_files), toolchain.identity()])
    folder = toolchain.cached(key, ".kernel", lambda out: _make(out, text, entry, build, user_files))
    return folder / "kernel.so"


def _make(out: Path, text: str, entry: str, build: Build, user_files: tuple[str, ...]) -> None:
    out.mkdir()
    language = [*_LANGUAGE, *_TARGET, f"-DMSL_SIMD_ORDER={build.simd_order}"]
    language.append(f"-DMSL_COUNT={build.mode == 'count':d}")
    flags = [build.opt, *_CODE, f"-ffp-contract={build.contract}", *MODES[build.mode], *build.extra]
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(1) as pool:
        before, after = _preprocessed(Path(scratch), text, language, user_files[0])
        code, constants = translate(after, before)
        values = dict(build.function_constants)
        defines = "".join(f"#define MSL_FC_{n} {int(values.get(n, 0))}\n" for n in constants)
        source = Path(scratch) / "kernel.cl"
        source.write_text(defines + code + entry)
        command = [toolchain.CLANG, *language, *flags, *_included(before, [*language, *flags])]
        if build.dry:
            _check(source, command, user_files if build.lint else ())
            return
        linted = pool.submit(_lint, source, command, user_files) if build.lint and build.mode == "check" else None
        try:
            _object(source, command, out, build.mode == "count")
        finally:
            faults = linted.result() if linted else []
        _raise(faults)
        toolchain.run([toolchain.CLANG, "-shared", "-o", out / "kernel.so", source.with_suffix(".o"), "-lm"])


def _check(source: Path, command: list[str | Path], user_files: tuple[str, ...]) -> None:
    """Compile without code, and lint what the compiler read, in one run of it: diagnostics and tree come apart."""
    if not user_files:
        toolchain.run([*command, "-fsyntax-only", source])
        return
    _raise(lint(toolchain.run(_dump(source, command)), lambda name: name in user_files))


def _raise(faults: list[Fault]) -> None:
    if faults:
        raise MslError("\n".join(f"{file}:{line}: error: {message}" for file, line, message in faults))


def _preprocessed(scratch: Path, text: str, language: list[str], first_file: str) -> tuple[str, str]:
    """The preprocessed prelude, the same for all kernels, and the kernel's own text after it."""
    metal = scratch / "kernel.metal"
    metal.write_text(_PRELUDE + text + "\n")
    folders = [x for folder in (*toolchain.shim(), toolchain.MLX_INCLUDE) for x in ("-isystem", str(folder))]
    # The file's name alone is in the result, not where it lies.
    whole = toolchain.run([toolchain.CLANG, *language, *folders, "-E", metal.name], scratch)
    start = whole.index(f'# 1 "{first_file}"')
    return whole[:start], whole[start:]


def _included(prelude: str, flags: list[str]) -> list[str | Path]:
    """Options that include the prelude, compiled before: most of the time that a small kernel would take."""
    key = "\0".join([prelude, *flags, str(toolchain.CACHE), toolchain.identity()])
    source = toolchain.cached(key, ".prelude.cl", lambda out: out.write_text(translate(prelude)[0]) and None)
    make = [toolchain.CLANG, *flags, "-Xclang", "-emit-pch", "-c", source, "-o"]
    made = toolchain.cached(key, ".prelude.pch", lambda out: toolchain.run([*make, out]) and None)
    return ["-Xclang", "-fno-validate-pch", "-include-pch", made]


def _object(source: Path, command: list[str | Path], out: Path, count: bool) -> None:
    made = source.with_suffix(".o")
    if not count:
        toolchain.run([*command, "-c", source, "-o", made])
        return
    ir, plain = source.with_suffix(".ll"), source.with_suffix(".plain.ll")
    emit = ["-S", "-emit-llvm", source, "-o"]
    toolchain.run([*command, *emit, ir])
    toolchain.run([*command, "-Xclang", "-disable-llvm-passes", *emit, plain])
    code, blocks = instrument(ir.read_text(), access_widths(plain.read_text()))
    ir.write_text(code)
    (out / "blocks.json").write_text(json.dumps(blocks))
    assemble = ["-Wno-override-module", "-fPIC", "-O1", *_TARGET, "-Xclang", "-disable-llvm-passes"]
    toolchain.run([toolchain.CLANG, *assemble, "-c", ir, "-o", made])


def _lint(source: Path, command: list[str | Path], user_files: tuple[str, ...]) -> list[Fault]:
    done = subprocess.run([str(c) for c in _dump(source, command)], capture_output=True, text=True, check=False)
    # Where the text does not compile, the compiler says why.
    return lint(done.stdout, lambda name: name in user_files) if done.returncode == 0 else []


def _dump(source: Path, command: list[str | Path]) -> list[str | Path]:
    return [*command, "-fsyntax-only", "-Xclang", "-ast-dump", "-fno-color-diagnostics", source]
