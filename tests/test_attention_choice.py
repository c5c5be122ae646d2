"""--attention_backend auto: which kernel it takes. A stand-in for `try_backend` tells what runs on a GPU."""

import logging

import pytest
import torch

import infer
import infer_long_video
from models.wan import attention
from models.wan.attention import choose_flash
from pipelines.attention_choice import warn_without_flash
from pipelines.distributed import Processes
from pipelines.long_video.command import resolve_long_video
from pipelines.text_to_video.command import resolve_image_to_video
from pipelines.wan import Wan
from preprocess.record import read_metadata

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SVI2 = ["--config", "tiny-i2v-a14b", "--variant", "2.0-pro"]


@pytest.fixture
def runs(monkeypatch) -> set[str]:
    """The backends that run."""
    found = set()

    def try_backend(name, *_, **__):
        if name not in found:
            raise ValueError("it is not here")

    monkeypatch.setattr(attention, "try_backend", try_backend)
    monkeypatch.setattr("pipelines.attention_choice.try_backend", try_backend)
    return found


def model(device: torch.device, *flags: str, script=infer_long_video, resolve=resolve_long_video, split=False) -> Wan:
    settings, config = resolve(script.parse_args(list(flags)))[:2]
    return Wan(settings, config, Processes(0, 1, device, context_parallel=split))


def test_flash_packages_come_before_pytorchs_kernel(runs):
    runs |= {"_native_flash", "native"}
    assert choose_flash(GPU, torch.bfloat16, 128) == "_native_flash"
    runs.add("_flash_3")
    assert choose_flash(GPU, torch.bfloat16, 128) == "_flash_3"
    assert choose_flash(GPU, torch.bfloat16, 128, split=True) == "_native_flash", "the other cannot split a video"
    runs.add("flash")
    assert choose_flash(GPU, torch.bfloat16, 128) == "flash"
    assert choose_flash(CPU, torch.float32, 128) == "native"
    runs.clear()
    assert choose_flash(GPU, torch.float32, 128) == "native"


def test_the_models_that_ask_for_flash_are_given_it(runs):
    runs |= {"flash", "_native_flash"}
    for variant, config, wanted in (
        ("2.0", "tiny-i2v-a14b", "flash"),
        ("2.0-pro", "tiny-i2v-a14b", "flash"),
        ("2.0-wan2.1", "tiny-i2v", "flash"),
        ("shot", "tiny-i2v", "native"),
    ):
        assert model(GPU, "--config", config, "--variant", variant).attention_backend == wanted, variant
    assert model(CPU, *SVI2).attention_backend == "native"
    assert model(GPU, *SVI2, "--attention_backend", "native").attention_backend == "native", "explicit names stay"
    plain = {"script": infer, "resolve": resolve_image_to_video}
    assert model(GPU, "--prompt", "x", **plain).attention_backend == "native"
    ring = ["--prompt", "x", "--ring_degree", "2", "--height", "128"]
    assert model(GPU, *ring, split=True, **plain).attention_backend == "flash", "native cannot"


def test_without_the_package_it_is_said_once(runs, caplog):
    caplog.set_level(logging.WARNING, "selfsame")

    def said(*flags: str) -> list[str]:
        caplog.clear()
        wan = model(GPU, *SVI2, *flags)
        warn_without_flash(wan.settings, wan.attention_backend)
        return [record.getMessage() for record in caplog.records if "16 s" in record.getMessage()]

    assert len(said()) == 1 and "PyTorch's own kernels" in said()[0]
    runs.add("_native_flash")
    assert "on PyTorch's flash kernel" in said()[0]
    assert said("--attention_backend", "native") == []
    runs.add("flash")
    assert said() == []


def test_what_was_taken_is_in_the_record_and_decides_whether_progress_counts(tmp_path):
    output = tmp_path / "out.mp4"
    small = ["--height", "32", "--width", "32", "--num_frames", "9", "--num_inference_steps", "1", "--num_clips", "1"]
    args = infer_long_video.parse_args([*SVI2, *small, "--no_drift_report", "--output", str(output)])
    infer_long_video.main(args)
    record = read_metadata(output)
    assert record["settings"]["attention_backend"] == "auto"
    assert record["attention_backend"] == record["ran_with"]["attention_backend"] == "native"

    settings, config = resolve_long_video(args)[:2]
    wan = Wan(settings, config, Processes(0, 1, CPU, context_parallel=False))
    here = wan.describe("x", 0)
    wan.use_attention_backend("_native_math")
    assert wan.describe("x", 0) != here
