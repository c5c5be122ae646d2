"""The clips of one raw video: frames at a rate and size, sound, masks, and the person's face, as a layout has them."""

import itertools
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy
import PIL.Image

from pipelines.flags import setting
from preprocess.audio import SAMPLE_RATE, cut_samples, read_audio, write_wav
from preprocess.face import load_parser
from preprocess.face_detection import load_detector, load_recognizer, recognizer_is_there
from preprocess.image import write_png
from preprocess.masks import MASKS
from preprocess.video import probe, stream_frames
from preprocess.video_writer import VideoWriter
from training.config import parse_size
from training.identity import People, frames_to_look_at, write_faces
from training.layouts import PROMPTS, Listed

logger = logging.getLogger("selfsame")

AVATAR_SIZES = {(480, 832): "rec", (832, 480): "vec", (512, 512): "square"}  # (height, width) -> StableAvatar's folder


@dataclass(frozen=True, kw_only=True)
class PrepareSettings:
    """What decides what is made of a video."""

    title: ClassVar[str] = "what to make"

    layout: str = setting("what to make", "folder", choices=("folder", "stableavatar"))
    fps: float = setting("frames a second", 16, low=1, high=120, shown="16; of stableavatar 25")
    resolutions: tuple[str, ...] = setting(
        "HEIGHTxWIDTH; each video becomes the one nearest in shape, its middle cut out", (),
        shown="480x832 832x480; of stableavatar 512x512",
    )  # fmt: skip
    frames: int | None = setting("length of clips to cut a video into", None, low=1, high=100_000, shown="whole videos")
    caption: str | None = setting("caption of videos that have none", None)
    kind: str = setting("what people do there, for stableavatar", "speech", choices=tuple(PROMPTS))
    masks: tuple[str, ...] = setting(
        "masks to make", (), choices=("face", "lip", "none"), shown="none; of stableavatar face lip"
    )
    faces: int = setting(
        "pictures of the person to take from each clip", 4, low=0, high=64, shown="4; of stableavatar 0"
    )
    antelopv2_path: str | None = setting("folder of antelopev2, the face models", None, shown="checkpoints/antelopev2")
    face_parser_path: str | None = setting("weights of the face parser", None, shown="checkpoints/face-parsing/…")

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """(height, width) each."""
        return tuple(map(parse_size, self.resolutions))


# ---------------------------------------------------------------------------------------------------- the models


class Models:
    """What looks at frames, loaded at once so that a missing file is said before hours of work.

    Raises:
        WeightsError: lips without antelopev2, with the command that fetches it.
    """

    def __init__(self, settings: PrepareSettings):
        path = settings.antelopv2_path
        self.detector = self.recognizer = self.parser = None
        if settings.masks:
            self.detector = load_detector(path, landmarks="lip" in settings.masks)
        if settings.faces:
            self.parser = load_parser(settings.face_parser_path)
            if recognizer_is_there(path) or path is not None:
                self.recognizer = load_recognizer(path, "--faces")
            else:
                self.recognizer = load_detector(path)
                logger.warning(
                    "without antelopev2 nobody is recognised: faces are from the video's own frames alone (stand_in: "
                    "{reference: far_frame}). For pairs of clips: python download_models.py --only antelopev2"
                )


# ---------------------------------------------------------------------------------------------------- one raw video


@dataclass(frozen=True)
class Clip:
    """Where the files of a clip go; a caption, pictures and faces only in the layouts that have them."""

    name: str  # as it is listed
    video: Path
    sound: Path
    masks: Mapping[str, Path]
    caption: Path | None = None
    images: Path | None = None
    faces: Path | None = None

    @property
    def folders(self) -> list[Path]:
        return [folder for folder in (self.images, *self.masks.values()) if folder is not None]

    def parts(self) -> list[Path]:
        """What it is made of, to be moved one by one: its video last, so that what is listed is complete."""
        if self.images is not None:
            return [self.video.parent]
        beside = (self.sound, self.caption, self.faces, *self.masks.values())
        return [part for part in (*beside, self.video) if part is not None and part.exists()]


