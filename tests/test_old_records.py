"""The records in tests/records were written by the code before the refactor (`tests.frame_hashes`): --config takes each
of them back, and what comes of it are the settings that it holds.
"""

import json
from pathlib import Path

import pytest

import infer
import infer_audio_avatar
import infer_face_swap
import infer_long_video
import infer_with_lora
import infer_with_vace
from pipelines.audio_avatar.command import resolve_avatar
from pipelines.consis_id.command import resolve_consis_id
from pipelines.face_swap.command import resolve_face_swap
from pipelines.flags import FILE, MEDIA, NOTHING, ONE_RUN, described, names_of
from pipelines.instant_id.command import resolve_instant_id
from pipelines.long_video.command import resolve_long_video
from pipelines.long_video.settings import LongVideoSettings
from pipelines.lora_command import resolve_lora_settings
from pipelines.settings import recorded
from pipelines.text_to_video.command import resolve_image_to_video
from pipelines.vace.command import resolve_vace_settings
from pipelines.whose import settings_classes, settings_that
from tests.frame_hash_cases import CASES, RECORDED, write_inputs

PROJECT = Path(__file__).parent.parent
RECORDS = PROJECT / "tests" / "records"
# How a case's name begins -> its script's flags, and what makes settings of them without a model.
SCRIPTS = {
    "infer": (infer, resolve_image_to_video),
    "instantid": (infer, resolve_instant_id),
    "consisid": (infer, resolve_consis_id),
    "lora": (infer_with_lora, resolve_lora_settings),
    "swap": (infer_face_swap, resolve_face_swap),
    "vace": (infer_with_vace, resolve_vace_settings),
    "avatar": (infer_audio_avatar, resolve_avatar),
    "long": (infer_long_video, resolve_long_video),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the paths in the records lead to something."""
    folder = tmp_path_factory.mktemp("old")
    write_inputs(folder / "inputs", PROJECT / "assets")
    (folder / "assets").symlink_to(PROJECT / "assets")
    return folder


def test_two_records_of_every_script_are_kept():
    assert {file.stem for file in RECORDS.glob("*.json")} - {"frame_hashes"} == RECORDED <= {case[0] for case in CASES}
    assert {name.split("-")[0] for name in RECORDED} == SCRIPTS.keys()
    assert all('"/' not in file.read_text(encoding="utf-8") for file in RECORDS.glob("*.json")), "an absolute path"


@pytest.mark.parametrize("name", sorted(RECORDED))
def test_old_record_is_accepted(folder, monkeypatch, name):
    monkeypatch.chdir(folder)
    file = RECORDS / f"{name}.json"
    script, resolve = SCRIPTS[name.split("-")[0]]
    settings, *_ = resolve(script.parse_args(["--config", str(file)]))
    earlier = json.loads(file.read_text(encoding="utf-8"))["settings"]
    resolved = json.loads(json.dumps(recorded(settings)))
    assert {key: resolved.get(key) for key in earlier} == earlier


MEDIA_BEFORE = {
    *("ip_image", "image", "last_image", "input_video", "reference_video", "reference_mask", "reference_image"),
    *("ref_image_path", "end_image", "extend", "audio", "audio_path", "pose_path", "pose_image", "control_image"),
}


def test_fields_say_what_the_lists_of_names_said_before():
    """What counts of a record, and how, has not changed: finished files and saved progress are found again."""
    assert settings_that(lambda said: said.decides == ONE_RUN) == {"output", "overwrite", "preview"}
    of_the_machine = {"device", "memory", "no_drift_report", "teacache_offload"}
    assert settings_that(lambda said: said.decides == NOTHING) == of_the_machine
    after = {"quality", "color_correction", "no_composite", "min_face_score", "max_retries", "tiled", "vae_dtype"}
    assert settings_that(lambda said: said.decides == FILE) == after
    assert settings_that(lambda said: said.left_open) == {"fp8", "tiled"}
    later = {"prompt", "prompt_prefix", "prompt_repeat", "prompt_repeat_times", "use_first_prompt_only"}
    assert set(names_of(LongVideoSettings, later_clips=True)) == later | {"video_frames", "num_clips"}
    assert settings_that(lambda said: said.path == MEDIA) == MEDIA_BEFORE
    names = settings_that(lambda said: True)
    places = {name for name in names if name.endswith("_path") or name.startswith("lora_path")}
    places |= MEDIA_BEFORE | {"config", "variant", "lora_config", "controlnet"}
    assert settings_that(lambda said: said.path) == places - {"prompt_path"}  # which is no setting


def test_a_name_means_the_same_in_every_script():
    meaning = {}
    for kind in settings_classes():
        for name, (_, said) in described(kind).items():
            says = (bool(said.path), said.path == MEDIA, said.decides, said.left_open)  # what a record asks
            assert meaning.setdefault(name, says) == says, name
