"""Pictures of a person by InstantID: a photo and prompts to PNG files, one job a prompt and seed."""

import copy
import gc
import hashlib
import logging
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.single_file_utils import SingleFileComponentError
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from configs import download_command, load_config, part_path
from errors import InputError, WeightsError
from models.identity.instant_id import (
    attach_face_adapter,
    controlnet_weights,
    generate,
    load_controlnet,
    read_face_adapter,
)
from models.prompt_weighting import weighted_embeddings
from models.wan.checkpoint import read_tensors
from pipelines.conditions import cover_resize
from pipelines.instant_id.sdxl_files import check_sdxl, empty_network, is_half_precision, layout_of, sdxl_files
from pipelines.instant_id.settings import (
    FACE_CENTRE,
    FACE_HEIGHT,
    FACE_ROLL,
    InstantIdSettings,
    instantid_folder,
    sdxl_path,
)
from pipelines.jobs import Job
from pipelines.memory import free_cached, place_pipeline, stage
from pipelines.needs import Needs, needs_of_parts
from pipelines.record import describe_run
from pipelines.wan import DTYPES
from pipelines.weights import WeightsFile, check_weights, face_files
from preprocess.face import choose_face
from preprocess.image import read_image
from preprocess.keypoints import box_mask, draw_keypoints, frame_face, resize_picture
from preprocess.picture_writer import write_picture
from preprocess.progress_bars import ProgressBars

logger = logging.getLogger("selfsame")

# Bytes beside the weights that a picture of a megapixel takes, at most while it is decoded in float32.
DRAWING = 7 * 2**29

# Values of the released parts, and of the largest layer (text_encoder_2's table of tokens).
RELEASED = {
    "unet": 2_567_463_684 + 423_000_000,  # with the face adapter
    "controlnet": 1_251_014_160,
    "text_encoder": 123_060_480,
    "text_encoder_2": 694_659_840,
    "vae": 83_653_863,
}
LARGEST_LAYER = 49408 * 1280


def needs_of_release(itemsize: int) -> Needs:
    """What a picture of a megapixel takes with SDXL 1.0, before anything is loaded."""
    return needs_of_parts(
        {name: count * itemsize for name, count in RELEASED.items()}, LARGEST_LAYER * itemsize, DRAWING
    )


# -------------------------------------------------------------------------------------------------------- the face


@dataclass(frozen=True, eq=False)
class FaceGuide:
    """What InstantID is told of a person."""

    embedding: numpy.ndarray  # (512,) float32, ArcFace's, not normalised
    keypoints: numpy.ndarray  # (5, 2), in pixels of the picture to make
    box: tuple[float, float, float, float]  # where the face is there
    size: tuple[int, int]  # height, width of the picture to make

    @property
    def drawn(self) -> numpy.ndarray:
        return draw_keypoints(self.keypoints, *self.size)

    @property
    def region(self) -> numpy.ndarray:
        return box_mask(self.box, *self.size)

    def as_dict(self) -> dict:
        return {
            "embedding_sha256": hashlib.sha256(self.embedding.tobytes()).hexdigest(),
            "keypoints": numpy.round(numpy.asarray(self.keypoints, numpy.float64), 2).tolist(),
            "box": [round(value, 2) for value in self.box],
        }


def guide_face(settings: InstantIdSettings, recognizer) -> FaceGuide:
    """Whose face, and where: in the photo's own place, in the pose picture's, or framed as the settings say.

    Raises:
        InputError: a picture without a face, or that cannot be read.
    """
    photo = resize_picture(read_image(settings.ip_image[0], "--ip_image"))
    person = find_face(photo, recognizer, settings.ip_image[0], settings.face_index)
    size, placed = photo.shape[:2], person
    if settings.pose_image is not None:
        pose = read_image(settings.pose_image, "--pose_image")
        pose = resize_picture(pose) if settings.height is None else cover_resize(pose, settings.width, settings.height)
        placed, size = find_face(pose, recognizer, settings.pose_image), pose.shape[:2]
    elif settings.framed:
        size = size if settings.height is None else (settings.height, settings.width)
        keypoints, box = frame_face(
            person.keypoints,
            person.box,
            *size,
            face_height=FACE_HEIGHT if settings.face_height is None else settings.face_height,
            center=FACE_CENTRE if settings.face_centre is None else settings.face_centre,
            roll=FACE_ROLL if settings.face_roll is None else settings.face_roll,
        )
        return FaceGuide(person.embedding, keypoints, box, size)
    return FaceGuide(person.embedding, placed.keypoints, placed.box, size)


