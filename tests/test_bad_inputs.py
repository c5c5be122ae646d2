"""What every script has to survive alike: outputs, numbers, prompt files and photos that cannot be used.

Rows that concern one script alone are in that script's own tests.
"""

import os
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy
import pytest

import infer
import infer_audio_avatar
import infer_face_swap
import infer_long_video
import infer_with_lora
import infer_with_vace
from errors import EXIT_INTERRUPTED, UsageError, UserError
from pipelines.audio_avatar.command import resolve_avatar
from pipelines.long_video.command import resolve_long_video
from pipelines.text_to_video.command import resolve_image_to_video
from pipelines.weights import find_gguf
from preprocess.video_writer import VideoWriter

PROJECT = Path(__file__).parent.parent
FACE = str(PROJECT / "assets/face.png")

# Script, what chooses the job, the flag of its photo, and the kind of its output.
SCRIPTS = {
    "text": (infer, [], "--ip_image", ".mp4"),
    "picture": (infer, ["--image", FACE, "--prompt", "x"], "--image", ".mp4"),
    "instantid": (infer, ["--method", "instantid", "--ip_image", FACE, "--prompt", "x"], "--ip_image", ".png"),
    "consisid": (infer, ["--method", "consisid", "--ip_image", FACE, "--prompt", "x"], "--ip_image", ".mp4"),
    "lora": (infer_with_lora, ["--lora_path", "a.safetensors"], "--ip_image", ".mp4"),
    "vace": (infer_with_vace, [], "--reference_image", ".mp4"),
    "swap": (infer_face_swap, [], "--ip_image", ".mp4"),
    "avatar": (infer_audio_avatar, [], "--reference_image", ".mp4"),
    "long": (infer_long_video, [], "--ref_image_path", ".mp4"),
}
RUNS_WITHOUT_WEIGHTS = ["text", "picture", "vace", "swap", "avatar", "long"]


def refusal(script: str, *flags) -> UserError:
    module, job, _, _ = SCRIPTS[script]
    with pytest.raises(UserError) as error:
        module.main(module.parse_args([*job, *map(str, flags)]))
    assert "\n" not in str(error.value)
    return error.value


@pytest.mark.parametrize("script", SCRIPTS)
def test_outputs_that_cannot_be_written(tmp_path, monkeypatch, script):
    """Each is refused before anything loads, and what is there stays as it is."""
    monkeypatch.chdir(tmp_path)
    end = SCRIPTS[script][3]
    Path("a.safetensors").touch()  # of the script with LoRAs, which looks for it first
    Path("folder" + end).mkdir()
    Path("file.txt").write_text("precious")
    Path("made" + end).write_text("precious")
    Path("link" + end).symlink_to("made" + end)
    for output, words in {
        "out.avi": "out.avi",
        "folder" + end: "folder",
        "CON" + end: "CON",
        "x" * 300 + end: "too long",
        "file.txt/out" + end: "file.txt",
        "made" + end: "--overwrite",
        "link" + end: "is a link",
        "": "--output ''",
        "folder/..": "folder",
    }.items():
        error = refusal(script, "--output", output)
        assert error.exit_code == 2, (output, str(error))
        assert words in str(error), (output, str(error))
    assert Path("made" + end).read_text() == Path("file.txt").read_text() == "precious"
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".")]


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--num_inference_steps", "0"),
        ("--num_inference_steps", "-1"),
        ("--seed", "-1"),
        ("--height", "0"),
        ("--width", "1000000"),
        ("--num_frames", "1000001"),
        ("--fps", "nan"),
        ("--guidance_scale", "nan"),
    ],
)
def test_numbers_out_of_bounds(tmp_path, monkeypatch, script, flag, value):
    monkeypatch.chdir(tmp_path)
    if script == "avatar" and flag == "--guidance_scale":
        flag = "--sample_text_guide_scale"
    error = refusal(script, "--output", "out" + SCRIPTS[script][3], flag, value)
    assert error.exit_code == 2, str(error)
    assert flag in str(error)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", SCRIPTS)
def test_prompt_files_that_cannot_be_read(tmp_path, monkeypatch, script):
    monkeypatch.chdir(tmp_path)
    Path("latin1.txt").write_bytes("Frau läuft".encode("latin-1"))
    Path("empty.txt").touch()
    for file in ("missing.txt", "latin1.txt", "empty.txt"):
        error = refusal(script, "--output", "out" + SCRIPTS[script][3], "--prompt", f"@{file}")
        assert error.exit_code == 3, (file, str(error))
        assert file in str(error)


OF_INPUTS = ("prompt_path", "ref_image_path", "audio_path", "pose_path")  # name no weights


@pytest.mark.parametrize("script", SCRIPTS)
def test_gguf_weights_are_refused_by_each_flag(tmp_path, monkeypatch, script):
    monkeypatch.chdir(tmp_path)
    for file in ("umt5.gguf", "renamed.safetensors", "folder/Q4.gguf", "nested/HighNoise/Q8.gguf"):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).write_bytes(b"GGUF" + b"\0" * 60)
    (tmp_path / "nested" / "VAE").mkdir()
    (tmp_path / "nested" / "VAE" / "Wan2.1_VAE.safetensors").touch()
    names = [name for name in vars(SCRIPTS[script][0].parse_args([])) if "_path" in name and name not in OF_INPUTS]
    assert {"base_path", "vae_path", "text_encoder_path"} <= set(names)
    what = ["--prompt", "x", *(["--ip_image", FACE] if script in ("text", "lora", "vace", "swap") else [])]
    cases = [(name, "umt5.gguf") for name in names] + [
        ("base_path", path) for path in ("renamed.safetensors", "folder", "nested") if script != "instantid"
    ]
    refused = set()
    for name, path in cases:
        error = refusal(script, *what, "--output", "out" + SCRIPTS[script][3], f"--{name}", path)
        if "has no such setting" in str(error):  # of another --method
            continue
        assert error.exit_code == 4, str(error)
        assert f"--{name} {path}: GGUF weights" in str(error)
        refused.add(name)
    assert len(refused) >= 4


