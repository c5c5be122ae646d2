"""Which videos or pictures a run makes, where they go, and which of them are there already. Without torch: a bad path
is refused at once.

    jobs = list_jobs(settings)                                  # what is there of other settings is refused
    jobs = settle(jobs, settings, wan.describe, processes)      # what is there of the same settings is done
    if all_done(jobs):
        return make_all(None, jobs, processes)
    …                                                           # load the model
    return make_all(maker.make, jobs, processes)
"""

import glob
import itertools
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from errors import InputError, UsageError
from pipelines.record import counted, left_open
from pipelines.settings import LikenessSettings, Settings, recorded
from preprocess.output import OutputExistsError, free_disk_or_error, refuse_if_written, refuse_planted, resolve_output
from preprocess.record import read_comment, read_record, read_text, sidecar_path
from preprocess.side_file import refuse_foreign

logger = logging.getLogger("selfsame")


@dataclass(frozen=True)
class Job:
    """One video or picture to make.

    standing: of what is there already. "": nothing, it is to be made; "found": something that looks as if it was made
        by the same settings; "done": just that is certain; "refused": something else.
    """

    prompt: str
    seed: int
    output: Path
    standing: str = ""
    refusal: str = ""


DEFAULT_OUTPUT = Path("outputs/output.mp4")


def free_output(extension: str = ".mp4") -> Path:
    """outputs/output.mp4, or with the first number that is free."""
    first = DEFAULT_OUTPUT.with_suffix(extension)
    numbered = (first.with_stem(f"{first.stem}-{number}") for number in itertools.count(2))
    return next(path for path in itertools.chain([first], numbered) if not path.exists())


def list_jobs(settings: Settings, extension: str = ".mp4", frames: int | None = None) -> list[Job]:
    """Every prompt with every seed; with several jobs, their numbers go into the file names.

    Args:
        frames: of each video, to estimate its size by, where it has others than `settings.num_frames`.

    Raises:
        UsageError: an output that cannot be written; or all exist already, made by other settings.
        ResourceError: the disk has no room for the videos.
    """
    prompts = settings.prompt[:1] if settings.prompts_are_clips else settings.prompt
    several = len(prompts) * len(settings.seed) > 1
    output = free_output(extension) if settings.output is None else Path(settings.output)
    if not output.name:
        raise UsageError(f"--output {settings.output!r} names no file; give one such as video{extension}")
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun's
    jobs = []
    for number, prompt in enumerate(prompts):
        for seed in settings.seed:
            path = output.with_name(f"{output.stem}-{number:03d}-seed{seed}{output.suffix}") if several else output
            try:
                job = Job(prompt, seed, resolve_output(path, overwrite=settings.overwrite, extension=extension))
                jobs.append(unless_attempts_are_foreign(job, settings))
                if len(jobs) % processes == (rank + 1) % processes:  # no other process of this run writes or tries it
                    refuse_if_written(jobs[-1].output)
            except OutputExistsError as error:
                standing = "found" if looks_the_same(error.path, settings, prompt, seed) else "refused"
                jobs.append(Job(prompt, seed, error.path, standing, str(error)))
    refuse_or_warn(jobs)
    for job in jobs:
        if not job.standing:
            for path in side_files(settings, job.output):
                refuse_foreign(path, settings.overwrite)
            for kind in ("state", "clips"):
                refuse_planted(job.output.with_name(f".{job.output.stem}.{kind}"))
    free_disk_or_error(output, sum(not job.standing for job in jobs) * estimate_file_bytes(settings, frames))
    return jobs


def side_files(settings: LikenessSettings, output: Path) -> Iterator[Path]:
    """What a run will put beside this output."""
    photos = getattr(settings, "stand_in_photos", settings.score_photos if output.suffix == ".mp4" else ())
    suffixes = [f".face{number}.png" for number in range(len(photos))]
    suffixes += [".preview.png"] if getattr(settings, "preview", False) else []
    if not getattr(settings, "no_drift_report", True):
        suffixes += [".drift.tsv", ".drift.png"]
    if getattr(settings, "first_frame", None) is not None:
        suffixes += [f".first_frame{end}" for end in (".png", ".json", ".keypoints.png", ".safetensors")]
        if settings.min_face_score is not None:  # what it tries, see `attempts`
            seeds = range(settings.first_frame_seed, settings.first_frame_seed + settings.max_retries + 1)
            suffixes += [f".first_frame.seed{seed}{end}" for seed in seeds for end in (".png", ".json")]
    yield from (output.with_suffix(suffix) for suffix in suffixes)


def looks_the_same(output: Path, settings: Settings, prompt: str, seed: int) -> bool:
    """Whether the record of what is there has the settings of this run, as far as they are known by now: a picture may
    change the size, a face score the seed. `settle` makes sure.
    """
    made = settings_in(record_inside(output) or read_record(sidecar_path(output)))
    if made is None:
        return False
    prompts = settings.prompt if settings.prompts_are_clips else (prompt,)
    wanted = recorded(replace(settings, prompt=prompts, seed=(seed,)))
    without = ("height", "width", *(["seed"] if settings.min_face_score is not None else []))
    wanted, made = counted(wanted, without), counted(made, without)
    known = wanted.keys() & made.keys() - {name for name in left_open() if wanted.get(name) is None}
    return all(wanted[name] == made[name] for name in known)


def attempts(job: Job, settings: LikenessSettings) -> Iterator[Job]:
    """What --min_face_score tries for a job: one seed after another, beside the output as NAME.seedN."""
    for seed in range(job.seed, job.seed + settings.max_retries + 1):
        yield Job(job.prompt, seed, job.output.with_name(f"{job.output.stem}.seed{seed}{job.output.suffix}"))


