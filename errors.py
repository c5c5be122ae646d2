"""Errors a user can cause, each with the exit code its script ends with.

A message is one line: the argument, the value it had, what is accepted, what to do.
Everything else (a plain exception) is a defect of ours and keeps its traceback.
"""

import contextlib
import logging
import signal
import sys
from collections.abc import Callable

EXIT_DONE = 0
EXIT_INTERRUPTED = 130


class UserError(Exception):
    """Base of the errors a user can mend; `exit_code` is what the script returns."""

    exit_code = 1


class UsageError(UserError):
    """An argument, or a combination of arguments, that makes no sense."""

    exit_code = 2


class InputError(UserError):
    """A picture, video, audio or prompt file that cannot be used."""

    exit_code = 3


class WeightsError(UserError):
    """Weights that are missing, damaged, or of another model; or that compute NaN, as damaged or rounded ones do."""

    exit_code = 4


class ResourceError(UserError):
    """Not enough memory or disk."""

    exit_code = 5


@contextlib.contextmanager
def exit_codes(advice: str = ""):
    """Run a script's body; turn a `UserError` into one line on stderr and its exit code, and a scheduler's stop
    (SIGTERM) into Ctrl-C, so that files are left in order.

    advice: what to do after an interruption.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except UserError as error:
        logging.getLogger("selfsame").debug("user error", exc_info=True)
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print(f"interrupted{advice and f'; {advice}'}", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)


def run_script(main: Callable, parse_args: Callable) -> None:
    """What every entry script does around its `main`: messages to stderr, exit codes."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s", stream=sys.stderr)
    with exit_codes("the same command goes on from what is saved"):
        main(parse_args())
