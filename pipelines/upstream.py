"""The command lines of the original projects: what in them is said otherwise here, and what has no effect here.

    python infer_audio_avatar.py --config_path wan_civitai.yaml --motion_frame 25 --output_dir out …    StableAvatar's
    python infer_long_video.py --dit_root FOLDER --extra_module_root svi-film.safetensors …             SVI's

A flag of theirs that means something here works under its name. One that does not is accepted, and a line says why it
has no effect; where upstream would make another video with it, the line says that.

Source: StableAvatar `inference.py`, `inference.sh`, `multiple_gpu_inference.sh`; Stable-Video-Infinity `test_svi.py`,
`test_svi_talk.py`, `test_svi_dance.py`, `scripts/test/*.sh`; branch svi_wan22 `inference_svi_2.0.py`,
`inference_svi_2.0_pro.py`; Stand-In `infer.py`, `infer_with_lora.py`, `infer_face_swap.py`, `infer_with_vace.py`.
"""

import argparse
import logging
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from errors import InputError, UsageError, WeightsError
from pipelines.flags import given_by, setting

logger = logging.getLogger("selfsame")

UNUSED = "upstream does not use it either"
# flag -> how many values it takes (as argparse's nargs), and why it has no effect
STABLE_AVATAR: Mapping[str, tuple[int | str | None, str]] = {
    "--config_path": (None, "what it says is in configs/stableavatar-1.3B.yaml; --shift sets its shift"),
    "--motion_frame": (None, f"{UNUSED}: windows are joined by their overlap (--overlap_window_length)"),
    "--sample_shift": (None, f"{UNUSED}: its shift is 5; here --shift sets another"),
    "--input_perturbation": (None, UNUSED),
    "--revision": (None, UNUSED),
    "--variant": (None, UNUSED),
    "--offload_model": (0, f"{UNUSED}; see --memory"),
    "--t5_fsdp": (0, f"{UNUSED}; the text encoder is freed before the transformer loads"),
    "--t5_cpu": (0, f"{UNUSED}; --memory decides where the text encoder runs"),
}
SVI: Mapping[str, tuple[int | str | None, str]] = {
    "--train_architecture": (None, "the file of --extra_module_root tells by itself what it holds"),
    "--ref_pad_cfg": (0, "the released weights were trained with the first frame alone marked as given"),
    "--repeat_first_clip": (0, "the first clip is given the picture once, as the released weights were"),
    "--use_first_aug": (0, UNUSED),
    "--max_prompts_per_sample": (None, UNUSED),
    "--tile_size": ("+", f"{UNUSED}; --tiled decodes in tiles of this toolkit's size"),
    "--tile_stride": ("+", f"{UNUSED}; --tiled decodes in tiles of this toolkit's size"),
    "--num_persistent_param_in_dit": (None, "--memory decides how much of the model stays on the device"),
    "--use_latent_conditioning": (0, f"{UNUSED}: --variant 2.0-pro hands latents over"),
    "--num_motion_frame": (None, f"{UNUSED}: --variant 2.0-pro hands latents over"),
}


class WithoutEffect(argparse.Action):
    """Accepts a flag and its values, and says why they change nothing."""

    def __init__(self, *args, why: str, **options):
        super().__init__(*args, **options)
        self.why = why

    def __call__(self, parser, namespace, values, option_string=None):
        logger.warning("%s has no effect: %s", option_string, self.why)


