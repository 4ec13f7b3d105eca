"""The tables of new formats, measured again: their errors, and that no smaller format would do."""

import gguf
import numpy as np
import pytest

from mlxq.formats import crossings, float8, float_modes, ggml, nf4
from mlxq.formats.geometry import AFFINE_BITS, AFFINE_GROUP_SIZES, BLOCK_FORMATS, bpw
from mlxq.plan.recoding import FOREIGN, MOST_ADDED, MOST_EXPECTED, RECODINGS
from mlxq.quantizers import rtn
from mlxq.types import QuantSpec


@pytest.fixture(scope="module")
def weights():
    return np.random.default_rng(0).normal(0, 0.02, (16, 1024)).astype(np.float32)


def encode(w, name):
    kind = gguf.GGMLQuantizationType[name]
    libgguf = pytest.importorskip("libgguf", reason="ggml's own quantizers, PyPI libgguf, are not installed")
    blocks = libgguf.quantize_rows(w, int(kind), np.ones(w.shape[1], np.float32))
    return np.asarray(blocks).view(np.uint8).reshape(len(w), -1)


def relative(w_hat, w):
    return float(np.linalg.norm(w_hat - w) / np.linalg.norm(w))


#: ggml's encoders of small codebooks search for seconds.
SEARCHED = [pytest.param(n, marks=pytest.mark.slow) if n.startswith(("IQ1", "IQ2")) else n for n in RECODINGS]


@pytest.mark.parametrize("name", SEARCHED)
def test_errors_are_those_of_the_table_and_nothing_smaller_is_within_the_bound(weights, name):
    row = RECODINGS[name]
    decoded = ggml.dequantize(encode(weights, name), name)
    own = relative(decoded, weights)
    # 16384 weights: a root mean square is known to a part in 180 (one deviation, for Gaussian errors).
    assert own == pytest.approx(row.own, rel=0.02)

    def added(spec):
        return relative(crossings.dequantize(rtn.quantize(decoded, spec, "BF16")), decoded)

    assert added(row.spec) == pytest.approx(row.added, rel=0.03)
    assert row.added <= MOST_EXPECTED * row.own < row.bound == MOST_ADDED * row.own
    specs = [QuantSpec(bits, group) for bits in AFFINE_BITS for group in AFFINE_GROUP_SIZES]
    smaller = [s for s in specs if bpw(s, "BF16") < bpw(row.spec, "BF16")]
    # A part in fifty: formats as close to the line as that are chosen by the table, not by the noise.
    assert all(added(s) > 0.98 * MOST_EXPECTED * own for s in smaller)


def test_every_type_has_a_grid_of_its_own_or_a_new_format():
    blocks = {f.name for f in BLOCK_FORMATS.values() if f.block_size > 1}
    grids = {n for n in blocks if ggml.affine_spec(n)}
    assert blocks == grids | RECODINGS.keys()
    # IQ4 types have both: a grid of 8-bit codes, twice their size, for those who ask for exact weights.
    assert grids & RECODINGS.keys() == {"IQ4_NL", "IQ4_XS"}


def nearest(x, values):
    """Each number's nearest of `values`, ties to either."""
    table = np.sort(values)
    return table[np.searchsorted((table[1:] + table[:-1]) / 2, x)]


def in_groups(w, group_size, values, largest):
    groups = w.reshape(-1, group_size)
    scales = np.abs(groups).max(1, keepdims=True) / np.float32(largest)
    return scales, (nearest(groups / scales, values) * scales).reshape(w.shape)


E4M3 = float8.E4M3[np.isfinite(float8.E4M3)]


def nvfp4(w):
    factor = np.float32(np.abs(w).max() / (6 * 448))
    scales = nearest(in_groups(w, 16, [0.0], 6)[0] / factor, E4M3) * factor
    return (nearest(w.reshape(-1, 16) / scales, float_modes.E2M1) * scales).reshape(w.shape)


ENCODED = {
    "FP8": lambda w: in_groups(w, w.size, E4M3, 448)[1],
    "NF4": lambda w: in_groups(w, 64, nf4.TABLES["nf4"], 1)[1],
    "FP4": lambda w: in_groups(w, 64, nf4.TABLES["fp4"], 1)[1],
    "NVFP4+scale": nvfp4,
}


@pytest.mark.parametrize("name", FOREIGN)
def test_errors_of_other_tools_formats(weights, name):
    row = FOREIGN[name]
    decoded = ENCODED[name](weights).astype(np.float32)
    assert relative(decoded, weights) == pytest.approx(row.own, rel=0.02)

    def added(spec):
        return relative(crossings.dequantize(rtn.quantize(decoded, spec, "BF16")), decoded)

    assert added(row.spec) == pytest.approx(row.added, rel=0.03)
    assert row.added <= MOST_EXPECTED * row.own
    specs = [QuantSpec(bits, group) for bits in AFFINE_BITS for group in AFFINE_GROUP_SIZES]
    smaller = [s for s in specs if bpw(s, "BF16") < bpw(row.spec, "BF16")]
    assert all(added(s) > 0.98 * MOST_EXPECTED * row.own for s in smaller)