def find_face(picture: numpy.ndarray, recognizer, name: str, face_index: int | None = None):
    """The largest face, or the chosen one."""
    faces = recognizer(picture)
    if not faces:
        raise InputError(f"no face found in {name}; InstantID needs one: give a near frontal photo of one person")
    return choose_face(faces, face_index, name)


# ------------------------------------------------------------------------------------------------------- the weights


def check_files(settings: InstantIdSettings, config: dict) -> None:
    """Say all that is missing or wrong before anything is loaded.

    Raises:
        WeightsError: with the command that fetches it.
    """
    for folder in settings.controlnet:
        if not Path(folder).is_dir():
            raise WeightsError(f"--controlnet {folder}: no such folder; give a ControlNet for SDXL in Diffusers layout")
    check_weights(needed_files(settings, config, "--method instantid"))


def needed_files(settings: InstantIdSettings, config: dict, needed_by: str) -> list[WeightsFile]:
    """`weights_of` with SDXL as the one thing it is, found or not, and the face models."""
    path = sdxl_path(settings, config)
    name = "sdxl-layout" if path.is_file() else config["base"]["name"] if config["base"] else None
    sdxl = WeightsFile("SDXL", "--sdxl_path", path, name, read=partial(check_sdxl, path))
    others = [file for file in weights_of(settings, config) if file.name != "SDXL"]
    return [sdxl, *others, *face_files(settings, needed_by)]


def identity_net_path(settings: InstantIdSettings, config: dict) -> Path:
    return instantid_folder(settings, config) / "ControlNetModel"


def face_adapter_path(settings: InstantIdSettings, config: dict) -> Path:
    return instantid_folder(settings, config) / config["files"]["face_adapter"]


def lcm_path(settings: InstantIdSettings) -> Path:
    return Path(settings.lcm_lora_path or part_path(load_config("lcm-lora-sdxl"), "lora"))


def load_instant_id(settings: InstantIdSettings, config: dict, device: torch.device) -> DiffusionPipeline:
    """SDXL with IdentityNet and the face adapter, placed by the memory mode.

    Raises:
        WeightsError: files that are missing, damaged or of another model.
    """
    # transformers would note that it runs without torchvision, which nothing here needs.
    for library in (transformers_logging, diffusers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    dtype = DTYPES.get(settings.dtype, torch.float32 if device.type == "cpu" else torch.float16)
    hint = download_command(config)
    nets = [load_controlnet(identity_net_path(settings, config), dtype=dtype, hint=hint)]
    nets += [load_controlnet(folder, dtype=dtype) for folder in settings.controlnet]
    pipeline = load_sdxl(sdxl_path(settings, config), nets if len(nets) > 1 else nets[0], dtype, config["base"])
    if settings.lcm:
        use_lcm(pipeline, lcm_path(settings))
    adapter = face_adapter_path(settings, config)
    attach_face_adapter(pipeline.unet, read_face_adapter(adapter, hint=hint), source=adapter)
    if settings.tiled:
        pipeline.vae.enable_tiling()
    pipeline.set_progress_bar_config(dynamic_ncols=True, unit="step", disable=None)  # None: on a terminal
    place_pipeline(pipeline, device, settings.memory, DRAWING)
    return pipeline


def load_sdxl(path: Path, controlnet, dtype: torch.dtype, base: dict | None) -> DiffusionPipeline:
    """Any SDXL model: a folder in Diffusers layout, or one file (whose layout and tokenizers are the base's).

    Raises:
        WeightsError: not an SDXL model, or incomplete.
    """
    from diffusers import StableDiffusionXLControlNetPipeline  # not before the notes above are switched off

    options = {"controlnet": controlnet, "dtype": dtype, "local_files_only": True, "add_watermarker": False}
    try:
        if path.is_file():
            layout = layout_of(path)
            if not (layout / "model_index.json").is_file():
                command = download_command(load_config("sdxl-layout"))
                raise WeightsError(f"{path}: one file needs the layout of SDXL in {layout}; {command}")
            return StableDiffusionXLControlNetPipeline.from_single_file(str(path), config=str(layout), **options)
        if is_half_precision(path):
            options["variant"] = "fp16"
        return StableDiffusionXLControlNetPipeline.from_pretrained(path, **options)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SingleFileComponentError) as error:
        reason = " ".join(str(error).split())[:200]
        hint = download_command(base) if base else "give another --sdxl_path"
        raise WeightsError(f"{path}: not a whole SDXL model ({reason}); {hint}") from error


