"""The pages of the site that are made from the code: each key of `record.json` and `plan.json`, and each
option."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel

from rankwise.config import TrainConfig
from rankwise.plan import RunPlan
from rankwise.runs.record import Record


def write(folder: Path) -> None:
    """Write the pages into a folder."""
    folder.mkdir(exist_ok=True)
    pages = {
        "record.md": _record(),
        "plan.md": _plan(),
        "options.md": _options(),
    }
    for name, text in pages.items():
        place = folder / name
        if not place.exists() or place.read_text() != text:  # else Sphinx would read it again for nothing
            place.write_text(text)


def _record() -> str:
    intro = (
        "# record.json\n\nWhat a run leaves: written after each epoch, and when it ends. Names ending in "
        "`_ns` are nanoseconds, `_s` seconds, accuracies and efficiencies fractions. Later versions may add "
        "keys.\n"
    )
    return intro + "".join(_section(model) for model in _models(Record))


def _plan() -> str:
    return (
        "# plan.json\n\nWhat a run was asked for, and what of that is in force. It is what ranks are started "
        "with, and what `--resume` begins from.\n\n"
        "| key | what it holds |\n|---|---|\n"
        "| `asked` | the options that were given, by name |\n"
        "| `plan` | every option with the value in force, `null` where it means nothing to this run |\n"
        "| `program` | the script of `rankwise run` and its arguments, empty for `rankwise train` |\n\n"
        f"## Keys of `plan`\n\n{_summary(RunPlan)}\n\n" + _table(TrainConfig.model_fields)
    )


def _options() -> str:
    rows = "".join(
        f"| `--{name.replace('_', '-')}` | {_type(field.annotation)} | {_default(field)} | "
        f"{_text(field.description)} |\n"
        for name, field in TrainConfig.model_fields.items()
    )
    return (
        "# Options of `rankwise train`\n\nThe same names, with underscores or dashes, stand in TOML files "
        "(`--config FILE`), in the record, and in `rankwise.TrainConfig`.\n\n"
        "| option | value | default | |\n|---|---|---|---|\n" + rows
    )


def _models(model: type[BaseModel]) -> list[type[BaseModel]]:
    """A model and those of its fields, each once, in the order in which they are met."""
    found = [model]
    for seen in found:
        for field in seen.model_fields.values():
            found += [one for one in _parts(field.annotation) if one not in found]
    return found


def _parts(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [one for part in get_args(annotation) for one in _parts(part)]


def _section(model: type[BaseModel]) -> str:
    return f"\n## {model.__name__}\n\n{_summary(model)}\n\n{_table(model.model_fields)}"


def _summary(model: type[BaseModel]) -> str:
    return " ".join((model.__doc__ or "").split("\n\n")[0].split())


def _table(fields: dict[str, Any]) -> str:
    rows = "".join(
        f"| `{name}` | {_type(field.annotation)} | {_text(field.description)} |\n"
        for name, field in fields.items()
    )
    return "| key | type | |\n|---|---|---|\n" + rows


def _type(annotation: Any) -> str:
    name = (
        annotation.__name__ if isinstance(annotation, type) and not get_args(annotation) else str(annotation)
    )
    for prefix in ("typing.", "rankwise.runs.record.", "pathlib.", "<class '", "'>"):
        name = name.replace(prefix, "")
    return f"`{name}`".replace("|", r"\|")


def _default(field: Any) -> str:
    return "" if field.default is None else f"`{field.default}`"


def _text(description: str | None) -> str:
    return " ".join((description or "").split()).replace("|", r"\|")
