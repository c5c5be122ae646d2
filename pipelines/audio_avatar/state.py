"""The latents of a long video on disk, and what is done of the present step: enough to go on after a crash.

`.NAME.state/` beside the output holds `latents.safetensors`, the latents after the last finished step, and the results
of the windows that the present step has done so far (`.windowN.state.safetensors`). The latents are memory-mapped, so
that an hour of video takes no more memory than a minute; a step's new ones are written beside and renamed.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from errors import ResourceError
from pipelines.denoise import Step
from pipelines.distributed import Processes
from pipelines.job_state import JobState, Progress, logger
from preprocess.output import allocate, create_empty, put_in_place, refuse_planted

UNSEALED = "0" * 64  # a checksum's place in the header while the values are written


def create_on_disk(path: Path, shape: Sequence[int], metadata: dict[str, str]) -> Tensor:
    """A writable float32 tensor in a safetensors file: memory-mapped, and on disk in full before anything is written.

    Raises:
        ResourceError: no room for it. (Found out only when a page is written, it would kill the process.)
    """
    size = 4 * int(numpy.prod(shape))
    entry = {"dtype": "F32", "shape": list(shape), "data_offsets": [0, size]}
    header = json.dumps({"__metadata__": metadata, "tensor": entry}).encode()
    header += b" " * (-len(header) % 8)
    try:
        create_empty(path)
        with open(path, "rb+") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.flush()
            allocate(file.fileno(), 8 + len(header) + size)
    except OSError as error:
        raise ResourceError(f"{path}: {error.strerror} ({size / 2**20:.0f} MiB of latents); make room there") from error
    return map_file(path, shape)


def checksum_of(tensor: Tensor) -> str:
    """SHA-256 of the values, read piece by piece."""
    digest = hashlib.sha256()
    for part in tensor:
        digest.update(part.contiguous().numpy())
    return digest.hexdigest()


def seal(path: Path, tensor: Tensor) -> None:
    """Put the checksum of the finished values into their file's header."""
    with open(path, "rb+") as file:
        header = file.read(8 + int.from_bytes(file.read(8), "little"))
        file.seek(8 + header.index(UNSEALED.encode()))
        file.write(checksum_of(tensor).encode())


def open_on_disk(path: Path) -> tuple[Tensor, dict[str, str]] | None:
    """The tensor of such a file and its metadata; None where there is none that is whole."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            metadata, shape = file.metadata(), file.get_slice("tensor").get_shape()
    except (SafetensorError, OSError) as error:
        logger.warning("%s is damaged (%s); starting from the first step", path, error)
        return None
    return map_file(path, shape), metadata


def map_file(path: Path, shape: Sequence[int]) -> Tensor:
    with open(path, "rb") as file:
        offset = 8 + int.from_bytes(file.read(8), "little")
    return torch.from_numpy(numpy.memmap(path, numpy.float32, "r+", offset, tuple(shape)))


class AvatarState:
    """The progress of one video.

    Args:
        output: the video's path.
        identity: see `job_state.Progress`; a saved state counts only under the same.
        shape: of the latents, (F, C, h, w): a window's frames lie together in the file.
        processes: all have the latents; the first process's are what a later run goes on from.
    """

    def __init__(self, output: Path, identity: dict, shape: tuple[int, int, int, int], processes: Processes):
        self.folder = output.with_name(f".{output.stem}.state")
        self.identity, self.shape, self.processes = identity, shape, processes
        self.progress = Progress(identity)
        self.path = self.folder / ("latents" + (f".{processes.rank}" if processes.rank else "") + ".safetensors")
        self.part = self.path.with_suffix(".part")
        self.latents: Tensor | None = None  # after the last finished step
        self._target: Tensor | None = None  # where the step that is being made is written

    def open(self, noise: Iterable[Tensor], resumable: bool) -> int:
        """Have the latents that the next step starts from; returns its number.

        Args:
            noise: latent frames (C, h, w), drawn for a fresh start.
            resumable: False starts afresh, whatever is there.
        """
        refuse_planted(self.folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ResourceError(f"{self.folder}: cannot be made ({error.strerror})") from error
        self.latents = self._target = None
        is_first = self.processes.rank == 0
        next_step = self.processes.share(self._reopen() if resumable and is_first else 0)
        latents = self.latents if self.latents is not None else self.begin(next_step - 1)
        if is_first and self.latents is None:
            self.remove_windows()
            for frame, values in zip(latents, noise, strict=True):
                frame.copy_(values)
        if self.processes.count > 1:
            for frame in latents:
                frame.copy_(self.processes.broadcast(frame, 0))
        if self.latents is None:
            self.commit()
        return next_step

    def _reopen(self) -> int:
        """The step to go on with, after a run with the same settings; else 0."""
        found = open_on_disk(self.path)
        if found is None:
            return 0
        latents, metadata = found
        if not self.progress.counts(metadata or {}) or tuple(latents.shape) != self.shape:
            logger.warning("%s belongs to a run with other settings; starting from the first step", self.folder)
            return 0
        if metadata["checksum"] != checksum_of(latents):
            logger.warning("%s is damaged (its checksum is another); starting from the first step", self.path)
            return 0
        self.latents = latents
        return int(metadata["step"]) + 1

    def begin(self, step: int) -> Tensor:
        """Where this step's latents go, (F, C, h, w), to be filled and then committed."""
        self._target = create_on_disk(self.part, self.shape, self.progress.as_metadata(step) | {"checksum": UNSEALED})
        return self._target

    def commit(self) -> None:
        """The step is finished: its latents are the ones to go on from."""
        seal(self.part, self._target)
        put_in_place((self.part, self.path))  # synced, mapped pages too
        self.latents, self._target = self._target, None

    # ----------------------------------------------------------------------------------------- windows of one step

    def window(self, number: int) -> JobState:
        return JobState(self.folder / f"window{number}", self.identity | {"window": number})

    def save_window(self, step: int, number: int, sample: Tensor) -> None:
        self.window(number).save(Step(step, sample, sample, {}))

    def finished_windows(self, step: int, count: int) -> list[int]:
        """The windows of this step that an earlier run has done, as far as the first process can see."""
        finished = []
        if self.processes.rank == 0:
            finished = [number for number in range(count) if self.load_window(step, number) is not None]
            if not finished:
                self.remove_windows()  # they belong to the step before
        return self.processes.share(finished)

    def load_window(self, step: int, number: int) -> Tensor | None:
        """What an earlier run, or this one, made of a window in this step."""
        saved = self.window(number).load({})
        return saved[1] if saved is not None and saved[0] == step + 1 else None

    def remove_windows(self) -> None:
        for file in self.folder.glob(".window*"):
            file.unlink(missing_ok=True)

    def remove(self) -> None:
        """The video is whole."""
        self.latents = self._target = None
        shutil.rmtree(self.folder, ignore_errors=True)
