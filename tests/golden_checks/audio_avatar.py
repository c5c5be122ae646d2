"""Golden kinds of talking avatars: windows, their fusion, the schedule, colours, and the whole pipeline."""

import torch
from transformers import Wav2Vec2Config

from models.audio_encoder import audio_encoder_from_tensors
from models.wan.schedulers import TRAIN_TIMESTEPS, get_schedule, make_solver, shift_sigmas
from models.wan.slots import Prompt
from pipelines.audio_avatar.color_match import match_colors
from pipelines.audio_avatar.windows import blend_weights, fuse, sound_of
from pipelines.conditions import cover_resize, frames_condition, image_to_video
from pipelines.denoise import Expert
from pipelines.guidance import NEGATIVE, POSITIVE, UNCONDITIONAL, branch_plugins, branch_prompts, three_branch
from pipelines.windows import Window, plan_windows
from preprocess.audio import AudioTimeline, cut_samples
from tests.golden_checks.audio_adapter import build_avatar
from training.gradient_limit import gradient_limit

BRANCHES = (UNCONDITIONAL, NEGATIVE, POSITIVE)  # the rows of upstream's batch


def legacy_plan(num_latents: int, clip_length: int, overlap: int) -> list[Window]:
    return plan_windows(num_latents, (clip_length - 1) // 4 + 1, overlap, cut_last=True)


def check_windows(case) -> None:
    for j, row in enumerate(case.config["cases"]):
        timeline = AudioTimeline(row["audio_samples"], row["fps"], case.config["sample_rate"], legacy=True)
        assert timeline.num_latent_frames == row["latent_frames"]
        windows = legacy_plan(row["latent_frames"], row["clip_length"], row["overlap"])
        per_frame = (64 // 16) ** 2  # the file's seq_len is for 64 x 64 pixels
        table = [
            [w.start, w.stop, *sound_of(w, timeline, row["latent_frames"], "legacy", "released")]
            + [w.length, windows[0].length * per_frame]
            for w in windows
        ]
        case.check(f"windows_{j}", torch.tensor(table))
    for name in case.outputs:
        if name.startswith("weights_"):
            _, scheme, length = name.split("_")
            case.check(name, blend_weights(scheme, int(length)))


def check_fuse(case) -> None:
    config, inputs = case.config, case.inputs
    schedule = get_schedule("euler-flow", config["steps"], config["shift"])
    case.check("sigmas", schedule.sigmas)
    case.check("timesteps", schedule.timesteps)
    solver, guidance = make_solver(schedule), three_branch(config["text_guide_scale"], config["audio_guide_scale"])
    latents = inputs["latents"]
    windows = legacy_plan(config["latent_frames"], config["clip_length"], config["overlap"])
    assert len(windows) == config["n_windows"]
    for i in range(config["steps"]):
        samples = []
        for j, window in enumerate(windows):
            sample = latents[:, :, window.start : window.stop]
            recorded = inputs[f"pred_s{i}_w{j}"]
            guided = guidance(lambda branch, rows=recorded: rows[[BRANCHES.index(branch)]])
            for name, ours in ((f"x_s{i}_w{j}", sample[:, :2]), (f"guided_s{i}_w{j}", guided)):
                if name in case.outputs:
                    case.check(name, ours)
            samples.append(solver.step(guided, i, sample))
        latents = torch.empty_like(latents)
        fuse(latents, windows, samples, config["scheme"], blend=i > 0)
    case.check("out", latents)


def check_schedule(case) -> None:
    config = case.config
    for steps in config["steps"]:
        schedule = get_schedule("euler-flow", steps, config["shift"])
        case.check(f"sigmas_{steps}", schedule.sigmas)
        case.check(f"timesteps_{steps}", schedule.timesteps)
    count = config["num_train_timesteps"]
    assert count == TRAIN_TIMESTEPS
    sigmas = shift_sigmas((count - torch.arange(count, dtype=torch.float64)) / count, config["shift"])
    case.check("train_sigmas", sigmas)
    case.check("train_timesteps", sigmas * count)
    clip = (config["max_grad_norm"], config["initial_grad_norm_ratio"], config["abnormal_norm_clip_start"])
    case.check("grad_clip", [gradient_limit(step, *clip) for step in config["grad_clip_steps"]])


def check_color_match(case) -> None:
    source, reference = case.inputs["source"], case.inputs["reference"][0, :, 0]
    for i, strength in enumerate(case.config["strengths"]):
        case.check(f"out_{i}", match_colors(source, reference, strength))


class GivenLatents:
    """A VAE that was asked before."""

    def __init__(self, latents: torch.Tensor):
        self.latents = latents

    def encode(self, clip: torch.Tensor) -> torch.Tensor:
        assert clip.shape[2] == 4 * self.latents.shape[2] - 3
        return self.latents


def check_pipeline(case) -> None:
    config, inputs = case.config, case.inputs
    weights = case.weights()
    speech = {name: tensor for name, tensor in weights.items() if name.startswith("wav2vec2.")}
    transformer, adapter = build_avatar(
        config["dit"], {name: tensor for name, tensor in weights.items() if name not in speech}
    )
    encoder = audio_encoder_from_tensors(speech, Wav2Vec2Config(**config["wav2vec2"]).to_dict())

    picture = inputs["ref_image_u8"].byte().numpy()
    picture = image_to_video(cover_resize(picture, config["width"], config["height"]))
    case.check("clip_pixels", picture[0, :, 0, ::8, ::8])
    size = (config["height"] // 8, config["width"] // 8)
    vae = GivenLatents(inputs["ref_latent"])
    y = frames_condition(vae, config["clip_length"], size, {0: picture[:, :, 0]}).y
    case.check("y_window0", y)

    samples = inputs["audio"].numpy()
    timeline = AudioTimeline(len(samples), config["fps"], legacy=True)
    assert timeline.num_latent_frames == config["latent_frames"]
    windows = legacy_plan(config["latent_frames"], config["clip_length"], config["overlap"])
    assert len(windows) == config["n_windows"]
    prompts = branch_prompts(
        *(Prompt([inputs[f"context_{text}"]], inputs["clip_fea"]) for text in ("pos", "neg")),
    )
    schedule = get_schedule("euler-flow", config["steps"], config["shift"])
    solver, guidance = make_solver(schedule), three_branch(config["text_guide_scale"], config["audio_guide_scale"])
    latents, window_tokens = inputs["latents"], windows[0].length * (size[0] // 2) * (size[1] // 2)
    for i in range(schedule.num_steps):
        results = []
        for j, window in enumerate(windows):
            sound = cut_samples(samples, *sound_of(window, timeline, latents.shape[2], "legacy", "released"))
            plugins = branch_plugins(adapter, encoder.last_hidden_state(sound), config["clip_length"])
            recorded = {}

            def combine(predict, recorded=recorded):
                recorded |= {branch: predict(branch) for branch in BRANCHES}
                return guidance(recorded.__getitem__)

            expert = Expert(transformer, prompts, combine, branch_plugins=plugins)
            if window.length < windows[0].length:
                expert.attended_length = window_tokens
            sample = latents[:, :, window.start : window.stop]
            timestep = schedule.timesteps[i].expand(1)
            with torch.no_grad():
                guided = expert.velocity(sample, timestep, i, schedule.num_steps, y[:, :, : window.length])
            if (name := f"pred_s{i}_w{j}") in case.outputs:
                case.check(name, torch.cat([recorded[branch] for branch in BRANCHES]))
            results.append(solver.step(guided, i, sample))
        latents = torch.empty_like(latents)
        fuse(latents, windows, results, config["scheme"], blend=i > 0)
    case.check("out", latents)


CHECKS = {
    "stableavatar_color_match": check_color_match,
    "stableavatar_fuse": check_fuse,
    "stableavatar_pipeline": check_pipeline,
    "stableavatar_schedule": check_schedule,
    "stableavatar_windows": check_windows,
}
