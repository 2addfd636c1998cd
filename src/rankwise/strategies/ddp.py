"""PyTorch's DistributedDataParallel under the same loop, launch and ledger, to compare with."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from rankwise.comm import World
from rankwise.data.sampler import Batch
from rankwise.errors import ConfigError, one_line
from rankwise.strategies.base import Flagged, State, Strategy
from rankwise.strategies.recovery import Recovery, Stop
from rankwise.strategies.traffic import ModelSize, Traffic
from rankwise.system import machine

if TYPE_CHECKING:
    from torch import Tensor, nn

    from rankwise.models.replica import Replica

ASK_EVERY = 16
"""Steps between two questions whether any rank is to stop: DDP has no place for a flag."""


class _BlankInput:
    """A blank input of the shape with which a module is called, from its first call on."""

    def __init__(self, module: nn.Module) -> None:
        self._blank: Tensor | None = None
        module.register_forward_pre_hook(self._look)

    @property
    def blank(self) -> Tensor:
        """Raises RuntimeError before the first call."""
        if self._blank is None:
            raise RuntimeError("--strategy ddp wraps the model: call the synchroniser's `model` in your loop")
        return self._blank

    def _look(self, _: Any, inputs: tuple[Any, ...]) -> None:
        import torch

        if self._blank is None:
            self._blank = torch.zeros_like(inputs[0][:1])


@dataclass(frozen=True)
class DDP(Strategy[State]):
    """DDP over gloo. Its exchange happens inside the backward pass, and the ledger has it there.

    As in DDP the mean over ranks is not weighted by samples; a rank whose shard has run out takes part with
    gradients of zero. Ranks must be processes of their own.
    """

    shares_optimizer: ClassVar = True
    sends_gradients: ClassVar = True
    recovery: ClassVar = Recovery.FAIL_STOP
    stop: ClassVar = Stop.AFTER_ROUND
    needs_all_gradients: ClassVar = True
    weighs_samples: ClassVar = False
    ends_early: ClassVar = False

    def init(self, replica: Replica, world: World) -> State:
        from torch.nn.parallel import DistributedDataParallel

        if world.in_threads:
            raise ConfigError("--strategy ddp needs ranks that are processes: start them by mpiexec")
        try:
            _start_gloo(world)
            replica.module = DistributedDataParallel(replica.module)
        except (RuntimeError, OSError) as error:
            raise ConfigError(f"--strategy ddp cannot start gloo: {one_line(error)}") from error
        replica.attach(_BlankInput(replica.module))
        return State()

    def train(self, state: State, replica: Replica, batch: Batch, world: World) -> State:
        blank = replica.attached(_BlankInput).blank
        if not len(batch):
            with world.ledger.phase("backward"):
                _take_part_with_nothing(replica, blank)
        return state.trained(len(batch))

    def prepare(self, state: State, replica: Replica, batch: Batch, world: World) -> None:
        """DDP has averaged the gradients in the backward pass; what is left is whether a rank is to stop."""
        if state.rounds % ASK_EVERY == ASK_EVERY - 1:
            stops = np.array([float(world.stopping)])
            world.allreduce(stops, op="max")
            if stops[0]:
                raise Flagged(f"stopped in epoch {batch.epoch}")

    def commit(self, state: State, replica: Replica, prepared: None, world: World) -> State:
        with world.ledger.phase("optimizer"):
            replica.step()
        return state.commit()

    def traffic(self, model: ModelSize, hosts: Sequence[int]) -> Traffic:
        raise ConfigError(
            "--strategy ddp: only rankwise's own exchanges can be predicted, and ddp's are not in the ledger"
        )


def _take_part_with_nothing(replica: Replica, blank: Tensor) -> None:
    """A backward pass whose gradients are zeros, which the other ranks wait for."""
    replica.model.eval()  # so that running statistics do not see the blank image
    replica.optimizer.zero_grad()
    (0 * replica.module(blank).sum()).backward()
    replica.model.train()


def _start_gloo(world: World) -> None:
    """Join a process group of all ranks, over the loopback device if they are on one host."""
    from torch import distributed
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # not in __all__, but documented

    names = world.allgather_object(machine.host_name())
    on_one_host = len(set(names)) == 1
    if on_one_host:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    host = "127.0.0.1" if on_one_host else names[0]
    store = None
    if world.rank == 0:
        store = TCPStore(host, 0, world.size, is_master=True, wait_for_workers=False)
    port = world.allgather_object(store.port if store else 0)[0]
    store = store or TCPStore(host, port, world.size, is_master=False, wait_for_workers=False)
    distributed.init_process_group("gloo", store=store, rank=world.rank, world_size=world.size)
