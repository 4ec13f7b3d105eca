"""Our layers, attention and weights against unmodified mlx-lm: the same directory, the same logits."""

from __future__ import annotations

import resource
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from random_models import CONTINUATION, PROMPT, ZOO, save_random, stock_logits

from mlxq import ops
from mlxq.architectures.parameters import ParameterMap
from mlxq.architectures.registry import build_model, import_private
from mlxq.checkpoint.source import open_checkpoint
from mlxq.errors import Cancelled, CheckpointError
from mlxq.runtime import attention, layers, weights
from mlxq.types import CancelToken, QuantSpec, TensorInfo


def load_module(path: Path, compute_dtype: mx.Dtype | None = mx.float32, **options: bool) -> nn.Module:
    with open_checkpoint(path) as checkpoint:
        parameter_map = ParameterMap(checkpoint)
        model = parameter_map.model
        layers.install_layers(model, parameter_map.tensors)
        weights.load_parameters(model, "", parameter_map, compute_dtype=compute_dtype, **options)
    return model


def our_logits(path: Path, **options: bool) -> np.ndarray:
    return logits_of(load_module(path, **options))


def logits_of(model: nn.Module) -> np.ndarray:
    cache = import_private("models.cache").make_prompt_cache(model)
    parts = [model(mx.array([PROMPT]), cache=cache)]
    parts += [model(mx.array([[t]]), cache=cache) for t in CONTINUATION]
    return np.array(mx.concatenate(parts, axis=1)[0].astype(mx.float32))


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("backend", ["", "numpy", "mlx", "plain"])
def test_logits_are_those_of_mlx_lm(name, backend, zoo, zoo_stock, monkeypatch):
    if backend == "plain":
        # What a GPU gets: mlx's own layers and attention in our classes.
        monkeypatch.delenv("MLXQ_BACKEND", raising=False)
        monkeypatch.setattr(attention, "on_cpu", lambda: False)
        monkeypatch.setattr(ops, "quantized_matmul", None)
        monkeypatch.setattr(ops, "matmul", None)
    else:
        monkeypatch.setenv("MLXQ_BACKEND", backend)
    theirs, ours = zoo_stock[name], our_logits(zoo[name])
    assert ours.shape == theirs.shape
    # Both compute in float32 (unit roundoff 6e-8). Sums of up to 256 products in another order differ by about
    # sqrt(256) roundings, 1e-6 of their size, and there are about ten such sums on the way: 1e-5. A wrong mask, head
    # or scale changes logits by their own size.
    assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max()


@pytest.mark.parametrize("name", ZOO)
def test_a_model_loaded_on_another_thread_works_here(name, zoo, zoo_stock):
    # Anything left lazy (rope frequencies, say) would fail: mlx's streams belong to the thread that made them.
    with ThreadPoolExecutor(1) as pool:
        model = pool.submit(load_module, zoo[name]).result()
    theirs = zoo_stock[name]
    assert np.abs(logits_of(model) - theirs).max() <= 1e-4 * np.abs(theirs).max()


@pytest.mark.slow
def test_bfloat16_checkpoints_agree(tmp_path):
    names = ["llama", "llama_4bit"]
    models = {n: save_random(tmp_path / n, *ZOO[n], dtype=mx.bfloat16) for n in names}
    widened = stock_logits(models, tmp_path / "float32.npz", float32=True)
    rounded = stock_logits(models, tmp_path / "bfloat16.npz")
    for name, path in models.items():
        kept, widen = our_logits(path), our_logits(path, widen=True)
        for ours in (kept, widen):
            # As above: the stored weights are the same, and all else is float32 on both sides.
            assert np.abs(ours - widened[name]).max() <= 1e-4 * np.abs(widened[name]).max()
        # mlx's CPU kernels add up in bfloat16, 8 bits: K = 256 roundings of 2**-9 / sqrt(3) relative to sums that grow
        # to their size leave sqrt(256 / 2) * 2**-9 / sqrt(3) = 1.3 %; about seven products follow each other: 3.4 %.
        difference, size = kept - rounded[name], rounded[name]
        assert np.sqrt(np.mean(difference**2)) <= 0.05 * np.sqrt(np.mean(size**2))


@pytest.mark.parametrize("name", ["llama", "qwen3_moe_4bit", "qwen2_bias_8bit"])
def test_layers_are_ours_and_still_mlx_layers(name, zoo):
    with open_checkpoint(zoo[name]) as checkpoint:
        parameter_map = ParameterMap(checkpoint)
        layers.install_layers(parameter_map.model, parameter_map.tensors)
        switch = import_private("models.switch_layers")
        for path, module in parameter_map.model.named_modules():
            info = parameter_map.tensors.get(f"{path}.weight")
            if info is None or info.module == "other":
                continue
            assert type(module).__module__ == layers.__name__
            float_kind = {"linear": nn.Linear, "embedding": nn.Embedding, "switch": switch.SwitchLinear}
            quantized_kind = {
                "linear": nn.QuantizedLinear,
                "embedding": nn.QuantizedEmbedding,
                "switch": switch.QuantizedSwitchLinear,
            }
            assert isinstance(module, (float_kind if info.spec is None else quantized_kind)[info.module])
            assert ("bias" in module) == (f"{path}.bias" in parameter_map.tensors)


