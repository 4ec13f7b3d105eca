"""What a calibration sees of a model block by block is what the whole model computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from architecture_zoo import CONFIGS, config_of, save
from whole_models import whole_model

from mlxq.architectures.parameters import ParameterMap
from mlxq.calibration import stream as stream_module
from mlxq.calibration.stream import Activations, Block, BlockStream
from mlxq.checkpoint.source import open_checkpoint
from mlxq.errors import CalibrationError

#: Longer than the sliding windows of 8; ids of a vocabulary of 101.
SEQUENCES = np.random.default_rng(5).integers(0, 101, (5, 13)).astype(np.int32)


def through(block: Block, activations: Activations) -> None:
    for i, hidden in enumerate(activations):
        activations[i] = block(hidden)


def outputs_of_blocks(model: nn.Module, tokens: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """What each block of a whole model gives, and its logits."""
    seen: list[np.ndarray] = []
    layers = model.layers

    class Recorded(type(layers[0])):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            out = super().__call__(*args, **kwargs)
            seen.append(np.array(out))
            return out

    for layer in layers:
        layer.__class__ = (
            type("Recorded", (Recorded, type(layer)), {}) if type(layer) is not type(layers[0]) else Recorded
        )
    logits = np.array(model(mx.array(tokens)))
    return seen, logits


def close(a: np.ndarray, b: np.ndarray) -> bool:
    # The same float32 products in chunks of other sizes: sums of up to 128 terms in another order.
    return bool(np.abs(a - b).max() < 1e-4 * np.abs(b).max())


#: The rest of them are left to the full run.
QUICK = ("llama_tied", "gemma3_text", "mixtral", "gpt2", "cohere2")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CONFIGS])
def test_hidden_states_and_logits_are_the_whole_models(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two sequences a chunk: the last chunk of five is smaller.
    monkeypatch.setattr(stream_module, "_CHUNK_BYTES", 2 * 13 * 64 * 4)
    with open_checkpoint(save(tmp_path / "m", config_of(name))) as checkpoint:
        parameters = ParameterMap(checkpoint)
        states, logits = outputs_of_blocks(whole_model(parameters), SEQUENCES)
        with BlockStream(parameters, SEQUENCES) as stream:
            assert stream.whole is None
            stream.embed()
            assert [c.stop - c.start for c in stream.activations.chunks] == [2, 2, 1]
            seen = []

            def visit(block: Block, activations: Activations) -> None:
                through(block, activations)
                seen.append((block.index, np.concatenate([np.array(a) for a in activations])))

            stream.run(visit)
            assert [i for i, _ in seen] == list(range(stream.n_blocks))
            assert len(states) == stream.n_blocks
            for (_, mine), theirs in zip(seen, states, strict=True):
                assert close(mine, theirs)
            assert close(np.concatenate([np.array(stream.logits(i)) for i in range(3)]), logits)


def test_on_disk_equals_in_memory_to_the_bit(tmp_path: Path) -> None:
    with open_checkpoint(save(tmp_path / "m", config_of("gemma2"))) as checkpoint:
        parameters = ParameterMap(checkpoint)
        found = []
        for on_disk in (False, True):
            with BlockStream(parameters, SEQUENCES, on_disk=on_disk) as stream:
                stream.embed()
                stream.run(through)
                found.append(np.array(stream.activations[0]))
    assert np.array_equal(*found)


def test_activations_on_disk_keep_their_dtype() -> None:
    hidden = mx.random.normal((2, 3, 4)).astype(mx.bfloat16)
    for on_disk in (False, True):
        activations = Activations(2, 1, on_disk=on_disk)
        for i in range(2):
            activations[i] = hidden[i : i + 1]
        copied = activations.copy()
        activations[0] = mx.zeros_like(hidden[:1])
        assert mx.array_equal(mx.concatenate(list(copied)), hidden)
        assert copied[0].dtype == mx.bfloat16


def run_of(path: Path, change: Any, monkeypatch: pytest.MonkeyPatch) -> BlockStream:
    """A stream of a model that `change` was made to before it is taken apart."""
    with open_checkpoint(path) as checkpoint:
        parameters = ParameterMap(checkpoint)
        new_model = parameters.new_model

        def changed() -> nn.Module:
            model = new_model()
            change(model)
            return model

        monkeypatch.setattr(parameters, "new_model", changed)
        stream = BlockStream(parameters, SEQUENCES)
        stream.embed()
        visited: list[str] = []

        def visit(block: Block, activations: Activations) -> None:
            through(block, activations)
            visited.append(block.path)

        stream.run(visit)
        assert visited == [""] if stream.whole else len(visited) == 4
        return stream


def subclassed(module: nn.Module, call: Any) -> None:
    module.__class__ = type("Changed", (type(module),), {"__call__": call})


def scaled_between(self: Any, tokens: mx.array, *_: Any) -> mx.array:
    h = self.embed_tokens(tokens)
    for layer in self.layers:
        h = layer(h * 1.5, "causal", None)
    return self.norm(h)


def skipping(self: Any, tokens: mx.array, *_: Any) -> mx.array:
    h = first = self.embed_tokens(tokens)
    for layer in self.layers:
        h = layer(h, "causal", None)
    return self.norm(h + first)


def twice(self: Any, tokens: mx.array, *_: Any) -> mx.array:
    h = self.embed_tokens(tokens)
    for layer in [*self.layers, *self.layers]:
        h = layer(h, "causal", None)
    return self.norm(h)


def some(self: Any, tokens: mx.array, *_: Any) -> mx.array:
    h = self.embed_tokens(tokens)
    for layer in self.layers[:-1]:
        h = layer(h, "causal", None)
    return self.norm(h)


def given_text(self: Any, tokens: mx.array, *_: Any) -> mx.array:
    h = self.embed_tokens(tokens)
    mask = (tokens[:, None, None] % 7 < 5) & mx.tril(mx.ones((tokens.shape[1],) * 2, mx.bool_))
    for layer in self.layers:
        h = layer(h, mask, None)
    return self.norm(h)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (scaled_between, "its hidden states are changed before block 1"),
        (skipping, "its head looks at more than what its last block gives"),
        (twice, "its blocks are not called in order, once each"),
        (some, "its forward pass calls 3 of its 4 blocks"),
        (given_text, "block 0 is given more of the text than the hidden states"),
    ],
)
def test_models_that_connect_blocks_in_other_ways_run_whole(
    call: Any, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path / "m", config_of("llama"))
    stream = run_of(path, lambda model: subclassed(model.model, call), monkeypatch)
    assert stream.whole == reason
    assert stream.n_blocks == 1
    assert stream.parts == []


def test_blocks_that_give_more_than_hidden_states_run_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(model: nn.Module) -> None:
        for layer in model.model.layers:
            kind = type(layer)
            subclassed(layer, lambda self, *a, kind=kind, **k: (kind.__call__(self, *a, **k), None))

        def call(self: Any, tokens: mx.array, *_: Any) -> mx.array:
            h = self.embed_tokens(tokens)
            for layer in self.layers:
                given = layer(h, "causal", None)
                h = given[0] if isinstance(given, tuple) else given
            return self.norm(h)

        subclassed(model.model, call)

    stream = run_of(save(tmp_path / "m", config_of("llama")), change, monkeypatch)
    assert stream.whole == "model.layers.0 does not give one array of hidden states"


def test_a_whole_model_that_overflows_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def overflow(model: nn.Module) -> None:
        subclassed(model.model, lambda self, tokens, *a, **k: self.norm(self.embed_tokens(tokens)) * mx.inf)

    with pytest.raises(CalibrationError, match="logits are not finite"):
        run_of(save(tmp_path / "m", config_of("llama")), overflow, monkeypatch)


def test_blocks_are_held_one_at_a_time(tmp_path: Path) -> None:
    config = config_of("llama") | {"num_hidden_layers": 8, "hidden_size": 128}
    with open_checkpoint(save(tmp_path / "m", config)) as checkpoint:
        parameters = ParameterMap(checkpoint)
        size = 4 * sum(t.size for n, t in parameters.tensors.items() if n.startswith("model.layers.0."))
        before, held = mx.get_active_memory(), []
        with BlockStream(parameters, SEQUENCES) as stream:
            stream.embed()

            def visit(block: Block, activations: Activations) -> None:
                through(block, activations)
                held.append(mx.get_active_memory() - before)

            stream.run(visit)
        assert len(held) == 8
        assert max(held) < 1.2 * size
