"""The list of what a run reads, and what is said of what is missing or wrong before anything loads."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors.torch import save_file

import infer
import infer_audio_avatar
import infer_face_swap
import infer_long_video
import infer_with_lora
import infer_with_vace
from errors import UserError, WeightsError
from models.wan import checkpoint
from models.wan.text_encoder import load_tokenizer
from pipelines.consis_id.command import resolve_consis_id
from pipelines.consis_id.model import ConsisID
from pipelines.distributed import start_processes
from pipelines.instant_id import pipeline as instant_id
from pipelines.instant_id.command import resolve_instant_id
from pipelines.jobs import list_jobs
from pipelines.long_video.command import resolve_long_video
from pipelines.model_files import ModelFiles
from pipelines.settings import PROJECT
from pipelines.stand_in import stand_in_parts
from pipelines.text_to_video.command import resolve_image_to_video
from pipelines.text_to_video.from_pictures import open_pictures
from pipelines.tiny import tiny_stand_in_tensors, tiny_text_encoder, tiny_transformer
from pipelines.vace.command import resolve_vace_settings
from pipelines.vace.part import vace_part
from pipelines.wan import Wan
from preprocess.video_writer import VideoWriter
from tests.test_infer import write_release
from tests.test_long_video import write_lora
from tests.tiny import CONFIG

FACE = "assets/face.png"


def make_wan(*flags: str) -> Wan:
    settings, config = resolve_image_to_video(infer.parse_args([*flags, "--prompt", "x"]))
    return Wan(settings, config, start_processes("cpu"), stand_in_parts(settings, config))


def test_weights_lists_each_part_with_its_download():
    files = make_wan("--wan_version", "2.2", "--ip_image", FACE).weights()
    assert [(file.name, file.config) for file in files] == [
        ("high-noise transformer", "wan2.2-t2v-A14B"),
        ("low-noise transformer", "wan2.2-t2v-A14B"),
        ("umT5", "wan2.2-t2v-A14B"),
        ("tokenizer", "wan2.2-t2v-A14B"),
        ("VAE", "wan2.2-t2v-A14B"),
        ("Stand-In (high noise)", "stand-in-wan2.2"),
        ("Stand-In (low noise)", "stand-in-wan2.2"),
    ]
    assert files[0].path == Path("checkpoints/Wan2.2/t2v/high_noise_model")
    assert files[0].hint == "run: python download_models.py --only wan2.2-t2v-A14B"


def test_weights_of_the_tiny_model_are_none():
    assert make_wan().weights() == []


def test_vae_decides_until_denoised_only_where_it_encodes():
    def vae(wan: Wan):
        return next(file for file in wan.weights() if file.name == "VAE")

    assert not vae(make_wan("--config", "wan2.1-t2v-1.3B")).until_denoised
    assert vae(make_wan("--wan_version", "2.1", "--ip_image", FACE)).until_denoised  # the photo
    assert vae(make_wan("--config", "wan2.1-i2v-14B-480P", "--image", FACE)).until_denoised
    assert not vae(make_wan("--config", "wan2.2-ti2v-5B")).until_denoised
    assert vae(make_wan("--config", "wan2.2-ti2v-5B", "--image", FACE)).until_denoised
    args = infer_with_vace.parse_args(["--config", "wan2.1-vace-1.3B", "--prompt", "x", "--num_frames", "9"])
    settings, config = resolve_vace_settings(args)
    files = Wan(settings, config, start_processes("cpu"), [vace_part(settings, config)]).weights()
    assert [file.name for file in files] == ["VACE", "umT5", "tokenizer", "VAE"]
    assert files[-1].until_denoised


@pytest.mark.parametrize(
    "script", [infer, infer_with_lora, infer_face_swap, infer_with_vace, infer_audio_avatar, infer_long_video]
)
def test_every_script_takes_a_tokenizer(script):
    assert script.parse_args(["--tokenizer_path", "there"]).tokenizer_path == "there"


def test_a_tokenizer_that_is_named_is_the_one_that_is_read():
    wan = make_wan("--config", "wan2.1-t2v-1.3B", "--tokenizer_path", "there")
    (tokenizer,) = (file for file in wan.weights() if file.name == "tokenizer")
    assert (tokenizer.path, tokenizer.flag) == (Path("there"), "--tokenizer_path")


# -------------------------------------------------------------------------------------------------------- what is said


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> Path:
    """The tiny model in the released layout, with Stand-In beside it."""
    folder = tmp_path_factory.mktemp("weights") / "t2v"
    write_release(folder, CONFIG)
    torch.save(tiny_stand_in_tensors(CONFIG), folder.parent / "Stand-In_wan2.1.ckpt")
    return folder


def copy(release: Path, tmp_path: Path) -> Path:
    shutil.copytree(release, tmp_path / "t2v")
    return tmp_path / "t2v"


def checked(release: Path, base_path: Path, *flags: str) -> str:
    """What `check` says; "" for nothing."""
    stand_in = ("--stand_in_path", str(release.parent / "Stand-In_wan2.1.ckpt"), "--ip_image", FACE)
    wan = make_wan("--config", "configs/tiny.yaml", "--base_path", str(base_path), *stand_in, *flags)
    try:
        wan.check()
    except UserError as error:
        assert "\n" not in str(error)
        return f"{error.exit_code}: {error}"
    return ""


def test_a_whole_release_passes_and_no_value_is_read(release, monkeypatch):
    """Neither are the files mapped: what the loaders are given has no values, as is what they make of it."""
    read, read_file = [], checkpoint._read_file
    monkeypatch.setattr(checkpoint, "_read_file", lambda *args: read.append(read_file(*args)) or read[-1])
    monkeypatch.setattr(safetensors.torch, "load_file", None)
    assert checked(release, release) == ""
    assert len(read) == 4 and all(tensor.is_meta for tensors in read for tensor in tensors.values())


def test_one_message_names_all_and_one_command(monkeypatch, tmp_path):
    monkeypatch.setattr(ModelFiles, "base_path", tmp_path / "none")
    with pytest.raises(WeightsError) as error:
        make_wan("--wan_version", "2.1", "--ip_image", FACE, "--min_face_score", "0.5").check()
    said = str(error.value)
    for part in ("transformer", "umT5", "tokenizer", "VAE", "Stand-In", "face models"):
        assert part in said
    assert said.count("no such weights") <= 4  # one folder is one problem
    assert said.endswith("run: python download_models.py --only wan2.1-t2v-14B stand-in-wan2.1 antelopev2")


def test_vace_is_told_of_its_own_base(tmp_path):
    args = ["--wan_version", "2.1", "--ip_image", FACE, "--prompt", "x", "--num_frames", "9"]
    settings, config = resolve_vace_settings(infer_with_vace.parse_args([*args, "--vace_path", str(tmp_path / "none")]))
    with pytest.raises(WeightsError, match="--only wan2.1-vace-14B stand-in-wan2.1$"):
        parts = [*stand_in_parts(settings, config), vace_part(settings, config)]
        Wan(settings, config, start_processes("cpu"), parts).check()


def test_a_base_of_files_makes_every_part_one_of_files(tmp_path):
    """Under a tiny config too: an identity made from a seed would fit no released branch."""
    flags = ["--config", "tiny", "--vace_path", str(tmp_path), "--ip_image", FACE, "--prompt", "x", "--num_frames", "9"]
    settings, config = resolve_vace_settings(infer_with_vace.parse_args(flags))
    parts = [*stand_in_parts(settings, config), vace_part(settings, config)]
    wan = Wan(settings, config, start_processes("cpu"), parts)
    assert not wan.is_tiny and {"VACE", "Stand-In", "umT5"} <= {file.name for file in wan.weights()}


def test_long_video_names_base_and_loras_at_once(tmp_path):
    flags = ["--variant", "2.0-pro", "--lora_config", "lora-svi-lightx2v", "--ref_image_path", FACE, "--prompt", "x"]
    args = infer_long_video.parse_args([*flags, "--base_path", str(tmp_path / "none"), "--num_clips", "1"])
    settings, config, _ = resolve_long_video(args)
    with pytest.raises(WeightsError, match="--only wan2.2-i2v-A14B svi-2.0-pro lora-svi-lightx2v$") as error:
        Wan(settings, config, start_processes("cpu")).check()
    assert "high-noise transformer" in str(error.value) and "LoRA" in str(error.value)


def truncate(file: Path) -> None:
    with open(file, "r+b") as stream:
        stream.truncate(file.stat().st_size // 2)


def test_damage_is_found_by_headers(release, tmp_path):
    folder = copy(release, tmp_path)
    truncate(folder / "diffusion_pytorch_model.safetensors")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 507609880\n"
    (folder / "Wan2.1_VAE.pth").write_text(pointer)
    text = torch.load(folder / "models_t5_umt5-xxl-enc-bf16.pth")
    text.pop("encoder.block.1.layer.0.SelfAttention.q.weight")
    torch.save(text, folder / "models_t5_umt5-xxl-enc-bf16.pth")
    (folder / "google" / "umt5-xxl" / "tokenizer.json").write_text(pointer)
    said = checked(release, folder)
    for words in (
        "4: transformer: ",
        "truncated, expected",
        "umT5: ",
        "1 missing (block.1.layer.0.SelfAttention.q.weight)",
        "tokenizer: ",
        "VAE: ",
        "a git-lfs pointer of a file of 507609880 bytes",
    ):
        assert words in said, said
    assert said.count("download_models.py") == 1


def test_another_architecture_is_found_by_headers(release, tmp_path):
    folder = copy(release, tmp_path)
    other = CONFIG | {"transformer": CONFIG["transformer"] | {"num_layers": 3}}
    save_file(tiny_transformer(other).state_dict(), folder / "diffusion_pytorch_model.safetensors")
    wide = CONFIG | {"text_encoder": CONFIG["text_encoder"] | {"d_model": 48}}
    torch.save(tiny_text_encoder(wide).encoder.state_dict(), folder / "models_t5_umt5-xxl-enc-bf16.pth")
    said = checked(release, folder)
    assert "3 layers" in said and "expected unreleased Wan" in said and "2 layers" in said, said
    assert "a umT5 of width 48, the transformer was trained with 32" in said


def test_places_that_hold_nothing(release, tmp_path):
    assert "no weights in this folder" in checked(release, tmp_path)
    assert "no VAE there (looked for *_VAE.* and vae/)" in checked(release, tmp_path)
    single = checked(release, release / "diffusion_pytorch_model.safetensors")
    assert single.startswith("4: umT5, VAE: --base_path ") and "one file; give the model's folder" in single
    parts = ("--text_encoder_path", str(release), "--vae_path", str(release))
    assert checked(release, release / "diffusion_pytorch_model.safetensors", *parts) == ""

    folder = copy(release, tmp_path)
    for name in ("diffusion_pytorch_model.safetensors", "Wan2.1_VAE.pth"):  # a hub's cache that was cleaned
        (folder / name).unlink()
        (folder / name).symlink_to("../../blobs/0123abcd")
    said = checked(release, folder)
    assert said.count("a link to ../../blobs/0123abcd") == 2, said
    assert "transformer: " in said and "VAE: " in said


def test_attention_backend_is_tried_before_loading(release):
    said = checked(release, release, "--attention_backend", "_native_cudnn")  # known, and not for CPUs
    assert said.startswith("2: --attention_backend _native_cudnn: does not run on cpu in torch.float32")
    assert said.endswith("native, _native_flash, _native_math")
    assert checked(release, release, "--attention_backend", "_native_math") == ""


def test_an_output_that_another_run_writes_is_refused_at_once(tmp_path):
    args = infer.parse_args(["--output", str(tmp_path / "out.mp4"), "--prompt", "x"])
    settings, _ = resolve_image_to_video(args)
    with VideoWriter(tmp_path / "out.mp4", fps=16) as video:
        with pytest.raises(UserError, match="another run is writing .*out.mp4") as error:
            list_jobs(settings)
        assert error.value.exit_code == 2
        video.write(torch.zeros(1, 32, 32, 3, dtype=torch.uint8))
    (tmp_path / "out.mp4").unlink()
    (tmp_path / "out.json").unlink(missing_ok=True)
    list_jobs(settings)  # what a run leaves locks nobody out


def test_under_torchrun_each_process_looks_at_its_own_outputs(tmp_path, monkeypatch):
    """Those of others may be being written by them, of this very run."""
    args = infer.parse_args(["--output", str(tmp_path / "out.mp4"), "--prompt", "x", "--seed", "0", "1", "2"])
    settings, _ = resolve_image_to_video(args)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for seed, rank in (("0", "0"), ("1", "1"), ("2", "0")):
        with VideoWriter(tmp_path / f"out-000-seed{seed}.mp4", fps=16) as video:
            monkeypatch.setenv("RANK", rank)
            with pytest.raises(UserError, match=f"another run is writing .*seed{seed}.mp4"):
                list_jobs(settings)
            monkeypatch.setenv("RANK", str(1 - int(rank)))
            assert len(list_jobs(settings)) == 3
            video.write(torch.zeros(1, 32, 32, 3, dtype=torch.uint8))
        for file in tmp_path.glob("out-*"):
            file.unlink()


def test_a_missing_and_a_damaged_lora_are_in_the_one_list(release, tmp_path):
    folder = copy(release, tmp_path)
    truncate(folder / "Wan2.1_VAE.pth")
    write_lora(tmp_path / "whole.safetensors", "tiny", seed=1)
    write_lora(tmp_path / "half.safetensors", "tiny", seed=2)
    truncate(tmp_path / "half.safetensors")
    loras = [str(tmp_path / f"{name}.safetensors") for name in ("whole", "half", "none")]
    flags = ["--config", "configs/tiny.yaml", "--base_path", str(folder), "--prompt", "x", "--lora_path", *loras]
    with pytest.raises(WeightsError) as error:
        infer_with_lora.main(infer_with_lora.parse_args([*flags, "--output", str(tmp_path / "out.mp4")]))
    said = str(error.value)
    for words in ("VAE: ", "half.safetensors: truncated", "none.safetensors: no such weights (--lora_path)"):
        assert words in said, said
    assert "whole" not in said


def test_a_tokenizer_is_parsed_before_anything_loads(release, tmp_path):
    """What is cut off, or no tokenizer of umT5, is said with all else that is wrong; whole ones pass in either form."""
    folder = copy(release, tmp_path)
    file = folder / "google" / "umt5-xxl" / "tokenizer.json"
    whole = json.loads(file.read_text(encoding="utf-8"))
    pieces = [["<pad>", 0.0], ["</s>", 0.0], ["<s>", 0.0], ["<unk>", 0.0], *([f"▁{i}", -1.0] for i in range(2000))]
    large = whole | {"model": {"type": "Unigram", "unk_id": 3, "vocab": pieces, "byte_fallback": True}}
    large["added_tokens"] = [
        {"id": i, "content": pieces[i][0], "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for i in (0, 1, 2, 3, 1999)
    ]
    closing = {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}]}
    closing["single"].append({"SpecialToken": {"id": "</s>", "type_id": 0}})
    closing |= {"pair": closing["single"], "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}}}
    for document in (whole, large | {"post_processor": closing}):
        file.write_text(json.dumps(document), encoding="utf-8")
        assert checked(release, folder) == ""
        assert load_tokenizer(file.parent)("").input_ids == [load_tokenizer(file.parent).eos_token_id]
    for damaged in (
        file.read_text(encoding="utf-8")[:-100],
        "{}",
        json.dumps(large | {"post_processor": None}),
        json.dumps(large | {"post_processor": closing, "normalizer": {"type": "nonsense"}}),
    ):
        file.write_text(damaged, encoding="utf-8")
        said = checked(release, folder)
        assert said.startswith("4: tokenizer: ") and "not a tokenizer of umT5" in said, said
    (folder / "Wan2.1_VAE.pth").unlink()
    said = checked(release, folder)
    assert "tokenizer: " in said and "VAE: " in said


def test_instant_id_names_all_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = infer.parse_args(["--method", "instantid", "--ip_image", str(PROJECT / FACE), "--prompt", "x", "--lcm"])
    settings, config = resolve_instant_id(args)
    with pytest.raises(WeightsError) as error:
        instant_id.check_files(settings, config)
    said = str(error.value)
    for part in ("SDXL", "IdentityNet", "face adapter", "LCM LoRA", "face models (for --method instantid)"):
        assert part in said
    assert said.endswith("--only sdxl-base-1.0 instantid lcm-lora-sdxl antelopev2")
    (tmp_path / "checkpoints" / "InstantID").mkdir(parents=True)
    (tmp_path / "checkpoints" / "InstantID" / "ip-adapter.bin").write_text("<html>")
    with pytest.raises(WeightsError, match="face adapter: .*a web page, not weights"):
        instant_id.check_files(settings, config)


def test_a_first_frame_is_checked_with_the_video_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--first_frame", "instantid", "--ip_image", str(PROJECT / FACE), "--prompt", "x"]
    args = infer.parse_args(["--config", "wan2.2-ti2v-5B", *flags])
    settings, config = resolve_image_to_video(args)
    with pytest.raises(WeightsError, match="--only wan2.2-ti2v-5B sdxl-base-1.0 instantid antelopev2$"):
        open_pictures(settings, config, start_processes("cpu"), tmp_path / "out.mp4")


def test_consis_id_names_all_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = infer.parse_args(["--method", "consisid", "--ip_image", str(PROJECT / FACE), "--prompt", "x"])
    settings, config = resolve_consis_id(args)
    with pytest.raises(WeightsError) as error:
        ConsisID(settings, config, start_processes("cpu")).check()
    said = str(error.value)
    for part in ("transformer", "text_encoder", "vae", "EVA-CLIP", "RetinaFace", "face models (for --method consisid)"):
        assert part in said
    assert said.endswith("run: python download_models.py --only consisid antelopev2")


def test_notices_of_absent_face_models_come_after_what_is_refused(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO, logger="selfsame")
    (tmp_path / "photo.png").write_text("no picture")
    flags = ["--config", "tiny", "--ip_image", "photo.png", "--prompt", "x", "--output", str(tmp_path / "out.mp4")]
    with pytest.raises(UserError, match="photo.png"):
        infer.main(infer.parse_args(flags))
    assert "antelopev2" not in caplog.text and "face-parsing" not in caplog.text
