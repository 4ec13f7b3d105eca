"""A Hugging Face model directory: float weights in safetensors, `config.json`, and the files that go along."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from mlxq.checkpoint.base import Checkpoint
from mlxq.checkpoint.config import read_config, read_generation_config
from mlxq.checkpoint.safetensors import Entry, quoted
from mlxq.checkpoint.shards import ShardedTensors
from mlxq.errors import CheckpointError
from mlxq.types import FLOAT_BYTES, TensorInfo

#: Files that travel with a model, byte for byte: tokenizer, chat templates, generation settings, processors, licences,
#: and code of its own, which is not run here but which other readers may ask for.
COMPANIONS = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "*.tiktoken",
    "tiktoken.model",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "USE_POLICY*",
    "*.py",
)
#: Any one of these makes a tokenizer.
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "*.tiktoken", "tiktoken.model", "spiece.model", "tekken.json")
_FP8 = ("F8_", "F6_", "F4")
_PACKED_NAMES = (".qweight", ".qzeros", ".weight_packed", ".weight_scale", ".weight_scale_inv", ".absmax")


def find_companions(directory: Path) -> dict[str, Path]:
    """The files of `COMPANIONS` that a directory has: name relative to it -> path."""
    found = {}
    for pattern in COMPANIONS:
        for path in directory.glob(pattern):
            if path.is_file():
                found[path.relative_to(directory).as_posix()] = path
    return dict(sorted(found.items()))


def is_companion(name: str) -> bool:
    """Whether a file of this name, relative to the model's directory, is one that `find_companions` takes."""
    return any(name.count("/") == p.count("/") and fnmatch.fnmatchcase(name, p) for p in COMPANIONS)


def is_tokenizer(names: Iterable[str]) -> bool:
    """Whether files of these names make a tokenizer that transformers can load."""
    names = set(names)
    if any(fnmatch.fnmatch(name, pattern) for name in names for pattern in _TOKENIZERS):
        return True
    return "vocab.txt" in names or ("vocab.json" in names and "merges.txt" in names)


class SafetensorsDirectory(Checkpoint):
    """What the checkpoints of safetensors directories share: configuration, companion files, weight files."""

    def __init__(self, path: Path):
        self.path = Path(path)
        if not self.path.is_dir():
            what = "not a directory" if self.path.exists() else "no such directory"
            raise CheckpointError(f"{self.path}: {what}")
        self.config = read_config(self.path)
        self.generation_config = read_generation_config(self.path)

    def _open_weights(self) -> None:
        try:
            self._stored = ShardedTensors(self.path)
        except OSError as e:
            raise CheckpointError(f"{self.path}: cannot be read: {e.strerror or e}") from e

    def _float_info(self, name: str, entry: Entry) -> TensorInfo:
        """A tensor stored as plain numbers, or the reason why its format is refused."""
        where = f"{self.path}: tensor {quoted(name)}"
        if entry.dtype.startswith(_FP8):
            kind = "FP8" if entry.dtype.startswith("F8_") else entry.dtype
            raise CheckpointError(
                f"{where} is {entry.dtype}; {kind} checkpoints are not supported yet, use the model's bfloat16 weights"
            )
        if entry.dtype not in FLOAT_BYTES:
            if self.kind != "mlx" and f"{name.removesuffix('.weight')}.scales" in self._stored.tensors:
                raise CheckpointError(
                    f"{where} is packed ({entry.dtype} with scales), but config.json has no quantization"
                )
            if name.endswith((".weight", *_PACKED_NAMES)):
                raise CheckpointError(
                    f"{where} is {entry.dtype}; weights must be F32, F16 or BF16, packed formats are not supported yet"
                )
        return TensorInfo(name, entry.shape, entry.dtype, entry.nbytes)

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """Values of a tensor or of a range of its rows: float32, float16, or bfloat16's bits as uint16.

        Raises:
            CheckpointError: no such tensor, one that is not F32, F16 or BF16, or a file that changed.
        """
        entry = self._stored.tensors.get(name)
        if entry is not None and entry.dtype not in FLOAT_BYTES:
            raise CheckpointError(f"{self.path}: tensor {quoted(name)} is {entry.dtype}, not F32, F16 or BF16")
        return self._stored.read(name, rows)

    def companion_files(self) -> dict[str, Path | bytes]:
        """Tokenizer, chat template, generation config and licence files: name in the output -> path here."""
        return dict(find_companions(self.path))

    def files(self) -> list[Path]:
        """The safetensors files, in order."""
        return list(self._stored.paths)

    def close(self) -> None:
        """Reading afterwards is an error."""
        self._stored.close()


class HuggingFaceCheckpoint(SafetensorsDirectory):
    """A directory with float weights (F32, F16, BF16), single or sharded.

    Tensors of other number types that models keep as buffers (integer position ids, say) are listed with their dtype
    and cannot be read.

    Raises:
        CheckpointError: no readable weights or configuration, or packed weights (`packed.checkpoint` reads those).
    """

    kind = "huggingface"

    def __init__(self, path: str | Path):
        super().__init__(Path(path))
        self._open_weights()
        self.tensors = {name: self._float_info(name, entry) for name, entry in self._stored.tensors.items()}
