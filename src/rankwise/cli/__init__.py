"""The command line: options to a configuration, errors to exit codes, and nothing else."""

from rankwise.cli import here, results, training  # each adds its commands to the application
from rankwise.cli.entry import main
from rankwise.cli.options import app

__all__ = ["app", "here", "main", "results", "training"]
