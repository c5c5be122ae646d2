"""The memory check: who is refused, and what the modes are estimated to need."""

import dataclasses

import pytest
import torch

import infer
from errors import ResourceError
from models.wan.config import VARIANTS
from pipelines.memory import GIB, MODES, check_memory, estimate_device_bytes, next_mode
from pipelines.settings import resolve_settings

FLAGS = ["--wan_version", "2.1", "--ip_image", "assets/face.png", "--prompt", "x"]


@pytest.fixture
def settings(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)
    return resolve_settings(infer.parse_args(FLAGS))[0]


def estimate(settings, experts=1, **changes):
    return estimate_device_bytes(dataclasses.replace(settings, **changes), VARIANTS["t2v-14B"], 2, experts)


def test_each_mode_needs_less_and_the_first_holds_the_weights(settings):
    needs = [estimate(settings, memory=mode, experts=2) for mode in MODES]
    assert needs == sorted(needs, reverse=True)
    weights = 14.288e9 * 2  # specs: 14.288 B parameters in bfloat16
    assert needs[0] > 2 * weights
    assert weights < needs[1] < 2 * weights
    assert needs[2] < 0.4 * weights
    halved = estimate(settings, memory="model", fp8=True)
    assert weights / 2 < halved < estimate(settings, memory="model") - 0.45 * weights


def test_more_frames_and_pixels_need_more(settings):
    base = estimate(settings)
    assert estimate(settings, num_frames=321) > base
    assert estimate(settings, height=960) > base
    assert estimate(settings, height=960, tiled=True) < estimate(settings, height=960)
    assert estimate(settings, ip_image=("a", "b")) >= base


def test_hopeless_run_is_refused_with_advice(settings, monkeypatch):
    memory = type("Memory", (), {"total": 8 * GIB, "available": 6 * GIB})
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
    device = torch.device("cpu")
    with pytest.raises(ResourceError) as error:
        check_memory(settings, 9 * GIB, device)
    for part in ("9.0 GiB", "8.0 GiB", "--width 832 --height 480 --num_frames 81", "--memory group", "--tiled"):
        assert part in str(error.value)
    check_memory(settings, 5 * GIB, device)


def test_tight_run_is_warned_of(settings, monkeypatch, caplog):
    memory = type("Memory", (), {"total": 8 * GIB, "available": 6 * GIB})
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
    check_memory(settings, 7 * GIB, torch.device("cpu"))
    assert "7.0 GiB" in caplog.text


def test_modes_end():
    assert [next_mode(mode) for mode in MODES] == ["model", "group", "sequential", None]
