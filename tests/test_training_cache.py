"""What is encoded once and kept: the right tensors, whole files, shared work, and no encoder left afterwards."""

import contextlib
import dataclasses
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import nn

from configs import load_config
from errors import InputError, ResourceError, UsageError, WeightsError
from preprocess.audio import read_audio
from preprocess.video import read_frames as read_all
from tests.test_audio_avatar import write_release
from tests.tiny_data import write_avatar_clip, write_clip
from training.cache import Cache, is_whole, trouble_in
from training.clips import View, read_faces, read_frames, read_masks, read_sound, views
from training.config import read_config
from training.data import Sample, read_samples
from training.encoders import encoders_of
from training.encodings import encodings_of, pixels, sound
from training.facts import Facts
from training.layouts import Listed
from training.sampler import Bucket

PROJECT = Path(__file__).parent.parent
CPU, SMALL = torch.device("cpu"), Bucket(32, 32, 9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("videos")
    for i in range(3):
        write_clip(root / f"{i}.mp4", 14, height=64, width=64, seed=i, caption=f"Gradient number {i % 2}")
    return root


@pytest.fixture(scope="module")
def talking(tmp_path_factory):
    root = tmp_path_factory.mktemp("talking")
    for i in range(2):
        write_avatar_clip(root / "speech" / str(i), 12, 25, 64, 64, seed=i)
    return root


def config_for(root, recipe="base", *sets):
    return read_config(f"tiny-{recipe}", [f"data.sources=[{{path: {root}}}]", "data.holdout=0", "data.bad=skip", *sets])


def talking_config(root, *sets):
    sources = f"data.sources=[{{path: {root}, layout: stableavatar}}]"
    return read_config("tiny-avatar", [sources, "data.holdout=0", *sets])


def cache_for(config, where, dtype=torch.float32) -> Cache:
    return Cache(where, encodings_of(config, dtype), encoders_of(config.model, CPU))


def views_of(config) -> list[View]:
    data = config.data
    return [v for sample in read_samples(config).samples for v in views(sample, data.cache_variants, data.fit)]


# ------------------------------------------------------------------------------------------ views


def sample_of(num_frames=40, width=100, height=60, bucket=SMALL, content="a" * 64) -> Sample:
    facts = Facts(content=content, num_frames=num_frames, width=width, height=height, fps=16.0)
    return Sample(Listed("a.mp4", Path("a.mp4"), "A caption"), facts, bucket, 0)


def test_windows_lie_within_the_video_and_spread_over_it():
    for variants in (1, 3, 10):
        for i in range(50):
            found = views(sample_of(content=f"{i:064x}"), variants)
            starts = [view.start for view in found]
            assert starts == sorted(starts) and starts[0] >= 0 and starts[-1] + 9 <= 40
            assert all(int(v / variants * 32) <= s <= (v + 1) / variants * 32 for v, s in enumerate(starts))
    assert len({views(sample_of(content=f"{i:064x}"))[0].start for i in range(200)}) > 25
    assert [view.start for view in views(sample_of(num_frames=9), 4)] == [0] * 4
    assert views(sample_of(), 3) == views(sample_of(), 3)


def test_a_crop_has_the_buckets_shape_and_lies_within_the_picture():
    for view in (view for i in range(20) for view in views(sample_of(content=f"{i:064x}"), 5)):
        left, top, right, bottom = view.box
        assert right - left == pytest.approx(60) and bottom - top == pytest.approx(60)
        assert left >= 0 and right <= 100 + 1e-9 and top == pytest.approx(0)
    assert views(sample_of())[0].box == (20, 0, 80, 60)  # the first crop is in the middle
    assert views(sample_of(), 3, "resize")[2].box == (0, 0, 100, 60)


def test_pixels_of_a_view_are_the_window_cropped_and_resized(tmp_path):
    """Against numpy: an integer scale of a crop at whole pixels, and no scale at all."""
    write_clip(tmp_path / "a.mp4", 14, height=64, width=96)
    sample = read_samples(config_for(tmp_path)).samples[0]
    frames = read_frames(View(sample, 3, (0.5, 1.0)))
    assert frames.shape == (9, 64, 64, 3)
    assert np.array_equal(frames, read_all(tmp_path / "a.mp4")[3:12, :, 32:])
    assert pixels(frames).shape == (1, 3, 9, 64, 64)
    assert torch.equal(pixels(np.full((1, 2, 2, 3), 255, np.uint8)), torch.ones(1, 3, 1, 2, 2))


def test_sound_and_masks_of_a_view(talking):
    sample = read_samples(talking_config(talking)).samples[0]
    view = View(sample, 2)
    whole = read_audio(sample.listed.audio)
    assert np.array_equal(read_sound(view), whole[1280:7040])  # 2 / 25 s .. 11 / 25 s at 16 kHz
    late = View(sample, 9)
    assert np.array_equal(read_sound(late)[:1920], whole[5760:]) and not read_sound(late)[1920:].any()
    masks = read_masks(view, "face")
    assert masks.shape == (9, 64, 64) and masks.max() == 1 and masks.min() == 0
    assert masks[0, 10:30, 10:40].all() and not masks[0, :9].any() and not masks[8, :17].any()
    assert read_masks(dataclasses.replace(view), "nose").min() == 1


# ------------------------------------------------------------------------------------------ what is kept


def test_what_is_read_is_what_the_encoders_make(folder, tmp_path):
    """Each encoder by itself, on pixels taken here from the video."""
    config = config_for(folder)
    cache, all_views = cache_for(config, tmp_path), views_of(config)
    assert cache.build(all_views) == 3 + 2  # three videos, two different captions
    encoders = {name: encoder.load() for name, encoder in cache.encoders.items()}
    for view in all_views:
        frames = read_all(view.sample.listed.video)[view.start : view.start + 9]
        video = torch.from_numpy(frames).permute(3, 0, 1, 2)[None] / 127.5 - 1
        read = cache.read("latents", view)
        torch.testing.assert_close(read["mean"], encoders["vae"].encode(video)[0])
        assert read["mean"].shape == read["std"].shape == (16, 3, 8, 8) and read["std"].min() > 0
        states = encoders["text"].encode_prompts([view.sample.listed.caption])[0]
        torch.testing.assert_close(cache.read("text", view)["states"], states)
        assert len(states) < 20  # the real rows alone


def test_pictures_and_sound_of_a_talking_avatar(talking, tmp_path):
    config = talking_config(talking)
    cache, (view, _) = cache_for(config, tmp_path), views_of(config)
    cache.build([view])
    encoders = {name: encoder.load() for name, encoder in cache.encoders.items()}
    video = pixels(read_frames(view))
    torch.testing.assert_close(cache.read("image_features", view)["features"], encoders["image"](video[:, :, 0])[0])
    gray = torch.cat((video[:, :, :1], torch.zeros(1, 3, 8, 64, 64)), dim=2)
    torch.testing.assert_close(cache.read("first_frame", view)["latents"], encoders["vae"].encode(gray)[0])
    features = encoders["audio"].last_hidden_state(read_sound(view))[0]
    torch.testing.assert_close(cache.read("sound", view)["features"], features)


def test_faces_and_layers_of_sound(talking, tmp_path):
    for name in ("clip.mp4", "other.mp4"):
        write_clip(tmp_path / "people" / name, 10, height=64, width=64, seed=len(name))
        (tmp_path / "people" / f"{name[:-4]}.faces").mkdir()
        for number in (0, 5, 10):
            face = np.full((64, 64, 3), 20 * number, np.uint8)
            PIL.Image.fromarray(face).save(tmp_path / "people" / f"{name[:-4]}.faces" / f"frame_{number}.png")
    config = config_for(tmp_path / "people", "stand_in")
    cache, (view, *_) = cache_for(config, tmp_path / "cache"), views_of(config)
    assert [int(face[0, 0, 0]) for face in read_faces(view.sample)] == [0, 100, 200]
    cache.build([view])
    kept = cache.read("faces", view)["latents"]
    assert kept.shape == (3, 16, 1, 8, 8)
    white = cache.encoders["vae"].load().encode(pixels(np.full((1, 64, 64, 3), 200, np.uint8)))
    torch.testing.assert_close(kept[2], white[0])

    sources = f"data.sources=[{{path: {talking}, layout: stableavatar}}]"
    talk = read_config("tiny-error_recycling", [sources, "data.holdout=0", "error_recycling.variant=talk"])
    cache, (view, *_) = cache_for(talk, tmp_path / "cache"), views_of(talk)
    cache.build([view])
    assert cache.read("sound_layers", view)["features"].shape == (9, 2, 32)


def test_bfloat16_halves_the_files_and_rounds_them(folder, tmp_path):
    config = config_for(folder)
    view = views_of(config)[0]
    exact, rounded = cache_for(config, tmp_path), cache_for(config, tmp_path, torch.bfloat16)
    exact.build([view])
    rounded.build([view])
    a, b = (cache.read("latents", view)["mean"] for cache in (exact, rounded))
    assert b.dtype == torch.bfloat16 and torch.equal(a.to(torch.bfloat16), b)


def test_a_name_follows_from_all_that_decides_the_content(folder, tmp_path):
    config = config_for(folder)
    view, other = views_of(config)[:2]
    cache = cache_for(config, tmp_path)
    latents, text = cache.encodings
    same = cache_for(config_for(folder, "base", "seed=9", "optim.lr=0.5", "train.steps=3"), tmp_path)
    assert same.path(same.encodings[0], view) == cache.path(latents, view)
    larger = dataclasses.replace(view.sample, bucket=Bucket(32, 64, 9))
    changed = [
        other,
        dataclasses.replace(view, start=view.start + 1),
        dataclasses.replace(view, place=(0.0, 0.1), sample=larger),
        dataclasses.replace(view, place=(0.0, 0.9), sample=larger),
        dataclasses.replace(view, sample=dataclasses.replace(view.sample, bucket=Bucket(64, 64, 5))),
    ]
    names = {cache.path(latents, one).name for one in [view, *changed]}
    assert len(names) == 5 + 1 - 1  # 32x64 of a square is as high as it: along its width there is no other place
    vae = dataclasses.replace(cache.encoders["vae"], identity="another")
    assert Cache(tmp_path, [latents], {"vae": vae}).path(latents, view).name not in names
    assert cache.path(text, view) == cache.path(text, dataclasses.replace(view, start=view.start + 1))


# ------------------------------------------------------------------------------------------ the work


def test_nothing_is_encoded_twice_and_an_encoder_that_is_not_needed_stays_unread(folder, tmp_path):
    config = config_for(folder)
    cache, all_views = cache_for(config, tmp_path), views_of(config)
    loaded = []
    for name, encoder in list(cache.encoders.items()):
        load = encoder.load
        cache.encoders[name] = dataclasses.replace(encoder, load=lambda n=name, load=load: loaded.append(n) or load())
    cache.build(all_views)
    assert loaded == ["vae", "text"]
    assert cache.build(all_views) == 0 and loaded == ["vae", "text"]
    cache.path(cache.encodings[1], all_views[0]).unlink()
    assert cache.build(all_views) == 1 and loaded == ["vae", "text", "text"]


def test_no_encoder_is_alive_afterwards(talking, tmp_path):
    """Spec check 13: what is frozen is gone when training begins, and each before the next is loaded."""
    config = talking_config(talking)
    cache, alive = cache_for(config, tmp_path), []
    for name, encoder in list(cache.encoders.items()):

        def load(load=encoder.load):
            assert not any(reference() is not None for reference in alive)
            module = load()
            alive.extend(weakref.ref(part) for part in module.modules())
            return module

        cache.encoders[name] = dataclasses.replace(encoder, load=load)
    cache.build(views_of(config))
    assert len(alive) > 50 and not any(reference() is not None for reference in alive)
    cache.read("latents", views_of(config)[0])


def test_its_size_is_said_before_anything_is_made(folder, tmp_path, caplog):
    config = config_for(folder)
    cache, all_views = cache_for(config, tmp_path), views_of(config)
    with caplog.at_level(logging.INFO, "selfsame"):
        cache.build(all_views)
    (line,) = (message for message in caplog.messages if "files to encode" in message)
    assert line.startswith("5 files to encode") and "latents 72 KiB" in line  # 3 videos x 2 x 16·3·8·8 floats
    latents = [cache.path(cache.encodings[0], view) for view in all_views]
    assert sum(file.stat().st_size for file in latents) == pytest.approx(3 * 24 * 1024, rel=0.02)


def test_a_full_disk_is_refused_before_anything_is_loaded(folder, tmp_path, monkeypatch):
    config = config_for(folder)
    cache = cache_for(config, tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    cache.encoders["vae"] = dataclasses.replace(cache.encoders["vae"], load=lambda: pytest.fail("loaded"))
    with pytest.raises(ResourceError, match="are needed for what is encoded, 1000 B are free"):
        cache.build(views_of(config))


def test_missing_encoders_are_named_with_one_command(folder, tmp_path):
    config = config_for(folder)
    found = encoders_of(read_config("tiny-base", ["model.config=wan2.1-i2v-14B-480P"]).model, CPU)
    assert set(found) == {"vae", "text", "image", "audio"}
    with pytest.raises(
        WeightsError, match=r"not there: text encoder .*, vae encoder .*; run: python download_models.py"
    ):
        Cache(tmp_path, encodings_of(config), found).build(views_of(config))


def test_a_model_without_the_encoder_is_refused(folder, tmp_path):
    config = config_for(folder)
    encoders = encoders_of(config.model, CPU)
    with pytest.raises(UsageError, match="names no audio encoder, which this recipe reads"):
        Cache(tmp_path, [sound()], encoders)


def test_encoders_of_released_files_are_those_of_the_model_in_memory(talking, tmp_path):
    """Every part in its released layout: the same tensors; another file is another identity."""
    heads = load_config("tiny-avatar")["image_encoder"] | {"num_attention_heads": 1}  # 80 wide or one, in a release
    written = {"base": "tiny-avatar", "description": "one head", "tiny": True, "seed": 0, "image_encoder": heads}
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(written))
    release = tmp_path / "release"
    write_release(release, load_config(tmp_path / "one.yaml"))
    config = talking_config(talking, f"model.config={tmp_path / 'one.yaml'}")
    places = (f"model.base_path={release}", f"model.pretrained_wav2vec_path={release / 'wav2vec2-base-960h'}")
    of_files = talking_config(talking, f"model.config={tmp_path / 'one.yaml'}", *places)
    memory, files = cache_for(config, tmp_path / "memory"), cache_for(of_files, tmp_path / "files")
    (view, *_) = views_of(config)
    memory.build([view])
    files.build([view])
    for kind in ("latents", "first_frame", "text", "image_features", "sound"):
        for name, tensor in memory.read(kind, view).items():
            torch.testing.assert_close(files.read(kind, view)[name], tensor, rtol=1e-4, atol=1e-4)
    before = {name: encoder.identity for name, encoder in files.encoders.items()}
    assert encoders_of(of_files.model, CPU)["vae"].identity == before["vae"]
    vae = torch.load(release / "Wan2.1_VAE.pth", weights_only=True)
    torch.save({name: tensor + 1 for name, tensor in vae.items()}, release / "Wan2.1_VAE.pth")
    after = {name: encoder.identity for name, encoder in encoders_of(of_files.model, CPU).items()}
    assert {name for name in before if before[name] != after[name]} == {"vae"}


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_processes_share_the_work(folder, tmp_path, ranks):
    """Each file is made by one; together they make all, of the same bytes as one alone does."""
    config = config_for(folder, "base", "data.cache_variants=4")
    all_views = views_of(config)
    expected = {
        cache.path(e, view) for cache in [cache_for(config, tmp_path)] for e in cache.encodings for view in all_views
    }
    made = [cache_for(config, tmp_path / "shared").build(all_views, rank, ranks) for rank in range(ranks)]
    assert sum(made) == len(expected) > 10 and cache_for(config, tmp_path / "shared").missing(all_views) == {}
    assert ranks == 1 or max(made) < len(expected)
    cache_for(config, tmp_path / "alone").build(all_views)
    one, other = (sorted((tmp_path / name).iterdir()) for name in ("shared", "alone"))
    assert [file.name for file in one] == [file.name for file in other]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(one, other, strict=True))


