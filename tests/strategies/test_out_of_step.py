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
from rankwise.strategies import gradient_watch

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
        (self.body or plain)(model, optimizer, step, FEATURES[indices], LABELS[indices])

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


def plain(model: nn.Module, optimizer: torch.optim.Optimizer, step: Step, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    step()


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


def clamped_behind_its_back(
    model: nn.Module, optimizer: torch.optim.Optimizer, step: Step, x: Tensor, y: Tensor
) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.grad.data.clamp_(-0.001, 0.001)
    step()


def by_autograd(model: nn.Module, optimizer: torch.optim.Optimizer, step: Step, x: Tensor, y: Tensor) -> None:
    parameters = list(model.parameters())
    found = torch.autograd.grad(F.cross_entropy(model(x), y), parameters)
    for parameter, gradient in zip(parameters, found, strict=True):
        parameter.grad = gradient.clamp(-0.001, 0.001)
    step()


def scaled(model: nn.Module, optimizer: torch.optim.Optimizer, step: Step, x: Tensor, y: Tensor) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer.zero_grad()
    scaler.scale(F.cross_entropy(model(x), y)).backward()
    scaler.unscale_(optimizer)
    step()


def weights_shrink(
    model: nn.Module, optimizer: torch.optim.Optimizer, step: Step, x: Tensor, y: Tensor
) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
    step()


def adversarial(model: nn.Module, optimizer: torch.optim.Optimizer, step: Step, x: Tensor, y: Tensor) -> None:
    x = x.clone().requires_grad_(True)
    F.cross_entropy(model(x), y).backward()
    assert x.grad is not None
    optimizer.zero_grad()
    F.cross_entropy(model(x.detach() + 0.1 * x.grad.sign()), y).backward()
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_how_passes_are_rounded_is_no_change(dtype: torch.dtype) -> None:
    """The sum of two backward passes is rounded in the parameters' type, and goes through."""

    def program(world: World) -> bool:
        model = copy.deepcopy(FIRST).to(dtype)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        its = synchronise(model, optimizer, world, samples=SAMPLES, strategy="allreduce", batch_size=BATCH)
        for batch in its.batches(1):
            twice(model, optimizer, its.step, FEATURES[batch.indices].to(dtype), LABELS[batch.indices])
        return its.progress.closed

    assert run_in_threads(2, program) == [True, True]


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_backward_pass_that_is_forgotten_counts_for_nothing(ranks: int) -> None:
    """Gradients of a first pass that zero_grad() has taken away before the second are no change."""
    assert_equal_to_one_process(Loop(body=adversarial), ranks)


@pytest.mark.parametrize(
    "body", [clipped, replaced, one_layer_clipped, clamped_behind_its_back, by_autograd, scaled]
)
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


@pytest.mark.parametrize("kind", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_that_change_gradients_are_refused(kind: str) -> None:
    """A hook of a user's own that clamps each rank's gradients is found, though it was there before."""

    def change(gradient: Tensor) -> Tensor:
        return gradient.clamp(-0.001, 0.001)

    def change_in_place(parameter: Tensor) -> None:
        assert parameter.grad is not None
        parameter.grad.clamp_(-0.001, 0.001)

    def hooked(model: nn.Module) -> torch.optim.Optimizer:
        for parameter in model.parameters():
            getattr(parameter, kind)(change if kind == "register_hook" else change_in_place)
        return torch.optim.SGD(model.parameters(), lr=0.1)

    for options in ({}, {"bucket_mb": 1e-4}):
        with pytest.raises(OutOfStepError, match=r"changed between backward.. and step.*a hook"):
            Loop(optimizer_of=hooked).on_ranks(2, **options)


def test_gradients_that_are_changed_late_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clipping that begins after many batches is found by one of those that are looked at now and then."""
    monkeypatch.setattr(gradient_watch, "EVERY", 64)
    turns = {"n": 0}

    def late(model: nn.Module, optimizer: torch.optim.Optimizer, step: Step, x: Tensor, y: Tensor) -> None:
        turns["n"] += 1
        (clipped if turns["n"] > 40 else plain)(model, optimizer, step, x, y)

    def program(world: World) -> None:
        model, optimizer = Loop().make()
        its = synchronise(model, optimizer, world, samples=SAMPLES, batch_size=1, strategy="allreduce")
        for epoch in (1, 2, 3):
            for batch in its.batches(epoch):
                Loop(body=late).turn(model, optimizer, its.step, batch.indices)

    with pytest.raises(OutOfStepError, match=r"changed between backward.. and step"):
        run_in_threads(2, program)


def test_rates_that_a_master_does_not_have_are_found() -> None:
    """What workers do to the rate in their turns a master does not do: refused at the end of the epoch."""
    with pytest.raises(OutOfStepError, match=r"has lr = \S+ on rank 1 and 0.1 on rank 0.*master"):
        Loop(body=rate_falls).on_ranks(3, strategy="gradient-server")


def test_weights_that_a_master_would_undo_are_found() -> None:
    """Weights that a worker changes before the step would be the master's again after it: refused."""
    with pytest.raises(OutOfStepError, match=r"has changed its weights in a turn.*--topology allreduce"):
        Loop(body=weights_shrink).on_ranks(3, strategy="gradient-server")


def test_rates_by_each_ranks_own_loss_are_found() -> None:
    """A rate that each rank sets by itself, as ReduceLROnPlateau by its own loss, is found where ranks
    average weights, too."""

    def program(world: World) -> None:
        model, optimizer = Loop().make()
        its = synchronise(model, optimizer, world, samples=SAMPLES, strategy="local-sgd", batch_size=BATCH)
        for epoch in (1, 2):
            for batch in its.batches(epoch):
                Loop().turn(model, optimizer, its.step, batch.indices)
            optimizer.param_groups[0]["lr"] *= 1 - 0.5 * world.rank

    with pytest.raises(OutOfStepError, match=r"has lr = 0.05 on rank 1 and 0.1 on rank 0"):
        run_in_threads(2, program)


def test_a_teacher_that_follows_otherwise_in_each_rank_is_found() -> None:
    """Parameters that are not trained, but moved by the loop, must end an epoch alike too."""

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.student, self.teacher = copy.deepcopy(FIRST), copy.deepcopy(FIRST).requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            scores: Tensor = self.student(x)
            return scores

    def program(world: World) -> None:
        model = Pair()
        optimizer = torch.optim.SGD(model.student.parameters(), lr=0.1)
        its = synchronise(model, optimizer, world, samples=SAMPLES, strategy="local-sgd", batch_size=BATCH)
        for batch in its.batches(1):
            Loop().turn(model, optimizer, its.step, batch.indices)
            for slow, fast in zip(model.teacher.parameters(), model.student.parameters(), strict=True):
                slow.data.lerp_(fast.data, 0.1)

    with pytest.raises(OutOfStepError, match=r"first in teacher.0.weight"):
        run_in_threads(2, program)


@pytest.mark.parametrize("strategy", ["gossip", "easgd", "allreduce", "local-sgd"])
def test_weights_set_between_epochs_count(strategy: str) -> None:
    """What all ranks give their models between epochs, such as the best weights so far, is what they train
    from."""

    def program(world: World) -> list[Tensor]:
        model, optimizer = Loop().make()
        its = synchronise(model, optimizer, world, samples=SAMPLES, batch_size=BATCH, strategy=strategy)
        for _ in its.batches(1):
            plain(model, optimizer, its.step, FEATURES, LABELS)
        model.load_state_dict({name: torch.ones_like(its) for name, its in model.state_dict().items()})
        began = []
        for _ in its.batches(2):
            began.append(model[0].weight.detach().clone())
            plain(model, optimizer, its.step, FEATURES, LABELS)
        return began[:1]

    found = [its for its in run_in_threads(3, program) if its]
    assert found
    assert all(torch.equal(its[0], torch.ones_like(its[0])) for its in found)


def test_an_optimisers_state_that_is_loaded_later_is_averaged() -> None:
    """An optimiser that is given its own state anew between epochs, in other tensors, trains as if it had not
    been, also where its state is averaged."""

    def loads(model: nn.Module, optimizer: torch.optim.Optimizer, epoch: int) -> None:
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))

    options = {"strategy": "local-sgd", "sync_every": 2, "optimizer_state": "average"}
    found = Loop(before_epoch=loads).on_ranks(2, **options)
    expected = Loop().on_ranks(2, **options)
    for (values, _), (others, _) in zip(found, expected, strict=True):
        assert all(np.array_equal(one, other) for one, other in zip(values, others, strict=True))


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


