"""VACE: the branch, its context, masks and windows; and infer_with_vace.py as a user runs it, on the tiny model."""

import json
import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
import yaml
from diffusers import FirstBlockCacheConfig
from PIL import Image
from safetensors.torch import save_file

import infer
import infer_with_vace
from configs import load_config
from errors import InputError, UserError, WeightsError
from models.vace import default_layers, load_vace, load_vace_branch
from models.wan.checkpoint import convert_names, to_diffusers_name
from models.wan.schedulers import get_schedule
from models.wan.tea_cache import TeaCache
from pipelines.denoise import POSITIVE, Expert, denoise, no_guidance
from pipelines.distributed import start_processes
from pipelines.job_state import JobState
from pipelines.needs import MODES
from pipelines.tiny import fill_from_seed, tiny_stand_in_tensors, tiny_transformer, tiny_vace
from pipelines.vace import pipeline as vace_pipeline
from pipelines.vace.command import resolve_vace_settings, size_within, spread_frames
from pipelines.vace.context import fit_reference, fold_mask, noise_with_references, vace_context
from pipelines.vace.masks import read_mask
from pipelines.vace.part import vace_part
from pipelines.wan import Wan
from pipelines.windows import plan_windows
from preprocess.record import read_metadata
from preprocess.video import probe, read_frames
from preprocess.video_writer import frames_to_uint8, write_video
from tests import tiny
from tests.test_infer import fail_once, write_release
from tests.tiny import CONFIG, GRID, TIMESTEP

PROJECT = Path(__file__).parent.parent
FAST = ["--num_inference_steps", "2", "--no_face_crop"]


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def context(seed: int = 5) -> torch.Tensor:
    return tiny.latents(seed, channels=96)


# ------------------------------------------------------------------------------------------------------- the branch


def test_scale_0_is_no_vace_bit_for_bit():
    model, branch = tiny.transformer(), tiny.vace_branch()
    plain = model(tiny.latents(), TIMESTEP, tiny.prompt())
    off = model(tiny.latents(), TIMESTEP, tiny.prompt(), plugins=[branch.plugin(context(), 0)])
    on = model(tiny.latents(), TIMESTEP, tiny.prompt(), plugins=[branch.plugin(context(), 1)])
    assert torch.equal(plain, off)
    assert (plain - on).abs().max() > 1e-3


def test_hints_are_computed_one_by_one_right_before_they_are_added():
    model, branch = tiny.transformer(), tiny.vace_branch()
    order = []
    for i in range(2):
        model.blocks[i].ffn.register_forward_hook(lambda *_, i=i: order.append(f"base {i}"))
        branch.vace_blocks[i].register_forward_hook(lambda *_, i=i: order.append(f"hint {i}"))
    model(tiny.latents(), TIMESTEP, tiny.prompt(), plugins=[branch.plugin(context())])
    assert order == ["base 0", "hint 0", "base 1", "hint 1"]


def test_prompt_keys_of_the_branch_are_computed_once():
    model, branch = tiny.transformer(), tiny.vace_branch()
    calls = []
    for block in branch.vace_blocks:
        block.cross_attn.k.register_forward_hook(lambda *_: calls.append(1))

    def run(prompt, steps=3):
        calls.clear()
        with torch.no_grad():
            plugin = branch.plugin(context())
            return [model(tiny.latents(s), TIMESTEP, prompt, plugins=[plugin]) for s in range(steps)], len(calls)

    (kept, few), (recomputed, many) = run(tiny.prompt()), run(tiny.prompt(keep_keys_values=False))
    assert (few, many) == (2, 6)
    assert all(torch.equal(a, b) for a, b in zip(kept, recomputed, strict=True))
    other, _ = run(tiny.prompt(seed=4))
    assert not torch.equal(other[0], kept[0])
    shared = tiny.prompt()  # another branch on the same prompt has keys of its own
    run(shared)
    second = fill_from_seed(tiny.vace_branch(), 99)
    with torch.no_grad():
        pair = [
            model(tiny.latents(), TIMESTEP, prompt, plugins=[second.plugin(context())])
            for prompt in (shared, tiny.prompt())
        ]
    assert torch.equal(*pair)


