"""infer.py end to end on the tiny model: what a user types, and the file that comes out."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import infer
from errors import UserError
from models.wan.vae import WanVAE
from pipelines.job_state import JobState
from pipelines.tiny import tiny_stand_in_tensors, tiny_text_encoder, tiny_transformer, tiny_vae
from preprocess.record import read_metadata
from preprocess.video import probe, read_frames
from tests.tiny import CONFIG

PROJECT = Path(__file__).parent.parent
SMALL = ["--height", "64", "--width", "96", "--num_frames", "5", "--num_inference_steps", "3", "--no_face_crop"]

PERSON = ["--ip_image", "assets/face.png", "--prompt", "x"]


def make(output, *flags) -> numpy.ndarray:
    """Run in this process; the frames of the file."""
    assert infer.main(infer.parse_args([*SMALL, "--output", str(output), *map(str, flags)])) == [output]
    return read_frames(output)


def run_script(*flags, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "infer.py", *map(str, flags)]
    return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=120, check=False, **options)


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> numpy.ndarray:
    return make(tmp_path_factory.mktemp("reference") / "out.mp4")


# ------------------------------------------------------------------------------------------------- what comes out


def test_command_of_the_readme(tmp_path):
    """A photo and a prompt in any language, 17 frames: the file has what was asked for."""
    output = tmp_path / "out.mp4"
    prompt = '一位女士在微笑 😀 « naïve » "quoted"; a=b'
    result = run_script(
        *("--ip_image", "assets/face.png", "--prompt", prompt, "--config", "configs/tiny.yaml"),
        *("--num_frames", 17, "--output", output),
    )
    assert result.returncode == 0, result.stderr
    assert "UNTRAINED" in result.stderr
    assert result.stdout.strip() == str(output)
    info = probe(output)
    assert (info.num_frames, info.width, info.height, info.fps, info.pix_fmt) == (17, 128, 128, 16.0, "yuv420p")
    assert read_metadata(output)["settings"]["prompt"] == [prompt]
    assert json.loads(output.with_suffix(".json").read_text(encoding="utf-8")) == read_metadata(output)
    face = numpy.asarray(Image.open(output.with_suffix(".face0.png")))
    assert face.shape == (512, 512, 3)
    assert (face[:60, :60] == 255).all(), "the background of the photo is not white"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.face0.png", "out.json", "out.mp4"]


def test_same_seed_same_frames_other_seed_other_frames(tmp_path, reference):
    assert (make(tmp_path / "same.mp4") == reference).all()
    assert (make(tmp_path / "other.mp4", "--seed", 1) != reference).mean() > 0.5


@pytest.mark.parametrize(
    "flags",
    [
        ("--prompt", "a man"),
        ("--negative_prompt", "rain"),
        ("--guidance_scale", 1),
        ("--shift", 2),
        ("--solver", "unipc"),
        ("--solver", "dpm++"),
        ("--timesteps", 1000, 600, 300),
        ("--identity_strength", 3),
        ("--identity_start", 0.4),
        ("--identity_end", 0.6),
        ("--step_cache", "teacache", "--step_cache_threshold", 10, "--num_inference_steps", 4),
        ("--step_cache", "first_block", "--step_cache_threshold", 10),
        ("--dtype", "bf16"),
        ("--vae_dtype", "bf16"),
        ("--fp8",),
        ("--ip_image", "assets/face.png", "assets/face.png"),
    ],
    ids=lambda flags: " ".join(map(str, flags)),
)
def test_every_flag_of_the_sampling_changes_the_video(tmp_path, reference, flags):
    """No flag does nothing. (Those that only choose how the same thing is computed are in the next test.)"""
    frames = make(tmp_path / "out.mp4", *flags)
    assert frames.shape == reference.shape
    assert (frames != reference).mean() > 1e-4


@pytest.mark.parametrize(
    "flags",
    [
        ("--memory", "resident"),
        ("--memory", "group"),
        ("--memory", "sequential"),
        ("--attention_backend", "_native_math"),
        ("--tiled",),
        ("--preview",),
        ("--identity_end", 1, "--identity_start", 0),
    ],
    ids=lambda flags: " ".join(map(str, flags)),
)
def test_flags_of_the_machine_leave_the_video(tmp_path, reference, flags):
    frames = make(tmp_path / "out.mp4", *flags)
    # Other kernels round otherwise, and H.264 spreads a last bit over its block.
    difference = abs(frames.astype(int) - reference.astype(int))
    assert difference.max() <= (0 if "--memory" in flags else 8)
    assert difference.mean() < 0.1
    assert (tmp_path / "out.preview.png").exists() == ("--preview" in flags)


def test_size_frames_and_rate_of_the_file(tmp_path, caplog):
    output = tmp_path / "out.mp4"
    frames = make(output, "--height", 70, "--width", 96, "--num_frames", 7, "--fps", 23.976)
    assert frames.shape == (9, 80, 96, 3)
    assert probe(output).fps == pytest.approx(23.976, abs=1e-3)
    assert "--height 70 becomes 80" in caplog.text
    assert "--num_frames 7 becomes 9" in caplog.text


def test_several_prompts_and_seeds_are_each_as_alone(tmp_path, reference):
    output = tmp_path / "out.mp4"
    file = tmp_path / "prompts.txt"
    file.write_text("﻿a man\r\n\r\na woman\r\n", encoding="utf-8")
    infer.main(infer.parse_args([*SMALL, "--output", str(output), "--prompt", f"@{file}", "--seed", "0", "1"]))
    names = sorted(p.name for p in tmp_path.glob("*.mp4"))
    assert names == ["out-000-seed0.mp4", "out-000-seed1.mp4", "out-001-seed0.mp4", "out-001-seed1.mp4"]
    alone = make(tmp_path / "alone.mp4", "--prompt", "a woman", "--seed", 1)
    assert (read_frames(tmp_path / "out-001-seed1.mp4") == alone).all()


def test_step_cache_starts_afresh_for_each_video(tmp_path):
    """Also when the second video encodes its identity anew: the reference's pass is not a step of the cache."""
    flags = ("--step_cache", "first_block", "--step_cache_threshold", 10)
    infer.main(infer.parse_args([*SMALL, *map(str, flags), "--output", str(tmp_path / "o.mp4"), "--seed", "0", "1"]))
    assert (read_frames(tmp_path / "o-000-seed1.mp4") == make(tmp_path / "alone.mp4", *flags, "--seed", 1)).all()


