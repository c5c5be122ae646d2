"""The part of a video that is trained on, its view, as pixels and samples: which frames, which crop, the sound to them.

    for view in views(sample, variants=2):
        frames = read_frames(view)                         # (T, H, W, 3) uint8, of the bucket's size
        sound = read_sound(view)                           # (N,) float32 at 16 kHz

A sample has as many views as the configuration's `cache_variants`. They follow from the content of its video, so that
what is encoded of them is found again. Source of how sound and masks are cut: StableAvatar's
`talking_video_dataset_fantasy.py`.
"""

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy
import PIL.Image

from errors import InputError
from preprocess.audio import cut_samples, read_audio, training_clip_samples
from preprocess.image import read_image
from preprocess.masks import find_frames
from preprocess.video import stream_frames
from training.data import Sample
from training.facts import find_mask, mask_names
from training.sampler import Bucket


@dataclass(frozen=True)
class View:
    """A window in time of a sample, and a crop of it."""

    sample: Sample
    start: int  # first frame
    place: tuple[float, float] = (0.5, 0.5)  # of the crop along height and width: 0 the first, 1 the last there is
    fit: str = "crop"  # or "resize": the whole picture, squashed

    @property
    def bucket(self) -> Bucket:
        return self.sample.bucket

    @property
    def box(self) -> tuple[float, float, float, float]:
        """What of the video's picture is seen: left, top, right, bottom in pixels."""
        facts, bucket = self.sample.facts, self.bucket
        if self.fit == "resize":
            return 0.0, 0.0, float(facts.width), float(facts.height)
        scale = min(facts.height / bucket.height, facts.width / bucket.width)
        height, width = bucket.height * scale, bucket.width * scale
        top, left = self.place[0] * (facts.height - height), self.place[1] * (facts.width - width)
        return left, top, left + width, top + height


def views(sample: Sample, variants: int = 1, fit: str = "crop") -> list[View]:
    """The views of a sample: windows spread over its length, the first crop in the middle, further ones anywhere."""
    room = sample.facts.num_frames - sample.bucket.frames - sample.further + 1
    found = []
    for variant in range(variants):
        numbers = hashlib.sha256(f"{sample.facts.content}/{variant}/{variants}".encode()).digest()
        in_time, *place = (int.from_bytes(numbers[8 * i : 8 * i + 6], "little") / 2**48 for i in range(3))
        start = min(int((variant + in_time) / variants * room), room - 1)
        found.append(View(sample, start, tuple(place) if variant and fit == "crop" else (0.5, 0.5), fit))
    return found


def with_next(view: View) -> View:
    """The view and the frames after it that the next clip has."""
    bucket = view.bucket._replace(frames=view.bucket.frames + view.sample.further)
    return replace(view, sample=replace(view.sample, bucket=bucket, further=0))


def read_frames(view: View) -> numpy.ndarray:
    """(T, H, W, 3) uint8 of the view, resized bicubically.

    Raises:
        InputError: damaged, or shorter than it was.
    """
    bucket, found = view.bucket, []
    for frame in itertools.islice(frames_of(view.sample.listed.video), view.start, view.start + bucket.frames):
        picture = PIL.Image.fromarray(frame).resize((bucket.width, bucket.height), PIL.Image.BICUBIC, view.box)
        found.append(numpy.asarray(picture))
    if len(found) < bucket.frames:
        raise InputError(f"{view.sample.listed.video}: has become shorter since it was checked; start again")
    return numpy.stack(found)


def frames_of(video: Path) -> Iterator[numpy.ndarray]:
    """Every frame of a video or of a folder of numbered pictures, (H, W, 3) uint8."""
    if video.is_dir():
        return (read_image(frame, "frame") for frame in find_frames(video.parent))
    return stream_frames(video)


