"""Attention, its rotary positions and its norms: every place where the precision of attention is decided.

Source: Wan2.1 `wan/modules/model.py` (rope_params, rope_apply, WanSelfAttention, WanT2VCrossAttention,
WanI2VCrossAttention, WanRMSNorm).
"""

import contextlib
import functools
import warnings

import torch
import torch.nn.functional as F
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    _check_attention_backend_requirements,
    dispatch_attention_fn,
)
from torch import Tensor, nn

ROPE_THETA = 10000.0

Rope = tuple[Tensor, Tensor]  # cos and sin, each (1 or B, L, 1, d/2) float32


@functools.lru_cache(maxsize=16)
def rope_table(grid: tuple[int, int, int], head_dim: int, offset: tuple[int, int, int], device: torch.device) -> Rope:
    """Cos and sin of every token's position in a frame-major (F, H, W) grid of tokens.

    Angles are computed in float64 on the CPU (MPS has no float64) and rounded once to float32, so that the table is the
    same on every device. `offset` moves the grid: Stand-In puts its reference at (-1, H, W).

    Returns:
        cos, sin: (1, F·H·W, 1, head_dim/2) float32. Pairs are adjacent channels; the first d/2 - 2⌊d/6⌋ follow time,
        then ⌊d/6⌋ rows and ⌊d/6⌋ columns.
    """
    spatial = 2 * (head_dim // 6)
    axis_dims = (head_dim - 2 * spatial, spatial, spatial)
    angles = []
    for axis, (size, start, axis_dim) in enumerate(zip(grid, offset, axis_dims, strict=True)):
        frequencies = ROPE_THETA ** (-torch.arange(0, axis_dim, 2, dtype=torch.float64) / axis_dim)
        positions = torch.arange(start, start + size, dtype=torch.float64)
        view = [1, 1, 1, axis_dim // 2]
        view[axis] = size
        angles.append(torch.outer(positions, frequencies).view(view).expand(*grid, -1))
    angle = torch.cat(angles, dim=-1).flatten(0, 2)[None, :, None]  # (1, F·H·W, 1, d/2)
    return angle.cos().float().to(device), angle.sin().float().to(device)


def apply_rope(x: Tensor, rope: Rope) -> Tensor:
    """Rotate adjacent channel pairs of x (B, L, n, d) by each token's angles, in float32."""
    cos, sin = rope
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # (B, L, n, d/2) each
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis: float32 inside, rounded to x's dtype, times a float32 weight."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == self.weight.dtype:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return F.rms_norm(x.float(), self.weight.shape, eps=self.eps).to(x.dtype) * self.weight


class AttentionKernel:
    """The softmax attention itself, behind diffusers' dispatcher.

    diffusers finds processors of this form by their two attributes: `set_attention_backend` fills the first,
    `enable_parallelism` the second. They are settings of a loaded model, not state of a call.
    """

    _attention_backend = None
    _parallel_config = None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None = None, sharded: bool = False):
        """Attend: (B, Lq, n, d) x (B, Lk, n, d) -> (B, Lq, n·d). `sharded`: the sequence is split over processes."""
        out = dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config if sharded else None,
        )
        return out.flatten(2)


class PlainAttention(AttentionKernel):
    """Attention by two matrix products and a softmax, for training small models on a CPU: there, the backward pass of
    PyTorch's fused kernel takes up to six times as long when sequences are short.
    """

    LARGEST = 2**26  # scores that are kept for the backward pass; longer sequences take the fused kernel

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None = None, sharded: bool = False):
        batch, queries, heads, width = query.shape
        if batch * heads * queries * key.shape[1] > self.LARGEST or sharded:
            return super().__call__(query, key, value, mask=mask, sharded=sharded)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # (B, n, L, d)
        scores = (query * width**-0.5) @ key.mT  # (B, n, Lq, Lk)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        return (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)


def try_backend(name: str, device: torch.device, dtype: torch.dtype, num_heads: int = 2, head_dim: int = 128) -> None:
    """Attend once, to see whether a backend of diffusers runs here: some are installed and refuse a device or a dtype.

    Raises:
        ValueError: it does not; the message is the reason, in one line.
    """
    known = [backend.value for backend in AttentionBackendName]
    if name not in known:
        raise ValueError(f"no such backend; known are {', '.join(known)}")
    query = torch.zeros(1, 64, num_heads, head_dim, device=device, dtype=dtype)
    try:
        _check_attention_backend_requirements(AttentionBackendName(name))
        with warnings.catch_warnings():  # torch gives each reason of its own as a warning
            warnings.simplefilter("ignore")
            dispatch_attention_fn(query, query, query, backend=AttentionBackendName(name))
    except Exception as error:  # every package has its own kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(reason.partition(". ")[0]) from error


