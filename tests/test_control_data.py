"""What controls a training video: how it lies beside it, what is checked, and the context that VACE's branch reads."""

import numpy as np
import pytest
import torch

import train
from errors import InputError
from models.vace import load_vace_branch
from pipelines.tiny import tiny_vae
from pipelines.vace.context import fit_reference, fold_mask, frames_to_video, vace_context
from tests import tiny
from tests.tiny_data import pictures, write_clip, write_controlled_clip
from training.batches import BatchMaker, build_cache
from training.cache import Cache
from training.clips import View, read_control, read_frames
from training.config import read_config
from training.data import cache_folder, read_samples, wanted_by
from training.draws import Draws
from training.encoders import encoders_of
from training.encodings import encodings_of
from training.layouts import list_videos
from training.recipes.base import Conditions
from training.recipes.vace import new_branch
from training.trainee import Trainee

CPU = torch.device("cpu")


def config_of(folder, *sets):
    given = [f"data.sources=[{{path: {folder}}}]", f"output={folder.parent / 'run'}", "data.holdout=0"]
    return read_config("tiny-vace", [*given, "data.resolutions=[48x64]", *sets])


def half_mask() -> np.ndarray:
    """White on the right, (9, 48, 64, 3)."""
    mask = np.zeros((9, 48, 64, 3), np.uint8)
    mask[:, :, 32:] = 255
    return mask


def test_control_lies_beside_a_video_and_is_none_itself(tmp_path):
    write_controlled_clip(tmp_path / "a.mp4", control=pictures(seed=5), mask=half_mask(), references=pictures(2))
    write_clip(tmp_path / "b.mp4", seed=1)
    a, b = list_videos(tmp_path, "folder")
    assert (a.name, a.control.name, a.made.name, a.references.name) == (
        *("a.mp4", "a.control.mp4"),
        *("a.mask.mp4", "a.references"),
    )
    assert (b.control, b.made, b.references) == (None, None, None)


def test_videos_without_what_a_run_wants_are_listed(tmp_path):
    folder = tmp_path / "data"
    write_controlled_clip(folder / "a.mp4", control=pictures(seed=5))
    write_controlled_clip(folder / "b.mp4", references=pictures(1), seed=1)
    write_controlled_clip(folder / "c.mp4", control=pictures(8, seed=5), seed=2)
    with pytest.raises(InputError, match=r"2 of 3 samples .*b.mp4 first: no control: neither b.control"):
        read_samples(config_of(folder))
    found = read_samples(config_of(folder, "data.bad=skip"))
    assert [sample.name for sample in found.samples] == ["a.mp4"]
    assert "c.control.mp4 has 8 frames, the video 9" in found.skipped[1].reasons[0]
    found = read_samples(config_of(folder, "data.bad=skip", "vace.references=1"))
    assert [sample.name for sample in found.samples] == ["b.mp4"]
    assert found.skipped[0].reasons == ("no reference: a.references/ has 0 pictures, 1 are wanted",)
    assert wanted_by(config_of(folder)).control


def test_a_mask_without_a_control_video_keeps_the_video_itself(tmp_path):
    folder = tmp_path / "data"
    write_controlled_clip(folder / "a.mp4", mask=half_mask())
    (sample,) = read_samples(config_of(folder)).samples
    frames, made = read_control(View(sample, 0))
    assert (frames == read_frames(View(sample, 0))).all()
    assert (made[:, :, :30] == 0).all() and (made[:, :, 34:] == 255).all()


def test_control_of_another_size_is_cropped_as_the_video_is(tmp_path):
    """Twice as large, and the window is of the right half: white there, black elsewhere."""
    folder = tmp_path / "data"
    control = np.zeros((9, 96, 256, 3), np.uint8)
    control[:, :, 128:] = 255
    write_controlled_clip(folder / "a.mp4", width=128, control=control)
    (sample,) = read_samples(config_of(folder)).samples
    for place, value in ((0.0, 0), (1.0, 255)):
        frames, made = read_control(View(sample, 0, (0.5, place)))
        assert frames.shape == (9, 48, 64, 3) and np.abs(frames[:, :, 4:-4].astype(int) - value).max() < 8
        assert (made == 255).all()


