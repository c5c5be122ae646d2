"""The order of samples: every one once an epoch, nothing dropped, the same for every process and after every resume."""

import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from training.sampler import Batch, Bucket, Order, micro_batches

PROJECT = Path(__file__).parent.parent
WIDE, TALL, SQUARE = Bucket(480, 832, 81), Bucket(832, 480, 81), Bucket(512, 512, 49)
SETS = {WIDE: list(range(100)), TALL: list(range(100, 137)), SQUARE: list(range(137, 142))}


def order(sets=SETS, global_batch=8, seed=0) -> Order:
    return Order(sets, global_batch, seed)


def ids_by_bucket(batches: list[Batch]) -> dict[Bucket, list[int]]:
    rows = {}
    for batch in batches:
        rows.setdefault(batch.bucket, []).extend(batch.ids)
    return rows


@pytest.mark.parametrize("global_batch", [1, 4, 7, 8, 48, 150])
def test_every_sample_comes_once_in_each_epoch_of_its_bucket(global_batch):
    """Nothing is dropped and nothing comes twice: each epoch's ids are a row of their own in what a bucket yields."""
    steps = 3000 // global_batch + 50
    rows = ids_by_bucket([order(global_batch=global_batch).batch(step) for step in range(steps)])
    assert set(rows) == set(SETS)
    for bucket, ids in SETS.items():
        yielded = rows[bucket]
        epochs = len(yielded) // len(ids)
        assert epochs >= 2
        for epoch in range(epochs):
            assert sorted(yielded[epoch * len(ids) : (epoch + 1) * len(ids)]) == ids


def test_epochs_begin_where_they_are_said_to():
    """Up to the end of an epoch all its samples have come, and no bucket is more than a batch ahead."""
    batches = order()
    for epoch in range(1, 12):
        first = batches.first_step(epoch)
        assert batches.epoch_of(first) == epoch and batches.epoch_of(first - 1) == epoch - 1
        counts = Counter(i for step in range(first) for i in batches.batch(step).ids)
        assert all(counts[i] >= epoch for ids in SETS.values() for i in ids)
        for ids in SETS.values():
            surplus = sum(counts[i] for i in ids) - epoch * len(ids)
            assert 0 <= surplus < 8


def test_epoch_of_is_the_inverse_of_first_step_for_odd_sets():
    for sets in ({WIDE: [0]}, {WIDE: [0], TALL: [1], SQUARE: [2]}, {WIDE: range(3), TALL: range(3, 1000)}):
        for global_batch in (1, 5, 64):
            batches = order(sets, global_batch)
            firsts = [batches.first_step(epoch) for epoch in range(300)]
            for step in range(min(firsts[-1], 400)):
                epoch = max(i for i, first in enumerate(firsts) if first <= step)
                assert batches.epoch_of(step) == epoch, (sets, global_batch, step)


def test_a_batch_has_one_bucket_and_one_size():
    for step in range(200):
        batch = order().batch(step)
        assert len(batch.ids) == 8 and set(batch.ids) <= set(SETS[batch.bucket])


def test_it_is_a_pure_function_of_seed_and_step():
    """Asked in any order, by fresh objects, over and over: resumed = unbroken."""
    whole = [order().batch(step) for step in range(60)]
    backwards = order()
    assert [backwards.batch(step) for step in reversed(range(60))] == whole[::-1]
    assert [order().batch(step) for step in (0, 59, 30)] == [whole[0], whole[59], whole[30]]
    assert [order(seed=1).batch(step) for step in range(60)] != whole


def test_epochs_differ_and_buckets_mix():
    batches = order({WIDE: range(100), TALL: range(100, 200)}, 10)
    first, second = ([batches.batch(step).ids for step in range(e * 20, e * 20 + 20)] for e in (0, 1))
    assert first != second and sorted(sum(first, ())) == sorted(sum(second, ())) == list(range(200))
    turns = [batches.batch(step).bucket for step in range(20)]
    assert turns != sorted(turns) and turns != sorted(turns, reverse=True)
    assert [order({WIDE: range(1000)}, 1).batch(step).ids[0] for step in range(1000)] != list(range(1000))


