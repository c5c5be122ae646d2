"""SVI's variants: how the clips of each are conditioned, and which of its files are for which."""

import functools
import re
from dataclasses import dataclass

from configs import load_config
from errors import UsageError
from pipelines.clip_plan import Chain, overlap_of_latents

FILMS = ("film", "film-original", "film-transitions")  # three trainings of one variant
VARIANTS = ("shot", *FILMS, "tom", "talk", "dance", "2.0-wan2.1", "2.0", "2.0-pro")
TRAINED_FRAMES = 81  # a clip's length in training


@dataclass(frozen=True)
class Variant:
    """What one of SVI's LoRAs was trained with: the `svi` of its config.

    padding: what the VAE sees after the handed-over frames: "reference", "grey"; or "latents" instead of frames.
    mask: what is marked as given, the "first_frame" or all "motion_frames".
    drops: which clip gives up the frames that two show, see `Chain`.
    driven_by: "audio" or "pose", beside the prompts.
    motion_frames_too: other numbers of handed-over frames that the LoRA works with.
    flash_attention: its authors ask for it.
    """

    name: str
    padding: str
    mask: str
    drops: str
    motion_frames: int = 0
    motion_latents: int = 0
    end_image: bool = False
    driven_by: str | None = None
    motion_frames_too: tuple[int, ...] = ()
    flash_attention: bool = False

    @classmethod
    @functools.cache
    def of(cls, name: str) -> "Variant":
        """Raises UsageError: no such variant, or a config that is not one of SVI's."""
        config = variant_config(name)
        return cls(name=name, **config["svi"])

    @property
    def hands_latents(self) -> bool:
        return self.padding == "latents"

    def chain(self, frames: int) -> Chain:
        overlap = overlap_of_latents(self.motion_latents) if self.hands_latents else self.motion_frames
        return Chain(frames, self.motion_frames, overlap, self.drops, self.motion_latents)


def variant_config(name: str) -> dict:
    """The config of a variant's LoRA, by its name or as a YAML file of one's own."""
    if not name.endswith((".yaml", ".yml")) and name not in VARIANTS:
        raise UsageError(f"--variant {name}: accepted are {', '.join(VARIANTS)}, or a .yaml like configs/svi-shot.yaml")
    config = load_config(name if name not in VARIANTS else f"svi-{name}")
    if "svi" not in config:
        raise UsageError(f"--variant {name}: has no `svi`, which says how its clips are conditioned")
    return config


def variant_of_file(name: str) -> str | None:
    """The variant that a file of SVI's releases, or of their conversions, is for; None where the name does not tell."""
    if not has_word(name, "svi"):
        return None
    if has_word(name, "film"):
        return "film-transitions" if has_word(name, "transitions") else "film" if has_word(name, "opt") else FILMS[1]
    for variant in ("shot", "tom", "talk", "dance"):
        if has_word(name, variant):
            return variant
    if not re.search(r"(?<![a-z])v?2\.0|(?<![a-z])v2(?!\d)", name, re.IGNORECASE):
        return None
    if has_word(name, "pro"):
        return "2.0-pro"
    return "2.0-wan2.1" if re.search(r"wan_?2[._]?1", name, re.IGNORECASE) else "2.0"


def has_word(name: str, word: str) -> bool:
    return re.search(rf"(?<![a-z]){word}(?![a-z])", name, re.IGNORECASE) is not None
