"""The settings of videos that start from a picture, given or made for the occasion."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pipelines.flags import MEDIA, setting
from pipelines.instant_id.settings import InstantId
from pipelines.lora_settings import ExpertLoras, LoraSettings
from pipelines.settings import LARGEST_SEED, Settings


@dataclass(frozen=True, kw_only=True)
class FirstFrameSettings(InstantId):
    """A picture to start from, made from the photo by InstantID. To be put before a script's own `Settings` among the
    bases.
    """

    title: ClassVar[str] = "first frame of a photo"

    first_frame: str | None = setting("make the first frame from --ip_image", None, choices=("instantid",))
    first_frame_prompt: str | None = setting("its scene", None, metavar="TEXT", text=True, shown="the video's prompt")
    first_frame_seed: int = setting("of the first frame", 0, low=0, high=LARGEST_SEED)

    @property
    def stand_in_photos(self) -> tuple[str, ...]:
        """The photo of a first frame is InstantID's, not Stand-In's."""
        return () if self.first_frame else self.ip_image


@dataclass(frozen=True, kw_only=True)
class ImageToVideoSettings(FirstFrameSettings, Settings):
    """infer.py's: text-to-video, or with a first (and last) picture. The video keeps the picture's shape; height and
    width say how many pixels it has.
    """

    script: ClassVar[str] = "infer.py"
    title: ClassVar[str] = "image-to-video"
    families: ClassVar[tuple[str, ...]] = ("t2v", "ti2v", "i2v", "fun", "flf2v")
    plain: ClassVar[type] = Settings  # so the record of a run without a picture fits all scripts

    image: str | None = setting("the first frame; the video keeps its shape", None, metavar="FILE", path=MEDIA)
    last_image: str | None = setting(
        "the last frame, of models from one picture to another", None, metavar="FILE", path=MEDIA
    )

    @property
    def score_photos(self) -> tuple[str, ...]:
        """Whom the video is compared with: the photo's people, or who is in the picture it starts from."""
        return self.ip_image or ((self.image,) if self.image else ())


@dataclass(frozen=True, kw_only=True)
class PictureLoraSettings(ExpertLoras, ImageToVideoSettings):
    """infer_with_lora.py's: the same with LoRAs on the model."""

    script: ClassVar[str] = "infer_with_lora.py"
    plain: ClassVar[type] = LoraSettings


def first_frame_path(output: Path) -> Path:
    return output.with_name(f"{output.stem}.first_frame.png")
