"""Models measured on a text: figures against direct computation, the stored reference, and every kind of bad input."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import gguf_models
import numpy as np
import pytest
import tiny

import mlxq
from mlxq.architectures.parameters import ParameterMap
from mlxq.checkpoint.source import open_checkpoint
from mlxq.conversion import convert
from mlxq.errors import Cancelled, CheckpointError, EvaluationError
from mlxq.evaluate.divergence import score_tokens
from mlxq.evaluate.quality import predictions
from mlxq.evaluate.quality.results import Evaluation
from mlxq.evaluate.quality.text import BUILTIN
from mlxq.runtime.blocks import StreamedModel
from mlxq.types import CancelToken, Progress

TEXT = "".join(chr(97 + i * i % 26) + (" " if i % 7 == 0 else "") for i in range(900))
OPTIONS = {"sequences": 5, "length": 32}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tensors = tiny.random_tensors(tiny.llama_shapes(tiny.LLAMA))
    tensors["lm_head.weight"] *= 4
    return tiny.make_model(tmp_path_factory.mktemp("reference") / "ref", tensors=tensors)


@pytest.fixture(scope="module")
def quantized(reference: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quantized") / "q3"
    convert(reference, out, bits=3, verify=False)
    return out


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def measured(models: list[Path], cache: Path, **options: object) -> Evaluation:
    return mlxq.evaluate_models(models, **{"cache": cache} | OPTIONS | options)


def logits(path: Path, sequences: np.ndarray) -> np.ndarray:
    """Logits `[S, L, V]`, all rows, by the runtime alone."""
    with open_checkpoint(path) as checkpoint, StreamedModel(ParameterMap(checkpoint)) as model:
        n = model.run(sequences.tolist())
        return model.logits(np.arange(n)).reshape(*sequences.shape, -1)


@pytest.mark.parametrize("score", ["second-half", "all"])
def test_figures_equal_the_direct_computation(
    reference: Path, quantized: Path, text: Path, tmp_path: Path, score: str
) -> None:
    found = measured([quantized], tmp_path, reference=reference, text=text, score=score)
    ids = np.frombuffer(TEXT.encode(), np.uint8)[: 5 * 32].reshape(5, 32)
    # The tiny tokenizer numbers bytes in its own order; printable ASCII starts at 0 with "!".
    tokens = np.where(ids == 32, 220, ids.astype(int) - 33)
    first = 16 if score == "second-half" else 1
    a, b = (logits(p, tokens)[:, first - 1 : -1].reshape(-1, 320) for p in (reference, quantized))
    direct = score_tokens(a, b, tokens[:, first:].reshape(-1))
    model = found.models[0]
    assert found.n_tokens == len(direct.kl) == 5 * (32 - first)
    # The same float32 products in batches of other shapes: logits of some units differ by some 1e-6.
    assert model.kl_mean.value == pytest.approx(direct.kl.mean(), rel=1e-4)
    assert model.kl_median.value == pytest.approx(np.sort(direct.kl)[(len(direct.kl) - 1) // 2], rel=1e-3)
    assert model.kl_p99.value == pytest.approx(np.sort(direct.kl)[math.ceil(0.99 * len(direct.kl)) - 1], rel=1e-3)
    assert model.agreement.value == pytest.approx(direct.agree.mean(), abs=0.02)
    assert model.perplexity.value == pytest.approx(math.exp(direct.nll_result.mean()), rel=1e-4)
    assert found.reference.perplexity.value == pytest.approx(math.exp(direct.nll_source.mean()), rel=1e-4)
    assert model.n_flips == len(model.flips) == round((1 - model.agreement.value) * found.n_tokens) > 0
    assert all(e.se > 0 for e in (model.kl_mean, model.kl_median, model.kl_p99, model.agreement, model.perplexity))


def test_a_model_is_no_distance_from_itself(reference: Path, text: Path, tmp_path: Path) -> None:
    model = measured([reference], tmp_path, reference=reference, text=text).models[0]
    assert (model.kl_mean.value, model.kl_p99.value, model.agreement.value, model.n_flips) == (0, 0, 1, 0)
    assert model.block_errors == (0.0, 0.0)


def test_without_a_reference_there_is_perplexity_alone(reference: Path, quantized: Path, text: Path) -> None:
    alone = mlxq.evaluate_model(quantized, text=text, **OPTIONS)
    assert alone.kl_mean is None
    assert alone.agreement is None
    assert alone.to_dict()["kl_mean"] is None
    assert math.isfinite(alone.perplexity.value)


def test_flips_tell_what_stands_in_the_text(reference: Path, quantized: Path, text: Path, tmp_path: Path) -> None:
    model = measured([quantized], tmp_path, reference=reference, text=text).models[0]
    assert list(model.flips) == sorted(model.flips, key=lambda f: -f.kl)
    for flip in model.flips:
        assert flip.before + flip.target + flip.after in TEXT
        assert TEXT[(flip.sequence - 1) * 32 + flip.position - 1] == flip.target
        assert flip.reference.token != flip.model.token
        assert flip.reference.p_reference >= flip.model.p_reference
        assert flip.model.p_model >= flip.reference.p_model


def test_errors_of_blocks_are_those_of_hidden_states(reference: Path, tmp_path: Path, text: Path) -> None:
    """A model whose second block alone is changed has an error there alone."""
    tensors = tiny.random_tensors(tiny.llama_shapes(tiny.LLAMA))
    tensors["lm_head.weight"] *= 4
    tensors["model.layers.1.mlp.down_proj.weight"] = 1.5 * tensors["model.layers.1.mlp.down_proj.weight"]
    changed = tiny.make_model(tmp_path / "changed", tensors=tensors)
    first, second = measured([changed], tmp_path, reference=reference, text=text).models[0].block_errors
    assert first == 0
    assert 0.01 < second < 1


@pytest.mark.slow
def test_a_stored_reference_gives_the_same_figures_without_being_run(
    reference: Path, quantized: Path, text: Path, tmp_path: Path
) -> None:
    items: list[str] = []

    def progress(event: Progress) -> None:
        items.append(event.item)

    run = measured([quantized], tmp_path, reference=reference, text=text, progress=progress)
    assert not run.cached
    assert any(i.startswith("reference, block") for i in items)
    items.clear()
    stored = measured([quantized], tmp_path, reference=reference, text=text, progress=progress)
    assert stored.cached
    assert not any(i.startswith("reference, block") for i in items)
    assert stored == run, "bit for bit: the head computes from the same hidden states"
    assert not measured([quantized], tmp_path, reference=reference, text=text, use_cache=False).cached


@pytest.mark.parametrize("damage", ["cut", "bit", "empty", "foreign"])
def test_a_damaged_file_is_made_anew(reference: Path, quantized: Path, text: Path, tmp_path: Path, damage: str) -> None:
    run = measured([quantized], tmp_path, reference=reference, text=text)
    (file,) = tmp_path.glob("reference-*.npz")
    whole = file.read_bytes()
    if damage == "foreign":
        np.savez(file, hidden=np.zeros((3, 7), np.float32), trunk=np.array(0))
    else:
        middle = bytearray(whole)
        middle[len(whole) // 3] ^= 64
        file.write_bytes({"cut": whole[:-200], "bit": bytes(middle), "empty": b""}[damage])
    again = measured([quantized], tmp_path, reference=reference, text=text)
    assert not again.cached
    assert again == run
    assert measured([quantized], tmp_path, reference=reference, text=text).cached
    assert [p.name for p in tmp_path.iterdir()] == [file.name]


@pytest.mark.slow
def test_what_is_stored_is_of_one_reference_text_and_choice_of_tokens(
    reference: Path, quantized: Path, text: Path, tmp_path: Path
) -> None:
    options = {"reference": reference, "text": text}
    measured([quantized], tmp_path, **options)
    for other in ({"score": "all"}, {"length": 31}, {"sequences": 4}, {"from_end": True}, {"reference": quantized}):
        assert not measured([quantized], tmp_path, **options | other).cached
    assert len(list(tmp_path.glob("reference-*.npz"))) == 6


def test_a_cache_that_cannot_be_written_is_said(reference: Path, quantized: Path, text: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    found = measured([quantized], blocked, reference=reference, text=text)
    assert any("was not kept" in note and str(blocked) in note for note in found.notes)


@pytest.mark.slow
def test_passes_over_the_blocks_change_nothing(
    reference: Path, quantized: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = measured([quantized], tmp_path / "a", reference=reference, text=text)
    monkeypatch.setattr(predictions, "_PASS_BYTES", 4 * 256 * 32 * 2)
    parts = measured([quantized], tmp_path / "b", reference=reference, text=text)
    # Products of other shapes: equal but for float32 rounding.
    assert parts.models[0].kl_mean.value == pytest.approx(whole.models[0].kl_mean.value, rel=1e-4)
    assert parts.models[0].block_errors == pytest.approx(whole.models[0].block_errors, rel=1e-4)


def test_the_built_in_sample_is_the_default(reference: Path, quantized: Path, tmp_path: Path) -> None:
    found = measured([quantized], tmp_path, reference=reference)
    assert (found.text, found.n_sequences, found.length) == (BUILTIN, 5, 32)


def test_gguf_and_mlx_stand_in_one_table(tmp_path: Path, text: Path) -> None:
    weights = gguf_models.llama_weights(vocab=288)
    configure = gguf_models.add_byte_tokenizer
    source = gguf_models.write_llama(tmp_path / "source.gguf", weights, "F16", configure=configure)
    convert(source, tmp_path / "q3", bits=3, verify=False)
    convert(source, tmp_path / "q8.gguf", type="Q8_0", verify=False)
    models = [tmp_path / "q3", tmp_path / "q8.gguf"]
    found = measured(models, tmp_path / "cache", reference=source, text=text)
    assert [m.kind for m in found.models] == ["mlx", "gguf"]
    assert found.models[1].kl_mean.value < found.models[0].kl_mean.value
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["models"][1]["bpw"] > 8


def test_a_model_that_is_run_whole_is_measured_and_said(
    reference: Path, quantized: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    streamed = measured([quantized], tmp_path / "a", reference=reference, text=text)
    monkeypatch.setattr("mlxq.runtime.block_layout._path_of_blocks", _no_blocks)
    whole = measured([quantized], tmp_path / "b", reference=reference, text=text)
    assert whole.models[0].kl_mean.value == pytest.approx(streamed.models[0].kl_mean.value, rel=1e-4)
    assert whole.models[0].block_errors is None
    assert "as a whole" in whole.models[0].notes[0]
    assert any("not kept" in note for note in whole.notes)


def _no_blocks(model: object) -> str:
    from mlxq.runtime.block_layout import NotStreamable

    raise NotStreamable("it has no list of blocks")


def broken(reference: Path, out: Path, name: str, value: float) -> Path:
    tensors = tiny.random_tensors(tiny.llama_shapes(tiny.LLAMA))
    tensors[name].reshape(-1)[7] = value
    return tiny.make_model(out, tensors=tensors)


def test_a_block_that_is_not_finite_is_named(reference: Path, text: Path, tmp_path: Path) -> None:
    bad = broken(reference, tmp_path / "bad", "model.layers.1.mlp.up_proj.weight", math.nan)
    with pytest.raises(EvaluationError, match="bad: the output of block 2 is NaN or infinite, first in sequence 1 at"):
        measured([bad], tmp_path, reference=reference, text=text)


def test_logits_that_are_not_finite_are_named(reference: Path, text: Path, tmp_path: Path) -> None:
    bad = broken(reference, tmp_path / "bad", "lm_head.weight", math.nan)
    message = "bad: yields logits that are NaN or infinite, first in sequence 1 at token 16"
    with pytest.raises(EvaluationError, match=message):
        measured([bad], tmp_path, reference=reference, text=text)
    with pytest.raises(EvaluationError, match=message):
        measured([bad], tmp_path, text=text)


def test_another_vocabulary_is_refused(reference: Path, text: Path, tmp_path: Path) -> None:
    other = tiny.make_model(tmp_path / "other", vocab_size=384)
    with pytest.raises(EvaluationError, match=r"other: predicts 384 tokens, the reference .*ref 320"):
        measured([other], tmp_path, reference=reference, text=text)


def test_another_tokenizer_is_refused(reference: Path, text: Path, tmp_path: Path) -> None:
    other = tiny.make_model(tmp_path / "other")
    file = other / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(content))
    with pytest.raises(EvaluationError, match=r"other: its tokenizer reads the text differently .*token 1 has id 65"):
        measured([other], tmp_path, reference=reference, text=text)


def test_a_model_without_tokenizer_reads_with_the_reference(
    reference: Path, quantized: Path, text: Path, tmp_path: Path
) -> None:
    bare = shutil.copytree(quantized, tmp_path / "bare")
    for file in bare.glob("tokenizer*"):
        file.unlink()
    found = measured([bare], tmp_path, reference=reference, text=text)
    assert "bare has no tokenizer" in found.notes[0]
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        measured([bare], tmp_path, text=text)


def test_sequences_beyond_the_context_are_refused(reference: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="was made for 512 tokens at most, but the sequences have 600"):
        measured([reference], tmp_path, text=text, length=600, sequences=1)


@pytest.mark.slow
def test_work_can_be_cancelled_at_every_step(reference: Path, quantized: Path, text: Path, tmp_path: Path) -> None:
    events: list[Progress] = []
    measured([quantized], tmp_path, reference=reference, text=text, progress=events.append, use_cache=False)
    assert events[-1].done == events[-1].total
    assert [e.done for e in events] == sorted(e.done for e in events)
    for stop in (1, 3, len(events)):
        token = CancelToken()
        seen: list[Progress] = []

        def progress(event: Progress, seen: list = seen, token: CancelToken = token, stop: int = stop) -> None:
            seen.append(event)
            if len(seen) == stop - 1:
                token.cancel()

        if stop == 1:
            token.cancel()
        with pytest.raises(Cancelled):
            measured(
                [quantized],
                tmp_path,
                reference=reference,
                text=text,
                progress=progress,
                cancel=token,
                use_cache=False,
            )
    assert not list(tmp_path.iterdir())


def test_nothing_to_measure_is_refused() -> None:
    with pytest.raises(EvaluationError, match="no model to measure"):
        mlxq.evaluate_models([])
