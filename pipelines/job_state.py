"""What a job needs to go on after a crash: its latents and the solver's history, saved after every step.

Saved as safetensors beside the output (`.NAME.state.safetensors`), written beside and renamed, removed when the video
is whole. A state counts only if it was made from the same content (`record.progress_of`) and no bit of it changed.
"""

import glob
import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from errors import ResourceError
from pipelines.denoise import Step
from pipelines.record import digest_of
from preprocess.output import whole_file

logger = logging.getLogger("selfsame")


def save_state(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a state whole, or leave the one that is there.

    Raises:
        ResourceError: the disk is full.
    """
    # A copy each: entries may share memory (the last sample is also the solver's), which the format refuses.
    tensors = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    try:
        with whole_file(path) as part:
            save_file(tensors, part, dict(metadata) | {"checksum": checksum(tensors, metadata)})
    except (OSError, SafetensorError) as error:
        raise ResourceError(f"{path}: cannot be saved ({error}); make room and repeat the command") from error


def load_state(path: Path, otherwise: str) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """Tensors and metadata of a state; None where there is none, or with a word about it, none that can be trusted.

    Args:
        otherwise: what is done then, for that word.
    """
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        if metadata.pop("checksum", None) != checksum(tensors, metadata):
            raise OSError("its checksum is another")
    except (SafetensorError, OSError) as error:
        logger.warning("%s is damaged (%s); %s", path, error, otherwise)
        return None
    return tensors, metadata


def checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(sorted(metadata.items())).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


class Progress:
    """What a state must have been made from to count.

    Args:
        identity: everything that decides the latents (`record.progress_of`). What is under its key "encoding", how
            pictures were encoded, does not count once all of its "num_steps" are done: nothing is left but to decode
            them, and that may be done in another way than the one that ran out of memory. What is under "chosen" is
            only written down, for `chosen_before`.
    """

    def __init__(self, identity: dict):
        identity = dict(identity)
        self.chosen = {"chosen": json.dumps(identity.pop("chosen", {}))}
        self.digest = digest_of(identity)
        self.of_denoised = digest_of({name: value for name, value in identity.items() if name != "encoding"})
        self.num_steps = identity.get("num_steps")

    def as_metadata(self, step: int) -> dict[str, str]:
        return {"digest": self.digest, "of_denoised": self.of_denoised, "step": str(step)} | self.chosen

    def counts(self, metadata: Mapping[str, str]) -> bool:
        is_denoised = self.num_steps is not None and metadata.get("step") == str(self.num_steps - 1)
        return metadata.get("digest") == self.digest or (
            is_denoised and metadata.get("of_denoised") == self.of_denoised
        )


def chosen_before(output: Path, begun_as: str) -> tuple[Path, dict] | None:
    """The saved progress of a video that was begun as this one (`record.begun_as`), and what was chosen for it by the
    memory that was free then; of steps, of an avatar's windows, or of finished clips. None where there is none.
    """
    name = f".{glob.escape(output.stem)}"
    for pattern in (f"{name}.state.safetensors", f"{name}.state/latents.safetensors", f"{name}.clips/*.safetensors"):
        for path in sorted(output.parent.glob(pattern)):
            try:
                with safe_open(path, "pt") as file:
                    chosen = json.loads((file.metadata() or {}).get("chosen", "{}"))
            except (SafetensorError, OSError, ValueError):
                continue  # whoever goes on from it says so
            if chosen.get("begun_as") == begun_as:
                return path, chosen
    return None


class JobState:
    """The saved progress of one video.

    Args:
        output: the video's path.
        identity: see `Progress`.
    """

    def __init__(self, output: Path, identity: dict):
        self.path = output.with_name(f".{output.stem}.state.safetensors")
        self.progress = Progress(identity)

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
        save_state(self.path, tensors, self.progress.as_metadata(step.index) | {"solver": json.dumps(plain)})

    def load(self, solver: dict) -> tuple[int, Tensor, dict] | None:
        """(next step, sample, solver history) of an interrupted run with the same settings, on the CPU; or None.

        `solver` is the history of a fresh solver: it tells which entries are lists.
        """
        found = load_state(self.path, "starting from the first step")
        if found is None:
            return None
        tensors, metadata = found
        if not self.progress.counts(metadata):
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
