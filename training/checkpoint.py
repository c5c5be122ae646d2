"""Checkpoints that are whole or not there: written beside, synced, the manifest last, then renamed.

    runs/x/step-000500/weights.safetensors      float32 masters of what is trained
                       optimizer.pt             its state
                       ema.safetensors, bank/   where the run has them; with memory.sharding, weights-0, weights-1, …
                       manifest.json            step, sizes and checksums of the files, what the run was made of

A folder without a manifest does not count. A run goes on only with what it was made of: configuration, data, base.
"""

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from errors import ResourceError, UsageError, WeightsError
from preprocess.output import refuse_planted, sync, write_new

logger = logging.getLogger("selfsame")

NAME = re.compile(r"step-(\d+)")
MANIFEST = "manifest.json"
# What may differ between a run and the one it goes on from: how long, how often, and how the work is done.
MAY_CHANGE = (
    *("output", "train.steps", "train.micro_batch", "save.*", "validate.*", "log.*"),
    *("memory.checkpointing", "memory.offload", "memory.compile", "memory.sharding"),
    *("data.workers", "data.prefetch", "data.bad", "data.cache"),
)
# Files that are not read back to be summed: the bank's entries, which its own manifest has the checksums of.
UNSUMMED = "bank*/*.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that is whole."""

    folder: Path
    manifest: dict

    @property
    def step(self) -> int:
        """Optimiser steps that were done."""
        return self.manifest["step"]


def save_checkpoint(
    output: Path,
    step: int,
    write: Callable[[Path], None],
    about: Mapping[str, object],
    *,
    keep: int,
    keep_every: int | None = None,
    is_first: bool = True,
    wait: Callable[[], None] = lambda: None,
) -> Path:
    """Save the state after a step, and remove old ones once it is there. Every process calls it.

    Args:
        output: of the run.
        step: optimiser steps that are done.
        write: fills a folder with this process's files.
        about: what a later run must agree with (`check_same`), and what it may know.
        keep: how many of the last checkpoints stay; those of each `keep_every` steps stay besides.
        is_first: whether this is the process that makes and names the folder.
        wait: for all processes.

    Raises:
        ResourceError: no room, or no right to write there. The checkpoints before are as they were.
    """
    folder = output / f"step-{step:06d}"
    part = folder.with_name(f"{folder.name}.part")
    try:
        if is_first:
            refuse_planted(part)
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
        wait()
        write(part)
        wait()
        if is_first:
            seal(part, step, about)
            shutil.rmtree(folder, ignore_errors=True)  # of a run that was resumed from before it
            part.rename(folder)
            sync(output)
            retire(output, keep, keep_every)
    except OSError as error:
        if is_first:
            shutil.rmtree(part, ignore_errors=True)
        reason = error.strerror or error
        raise ResourceError(f"cannot save {folder}: {reason}; make room, the checkpoints before are kept") from error
    wait()
    return folder


def seal(folder: Path, step: int, about: Mapping[str, object]) -> None:
    """Have all files on disk, and then a manifest that says they are all."""
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        sync(path)
        files[name] = {"size": path.stat().st_size}
        if not fnmatchcase(name, UNSUMMED):
            files[name]["checksum"] = checksum(path)
    for inner in (path for path in folder.rglob("*") if path.is_dir()):
        sync(inner)
    write_new(folder / MANIFEST, json.dumps({"step": step, "files": files, **about}, indent=1).encode())
    sync(folder / MANIFEST)
    sync(folder)


def checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def retire(output: Path, keep: int, keep_every: int | None) -> None:
    """Remove all but the last checkpoints, and those that are kept for good."""
    steps = {int(NAME.fullmatch(path.name)[1]): path for path in output.iterdir() if NAME.fullmatch(path.name)}
    for step in sorted(steps)[:-keep]:
        if not keep_every or step % keep_every:
            shutil.rmtree(steps[step], ignore_errors=True)


# ------------------------------------------------------------------------------------------------------- resuming


def latest_checkpoint(output: Path) -> Checkpoint | None:
    """The last whole checkpoint of a run; None if it has none at all.

    Raises:
        WeightsError: there are some, and all of them are damaged.
    """
    damaged = []
    found = [path for path in output.glob("step-*") if NAME.fullmatch(path.name) and (path / MANIFEST).is_file()]
    for folder in sorted(found, key=lambda path: int(NAME.fullmatch(path.name)[1]), reverse=True):
        trouble = trouble_in(folder)
        if trouble is None:
            return Checkpoint(folder, json.loads((folder / MANIFEST).read_text(encoding="utf-8")))
        logger.warning("%s: %s; going back to the one before", folder, trouble)
        damaged.append(f"{folder.name}: {trouble}")
    if damaged:
        raise WeightsError(
            f"{output}: no checkpoint is whole ({'; '.join(damaged)}); give another output: to begin anew"
        )
    return None


def trouble_in(folder: Path) -> str | None:
    """What is wrong with a checkpoint."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        assert isinstance(manifest["step"], int)
        files = {name: (entry["size"], entry.get("checksum")) for name, entry in manifest["files"].items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, AssertionError):
        return f"{MANIFEST} cannot be read"
    for name, (size, expected) in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            return f"{name} is missing or cut short"
        if expected is not None and checksum(path) != expected:
            return f"{name} is damaged"
    return None


def check_same(checkpoint: Checkpoint, about: Mapping[str, object]) -> None:
    """Refuse to go on as another run.

    Args:
        about: "config" (nested) and single values such as "data" and "base", hashes of what they name.

    Raises:
        UsageError: the first things that differ.
    """
    before, now = (flatten({k: source.get(k) for k in about}) for source in (checkpoint.manifest, about))
    changed = [
        name
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
        and not any(fnmatchcase(name.removeprefix("config."), pattern) for pattern in MAY_CHANGE)
    ]
    if changed:
        shown = "; ".join(
            f"{name.removeprefix('config.')} was {before.get(name)!r} and is {now.get(name)!r}" for name in changed[:3]
        )
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise UsageError(
            f"{checkpoint.folder} is of another run: {shown}{more}; set it back, or give another output: to begin anew"
        )


def flatten(tree: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """{"a": {"b": 1}} -> {"a.b": 1}. Tuples count as lists, as JSON has no others."""
    flat: dict[str, object] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = list(value) if isinstance(value, tuple) else value
    return flat
