"""How a run of Wan begins, in every script: what can be refused is refused before anything loads, and what is there
already is not made again.
"""

from collections.abc import Sequence

from pipelines.distributed import Processes
from pipelines.jobs import Job, settle
from pipelines.lora_settings import Loras
from pipelines.parts import Part
from pipelines.settings import Settings
from pipelines.wan import Wan
from pipelines.weights import WeightsFile


def open_wan(
    settings: Settings,
    config: dict,
    processes: Processes,
    jobs: Sequence[Job],
    parts: Sequence[Part] = (),
    *,
    further: Sequence[WeightsFile] = (),
    at_once: Settings | None = None,
) -> tuple[Wan, list[Job]]:
    """The model of a run, checked, with nothing loaded yet; and the jobs, of which some may be done by now.

    Args:
        settings, config: from the task's `resolve_…`.
        jobs: those of this process (`Processes.own`).
        parts: the plug-ins' weights.
        further: files of other models that the run needs.
        at_once: as of `Wan.check`.

    Raises:
        WeightsError, InputError: files that are missing or wrong, all in one message.
        UsageError: nothing can be made, as something else is in its place.
        ResourceError: not enough memory.
    """
    wan = Wan(settings, config, processes, parts)
    wan.check_files(further)
    if isinstance(settings, Loras):
        wan.use_loras(settings)  # before `check`, as they take memory too
    wan.check(jobs, at_once)
    return wan, settle(jobs, settings, wan.describe, processes)
