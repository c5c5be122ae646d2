"""Records and configs edited by hand: whatever is in them, a run is refused in one line or goes on. Without torch."""

import copy
import json
import logging
import random
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

import infer
import infer_audio_avatar
import infer_face_swap
import infer_long_video
import infer_with_lora
import infer_with_vace
from configs import LONGEST, load_config
from errors import InputError, UsageError, UserError, WeightsError
from pipelines.audio_avatar.command import resolve_avatar
from pipelines.command import method_of
from pipelines.consis_id.command import resolve_consis_id
from pipelines.face_swap.command import resolve_face_swap
from pipelines.instant_id.command import resolve_instant_id
from pipelines.long_video.command import resolve_long_video
from pipelines.lora_command import resolve_lora_settings
from pipelines.settings import recorded
from pipelines.text_to_video.command import resolve_image_to_video
from pipelines.vace.command import resolve_vace_settings
from preprocess.picture_writer import write_picture
from preprocess.video_writer import write_video

PROJECT = Path(__file__).parent.parent
FACE = str(PROJECT / "assets/face.png")


def resolve_infer(args):
    methods = {"standin": resolve_image_to_video, "instantid": resolve_instant_id, "consisid": resolve_consis_id}
    return methods[method_of(args)](args)


# What makes the record that is edited: script, its checks before torch, flags.
SCRIPTS = {
    "infer.py": (infer, resolve_infer, []),
    "infer.py, a picture": (infer, resolve_infer, ["--image", FACE, "--prompt", "x"]),
    "infer.py, instantid": (infer, resolve_infer, ["--method", "instantid", "--ip_image", FACE, "--prompt", "x"]),
    "infer.py, consisid": (infer, resolve_infer, ["--method", "consisid", "--ip_image", FACE, "--prompt", "x"]),
    "infer_with_lora.py": (infer_with_lora, resolve_lora_settings, ["--lora_path", "a.safetensors"]),
    "infer_with_vace.py": (infer_with_vace, resolve_vace_settings, []),
    "infer_face_swap.py": (infer_face_swap, resolve_face_swap, []),
    "infer_audio_avatar.py": (infer_audio_avatar, resolve_avatar, []),
    "infer_long_video.py": (infer_long_video, resolve_long_video, []),
}
VALUES = [
    *(None, True, -1, 0, 2, 3.5, 1e300, float("nan"), float("inf"), 10**400, 2**63),
    *("", "no", "a\0b", "\ud800", "x" * 300, "/", "../../x", "tiny", "wan2.1-t2v-14B"),
    *([], [None], ["a", 1], [[]], [-1], [1e300], ["\ud800"], [""], [1, 2], [0, 0], {}, {"a": 1}, {"high": 1}),
]
SLOWEST = 5  # seconds, on a busy machine; these take milliseconds


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging.getLogger("selfsame"), "disabled", True)
    Path("a.safetensors").touch()
    return tmp_path


def run_checks(script: str, *flags: str) -> UserError | None:
    """The refusal, one line and soon; None where the run would begin. Anything else is raised."""
    module, resolve, _ = SCRIPTS[script]
    start = time.monotonic()
    error = None
    try:
        resolve(module.parse_args(list(map(str, flags))))
    except UserError as refusal:
        error = refusal
        assert "\n" not in str(error) and len(str(error)) < 1500, flags
    assert time.monotonic() - start < SLOWEST, flags
    return error


def record_of(script: str, path: Path) -> dict:
    module, resolve, flags = SCRIPTS[script]
    settings = resolve(module.parse_args(flags))[0]
    of_one_run = ("output", "overwrite", "preview")
    record = {"settings": {key: value for key, value in recorded(settings).items() if key not in of_one_run}}
    path.write_text(json.dumps(record))
    return record


@pytest.mark.parametrize("script", SCRIPTS)
def test_edited_records(here, script):
    """Each setting in turn is replaced by what no run writes; 25 a script are tried."""
    path = here / "run.json"
    record = record_of(script, path)
    assert run_checks(script, "--config", path) is None
    generator = random.Random(script)
    edits = [(name, value) for name in record["settings"] for value in VALUES]
    for name, value in generator.sample(edits, 25):
        edited = copy.deepcopy(record)
        edited["settings"][name] = value
        path.write_text(json.dumps(edited))
        error = run_checks(script, "--config", path)
        assert error is None or error.exit_code in (2, 3, 4)