def unless_attempts_are_foreign(job: Job, settings: LikenessSettings) -> Job:
    """The job; refused where what lies under the name of an attempt is none of ours. (Ours are work files: those of
    other settings are made anew.)
    """
    if settings.min_face_score is None or settings.overwrite:
        return job
    for attempt in attempts(job, settings):
        for file in (attempt.output, sidecar_path(attempt.output)):
            if os.path.lexists(file) and not is_attempt(file, attempt.seed):
                refusal = (
                    f"--output {job.output}: {file.name} is in the way of what --min_face_score tries; move it, give "
                    "another name, or add --overwrite"
                )
                return replace(job, standing="refused", refusal=refusal)
    return job


def is_attempt(file: Path, seed: int) -> bool:
    """Whether a file, or the record beside it, says that it was made with this seed to be scored."""
    if file.is_symlink() or not file.is_file():
        return False
    made = settings_in(read_record(file) if file.suffix == ".json" else record_inside(file))
    return made is not None and made.get("min_face_score") is not None and made.get("seed") == [seed]


def settings_in(record: dict | None) -> dict | None:
    """The settings in a record of ours."""
    made = record.get("settings") if record is not None and record.get("made_by") == "Selfsame" else None
    return made if isinstance(made, dict) else None


def record_inside(output: Path) -> dict | None:
    """The record that lies in a finished video or picture."""
    try:
        return read_text(output) if output.suffix.lower() == ".png" else read_comment(output)
    except InputError:
        return None


def settle(jobs: Sequence[Job], settings: Settings, describe: Callable[[str, int], dict], processes=None) -> list[Job]:
    """Make sure of what was found: what has the content that this run would make is done, anything else is refused.

    Args:
        describe: prompt and seed -> the record of a run, with its "content".
        processes: of a split video the first one's files count.

    Raises:
        UsageError: nothing is left to be made, and something was refused. (With split prompts it is said by `make_all`:
            the others have prompts of their own.)
    """
    settled = []
    for job in jobs:
        if job.standing == "found":
            seeds = [job.seed] if settings.min_face_score is None else [a.seed for a in attempts(job, settings)]
            contents = [describe(job.prompt, seed)["content"] for seed in seeds]
            inside, sidecar = record_inside(job.output), read_record(sidecar_path(job.output))
            if inside is not None and inside.get("content") in contents:
                clear_leftovers(job.output)
                job = replace(job, standing="done")
            elif not job.output.exists() and sidecar is not None and sidecar.get("content") in contents:
                job = replace(job, standing="")  # the record of a pair that was never finished
                job = unless_attempts_are_foreign(job, settings)
            else:
                job = replace(job, standing="refused")
        settled.append(job)
    settled = settled if processes is None else processes.share(settled)
    said = [job for job in jobs if job.standing == "refused"]
    refuse_or_warn(settled, said, others_go_on=processes is not None and processes.split)
    return settled


def refuse_or_warn(jobs: Sequence[Job], said: Sequence[Job] = (), others_go_on: bool = False) -> None:
    """Say what is in the way; it is an error where that is all there is."""
    refused = [job for job in jobs if job.standing == "refused"]
    if refused and len(refused) == len(jobs) and not others_go_on:
        raise UsageError(refused[0].refusal)
    for job in refused:
        if job not in said:
            logger.warning("%s; it stays as it is, and the others are made", job.refusal)


def all_done(jobs: Sequence[Job]) -> bool:
    """Whether there is nothing to be made."""
    return all(job.standing in ("done", "refused") for job in jobs)


def clear_leftovers(output: Path) -> None:
    """Remove the work files and the saved progress of a video that is whole."""
    for kind in ("part.*", "state*", "clips", "window*.state.safetensors"):
        for path in output.parent.glob(f".{glob.escape(output.stem)}.{kind}"):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def make_all(make: Callable[[Job], Path] | None, jobs: Iterable[Job], processes=None) -> list[Path]:
    """Make one job after another, and say of each where it is: a line of standard output each, as soon as it is there.
    What is done already is not made again.

    Returns:
        the files that are there now, in the jobs' order.

    Raises:
        UsageError: at the end, for those whose place is taken by something else. Where prompts are split over processes
            it is a warning: a launcher takes the error for a crash, and ends the processes that still work.
    """
    made, refused = [], []
    for job in jobs:
        if job.standing == "refused":
            refused.append(job.output.name)
            continue
        if job.standing == "done":
            logger.info("%s: done already, by the same settings", job.output)
        made.append(job.output if job.standing == "done" else make(job))
        if processes is None or processes.writes:
            print(made[-1])
    if refused:
        error = UsageError(
            f"--output: {', '.join(refused)} not made: something of other settings is there; give another name, or add "
            "--overwrite"
        )
        if processes is None or not processes.split:
            raise error
        logger.warning("%s", error)
    return made


def estimate_file_bytes(settings: Settings, frames: int | None = None) -> int:
    """Bytes of one video at its worst (noise), and of the saved progress: four tensors of the size of the latents; of
    one picture, uncompressed.
    """
    if not hasattr(settings, "num_frames"):
        return 3 * (settings.height or 1280) * (settings.width or 1280)
    frames = frames or settings.num_frames
    pixels = frames * settings.height * settings.width
    latents = (frames // 4 + 1) * (settings.height // 8) * (settings.width // 8) * 16
    return pixels * 3 // 2 + 4 * 4 * latents
