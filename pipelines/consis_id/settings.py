"""The settings of a ConsisID run."""

from dataclasses import dataclass
from typing import ClassVar

from pipelines.flags import WEIGHTS, again, setting
from pipelines.settings import (
    Guidance,
    LikenessSettings,
    Machine,
    Photos,
    Prompts,
    StandIn,
    Steps,
    VideoFile,
    VideoSize,
    WanMachine,
    Weights,
)


@dataclass(frozen=True, kw_only=True)
class ConsisIDSettings(Prompts, Photos, VideoSize, Steps, Guidance, Weights, LikenessSettings, VideoFile, Machine):
    """Everything that decides what a run makes. Fields without a default come from the config or from the user."""

    method: ClassVar[str] = "consisid"
    script: ClassVar[str] = "infer.py"
    title: ClassVar[str] = "--method consisid"

    face_encoder_path: str | None = setting(
        "folder of RetinaFace and EVA-CLIP", None, metavar="FOLDER", path=WEIGHTS, shown="BASE_PATH/face_encoder"
    )
    face_parser_path: str | None = again(StandIn, "face_parser_path")
    identity_strength: float = again(StandIn, "identity_strength")
    face_detector: str = setting(
        "whose points align the face: retinaface, as trained", "retinaface", choices=("retinaface", "scrfd")
    )
    face_select: str = setting(
        "one: one face for all networks; upstream: the authors' two rules", "one", choices=("one", "upstream")
    )
    fp8: bool = again(WanMachine, "fp8", default=False, shown="off", left_open=True)
