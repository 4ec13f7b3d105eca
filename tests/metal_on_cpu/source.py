"""The text that mlx hands to Apple's compiler for a kernel, its parameters, and a C++ function that calls it."""

from __future__ import annotations

import os
import re
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from metal_on_cpu.tokens import MslError

#: The real function: tests put the checker's in its place.
MX_METAL_KERNEL = mx.fast.metal_kernel

#: The process has one standard output: one thread at a time may borrow it.
_PRINTING = threading.Lock()
_TYPE_NAMES = {
    **{
        "float32": "float",
        "float16": "float16_t",
        "bfloat16": "bfloat16_t",
        "bool": "bool",
        "complex64": "complex64_t",
    },
    **{f"{u}int{b}": f"{u}int{b}_t" for u in ("", "u") for b in (8, 16, 32, 64)},
}
_PARAMETER = re.compile(r"^\s*(?:(const)\s+)?(device|constant)\s+([\w<>]+)\s*([*&])\s*(\w+)\s*\[\[buffer\((\d+)\)\]\]$")
_ATTRIBUTE = re.compile(r"^\s*uint3? (\w+) \[\[(\w+)\]\]$")
_THREE = (
    *("thread_position_in_grid", "thread_position_in_threadgroup", "threadgroup_position_in_grid"),
    *("threads_per_threadgroup", "threadgroups_per_grid", "threads_per_grid", "dispatch_threads_per_threadgroup"),
)
#: Values of a kernel's attributes, from the `__msl_tid` of a thread.
_ATTRIBUTES = {
    **{name: f"uint3(t->{name}.x, t->{name}.y, t->{name}.z)" for name in _THREE},
    "grid_size": "uint3(t->threads_per_grid.x, t->threads_per_grid.y, t->threads_per_grid.z)",
    "grid_origin": "uint3(0u)",
    "threads_per_simdgroup": "32u",
    "thread_execution_width": "32u",
    "thread_index_in_simdgroup": "t->thread_index_in_simdgroup",
    "thread_index_in_threadgroup": "t->thread_index_in_threadgroup",
    "simdgroup_index_in_threadgroup": "t->simdgroup_index_in_threadgroup",
    "simdgroups_per_threadgroup": "t->simdgroups_per_threadgroup",
    "dispatch_simdgroups_per_threadgroup": "t->simdgroups_per_threadgroup",
    "thread_index_in_quadgroup": "(t->thread_index_in_threadgroup & 3u)",
    "quadgroup_index_in_threadgroup": "(t->thread_index_in_threadgroup >> 2)",
    "quadgroups_per_threadgroup": "(t->simdgroups_per_threadgroup * 8u)",
    "dispatch_quadgroups_per_threadgroup": "(t->simdgroups_per_threadgroup * 8u)",
}


@dataclass(frozen=True)
class Kernel:
    """The arguments of `mx.fast.metal_kernel`."""

    name: str
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    source: str
    header: str = ""
    ensure_row_contiguous: bool = True
    atomic_outputs: bool = False


@dataclass(frozen=True)
class Parameter:
    """A buffer of the kernel (`space` device or constant), or an attribute (`space` empty, `name` the attribute's)."""

    name: str
    space: str = ""
    const: bool = False
    type: str = ""
    reference: bool = False

    @property
    def expression(self) -> str:
        """The argument for it in `__msl_entry`, where `b` are the buffers left and `t` the thread."""
        if not self.space:
            if self.name not in _ATTRIBUTES:
                raise MslError(f"error: the attribute [[{self.name}]] is not modelled")
            return _ATTRIBUTES[self.name]
        space = "__global" if self.space == "device" else "__constant"
        pointer = f"({'const ' * self.const}{space} {self.type}*)(ulong)b[{{index}}]"
        return f"*({pointer})" if self.reference else pointer


