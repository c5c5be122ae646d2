"""Linears whose weights are stored in float8, in half the memory of bfloat16, and widened as they run.

float8 (e4m3) has three bits of fraction. Released fp8 files may carry a scale for each weight; it is kept beside the
weight, so that what is computed is exactly what the file says.

    use_float8(model)      on the meta device before its file is read, or on a model that is there already
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STORAGE = torch.float8_e4m3fn
# What is kept as a file has it. e5m2 reaches down to 2^-16, with a bit less of fraction, e4m3 to 2^-9: cast to it, the
# small weights would be rounded away.
KEPT = (torch.float8_e4m3fn, torch.float8_e5m2)


class Float8Linear(nn.Linear):
    """y = x (scale · W)ᵀ + b, with W in one of `KEPT`, one number or one per output row as scale, and b as it was."""

    scale: Tensor | None = None  # not a buffer: casts of the model must leave it float32

    @classmethod
    def like(cls, linear: nn.Linear) -> "Float8Linear":
        """A linear with these weights, cast one by one; on the meta device, with room for them."""
        made = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        made.weight = nn.Parameter(linear.weight.data.to(STORAGE), requires_grad=False)
        made.bias = linear.bias
        return made.train(linear.training)

    def forward(self, hidden_states: Tensor) -> Tensor:
        weight = self.weight
        if self.scale is not None:
            weight = weight.float() * self.scale.to(weight.device)
        return F.linear(hidden_states, weight.to(hidden_states.dtype), self.bias)


def float8_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linears of a model that may be stored in float8, by name: not those that its class keeps wide."""
    wide = (*(model._keep_in_fp32_modules or ()), *(model._skip_layerwise_casting_patterns or ()), "lora_")
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and not any(part in name for part in wide)
    }


def use_float8(model: nn.Module) -> nn.Module:
    """Exchange the linears for such with float8 storage, layer by layer, in place; those that have it stay."""
    for name, layer in float8_linears(model).items():
        if not isinstance(layer, Float8Linear):
            model.set_submodule(name, Float8Linear.like(layer))
    return model
