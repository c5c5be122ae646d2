"""What made a file: the record that lies in it and beside it, and what of a record decides whether work still counts.

Everything starts from one list, `describe_run`: the settings, the content of the files they name, the model's shape and
the weights. From it come

* the record: NAME.json as the user gave it, so that --config repeats the run; and in the file itself without folders;
* `content`, in the record: equal for all runs that would make the same file. A finished output of the same content is
  kept when a stopped batch goes on;
* `progress_of`: what acts before denoising ends. Saved progress counts only under the same; where a file lies, how it
  is decoded and where weights are kept in memory do not matter to it.
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path

from errors import InputError
from pipelines.flags import FILE, MEDIA, NOTHING, ONE_RUN
from pipelines.settings import recorded
from pipelines.weights import WeightsFile
from pipelines.whose import settings_that

PROJECT = Path(__file__).parent.parent
SOURCES = ("models", "pipelines", "preprocess")  # whose code decides what comes out

# Keys of a config that say how it is called and fetched, or that are among the settings already.
NOT_THE_MODEL = ("name", "description", "defaults", "repo", "url", "size", "sha256", "dest", "files", "approx_gib")
NOT_THE_MODEL += ("needs", "base")


def describe_run(
    settings,
    prompt: str,
    seed: int,
    config: dict,
    weights: Sequence[WeightsFile],
) -> dict:
    """What every output's record has: the settings of this one output, as --config accepts them, and what they name.

    Args:
        settings: a dataclass of any method.
        config: the resolved one.
        weights: all that is read.

    Raises:
        WeightsError, InputError: a file that cannot be read.
    """
    prompts = settings.prompt if settings.prompts_are_clips else (prompt,)
    values = recorded(dataclasses.replace(settings, prompt=prompts, seed=(seed,)))
    of_one_run, places = settings_that(lambda said: said.decides == ONE_RUN), settings_that(lambda said: said.path)
    values = {name: value for name, value in values.items() if name not in of_one_run}
    record = {
        "made_by": "Selfsame",
        "settings": values,
        "places": [name for name, value in values.items() if name in places and value],  # those that are paths
        "versions": {"selfsame": source_version(), "python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "transformers")},
        "inputs": inputs_of(values),
        "model": digest_of([model_of(config), getattr(settings, "clip_rules", None)]),
        "weights": {str(part.path): hash_of_weights(part.path) for part in weights},
    }
    made_from = counted(values, left_open()), record["inputs"], record["model"], hashes_of(weights)
    return record | {"content": digest_of(made_from)}


def progress_of(record: dict, weights: Sequence[WeightsFile], encodes_pictures: bool) -> dict:
    """What of a record decides the latents, at every step up to the last.

    encodes_pictures: the VAE is among it, with its dtype and tiles: under "encoding", so that latents which are
        finished may still be decoded in another way, when memory did not suffice for the first.
    """
    kept = {name: value for name, value in record.items() if name not in ("made_by", "places", "content", "vae_dtype")}
    values = record["settings"]
    if isinstance(faces := record.get("faces"), dict):
        kept["faces"] = list(faces.values())
    vae_options = {name: record.get(name, values.get(name)) for name in ("vae_dtype", "tiled")}
    return kept | {
        "settings": counted(values, after_denoising()),
        "weights": hashes_of(part for part in weights if part.until_denoised and part.name != "VAE"),
        "encoding": [vae_options, hashes_of(p for p in weights if p.name == "VAE")] if encodes_pictures else None,
    }


def begun_as(record: dict, weights: Sequence[WeightsFile], of_later_clips: Iterable[str] = ()) -> str:
    """A digest of what is known of the latents before anything is read, but for what `--memory auto` leaves open: by it
    a run finds the saved progress that it could go on from.

    of_later_clips: settings that may change while finished clips still count.
    """
    without = {*after_denoising(), *left_open(), *of_later_clips}
    parts = hashes_of(part for part in weights if part.until_denoised and part.name != "VAE")
    names = ("versions", "inputs", "model", "device", "dtype", "attention_backend")
    return digest_of([counted(record["settings"], without), parts, *(record.get(name) for name in names)])


def digest_of(content: object) -> str:
    """One short value for everything that decides something."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


