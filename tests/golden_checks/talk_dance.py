"""Golden kinds of SVI-Talk (audio windows, audio layers, three-branch guidance) and SVI-Dance (pose embedder)."""

from models.multitalk import Speech, audio_window, latent_windows, multitalk_from_tensors
from models.pose_embedder import KEY, pose_embedder_from_tensors
from models.wan.schedulers import get_schedule
from models.wan.slots import Prompt
from pipelines.denoise import NEGATIVE, POSITIVE, Expert, denoise, two_branch
from pipelines.guidance import UNCONDITIONAL, three_branch
from tests.golden_checks.dit import build_transformer, record_outputs


def check_audio_window(case) -> None:
    config = case.config
    for start in config["starts"]:
        window = audio_window(case.inputs["audio_embed"], start, config["num_frames"], config["window"])
        first, latter = latent_windows(window, config["vae_scale"])
        case.check(f"window_{start}", window)
        case.check(f"first_{start}", first)
        case.check(f"latter_{start}", latter)


def open_case(case, is_own):
    """The transformer, the plug-in's weights, and the prompts of the branches."""
    weights, inputs = case.weights(), case.inputs
    own = {name: tensor for name, tensor in weights.items() if is_own(name)}
    transformer = build_transformer(case.config["dit"], {n: t for n, t in weights.items() if n not in own})
    positive, negative = (Prompt(inputs[n], inputs["clip_feature"]) for n in ("context", "negative_context"))
    return transformer, own, {POSITIVE: positive, NEGATIVE: negative, UNCONDITIONAL: negative}


def forward(case, transformer, prompts, plugin):
    inputs = case.inputs
    return transformer(inputs["x"], inputs["timestep"], prompts[POSITIVE], condition=inputs["y"], plugins=[plugin])


def sample(case, expert: Expert):
    schedule = get_schedule("euler", case.config["num_inference_steps"], case.config["shift"])
    return denoise(case.inputs["x"], schedule, lambda step: expert, condition=case.inputs["y"])


def check_talk(case) -> None:
    transformer, own, prompts = open_case(case, lambda name: "audio_" in name or "norm_x" in name)
    speech = Speech(multitalk_from_tensors(own, transformer), case.inputs["audio_first"], case.inputs["audio_latter"])
    recorded = record_outputs({"patch_embed": transformer.patch_embedding, "block0": transformer.blocks[0]})
    case.check("out", forward(case, transformer, prompts, speech))
    case.check("audio_tokens", speech.tokens(transformer.device))
    case.check("patch_embed", recorded["patch_embed"])
    case.check("block0", recorded["block0"])
    guidance = three_branch(case.config["cfg"]["text"], case.config["cfg"]["audio"])
    plugins = {POSITIVE: [speech], NEGATIVE: [speech], UNCONDITIONAL: [speech.silent()]}
    case.check("sampled", sample(case, Expert(transformer, prompts, guidance, branch_plugins=plugins)))


def check_dance(case) -> None:
    transformer, own, prompts = open_case(case, lambda name: name.startswith(KEY))
    pose = pose_embedder_from_tensors(own, transformer.config.dim).encode(case.inputs["pose"].permute(1, 2, 3, 0))
    recorded = record_outputs({"block0": transformer.blocks[0]})
    case.check("pose_tokens", pose.tokens)
    case.check("out", forward(case, transformer, prompts, pose))
    case.check("block0", recorded["block0"])
    guidance = two_branch(case.config["cfg_scale_text"])
    both, one = [
        Expert(transformer, prompts, guidance, [pose]),
        Expert(transformer, prompts, guidance, branch_plugins={POSITIVE: [pose]}),
    ]
    case.check("sampled_pose_in_uncond", sample(case, both))
    case.check("sampled_no_pose_in_uncond", sample(case, one))


CHECKS = {
    "svi_dance_condition": check_dance,
    "svi_talk_audio_window": check_audio_window,
    "svi_talk_forward_and_cfg": check_talk,
}
