"""Control videos and masks for VACE that need no model.

    video, mask = outpaint(frames, ["left", "right"], 0.25)
    video, mask = keep_frames(frames, [0, len(frames) - 1])              # first and last frame kept, the rest made
    video = flow_map(frames)                                             # a control video; its mask is all white

Frames are (F, H, W, 3) uint8 RGB; masks (F, H, W) uint8, 255 = the model makes it, 0 = kept. What is to be made is
grey 128, the middle of the model's range.

Rules are those of VACE's vace/annotators. Where those hold a plain slip, the default is mended and `upstream=True`
computes what upstream does: grey by the weights of the wrong channel order, a box that stops short of its end, an
outpainting mask that keeps one grey row and column, a dilation that loses a pixel to the left and top, and a flow map
that turns the noise of a still picture into full colour.
"""

import math
from collections.abc import Iterator, Sequence

import numpy

from errors import InputError, UsageError

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels
Composed = tuple[str, numpy.ndarray, numpy.ndarray | None]  # task, frames, masks

GREY = 128
MADE, KEPT = 255, 0
SIDES = ("left", "right", "up", "down")
MASK_SHAPES = ("original", "original_expand", "hull", "hull_expand", "bbox", "bbox_expand")

# How a control video joins another (VACE's composition): what kind of thing each task makes.
COMPOSITION_KINDS = {
    "repaint": ("inpainting", "outpainting"),
    "extension": ("frameref", "clipref"),
    "control": ("depth", "flow", "gray", "pose", "scribble", "layout"),
}

# ---------------------------------------------------------------------------------------------------------------------
# Maps of the whole picture


def gray_map(frames: numpy.ndarray, *, upstream: bool = False) -> numpy.ndarray:
    """Luminance in three equal channels, (F, H, W, 3). Upstream takes red for blue in its weights."""
    import cv2

    conversion = cv2.COLOR_BGR2GRAY if upstream else cv2.COLOR_RGB2GRAY
    return numpy.stack([numpy.repeat(cv2.cvtColor(frame, conversion)[..., None], 3, axis=-1) for frame in frames])


def optical_flow(frames: numpy.ndarray) -> Iterator[numpy.ndarray]:
    """Movement from each frame to the next in pixels, F - 1 times (H, W, 2) float32, x to the right and y down.

    Dense inverse search of OpenCV. VACE uses RAFT, whose edges are sharper; this needs no weights.
    """
    import cv2

    height, width = frames.shape[1:3]
    if min(height, width) < 16:
        raise InputError(
            f"frames of {width}x{height} are too small to measure movement in; 16 pixels a side are needed"
        )
    search = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    before = None
    for frame in frames:
        after = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
        if before is not None:
            yield search.calc(before, after, None)
        before = after


def flow_map(frames: numpy.ndarray, *, upstream: bool = False) -> numpy.ndarray:
    """Movement as colour, (F, H, W, 3): hue its direction, saturation its speed. The first map is shown twice.

    White is stillness, and each map's fastest pixel is fully saturated, as RAFT shows it; but movement of less than a
    pixel stays pale, so that a still picture is white. `upstream=True` saturates that too.
    """
    maps = numpy.full_like(frames, 255)
    for i, flow in enumerate(optical_flow(frames)):
        maps[i + 1] = flow_to_color(flow, 1e-5 if upstream else 1.0)
    maps[:1] = maps[1:2] if len(frames) > 1 else 255
    return maps


def flow_to_color(flow: numpy.ndarray, least_speed: float = 1.0) -> numpy.ndarray:
    """(H, W, 2) movement -> (H, W, 3) uint8 by the wheel of Baker et al. 2011, scaled to the fastest pixel.

    Args:
        least_speed: pixels; what counts as full speed at least.
    """
    speed = numpy.hypot(flow[..., 0], flow[..., 1])
    x, y = numpy.moveaxis(flow / max(float(speed.max()), least_speed), -1, 0)
    wheel = color_wheel()  # (55, 3)
    position = (numpy.arctan2(-y, -x) / numpy.pi + 1) / 2 * (len(wheel) - 1)
    below = numpy.floor(position).astype(int)
    above = (below + 1) % len(wheel)
    part = (position - below)[..., None]
    hue = wheel[below] * (1 - part) + wheel[above] * part
    saturation = numpy.minimum(numpy.hypot(x, y), 1)[..., None]
    return numpy.floor(255 * (1 - saturation * (1 - hue))).astype(numpy.uint8)


