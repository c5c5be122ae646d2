"""A photo of a person -> the square face picture on white that identity models are given.

    python -m preprocess.face photo.jpg --output face.png
    python -m preprocess.face family.jpg --output face.png --face_index 1        # counted from the left, from 0
    python -m preprocess.face teapot.png --output teapot.png --no_face_crop      # a thing, not a person

Find the face, crop 1.5 times around it, pad to a square, resize to 512x512, make everything that is not the person
white: Stand-In's preprocessor/image_input_preprocessor.py, rule for rule. Identity suffers visibly without it.

    face = prepare_face(read_image("photo.jpg"), load_detector(), load_parser())
    face.rgb                                             # (512, 512, 3) uint8
"""

import argparse
import logging
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy

from errors import InputError, UsageError, WeightsError, exit_codes
from preprocess.face_detection import DETECTOR_PATH, Box, Detector, Face, load_detector
from preprocess.image import read_image, write_png

# A face parser: (S, S, 3) uint8 RGB and a face's box or None -> (S, S) class labels, 0 the background.
Parser = Callable[[numpy.ndarray, Box | None], numpy.ndarray]

logger = logging.getLogger("selfsame")

PARSER_PATH = "checkpoints/face_parsing/parsing_bisenet.pth"
SIZE = 512

# Classes of the parser: 0 background, 1 skin, 2-3 brows, 4-5 eyes, 6 glasses, 7-8 ears, 9 earring, 10 nose, 11 mouth,
# 12-13 lips, 14 neck, 15 necklace, 16 cloth, 17 hair, 18 hat. Each mask names the classes that become white.
MASKS = {
    "default": (0,),
    "no-neck": (0, 14, 15, 16, 18),
    "face-only": (0, 14, 15, 16, 17, 18),
}

# Stand-In feeds the parser [-1, 1], though BiSeNet was trained with ImageNet's statistics; both are in use.
NORMALISATIONS = {
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}

# Below these a face still works, but likeness suffers; the user is told.
MIN_FACE_SIZE = 100  # pixels, longer side: enlarged more than threefold
MIN_SCORE = 0.65


@dataclass(frozen=True, eq=False)
class Crop:
    """A square piece of a picture, resized."""

    picture: numpy.ndarray  # (size, size, 3) uint8 RGB
    box: tuple[int, int, int, int]  # left, top, right, bottom in the source picture
    square_size: int  # side of the padded square before resizing
    pad: tuple[int, int]  # white columns added left, rows added on top

    def to_crop(self, box: Box) -> Box:
        """A box of the source picture, in pixels of `picture`."""
        scale = self.picture.shape[0] / self.square_size
        offset_x, offset_y = self.pad[0] - self.box[0], self.pad[1] - self.box[1]
        x1, y1, x2, y2 = box
        return (x1 + offset_x) * scale, (y1 + offset_y) * scale, (x2 + offset_x) * scale, (y2 + offset_y) * scale


@dataclass(frozen=True, eq=False)
class FaceImage:
    """What `prepare_face` returns."""

    rgb: numpy.ndarray  # (size, size, 3) uint8, white background
    rgba: numpy.ndarray  # (size, size, 4) uint8, alpha 0 on the background, colours untouched
    face: Face | None  # None: no face was found, or none looked for
    crop_box: tuple[int, int, int, int]  # left, top, right, bottom in the source picture


