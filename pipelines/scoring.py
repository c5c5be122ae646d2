"""Likeness as a gate: every output is scored against its photos, and made again with another seed if it falls short.

    scorer = load_scorer(settings, settings.ip_image)
    for job in jobs:
        print(make_scored(maker, job, scorer, settings))

Works for whatever makes a job's file and can say beforehand what metadata it will carry (`VideoMaker`,
`PictureMaker`), and for settings with the fields of `LikenessSettings`.
"""

import contextlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from errors import InputError
from metrics.likeness import FaceScorer, sample_pictures
from pipelines.distributed import Processes
from pipelines.jobs import Job, attempts
from pipelines.settings import LikenessSettings
from preprocess.face_detection import load_recognizer, recognizer_is_there
from preprocess.image import read_image
from preprocess.output import put_in_place
from preprocess.picture_writer import write_picture
from preprocess.record import read_metadata, read_picture_metadata, sidecar_path, to_json
from preprocess.video_writer import add_metadata

logger = logging.getLogger("selfsame")


class MakesJobs(Protocol):
    """Whatever makes a job's file."""

    def make(self, job: Job) -> Path: ...

    def metadata(self, job: Job) -> dict: ...


@dataclass(frozen=True)
class Attempt:
    path: Path
    seed: int
    score: float


def load_scorer(settings: LikenessSettings, photos: Sequence[str], argument: str = "--ip_image") -> FaceScorer | None:
    """The scorer of these photos; None, with a word about it, where there are no face models, or no photos.

    Raises:
        WeightsError: --min_face_score without the face models; the message has the download command.
        InputError: --min_face_score with a photo without a face.
    """
    if not photos:
        return None
    if settings.min_face_score is None and not recognizer_is_there(settings.antelopv2_path):
        logger.info("likeness is not measured: no face models here (python download_models.py --only antelopev2)")
        return None
    wants = "a score" if settings.min_face_score is None else "--min_face_score"
    recognizer = load_recognizer(settings.antelopv2_path, wants)
    pictures = [read_image(photo, argument) for photo in photos]
    try:
        return FaceScorer(recognizer, pictures, settings.face_index if len(photos) == 1 else None, photos)
    except InputError as error:
        if settings.min_face_score is not None:
            raise
        logger.info("likeness is not measured: %s", error)
        return None


def make_scored(
    maker: MakesJobs,
    job: Job,
    scorer: FaceScorer | None,
    settings: LikenessSettings,
    processes: Processes | None = None,
) -> Path:
    """Make the job, measure it and write the score into its metadata; with --min_face_score make it again with the next
    seed while the score is below, and keep the best.

    Attempts lie beside the output as NAME.seedN, and are used again when a stopped run is repeated. Of the processes
    of a split video (`processes`) the one that writes also measures, and tells the others.
    """
    if scorer is None:
        return maker.make(job)
    writes = processes is None or processes.writes

    def shared(measure, *args):
        value = measure(*args) if writes else None
        return value if processes is None else processes.share(value)

    if settings.min_face_score is None:
        maker.make(job)
        shared(score_file, job.output, scorer)
        return job.output

    made = []
    for attempt in attempts(job, settings):
        path, seed = attempt.output, attempt.seed
        if not shared(is_made, path, maker.metadata(attempt)):
            maker.make(attempt)
        made.append(Attempt(path, seed, shared(score_file, path, scorer)))
        if made[-1].score >= settings.min_face_score:
            break
        if seed < job.seed + settings.max_retries:
            logger.info("below --min_face_score %g: trying seed %d", settings.min_face_score, seed + 1)

    best = max(made, key=lambda attempt: attempt.score)
    if best.score < settings.min_face_score:
        logger.warning(
            "%s: none of %d seeds reached --min_face_score %g; kept is seed %d with %.3f",
            *(job.output, len(made), settings.min_face_score, best.seed, best.score),
        )
    if writes:
        put_in_place((sidecar_path(best.path), sidecar_path(job.output)), (best.path, job.output))
        for attempt in made:
            for file in (attempt.path, sidecar_path(attempt.path)):
                file.unlink(missing_ok=True)
    return job.output


def is_made(path: Path, metadata: dict) -> bool:
    """Whether a file is there that was made with this metadata (and perhaps carries more)."""
    with contextlib.suppress(InputError):
        found = record_of(path)
        return found | json.loads(to_json(metadata)) == found
    return False


def score_file(path: Path, scorer: FaceScorer) -> float:
    """Measure a finished picture or video, say it, and add it to its metadata."""
    score = scorer.score(sample_pictures(path))
    logger.info("%s: face score %s", path, score)
    if path.suffix == ".png":
        write_picture(path, read_image(path), record_of(path) | {"face_score": score.as_dict()})
    else:
        add_metadata(path, {"face_score": score.as_dict()})
    return score.value


def record_of(path: Path) -> dict:
    return read_picture_metadata(path) if path.suffix == ".png" else read_metadata(path)