def test_batch_equals_single_and_ragged():
    model, branch = tiny.transformer(), tiny.vace_branch()
    alone = [
        model(tiny.latents(s), TIMESTEP, tiny.prompt(), plugins=[branch.plugin(context(s + 4))])[0] for s in (1, 2)
    ]
    batch = torch.cat([tiny.latents(1), tiny.latents(2)])
    prompts = tiny.prompt()
    prompts.text = prompts.text * 2
    contexts = torch.cat([context(5), context(6)])
    together = model(batch, TIMESTEP.repeat(2), prompts, plugins=[branch.plugin(contexts)])
    torch.testing.assert_close(together, torch.stack(alone), rtol=0, atol=1e-4)
    padded = model(list(batch), TIMESTEP.repeat(2), prompts, plugins=[branch.plugin(list(contexts))], seq_len=90)
    torch.testing.assert_close(torch.stack(padded), torch.stack(alone), rtol=0, atol=1e-4)


def test_context_of_another_size_is_refused():
    plugin = tiny.vace_branch().plugin(context()[:, :, :2])
    with pytest.raises(ValueError, match="control context has a grid"):
        tiny.transformer()(tiny.latents(), TIMESTEP, tiny.prompt(), plugins=[plugin])


def test_bfloat16_stays_close_to_float32():
    def run(dtype):
        model, branch = tiny.transformer().set_compute_dtype(dtype), tiny.vace_branch().set_compute_dtype(dtype)
        return model(tiny.latents(), TIMESTEP, tiny.prompt(), plugins=[branch.plugin(context())])

    exact, ours = run(torch.float32), run(torch.bfloat16)
    assert ours.dtype == torch.float32
    assert 0 < (ours - exact).norm() / exact.norm() < 0.02


def sample(model, branch, step_caches=None, steps: int = 6) -> tuple[torch.Tensor, int]:
    """A run with an identity and control; and how often VACE blocks ran."""
    calls = []
    hooks = [block.register_forward_hook(lambda *_: calls.append(1)) for block in branch.vace_blocks]
    identity = tiny.stand_in(model).encode(model, [tiny.photo()], GRID)
    plugins = [identity, branch.plugin(context())]
    expert = Expert(model, {POSITIVE: tiny.prompt()}, no_guidance, plugins, step_caches or {})
    out = denoise(tiny.latents(), get_schedule("euler", steps, 5.0), lambda step: expert)
    for hook in hooks:
        hook.remove()
    return out, len(calls)


def test_first_block_cache_at_threshold_0_equals_the_uncached_run():
    branch = tiny.vace_branch()
    plain, calls = sample(tiny.transformer(), branch)
    assert calls == 2 * 6
    for threshold, fewer in ((0.0, False), (10.0, True)):
        model = tiny.transformer()
        identity = tiny.stand_in(model).encode(model, [tiny.photo()], GRID)  # its pass is not a step of the cache
        model.enable_cache(FirstBlockCacheConfig(threshold=threshold))
        expert = Expert(model, {POSITIVE: tiny.prompt()}, no_guidance, [identity, branch.plugin(context())])
        calls = []
        hook = branch.vace_blocks[1].register_forward_hook(lambda *_, calls=calls: calls.append(1))
        cached = denoise(tiny.latents(), get_schedule("euler", 6, 5.0), lambda step, expert=expert: expert)
        hook.remove()
        assert torch.equal(cached, plain) != fewer
        assert (len(calls) < 6) == fewer