def color_wheel() -> numpy.ndarray:
    """(55, 3) in [0, 1]: red, yellow, green, cyan, blue, magenta and back, in steps that look even."""
    corners = numpy.array([[1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 1, 1], [0, 0, 1], [1, 0, 1], [1, 0, 0]], float)
    steps = (15, 6, 4, 11, 13, 6)
    wheel = []
    for start, end, count in zip(corners, corners[1:], steps, strict=False):
        part = numpy.floor(255 * numpy.arange(count) / count)[:, None] / 255  # the reference tables have 255 levels
        wheel.append(numpy.where(end > start, part, numpy.where(end < start, 1 - part, start)))
    return numpy.concatenate(wheel)


# ---------------------------------------------------------------------------------------------------------------------
# Layout


def layout_boxes(
    start_box: Box,
    end_box: Box,
    num_frames: int,
    height: int,
    width: int,
    color: Sequence[int] = (0, 0, 0),
    *,
    upstream: bool = False,
) -> numpy.ndarray:
    """An empty box that moves evenly from start to end, drawn 2 pixels wide on white, (F, H, W, 3).

    Args:
        start_box, end_box: left, top, right, bottom. The last frame has the end (upstream: one step before it).
        color: RGB (upstream: BGR).
    """
    import cv2

    start, end = (numpy.array([x1, y1, x2 - x1, y2 - y1], numpy.float32) for x1, y1, x2, y2 in (start_box, end_box))
    step = (end - start) / (num_frames if upstream else max(num_frames - 1, 1))
    frames = numpy.full((num_frames, height, width, 3), 255, numpy.uint8)
    for i, frame in enumerate(frames):
        box = start + step * i
        x, y, w, h = (int(v) for v in (box if upstream else numpy.rint(box)))
        cv2.rectangle(frame, (x, y), (x + w, y + h), [int(v) for v in color], 2)
    return numpy.ascontiguousarray(frames[..., ::-1]) if upstream else frames


