"""Golden kinds of VACE: its forward pass, with and without an identity, the context it is fed, whole runs."""

import numpy
import torch

from models.vace import VaceBranch, branch_from_tensors, split_vace
from models.wan.schedulers import get_schedule
from models.wan.slots import Prompt
from models.wan.transformer import WanTransformer
from pipelines.conditions import latent_frames
from pipelines.denoise import NEGATIVE, POSITIVE, Expert, denoise, two_branch
from pipelines.vace.command import size_within, spread_frames
from pipelines.vace.context import (
    cover_frames,
    fit_reference,
    frames_to_video,
    mask_to_video,
    noise_with_references,
    split_by_mask,
    vace_context,
)
from tests.golden_checks.dit import build_transformer, check_forward_outputs, numbered
from tests.golden_checks.pipelines import open_vae
from tests.golden_checks.stand_in import build_stand_in, check_forward_with


def build_branch(transformer: WanTransformer, tensors: dict, config: dict) -> VaceBranch:
    branch = branch_from_tensors(tensors, transformer, config.get("vace_layers"))
    assert branch.config.vace_in_dim == config.get("vace_in_dim", transformer.config.in_dim)
    return branch


def record_hints(branch: VaceBranch) -> list[torch.Tensor]:
    """Every hint from now on, in the order they are computed."""
    hints = []
    for block in branch.vace_blocks:
        block.register_forward_hook(lambda _, __, output: hints.append(output[1]))
    return hints


def check_forward(case) -> None:
    base, tensors = split_vace(case.weights())
    transformer = build_transformer(case.config, base)
    branch = build_branch(transformer, tensors, case.config)
    plugin = branch.plugin(numbered(case.inputs, "vace_context"), case.config.get("vace_context_scale", 1.0))
    hints = record_hints(branch)
    check_forward_outputs(case, transformer, [plugin])
    for j, hint in enumerate(hints):
        case.check(f"vace_hint{j}", hint)


def check_forward_with_identity(case) -> None:
    config = case.config["vace"]
    base, tensors = split_vace(case.weights())
    transformer, stand_in = build_stand_in(case.config, base)
    branch = build_branch(transformer, tensors, config)
    plugin = branch.plugin(case.inputs["vace_context"], config["vace_scale"])
    hints = record_hints(branch)
    count = len(branch.vace_blocks)
    layers = list(branch.config.vace_layers)

    def before_hint(index: int, x: torch.Tensor) -> torch.Tensor:
        """Upstream adds the hints outside its blocks, and its records of the blocks are from before."""
        return x - config["vace_scale"] * hints[-count:][layers.index(index)] if index in layers else x

    check_forward_with(case, transformer, stand_in, [plugin], before_hint)
    # The calls run in this order: without the identity, then both branches of both steps, then without it again.
    for name in case.outputs:
        call, _, number = name.rpartition(".vace_hint")
        if call:
            order = ["no_identity", "step0.posi", "step0.nega", "step1.posi", "step1.nega"]
            case.check(name, hints[order.index(call) * count + int(number)])


def check_pipeline(case) -> None:
    config, inputs = case.config, case.inputs
    vae = open_vae(case)
    frames, mask = inputs["frames"][None], inputs["mask"][None]
    references = [reference[None] for reference in numbered(inputs, "ref")][: config["num_refs"]]
    context = vace_context(vae, frames, mask, references)
    if "vace_context_refs" in case.outputs:
        case.check("vace_context_refs", context[0])
    if "vace_context_norefs" in case.outputs:
        case.check("vace_context_norefs", vace_context(vae, frames, mask)[0])

    base, tensors = split_vace(case.weights())
    transformer = build_transformer(config["dit"], base)
    branch = build_branch(transformer, tensors, config["dit"])
    prompts = {POSITIVE: Prompt([inputs["context"]]), NEGATIVE: Prompt([inputs["context_null"]])}
    plugins = [branch.plugin(context, config.get("context_scale", 1.0))]
    expert = Expert(transformer, prompts, two_branch(config["guide_scale"]), plugins)
    schedule = get_schedule(config["solver"], config["steps"], config["shift"])
    if "timesteps" in case.outputs:
        case.check("timesteps", schedule.timesteps)
    samples = []
    noise = inputs["noise"][None]
    final = denoise(noise, schedule, lambda step: expert, on_step=lambda step: samples.append(step.sample))
    case.check("latent_step1", samples[0][0])
    if "final_latent" in case.outputs:
        case.check("final_latent", final[0])
    trimmed = final[:, :, len(references) :]
    case.check("final_latent_trimmed", trimmed[0])
    case.check("video", vae.decode(trimmed)[0])