def test_step_skipped_by_teacache_has_its_hints_once():
    """The same input at a computed and at a skipped step gives the same output: hints come with the residual only."""
    model, branch = tiny.transformer(), tiny.vace_branch()
    cache = TeaCache(num_steps=3, threshold=1e9)
    calls = []
    branch.vace_blocks[0].register_forward_hook(lambda *_: calls.append(1))
    plugin = branch.plugin(context())
    computed, skipped, last = (
        model(tiny.latents(), TIMESTEP, tiny.prompt(), plugins=[plugin], step_cache=cache) for _ in range(3)
    )
    assert cache.skipped == [False, True, False]
    assert len(calls) == 2
    torch.testing.assert_close(skipped, computed, rtol=0, atol=1e-4)
    assert torch.equal(last, computed)


# ------------------------------------------------------------------------------------------------------------ files


def checkpoint() -> dict[str, torch.Tensor]:
    return tiny_transformer(CONFIG).state_dict() | tiny_vace(CONFIG).state_dict()


def load(path, **options):
    return load_vace(path, dtype=torch.float32, num_heads=2, **options)


def test_every_layout_gives_the_same_network(tmp_path):
    whole = checkpoint()
    save_file(whole, tmp_path / "whole.safetensors")
    diffusers = tmp_path / "repository" / "transformer"
    diffusers.mkdir(parents=True)
    (diffusers.parent / "model_index.json").write_text("{}")
    save_file(convert_names(whole, to_diffusers_name), diffusers / "diffusion_pytorch_model.safetensors")
    save_file({f"model.diffusion_model.{k}": v for k, v in whole.items()}, tmp_path / "comfy.safetensors")
    for name in ("base", "branch"):
        part = {k: v for k, v in whole.items() if k.startswith("vace_") == (name == "branch")}
        save_file(part, tmp_path / f"{name}.safetensors")
    for path, options in (
        ("whole.safetensors", {}),
        ("repository", {}),
        ("comfy.safetensors", {}),
        ("branch.safetensors", {"base_path": tmp_path / "base.safetensors"}),
    ):
        transformer, branch = load(tmp_path / path, **options)
        assert list(branch.config.vace_layers) == [0, 1]
        state = transformer.state_dict() | branch.state_dict()
        assert state.keys() == whole.keys(), path
        assert all(torch.equal(state[name], whole[name]) for name in whole), path


def test_a_branch_is_read_for_another_base(tmp_path):
    """Of a released file the branch alone, beside an image-to-video transformer of its width."""
    whole = checkpoint()
    save_file(whole, tmp_path / "whole.safetensors")
    base = tiny_transformer(load_config("tiny-i2v"))
    branch = load_vace_branch(tmp_path / "whole.safetensors", base, dtype=torch.float32)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in branch.state_dict().items())
    with pytest.raises(WeightsError, match="--vace_path .*no VACE weights"):
        save_file(base.state_dict(), tmp_path / "base.safetensors")
        load_vace_branch(tmp_path / "base.safetensors", base)


def test_wrong_files_are_refused(tmp_path):
    whole = checkpoint()
    cases = {
        "no VACE weights": {k: v for k, v in whole.items() if not k.startswith("vace_")},
        "--base_path": {k: v for k, v in whole.items() if k.startswith("vace_")},
        "1 missing (vace_blocks.1.after_proj.weight)": {
            k: v for k, v in whole.items() if k != "vace_blocks.1.after_proj.weight"
        },
        "1 unexpected (vace_blocks.1.extra)": whole | {"vace_blocks.1.extra": torch.zeros(1)},
        "incomplete VACE branch": {k: v for k, v in whole.items() if "vace_patch" not in k},
    }
    for number, (message, tensors) in enumerate(cases.items()):
        save_file(tensors, tmp_path / f"{number}.safetensors")
        with pytest.raises(WeightsError) as error:
            load(tmp_path / f"{number}.safetensors")
        assert message in str(error.value)
    (tmp_path / "config.json").write_text(json.dumps({"vace_layers": [0, 5]}))
    save_file(whole, tmp_path / "whole.safetensors")
    with pytest.raises(WeightsError, match=r"on layers \[0, 5\] of 2"):
        load(tmp_path / "whole.safetensors")


