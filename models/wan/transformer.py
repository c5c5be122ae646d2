"""The Wan 2.1 / 2.2 video transformer, under its released key names, with slots that plug-ins fill call by call.

Precision (upstream's policy under bfloat16 autocast), all of it in this file and attention.py:
  the compute dtype of the weights   patch embedding, q/k/v/o, feed-forward, text embedding, attention
  float32                            time path, modulation, norms, image embedding, residual stream, head, output

Source: Wan2.1 and Wan2.2 `wan/modules/model.py` (WanModel); VideoX-Fun and Wan2.2 for per-token timesteps.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.hooks.context_parallel import EquipartitionSharder
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from models.wan.attention import Rope, WanCrossAttention, WanSelfAttention, rope_table
from models.wan.slots import BlockContext, BlockSlots, Plugin, Prompt
from models.wan.tea_cache import TeaCache


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(x + shift, x, scale)


def sinusoidal_embedding(timestep: Tensor, dim: int) -> Tensor:
    """[cos | sin] of t·10000^(-j/half), angles in float64, result float32. timestep: (N,) -> (N, dim)."""
    half = dim // 2
    frequencies = torch.pow(10000.0, -torch.arange(half, dtype=torch.float64) / half)
    angle = torch.outer(timestep.to("cpu", torch.float64), frequencies)
    return torch.cat((angle.cos(), angle.sin()), dim=1).float()


class WanBlock(nn.Module):
    """One transformer block. The norms' names are upstream's: norm1, norm3, norm2 in the order they run."""

    def __init__(self, dim: int, ffn_dim: int, num_heads: int, eps: float, has_image: bool):
        super().__init__()
        self.eps = eps
        self.self_attn = WanSelfAttention(dim, num_heads, eps)
        self.norm3 = nn.LayerNorm(dim, eps)
        self.cross_attn = WanCrossAttention(dim, num_heads, eps, has_image)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(ffn_dim, dim))
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def norm(self, x: Tensor) -> Tensor:
        """norm1 and norm2: LayerNorm without parameters."""
        return F.layer_norm(x, x.shape[-1:], eps=self.eps)

    def forward(self, hidden_states: Tensor, ctx: BlockContext, slots: BlockSlots) -> Tensor:
        x = hidden_states  # (B, L, D) float32, the residual stream
        shift1, scale1, gate1, shift2, scale2, gate2 = (
            own + given for own, given in zip(self.modulation.unbind(1), ctx.modulation.unbind(-2), strict=True)
        )  # (B, 1 or L, D) float32 each

        y = modulate(self.norm(x), shift1, scale1).to(ctx.dtype)
        x = torch.addcmul(x, self.self_attn(y, ctx, slots).to(x.dtype), gate1)

        if ctx.text is not None:
            x = x + self.cross_attn(self.norm3(x).to(ctx.dtype), ctx, slots)
        for residual in slots.middle_residuals:
            x = x + residual(x)

        y = modulate(self.norm(x), shift2, scale2).to(ctx.dtype)
        x = torch.addcmul(x, self.ffn(y).to(x.dtype), gate2)
        for residual in slots.block_residuals:  # inside the block: a step cache that skips the block skips them with it
            x = x + residual(x)
        return x


class ImageEmbedding(nn.Module):
    """CLIP features -> tokens beside the text. FLF2V tells its two pictures apart by `emb_pos`."""

    def __init__(self, image_dim: int, dim: int, image_tokens: int | None):
        super().__init__()
        self.proj = nn.Sequential(
            nn.LayerNorm(image_dim),
            nn.Linear(image_dim, image_dim),
            nn.GELU(),
            nn.Linear(image_dim, dim),
            nn.LayerNorm(dim),
        )
        if image_tokens is not None:
            self.emb_pos = nn.Parameter(torch.zeros(1, image_tokens, image_dim))

    def forward(self, features: Tensor) -> Tensor:
        if hasattr(self, "emb_pos"):
            features = features.reshape(-1, *self.emb_pos.shape[1:]) + self.emb_pos  # (2B, 257, C) -> (B, 514, C)
        return self.proj(features)


class Head(nn.Module):
    """Modulated projection of tokens to latent patches, in float32."""

    def __init__(self, dim: int, patch_values: int, eps: float):
        super().__init__()
        self.eps = eps
        self.head = nn.Linear(dim, patch_values)
        self.modulation = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        shift, scale = (own + time for own in self.modulation.unbind(1))  # (B, 1 or L, D)
        return self.head(modulate(F.layer_norm(x, x.shape[-1:], eps=self.eps), shift, scale))


def cast_linears(module: ModelMixin, dtype: torch.dtype) -> ModelMixin:
    """Cast a model's parameters, but for those it keeps in float32."""
    for name, parameter in module.named_parameters():
        if not any(part in name for part in module._keep_in_fp32_modules):
            parameter.data = parameter.data.to(dtype)
    return module


