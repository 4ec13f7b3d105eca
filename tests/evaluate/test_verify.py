"""The proof passes what is sound, fails what is broken, and names the tensor that broke it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import tiny
from tokenizers import pre_tokenizers

from mlxq.architectures.parameters import ParameterMap
from mlxq.checkpoint.source import open_checkpoint
from mlxq.conversion import convert
from mlxq.errors import Cancelled, CheckpointError, VerificationError
from mlxq.evaluate.report import render
from mlxq.evaluate.texts import sections
from mlxq.evaluate.verdict import config_difference
from mlxq.evaluate.verify import VerificationResult, verify
from mlxq.types import CancelToken, Progress

DOWN = "model.layers.1.mlp.down_proj"


def peaked(config: dict | None = None) -> dict[str, np.ndarray]:
    """Weights whose head is large, so that predictions are sharp and depend on every block."""
    tensors = tiny.random_tensors(tiny.llama_shapes(tiny.LLAMA | (config or {})))
    if "lm_head.weight" in tensors:
        tensors["lm_head.weight"] *= 4
    return tensors


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_model(tmp_path_factory.mktemp("source") / "m", tensors=peaked())


def converted(source: Path, out: Path, bits: int = 8) -> Path:
    convert(source, out, bits=bits, verify=False)
    return out


def change(directory: Path, **arrays: mx.array) -> None:
    """Replace stored arrays of a converted model; `__` in a name stands for a dot."""
    path = str(directory / "model.safetensors")
    stored = dict(mx.load(path))
    mx.eval(stored)
    for name, array in arrays.items():
        name = name.replace("__", ".")
        assert stored[name].shape == array.shape
        stored[name] = array.astype(stored[name].dtype)
    mx.save_safetensors(path, stored, metadata={"format": "mlx"})


def stored(directory: Path, name: str) -> mx.array:
    return mx.load(str(directory / "model.safetensors"))[name]


def run(source: Path, result: Path, **options: object) -> VerificationResult:
    with open_checkpoint(source) as checkpoint:
        return verify(checkpoint, result, **{"always_run": True} | options)


def expect_broken(outcome: VerificationResult, name: str) -> None:
    assert not outcome.passed
    assert outcome.worst_tensors[0].name == name
    assert "\n" not in outcome.failure
    assert outcome.failure.index(name) < min(
        (outcome.failure.index(t.name) for t in outcome.worst_tensors[1:] if t.name in outcome.failure), default=10**9
    )


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_a_sound_conversion_passes(source: Path, tmp_path: Path, bits: int) -> None:
    outcome = run(source, converted(source, tmp_path / "out", bits))
    assert outcome.passed, outcome.failure
    assert outcome.kl > 0
    assert outcome.kl_se is not None
    assert 0 < outcome.kl_se < outcome.kl
    assert outcome.n_sequences == 16
    assert not outcome.worst_tensors
    assert outcome.seconds > 0
    assert outcome.peak_memory > 0


def test_more_bits_diverge_less(source: Path, tmp_path: Path) -> None:
    kl = [run(source, converted(source, tmp_path / f"out{b}", b)).kl for b in (8, 6, 4, 2)]
    assert kl == sorted(kl)
    # Two bits more are a quarter of the step, a sixteenth of the noise's energy; bfloat16 scales dampen it.
    assert kl[2] > 5 * kl[1] > 5 * kl[0]


def test_the_same_model_diverges_by_exactly_nothing(source: Path) -> None:
    outcome = run(source, source)
    assert (outcome.kl, outcome.kl_se, outcome.agreement) == (0.0, 0.0, 1.0)
    assert outcome.perplexity_source == outcome.perplexity_result
    assert outcome.bpw == 16


def test_where_every_weight_is_the_sources_nothing_has_to_run(source: Path, tmp_path: Path) -> None:
    quantized = converted(source, tmp_path / "quantized", 4)
    outcome = convert(quantized, tmp_path / "again").verification
    assert (outcome.passed, outcome.kl, outcome.n_tokens) == (True, 0.0, 0)
    assert outcome.n_identical == sum(math.prod(s) for s in tiny.llama_shapes(tiny.LLAMA).values())
    assert "own number" in render(outcome)
    # Other codes in the same format, and other floats, are run.
    scales = stored(tmp_path / "again", "model.layers.1.mlp.up_proj.scales")
    change(tmp_path / "again", model__layers__1__mlp__up_proj__scales=scales * 1.01)
    outcome = run(quantized, tmp_path / "again", always_run=False)
    assert outcome.n_identical == 0
    assert outcome.kl > 0


def test_codes_taken_over_from_the_source_diverge_by_nothing(source: Path, tmp_path: Path) -> None:
    quantized = converted(source, tmp_path / "quantized", 4)
    convert(quantized, tmp_path / "again", verify=False)
    outcome = run(quantized, tmp_path / "again")
    assert (outcome.kl, outcome.agreement, outcome.passed) == (0.0, 1.0, True)
    assert outcome.kl_bound < 0.01


def test_codes_taken_over_wrongly_fail_at_once(source: Path, tmp_path: Path) -> None:
    """An error of a size that rounding explains is not explained where nothing is rounded."""
    quantized = converted(source, tmp_path / "quantized", 4)
    convert(quantized, tmp_path / "again", verify=False)
    scales = stored(tmp_path / "again", f"{DOWN}.scales")
    change(tmp_path / "again", **{f"{DOWN}.scales".replace(".", "__"): scales * 1.5})
    outcome = run(quantized, tmp_path / "again")
    expect_broken(outcome, f"{DOWN}.weight")
    assert "as in the source" in outcome.failure


def test_perplexity_is_that_of_the_logits(source: Path) -> None:
    """Against the source's own model run whole, in float32, on the same tokens."""
    from mlxq.evaluate.texts import token_sequences
    from mlxq.runtime.layers import install_layers
    from mlxq.runtime.tokenizer import load_tokenizer
    from mlxq.runtime.weights import load_parameters

    nll = []
    with open_checkpoint(source) as checkpoint:
        parameters = ParameterMap(checkpoint)
        model = parameters.new_model()
        install_layers(model, parameters.tensors)
        load_parameters(model, "", parameters, compute_dtype=mx.float32)
        for ids in token_sequences(load_tokenizer(checkpoint)):
            logits = np.array(model(mx.array([ids])).astype(mx.float32))[0, :-1].astype(np.float64)
            total = np.log(np.exp(logits).sum(axis=1))
            nll += list(total - logits[np.arange(len(ids) - 1), ids[1:]])
    outcome = run(source, source)
    assert outcome.n_tokens == len(nll)
    # float32 logits of size 10 carry some 1e-6 of noise each, which the mean does not add up.
    assert outcome.perplexity_source == pytest.approx(np.exp(np.mean(nll)), rel=1e-5)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_shuffled_tensor_fails_and_is_named_first(source: Path, tmp_path: Path, bits: int) -> None:
    out = converted(source, tmp_path / "out", bits)
    rolled = {
        f"{DOWN}.{part}".replace(".", "__"): mx.roll(stored(out, f"{DOWN}.{part}"), 1, axis=0)
        for part in ("weight", "scales", "biases")
    }
    change(out, **rolled)
    outcome = run(source, out)
    expect_broken(outcome, f"{DOWN}.weight")
    assert "one tensor is" in outcome.failure
    # Rows that have nothing to do with those expected are sqrt(2) times their size away.
    assert outcome.worst_tensors[0].rmse == pytest.approx(2**0.5, rel=0.1)


