"""Block by block is the same computation: logits equal those of the whole model, for many architectures."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from architecture_zoo import BASE, CONFIGS, config_of, save
from mlx.utils import tree_flatten

from mlxq.architectures.parameters import ParameterMap
from mlxq.checkpoint.source import open_checkpoint
from mlxq.errors import OutputError
from mlxq.runtime import block_layout, spool
from mlxq.runtime.block_layout import NotStreamable
from mlxq.runtime.blocks import StreamedModel
from mlxq.runtime.layers import install_layers
from mlxq.runtime.weights import load_parameters

SEQUENCES = [[5, 17, 3, 99, 42, 8, 61, 7, 12, 90, 33, 2, 58], [9, 9, 1], [77, 20, 6, 4, 15, 31, 64]]


def whole_logits(path: Path) -> np.ndarray:
    """Every sequence on its own through the whole model."""
    with open_checkpoint(path) as checkpoint:
        parameter_map = ParameterMap(checkpoint)
        model = parameter_map.model
        install_layers(model, parameter_map.tensors)
        load_parameters(model, "", parameter_map, compute_dtype=mx.float32)
    return np.concatenate([np.array(model(mx.array([ids])).astype(mx.float32))[0] for ids in SEQUENCES])


def assert_same(path: Path) -> StreamedModel:
    expected = whole_logits(path)
    with open_checkpoint(path) as checkpoint, StreamedModel(ParameterMap(checkpoint)) as streamed:
        done: list[tuple[int, int]] = []
        n = streamed.run(SEQUENCES, lambda *event: done.append(event))
        assert n == len(expected) == sum(map(len, SEQUENCES))
        rows = np.arange(n)
        logits = np.concatenate([streamed.logits(part) for part in (rows[:10], rows[10:11], rows[11:])])
        assert done == [(i + 1, streamed.n_blocks) for i in range(streamed.n_blocks)]
        again = streamed.logits(rows[::-1])[::-1]
    # The same float32 products over padded batches: sums of up to 128 terms may be ordered differently, some 1e-5 of
    # the largest logit over four blocks. A block that is missed or run with another's weights changes it by its size.
    tolerance = 1e-4 * np.abs(expected).max()
    assert np.abs(logits - expected).max() < tolerance
    assert np.abs(again - expected).max() < tolerance
    return streamed


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_the_whole_models(name: str, tmp_path: Path) -> None:
    streamed = assert_same(save(tmp_path / "m", config_of(name)))
    assert streamed.whole is None, streamed.whole


@pytest.mark.parametrize("name", ["llama", "llama_tied", "mixtral", "gemma2"])
def test_quantized_and_with_numpy(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLXQ_BACKEND", "numpy")
    streamed = assert_same(save(tmp_path / "m", config_of(name), bits=4))
    assert streamed.whole is None


def test_only_one_block_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every load finds the parameters of all other blocks released."""
    held: set[str] = set()
    most: list[set[str]] = []
    load, release = block_layout.load_parameters, block_layout.release_parameters
    names: dict[int, str] = {}

    def loading(module: Any, prefix: str, *args: Any, **kwargs: Any) -> int:
        names[id(module)] = prefix
        held.add(prefix)
        most.append(set(held))
        return load(module, prefix, *args, **kwargs)

    def releasing(module: Any) -> None:
        held.discard(names[id(module)])
        release(module)
        for _, a in tree_flatten(module.parameters()):
            assert not a.size or np.array(a).max() == 0, "a released parameter still has its values"

    monkeypatch.setattr(block_layout, "load_parameters", loading)
    monkeypatch.setattr(block_layout, "release_parameters", releasing)
    path = save(tmp_path / "m", config_of("llama"))
    with open_checkpoint(path) as checkpoint, StreamedModel(ParameterMap(checkpoint)) as streamed:
        streamed.run(SEQUENCES)
        assert held == set(), "nothing is held between trunk and head"
        streamed.logits(np.arange(3))
        assert held == {"lm_head"}, "the head needs no embedding"
    assert not held
    assert all(sum(".layers." in n for n in s) <= 1 for s in most)
    assert max(len(s) for s in most) == 2, "a block and the embedding, or norm and embedding"
    assert {n for s in most for n in s} >= {f"model.layers.{i}" for i in range(4)}


