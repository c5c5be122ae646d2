"""Mistakes on a command line are one line each, with the flag that was meant."""

import subprocess
import sys
from pathlib import Path

import pytest

from errors import UsageError
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
