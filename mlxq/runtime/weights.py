"""Real arrays for a module's parameters: a whole model, or one block of it at a time.

On a GPU parameters keep their stored dtype (a GGUF's get one, see `default_compute_dtype`). On the CPU everything is
float32 except big float matrices: mlx's CPU kernels are 9 times slower in bfloat16 and 40 times in float16 than in
float32, whereas `ops.matmul` widens a stored half-precision matrix while it is in the cache.

Matrices in ggml blocks stay in them where something computes with blocks (`layers.keeps_blocks`): on a GPU all whose
type has Metal kernels, on the CPU those that are no affine grid (Q6_K, say). Where nothing does (a GPU without Metal,
`MLXQ_BACKEND=mlx`, types without a kernel), those without a grid are decoded: on a GPU to the compute dtype, else to
float32, or where memory does not allow that to float16, a relative error of 2^-12 at most, far below what the blocks
lost.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlxq.architectures.parameters import ParameterMap
from mlxq.errors import CheckpointError
from mlxq.formats.floats import all_finite
from mlxq.runtime.layers import BlockEmbedding, BlockLayer, Embedding, QuantizedEmbedding, keeps_blocks
from mlxq.types import DTYPE_NAMES, FLOAT_BYTES, CancelToken, Progress, ProgressCallback, TensorInfo

#: Weights decoded at a time.
_CHUNK = 1 << 22
_MATRIX_KINDS = ("linear", "embedding", "switch")
_BITS = {2: mx.uint16, 4: mx.uint32}
_DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


def on_accelerator() -> bool:
    """Whether mlx computes on a GPU by default."""
    return mx.default_device().type == mx.DeviceType.gpu


def default_compute_dtype(parameter_map: ParameterMap) -> mx.Dtype | None:
    """Activation dtype: float32 on the CPU; on a GPU None (each tensor as stored), but for a GGUF one dtype for all.

    A GGUF has float32 norms beside matrices of other types, which would promote every activation to float32 unless
    they are cast. All is cast to the dtype that the model was made for, `torch_dtype` of its config: float16 would
    overflow in models made for bfloat16 (Gemma's activations exceed 65504). The scales of a GGUF are float16, though,
    with 3 bits more than bfloat16 keeps: rounded they would be other weights, and left as they are mlx would promote
    each product. So a GGUF of a bfloat16 model, with affine grids in it, is computed in float32, scales and norms
    included: its decoded weights stay exact, and nothing overflows. Matrices that stay in their blocks have no scales
    but those that a kernel decodes in float32: a file that has nothing else is computed in bfloat16.

    A model that another tool quantized (GPTQ, say) is computed in its own dtype where that holds all scales and biases
    exactly, else in float32, too.

    Called after `layers.install_layers`, which decides what stays in blocks.
    """
    if not on_accelerator():
        return mx.float32
    checkpoint = parameter_map.checkpoint
    if checkpoint.kind != "gguf":
        return _dtype_of_packed(parameter_map) if checkpoint.kind == "huggingface" else None
    dtype = _DTYPES.get(checkpoint.config.get("torch_dtype"), mx.float32)
    blocks = _block_weights(parameter_map.model, "")
    grids = [i for i in parameter_map.tensors.values() if i.spec is not None and i.name not in blocks]
    quantized = any(i.spec.mode == "affine" for i in grids)
    return mx.float32 if dtype == mx.bfloat16 and quantized else dtype


def _dtype_of_packed(parameter_map: ParameterMap) -> mx.Dtype | None:
    """The dtype that keeps a source's grids exact, None where it has no grids: see `default_compute_dtype`."""
    grids = [i for i in parameter_map.tensors.values() if i.spec is not None or i.permuted_spec is not None]
    if not grids:
        return None
    dtype = parameter_map.checkpoint.config.get("torch_dtype", "float16")
    exact = all(i.scales_dtype is None or DTYPE_NAMES[i.scales_dtype] == dtype for i in grids)
    return _DTYPES.get(dtype, mx.float32) if exact else mx.float32


def is_float32(dtype: mx.Dtype | None) -> bool:
    """Whether a compute dtype is float32; mlx's dtypes refuse to be compared with None."""
    return dtype is not None and dtype == mx.float32


def load_parameters(
    module: nn.Module,
    prefix: str,
    parameter_map: ParameterMap,
    *,
    compute_dtype: mx.Dtype | None,
    widen: bool = False,
    progress: ProgressCallback | None = None,
    cancel: CancelToken | None = None,
) -> int:
    """Fill `module` with arrays read from the checkpoint and evaluate them, so that any thread can use them.

    Args:
        module: the model, or a part of it, after `layers.install_layers`.
        prefix: the module's path in the model (`model.layers.3`); empty for the whole model.
        parameter_map: where each parameter comes from.
        compute_dtype: float dtype of scales, biases, norms and activations; None keeps each as stored.
        widen: cast float matrices to `compute_dtype` too, instead of keeping their storage dtype; not embeddings that
            are only looked up, where nothing would be gained.
        progress: called after each tensor, stage `load`.
        cancel: checked before each tensor.

    Returns:
        Bytes of the arrays now held.

    Raises:
        CheckpointError: a tensor cannot be read, or the module has parameters that the map does not.
        Cancelled: through `cancel`.
    """
    start = f"{prefix}." if prefix else ""
    infos = [info for name, info in parameter_map.tensors.items() if name.startswith(start)]
    wanted = {start + name for name, _ in tree_flatten(module.parameters())}
    in_blocks = _block_weights(module, prefix)
    nbytes = 0
    for done, info in enumerate(infos, 1):
        if cancel is not None:
            cancel.check()
        keep = info.name in parameter_map.cast_protected and not is_float32(compute_dtype)
        dtype = None if keep else compute_dtype
        if info.name in in_blocks:
            arrays = {info.name: mx.array(parameter_map.read_blocks(info.name))}
        else:
            permuted = f"{info.name.rpartition('.')[0]}.order" in wanted
            arrays = _arrays(info, parameter_map, dtype, widen, permuted)
        wanted -= arrays.keys()
        mx.eval(list(arrays.values()))
        module.load_weights([(name[len(start) :], a) for name, a in arrays.items()], strict=False)
        nbytes += sum(a.nbytes for a in arrays.values())
        if progress is not None:
            progress(Progress("load", done, len(infos), "tensors", info.name))
    if wanted:
        raise CheckpointError(f"{parameter_map.checkpoint.path}: nothing to fill {min(wanted)} of the model with")
    _finish(module, compute_dtype)
    release_cache()
    return nbytes


def release_cache() -> None:
    """On a GPU give freed memory, which mlx keeps for later arrays of the same size, back to the system."""
    if on_accelerator():
        mx.clear_cache()


def release_parameters(module: nn.Module) -> None:
    """Free what `load_parameters` filled; shapes and dtypes stay, as lazy placeholders."""
    blank = [(name, mx.zeros(a.shape, a.dtype)) for name, a in tree_flatten(module.parameters())]
    module.load_weights(blank, strict=False)


def matrix_size(parameter_map: ParameterMap) -> int:
    """Number of weights in float matrices, which `widen` would store as float32."""
    floats = (i for i in parameter_map.tensors.values() if not (i.spec or i.permuted_spec or keeps_blocks(i)))
    return sum(i.size for i in floats if i.module in _MATRIX_KINDS)


def _block_weights(module: nn.Module, prefix: str) -> set[str]:
    """Names of the parameters that layers hold in ggml blocks; `prefix` is the module's path in the model."""
    kept = [path for path, part in module.named_modules() if isinstance(part, BlockLayer)]
    return {".".join(filter(None, (prefix, path, "weight"))) for path in kept}


def _arrays(
    info: TensorInfo, source: ParameterMap, dtype: mx.Dtype | None, widen: bool, permuted: bool = False
) -> dict[str, mx.array]:
    path = info.name.rpartition(".")[0]
    if info.spec is not None or permuted:
        q = source.read_quantized(info.name)
        if q.biases is None:
            return {info.name: mx.array(q.w_q), f"{path}.scales": mx.array(q.scales)}
        scales, biases = (to_mlx(a, dtype) for a in (q.scales, q.biases))
        order = {f"{path}.order": mx.array(source.read_order(info.name))} if permuted else {}
        return {info.name: mx.array(q.w_q), f"{path}.scales": scales, f"{path}.biases": biases} | order
    widen = widen and not (info.module == "embedding" and source.has_output_projection)
    if info.module in _MATRIX_KINDS and not widen and info.dtype != "F32":
        dtype = None if is_float32(dtype) else dtype
        if info.dtype not in FLOAT_BYTES:
            return {info.name: to_mlx(_decoded(info, source), dtype)}
    if info.dtype in FLOAT_BYTES and info.size and not source.is_computed(info.name):
        return {info.name: _read_in_parts(info, source, dtype)}
    return {info.name: to_mlx(source.read(info.name), dtype)}


def _read_in_parts(info: TensorInfo, source: ParameterMap, dtype: mx.Dtype | None) -> mx.array:
    """A float tensor, read some rows at a time into the memory that mlx keeps it in: it is never there twice."""
    first, *others = info.row_ranges(_CHUNK)
    part = to_mlx(source.read(info.name, first), dtype)
    if not others:
        return part
    bits = _BITS[part.dtype.size]
    array = mx.zeros(info.shape, bits)
    mx.eval(array)
    held = np.asarray(memoryview(array))
    held[first] = np.asarray(memoryview(part.view(bits)))
    for rows in others:
        held[rows] = np.asarray(memoryview(to_mlx(source.read(info.name, rows), dtype).view(bits)))
    return array.view(part.dtype)


def _decoded(info: TensorInfo, source: ParameterMap) -> np.ndarray:
    """A matrix without a grid (ggml blocks, say) as float16, some rows at a time; float32 where that cannot hold it."""
    out = np.empty(info.shape, np.float16)
    for rows in info.row_ranges(_CHUNK):
        with np.errstate(over="ignore"):
            out[rows] = source.read(info.name, rows)
    return out if all_finite(out) else source.read(info.name)


def to_mlx(a: np.ndarray, dtype: mx.Dtype | None = None) -> mx.array:
    """NumPy storage (float32, float16, uint16 with the bits of bfloat16) as an mlx array, cast if `dtype` is given."""
    array = mx.array(a)
    if a.dtype == np.uint16:
        array = array.view(mx.bfloat16)
    return array if dtype is None else array.astype(dtype)


def _finish(module: nn.Module, compute_dtype: mx.Dtype | None) -> None:
    """Evaluate buffers that are no parameters (rope frequencies, say), and tell embeddings their output dtype."""
    mx.eval([a for _, a in tree_flatten(module) if isinstance(a, mx.array)])
    for part in module.modules():
        if isinstance(part, Embedding | BlockEmbedding | QuantizedEmbedding):
            part.compute_dtype = compute_dtype
    module.eval()