class WanTransformer(ModelMixin, ConfigMixin, AttentionMixin, PeftAdapterMixin, CacheMixin):
    """The denoiser of every released Wan variant. Arguments are those of `models.wan.config.WanConfig`."""

    _supports_gradient_checkpointing = True
    _no_split_modules = ["WanBlock"]
    _repeated_blocks = ["WanBlock"]
    # The loader keeps these in float32; the rest of the floating weights get the compute dtype.
    _keep_in_fp32_modules = ["time_embedding", "time_projection", "modulation", "norm", "head", "img_emb"]
    # fp8 storage is for the blocks' linears. patch_embedding stays out: its dtype tells the compute dtype.
    _skip_layerwise_casting_patterns = ["patch_embedding", "text_embedding", "time_", "norm", "head", "img_emb"]
    _cp_plan = {}  # forward splits and gathers the sequence itself, where a reader sees it

    @register_to_config
    def __init__(
        self,
        in_dim: int,
        dim: int,
        ffn_dim: int,
        num_heads: int,
        num_layers: int,
        out_dim: int = 16,
        text_dim: int = 4096,
        text_len: int = 512,
        freq_dim: int = 256,
        eps: float = 1e-6,
        patch_size: tuple[int, int, int] = (1, 2, 2),
        image_dim: int | None = None,
        image_tokens: int | None = None,
    ):
        super().__init__()
        self.patch_embedding = nn.Conv3d(in_dim, dim, patch_size, stride=patch_size)
        self.text_embedding = nn.Sequential(nn.Linear(text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(nn.Linear(freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        if image_dim is not None:
            self.img_emb = ImageEmbedding(image_dim, dim, image_tokens)
        self.blocks = nn.ModuleList(
            WanBlock(dim, ffn_dim, num_heads, eps, image_dim is not None) for _ in range(num_layers)
        )
        self.head = Head(dim, math.prod(patch_size) * out_dim, eps)
        self.gradient_checkpointing = False
        # Whether the weights were trained with a time embedding in the compute dtype, as StableAvatar's were.
        self.rounds_time_embedding = False

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of the linears and of attention."""
        return self.patch_embedding.weight.dtype

    def set_compute_dtype(self, dtype: torch.dtype) -> "WanTransformer":
        """Cast the linears; what the precision policy keeps in float32 stays (`.to(dtype)` would cast it too)."""
        return cast_linears(self, dtype)

    def embed_time(self, timestep: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """Timesteps (B,) or (B, L) -> time embedding (B, 1 or L, D) and modulation (B, 1 or L, 6, D), in float32; with
        the compute dtype's values where the weights were trained so (`rounds_time_embedding`).

        A per-token timestep (TI2V, whose first frame is clean) has few distinct values: each is embedded once.
        """
        values, where = torch.unique(timestep.cpu(), return_inverse=True)
        time = self.time_embedding(sinusoidal_embedding(values, self.config.freq_dim).to(device))
        modulation = self.time_projection(time).unflatten(-1, (6, -1))
        if self.rounds_time_embedding:
            time, modulation = (part.to(self.compute_dtype).float() for part in (time, modulation))
        where = (where if where.ndim == 2 else where[:, None]).to(device)
        return time[where], modulation[where]

    def embed_prompt(self, prompt: Prompt, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Text states -> (B, T, D), CLIP features -> (B, S, D) or None, in the compute dtype."""
        dtype, text_len = self.compute_dtype, self.config.text_len
        text = prompt.text
        if not isinstance(text, Tensor):
            assert all(states.shape[0] <= text_len for states in text), "text longer than the model's text_len"
            text = torch.stack([F.pad(states, (0, 0, 0, text_len - states.shape[0])) for states in text])
        text = self.text_embedding(text.to(device, dtype))
        if prompt.image is None:
            return text, None
        if not hasattr(self, "img_emb"):
            raise ValueError("the prompt has CLIP features, but this model has no image cross-attention")
        return text, self.img_emb(prompt.image.to(device, torch.float32)).to(dtype)

    def patchify(self, latents: Sequence[Tensor], seq_len: int | None) -> tuple[Tensor, list[tuple[int, int, int]]]:
        """Latents (C, F, H, W) each -> tokens (B, L, D) float32, frame-major, zero-padded; and the token grids."""
        embedded = [self.patch_embedding(sample[None].to(self.compute_dtype)) for sample in latents]
        grids = [tuple(e.shape[2:]) for e in embedded]
        length = max(seq_len or 0, *(math.prod(grid) for grid in grids))
        tokens = [F.pad(t, (0, 0, 0, length - t.shape[1])) for t in (e.flatten(2).transpose(1, 2) for e in embedded)]
        return torch.cat(tokens).float(), grids

    def unpatchify(self, tokens: Tensor, grids: Sequence[tuple[int, int, int]]) -> list[Tensor]:
        """Head output (B, L, pt·ph·pw·C), channels fastest -> latents (C, F·pt, H·ph, W·pw) each."""
        pt, ph, pw = self.config.patch_size
        out = []
        for sample, (f, h, w) in zip(tokens, grids, strict=True):
            patches = sample[: f * h * w].view(f, h, w, pt, ph, pw, -1)
            out.append(torch.einsum("fhwpqrc->cfphqwr", patches).reshape(-1, f * pt, h * ph, w * pw))
        return out

    def positions(
        self, grids: Sequence[tuple[int, int, int]], offset: tuple[int, int, int], length: int, device: torch.device
    ) -> Rope:
        """The rotation of every token; padding is not rotated."""
        head_dim = self.config.dim // self.config.num_heads
        tables = [rope_table(grid, head_dim, offset, device) for grid in grids]
        if all(cos.shape[1] == length for cos, _ in tables) and len(set(grids)) == 1:
            return tables[0]
        pad = [length - cos.shape[1] for cos, _ in tables]
        cos = torch.cat([F.pad(cos, (0, 0, 0, 0, 0, n), value=1.0) for (cos, _), n in zip(tables, pad, strict=True)])
        sin = torch.cat([F.pad(sin, (0, 0, 0, 0, 0, n)) for (_, sin), n in zip(tables, pad, strict=True)])
        return cos, sin

    def forward(
        self,
        hidden_states: Tensor | Sequence[Tensor],
        timestep: Tensor,
        prompt: Prompt | None,
        *,
        condition: Tensor | Sequence[Tensor] | None = None,
        plugins: Sequence[Plugin] = (),
        position_offset: tuple[int, int, int] = (0, 0, 0),
        seq_len: int | None = None,
        attend_padding: bool = False,
        step_cache: TeaCache | None = None,
        tokens_only: bool = False,
        whole_sequence: bool = False,
    ) -> Tensor | list[Tensor]:
        """Predict the velocity (noise - clean) of noisy latents.

        Args:
            hidden_states: (B, C, F, H, W), or a list of (C, F, H, W) of different sizes.
            timestep: (B,) or per token (B, L), on the scale 0 to 1000.
            prompt: the request's `Prompt` for this transformer; None leaves cross-attention out.
            condition: mask and condition latents (B, in_dim - C, F, H, W), concatenated after the noise channels.
            plugins: each is asked once, after the embeddings, what it adds to the blocks.
            position_offset: where the token grid starts in (time, row, column).
            seq_len: pad the token sequence to this length (ragged batches).
            attend_padding: let self-attention see the padding, as StableAvatar does in a short window.
            step_cache: `TeaCache` of this guidance branch; it may replace the block stack by its last residual.
            tokens_only: stop before the head.
            whole_sequence: run all tokens in every process, where sequences are split over processes otherwise.

        Returns:
            Latents of the input's form with out_dim channels, float32; with `tokens_only` the tokens (B, L, D).
        """
        is_list = not isinstance(hidden_states, Tensor)
        latents = list(hidden_states)
        if condition is not None:
            latents = [torch.cat((x, y.to(x))) for x, y in zip(latents, condition, strict=True)]
        x, grids = self.patchify(latents, seq_len)  # (B, L, D)
        # The input's device, not a weight's: under offloading the weights are elsewhere between their calls.
        length, device = x.shape[1], x.device

        time, modulation = self.embed_time(timestep, device)
        parallel = None
        if self._parallel_config is not None and not whole_sequence:
            parallel = self._parallel_config.context_parallel_config
        lengths = [math.prod(grid) for grid in grids]
        text, image = (None, None) if prompt is None else prompt.tokens(self.embed_prompt, device)
        ctx = BlockContext(
            time=time,
            modulation=modulation,
            rope=self.positions(grids, position_offset, length, device),
            text=text,
            image=image,
            dtype=self.compute_dtype,
            grid=grids[0],
            lengths=lengths if min(lengths) < length and not attend_padding else None,
            sharded=parallel is not None,
            prompt=prompt,
        )
        if ctx.sharded:
            x = self.shard(x, ctx, parallel._flattened_mesh)
        filled = [plugin(x, ctx) for plugin in plugins]
        for slots in filled:
            if slots.added_tokens is not None:
                x = x + slots.added_tokens

        if step_cache is not None and step_cache.skips(modulation):
            x = x + step_cache.residual
        else:
            entry = x
            for index, block in enumerate(self.blocks):
                slots = BlockSlots.of_block(index, filled, prompt)
                if torch.is_grad_enabled() and self.gradient_checkpointing:
                    x = self._gradient_checkpointing_func(block, x, ctx, slots)
                else:
                    x = block(x, ctx, slots)
            if step_cache is not None:
                step_cache.residual = x - entry
        if tokens_only:
            return x

        out = self.head(x, ctx.time)
        if ctx.sharded:
            out = EquipartitionSharder.unshard(out, 1, parallel._flattened_mesh)
        out = self.unpatchify(out, grids)
        return out if is_list else torch.stack(out)

    def shard(self, x: Tensor, ctx: BlockContext, mesh) -> Tensor:
        """Keep this process's part of the tokens and of all that has one entry a token."""
        length, processes = x.shape[1], mesh.size()
        if length % processes:
            raise ValueError(f"{length} tokens do not divide over {processes} processes; change size or frames")
        if ctx.lengths is not None:
            raise ValueError("a padded batch cannot be split over processes; send samples of one size")

        def part(tensor: Tensor) -> Tensor:
            return EquipartitionSharder.shard(tensor, 1, mesh) if tensor.shape[1] == length else tensor

        ctx.time, ctx.modulation = part(ctx.time), part(ctx.modulation)
        ctx.rope = (part(ctx.rope[0]), part(ctx.rope[1]))
        return part(x)


TransformerBlockRegistry.register(
    WanBlock, TransformerBlockMetadata(return_hidden_states_index=0, return_encoder_hidden_states_index=None)
)
