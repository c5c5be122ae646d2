"""A configuration's YAML file and --set, as dotted names with their values and the places they were given at.

    read_given("run.yaml", ["train.steps=50"], known)      # {"train.steps": Entry(50, "--set train.steps=50"), …}

Values stay as YAML has them until `value_of` holds them against the annotation and the setting of their field.
"""

import dataclasses
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path

import yaml

from configs import FOLDER
from configs.values import describe, nearest, short, typed
from errors import UsageError
from pipelines.flags import Setting

LONGEST = 2**20  # bytes of a file


@dataclass(frozen=True)
class Entry:
    """A value that was given, and where: "run.yaml, line 12", or "--set train.steps=50"."""

    value: object
    place: str


Given = dict[str, Entry]  # dotted name -> what was given for it


class Loader(yaml.SafeLoader):
    """SafeLoader that takes 1e-4 for a number, as YAML 1.2 does and PyYAML does not."""


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def read_given(
    path: str | Path | None, sets: Sequence[str], known: Mapping[str, tuple], recipe: str | None = None
) -> Given:
    """What a file and --set give; --set wins.

    Args:
        known: dotted names of all fields, those of blocks with a dataclass (`training.config.fields_of`).
        recipe: of --recipe, which a file need not name then.

    Raises:
        UsageError: no such file, no YAML, an unknown field, one that is there twice; a file of another recipe.
    """
    given: Given = {}
    if path is not None:
        file = find_file(path)
        given = dict(entries(parse(read_text(file), str(file)), "", str(file), known))
    if recipe is not None:
        entry = given.setdefault("recipe", Entry(recipe, f"--recipe {recipe}"))
        if entry.value != recipe:
            names = ", ".join(files_of(recipe))
            raise UsageError(f"{entry.place}: recipe is {entry.value}, --recipe {recipe}; give one of {names}")
    for text in sets:
        name, separator, value = text.partition("=")
        name = name.strip()
        if not separator or not name:
            raise UsageError(f"--set {text[:60]}: give a field and its value, train.steps=1000 for instance")
        place = f"--set {text[:100]}"
        if name not in known:
            raise UsageError(f"{place}: no such field{hint_at(name, known)}")
        node = parse(value, place)
        forget(given, name)
        given |= dict(of_node(node, name, place, known, line=False))
        for outer in outer_names(name):  # `ema: null` in the file gives way to --set ema.decay=0.9
            if outer in given and given[outer].value is None:
                del given[outer]
    return given


def find_file(path: str | Path) -> Path:
    """The file, or the one of that name in configs/train/.

    Raises:
        UsageError: neither is there.
    """
    own = FOLDER / "train"
    for file in (Path(path), own / f"{path}.yaml"):
        if file.is_file():
            return file
    names = sorted(file.stem for file in own.glob("*.yaml"))
    hint = nearest(Path(path).stem, names) or f"; give a YAML file, or one of {', '.join(names)}"
    raise UsageError(f"--config {path}: no such file{hint}")


def files_of(recipe: str | None) -> list[str]:
    """The names of a recipe's files in configs/train/, or of all."""
    line = re.compile(rf"^recipe: {recipe or '.*'}$", re.MULTILINE)
    return sorted(file.stem for file in (FOLDER / "train").glob("*.yaml") if line.search(file.read_text("utf-8")))


