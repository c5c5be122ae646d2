"""The skeleton of every person in a frame, drawn on black: DWPose, as VACE is controlled by it.

    draw = PoseDrawer("yolox_l.onnx", "dw-ll_ucoco_384.onnx")
    picture = draw(frame)                                # (H, W, 3) uint8 RGB -> the same size

YOLOX finds people, RTMPose (distilled: DWPose) 133 points on each; both run in onnxruntime. Written from the published
method and VACE's vace/annotators/pose.py. Box decoding, crops, point decoding and drawing are tested with tiny ONNX
graphs that give known answers; the released networks themselves were not run here.
"""

import colorsys
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy

from errors import WeightsError

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

DETECTOR_SIDE = 640
PERSON = 0  # YOLOX's first class
DETECTION_SCORE, OVERLAP, CANDIDATE_SCORE = 0.3, 0.45, 0.1
POINT_SCORE = 0.3
MEAN = numpy.array(
    [123.675, 116.28, 103.53], numpy.float32
)  # RGB's, though the networks are given BGR: so does upstream
STD = numpy.array([58.395, 57.12, 57.375], numpy.float32)
CROP_MARGIN = 1.25
SHORT_SIDE = 1024  # drawn at this size, in multiples of 64, then scaled to the frame's

# Points of COCO-WholeBody: 0-16 body, 17-22 feet, 23-90 face, 91-132 hands. The body in the order of OpenPose, where
# NECK is the middle of the shoulders, 5 and 6: nose, neck, right arm, left arm, right leg, left leg, eyes, ears.
NECK = -1
BODY = (0, NECK, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3)
FACE, HANDS = slice(23, 91), (slice(91, 112), slice(112, 133))

# Pairs of body points, in the order they are drawn, and 18 hues around the wheel for them and for the points.
LIMBS = ((1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13),
         (1, 0), (0, 14), (14, 16), (0, 15), (15, 17))  # fmt: skip
FINGERS = [
    (0 if joint == 0 else 4 * finger + joint, 4 * finger + joint + 1) for finger in range(5) for joint in range(4)
]
COLORS = [tuple(round(255 * v) for v in colorsys.hsv_to_rgb(i / 18, 1, 1)) for i in range(18)]


class PoseDrawer:
    """(H, W, 3) uint8 RGB -> a picture of that size with the people's poses.

    Args:
        detector_path, pose_path: yolox_l.onnx and dw-ll_ucoco_384.onnx.
        face, hands: what is drawn beside the body. VACE's `pose` has faces and no hands, its `pose_body` neither.

    Raises:
        WeightsError: a file that onnxruntime cannot read, or of another network.
    """

    def __init__(self, detector_path: str | Path, pose_path: str | Path, *, face: bool = True, hands: bool = False):
        self.detector = _open_session(detector_path)
        self.pose = _open_session(pose_path)
        self.face, self.hands = face, hands
        shape = self.pose.get_inputs()[0].shape  # (1, 3, height, width)
        if len(shape) != 4 or not all(isinstance(side, int) for side in shape[2:]):
            raise WeightsError(f"{str(pose_path)!r} takes {shape}; a DWPose network takes (N, 3, 384, 288)")
        self.crop_size = shape[3], shape[2]  # width, height

    def __call__(self, frame: numpy.ndarray) -> numpy.ndarray:
        import cv2

        height, width = frame.shape[:2]
        large = resize_for_pose(frame)
        bgr = numpy.ascontiguousarray(large[..., ::-1])
        boxes = self.find_people(bgr)
        if not len(boxes):  # upstream then looks at the whole picture
            boxes = numpy.array([[0, 0, bgr.shape[1], bgr.shape[0]]], numpy.float32)
        people = [self.find_points(bgr, box) for box in boxes]
        canvas = draw_people(people, *large.shape[:2], face=self.face, hands=self.hands)
        enlarges = height * width > canvas.shape[0] * canvas.shape[1]
        return cv2.resize(canvas, (width, height), interpolation=cv2.INTER_LANCZOS4 if enlarges else cv2.INTER_AREA)

    def find_people(self, bgr: numpy.ndarray) -> numpy.ndarray:
        """Boxes (N, 4) of left, top, right, bottom in pixels, the surest first."""
        import cv2

        height, width = bgr.shape[:2]
        scale = min(DETECTOR_SIDE / height, DETECTOR_SIDE / width)
        small = cv2.resize(bgr, (int(width * scale), int(height * scale)), interpolation=cv2.INTER_LINEAR)
        square = numpy.full((DETECTOR_SIDE, DETECTOR_SIDE, 3), 114, numpy.float32)
        square[: small.shape[0], : small.shape[1]] = small
        (rows,) = _run(self.detector, square.transpose(2, 0, 1)[None])  # (1, 8400, 5 + classes)
        boxes, scores = decode_yolox(rows[0])
        scores = scores[:, PERSON]
        candidates = scores > CANDIDATE_SCORE
        boxes, scores = boxes[candidates] / scale, scores[candidates]
        kept = [i for i in keep_distinct(boxes, scores) if scores[i] > DETECTION_SCORE]
        return boxes[kept]

    def find_points(self, bgr: numpy.ndarray, box: numpy.ndarray) -> numpy.ndarray:
        """(133, 3): x and y in pixels, and a score."""
        import cv2

        width, height = self.crop_size
        left, top, right, bottom = (float(v) for v in box)
        center_x, center_y = (left + right) / 2, (top + bottom) / 2
        crop_width = max((right - left) * CROP_MARGIN, (bottom - top) * CROP_MARGIN * width / height)
        scale = width / crop_width
        to_crop = numpy.array([[scale, 0, width / 2 - scale * center_x], [0, scale, height / 2 - scale * center_y]])
        crop = cv2.warpAffine(bgr, to_crop, (width, height), flags=cv2.INTER_LINEAR)
        pixels = ((crop - MEAN) / STD).astype(numpy.float32).transpose(2, 0, 1)[None]  # (1, 3, 384, 288)
        along_x, along_y = _run(self.pose, pixels)  # (1, 133, 2·width), (1, 133, 2·height)
        points = decode_simcc(along_x[0], along_y[0])
        points[:, :2] = (points[:, :2] - to_crop[:, 2]) / scale
        return points