def prepare_face(
    image: numpy.ndarray,
    detector: Detector | None = None,
    parser: Parser | None = None,
    *,
    face_index: int | None = None,
    allow_no_face: bool = False,
    crop: bool = True,
    mask: str = "default",
    size: int = SIZE,
    name: str = "the picture",
) -> FaceImage:
    """The face picture an identity model is given.

    Args:
        image: (H, W, 3) uint8 RGB, as `read_image` gives it.
        detector, parser: from `load_detector`, `load_parser`. Not needed with `crop=False`.
        face_index: which face, counted from the left from 0; None takes the largest.
        allow_no_face: use the whole picture when no face is found.
        crop: False takes the whole picture as it is, for subjects that are not human. Its background stays: the parser
            knows people only. Cut-outs need no more, since `read_image` has put their alpha on white.
        mask: which classes become white, a key of `MASKS`.
        name: what messages call the picture.

    Raises:
        InputError: no face (without `allow_no_face`), or nothing left of the person.
        UsageError: no such `face_index`.
        WeightsError: `mask` needs a parser that tells classes apart.
    """
    if not crop:
        if face_index is not None or mask != "default":
            raise UsageError("--no_face_crop takes the whole picture: leave out --face_index and --mask")
        whole = crop_face(image, None, size=size)
        x1, y1, x2, y2 = (round(v) for v in whole.to_crop(whole.box))
        alpha = numpy.zeros((size, size, 1), numpy.uint8)
        alpha[y1:y2, x1:x2] = 255
        return FaceImage(whole.picture, numpy.concatenate([whole.picture, alpha], axis=-1), None, whole.box)

    if mask != "default" and isinstance(parser, GrabCutParser):
        raise WeightsError(
            f"--mask {mask} needs the parser's weights {PARSER_PATH!r}; "
            "fetch them with `python download_models.py --only face-parsing`"
        )

    faces = detector(image)
    height, width = image.shape[:2]
    if not faces and not allow_no_face:
        raise InputError(
            f"no face found in {name} ({width}x{height}, 0 faces detected); give a photo with a near frontal face, "
            "or pass --allow_no_face to use the whole picture, --no_face_crop for a subject that is not a person"
        )
    if not faces:
        logger.warning("no face found in %s; the whole picture is used (--allow_no_face)", name)
    face = choose_face(faces, face_index, name) if faces else None
    cut = crop_face(image, face, size=size)
    if face is not None:
        _warn_of_poor_face(face, cut, image.shape, name)

    labels = parser(cut.picture, cut.to_crop(face.box) if face else None)
    rgb, rgba = remove_background(cut.picture, labels, mask)
    if rgba[..., 3].mean() < 255 * 0.01:
        raise InputError(
            f"nothing of a person is left of {name} after its background is removed; give another photo, "
            "or pass --no_face_crop to use the whole picture as it is"
        )
    return FaceImage(rgb, rgba, face, cut.box)


def choose_face(faces: Sequence[Face], face_index: int | None = None, name: str = "the picture") -> Face:
    """The largest face (with a warning that lists all, if there are several), or the `face_index`-th from the left."""
    faces_from_left = sorted(faces, key=lambda face: face.box[0] + face.box[2])
    largest = max(faces, key=_area)
    listing = "; ".join(
        f"{i}: box ({', '.join(f'{v:.0f}' for v in face.box)}) score {face.score:.2f}"
        for i, face in enumerate(faces_from_left)
    )
    if face_index is None:
        if len(faces) > 1:
            logger.warning(
                "%d faces found in %s, the largest (%d) is used; choose with --face_index: %s",
                len(faces), name, faces_from_left.index(largest), listing,
            )  # fmt: skip
        return largest
    if not 0 <= face_index < len(faces):
        raise UsageError(f"--face_index {face_index}: {name} has {len(faces)} faces, counted from the left: {listing}")
    return faces_from_left[face_index]


