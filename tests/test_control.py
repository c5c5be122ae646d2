"""Control maps: closed forms for boxes and masks, known movements, tiny networks with known answers, and the command.

The released weights of DWPose, Depth Anything and the line drawing network are not run: small ONNX graphs and random
models stand in, so what surrounds the networks is tested, not what they see.
"""

import itertools
import subprocess
import sys
import time
import types

import cv2
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from errors import InputError, ResourceError, UsageError, WeightsError
from preprocess import control, pose
from preprocess.control_maps import (
    color_wheel,
    compose,
    extend_frames,
    fit_on_white,
    flow_map,
    flow_to_color,
    gray_map,
    inpaint_box,
    inpaint_mask,
    keep_frames,
    layout_boxes,
    layout_contours,
    optical_flow,
    outpaint,
    outpaint_inner,
    reshape_mask,
)
from preprocess.record import read_metadata
from preprocess.video import probe, read_frames
from preprocess.video_writer import write_video

RED, YELLOW, VIOLET = (255, 0, 0), (255, 255, 0), (128, 0, 255)


@pytest.fixture
def frames():
    return np.random.default_rng(0).integers(1, 100, (5, 24, 32, 3), dtype=np.uint8)  # no grey 128 and no white in it


@pytest.fixture(scope="module")
def texture():
    noise = np.random.default_rng(1).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    return cv2.normalize(cv2.GaussianBlur(noise, (0, 0), 2, borderType=cv2.BORDER_WRAP), None, 0, 255, cv2.NORM_MINMAX)


# ------------------------------------------------------------------------------------------------ maps of the picture


def test_gray_weighs_red_as_red():
    colors = np.array([[[[255, 0, 0], [0, 255, 0], [0, 0, 255]]]], np.uint8)
    assert gray_map(colors)[0, 0, :, 0].tolist() == [76, 150, 29]  # 0.299, 0.587, 0.114 of 255
    assert gray_map(colors, upstream=True)[0, 0, :, 0].tolist() == [29, 150, 76]
    assert np.ptp(gray_map(colors), axis=-1).max() == 0


def test_the_wheel_goes_once_around():
    wheel = color_wheel()
    assert wheel.shape == (55, 3)
    assert np.array_equal(
        wheel[[0, 15, 21, 25, 36, 49]], [(1, 0, 0), (1, 1, 0), (0, 1, 0), (0, 1, 1), (0, 0, 1), (1, 0, 1)]
    )
    assert np.abs(np.diff(wheel, axis=0)).max() <= 0.2511


@pytest.mark.parametrize(
    ("movement", "color"), [((3, 0), RED), ((0, 3), YELLOW), ((-3, 0), (0, 209, 255)), ((0, -3), VIOLET)]
)
def test_flow_of_a_known_shift(texture, movement, color):
    shifted = np.roll(texture, (movement[1], movement[0]), axis=(0, 1))
    (flow,) = optical_flow(np.stack([texture, shifted]))
    assert np.abs(np.median(flow[20:-20, 20:-20], axis=(0, 1)) - movement).max() < 0.2

    maps = flow_map(np.stack([texture, shifted, np.roll(shifted, (movement[1], movement[0]), axis=(0, 1))]))
    assert maps.shape == (3, 96, 96, 3)
    assert np.array_equal(maps[0], maps[1])  # shown twice
    pure = flow_to_color(np.array([[movement]], np.float32))[0, 0].astype(int)
    assert np.abs(pure - color).max() <= 45  # the direction's hue
    shown = np.median(maps[2][20:-20, 20:-20], axis=(0, 1))
    assert np.abs(shown - pure).max() < 70


def test_stillness_is_white(texture, frames):
    assert (flow_map(np.stack([texture] * 3)) == 255).all()
    assert (flow_map(frames[:1]) == 255).all()
    slow = flow_to_color(np.full((2, 2, 2), 0.01, np.float32))
    assert slow.min() > 245  # noise stays pale
    assert flow_to_color(np.full((2, 2, 2), 0.01, np.float32), 1e-5).min() < 10  # upstream's full colour
    with pytest.raises(InputError, match="too small"):
        flow_map(frames[:, :8])


# ------------------------------------------------------------------------------------------------------------- layout


def outer_box(picture):
    rows, columns = (picture != 255).any(axis=-1).nonzero()
    return columns.min(), rows.min(), columns.max(), rows.max()


