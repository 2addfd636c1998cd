"""Loops that do not take every batch, as people write them: one process, or one line on all ranks."""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from rankwise import Synchroniser, synchronise
from rankwise.comm import World, run_in_threads
from rankwise.comm.threads import Killed
from rankwise.errors import OutOfStepError

from .. import effort
from ..effort import only_in_full
from .test_out_of_step import FEATURES, FIRST, LABELS, SAMPLES

EPOCHS, BATCH = 3, 5
BOUNDED = [{"strategy": its, "sync_every": 1, "max_staleness": 0} for its in ("easgd", "downpour")]
Indices = np.ndarray
LOCK_STEP = [
    {"strategy": "allreduce"},
    {"strategy": "allreduce", "bucket_mb": 1e-4},  # several, which leave during the backward pass
    {"strategy": "allreduce", "compress": "powersgd:2"},
    {"strategy": "gradient-server"},
]
AVERAGING = [
    {"strategy": "parameter-averaging"},
    {"strategy": "parameter-averaging", "topology": "allreduce"},
    {"strategy": "local-sgd", "sync_every": 4},
    {"strategy": "replication"},
    {"strategy": "two-level"},
]
OTHERS = [{"strategy": "gossip", "topology": "complete"}, {"strategy": "easgd"}, {"strategy": "downpour"}]


def name(options: dict[str, Any]) -> str:
    return "-".join(str(value) for value in options.values())


class Stop(Exception):
    """A user's own."""


@dataclass
class Seen:
    """What a rank ended with, and what it made a step with, by epoch."""

    weights: list[np.ndarray]
    batches: list[list[Indices]] = field(default_factory=list)


@dataclass
class Part:
    """A rank's training: a loop's `turn` may do with it as it likes."""

    rank: int
    its: Synchroniser
    model: nn.Module
    optimizer: torch.optim.Optimizer
    batches: list[list[Indices]] = field(default_factory=list)

    def backward(self, indices: Indices) -> None:
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(FEATURES[indices]), LABELS[indices]).backward()

    def step(self, indices: Indices) -> None:
        self.its.step()
        self.batches[-1].append(indices)


Epoch = Callable[[Part, int], None]


def on_ranks(ranks: int, epoch: Epoch, **options: Any) -> list[Seen]:
    """Train on ranks that are threads, each epoch by a loop of a user's own."""
    if options["strategy"] in ("gradient-server", "easgd", "downpour", "parameter-averaging", "replication"):
        ranks += options.get("topology") != "allreduce"  # a master

    def program(world: World) -> Seen:
        model = copy.deepcopy(FIRST)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        its = synchronise(model, optimizer, world, **{"samples": SAMPLES, "batch_size": BATCH} | options)
        part = Part(world.rank, its, model, optimizer)
        for number in range(1, EPOCHS + 1):
            part.batches.append([])
            epoch(part, number)
            if its.progress.closed:
                trained = np.sort(np.concatenate([*part.batches[-1], []]))
                assert trained.tolist() == np.sort(its.trained()).tolist()
        return Seen([p.detach().numpy().copy() for p in model.parameters()], part.batches)

    return run_in_threads(ranks, program)


def step_by_step(seen: list[Seen]) -> list[np.ndarray]:
    """One plain process that makes a step with the batches of all ranks together."""
    model = copy.deepcopy(FIRST)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    workers = [its for its in seen if any(its.batches)]
    for epoch in range(EPOCHS):
        for parts in zip_longest(*(its.batches[epoch] for its in workers), fillvalue=np.empty(0, int)):
            indices = np.concatenate(parts)
            optimizer.zero_grad()
            F.cross_entropy(model(FEATURES[indices]), LABELS[indices]).backward()
            optimizer.step()
    return [p.detach().numpy() for p in model.parameters()]


