"""Strategies with their options, and the rule that each is compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from tests.matrix import oracles
from tests.matrix.oracles import Course, Ended, Outside
from tests.matrix.styles import EPOCHS


@dataclass(frozen=True)
class Way:
    """A strategy under a name, with `options` of `synchronise`.

    `rule` gives what workers end with, and `by_rank` what they do if each batch counts by itself. `ranks` are
    those that it takes, `hosts` where they are, and with a `master` rank 0 does not train. A `local` one lets
    workers step on their own, `state` says what becomes of their optimisers, and ranks that are not `alike`
    hold weights of their own.
    """

    rule: Callable[[Course], list[Ended]]
    options: Mapping[str, Any]
    ranks: tuple[int, ...] = (1, 2, 3)
    hosts: tuple[int, ...] | None = None
    master: bool = False
    local: bool = False
    replicates: bool = False
    compresses: bool = False
    alike: bool = True
    by_rank: Callable[[Course], list[Ended]] | None = None
    state: str = "keep"
    tolerance: float = 0.0

    def __post_init__(self) -> None:
        """What PowerSGD multiplies is float32, whose last digit depends on where it lies in memory."""
        if "powersgd" in self.options.get("compress", ""):
            object.__setattr__(self, "tolerance", 1e-5)


def _gradients(every: int = 1, **options: Any) -> Way:
    by_rank = partial(oracles.gradients_by_rank, name="none", every=every)
    return Way(partial(oracles.one_process, every=every), {"sync_every": every, **options}, by_rank=by_rank)


def _server(every: int = 1, **options: Any) -> Way:
    options = {"strategy": "gradient-server", "sync_every": every, **options}
    by_rank = partial(oracles.gradients_by_rank, name="none", every=every, master=True)
    return Way(partial(oracles.one_process, every=every), options, (2, 3), master=True, by_rank=by_rank)


def _compressed(name: str, every: int = 1, *, master: bool = False) -> Way:
    strategy = "gradient-server" if master else "allreduce"
    rule = partial(oracles.gradients_by_rank, name=name, every=every, master=master)
    options = {"strategy": strategy, "compress": name, "sync_every": every}
    return Way(rule, options, (2, 3) if master else (1, 2, 3), master=master, compresses=True)


def averaging(strategy: str, every: int | None, *, master: bool = False, **more: Any) -> Way:
    """A strategy that averages weights; `more` are arguments of the rule, and options by other names."""
    state, compress = more.get("state", "keep"), more.get("compress")
    options: dict[str, Any] = {
        "strategy": strategy,
        "sync_every": every or "epoch",
        "topology": "master" if master else "allreduce",
        "optimizer_state": state,
        **({"compress": compress} if compress else {}),
        **more.pop("options", {}),
    }
    rule = partial(oracles.averaging, every=lambda epoch: every, master=master, **more)
    return Way(
        rule,
        options,
        (2, 3) if master else (1, 2, 3),
        master=master,
        local=True,
        replicates=strategy == "replication",
        compresses=bool(compress),
        state=state,
    )


def _post_local(epoch: int) -> int:
    return 1 if epoch + 1 <= EPOCHS / 2 else 4


def _hosts(course: Course) -> list[Ended]:
    """Two ranks of a host step together; hosts average every three steps."""
    first, second = oracles.averaging(course.grouped([[0, 1], [2]]), lambda epoch: 3, in_turn=True)
    return [first, first, second]


def _gossip(topology: str, heard: Callable[[int, int, int], list[int]]) -> Way:
    options = {"strategy": "gossip", "topology": topology}
    return Way(partial(oracles.gossip, heard=heard), options, (2, 3), local=True)


WAYS: dict[str, Way] = {
    "single": Way(oracles.one_process, {"strategy": "single"}, (1,), local=True),
    "allreduce": _gradients(strategy="allreduce"),
    "allreduce/buckets": _gradients(strategy="allreduce", bucket_mb=1e-4),
    "allreduce/every-3": _gradients(3, strategy="allreduce"),
    "gradient-server": _server(),
    "gradient-server/every-2": _server(2),
    "two-level/one-host": Way(
        partial(oracles.one_process, every=8, each_turn=True), {"strategy": "two-level"}
    ),
    "two-level/two-hosts": Way(_hosts, {"strategy": "two-level", "sync_across_hosts": 3}, (3,), (0, 0, 1)),
    "parameter-averaging": averaging("parameter-averaging", None),
    "parameter-averaging/master": averaging("parameter-averaging", None, master=True),
    "parameter-averaging/average": averaging("parameter-averaging", None, state="average"),
    "parameter-averaging/reset": averaging("parameter-averaging", 3, state="reset"),
    "replication": averaging("replication", None, master=True),
    "paper-stopwatch": averaging("paper-stopwatch", None, master=True),
    "local-sgd": averaging("local-sgd", 4),
    "local-sgd/master": averaging("local-sgd", 3, master=True),
    "post-local-sgd": Way(
        partial(oracles.averaging, every=_post_local),
        {"strategy": "post-local-sgd", "sync_every": 4, "epochs": EPOCHS},
        local=True,
    ),
    "slowmo": averaging("slowmo", 4, outside=Outside(1.0, 0.7, by_rate=True)),
    "diloco": averaging("diloco", 3, outside=Outside(0.7, 0.9, nesterov=True)),
    "gossip/ring": _gossip("ring", oracles.on_a_ring),
    "gossip/exponential": _gossip("exponential", oracles.by_powers_of_two),
    "gossip/complete": _gossip("complete", oracles.of_all),
    "easgd/1-worker": Way(
        partial(oracles.with_a_centre, pulls=True), {"strategy": "easgd"}, (2,), master=True, local=True,
        alike=False,
    ),
    "downpour/1-worker": Way(
        partial(oracles.with_a_centre, pulls=False), {"strategy": "downpour"}, (2,), master=True, local=True,
        alike=False,
    ),
    "allreduce/bf16": _compressed("bf16"),
    "allreduce/fp16": _compressed("fp16"),
    "allreduce/int8": _compressed("int8"),
    "allreduce/topk": _compressed("topk:0.2"),
    "allreduce/sign": _compressed("sign"),
    "allreduce/powersgd": _compressed("powersgd:1", 2),
    "gradient-server/bf16": _compressed("bf16", master=True),
    "gradient-server/int8": _compressed("int8", master=True),
    "gradient-server/topk": _compressed("topk:0.2", master=True),
    "gradient-server/powersgd": _compressed("powersgd:1", master=True),
    "local-sgd/bf16": averaging("local-sgd", 4, compress="bf16"),
    "local-sgd/int8": averaging("local-sgd", 4, master=True, compress="int8"),
    "local-sgd/topk": averaging("local-sgd", 4, compress="topk:0.2"),
    "local-sgd/sign": averaging("local-sgd", 4, master=True, compress="sign"),
    "local-sgd/powersgd": averaging("local-sgd", 4, compress="powersgd:1"),
}  # fmt: skip
