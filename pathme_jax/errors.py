"""Errors a user can cure, and how the launchers show them: one line, exit code 2."""

from __future__ import annotations

import errno
import functools
import sys
from collections.abc import Callable
from typing import Any


class UserError(Exception):
    """Something only the user can put right.

    Args:
        problem: which file or value, and what was expected of it.
        cure: what to do about it.
    """

    def __init__(self, problem: str, cure: str):
        super().__init__(problem, cure)
        self.problem = problem
        self.cure = cure

    def __str__(self) -> str:
        return f"{self.problem}. {self.cure}"


def launcher(main: Callable[..., Any]) -> Callable[..., Any]:
    """Turns a `UserError`, or a full disk, into one line on stderr and exit code 2."""

    @functools.wraps(main)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return main(*args, **kwargs)
        except UserError as error:
            sys.exit(_say(str(error)))
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            sys.exit(
                _say(f"no space left writing {error.filename or 'the output'}. Free some and rerun")
            )

    return run


def _say(line: str) -> int:
    print(f"error: {line}", file=sys.stderr)
    return 2
