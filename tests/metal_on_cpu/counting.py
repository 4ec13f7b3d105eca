"""Counts what a kernel executes: a call at the head of every block of its optimized LLVM text, and a table of what
each block holds. The counts are of LLVM's instructions, close to what Apple's compiler (LLVM too) starts from; they
compare two kernels for one job, and forecast no time.

Classes: `int` and `float` arithmetic (comparisons and selects among them; a product that only a sum uses counts
as fused with it), `convert` (between integers and floats, and between float types), `math` (functions like exp),
`resize` (integers to other widths), `address` (computed with a variable index), `branch`, `simd` (SIMD-group and matrix
functions: one each, whatever they do here), `barrier` and `lookup` (loads from tables of the program, in the constant
address space). A vector operation counts once a component. Other loads and stores are not here: the runtime counts them
by buffer.
"""

from __future__ import annotations

import re
from collections import Counter

from metal_on_cpu.widths import Place, Places

CLASSES = ("int", "float", "convert", "math", "resize", "address", "branch", "simd", "barrier", "lookup")

_CLASS_OF = {
    **dict.fromkeys(("add", "sub", "mul", "shl", "lshr", "ashr", "and", "or", "xor", "icmp", "select"), "int"),
    **dict.fromkeys(("udiv", "sdiv", "urem", "srem"), "int"),
    **dict.fromkeys(("fadd", "fsub", "fmul", "fdiv", "frem", "fneg", "fcmp"), "float"),
    **dict.fromkeys(("sitofp", "uitofp", "fptosi", "fptoui", "fpext", "fptrunc"), "convert"),
    **dict.fromkeys(("zext", "sext", "trunc"), "resize"),
}
_INT_INTRINSICS = {
    *("umin", "umax", "smin", "smax", "abs", "ctpop", "ctlz", "cttz", "fshl", "fshr", "bswap", "bitreverse"),
    *("uadd", "usub", "sadd", "ssub"),
}
_FREE_INTRINSICS = {
    *("dbg", "lifetime", "assume", "memcpy", "memset", "memmove", "experimental", "invariant", "trap", "ubsantrap"),
}
_DEFINE = re.compile(r'^define .*?@("[^"]+"|[\w.$]+)\(')
_LABEL = re.compile(r'^(?:[-\w.$]+|"[^"]+"):')
_INSTRUCTION = re.compile(r"^  (?:(%[\w.]+) = )?(?:(?:tail|musttail|notail) )?([a-z_]+)(.*)$")
_CALLEE = re.compile(r'@("[^"]+"|[\w.$]+)\(')
_VECTOR = re.compile(r"<(\d+) x ")
#: Either half of 64 bits: how two components of a kernel's attribute arrive, and a register of a GPU.
_HALF_OF_64 = re.compile(r"i64 %\S+, (?:4294967295|32)(?:,|$)")
_VALUE = re.compile(r"%[\w.]+")
_POINTER = re.compile(r"ptr ([%@][\w.$]+)")
_OF_TABLE = re.compile(r"ptr @")
#: The shim's functions of a SIMD-group, kept out of line in this mode: their insides are not the kernel's.
_SIMD_FUNCTION = re.compile(r"^_ZN5metal\d+(?:(?:simd|quad)_|simdgroup_multiply)|^_Z\d+__metal_simd_")
_SANITIZED = re.compile(r"^  (?:tail )?call void @__tsan_(unaligned_)?(read|write)(\d+)\((ptr .*)\)(.*)$")
_UNCOUNTED = re.compile(r"^__msl_entry$|^tsan\.")


def instrument(ir: str, widths: dict[Place, int]) -> tuple[str, list[dict[str, int]]]:
    """LLVM text with a call `__msl_block(i)` in every block of the kernel's functions, and what each block i holds.

    Accesses are told the width that the text asks for at their place (`widths`, from `access_widths`).
    """
    out: list[str] = []
    blocks: list[dict[str, int]] = []
    body: list[str] | None = None
    name = ""
    access = _Accesses(ir, widths)
    for line in ir.split("\n"):
        define = _DEFINE.match(line)
        if define:
            name, body = define.group(1).strip('"'), []
        elif line == "}" and body is not None:
            counted = not _UNCOUNTED.match(name) and not _SIMD_FUNCTION.match(name)
            body = [access(line) for line in body]
            out += _instrument_function(body, blocks) if counted else body
            body = None
        elif body is not None:
            body.append(line)
            continue
        out.append(line)
    declared = "declare void @__msl_block(i32)\ndeclare void @__msl_access(ptr, i32, i32, i32)\n"
    return "\n".join([*out, declared]), blocks


