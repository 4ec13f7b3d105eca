"""Small tokenizers of every kind, trained in the test, and a GGUF file around the metadata that is made from them."""

from __future__ import annotations

import io
import json
from pathlib import Path

import gguf
from gguf_models import add_tensor, finish, gguf_name, llama_weights, new_writer, permute
from gguf_texts import TEXTS, fuzz

from mlxq.writers.gguf.tokenizer import tokenizer_metadata

SPECIAL = ["<unk>", "<s>", "</s>"]
SPLIT = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}%s| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|"
SPLIT += "\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
LLAMA3, QWEN2 = SPLIT % "{1,3}", SPLIT % ""


def corpus() -> list[str]:
    """Sentences for training: no null bytes, which end a text for SentencePiece, and no marks, which llama.cpp takes
    for special tokens wherever a vocabulary has them."""
    return [t for t in TEXTS + fuzz(400) if t.strip() and "\0" not in t and ">" not in t]


def write_gguf(path: Path, metadata: dict, vocab: int) -> Path:
    """A llama of one layer with this metadata."""
    writer = new_writer(path, layers=1)
    for key, (kind, value) in metadata.items():
        array = kind.endswith("[]")
        element = gguf.GGUFValueType[kind.removesuffix("[]").upper()]
        if array:
            writer.add_key_value(key, value, gguf.GGUFValueType.ARRAY, element)
        else:
            writer.add_key_value(key, value, element)
    for name, w in llama_weights(layers=1, vocab=vocab).items():
        heads = 4 if ".q_proj." in name else 2 if ".k_proj." in name else 0
        add_tensor(writer, gguf_name(name), permute(w, heads) if heads else w)
    finish(writer)
    return path


def metadata_of(tokenizer, settings: dict | None = None, vocab: int | None = None, **options) -> dict:
    """Of a `tokenizers.Tokenizer` and the content of tokenizer_config.json."""
    files = {
        "tokenizer.json": tokenizer.to_str().encode()
        if hasattr(tokenizer, "to_str")
        else json.dumps(tokenizer).encode(),
        "tokenizer_config.json": json.dumps(settings or {}).encode(),
    }
    size = vocab or tokenizer.get_vocab_size()
    return tokenizer_metadata(files, {}, options.pop("generation_config", {}), vocab_size=size, **options)


def byte_level(patterns: list[str], ignore_merges: bool = False, added: list[str] = (), bos: bool = False):
    """Byte-level BPE whose text is cut by these expressions, trained across every boundary so that cuts show."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=2500,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=8,
        special_tokens=["<|begin|>", "<|end|>"],
        show_progress=False,
    )
    trained.train_from_iterator(corpus(), trainer)
    content = json.loads(trained.to_str())
    content["model"]["ignore_merges"] = ignore_merges
    tokenizer = Tokenizer.from_str(json.dumps(content))
    splits = [pre_tokenizers.Split(Regex(p), "isolated") for p in patterns]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not patterns)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in added])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", tokenizer.token_to_id("<|begin|>"))]
        )
    return tokenizer


def sentencepiece_model(kind: str, **options) -> bytes:
    """A trained model file, `bpe` or `unigram`, with byte fallback."""
    import sentencepiece

    model = io.BytesIO()
    settings = {
        "vocab_size": 1500,
        "byte_fallback": True,
        "character_coverage": 0.985,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "hard_vocab_limit": False,
        "user_defined_symbols": ["<tag>"],
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()), model_writer=model, model_type=kind, **settings | options
    )
    return model.getvalue()
