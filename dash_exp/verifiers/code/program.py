"""The program inside a completion.

`candidates` and `find_program` read text only, in time linear in its length: they run in the caller's
process. `assemble` parses what they found, which may take any time and memory: it runs in the sandbox.
"""

from __future__ import annotations

import ast
import re
import sys
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dash_exp.verifiers.types import CodeGold

_BYTE_ORDER_MARK = "\ufeff"
_PYTHON = ("python", "py", "python3")
_FUTURE = re.compile(r"^from[ \t]+__future__[ \t]+import\b", re.MULTILINE)
_MARKS = re.compile(
    r"""\#.*|'''|\"\"\"|"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|\\.|(?P<open>[(\[{])|(?P<close>[)\]}])"""
)
"""What decides where a statement ends: comments, strings on one line, the ends of longer ones, brackets."""
_GOES_ON = re.compile(r"(?:else|elif|except|finally)\b|[)\]}]")
_OPENS = re.compile(r":[ \t]*(?:\#.*)?$")
_BEGINS = re.compile(r"(?:async[ \t]+def|def|class|import|from)[ \t]|@")
_UNREADABLE = (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError)
_DEPTH = 4_000
"""Of nested expressions; each takes a frame of C."""
_MAX_CHARS = 200_000
"""Of a program that are read: enough for any function and what it needs."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """A part of a completion between two fences, or between a fence and an end of the text."""

    language: str
    lines: tuple[str, ...]
    fenced: bool
    closed: bool

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


def find_program(text: str) -> str:
    """The paper's rule: the last Python block of a completion; else its last block; else all of it.

    Closed blocks are preferred to one that the end of the text cuts off, which cannot run. Leading white
    space is kept: a function's body needs it.
    """
    text = text.removeprefix(_BYTE_ORDER_MARK)
    blocks = [piece for piece in _pieces(text, markdown=True) if piece.fenced and piece.text.strip()]
    python = [block for block in blocks if block.language in _PYTHON]
    for found in (python, blocks):
        closed = [block for block in found if block.closed]
        if found:
            return (closed or found)[-1].text.removeprefix(_BYTE_ORDER_MARK)
    return "" if _only_fences(text) else text


def candidates(text: str, gold: CodeGold) -> list[str]:
    """What may be the program, the best first: the text itself where it goes on with the body that the prompt
    began, then the parts between fences that define the entry point, the last one first.

    A fence ends a part wherever it stands, but for one inside a string of several lines, which is text.
    """
    text = text.removeprefix(_BYTE_ORDER_MARK)
    found: list[str] = []
    for markdown in (False, True):  # a string that never ends hides all fences from the first reading
        pieces = [p.text.removeprefix(_BYTE_ORDER_MARK) for p in _pieces(text, markdown)]
        if gold.prefix and pieces and _is_body(pieces[0]):
            found.append(pieces[0])
        if gold.entry_point:
            defining = [p for p in reversed(pieces) if defines(p, gold.entry_point, r"[ \t]*+")]
            found += [p.lstrip() for p in defining]  # a first token may begin with a space
    found.append(find_program(text))
    return [program for program in dict.fromkeys(found) if program.strip()]


def _is_body(text: str) -> bool:
    """Whether the first line of code is indented."""
    lines = (line for line in text.split("\n") if line.strip() and not line.lstrip().startswith("#"))
    return next(lines, "")[:1] in (" ", "\t")


def _pieces(text: str, markdown: bool) -> Iterator[_Piece]:
    """The text divided at its fences: at those that Markdown knows, or at all that stand in no string."""
    fence, language, indent, quote = "", "", "", ""
    lines: list[str] = []
    for line in text.replace("\r\n", "\n").split("\n"):
        match = None if quote else _fence(line)
        if match and markdown and fence and (len(match[0]) < len(fence) or line.strip() != match[0]):
            match = None  # in a block it is text
        if match is None and not markdown and not quote and _ends_in_fence(line):
            match = ("```", "")
            lines.append(line.rstrip().rstrip("`"))
        if match is None:
            lines.append(line.removeprefix(indent))  # a block inside a list item is indented
            quote = "" if markdown else _scan(line, quote)[0]
            continue
        yield _Piece(language, tuple(lines), bool(fence), True)
        opens = bool(match[1]) or not fence
        fence, language = (match[0], match[1].lower().strip("{}.:")) if opens else ("", "")
        indent = line[: len(line) - len(line.lstrip())] if opens else ""
        lines = []
    yield _Piece(language, tuple(lines), bool(fence), False)


def _fence(line: str) -> tuple[str, str] | None:
    """The backticks that open or close a block, and the word after them. A regular expression would try
    every way to divide a line."""
    begins = line.lstrip(" \t")
    rest = begins.lstrip("`")
    ticks = len(begins) - len(rest)
    if ticks < 3 or "`" in rest:
        return None
    rest = rest.lstrip(" \t")
    return "`" * ticks, rest.split(maxsplit=1)[0] if rest and not rest[0].isspace() else ""


def _ends_in_fence(line: str) -> bool:
    """Whether code is followed by a fence: backticks stand in strings and comments only."""
    code = line.rstrip().rstrip("`")
    ticks = len(line.rstrip()) - len(code)
    return ticks >= 3 and "`" not in code and "#" not in code and not _scan(code, "")[0]


def _only_fences(text: str) -> bool:
    return all(_fence(line) or not line.strip() for line in text.splitlines())


def _scan(line: str, quote: str) -> tuple[str, int]:
    """The kind of quotes that are open after a line, and by how much it goes down into brackets. `quote`:
    those open before it."""
    at = depth = 0
    while True:
        if quote:
            end = re.compile(rf"(?:\\.|(?!{quote})[^\\])*{quote}").match(line, at)
            if end is None:
                return quote, depth
            at, quote = end.end(), ""
        mark = _MARKS.search(line, at)
        if mark is None:
            return "", depth
        at = mark.end()
        depth += bool(mark["open"]) - bool(mark["close"])
        quote = mark[0] if mark[0] in ("'''", '"""') else ""


