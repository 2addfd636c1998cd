"""``python -P -m rankwise.launch.program_rank FOLDER [START]``: one rank of a program that our launcher
started; with the name of a START one that takes over in its `Run`, once that is the run's."""

from __future__ import annotations

import sys
from pathlib import Path

from rankwise.launch.program_process import run_as_launched
from rankwise.runs.folder import RunFolder

if __name__ == "__main__":
    run_as_launched(RunFolder(Path(sys.argv[1])), *sys.argv[2:])
