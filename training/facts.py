"""What a training video is, measured by decoding all of it: length, size, rate, sound, masks, and hashes of its files.

facts = measure(listed)
facts.num_frames, facts.fps, facts.trouble             # 121, 25.0, ""
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy

from errors import InputError
from preprocess.audio import SAMPLE_RATE, SILENCE, read_audio
from preprocess.masks import find_frames
from preprocess.video import probe
from training.layouts import PICTURES, Listed


@dataclass(frozen=True)
class Facts:
    """What was measured. Where there is trouble, the rest is 0."""

    content: str = ""  # SHA-256 of the video itself: moved, copied, or with masks made later, it stays what it is
    beside: str = ""  # of all other files that belong to it
    num_frames: int = 0
    width: int = 0
    height: int = 0
    fps: float = 0.0  # 0: unknown
    channels: int = 0  # of the sound: 0 without any, 1 also where both are the same
    seconds: float = 0.0  # of the sound
    is_silent: bool = False
    missing_masks: tuple[tuple[str, tuple[str, int]], ...] = ()  # kind -> the first that is missing, and how many are
    trouble: str = ""

    @classmethod
    def from_json(cls, fields: dict) -> "Facts":
        """
        Raises:
            TypeError: not such fields.
        """
        missing = tuple((kind, (str(first), int(count))) for kind, (first, count) in fields.pop("missing_masks"))
        return cls(**fields, missing_masks=missing)


def measure(listed: Listed) -> Facts:
    """Decode a video and its sound, look for its masks, hash its files."""
    try:
        return measure_or_raise(listed)
    except InputError as error:
        return Facts(trouble=f"damaged: {error}".replace(f"{listed.video} ", ""))
    except OSError as error:
        return Facts(trouble=f"damaged: cannot be read ({error.strerror or error})")


def measure_or_raise(listed: Listed) -> Facts:
    """
    Raises:
        InputError, OSError: what is damaged.
    """
    for place in listed.places():
        if place.is_file() and place.stat().st_size == 0:
            raise InputError(f"{place.name} has 0 bytes")
    channels, seconds, is_silent = measure_sound(listed)
    if listed.video.is_dir():
        num_frames, width, height = measure_pictures(listed.video)
        fps = probe(listed.timing).fps if listed.timing else num_frames / seconds if seconds else 0.0
    else:
        info = probe(listed.video)
        num_frames, width, height, fps = info.num_frames, info.width, info.height, info.fps
    for other in (listed.pose, listed.control, listed.made):
        if other is not None and (count := probe(other).num_frames) != num_frames:
            raise InputError(f"{other.name} has {count} frames, the video {num_frames}")
    missing = tuple(missing_masks(listed, num_frames))
    video, beside = hashes_of(listed)
    return Facts(video, beside, num_frames, width, height, fps, channels, seconds, is_silent, missing)


def measure_sound(listed: Listed) -> tuple[int, float, bool]:
    """(channels, seconds, whether silent) of the sound; (0, 0, False) without one.

    Raises:
        InputError: a sound file that cannot be decoded.
    """
    file = listed.audio or (listed.timing if listed.video.is_dir() else listed.video)
    if file is None:
        return 0, 0.0, False
    try:
        samples = read_audio(file, argument="sound", channels=2)  # (N, 2)
    except InputError as error:
        if "has no sound track" in str(error):
            return 0, 0.0, False
        if listed.audio is None:  # what is wrong with the video itself its frames will tell
            probe(file)
        raise
    channels = 1 if numpy.array_equal(samples[:, 0], samples[:, 1]) else 2
    is_silent = bool(numpy.abs(samples.mean(axis=1)).max() < SILENCE)  # what is trained on is the mean
    return channels, len(samples) / SAMPLE_RATE, is_silent


def measure_pictures(folder: Path) -> tuple[int, int, int]:
    """(frames, width, height) of numbered pictures, each of them decoded.

    Raises:
        InputError: none, one that is damaged, or of another size than the first.
    """
    import PIL.Image

    frames = find_frames(folder.parent)
    if not frames:
        raise InputError(f"{folder.name}/ has no pictures; frames are called frame_0.png, frame_1.png, …")
    size = None
    for frame in frames:
        try:
            with PIL.Image.open(frame, formats=("PNG", "JPEG")) as picture:
                picture.load()
                size = size or picture.size
                if picture.size != size:
                    other = f"{picture.width}x{picture.height}"
                    raise InputError(f"{folder.name}/{frame.name} is {other}, the first frame {size[0]}x{size[1]}")
        except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
            raise InputError(f"{folder.name}/{frame.name} cannot be decoded ({str(error)[:80]})") from None
    return len(frames), *size


def mask_names(listed: Listed, num_frames: int) -> list[str]:
    """What the mask of each frame is called, without its ending: as the frame is, or frame_0, frame_1, …"""
    if listed.video.is_dir():
        return [frame.stem for frame in find_frames(listed.video.parent)]
    return [f"frame_{number}" for number in range(num_frames)]


def find_mask(folder: Path, name: str) -> Path | None:
    """The mask of a frame, if it is there."""
    return next((p for p in (folder / f"{name}{end}" for end in PICTURES) if p.is_file() and p.stat().st_size), None)


def missing_masks(listed: Listed, num_frames: int) -> Iterator[tuple[str, tuple[str, int]]]:
    """Of each kind with gaps: the first frame without a mask, and how many have none."""
    names = mask_names(listed, num_frames) if listed.masks else []
    for kind, folder in listed.masks:
        if missing := [name for name in names if find_mask(folder, name) is None]:
            yield kind, (f"{folder.name}/{missing[0]}.png", len(missing))


# ---------------------------------------------------------------------------------------------------- identity


def files_of(listed: Listed) -> Iterator[tuple[str, Path]]:
    """(what it is, file) of every file that a video is made of, in an order of its own."""
    folders = [("video", listed.video), ("audio", listed.audio), ("timing", listed.timing), ("faces", listed.faces)]
    controls = [("pose", listed.pose), ("control", listed.control), ("made", listed.made)]
    for role, place in (*folders, *controls, ("references", listed.references), *listed.masks):
        if place is None:
            continue
        if place.is_file():
            yield role, place
        elif place.is_dir():
            yield from ((f"{role}/{file.name}", file) for file in sorted(place.iterdir()) if file.is_file())


def hashes_of(listed: Listed) -> tuple[str, str]:
    """SHA-256 of the video's bytes (for pictures, with their names), and of all else."""
    video, beside = hashlib.sha256(), hashlib.sha256()
    for role, file in files_of(listed):
        with open(file, "rb") as opened:
            line = f"{role}:{hashlib.file_digest(opened, 'sha256').hexdigest()}\n"
        (video if role.partition("/")[0] == "video" else beside).update(line.encode())
    return video.hexdigest(), beside.hexdigest()


def stamp_of(listed: Listed) -> str:
    """Changes when a file is written anew, appears or goes; without reading them."""
    entries = []
    for role, file in files_of(listed):
        about = os.stat(file)
        entries.append([role, about.st_size, about.st_mtime_ns])
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()
