"""train.py as a user runs it: every recipe on tiny videos, what is exported in use, resuming, refusals."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file

import train
from errors import UsageError
from tests.tiny_data import write_avatar_clip, write_clip
from training.config import read_config
from training.start import refuse_unbuilt

PROJECT = Path(__file__).parent.parent
FEW = [
    "train.steps=6",
    "save.every=3",
    "validate.every=3",
    "validate.quantiles=2",
    "optim.warmup=0",
    "log.tensorboard=false",
]


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    """Six clips with captions."""
    root = tmp_path_factory.mktemp("videos")
    for i in range(6):
        write_clip(root / f"{i}.mp4", 14, height=64, width=64, seed=i, caption=f"Gradient number {i}")
    return root


@pytest.fixture(scope="module")
def people(tmp_path_factory) -> Path:
    """Two clips with pictures of a face."""
    root = tmp_path_factory.mktemp("people")
    generator = numpy.random.default_rng(0)
    for i, frames in enumerate([(0, 13), (0,)]):
        write_clip(root / f"{i}.mp4", 14, height=64, width=64, seed=i, caption=f"Gradient number {i}")
        (root / f"{i}.faces").mkdir()
        for frame in frames:
            face = generator.integers(0, 256, (512, 512, 3)).astype(numpy.uint8)
            PIL.Image.fromarray(face).save(root / f"{i}.faces" / f"frame_{frame}.png")
    return root


@pytest.fixture(scope="module")
def talking(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("talking")
    for i in range(3):
        write_avatar_clip(root / "speech" / str(i), 12, 25, 64, 64, seed=i)
    return root


@pytest.fixture(scope="module")
def svi(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("svi")
    rows = ["Filename,Video Description"]
    for i in range(3):
        write_clip(root / "clips" / f"{i}.mp4", 30, height=64, width=64, seed=i, caption=None)
        rows.append(f"{i}.mp4,Gradient number {i}")
    (root / "clips" / "clips.csv").write_text("\n".join(rows))
    return root


def run(recipe: str, data: Path, output: Path, *sets: str) -> list[Path]:
    layout = {"avatar": "stableavatar", "error_recycling": "svi"}.get(recipe, "folder")
    sources = f"data.sources=[{{path: {data}, layout: {layout}}}]"
    few = [each for each in FEW if recipe != "vae" or "quantiles" not in each]
    given = [sources, f"output={output}", *few, *sets]
    return train.main(
        train.parse_args(["--config", f"tiny-{recipe}", *(part for each in given for part in ("--set", each))])
    )


def losses(output: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (output / "losses.jsonl").read_text().splitlines()]


def test_a_lora_is_trained_and_used(videos, tmp_path):
    (path,) = run("base", videos, tmp_path / "run", "data.holdout=0.3", "ema={decay: 0.5}", "optim.lr=0.05")
    assert path == tmp_path / "run" / "export" / "lora.safetensors"
    assert len(losses(tmp_path / "run")) == 6
    held_out = [json.loads(line) for line in (tmp_path / "run" / "validation.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in held_out] == [3, 6] and held_out[1]["loss"] < held_out[0]["loss"]
    weights = load_file(tmp_path / "run" / "step-000006" / "ema.safetensors")
    exported = load_file(path)
    name = "blocks.0.self_attn.q.lora_B"
    assert torch.equal(exported[f"diffusion_model.{name}.weight"], weights[f"transformer.{name}.default.weight"])
    command = [sys.executable, "infer_with_lora.py", "--config", "tiny", "--lora_path", str(path), "--num_frames", "5",
               "--height", "64", "--width", "64", "--num_inference_steps", "1", "--no_face_crop",
               "--output", str(tmp_path / "out.mp4")]  # fmt: skip
    result = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False, env=os.environ)
    assert result.returncode == 0 and (tmp_path / "out.mp4").is_file(), result.stderr


@pytest.mark.parametrize("sets", [[], ["stand_in.reference=other_clip", "data.holdout=0"], ["train.micro_batch=2"]])
def test_stand_in(people, tmp_path, sets):
    (path,) = run("stand_in", people, tmp_path / "run", *sets)
    tensors = load_file(path)
    assert "blocks.0.self_attn.q_loras.up.weight" in tensors
    assert tensors["blocks.0.self_attn.v_loras.up.weight"].abs().sum() > 0


@pytest.mark.parametrize("trainable", ["full", "adapter", "lora"])
def test_avatar(talking, tmp_path, trainable):
    paths = run(
        "avatar", talking, tmp_path / "run", f"train.trainable={trainable}", "data.holdout=0", "train.micro_batch=2"
    )
    assert [path.name for path in paths] == [
        *(["lora.safetensors"] if trainable == "lora" else []),
        "transformer.safetensors",
    ]
    assert all(value == value for value in losses(tmp_path / "run"))


@pytest.mark.parametrize("variant", ["shot", "film"])
def test_error_recycling(svi, tmp_path, variant):
    sets = [f"error_recycling.variant={variant}", "data.holdout=0"]
    (path,) = run("error_recycling", svi, tmp_path / "run", *sets)
    bank = json.loads((tmp_path / "run" / "step-000006" / "bank" / "bank.json").read_text())
    assert bank["lists"] and path.name == "lora.safetensors"


def test_vae(videos, tmp_path):
    (path,) = run("vae", videos, tmp_path / "run", "optim.lr=0.01", "train.global_batch=1", "data.holdout=0")
    assert path.name == "vae.safetensors"
    found = losses(tmp_path / "run")
    assert min(found[-3:]) < found[0]


def test_a_stopped_command_goes_on_to_the_same_bits(videos, tmp_path):
    run("base", videos, tmp_path / "unbroken", "train.steps=6")
    run("base", videos, tmp_path / "stopped", "train.steps=3")
    run("base", videos, tmp_path / "stopped", "train.steps=6")
    one, two = (load_file(tmp_path / name / "step-000006" / "weights.safetensors") for name in ("unbroken", "stopped"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert (tmp_path / "unbroken" / "losses.jsonl").read_bytes() == (tmp_path / "stopped" / "losses.jsonl").read_bytes()
    with pytest.raises(UsageError, match="optim.lr was"):
        run("base", videos, tmp_path / "stopped", "optim.lr=0.5")


def test_more_data_is_another_run(videos, tmp_path):
    data = tmp_path / "data"
    write_clip(data / "a.mp4", 14, height=64, width=64)
    run("base", data, tmp_path / "run", "train.steps=3")
    write_clip(data / "b.mp4", 14, height=64, width=64, seed=1)
    with pytest.raises(UsageError, match="data was"):
        run("base", data, tmp_path / "run")


def test_a_dry_run_trains_nothing(videos, tmp_path, capsys):
    sources = f"data.sources=[{{path: {videos}}}]"
    args = ["--config", "tiny-base", "--dry_run", "--set", sources, "--set", f"output={tmp_path / 'run'}"]
    assert train.main(train.parse_args(args)) == []
    assert "recipe: base" in capsys.readouterr().out and not (tmp_path / "run").exists()


@pytest.mark.parametrize("setting", ["memory.offload=blocks", "log.wandb=mine"])
def test_what_a_run_would_not_heed_is_refused(setting):
    with pytest.raises(UsageError, match=setting.split("=")[0]):
        refuse_unbuilt(read_config("tiny-base", [setting]))


@pytest.mark.parametrize("setting", ["memory.offload=checkpoints", "memory.store_bf16=true"])
def test_what_checkpointing_keeps_is_read_with_checkpointing_alone(setting):
    refuse_unbuilt(read_config("tiny-base", [setting]))
    with pytest.raises(UsageError, match="memory.checkpointing is none"):
        refuse_unbuilt(read_config("tiny-base", [setting, "memory.checkpointing=none"]))


def test_a_bad_command_is_one_line():
    command = [sys.executable, "train.py", "--config", "tiny-base", "--set", "train.stepz=5"]
    result = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "stepz" in result.stderr
