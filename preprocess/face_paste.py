"""The photo's face laid over the face of every frame of a video, and the mask of where it was laid.

    source = source_keypoints(face.rgba, detector)                       # (5, 2), or None: box mode
    cuts = find_cuts(video)
    faces = fill_gaps(follow_face([detector(frame) for frame in video], cuts=cuts), cuts)
    frame, mask = paste_face(video[i], faces[i], face.rgba, source, parser)

Source: Stand-In's preprocessor/videomask_generator.py, whose numbers `largest_face` and `paste_face` reproduce. The
rest is ours: one person is followed through the video, frames the detector missed are filled in, masks get a soft edge,
and the generated face takes on the light of the frame it is put into.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy

from errors import UsageError
from preprocess.face import Parser, crop_face
from preprocess.face_detection import Box, Detector, Face

CONFIDENCE = 0.5  # a face of a lower score is left alone
FACE_CLASSES = range(1, 14)  # the parser's classes: skin, brows, eyes, glasses, ears, earring, nose, mouth, lips

# ---------------------------------------------------------------------------------------------------------------------
# Shots

CUT_CHANGE = 12.0  # levels of 255: a smaller change from frame to frame is no cut,
CUT_RATIO = 3.0  # nor one that is less than so many times that of its neighbours


def find_cuts(frames: numpy.ndarray) -> list[int]:
    """The frames (F, H, W, 3) uint8 with which a new shot begins.

    The measure is how far red, green and blue change from one frame to the next, on average over pictures shrunk to a
    width of 64 pixels. A cut is a peak of it: above `CUT_CHANGE`, and `CUT_RATIO` times the mean of the two changes
    before and after. So a fast pan, in which all frames change, is none (nor is a cut within one). Fades are not looked
    for.
    """
    import cv2

    if len(frames) < 2:
        return []
    height = max(1, round(64 * frames.shape[1] / frames.shape[2]))
    small = [cv2.resize(frame, (64, height), interpolation=cv2.INTER_AREA).astype(numpy.float32) for frame in frames]
    changes = [numpy.abs(after - before).mean() for before, after in zip(small, small[1:], strict=False)]  # (F - 1,)
    cuts = []
    for i, change in enumerate(changes):
        around = changes[max(i - 2, 0) : i] + changes[i + 1 : i + 3]
        if change > max(CUT_CHANGE, CUT_RATIO * numpy.mean(around or [0.0])):
            cuts.append(i + 1)
    return cuts


# ---------------------------------------------------------------------------------------------------------------------
# Which face


def largest_face(faces: list[Face], confidence: float = CONFIDENCE) -> Face | None:
    """Upstream's choice in a frame: the largest face, and none at all when that one is doubtful."""
    largest = max(faces, key=_area, default=None)
    return largest if largest is not None and largest.score > confidence else None


def follow_face(detections: list[list[Face]], index: int | None = None, cuts: Sequence[int] = ()) -> list[Face | None]:
    """One person through a video: frame by frame the face that overlaps the last one most.

    Args:
        detections: the faces of each frame.
        index: whom to follow, counted from the left from 0 in the first frame that shows faces; where nobody overlaps
            the person's last place, the person is away. None: the largest face, and the largest again after each loss
            and each cut.
        cuts: from `find_cuts`.

    Raises:
        UsageError: that frame has fewer faces.
    """
    followed: list[Face | None] = []
    last = None
    for number, found in enumerate(detections):
        faces = [face for face in found if face.score > CONFIDENCE]
        if number in cuts and index is None:
            last = None
        face = max(faces, key=lambda face: intersection_over_union(face.box, last.box), default=None) if last else None
        if face is not None and intersection_over_union(face.box, last.box) == 0:
            face = None
        if face is None and faces and index is None:
            face = largest_face(faces)
        elif face is None and faces and last is None:
            from_left = sorted(faces, key=lambda face: face.box[0] + face.box[2])
            if index >= len(faces):
                boxes = "; ".join(f"{i}: ({', '.join(f'{v:.0f}' for v in f.box)})" for i, f in enumerate(from_left))
                raise UsageError(
                    f"--target_face_index {index}: frame {number}, the first with faces, has {len(faces)}, "
                    f"counted from the left: {boxes}"
                )
            face = from_left[index]
        followed.append(face)
        last = face or last
    return followed


def fill_gaps(faces: list[Face | None], cuts: Sequence[int] = (), longest: int = 8) -> list[Face | None]:
    """Faces between the frames before and after a short gap in which the detector saw nothing.

    A gap stays when it is longer than `longest` frames, when there is a cut in it, or when the face on its other side
    is somewhere else.
    """
    filled = list(faces)
    known = [i for i, face in enumerate(faces) if face is not None]
    for before, after in zip(known, known[1:], strict=False):
        start, stop = faces[before], faces[after]
        if not 1 < after - before <= longest + 1 or intersection_over_union(start.box, stop.box) == 0:
            continue
        if any(before < cut <= after for cut in cuts):
            continue
        for i in range(before + 1, after):
            share = (i - before) / (after - before)
            box = tuple((1 - share) * a + share * b for a, b in zip(start.box, stop.box, strict=True))
            has_points = start.keypoints is not None and stop.keypoints is not None
            points = (1 - share) * start.keypoints + share * stop.keypoints if has_points else None
            filled[i] = replace(start, box=box, keypoints=points)
    return filled


