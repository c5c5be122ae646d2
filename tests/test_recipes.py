"""Recipes on tiny models: what they tell the network, what a batch must not change, what has a gradient."""

import copy
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from pipelines.tiny import fill_from_seed, tiny_pose_embedder
from tests import tiny
from training.draws import Draws
from training.error_bank import ErrorBank, RecycledError
from training.error_recycling import error_buckets
from training.losses import edge_difference
from training.noise import NoiseTable, add_noise
from training.recipes.avatar import AvatarRecipe
from training.recipes.base import BaseRecipe, Batch, denoising_step
from training.recipes.error_recycling import ErrorRecyclingRecipe
from training.recipes.stand_in import StandInRecipe
from training.recipes.vace import VaceRecipe, hints_at_once
from training.recipes.vae import VaeRecipe, VaeTrainee, vae_step
from training.trainee import TrainableStandIn, Trainee

B = 3
TEXT_DIM = tiny.CONFIG["transformer"]["text_dim"]


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def some(batch: Batch, rows: list[int]) -> Batch:
    """A part of a batch, as another process or micro-batch has it."""
    return replace(
        batch,
        positions=[batch.positions[row] for row in rows],
        mean=batch.mean[rows],
        std=None if batch.std is None else batch.std[rows],
        text=[batch.text[row] for row in rows],
        parts={name: part[rows] for name, part in batch.parts.items()},
    )


def batch_of(**parts: Tensor) -> Batch:
    return Batch(
        positions=list(range(B)),
        mean=tiny.latents(1, batch=B),
        std=0.1 * tiny.latents(2, batch=B).abs(),
        text=[randn(10 + row, 5 + row, TEXT_DIM) for row in range(B)],
        empty_text=randn(9, 1, TEXT_DIM),
        parts=parts,
    )


GRID_H, GRID_W = (2 * side for side in tiny.GRID)


def setting(name: str):
    """(recipe, trainee, batch) with every dropout and option in play."""
    if name == "base":
        return BaseRecipe(text_drop=0.4), Trainee(tiny.transformer()), batch_of()
    if name == "known_frames":
        return BaseRecipe(text_drop=0.4, known_frames=1), Trainee(tiny.transformer()), batch_of()
    if name == "stand_in":
        model = tiny.transformer()
        trainee = Trainee(model, stand_in=TrainableStandIn.of(tiny.stand_in(model)))
        recipe = StandInRecipe(text_drop=0.4, reference_noise=(-1.0, 0.5), reference_drop=0.3, face_loss=0.5)
        mask = (randn(5, B, 1, 9, 8 * GRID_H, 8 * GRID_W) > 0).float()
        return recipe, trainee, batch_of(reference=randn(4, B, 16, 1, 8, 8), face_mask=mask)
    if name == "avatar":
        model = tiny.avatar_transformer()
        trainee = Trainee(model, audio_adapter=tiny.audio_adapter(model))
        recipe = AvatarRecipe(text_drop=0.4, audio_drop=0.3, clip_level=0.5, clip_drop=0.3)
        masks = {f"{part}_mask": randn(s, B, 1, 9, 8, 8).abs() for part, s in (("face", 5), ("lip", 6))}
        parts = {"masked": tiny.latents(3, batch=B), "masked_std": tiny.latents(4, batch=B).abs()}
        return recipe, trainee, batch_of(**masks, **parts, clip=randn(7, B, 257, 16), audio=randn(8, B, 17, 12))
    if name == "vace":
        recipe = VaceRecipe(text_drop=0.4, masked_loss=0.5)
        trainee = Trainee(tiny.transformer(), vace=tiny.vace_branch())
        return recipe, trainee, batch_of(vace_context=tiny.latents(3, batch=B, channels=96))
    variant = name
    model = tiny.avatar_transformer() if variant != "pro" else tiny.transformer(in_dim=36)
    recipe = ErrorRecyclingRecipe(
        variant=variant, text_drop=0.4, noise_error=0.5, clean=0.3, clean_update=0.5, motion=0.5, condition_drop=0.4,
        modulate=0.3, grids=6,
    )  # fmt: skip
    parts = {"condition": tiny.latents(3, batch=B, channels=20)}
    if variant != "pro":
        parts["clip"] = randn(7, B, 257, 16)
    adapters = {}
    if variant == "film":
        parts["condition_motion"] = tiny.latents(4, batch=B, channels=20)
    if variant == "talk":
        adapters["multitalk"] = tiny.multitalk()
        parts["audio"] = torch.stack([tiny.audio(9, seed=s) for s in range(B)])
    if variant == "dance":
        adapters["pose_embedder"] = tiny_pose_embedder(tiny.CONFIG)
        parts["pose"] = 255 * randn(8, B, 9, 8 * GRID_H, 8 * GRID_W, 3).sigmoid()
    return recipe, Trainee(model, **adapters), batch_of(**parts)


