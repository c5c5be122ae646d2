"""LoRAs that work in a part of the steps only: --lora_start and --lora_end; and the memory that live LoRAs take."""

import numpy
import pytest
import torch
from safetensors.torch import save_file

import infer
import infer_with_lora
from configs import load_config
from errors import UsageError
from models.lora import merge_loras, read_lora
from models.wan.schedulers import get_schedule
from models.wan.slots import Prompt
from models.wan.vae import WanVAE
from pipelines.conditions import initial_noise
from pipelines.distributed import start_processes
from pipelines.job_state import JobState
from pipelines.lora_command import resolve_lora_settings
from pipelines.text_to_video import pipeline as text_to_video
from pipelines.text_to_video.pipeline import VideoMaker, prepare_faces
from pipelines.tiny import tiny_stand_in
from pipelines.wan import Wan
from preprocess.record import read_metadata
from preprocess.video import read_frames
from tests import tiny
from tests.test_lora import DIALECTS, factors

SMALL = ["--config", "tiny", "--no_face_crop", "--height", "64", "--width", "64", "--num_frames", "1"]
SMALL += ["--num_inference_steps", "4"]


@pytest.fixture(scope="module")
def lora(tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("lora") / "a.safetensors"
    save_file({key: t.clone().contiguous() for key, t in DIALECTS["kohya, musubi"](factors()).items()}, file)
    return str(file)


@pytest.fixture(scope="module", autouse=True)
def encoded_once():
    """Encoding the photo is most of a tiny video's time, and it is the same photo throughout."""
    kept, encode = {}, WanVAE.encode

    def once(self, clip, **options):
        key = clip.numpy().tobytes()
        if key not in kept:
            kept[key] = encode(self, clip, **options)
        return kept[key]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(WanVAE, "encode", once)
        yield


@pytest.fixture
def denoised(monkeypatch) -> list[torch.Tensor]:
    """The clean latents of each video."""
    latents = []
    run = text_to_video.denoise_with_resume
    keep = lambda *args, **options: latents.append(run(*args, **options)) or latents[-1]  # noqa: E731
    monkeypatch.setattr(text_to_video, "denoise_with_resume", keep)
    return latents


def arguments(output, *flags) -> list[str]:
    return [*SMALL, "--output", str(output), *map(str, flags)]


def make(output, *flags) -> numpy.ndarray:
    infer_with_lora.main(infer_with_lora.parse_args(arguments(output, *flags)))
    return read_frames(output)


def by_hand(lora: str, steps_with_lora: range) -> torch.Tensor:
    """Euler's loop with one of two models at each step: the LoRA merged into it, or not."""
    config = load_config("tiny")
    settings, _ = resolve_lora_settings(infer_with_lora.parse_args(arguments("x.mp4", "--lora_path", lora)))
    wan = Wan(settings, config, start_processes("cpu"))
    text = wan.encode_prompts([*settings.prompt, settings.negative_prompt])
    references = VideoMaker(wan, text, prepare_faces(settings)).identities.references
    plain, changed = tiny.transformer(), tiny.transformer()
    merge_loras(changed, [(read_lora(lora, changed), 1.0)])
    sigmas = get_schedule("euler", 4, settings.shift).sigmas.tolist()
    sample = initial_noise((16, 1, 64, 64), seed=0)
    for step, (sigma, following) in enumerate(zip(sigmas, sigmas[1:], strict=False)):
        model = changed if step in steps_with_lora else plain
        with torch.no_grad():
            identity = tiny_stand_in(config, model).encode(model, references, (4, 4), (0.0, 1.0))
            positive, negative = (
                model(sample, torch.tensor([1000 * sigma]), Prompt([text[prompt]]), plugins=[identity])
                for prompt in (settings.prompt[0], settings.negative_prompt)
            )
        sample = sample + (following - sigma) * (negative + settings.guidance_scale[0] * (positive - negative))
    return sample


@pytest.mark.parametrize(
    ("flags", "steps"),
    [
        (["--lora_end", 0.5], range(2)),
        (["--lora_start", 0.25], range(1, 4)),
        (["--lora_start", 0.5, "--lora_end", 0.75], range(2, 3)),
    ],
)
def test_they_set_in_and_end_at_their_steps(tmp_path, lora, denoised, flags, steps):
    make(tmp_path / "out.mp4", "--lora_path", lora, *flags)
    expected = by_hand(lora, steps)
    torch.testing.assert_close(denoised[0], expected, rtol=1e-4, atol=1e-4)
    assert (by_hand(lora, range(4)) - expected).abs().mean() > 0.01
    assert (by_hand(lora, range(0)) - expected).abs().mean() > 0.01


def test_off_throughout_is_no_lora_and_the_whole_range_is_live(tmp_path, lora, denoised):
    infer.main(infer.parse_args(arguments(tmp_path / "plain.mp4")))
    path = ("--lora_path", lora)
    for number, ends in enumerate([(0, 0), (1, 1)]):
        make(tmp_path / f"off{number}.mp4", *path, "--lora_start", ends[0], "--lora_end", ends[1])
        assert torch.equal(denoised[-1], denoised[0])
    make(tmp_path / "live.mp4", *path, "--lora_mode", "live")
    make(tmp_path / "whole.mp4", *path, "--lora_mode", "live", "--lora_start", 0, "--lora_end", 1)
    assert torch.equal(denoised[-1], denoised[-2])
    assert not torch.equal(denoised[-1], denoised[0])


@pytest.mark.parametrize("memory", ["resident", "group", "sequential"])
def test_range_with_memory_modes_several_videos_and_its_record(tmp_path, lora, memory):
    flags = ("--lora_path", lora, "--lora_end", 0.5)
    expected = make(tmp_path / "model.mp4", *flags)
    # Two videos: when the second begins the LoRA is off.
    args = arguments(tmp_path / "out.mp4", *flags, "--memory", memory, "--seed", 5, 0)
    infer_with_lora.main(infer_with_lora.parse_args(args))
    assert (read_frames(tmp_path / "out-000-seed0.mp4") == expected).all()
    made = read_metadata(tmp_path / "model.mp4")["settings"]
    assert (made["lora_start"], made["lora_end"]) == (0, 0.5)
    infer_with_lora.main(
        infer_with_lora.parse_args(
            ["--config", str(tmp_path / "model.json"), "--output", str(tmp_path / "again.mp4"), "--memory", memory]
        )
    )
    assert (read_frames(tmp_path / "again.mp4") == expected).all()


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_interrupted_around_the_switch_and_resumed_gives_the_same(tmp_path, lora, monkeypatch, denoised, stop_after):
    flags = ("--lora_path", lora, "--lora_end", 0.5)
    make(tmp_path / "whole.mp4", *flags)

    def interrupt(self, step, save=JobState.save):
        save(self, step)
        if step.index + 1 == stop_after:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(JobState, "save", interrupt)
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path / "out.mp4", *flags)
    make(tmp_path / "out.mp4", *flags)
    assert torch.equal(denoised[-1], denoised[0])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--lora_end", "0.5", "--lora_mode", "merged"], "merged LoRAs cannot be switched off; use --lora_mode live"),
        (["--lora_start", "0.5", "--lora_end", "0.2"], "--lora_start 0.5 comes after --lora_end 0.2"),
        (["--lora_start", "-0.1"], "--lora_start -0.1: accepted are 0 to 1"),
        (["--lora_end", "nan"], "--lora_end nan: accepted are 0 to 1"),
        (["--lora_end", "0.5", "--step_cache", "teacache"], "teacache follows one model"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path, lora, flags, words):
    with pytest.raises(UsageError, match=words):
        make(tmp_path / "out.mp4", "--lora_path", lora, *flags)