def test_scales_in_the_wrong_place_fail(source: Path, tmp_path: Path) -> None:
    out = converted(source, tmp_path / "out")
    name = "model__layers__0__self_attn__q_proj__scales"
    change(out, **{name: mx.roll(stored(out, name.replace("__", ".")), 1, axis=1)})
    expect_broken(run(source, out), "model.layers.0.self_attn.q_proj.weight")


def test_a_result_that_is_not_finite_fails(source: Path, tmp_path: Path) -> None:
    out = converted(source, tmp_path / "out")
    scales = np.array(stored(out, f"{DOWN}.scales").astype(mx.float32))
    scales[3, 1] = np.nan
    change(out, **{f"{DOWN}.scales".replace(".", "__"): mx.array(scales)})
    outcome = run(source, out)
    expect_broken(outcome, f"{DOWN}.weight")
    assert "NaN or infinite" in outcome.failure
    assert "not finite" in outcome.failure
    json.dumps(outcome.to_dict(), allow_nan=False)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("key", "value"), [("rope_theta", 20.0), ("rms_norm_eps", 0.1), ("eos_token_id", 255)])
def test_a_configuration_that_differs_fails_whatever_it_does(
    source: Path, tmp_path: Path, bits: int, key: str, value: float
) -> None:
    out = converted(source, tmp_path / "out", bits)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {key: value}))
    outcome = run(source, out)
    assert not outcome.passed
    assert f"{key} is {value} in its config.json, but {tiny.LLAMA[key]} in the source's" in outcome.failure
    (out / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != key} | {"x": math.nan}))
    assert config_difference({"x": math.nan}, {"x": math.nan, "torch_dtype": "float16"}) == ""
    assert "absent" in config_difference(config, {k: v for k, v in config.items() if k != key})


