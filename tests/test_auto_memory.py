"""--memory auto on a run: the choice is carried out, said, recorded, and leaves the frames. The GPU is pretended: what
would be moved to one stays on the CPU, and what is free is made up.
"""

import gc
import weakref

import pytest
import torch
import yaml

import infer
from errors import ResourceError
from models.wan.float8 import STORAGE
from models.wan.text_encoder import TextEncoder, text_encoder_from_tensors
from pipelines import memory as memory_module
from pipelines.distributed import start_processes
from pipelines.memory import GIB, offload_groups, place
from pipelines.settings import resolve_settings
from pipelines.tiny import tiny_text_encoder
from pipelines.wan import Wan
from preprocess.record import read_metadata
from preprocess.video import read_frames
from tests import tiny
from tests.test_infer import PROJECT, SMALL, fail_once, make


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return make(tmp_path_factory.mktemp("reference") / "out.mp4")


@pytest.fixture
def gpu(monkeypatch):
    """A device with memory of its own: `gpu(memory, …)` has `auto` choose this placement."""
    monkeypatch.setattr(Wan, "has_own_memory", True)
    monkeypatch.setattr("pipelines.wan.free_bytes", lambda device: (24 * GIB, 64 * GIB))
    chosen = []

    def choose(memory, *, fp8=False, tiled=False, keeps=True, text_on_device=True, past_on_device=True):
        def choice(needs, *free, **asked):
            chosen.append(asked)
            return place(needs, memory, fp8, tiled, keeps, text_on_device, past_on_device)

        monkeypatch.setattr("pipelines.wan.choose_mode", choice)
        return chosen

    return choose


@pytest.mark.parametrize(
    ("memory", "options"),
    [
        ("resident", {}),
        ("model", {"keeps": False, "past_on_device": False}),
        ("group", {"text_on_device": False}),
        ("sequential", {"keeps": False, "past_on_device": False}),
    ],
)
def test_every_choice_makes_the_same_frames(tmp_path, reference, gpu, caplog, memory, options):
    caplog.set_level("INFO", logger="selfsame")
    asked = gpu(memory, **options)
    assert (make(tmp_path / "out.mp4") == reference).all()
    assert asked == [{"device": "cuda", "memory": "auto", "fp8": None, "tiled": None}]
    lines = [record.getMessage() for record in caplog.records if "--memory auto" in record.getMessage()]
    assert len(lines) == 1 and memory in lines[0] and "24.0 GiB" in lines[0]
    assert ("encoded on the CPU" in lines[0]) == (options.get("text_on_device") is False)
    record = read_metadata(tmp_path / "out.mp4")
    assert record["ran_with"]["memory"] == memory and record["settings"]["memory"] == "auto"
    assert (record["settings"]["fp8"], record["settings"]["tiled"]) == (False, False)


def test_out_of_memory_goes_on_from_what_was_chosen(tmp_path, reference, gpu, monkeypatch, caplog):
    gpu("model", keeps=False)
    fail_once(monkeypatch, torch.OutOfMemoryError("CUDA out of memory"))
    assert (make(tmp_path / "out.mp4") == reference).all()
    assert "with --memory model; going on with group" in caplog.text
    record = read_metadata(tmp_path / "out.mp4")
    assert (record["ran_with"]["memory"], record["settings"]["memory"]) == ("group", "auto")


def test_what_changes_the_frames_is_recorded_and_made_again_anywhere(tmp_path, reference, gpu):
    gpu("group", fp8=True, tiled=True, past_on_device=False)
    chosen = make(tmp_path / "chosen.mp4")
    assert (chosen != reference).any()
    record = read_metadata(tmp_path / "chosen.mp4")["settings"]
    assert (record["memory"], record["fp8"], record["tiled"]) == ("auto", True, True)

    asked = gpu("resident", fp8=True, tiled=True)  # a larger card
    again = ["--config", str(tmp_path / "chosen.json"), "--output", str(tmp_path / "again.mp4")]
    infer.main(infer.parse_args(again))
    assert (asked[-1]["fp8"], asked[-1]["tiled"]) == (True, True)
    assert (read_frames(tmp_path / "again.mp4") == chosen).all()


def wan_of(*flags) -> Wan:
    return Wan(*resolve_settings(infer.parse_args([*SMALL, *map(str, flags)])), start_processes("cpu"))


def test_auto_does_not_choose_what_was_ruled_out(gpu):
    asked = gpu("resident")
    for flags, fp8 in (([], None), (["--compile"], False), (["--fp8"], True)):
        wan_of(*flags).check()
        assert asked[-1]["fp8"] is fp8