@pytest.mark.parametrize(
    "text",
    [
        *("", "null", "[]", "3", '{"settings": null}', '{"settings": {}}', '{"settings": {"config": 5}}'),
        *('{"settings": {"config": "again.json"}}', '{"settings": {"config": "a\\u0000b"}}'),
        *("[" * 100_000, '{"a":' * 50_000, '{"settings": {"seed": ' + "9" * 5000 + "}}"),
    ],
    ids=lambda text: text[:40],
)
def test_other_json(here, text):
    (here / "run.json").write_text(text)
    for script in SCRIPTS:
        assert run_checks(script, "--config", here / "run.json").exit_code == 3


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("height", None, "height is null, expected int"),
        ("tiled", "no", "tiled is 'no', expected bool"),
        ("prompt", [], "prompt is an empty list"),
        ("seed", ["a"], "seed is a list of 1, expected list of int"),
        ("vae_path", 5, "vae_path is 5, expected str or null"),
        ("guidance_scal", 5, "unknown settings guidance_scal; did you mean guidance_scale?"),
    ],
)
def test_a_record_with_a_slip_says_which(here, name, value, words):
    record = record_of("infer.py", path := here / "run.json")
    record["settings"][name] = value
    path.write_text(json.dumps(record))
    error = run_checks("infer.py", "--config", path)
    assert isinstance(error, InputError)
    assert f"--config {path}: {words}" in str(error)


def test_a_record_of_another_script_says_whose_it_is(here):
    for script in ("infer_with_lora.py", *[name for name in SCRIPTS if name.startswith("infer_")]):
        record_of(script, path := here / "run.json")
        others = {"infer.py", "infer_with_lora.py", "infer_with_vace.py"} - {script}
        if script == "infer_with_lora.py":  # a control is one more plug-in beside all that it has
            others.remove("infer_with_vace.py")
        for other in others:
            error = run_checks(other, "--config", path)
            assert f"made by {script}; run: python {script} --config {path}" in str(error)


def test_the_record_inside_a_video_or_picture_is_taken_back(here):
    import numpy

    record = record_of("infer.py", here / "run.json")
    record["settings"]["seed"] = [77]
    write_video(here / "clip.mp4", [numpy.zeros((2, 32, 32, 3), numpy.uint8)], fps=8, metadata=record)
    (here / "clip.json").unlink()
    inside = ["--config", str(here / "clip.mp4"), "--ip_image", FACE]  # the record inside names no folders
    settings = resolve_image_to_video(infer.parse_args(inside))[0]
    assert (settings.seed, settings.config) == ((77,), "tiny")
    record = record_of("infer.py, instantid", here / "run.json")
    write_picture(here / "face.png", numpy.zeros((8, 8, 3), numpy.uint8), record)
    settings = resolve_infer(infer.parse_args([*inside[2:], "--config", str(here / "face.png"), "--seed", "3"]))[0]
    assert (settings.seed, settings.config) == ((3,), "instantid")
    for other in (FACE, PROJECT / "README.md"):
        assert run_checks("infer.py", "--config", other).exit_code in (2, 3)


# ------------------------------------------------------------------------------------------------------------- configs


def nodes(values: dict, above: tuple = ()):
    for key, value in values.items():
        yield (*above, key)
        if isinstance(value, dict):
            yield from nodes(value, (*above, key))


@pytest.mark.parametrize(
    ("name", "script", "flags"),
    [
        ("tiny", "infer.py", ["--ip_image", FACE]),
        ("tiny", "infer_with_vace.py", []),
        ("tiny-i2v", "infer_long_video.py", []),
        ("tiny-avatar", "infer_audio_avatar.py", []),
        ("stand-in-wan2.2", "infer.py", ["--ip_image", FACE, "--prompt", "x"]),
        ("consisid", "infer.py", ["--ip_image", FACE, "--prompt", "x"]),
    ],
)
def test_edited_configs(here, name, script, flags):
    """Keys taken out, values replaced, bytes changed: 30 a config are tried."""
    content = {key: value for key, value in load_config(name).items() if key not in ("name", "base")}
    path = here / "mine.yaml"
    path.write_text(yaml.safe_dump(content))
    assert run_checks(script, "--config", path, *flags) is None
    generator = random.Random(name + script)
    for place in generator.sample(list(nodes(content)), 14):
        for value in generator.sample(VALUES, 2):
            edited = copy.deepcopy(content)
            inner = edited
            for key in place[:-1]:
                inner = inner[key]
            if value is None:
                del inner[place[-1]]
            else:
                inner[place[-1]] = value
            path.write_bytes(yaml.safe_dump(edited).encode("utf-8", "surrogatepass"))
            run_checks(script, "--config", path, *flags)
    for _ in range(6):
        text = bytearray(yaml.safe_dump(content).encode())
        for _ in range(3):
            text[generator.randrange(len(text))] = generator.choice(b":-[]{}*&!#'\"\n\t 09xe.%@|>")
        path.write_bytes(text)
        run_checks(script, "--config", path, *flags)


