"""A photo -> what ConsisID is given of its face: the aligned picture, an identity vector, and a vision tower's view.

Source: ConsisID `models/consisid_utils.py:process_face_embeddings`.
"""

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor

from errors import InputError, WeightsError
from models.identity.eva_clip import load_eva_tower
from models.wan.checkpoint import read_tensors
from models.wan.image_encoder import CLIP_MEAN, CLIP_STD
from pipelines.consis_id.settings import ConsisIDSettings
from pipelines.weights import WeightsFile, face_files
from preprocess.face import choose_face, load_parser
from preprocess.face_alignment import align_face, grey, limit_size, similarity_transform, to_uint8, white_background
from preprocess.face_detection import load_recognizer, recognizer_is_there
from preprocess.face_paste import intersection_over_union
from preprocess.image import read_image
from preprocess.retinaface import load_retinaface

logger = logging.getLogger("selfsame")

RETINAFACE_FILE = "detection_Resnet50_Final.pth"
EVA_FILE = "EVA02_CLIP_L_336_psz14_s6B.pt"
PARSER_FILE = "parsing_bisenet.pth"
SAME_FACE = 0.3  # intersection over union above which two detectors mean the same face


@dataclass(frozen=True, eq=False)
class FaceCondition:
    """What a video's identity is made of."""

    picture: numpy.ndarray  # (512, 512, 3) uint8, aligned, on white: the video's first latent frame
    id_cond: Tensor  # (1, 1280) float32: ArcFace's vector as it comes (512), and EVA-CLIP's of length 1 (768)
    id_vit_hidden: list[Tensor]  # five of (1, 577, 1024) float32, from shallow to deep
    keypoints: numpy.ndarray  # (5, 2) in the photo, for checkpoints that are given them


@dataclass(frozen=True, eq=False)
class ChosenFace:
    """One face, as far as two detectors agree on it."""

    embedding: numpy.ndarray  # (512,) float32, ArcFace's
    keypoints: numpy.ndarray  # (5, 2)
    landmarks: numpy.ndarray  # (5, 2): the points it is aligned by
    box: tuple[float, float, float, float]


def prepare_face(settings: ConsisIDSettings, base_path: Path, device: torch.device, hint: str) -> FaceCondition:
    """Read the photo and run the face networks; they are gone after this.

    Args:
        base_path: the release, whose face_encoder folder holds the networks that are not named one by one.
        hint: how to get what is missing; ends messages.

    Raises:
        WeightsError: a network's file is missing or wrong.
        InputError: a photo that cannot be read, or without a face.
    """
    photo = settings.ip_image[0]
    image = limit_size(read_image(photo, "--ip_image"))  # (H, W, 3) uint8
    folder = face_networks(settings, base_path, hint)
    recognizer = load_recognizer(antelopv2_path(settings, folder), "--method consisid")
    retinaface = None
    if settings.face_detector == "retinaface":
        retinaface = load_retinaface(folder / RETINAFACE_FILE, device, hint)
    if settings.face_select == "upstream":
        face = choose_as_upstream(image, recognizer, retinaface, photo)
    else:
        face = choose(image, recognizer, retinaface, settings.face_index, photo)
    del recognizer, retinaface

    parser_file = settings.face_parser_path or (folder / PARSER_FILE if (folder / PARSER_FILE).is_file() else None)
    parser = load_parser(parser_file, normalization="imagenet", device=device)
    tower = load_eva_tower(folder / EVA_FILE, hint=hint).to(device)
    return condition(align_face(image, face.landmarks), face, parser, tower)


def face_networks(settings: ConsisIDSettings, base_path: Path, hint: str) -> Path:
    """The folder of the face networks, with all that this run needs.

    Raises:
        WeightsError: a file is missing.
    """
    folder = Path(settings.face_encoder_path or base_path / "face_encoder")
    needed = [EVA_FILE] + ([RETINAFACE_FILE] if settings.face_detector == "retinaface" else [])
    for name in needed:
        if not (folder / name).is_file():
            raise WeightsError(f"{folder / name}: no such file; {hint}, or name its folder with --face_encoder_path")
    return folder


def network_files(settings: ConsisIDSettings, base_path: Path, download: str) -> list[WeightsFile]:
    """The face networks, to be checked with all else. download: the config that brings them."""
    folder = Path(settings.face_encoder_path or base_path / "face_encoder")
    names = {"EVA-CLIP": EVA_FILE} | ({"RetinaFace": RETINAFACE_FILE} if settings.face_detector == "retinaface" else {})
    files = [
        WeightsFile(name, "--face_encoder_path", folder / file, download, read=partial(read_tensors, folder / file))
        for name, file in names.items()
    ]
    with_models = dataclasses.replace(settings, antelopv2_path=antelopv2_path(settings, folder))
    return files + face_files(with_models, "--method consisid")


