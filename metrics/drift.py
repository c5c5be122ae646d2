"""How a long video drifts: colour, sharpness, motion and likeness of every clip, as a table and a picture of curves.

python -m metrics.drift out.mp4                        writes out.drift.tsv and out.drift.png
python -m metrics.drift any.mp4 --clip_frames 81       of a video that carries no record of its clips
python -m metrics.drift out.mp4 --photo me.jpg         likeness to this photo, not to the first frame

red green blue   mean of each, 0 to 255
shift            distance of the mean colour from the first clip's (CIE Lab, 2 is about what one sees)
contrast         standard deviation of the brightness
sharpness        variance of its Laplacian: falls with blur, rises with noise and over-sharpening
motion           mean difference of a frame from the one before, 0 to 255. Read it with the rest: a frozen video
                 drifts least of all
seam             difference over the cut before the clip, in motions of the clip: 0 is a doubled frame, 1 no seam
likeness         cosine of ArcFace embeddings with the photo's, where antelopev2's face models are there
"""

import argparse
import itertools
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy
from PIL import Image, ImageDraw

from errors import InputError, exit_codes
from metrics.likeness import FaceScorer
from preprocess.face_detection import load_recognizer, recognizer_is_there
from preprocess.image import read_image
from preprocess.progress_bars import ProgressBars
from preprocess.record import read_metadata
from preprocess.side_file import write_side_picture, write_side_table
from preprocess.video import probe, stream_frames

logger = logging.getLogger("selfsame")

CLIP_FRAMES = 81
FACES_PER_CLIP = 4  # frames whose faces are compared; detection takes a while
# What is drawn together: title and columns.
PANELS = (
    ("colour", ("red", "green", "blue")),
    ("colour shift", ("shift",)),
    ("contrast", ("contrast",)),
    ("sharpness", ("sharpness",)),
    ("motion", ("motion",)),
    ("seam", ("seam",)),
    ("likeness", ("likeness",)),
)
INK = {"red": (205, 50, 50), "green": (40, 140, 60), "blue": (45, 85, 200)}


@dataclass(frozen=True)
class ClipStatistics:
    """One row of the table; None where there is nothing to measure."""

    clip: int
    start: int
    frames: int
    red: float
    green: float
    blue: float
    shift: float
    contrast: float
    sharpness: float
    motion: float | None
    seam: float | None
    likeness: float | None = None