def test_experts_that_the_ram_does_not_hold_are_read_again(tmp_path, gpu):
    config = tmp_path / "two.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "base": str(PROJECT / "configs" / "tiny.yaml"),
                "description": "two experts",
                "tiny": True,
                "seed": 0,
                "experts": {"high": "high_noise_model", "low": "low_noise_model"},
                "boundary": 0.9,
                "defaults": {"guidance_scale": {"high": 4.0, "low": 3.0}},
            }
        )
    )
    for memory in ("model", "group"):
        gpu(memory, keeps=False)
        wan = wan_of("--config", config, "--ip_image", "assets/face.png", "--prompt", "x")
        wan.check()
        first = weakref.ref(wan.transformer(0))
        wan.transformer(1)
        gc.collect()
        assert first() is None and list(wan._transformers) == [1]
        second = weakref.ref(wan.transformer(1))
        wan.release_transformers()
        assert (second() is None) == (memory == "model"), "the VAE has the device to itself"


def test_prompts_go_on_on_the_cpu_after_running_out_of_memory(gpu, monkeypatch, caplog):
    gpu("model")
    wan = wan_of("--prompt", "x")
    wan.check()
    expected = wan.encode_prompts(["x"])["x"]
    encode, failed = TextEncoder.encode_prompts, []

    def fails_once(self, prompts):
        if not failed:
            failed.append(1)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode(self, prompts)

    monkeypatch.setattr(TextEncoder, "encode_prompts", fails_once)
    assert (wan.encode_prompts(["x"])["x"] == expected).all()
    assert "going on with the CPU" in caplog.text
    failed.clear()
    monkeypatch.setattr(Wan, "has_own_memory", False)
    with pytest.raises(ResourceError, match="out of memory while encoding the prompts"):
        wan.encode_prompts(["x"])


def test_huge_sizes_of_the_tiny_model_are_refused(monkeypatch):
    memory = type("Memory", (), {"total": 24 * GIB, "available": 20 * GIB})
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
    wan = wan_of("--height", 8192, "--width", 8192)
    with pytest.raises(ResourceError, match="--width 8192 --height 8192"):
        wan.check()
    wan_of().check()


def test_ram_that_cannot_hold_the_waiting_weights_is_said_before_loading(gpu, monkeypatch):
    gpu("group")
    monkeypatch.setattr(memory_module, "READING", 100 * GIB)
    ram = type("Memory", (), {"total": 16 * GIB, "available": 8 * GIB})
    monkeypatch.setattr("psutil.virtual_memory", lambda: ram)
    monkeypatch.setattr("psutil.swap_memory", lambda: type("Swap", (), {"total": 0}))
    with pytest.raises(ResourceError, match=r"about 100\.0 GiB of RAM .* this machine has 16\.0"):
        wan_of().check()


def test_umt5_on_a_cpu_keeps_the_dtype_of_its_file(monkeypatch):
    """bfloat16 as released: mapped, not cast. The rounding it brings is a few thousandths of the states."""
    whole = tiny_text_encoder(tiny.CONFIG)
    tensors = {name: t.to(torch.bfloat16) for name, t in whole.encoder.state_dict().items()}
    kept = text_encoder_from_tensors(tensors, whole.tokenizer, dtype=None)
    assert {p.dtype for p in kept.parameters()} == {torch.bfloat16}
    assert kept.encoder.block[0].layer[0].SelfAttention.q.weight.data_ptr() in {t.data_ptr() for t in tensors.values()}
    wide = text_encoder_from_tensors({n: t.float() for n, t in tensors.items()}, whole.tokenizer, dtype=None)
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    (states,), (exact,) = kept.encode_prompts(["a woman reads"]), wide.encode_prompts(["a woman reads"])
    assert (states.float() - exact).norm() < 0.02 * exact.norm()
    half = text_encoder_from_tensors({n: t.half() for n, t in tensors.items()}, whole.tokenizer, dtype=None)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_weights_that_a_stream_copies_are_pinned_before(monkeypatch):
    """diffusers pins a copy of all; a tensor that is pinned already is not copied."""
    model, pinned, offloaded = tiny.transformer(), [], []
    monkeypatch.setattr("pipelines.memory.pin_weights", pinned.append)
    monkeypatch.setattr(type(model), "enable_group_offload", lambda self, *_, **options: offloaded.append(options))
    offload_groups(model, torch.device("cpu"), "group")
    offload_groups(model, torch.device("cuda"), "sequential")
    assert not pinned and [options["use_stream"] for options in offloaded] == [False, False]
    offload_groups(model, torch.device("cuda"), "group")
    assert pinned == [model] and offloaded[-1]["use_stream"] is True


def test_an_fp8_run_holds_float8_weights_alone(gpu):
    gpu("resident", fp8=True)
    wan = wan_of("--prompt", "x")
    wan.check()
    linears = [p for n, p in wan.transformer(0).named_parameters() if n.startswith("blocks") and p.ndim == 2]
    assert linears and {p.dtype for p in linears} == {STORAGE}
