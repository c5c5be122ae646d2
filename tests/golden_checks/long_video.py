"""Golden kinds of SVI's long videos: plans, prompt files, sizes, conditions, sampling, chains, LoRA files."""

import ast
import builtins
import json

import numpy
import torch
import torch.nn.functional as F

from models.lora import Lora, merge_loras
from models.wan.schedulers import expert_index, get_schedule, make_solver
from models.wan.slots import Prompt
from pipelines.clip_plan import (
    Chain,
    Clip,
    overlap_of_latents,
    plan_clips,
    pose_indices,
    prompts_of_clips,
    upstream_pose_indices,
)
from pipelines.conditions import latent_frames
from pipelines.denoise import NEGATIVE, POSITIVE, Expert, denoise, two_branch
from pipelines.long_video.clip_conditions import frames_to_condition, latents_to_condition, picture_to_frame
from pipelines.long_video.media import limit_width
from preprocess.prompts import evaluate, prompt_lines
from tests.golden_checks.dit import build_transformer, record_outputs
from training.error_recycling import error_buckets, loss_weights

# ---------------------------------------------------------------------------------------------------------------- plans


def flag(case, name: str, default: int) -> int:
    flags = case.config.get("flags", [])
    return int(flags[flags.index(name) + 1]) if name in flags else default


def check_plan(case, clips: list[Clip]) -> None:
    """The tables that every assembly case has, of the clips."""
    case.check("frames", [(clip.index, i) for clip in clips for i in clip.kept])
    most = case.outputs["cond"].shape[1]
    case.check("cond", [[*clip.condition, *[(-2, -2)] * (most - len(clip.condition))] for clip in clips])


def check_assembly_v1(case) -> None:
    config = case.config
    flags, motion = config["flags"], config["num_motion_frames"]
    chain = Chain(
        config["frames_per_clip"], motion, motion, "earlier", repeats_reference="--repeat_first_clip" in flags
    )
    prefix = flags[flags.index("--prompt_prefix") + 1] if "--prompt_prefix" in flags else "none"
    prompts = prompts_of_clips(
        [f"P{i}" for i in range(config["num_prompts"])],
        config["num_clips"],
        times=flag(case, "--prompt_repeat_times", 1),
        first_only="--use_first_prompt_only" in flags,
        prefix=None if prefix == "none" else prefix,
        repeat="stop",
    )
    assert prompts == config["prompts_used"]
    clips = plan_clips(chain, prompts, seed_multiplier=config["seed_times"])
    assert len(clips) == config["clips_generated"]
    check_plan(case, clips)
    random = config["seed_times"] == -1  # upstream then draws them; we always count
    case.check("seeds", [-1 if random else clip.seed for clip in clips])


def check_assembly_talk(case) -> None:
    config = case.config
    motion = config["num_motion_frames"]
    prompts = [config["prompt"]] * config["num_clips"]
    clips = plan_clips(Chain(config["frames_per_clip"], motion, motion, "neither"), prompts)
    check_plan(case, clips)
    case.check("audio_start", [clip.start for clip in clips])


def check_assembly_dance(case) -> None:
    config = case.config
    motion, poses = config["num_motion_frames"], config["num_pose_frames"]
    chain = Chain(config["frames_per_clip"], motion, motion, "earlier")
    clips = plan_clips(chain, [config["prompt"]] * config["num_clips"])
    check_plan(case, clips)
    upstream = upstream_pose_indices(chain, len(clips), poses)
    case.check("pose_index", upstream)
    assert pose_indices(clips[0], chain.frames, poses) == upstream[0]


def check_assembly_v2(case) -> None:
    config = case.config
    frames = config["call_defaults"]["num_frames"]
    if config["variant"] == "pro":
        latents = flag(case, "--num_motion_latent", 1)
        overlap = flag(case, "--num_overlap_frame", 4)
        chain = Chain(frames, flag(case, "--num_motion_frame", 4), overlap, "later", motion_latents=latents)
    else:
        chain = Chain(frames, 1, 1, "later")
    prompts = prompts_of_clips([f"P{i}" for i in range(config["num_prompts"])], config["num_clips"], repeat="stop")
    assert (config["error"] is not None) == (len(prompts) < config["num_clips"])
    clips = plan_clips(chain, prompts, seed_multiplier=flag(case, "--seed_multiplier", 42))
    check_plan(case, clips)
    case.check("seeds", [clip.seed for clip in clips])
    case.check("prev_clip", [-1 if clip.previous is None else clip.previous for clip in clips])
    lengths = numpy.cumsum([len(clip.kept) for clip in clips]).tolist()
    assert config["frames_per_file"][: len(clips)] == lengths
    assert overlap_of_latents(1) == 5


