"""Networks of the released shapes with random weights, made on the device itself, and what they compute by count."""

import math

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from benchmarks.sections.bench import Bench, Sizes
from models.identity.stand_in import StandIn
from models.wan.checkpoint import to_diffusers_name
from models.wan.config import WanConfig
from models.wan.float8 import use_float8
from models.wan.slots import Prompt
from models.wan.transformer import WanTransformer

# diffusers' backends that need no download, and what is said of them in a table.
BACKENDS = {
    "native": "SDPA, its own choice",
    "_native_cudnn": "SDPA, cuDNN",
    "_native_flash": "SDPA, flash",
    "flash": "flash_attn 2",
    "_flash_3": "flash_attn 3",
    "sage": "SageAttention",
}
TIMESTEP = 700.0


def unusable(model: ModelMixin, backend: str) -> str | None:
    """Why an attention backend cannot be had here; else the model uses it from now on."""
    try:
        model.set_attention_backend(backend)
    except (ValueError, RuntimeError, ImportError) as error:
        return str(error).split(". ")[0]
    return None


def fill_randomly(
    module: ModelMixin,
    device: torch.device,
    dtype: torch.dtype,
    keep_on: torch.device | str | None = None,
) -> ModelMixin:
    """Give a module on the meta device random weights that keep activations of order one, tensor by tensor.

    keep_on: where each weight goes as it is made, if not where it is made: a CPU would take minutes to draw 14B.
    """
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in list(module.named_parameters()):
        owner, _, attribute = name.rpartition(".")
        kept = any(part in name for part in module._keep_in_fp32_modules)
        value = torch.empty(parameter.shape, device=device, dtype=torch.float32 if kept else dtype)
        value.normal_(0.0, 0.02 if parameter.ndim == 1 else parameter[0].numel() ** -0.5, generator=generator)
        if "norm" in name and attribute == "weight":
            value += 1
        if parameter.dtype.itemsize == 1:  # room for float8
            value = value.to(parameter.dtype)
        value = nn.Parameter(value.to(keep_on or device), requires_grad=False)
        setattr(module.get_submodule(owner), attribute, value)
    return module.eval()


def random_transformer(
    config: WanConfig,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    fp8: bool = False,
    keep_on: torch.device | str | None = None,
) -> WanTransformer:
    with torch.device("meta"):
        transformer = WanTransformer(**config.as_dict())
    if fp8:
        use_float8(transformer)
    return fill_randomly(transformer, device, dtype, keep_on)


def diffusers_twin(ours: WanTransformer) -> WanTransformer3DModel:
    """diffusers' transformer with the same weights: the same memory, but where diffusers keeps another type."""
    config, dtype = ours.config, ours.compute_dtype
    with torch.device("meta"):
        theirs = WanTransformer3DModel(
            num_attention_heads=config.num_heads,
            attention_head_dim=config.dim // config.num_heads,
            in_channels=config.in_dim,
            out_channels=config.out_dim,
            ffn_dim=config.ffn_dim,
            num_layers=config.num_layers,
            text_dim=config.text_dim,
            freq_dim=config.freq_dim,
            eps=config.eps,
        )
    rope = theirs.rope  # its tables are no weights
    theirs.rope = type(rope)(rope.attention_head_dim, rope.patch_size, rope.max_seq_len).to(ours.device)
    kept = tuple(theirs._keep_in_fp32_modules)
    tensors = {to_diffusers_name(name): tensor for name, tensor in ours.state_dict().items()}
    tensors = {n: t if any(part in n for part in kept) else t.to(dtype) for n, t in tensors.items()}
    theirs.load_state_dict(tensors, assign=True)
    return theirs.eval().requires_grad_(False)


def random_stand_in(transformer: WanTransformer, rank: int) -> StandIn:
    dim, generator = transformer.config.dim, torch.Generator().manual_seed(1)
    tensors = {
        f"blocks.{i}.self_attn.{p}_loras.{side}.weight": 0.01 * torch.randn(shape, generator=generator)
        for i in range(transformer.config.num_layers)
        for p in "qkv"
        for side, shape in (("down", (rank, dim)), ("up", (dim, rank)))
    }
    return StandIn.from_tensors(tensors, transformer)


class Inputs:
    """One forward pass without guidance: fixed noise and text, the same on every device."""

    def __init__(self, bench: Bench, config: WanConfig, latents: tuple[int, int, int]):
        generator = torch.Generator().manual_seed(2)
        self.latents = torch.randn(1, config.in_dim, *latents, generator=generator).to(bench.device)
        text = torch.randn(1, bench.sizes.text_tokens, config.text_dim, generator=generator)
        self.text = text.to(bench.device)
        self.timestep = torch.tensor([TIMESTEP])

    def prompt(self) -> Prompt:
        return Prompt(self.text)

    def theirs(self, model: WanTransformer3DModel) -> Tensor:
        dtype = model.patch_embedding.weight.dtype
        timestep = self.timestep.to(self.latents.device)
        return model(self.latents.to(dtype), timestep, self.text.to(dtype), return_dict=False)[0]


def distance(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference by that of what is expected, in %."""
    found, expected = found.double(), expected.double()
    return 100 * ((found - expected).norm() / expected.norm()).item()


# ------------------------------------------------------------------------------------------------------------- counts


def num_tokens(latents: tuple[int, int, int], config: WanConfig) -> int:
    return math.prod(latents) // math.prod(config.patch_size)


def forward_flops(config: WanConfig, tokens: int, text_tokens: int = 512) -> int:
    """Floating point operations of one forward pass, a multiply-add being two.

    q, k, v, o of self-attention and q, o of cross-attention; its k and v; feed-forward; both attentions. What is
    outside the blocks is below 0.1 % of it.
    """
    n, t, d, f = tokens, text_tokens, config.dim, config.ffn_dim
    block = 12 * n * d**2 + 4 * t * d**2 + 4 * n * d * f + 4 * n * t * d + 4 * n**2 * d
    return config.num_layers * block


def num_parameters(config: WanConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in WanTransformer(**config.as_dict()).parameters())


def call_bytes(config: WanConfig, tokens: int) -> int:
    """What one forward pass takes beside the weights, from above: some copies of the float32 stream, q, k and v in
    float32 and bf16, the wide layer.
    """
    return tokens * (40 * config.dim + 8 * config.ffn_dim) + 4 * config.num_layers * 512 * config.dim


def step_needs(bench: Bench, config: WanConfig, sizes: Sizes, fp8: bool = False) -> tuple[int, int]:
    """FLOPs and device bytes of one step."""
    tokens = num_tokens(sizes.latents, config)
    weights = num_parameters(config) * (1 if fp8 else 2)
    return forward_flops(config, tokens, sizes.text_tokens), weights + call_bytes(config, tokens)