class _Accesses:
    """Puts `__msl_access(pointer, size and kind, place, width)` in the place of the thread sanitizer's calls."""

    def __init__(self, ir: str, widths: dict[Place, int]) -> None:
        self.places = Places(ir)
        self.widths = widths
        self.numbers: dict[Place, int] = {}

    def __call__(self, line: str) -> str:
        m = _SANITIZED.match(line)
        if not m:
            return line
        unaligned, kind, size, pointer, rest = m.groups()
        place = self.places.of(line)
        number = self.numbers.setdefault(place, len(self.numbers) + 1) if place else 0
        what = int(size) | (kind == "write") << 8 | bool(unaligned) << 9
        width = self.widths.get(place, 0)
        return f"  call void @__msl_access({pointer}, i32 {what}, i32 {number}, i32 {width}){rest}"


def _instrument_function(body: list[str], blocks: list[dict[str, int]]) -> list[str]:
    fused, lookups = _fused_products(body), _lookups(body)
    out: list[str] = []
    counts: Counter[str] | None = None
    for line in body:
        label = bool(_LABEL.match(line))
        m = None if label else _INSTRUCTION.match(line)
        if label:
            counts = None
        elif m and m.group(2) != "phi":
            if counts is None:  # after the phi nodes, which must come first
                counts = Counter()
                blocks.append(counts)
                out.append(f"  call void @__msl_block(i32 {len(blocks) - 1})")
            kind, n = ("lookup", 1) if m.group(1) in lookups else _classify(m.group(2), m.group(3))
            if kind and m.group(1) not in fused:
                counts[kind] += n
        out.append(line)
    return out


def _lookups(body: list[str]) -> set[str]:
    """Loads from the program's own tables: the sanitizer passes over what never changes."""
    tables, found = set(), set()
    for line in body:
        m = _INSTRUCTION.match(line)
        if m and m.group(2) == "getelementptr" and _OF_TABLE.search(m.group(3)):
            tables.add(m.group(1))
        elif m and m.group(2) == "load":
            pointer = _POINTER.search(m.group(3))
            if pointer and (pointer.group(1) in tables or pointer.group(1).startswith("@")):
                found.add(m.group(1))
    return found


def _fused_products(body: list[str]) -> set[str]:
    """Products with one use, by a sum or difference."""
    uses: Counter[str] = Counter()
    products, summed = set(), set()
    for line in body:
        m = _INSTRUCTION.match(line)
        if not m:
            continue
        operands = _VALUE.findall(m.group(3))
        uses.update(operands)
        if m.group(2) == "fmul":
            products.add(m.group(1))
        elif m.group(2) in ("fadd", "fsub"):
            # One sum can absorb one product.
            summed.update([v for v in operands if v in products][:1])
    return {v for v in products & summed if uses[v] == 1}


def _classify(opcode: str, rest: str) -> tuple[str | None, int]:
    """The class of an instruction, and how many of it a vector operation stands for."""
    m = _VECTOR.search(rest.split("@")[0])
    n = int(m.group(1)) if m else 1
    if opcode in ("and", "lshr") and _HALF_OF_64.search(rest):
        return "resize", 1
    if opcode in _CLASS_OF:
        return _CLASS_OF[opcode], n
    if opcode == "getelementptr":
        return ("address" if _VALUE.search(rest.split(",", 2)[-1]) else None), 1
    if opcode == "br":
        return ("branch" if "i1 " in rest else None), 1
    if opcode == "switch":
        return "branch", 1
    if opcode == "call":
        return _classify_call(rest, n)
    return None, 1


def _classify_call(rest: str, n: int) -> tuple[str | None, int]:
    m = _CALLEE.search(rest)
    name = m.group(1).strip('"') if m else ""
    if _SIMD_FUNCTION.match(name):
        return "simd", 1
    if name == "__msl_sync":
        return "barrier", 1
    if name.startswith("llvm."):
        what = name.split(".")[1]
        if what in _FREE_INTRINSICS:
            return None, 1
        return ("int" if what in _INT_INTRINSICS else "float"), n
    return ("math" if re.fullmatch(r"[a-z0-9]+f", name) else None), 1
