"""Where a model keeps its blocks, and wrappers that read their parameters when they are called."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxq.architectures.parameters import ParameterMap
from mlxq.runtime.weights import load_parameters, release_parameters

#: Called after every block: its index is done, of the number of blocks.
BlockCallback = Callable[[int, int], None]
#: Called with the index of every block and what it returned, evaluated.
OutputCallback = Callable[[int, Any], None]


class NotStreamable(Exception):
    """The model has not the structure that running it block by block needs; the text says what is missing."""


class TrunkDone(Exception):
    """Leaves the model's forward pass once the trunk has computed its output."""

    def __init__(self, output: Any):
        super().__init__()
        self.output = output


class BlockLayout:
    """Where a model keeps its blocks, the modules beside them, and the modules on the way from the root."""

    def __init__(self, model: nn.Module, names: Iterable[str]):
        self.model = model
        self.path = _path_of_blocks(model)
        *parents, self.attribute = self.path.split(".")
        self.owners = [(model, "")]
        for i, name in enumerate(parents):
            child = self.owners[-1][0].get(name)
            if not isinstance(child, nn.Module):
                raise NotStreamable(f"its blocks at {self.path} are not reached through modules alone")
            self.owners.append((child, ".".join(parents[: i + 1])))
        if len(self.owners) < 2:
            raise NotStreamable("its blocks belong to the model itself, not to a trunk inside it")
        self.blocks: list[nn.Module] = list(self.owners[-1][0][self.attribute])
        self.parts = self._find_parts(names)
        self._refuse_sharing()
        self._lazy: list[LazyModule] = []
        self._cuts: list[Cut] = []

    def _find_parts(self, names: Iterable[str]) -> list[tuple[nn.Module, str, str]]:
        """`(owner, attribute, path)` of each module with parameters that is neither a block nor above them."""
        above = {id(module) for module, _ in self.owners}
        parts = []
        for owner, prefix in self.owners:
            for attribute, child in owner.items():
                path = f"{prefix}.{attribute}" if prefix else attribute
                if path == self.path or id(child) in above:
                    continue
                if isinstance(child, nn.Module):
                    parts.append((owner, attribute, path))
                elif any(name == path or name.startswith(f"{path}.") for name in names):
                    raise NotStreamable(f"{path} holds parameters beside the blocks that belong to no module")
        return parts

    def _refuse_sharing(self) -> None:
        seen: set[int] = set()
        for top in [*self.blocks, *(owner[attribute] for owner, attribute, _ in self.parts)]:
            own = {id(m) for m in top.modules() if any(isinstance(v, mx.array) for v in m.values())}
            if own & seen:
                raise NotStreamable("its blocks share modules with each other")
            seen |= own

    def wrap(
        self,
        parameter_map: ParameterMap,
        dtype: mx.Dtype | None,
        on_block: BlockCallback,
        around_block: Callable[[int, LazyModule], Proxy] | None = None,
        on_output: OutputCallback | None = None,
    ) -> None:
        """Put the wrappers in: blocks, parts, and the cuts on the way to the blocks.

        `around_block` makes what stands in the place of each block, by its index; then there are no cuts.
        """
        total = len(self.blocks)

        def make(module: nn.Module, path: str, index: int | None = None) -> LazyModule:
            def load() -> None:
                load_parameters(module, path, parameter_map, compute_dtype=dtype)

            def finished(output: Any) -> None:
                if on_output is not None:
                    on_output(index, output)
                on_block(index + 1, total)

            return LazyModule(module, load, None if index is None else finished)

        self._lazy = [make(block, f"{self.path}.{i}", i) for i, block in enumerate(self.blocks)]
        owner = self.owners[-1][0]
        around = around_block or (lambda index, lazy: lazy)
        owner[self.attribute] = [around(i, lazy) for i, lazy in enumerate(self._lazy)]
        for part_owner, attribute, path in self.parts:
            lazy = make(part_owner[attribute], path)
            self._lazy.append(lazy)
            part_owner[attribute] = lazy
        if around_block is not None:
            return
        for (parent, _), (module, path) in zip(self.owners, self.owners[1:], strict=False):
            cut = Cut(module)
            self._cuts.append(cut)
            parent[path.rpartition(".")[2]] = cut

    def replay(self, hidden: mx.array) -> None:
        """Let the trunk return `hidden` the next time it is called."""
        self._cuts[self.trunk].replay = hidden

    @property
    def trunk(self) -> int:
        """Which of the modules above the blocks ended the pass, counted from the root."""
        return max(i for i, cut in enumerate(self._cuts) if cut.called)

    @trunk.setter
    def trunk(self, index: int) -> None:
        for cut in self._cuts[: index + 1]:
            cut.called = True

    def release(self) -> None:
        """Drop the parameters of every part."""
        for lazy in self._lazy:
            lazy.release()