def swap_memory(model: nn.Module, optimizer: torch.optim.Optimizer, epoch: int) -> None:
    if epoch == 2:
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()


def reshape_buffer(model: nn.Module, optimizer: torch.optim.Optimizer, epoch: int) -> None:
    if epoch == 2:
        model.table = torch.zeros(3)


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
        (swap_memory, "the parameter 0.weight was given other memory"),
        (reshape_buffer, "the buffer table got another shape or type"),
    ],
)
def test_what_ranks_do_not_exchange_is_refused(change: Any, told: str) -> None:
    """Parameters that are unfrozen, added or replaced, and buffers that are made, after ranks were put in
    step would drift apart: the next epoch is refused, in one line, before it is trained."""

    def frozen_first(model: nn.Module) -> torch.optim.Optimizer:
        model[0].requires_grad_(change is not unfreeze)
        if change is reshape_buffer:
            model.register_buffer("table", torch.zeros(2))
        return torch.optim.SGD(model.parameters(), lr=0.1)

    with pytest.raises(OutOfStepError, match=told) as refused:
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
    them: refused at the end of the epoch, by the rate's name and values."""

    def program(world: World) -> None:
        model, optimizer = Loop().make()
        its = synchronise(model, optimizer, world, samples=SAMPLES - 3, strategy="allreduce", batch_size=2)
        for epoch in (1, 2):
            for batch in its.batches(epoch):
                Loop(body=rate_falls).turn(model, optimizer, its.step, batch.indices)

    with pytest.raises(OutOfStepError, match=r"group 0 has lr = \S+ on rank 1 and \S+ on rank 0"):
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


