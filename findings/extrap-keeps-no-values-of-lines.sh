#!/usr/bin/env bash
# Guessed: keeping the values of repetitions (the reader's keep_values, --keep-values of the command) works for each
#   format of JSON that the one reader takes.
# Happens: of a JSON file the values of each point are kept, of the same measurements as JSON lines they are dropped
#   without a word. Mean, median and spread are the same in both, so models do not differ.
# Versions: extrap 4.2.5, numpy 1.26.4.
# Matters: who wants repetitions one by one later, as for a plot of them, must write the larger format.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check extrap==4.2.5 numpy==1.26.4

cat > "$folder/look.py" <<'EOF'
import json
import sys
from pathlib import Path

from extrap.fileio.file_reader.json_file_reader import JsonFileReader

REPETITIONS = {ranks: [ranks, ranks + 1.0, ranks + 3.0] for ranks in (2, 4, 8, 16, 32)}


def as_lines():
    rows = ({"params": {"ranks": ranks}, "value": values} for ranks, values in REPETITIONS.items())
    return "\n".join(map(json.dumps, rows))


def as_one():
    points = [{"point": [ranks], "values": values} for ranks, values in REPETITIONS.items()]
    return json.dumps({"parameters": ["ranks"], "measurements": {"epoch": {"seconds": points}}})


def read(text, name):
    path = Path(sys.argv[1], name)
    path.write_text(text)
    reader = JsonFileReader()
    reader.keep_values = True
    (points,) = reader.read_experiment(str(path)).measurements.values()
    kept = [its.values is not None and sorted(its.values) for its in points]
    return kept, [(its.mean, its.median) for its in points]


one, of_one = read(as_one(), "runs.json")
lines, of_lines = read(as_lines(), "runs.jsonl")
print(f"of one JSON file: {one[0]}; of JSON lines: {lines[0]}; means and medians alike: {of_one == of_lines}")
if one != [sorted(its) for its in REPETITIONS.values()] or any(lines) or of_one != of_lines:
    sys.exit("changed: values of repetitions used to be kept of a JSON file, and not of JSON lines")
EOF
"$folder/venv/bin/python" -W ignore "$folder/look.py" "$folder"