# ------------------------------------------------------------------------------------------------- what counts of what


def left_open() -> frozenset[str]:
    """The settings that --memory auto chooses where they are None, by the memory that is free at the moment."""
    return settings_that(lambda said: said.left_open)


def after_denoising() -> frozenset[str]:
    """The settings that act on finished latents only, or choose among finished files."""
    return settings_that(lambda said: said.decides == FILE)


def counted(values: dict, without: Iterable[str]) -> dict:
    """The settings that decide content by their value, as JSON gives them back: no paths, nor how it is computed."""
    uncounted = {*without, *settings_that(lambda said: said.path or said.decides == NOTHING)}
    return json.loads(json.dumps({name: v for name, v in values.items() if name not in uncounted}, default=str))


def inputs_of(values: dict) -> dict[str, list[str]]:
    """Setting -> SHA-256 of each media file it names. An address stands for itself: its pixels are in the record."""
    paths = {name: values.get(name) for name in settings_that(lambda said: said.path == MEDIA)}
    paths = {name: [path] if isinstance(path, str) else path for name, path in paths.items() if path}
    return {name: [path if "://" in path else hash_of_file(path) for path in ps] for name, ps in paths.items()}


def model_of(config: dict) -> dict:
    return {name: value for name, value in config.items() if name not in NOT_THE_MODEL}


def hashes_of(weights: Iterable[WeightsFile]) -> list[tuple[str, str]]:
    return [(part.name, hash_of_weights(part.path)) for part in weights]


def hash_of_file(path: str | os.PathLike) -> str:
    """SHA-256 of a media file.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return _hash_file(*_stamp(path))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}); give another file") from error


def hash_of_weights(path: str | os.PathLike) -> str:
    """`fingerprint` of weights, or of all that is in a tokenizer's folder, read once a run; with the config.json beside
    them, which says how they are used.

    Raises:
        WeightsError: they cannot be read.
    """
    from models.wan.checkpoint import SUFFIXES, weight_files  # torch: not where a command is only refused

    path = Path(path)
    folder = path if path.is_dir() else path.parent
    files = [file for file in sorted(folder.iterdir()) if file.is_file()] if path.is_dir() else []
    if not files or any(file.suffix in SUFFIXES for file in files):
        files = [*weight_files(path), *([folder / "config.json"] if (folder / "config.json").is_file() else [])]
    return _fingerprint(str(path), *map(_stamp, files))


@functools.lru_cache
def source_version() -> str:
    """The toolkit's version: a hash of the code that decides what comes out."""
    digest = hashlib.sha256()
    for file in sorted(file for folder in SOURCES for file in (PROJECT / folder).rglob("*.py")):
        digest.update(str(file.relative_to(PROJECT)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]


def _stamp(path: str | os.PathLike) -> tuple[str, int, int]:
    """A file, and what changes when it is written anew."""
    found = os.stat(path)
    return str(path), found.st_size, found.st_mtime_ns


@functools.lru_cache(maxsize=1024)
def _hash_file(path: str, *stamp: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@functools.lru_cache(maxsize=1024)
def _fingerprint(path: str, *stamps: tuple[str, int, int]) -> str:
    from models.wan.checkpoint import SUFFIXES, fingerprint

    small = [stamp for stamp in stamps if Path(stamp[0]).suffix not in SUFFIXES and Path(stamp[0]) != Path(path)]
    described = digest_of([_hash_file(*stamp) for stamp in small])[:16] if small else ""
    if len(small) == len(stamps):
        return f"files-sha256:{described}"
    return fingerprint(path) + (f"+{described}" if small else "")
