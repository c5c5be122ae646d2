"""Golden kinds of whole runs: conditioning, denoise loop with guidance and experts, decode."""

import numpy
import torch

from models.wan.schedulers import expert_index, get_schedule
from models.wan.slots import Prompt
from models.wan.vae import vae_from_tensors
from pipelines.conditions import (
    first_last_frame_condition,
    image_to_video,
    image_to_video_condition,
    pinned_first_frame,
)
from pipelines.denoise import NEGATIVE, POSITIVE, Expert, denoise, two_branch
from tests.golden_checks.dit import build_transformer


def open_vae(case):
    return vae_from_tensors(case.weights(case.config["vae"]["weights"]))


def to_image(tensor: torch.Tensor) -> numpy.ndarray:
    return tensor.numpy().astype(numpy.uint8)


def expert_of(case, weights_file: str, scale: float) -> Expert:
    transformer = build_transformer(case.config["dit"], case.weights(weights_file))
    image = case.inputs.get("clip_fea")
    prompts = {
        POSITIVE: Prompt([case.inputs["context"]], image),
        NEGATIVE: Prompt([case.inputs["context_null"]], image),
    }
    return Expert(transformer, prompts, two_branch(scale))


def run(case, noise, expert_at, vae, **options) -> None:
    """Denoise, then compare the first and last latents and the decoded video."""
    schedule = get_schedule(case.config["solver"], case.config["steps"], case.config["shift"])
    if "timesteps" in case.outputs:
        case.check("timesteps", schedule.timesteps)
    samples = []
    final = denoise(noise[None], schedule, expert_at, on_step=lambda step: samples.append(step.sample), **options)
    case.check("latent_step1", samples[0][0])
    case.check("final_latent", final[0])
    case.check("video", vae.decode(final)[0])


def check_t2v(case) -> None:
    expert = expert_of(case, "weights.safetensors", case.config["guide_scale"])
    run(case, case.inputs["noise"], lambda step: expert, open_vae(case))


def check_i2v(case) -> None:
    vae, config = open_vae(case), case.config
    image = to_image(case.inputs["image"])
    condition = image_to_video_condition(vae, image, config["frame_num"], config["max_area"])
    case.check("y", condition.y[0])
    if "vae_input" in case.outputs:
        case.check("vae_input", condition.clip[0])
        case.check("clip_input", image_to_video(image)[0])
    expert = expert_of(case, "weights.safetensors", config["guide_scale"])
    run(case, case.inputs["noise"], lambda step: expert, vae, condition=condition.y)


def check_i2v_a14b(case) -> None:
    vae, config = open_vae(case), case.config
    condition = image_to_video_condition(vae, to_image(case.inputs["image"]), config["frame_num"], config["max_area"])
    case.check("y", condition.y[0])
    low, high = config["guide_scale_low_high"]
    experts = [expert_of(case, "weights_high.safetensors", high), expert_of(case, "weights_low.safetensors", low)]
    timesteps = get_schedule(config["solver"], config["steps"], config["shift"]).timesteps
    used = [expert_index(t, config["boundary"]) for t in timesteps]
    case.check("used_high", 1 - torch.tensor(used))
    run(case, case.inputs["noise"], lambda step: experts[used[step]], vae, condition=condition.y)


def check_ti2v(case) -> None:
    vae, config = open_vae(case), case.config
    pinned, clip = pinned_first_frame(vae, to_image(case.inputs["image"]), config["max_area"])
    case.check("vae_input", clip[0])
    case.check("z0", pinned.latents[0])
    noise = case.inputs["noise_after_frame0_replacement"]
    first = get_schedule(config["solver"], config["steps"], config["shift"]).timesteps[:1].float()
    case.check("timestep_tokens", pinned.timesteps(first, noise[None]))
    expert = expert_of(case, "weights.safetensors", config["guide_scale"])
    run(case, noise, lambda step: expert, vae, pinned=pinned)


def check_flf2v_condition(case) -> None:
    config = case.config
    condition = first_last_frame_condition(
        open_vae(case),
        to_image(case.inputs["first"]),
        to_image(case.inputs["last"]),
        config["frame_num"],
        config["max_area"],
    )
    y = condition.y[0]
    case.check("y_first2", y[:, :2])
    case.check("y_mid", y[:, y.shape[1] // 2][:, None])
    case.check("y_last2", y[:, -2:])


CHECKS = {
    "wan_t2v_pipeline": check_t2v,
    "wan_i2v_pipeline": check_i2v,
    "wan22_i2v_a14b_pipeline": check_i2v_a14b,
    "wan22_ti2v_i2v_pipeline": check_ti2v,
    "wan_flf2v_conditioning": check_flf2v_condition,
}
