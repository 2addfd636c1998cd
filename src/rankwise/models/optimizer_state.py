"""An optimiser's state, in places of its own that are there from the start and alike on all ranks."""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rankwise.errors import ModelError, one_line

BEGUN = "begun"
NUMBERS = "numbers"
"""Under these names stand which parameters have begun, and what the optimiser keeps outside of tensors; the
tensors of a parameter are under its number and their name."""

STEPS = 3
"""That a copy makes to show what it keeps: Prodigy's estimate of a distance moves from the second on."""

_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")


SIMPLE = (bool, int, float, str, tuple, type(None))
"""What of an optimiser's groups ranks compare: rates, momenta and the like."""


def settings_of(optimizer: torch.optim.Optimizer) -> dict[tuple[int, str], Any]:
    """What is set in an optimiser's groups, by group and name; a rate may be a tensor."""
    found = {}
    for number, group in enumerate(optimizer.param_groups):
        for name, value in sorted(group.items()):
            if isinstance(value, SIMPLE):
                found[number, name] = value
            elif isinstance(value, Tensor) and value.numel() == 1:
                found[number, name] = value.item()
    return found


class OptimizerState:
    """What an optimiser keeps for its parameters.

    An optimiser makes it in the first step in which a parameter has a gradient: as zeros, ones or rates, as
    copies of the gradient or of the weights. Ranks hold state of one layout at all times, though, also one
    that has not trained yet. So each tensor has its place from the start, of a layout that a copy of the
    optimiser shows in a step of its own; but until a parameter's first real step the optimiser does not see
    its places, and begins as it itself begins.

    Numbers that are no tensors and move with the steps (those of schedule-free optimisers and of Prodigy in
    their groups) have a place as well, a float64 each. A caller that has changed places or numbers calls
    `show`, so that the optimiser sees what is there now.

    Raises ModelError for an optimiser that needs more than gradients to step: a closure (L-BFGS), sparse
    gradients (SparseAdam).
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._parameters = _parameters(optimizer)
        twin, shown = _after_steps(optimizer, self._parameters)
        self._places: dict[int, dict[str, Tensor]] = {}
        for number, parameter in enumerate(self._parameters):
            if there := optimizer.state.get(parameter):
                places = _tensors(there)
            else:
                places = {name: torch.zeros_like(value) for name, value in _tensors(shown[number]).items()}
            if places:
                self._places[number] = places
        self._seen = {number for number in self._places if optimizer.state.get(self._parameters[number])}
        unseen = self._places.keys() - self._seen
        self._begun = torch.tensor([float(number not in unseen) for number in range(len(self._parameters))])
        self._begun_here = self._begun.numpy()  # the same memory
        self.all_begun = bool(self._begun_here.all())
        # What is one number for other parameters too: steps, rates, products of rates, of which ranks take no
        # means. Where all parameters are one number, the count of steps.
        self._single = {"step"}.union(
            name
            for parameter, its in zip(self._parameters, shown, strict=True)
            for name, value in _tensors(its).items()
            if parameter.dim() and not value.dim()
        )
        self._moving = _moving(optimizer, twin, shown)
        self._numbers = torch.zeros(len(self._moving), dtype=torch.float64)
        self.note()
        self._first_numbers = self._numbers.clone()

    @property
    def begun(self) -> list[Tensor]:
        """Which parameters have begun, one float32 [parameters], 0 for those that have not. A rank that takes
        over a mean of momenta takes over that of these too, and so has begun where anybody has."""
        return [self._begun]

    def step(self) -> None:
        """The optimiser's own step."""
        self._optimizer.step()
        if not self.all_begun:
            self.stepped()

    def stepped(self) -> None:
        """The optimiser has made a step, in which parameters may have begun."""
        if self.all_begun:
            return
        for number, places in self._places.items():
            if not self._begun_here[number] and (made := self._optimizer.state.get(self._parameters[number])):
                for name, place in places.items():
                    made[name] = place.copy_(made[name])
                self._begun[number] = 1
                self._seen.add(number)
        self.all_begun = bool(self._begun_here.all())

    def reset(self) -> None:
        """Forget everything but rates and modes, as if the optimiser had just been made."""
        for places in self._places.values():
            for value in places.values():
                value.zero_()
        self._begun.copy_(torch.tensor([float(n not in self._places) for n in range(len(self._begun))]))
        if isinstance(self._optimizer, torch.optim.Adagrad):  # which makes its state when it is made
            self._begun.fill_(1)
            for group in self._optimizer.param_groups:
                for parameter in group["params"]:
                    self._optimizer.state[parameter]["sum"].fill_(group["initial_accumulator_value"])
        self.note()
        modes = torch.tensor([moving.kind is bool for moving in self._moving], dtype=torch.bool)
        self._numbers.copy_(torch.where(modes, self._numbers, self._first_numbers))
        self.show()

    def settings(self) -> dict[tuple[int, str], Any]:
        """What is set in the groups, by group and name, but for numbers that move with steps, and modes."""
        moving = {(its.group, its.key) for its in self._moving}
        found = settings_of(self._optimizer)
        return {at: its for at, its in found.items() if at not in moving and not isinstance(its, bool)}

    def gather(self) -> None:
        """Take back into the places what has been put beside them: a user's optimiser may make its tensors
        anew in each step, and `load_state_dict` does."""
        for number in self._seen:
            held = self._optimizer.state[self._parameters[number]]
            for name, place in self._places[number].items():
                value = held.get(name)
                if value is not None and value is not place and value.shape == place.shape:
                    held[name] = place.copy_(value)

    def named(self) -> dict[str, Tensor]:
        """All tensors, under names that do not change between runs."""
        self.note()
        self.gather()
        tensors = {
            f"{number}.{name}": value
            for number, places in self._places.items()
            for name, value in places.items()
        }
        begun = {BEGUN: self._begun} if tensors else {}
        return tensors | begun | ({NUMBERS: self._numbers} if self._moving else {})

    def shaped(self) -> list[Tensor]:
        """The tensors that are shaped like their parameter, momentum and the like, in a fixed order."""
        return [
            value
            for number, places in self._places.items()
            for name, value in sorted(places.items())
            if value.shape == self._parameters[number].shape and name not in self._single
        ]

    def load(self, saved: Mapping[str, Tensor]) -> None:
        """Overwrite everything. Raises ValueError if names or shapes differ."""
        mine = self.named()
        if BEGUN in mine and BEGUN not in saved:  # written before it was kept: all had begun
            saved = {**saved, BEGUN: torch.ones_like(self._begun)}
        if {name: value.shape for name, value in mine.items()} != {n: v.shape for n, v in saved.items()}:
            raise ValueError("the optimiser's state has another layout")
        for name, value in mine.items():
            value.copy_(saved[name])
        self.show()

    def note(self) -> None:
        """Write the numbers that are no tensors into their place."""
        for place, moving in enumerate(self._moving):
            self._numbers[place] = float(moving.holder(self._optimizer, self._parameters).get(moving.key, 0))

    def show(self) -> None:
        """Let the optimiser see the places of parameters that have begun, and no others, and its numbers."""
        self.all_begun = bool(self._begun_here.all())
        state = self._optimizer.state
        for number, places in self._places.items():
            parameter = self._parameters[number]
            if self._begun_here[number] and number not in self._seen:
                state[parameter] = dict(places)
                self._seen.add(number)
            elif not self._begun_here[number] and number in self._seen:
                del state[parameter]
                self._seen.remove(number)
        for moving, value in zip(self._moving, self._numbers.tolist(), strict=True):
            if moving.parameter is None or moving.parameter in self._seen:
                moving.holder(self._optimizer, self._parameters)[moving.key] = moving.kind(value)


