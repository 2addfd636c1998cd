"""What a loop does besides a plain step: N ranks compute what one process does, or it is refused in one
line."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankwise import synchronise
from rankwise.comm import World, run_in_threads
from rankwise.errors import ConfigError, ModelError, OutOfStepError, RankwiseError

SAMPLES, EPOCHS, BATCH = 60, 3, 5
RNG = torch.Generator().manual_seed(5)
FEATURES = torch.randn(SAMPLES, 6, generator=RNG, dtype=torch.float64)
LABELS = torch.randint(0, 3, (SAMPLES,), generator=RNG)
torch.manual_seed(9)
FIRST = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()

Step = Callable[[], None]


@dataclass
class Loop:
    """A user's loop, on ranks or in one process."""

    optimizer_of: Callable[[nn.Module], torch.optim.Optimizer] = lambda model: torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.9
    )
    body: Callable[[nn.Module, torch.optim.Optimizer, Step, Tensor, Tensor], None] | None = None
    before_epoch: Callable[[nn.Module, torch.optim.Optimizer, int], None] = lambda model, optimizer, epoch: (
        None
    )

    def make(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = copy.deepcopy(FIRST)
        return model, self.optimizer_of(model)

    def turn(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, step: Step, indices: np.ndarray
    ) -> None:
        x, y = FEATURES[indices], LABELS[indices]
        if self.body:
            self.body(model, optimizer, step, x, y)
        else:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            step()

    def on_ranks(self, ranks: int, **options: Any) -> list[tuple[list[np.ndarray], list[list[np.ndarray]]]]:
        """For each rank its tensors at the end, and its batches in each epoch."""

        def program(world: World) -> tuple[list[np.ndarray], list[list[np.ndarray]]]:
            model, optimizer = self.make()
            its = synchronise(
                model,
                optimizer,
                world,
                samples=SAMPLES,
                **{"strategy": "allreduce", "batch_size": BATCH} | options,
            )
            seen: list[list[np.ndarray]] = []
            for epoch in range(1, EPOCHS + 1):
                self.before_epoch(model, optimizer, epoch)
                seen.append([])
                for batch in its.batches(epoch):
                    self.turn(model, optimizer, its.step, batch.indices)
                    seen[-1].append(batch.indices)
            return _values(model, optimizer), seen

        return run_in_threads(ranks, program)

    def in_one_process(self, seen: list[list[list[np.ndarray]]]) -> list[np.ndarray]:
        """The tensors of a plain loop over the batches of all ranks together, by rank, epoch and turn."""
        model, optimizer = self.make()
        for epoch in range(EPOCHS):
            self.before_epoch(model, optimizer, epoch + 1)
            for parts in zip(*(its[epoch] for its in seen), strict=True):
                self.turn(model, optimizer, optimizer.step, np.concatenate(parts))
        return _values(model, optimizer)


def _values(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[np.ndarray]:
    held = [p for group in optimizer.param_groups for p in group["params"]]
    return [tensor.detach().numpy().copy() for tensor in (*model.parameters(), *held)]


def assert_equal_to_one_process(loop: Loop, ranks: int, **options: Any) -> None:
    found = loop.on_ranks(ranks, **options)
    expected = loop.in_one_process([seen for _, seen in found])
    for values, _ in found:
        for value, its in zip(values, expected, strict=True):
            assert np.abs(value - its).max() < 1e-10


def twice(model: nn.Module, optimizer: torch.optim.Optimizer, step: Step, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    for part in (1.0, 0.5):
        (part * F.cross_entropy(model(x), y)).backward()
    step()


def clipped(model: nn.Module, optimizer: torch.optim.Optimizer, step: Step, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    step()


def replaced(model: nn.Module, optimizer: torch.optim.Optimizer, step: Step, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    for parameter in model.parameters():
        parameter.grad = parameter.grad / 2 if parameter.grad is not None else None
    step()


def one_layer_clipped(
    model: nn.Module, optimizer: torch.optim.Optimizer, step: Step, x: Tensor, y: Tensor
) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    nn.utils.clip_grad_value_(model[0].bias, 1e-4)
    step()


def rate_falls(model: nn.Module, optimizer: torch.optim.Optimizer, step: Step, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    step()
    optimizer.param_groups[0]["lr"] *= 0.9


@pytest.mark.parametrize("ranks", [2, 3])
def test_several_backward_passes_are_one_process(ranks: int) -> None:
    """Two backward passes before a step add up, as in one process."""
    assert_equal_to_one_process(Loop(body=twice), ranks)


@pytest.mark.parametrize("ranks", [2, 3])
def test_frozen_later_stays_as_it_is(ranks: int) -> None:
    """A layer that is frozen between epochs stays as it is, momentum or not, and the rest is trained as in
    one process."""

    def freeze(model: nn.Module, optimizer: torch.optim.Optimizer, epoch: int) -> None:
        if epoch == 2:
            model[0].requires_grad_(False)
            for parameter in model[0].parameters():
                parameter.grad = None

    assert_equal_to_one_process(Loop(before_epoch=freeze), ranks)


@pytest.mark.parametrize("strategy", ["allreduce", "gradient-server"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_what_the_optimiser_has_besides_is_in_step(strategy: str, ranks: int) -> None:
    """A learned weight that the optimiser has, and the model has not, is trained as in one process."""
    if strategy == "gradient-server":
        ranks += 1

    def besides(model: nn.Module) -> torch.optim.Optimizer:
        scale = nn.Parameter(torch.zeros((), dtype=torch.float64))
        return torch.optim.SGD([*model.parameters(), scale], lr=0.1, momentum=0.9)

    def scaled(model: nn.Module, optimizer: torch.optim.Optimizer, step: Step, x: Tensor, y: Tensor) -> None:
        scale = optimizer.param_groups[0]["params"][-1]
        optimizer.zero_grad()
        (F.cross_entropy(model(x) * scale.exp(), y) + scale**2).backward()
        step()

    loop = Loop(optimizer_of=besides, body=scaled)
    found = loop.on_ranks(ranks, strategy=strategy)
    workers = [seen for _, seen in found if any(seen)]
    expected = loop.in_one_process(workers)
    assert expected[-1] != 0
    for values, _ in found:
        for value, its in zip(values, expected, strict=True):
            assert np.abs(value - its).max() < 1e-10


@pytest.mark.parametrize("body", [clipped, replaced, one_layer_clipped])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bucket_mb": 1e-4},
        {"strategy": "gradient-server"},
        {"strategy": "two-level"},
        {"compress": "powersgd:1"},
    ],
    ids=str,
)
def test_gradients_that_were_changed_are_refused(body: Any, options: dict[str, Any]) -> None:
    """Clipping or scaling between backward() and step() would be another computation than one process makes,
    and is refused in one line that names what to do."""
    with pytest.raises(OutOfStepError, match=r"changed between backward.. and step.*clip_norm"):
        Loop(body=body).on_ranks(2, **options)


def test_where_each_rank_steps_by_itself_clipping_is_its_own() -> None:
    """Strategies that send weights let each rank clip its own gradients."""
    found = Loop(body=clipped).on_ranks(2, strategy="local-sgd", sync_every=2)
    assert all(np.array_equal(one, two) for one, two in zip(found[0][0], found[1][0], strict=True))


def test_a_second_backward_pass_behind_the_first_is_refused() -> None:
    """Where gradients leave during the backward pass a second one is refused, with the option under which it
    is not; and under that option it is one process."""
    with pytest.raises(OutOfStepError, match=r"second backward pass.*bucket_mb=") as refused:
        Loop(body=twice).on_ranks(2, bucket_mb=1e-4)
    assert "\n" not in str(refused.value)
    assert_equal_to_one_process(Loop(body=twice), 2, bucket_mb=1.0)


def unfreeze(model: nn.Module, optimizer: torch.optim.Optimizer, epoch: int) -> None:
    model[0].requires_grad_(epoch > 1)


def add_group(model: nn.Module, optimizer: torch.optim.Optimizer, epoch: int) -> None:
    if epoch == 2:
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2, dtype=torch.float64))]})


def replace_layer(model: nn.Module, optimizer: torch.optim.Optimizer, epoch: int) -> None:
    if epoch == 2:
        model[2] = nn.Linear(8, 3).double()


def make_buffer(model: nn.Module, optimizer: torch.optim.Optimizer, epoch: int) -> None:
    model.register_buffer("table", torch.zeros(2), persistent=False)
    if epoch == 2:
        model.register_buffer("mean", torch.zeros(2))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (make_buffer, "the buffer mean was made"),
        (unfreeze, "the parameter 0.weight was unfrozen"),
        (add_group, "0 of the optimiser alone was added"),
        (replace_layer, "the parameter 2.weight was added, removed or replaced"),
    ],
)
def test_what_ranks_do_not_exchange_is_refused(change: Any, told: str) -> None:
    """Parameters that are unfrozen, added or replaced, and buffers that are made, after ranks were put in
    step would drift apart: the next epoch is refused, in one line, before it is trained."""

    def frozen_first(model: nn.Module) -> torch.optim.Optimizer:
        model[0].requires_grad_(change is not unfreeze)
        return torch.optim.SGD(model.parameters(), lr=0.1)

    with pytest.raises(ModelError, match=told) as refused:
        Loop(optimizer_of=frozen_first, before_epoch=change).on_ranks(2)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("strategy", ["allreduce", "parameter-averaging", "local-sgd", "diloco", "two-level"])