def read_text(file: Path) -> str:
    """
    Raises:
        UsageError: it cannot be read, is no text, or is far too long.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UsageError(f"--config {file}: {error.strerror}") from None
    if len(content) > LONGEST:
        raise UsageError(f"--config {file}: has {len(content)} bytes, a configuration has some thousands")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UsageError(f"--config {file}: is no UTF-8 text; give a YAML file") from None


def parse(text: str, where: str) -> yaml.Node | None:
    """The tree of nodes, with the lines they are in; nothing is constructed.

    Raises:
        UsageError: no YAML.
    """
    try:
        return yaml.compose(text, Loader=Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark and not where.startswith("--set") else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UsageError(f"{where}{line}: is no YAML ({problem})") from None
    except RecursionError:
        raise UsageError(f"{where}: is nested too deeply for a configuration") from None


def entries(node: yaml.Node | None, prefix: str, file: str, known: Mapping[str, tuple]) -> Iterator[tuple[str, Entry]]:
    """What the keys of a mapping give.

    Raises:
        UsageError: no mapping, an unknown key, or one that is there twice.
    """
    if node is None:
        return
    if not isinstance(node, yaml.MappingNode):
        raise UsageError(f"{place_of(node, file)}: {prefix.rstrip('.') or 'the file'} must be fields and values")
    seen = {}
    for key, value in node.value:
        name = f"{prefix}{key.value if isinstance(key, yaml.ScalarNode) else '?'}"
        place = place_of(key, file)
        if name not in known:
            raise UsageError(f"{place}: {name[:80]}: no such field{hint_at(name, known)}")
        if name in seen:
            raise UsageError(f"{place}: {name} is given twice, first in line {seen[name]}; keep one")
        seen[name] = key.start_mark.line + 1
        yield from of_node(value, name, file, known, place=place)


def of_node(
    node: yaml.Node | None, name: str, file: str, known: Mapping[str, tuple], place: str = "", line: bool = True
) -> Iterator[tuple[str, Entry]]:
    """What one key gives: its value, or those of the fields in it."""
    place = place or (place_of(node, file) if line and node is not None else file)
    is_block = dataclasses.is_dataclass(known[name][0])
    if is_block and isinstance(node, yaml.MappingNode):
        yield name, Entry(MISSING, place)  # it is there, be it empty
        for inner, entry in entries(node, f"{name}.", file, known):
            yield inner, entry if line else Entry(entry.value, file)
        return
    value = None if node is None else construct(node, place)
    if is_block and value is not None:
        raise UsageError(f"{place}: {name} is {short(value)}, fields and values are expected")
    yield name, Entry(value, place)


def construct(node: yaml.Node, place: str) -> object:
    """Plain values of a node.

    Raises:
        UsageError: a tag, a key that is no text, or a value that YAML cannot read.
    """
    loader = Loader("")
    try:
        value = loader.construct_object(node, deep=True)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"{place}: {getattr(error, 'problem', None) or error}") from None
    finally:
        loader.dispose()
    return value


def place_of(node: yaml.Node, file: str) -> str:
    return file if file.startswith("--set") else f"{file}, line {node.start_mark.line + 1}"


def outer_names(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def forget(given: Given, name: str) -> None:
    """Drop what a field, or a block with all in it, was given before."""
    for other in [other for other in given if other == name or other.startswith(f"{name}.")]:
        del given[other]


def hint_at(name: str, known: Mapping[str, tuple]) -> str:
    """The field that was meant: of the same name in another block, or the nearest; else what the block has."""
    block = name.rpartition(".")[0]
    inside = [other for other in known if other.rpartition(".")[0] == block]
    last = name.rpartition(".")[2]
    elsewhere = [other for other in known if other.rpartition(".")[2] == last]
    if elsewhere:
        return f"; did you mean {' or '.join(elsewhere[:3])}?"
    return (
        nearest(name, inside)
        or nearest(name, known)
        or f"; known: {', '.join(one.rpartition('.')[2] for one in inside) or 'none here'}"
    )


# ---------------------------------------------------------------------------------------------------- one value


def value_of(value: object, annotation: object, what: Setting, name: str, place: str) -> object:
    """A value held against its field.

    Raises:
        UsageError: another type, length, bound or choice, with the place, the name, the value, what is accepted.
    """
    start = f"{place}: {name}"
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is tuple and dataclasses.is_dataclass(arguments[0]):
        if not isinstance(value, list | tuple):
            raise UsageError(f"{start} is {short(value)}, expected a list of {fields_in(arguments[0])}")
        return tuple(item_of(item, arguments[0], f"{start}[{i}]") for i, item in enumerate(value))
    try:
        value = typed(value, annotation)
    except TypeError:
        raise UsageError(f"{start} is {short(value)}, expected {describe(annotation)}{yaml_hint(value)}") from None
    lengths = [len(typing.get_args(kind)) for kind in (annotation, *arguments) if is_fixed_tuple(kind)]
    if lengths and isinstance(value, tuple) and len(value) not in lengths:
        raise UsageError(f"{start} has {len(value)} values, {lengths[0]} are expected")
    inner = value if isinstance(value, tuple) else value.values() if isinstance(value, dict) else (value,)
    for one in inner if value is not None else ():
        if what.low is not None and not (isinstance(one, int | float) and what.low <= one <= what.high):  # nor NaN
            raise UsageError(f"{start} {short(one)}: accepted are {what.low:g} to {what.high:g}")
        if what.choices and one not in what.choices:
            raise UsageError(f"{start} {one[:60]}: accepted are {', '.join(what.choices)}{nearest(one, what.choices)}")
    return value


def is_fixed_tuple(kind: object) -> bool:
    return typing.get_origin(kind) is tuple and Ellipsis not in typing.get_args(kind)


def yaml_hint(value: object) -> str:
    """YAML 1.1 takes a bare yes, no, on or off for true or false."""
    return " (YAML reads yes, no, on and off as true and false: put quotes around)" if isinstance(value, bool) else ""


def fields_in(kind: type) -> str:
    return "{" + ", ".join(field.name for field in dataclasses.fields(kind)) + "}"


def item_of(item: object, kind: type, start: str) -> object:
    """One entry of a list of blocks.

    Raises:
        UsageError: it lacks a field, has an unknown one, or a wrong value.
    """
    if not isinstance(item, dict):
        raise UsageError(f"{start} is {short(item)}, expected {fields_in(kind)}")
    known = {field.name: field for field in dataclasses.fields(kind)}
    for key in item:
        if key not in known:
            hint = nearest(str(key), known) or f"; known: {', '.join(known)}"
            raise UsageError(f"{start}: {str(key)[:60]}: no such field{hint}")
    for key, field in known.items():
        if key not in item and field.default is MISSING:
            raise UsageError(f"{start}: {key} is missing ({field.metadata['setting'].help})")
    return kind(
        **{
            key: value_of(value, known[key].type, known[key].metadata["setting"], key, start)
            for key, value in item.items()
        }
    )
