"""Golden kinds of SVI's long videos: plans, prompt files, sizes, conditions, sampling, chains, LoRA files."""

import ast
import json

import numpy
import torch

from pipelines.clip_plan import (
    Chain,
    Clip,
    overlap_of_latents,
    plan_clips,
    pose_indices,
    prompts_of_clips,
    upstream_pose_indices,
)
from pipelines.long_video_settings import limit_width
from preprocess.prompts import prompt_lines

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


def upstream_v1(text: str) -> list[str]:
    """What the loader of SVI 1.0 makes of a file, where it does not run its code. Ours takes more, and guesses less."""
    start = text.find("prompts = [")
    if start < 0:
        return prompt_lines(text) or UPSTREAM_DEFAULT
    try:
        assignment = ast.parse(text[start:]).body[0]
        return ast.literal_eval(assignment.value)
    except (SyntaxError, ValueError):
        return UPSTREAM_DEFAULT


def upstream_v2(text: str) -> list[str]:
    start = text.find("prompts = [")
    try:
        return ast.literal_eval(text[start + len("prompts = ") :] if start >= 0 else text.strip())
    except (SyntaxError, ValueError):
        return []


def check_prompt_stream(case) -> None:
    """Both loaders' lists, and ours: the longer of the two wherever they read a file as it is meant."""
    from errors import InputError
    from preprocess.prompts import read_prompt_stream

    expected = json.loads((case.folder / "expected.json").read_text(encoding="utf-8"))
    counts = {"v1": [], "v2": []}
    for key in case.config["keys"]:
        file = case.folder / f"prompt_{key}.txt"
        text = file.read_text(encoding="utf-8") if file.exists() else None
        v1 = UPSTREAM_DEFAULT if text is None else upstream_v1(text)
        v2 = [] if text is None else upstream_v2(text)
        assert (v1, v2) == (expected[key]["v1"], expected[key]["v2"]), key
        counts["v1"].append(len(v1))
        counts["v2"].append(len(v2))
        try:
            ours = read_prompt_stream(str(file))
        except InputError:
            ours = UPSTREAM_DEFAULT  # where upstream goes on with a prompt nobody wrote, or with none
        is_list_taken_for_a_line = len(v1) == 1 and "[" in v1[0]
        assert ours == (v2 or ours if is_list_taken_for_a_line else v1), key
    for loader, lengths in counts.items():
        case.check(f"counts_{loader}", lengths)


def check_dimensions(case) -> None:
    rows = case.inputs["rows"].tolist()
    case.check("hw", [limit_width(width, height, most) for width, height, most in rows])


CHECKS = {
    "svi_clip_assembly_v1": check_assembly_v1,
    "svi_clip_assembly_talk": check_assembly_talk,
    "svi_clip_assembly_dance": check_assembly_dance,
    "svi_clip_assembly_v2": check_assembly_v2,
    "svi_prompt_stream": check_prompt_stream,
    "svi_dimensions": check_dimensions,
}
