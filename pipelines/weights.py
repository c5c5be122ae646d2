"""What a run reads from disk: one list, which the checks, the record, the digests and the estimates all go over."""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from configs import download_command, load_config
from errors import WeightsError
from preprocess.face_detection import DETECTOR_PATH, recognizer_is_there

logger = logging.getLogger("selfsame")

EXPERTS = ("high", "low")  # the noise that each transformer of a pair is for


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

    def check(self) -> None:
        """Look for it, and read its headers.

        Raises:
            WeightsError: it is missing, damaged, or of another model.
        """
        if self.path.is_symlink() and not self.path.exists():  # a hub's cache was moved or cleaned
            raise WeightsError(f"{self.path}: a link to {os.readlink(self.path)}, which is not there")
        if not self.path.exists():
            raise WeightsError(f"{self.path}: no such weights")
        if self.read is not None:
            self.read()


def found_or(place: Path, find: Callable[..., Path], *args: object) -> Path:
    """What `find` finds; `place` where there is nothing, which its reader then says."""
    try:
        return find(*args)
    except WeightsError:
        return place


def face_files(settings, needed_by: str | None) -> list[WeightsFile]:
    """The face models of settings of any method. They are no part of what makes a frame, so `Wan.weights` has none.

    needed_by: the flag for which nothing can stand in for antelopev2. A path that was given is right in any case.
    """
    files = []
    if needed_by or settings.antelopv2_path is not None:
        folder = Path(settings.antelopv2_path or DETECTOR_PATH)

        def read() -> None:
            if not recognizer_is_there(folder):
                raise WeightsError(f"{folder}: no .onnx files there, nor in its models/antelopev2/")

        name = f"face models (for {needed_by})" if needed_by else "face models"
        files.append(WeightsFile(name, "--antelopv2_path", folder, "antelopev2", read=read))
    if (parser := getattr(settings, "face_parser_path", None)) is not None:
        files.append(WeightsFile("face parser", "--face_parser_path", Path(parser), "face-parsing"))
    return files


def check_weights(files: Sequence[WeightsFile]) -> None:
    """Name everything that is missing or wrong, with the one command that brings it all. Takes milliseconds a file.

    Raises:
        WeightsError: one line.
    """
    from models.wan.checkpoint import headers_only  # here, because settings without torch use this file too

    problems: dict[str, list[WeightsFile]] = {}  # one folder that is not there is one problem of all its parts
    with headers_only(), _only_errors():
        for file in files:
            try:
                file.check()
            except WeightsError as error:
                problems.setdefault(str(error), []).append(file)
    if not problems:
        return
    said = []
    for problem, of_files in problems.items():
        names, flags = (", ".join(dict.fromkeys(getattr(f, key) for f in of_files)) for key in ("name", "flag"))
        said.append(f"{names}: {problem} ({flags})")
    downloads = dict.fromkeys(file.config for found in problems.values() for file in found if file.config)
    if downloads:
        said.append(download_command([*map(load_config, downloads)]))
    raise WeightsError("; ".join(said))


@contextmanager
def _only_errors() -> Iterator[None]:
    """Readers say what they load; here nothing is loaded, and the run will say it again."""
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


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