def test_runs_that_know_nothing_of_each_other_do_not_collide(folder, tmp_path):
    """Two runs of the whole work at a time: every file is whole, and no work file is left."""
    config = config_for(folder)
    all_views, start = views_of(config), threading.Barrier(2)
    caches = [cache_for(config, tmp_path) for _ in range(2)]

    def run(cache):
        start.wait()
        return cache.build(all_views)

    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(run, caches))
    assert sum(made) >= 5 and caches[0].missing(all_views) == {}
    assert all(trouble_in(file) == "" for file in tmp_path.glob("*.safetensors"))
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []


# ------------------------------------------------------------------------------------------ damage


@pytest.fixture
def built(folder, tmp_path):
    config = config_for(folder)
    cache, all_views = cache_for(config, tmp_path), views_of(config)
    cache.build(all_views)
    return cache, all_views, cache.path(cache.encodings[0], all_views[0])


def cut(file):
    file.write_bytes(file.read_bytes()[:-100])


def empty(file):
    file.write_bytes(b"")


def garbage(file):
    file.write_bytes(b"\xff" * 1000)


@pytest.mark.parametrize("damage", [cut, empty, garbage, Path.unlink])
def test_a_file_that_is_not_whole_is_made_anew(built, damage):
    cache, all_views, file = built
    before = file.read_bytes()
    damage(file)
    assert not is_whole(file) and trouble_in(file)
    with pytest.raises(InputError, match=f"{file.name}: (damaged|missing).*remove it, and the next start encodes"):
        cache.read("latents", all_views[0])
    assert cache.build(all_views) == 1 and file.read_bytes() == before


