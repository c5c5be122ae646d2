"""TeaCache: skip the block stack at steps where the modulation signal has hardly moved.

Source: arXiv 2411.19108; TeaCache4Wan2.1 (the polynomials); Stand-In `pipelines/wan_video.py` (TeaCache).
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the settings read COEFFICIENTS before torch is imported
    from torch import Tensor

# Rescaling of the relative change of the modulation to that of the output, highest power first, fitted per model.
COEFFICIENTS = {
    "t2v-1.3B": (-5.21862437e4, 9.23041404e3, -5.28275948e2, 1.36987616e1, -4.99875664e-2),
    "t2v-14B": (-3.03318725e5, 4.90537029e4, -2.65530556e3, 5.87365115e1, -3.15583525e-1),
}
# Of Wan2.1's image-to-video by the size it was trained for; Stand-In's source has them as well.
COEFFICIENTS["i2v-14B-480P"] = (2.57151496e5, -3.54229917e4, 1.40286849e3, -1.35890334e1, 1.32517977e-1)
COEFFICIENTS["i2v-14B-720P"] = (8.10705460e3, 2.13393892e3, -3.72934672e2, 1.66203073e1, -4.17769401e-2)
COEFFICIENTS["fun-inp-1.3B"] = COEFFICIENTS["t2v-1.3B"]  # as VideoX-Fun and StableAvatar run it


def coefficients_of(config: dict) -> tuple[float, ...] | None:
    """Those fitted for the model of a config; None if nobody fitted any. The tiny model takes a released one's."""
    if config.get("tiny"):
        return COEFFICIENTS["t2v-14B"]
    if config.get("experts"):
        return None
    return COEFFICIENTS.get(config.get("tea_cache") or config.get("variant"))


@dataclass
class TeaCache:
    """The cache of one guidance branch of one request.

    Args:
        num_steps: of the run; the first ones and the last are always computed.
        threshold: accumulated change below which a step is skipped (0.08 to 0.2 is usual).
        coefficients: of the polynomial, highest power first.
        first_steps: how many are always computed.
        offload: keep the residual in RAM between the steps.
    """

    num_steps: int
    threshold: float
    coefficients: tuple[float, ...] = COEFFICIENTS["t2v-14B"]
    first_steps: int = 1
    offload: bool = False
    skipped: list[bool] = field(default_factory=list)  # one entry a step
    _residual: "Tensor | None" = None
    _device: object = None
    _previous: "Tensor | None" = None
    _accumulated: float = 0.0

    @property
    def residual(self) -> "Tensor | None":
        """(B, L, D): what the block stack added at the last computed step."""
        return None if self._residual is None else self._residual.to(self._device)

    @residual.setter
    def residual(self, residual: "Tensor") -> None:
        self._device = residual.device
        self._residual = residual.to("cpu") if self.offload else residual

    def skips(self, modulation: "Tensor") -> bool:
        """Whether this step re-uses the residual. Call once a step, in order. modulation: (B, 1 or L, 6, D)."""
        step = len(self.skipped)
        if self._residual is None or step < self.first_steps or step == self.num_steps - 1:
            skip = False
        else:
            change = ((modulation - self._previous).abs().mean() / self._previous.abs().mean()).item()
            for power, coefficient in enumerate(reversed(self.coefficients)):
                self._accumulated += coefficient * change**power
            skip = self._accumulated < self.threshold
        if not skip:
            self._accumulated = 0.0
        self._previous = modulation
        self.skipped.append(skip)
        return skip
