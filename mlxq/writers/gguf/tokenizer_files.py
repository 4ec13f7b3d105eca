"""A model's tokenizer files, read once: what each later step asks of them."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxq.checkpoint.gguf.tokenizer import SOURCE_KEY
from mlxq.errors import CheckpointError

_JSON_MODEL = "tokenizer.json"


@dataclass(frozen=True)
class AddedToken:
    """A token found in the text before anything else. `strips` says that it takes spaces beside it along."""

    id: int
    content: str
    special: bool
    strips: bool = False


class TokenizerFiles:
    """Tokenizer, settings and templates out of companion files.

    Attributes:
        where: names the files in errors.
        tokenizer: `tokenizer.json`, or None.
        settings: `tokenizer_config.json`, or an empty dict.
        config, generation_config: the model's.

    Raises:
        CheckpointError: a file is missing or malformed.
    """

    def __init__(self, files: dict[str, Path | bytes], config: dict[str, Any], generation_config: dict[str, Any]):
        self.files, self.config, self.generation_config = files, config, generation_config
        self.tokenizer = self._object(_JSON_MODEL)
        self.settings = self._object("tokenizer_config.json") or {}
        self._named = [self.settings, self._object("special_tokens_map.json") or {}]
        if self.tokenizer is not None and not isinstance(self.tokenizer.get("model"), dict):
            raise CheckpointError(f"{self.where(_JSON_MODEL)}: has no model")

    def convert(self) -> None:
        """Let transformers make `tokenizer` of what there is, `vocab.json` and `merges.txt` for example.

        Raises:
            CheckpointError: it cannot, or only with code that the model brings.
        """
        from transformers import AutoTokenizer

        with tempfile.TemporaryDirectory() as directory:
            for name in self.files:
                target = Path(directory, name)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(self.read(name) or b"")
            Path(directory, "config.json").write_text(json.dumps(self.config))
            try:
                made = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
                self.tokenizer = json.loads(made.backend_tokenizer.to_str())
            # Whatever reads a foreign file fails in its own way.
            except Exception as e:
                why = " ".join(str(e).replace(directory, "").split())[:200]
                raise CheckpointError(
                    f"{self.where(_JSON_MODEL)}: there is none, and transformers cannot make one of "
                    f"{', '.join(sorted(self.files))}: {why}"
                ) from e

    @property
    def from_gguf(self) -> bool:
        """Whether they were made from a GGUF file, so that `special` is exactly its type of token."""
        return SOURCE_KEY in self.settings

    def where(self, name: str) -> str:
        """How errors name a file."""
        source = self.files.get(name)
        return str(source) if isinstance(source, Path) else name

    def read(self, name: str) -> bytes | None:
        """A file's bytes, or None where there is none of that name.

        Raises:
            CheckpointError: it cannot be read.
        """
        source = self.files.get(name)
        if not isinstance(source, Path):
            return source
        try:
            return source.read_bytes()
        except OSError as e:
            raise CheckpointError(f"{source}: cannot be read: {e.strerror or e}") from e

    def _object(self, name: str) -> dict[str, Any] | None:
        data = self.read(name)
        if data is None:
            return None
        try:
            value = json.loads(data.decode("utf-8-sig"))
        except (ValueError, RecursionError) as e:
            raise CheckpointError(f"{self.where(name)}: not valid JSON: {' '.join(str(e).split())[:200]}") from e
        if not isinstance(value, dict):
            raise CheckpointError(f"{self.where(name)}: holds a JSON {type(value).__name__}, but an object is expected")
        return value

    def added_tokens(self) -> dict[int, AddedToken]:
        """By id; `tokenizer.json` decides, then `tokenizer_config.json`, then `added_tokens.json`."""
        found: dict[int, AddedToken] = {}
        entries = [(e.get("id"), e) for e in (self.tokenizer or {}).get("added_tokens") or []]
        entries += list((self.settings.get("added_tokens_decoder") or {}).items())
        entries += [(i, {"content": text}) for text, i in (self._object("added_tokens.json") or {}).items()]
        for number, entry in entries:
            if not str(number).isdigit() or not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
                raise CheckpointError(f"{self.where(_JSON_MODEL)}: an added token has no id or no content: {entry!r}")
            strips = any(entry.get(k) for k in ("lstrip", "rstrip", "single_word"))
            token = AddedToken(int(number), entry["content"], bool(entry.get("special")), strips)
            found.setdefault(token.id, token)
        return found

    def special_text(self, name: str) -> str | None:
        """The text of the `bos`, `eos`, `unk`, `sep`, `pad`, `cls` or `mask` token, or None."""
        for names in self._named:
            value = names.get(f"{name}_token")
            if isinstance(value, dict):
                value = value.get("content")
            if isinstance(value, str) and value:
                return value
        return None

    def flag(self, name: str) -> bool | None:
        """A setting of `tokenizer_config.json` that is true or false, else None."""
        value = self.settings.get(name)
        return value if isinstance(value, bool) else None

    def chat_templates(self) -> dict[str, str]:
        """Template by name, verbatim; the one that counts unless another is asked for is `default`."""
        found: dict[str, str] = {}
        for value in (
            self.settings.get("chat_template"),
            (self._object("chat_template.json") or {}).get("chat_template"),
        ):
            if isinstance(value, str):
                found["default"] = value
            elif isinstance(value, list):
                found |= {e["name"]: e["template"] for e in value if {"name", "template"} <= e.keys()}
            if found:
                break
        for file in self.files:
            if file == "chat_template.jinja":
                found["default"] = self._text(file)
            elif file.startswith("additional_chat_templates/") and file.endswith(".jinja"):
                found[Path(file).stem] = self._text(file)
        return found

    def _text(self, name: str) -> str:
        try:
            return (self.read(name) or b"").decode()
        except UnicodeDecodeError as e:
            raise CheckpointError(f"{self.where(name)}: is not UTF-8: {e.reason} at byte {e.start}") from e
