"""`load`: from a directory, a GGUF file or a Hub id to a `Model` that any thread can use."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxq.api import public
from mlxq.architectures.parameters import ParameterMap
from mlxq.architectures.registry import model_classes
from mlxq.checkpoint.config import context_length, eos_token_ids
from mlxq.checkpoint.source import open_checkpoint
from mlxq.errors import GenerationError
from mlxq.formats.geometry import BLOCK_FORMATS, quantized_bytes
from mlxq.ops.dispatch import Call, choose
from mlxq.runtime import generate as _generate
from mlxq.runtime.fused import install_fused
from mlxq.runtime.layers import install_layers
from mlxq.runtime.memory import physical_memory
from mlxq.runtime.tokenizer import Messages, encode_prompt, load_tokenizer
from mlxq.runtime.weights import default_compute_dtype, is_float32, load_parameters, matrix_size, release_cache
from mlxq.types import CancelToken, ProgressCallback


class Model:
    """A loaded model.

    Attributes:
        module: the `mlx.nn.Module`, its parameters evaluated.
        tokenizer: transformers' tokenizer.
        config, generation_config: as in the source.
        stop_tokens: ids that end a text: those of the tokenizer, of config.json and of generation_config.json.
        context_length: tokens the model was made for, or None if it does not say.
        nbytes: bytes of its parameters in memory.
        path: where it was loaded from.
    """

    def __init__(
        self,
        module: nn.Module,
        tokenizer: Any,
        config: dict[str, Any],
        generation_config: dict[str, Any],
        nbytes: int,
        path: Path,
    ):
        self._module: nn.Module | None = module
        self.tokenizer = tokenizer
        self.config = config
        self.generation_config = generation_config
        self.nbytes = nbytes
        self.path = path
        self.stop_tokens = frozenset(eos_token_ids(tokenizer.eos_token_id, config, generation_config))
        self.context_length: int | None = context_length(config)
        self._lock = threading.Lock()

    @property
    def module(self) -> nn.Module:
        if self._module is None:
            raise GenerationError(f"the model {self.path} was closed: load it again")
        return self._module

    def encode(
        self, prompt: str | Messages, *, system: str | None = None, chat_template: bool | None = None
    ) -> list[int]:
        """Token ids of a prompt, as `generate` passes them to the model."""
        # The tokenizers library refuses to be used from two threads at once.
        with self._lock:
            return encode_prompt(self.tokenizer, prompt, system=system, chat_template=chat_template)

    def generate(self, prompt: str | Messages, **options: Any) -> _generate.GenerationResult:
        """`mlxq.generate` with this model."""
        return _generate.generate(self, prompt, **options)

    def stream(self, prompt: str | Messages, **options: Any) -> Iterator[_generate.TextChunk]:
        """`mlxq.stream` with this model."""
        return _generate.stream(self, prompt, **options)

    def close(self) -> None:
        """Let go of the parameters. A text being generated is finished first by those who read it."""
        self._module = None
        release_cache()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Model({str(self.path)!r}, {self.config.get('model_type')}, {self.nbytes / 1e6:.0f} MB)"


@public
def load(
    source: str | Path,
    *,
    revision: str | None = None,
    progress: ProgressCallback | None = None,
    cancel: CancelToken | None = None,
) -> Model:
    """Load a model to run it.

    Parameters are evaluated before this returns, so a model loaded in one thread works in all. On the CPU activations
    are float32; on a GPU they have the model's own dtype (see `weights.default_compute_dtype`). Matrices of a GGUF file
    stay in their blocks where something computes with them: on Apple's GPUs if their type has Metal kernels, on the
    CPU if MLX's affine grids cannot hold it (Q6_K, say). Otherwise they become affine grids, or are decoded. What
    another tool has quantized keeps its codes, columns out of order (GPTQ's act-order) included.

    Args:
        source: a directory (float, or quantized by MLX, GPTQ, AWQ ...), a `.gguf` file, or a Hub id `org/name`.
        revision: branch, tag or commit of a Hub id.
        progress: called with stages `download` and `load`.
        cancel: checked before each tensor.

    Raises:
        CheckpointError: the source is missing, damaged, of an unknown architecture, or has no tokenizer.
        BackendError: `MLXQ_BACKEND` names no back end, or one that this machine does not have.
        Cancelled: through `cancel`.
    """
    # Refuses an unknown MLXQ_BACKEND before anything is read.
    choose(Call("matmul", "cpu"))
    with open_checkpoint(source, revision, progress, accept=model_classes) as checkpoint:
        # Before the tokenizer: transformers reads config.json too, and would take the blame for what is wrong in it.
        parameter_map = ParameterMap(checkpoint)
        tokenizer = load_tokenizer(checkpoint)
        module = parameter_map.model
        install_layers(module, parameter_map.tensors, compact=_should_be_compact(parameter_map))
        install_fused(module)
        dtype = default_compute_dtype(parameter_map)
        nbytes = load_parameters(
            module,
            "",
            parameter_map,
            compute_dtype=dtype,
            widen=_should_widen(parameter_map, dtype),
            progress=progress,
            cancel=cancel,
        )
        return Model(module, tokenizer, checkpoint.config, checkpoint.generation_config, nbytes, Path(checkpoint.path))


def _should_widen(parameter_map: ParameterMap, dtype: mx.Dtype | None) -> bool:
    """Whether float matrices become float32, too: if activations are, and it takes less than a quarter of memory."""
    if not is_float32(dtype):
        return False
    return 4 * matrix_size(parameter_map) <= physical_memory() // 4


def _should_be_compact(parameter_map: ParameterMap) -> bool:
    """Whether blocks that have an affine grid stay blocks: if their grids would take more than half of memory."""
    grids = [i for i in parameter_map.tensors.values() if i.spec is not None and i.dtype in BLOCK_FORMATS]
    return sum(quantized_bytes(i.shape, i.spec, "F32") for i in grids) > physical_memory() // 2
