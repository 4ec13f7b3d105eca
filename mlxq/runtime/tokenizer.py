"""Text to token ids and back: transformers' tokenizer, chat templates, and streaming that never splits a character."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlxq.checkpoint.base import Checkpoint
from mlxq.checkpoint.huggingface import is_tokenizer
from mlxq.errors import CheckpointError, GenerationError

Messages = Sequence[dict[str, Any]]


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The transformers tokenizer of a checkpoint, from its own files alone (no network, no remote code).

    Raises:
        CheckpointError: the checkpoint has no tokenizer, or transformers cannot read it.
    """
    files = checkpoint.companion_files()
    if not is_tokenizer(files):
        raise CheckpointError(
            f"{checkpoint.path}: has no tokenizer (tokenizer.json or tokenizer.model); copy it from the original model"
        )
    if all(isinstance(content, Path) for content in files.values()):
        return _from_directory(checkpoint.path, checkpoint.path)
    with tempfile.TemporaryDirectory(prefix="mlxq-") as temporary:
        for name, content in files.items():
            target = Path(temporary) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content if isinstance(content, bytes) else content.read_bytes())
        return _from_directory(Path(temporary), checkpoint.path)


def _from_directory(directory: Path, shown: Path) -> Any:
    try:
        return _auto_tokenizer().from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as e:  # transformers and tokenizers raise nearly anything for a damaged file
        what = " ".join(str(e).split()) or type(e).__name__
        raise CheckpointError(f"{shown}: the tokenizer cannot be loaded: {what}") from e


def _auto_tokenizer() -> Any:
    """`AutoTokenizer`, imported without its advice to install PyTorch."""
    logger = logging.getLogger("transformers")

    def without_advice(record: logging.LogRecord) -> bool:
        return "PyTorch" not in record.getMessage()

    logger.addFilter(without_advice)
    try:
        from transformers import AutoTokenizer
    finally:
        logger.removeFilter(without_advice)
    return AutoTokenizer


def encode_prompt(
    tokenizer: Any, prompt: str | Messages, *, system: str | None = None, chat_template: bool | None = None
) -> list[int]:
    """Token ids of a prompt.

    Args:
        prompt: text, or chat messages (`{"role": ..., "content": ...}`).
        system: system message put before the others.
        chat_template: True applies the tokenizer's template, False encodes the text as it is; None applies the
            template when there is one.

    Raises:
        GenerationError: nothing to encode, or messages without a template, or a template that refuses them.
    """
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if not isinstance(prompt, str):
        if chat_template is False:
            raise GenerationError("a list of messages needs the chat template: pass text to go without it")
        chat_template = True
    if chat_template is None:
        chat_template = has_template
    if not prompt:
        raise GenerationError("the prompt is empty")
    if not chat_template:
        if system is not None:
            raise GenerationError("a system message needs a chat template, and none is applied here")
        bos = tokenizer.bos_token
        ids = tokenizer.encode(prompt, add_special_tokens=not (bos and prompt.startswith(bos)))
        return _checked(ids)
    if not has_template:
        raise GenerationError("this tokenizer has no chat template: pass the prompt as text with chat_template=False")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if system is not None:
        messages = [{"role": "system", "content": system}, *messages]
    try:
        return _checked(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
    except GenerationError:
        raise
    except Exception as e:  # templates are programs, and fail as they like
        raise GenerationError(f"the chat template refuses the messages: {' '.join(str(e).split())}") from e


def _checked(ids: Sequence[int]) -> list[int]:
    if len(ids) == 0:
        raise GenerationError("the prompt is empty: it encodes to no tokens")
    return [int(i) for i in ids]


class Detokenizer:
    """Text of a growing list of tokens: the pieces joined are `tokenizer.decode` of all of them.

    A token may hold part of a character, and its text may depend on the tokens before it. So the tokens since the
    piece before last are decoded together, and nothing is given out while the end is an incomplete character.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._start = 0
        self._given = 0

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def add(self, token: int) -> str:
        """The text that `token` completes; empty while a character is incomplete."""
        self._ids.append(token)
        return self._advance(final=False)

    def finish(self) -> str:
        """What is left, with U+FFFD for bytes that never became a character."""
        return self._advance(final=True)

    def _advance(self, final: bool) -> str:
        before = self._decode(self._ids[self._start : self._given])
        after = self._decode(self._ids[self._start :])
        if after.endswith("\ufffd") and not final:
            return ""
        self._start, self._given = self._given, len(self._ids)
        return after[len(before) :]
