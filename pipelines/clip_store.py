"""The finished clips of a long video, on disk until it is whole: an interrupted run goes on after the last of them.

.NAME.clips/00000.mp4, …        each clip's kept frames, encoded as they will be in the video; they can be watched
.NAME.clips/handover.safetensors  what the next clip is given, and which clips it follows; written after their video
.NAME.clips/.00002.state…       the finished steps of the clip that is being made (`JobState`)
"""

import dataclasses
import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from errors import ResourceError
from pipelines.clip_plan import Clip
from pipelines.job_state import JobState, Progress, load_state, save_state
from pipelines.record import hash_of_file
from preprocess.output import refuse_planted

logger = logging.getLogger("selfsame")


class ClipStore:
    """What is finished of one video.

    Args:
        output: the video's path.
        identity: all that decides the latents of every clip, beside the plan (`job_state.Progress`). Finished clips
            count only under the same, and only as far as the plan is still what it was: later prompts may change
            between runs, and so may how clips are decoded.
        clips: the plan.
    """

    def __init__(self, output: Path, identity: dict, clips: Sequence[Clip]):
        self.folder = output.with_name(f".{output.stem}.clips")
        self.handover = self.folder / "handover.safetensors"
        self.identity = identity
        progress = Progress(identity)
        self.digest, self.chosen = progress.of_denoised, progress.chosen
        self.clips = clips

    def path(self, clip: Clip) -> Path:
        return self.folder / f"{clip.index:05d}.mp4"

    @property
    def paths(self) -> list[Path]:
        return [self.path(clip) for clip in self.clips]

    def state(self, clip: Clip) -> JobState:
        """The saved steps of a clip."""
        return JobState(self.path(clip), self.identity | {"clips": self._described(clip.index + 1)})

    def load(self) -> tuple[int, Tensor | None]:
        """How many clips are finished, and what they hand to the next one; of another run's clips none."""
        refuse_planted(self.folder)
        try:
            self.folder.mkdir(exist_ok=True)
        except OSError as error:
            raise ResourceError(f"{self.folder}: cannot be made ({error.strerror})") from error
        found = load_state(self.handover, "starting from the first clip")
        if found is None:
            return 0, None
        tensors, metadata = found
        done = json.loads(metadata.get("clips", "[]"))
        if metadata.get("identity") != self.digest or done != self._described(len(done)):
            logger.warning("%s are clips of a run with other settings; starting from the first clip", self.folder)
            return 0, None
        for path, made in zip(self.paths, json.loads(metadata["videos"]), strict=False):
            if not path.is_file() or hash_of_file(path) != made:
                word = "is damaged" if path.is_file() else "is missing"
                logger.warning("%s %s; starting from the first clip", path, word)
                return 0, None
        return len(done), tensors["handover"]

    def finish(self, clip: Clip, handover: Tensor) -> None:
        """Record that a clip's video is in place, and what the next one is given.

        Raises:
            ResourceError: the disk is full.
        """
        videos = [hash_of_file(path) for path in self.paths[: clip.index + 1]]
        clips = json.dumps(self._described(clip.index + 1))
        metadata = {"identity": self.digest, "clips": clips, "videos": json.dumps(videos)}
        save_state(self.handover, {"handover": handover}, metadata | self.chosen)
        self.state(clip).remove()

    def remove(self) -> None:
        shutil.rmtree(self.folder)

    def _described(self, count: int) -> list:
        """The first clips of the plan, as JSON gives them back."""
        clips = self.clips[:count]
        described = [dataclasses.asdict(clip) | {"kept": [clip.kept.start, clip.kept.stop]} for clip in clips]
        return json.loads(json.dumps(described))
