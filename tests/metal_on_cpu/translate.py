"""Token pass between `clang -E` and the compiler: what macros cannot do to Metal text to make it C++ for OpenCL.

1. `threadgroup T name[dims];` in a kernel becomes a reference into the threadgroup arena (OpenCL allows such variables
   in no template); every other `threadgroup` becomes `__local`.
2. `thread` after a constructor's parameter list goes: clang gives temporaries no address space, so that a constructor
   for private memory could build none.
3. `1.0h`, `1.0bf` become casts.
4. `[[function_constant(N)]]` becomes an initializer `MSL_FC_N`; other attributes and `template [[host_name(..)]] ...;`
   go; words that OpenCL reserves and Metal does not get a suffix; `constant T` becomes `const constant T`.
5. `v.xy` read becomes `v._gxy()`: a property would not survive in dependent expressions.
6. `c ? a : b` becomes `c ? __rv(a) : __rv(b)`: for clang a private lvalue and a temporary of one class differ in type.

Lines are kept, so that messages point into the caller's text.
"""

from __future__ import annotations

import re

from metal_on_cpu.tokens import MslError, is_marker, is_space, marker_is_shim, ternary_operands, tokenize

_SWIZZLE = re.compile(r"^(?:[xyzw]{2,4}|rgb|rgba|rg)$")
_SUFFIXED = re.compile(r"^((?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)(h|H|bf|BF)$")
_CLASS = re.compile(r"\b(?:struct|class)\s+(?:alignas\s*\([^()]*(?:\([^()]*\)[^()]*)*\)\s*)?([A-Za-z_]\w*)")
_SWIZZLE_MEMBER = re.compile(r"\b(?!return\b)[A-Za-z_]\w*[\s*&]+([xyzw]{2,4}|rgba?|rg)\s*[;=,\[]")
_DECLARATOR = re.compile(r"^(.*[\s>])([A-Za-z_]\w*)\s*((?:\[.*\]\s*)*)$")
_RGB = {"rgb": "xyz", "rgba": "xyzw", "rg": "xy"}
_RESERVED = {
    *("global", "local", "generic", "private_", "read_only", "write_only", "read_write", "pipe"),
    *("image2d_t", "sampler_t", "event_t", "queue_t"),
    *("atomic_int", "atomic_uint", "atomic_float", "atomic_bool", "atomic_ulong", "atomic_long", "atomic_flag"),
}
_OPEN = {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}


def translate(text: str, before: str = "") -> tuple[str, list[int]]:
    """Preprocessed Metal text as C++ for OpenCL, and the numbers of the function constants that it declares.

    `before` is text that the compiler sees first: its classes are known, and it is not translated.
    """
    return _Translator(text, before).run()


