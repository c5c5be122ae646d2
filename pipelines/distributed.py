"""Several processes: prompts split over them, or one video split over them, by context parallelism or by windows.

`torchrun` and `accelerate launch` set the same variables (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT), on
one machine or many.
"""

import atexit
import datetime
import gc
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from diffusers.models._modeling_parallel import ParallelConfig
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from errors import UsageError
from models.wan.transformer import WanTransformer

logger = logging.getLogger("selfsame")

Item = TypeVar("Item")
LONGEST_WAIT = datetime.timedelta(hours=4)  # while one process decodes a long video


@dataclass(frozen=True)
class Processes:
    """This process among all of the run."""

    rank: int
    count: int
    device: torch.device
    context_parallel: bool  # all processes make each forward pass together
    by_windows: bool = False  # all processes make each video together, every one some of its windows

    @property
    def together(self) -> bool:
        """Whether each video is split over the processes."""
        return self.context_parallel or self.by_windows

    @property
    def split(self) -> bool:
        """Whether the prompts are split over the processes: each works by itself, without a word to the others."""
        return self.count > 1 and not self.together

    @property
    def writes(self) -> bool:
        """Whether this process writes files: all do with split prompts, one does with a split video."""
        return self.rank == 0 or not self.together

    def own(self, items: Sequence[Item]) -> list[Item]:
        """This process's share of the work."""
        return list(items) if self.together else list(items[self.rank :: self.count])

    def share(self, value: Item) -> Item:
        """The first process's value, for all processes of a split video (their disks may differ)."""
        if not self.together:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, device=self.device)
        return values[0]

    def broadcast(self, tensor: Tensor, owner: int) -> Tensor:
        """One process's tensor on all processes of a split video; the others' give shape and dtype."""
        if not self.together:
            return tensor
        tensor = tensor.to(self.device, copy=True)
        dist.broadcast(tensor, src=owner)
        return tensor

    def wait(self) -> None:
        """Until all processes of a split video are here: one decodes and writes while the others wait."""
        if self.together:
            dist.barrier()

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """The end of the run. After an error the others are not waited for: the launcher ends them."""
        if kind is None:
            self.close()

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


def start_processes(device: str, ulysses_degree: int = 1, ring_degree: int = 1, by_windows: bool = False) -> Processes:
    """Join the launcher's process group, if there is one; for a `with` block, which leaves it.

    Args:
        device: "auto", or a torch device; with several GPUs each process takes the one of its local rank.
        by_windows: without context parallelism, split the windows of each video over the processes, not the prompts.

    Raises:
        UsageError: a device this machine lacks, or degrees that do not multiply to the number of processes.
    """
    rank, count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    degree = ulysses_degree * ring_degree
    if degree > 1 and degree != count:
        raise UsageError(
            f"--ulysses_degree {ulysses_degree} x --ring_degree {ring_degree} needs {degree} processes, {count} are "
            f"running; start with: torchrun --nproc_per_node {degree} …"
        )
    chosen = choose_device(device)
    if chosen.type == "cuda" and chosen.index is None:
        chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(chosen)
    by_windows = by_windows and degree == 1 and count > 1
    if (degree > 1 or by_windows) and not dist.is_initialized():  # split prompts need no word between the processes
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=LONGEST_WAIT)
        # A group's threads end with the last model that is split over it, and models are freed by gc. A thread that
        # outlives the interpreter and then drops a tensor aborts the process.
        atexit.register(gc.collect)
    return Processes(rank, count, chosen, context_parallel=degree > 1, by_windows=by_windows)


def split_sequence(transformer: WanTransformer, ulysses_degree: int, ring_degree: int, device: torch.device) -> None:
    """Have every forward pass split its tokens over all processes, by diffusers' context-parallel attention.

    What `transformer.enable_parallelism` does, without its division by the number of accelerators: a CPU has none, and
    so the tests run the very path that GPUs run.

    Raises:
        UsageError: the attention backend has no context-parallel form.
    """
    config = ContextParallelConfig(ulysses_degree=ulysses_degree, ring_degree=ring_degree)
    mesh = init_device_mesh(device.type, config.mesh_shape, mesh_dim_names=config.mesh_dim_names)
    parallel = ParallelConfig(context_parallel_config=config)
    parallel.setup(dist.get_rank(), dist.get_world_size(), device, mesh=mesh)
    for kernel in transformer.attn_processors.values():
        backend = AttentionBackendName(kernel._attention_backend or "native")
        if not _AttentionBackendRegistry._is_context_parallel_available(backend):
            names = ", ".join(sorted(_AttentionBackendRegistry._supports_context_parallel))
            raise UsageError(f"--attention_backend {backend.value} cannot split a video over processes; use {names}")
        if ring_degree > 1 and backend == AttentionBackendName.NATIVE:
            raise UsageError(
                "--ring_degree with --attention_backend native: ring attention needs a kernel that returns its "
                "log-sum-exp; use _native_cudnn, _native_flash or flash, or --ulysses_degree"
            )
        kernel._parallel_config = parallel
    transformer._parallel_config = parallel


def shard_weights(model: nn.Module, device: torch.device) -> None:
    """Keep a part of each block's weights in every process, a transformer's or of layers that run with it; a block is
    put together for as long as it runs.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("shard",))
    for block in (block for name, blocks in model.named_children() if name.endswith("blocks") for block in blocks):
        fully_shard(block, mesh=mesh, reshard_after_forward=True)


def has_conv3d_defect() -> bool:
    """Of some shapes these cuDNN compute a wrong conv3d, the VAE's layer, without a word (pytorch issue 163539)."""
    return 90800 <= (torch.backends.cudnn.version() or 0) < 91100


def choose_device(name: str, flag: str = "--device") -> torch.device:
    """ "auto": CUDA, else MPS, else the CPU.

    Raises:
        UsageError: a device this machine lacks.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(
            f"{flag} {name}: not available here ({reason}); "
            + ("accepted are auto, cpu, cuda, cuda:N, mps" if flag == "--device" else "leave it out")
        ) from error
    if flag == "--device" and device.type == "cuda" and has_conv3d_defect():
        logger.warning("cuDNN 9.8 to 9.10 may decode wrong pixels; install what requirements.txt names")
    return device
