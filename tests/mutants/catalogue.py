"""Which mutants there are, and which of them are drawn."""

from __future__ import annotations

import ast
import difflib
import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cosmic_ray.plugins
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.ast.ast_query import ASTQuery
from cosmic_ray.mutating import mutate_code

GROUPS = {
    "sampler and partition": ("data/sampler.py", "data/partition.py", "training/batch_sizes.py"),
    "rules of waiting": (
        "ledger/waits.py",
        "ledger/messages.py",
        "ledger/ideal_time.py",
        "ledger/exchange_log.py",
    ),
    "ledger": ("ledger/phases.py",),
    "compression": ("strategies/compression.py", "strategies/powersgd.py"),
    "checkpoints": ("runs/checkpoint.py", "runs/checkpoint_writer.py"),
    "strategies": (
        "strategies/averaging.py",
        "strategies/gradients.py",
        "strategies/asynchronous.py",
        "strategies/gossip.py",
        "strategies/hierarchical.py",
        "strategies/exchange.py",
        "strategies/buckets.py",
    ),
    "recovery": (
        "training/synchroniser.py",
        "training/recovery.py",
        "training/snapshots.py",
        "training/admission.py",
        "models/replica.py",
    ),
}
"""The modules that get mutants, all below `PACKAGE`."""

PACKAGE = Path("src/rankwise")

FLOOR = 15
"""Mutants that are drawn of each group at least, if it has as many places for them."""

_OPERATORS = {
    name: operator()
    for name in cosmic_ray.plugins.operator_names()
    # Those with arguments put random numbers for variables that one must name.
    if not (operator := cosmic_ray.plugins.get_operator(name)).arguments()
}


@dataclass(frozen=True)
class Mutant:
    """One change of one module. By `key` it is known in other versions of the module too: it depends on the
    text of the line and the name of the function, not on what stands elsewhere."""

    key: str
    group: str
    module: str
    line: int
    operator: str
    occurrence: int


def modules() -> list[str]:
    """The modules of all groups."""
    return [module for members in GROUPS.values() for module in members]


def text_of(tree: Path, module: str) -> str:
    """A module's text."""
    return (tree / PACKAGE / module).read_text("utf-8")


def places(tree: Path, group: str) -> list[list[Mutant]]:
    """All places of a group where something else can stand, each with its mutants."""
    found: dict[tuple[str, str, tuple[int, int]], list[Mutant]] = defaultdict(list)
    for module in GROUPS[group]:
        source = text_of(tree, module)
        lines, idle, seen = source.splitlines(), list(_idle(ast.parse(source))), Counter[str]()
        nodes = list(ast_nodes(get_ast(source)))
        for name, operator in _OPERATORS.items():
            positions = ((node, start) for node in nodes for start, _ in operator.mutation_positions(node))
            for occurrence, (node, start) in enumerate(positions):
                if any(first <= start < last for first, last in idle):
                    continue
                if node.parent is not None and node.parent.type in ("parameters", "dictorsetmaker"):
                    continue  # a star that is no operator
                kind = name.removeprefix("core/")
                where = ASTQuery(node).get_definition_name() or ""
                line = lines[start[0] - 1]
                sight = f"{kind} {where} {start[1] - len(line) + len(line.lstrip())} {line.strip()}"
                seen[sight] += 1
                key = f"{module}:{where}:{kind}:{_digest(f'{sight} {seen[sight]}')[:8]}"
                mutant = Mutant(key, group, module, start[0], name, occurrence)
                found[module, kind.partition("_")[0], start].append(mutant)
    return list(found.values())


def draw(tree: Path, *, seed: int, sample: int) -> list[Mutant]:
    """About `sample` mutants, of all groups in proportion to their places but `FLOOR` of each at least.

    Of a place at most one is drawn: eleven operators could stand where a plus stands, and most tell the same.
    What is drawn depends on the mutants' keys, so a change of the code leaves most of the sample as it was.
    """
    drawn = []
    by_group = {group: places(tree, group) for group in GROUPS}
    for group, count in _quotas({group: len(found) for group, found in by_group.items()}, sample).items():
        ordered = [sorted(place, key=lambda m: _digest(f"{seed} {m.key}")) for place in by_group[group]]
        ordered.sort(key=lambda place: _digest(f"{seed} {place[0].key}"))
        candidates = (next((m for m in place if change(tree, m) is not None), None) for place in ordered)
        some = (mutant for mutant in candidates if mutant is not None)
        drawn += [mutant for _, mutant in zip(range(count), some, strict=False)]
    return drawn


def change(tree: Path, mutant: Mutant) -> str | None:
    """The module with the change in it; None if that is no Python, or says the same."""
    source = text_of(tree, mutant.module)
    changed = mutate_code(source, _OPERATORS[mutant.operator], mutant.occurrence)
    try:
        same = changed is None or ast.dump(ast.parse(changed)) == ast.dump(ast.parse(source))
        compile(changed or "", mutant.module, "exec", dont_inherit=True)
    except SyntaxError:
        return None
    return None if same else changed


def difference(before: str, after: str) -> tuple[str, str]:
    """What lines stood there, and what stands there in their place, each on one line."""
    lines = list(difflib.ndiff(before.splitlines(), after.splitlines()))
    gone, new = (" ".join(line[2:] for line in lines if line[:2] == mark) for mark in ("- ", "+ "))
    return " ".join(gone.split()), " ".join(new.split())


def _quotas(sizes: dict[str, int], sample: int) -> dict[str, int]:
    small = {group: size for group, size in sizes.items() if sample * size < FLOOR * sum(sizes.values())}
    rest = sample - sum(min(FLOOR, size) for size in small.values())
    places = sum(sizes.values()) - sum(small.values())
    return {
        group: min(size, FLOOR) if group in small else max(FLOOR, round(rest * size / places))
        for group, size in sizes.items()
    }


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _idle(tree: ast.Module) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Where a change changes nothing: what only readers and type checkers look at."""
    for node in ast.walk(tree):
        part: ast.AST | None = None
        if isinstance(node, ast.arg | ast.AnnAssign):
            part = node.annotation
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            part = node.returns
        elif isinstance(node, ast.If | ast.Assign):
            head = ast.unparse(node.test if isinstance(node, ast.If) else node.targets[0])
            part = node if head in ("TYPE_CHECKING", "__all__") else None
        if isinstance(part, ast.expr | ast.stmt):
            yield (part.lineno, part.col_offset), (part.end_lineno or 0, part.end_col_offset or 0)
