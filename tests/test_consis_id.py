"""ConsisID end to end on tiny random releases of both versions, and against diffusers' own pipeline of version 1.0."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDPMScheduler, ConsisIDTransformer3DModel
from diffusers import ConsisIDPipeline as DiffusersConsisIDPipeline
from diffusers.hooks.group_offloading import _is_group_offload_enabled
from PIL import Image
from safetensors.torch import load_file, save_file

import infer
from errors import InputError, ResourceError, UsageError, UserError, WeightsError
from pipelines.consis_id.command import resolve_consis_id
from pipelines.consis_id.face import EVA_FILE, RETINAFACE_FILE, FaceCondition
from pipelines.consis_id.model import ConsisID
from pipelines.consis_id.pipeline import ConsisIDMaker, decode_stream
from pipelines.consis_id.release import load_vae, make_scheduler
from pipelines.distributed import Processes
from pipelines.jobs import Job
from pipelines.needs import size_of
from preprocess.record import read_metadata
from preprocess.video import probe, read_frames
from tests.streamed_offload import stream_group_offloading
from tests.tiny_consis_id import EMBED_DIM, SCHEDULER, VIT_DIM, write_release
from tests.tiny_face import write_antelopev2

PROJECT = Path(__file__).parent.parent
SMALL = ["--height", "64", "--width", "96", "--num_frames", "9", "--num_inference_steps", "2"]
QUICK = ["--face_detector", "scrfd"]  # RetinaFace is a ResNet-50, whatever the release
CONFIGS = {"1.0": "consisid", "1.5": "consisid-1.5"}


@pytest.fixture(scope="module", params=CONFIGS)
def version(request):
    return request.param


@pytest.fixture(scope="module")
def releases(tmp_path_factory) -> dict[str, Path]:
    return {version: write_release(tmp_path_factory.mktemp("release"), version) for version in CONFIGS}


def flags_of(releases, version="1.0"):
    return ["--method", "consisid", "--config", CONFIGS[version], "--base_path", str(releases[version])]


PHOTO = ["--ip_image", str(PROJECT / "assets/face.png")]  # 512x512
PERSON = [*PHOTO, "--prompt", "a woman smiles"]


def run(*flags) -> list[Path]:
    """A run as a user starts it, in this process."""
    return infer.main(infer.parse_args(list(map(str, flags))))


def make(releases, output, *flags, prompt="a woman smiles") -> numpy.ndarray:
    """The frames of the file that a run writes."""
    made = run(*flags_of(releases), *PHOTO, *SMALL, *QUICK, "--prompt", prompt, "--output", output, *flags)
    assert made == [output]
    return read_frames(output)


@pytest.fixture(scope="module")
def reference(releases, tmp_path_factory) -> numpy.ndarray:
    return make(releases, tmp_path_factory.mktemp("reference") / "out.mp4")


def face_condition(seed=0) -> FaceCondition:
    """What any photo could have become: tests below the face networks start here."""
    generator = torch.Generator().manual_seed(seed)
    picture = torch.randint(0, 256, (512, 512, 3), generator=generator, dtype=torch.uint8).numpy()
    hidden = [torch.randn(1, 5, VIT_DIM, generator=generator) for _ in range(5)]
    keypoints = numpy.array([[200, 210], [300, 205], [250, 260], [210, 320], [295, 315]], numpy.float32)
    return FaceCondition(picture, torch.randn(1, 512 + EMBED_DIM, generator=generator), hidden, keypoints)


def settings_and_config(releases, *flags, version="1.0"):
    return resolve_consis_id(infer.parse_args([*flags_of(releases, version), *PERSON, *SMALL, *map(str, flags)]))


def maker_of(releases, *flags, version="1.0", face=None) -> ConsisIDMaker:
    settings, config = settings_and_config(releases, *flags, version=version)
    model = ConsisID(settings, config, Processes(0, 1, torch.device("cpu"), context_parallel=False))
    model.check()
    return ConsisIDMaker(
        model, face or face_condition(), model.encode_prompts([*settings.prompt, settings.negative_prompt])
    )


JOB = Job("a woman smiles", 0, Path("unused.mp4"))


# ------------------------------------------------------------------------------------------------- what comes out


def test_photo_to_video(releases, version, tmp_path, capfd):
    output = tmp_path / "out.mp4"
    flags = [*flags_of(releases, version), *PERSON, *SMALL, "--output", str(output)]
    if version == "1.0":  # as a user starts it
        result = subprocess.run([sys.executable, "infer.py", *flags], cwd=PROJECT, timeout=120, check=False)
        assert result.returncode == 0
    else:
        run(*flags)
    out, err = capfd.readouterr()
    assert out.strip() == str(output)
    assert "\r" not in err  # no bar where there is no terminal
    info = probe(output)
    assert (info.num_frames, info.width, info.height, info.fps) == (9, 96, 64, 8.0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.face0.png", "out.json", "out.mp4"]
    face = numpy.asarray(Image.open(tmp_path / "out.face0.png"))
    assert face.shape == (512, 512, 3)
    assert (face == 255).all(axis=-1).mean() > 0.05  # the background is white
    record = read_metadata(output)
    assert json.loads((tmp_path / "out.json").read_text(encoding="utf-8")) == record
    assert record["settings"]["seed"] == [0]
    assert str(releases[version] / "transformer") in record["weights"]


def test_defaults_are_the_authors(releases, version):
    settings, _ = resolve_consis_id(infer.parse_args([*flags_of(releases, version), *PERSON]))
    assert (settings.num_frames, settings.height, settings.width, settings.fps) == (49, 480, 720, 8)
    assert (settings.num_inference_steps, settings.guidance_scale, settings.negative_prompt) == (50, (6.0,), "")
    assert settings.seed == (0,)


def test_record_makes_the_same_video_again(releases, reference, tmp_path):
    first = make(releases, tmp_path / "first.mp4", "--seed", 3)
    run("--config", tmp_path / "first.json", "--output", tmp_path / "again.mp4")
    assert (read_frames(tmp_path / "again.mp4") == first).all()
    assert (first != reference).mean() > 0.5


def test_seed_zero_is_a_seed(releases, reference, tmp_path):
    """Upstream takes 0 for unseeded."""
    assert (make(releases, tmp_path / "out.mp4", "--seed", 0) == reference).all()


def test_prompts_and_seeds_are_each_as_alone(releases, tmp_path):
    prompts = ["--prompt", "a woman smiles", "a fox"]
    run(*flags_of(releases), *PHOTO, *SMALL, *QUICK, *prompts, "--seed", 0, 1, "--output", tmp_path / "out.mp4")
    names = sorted(p.name for p in tmp_path.glob("*.mp4"))
    assert names == ["out-000-seed0.mp4", "out-000-seed1.mp4", "out-001-seed0.mp4", "out-001-seed1.mp4"]
    alone = make(releases, tmp_path / "alone.mp4", "--seed", 1, prompt="a fox")
    assert (read_frames(tmp_path / "out-001-seed1.mp4") == alone).all()
    assert (read_frames(tmp_path / "out-000-seed1.mp4") != alone).any()


def test_face_score_is_a_gate_here_too(releases, tmp_path, caplog):
    make(releases, tmp_path / "out.mp4", "--min_face_score", 1, "--max_retries", 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.face0.png", "out.json", "out.mp4"]
    record = read_metadata(tmp_path / "out.mp4")
    assert record["settings"]["seed"] in ([0], [1])
    assert -1 <= record["face_score"]["cosine"] < 1
    assert "none of 2 seeds reached --min_face_score 1" in caplog.text


@pytest.mark.parametrize(
    "flags",
    [
        ("--negative_prompt", "fog"),
        ("--guidance_scale", 1),
        ("--num_inference_steps", 3),
        ("--identity_strength", 0),
        ("--dtype", "bf16"),
        ("--fp8",),
    ],
    ids=lambda flags: " ".join(map(str, flags)),
)
def test_every_flag_of_the_sampling_changes_the_latents(releases, flags):
    plain, changed = (maker_of(releases, *f).denoise(JOB) for f in ((), flags))
    assert changed.shape == plain.shape
    assert (changed.float() - plain).abs().mean() > 1e-3 * plain.abs().mean()


# ----------------------------------------------------------------------------------------- against other computations


@pytest.mark.parametrize("keypoints", [False, True])
def test_equals_diffusers_own_pipeline_which_runs_the_extractor_at_each_step(releases, tmp_path, keypoints):
    root = tmp_path / "release"
    if keypoints:
        write_release(root, is_kps=True)
    else:
        root = releases["1.0"]
    maker = maker_of({"1.0": root}, "--seed", 5, "--num_inference_steps", 3)
    face = maker.face
    theirs = DiffusersConsisIDPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=AutoencoderKLCogVideoX.from_pretrained(root / "vae"),
        transformer=ConsisIDTransformer3DModel.from_pretrained(root / "transformer"),
        scheduler=CogVideoXDPMScheduler.from_config(SCHEDULER),
    )
    theirs.set_progress_bar_config(disable=True)
    calls = []
    theirs.transformer.local_facial_extractor.register_forward_hook(lambda *_: calls.append(1))
    expected = theirs(
        image=Image.fromarray(face.picture),
        height=64,
        width=96,
        num_frames=9,
        num_inference_steps=3,
        guidance_scale=6.0,
        prompt_embeds=maker.text[JOB.prompt],
        negative_prompt_embeds=maker.text[""],
        generator=torch.Generator().manual_seed(5),
        output_type="latent",
        id_cond=face.id_cond,
        id_vit_hidden=face.id_vit_hidden,
        kps_cond=face.keypoints,
    ).frames
    assert len(calls) == 3
    ours = maker.denoise(replace(JOB, seed=5))
    torch.testing.assert_close(ours.transpose(1, 2), expected, rtol=1e-5, atol=1e-5)


def test_extractor_runs_once_for_all_videos(releases, monkeypatch):
    calls = []
    settings, config = settings_and_config(releases)
    model = ConsisID(settings, config, Processes(0, 1, torch.device("cpu"), context_parallel=False))
    model.pipeline()
    model._extractor.register_forward_hook(lambda *_: calls.append(1))
    maker = ConsisIDMaker(model, face_condition(), model.encode_prompts([JOB.prompt, ""]))
    maker.denoise(JOB)
    maker.denoise(replace(JOB, seed=1))
    assert len(calls) == 1


@pytest.mark.parametrize("memory", ["model", "group", "sequential"])
def test_offloaded_is_resident(releases, version, memory):
    resident, offloaded = (maker_of(releases, "--memory", mode, version=version) for mode in ("resident", memory))
    for prompt, states in resident.text.items():
        assert torch.equal(offloaded.text[prompt], states)
    assert torch.equal(offloaded.denoise(JOB), resident.denoise(JOB))
    # It is not resident under another name.
    assert _is_group_offload_enabled(offloaded.model.pipeline().transformer) == (memory != "model")


def test_offloaded_through_a_stream_is_resident(releases, monkeypatch):
    """As on CUDA, whose hooks keep copies of the weights in their type: the VAE, which decodes in tiles, has none."""
    flags = ("--tiled", "--dtype", "bf16")
    resident = maker_of(releases, *flags, "--memory", "resident")
    stream_group_offloading(monkeypatch)
    offloaded = maker_of(releases, *flags, "--memory", "group")
    for _ in range(2):  # the first pass tells the hooks the order of the blocks
        latents = offloaded.denoise(JOB)
        assert torch.equal(latents, resident.denoise(JOB))
        with offloaded.model.decoder() as vae, resident.model.decoder() as other:
            assert vae.use_tiling and not _is_group_offload_enabled(vae)
            ours, theirs = (list(decode_stream(decoder, latents)) for decoder in (vae, other))
        assert len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))
    assert ours[0].dtype == torch.bfloat16


@pytest.mark.parametrize("num_latents", [1, 3, 4, 5])
def test_streamed_is_whole(releases, num_latents):
    vae = load_vae(releases["1.0"] / "vae", torch.float32)
    latents = torch.randn(1, 4, num_latents, 8, 12, generator=torch.Generator().manual_seed(0))
    chunks = list(decode_stream(vae, latents))
    assert max(chunk.shape[2] for chunk in chunks) <= 9
    assert len(chunks) == max(num_latents // 2, 1)
    with torch.no_grad():
        whole = vae.decode(latents / vae.config.scaling_factor).sample
    assert torch.equal(torch.cat(chunks, dim=2), whole)
    if num_latents % 2:  # others are never asked for
        assert whole.shape[2] == 4 * (num_latents - 1) + 1


def test_tiled_decodes_all_frames(releases, tmp_path):
    """Seams are blended, and norms see a tile only: the frames are like the untiled ones, not equal."""
    whole, tiled = (
        read_frames(maker_of(releases, *flags).make(replace(JOB, output=tmp_path / f"{len(flags)}.mp4"))).astype(int)
        for flags in ((), ("--tiled",))
    )
    assert tiled.shape == whole.shape == (9, 64, 96, 3)
    assert 0 < abs(tiled - whole).mean() < whole.std()


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("flags", "error", "message"),
    [
        (["--shift", 5], UsageError, "--shift: --method consisid has no such setting"),
        (["--solver", "euler"], UsageError, "--solver: --method consisid"),
        (["--wan_version", "2.1"], UsageError, "--wan_version 2.1 and --config consisid"),
        (["--preview"], UsageError, "--preview: --method consisid"),
        (["--ip_image", "assets/face.png"], UsageError, "--ip_image: ConsisID takes the photo of one person, 2"),
        (["--guidance_scale", 3, 4], UsageError, "--guidance_scale: 2 values"),
        (["--max_retries", 1], UsageError, "--max_retries 1: give --min_face_score"),
        (["--memory", "half"], UsageError, "--memory half: accepted are auto, resident"),
        (["--num_frames", 0], UsageError, "--num_frames 0: accepted are 1"),
        (["--face_detector", "yolo"], UsageError, "--face_detector yolo: accepted are retinaface, scrfd"),
        (["--face_select", "upstream", "--face_index", 0], UsageError, "--face_select upstream .*--face_index"),
        (["--fp8", "--memory", "group"], UsageError, "--fp8 with --memory group"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else None,
)
def test_what_makes_no_sense_is_refused_by_name(releases, flags, error, message):
    with pytest.raises(error, match=message):
        settings_and_config(releases, *flags)


def test_photo_without_a_face(releases, tmp_path, capsys):
    blind = write_antelopev2(tmp_path / "blind", faces=())
    with pytest.raises(InputError, match=r"no face found in .*face.png \(512x512\); ConsisID needs"):
        make(releases, tmp_path / "out.mp4", "--antelopv2_path", blind)
    assert not (tmp_path / "out.mp4").exists()


def test_photo_that_is_not_there(releases, tmp_path):
    with pytest.raises(InputError, match="--ip_image .*nobody.jpg: no such file"):
        run(*flags_of(releases), "--ip_image", tmp_path / "nobody.jpg", "--prompt", "x")


def test_sizes_are_rounded_with_a_message(releases, caplog):
    settings, _ = settings_and_config(releases, "--height", 60, "--width", 90, "--num_frames", 7)
    assert (settings.height, settings.width, settings.num_frames) == (64, 96, 9)
    assert "--height 60 becomes 64" in caplog.text
    assert "--num_frames 7 becomes 9" in caplog.text


def test_version_15_makes_no_larger_picture_than_it_was_trained_for(releases):
    with pytest.raises(UsageError, match="--height 80 --width 96: .* makes at most 64x96"):
        maker_of(releases, "--height", 80, version="1.5")
    assert maker_of(releases, "--height", 80).denoise(JOB).shape == (1, 4, 3, 10, 12)


def test_learnt_positions_allow_one_size(releases, tmp_path):
    write_release(tmp_path / "release", use_learned_positional_embeddings=True)
    with pytest.raises(UsageError, match="--height 48 --width 96: .* for 64x96 alone"):
        maker_of({"1.0": tmp_path / "release"}, "--height", 48)


@pytest.mark.parametrize("version", CONFIGS)
@pytest.mark.parametrize("num_frames", [1, 17])
def test_every_length(releases, version, num_frames, tmp_path):
    """1.5 works on pairs of latent frames; what it pads is cut off again."""
    maker = maker_of(releases, "--num_frames", num_frames, version=version)
    assert read_frames(maker.make(replace(JOB, output=tmp_path / "out.mp4"))).shape == (num_frames, 64, 96, 3)


def test_long_prompt_is_cut_with_a_warning(releases, caplog):
    settings, config = settings_and_config(releases)
    model = ConsisID(settings, config, Processes(0, 1, torch.device("cpu"), context_parallel=False))
    model.encode_prompts(["the quick brown fox jumps over the lazy dog"])
    assert "tokens is cut at 12: ignored from" in caplog.text


def test_broken_numbers_end_the_run(releases):
    maker = maker_of(releases)
    maker.face_tokens = maker.face_tokens * float("nan")
    words = r"the model returned NaN or infinity at step 1 of \d+ \(torch.float32\); try --dtype fp32"
    with pytest.raises(UserError, match=words) as error:
        maker.denoise(JOB)
    assert error.value.exit_code == 4


def test_broken_numbers_of_the_vae_end_the_run(releases, monkeypatch, tmp_path):
    maker = maker_of(releases)
    frames = torch.full((1, 3, 1, 64, 96), torch.nan)
    monkeypatch.setattr("pipelines.consis_id.pipeline.decode_stream", lambda *_: iter([frames]))
    with pytest.raises(UserError, match=r"the VAE returned NaN or infinity \(torch.float32\); try --dtype") as error:
        maker.make(replace(JOB, output=tmp_path / "out.mp4"))
    assert error.value.exit_code == 4 and not list(tmp_path.iterdir())


def test_hopeless_sizes_are_refused_before_loading(releases, tmp_path, monkeypatch):
    config = {**json.loads((releases["1.0"] / "transformer/config.json").read_text()), "num_attention_heads": 64}
    settings, run_config = settings_and_config(releases, "--height", 16000, "--width", 16000, "--memory", "model")
    model = ConsisID(settings, run_config, Processes(0, 1, torch.device("cpu"), context_parallel=False))
    monkeypatch.setattr("pipelines.consis_id.model.read_json", lambda *_: config | {"LFE_output_dim": 682})
    monkeypatch.setattr(ConsisID, "weights", lambda self: [])  # they are not of that size
    with pytest.raises(ResourceError, match="--width 16000 --height 16000 .*--memory group, --tiled"):
        model.check()


@pytest.mark.parametrize("flags", [["--dtype", "bf16"], ["--dtype", "bf16", "--fp8"]])
def test_what_is_estimated_is_what_is_on_the_device(releases, flags):
    """Norms and embeddings, an eighth of the released weights, stay wide under --fp8."""
    model = maker_of(releases, *flags, "--memory", "model").model
    needs = model.needs(json.loads((releases["1.0"] / "transformer/config.json").read_text()))
    transformer, extractor = size_of(model.pipeline().transformer), size_of(model._extractor)
    weights = needs.weights_fp8 if "--fp8" in flags else needs.weights
    assert weights["model"] == transformer + extractor
    assert weights["resident"] + needs.vae == transformer + extractor
    assert weights["sequential"] < weights["group"] < weights["model"]
    assert (needs.expert_fp8 if "--fp8" in flags else needs.expert) == transformer


# --------------------------------------------------------------------------------------------------------- weights


def copy_release(source: Path, target: Path) -> Path:
    for file in source.rglob("*"):
        if file.is_file():
            copy = target / file.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.symlink_to(file)
    return target


@pytest.mark.parametrize(
    "missing", ["transformer/config.json", "vae", "tokenizer/spiece.model", f"face_encoder/{EVA_FILE}", "text_encoder"]
)
def test_missing_files_name_the_command(releases, tmp_path, missing):
    root = copy_release(releases["1.0"], tmp_path / "release")
    gone = root / missing
    gone.unlink() if gone.is_symlink() else gone.rename(tmp_path / "gone")
    with pytest.raises(WeightsError, match=r"python download_models.py --only consisid"):
        maker_of({"1.0": root})


def test_other_weights_are_refused_with_counts(releases, tmp_path):
    root = copy_release(releases["1.0"], tmp_path / "release")
    file = root / "transformer/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["perceiver_cross_attention.1.to_q.weight"]
    tensors["blocks.0.weight"] = torch.zeros(1)
    file.unlink()
    save_file(tensors, file)
    with pytest.raises(WeightsError, match=r"1 missing .*2\.face_attention.to_q.*1 unexpected .*blocks.0"):
        maker_of({"1.0": root})


def test_configurations_that_are_not_consis_id(releases, tmp_path):
    root = copy_release(releases["1.0"], tmp_path / "release")
    file = root / "transformer/config.json"
    config = json.loads(file.read_text())
    for change, message in (
        ({"is_train_face": False}, "without ConsisID's face modules"),
        ({"num_layers": 5}, "5 layers do not divide by cross_attn_interval 2"),
    ):
        file.unlink()
        file.write_text(json.dumps(config | change))
        with pytest.raises(WeightsError, match=message):
            maker_of({"1.0": root})
    file.write_text("<html>")
    with pytest.raises(WeightsError, match="config.json: not a configuration"):
        maker_of({"1.0": root})
    with pytest.raises(WeightsError, match="scheduler EulerDiscreteScheduler; known are CogVideoXDPMScheduler"):
        make_scheduler({"_class_name": "EulerDiscreteScheduler"})


def test_face_network_of_another_kind_is_refused(releases, tmp_path):
    root = copy_release(releases["1.0"], tmp_path / "release")
    (root / "face_encoder" / RETINAFACE_FILE).unlink()
    (root / "face_encoder" / RETINAFACE_FILE).symlink_to(root / "face_encoder" / EVA_FILE)
    with pytest.raises(WeightsError, match="not facexlib's RetinaFace: .*--only consisid"):
        run(*flags_of({"1.0": root}), *PERSON, *SMALL, "--output", tmp_path / "out.mp4")