# ------------------------------------------------------------------------------------------------------ prompts, sizes

UPSTREAM_DEFAULT = ["Default prompt: the subject is moving naturally"]


def run_assignments(text: str):
    """What `prompts` is after the file ran, of the statements that prompt files have; else ValueError, SyntaxError."""
    prompts, known = None, {"prompts", *dir(builtins)}
    for statement in ast.parse(text).body:
        names = [node for node in ast.walk(statement) if isinstance(node, ast.Name)]
        if unknown := {node.id for node in names if isinstance(node.ctx, ast.Load)} - known:
            raise ValueError(f"NameError: {unknown}")
        known |= {node.id for node in names}
        known |= {alias.asname or alias.name for alias in getattr(statement, "names", ()) if hasattr(alias, "asname")}
        match statement:
            case ast.Assign(targets=[ast.Name(id="prompts")]) | ast.AnnAssign(target=ast.Name(id="prompts")):
                prompts = evaluate(statement.value)
            case ast.AugAssign(target=ast.Name(id="prompts"), op=ast.Add()):
                prompts = prompts + evaluate(statement.value)
            case ast.Expr(ast.Call(func=ast.Attribute(value=ast.Name(id="prompts"), attr=method), args=[value])):
                prompts = prompts + ([evaluate(value)] if method == "append" else evaluate(value))
            case ast.Expr(ast.List()) if prompts is None:
                prompts = evaluate(statement.value)
    return prompts


def upstream_v1(text: str) -> list[str]:
    """What the loader of SVI 1.0 makes of a file, where it does not run its code. Ours takes more, and guesses less."""
    start = text.find("prompts = [")
    try:
        prompts = prompt_lines(text) if start < 0 else run_assignments(text[start:].strip())
    except (SyntaxError, ValueError, TypeError):
        prompts = []
    return prompts or UPSTREAM_DEFAULT


def upstream_v2(text: str) -> list[str]:
    start = text.find("prompts = [")
    try:
        return ast.literal_eval(text[start + len("prompts = ") :] if start >= 0 else text.strip())
    except (SyntaxError, ValueError):
        return []


def check_prompt_stream(case) -> None:
    """Both loaders' lists, and ours: the same wherever one of them reads a file as it is meant."""
    from errors import InputError
    from preprocess.prompts import read_prompt_stream

    expected = json.loads((case.folder / "expected.json").read_text(encoding="utf-8"))
    counts = {"v1": [], "v2": []}
    for key in case.config["keys"]:
        file = case.folder / f"prompt_{key}.txt"
        text = file.read_text(encoding="utf-8") if file.exists() else None
        v1 = UPSTREAM_DEFAULT if text is None else upstream_v1(text)
        v2 = [] if text is None else upstream_v2(text)
        # A tuple is a list in JSON.
        assert json.loads(json.dumps([v1, v2])) == [expected[key]["v1"], expected[key]["v2"]], key
        counts["v1"].append(len(v1))
        counts["v2"].append(len(v2))
        try:
            ours = read_prompt_stream(str(file))
        except InputError:  # where upstream goes on with a prompt nobody wrote, with none, or with what is none
            assert v1 == UPSTREAM_DEFAULT or not all(isinstance(prompt, str) for prompt in v1), key
            continue
        if v1 == UPSTREAM_DEFAULT:  # it could not read the file
            assert ours == (v2 or ours), key
        elif "prompts = [" in text or not (meant := list_meant(text)):
            assert ours == [prompt.removeprefix("\ufeff") for prompt in v1], key
        else:  # it takes the lines of a list for prompts
            assert ours == (v2 or meant), key
    for loader, lengths in counts.items():
        case.check(f"counts_{loader}", lengths)


def list_meant(text: str) -> list[str] | None:
    """Of a file that is Python as a whole, the list that it makes."""
    try:
        return run_assignments(text.removeprefix("\ufeff").strip())
    except (SyntaxError, ValueError, TypeError):
        return None


def check_dimensions(case) -> None:
    rows = case.inputs["rows"].tolist()
    case.check("hw", [limit_width(width, height, most) for width, height, most in rows])


# --------------------------------------------------------------------------------------------------------- conditions


