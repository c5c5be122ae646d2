"""From noise to clean latents: one loop for every mode, with the guidance and the expert switch as arguments."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from models.wan.schedulers import Schedule, make_solver
from models.wan.tea_cache import TeaCache
from models.wan.transformer import Plugin, Prompt, WanTransformer

POSITIVE, NEGATIVE = "positive", "negative"

# Asks for the branches it needs and combines them: (branch name -> velocity) -> velocity.
Guidance = Callable[[Callable[[str], Tensor]], Tensor]


def no_guidance(predict: Callable[[str], Tensor]) -> Tensor:
    """One branch: distilled models, whose guidance is in their weights."""
    return predict(POSITIVE)


def two_branch(scale: float) -> Guidance:
    """Classifier-free guidance: negative + scale·(positive - negative). At scale 1 the negative branch is not run."""
    if scale == 1:
        return no_guidance

    def guide(predict: Callable[[str], Tensor]) -> Tensor:
        positive, negative = predict(POSITIVE), predict(NEGATIVE)
        return negative + scale * (positive - negative)

    return guide


@dataclass
class Expert:
    """A transformer with all it needs to denoise one video.

    prompts: one `Prompt` a guidance branch.
    plugins: asked at every step of every branch.
    step_caches: one `TeaCache` a branch, or none.
    branch_plugins: further plug-ins of single branches (speech is heard in some and not in others).
    attended_length: pad the tokens to this length, and let them see the padding (`WanTransformer.forward`).
    cache_name: of what the transformer's own step cache remembers, where it denoises several things by turns.
    plugins_at: (step, number of steps) -> further plug-ins of every branch, where they depend on the step.
    """

    transformer: WanTransformer
    prompts: Mapping[str, Prompt]
    guidance: Guidance
    plugins: Sequence[Plugin] = ()
    step_caches: Mapping[str, TeaCache] = field(default_factory=dict)
    branch_plugins: Mapping[str, Sequence[Plugin]] = field(default_factory=dict)
    attended_length: int | None = None
    cache_name: str = ""
    plugins_at: Callable[[int, int], Sequence[Plugin]] | None = None

    def velocity(
        self, sample: Tensor, timestep: Tensor, step: int, num_steps: int, condition: Tensor | None = None
    ) -> Tensor:
        """The guided prediction for sample (B, C, F, H, W) at one step, float32."""
        plugins = [*self.plugins, *(self.plugins_at(step, num_steps) if self.plugins_at is not None else ())]

        def predict(branch: str) -> Tensor:
            with self.transformer.cache_context(branch + self.cache_name):
                return self.transformer(
                    sample,
                    timestep,
                    self.prompts[branch],
                    condition=condition,
                    plugins=[*plugins, *self.branch_plugins.get(branch, ())],
                    seq_len=self.attended_length,
                    attend_padding=self.attended_length is not None,
                    step_cache=self.step_caches.get(branch),
                )

        return self.guidance(predict)


@dataclass(frozen=True)
class PinnedFrames:
    """Latent frames that are known and stay so (TI2V: the photo is frame 0). Their tokens are told timestep 0.

    latents: (B, C, F0, H, W), the first F0 latent frames of the video.
    """

    latents: Tensor

    def put(self, sample: Tensor) -> Tensor:
        return torch.cat((self.latents.to(sample), sample[:, :, self.latents.shape[2] :]), dim=2)

    def timesteps(self, timestep: Tensor, sample: Tensor) -> Tensor:
        """(B,) -> (B, tokens): 0 for pinned frames."""
        _, _, frames, height, width = sample.shape
        per_frame = (height // 2) * (width // 2)
        tokens = timestep[:, None].repeat(1, frames * per_frame)
        tokens[:, : self.latents.shape[2] * per_frame] = 0
        return tokens


@dataclass(frozen=True)
class Step:
    """A finished step, as `denoise` reports it.

    sample: what the next step starts from, (B, C, F, H, W) float32.
    clean:  the model's guess of the clean latents at this step, for previews.
    solver: the solver's history; with `index` and `sample` enough to go on from here.
    """

    index: int
    sample: Tensor
    clean: Tensor
    solver: dict


class NonFiniteLatentsError(RuntimeError):
    """The model returned NaN or infinity."""


def to_device(value, device: torch.device):
    """An entry of a solver's history: a tensor, a list of tensors, or a plain value."""
    if isinstance(value, list):
        return [tensor.to(device) for tensor in value]
    return value.to(device) if isinstance(value, Tensor) else value


@torch.no_grad()
def denoise(
    noise: Tensor,
    schedule: Schedule,
    expert_at: Callable[[int], Expert],
    *,
    condition: Tensor | None = None,
    pinned: PinnedFrames | None = None,
    after_step: Callable[[int, Tensor], Tensor] | None = None,
    on_step: Callable[[Step], None] | None = None,
    resume: tuple[int, Tensor, dict] | None = None,
) -> Tensor:
    """Run the schedule.

    Args:
        noise: what the run starts from, (B, C, F, H, W) float32 (noise, or noised latents of a video).
        expert_at: step index -> the expert of that step; called once a step, so it may load and free.
        condition: concatenated channels of image-to-video models, (B, in_dim - C, F, H, W).
        pinned: latent frames held fixed.
        after_step: (step, sample) -> sample; background re-injection and the like.
        on_step: called after each step: progress, preview, checkpoint.
        resume: (next step, sample, solver history) of an interrupted run.

    Returns:
        Clean latents (B, C, F, H, W), float32.

    Raises:
        NonFiniteLatentsError: the model's output is NaN or infinite; the message says at which step.
    """
    solver = make_solver(schedule)
    first, sample = 0, noise if pinned is None else pinned.put(noise)
    if resume is not None:
        first, sample, state = resume
        sample = sample.to(noise.device)
        solver.load_state_dict({name: to_device(value, noise.device) for name, value in state.items()})
    for step in range(first, schedule.num_steps):
        timestep = schedule.timesteps[step].float().expand(sample.shape[0])
        if pinned is not None:
            timestep = pinned.timesteps(timestep, sample)
        velocity = expert_at(step).velocity(sample, timestep, step, schedule.num_steps, condition)
        if not torch.isfinite(velocity).all():
            raise NonFiniteLatentsError(
                f"the model returned NaN or infinity at step {step + 1} of {schedule.num_steps}"
            )
        clean = sample - schedule.sigmas[step].item() * velocity
        sample = solver.step(velocity, step, sample)
        if pinned is not None:
            sample = pinned.put(sample)
        if after_step is not None:
            sample = after_step(step, sample)
        if on_step is not None:
            on_step(Step(step, sample, clean, solver.state_dict()))
    return sample
