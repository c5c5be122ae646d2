"""Seconds a denoising step of a talking video takes: with and without a step cache, with the sound's features computed
once a video, as here, or in every step, as upstream does.

    python -m benchmarks.avatar_speed
    python -m benchmarks.avatar_speed --dim 512 --layers 8 --size 128 --steps 12

The networks have the released layout at a chosen width, with random weights; wav2vec2 has its released width. One
window is denoised, all variants in turn, in the same process.
"""

import argparse
import time

import numpy
import torch
from transformers import Wav2Vec2Config, Wav2Vec2Model

from models.audio_adapter import AudioAdapter
from models.audio_encoder import AudioEncoder
from models.wan.schedulers import get_schedule, make_solver
from models.wan.slots import Prompt
from models.wan.tea_cache import COEFFICIENTS, TeaCache
from models.wan.transformer import WanTransformer
from pipelines.denoise import Expert
from pipelines.guidance import branch_plugins, branch_prompts, three_branch
from pipelines.tiny import fill_from_seed

NUM_FRAMES = 81
SAMPLES = 84 * 640  # that a window of 81 frames hears


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=256, help="width of the transformer; the released one has 1536")
    parser.add_argument("--layers", type=int, default=4, help="the released one has 30")
    parser.add_argument("--size", type=int, default=128, help="width and height in pixels")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threshold", type=float, default=0.1, help="of the step cache")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()

    heads = args.dim // 128
    shape = {"in_dim": 36, "ffn_dim": 5 * args.dim, "num_heads": heads, "image_dim": 1280, "num_layers": args.layers}
    transformer = fill_from_seed(WanTransformer(dim=args.dim, **shape), 0)
    adapter = fill_from_seed(AudioAdapter(args.dim, args.layers), 1)
    encoder = AudioEncoder(fill_from_seed(Wav2Vec2Model(Wav2Vec2Config()), 2))
    generator = torch.Generator().manual_seed(3)
    side = args.size // 8
    noise = torch.randn(1, 16, 21, side, side, generator=generator)
    condition = torch.randn(1, 20, 21, side, side, generator=generator)
    image = torch.randn(1, 257, 1280, generator=generator)
    texts = [torch.randn(40, 4096, generator=generator) for _ in range(2)]
    samples = numpy.random.default_rng(4).standard_normal(SAMPLES).astype(numpy.float32)
    schedule = get_schedule("euler-flow", args.steps, 5.0)
    coefficients = COEFFICIENTS["fun-inp-1.3B"]

    @torch.no_grad()
    def run(recomputed: bool, cached: bool) -> tuple[float, float]:
        """Seconds a step, and the share of steps that a cache skipped."""
        prompts = branch_prompts(*(Prompt([text], image) for text in texts))
        features = encoder.last_hidden_state(samples)
        caches = {}
        if cached:
            caches = {b: TeaCache(args.steps, args.threshold, coefficients, first_steps=5) for b in prompts}
        solver, latents = make_solver(schedule), noise
        start = time.perf_counter()
        for step in range(args.steps):
            if recomputed:
                features = encoder.last_hidden_state(samples)
            plugins = branch_plugins(adapter, features, NUM_FRAMES)
            expert = Expert(transformer, prompts, three_branch(5.0, 4.0), (), caches, plugins)
            timestep = schedule.timesteps[step].expand(1)
            latents = solver.step(expert.velocity(latents, timestep, step, args.steps, condition), step, latents)
        skipped = sum(caches["positive"].skipped) / args.steps if cached else 0.0
        return (time.perf_counter() - start) / args.steps, skipped

    variants = {
        "features once": (False, False),
        "features in every step": (True, False),
        "features once, step cache": (False, True),
    }
    seconds = {name: [] for name in variants}
    for _ in range(args.rounds):
        for name, (recomputed, cached) in variants.items():
            per_step, skipped = run(recomputed, cached)
            seconds[name].append(per_step)
    for name, found in seconds.items():
        print(f"{name:28s} median {sorted(found)[len(found) // 2]:.3f} s a step, min {min(found):.3f}")
    print(f"of {args.steps} steps the cache skipped {skipped * args.steps:.0f}")


if __name__ == "__main__":
    main()