def antelopv2_path(settings: ConsisIDSettings, folder: Path) -> str | Path | None:
    """Where antelopev2 is: a whole release brings it among its face networks. None: in the usual place."""
    return settings.antelopv2_path or (folder if recognizer_is_there(folder) else None)


def choose(image, recognizer, retinaface, face_index: int | None, name: str) -> ChosenFace:
    """One face for everything: `face_index` from the left, or the largest, of the faces that antelopev2 finds, aligned
    by the points that RetinaFace gives the same face.

    Where RetinaFace does not see that face, antelopev2's points align it; where only RetinaFace sees a face, ArcFace is
    given RetinaFace's points. Both are said.

    Args:
        retinaface: None aligns by antelopev2's points.

    Raises:
        InputError: neither finds a face.
    """
    faces = recognizer(image)
    others = retinaface(image) if retinaface else []
    if not faces and not others:
        raise no_face(image, name)
    if not faces:
        face = choose_face(others, face_index, name)
        logger.warning(
            "antelopev2 finds no face in %s, RetinaFace does: its points are used for both; "
            "look at NAME.face0.png, or give a clearer near frontal photo",
            name,
        )
        return ChosenFace(recognizer.embed(image, face.keypoints), face.keypoints, face.keypoints, face.box)

    face = choose_face(faces, face_index, name)
    same = max(others, key=lambda other: intersection_over_union(face.box, other.box), default=None)
    if same is None or intersection_over_union(face.box, same.box) < SAME_FACE:
        if retinaface:
            logger.warning(
                "RetinaFace sees %s in %s where antelopev2 sees the face at (%s): aligned by antelopev2's points",
                "nothing" if not others else "another face, not one",
                name,
                ", ".join(f"{v:.0f}" for v in face.box),
            )
        same = face
    return ChosenFace(face.embedding, face.keypoints, same.keypoints, face.box)


def choose_as_upstream(image, recognizer, retinaface, name: str) -> ChosenFace:
    """The authors' rule: antelopev2's largest face for the identity vector, RetinaFace's most central one for the
    picture. In a photo of two people these may be both of them.

    Raises:
        InputError: RetinaFace finds no face.
    """
    faces, others = recognizer(image), retinaface(image)
    if not others:
        raise no_face(image, name)
    middle = numpy.array([image.shape[1], image.shape[0]]) / 2
    central = min(others, key=lambda face: numpy.hypot(*(numpy.add(face.box[:2], face.box[2:]) / 2 - middle)))
    if not faces:
        embedding = recognizer.embed(image, central.keypoints)
        return ChosenFace(embedding, central.keypoints, central.keypoints, central.box)
    largest = choose_face(faces, None, name)
    if intersection_over_union(largest.box, central.box) < SAME_FACE:
        logger.warning("the largest and the most central face of %s differ: two people are mixed", name)
    return ChosenFace(largest.embedding, largest.keypoints, central.keypoints, central.box)


def no_face(image, name: str) -> InputError:
    height, width = image.shape[:2]
    return InputError(f"no face found in {name} ({width}x{height}); ConsisID needs a photo with a near frontal face")


def condition(aligned, face: ChosenFace, parser: Callable, tower: torch.nn.Module) -> FaceCondition:
    """Whiten the aligned face's background, and look at it with EVA-CLIP, which is shown it in grey.

    Args:
        aligned: (512, 512, 3) uint8.
        parser: as `load_parser` gives it.
        tower: as `load_eva_tower` gives it.
    """
    color = white_background(aligned, parser(aligned, aligned_box(face)))  # (512, 512, 3) in [0, 1]
    device = next(tower.parameters()).device
    embedding, hidden = tower(clip_pixels(grey(color), tower.image_size).to(device))
    arcface = torch.from_numpy(face.embedding).float()[None]
    return FaceCondition(
        to_uint8(color),
        torch.cat([arcface, F.normalize(embedding.float().cpu())], dim=1),
        [states.cpu() for states in hidden],
        face.keypoints,
    )


def aligned_box(face: ChosenFace) -> tuple[float, float, float, float]:
    """Where the face's box comes to lie in the aligned picture, for a parser that starts from it."""
    x1, y1, x2, y2 = face.box
    corners = similarity_transform(face.landmarks) @ numpy.array([(x1, x2, x1, x2), (y1, y1, y2, y2), (1, 1, 1, 1)])
    return *corners.min(axis=1).tolist(), *corners.max(axis=1).tolist()


def clip_pixels(picture: numpy.ndarray, size: int) -> Tensor:
    """(S, S, 3) float in [0, 1] -> (1, 3, size, size), bicubic with antialiasing, by CLIP's statistics."""
    pixels = torch.from_numpy(picture).permute(2, 0, 1)[None]
    pixels = F.interpolate(pixels, (size, size), mode="bicubic", antialias=True)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return (pixels - mean) / std
