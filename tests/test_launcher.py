"""accelerate launch: the same run in two processes; what it is asked for and train.py does not do is refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train
from errors import UsageError
from tests.tiny_data import write_clip
from training.launcher import check_launcher

PROJECT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "ACCELERATE_USE_FSDP",
            "true",
            r"--use_fsdp \(ACCELERATE_USE_FSDP=true\): .* give --multi_gpu",
        ),
        ("ACCELERATE_USE_DEEPSPEED", "true", "--use_deepspeed"),
        ("ACCELERATE_USE_CPU", "True", "CUDA_VISIBLE_DEVICES="),
        ("ACCELERATE_MIXED_PRECISION", "fp16", "model.base_dtype=bf16"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "memory.compile=true"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "train.global_batch"),
        ("ACCELERATE_GRADIENT_CLIPPING", "1.0", "train.clip.norm"),
    ],
)
def test_what_is_not_heeded_is_refused(name, value, message):
    with pytest.raises(UsageError, match=message):
        check_launcher({name: value})


def test_a_plain_launch_passes():
    check_launcher({})
    check_launcher({"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO", "RANK": "0"})
    check_launcher({"ACCELERATE_USE_CPU": "False", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1"})


def test_two_processes_of_accelerate_are_one(tmp_path):
    for seed in range(2):
        write_clip(tmp_path / "videos" / f"{seed}.mp4", height=64, width=64, seed=seed)
    sets = [f"data.sources=[{{path: {tmp_path / 'videos'}}}]", "train.steps=3", "optim.warmup=0", "optim.eps=1e-4"]
    sets += ["data.holdout=0", "save.every=3"]

    def words(output: str) -> list[str]:
        given = [*sets, f"output={tmp_path / output}"]
        return ["--recipe", "base", "--config", "tiny-base", *(part for each in given for part in ("--set", each))]

    train.main(train.parse_args(words("one")))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    result = subprocess.run(
        [*launch, "train.py", *words("two")], cwd=PROJECT, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0 and "in 2 processes" in result.stderr, result.stderr
    one, two = (load_file(tmp_path / name / "export" / "lora.safetensors") for name in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "two" / "losses.jsonl").read_text().splitlines()]
    assert len(losses) == 3
