"""What a run has learned: `rankwise.load` and `rankwise evaluate`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import rankwise
from rankwise.cli import main
from rankwise.errors import UsageError
from rankwise.evaluation.picture import draw, matrix
from rankwise.evaluation.scores import Evaluation
from rankwise.runs.folder import RunFolder
from rankwise.runs.record import Record
from rankwise.runs.weights import find_weights

from . import tiny


@pytest.fixture
def trained(
    train_in_threads: Callable[..., Any], config: Callable[..., Any], tmp_path: Path
) -> Callable[..., tuple[Record, Path]]:
    """A short run of the tiny network, and its folder."""

    def train(**options: Any) -> tuple[Record, Path]:
        record, folder, _ = train_in_threads(config(**options))
        return record, folder.path

    return train


def told(*words: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = 0
    try:
        main([*words])
    except SystemExit as ended:
        code = int(ended.code or 0)
    return code, *capsys.readouterr()


@pytest.mark.parametrize("options", [{"ranks": 2, "topology": "allreduce"}, {"averaged_weights": "ema"}])
def test_a_loaded_network_is_the_one_that_was_evaluated(
    options: dict[str, Any], trained: Callable[..., tuple[Record, Path]]
) -> None:
    """In plain PyTorch, from the newest checkpoint, its accuracy and loss are the record's, which also tells
    the shape of the images and the classes."""
    record, path = trained(**options)
    model = rankwise.load(path)
    _, _, images, labels = tiny.images()
    with torch.no_grad():
        scores = model(torch.from_numpy(images)[:, None].float() / 127.5 - 1)
    assert not model.training
    right = (scores.argmax(1) == torch.from_numpy(labels)).double().mean().item()
    assert right == pytest.approx(record.epochs[-1].val_accuracy)
    loss = F.cross_entropy(scores, torch.from_numpy(labels)).item()
    assert loss == pytest.approx(record.epochs[-1].val_loss, rel=1e-5)
    assert record.seen is not None
    assert (record.seen.image_shape, len(record.seen.classes)) == ((1, 8, 8), 10)


def test_an_older_epoch_and_a_network_of_ones_own_take_the_weights(
    trained: Callable[..., tuple[Record, Path]],
) -> None:
    """`checkpoint=1` gives those of that epoch, `model=` puts them into what a program has built."""
    _, path = trained(epochs=2)
    first, second = rankwise.load(path, checkpoint=1), rankwise.load(path)
    assert not torch.equal(first[1].weight, second[1].weight)
    own = tiny.net()
    assert rankwise.load(path, model=own) is own
    assert torch.equal(own[1].weight, second[1].weight)
    with pytest.raises(UsageError, match="no checkpoint of epoch 7: those of 1, 2 were kept"):
        rankwise.load(path, checkpoint=7)


def test_weights_that_do_not_fit_are_named(
    trained: Callable[..., tuple[Record, Path]], tmp_path: Path
) -> None:
    """The first tensor that is missing, has another shape or no place; a damaged file, and none at all."""
    _, path = trained(epochs=1)
    wider = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 27))
    with pytest.raises(
        UsageError, match=r"1.weight has the shape \(26, 64\) there, and \(27, 64\) in the net"
    ):
        rankwise.load(path, model=wider)
    with pytest.raises(UsageError, match=r"they have 3.bias, and the network has not"):
        rankwise.load(path, model=torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 26)))
    with pytest.raises(UsageError, match=r"they lack 0.weight, and have [13]."):
        rankwise.load(path, model=torch.nn.Sequential(torch.nn.Linear(64, 26)))
    file = find_weights(path).path
    file.write_bytes(file.read_bytes()[:-4] + b"oops")
    with pytest.raises(UsageError, match=r"model.safetensors is damaged"):
        rankwise.load(path)
    file.unlink()
    (file.parent.parent / "epoch-0000" / "model.safetensors").unlink(missing_ok=True)
    with pytest.raises(UsageError, match="has no weights"):
        rankwise.load(path)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UsageError, match=r"no record.json"):
        rankwise.load(tmp_path / "nothing")


def test_evaluating_the_runs_own_images_gives_the_records_figures(
    trained: Callable[..., tuple[Record, Path]],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Accuracy and loss are those of the last epoch, on what --validation-split held out too; the confusion
    matrix counts each image once, as JSON and as a picture."""
    record, path = trained(validation_split=0.3, epochs=3)
    monkeypatch.chdir(tmp_path)
    code, out, err = told("evaluate", str(path), "--format", "json", capsys=capsys)
    assert code == 0, err
    found = json.loads(out)
    assert found["accuracy"] == pytest.approx(record.epochs[-1].val_accuracy)
    assert found["loss"] == pytest.approx(record.epochs[-1].val_loss, rel=1e-5)
    matrix = np.array(found["confusion"])
    assert matrix.sum() == found["samples"] == 60
    assert np.trace(matrix) / 60 == pytest.approx(found["accuracy"])
    assert [each["samples"] for each in found["classes"]] == matrix.sum(1).tolist()
    assert "<svg" in (tmp_path / "confusion.svg").read_text()


