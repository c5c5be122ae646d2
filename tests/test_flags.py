"""Mistakes on a command line are one line each, with the flag that was meant."""

import argparse
import dataclasses
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

import download_models
import infer
import infer_audio_avatar
import infer_long_video
import infer_with_lora
from errors import UsageError
from pipelines.flags import Parser, add_flags, again, check_bounds, described, given_by, setting
from pipelines.whose import settings_classes
from tests.test_makers import SCRIPTS

PROJECT = Path(__file__).parent.parent


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--promt", "x"], r"^--promt: no such flag; did you mean --prompt\?$"),
        (["--num_frame=9"], r"^--num_frame: no such flag; did you mean --num_frames\?$"),  # no beginning stands for one
        (["--Seed", "1"], r"^--Seed: no such flag; did you mean --seed\?$"),
        (["--qqqqq"], r"^--qqqqq: no such flag; see python .* --help$"),
        (["a woman"], r"^'a woman' belongs to no flag; see python .* --help$"),
        (["--height"], r"^--height: expected one argument; see python .* --help$"),
        (["--fps", "fast"], r"^--fps: invalid float value: 'fast'; see python .* --help$"),
    ],
)
def test_a_mistake_is_one_line(script, flags, words):
    with pytest.raises(UsageError, match=words) as error:
        script.parse_args(flags)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("script", "flag", "words"),
    [
        (infer, "--num_clips", r"^--num_clips: no such flag here \(infer_long_video\.py has it\)"),
        (infer, "--lora_path", r"^--lora_path: no such flag here \(infer_with_lora\.py has it\)"),  # several have it
        (infer, "--vace_scale=2", r"^--vace_scale: no such flag here \(infer_with_vace\.py has it\)"),
        (infer, "--sample_steps", r"^--sample_steps: no such flag here \(infer_audio_avatar\.py has it\)"),
        (infer_audio_avatar, "--lora_path_high", r" \(infer_with_lora\.py has it\); did you mean --lora_path\?$"),
        (infer_with_lora, "--method", r"^--method: no such flag here \(infer\.py has it\)"),
        (infer_with_lora, "--face_encoder_path", r" \(infer\.py has it\); did you mean --image_encoder_path\?$"),
        (infer_long_video, "--identity_strength", r"^--identity_strength: no such flag here \(infer\.py has it\)$"),
        (infer_long_video, "--denoising_strength", r" \(infer_face_swap\.py has it\)"),
    ],
)
def test_a_flag_of_another_script_names_that_script(script, flag, words):
    with pytest.raises(UsageError, match=words):
        script.parse_args([flag, "1"])


def test_as_a_user_sees_it():
    run = subprocess.run(
        [sys.executable, "infer.py", "--promt", "x"], cwd=PROJECT, capture_output=True, text=True, timeout=60
    )
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr == "error: --promt: no such flag; did you mean --prompt?\n"


def test_help_still_lists_every_flag(capsys):
    for script in SCRIPTS:
        with pytest.raises(SystemExit) as stop:
            script.parse_args(["--help"])
        shown = capsys.readouterr().out
        assert stop.value.code == 0 and "--num_inference_steps" in shown and shown.startswith("usage: ")


# ------------------------------------------------------------------------------------------- flags of settings classes


@dataclass(frozen=True, kw_only=True)
class BaseSettings:
    title: ClassVar[str] = "of the base"

    seed: int = 0  # says nothing of itself: no flag
    strength: float = setting("of the base", 0.5, low=0, high=1)


@dataclass(frozen=True, kw_only=True)
class MadeUpSettings(BaseSettings):
    title: ClassVar[str] = "of a test"

    words: tuple[str, ...] = setting("several, at 100% of the width", (), metavar="WORD", names=("--texts",))
    scale: tuple[float, ...] = setting("one, or each", (1.0,), low=-2, high=2)
    center: tuple[float, float] | None = setting("of a circle", None, metavar=("X", "Y"), shown="the middle")
    count: int | None = setting("how many", None, low=1, high=9)
    mode: str = setting("which way", "up", choices=("up", "down"))
    dry: bool = setting("nothing is made", False)
    held: bool = setting("where it is", False, takes_truth=True)
    share: float = setting("of a whole", 0.5, low=0, high=1, above=True, is_flag=False)
    found: int | None = setting("by the task", None, low=0, high=9, is_flag=False)


@pytest.fixture
def parser() -> Parser:
    parser = Parser("made up")
    add_flags(parser, MadeUpSettings)
    return parser


WORDS = "--words a --texts b c --scale 1 --scale 0.5 --center 0.1 2 --count 3 --mode down --dry --held False"
VALUES = {
    "words": ["a", "b", "c"],
    "scale": [1.0, 0.5],
    "center": [0.1, 2.0],
    "count": 3,
    "mode": "down",
    "dry": True,
    "held": False,
}


def test_every_field_that_says_something_is_a_flag(parser):
    assert vars(parser.parse_args([])) == dict.fromkeys(("strength", *VALUES))
    assert vars(parser.parse_args(WORDS.split())) == {"strength": None, **VALUES}
    assert parser.parse_args(["--held"]).held is True
    for flags, words in (
        (["--center", "1"], "^--center: expected 2 arguments"),
        (["--count", "x"], "^--count: invalid"),
        (["--texts"], "^--words: expected at least one"),  # under the name that it has here
        (["--held", "maybe"], "^--held: 'maybe': accepted are True and False"),
        (["--seed", "1"], "^--seed: no such flag"),
        (["--found", "1"], "^--found: no such flag"),
    ):
        with pytest.raises(UsageError, match=words):
            parser.parse_args(flags)