def test_ranks_that_drift_apart_are_found(strategy: str) -> None:
    """Weights that one rank alone has changed are found at the end of the epoch, by the rank's and the
    tensor's name, on all ranks."""
    told: list[str] = []

    def program(world: World) -> None:
        model, optimizer = Loop().make()
        its = synchronise(model, optimizer, world, samples=SAMPLES, strategy=strategy, topology="allreduce")
        close = its._strategy.close_epoch

        def changed(state: Any, replica: Any, weights: Any, world: World) -> Any:
            if world.rank == 1:
                with torch.no_grad():
                    model[2].weight[0, 0] += 1.0
            return close(state, replica, weights, world)

        object.__setattr__(its._strategy, "close_epoch", changed)
        try:
            for batch in its.batches(1):
                Loop().turn(model, optimizer, its.step, batch.indices)
        except RankwiseError as error:
            told.append(str(error))

    run_in_threads(3, program)
    assert len(told) == 3
    assert all("rank 1 has other weights than rank 0, first in 2.weight" in line for line in told)


def test_a_rate_that_falls_in_the_loop_of_ragged_shards_is_found() -> None:
    """A learning rate that each rank changes in each of its turns differs where ranks have other numbers of
    them, and so do the weights: refused at the end of the epoch."""

    def program(world: World) -> None:
        model, optimizer = Loop().make()
        its = synchronise(model, optimizer, world, samples=SAMPLES - 3, strategy="allreduce", batch_size=2)
        for epoch in (1, 2):
            for batch in its.batches(epoch):
                Loop(body=rate_falls).turn(model, optimizer, its.step, batch.indices)

    with pytest.raises(OutOfStepError, match="has other weights than rank 0"):
        run_in_threads(2, program)


