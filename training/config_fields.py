"""Dataclasses of a configuration whose fields say what they accept and under which choices anything reads them.

    @dataclass(frozen=True, kw_only=True)
    class Train:
        steps: int = option("optimiser steps", 1000, low=1, high=10**9)
        lora: LoraShape | None = block(only={"train.trainable": ("lora",)})

Fields are named by their dotted path from the top. Where nothing reads a field it must not be given; where nothing
reads a block it is None.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import MISSING
from typing import Any, TypeVar

from configs.values import short
from errors import UsageError
from pipelines.flags import Setting
from training.config_file import Given, value_of

Only = Mapping[str, tuple[object, ...]]  # other field -> the values of it under which a field is read
Defaults = Sequence[tuple[Only, Mapping[str, object]]]  # under these values -> what fields that are not given become
Kind = TypeVar("Kind")


def option(help: str, default: Any = MISSING, *, only: Only | None = None, **what: Any) -> Any:
    """A field of the configuration; further arguments as of `Setting`. only: where it is read, everywhere if None."""
    return dataclasses.field(default=default, metadata={"setting": Setting(help, **what), "only": only or {}})


def block(*, only: Only | None = None, optional: bool = False) -> Any:
    """A field that holds further fields. Where it is not read it is None, and so is an optional one by default."""
    return dataclasses.field(default=None, metadata={"only": only or {}, "optional": optional})


def fields_of(kind: type, prefix: str = "") -> dict[str, tuple[Any, dataclasses.Field]]:
    """Dotted name -> (annotation, or the dataclass of a block; field), blocks before what is in them."""
    found = {}
    for field in described(kind):
        name = f"{prefix}{field.name}"
        if is_block(field):
            inner = block_kind(field)
            found |= {name: (inner, field)} | fields_of(inner, f"{name}.")
        else:
            found[name] = field.type, field
    return found


def described(kind: type) -> list[dataclasses.Field]:
    """The fields that are `option` or `block`; others are none of the user's."""
    return [field for field in dataclasses.fields(kind) if "only" in field.metadata]


def is_block(field: dataclasses.Field) -> bool:
    return "setting" not in field.metadata


def block_kind(field: dataclasses.Field) -> type:
    """The dataclass of a block, also where it may be None."""
    kinds = getattr(field.type, "__args__", (field.type,))
    return next(kind for kind in kinds if dataclasses.is_dataclass(kind))


# ---------------------------------------------------------------------------------------------------- building


def build(kind: type[Kind], given: Given, defaults: Defaults = ()) -> Kind:
    """A configuration from what is given. It keeps the places in its field `places`.

    Args:
        defaults: applied in their order; a later row sees what an earlier one set.

    Raises:
        UsageError: a field that is wrong, unread or missing.
    """
    known = fields_of(kind)
    places = {name: entry.place for name, entry in given.items()}
    values: dict[str, object] = {}
    for name, (annotation, field) in known.items():
        if is_block(field):
            continue
        if name in given:
            values[name] = value_of(given[name].value, annotation, field.metadata["setting"], name, places[name])
        elif field.default is not MISSING:
            values[name] = field.default
    for conditions, better in defaults:
        if all(values.get(other) in accepted for other, accepted in conditions.items()):
            values |= {name: value for name, value in better.items() if name not in given}
    for name, (_, field) in known.items():  # before anything unread is refused: a choice that is missing reads nothing
        if not is_block(field) and name not in values and "." not in name:
            raise missing(name, field, places)
    for name, entry in given.items():
        is_off = entry.value is None and is_block(known[name][1])  # null for a block that nothing reads is what it is
        if not is_off and (why := why_unread(known, name, values)):
            raise refusal(name, entry.value, why, places)
    return assemble(kind, "", known, values, given)


def assemble(kind: type, prefix: str, known: Mapping, values: Mapping[str, object], given: Given) -> Any:
    """A dataclass and the blocks in it from the values of dotted names.

    Raises:
        UsageError: a field without a default is not given, or null for a block that has to be there.
    """
    places = {name: entry.place for name, entry in given.items()}
    arguments = {} if prefix else {"places": places}
    for field in described(kind):
        name = f"{prefix}{field.name}"
        if not is_block(field):
            if name not in values:
                raise missing(name, field, places)
            arguments[field.name] = values[name]
            continue
        is_optional = field.metadata["optional"]
        is_given = any(other == name or other.startswith(f"{name}.") for other in given)
        is_off = name in given and given[name].value is None
        is_unread = bool(why_unread(known, name, values))
        if is_off and not is_optional and not is_unread:
            raise refusal(name, None, "fields of its own are expected; leave it out for their defaults", places)
        if is_unread or is_off or (is_optional and not is_given):
            arguments[field.name] = None
        else:
            arguments[field.name] = assemble(block_kind(field), f"{name}.", known, values, given)
    return kind(**arguments)


def why_unread(known: Mapping, name: str, values: Mapping[str, object]) -> str:
    """Why nothing reads a field under these values, for the end of a message; empty where something does."""
    parts = name.split(".")
    for count in range(1, len(parts) + 1):  # the blocks that it lies in, then itself
        only = known[".".join(parts[:count])][1].metadata["only"]
        for other, accepted in only.items():
            if (value := values.get(other)) not in accepted:
                where = " or ".join(map(str, accepted))
                return f"nothing reads it where {other} is {value}, only where it is {where}; leave it out"
    return ""


def missing(name: str, field: dataclasses.Field, places: Mapping[str, str]) -> UsageError:
    """The line that asks for a field."""
    file = next((place.rpartition(", line ")[0] for place in places.values() if ", line " in place), "")
    what = field.metadata["setting"]
    accepted = f"; accepted are {', '.join(what.choices)}" if what.choices else ""
    return UsageError(f"{file + ': ' if file else ''}{name} is missing ({what.help}){accepted}")


def refusal(name: str, value: object, why: str, places: Mapping[str, str]) -> UsageError:
    """The line that refuses a field: its place, its name, its value, and why."""
    place = places.get(name, "")
    value = "" if value is MISSING else f" {shown(value)}"
    return UsageError(f"{place + ': ' if place else ''}{name}{value}: {why}")


def shown(value: object) -> str:
    if isinstance(value, tuple | list) and len(value) < 10 and not any(map(dataclasses.is_dataclass, value)):
        return f"[{', '.join(map(str, value))}]"
    return value[:60] if isinstance(value, str) else short(value)


def value_at(config: object, name: str) -> Any:
    """A field by its dotted name; None if a block on the way is."""
    for part in name.split("."):
        config = None if config is None else getattr(config, part)
    return config


# ---------------------------------------------------------------------------------------------------- writing


def resolved(config: object) -> dict:
    """Every field that something reads, as plain keys and values: given back, they build an equal configuration."""
    known = fields_of(type(config))
    values = {name: value_at(config, name) for name in known}

    def tree(prefix: str, kind: type) -> dict:
        keys = {}
        for field in described(kind):
            name = f"{prefix}{field.name}"
            if not why_unread(known, name, values):
                has_fields = is_block(field) and values[name] is not None
                keys[field.name] = tree(f"{name}.", block_kind(field)) if has_fields else plain(values[name])
        return keys

    return tree("", type(config))


def plain(value: object) -> object:
    """A value as YAML and JSON know it."""
    if dataclasses.is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return [plain(one) for one in value] if isinstance(value, tuple | list) else value
