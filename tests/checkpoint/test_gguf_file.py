"""The GGUF container: equal to gguf's own reader on good files, one clear error for each kind of bad one."""

import random
import struct
import tracemalloc

import gguf
import numpy as np
import pytest
from gguf_models import add_byte_tokenizer, add_tensor, finish, llama_weights, write_llama

from mlxq.checkpoint.gguf import GgufCheckpoint
from mlxq.checkpoint.gguf_file import GgufFile
from mlxq.errors import CheckpointError


def u32(n: int) -> bytes:
    return struct.pack("<I", n)


def u64(n: int) -> bytes:
    return struct.pack("<Q", n)


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return u64(len(data)) + data


def tensor(name="t", dims=(4,), kind=0, offset=0) -> bytes:
    return string(name) + u32(len(dims)) + b"".join(map(u64, dims)) + u32(kind) + u64(offset)


def make(tensors=(), entries=(), data=64, version=3, magic=b"GGUF", n_tensors=None, n_entries=None) -> bytes:
    """A file from its parts; `data` bytes follow the padded header."""
    head = magic + u32(version)
    head += u64(len(tensors) if n_tensors is None else n_tensors)
    head += u64(len(entries) if n_entries is None else n_entries)
    head += b"".join(entries) + b"".join(tensors)
    return head + b"\0" * (-len(head) % 32) + bytes(data)


def open_bytes(tmp_path, data: bytes) -> GgufFile:
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    return GgufFile(path)


ALIGNMENT = string("general.alignment") + u32(4)

HOSTILE = {
    "empty file": (b"", "the header asks for byte 4, but the file has 0"),
    "not gguf": (b"PK\x03\x04" + bytes(60), "not a GGUF file"),
    "version 1": (make(version=1), "GGUF version 1: versions 2 and 3 are supported"),
    "big-endian": (make(version=0x03000000), r"GGUF version 50331648 \(a big-endian file\?\)"),
    "cut in the counts": (make()[:20], "the header asks for byte 24, but the file has 20"),
    "absurd tensors": (make(n_tensors=1 << 62), r"4611686018427387904 tensors need at least \d+ bytes"),
    "absurd metadata": (make(n_entries=1 << 40), "1099511627776 metadata entries need at least"),
    "key longer than file": (make(entries=[u64(1 << 50)]), "the header asks for byte .* truncated or not GGUF"),
    "string longer than file": (make(entries=[string("k") + u32(8) + u64(1 << 63)]), "the header asks for byte"),
    "absurd strings": (
        make(entries=[string("k") + u32(9) + u32(8) + u64(1 << 45)]),
        "35184372088832 strings in 'k' need at least",
    ),
    "absurd numbers": (
        make(entries=[string("k") + u32(9) + u32(5) + u64(1 << 45)]),
        "35184372088832 numbers in 'k' need at least",
    ),
    "nested array": (
        make(entries=[string("k") + u32(9) + u32(9) + u64(1)]),
        "'k' is an array of the unsupported type 9",
    ),
    "unknown value type": (make(entries=[string("k") + u32(99)]), "'k' has the unknown value type 99"),
    "key not text": (make(entries=[string(b"\xff\xfe") + u32(0) + b"\0"]), "a metadata key is not UTF-8"),
    "value not text": (make(entries=[string("k") + u32(8) + string(b"\xff")]), "'k' is not UTF-8"),
    "repeated key": (make(entries=[string("k") + u32(0) + b"\1"] * 2), "metadata key 'k' appears twice"),
    "alignment zero": (make(entries=[ALIGNMENT + u32(0)]), "general.alignment is 0, expected a power of two"),
    "alignment odd": (make(entries=[ALIGNMENT + u32(48)]), "general.alignment is 48"),
    "alignment text": (
        make(entries=[string("general.alignment") + u32(8) + string("x")]),
        "general.alignment is 'x'",
    ),
    "no dimensions": (make([tensor(dims=())]), "'t' has 0 dimensions, expected 1 to 4"),
    "many dimensions": (make([tensor(dims=(1,) * 9)]), "'t' has 9 dimensions"),
    "empty shape": (make([tensor(dims=(4, 0))]), r"impossible shape \[0, 4\]"),
    "huge shape": (make([tensor(dims=(1 << 40, 1 << 40))]), "'t' has an impossible shape"),
    "unknown type": (make([tensor(kind=77)]), "'t' has the unknown ggml type 77"),
    "partial block": (make([tensor(dims=(33,), kind=3)]), "Q4_1 packs blocks of 32 weights, but its rows have 33"),
    "unaligned": (make([tensor(offset=4)]), "offset 4 is not a multiple of the alignment 32"),
    "past the end": (make([tensor(dims=(17,))]), r"'t' ends at byte 132, but the file has 128: it is truncated"),
    "offset past the end": (make([tensor(offset=1 << 62)]), "'t' ends at byte .* but the file has"),
    "repeated tensor": (make([tensor(), tensor(offset=32)]), "tensor 't' appears twice"),
    "overlap": (
        make([tensor("a", (16,)), tensor("b", offset=32)], data=128),
        "tensors 'a' and 'b' overlap",
    ),
    "same place": (make([tensor("a"), tensor("b")]), "tensors 'a' and 'b' overlap"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile(tmp_path, case):
    data, message = HOSTILE[case]
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=message) as caught:
            open_bytes(tmp_path, data)
        # Nothing of the size the file claims was allocated.
        assert tracemalloc.get_traced_memory()[1] < 4e6
    finally:
        tracemalloc.stop()
    text = str(caught.value)
    assert str(tmp_path / "m.gguf") in text
    assert "\n" not in text


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
    with pytest.raises(CheckpointError, match="truncated"):
        open_bytes(tmp_path, data[: int(len(data) * where)])


def test_truncated_inside_a_vocabulary(tmp_path):
    path = write_vocabulary(tmp_path)
    data = path.read_bytes()
    with pytest.raises(CheckpointError, match="truncated"):
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
        except CheckpointError as e:
            refused.append(str(e))
    assert len(refused) > 300
    assert not any("\n" in message for message in refused)


def test_a_directory_is_not_a_file(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read: Is a directory"):
        GgufFile(tmp_path)


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
