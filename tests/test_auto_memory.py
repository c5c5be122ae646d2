"""--memory auto on a run: the choice is carried out, said, recorded, and leaves the frames. The GPU is pretended: what
would be moved to one stays on the CPU, and what is free is made up.
"""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
import yaml

import infer
from errors import ResourceError
from models.wan.float8 import STORAGE
from models.wan.text_encoder import TextEncoder, text_encoder_from_tensors
from pipelines import placement
from pipelines.audio_avatar.state import AvatarState
from pipelines.clip_plan import Clip
from pipelines.clip_store import ClipStore
from pipelines.command import resolve_settings
from pipelines.denoise import Step
from pipelines.distributed import Processes, start_processes
from pipelines.flags import names_of
from pipelines.job_state import JobState, chosen_before
from pipelines.jobs import list_jobs
from pipelines.long_video.settings import LongVideoSettings
from pipelines.memory import offload_groups
from pipelines.needs import GIB
from pipelines.placement import place
from pipelines.record import begun_as
from pipelines.tiny import tiny_text_encoder
from pipelines.wan import Wan
from preprocess.record import read_metadata
from preprocess.video import read_frames
from tests import tiny
from tests.test_infer import PROJECT, SMALL, fail_once, make
from tests.test_progress import stop_after


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return make(tmp_path_factory.mktemp("reference") / "out.mp4")


@pytest.fixture
def gpu(monkeypatch):
    """A device with memory of its own: `gpu(memory, …)` has `auto` choose this placement."""
    monkeypatch.setattr(Wan, "has_own_memory", True)
    monkeypatch.setattr("pipelines.placement_choice.free_bytes", lambda device: (24 * GIB, 64 * GIB))
    chosen = []

    def choose(memory, *, fp8=False, tiled=False, keeps=True, text_on_device=True, past_on_device=True):
        def choice(needs, *free, **asked):
            chosen.append(asked)
            return place(needs, memory, fp8, tiled, keeps, text_on_device, past_on_device)

        monkeypatch.setattr("pipelines.placement_choice.choose_mode", choice)
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
    monkeypatch.setattr(placement, "READING", 100 * GIB)
    ram = type("Memory", (), {"total": 16 * GIB, "available": 8 * GIB})
    monkeypatch.setattr("psutil.virtual_memory", lambda: ram)
    monkeypatch.setattr("psutil.swap_memory", lambda: type("Swap", (), {"total": 0}))
    with pytest.raises(ResourceError, match=r"about 100\.0 GiB of RAM .* this machine has 16\.0"):
        wan_of().check()


def test_umt5_on_a_cpu_keeps_the_dtype_of_its_file(monkeypatch):
    """bfloat16 as released: mapped, not cast. The rounding it brings is some thousandths of the states here."""
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


# ------------------------------------------------------------------------------------------ what was begun goes on


@pytest.fixture
def choices(gpu, monkeypatch):
    """`choices(fp8)`: as much is free as `auto` takes float8 for, or not; what is asked for is what it takes."""

    def free_for(fp8, fits=True):
        def choice(needs, *free, **asked):
            takes = fp8 if asked["fp8"] is None else asked["fp8"]
            chosen = place(needs, "group", takes, bool(asked["tiled"]), True, True, True)
            return replace(chosen, fits=fits or takes == fp8)

        gpu("group")
        monkeypatch.setattr("pipelines.placement_choice.choose_mode", choice)

    return free_for


def float8_of(output) -> bool:
    return read_metadata(output)["settings"]["fp8"]


@pytest.mark.parametrize("begun", [False, True])
def test_saved_progress_counts_though_less_or_more_memory_is_free(tmp_path, choices, monkeypatch, caplog, calls, begun):
    caplog.set_level("INFO", logger="selfsame")
    choices(begun)
    whole = make(tmp_path / "whole.mp4")
    stop_after(monkeypatch, 1, lambda: make(tmp_path / "out.mp4"))
    choices(not begun)
    calls.clear()
    assert (make(tmp_path / "out.mp4") == whole).all()
    assert len(calls) == 2, "one step was left"
    assert float8_of(tmp_path / "out.mp4") == begun
    lines = [r.getMessage() for r in caplog.records if "are kept, so that it counts" in r.getMessage()]
    assert len(lines) == 1 and (tmp_path / ".out.state.safetensors").name in lines[0]
    assert ("float8 weights" if begun else "float32 weights") in lines[0]
    make(tmp_path / "other.mp4")
    assert float8_of(tmp_path / "other.mp4") != begun, "what was not begun is chosen as ever"


def test_what_no_longer_fits_or_is_of_other_settings_does_not_bind(tmp_path, choices, monkeypatch, caplog):
    caplog.set_level("INFO", logger="selfsame")
    choices(False)
    stop_after(monkeypatch, 1, lambda: make(tmp_path / "out.mp4"))
    for flags, fits in ((["--seed", 3], True), (["--fp8"], True), ([], False)):
        choices(True, fits)
        wan = wan_of("--output", tmp_path / "out.mp4", "--prompt", "x", *flags)
        wan.check(list_jobs(wan.settings))
        assert wan.settings.fp8 is True
    assert "are kept" not in caplog.text


@pytest.mark.parametrize("place_of", ["steps", "clips", "windows"])
def test_each_kind_of_saved_progress_tells_what_was_chosen(tmp_path, place_of):
    output, chosen = tmp_path / "a[1].mp4", {"begun_as": "x", "fp8": True, "tiled": False}
    identity, step = {"num_steps": 3, "chosen": chosen}, Step(0, torch.ones(2), torch.ones(2), {})
    assert chosen_before(output, "x") is None
    if place_of == "steps":
        JobState(output, identity).save(step)
    elif place_of == "clips":
        store = ClipStore(output, identity, [Clip(0, 1, "x", 0, (), None, range(5))])
        store.load()
        store.state(store.clips[0]).save(step)
        assert chosen_before(output, "x")[1] == chosen
        store.paths[0].write_bytes(b"video")
        store.finish(store.clips[0], torch.ones(2))
    else:
        state = AvatarState(output, identity, (1, 1, 2, 2), Processes(0, 1, torch.device("cpu"), False))
        state.open([torch.ones(1, 2, 2)], resumable=False)
    assert chosen_before(output, "x")[1] == chosen
    assert chosen_before(output, "y") is None and chosen_before(tmp_path / "a1.mp4", "x") is None


def test_tiles_are_kept_where_the_vae_made_part_of_the_latents(gpu, monkeypatch):
    gpu("resident", tiled=True)
    for encodes, names in ((False, {"begun_as", "fp8"}), (True, {"begun_as", "fp8", "tiled"})):
        monkeypatch.setattr(Wan, "encodes_pictures", encodes)
        wan = wan_of("--prompt", "x")
        before = wan.chosen(wan.describe("x", 0))
        wan.check()
        after = wan.chosen(wan.describe("x", 0))
        assert after.keys() == names and after["begun_as"] == before["begun_as"]
        assert after.get("tiled") is ("tiled" in names or None)


def test_later_clips_may_change_what_is_said_of_them():
    record = {"settings": {"prompt": ["a"], "num_clips": 2, "fp8": True, "tiled": None, "seed": [0]}}
    other = {"settings": record["settings"] | {"prompt": ["a", "b"], "num_clips": 3, "fp8": False}}
    later = names_of(LongVideoSettings, later_clips=True)
    assert begun_as(record, [], later) == begun_as(other, [], later) != begun_as(record, [])
    assert begun_as(other, []) != begun_as(record, [])
    assert begun_as(record, [], later) != begun_as({"settings": record["settings"] | {"seed": [1]}}, [], later)