def test_layout_box_goes_from_start_to_end():
    start, end = (10, 12, 30, 32), (50, 20, 90, 70)
    frames = layout_boxes(start, end, 5, 80, 100, (200, 10, 30))
    for i, frame in enumerate(frames):
        between = [a + (b - a) * i / 4 for a, b in zip(start, end, strict=True)]
        assert np.abs(np.array(outer_box(frame)) - between).max() <= 2  # the line is 2 to 3 pixels wide
    assert set(map(tuple, frames.reshape(-1, 3))) == {(255, 255, 255), (200, 10, 30)}
    assert (frames[0, 16:28, 14:26] == 255).all()  # empty inside
    assert np.array_equal(layout_boxes(start, end, 1, 80, 100), layout_boxes(start, start, 1, 80, 100))
    short = layout_boxes(start, end, 5, 80, 100, (200, 10, 30), upstream=True)
    assert outer_box(short[-1])[2] < 85  # upstream stops before
    assert tuple(short[0][12, 20]) == (30, 10, 200)


def test_layout_contours_outline_the_mask():
    mask = np.zeros((2, 40, 40), np.uint8)
    mask[0, 10:30, 10:30] = 255
    first, second = layout_contours(mask, (255, 0, 0))
    assert tuple(first[10, 20]) == (255, 0, 0) and tuple(first[29, 29]) == (255, 0, 0)
    assert (first[14:26, 14:26] == 255).all()
    assert (second == 255).all()


# ------------------------------------------------------------------------------------------------------------- frames


def test_kept_frames_are_black_in_the_mask_the_rest_grey(frames):
    video, masks = keep_frames(frames, [0, 4])
    assert np.array_equal(video[[0, 4]], frames[[0, 4]]) and (video[1:4] == 128).all()
    assert masks.shape == frames.shape[:3] and masks.max(axis=(1, 2)).tolist() == [0, 255, 255, 255, 0]
    assert masks.min(axis=(1, 2)).tolist() == [0, 255, 255, 255, 0]


@pytest.mark.parametrize("ends", ["before", "after", "both"])
def test_extended_clips(frames, ends):
    before = None if ends == "after" else frames[:2]
    after = None if ends == "before" else frames[2:]
    video, masks = extend_frames(before, 4, after)
    kept = (0 if before is None else 2), (0 if after is None else 3)
    assert len(video) == len(masks) == 4 + sum(kept)
    expected = [0] * kept[0] + [255] * 4 + [0] * kept[1]
    assert masks[:, 3, 3].tolist() == expected and np.ptp(masks, axis=(1, 2)).max() == 0
    assert (video[kept[0] : kept[0] + 4] == 128).all()
    assert np.array_equal(video[masks[:, 0, 0] == 0], np.concatenate([c for c in (before, after) if c is not None]))


def test_a_last_frame_of_another_size_is_centerd_on_white(frames):
    black = np.zeros((10, 10, 3), np.uint8)
    fitted = fit_on_white(black, 24, 32)
    assert (fitted[:, 4:28] == 0).all() and (fitted[:, :4] == 255).all() and (fitted[:, 28:] == 255).all()
    assert np.array_equal(fit_on_white(frames[0], 24, 32), frames[0])
    video, _ = extend_frames(frames[:1], 1, black[None])
    assert np.array_equal(video[-1], fitted)


# -------------------------------------------------------------------------------------------------------------- areas


def test_outpainting_adds_a_grey_border_that_is_made(frames):
    video, masks = outpaint(frames, ["left", "down"], 0.25)
    assert video.shape == (5, 30, 40, 3) and masks.shape == (5, 30, 40)
    assert np.array_equal(video[:, :24, 8:], frames)
    assert np.array_equal(masks == 0, (video != 128).any(axis=-1))  # kept exactly where the picture is
    assert set(np.unique(masks)) == {0, 255}


