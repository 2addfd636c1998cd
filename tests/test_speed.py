"""What a training step cannot do without, and how it is told."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from rankwise.cli import main
from rankwise.doctor import speed
from rankwise.models.blank import blank_batch, seconds_of
from rankwise.models.replica import Replica


def test_flops_and_bytes_are_those_counted_by_hand() -> None:
    """For a linear layer the products are 2 b m n forward and once more for the weights (images need no
    gradient), and the bytes those of images, weights, gradients, momentum and what is kept."""
    b, m, n = 5, 3 * 8 * 8, 10
    model = nn.Sequential(nn.Flatten(), nn.Linear(m, n, bias=False))
    replica = Replica(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    images, labels = blank_batch((3, 8, 8), n, b)
    found = speed.cost(model, replica, (images.contiguous(), labels), "fp32")
    assert found.flops == 2 * 2 * b * m * n
    scores, total_weight = 4 * b * n, 4  # log-softmax's answer, and the sum of weights that the loss keeps
    kept = scores + total_weight + labels.nbytes
    assert found.bytes == 4 * b * m + 3 * 4 * m * n + 2 * (2 * 4 * m * n + kept)


def test_the_papers_network() -> None:
    """Its products, forward and backward, are 3.2 million operations an image, in proportion to the batch."""
    from rankwise.models.paper_cnn import PaperCNN

    model = PaperCNN()
    replica = Replica(model, torch.optim.SGD(model.parameters(), lr=0.1))
    one, four = (speed.cost(model, replica, blank_batch((3, 32, 32), 10, b), "fp32") for b in (1, 4))
    conv1, conv2 = 28 * 28 * 6 * 75, 10 * 10 * 16 * 150
    linear = 400 * 120 + 120 * 84 + 84 * 10
    assert one.flops == 2 * (2 * conv1 + 3 * conv2 + 3 * linear)
    assert four.flops == 4 * one.flops
    assert one.bytes < four.bytes < 4 * one.bytes


def test_times_are_taken_often_enough() -> None:
    """An action is timed at least so many times, the first, which warms up, not counted."""
    done: list[int] = []
    assert len(seconds_of(lambda: done.append(1), at_least_s=0.0, repeats=4)) == 4
    assert len(done) == 5


def test_doctor_tells_it(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """--speed gives limits for one thread and all, and a step in both precisions, as JSON and as a page that
    fits a terminal; the number of threads is as before."""
    monkeypatch.setattr(speed, "SIDE", 64)
    monkeypatch.setattr(speed, "ARRAY", 1 << 12)
    real = speed.seconds_of
    monkeypatch.setattr(speed, "seconds_of", lambda action, **_: real(action, at_least_s=0.0, repeats=2))
    before = torch.get_num_threads()
    main(["doctor", "--speed", "--model", "mlp", "--batch-size", "4", "--threads", "1", "--format", "json"])
    facts: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert torch.get_num_threads() == before
    assert facts["limits"][0]["threads"] == 1
    assert [row["precision"] for row in facts["steps"]] == ["fp32", "bf16"]
    for row in facts["steps"]:
        assert row["times_arithmetic_floor"] == pytest.approx(row["step_s"] / row["arithmetic_floor_s"])
    console = Console(width=100, record=True)
    with console.capture() as capture:
        console.print(speed.page(facts))
    shown = capture.get()
    assert "…" not in shown
    assert "fp32: a step takes" in shown
    assert "bf16: a step takes" in shown
