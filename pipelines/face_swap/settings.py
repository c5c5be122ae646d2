"""The settings of a face swap."""

from dataclasses import dataclass
from typing import ClassVar

from pipelines.flags import FILE, MEDIA, setting
from pipelines.lora_settings import LoraSettings
from pipelines.settings import MOST_FACES


@dataclass(frozen=True, kw_only=True)
class FaceSwapSettings(LoraSettings):
    """`num_frames` is the length of one window; height, width and fps are the input video's."""

    script: ClassVar[str] = "infer_face_swap.py"
    title: ClassVar[str] = "face swap"

    input_video: str | None = setting(
        "the video whose face is replaced",
        None,
        metavar="FILE",
        path=MEDIA,
        shown="of the tiny model: a clip made from the photo in assets/",
    )
    denoising_strength: float = setting(
        "above 0, to 1: how far the pasted face may change (1 keeps nothing of it)", 0.85, low=0, high=1, above=True
    )
    force_background_consistency: bool = setting(
        "hold the input's background at every step, for the smoothest seam", False, takes_truth=True
    )
    no_composite: bool = setting("write the whole picture as the model drew it", False, decides=FILE)
    target_face_index: int | None = setting(
        "which of several people, from the left", None, low=0, high=MOST_FACES, shown="the largest face"
    )
