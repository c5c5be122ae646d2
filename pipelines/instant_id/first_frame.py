"""Photo -> first frame of a video: a picture of the person in the scene, by InstantID, at the video's size.

    first_frame_files(settings)                          # to be checked before anything slow
    frame = make_first_frame(settings, output)           # (H, W, 3) uint8; SDXL's memory is free again

For any settings that are `FirstFrameSettings`. Beside the video lie NAME.first_frame.png, the frame exactly as the
video model gets it (all clips of a long video are anchored to the same pixels), with all that made it inside and in
NAME.first_frame.json; NAME.first_frame.keypoints.png, the drawing that placed the face; and
NAME.first_frame.safetensors, the person's embedding and the keypoints.
"""

import logging
from pathlib import Path

import numpy
from safetensors import SafetensorError
from safetensors.numpy import save_file

from configs import load_config
from errors import InputError, ResourceError
from pipelines.conditions import cover_resize
from pipelines.distributed import choose_device
from pipelines.instant_id.pipeline import FaceGuide, PictureMaker, describe_picture, guide_face, needed_files
from pipelines.instant_id.settings import FACE_HEIGHT, InstantIdSettings
from pipelines.jobs import Job
from pipelines.scoring import load_scorer, make_scored
from pipelines.text_to_video.command import picture_settings
from pipelines.text_to_video.settings import FirstFrameSettings, first_frame_path
from pipelines.weights import WeightsFile
from preprocess.face_detection import load_recognizer
from preprocess.image import read_image
from preprocess.output import whole_file
from preprocess.picture_writer import write_picture
from preprocess.record import read_picture_metadata
from preprocess.side_file import MARK, write_side_picture

logger = logging.getLogger("selfsame")

# Below this many pixels in a 480p frame the video's autoencoder (8 x 8 pixels a cell) keeps too little of a face.
SMALLEST_FACE = 90


def first_frame_files(settings: FirstFrameSettings) -> list[WeightsFile]:
    """What the first frame needs, to be checked with all else; none where none is asked for."""
    if settings.first_frame is None:
        return []
    return needed_files(
        picture_settings(settings), load_config(settings.first_frame), f"--first_frame {settings.first_frame}"
    )


def make_first_frame(settings: FirstFrameSettings, output: Path) -> numpy.ndarray:
    """The first frame (settings.height, settings.width, 3) uint8 of the video `output`, made or, where an interrupted
    run of the same settings left it, read.

    Raises:
        InputError: a photo without a face.
        WeightsError: weights that are missing, damaged or of another model.
        ResourceError: out of memory, or of disk.
    """
    picture, config = picture_settings(settings), load_config(settings.first_frame)
    path = first_frame_path(output)
    guide = guide_face(picture, load_recognizer(settings.antelopv2_path, f"--first_frame {settings.first_frame}"))
    scale = max(settings.height / guide.size[0], settings.width / guide.size[1])  # cover_resize's
    if (face_height := scale * (guide.box[3] - guide.box[1])) < SMALLEST_FACE:
        where = f"--face_height ({picture.face_height or FACE_HEIGHT:g})"
        logger.warning(
            "the first frame's face will be %.0f pixels high: below %d likeness drifts; %s",
            *(face_height, SMALLEST_FACE, "give a closer --pose_image" if picture.pose_image else f"raise {where}"),
        )
    if is_left(path, picture, config, guide, (settings.height, settings.width)):
        logger.info("%s is used again", path)
        return read_image(path)

    scorer = load_scorer(picture, picture.ip_image)
    maker = PictureMaker(picture, config, guide, choose_device(settings.device))
    make_scored(maker, Job(picture.prompt[0], settings.first_frame_seed, path), scorer, picture)
    maker.free()
    frame = cover_resize(read_image(path), settings.width, settings.height)
    record = read_picture_metadata(path)
    tensors = {"embedding": guide.embedding, "keypoints": numpy.asarray(guide.keypoints, numpy.float32)}
    try:
        with whole_file(path.with_suffix(".safetensors")) as part:
            save_file(tensors, part, {"made_by": MARK})
    except (OSError, SafetensorError) as error:
        raise ResourceError(f"{path.with_suffix('.safetensors')}: cannot be written ({error})") from error
    write_side_picture(path.with_suffix(".keypoints.png"), guide.drawn, settings.overwrite)
    write_picture(path, frame, record | {"cropped_to": [settings.height, settings.width]})  # last: now all is there
    return frame


def is_left(path: Path, settings: InstantIdSettings, config: dict, guide: FaceGuide, size: tuple[int, int]) -> bool:
    """Whether this very first frame is there already, whichever of the allowed seeds it took."""
    try:
        record = read_picture_metadata(path)
    except InputError:
        return False
    seeds = range(settings.seed[0], settings.seed[0] + settings.max_retries + 1)
    wanted = [describe_picture(settings, config, settings.prompt[0], seed)["content"] for seed in seeds]
    return (
        record.get("content") in wanted
        and record.get("face") == guide.as_dict()
        and record.get("cropped_to") == list(size)
    )
