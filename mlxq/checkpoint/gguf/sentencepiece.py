"""SentencePiece tokenizers of GGUF files as `tokenizer.json`: BPE (`tokenizer.ggml.model = llama`) and unigram (`t5`).

Sources: llama.cpp `src/llama-vocab.cpp`, `llm_tokenizer_spm_session` and `llm_tokenizer_ugm_session`.
"""

from __future__ import annotations

import base64
from typing import Any

import numpy as np

from mlxq.checkpoint.gguf.vocabulary import Vocabulary, bpe_model, tokenizer_json
from mlxq.errors import CheckpointError

_SPACE = "▁"
_ESCAPE = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
_PREPEND = {"type": "Prepend", "prepend": _SPACE}


def _replace(expression: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"Regex": expression}, "content": content}


#: Unigram's prefix is written where the first word begins, so that a text of spaces alone has none.
UNIGRAM_PREFIX = _replace(r"\A(?= *[^ ])", " ")
#: Spaces at the ends vanish, runs of them become one.
MERGED_SPACES = (_replace(r"\A +| +\z", ""), _replace(" +", " "))


def sentencepiece_bpe(vocabulary: Vocabulary) -> dict[str, Any]:
    """Spaces become `▁`, then the pair whose joined text has the best score is merged first; the rest becomes bytes.

    Raises:
        CheckpointError: byte tokens or scores are missing, or whitespace is to be treated in a way that is unknown.
    """
    prefix = vocabulary.flag("add_space_prefix", True)
    if vocabulary.flag("remove_extra_whitespaces", False):
        raise CheckpointError(
            f"{vocabulary.path}: tokenizer.ggml.remove_extra_whitespaces is not supported for SentencePiece BPE"
        )
    missing = next((b for b in range(256) if f"<0x{b:02X}>" not in vocabulary.ids), None)
    if missing is not None:
        raise CheckpointError(f"{vocabulary.path}: the vocabulary lacks the byte token <0x{missing:02X}>")
    vocabulary.default_ids(unk=0, bos=1, eos=2)
    merges = score_merges(vocabulary.tokens, vocabulary.ids, vocabulary.scores())
    unk = vocabulary.tokens[vocabulary.unk]
    return tokenizer_json(
        vocabulary,
        vocabulary.begin_and_end(add_bos=True),
        normalizer=_sequence([_PREPEND] * prefix + [_ESCAPE]),
        decoder=_decoder(prefix),
        model=bpe_model(vocabulary, merges, byte_fallback=True, fuse_unk=True, unk_token=unk),
    )


def unigram(vocabulary: Vocabulary) -> dict[str, Any]:
    """The cut into tokens whose scores have the largest sum; characters that no token covers are unknown.

    Raises:
        CheckpointError: scores are missing, or the table of characters is no array of bytes.
    """
    prefix = vocabulary.flag("add_space_prefix", False)
    merged = vocabulary.flag("remove_extra_whitespaces", False)
    vocabulary.default_ids(unk=2, eos=1, pad=0)
    if vocabulary.unk is None:
        raise CheckpointError(f"{vocabulary.path}: tokenizer.ggml.unknown_token_id is missing")
    steps: list[dict[str, Any]] = []
    charsmap = vocabulary.values.get("tokenizer.ggml.precompiled_charsmap")
    if charsmap is not None:
        if not isinstance(charsmap, np.ndarray) or charsmap.itemsize != 1:
            raise CheckpointError(f"{vocabulary.path}: tokenizer.ggml.precompiled_charsmap is not an array of bytes")
        encoded = base64.b64encode(charsmap.tobytes()).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": encoded})
    if merged:
        # Spaces are written where a word begins: at the first one too, whatever add_space_prefix says.
        steps += [*MERGED_SPACES, _PREPEND]
    elif prefix:
        steps.append(UNIGRAM_PREFIX)
    scores = vocabulary.scores()
    model = {
        "type": "Unigram",
        "unk_id": vocabulary.unk,
        "vocab": [[text, float(score)] for text, score in zip(vocabulary.tokens, scores, strict=True)],
        "byte_fallback": False,
    }
    return tokenizer_json(
        vocabulary,
        vocabulary.begin_and_end(add_bos=False, add_eos=True),
        normalizer=_sequence([*steps, _ESCAPE]),
        decoder=_decoder(prefix or merged),
        model=model,
    )


def _sequence(steps: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": steps}


def _decoder(prefix: bool) -> dict[str, Any]:
    unescape = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    return {"type": "Sequence", "decoders": [unescape, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]}


def score_merges(tokens: list[str], ids: dict[str, int], scores: np.ndarray) -> list[list[str]]:
    """Every pair of tokens whose joined text is a token, best score of the joined token first.

    llama.cpp merges the pair with the best joined score wherever it stands, the leftmost of equals; merging by the
    rank of the pair does the same when pairs are ranked by that score.
    """
    merges: list[list[str]] = []
    # Stable: tokens of equal score keep the order of their ids.
    for i in np.argsort(-scores, kind="stable"):
        token = tokens[i]
        merges += [
            [left, right]
            for cut in range(1, len(token))
            if (left := token[:cut]) in ids and (right := token[cut:]) in ids
        ]
    return merges
