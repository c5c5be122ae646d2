"""Long work is never silent: bars on a terminal, lines in the log elsewhere, and how long the whole run will take."""

import io
import logging
import sys
from types import SimpleNamespace

import pytest
import torch

import infer
from pipelines.conditions import ShownVAE
from preprocess import progress_bars
from preprocess.progress_bars import ProgressBars, readable_time


class Clock:
    """Seconds that pass only when they are told to."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress_bars, "time", clock)
    return clock


def test_the_estimate_counts_steps_windows_and_videos(clock):
    """Two videos of 3 windows of 4 steps; a step takes 10 s, the first of all 100 s (weights), 7 s between windows."""
    run = ProgressBars()
    assert run.left() is None
    lefts = []
    for _ in run.each(["a", "b"]):
        run.plan(4, parts=3, noun="window")
        for number in range(3):
            run.begin_part(number)
            with run.steps("x") as bar:
                for _ in range(4):
                    clock.now += 100 if not lefts else 10
                    bar.advance()
                    lefts.append(run.left())
            clock.now += 7
    assert lefts[0] == 23 * 100, "nothing else to go by yet"
    assert lefts[1] == 22 * 10
    assert lefts[3] == 20 * 10
    assert lefts[4] == 19 * 10 + 5 * 7
    assert lefts[12] == 11 * 10 + 3 * 7
    assert lefts[-1] == 7


def test_steps_of_an_earlier_run_and_failed_attempts_are_not_left(clock):
    run = ProgressBars()
    run.plan(10)
    bar = run.steps("x")
    bar.start_at(6)
    with pytest.raises(RuntimeError), bar:
        clock.now += 50
        bar.advance()
        raise RuntimeError("out of memory")
    bar.start_at(7)
    with bar:
        for _ in range(2):
            clock.now += 5
            bar.advance()
    assert run.left() == 5


def test_lines_without_a_terminal(clock, caplog, capsys):
    """None for what is short; then one when it begins to take long, and one a minute."""
    caplog.set_level(logging.INFO)
    run = ProgressBars()
    for _ in run.each([SimpleNamespace(output="a.mp4"), SimpleNamespace(output="b.mp4")]):
        run.plan(100)
        with run.steps("x.mp4") as bar:
            for _ in range(100):
                clock.now += 3
                bar.advance()
        with run.work("decoding", 81, "frame") as bar:
            bar.advance(81)
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == "video 1 of 2: a.mp4"
    assert lines[1] == "video 1 of 2, x.mp4: step 4 of 100; about 10 min left for all 2 videos"
    assert len(lines) == 2 * (1 + 5)
    assert capsys.readouterr().err.count("\r") == 0


def test_other_processes_are_silent(clock, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    run = ProgressBars(shown=False)
    for _ in run.each("ab"):
        with run.steps("x") as bar:
            clock.now += 1000
            bar.advance()
    assert terminal.getvalue() == caplog.text == ""


def test_times_are_readable():
    times = (0, 59, 61, 3599, 3700, 86_400 * 2 + 3600 * 5)
    assert [readable_time(t) for t in times] == ["0 s", "59 s", "1 min", "1 h 0 min", "1 h 2 min", "2 d 5 h"]


def test_encoding_has_a_bar_and_is_what_it_was(monkeypatch):
    class Vae:
        spatial_factor = 8

        def encode_stream(self, video, tiling=None):
            yield from video.split([1, 4, 4], dim=2)

    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    video = torch.randn(1, 3, 9, 2, 2)
    shown = ShownVAE(Vae(), ProgressBars(), "encoding the picture")
    assert torch.equal(shown.encode(video, tiling=None), video)
    assert shown.spatial_factor == 8
    assert "encoding the picture: 100%" in terminal.getvalue()
    assert "9/9" in terminal.getvalue()


SMALL = ["--config", "tiny", "--no_face_crop", "--height", "64", "--width", "64", "--num_frames", "5"]
SMALL += ["--num_inference_steps", "2", "--seed", "0", "1"]


def run_infer(folder):
    return infer.main(infer.parse_args([*SMALL, "--output", str(folder / "out.mp4")]))


def test_a_run_without_a_terminal(tmp_path, monkeypatch, caplog, capsys):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(progress_bars, "FIRST_LINE", 0.0)
    monkeypatch.setattr(progress_bars, "LINE_EVERY", 0.0)
    made = run_infer(tmp_path)
    lines = [record.getMessage() for record in caplog.records]
    assert f"video 2 of 2: {made[1]}" in lines
    assert any(line.startswith("video 2 of 2, out-000-seed1.mp4: step 2 of 2; about") for line in lines)
    assert any(line.startswith("video 1 of 2, decoding: frame 5 of 5; about") for line in lines)
    assert "\r" not in capsys.readouterr().err


def test_a_run_at_a_terminal(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    run_infer(tmp_path)
    shown = terminal.getvalue()
    assert "video 2 of 2, out-000-seed1.mp4: 100%" in shown
    assert "left for all 2 videos" in shown
    assert "video 1 of 2, decoding: 100%" in shown
