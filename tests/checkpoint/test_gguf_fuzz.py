"""Fuzzing of GGUF heads: whatever the bytes, a file opens or it is refused in one line, soon, and in little memory."""

import struct
import tempfile
import time
import tracemalloc
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from gguf_bytes import make, of_type, string, tensor, u32, u64
from gguf_models import add_byte_tokenizer, add_tensor, finish, llama_weights, new_writer, write_llama
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlxq.calibration.imatrix import ImportanceMatrix, Sums
from mlxq.checkpoint.gguf.checkpoint import GgufCheckpoint
from mlxq.checkpoint.gguf.file import GgufFile
from mlxq.checkpoint.gguf.header import Header
from mlxq.checkpoint.gguf.split import open_gguf
from mlxq.errors import MlxqError

fuzz = settings(
    max_examples=400,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)

#: Numbers at the edges of types, sizes that wrap, and small ones that stand for other fields.
EDGES = [0, 1, 2, 3, 4, 8, 9, 12, 13, 31, 32, 33, 255, 256, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1]
WIDE = [*EDGES, 1 << 32, (1 << 40) + 1, 1 << 60, (1 << 63) - 1, 1 << 63, (1 << 64) - 32, (1 << 64) - 1]
numbers32 = st.sampled_from(EDGES) | st.integers(0, (1 << 32) - 1)
numbers64 = st.sampled_from(WIDE) | st.integers(0, (1 << 64) - 1)
#: Names that readers ask for, and others.
KEYS = ["general.architecture", "general.alignment", "general.type", "split.count", "split.no", "split.tensors.count"]
KEYS += ["llama.block_count", "llama.attention.head_count", "tokenizer.ggml.model", "tokenizer.ggml.tokens", "k"]


def attempt(path, read, data: bytes, allowance: int) -> bool:
    """Write `data` and `read` it: it may raise an MlxqError of one short line, and no more than that may happen.

    Returns whether it was refused. `allowance` is what reading may allocate beside twice the file's size.
    """
    path.write_bytes(data)
    message = ""
    tracemalloc.start()
    began = time.thread_time()
    try:
        read(path)
    except MlxqError as e:
        message = str(e)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert time.thread_time() - began < 1
    assert "\n" not in message
    assert len(message) < 1000 + len(str(path))
    assert peak < 2 * len(data) + allowance
    return bool(message)


def read_container(path):
    file = open_gguf(path)
    for t in file.tensors.values():
        assert file.read_bytes(t.offset, t.nbytes).size == t.nbytes
    file.close()


def read_checkpoint(path):
    with GgufCheckpoint(path) as checkpoint:
        checkpoint.companion_files()
        for name in checkpoint.tensors:
            checkpoint.read(name, slice(0, 2))


@st.composite
def damage(draw, size: int):
    """Edits of the first `size` bytes: (position, bytes taken away, bytes put there)."""
    edits = []
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, size - 1))
        kind = draw(st.sampled_from(["byte", "u32", "u64", "delete", "insert", "swap"]))
        if kind == "byte":
            edits.append((at, 1, bytes([draw(st.integers(0, 255))])))
        elif kind == "u32":
            edits.append((at, 4, struct.pack("<I", draw(numbers32))))
        elif kind == "u64":
            edits.append((at, 8, struct.pack("<Q", draw(numbers64))))
        elif kind == "delete":
            edits.append((at, draw(st.integers(1, 64)), b""))
        elif kind == "insert":
            edits.append((at, 0, draw(st.binary(min_size=1, max_size=32))))
        else:
            edits.append((at, 0, draw(st.sampled_from(KEYS)).encode()))
    return edits


def damaged(good: bytes, edits) -> bytes:
    data = bytearray(good)
    for at, n, put in edits:
        data[at : at + n] = put
    return bytes(data)


