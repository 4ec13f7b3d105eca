"""A Modelfile: what Ollama needs beside a GGUF file to run it as its authors meant.

Format: https://github.com/ollama/ollama/blob/main/docs/modelfile.md. `TEMPLATE` is a Go template; one is written where
the chat template has a plain form (`chat_turns`), and left to Ollama's own recognition where not, which a comment says.
"""

from __future__ import annotations

from typing import Any

from mlxq.writers.gguf.chat_turns import ChatTurns, chat_turns

#: Setting of generation_config.json -> Ollama's parameter.
_PARAMETERS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}
_QUOTES = '"""'


def modelfile(
    gguf_name: str,
    chat_template: str | None,
    stop_tokens: list[str],
    parameters: dict[str, Any],
    *,
    bos: str = "",
    eos: str = "",
    licence: str | None = None,
) -> str:
    """The text of a Modelfile.

    Args:
        gguf_name: the GGUF file beside it.
        chat_template: the model's, in Jinja, or None for a model that only continues text.
        stop_tokens: texts that end an answer.
        parameters: Ollama's, by name (`ollama_parameters`).
        bos: text of the begin token if it is added to every prompt, else "".
        eos: text of the end token.
        licence: its text.
    """
    lines = [f"FROM ./{gguf_name}"]
    turns = chat_turns(chat_template, bos, eos) if chat_template else None
    go = go_template(turns) if turns is not None else None
    if go is not None:
        lines.append(f"TEMPLATE {_quoted(go)}")
        if turns.default_system:
            lines.append(f"SYSTEM {_quoted(turns.default_system)}")
    elif chat_template:
        lines += [
            "# No TEMPLATE: this chat template does more than a Go template of turns can say. Ollama compares the one",
            "# in the GGUF file with those it knows; if it knows none, prompts are passed on as they are.",
        ]
    else:
        lines.append("# No TEMPLATE: the model has no chat template; prompts are passed on as they are.")
    lines += [f"PARAMETER stop {_quoted(text)}" for text in dict.fromkeys(stop_tokens) if not text.endswith('"')]
    lines += [f"PARAMETER {name} {value}" for name, value in parameters.items()]
    if licence and _QUOTES not in licence:
        lines.append(f"LICENSE {_quoted(licence)}")
    return "\n".join(lines) + "\n"


def ollama_parameters(generation_config: dict[str, Any]) -> dict[str, int | float]:
    """Sampling settings under Ollama's names; temperature 0 where the model's authors chose no sampling."""
    if generation_config.get("do_sample") is False:
        return {"temperature": 0}
    values = {ours: generation_config.get(theirs) for theirs, ours in _PARAMETERS.items()}
    return {k: v for k, v in values.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}


def go_template(turns: ChatTurns) -> str | None:
    """A Go template that writes these turns, or None where their text cannot stand in one.

    Ollama gives it `.Messages` with the system prompt among them and, joined, in `.System`.
    """
    texts = [turns.begin, *turns.system, *turns.user, *turns.assistant, turns.generation, turns.default_system or ""]
    if any("{{" in t or "}}" in t or _QUOTES in t for t in texts) or texts[-1].endswith('"'):
        return None
    start, end = turns.system
    inside = start + "{{ $.System }}" + end
    system, prefix, setup = "", "", ""
    if turns.place == "turn":
        system = '{{ if eq .Role "system" }}' + start + "{{ .Content }}" + end + "{{ else "
        if turns.default_system == "":
            setup = "{{ if not .System }}" + start + end + "{{ end }}"
    elif turns.place == "first user":
        setup = "{{ $first := true }}"
        prefix = "{{ if and $first $.System }}" + inside + "{{ end }}{{ $first = false }}"
    elif turns.place == "last user":
        find = '{{ range $i, $m := .Messages }}{{ if eq $m.Role "user" }}{{ $last = $i }}{{ end }}{{ end }}'
        setup = "{{ $last := 0 }}" + find
        prefix = "{{ if and (eq $i $last) $.System }}" + inside + "{{ end }}"
    system = system or "{{ "
    user = turns.user[0] + prefix + "{{ .Content }}" + turns.user[1]
    assistant = turns.assistant[0] + "{{ .Content }}" + turns.assistant[1]
    return (
        f"{setup}{turns.begin}{{{{ range $i, $m := .Messages }}}}{system}"
        f'if eq .Role "user" }}}}{user}{{{{ else if eq .Role "assistant" }}}}{assistant}{{{{ end }}}}{{{{ end }}}}'
        f"{turns.generation}"
    )


def _quoted(text: str) -> str:
    return _QUOTES + text + _QUOTES
