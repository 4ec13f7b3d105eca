"""Two chat templates against each other: what they render of the same conversations, and what they refuse."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mlxq.evaluate.comparison.stress import CONVERSATIONS


@dataclass(frozen=True)
class TemplateComparison:
    """What both tokenizers' chat templates make of the probe conversations.

    Attributes:
        present_a, present_b: whether there is a template.
        n_probes: renderings compared: each conversation with and without the prompt of an answer.
        n_refused: of those, the ones that both templates refuse.
        different: names of the probes that do not agree.
        first: the first of them in words, from where the texts part; empty when all agree.
    """

    present_a: bool
    present_b: bool
    n_probes: int
    n_refused: int
    different: tuple[str, ...]
    first: str

    @property
    def same(self) -> bool:
        return self.present_a == self.present_b and not self.different

    @property
    def failure(self) -> str:
        """What differs, in one line; empty when nothing does."""
        return f"{self.summary}: {self.first}" if self.different else self.summary

    @property
    def summary(self) -> str:
        """What differs, in some words; empty when nothing does."""
        if self.present_a != self.present_b:
            return f"only {'A' if self.present_a else 'B'} has a chat template"
        if not self.different:
            return ""
        return f"chat templates differ for {len(self.different)} of {self.n_probes} renderings"

    def to_dict(self) -> dict[str, Any]:
        return {
            "same": self.same,
            "present": [self.present_a, self.present_b],
            "probes": self.n_probes,
            "refused": self.n_refused,
            "different": list(self.different),
            "first_difference": self.first or None,
        }


def compare_templates(a: Any, b: Any) -> TemplateComparison:
    """Render every probe with the chat templates of two tokenizers (transformers')."""
    present = [bool(getattr(t, "chat_template", None)) for t in (a, b)]
    if not all(present):
        return TemplateComparison(*present, 0, 0, (), "")
    different, first, refused, n = [], "", 0, 0
    for name, messages in CONVERSATIONS.items():
        for prompt in (True, False):
            n += 1
            text_a, text_b = (_render(t, messages, prompt) for t in (a, b))
            refused += text_a is None and text_b is None
            if text_a != text_b:
                different.append(f"{name}{', with the prompt of an answer' if prompt else ''}")
                first = first or f"{different[-1]}: {_parting(text_a, text_b)}"
    return TemplateComparison(True, True, n, refused, tuple(different), first)


def _render(tokenizer: Any, messages: list[dict[str, Any]], prompt: bool) -> str | None:
    """The text of a conversation; None when the template refuses it."""
    try:
        messages = [dict(m) for m in messages]
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))
    except Exception:  # templates are programs, and fail as they like
        return None


def _parting(a: str | None, b: str | None) -> str:
    """Both texts from a little before where they part."""
    if a is None or b is None:
        return f"{'A' if a is None else 'B'} refuses it, {'B' if a is None else 'A'} does not"
    at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    start = max(at - 10, 0)
    return f"at character {at} {a[start : at + 20]!r} / {b[start : at + 20]!r}"
