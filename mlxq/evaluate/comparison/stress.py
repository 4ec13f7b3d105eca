"""Texts and conversations that tokenizers and chat templates stumble over: what two artifacts of a model must agree on.

Written for this project. The texts are short, so that the first that differs can be shown; those with the special
tokens of a tokenizer are made from its own list.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

#: Special tokens that are met one by one, and the length of the rows of the others.
_IN_CONTEXT = 64

#: Kind of text -> texts.
# fmt: off
TEXTS: dict[str, tuple[str, ...]] = {
    "prose": (
        "The quick brown fox jumps over the lazy dog.",
        "It's what they'd've wanted, isn't it? YOU'RE RIGHT; WE'LL SEE. 'Tis the '90s, y'all.",
        "“Curly quotes,” she said — and an ellipsis… ‘nested’ – don’t",
        "naïve café, Zürich, Ærøskøbing, Łódź, İstanbul, ΑΘΗΝΑ, São Tomé",
        "CamelCaseWord snake_case_word kebab-case-word HTTPServerError iOS mRNA xXx",
        "Hello", " Hello", "hello ", "a", "", ".",
    ),
    "code": (
        'def f(x: int = 0x1F) -> str:\n    """Doc."""\n    return f"{x!r:>{10}}"  # note\n',
        "for (int i = 0; i < n; ++i) {\n\tif (a[i] != b[i] && *p++) goto out;\n}\r\n",
        "SELECT * FROM t WHERE a >= 1.5e-10 AND b <> 'it''s' -- end\n",
        '<div class="a b" id=\'c\'>&nbsp;<!-- x --></div>\n{"k": [1, null, true], "e": {}}',
        "$ git log --oneline | sed -E 's/^[0-9a-f]{7} //' > /tmp/out && echo $?",
        "https://example.org/a_b/c?d=%20e&f=1#g  user.name+tag@example.co.uk  C:\\Users\\x",
        "\\frac{\\partial^2 u}{\\partial t^2} = c^2 \\nabla^2 u",
        "!!!???...,,,;;;:::---___***///|||~~~```@@@###$$$%%%^^^&&&()()[][]{}{}<><>",
    ),
    "emoji": (
        "🙂", "🙂🙂🙃 ok 👍🏽👍🏿 ✌️",
        "👩‍👩‍👧‍👦 👨🏽‍🚀 🧑‍🤝‍🧑 🏳️‍🌈 🏴‍☠️",
        "🇫🇷🇯🇵🇺🇳🇽", "1️⃣ #️⃣ ©️ ™ ☎︎ ☎️",
    ),
    "CJK": (
        "你好，世界！我在学习大型语言模型。", "吾輩は猫である。名前はまだ無い。カタカナとひらがな、ﾊﾝｶｸ",
        "안녕하세요 세계, 한국어 문장입니다.", "混合mixed文字text１２３ＡＢＣ，。、「」",
        "𠮷野家 𠀋 㐂 丽", "가각 各",
    ),
    "Arabic and other scripts": (
        "مرحبا بالعالم، كيف حالك؟ ١٢٣٤", "السَّلَامُ عَلَيْكُمْ", "שלום עולם, מה שלומך?", "नमस्ते दुनिया, क्षत्रिय १२३",
        "สวัสดีชาวโลก ภาษาไทย", "Привет, мир! Ёжик съел ещё.", "வணக்கம் உலகம்", "გამარჯობა ბარევ Բարեւ",
        "English עברית and العربية in one Zeile 中文 вместе",
    ),
    "digits": (
        "0 1 12 123 1234 12345 123456 1234567890", "3.14159 -2.5e+10 1,000,000 1_000 0b1010 0xDEADBEEF",
        "2024-02-29T23:59:59Z +49 (0)30 12345-678", "½ ² ₃ Ⅷ ⑨ ٣٤ १२ ０１２ 𝟙𝟚", "x1y22z333 9" + "8" * 40,
    ),
    "whitespace": (
        " ", "  ", "   ", "    ", "\t", "\n", "\n\n", "\n\n\n", " \n ", "\r\n\r\n", "\t\t\tx", "x   \n   y\t \n",
        "a b  c   d    e     f", "\n leading", "trailing \n", " " * 65, "\n" * 17,
        "a\u00a0b\u3000c\u2003d\u2028e\u0085f",
        "  two\n    four\n\ttab\n",
    ),
    "long words": (
        "antidisestablishmentarianism",
        "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft",
        "a" * 150, "ab" * 90, "xyzzyplugh" * 20, "=" * 100, "QmFzZTY0IGVuY29kZWQgdGV4dCB3aXRob3V0IHNwYWNlcw==" * 3,
    ),
    "combining and control": (
        "cafe\u0301 n\u0303 a\u0308\u0323 \u0301alone", "Z͑ͫ̓ͪ̂ͫa̴l̨g͇o̡", "ﬁ ﬂ ª º ǅ ſ ß ẞ ŉ", "\ufeffbom",
        "zero\u200bwidth\u200djoiner\u00adsoft",
        "\u202eright to left\u202c", "\x01\x02\x1b[0m\x7f", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 ｆｕｌｌ ᴄᴀᴘs",
    ),
    "invalid-looking": (
        "\ufffd", "a\ufffdb\ufffd\ufffd", "\ufffe\uffff", "\U0010ffff\U000e0041", "\ue000\uf8ff", "\u200d\u200d",
        "\ufe0f", "\u0300\u0301",
        "\u0378\u05ff",
    ),
    "marks of other tokenizers": (
        "<s>", "</s>", "<unk>", "<pad>", "<|endoftext|>",
        "<|im_start|>user\nhi<|im_end|>\n", "<bos>", "<eos>", "<0x0A>", "[INST] hi [/INST]",
        "<start_of_turn>user\nhi<end_of_turn>\n", "<|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>",
        "<think>\nhm\n</think>", "<tool_call>{}</tool_call>", "▁under▁▁score", "Ġbyte Ċlevel", "##piece",
    ),
}
# fmt: on


def texts(special: Iterable[str] = ()) -> Iterator[tuple[str, str]]:
    """Kind and text, one after another. `special` are the texts of special tokens: the first of them are put between
    others too, the rest (some models have thousands) are met in long rows."""
    for kind, group in TEXTS.items():
        for text in group:
            yield kind, text
    special = list(special)
    for token in special[:_IN_CONTEXT]:
        yield "special tokens", token
        yield "special tokens", f"a{token}b"
        yield "special tokens", f" {token}  {token}\n"
    for start in range(_IN_CONTEXT, len(special), _IN_CONTEXT):
        yield "special tokens", "".join(special[start : start + _IN_CONTEXT])


_SYSTEM = {"role": "system", "content": "You are terse.\nAnswer in French."}
_USER = {"role": "user", "content": "  What is 2 + 2? \n\n"}
_ASSISTANT = {"role": "assistant", "content": "It is 4. 🙂"}
_AGAIN = {"role": "user", "content": "And 中文 `x < 1 && y > 2`?"}

#: Name -> messages of a conversation. Templates may refuse some: then both must.
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one question": [_USER],
    "with a system message": [_SYSTEM, _USER],
    "three turns": [_USER, _ASSISTANT, _AGAIN],
    "three turns with a system message": [_SYSTEM, _USER, _ASSISTANT, _AGAIN],
    "ending with an answer": [_USER, _ASSISTANT],
    "thoughts in an answer": [_USER, {"role": "assistant", "content": "<think>\nhm\n</think>\n\n4"}, _AGAIN],
    "two questions in a row": [_USER, _AGAIN],
    "empty content": [{"role": "user", "content": ""}],
    "a tool's answer": [_USER, {"role": "assistant", "content": "f()"}, {"role": "tool", "content": "4"}],
}
