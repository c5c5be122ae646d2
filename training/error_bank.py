"""The bank of SVI's error recycling: what the model got wrong, kept to be put into later training samples.

Errors lie in lists, one for each (latent shape, bucket of noise levels), bounded. An entry is a file of its own that is
never changed: replacing one writes another. So a step reads the bank as it stood when the step began (`view`), a
checkpoint is a set of hard links that copies nothing, and processes of one machine share the files without locks.

    paired      one entry holds v̂ - V and its σ; the noise error is (1-σ)·(v̂ - V), the video error -σ·(v̂ - V)
    two_banks   each error in a list of its own, replaced by itself, as upstream keeps them: twice the room

Source: Stable Video Infinity (arXiv 2510.09212) `train_svi.py` (_add_error_to_…, _update_error_buffers_…).
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from errors import ResourceError, UsageError, WeightsError
from preprocess.output import readable_bytes, refuse_planted, sync, write_new

STORAGES = {"paired": ("pair",), "two_banks": ("noise", "video")}
REPLACEMENTS = ("l2", "random", "fifo")
DTYPES = {"bf16": torch.bfloat16, "int8": torch.int8, "fp32": torch.float32}
MANIFEST = "bank.json"

Shape = tuple[int, ...]
Cell = tuple[str, Shape, int]  # kind of list, latent shape, bucket


@dataclass(frozen=True)
class RecycledError:
    """What one sample's prediction was off by.

    position: of the sample in the global batch.
    bucket:   of its noise level (`training.error_recycling.error_buckets`).
    sigma:    its noise level.
    velocity: v̂ - V, (C, F, h, w).
    kept:     whether it enters the bank. An error of a clean input seldom does.
    """

    position: int
    bucket: int
    sigma: float
    velocity: Tensor
    kept: bool = True

    def of(self, kind: str) -> Tensor:
        """The error of one Euler step from x_σ to pure noise ("noise") or to the video ("video"); "pair": v̂ - V."""
        return self.velocity * {"noise": 1 - self.sigma, "video": -self.sigma, "pair": 1.0}[kind]


@dataclass(frozen=True)
class Entry:
    """One stored error: its file in the bank's folder, and the file's checksum."""

    file: str
    checksum: str


# Which of `count` entries a new error replaces: called with (the error's position, kind of list, count).
Choose = Callable[[int, str, int], int]


class ErrorBank:
    """A bank in a folder. Every process has one; those of a machine share the folder, and one of them writes.

    Args:
        folder: of this run; what a killed run left there is removed.
        grids: buckets of noise levels.
        per_grid: entries of a list at most.
        replace: what a full list gives up: the entry nearest to the new one (l2), any (random), the oldest (fifo).
        storage, dtype: of the entries; int8 has one scale an entry.
        pool: cells on a side that share a value: 2 takes a quarter of the room.
        limit_gib: what all entries may take, in GiB; None: no limit but the lists' own.
        writes: whether this process writes the files.

    Raises:
        UsageError: a choice that is none; a link in place of the folder.
    """

    def __init__(
        self,
        folder: Path,
        *,
        grids: int,
        per_grid: int,
        replace: str = "l2",
        storage: str = "paired",
        dtype: str = "bf16",
        pool: int = 1,
        limit_gib: float | None = None,
        writes: bool = True,
    ):
        for name, value, accepted in (
            ("replace", replace, REPLACEMENTS),
            ("storage", storage, STORAGES),
            ("dtype", dtype, DTYPES),
        ):
            if value not in accepted:
                raise UsageError(f"error_recycling.{name}: {value!r} is not one of {', '.join(accepted)}")
        self.folder, self.grids, self.per_grid = folder, grids, per_grid
        self.replace, self.storage, self.dtype, self.pool = replace, storage, dtype, pool
        self.limit_gib, self.writes = limit_gib, writes
        self._cells: dict[Cell, list[Entry]] = {}
        self._replaced: list[str] = []  # files that a view of the present step may still read
        self._fresh: dict[str, dict[str, Tensor]] = {}  # of the last insert: another process may still write them
        self._unsynced: set[str] = set()
        self._serial = 0
        if writes:
            refuse_planted(folder)
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)

    # -------------------------------------------------------------------------------------------------- reading

    def __len__(self) -> int:
        """Errors in the bank; one of each kind counts once."""
        return sum(map(len, self._cells.values())) // len(STORAGES[self.storage])

    def view(self) -> "BankView":
        """The bank as it is now. It can be read until the end of the next `insert`."""
        return BankView(self, {cell: tuple(entries) for cell, entries in self._cells.items()})

    def read(self, entry: Entry) -> tuple[Tensor, float]:
        """The stored error (C, F, h, w) float32 and its sigma. The file is mapped, not copied."""
        packed = self._fresh.get(entry.file)
        if packed is None:
            packed = safetensors.torch.load_file(self.folder / entry.file)
        return unpack(packed), packed["sigma"].item()

    # -------------------------------------------------------------------------------------------------- writing

    def insert(self, errors: Iterable[RecycledError], choose: Choose) -> None:
        """Store a step's errors, in the order of their positions, whatever order they come in.

        Args:
            errors: of the whole global batch, on every process alike.
            choose: an index for `random`, from the draws of the step.

        Raises:
            ResourceError: the disk is full, or a new shape would exceed the limit.
        """
        for file in self._replaced:
            self._unlink(file)
        self._replaced, self._fresh = [], {}
        errors = sorted((error for error in errors if error.kept), key=lambda error: error.position)
        assert len({error.position for error in errors}) == len(errors), "a sample was given twice"
        for error in errors:
            for kind in STORAGES[self.storage]:
                self.put(
                    kind, error.bucket, error.of(kind), error.sigma, lambda n, e=error, k=kind: choose(e.position, k, n)
                )

    def put(self, kind: str, bucket: int, error: Tensor, sigma: float, choose: Callable[[int], int]) -> None:
        """Store one error in one list."""
        assert 0 <= bucket < self.grids, f"bucket {bucket} of {self.grids}"
        shape = tuple(error.shape)
        self._check_limit(shape)
        packed = pack(error, sigma, self.dtype, self.pool)
        entries = self._cells.setdefault((kind, shape, bucket), [])
        index = None  # of the entry that goes
        if len(entries) == self.per_grid:
            if self.replace == "random":
                index = choose(len(entries))
            elif self.replace == "fifo":
                index = 0
            else:
                index = self._nearest(entries, unpack(packed))
        entry = self._write(packed)
        if index is None:
            entries.append(entry)
            return
        self._replaced.append(entries[index].file)
        if self.replace == "fifo":  # the list stays in the order of age
            entries.append(entry)
            entries.pop(0)
        else:
            entries[index] = entry

    def _nearest(self, entries: Sequence[Entry], error: Tensor) -> int:
        """The entry at the least distance, the first of equals. One is in memory at a time."""
        distances = [torch.dist(self.read(entry)[0], error).item() for entry in entries]
        return distances.index(min(distances))

    def _write(self, packed: dict[str, Tensor]) -> Entry:
        name = f"{self._serial:09d}.safetensors"
        self._serial += 1
        content = safetensors.torch.save(packed)
        if self.writes:
            try:
                write_new(self.folder / name, content)
            except OSError as failure:
                raise ResourceError(
                    f"{self.folder}: {failure.strerror}; make room there, or lower per_grid"
                ) from failure
            self._unsynced.add(name)
        self._fresh[name] = packed
        return Entry(name, checksum(content))

    def _unlink(self, file: str) -> None:
        self._unsynced.discard(file)
        if self.writes:
            (self.folder / file).unlink(missing_ok=True)

    def _check_limit(self, shape: Shape) -> None:
        shapes = {known for _, known, _ in self._cells}
        if self.limit_gib is None or shape in shapes:
            return
        settings = (self.grids, self.per_grid, self.storage, self.dtype, self.pool)
        needed = sum(bank_bytes(each, *settings) for each in {*shapes, shape})
        if needed > self.limit_gib * 2**30:
            raise ResourceError(
                f"error_recycling.limit_gib {self.limit_gib:g}: a bank for {len(shapes) + 1} latent shapes takes up to "
                f"{readable_bytes(needed)}; raise the limit, or lower per_grid or grids"
            )

    # ---------------------------------------------------------------------------------------------- checkpoints

    def save(self, folder: Path) -> None:
        """Put the bank into a checkpoint: links to its files, and a manifest, all on disk when this returns.

        Called by the processes that write. Linked files stay, whatever the bank replaces later.
        """
        folder.mkdir(parents=True)
        for entry in self._entries():
            if entry.file in self._unsynced:
                sync(self.folder / entry.file)
            link_or_copy(self.folder / entry.file, folder / entry.file)
        self._unsynced.clear()
        manifest = {
            "grids": self.grids,
            "per_grid": self.per_grid,
            "storage": self.storage,
            "dtype": self.dtype,
            "pool": self.pool,
            "serial": self._serial,
            "lists": [
                [kind, list(shape), bucket, [[entry.file, entry.checksum] for entry in entries]]
                for (kind, shape, bucket), entries in self._cells.items()
            ],
        }
        write_new(folder / MANIFEST, json.dumps(manifest).encode())
        sync(folder / MANIFEST)
        sync(folder)

    def restore(self, folder: Path) -> None:
        """Take a checkpoint's errors in place of one's own.

        Raises:
            WeightsError: a file is missing or damaged.
            UsageError: the checkpoint's bank was made by other settings.
        """
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            lists = {(k, tuple(s), b): [Entry(*pair) for pair in entries] for k, s, b, entries in manifest["lists"]}
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise WeightsError(f"{folder / MANIFEST}: cannot be read ({error}); resume from an earlier one") from error
        for name in ("grids", "per_grid", "storage", "dtype", "pool"):
            if manifest[name] != getattr(self, name):
                raise UsageError(
                    f"error_recycling: {name} is {manifest[name]} in the checkpoint, {getattr(self, name)} in this run"
                )
        for file in (*(entry.file for entry in self._entries()), *self._replaced):
            self._unlink(file)
        for entries in lists.values() if self.writes else ():
            for entry in entries:
                source = folder / Path(entry.file).name  # a manifest names no other folder
                if not source.is_file() or checksum(source.read_bytes()) != entry.checksum:
                    raise WeightsError(f"{source}: missing or damaged; resume from an earlier checkpoint")
                link_or_copy(source, self.folder / source.name)
        self._cells, self._serial = lists, manifest["serial"]
        self._replaced, self._fresh = [], {}
        self._unsynced.clear()

    def _entries(self) -> list[Entry]:
        return [entry for entries in self._cells.values() for entry in entries]


@dataclass(frozen=True)
class BankView:
    """The bank as it stood at one moment: what the micro-batches of a step read, whoever computes them."""

    bank: ErrorBank
    cells: dict[Cell, tuple[Entry, ...]]

    def entries(self, kind: str, shape: Shape, buckets: Iterable[int]) -> list[Entry]:
        """Errors of a kind ("noise" or "video") in these buckets, which are gone through in the order given."""
        kind = "pair" if self.bank.storage == "paired" else kind
        return [entry for bucket in buckets for entry in self.cells.get((kind, tuple(shape), bucket), ())]

    def read(self, kind: str, entry: Entry) -> Tensor:
        """One error of that kind, (C, F, h, w) float32."""
        stored, sigma = self.bank.read(entry)
        if self.bank.storage == "paired":
            return RecycledError(0, 0, sigma, stored).of(kind)
        return stored


def pack(error: Tensor, sigma: float, dtype: str, pool: int) -> dict[str, Tensor]:
    """An error (C, F, h, w) as it is stored."""
    values = error.detach().to("cpu", torch.float32)
    grid = torch.tensor([*values.shape[-2:], pool])
    if pool > 1:
        values = F.avg_pool2d(values, pool, ceil_mode=True, count_include_pad=False)
    scale = torch.tensor(1.0)
    if dtype == "int8":
        scale = (values.abs().max() / 127).clamp(min=torch.finfo(torch.float32).tiny)
        values = (values / scale).round()
    values = values.to(DTYPES[dtype]).contiguous()
    return {"error": values, "scale": scale, "sigma": torch.tensor(sigma, dtype=torch.float32), "grid": grid}


def unpack(packed: dict[str, Tensor]) -> Tensor:
    """(C, F, h, w) float32; what was pooled is spread over its cells again."""
    values = packed["error"].float() * packed["scale"]
    height, width, pool = packed["grid"].tolist()
    if pool > 1:
        values = values.repeat_interleave(pool, -2).repeat_interleave(pool, -1)[..., :height, :width]
    return values


def bank_bytes(
    shape: Shape, grids: int, per_grid: int, storage: str = "paired", dtype: str = "bf16", pool: int = 1
) -> int:
    """Bytes of a full bank for latents of one shape (C, F, h, w)."""
    channels, frames, height, width = shape
    values = channels * frames * -(-height // pool) * -(-width // pool)
    return grids * per_grid * len(STORAGES[storage]) * values * DTYPES[dtype].itemsize


def checksum(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def link_or_copy(source: Path, target: Path) -> None:
    """The same file under a second name; a copy on file systems that know no links, or from one to another."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        sync(target)


