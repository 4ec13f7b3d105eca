"""The text of the proof: `sample.txt`, written for this project, as token sequences.

It has prose, code, dialogue, mathematics and nine languages, one section each. Every section is one sequence, cut to
`MAX_TOKENS`, so that no kind of text outweighs the others and the work is bounded whatever the tokenizer.
"""

from __future__ import annotations

import re
from importlib import resources
from typing import Any

from mlxq.errors import CheckpointError

#: Tokens of a section that are used. With English tokenizers every section reaches it, so that a batch has little
#: padding; 16 of them give a mean whose standard error is about a tenth of it.
MAX_TOKENS = 80

_HEADING = re.compile(r"^=== (\w+)\n", re.MULTILINE)


def sections() -> dict[str, str]:
    """The built-in text by section name."""
    text = resources.files("mlxq.evaluate").joinpath("sample.txt").read_text(encoding="utf-8")
    parts = _HEADING.split(text)[1:]
    return {name: body.strip() for name, body in zip(parts[::2], parts[1::2], strict=True)}


def token_sequences(tokenizer: Any, vocab_size: int | None = None, max_tokens: int = MAX_TOKENS) -> list[list[int]]:
    """Token ids of each section, its start marker included where the tokenizer adds one, cut to `max_tokens`.

    Args:
        tokenizer: transformers' tokenizer (`encode` is used, and the ids of its end markers).
        vocab_size: rows of the model's embedding; None skips the check.

    Raises:
        CheckpointError: an id is beyond the vocabulary, or no section yields two tokens (nothing could be scored).
    """
    from mlxq.runtime.tokenizer import without_end

    found = [
        [int(i) for i in without_end(tokenizer, text, tokenizer.encode(text))][:max_tokens]
        for text in sections().values()
    ]
    found = [ids for ids in found if len(ids) > 1]
    if not found:
        raise CheckpointError("the tokenizer makes fewer than two tokens of every text, so nothing can be verified")
    largest = max(max(ids) for ids in found)
    if vocab_size is not None and largest >= vocab_size:
        raise CheckpointError(
            f"the tokenizer yields id {largest}, but the model's vocabulary has {vocab_size} entries: the tokenizer"
            " belongs to another model (--no-verify skips this check)"
        )
    return found
