"""Texts that tokenizers stumble over. Code points up to Unicode 13: newer ones are classed by the age of a library."""

from __future__ import annotations

import random

TEXTS = [
    "",
    " ",
    "  ",
    "   ",
    "\n",
    "\n\n",
    " \n",
    "\t\t",
    "\r\n",
    "a",
    "Hello world",
    "unreachable unreachable",
    " Hello world  ",
    "Hello  world   three    four",
    "I'm can't we've they'll he'd you're IT'S DON'T WE'VE 'tis ''s a'sb 'sa ' s",
    'x = [1,2,3]; y += 0x1F # comment\n\tif (a && b) { return f"{z}"; }',
    "123456789 1 12 123 1234 3.14159 1,000,000 ½ ² Ⅷ ٣٤ १२३",
    "Привет, мир! Ёлка",
    "你好，世界。漢字かなカナ 한국어 안녕하세요",
    "🙂👩‍👩‍👧‍👦🇫🇷👍🏽 ok \U0001f9d1\u200d\U0001f680 \ufe0f",
    "café cafe\u0301 n\u0303 a\u0308\u0308 \u0301 leading mark",
    "مرحبا بالعالم ۔ ، हिन्दी में ไทย ภาษา",
    "\u00a0nbsp\u3000wide\u2003em\u2028sep\u0085nel\u200bzero",
    "CamelCaseWords HTTPServer éCOLE ÀÉÎ ÉCOLE école aBcD Ünïcode",
    "....!!!???---___~~~```^^^|||<<<>>>$$$+++=== ~ a~b `x`",
    "http://example.com/a?b=c&d=e#f user@example.com",
    "<|im_end|>",
    "hi <|im_start|>user\nx<|im_end|>\n",
    "<s>[INST] a </s><tag>  <tag>\n\nb",
    "<|begin of text|> a<|user mark|>b  <|user mark|> <|end of text|>",
    "<unk> <pad> <bos><eos> <start_of_turn>user\nhi<end_of_turn>\n",
    "a\n\n\n\nb\n \n  \n\tc  \n",
    "  leading\n   trailing   \n",
    "\x01\x02\x7f",
    "\ufeffbom",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟙𝟚𝟛 ǅ ǆ ʰ ª º ﬁ ﬂ Ａｂｃ １２３ ！？",
    "“quotes” ‘single’ — dash … ellipsis don´t ’s ’S",
    "x" * 200,
    " " * 60,
    "\n" * 30,
    "ab" * 60,
    "1" * 50,
    "▁under▁score ▁▁",
    "line1\r\nline2\rline3",
    "end with space ",
    "한국어1234한국어 中文abc中文123，。！",
    "tab\tsep\tvals\n1\t2\t3",
]

_POOLS = [
    "abcdefgXYZ",
    "  \n\t\r",
    "0123456789",
    "'’\"",
    "sStTrReEvVmMlLdD",
    "!?.,;:-_~^|$+=<>`@#%&*()[]{}/\\",
    "äéñßÇŞıİ",
    "\u0301\u0308\u0489",
    "你好世界かなカナ",
    "한국어",
    "🙂👍🏽\u200d",
    "१२३٣Ⅷ½",
    "\u00a0\u3000\u2028\u0085\u200b",
    "привет",
    "ªʰǅ",
    "๑ไ",
]


def fuzz(n: int, seed: int = 0) -> list[str]:
    """`n` random strings that mix scripts, spaces, digits, apostrophes and marks."""
    rng = random.Random(seed)
    return ["".join(rng.choice(rng.choice(_POOLS)) for _ in range(rng.randint(1, 40))) for _ in range(n)]