def intersection_over_union(box: Box, other: Box) -> float:
    """Intersection over union of two boxes."""
    width = min(box[2], other[2]) - max(box[0], other[0])
    height = min(box[3], other[3]) - max(box[1], other[1])
    if width <= 0 or height <= 0:
        return 0.0
    both = width * height
    return both / ((box[2] - box[0]) * (box[3] - box[1]) + (other[2] - other[0]) * (other[3] - other[1]) - both)


def _area(face: Face) -> float:
    x1, y1, x2, y2 = face.box
    return (x2 - x1) * (y2 - y1)


# ---------------------------------------------------------------------------------------------------------------------
# Pasting


def source_keypoints(rgba: numpy.ndarray, detector: Detector) -> numpy.ndarray | None:
    """The five points of the cut-out face (S, S, 4); None where the detector finds none, or gives no points."""
    faces = detector(rgba[..., :3])
    return faces[0].keypoints if faces else None


def align(source: numpy.ndarray | None, target: numpy.ndarray | None) -> numpy.ndarray | None:
    """The rotation, scale and shift (2, 3) that bring source points (5, 2) to target points; None without points.

    OpenCV draws its samples from a generator of its own with a fixed seed: the same points give the same matrix.
    """
    import cv2

    if source is None or target is None:
        return None
    return cv2.estimateAffinePartial2D(numpy.float32(source), numpy.float32(target), method=cv2.LMEDS)[0]


def paste_face(
    frame: numpy.ndarray,
    face: Face,
    rgba: numpy.ndarray,
    source: numpy.ndarray | None = None,
    parser: Parser | None = None,
) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Lay the photo's face over one frame.

    Args:
        frame: (H, W, 3) uint8 RGB.
        face: the `Face` to cover; None leaves the frame.
        rgba: (S, S, 4) uint8, the cut-out face of the photo.
        source: its five points; without them, or where the points do not fit, the face is stretched to the box.
        parser: of the frame's face, for box mode.

    Returns:
        the frame (H, W, 3), and the mask of what was laid over it (H, W), uint8.
    """
    if face is None:
        return frame, numpy.zeros(frame.shape[:2], numpy.uint8)
    matrix = align(source, face.keypoints)
    return paste_in_box(frame, face, rgba, parser) if matrix is None else paste_aligned(frame, matrix, rgba)


def paste_aligned(
    frame: numpy.ndarray, matrix: numpy.ndarray, rgba: numpy.ndarray
) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Turned, scaled and shifted by `matrix`; the mask is the photo's own alpha, so the whole head."""
    warped = warp(rgba, matrix, *frame.shape[:2])
    warped, mask = warped[..., :3], warped[..., 3]
    alpha = mask[..., None].astype(numpy.float32) / 255
    return ((1 - alpha) * frame + alpha * warped).astype(numpy.uint8), mask  # truncated, as upstream


def warp(picture: numpy.ndarray, matrix: numpy.ndarray, height: int, width: int) -> numpy.ndarray:
    """Bilinear, zeros outside: (h, w, C) uint8 -> (height, width, C) uint8.

    cv2.warpAffine rounds positions to 1/32 pixel in some builds and not in others, which moves an edge by up to four
    levels. This is exact everywhere.
    """
    import cv2

    rows, columns = picture.shape[:2]
    padded = numpy.pad(picture, ((1, 2), (1, 2), (0, 0))).astype(numpy.float32)
    corners = numpy.array([[-1, -1, 1], [columns, -1, 1], [-1, rows, 1], [columns, rows, 1]]) @ numpy.float64(matrix).T
    left, top = numpy.clip(numpy.floor(corners.min(axis=0)), 0, (width, height)).astype(int)
    right, bottom = numpy.clip(numpy.ceil(corners.max(axis=0)) + 1, 0, (width, height)).astype(int)
    x, y = numpy.meshgrid(numpy.arange(left, right), numpy.arange(top, bottom))
    inverse = cv2.invertAffineTransform(numpy.float64(matrix))
    source_x, source_y = (
        numpy.clip(a * x + b * y + c + 1, 0, size + 1) for (a, b, c), size in zip(inverse, (columns, rows), strict=True)
    )
    x0, y0 = source_x.astype(int), source_y.astype(int)
    share_x, share_y = (numpy.float32(source_x - x0)[..., None], numpy.float32(source_y - y0)[..., None])
    above = padded[y0, x0] * (1 - share_x) + padded[y0, x0 + 1] * share_x
    below = padded[y0 + 1, x0] * (1 - share_x) + padded[y0 + 1, x0 + 1] * share_x
    warped = numpy.zeros((height, width, picture.shape[2]), numpy.uint8)
    warped[top:bottom, left:right] = numpy.rint(above * (1 - share_y) + below * share_y)
    return warped


