"""What an identity, a VACE branch and an audio adapter add to a step."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.sections.bench import Bench, Row
from benchmarks.sections.models import Inputs, fill_randomly, random_stand_in, random_transformer, step_needs
from models.audio_adapter import AudioAdapter
from models.vace import CONTEXT_CHANNELS, VaceBranch, default_layers
from models.wan.config import WanConfig
from models.wan.slots import Plugin
from models.wan.transformer import WanTransformer


def measure(bench: Bench) -> None:
    """Steps with and without the plug-in take turns; bf16, eager, torch's own choice of attention. An identity's keys
    and values are computed once a video: that time stands apart.
    """
    for name, config in bench.sizes.transformers.items():
        bench.free()
        flops, needed = step_needs(bench, config, bench.sizes)
        # the branch of 1.3B is half of it again
        time, needed = bench.expect(2.5 * flops), int(1.6 * needed)
        if reason := bench.lacks(seconds=time, device=needed):
            bench.rows.append({"": f"{name}, plug-ins", "note": f"skipped: {reason}"})
            continue
        transformer = random_transformer(config, bench.device)
        inputs = Inputs(bench, config, bench.sizes.latents)
        kinds = {"identity": _identity, "VACE": _vace} | ({"audio": _audio} if name in bench.sizes.audio else {})
        for kind, make in kinds.items():
            bench.attempt(
                f"{name}, {kind}",
                functools.partial(_row, bench, name, transformer, inputs, make),
                seconds=time,
            )


@torch.no_grad()
def _row(bench: Bench, name: str, transformer: WanTransformer, inputs: Inputs, make: Callable) -> Row:
    plugin, once = make(bench, name, transformer)
    prompt = inputs.prompt()
    with_branch = inputs.prompt()  # it keeps the branch's keys too

    def step() -> Tensor:
        return transformer(inputs.latents, inputs.timestep, prompt)

    def step_with() -> Tensor:
        return transformer(inputs.latents, inputs.timestep, with_branch, plugins=[plugin])

    seconds = bench.medians({"without": step, "with": step_with})
    added = seconds["with"] - seconds["without"]
    found = {"seconds without": seconds["without"], "seconds with": seconds["with"]}
    return found | {"adds % of a step": 100 * added / seconds["without"]} | once | bench.peak()


def _identity(bench: Bench, name: str, transformer: WanTransformer) -> tuple[Plugin, Row]:
    side, (_, height, width) = bench.sizes.reference, bench.sizes.latents
    photo = torch.randn(1, transformer.config.in_dim, 1, side, side, generator=torch.Generator().manual_seed(4))
    stand_in = random_stand_in(transformer, bench.sizes.lora_rank)

    @torch.no_grad()
    def encode() -> Plugin:
        return stand_in.encode(transformer, [photo.to(bench.device)], (height // 2, width // 2))

    return encode(), {"once a video, seconds": bench.median(encode)}


def _vace(bench: Bench, name: str, transformer: WanTransformer) -> tuple[Plugin, Row]:
    config = transformer.config
    with torch.device("meta"):
        branch = VaceBranch(
            dim=config.dim,
            ffn_dim=config.ffn_dim,
            num_heads=config.num_heads,
            num_layers=config.num_layers,
            vace_layers=default_layers(bench.sizes.vace_blocks[name], config.num_layers),
        )
    fill_randomly(branch, bench.device, torch.bfloat16)
    context = torch.randn(1, CONTEXT_CHANNELS, *bench.sizes.latents, generator=torch.Generator().manual_seed(5))
    return branch.plugin(context.to(bench.device)), {}


def _audio(bench: Bench, name: str, transformer: WanTransformer) -> tuple[Plugin, Row]:
    config: WanConfig = transformer.config
    with torch.device("meta"):
        adapter = AudioAdapter(config.dim, config.num_layers)
    fill_randomly(adapter, bench.device, torch.bfloat16)
    generator = torch.Generator().manual_seed(6)
    features = torch.randn(1, bench.sizes.audio_tokens, adapter.config.audio_dim, generator=generator)
    return adapter.plugin(features.to(bench.device), bench.sizes.num_frames), {}
