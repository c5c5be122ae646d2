"""Golden kinds of the schedules and solvers."""

import torch

from models.wan.schedulers import expert_index, get_schedule, make_solver


def check_flow_scheduler(case) -> None:
    for combo in case.config["combos"]:
        steps, shift = combo["steps"], combo["shift"]
        key = f"s{steps}_sh{shift:g}"
        schedule = get_schedule(case.config["solver"], steps, shift)
        case.check(f"sigmas_{key}", schedule.sigmas[: len(case.outputs[f"sigmas_{key}"])])
        assert schedule.timesteps.dtype == case.outputs[f"timesteps_{key}"].dtype
        case.check(f"timesteps_{key}", schedule.timesteps)

        solver = make_solver(schedule)
        sample, noise, trajectory = case.inputs[f"latent_{key}"], case.inputs[f"model_noise_{key}"], []
        for i in range(steps):
            sample = solver.step(0.7 * noise[i % 8] + 0.3 * sample, i, sample)
            trajectory.append(sample)
        kept = case.outputs[f"traj_idx_{key}"]
        case.check(f"traj_{key}", torch.stack([trajectory[i] for i in kept.tolist()]))
        case.checked.add(f"traj_idx_{key}")  # which steps the file keeps: an index, not a result


def check_expert_schedule(case) -> None:
    for i, row in enumerate(case.config["rows"]):
        schedule = get_schedule(
            "euler", row["num_inference_steps"], row["sigma_shift"], strength=row["denoising_strength"]
        )
        case.check(f"{i}.sigmas", schedule.sigmas[:-1])
        case.check(f"{i}.timesteps", schedule.timesteps)
        experts = torch.tensor([expert_index(t, row["switch_DiT_boundary"]) for t in schedule.timesteps])
        case.check(f"{i}.expert", experts)
        # Upstream hands the reference to the first positive call of each expert; that is where ours is encoded.
        first = torch.cat((torch.ones(1, dtype=torch.bool), experts[1:] != experts[:-1])).long()
        case.check(f"{i}.posi_has_ip", first)
        case.check(f"{i}.nega_has_ip", torch.zeros_like(first))


CHECKS = {"flow_scheduler": check_flow_scheduler, "standin_expert_schedule": check_expert_schedule}