def test_json_of_a_run_makes_the_run_again(tmp_path):
    first = make(tmp_path / "first.mp4", "--prompt", "@@home", "--seed", 5, "--solver", "unipc", "--shift", 3)
    infer.main(infer.parse_args(["--config", str(tmp_path / "first.json"), "--output", str(tmp_path / "again.mp4")]))
    assert (read_frames(tmp_path / "again.mp4") == first).all()
    assert read_metadata(tmp_path / "again.mp4") == read_metadata(tmp_path / "first.mp4")


# ------------------------------------------------------------------------------------------ interrupted and resumed


def test_killed_run_goes_on_and_gives_the_same_frames(tmp_path):
    """kill -9 after the first saved step: no file, no half file; the same command finishes it."""
    flags = [*SMALL, "--num_inference_steps", "12", "--solver", "unipc"]
    whole = make(tmp_path / "whole.mp4", *flags)
    output = tmp_path / "out.mp4"
    state = JobState(output, {}).path
    command = [sys.executable, "infer.py", *flags, "--output", str(output)]
    process = subprocess.Popen(command, cwd=PROJECT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 90
    while not state.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert state.exists()
    assert not output.exists()
    result = run_script(*flags, "--output", output)
    assert "going on after step" in result.stderr
    assert (read_frames(output) == whole).all()
    assert not state.exists()


def test_terminated_run_ends_with_130_and_keeps_its_state(tmp_path):
    output = tmp_path / "out.mp4"
    state = JobState(output, {}).path
    command = [sys.executable, "infer.py", *SMALL, "--num_inference_steps", "400", "--output", str(output)]
    process = subprocess.Popen(command, cwd=PROJECT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 90
    while not state.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == [state.name, "out.face0.png"]


def test_state_of_other_settings_is_not_used(tmp_path, monkeypatch, caplog):
    def interrupt(self, step, save=JobState.save):
        save(self, step)
        if step.index == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(JobState, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "out.mp4")
    monkeypatch.undo()
    expected = make(tmp_path / "fresh.mp4", "--seed", 9)
    assert (make(tmp_path / "out.mp4", "--seed", 9) == expected).all()
    assert "belongs to a run with other settings" in caplog.text


def test_damaged_state_starts_over(tmp_path, reference, caplog):
    JobState(tmp_path / "out.mp4", {}).path.write_bytes(b"\0" * 100)
    assert (make(tmp_path / "out.mp4") == reference).all()
    assert "is damaged" in caplog.text


# ---------------------------------------------------------------------------------------------- out of memory, NaN


def fail_once(monkeypatch, error_or_output):
    """Make the second step's first transformer call fail."""
    from models.wan.transformer import WanTransformer

    calls = []
    forward = WanTransformer.forward

    def failing(self, *args, **kwargs):
        if kwargs.get("tokens_only"):
            return forward(self, *args, **kwargs)
        calls.append(1)
        if len(calls) == 3:
            if isinstance(error_or_output, Exception):
                raise error_or_output
            return torch.full_like(args[0], error_or_output)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(WanTransformer, "forward", failing)
    return calls


def test_out_of_memory_goes_on_with_the_next_mode(tmp_path, reference, monkeypatch, caplog):
    calls = fail_once(monkeypatch, torch.OutOfMemoryError("CUDA out of memory"))
    assert (make(tmp_path / "out.mp4", "--memory", "resident") == reference).all()
    assert "with --memory resident; going on with model" in caplog.text
    assert len(calls) == 3 * 2 + 1, "finished steps were computed again"


def test_out_of_memory_in_the_last_mode_is_exit_5(tmp_path, monkeypatch):
    fail_once(monkeypatch, torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(UserError, match="out of memory while denoising with --memory sequential") as error:
        make(tmp_path / "out.mp4", "--memory", "sequential")
    assert error.value.exit_code == 5


def test_out_of_memory_while_decoding_names_the_stage_and_keeps_the_latents(tmp_path, reference, monkeypatch):
    from models.wan.vae import WanVAE

    def no_memory(self, *args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(WanVAE, "decode_stream", no_memory)
    with pytest.raises(UserError, match="out of memory while decoding; try --tiled") as error:
        make(tmp_path / "out.mp4")
    assert error.value.exit_code == 5
    monkeypatch.undo()
    calls = fail_once(monkeypatch, ValueError("must not be called"))
    assert (make(tmp_path / "out.mp4") == reference).all()
    assert not calls, "denoised again although the latents were saved"


def test_no_room_on_the_disk_is_exit_5_before_anything_loads(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000, total=10**9, used=10**9 - 1000))
    with pytest.raises(UserError, match="free") as error:
        make(tmp_path / "out.mp4")
    assert error.value.exit_code == 5


def test_nan_falls_back_to_native_attention(tmp_path, reference, monkeypatch, caplog):
    fail_once(monkeypatch, float("nan"))
    frames = make(tmp_path / "out.mp4", "--attention_backend", "_native_math")
    assert abs(frames.astype(int) - reference.astype(int)).max() <= 8
    assert read_metadata(tmp_path / "out.mp4")["ran_with"]["attention_backend"] == "native"
    assert "NaN or infinity at step 2 of 3 with attention backend _native_math" in caplog.text


def test_nan_with_native_attention_is_an_error(tmp_path, monkeypatch):
    fail_once(monkeypatch, float("nan"))
    with pytest.raises(UserError, match=r"NaN or infinity at step 2 of 3 .*try --dtype fp32") as error:
        make(tmp_path / "out.mp4")
    assert error.value.exit_code == 4


def test_nan_of_the_vae_is_an_error(tmp_path, monkeypatch):
    stream = WanVAE.decode_stream
    monkeypatch.setattr(WanVAE, "decode_stream", lambda *args, **kw: (f * float("nan") for f in stream(*args, **kw)))
    with pytest.raises(UserError, match="the VAE returned NaN or infinity .*try --vae_dtype fp32") as error:
        make(tmp_path / "out.mp4")
    assert error.value.exit_code == 4
    assert not (tmp_path / "out.mp4").exists()


# -------------------------------------------------------------------------------------------------------- weights


def original_vae_names(diffusers_state: dict) -> dict:
    """Names of the released Wan2.1_VAE.pth, which the golden has: the loader's map, inverted."""
    from models.wan.vae import diffusers_key

    with safe_open(PROJECT / "tests/goldens/wan-vae21/weights.safetensors", "pt") as file:
        to_original = {diffusers_key(name): name for name in file.keys()}  # noqa: SIM118 (not a dict)
    return {to_original[name]: tensor for name, tensor in diffusers_state.items()}


def write_release(folder: Path, config: dict, experts: tuple[str, ...] = ("",)) -> None:
    """The tiny model as files in the layout of the Wan-AI repositories."""
    for number, name in enumerate(experts):
        (folder / name).mkdir(parents=True, exist_ok=True)
        transformer = tiny_transformer(config, number)
        save_file(transformer.state_dict(), folder / name / "diffusion_pytorch_model.safetensors")
        heads = {"num_heads": config["transformer"]["num_heads"], "model_type": "t2v"}
        (folder / name / "config.json").write_text(json.dumps(heads))
    torch.save(original_vae_names(tiny_vae(config).state_dict()), folder / "Wan2.1_VAE.pth")
    text_encoder = tiny_text_encoder(config)
    torch.save(
        {f"encoder.{k}": v for k, v in text_encoder.encoder.state_dict().items()},
        folder / "models_t5_umt5-xxl-enc-bf16.pth",
    )
    text_encoder.tokenizer.save_pretrained(folder / "google" / "umt5-xxl")


def test_released_layout_equals_the_model_in_memory(tmp_path, reference):
    write_release(tmp_path / "t2v", CONFIG)
    stand_in = tmp_path / "Stand-In" / "Stand-In_wan2.1_T2V_14B_ver1.0.ckpt"
    stand_in.parent.mkdir()
    torch.save(tiny_stand_in_tensors(CONFIG), stand_in)
    flags = ("--config", "configs/tiny.yaml", "--base_path", tmp_path / "t2v", "--stand_in_path")
    assert (make(tmp_path / "folder.mp4", *flags, stand_in.parent) == reference).all()
    assert (make(tmp_path / "file.mp4", *flags, stand_in, "--memory", "resident") == reference).all()
    made = read_metadata(tmp_path / "file.mp4")
    assert not made["untrained"]
    assert made["ran_with"] == {"attention_backend": "native", "memory": "resident"}
    assert len(made["weights"]) == 5  # transformer, text encoder, tokenizer, VAE, Stand-In
    assert all("sha256" in value for value in made["weights"].values())

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth", "google"):
        (tmp_path / "t2v" / name).rename(elsewhere / name)
    single = tmp_path / "t2v" / "diffusion_pytorch_model.safetensors"
    parts = ("--vae_path", elsewhere / "Wan2.1_VAE.pth", "--text_encoder_path", elsewhere, "--base_path", single)
    assert (make(tmp_path / "parts.mp4", *flags, stand_in, *parts) == reference).all()
    (elsewhere / "google" / "umt5-xxl" / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    parts += ("--tokenizer_path", tmp_path / "tokenizer.json")
    assert (make(tmp_path / "named.mp4", *flags, stand_in, *parts) == reference).all()
    # ComfyUI's single file brings its tokenizer as bytes, here those of a tokenizer.json, and needs no other.
    text_encoder = torch.load(elsewhere / "models_t5_umt5-xxl-enc-bf16.pth", weights_only=True)
    spiece = torch.frombuffer(bytearray((tmp_path / "tokenizer.json").read_bytes()), dtype=torch.uint8)
    comfy = tmp_path / "umt5_xxl_fp16.safetensors"
    save_file(text_encoder | {"spiece_model": spiece}, comfy)
    comfy_parts = (*parts[:2], "--text_encoder_path", comfy, "--base_path", single)
    assert (make(tmp_path / "comfy.mp4", *flags, stand_in, *comfy_parts) == reference).all()
    with pytest.raises(UserError, match="download_models.py") as error:
        make(tmp_path / "missing.mp4", *flags, stand_in)
    assert error.value.exit_code == 4


def test_two_experts_with_an_identity_each(tmp_path):
    """Wan2.2: weights, identity and guidance follow the expert; in memory = from files = every memory mode."""
    experts = {"high": "high_noise_model", "low": "low_noise_model"}
    extra = {
        "base": str(PROJECT / "configs" / "tiny.yaml"),
        "description": "two experts",
        "tiny": True,
        "seed": 0,
        "experts": experts,
        "boundary": 0.9,
        "defaults": {"guidance_scale": {"high": 4.0, "low": 3.0}},
    }
    config = tmp_path / "two.yaml"
    config.write_text(yaml.safe_dump(extra))
    flags = ("--config", config, "--num_inference_steps", 4, "--ip_image", "assets/face.png", "--prompt", "a man")
    whole = make(tmp_path / "model.mp4", *flags)
    assert (make(tmp_path / "group.mp4", *flags, "--memory", "group") == whole).all()
    assert (make(tmp_path / "scales.mp4", *flags, "--guidance_scale", 4, 4) != whole).any()

    write_release(tmp_path / "t2v", CONFIG, tuple(experts.values()))
    for number, name in enumerate(("high", "low")):
        torch.save(tiny_stand_in_tensors(CONFIG, number), tmp_path / f"Stand-In_wan2.2_T2V_A14B_{name}.ckpt")
    files = ("--base_path", tmp_path / "t2v", "--stand_in_path", tmp_path)
    assert (make(tmp_path / "files.mp4", *flags, *files) == whole).all()


# ----------------------------------------------------------------------------------------------------- bad inputs


@pytest.mark.parametrize(
    ("flags", "exit_code", "words"),
    [
        (["--num_frames", "1000001"], 2, ["--num_frames 1000001", "1 to 4093"]),
        (["--height", "16384", "--width", "16384", "--num_frames", "4093"], 5, ["TiB of disk"]),
        (["--height", "0"], 2, ["--height 0", "16 to 16384"]),
        (["--num_inference_steps", "0"], 2, ["--num_inference_steps 0", "1 to 1000"]),
        (["--num_inference_steps", "-1"], 2, ["--num_inference_steps -1"]),
        (["--guidance_scale", "nan"], 2, ["--guidance_scale nan"]),
        (["--guidance_scale", "inf"], 2, ["--guidance_scale inf"]),
        (["--guidance_scale", "3", "4"], 2, ["--guidance_scale", "2 values for one model"]),
        (["--identity_strength", "-1"], 2, ["--identity_strength -1", "0 to 10"]),
        (["--identity_start", "0.8", "--identity_end", "0.2"], 2, ["--identity_start 0.8", "--identity_end 0.2"]),
        (["--fps", "0"], 2, ["--fps 0"]),
        (["--quality", "11"], 2, ["--quality 11", "1 to 10"]),
        (["--seed", "-1"], 2, ["--seed -1"]),
        (["--solver", "heun"], 2, ["--solver heun", "unipc"]),
        (["--memory", "magic"], 2, ["--memory magic", "sequential"]),
        (["--dtype", "int4"], 2, ["--dtype int4", "bf16"]),
        (["--step_cache", "teacache", "--wan_version", "2.2", *PERSON], 2, ["teacache", "first_block"]),
        (["--step_cache", "teacache", "--compile"], 2, ["--step_cache", "--compile"]),
        (["--step_cache", "yes"], 2, ["--step_cache yes", "teacache"]),
        (["--device", "warp:9"], 2, ["--device warp:9"]),
        (["--attention_backend", "telepathy"], 2, ["--attention_backend telepathy"]),
        (["--fp8", "--memory", "group"], 2, ["--fp8", "--memory group"]),
        (["--ulysses_degree", "2"], 2, ["--ulysses_degree 2", "torchrun --nproc_per_node 2"]),
        (["--ulysses_degree", "5"], 2, ["--ulysses_degree 5", "192 tokens", "change size or frames"]),
        (["--ring_degree", "3"], 2, ["--ring_degree 3", "1024 tokens", "2, 4 or 8"]),
        (["--ulysses_degree", "4"], 2, ["--ulysses_degree 4", "2 heads"]),
        (["--config", "nothing"], 2, ["nothing", "tiny", "wan2.1-t2v-14B"]),
        (["--config", "missing.json"], 2, ["missing.json", "no such file"]),
        (["--config", "wan2.1-i2v-14B-480P", "--prompt", "x"], 2, ["starts from a picture", "--image"]),
        (["--config", "wan2.1-t2v-1.3B", "--ip_image", "a.png", "--prompt", "x"], 2, ["--ip_image", "14B models"]),
        (["--wan_version", "2.1", "--prompt", "x"], 2, ["--ip_image"]),
        (["--wan_version", "3"], 2, ["--wan_version 3", "2.1, 2.2"]),
        (["--wan_version", "2.1", "--config", "tiny"], 2, ["contradict"]),
        (["--ip_image", "missing.png"], 3, ["--ip_image", "missing.png"]),
        (["--ip_image", "README.md"], 3, ["README.md"]),
        (["--prompt", "@missing.txt"], 3, ["missing.txt"]),
        (["--prompt", "@"], 2, ["@"]),
        (["--base_path", "missing", *PERSON], 4, ["missing", "python download_models.py --only"]),
        (["--wan_version", "2.1", *PERSON], 4, ["--only wan2.1-t2v-14B"]),
        (["--output", "out.avi"], 2, ["out.avi", ".mp4"]),
        (["--output", "assets"], 2, ["assets", "folder"]),
        (["--output", "assets/../CON.mp4"], 2, ["CON"]),
        (["--output", "x" * 300 + ".mp4"], 2, ["too long"]),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else None,
)
def test_bad_input_is_one_clear_line(tmp_path, monkeypatch, flags, exit_code, words):
    monkeypatch.chdir(PROJECT)
    with pytest.raises(UserError) as error:
        infer.main(infer.parse_args(["--output", str(tmp_path / "out.mp4"), *flags]))
    message = str(error.value)
    assert error.value.exit_code == exit_code, message
    assert "\n" not in message
    for word in words:
        assert word in message, message
    assert not list(tmp_path.glob("*.mp4"))


def test_photo_without_a_face(tmp_path):
    blank = tmp_path / "wall.png"
    Image.new("RGB", (200, 200), (120, 130, 140)).save(blank)
    flags = [f for f in SMALL if f != "--no_face_crop"]
    with pytest.raises(UserError, match="--allow_no_face") as error:
        infer.main(infer.parse_args([*flags, "--ip_image", str(blank), "--output", str(tmp_path / "out.mp4")]))
    assert error.value.exit_code == 3


def test_existing_output_is_kept_unless_overwrite(tmp_path, reference):
    output = tmp_path / "out.mp4"
    output.write_bytes(b"precious")
    with pytest.raises(UserError, match="--overwrite"):
        make(output)
    assert output.read_bytes() == b"precious"
    assert (make(output, "--overwrite") == reference).all()


def test_exit_codes_and_no_traceback_from_the_shell(tmp_path):
    for flags, code in [
        (["--steps"], 2),
        (["--height", "tall"], 2),
        (["--ip_image", "missing.png", "--output", tmp_path / "a.mp4"], 3),
        (["--base_path", "missing", *PERSON, "--output", tmp_path / "a.mp4"], 4),
    ]:
        result = run_script(*flags)
        assert result.returncode == code, result.stderr
        assert "Traceback" not in result.stderr


def test_help_is_fast():
    start = time.monotonic()
    result = run_script("--help", env=os.environ | {"PYTHONPROFILEIMPORTTIME": "1"})
    assert result.returncode == 0
    assert time.monotonic() - start < 1
    assert "import time" in result.stderr
    assert "torch" not in result.stderr


def test_text_to_video_of_the_5b_family(tmp_path):
    """48 latent channels and a VAE twice as coarse: sizes follow, and there is no identity to give."""
    from models.wan.vae import detect_vae_config, diffusers_names

    golden = load_file(PROJECT / "tests/goldens/wan-vae22/weights.safetensors")
    vae = detect_vae_config({key: tuple(tensor.shape) for key, tensor in diffusers_names(golden).items()})
    shape = CONFIG["transformer"] | {"in_dim": 48, "out_dim": 48}
    config = tmp_path / "ti2v.yaml"
    config.write_text(
        yaml.safe_dump({k: CONFIG[k] for k in ("tiny", "seed", "text_encoder", "tokenizer", "defaults")}
        | {"description": "5B family", "transformer": shape, "vae": vae})
    )  # fmt: skip
    with pytest.raises(UserError, match="no identity weights"):
        make(tmp_path / "out.mp4", "--config", config, *PERSON)
    defaults = yaml.safe_load(config.read_text())
    del defaults["defaults"]["ip_image"]
    config.write_text(yaml.safe_dump(defaults))
    flags = [f for f in SMALL if f != "--no_face_crop"]
    infer.main(infer.parse_args([*flags, "--config", str(config), "--output", str(tmp_path / "out.mp4")]))
    assert read_frames(tmp_path / "out.mp4").shape == (5, 64, 96, 3)


def test_a_flag_given_twice_adds_up():
    flags = ["--ip_image", "a", "--ip_image", "b", "c", "--prompt", "x", "--prompt", "y", "--seed", "1", "--seed", "2"]
    args = infer.parse_args(flags)
    assert (args.ip_image, args.prompt, args.seed) == (["a", "b", "c"], ["x", "y"], [1, 2])
