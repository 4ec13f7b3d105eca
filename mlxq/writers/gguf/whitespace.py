"""What a SentencePiece-like `tokenizer.json` does to spaces, in the flags that llama.cpp has for it."""

from __future__ import annotations

import base64
import binascii
from typing import Any

from mlxq.checkpoint.gguf.sentencepiece import MERGED_SPACES, UNIGRAM_PREFIX
from mlxq.errors import CheckpointError
from mlxq.writers.gguf.tokenizer_files import TokenizerFiles

SPACE = "▁"
_RUNS_OF_SPACES = (" {2,}", " +", r"\s+", r" {2,}")


class InexpressibleError(CheckpointError):
    """llama.cpp cannot tokenize as this tokenizer.json does; a SentencePiece model beside it may do instead."""


def parts_of(step: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, a sequence taken apart; `inner` is the key that holds them."""
    if step is None:
        return []
    return [p for s in step.get(inner, []) for p in parts_of(s, inner)] if step.get("type") == "Sequence" else [step]


def normalizers(tokenizer: dict[str, Any]) -> list[dict[str, Any]]:
    """The normalizers of a `tokenizer.json`, in order."""
    return parts_of(tokenizer.get("normalizer"), "normalizers")


def space_prefix(files: TokenizerFiles) -> bool | None:
    """Whether a space is put before the text; None where there is no tokenizer.json and no setting to say."""
    if files.tokenizer is None:
        return files.flag("add_prefix_space")
    for step in parts_of(files.tokenizer.get("pre_tokenizer"), "pretokenizers"):
        if step["type"] == "Metaspace":
            return step.get("prepend_scheme", "always") != "never" and step.get("add_prefix_space", True)
    return any(_prepends(s) for s in normalizers(files.tokenizer))


def removes_whitespace(tokenizer: dict[str, Any]) -> bool:
    """Whether runs of spaces become one and those at the ends vanish."""
    splits = parts_of(tokenizer.get("pre_tokenizer"), "pretokenizers")
    return any(_collapses(s) for s in normalizers(tokenizer)) or any(s["type"] == "WhitespaceSplit" for s in splits)


def charsmap(files: TokenizerFiles) -> bytes:
    """The table of a Precompiled normalizer, empty where there is none."""
    for step in normalizers(files.tokenizer):
        if step["type"] == "Precompiled":
            try:
                return base64.b64decode(step.get("precompiled_charsmap") or "", validate=True)
            except (binascii.Error, TypeError, ValueError) as e:
                raise CheckpointError(f"{files.where('tokenizer.json')}: precompiled_charsmap is not base64") from e
    return b""


def check_spaces(files: TokenizerFiles, texts: list[str], unigram: bool) -> None:
    """Refuse what llama.cpp does not do before it looks for tokens.

    Raises:
        InexpressibleError: an unknown step, named; or a cut at spaces that llama.cpp's search would not make.
    """
    where = files.where("tokenizer.json")
    for step in normalizers(files.tokenizer):
        if not (
            _escapes(step)
            or _prepends(step)
            or (unigram and (_collapses(step) or step["type"] in ("Precompiled", "Strip")))
        ):
            raise InexpressibleError(f"{where}: the normalizer {step['type']} is none that llama.cpp has")
    for step in parts_of(files.tokenizer.get("pre_tokenizer"), "pretokenizers"):
        kind = step["type"]
        # A split at a space has nothing to do once every space is replaced.
        if kind == "Split" and step.get("pattern") == {"String": " "}:
            continue
        if kind != "Metaspace" and not (unigram and kind == "WhitespaceSplit"):
            raise InexpressibleError(f"{where}: the pre-tokenizer {kind} is none that llama.cpp has for SentencePiece")
        cuts = kind == "WhitespaceSplit" or step.get("split", True)
        across = next((t for t in texts if t.strip(SPACE) and SPACE in t.lstrip(SPACE)), None) if cuts else None
        if across is not None:
            raise InexpressibleError(
                f"{where}: text is cut at spaces ({kind}), but {across!r} spans one: llama.cpp would use it"
            )


def _prepends(step: dict[str, Any]) -> bool:
    return step == UNIGRAM_PREFIX or (step["type"] == "Prepend" and step.get("prepend") == SPACE)


def _escapes(step: dict[str, Any]) -> bool:
    return step["type"] == "Replace" and step.get("pattern") == {"String": " "} and step.get("content") == SPACE


def _collapses(step: dict[str, Any]) -> bool:
    if step in MERGED_SPACES:
        return True
    pattern = step.get("pattern", {}).get("Regex") if step["type"] == "Replace" else None
    return pattern in _RUNS_OF_SPACES and step.get("content") in (" ", SPACE)