class RecordedVae:
    """Answers with the case's latents in order, and keeps what it was asked."""

    def __init__(self, answers: list[torch.Tensor]):
        self.answers, self.asked = answers, []

    def encode(self, clip: torch.Tensor) -> torch.Tensor:
        self.asked.append(clip)
        return self.answers[len(self.asked) - 1]


def check_inputs(case) -> None:
    config, inputs = case.config, case.inputs
    height, width, num_frames = config["height"], config["width"], config["num_frames"]
    video = torch.zeros(1, 3, num_frames, height, width)
    if "control_video" in inputs:
        video = frames_to_video(inputs["control_video"].numpy())
    mask = torch.ones(1, 1, num_frames, height, width)
    if "mask_video" in inputs:
        mask = mask_to_video(inputs["mask_video"][..., 0].numpy())
    references = []
    if config["has_ref"]:
        references = [fit_reference(inputs["ref_image"].numpy(), height, width)]
    vae = RecordedVae(numbered(inputs, "vae_out"))
    case.check("vace_context", vace_context(vae, video, mask, references))
    for i, part in enumerate(split_by_mask(video, mask)):
        assert torch.equal(part, vae.asked[i])
        case.check(f"vae_in{i}", part[:, :, ::4])
    if "vae_in2" in case.outputs:
        case.check("vae_in2", vae.asked[2])
    size = (16, num_frames, height, width)
    case.check("noise", noise_with_references(size, config["seed"], len(references), last_first=True))


def check_references(case) -> None:
    height, width = case.config["canvas_hw"]
    every = case.config["downsample_for_storage"]
    for i, image in enumerate(numbered(case.inputs, "ref")):
        canvas = fit_reference(image.numpy().astype(numpy.uint8), height, width)
        case.check(f"canvas{i}", canvas[0, :, :, ::every, ::every])
    for name in ("src_video_shape", "src_mask_shape"):  # without a source video: grey frames, and a mask of ones
        channels, frames = case.outputs[name][:2].tolist()
        case.check(name, torch.tensor([channels, frames, *canvas.shape[-2:]]))


def check_video_processor(case) -> None:
    config = case.config
    assert config["keep_last"] and config["downsample"] == [4, 16, 16]
    for i, video in enumerate(config["videos"]):
        height, width, count = video["height"], video["width"], video["num_frames"]
        area = min(config["area"], config["seq_len"] * 256)
        rows, columns = height // 16, width // 16
        most_tokens = min(area / 256, rows * columns)
        budget = min(latent_frames(count), int(config["seq_len"] / most_tokens))
        ids, fps = spread_frames(count, video["fps"], 4 * budget - 3)
        case.check(f"frame_ids{i}", torch.tensor(ids))
        case.check(f"size_hw{i}", torch.tensor(size_within(height, width, area, config["seq_len"] // budget)))
        case.check(f"fps{i}", torch.tensor([fps]), atol=1e-4)
    frames = case.inputs["video_uint8"].numpy().astype(numpy.uint8)
    for name in case.outputs:
        if name.startswith("resize_crop_"):
            height, width = (int(side) for side in name.removeprefix("resize_crop_").split("x"))
            case.check(name, frames_to_video(cover_frames(frames, height, width).numpy())[0])


CHECKS = {
    "standin_vace_forward": check_forward_with_identity,
    "standin_vace_inputs": check_inputs,
    "vace_prepare_reference": check_references,
    "vace_video_processor": check_video_processor,
    "wan_vace_forward": check_forward,
    "wan_vace_pipeline": check_pipeline,
}