def test_flags_of_a_base_may_be_left_out():
    parser = Parser("made up")
    add_flags(parser, MadeUpSettings, without=(BaseSettings,))
    assert vars(parser.parse_args([])).keys() == VALUES.keys()


def test_a_field_may_be_said_again():
    @dataclass(frozen=True, kw_only=True)
    class Other(MadeUpSettings):
        title: ClassVar[str] = "of another"

        count: int = again(MadeUpSettings, "count", default=2, names=("--number",))

    parser = Parser("made up")
    add_flags(parser, Other)
    assert parser.parse_args(["--number", "5"]).count == 5 and Other().count == 2
    assert "--count, --number N how many (2)" in " ".join(parser.format_help().split())
    with pytest.raises(UsageError, match="--count 10: accepted are 1 to 9"):
        check_bounds(Other(count=10))


def test_what_was_typed_is_a_value_that_nobody_writes_to(parser):
    given = given_by(parser.parse_args(["--count", "3"]))
    assert dict(given) == {"count": 3}
    with pytest.raises(TypeError):
        given["count"] = 4


def test_the_help_has_every_default_and_choice(parser):
    shown = " ".join(parser.format_help().split())
    for words in (
        "of a test:",
        "--words, --texts WORD [WORD ...] several, at 100% of the width (none)",
        "--scale X [X ...] one, or each (1)",
        "--center X Y of a circle (the middle)",
        "--count N how many (none)",
        "--mode {up,down} which way (up)",
        "--dry nothing is made (off)",
        "--held [{True,False}] where it is (off)",
        "of the base: --strength X of the base (0.5)",
    ):
        assert words in shown, words
    assert "--seed" not in shown and "--found" not in shown


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"count": 10}, r"^--count 10: accepted are 1 to 9$"),
        ({"count": 0}, r"^--count 0: accepted are 1 to 9$"),
        ({"scale": (1.0, float("nan"))}, r"^--scale nan: accepted are -2 to 2$"),
        ({"share": 0}, r"^--share 0: accepted are numbers above 0, to 1$"),
        ({"found": 10}, r"^--found 10: accepted are 0 to 9$"),
        ({"strength": 1.5}, r"^--strength 1\.5: accepted are 0 to 1$"),  # the base's too
        ({"mode": "upp"}, r"^--mode upp: accepted are up, down; did you mean up\?$"),
    ],
)
def test_bounds_and_choices_are_checked(values, words):
    check_bounds(MadeUpSettings())
    check_bounds(MadeUpSettings(count=9, scale=(-2, 2), strength=1, mode="down"))
    with pytest.raises(UsageError, match=words):
        check_bounds(MadeUpSettings(**values))


# ------------------------------------------------------------------------------------------------- what scripts show


def parser_of(script, monkeypatch) -> Parser:
    """The parser that a script makes."""
    made = []
    parse_args = Parser.parse_args
    monkeypatch.setattr(Parser, "parse_args", lambda self, *words: made.append(self) or parse_args(self, *words))
    script.parse_args([])
    return made[0]


@pytest.mark.parametrize("script", [*SCRIPTS, download_models], ids=lambda script: script.__name__)
def test_every_flag_of_a_script_says_where_its_default_comes_from(script, monkeypatch):
    """And shows its choices as choices."""
    parser = parser_of(script, monkeypatch)
    actions = [action for action in parser._actions if action.dest != "help" and action.help != argparse.SUPPRESS]
    assert len(actions) > (40 if script in SCRIPTS else 5)
    for action in actions:
        assert re.search(r" \(.+\)$", action.help), action.dest
        assert action.default is None, action.dest
    shown = {action.dest: action.metavar for action in actions}
    if script in SCRIPTS:
        assert shown["solver"] == "{euler,euler-flow,unipc,dpm++}" and shown["memory"].startswith("{auto,resident,")


def test_a_group_of_the_help_has_what_its_class_declares_first(monkeypatch):
    """A field that a task says again stays where it was."""
    parser = parser_of(infer_audio_avatar, monkeypatch)
    groups = {group.title: [action.dest for action in group._group_actions] for group in parser._action_groups}
    assert groups["talking avatar"][:2] == ["reference_image", "audio"] and "num_frames" in groups["what to make"]
    assert groups["how to sample"][:3] == ["seed", "num_inference_steps", "shift"]


def test_every_number_of_every_script_has_bounds():
    checked = set()
    for kind in settings_classes():
        for name, (field, what) in described(kind).items():
            if re.search(r"\b(int|float)\b", str(field.type)):
                assert what.low is not None and what.high is not None, f"{kind.__name__}.{name}"
                checked.add(name)
    assert {"height", "guidance_scale", "overlap_window_length", "num_motion_frames", "target_face_index"} <= checked


def test_every_field_of_every_script_says_something_of_itself():
    for kind in settings_classes():
        assert described(kind).keys() == {field.name for field in dataclasses.fields(kind)}, kind
