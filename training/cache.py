"""What frozen networks make of the training videos, computed once and kept in files named by what they depend on.

    cache = Cache("data/.cache", [latents(dtype), text(dtype)], encoders_of(config.model, device))
    cache.build(views, rank, ranks)                        # loads each encoder once, uses it, frees it
    cache.read("latents", view)["mean"]                    # (z, f, h, w)

A file's name is a hash of the content of the video and of all that was done to it: window, crop, size, rate, the
encoder's weights. So a change makes new files and never meets old ones. Files are whole or not there, whoever writes
them; a damaged one is made anew, or refused by its name.
"""

import contextlib
import gc
import json
import logging
import os
import secrets
import shutil
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save
from torch import Tensor, nn

from errors import InputError, ResourceError, UsageError, WeightsError
from pipelines.memory import free_cached
from pipelines.record import digest_of
from preprocess.output import readable_bytes, sync
from preprocess.progress_bars import ProgressBars
from training.clips import View
from training.encoders import Encoder

logger = logging.getLogger("selfsame")

MARK = "selfsame"  # the entry of a file's header that is ours
STALE = 24 * 3600  # seconds: a work file that old is of a run that was killed


@dataclass(frozen=True)
class Encoding:
    """One kind of what is kept.

    Args:
        kind: how its files' names begin.
        encoder: which encoder makes it.
        depends: all of a view that decides it.
        numbers: how many there are of a view, about, so that room can be asked for before anything is computed.
        read: what of a view the encoder needs, from its files.
        encode: the tensors of what was read.
        dtype: they are kept in.
    """

    kind: str
    encoder: str
    depends: Callable[[View], object]
    numbers: Callable[[View], int]
    read: Callable[[View], Any]
    encode: Callable[[nn.Module, Any], Mapping[str, Tensor]]
    dtype: torch.dtype = torch.bfloat16

    def size(self, view: View) -> int:
        """Bytes of its file, about."""
        return self.numbers(view) * self.dtype.itemsize


class Cache:
    """Encoded views in a folder.

    Args:
        folder: made if it is not there.
        encodings: what is kept of every view.
        encoders: the networks, by name.

    Raises:
        UsageError: the base model lacks an encoder.
    """

    def __init__(self, folder: str | Path, encodings: Sequence[Encoding], encoders: Mapping[str, Encoder]):
        self.folder, self.encodings, self.encoders = Path(folder), tuple(encodings), encoders
        if lacking := sorted({encoding.encoder for encoding in encodings} - encoders.keys()):
            raise UsageError(f"model.config: its config names no {lacking[0]} encoder, which this recipe reads")

    def path(self, encoding: Encoding, view: View) -> Path:
        """Where an encoding of a view is kept."""
        identity = self.encoders[encoding.encoder].identity
        decides = [encoding.kind, identity, str(encoding.dtype), encoding.depends(view)]
        return self.folder / f"{encoding.kind}-{digest_of(decides)[:32]}.safetensors"

    def missing(self, views: Iterable[View]) -> dict[Encoding, dict[Path, View]]:
        """Of every kind the files that are not there, or not whole, with a view each is of: several may have the same
        caption, or the same face.
        """
        views = list(views)
        found = {}
        for encoding in self.encodings:
            wanted = {self.path(encoding, view): view for view in views}
            if lacking := {file: wanted[file] for file in sorted(wanted) if not is_whole(file)}:
                found[encoding] = lacking
        return found

    def build(self, views: Iterable[View], rank: int = 0, ranks: int = 1) -> int:
        """Encode what is missing of a process's share; the caller waits for the others afterwards. Each encoder is
        loaded once, if at all, and gone before the next.

        Returns:
            how many files were made.

        Raises:
            WeightsError: encoders that are not there, before anything is computed.
            ResourceError: the disk has no room, or the folder cannot be written in.
            InputError: a view cannot be read, or its encoding is not all numbers.
        """
        work = self.missing(views)
        if not work:
            return 0
        self._check_encoders({encoding.encoder for encoding in work})
        self._check_room(work, rank)
        made = 0
        for name in dict.fromkeys(encoding.encoder for encoding in work):
            # Shared by name, not by what is missing just now: the others' work must not move anyone's share.
            own = {
                encoding: {file: view for file, view in files.items() if share_of(file, ranks) == rank}
                for encoding, files in work.items()
                if encoding.encoder == name
            }
            if any(own.values()):
                made += self._encode(name, own, rank)
        return made

    def _encode(self, name: str, work: Mapping[Encoding, Mapping[Path, View]], rank: int) -> int:
        encoder, made = self.encoders[name].load(), 0
        device = next(encoder.parameters()).device
        todo = [(encoding, file, view) for encoding, files in work.items() for file, view in files.items()]
        bars = ProgressBars(rank == 0)
        with (
            torch.no_grad(),
            ThreadPoolExecutor(1) as reader,
            bars.work(f"encoding ({name})", len(todo), "file") as bar,
        ):
            coming = reader.submit(todo[0][0].read, todo[0][2])
            for number, (encoding, file, view) in enumerate(todo):
                what = coming.result()
                if number + 1 < len(todo):  # read while the network is busy
                    following, _, next_view = todo[number + 1]
                    coming = reader.submit(following.read, next_view)
                if not is_whole(file):  # another run may have been quicker
                    write(file, encoded(encoder, encoding, view, what), {"kind": encoding.kind})
                    made += 1
                bar.advance()
        del encoder
        gc.collect()
        free_cached(device)
        return made

    def read(self, kind: str, view: View) -> dict[str, Tensor]:
        """The tensors of a view.

        Raises:
            InputError: the file is missing or damaged.
        """
        encoding = next(encoding for encoding in self.encodings if encoding.kind == kind)
        file = self.path(encoding, view)
        if trouble := trouble_in(file):
            raise InputError(f"{file}: {trouble}; remove it, and the next start encodes {view.sample.name} anew")
        return load(file)[0]

    def _check_encoders(self, names: Iterable[str]) -> None:
        needed = {name: self.encoders[name] for name in sorted(names)}
        lacking = {name: one for name, one in needed.items() if one.weights is not None and not one.weights.exists()}
        if lacking:
            places = ", ".join(f"{name} encoder {encoder.weights}" for name, encoder in lacking.items())
            hints = "; ".join(dict.fromkeys(encoder.hint for encoder in lacking.values()))
            raise WeightsError(f"not there: {places}; {hints}")

    def _check_room(self, work: Mapping[Encoding, Mapping[Path, View]], rank: int) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_stale(self.folder)
        except OSError as error:
            raise ResourceError(f"{self.folder}: {error.strerror}; give data.cache: another folder") from None
        sizes = {encoding.kind: sum(map(encoding.size, files.values())) for encoding, files in work.items()}
        free = shutil.disk_usage(self.folder).free
        if rank == 0:
            logger.info(
                "%d files to encode into %s: %s, %s in all, %s are free",
                *(sum(map(len, work.values())), self.folder),
                ", ".join(f"{kind} {readable_bytes(size)}" for kind, size in sizes.items()),
                *(readable_bytes(sum(sizes.values())), readable_bytes(free)),
            )
        if sum(sizes.values()) > free:
            raise ResourceError(
                f"{self.folder}: {readable_bytes(sum(sizes.values()))} are needed for what is encoded, "
                f"{readable_bytes(free)} are free; make room, or give data.cache: a folder on another disk"
            )


