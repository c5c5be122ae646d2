"""The settings of an earlier run, for --config: from its record beside the video or picture, or within."""

import contextlib
import dataclasses
import json
import os
from pathlib import Path

from configs.values import is_possible_text, nearest, short
from errors import InputError, UsageError
from pipelines.flags import ONE_RUN, check_types, names_of
from pipelines.whose import script_with
from preprocess.record import LARGEST_RECORD, read_metadata, read_picture_metadata, sidecar_path

RECORDS = (".json", ".mp4", ".png")  # where a record is: beside what a run made, and in it


def is_record(config: str | None) -> bool:
    """Whether a --config is an earlier run's record: the JSON that it wrote, or the video or picture that holds it."""
    return config is not None and Path(config).suffix.lower() in RECORDS


def read_run_json(path: str, kind: type) -> dict:
    """The settings in an earlier run's record, as `kind` has them.

    Raises:
        UsageError: there is no such file.
        InputError: it is no record, one of another script, or one with values that this script never writes.
    """
    settings = read_run_settings(path)
    known = {field.name for field in dataclasses.fields(kind)}
    if unknown := sorted(set(settings) - known):
        if script := script_with(unknown):
            raise InputError(f"--config {path}: made by {script}; run: python {script} --config {path}")
        hint = nearest(unknown[0][:60], known)
        names = ", ".join(name[:60] for name in unknown[:5]) + (f" and {len(unknown) - 5} more" * (len(unknown) > 5))
        raise InputError(f"--config {path}: unknown settings {names}{hint}")
    of_one_run = names_of(kind, decides=ONE_RUN)
    settings = {key: value for key, value in settings.items() if key not in of_one_run}
    return check_types(settings, kind, f"--config {path}: ", InputError)


def read_run_settings(path: str) -> dict:
    """All settings in the record of an earlier run, their types not checked, but for that of `config`.

    Raises:
        UsageError, InputError: there is no such file, or it is no record.
    """
    if not os.path.isfile(path):
        raise UsageError(f"--config {path}: no such file")
    suffix = Path(path).suffix.lower()
    try:
        if suffix in (".mp4", ".png"):
            record = read_metadata(path) if suffix == ".mp4" else read_picture_metadata(Path(path))
            sidecar = str(sidecar_path(Path(path)))  # names the folders of files, which the record inside leaves out
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
                if (full := json.loads(Path(sidecar).read_text(encoding="utf-8")))["content"] == record["content"]:
                    record = full
        elif os.path.getsize(path) > LARGEST_RECORD:
            raise ValueError(f"larger than {LARGEST_RECORD >> 20} MiB")
        else:
            record = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        settings = record.get("settings") if isinstance(record, dict) else None
        if not isinstance(settings, dict):
            raise ValueError("it holds no settings")
        if not (isinstance(config := settings.get("config"), str) and is_possible_text(config) and config):
            raise ValueError(f"its config is {short(config)}, expected a name")
        if is_record(config):
            raise ValueError(f"its config is {short(config)}, a record again")
    except RecursionError:
        raise InputError(f"--config {path}: not the record of an earlier run (nested too deeply)") from None
    except (OSError, ValueError) as error:
        raise InputError(f"--config {path}: not the record of an earlier run ({error})") from error
    return settings
