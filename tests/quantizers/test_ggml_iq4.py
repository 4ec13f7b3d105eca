"""Encoders of IQ4_NL and IQ4_XS: no more error than ggml's own, codes that are the nearest, and the border cases."""

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from mlxq.errors import FormatError
from mlxq.formats import iq4
from mlxq.formats.geometry import block_format
from mlxq.quantizers.ggml import iq4 as ggml_iq4

KINDS = ("normal", "laplace", "uniform", "sparse", "columns")


def weights(shape=(24, 1024), seed=0, kind="normal"):
    rng = np.random.default_rng(seed)
    w = {
        "normal": rng.normal(size=shape),
        "laplace": rng.laplace(size=shape),
        "uniform": rng.uniform(-1, 1, shape),
        "sparse": rng.normal(size=shape) * (rng.random(shape) < 0.2),
        "columns": rng.normal(size=shape) * rng.lognormal(0, 1, shape[1]),
    }[kind]
    return (0.02 * w).astype(np.float32)


def importances(K, seed=1, spread=1.0):
    importance = np.random.default_rng(seed).lognormal(0, spread, K)
    return (importance / importance.mean()).astype(np.float32)


def rmse(w, w_hat, importance=None):
    errors = (w.astype(np.float64) - w_hat) ** 2
    return np.sqrt((errors if importance is None else errors * importance).mean())


@pytest.mark.parametrize("spread", [None, 1.0, 2.5])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", iq4.IQ4_TYPES)
def test_error_is_at_most_that_of_ggml(name, kind, spread):
    libgguf = pytest.importorskip("libgguf")
    w = weights(kind=kind)
    importance = None if spread is None else importances(w.shape[1], spread=spread)
    ours = iq4.dequantize(ggml_iq4.quantize(w, name, importance), name)
    ggml = dequantize(libgguf.quantize_rows(w, GGMLQuantizationType[name], importance), GGMLQuantizationType[name])
    assert rmse(w, ours, importance) <= rmse(w, ggml, importance)


@pytest.mark.parametrize("name", iq4.IQ4_TYPES)
def test_codes_are_the_nearest_of_the_scale(name):
    w = weights((16, 512))
    parts = iq4.unpack(ggml_iq4.quantize(w, name).reshape(-1, block_format(name).type_size), name)
    s = parts.d.astype(np.float64)[:, None]
    if parts.scales is not None:
        s = s * parts.scales
    distances = np.abs(w.reshape(*s.shape, 32, 1) / s[:, :, None, None] - iq4.VALUES)
    chosen = np.take_along_axis(distances, parts.codes.reshape(*s.shape, 32, 1).astype(int), axis=3)[..., 0]
    # In float32 a weight of up to 127 steps is off by a few units of 2^-17: only ties can part.
    assert (chosen - distances.min(axis=3)).max() < 1e-4


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("name", iq4.IQ4_TYPES)
def test_mlx_finds_what_numpy_finds(name, given):
    pytest.importorskip("mlx.core")
    w = weights((10, 512))
    importance = importances(512) if given else None
    ours = ggml_iq4.quantize(w, name, importance)
    with_mlx = ggml_iq4.quantize(w, name, importance, "mlx")
    # Sums are added in another order: among nearly equal candidates another may win.
    errors = [rmse(w, iq4.dequantize(blocks, name), importance) for blocks in (ours, with_mlx)]
    assert errors[1] == pytest.approx(errors[0], rel=0.001)
    assert (with_mlx == ours).mean() > 0.9


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("name", iq4.IQ4_TYPES)
def test_rows_are_encoded_alone(name, given):
    w = weights((1100, 256))
    importance = importances(256) if given else None
    together = ggml_iq4.quantize(w, name, importance)
    for row in (0, 1, 1023, 1099):
        assert np.array_equal(ggml_iq4.quantize(w[row : row + 1], name, importance)[0], together[row])
    assert ggml_iq4.quantize(w[:0], name, importance).shape == (0, together.shape[1])


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("name", iq4.IQ4_TYPES)
def test_zeros_stay_zeros(name, given):
    w = weights((2, 512))
    w[0] = 0
    w[1, :256] = 0
    w_hat = iq4.dequantize(ggml_iq4.quantize(w, name, importances(512) if given else None), name)
    assert (w_hat[0] == 0).all()
    assert (w_hat[1, :256] == 0).all()
    assert (w_hat[1, 256:] != 0).any()


@pytest.mark.parametrize("name", iq4.IQ4_TYPES)
def test_magnitudes_from_nothing_to_the_largest(name):
    """Normal weights keep their relative error of 0.085 as long as `d` is a normal float16."""
    for magnitude in (1e-2, 1e2, 1e5):
        w = weights((8, 512)) * np.float32(magnitude / 0.02)
        assert rmse(w, iq4.dequantize(ggml_iq4.quantize(w, name), name)) < 0.095 * rmse(w, 0)
    for magnitude in (1e-6, 1e-8, 1e-30, 1e-42):
        w = weights((8, 512)) * np.float32(magnitude / 0.02)
        w_hat = iq4.dequantize(ggml_iq4.quantize(w, name), name)
        # The value nearest to zero is one step, not zero: at most the smallest float16 is added to what zeros err,
        # and nothing where no weight is closer to that step than to zero.
        assert rmse(w, w_hat) <= rmse(w, 0) + (2**-24 if np.abs(w).max() > 2**-25 else 0)


@pytest.mark.parametrize(("bad", "shown"), [(1e10, r"1e\+10"), (-1e10, r"-1e\+10"), (np.nan, "nan"), (-np.inf, "-inf")])
@pytest.mark.parametrize("name", iq4.IQ4_TYPES)
def test_weights_beyond_the_type_are_refused(name, bad, shown):
    w = weights((3, 512))
    w[2, 300] = bad
    with pytest.raises(FormatError, match=f"{name}: a weight is {shown}"):
        ggml_iq4.quantize(w, name)
