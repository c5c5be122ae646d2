"""The loop: resumed is unbroken to the bit, however it was ended; any split of a batch is one; what is refused."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import load_file

from errors import InputError, ResourceError, UsageError, WeightsError
from tests.training_run import make_run
from training import checkpoint, log, loop
from training.checkpoint import latest_checkpoint
from training.draws import Draws
from training.loop import Run, tensors_in, train

PROJECT = Path(__file__).parent.parent


def state_of(output: Path, step: int = 6) -> dict:
    """All that a checkpoint holds, and the log."""
    folder = output / f"step-{step:06d}"
    saved = [torch.load(file, weights_only=True) for file in sorted(folder.glob("optimizer*.pt"))]
    moments = {
        part["names"][i]: moments for each in saved for part in each for i, moments in part["state"]["state"].items()
    }
    state = {
        **tensors_in(folder, "weights"),
        **{f"ema.{name}": mean for name, mean in tensors_in(folder, "ema").items()},
        **{f"bank.{file.name}": load_file(file)["error"] for file in folder.glob("bank/*.safetensors")},
        **{f"{name}.{kind}": value for name, of_one in sorted(moments.items()) for kind, value in of_one.items()},
    }
    state["bank.json"] = (folder / "bank" / "bank.json").read_text()
    state["losses"] = (output / "losses.jsonl").read_text()
    return state


def assert_same(one: dict, two: dict) -> None:
    """To the bit."""
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert value == two[name] if isinstance(value, str) else torch.equal(value, two[name]), name


def assert_near(one: dict, two: dict) -> None:
    """Up to the order of float32 sums; the bank's entries are bfloat16, and may round the other way."""
    assert one.keys() == two.keys()
    for name, value in one.items():
        if not isinstance(value, str):
            in_bank = name.startswith("bank.")
            close = {"rtol": 0.01 if in_bank else 0, "atol": 1e-3 if in_bank else 1e-5}
            torch.testing.assert_close(value, two[name], **close, msg=lambda text, name=name: f"{name}: {text}")
    for ours, theirs in zip(losses(one), losses(two), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def losses(state: dict) -> list[float]:
    return [json.loads(line)["loss"] for line in state["losses"].splitlines()]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> dict:
    output = tmp_path_factory.mktemp("unbroken")
    train(make_run(output))
    return state_of(output)


class Killed(BaseException):
    """In place of a kill: nothing of ours catches it."""


def kill_at(run: Run, step: int) -> Run:
    """The run, ended before a step's first forward pass."""
    batches = run.batches

    def until(number: int):
        if number == step:
            raise Killed
        return batches(number)

    run.batches = until
    return run


@pytest.mark.parametrize("step", [1, 3, 4])
def test_a_killed_run_goes_on_to_the_same_bits(tmp_path, unbroken, step):
    with pytest.raises(Killed):
        train(kill_at(make_run(tmp_path), step))
    saved = latest_checkpoint(tmp_path)
    assert (0 if saved is None else saved.step) == step // 2 * 2
    train(make_run(tmp_path))
    assert_same(state_of(tmp_path), unbroken)


@pytest.mark.parametrize("where", ["seal", "torch.save", "retire"])
def test_a_run_killed_while_it_saves_goes_on_to_the_same_bits(tmp_path, unbroken, monkeypatch, where):
    """Before the files are all there, before the manifest, or after the rename: at step 4, with step 2 whole."""

    def end(*args, **kwargs):
        raise Killed

    run = kill_at(make_run(tmp_path), 3)
    with pytest.raises(Killed):
        train(run)
    with monkeypatch.context() as patch:
        patch.setattr(torch if where == "torch.save" else checkpoint, where.split(".")[-1], end)
        with pytest.raises(Killed):
            train(make_run(tmp_path))
    assert latest_checkpoint(tmp_path).step == (4 if where == "retire" else 2)
    train(make_run(tmp_path))
    assert_same(state_of(tmp_path), unbroken)
    assert not list(tmp_path.glob("*.part"))


def test_a_signal_saves_and_stops_and_the_run_goes_on(tmp_path, unbroken):
    run = make_run(tmp_path, "save.every=100")
    batches = run.batches

    def signalled(step: int):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return batches(step)

    run.batches = signalled
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        train(run)
    assert signal.getsignal(signal.SIGTERM) == before
    assert latest_checkpoint(tmp_path).step == 3
    train(make_run(tmp_path))
    assert_same(state_of(tmp_path), unbroken)


def test_a_run_that_the_system_kills_at_random_goes_on_to_the_same_bits(tmp_path):
    """SIGKILL twice, with a save after every step, so that most of them fall into one."""
    sets = ["train.steps=24", "save.every=1", "save.keep=2"]
    train(make_run(tmp_path / "unbroken", *sets))
    code = "import sys; from pathlib import Path; from tests.training_run import make_run, train; "
    code += "train(make_run(Path(sys.argv[1]), *sys.argv[2:]))"
    log_file, random = tmp_path / "killed" / "losses.jsonl", Random(5)

    def written() -> int:
        return len(log_file.read_text().splitlines()) if log_file.is_file() else 0

    for _ in range(2):
        before = written()
        process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "killed"), *sets], cwd=PROJECT)
        deadline = time.monotonic() + 60
        while written() < before + 2 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(0.15 * random.random())
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert 0 < latest_checkpoint(tmp_path / "killed").step < 24
    train(make_run(tmp_path / "killed", *sets))
    assert_same(state_of(tmp_path / "killed", 24), state_of(tmp_path / "unbroken", 24))


