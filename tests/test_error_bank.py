"""The error bank: what a full list gives up, views, paired storage, checkpoints, limits, several processes."""

import json

import pytest
import torch

from errors import ResourceError, UsageError, WeightsError
from training.draws import Draws
from training.error_bank import ErrorBank, RecycledError, bank_bytes, errors_to_insert, pack, unpack

SHAPE = (2, 3, 4, 4)
CPU = torch.device("cpu")


def error(number: int, bucket: int = 0, position: int = 0, kept: bool = True, shape=SHAPE) -> RecycledError:
    generator = torch.Generator().manual_seed(number)
    return RecycledError(position, bucket, 0.75, torch.randn(shape, generator=generator), kept)


def first(position: int, kind: str, count: int) -> int:
    return 0


def bank(folder, **changes) -> ErrorBank:
    return ErrorBank(folder / "bank", **{"grids": 4, "per_grid": 3, "dtype": "fp32"} | changes)


def stored(bank: ErrorBank, bucket: int = 0) -> list[torch.Tensor]:
    """v̂ - V of a bucket's entries, in order."""
    view = bank.view()
    return [-view.read("video", entry) / 0.75 for entry in view.entries("video", SHAPE, [bucket])]


def same(found: list, numbers: list[int]) -> None:
    assert len(found) == len(numbers)
    for tensor, number in zip(found, numbers, strict=True):
        torch.testing.assert_close(tensor, error(number).velocity)


def test_fifo_gives_up_the_oldest(tmp_path):
    ours = bank(tmp_path, replace="fifo")
    for number in range(5):
        ours.insert([error(number)], first)
    same(stored(ours), [2, 3, 4])


def test_random_gives_up_the_chosen(tmp_path):
    ours = bank(tmp_path, replace="random")
    for number in range(5):
        ours.insert([error(number, position=number)], lambda position, kind, count: {3: 1, 4: 0}[position])
    same(stored(ours), [4, 3, 2])


def test_l2_gives_up_the_nearest(tmp_path):
    ours = bank(tmp_path)
    for number in range(3):
        ours.insert([error(number)], first)
    near = RecycledError(0, 0, 0.75, error(1).velocity + 0.01)
    ours.insert([near], first)
    found = stored(ours)
    same([found[0], found[2]], [0, 2])
    torch.testing.assert_close(found[1], near.velocity)


def test_paired_entries_give_both_errors(tmp_path):
    ours, two = bank(tmp_path / "a"), bank(tmp_path / "b", storage="two_banks")
    for each in (ours, two):
        each.insert([error(3, bucket=2)], first)
        assert len(each) == 1
        for kind, factor in (("noise", 0.25), ("video", -0.75)):
            (entry,) = each.view().entries(kind, SHAPE, range(4))
            torch.testing.assert_close(each.view().read(kind, entry), factor * error(3).velocity)
    assert bank_bytes(SHAPE, 4, 3, "paired", "bf16") == 4 * 3 * 96 * 2
    assert bank_bytes(SHAPE, 4, 3, "two_banks", "bf16") == 2 * bank_bytes(SHAPE, 4, 3, "paired", "bf16")


def test_int8_is_within_half_a_step_of_its_scale(tmp_path):
    ours = bank(tmp_path, dtype="int8")
    ours.insert([error(0)], first)
    velocity = error(0).velocity
    assert (stored(ours)[0] - velocity).abs().max() <= velocity.abs().max() / 127 / 2 * 1.001
    assert bank_bytes(SHAPE, 4, 3, dtype="int8") * 2 == bank_bytes(SHAPE, 4, 3, dtype="bf16")


@pytest.mark.parametrize("shape", [(2, 3, 4, 6), (2, 3, 5, 6)])
def test_pooled_errors_are_means_over_squares(tmp_path, shape):
    ours = bank(tmp_path, pool=2)
    ours.insert([error(0, shape=shape)], first)
    view = ours.view()
    (entry,) = view.entries("noise", shape, [0])
    found, whole = view.read("noise", entry) / 0.25, error(0, shape=shape).velocity
    assert found.shape == shape
    for rows in (slice(0, 2), slice(4, 5)):
        mean = whole[..., rows, 2:4].mean((-2, -1), keepdim=True)
        torch.testing.assert_close(found[..., rows, 2:4], mean.expand_as(whole[..., rows, 2:4]))
    assert unpack(pack(torch.ones(1, 1, 5, 5), 0.5, "bf16", 4)).shape == (1, 1, 5, 5)
    assert bank_bytes((2, 3, 5, 6), 1, 1, dtype="fp32", pool=2) == 2 * 3 * 3 * 3 * 4


def test_the_order_of_arrival_does_not_matter_and_unkept_errors_are_left_out(tmp_path):
    errors = [error(i, position=i, kept=i != 2) for i in range(6)]
    for name, order in (("a", [0, 1, 2, 3, 4, 5]), ("b", [4, 0, 5, 2, 3, 1])):
        ours = bank(tmp_path / name, replace="fifo", per_grid=2)
        ours.insert([errors[i] for i in order], first)
        same(stored(ours), [4, 5])


def test_shapes_and_buckets_are_kept_apart(tmp_path):
    ours = bank(tmp_path, per_grid=1)
    other = (2, 3, 4, 6)
    ours.insert([error(0, bucket=1, position=0), error(1, 3, 1), error(2, 1, 2, shape=other)], first)
    view = ours.view()
    assert [len(view.entries("noise", shape, range(4))) for shape in (SHAPE, other)] == [2, 1]
    same([view.read("noise", e) / 0.25 for e in view.entries("noise", SHAPE, [3, 1])], [1, 0])
    assert view.entries("noise", SHAPE, [0, 2]) == []