def paste_in_box(
    frame: numpy.ndarray,
    face: Face,
    rgba: numpy.ndarray,
    parser: Parser,
    *,
    face_crop_scale: float = 1.5,
    dilation: int = 10,
    feather: int = 21,
    own_alpha: bool = True,
) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Stretched over the square box around the face, within the soft outline of the face that is there.

    Args:
        parser, face_crop_scale, dilation, feather: how that outline is found; upstream's numbers.
        own_alpha: keep also within the outline of the photo's face. Upstream does not: where the photo's face is the
            smaller one, the photo's background shows, and a dark fringe.
    """
    import cv2
    from PIL import Image

    crop = crop_face(frame, face, border_thresh=-1, face_crop_scale=face_crop_scale)
    left, top, right, bottom = crop.box
    mask = numpy.zeros(frame.shape[:2], numpy.uint8)
    if right <= left or bottom <= top:
        return frame, mask
    size = (right - left, bottom - top)
    target = cv2.resize(frame[top:bottom, left:right], (512, 512), interpolation=cv2.INTER_AREA)
    scale_x, scale_y = 512 / size[0], 512 / size[1]
    x1, y1, x2, y2 = face.box
    box = (x1 - left) * scale_x, (y1 - top) * scale_y, (x2 - left) * scale_x, (y2 - top) * scale_y
    is_face = numpy.isin(parser(target, box), FACE_CLASSES).astype(numpy.uint8) * 255
    is_face = cv2.dilate(is_face, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (dilation, dilation)))
    is_face = cv2.GaussianBlur(is_face, (feather, feather), 0)
    outline = cv2.resize(is_face, size, interpolation=cv2.INTER_LINEAR)
    stretched = Image.fromarray(numpy.ascontiguousarray(rgba)).resize(size, Image.LANCZOS)
    if own_alpha:
        outline = numpy.minimum(outline, numpy.asarray(stretched)[..., 3])
    mask[top:bottom, left:right] = outline

    pasted = Image.fromarray(frame)
    pasted.paste(stretched.convert("RGB"), (left, top), Image.fromarray(outline))
    return numpy.asarray(pasted), mask


# ---------------------------------------------------------------------------------------------------------------------
# Masks and the composite


def pad_to_multiple(frame: numpy.ndarray, multiple: int) -> numpy.ndarray:
    """Repeat the last rows and columns until both sides are multiples; cut off again after generation."""
    height, width = frame.shape[:2]
    return numpy.pad(frame, ((0, -height % multiple), (0, -width % multiple), (0, 0)), mode="edge")


def crop_to_multiple(video: numpy.ndarray, multiple: int = 16) -> numpy.ndarray:
    """Upstream's way instead: the centre of every frame, with sides rounded down. (F, H, W, C)"""
    height, width = (side // multiple * multiple for side in video.shape[1:3])
    top, left = (video.shape[1] - height) // 2, (video.shape[2] - width) // 2
    return video[:, top : top + height, left : left + width]


def soften(mask: numpy.ndarray, radius: int = 12) -> numpy.ndarray:
    """Widen a mask (H, W) uint8 by `radius` pixels and give it a soft edge that reaches as far again."""
    import cv2

    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1))
    return cv2.GaussianBlur(cv2.dilate(mask, disc), (2 * radius + 1, 2 * radius + 1), 0)


def match_colors(
    generated: numpy.ndarray, original: numpy.ndarray, region: numpy.ndarray, strength: float = 0.75
) -> numpy.ndarray:
    """Bring the mean and spread of a region's L, a and b to the original's, by `strength`. (H, W, 3) uint8."""
    import cv2

    if region.sum() < 16:
        return generated
    lab, wanted = (
        cv2.cvtColor(picture.astype(numpy.float32) / 255, cv2.COLOR_RGB2LAB) for picture in (generated, original)
    )
    mean, spread = lab[region].mean(axis=0), lab[region].std(axis=0)
    wanted_mean, wanted_spread = wanted[region].mean(axis=0), wanted[region].std(axis=0)
    # A flat region has no spread to stretch; more than doubling it would only show noise.
    gain = numpy.clip(wanted_spread / numpy.maximum(spread, 1e-3), 0.5, 2)
    matched = (lab - mean) * gain + wanted_mean
    mixed = (lab + strength * (matched - lab)).astype(numpy.float32)
    return numpy.rint(numpy.clip(cv2.cvtColor(mixed, cv2.COLOR_LAB2RGB), 0, 1) * 255).astype(numpy.uint8)


def composite(original: numpy.ndarray, generated: numpy.ndarray, mask: numpy.ndarray) -> numpy.ndarray:
    """The generated face in the original frame: colours matched, soft at the edge, untouched where the mask is 0."""
    alpha = mask[..., None].astype(numpy.float32) / 255
    generated = match_colors(generated, original, mask > 127)
    mixed = numpy.rint(original + alpha * (generated.astype(numpy.float32) - original)).astype(numpy.uint8)
    return numpy.where(mask[..., None] > 0, mixed, original)
