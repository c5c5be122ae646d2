"""A setting is written once, where it is a field: its flag, its help, its bounds and choices come from there, and what
it means for the record of a run.

    @dataclass(frozen=True, kw_only=True)
    class LikenessSettings:
        title: ClassVar[str] = "likeness"                # over its flags in --help
        max_retries: int = setting("further seeds to try, then the best is kept", 3, low=0, high=100)

    add_flags(parser, LikenessSettings)                  # --max_retries N    further seeds to try, … (3)
    check_bounds(settings)                               # --max_retries 101: accepted are 0 to 100

The parser's mistakes are one line, as all other mistakes are.
"""

import argparse
import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass
from types import MappingProxyType
from typing import Any, NoReturn, TypeVar

from configs.values import describe, nearest, short, typed
from errors import UsageError, UserError

Kind = TypeVar("Kind")  # a dataclass whose fields are settings
NUMBERS = {int: "N", float: "X"}  # what stands for a value in the help
# What lies under the path that a setting names. For a run its content counts, and not where it lies.
MEDIA = "media"
WEIGHTS = "weights"
BASE = "weights of a whole model"  # with one of them a tiny model is one of files
BESIDE_BASE = "weights beside a whole model's"  # a tiny model that is made from a seed reads none of them
CONFIG = "config"
# What a setting decides, as far as a record and saved progress are concerned.
LATENTS = "latents"
FILE = "file"  # acts on finished latents only, or chooses among finished files
NOTHING = "nothing"  # how it is computed and reported: the frames are the same
ONE_RUN = "one run"  # where and how to write: not kept in a record, nor taken from one


@dataclass(frozen=True)
class Setting:
    """What a field of settings says of itself.

    low, high: bounds of a number, or of each in a list; `above`: the lower one itself is not accepted.
    choices: all that is accepted.
    names: further flags for it, upstream's.
    metavar: what stands for its value in the help.
    shown: its default in the help, where that is not a value.
    is_flag: whether a user may say it; else the task finds it out, and the record keeps it.
    takes_truth: a switch that True or False may follow, as upstream writes it.
    may_be_empty: a list that has no default, and may have no entries.
    text: a text that a model reads, and is checked as one; `needed`: it may not be empty.
    path: what lies where it points: `MEDIA`, `WEIGHTS`, `BASE`, `BESIDE_BASE` or `CONFIG`; "": it is no path.
    decides: `LATENTS`, `FILE`, `NOTHING` or `ONE_RUN`.
    later_clips: whether it may change while the clips that are finished still count.
    left_open: by default --memory auto chooses it, by the memory that is free at the moment.
    """

    help: str
    low: float | None = None
    high: float | None = None
    above: bool = False
    choices: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    metavar: str | tuple[str, ...] | None = None
    shown: str = ""
    is_flag: bool = True
    takes_truth: bool = False
    may_be_empty: bool = False
    text: bool = False
    needed: bool = False
    path: str = ""
    decides: str = LATENTS
    later_clips: bool = False
    left_open: bool = False


def setting(help: str, default: Any = MISSING, **what: Any) -> Any:
    """A field of settings with its flag; further arguments as of `Setting`. Without a default its value comes from the
    config, or from the user.
    """
    return dataclasses.field(default=default, metadata={"setting": Setting(help, **what)})


def again(base: type, name: str, **changes: Any) -> Any:
    """A field that a group of settings has already, with another default or another word about it.

    changes: `default`, or arguments of `Setting`; further `names` are added to those that it has.
    """
    field, what = described(base)[name]
    default = changes.pop("default", field.default)
    names = (*what.names, *changes.pop("names", ()))
    return dataclasses.field(default=default, metadata={"setting": dataclasses.replace(what, names=names, **changes)})


def described(kind: type) -> dict[str, tuple[dataclasses.Field, Setting]]:
    """Field name -> the field and what it says of itself, of all that do."""
    fields = dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ()
    return {field.name: (field, field.metadata["setting"]) for field in fields if "setting" in field.metadata}


