"""Golden kinds of training: steps of Stand-In, StableAvatar and SVI with given draws; the error bank."""

import random
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from models.audio_adapter import adapter_from_tensors, split_adapter
from models.wan.schedulers import get_schedule
from pipelines.long_video.clip_conditions import frames_to_condition, picture_to_frame
from tests.golden_checks.dit import build_transformer
from tests.golden_checks.long_video import StubVAE
from tests.golden_checks.stand_in import build_stand_in
from training.error_bank import ErrorBank
from training.error_recycling import error_buckets
from training.losses import MASKS, masks_on_latents, motion_difference
from training.noise import NoiseTable
from training.recipes.avatar import AvatarRecipe
from training.recipes.base import Batch, denoising_step
from training.recipes.error_recycling import ErrorRecyclingRecipe
from training.recipes.stand_in import StandInRecipe
from training.trainee import TrainableStandIn, Trainee


@dataclass(frozen=True)
class GivenDraws:
    """Draws of one sample that are known: what a case recorded of upstream's. What is not given must not be asked."""

    uniforms: dict[str, float] = field(default_factory=dict)
    choices: dict[str, int] = field(default_factory=dict)
    normals: dict[str, Tensor] = field(default_factory=dict)
    positions: tuple[int, ...] = (0,)

    def of(self, row: int) -> "GivenDraws":
        assert row == 0
        return self

    def uniform(self, purpose: str) -> Tensor:
        # A share of 1 is reached by no probability: dropouts that upstream does not have do not happen.
        unused = 1.0 if purpose.startswith("drop_") or purpose == "clip_level" else None
        return torch.tensor([self.uniforms.get(purpose, unused)], dtype=torch.float64)

    def integers(self, purpose: str, high: int) -> Tensor:
        assert 0 <= self.choices[purpose] < high
        return torch.tensor([self.choices[purpose]])

    def normal(self, purpose: str, shape) -> Tensor:
        return self.normals[purpose].view(1, *shape)


def recording(trainee, seen: list):
    """The trainee, with what each call got and gave in `seen`."""

    def call(latents: Tensor, timestep: Tensor, conditions) -> Tensor:
        prediction = trainee(latents, timestep, conditions)
        seen.append((latents, timestep, conditions, prediction))
        return prediction

    return call


# -------------------------------------------------------------------------------------------------------- Stand-In


def check_stand_in_step(case) -> None:
    config, inputs = case.config, case.inputs
    transformer, weights = build_stand_in(config, case.weights())
    stand_in = TrainableStandIn.of(weights)
    table = NoiseTable(shift=config["sigma_shift"], size=config["num_train_timesteps_list"])
    index = torch.tensor([config["timestep_id"]])
    case.check("sigmas", table.sigmas)
    case.check("timesteps", table.timesteps)
    case.check("loss_weights", table.weights)
    case.check("timestep", table.timesteps[index])

    batch = Batch([0], inputs["input_latents"], inputs["context"], parts={"reference": inputs["ip_image_latent"]})
    draws = GivenDraws(normals={"noise": inputs["noise"]})
    losses, errors = denoising_step(
        StandInRecipe(noise=table), Trainee(transformer, stand_in=stand_in), batch, draws, indices=index
    )
    case.check("loss", losses)
    assert errors == []
    losses.sum().backward()
    for name in (name for name in case.outputs if name.startswith("grad.")):
        _, _, block, _, layer, direction, _ = name.split(".")  # grad.blocks.0.self_attn.q_loras.down.weight
        parameter = getattr(stand_in, direction)[int(block)][layer[0]]
        assert parameter.grad is not None, f"{name}: missing, which a reduction over processes waits for"
        case.check(name, parameter.grad)


# ---------------------------------------------------------------------------------------------------- StableAvatar