def defines(program: str, name: str, indent: str = "") -> bool:
    """Whether the text defines or assigns `name` at top level. `indent`: a pattern for other levels."""
    name = re.escape(name)
    pattern = rf"^{indent}(?:(?:(?:async[ \t]+)?def|class)[ \t]+{name}\b|{name}[ \t]*(?::[^=\n]*)?=(?!=))"
    return re.search(pattern, program, re.MULTILINE) is not None


def complete(program: str, gold: CodeGold) -> str:
    """The program with what the prompt had begun.

    A program that does not define the entry point is the function's body and gets the entire prefix.
    One that does gets only what stands above the entry point in the prefix (imports and helpers).
    """
    if not gold.prefix:
        return program
    if not gold.entry_point or _is_body(program) or not defines(program, gold.entry_point):
        return gold.prefix + program
    return _with_helpers(program, gold)


def _with_helpers(program: str, gold: CodeGold) -> str:
    if _FUTURE.search(program):  # has to stay first
        return program
    start = re.search(
        rf"^(?:async[ \t]+)?def[ \t]+{re.escape(gold.entry_point)}\b", gold.prefix, re.MULTILINE
    )
    return program if start is None else gold.prefix[: start.start()] + program


# What follows runs in the sandbox.


def assemble(found: Sequence[str], gold: CodeGold) -> types.CodeType:
    """The first of these candidates that defines the entry point, without what follows and does not belong to
    it; where none does, the first as it is. Raises what `compile` raises."""
    sys.setrecursionlimit(max(limit := sys.getrecursionlimit(), _DEPTH))
    try:
        for program in found:
            header = len(gold.prefix.rstrip().split("\n")) if gold.prefix and _is_body(program) else 0
            source = gold.prefix + program if header else _with_helpers(program, gold)
            kept = _belonging(_statements(source), gold.entry_point, header)
            if kept:
                try:
                    return compiled(ast.Module(kept, []))
                except _UNREADABLE:
                    continue
    finally:
        sys.setrecursionlimit(limit)
    return compiled(complete(found[0], gold))


def compiled(program: str | ast.Module) -> types.CodeType:
    """The program's code. Raises what `compile` raises."""
    code = compile(program, "<program>", "exec", dont_inherit=True)
    assert isinstance(code, types.CodeType)
    return code


