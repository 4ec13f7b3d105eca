"""`general.*` metadata of a GGUF file: what the model is called, where it comes from, under which licence.

Names are taken apart by the `gguf` package (`gguf.Metadata`), as llama.cpp's converter does: from the model card, the
repository's name, the directory's.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mlxq.writers.gguf.tokenizer import typed

QUANTIZATION_VERSION = 2
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_LONGEST_NAME = 100
#: Decided anew for each file.
_OWN_KEYS = ("general.architecture", "general.type", "general.file_type", "general.quantization_version")
_OWN_KEYS += ("general.alignment", "general.quantized_by")
#: How licence texts begin -> the identifier that model cards use.
_LICENCES = (
    ("apache license version 2.0", "apache-2.0"),
    ("mit license", "mit"),
    ("permission is hereby granted free of charge", "mit"),
    ("gnu general public license version 3", "gpl-3.0"),
    ("llama 2 community license", "llama2"),
    ("meta llama 3 community license", "llama3"),
    ("llama 3.1 community license", "llama3.1"),
    ("llama 3.2 community license", "llama3.2"),
    ("llama 3.3 community license", "llama3.3"),
    ("gemma terms of use", "gemma"),
)
#: Setting of generation_config.json -> key and kind, where llama.cpp takes it for its default.
_SAMPLING = {
    "temperature": ("temp", "float32"),
    "top_k": ("top_k", "int32"),
    "top_p": ("top_p", "float32"),
    "min_p": ("min_p", "float32"),
    "repetition_penalty": ("penalty_repeat", "float32"),
}


def general_metadata(
    source_name: str,
    *,
    architecture: str,
    file_type: int,
    generation_config: dict[str, Any] | None = None,
    licence_files: dict[str, Path | bytes] | None = None,
    readme: Path | None = None,
    parameters: tuple[int, int, int] = (0, 0, 0),
    previous: dict[str, Any] | None = None,
) -> dict[str, tuple[str, Any]]:
    """Typed metadata under `general.`.

    Args:
        source_name: the source as the person named it: `organization/model` of the Hub, or a path.
        architecture: GGUF's name of it.
        file_type: number of the file type (`gguf.LlamaFileType`).
        generation_config: the model's; its sampling settings are written where sampling is on.
        licence_files: name -> text, used where the card names no licence.
        readme: the model card.
        parameters: numbers of all parameters, of those of experts among them, and of experts in a layer.
        previous: metadata of the GGUF file that is the source; what it says of the model is kept.
    """
    metadata: dict[str, tuple[str, Any]] = {
        "general.architecture": ("string", architecture),
        "general.type": ("string", "model"),
    }
    if previous is not None:
        kept = {k: v for k, v in previous.items() if k.startswith("general.") and k not in _OWN_KEYS}
        metadata |= {k: typed(v) for k, v in kept.items()}
    else:
        metadata |= _described(source_name, readme, parameters) | _sampling(generation_config or {})
    if "general.license" not in metadata:
        metadata |= _licence(licence_files or {})
    return metadata | {
        "general.quantized_by": ("string", "mlxq"),
        "general.file_type": ("uint32", file_type),
        "general.quantization_version": ("uint32", QUANTIZATION_VERSION),
    }


def _described(source_name: str, readme: Path | None, parameters: tuple[int, int, int]) -> dict[str, tuple[str, Any]]:
    """What the card and the name say, written by the `gguf` package into a list that it would write to a file."""
    import gguf

    total, experts, n_experts = parameters
    on_hub = bool(_HUB_ID.fullmatch(source_name)) and not Path(source_name).exists()
    name = {"_name_or_path": source_name} if on_hub else None
    path = Path(source_name.rstrip("/") or source_name)
    directory = Path(path.stem if path.suffix == ".gguf" else path.name or path.resolve().name)
    model = gguf.Metadata.apply_metadata_heuristic(gguf.Metadata(), _card(readme), name, directory, total)
    model.name = model.name or directory.name or "model"
    # llama.cpp knows by this spelling that special tokens take the spaces behind them along.
    model.name = re.sub(r"\bPhi 3", "Phi-3", model.name)
    if model.size_label is None and total > 0:
        model.size_label = gguf.size_label(total, total - experts, experts // max(n_experts, 1), n_experts)
    if on_hub and model.source_repo_url is None:
        model.source_repo_url = f"https://huggingface.co/{source_name}"
    writer = gguf.GGUFWriter(None, "")
    model.set_gguf_meta_model(writer)
    return {key: _as_typed(value) for key, value in writer.kv_data[0].items() if key != "general.architecture"}


def _as_typed(value: Any) -> tuple[str, Any]:
    """A value of `gguf.GGUFWriter` with its kind."""
    kind = value.type.name.lower()
    if kind != "array":
        return kind, value.value if kind != "string" else str(value.value)
    element = value.sub_type.name.lower() if value.sub_type is not None else "string"
    return f"{element}[]", [str(v) for v in value.value] if element == "string" else list(value.value)


def _card(readme: Path | None) -> dict[str, Any]:
    """Front matter of a model card; empty where there is none or it is not YAML, which no reader of cards can use."""
    import gguf
    import yaml

    if readme is None or readme.name != "README.md":
        return {}
    try:
        return gguf.Metadata.load_model_card(readme.parent)
    except (yaml.YAMLError, OSError, UnicodeDecodeError):
        return {}


def _sampling(generation_config: dict[str, Any]) -> dict[str, tuple[str, Any]]:
    found: dict[str, tuple[str, Any]] = {}
    if generation_config.get("do_sample") is False:
        return found
    for name, (key, kind) in _SAMPLING.items():
        value = generation_config.get(name)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            found[f"general.sampling.{key}"] = (kind, int(value) if kind == "int32" else float(value))
    return found


def licence_text(files: dict[str, Path | bytes]) -> str | None:
    """The text of the first licence file, or None."""
    for name in sorted(files):
        if Path(name).name.upper().startswith(("LICENSE", "LICENCE")):
            source = files[name]
            return (source if isinstance(source, bytes) else source.read_bytes()).decode("utf-8", "replace")
    return None


def _licence(files: dict[str, Path | bytes]) -> dict[str, tuple[str, Any]]:
    text = licence_text(files)
    if text is None:
        return {}
    # Line breaks and punctuation differ from copy to copy.
    words = " ".join(re.findall(r"[a-z0-9.]+", text[:1000].lower()))
    for beginning, identifier in _LICENCES:
        if beginning in words:
            return {"general.license": ("string", identifier)}
    first = next((line.strip() for line in text.splitlines() if line.strip()), "")
    name = {"general.license.name": ("string", first[:_LONGEST_NAME])} if first else {}
    return {"general.license": ("string", "other")} | name