def check_avatar_step(case) -> None:
    config, inputs, outputs = case.config, case.inputs, case.outputs
    base, vocal = split_adapter(case.weights())
    transformer = build_transformer(config["dit"], base)
    adapter = adapter_from_tensors(vocal, transformer)
    trainee = Trainee(transformer, audio_adapter=adapter)
    trained = {name for name, parameter in trainee.named_parameters() if AvatarRecipe().trains(name, "full")}
    assert len(trained) == config["n_trainable"]
    frozen = {name for name, _ in trainee.named_parameters()} - trained
    assert frozen == {f"transformer.{name}" for name in config["frozen"]}
    trainee.requires_grad_(True)
    table = NoiseTable(shift=config["shift"], weighting="none")
    index = torch.tensor([config["timestep_index"]])
    case.check("sigma", table.sigmas[index])
    case.check("timestep", table.timesteps[index])

    parts = {
        "masked": inputs["ref_latents"],
        "clip": inputs["clip_fea"],
        "audio": inputs["vocal_embeddings"],
        "face_mask": inputs["face_mask"],
        "lip_mask": inputs["lip_mask"],
    }
    batch = Batch([0], inputs["latents"], [inputs["context"]], parts=parts)
    assert config["video_sample_n_frames"] == inputs["face_mask"].shape[2]
    for name in ("face", "lip"):
        case.check(f"{name}_mask_latent", masks_on_latents(inputs[f"{name}_mask"], inputs["latents"].shape[2:]))
    full, face = config["mask_flag_thresholds"]
    recipe = AvatarRecipe(
        noise=table, masks=(full, face - full), motion_loss=config["motion_sub_loss_ratio"], motion_axis="legacy"
    )
    for mask in MASKS:
        seen: list = []
        draws = GivenDraws(uniforms={"mask": config["flags"][mask]}, normals={"noise": inputs["noise"]})
        trainee.zero_grad()
        losses, _ = denoising_step(recipe, recording(trainee, seen), batch, draws, indices=index)
        case.check(f"total_{mask}", losses[0])
        whole = replace(recipe, motion_loss=0.0)
        (noisy, _, conditions, prediction) = seen[0]
        target = inputs["noise"] - inputs["latents"]
        case.check(f"loss_{mask}", whole.loss(prediction, target, table.sigmas[index], batch, draws)[0])
        losses.sum().backward()
        gradients = dict(transformer.named_parameters()) | dict(adapter.named_parameters())
        for name in outputs:
            if name.startswith(f"grad_{mask}:"):
                case.check(name, gradients[name.partition(":")[2]].grad)
    case.check("target", target)
    case.check("noisy_latents", noisy)
    case.check("mask_channels", conditions.image[:, :4])
    case.check("noise_pred", prediction)
    case.check("sub_loss", motion_difference(prediction, target, "legacy")[0])


# ------------------------------------------------------------------------------------------------------------- SVI


def fill(bank: ErrorBank, kind: str, bucket: int, errors: Iterable[Tensor]) -> None:
    for error in errors:
        bank.put(kind, bucket, error, 0.0, choose=None)


def injections(config: dict, draws: list[float]) -> tuple[dict[str, float], dict[str, int]]:
    """The case's draws by our names for them. A choice or a factor is recorded for what was injected, in order."""
    random_draws = list(draws["random"])
    uniforms = {"motion": 0.0}
    random_draws.pop(0)  # p_motion, which nothing reads
    if config["num_motion_frames"] > 1:
        uniforms["motion"] = random_draws.pop(0)
    random_draws.pop(0)  # unused
    for name in ("into_noise", "into_image", "into_video", "clean"):
        uniforms[name] = random_draws.pop(0)
    uniforms["clean_update"] = random_draws.pop(0) if uniforms["clean"] < config["clean_prob"] else 1.0
    choices = {"image_start": draws["frame"]}
    shares = {"noise": config["noise_prob"], "image": config["y_prob"], "video": config["latent_prob"]}
    banked = {config["bucket"], config["other_bucket"]}
    if isinstance(allowed := image_buckets(config), tuple) and not banked & set(range(allowed[0], allowed[1] + 1)):
        del shares["image"]  # no error of these buckets is there to be put in
    injected = [name for name, share in shares.items() if uniforms[f"into_{name}"] < share]
    if uniforms["clean"] >= config["clean_prob"]:
        for name, choice, factor in zip(injected, draws["choice"], draws["uniform"], strict=False):
            choices[f"{name}_entry"], uniforms[f"{name}_factor"] = choice, factor
    return uniforms, choices


