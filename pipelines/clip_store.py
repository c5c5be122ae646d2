"""The finished clips of a long video, on disk until it is whole: an interrupted run goes on after the last of them.

.NAME.clips/00000.mp4, …        each clip's kept frames, encoded as they will be in the video; they can be watched
.NAME.clips/handed.safetensors  what the next clip is given, and which clips it follows; written after their video
.NAME.clips/.00002.state…       the finished steps of the clip that is being made (`JobState`)
"""

import dataclasses
import json
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from errors import ResourceError
from pipelines.clip_plan import Clip
from pipelines.job_state import JobState, digest_of

logger = logging.getLogger("selfsame")


class ClipStore:
    """What is finished of one video.

    Args:
        output: the video's path.
        identity: all that decides the content of every clip, beside the plan. Finished clips count only under the same,
            and only as far as the plan is still what it was: later prompts may change between runs.
        clips: the plan.
    """

    def __init__(self, output: Path, identity: dict, clips: Sequence[Clip]):
        self.folder = output.with_name(f".{output.stem}.clips")
        self.identity = digest_of(identity)
        self.clips = clips

    def path(self, clip: Clip) -> Path:
        return self.folder / f"{clip.index:05d}.mp4"

    @property
    def paths(self) -> list[Path]:
        return [self.path(clip) for clip in self.clips]

    def state(self, clip: Clip) -> JobState:
        """The saved steps of a clip."""
        return JobState(self.path(clip), {"identity": self.identity, "clips": self._described(clip.index + 1)})

    def load(self) -> tuple[int, Tensor | None]:
        """How many clips are finished, and what they hand to the next one; of another run's clips none."""
        file = self.folder / "handed.safetensors"
        try:
            self.folder.mkdir(exist_ok=True)
        except OSError as error:
            raise ResourceError(f"{self.folder}: cannot be made ({error.strerror})") from error
        if not file.is_file():
            return 0, None
        try:
            with safe_open(file, "pt") as opened:
                metadata, handed = opened.metadata(), opened.get_tensor("handed")
            done = json.loads(metadata["clips"])
        except (SafetensorError, OSError) as error:
            logger.warning("%s is damaged (%s); starting from the first clip", file, error)
            return 0, None
        if metadata["identity"] != self.identity or done != self._described(len(done)):
            logger.warning("%s are clips of a run with other settings; starting from the first clip", self.folder)
            return 0, None
        if missing := [path for path in self.paths[: len(done)] if not path.is_file()]:
            logger.warning("%s is missing; starting from the first clip", missing[0])
            return 0, None
        return len(done), handed

    def finish(self, clip: Clip, handed: Tensor) -> None:
        """Record that a clip's video is in place, and what the next one is given.

        Raises:
            ResourceError: the disk is full.
        """
        part = self.folder / "handed.part"
        metadata = {"identity": self.identity, "clips": json.dumps(self._described(clip.index + 1))}
        try:
            save_file({"handed": handed.to("cpu", copy=True).contiguous()}, part, metadata)
            with open(part, "rb") as file:
                os.fsync(file.fileno())
            part.replace(self.folder / "handed.safetensors")
        except (OSError, SafetensorError) as error:
            raise ResourceError(f"{part}: cannot be saved ({error}); make room and repeat the command") from error
        self.state(clip).remove()

    def remove(self) -> None:
        shutil.rmtree(self.folder)

    def _described(self, count: int) -> list:
        """The first clips of the plan, as JSON gives them back."""
        clips = self.clips[:count]
        described = [dataclasses.asdict(clip) | {"kept": [clip.kept.start, clip.kept.stop]} for clip in clips]
        return json.loads(json.dumps(described))
