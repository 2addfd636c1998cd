"""What came of the cells, as docs/matrix.md."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping

from tests.matrix.cells import Cell, Outcome, Verdict
from tests.matrix.choice import families
from tests.matrix.models import MODELS
from tests.matrix.styles import STYLES
from tests.matrix.ways import WAYS
from tests.strategies.optimizers import OPTIMIZERS

Results = Mapping[Cell, Outcome]

VERDICTS: tuple[Verdict, ...] = ("equal", "different as documented", "refused", "wrong")
SIGNS = dict(zip(VERDICTS, ("", "~", "!", "WRONG "), strict=True))

HEAD = """\
# The matrix: N ranks against one process

Training on N ranks ends where one process does, or where the rule of its strategy does, written in plain torch
on one process. `make matrix` tries that on programs as people write them: a model, an optimiser, a strategy with
its options, a loop, and 1 to 3 ranks. It draws cells by a seed, so that each model meets each optimiser and each
strategy, and each strategy in all its ways each loop, and writes this page.

A cell trains six epochs in float64, about 50 steps, and is

- **equal** if ranks are alike and everything (weights, buffers, what is looked at on the way) is within 1e-10 of
  the rule. float32, bfloat16 and mixed models are compared after their first step, PowerSGD to 1e-5, since it
  multiplies in float32;
- **different as documented** (`~`) for a reason that is named below. Ranks must be alike all the same, and where
  each rank's batch counts by itself (BatchNorm, spectral norm) they must end where that rule does;
- **refused** (`!`) if rankwise says so in the one line that the cell expects;
- **wrong** otherwise: another value, another error, a rank that is lost, a hang.
"""  # noqa: E501 (as long as lines of a page are)

RULES = {
    "allreduce, gradient-server, two-level on one host": "a plain loop with the batches of all ranks in one",
    "the same, compressed": "each rank's gradient, and what its message leaves out is kept for the next",
    "two-level on two hosts": "a plain loop for each host, whose weights are averaged",
    "parameter-averaging, replication, paper-stopwatch, local-sgd, post-local-sgd": (
        "a plain loop for each worker, whose weights are averaged by samples"
    ),
    "slowmo, diloco": "the same, and the outer optimiser's step",
    "gossip": "a plain loop for each rank, and the mean with its neighbours",
    "easgd, downpour": "a plain loop and its centre, of one worker",
}

LEFT_OUT = """
Not in it: `ddp`, which is PyTorch's own and needs processes (tests/test_mpi.py has it), and asynchronous
strategies with several workers, who are served as they come. Left out are programs that fail in one process
too (most optimisers refuse sparse gradients, which ranks make dense; Prodigy takes no second rate), and Muon
in bfloat16, which makes what 8 bits round as large as all else.
"""


def page(results: Results) -> str:
    """The whole page."""
    rules = ["## The rules", "", "| strategies | rule |", "|---|---|"]
    rules += [f"| {strategies} | {rule} |" for strategies, rule in RULES.items()]
    return "\n".join([HEAD, *_counts(results), "", *rules, LEFT_OUT, *_words(results), *_cells(results)])


def summary(results: Results) -> str:
    """The counts in one line."""
    found = Counter(outcome.verdict for outcome in results.values())
    return f"{len(results)} cells: " + ", ".join(f"{found[verdict]} {verdict}" for verdict in VERDICTS)


def _counts(results: Results) -> Iterator[str]:
    yield f"**{summary(results)}.**"
    axes = {
        "strategies": [(name, ways) for name, ways in families().items()],
        "models": [(name, [name]) for name in MODELS],
        "optimisers": [(name, [name]) for name in OPTIMIZERS],
        "loops": [(name, [name]) for name in STYLES],
    }
    attributes = {"strategies": "way", "models": "model", "optimisers": "optimizer", "loops": "style"}
    for axis, rows in axes.items():
        yield from (
            "",
            f"## By {axis}",
            "",
            f"| {axis} | cells | equal | ~ | ! | wrong |",
            "|---|" + "---:|" * 5,
        )
        for name, values in rows:
            of = [its for cell, its in results.items() if getattr(cell, attributes[axis]) in values]
            found = Counter(its.verdict for its in of)
            counts = [len(of), *(found[verdict] for verdict in VERDICTS)]
            yield f"| {name} | {' | '.join(map(str, counts))} |"


def _words(results: Results) -> Iterator[str]:
    for verdict, title in (("different as documented", "Different as documented"), ("refused", "Refused")):
        words = Counter(its.words for its in results.values() if its.verdict == verdict)
        yield from (f"## {title}", "")
        yield from (f"- {line.replace('|', '/')} ({count})" for line, count in sorted(words.items()))
        yield ""
    wrong = {cell.name: its.words for cell, its in results.items() if its.verdict == "wrong"}
    if wrong:
        yield from ("## Wrong", "", *(f"- `{name}`: {words}" for name, words in wrong.items()), "")


def _cells(results: Results) -> Iterator[str]:
    yield from ("## All cells", "", "By strategy and model: optimiser/loop/ranks.", "")
    for way in WAYS:
        of = [(cell, its) for cell, its in results.items() if cell.way == way]
        if not of:
            continue
        by_model: dict[str, list[str]] = defaultdict(list)
        for cell, its in of:
            by_model[cell.model].append(
                f"{SIGNS[its.verdict]}{cell.optimizer}/{cell.style}/{cell.ranks}".replace(" ", "\u00a0")
            )
        cells = "; ".join(f"*{model}* {', '.join(by_model[model])}" for model in MODELS if model in by_model)
        yield from (f"**{way}**: {cells}", "")
