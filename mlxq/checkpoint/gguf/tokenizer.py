"""A Hugging Face tokenizer from a GGUF file's metadata, with the ids that llama.cpp gives.

Three kinds are built. Byte-level BPE (`tokenizer.ggml.model = gpt2`), here: the pre-tokenizer's expressions, then
merges by rank over byte symbols. SentencePiece BPE (`llama`) and unigram (`t5`): `gguf_sentencepiece`.
"""

from __future__ import annotations

import json
from typing import Any

from mlxq.checkpoint.config import to_json
from mlxq.checkpoint.gguf.config import build_generation_config
from mlxq.checkpoint.gguf.metadata import Metadata
from mlxq.checkpoint.gguf.pretokenizers import pre_tokenizer
from mlxq.checkpoint.gguf.sentencepiece import sentencepiece_bpe, unigram
from mlxq.checkpoint.gguf.vocabulary import Vocabulary, bpe_model, tokenizer_json
from mlxq.checkpoint.safetensors import quoted
from mlxq.errors import CheckpointError

#: In tokenizer_config.json: what a GGUF file says and a Hugging Face tokenizer has no place for.
SOURCE_KEY = "gguf_source"


def build_tokenizer_files(metadata: Metadata, vocab_size: int) -> dict[str, bytes]:
    """`tokenizer.json`, `tokenizer_config.json`, `generation_config.json` and, where the file has one,
    `chat_template.jinja`; empty when the file has no vocabulary.

    Args:
        metadata: of the file.
        vocab_size: rows of the embedding, which token ids must not exceed.

    Raises:
        CheckpointError: a tokenizer model or pre-tokenizer that is not supported, or a vocabulary that is
            inconsistent.
    """
    values = metadata.values
    kind = metadata.text("tokenizer.ggml.model")
    if kind is None or kind in ("none", "no_vocab"):
        return {}
    if kind not in _BUILDERS:
        name = "WordPiece (tokenizer.ggml.model 'bert')" if kind == "bert" else f"tokenizer.ggml.model {quoted(kind)}"
        raise CheckpointError(
            f"{metadata.path}: {name} is not supported; supported are gpt2 (byte-level BPE), llama (SentencePiece BPE) "
            "and t5 (SentencePiece unigram)"
        )
    vocabulary = Vocabulary(metadata, vocab_size)
    tokenizer = _BUILDERS[kind](vocabulary)
    files = {
        "tokenizer.json": json.dumps(tokenizer, ensure_ascii=False).encode(),
        "tokenizer_config.json": to_json(_tokenizer_config(vocabulary)).encode(),
        "generation_config.json": to_json(build_generation_config(metadata, vocab_size)).encode(),
    }
    template = values.get("tokenizer.chat_template")
    if isinstance(template, str) and template:
        files["chat_template.jinja"] = template.encode()
    return files


def _byte_level(vocabulary: Vocabulary) -> dict[str, Any]:
    pre = pre_tokenizer(vocabulary.pre, vocabulary.path)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    splits = [{"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False} for p in pre.patterns]
    return tokenizer_json(
        vocabulary,
        vocabulary.begin_and_end(pre.add_bos),
        pre_tokenizer={"type": "Sequence", "pretokenizers": [*splits, byte_level]},
        decoder=byte_level,
        model=bpe_model(vocabulary, vocabulary.merges(), ignore_merges=pre.ignore_merges),
    )


_BUILDERS = {"gpt2": _byte_level, "llama": sentencepiece_bpe, "t5": unigram}


def _tokenizer_config(vocabulary: Vocabulary) -> dict[str, Any]:
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        SOURCE_KEY: {"pre": vocabulary.pre or "default"},
    }
    for name in ("bos", "eos", "unk", "pad"):
        token = getattr(vocabulary, name)
        if token is not None:
            config[f"{name}_token"] = vocabulary.tokens[token]
    arch = vocabulary.values.get("general.architecture")
    context = vocabulary.values.get(f"{arch}.context_length")
    if isinstance(context, int):
        config["model_max_length"] = context
    return config
