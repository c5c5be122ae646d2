"""The flags that the scripts share. A flag that is not given is None: its value comes from --config, then from
`pipelines.settings.Settings`, where every default is.
"""

import argparse


def add_common_arguments(parser: argparse.ArgumentParser, identity: bool = True) -> None:
    """Everything that concerns prompts, photos, sampling, weights and the machine.

    Args:
        identity: the script's models can show the person of a photo (Stand-In's, text to video).
    """
    what = parser.add_argument_group("what to make")
    what.add_argument(
        "--prompt",
        nargs="+",
        action="extend",
        metavar="TEXT",
        help="one or several, in any language; @FILE: one a line",
    )
    if identity:
        what.add_argument(
            "--ip_image", nargs="+", action="extend", metavar="PHOTO", help="photo (path or URL) of each person"
        )
    what.add_argument("--negative_prompt", metavar="TEXT")
    what.add_argument("--output", metavar="FILE", help="mp4; with several prompts or seeds their numbers are added")
    what.add_argument("--overwrite", action="store_true", default=None, help="replace an existing output")
    what.add_argument("--height", type=int)
    what.add_argument("--width", type=int)
    what.add_argument("--num_frames", type=int, help="4n+1")
    what.add_argument("--fps", type=float)
    what.add_argument("--quality", type=float, help="1 to 10 (9)")
    what.add_argument("--preview", action="store_true", default=None, help="write NAME.preview.png after each step")

    how = parser.add_argument_group("how to sample")
    how.add_argument("--seed", type=int, nargs="+", action="extend", help="one or several (0)")
    how.add_argument("--num_inference_steps", type=int)
    how.add_argument(
        "--guidance_scale", type=float, nargs="+", action="extend", help="1: off. Wan2.2: high- and low-noise expert"
    )
    how.add_argument("--shift", type=float)
    how.add_argument("--solver", help="euler, euler-flow, unipc, dpm++")
    how.add_argument(
        "--timesteps", type=float, nargs="+", action="extend", help="a distilled model's own, before the shift"
    )
    how.add_argument("--step_cache", help="none, teacache, first_block: skip steps that change little (lossy)")
    how.add_argument("--step_cache_threshold", type=float, help="larger skips more (0.1)")

    if identity:
        face = parser.add_argument_group("identity")
        face.add_argument("--identity_strength", type=float, help="of Stand-In's weights: 1 as trained, 0 without them")
        face.add_argument("--identity_start", type=float, help="share of the steps before the identity sets in (0)")
        face.add_argument("--identity_end", type=float, help="share of the steps after which it ends (1)")
        face.add_argument("--face_index", type=int, help="which face, from the left (default: the largest)")
        face.add_argument("--allow_no_face", action="store_true", default=None, help="use the whole photo without one")
        face.add_argument("--no_face_crop", action="store_true", default=None, help="whole photo; non-human subjects")

    weights = parser.add_argument_group("weights")
    weights.add_argument("--config", help="name or file of configs/, or the JSON of an earlier run (tiny)")
    if identity:
        weights.add_argument("--wan_version", help="2.1 or 2.2: short for --config stand-in-wan2.1 or stand-in-wan2.2")
    weights.add_argument("--base_path", help="the model's folder (original or Diffusers layout), or transformer file")
    weights.add_argument("--vae_path")
    weights.add_argument("--text_encoder_path", help="umT5: folder or file, ComfyUI's included")
    weights.add_argument("--tokenizer_path", help="umT5's: folder, tokenizer.json or spiece.model")
    weights.add_argument("--image_encoder_path", help="CLIP, of image-to-video models")
    weights.add_argument("--antelopv2_path", help="folder of the face detector")
    if identity:
        weights.add_argument("--stand_in_path", help="Stand-In's file, or the folder it is in")
        weights.add_argument("--face_parser_path", help="parsing_bisenet.pth")

    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", help="auto, cpu, cuda, cuda:N, mps")
    machine.add_argument("--noise_device", help="cpu (a seed means the same everywhere); cuda: as upstream draws it")
    machine.add_argument("--dtype", help="auto, bf16, fp16, fp32: of the transformer")
    machine.add_argument("--vae_dtype", help="auto (fp32), bf16, fp16, fp32")
    machine.add_argument(
        "--attention_backend", help="auto (native; for SVI 2 flash), or of diffusers: native, flash, sage, …"
    )
    machine.add_argument(
        "--memory", help="auto (the fastest that fits), or resident, model, group, sequential: faster to smaller"
    )
    machine.add_argument("--fp8", action="store_true", default=None, help="store the blocks' weights in float8")
    machine.add_argument("--tiled", action="store_true", default=None, help="decode in tiles")
    machine.add_argument("--compile", action="store_true", default=None, help="compile the blocks")
    machine.add_argument("--ulysses_degree", type=int, help="split one video over processes by heads")
    machine.add_argument("--ring_degree", type=int, help="… by ring attention")


