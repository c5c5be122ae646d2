"""Which videos or pictures a run makes, and where they go. Without torch: a bad path is refused at once."""

import itertools
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from errors import UsageError
from pipelines.settings import Settings
from pipelines.video_file import free_disk_or_error, refuse_if_written, resolve_output


@dataclass(frozen=True)
class Job:
    """One video or picture to make."""

    prompt: str
    seed: int
    output: Path


DEFAULT_OUTPUT = Path("outputs/output.mp4")


def free_output(extension: str = ".mp4") -> Path:
    """outputs/output.mp4, or with the first number that is free."""
    first = DEFAULT_OUTPUT.with_suffix(extension)
    numbered = (first.with_stem(f"{first.stem}-{number}") for number in itertools.count(2))
    return next(path for path in itertools.chain([first], numbered) if not path.exists())


def list_jobs(settings: Settings, extension: str = ".mp4") -> list[Job]:
    """Every prompt with every seed; with several jobs, their numbers go into the file names.

    Raises:
        UsageError: an output that cannot be written, or exists already.
        ResourceError: the disk has no room for the videos.
    """
    several = len(settings.prompt) * len(settings.seed) > 1
    output = free_output(extension) if settings.output is None else Path(settings.output)
    if not output.name:
        raise UsageError(f"--output {settings.output!r} names no file; give one such as video{extension}")
    jobs = []
    for number, prompt in enumerate(settings.prompt):
        for seed in settings.seed:
            path = output.with_name(f"{output.stem}-{number:03d}-seed{seed}{output.suffix}") if several else output
            jobs.append(Job(prompt, seed, resolve_output(path, overwrite=settings.overwrite, extension=extension)))
            if "WORLD_SIZE" not in os.environ:  # else it may be another process of this very run
                refuse_if_written(jobs[-1].output)
    free_disk_or_error(output, len(jobs) * estimate_file_bytes(settings))
    return jobs


def make_all(make: Callable[[Job], Path], jobs: Iterable[Job]) -> list[Path]:
    """Make one job after another, and say of each where it is: a line of standard output each, as soon as it is there.

    Returns:
        the files that were made, in the jobs' order.
    """
    made = []
    for job in jobs:
        made.append(make(job))
        print(made[-1])
    return made


def estimate_file_bytes(settings: Settings) -> int:
    """Bytes of one video at its worst (noise), and of the saved progress: four tensors of the size of the latents; of
    one picture, uncompressed.
    """
    if not hasattr(settings, "num_frames"):
        return 3 * (settings.height or 1280) * (settings.width or 1280)
    pixels = settings.num_frames * settings.height * settings.width
    latents = (settings.num_frames // 4 + 1) * (settings.height // 8) * (settings.width // 8) * 16
    return pixels * 3 // 2 + 4 * 4 * latents
