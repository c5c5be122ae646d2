"""What each memory mode takes at its peak, and what it costs in time."""

import functools

import torch
from torch import Tensor

from benchmarks.sections.bench import GIB, Bench, Row
from benchmarks.sections.models import (
    Inputs,
    call_bytes,
    num_parameters,
    num_tokens,
    random_transformer,
    step_needs,
)
from models.wan.config import WanConfig
from pipelines.memory import offload_groups
from pipelines.needs import MODES

COPYING = 3e9  # bytes/s, from below, at which weights go to the host or come back


def measure(bench: Bench) -> None:
    """One step from weights that lie in host memory: seconds to set the mode up (for resident and model, to move all
    weights), seconds of the second step, device memory at the peak of all, and what `--memory auto` reckons with.
    """
    for name, config in bench.sizes.transformers.items():
        flops, whole = step_needs(bench, config, bench.sizes)
        weights = 2 * num_parameters(config)
        call = call_bytes(config, num_tokens(bench.sizes.latents, config))
        for mode in (*MODES, "resident, fp8"):
            streamed = mode in ("group", "sequential")
            moved = weights * (2 + 4 * streamed)  # made and set up; two steps, there and back
            bench.free()
            bench.attempt(
                f"{name}, {mode}",
                functools.partial(_row, bench, config, mode),
                seconds=2 * flops / (0.3 * bench.rate) + moved / COPYING,
                # made on the device tensor by tensor; `group` holds what is outside the blocks and two of them
                device=call + (weights // 8 if streamed else weights // 2 if "fp8" in mode else weights),
                host=weights * (2 if mode == "group" else 1) if bench.on_gpu else 0,
            )


def _row(bench: Bench, config: WanConfig, mode: str) -> Row:
    memory, fp8 = mode.removesuffix(", fp8"), mode.endswith("fp8")
    transformer = random_transformer(config, bench.device, fp8=fp8, keep_on="cpu")
    inputs = Inputs(bench, config, bench.sizes.latents)
    prompt = inputs.prompt()

    def place() -> None:
        if memory in ("group", "sequential"):
            offload_groups(transformer, bench.device, memory)
        else:
            transformer.to(bench.device)

    @torch.no_grad()
    def step() -> Tensor:
        return transformer(inputs.latents, inputs.timestep, prompt)

    bench.free()
    bench.forget_peak()
    placing = bench.seconds(place)
    bench.seconds(step)  # warms up; under `group` it tells the hooks the order of the blocks
    found = {"seconds to set up": placing, "seconds a step": bench.seconds(step)} | bench.peak()
    needs = bench.estimate(config)
    weights = (needs.weights_fp8 if fp8 else needs.weights)[memory]
    text = 0 if memory == "sequential" else needs.kept_text / 2  # one prompt's
    return found | {"estimated GiB": (weights + needs.call + text) / GIB}
