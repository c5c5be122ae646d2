"""Draws of training are pure functions: who asks, when, and what else is asked, changes no answer."""

import hashlib

import numpy
import pytest
import torch

from training.draws import Draws

SHAPE = (3, 4)
ALL = Draws(seed=7, step=12, positions=range(8), global_batch=8)


def answers(draws: Draws) -> dict[str, torch.Tensor]:
    return {
        "uniform": draws.uniform("drop_text"),
        "stratified": draws.stratified("timestep"),
        "integers": draws.integers("slot", 1000),
        "normal": draws.normal("noise", SHAPE),
        "lognormal": draws.lognormal("reference_noise", -3, 0.5),
    }


def test_the_number_is_the_hash_of_its_question():
    """Written out once more, so that a change of the rule, which would end all resuming, is seen."""
    key = int.from_bytes(hashlib.blake2b(b"7/12/3/drop_text", digest_size=16).digest(), "little")
    own = numpy.random.Generator(numpy.random.Philox(key=key))
    assert ALL.uniform("drop_text")[3].item() == own.random()


@pytest.mark.parametrize(
    "shares", [[[0, 1, 2, 3], [4, 5, 6, 7]], [[i] for i in range(8)], [[5, 0], [1, 7, 6], [2, 4, 3]]]
)
def test_any_split_over_processes_and_micro_batches_draws_the_same(shares):
    whole = answers(ALL)
    for share in shares:
        for name, part in answers(Draws(7, 12, share, 8)).items():
            assert torch.equal(part, whole[name][share]), name


def test_seed_step_position_and_purpose_each_make_another_number():
    base = Draws(7, 12, [3], 8).normal("noise", (50,))
    others = [
        Draws(8, 12, [3], 8).normal("noise", (50,)),
        Draws(7, 13, [3], 8).normal("noise", (50,)),
        Draws(7, 12, [4], 8).normal("noise", (50,)),
        Draws(7, 12, [3], 8).normal("posterior", (50,)),
        Draws(71, 2, [3], 8).normal("noise", (50,)),  # the same digits, cut elsewhere
    ]
    assert all(not torch.equal(base, other) for other in others)


def test_asking_again_or_for_more_changes_nothing():
    first = ALL.uniform("clean")
    ALL.normal("noise", SHAPE), ALL.uniform("pick")
    assert torch.equal(first, ALL.uniform("clean"))


def test_distributions():
    many = Draws(0, 0, range(4000), 4000)
    uniform, normal = many.uniform("u"), many.normal("n", (20,))
    assert uniform.min() >= 0 and uniform.max() < 1
    counts = torch.histc(uniform.float(), 10, 0, 1)
    assert (counts - 400).abs().max() < 5 * 19  # binomial: a standard deviation of 19
    assert abs(normal.mean()) < 5 / 80000**0.5 and abs(normal.std() - 1) < 5 / 160000**0.5
    assert many.integers("i", 3).unique().tolist() == [0, 1, 2]
    log = many.lognormal("r", -3, 0.5).log()
    assert abs(log.mean() + 3) < 5 * 0.5 / 4000**0.5 and abs(log.std() - 0.5) < 0.03


def test_integers_below_a_limit_of_each_sample():
    limits = [1, 2, 5, 9, 100, 3, 1, 7]
    values = ALL.integers("slot", limits)
    assert all(0 <= value < limit for value, limit in zip(values.tolist(), limits, strict=True))
    assert values[4] == Draws(7, 12, [4], 8).integers("slot", 100)


def test_stratified_draws_have_one_sample_in_every_slice():
    values = ALL.stratified("timestep")
    assert sorted((values * 8).long().tolist()) == list(range(8))
    assert (values * 8).long().tolist() != list(range(8))  # dealt, not in order
    other = Draws(7, 13, range(8), 8).stratified("timestep")
    assert (other * 8).long().tolist() != (values * 8).long().tolist()
