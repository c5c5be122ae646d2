"""The settings of a VACE run: its control video and masks, things to show, and windows."""

from dataclasses import dataclass
from typing import ClassVar

from pipelines.flags import BASE, MEDIA, again, setting
from pipelines.lora_settings import LoraSettings
from pipelines.settings import Photos

GRID = 16  # pixels of a token's side
BESIDE_IDENTITY = 0.8  # the default of --vace_scale where there are photos, as in Stand-In's infer_with_vace.py


@dataclass(frozen=True, kw_only=True)
class VaceControl:
    """A video that controls another, frame by frame, by VACE's branch."""

    title: ClassVar[str] = "control"

    vace_path: str | None = setting(
        "VACE weights, file or folder; alone or with their base (else --base_path)",
        None,
        metavar="PATH",
        path=BASE,
        shown="the config's, in checkpoints/",
    )
    reference_video: str | None = setting(
        "control: pose, depth, sketch, or a video to paint in", None, metavar="VIDEO", path=MEDIA
    )
    vace_scale: float | None = setting(
        "of the control: 1 as trained, 0 none", None, low=0, high=10, shown=f"1; with --ip_image {BESIDE_IDENTITY:g}"
    )


@dataclass(frozen=True, kw_only=True)
class VaceSettings(VaceControl, LoraSettings):
    """What a VACE run adds to `LoraSettings`. Photos of a person are optional here."""

    script: ClassVar[str] = "infer_with_vace.py"
    title: ClassVar[str] = "control"

    ip_image: tuple[str, ...] = again(Photos, "ip_image", default=())
    reference_mask: str | None = setting(
        "video or picture; white is made, black is kept", None, metavar="FILE", path=MEDIA
    )
    reference_image: tuple[str, ...] = setting("things to show, in this order", (), metavar="PICTURE", path=MEDIA)
    resample_control: bool = setting(
        "spread --num_frames frames over the whole control video, at most as large as the model's size", False
    )
    # The released models were trained on 81 frames.
    window_frames: int = setting("longer videos are made in windows of this length", 81, low=1, high=4093)
    window_overlap: int = setting("frames that a window goes on from", 9, low=1, high=4093)
