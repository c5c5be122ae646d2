"""Videos of a run that is training: what its weights make, by the scripts that the exported files are for.

Each is made in a process of its own, from files as `training.export` writes them. So nothing of the run is touched (its
draws and its threads; its weights wait on the CPU), what is seen is what users will see, and a video that fails costs a
warning and not the run.
"""

import contextlib
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import nn

from configs import load_config
from pipelines.networks import family_of
from preprocess.face_detection import recognizer_is_there
from preprocess.record import read_metadata
from training.config import Config, ValidationSample
from training.encoders import encoders_of
from training.export import export
from training.loop import Run, wait, weights_to_use

logger = logging.getLogger("selfsame")

PROJECT = Path(__file__).parent.parent
CLIPS = 2  # of a long video: enough to see how one is handed over to the next
PLACES = ("base_path", "vae_path", "text_encoder_path", "tokenizer_path", "image_encoder_path")
INPUTS = ("reference", "audio", "image", "control")  # what a sample may give beside its prompt


# ----------------------------------------------------------------------------------------------------- the command


def script_of(config: Config) -> tuple[str, dict[str, str], tuple[str, ...]]:
    """The script of a run's files; which of `INPUTS` it takes, with their flags; and which of them it needs."""
    variant = config.error_recycling.variant if config.error_recycling is not None else None
    if config.stand_in is not None:
        return "infer.py", {"reference": "--ip_image"}, ("reference",)
    if config.avatar is not None:
        return (
            "infer_audio_avatar.py",
            {"reference": "--reference_image", "audio": "--audio"},
            ("reference", "audio"),
        )
    if config.vace is not None:
        return "infer_with_vace.py", {"control": "--reference_video", "reference": "--ip_image"}, ("control",)
    if variant is not None:
        inputs = {"image": "--ref_image_path"}
        inputs |= {"talk": {"audio": "--audio_path"}, "dance": {"control": "--pose_path"}}.get(variant, {})
        return "infer_long_video.py", inputs, tuple(inputs)
    script = "infer.py" if config.train.trainable == "full" else "infer_with_lora.py"
    family = family_of(load_config(config.model.config))
    if family == "t2v":
        return script, {"reference": "--ip_image"}, ()
    return script, {"image": "--image"}, () if family == "ti2v" else ("image",)


def check_samples(config: Config) -> None:
    """Whether every sample can be made, before anything is loaded.

    Raises:
        UsageError: an input that the script does not take, or one that is missing; a file that is not there; a measure
            whose weights are not there; one of two experts, where a video needs both.
    """
    validate = config.validate
    if not validate.samples:
        return
    if config.model.expert is not None and config.train.trainable != "lora":
        config.refuse("validate.samples", "a video needs both experts, and this run trains one; make them afterwards")
    script, taken, needed = script_of(config)
    for number, sample in enumerate(validate.samples):
        for name in INPUTS:
            value = getattr(sample, name)
            if value is not None and name not in taken:
                accepted = f"it takes {', '.join(taken)}" if taken else "it takes the prompt alone"
                config.refuse("validate.samples", f"number {number}: {script} takes no {name}; {accepted}")
            if value is None and name in needed:
                config.refuse("validate.samples", f"number {number}: {script} needs {name}, a file")
            if value is not None and not Path(value).is_file():
                config.refuse("validate.samples", f"number {number}: {name} {value}: no such file")
    if "face_similarity" in validate.metrics and not recognizer_is_there():
        config.refuse("validate.metrics", "needs the face models: python download_models.py --only antelopev2")


