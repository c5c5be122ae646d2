"""One denoising step: ours against diffusers' WanTransformer3DModel with the same weights, and with an identity.

    python benchmarks/step_speed.py                              a size a CPU does in minutes
    python benchmarks/step_speed.py --dim 1536 --layers 30 --ffn_dim 8960 --frames 21 --height 60 --width 104 \
        --device cuda --dtype bf16 --rounds 10

The candidates run interleaved in one process, so that whatever else the machine does falls on all of them. The
identity's cost is set against what its extra keys and values cost alone, appending them included, measured in the same
rounds.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.attention_dispatch import dispatch_attention_fn

from models.identity.stand_in import StandIn
from models.wan.checkpoint import to_diffusers_name
from models.wan.slots import Prompt
from models.wan.transformer import WanTransformer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build(args: argparse.Namespace) -> tuple[WanTransformer, WanTransformer3DModel]:
    torch.manual_seed(0)
    heads = args.dim // 128
    ours = WanTransformer(in_dim=16, dim=args.dim, ffn_dim=args.ffn_dim, num_heads=heads, num_layers=args.layers)
    theirs = WanTransformer3DModel(
        num_attention_heads=heads, ffn_dim=args.ffn_dim, num_layers=args.layers, text_dim=4096, freq_dim=256
    )
    theirs.load_state_dict({to_diffusers_name(name): tensor for name, tensor in ours.state_dict().items()})
    dtype = DTYPES[args.dtype]
    ours = ours.set_compute_dtype(dtype).to(args.device).eval()
    return ours, theirs.to(args.device, dtype).eval()


def random_stand_in(ours: WanTransformer, rank: int = 128) -> StandIn:
    dim = ours.config.dim
    shapes = {"down": (rank, dim), "up": (dim, rank)}
    tensors = {
        f"blocks.{i}.self_attn.{p}_loras.{side}.weight": torch.randn(shape) * 0.01
        for i in range(ours.config.num_layers)
        for p in "qkv"
        for side, shape in shapes.items()
    }
    return StandIn.from_tensors(tensors, ours)


def measure(candidates: dict[str, Callable[[], object]], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each candidate in each round, the order turned by one every round."""
    names, seconds = list(candidates), {name: [] for name in candidates}
    for round_ in range(rounds + 1):
        for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
            synchronize(device)
            start = time.perf_counter()
            candidates[name]()
            synchronize(device)
            if round_:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    return seconds


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


@torch.no_grad()
def main(args: argparse.Namespace) -> None:
    ours, theirs = build(args)
    dtype, device = DTYPES[args.dtype], args.device
    latents = torch.randn(1, 16, args.frames, args.height, args.width, device=device)
    timestep, text = torch.tensor([700.0]), torch.randn(1, 512, 4096, device=device)
    prompt = Prompt(text)
    grid = (args.height // 2, args.width // 2)
    identity = random_stand_in(ours).encode(ours, [torch.randn(1, 16, 1, 64, 64, device=device)], grid)
    tokens, extra = args.frames * grid[0] * grid[1], identity.keys_values[0][0].shape[1]
    heads = args.dim // 128
    query, key, value = (torch.randn(1, tokens, heads, 128, device=device, dtype=dtype) for _ in range(3))
    extra_key, extra_value = (torch.randn(1, extra, heads, 128, device=device, dtype=dtype) for _ in range(2))

    def diffusers_step() -> torch.Tensor:
        model_latents, model_text = latents.to(dtype), text.to(dtype)
        return theirs(model_latents, timestep.to(device), model_text, return_dict=False)[0]

    difference = (ours(latents, timestep, prompt) - diffusers_step().float()).abs().max().item()
    print(f"dim {args.dim}, {args.layers} layers, {tokens} tokens, {args.dtype} on {device}, torch {torch.__version__}")
    print(f"largest difference between the two predictions: {difference:.2e}")
    seconds = measure(
        {
            "diffusers": diffusers_step,
            "ours": lambda: ours(latents, timestep, prompt),
            "ours, identity": lambda: ours(latents, timestep, prompt, plugins=[identity]),
            "attention, own keys": lambda: dispatch_attention_fn(query, key, value),
            "attention, extra keys": lambda: dispatch_attention_fn(
                query, torch.cat((key, extra_key), dim=1), torch.cat((value, extra_value), dim=1)
            ),
        },
        args.rounds,
        device,
    )
    median = {name: statistics.median(times) for name, times in seconds.items()}
    print(f"{'':<24}{'median':>10}{'min':>10}{'max':>10}   of {args.rounds} rounds, seconds")
    for name, times in seconds.items():
        print(f"{name:<24}{median[name]:>10.4f}{min(times):>10.4f}{max(times):>10.4f}")
    extra_keys = args.layers * (median["attention, extra keys"] - median["attention, own keys"])
    print(f"ours / diffusers:                 {median['ours'] / median['diffusers']:.3f}")
    print(f"identity adds:                    {median['ours, identity'] - median['ours']:.4f} s")
    print(f"its {extra} keys alone would add:  {extra_keys:.4f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=768, help="a multiple of 128, the head width")
    parser.add_argument("--ffn_dim", type=int, default=3072)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--frames", type=int, default=5, help="latent frames")
    parser.add_argument("--height", type=int, default=48, help="latent rows")
    parser.add_argument("--width", type=int, default=48, help="latent columns")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    main(parser.parse_args())
