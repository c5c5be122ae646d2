"""The benchmark of training: every check runs at tiny sizes on a CPU, and says that its figures mean nothing there."""

import math

import pytest
import torch

from benchmarks.training_speed import CHECKS, Bench, Setting, main
from training.estimate import stacks_of


@pytest.mark.parametrize("name", CHECKS)
def test_every_check_runs(name, capsys):
    rows = main(["--device", "cpu", "--steps", "1", "--only", name])
    printed = capsys.readouterr().out
    assert rows and all(row[""] == "not measured" and row["found"] and row["check"] in printed for row in rows)
    assert f"--only {name}`" in printed and "Its figures mean nothing" in printed
    if name == "resume":
        assert rows[0]["found"] == "True"


def test_a_goal_is_met_or_not_where_there_is_a_gpu(tmp_path):
    bench = Bench(torch.device("cpu"), 1, tmp_path)
    bench.is_tiny = False
    for met, shown in ((True, "met"), (False, "NOT MET"), (None, "not measured")):
        bench.row("x", "1", "2", met)
        assert bench.rows[-1][""] == shown


def test_a_step_is_of_all_that_the_setting_says(tmp_path):
    """The tiny sizes' arithmetic is the estimate's, and a step changes what trains."""
    bench = Bench(torch.device("cpu"), 1, tmp_path)
    measured = bench.measure(Setting(size="1.3B", sets=("train.trainable=full",)))
    ((arithmetic, is_full),) = stacks_of(measured.run.config, 3 * 4 * 6)
    assert is_full and measured.flop == arithmetic.step(True) and math.isnan(measured.peak)
    again = bench.make_run(Setting(size="1.3B", sets=("train.trainable=full",)))
    assert measured.run.masters.values.keys() == again.masters.values.keys()
    moved = [not torch.equal(value, again.masters.values[name]) for name, value in measured.run.masters.values.items()]
    assert sum(moved) > 0.9 * len(moved)
