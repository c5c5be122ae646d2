"""The GPU benchmark: that all of it runs, at tiny sizes on a CPU; its counts; what it leaves out, saying so."""

import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu import SECTIONS, main
from benchmarks.sections.bench import RELEASED, TINY, Bench, table
from benchmarks.sections.models import (
    Inputs,
    diffusers_twin,
    distance,
    forward_flops,
    num_tokens,
    random_transformer,
)
from models.wan.slots import Prompt
from models.wan.transformer import WanTransformer

CPU = torch.device("cpu")


def bench(seconds: float = 100, **changes) -> Bench:
    return Bench(CPU, TINY, runs=1, deadline=time.monotonic() + seconds, **changes)


def test_every_section_gives_rows_of_finite_numbers(capsys):
    results = main(["--device", "cpu", "--runs", "1"])
    printed = capsys.readouterr().out
    assert list(results) == list(SECTIONS)
    for name, rows in results.items():
        assert f"### {SECTIONS[name][0]}" in printed
        measured = [row for row in rows if any(isinstance(value, float) for value in row.values())]
        assert measured, f"{name}: {rows}"
        numbers = [value for row in measured for value in row.values() if isinstance(value, float)]
        assert all(math.isfinite(number) for number in numbers), rows
        # cuDNN alone may fail, which a CPU has not; what else is missing is missing by name.
        assert not [row for row in rows if "failed" in row.get("note", "") and "cuDNN" not in row[""]], rows
    assert "SDPA, flash" in printed
    assert "`python -m benchmarks.gpu --device cpu --runs 1`" in printed
    assert f"torch {torch.__version__}" in printed
    labels = " ".join(row[""] for rows in results.values() for row in rows)
    for wanted in ("diffusers", "compiled", "fp8", "identity", "VACE", "audio", "encode", "decode", "sequential"):
        assert wanted in labels
    for row in results["precision"]:
        if row[""].startswith("float32"):
            assert row["prediction, % from float32"] < 0.001
        if row[""].startswith("bf16, SDPA, its"):
            assert 0.01 < row["prediction, % from float32"] < 3


@pytest.mark.parametrize("name", ["1.3B", "14B"])
def test_the_count_agrees_with_torch_at_the_released_shapes(name):
    config = RELEASED.transformers[name]
    with torch.device("meta"):
        transformer = WanTransformer(**config.as_dict())
        latents, text = torch.empty(1, 16, *RELEASED.latents), torch.empty(1, 512, 4096)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        transformer(latents, torch.tensor([700.0]), Prompt(text))
    expected = forward_flops(config, num_tokens(RELEASED.latents, config))
    assert expected == pytest.approx(counter.get_total_flops(), rel=0.01)
    # shared with everyone: a step of 14B at 480x832x81 is 1.678 PFLOP, of 1.3B 0.283
    assert expected == pytest.approx({"1.3B": 0.283e15, "14B": 1.678e15}[name], rel=1e-3)


@torch.no_grad()
def test_diffusers_runs_the_same_weights():
    ours = random_transformer(TINY.small, CPU, torch.float32)
    theirs = diffusers_twin(ours)
    inputs = Inputs(bench(), TINY.small, TINY.latents)
    found = ours(inputs.latents, inputs.timestep, inputs.prompt())
    assert distance(found, inputs.theirs(theirs)) < 1e-3
    assert theirs.blocks[0].attn1.to_q.weight.data_ptr() == ours.blocks[0].self_attn.q.weight.data_ptr()
    assert found.std() > 0.01


def test_what_does_not_fit_is_skipped_by_name():
    run = bench(seconds=10)
    made = []
    assert run.attempt("in time", lambda: made.append(1) or {"seconds": 1.0}, seconds=5) == {
        "": "in time",
        "seconds": 1,
    }
    run.attempt("too long", lambda: made.append(2), seconds=50)
    run.attempt("too large", lambda: made.append(3), device=1e15)
    run.attempt("host too small", lambda: made.append(4), host=1e15)
    run.attempt("disk too small", lambda: made.append(5), disk=1e18)
    assert made == [1]
    notes = {row[""]: row.get("note") for row in run.rows}
    assert notes["too long"].startswith("skipped: about 50 s")
    assert notes["too large"].startswith("skipped: about 931322.6 GiB on cpu")
    assert "of host memory" in notes["host too small"]
    assert "of disk in" in notes["disk too small"]
    assert "| too long |  | skipped: about 50 s" in table(run.rows)


def test_a_failure_is_a_row_and_the_rest_goes_on():
    run = bench()

    def fail():
        raise RuntimeError("no | kernel\nand a long trace")

    assert run.attempt("broken", fail) is None
    run.attempt("whole", lambda: {"seconds": 2.0})
    assert run.rows == [{"": "broken", "note": "failed: RuntimeError: no | kernel"}, {"": "whole", "seconds": 2.0}]
    assert "no / kernel" in table(run.rows)  # a bar would end the cell


def test_a_section_that_fails_does_not_stop_the_next(monkeypatch):
    def broken(run: Bench):
        """Broken."""
        run.attempt("first", lambda: {"seconds": 1.0})
        raise ValueError("out of order")

    monkeypatch.setitem(SECTIONS, "vae", ("VAE", broken))
    results = main(["--device", "cpu", "--runs", "1", "--only", "vae", "loading"])
    assert results["vae"][0]["seconds"] == 1.0
    assert results["vae"][1]["note"] == "failed: ValueError: out of order"
    assert results["loading"][0]["GB"] > 0


def test_without_time_every_section_is_skipped_by_name():
    results = main(["--device", "cpu", "--minutes", "0"])
    assert [list(rows[0].values())[1][:7] for rows in results.values()] == ["skipped"] * len(SECTIONS)


def test_stopped_by_hand_it_prints_what_it_has(monkeypatch, capsys):
    def stopped(run: Bench):
        run.attempt("first", lambda: {"seconds": 1.0})
        raise KeyboardInterrupt

    monkeypatch.setitem(SECTIONS, "vae", ("VAE", stopped))
    with pytest.raises(KeyboardInterrupt):
        main(["--device", "cpu", "--only", "vae"])
    assert "| first | 1 |" in capsys.readouterr().out


def test_without_a_gpu_one_line_says_what_can_be_done(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    for flags in ([], ["--device", "cuda"]):
        with pytest.raises(SystemExit, match="no GPU here; --device cpu runs tiny shapes"):
            main(flags)


def test_runs_stop_when_the_time_is_up():
    run = Bench(CPU, TINY, runs=1000, deadline=time.monotonic() + 0.2)
    calls = []
    run.median(lambda: (calls.append(1), time.sleep(0.05)))
    assert 2 <= len(calls) < 10


def test_it_starts_without_the_packages_that_a_bare_gpu_machine_lacks():
    """cv2, insightface and the like are blocked, as if they were not installed."""
    code = (
        "import sys\n"
        "lacking = ('cv2', 'insightface', 'onnxruntime', 'onnx', 'peft', 'ftfy', 'imageio_ffmpeg', 'scipy')\n"
        "lacking += ('skimage', 'sentencepiece', 'google.protobuf', 'pytest')\n"
        "for name in lacking: sys.modules[name] = None\n"
        "from benchmarks.gpu import main\n"
        "rows = main(['--device', 'cpu', '--quick', '--only', 'plugins'])\n"
        "assert all('adds % of a step' in row for row in rows['plugins']), rows\n"
    )
    root = Path(__file__).parent.parent
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
