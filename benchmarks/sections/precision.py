"""How far each attention backend and type of weights is from float32: one attention call, and a stack of blocks."""

import copy
import functools
from contextlib import contextmanager

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor

from benchmarks.sections.bench import Bench, Row
from benchmarks.sections.models import BACKENDS, Inputs, distance, num_tokens, random_transformer, unusable
from models.wan.float8 import use_float8
from models.wan.transformer import WanTransformer

HEAD_DIM = 128


def measure(bench: Bench) -> None:
    """Distances are the norm of the difference by the norm of what it is measured from, in %, on fixed random inputs
    and weights; attention of random weights is flatter than that of trained ones. "From SDPA" is from the same type
    with torch's own choice of kernel.
    """
    config, latents = bench.sizes.small, bench.sizes.small_latents
    reference = random_transformer(config, bench.device, torch.float32)
    inputs = Inputs(bench, config, latents)
    qkv = [
        torch.randn(1, num_tokens(latents, config), config.num_heads, HEAD_DIM, generator=generator).to(bench.device)
        for generator in [torch.Generator().manual_seed(3)]
        for _ in range(3)
    ]
    with no_tf32():
        exact = outputs(reference, inputs, qkv, torch.float32, "_native_math")
    sdpa: dict[torch.dtype, list[Tensor]] = {}

    def row(dtype: torch.dtype, backend: str, fp8: bool = False) -> Row:
        model = copy.deepcopy(reference).set_compute_dtype(dtype)
        if fp8:
            use_float8(model)
        found = outputs(model, inputs, qkv, dtype, backend)
        if backend == "native" and not fp8:
            sdpa[dtype] = found
        names = ("one call", "1 block", f"{config.num_layers} blocks", "prediction")
        from_float32 = {f"{n}, % from float32": distance(a, b) for n, a, b in zip(names, found, exact, strict=True)}
        if backend == "native" and not fp8:
            return from_float32
        others = zip(names[:3], found, sdpa[dtype], strict=False)
        return from_float32 | {f"{n}, % from SDPA": distance(a, b) for n, a, b in others}

    attempts = [("float32, SDPA, its own choice", torch.float32, "native", False)]
    attempts += [(f"bf16, {label}", torch.bfloat16, backend, False) for backend, label in BACKENDS.items()]
    attempts += [("fp16, SDPA, its own choice", torch.float16, "native", False)]
    attempts += [("bf16 with fp8 weights, SDPA, its own choice", torch.bfloat16, "native", True)]
    for label, dtype, backend, fp8 in attempts:
        if reason := unusable(reference, backend):
            bench.rows.append({"": label, "note": f"skipped: {reason}"})
            continue
        # far above what the small shape takes
        bench.attempt(label, functools.partial(row, dtype, backend, fp8), seconds=15.0 if bench.on_gpu else 1.0)


@torch.no_grad()
def outputs(model: WanTransformer, inputs: Inputs, qkv: list[Tensor], dtype: torch.dtype, backend: str) -> list[Tensor]:
    """One attention call; the stream after the first block and after the last; the prediction. All on the CPU."""
    model.set_attention_backend(backend)
    try:
        attended = dispatch_attention_fn(*(x.to(dtype) for x in qkv), backend=backend)
        after: list[Tensor] = []
        hooks = [
            model.blocks[index].register_forward_hook(lambda *call: after.append(call[-1].float().cpu()))
            for index in (0, -1)
        ]
        prediction = model(inputs.latents, inputs.timestep, inputs.prompt())
        for hook in hooks:
            hook.remove()
        return [attended.float().cpu(), *after, prediction.float().cpu()]
    finally:
        model.set_attention_backend("native")


@contextmanager
def no_tf32():
    """torch lets cuDNN round a convolution's inputs to 10 bits, which a reference must not."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