def usable_backends(device: torch.device, dtype: torch.dtype) -> list[str]:
    """The backends that run here. Not tried: those that fetch a kernel from the hub, and flex, which compiles one."""
    usable = []
    for backend in AttentionBackendName:
        if not backend.value.endswith("_hub") and backend != AttentionBackendName.FLEX:
            with contextlib.suppress(ValueError):
                try_backend(backend.value, device, dtype)
                usable.append(backend.value)
    return usable


# By flash attention: its package for most GPUs, its package for Hopper, and PyTorch's own kernel after the first.
FLASH_PACKAGES = ("flash", "_flash_3")
FLASH_BACKENDS = (*FLASH_PACKAGES, "_native_flash")


def choose_flash(device: torch.device, dtype: torch.dtype, head_dim: int, split: bool = False) -> str:
    """The first flash backend that runs here, or "native", PyTorch's own choice, where none does.

    split: it has to be able to split a video over processes.
    """
    for name in FLASH_BACKENDS if device.type == "cuda" else ():
        if not split or _AttentionBackendRegistry._is_context_parallel_available(AttentionBackendName(name)):
            with contextlib.suppress(ValueError):
                try_backend(name, device, dtype, head_dim=head_dim)
                return name
    return "native"


class WanAttention(nn.Module, AttentionModuleMixin):
    """What self- and cross-attention share: four projections, and norms over all heads together."""

    _default_processor_cls = AttentionKernel
    _available_processors = [AttentionKernel]
    _supports_qkv_fusion = False

    def __init__(self, dim: int, num_heads: int, eps: float):
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.o = nn.Linear(dim, dim)
        self.norm_q = RMSNorm(dim, eps)
        self.norm_k = RMSNorm(dim, eps)
        self.set_processor(AttentionKernel())

    def split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1))  # (B, L, D) -> (B, L, n, d)


class WanSelfAttention(WanAttention):
    """Self-attention of the video tokens, with the slots for foreign keys and values and for deltas on q, k, v."""

    def forward(self, x: Tensor, ctx, slots) -> Tensor:
        """x: (B, L, D) in the compute dtype; ctx, slots: `BlockContext` and `BlockSlots` of models.wan.slots."""
        q, k, v = self.q(x), self.k(x), self.v(x)
        for delta in slots.self_qkv_deltas:
            q, k, v = (base + extra for base, extra in zip((q, k, v), delta(x), strict=True))
        q = apply_rope(self.split_heads(self.norm_q(q)), ctx.rope).to(v.dtype)  # (B, L, n, d)
        k = apply_rope(self.split_heads(self.norm_k(k)), ctx.rope).to(v.dtype)
        v = self.split_heads(v)
        for listener in slots.on_self_keys_values:
            listener(k, v)

        for extra_k, extra_v in slots.self_keys_values:  # (1 or B, M, n, d), K already normed and rotated
            k = torch.cat((k, extra_k.to(k).expand(k.shape[0], -1, -1, -1)), dim=1)
            v = torch.cat((v, extra_v.to(v).expand(v.shape[0], -1, -1, -1)), dim=1)
        return self.o(self.processor(q, k, v, mask=ctx.attention_mask(k.shape[1]), sharded=ctx.sharded))


class WanCrossAttention(WanAttention):
    """Attention to the text and, in CLIP models, to the image as well; both share q and o."""

    def __init__(self, dim: int, num_heads: int, eps: float, has_image: bool):
        super().__init__(dim, num_heads, eps)
        self.has_image = has_image
        if has_image:
            self.k_img = nn.Linear(dim, dim)
            self.v_img = nn.Linear(dim, dim)
            self.norm_k_img = RMSNorm(dim, eps)

    def project(self, text: Tensor, image: Tensor | None) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of text (B, T, D) and image (B, S, D) tokens; they do not depend on the video."""
        dtype = text.dtype
        pairs = [(self.split_heads(self.norm_k(self.k(text)).to(dtype)), self.split_heads(self.v(text)))]
        if self.has_image and image is not None:
            key = self.norm_k_img(self.k_img(image)).to(dtype)
            pairs.append((self.split_heads(key), self.split_heads(self.v_img(image))))
        return pairs

    def forward(self, x: Tensor, ctx, slots) -> Tensor:
        """x: (B, L, D) in the compute dtype. The terms of plug-ins are added before `o`, as the image's is."""
        q = self.split_heads(self.norm_q(self.q(x)).to(x.dtype))
        pairs = slots.prompt.keys_values
        if pairs is None:
            pairs = self.project(ctx.text, ctx.image)
            if slots.prompt.keeps:
                slots.prompt.keys_values = pairs
        out = self.processor(q, *pairs[0])
        for key, value in pairs[1:]:
            out = out + self.processor(q, key, value)
        for term in slots.cross_attention:
            out = out + term(q, self.processor).to(out.dtype)
        return self.o(out)