class Proxy:
    """Stands where a module was: attributes and items are the module's."""

    def __init__(self, module: nn.Module):
        self._module = module

    def _prepare(self) -> None:
        pass

    @property
    def unread(self) -> nn.Module:
        """The module, whose parameters may not be there."""
        return self._module

    def __getattr__(self, name: str) -> Any:
        self._prepare()
        return getattr(self._module, name)

    def __getitem__(self, name: str) -> Any:
        self._prepare()
        return self._module[name]

    def __contains__(self, name: str) -> bool:
        return name in self._module


class LazyModule(Proxy):
    """A module whose parameters are read when it is needed.

    A block (`finished` is given) has them from the start of its call until its output is evaluated, and its attributes
    are passed through without them. Another part has them from its first use until `release`.
    """

    def __init__(self, module: nn.Module, load: Callable[[], None], finished: Callable[[Any], None] | None):
        super().__init__(module)
        self._load = load
        self._finished = finished
        self._loaded = False

    def _prepare(self) -> None:
        if not self._loaded and self._finished is None:
            self._loaded = True
            self._load()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._finished is None:
            self._prepare()
            return self._module(*args, **kwargs)
        # What comes in would otherwise be computed only now, while this block's parameters are held too.
        mx.eval([a for _, a in tree_flatten((args, kwargs)) if isinstance(a, mx.array)])
        with self.loaded() as module:
            output = module(*args, **kwargs)
            mx.eval([a for _, a in tree_flatten(output) if isinstance(a, mx.array)])
        self._finished(output)
        return output

    @contextlib.contextmanager
    def loaded(self) -> Iterator[nn.Module]:
        """A block with its parameters, until the `with` is left."""
        self._load()
        try:
            yield self._module
        finally:
            release_parameters(self._module)

    def release(self) -> None:
        if self._loaded:
            release_parameters(self._module)
            self._loaded = False


class Cut(Proxy):
    """A module above the blocks. The innermost that is called is the trunk: it ends the pass with its output."""

    def __init__(self, module: nn.Module):
        super().__init__(module)
        self.called = False
        self.replay: mx.array | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.replay is not None:
            return self.replay
        if self.called:
            return self._module(*args, **kwargs)
        self.called = True
        raise TrunkDone(self._module(*args, **kwargs))


def _path_of_blocks(model: nn.Module) -> str:
    """Path of the list that holds the blocks, e.g. `model.layers`."""
    blocks = getattr(model, "layers", None)
    if not isinstance(blocks, (list, tuple)) or not all(isinstance(b, nn.Module) for b in blocks) or not blocks:
        raise NotStreamable("it has no list of blocks")
    wanted = {id(b) for b in blocks}
    for path, module in model.named_modules():
        for attribute, value in module.items():
            if isinstance(value, list) and wanted <= {id(v) for v in value}:
                return f"{path}.{attribute}" if path else attribute
    raise NotStreamable("its blocks are not all in one list")