def test_what_processors_round_otherwise_is_let_be() -> None:
    """Ranks whose weights differ in their last bits go on: processors of other makes round otherwise."""

    def program(world: World) -> bool:
        model, optimizer = Loop().make()
        its = synchronise(model, optimizer, world, samples=SAMPLES, strategy="allreduce")
        for batch in its.batches(1):
            Loop().turn(model, optimizer, its.step, batch.indices)
            with torch.no_grad():
                model[2].weight[0, 0] *= 1 + 1e-9 * world.rank
        return its.progress.closed

    assert run_in_threads(2, program) == [True, True]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("samples", (60, 61)),
        ("strategy", ("allreduce", "local-sgd")),
        ("batch_size", (5, 6)),
        ("seed", (0, 1)),
    ],
)
def test_ranks_with_different_options_are_refused(name: str, values: tuple[Any, Any]) -> None:
    """An option that differs between ranks, which would hang them or deal samples twice, is named on all of
    them before anything is exchanged."""
    told: list[str] = []

    def program(world: World) -> None:
        model, optimizer = Loop().make()
        options = {"samples": SAMPLES, "strategy": "allreduce", name: values[world.rank == 2]}
        try:
            synchronise(model, optimizer, world, **options)
        except ConfigError as error:
            told.append(str(error))

    run_in_threads(3, program)
    assert len(told) == 3
    assert all(f"--{name.replace('_', '-')} is " in line and "on rank 2" in line for line in told)


