"""What Apple's compiler rejects and clang's C++ for OpenCL lets through, found in clang's AST dump (user text only)."""

from __future__ import annotations

import re
from collections.abc import Callable

_LOCATION = re.compile(r"(?:^|[<\s,])([^\s<>,:]+):(\d+):(\d+)")
_CALLEE = re.compile(r" (?:Function|CXXMethod) (0x[0-9a-f]+) '")
_FUNCTION_NAME = re.compile(r" (\S+) '[^']*'")
_DOUBLE = re.compile(r"(^|[^\w])(long )?double($|[^\w])")
_VIRTUAL = re.compile(r"' virtual\b")
_FUNCTIONS = ("FunctionDecl", "CXXMethodDecl", "CXXConstructorDecl")
_VARIABLES = ("VarDecl", "ParmVarDecl", "FieldDecl")
_GENERIC_CHECKED = (*_VARIABLES, "CStyleCastExpr", "CXXReinterpretCastExpr", "CXXStaticCastExpr")
_DOUBLE_CHECKED = (*_VARIABLES, "CStyleCastExpr", "CXXFunctionalCastExpr", "FloatingLiteral")
_REFERENCES = ("DeclRefExpr", "MemberExpr")
#: Kinds of nodes that are looked at; others only say where their children lie.
_SEEN = {*_FUNCTIONS, *_REFERENCES, *_GENERIC_CHECKED, *_DOUBLE_CHECKED, "GotoStmt", "LabelStmt", "LambdaExpr"}

Fault = tuple[str, int, str]  # file, line, message


def lint(ast: str, is_user: Callable[[str], bool]) -> list[Fault]:
    """Faults of the text in files that `is_user` accepts: address spaces left out, double, goto, recursion ..."""
    return _Linter(is_user).run(ast)


class _Linter:
    def __init__(self, is_user: Callable[[str], bool]) -> None:
        self.is_user = is_user
        self.file, self.line, self.in_user = "", 0, is_user("")
        self.faults: dict[Fault, None] = {}
        self.functions: list[
            tuple[int, str | None]
        ] = []  # depth in the dump, address (None: implicit), outermost first
        self.names: dict[str, Fault] = {}
        self.calls: dict[str, set[str]] = {}

    def run(self, ast: str) -> list[Fault]:
        # Millions of rows: most are passed over with a few splits, regular expressions see those that can matter.
        for row in ast.splitlines():
            head, _, rest = row.partition(" 0x")
            kind = head[head.rfind("-") + 1 :]
            if not rest or not kind.isalnum():
                continue
            place = rest.partition("'")[0]
            if place.count(":") != place.count("col:"):
                self._move(place)
            depth = len(head) - len(kind)
            functions = self.functions
            while functions and functions[-1][0] >= depth:
                functions.pop()
            if kind in _SEEN:
                self._node(row, kind, "0x" + rest.partition(" ")[0], depth, place)
        self._recursions()
        return list(self.faults)

    def _move(self, place: str) -> None:
        """Locations of a row say what has changed since the row before."""
        for at in _LOCATION.finditer(place):
            if at.group(1) != "line":
                self.file = at.group(1)
                self.in_user = self.is_user(self.file)
            self.line = int(at.group(2))

    def _node(self, row: str, kind: str, address: str, depth: int, place: str) -> None:
        if kind in _FUNCTIONS:
            self.functions.append((depth, None if " implicit " in f" {place} " else address))
            name = _FUNCTION_NAME.search(row)
            self.names[address] = (self.file, self.line, name.group(1) if name else "?")
        elif kind in _REFERENCES:
            caller = self.functions[-1][1] if self.functions else None
            callee = _CALLEE.search(row) if caller else None
            if callee:
                self.calls.setdefault(caller, set()).add(callee.group(1))
            return
        # The copy constructor that clang gives a class has parameters without an address space.
        if not self.in_user or any(function is None for _, function in self.functions):
            return
        types = row.split("'", 2)
        message = _fault(kind, types[1] if len(types) == 3 else "")
        if kind == "CXXMethodDecl" and _VIRTUAL.search(row):
            message = "Metal has no virtual functions"
        if message:
            self.faults[self.file, self.line, message] = None

    def _recursions(self) -> None:
        open_now, done = set(), set()

        def visit(function: str) -> None:
            open_now.add(function)
            for callee in self.calls.get(function, ()):
                file, line, name = self.names.get(callee, ("", 0, ""))
                if callee in open_now and self.is_user(file):
                    self.faults[file, line, f"recursion through {name}"] = None
                elif callee not in open_now and callee not in done:
                    visit(callee)
            open_now.discard(function)
            done.add(function)

        for function in list(self.calls):
            if function not in done:
                visit(function)


def _fault(kind: str, type_name: str) -> str | None:
    if kind in _GENERIC_CHECKED and "__generic" in type_name:
        return "pointer or reference without an address space: " + type_name.replace("__generic ", "")
    if kind in _DOUBLE_CHECKED and _DOUBLE.search(type_name):
        return "Metal has no double"
    if kind in ("GotoStmt", "LabelStmt"):
        return "Metal has no goto"
    if kind == "LambdaExpr":
        return "lambda (only in the newest Metal versions)"
    if kind == "VarDecl" and "__global" in re.sub(r"[^*&]*[*&]", "", type_name):
        return "a variable with static storage must be in the constant address space"
    return None
