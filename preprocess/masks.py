"""Where the face and the lips are, in every frame of a data set: the masks that the talking avatar's loss weighs by.

    python -m preprocess.masks talking_face_data/square              # every clip folder below
    python -m preprocess.masks video_square_path.txt                 # a list, one clip folder a line
    python -m preprocess.masks talking_face_data --only face         # or lip; both by default

A clip folder has its frames in images/ (frame_0.png, frame_1.png, … or 0.png, png or jpg). The masks go beside, as
face_masks/frame_0.png and lip_masks/frame_0.png: one channel, 255 in all faces found and 0 elsewhere, so black where
there is none. Run again, it goes on: masks that are there stay as they are.

The face is the detector's box, as in StableAnimator's face_mask_extraction.py, by which StableAvatar's data were made.
The lips are the outline of the mouth, as in StableAvatar's lip_mask_extractor.py, but from insightface's 68 landmarks
where that asks MediaPipe. Faces alone can be found without antelopev2, by OpenCV's cascade; lips cannot.
"""

import argparse
import logging
import re
import sys
from argparse import Namespace
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy

from errors import InputError, UsageError, exit_codes
from preprocess.face_detection import DETECTOR_PATH, Detector, Face, load_detector
from preprocess.image import read_image, write_png

logger = logging.getLogger("selfsame")

FRAMES, FOLDERS = "images", {"face": "face_masks", "lip": "lip_masks"}

# Outer lips among the 68 landmarks of iBUG 300-W, from the mouth's one corner (48) to the other (54).
UPPER_LIP = (48, 49, 50, 51, 52, 53, 54)
LOWER_LIP = (48, 59, 58, 57, 56, 55, 54)


def face_mask(faces: Sequence[Face], height: int, width: int) -> numpy.ndarray:
    """Boxes filled: (H, W) uint8 of 0 and 255."""
    import cv2

    mask = numpy.zeros((height, width), numpy.uint8)
    for face in faces:
        left, top, right, bottom = (int(v) for v in face.box)
        cv2.rectangle(mask, (left, top), (right, bottom), 255, cv2.FILLED)  # both corners included
    return mask


def lip_mask(faces: Sequence[Face], height: int, width: int) -> numpy.ndarray:
    """Lips filled, and with them an open mouth: (H, W) uint8 of 0 and 255."""
    lips = [face.landmarks[list(lip)] for face in faces for lip in (UPPER_LIP, LOWER_LIP)]
    return fill_polygons(lips, height, width)


def fill_polygons(polygons: Iterable[numpy.ndarray], height: int, width: int) -> numpy.ndarray:
    """Each polygon, (N, 2) of x and y in pixels, with its border; the fractions of coordinates are cut off."""
    import cv2

    mask = numpy.zeros((height, width), numpy.uint8)
    for polygon in polygons:
        cv2.fillPoly(mask, [numpy.asarray(polygon).astype(numpy.int32)], 255)
    return mask


MASKS = {"face": face_mask, "lip": lip_mask}


def find_clips(root: str | Path) -> list[Path]:
    """The clip folders that a folder holds, at any depth, or that a text file lists.

    Raises:
        InputError: none, or a listed one that is not there.
    """
    root = Path(root)
    if root.is_file():
        try:
            lines = [line.strip() for line in root.read_text(encoding="utf-8-sig").splitlines()]
        except UnicodeDecodeError as error:
            raise InputError(f"DATASET {root} is no text; give a folder, or a list of clip folders") from error
        clips = []
        for number, line in enumerate(lines, 1):
            if not line:
                continue
            places = (Path(line), root.parent / line)
            clip = next((place for place in places if (place / FRAMES).is_dir()), None)
            if clip is None:
                raise InputError(f"DATASET {root}, line {number}: {line!r} is no clip folder, it has no {FRAMES}/")
            clips.append(clip)
    else:
        clips = sorted(folder.parent for folder in root.rglob(FRAMES) if folder.is_dir())
    if not clips:
        raise InputError(
            f"DATASET {root}: no clip folder there; give a folder with …/{FRAMES}/frame_0.png below it, "
            "or a text file with one clip folder a line"
        )
    return list(dict.fromkeys(clips))


