"""Control maps without a model against VACE's annotators, its slips included (`upstream=True`)."""

import numpy as np

from preprocess.control_maps import (
    compose,
    extend_frames,
    gray_map,
    inpaint_box,
    inpaint_mask,
    layout_boxes,
    outpaint,
    outpaint_inner,
    reshape_mask,
)


def check_model_free_annotators(case):
    frames = case.inputs["frames"].numpy().astype(np.uint8)  # (N, H, W, 3)
    other = case.inputs["frame_other_size"].numpy().astype(np.uint8)
    mask = case.inputs["mask"].numpy().astype(np.uint8)  # (H, W)
    height, width = frames.shape[1:3]

    for name in case.outputs:
        task, _, kind = name.rpartition("_")
        if name.startswith("comp_"):
            _, first, second, _ = name.split("_")
            video, made = _compose(case, first, second, frames)
        elif name.startswith("maskaug_"):
            shape = name.removeprefix("maskaug_")
            given = case.config["maskaug_kwargs"]
            case.check(
                name,
                reshape_mask(
                    mask[None],
                    shape,
                    expand_ratio=given["expand_ratio"],
                    iterations=given["expand_iters"],
                    reach=given["expand_lrtp"],
                    upstream=True,
                )[0],
                atol=0,
            )
            continue
        elif name == "gray":
            case.check(name, gray_map(frames[: len(case.outputs[name])], upstream=True))
            continue
        elif name == "layout_bbox":
            boxes = case.config["layout_bbox_start"], case.config["layout_bbox_end"]
            count, color = case.config["layout_num_frames"], case.config["layout_color_rgb_arg"]
            case.check(name, layout_boxes(*boxes, count, height, width, color, upstream=True), atol=0)
            continue
        else:
            video, made = _pair(case, task, frames, other, mask)

        if kind in ("frames", "video"):
            case.check(name, video)
        else:
            assert kind in ("masks", "mask"), f"{case.folder.name}: unknown output {name!r}"
            case.check(name, made.reshape(case.outputs[name].shape), atol=0)


def _pair(case, task, frames, other, mask):
    """Frames and masks of one task; how many frames it took, the stored output tells."""
    total = len(case.outputs[f"{task}_frames"])
    if task.startswith(("first", "last")):
        num_source = _kept_at_start(case, task)
        if task.startswith("firstlast"):
            num_after = _kept_at_start(case, task, from_end=True)
            return extend_frames(frames[:num_source], total - num_source - num_after, other[:num_after])
        if task.startswith("first"):
            return extend_frames(frames[:num_source], total - num_source)
        num_after = _kept_at_start(case, task, from_end=True)
        return extend_frames(None, total - num_after, frames[:num_after])
    if task == "outpaint":
        return outpaint(frames[:total], case.config["outpaint_direction"], case.config["outpaint_expand_ratio"])
    if task == "outpaint_inner":
        given = case.config["outpaint_inner"]
        return outpaint_inner(frames[:total], given["direction"], given["expand_ratio"], upstream=True)
    if task == "inpaint_mask":
        return inpaint_mask(frames[:total], mask)
    assert task == "inpaint_bbox", f"{case.folder.name}: unknown task {task!r}"
    return inpaint_box(frames[:total], case.config["inpaint_bbox"])


def _kept_at_start(case, task, from_end=False):
    """How many source frames the case gave: the black masks at one end."""
    is_kept = (case.outputs[f"{task}_masks"].amax(dim=(1, 2)) == 0).numpy()
    return int(np.argmin(is_kept[::-1] if from_end else is_kept))


def _compose(case, first, second, frames):
    masks = [(case.inputs[f"comp_mask{i}"].numpy()[..., 0] * 255).astype(np.uint8) for i in (1, 2)]
    return compose((first, frames[0:2], masks[0]), (second, frames[2:4], masks[1]))


CHECKS = {"vace_model_free_annotators": check_model_free_annotators}