def test_a_control_that_does_not_fit_the_memory_is_refused(tmp_path, monkeypatch):
    write_clip(tmp_path / "clip.mp4")
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=10_000, total=10_000))
    flags = ["--reference_video", str(tmp_path / "clip.mp4"), "--output", str(tmp_path / "out.mp4")]
    with pytest.raises(UserError, match="9 frames of 96x64") as error:
        infer_with_vace.main(infer_with_vace.parse_args(flags))
    assert error.value.exit_code == 5


def test_the_branch_and_its_prompt_keys_count_as_memory():
    settings, config = resolve_vace_settings(infer_with_vace.parse_args(["--output", "x.mp4"]))
    with_branch, without = (
        Wan(settings, config, start_processes("cpu"), parts).needs() for parts in ([vace_part(settings, config)], [])
    )
    added = {memory: with_branch.weights[memory] - without.weights[memory] for memory in MODES}

    branch = tiny.vace_branch()
    weights = sum(p.numel() for p in branch.parameters())
    largest = max(sum(p.numel() for p in block.parameters()) for block in branch.vace_blocks)
    assert added["model"] == added["resident"] == with_branch.expert - without.expert == 4 * weights
    outside = sum(p.numel() for p in branch.vace_patch_embedding.parameters())
    assert added["group"] == 4 * (outside + largest)
    assert added["sequential"] == 0
    keys = 2 * 2 * 512 * tiny.DIM * 2  # keys and values of two prompts in two blocks
    assert with_branch.kept_text - without.kept_text == 4 * keys


def test_released_layers():
    assert default_layers(15, 30) == list(range(0, 30, 2))
    assert default_layers(8, 40) == [0, 5, 10, 15, 20, 25, 30, 35]
    with pytest.raises(WeightsError, match=r"config\.json"):
        default_layers(9, 40)


# ------------------------------------------------------------------------------------------------- context and plans


