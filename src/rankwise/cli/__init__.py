"""The command line: options to a configuration, errors to exit codes, and nothing else."""

from rankwise.cli import afterwards, here, results, training  # each adds its commands to the application
from rankwise.cli.entry import main
from rankwise.cli.options import app

__all__ = ["afterwards", "app", "here", "main", "results", "training"]