def test_gguf_weights_are_refused_before_torch_is_there(tmp_path):
    (tmp_path / "umt5.gguf").write_bytes(b"GGUF" + b"\0" * 60)
    code = (
        "import sys; sys.modules['torch'] = None\nimport infer; from errors import run_script\n"
        "run_script(infer.main, infer.parse_args)"
    )
    flags = ["--config", "wan2.1-t2v-1.3B", "--prompt", "x", "--text_encoder_path", str(tmp_path / "umt5.gguf")]
    run = subprocess.run([sys.executable, "-c", code, *flags], cwd=PROJECT, capture_output=True, text=True)
    assert run.returncode == 4, run.stderr
    assert run.stderr.count("\n") == 1, run.stderr
    assert run.stderr.startswith("error: --text_encoder_path") and "GGUF" in run.stderr


def test_gguf_beside_what_can_be_read_is_no_reason_to_refuse(tmp_path):
    (tmp_path / "Q4.gguf").write_bytes(b"GGUF")
    assert find_gguf(tmp_path) == "Q4.gguf"
    (tmp_path / "diffusion_pytorch_model.safetensors").touch()
    assert find_gguf(tmp_path) is find_gguf(tmp_path / "nowhere") is None


class Answers(BaseHTTPRequestHandler):
    """An address of a picture that answers with a page."""

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"<html>not here any more</html>")

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def page():
    server = HTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/me.jpg"
    server.shutdown()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.parametrize("script", RUNS_WITHOUT_WEIGHTS)
def test_photos_that_cannot_be_read(tmp_path, monkeypatch, script, page):
    monkeypatch.chdir(tmp_path)
    flag = SCRIPTS[script][2]
    whole = Path(FACE).read_bytes()
    Path("cut.png").write_bytes(whole[: len(whole) // 2])
    Path("empty.jpg").touch()
    Path("page.jpg").write_text("<html>404</html>")
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    Path("bomb.png").write_bytes(whole[:8] + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    for photo in ("cut.png", "empty.jpg", "page.jpg", "bomb.png", "missing.png", page):
        error = refusal(script, "--output", "out.mp4", flag, photo)
        assert error.exit_code == 3, (photo, str(error))
        assert photo in str(error)
        assert flag in str(error)
    assert not list(tmp_path.glob("*.mp4"))


@pytest.mark.parametrize("script", RUNS_WITHOUT_WEIGHTS)
def test_second_run_with_the_same_output(tmp_path, monkeypatch, script):
    monkeypatch.chdir(tmp_path)
    with VideoWriter(tmp_path / "out.mp4", fps=16) as first:
        error = refusal(script, "--output", "out.mp4", *(["--allow_no_face"] if script == "text" else []))
        first.write(numpy.zeros((1, 32, 32, 3), numpy.uint8))
    assert error.exit_code == 2
    assert "another run is writing" in str(error)


@pytest.mark.skipif(os.name == "nt", reason="signals")
@pytest.mark.parametrize(
    ("script", "state"),
    [("infer_audio_avatar", ".out.state/latents.safetensors"), ("infer_long_video", ".out.clips")],
)
def test_ctrl_c_ends_with_130_and_keeps_what_is_finished(tmp_path, script, state):
    flags = ["--num_inference_steps", "200", "--output", "out.mp4"]
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    command = [sys.executable, str(PROJECT / f"{script}.py"), *flags]
    run = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 90
    while not (tmp_path / state).exists() and time.monotonic() < deadline and run.poll() is None:
        time.sleep(0.02)
    time.sleep(1)
    run.send_signal(signal.SIGINT)
    _, messages = run.communicate(timeout=30)
    assert run.returncode == EXIT_INTERRUPTED, messages
    assert "Traceback" not in messages
    assert (tmp_path / state).exists()
    assert not (tmp_path / "out.mp4").exists()
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_is_no_number(script):
    with pytest.raises(UsageError, match=r"^--num_inference_steps: invalid int value: '0\.85,'; see python .* --help$"):
        SCRIPTS[script][0].parse_args(["--num_inference_steps", "0.85,"])


@pytest.mark.parametrize(
    ("module", "resolve", "flags"),
    [
        (infer, resolve_image_to_video, ["--image", FACE, "--prompt", "x", "--num_frames", "80"]),
        (infer_audio_avatar, resolve_avatar, ["--clip_sample_n_frames", "80"]),
        (infer_long_video, resolve_long_video, ["--num_frames", "80"]),
    ],
)
def test_sizes_between_what_models_make_are_rounded_aloud(caplog, module, resolve, flags):
    settings = resolve(module.parse_args([*flags, "--height", "333", "--width", "250"]))[0]
    assert (settings.height, settings.width, settings.num_frames) == (336, 256, 81)
    for message in ("--height 333 becomes 336", "--width 250 becomes 256", "--num_frames 80 becomes 81"):
        assert message in caplog.text
