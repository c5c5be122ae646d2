"""Which samples make the batch of a step: a pure function of the seed and the step, so that nothing has to be saved.

    order = Order({Bucket(480, 832, 81): [0, 2, 3], Bucket(832, 480, 81): [1, 4]}, global_batch=2, seed=0)
    batch = order.batch(7)                                 # Batch(bucket, ids of all processes together)
    for micro in micro_batches(batch, micro_batch=1, rank=0, ranks=2):    # this process's share of it
        micro.positions, micro.ids                         # places in the global batch: what every draw is keyed by

A bucket's samples are one endless row: all of them in a random order, then all again in another one. Batches cut the
row into equal pieces, so nothing is dropped: the batch that takes the last of an epoch is completed from the same
bucket's next epoch, and a bucket of fewer samples than a batch meets some of them twice in it. Step by step the buckets
take turns at random, each as often as it has batches; all processes have the same one. Neither the number of processes,
nor of workers, nor where a run was resumed changes any of it.
"""

import bisect
import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy


class Bucket(NamedTuple):
    """The size that the clips of a batch have in common, in pixels and frames."""

    height: int
    width: int
    frames: int

    def __str__(self) -> str:
        return f"{self.height}x{self.width}x{self.frames}"


@dataclass(frozen=True)
class Batch:
    """The samples of one step."""

    bucket: Bucket
    ids: tuple[int, ...]  # of all processes, by position in the global batch


@dataclass(frozen=True)
class MicroBatch:
    """What one process puts through the network at a time."""

    bucket: Bucket
    positions: tuple[int, ...]  # in the global batch
    ids: tuple[int, ...]


class Order:
    """The order of all batches.

    Args:
        ids_of: the samples of each bucket. One that is to come several times an epoch is there as often.
        global_batch: samples of a step.
        seed: of the order.

    Raises:
        ValueError: no samples at all.
    """

    def __init__(self, ids_of: Mapping[Bucket, Sequence[int]], global_batch: int, seed: int):
        self.rows = {bucket: numpy.asarray(ids) for bucket, ids in sorted(ids_of.items()) if len(ids)}
        if not self.rows:
            raise ValueError("there are no samples")
        self.global_batch, self.seed = global_batch, seed
        self.buckets = tuple(self.rows)
        # A run goes through epochs one after another: what is kept is enough for the present and the next.
        self._shuffled = functools.lru_cache(maxsize=2 * len(self.buckets) + 2)(self._shuffle)
        self._turns = functools.lru_cache(maxsize=2)(self._take_turns)

    def batch(self, step: int) -> Batch:
        """The batch of a step, which counts from 0."""
        epoch = self.epoch_of(step)
        bucket, number = self._turns(epoch)[step - self.first_step(epoch)]
        start = number * self.global_batch
        return Batch(bucket, tuple(self._row(bucket, start, start + self.global_batch)))

    def first_step(self, epoch: int) -> int:
        """The step that an epoch begins with. In it, every bucket makes the batches that begin in its own epoch."""
        return sum(self._first_batch(bucket, epoch) for bucket in self.buckets)

    def epoch_of(self, step: int) -> int:
        """Which epoch a step belongs to."""
        samples = sum(map(len, self.rows.values()))
        # Every bucket makes its share of batches, up to one more: a window to search in.
        near = step * self.global_batch // samples
        low = max(near - 1 - len(self.buckets) * self.global_batch // samples, 0)
        epochs = range(low, near + 2)
        return low + bisect.bisect_right(epochs, step, key=self.first_step) - 1

    def replacement(self, step: int, position: int, attempt: int) -> int:
        """The sample of the same bucket that stands in for one that turns out to be damaged: every process knows it
        without a word from the one that found out.
        """
        row = self.rows[self.batch(step).bucket]
        return int(row[int(_numbers(f"replacement/{self.seed}/{step}/{position}/{attempt}", 1)[0] % len(row))])

    def _first_batch(self, bucket: Bucket, epoch: int) -> int:
        """How many batches of a bucket begin before an epoch."""
        return -(-epoch * len(self.rows[bucket]) // self.global_batch)

    def _take_turns(self, epoch: int) -> list[tuple[Bucket, int]]:
        """(bucket, number of its batch) for the steps of an epoch: buckets at random, the batches of each in order."""
        spans = {
            bucket: range(self._first_batch(bucket, epoch), self._first_batch(bucket, epoch + 1))
            for bucket in self.buckets
        }
        turns = [bucket for bucket, span in spans.items() for _ in span]
        numbers = {bucket: iter(span) for bucket, span in spans.items()}
        order = _permutation(f"turns/{self.seed}/{epoch}", len(turns))
        return [(turns[i], next(numbers[turns[i]])) for i in order]

    def _row(self, bucket: Bucket, start: int, end: int) -> Iterator[int]:
        """Places start .. end - 1 of a bucket's endless row."""
        length = len(self.rows[bucket])
        for epoch in range(start // length, (end - 1) // length + 1):
            first = epoch * length
            ids = self._shuffled(bucket, epoch)[max(start - first, 0) : end - first]
            yield from ids.tolist()

    def _shuffle(self, bucket: Bucket, epoch: int) -> numpy.ndarray:
        row = self.rows[bucket]
        return row[_permutation(f"{bucket}/{self.seed}/{epoch}", len(row))]


def micro_batches(batch: Batch, micro_batch: int, rank: int, ranks: int) -> list[MicroBatch]:
    """A process's share of a batch, for one forward pass after the other.

    Raises:
        ValueError: the batch cannot be shared out evenly.
    """
    count, rest = divmod(len(batch.ids), micro_batch * ranks)
    if rest:
        raise ValueError(f"a batch of {len(batch.ids)} cannot be shared by {ranks} processes with {micro_batch} each")
    shares = []
    for number in range(count):
        start = (number * ranks + rank) * micro_batch
        positions = tuple(range(start, start + micro_batch))
        shares.append(MicroBatch(batch.bucket, positions, tuple(batch.ids[i] for i in positions)))
    return shares


def _permutation(purpose: str, length: int) -> numpy.ndarray:
    """A random order of 0 .. length - 1."""
    return numpy.argsort(_numbers(purpose, length), kind="stable")


def _numbers(purpose: str, count: int) -> numpy.ndarray:
    """Random 64-bit numbers for a purpose. numpy promises these, and not its permutations, to stay as they are."""
    key = hashlib.sha256(purpose.encode()).digest()[:16]
    return numpy.random.Philox(key=numpy.frombuffer(key, "<u8")).random_raw(count)
