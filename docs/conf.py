"""How Sphinx makes the site: `make docs`."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

from sphinx.application import Sphinx

sys.path.insert(0, str(Path(__file__).parent))

import references

project = "rankwise"
author = "the authors of rankwise"
release = version = metadata.version("rankwise")

extensions = ["myst_parser", "sphinx.ext.autodoc"]
source_suffix = [".md"]
exclude_patterns = ["reproduction/records", "generated/**/_*"]
html_theme = "furo"
html_title = f"rankwise {release}"
html_copy_source = False
html_show_sourcelink = False
html_use_index = True


myst_heading_anchors = 4
myst_enable_extensions = ["deflist"]

# Docstrings put code between single backticks.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_class_signature = "separated"


def write_references(app: Sphinx) -> None:
    """The pages that are made from the code, before the others are read."""
    references.write(Path(app.srcdir) / "generated")


def setup(app: Sphinx) -> None:
    app.connect("builder-inited", write_references)
