"""The command line: flags whose mistakes are one line, as all other mistakes are."""

import argparse
from collections.abc import Sequence
from typing import NoReturn

from configs.values import nearest
from errors import UsageError


class Parser(argparse.ArgumentParser):
    """argparse, with an error that is raised as every other one: a line with what to do, not screens of usage.

    Flags have to be written out: a beginning of one would mean another flag as soon as there are two.
    """

    def __init__(self, description: str):
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )

    def error(self, message: str) -> NoReturn:
        """
        Raises:
            UsageError: always; of a value its flag, what is wrong with it, and where all flags are listed.
        """
        raise UsageError(f"{message.removeprefix('argument ')}; see python {self.prog} --help")

    def parse_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):
        """As argparse's.

        Raises:
            UsageError: an unknown flag, with the nearest one; a word that belongs to none; a value of another type.
        """
        namespace, strange = self.parse_known_args(args, namespace)
        if not strange:
            return namespace
        name = strange[0].split("=")[0]
        if not name.startswith("--"):
            raise UsageError(f"{strange[0][:60]!r} belongs to no flag; see python {self.prog} --help")
        shown = [flag for action in self._actions for flag in action.option_strings if flag.startswith("--")]
        hint = nearest(name[:60], shown) or f"; see python {self.prog} --help"
        raise UsageError(f"{name[:60]}: no such flag{hint}")