def mlx_source(
    kernel: Kernel, inputs: Sequence[mx.array], template: Sequence[tuple], shapes: Sequence, dtypes: Sequence[mx.Dtype]
) -> str:
    """The text that mlx generates: it prints it while it traces a call for export, which needs no Metal."""
    real = MX_METAL_KERNEL(
        name=kernel.name,
        input_names=list(kernel.input_names),
        output_names=list(kernel.output_names),
        source=kernel.source,
        header=kernel.header,
        ensure_row_contiguous=kernel.ensure_row_contiguous,
        atomic_outputs=kernel.atomic_outputs,
    )
    one = (1, 1, 1)

    def call(*arrays: mx.array) -> list[mx.array]:
        return real(
            inputs=list(arrays),
            template=list(template),
            grid=one,
            threadgroup=one,
            output_shapes=list(shapes),
            output_dtypes=list(dtypes),
            verbose=True,
        )

    stand_ins = [mx.zeros(a.shape, a.dtype) for a in inputs]  # a traced input's values do not matter
    printed = _printed(lambda folder: mx.export_function(str(folder / "kernel.mlxfn"), call, *stand_ins))
    if "```\n" not in printed:
        raise MslError(f"error: mlx printed no source for {kernel.name}: {printed[:200]}")
    return printed.split("```\n", 1)[1].rsplit("\n```", 1)[0]


def _printed(trace) -> str:
    """What `trace(folder)` writes to the process's standard output, mlx's C++ included."""
    sys.stdout.flush()
    with _PRINTING, tempfile.TemporaryFile() as out, tempfile.TemporaryDirectory() as folder:
        keep = os.dup(1)
        os.dup2(out.fileno(), 1)
        try:
            trace(Path(folder))
        finally:
            os.dup2(keep, 1)
            os.close(keep)
        out.seek(0)
        return out.read().decode()


def kernel_name(text: str) -> str:
    """The name of the kernel function in mlx's text."""
    return re.search(r"\[\[kernel\]\] void (\w+)\(", text).group(1)


def parameters(text: str) -> list[Parameter]:
    """The parameters of the kernel function in mlx's text, in order."""
    listed = re.search(r"\[\[kernel\]\] void \w+\(\n(.*?)\) \{\n", text, re.S).group(1)
    out = []
    for line in listed.split(",\n"):
        m = _PARAMETER.match(line)
        if m:
            const, space, type_name, mark, name, _ = m.groups()
            out.append(Parameter(name, space, bool(const), type_name, mark == "&"))
        else:
            out.append(Parameter(_ATTRIBUTE.match(line).group(2)))
    return out


def entry_text(text: str, template: Sequence[tuple], params: Sequence[Parameter]) -> str:
    """`__msl_entry`, which calls the kernel for one thread; it reads host tables and is therefore not instrumented."""
    arguments, index = [], 0
    for p in params:
        arguments.append(p.expression.format(index=index))
        index += bool(p.space)
    values = ", ".join(_template_value(v) for _, v in template)
    call = f"{kernel_name(text)}{f'<{values}>' if values else ''}({', '.join(arguments)});"
    head = 'extern "C" __attribute__((no_sanitize("thread"))) void __msl_entry(void* const* b, const __msl_tid* t)'
    return f'\n#line 1 "entry"\n{head} {{ {call} }}\n'


def with_lines(text: str, kernel: Kernel) -> str:
    """mlx's text with `#line` directives, so that messages give lines of the header and of the source."""
    start = text.index(kernel.source, text.index("[[kernel]]")) if kernel.source else len(text)
    header, source = user_files(kernel)
    return f'#line 1 "{header}"\n{text[:start]}\n#line 1 "{source}"\n{text[start:]}'


def user_files(kernel: Kernel) -> tuple[str, str]:
    """The names that messages give to a kernel's header and source."""
    return f"{kernel.name}.header", f"{kernel.name}.source"


def _template_value(value: object) -> str:
    if isinstance(value, mx.Dtype):
        return _TYPE_NAMES[str(value).split(".")[-1]]
    return str(value).lower() if isinstance(value, bool) else str(value)
