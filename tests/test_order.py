"""What scripts do before what: nothing loads in a process that has nothing to make, and memory is asked about when all
that takes some is known.
"""

import pytest
import torch

import infer
import infer_audio_avatar
import infer_face_swap
import infer_long_video
import infer_with_lora
import infer_with_vace
from pipelines import distributed
from pipelines.distributed import Processes
from pipelines.wan import Wan
from tests.frame_hash_cases import write_lora
from tests.test_batches import TINY, run

SCRIPTS = {
    "infer": (infer, TINY),
    "lora": (infer_with_lora, [*TINY, "--lora_path", "style.safetensors"]),
    "swap": (infer_face_swap, ["--num_frames", "5", "--num_inference_steps", "1"]),
    "vace": (infer_with_vace, TINY),
    "long": (infer_long_video, [*TINY, "--config", "tiny-i2v", "--num_clips", "1", "--lora_path", "style.safetensors"]),
}


class ReachedError(Exception):
    """The run came to a step that the test ends at."""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    write_lora(tmp_path / "style.safetensors", seed=1)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_process_without_a_job_loads_nothing(monkeypatch, name):
    """As the second of two that share one video."""
    second = Processes(rank=1, count=2, device=torch.device("cpu"), context_parallel=False)
    monkeypatch.setattr(distributed, "start_processes", lambda *args, **options: second)
    for method in ("check", "vae", "transformer", "encode_prompts"):
        monkeypatch.setattr(Wan, method, lambda *args, method=method, **options: pytest.fail(method))
    script, flags = SCRIPTS[name]
    assert run(script, *flags, "--output", "out.mp4") == []


@pytest.mark.parametrize("name", ["lora", "long", "avatar"])
def test_loras_are_known_before_memory_is_asked_about(monkeypatch, name):
    avatar = ["--width", "32", "--height", "32", "--sample_steps", "1", "--lora_path", "style.safetensors"]
    script, flags = {**SCRIPTS, "avatar": (infer_audio_avatar, avatar)}[name]
    known = []

    def needs(self, *args):
        known.extend(self.loras.of_experts[0])
        raise ReachedError

    monkeypatch.setattr(Wan, "needs", needs)
    with pytest.raises(ReachedError):
        run(script, *flags, "--output", "out.mp4")
    assert [lora.pairs != {} for lora, _ in known] == [True]