def find_frames(clip: Path) -> list[Path]:
    """Pictures of a clip in the order of the number in their names.

    Raises:
        InputError: a name without a number, or two pictures with one number.
    """
    frames = {}
    for path in sorted((clip / FRAMES).iterdir()):
        if path.suffix.lower() not in (".png", ".jpg", ".jpeg") or path.name.startswith("."):
            continue
        number = re.search(r"(\d+)$", path.stem)
        if number is None:
            raise InputError(f"{path}: no number in the name; frames are called frame_0.png, frame_1.png, …")
        if int(number[1]) in frames:
            raise InputError(f"{path}: a second frame {int(number[1])}, beside {frames[int(number[1])].name}")
        frames[int(number[1])] = path
    return [frames[number] for number in sorted(frames)]


def missing_masks(clips: Iterable[Path], kinds: Sequence[str]) -> tuple[list[tuple[Path, dict[str, Path]]], int]:
    """(frame, {kind: path of its mask}) for every frame that lacks masks; and how many masks there are already."""
    work, found = [], 0
    for clip in clips:
        for frame in find_frames(clip):
            paths = {kind: clip / FOLDERS[kind] / f"{frame.stem}.png" for kind in kinds}
            missing = {kind: path for kind, path in paths.items() if not path.is_file()}
            found += len(paths) - len(missing)
            if missing:
                work.append((frame, missing))
    return work, found


def make_masks(work: Sequence[tuple[Path, dict[str, Path]]], detector: Detector) -> None:
    """Write the masks of `missing_masks`, each beside first, then renamed.

    Returns:
        How many frames had no face, and the frames that could not be read.
    """
    from tqdm import tqdm

    without_face, unreadable = 0, []
    for frame, paths in tqdm(work, desc="masks", unit="frame", disable=None):
        try:
            image = read_image(frame, "frame")
        except InputError as error:
            logger.warning("%s; it gets no mask", error)
            unreadable.append(frame)
            continue
        faces = detector(image)
        without_face += not faces
        for kind, path in paths.items():
            write_png(path, MASKS[kind](faces, *image.shape[:2]), overwrite=True)
    return without_face, unreadable


def parse_arguments(argv: Sequence[str] | None = None) -> Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m preprocess.masks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dataset", metavar="DATASET", help="folder of clip folders, or a text file that lists them")
    parser.add_argument("--only", choices=tuple(FOLDERS), help="one kind of mask (both)")
    parser.add_argument("--start", type=int, default=0, metavar="N", help="first clip, to share the work out (0)")
    parser.add_argument("--end", type=int, metavar="N", help="clip after the last (all)")
    parser.add_argument("--antelopv2_path", help=f"folder of antelopev2, the face detector ({DETECTOR_PATH})")
    return parser.parse_args(argv)


def main(args: Namespace) -> None:
    if not Path(args.dataset).exists():
        raise InputError(f"DATASET {args.dataset}: no such folder or file")
    clips = find_clips(args.dataset)
    end = len(clips) if args.end is None else args.end
    if not 0 <= args.start < end <= len(clips):
        raise UsageError(f"--start {args.start} --end {end}: there are {len(clips)} clips; 0 <= start < end <= that")
    kinds = [args.only] if args.only else list(FOLDERS)
    work, found = missing_masks(clips[args.start : end], kinds)
    logger.info("%d clips: %d masks are there, %d frames to do", end - args.start, found, len(work))
    if not work:
        return
    without_face, unreadable = make_masks(work, load_detector(args.antelopv2_path, landmarks="lip" in kinds))
    if without_face:
        logger.warning("%d of %d frames have no face: their masks are black", without_face, len(work))
    if unreadable:
        raise InputError(f"{len(unreadable)} of {len(work)} frames cannot be read, {unreadable[0]} first; mend them")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s", stream=sys.stderr)
    with exit_codes():
        main(parse_arguments())
