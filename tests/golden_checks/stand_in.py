"""Golden kinds of Stand-In: positions, forward passes with the identity's keys and values, whole sampling loops."""

import torch

from models.identity.stand_in import REFERENCE_TIME, StandIn
from models.wan.attention import rope_table
from models.wan.schedulers import expert_index, get_schedule
from models.wan.slots import Prompt
from models.wan.tea_cache import TeaCache
from pipelines.conditions import image_to_video, initial_noise
from pipelines.denoise import NEGATIVE, POSITIVE, Expert, denoise, two_branch
from tests.golden_checks.dit import build_transformer, numbered, record_outputs


def build_stand_in(config: dict, weights: dict):
    """The base transformer and its adapter, from one golden weights file."""
    base = {key: tensor for key, tensor in weights.items() if "_loras." not in key}
    transformer = build_transformer(config, base)
    adapter = {key: tensor for key, tensor in weights.items() if "_loras." in key}
    return transformer, StandIn.from_tensors(adapter, transformer)


def check_rope(case) -> None:
    head_dim, (frames, height, width) = case.config["head_dim"], case.config["grid_fhw"]
    tables = {
        "video": rope_table((frames, height, width), head_dim, (0, 0, 0), torch.device("cpu")),
        "ip": rope_table((1, *case.config["ip_hw"]), head_dim, (REFERENCE_TIME, height, width), torch.device("cpu")),
    }
    for name, (cos, sin) in tables.items():
        rows = case.outputs[f"{name}_index"]
        case.check(f"{name}_cos", cos[0, rows, 0])
        case.check(f"{name}_sin", sin[0, rows, 0])
        case.checked.add(f"{name}_index")  # which rows the file keeps: an index, not a result


def check_forward(case) -> None:
    """Two steps of both branches with one cached identity, and the plain network before and after."""
    check_forward_with(case, *build_stand_in(case.config, case.weights()))


