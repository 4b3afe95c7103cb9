"""Small faults, as changes of a module's syntax tree."""

from __future__ import annotations

import ast
import copy
import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

LONGEST_SNIPPET = 90
FLIPPED = {
    ast.Lt: ast.GtE,
    ast.GtE: ast.Lt,
    ast.Gt: ast.LtE,
    ast.LtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
AT_THE_LIMIT = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt}
ARITHMETIC = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult}
# Fields of the tree that say nothing about behaviour: annotations, decorators, an error's words.
PASSED_OVER = {"annotation", "returns", "decorator_list", "exc"}


@dataclass(frozen=True)
class Fault:
    """The `choice`-th of the changes that there are at the `site`-th place of a module's tree."""

    module: str
    site: int
    choice: int
    line: int
    where: str  # the function or class
    change: str  # what was there -> what is there

    @property
    def name(self) -> str:
        """What it is called, whatever its line."""
        return f"{self.module} {self.where}: {self.change}"


def changes(node: ast.AST, field: str) -> Iterator[ast.AST]:
    """What may stand in the place of `node`, which is in its parent's `field`."""
    match node:
        case ast.Compare(ops=[op]):
            for table in (FLIPPED, AT_THE_LIMIT):
                if type(op) in table:
                    yield _with(node, ops=[table[type(op)]()])
        case ast.Constant(value=bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(value=int(value) | float(value)):
            yield ast.Constant(value + 1)
        case ast.BinOp(op=ast.BitOr()):
            yield _with(node, left=node.right, right=node.left)
        case ast.BinOp(op=op) if type(op) in ARITHMETIC:
            yield _with(node, op=ARITHMETIC[type(op)]())
        case ast.BoolOp(op=op):
            yield _with(node, op=ast.Or() if isinstance(op, ast.And) else ast.And())
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            yield operand
        case ast.Expr(value=ast.Call()) | ast.AugAssign() | ast.Raise():
            yield ast.Pass()
        case ast.Return(value=value) if not (value is None or isinstance(value, ast.Constant) and value.value is None):
            yield ast.Return(ast.Constant(None))
        case ast.Call(args=[first, second, *rest]) if not isinstance(first, ast.Starred):
            yield _with(node, args=[second, first, *rest])
    if field == "test" and not isinstance(node, ast.Compare | ast.UnaryOp):
        yield ast.UnaryOp(ast.Not(), node)


def _with(node: ast.AST, **fields: object) -> ast.AST:
    changed = copy.copy(node)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed


def places(tree: ast.AST, where: str = "module") -> Iterator[tuple[ast.AST, str, int | None, ast.AST, str]]:
    """(parent, its field, number in the field's list, node, function or class) of a whole tree, from the top down."""
    for field, value in ast.iter_fields(tree):
        if field in PASSED_OVER or isinstance(tree, ast.JoinedStr):
            continue
        for number, node in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if isinstance(node, ast.AST):
                yield tree, field, number, node, where
                name = getattr(node, "name", "") if isinstance(node, ast.FunctionDef | ast.ClassDef) else ""
                yield from places(node, ".".join(filter(None, (where.removeprefix("module"), name))) or where)


def faults_of(module: str, root: Path) -> list[Fault]:
    """Every fault that can be planted in a module, a path from `root`; of several called alike, the later numbered."""
    found: list[Fault] = []
    alike: Counter[str] = Counter()
    for site, (_, field, _, node, where) in enumerate(places(ast.parse((root / module).read_text()))):
        for choice, changed in enumerate(changes(node, field)):
            change = f"{_snippet(node)} -> {_snippet(changed)}"
            alike[f"{where} {change}"] += 1
            if (number := alike[f"{where} {change}"]) > 1:
                change += f" ({number})"
            found.append(Fault(module, site, choice, node.lineno, where, change))
    return found


def _snippet(node: ast.AST) -> str:
    text = " ".join(ast.unparse(node).split())
    return text if len(text) <= LONGEST_SNIPPET else f"{text[:LONGEST_SNIPPET]}..."


def planted(fault: Fault, root: Path) -> str:
    """The source of the module with the fault in it."""
    tree = ast.parse((root / fault.module).read_text())
    parent, field, number, node, _ = next(place for i, place in enumerate(places(tree)) if i == fault.site)
    changed = list(changes(node, field))[fault.choice]
    if number is None:
        setattr(parent, field, changed)
    else:
        getattr(parent, field)[number] = changed
    return ast.unparse(ast.fix_missing_locations(tree))


def draw(number: int, seed: int, modules: Sequence[str], root: Path) -> list[Fault]:
    """So many faults, drawn from all that there are, in the order of the code.

    Drawn by their names, so that a change of the code leaves most of them as they are.
    """
    found = [fault for module in modules for fault in faults_of(module, root)]
    found_at = {fault: place for place, fault in enumerate(found)}
    drawn = sorted(found, key=lambda fault: hashlib.sha256(f"{seed} {fault.name}".encode()).digest())
    return sorted(drawn[:number], key=found_at.__getitem__)
