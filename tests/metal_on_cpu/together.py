"""Many instantiations of kernels compiled strictly, in few compilations: those of one header become one unit."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import mlx.core as mx

from metal_on_cpu import source
from metal_on_cpu.compile import compile_kernel
from metal_on_cpu.options import Options

#: Instantiations of a unit: its syntax tree, which the lint reads, is some 100 KB for each.
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
        with ThreadPoolExecutor(min(os.cpu_count() or 1, 4)) as pool:
            for _ in pool.map(_compile, self._units()):
                pass

    def _units(self) -> Iterator[list[tuple[_Asked, tuple]]]:
        by_header: dict[str, list[tuple[_Asked, tuple]]] = {}
        for asked in self.asked.values():
            by_header.setdefault(asked.kernel.header, []).extend((asked, template) for template in asked.templates)
        for instantiations in by_header.values():
            for start in range(0, len(instantiations), _TOGETHER):
                yield instantiations[start : start + _TOGETHER]


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


def _compile(instantiations: list[tuple[_Asked, tuple]]) -> None:
    """One unit: the header that all share, their kernel functions, and a call of each instantiation."""
    texts: dict[int, tuple[str, list[source.Parameter]]] = {}
    entries = []
    first = instantiations[0][0].kernel
    for i, (asked, template) in enumerate(instantiations):
        if id(asked) not in texts:
            texts[id(asked)] = _text(asked, template, f"_{len(texts)}")
        text, params = texts[id(asked)]
        entry = source.entry_text(text, template, params)
        entries.append(entry.replace("void __msl_entry(", f"void __msl_entry_{i}("))
    header, kernel = source.user_files(first)
    bodies = [text[text.index(first.header) + len(first.header) :] for text, _ in texts.values()]
    parts = [f'#line 1 "{header}"\n{first.header}\n', *(f'#line 1 "{kernel}"\n{body}\n' for body in bodies)]
    compile_kernel("".join(parts), "".join(entries), Options(dry=True).build, (header, kernel))


def _text(asked: _Asked, template: tuple, suffix: str) -> tuple[str, list[source.Parameter]]:
    """mlx's text, with a name for the kernel function that no other has, and its parameters."""
    shapes, dtypes = zip(*asked.outputs, strict=True)
    text = source.mlx_source(asked.kernel, asked.inputs, template, shapes, dtypes)
    name = source.kernel_name(text)
    return text.replace(name, name + suffix), source.parameters(text)