def layout_contours(mask: numpy.ndarray, color: Sequence[int] = (0, 0, 0)) -> numpy.ndarray:
    """The outlines of a mask, 3 pixels wide on white, (F, H, W, 3): layout_track of given masks."""
    import cv2

    frames = numpy.full((*mask.shape, 3), 255, numpy.uint8)
    for frame, plane in zip(frames, binary_mask(mask), strict=True):
        contours, _ = cv2.findContours(plane, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
        cv2.drawContours(frame, contours, -1, [int(v) for v in color], thickness=3)
    return frames


# ---------------------------------------------------------------------------------------------------------------------
# Frames that are kept, others made


def keep_frames(frames: numpy.ndarray, kept: Sequence[int]) -> tuple[numpy.ndarray, numpy.ndarray]:
    """(frames, masks): those whose index is in `kept` stay, the others become grey."""
    is_made = numpy.ones(len(frames), bool)
    is_made[list(kept)] = False
    return _make(frames, numpy.broadcast_to(is_made[:, None, None], frames.shape[:3]))


def extend_frames(
    before: numpy.ndarray | None, num_made: int, after: numpy.ndarray | None = None
) -> tuple[numpy.ndarray, numpy.ndarray]:
    """(frames, masks): `num_made` grey frames between two clips, either of which may be None or one frame long.

    A clip of another size than `before` is scaled to fit into it and centred on white.
    """
    assert before is not None or after is not None
    size = (before if before is not None else after).shape[1:3]
    parts = [] if before is None else [before]
    parts.append(numpy.full((num_made, *size, 3), GREY, numpy.uint8))
    if after is not None:
        parts.append(numpy.stack([fit_on_white(frame, *size) for frame in after]))
    is_made = numpy.concatenate([numpy.full(len(part), i == (before is not None)) for i, part in enumerate(parts)])
    return _make(numpy.concatenate(parts), numpy.broadcast_to(is_made[:, None, None], (len(is_made), *size)))


def fit_on_white(frame: numpy.ndarray, height: int, width: int) -> numpy.ndarray:
    """Scale a frame to fit into height x width and centre it on white; of that size already, it stays as it is."""
    import cv2

    if frame.shape[:2] == (height, width):
        return frame
    scale = min(height / frame.shape[0], width / frame.shape[1])
    new_height, new_width = (max(1, int(side * scale)) for side in frame.shape[:2])
    canvas = numpy.full((height, width, 3), 255, numpy.uint8)
    top, left = (height - new_height) // 2, (width - new_width) // 2
    canvas[top : top + new_height, left : left + new_width] = cv2.resize(
        frame, (new_width, new_height), interpolation=cv2.INTER_AREA
    )
    return canvas


# ---------------------------------------------------------------------------------------------------------------------
# Areas that are made, others kept


def inpaint_mask(frames: numpy.ndarray, mask: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray]:
    """(frames, masks): grey where the mask, (F, H, W), (1, H, W) or (H, W), is not 0."""
    return _make(frames, numpy.broadcast_to(numpy.asarray(mask) > 0, frames.shape[:3]))


def inpaint_box(frames: numpy.ndarray, box: Box) -> tuple[numpy.ndarray, numpy.ndarray]:
    """(frames, masks): grey within left, top, right, bottom; what is outside the picture is cut off."""
    height, width = frames.shape[1:3]
    left, top = (int(max(0, v)) for v in box[:2])
    right, bottom = int(min(width, box[2])), int(min(height, box[3]))
    is_made = numpy.zeros(frames.shape[:3], bool)
    is_made[:, top : max(bottom, 0), left : max(right, 0)] = True
    return _make(frames, is_made)


def outpaint(
    frames: numpy.ndarray, sides: Sequence[str] = SIDES, ratio: float = 0.25
) -> tuple[numpy.ndarray, numpy.ndarray]:
    """(frames, masks) enlarged by a grey border on the named sides, int(ratio x width or height) pixels each."""
    left, right, up, down = _border(frames, sides, ratio)
    around = (0, 0), (up, down), (left, right)
    masks = numpy.pad(numpy.zeros(frames.shape[:3], numpy.uint8), around, constant_values=MADE)
    return numpy.pad(frames, (*around, (0, 0)), constant_values=GREY), masks


def outpaint_inner(
    frames: numpy.ndarray, sides: Sequence[str] = SIDES, ratio: float = 0.25, *, upstream: bool = False
) -> tuple[numpy.ndarray, numpy.ndarray]:
    """(frames, masks) of the same size: the border on the named sides becomes grey and is made anew.

    Upstream's mask keeps one column right and one row below of what it has painted grey.
    """
    height, width = frames.shape[1:3]
    left, right, up, down = _border(frames, sides, ratio)
    if left + right >= width or up + down >= height:
        raise UsageError(f"expand_ratio is {ratio}: nothing of the picture is left; give less than 0.5")
    is_made = numpy.ones(frames.shape[:3], bool)
    is_made[:, up : height - down, left : width - right] = False
    video, masks = _make(frames, is_made)
    if upstream:
        masks[:, up : height - down + 1, left : width - right + 1] = KEPT
    return video, masks


def _border(frames: numpy.ndarray, sides: Sequence[str], ratio: float) -> tuple[int, int, int, int]:
    """Pixels added left, right, up, down."""
    unknown = [side for side in sides if side not in SIDES]
    if unknown or not sides:
        raise UsageError(f"direction is {', '.join(sides) or 'empty'}; give one or more of {', '.join(SIDES)}")
    if not 0 < ratio <= 4:
        raise UsageError(f"expand_ratio is {ratio}; give a share of the picture's size, 0.25 for instance, at most 4")
    height, width = frames.shape[1:3]
    lengths = {"left": width, "right": width, "up": height, "down": height}
    return [int(ratio * length) if side in sides else 0 for side, length in lengths.items()]


def _make(frames: numpy.ndarray, is_made: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Paint grey what is to be made, (F, H, W) bool, and give its mask."""
    return numpy.where(is_made[..., None], numpy.uint8(GREY), frames), numpy.where(
        is_made, numpy.uint8(MADE), numpy.uint8(KEPT)
    )


# ---------------------------------------------------------------------------------------------------------------------
# Masks


def binary_mask(mask: numpy.ndarray) -> numpy.ndarray:
    """Grey levels -> 0 and 255, cut at half: video codecs leave values between."""
    return numpy.where(numpy.asarray(mask) > 127, numpy.uint8(MADE), numpy.uint8(KEPT))


def reshape_mask(
    mask: numpy.ndarray,
    shape: str = "original",
    *,
    expand_ratio: float = 0.3,
    iterations: int = 5,
    reach: tuple[float, ...] = (1, 1, 1, 1),
    upstream: bool = False,
) -> numpy.ndarray:
    """Make masks coarser (VACE's mask augmentation), so that they do not give away the shape of what goes, (F, H, W).

    Args:
        mask: (F, H, W) uint8, made where it is not 0.
        shape: of `MASK_SHAPES`: as it is, its convex hull or its bounding box; `_expand` grows it.
        expand_ratio: how far it may grow, of its own width and height; never more than half way to the border.
        iterations: in how many steps.
        reach: shares of that for left, right, top, bottom. Upstream draws them at random.
        upstream: lose a pixel a step to the left or top where that reach is the largest.
    """
    if shape not in MASK_SHAPES:
        raise UsageError(f"maskaug_mode is {shape!r}; give one of {', '.join(MASK_SHAPES)}")
    if not (expand_ratio >= 0 and iterations >= 1):
        raise UsageError(
            f"maskaug_ratio is {expand_ratio}, in {iterations} steps; give 0 or more, in at least one step"
        )
    planes = []
    for plane in mask:
        rows, columns = plane.nonzero()
        if len(rows):
            box = int(columns.min()), int(rows.min()), int(columns.max()), int(rows.max())
            if shape.startswith("hull"):
                plane = _hull(plane)
            elif shape.startswith("bbox"):
                plane = numpy.zeros_like(plane, numpy.uint8)
                plane[box[1] : box[3] + 1, box[0] : box[2] + 1] = MADE
            if shape.endswith("_expand") and expand_ratio:
                plane = _expand(plane.astype(numpy.uint8), box, expand_ratio, iterations, reach, upstream)
        planes.append(plane.astype(numpy.uint8))
    return numpy.stack(planes)


def _hull(plane: numpy.ndarray) -> numpy.ndarray:
    """The convex hull of everything in one mask, filled."""
    import cv2
    import PIL.Image
    import PIL.ImageDraw

    contours, _ = cv2.findContours(plane.astype(numpy.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    corners = cv2.convexHull(numpy.concatenate(contours), clockwise=True)[:, 0]
    image = PIL.Image.new("L", plane.shape[::-1], KEPT)
    draw = PIL.ImageDraw.Draw(image)
    points = [tuple(point) for point in corners.astype(float).tolist()]
    draw.polygon(points, fill=MADE) if len(points) > 1 else draw.point(points, fill=MADE)
    return numpy.array(image)


def _expand(
    plane: numpy.ndarray, box: Box, ratio: float, iterations: int, reach: tuple[float, ...], upstream: bool
) -> numpy.ndarray:
    """Dilate by a rectangle that reaches differently far to each side of its anchor."""
    import cv2

    height, width = plane.shape
    left, top, right, bottom = box
    grow_x, grow_y = (right - left + 1) * ratio, (bottom - top + 1) * ratio
    margins = (
        min(grow_x, left / 2),
        min(grow_x, (width - right) / 2),
        min(grow_y, top / 2),
        min(grow_y, (height - bottom) / 2),
    )
    to_left, to_right, to_top, to_bottom = (
        int(share * margin / iterations) for share, margin in zip(reach, margins, strict=True)
    )
    half = max(to_left, to_right, to_top, to_bottom)
    if half == 0:
        return plane
    # A pixel becomes white when the kernel over it meets white: what reaches left lies right of the anchor.
    side = 2 * half if upstream else 2 * half + 1
    kernel = numpy.zeros((side, side), numpy.uint8)
    kernel[half - to_bottom : half + to_top + 1, half - to_right : half + to_left + 1] = 1
    return cv2.dilate(plane, kernel, anchor=(half, half), iterations=iterations)


# ---------------------------------------------------------------------------------------------------------------------
# Two into one


def composition_kind(task: str) -> str:
    """repaint, extension or control, of one of those or of a task's name.

    Raises:
        UsageError: neither.
    """
    for kind, tasks in COMPOSITION_KINDS.items():
        if task == kind or task in tasks:
            return kind
    known = [*COMPOSITION_KINDS, *(task for tasks in COMPOSITION_KINDS.values() for task in tasks)]
    raise UsageError(f"composition of {task!r}; give two of {', '.join(known)}")


def compose(first: Composed, second: Composed) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Join two control videos of one size, (task, frames, masks) each; the shorter ends it. -> (frames, masks)

    An extension keeps its frames and lends the other the rest. A control fills what a repaint leaves to be made. Of
    two alike, or with an extension in second place, the second is laid over the first where its mask is white.
    """
    (task, frames, masks), (other_task, other_frames, other_masks) = first, second
    kinds = composition_kind(task), composition_kind(other_task)
    if frames.shape[1:] != other_frames.shape[1:]:
        sizes = [f"{f.shape[2]}x{f.shape[1]}" for f in (frames, other_frames)]
        raise InputError(f"composition of {sizes[0]} and {sizes[1]}; make both videos of one size")
    length = min(map(len, (frames, masks, other_frames, other_masks)))
    frames, other_frames = frames[:length], other_frames[:length]
    is_made, other_is_made = masks[:length] > 127, other_masks[:length] > 127

    if kinds == ("control", "repaint"):  # the repaint decides, wherever it stands
        frames, other_frames, is_made, other_is_made = other_frames, frames, other_is_made, is_made
    if kinds[0] == "extension":
        takes_other, made = is_made, is_made & other_is_made
    elif set(kinds) == {"repaint", "control"}:
        takes_other, made = is_made, is_made
    else:
        takes_other, made = other_is_made, is_made | other_is_made
    return numpy.where(takes_other[..., None], other_frames, frames), numpy.where(
        made, numpy.uint8(MADE), numpy.uint8(KEPT)
    )


def next_wan_length(num_frames: int) -> int:
    """The nearest number of frames that Wan takes, 4n + 1, from above."""
    return math.ceil((num_frames - 1) / 4) * 4 + 1
