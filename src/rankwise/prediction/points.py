"""An epoch's time, and what it is made of, for one number of ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from rankwise.errors import ConfigError
from rankwise.plan import RunPlan
from rankwise.prediction import codec
from rankwise.prediction.interval import Asked, Doubt, doubts, interval
from rankwise.prediction.network import Cluster, Network
from rankwise.prediction.simulation import Outcome, gossip, serve_all
from rankwise.prediction.slowest import SEED, expected_maximum
from rankwise.prediction.source import Compute, Source, meets_in_each_step
from rankwise.prediction.steps import SLICE_S, compute_at, meeting_s, rounds_s
from rankwise.prediction.traffic import RunTraffic, traffic
from rankwise.strategies.traffic import Barrier, Neighbours, Server


@dataclass(frozen=True)
class Parts:
    """Seconds of an epoch by what they are spent on; they add up to it.

    `cores` is what ranks take longer because they share cores, `waiting` what the slowest takes longer than
    the mean, `transfer` includes packing and compressing.
    """

    compute: float = 0.0
    cores: float = 0.0
    waiting: float = 0.0
    transfer: float = 0.0
    master: float = 0.0
    evaluation: float = 0.0
    checkpoint: float = 0.0
    other: float = 0.0

    @property
    def total(self) -> float:
        """Seconds of the epoch."""
        return float(sum(asdict(self).values()))

    @property
    def limit(self) -> str:
        """The largest part."""
        return max(asdict(self).items(), key=lambda item: item[1])[0]


@dataclass(frozen=True)
class Point:
    """What is predicted for one number of ranks; fractions are of the time of all ranks together."""

    ranks: int
    hosts: int
    threads: int
    epoch_s: float
    images_per_s: float
    efficiency: float
    wait_fraction: float
    bytes_sent: int
    memory_bytes: int
    low_s: float
    high_s: float
    limit: str
    parts: Parts
    doubts: tuple[Doubt, ...]

    def to_json(self) -> dict[str, Any]:
        """As `--format json` prints it; `parts` in seconds under ``<part>_s``, `doubts` by their names."""
        row = asdict(self)
        row["parts"] = {f"{name}_s": value for name, value in row["parts"].items()}
        row["doubts"] = {doubt.pop("name"): doubt for doubt in row["doubts"]}
        return row


@dataclass(frozen=True)
class _Epoch:
    """The parts of an epoch, the seconds that all ranks together wait, what they send, the steps that it is
    made of, threads per rank, `busy` cores of a host, `crowd` threads for each of them, how many ranks work
    on a host, and whether they meet in each step."""

    parts: Parts
    wait_s: float
    sent: RunTraffic
    compute: Compute
    threads: int
    busy: int
    crowd: float
    workers_here: int
    meets: bool


@dataclass(frozen=True)
class Place:
    """Where ranks are to run. `network` is None where all are on one host; `threads` as in train."""

    ranks_per_host: int | None
    cores_per_host: int
    network: Network | None
    threads: int | str

    def cluster(self, source: Source, ranks: int) -> Cluster:
        """The hosts of `ranks` ranks. Raises ConfigError without a network between several."""
        here = min(ranks, self.ranks_per_host or ranks)
        if here < ranks and self.network is None:
            raise ConfigError(
                f"{ranks} ranks with --ranks-per-host {here} are on {math.ceil(ranks / here)} hosts: say by "
                "--network what is between them"
            )
        own = self.network.reduce_s_per_byte if self.network else None
        local = between = source.messages.local
        if self.network:  # what a message takes in this host's software it takes there too
            between = self.network.link.behind(local)
        return Cluster(
            ranks,
            here,
            self.cores_per_host,
            local,
            source.messages.shared,
            between,
            source.messages.reduce_s_per_byte if own is None else own,
        )

    def threads_of(self, workers_here: int) -> int:
        """Arithmetic threads of a rank, as `rankwise train` shares them out."""
        if isinstance(self.threads, int):
            return self.threads
        if self.threads == "all":
            return self.cores_per_host
        return max(1, self.cores_per_host // max(workers_here, 1))


def predict_point(source: Source, config: RunPlan, place: Place, alone_images_per_s: float | None) -> Point:
    """The prediction for a resolved configuration. `alone_images_per_s` is what one rank alone trains, to
    which the efficiency compares."""
    cluster = place.cluster(source, config.ranks)
    epoch = _epoch(source, config, cluster, place)
    parts, sent = epoch.parts, epoch.sent
    found = doubts(source, _asked(source, config, cluster, place, epoch))
    low_s, high_s = interval(parts.total, found)
    copies = config.workers if config.entry.replicates else 1
    images_per_s = source.samples * copies / parts.total
    steps = _steps(config, source.samples)
    alone = images_per_s if alone_images_per_s is None else alone_images_per_s
    return Point(
        ranks=config.ranks,
        hosts=len(cluster.hosts),
        threads=epoch.threads,
        epoch_s=parts.total,
        images_per_s=images_per_s,
        efficiency=images_per_s / (config.ranks * alone),
        wait_fraction=min(1.0, epoch.wait_s / (config.ranks * parts.total)),
        bytes_sent=_bytes(sent, _rounds(config, steps), steps),
        memory_bytes=source.rss_bytes + sent.said.served_bytes + sent.said.unpacked_bytes,
        low_s=low_s,
        high_s=high_s,
        limit=parts.limit,
        parts=parts,
        doubts=found,
    )


def _asked(source: Source, config: RunPlan, cluster: Cluster, place: Place, epoch: _Epoch) -> Asked:
    """What of a prediction its interval depends on."""
    parts, sent = epoch.parts, epoch.sent
    trained_s = parts.compute + parts.cores + parts.waiting
    steps = _steps(config, source.samples)
    hops = sent.each_step.hops + sent.each_round.hops
    return Asked(
        total_s=parts.total,
        computing_s=trained_s + parts.evaluation,
        trained_s=trained_s,
        exchanged_s=parts.transfer + parts.master,
        batch=config.batch_size,
        threads=epoch.threads,
        compute=epoch.compute,
        busy=epoch.busy,
        meets=epoch.meets,
        crowd=epoch.crowd,
        workers_here=epoch.workers_here,
        shared=any(hop.shared for hop in hops),
        messages=any(not hop.shared for hop in hops),
        steps_a_round=1.0 if sent.each_step.hops else steps / _rounds(config, steps),
        cluster=cluster,
        network=place.network,
    )


def _bytes(sent: RunTraffic, rounds: int, steps: float) -> int:
    """Payload of all ranks in an epoch."""
    in_steps = math.ceil(steps) * sent.each_step.bytes_sent
    return in_steps + rounds * sent.each_round.bytes_sent + sent.each_epoch.bytes_sent


def _steps(config: RunPlan, samples: int) -> float:
    """Of a worker in an epoch; the last one may have less than a batch."""
    replicates = config.entry.replicates
    return samples / (1 if replicates else config.workers) / config.batch_size


def _rounds(config: RunPlan, steps: float) -> int:
    """Of a worker in an epoch."""
    every = config.sync_every if isinstance(config.sync_every, int) else math.inf
    rounds = max(1, math.ceil(math.ceil(steps) / every)) if every < math.inf else 1
    part = config.local_after or 0.0  # of the epochs, in which every step is synchronised
    return round(part * math.ceil(steps) + (1 - part) * rounds)


def _turn_s(source: Source, per_core: float) -> float:
    """How many seconds longer an exchange takes where `per_core` threads share a core: the rank that its last
    message wakes gets a core only when another rank has had its turn.

    Taken from the source's run with about as many threads per core: what each of its exchanges took longer
    than the model says. A time slice, if there is no such run.
    """
    if per_core <= 1:
        return 0.0
    if not source.crowds:
        return SLICE_S
    run = min(source.crowds, key=lambda its: abs(math.log(its.per_core / per_core)))
    place = Place(None, source.cores, None, run.config.threads)
    cluster = place.cluster(source, run.config.ranks)
    known = replace(source, samples=run.samples)

    def train_s(turn_s: float) -> float:
        parts = _epoch(known, run.config, cluster, place, turn_s=turn_s).parts
        return parts.total - parts.evaluation - parts.checkpoint

    without_s = train_s(0.0)
    longer_s = train_s(1.0) - without_s  # for each second that an exchange waits
    return max(0.0, (run.train_s - without_s) / longer_s)


def _epoch(
    source: Source, config: RunPlan, cluster: Cluster, place: Place, turn_s: float | None = None
) -> _Epoch:
    """An epoch of a resolved configuration. `turn_s` is what each exchange waits for a core, by default
    `_turn_s`."""
    if config.local_after:
        return _two_halves(source, config, cluster, place, config.local_after, turn_s)
    sent = traffic(config, source.model, cluster.hosts)
    said = sent.said
    has_master = config.has_master and config.ranks > 1
    crowd_of = max(cluster.hosts)
    if has_master and len(cluster.hosts) == 1:
        crowd_of -= 1  # the master rests while the others work
    threads = place.threads_of(crowd_of)
    crowd = crowd_of * threads / cluster.cores_per_host
    shared = max(crowd, 1.0)
    # A rank that has had the core in between empties the caches as an exchange does.
    meets = meets_in_each_step(config) or (crowd > 1 and crowd_of > 1)
    busy = min(crowd_of * threads, cluster.cores_per_host)
    compute, step_s = compute_at(source, threads, config.batch_size, busy=busy, meets=meets)
    if said.server_steps:
        step_s = np.maximum(step_s - compute.optimizer_s, 0)
    steps = _steps(config, source.samples)
    rounds = _rounds(config, steps)
    more_s = meeting_s(source, threads) if config.ranks > 1 and not meets else 0.0
    in_steps = {exchange.among for exchange in said.each_step}
    together = config.workers if "all" in in_steps else crowd_of if "host" in in_steps else 1
    alone, round_s, units = rounds_s(
        step_s, steps / rounds, config.workers, crowd, crowd_of, cluster, more_s, together=together
    )

    pack_s = source.messages.pack_s_per_byte * said.payload_bytes
    pack_s += codec.seconds(config.compress, source.model, said)
    exchange_s = cluster.seconds(sent.each_round.hops)
    if said.pieces > 1:  # all but the last piece may go on behind the backward pass
        hidden_s = min(exchange_s, compute.backward_s) * (1 - 1 / said.pieces)
        exchange_s -= hidden_s
    serve_s = source.messages.serve_s_per_byte * said.served_bytes
    if said.server_steps:
        serve_s += compute.optimizer_s
    match said.meeting:
        case Server(max_staleness):
            outcome = serve_all(
                config.workers,
                rounds,
                round_s + pack_s * shared,
                transfer_s=exchange_s / 2,
                serve_s=serve_s,
                seed=SEED,
                answers_behind=len(cluster.hosts) > 1,
                max_staleness=max_staleness,
            )
        case Neighbours(distances):
            exchange_s += pack_s * shared
            outcome = gossip(distances, config.ranks, rounds, round_s, exchange_s=exchange_s, seed=SEED)
        case Barrier():
            slowest_s = expected_maximum(round_s, units)
            if crowd > 1:  # sharing cores makes no rank faster
                slowest_s = max(slowest_s, expected_maximum(alone, config.workers))
            waited_s = rounds * (max(slowest_s - float(round_s.mean()), 0.0) + serve_s)
            turn_s = _turn_s(source, crowd) if turn_s is None else turn_s
            train_s = rounds * (slowest_s + pack_s * shared + exchange_s + turn_s + serve_s)
            if sent.each_step.hops:
                train_s += math.ceil(steps) * (cluster.seconds(sent.each_step.hops) + turn_s)
            outcome = Outcome(train_s, waited_s, rounds * slowest_s)
    compute_s, longer_s = rounds * float(alone.mean()), rounds * float(round_s.mean() - alone.mean())
    # A rank takes longer because it shares cores, or because it waits for others in each step.
    crowded_s, met_s = (longer_s, 0.0) if crowd > 1 else (0.0, longer_s)
    master_s = rounds * serve_s if said.served_bytes else 0.0
    waiting_s = max(0.0, outcome.worker_wait_s - master_s) + met_s
    transfer_s = max(0.0, outcome.makespan_s - compute_s - crowded_s - master_s - waiting_s)
    evaluation_s = compute.evaluation_s / config.evaluate_every
    if not has_master:
        evaluation_s *= shared / config.ranks
    parts = Parts(
        compute=compute_s,
        cores=crowded_s,
        waiting=waiting_s,
        transfer=transfer_s + cluster.seconds(sent.each_epoch.hops),
        master=master_s,
        evaluation=evaluation_s,
        checkpoint=source.checkpoint_s / config.checkpoints.epochs,
        other=source.epoch_s,
    )
    wait_s = config.workers * (outcome.worker_wait_s + met_s)
    if has_master:
        wait_s += outcome.master_wait_s + config.workers * evaluation_s
    return _Epoch(parts, wait_s, sent, compute, threads, busy, crowd, crowd_of, meets)


def _two_halves(
    source: Source, config: RunPlan, cluster: Cluster, place: Place, part: float, turn_s: float | None
) -> _Epoch:
    """The mean of an epoch that is synchronised every step, which `part` of them are, and one that is not."""
    local = config.model_copy(update={"local_after": None})
    first = _epoch(source, local.model_copy(update={"sync_every": 1}), cluster, place, turn_s)
    second = _epoch(source, local, cluster, place, turn_s)
    pairs = zip(asdict(first.parts).items(), asdict(second.parts).values(), strict=True)
    parts = Parts(**{name: part * one + (1 - part) * other for (name, one), other in pairs})
    return replace(second, parts=parts, wait_s=part * first.wait_s + (1 - part) * second.wait_s)


def best_of(points: Sequence[Point]) -> Point:
    """The point with the shortest epoch; of those within a hundredth of it the one with the fewest ranks."""
    shortest = min(point.epoch_s for point in points)
    return min((point for point in points if point.epoch_s <= 1.01 * shortest), key=lambda point: point.ranks)