def resize_for_pose(frame: numpy.ndarray) -> numpy.ndarray:
    """Scale the short side to 1024, both sides to multiples of 64."""
    import cv2

    scale = SHORT_SIDE / min(frame.shape[:2])
    height, width = (int(numpy.round(side * scale / 64)) * 64 for side in frame.shape[:2])
    interpolation = cv2.INTER_LANCZOS4 if scale > 1 else cv2.INTER_AREA
    return cv2.resize(frame, (width, height), interpolation=interpolation)


def decode_yolox(rows: numpy.ndarray, side: int = DETECTOR_SIDE) -> tuple[numpy.ndarray, numpy.ndarray]:
    """YOLOX's raw rows (8400, 5 + classes) -> boxes (8400, 4) of left, top, right, bottom, scores (8400, classes).

    A row belongs to a cell of the grids of stride 8, 16 and 32: centre relative to it, log of the size, in strides.
    """
    cells, strides = [], []
    for stride in (8, 16, 32):
        count = side // stride
        y, x = numpy.divmod(numpy.arange(count * count), count)
        cells.append(numpy.stack([x, y], axis=-1))
        strides.append(numpy.full((count * count, 1), stride))
    cells, strides = numpy.concatenate(cells), numpy.concatenate(strides)
    if rows.shape != (len(cells), rows.shape[-1]) or rows.shape[-1] < 6:
        raise WeightsError(f"the person detector gives {rows.shape}, YOLOX gives ({len(cells)}, 85): another network")
    center = (rows[:, :2] + cells) * strides
    half = numpy.exp(rows[:, 2:4]) * strides / 2
    return numpy.concatenate([center - half, center + half], axis=1), rows[:, 4:5] * rows[:, 5:]


def keep_distinct(boxes: numpy.ndarray, scores: numpy.ndarray, most_overlap: float = OVERLAP) -> list[int]:
    """Indices of the boxes, best first, without those that overlap a better one (sides count their last pixel)."""
    left, top, right, bottom = boxes.T
    areas = (right - left + 1) * (bottom - top + 1)
    order, kept = scores.argsort()[::-1], []
    while len(order):
        best, order = order[0], order[1:]
        kept.append(best)
        shared_width = numpy.minimum(right[best], right[order]) - numpy.maximum(left[best], left[order]) + 1
        shared_height = numpy.minimum(bottom[best], bottom[order]) - numpy.maximum(top[best], top[order]) + 1
        shared = shared_width.clip(0) * shared_height.clip(0)
        order = order[shared / (areas[best] + areas[order] - shared) <= most_overlap]
    return kept