def test_logs_are_whole_after_a_kill_in_the_middle_of_a_resume(tmp_path, unbroken, monkeypatch):
    """The log is shortened to what is done: ended there, the next run finds all that was written before."""
    with pytest.raises(Killed):
        train(kill_at(make_run(tmp_path), 3))
    (tmp_path / "validation.jsonl").write_text('{"step": 2, "loss": 1}\n{"step": 4, "loss": 1}\n{"st')

    def end(*args, **kwargs):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(type(tmp_path), "write_text", end)
        train(make_run(tmp_path))
    assert len((tmp_path / "losses.jsonl").read_text().splitlines()) == 3
    train(make_run(tmp_path))
    assert_same(state_of(tmp_path), unbroken)
    assert (tmp_path / "validation.jsonl").read_text() == '{"step": 2, "loss": 1}\n'


def test_one_forward_pass_of_four_is_four_of_one(tmp_path, unbroken):
    train(make_run(tmp_path, "train.micro_batch=4"))
    assert_near(state_of(tmp_path), unbroken)


def in_two_processes(output: Path, *sets: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = subprocess.run(
        [*command, "tests/training_run.py", str(output), *sets],
        cwd=PROJECT,
        env=os.environ | {"PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("sharding", ["none", "zero2"])
def test_two_processes_are_one_and_one_goes_on_from_two(tmp_path, unbroken, sharding):
    """Two processes to step 4, and one process from there."""
    in_two_processes(tmp_path, "train.steps=4", "optim.schedule=constant", f"memory.sharding={sharding}")
    assert latest_checkpoint(tmp_path).step == 4
    files = {file.name for file in (tmp_path / "step-000004").glob("*.*")}
    if sharding == "zero2":
        sizes = [load_file(tmp_path / "step-000004" / f"weights-{rank}.safetensors") for rank in range(2)]
        assert not sizes[0].keys() & sizes[1].keys()
        counts = [sum(value.numel() for value in each.values()) for each in sizes]
        assert max(counts) < 0.6 * sum(counts)
    else:
        assert {"weights.safetensors", "optimizer.pt", "ema.safetensors"} <= files
    train(make_run(tmp_path))
    assert_near(state_of(tmp_path), unbroken)


def test_sharded_processes_go_on_from_one_and_to_the_same_bits_from_themselves(tmp_path, unbroken):
    """One process to step 2, two to step 4, where they are ended and begin again, two to the end."""
    sharded = ("memory.sharding=zero2", "optim.schedule=constant")
    train(make_run(tmp_path / "a", "train.steps=2"))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    in_two_processes(tmp_path / "a", *sharded, "train.steps=6")
    in_two_processes(tmp_path / "b", *sharded, "train.steps=4")
    in_two_processes(tmp_path / "b", *sharded, "train.steps=6")
    assert_same(state_of(tmp_path / "a"), state_of(tmp_path / "b"))
    assert_near(state_of(tmp_path / "a"), unbroken)


def test_the_mean_is_what_is_tried_and_training_goes_on_as_it_was(tmp_path, unbroken, caplog, monkeypatch):
    monkeypatch.setattr(log, "LINE_EVERY", 0)
    run, seen = make_run(tmp_path, "validate.every=2"), {}

    def evaluate(step: int) -> dict:
        mean, weights = run.ema.mean, run.masters.parameters
        assert all(torch.equal(weights[name], mean[name]) for name in mean)
        seen[step] = {name: value.clone() for name, value in mean.items()}
        return {}

    run.evaluate = evaluate
    with caplog.at_level(logging.INFO, "selfsame"):
        train(run)
    assert_same(state_of(tmp_path), unbroken)
    assert list(seen) == [2, 4, 6]
    name = next(iter(seen[2]))
    assert torch.equal(unbroken[f"ema.{name}"], seen[6][name]) and not torch.equal(unbroken[name], seen[6][name])
    assert f"step 6: loss {losses(unbroken)[-1]:.4f} (mean of 1), gradient" in caplog.text


def spoil(run: Run, steps: set[int]) -> Run:
    """A NaN in one sample of these steps."""
    batches = run.batches

    def spoilt(step: int):
        for batch in batches(step):
            if step in steps and 2 in batch.positions:
                batch.mean[0, 0, 0, 0, 0] = torch.nan
            yield batch

    run.batches = spoilt
    return run


def test_a_step_without_a_finite_gradient_changes_nothing(tmp_path, unbroken, caplog):
    with caplog.at_level(logging.WARNING, "selfsame"):
        train(spoil(make_run(tmp_path, "save.every=1", "save.keep=9"), {3}))
    before, after = (state_of(tmp_path, step) for step in (3, 4))
    assert all(torch.equal(before[n], after[n]) for n in before if n.startswith(("transformer.", "ema.")))
    assert before["bank.json"] == after["bank.json"]
    assert "step 3: no finite gradient (losses that are not: [2])" in caplog.text
    last = state_of(tmp_path)
    assert all(v.isfinite().all() for v in last.values() if not isinstance(v, str)) and len(losses(last)) == 6


def test_too_many_of_them_end_the_run(tmp_path):
    with pytest.raises(InputError, match="3 steps up to 4 had no finite gradient"):
        train(spoil(make_run(tmp_path, "train.max_skips=2"), {2, 3, 4}))


def test_a_full_disk_leaves_the_checkpoints_before(tmp_path, monkeypatch):
    train(make_run(tmp_path, "train.steps=2"))
    before = state_of(tmp_path, 2)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(loop, "save_file", full)
    with pytest.raises(ResourceError, match="step-000004: No space left.*make room"):
        train(make_run(tmp_path))
    assert not list(tmp_path.glob("*.part"))
    assert_same({**state_of(tmp_path, 2), "losses": ""}, {**before, "losses": ""})


def test_old_checkpoints_go_and_some_are_kept(tmp_path):
    train(make_run(tmp_path, "save.every=1", "save.keep=2", "save.keep_every=3", "train.steps=6"))
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-000003", "step-000005", "step-000006"]


def test_another_run_is_refused_by_what_differs(tmp_path):
    train(make_run(tmp_path, "train.steps=2"))
    with pytest.raises(UsageError, match="seed was 0 and is 5.*another output"):
        train(make_run(tmp_path, "seed=5"))
    other = make_run(tmp_path)
    other.about = {**other.about, "data": "two"}
    with pytest.raises(UsageError, match="data was 'one' and is 'two'"):
        train(other)


def test_a_damaged_checkpoint_is_passed_over(tmp_path, unbroken, caplog):
    train(make_run(tmp_path, "train.steps=4"))
    weights = tmp_path / "step-000004" / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    train(make_run(tmp_path))
    assert "weights.safetensors is damaged; going back" in caplog.text
    assert_same(state_of(tmp_path), unbroken)
    for folder in tmp_path.glob("step-*"):
        (folder / "manifest.json").write_text("[]")
    with pytest.raises(WeightsError, match="no checkpoint is whole"):
        train(make_run(tmp_path))


def test_training_learns(tmp_path):
    """The loss on the seven samples falls: at fixed draws, so that it says something."""
    run = make_run(tmp_path, "train.steps=30", "save.every=1000", "optim.lr=0.05", "error_recycling.p.clean=1")
    found = []
    for _ in range(2):
        with torch.no_grad():
            batch = next(iter(run.batches(0)))
            draws = [Draws(99, number, batch.positions, 4) for number in range(6)]
            found.append(sum(run.forward(batch, draw, None)[0].item() for draw in draws))
        if len(found) == 1:
            train(run)
    assert found[1] < 0.8 * found[0]
