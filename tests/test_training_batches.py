"""The batches of a run: what every recipe reads is there, and neither threads nor processes change any of it."""

import gc
import json
import shutil
from dataclasses import replace

import numpy as np
import PIL.Image
import pytest
import torch

from errors import InputError
from models.audio_encoder import AudioEncoder
from models.wan.image_encoder import ImageEncoder
from models.wan.text_encoder import TextEncoder
from models.wan.vae import WanVAE
from tests.tiny_data import write_avatar_clip, write_clip
from training.batches import Batches, BatchMaker, build_cache, furthest_face, rows_of_sound, with_rows
from training.build import load_trainee, recipe_of
from training.cache import Cache
from training.clips import View, read_frames, read_masks, views
from training.config import Config, read_config
from training.data import TrainingSet, read_samples
from training.draws import Draws
from training.encoders import encoders_of
from training.encodings import encodings_of, pixels, reference_frame
from training.recipes.base import Batch, denoising_step

CPU = torch.device("cpu")


def folder_of(root, count=6, faces=False):
    for i in range(count):
        write_clip(root / f"{i}.mp4", 14, height=64, width=64, seed=i, caption=f"Gradient number {i}")
        for number in (0, 6, 13) if faces else ():
            (root / f"{i}.faces").mkdir(exist_ok=True)
            face = np.full((64, 64, 3), 10 * i + 60 * (number // 6), np.uint8)
            PIL.Image.fromarray(face).save(root / f"{i}.faces" / f"frame_{number}.png")
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return folder_of(tmp_path_factory.mktemp("videos"))


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    root = folder_of(tmp_path_factory.mktemp("people"), 4, faces=True)
    # 0 and 1 are one person, 0 and 2 the same shot, 3 is somebody else; the last face of 1 is a stranger's.
    within = {"1.mp4": [[0, 6, 0.9], [0, 13, 0.1], [6, 13, 0.1]]}
    pairs = [["0.mp4", "1.mp4", 0.7], ["0.mp4", "2.mp4", 0.99], ["1.mp4", "3.mp4", 0.35]]
    (root / "identity.json").write_text(json.dumps({"pairs": pairs, "within": within}))
    return root


@pytest.fixture(scope="module")
def talking(tmp_path_factory):
    root = tmp_path_factory.mktemp("talking")
    for i in range(3):
        write_avatar_clip(root / "speech" / str(i), 12, 25, 64, 64, seed=i)
    return root


@pytest.fixture(scope="module")
def dancing(tmp_path_factory):
    root = tmp_path_factory.mktemp("dancing")
    for i in range(2):
        for name, seed in (("video", i), ("dwpose", 10 + i)):
            write_clip(root / str(i) / f"{name}.mp4", 12, 16, 64, 64, seed, caption=None)
    return root


def config_for(recipe, root, *sets, layout="folder", output="runs/none") -> Config:
    sources = f"data.sources=[{{path: {root}, layout: {layout}}}]"
    return read_config(f"tiny-{recipe}", [sources, "data.holdout=0", f"output={output}", *sets])


def ready(config: Config, where) -> tuple[TrainingSet, Cache]:
    found = read_samples(config)
    cache = Cache(where, encodings_of(config, torch.float32), encoders_of(config.model, CPU))
    build_cache(cache, config, found)
    return found, cache


def batches_of(config: Config, where, steps, rank=0, ranks=1) -> list[list[Batch]]:
    found, cache = ready(config, where)
    with Batches(config, found, cache, CPU, rank, ranks) as batches:
        return [list(batches(step)) for step in steps]


def tensors(batch: Batch) -> dict[str, torch.Tensor]:
    named = {"mean": batch.mean, "std": batch.std, "empty": batch.empty_text} | dict(batch.parts)
    named |= {f"text{i}": rows for i, rows in enumerate(batch.text)}
    return {name: value for name, value in named.items() if value is not None}


def equal(one: Batch, other: Batch) -> bool:
    a, b = tensors(one), tensors(other)
    same = list(one.positions) == list(other.positions) and a.keys() == b.keys()
    return same and all(torch.equal(a[name], b[name]) for name in a)


# ------------------------------------------------------------------------------------------ what is in them


def test_a_batch_is_its_samples(folder, tmp_path):
    config = config_for("base", folder, "train.global_batch=4", "train.micro_batch=2")
    found, cache = ready(config, tmp_path)
    order = found.order(4, 0)
    with Batches(config, found, cache) as batches:
        for step in (0, 5):
            ids = order.batch(step).ids
            made = list(batches(step))
            assert [list(batch.positions) for batch in made] == [[0, 1], [2, 3]]
            for batch in made:
                for row, position in enumerate(batch.positions):
                    view = views(found.samples[ids[position]])[0]
                    assert torch.equal(batch.mean[row], cache.read("latents", view)["mean"])
                    assert torch.equal(batch.text[row], cache.read("text", view)["states"])
                assert batch.std is None and not batch.parts
                encoder = cache.encoders["text"].load()
                torch.testing.assert_close(batch.empty_text, encoder.encode_prompts([""])[0])


def test_views_are_drawn_and_all_come(folder, tmp_path):
    config = config_for("base", folder, "data.cache_variants=3", "train.global_batch=6")
    found, cache = ready(config, tmp_path)
    means = {
        cache.read("latents", view)["mean"].sum().item(): (s, v)
        for s, sample in enumerate(found.samples)
        for v, view in enumerate(views(sample, 3))
    }
    with Batches(config, found, cache) as batches:
        seen = [means[mean.sum().item()] for step in range(12) for batch in batches(step) for mean in batch.mean]
    assert len(set(seen)) > 12 and {s for s, _ in seen} == set(range(6)) and {v for _, v in seen} == {0, 1, 2}


def run_once(config: Config, where) -> None:
    """A forward and a backward pass on each micro-batch of the first steps, as the loop makes them."""
    found, cache = ready(config, where)
    recipe, trainee = recipe_of(config), load_trainee(config, CPU)
    with Batches(config, found, cache) as batches:
        for batch in (batch for step in range(2) for batch in batches(step)):
            draw = Draws(config.seed, 0, batch.positions, config.train.global_batch)
            losses, _ = denoising_step(recipe, trainee, batch, draw)
            assert losses.shape == (len(batch.positions),) and torch.isfinite(losses).all()
            losses.sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in trainee.parameters())


def test_every_recipe_takes_its_batches(folder, people, talking, dancing, tmp_path):
    two = ("train.global_batch=2", "train.micro_batch=2")
    run_once(config_for("base", folder, *two), tmp_path)
    run_once(config_for("base", folder, *two, "model.config=tiny-i2v"), tmp_path)
    run_once(config_for("stand_in", people, *two), tmp_path)
    other_clip = ("stand_in.reference=other_clip", "data.bad=skip")
    run_once(config_for("stand_in", people, *two, *other_clip), tmp_path)
    run_once(config_for("avatar", talking, *two, layout="stableavatar"), tmp_path)
    run_once(config_for("error_recycling", folder, *two), tmp_path)
    run_once(config_for("error_recycling", folder, *two, "error_recycling.variant=film"), tmp_path)
    talk = ("error_recycling.variant=talk",)
    run_once(config_for("error_recycling", talking, *two, *talk, layout="stableavatar"), tmp_path)
    dance = ("error_recycling.variant=dance", "data.resolutions=64x64")
    run_once(config_for("error_recycling", dancing, *two, *dance, layout="svi"), tmp_path)


def test_no_encoder_is_asked_once_all_is_encoded(talking, tmp_path, monkeypatch):
    """Spec check 13: what a step reads comes from files; no frozen network is loaded, called, or alive."""
    before = encoders_alive()  # other tests may hold some
    config = config_for("avatar", talking, "train.global_batch=2", layout="stableavatar")
    found, cache = ready(config, tmp_path)
    for name, encoder in list(cache.encoders.items()):
        cache.encoders[name] = replace(encoder, load=lambda: pytest.fail("an encoder is loaded"))
    for kind in (WanVAE, TextEncoder, ImageEncoder, AudioEncoder):
        monkeypatch.setattr(kind, "__call__", lambda *_: pytest.fail("an encoder is called"))
    assert build_cache(cache, config, found) == 0
    with Batches(config, found, cache) as batches:
        assert [len(list(batches(step))) for step in range(3)] == [2, 2, 2]
    assert encoders_alive() <= before


def encoders_alive() -> int:
    gc.collect()
    return sum(isinstance(thing, (WanVAE, TextEncoder, ImageEncoder, AudioEncoder)) for thing in gc.get_objects())


def test_a_talking_avatars_batch(talking, tmp_path):
    config = config_for("avatar", talking, "train.global_batch=3", "train.micro_batch=3", layout="stableavatar")
    ((batch,),) = batches_of(config, tmp_path, [0])
    shapes = {name: tuple(value.shape) for name, value in batch.parts.items()}
    assert shapes == {
        "masked": (3, 16, 3, 8, 8),
        "clip": (3, 17, 32),
        "audio": (3, 17, 32),  # (5760 - 400) // 320 + 1 features
        "face_mask": (3, 1, 9, 64, 64),
        "lip_mask": (3, 1, 9, 64, 64),
    }
    assert batch.std.shape == batch.mean.shape and batch.empty_text is None
    found, _ = ready(config, tmp_path)
    view = views(found.samples[found.order(3, 0).batch(0).ids[1]])[0]
    assert torch.equal(batch.parts["face_mask"][1, 0], torch.from_numpy(read_masks(view, "face")))


def test_svis_condition_is_its_own_first_frame_and_one_of_its_frames(folder, tmp_path):
    """y by hand: mask of the first frame, then the encoding of first frame and reference (Shot), or gray (Film)."""
    config = config_for("error_recycling", folder, "train.global_batch=1", "error_recycling.variant=film")
    shot = config_for("error_recycling", folder, "train.global_batch=1")
    found, _ = ready(config, tmp_path)
    sample = found.samples[found.order(1, 0).batch(0).ids[0]]
    view = views(sample)[0]
    frames = pixels(read_frames(view))
    vae = encoders_of(config.model, CPU)["vae"].load()
    ((batch,),) = batches_of(config, tmp_path, [0])
    assert set(batch.parts) == {"condition", "condition_motion", "clip"}
    for name, count in (("condition", 1), ("condition_motion", 5)):
        y = batch.parts[name][0]
        clip = torch.zeros_like(frames)
        clip[:, :, :count] = frames[:, :, :count]
        torch.testing.assert_close(y[4:], vae.encode(clip)[0])
        assert y[:4, 0].eq(1).all() and y[:4, 1:].eq(0).all()
    ((batch,),) = batches_of(shot, tmp_path, [0])
    clip = frames[:, :, [reference_frame(view)] * 9].clone()
    clip[:, :, 0] = frames[:, :, 0]
    torch.testing.assert_close(batch.parts["condition"][0, 4:], vae.encode(clip)[0])


def test_the_vae_sees_frames(folder, tmp_path):
    """Nothing of it is encoded: it is what would encode."""
    config = config_for("vae", folder, "train.global_batch=2", "train.micro_batch=2")
    found, cache = ready(config, tmp_path / "cache")
    assert cache.encodings == () and not (tmp_path / "cache").exists()
    with Batches(config, found, cache) as batches:
        (batch,) = batches(0)
    frames = batch.parts["frames"]
    assert frames.shape == (2, 3, 5, 64, 64) and list(batch.positions) == [0, 1]
    view = views(found.samples[found.order(2, 0).batch(0).ids[1]])[0]
    assert torch.equal(frames[1:], pixels(read_frames(view)))


# ------------------------------------------------------------------------------------------ whose face


def test_a_face_of_another_clip_that_is_alike_but_not_the_same_shot(people, tmp_path):
    config = config_for("stand_in", people, "stand_in.reference=other_clip", "train.global_batch=4")
    found, cache = ready(config, tmp_path)
    maker = BatchMaker(config, found.samples, cache)
    by_name = {sample.name: sample for sample in found.samples}
    faces = {name: cache.read("faces", views(sample)[0])["latents"] for name, sample in by_name.items()}

    def whose(name) -> set[tuple[str, int]]:
        seen = set()
        for step in range(20):
            reference = maker.batch([by_name[name]], Draws(0, step, [1], 4)).parts["reference"][0]
            seen |= {(n, k) for n, of in faces.items() for k, face in enumerate(of) if torch.equal(face, reference)}
        return seen

    assert whose("0.mp4") == {("1.mp4", 0), ("1.mp4", 1), ("1.mp4", 2)}  # 2 is the same shot
    assert {name for name, _ in whose("1.mp4")} == {"0.mp4"}  # 3 is somebody else
    assert len(whose("2.mp4")) == 1 and {name for name, _ in whose("2.mp4")} == {"2.mp4"}  # nobody else: its own


def test_the_furthest_face_is_of_the_same_person(people):
    config = config_for("stand_in", people)
    by_name = {sample.name: sample for sample in read_samples(config).samples}
    assert [furthest_face(View(by_name["0.mp4"], start)) for start in (0, 5)] == [2, 0]
    assert [furthest_face(View(by_name["1.mp4"], start)) for start in (0, 5)] == [0, 0]  # the last is a stranger


def test_sound_has_as_many_features_as_its_frames_ask_for():
    assert rows_of_sound(81, 25) == (51840 - 400) // 320 + 1 and rows_of_sound(9, 25) == 17
    features = torch.arange(6.0).view(3, 2)
    assert with_rows(features, 2).tolist() == [[0, 1], [2, 3]]
    assert with_rows(features, 4).tolist() == [[0, 1], [2, 3], [4, 5], [4, 5]]


# ------------------------------------------------------------------------------------------ threads, processes


@pytest.mark.parametrize(("workers", "prefetch"), [(1, 1), (1, 8), (4, 1), (4, 8)])
def test_threads_change_nothing(people, tmp_path, workers, prefetch):
    """Spec check 5: as many as one likes, as far ahead as one likes, the batches are the same to the bit."""
    sets = ("data.cache_variants=2", "stand_in.reference=other_clip", "train.steps=6", "train.global_batch=4")
    alone = batches_of(config_for("stand_in", people, *sets, "data.workers=0"), tmp_path, range(6))
    ahead = (f"data.workers={workers}", f"data.prefetch={prefetch}")
    found = batches_of(config_for("stand_in", people, *sets, *ahead), tmp_path, range(6))
    assert all(equal(a, b) for one, other in zip(alone, found, strict=True) for a, b in zip(one, other, strict=True))


def test_a_run_that_goes_on_in_the_middle_gets_the_same(people, tmp_path):
    config = config_for("stand_in", people, "train.steps=8", "train.global_batch=4", "data.cache_variants=2")
    whole, late = batches_of(config, tmp_path, range(8)), batches_of(config, tmp_path, range(5, 8))
    assert all(equal(a, b) for one, other in zip(whole[5:], late, strict=True) for a, b in zip(one, other, strict=True))
    jumping = batches_of(config, tmp_path, (6, 1, 7))
    assert all(equal(whole[step][0], jumping[i][0]) for i, step in enumerate((6, 1, 7)))


@pytest.mark.parametrize(("ranks", "micro_batch"), [(2, 1), (2, 2), (4, 1)])
def test_processes_have_the_rows_of_one(people, tmp_path, ranks, micro_batch):
    sets = ("data.cache_variants=2", "stand_in.reference=other_clip", "train.global_batch=4", "train.steps=3")
    whole = batches_of(config_for("stand_in", people, *sets, "train.micro_batch=4"), tmp_path, range(3))
    config = config_for("stand_in", people, *sets, f"train.micro_batch={micro_batch}")
    for step in range(3):
        rows = {}
        for rank in range(ranks):
            ((*shares,),) = batches_of(config, tmp_path, [step], rank, ranks)
            for batch in shares:
                for row, position in enumerate(batch.positions):
                    rows[position] = batch.mean[row], batch.text[row], batch.parts["reference"][row]
        assert sorted(rows) == [0, 1, 2, 3]
        for position, (mean, text, reference) in rows.items():
            assert torch.equal(mean, whole[step][0].mean[position])
            assert torch.equal(text, whole[step][0].text[position])
            assert torch.equal(reference, whole[step][0].parts["reference"][position])


# ------------------------------------------------------------------------------------------ damage


@pytest.fixture
def damaged(tmp_path):
    """A set of 12, of which some encodings are broken; returns what breaks the n-th."""
    root = tmp_path / "videos"
    write_clip(root / "000.mp4", 9, height=32, width=32)
    for i in range(1, 12):  # the same video under another caption: one file of latents, 12 of text
        shutil.copy(root / "000.mp4", root / f"{i:03d}.mp4")
        (root / f"{i:03d}.txt").write_text(f"Number {i}")
    config = config_for(
        "base", root, "data.resolutions=32x32", "train.global_batch=8", "train.steps=100", output=tmp_path / "run"
    )
    found, cache = ready(config, tmp_path / "cache")

    def damage(number: int) -> None:
        (text,) = (encoding for encoding in cache.encodings if encoding.kind == "text")
        cache.path(text, views(found.samples[number])[0]).write_bytes(b"broken")

    return config, found, cache, damage


def test_a_damaged_sample_is_replaced_by_the_same_one_everywhere(damaged):
    config, found, cache, damage = damaged
    ids = found.order(8, config.seed).batch(3).ids
    damage(ids[5])
    with Batches(config, found, cache) as batches:
        one = list(batches(3))
    with Batches(config, found, cache, CPU, 1, 2) as batches:  # positions 1, 3, 5 and 7
        other = list(batches(3))
    row = next(batch for batch in one if list(batch.positions) == [5])
    assert equal(row, next(batch for batch in other if list(batch.positions) == [5]))
    replacement = found.order(8, config.seed).replacement(3, 5, 0)
    expected = cache.read("text", views(found.samples[replacement])[0])["states"]
    assert torch.equal(row.text[0], expected)
    lines = (batches._log).read_text().splitlines()
    entry = json.loads(lines[0])
    assert (entry["step"], entry["position"]) == (3, 5) and "damaged" in entry["reason"]
    assert entry["sample"] == str(found.samples[ids[5]].listed.video)


def test_more_than_one_in_a_hundred_stops_the_run(damaged):
    config, found, cache, damage = damaged
    ids = found.order(8, config.seed).batch(0).ids
    for number in ids[:2]:
        damage(number)
    with Batches(config, found, cache) as batches, pytest.raises(InputError, match="2 of 12 samples cannot be read"):
        list(batches(0))
