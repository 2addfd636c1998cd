"""What is to be predicted: ranks, and the options that differ from the source's."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt

from rankwise.config import CheckedOptions


class PredictionOptions(CheckedOptions):
    """What is to be predicted; None is as in the source."""

    ranks: str = Field("1-8", description="Numbers of ranks, a master included: 1,2,4 or 1-8, up to 10000.")
    samples: int | None = Field(
        None, ge=1, description="Samples of an epoch. By default as many as the source trained in one."
    )
    batch_size: int | None = Field(
        None, ge=1, description="Samples per worker and step. By default the source's."
    )
    strategy: str | None = Field(
        None,
        description="How ranks keep in step, as in train. By default the source's, parameter-averaging if it "
        "had one rank.",
    )
    topology: str | None = Field(None, description="master, allreduce, ring, exponential or complete.")
    compress: str | None = Field(None, description="What is sent in place of float32, as in train.")
    sync_every: PositiveInt | Literal["epoch"] | None = Field(
        None, description="Steps between synchronisations, or epoch."
    )
    network: str | None = Field(
        None,
        description="Between hosts: 1gbe, 10gbe, 100gbe or hdr; FILE.json, as doctor --hosts --format json "
        "printed it; FILE.toml with latency_us, bandwidth_gbit_s and, if you like, both_ways_gbit_s and "
        "reduce_gb_s. By default all ranks are on one host.",
    )
    ranks_per_host: int | None = Field(
        None, ge=1, description="Ranks of a host. By default all, with --network one per core."
    )
    cores_per_host: int | None = Field(None, ge=1, description="Cores of a host. By default the source's.")
    threads: PositiveInt | Literal["auto", "all"] | None = Field(
        None, description="Arithmetic threads per rank, as in train. By default as in the source."
    )