NAMES = ["base", "known_frames", "stand_in", "avatar", "vace", "shot", "film", "talk", "dance", "pro"]


@pytest.fixture(scope="module")
def filled_bank(tmp_path_factory) -> ErrorBank:
    bank = ErrorBank(tmp_path_factory.mktemp("run") / "bank", grids=6, per_grid=4)
    shape = tiny.latents().shape[1:]
    bank.insert([RecycledError(i, i % 6, 0.7, randn(50 + i, *shape)) for i in range(18)], choose=lambda *_: 0)
    return bank


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_batch_is_its_samples(name, filled_bank):
    """Losses and errors of a batch are those of its samples alone, with all their draws: accumulation is free."""
    recipe, trainee, batch = setting(name)
    view = filled_bank.view()
    for step in (0, 1) if name != "dance" else (0,):  # its convolutions are slow on a CPU
        together, errors = denoising_step(recipe, trainee, batch, Draws(3, step, batch.positions, B), view)
        assert together.shape == (B,) and together.dtype == torch.float32 and together.isfinite().all()
        for row in range(B):
            alone, own = denoising_step(recipe, trainee, some(batch, [row]), Draws(3, step, [row], B), view)
            torch.testing.assert_close(alone[0], together[row], rtol=1e-4, atol=1e-5)
            for one in own:
                (same,) = (e for e in errors if e.position == one.position)
                assert (same.bucket, same.sigma, same.kept) == (one.bucket, one.sigma, one.kept)
                torch.testing.assert_close(same.velocity, one.velocity, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "talk"])  # whose audio layers stay as they are
def test_every_adapter_parameter_has_a_gradient(name):
    """A reduction over processes waits for each: also for those that a dropout leaves without use."""
    recipe, trainee, batch = setting(name)
    adapters = [(n, p) for n, p in trainee.named_parameters() if not n.startswith("transformer.")]
    for _, parameter in adapters or trainee.named_parameters():
        parameter.requires_grad_(True)
    trained = [(n, p) for n, p in trainee.named_parameters() if p.requires_grad]
    losses, _ = denoising_step(recipe, trainee, batch, Draws(3, 0, batch.positions, B))
    losses.mean().backward()
    assert [n for n, p in trained if p.grad is None] == []
    assert sum(p.grad.abs().sum() > 0 for _, p in trained) > 0.7 * len(trained)


def test_stand_in_learns_from_gradients_that_are_the_loss_changing():
    """Along its gradient the loss changes as the gradient says: nothing on the way to the reference is detached."""
    recipe, trainee, batch = setting("stand_in")
    parameter = trainee.stand_in.up[0]["k"].requires_grad_(True)

    def loss() -> Tensor:
        return denoising_step(recipe, trainee, batch, Draws(3, 0, batch.positions, B))[0].mean()

    loss().backward()
    direction = parameter.grad / parameter.grad.norm()
    values = []
    for step in (1e-2, -1e-2):
        with torch.no_grad():
            parameter.add_(step * direction)
            values.append(loss().item())
            parameter.sub_(step * direction)
    slope = (values[0] - values[1]) / 2e-2
    assert slope == pytest.approx(parameter.grad.norm().item(), rel=0.02)


