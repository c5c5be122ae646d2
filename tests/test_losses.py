"""Losses against sums written out, and where each does not look."""

import pytest
import torch

from training.losses import (
    choose_masks,
    kl_divergence,
    masked_mse,
    masks_on_latents,
    motion_difference,
    mse,
    reconstruction,
)

SHAPE = (2, 3, 4, 5, 6)  # (B, C, F, h, w)


def pair(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(SHAPE, generator=generator), torch.randn(SHAPE, generator=generator)


def test_mse_is_a_number_a_sample():
    v, target = pair()
    expected = ((v - target) ** 2).sum((1, 2, 3, 4)) / (3 * 4 * 5 * 6)
    torch.testing.assert_close(mse(v, target), expected)


def test_known_frames_teach_nothing():
    v, target = pair()
    v.requires_grad_()
    mse(v, target, known_frames=2).sum().backward()
    assert (v.grad[:, :, :2] == 0).all() and (v.grad[:, :, 2:] != 0).all()


def test_bfloat16_is_summed_in_float32():
    v = torch.full(SHAPE, 1.0, dtype=torch.bfloat16)
    loss = mse(v, v + 0.0078125)  # 1/128, exact in bfloat16; its square summed in bfloat16 would stall
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, torch.full((2,), 1 / 128**2))


def test_three_masks():
    v, target = pair()
    face = torch.zeros(2, 1, *SHAPE[2:])
    lip = face.clone()
    face[:, :, :, :2], lip[:, :, :, 1:2] = 1, 0.5
    squared = (v - target).square()
    volume = 3 * 4 * 5 * 6
    by_hand = {
        "full": squared.sum((1, 2, 3, 4)) + squared[:, :, :, :2].sum((1, 2, 3, 4)),
        "face": squared[:, :, :, :2].sum((1, 2, 3, 4)),
        "lip": 0.5 * squared[:, :, :, 1:2].sum((1, 2, 3, 4)),
    }
    by_hand["full"] = by_hand["full"] + by_hand["lip"]
    for which in (["full", "lip"], ["face", "full"], ["lip", "face"]):
        loss = masked_mse(v, target, face, lip, which)
        expected = torch.stack([by_hand[name][b] for b, name in enumerate(which)]) / volume
        torch.testing.assert_close(loss, expected)


def test_shares_of_the_masks():
    share = torch.tensor([0.0, 0.399, 0.4, 0.499, 0.5, 0.999], dtype=torch.float64)
    assert choose_masks(share, full=0.4, face=0.1) == ["full", "full", "face", "face", "lip", "lip"]


def test_a_mask_over_all_pixels_is_one_over_all_latents():
    assert (masks_on_latents(torch.ones(1, 1, 13, 48, 64), (4, 6, 8)) == 1).all()
    halved = masks_on_latents(torch.cat((torch.ones(1, 1, 5, 16, 8), torch.zeros(1, 1, 5, 16, 8)), -1), (2, 2, 4))
    assert halved[..., :2].min() == 1 and halved[..., 2:].max() == 0


def test_motion_is_the_change_between_frames():
    v, target = pair()
    still = target + torch.randn(2, 3, 1, 5, 6)  # off by the same in every frame: no motion is wrong
    assert motion_difference(still, target).max() < 1e-10
    expected = torch.stack(
        [((v[:, :, f + 1] - v[:, :, f]) - (target[:, :, f + 1] - target[:, :, f])) for f in range(3)]
    )
    torch.testing.assert_close(motion_difference(v, target), expected.square().mean((0, 2, 3, 4)))
    shifted = target + torch.randn(2, 1, 4, 5, 6)  # off by the same in every channel
    assert motion_difference(shifted, target, "legacy").max() < 1e-10 < motion_difference(shifted, target).min()


def test_a_still_has_no_motion():
    v, target = pair()
    assert motion_difference(v[:, :, :1], target[:, :, :1]).tolist() == [0, 0]


def test_vae_terms():
    v, target = pair()
    torch.testing.assert_close(reconstruction(v, target)[1], (v[1] - target[1]).abs().sum() / 360)
    assert kl_divergence(torch.zeros(SHAPE), torch.zeros(SHAPE)).tolist() == [0, 0]
    normal = torch.distributions.Normal(v, (target / 2).exp())
    expected = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).mean((1, 2, 3, 4))
    torch.testing.assert_close(kl_divergence(v, target), expected)


@pytest.mark.parametrize("name", ["frames", "legacy"])
def test_motion_loss_has_a_gradient(name):
    v, target = pair()
    v.requires_grad_()
    motion_difference(v, target, name).sum().backward()
    assert v.grad.abs().sum() > 0