def crop_face(
    image: numpy.ndarray, face: Face, *, size: int = SIZE, border_thresh: int = 10, face_crop_scale: float = 1.5
) -> Crop:
    """Crop around the face, pad with white to a square, resize.

    The whole picture is taken when there is no face, or when the face touches all four borders: it is a face crop
    already. Truncations and floors are Stand-In's (FaceProcessor.process).

    Args:
        image: (H, W, 3) uint8 RGB.
        face: a `Face`, or None.
        border_thresh: how near a border counts as touching, in pixels.
        face_crop_scale: side of the crop over the longer side of the face.
    """
    import cv2

    height, width = image.shape[:2]
    left, top, right, bottom = 0, 0, width, height
    if face is not None:
        x1, y1, x2, y2 = (int(v) for v in face.box)
        touches_all = (
            x1 <= border_thresh and y1 <= border_thresh and x2 >= width - border_thresh and y2 >= height - border_thresh
        )
        if not touches_all:
            center_x, center_y = (x1 + x2) // 2, (y1 + y2) // 2
            half = int(max(x2 - x1, y2 - y1) * face_crop_scale) // 2
            left, right = max(center_x - half, 0), min(center_x + half, width)
            top, bottom = max(center_y - half, 0), min(center_y + half, height)

    square_size = max(right - left, bottom - top)
    pad_left, pad_top = (square_size - (right - left)) // 2, (square_size - (bottom - top)) // 2
    square = numpy.full((square_size, square_size, 3), 255, numpy.uint8)
    square[pad_top : pad_top + bottom - top, pad_left : pad_left + right - left] = image[top:bottom, left:right]
    picture = cv2.resize(square, (size, size), interpolation=cv2.INTER_AREA)
    return Crop(picture, (left, top, right, bottom), square_size, (pad_left, pad_top))


def remove_background(
    picture: numpy.ndarray, labels: numpy.ndarray, mask: str = "default"
) -> tuple[numpy.ndarray, numpy.ndarray]:
    """White where the parser saw a class of `mask`: (rgb (S, S, 3), rgba (S, S, 4) with the colours untouched)."""
    background = numpy.isin(labels, MASKS[mask])  # (S, S)
    rgb = numpy.where(background[..., None], numpy.uint8(255), picture)
    alpha = numpy.where(background, numpy.uint8(0), numpy.uint8(255))
    return rgb, numpy.dstack([picture, alpha])


def parser_input(picture: numpy.ndarray, normalization: str = "half") -> numpy.ndarray:
    """(S, S, 3) uint8 RGB -> (1, 3, S, S) float32, normalised by a key of `NORMALISATIONS`."""
    mean, std = (numpy.array(v, numpy.float32) for v in NORMALISATIONS[normalization])
    return ((picture.astype(numpy.float32) / 255 - mean) / std).transpose(2, 0, 1)[None]


def _area(face: Face) -> float:
    x1, y1, x2, y2 = face.box
    return (x2 - x1) * (y2 - y1)


def _warn_of_poor_face(face: Face, cut: bool, shape: tuple[int, ...], name: str) -> None:
    """Say what will cost likeness: a small, doubtful, cut or turned face."""
    x1, y1, x2, y2 = face.box
    height, width = shape[:2]
    about = f"{x2 - x1:.0f}x{y2 - y1:.0f} pixels, score {face.score:.2f}"
    is_whole = cut.box == (0, 0, width, height)
    if max(x2 - x1, y2 - y1) < MIN_FACE_SIZE:
        logger.warning("the face in %s is small (%s): under %d pixels likeness suffers", name, about, MIN_FACE_SIZE)
    if face.score < MIN_SCORE:
        logger.warning("the face in %s is doubtful (%s): covered, drawn or turned away?", name, about)
    if not is_whole and (x1 <= 1 or y1 <= 1 or x2 >= width - 1 or y2 >= height - 1):
        logger.warning("the face in %s is cut by the picture's border (%s)", name, about)
    if face.keypoints is not None:
        eye, other_eye, nose = face.keypoints[:3, 0]
        if not min(eye, other_eye) <= nose <= max(eye, other_eye):
            logger.warning("the face in %s is seen from the side (%s): near frontal photos work best", name, about)


