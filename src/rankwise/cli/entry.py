"""From words on the command line to an exit code."""

from __future__ import annotations

import os
import sys
import traceback
from typing import NoReturn

from cyclopts import CycloptsError
from pydantic import ValidationError

from rankwise.cli.options import (
    app,
)
from rankwise.cli.programs import split_program
from rankwise.config import explain
from rankwise.errors import Interrupted, RankwiseError, UsageError, one_line


def main(tokens: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 2 wrong use, 1 a failure in training, 130 interrupted."""
    tokens = sys.argv[1:] if tokens is None else tokens
    words, rest = tokens, tokens[1:]
    try:
        if tokens[:1] == ["run"]:
            words, rest = split_program(tokens[1:])
            words = ["run", *words]
        command, bound, left = app.parse_args(words, exit_on_error=False, print_error=False)
        command(*bound.args, **bound.kwargs, **dict.fromkeys(left, rest))
        sys.stdout.flush()
    except CycloptsError as error:
        _exit(UsageError(_one_line_of(error)), tokens)
    except RankwiseError as error:
        _exit(error, tokens)
    except KeyboardInterrupt:
        _exit(Interrupted("stopped by Ctrl-C"), tokens)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has gone: be quiet
        sys.exit(1)
    except Exception as error:
        _exit(RankwiseError(f"{type(error).__name__}: {one_line(error)} (--debug shows where)"), tokens)


def _exit(error: RankwiseError, tokens: list[str]) -> NoReturn:
    if "--debug" in tokens:
        traceback.print_exc()
    print(f"rankwise: {one_line(error)}", file=sys.stderr, flush=True)
    sys.exit(error.exit_code)


def _one_line_of(error: CycloptsError) -> str:
    cause = error.__cause__ or error.__context__
    return explain(cause) if isinstance(cause, ValidationError) else str(error)