@pytest.mark.parametrize("name", ["model.embed_tokens.scales", "model.embed_tokens.biases", "model.norm.weight"])
def test_what_is_not_finite_fails_where_the_text_does_not_go(
    source: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row 300 is of no byte, so the logits do not show it. (The norm they do.)"""
    out = converted(source, tmp_path / "out")
    monkeypatch.setattr("mlxq.evaluate.verify.suspicious_kl", lambda *_: math.inf)
    values = np.array(stored(out, name).astype(mx.float32))
    values[300 if values.ndim > 1 else 3] = -np.inf
    change(out, **{name.replace(".", "__"): mx.array(values)})
    outcome = run(source, out)
    expect_broken(outcome, f"{name.rpartition('.')[0]}.weight")
    assert "not finite" in outcome.failure


@pytest.mark.parametrize(("dtype", "size"), [("BF16", 1e-9), ("F16", 1e-6), ("BF16", 1e-6)])
def test_a_dead_tensor_does_no_harm(tmp_path: Path, dtype: str, size: float) -> None:
    """Its weights are below the smallest step, so that nothing or little of them is left."""
    tensors = peaked()
    tensors[f"{DOWN}.weight"] *= size
    source = tiny.make_model(tmp_path / "m", tensors=tensors, dtype=dtype)
    outcome = run(source, converted(source, tmp_path / "out", 4))
    assert outcome.passed, outcome.failure


def test_sharp_random_predictions_have_no_bound(tmp_path: Path) -> None:
    """The predictions of random weights fall apart by rounding to 8 bits when norms make them sharp."""
    tensors = {n: w * 30 if w.ndim == 1 else w for n, w in peaked().items()}
    source = tiny.make_model(tmp_path / "m", tensors=tensors)
    outcome = run(source, converted(source, tmp_path / "out", 8))
    assert outcome.kl > 2
    assert outcome.passed, outcome.failure
    assert math.isinf(outcome.kl_bound)
    assert "no better than chance" in "".join(outcome.notes)


def predicting() -> dict[str, np.ndarray]:
    """Weights that know how often each byte is in the text: every state has a 1 that the head turns into log odds."""
    tensors = peaked()
    counts = np.bincount(list("".join(sections().values()).encode()), minlength=256) + 0.1
    letters = pre_tokenizers.ByteLevel.alphabet()
    # Ids of the tokenizer follow the letters that stand for bytes; all ASCII ones stand for themselves.
    odds = {c: counts[ord(c)] if ord(c) < 128 else 1.0 for c in letters} | {"Ġ": counts[32]}
    head = np.full(320, np.log(0.1), np.float32)
    head[: len(letters)] = np.log([odds[c] for c in sorted(letters)])
    tensors["model.embed_tokens.weight"][:, 0] = 8
    tensors["lm_head.weight"] *= 0.05
    # The state is about 8 in one of 128 places; divided by its root mean square that is sqrt(128).
    tensors["lm_head.weight"][:, 0] = head / 128**0.5
    tensors["model.norm.weight"][0] = 1
    return tensors


def test_too_much_divergence_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny.make_model(tmp_path / "m", tensors=predicting())
    out = converted(source, tmp_path / "out")
    outcome = run(source, out)
    assert outcome.passed, outcome.failure
    assert outcome.kl_bound == 1
    for name in ("_BOUND_RATIO", "_LEAST_BOUND", "_SUSPICIOUS_RATIO", "_FLOOR"):
        monkeypatch.setattr(f"mlxq.evaluate.bounds.{name}", 0.0)
    outcome = run(source, out)
    assert not outcome.passed
    assert "no tensor is out of line" in outcome.failure
    assert "use more bits, or --no-verify" in outcome.failure
    assert outcome.worst_tensors


def test_a_conversion_that_breaks_a_tensor_names_it_and_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlxq.quantizers import rtn

    quantize = rtn.quantize
    down_shape = tiny.llama_shapes(tiny.LLAMA)[f"{DOWN}.weight"]

    def wrong(w: np.ndarray, *args: object) -> object:
        return quantize(np.roll(w, 1, axis=0) if w.shape == down_shape else w, *args)

    monkeypatch.setattr(rtn, "quantize", wrong)
    with pytest.raises(VerificationError, match="2 of 21 tensors") as e:
        convert(source, tmp_path / "out", bits=4)
    assert "\n" not in str(e.value)
    assert f"{DOWN}.weight" in str(e.value)
    assert "lm_head" not in str(e.value)
    assert not list(tmp_path.iterdir())


def test_a_broken_source_is_an_error_that_names_it(tmp_path: Path) -> None:
    tensors = peaked()
    tensors["model.norm.weight"][5] = np.inf
    source = tiny.make_model(tmp_path / "m", tensors=tensors)
    with pytest.raises(CheckpointError, match="source itself") as e:
        run(source, source)
    assert str(source) in str(e.value)


def test_masked_tokens_are_no_fault_of_the_source(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlxq.runtime.blocks import StreamedModel

    logits = StreamedModel.logits

    def masked(self: StreamedModel, rows: np.ndarray) -> np.ndarray:
        values = logits(self, rows)
        values[:, 300:] = -np.inf
        return values

    monkeypatch.setattr(StreamedModel, "logits", masked)
    outcome = run(source, source)
    assert outcome.passed, outcome.failure
    assert outcome.kl == 0
    assert math.isfinite(outcome.perplexity_source)


def test_without_tokenizer_it_says_how_to_go_on(tmp_path: Path) -> None:
    source = tiny.make_model(tmp_path / "m", tokenizer=False)
    with pytest.raises(CheckpointError, match="--no-verify") as e:
        run(source, source)
    assert "tokenizer" in str(e.value)


def test_the_tokenizer_of_another_model_is_found_out(tmp_path: Path) -> None:
    source = tiny.make_model(tmp_path / "m", vocab_size=100)
    with pytest.raises(CheckpointError, match="another model"):
        run(source, source)


def test_no_text_is_longer_than_the_context(tmp_path: Path) -> None:
    source = tiny.make_model(tmp_path / "m", max_position_embeddings=20)
    assert run(source, source).n_tokens == 16 * 19


def test_a_map_is_taken_as_well(source: Path) -> None:
    with open_checkpoint(source) as checkpoint:
        outcome = verify(ParameterMap(checkpoint), source, bpw=4.5)
    assert outcome.bpw == 4.5


def test_progress_counts_to_its_total_and_cancelling_stops(source: Path) -> None:
    events: list[Progress] = []
    run(source, source, progress=events.append)
    assert [e.done for e in events] == list(range(1, events[0].total + 1))
    assert {(e.stage, e.unit) for e in events} == {("verify", "blocks")}
    cancel = CancelToken()
    seen: list[Progress] = []

    def stop(event: Progress) -> None:
        seen.append(event)
        cancel.cancel()

    with pytest.raises(Cancelled):
        run(source, source, progress=stop, cancel=cancel)
    assert len(seen) == 1


def test_numpy_gives_the_same_numbers(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = converted(source, tmp_path / "out", 4)
    outcomes = []
    for backend in ("numpy", "mlx"):
        monkeypatch.setenv("MLXQ_BACKEND", backend)
        outcomes.append(run(source, out))
    # float32 products in another order change logits by about 1e-6 of their size, and a KL of 0.01 by as much.
    assert outcomes[0].kl == pytest.approx(outcomes[1].kl, rel=1e-3)
    assert outcomes[0].perplexity_result == pytest.approx(outcomes[1].perplexity_result, rel=1e-5)


def test_the_result_does_not_tell_time_and_renders(source: Path, tmp_path: Path) -> None:
    outcome = run(source, converted(source, tmp_path / "out", 4))
    told = outcome.to_dict()
    assert told == json.loads(json.dumps(told, allow_nan=False))
    assert not {"seconds", "peak_memory"} & set(told)
    text = render(outcome)
    assert "passed" in text
    assert f"{outcome.kl:.4g} ± {outcome.kl_se:.2g} nats per token" in text
    assert f"{outcome.perplexity_source:.3g} -> {outcome.perplexity_result:.3g}" in text
    assert "worse than chance" not in text, "the source of random weights is no better"
