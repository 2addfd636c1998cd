"""What a hop costs: latency, bandwidth and adding up, inside a host and between hosts.

A message of m bytes takes alpha + m beta (Hockney 1994, doi:10.1016/S0167-8191(06)80021-9). Of several
through one port only the first pays the whole latency, and each further one the sender's overhead, which is
at most alpha / 2 and taken as that (LogGP: Alexandrov et al. 1995, doi:10.1145/215399.215427).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np

from rankwise.comm.link_probe import Message
from rankwise.config import read_table
from rankwise.errors import ConfigError, unknown_name
from rankwise.prediction.collectives import Hop


@dataclass(frozen=True)
class Link:
    """What a message takes: `latency_s`, and `s_per_byte`, or `both_s_per_byte` while another one passes it
    the other way (None for `s_per_byte`). Where messages of growing size were `measured`, those up to the
    largest are interpolated between the two nearest.
    """

    latency_s: float
    s_per_byte: float
    both_s_per_byte: float | None = None
    measured: tuple[Message, ...] = ()

    @classmethod
    def of(cls, latency_us: float, bandwidth_gbit_s: float, both_ways_gbit_s: float | None = None) -> Link:
        """As networks are described."""
        both = None if both_ways_gbit_s is None else 8e-9 / both_ways_gbit_s
        return cls(latency_us / 1e6, 8e-9 / bandwidth_gbit_s, both)

    def behind(self, local: Link) -> Link:
        """This link, with what a message takes in the software of a host, `local`, added."""
        both = self.s_per_byte if self.both_s_per_byte is None else self.both_s_per_byte

        def with_software(size: int, time_s: float) -> float:
            return local.latency_s + max(size * local.s_per_byte, time_s)

        return Link(
            local.latency_s + self.latency_s,
            max(local.s_per_byte, self.s_per_byte),
            max(local.s_per_byte, both),
            tuple(
                Message(m.bytes, with_software(m.bytes, m.one_way_s), with_software(m.bytes, m.both_ways_s))
                for m in self.measured
            ),
        )

    def message_s(self, size: float, *, one_way: bool) -> float:
        """Seconds of `size` bytes."""
        if self.measured and size <= self.measured[-1].bytes:
            known = ((m.bytes, m.one_way_s if one_way else m.both_ways_s) for m in self.measured)
            sizes, times_s = zip((0, self.latency_s), *known, strict=True)
            return float(np.interp(size, sizes, times_s))
        both = self.both_s_per_byte
        return self.latency_s + size * (self.s_per_byte if one_way or both is None else both)

    def port_s(self, size: float) -> float:
        """Seconds for which `size` bytes one way keep a port busy."""
        return self.message_s(size, one_way=True) - self.latency_s


@dataclass(frozen=True)
class Network:
    """A network between hosts. `reduce_s_per_byte` is what adding up takes there, None for as in the
    source."""

    name: str
    link: Link
    reduce_s_per_byte: float | None = None


NETWORKS = {
    "1gbe": Network("1gbe", Link.of(50, 1)),
    "10gbe": Network("10gbe", Link.of(20, 10)),
    "100gbe": Network("100gbe", Link.of(5, 100)),
    "hdr": Network("hdr", Link.of(1.5, 200)),
}
"""Round figures: nominal bandwidths, with latencies as they are usual between two processes over TCP
(Ethernet) and over InfiniBand HDR. A file says what yours has."""

_KEYS = {"latency_us": True, "bandwidth_gbit_s": True, "both_ways_gbit_s": False, "reduce_gb_s": False}
"""Keys of a network file, and whether each must be there."""


def read_network(name: str) -> Network:
    """A network by its name, or from a TOML file, or as `rankwise doctor --hosts --format json` found it.
    Raises ConfigError, one line."""
    if name in NETWORKS:
        return NETWORKS[name]
    path = Path(name)
    if not path.suffix and not path.exists():
        raise ConfigError(unknown_name("--network", name, [*NETWORKS, "FILE.toml", "FILE.json"]))
    if path.suffix == ".json":
        return Network(path.stem, _slowest_found(path))
    table = read_table(path, "network")
    for key in table:
        if key not in _KEYS:
            raise ConfigError(f"{path}: {unknown_name('key', key, _KEYS)}")
    missing = [key for key, needed in _KEYS.items() if needed and key not in table]
    if missing:
        raise ConfigError(f"{path}: missing {' and '.join(missing)}; expected {', '.join(_KEYS)}")
    for key, value in table.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (number and 0 < value < math.inf):
            raise ConfigError(f"{path}: {key} = {value!r} was given, expected a number above 0")
    reduce_gb_s = table.get("reduce_gb_s")
    return Network(
        path.stem,
        Link.of(table["latency_us"], table["bandwidth_gbit_s"], table.get("both_ways_gbit_s")),
        None if reduce_gb_s is None else 1e-9 / reduce_gb_s,
    )


def _slowest_found(path: Path) -> Link:
    """The slowest of the links that `rankwise doctor` measured, for which all wait."""
    try:
        links = json.loads(path.read_text("utf-8"))["links"]
        slowest = min(links, key=lambda link: float(link["bytes_per_s"]))
        messages = tuple(
            Message(int(m["bytes"]), float(m["one_way_s"]), float(m["both_ways_s"]))
            for m in slowest["messages"]
        )
        latency_s, per_s, both_per_s = (
            float(slowest[key]) for key in ("latency_s", "bytes_per_s", "both_bytes_per_s")
        )
        figures = [latency_s, per_s, both_per_s, *(x for message in messages for x in astuple(message))]
        if not all(0 < figure < math.inf for figure in figures):
            raise ValueError
        return Link(latency_s, 1 / per_s, 1 / both_per_s, messages)
    except OSError as error:
        raise ConfigError(f"cannot read the network {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise ConfigError(
            f"{path} holds no links: expected what rankwise doctor --hosts A,B --format json prints"
        ) from None


@dataclass(frozen=True)
class Cluster:
    """Ranks that fill hosts one after the other, `ranks_per_host` each. Messages inside a host take `local`,
    meetings in its shared memory `shared`, and messages between hosts `between`."""

    ranks: int
    ranks_per_host: int
    cores_per_host: int
    local: Link
    shared: Link
    between: Link
    reduce_s_per_byte: float

    @property
    def hosts(self) -> list[int]:
        """How many ranks each host has."""
        full, rest = divmod(self.ranks, self.ranks_per_host)
        return [self.ranks_per_host] * full + [rest] * (rest > 0)

    def seconds(self, hops: Iterable[Hop]) -> float:
        """How long hops take, one after the other, once all ranks have come."""
        return sum(self._hop_s(hop) for hop in hops)

    def _hop_s(self, hop: Hop) -> float:
        added_s = hop.count * hop.reduced * self.reduce_s_per_byte
        here = self.ranks_per_host
        if hop.fan:
            near = min(hop.count, here - 1)
            far = hop.count - near
            latency_s = (self.between if far else self.local).latency_s
            port_s = near * self.local.port_s(hop.bytes) + far * self.between.port_s(hop.bytes)
            return (1 + hop.count) / 2 * latency_s + port_s + added_s
        # Of ranks d places apart those of a host that is a power of two stay inside it until d is as large.
        crosses = self.ranks > here and (hop.ring or hop.distance >= here or here & (here - 1) != 0)
        if not crosses:
            # Copying and adding up take a core.
            crowd = max(1.0, min(self.ranks, here) / self.cores_per_host)
            link = self.shared if hop.shared else self.local
            message_s = link.message_s(hop.bytes, one_way=hop.one_way)
            return crowd * (hop.count * message_s + added_s)
        flows = min(hop.distance, here)  # that share the host's port
        return hop.count * self.between.message_s(flows * hop.bytes, one_way=hop.one_way) + added_s


def coefficients(hops: Iterable[Hop]) -> tuple[float, float, float]:
    """What latency, bytes and bytes added up are multiplied by within one host, for a fit of their costs."""
    latency, size = Link(1, 0), Link(0, 1)
    one = [Cluster(1, 1 << 30, 1, its, its, its, 0) for its in (latency, size)]
    hops = tuple(hops)
    return one[0].seconds(hops), one[1].seconds(hops), sum(hop.count * hop.reduced for hop in hops)
