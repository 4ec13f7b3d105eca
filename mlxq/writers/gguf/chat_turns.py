"""The plain form of a chat template: what stands before and after each kind of turn.

A Jinja template is asked to render conversations of marks; what stands between the marks is the form, and it counts
only if it gives, letter for letter, every conversation that was asked. Templates that do more (dates, tools that are
always described, thoughts that are cut) have no such form, and None is the answer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

Message = dict[str, str]
Place = Literal["turn", "first user", "last user", "none"]
#: Contents that stand out: without space at their ends, which templates may cut.
_SYSTEM, _USER, _ANSWER, _AGAIN = "Sys7!", "Usr1?\n\n  two", "Ans5.", "Usr2:x"


@dataclass(frozen=True)
class ChatTurns:
    """`begin` opens every conversation; pairs stand before and after the content of a turn; `generation` asks for one.

    `place` says where a system prompt goes: a turn of its own, or before the content of the first or last user, with
    `system` around it. `default_system` is used where a conversation has none ("" is a prompt too), None is none.
    """

    begin: str
    system: tuple[str, str]
    user: tuple[str, str]
    assistant: tuple[str, str]
    generation: str
    place: Place
    default_system: str | None = None

    def render(self, messages: list[Message]) -> str:
        """The conversation and the request for an answer."""
        system = next((m["content"] for m in messages if m["role"] == "system"), self.default_system)
        block = "" if system is None else self.system[0] + system + self.system[1]
        users = [i for i, m in enumerate(messages) if m["role"] == "user"]
        chosen = {"first user": users[0], "last user": users[-1]}.get(self.place)
        text = self.begin + (block if self.place == "turn" else "")
        for i, message in enumerate(messages):
            if message["role"] == "user":
                inside = block if i == chosen else ""
                text += self.user[0] + inside + message["content"] + self.user[1]
            elif message["role"] == "assistant":
                text += self.assistant[0] + message["content"] + self.assistant[1]
        return text + self.generation


def chat_turns(template: str, bos: str = "", eos: str = "") -> ChatTurns | None:
    """The plain form of a Jinja chat template, or None where it has none.

    Args:
        template: the template.
        bos: text of the begin token, which whoever runs the model puts before the prompt, so that it is left out here.
        eos: text of the end token, which templates may name.
    """
    try:
        render = _renderer(template, bos, eos)
        turns = _derive(render)
    # A template raises what it likes.
    except Exception:
        return None
    if turns is None:
        return None
    talk = _talk(_USER, _ANSWER, _AGAIN)
    asked = [_talk(_USER), talk, [*talk, *_talk(_ANSWER, _USER)[::-1]]]
    if turns.place != "none":
        asked += [[_message("system", _SYSTEM), *messages] for messages in asked]
    try:
        return turns if all(render(m, True) == turns.render(m) for m in asked) else None
    except Exception:
        return None


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _talk(*contents: str) -> list[Message]:
    return [_message(("user", "assistant")[i % 2], c) for i, c in enumerate(contents)]


def _renderer(template: str, bos: str, eos: str) -> Callable[[list[Message], bool], str]:
    """Renders as transformers does (`transformers.utils.chat_template_utils`), the begin token taken off."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(*_: Any) -> None:
        raise TemplateError("refused")

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    # A prompt that depends on the day has no fixed form.
    environment.globals |= {"raise_exception": refuse, "strftime_now": refuse}
    compiled = environment.from_string(template)

    def render(messages: list[Message], ask: bool) -> str:
        text = compiled.render(messages=messages, add_generation_prompt=ask, bos_token=bos, eos_token=eos)
        return text.removeprefix(bos) if bos else text

    return render


def _derive(render: Callable[[list[Message], bool], str]) -> ChatTurns | None:
    talk = _talk(_USER, _ANSWER, _AGAIN)
    first, between, after, last = _cut(render(talk, True), _USER, _ANSWER, _AGAIN)
    user_end = _cut(render(talk[:1], False), _USER)[1]
    answer_end = _cut(render(talk[:2], False), _USER, _ANSWER)[2]
    if not (last.startswith(user_end) and between.startswith(user_end) and after.startswith(answer_end)):
        return None
    user = (after[len(answer_end) :], user_end)
    assistant = (between[len(user_end) :], answer_end)
    alone = _cut(render(talk[:1], True), _USER)[0]
    if alone != first or not user[0]:
        return None
    forms = {"user": user, "assistant": assistant, "generation": last[len(user_end) :]}
    try:
        system_start, system_end = _cut(render([_message("system", _SYSTEM), *talk[:1]], True), _SYSTEM, _USER)[:2]
    except Exception:
        if not first.endswith(user[0]):
            return None
        return ChatTurns(begin=first.removesuffix(user[0]), system=("", ""), place="none", **forms)
    return _with_system(render, first, system_start, system_end, forms)


def _with_system(
    render: Callable[[list[Message], bool], str], first: str, start: str, end: str, forms: dict[str, Any]
) -> ChatTurns | None:
    """Where the system prompt stands, what is around it, and which one stands there if none is given."""
    before_user = forms["user"][0]
    if end.endswith(before_user):
        place: Place = "turn"
        end = end.removesuffix(before_user)
        plain = first.removesuffix(before_user) if first.endswith(before_user) else None
    else:
        talk = [_message("system", _SYSTEM), *_talk(_USER, _ANSWER, _AGAIN)]
        text = render(talk, True)
        place = "first user" if text.index(_SYSTEM) < text.index(_USER) else "last user"
        if before_user not in start:
            return None
        begin, _, start = start.rpartition(before_user)
        if first != begin + before_user:
            return None
        return ChatTurns(begin=begin, system=(start, end), place=place, **forms)
    if plain is None:
        return None
    if plain.startswith(start) and plain.endswith(end) and len(plain) >= len(start) + len(end) and (start or end):
        default = plain[len(start) : len(plain) - len(end)]
        return ChatTurns(begin="", system=(start, end), place=place, default_system=default, **forms)
    if not start.startswith(plain):
        return None
    return ChatTurns(begin=plain, system=(start.removeprefix(plain), end), place=place, **forms)


def _cut(text: str, *marks: str) -> list[str]:
    """What stands before, between and after marks, each of which appears once and in this order.

    Raises:
        ValueError: they do not.
    """
    parts = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found or mark in text:
            raise ValueError(f"{mark!r} does not appear once")
        parts.append(before)
    return [*parts, text]