def clip_in(root: Path, name: str, size: tuple[int, int], settings: PrepareSettings) -> Clip:
    """The places of a clip below a folder, in the layout of the settings."""
    if settings.layout == "stableavatar":
        own = f"{AVATAR_SIZES[size]}/{settings.kind}/{name.replace('/', '-')}"
        masks = {kind: root / own / f"{kind}_masks" for kind in settings.masks}
        return Clip(own, root / own / "sub_clip.mp4", root / own / "audio.wav", masks, images=root / own / "images")
    beside = {kind: root / f"{name}.{kind}" for kind in ("wav", "txt", "faces", "face_masks", "lip_masks")}
    masks = {kind: beside[f"{kind}_masks"] for kind in settings.masks}
    faces = beside["faces"] if settings.faces else None
    return Clip(f"{name}.mp4", root / f"{name}.mp4", beside["wav"], masks, beside["txt"], faces=faces)


def make_clips(
    raw: Listed, name: str, root: Path, settings: PrepareSettings, models: Models
) -> list[tuple[Clip, People | None]]:
    """Write the clips of a raw video below a folder, with the person in each; None where no face is found or wanted.

    Raises:
        InputError: the video, or its sound, is damaged.
    """
    info = probe(raw.video)
    size = min(settings.sizes, key=lambda size: shape_distance(info.height / info.width, size))
    total = max(round(info.num_frames / info.fps * settings.fps), 1)
    length = settings.frames or total
    samples = read_audio(raw.video, argument="sound") if info.has_audio else None
    frames = resampled(stream_frames(raw.video), info.fps, settings.fps, total)
    made = []
    for number in range(total // length):
        clip = clip_in(root, name if settings.frames is None else f"{name}-{number:03d}", size, settings)
        person = write_frames(clip, itertools.islice(frames, length), length, size, settings, models)
        if samples is not None:
            first, end = (int(i / settings.fps * SAMPLE_RATE) for i in (number * length, (number + 1) * length))
            write_wav(clip.sound, cut_samples(samples, first, end), SAMPLE_RATE)
        if clip.caption is not None:
            clip.caption.write_text(f"{raw.caption or settings.caption}\n", encoding="utf-8")
        made.append((clip, person))
    return made


def write_frames(
    clip: Clip,
    frames: Iterator[numpy.ndarray],
    count: int,
    size: tuple[int, int],
    settings: PrepareSettings,
    models: Models,
) -> People | None:
    """Write what is of a clip's frames, each of which is looked at once; returns the person in it."""
    for folder in (clip.video.parent, *clip.folders):
        folder.mkdir(parents=True, exist_ok=True)
    of_person = frames_to_look_at(count, settings.faces) if settings.faces else []
    kept = {}
    with VideoWriter(clip.video, fps=settings.fps, quality=10) as video:
        for i, raw in enumerate(frames):
            frame = fitted(raw, *size)
            video.write(frame[None])
            if clip.images is not None:
                write_png(clip.images / f"frame_{i}.png", frame)
            faces = models.detector(frame) if clip.masks else []
            for kind, folder in clip.masks.items():
                write_png(folder / f"frame_{i}.png", MASKS[kind](faces, *size))
            if i in of_person:  # at the video's own size: of what is trained on at 480x832 a face is 100 pixels
                kept[i] = numpy.asarray(PIL.Image.fromarray(raw).crop([round(side) for side in middle(raw, *size)]))
    return write_faces(clip.faces, kept, models.recognizer, models.parser) if clip.faces is not None else None


def shape_distance(shape: float, size: tuple[int, int]) -> float:
    """How far a size is from a picture's height / width."""
    other = size[0] / size[1]
    return max(shape, other) / min(shape, other)


def resampled(frames: Iterator[numpy.ndarray], rate: float, wanted: float, count: int) -> Iterator[numpy.ndarray]:
    """`count` frames at another rate: each is what is shown at the middle of its time, so that sound stays with it."""
    number, frame = -1, None
    for i in range(count):
        due = int((i + 0.5) * rate / wanted)
        while number < due and (following := next(frames, None)) is not None:
            number, frame = number + 1, following
        yield frame


def fitted(frame: numpy.ndarray, height: int, width: int) -> numpy.ndarray:
    """The middle of a picture, scaled to cover height x width (Lanczos)."""
    picture = PIL.Image.fromarray(frame)
    return numpy.asarray(picture.resize((width, height), PIL.Image.LANCZOS, middle(frame, height, width)))


def middle(frame: numpy.ndarray, height: int, width: int) -> tuple[float, float, float, float]:
    """The largest part of a picture with the shape of height x width: left, top, right, bottom."""
    own_height, own_width = frame.shape[:2]
    scale = min(own_height / height, own_width / width)
    left, top = (own_width - width * scale) / 2, (own_height - height * scale) / 2
    return left, top, own_width - left, own_height - top
