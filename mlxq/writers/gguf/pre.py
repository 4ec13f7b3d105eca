"""The name under which llama.cpp knows how a byte-level tokenizer splits text (`tokenizer.ggml.pre`)."""

from __future__ import annotations

import hashlib
import json

from mlxq.checkpoint.gguf.pretokenizers import PRE_TOKENIZERS, names_splitting, splits_of
from mlxq.checkpoint.gguf.tokenizer import SOURCE_KEY
from mlxq.errors import CheckpointError
from mlxq.writers.gguf.pre_hashes import CHECK_TEXT, NAMES
from mlxq.writers.gguf.tokenizer_files import TokenizerFiles


def pre_name(files: TokenizerFiles, asked: str | None = None) -> str:
    """The name, never guessed.

    In order: `asked`; of the names whose expressions are exactly the tokenizer's, the one that the GGUF file had which
    the tokenizer was made from, or the one that the hash of the ids gives, or the usual one; else the name that the
    hash gives. Expressions come first because a vocabulary can give the check's text the same ids under two ways of
    splitting: SmolLM2's has no merges across digits.

    Raises:
        CheckpointError: none of these gives one.
    """
    known = sorted(PRE_TOKENIZERS.keys() | set(NAMES.values()))
    if asked is not None:
        if asked not in known:
            raise CheckpointError(f"--pre {asked!r} is no pre-tokenizer of llama.cpp; it knows {', '.join(known)}")
        return asked
    splits = splits_of(files.tokenizer.get("pre_tokenizer"))
    names = names_splitting(splits, bool(files.tokenizer["model"].get("ignore_merges"))) if splits is not None else []
    source = files.settings.get(SOURCE_KEY)
    if isinstance(source, dict) and source.get("pre") in names:
        return source["pre"]
    by_hash = hashed_name(files)
    if by_hash is not None and (by_hash in names or not names):
        return by_hash
    if names:
        return names[0]
    raise CheckpointError(
        f"{files.where('tokenizer.json')}: llama.cpp has no name for the way this tokenizer splits text: the hash of "
        "its ids is not in the converter's table and its expressions are none that llama.cpp runs; --pre NAME decides"
    )


def hashed_name(files: TokenizerFiles) -> str | None:
    """The converter's name for a tokenizer with these ids, with or without its begin of text; None when unknown.

    Raises:
        CheckpointError: the `tokenizers` package cannot read the tokenizer.
    """
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(json.dumps(files.tokenizer))
    # The package raises plain Exceptions.
    except Exception as e:
        raise CheckpointError(f"{files.where('tokenizer.json')}: cannot be read by `tokenizers`: {e}") from e
    plain = tokenizer.encode(CHECK_TEXT, add_special_tokens=False).ids
    begin = files.special_text("bos")
    bos = tokenizer.token_to_id(begin) if begin else None
    tried = [tokenizer.encode(CHECK_TEXT).ids, plain, [bos, *plain]]
    digests = (hashlib.sha256(str(ids).encode()).hexdigest() for ids in tried)
    return next((NAMES[d] for d in digests if d in NAMES), None)
