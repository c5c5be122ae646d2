"""Videos from a prompt, with the people of photos or from a picture on: one mp4 file a prompt and seed."""

from collections.abc import Sequence
from pathlib import Path

import numpy
from torch import Tensor

from models.wan.schedulers import get_schedule
from models.wan.transformer import WanTransformer
from pipelines.conditions import initial_noise
from pipelines.denoise import Expert
from pipelines.experts import guided_by_text
from pipelines.job_state import JobState
from pipelines.jobs import Job
from pipelines.settings import Settings
from pipelines.stand_in import Identities
from pipelines.text_to_video.from_pictures import NO_PICTURES, start_from
from pipelines.video import decode, denoise_with_resume, describe, open_video, progress, ran_with, write_frames
from pipelines.wan import Wan
from preprocess.face import FaceImage, load_parser, prepare_face
from preprocess.face_detection import load_detector
from preprocess.image import read_image
from preprocess.progress_bars import ProgressBars
from preprocess.side_file import write_side_picture


def cut_face(settings: Settings, photo: str, picture: numpy.ndarray, detector, parser) -> FaceImage:
    """The face of one person's photo, as the settings say."""
    return prepare_face(
        picture,
        detector,
        parser,
        face_index=settings.face_index,
        allow_no_face=settings.allow_no_face,
        crop=not settings.no_face_crop,
        name=photo,
    )


def prepare_faces(settings: Settings, output: Path | None = None) -> list[numpy.ndarray]:
    """Each person's photo -> (512, 512, 3) uint8, the face on white; also written as NAME.faceN.png beside `output`.

    Raises:
        InputError: a photo that cannot be read, or without a face.
    """
    faces = []
    pictures = [read_image(photo, "--ip_image") for photo in settings.stand_in_photos]
    detector = parser = None  # read after the photos: what is said of them when they are absent is no error's beginning
    if settings.stand_in_photos and not settings.no_face_crop:
        detector, parser = load_detector(settings.antelopv2_path), load_parser(settings.face_parser_path)
    for number, (photo, picture) in enumerate(zip(settings.stand_in_photos, pictures, strict=True)):
        face = cut_face(settings, photo, picture, detector, parser).rgb
        if output is not None:
            write_side_picture(output.with_suffix(f".face{number}.png"), face, settings.overwrite)
        faces.append(face)
    return faces


class VideoMaker:
    """Makes jobs one after another with parts loaded once.

    Args:
        wan: the model.
        text: prompt -> states, of every prompt and the negative prompt (`Wan.encode_prompts`).
        faces: photos as `prepare_faces` gives them; empty for plain text-to-video.
        pictures: that the videos start from, the first, or the first and the last; none for text-to-video.
    """

    def __init__(
        self,
        wan: Wan,
        text: dict[str, Tensor],
        faces: Sequence[numpy.ndarray] = (),
        pictures: Sequence[numpy.ndarray] = (),
    ):
        self.wan, self.text, self.settings = wan, text, wan.settings
        self.bars = ProgressBars(shown=wan.processes.rank == 0)
        self.identities = Identities(wan, faces)
        self.pictures = start_from(wan, pictures, self.bars) if pictures else NO_PICTURES
        settings = self.settings
        steps, shift = settings.num_inference_steps, settings.shift
        self.schedule = get_schedule(settings.solver, steps, shift, timesteps=settings.timesteps)

    def make(self, job: Job) -> Path:
        """Denoise, decode into the file, and remove the saved progress."""
        wan, settings, schedule = self.wan, self.settings, self.schedule
        self.bars.plan(schedule.num_steps)
        record = self.metadata(job)
        state = JobState(job.output, progress(wan, schedule, record))
        texts = self.text[job.prompt], self.text[settings.negative_prompt]
        seen = {"image_features": self.pictures.image_features, "identities": self.identities}

        def expert(number: int, transformer: WanTransformer) -> Expert:
            return guided_by_text(wan, schedule, number, transformer, *texts, **seen)

        with open_video(wan, job.output, record) as video:
            config = wan.transformer_config
            size = (config.out_dim, settings.num_frames, settings.height, settings.width)
            noise = initial_noise(size, job.seed, config.vae_spatial_factor, wan.noise_device)  # (1, C, F, h, w)
            latents = denoise_with_resume(
                wan,
                noise.to(wan.device),
                schedule,
                expert,
                state,
                self.bars,
                job.output,
                identities=self.identities,
                condition=self.pictures.condition,
                pinned=self.pictures.pinned,
            )
            wan.release_transformers()
            if video is not None:
                video.describe(record | ran_with(wan))
                write_frames(video, decode(wan, latents), self.bars.work("decoding", settings.num_frames, "frame"))
        state.remove()
        return job.output

    def metadata(self, job: Job) -> dict:
        """The video's record, before it is made."""
        faces = dict(zip(self.settings.stand_in_photos, self.identities.hashes, strict=True))
        return describe(self.wan, self.schedule, job, faces) | self.pictures.record