def weights_of(settings: InstantIdSettings, config: dict) -> list[WeightsFile]:
    """All that is read."""

    def net(name: str, flag: str, folder: str | Path, download: str | None = None) -> WeightsFile:
        read = partial(check_controlnet, folder, sdxl_path(settings, config))
        return WeightsFile(name, flag, controlnet_weights(folder), download, read=read)

    adapter, lcm = face_adapter_path(settings, config), lcm_path(settings)
    files = [WeightsFile("SDXL", "--sdxl_path", file) for file in sdxl_files(sdxl_path(settings, config))]
    files.append(net("IdentityNet", "--instantid_path", identity_net_path(settings, config), config["name"]))
    files += [net("ControlNet", "--controlnet", folder) for folder in settings.controlnet]
    read = partial(check_face_adapter, adapter, sdxl_path(settings, config))
    files.append(WeightsFile("face adapter", "--instantid_path", adapter, config["name"], read=read))
    if settings.lcm:
        read = partial(read_tensors, lcm)
        files.append(WeightsFile("LCM LoRA", "--lcm_lora_path", lcm, "lcm-lora-sdxl", read=read))
    return files


def check_controlnet(folder: str | Path, sdxl: Path) -> None:
    """Whether it is a whole ControlNet, and for such a UNet where that can be told; by headers.

    Raises:
        WeightsError: it is not, or of another base.
    """
    net = load_controlnet(folder, dtype=None)
    try:
        wanted = empty_network(layout_of(sdxl), "unet").config.cross_attention_dim
    except WeightsError:
        return  # said of SDXL itself
    if (width := net.config.cross_attention_dim) != wanted:
        raise WeightsError(f"{folder}: a ControlNet for text of width {width}, SDXL's UNet here reads {wanted}")


def check_face_adapter(path: Path, sdxl: Path) -> None:
    """Whether it is InstantID's, and fits the UNet where that can be told; by headers.

    Raises:
        WeightsError: it is not, or of another base.
    """
    parts = read_face_adapter(path)
    try:
        unet = copy.deepcopy(empty_network(layout_of(sdxl), "unet"))
    except WeightsError:
        return  # said of SDXL itself
    attach_face_adapter(unet, parts, source=path)


def describe_picture(settings: InstantIdSettings, config: dict, prompt: str, seed: int) -> dict:
    """The record of one picture, as far as it is known before anything is read."""
    return describe_run(settings, prompt, seed, config, weights_of(settings, config))


def use_lcm(pipeline: DiffusionPipeline, path: Path) -> None:
    """Merge a distilled LoRA into the base and sample as it was trained.

    Raises:
        WeightsError: the file is no LoRA, or one of another model.
    """
    from diffusers import LCMScheduler

    tensors = read_tensors(path)
    try:
        pipeline.load_lora_weights(tensors)
        loaded = sum("lora_" in name for name, _ in pipeline.unet.named_parameters())
        if loaded != sum(not name.endswith(".alpha") for name in tensors):
            raise ValueError(f"{loaded} of its {len(tensors)} tensors fit")
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
    except (ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise WeightsError(f"{path}: not a LoRA of this SDXL's UNet ({reason})") from error
    pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)


