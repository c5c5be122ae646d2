"""ZeRO stage 2: float32 values, gradients and moments of what is trained, each in one process; weights in all of them.

Tensors are shared out whole and not in slices. So an owner's step is to the bit what a lone process would do with the
same gradient, Muon sees its matrices, and what a process saves another number of processes can read.

Source: arXiv 1910.02054, section 5.3.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from errors import UsageError

AT_ONCE = 2**26  # numbers of one reduction or broadcast


def owners(sizes: Mapping[str, int], ranks: int) -> dict[str, int]:
    """Which process has which tensor: the largest first, each to whoever has least; the same in every process.

    Raises:
        UsageError: fewer tensors than processes.
    """
    if len(sizes) < ranks:
        raise UsageError(f"memory.sharding zero2: {len(sizes)} tensors are trained, in {ranks} processes; give none")
    held = [0] * ranks
    found = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        found[name] = held.index(min(held))
        held[found[name]] += sizes[name]
    return {name: found[name] for name in sizes}


def pieces(names: Iterable[str], sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """Names whose tensors go together."""
    piece: list[str] = []
    for name in names:
        piece.append(name)
        if sum(sizes[each] for each in piece) >= AT_ONCE:
            yield piece
            piece = []
    if piece:
        yield piece


class ShardedMasters:
    """As `training.optimizers.Masters`, of the tensors that this process owns. Every method is called by all processes.

    values: the float32 masters of this process, by name. A float32 parameter of its own is its master.
    """

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]]):
        self.parameters = {name: parameter for name, parameter in parameters if parameter.requires_grad}
        self.sizes = {name: parameter.numel() for name, parameter in self.parameters.items()}
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.owner = owners(self.sizes, self.ranks)
        self.values: dict[str, nn.Parameter] = {
            name: parameter if parameter.dtype == torch.float32 else nn.Parameter(parameter.detach().float())
            for name, parameter in self.parameters.items()
            if self.owner[name] == self.rank
        }
        self.sums: dict[str, Tensor] = {}  # gradients so far

    @property
    def suffix(self) -> str:
        """Of this process's files in a checkpoint."""
        return f"-{self.rank}"

    def shared_out(self, dtype: torch.dtype | None = None) -> Iterator[tuple[int, list[str]]]:
        """(owner, names) of all tensors, of one type if that is given, in pieces."""
        for owner in range(self.ranks):
            names = [name for name, each in self.owner.items() if each == owner]
            chosen = [name for name in names if dtype in (None, self.parameters[name].dtype)]
            yield from ((owner, piece) for piece in pieces(chosen, self.sizes))

    def collect(self) -> None:
        """After each backward pass: sum the gradients over all processes, each in its owner, and drop the others."""
        for owner, names in self.shared_out():
            gradients = [self.parameters[name].grad for name in names]
            for name in names:
                self.parameters[name].grad = None
            flat = torch.cat([
                torch.zeros(self.sizes[name], device=self.parameters[name].device)
                if gradient is None
                else gradient.float().flatten()
                for name, gradient in zip(names, gradients, strict=True)
            ])  # fmt: skip
            dist.reduce(flat, dst=owner)
            if owner != self.rank:
                continue
            for name, summed in zip(names, flat.split([self.sizes[name] for name in names]), strict=True):
                summed = summed.view_as(self.parameters[name])
                self.sums[name] = self.sums[name].add_(summed) if name in self.sums else summed.clone()

    def finish(self) -> None:
        """After the last backward pass of a step: the gradients are where the optimiser looks for them."""
        for name, value in self.values.items():
            value.grad = self.sums.pop(name)

    def norm(self) -> float:
        """Of the gradient of all tensors."""
        squares = torch.stack([value.grad.square().sum() for value in self.values.values()]).sum()
        dist.all_reduce(squares)
        return squares.sqrt().item()

    @torch.no_grad()
    def publish(self) -> None:
        """After the optimiser's step: round the masters into the model, in all processes."""
        for name, value in self.values.items():
            if self.parameters[name] is not value:
                self.parameters[name].copy_(value)
        for dtype in sorted({parameter.dtype for parameter in self.parameters.values()}, key=str):
            for owner, names in self.shared_out(dtype):
                flat = torch.cat([self.parameters[name].detach().flatten() for name in names])
                dist.broadcast(flat, src=owner)
                if owner != self.rank:
                    for name, part in zip(names, flat.split([self.sizes[name] for name in names]), strict=True):
                        self.parameters[name].copy_(part.view_as(self.parameters[name]))

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over saved values: of all parameters, or of those that this process owns.

        Raises:
            UsageError: they are of others.
        """
        if tensors.keys() not in (self.parameters.keys(), self.values.keys()):
            odd = sorted(tensors.keys() ^ self.parameters.keys())[0]
            raise UsageError(f"the saved weights are of other parameters, first {odd}")
        for name, master in self.values.items():
            master.copy_(tensors[name])
        self.publish()


# ------------------------------------------------------------------------------------------ states of optimisers


def parts_of(optimizer: torch.optim.Optimizer) -> Sequence[torch.optim.Optimizer]:
    """Muon and AdamW run as one; every other optimiser is its own part."""
    return getattr(optimizer, "parts", [optimizer])


def names_in(part: torch.optim.Optimizer, optimizer: torch.optim.Optimizer, values: Mapping[str, Tensor]) -> list[str]:
    """The names of a part's parameters, in the order of its state."""
    names = {id(value): name for name, value in values.items()}
    names |= {id(matrix): names[id(kernel)] for kernel, matrix in getattr(optimizer, "kernels", ())}
    return [names[id(parameter)] for group in part.param_groups for parameter in group["params"]]


def state_of(optimizer: torch.optim.Optimizer, values: Mapping[str, Tensor]) -> list[dict]:
    """What a checkpoint has of an optimiser: of each part its state, and whose it is."""
    return [{"names": names_in(part, optimizer, values), "state": part.state_dict()} for part in parts_of(optimizer)]


def load_state(optimizer: torch.optim.Optimizer, values: Mapping[str, Tensor], saved: Sequence[Sequence[dict]]) -> None:
    """Take over what processes saved, as many of them as there were.

    saved: `state_of` each.
    """
    for number, part in enumerate(parts_of(optimizer)):
        wanted = names_in(part, optimizer, values)
        own = next((each[number] for each in saved if len(each) > number and each[number]["names"] == wanted), None)
        if own is not None:
            part.load_state_dict(own["state"])
            continue
        everyones = [entry for each in saved for entry in each]
        states = {
            entry["names"][index]: state for entry in everyones for index, state in entry["state"]["state"].items()
        }
        template = part.state_dict()
        kept = ("params", "lr", "weight_decay", "multiple", "hidden")
        shared = {k: v for k, v in everyones[0]["state"]["param_groups"][0].items() if k not in kept}
        groups = [{**group, **{k: v for k, v in shared.items() if k in group}} for group in template["param_groups"]]
        found = {index: states[name] for index, name in enumerate(wanted) if name in states}
        part.load_state_dict({"state": found, "param_groups": groups})