class _Moving(NamedTuple):
    """A number that is no tensor: in a group, or in the state of a parameter."""

    group: int
    parameter: int | None
    key: str
    kind: type

    def holder(self, optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> dict[str, Any]:
        """What holds it."""
        found: dict[str, Any] = (
            optimizer.param_groups[self.group]
            if self.parameter is None
            else optimizer.state.get(parameters[self.parameter], {})
        )
        return found


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def _after_steps(
    optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]
) -> tuple[torch.optim.Optimizer, list[Mapping[str, Any]]]:
    """A copy of an optimiser that has made some steps, with ones for gradients of parameters that have no
    state yet; and the states that it has made, empty for the others.

    Its parameters are ones too, whatever they are on this rank: Prodigy keeps less for those that are zero.
    """
    copies = [nn.Parameter(torch.ones_like(p), p.requires_grad) for p in parameters]
    begins = [p.requires_grad and not optimizer.state.get(p) for p in parameters]
    for its, its_first in zip(copies, begins, strict=True):
        its.grad = torch.ones_like(its) if its_first else None
    try:
        twin = _twin(optimizer, dict(zip(map(id, parameters), copies, strict=True)))
        if callable(train := getattr(twin, "train", None)):  # schedule-free ones step in a mode of their own
            train()
        # What an optimiser draws for its steps is given back; but ranks that are threads share the generator,
        # and others may be drawing their weights from it just now.
        alone = threading.current_thread() is threading.main_thread()
        with torch.random.fork_rng(devices=[], enabled=alone):
            for _ in range(STEPS):
                twin.step()
    except Exception as error:
        raise ModelError(
            f"the optimiser {type(optimizer).__name__} cannot be kept in step, as it does not step by "
            f"gradients alone: {one_line(error)}"
        ) from error
    return twin, [twin.state.get(c, {}) if its else {} for c, its in zip(copies, begins, strict=True)]


def _twin(optimizer: torch.optim.Optimizer, copies: dict[int, nn.Parameter]) -> torch.optim.Optimizer:
    """A copy of an optimiser with other parameters, by the ids of its own; without state, and without what
    users hook into its steps, or put in the place of its methods, as torch's schedulers do."""
    memo: dict[int, Any] = {**copies}
    twin = copy.copy(optimizer)
    for name, value in vars(optimizer).items():
        if name in _HOOKS:
            vars(twin)[name] = OrderedDict()
        elif callable(value) and hasattr(type(optimizer), name):  # it would step the optimiser itself
            vars(twin).pop(name, None)
        elif name != "state":
            vars(twin)[name] = copy.deepcopy(value, memo)  # a step may change any of it
    twin.state = defaultdict(dict)
    return twin


def _moving(
    optimizer: torch.optim.Optimizer, twin: torch.optim.Optimizer, shown: Sequence[Mapping[str, Any]]
) -> list[_Moving]:
    """Where the optimiser keeps numbers that are no tensors and move with its steps: those of its groups that
    its steps have moved or made, and all in its states."""
    found = [
        _Moving(number, None, key, type(value))
        for number, (before, after) in enumerate(zip(optimizer.param_groups, twin.param_groups, strict=True))
        for key, value in after.items()
        if _is_number(value) and before.get(key) != value
    ]
    found += [
        _Moving(-1, number, key, type(value))
        for number, state in enumerate(shown)
        for key, value in state.items()
        if _is_number(value)
    ]
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)  # modes too, which are bools
