"""BiSeNet face parsing: which of 19 classes each pixel of a face picture is.

The network of "BiSeNet: Bilateral Segmentation Network" (arXiv 1808.00897) on a ResNet-18, with the key names of
facexlib (facexlib/parsing/bisenet.py), so that its released `parsing_bisenet.pth` loads strictly.
"""

import pickle
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import WeightsError

Network = TypeVar("Network", bound=nn.Module)


class BiSeNet(nn.Module):
    """Face parser.

    Input (B, 3, H, W) normalised RGB; output (B, num_class, H, W) logits at the input's size.
    """

    def __init__(self, num_class: int = 19):
        super().__init__()
        self.cp = ContextPath()
        self.ffm = FeatureFusion(256, 256)
        self.conv_out = Head(256, 256, num_class)
        # Auxiliary heads of training. They are in the released file, and never run.
        self.conv_out16 = Head(128, 64, num_class)
        self.conv_out32 = Head(128, 64, num_class)

    def forward(self, x: Tensor) -> Tensor:
        detail, context = self.cp(x)  # both 1/8 of the input: (B, 128, H/8, W/8)
        logits = self.conv_out(self.ffm(detail, context))  # (B, num_class, H/8, W/8)
        return F.interpolate(logits, x.shape[2:], mode="bilinear", align_corners=True)


class ContextPath(nn.Module):
    """Features of the trunk at 1/8, and what surrounds them, gathered from 1/32 over 1/16 back to 1/8."""

    def __init__(self):
        super().__init__()
        self.resnet = ResNet18()
        self.arm16 = AttentionRefinement(256, 128)
        self.arm32 = AttentionRefinement(512, 128)
        self.conv_head32 = ConvBNReLU(128, 128, 3)
        self.conv_head16 = ConvBNReLU(128, 128, 3)
        self.conv_avg = ConvBNReLU(512, 128, 1)

    def forward(self, x: Tensor) -> Tensor:
        feature8, feature16, feature32 = self.resnet(x)
        whole_image = self.conv_avg(global_average(feature32))  # (B, 128, 1, 1), broadcast over 1/32
        context = self.conv_head32(F.interpolate(self.arm32(feature32) + whole_image, feature16.shape[2:]))
        context = self.conv_head16(F.interpolate(self.arm16(feature16) + context, feature8.shape[2:]))
        return feature8, context


class FeatureFusion(nn.Module):
    """Detail and context joined, then re-weighted by channel."""

    def __init__(self, in_channels: int, channels: int):
        super().__init__()
        self.convblk = ConvBNReLU(in_channels, channels, 1)
        self.conv1 = nn.Conv2d(channels, channels // 4, 1, bias=False)
        self.conv2 = nn.Conv2d(channels // 4, channels, 1, bias=False)

    def forward(self, detail: Tensor, context: Tensor) -> Tensor:
        feature = self.convblk(torch.cat([detail, context], dim=1))
        attention = torch.sigmoid(self.conv2(F.relu(self.conv1(global_average(feature)))))
        return feature + feature * attention


class AttentionRefinement(nn.Module):
    """A convolution whose channels are weighted by what the whole picture holds."""

    def __init__(self, in_channels: int, channels: int):
        super().__init__()
        self.conv = ConvBNReLU(in_channels, channels, 3)
        self.conv_atten = nn.Conv2d(channels, channels, 1, bias=False)
        self.bn_atten = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        feature = self.conv(x)
        return feature * torch.sigmoid(self.bn_atten(self.conv_atten(global_average(feature))))


class Head(nn.Module):
    def __init__(self, in_channels: int, channels: int, num_class: int):
        super().__init__()
        self.conv = ConvBNReLU(in_channels, channels, 3)
        self.conv_out = nn.Conv2d(channels, num_class, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_out(self.conv(x))


class ConvBNReLU(nn.Module):
    def __init__(self, in_channels: int, channels: int, kernel_size: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class ResNet18(nn.Module):
    """The trunk: features at 1/8 (128 channels), 1/16 (256) and 1/32 (512)."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = nn.Sequential(BasicBlock(64, 64), BasicBlock(64, 64))
        self.layer2 = nn.Sequential(BasicBlock(64, 128, stride=2), BasicBlock(128, 128))
        self.layer3 = nn.Sequential(BasicBlock(128, 256, stride=2), BasicBlock(256, 256))
        self.layer4 = nn.Sequential(BasicBlock(256, 512, stride=2), BasicBlock(512, 512))

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        feature8 = self.layer2(self.layer1(x))
        feature16 = self.layer3(feature8)
        return feature8, feature16, self.layer4(feature16)


class BasicBlock(nn.Module):
    def __init__(self, in_channels: int, channels: int, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = None
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(shortcut + self.bn2(self.conv2(x)))


def global_average(x: Tensor) -> Tensor:
    return x.mean(dim=(2, 3), keepdim=True)


def load_bisenet(path: str | Path) -> "BiSeNet":
    """BiSeNet with the weights of `parsing_bisenet.pth`, in eval mode on the CPU.

    Raises:
        WeightsError: the file is damaged, holds code, or is another network's.
    """
    refetch = "fetch it again with `python download_models.py --only face-parsing`"
    return load_network(BiSeNet(), path, "facexlib's BiSeNet", refetch)


def load_network(model: Network, path: str | Path, name: str, refetch: str) -> Network:
    """Fill a network of facexlib from its released file, strictly; in eval mode on the CPU.

    Args:
        name: what the network is called in messages.
        refetch: how to get the file; ends the message.

    Raises:
        WeightsError: the file is damaged, holds code, or is another network's.
    """
    try:
        state_dict = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise WeightsError(f"weights {str(path)!r} cannot be read ({reason[:160]}); {refetch}") from error
    try:
        # Saved from DataParallel, some of them carry its prefix.
        model.load_state_dict({key.removeprefix("module."): value for key, value in state_dict.items()})
    except (RuntimeError, TypeError, AttributeError) as error:
        raise WeightsError(f"{str(path)!r} is not {name}: {_first_difference(error)}; {refetch}") from error
    return model.eval()


def _first_difference(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[min(1, len(lines) - 1)][:200]
