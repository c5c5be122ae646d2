"""The five points of a face as the picture that IdentityNet is given, and the sizes and framing that go with it.

    picture = resize_picture(photo)                      # InstantID's sizes: the long side 1280, multiples of 64
    face = choose_face(detector(picture))
    drawn = draw_keypoints(face.keypoints, *picture.shape[:2])

Source: InstantID `pipeline_stable_diffusion_xl_instantid.py` (draw_kps), `infer.py` (resize_img).
"""

import math

import numpy

from preprocess.face_detection import Box

# The eye at the left of the picture, the other eye, the nose, the mouth's corners.
COLOURS = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255)
NOSE = 2
# In pixels, whatever the picture's size: IdentityNet learnt them at about one megapixel, so draw at the final size.
POINT_RADIUS = 10
LIMB_HALF_WIDTH = 4


def draw_keypoints(keypoints: numpy.ndarray, height: int, width: int) -> numpy.ndarray:
    """(5, 2) x, y -> (height, width, 3) uint8 RGB on black: a limb from each point to the nose, then the points."""
    import cv2

    canvas = numpy.zeros((height, width, 3))
    for index in (0, 1, 3, 4):
        point, nose = keypoints[index], keypoints[NOSE]
        # Truncated, not rounded, and in this order of sums: the drawing is equal to the authors' pixel by pixel.
        center = tuple(int(v) for v in numpy.mean([point, nose], axis=0))
        length = math.hypot(point[0] - nose[0], point[1] - nose[1])
        angle = int(math.degrees(math.atan2(point[1] - nose[1], point[0] - nose[0])))
        limb = cv2.ellipse2Poly(center, (int(length / 2), LIMB_HALF_WIDTH), angle, 0, 360, 1)
        cv2.fillConvexPoly(canvas, limb, COLOURS[index])
    canvas = (canvas * 0.6).astype(numpy.uint8)
    for (x, y), color in zip(keypoints, COLOURS, strict=True):
        cv2.circle(canvas, (int(x), int(y)), POINT_RADIUS, color, -1)
    return canvas


def resize_picture(
    picture: numpy.ndarray,
    *,
    size: tuple[int, int] | None = None,
    max_side: int = 1280,
    min_side: int = 1024,
    multiple: int = 64,
    pad_to_square: bool = False,
) -> numpy.ndarray:
    """Scale a photo as InstantID's scripts do: its long side becomes `max_side`, both sides multiples of `multiple`.

    It is resampled twice, bilinearly, as theirs is: the keypoints found on it depend on that.

    Args:
        picture: (H, W, 3) uint8.
        size: (width, height), instead of the rule.
        pad_to_square: centre the result on a white square of `max_side`.
    """
    import PIL.Image

    picture = PIL.Image.fromarray(picture)
    if size is None:
        width, height = picture.size
        ratio = min_side / min(width, height)
        width, height = round(ratio * width), round(ratio * height)
        ratio = max_side / max(width, height)
        width, height = round(ratio * width), round(ratio * height)
        picture = picture.resize((width, height), PIL.Image.BILINEAR)
        size = width // multiple * multiple, height // multiple * multiple
    resized = numpy.array(picture.resize(tuple(size), PIL.Image.BILINEAR))
    if not pad_to_square:
        return resized
    square = numpy.full((max_side, max_side, 3), 255, numpy.uint8)
    left, top = (max_side - size[0]) // 2, (max_side - size[1]) // 2
    square[top : top + size[1], left : left + size[0]] = resized
    return square


def frame_face(
    keypoints: numpy.ndarray,
    box: Box,
    height: int,
    width: int,
    *,
    face_height: float,
    center: tuple[float, float],
    roll: float,
) -> tuple[numpy.ndarray, Box]:
    """Move a face to where it should be in a frame, by turning, scaling and shifting it.

    Args:
        keypoints: (5, 2), and `box` (x1, y1, x2, y2), of any picture.
        height, width: of the frame.
        face_height: of the box, as a share of the frame's height.
        centre: of the box, x and y as shares of the frame's sides.
        roll: degrees from one eye to the other, clockwise; 0 is level.

    Returns:
        the keypoints and the box in the frame; the box is upright again around the turned one.
    """
    keypoints = numpy.asarray(keypoints, numpy.float64)
    x1, y1, x2, y2 = box
    across, down = keypoints[1] - keypoints[0]
    turn = math.radians(roll) - math.atan2(down, across)
    scale = face_height * height / (y2 - y1)
    matrix = scale * numpy.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    target = numpy.array([center[0] * width, center[1] * height])
    moved = (keypoints - ((x1 + x2) / 2, (y1 + y2) / 2)) @ matrix.T + target
    half = scale / 2 * numpy.array([x2 - x1, y2 - y1])
    return moved, (*(target - half).tolist(), *(target + half).tolist())


def box_mask(box: Box, height: int, width: int) -> numpy.ndarray:
    """(height, width) float32: 1 inside the box (truncated to whole pixels), 0 outside."""
    x1, y1, x2, y2 = (int(v) for v in box)
    mask = numpy.zeros((height, width), numpy.float32)
    mask[max(y1, 0) : max(y2, 0), max(x1, 0) : max(x2, 0)] = 1
    return mask
