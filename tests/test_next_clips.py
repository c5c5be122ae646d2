"""SVI 2.0 Pro's samples: a clip and the next one, whose latents meet; loss and errors of what is to be made alone."""

import pytest
import torch

import train
from errors import InputError
from models.wan.checkpoint import read_tensors
from pipelines.conditions import fold_mask
from pipelines.tiny import tiny_vae
from tests import tiny
from tests.tiny_data import write_clip
from training.batches import BatchMaker, build_cache
from training.cache import Cache
from training.clips import View, read_frames, with_next
from training.config import read_config
from training.data import cache_folder, read_samples
from training.draws import Draws
from training.encoders import encoders_of
from training.encodings import anchor_frame, encodings_of, pixels
from training.error_bank import ErrorBank, RecycledError
from training.error_recycling import error_buckets
from training.recipes.base import Batch
from training.recipes.error_recycling import ErrorRecyclingRecipe

CPU = torch.device("cpu")
FRAMES, FURTHER = 9, 4  # of a clip, and of the next one after the five that it begins with


def config_of(folder, *sets):
    given = [f"data.sources=[{{path: {folder}}}]", f"output={folder.parent / 'run'}", "data.holdout=0"]
    given += ["model.config=tiny-i2v-a14b", "model.expert=high", "data.resolutions=[48x64]", "data.text_drop=0"]
    return read_config("tiny-error_recycling", [*given, "error_recycling.variant=pro", *sets])


def test_a_video_has_to_hold_both_clips(tmp_path):
    write_clip(tmp_path / "data" / "a.mp4", FRAMES + FURTHER)
    write_clip(tmp_path / "data" / "b.mp4", FRAMES + FURTHER - 1, seed=1)
    with pytest.raises(InputError, match=r"b.mp4 first: too short: 12 frames, 13 are wanted"):
        read_samples(config_of(tmp_path / "data"))
    (sample,) = read_samples(config_of(tmp_path / "data", "data.bad=skip")).samples
    assert sample.bucket.frames == FRAMES and sample.further == FURTHER
    assert len(read_frames(with_next(View(sample, 0)))) == FRAMES + FURTHER


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A sample as a next clip and as a first one, and what both are made of."""
    folder = tmp_path_factory.mktemp("pro") / "data"
    write_clip(folder / "a.mp4", FRAMES + FURTHER)
    batches = []
    for share in (1, 0):
        config = config_of(folder, f"error_recycling.p.motion={share}")
        found = read_samples(config)
        cache = Cache(cache_folder(config), encodings_of(config, torch.float32), encoders_of(config.model, CPU))
        build_cache(cache, config, found)
        batches.append(BatchMaker(config, found.samples, cache).batch(found.samples, Draws(0, 0, [0], 1)))
    view = View(found.samples[0], 0)
    return view, *batches


def near(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_next_clip_is_the_picture_the_end_and_what_follows(made):
    view, batch, _ = made
    vae = tiny_vae(tiny.CONFIG)
    both = pixels(read_frames(with_next(view)))
    latents = vae.encode(both)  # (1, 16, 4, h, w): three of the first clip, one that follows
    anchor = vae.encode(both[:, :, anchor_frame(view)][:, :, None])
    near(batch.mean, torch.cat((anchor, latents[:, :, 2:3], latents[:, :, 3:]), dim=2))
    condition = batch.parts["condition"]
    near(condition[:, 4:], torch.cat((anchor, latents[:, :, 2:3], torch.zeros_like(anchor)), dim=2))
    assert torch.equal(condition[:, :4], fold_mask(torch.tensor([1.0, *[0] * 8]), latents[:, :, :3]))
    assert batch.parts["made"].flatten().tolist() == [0, 0, 1]


def test_a_first_clip_is_itself_and_its_first_frame(made):
    view, _, batch = made
    vae = tiny_vae(tiny.CONFIG)
    clip = pixels(read_frames(view))
    near(batch.mean, vae.encode(clip))
    near(batch.parts["condition"][:, 4:, :1], vae.encode(clip[:, :, :1]))
    assert batch.parts["condition"][:, 4:, 1:].abs().max() == 0
    assert batch.parts["made"].flatten().tolist() == [0, 1, 1]


def sample(given: int) -> Batch:
    made = torch.ones(1, 1, 3, 1, 1)
    made[:, :, :given] = 0
    condition = tiny.latents(3, channels=20)
    condition[:, 4:, given:] = 0
    return Batch([0], tiny.latents(), [], None, None, {"condition": condition, "made": made})


def test_only_what_is_made_counts_and_is_kept():
    recipe, batch, draw = ErrorRecyclingRecipe(variant="pro", clean=0), sample(2), Draws(0, 0, [0], 1)
    target, sigma = torch.zeros_like(batch.mean), torch.full((1,), 0.5)
    prediction = target.clone()
    prediction[:, :, :2], prediction[:, :, 2] = 100, 3
    loss = recipe.loss(prediction, target, sigma, batch, draw)
    torch.testing.assert_close(loss, 9 * recipe.noise.weight(sigma))
    (error,) = recipe.errors(prediction, target, sigma, batch, draw)
    assert error.velocity[:, :2].abs().max() == 0 and (error.velocity[:, 2] == 3).all()


@pytest.mark.parametrize("given", [1, 2])
def test_the_picture_stays_clean_and_the_clip_before_gets_the_error(tmp_path, given):
    recipe = ErrorRecyclingRecipe(
        variant="pro", grids=6, clean=0, image_error=1, noise_error=0, video_error=0, image_frames=1
    )
    batch, draw, sigma = sample(given), Draws(3, 0, [0], 1), torch.full((1,), 0.9)
    bank = ErrorBank(tmp_path / "bank", grids=6, per_grid=1, dtype="fp32")
    velocity = torch.ones(batch.mean.shape[1:])
    bank.insert([RecycledError(0, error_buckets(sigma * 1000, recipe.grid).item(), 0.9, velocity)], choose=None)
    conditions = recipe.conditions(batch, draw)
    *_, changed = recipe.corrupt(batch.mean, tiny.latents(5), sigma, conditions, bank.view(), draw)
    moved = (changed.image - conditions.image)[0].abs().amax(dim=(0, 2, 3)).tolist()
    assert moved == pytest.approx([0, 0.9 if given == 2 else 0, 0], abs=1e-5)


def test_each_expert_trains(tmp_path):
    for seed in range(2):
        write_clip(tmp_path / "data" / f"{seed}.mp4", FRAMES + FURTHER, seed=seed)
    exported = []
    for expert in ("high", "low"):
        sets = [f"data.sources=[{{path: {tmp_path / 'data'}}}]", f"output={tmp_path / expert}", "data.holdout=0"]
        sets += ["model.config=tiny-i2v-a14b", f"model.expert={expert}", "error_recycling.variant=pro"]
        sets += ["data.resolutions=[48x64]", "train.steps=3", "optim.warmup=0"]
        command = ["--config", "tiny-error_recycling", *(part for each in sets for part in ("--set", each))]
        (file,) = train.main(train.parse_args(command))
        exported.append(read_tensors(file))
    name = "diffusion_model.blocks.0.self_attn.q.lora_B.weight"
    assert not torch.equal(exported[0][name], exported[1][name]) and exported[0][name].abs().max() > 0