# ---------------------------------------------------------------------------------------------- several processes


def gather_errors(own: Sequence[RecycledError], device: torch.device) -> list[RecycledError]:
    """All processes' errors of a step, in global order, on every process.

    Every process calls it in every step, with equally many errors of one shape, kept or not: a collective call that
    some processes skip stops all.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return sorted(own, key=lambda error: error.position)
    velocities = torch.stack([error.velocity for error in own]).to(device)  # (n, C, F, h, w)
    facts = torch.tensor([[e.position, e.bucket, e.sigma, e.kept] for e in own], dtype=torch.float32, device=device)
    processes = dist.get_world_size()
    all_velocities = [torch.empty_like(velocities) for _ in range(processes)]
    all_facts = [torch.empty_like(facts) for _ in range(processes)]
    dist.all_gather(all_velocities, velocities)
    dist.all_gather(all_facts, facts)
    errors = [
        RecycledError(int(position), int(bucket), sigma, velocity.cpu(), bool(kept))
        for rows, values in zip(all_facts, all_velocities, strict=True)
        for (position, bucket, sigma, kept), velocity in zip(rows.tolist(), values, strict=True)
    ]
    return sorted(errors, key=lambda error: error.position)


def errors_to_insert(
    own: Sequence[RecycledError], scope: str, step: int, warmup: int, device: torch.device
) -> list[RecycledError]:
    """What this process's bank gets in a step.

    scope: "global", one bank of all processes, does not depend on their number. "per_rank" is upstream's way, kept for
        comparisons: after `warmup` steps in which all get everything, each process keeps to its own errors. (Upstream
        also let a process's own clean sample decide over everybody's errors; here each error has its own say.)
    """
    everyone = gather_errors(own, device)
    if scope == "global" or step < warmup:
        return everyone
    return sorted(own, key=lambda error: error.position)
