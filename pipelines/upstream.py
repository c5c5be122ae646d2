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
from argparse import ArgumentTypeError, Namespace
from collections.abc import Mapping
from pathlib import Path

from errors import InputError, UsageError, WeightsError

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


def truth(word: str) -> bool:
    """The value of a flag that upstream wants one for (and takes any for true, "False" too)."""
    known = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if word.lower() not in known:
        raise ArgumentTypeError(f"{word!r}: accepted are True and False")
    return known[word.lower()]


# ------------------------------------------------------------------------------------------------------- SVI's scripts

# Names that SVI's scripts have for flags of infer_long_video.py.
SVI_NAMES = {
    "--frames_per_clip": ("num_frames", int),
    "--num_steps": ("num_inference_steps", int),
    "--cfg_scale": ("guidance_scale", lambda scale: [float(scale)]),
    "--cfg_scale_text": ("guidance_scale", lambda scale: [float(scale)]),
    "--lora_alpha": ("lora_scale", lambda scale: [float(scale)]),
    "--seed_times": ("seed_multiplier", int),
    "--image_path": ("ref_image_path", str),
}
# … and those that are read by `read_svi_command`.
SVI_VALUES = {
    "--dit_root": str,
    "--extra_module_root": str,
    "--cfg_scale_audio": float,
    "--ref_pad_num": int,
    "--num_motion_latent": int,
    "--num_overlap_frame": int,
}
PADDING = {-1: "reference", 0: "grey"}  # --ref_pad_num -> Variant.padding
# (--ref_pad_num, --num_motion_frames) of the released LoRAs -> the first variant with them
VARIANTS_LIKE = {(-1, 1): "shot", (0, 5): "film", (0, 1): "tom"}
CLIPS = 10  # that test_svi.py makes at most, unless it is told a number


def add_svi_arguments(group) -> None:
    """All flags of SVI's inference scripts that infer_long_video.py does not have itself."""
    for name, (dest, kind) in SVI_NAMES.items():
        group.add_argument(name, dest=dest, type=kind, help=argparse.SUPPRESS)
    for name, kind in SVI_VALUES.items():
        group.add_argument(name, type=kind, help=argparse.SUPPRESS)
    group.add_argument("--test_samples", nargs="*", help=argparse.SUPPRESS)
    add_flags_without_effect(group, SVI)


def read_svi_command(args: Namespace) -> None:
    """Change `args` from what an SVI command says to what it means here.

    --dit_root and --extra_module_root are in commands of upstream's test_*.py alone: --output is a folder there, and
    the video ends with the prompts, after ten clips at most.

    Raises:
        UsageError: two names of one flag.
    """
    if args.prompt_prefix == "none":  # upstream's default, written out
        args.prompt_prefix = None
    for theirs, ours in (("dit_root", "base_path"), ("extra_module_root", "lora_path")):
        if getattr(args, theirs) is not None and getattr(args, ours) is not None:
            raise UsageError(f"--{theirs} is another name for --{ours}; give the one or the other")
    if args.dit_root is None and args.extra_module_root is None:
        return
    args.base_path = args.base_path or args.dit_root
    if args.extra_module_root is not None:
        args.lora_path = modules_in(Path(args.extra_module_root))
    if args.output is not None and Path(args.output).suffix.lower() != ".mp4":
        args.output_root, args.output = args.output_root or args.output, None
    args.prompt_repeat = args.prompt_repeat or "stop"
    if args.num_clips is None and args.audio_path is None and args.pose_path is None:
        args.num_clips = CLIPS


def variant_like(args: Namespace) -> str | None:
    """The variant with the conditioning that an SVI command describes; None where it is none of SVI's commands, or
    that of no released LoRA.
    """
    if args.extra_module_root is None:
        return None
    if args.audio_path is not None or args.pose_path is not None:
        return "talk" if args.audio_path is not None else "dance"
    pad = 0 if args.ref_pad_num is None else args.ref_pad_num  # upstream's defaults
    return VARIANTS_LIKE.get((pad, args.num_motion_frames or 1))


def conditioning_as_trained(args: Namespace, variant, motion_frames: int | None) -> int | None:
    """What an SVI command says of the conditioning, held against the `Variant`'s: its LoRA was trained with that, and
    loses the person under another. A line says of each value that differs what stays in its place.

    Returns:
        the handed-over frames that were asked for; None, the variant's own, where they differ.
    """
    another = "upstream would make another video with it"
    trained = f"--variant {variant.name} was trained with"
    if args.ref_pad_num is not None and PADDING.get(args.ref_pad_num) != variant.padding:
        padding = {**{name: f"{number}, which stays" for number, name in PADDING.items()}, "latents": "latents alone"}
        logger.warning(
            "--ref_pad_num %d has no effect: %s %s; %s", args.ref_pad_num, trained, padding[variant.padding], another
        )
    if args.num_motion_latent not in (None, variant.motion_latents):
        logger.warning(
            "--num_motion_latent %d has no effect: %s %d, which stays; %s",
            *(args.num_motion_latent, trained, variant.motion_latents, another),
        )
    if args.num_overlap_frame is not None and args.num_overlap_frame != (shared := variant.chain(81).overlap):
        logger.warning("--num_overlap_frame has no effect: clips share %d frames, which are shown once", shared)
    if args.cfg_scale_audio is not None and variant.driven_by != "audio":
        logger.warning("--cfg_scale_audio has no effect: --variant %s hears nothing", variant.name)
    if args.remove_pose and variant.driven_by != "pose":
        logger.warning("--remove_pose has no effect: --variant %s sees no poses", variant.name)
    of_svi = args.dit_root is not None or args.extra_module_root is not None
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

    root = args.data_root
    if root is None or args.ref_image_path is not None:
        for name in ("data_root", "test_samples") if root is not None else ("test_samples",):
            if getattr(args, name) is not None:
                why = "there is no --data_root" if root is None else "--ref_image_path says which picture"
                logger.warning("--%s has no effect: %s", name, why)
        return [args]
    if not Path(root).is_dir():
        raise InputError(f"--data_root {root}: no such folder; give one that holds a folder for each sample")
    if args.output is not None and Path(args.output).suffix.lower() == ".mp4":
        raise UsageError(f"--output {args.output} with --data_root: each sample has a video of its own; give a folder")
    there = sorted(folder.name for folder in Path(root).iterdir() if folder.is_dir())
    chosen = there if not args.test_samples else [name for name in args.test_samples if name in there]
    for name in set(args.test_samples or ()).difference(there):
        logger.warning("--test_samples %s: not in %s; the others are made", name, root)
    if not chosen:
        raise InputError(f"--data_root {root}: no samples there; each is a folder with a picture and prompt.txt")
    output = Path(args.output_root or args.output or "outputs")
    samples = []
    for name in chosen:
        given = vars(args) | {"data_root": None, "test_samples": None, "output_root": None}
        sample = Namespace(**given | {"output": str(output / f"{safe_name(name)}.mp4")})
        sample.ref_image_path = str(picture_in(Path(root) / name))
        if args.prompt is None and args.prompt_path is None:
            sample.prompt_path = str(Path(root) / name / "prompt.txt")
        samples.append(sample)
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