def add_flags_without_effect(group, flags: Mapping[str, tuple[int | str | None, str]]) -> None:
    """Accept these; they are not in the parsed arguments, nor in --help."""
    for flag, (values, why) in flags.items():
        options = {"dest": argparse.SUPPRESS, "default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
        group.add_argument(flag, action=WithoutEffect, why=why, nargs=values, **options)


# ------------------------------------------------------------------------------------------------------- SVI's scripts


@dataclass(frozen=True, kw_only=True)
class SviCommand:
    """What SVI's scripts say that infer_long_video.py calls otherwise, or that its variants decide."""

    title: ClassVar[str] = "SVI's names"

    dit_root: str | None = setting("--base_path", None, metavar="FOLDER")
    extra_module_root: str | None = setting("--lora_path: one file, or a folder", None, metavar="PATH")
    cfg_scale_audio: float | None = setting("--audio_guidance_scale", None, low=0, high=100, shown="the variant's")
    ref_pad_num: int | None = setting("of --variant", None, low=-1, high=81, shown="the variant's")
    num_motion_latent: int | None = setting("of --variant", None, low=0, high=21, shown="the variant's")
    num_overlap_frame: int | None = setting("of --variant", None, low=0, high=81, shown="the variant's")
    test_samples: tuple[str, ...] = setting("some of --data_root's folders", (), metavar="NAME", shown="all")


PADDING = {-1: "reference", 0: "grey"}  # --ref_pad_num -> Variant.padding
# (--ref_pad_num, --num_motion_frames) of the released LoRAs -> the first variant with them
VARIANTS_LIKE = {(-1, 1): "shot", (0, 5): "film", (0, 1): "tom"}
CLIPS = 10  # that test_svi.py makes at most, unless it is told a number


def read_svi_command(given: Mapping[str, object]) -> Mapping[str, object]:
    """What was typed, from what an SVI command says to what it means here.

    --dit_root and --extra_module_root are in commands of upstream's test_*.py alone: --output is a folder there, and
    the video ends with the prompts, after ten clips at most.

    Raises:
        UsageError: two names of one flag.
    """
    if given.get("prompt_prefix") == "none":  # upstream's default, written out
        given = {name: value for name, value in given.items() if name != "prompt_prefix"}
    for theirs, ours in (("dit_root", "base_path"), ("extra_module_root", "lora_path")):
        if theirs in given and ours in given:
            raise UsageError(f"--{theirs} is another name for --{ours}; give the one or the other")
    if "dit_root" not in given and "extra_module_root" not in given:
        return with_output(given)
    said: dict[str, object] = {"prompt_repeat": "stop"}
    if not {"num_clips", "audio_path", "pose_path"} & given.keys():
        said["num_clips"] = CLIPS
    said |= given
    if "dit_root" in given:
        said["base_path"] = given["dit_root"]
    if "extra_module_root" in given:
        said["lora_path"] = modules_in(Path(given["extra_module_root"]))
    if "output" in given and Path(given["output"]).suffix.lower() != ".mp4":
        said.setdefault("output_root", said.pop("output"))
    return with_output(said)


def with_output(given: Mapping[str, object]) -> Mapping[str, object]:
    """What was typed, with the output that --output_root stands for: it is named after the video's picture.

    Raises:
        UsageError: two flags that say where to write.
    """
    from preprocess.output import safe_name  # here, because --help uses this file too

    if "output_root" not in given:
        return given
    if "output" in given:
        raise UsageError("--output_root and --output: give one; --output_root names the video after its picture")
    named = given.get("ref_image_path") or (given.get("ip_image") or ["video"])[0]
    return {**given, "output": str(Path(given["output_root"]) / f"{safe_name(Path(named).stem)}.mp4")}


def variant_like(given: Mapping[str, object]) -> str | None:
    """The variant with the conditioning that an SVI command describes; None where it is none of SVI's commands, or
    that of no released LoRA.
    """
    if "extra_module_root" not in given:
        return None
    if "audio_path" in given or "pose_path" in given:
        return "talk" if "audio_path" in given else "dance"
    return VARIANTS_LIKE.get((given.get("ref_pad_num", 0), given.get("num_motion_frames") or 1))  # upstream's defaults


def conditioning_as_trained(given: Mapping[str, object], variant, motion_frames: int | None) -> int | None:
    """What an SVI command says of the conditioning, held against the `Variant`'s: its LoRA was trained with that, and
    loses the person under another. A line says of each value that differs what stays in its place.

    Returns:
        the handed-over frames that were asked for; None, the variant's own, where they differ.
    """
    another = "upstream would make another video with it"
    trained = f"--variant {variant.name} was trained with"
    if (pad := given.get("ref_pad_num")) is not None and PADDING.get(pad) != variant.padding:
        padding = {**{name: f"{number}, which stays" for number, name in PADDING.items()}, "latents": "latents alone"}
        logger.warning("--ref_pad_num %d has no effect: %s %s; %s", pad, trained, padding[variant.padding], another)
    if given.get("num_motion_latent", variant.motion_latents) != variant.motion_latents:
        logger.warning(
            "--num_motion_latent %d has no effect: %s %d, which stays; %s",
            *(given["num_motion_latent"], trained, variant.motion_latents, another),
        )
    if given.get("num_overlap_frame", shared := variant.chain(81).overlap) != shared:
        logger.warning("--num_overlap_frame has no effect: clips share %d frames, which are shown once", shared)
    if "cfg_scale_audio" in given and variant.driven_by != "audio":
        logger.warning("--cfg_scale_audio has no effect: --variant %s hears nothing", variant.name)
    if "remove_pose" in given and variant.driven_by != "pose":
        logger.warning("--remove_pose has no effect: --variant %s sees no poses", variant.name)
    of_svi = "dit_root" in given or "extra_module_root" in given
    if of_svi and motion_frames not in (None, variant.motion_frames, *variant.motion_frames_too):
        logger.warning(
            "--num_motion_frames %d has no effect: %s %d, which stays; %s",
            *(motion_frames, trained, variant.motion_frames, another),
        )
        return None
    return motion_frames


def samples_of(args: Namespace) -> list[Namespace]:
    """The arguments of each video that a command makes: one, or one for each folder in --data_root (`test_svi.py`).
    The folder's picture and prompts make it, and it has the folder's name. --test_samples names some of them.

    Raises:
        UsageError: one file for the videos of a folder.
        InputError: no such folder, no samples, or one without a picture.
    """
    from preprocess.output import safe_name  # here, because --help uses this file too

    given = given_by(args)
    if "data_root" not in given or "ref_image_path" in given:
        for name in {"data_root", "test_samples"} & given.keys():
            why = "--ref_image_path says which picture" if "data_root" in given else "there is no --data_root"
            logger.warning("--%s has no effect: %s", name, why)
        return [args]
    root = given["data_root"]
    if not Path(root).is_dir():
        raise InputError(f"--data_root {root}: no such folder; give one that holds a folder for each sample")
    if Path(given.get("output", "")).suffix.lower() == ".mp4":
        raise UsageError(
            f"--output {given['output']} with --data_root: each sample has a video of its own; give a folder"
        )
    there = sorted(folder.name for folder in Path(root).iterdir() if folder.is_dir())
    wanted = given.get("test_samples") or there
    for name in set(wanted).difference(there):
        logger.warning("--test_samples %s: not in %s; the others are made", name, root)
    chosen = [name for name in wanted if name in there]
    if not chosen:
        raise InputError(f"--data_root {root}: no samples there; each is a folder with a picture and prompt.txt")
    output = Path(given.get("output_root") or given.get("output") or "outputs")
    samples = []
    for name in chosen:
        said = {"data_root": None, "test_samples": None, "output_root": None}
        said |= {"output": str(output / f"{safe_name(name)}.mp4"), "ref_image_path": str(picture_in(Path(root) / name))}
        if not {"prompt", "prompt_path"} & given.keys():
            said["prompt_path"] = str(Path(root) / name / "prompt.txt")
        samples.append(Namespace(**vars(args) | said))
    return samples


def picture_in(folder: Path) -> Path:
    """A sample's picture, as upstream finds it: frame.jpg, else frame.png, else the first JPEG, else the first PNG.

    Raises:
        InputError: there is none.
    """
    for pattern in ("frame.jpg", "frame.png", "*.jp*g", "*.png"):
        if found := sorted(folder.glob(pattern)):
            return found[0]
    raise InputError(f"--data_root: no picture in {folder}; put a frame.jpg or frame.png there")


def modules_in(path: Path) -> list[str]:
    """--extra_module_root is a file, or a folder whose safetensors files are all applied.

    Raises:
        WeightsError: there is nothing.
    """
    if not path.exists():
        raise WeightsError(
            f"--extra_module_root {path}: no such file; download_models.py --only svi-shot (or -film, -tom, …) puts "
            "them into checkpoints/Stable-Video-Infinity"
        )
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else []
    return [str(file) for file in files or [path]]