def command_of(config: Config, sample: ValidationSample, files: Mapping[str, Path], output: Path) -> list[str]:
    """The command that makes a sample's video from exported files (name without ending -> path)."""
    script, taken, _ = script_of(config)
    model, (height, width) = config.model, config.data.sizes[0]
    flags: dict[str, object] = {"--config": model.config, "--prompt": sample.prompt, "--seed": sample.seed}
    flags |= {"--height": height, "--width": width, "--output": output}
    if config.avatar is None:  # whose video is as long as the sound
        flags["--num_frames"] = max(config.data.frames)
    if sample.num_inference_steps is not None:
        flags["--num_inference_steps"] = sample.num_inference_steps
    flags |= {flag: value for name, flag in taken.items() if (value := getattr(sample, name)) is not None}
    flags |= {f"--{name}": value for name in PLACES if (value := getattr(model, name)) is not None}
    if model.pretrained_wav2vec_path is not None:
        flag = "--pretrained_wav2vec_path" if config.avatar is not None else "--audio_encoder_path"
        flags[flag] = model.pretrained_wav2vec_path
    if config.error_recycling is not None:
        tiny = bool(load_config(model.config).get("tiny"))
        flags |= {"--num_clips": CLIPS} | ({} if tiny else {"--variant": variant_of(config)})
    if "transformer" in files:
        flags["--transformer_path" if config.avatar is not None else "--base_path"] = files["transformer"]
        if config.avatar is None:  # the other parts are where they were, and not beside this file
            flags = encoder_places(config) | flags
    if "lora" in files:
        flags[f"--lora_path{'_' + model.expert if model.expert else ''}"] = files["lora"]
    flags |= {f"--{name}_path": files[name] for name in ("stand_in", "vace") if name in files}
    return [
        sys.executable,
        str(PROJECT / script),
        "--overwrite",
        *(str(each) for pair in flags.items() for each in pair),
    ]


def variant_of(config: Config) -> str:
    """The variant's name for infer_long_video.py."""
    variant = config.error_recycling.variant
    return "2.0-pro" if variant == "pro" else variant


def encoder_places(config: Config) -> dict[str, object]:
    """Flags that name the base's other parts; none of a tiny model's."""
    encoders = encoders_of(config.model, torch.device("cpu"))
    flags = {"--vae_path": "vae", "--text_encoder_path": "text", "--image_encoder_path": "image"}
    found = {flag: encoders[name].weights for flag, name in flags.items() if name in encoders}
    return {flag: path for flag, path in found.items() if path is not None}


# ------------------------------------------------------------------------------------------------------ the videos


def make_videos(run: Run, trainee: nn.Module, step: int) -> dict[str, float]:
    """Make every sample's video, output/validation/step-N/0.mp4 and so on. All processes call it; the first makes them.

    Returns:
        The mean of each of `validate.metrics`, on the first process.
    """
    config, found = run.config, {}
    folder = run.output / "validation" / f"step-{step:06}"
    with weights_to_use(run):
        if run.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as place:
                about = {"recipe": config.recipe, "base": config.model.config, "steps": str(step)}
                files = {path.stem: path for path in export(trainee, Path(place), about)}
                with away(trainee, run.device):
                    for number, sample in enumerate(config.validate.samples):
                        output = folder / f"{number}.mp4"
                        if make_video(command_of(config, sample, files, output), output):
                            found[output] = sample
    wait()
    if not config.validate.metrics or run.rank:
        return {}
    scores = [score for path in found if (score := face_similarity(path)) is not None]
    return {"face_similarity": sum(scores) / len(scores)} if scores else {}


def make_video(command: list[str], output: Path) -> bool:
    """Whether the command has made its video; if not, a warning says why."""
    environment = {name: value for name, value in os.environ.items() if name not in PROCESS_GROUP}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if result.returncode == 0 and output.is_file():
        logger.info("validation video %s", output)
        return True
    lines = result.stderr.strip().splitlines() or [f"exit code {result.returncode}"]
    logger.warning("the validation video %s was not made: %s", output, lines[-1][:500])
    return False


# Of torchrun: the script would join the run's own processes.
PROCESS_GROUP = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK")


@contextlib.contextmanager
def away(module: nn.Module, device: torch.device) -> Iterator[None]:
    """While it is entered, a module waits on the CPU, so that the device's memory is free for another process."""
    if device.type == "cpu":
        yield
        return
    tensors = [*module.parameters(), *module.buffers()]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.to("cpu")
        torch.cuda.empty_cache()
        yield
    finally:
        for tensor in tensors:
            tensor.data = tensor.data.to(device)


def face_similarity(path: Path) -> float | None:
    """How alike the video's people are to its photo, which the script has measured; None where there was no face."""
    score = read_metadata(path).get("face_score")
    return None if score is None else score["cosine"]
