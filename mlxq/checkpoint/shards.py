"""The weight files of a model directory as one set of tensors: a single safetensors file, or shards and their index."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from mlxq.checkpoint.config import read_json
from mlxq.checkpoint.safetensors import Entry, SafetensorsFile, quoted
from mlxq.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_SHARD = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")
_PICKLED = (".bin", ".pth", ".pt", ".ckpt", ".pkl")
_NOT_WEIGHTS = frozenset({"training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"})


class ShardedTensors:
    """Tensors of all weight files of a directory, by name.

    Attributes:
        directory: where the files lie.
        paths: the weight files, in order.
        tensors: name -> `Entry`.

    Raises:
        CheckpointError: no weight file that can be read, a shard missing, or an index that disagrees with its shards.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        weight_map = read_index(directory)
        names = (
            sorted(set(weight_map.values()))
            if weight_map
            else find_weights((p.name for p in directory.iterdir()), directory)
        )
        if not names:
            raise CheckpointError(f"{directory}: {explain_no_weights(p.name for p in directory.iterdir())}")
        if weight_map:
            _check_files(directory, names)
        self.paths = [directory / name for name in names]
        self.tensors: dict[str, Entry] = {}
        self._file_of: dict[str, SafetensorsFile] = {}
        self._closed = False
        for path in self.paths:
            self._add(SafetensorsFile(path))
        for name, shard in weight_map.items():
            holder = self._file_of.get(name)
            if holder is None or holder.path.name != shard:
                where = "in no shard" if holder is None else f"in {holder.path.name}"
                raise CheckpointError(f"{directory / INDEX}: puts tensor {quoted(name)} in {shard}, but it is {where}")

    def _add(self, file: SafetensorsFile) -> None:
        for name, entry in file.tensors.items():
            if name in self._file_of:
                raise CheckpointError(f"{file.path}: tensor {quoted(name)} is also in {self._file_of[name].path.name}")
            self.tensors[name] = entry
            self._file_of[name] = file

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """Values of a tensor or of a range of its rows, as `SafetensorsFile.read` gives them."""
        if self._closed:
            raise CheckpointError(f"{self.directory}: the checkpoint is closed")
        file = self._file_of.get(name)
        if file is None:
            raise CheckpointError(f"{self.directory}: no tensor {quoted(name)}")
        return file.read(name, rows)

    def close(self) -> None:
        self._closed = True


def read_index(directory: Path) -> dict[str, str]:
    """Tensor name -> shard file, as the index of a directory says; empty when there is no index."""
    path = directory / INDEX
    if not path.exists():
        return {}
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: weight_map must map tensor names to shard files")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise CheckpointError(
                f"{path}: puts tensor {quoted(name)} in {quoted(shard)}, not a safetensors file in the directory"
            )
    return weight_map


def _check_files(directory: Path, names: list[str]) -> None:
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{directory / missing[0]}: missing, though {INDEX} names it"
            f" ({len(missing)} of {len(names)} shards are missing); download the model again"
        )
    extra = sorted(p.name for p in directory.glob("model*.safetensors") if p.name not in names)
    if extra:
        raise CheckpointError(
            f"{directory / extra[0]}: holds weights but {INDEX} does not name it; remove the file or the stale index"
        )


def find_weights(names: Iterable[str], where: object) -> list[str]:
    """Of the file names at `where` without an index, those that hold the weights; empty when there are none.

    Raises:
        CheckpointError: a numbered set of shards is incomplete.
    """
    names = set(names)
    if SINGLE in names:
        return [SINGLE]
    shards = sorted(n for n in names if _SHARD.fullmatch(n))
    if shards:
        total = _SHARD.fullmatch(shards[0]).group(2)
        wanted = [f"model-{i:05d}-of-{total}.safetensors" for i in range(1, int(total) + 1)]
        missing = [n for n in wanted if n not in names]
        if missing or len(shards) != len(wanted):
            what = f"shard {missing[0]} is missing" if missing else "shards of several sets are mixed"
            raise CheckpointError(f"{where}: {what} and there is no {INDEX}; download the model again")
    return shards


def explain_no_weights(names: Iterable[str], repo_id: str | None = None) -> str:
    """Why a directory with these files (or a model of the Hub) has no weights that can be read, and what to do."""
    names = sorted(set(names) - _NOT_WEIGHTS)
    adapters = [n for n in names if n.startswith("adapter") and n.endswith((".safetensors", ".bin", ".npz"))]
    if adapters:
        return f"holds an adapter ({adapters[0]}), not a model; merge it into its base model first"
    pickled = [n for n in names if n.endswith(_PICKLED)]
    if pickled:
        return (
            f"holds only pickled weights ({pickled[0]}), which can run code when opened and are not read;"
            " convert them to safetensors (save_pretrained of transformers does) or use a safetensors revision"
        )
    ggufs = [n for n in names if n.endswith(".gguf")]
    if ggufs and repo_id:
        others = f" (or another of its {len(ggufs)})" if len(ggufs) > 1 else ""
        return f"holds GGUF files: `hf download {repo_id} {ggufs[0]}`{others}, then give the path that it prints"
    if ggufs:
        return f"holds GGUF files, such as {ggufs[0]}; name the file itself"
    others = [n for n in names if n.endswith((".safetensors", ".npz", ".h5", ".msgpack", ".onnx"))]
    if others:
        return f"no {SINGLE} or {INDEX}; {others[0]} has a layout that is not supported"
    return f"no weights: neither {SINGLE} nor {INDEX} is here"
