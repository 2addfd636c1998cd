"""The lines of `mlperf-logging`: when a run began, trained, evaluated and ended, and what it reached."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from rankwise.errors import UsageError
from rankwise.export.run_content import RunContent
from rankwise.runs.record import Epoch, Record

PRECISIONS = {"bf16": "bfloat16"}
"""Names of MLPerf's for rankwise's, where they differ."""

SENT = {"fp16": "fp16", "bf16": "bfloat16", "int8": "int8", "sign": None}
"""The lowest precision in what ranks send, by --compress; fp32 with all others. MLPerf has no name for one
bit."""


def write_mlperf(runs: Sequence[RunContent], path: Path) -> list[str]:
    """Write the lines of one run to `path`. Raises UsageError if it has no epoch, or does not say when."""
    (run,) = runs
    record = run.record
    if record.is_of_calls:
        raise UsageError(
            f"{run.name} is a program without a rankwise.Run, and mlperf tells of epochs and accuracy, of "
            "which nothing is known: export it as otf2, talp, extrap or csv, or let the program make a Run"
        )
    if not record.epochs:
        raise UsageError(f"{run.name} has no finished epoch: mlperf needs some")
    if record.launched_at is None or any(row.since_launch_s is None for row in record.epochs):
        raise UsageError(f"{run.name} does not say when its epochs ended, which mlperf needs: run it anew")
    log = _Log(1e3 * datetime.fromisoformat(record.launched_at).timestamp())
    log.point("cache_clear", False)  # rankwise leaves the system's caches as they are
    log.start("init_start")
    for key, value in _settings(record).items():
        if value is not None:
            log.point(key, value)
    samples = 0
    for row in record.epochs:
        _epoch(log, row, samples, first=row is record.epochs[0])
        samples += row.train_samples
    missed = record.target is not None and not record.target.reached
    log.stop("run_stop", status="success" if record.outcome == "completed" and not missed else "aborted")
    path.write_text("".join(log.lines), encoding="utf-8")
    return []


class _Log:
    """Lines in order of time, which begins at a moment in ms since 1970."""

    def __init__(self, begin_ms: float) -> None:
        self.begin_ms = self._now_ms = begin_ms
        self.lines: list[str] = []

    def at(self, s: float) -> None:
        """Go on to a time since the beginning. Epochs have several stopwatches, which overlap by a little;
        lines never go back."""
        self._now_ms = max(self._now_ms, self.begin_ms + 1e3 * s)

    def point(self, key: str, value: Any, **metadata: Any) -> None:
        """Something is so now."""
        self._add("POINT_IN_TIME", key, value, metadata)

    def start(self, key: str, **metadata: Any) -> None:
        """Something begins now."""
        self._add("INTERVAL_START", key, None, metadata)

    def stop(self, key: str, **metadata: Any) -> None:
        """Something ends now."""
        self._add("INTERVAL_END", key, None, metadata)

    def _add(self, kind: str, key: str, value: Any, metadata: dict[str, Any]) -> None:
        line = {
            "namespace": "",
            "time_ms": int(self._now_ms),
            "event_type": kind,
            "key": key,
            "value": value,
            "metadata": {"file": "rankwise", "lineno": 0, **metadata},
        }
        self.lines.append(f":::MLLOG {json.dumps(line, allow_nan=False)}\n")


def _settings(record: Record) -> dict[str, Any]:
    """What was trained, on what, and how, under MLPerf's names; None where this run cannot tell."""
    config = record.config
    workers = sum(row.role == "worker" for row in record.ranks)
    batch = config.get("batch_size")
    precision = config.get("precision") or "fp32"
    hosts = record.environment.hosts
    return {
        "trained": record.trained,  # none of MLPerf's benchmarks: its checker ends in a traceback for others
        "submission_org": "rankwise",
        "submission_division": "open",
        "submission_platform": f"{len(hosts)} x {', '.join(sorted({host.cpu_model for host in hosts}))}",
        "seed": config.get("seed"),
        "global_batch_size": batch * workers if batch else None,
        "micro_batch_size": batch,
        "opt_name": config.get("optimizer"),
        "opt_base_learning_rate": config.get("lr"),
        "train_samples": record.epochs[0].train_samples,
        "lowest_numerical_precision_in_linear": PRECISIONS.get(precision, precision),
        "lowest_numerical_precision_in_attn": PRECISIONS.get(precision, precision),
        "lowest_numerical_precision_in_comm": SENT.get(config.get("compress") or "none", "fp32"),
        "tensor_parallelism": 1,
        "pipeline_parallelism": 1,
        "context_parallelism": 1,
        "expert_parallelism": 1,
        "config_filename": "plan.json",
    }


def _epoch(log: _Log, row: Epoch, samples: int, *, first: bool) -> None:
    """An epoch, before which so many samples were trained. It is known when it was evaluated, and how long
    that and its training took."""
    evaluated_s = row.since_launch_s or 0.0
    trained_s = evaluated_s - (row.evaluation_s or 0.0)
    log.at(trained_s - row.train_s)
    if first:
        log.stop("init_stop")
        log.start("run_start")
    log.start("epoch_start", epoch_num=row.epoch, samples_count=samples)
    log.at(trained_s)
    at = {"epoch_num": row.epoch, "samples_count": samples + row.train_samples}
    log.stop("epoch_stop", **at)
    if row.train_loss is not None and math.isfinite(row.train_loss):
        log.point("train_loss", row.train_loss, **at)
    log.point("tracked_stats", {"throughput": row.samples_per_s}, **at)
    if row.val_accuracy is not None:
        log.start("eval_start", **at)
        log.at(evaluated_s)
        log.point("eval_accuracy", row.val_accuracy, **at)
        log.stop("eval_stop", **at)