def averaged(seen: list[Seen], every: int | None) -> list[np.ndarray]:
    """One plain process that trains each rank's batches by themselves, and takes the mean of their weights,
    by the samples that each trained, at the end of an epoch and after `every` steps."""
    workers = [its for its in seen if any(its.batches)]
    models = [copy.deepcopy(FIRST) for _ in workers]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for model in models]
    for epoch in range(EPOCHS):
        longest = max(len(its.batches[epoch]) for its in workers)
        for start in range(0, longest, every or longest):
            counts = []
            for its, model, optimizer in zip(workers, models, optimizers, strict=True):
                round_ = its.batches[epoch][start : start + (every or longest)]
                for indices in round_:
                    optimizer.zero_grad()
                    F.cross_entropy(model(FEATURES[indices]), LABELS[indices]).backward()
                    optimizer.step()
                counts.append(sum(map(len, round_)))
            with torch.no_grad():
                for parameters in zip(*(model.parameters() for model in models), strict=True):
                    mean = sum(n * p for n, p in zip(counts, parameters, strict=True)) / sum(counts)
                    for parameter in parameters:
                        parameter.copy_(mean)
    return [p.detach().numpy() for p in models[0].parameters()]


def assert_one_process(seen: list[Seen], options: dict[str, Any]) -> None:
    if options.get("compress"):
        expected = seen[0].weights  # all ranks are alike
    elif options in LOCK_STEP or options["strategy"] == "two-level":  # all ranks are on one host
        expected = step_by_step(seen)
    else:
        expected = averaged(seen, options.get("sync_every"))
    for its in seen:
        for found, wanted in zip(its.weights, expected, strict=True):
            assert np.abs(found - wanted).max() < 1e-10


def loop(do: Callable[[Part, int, int], str | None], take: Callable[[Any], Iterable[Any]] = iter) -> Epoch:
    """A loop that asks in each turn what to `do`, by epoch and step."""

    def epoch(part: Part, number: int) -> None:
        for step, batch in enumerate(take(part.its.batches(number)), start=1):
            word = do(part, number, step)
            if word == "break first":
                break
            if word == "continue":
                continue
            part.backward(batch.indices)
            if word == "break":
                break
            if word == "continue after backward":
                continue
            if word == "return":
                return
            if word == "exit":
                sys.exit(0)
            if word == "raise":
                raise Stop
            part.step(batch.indices)
            if word == "break after":
                break

    return epoch


def at(epoch: int, step: int, word: str, rank: int | None = None) -> Callable[[Part, int, int], str | None]:
    """Do this in one turn, on all ranks or on one."""
    return lambda part, *turn: word if turn == (epoch, step) and rank in (None, part.rank) else None


def line_of(words: str) -> int:
    """The line of this file that does what `loop` is asked to do."""
    lines, first = inspect.getsourcelines(loop)
    return first + next(number for number, line in enumerate(lines) if f'== "{words}"' in line) + 1


BREAKS = ["break first", "break", "break after", "return"]


@pytest.mark.parametrize(("options", "word"), effort.rotating(LOCK_STEP + AVERAGING, BREAKS))
def test_break_on_all_ranks_ends_the_epoch(options: dict[str, Any], word: str) -> None:
    """A loop that all ranks leave in the same step ends the epoch there, as in one process."""
    seen = on_ranks(2, loop(at(2, 3, word)), **options)
    taken = 3 if word == "break after" else 2
    assert {len(its.batches[1]) for its in seen if any(its.batches)} == {taken}
    assert_one_process(seen, options)


@pytest.mark.parametrize("word", ["break first", "break"])
@pytest.mark.parametrize("options", [*LOCK_STEP[:2], LOCK_STEP[3], *AVERAGING], ids=name)
def test_break_where_others_have_no_batch_is_theirs_too(options: dict[str, Any], word: str) -> None:
    """A rank whose batches are over by the step in which others leave has left it, too."""
    options = options | {"samples": 51}  # rank 0 of two that train has six batches, the other five
    if options["strategy"] == "replication":
        options |= {"samples": 30}
    seen = on_ranks(2, loop(at(2, 6, word)), **options)
    assert {len(its.batches[1]) for its in seen if any(its.batches)} == {5}
    assert_one_process(seen, {key: value for key, value in options.items() if key != "samples"})