def names_of(kind: type, **what: Any) -> tuple[str, ...]:
    """The fields that say just this of themselves, as `names_of(kind, decides=NOTHING)`."""
    return tuple(
        name
        for name, (_, said) in described(kind).items()
        if all(getattr(said, key) == is_ for key, is_ in what.items())
    )


def given_by(args: argparse.Namespace) -> Mapping[str, Any]:
    """What the user typed, by setting, and nothing else: a value that nobody writes to."""
    return MappingProxyType({name: value for name, value in vars(args).items() if value is not None})


def words_of(kind: type[Kind], given: Mapping[str, Any]) -> Kind:
    """What was typed of the fields of one class, checked: of words of a command that are no settings.

    Raises:
        UsageError: a value that is not accepted.
    """
    typed_of = {name: given[name] for name in described(kind) if name in given}
    words = kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in typed_of.items()})
    check_bounds(words)
    return words


def without_words(kind: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """What was typed beside the fields of that class."""
    return {name: value for name, value in given.items() if name not in described(kind)}


# -------------------------------------------------------------------------------------------------- flags and --help


def add_flags(parser: argparse.ArgumentParser, *kinds: type, without: Sequence[type] = ()) -> None:
    """The flags of all fields of settings classes, in groups of the help: under the `title` of a class those that it is
    the first to declare, then those of its bases. A flag that is not given is None: its value then comes from --config,
    or from the field.

    without: bases whose fields the script has no flags for.
    """
    groups: dict[str, Any] = {}
    there = {action.dest for action in parser._actions}
    for kind in kinds:
        fields, owners = described(kind), owners_of(kind)
        for title in dict.fromkeys(owner.title for owner in kind.__mro__ if owner in owners.values()):
            for name in (name for name, owner in owners.items() if owner.title == title and owner not in without):
                field, what = fields[name]
                if name in there or not flags_of(name, what):
                    continue
                there.add(name)
                if title not in groups:
                    groups[title] = parser.add_argument_group(title)
                flags = flags_of(name, what)
                groups[title].add_argument(
                    *flags, dest=name, help=help_of(field, what), **argument_of(field.type, what)
                )


def owners_of(kind: type) -> dict[str, type]:
    """Field name -> the class that is the first to declare it; in the order in which the class is composed."""
    owners: dict[str, type] = {}
    for base in kind.__bases__:
        owners |= {name: owner for name, owner in owners_of(base).items() if name not in owners}
    own = vars(kind).get("__annotations__", {})
    return owners | {name: kind for name in own if name in described(kind) and name not in owners}


def flags_of(name: str, what: Setting) -> tuple[str, ...]:
    """All flags of a field: under its own name first."""
    return (f"--{name}", *what.names) if what.is_flag else ()


def argument_of(annotation: object, what: Setting) -> dict[str, Any]:
    """How argparse reads a value of this annotation: bool, str, int or float, one or several, `X | None`."""
    if isinstance(annotation, types.UnionType):
        (annotation,) = (kind for kind in typing.get_args(annotation) if kind is not types.NoneType)
    if annotation is bool and what.takes_truth:
        return {"type": truth, "nargs": "?", "const": True, "metavar": "{True,False}"}
    if annotation is bool:
        return {"action": "store_true", "default": None}
    several = typing.get_args(annotation) if typing.get_origin(annotation) is tuple else ()
    kind = several[0] if several else annotation
    metavar = what.metavar or ("{" + ",".join(what.choices) + "}" if what.choices else NUMBERS.get(kind, "TEXT"))
    options = {"type": kind, "metavar": metavar}
    if several[1:] == (Ellipsis,):
        return options | {"nargs": "+", "action": "extend"}
    return options | ({"nargs": len(several)} if several else {})


def truth(word: str) -> bool:
    """The value of a flag that upstream wants one for (and takes any for true, "False" too)."""
    known = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if word.lower() not in known:
        raise argparse.ArgumentTypeError(f"{word!r}: accepted are True and False")
    return known[word.lower()]


def help_of(field: dataclasses.Field, what: Setting) -> str:
    """The help of a flag, with its default."""
    return f"{what.help} ({what.shown or default_of(field)})".replace("%", "%%")


def default_of(field: dataclasses.Field) -> str:
    """A default in words."""
    default = field.default
    if default is MISSING:
        return "from the config"
    if isinstance(default, bool):
        return "on" if default else "off"
    values = default if isinstance(default, tuple) else () if default is None else (default,)
    return " ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values) or "none"


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """argparse's, with what stands for a value once, after all names of a flag (as Python 3.13 has it)."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        return f"{', '.join(action.option_strings)} {self._format_args(action, action.dest.upper())}"


class Parser(argparse.ArgumentParser):
    """argparse, with an error that is raised as every other one: a line with what to do, not screens of usage.

    Flags have to be written out: a beginning of one would mean another flag as soon as there are two.
    """

    def __init__(self, description: str):
        super().__init__(description=description, formatter_class=HelpFormatter, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """
        Raises:
            UsageError: always; of a value its flag, what is wrong with it, and where all flags are listed.
        """
        raise UsageError(f"{self._first_name(message.removeprefix('argument '))}; see python {self.prog} --help")

    def parse_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):
        """As argparse's.

        Raises:
            UsageError: an unknown flag, with the nearest one, and the script that has it; a word that belongs to none;
                a value of another type.
        """
        namespace, strange = self.parse_known_args(args, namespace)
        if not strange:
            return namespace
        name = strange[0].split("=")[0]
        if not name.startswith("--"):
            raise UsageError(f"{strange[0][:60]!r} belongs to no flag; see python {self.prog} --help")
        shown = [flag for action in self._actions for flag in action.option_strings if flag.startswith("--")]
        from pipelines.whose import script_with_flag  # here: it looks at the settings of all scripts

        hint = nearest(name[:60], shown)
        if (script := script_with_flag(name)) is not None:
            raise UsageError(f"{name}: no such flag here ({script} has it){hint}")
        raise UsageError(f"{name[:60]}: no such flag{hint or f'; see python {self.prog} --help'}")

    @staticmethod
    def _first_name(message: str) -> str:
        """argparse's message of a flag with several names ("--audio/--sound: …") under the first of them."""
        names, colon, reason = message.partition(": ")
        return f"{names.split('/--')[0]}{colon}{reason}" if names.startswith("--") else message


# ----------------------------------------------------------------------------------------------------------- values


def check_types(values: Mapping[str, object], kind: type, where: str, error: type[UserError] = UsageError) -> dict:
    """Values for the fields of a dataclass of settings, held against its annotations; lists become tuples.

    Args:
        where: what stands before the name of a field in messages.
        error: what is raised.

    Raises:
        UserError: of that kind: a value of another type, or an empty list where something is needed.
    """
    checked = {}
    fields = described(kind)
    for name, value in values.items():
        field, said = fields[name]
        try:
            checked[name] = typed(value, field.type)
        except TypeError:
            raise error(f"{where}{name} is {short(value)}, expected {describe(field.type)}") from None
        if checked[name] == () and field.default != () and not said.may_be_empty:
            raise error(f"{where}{name} is an empty list; give one value at least, or leave it out")
    return checked


def check_bounds(settings: object) -> None:
    """Whether every field that says what it accepts has such a value; None is not given.

    Raises:
        UsageError: naming the flag, its value and what is accepted.
    """
    for name, (_, what) in described(type(settings)).items():
        value = getattr(settings, name)
        for one in value if isinstance(value, tuple) else () if value is None else (value,):
            if what.low is not None and not is_within(one, what):
                accepted = f"numbers above {what.low:g}," if what.above else f"{what.low:g}"
                raise UsageError(f"--{name} {short(one)}: accepted are {accepted} to {what.high:g}")
            if what.choices and one not in what.choices:
                hint = nearest(one, what.choices)
                raise UsageError(f"--{name} {one[:60]}: accepted are {', '.join(what.choices)}{hint}")


def is_within(number: object, what: Setting) -> bool:
    """Whether it is a number, and within the bounds; NaN is within none."""
    return isinstance(number, int | float) and what.low <= number <= what.high and (number > what.low or not what.above)
