"""Flow-matching schedules and solvers for a model that predicts the velocity v = noise - clean.

A schedule is a table; a solver is a formula with the history it needs, driven by an explicit step index (looking the
index up by timestep, as upstream does, fails when two truncated timesteps coincide: many steps with a large shift).

Source: Wan2.1 `wan/utils/fm_solvers_unipc.py` and `fm_solvers.py`; DiffSynth-Studio `flow_match.py`; VideoX-Fun (the
"Flow" table). UniPC: arXiv 2302.04867 (B2(h) variant). DPM-Solver++: arXiv 2211.01095 (2M, midpoint).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

TRAIN_TIMESTEPS = 1000
SOLVERS = ("euler", "euler-flow", "unipc", "dpm++")


@dataclass(frozen=True)
class Schedule:
    """The noise levels of a run.

    sigmas:    (N+1,) float32, share of noise in the sample before each step; the last is where the run ends.
    timesteps: (N,) what the model is told, on the scale 0 to 1000; truncated to int64 for unipc and dpm++ (upstream's
               released behaviour), float32 for euler.
    """

    solver: str
    sigmas: Tensor
    timesteps: Tensor

    @property
    def num_steps(self) -> int:
        return len(self.timesteps)

    def __post_init__(self):
        assert len(self.sigmas) == len(self.timesteps) + 1


def shift_sigmas(sigmas, shift: float):
    """S(σ) = s·σ / (1 + (s-1)·σ): spend more of the steps at high noise."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def get_schedule(
    solver: str,
    num_steps: int,
    shift: float,
    *,
    strength: float = 1.0,
    timesteps: Sequence[float] | None = None,
    start_index: int = 0,
) -> Schedule:
    """The released table of a solver.

    Args:
        solver: one of `SOLVERS`.
        num_steps: steps of the whole table; ignored where `timesteps` are given.
        shift: of the sigmas; 1 leaves them linear.
        strength: sigma before the shift at which euler's table starts (video to video); all steps are kept.
        timesteps: a distilled model's own steps before the shift, e.g. (1000, 750, 500, 250).
        start_index: leave the first steps out (video to video with the other solvers, or a resumed run).

    Raises:
        ValueError: an unknown solver, or values that leave no step.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver {solver!r} is not one of {', '.join(SOLVERS)}")
    if timesteps is not None:
        sigmas = shift_sigmas(torch.tensor(timesteps, dtype=torch.float64) / TRAIN_TIMESTEPS, shift)
    elif solver == "euler-flow":
        # Both ends included and the low end shifted twice, as diffusers' FlowMatchEulerDiscreteScheduler does it.
        low = shift_sigmas(1.0 / TRAIN_TIMESTEPS, shift)
        table = torch.from_numpy(numpy.linspace(TRAIN_TIMESTEPS, low * TRAIN_TIMESTEPS, num_steps) / TRAIN_TIMESTEPS)
        sigmas = shift_sigmas(table, shift)
    elif solver == "euler":
        sigmas = shift_sigmas(torch.linspace(strength, 0.0, num_steps + 1)[:-1], shift)
    else:
        start = float(numpy.float32(1 - 1 / TRAIN_TIMESTEPS)) if solver == "unipc" else 1.0
        table = numpy.linspace(start, 0.0, num_steps + 1)[:-1]
        sigmas = torch.from_numpy(shift_sigmas(table, shift))
    if start_index:
        sigmas = sigmas[start_index:]
    if len(sigmas) == 0:
        raise ValueError(f"no step is left of {num_steps} after starting at {start_index}")

    # Truncated before the sigmas are rounded to float32: 874.9999 is 874.
    told = (sigmas * TRAIN_TIMESTEPS).to(torch.int64 if solver in ("unipc", "dpm++") else torch.float32)
    return Schedule(solver, torch.cat((sigmas, sigmas.new_zeros(1))).float(), told)


def expert_index(timestep: float, boundary: float | None) -> int:
    """Which expert runs: 0 for high noise (timestep >= boundary·1000), 1 for low. Without a boundary always 0."""
    return 0 if boundary is None or float(timestep) >= boundary * TRAIN_TIMESTEPS else 1


def add_noise(clean: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """x_σ = (1-σ)·clean + σ·noise."""
    return (1 - sigma) * clean + sigma * noise


def make_solver(schedule: Schedule) -> "EulerSolver | UniPCSolver | DPMSolver":
    return {"unipc": UniPCSolver, "dpm++": DPMSolver}.get(schedule.solver, EulerSolver)(schedule)


class EulerSolver:
    """x ← x + (σ_next - σ)·v. Keeps no history."""

    def __init__(self, schedule: Schedule):
        self.sigmas = schedule.sigmas

    def step(self, velocity: Tensor, index: int, sample: Tensor) -> Tensor:
        return sample + velocity * (self.sigmas[index + 1] - self.sigmas[index]).item()

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        assert not state


def _lambda(sigma: float) -> float:
    """Half the log signal-to-noise ratio, ln((1-σ)/σ); -inf at pure noise."""
    return math.log((1 - sigma) / sigma) if sigma < 1 else -math.inf


class UniPCSolver:
    """UniPC of order 2 with B2(h), data prediction, and the corrector on every step but the first."""

    def __init__(self, schedule: Schedule):
        self.sigmas = schedule.sigmas.double().tolist()
        self.num_steps = schedule.num_steps
        self.clean: list[Tensor] = []  # the last two data predictions, newest last
        self.last_sample: Tensor | None = None  # what the previous predictor step started from
        self.order = 0  # the previous predictor step's

    def step(self, velocity: Tensor, index: int, sample: Tensor) -> Tensor:
        clean = sample - self.sigmas[index] * velocity
        if self.last_sample is not None:
            sample = self._correct(clean, index)
        self.order = min(2, self.num_steps - index, len(self.clean) + 1)
        self.clean = [*self.clean[-1:], clean]
        self.last_sample = sample
        return self._predict(index, sample)

    def _predict(self, index: int, sample: Tensor) -> Tensor:
        sigma, sigma_next = self.sigmas[index], self.sigmas[index + 1]
        clean = self.clean[-1]
        if sigma_next == 0:
            return clean
        step = _lambda(sigma_next) - _lambda(sigma)  # h
        growth = math.expm1(-step)  # both φ1's factor and B2(h) for data prediction
        out = (sigma_next / sigma) * sample - (1 - sigma_next) * growth * clean
        if self.order == 2:
            ratio = (_lambda(self.sigmas[index - 1]) - _lambda(sigma)) / step
            out = out - (1 - sigma_next) * growth * 0.5 * (self.clean[-2] - clean) / ratio
        return out

    def _correct(self, clean: Tensor, index: int) -> Tensor:
        """Redo the previous step's end point, now that the model was evaluated there."""
        sigma, sigma_now = self.sigmas[index - 1], self.sigmas[index]
        step = _lambda(sigma_now) - _lambda(sigma)
        growth = math.expm1(-step)
        before = self.clean[-1]
        out = (sigma_now / sigma) * self.last_sample - (1 - sigma_now) * growth * before
        if self.order == 1:
            return out - (1 - sigma_now) * growth * 0.5 * (clean - before)
        # Two unknowns: R ρ = b with R = [[1, 1], [r, 1]] and b from the φ-functions of -h.
        ratio = (_lambda(self.sigmas[index - 2]) - _lambda(sigma)) / step
        phi2 = growth / -step - 1
        b1 = phi2 / growth
        b2 = (phi2 / -step - 0.5) * 2 / growth
        rho_before = (b1 - b2) / (1 - ratio)
        rho_now = b1 - rho_before
        slope = (self.clean[-2] - before) / ratio
        return out - (1 - sigma_now) * growth * (rho_before * slope + rho_now * (clean - before))

    def state_dict(self) -> dict:
        return {"clean": list(self.clean), "last_sample": self.last_sample, "order": self.order}

    def load_state_dict(self, state: dict) -> None:
        self.clean, self.last_sample, self.order = state["clean"], state["last_sample"], state["order"]


class DPMSolver:
    """DPM-Solver++ 2M with the midpoint rule; first and last step of order 1."""

    def __init__(self, schedule: Schedule):
        self.sigmas = schedule.sigmas.double().tolist()
        self.num_steps = schedule.num_steps
        self.previous: Tensor | None = None  # the previous data prediction

    def step(self, velocity: Tensor, index: int, sample: Tensor) -> Tensor:
        sigma, sigma_next = self.sigmas[index], self.sigmas[index + 1]
        clean = sample - sigma * velocity
        previous, self.previous = self.previous, clean
        if sigma_next == 0:
            return clean
        step = _lambda(sigma_next) - _lambda(sigma)  # infinite where the run starts at pure noise
        growth = math.expm1(-step)
        out = (sigma_next / sigma) * sample - (1 - sigma_next) * growth * clean
        if previous is not None and index != self.num_steps - 1:
            ratio = (_lambda(sigma) - _lambda(self.sigmas[index - 1])) / step
            if math.isfinite(ratio):
                out = out - 0.5 * (1 - sigma_next) * growth * (clean - previous) / ratio
        return out

    def state_dict(self) -> dict:
        return {"previous": self.previous}

    def load_state_dict(self, state: dict) -> None:
        self.previous = state["previous"]
