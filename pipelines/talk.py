"""SVI-Talk: what guides a clip by its text and its speech."""

from collections.abc import Callable

from torch import Tensor

from pipelines.denoise import NEGATIVE, POSITIVE, Guidance

SILENT = "silent"  # the branch of the negative prompt whose audio is zero; NEGATIVE hears the audio


def talk_guidance(text_scale: float, audio_scale: float) -> Guidance:
    """silent + text_scale·(positive - negative) + audio_scale·(negative - silent).

    A branch whose velocity has the weight 0 is not run: at audio scale 1 the silent one, at equal scales the negative
    one, and with both at 1 only the positive one remains.
    """
    weights = {POSITIVE: text_scale, NEGATIVE: audio_scale - text_scale, SILENT: 1 - audio_scale}

    def guide(predict: Callable[[str], Tensor]) -> Tensor:
        return sum(weight * predict(branch) for branch, weight in weights.items() if weight != 0)

    return guide