def measure_clips(
    frames: Iterable[numpy.ndarray],
    starts: Sequence[int],
    likeness: Callable[[numpy.ndarray], float | None] | None = None,
) -> list[ClipStatistics]:
    """The statistics of every clip; one frame is in memory at a time.

    Args:
        frames: (H, W, 3) uint8, of the whole video.
        starts: the first frame of each clip, the first one 0.
        likeness: of a frame, None where it shows no face.
    """
    frames = iter(frames)
    rows, before, first = [], None, None
    for clip, (start, stop) in enumerate(itertools.zip_longest(starts, starts[1:])):
        colors, contrasts, sharpnesses, differences, scores = [], [], [], [], []
        every = max(1, ((stop or start + CLIP_FRAMES) - start) // FACES_PER_CLIP)
        for number, frame in enumerate(itertools.islice(frames, stop and stop - start)):
            grey = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
            colors.append(frame.mean(axis=(0, 1)))
            contrasts.append(grey.std())
            sharpnesses.append(cv2.Laplacian(grey, cv2.CV_32F).var())
            differences.append(None if before is None else cv2.absdiff(frame, before).mean())
            if likeness is not None and number % every == 0 and (score := likeness(frame)) is not None:
                scores.append(score)
            before = frame
        if not colors:
            raise InputError(f"the video ends before its clip {clip}, which begins with frame {start}")
        color = numpy.mean(colors, axis=0)  # (3,)
        first = color if first is None else first
        across, motion = differences[0], numpy.mean(differences[1:]) if len(differences) > 1 else None
        rows.append(
            ClipStatistics(
                *(clip, start, len(colors), *color),
                shift=numpy.linalg.norm(to_lab(color) - to_lab(first)),
                contrast=numpy.mean(contrasts),
                sharpness=numpy.mean(sharpnesses),
                motion=motion,
                seam=across / motion if across is not None and motion else None,
                likeness=numpy.mean(scores) if scores else None,
            )
        )
    return rows


def to_lab(color: numpy.ndarray) -> numpy.ndarray:
    """Mean RGB (3,) of 0 to 255 -> CIE Lab (3,)"""
    return cv2.cvtColor((color / 255).astype(numpy.float32).reshape(1, 1, 3), cv2.COLOR_RGB2LAB).reshape(3)


def likeness_to(picture: numpy.ndarray, models: str | None = None) -> Callable[[numpy.ndarray], float | None] | None:
    """How much frames look like the person in a picture; None, with a word about it, where that cannot be measured.

    Args:
        models: folder of antelopev2; None looks where it is downloaded to, and does without where it is not.

    Raises:
        WeightsError: `models` is given and not there.
    """
    if models is None and not recognizer_is_there():
        logger.info("likeness is not measured: no face models here (python download_models.py --only antelopev2)")
        return None
    try:
        scorer = FaceScorer(load_recognizer(models, "likeness"), [picture], names=["the first frame"])
    except InputError as error:
        logger.info("likeness is not measured: %s", error)
        return None

    def likeness(frame: numpy.ndarray) -> float | None:
        score = scorer.score([frame])
        return score.value if score.with_face else None

    return likeness


# --------------------------------------------------------------------------------------------------- table and picture

COLUMNS = tuple(ClipStatistics.__dataclass_fields__)


def shown_columns(rows: Sequence[ClipStatistics]) -> list[str]:
    return [name for name in COLUMNS if any(getattr(row, name) is not None for row in rows)]


def as_table(rows: Sequence[ClipStatistics]) -> str:
    """Tab-separated, a line a clip."""

    def text(value: object) -> str:
        return "-" if value is None else str(value) if isinstance(value, int) else f"{value:.2f}"

    names = shown_columns(rows)
    return "\n".join(["\t".join(names), *("\t".join(text(getattr(row, name)) for name in names) for row in rows)])


def draw(rows: Sequence[ClipStatistics], width: int = 900, height: int = 150) -> numpy.ndarray:
    """The curves over the clips, a panel for each measure: (H, W, 3) uint8."""
    names = shown_columns(rows)
    panels = [(title, shown) for title, columns in PANELS if (shown := [c for c in columns if c in names])]
    picture = Image.new("RGB", (width, height * len(panels)), "white")
    pen = ImageDraw.Draw(picture)
    left, right, top, bottom = 70, width - 20, 28, height - 22
    for number, (title, columns) in enumerate(panels):
        values = [getattr(row, name) for name in columns for row in rows if getattr(row, name) is not None]
        low, high = min(values), max(values)
        margin = max((high - low) * 0.1, 0.02 * abs(high), 1e-3)
        low, high = max(low - margin, min(low, 0)), high + margin
        offset = number * height
        pen.text((left, offset + 8), title, fill="black")
        for share in (0, 0.5, 1):
            y = offset + bottom - share * (bottom - top)
            pen.line((left, y, right, y), fill=(225, 225, 225))
            pen.text((8, y - 6), f"{low + share * (high - low):.4g}", fill=(90, 90, 90))

        def at(
            clip: int, value: float, low: float = low, high: float = high, offset: int = offset
        ) -> tuple[float, float]:
            x = left + (right - left) * (clip + 0.5) / len(rows)
            return x, offset + bottom - (value - low) / (high - low) * (bottom - top)

        for name in columns:
            points = [at(row.clip, getattr(row, name)) for row in rows if getattr(row, name) is not None]
            ink = INK.get(name, (60, 60, 60))
            if len(points) > 1:
                pen.line(points, fill=ink, width=2)
            for x, y in points:
                pen.ellipse((x - 3, y - 3, x + 3, y + 3), fill=ink)
        for row in rows[:: max(1, len(rows) // 20)]:
            pen.text((at(row.clip, low)[0] - 3, offset + bottom + 5), str(row.clip), fill=(90, 90, 90))
    return numpy.asarray(picture)


# ----------------------------------------------------------------------------------------------------------- the report


def clip_starts(path: Path, clip_frames: int | None) -> list[int]:
    """The first frame of each clip: as recorded in the video, or every so many frames.

    What lies before the first recorded clip is a clip too: the video that was extended.
    """
    num_frames = probe(path).num_frames
    if clip_frames is None:
        try:
            recorded = [clip["start"] for clip in read_metadata(path)["clips"]]
        except (InputError, LookupError, TypeError):
            logger.info("%s carries no record of clips; taken as clips of %d frames", path, CLIP_FRAMES)
        else:
            return sorted({0, *recorded})
    return list(range(0, num_frames, clip_frames or CLIP_FRAMES))


def report(
    path: Path,
    clip_frames: int | None = None,
    likeness: Callable[[numpy.ndarray], float | None] | None = None,
    overwrite: bool = False,
) -> str:
    """Measure a video and write NAME.drift.tsv and NAME.drift.png beside it. Returns the table.

    Raises:
        UsageError: something else lies there, and is not to be overwritten.
    """
    with ProgressBars().work("measuring drift", probe(path).num_frames, "frame") as bar:
        frames = (bar.advance() or frame for frame in stream_frames(path))
        rows = measure_clips(frames, clip_starts(path, clip_frames), likeness)
    table = as_table(rows)
    write_side_table(path.with_suffix(".drift.tsv"), table, overwrite)
    write_side_picture(path.with_suffix(".drift.png"), draw(rows), overwrite)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("video", type=Path)
    parser.add_argument("--clip_frames", type=int, help="length of a clip (as recorded, else 81)")
    parser.add_argument("--photo", help="whose likeness is measured (of the first frame's person)")
    parser.add_argument("--antelopv2_path", help="folder of the face models")
    parser.add_argument("--overwrite", action="store_true", help="also what is no earlier report")
    args = parser.parse_args()
    if args.clip_frames is not None and args.clip_frames < 1:
        parser.error(f"--clip_frames {args.clip_frames}: give a number of frames, 81 for instance")
    probe(args.video)  # its errors come first
    picture = next(stream_frames(args.video)) if args.photo is None else read_image(args.photo, "--photo")
    print(report(args.video, args.clip_frames, likeness_to(picture, args.antelopv2_path), args.overwrite))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    with exit_codes():
        main()
