"""Text to token ids and back: transformers' tokenizer, chat templates, and streaming that never splits a character."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlxq.checkpoint.base import Checkpoint
from mlxq.checkpoint.huggingface import is_tokenizer
from mlxq.errors import CheckpointError, GenerationError

Messages = Sequence[dict[str, Any]]
#: What transformers would say, once, of a text that is longer than the model's context: such texts are cut later.
_TOO_LONG = "sequence-length-is-longer-than-the-specified-maximum"


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
        tokenizer_class = _auto_tokenizer()
        with _silent():
            tokenizer = tokenizer_class.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        tokenizer.deprecation_warnings[_TOO_LONG] = True
        return tokenizer
    except Exception as e:  # transformers and tokenizers raise nearly anything for a damaged file
        what = " ".join(str(e).split()) or type(e).__name__
        if type(e).__name__.startswith("StrictDataclass"):
            # It reads config.json for the tokenizer's kind, and checks all of it.
            raise CheckpointError(f"{shown}: transformers refuses its config.json: {what}") from e
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


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """transformers' loggers quiet: what matters is raised, and the rest is about models that it does not run here."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


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
        GenerationError: what `check_prompt` refuses, nothing to encode, messages without a template, a template that
            refuses them, or one that leaves the system message out.
    """
    check_prompt(prompt, system)
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if not isinstance(prompt, str):
        if chat_template is False:
            raise GenerationError("a list of messages needs the chat template: pass text to go without it")
        chat_template = True
    if chat_template is None:
        chat_template = has_template
    if not chat_template:
        if system is not None:
            raise GenerationError("a system message needs a chat template, and none is applied here")
        bos = tokenizer.bos_token
        ids = tokenizer.encode(prompt, add_special_tokens=not (bos and prompt.startswith(bos)))
        return _checked(without_end(tokenizer, prompt, ids))
    if not has_template:
        raise GenerationError("this tokenizer has no chat template: pass the prompt as text with chat_template=False")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)

    def apply(messages: Messages, **options: Any) -> Any:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, **options)

    try:
        if system is not None:
            messages = [{"role": "system", "content": system}, *messages]
            _refuse_ignored_system(apply, messages)
        return _checked(apply(messages, return_dict=False))
    except GenerationError:
        raise
    except Exception as e:  # templates are programs, and fail as they like
        raise GenerationError(f"the chat template refuses the messages: {' '.join(str(e).split())}") from e


def check_prompt(prompt: str | Messages, system: str | None = None) -> None:
    """Refuse what is no prompt for any tokenizer.

    Raises:
        GenerationError: neither text nor a list of messages, empty, a message without role or content, or text that
            has no UTF-8 encoding (half of a surrogate pair, as Python reads other bytes from the command line).
    """
    if system is not None:
        _check_text(system, "the system message")
    if isinstance(prompt, str):
        _check_text(prompt, "the prompt")
    elif isinstance(prompt, bytes | bytearray) or not isinstance(prompt, Sequence):
        raise GenerationError(f"the prompt is {_kind(prompt)}: pass text, or a list of messages")
    else:
        for number, message in enumerate(prompt, 1):
            _check_message(message, f"message {number} of the prompt")
    if len(prompt) == 0:
        raise GenerationError("the prompt is empty")


def _check_message(message: Any, where: str) -> None:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise GenerationError(f'{where} is {_kind(message)}: pass {{"role": ..., "content": ...}}, the role a text')
    _check_text(message["role"], f"the role of {where}")
    content = message.get("content")
    if isinstance(content, str):
        _check_text(content, where)
    elif not isinstance(content, list) and "tool_calls" not in message:
        raise GenerationError(f"{where} has a content that is {_kind(content)}: pass text")


def _check_text(text: Any, what: str) -> None:
    if not isinstance(text, str):
        raise GenerationError(f"{what} is {_kind(text)}: pass text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as e:
        raise GenerationError(
            f"{what} is not valid Unicode: character {e.start + 1} is a lone surrogate, {text[e.start]!a}; is the"
            " text encoded in UTF-8?"
        ) from None


def _kind(value: Any) -> str:
    if isinstance(value, Mapping):
        return "a message without a role"
    return "nothing" if value is None else f"of type {type(value).__name__}"


def _refuse_ignored_system(apply: Callable[..., Any], messages: Messages) -> None:
    """Refuse a system message, the first of `messages`, without which the template makes the same text."""
    shown = apply(messages, tokenize=False)
    if messages[0]["content"].strip() in shown:
        return
    try:
        ignored = apply(messages[1:], tokenize=False) == shown
    except Exception:  # a template that needs one does not ignore it
        return
    if ignored:
        raise GenerationError("this model's chat template has no system message: put it into the prompt instead")


def without_end(tokenizer: Any, text: str, ids: Sequence[int]) -> list[int]:
    """`ids`, the encoded `text`, without an end token that the tokenizer has appended: a text goes on after it.

    An end token that the text itself spells out stays.
    """
    ids = list(ids)
    if ids and ids[-1] == tokenizer.eos_token_id:
        own = tokenizer.encode(text, add_special_tokens=False)
        if _repeats_at_end(ids) > (_repeats_at_end(own) if len(own) and own[-1] == ids[-1] else 0):
            ids.pop()
    return ids


def _repeats_at_end(ids: Sequence[int]) -> int:
    """How many times the last id stands at the end."""
    return next((n for n, i in enumerate(reversed(ids)) if i != ids[-1]), len(ids))


def _checked(ids: Sequence[int]) -> list[int]:
    if len(ids) == 0:
        raise GenerationError("the prompt is empty: it encodes to no tokens")
    return [int(i) for i in ids]


#: Tokens that wait for a character to be completed, at most: one has four bytes, and a token holds one or more of them.
_WAITING = 8
_BROKEN = "\ufffd"


class Detokenizer:
    """Text of a growing list of tokens: the pieces joined are `tokenizer.decode` of all of them.

    A token may hold part of a character, and its text may depend on the tokens before it. So the tokens since the
    piece before last are decoded together, and nothing is given out while the end is an incomplete character. Bytes
    that never become one are given out as U+FFFD once they are older than `_WAITING` tokens.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        #: Where the tokens that are decoded together begin, and how many characters of their text were given out.
        self._start = self._shown = 0
        #: Tokens whose text was given out in full.
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
        text = self._decode(self._ids[self._start :])
        broken = 0 if final else len(text) - len(text.rstrip(_BROKEN))
        if broken and len(self._ids) - self._given <= _WAITING:
            return ""
        # Of the last character three bytes may be there, each shown as one U+FFFD.
        end = len(text) - min(broken, 3)
        piece = text[self._shown : end]
        if not piece:
            # After a token without text (a special one) the next still depends on the text before.
            return ""
        if broken:
            self._shown = end
            self._forget_broken(text[end:])
        else:
            self._start, self._given = self._given, len(self._ids)
            self._shown = len(self._decode(self._ids[self._start :]))
        return piece

    def _forget_broken(self, held: str) -> None:
        """Let the tokens decoded together begin later, if the text held back is the same without the older ones."""
        start = len(self._ids) - _WAITING
        text = self._decode(self._ids[start:])
        if text.endswith(held):
            self._start = self._given = start
            self._shown = len(text) - len(held)