def image_buckets(config: dict) -> str | tuple[int, int]:
    given = config["y_error_sample_range"]
    if given is not None:
        if isinstance(given, str):  # timesteps; upstream's conversion to buckets fits another number of them
            given = [int(part) // config["timestep_grid_size"] for part in given.split(",")]
        return tuple(given)
    return "all" if config["y_error_sample_from_all_grids"] else "current"


def check_erft_step(case) -> None:
    config, inputs = case.config, case.inputs
    weights = case.weights()
    stubs = {name: weights.pop(name) for name in list(weights) if "stub" in name}
    vae = StubVAE(stubs)
    transformer = build_transformer(config["dit"], weights)
    height, width = config["height"], config["width"]
    pictures = [picture_to_frame(p.to(torch.uint8).numpy(), height, width) for p in inputs["first_ref_frames"]]
    reference = picture_to_frame(inputs["random_ref_frame"].to(torch.uint8).numpy(), height, width)

    def condition(frames: list[Tensor]) -> Tensor:
        return frames_to_condition(
            vae,
            torch.cat(frames, dim=2),
            config["num_frames"],
            reference=reference,
            reference_frames=config["ref_pad_num"],
            marks_all=config["ref_pad_cfg"],
        ).y

    count = config["num_motion_frames"]
    repeated = count if config["repeat_first_frame"] and count > 1 else 1
    parts = {"condition": condition(pictures[:1] * repeated)}
    if "clip_stub.weight" in stubs:
        parts["clip"] = stubs["clip_stub.weight"][None] * (1 + pictures[0].mean())
        case.check("clip_feature", parts["clip"])
    if count > 1:
        parts["condition_motion"] = condition(pictures[:count])
    batch = Batch([0], vae.encode(inputs["video"]), inputs["context"], parts=parts)
    case.check("latents", batch.mean)

    table = NoiseTable()
    index = torch.tensor([config["timestep_index"]])
    grids = config.get("num_grids", 50)
    recipe = ErrorRecyclingRecipe(
        variant="film" if count > 1 else "shot",
        noise=table,
        noise_error=config["noise_prob"],
        image_error=config["y_prob"],
        video_error=config["latent_prob"],
        clean=config["clean_prob"],
        clean_update=config["clean_buffer_update_prob"],
        motion=config["p_motion_threshold"],
        grids=grids,
        modulate=config["error_modulate_factor"],
        image_frames=config["y_error_num"],
        image_buckets=image_buckets(config),
        last_frames=config["use_last_y_error"],
    )
    bucket = error_buckets(table.timesteps[index], recipe.grid)
    assert bucket.item() == config["bucket"]
    case.check("grid_idx", bucket[0])

    uniforms, choices = injections(config, config["draws"])
    draws = GivenDraws(uniforms, choices, {"noise": inputs["noise"]})
    seen: list = []
    with tempfile.TemporaryDirectory() as folder:
        size = config["error_buffer_size"]
        bank = ErrorBank(Path(folder, "bank"), grids=grids, per_grid=size, storage="two_banks", dtype="fp32")
        for kind in ("noise", "video"):
            given = inputs.get(f"{kind}_err", ())  # an empty bank has none
            fill(bank, kind, config["bucket"], given[:2])
            fill(bank, kind, config["other_bucket"], given[2:])
        trainee = recording(Trainee(transformer), seen)
        losses, errors = denoising_step(recipe, trainee, batch, draws, bank.view(), index)
        before = bank.view().cells
        if config["use_error_recycling"]:
            bank.insert(errors, choose=lambda position, kind, count: 0)
        case.check("bank_updated", int(bank.view().cells != before))
    noisy, _, conditions, prediction = seen[0]
    sigma = table.sigmas[index].item()
    case.check("loss", losses)
    case.check("noisy_latents", noisy)
    case.check("y", conditions.image)
    case.check("velocity_pred", prediction)
    # Of x_σ = (1-σ)·x̃ + σ·ñ and V = ñ - x neither ñ nor V leaves the step; both follow from what does.
    (error,) = errors
    target = prediction - error.velocity[None]
    case.check("training_target", target)
    case.check("noise_injected", target + batch.mean)
    for kind in ("noise", "video") if config["use_error_recycling"] else ():
        case.check(f"{kind}_error", error.of(kind)[None])
    assert error.sigma == sigma


STRATEGIES = {"l2_batch": "l2", "l2_similarity": "l2", "l2": "l2", "random": "random", "fifo": "fifo"}


def check_error_bank(case) -> None:
    config, inputs = case.config, case.inputs
    grid = get_schedule("euler", config["num_grids"], 5.0).timesteps
    buckets = error_buckets(inputs["timesteps"], grid)
    case.check("grid_idx", buckets)
    errors = {kind: inputs[f"{kind}_errors"].squeeze(1) for kind in ("noise", "video")}
    with tempfile.TemporaryDirectory() as folder:
        bank = ErrorBank(
            Path(folder, "bank"),
            grids=config["num_grids"],
            per_grid=config["capacity"],
            replace=STRATEGIES[config["strategy"]],
            storage="two_banks",
            dtype="fp32",
        )
        random.seed(config["python_seed_add"])
        for i, bucket in enumerate(buckets.tolist()):
            for kind, of_kind in errors.items():
                bank.put(kind, bucket, of_kind[i], 0.0, choose=lambda count: random.randint(0, count - 1))
        view, shape = bank.view(), tuple(errors["noise"].shape[1:])
        for kind, of_kind in errors.items():
            rows = []
            for bucket in range(config["num_grids"]):
                for slot, entry in enumerate(view.entries(kind, shape, [bucket])):
                    same = (of_kind == view.read(kind, entry)).flatten(1).all(dim=1)
                    rows.append((bucket, slot, same.nonzero().item()))
            case.check(f"{kind}_bank", torch.tensor(rows).view(-1, 3))

        low, high = config["sample_range_grids"]
        whole = ErrorRecyclingRecipe(grids=config["num_grids"], modulate=config["error_modulate_factor"])
        part = replace(whole, image_buckets=(low, high))
        random.seed(config["python_seed_sample"])
        current = buckets[0].item()
        for name, kind, chosen in (
            ("noise", "noise", [current]),
            ("video", "video", [current]),
            ("image_all", "video", whole.buckets_for_image(current)),
            ("image_range", "video", part.buckets_for_image(current)),
        ):
            drawn = [whole.sampled(view, name, kind, shape, chosen, PythonDraws(), torch.zeros(1)) for _ in range(3)]
            case.check(f"sample_{name}", torch.stack(drawn)[:, None])


class PythonDraws:
    """Python's own generator, asked in upstream's order: which entry, then the factor."""

    def integers(self, purpose: str, high: int) -> Tensor:
        return torch.tensor([random.choice(range(high))])

    def uniform(self, purpose: str) -> Tensor:
        return torch.tensor([random.random()], dtype=torch.float64)


CHECKS = {
    "stableavatar_train_step": check_avatar_step,
    "standin_train_step": check_stand_in_step,
    "svi_erft_training_step": check_erft_step,
    "svi_error_bank": check_error_bank,
}
