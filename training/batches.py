"""The batches of a run, from what is encoded: a function of the step, made ahead by threads.

    with Batches(config, found, cache, device, rank, ranks) as batches:
        for batch in batches(step):                        # this process's share, one forward pass each

What is drawn here (which view of a video, whose face) is a function of step and position like every draw, so that
neither threads, nor how far they work ahead, nor the number of processes changes anything.
"""

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from errors import InputError
from preprocess.audio import num_features, training_clip_samples
from training.cache import Cache
from training.clips import View, find_faces, read_frames, read_masks, read_poses, views
from training.config import Config
from training.data import HANDED_OVER, Sample, TrainingSet
from training.draws import Draws
from training.encodings import pixels
from training.identity import LEAST_ALIKE
from training.recipes.base import Batch, first_frame_known
from training.sampler import MicroBatch, micro_batches

logger = logging.getLogger("selfsame")

MOST_BAD = 0.01  # share of samples that may turn out to be damaged during a run
ATTEMPTS = 10  # samples in place of one that is damaged

Parts = dict[str, Tensor]


@dataclass(frozen=True)
class Item:
    """One sample of a batch."""

    mean: Tensor  # (C, F, h, w)
    std: Tensor | None
    text: Tensor  # (n, D)
    parts: Parts


class BatchMaker:
    """Puts batches together from encoded samples.

    Args:
        config: of the run.
        samples: that faces of other clips may be taken from; never held-out ones.
        cache: holds all that `encodings_of` the configuration names, and for a text that may be left out the empty one
            (`empty_view`).
    """

    def __init__(self, config: Config, samples: Sequence[Sample], cache: Cache | None):
        self.config, self.cache = config, cache
        self.by_name = {(sample.source, sample.name): sample for sample in samples}
        self.kinds = {encoding.kind for encoding in cache.encodings} if cache else set()
        self.empty = None
        if config.data.text_drop and "text" in self.kinds:
            self.empty = cache.read("text", empty_view(samples[0]))["states"].float()

    def batch(self, samples: Sequence[Sample], draw: Draws) -> Batch:
        """A batch of these samples, on the CPU."""
        chosen = draw.integers("view", self.config.data.cache_variants).tolist()
        items = [self._item(s, chosen[row], draw_of(draw, row)) for row, s in enumerate(samples)]
        return collate(items, draw.positions, self.empty)

    def _item(self, sample: Sample, variant: int, draw: Draws) -> Item:
        data = self.config.data
        view = views(sample, data.cache_variants, data.fit)[variant]
        if self.config.vae is not None:
            frames = pixels(read_frames(view))[0]
            return Item(torch.zeros(0), None, torch.zeros(0), {"frames": frames})
        latents = self.cache.read("latents", view)
        std = latents["std"].float() if self.config.avatar is not None else None  # others train on the mean
        text = self.cache.read("text", view)["states"].float()
        mean, parts = latents["mean"].float(), self._parts(view, draw)
        if "next_clip" in self.kinds:
            mean = self._next_or_first(view, draw, mean, parts)
        if (control := parts.get("vace_context")) is not None:  # reference pictures are frames that are made, too
            mean = torch.cat((control[: len(mean), : control.shape[1] - mean.shape[1]], mean), dim=1)
        return Item(mean, std, text, parts)

    def _parts(self, view: View, draw: Draws) -> Parts:
        """What the recipe reads beside latents and text, by the names it gives them."""
        config, parts = self.config, {}
        if "first_frame" in self.kinds:
            latents = self._read("first_frame", view, "latents")
            if config.avatar is not None:
                parts["masked"] = latents
            else:
                parts["condition"] = first_frame_known(latents[None])[0]
        for kind in ("condition", "condition_motion"):
            if kind in self.kinds:
                parts[kind] = self._read(kind, view, "y")
        if "image_features" in self.kinds:
            parts["clip"] = self._read("image_features", view, "features")
        if "sound" in self.kinds:
            rate = config.data.fps or view.sample.facts.fps
            parts["audio"] = with_rows(self._read("sound", view, "features"), rows_of_sound(view.bucket.frames, rate))
        if "sound_layers" in self.kinds:
            parts["audio"] = self._read("sound_layers", view, "features")
        if "control" in self.kinds:
            parts["vace_context"] = self._read("control", view, "context")
        if "faces" in self.kinds:
            parts["reference"] = self._reference(view, draw)
        face_counts = config.avatar is not None or (config.stand_in is not None and config.stand_in.face_loss)
        for kind in ("face", "lip") if config.avatar is not None else ("face",) if face_counts else ():
            parts[f"{kind}_mask"] = torch.from_numpy(read_masks(view, kind))[None]  # (1, T, H, W)
        if config.error_recycling is not None and config.error_recycling.variant == "dance":
            parts["pose"] = torch.from_numpy(read_poses(view)).float()
        return parts

    def _next_or_first(self, view: View, draw: Draws, mean: Tensor, parts: Parts) -> Tensor:
        """The latents of SVI 2.0 Pro's sample, a clip that goes on from another or a first one; and in `parts` its
        condition, and which latent frames are to be made, 1, and which it is given, 0.
        """
        made = torch.ones(1, mean.shape[1], 1, 1)
        made[:, :1] = 0
        if draw.uniform("motion").item() < self.config.error_recycling.p.motion:
            found = self.cache.read("next_clip", view)
            mean, parts["condition"] = found["mean"].float(), found["y"].float()
            made[:, : HANDED_OVER // 4 + 1] = 0
        parts["made"] = made
        return mean

    def _read(self, kind: str, view: View, name: str) -> Tensor:
        return self.cache.read(kind, view)[name].float()

    def _reference(self, view: View, draw: Draws) -> Tensor:
        """(C, 1, h, w): the latent of a face of the person, of another clip where one is alike enough and there is
        one, else of the frame that is furthest from the window.
        """
        settings = self.config.stand_in
        if settings.reference == "other_clip":
            low, high = settings.similarity
            near = [name for name, value in view.sample.listed.alike if low <= value <= high]
            others = [self.by_name[key] for name in near if (key := (view.sample.source, name)) in self.by_name]
            if others:
                other = others[draw.integers("reference_clip", len(others)).item()]
                faces = self._read("faces", View(other, 0), "latents")
                return faces[draw.integers("reference_face", len(faces)).item()]
        return self._read("faces", view, "latents")[furthest_face(view)]


def draw_of(draw: Draws, row: int) -> Draws:
    """The draws of one sample of a batch."""
    return replace(draw, positions=[draw.positions[row]])


def furthest_face(view: View) -> int:
    """Which of a sample's faces is of the frame furthest from the window's middle, and of the same person."""
    numbers = [int(file.stem.removeprefix("frame_")) for file in find_faces(view.sample.listed.faces)]
    middle = view.start + (view.bucket.frames - 1) / 2
    nearest = min(numbers, key=lambda number: abs(number - middle))
    strangers = {
        (set(pair) - {nearest}).pop()
        for *pair, value in view.sample.listed.within
        if nearest in pair and value < LEAST_ALIKE
    }
    same = [number for number in numbers if number not in strangers]
    return numbers.index(max(same, key=lambda number: abs(number - middle)))


def rows_of_sound(frames: int, fps: float) -> int:
    """How many features the sound of so many frames has."""
    first, end = training_clip_samples(0, frames, fps)
    return num_features(end - first)


def with_rows(features: Tensor, count: int) -> Tensor:
    """(L, D) -> (count, D): a window's sound may be a sample shorter than another's (`training_clip_samples`), and so
    have a feature less; the last one is then heard for longer.
    """
    missing = count - len(features)
    return features[:count] if missing <= 0 else torch.cat((features, features[-1:].expand(missing, -1)))


def collate(items: Sequence[Item], positions: Sequence[int], empty: Tensor | None) -> Batch:
    """Samples of one size as a batch."""
    names = items[0].parts
    return Batch(
        list(positions),
        torch.stack([item.mean for item in items]),
        [item.text for item in items],
        None if items[0].std is None else torch.stack([item.std for item in items]),
        empty,
        {name: torch.stack([item.parts[name] for item in items]) for name in names},
    )


def empty_view(sample: Sample) -> View:
    """A view whose text is empty: what is encoded of it stands in for texts that are left out."""
    return View(replace(sample, listed=replace(sample.listed, caption="")), 0)


def build_cache(cache: Cache, config: Config, found: TrainingSet, rank: int = 0, ranks: int = 1) -> int:
    """Encode all that the run and its held-out loss will read; the caller waits for the other processes afterwards.

    Raises:
        As `Cache.build`.
    """
    data = config.data
    samples = (*found.samples, *found.held_out)
    wanted = [view for sample in samples for view in views(sample, data.cache_variants, data.fit)]
    made = cache.build(wanted, rank, ranks)
    if data.text_drop:
        texts = Cache(cache.folder, [e for e in cache.encodings if e.kind == "text"], cache.encoders)
        made += texts.build([empty_view(samples[0])], rank, ranks)
    return made


def moved(batch: Batch, device: torch.device) -> Batch:
    """A batch on a device."""

    def move(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.to(device, non_blocking=True)

    return replace(
        batch,
        mean=move(batch.mean),
        std=move(batch.std),
        text=[move(rows) for rows in batch.text],
        empty_text=move(batch.empty_text),
        parts={name: move(value) for name, value in batch.parts.items()},
    )


class Batches:
    """This process's batches of every step. Use it in a `with` block, which ends its threads.

    Args:
        config, found, cache: as for `BatchMaker`. Of `data`, `workers` threads are `prefetch` steps ahead.
    """

    def __init__(
        self,
        config: Config,
        found: TrainingSet,
        cache: Cache | None,
        device: torch.device | str = "cpu",
        rank: int = 0,
        ranks: int = 1,
    ):
        workers = config.data.workers
        self.config, self.samples, self.device = config, found.samples, torch.device(device)
        self.rank, self.ranks, self.prefetch = rank, ranks, config.data.prefetch
        self.order = found.order(config.train.global_batch, config.seed)
        self.maker = BatchMaker(config, found.samples, cache)
        self.pool = ThreadPoolExecutor(workers, "batches") if workers else None
        self.ahead: dict[int, list[Future[Batch]]] = {}
        self.bad: set[int] = set()

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *_: object) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)

    def __call__(self, step: int) -> Iterator[Batch]:
        """The micro-batches of a step, in their order.

        Raises:
            InputError: too many samples are damaged.
        """
        for old in [other for other in self.ahead if not step <= other <= step + self.prefetch]:
            for future in self.ahead.pop(old):
                future.cancel()
        last = min(step + self.prefetch, self.config.train.steps - 1)
        for coming in range(step, max(last, step) + 1) if self.pool is not None else ():
            if coming not in self.ahead:
                self.ahead[coming] = [self.pool.submit(make) for make in self._jobs(coming)]
        if self.pool is None:
            made = (make() for make in self._jobs(step))
        else:
            made = (future.result() for future in self.ahead.pop(step))
        for batch in made:
            yield moved(batch, self.device)

    def _jobs(self, step: int) -> list[Callable[[], Batch]]:
        """What makes each micro-batch."""
        train = self.config.train
        shares = micro_batches(self.order.batch(step), train.micro_batch, self.rank, self.ranks)
        return [lambda micro=micro: self._make(step, micro) for micro in shares]

    def _make(self, step: int, micro: MicroBatch) -> Batch:
        """A batch; a sample that cannot be read is replaced by another of its bucket."""
        ids = list(micro.ids)
        for attempt in range(ATTEMPTS):
            draw = Draws(self.config.seed, step, list(micro.positions), self.config.train.global_batch)
            try:
                return self.maker.batch([self.samples[i] for i in ids], draw)
            except InputError as error:
                row = self._find_bad(ids, draw, error)
                self._note(step, micro.positions[row], ids[row], error)
                ids[row] = self.order.replacement(step, micro.positions[row], attempt)
        raise InputError(f"step {step}: {ATTEMPTS} samples in a row cannot be read; see {self._log}")

    def _find_bad(self, ids: Sequence[int], draw: Draws, error: InputError) -> int:
        """Which sample of a batch it is that cannot be read."""
        for row, number in enumerate(ids):
            try:
                self.maker.batch([self.samples[number]], draw_of(draw, row))
            except InputError:
                return row
        raise error  # it could be read this time: a disk that comes and goes

    @property
    def _log(self) -> Path:
        return Path(self.config.output) / "bad_samples.jsonl"

    def _note(self, step: int, position: int, number: int, error: InputError) -> None:
        """Write down a bad sample.

        Raises:
            InputError: there are too many.
        """
        self.bad.add(number)
        entry: Mapping[str, object] = {
            "step": step,
            "position": position,
            "sample": os.fspath(self.samples[number].listed.video),
            "reason": str(error),
        }
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with open(self._log, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        logger.warning("step %d: %s; another sample takes its place", step, error)
        if len(self.bad) > max(1, MOST_BAD * len(self.samples)):
            raise InputError(f"{len(self.bad)} of {len(self.samples)} samples cannot be read, see {self._log}; {error}")
