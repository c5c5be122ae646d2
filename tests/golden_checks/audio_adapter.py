"""Golden kinds of the audio adapter: which tokens a frame hears, the projector alone, forward passes, a LoRA."""

import torch

from models.audio_adapter import (
    AudioAdapter,
    adapter_from_tensors,
    audio_windows,
    frame_ranges,
    gather_windows,
    split_adapter,
)
from models.lora import Lora, attach_loras, merge_loras
from models.wan.slots import Prompt
from models.wan.transformer import WanTransformer
from tests.golden_checks.dit import build_transformer, numbered, record_outputs


def check_audio_split(case) -> None:
    for tokens, frames in case.config["combos"]:
        name = f"{tokens}_{frames}"
        case.check(f"ranges_{name}", frame_ranges(tokens, frames))
        windows = audio_windows(tokens, frames, widened=case.config["expand"])
        case.check(f"windows_{name}", gather_windows(case.inputs[f"input_{name}"], windows))
        case.check(f"lens_{name}", (windows >= 0).sum(dim=1))


def check_vocal_projector(case) -> None:
    config, inputs = case.config, case.inputs
    adapter = AudioAdapter(
        dim=config["dim"],
        num_layers=0,
        audio_dim=config["audio_in_dim"],
        audio_hidden_dim=config["audio_hidden_dim"],
        num_blocks=config["vocal_num_blocks"],
        ffn_dim=config["vocal_ffn_mult"] * config["dim"],
        num_heads=config["vocal_num_heads"],
        eps=config["eps"],
    ).requires_grad_(False)
    projector = adapter.vocal_projector
    projector.load_state_dict(case.weights())
    length, frames = inputs["vocal_embeddings"].shape[1], config["video_sample_n_frames"]
    windows = audio_windows(length, frames, widened=config["vocal_expand"])
    modules = {"vocal_proj": projector.proj_model}
    for i, block in enumerate(projector.blocks):
        modules |= {f"vocal_block{i}": block, f"vocal_block{i}_cross_attn": block.cross_attn}
    recorded = record_outputs(modules)
    tokens = inputs["latents"].unflatten(1, (len(windows), -1))
    out = adapter(inputs["vocal_embeddings"], windows, tokens, inputs["e"][:, None], inputs["e0"][:, None])
    case.check("out", out)
    case.check("ranges", frame_ranges(length, frames))
    case.check("lens", (windows >= 0).sum(dim=1))
    case.check("vocal_proj", recorded["vocal_proj"])
    case.check("vocal_windows", gather_windows(recorded["vocal_proj"], windows))
    for name in modules.keys() - {"vocal_proj"}:
        case.check(name, recorded[name].flatten(1, 2))  # (1, F, m, D) -> (1, F·m, D)


def build_avatar(config: dict, weights: dict) -> tuple[WanTransformer, AudioAdapter]:
    base, vocal = split_adapter(weights)
    transformer = build_transformer(config, base)
    return transformer, adapter_from_tensors(vocal, transformer)


def run_forward(case, transformer: WanTransformer, adapter: AudioAdapter) -> torch.Tensor:
    """(B, 16, F, H, W). In a batch of three upstream gives the first row no audio: 1.3B by its place alone."""
    inputs, config = case.inputs, case.config
    batch = inputs["x"].shape[0]
    plugin = adapter.plugin(
        inputs["vocal_embeddings"],
        config["video_sample_n_frames"],
        hears=[True] if batch == 1 or adapter.is_two_stage else [False, *[True] * (batch - 1)],
        clip_level=config.get("is_clip_level_modeling", False),
    )
    return transformer(
        inputs["x"],
        inputs["t"],
        Prompt(numbered(inputs, "context"), inputs["clip_fea"]),
        condition=inputs["y"],
        plugins=[plugin],
        seq_len=config["seq_len"],
        attend_padding=True,
    )


def check_dit_forward(case) -> None:
    transformer, adapter = build_avatar(case.config, case.weights())
    projector = adapter.vocal_projector
    recorded = record_outputs(
        {
            "adapter": adapter,
            "vocal_proj": projector.proj_model,
            **{f"vocal_block{i}": block for i, block in enumerate(projector.blocks)},
            **{f"block{i}": block for i, block in enumerate(transformer.blocks)},
            "block0_self_attn": transformer.blocks[0].self_attn,
            "block0_cross_attn": transformer.blocks[0].cross_attn,
        }
    )
    entered = []
    transformer.blocks[0].register_forward_pre_hook(lambda _, args: entered.append(args))
    case.check("out", run_forward(case, transformer, adapter))
    tokens, ctx, _ = entered[0]
    recorded |= {
        "patch_tokens": tokens,
        "e0": ctx.modulation[:, 0],
        "context_first": torch.cat((ctx.image, ctx.text), dim=1)[:, ::37],
    }
    for name in case.outputs.keys() & recorded.keys():
        ours, rows = recorded[name], case.outputs[name].shape[0]
        if name.startswith("vocal_block"):
            ours = ours.flatten(1, 2)  # (B, F, m, D) -> (B, F·m, D)
        # Of the rows of a batch some records keep one: the first of 14B's adapter and tokens, otherwise the last.
        first = adapter.is_two_stage and (name == "patch_tokens" or name.startswith("vocal_block"))
        case.check(name, ours[:rows] if first else ours[-rows:])
    case.check("vocal_context", recorded["adapter"][-case.outputs["vocal_context"].shape[0] :])
    windows = audio_windows(case.inputs["vocal_embeddings"].shape[1], case.config["video_sample_n_frames"])
    lengths = (windows >= 0).sum(dim=1)
    case.check("vocal_context_lens", lengths.repeat(case.outputs["vocal_context_lens"].numel() // len(lengths)))


def check_lora(case) -> None:
    files = {"transformer": {}, "lora": {}}
    for key, tensor in case.weights().items():
        kind, _, name = key.partition(":")
        files[kind][name] = tensor
    config = case.config
    case.config = config["dit"] | {name: config[name] for name in ("video_sample_n_frames", "seq_len")}
    scales = {"before": None, "hooked": 1.0, "merged": config["merge_multiplier"]}
    for name, scale in scales.items():
        transformer, adapter = build_avatar(config["dit"], files["transformer"])
        if scale is not None:
            lora = Lora.from_tensors(files["lora"], transformer)
            assert len(lora.pairs) == config["n_lora_modules"] and set(lora.targets) == set(config["changed"])
            (attach_loras if name == "hooked" else merge_loras)(transformer, [(lora, scale)])
        case.check(name, run_forward(case, transformer, adapter))
    merged = transformer.state_dict()
    assert {key for key in merged if not torch.equal(merged[key], files["transformer"][key])} == set(config["changed"])
    for key in case.outputs:
        if key.startswith("merged:"):
            case.check(key, merged[key.removeprefix("merged:")])


CHECKS = {
    "stableavatar_audio_split": check_audio_split,
    "stableavatar_dit_forward": check_dit_forward,
    "stableavatar_lora": check_lora,
    "stableavatar_vocal_projector": check_vocal_projector,
}
