"""The page of a study: first why things are as they are, then the claims, then all numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import get_args

from rankwise.report.page import Block, Notice, Number, Numbers, Page, Paragraph, Row, Section, Table
from rankwise.report.words import count
from rankwise.runs.record import Record, Role
from rankwise.studies import charts, grids, page_parts, paper
from rankwise.studies.ledgers import Growth, communication, mean_breakdown
from rankwise.studies.results import Results, epoch_s
from rankwise.studies.statistics import TIME_SPREAD
from rankwise.studies.verdicts import FEW, MANY, Answer, Verdict, points


def study_page(results: Results, judged: list[Verdict], dataset: str, command: str) -> Page:
    """The page. `command` is what runs the study again."""
    records = [record for by_seed in results.records.values() for record in by_seed.values()]
    return Page(
        "The paper's experiments, run again",
        f"Enhancing CNN Training on CIFAR-10 Through MPI Parallelization, with its settings on {dataset}: "
        f"{count(len(records), 'run')}, {count(_seeds(results), 'seed')} each, {_machine(records)}.",
        (
            Section(
                "Why communication looked like less than a second",
                (*_short_form(results), *_communication(results)),
            ),
            Section("Why accuracy falls with more processes", tuple(_accuracy(results))),
            Section("The paper's claims", tuple(_claims(judged))),
            Section("Table 1: number of processes", tuple(_table_1(results))),
            Section("Table 2: batch size", (grids.table_2(results).table(),)),
            Section("Figure 1: one process, and replication", tuple(_figure_1(results))),
            Section("Figure 2: where the time goes", tuple(_figure_2(results))),
            Section(f"Why an epoch takes longer with {MANY} processes", tuple(_growth(results))),
            Section("How this was run", tuple(_how(records, command))),
        ),
    )


def _machine(records: list[Record]) -> str:
    hosts = {host.name: host.cores for record in records for host in record.environment.hosts}
    here = f"on {count(sum(hosts.values()), 'core')}" if hosts else "nothing run yet"
    return f"{here} (the paper had {paper.CORES})"


def _short_form(results: Results) -> Iterable[Block]:
    if results.scale.quick:
        yield Notice(
            "This is a short form, with few samples and few epochs. It shows what the study does, and tells "
            "nothing about accuracy or time: leave out --quick for results."
        )


def _seeds(results: Results) -> int:
    return max((len(by_seed) for by_seed in results.records.values()), default=0)


def _communication(results: Results) -> Iterable[Block]:
    row, table = paper.FIGURE_2[FEW], paper.TABLE_1[FEW]
    timed_s = row.test_loading_s + row.evaluation_s + row.master_communication_s
    yield Paragraph(
        "A worker trains on its share, sends its weights to the master, and calls recv() for their mean. The "
        "master calls recv() once for each worker, averages, evaluates, and sends the mean out. The author's "
        "stopwatch for communication starts when recv() has returned. But a recv() whose message is not "
        "there yet waits inside until it is, and that waiting is on no stopwatch."
    )
    yield Paragraph(
        f"His own numbers show the hole. With {FEW} processes the run took {table.time_s:.0f} s. Of these "
        f"the master's stopwatches have {row.evaluation_s} s of evaluation, {row.test_loading_s} s of "
        f"loading and {row.master_communication_s} s of communication. The other "
        f"{table.time_s - timed_s:.0f} s it sat in recv(), as long as the workers trained: a worker's "
        f"stopwatch for training shows {row.training_s} s."
    )
    runs = {ranks: results.of(results.scale.stopwatch_run(ranks)) for ranks in results.scale.stopwatch}
    found = {
        f"{ranks} processes, {words}": communication(records, role)
        for ranks, records in runs.items()
        if records
        for words, role in _ROLES
    }
    if not found:
        yield Notice("His exchange was not run again here: rankwise reproduce timing.")
        return
    yield Paragraph(
        "Here is his exchange once more, with his stopwatches where he had them. The ledger of the same run "
        "notes when each rank enters and leaves each exchange, and compares these times over all ranks: what "
        "passes before the last one needed has come is waiting, the rest is transfer."
    )
    yield charts.stopwatch_and_ledger(found)
    name, most = max(found.items(), key=lambda item: item[1].wait_s)
    yield Paragraph(
        "So the stopwatch was right about what it timed: moving the weights takes next to no time. What "
        f"ranks lose by working together is waiting, {most.wait_s:.1f} s in the case of {name}, against "
        f"{most.stopwatch_s:.2f} s on the stopwatch. {_REACH}"
    )


_ROLES: tuple[tuple[str, Role], ...] = (("a worker", "worker"), ("the master", "master"))
_REACH = "Measured over a few epochs and scaled to the paper's 25."


def _accuracy(results: Results) -> Iterable[Block]:
    scale = results.scale
    few, many = scale.averaging(FEW), scale.averaging(MANY)
    as_long = scale.with_as_many_updates(MANY, "fixed")
    yield Paragraph(
        "Each epoch the training set is dealt to the workers, each trains on its share alone, and their "
        "weights are averaged. The mean of many networks has come about as far as one of them. With "
        f"{MANY} processes a worker has {1 / (MANY - 1):.0%} of the samples and so makes "
        f"{1 / (MANY - 1):.0%} of the steps of an epoch; with {FEW} it makes half of them. The paper blames "
        "something else: that small shards are learnt by heart."
    )
    yield Paragraph(
        "Two experiments tell these apart. Shards that are dealt anew each epoch are as small, but in time "
        "every worker sees all samples: if small shards are to blame, that gives the accuracy back. And "
        f"{MANY} processes that train for more epochs, until each worker has made as many steps as one of "
        f"{FEW}: if the number of steps is to blame, that gives it back, although the shards stay as small."
    )
    shown = {
        f"{FEW} processes": few,
        f"{MANY}, more epochs": as_long,
        f"{MANY}, shards dealt anew": scale.averaging(MANY, shards="redealt"),
        # Drawn last, over the longer run, which begins with the very same epochs.
        f"{MANY} processes": many,
    }
    runs = {name: records[0] for name, trial in shown.items() if (records := results.of(trial))}
    if len(runs) < len(shown):
        yield Notice("These were not all run here: rankwise reproduce processes.")
        return
    yield Row((charts.accuracy_by_epoch(runs), charts.accuracy_by_step(runs)))
    yield Paragraph(_told_apart(results))
    yield grids.mechanism(results).table()


def _told_apart(results: Results) -> str:
    """What the two experiments say, by the accuracy that each gives back."""
    scale = results.scale
    many = scale.averaging(MANY)
    drop = results.gain(scale.averaging(FEW), many)
    by_shards = results.gain(scale.averaging(MANY, shards="redealt"), many)
    by_steps = results.gain(scale.with_as_many_updates(MANY, "fixed"), many)
    assert drop
    assert by_shards
    assert by_steps
    text = (
        f"From {FEW} to {MANY} processes {points(drop)} of accuracy are lost. Dealing the shards anew gives "
        f"back {points(by_shards)}; as many steps give back {points(by_steps)}. "
    )
    half = drop.value / 2
    if not drop.above(0):
        return text + "The loss itself is not above chance, so there is nothing to explain here."
    if by_steps.above(half) and not by_shards.above(half):
        return text + "So it is the number of steps: the networks have not learnt too much, but too little."
    if by_shards.above(half) and not by_steps.above(half):
        return text + "So it is the small shards."
    return text + "So these runs do not tell the two apart."


def _claims(judged: list[Verdict]) -> Iterable[Block]:
    answers = [verdict.answer for verdict in judged]
    yield Numbers(tuple(Number(a, str(answers.count(a))) for a in get_args(Answer)))
    rows = tuple((verdict.claim, verdict.source, verdict.answer) for verdict in judged)
    yield Table(("the paper's claim", "where", "verdict"), rows)
    for verdict in judged:
        yield Paragraph(verdict.evidence, lead=f"{verdict.claim}: {verdict.answer}.")
    yield Paragraph(
        "Brackets hold 95% intervals: Student's t, over seeds and over turns of the same measurement. Where "
        "something was run but once they say nothing about another run: those of accuracies are what "
        f"measuring on these samples leaves open, and those of times are a factor of {TIME_SPREAD}, by "
        "which single runs spread on a shared machine."
    )
    rules = tuple((verdict.claim, verdict.rule) for verdict in judged)
    yield Table(
        ("the paper's claim", "rule"), rules, "The rules by which the claims were judged", folded=True
    )


def _table_1(results: Results) -> Iterable[Block]:
    yield grids.table_1(results).table()
    yield Paragraph(
        "Accuracy is that of the best epoch, the loss the lowest one, time that of all epochs with "
        f"evaluation and without start-up. The paper had {paper.CORES} cores and gave all of them to every "
        "process; here ranks share the cores out."
    )


def _figure_1(results: Results) -> Iterable[Block]:
    yield grids.baseline_and_replication(results).table()
    grid = grids.figure_1(results)
    if grid.rows:
        yield Row(charts.single_process(grid))
    else:
        yield Notice("One process was not run here: rankwise reproduce baseline.")


def _figure_2(results: Results) -> Iterable[Block]:
    scale = results.scale
    found = grids.by_processes(results)
    ours = f"Here: the mean worker by its ledger, {scale.epochs} epochs."
    yield Row((charts.paper_figure_2(), *([charts.breakdowns(found, scale.epochs, ours)] if found else [])))
    yield grids.figure_2(results).table()
    yield Paragraph(
        "The paper times training and loading in one worker, and evaluation in the master. Here all columns "
        "are the mean worker's: its evaluation is the time that it waits while the master evaluates. Its "
        "data is what opening the dataset and making batches takes; the paper's loaders make batches during "
        "training, on its stopwatch."
    )


def _growth(results: Results) -> Iterable[Block]:
    found = grids.growths(results)
    if not found:
        yield Notice("Not run here: rankwise reproduce timing.")
        return
    limit = results.scale.threads_limits["train_limit"]
    shared, every = grids.by_processes(results), grids.by_threads(results, "all")
    yield Row(
        (
            charts.breakdowns(shared, 1, "Cores shared out: an epoch of the mean worker, all samples."),
            charts.breakdowns(
                every, 1, f"All cores for every process, as in the paper: the same on {limit:,} samples."
            ),
        )
    )
    yield Paragraph(
        "An epoch trains the same samples whatever the number of processes, and it is as long for every "
        "rank, so the parts of the mean worker's epoch add up to it. When cores are used as well as before, "
        "computing changes in proportion to the cores that the workers' threads can keep busy (more cores at "
        "work). What it changes beyond that is oversubscription: more threads than cores take turns, and "
        "wait for each other."
    )
    yield Paragraph(
        f"Both ways to give threads to ranks were compared on {limit:,} samples, in turn. The threads of a "
        "process wait for each other many times in each step, and while they wait they keep their core busy. "
        "With all cores for every process the thread that is waited for may have no core, and then the "
        "others burn their turn until the system takes it from them. How often that happens is chance, and "
        f"so these times spread.{_spread(every)}"
    )
    for name, one in found.items():
        yield Paragraph(_in_words(one), lead=f"{name}.")
    turns = [
        f"{mean.off_cpu_s / mean.computing_s:.0%} with {words}"
        for words, runs in ((grids.THREADS["auto"], shared), (grids.THREADS["all"], every))
        if MANY in runs and (mean := mean_breakdown(runs[MANY]))
    ]
    yield Paragraph(
        f"The ledger shows the turns: of the time in which the mean worker of {MANY} processes had something "
        f"to compute, its main thread was on no core for {' and for '.join(turns)}."
    )
    yield grids.growth_shares(results).table()
    yield grids.epochs(results).table(folded=True)
    before, after = paper.FIGURE_2[FEW], paper.FIGURE_2[MANY]
    longer_s = paper.TABLE_1[MANY].time_s - paper.TABLE_1[FEW].time_s
    yield Paragraph(
        f"In the paper the run gets {longer_s:.0f} s longer from {FEW} to {MANY} processes. One worker's "
        f"stopwatch for training alone gets {after.training_s - before.training_s:.0f} s longer, that for "
        f"evaluation {after.evaluation_s - before.evaluation_s:.1f} s. Its training contains no exchange, "
        f"and all workers together train as many samples as before: {MANY - 1} workers, each with threads "
        f"for {paper.CORES} cores and a process that loads images, get in each other's way."
    )


def _spread(runs: Mapping[int, Sequence[Record]]) -> str:
    seconds = {ranks: sorted(epoch_s(record) for record in records) for ranks, records in runs.items()}
    told = (f"with {ranks} processes {some[0]:.1f} to {some[-1]:.1f} s" for ranks, some in seconds.items())
    return f" An epoch took {', '.join(told)}." if seconds else ""


def _in_words(one: Growth) -> str:
    parts = {
        "oversubscription": one.oversubscription_s,
        "waiting for the master's evaluation": one.evaluation_wait_s,
        "other waiting": one.worker_wait_s + one.master_wait_s,
        "exchange": one.exchange_s,
        "more cores at work": one.more_cores_s,
        "the rest": one.rest_s,
    }
    if one.one_sided:
        shares = ", ".join(f"{name} {seconds / one.total_s:.0%}" for name, seconds in parts.items())
        return f"An epoch takes {one.total_s:.2f} s longer. Of that: {shares}."
    changes = ", ".join(f"{name} {seconds:+.2f} s" for name, seconds in parts.items())
    return f"An epoch changes by {one.total_s:+.2f} s, the sum of {changes}."


def _how(records: list[Record], command: str) -> Iterable[Block]:
    yield page_parts.how_to_run(command)
    yield from page_parts.machines(records)
    yield Paragraph(
        "The tables stand as CSV files in tables/, the record of each run in records/: all its options, its "
        "epochs, and the time of each rank."
    )
