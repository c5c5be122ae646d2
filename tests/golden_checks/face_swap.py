"""Golden kinds of Stand-In's face swap: pasting frame by frame, and sampling over the pasted video."""

import numpy as np
import torch
from torch import nn

from models.wan.schedulers import add_noise, get_schedule
from pipelines.conditions import initial_noise
from pipelines.denoise import Expert, denoise, two_branch
from pipelines.face_swap.pipeline import frames_to_video, keep_background, sampled_mask
from preprocess.face_detection import Face
from preprocess.face_paste import align, crop_to_multiple, largest_face, paste_face, paste_in_box
from tests.golden_checks.dit import numbered


def paint_labels(rectangles: np.ndarray, size: int = 512) -> np.ndarray:
    labels = np.zeros((size, size), np.int64)
    for label, y0, y1, x0, x1 in rectangles:
        labels[y0:y1, x0:x1] = label
    return labels


def check_paste(case) -> None:
    config, inputs = case.config, case.inputs
    video = crop_to_multiple(inputs["video"].numpy())
    video = video[: len(video) // 4 * 4 + 1]  # upstream's cut: all of 4n frames, which are one too few
    rgba, boxes = inputs["face_rgba"].numpy(), inputs["target_bbox"].tolist()
    source, points = inputs["source_kps"].numpy(), inputs["target_kps"].numpy()
    labels = paint_labels(inputs["parse_labels_512_rects"].numpy()) if config["mode"] == "box" else None
    options = {
        "face_crop_scale": config["face_crop_scale"],
        "dilation": config["dilation_kernel_size"],
        "feather": config["feather_amount"],
        "own_alpha": False,
    }
    frames, masks = [], []
    for i, frame in enumerate(video):
        score = config["low_score"] if i == config["low_score_frame"] else 0.9
        found = [] if i == config["no_face_frame"] else [Face(tuple(boxes[i]), score, points[i])]
        face = largest_face(found, config["confidence_threshold"])
        if config["mode"] == "box" and face is not None:
            pasted, mask = paste_in_box(frame, face, rgba, lambda crop, box: labels, **options)
        else:
            pasted, mask = paste_face(frame, face, rgba, source)
        frames.append(pasted)
        masks.append(mask[..., None])
    case.check("whf", [video.shape[2], video.shape[1], len(video)], atol=0)
    if "affine" in case.outputs:
        # Of every frame as decoded, those that the cut drops too.
        case.check("affine", np.stack([align(source, target) for target in points]), atol=1e-4)
    case.check("mask", np.stack(masks))
    case.check("video", np.stack(frames))


class RecordedModel(nn.Module):
    """Returns the recorded predictions in turn, whatever it is asked."""

    def __init__(self, predictions):
        super().__init__()
        self.predictions = iter(predictions)

    def forward(self, *_, **__):
        return next(self.predictions)

    def cache_context(self, _):
        return torch.no_grad()


def check_sampling(case) -> None:
    config, inputs = case.config, case.inputs
    case.check("vae_input_video", frames_to_video(inputs["input_video"].numpy()))
    steps = config["num_inference_steps"]
    schedule = get_schedule("euler", steps, config["sigma_shift"], strength=config["denoising_strength"])
    case.check("sigmas", schedule.sigmas[:-1])
    case.check("timesteps", schedule.timesteps)
    clean = inputs["input_video_latents"]
    noise = initial_noise((clean.shape[1], config["num_frames"], config["height"], config["width"]), config["seed"])
    case.check("noise", noise)
    start = add_noise(clean, noise, schedule.sigmas[0].item())
    case.check("initial_latents", start)
    mask = sampled_mask(inputs["face_mask"][..., 0], clean.shape[2:])
    case.check("latent_mask", mask)
    hard = (mask > 0.5).float()
    case.check("hard_mask", hard)

    model = RecordedModel(numbered(inputs, "model_out"))
    expert = Expert(model, {"positive": None, "negative": None}, two_branch(config["cfg_scale"]))

    def after_step(step: int, sample: torch.Tensor) -> torch.Tensor:
        case.check(f"step{step}.after_euler", sample)
        if config["force_background_consistency"]:
            sample = keep_background(sample, clean, noise, hard, schedule.sigmas[step + 1].item())
        return sample

    def on_step(step) -> None:
        case.check(f"step{step.index}.latents", step.sample)

    final = denoise(start, schedule, lambda step: expert, after_step=after_step, on_step=on_step)
    case.check("final_latents", final)


CHECKS = {"standin_face_paste": check_paste, "standin_face_swap_sampling": check_sampling}