@pytest.mark.parametrize("word", ["continue", "continue after backward"])
@pytest.mark.parametrize("options", LOCK_STEP + AVERAGING, ids=name)
def test_turns_without_a_step_on_all_ranks(options: dict[str, Any], word: str) -> None:
    """A batch with which no rank makes a step is one with which one process makes none."""
    seen = on_ranks(3, loop(lambda part, epoch, step: word if (epoch + step) % 3 == 0 else None), **options)
    assert_one_process(seen, options)


@pytest.mark.parametrize("options", [*AVERAGING[:2], AVERAGING[3]], ids=name)
def test_an_average_counts_what_was_trained(options: dict[str, Any]) -> None:
    """A worker that leaves batches out by itself counts by the samples that it trained."""
    worker = 1 if options.get("topology") != "allreduce" else 0
    seen = on_ranks(
        2, loop(lambda part, epoch, step: "continue" if part.rank == worker and step < 3 else None), **options
    )
    assert_one_process(seen, options)


@pytest.mark.parametrize("word", ["continue", "continue after backward"])
@pytest.mark.parametrize("options", [*LOCK_STEP, AVERAGING[-1]], ids=name)
def test_turns_without_a_step_on_one_rank_are_refused(options: dict[str, Any], word: str) -> None:
    """Where ranks step together, a batch with which only some make a step ends all, with rank and line."""
    with pytest.raises(
        OutOfStepError, match=r"rank 1 made no step\(\) with a batch of epoch 2, step 3, in the loop at "
    ):
        on_ranks(2, loop(at(2, 3, word, rank=1)), **options)


def test_gradients_without_their_step_are_dropped() -> None:
    """Gradients of a few batches that are summed up before a step are dropped where the loop is left before
    it, as in one process."""

    def left(part: Part, number: int) -> None:
        loop(at(2, 3, "break"))(part, number)
        if number == 2:
            assert len(part.batches.pop()) == 2
            part.batches.append([])  # no step was made with them

    def without(part: Part, number: int) -> None:
        if number != 2:
            loop(at(0, 0, ""))(part, number)
        else:
            for _ in part.its.batches(number):
                break

    options = {"strategy": "allreduce", "sync_every": 4}
    for one, other in zip(on_ranks(2, left, **options), on_ranks(2, without, **options), strict=True):
        assert all(map(np.array_equal, one.weights, other.weights))
    with pytest.raises(OutOfStepError, match=r"step 3, .* though it made one with others, whose gradients"):
        on_ranks(2, loop(at(2, 3, "continue")), **options)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        pytest.param(options, word, marks=[only_in_full] * (word not in ("break", "exit") and number > 0))
        for number, options in enumerate(LOCK_STEP + AVERAGING + OTHERS + BOUNDED)
        for word in (*BREAKS, "exit")
    ],
    ids=lambda value: name(value) if isinstance(value, dict) else value,
)
def test_leaving_on_one_rank_ends_all_with_its_line(options: dict[str, Any], word: str) -> None:
    """A loop that one rank leaves ends all ranks, and the line names that rank, its step and its line."""
    line = rf"rank 1 left .* at \S*test_leaving.py:{line_of(word)} in epoch 2, step 3, while rank \d went on"
    with pytest.raises(OutOfStepError, match=line):
        on_ranks(3, loop(at(2, 3, word, rank=1)), **options)


def test_leaving_in_different_steps_is_refused() -> None:
    """Ranks that leave a loop in different steps end with a line that says who did so when."""
    with pytest.raises(
        OutOfStepError, match=r"rank 0 left .* in epoch 2, step 2, while rank 1 left it in step 3"
    ):
        on_ranks(
            2,
            loop(lambda part, epoch, step: "break" if (epoch, step) == (2, 2 + part.rank) else None),
            strategy="local-sgd",
        )


@pytest.mark.parametrize("options", OTHERS, ids=name)
def test_break_on_all_ranks_where_they_are_rounds_apart(options: dict[str, Any]) -> None:
    """Ranks that are rounds apart go on to exchange until the epoch is over, and train no more of it."""
    seen = on_ranks(3, loop(at(2, 3, "break")), **options)
    assert {len(its.batches[1]) for its in seen if any(its.batches)} == {2}
    if options["strategy"] == "gossip":
        assert_one_process(seen, {"strategy": "local-sgd", "sync_every": 1})  # all are neighbours


