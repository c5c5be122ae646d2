"""What a run reads from disk: one list, which the checks, the record, the digests and the estimates all go over."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from configs import download_command, load_config


@dataclass(frozen=True)
class WeightsFile:
    """One part of a model: where it lies, and what to do when it does not.

    name: in messages, such as "transformer", "VAE", "umT5", "tokenizer", "CLIP", "Stand-In", "wav2vec2", "LoRA".
    flag: by which another one is given.
    path: a file, or a folder that holds one set of weights; where it would be looked for if there is none.
    config: whose download brings it; None where only the user can have it.
    until_denoised: whether it acts before denoising ends, so that saved progress is only good with the same.
    read: reads its headers as the run will, without its values, and raises `WeightsError`.
    """

    name: str
    flag: str
    path: Path
    config: str | None = None
    until_denoised: bool = True
    read: Callable[[], object] | None = field(default=None, compare=False, repr=False)

    @property
    def hint(self) -> str:
        """The command that downloads it."""
        return download_command(load_config(self.config)) if self.config else f"give another {self.flag}"


# Where a folder has one of these, the GGUF files in it are not what would be read.
_READ_INSTEAD = ("*.safetensors", "*.bin", "*.pt", "*.ckpt", "model_index.json", "transformer", "*_noise_model")


def find_gguf(path: str | Path) -> str | None:
    """The name of the GGUF file that `path` is, or that the weights of the folder are; None if it is neither."""
    path = Path(path)
    try:
        if path.is_file():
            with open(path, "rb") as file:
                return path.name if file.read(4) == b"GGUF" else None
        if not path.is_dir() or any(next(path.glob(pattern), None) for pattern in _READ_INSTEAD):
            return None
        return next((found.name for pattern in ("*.gguf", "*/*.gguf") for found in sorted(path.glob(pattern))), None)
    except OSError:
        return None  # whoever reads it says why it cannot be