def test_inner_outpainting_makes_the_border_and_nothing_else(frames):
    video, masks = outpaint_inner(frames, ["right", "up"], 0.25)
    expected = np.zeros((24, 32), np.uint8)
    expected[:6] = expected[:, 24:] = 255
    assert (masks == expected).all()
    assert (video[masks == 255] == 128).all() and np.array_equal(video[masks == 0], frames[masks == 0])
    _, upstream = outpaint_inner(frames, ["right", "up"], 0.25, upstream=True)
    assert (upstream[:, 6:, 24] == 0).all() and (upstream[:, :, 25:] == 255).all()  # its column too many
    with pytest.raises(UsageError, match="nothing of the picture"):
        outpaint_inner(frames, ["left", "right"], 0.5)
    for sides, ratio in ((["left", "middle"], 0.2), ([], 0.2), (["left"], 0), (["left"], float("nan"))):
        with pytest.raises(UsageError, match="direction|expand_ratio"):
            outpaint(frames, sides, ratio)


def test_inpainting_makes_what_is_white(frames):
    mask = np.zeros((24, 32), np.uint8)
    mask[3:9, 4:20] = 255
    video, masks = inpaint_mask(frames, mask)
    assert (masks == mask).all() and (video[:, 3:9, 4:20] == 128).all()
    assert np.array_equal(video[masks == 0], frames[masks == 0])
    assert np.array_equal(inpaint_box(frames, (4, 3, 20, 9))[0], video)
    _, masks = inpaint_box(frames, (-5, 20.9, 3.9, 99))  # cut at the borders, whole pixels
    assert (masks[:, 20:, :3] == 255).all() and (masks == 255).sum() == 5 * 4 * 3
    assert not inpaint_box(frames, (-9, -9, -2, -2))[1].any()


# ----------------------------------------------------------------------------------------------------- reshaped masks


def square(left=10, top=10, side=4, size=40):
    mask = np.zeros((1, size, size), np.uint8)
    mask[0, top : top + side, left : left + side] = 255
    return mask


def box_of(mask):
    rows, columns = mask[0].nonzero()
    box = tuple(int(v) for v in (columns.min(), rows.min(), columns.max(), rows.max()))
    assert (mask[0][box[1] : box[3] + 1, box[0] : box[2] + 1] == 255).all()  # a whole rectangle
    return box


def test_hull_and_box_of_two_corners():
    mask = np.zeros((1, 20, 20), np.uint8)
    mask[0, 2, 2] = mask[0, 2, 12] = mask[0, 12, 2] = 255
    triangle = np.add.outer(np.arange(20), np.arange(20))  # left of the diagonal x + y = 14
    hull = reshape_mask(mask, "hull")[0]
    assert np.array_equal(hull[2:13, 2:13] == 255, triangle[2:13, 2:13] <= 14) and (hull > 0).sum() == 66
    assert box_of(reshape_mask(mask, "bbox")) == (2, 2, 12, 12)
    assert np.array_equal(reshape_mask(mask), mask)
    dot = np.where(np.arange(400).reshape(1, 20, 20) == 210, 255, 0).astype(np.uint8)
    assert all(np.array_equal(reshape_mask(dot, shape), dot) for shape in ("original", "hull", "bbox"))
    assert not reshape_mask(np.zeros((2, 8, 8), np.uint8), "bbox_expand").any()


def test_growth_reaches_as_far_as_it_should():
    # 4 pixels wide, grown by its own width: 4 to each side; of a margin of 10 to the left half would be the most.
    assert box_of(reshape_mask(square(), "bbox_expand", expand_ratio=1, iterations=1)) == (6, 6, 17, 17)
    assert box_of(reshape_mask(square(), "original_expand", expand_ratio=1, iterations=2)) == (6, 6, 17, 17)
    assert box_of(reshape_mask(square(left=4), "bbox_expand", expand_ratio=1, iterations=1))[0] == 2  # half way
    sides = reshape_mask(square(), "bbox_expand", expand_ratio=1, iterations=1, reach=(1, 0, 0.5, 0.25))
    assert box_of(sides) == (6, 8, 13, 14)
    upstream = reshape_mask(square(), "bbox_expand", expand_ratio=1, iterations=1, upstream=True)
    assert box_of(upstream) == (7, 7, 17, 17)  # a pixel less to the left and top
    with pytest.raises(UsageError, match="maskaug_mode"):
        reshape_mask(square(), "circle")


# -------------------------------------------------------------------------------------------------------- composition