def test_an_exception_on_one_rank_is_what_ends_all() -> None:
    """An exception that ends the loop of one rank is raised, and no leaving of others in its place."""
    with pytest.raises(Stop):
        on_ranks(3, loop(at(2, 3, "raise", rank=1)), strategy="allreduce")


def caught(epoch: Epoch) -> Epoch:
    def whole(part: Part, number: int) -> None:
        with suppress(Stop):
            epoch(part, number)
        part.its.world.barrier()

    return whole


@pytest.mark.parametrize("options", [LOCK_STEP[0], LOCK_STEP[3], *AVERAGING[:3]], ids=name)
def test_an_exception_that_is_caught_leaves_the_loop(options: dict[str, Any]) -> None:
    """An exception that all ranks catch outside of the loop ends the epoch as `break` does; one that a rank
    catches alone ends all."""
    assert_one_process(on_ranks(2, caught(loop(at(2, 3, "raise"))), **options), options)
    with pytest.raises(OutOfStepError, match=f"rank 1 left .*:{line_of('raise')} in epoch 2, step 3"):
        on_ranks(2, caught(loop(at(2, 3, "raise", rank=1))), **options)


def test_what_is_evaluated_after_an_exception_is_what_all_have() -> None:
    """A model that is evaluated or saved behind an exception that ended its loop is the mean of all ranks."""

    def epoch(part: Part, number: int) -> None:
        with suppress(Stop):
            loop(at(max(number, 2), 3, "raise"))(part, number)
        if number == 2:
            with torch.inference_mode():
                scores = part.model(FEATURES)
            assert all(torch.equal(scores, its) for its in part.its.world.allgather_object(scores))
        if number == 3:
            saved = part.model.state_dict()["0.weight"]
            assert all(torch.equal(saved, its) for its in part.its.world.allgather_object(saved))

    options = {"strategy": "local-sgd"}
    assert_one_process(on_ranks(2, epoch, **options), options | {"sync_every": 8})


def test_exit_on_all_ranks_ends_quietly() -> None:
    """`sys.exit` in the same step of all ranks ends them with its code."""
    with pytest.raises(SystemExit) as ended:
        on_ranks(3, loop(at(2, 3, "exit")), strategy="allreduce")
    assert ended.value.code == 0


def wrapped(batches: Iterator[Any]) -> Iterator[Any]:
    """As a progress bar does."""
    yield from enumerate(batches)


def kept(batches: Iterator[Any]) -> Iterator[Any]:
    KEPT.append(batches)
    return batches


KEPT: list[Iterator[Any]] = []


@pytest.mark.parametrize(
    "take", [kept, lambda batches: (batch for _, batch in wrapped(batches))], ids=["kept", "wrapped"]
)
def test_a_loop_around_a_loop_is_left_with_it(take: Callable[[Any], Iterable[Any]]) -> None:
    """A generator around the batches, or a name for them, changes nothing: the epoch ends where they are
    left, at the latest when the next one begins."""

    def program(world: World) -> int:
        model = copy.deepcopy(FIRST)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        its = synchronise(model, optimizer, world, samples=SAMPLES, batch_size=BATCH, strategy="allreduce")
        part = Part(world.rank, its, model, optimizer)
        for number in range(1, EPOCHS + 1):
            part.batches.append([])
            loop(at(number, 3, "break"), take)(part, number)
        return sum(map(len, part.batches))

    assert run_in_threads(2, program) == [2 * EPOCHS] * 2
    KEPT.clear()


def test_an_epoch_again_is_trained_again() -> None:
    """`batches` of an epoch that is over begins it anew."""
    whole = loop(lambda part, epoch, step: None)
    seen = on_ranks(2, lambda part, number: whole(part, 1), strategy="allreduce")
    assert_one_process(seen, {"strategy": "allreduce"})