def test_flipped_bits_and_nan_are_named_when_they_are_read(built):
    cache, all_views, file = built
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match="damaged: its checksum is another; remove it"):
        cache.read("latents", all_views[0])
    tensors = load_file(file)
    tensors["std"][3, 1, 2, 0] = float("nan")
    save_file(tensors, file)
    with pytest.raises(InputError, match="not numbers: std holds NaN or infinity"):
        cache.read("latents", all_views[0])


def test_the_check_of_a_set_lists_damaged_encodings(folder, built, tmp_path):
    _, all_views, file = built
    tensors = load_file(file)
    tensors["mean"][0, 0, 0, 0] = float("inf")
    save_file(tensors, file)
    command = [sys.executable, "-m", "training.data", "check", str(folder), "--cache", str(tmp_path)]
    result = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert result.returncode == 3
    assert f"{file}: not numbers: mean holds NaN or infinity" in result.stdout.splitlines()
    assert "error: 0 of 3 samples and 1 encoded files cannot be used" in result.stderr


def test_an_encoder_that_makes_nan_is_refused_by_the_videos_name(folder, tmp_path):
    config = config_for(folder)
    cache, all_views = cache_for(config, tmp_path), views_of(config)
    load = cache.encoders["vae"].load

    def broken():
        vae = load()
        nn.init.constant_(vae.quant_conv.bias, float("nan"))
        return vae

    cache.encoders["vae"] = dataclasses.replace(cache.encoders["vae"], load=broken)
    with pytest.raises(InputError, match=r"\d.mp4: its latents are not all numbers"):
        cache.build(all_views)
    assert list(tmp_path.glob("*.safetensors")) == []


def test_a_killed_write_leaves_no_file(built, monkeypatch):
    cache, all_views, file = built
    before = file.read_bytes()
    file.unlink()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with contextlib.suppress(KeyboardInterrupt):
        cache.build(all_views)
    assert not file.exists() and not list(cache.folder.glob(".*.part"))
    monkeypatch.undo()
    cache.build(all_views)
    assert file.read_bytes() == before


def test_a_folder_that_cannot_be_written_in(folder, tmp_path):
    (tmp_path / "file").write_text("in the way")
    config = config_for(folder)
    with pytest.raises(ResourceError, match="file/cache: Not a directory; give data.cache: another folder"):
        cache_for(config, tmp_path / "file" / "cache").build(views_of(config))


def test_what_killed_runs_left_goes_after_a_day(folder, tmp_path):
    old, new = tmp_path / ".a.host.1.part", tmp_path / ".b.host.2.part"
    for file in (old, new):
        file.write_bytes(b"x")
    os.utime(old, (time.time() - 2 * 24 * 3600,) * 2)
    config = config_for(folder)
    cache_for(config, tmp_path).build(views_of(config)[:1])
    assert not old.exists() and new.exists()
