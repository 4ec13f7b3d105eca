"""The GGUF container: equal to gguf's own reader on good files, one clear error for each kind of bad one."""

import os
import random
import struct
import time
import tracemalloc

import gguf
import numpy as np
import pytest
from gguf_bytes import ALIGNMENT, HOSTILE, array_of, make, of_type, string, tensor, u32, u64
from gguf_models import add_byte_tokenizer, add_tensor, finish, llama_weights, write_llama

from mlxq.checkpoint.gguf.checkpoint import GgufCheckpoint
from mlxq.checkpoint.gguf.file import GgufFile
from mlxq.errors import CheckpointError, FormatError, MlxqError


def open_bytes(tmp_path, data: bytes) -> GgufFile:
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    return GgufFile(path)


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile(tmp_path, case):
    data, message = HOSTILE[case]
    text = refusal(tmp_path / "m.gguf", data, message)
    assert str(tmp_path / "m.gguf") in text


def refusal(path, data, message) -> str:
    """The error of a bad file: one line, within a second, and with no more memory than the file's own size.

    The first opening is not measured: it imports modules and fills caches.
    """
    path.write_bytes(data)
    with pytest.raises(FormatError, match=message):
        GgufFile(path)
    tracemalloc.start()
    began = time.thread_time()
    try:
        with pytest.raises(FormatError) as caught:
            GgufFile(path)
        # The window, and the piece of it that is being read; beside them objects of a fixed size.
        assert tracemalloc.get_traced_memory()[1] < 2 * len(data) + 48 * 1024
    finally:
        tracemalloc.stop()
    assert time.thread_time() - began < 1
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_more_entries_than_any_model_has(tmp_path):
    """A file that is large enough for its counts, at no cost on disk."""
    path = tmp_path / "m.gguf"
    for n_tensors, n_entries, what in ((1 << 20, 0, "tensors"), (0, 1 << 20, "metadata entries")):
        path.write_bytes(make(n_tensors=n_tensors, n_entries=n_entries))
        os.truncate(path, 1 << 28)
        with pytest.raises(FormatError, match=rf"1048576 {what}, expected at most \d+"):
            GgufFile(path)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (array_of(8, 1 << 23), "8388608 strings, expected at most 4194304 in all"),
        (of_type(8) + u64(1 << 25), "is a text of 33554432 bytes, expected at most 16777216"),
        (array_of(0, 1 << 28), "need at least 268435456 bytes"),
        (array_of(0, 1 << 26) + of_type(5), "metadata key '' is empty"),
    ],
    ids=["strings", "text", "numbers", "numbers that fit"],
)
def test_large_values_of_a_sparse_file(tmp_path, entry, message):
    """256 MiB that are nearly all zeros: bytes of that size are read once at most, and nothing is kept of them."""
    path = tmp_path / "m.gguf"
    path.write_bytes(make(entries=[entry], n_entries=2))
    os.truncate(path, 1 << 28)
    tracemalloc.start()
    began = time.thread_time()
    try:
        with pytest.raises(FormatError, match=message):
            GgufFile(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 28
    finally:
        tracemalloc.stop()
    assert time.thread_time() - began < 1


def test_large_arrays_are_read_whole(tmp_path):
    """Arrays of numbers beyond the window, between other values."""
    numbers = np.arange(1_500_000, dtype="<f4")
    entries = [
        of_type(8, "a") + string("before" * 1000),
        of_type(9, "b") + u32(6) + u64(numbers.size) + numbers.tobytes(),
        of_type(8, "c") + string("after"),
        of_type(9, "d") + u32(7) + u64(3) + b"\0\1\0",
    ]
    head = make([tensor(dims=(5,))], entries, 0)
    (tmp_path / "m.gguf").write_bytes(head + np.ones(5, "<f4").tobytes())
    file = GgufFile(tmp_path / "m.gguf")
    np.testing.assert_array_equal(file.metadata["b"], numbers)
    assert (file.metadata["a"], file.metadata["c"]) == ("before" * 1000, "after")
    assert file.metadata["d"].tolist() == [False, True, False]
    t = file.tensors["t"]
    assert file.read_bytes(t.offset, t.nbytes).view("<f4").tolist() == [1.0] * 5


def test_the_parts_of_hostile_files_make_a_good_one(tmp_path):
    file = open_bytes(
        tmp_path, make([tensor("a", (16,)), tensor("b", (4, 2), 1, offset=64)], [ALIGNMENT + u32(64)], 112)
    )
    assert file.tensors["b"].shape == (2, 4)
    assert file.tensors["b"].nbytes == 16
    assert file.metadata == {"general.alignment": 64}


@pytest.mark.parametrize("where", [0.1, 0.5, 0.9, 0.999])
def test_truncated_anywhere(tmp_path, where):
    path = write_llama(tmp_path / "m.gguf", llama_weights())
    data = path.read_bytes()
    with pytest.raises(FormatError, match="truncated"):
        open_bytes(tmp_path, data[: int(len(data) * where)])


def test_truncated_inside_a_vocabulary(tmp_path):
    path = write_vocabulary(tmp_path)
    data = path.read_bytes()
    with pytest.raises(FormatError, match="truncated"):
        open_bytes(tmp_path, data[: len(data) // 2])


def test_damaged_headers_raise_nothing_else(tmp_path):
    """Seeded damage to the head of a whole model: it still reads, or it is one clear line."""
    path = tmp_path / "m.gguf"
    write_llama(path, llama_weights(vocab=261), "Q4_1", configure=add_byte_tokenizer)
    good = path.read_bytes()
    head = min(t.offset for t in GgufFile(path).tensors.values())
    rng = random.Random(0)
    refused = []
    for _ in range(500):
        data, at = bytearray(good), rng.randrange(head)
        kind = rng.randrange(4)
        if kind == 0:
            data[at] = rng.randrange(256)
        elif kind == 1:
            data[at : at + 8] = rng.choice([b"\xff" * 8, bytes(8), struct.pack("<Q", 1 << rng.randrange(63))])
        elif kind == 2:
            del data[at : at + rng.randint(1, 20)]
        else:
            data[at:at] = rng.randbytes(rng.randint(1, 20))
        path.write_bytes(data)
        try:
            with GgufCheckpoint(path) as checkpoint:
                checkpoint.companion_files()
                checkpoint.read("model.layers.0.self_attn.q_proj.weight", slice(0, 3))
        except MlxqError as e:
            refused.append(str(e))
    assert len(refused) > 300
    assert not any("\n" in message for message in refused)


def test_a_directory_is_not_a_file(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read: it is a directory"):
        GgufFile(tmp_path)


def test_a_named_pipe_does_not_wait(tmp_path):
    os.mkfifo(tmp_path / "m.gguf")
    with pytest.raises(CheckpointError, match="cannot be read: it is no regular file"):
        GgufFile(tmp_path / "m.gguf")


def test_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be opened: No such file"):
        GgufFile(tmp_path / "none.gguf")


def write_vocabulary(tmp_path):
    writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "llama")
    # More than one read-ahead of 4 MiB, and one string longer than the fast loop's margin.
    tokens = [f"token {i} " + "é" * (i % 200) for i in range(20_000)] + ["x" * 10_000, ""]
    writer.add_token_list(tokens)
    writer.add_token_scores(list(np.linspace(-5, 5, len(tokens))))
    writer.add_token_types([1] * len(tokens))
    writer.add_array("some.flags", [True, False, True])
    writer.add_int8("some.small", -3)
    writer.add_float64("some.double", 1e300)
    writer.add_uint64("some.large", (1 << 64) - 1)
    writer.add_bool("some.bool", True)
    writer.add_string("some.text", "a\nb — ü")
    add_tensor(writer, "token_embd.weight", np.ones((3, 64), np.float32), "Q8_0")
    add_tensor(writer, "output_norm.weight", np.ones(5, np.float32))
    finish(writer)
    return tmp_path / "m.gguf"


def test_equals_the_reader_of_the_gguf_package(tmp_path):
    path = write_vocabulary(tmp_path)
    ours, theirs = GgufFile(path), gguf.GGUFReader(str(path))
    fields = {k: f.contents() for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
    assert ours.metadata.keys() == fields.keys()
    for key, value in ours.metadata.items():
        if isinstance(value, np.ndarray):
            value = value.tolist()
        assert value == fields[key], key
    assert list(ours.tensors) == [t.name for t in theirs.tensors]
    for t in theirs.tensors:
        mine = ours.tensors[t.name]
        assert mine.shape == tuple(int(n) for n in reversed(t.shape))
        assert (mine.type_name, mine.offset, mine.nbytes) == (t.tensor_type.name, t.data_offset, t.n_bytes)
        np.testing.assert_array_equal(ours.read_bytes(mine.offset, mine.nbytes), t.data.view(np.uint8).reshape(-1))
