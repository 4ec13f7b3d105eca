"""Hidden states that leave a model run block by block, and a model that goes on from them."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
import tiny

from mlxq.architectures.parameters import ParameterMap
from mlxq.checkpoint.source import open_checkpoint
from mlxq.runtime.blocks import StreamedModel

SEQUENCES = [[5, 9, 40, 3], [7, 7, 120, 31, 2, 60]]


@pytest.fixture(scope="module")
def parameters(tmp_path_factory: pytest.TempPathFactory) -> ParameterMap:
    path = tiny.make_model(tmp_path_factory.mktemp("m") / "m")
    with open_checkpoint(path) as checkpoint:
        yield ParameterMap(checkpoint)


def test_a_resumed_model_gives_the_same_logits(parameters: ParameterMap) -> None:
    rows = np.array([1, 3, 4, 9])
    with StreamedModel(parameters) as model:
        model.run(SEQUENCES)
        hidden, trunk = model.states(rows)
        expected = model.logits(rows)
    assert hidden.shape == (4, tiny.LLAMA["hidden_size"])
    with StreamedModel(parameters) as model:
        model.resume(hidden, trunk)
        assert np.array_equal(model.logits(np.arange(4)), expected)
        # One row is another product.
        np.testing.assert_allclose(model.logits(np.array([2])), expected[2:3], rtol=1e-4, atol=1e-5)


def test_the_output_of_every_block_is_seen(parameters: ParameterMap) -> None:
    seen: list[tuple[int, tuple[int, ...]]] = []
    last: list[mx.array] = []

    def on_output(index: int, output: mx.array) -> None:
        seen.append((index, output.shape))
        last[:] = [output]

    with StreamedModel(parameters) as model:
        model.run(SEQUENCES, on_output=on_output)
        whole, _ = model.states(np.arange(10))
    assert seen == [(0, (2, 6, 128)), (1, (2, 6, 128))]
    # The trunk ends in a norm: the last block's output, scaled by row.
    raw = np.concatenate([np.array(last[0][0, :4]), np.array(last[0][1])])
    weight = parameters.read("model.norm.weight").astype(np.uint32) << 16
    normed = raw / np.sqrt((raw**2).mean(axis=1, keepdims=True) + 1e-5) * weight.view(np.float32)
    np.testing.assert_allclose(whole, normed, rtol=1e-4, atol=1e-5)


def test_a_module_that_is_not_there_is_refused(parameters: ParameterMap) -> None:
    with StreamedModel(parameters) as model, pytest.raises(ValueError, match="left module 3"):
        model.resume(np.zeros((1, 128), np.float32), 3)
