"""What python -m pipelines.doctor says of a machine and of a folder of weights."""

import json
import shutil

import pytest
import torch

from configs import load_config
from pipelines import doctor
from tests.test_infer import write_release
from tests.tiny import CONFIG

GIB = 2**30


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    folder = tmp_path_factory.mktemp("somebody") / "t2v"
    write_release(folder, CONFIG)
    return folder


@pytest.fixture
def root(release, tmp_path, monkeypatch):
    """Of two models that are known, the first is downloaded; and the machine is small."""
    monkeypatch.setattr(doctor, "known_configs", lambda: ["wan2.1-t2v-14B", "wan2.1-t2v-1.3B", "antelopev2", "tiny"])
    monkeypatch.setattr(doctor, "free_bytes", lambda device: (24 * GIB, 64 * GIB))
    shutil.copytree(release, tmp_path / "Wan2.1" / "t2v")
    return tmp_path


def reported(root, capsys, *flags) -> dict:
    report = doctor.main(doctor.parse_args(["--dest", str(root), "--device", "cpu", *flags]))
    printed = capsys.readouterr().out
    assert str(root) not in printed and "somebody" not in printed  # it will be pasted for others to read
    return report | {"printed": printed}


def states(report: dict) -> dict[str, str]:
    return {model["name"]: model["state"] for model in report["models"]}


def test_machine_and_models(root, capsys):
    report = reported(root, capsys)
    assert states(report) == {"wan2.1-t2v-14B": "whole", "wan2.1-t2v-1.3B": "-", "antelopev2": "-"}
    assert report["software"]["torch"] == torch.__version__
    assert report["attention_backends"][0] == "native" and "flash" not in report["attention_backends"]
    assert report["ffmpeg"]["encoders"] == {"libx264": True, "aac": True}
    assert report["onnxruntime"]["providers"]
    for words in ("versions", f"torch {torch.__version__}", "libx264 yes", "CPUExecutionProvider", "wan2.1-t2v-14B"):
        assert words in report["printed"]
    assert max(map(len, report["printed"].splitlines())) < 320


def test_json_is_the_same(root, capsys):
    report = reported(root, capsys, "--json")
    assert json.loads(report.pop("printed")) == report


def test_what_is_missing_or_damaged_is_named(root, capsys):
    folder = root / "Wan2.1" / "t2v"
    (folder / "Wan2.1_VAE.pth").rename(folder / "Wan2.1_VAE.pth.part")  # a download that was stopped
    report = reported(root, capsys)
    assert states(report)["wan2.1-t2v-14B"] == "partly"
    assert "    Wan2.1_VAE.pth: missing" in report["printed"]

    (folder / "Wan2.1_VAE.pth.part").rename(folder / "Wan2.1_VAE.pth")
    transformer = folder / "diffusion_pytorch_model.safetensors"
    with open(transformer, "r+b") as file:
        file.truncate(transformer.stat().st_size - 1)
    tokenizer = folder / "google" / "umt5-xxl" / "tokenizer.json"
    tokenizer.write_text("version https://git-lfs.github.com/spec/v1\n")
    report = reported(root, capsys)
    assert states(report)["wan2.1-t2v-14B"] == "damaged"
    assert "    diffusion_pytorch_model.safetensors: truncated, expected" in report["printed"]
    assert "    google/umt5-xxl/tokenizer.json: a git-lfs pointer" in report["printed"]


def test_memory_mode_is_what_auto_would_choose(root, monkeypatch):
    cuda = torch.device("cuda")

    def mode(name: str, device: int) -> str:
        monkeypatch.setattr(doctor, "free_bytes", lambda device_: (device * GIB, 64 * GIB))
        return doctor.describe_model(load_config(name), root, cuda)["memory"]

    assert mode("wan2.1-t2v-1.3B", 80).startswith("resident")
    assert mode("wan2.1-t2v-14B", 12).startswith(("group", "sequential"))
    assert "does not fit" in mode("wan2.1-t2v-14B", 1)
    assert doctor.describe_model(load_config("antelopev2"), root, cuda)["memory"] is None


def test_diffusers_models_have_a_mode_by_the_estimates_of_their_pipelines(root, monkeypatch):
    """ConsisID's as README has them: 26 GiB resident, 15 part by part; InstantID's from the sizes of its files."""
    cuda = torch.device("cuda")

    def modes(name: str, *cards: int) -> list[str]:
        found = []
        for card in cards:
            monkeypatch.setattr(doctor, "free_bytes", lambda device, card=card: (card * GIB, 64 * GIB))
            found.append(doctor.describe_model(load_config(name), root, cuda)["memory"])
        return found

    for name in ("consisid", "consisid-1.5"):
        assert modes(name, 40, 24, 8) == ["resident", "model", "group, tiles (with --tiled)"]
    assert modes("instantid", 24, 13, 6, 1) == ["resident", "model", "group", "sequential (does not fit)"]
    assert doctor.describe_model(load_config("antelopev2"), root, cuda)["memory"] is None


def test_estimates_of_releases_are_those_of_loaded_ones():
    """SDXL's parts counted on networks of its shape, ConsisID's on the whole transformer."""
    needs = doctor.needs_of(load_config("consisid"), torch.device("cuda"))
    assert needs.weights["resident"] == pytest.approx(2 * 6.01e9, rel=0.01)  # 6.16 billion with the face's extractor
    needs = doctor.needs_of(load_config("instantid"), torch.device("cuda"))
    assert needs.weights["resident"] == pytest.approx(9.58 * GIB, rel=0.02)  # README: 6.5, 2.4 and 0.8 GiB


def test_a_defect_of_cudnn_is_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: _Gpu())
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for version, is_wrong in ((90801, True), (91002, True), (91300, False)):
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda version=version: version)
        found = doctor.describe_device(torch.device("cuda"))
        assert ("defect" in found) == is_wrong and found["capability"] == "9.0"


class _Gpu:
    name, major, minor = "NVIDIA H100", 9, 0