def test_a_view_stands_still_until_the_next_step_has_ended(tmp_path):
    ours = bank(tmp_path, per_grid=1)
    ours.insert([error(0)], first)
    view = ours.view()
    (entry,) = view.entries("video", SHAPE, [0])
    ours.insert([error(1)], first)
    torch.testing.assert_close(view.read("video", entry), -0.75 * error(0).velocity)
    same(stored(ours), [1])
    ours.insert([error(2)], first)
    assert len(list((tmp_path / "bank").iterdir())) == 2  # the present one, and the one a view may still read


def test_a_checkpoint_is_the_bank_whatever_follows(tmp_path):
    ours = bank(tmp_path / "run", replace="random")
    for number in range(7):
        ours.insert([error(number, bucket=number % 2)], first)
    before = [stored(ours, bucket) for bucket in (0, 1)]
    ours.save(tmp_path / "step-7")
    for number in range(7, 20):
        ours.insert([error(number, bucket=number % 2)], first)

    resumed = bank(tmp_path / "resumed", replace="random")
    resumed.restore(tmp_path / "step-7")
    for bucket in (0, 1):
        assert all(map(torch.equal, stored(resumed, bucket), before[bucket]))
    for number in range(7, 20):  # and goes on as the unbroken run did
        resumed.insert([error(number, bucket=number % 2)], first)
    for bucket in (0, 1):
        assert all(map(torch.equal, stored(resumed, bucket), stored(ours, bucket)))
    ours.restore(tmp_path / "step-7")  # back, in the run itself
    for bucket in (0, 1):
        assert all(map(torch.equal, stored(ours, bucket), before[bucket]))
    assert len(list(ours.folder.iterdir())) == len(ours)


def test_a_damaged_checkpoint_is_refused_by_name(tmp_path):
    ours = bank(tmp_path)
    ours.insert([error(0)], first)
    ours.save(tmp_path / "saved")
    (file,) = (tmp_path / "saved").glob("*.safetensors")
    content = bytearray(file.read_bytes())
    file.unlink()  # it is a link to the bank's own
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(WeightsError, match=file.name):
        bank(tmp_path / "other").restore(tmp_path / "saved")
    (tmp_path / "saved" / "bank.json").write_text("{}")
    with pytest.raises(WeightsError, match="bank.json"):
        bank(tmp_path / "other").restore(tmp_path / "saved")


def test_a_manifest_names_no_file_outside(tmp_path):
    ours = bank(tmp_path)
    ours.insert([error(0)], first)
    ours.save(tmp_path / "saved")
    manifest = json.loads((tmp_path / "saved" / "bank.json").read_text())
    manifest["lists"][0][3][0][0] = "../secret.safetensors"
    (tmp_path / "saved" / "bank.json").write_text(json.dumps(manifest))
    (tmp_path / "secret.safetensors").write_bytes(b"x")
    with pytest.raises(WeightsError, match="missing or damaged"):
        bank(tmp_path / "other").restore(tmp_path / "saved")


def test_other_settings_are_refused(tmp_path):
    bank(tmp_path).save(tmp_path / "saved")
    with pytest.raises(UsageError, match="per_grid is 3 in the checkpoint, 5 in this run"):
        bank(tmp_path / "other", per_grid=5).restore(tmp_path / "saved")
    with pytest.raises(UsageError, match="replace.*nearest"):
        bank(tmp_path / "other", replace="nearest")


def test_the_limit_counts_every_shape(tmp_path):
    one = bank_bytes(SHAPE, 4, 3, dtype="fp32") / 2**30
    ours = bank(tmp_path, limit_gib=1.5 * one)
    ours.insert([error(0), error(1, position=1)], first)
    with pytest.raises(ResourceError, match="2 latent shapes"):
        ours.insert([error(2, shape=(2, 3, 4, 5))], first)


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    ours = bank(tmp_path)

    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("training.error_bank.write_new", full)
    with pytest.raises(ResourceError, match="No space left"):
        ours.insert([error(0)], first)


def test_a_process_that_does_not_write_reads_the_same(tmp_path):
    """Two processes of one machine, one after the other as seldom as they may be: the reader is a step ahead."""
    writer = bank(tmp_path)
    reader = bank(tmp_path, writes=False)
    for number in range(8):
        errors = [error(2 * number, position=0), error(2 * number + 1, position=1)]
        reader.insert(errors, first)  # before the files of this step are there
        ahead = stored(reader)
        writer.insert(errors, first)
        assert all(map(torch.equal, ahead, stored(writer)))


def test_slots_come_from_the_draws(tmp_path):
    """The bank after some steps does not depend on how the samples of a step were shared out."""
    found = []
    for name, shares in (("one", [[0, 1, 2, 3]]), ("two", [[2, 0], [3, 1]])):
        ours = bank(tmp_path / name, replace="random", per_grid=2)
        for step in range(4):

            def choose(position: int, kind: str, count: int, step: int = step) -> int:
                return Draws(5, step, [position], 4).integers(f"slot.{kind}", count).item()

            pending = [error(10 * step + i, position=i) for share in shares for i in share]
            ours.insert(pending, choose)
        found.append(stored(ours))
    assert all(map(torch.equal, *found))


def test_per_rank_keeps_to_its_own_after_the_warm_up(monkeypatch):
    own, other = error(0, position=1), error(1, position=0)
    monkeypatch.setattr("training.error_bank.gather_errors", lambda own, device: [other, *own])
    assert errors_to_insert([own], "per_rank", step=9, warmup=10, device=CPU) == [other, own]
    assert errors_to_insert([own], "per_rank", step=10, warmup=10, device=CPU) == [own]
    assert errors_to_insert([own], "global", step=99, warmup=10, device=CPU) == [other, own]