@pytest.mark.parametrize("kinds", itertools.product(("repaint", "extension", "control"), repeat=2), ids="-".join)
def test_composition_rules(kinds):
    """The truth table: one pixel for each pair of mask values; 10 is the first video's colour, 20 the second's."""
    first_mask, second_mask = (np.array([[v]], np.uint8) * 255 for v in ([0, 0, 1, 1], [0, 1, 0, 1]))
    shown = {
        ("extension", "repaint"): ([10, 10, 20, 20], [0, 0, 0, 1]),
        ("extension", "control"): ([10, 10, 20, 20], [0, 0, 0, 1]),
        ("extension", "extension"): ([10, 10, 20, 20], [0, 0, 0, 1]),
        ("repaint", "extension"): ([10, 20, 10, 20], [0, 1, 1, 1]),
        ("control", "extension"): ([10, 20, 10, 20], [0, 1, 1, 1]),
        ("repaint", "repaint"): ([10, 20, 10, 20], [0, 1, 1, 1]),
        ("control", "control"): ([10, 20, 10, 20], [0, 1, 1, 1]),
        ("repaint", "control"): ([10, 10, 20, 20], [0, 0, 1, 1]),
        ("control", "repaint"): ([20, 10, 20, 10], [0, 1, 0, 1]),
    }[kinds]
    videos = [np.full((1, 1, 4, 3), v, np.uint8) for v in (10, 20)]
    video, masks = compose((kinds[0], videos[0], first_mask), (kinds[1], videos[1], second_mask))
    assert video[0, 0, :, 0].tolist() == shown[0]
    assert (masks[0, 0] / 255).tolist() == shown[1]


def test_composition_takes_task_names_and_one_size(frames):
    masks = np.full(frames.shape[:3], 255, np.uint8)
    video, _ = compose(("inpainting", frames, masks), ("depth", frames[:3] + 1, masks[:3]))
    assert np.array_equal(video, frames[:3] + 1)  # the shorter ends it
    with pytest.raises(UsageError, match="'smell'"):
        compose(("smell", frames, masks), ("depth", frames, masks))
    with pytest.raises(InputError, match="32x24 and 32x20"):
        compose(("depth", frames, masks), ("depth", frames[:, :20], masks[:, :20]))


# --------------------------------------------------------------------------------------------------------------- pose