# ------------------------------------------------------------------------------------------------------- the pictures


class PictureMaker:
    """Makes jobs one after another with parts loaded once.

    Args:
        settings, config: from `resolve_instant_id`.
        guide: from `guide_face`.
        device: where to draw.
    """

    def __init__(self, settings: InstantIdSettings, config: dict, guide: FaceGuide, device: torch.device):
        self.settings, self.config, self.guide, self.device = settings, config, guide, device
        self.bars = ProgressBars()
        self.controls = [
            cover_resize(read_image(picture, "--control_image"), guide.size[1], guide.size[0])
            for picture in settings.control_image
        ]
        self.pipeline = load_instant_id(settings, config, self.device)

    def make(self, job: Job) -> Path:
        """Sample the picture and write it, whole or not at all."""
        started = time.monotonic()
        picture = self.sample(job.prompt, job.seed)
        write_picture(job.output, picture, self.metadata(job))
        logger.info("%s: %dx%d in %.1f s", job.output, *picture.shape[1::-1], time.monotonic() - started)
        return job.output

    def sample(self, prompt: str, seed: int) -> numpy.ndarray:
        """(H, W, 3) uint8.

        Raises:
            WeightsError: NaN or infinity on the way; written, they would be black.
        """
        settings, guide = self.settings, self.guide
        text = {"prompt": prompt, "negative_prompt": settings.negative_prompt}
        scales, ends = settings.controlnet_conditioning_scale, settings.control_guidance_end
        if count := len(self.controls):
            others = settings.control_scale * count if len(settings.control_scale) == 1 else settings.control_scale
            scales, ends = [scales, *others], [ends, *[1.0] * count]

        def on_step(pipe: DiffusionPipeline, step: int, timestep: torch.Tensor, tensors: dict) -> dict:
            if not tensors["latents"].isfinite().all():
                raise WeightsError(
                    f"the model returned NaN or infinity at step {step + 1} of {settings.num_inference_steps} "
                    f"({pipe.unet.dtype}); try --dtype fp32"
                )
            return {}

        with stage("drawing the picture", "try --memory sequential, --tiled or a smaller size"):
            if settings.prompt_weighting:
                text = weighted_embeddings(self.pipeline, prompt, settings.negative_prompt)
            result = generate(
                self.pipeline,
                guide.embedding,
                guide.drawn,
                ip_adapter_scale=settings.ip_adapter_scale,
                controls=self.controls,
                region=guide.region if settings.region_mask else None,
                guidance_scale=settings.guidance_scale[0],
                num_inference_steps=settings.num_inference_steps,
                controlnet_conditioning_scale=scales,
                control_guidance_end=ends,
                height=guide.size[0],
                width=guide.size[1],
                generator=torch.Generator("cpu").manual_seed(seed),  # a seed means the same on every device
                output_type="np",
                callback_on_step_end=on_step,
                **text,
            )
        picture = result.images[0]  # (H, W, 3) in [0, 1]
        if not numpy.isfinite(picture).all():
            raise WeightsError(f"the VAE returned NaN or infinity ({self.pipeline.vae.dtype}); try --dtype fp32")
        return (255 * picture).round().astype(numpy.uint8)

    def metadata(self, job: Job) -> dict:
        """What makes this picture this picture: enough to make it again. `settings` is what --config accepts."""
        return describe_picture(self.settings, self.config, job.prompt, job.seed) | {
            "face": self.guide.as_dict(),
            "size": {"height": self.guide.size[0], "width": self.guide.size[1]},
            "scheduler": type(self.pipeline.scheduler).__name__,
            "device": self.device.type,
            "dtype": str(self.pipeline.unet.dtype).removeprefix("torch."),
        }

    def free(self) -> None:
        """Give the pipeline's memory back. Hooks tie its parts into cycles, which only gc finds."""
        self.pipeline.remove_all_hooks()
        del self.pipeline
        gc.collect()
        free_cached(self.device)
