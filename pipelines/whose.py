"""What the settings of all scripts say: which script has a flag, or writes a setting; and what a setting in a record,
of whichever script, means. A setting's name means the same in every script.
"""

import dataclasses
import functools
import importlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from pipelines.flags import Setting, described, flags_of

FOLDER = Path(__file__).parent


def script_with(names: Iterable[str]) -> str | None:
    """The script that writes records with all these settings; the plainest, where there are several."""
    wanted = set(names)
    return plainest(kind for kind in settings_classes() if wanted <= {field.name for field in dataclasses.fields(kind)})


def script_with_flag(flag: str) -> str | None:
    """The script that has this flag; the plainest, where there are several."""
    return plainest(
        kind
        for kind in settings_classes()
        if any(flag in flags_of(name, what) for name, (_, what) in described(kind).items())
    )


def settings_classes() -> Iterator[type]:
    """Every class of settings that says of which script it is."""
    for file in sorted(FOLDER.rglob("*settings.py")):
        module = importlib.import_module(".".join(file.relative_to(FOLDER.parent).with_suffix("").parts))
        for kind in vars(module).values():
            if isinstance(kind, type) and kind.__module__ == module.__name__ and "script" in vars(kind):
                yield kind


def plainest(kinds: Iterable[type]) -> str | None:
    """The script of the class with the fewest fields, not counting those that its records leave out by default."""
    found = min(kinds, key=lambda kind: len(dataclasses.fields(getattr(kind, "plain", kind))), default=None)
    return found and found.script


def settings_that(says: Callable[[Setting], object]) -> frozenset[str]:
    """The settings, of all scripts, whose fields say it of themselves."""
    return frozenset(name for name, what in said_of_all().items() if says(what))


@functools.cache
def said_of_all() -> dict[str, Setting]:
    """Setting -> what its field says, of all scripts."""
    return {name: what for kind in settings_classes() for name, (_, what) in described(kind).items()}