def test_changes_in_full_cannot_be_switched_off(tmp_path, lora):
    file = tmp_path / "full.safetensors"
    save_file({"blocks.0.norm3.diff": torch.ones(tiny.DIM)}, file)
    with pytest.raises(UsageError, match=r"full.safetensors changes 1 weights in full \(blocks.0.norm3.weight"):
        make(tmp_path / "out.mp4", "--lora_path", lora, file, "--lora_end", 0.5)


# ------------------------------------------------------------------------------------------------------------- memory


def test_live_loras_count_as_memory_and_merged_ones_do_not(lora, monkeypatch):
    values = sum(t.numel() for pair in factors().values() for t in pair)

    def bytes_of(*flags, memory="resident"):
        args = infer_with_lora.parse_args(arguments("x.mp4", "--lora_path", lora, "--memory", memory, *flags))
        settings, config = resolve_lora_settings(args)
        wan = Wan(settings, config, start_processes("cpu"))
        wan.use_loras(settings)
        checked = []
        monkeypatch.setattr("pipelines.wan.check_memory", lambda settings, needed, device: checked.append(needed))
        wan.check()
        return wan.lora_bytes(), checked[0]

    merged, live = bytes_of(), bytes_of("--lora_mode", "live")
    assert (merged[0], live[0]) == (0, 4 * values)
    assert live[1] - merged[1] == 4 * values
    assert bytes_of("--lora_end", 0.5)[0] == 4 * values
    assert bytes_of("--lora_mode", "live", "--dtype", "bf16")[0] == 2 * values
    by_mode = [bytes_of("--lora_mode", "live", memory=mode)[0] for mode in ("resident", "model", "group", "sequential")]
    assert by_mode == [4 * values, 4 * values, 4 * (2 * values // tiny.LAYERS), 0]


def test_loras_are_counted_where_auto_would_have_them_live(lora):
    """Merged ones beside bfloat16, live ones beside float8; and never where they were asked to be merged."""
    values = sum(t.numel() for pair in factors().values() for t in pair)

    def more(*flags):
        args = infer_with_lora.parse_args(arguments("x.mp4", "--lora_path", lora, *flags))
        settings, config = resolve_lora_settings(args)
        wan = Wan(settings, config, start_processes("cpu"))
        without = wan.needs()
        wan.use_loras(settings)
        needs = wan.needs()
        return tuple(
            getattr(needs, name)["model"] - getattr(without, name)["model"] for name in ("weights", "weights_fp8")
        )

    assert more() == (0, 4 * values)
    assert more("--lora_mode", "live") == (4 * values, 4 * values)
    assert more("--lora_mode", "merged") == (0, 0)