def _statements(source: str) -> list[ast.stmt]:
    """The statements at top level that can be read."""
    source = source[:_MAX_CHARS]
    try:
        return ast.parse(source).body
    except _UNREADABLE:
        source = source.replace("\0", "?").encode(errors="replace").decode()
    found: list[ast.stmt] = []
    for number, lines in _chunks(source):
        try:
            tree = ast.parse("\n".join(lines))
        except _UNREADABLE:
            continue
        found += ast.increment_lineno(tree, number).body
    return found


def _chunks(source: str) -> Iterator[tuple[int, list[str]]]:
    """The text divided where a statement at top level begins, as far as the lines show, each part with the
    number of its first line. Prose is a statement that cannot be read."""
    chunk, first, quote, depth, inner, opened = list[str](), 0, "", 0, 0, False
    for number, line in enumerate(source.split("\n")):
        code = line.lstrip()
        indent = len(line[: len(line) - len(code)].expandtabs())
        if code and not code.startswith("#") and not quote and (depth <= 0 or _BEGINS.match(line)):
            decorated = bool(chunk) and chunk[-1].startswith("@")
            starts = indent == 0 and not _GOES_ON.match(line) and not decorated
            if starts or 0 < indent < inner or (indent and not inner and not opened):
                yield first, chunk
                chunk, first, depth = [], number, 0
            inner = (inner or indent) if indent else 0
        chunk.append(line)
        quote, down = _scan(line, quote)
        depth += down
        opened = opened if not code else bool(_OPENS.search(line))
    yield first, chunk


def _belonging(statements: list[ast.stmt], entry_point: str, header: int) -> list[ast.stmt]:
    """The first statement that defines the entry point, those before it, and as far as they run those behind
    it that define something, but not by a use of the entry point. Empty where no statement defines it.

    `header`: lines of a function's header, which is defined where it goes on, and only the first time; 0 for
    none: then the last definition counts.
    """
    bound = [_bound(statement) for statement in statements]
    defining = (at for at, names in enumerate(bound) if entry_point in names)
    first = next((at for at in defining if not _uses(statements[at], entry_point)), None)
    if first is None or (statements[first].end_lineno or 0) <= header:
        return []
    before = [s for s in statements[:first] if not _is_idle(s)]
    behind = [
        _attempt(statement)
        for statement, names in zip(statements[first + 1 :], bound[first + 1 :], strict=True)
        if (not header if entry_point in names else names and not _uses(statement, entry_point))
    ]
    return [*before, statements[first], *behind]


def _is_idle(statement: ast.stmt) -> bool:
    """Whether it is an expression of names and constants only: a word of prose, a docstring."""
    active = (ast.Call, ast.Attribute, ast.Subscript)
    return isinstance(statement, ast.Expr) and not any(isinstance(n, active) for n in ast.walk(statement))


def _uses(statement: ast.stmt, name: str) -> bool:
    """Whether it looks the name up when it runs, as far as is seen; a function does so when it is called."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return False
    if isinstance(statement, ast.Assign | ast.AnnAssign) and isinstance(statement.value, ast.Lambda):
        return False
    names = (node for node in ast.walk(statement) if isinstance(node, ast.Name))
    return any(node.id == name and isinstance(node.ctx, ast.Load) for node in names)


def _attempt(statement: ast.stmt) -> ast.stmt:
    """The statement in a `try` that ignores its failure."""
    ignore = ast.ExceptHandler(None, None, [ast.Pass()])
    return ast.fix_missing_locations(ast.copy_location(ast.Try([statement], [ignore], [], []), statement))


def _bound(statement: ast.stmt) -> set[str]:
    """The names that a statement defines, or whose objects it changes."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {statement.name}
    names: set[str] = set()
    for node in ast.walk(statement):
        match node:
            case ast.Name(id=name, ctx=ast.Store() | ast.Del()):
                names.add(name)
            case ast.alias(name=name, asname=other):
                names.add(other or name.partition(".")[0])
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                names.add(name)
            case ast.Attribute(ctx=ast.Store()) | ast.Subscript(ctx=ast.Store()):
                names |= _root(node)
    return names


def _root(node: ast.AST) -> set[str]:
    """The name in front of attributes and items."""
    while isinstance(node, ast.Attribute | ast.Subscript):
        node = node.value
    return {node.id} if isinstance(node, ast.Name) else set()