def share_of(file: Path, ranks: int) -> int:
    """Which process encodes a file."""
    return zlib.crc32(file.name.encode()) % ranks


def encoded(encoder: nn.Module, encoding: Encoding, view: View, what: object) -> dict[str, Tensor]:
    """What is kept of a view of which `what` was read.

    Raises:
        InputError: NaN or infinity, in what was computed or once it is rounded.
    """
    made = {}
    for name, tensor in encoding.encode(encoder, what).items():
        made[name] = tensor.to("cpu", encoding.dtype).contiguous()
        if not torch.isfinite(made[name]).all():
            raise InputError(f"{view.sample.listed.video}: its {encoding.kind} are not all numbers; leave it out")
    return made


# ---------------------------------------------------------------------------------------------------- files


def write(file: Path, tensors: dict[str, Tensor], about: Mapping[str, str]) -> None:
    """A file of tensors with their checksum: beside under a name that nobody else has, synced, renamed.

    Raises:
        ResourceError: no room, or no right to write there.
    """
    part = file.with_name(f".{file.stem}.{secrets.token_hex(8)}.part")  # machines may share the folder
    # One entry: the order of several would differ from time to time, and so would the bytes.
    content = save(tensors, {MARK: json.dumps({**about, "crc32": checksum(tensors)}, sort_keys=True)})
    try:
        part.write_bytes(content)
        sync(part)
        os.replace(part, file)
    except OSError as error:
        raise ResourceError(f"cannot write {file}: {error.strerror}; give data.cache: another folder") from None
    finally:
        part.unlink(missing_ok=True)


def checksum(tensors: Mapping[str, Tensor]) -> str:
    total = 0
    for name in sorted(tensors):
        total = zlib.crc32(tensors[name].contiguous().flatten().view(torch.uint8).numpy(), total)
    return f"{total:08x}"


def load(file: Path) -> tuple[dict[str, Tensor], str]:
    """The tensors of a file, and the checksum it says they have."""
    with safetensors.safe_open(file, "pt") as opened:
        about = (opened.metadata() or {}).get(MARK, "{}")
        return {name: opened.get_tensor(name) for name in opened.keys()}, json.loads(about).get("crc32", "")  # noqa: SIM118


def is_whole(file: Path) -> bool:
    """Whether a file is there and as long as its header says; what is in it is looked at when it is read."""
    try:
        with open(file, "rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length)) if length < 2**20 else {}
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        return bool(ends) and file.stat().st_size == 8 + length + max(ends)
    except (OSError, ValueError, LookupError, TypeError):
        return False


def trouble_in(file: Path) -> str:
    """Why an encoded file cannot be used; empty where it can."""
    try:
        tensors, expected = load(file)
    except FileNotFoundError:
        return "missing"
    except (OSError, ValueError, AttributeError, safetensors.SafetensorError) as error:
        return f"damaged: {str(error)[:120]}"
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            return f"not numbers: {name} holds NaN or infinity"
    return "" if expected == checksum(tensors) else "damaged: its checksum is another"


def remove_stale(folder: Path) -> None:
    """What runs that were killed long ago have left."""
    for part in folder.glob(".*.part"):
        with contextlib.suppress(OSError):
            if part.stat().st_mtime < time.time() - STALE:
                part.unlink()
