"""Which of diffusers' attention backends a model runs on: chosen, tried before minutes go into loading, and set."""

import logging

import torch
from diffusers import ModelMixin

from errors import UsageError
from models.wan.attention import FLASH_PACKAGES, choose_flash, try_backend, usable_backends
from models.wan.config import WanConfig
from pipelines.distributed import Processes
from pipelines.settings import Settings

logger = logging.getLogger("selfsame")


def choose_backend(settings: Settings, shape: WanConfig, dtype: torch.dtype, processes: Processes) -> str:
    """What `--attention_backend auto` means here: PyTorch's own choice, but for models whose authors ask for flash
    attention, and for ring attention, which needs a kernel that tells its log-sum-exp.
    """
    if settings.attention_backend != "auto":
        return settings.attention_backend
    if not settings.wants_flash and settings.ring_degree == 1:
        return "native"
    return choose_flash(processes.device, dtype, shape.dim // shape.num_heads, processes.context_parallel)


def try_chosen(name: str, shape: WanConfig, dtype: torch.dtype, device: torch.device) -> None:
    """Attend once by this backend.

    Raises:
        UsageError: it does not run here.
    """
    try:
        if name != "native" and not name.endswith("_hub"):
            try_backend(name, device, dtype, shape.num_heads, shape.dim // shape.num_heads)
    except ValueError as error:
        usable = ", ".join(usable_backends(device, dtype))
        raise UsageError(
            f"--attention_backend {name}: does not run on {device} in {dtype} ({error}); what does: {usable}"
        ) from error


def warn_without_flash(settings: Settings, name: str) -> None:
    """Say so where the model's authors ask for flash attention, and it is not what was found."""
    if settings.wants_flash and settings.attention_backend == "auto" and name not in FLASH_PACKAGES:
        logger.warning(
            "flash_attn does not run here: attention runs on %s. SVI's authors say that without it the mouth shows "
            "artefacts after 16 s; on an NVIDIA GPU: pip install flash-attn --no-build-isolation",
            "PyTorch's own kernels" if name == "native" else "PyTorch's flash kernel",
        )


def set_backend(model: ModelMixin, name: str) -> None:
    """Run a model's attention on this backend.

    Raises:
        UsageError: diffusers does not know it, or it needs a package that is not here.
    """
    try:
        model.set_attention_backend(name)
    except (ValueError, RuntimeError, ImportError) as error:
        raise UsageError(f"--attention_backend {name}: {error}") from error