@pytest.mark.parametrize("word", ["break", "continue"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_batch_left_out_is_no_step_of_the_average(word: str, ranks: int) -> None:
    """An average of the weights follows the steps that were made, and those alone."""

    def program(world: World) -> tuple[list[np.ndarray], list[np.ndarray]]:
        model = copy.deepcopy(FIRST)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        options = {"averaged_weights": "ema", "average_decay": 0.9, "batch_size": BATCH}
        strategy = "allreduce" if ranks > 1 else None
        its = synchronise(model, optimizer, world, samples=SAMPLES, strategy=strategy, **options)
        part = Part(world.rank, its, model, optimizer)
        seen = [p.detach().clone() for p in model.parameters()]
        steps = 0

        def step(indices: Indices) -> None:
            nonlocal steps
            its.step()
            steps += 1
            decay = min(0.9, (1 + steps) / (10 + steps))
            for slow, fast in zip(seen, model.parameters(), strict=True):
                slow.lerp_(fast.detach(), 1 - decay)

        part.step = step  # type: ignore[method-assign]
        for number in range(1, EPOCHS + 1):
            loop(at(number, 2, word))(part, number)
        return [p.numpy() for p in seen], [p.detach().numpy() for p in its.replica.evaluated.parameters()]

    for expected, found in run_in_threads(ranks, program):
        for one, other in zip(expected, found, strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-12)


def test_an_epoch_with_a_caught_exception_can_be_retried() -> None:
    """`retry_until_all` of an epoch whose loop an exception has left on all ranks comes to its end, with a
    master too."""

    def program(world: World) -> bool:
        model = copy.deepcopy(FIRST)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        options = {"samples": SAMPLES, "batch_size": BATCH, "strategy": "gradient-server"}
        its = synchronise(model, optimizer, world, **options)
        part = Part(world.rank, its, model, optimizer, [[]])
        its.retry_until_all(lambda: caught(loop(at(1, 2, "raise")))(part, 1))
        return its.progress.closed

    assert run_in_threads(3, program) == [True] * 3


@pytest.mark.parametrize("options", [LOCK_STEP[1], AVERAGING[2]], ids=name)
def test_an_epoch_that_one_rank_skips_is_found(options: dict[str, Any]) -> None:
    """A rank that passes over an epoch, and trains the next one with the others' own, is found at its end."""
    whole = loop(lambda part, epoch, step: None)

    def epoch(part: Part, number: int) -> None:
        whole(part, number + ((part.rank, number) == (1, 2)))

    with pytest.raises(
        OutOfStepError, match="rank 1 is at the end of epoch 3 while rank 0 is at that of epoch 2"
    ):
        on_ranks(2, epoch, **options)


def test_two_loops_at_once_are_refused() -> None:
    """Batches of two loops in turn are refused, with both lines."""

    def epoch(part: Part, number: int) -> None:
        for batch, _ in zip(part.its.batches(1), part.its.batches(1), strict=True):
            part.backward(batch.indices)
            part.step(batch.indices)

    with pytest.raises(
        OutOfStepError, match=r"batches\(1\) at .*test_leaving.py:\d+ goes on, though another one was begun"
    ):
        on_ranks(2, epoch, strategy="allreduce")


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("options", "samples", "inside"),
    effort.rotating([LOCK_STEP[0], LOCK_STEP[3], *AVERAGING[1:3], OTHERS[0]], [60, 61], [False, True]),
)
def test_loops_of_two_synchronisers_at_once_are_refused(
    options: dict[str, Any], samples: int, inside: bool
) -> None:
    """Batches of two synchronisers in turn, as for the two networks of a GAN, or the whole loop of one inside
    of that of another, are refused with both lines: exchanges of one would meet those of the other where
    ranks have batches of different number. One after the other they train."""

    def program(world: World) -> None:
        parts = []
        for features in (6, 4):
            model = nn.Linear(features, 3).double()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            its = synchronise(model, optimizer, world, samples=samples, batch_size=BATCH, **options)
            parts.append((model, its, FEATURES[:, :features]))

        def turn(number: int, indices: Indices) -> None:
            model, its, features = parts[number]
            model.zero_grad()
            model(features[indices % SAMPLES]).sum().backward()
            its.step()

        first, second = (its for _, its, _ in parts)
        for number, its in enumerate((first, second)):
            for batch in its.batches(1):
                turn(number, batch.indices)
        if not inside:
            for one, other in zip(first.batches(2), second.batches(2), strict=False):
                turn(0, one.indices)
                turn(1, other.indices)
            return
        for batch in first.batches(2):
            turn(0, batch.indices)
            for other in second.batches(2):
                turn(1, other.indices)

    with pytest.raises(
        OutOfStepError,
        match=r"batches\(2\) was asked of a second synchroniser at \S*test_leaving.py:\d+, while a loop "
        r"over batches of another one is open at \S*test_leaving.py:\d+: take one loop to its end",
    ):
        run_in_threads(3, program)


@pytest.mark.parametrize("options", [LOCK_STEP[1], AVERAGING[2]], ids=name)
def test_evaluation_in_the_middle_changes_nothing(options: dict[str, Any]) -> None:
    """Evaluating, with exchanges of one's own, in the middle of an epoch leaves the training as it is."""

    def evaluates(part: Part, epoch: int, step: int) -> None:
        part.model.eval()
        with torch.inference_mode():
            loss = F.cross_entropy(part.model(FEATURES), LABELS).item()
        part.its.world.allreduce(np.array([loss]))
        part.model.train()

    assert_one_process(on_ranks(2, loop(evaluates), **options), options)


@pytest.mark.parametrize("options", [*LOCK_STEP[:2], *AVERAGING[1:3]], ids=name)
@pytest.mark.parametrize("calls", [7, 11, 15, 19])
def test_others_leave_though_a_rank_is_lost(options: dict[str, Any], calls: int) -> None:
    """Ranks that leave a loop while another is lost go on together, from the same weights."""

    def program(world: World) -> tuple[list[int], bytes]:
        model = copy.deepcopy(FIRST)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        its = synchronise(
            model, optimizer, world, samples=SAMPLES, batch_size=BATCH, on_failure="continue", **options
        )
        part = Part(world.rank, its, model, optimizer)
        for number in range(1, EPOCHS + 1):
            part.batches.append([])
            its.retry_until_all(lambda number=number: loop(at(number, 3, "break"))(part, number))
        return world.members, b"".join(p.detach().numpy().tobytes() for p in model.parameters())

    results = run_in_threads(3, program, kill_at={1: calls})
    assert results[1] is Killed
    assert results[0] == results[2]
    assert results[0][0] == [0, 2]


def test_step_forgotten_is_refused() -> None:
    """An epoch without a single step() is a step() that was forgotten."""
    with pytest.raises(OutOfStepError, match=r"no batch of epoch 1 was followed by step\(\) in the loop at "):
        on_ranks(2, loop(lambda part, epoch, step: "continue"), strategy="parameter-averaging")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("options", [LOCK_STEP[0], LOCK_STEP[3], *AVERAGING[:3], *OTHERS, *BOUNDED], ids=name)
def test_ending_on_one_rank_ends_all(options: dict[str, Any]) -> None:
    """A program that one rank ends after an epoch, as early stopping does, ends all ranks, with its line."""
    whole = loop(lambda part, epoch, step: None)

    def early(part: Part, number: int) -> None:
        if part.rank == 1 and number == 2:
            sys.exit(0)
        whole(part, number)

    line = (
        r"rank 1 has come to the end of its program, after the loop .* at \S*test_leaving.py:\d+ in epoch 1"
    )
    with pytest.raises(OutOfStepError, match=line):
        on_ranks(3, early, **options)


def test_an_exchange_of_ones_own_learns_that_a_rank_has_ended() -> None:
    """So does an exchange of a user's own, whose line is named, too."""

    def program(world: World) -> None:
        if world.rank == 0:
            world.barrier()

    line = r"rank 1 has come to the end of its program, while rank 0 waits for it at \S*test_leaving.py:\d+"
    with pytest.raises(OutOfStepError, match=line):
        run_in_threads(2, program)
