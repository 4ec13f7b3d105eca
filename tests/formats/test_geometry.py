"""The table of formats against the libraries that define them."""

import gguf
import mlx.core as mx
import pytest

from mlxq.errors import FormatError
from mlxq.formats import geometry
from mlxq.types import QuantSpec


@pytest.mark.parametrize("bits", geometry.AFFINE_BITS)
@pytest.mark.parametrize("group_size", geometry.AFFINE_GROUP_SIZES)
def test_mlx_accepts_every_legal_pair_and_packs_as_computed(bits, group_size):
    w_q, scales, biases = mx.quantize(mx.ones((3, 256)), group_size=group_size, bits=bits)
    assert w_q.shape == (3, geometry.packed_words(256, bits))
    spec = QuantSpec(bits, group_size)
    assert w_q.nbytes + scales.nbytes + biases.nbytes == geometry.affine_bytes((3, 256), spec, "F32")
    assert geometry.affine_bytes((3, 256), spec, "F32") * 8 == geometry.bpw(spec, "F32") * 3 * 256


@pytest.mark.parametrize(("bits", "group_size"), [(4, 16), (4, 256), (7, 64), (16, 64)])
def test_mlx_rejects_what_the_table_rejects(bits, group_size):
    with pytest.raises(ValueError, match="not supported"):
        mx.quantize(mx.ones((2, 512)), group_size=group_size, bits=bits)
    with pytest.raises(FormatError):
        geometry.validate_affine(bits, group_size)


@pytest.mark.parametrize("name", geometry.BLOCK_FORMATS)
def test_block_formats_equal_ggml(name):
    fmt = geometry.block_format(name)
    kind = gguf.GGMLQuantizationType[name]
    assert (fmt.block_size, fmt.type_size) == gguf.GGML_QUANT_SIZES[kind]
    assert geometry.block_format(int(kind)) is fmt


def test_bits_per_weight_count_scales_and_biases():
    assert geometry.bpw(QuantSpec(4, 64), "BF16") == 4.5
    assert geometry.bpw(QuantSpec(4, 32), "F16") == 5.0
    assert geometry.block_format("Q4_1").bpw == 5.0


@pytest.mark.parametrize(
    ("K", "preferred", "expected"),
    [(768, 128, 128), (576, 128, 64), (96, 64, 32), (128, 64, 64), (80, 64, None), (0, 64, None)],
)
def test_largest_group(K, preferred, expected):
    assert geometry.largest_group(K, preferred) == expected


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: geometry.validate_affine(7, 64), ["2, 3, 4, 5, 6, 8", "got 7"]),
        (lambda: geometry.validate_affine(4, 16), ["32, 64, 128", "got 16"]),
        (lambda: geometry.validate_width(96, 4, 64), ["96", "64", "group_size 32"]),
        (lambda: geometry.validate_width(80, 4, 64), ["80", "keep it float"]),
        (lambda: geometry.packed_words(7, 4), ["7 codes", "28 bits"]),
        (lambda: geometry.packed_words(32, 1), ["2, 3, 4, 5, 6, 8", "got 1"]),
        (lambda: geometry.block_format("Q9_9"), ["Q9_9", "Q4_0 (2)", "BF16 (30)"]),
        (lambda: geometry.block_format(999), ["999", "Q8_0 (8)"]),
        (lambda: geometry.validate_affine(4.0, 64), ["2, 3, 4, 5, 6, 8", "got 4.0"]),
        (lambda: geometry.validate_affine(4, 64.0), ["32, 64, 128", "got 64.0"]),
        (lambda: geometry.packed_words(32, 4.0), ["2, 3, 4, 5, 6, 8", "got 4.0"]),
        (lambda: geometry.bpw(QuantSpec(4, 64), "I8"), ["I8", "F32, F16, BF16"]),
    ],
)
def test_errors_say_the_value_and_the_legal_ones(call, words):
    with pytest.raises(FormatError) as error:
        call()
    assert all(word in str(error.value) for word in words)
