"""A line drawing of a frame by the network of "Learning to Generate Line Drawings" (Chan et al. 2022, anime style).

    draw = ScribbleDrawer("netG_A_latest.pth")
    picture = draw(frame)                                # (H, W, 3) uint8 RGB -> the same size, dark lines on white

Layer names are those of the released file, as VACE's vace/annotators/scribble.py has them. Tested with random weights:
shapes, loading, sizes that are no multiple of 4; the released file itself was not run here.
"""

import pickle
from pathlib import Path

import numpy
import torch
from torch import Tensor, nn

from errors import WeightsError


class ResidualBlock(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv_block = nn.Sequential(
            *(nn.ReflectionPad2d(1), nn.Conv2d(channels, channels, 3), nn.InstanceNorm2d(channels), nn.ReLU()),
            *(nn.ReflectionPad2d(1), nn.Conv2d(channels, channels, 3), nn.InstanceNorm2d(channels)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv_block(x)


class LineDrawing(nn.Module):
    """Down by four, residual blocks, up by four. (B, 3, H, W) in [0, 1] -> (B, 1, H, W) in [0, 1]; H, W multiples of 4.

    Args:
        channels: of the first layer; 64 in the released file, with 3 residual blocks.
    """

    def __init__(self, channels: int = 64, num_blocks: int = 3):
        super().__init__()

        def down(width: int) -> list[nn.Module]:
            return nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.InstanceNorm2d(2 * width), nn.ReLU()

        def up(width: int) -> list[nn.Module]:
            convolution = nn.ConvTranspose2d(width, width // 2, 3, stride=2, padding=1, output_padding=1)
            return convolution, nn.InstanceNorm2d(width // 2), nn.ReLU()

        self.model0 = nn.Sequential(
            nn.ReflectionPad2d(3), nn.Conv2d(3, channels, 7), nn.InstanceNorm2d(channels), nn.ReLU()
        )
        self.model1 = nn.Sequential(*down(channels), *down(2 * channels))
        self.model2 = nn.Sequential(*(ResidualBlock(4 * channels) for _ in range(num_blocks)))
        self.model3 = nn.Sequential(*up(4 * channels), *up(2 * channels))
        self.model4 = nn.Sequential(nn.ReflectionPad2d(3), nn.Conv2d(channels, 1, 7), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return self.model4(self.model3(self.model2(self.model1(self.model0(x)))))


class ScribbleDrawer:
    """(H, W, 3) uint8 RGB -> a drawing of that size.

    Raises:
        WeightsError: the file is damaged, holds code, or is another network's.
    """

    def __init__(self, path: str | Path, device: str = "cpu"):
        refetch = "fetch it again: python download_models.py --only vace-annotators"
        try:
            state_dict = torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, EOFError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
            raise WeightsError(f"scribble weights {str(path)!r} cannot be read ({reason}); {refetch}") from error
        first = state_dict.get("model0.1.weight") if isinstance(state_dict, dict) else None
        channels = first.shape[0] if isinstance(first, torch.Tensor) and first.ndim == 4 else 64
        self.model = LineDrawing(channels)
        try:
            self.model.load_state_dict(state_dict)
        except (RuntimeError, TypeError, AttributeError) as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            difference = lines[min(1, len(lines) - 1)][:200]
            raise WeightsError(f"{str(path)!r} is not the line drawing network: {difference}; {refetch}") from error
        self.model.eval().requires_grad_(False).to(device)
        self.device = device

    @torch.inference_mode()
    def __call__(self, frame: numpy.ndarray) -> numpy.ndarray:
        height, width = frame.shape[:2]
        padded = numpy.pad(frame, ((0, -height % 4), (0, -width % 4), (0, 0)), mode="edge")
        pixels = torch.from_numpy(padded).to(self.device).permute(2, 0, 1)[None].float() / 255  # (1, 3, H, W)
        lines = (self.model(pixels)[0, 0, :height, :width] * 255).clamp(0, 255)
        return numpy.repeat(lines.cpu().numpy().astype(numpy.uint8)[..., None], 3, axis=-1)
