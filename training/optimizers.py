"""Optimisers by name, the learning rate as a function of the step, and float32 masters of what is trained.

Weights trained in bfloat16 alone stand still: at a learning rate of 2e-5 seven in ten steps round to nothing. So every
trained parameter has a float32 value that the optimiser moves; the model's own is a rounded copy of it.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from errors import UsageError

# name -> (package, what pip installs, its class); None: PyTorch's own
OPTIMIZERS = {
    "adamw": None,
    "adafactor": None,
    "muon": None,
    "adamw8bit": ("bitsandbytes.optim", "bitsandbytes", "AdamW8bit"),
    "prodigy": ("prodigyopt", "prodigyopt", "Prodigy"),
    "schedulefree": ("schedulefree", "schedulefree", "AdamWScheduleFree"),
}
SCHEDULES = ("constant", "cosine", "linear")
REDUCED_AT_ONCE = 2**26  # numbers of one all-reduce


class Masters:
    """Float32 values of trained parameters, by name. A parameter that is float32 is its own master."""

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]]):
        self.parameters = {name: parameter for name, parameter in parameters if parameter.requires_grad}
        self.values: dict[str, nn.Parameter] = {
            name: p if p.dtype == torch.float32 else nn.Parameter(p.detach().float())
            for name, p in self.parameters.items()
        }

    def collect(self) -> None:
        """After each backward pass: add the gradients to the masters', which sum them in float32."""
        for name, parameter in self.parameters.items():
            master = self.values[name]
            if master is parameter or parameter.grad is None:
                continue
            gradient = parameter.grad.float()
            master.grad = gradient if master.grad is None else master.grad.add_(gradient)
            parameter.grad = None

    suffix = ""  # of the files in a checkpoint: one process writes them for all

    def finish(self) -> None:
        """After the last backward pass of a step: add up all processes' gradients. What took no part in it has zero, so
        that all processes reduce the same list.
        """
        for master in self.values.values():
            if master.grad is None:
                master.grad = torch.zeros_like(master)
        sum_over_processes([value.grad for value in self.values.values()])

    def norm(self) -> float:
        """Of the gradient of all tensors."""
        return torch.nn.utils.get_total_norm([value.grad for value in self.values.values()]).item()

    @torch.no_grad()
    def publish(self) -> None:
        """After the optimiser's step: round the masters into the model."""
        for name, parameter in self.parameters.items():
            if self.values[name] is not parameter:
                parameter.copy_(self.values[name])

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over saved values; their names must be exactly these."""
        if tensors.keys() != self.values.keys():
            raise UsageError(
                f"the saved weights are of other parameters, first {sorted(tensors.keys() ^ self.values)[0]}"
            )
        for name, master in self.values.items():
            master.copy_(tensors[name])
        self.publish()


def sum_over_processes(gradients: list[Tensor]) -> None:
    """Add up all processes' gradients, in place; in float32 and in pieces of one size, whatever the parameters'."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    piece: list[Tensor] = []
    for number, gradient in enumerate(gradients):
        piece.append(gradient)
        if sum(each.numel() for each in piece) >= REDUCED_AT_ONCE or number == len(gradients) - 1:
            flat = torch.cat([each.flatten() for each in piece])
            dist.all_reduce(flat)
            for each, summed in zip(piece, flat.split([each.numel() for each in piece]), strict=True):
                each.copy_(summed.view_as(each))
            piece = []


def group_of(name: str) -> str:
    """The group of a trainee's parameter: lora, transformer, or adapter for what stands beside the transformer."""
    if "lora_" in name:
        return "lora"
    return "transformer" if name.startswith("transformer.") else "adapter"


GROUPS = ("lora", "transformer", "adapter")


# Layers where a network begins and ends, and those of time: their rows are not alike, and Muon leaves them to AdamW.
OUTER_LAYERS = (
    *("embedding", "img_emb", "time_projection", "modulation", "head.head"),
    *("conv_in", "conv_out", "quant_conv"),
)


def is_hidden(name: str, value: Tensor) -> bool:
    """Whether a parameter is a matrix inside a network, which Muon moves: a linear's, or a convolution's kernel."""
    is_matrix = value.ndim > 1 and value.shape[0] > 1 and value[0].numel() > 1
    return is_matrix and not any(layer in name for layer in OUTER_LAYERS)


def parameter_groups(
    masters: Mapping[str, nn.Parameter],
    lr: float,
    weight_decay: float,
    multiples: Mapping[str, float] | None = None,
    names: Iterable[str] | None = None,
) -> list[dict]:
    """Groups for an optimiser: by `group_of`, whose learning rate is a multiple of `lr`; vectors do not decay.

    names: of all that is trained, where other processes have a part of it.

    Raises:
        UsageError: a multiple for a group that has no parameters here.
    """
    multiples = multiples or {}
    groups = {group_of(name) for name in (masters if names is None else names)}
    found: dict[tuple[str, bool, bool], list[nn.Parameter]] = {}
    for name, master in masters.items():
        found.setdefault((group_of(name), master.ndim > 1, is_hidden(name, master)), []).append(master)
    if unknown := multiples.keys() - groups:
        present = ", ".join(sorted(groups))
        raise UsageError(f"optim.groups: {min(unknown)!r} has no trained parameters here; there are {present}")
    return [
        {
            "params": parameters,
            "lr": lr * multiples.get(name, 1.0),
            "weight_decay": weight_decay if decays else 0.0,
            "multiple": multiples.get(name, 1.0),
            "hidden": hidden,
        }
        for (name, decays, hidden), parameters in found.items()
    ]


