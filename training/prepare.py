"""Raw videos -> a folder to train on: their rate and size, sound, masks, faces, and who looks like whom.

    python -m training.prepare raw --out data/people                    # for base, stand_in and error_recycling
    python -m training.prepare raw --out talking --layout stableavatar  # for avatar

A raw video brings its caption: NAME.txt beside NAME.mp4, or a line of metadata.jsonl. The same command goes on after a
stop: what is finished and unchanged stays, what has changed (the video, its caption, a flag) is made anew, and what
cannot be used is said, one line each; then the exit code is 3, and all others are prepared.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from errors import InputError, ResourceError, UsageError, exit_codes
from pipelines.flags import Parser, add_flags, check_bounds, given_by
from preprocess.face_detection import recognizer_is_there
from preprocess.output import safe_name, sync, whole_file
from preprocess.record import read_record
from training.data import quiet
from training.identity import People, people_from_json, people_to_json, write_identity
from training.layouts import Listed, list_folder
from training.prepare_clips import AVATAR_SIZES, Models, PrepareSettings, make_clips

try:
    import fcntl
except ImportError:  # Windows: two runs on one folder are not kept apart there
    fcntl = None

logger = logging.getLogger("selfsame")

WORK = ".prepared"  # what was made of which video, and what is being made


def resolve(args: argparse.Namespace) -> PrepareSettings:
    """The settings of the flags, with what follows from the layout.

    Raises:
        UsageError: a value that is not accepted, or that means nothing here.
    """
    names = {field.name for field in dataclasses.fields(PrepareSettings)}
    given = {name: value for name, value in given_by(args).items() if name in names}
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    avatar = given.get("layout") == "stableavatar"
    if not avatar and "kind" in given:
        raise UsageError("--kind: only --layout stableavatar reads it; leave it out")
    if avatar and "caption" in given:
        raise UsageError("--caption: StableAvatar's captions follow from --kind; leave it out")
    usual = {"resolutions": ("480x832", "832x480"), "masks": ()}
    if avatar:
        usual = {"resolutions": ("512x512",), "masks": ("face", "lip"), "faces": 0, "fps": 25}
    settings = PrepareSettings(**{**usual, **given})
    check_bounds(settings)
    if "none" in settings.masks:
        if len(settings.masks) > 1:
            raise UsageError(f"--masks {' '.join(settings.masks)}: none goes by itself")
        settings = dataclasses.replace(settings, masks=())
    try:
        sizes = settings.sizes
    except ValueError as error:
        raise UsageError(f"--resolutions {' '.join(settings.resolutions)}: {error}") from None
    if avatar and (strange := [size for size in sizes if size not in AVATAR_SIZES]):
        raise UsageError(
            f"--resolutions {strange[0][0]}x{strange[0][1]}: StableAvatar's are 480x832, 832x480 and 512x512"
        )
    if avatar and settings.faces:
        raise UsageError(f"--faces {settings.faces}: StableAvatar's data have none; leave it out")
    return settings


# ---------------------------------------------------------------------------------------------------- one raw video


@dataclass(frozen=True)
class Made:
    """What became of a raw video: what there is of it, the people in its clips, and why it cannot be used."""

    raw: str
    stamp: str  # of the raw video and all that decided
    parts: tuple[str, ...] = ()  # files and folders in the output
    people: dict[str, dict | None] = dataclasses.field(default_factory=dict)  # clip -> `people_to_json`
    troubles: tuple[str, ...] = ()


def prepare(raw: Listed, name: str, out: Path, settings: PrepareSettings, models: Models, stamp: str) -> Made:
    """Make all clips of a raw video beside, then put them in their places.

    Raises:
        ResourceError: no room.
    """
    if raw.trouble and settings.layout == "folder" and not settings.caption:
        return Made(raw.name, stamp, troubles=(raw.trouble,))
    work = out / WORK / "work"
    shutil.rmtree(work, ignore_errors=True)
    try:
        with quiet():
            made = make_clips(raw, name, work, settings, models)
    except InputError as error:
        return Made(raw.name, stamp, troubles=(f"damaged: {error}".replace(f"{raw.video} ", ""),))
    if not made:
        wanted = f"{settings.frames} frames at {settings.fps:g} a second are wanted"
        return Made(raw.name, stamp, troubles=(f"too short: {wanted}",))
    if settings.layout == "stableavatar" and not made[0][0].sound.is_file():
        return Made(raw.name, stamp, troubles=("no sound",))
    people = {clip.name: person for clip, person in made} if settings.faces else {}
    without = [clip for clip, person in people.items() if person is None]
    parts = [part for clip, _ in made for part in clip.parts()]
    for part in parts:
        place = out / part.relative_to(work)
        place.parent.mkdir(parents=True, exist_ok=True)
        remove(place)
        os.replace(part, place)
        sync(place.parent)
    shutil.rmtree(work, ignore_errors=True)
    return Made(
        raw.name,
        stamp,
        tuple(part.relative_to(work).as_posix() for part in parts),
        {clip: people_to_json(person) for clip, person in people.items()},
        (f"no face: in {', '.join(without[:3])}{' …' if len(without) > 3 else ''}",) if without else (),
    )


def remove(place: Path) -> None:
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------- all of them


def names_of(videos: Sequence[Listed]) -> list[str]:
    """What the clips of each raw video are called: its path without the ending; where that is not only its own, with a
    hash of the whole.
    """
    names = []
    for video in videos:
        parts = str(Path(video.name).with_suffix("")).split("/")
        names.append("/".join(safe_name(part) for part in parts))
    flat = Counter(name.replace("/", "-").lower() for name in names)
    return [
        name if flat[name.replace("/", "-").lower()] == 1 else f"{name}-{key_of(video)[:8]}"
        for video, name in zip(videos, names, strict=True)
    ]


def key_of(raw: Listed) -> str:
    return hashlib.sha256(raw.name.encode()).hexdigest()[:24]


def stamp_of(raw: Listed, name: str, settings: PrepareSettings, recognises: bool) -> str:
    """Changes with the raw video, its caption, its name and every setting."""
    about = os.stat(raw.video)
    decides = [about.st_size, about.st_mtime_ns, raw.caption, raw.trouble, name, recognises]
    return hashlib.sha256(json.dumps([*decides, dataclasses.asdict(settings)]).encode()).hexdigest()


def read_made(path: Path) -> Made | None:
    """What an earlier run made of a video."""
    entry = read_record(path)
    try:
        return None if entry is None else Made(
            entry["raw"], entry["stamp"], tuple(entry["parts"]), dict(entry["people"]), tuple(entry["troubles"])
        )  # fmt: skip
    except (LookupError, TypeError, ValueError):
        return None


def write_made(path: Path, made: Made) -> None:
    with whole_file(path) as part:
        part.write_text(json.dumps(dataclasses.asdict(made)), encoding="utf-8")


def run(raw_folder: Path, out: Path, settings: PrepareSettings) -> None:
    """Prepare every video below a folder.

    Raises:
        InputError: none there; or, at the end, some that cannot be used.
        UsageError: another run is at work in the output.
        WeightsError: lips are wanted, and antelopev2 is not there.
    """
    videos = [video for video in list_folder(raw_folder) if out.resolve() not in video.video.resolve().parents]
    if not videos:
        raise InputError(f"RAW {raw_folder}: no videos there; give a folder of mp4, mov, mkv, avi or webm files")
    with alone(out):
        prepare_all(videos, out, settings)


@contextlib.contextmanager
def alone(out: Path) -> Iterator[None]:
    """Keep other runs off the folder.

    Raises:
        UsageError: one is at work there.
    """
    (out / WORK).mkdir(parents=True, exist_ok=True)
    with open(out / WORK / "lock", "w") as lock:
        if fcntl is not None:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # given up when the file is closed
            except BlockingIOError:
                raise UsageError(f"--out {out}: another run is preparing it; wait for it or give another one") from None
        yield


def prepare_all(videos: Sequence[Listed], out: Path, settings: PrepareSettings) -> None:
    """Prepare what is not there or has changed, and say what cannot be used.

    Raises:
        InputError: some cannot, at the end.
    """
    from tqdm import tqdm

    models, people, troubles, skipped = None, {}, [], 0
    recognises = bool(settings.faces) and recognizer_is_there(settings.antelopv2_path)
    for raw, name in zip(tqdm(videos, "preparing", unit="video", disable=None), names_of(videos), strict=True):
        if not raw.video.is_file():
            troubles.append(f"{raw.video}: {raw.trouble}")
            continue
        record = out / WORK / f"{key_of(raw)}.json"
        made, stamp = read_made(record), stamp_of(raw, name, settings, recognises)
        if made is not None and made.stamp == stamp and all((out / part).exists() for part in made.parts):
            skipped += 1
        else:
            models = models or Models(settings)
            for part in made.parts if made else ():
                remove(out / part)
            made = prepare(raw, name, out, settings, models, stamp)
            write_made(record, made)
        troubles += [f"{raw.video}: {trouble}" for trouble in made.troubles]
        people |= {clip: people_from_json(person) for clip, person in made.people.items() if person is not None}
    finish(out, settings, people)
    warn_of_orphans(out, videos)
    for trouble in troubles:
        print(trouble)
    logger.info("%d videos: %d were prepared before, %d have troubles", len(videos), skipped, len(troubles))
    if troubles:
        raise InputError(f"{len(troubles)} of {len(videos)} videos cannot be used as they are, see above")


def finish(out: Path, settings: PrepareSettings, people: dict[str, People]) -> None:
    """What is of all videos: who looks like whom, or StableAvatar's lists."""
    if settings.layout == "folder":
        if settings.faces:
            logger.info("%d pairs of clips with people alike", write_identity(out, people))
        return
    for folder in AVATAR_SIZES.values():
        table = out / f"video_{folder}_path.txt"
        clips = sorted(path.parent.relative_to(out).as_posix() for path in out.glob(f"{folder}/*/*/sub_clip.mp4"))
        if clips:
            with whole_file(table) as part:
                part.write_text("".join(f"{clip}\n" for clip in clips), encoding="utf-8")
        else:
            table.unlink(missing_ok=True)