def test_an_optimisers_state_that_one_rank_alone_has_is_refused() -> None:
    """State that was loaded on rank 0 alone, of which the others would know nothing, is named."""

    def program(world: World) -> None:
        model, optimizer = Loop().make()
        if world.rank == 0:
            plain(model, optimizer, lambda: optimizer.step(), FEATURES, LABELS)
        synchronise(model, optimizer, world, samples=SAMPLES, strategy="local-sgd")

    with pytest.raises(ModelError, match=r"state of \d parameters in the optimiser's group 0"):
        run_in_threads(2, program)


def other_order() -> nn.Module:
    return nn.ModuleDict({"b": nn.Linear(2, 2), "a": nn.Linear(2, 2)})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda made: (other_order(), None), "parameter b.weight .2, 2. of float32"),
        (lambda made: (made.double(), None), "parameter a.weight .2, 2. of float64"),
        (lambda made: (made.append_buffer(), None), "buffer extra .3. of float32"),
        (lambda made: (made, {"lr": 0.2}), "lr = 0.2 in the optimiser's group 0"),
        (
            lambda made: (made, {"lr": 0.1, "params": [*made.parameters()][::-1]}),
            "b.bias in the optimiser's group 0",
        ),
        (lambda made: (made.freeze(), None), "parameter a.weight .2, 2. of float32, frozen"),
    ],
    ids=["order", "dtype", "buffer", "rate", "order in the optimiser", "frozen"],
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
        optimizer = torch.optim.SGD(**{"params": model.parameters(), "lr": 0.1} | (settings or {}))
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