def test_positions_are_uniform():
    """Over many seeds each sample is as likely at each place of the first epoch: a chi-squared test."""
    counts = [[0] * 5 for _ in range(5)]
    for seed in range(2000):
        for step in range(5):
            counts[step][order({WIDE: range(5)}, 1, seed).batch(step).ids[0]] += 1
    statistic = sum((count - 400) ** 2 / 400 for row in counts for count in row)
    assert statistic < 40  # 16 degrees of freedom: 1 in 1000 is above 39


def test_a_repeated_source_comes_as_often():
    batches = order({WIDE: [0, 1, 2, 2, 2]}, 5)
    assert Counter(batches.batch(0).ids) == {0: 1, 1: 1, 2: 3}


def test_another_bucket_does_not_reorder_the_rest():
    alone, beside = order({WIDE: SETS[WIDE]}), order()
    steps = [step for step in range(100) if beside.batch(step).bucket == WIDE]
    assert [beside.batch(step).ids for step in steps] == [alone.batch(n).ids for n in range(len(steps))]


@pytest.mark.parametrize(("ranks", "micro_batch"), [(1, 1), (1, 8), (2, 1), (2, 4), (4, 2), (8, 1)])
def test_processes_share_a_batch_without_overlap(ranks, micro_batch):
    for step in range(30):
        batch = order().batch(step)
        shares = [micro_batches(batch, micro_batch, rank, ranks) for rank in range(ranks)]
        assert {len(share) for share in shares} == {8 // ranks // micro_batch}
        micros = [micro for share in shares for micro in share]
        assert {micro.bucket for micro in micros} == {batch.bucket}
        positions = [p for micro in micros for p in micro.positions]
        assert sorted(positions) == list(range(8))
        assert all(batch.ids[p] == i for micro in micros for p, i in zip(micro.positions, micro.ids, strict=True))


def test_at_every_moment_processes_are_at_neighboring_positions():
    """The first forward passes of all processes together are the first positions, so that sums add up alike."""
    first = [micro_batches(order().batch(0), 2, rank, 2)[0].positions for rank in range(2)]
    assert first == [(0, 1), (2, 3)]
    with pytest.raises(ValueError, match="a batch of 8 cannot be shared by 3 processes with 1 each"):
        micro_batches(order().batch(0), 1, 0, 3)


def test_a_replacement_is_of_the_same_bucket_and_always_the_same():
    found = [order().replacement(step, 3, attempt) for step in range(20) for attempt in range(5)]
    again = [order().replacement(step, 3, attempt) for step in range(20) for attempt in range(5)]
    assert found == again and len(set(found)) > 10
    assert all(order().replacement(s, 0, 0) in SETS[order().batch(s).bucket] for s in range(50))


def test_the_order_is_the_one_that_saved_runs_have():
    """These are promised: a run that is resumed by a later version meets the same samples."""
    assert [order({WIDE: range(10)}, 2, 7).batch(step).ids for step in range(5)] == [
        (2, 5), (1, 3), (7, 0), (4, 9), (6, 8)
    ]  # fmt: skip


def test_a_hundred_thousand_samples_take_less_than_a_second():
    sets = {Bucket(16 * i, 16, 81): range(i * 10_000, (i + 1) * 10_000) for i in range(1, 11)}
    start = time.process_time()
    batches = order(sets, 48)
    batches.batch(0)
    batches.batch(10**6)
    assert time.process_time() - start < 1
    start = time.process_time()
    for step in range(500):
        batches.batch(step)
    assert time.process_time() - start < 1  # 2 ms a step; what comes once an epoch among it


def test_no_samples_are_refused_and_no_torch_is_loaded():
    with pytest.raises(ValueError, match="no samples"):
        order({WIDE: []})
    code = "import sys, training.sampler; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True)
    assert result.stdout.strip() == "False", result.stderr
