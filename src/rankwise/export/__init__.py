"""Runs in the formats that other people's tools read.

Each format is one file here. All of them read a run as `run_content` gives it, and none reads a run folder
itself. docs/formats.md says for each what is in it, what is not, and which tool opened it.
"""

from rankwise.export.formats import FORMATS, Exported, export

__all__ = ["FORMATS", "Exported", "export"]
