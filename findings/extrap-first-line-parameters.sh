#!/usr/bin/env bash
# Guessed: Extra-P takes the parameters of a measurement from its own JSON line, so lines that have one more than the
#   first are modelled in it too, or refused.
# Happens: the first line's parameters are those of the whole file. What later lines have besides is passed over
#   without a word, and measurements of different sizes become repetitions of one: 25 points over ranks and sizes are
#   read as 5, and the model says that the time depends on ranks alone, by the mean of all sizes. The other way round,
#   a line that lacks a parameter of the first is refused with its number.
# Versions: extrap 4.2.5, numpy 1.26.4.
# Matters: each line must have all parameters, also those that have their default, above all the first.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check extrap==4.2.5 numpy==1.26.4

cat > "$folder/look.py" <<'EOF'
import json
import sys
from pathlib import Path

from extrap.fileio.file_reader.jsonlines_file_reader import read_jsonlines_file
from extrap.modelers.model_generator import ModelGenerator
from extrap.util.exceptions import FileFormatError

POINTS = [(ranks, size) for size in (1, 2, 3, 4, 5) for ranks in (2, 4, 8, 16, 32)]


def lines(first_has_size):
    """One run a line, whose seconds are ranks times size."""
    for number, (ranks, size) in enumerate(POINTS):
        parameters = {"ranks": ranks, "size": size}
        if number == 0 and not first_has_size:
            del parameters["size"]
        yield json.dumps({"params": parameters, "metric": "seconds", "value": ranks * size})


def read(rows):
    path = Path(sys.argv[1], "runs.jsonl")
    path.write_text("\n".join(rows))
    experiment = read_jsonlines_file(path)
    ModelGenerator(experiment, name="default").model_all()
    (model,) = experiment.modelers[0].models.values()
    names = [str(parameter) for parameter in experiment.parameters]
    return names, len(experiment.coordinates), model.hypothesis.function.evaluate


whole, points, seconds = read(lines(first_has_size=True))
print(f"size on each line: {whole}, {points} points; 64 ranks, size 10: {seconds([64, 10]):.0f} s of 640")
less, fewer, by_ranks = read(lines(first_has_size=False))
print(f"not on the first: {less}, {fewer} points; 64 ranks, of any size: {by_ranks([64]):.0f} s")
try:
    read(reversed(list(lines(first_has_size=False))))
    refused = False
except FileFormatError as error:
    refused = "Missing property" in str(error)
print(f"not on the last: {'refused' if refused else 'taken'}")
if whole != ["ranks", "size"] or points != 25 or less != ["ranks"] or fewer != 5 or not refused:
    sys.exit("changed: the first line's parameters used to be those of all, and a line without one refused")
EOF
"$folder/venv/bin/python" -W ignore "$folder/look.py" "$folder"