def load_parser(path: str | Path | None = None, normalization: str = "half", device: str = "cpu") -> Parser:
    """A face parser: ((S, S, 3) uint8 RGB, face box or None) -> (S, S) class labels, 0 the background.

    Args:
        path: `parsing_bisenet.pth`. None takes `PARSER_PATH` where it is there, else GrabCut, with a warning.
        normalisation: a key of `NORMALISATIONS`.

    Raises:
        WeightsError: `path` was given and is not there, or the file is damaged.
    """
    if path is not None and not Path(path).is_file():
        raise WeightsError(
            f"--face_parser_path {str(path)!r}: no such file; "
            "fetch it with `python download_models.py --only face-parsing`"
        )
    if path is None and not Path(PARSER_PATH).is_file():
        logger.warning(
            "no face parser weights at %s: the background is removed by OpenCV's GrabCut instead (rough edges). "
            "For the real one: python download_models.py --only face-parsing", PARSER_PATH,
        )  # fmt: skip
        return GrabCutParser()
    return BiSeNetParser(path or PARSER_PATH, normalization, device)


class BiSeNetParser:
    """facexlib's BiSeNet: 19 classes."""

    def __init__(self, path: str | Path, normalization: str = "half", device: str = "cpu"):
        from preprocess.face_parsing import load_bisenet

        self.model = load_bisenet(path).to(device)
        self.normalization = normalization
        self.device = device

    def __call__(self, picture: numpy.ndarray, face_box: Box | None = None) -> numpy.ndarray:
        import torch

        with torch.inference_mode():
            logits = self.model(torch.from_numpy(parser_input(picture, self.normalization)).to(self.device))
        return logits.argmax(dim=1)[0].cpu().numpy()  # (S, S)