BOMB = "".join(f"k{i}: &k{i} [{', '.join([f'*k{i - 1}' if i else 'x'] * 9)}]\n" for i in range(12))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BOMB, "aliases are not accepted"),
        ("description: &a [*a]", "aliases are not accepted"),
        ("description: " + "[" * 30_000, "nested too deeply"),
        ("- " * 3000, "nested too deeply"),
        ("x" * (LONGEST + 1), "longer than 64 KiB"),
        ("a: 2024-13-45", "not valid YAML"),
        ("!!float y", "not valid YAML"),
        ("1: 2", "unknown key 1"),
        ("transfromer: {}", "unknown key transfromer; did you mean transformer?"),
        ("base: tiny\ndefaults: {fps: null}", "fps is null, expected int"),
        ("base: tiny\ndefaults: {guidance_scale: {high: 1}}", "guidance_scale has the keys high; needed"),
        ("base: tiny\nexperts: {high: a, low: b}", "experts without a boundary"),
        ("base: tiny\ntiny: true", "without seed"),
        ("base: tiny\nseed: 0\ntransformer: {dim: 64}", "transformer: in_dim, ffn_dim, num_heads, num_layers missing"),
        ("base: tiny\nseed: 0\ntransformer: {in_dim: 16, dim: 64, ffn_dim: 8, num_heads: 7, num_layers: 1}", "7 heads"),
        ("base: tiny\nseed: 0\ntext_encoder: {d_modle: 5}", "text_encoder: unknown key d_modle; did you mean d_model?"),
        ("base: tiny\nseed: 0\nvae: {base_dim: 4, z_dim: 48}", "z_dim is 48, but transformer: out_dim is 16"),
        ("base: tiny\nseed: 0\nvae: {base_dim: x, z_dim: 16}", "vae: base_dim is 'x', expected int"),
        ("base: tiny\nseed: 0\nvae: {base_dim: 4, z_dmi: 16}", "vae: unknown key z_dmi; did you mean z_dim?"),
        ("base: wan2.1-t2v-14B\nvariant: t2v-14b", "variant is 't2v-14b'; did you mean t2v-14B?"),
        ("base: tiny\nmethod: magic", "method is 'magic', known are standin, instantid, consisid"),
    ],
    ids=lambda text: text[:50],
)
def test_a_config_with_a_slip_says_which(here, text, words):
    (here / "mine.yaml").write_text(text)
    error = run_checks("infer.py", "--config", here / "mine.yaml", "--ip_image", FACE, "--prompt", "x")
    assert isinstance(error, UsageError)
    assert words in str(error)


@pytest.mark.parametrize("name", ["../../x", "/etc/x", "a/../../x", "C:/x", "..\\x", "//host/x", ""])
def test_downloads_stay_in_their_folder(here, name):
    released = {"description": "x", "repo": "a/b", "dest": "x", "files": {"part": "x"}, "approx_gib": 1}
    for edited in (released | {"dest": name}, released | {"files": {"part": ["y", name]}}):
        (here / "mine.yaml").write_text(yaml.safe_dump(edited))
        with pytest.raises(UsageError, match="leads out of the folder"):
            load_config(here / "mine.yaml")


def test_a_repository_cannot_name_files_elsewhere(here, monkeypatch):
    import huggingface_hub

    from models.downloads import list_files

    (here / "mine.yaml").write_text("{description: x, repo: a/b, dest: x, files: {part: '*/x'}, approx_gib: 1}")
    info = SimpleNamespace(sha="0", siblings=[SimpleNamespace(rfilename="../x", size=1, lfs=None, blob_id="0")])
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *args, **options: info)
    with pytest.raises(WeightsError, match="leads out of"):
        list_files(load_config(here / "mine.yaml"), here)


@pytest.mark.parametrize(
    ("script", "flags", "words"),
    [
        ("infer.py", ["--config", "wan2.1-t2v-14b"], "wan2.1-t2v-14b: no such config; did you mean wan2.1-t2v-14B?"),
        ("infer.py", ["--tokenizer_path", "/nope"], "--tokenizer_path /nope: tiny is made from a seed"),
        ("infer_audio_avatar.py", ["--pretrained_wav2vec_path", "/nope"], "tiny-avatar is made from a seed"),
        ("infer.py", ["--timesteps", "100", "900"], "--timesteps 100 900: they have to fall"),
        ("infer.py", ["--solver", "unipcc"], "euler, euler-flow, unipc, dpm++; did you mean unipc?"),
        ("infer.py", ["--config", "x" * 300], "no such config"),
        ("infer.py", ["--ip_image", "x" * 300], "no such file"),
        ("infer.py", ["--face_index", "-1"], "--face_index -1: accepted are 0 to 10000"),
    ],
    ids=lambda value: " ".join(value)[:50] if isinstance(value, list) else None,
)  # fmt: skip
def test_flags_that_would_do_nothing_or_something_else(here, script, flags, words):
    error = run_checks(script, *flags)
    assert error is not None and words in str(error)


@pytest.mark.parametrize("script", ["infer.py", "infer_audio_avatar.py", "infer_long_video.py"])
def test_an_empty_prompt_does_not_pass_in_silence(tmp_path, monkeypatch, caplog, script):
    monkeypatch.chdir(tmp_path)
    assert run_checks(script, "--prompt", " ") is None
    record = record_of(script, tmp_path / "run.json")
    record["settings"]["prompt"] = [""]
    (tmp_path / "run.json").write_text(json.dumps(record))
    assert run_checks(script, "--config", tmp_path / "run.json") is None
    assert caplog.text.count("a --prompt is empty") == 2