def photographs(path: Path) -> Path:
    """The tiny dataset's validation images as files of another size, two classes of them; one image more
    beside."""
    _, _, images, labels = tiny.images()
    for at in np.flatnonzero(labels < 2):
        place = path / "photos" / str(labels[at]) / f"{at}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[at]).resize((24, 24), Image.Resampling.NEAREST).convert("RGB").save(place)
    (path / "one.png").write_bytes(next((path / "photos" / "1").iterdir()).read_bytes())
    return path / "photos"


def test_folders_and_single_images_are_evaluated(
    trained: Callable[..., tuple[Record, Path]],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Classes are found by their names; images of any size and kind are made what the network takes."""
    _, run = trained(epochs=6, lr=0.1)
    photos = photographs(tmp_path)
    monkeypatch.chdir(tmp_path)
    code, out, err = told("evaluate", str(run), "--on", "photos", "--format", "json", capsys=capsys)
    assert code == 0, err
    found = json.loads(out)
    _, _, images, labels = tiny.images()
    chosen = labels < 2
    with torch.no_grad():
        guessed = rankwise.load(run)(torch.from_numpy(images[chosen])[:, None].float() / 127.5 - 1).argmax(1)
    right = (guessed.numpy() == labels[chosen]).mean()
    assert found["accuracy"] == pytest.approx(right, abs=0.11)  # scaled there and back
    assert sum(row["samples"] for row in found["classes"]) == chosen.sum()
    code, out, _ = told("evaluate", str(run), "--on", "one.png", "--format", "json", capsys=capsys)
    one = json.loads(out)["guesses"]
    assert [each["file"] for each in one] == ["one.png"]
    assert sum(one[0]["top"].values()) <= 1.0001
    code, out, _ = told("evaluate", str(run), "--on", str(photos / "1"), capsys=capsys)
    assert (code, out.count(".png")) == (0, 5)


def test_what_cannot_be_evaluated_is_one_line(
    trained: Callable[..., tuple[Record, Path]],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Other shapes and classes than the run's, words that are wrong by a letter: code 2, and no picture."""
    _, run = trained(epochs=1)
    monkeypatch.chdir(tmp_path)
    metrics = RunFolder(run).metrics
    better = {**json.loads(metrics.read_text()), "val_accuracy": 1.0}
    metrics.write_text(json.dumps(better) + "\n")
    (tmp_path / "wolves/wolf").mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(tmp_path / "wolves/wolf/a.png")
    for words, said in {
        "--on digits": "images of digits are 3x32x32, and the network of .* takes 1x8x8",
        "--on digit": "unknown dataset 'digit': did you mean 'digits'",
        "--on wolves/wolf/b.png": r"b.png does not exist \(did you mean .*a.png\?\): expected an image",
        "--on wolves": "class 'wolf' of wolves is none of those",
        "--on wolves/wolf/a.png --output a.svg": "nobody has said what is in",
        "--checkpoint newst": "expected newest, best, or the number",
        "--checkpoint best": "was best after epoch 1, and its checkpoint was not kept",
        "--output a.pdf": "expected a picture that ends in .svg or .png",
        "--output no/a.svg": "there is no folder",
    }.items():
        code, out, err = told("evaluate", str(run), *words.split(), capsys=capsys)
        assert (code, out) == (2, "")
        assert re.search(said, err)
        assert err.count("rankwise: ") == 1
    assert not list(tmp_path.glob("*.svg"))


def test_a_programs_run_says_how_its_weights_are_had(
    trained: Callable[..., tuple[Record, Path]],
) -> None:
    """Its network is its own: one line says to build it and to hand it over."""
    record, path = trained(epochs=1)
    folder = RunFolder(path)
    program = {**record.config, "program": ["net.py"], "model": "net.py"}
    folder.write(record.model_copy(update={"config": program}))
    with pytest.raises(UsageError, match=r"run of a program, net.py.*rankwise.load\(RUN, model=network\)"):
        rankwise.load(path)


def test_many_classes_make_a_picture_that_can_be_read(tmp_path: Path) -> None:
    """Of 200 classes those that are mistaken most are drawn; a PNG is one."""
    confusion = np.diag(np.full(200, 3))
    confusion[17, 150] = 9
    found = Evaluation("made", int(confusion.sum()), 0.1, tuple(f"c{n}" for n in range(200)), confusion)
    cells = {(row["true"], row["taken for"]): row["count"] for row in matrix(found)["data"]["values"]}
    assert cells["c17", "c150"] == 9
    assert len(cells) == 40**2
    draw(found, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        assert min(picture.size) > 300