class GrabCutParser:
    """Person (1) or background (0) by colour, seeded from the face box: needs no download, and knows no other class."""

    SIDE = 256  # where colours are grouped; more only follows noise

    def __call__(self, picture: numpy.ndarray, face_box: Box | None = None) -> numpy.ndarray:
        import cv2

        size = picture.shape[0]
        if face_box is None:
            logger.warning("without a face GrabCut has nothing to start from: the background stays")
            return numpy.ones((size, size), numpy.int64)

        small = cv2.resize(picture, (self.SIDE, self.SIDE), interpolation=cv2.INTER_AREA)
        seeds, is_face = self._seeds(face_box, self.SIDE / size)
        background = numpy.isin(seeds, (cv2.GC_BGD, cv2.GC_PR_BGD))
        if background.all() or not background.any() or not is_face.any():  # nothing to tell apart
            return numpy.ones((size, size), numpy.int64)
        cv2.setRNGSeed(0)  # its k-means draws from OpenCV's global generator
        cv2.grabCut(small, seeds, None, numpy.zeros((1, 65)), numpy.zeros((1, 65)), 6, cv2.GC_INIT_WITH_MASK)
        person = numpy.isin(seeds, (cv2.GC_FGD, cv2.GC_PR_FGD)).astype(numpy.uint8)

        # Only the piece the face is part of, without holes.
        _, pieces = cv2.connectedComponents(person)
        person = (pieces == numpy.bincount(pieces[is_face]).argmax()).astype(numpy.uint8)
        outlines, _ = cv2.findContours(person, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        person = cv2.drawContours(person, outlines, -1, 1, cv2.FILLED)

        smooth = cv2.resize(person.astype(numpy.float32), (size, size), interpolation=cv2.INTER_LINEAR)
        smooth = cv2.GaussianBlur(smooth, (0, 0), size / 170)  # rounds the steps of the enlarged outline
        return (smooth > 0.5).astype(numpy.int64)

    def _seeds(self, face_box: Box | None, scale: float) -> tuple[numpy.ndarray, numpy.ndarray]:
        """GrabCut's four-valued mask from the anatomy of a head, and where surely is face."""
        import cv2

        x1, y1, x2, y2 = (v * scale for v in face_box)
        face_width, face_height = x2 - x1, y2 - y1
        center_x, center_y = (x1 + x2) / 2, (y1 + y2) / 2
        seeds = numpy.full((self.SIDE, self.SIDE), cv2.GC_BGD, numpy.uint8)
        is_face = numpy.zeros_like(seeds)

        def ellipse(target: numpy.ndarray, y: float, radius_x: float, radius_y: float, value: int) -> None:
            center = round(center_x), round(y)
            cv2.ellipse(target, center, (round(radius_x), round(radius_y)), 0, 0, 360, value, cv2.FILLED)

        def below(y: float, left: float, right: float, value: int) -> None:
            cv2.rectangle(seeds, (round(left), round(y)), (round(right), self.SIDE), value, cv2.FILLED)

        wide_hair = center_y - 0.05 * face_height, 1.05 * face_width, 0.85 * face_height
        head = center_y - 0.08 * face_height, 0.72 * face_width, 0.66 * face_height
        features = center_y, 0.45 * face_width, 0.48 * face_height
        ellipse(seeds, *wide_hair, cv2.GC_PR_BGD)
        below(y2 - 0.1 * face_height, 0, self.SIDE, cv2.GC_PR_BGD)  # shoulders
        ellipse(seeds, *head, cv2.GC_PR_FGD)
        below(y2, center_x - 0.45 * face_width, center_x + 0.45 * face_width, cv2.GC_FGD)  # neck and chest
        ellipse(seeds, *features, cv2.GC_FGD)
        ellipse(is_face, *features, 1)
        return seeds, is_face.astype(bool)


def parse_arguments(argv: Sequence[str] | None = None) -> Namespace:
    parser = argparse.ArgumentParser(prog="python -m preprocess.face", description=__doc__.split("\n")[0])
    parser.add_argument("image", help="photo: path or http(s) URL")
    parser.add_argument("--output", required=True, help="PNG to write")
    parser.add_argument("--overwrite", action="store_true", help="replace --output if it exists")
    parser.add_argument("--antelopv2_path", help=f"folder of antelopev2, the face detector ({DETECTOR_PATH})")
    parser.add_argument("--face_parser_path", help=f"weights of BiSeNet, the face parser ({PARSER_PATH})")
    parser.add_argument("--parser_normalisation", choices=NORMALISATIONS, default="half", help="(%(default)s)")
    parser.add_argument("--face_index", type=int, help="which face, from the left, from 0 (the largest)")
    parser.add_argument("--allow_no_face", action="store_true", help="use the whole picture when no face is found")
    parser.add_argument("--no_face_crop", action="store_true", help="not a person: whole picture, background kept")
    parser.add_argument("--size", type=int, default=SIZE, help="side of the output in pixels (%(default)s)")
    parser.add_argument("--mask", choices=MASKS, default="default", help="what becomes white: background; also neck, "
                        "clothes and hat; also hair (%(default)s)")  # fmt: skip
    args = parser.parse_args(argv)
    if not 64 <= args.size <= 4096:
        parser.error(f"--size {args.size}: give 64 to 4096 pixels")
    if os.path.exists(args.output) and not args.overwrite:
        parser.error(f"--output {args.output!r} exists already; choose another name or pass --overwrite")
    return args


def main(args: Namespace) -> None:
    image = read_image(args.image)
    needs_models = not args.no_face_crop
    face = prepare_face(
        image,
        load_detector(args.antelopv2_path) if needs_models else None,
        load_parser(args.face_parser_path, args.parser_normalisation) if needs_models else None,
        face_index=args.face_index,
        allow_no_face=args.allow_no_face,
        crop=needs_models,
        mask=args.mask,
        size=args.size,
        name=repr(args.image),
    )
    write_png(args.output, face.rgb, overwrite=args.overwrite)
    logger.info("%s: crop %s of %s, %dx%d", args.output, face.crop_box, args.image, args.size, args.size)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s", stream=sys.stderr)
    with exit_codes():
        main(parse_arguments())