class StubVAE:
    """The goldens' VAE: 8x8 means of groups of frames through a matrix, and back."""

    def __init__(self, weights: dict):
        self.weight, self.bias = weights["vae_stub.weight"], weights["vae_stub.bias"]  # (16, 3), (16,)

    def encode(self, clip: torch.Tensor) -> torch.Tensor:
        """(1, 3, T, H, W) -> (1, 16, t, H/8, W/8)"""
        groups = [clip[:, :, :1], *(clip[:, :, i : i + 4] for i in range(1, clip.shape[2], 4))]
        pooled = torch.stack([F.avg_pool2d(group.mean(2), 8) for group in groups], dim=2)
        return torch.einsum("cr,brthw->bcthw", self.weight, pooled) + self.bias[:, None, None, None]

    def decode(self, latents: torch.Tensor) -> numpy.ndarray:
        """(1, 16, t, h, w) -> (T, H, W, 3) uint8, truncated as upstream does"""
        centerd = latents - self.bias[:, None, None, None]
        colors = torch.einsum("cr,bcthw->brthw", self.weight, centerd) * (3 / self.weight.square().sum())
        frames = torch.cat((colors[:, :, :1], colors[:, :, 1:].repeat_interleave(4, dim=2)), dim=2).clamp(-1, 1)
        frames = frames.repeat_interleave(8, dim=3).repeat_interleave(8, dim=4)
        return ((frames + 1) * 127.5).clamp(0, 255)[0].permute(1, 2, 3, 0).numpy().astype(numpy.uint8)


def to_frames(pictures: torch.Tensor, config: dict) -> torch.Tensor:
    """(n, H0, W0, 3) or (H0, W0, 3) of 8-bit values -> (1, 3, n, H, W)"""
    pictures = pictures if pictures.ndim == 4 else pictures[None]
    frames = [picture_to_frame(p.numpy().astype(numpy.uint8), config["height"], config["width"]) for p in pictures]
    return torch.cat(frames, dim=2)


def check_y_v1(case) -> None:
    config = case.config
    frames, reference = to_frames(case.inputs["cond_frames"], config), to_frames(case.inputs["ref_image"], config)
    count = config["ref_pad_num"]
    condition = frames_to_condition(
        StubVAE(case.weights()),
        frames,
        config["num_frames"],
        reference=reference if count else None,
        reference_frames=count,
        marks_all=config["ref_pad_cfg"],
    )
    case.check("vae_input", condition.clip[0])
    case.check("clip_input", frames[:, :, 0])
    case.check("y", condition.y)


def check_y_v2(case) -> None:
    config = case.config
    image, anchor, end = (to_frames(case.inputs[n], config) if n in case.inputs else None for n in V2_PICTURES)
    options = {"anchor": {"reference": anchor}, "noanchor": {}, "end": {"reference": anchor, "end": end}}[
        config["mode"]
    ]
    condition = frames_to_condition(StubVAE(case.weights()), image, config["num_frames"], **options)
    case.check("vae_input", condition.clip[0])
    case.check("y", condition.y)


V2_PICTURES = ("image", "anchor", "end_image")


def check_y_pro(case) -> None:
    config = case.config
    anchor = to_frames(case.inputs["anchor"], config)
    case.check("anchor_vae_input", anchor[0])
    previous = None
    if config["clip_index"]:
        previous = case.inputs["prev_latents"][None, :, -config["num_motion_latent"] :]
    encoded = StubVAE(case.weights()).encode(anchor)
    case.check("y", latents_to_condition(encoded, previous, latent_frames(config["num_frames"])))


# ------------------------------------------------------------------------------------------------- sampling and chains


def expert_of(case, weights: dict, context: str, negative: str, scale: float) -> Expert:
    transformer = build_transformer(case.config["dit"], weights)
    image = case.inputs.get("clip_feature")
    prompts = {branch: Prompt(case.inputs[name], image) for branch, name in ((POSITIVE, context), (NEGATIVE, negative))}
    return Expert(transformer, prompts, two_branch(scale))


def check_sampling_v1(case) -> None:
    config = case.config
    schedule = get_schedule("euler", config["num_inference_steps"], config["shift"])
    case.check("timesteps", schedule.timesteps)
    expert = expert_of(case, case.weights(), "context", "negative_context", config["cfg_scale_text"])
    samples = []
    denoise(
        case.inputs["noise"],
        schedule,
        lambda step: expert,
        condition=case.inputs["y"],
        on_step=lambda step: samples.append(step.sample),
    )
    case.check("latents_steps", torch.stack(samples))