class FlatVae:
    """Encodes a clip to its mean brightness: shows what went where."""

    def encode(self, clip: torch.Tensor) -> torch.Tensor:
        _, _, frames, height, width = clip.shape
        return clip.mean() * torch.ones(1, 16, (frames + 3) // 4, height // 8, width // 8)


def test_references_come_first_in_their_order_and_masks_are_white_for_make():
    grey = [numpy.full((32, 32, 3), value, numpy.uint8) for value in (255, 0)]
    references = [fit_reference(picture, 32, 32) for picture in grey]
    video = torch.full((1, 3, 5, 32, 32), 0.5)
    mask = torch.ones(1, 1, 5, 32, 32)
    whole = vace_context(FlatVae(), video, mask, references)
    assert whole.shape == (1, 96, 4, 4, 4)
    assert whole[0, 0, :, 0, 0].tolist() == [1.0, -1.0, 0.0, 0.0]  # kept: the references; nothing of the video
    assert whole[0, 16, :, 0, 0].tolist() == [0.0, 0.0, 0.5, 0.5]  # made: the video
    assert whole[0, 32:, :, 0, 0].sum(0).tolist() == [0, 0, 64, 64]
    kept = vace_context(FlatVae(), video, 0 * mask)
    assert kept[0, 0, :, 0, 0].tolist() == [0.5, 0.5]
    assert not kept[0, 16:].any()


def test_folded_mask_puts_each_pixel_in_its_channel():
    mask = torch.zeros(1, 1, 9, 32, 48)
    mask[0, 0, 4, 8 + 3, 16 + 5] = 1  # frame 4 is the nearest to latent frame 1 of 3; row 3, column 5 of cell (1, 2)
    folded = fold_mask(mask)
    assert folded.shape == (1, 64, 3, 4, 6)
    assert folded.nonzero().tolist() == [[0, 3 * 8 + 5, 1, 1, 2]]


def test_noise_of_the_video_is_the_same_with_and_without_references_under_stand_in():
    plain = noise_with_references((16, 9, 32, 32), 3, 0, last_first=True)
    released = noise_with_references((16, 9, 32, 32), 3, 2, last_first=False)
    moved = noise_with_references((16, 9, 32, 32), 3, 2, last_first=True)
    assert plain.shape[2] == 3
    assert released.shape[2] == 5
    assert torch.equal(moved[:, :, :2], released[:, :, 3:])
    assert torch.equal(moved[:, :, 2:], released[:, :, :3])


@pytest.mark.parametrize("window", [9, 33, 81])
def test_windows_cover_every_frame(window):
    for overlap in (1, 5):
        for num_frames in range(1, 330, 4):
            windows = plan_windows(num_frames, window, overlap)
            assert windows[0].start == windows[0].overlap == 0
            assert windows[-1].stop == num_frames
            assert all(w.stop - w.start == min(window, num_frames) for w in windows)
            for before, after in zip(windows, windows[1:], strict=False):
                assert after.start % 4 == 0
                assert overlap <= after.overlap == before.stop - after.start < window


def test_frames_are_spread_and_sizes_fit():
    frames, fps = spread_frames(100, 24.0, 21)
    assert len(frames) == 21
    assert (frames[0], frames[-1]) == (0, 99)
    assert fps == pytest.approx(21 / (99.5 / 24))
    assert spread_frames(7, 16.0, 81)[0] == [0, 1, 3, 4, 6]
    assert size_within(1080, 1920, 480 * 832) == (480, 832)
    assert size_within(64, 96, 480 * 832) == (64, 96)


# ----------------------------------------------------------------------------------------------------------- masks


def write_clip(path: Path, frames: int = 9, height: int = 64, width: int = 96, fps: float = 12) -> Path:
    """A bright square that walks over a gradient."""
    clip = numpy.zeros((frames, height, width, 3), numpy.uint8) + numpy.arange(width, dtype=numpy.uint8)[:, None]
    for frame in range(frames):
        clip[frame, 16:32, 4 * frame : 4 * frame + 16] = 255
    write_video(path, [clip], fps=fps, quality=10)
    return path


def write_mask(path: Path, value=(255, 255, 255), height: int = 64, width: int = 96) -> Path:
    mask = numpy.zeros((height, width, 3), numpy.uint8)
    mask[: height // 2] = value
    Image.fromarray(mask).save(path)
    return path


def test_mask_is_read_as_black_and_white(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    mask = read_mask(str(write_mask(tmp_path / "half.png")), 3)
    assert mask.shape == (3, 64, 96)
    assert (mask[:, :32] == 255).all()
    assert not mask[:, 32:].any()
    assert "50% is white and will be made, the rest is kept" in caplog.text
    with pytest.raises(InputError, match="coloured"):
        read_mask(str(write_mask(tmp_path / "red.png", (255, 0, 0))), 3)
    read_mask(str(write_mask(tmp_path / "black.png", (0, 0, 0))), 3)
    assert "White is what the model makes" in caplog.text
    read_mask(str(write_mask(tmp_path / "grey.png", (128, 128, 128))), 3)
    assert "neither black nor white" in caplog.text


@pytest.fixture(scope="module")
def media(tmp_path_factory) -> Path:
    """A folder of clips and masks that do not fit each other."""
    folder = tmp_path_factory.mktemp("media")
    write_clip(folder / "clip.mp4")
    write_clip(folder / "short.mp4", frames=5)
    write_mask(folder / "half.png")
    write_mask(folder / "red.png", (255, 0, 0))
    write_mask(folder / "small.png", height=32, width=32)
    return folder


@pytest.mark.parametrize(
    ("flags", "exit_code", "words"),
    [
        (["--reference_mask", "half.png"], 2, ["--reference_mask needs --reference_video"]),
        (["--resample_control"], 2, ["--resample_control needs --reference_video"]),
        (["--reference_video", "missing.mp4"], 3, ["--reference_video", "missing.mp4"]),
        (["--reference_video", "half.png", "--reference_mask", "x.mp4"], 3, ["--reference_"]),
        (["--reference_video", "clip.mp4", "--reference_mask", "small.png"], 3, ["32x32", "96x64"]),
        (["--reference_video", "clip.mp4", "--reference_mask", "short.mp4"], 3, ["5 frames", "has 9"]),
        (["--reference_video", "clip.mp4", "--reference_mask", "red.png"], 3, ["coloured", "greyscale"]),
        (["--reference_video", "clip.mp4", "--height", "64"], 2, ["--height and --width"]),
        (["--reference_video", "clip.mp4", "--num_frames", "13"], 2, ["--num_frames 13", "has 9"]),
        (["--reference_image", "missing.png"], 3, ["--reference_image missing.png"]),
        (["--vace_scale", "-1"], 2, ["--vace_scale -1", "0 to 10"]),
        (["--vace_scale", "nan"], 2, ["--vace_scale nan"]),
        (["--window_frames", "10"], 2, ["--window_frames 10", "4n+1"]),
        (["--window_frames", "9", "--window_overlap", "9"], 2, ["--window_overlap 9", "--window_frames 9"]),
        (["--wan_version", "2.2"], 2, ["--wan_version 2.2", "use 2.1"]),
        (["--config", "stand-in-wan2.2", "--prompt", "x"], 2, ["stand-in-wan2.2", "Wan2.1"]),
        (["--vace_path", "missing", "--prompt", "x"], 4, ["missing", "--only wan2.1-vace-14B"]),
        (["--config", "wan2.1-vace-1.3B", "--prompt", "x"], 4, ["--only wan2.1-vace-1.3B"]),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else None,
)
def test_bad_input_is_one_clear_line(tmp_path, media, monkeypatch, flags, exit_code, words):
    monkeypatch.chdir(media)
    with pytest.raises(UserError) as error:
        infer_with_vace.main(infer_with_vace.parse_args(["--output", str(tmp_path / "out.mp4"), *flags]))
    message = str(error.value)
    assert error.value.exit_code == exit_code, message
    assert "\n" not in message
    for word in words:
        assert word in message, message
    assert not (tmp_path / "out.mp4").exists()


# ------------------------------------------------------------------------------------------------------ end to end


def make(output: Path, *flags) -> numpy.ndarray:
    """Run in this process; the frames of the file."""
    made = infer_with_vace.main(infer_with_vace.parse_args([*FAST, "--output", str(output), *map(str, flags)]))
    assert made == [output]
    return read_frames(output)


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return write_clip(tmp_path_factory.mktemp("control") / "clip.mp4")


@pytest.fixture(scope="module")
def reference(tmp_path_factory, clip) -> numpy.ndarray:
    return make(tmp_path_factory.mktemp("reference") / "out.mp4", "--reference_video", clip)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """The tiny model's config without identity weights, as the 1.3B model has none."""
    config = yaml.safe_load((PROJECT / "configs" / "tiny.yaml").read_text(encoding="utf-8"))
    del config["stand_in"], config["defaults"]["ip_image"]
    file = tmp_path_factory.mktemp("config") / "plain.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def test_command_without_arguments(tmp_path):
    output = tmp_path / "out.mp4"
    command = [sys.executable, "infer_with_vace.py", "--output", str(output)]
    result = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert "UNTRAINED" in result.stderr
    assert "made from assets/face.png" in result.stderr
    info = probe(output)
    assert (info.num_frames, info.width, info.height) == (9, 128, 128)
    assert read_metadata(output)["control"]["video"]


def test_help_is_fast():
    command = [sys.executable, "-X", "importtime", "infer_with_vace.py", "--help"]
    result = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=20, check=False)
    assert result.returncode == 0
    assert "WHITE is what the model makes, BLACK is kept" in result.stdout
    assert "torch" not in result.stderr


def test_control_decides_size_length_and_rate(tmp_path, plain, caplog):
    control = write_clip(tmp_path / "odd.mp4", frames=11, height=70, width=102)
    output = tmp_path / "out.mp4"
    base = ("--config", plain, "--reference_video", control)
    assert make(output, *base).shape == (9, 64, 96, 3)
    assert probe(output).fps == pytest.approx(12)
    assert "has 11 frames, the first 9 are used" in caplog.text
    assert "its centre of 96x64 is used" in caplog.text
    given = ("--height", 80, "--width", 64, "--num_frames", 5, "--fps", 8)
    assert make(tmp_path / "given.mp4", *base, *given).shape == (5, 80, 64, 3)
    assert probe(tmp_path / "given.mp4").fps == pytest.approx(8)
    spread = make(tmp_path / "spread.mp4", *base, "--resample_control", "--num_frames", 5)
    assert spread.shape == (5, 64, 96, 3)
    assert probe(tmp_path / "spread.mp4").fps == pytest.approx(5 / (10.5 / 12), rel=1e-3)


def test_every_flag_changes_the_video(tmp_path, clip, plain, reference):
    base = ("--config", plain, "--reference_video", clip)
    without = make(tmp_path / "without.mp4", *base)
    assert (without != reference).mean() > 1e-3, "the identity does nothing"
    write_mask(tmp_path / "half.png")
    Image.fromarray(numpy.full((40, 60, 3), (200, 30, 30), numpy.uint8)).save(tmp_path / "red.png")
    pictures = [tmp_path / "red.png", "assets/face.png"]
    made = {}
    for name, flags in {
        "mask": ("--reference_mask", tmp_path / "half.png"),
        "scale": ("--vace_scale", 0.5),
        "one": ("--reference_image", pictures[0]),
        "two": ("--reference_image", *pictures),
        "turned": ("--reference_image", *pictures[::-1]),
    }.items():
        made[name] = make(tmp_path / f"{name}.mp4", *base, *flags)
        assert made[name].shape == without.shape
        assert (made[name] != without).mean() > 1e-3, name
    assert (made["two"] != made["turned"]).mean() > 1e-3, "the order of the pictures does nothing"
    size = ("--height", 64, "--width", 96)
    alone = make(tmp_path / "alone.mp4", "--config", plain, "--reference_image", pictures[0], *size)
    assert (alone != made["one"]).mean() > 1e-3


def test_scale_is_lower_beside_an_identity():
    """0.8 as Stand-In's own script has it; what is given counts in either case."""
    for flags, scale in (
        (["--config", "wan2.1-vace-1.3B"], 1.0),
        (["--ip_image", "assets/face.png"], 0.8),
        (["--ip_image", "assets/face.png", "--vace_scale", "1"], 1.0),
    ):
        args = infer_with_vace.parse_args(["--prompt", "x", *flags])
        assert resolve_vace_settings(args)[0].vace_scale == scale


def test_scale_0_is_the_video_of_infer(tmp_path, clip, plain):
    base = ["--config", str(plain)]
    with_vace = make(tmp_path / "vace.mp4", *base, "--reference_video", clip, "--vace_scale", 0)
    size = ["--height", "64", "--width", "96", "--num_frames", "9", "--fps", "12"]
    infer.main(infer.parse_args([*FAST, *base, *size, "--output", str(tmp_path / "plain.mp4")]))
    assert (with_vace == read_frames(tmp_path / "plain.mp4")).all()


@pytest.mark.parametrize(
    "flags",
    [
        ("--memory", "group"),
        ("--memory", "sequential"),
        ("--step_cache", "first_block", "--step_cache_threshold", 0),
    ],
    ids=lambda flags: " ".join(map(str, flags)),
)
def test_flags_of_the_machine_leave_the_video(tmp_path, clip, reference, flags):
    assert (make(tmp_path / "out.mp4", "--reference_video", clip, *flags) == reference).all()


def test_released_layout_equals_the_model_in_memory_and_its_record_makes_it_again(tmp_path, clip, reference):
    """Base and branch in one file, as released, and Stand-In's beside it; then the JSON as --config."""
    write_release(tmp_path / "vace", CONFIG)
    save_file(checkpoint(), tmp_path / "vace" / "diffusion_pytorch_model.safetensors")
    heads = {"num_heads": 2, "model_type": "vace", "vace_layers": [0, 1]}
    (tmp_path / "vace" / "config.json").write_text(json.dumps(heads))
    torch.save(tiny_stand_in_tensors(CONFIG), tmp_path / "Stand-In_wan2.1.ckpt")
    flags = ("--config", "configs/tiny.yaml", "--vace_path", tmp_path / "vace", "--reference_video", clip)
    files = make(tmp_path / "files.mp4", *flags, "--stand_in_path", tmp_path, "--memory", "resident")
    assert (files == reference).all()
    assert not read_metadata(tmp_path / "files.mp4")["untrained"]
    again = make(tmp_path / "again.mp4", "--config", tmp_path / "files.json")
    assert (again == files).all()
    assert read_metadata(tmp_path / "again.mp4") == read_metadata(tmp_path / "files.mp4")


def test_out_of_memory_and_nan_reload_the_branch_too(tmp_path, clip, reference, monkeypatch, caplog):
    fail_once(monkeypatch, torch.OutOfMemoryError("CUDA out of memory"))
    flags = ("--reference_video", clip, "--memory", "resident")
    assert (make(tmp_path / "memory.mp4", *flags) == reference).all()
    assert "going on with model" in caplog.text
    monkeypatch.undo()
    fail_once(monkeypatch, float("nan"))
    make(tmp_path / "nan.mp4", *flags, "--attention_backend", "_native_math")
    assert read_metadata(tmp_path / "nan.mp4")["ran_with"]["attention_backend"] == "native"


def test_long_control_is_made_in_windows_and_goes_on_after_an_interruption(tmp_path, plain, monkeypatch):
    """What a finished window gave is kept: it is neither encoded, denoised nor decoded again."""
    control = write_clip(tmp_path / "long.mp4", frames=18)
    flags = ("--config", plain, "--reference_video", control, "--window_frames", 9, "--window_overlap", 5)
    encoded, decoded = [], []
    encode, decode = vace_pipeline.encode_control, vace_pipeline.decode

    def recorded_encode(wan, bars, control, window, known, pictures):
        encoded.append((window.start, known))
        return encode(wan, bars, control, window, known, pictures)

    def recorded_decode(wan, latents):
        pieces = list(decode(wan, latents))
        decoded.append(numpy.concatenate([frames_to_uint8(piece) for piece in pieces]))
        return pieces

    monkeypatch.setattr(vace_pipeline, "encode_control", recorded_encode)
    monkeypatch.setattr(vace_pipeline, "decode", recorded_decode)
    whole = make(tmp_path / "whole.mp4", *flags)
    assert whole.shape == (17, 64, 96, 3)
    assert read_metadata(tmp_path / "whole.mp4")["windows"] == 3
    # Each window goes on from the frames that the one before made, bit for bit.
    assert [start for start, _ in encoded] == [0, 4, 8]
    assert encoded[0][1] is None
    assert (encoded[1][1].numpy() == decoded[0][4:]).all()
    assert (encoded[2][1].numpy() == numpy.concatenate((decoded[0][8:], decoded[1][5:]))).all()

    saves = []

    def interrupt(self, step, save=JobState.save):
        save(self, step)
        saves.append(self.path.name)
        if len(saves) == 3:  # after the first step of the second window
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(JobState, "save", interrupt)
        make(tmp_path / "out.mp4", *flags)
    assert len(set(saves)) == 2
    assert not (tmp_path / "out.mp4").exists()
    encoded.clear(), decoded.clear()
    steps = []
    monkeypatch.setattr(
        JobState, "save", lambda self, step, save=JobState.save: (save(self, step), steps.append(step.index))
    )
    assert (make(tmp_path / "out.mp4", *flags) == whole).all()
    assert steps == [1, 0, 1], "finished steps were computed again"
    assert [start for start, _ in encoded] == [4, 8], "a finished window was encoded again"
    assert len(decoded) == 2, "a finished window was decoded again"
    assert not list(tmp_path.glob(".*"))