@cache
def whole_model(vocabulary: bool) -> tuple[bytes, int]:
    """A model that opens and the size of its head; with a vocabulary, most of the head is that."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "m.gguf"
        configure = add_byte_tokenizer if vocabulary else None
        write_llama(path, llama_weights(layers=1, vocab=261), "Q4_1", configure=configure)
        head = min(t.offset for t in GgufFile(path).tensors.values())
        read_checkpoint(path)
        return path.read_bytes(), head


@pytest.mark.slow
@pytest.mark.parametrize("vocabulary", [False, True], ids=["numbers", "vocabulary"])
def test_damaged_models(tmp_path, vocabulary):
    good, head = whole_model(vocabulary)
    refused = []

    @fuzz
    @given(damage(head))
    def run(edits):
        data = damaged(good, edits)
        container = attempt(tmp_path / "m.gguf", read_container, data, 1 << 20)
        # What the container refuses, the checkpoint does too.
        refused.append(attempt(tmp_path / "m.gguf", read_checkpoint, data, 32 << 20))
        assert refused[-1] or not container

    run()
    # The damage is neither so slight nor so great that one outcome is never seen.
    assert {True, False} <= set(refused)


@pytest.mark.parametrize("name", ["m.gguf", "m.dat"])
def test_damaged_importance_matrices(tmp_path, name):
    sums = Sums(np.ones((2, 8), np.float32), np.ones(2, np.float32))
    ImportanceMatrix({"blk.0.ffn_down_exps.weight": sums, "b": sums}, ("text",)).write(tmp_path / name)
    good = (tmp_path / name).read_bytes()

    @fuzz
    @given(damage(len(good)))
    def run(edits):
        attempt(tmp_path / name, ImportanceMatrix.read, damaged(good, edits), 1 << 20)

    run()


def test_damaged_parts(tmp_path):
    """One part of a split file is damaged; the others are good."""
    writer = new_writer(tmp_path / "m.gguf")
    writer.split_max_tensors = 2
    for i in range(4):
        add_tensor(writer, f"t{i}", np.ones(8, np.float32))
    finish(writer)
    paths = sorted(tmp_path.glob("m-*.gguf"))
    good = [p.read_bytes() for p in paths]

    @fuzz
    @given(st.integers(0, 1), damage(len(good[1])))
    def run(which, edits):
        paths[1 - which].write_bytes(good[1 - which])
        attempt(paths[which], read_container, damaged(good[which], edits), 1 << 20)

    run()


texts = st.sampled_from(KEYS) | st.text(max_size=8)
strings = texts.map(string) | st.builds(lambda n, b: u64(n) + b, numbers64, st.binary(max_size=16))
scalars = st.builds(lambda kind, b: u32(kind) + b, numbers32 | st.integers(0, 13), st.binary(max_size=12))
arrays = st.builds(
    lambda kind, count, parts: u32(9) + u32(kind) + u64(count) + b"".join(parts),
    st.integers(0, 13),
    numbers64 | st.integers(0, 3),
    st.lists(strings | st.binary(max_size=16), max_size=3),
)
values = scalars | arrays | strings.map(lambda s: u32(8) + s)
entries = st.builds(lambda key, value: key + value, strings, values)
sound_entries = st.builds(lambda key, n: of_type(4, key) + u32(n), texts, numbers32)
directory = st.builds(
    lambda name, dims, kind, offset: tensor(name, dims, kind, offset),
    st.sampled_from(["a", "b", "token_embd.weight", ""]),
    st.lists(numbers64 | st.sampled_from([1, 2, 32, 256]), max_size=5).map(tuple),
    st.integers(0, 42) | numbers32,
    st.sampled_from([0, 32, 64, 1 << 20]) | numbers64,
)


@cache
def parts_of_model() -> tuple[dict[str, bytes], bytes, bytes, bytes]:
    """A model with a vocabulary in parts: metadata entries by key, the count of tensors and their directory, data."""
    good, head = whole_model(True)
    header = Header(Path("m.gguf"), len(good), lambda at, n: np.frombuffer(good[at : at + n], np.uint8))
    header.take(8, "magic and version")
    n_tensors, n_entries = header.u64("tensors"), header.u64("entries")
    entries = {}
    for _ in range(n_entries):
        start = header.position
        key = header.string("key")
        header.value(key)
        entries[key] = good[start : header.position]
    start = header.position
    for _ in range(n_tensors):
        header.string("name")
        header.take(8 * header.u32("dimensions") + 4 + 8, "shape, type and offset")
    return entries, u64(n_tensors), good[start : header.position], good[head:]


def typed(kind: int, data: bytes) -> bytes:
    return u32(kind) + data


def array(kind: int, items: list[bytes]) -> bytes:
    return typed(9, u32(kind) + u64(len(items)) + b"".join(items))


floats = st.floats(width=32).map(lambda x: struct.pack("<f", x))
#: Values as a writer makes them, of every type, that need not be what the key is for.
sound_values = (
    numbers32.map(lambda n: typed(4, u32(n)))
    | numbers64.map(lambda n: typed(10, u64(n)))
    | st.integers(-3, 3).map(lambda n: typed(5, struct.pack("<i", n)))
    | floats.map(lambda b: typed(6, b))
    | st.sampled_from([b"\0", b"\1"]).map(lambda b: typed(7, b))
    | st.text(max_size=12).map(lambda t: typed(8, string(t.encode("utf-8", "replace"))))
    | st.sampled_from("a\n").map(lambda c: typed(8, string(c * 9999)))
    | st.lists(numbers32.map(u32), max_size=3).map(lambda a: array(4, a))
    | st.integers(259, 263).map(lambda n: array(5, [u32(1)] * n))
    | st.integers(-2, 9).map(lambda k: array(5, [struct.pack("<i", k)] * 261))
    | st.lists(floats, max_size=3).map(lambda a: array(6, a))
    | floats.map(lambda b: array(6, [b] * 261))
    | st.lists(st.text(max_size=3).map(lambda t: string(t.encode("utf-8", "replace"))), max_size=3).map(
        lambda a: array(8, a)
    )
    | st.sampled_from("a\n").map(lambda c: array(8, [string(c * 9999)] * 261))
    | st.text(max_size=3).map(lambda t: array(8, [string(f"{t}{i}".encode("utf-8", "replace")) for i in range(261)]))
)
NAMES = ["llama", "t5", "gpt2", "bert", "none", "linear", "yarn", "longrope", "phi3", "gemma3", "mamba"]
sound_values |= st.sampled_from(NAMES).map(lambda t: typed(8, string(t)))
MORE_KEYS = [f"tokenizer.ggml.{n}" for n in ("scores", "add_bos_token", "eot_token_id", "precompiled_charsmap", "pre")]
MORE_KEYS += ["tokenizer.chat_template", "llama.rope.scaling.type", "llama.rope.scaling.factor", "llama.expert_count"]
MORE_KEYS += ["llama.attention.key_length", "llama.attention.sliding_window", "general.name", "llama.vocab_size"]


@pytest.mark.slow
def test_metadata_of_any_type(tmp_path):
    """A sound container: what is refused is refused by those who use the values."""
    good, n_tensors, directory, data = parts_of_model()
    refused = []

    @fuzz
    @given(st.dictionaries(st.sampled_from([*good, *MORE_KEYS]), st.none() | sound_values, min_size=1, max_size=3))
    def run(changes):
        entries = good | {k: v if v is None else string(k) + v for k, v in changes.items()}
        present = [e for e in entries.values() if e is not None]
        head = b"GGUF" + u32(3) + n_tensors + u64(len(present)) + b"".join(present) + directory
        content = head + bytes(-len(head) % 32) + data
        refused.append(attempt(tmp_path / "m.gguf", read_checkpoint, content, 32 << 20))

    run()
    assert {True, False} <= set(refused)


@pytest.mark.slow
def test_heads_made_of_well_formed_nonsense(tmp_path):
    @fuzz
    @given(
        st.lists(entries | sound_entries, max_size=4),
        st.lists(directory, max_size=4),
        st.none() | numbers64,
        st.none() | numbers64,
        st.sampled_from([2, 3, 3, 3, 1, 0x03000000]),
    )
    def run(head, tensors, n_tensors, n_entries, version):
        data = make(tensors, head, 512, version, n_tensors=n_tensors, n_entries=n_entries)
        for read in (read_container, read_checkpoint, ImportanceMatrix.read):
            attempt(tmp_path / "m.gguf", read, data, 1 << 20)

    run()


def test_bytes(tmp_path):
    @fuzz
    @given(st.binary(max_size=400), st.booleans())
    def run(data, magic):
        data = b"GGUF\x03\0\0\0" + data if magic else data
        attempt(tmp_path / "m.gguf", read_container, data, 1 << 20)
        attempt(tmp_path / "m.gguf", ImportanceMatrix.read, data, 1 << 20)

    run()
