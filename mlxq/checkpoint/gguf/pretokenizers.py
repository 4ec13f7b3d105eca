"""How `tokenizer.ggml.pre` splits text before byte-pair merging: one table.

Each name stands for regular expressions applied one after another; every match becomes a piece, and so does what lies
between matches. The facts are those of llama.cpp (`src/llama-vocab.cpp`, `llm_tokenizer_bpe`), which in places simplify
the model's original tokenizer; ids here equal llama.cpp's. `\\p{N}` and the like have their Unicode meaning in both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mlxq.checkpoint.safetensors import quoted
from mlxq.errors import CheckpointError

_CONTRACTION = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_MARKS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"


def _cl100k(digits: str) -> str:
    """The family that began with OpenAI's cl100k; its members differ in how they cut numbers."""
    return "|".join((_CONTRACTION, _WORD, digits, _MARKS, _SPACES))


def _cased(ending: str, digits: str) -> str:
    """The family that cuts words where lower case turns to upper case; `ending` may follow a word."""
    start = r"[^\r\n\p{L}\p{N}]?"
    upper, lower = r"(?:(?=\p{L})[^a-z])", r"(?:(?=\p{L})[^A-Z])"
    marks = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
    words = (f"{start}{upper}*{lower}+{ending}", f"{start}{upper}+{lower}*{ending}")
    return "|".join((*words, digits, marks, _SPACES))


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_LLAMA3 = _cl100k(r"\p{N}{1,3}")
_QWEN2 = _cl100k(r"\p{N}")
_THREE_DIGITS = "[0-9][0-9][0-9]"
_BLOOM = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
_CJK = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
# llama.cpp takes every space for a vertical tab, which these two ranges do not reach.
_CJK_HANGUL = "(?:(?!\\s)[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff])+"
_WIDE_MARKS = "\\s?(?:(?!\\s)[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002])+"
#: Letters with case, as DeepSeek's first tokenizer lists them: code points and ranges in hexadecimal.
_CASED_LETTERS = (
    "41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376 377 37B-37D 37F 386 388-38A 38C 38E-3A1 "
    "3A3-3F5 3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD 1C90-1CBA 1CBD-1CBF 1D00-1D2B 1D6B-1D77 1D79-1D9A "
    "1E00-1F15 1F18-1F1D 1F20-1F45 1F48-1F4D 1F50-1F57 1F59 1F5B 1F5D 1F5F-1F7D 1F80-1FB4 1FB6-1FBC 1FBE 1FC2-1FC4 "
    "1FC6-1FCC 1FD0-1FD3 1FD6-1FDB 1FE0-1FEC 1FF2-1FF4 1FF6-1FFC 2102 2107 210A-2113 2115 2119-211D 2124 2126 2128 "
    "212A-212D 212F-2134 2139 213C-213F 2145-2149 214E 2183 2184 2C00-2C7B 2C7E-2CE4 2CEB-2CEE 2CF2 2CF3 A640-A66D "
    "A680-A69B A722-A76F A771-A787 A78B-A78E AB70-ABBF FB00-FB06 FB13-FB17 FF21-FF3A FF41-FF5A 10400-1044F "
    "104B0-104D3 104D8-104FB 10C80-10CB2 10CC0-10CF2 118A0-118DF 1E900-1E943"
)
_DEEPSEEK3_WORDS = "|".join(
    (
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+",
        r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",
        r" ?[\p{P}\p{S}]+[\r\n]*",
        _SPACES,
    )
)


def _characters(ranges: str) -> str:
    """The inside of a character class from hexadecimal code points."""
    return "".join("-".join(chr(int(end, 16)) for end in part.split("-")) for part in ranges.split())