def warn_of_orphans(out: Path, videos: Sequence[Listed]) -> None:
    """Say what was made of raw videos that are not there any more: it would be trained on."""
    known = {f"{key_of(video)}.json" for video in videos}
    gone = [record for record in (out / WORK).glob("*.json") if record.name not in known]
    if parts := [part for record in gone if (made := read_made(record)) is not None for part in made.parts]:
        logger.warning(
            "%d files are of raw videos that are gone, %s first: remove them if they are", len(parts), parts[0]
        )


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.prog = "-m training.prepare"
    parser.add_argument("raw", metavar="RAW", help="folder of raw videos")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to make")
    add_flags(parser, PrepareSettings)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """
    Raises:
        UserError: what a user can mend.
    """
    settings, raw, out = resolve(args), Path(args.raw), Path(args.out)
    if not raw.is_dir():
        raise InputError(f"RAW {raw}: no such folder; give the folder of raw videos")
    if raw.resolve() == out.resolve():
        raise UsageError(f"--out {out}: is the folder of the raw videos; give another one")
    try:
        run(raw, out, settings)
    except OSError as error:
        raise ResourceError(f"--out {out}: {error.strerror or error}") from None


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s", stream=sys.stderr)
    with exit_codes("the same command goes on from what is finished"):
        main(parse_arguments())
