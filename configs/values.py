"""Values from files (YAML, JSON) held against annotations: what a dataclass or a table of keys says they are.

    typed(81, int)                                # 81
    typed([1.0, 0.5], tuple[float, ...])          # (1.0, 0.5); a lone number is a tuple of one
    typed("no", bool)                             # TypeError
    check_keys({"pading": "grey"}, {"padding": str}, "config x.yaml: svi")     # UsageError: … did you mean padding?
"""

import dataclasses
import difflib
import os
import types
import typing
from collections.abc import Iterable, Mapping

from errors import UsageError

LARGEST_FLOAT = 2.0**1023  # above it a whole number is no float any more


def typed(value: object, annotation: object) -> object:
    """The value if it is as annotated, lists as tuples where a tuple is annotated.

    Annotations are those of settings: str, int, float (whole numbers too), bool, None, `X | Y`, tuple[X, ...], list[X],
    dict[str, X]. Texts have to be possible as file names (no NUL). NaN is a float: bounds refuse it.

    Raises:
        TypeError: it is not.
    """
    if isinstance(annotation, types.UnionType):
        for kind in typing.get_args(annotation):
            try:
                return typed(value, kind)
            except TypeError:
                continue
        raise TypeError
    kind, arguments = typing.get_origin(annotation) or annotation, typing.get_args(annotation)
    if kind is tuple and not isinstance(value, list | tuple):
        value = (value,)
    is_right = {
        types.NoneType: lambda: value is None,
        bool: lambda: isinstance(value, bool),
        int: lambda: isinstance(value, int) and not isinstance(value, bool),
        float: lambda: isinstance(value, float) or (type(value) is int and abs(value) < LARGEST_FLOAT),
        str: lambda: isinstance(value, str) and is_possible_text(value),
        tuple: lambda: True,
        list: lambda: isinstance(value, list | tuple),
        dict: lambda: isinstance(value, dict) and all(isinstance(key, str) for key in value),
    }[kind]
    if not is_right():
        raise TypeError
    if kind in (tuple, list) and arguments:
        return kind(typed(entry, arguments[0]) for entry in value)
    if kind is dict and arguments:
        return {key: typed(entry, arguments[1]) for key, entry in value.items()}
    return value


def is_possible_text(text: str) -> bool:
    """Without NUL, and without halves of characters other than those in which Python keeps a file name's bytes."""
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return False
    return "\0" not in text


def describe(annotation: object) -> str:
    """An annotation in an error message: "int or list of str"."""
    if isinstance(annotation, types.UnionType):
        return " or ".join(describe(kind) for kind in typing.get_args(annotation))
    kind, arguments = typing.get_origin(annotation) or annotation, typing.get_args(annotation)
    if kind is types.NoneType:
        return "null"
    if kind in (tuple, list) and arguments:
        return f"list of {describe(arguments[0])}"
    if kind is dict and arguments:
        return f"keys with {describe(arguments[1])}"
    return {tuple: "list", dict: "keys and values"}.get(kind) or kind.__name__


def short(value: object) -> str:
    """A value in an error message: of texts and numbers the beginning, of others the kind. A file can hold anything."""
    if value is None:
        return "null"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 10**40:
        return "a number of more than 40 digits"
    if isinstance(value, str | int | float):
        text = repr(value)
        return text if len(text) <= 60 else f"{text[:60]}…"
    return f"a {type(value).__name__}" + (f" of {len(value)}" if hasattr(value, "__len__") else "")


def check_type(value: object, annotation: object, where: str) -> object:
    """`typed`, for values of which `where` says what they are of.

    Raises:
        UsageError: naming it, what it is, and what is accepted.
    """
    try:
        return typed(value, annotation)
    except TypeError:
        raise UsageError(f"{where} is {short(value)}, expected {describe(annotation)}") from None


def check_keys(values: object, accepted: Mapping[str, object], where: str) -> dict:
    """Values under known keys, each as annotated; none has to be there.

    Raises:
        UsageError: no keys and values at all, an unknown key, or a value of another type.
    """
    if not isinstance(values, dict):
        raise UsageError(f"{where}: expected keys and values, found {type(values).__name__}")
    if unknown := [key for key in values if not (isinstance(key, str) and key in accepted)]:
        names = ", ".join(key[:60] if isinstance(key, str) else short(key) for key in unknown[:5])
        hint = nearest(str(unknown[0])[:60], accepted) if isinstance(unknown[0], str) else ""
        raise UsageError(f"{where}: unknown key {names}{hint or '; known: ' + ', '.join(accepted)}")
    return {key: check_type(value, accepted[key], f"{where}: {key}") for key, value in values.items()}


def check_fields(values: object, kind: type, where: str) -> dict:
    """`check_keys` for the fields of a dataclass; those without a default have to be there.

    Raises:
        UsageError: also for one that is not.
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}
    values = check_keys(values, {name: field.type for name, field in fields.items()}, where)
    missing = [n for n, field in fields.items() if field.default is dataclasses.MISSING and n not in values]
    if missing:
        raise UsageError(f"{where}: {', '.join(missing)} missing")
    return values


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint at the name that was meant, for the end of a message; nothing where none is like it."""
    by_lower = {other.lower(): other for other in known}
    found = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.75)
    return f"; did you mean {by_lower[found[0]]}?" if found else ""