@dataclass(frozen=True)
class PreTokenizer:
    """Regular expressions, whether a whole piece in the vocabulary is taken as it is, and the default for BOS."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False


def _table() -> dict[str, PreTokenizer]:
    gpt2 = PreTokenizer((_GPT2,))
    single_digits = PreTokenizer((r"\p{N}", _GPT2))
    llama3 = PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True)
    llama3_plain = PreTokenizer((_LLAMA3,))
    qwen2 = PreTokenizer((_QWEN2,))
    deepseek3 = PreTokenizer((r"\p{N}{1,3}", _CJK, _DEEPSEEK3_WORDS))
    bloom = PreTokenizer((_BLOOM,))
    gpt4o = PreTokenizer((_cased(f"{_CONTRACTION}?", r"\p{N}{1,3}"),))
    groups = {
        "gpt-2 phi-2 mpt olmo jais trillion granite-docling exaone4 gigachat a.x-4.0 mellum modern-bert": gpt2,
        "starcoder refact command-r smollm codeshell exaone minerva-7b": single_digits,
        "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano": llama3,
        "dbrx smaug-bpe chatglm-bpe": llama3_plain,
        "glm4": PreTokenizer((_LLAMA3,), ignore_merges=True),
        "qwen2 stablelm2 deepseek-r1-qwen kormo megrez hunyuan solar-open grok-2 f2llmv2": qwen2,
        # Written with one line break after spaces, which is the same: the spaces take in all but the last.
        "bailingmoe bailingmoe2 llada-moe": qwen2,
        "deepseek-v3 hunyuan-dense joyai-llm": deepseek3,
        "poro-chat bloom gpt3-finnish": bloom,
        "gpt-4o llama4 kanana2 minimax-m2 talkie": gpt4o,
    }
    table = {name: pre for names, pre in groups.items() for name in names.split()}
    return table | {
        "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", _THREE_DIGITS)),
        "falcon": PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, _THREE_DIGITS)),
        "viking": PreTokenizer((_BLOOM, r"\p{N}")),
        "tekken": PreTokenizer((_cased("", r"\p{N}"),), ignore_merges=True, add_bos=True),
        "deepseek-llm": PreTokenizer(
            (
                r"[\r\n]",
                rf"\s?[{_characters(_CASED_LETTERS)}]+",
                _WIDE_MARKS,
                r"\s+$",
                _CJK_HANGUL,
                r"\p{N}+",
            )
        ),
        "deepseek-coder": PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK_HANGUL, r"\p{N}")),
        "qwen35": PreTokenizer(
            (
                "|".join(
                    (
                        _CONTRACTION,
                        r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+",
                        r"\p{N}",
                        r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*",
                        _SPACES,
                    )
                ),
            )
        ),
        "seed-coder": PreTokenizer(
            ("|".join((_CONTRACTION, _WORD, r"\p{N}", r" ?[^\s\p{L}\p{N}\r\n]+", _SPACES)),),
        ),
        "minicpm5": PreTokenizer((r"\p{N}{1,3}", _cl100k(r"\p{N}+")), ignore_merges=True),
    }


PRE_TOKENIZERS = _table()


def pre_tokenizer(name: str | None, where: object) -> PreTokenizer:
    """The entry of a `tokenizer.ggml.pre`; a file that names none means `default`, as llama.cpp reads it.

    Raises:
        CheckpointError: a name that is not in the table; the message lists what is.
    """
    found = PRE_TOKENIZERS.get("default" if name in (None, "") else name)
    if found is None:
        raise CheckpointError(
            f"{where}: the pre-tokenizer {quoted(name)} (tokenizer.ggml.pre) is not supported; supported are "
            f"{', '.join(sorted(PRE_TOKENIZERS))}"
        )
    return found


_LU, _LL = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CONTRACTIONS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
    r"'(?i:[sdmt]|ll|ve|re)",
    r"'(?:[sdmtSDMT]|[lL][lL]|[vV][eE]|[rR][eE])",
)
_START = r"[^\r\n\p{L}\p{N}]?"


def _published_cased(ending: str, digits: str) -> str:
    words = (f"{_START}{_LU}*{_LL}+{ending}", f"{_START}{_LU}+{_LL}*{ending}")
    return "|".join((*words, digits, r" ?[^\s\p{L}\p{N}]+[\r\n/]*", _SPACES))


#: The same way of splitting as others spell it -> as the table does.
_SPELLINGS = {
    # What remains between matches is a piece as well.
    _GPT2 + r"|\s+": _GPT2,
    # Possessive: nothing is given back that could match otherwise.
    "|".join(
        (
            _CONTRACTION,
            r"[^\r\n\p{L}\p{N}]?+\p{L}+",
            r"\p{N}{1,3}",
            r" ?[^\s\p{L}\p{N}]++[\r\n]*",
            r"\s*[\r\n]|\s+(?!\S)|\s+",
        )
    ): _LLAMA3,
    _cl100k(r"\p{N}").replace(r"\s*[\r\n]+", r"\s*[\r\n]"): _QWEN2,
    _cl100k(r"\p{N}{1,3}").replace(r"\s*[\r\n]+", r"\s*[\r\n]"): _LLAMA3,
}
#: What llama.cpp takes for the same: it has no classes of upper and lower case, and marks end its words.
_APPROXIMATIONS = {
    _published_cased(f"{_CONTRACTION}?", r"\p{N}{1,3}"): _cased(f"{_CONTRACTION}?", r"\p{N}{1,3}"),
    _published_cased("", r"\p{N}"): _cased("", r"\p{N}"),
}
#: Of names that split alike, those that stand for their group; llama.cpp treats the others' texts the same.
_PREFERRED = ("gpt-2", "smollm", "llama-bpe", "qwen2", "smaug-bpe", "glm4", "gpt-4o", "deepseek-v3", "bloom")


def splits_of(pre_tokenizer: dict[str, Any] | None, *, exact: bool = False) -> tuple[str, ...] | None:
    """The expressions by which a `tokenizer.json`'s byte-level `pre_tokenizer` splits, spelt as `PRE_TOKENIZERS` does.

    None where it does something that expressions in order cannot say. Unless `exact`, expressions that llama.cpp
    replaces by simpler ones are spelt as those.
    """
    parts = [pre_tokenizer or {}]
    if parts[0].get("type") == "Sequence":
        parts = list(parts[0].get("pretokenizers", []))
    patterns: list[str] = []
    # Bytes come last: what splits after them would see their stand-ins.
    if not parts or parts[-1].get("type") != "ByteLevel" or parts[-1].get("add_prefix_space"):
        return None
    for part in parts:
        pattern = _pattern(part, exact)
        if pattern is None:
            return None
        patterns += pattern
    return tuple(patterns)


def _pattern(part: dict[str, Any], exact: bool) -> list[str] | None:
    kind = part.get("type")
    if kind == "ByteLevel":
        return [_GPT2] if part.get("use_regex", True) else []
    if kind == "Digits":
        return [r"\p{N}" if part.get("individual_digits") else r"\p{N}+"]
    expression = part.get("pattern", {}).get("Regex") if kind == "Split" else None
    if expression is None:
        return None
    spelt = _canonical(expression)
    spelt = spelt if exact else _APPROXIMATIONS.get(spelt, spelt)
    how = part.get("behavior"), part.get("invert", False)
    # Removing what does not match is the same where everything does.
    covers = how == ("Removed", True) and spelt.endswith(r"|\s+")
    return [spelt] if how == ("Isolated", False) or covers else None


def _canonical(expression: str) -> str:
    expression = expression.replace("\r", r"\r").replace("\n", r"\n")
    for spelling in _CONTRACTIONS:
        expression = expression.replace(spelling, _CONTRACTION)
    return _SPELLINGS.get(expression, expression)


def names_splitting(patterns: tuple[str, ...], ignore_merges: bool) -> list[str]:
    """Names of `PRE_TOKENIZERS` that split by these expressions and treat whole pieces so, the usual one first."""
    names = [n for n, p in PRE_TOKENIZERS.items() if p.patterns == patterns and p.ignore_merges == ignore_merges]
    return sorted(names, key=lambda n: _PREFERRED.index(n) if n in _PREFERRED else len(_PREFERRED))
