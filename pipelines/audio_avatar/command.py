"""From a command, upstream's too, to the settings of a talking avatar and its sound. Without torch."""

import dataclasses
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path

import numpy

from errors import UsageError
from pipelines.audio_avatar.settings import DEMONSTRATION, GPU_MEMORY_MODES, AvatarCommand, AvatarSettings
from pipelines.checks import check_pictures
from pipelines.flags import given_by, without_words, words_of
from pipelines.lora_command import resolve_lora_settings
from preprocess.audio import AudioTimeline, read_audio
from preprocess.output import safe_name

SOLVERS = ("euler-flow", "euler")


def resolve_avatar(args: Namespace) -> tuple[AvatarSettings, dict, numpy.ndarray]:
    """Settings, config, and the sound: mono samples at 16 kHz, (N,) float32.

    Raises:
        UsageError: values out of bounds, or a combination that makes no sense.
        InputError: a sound or a picture that cannot be used.
    """
    given = translated(given_by(args))
    if "config" not in given:
        real = {"base_path", "transformer_path"} & given.keys()
        given |= {"config": "stableavatar-1.3B" if real else "tiny-avatar"}
    settings, config = resolve_lora_settings(given, AvatarSettings, required=False)
    settings = with_demonstration(settings, config)
    check_avatar(settings, given)
    if settings.fsdp_dit:
        settings = dataclasses.replace(settings, memory="resident")
    samples = read_audio(settings.audio)
    AudioTimeline(len(samples), settings.fps)  # less than a frame is refused
    return settings, config, samples


def translated(given: Mapping[str, object]) -> dict[str, object]:
    """What was typed, with the toolkit's words for upstream's.

    Raises:
        UsageError: flags that mean nothing here, or that contradict each other.
    """
    words = words_of(AvatarCommand, given)
    if words.identity:
        raise UsageError(
            f"--identity {words.identity[0]}: Stand-In's features are for text-to-video models; here the person is the "
            "one of --reference_image"
        )
    if words.guidance_scale:
        raise UsageError("--guidance_scale: here are two, --sample_text_guide_scale and --sample_audio_guide_scale")
    said = {}
    if words.GPU_memory_mode is not None:
        if "memory" in given or "fp8" in given:
            raise UsageError("--GPU_memory_mode is another name for --memory and --fp8; give the one or the other")
        said |= GPU_MEMORY_MODES[words.GPU_memory_mode]
    if words.enable_teacache:
        if (cache := given.get("step_cache", "teacache")) != "teacache":
            raise UsageError(f"--enable_teacache and --step_cache {cache} contradict each other; give one")
        said["step_cache"] = "teacache"
    if words.output_dir is not None:
        if "output" in given:
            raise UsageError("--output_dir and --output: give one; --output_dir names the video after its photo")
        photo = given.get("reference_image", DEMONSTRATION["reference_image"])
        said["output"] = str(Path(words.output_dir) / f"{safe_name(Path(photo).stem)}.mp4")
    return without_words(AvatarCommand, given) | said


def with_demonstration(settings: AvatarSettings, config: dict) -> AvatarSettings:
    """The tiny model has a photo and a speech to show itself with; others are told."""
    missing = [name for name in DEMONSTRATION if getattr(settings, name) is None]
    if missing and not config.get("tiny"):
        raise UsageError(f"--{missing[0]}: give " + ("the person's photo" if missing[0] != "audio" else "what is said"))
    return dataclasses.replace(settings, **{name: DEMONSTRATION[name] for name in missing})


def check_avatar(settings: AvatarSettings, given: Mapping[str, object]) -> None:
    """Combinations of what only a talking avatar has.

    Raises:
        UsageError, InputError.
    """
    if settings.solver not in SOLVERS:
        raise UsageError(
            f"--solver {settings.solver}: accepted are {', '.join(SOLVERS)}; windows are fused after each step, which "
            "solvers with a history cannot take"
        )
    if settings.audio_native_guidance is not None and len(settings.audio_native_guidance) != 2:
        raise UsageError("--audio_native_guidance: two weights, of the audio and of the latent-audio pair; 2 2 to try")
    if settings.audio_native_guidance is not None and "sample_audio_guide_scale" in given:
        raise UsageError("--sample_audio_guide_scale: --audio_native_guidance takes its place; give one")
    if settings.window < 2:
        raise UsageError(f"--clip_sample_n_frames {settings.num_frames}: accepted are 5 or more, 81 as trained")
    if not 1 <= settings.overlap < settings.window:
        raise UsageError(
            f"--overlap_window_length {settings.overlap}: accepted are 1 to {settings.window - 1}, less than the "
            f"{settings.window} latent frames of a window (--clip_sample_n_frames {settings.num_frames})"
        )
    if settings.step_cache != "teacache":
        for name in ("num_skip_start_steps", "teacache_offload"):
            if name in given:
                raise UsageError(f"--{name}: only with --step_cache teacache")
    if settings.fsdp_dit and settings.ulysses_degree * settings.ring_degree == 1:
        raise UsageError("--fsdp_dit shards the weights over the processes of --ulysses_degree or --ring_degree")
    if settings.fsdp_dit and (settings.memory not in ("auto", "model", "resident") or settings.fp8 or settings.compile):
        raise UsageError("--fsdp_dit keeps the weights on the devices as they are: no --memory, --fp8 or --compile")
    check_pictures(reference_image=(settings.reference_image,))
