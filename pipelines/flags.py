"""A setting is written once, where it is a field: its flag, its help, its bounds and choices come from there.

    @dataclass(frozen=True, kw_only=True)
    class LikenessSettings:
        max_retries: int = setting("further seeds to try, then the best is kept", 3, low=0, high=100)

    add_flags(parser, LikenessSettings, "likeness")      # --max_retries N    further seeds to try, … (3)
    check_bounds(settings)                               # --max_retries 101: accepted are 0 to 100

The parser's mistakes are one line, as all other mistakes are.
"""

import argparse
import dataclasses
import types
import typing
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from typing import Any, NoReturn

from configs.values import nearest, short
from errors import UsageError

NUMBERS = {int: "N", float: "X"}  # what stands for a value in the help


@dataclass(frozen=True)
class Setting:
    """What a field of settings says of itself.

    low, high: bounds of a number, or of each in a list.
    choices: all that is accepted.
    names: further flags for it, upstream's.
    metavar: what stands for its value in the help.
    shown: its default in the help, where that is not a value.
    """

    help: str
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    metavar: str | tuple[str, ...] | None = None
    shown: str = ""


def setting(help: str, default: Any = MISSING, **what: Any) -> Any:
    """A field of settings with its flag; further arguments as of `Setting`."""
    return dataclasses.field(default=default, metadata={"setting": Setting(help, **what)})


def described(kind: type) -> dict[str, tuple[dataclasses.Field, Setting]]:
    """Field name -> the field and what it says of itself, of all that do."""
    fields = dataclasses.fields(kind)
    return {field.name: (field, field.metadata["setting"]) for field in fields if "setting" in field.metadata}


def add_flags(parser: argparse.ArgumentParser, kind: type, title: str) -> None:
    """The flags of the fields that a class of settings declares itself, as a group of the help. A flag that is not
    given is None: its value then comes from --config, or from the field.
    """
    group = parser.add_argument_group(title)
    for name, (field, what) in described(kind).items():
        if name in kind.__annotations__:
            flags = (f"--{name}", *what.names)
            group.add_argument(*flags, dest=name, help=help_of(field, what), **argument_of(field.type, what))


def argument_of(annotation: object, what: Setting) -> dict[str, Any]:
    """How argparse reads a value of this annotation: bool, str, int or float, one or several, `X | None`."""
    if isinstance(annotation, types.UnionType):
        (annotation,) = (kind for kind in typing.get_args(annotation) if kind is not types.NoneType)
    if annotation is bool:
        return {"action": "store_true", "default": None}
    several = typing.get_args(annotation) if typing.get_origin(annotation) is tuple else ()
    kind = several[0] if several else annotation
    metavar = what.metavar or ("{" + ",".join(what.choices) + "}" if what.choices else NUMBERS.get(kind, "TEXT"))
    options = {"type": kind, "metavar": metavar}
    if several[1:] == (Ellipsis,):
        return options | {"nargs": "+", "action": "extend"}
    return options | ({"nargs": len(several)} if several else {})


def help_of(field: dataclasses.Field, what: Setting) -> str:
    """The help of a flag, with its default."""
    default = field.default
    values = default if isinstance(default, tuple) else (default,)
    shown = what.shown or " ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in values if v is not None)
    has_none = not what.shown and (default is MISSING or default is False or default in (None, ()))
    return what.help.replace("%", "%%") + ("" if has_none else f" ({shown})".replace("%", "%%"))


def check_bounds(settings: object) -> None:
    """Whether every field that says what it accepts has such a value; None is not given.

    Raises:
        UsageError: naming the flag, its value and what is accepted.
    """
    for name, (_, what) in described(type(settings)).items():
        value = getattr(settings, name)
        for one in value if isinstance(value, tuple) else () if value is None else (value,):
            if what.low is not None and not (isinstance(one, int | float) and what.low <= one <= what.high):  # nor NaN
                raise UsageError(f"--{name} {short(one)}: accepted are {what.low:g} to {what.high:g}")
            if what.choices and one not in what.choices:
                hint = nearest(one, what.choices)
                raise UsageError(f"--{name} {one[:60]}: accepted are {', '.join(what.choices)}{hint}")


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