def read_sound(view: View) -> numpy.ndarray:
    """(N,) float32 samples at 16 kHz to the frames of the view; silence where the sound is over.

    Raises:
        InputError: no sound, or damaged.
    """
    listed = view.sample.listed
    file = listed.audio or (listed.timing if listed.video.is_dir() else listed.video)
    first, end = training_clip_samples(view.start, view.bucket.frames, view.sample.facts.fps)
    return cut_samples(read_audio(file, argument="sound"), first, end)


def read_masks(view: View, kind: str) -> numpy.ndarray:
    """(T, H, W) float32 in [0, 1]: where the face, or the lips, are in the view. A frame without a mask is all ones, as
    in StableAvatar's training.
    """
    bucket = view.bucket
    folder = dict(view.sample.listed.masks).get(kind)
    names = mask_names(view.sample.listed, view.sample.facts.num_frames)[view.start : view.start + bucket.frames]
    masks = numpy.ones((bucket.frames, bucket.height, bucket.width), numpy.float32)
    for mask, name in zip(masks, names, strict=True):
        if folder is None or (file := find_mask(folder, name)) is None:
            continue
        with PIL.Image.open(file, formats=("PNG", "JPEG")) as picture:
            gray = picture.convert("L")
        mask[:] = numpy.asarray(gray.resize((bucket.width, bucket.height), PIL.Image.BICUBIC, view.box)) / 255
    return masks


def read_poses(view: View) -> numpy.ndarray:
    """(T, H, W, 3) uint8 pictures of poses to the frames of the view, by the same crop."""
    return read_beside(view, view.sample.listed.pose, PIL.Image.BICUBIC)


def read_control(view: View) -> tuple[numpy.ndarray, numpy.ndarray]:
    """What controls a view: frames (T, H, W, 3) uint8, and masks (T, H, W) uint8, 255 where the video is to be made.

    Without a control video what is kept is of the video itself; without masks everything is made.
    """
    listed, bucket = view.sample.listed, view.bucket
    frames = read_frames(view) if listed.control is None else read_beside(view, listed.control, PIL.Image.BICUBIC)
    if listed.made is None:
        return frames, numpy.full((bucket.frames, bucket.height, bucket.width), 255, numpy.uint8)
    masks = read_beside(view, listed.made, PIL.Image.NEAREST).max(axis=-1)
    return frames, numpy.where(masks > 127, 255, 0).astype(numpy.uint8)


def read_beside(view: View, video: Path, filter: PIL.Image.Resampling) -> numpy.ndarray:
    """(T, H, W, 3) uint8 of a video beside the view's own, of any size: the same frames, and the same crop.

    Raises:
        InputError: damaged, or shorter than it was.
    """
    facts, bucket, found = view.sample.facts, view.bucket, []
    for frame in itertools.islice(stream_frames(video), view.start, view.start + bucket.frames):
        across, down = frame.shape[1] / facts.width, frame.shape[0] / facts.height
        left, top, right, bottom = view.box
        box = (left * across, top * down, right * across, bottom * down)
        found.append(numpy.asarray(PIL.Image.fromarray(frame).resize((bucket.width, bucket.height), filter, box)))
    if len(found) < bucket.frames:
        raise InputError(f"{video}: has become shorter since it was checked; start again")
    return numpy.stack(found)


def read_faces(sample: Sample) -> list[numpy.ndarray]:
    """The pictures of the person's face, (512, 512, 3) uint8 each, in the order of the frames they are from.

    Raises:
        InputError: there are none.
    """
    files = find_faces(sample.listed.faces)
    if not files:
        raise InputError(f"{sample.listed.faces}: no faces there; make them with `python -m training.prepare`")
    return [read_image(file, "face") for file in files]


def find_faces(folder: Path) -> list[Path]:
    """frame_0.png, frame_40.png, … by their numbers."""
    files = [file for file in folder.glob("frame_*.png") if file.stem.removeprefix("frame_").isdigit()]
    return sorted(files, key=lambda file: int(file.stem.removeprefix("frame_")))
