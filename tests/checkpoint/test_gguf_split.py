"""Split GGUF files: parts as one source whatever wrote them, and one clear error where they do not belong together."""

import shutil

import gguf
import numpy as np
import pytest
from gguf_models import HEADS, KV_HEADS, add_byte_tokenizer, add_tensor, gguf_name, llama_weights, new_writer, permute

from mlxq.checkpoint.gguf.checkpoint import GgufCheckpoint
from mlxq.checkpoint.gguf.file import GgufFile
from mlxq.checkpoint.gguf.split import GgufParts, open_gguf
from mlxq.checkpoint.source import open_checkpoint
from mlxq.errors import CheckpointError, FormatError, MlxqError

VOCAB = 261
PARTS = 4


def write(path, max_tensors=6, small_first=False, change=None, seed=0):
    """A llama with its tokenizer; `max_tensors` a part, or 0 for one file. `change(writer)` may alter the parts."""
    writer = new_writer(path)
    writer.split_max_tensors = max_tensors
    if small_first:
        writer.small_first_shard = True
        writer.tensors.append({})
    add_byte_tokenizer(writer)
    for name, w in llama_weights(seed, vocab=VOCAB).items():
        heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.split(".")[-2])
        add_tensor(writer, gguf_name(name), permute(w, heads) if heads else w, "Q8_0" if w.ndim > 1 else "F32")
    if change is not None:
        add_keys = writer.add_shard_kv_data
        writer.add_shard_kv_data = lambda: (add_keys(), change(writer))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(path.parent.glob(f"{path.stem}-*-of-*.gguf")) or [path]


@pytest.fixture
def parts(tmp_path):
    return write(tmp_path / "m.gguf")


@pytest.mark.parametrize("small_first", [False, True], ids=["plain", "metadata in a part of its own"])
@pytest.mark.parametrize("opened", [0, 1, -1])
def test_any_part_opens_the_whole(tmp_path, opened, small_first):
    (whole,) = write(tmp_path / "whole.gguf", 0)
    parts = write(tmp_path / "m.gguf", small_first=small_first)
    assert len(parts) == PARTS + small_first
    one, several = GgufFile(whole), open_gguf(parts[opened])
    assert several.path == parts[0]
    assert several.files == parts
    assert several.metadata.keys() == one.metadata.keys()
    assert list(several.tensors) == list(one.tensors)
    for name, a in one.tensors.items():
        b = several.tensors[name]
        assert (a.shape, a.type_name, a.row_bytes, a.nbytes) == (b.shape, b.type_name, b.row_bytes, b.nbytes)
        np.testing.assert_array_equal(
            one.read_bytes(a.offset + 4, a.nbytes - 4), several.read_bytes(b.offset + 4, b.nbytes - 4)
        )
    several.close()
    with pytest.raises(CheckpointError, match="read after close"):
        several.read_bytes(b.offset, 1)


@pytest.mark.parametrize("opened", [0, 2])
def test_a_checkpoint_of_parts(tmp_path, opened):
    (whole,) = write(tmp_path / "whole.gguf", 0)
    parts = write(tmp_path / "m.gguf")
    with GgufCheckpoint(whole) as one, open_checkpoint(parts[opened]) as several:
        assert several.files() == parts
        assert several.path == parts[0]
        assert several.config == one.config
        assert several.tensors == one.tensors
        assert several.companion_files() == one.companion_files()
        for name in one.tensors:
            np.testing.assert_array_equal(several.read(name), one.read(name))
        rows = slice(5, 23)
        name = "model.layers.1.self_attn.k_proj.weight"
        np.testing.assert_array_equal(several.read(name, rows), one.read(name, rows))


def test_llama_cpp_reads_the_same_parts(tmp_path):
    pytest.importorskip("xllamacpp", reason="xllamacpp, llama.cpp's server, is not installed")
    from llamacpp import LlamaCpp

    parts = write(tmp_path / "m.gguf")
    (whole,) = write(tmp_path / "whole.gguf", 0)
    ids = [5, 9, 70, 33]
    assert LlamaCpp(parts[0]).logprobs(ids, 5) == LlamaCpp(whole).logprobs(ids, 5)


