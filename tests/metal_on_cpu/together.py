"""Many instantiations of kernels compiled strictly, few compilations: those of one text become one translation unit."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import mlx.core as mx

from metal_on_cpu import source
from metal_on_cpu.compile import compile_kernel
from metal_on_cpu.options import Options

#: Instantiations of a translation unit: its syntax tree, which the lint reads, is some 100 KB for each.
_TOGETHER = 100


@dataclass
class Recorder:
    """Stands in for `mx.fast.metal_kernel`: kernels do nothing but say what they were asked for.

    Attributes:
        asked: for each text with dtypes of arguments, a kernel, its arrays, and all templates it was asked for.
    """

    asked: dict[tuple, _Asked] = field(default_factory=dict)

    def metal_kernel(
        self, name: str, input_names: Sequence[str], output_names: Sequence[str], source: str, header: str = "", **_
    ) -> _Recorded:
        return _Recorded(self, _kernel(name, tuple(input_names), tuple(output_names), source, header))

    @property
    def count(self) -> int:
        return sum(len(a.templates) for a in self.asked.values())

    def compile(self) -> None:
        """Compile and lint all of them, as mode `check` with `dry`.

        Raises:
            MslError: the first that does not compile, or that the lint rejects.
        """
        pieces = []
        for asked in self.asked.values():
            templates = list(asked.templates)
            pieces += [(asked, templates[i : i + _TOGETHER]) for i in range(0, len(templates), _TOGETHER)]
        with ThreadPoolExecutor(min(os.cpu_count() or 1, 4)) as pool:
            for _ in pool.map(lambda piece: _compile(*piece), pieces):
                pass


@dataclass
class _Asked:
    kernel: source.Kernel
    inputs: list[mx.array]
    outputs: list[tuple]
    templates: dict[tuple, None] = field(default_factory=dict)


@dataclass
class _Recorded:
    recorder: Recorder
    kernel: source.Kernel

    def __call__(self, *, inputs, output_shapes, output_dtypes, template=(), **_) -> list[mx.array]:
        k, outputs = self.kernel, list(zip(output_shapes, output_dtypes, strict=True))
        # mlx's text depends on these: types, names, and whether an input is a constant.
        arguments = tuple((a.dtype, a.size < 8, a.ndim == 0) for a in inputs)
        names = tuple(name for name, _ in template)
        types = tuple(v for _, v in template if isinstance(v, mx.Dtype))
        key = (k.source, k.header, k.input_names, k.output_names, arguments, tuple(output_dtypes), names, types)
        asked = self.recorder.asked.setdefault(key, _Asked(k, list(inputs), outputs))
        asked.templates[tuple(template)] = None
        return [mx.zeros(shape, dtype) for shape, dtype in outputs]


def _kernel(name: str, input_names: tuple, output_names: tuple, text: str, header: str) -> source.Kernel:
    return source.Kernel(name, input_names, output_names, text, header)


def _compile(asked: _Asked, templates: list[tuple]) -> None:
    shapes, dtypes = zip(*asked.outputs, strict=True)
    text = source.mlx_source(asked.kernel, asked.inputs, templates[0], shapes, dtypes)
    params = source.parameters(text)
    entries = [source.entry_text(text, template, params) for template in templates]
    entry = "".join(e.replace("void __msl_entry(", f"void __msl_entry_{i}(") for i, e in enumerate(entries))
    marked = source.with_lines(text, asked.kernel)
    compile_kernel(marked, entry, Options(dry=True).build, source.user_files(asked.kernel))