def save_graph(path, nodes, inputs, outputs, constants=()):
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
        [onnx.numpy_helper.from_array(value, name) for name, value in dict(constants).items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def detector_graph(path, boxes):
    """A "YOLOX" that sees these people (centre and size in its 640 pixels, score), whatever it is shown."""
    rows = np.zeros((1, 8400, 85), np.float32)
    for x, y, width, height, score in boxes:
        cell_x, cell_y = int(x // 32), int(y // 32)
        size = np.log([width / 32, height / 32])
        rows[0, 80 * 80 + 40 * 40 + cell_y * 20 + cell_x, :6] = (x / 32 - cell_x, y / 32 - cell_y, *size, score, 1)
    zero = helper.make_node("ReduceMin", ["images"], ["least"], keepdims=0)
    nothing = helper.make_node("Mul", ["least", "zero"], ["nothing"])
    add = helper.make_node("Add", ["rows", "nothing"], ["output"])
    constants = {"rows": rows, "zero": np.float32(0)}
    shapes = {"images": [1, 3, 640, 640]}, {"output": [1, 8400, 85]}
    return save_graph(path, [zero, nothing, add], *shapes, constants)


def pose_graph(path, num_points=133):
    """A "DWPose" that takes the brightest pixel for every point."""
    nodes, constants = [], {"two": np.array([2], np.int64)}
    for name, axes, length in (("x", [1, 2], 576), ("y", [1, 3], 768)):
        constants |= {
            f"{name}_rows": np.array([1, 1, length], np.int64),
            f"{name}_all": np.array([1, num_points, length]),
        }
        nodes += [
            helper.make_node("ReduceMax", ["input"], [f"{name}1"], axes=axes, keepdims=0),
            helper.make_node("Unsqueeze", [f"{name}1", "two"], [f"{name}2"]),
            helper.make_node("Concat", [f"{name}2", f"{name}2"], [f"{name}3"], axis=2),
            helper.make_node("Reshape", [f"{name}3", f"{name}_rows"], [f"{name}4"]),
            helper.make_node("Expand", [f"{name}4", f"{name}_all"], [f"simcc_{name}"]),
        ]
    outputs = {"simcc_x": [1, num_points, 576], "simcc_y": [1, num_points, 768]}
    return save_graph(path, nodes, {"input": [1, 3, 384, 288]}, outputs, constants)


def test_pose_is_drawn_where_the_networks_see_it(tmp_path):
    """One bright spot in each person's box: every point of that person is there."""
    frame = np.zeros((512, 768, 3), np.uint8)
    frame[200:208, 300:308] = frame[100:108, 600:608] = 255
    scale = 640 / 768  # of the frame in the detector's square; in between everything is twice as large
    people = [
        (300 * scale, 220 * scale, 100, 200, 0.9),
        (610 * scale, 120 * scale, 90, 110, 0.8),
        (50, 50, 40, 40, 0.2),
    ]
    people.append((310 * scale, 226 * scale, 100, 200, 0.7))  # the first once more
    drawer = pose.PoseDrawer(detector_graph(tmp_path / "d.onnx", people), pose_graph(tmp_path / "p.onnx"))

    bgr = pose.resize_for_pose(frame)
    assert bgr.shape == (1024, 1536, 3)
    boxes = drawer.find_people(bgr)
    assert len(boxes) == 2
    assert np.allclose(boxes[0], (600 - 120, 440 - 240, 600 + 120, 440 + 240), atol=0.01)  # 100/scale·2 wide
    points = drawer.find_points(bgr, boxes[0])
    assert np.abs(points[:, :2] - (607, 407)).max() < 10 and points[:, 2].min() > 0.3  # the spot spans 600..616

    picture = drawer(frame)
    assert picture.shape == frame.shape
    lit = (picture.max(axis=-1) > 100).astype(np.uint8)
    count, _, stats, centers = cv2.connectedComponentsWithStats(lit)
    assert count == 3 and stats[1:, cv2.CC_STAT_AREA].max() < 60
    assert sorted(np.round(centers[1:, 0] / 10).tolist()) == [30, 60]
    assert not drawer(np.zeros_like(frame)).any()  # nobody seen


def test_yolox_rows_are_offsets_in_strides():
    rows = np.zeros((8400, 85), np.float32)
    rows[2 * 80 + 3, :6] = (0.5, 0.5, np.log(4), np.log(2), 0.5, 0.8)
    rows[6400 + 1600 + 20, :4] = (0, 0, 0, 0)
    boxes, scores = pose.decode_yolox(rows)
    assert np.allclose(boxes[163], (12, 12, 44, 28))  # centre 3.5·8, 2.5·8; 32 wide, 16 high
    assert np.allclose(boxes[8020], (-16, 16, 16, 48))
    assert scores[163, 0] == pytest.approx(0.4)


def test_skeleton_drawing():
    points = np.zeros((133, 3))
    points[5], points[6] = (60, 40, 0.9), (20, 40, 0.9)  # left and right shoulder: the neck is at 40, 40
    points[8] = (20, 80, 0.9)  # right elbow
    points[0] = (40, 20, 0.2)  # nose, unsure
    points[30] = (80, 80, 0.9)  # on the face
    points[91], points[92] = (10, 90, 0.9), (30, 90, 0.9)  # a hand's root and its thumb
    picture = pose.draw_people([points], 100, 100)
    assert tuple(picture[40, 30]) == (0, 0, 153)  # neck to right shoulder, first hue at 60 %
    assert tuple(picture[60, 20]) == (0, 102, 153)  # right upper arm, third hue: 255, 170, 0 with channels swapped
    assert tuple(picture[40, 40]) == (0, 85, 255)  # the neck's own point
    assert not picture[20, 40].any() and not picture[90, 20].any()
    assert tuple(picture[80, 80]) == (255, 255, 255)
    assert not pose.draw_people([points], 100, 100, face=False)[80, 80].any()
    assert pose.draw_people([points], 100, 100, hands=True)[90, 20].any()


def test_bad_pose_weights(tmp_path):
    (tmp_path / "bad.onnx").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(WeightsError, match=r"bad.onnx.*--only vace-annotators"):
        pose.PoseDrawer(tmp_path / "bad.onnx", tmp_path / "bad.onnx")
    detector, other = detector_graph(tmp_path / "d.onnx", [(320, 320, 99, 99, 1)]), pose_graph(tmp_path / "p.onnx", 17)
    with pytest.raises(WeightsError, match="133 points"):
        pose.PoseDrawer(detector, other)(np.zeros((64, 64, 3), np.uint8))
    with pytest.raises(WeightsError, match="another one"):
        pose.PoseDrawer(other, other)(np.zeros((64, 64, 3), np.uint8))


# -------------------------------------------------------------------------------------------------- depth and drawing


def test_depth_keeps_one_scale_for_the_clip():
    from preprocess.depth import depth_map

    def model(pixel_values):  # the brighter the nearer
        return types.SimpleNamespace(predicted_depth=pixel_values.mean(dim=1))

    model.config, model.device, model.dtype = types.SimpleNamespace(patch_size=14), "cpu", torch.float32
    clip = np.zeros((2, 28, 42, 3), np.uint8)
    clip[0, :, 21:], clip[1, :, 21:] = 100, 200
    video = depth_map(clip, model, short_side=28)
    assert video.shape == clip.shape and np.ptp(video, axis=-1).max() == 0
    assert video[:, 14, 5, 0].max() <= 3  # a cubic enlargement rings a little
    assert video[1, 14, 38, 0] >= 252 and abs(int(video[0, 14, 38, 0]) - 127) <= 3  # half as near
    assert (depth_map(clip, model, short_side=28, per_frame=True)[:, 14, 38, 0] >= 252).all()
    with pytest.raises(InputError, match="no depth"):
        depth_map(clip[:, :, 21:] * 0, model, short_side=28)


def test_depth_anything_loads_from_a_folder(tmp_path):
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config

    from preprocess.depth import depth_map, load_depth_model

    with pytest.raises(WeightsError, match="config.json is missing.*download_models.py --only depth-anything-v2-large"):
        load_depth_model(tmp_path)
    backbone = Dinov2Config(hidden_size=16, num_hidden_layers=4, num_attention_heads=2, image_size=56, patch_size=14,
                            out_features=[f"stage{i}" for i in range(1, 5)], reshape_hidden_states=False)  # fmt: skip
    config = DepthAnythingConfig(backbone_config=backbone, reassemble_hidden_size=16, neck_hidden_sizes=[4, 4, 8, 8],
                                 fusion_hidden_size=8, head_hidden_size=4, patch_size=14)  # fmt: skip
    torch.manual_seed(0)
    DepthAnythingForDepthEstimation(config).save_pretrained(tmp_path)
    frames = np.random.default_rng(0).integers(0, 256, (2, 40, 60, 3), dtype=np.uint8)
    model = load_depth_model(tmp_path)
    assert not model.training
    torch.nn.init.constant_(model.head.conv3.bias, 1.0)  # a random head's ReLU may leave nothing
    assert depth_map(frames, model, short_side=56).shape == frames.shape

    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WeightsError, match="cannot be loaded"):
        load_depth_model(tmp_path)


def test_line_drawing_network(tmp_path):
    from preprocess.scribble import LineDrawing, ScribbleDrawer

    shapes = {name: tuple(value.shape) for name, value in LineDrawing().state_dict().items()}
    assert shapes["model0.1.weight"] == (64, 3, 7, 7) and shapes["model1.3.weight"] == (256, 128, 3, 3)
    assert shapes["model2.2.conv_block.5.weight"] == (256, 256, 3, 3) and "model2.3.conv_block.1.weight" not in shapes
    assert shapes["model3.0.weight"] == (256, 128, 3, 3) and shapes["model4.1.weight"] == (1, 64, 7, 7)
    assert len(shapes) == 2 * (1 + 2 + 6 + 2 + 1)  # instance norms have no weights

    torch.manual_seed(0)
    small = LineDrawing(channels=4).eval()
    torch.save(small.state_dict(), tmp_path / "net.pth")
    drawer = ScribbleDrawer(tmp_path / "net.pth")
    frame = np.random.default_rng(0).integers(0, 256, (32, 40, 3), dtype=np.uint8)
    with torch.inference_mode():
        expected = small(torch.from_numpy(frame).permute(2, 0, 1)[None] / 255)[0, 0].numpy() * 255
    drawn = drawer(frame)
    assert np.abs(drawn[..., 0] - np.floor(expected)).max() <= 1 and np.ptp(drawn, axis=-1).max() == 0
    assert drawer(frame[:31, :37]).shape == (31, 37, 3)

    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    torch.save(small, tmp_path / "code.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "net.pth").read_bytes()[:999])
    for name in ("other.pth", "code.pth", "cut.pth"):
        with pytest.raises(WeightsError, match=name):
            ScribbleDrawer(tmp_path / name)


# -------------------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """A clip of 64x48 at 12.5 frames per second, and masks."""
    folder = tmp_path_factory.mktemp("media")
    base = cv2.resize(np.random.default_rng(3).integers(0, 256, (6, 8, 3), dtype=np.uint8), (64, 48))
    write_video(folder / "in.mp4", [np.stack([np.roll(base, i, axis=1) for i in range(5)])], fps=12.5)
    mask = np.zeros((48, 64), np.uint8)
    mask[10:30, 20:40] = 255
    cv2.imwrite(str(folder / "mask.png"), mask)
    cv2.imwrite(str(folder / "half.png"), cv2.resize(mask, (32, 24), interpolation=cv2.INTER_NEAREST))
    cv2.imwrite(str(folder / "square.png"), mask[:, :48])
    cv2.imwrite(str(folder / "colour.png"), np.dstack([mask, mask * 0, mask * 0]))
    cv2.imwrite(str(folder / "photo.png"), base)
    write_video(folder / "short.mp4", [np.repeat(mask[None, ..., None], 3, axis=-1)] * 3, fps=12.5)
    return folder


def run(media, tmp_path, command):
    words = [word.format(media=media, out=tmp_path) for word in command.split()]
    control.main(control.parse_arguments(words))
    output = tmp_path / "out.mp4"
    mask = tmp_path / "out.mask.mp4"
    return read_frames(output), read_frames(mask) if mask.exists() else None, output


@pytest.mark.parametrize(
    ("command", "shape", "has_mask"),
    [
        ("gray --video {media}/in.mp4", (5, 48, 64, 3), False),
        ("flow --video {media}/in.mp4", (5, 48, 64, 3), False),
        ("layout_bbox --bbox 2,2,20,20 30,20,60,44 --video {media}/in.mp4", (5, 48, 64, 3), False),
        ("layout_bbox --bbox 2,2,20,20 30,20,60,44 --height 64 --width 80 --num_frames 9", (9, 64, 80, 3), False),
        ("layout_mask --video {media}/in.mp4 --mask {media}/mask.png --color 255,0,0", (5, 48, 64, 3), False),
        ("frameref --image {media}/photo.png --num_frames 9", (9, 48, 64, 3), True),
        ("frameref --image2 {media}/photo.png --num_frames 5 --height 32 --width 32", (5, 32, 32, 3), True),
        ("clipref --video {media}/in.mp4 --video2 {media}/in.mp4 --num_frames 13", (13, 48, 64, 3), True),
        ("extract --video {media}/in.mp4 --mode firstlast", (5, 48, 64, 3), True),
        ("outpainting --video {media}/in.mp4 --direction left right", (5, 48, 96, 3), True),
        ("outpainting_inner --video {media}/in.mp4 --expand_ratio 0.1", (5, 48, 64, 3), True),
        ("inpainting_mask --video {media}/in.mp4 --mask {media}/half.png", (5, 48, 64, 3), True),
        ("inpainting_bbox --video {media}/in.mp4 --bbox 20,10,40,30", (5, 48, 64, 3), True),
        ("maskaug --mask {media}/short.mp4 --maskaug_mode bbox_expand --maskaug_seed 1", (3, 48, 64, 3), False),
    ],
)
def test_command(media, tmp_path, command, shape, has_mask):
    video, mask, output = run(media, tmp_path, command + " --output {out}/out.mp4")
    assert video.shape == shape
    assert probe(output).fps == pytest.approx(12.5 if ".mp4" in command.split("--output")[0] else 16)
    assert read_metadata(output)["task"] == command.split()[0]
    assert (mask is not None) == has_mask
    if has_mask:
        made = mask[..., 0] > 127
        assert mask.shape == shape and made.any() and not made.all()
        assert ((mask < 12) | (mask > 243)).mean() > 0.97  # black and white after the codec too
        assert np.abs(video[made].astype(int) - 128).mean() < 4


def test_inpainting_follows_the_mask_and_goes_on_into_a_composition(media, tmp_path):
    video, mask, output = run(
        media, tmp_path, "inpainting_mask --video {media}/in.mp4 --mask {media}/mask.png --output {out}/out.mp4"
    )
    expected = np.zeros((48, 64), bool)
    expected[10:30, 20:40] = True
    assert ((mask[..., 0] > 127) == expected).all()
    source = read_frames(media / "in.mp4")
    assert np.abs(video[:, 34:].astype(int) - source[:, 34:]).mean() < 3

    output.rename(tmp_path / "made.mp4")
    (tmp_path / "out.mask.mp4").rename(tmp_path / "made.mask.mp4")
    command = "composition --video {out}/made.mp4 --mask {out}/made.mask.mp4 --video2 {media}/in.mp4 "
    video, mask, _ = run(media, tmp_path, command + "--compose repaint control --output {out}/out.mp4 --overwrite")
    assert np.abs(video.astype(int) - source).mean() < 4  # what was cut out is filled from the second
    assert ((mask[..., 0] > 127) == expected).all()


@pytest.mark.parametrize(
    ("command", "error", "message"),
    [
        ("gray --video {media}/none.mp4", InputError, "none.mp4"),
        ("gray --video {media}/photo.png", InputError, "is a picture"),
        ("inpainting_mask --video {media}/in.mp4 --mask {media}/square.png", InputError, "48x48.*64x48"),
        ("inpainting_mask --video {media}/in.mp4 --mask {media}/short.mp4", InputError, "3 frames.*5"),
        ("inpainting_mask --video {media}/in.mp4 --mask {media}/colour.png", InputError, "coloured"),
        (
            "inpainting_mask --video {media}/in.mp4 --mask {media}/mask.png --maskaug_ratio 1",
            UsageError,
            "maskaug_mode",
        ),
        ("inpainting_bbox --video {media}/in.mp4 --bbox 70,10,90,30", UsageError, "no pixel"),
        ("layout_bbox --bbox 2,2,20,20", UsageError, "two boxes"),
        ("layout_bbox --bbox 2,2,20,20 4,4,9,9 --video {media}/in.mp4 --fps 9", UsageError, "--fps"),
        ("layout_bbox --bbox 2,2,20,20 4,4,9,9 --height 90000 --width 90000 --num_frames 999", ResourceError, "GiB"),
        ("frameref", UsageError, "--image"),
        ("clipref --video {media}/in.mp4 --num_frames 5", UsageError, "no frame to be made"),
        ("outpainting --video {media}/in.mp4 --expand_ratio 0", UsageError, "expand_ratio"),
        ("composition --video {media}/in.mp4 --video2 {media}/in.mp4 --compose repaint depth", UsageError, "--mask"),
        ("pose --video {media}/in.mp4 --pose_path {media}/none.onnx", WeightsError, "--only vace-annotators"),
        ("scribble --video {media}/in.mp4 --scribble_path {media}/none.pth", WeightsError, "none.pth"),
        ("depth --video {media}/in.mp4 --depth_path {media}", WeightsError, "--only depth-anything-v2-large"),
    ],
)
def test_errors_leave_nothing_behind(media, tmp_path, command, error, message):
    with pytest.raises(error, match=message):
        run(media, tmp_path, command + " --output {out}/out.mp4")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("gray", "needs --video"),
        ("gray --video a.mp4 --mask m.png", "no use for --mask"),
        ("gray --video a.mp4 --mask_output m.mp4", "no use for --mask_output"),
        ("extract --video a.mp4 --mode first --keep 0", "whole number"),
        ("inpainting_bbox --video a.mp4 --bbox 9,9,2,2", "is no box"),
        ("layout_bbox --bbox 1,1,2,2 nan,1,2,2", "is no box"),
        ("layout_bbox --bbox 1,1,2,2 1,1,2,2 --color red", "is no colour"),
    ],
)
def test_usage(capsys, command, message):
    with pytest.raises(SystemExit) as stop:
        control.parse_arguments([*command.split(), "--output", "out.mp4"])
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_as_a_process(media, tmp_path):
    def python(*arguments):
        return subprocess.run([sys.executable, "-m", "preprocess.control", *arguments], capture_output=True, text=True)

    start = time.monotonic()
    shown = python("--help")
    assert time.monotonic() - start < 1 and shown.returncode == 0 and "outpainting_inner" in shown.stdout
    missing = python("pose", "--video", str(media / "in.mp4"), "--output", str(tmp_path / "out.mp4"),
                     "--detector_path", str(tmp_path / "no.onnx"))  # fmt: skip
    assert missing.returncode == 4 and "Traceback" not in missing.stderr and len(missing.stderr.splitlines()) == 1