@pytest.mark.parametrize(("name", "adapter"), [("stand_in", "stand_in"), ("avatar", "audio_adapter"), ("vace", "vace")])
def test_checkpointing_changes_no_gradient(name, adapter):
    gradients = []
    for checkpointing in (False, True):
        recipe, trainee, batch = setting(name)
        if checkpointing:
            trainee.transformer.enable_gradient_checkpointing()
        trained = getattr(trainee, adapter).requires_grad_(True)
        denoising_step(recipe, trainee, batch, Draws(3, 0, batch.positions, B))[0].mean().backward()
        gradients.append({n: p.grad for n, p in trained.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-7, msg=name)


def test_a_fresh_stand_in_is_the_plain_reference_and_comes_back_under_released_names():
    model = tiny.transformer()
    fresh = TrainableStandIn(tiny.DIM, tiny.LAYERS, rank=4)
    with torch.no_grad():
        ours = fresh.encode(model, tiny.photo(), tiny.GRID)
        plain = tiny.stand_in(model).scaled(0.0).encode(model, [tiny.photo()], tiny.GRID)
    for (k, v), (plain_k, plain_v) in zip(ours.keys_values, plain.keys_values, strict=True):
        assert torch.equal(k, plain_k) and torch.equal(v, plain_v)
    down = torch.cat([p.flatten() for each in fresh.down for p in each.values()])
    assert abs(down.std() - 1 / 4) < 0.01  # N(0, 1/rank²)
    loaded = tiny.stand_in(model)
    again = TrainableStandIn.of(loaded).weights().state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in loaded.state_dict().items())


@torch.no_grad()
def test_hints_of_vace_at_once_are_those_one_by_one():
    _, trainee, batch = setting("vace")
    context, prompt = batch.parts["vace_context"], tiny.prompt()
    one_by_one, at_once = trainee.vace.plugin(context), hints_at_once(trainee.vace, context)
    latents = batch.mean
    results = [trainee.transformer(latents, tiny.TIMESTEP, prompt, plugins=[p]) for p in (one_by_one, at_once)]
    assert torch.equal(*results)


# ------------------------------------------------------------------------------------------------- what is dropped


class Spy:
    """In place of a network: keeps what it is given, and predicts zeros."""

    def __call__(self, latents, timestep, conditions):
        self.latents, self.timestep, self.conditions = latents, timestep, conditions
        return torch.zeros_like(latents)


def test_text_is_dropped_for_some_samples_and_replaced_by_the_empty_prompt():
    batch, spy = batch_of(), Spy()
    draw = Draws(3, 0, batch.positions, B)
    dropped = (draw.uniform("drop_text") < 0.4).tolist()
    assert 0 < sum(dropped) < B, "the seed is to show both"
    denoising_step(BaseRecipe(text_drop=0.4), spy, batch, draw)
    for row, drop in enumerate(dropped):
        assert spy.conditions.prompt.text[row] is (batch.empty_text if drop else batch.text[row])
    with pytest.raises(ValueError, match="empty prompt"):
        denoising_step(BaseRecipe(text_drop=1.0), spy, replace(batch, empty_text=None), draw)


def test_the_network_gets_x_sigma_and_its_timestep():
    batch, spy = batch_of(), Spy()
    table, indices = NoiseTable(), torch.tensor([0, 500, 999])
    draw = Draws(3, 0, batch.positions, B)
    losses, _ = denoising_step(BaseRecipe(text_drop=0), spy, batch, draw, indices=indices)
    clean = batch.mean + batch.std * draw.normal("posterior", batch.mean.shape[1:])
    noise = draw.normal("noise", clean.shape[1:])
    torch.testing.assert_close(spy.latents, add_noise(clean, noise, table.sigmas[indices]))
    assert torch.equal(spy.timestep, table.timesteps[indices])
    assert losses[0] == 0  # pure noise weighs nothing in the bell
    torch.testing.assert_close(losses, (noise - clean).square().mean((1, 2, 3, 4)) * table.weights[indices])