def test_installing_layers_allocates_nothing():
    # Two matrices of 1.6 GB in float32; if mlx's random initialization were evaluated, memory would grow by that.
    config = ZOO["llama"][0] | {"vocab_size": 200_000, "hidden_size": 2048, "num_attention_heads": 16}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = build_model(config)
    spec = QuantSpec(4, 64)
    shape = (200_000, 2048)
    head = TensorInfo("lm_head.weight", shape, "AFFINE", 1, spec, "BF16", "linear")
    embedding = TensorInfo("model.embed_tokens.weight", shape, "BF16", 1, None, None, "embedding")
    layers.install_layers(model, {head.name: head, embedding.name: embedding})
    assert isinstance(model.lm_head, layers.QuantizedLinear)
    assert model.lm_head.weight.shape == (200_000, 2048 * 4 // 32)
    assert model.lm_head.scales.shape == model.lm_head.biases.shape == (200_000, 32)
    assert type(model.model.embed_tokens) is layers.Embedding
    unit = 1 if sys.platform == "darwin" else 1024
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit < 100e6


def test_one_block_at_a_time_is_the_same_as_the_whole(zoo):
    path = zoo["llama_4bit"]
    with open_checkpoint(path) as checkpoint:
        whole, parts = ParameterMap(checkpoint), ParameterMap(checkpoint)
        for parameter_map in (whole, parts):
            layers.install_layers(parameter_map.model, parameter_map.tensors)
        total = weights.load_parameters(whole.model, "", whole, compute_dtype=mx.float32)
        inner, h, held = parts.model.model, mx.array([PROMPT]), 0
        names = ["embed_tokens", *(f"layers.{i}" for i in range(len(inner.layers))), "norm"]
        for name in names:
            module = inner.layers[int(name[7:])] if name.startswith("layers.") else inner[name]
            held += weights.load_parameters(module, f"model.{name}", parts, compute_dtype=mx.float32)
            h = module(h, "causal") if name.startswith("layers.") else module(h)
            mx.eval(h)
            weights.release_parameters(module)
        expected = whole.model.model(mx.array([PROMPT]))
        assert mx.array_equal(h, expected)
        held += weights.load_parameters(parts.model.lm_head, "lm_head", parts, compute_dtype=mx.float32)
        assert held == total
        assert mx.array_equal(parts.model.lm_head(h), whole.model.lm_head(expected))


def test_dtypes_on_the_cpu(tmp_path):
    path = save_random(tmp_path / "m", *ZOO["llama"], dtype=mx.bfloat16)
    with open_checkpoint(path) as checkpoint:
        for widen, matrices in ((False, mx.bfloat16), (True, mx.float32)):
            parameter_map = ParameterMap(checkpoint)
            model = parameter_map.model
            layers.install_layers(model, parameter_map.tensors)
            weights.load_parameters(model, "", parameter_map, compute_dtype=mx.float32, widen=widen)
            assert model.lm_head.weight.dtype == model.model.layers[0].mlp.up_proj.weight.dtype == matrices
            # Its rows are only looked up: nothing would be gained.
            assert model.model.embed_tokens.weight.dtype == mx.bfloat16
            assert model.model.norm.weight.dtype == mx.float32
            assert model(mx.array([PROMPT])).dtype == mx.float32


@pytest.mark.parametrize("compute_dtype", [None, mx.float32], ids=str)
def test_floats_read_in_parts_are_those_read_at_once(tmp_path, monkeypatch, compute_dtype):
    path = save_random(tmp_path / "m", *ZOO["llama"], dtype=mx.bfloat16)

    def loaded():
        with open_checkpoint(path) as checkpoint:
            parameter_map = ParameterMap(checkpoint)
            model = parameter_map.model
            layers.install_layers(model, parameter_map.tensors)
            weights.load_parameters(model, "", parameter_map, compute_dtype=compute_dtype, widen=True)
            return dict(tree_flatten(model.parameters()))

    whole = loaded()
    rows = whole["lm_head.weight"].shape[0]
    # Neither one row at a time nor a divisor of the number of rows.
    monkeypatch.setattr(weights, "_CHUNK", whole["lm_head.weight"].size // rows * (rows // 3 + 1))
    for name, parts in loaded().items():
        assert parts.dtype == whole[name].dtype
        assert mx.array_equal(parts, whole[name]), name


def test_a_part_that_the_checkpoint_lacks_is_named(zoo):
    with open_checkpoint(zoo["llama"]) as checkpoint:
        parameter_map = ParameterMap(checkpoint)
        del parameter_map.tensors["model.norm.weight"]
        with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
            weights.load_parameters(parameter_map.model, "", parameter_map, compute_dtype=mx.float32)


def test_loading_reports_and_can_be_cancelled(zoo):
    cancel, events = CancelToken(), []

    def progress(event):
        events.append(event)
        if event.done == 3:
            cancel.cancel()

    with open_checkpoint(zoo["llama"]) as checkpoint:
        parameter_map = ParameterMap(checkpoint)
        with pytest.raises(Cancelled):
            weights.load_parameters(
                parameter_map.model, "", parameter_map, compute_dtype=None, progress=progress, cancel=cancel
            )
        assert [(e.stage, e.unit, e.done) for e in events] == [("load", "tensors", i) for i in (1, 2, 3)]
        assert events[0].total == len(parameter_map.tensors)