def test_one_part_is_no_split(tmp_path):
    """`split.count` of 1, or 0, which some writers leave."""
    for count in (0, 1):
        path = tmp_path / f"{count}.gguf"
        writer = gguf.GGUFWriter(str(path), "llama")
        writer.add_key_value("split.count", count, gguf.GGUFValueType.UINT16)
        add_tensor(writer, "t", np.ones(4, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        assert isinstance(open_gguf(path), GgufFile)


@pytest.mark.parametrize("lost", [0, 1, 3])
def test_a_missing_part_is_named(parts, lost):
    parts[lost].unlink()
    with pytest.raises(CheckpointError, match=rf"{parts[lost].name}: this part is missing, 1 of 4 in all"):
        open_gguf(parts[(lost + 1) % PARTS])


def test_renamed_parts_are_refused_with_the_name_they_need(parts):
    other = parts[0].rename(parts[0].with_name("model.gguf"))
    with pytest.raises(FormatError, match=r"one of 4 parts of a split GGUF, but .* end in -00001-of-00004"):
        open_gguf(other)
    other = other.rename(other.with_name("m-00001-of-00009.gguf"))
    with pytest.raises(FormatError, match=r"split.count is 4: .* end in -00001-of-00004"):
        open_gguf(other)


def test_swapped_parts(parts):
    spare = parts[1].with_name("spare")
    parts[1].rename(spare)
    parts[2].rename(parts[1])
    spare.rename(parts[2])
    with pytest.raises(FormatError, match=r"m-00002-of-00004.gguf: split.no is 2, but its name says 1"):
        open_gguf(parts[0])


def test_a_part_of_another_split(tmp_path, parts):
    other = write(tmp_path / "other.gguf", 4)
    shutil.copy(other[1], parts[1])
    with pytest.raises(FormatError, match=r"m-00002-of-00004.gguf: split.count is 5, but its name says 4"):
        open_gguf(parts[0])


def set_value(part, key, value, kind="UINT16"):
    def change(writer):
        writer.kv_data[part][key] = gguf.gguf_writer.GGUFValue(value, gguf.GGUFValueType[kind])

    return change


def rename_tensor(writer):
    """The second part's first tensor takes the name of one of the first part."""
    names = [list(t) for t in writer.tensors]
    writer.tensors[1] = {names[0][0] if n == names[1][0] else n: t for n, t in writer.tensors[1].items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            set_value(0, "split.tensors.count", 19, "INT32"),
            "00002-of-00004.gguf: 'split.tensors.count' is 20, but 19",
        ),
        (set_value(0, "split.count", "4", "STRING"), "split.count is '4', expected an integer from 0 to 65535"),
        (set_value(0, "split.count", -4, "INT32"), "split.count is -4, expected an integer from 0 to 65535"),
        (set_value(0, "split.count", 1 << 40, "UINT64"), "split.count is 1099511627776, expected an integer"),
        (set_value(1, "split.no", 3), "00002-of-00004.gguf: split.no is 3, but its name says 1"),
        (set_value(0, "split.no", 1), "00001-of-00004.gguf: split.no is 1, but its name says 0"),
        (set_value(1, "split.no", True, "BOOL"), "split.no is True, expected an integer from 0"),
        (set_value(2, "split.count", 5), "00003-of-00004.gguf: split.count is 5, but its name says 4"),
        (
            set_value(3, "split.tensors.count", 7, "INT32"),
            "'split.tensors.count' is 7, but 20 in m-00001-of-",
        ),
        (
            set_value(2, "general.architecture", "gpt2", "STRING"),
            "'general.architecture' is 'gpt2', but 'llama' in m",
        ),
        (rename_tensor, "00002-of-00004.gguf: tensor 'token_embd.weight' is in m-00001-of-00004.gguf too"),
    ],
)
def test_parts_that_contradict_one_another(tmp_path, change, message):
    parts = write(tmp_path / "m.gguf", change=change)
    with pytest.raises(FormatError, match=message) as caught:
        open_gguf(parts[0])
    assert "\n" not in str(caught.value)


def test_tensors_are_counted(tmp_path):
    def change(writer):
        for part in range(PARTS):
            set_value(part, "split.tensors.count", 21, "INT32")(writer)

    parts = write(tmp_path / "m.gguf", change=change)
    with pytest.raises(FormatError, match=r"split\.tensors\.count is 21, but the 4 parts have 20"):
        open_gguf(parts[0])


def test_a_truncated_part_is_named(parts):
    parts[2].write_bytes(parts[2].read_bytes()[:-100])
    with pytest.raises(FormatError, match=r"m-00003-of-00004.gguf: tensor '.*' ends at byte .* truncated"):
        open_gguf(parts[0])


def test_nothing_stays_open_after_an_error(parts, monkeypatch):
    opened = []
    start = GgufFile.__init__
    monkeypatch.setattr(GgufFile, "__init__", lambda self, path: (opened.append(self), start(self, path))[1])
    parts[3].write_bytes(b"no part")
    with pytest.raises(MlxqError):
        GgufParts(parts)
    assert len(opened) == PARTS
    assert all(file._fd == -1 for file in opened)
