"""Mistakes on a command line are one line each, with the flag that was meant."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from errors import UsageError
from pipelines.flags import Parser, add_flags, check_bounds, setting
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
    seed: int = 0  # says nothing of itself: no flag
    strength: float = setting("of the base", 0.5, low=0, high=1)


@dataclass(frozen=True, kw_only=True)
class MadeUpSettings(BaseSettings):
    words: tuple[str, ...] = setting("several, at 100% of the width", (), metavar="WORD", names=("--texts",))
    scale: tuple[float, ...] = setting("one, or each", (1.0,), low=-2, high=2)
    centre: tuple[float, float] | None = setting("of a circle", None, metavar=("X", "Y"), shown="the middle")
    count: int | None = setting("how many", None, low=1, high=9)
    mode: str = setting("which way", "up", choices=("up", "down"))
    dry: bool = setting("nothing is made", False)


@pytest.fixture
def parser() -> Parser:
    parser = Parser("made up")
    add_flags(parser, MadeUpSettings, "of a test")
    return parser


def test_flags_are_those_that_the_class_declares_itself(parser):
    nothing = parser.parse_args([])
    assert vars(nothing) == dict.fromkeys(("words", "scale", "centre", "count", "mode", "dry"))  # not the base's
    given = [
        "--words",
        "a",
        "--texts",
        "b",
        "c",
        "--scale",
        "1",
        "--scale",
        "0.5",
        "--centre",
        "0.1",
        "2",
        "--count",
        "3",
        "--mode",
        "down",
        "--dry",
    ]
    assert vars(parser.parse_args(given)) == {
        "words": ["a", "b", "c"],
        "scale": [1.0, 0.5],
        "centre": [0.1, 2.0],
        "count": 3,
        "mode": "down",
        "dry": True,
    }
    for flags, words in ((["--centre", "1"], "--centre: expected 2 arguments"), (["--count", "x"], "--count: invalid")):
        with pytest.raises(UsageError, match=words):
            parser.parse_args(flags)


def test_the_help_has_every_default_and_choice(parser):
    shown = " ".join(parser.format_help().split())
    for words in (
        "of a test:",
        "--words WORD [WORD ...], --texts WORD [WORD ...] several, at 100% of the width --scale",
        "--scale X [X ...] one, or each (1)",
        "--centre X Y of a circle (the middle)",
        "--count N how many --mode",
        "--mode {up,down} which way (up)",
        "--dry nothing is made",
    ):
        assert words in shown, words
    assert "--strength" not in shown and "--seed" not in shown


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"count": 10}, r"^--count 10: accepted are 1 to 9$"),
        ({"count": 0}, r"^--count 0: accepted are 1 to 9$"),
        ({"scale": (1.0, float("nan"))}, r"^--scale nan: accepted are -2 to 2$"),
        ({"strength": 1.5}, r"^--strength 1\.5: accepted are 0 to 1$"),  # the base's too
        ({"mode": "upp"}, r"^--mode upp: accepted are up, down; did you mean up\?$"),
    ],
)
def test_bounds_and_choices_are_checked(values, words):
    check_bounds(MadeUpSettings())
    check_bounds(MadeUpSettings(count=9, scale=(-2, 2), strength=1, mode="down"))
    with pytest.raises(UsageError, match=words):
        check_bounds(MadeUpSettings(**values))
