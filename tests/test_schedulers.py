"""Schedules and solvers beyond the goldens: closed forms, resuming, the known upstream crash."""

import pytest
import torch

from models.wan.schedulers import SOLVERS, add_noise, expert_index, get_schedule, make_solver, shift_sigmas

CLEAN = torch.tensor([1.5, -2.0, 0.25])
NOISE = torch.tensor([0.3, 0.7, -1.1])


def solve(schedule, velocity, sample):
    solver = make_solver(schedule)
    for i in range(schedule.num_steps):
        sample = solver.step(velocity(sample, schedule.sigmas[i]), i, sample)
    return sample


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(("steps", "shift"), [(1, 1.0), (4, 5.0), (20, 3.0), (80, 16.0), (100, 12.0)])
def test_straight_path_is_followed_exactly(solver, steps, shift):
    """Where all data is one point, v = noise - clean on the whole path, and every solver must end at the point.

    80 steps with shift 16 and 100 with shift 12 are those at which upstream's UniPC dies: two timesteps coincide.
    """
    schedule = get_schedule(solver, steps, shift)
    start = add_noise(CLEAN, NOISE, schedule.sigmas[0].item())
    end = solve(schedule, lambda x, sigma: NOISE - CLEAN, start)
    torch.testing.assert_close(end, CLEAN, rtol=1e-4, atol=1e-4)


def gaussian_velocity(x, sigma):
    """The exact velocity for data ~ N(0, 4) per value: E[noise - clean | x]."""
    variance = (1 - sigma) ** 2 * 4 + sigma**2
    return x * (sigma - (1 - sigma) * 4) / variance


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("unipc", 2), ("dpm++", 2)])
def test_order_of_convergence(solver, order):
    """The flow of a Gaussian has a closed form, x_end = 2·x_start / std(σ_start): halving the step divides the error
    by 2^order."""

    def error(steps):
        schedule = get_schedule(solver, steps, 1.0)
        schedule = get_schedule(solver, steps, 1.0, start_index=steps // 4)  # leave pure noise, where λ is infinite
        sigma = schedule.sigmas[0].item()
        start = torch.tensor([1.0], dtype=torch.float64)
        exact = start * 2 / ((1 - sigma) ** 2 * 4 + sigma**2) ** 0.5
        return (solve(schedule, gaussian_velocity, start) - exact).abs().item()

    ratio = error(40) / error(80)
    assert 0.75 * 2**order < ratio < 2.6 * 2**order


@pytest.mark.parametrize("solver", SOLVERS)
def test_resumed_equals_unbroken(solver):
    schedule = get_schedule(solver, 7, 5.0)
    whole = solve(schedule, gaussian_velocity, NOISE)
    first = make_solver(schedule)
    sample = NOISE
    for i in range(3):
        sample = first.step(gaussian_velocity(sample, schedule.sigmas[i]), i, sample)
    second = make_solver(schedule)
    second.load_state_dict(first.state_dict())
    for i in range(3, 7):
        sample = second.step(gaussian_velocity(sample, schedule.sigmas[i]), i, sample)
    assert torch.equal(sample, whole)


def test_start_index_is_the_tail_of_the_table():
    whole, tail = get_schedule("unipc", 20, 5.0), get_schedule("unipc", 20, 5.0, start_index=8)
    assert torch.equal(tail.sigmas, whole.sigmas[8:])
    assert torch.equal(tail.timesteps, whole.timesteps[8:])
    with pytest.raises(ValueError, match="no step is left"):
        get_schedule("unipc", 20, 5.0, start_index=20)


def test_strength_starts_lower_and_keeps_all_steps():
    schedule = get_schedule("euler", 10, 5.0, strength=0.85)
    assert schedule.num_steps == 10
    assert schedule.sigmas[0] == pytest.approx(shift_sigmas(0.85, 5.0))


@pytest.mark.parametrize("solver", ["euler", "unipc"])
def test_own_steps_of_a_distilled_model(solver):
    schedule = get_schedule(solver, 50, 5.0, timesteps=(1000, 750, 500, 250))
    expected = [1.0, 0.9375, 0.8333333, 0.625, 0.0]
    torch.testing.assert_close(schedule.sigmas, torch.tensor(expected))
    assert schedule.timesteps.tolist() == pytest.approx(
        [1000, 937.5, 833.3333, 625] if solver == "euler" else [1000, 937, 833, 625]
    )


def test_expert_switch_is_strict():
    assert expert_index(875, 0.875) == 0
    assert expert_index(874, 0.875) == 1
    assert expert_index(874.99, 0.875) == 1
    assert expert_index(1, None) == 0


def test_unknown_solver_names_the_known():
    with pytest.raises(ValueError, match=r"'heun'.*euler, euler-flow, unipc, dpm\+\+"):
        get_schedule("heun", 4, 1.0)
