"""`tokenizer.*` metadata of a GGUF file from a model's Hugging Face tokenizer files.

llama.cpp tokenizes with what stands here alone, so each key says what the Hugging Face tokenizer does: the ids it puts
around a text, the ends of a turn, the template, verbatim. Sources: `gguf.vocab.SpecialVocab`, llama.cpp's converter,
and `src/llama-vocab.cpp` for what is assumed where a key is absent.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mlxq.checkpoint.gguf.tokens import END_TEXTS
from mlxq.errors import CheckpointError
from mlxq.writers.gguf.tokenizer_files import TokenizerFiles
from mlxq.writers.gguf.vocabulary import Vocabulary, build_vocabulary

#: Special token -> its key; the spelling of the separator's is the format's.
_ID_KEYS = {"bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding", "mask": "mask"}
#: Ends of a turn, and of a message within one, in the order llama.cpp looks for them.
_TURN_ENDS = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endofturn|>", "<EOT>", "_<EOT>", "[EOT]")
_MESSAGE_END = "<|eom_id|>"
_SCALARS = ((bool, "bool"), (float, "float32"), (str, "string"))


def tokenizer_metadata(
    files: dict[str, Path | bytes],
    config: dict[str, Any],
    generation_config: dict[str, Any],
    *,
    vocab_size: int,
    pre: str | None = None,
) -> dict[str, tuple[str, Any]]:
    """Typed metadata of the tokenizer: key -> (kind, value).

    Args:
        files: the model's companion files (`Checkpoint.companion_files`).
        config, generation_config: the model's, for ids that the tokenizer's files do not name.
        vocab_size: rows of the embedding; rows without a token are named `[PAD<row>]` and unused.
        pre: the pre-tokenizer's name where the caller knows it.

    Raises:
        CheckpointError: no tokenizer, one that llama.cpp cannot run with the same ids, an unknown way of splitting, or
            more tokens than rows.
    """
    source = TokenizerFiles(files, config, generation_config)
    vocabulary = build_vocabulary(source, vocab_size, pre)
    metadata: dict[str, tuple[str, Any]] = {
        "tokenizer.ggml.model": ("string", vocabulary.model),
        "tokenizer.ggml.pre": ("string", vocabulary.pre),
        "tokenizer.ggml.tokens": ("string[]", vocabulary.tokens),
    }
    if vocabulary.scores is not None:
        metadata["tokenizer.ggml.scores"] = ("float32[]", vocabulary.scores)
    metadata["tokenizer.ggml.token_type"] = ("int32[]", vocabulary.types)
    if vocabulary.merges is not None:
        metadata["tokenizer.ggml.merges"] = ("string[]", vocabulary.merges)
    ids = {t: i for i, t in enumerate(vocabulary.tokens)}
    special = _special_ids(source, vocabulary, ids)
    around = _begin_and_end(source, special, vocabulary)
    for name, token in (special | _turn_ends(source, special.get("eos"), vocabulary.tokens, ids)).items():
        metadata[f"tokenizer.ggml.{_ID_KEYS.get(name, name)}_token_id"] = ("uint32", token)
    for name, value in (vocabulary.flags | around).items():
        metadata[f"tokenizer.ggml.{name}"] = ("bool", value)
    if vocabulary.charsmap:
        metadata["tokenizer.ggml.precompiled_charsmap"] = ("uint8[]", vocabulary.charsmap)
    return metadata | _templates(source)


def _special_ids(files: TokenizerFiles, vocabulary: Vocabulary, ids: dict[str, int]) -> dict[str, int]:
    found: dict[str, int] = {}
    for name in _ID_KEYS:
        text = files.special_text(name)
        # Begin and end of the classifiers that tokenizers were first made for.
        if text is None and name in ("bos", "eos"):
            text = files.special_text({"bos": "cls", "eos": "sep"}[name])
        if text in ids:
            found[name] = ids[text]
            continue
        for source in (files.config, files.generation_config):
            number = source.get(f"{name}_token_id")
            if isinstance(number, list) and number:
                number = number[0]
            if type(number) is int and 0 <= number < len(vocabulary.tokens):
                found.setdefault(name, number)
    if vocabulary.unk is not None:
        found["unk"] = vocabulary.unk
    return found


def _turn_ends(files: TokenizerFiles, eos: int | None, tokens: list[str], ids: dict[str, int]) -> dict[str, int]:
    """`eot` and `eom`: the ends of generation that llama.cpp must know beside `eos`.

    It knows by their texts those in `END_TEXTS`; any other that the model ends with takes a free key.
    """
    ends = files.generation_config.get("eos_token_id", files.config.get("eos_token_id"))
    ends = [e for e in (ends if isinstance(ends, list) else [ends]) if type(e) is int and 0 <= e < len(tokens)]
    found: dict[str, int] = {}
    candidates = [e for e in ([eos] if eos is not None else []) + ends if tokens[e] in _TURN_ENDS]
    if candidates:
        found["eot"] = candidates[0]
    if _MESSAGE_END in ids:
        found["eom"] = ids[_MESSAGE_END]
    for end in ends:
        if end != eos and end not in found.values() and tokens[end] not in END_TEXTS:
            free = next((key for key in ("eot", "eom") if key not in found), None)
            if free is not None:
                found[free] = end
    return found


def _begin_and_end(files: TokenizerFiles, special: dict[str, int], vocabulary: Vocabulary) -> dict[str, bool]:
    """`add_bos_token` and `add_eos_token`: the setting, else what the post-processor does, else SentencePiece's."""
    known = {"bos": None, "eos": None}
    if files.tokenizer is not None:
        first, last = around(files)
        tokens = vocabulary.tokens
        known["bos"] = first is not None and "bos" in special and tokens[special["bos"]] == first
        known["eos"] = last is not None and "eos" in special and tokens[special["eos"]] == last
    flags = {}
    for name, value in known.items():
        setting = files.flag(f"add_{name}_token")
        value = value if setting is None else setting
        if value is None:
            # transformers' LlamaTokenizer and T5Tokenizer over a SentencePiece model.
            value = name == ("eos" if vocabulary.model == "t5" else "bos")
        if value and name not in special:
            raise CheckpointError(
                f"{files.where('tokenizer_config.json')}: {name.upper()} is put around texts, but no file names it"
            )
        flags[f"add_{name}_token"] = bool(value)
    return flags


