"""Guidance by text and speech: which branches a step needs, what each of them hears and reads, how they are combined.

branch          text       speech
positive        positive   heard
negative        negative   heard
unconditional   negative   not heard
no_audio        positive   silence, through the adapter: it still sees the latents
no_pair         positive   not heard: nothing of the adapter's view of the latents either

Both guidances are sums of branches whose coefficients add up to 1, and a branch whose coefficient is 0 is not run.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from models.audio_adapter import AudioAdapter
from models.wan.transformer import Plugin, Prompt
from pipelines.denoise import NEGATIVE, POSITIVE, Guidance

UNCONDITIONAL, NO_AUDIO, NO_PAIR = "unconditional", "no_audio", "no_pair"


def three_branch(text_scale: float, audio_scale: float) -> Guidance:
    """The released three branches: unconditional + s_audio·(negative - unconditional) + s_text·(positive - negative).

    Equal scales need two branches, both 1 one.
    """
    return weighted_sum(
        {UNCONDITIONAL: 1 - audio_scale, NEGATIVE: audio_scale - text_scale, POSITIVE: text_scale},
    )


def audio_native(audio_scale: float, pair_scale: float, text_scale: float = 0.0) -> Guidance:
    """Audio Native Guidance, experimental: what the adapter makes of audio and latents is guided as a second quantity
    that the model predicts, by sampling from p(x, a | c) · p(c | x, a)^w1 · p(a | x, c)^w2:

        (1 + w1 + w2)·positive - w1·no_audio - w2·no_pair  [+ s_text·(positive - negative)]

    Reconstructed from the abstract of arXiv 2508.08248 and from VideoJAM (arXiv 2502.02492), whose guidance it follows;
    the authors' own code was never released. It costs a branch for each scale that is not 0.

    Args:
        audio_scale, pair_scale: w1 and w2; 1 to 4 is a start, together about the usual audio scale less 1.
        text_scale: beside the text that all branches read; s_text here is the usual text scale less 1.
    """
    return weighted_sum(
        {
            POSITIVE: 1 + audio_scale + pair_scale + text_scale,
            NO_AUDIO: -audio_scale,
            NO_PAIR: -pair_scale,
            NEGATIVE: -text_scale,
        }
    )


def weighted_sum(coefficients: Mapping[str, float]) -> Guidance:
    """Σ coefficient · branch, over the branches whose coefficient is not 0."""
    needed = {branch: coefficient for branch, coefficient in coefficients.items() if coefficient != 0}

    def guide(predict: Callable[[str], Tensor]) -> Tensor:
        total = None
        for branch, coefficient in needed.items():
            term = predict(branch) * coefficient
            total = term if total is None else total + term
        return total

    return guide


def branch_prompts(positive: Prompt, negative: Prompt) -> dict[str, Prompt]:
    """`Expert.prompts`. Branches of one text share its `Prompt`, and with it the keys and values it keeps."""
    return {
        POSITIVE: positive,
        NEGATIVE: negative,
        UNCONDITIONAL: negative,
        NO_AUDIO: positive,
        NO_PAIR: positive,
    }


def branch_plugins(adapter: AudioAdapter, features: Tensor, num_frames: int, **options) -> dict[str, list[Plugin]]:
    """`Expert.branch_plugins` for audio features (1, L, C); arguments as of `AudioAdapter.plugin`."""
    heard = adapter.plugin(features, num_frames, **options)
    silence = adapter.plugin(torch.zeros_like(features), num_frames, **options)
    nothing = adapter.plugin(features, num_frames, hears=[False], **options)
    return {
        POSITIVE: [heard],
        NEGATIVE: [heard],
        # The released 14B layout drops the audio before the projector, 1.3B behind it.
        UNCONDITIONAL: [silence if adapter.is_two_stage else nothing],
        NO_AUDIO: [silence],
        NO_PAIR: [nothing],
    }