class _Translator:
    """One pass over the tokens; `out` holds what each becomes."""

    def __init__(self, text: str, before: str) -> None:
        self.tokens = tokenize(text)
        self.out = list(self.tokens)
        self.classes = set(_CLASS.findall(before + text))
        self.members = set(_SWIZZLE_MEMBER.findall(_outside_shim(before + text)))
        self.constants: set[int] = set()
        self.removed: list[tuple[int, int]] = []
        self.variables = 0
        self.in_shim = False
        # Scope: braces and parentheses open now, the depth at which a kernel's body began, `kernel` seen before one.
        self.braces = self.parentheses = 0
        self.kernel_at: int | None = None
        self.kernel_next = False

    def run(self) -> tuple[str, list[int]]:
        i = 0
        while i < len(self.tokens):
            i = self._step(i)
        self._wrap_ternaries()
        return "".join(self.out)[1:], sorted(self.constants)

    def _step(self, i: int) -> int:
        """Handles token i and returns the index to go on with."""
        t = self.tokens[i]
        if is_marker(t):
            self.in_shim = marker_is_shim(t, self.in_shim)
            return i + 1
        self._track_scope(t)
        if t == "[[":
            return self._attribute(i)
        if t == "template" and self._token(self._next(i)) == "[[":
            return self._blank(i, self._find(i, ";") + 1)
        if t == "threadgroup":
            return self._threadgroup(i)
        if t == "__msl_kernel":
            self.out[i], self.kernel_next = "", True
        elif t == "__private":
            self._constructor_qualifier(i)
        elif not self.in_shim:
            self._word(i, t)
        else:
            self._suffix(i, t)
        return i + 1

    def _word(self, i: int, t: str) -> None:
        if _SWIZZLE.match(t) and i and self.tokens[i - 1] == "." and t not in self.members:
            if not self._is_assigned(self._next(i)):
                self.out[i] = f"_g{_RGB.get(t, t)}()"
        elif t == "__constant":
            self._constant(i)
        elif t in _RESERVED:
            self.out[i] = t + "_msl"
        else:
            self._suffix(i, t)

    def _suffix(self, i: int, t: str) -> None:
        m = _SUFFIXED.match(t)
        if m:
            digits = m.group(1) + ("f" if re.search(r"[.eE]", m.group(1)) else ".0f")
            self.out[i] = f"(({'_Float16' if m.group(2) in 'hH' else 'bfloat'}){digits})"

    def _is_assigned(self, i: int) -> bool:
        """Does an assignment begin at token i?"""
        t, after = self._token(i), self._token(i + 1)
        if t == "=":
            return after != "="
        return bool(t) and t in "+-*/|&^%" and after == "="

    def _constant(self, i: int) -> None:
        before = self._previous(i)
        while self.tokens[before] in ("constexpr", "static", "inline", "extern"):
            before = self._previous(before)
        if self.tokens[before] not in (")", "const", "noexcept") and self._token(self._next(i)) != "const":
            self.out[i] = "const __constant"

    def _constructor_qualifier(self, i: int) -> None:
        """Drops `thread` after `Name(...)` where Name is a class."""
        j = self._previous(i)
        while self.tokens[j] in ("const", "noexcept"):
            j = self._previous(j)
        if self.tokens[j] != ")":
            return
        depth = 0
        while j >= 0:
            depth += {")": 1, "(": -1}.get(self.tokens[j], 0)
            if depth == 0:
                break
            j -= 1
        if self.tokens[self._previous(j)] in self.classes:
            self.out[i] = ""

    def _attribute(self, i: int) -> int:
        end = self._find(i, "]]")
        body = "".join(self.tokens[i + 1 : end])
        self.kernel_next = self.kernel_next or bool(re.search(r"\b(kernel|__msl_kernel)\b", body))
        m = re.search(r"function_constant\s*\(\s*(\d+)\s*\)", body)
        self._keep_lines(i, end + 1)
        if m:
            self.constants.add(int(m.group(1)))
            self.out[i] = f" = MSL_FC_{int(m.group(1))} "
        return end + 1

    def _threadgroup(self, i: int) -> int:
        """`threadgroup` is an address space, or begins the declaration of a variable of a kernel."""
        self.out[i] = "__local"
        before = self._previous(i)
        if before >= 0 and self.tokens[before] not in ";{}":
            return i + 1
        end, depth, words = i + 1, 0, []
        while end < len(self.tokens) and not (self.tokens[end] in ";*&=" and depth == 0):
            t = self.tokens[end]
            depth += _OPEN.get(t, 0)
            if depth < 0:
                return i + 1
            words.append(t + "_msl" if t in _RESERVED else " " if is_marker(t) else t)
            end += 1
        if self._token(end) == "=":  # Apple accepts `= {0}` and does not set it
            end = self._find(end, ";")
        if self._token(end) != ";":
            return i + 1
        if self.kernel_at is None:
            raise MslError("error: threadgroup variable outside a kernel function: " + "".join(words).strip())
        self._blank(i, end + 1)
        self.out[i] = self._arena_references("".join(words)) + self.out[i]
        return end + 1

    def _arena_references(self, declaration: str) -> str:
        parts = [" ".join(p.split()) for p in _split_commas(declaration)]
        m = _DECLARATOR.match(parts[0])
        if not m:
            raise MslError("error: threadgroup declaration not understood: " + declaration.strip())
        out = []
        for part in [m.group(2) + m.group(3), *parts[1:]]:
            name, dims = re.match(r"^\s*([A-Za-z_]\w*)\s*(.*)$", part).groups()
            alias = f"__tg{self.variables}_t"
            allocation = f"__msl_tg_alloc({self.variables}, sizeof({alias}), alignof({alias}))"
            out.append(f"typedef {m.group(1).strip()} {alias} {dims};")
            out.append(f"__local {alias}& {name} = *(__local {alias}*)(ulong){allocation};")
            self.variables += 1
        return " ".join(out)

    def _track_scope(self, t: str) -> None:
        if t in ("(", ")"):
            self.parentheses += 1 if t == "(" else -1
        elif t == "{":
            if self.kernel_next and self.parentheses == 0:
                self.kernel_at, self.kernel_next = self.braces, False
            self.braces += 1
        elif t == "}":
            self.braces -= 1
            if self.kernel_at == self.braces:
                self.kernel_at = None
        elif t == ";" and self.parentheses == 0 and self.kernel_at is None:
            self.kernel_next = False

    def _wrap_ternaries(self) -> None:
        removed = {k for first, stop in self.removed for k in range(first, stop)}
        for first, last in ternary_operands(self.tokens):
            if first not in removed:
                self.out[first] = " __rv(" + self.out[first]
            if last not in removed:
                self.out[last] += ")"

    def _blank(self, first: int, stop: int) -> int:
        self._keep_lines(first, stop)
        self.removed.append((first, stop))
        return stop

    def _keep_lines(self, first: int, stop: int) -> None:
        for k in range(first, stop):
            t = self.tokens[k]
            self.out[k] = t if is_marker(t) else "\n" * t.count("\n")

    def _token(self, i: int) -> str:
        return self.tokens[i] if i < len(self.tokens) else ""

    def _find(self, i: int, token: str) -> int:
        while i < len(self.tokens) and self.tokens[i] != token:
            i += 1
        if i == len(self.tokens):
            raise MslError(f"error: {token!r} is missing")
        return i

    def _previous(self, i: int) -> int:
        i -= 1
        while i >= 0 and is_space(self.tokens[i]):
            i -= 1
        return i

    def _next(self, i: int) -> int:
        i += 1
        while i < len(self.tokens) and is_space(self.tokens[i]):
            i += 1
        return i


def _outside_shim(text: str) -> str:
    keep, shim = [], False
    for line in text.split("\n"):
        if line.startswith("# "):
            shim = marker_is_shim("\n" + line, shim)
        elif not shim:
            keep.append(line)
    return "\n".join(keep)


def _split_commas(text: str) -> list[str]:
    parts, depth = [""], 0
    for c in text:
        depth += {"<": 1, "(": 1, "[": 1, ">": -1, ")": -1, "]": -1}.get(c, 0)
        if c == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += c
    return parts
