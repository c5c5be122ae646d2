"""Which placement a run gets: as its settings say; what they leave to `auto` by what is free, or as it was begun."""

import logging
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch

from pipelines.job_state import chosen_before
from pipelines.jobs import Job
from pipelines.memory import free_bytes
from pipelines.needs import Needs
from pipelines.placement import Placement, choose_mode
from pipelines.record import left_open
from pipelines.settings import Settings

logger = logging.getLogger("selfsame")

Begun = tuple[Path, dict[str, bool]]  # saved progress, and what was chosen for it


def choose_placement(
    settings: Settings,
    needs: Needs,
    device: torch.device,
    dtype: torch.dtype,
    begun: Callable[[], Begun | None],
    *,
    has_own_memory: bool,
) -> Placement:
    """Where the parts live: as the settings say, and where they say `auto`, what is fastest with what is free. What
    changes frames stays as it was for a video that was begun, as long as that fits: its steps would be lost.

    Args:
        device, dtype: where the model runs, and in what.
        begun: finds the progress of a video that this run goes on with.
        has_own_memory: the device's memory is another than the machine's.
    """
    given = {"fp8": settings.fp8, "tiled": settings.tiled}
    if settings.compile or getattr(settings, "lora_mode", None) == "merged":
        given["fp8"] = bool(given["fp8"])  # not chosen: not to be compiled, and rounds most of a merged LoRA away
    free = free_bytes(device)
    choose = partial(choose_mode, needs, *free, device="cuda" if has_own_memory else "cpu", memory=settings.memory)
    placement = choose(**given)
    if settings.memory != "auto":
        return placement
    if (found := begun()) is not None:
        path, kept = found[0], given | {name: value for name, value in found[1].items() if given[name] is None}
        as_begun = choose(**kept)
        changes = as_begun.fits and (as_begun.fp8, as_begun.tiled) != (placement.fp8, placement.tiled)
        placement = as_begun if as_begun.fits else placement
        if changes:
            logger.info(
                "%s was made with %s weights%s: they are kept, so that it counts (without the file, auto chooses)",
                *(path, "float8" if as_begun.fp8 else str(dtype).removeprefix("torch.")),
                " and tiles" if as_begun.tiled else "",
            )
    if has_own_memory or placement.name != "resident":
        logger.info("--memory auto: %s", placement.describe(*free, on_gpu=has_own_memory))
    return placement


def find_begun(settings: Settings, jobs: Iterable[Job], name_of: Callable[[str, int], str]) -> Begun | None:
    """The saved progress of the first job that was begun, and what was chosen for it.

    name_of: (prompt, seed) -> `record.begun_as` of that video.
    """
    retries = 0 if settings.min_face_score is None else settings.max_retries
    for job in jobs:
        for seed in range(job.seed, job.seed + retries + 1):
            if (found := chosen_before(job.output, name_of(job.prompt, seed))) is not None:
                return found[0], {name: value for name, value in found[1].items() if name in left_open()}
    return None
