"""The command lines of the original projects: what in them is said otherwise here, and what has no effect here.

    python infer_audio_avatar.py --config_path wan_civitai.yaml --motion_frame 25 --output_dir out …    StableAvatar's
    python infer_long_video.py --dit_root FOLDER --extra_module_root svi-film.safetensors …             SVI's

A flag of theirs that means something here works under its name. One that does not is accepted, and a line says why it
has no effect. One that would make another video than the one that is made here is refused.

Source: StableAvatar `inference.py`, `inference.sh`, `multiple_gpu_inference.sh`; Stable-Video-Infinity `test_svi.py`,
`test_svi_talk.py`, `test_svi_dance.py`, `scripts/test/*.sh`; branch svi_wan22 `inference_svi_2.0.py`,
`inference_svi_2.0_pro.py`; Stand-In `infer.py`, `infer_with_lora.py`, `infer_face_swap.py`, `infer_with_vace.py`.
"""

import argparse
import logging
from argparse import ArgumentTypeError, Namespace
from collections.abc import Mapping
from pathlib import Path

from errors import UsageError, WeightsError

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
    "--test_samples": ("*", "a run makes one sample; README has the loop for a folder of them"),
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
    "--data_root": str,
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
    group.add_argument("--remove_pose", action="store_true", default=None, help=argparse.SUPPRESS)
    add_flags_without_effect(group, SVI)


def read_svi_command(args: Namespace) -> None:
    """Change `args` from what an SVI command says to what it means here.

    --dit_root and --extra_module_root are in commands of upstream's test_*.py alone: --output is a folder there, and
    the video ends with the prompts, after ten clips at most.

    Raises:
        UsageError: two names of one flag; what would make another video here.
    """
    if args.remove_pose:
        raise UsageError("--remove_pose: clips that no pose drives are made by --variant shot; leave --pose_path out")
    if args.data_root is not None and args.ref_image_path is None:
        raise UsageError(
            f"--data_root {args.data_root}: a run makes one sample: --ref_image_path {args.data_root}/NAME/frame.jpg "
            f"--prompt_path {args.data_root}/NAME/prompt.txt; README has the loop over a folder"
        )
    if args.data_root is not None:
        logger.warning("--data_root has no effect: --ref_image_path says which picture, as in upstream's script")
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


def check_conditioning(args: Namespace, variant) -> None:
    """Whether the conditioning that an SVI command describes is the `Variant`'s, with which its LoRA was trained.

    Raises:
        UsageError: it is not; the LoRA would lose the person.
    """
    trained = f"--variant {variant.name} was trained otherwise (configs/svi-*.yaml say how)"
    if args.ref_pad_num is not None and PADDING.get(args.ref_pad_num) != variant.padding:
        raise UsageError(f"--ref_pad_num {args.ref_pad_num}: {trained}; give another --variant, or leave it out")
    if args.num_motion_latent not in (None, variant.motion_latents):
        raise UsageError(f"--num_motion_latent {args.num_motion_latent}: {trained}; leave it out")
    if args.num_overlap_frame is not None and args.num_overlap_frame != (shared := variant.chain(81).overlap):
        logger.warning("--num_overlap_frame has no effect: clips share %d frames, which are shown once", shared)
    if args.cfg_scale_audio is not None and variant.driven_by != "audio":
        logger.warning("--cfg_scale_audio has no effect: --variant %s hears nothing", variant.name)


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
