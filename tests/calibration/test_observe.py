"""Statistics of inputs and gradients are those that a direct computation on the whole model gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from architecture_zoo import CONFIGS, config_of, save
from whole_models import whole_model

from mlxq.architectures.parameters import ParameterMap
from mlxq.calibration import sensitivity
from mlxq.calibration import stream as stream_module
from mlxq.calibration.observe import Observations, observing
from mlxq.calibration.stream import Activations, Block, BlockStream
from mlxq.checkpoint.source import open_checkpoint
from mlxq.errors import CalibrationError

SEQUENCES = np.random.default_rng(5).integers(0, 101, (5, 13)).astype(np.int32)
#: Relative; float32 sums of some hundred terms in another order.
TOLERANCE = 1e-4


@pytest.fixture
def parameters(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[ParameterMap]:
    name, changes = getattr(request, "param", ("llama", {}))
    with open_checkpoint(save(tmp_path / "m", config_of(name) | changes)) as checkpoint:
        yield ParameterMap(checkpoint)


def matrices(parameters: ParameterMap) -> Callable[[str], list[str]]:
    names = [n for n, i in parameters.tensors.items() if i.module in ("linear", "switch", "embedding")]
    return lambda path: [n for n in names if n.startswith(f"{path}.")]


def layer_of(model: Any, name: str) -> Any:
    for part in name.removesuffix(".weight").split("."):
        model = model[int(part)] if isinstance(model, list) else model[part]
    return model


def observed(parameters: ParameterMap, monkeypatch: pytest.MonkeyPatch) -> Observations:
    """Of all blocks and the head, two sequences a chunk."""
    monkeypatch.setattr(stream_module, "_CHUNK_BYTES", 2 * 13 * 64 * 4)
    found, names_of = Observations(), matrices(parameters)
    with BlockStream(parameters, SEQUENCES) as stream:
        stream.embed()

        def visit(block: Block, activations: Activations) -> None:
            with observing(block.module, block.path, names_of(block.path), found):
                for i, hidden in enumerate(activations):
                    activations[i] = block(hidden)

        stream.run(visit)
        head = stream.inputs_of_head(names_of)
    found.order += head.order
    found.moments |= head.moments
    return found


def inputs_of(model: nn.Module, names: list[str]) -> dict[str, list[tuple[Any, ...]]]:
    """Arguments of every call of layers of a whole model, by name."""
    seen: dict[str, list[tuple[Any, ...]]] = {name: [] for name in names}
    for name in names:
        layer = layer_of(model, name)
        kind = type(layer)

        def call(self: Any, *args: Any, name: str = name, kind: type = kind, **kwargs: Any) -> Any:
            seen[name].append(args)
            return kind.__call__(self, *args, **kwargs)

        layer.__class__ = type("Seen", (kind,), {"__call__": call})
    mx.eval(model(mx.array(SEQUENCES)))
    return seen


def close(a: np.ndarray, b: np.ndarray) -> bool:
    return bool(np.abs(np.asarray(a, np.float64) - b).max() <= TOLERANCE * np.abs(b).max())


def test_moments_are_those_of_the_inputs(parameters: ParameterMap, monkeypatch: pytest.MonkeyPatch) -> None:
    found = observed(parameters, monkeypatch)
    names = [n for n in parameters.tensors if n.endswith("proj.weight")] + ["lm_head.weight"]
    assert sorted(found.order) == sorted(names)
    for name, calls in inputs_of(whole_model(parameters), names).items():
        x = np.concatenate([np.array(args[0]).reshape(-1, args[0].shape[-1]) for args in calls])
        moments = found.moments[name]
        assert moments.counts.tolist() == [SEQUENCES.size] == [len(x)]
        assert close(moments.hessian(), x.T @ x / len(x)), name
        assert close(moments.mean_squares(), (x**2).mean(axis=0))


def test_matrices_with_one_input_share_a_record(parameters: ParameterMap, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = [[n.split(".")[-2] for n in g] for g in observed(parameters, monkeypatch).by_input()]
    block = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    assert [sorted(g) for g in groups] == [sorted(g) for g in block * 4] + [["lm_head"]]


@pytest.mark.parametrize("parameters", [("llama_tied", {})], indirect=True)
def test_a_tied_embedding_counts_what_goes_into_the_head(
    parameters: ParameterMap, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = observed(parameters, monkeypatch)
    model = whole_model(parameters)
    x = np.array(model.model(mx.array(SEQUENCES))).reshape(-1, 64)
    assert found.order[-1] == "model.embed_tokens.weight"
    assert close(found.moments["model.embed_tokens.weight"].hessian(), x.T @ x / len(x))


@pytest.mark.parametrize(
    "parameters", [("mixtral", {}), ("mixtral", {"num_local_experts": 8, "num_experts_per_tok": 1})], indirect=True
)
def test_experts_have_their_own_rows(parameters: ParameterMap, monkeypatch: pytest.MonkeyPatch) -> None:
    found = observed(parameters, monkeypatch)
    names = [n for n, i in parameters.tensors.items() if i.module == "switch"]
    assert names
    for name, calls in inputs_of(whole_model(parameters), names).items():
        moments, n_experts = found.moments[name], parameters.tensors[name].shape[0]
        rows: list[list[np.ndarray]] = [[] for _ in range(n_experts)]
        for x, indices, *_ in calls:
            # A row of x `[..., k or 1, 1, K]` goes to each expert of its indices `[..., k]`.
            x, indices = np.array(x), np.array(indices)
            wide = np.broadcast_to(x, (*indices.shape, 1, x.shape[-1])).reshape(-1, x.shape[-1])
            for row, expert in zip(wide, indices.ravel(), strict=True):
                rows[expert].append(row)
        assert moments.counts.tolist() == [len(r) for r in rows]
        for expert, some in enumerate(rows):
            x = np.array(some) if some else np.zeros((1, moments.total.shape[-1]))
            assert np.allclose(moments.hessian(expert), x.T @ x / len(x), atol=TOLERANCE * np.abs(x).max() ** 2), name
    assert "model.layers.0.block_sparse_moe.gate.weight" in found.order


def test_what_is_observed_is_left_as_it_was(parameters: ParameterMap) -> None:
    model = whole_model(parameters)
    block = model.model.layers[0]
    before = dict(block.self_attn.items()), dict(block.mlp.items())
    hidden = mx.random.normal((1, 4, 64))
    plain = block(hidden, None, None)
    seen = Observations()
    with observing(block, "model.layers.0", matrices(parameters)("model.layers.0"), seen):
        watched = block(hidden, None, None)
    assert mx.array_equal(plain, watched)
    after = dict(block.self_attn.items()), dict(block.mlp.items())
    assert all(a[k] is b[k] for a, b in zip(before, after, strict=True) for k in a)


def log_likelihood(model: nn.Module, drawn: mx.array) -> mx.array:
    logits = model(mx.array(SEQUENCES))
    logp = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    return mx.take_along_axis(logp, drawn[..., None], axis=-1).sum()


ALL = [(n, {}) if n == "gemma3_text" else pytest.param((n, {}), marks=pytest.mark.slow) for n in CONFIGS]


@pytest.mark.parametrize("parameters", ALL, indirect=True)
def test_gradients_come_back_to_every_matrix_that_has_an_input(parameters: ParameterMap) -> None:
    names: list[str] = []
    with BlockStream(parameters, SEQUENCES) as stream:
        found = sensitivity.measure(stream, matrices(parameters), on_inputs=lambda seen: names.extend(seen.order))
    assert found.squares.keys() == set(names)
    assert all((s > 0).any() for s in found.squares.values())


@pytest.mark.parametrize(
    "parameters", [("llama", {}), ("llama_tied", {}), ("gemma3_text", {"num_hidden_layers": 2})], indirect=True
)
def test_squared_gradients_are_the_whole_models(parameters: ParameterMap, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of the log likelihood of drawn tokens at each output: by mx.grad with an offset added there."""
    monkeypatch.setattr(stream_module, "_CHUNK_BYTES", 2 * 13 * 64 * 4)
    drawn = np.random.default_rng(3).integers(0, 101, SEQUENCES.shape)
    at = iter(range(len(SEQUENCES)))

    def gradient(logits: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        p = np.exp(logits - logits.max(axis=-1, keepdims=True))
        start = next(at)
        onehot = np.eye(101, dtype=np.float32)[drawn[start : start + len(logits)]]
        return onehot - p / p.sum(axis=-1, keepdims=True)

    monkeypatch.setattr(sensitivity, "_drawn_gradient", gradient)
    with BlockStream(parameters, SEQUENCES) as stream:
        found = sensitivity.measure(stream, matrices(parameters))
    assert found.n_tokens == SEQUENCES.size
    model = whole_model(parameters)
    names = [n for n in parameters.tensors if n.split(".")[-2] in ("q_proj", "v_proj", "down_proj", "lm_head")]
    for name in names[:4] + names[-1:]:
        layer = layer_of(model, name)
        kind = type(layer)

        def along(offset: mx.array, layer: Any = layer, kind: type = kind) -> mx.array:
            layer.__class__ = type("Moved", (kind,), {"__call__": lambda self, x: kind.__call__(self, x) + offset})
            try:
                return log_likelihood(model, mx.array(drawn))
            finally:
                layer.__class__ = kind

        g = np.array(mx.grad(along)(mx.zeros((*SEQUENCES.shape, layer.weight.shape[0]))), np.float64)
        g = g.reshape(-1, g.shape[-1])
        assert close(found.squares[name], (g**2).mean(axis=0)), name
    assert all(np.isfinite(s).all() and (s >= 0).all() for s in found.squares.values())


def test_tokens_are_drawn_from_the_models_predictions() -> None:
    rng = np.random.default_rng(0)
    logits = np.log(np.array([0.6, 0.3, 0.1], np.float32)) + 7
    d = sensitivity._drawn_gradient(np.tile(logits, (30, 1000, 1)), rng).reshape(-1, 3)
    assert np.allclose(d.sum(axis=1), 0, atol=1e-6)
    share = (d > 0).mean(axis=0)
    # Thirty thousand draws: a standard error of 0.003.
    assert np.allclose(share, [0.6, 0.3, 0.1], atol=0.012)


@pytest.mark.slow
def test_predicted_divergence_is_near_the_measured(parameters: ParameterMap) -> None:
    """Of a small random change of one matrix: half the sum of squared gradients times squared output errors."""
    sequences = np.random.default_rng(0).integers(0, 101, (24, 32)).astype(np.int32)
    inputs = Observations()

    def keep(seen: Observations) -> None:
        inputs.moments.update(seen.moments)

    with BlockStream(parameters, sequences) as stream:
        found = sensitivity.measure(stream, matrices(parameters), on_inputs=keep)
    model = whole_model(parameters)

    def log_p() -> np.ndarray:
        logits = np.array(model(mx.array(sequences)), np.float64)
        return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))

    p = log_p()
    rng = np.random.default_rng(1)
    for name in ("model.layers.0.self_attn.v_proj.weight", "model.layers.2.mlp.down_proj.weight", "lm_head.weight"):
        layer = layer_of(model, name)
        w = layer.weight
        change = (0.02 * rng.standard_normal(w.shape)).astype(np.float32)
        layer.weight = w + mx.array(change)
        q = log_p()
        layer.weight = w
        measured = float((np.exp(p) * (p - q)).sum(axis=-1).mean())
        errors = np.einsum("nk,nk->n", change @ inputs.moments[name].hessian(), change)
        predicted = 0.5 * float(found.squares[name] @ errors)
        # Rows, tokens, inputs and gradients are taken as independent, and one token is drawn for each prediction.
        assert 0.4 < predicted / measured < 2.5, (name, predicted, measured)


def test_models_that_run_whole_have_no_sensitivity(parameters: ParameterMap, monkeypatch: pytest.MonkeyPatch) -> None:
    new_model = parameters.new_model

    def tied() -> nn.Module:
        model = new_model()
        model.model.layers[1].mlp = model.model.layers[0].mlp
        return model

    monkeypatch.setattr(parameters, "new_model", tied)
    with BlockStream(parameters, SEQUENCES) as stream, pytest.raises(CalibrationError, match="share modules"):
        sensitivity.measure(stream, matrices(parameters))