def decode_simcc(along_x: numpy.ndarray, along_y: numpy.ndarray) -> numpy.ndarray:
    """Two distributions a point, in half pixels -> (K, 3): x, y in pixels of the crop, the lower of both maxima."""
    if along_x.ndim != 2 or along_y.ndim != 2 or len(along_x) != 133 or len(along_y) != 133:
        raise WeightsError(
            f"the pose network gives {along_x.shape} and {along_y.shape}, DWPose 133 points: another one"
        )
    score = numpy.minimum(along_x.max(axis=1), along_y.max(axis=1))
    x, y = along_x.argmax(axis=1) / 2, along_y.argmax(axis=1) / 2
    return numpy.stack([x, y, score], axis=1).astype(numpy.float64)


def body_points(points: numpy.ndarray) -> numpy.ndarray:
    """(133, 3) -> the 18 of OpenPose, (18, 3); the neck counts as seen when both shoulders are."""
    neck = points[5:7].mean(axis=0)
    neck[2] = float((points[5:7, 2] > POINT_SCORE).all())
    return numpy.stack([neck if i == NECK else points[i] for i in BODY])


def draw_people(
    people: Iterable[numpy.ndarray], height: int, width: int, *, face: bool = True, hands: bool = False
) -> numpy.ndarray:
    """(133, 3) points of each person, in pixels of height x width -> (height, width, 3) uint8 RGB on black.

    The palette is OpenPose's with red and blue swapped, since VACE's annotator flips the channels of what it
    draws. Skeletons of other tools (ControlNet's) are usually not swapped.
    """
    import cv2

    canvas = numpy.zeros((height, width, 3), numpy.uint8)
    bodies = [body_points(points) for points in people]
    for (start, end), color in zip(LIMBS, COLORS, strict=False):
        for body in bodies:
            if min(body[start, 2], body[end, 2]) > POINT_SCORE:
                (x1, y1), (x2, y2) = body[start, :2], body[end, :2]
                middle = int((x1 + x2) / 2), int((y1 + y2) / 2)
                half_length = int(math.hypot(x1 - x2, y1 - y2) / 2)
                angle = int(math.degrees(math.atan2(y1 - y2, x1 - x2)))
                cv2.fillConvexPoly(canvas, cv2.ellipse2Poly(middle, (half_length, 4), angle, 0, 360, 1), color)
    canvas = (canvas * 0.6).astype(numpy.uint8)
    for i, color in enumerate(COLORS):
        for body in bodies:
            if body[i, 2] > POINT_SCORE:
                cv2.circle(canvas, _pixel(body[i]), 4, color, thickness=-1)

    def is_seen(point: numpy.ndarray) -> bool:
        return point[2] >= POINT_SCORE and int(point[0]) > 0 and int(point[1]) > 0

    for points in people:
        for hand in (points[part] for part in HANDS if hands):
            for i, (start, end) in enumerate(FINGERS):
                if is_seen(hand[start]) and is_seen(hand[end]):
                    color = [255 * v for v in colorsys.hsv_to_rgb(i / len(FINGERS), 1, 1)]
                    cv2.line(canvas, _pixel(hand[start]), _pixel(hand[end]), color, thickness=2)
            for point in filter(is_seen, hand):
                cv2.circle(canvas, _pixel(point), 4, (0, 0, 255), thickness=-1)
        for point in filter(is_seen, points[FACE] if face else ()):
            cv2.circle(canvas, _pixel(point), 3, (255, 255, 255), thickness=-1)
    return numpy.ascontiguousarray(canvas[..., ::-1])


def _pixel(point: numpy.ndarray) -> tuple[int, int]:
    return int(point[0]), int(point[1])


def _open_session(path: str | Path) -> "InferenceSession":
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        wanted = ("CUDAExecutionProvider", "CPUExecutionProvider")
        providers = [name for name in wanted if name in onnxruntime.get_available_providers()]
        return onnxruntime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # onnxruntime raises a dozen classes of its own
        reason = str(error).strip().splitlines()[0][:160]
        raise WeightsError(
            f"{str(path)!r} cannot be read ({reason}); fetch it again: python download_models.py --only vace-annotators"
        ) from error


def _run(session: "InferenceSession", pixels: numpy.ndarray) -> list[numpy.ndarray]:
    """All outputs of a network with one input."""
    try:
        return session.run(None, {session.get_inputs()[0].name: numpy.ascontiguousarray(pixels, numpy.float32)})
    except Exception as error:
        reason = str(error).strip().splitlines()[0][:160]
        raise WeightsError(f"the network takes no {pixels.shape} picture ({reason}): another one?") from error