def around(files: TokenizerFiles) -> tuple[str | None, str | None]:
    """Texts of the tokens that the post-processor puts before and after one text."""
    first = last = None
    processor = files.tokenizer.get("post_processor") or {}
    for step in processor.get("processors", [processor]):
        if step.get("type") == "TemplateProcessing":
            single = step.get("single") or [{}]
            first = single[0].get("SpecialToken", {}).get("id")
            last = single[-1].get("SpecialToken", {}).get("id")
        elif step.get("type") in ("RobertaProcessing", "BertProcessing"):
            first, last = step["cls"][0], step["sep"][0]
    return first, last


def _templates(files: TokenizerFiles) -> dict[str, tuple[str, Any]]:
    """The chat template and, under their names, further ones."""
    templates = files.chat_templates()
    metadata: dict[str, tuple[str, Any]] = {}
    names = [n for n in templates if n != "default"]
    if names:
        metadata["tokenizer.chat_templates"] = ("string[]", names)
    for name in names:
        metadata[f"tokenizer.chat_template.{name}"] = ("string", templates[name])
    if "default" in templates:
        metadata["tokenizer.chat_template"] = ("string", templates["default"])
    return metadata


def passthrough(metadata: dict[str, Any]) -> dict[str, tuple[str, Any]]:
    """The `tokenizer.*` entries of an opened GGUF file (`GgufFile.metadata`), typed as they were."""
    return {key: typed(value) for key, value in metadata.items() if key.startswith("tokenizer.")}


def typed(value: Any) -> tuple[str, Any]:
    """A value that `GgufFile` read, with its kind; an integer takes the one that readers expect of its size."""
    if type(value) is int:
        return "int32" if value < 0 else "uint32" if value < 1 << 32 else "uint64", value
    if isinstance(value, np.ndarray):
        return f"{value.dtype.newbyteorder('=').name}[]", value
    if isinstance(value, list):
        return "string[]", value
    return next(name for kind, name in _SCALARS if isinstance(value, kind)), value