def make_optimizer(
    name: str, groups: Sequence[dict], *, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, warmup: int = 0
) -> torch.optim.Optimizer:
    """An optimiser over `parameter_groups`.

    Args:
        name: of `OPTIMIZERS`. Muon moves matrices inside networks, AdamW the rest, both at the same learning rate.
        betas, eps: of those that have them.
        warmup: steps; only schedulefree does its own.

    Raises:
        UsageError: an unknown name, or a package that is not installed.
    """
    if name not in OPTIMIZERS:
        raise UsageError(f"optim.name: {name!r} is not one of {', '.join(OPTIMIZERS)}")
    if name == "adamw":
        return torch.optim.AdamW(groups, betas=betas, eps=eps)
    if name == "adafactor":
        return torch.optim.Adafactor(groups)
    if name == "muon":
        return MuonAndAdamW(groups, betas, eps)
    optimizer = imported(name, *OPTIMIZERS[name])
    if name == "prodigy":  # finds the step size itself: lr is a factor on it, 1 in its paper
        return optimizer(groups, betas=betas, eps=eps, use_bias_correction=True, safeguard_warmup=True)
    if name == "schedulefree":
        made = optimizer(groups, betas=betas, eps=eps, warmup_steps=warmup)
        made.train()  # it has two sets of weights; see `averaged`
        return made
    return optimizer(groups, betas=betas, eps=eps)


def imported(name: str, module: str, package: str, optimizer: str) -> Callable:
    """The class of an optional package.

    Raises:
        UsageError: it is not installed; the message says how to.
    """
    try:
        return getattr(__import__(module, fromlist=[optimizer]), optimizer)
    except ImportError as error:
        raise UsageError(f"optim.name {name} needs {package}: pip install {package}, or give adamw") from error


@contextlib.contextmanager
def averaged(optimizer: torch.optim.Optimizer, masters: Masters) -> Iterator[None]:
    """While weights are saved or tried: have the model hold those to be used. Schedule-free trains at others, and uses
    their mean; with every other optimiser the two are one.
    """
    if not hasattr(optimizer, "eval"):
        yield
        return
    optimizer.eval()
    masters.publish()
    try:
        yield
    finally:
        optimizer.train()
        masters.publish()


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon for hidden matrices and AdamW for all else, as one optimiser.

    Muon's update is scaled to the root mean square of AdamW's (match_rms_adamw), so that one learning rate fits both.
    A convolution's kernel is moved as the matrix (out, in · positions) that shares its memory.
    Source: Keller Jordan, "Muon" (2024), and Moonlight (arXiv 2502.16982) section 2.2 for the scale.
    """

    def __init__(self, groups: Sequence[dict], betas: tuple[float, float], eps: float):
        others = [group for group in groups if not group["hidden"]]
        matrices, self.kernels = [], []
        for group in groups:
            if group["hidden"]:
                flat = [(p, p if p.ndim == 2 else nn.Parameter(p.detach().flatten(1))) for p in group["params"]]
                self.kernels += [(kernel, matrix) for kernel, matrix in flat if kernel is not matrix]
                assert all(matrix.data_ptr() == kernel.data_ptr() for kernel, matrix in flat)
                matrices.append(group | {"params": [matrix for _, matrix in flat]})
        self.parts = []
        if matrices:
            self.parts.append(torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw"))
        if others:
            self.parts.append(torch.optim.AdamW(others, betas=betas, eps=eps))
        # Not super().__init__: the groups are the parts' own, so that a new learning rate reaches them.
        self.defaults: dict = {}
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    @property
    def state(self) -> dict:
        return {parameter: state for part in self.parts for parameter, state in part.state.items()}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for kernel, matrix in self.kernels:
            matrix.grad = None if kernel.grad is None else kernel.grad.flatten(1)
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none)
        for kernel, _ in self.kernels:
            kernel.grad = None

    def state_dict(self) -> dict:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)


def learning_rate(step: int, steps: int, lr: float, schedule: str, warmup: int) -> float:
    """The rate of a step, from 0 on: up in a straight line over `warmup` steps, then constant, or down to 0 at `steps`.

    It is a function of the step, so a resumed run has nothing to restore.
    """
    if step < warmup:
        return lr * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    if schedule == "cosine":
        return lr * 0.5 * (1 + math.cos(math.pi * min(done, 1)))
    if schedule == "linear":
        return lr * max(0.0, 1 - done)
    assert schedule == "constant", schedule
    return lr


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group its multiple of the rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["multiple"]
