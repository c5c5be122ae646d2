"""One denoising step, ours and diffusers', by attention backend, compiled or not, in bf16 and with fp8 weights."""

from collections.abc import Callable

import torch

from benchmarks.sections.bench import Bench, Row
from benchmarks.sections.models import (
    BACKENDS,
    Inputs,
    diffusers_twin,
    distance,
    random_transformer,
    step_needs,
    unusable,
)
from models.wan.config import WanConfig

THEIRS, OURS = "diffusers", "ours"


def measure(bench: Bench) -> None:
    """A step is one forward pass, without guidance. The limit is the time of its FLOPs at the rate of the product;
    "x diffusers" is against its eager run with torch's own choice of attention.
    """
    for name, config in bench.sizes.transformers.items():
        bench.free()
        _of_shape(bench, name, config)


def _of_shape(bench: Bench, name: str, config: WanConfig) -> None:
    sizes = bench.sizes
    flops, needed = step_needs(bench, config, sizes)
    time = bench.expect(flops)
    bench.attempt(f"{name} bf16", lambda: _bf16(bench, name, config, flops, time), seconds=time, device=needed)
    torch.compiler.reset()  # else the next shape would be compiled for any shape
    bench.free()
    flops, needed = step_needs(bench, config, sizes, fp8=True)

    bench.attempt(f"{name} fp8", lambda: _fp8(bench, name, config, flops, time), seconds=time, device=needed)
    torch.compiler.reset()
    bench.free()


@torch.no_grad()
def _bf16(bench: Bench, name: str, config: WanConfig, flops: int, time: float) -> None:
    ours = random_transformer(config, bench.device)
    theirs = diffusers_twin(ours)
    inputs = Inputs(bench, config, bench.sizes.latents)
    prompt = inputs.prompt()

    def our_step() -> torch.Tensor:
        return ours(inputs.latents, inputs.timestep, prompt)

    def their_step() -> torch.Tensor:
        return inputs.theirs(theirs)

    def row(step: Callable, peer: Row | None = None) -> Row:
        return _row(bench, flops, step, peer)

    peers = {}
    found = {}
    for backend in BACKENDS:
        label = f"{name} bf16, %s, {BACKENDS[backend]}"
        if reason := unusable(ours, backend):
            bench.rows.append({"": label % OURS, "note": f"skipped: {reason}"})
            continue
        if backend == "native":
            peers["eager"] = bench.attempt(label % THEIRS, lambda: row(their_step), seconds=time)
            if peers["eager"]:  # the same weights, or the comparison means nothing
                peers["eager"]["note"] = f"predictions differ by {distance(our_step(), their_step()):.2g} %"
        found[backend] = bench.attempt(label % OURS, lambda: row(our_step, peers.get("eager")), seconds=time)

    timed = {backend: made["seconds"] for backend, made in found.items() if made}
    fastest = min(timed, key=timed.get, default="native")
    label = f"{name} bf16, %s, {BACKENDS[fastest]}, compiled"
    for model in (ours, theirs):
        model.set_attention_backend(fastest)
        model.compile_repeated_blocks(backend=compiler(bench))
    needs = {"seconds": time + compiling(bench)}
    made = bench.attempt(label % OURS, lambda: row(our_step, peers.get("eager")), **needs)
    # The peer compiled too, once: it takes a minute, and would say the same of a larger model.
    if made and name == next(iter(bench.sizes.transformers)):
        peer = bench.attempt(label % THEIRS, lambda: row(their_step, peers.get("eager")), **needs)
        made["note"] = f"{peer['seconds'] / made['seconds']:.2f} x diffusers compiled" if peer else ""


@torch.no_grad()
def _fp8(bench: Bench, name: str, config: WanConfig, flops: int, time: float) -> None:
    ours = random_transformer(config, bench.device, fp8=True)
    inputs = Inputs(bench, config, bench.sizes.latents)
    prompt = inputs.prompt()

    def row() -> Row:
        return _row(bench, flops, lambda: ours(inputs.latents, inputs.timestep, prompt))

    label = f"{name} fp8 weights, {OURS}, {BACKENDS['native']}"
    bench.attempt(label, row, seconds=time)
    ours.compile_repeated_blocks(backend=compiler(bench))  # the scripts refuse it yet
    bench.attempt(f"{label}, compiled", row, seconds=time + compiling(bench))


def compiler(bench: Bench) -> str:
    """A CPU shows that the road is open; making machine code of it would take the better part of the time."""
    return "inductor" if bench.on_gpu else "eager"


def compiling(bench: Bench) -> float:
    """Seconds that compiling a block takes, at most."""
    return 90.0 if bench.on_gpu else 0.0


def _row(bench: Bench, flops: int, step: Callable[[], torch.Tensor], peer: Row | None = None) -> Row:
    median = bench.median(step)
    found = {"seconds": median} | bench.of_limit(flops, median)
    if peer:
        found["x diffusers"] = peer["seconds"] / median
    return found | bench.peak()