def other_order() -> nn.Module:
    return nn.ModuleDict({"b": nn.Linear(2, 2), "a": nn.Linear(2, 2)})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda made: (other_order(), None), "parameter b.weight .2, 2. of float32"),
        (lambda made: (made.double(), None), "parameter a.weight .2, 2. of float64"),
        (lambda made: (made.append_buffer(), None), "buffer extra .3. of float32"),
        (lambda made: (made, {"lr": 0.2}), "lr = 0.2 in the optimiser's group 0"),
        (lambda made: (made.freeze(), None), "parameter a.weight .2, 2. of float32, frozen"),
    ],
    ids=["order", "dtype", "buffer", "rate", "frozen"],
)
def test_ranks_with_different_models_are_refused(change: Any, told: str) -> None:
    """A model or an optimiser that is another on one rank is refused on all, with the first part that
    differs."""

    class Parts(nn.ModuleDict):
        def append_buffer(self) -> nn.Module:
            self.register_buffer("extra", torch.zeros(3))
            return self

        def freeze(self) -> nn.Module:
            return self.requires_grad_(False)

    found: list[str] = []

    def program(world: World) -> None:
        model: nn.Module = Parts({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
        settings = None
        if world.rank == 1:
            model, settings = change(model)
        optimizer = torch.optim.SGD(model.parameters(), **(settings or {"lr": 0.1}))
        try:
            synchronise(model, optimizer, world, samples=SAMPLES, strategy="allreduce")
        except ModelError as error:
            found.append(str(error))

    run_in_threads(3, program)
    assert len(found) == 3
    assert all(re.search(told, line) and "\n" not in line for line in found)


def in_autocast(where: str) -> Callable[..., None]:
    """A body inside an autocast region, with torch's cache of weights or without, or with the region's end
    before the backward pass."""

    def body(model: nn.Module, optimizer: torch.optim.Optimizer, step: Step, x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        region = torch.autocast("cpu", torch.bfloat16, cache_enabled=where != "uncached")
        if where == "ended":
            with region:
                loss = F.cross_entropy(model.float()(x.float()), y)
            loss.backward()
            step()
            return
        with region:
            F.cross_entropy(model.float()(x.float()), y).backward()
            with torch.autocast("cpu", enabled=where != "disabled", cache_enabled=where != "uncached"):
                step()

    return body


def test_a_step_inside_autocast_is_refused() -> None:
    """Inside an autocast region torch computes with the first step's weights whatever becomes of them: a step
    there is refused in one line. After its end it computes what it does without the cache, and so it does in
    a region around one that is disabled, all turns in which are one region."""
    with pytest.raises(
        OutOfStepError, match=r"inside torch.autocast.*end the region after the loss"
    ) as refused:
        Loop(body=in_autocast("within")).on_ranks(2)
    assert "\n" not in str(refused.value)

    def program(world: World, where: str) -> np.ndarray:
        model, optimizer = Loop().make()
        its = synchronise(model.float(), optimizer, world, samples=SAMPLES, strategy="allreduce")
        around = torch.autocast("cpu", torch.bfloat16, enabled=where == "disabled")
        with around:
            for batch in its.batches(1):
                Loop(body=in_autocast(where)).turn(model, optimizer, its.step, batch.indices)
        return model[0].weight.detach().numpy().copy()

    expected = run_in_threads(2, lambda world: program(world, "uncached"))[0]
    for where in ("ended", "disabled"):
        found = run_in_threads(2, lambda world, where=where: program(world, where))
        assert all(np.array_equal(its, expected) for its in found)


class Renormalising(nn.Sequential):
    """Scales its first layer's weights to length one in each forward pass."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self[0].weight.copy_(F.normalize(self[0].weight, dim=1))
        return super().forward(x)


def test_a_module_that_renormalises_itself_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that changes its own weights in the forward pass, alike on all ranks, is trained as in one
    process."""
    monkeypatch.setitem(globals(), "FIRST", Renormalising(*copy.deepcopy(FIRST)))
    assert_equal_to_one_process(Loop(), 2)
    assert_equal_to_one_process(Loop(), 3)
