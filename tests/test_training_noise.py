"""The noise of training: its table in closed form, the ranges of two experts, the distributions of the choice."""

import pytest
import torch

from training.draws import Draws
from training.noise import NoiseTable, add_noise, expert_range

MANY = Draws(0, 0, range(2000), 2000)


@pytest.mark.parametrize(("shift", "size"), [(5.0, 1000), (3.0, 1000), (1.0, 50)])
def test_table_in_closed_form(shift, size):
    table = NoiseTable(shift=shift, size=size)
    u = 1 - torch.arange(size, dtype=torch.float64) / size
    expected = shift * u / (1 + (shift - 1) * u)
    torch.testing.assert_close(table.sigmas.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(table.timesteps.double(), 1000 * expected, rtol=1e-6, atol=1e-3)
    bell = torch.exp(-2 * (expected - 0.5) ** 2)
    bell = (bell - bell.min()) * size / (bell - bell.min()).sum()
    torch.testing.assert_close(table.weights.double(), bell, rtol=1e-4, atol=1e-4)


def test_no_weighting_is_one():
    assert (NoiseTable(weighting="none").weights == 1).all()


@pytest.mark.parametrize(("boundary", "high"), [(0.875, 417), (0.9, 358)])
def test_experts_share_the_table(boundary, high):
    whole = NoiseTable()
    parts = {
        name: NoiseTable(**dict(zip(("first", "last"), expert_range(name, boundary, whole), strict=True)))
        for name in ("high", "low")
    }
    assert parts["high"].bounds == (0, high) and parts["low"].bounds == (high, 1000)
    assert (whole.timesteps[:high] >= boundary * 1000).all() and (whole.timesteps[high:] < boundary * 1000).all()
    for part in parts.values():
        indices = part.sample(MANY)
        assert part.bounds[0] <= indices.min() and indices.max() < part.bounds[1]


def test_uniform_covers_every_tenth_alike():
    counts = torch.bincount(NoiseTable().sample(MANY) // 100, minlength=10)
    assert (counts - 200).abs().max() < 5 * 13.4


def test_stratified_has_one_sample_a_slice():
    table = NoiseTable(sampling="stratified")
    assert sorted((table.sample(Draws(3, 4, range(10), 10)) // 100).tolist()) == list(range(10))


def test_logit_normal_prefers_the_middle():
    indices = NoiseTable(sampling="logit_normal").sample(MANY).double() / 1000
    # P(sigmoid(N(0, 1)) in [0.25, 0.75]) = P(|N| < ln 3) = 0.7281
    share = ((indices >= 0.25) & (indices < 0.75)).double().mean()
    assert abs(share - 0.7281) < 5 * (0.7281 * 0.2719 / 2000) ** 0.5
    shifted = NoiseTable(sampling="logit_normal", logit_mean=-2.0).sample(MANY).double().mean() / 1000
    assert shifted < indices.mean() - 0.2


def test_quantiles_are_the_middles_of_equal_parts():
    assert NoiseTable().quantiles(4).tolist() == [125, 375, 625, 875]
    assert NoiseTable(first=0.5).quantiles(2).tolist() == [625, 875]


def test_every_sample_has_its_own_noise_level():
    clean, noise = torch.randn(2, 2, 3, 1, 4, 4).unbind(0)
    mixed = add_noise(clean, noise, torch.tensor([0.0, 0.25]))
    assert torch.equal(mixed[0], clean[0])
    torch.testing.assert_close(mixed[1], 0.75 * clean[1] + 0.25 * noise[1])


@pytest.mark.parametrize("wrong", [{"sampling": "beta"}, {"weighting": "cosine"}, {"first": 0.5, "last": 0.5}])
def test_refusals_name_the_value(wrong):
    with pytest.raises(ValueError, match="is not one of|holds no timestep"):
        NoiseTable(**wrong)
