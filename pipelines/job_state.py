"""What a job needs to go on after a crash: its latents and the solver's history, saved after every step.

Saved as safetensors beside the output (`.NAME.state.safetensors`), written beside and renamed, removed when the video
is whole. A state of other settings is never used.
"""

import hashlib
import json
import logging
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from errors import ResourceError
from pipelines.denoise import Step

logger = logging.getLogger("selfsame")


def digest_of(identity: dict) -> str:
    """One short value for everything that decides a video's content."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()


class JobState:
    """The saved progress of one video.

    Args:
        output: the video's path.
        identity: everything that decides the video's content; a saved state counts only if it was made with the same.
    """

    def __init__(self, output: Path, identity: dict):
        self.path = output.with_name(f".{output.stem}.state.safetensors")
        self.digest = digest_of(identity)

    def save(self, step: Step) -> None:
        """Record that the steps up to and including this one are done.

        Raises:
            ResourceError: the disk is full.
        """
        tensors = {"sample": step.sample}
        plain = {}
        for name, value in step.solver.items():
            if isinstance(value, Tensor):
                tensors[f"solver.{name}"] = value
            elif isinstance(value, list):
                plain[name] = len(value)
                tensors |= {f"solver.{name}.{i}": tensor for i, tensor in enumerate(value)}
            else:
                plain[name] = value
        metadata = {"digest": self.digest, "step": str(step.index), "solver": json.dumps(plain)}
        part = self.path.with_suffix(".part")
        # A copy each: entries may share memory (the last sample is also the solver's), which the format refuses.
        tensors = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
        try:
            save_file(tensors, part, metadata)
            with open(part, "rb") as file:
                os.fsync(file.fileno())
            part.replace(self.path)
        except (OSError, SafetensorError) as error:
            raise ResourceError(f"{self.path}: cannot be saved ({error}); make room and repeat the command") from error
        finally:
            part.unlink(missing_ok=True)  # of a save that was interrupted

    def load(self, solver: dict) -> tuple[int, Tensor, dict] | None:
        """(next step, sample, solver history) of an interrupted run with the same settings, on the CPU; or None.

        `solver` is the history of a fresh solver: it tells which entries are lists.
        """
        if not self.path.is_file():
            return None
        try:
            with safe_open(self.path, "pt") as file:
                metadata = file.metadata()
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        except (SafetensorError, OSError) as error:
            logger.warning("%s is damaged (%s); starting from the first step", self.path, error)
            return None
        if metadata["digest"] != self.digest:
            logger.warning("%s belongs to a run with other settings; starting from the first step", self.path)
            return None
        plain = json.loads(metadata["solver"])
        state = {}
        for name, fresh in solver.items():
            if isinstance(fresh, list):
                state[name] = [tensors[f"solver.{name}.{i}"] for i in range(plain[name])]
            else:
                state[name] = tensors.get(f"solver.{name}", plain.get(name))
        return int(metadata["step"]) + 1, tensors["sample"], state

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
