"""Two gloo processes on the CPU give what one gives."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipelines.distributed import Processes, choose_device
from preprocess.video import read_frames
from tests import tiny
from tests.tiny import GRID, TIMESTEP

PROJECT = Path(__file__).parent.parent
ENVIRONMENT = os.environ | {"PYTHONPATH": str(PROJECT)}
SMALL = ["--height", "64", "--width", "96", "--num_frames", "5", "--num_inference_steps", "2", "--no_face_crop"]


def torchrun(*command) -> subprocess.CompletedProcess:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = subprocess.run(
        [*launcher, *map(str, command)],
        cwd=PROJECT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result


def test_one_forward_pass_over_two_processes(tmp_path):
    torchrun("tests/ulysses_worker.py", tmp_path / "out.safetensors")
    ours = load_file(tmp_path / "out.safetensors")
    model = tiny.transformer()
    per_token = torch.full((1, 3 * GRID[0] * GRID[1]), 600.0)
    per_token[:, : GRID[0] * GRID[1]] = 0
    with torch.no_grad():
        identity = tiny.stand_in(model).encode(model, [tiny.photo()], GRID)
        expected = {
            "plain": model(tiny.latents(), TIMESTEP, tiny.prompt()),
            "identity": model(tiny.latents(), TIMESTEP, tiny.prompt(), plugins=[identity]),
            "vace": model(
                tiny.latents(),
                TIMESTEP,
                tiny.prompt(),
                plugins=[identity, tiny.vace_branch().plugin(tiny.latents(seed=5, channels=96))],
            ),
            # 36 tokens a process, 24 a latent frame: each process begins or ends inside a frame
            "speech": model(
                tiny.latents(), TIMESTEP, tiny.prompt(), plugins=[tiny.multitalk().speech(tiny.audio(20), 4, 9)]
            ),
            "pose": model(tiny.latents(), TIMESTEP, tiny.prompt(), plugins=[tiny.pose()]),
            "per_token": model(tiny.latents(), per_token, tiny.prompt()),
        }
    for name in ("identity", "speech", "pose"):
        assert (expected["plain"] - expected[name]).abs().max() > 1e-3
    for name, tensor in expected.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-4, msg=name)


def test_prompts_are_split_and_one_video_is_shared(tmp_path):
    def run(launcher, output, *flags):
        launcher("infer.py", *SMALL, "--output", tmp_path / output, *flags)

    def alone(*command):
        command = [sys.executable, *map(str, command)]
        subprocess.run(command, cwd=PROJECT, env=ENVIRONMENT, check=True, capture_output=True, timeout=240)

    run(alone, "one.mp4", "--prompt", "a man", "a woman", "a child")
    run(torchrun, "two.mp4", "--prompt", "a man", "a woman", "a child")
    for number in range(3):
        single = read_frames(tmp_path / f"one-{number:03d}-seed0.mp4")
        assert (read_frames(tmp_path / f"two-{number:03d}-seed0.mp4") == single).all()

    run(torchrun, "split.mp4", "--prompt", "a woman", "--ulysses_degree", 2)
    difference = read_frames(tmp_path / "split.mp4").astype(int) - read_frames(tmp_path / "one-001-seed0.mp4")
    assert abs(difference).max() <= 8  # last bits differ, and H.264 spreads them over a block
    assert abs(difference).mean() < 0.1


@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_job_is_done_once(count):
    jobs = list(range(7))
    device = torch.device("cpu")
    shares = [Processes(rank, count, device, context_parallel=False).own(jobs) for rank in range(count)]
    assert sorted(sum(shares, [])) == jobs
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert all(Processes(rank, count, device, context_parallel=True).own(jobs) == jobs for rank in range(count))


@pytest.mark.parametrize(
    ("version", "warned"), [(None, False), (90701, False), (90800, True), (91002, True), (91100, False)]
)
def test_cudnn_with_a_wrong_conv3d_is_warned_of(monkeypatch, caplog, version, warned):
    monkeypatch.setattr(torch, "empty", lambda *size, device: None)  # there may be no such device here
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)
    assert choose_device("cuda:0").type == "cuda"
    assert ("cuDNN" in caplog.text) == warned
    caplog.clear()
    choose_device("cpu")
    assert not caplog.text
