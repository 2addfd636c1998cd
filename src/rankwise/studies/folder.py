"""The folder of a study, by the names of its files."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import ValidationError

from rankwise.config import TrainConfig
from rankwise.errors import StorageError, UsageError, one_line
from rankwise.runs.folder import RunFolder
from rankwise.runs.record import Record
from rankwise.system.files import write_atomically

PLACES = ("out", "data_dir", "cache_dir")
"""Options that say where things lie on one machine; a study's records are for others too."""


class StudyFolder:
    """`records/` holds the finished runs and is all that a page needs; `runs/` may be deleted."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.page = path / "index.html"
        self.tables = path / "tables"
        self.records = path / "records"
        self.runs = path / "runs"
        self._settings = path / "study.json"

    def require(self, settings: dict[str, object]) -> None:
        """Raises UsageError unless the folder is new, empty, or holds a study with these settings."""
        for name, value in self.settings().items():
            if settings.get(name, value) != value:
                raise UsageError(
                    f"{self.path} holds a study with {name} = {value}, but {settings[name]} was given: "
                    "choose another --output"
                )

    def create(self, settings: dict[str, object]) -> None:
        """Make the folder, and write down what it is for. Raises UsageError if that cannot be."""
        try:
            for folder in (self.path, self.tables, self.records, self.runs):
                folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self._settings, json.dumps(settings, indent=1).encode() + b"\n")
        except (OSError, StorageError) as error:
            reason = getattr(error, "strerror", None) or one_line(error)
            raise UsageError(f"cannot write {self.path}: {reason}; choose another --output") from None

    def settings(self) -> dict[str, object]:
        """What its study was given, nothing if the folder is new. Raises UsageError if something else is in
        it."""
        try:
            stored = json.loads(self._settings.read_bytes())
        except FileNotFoundError:
            if self.path.is_dir() and any(self.path.iterdir()):
                raise UsageError(
                    f"{self.path} is not empty and holds no study: choose another --output"
                ) from None
            return {}
        except (OSError, ValueError) as error:
            raise UsageError(
                f"{self._settings} cannot be read: {one_line(error)}; choose another --output"
            ) from None
        return dict(stored)

    def run(self, name: str) -> RunFolder:
        """The folder of one run."""
        return RunFolder(self.runs / name)

    def log(self, name: str) -> Path:
        """What one run printed."""
        return self.runs / f"{name}.log"

    def seeds(self, trial: str) -> dict[str, int]:
        """The runs of a trial whose records are here, with their seeds."""
        names = (path.stem for path in self.records.glob(f"{trial}-seed*.json"))
        return {name: int(name.rpartition("seed")[2]) for name in names}

    def finished(self, name: str, config: TrainConfig) -> Record | None:
        """The record of a run that is finished, None if it is yet to be trained (again).

        Raises UsageError if it was trained with other options than `config` asks for.
        """
        record = self.record_of(name)
        if record:
            require_options(record, config, self.records / f"{name}.json")
        return record

    def record_of(self, name: str) -> Record | None:
        """The record of a finished run, whatever its options."""
        try:
            return Record.model_validate_json((self.records / f"{name}.json").read_bytes())
        except (OSError, ValidationError):
            return None

    def all_seeds(self, name: str, seeds: int) -> list[Record]:
        """The records of a number of seeds of a run, under any options; none unless all are finished."""
        records = [self.record_of(f"{name}-seed{seed}") for seed in range(seeds)]
        return [record for record in records if record] if all(records) else []

    def keep(self, name: str, record: Record) -> None:
        """Put a finished run's record aside. Raises StorageError."""
        config = record.config | dict.fromkeys(PLACES)
        if program := config.get("program"):
            config["program"] = [Path(word).name if Path(word).is_absolute() else word for word in program]
        anywhere = record.model_copy(update={"config": config})
        write_atomically(self.records / f"{name}.json", anywhere.model_dump_json(indent=1).encode() + b"\n")


def require_options(record: Record, config: TrainConfig, where: Path) -> None:
    """Raises UsageError unless the run was given what is set in `config` (places apart)."""
    for name, value in config.model_dump(mode="json", include=config.model_fields_set).items():
        if name not in PLACES and record.config.get(name) != value:
            raise UsageError(
                f"{where} holds a run with --{name.replace('_', '-')} {record.config.get(name)}, "
                f"but the study needs {value}: choose another --output"
            )
