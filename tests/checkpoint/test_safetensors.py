"""The strict safetensors reader: values by rows, and one hostile file per rule."""

from __future__ import annotations

import contextlib
import json
import struct
import tracemalloc

import numpy as np
import pytest

from mlxq.checkpoint.safetensors import DTYPE_BITS, MAX_HEADER_BYTES, SafetensorsFile
from mlxq.errors import CheckpointError


def write_raw(path, header, data=b"", length=None):
    """A file with a header given as an object, text or bytes, and any claimed length."""
    if not isinstance(header, (str, bytes)):
        header = json.dumps(header)
    raw = header.encode() if isinstance(header, str) else header
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def entry(dtype="F32", shape=(2, 2), offsets=(0, 16)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def refuse(path, *parts):
    with pytest.raises(CheckpointError) as caught:
        SafetensorsFile(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    for part in parts:
        assert part in message, message


@pytest.fixture
def file(tmp_path):
    return tmp_path / "model.safetensors"


def test_reads_what_the_reference_writer_wrote(file):
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    arrays = {
        "a": rng.standard_normal((5, 3)).astype(np.float32),
        "b": rng.standard_normal((4, 2, 3)).astype(np.float16),
        "c": rng.integers(0, 2**32, (6, 2), dtype=np.uint32),
        "scalar": np.array(7, np.int64),
        "empty": np.zeros((0, 4), np.float32),
    }
    save_file(arrays, file, {"format": "pt"})
    opened = SafetensorsFile(file)
    assert opened.metadata == {"format": "pt"}
    assert set(opened.tensors) == set(arrays)
    for name, expected in arrays.items():
        got = opened.read(name)
        assert got.dtype == expected.dtype
        np.testing.assert_array_equal(got, expected)


def test_reads_bfloat16_as_bits(file):
    bits = np.arange(6, dtype=np.uint16)
    write_raw(file, {"w": entry("BF16", (3, 2), (0, 12))}, bits.tobytes())
    got = SafetensorsFile(file).read("w", slice(1, 3))
    assert got.dtype == np.uint16
    np.testing.assert_array_equal(got, bits.reshape(3, 2)[1:])


@pytest.mark.parametrize("rows", [slice(0, 2), slice(1, 4), slice(3, None), slice(None), slice(-2, None), slice(4, 2)])
def test_reads_rows(file, rows):
    w = np.arange(5 * 2 * 3, dtype=np.float32).reshape(5, 2, 3)
    write_raw(file, {"w": entry("F32", w.shape, (0, w.nbytes))}, w.tobytes())
    got = SafetensorsFile(file).read("w", rows)
    np.testing.assert_array_equal(got, w[rows])
    assert got.flags.writeable
    assert got.flags.owndata


def test_rows_must_be_contiguous(file):
    write_raw(file, {"w": entry(), "s": entry("F32", (), (16, 20))}, bytes(20))
    opened = SafetensorsFile(file)
    with pytest.raises(ValueError, match="step 2"):
        opened.read("w", slice(0, 2, 2))
    with pytest.raises(ValueError, match="scalar"):
        opened.read("s", slice(0, 1))


def test_a_range_of_rows_allocates_only_those_rows(file):
    n, k = 64, 65536
    file.write_bytes(struct.pack("<Q", 0))
    write_raw(file, {"w": entry("F32", (n, k), (0, n * k * 4))}, bytes(n * k * 4))
    opened = SafetensorsFile(file)
    tracemalloc.start()
    opened.read("w", slice(10, 12))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # Two rows are 524,288 bytes; Python's own objects for one read stay far below 100 kB.
    assert peak < 2 * k * 4 + 100_000


def test_padding_after_the_header_is_allowed(file):
    write_raw(file, json.dumps({"w": entry()}) + "     ", bytes(16))
    assert SafetensorsFile(file).read("w").shape == (2, 2)


def test_missing_file(file):
    refuse(file, "No such file")


def test_a_directory(tmp_path):
    refuse(tmp_path, "cannot be read")


def test_shorter_than_the_length_field(file):
    file.write_bytes(b"\x01\x02\x03")
    refuse(file, "3 bytes")


def test_header_above_the_limit(file):
    write_raw(file, "{}", length=MAX_HEADER_BYTES + 1)
    refuse(file, str(MAX_HEADER_BYTES + 1), str(MAX_HEADER_BYTES))


def test_header_longer_than_the_file(file):
    write_raw(file, "{}", length=5000)
    refuse(file, "truncated", "5000", "2 after")


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ("{", "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        ("", "not valid JSON"),
        ("[" * 200_000, "not valid JSON"),
        ('{"w": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 4]}}', "not valid JSON"),
        ('{"w": {"dtype": "F32", "shape": [' + "9" * 5000 + '], "data_offsets": [0, 4]}}', "tensor 'w'|not valid JSON"),
        ("[]", "not an object"),
        ('{"__metadata__": {"a": 1}}', "__metadata__"),
        ('{"__metadata__": []}', "__metadata__"),
    ],
)
def test_header_that_is_not_the_right_json(file, header, reason):
    write_raw(file, header)
    with pytest.raises(CheckpointError, match=reason) as caught:
        SafetensorsFile(file)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_duplicate_tensor_names(file):
    one = json.dumps(entry())
    write_raw(file, f'{{"w": {one}, "w": {one}}}', bytes(16))
    refuse(file, "duplicate key 'w'")


def test_duplicate_keys_inside_an_entry(file):
    write_raw(file, '{"w": {"dtype": "F32", "dtype": "F16", "shape": [1], "data_offsets": [0, 4]}}', bytes(4))
    refuse(file, "duplicate key 'dtype'")


@pytest.mark.parametrize("info", [[], "F32", {"dtype": "F32", "shape": [1]}, {**entry(), "more": 1}])
def test_entry_with_other_fields(file, info):
    write_raw(file, {"w": info}, bytes(16))
    refuse(file, "tensor 'w'", "dtype, shape and data_offsets")


@pytest.mark.parametrize("dtype", ["F33", "f32", 5, None])
def test_unknown_dtype(file, dtype):
    write_raw(file, {"w": entry(dtype)}, bytes(16))
    refuse(file, "tensor 'w'", "unknown dtype", repr(dtype), "BF16")


@pytest.mark.parametrize("shape", [[-1, 4], [2.0, 2], [True, 4], ["2"], None, 4, [2**64]])
def test_shape_that_is_no_list_of_sizes(file, shape):
    write_raw(file, {"w": {**entry(), "shape": shape}}, bytes(16))
    refuse(file, "tensor 'w'", "shape")


def test_more_axes_than_numpy_has(file):
    write_raw(file, {"w": entry(shape=[1] * 40, offsets=(0, 4))}, bytes(4))
    refuse(file, "tensor 'w'", "40 axes", "at most 32")


@pytest.mark.parametrize("offsets", [[-4, 12], [0], [0, 8, 16], [0, 16.0], "0-16", [0, 2**70]])
def test_offsets_that_are_no_pair_of_sizes(file, offsets):
    write_raw(file, {"w": {**entry(), "data_offsets": offsets}}, bytes(16))
    refuse(file, "tensor 'w'", "data_offsets")


@pytest.mark.parametrize("offsets", [[0, 32], [16, 0], [100, 116]])
def test_offsets_out_of_range(file, offsets):
    write_raw(file, {"w": entry(offsets=offsets)}, bytes(16))
    refuse(file, "tensor 'w'", str(offsets), "16 bytes after the header")


def test_truncated_data(file):
    write_raw(file, {"w": entry()}, bytes(15))
    refuse(file, "tensor 'w'", "truncated")


def test_size_that_overflows(file):
    write_raw(file, {"w": entry(shape=(2**40, 2**40))}, bytes(16))
    refuse(file, "tensor 'w'", "overflows")


def test_empty_tensor_whose_other_sizes_overflow(file):
    write_raw(file, {"w": entry(shape=(0, 2**40, 2**40), offsets=(0, 0))})
    refuse(file, "tensor 'w'", "overflows")


def test_size_that_would_wrap_to_the_right_one(file):
    # 2**62 * 4 elements of 4 bytes are 2**66 bytes: 0 in 64-bit arithmetic.
    write_raw(file, {"w": entry(shape=(2**62, 4), offsets=(0, 0))})
    refuse(file, "tensor 'w'", "overflows")


@pytest.mark.parametrize("shape", [(2, 3), (4,), (1, 1), ()])
def test_shape_and_bytes_disagree(file, shape):
    data = bytes(12)
    write_raw(file, {"w": entry(shape=shape, offsets=(0, 12))}, data)
    refuse(file, "tensor 'w'", "span 12")


def test_packed_dtype_that_ends_inside_a_byte(file):
    write_raw(file, {"w": entry("F4", (3,), (0, 1))}, bytes(1))
    refuse(file, "1.5 bytes", "span 1")


def test_overlapping_tensors(file):
    write_raw(file, {"a": entry(), "b": entry(offsets=(8, 24))}, bytes(24))
    refuse(file, "tensor 'b' overlaps tensor 'a'")


def test_two_names_for_the_same_bytes(file):
    write_raw(file, {"a": entry(), "b": entry()}, bytes(16))
    refuse(file, "overlaps")


def test_gap_between_tensors(file):
    write_raw(file, {"a": entry(), "b": entry(offsets=(20, 36))}, bytes(36))
    refuse(file, "tensor 'b' leaves 4 unused bytes after tensor 'a'")


def test_gap_before_the_first_tensor(file):
    write_raw(file, {"a": entry(offsets=(4, 20))}, bytes(20))
    refuse(file, "tensor 'a' leaves 4 unused bytes after the header")


def test_bytes_after_the_last_tensor(file):
    write_raw(file, {"a": entry()}, bytes(19))
    refuse(file, "3 bytes after tensor 'a' belong to no tensor")


def test_names_cannot_break_the_line(file):
    write_raw(file, {"evil\nname\x1b[31m" + "x" * 1000: entry("F33")}, bytes(16))
    refuse(file, r"evil\nname\x1b[31m", "...")


def test_zero_size_tensors_share_a_place(file):
    write_raw(
        file,
        {"a": entry(shape=(0, 2), offsets=(0, 0)), "b": entry(), "c": entry(shape=(0,), offsets=(16, 16))},
        bytes(16),
    )
    opened = SafetensorsFile(file)
    assert opened.read("a").shape == (0, 2)
    assert opened.read("a", slice(0, 5)).shape == (0, 2)
    assert list(opened.tensors) == ["a", "b", "c"]


def test_unknown_tensor(file):
    write_raw(file, {"a": entry()}, bytes(16))
    with pytest.raises(CheckpointError, match="no tensor 'b'"):
        SafetensorsFile(file).read("b")


def test_dtype_that_numpy_lacks_is_listed_but_not_read(file):
    write_raw(file, {"a": entry("C64", (2, 1))}, bytes(16))
    opened = SafetensorsFile(file)
    assert opened.tensors["a"].dtype == "C64"
    with pytest.raises(CheckpointError, match="'a' is C64"):
        opened.read("a")


def test_file_that_changes_after_it_was_opened(file):
    write_raw(file, {"a": entry()}, bytes(16))
    opened = SafetensorsFile(file)
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="changed"):
        opened.read("a")
    file.unlink()
    with pytest.raises(CheckpointError, match="No such file"):
        opened.read("a")


def test_damaged_files_are_refused_and_nothing_else_happens(file):
    """Random damage to the header and the length: a file either opens with tensors inside it, or is refused."""
    write_raw(file, {"a": entry(), "__metadata__": {"format": "pt"}, "b": entry("BF16", (4,), (16, 24))}, bytes(24))
    sound = file.read_bytes()
    rng = np.random.default_rng(0)
    opened = 0
    for _ in range(400):
        damaged = bytearray(sound)
        for _ in range(rng.integers(1, 4)):
            damaged[rng.integers(0, len(sound) - 24)] = rng.integers(0, 256)
        file.write_bytes(damaged[: rng.integers(0, len(sound)) if rng.random() < 0.2 else None])
        with contextlib.suppress(CheckpointError):
            found = SafetensorsFile(file)
            opened += 1
            assert sum(found.read(name).nbytes for name in found.tensors) == 24
    # Renaming a tensor is damage that no reader can see; almost everything else is caught.
    assert opened < 200


def test_every_dtype_has_a_size():
    assert set(DTYPE_BITS.values()) <= {4, 6, 8, 16, 32, 64}