def check_chain_v2(case) -> None:
    """The whole of it: conditions from the clip before, two experts, and the hand-over."""
    config, weights = case.config, case.weights()
    vae = StubVAE(weights)
    schedule = get_schedule("euler", config["num_inference_steps"], config["shift"])
    experts = [expert_index(timestep, config["switch_DiT_boundary"]) for timestep in schedule.timesteps]
    of_expert = [
        {key.removeprefix(prefix): tensor for key, tensor in weights.items() if key.startswith(prefix)}
        for prefix in ("high.", "low.")
    ]
    is_pro = config["variant"] == "pro"
    anchor = to_frames(case.inputs["image"], config)
    num_latents, log, latents, last = latent_frames(config["num_frames"]), [], None, anchor
    for k in range(config["num_clips"]):
        if is_pro:
            previous = None if latents is None else latents[:, :, -config["num_motion_latent"] :]
            y = latents_to_condition(vae.encode(anchor), previous, num_latents)
        else:
            y = frames_to_condition(vae, last, config["num_frames"], reference=anchor).y
        case.check(f"y_{k}", y)
        pair = [expert_of(case, w, f"context_{k}", "context_neg", config["cfg_scale"]) for w in of_expert]
        latents = denoise(case.inputs[f"noise_{k}"], schedule, lambda step, pair=pair: pair[experts[step]], condition=y)
        case.check(f"latents_{k}", latents)
        case.check(f"last_frame_{k}", vae.decode(latents)[-1], atol=1)
        last = to_frames(case.outputs[f"last_frame_{k}"], config)  # upstream's: a flipped level would not stay small
        calls = 1 if config["cfg_scale"] == 1 else 2
        log += [[k, t, e] for t, e in zip(schedule.timesteps.tolist(), experts, strict=True) for _ in range(calls)]
    case.check("expert_log", log)


# --------------------------------------------------------------------------------------------------------- LoRA files


def check_lora(case, scales: list[float], files: list[str], sample: str) -> None:
    weights, inputs = case.weights(), case.inputs
    for merged in (False, True):
        transformer = build_transformer(case.config["dit"], weights)
        if merged:
            loras = [
                (Lora.from_tensors(case.weights(file), transformer, file), scale)
                for file, scale in zip(files, scales, strict=True)
            ]
            merge_loras(transformer, loras)
        outputs = record_outputs({"patches": transformer.patch_embedding, "block0": transformer.blocks[0]})
        prompt = Prompt(inputs["context"], inputs.get("clip_feature"))
        with torch.no_grad():
            velocity = transformer(inputs[sample], inputs["timestep"], prompt, condition=inputs["y"])
        name = "lora" if merged else "base"
        case.check(f"out_{name}", velocity)
        case.check(f"block0_{name}", outputs["block0"])
    case.check("patch_embed", outputs["patches"])  # after the LoRA, which leaves it alone


def check_lora_v1(case) -> None:
    check_lora(case, [case.config["lora_alpha_multiplier"]], [case.config["lora_file"]], "x")


def check_lora_v2(case) -> None:
    check_lora(case, case.config["alphas"], case.config["lora_files"], "latents")


def check_schedule_and_buckets(case) -> None:
    """Inference by Euler steps of a constant velocity, and the tables that training draws from."""
    config, inputs = case.config, case.inputs
    train = get_schedule("euler", config["num_train_timesteps"], config["shift"])
    case.check("train_sigmas", train.sigmas[:-1])
    case.check("train_timesteps", train.timesteps)
    case.check("train_weights", loss_weights(train.timesteps))
    grid = get_schedule("euler", config["num_grids"], config["shift"]).timesteps
    case.check("grid_timesteps", grid)
    case.check("grid_idx", error_buckets(train.timesteps, grid))
    case.check("extra_grid_idx", error_buckets(inputs["extra_timesteps"], grid))

    schedule = get_schedule("euler", config["num_inference_steps"], config["shift"])
    case.check("infer_sigmas", schedule.sigmas[:-1])
    case.check("infer_timesteps", schedule.timesteps)
    solver, path = make_solver(schedule), [inputs["x"]]
    for step in range(schedule.num_steps):
        path.append(solver.step(inputs["v"], step, path[-1]))
    case.check("euler_path", torch.stack(path))


CHECKS = {
    "svi_scheduler_and_buckets": check_schedule_and_buckets,
    "svi_clip_assembly_v1": check_assembly_v1,
    "svi_clip_assembly_talk": check_assembly_talk,
    "svi_clip_assembly_dance": check_assembly_dance,
    "svi_clip_assembly_v2": check_assembly_v2,
    "svi_prompt_stream": check_prompt_stream,
    "svi_dimensions": check_dimensions,
    "svi_y_v1": check_y_v1,
    "svi_y_v2": check_y_v2,
    "svi_y_v2_pro": check_y_pro,
    "svi_sampling_v1": check_sampling_v1,
    "svi_chain_v2": check_chain_v2,
    "svi_lora_v1": check_lora_v1,
    "svi_lora_v2": check_lora_v2,
}