def test_the_context_is_that_of_inference_and_references_are_frames_too(tmp_path):
    folder = tmp_path / "data"
    reference = pictures(1, seed=9)[0]
    write_controlled_clip(folder / "a.mp4", control=pictures(seed=5), mask=half_mask(), references=[reference])
    config = config_of(folder, "vace.references=1", "data.text_drop=0")
    found = read_samples(config)
    cache = Cache(cache_folder(config), encodings_of(config, torch.float32), encoders_of(config.model, CPU))
    build_cache(cache, config, found)
    batch = BatchMaker(config, found.samples, cache).batch(found.samples, Draws(0, 0, [0], 1))
    context = batch.parts["vace_context"]
    assert context.shape == (1, 96, 1 + 3, 6, 8) and batch.mean.shape == (1, 16, 1 + 3, 6, 8)

    vae = tiny_vae(tiny.CONFIG)
    frames, made = read_control(View(found.samples[0], 0))
    mask = (torch.from_numpy(made) > 127)[None, None].float()
    expected = vace_context(vae, frames_to_video(frames), mask, [fit_reference(reference, 48, 64)])
    torch.testing.assert_close(context, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(context[:, 32:, 1:], fold_mask(mask))
    shown = vae.encode(fit_reference(reference, 48, 64))
    torch.testing.assert_close(batch.mean[:, :, :1], shown, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        batch.mean[:, :, 1:], vae.encode(frames_to_video(read_frames(View(found.samples[0], 0)))), rtol=1e-4, atol=1e-4
    )


def test_a_new_branch_is_the_base_again_and_changes_nothing():
    model = tiny.transformer()
    trainee = Trainee(model, vace=new_branch(model, [0, 1], seed=3))
    context = tiny.latents(3, channels=96)
    conditions = Conditions(tiny.prompt(), plugins=(lambda t: t.vace.plugin(context),))
    with torch.no_grad():
        assert torch.equal(trainee(tiny.latents(), tiny.TIMESTEP, conditions), model(*tiny_inputs()))
    assert torch.equal(trainee.vace.vace_blocks[1].ffn[0].weight, model.blocks[1].ffn[0].weight)
    again = new_branch(model, [0, 1], seed=3).vace_patch_embedding.weight
    assert torch.equal(trainee.vace.vace_patch_embedding.weight, again)


def tiny_inputs() -> tuple:
    return tiny.latents(), tiny.TIMESTEP, tiny.prompt()


def test_a_branch_trains_the_same_with_checkpointed_blocks(tmp_path):
    folder = tmp_path / "data"
    for seed in range(2):
        write_controlled_clip(folder / f"{seed}.mp4", control=pictures(seed=seed), seed=seed)
    found = []
    for checkpointing in ("none", "full"):
        sets = [f"data.sources=[{{path: {folder}}}]", f"output={tmp_path / checkpointing}", "data.holdout=0"]
        sets += ["data.resolutions=[48x64]", "train.steps=3", "optim.warmup=0", "model.base_dtype=fp32"]
        sets += [f"memory.checkpointing={checkpointing}", "optim.eps=1e-4"]
        command = ["--config", "tiny-vace", *(part for each in sets for part in ("--set", each))]
        (file,) = train.main(train.parse_args(command))
        assert file.name == "vace.safetensors"
        found.append(load_vace_branch(file, tiny.transformer(), dtype=torch.float32).state_dict())
    begun = new_branch(tiny.transformer(), [0, 1], seed=0).state_dict()
    assert not any(torch.equal(found[0][name], value) for name, value in begun.items())
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-3, atol=1e-4)