def test_known_frames_are_clean_at_timestep_0_and_not_in_the_loss():
    recipe, trainee, batch = setting("known_frames")
    seen = []
    trainee.transformer.register_forward_pre_hook(lambda _, args: seen.append(args))
    draw = Draws(3, 0, batch.positions, B)
    denoising_step(recipe, trainee, batch, draw)
    latents, timestep = seen[0][:2]
    assert torch.equal(latents[:, :, :1], batch.latents(draw)[:, :, :1])
    tokens = tiny.GRID[0] * tiny.GRID[1]
    assert timestep.shape == (B, 3 * tokens) and (timestep[:, :tokens] == 0).all() and (timestep[:, tokens:] > 0).all()
    prediction, target = torch.zeros_like(batch.mean), torch.zeros_like(batch.mean)
    prediction[:, :, 0] = 7
    assert recipe.loss(prediction, target, torch.full((B,), 0.5), batch, draw).tolist() == [0, 0, 0]


# ------------------------------------------------------------------------------------------------- error recycling


def always(**changes) -> ErrorRecyclingRecipe:
    shares = {"noise_error": 1.0, "image_error": 1.0, "video_error": 1.0, "clean": 0.0}
    return ErrorRecyclingRecipe(grids=6, **(shares | changes))


def test_each_error_goes_where_it_belongs(tmp_path):
    bank = ErrorBank(tmp_path / "bank", grids=6, per_grid=1, dtype="fp32")
    shape = tiny.latents().shape[1:]
    velocity, sigma = randn(1, *shape), torch.full((1,), 0.9)
    bucket = error_buckets(sigma * 1000, always().grid).item()
    bank.insert([RecycledError(0, bucket, 0.9, velocity)], choose=None)
    batch = some(batch_of(condition=tiny.latents(3, batch=B, channels=20)), [0])
    draw = Draws(3, 0, [0], B)
    clean, noise = batch.mean, tiny.latents(5)
    recipe = always(image_frames=2, last_frames=True)
    conditions = recipe.conditions(batch, draw)
    start, end, changed = recipe.corrupt(clean, noise, sigma, conditions, bank.view(), draw)
    torch.testing.assert_close(end - noise, 0.1 * velocity[None], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(start - clean, -0.9 * velocity[None], atol=1e-5, rtol=1e-4)
    difference = changed.image - conditions.image
    assert difference[:, :4].abs().max() == 0 and difference[:, :, 2:].abs().max() == 0
    torch.testing.assert_close(difference[0, 4:, :2], -0.9 * velocity[:, 1:], atol=1e-5, rtol=1e-4)
    for untouched in (always(clean=1.0), always(noise_error=0.0, image_error=0.0, video_error=0.0)):
        same = untouched.corrupt(clean, noise, sigma, conditions, bank.view(), draw)
        assert torch.equal(same[0], clean) and torch.equal(same[1], noise)
        assert torch.equal(same[2].image, conditions.image)


def test_an_empty_bank_corrupts_nothing(tmp_path):
    bank = ErrorBank(tmp_path / "bank", grids=6, per_grid=1)
    batch = batch_of(condition=tiny.latents(3, batch=B, channels=20))
    draw = Draws(3, 0, batch.positions, B)
    conditions = always().conditions(batch, draw)
    noise, sigma = tiny.latents(5, batch=B), torch.full((B,), 0.5)
    start, end, changed = always().corrupt(batch.mean, noise, sigma, conditions, bank.view(), draw)
    assert torch.equal(start, batch.mean) and torch.equal(end, noise) and torch.equal(changed.image, conditions.image)


def test_the_image_error_comes_from_the_buckets_that_are_asked_for(filled_bank):
    view, shape = filled_bank.view(), tuple(tiny.latents().shape[1:])
    counts = {
        choice: len(view.entries("video", shape, always(image_buckets=choice).buckets_for_image(2)))
        for choice in ("all", "current", (0, 3), (4, 99))
    }
    assert counts == {"all": 18, "current": 3, (0, 3): 12, (4, 99): 6}


def test_errors_of_clean_steps_are_seldom_kept():
    many = 400
    draw = Draws(0, 0, range(many), many)
    recipe = ErrorRecyclingRecipe(clean=0.5, clean_update=0.1)
    zeros = torch.zeros(many, 1, 1, 1, 1)
    errors = recipe.errors(zeros + 2, zeros + 0.5, torch.full((many,), 0.25), batch_of(), draw)
    assert abs(sum(e.kept for e in errors) / many - 0.55) < 5 * (0.55 * 0.45 / many) ** 0.5
    is_clean = (draw.uniform("clean") < 0.5).tolist()
    assert all(e.kept for e, clean in zip(errors, is_clean, strict=True) if not clean)
    assert errors[7].velocity.item() == 1.5 and errors[7].of("noise").item() == 1.125 and errors[7].position == 7


def test_dance_leaves_picture_and_features_out_together():
    recipe, _, batch = setting("dance")
    steps = (Draws(3, step, batch.positions, B) for step in range(50))
    draw = next(each for each in steps if 0 < recipe.drops_picture(each).sum() < B)
    dropped = draw.uniform("drop_condition") < recipe.condition_drop
    conditions = recipe.conditions(batch, draw)
    for row, drop in enumerate(dropped.tolist()):
        assert (conditions.image[row].abs().max() == 0) == drop
        assert (conditions.prompt.image[row].abs().max() == 0) == drop


# ------------------------------------------------------------------------------------------------------------- VAE


def test_vae_decodes_as_it_does_without_training_and_learns():
    autoencoder = fill_from_seed(AutoencoderKLWan(**tiny.CONFIG["vae"]), 1)  # diffusers' own, to the last layer
    trainee = VaeTrainee(copy.deepcopy(autoencoder)).requires_grad_(True)
    frames = randn(1, 1, 3, 5, 16, 16).clamp(-1, 1)
    draw = Draws(0, 0, [0], 1)
    with torch.no_grad():
        decoded, mean, _ = trainee(frames, torch.zeros(1, 16, 2, 2, 2))
        latents = autoencoder.encode(frames).latent_dist.mode()
        torch.testing.assert_close(mean, latents)
        torch.testing.assert_close(decoded.clamp(-1, 1), autoencoder.decode(latents).sample, rtol=1e-3, atol=1e-4)
    recipe = VaeRecipe(kl=1e-3)
    optimizer = torch.optim.Adam(trainee.parameters(), lr=3e-3)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = vae_step(recipe, trainee, frames, draw, (16, 2, 2, 2)).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.92 * losses[0]
    assert all(p.grad is not None for p in trainee.parameters())


def test_vae_in_bfloat16_is_nearly_the_same_and_keeps_float32_weights():
    autoencoder = fill_from_seed(AutoencoderKLWan(**tiny.CONFIG["vae"]), 1)
    frames, noise = randn(1, 2, 3, 1, 32, 32).clamp(-1, 1), torch.zeros(2, 16, 1, 4, 4)
    exact, rounded = (
        VaeTrainee(copy.deepcopy(autoencoder), dtype).requires_grad_(True) for dtype in (torch.float32, torch.bfloat16)
    )
    a, b = exact(frames, noise)[0], rounded(frames, noise)[0]
    assert b.dtype == torch.float32 and 0 < (a - b).norm() / a.norm() < 0.05
    b.mean().backward()
    assert {p.dtype for p in rounded.parameters()} == {torch.float32}


def test_edges_cost_what_neighbors_differ_by():
    frames = torch.zeros(2, 3, 1, 4, 4)
    shifted, edge = frames + 0.5, frames.clone()
    edge[..., 2:, :] = 1  # one step of 1 in three of twelve places down each column, none along rows
    assert edge_difference(shifted, frames).tolist() == [0, 0]
    torch.testing.assert_close(edge_difference(edge, frames), torch.full((2,), 1 / 3))
    plain, with_edges = VaeRecipe(kl=0), VaeRecipe(kl=0, edges=0.5)
    zeros = torch.zeros(2, 1)
    extra = with_edges.loss(edge, frames, zeros, zeros) - plain.loss(edge, frames, zeros, zeros)
    torch.testing.assert_close(extra, torch.full((2,), 0.5 / 3))