def add_consis_id_arguments(parser: argparse.ArgumentParser) -> None:
    """What only ConsisID has; `pipelines.consis_id.settings.ConsisIDSettings` has the defaults."""
    consis_id = parser.add_argument_group("--method consisid")
    consis_id.add_argument("--face_encoder_path", help="folder of RetinaFace and EVA-CLIP (BASE_PATH/face_encoder)")
    consis_id.add_argument("--face_detector", help="whose points align the face: retinaface (as trained), scrfd")
    consis_id.add_argument("--face_select", help="one: one face for all networks; upstream: the authors' two rules")


def add_instant_id_arguments(parser: argparse.ArgumentParser) -> None:
    """Pictures by InstantID; `pipelines.instant_id.settings` has their defaults and rules."""
    identity = parser.add_argument_group("InstantID (pictures, and first frames of videos)")
    identity.add_argument("--sdxl_path", help="any SDXL model: Diffusers folder or single file")
    identity.add_argument("--instantid_path", help="folder with ControlNetModel/ and ip-adapter.bin")
    identity.add_argument("--ip_adapter_scale", type=float, help="of the face tokens; lower if over-saturated (0.8)")
    identity.add_argument(
        "--controlnet_conditioning_scale", type=float, help="of IdentityNet; with the other, more likeness (0.8)"
    )
    identity.add_argument("--face_height", type=float, help="of the face, as a share of the picture's height (0.35)")
    identity.add_argument(
        "--face_centre", type=float, nargs=2, metavar=("X", "Y"), help="of the face, as shares (0.5 0.38)"
    )
    identity.add_argument("--face_roll", type=float, help="tilt of the head in degrees, clockwise (0)")
    identity.add_argument("--pose_image", metavar="FILE", help="put the face where the one in this picture is")
    identity.add_argument("--control_guidance_end", type=float, help="share of the steps with IdentityNet (1)")
    identity.add_argument(
        "--region_mask", action="store_true", default=None, help="act on the face only: for prompts with a scene"
    )


def add_image_to_video_arguments(parser: argparse.ArgumentParser) -> None:
    """A picture to start from; `pipelines.text_to_video.settings` has the defaults and rules."""
    start = parser.add_argument_group("image-to-video")
    start.add_argument("--image", metavar="FILE", help="the first frame; the video keeps its shape")
    start.add_argument("--last_image", metavar="FILE", help="the last frame, of models from one picture to another")
    add_first_frame_arguments(start)


def add_first_frame_arguments(group) -> None:
    """A first frame made from a photo; for an argument group (or the parser)."""
    group.add_argument("--first_frame", metavar="METHOD", help="instantid: make the first frame from --ip_image")
    group.add_argument("--first_frame_prompt", metavar="TEXT", help="its scene, where it is not the video's prompt")
    group.add_argument("--first_frame_seed", type=int, help="(0)")


def add_picture_arguments(parser: argparse.ArgumentParser) -> None:
    """What only --method instantid has."""
    picture = parser.add_argument_group("InstantID pictures")
    picture.add_argument("--controlnet", nargs="+", action="extend", metavar="FOLDER", help="further ControlNets")
    picture.add_argument("--control_image", nargs="+", action="extend", metavar="FILE", help="their pictures")
    picture.add_argument("--control_scale", nargs="+", action="extend", type=float, help="one for all, or each (1)")
    picture.add_argument("--lcm", action="store_true", default=None, help="few steps, by a LoRA (5, guidance 1.5)")
    picture.add_argument("--lcm_lora_path", metavar="FILE")
    picture.add_argument(
        "--prompt_weighting", action="store_true", default=None, help="understand (word), [word] and (word:1.4)"
    )