def check_forward_with(case, transformer, stand_in, control=(), before_control=lambda index, x: x) -> None:
    """The forward passes of the case.

    Args:
        control: plug-ins that take part in every call of the video, beside the identity.
        before_control: (block, its output) -> the output without what `control` added at the block's end.
    """
    inputs, outputs = case.inputs, case.outputs
    multi = "ip_image_latent0" in inputs
    references = numbered(inputs, "ip_image_latent") if multi else [inputs["ip_image_latent"]]
    _, _, frames, height, width = inputs["latents_step0"].shape
    grid = (height // 2, width // 2)

    seen_tokens, seen_times, seen_ropes = [], [], []

    def spy(_, args):
        tokens, ctx, _ = args
        seen_tokens.append(tokens)
        seen_times.append(ctx.modulation)
        seen_ropes.append(ctx.rope)

    transformer.blocks[0].register_forward_pre_hook(spy)
    recorded = record_outputs({f"block{i}": block for i, block in enumerate(transformer.blocks)})

    def predict(step: int, branch: str, plugins=()) -> torch.Tensor:
        prompt = Prompt(inputs[f"context_{branch}"])
        return transformer(
            inputs[f"latents_step{step}"], inputs[f"timestep{step}"], prompt, plugins=[*plugins, *control]
        )

    plain = predict(0, "posi")
    if "no_identity.posi" in outputs:
        case.check("no_identity.posi", plain)
    if "tokens_video" in outputs:
        case.check("tokens_video", seen_tokens[0])
    cos, sin = seen_ropes[0]
    if "rope_video_cos" in outputs:
        case.check("rope_video_cos", cos[0, :, 0])
        case.check("rope_video_sin", sin[0, :, 0])

    seen_tokens.clear(), seen_times.clear(), seen_ropes.clear()
    reference_blocks = []
    for i, block in enumerate(transformer.blocks):
        block.register_forward_hook(lambda _, args, output, i=i: reference_blocks.append((i, args[1].text, output)))
    identity = stand_in.encode(transformer, references, grid)
    reference_outputs = [(i, output) for i, text, output in reference_blocks if text is None]
    for name in outputs:
        if name.startswith("step0.posi.block") and "x_ip" in name:
            block, _, person = name.removeprefix("step0.posi.block").partition(".x_ip")
            matching = [output for i, output in reference_outputs if i == int(block)]
            case.check(name, matching[int(person or 0)])
    if "tokens_ip" in outputs:
        case.check("tokens_ip", seen_tokens[0])
        case.check("t_mod_ip", seen_times[0].squeeze(1))
    case.check("rope_ip_cos", torch.cat([cos[0, :, 0] for cos, _ in seen_ropes]))
    case.check("rope_ip_sin", torch.cat([sin[0, :, 0] for _, sin in seen_ropes]))
    for i, (key, value) in enumerate(identity.keys_values):
        case.check(f"kv_cache.block{i}.k_ip", key.flatten(2))
        case.check(f"kv_cache.block{i}.v_ip", value.flatten(2))

    for step in range(sum(name.startswith("timestep") for name in inputs)):
        positive = predict(step, "posi", [identity])
        case.check(f"step{step}.noise_pred_posi", positive)
        for i in range(len(transformer.blocks)):
            if f"step{step}.posi.block{i}.x" in outputs:
                case.check(f"step{step}.posi.block{i}.x", before_control(i, recorded[f"block{i}"]))
        negative = predict(step, "nega", [identity])
        case.check(f"step{step}.noise_pred_nega", negative)
        branches = {POSITIVE: positive, NEGATIVE: negative}
        for name in outputs:
            if name.startswith(guided := f"step{step}.cfg"):
                case.check(name, two_branch(float(name.removeprefix(guided)))(branches.__getitem__))
    assert torch.equal(plain, predict(0, "posi")), "an identity was left behind on the model"


def check_sampling(case) -> None:
    config, inputs = case.config, case.inputs
    weights = case.weights()
    names = ("high.", "low.") if config["two_experts"] else ("",)
    pairs = [
        build_stand_in(config, {k.removeprefix(name): v for k, v in weights.items() if k.startswith(name)})
        for name in names
    ]
    case.check("vae_input_ip", image_to_video(inputs["ip_image"]))
    noise = initial_noise((16, config["num_frames"], config["height"], config["width"]), seed=config["seed"])
    case.check("noise", noise)

    schedule = get_schedule("euler", config["num_inference_steps"], config["sigma_shift"])
    case.check("sigmas", schedule.sigmas[:-1])
    case.check("timesteps", schedule.timesteps)

    calls: list[tuple[int, bool, float]] = []  # (expert, first call of that expert, timestep)
    experts: dict[int, Expert] = {}
    grid = (config["height"] // 16, config["width"] // 16)

    def expert_at(step: int) -> Expert:
        index = expert_index(schedule.timesteps[step], config["switch_DiT_boundary"])
        if index not in experts:
            transformer, stand_in = pairs[index]
            identity = stand_in.encode(transformer, [inputs["ip_image_latent"]], grid)
            caches = {}
            if config["tea_cache_l1_thresh"] is not None:
                caches = {b: TeaCache(schedule.num_steps, config["tea_cache_l1_thresh"]) for b in (POSITIVE, NEGATIVE)}
            experts[index] = Expert(
                transformer,
                {POSITIVE: Prompt(inputs["context_posi"]), NEGATIVE: Prompt(inputs["context_nega"])},
                two_branch(config["cfg_scale"]),
                [identity],
                caches,
            )
            transformer.register_forward_pre_hook(
                lambda _, args: calls.append((index, not any(c[0] == index for c in calls), float(args[1][0])))
            )
        return experts[index]

    samples = [noise]
    final = denoise(noise, schedule, expert_at, on_step=lambda step: samples.append(step.sample))
    for step in range(schedule.num_steps):
        case.check(f"step{step}.latents", samples[step + 1])
        width = (schedule.sigmas[step + 1] - schedule.sigmas[step]).item()
        # What the solver was given: recovered from its step, x_next = x + v·Δσ, hence with Δσ's rounding.
        velocity = (samples[step + 1] - samples[step]) / width
        case.check(f"step{step}.noise_pred", velocity, atol=max(case.atol, 2e-6 / abs(width)))
    case.check("final_latents", final)
    case.check("call_expert", torch.tensor([c[0] for c in calls]))
    case.check("call_has_ip", torch.tensor([int(c[1]) for c in calls]))
    case.check("call_timestep", torch.tensor([c[2] for c in calls]))
    if "teacache_skipped" in case.outputs:
        caches = experts[0].step_caches
        pairs = zip(caches[POSITIVE].skipped, caches[NEGATIVE].skipped, strict=True)
        case.check("teacache_skipped", torch.tensor([int(skipped) for pair in pairs for skipped in pair]))


CHECKS = {
    "standin_dit_forward": check_forward,
    "standin_multi_forward": check_forward,
    "standin_rope": check_rope,
    "standin_sampling": check_sampling,
}