def test_memory_does_not_grow_with_the_blocks(tmp_path: Path) -> None:
    """By mlx's own count of bytes in use, which finds arrays that something else still holds."""
    path = save(tmp_path / "m", {**config_of("llama"), "num_hidden_layers": 12, "hidden_size": 128})
    held: list[int] = []
    with open_checkpoint(path) as checkpoint:
        parameter_map = ParameterMap(checkpoint)
        block = sum(t.size for n, t in parameter_map.tensors.items() if n.startswith("model.layers.0."))
        before = mx.get_active_memory()
        with StreamedModel(parameter_map) as streamed:
            streamed.run(SEQUENCES, lambda done, total: held.append(mx.get_active_memory() - before))
            streamed.logits(np.arange(3))
        after = mx.get_active_memory() - before
    assert len(held) == 12
    # Each block takes its 4 bytes a weight while it runs; a tenth of one is room for activations.
    assert held[-1] - held[0] < 0.1 * 4 * block
    assert after < 0.1 * 4 * block


def test_a_model_without_a_trunk_is_run_whole_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "m", config_of("llama"))

    def unfit(model: nn.Module) -> str:
        raise NotStreamable("it has no list of blocks")

    monkeypatch.setattr(block_layout, "_path_of_blocks", unfit)
    assert assert_same(path).whole == "it has no list of blocks"


@pytest.mark.parametrize("allocates", [True, False])
def test_logits_that_the_disk_has_no_room_for(monkeypatch: pytest.MonkeyPatch, allocates: bool) -> None:
    """Found out before anything is written through a map, where it would end the process."""
    if not allocates:
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
    elif not hasattr(os, "posix_fallocate"):
        pytest.skip("this system has no posix_fallocate")
    waiting = spool.spool((3, 1 << 20), "the logits of the text")
    waiting[:] = 1.0
    assert waiting.sum(dtype=np.float64) == 3 << 20

    class Full:
        def __enter__(self) -> Full:
            return self

        def write(self, _: bytes) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        def __exit__(self, *_: object) -> None: ...

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if allocates:
        monkeypatch.setattr(os, "posix_fallocate", full)
    else:
        monkeypatch.setattr(spool.tempfile, "TemporaryFile", Full)
    with pytest.raises(OutputError, match=r"4 MB for the logits .* No space left on device; make room"):
        spool.spool((1, 1 << 20), "the logits of the text")


def test_shared_modules_are_run_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "m", config_of("llama"))

    with open_checkpoint(path) as checkpoint:
        parameter_map = ParameterMap(checkpoint)
        model = parameter_map.new_model()
        model.model.layers[1].mlp = model.model.layers[0].mlp
        monkeypatch.setattr(parameter_map, "new_model", lambda: model)
        assert "share" in (StreamedModel(parameter_map).whole or "")


def test_a_head_that_sanitize_takes_away_is_not_waited_for(tmp_path: Path) -> None:
    """gemma3_text builds a head and drops it when the checkpoint, tied, has none."""
    config = {**BASE, "model_type": "gemma3_text", "sliding_window": 8, "sliding_window_pattern": 2, "head_dim": 16}
    path = save(tmp_path / "m", config)
    weights = mx.load(str(path / "model.safetensors"))
    mx.eval(list(weights.values()))
    del weights["lm_head.weight"]
    mx.save_safetensors(str(path / "model.safetensors"), weights, metadata={"format": "mlx"})
    with open_checkpoint(path) as checkpoint, StreamedModel(ParameterMap(checkpoint)) as streamed:
        n = streamed.run(SEQUENCES)
        assert np.isfinite(streamed.logits(np.arange(n))).all()


def test_the_maps_own_model_is_left_alone(tmp_path: Path) -> None:
    with open_checkpoint(save(tmp_path / "m", config_of("llama"))) as checkpoint:
        parameter_map = ParameterMap(checkpoint)
        before = [type(b) for b in parameter_map.model.layers]
        with StreamedModel(parameter_map) as streamed:
            streamed.run(SEQUENCES)
        assert [type(b) for b in parameter_map.model.layers] == before


def test_logits_before_run_are_refused(tmp_path: Path) -> None:
    with open_checkpoint(save(tmp_path / "m", config_of("llama"))) as checkpoint:
        streamed = StreamedModel(ParameterMap(checkpoint))
        with pytest.raises(ValueError, match="before"):
            streamed.logits(np.arange(1))
