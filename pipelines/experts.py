"""Which transformer denoises a step, and with what: prompts, guidance, plug-ins, step caches."""

from collections.abc import Callable, Sequence

from diffusers import FirstBlockCacheConfig
from torch import Tensor

from models.wan.schedulers import Schedule, expert_index
from models.wan.slots import Plugin
from models.wan.tea_cache import TeaCache, coefficients_of
from models.wan.transformer import Prompt, WanTransformer
from pipelines.denoise import NEGATIVE, POSITIVE, Expert, two_branch
from pipelines.settings import Settings
from pipelines.stand_in import Identities
from pipelines.wan import Wan

MakeExpert = Callable[[int, WanTransformer], Expert]


def switch_experts(wan: Wan, schedule: Schedule, make_expert: MakeExpert) -> Callable[[int], Expert]:
    """step -> the expert of that step, made at its first step: weights are switched once a video. Where live LoRAs set
    in or end it is made anew, as nothing that was computed with the weights before is right any more.

    make_expert: (number, its transformer) -> the expert. It may run the transformer, which is no step of the video.
    """
    boundary = wan.config.get("boundary")
    made: dict[tuple[int, bool], Expert] = {}  # the present one alone

    def expert_at(step: int) -> Expert:
        number = expert_index(schedule.timesteps[step], boundary)
        with_loras = wan.loras.work_at(step, schedule.num_steps)
        if (number, with_loras) not in made:
            made.clear()
            transformer = wan.transformer(number, with_loras)
            end_step_cache(transformer)  # it remembers the video before
            made[number, with_loras] = make_expert(number, transformer)
            begin_step_cache(transformer, wan.settings)
        return made[number, with_loras]

    return expert_at


def guided_by_text(
    wan: Wan,
    schedule: Schedule,
    number: int,
    transformer: WanTransformer,
    positive: Tensor,
    negative: Tensor,
    *,
    image_features: Tensor | None = None,
    plugins: Sequence[Plugin] = (),
    identities: Identities | None = None,
) -> Expert:
    """An expert under classifier-free guidance, with its own scale where there are two.

    Args:
        positive, negative: states of the two texts, (tokens, text_dim).
        image_features: of CLIP, in the models that look at a picture.
        plugins: further ones, beside those that parts add by themselves.
        identities: of the photos that are to be seen.
    """
    prompts = {POSITIVE: prompt_of(wan, positive, image_features), NEGATIVE: prompt_of(wan, negative, image_features)}
    scales = wan.settings.guidance_scale
    return Expert(
        transformer,
        prompts,
        two_branch(scales[min(number, len(scales) - 1)]),
        [*wan.plugins(), *plugins],
        tea_caches(wan, schedule),
        plugins_at=None if identities is None else identities.of(number, transformer),
    )


def prompt_of(wan: Wan, states: Tensor, image_features: Tensor | None = None) -> Prompt:
    """What one guidance branch reads, on the device. It keeps what an expert computes of it, so it is that one's alone.

    Args:
        states: of the text, (tokens, text_dim).
        image_features: of CLIP, (1, pictures · 257, 1280), in the models that look at a picture.
    """
    image = None if image_features is None else image_features.to(wan.device)
    # Text keys and values of all blocks take 0.8 GB for 14B: not worth it where memory is the concern.
    return Prompt([states.to(wan.device)], image, keep_keys_values=wan.memory != "sequential")


# -------------------------------------------------------------------------------------------------------- step caches


def tea_caches(wan: Wan, schedule: Schedule, branches: Sequence[str] = (POSITIVE, NEGATIVE)) -> dict[str, TeaCache]:
    """One for each guidance branch, where the settings ask for TeaCache."""
    if wan.settings.step_cache != "teacache":
        return {}
    coefficients = coefficients_of(wan.config)
    threshold = wan.settings.step_cache_threshold
    return {branch: TeaCache(schedule.num_steps, threshold, coefficients) for branch in branches}


def begin_step_cache(transformer: WanTransformer, settings: Settings) -> None:
    """Where the settings ask for diffusers' First Block Cache."""
    if settings.step_cache == "first_block":
        transformer.enable_cache(FirstBlockCacheConfig(threshold=settings.step_cache_threshold))


def end_step_cache(transformer: WanTransformer) -> None:
    if transformer.is_cache_enabled:
        transformer.disable_cache()
