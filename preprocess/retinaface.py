"""RetinaFace: boxes and five points of faces, by the detector that ConsisID aligns its faces with.

The network of "RetinaFace: Single-stage Dense Face Localisation in the Wild" (arXiv 1905.00641) on a ResNet-50, with
the key names of facexlib (facexlib/detection/retinaface.py), so that its released `detection_Resnet50_Final.pth` loads
strictly.

    detector = load_retinaface("detection_Resnet50_Final.pth")
    for face in detector(picture): ...                        # (H, W, 3) uint8 RGB, at its own size
"""

import math
from pathlib import Path

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from preprocess.face_detection import Face
from preprocess.face_parsing import load_network

STRIDES = (8, 16, 32)
ANCHOR_SIZES = ((16, 32), (64, 128), (256, 512))  # pixels, of each stride
CENTER_VARIANCE, SIZE_VARIANCE = 0.1, 0.2  # what a head's output of one means, in anchor sizes
MEAN_BGR = (104.0, 117.0, 123.0)
MIN_SCORE = 0.97  # FaceRestoreHelper's
MAX_OVERLAP = 0.4  # two boxes that share more count as one face


class RetinaFace(nn.Module):
    """Face detector.

    Input (B, 3, H, W) BGR minus `MEAN_BGR`; output, one row an anchor as `anchors` lists them:
    boxes (B, A, 4), scores (B, A, 2) of background and face, landmarks (B, A, 10), boxes and landmarks as offsets.
    """

    def __init__(self):
        super().__init__()
        self.body = ResNet50()
        self.fpn = FeaturePyramid((512, 1024, 2048), 256)
        self.ssh1, self.ssh2, self.ssh3 = (ContextModule(256) for _ in STRIDES)
        self.ClassHead, self.BboxHead, self.LandmarkHead = (
            nn.ModuleList(Head(256, values, len(sizes)) for sizes in ANCHOR_SIZES) for values in (2, 4, 10)
        )

    def forward(self, x: Tensor) -> Tensor:
        features = self.fpn(self.body(x))
        features = [ssh(feature) for ssh, feature in zip((self.ssh1, self.ssh2, self.ssh3), features, strict=True)]
        boxes, scores, landmarks = (
            torch.cat([head(feature) for head, feature in zip(heads, features, strict=True)], dim=1)
            for heads in (self.BboxHead, self.ClassHead, self.LandmarkHead)
        )
        return boxes, scores.softmax(dim=-1), landmarks


class ResNet50(nn.Module):
    """The trunk: features at 1/8 (512 channels), 1/16 (1024) and 1/32 (2048)."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = stage(64, 64, blocks=3, stride=1)
        self.layer2 = stage(256, 128, blocks=4, stride=2)
        self.layer3 = stage(512, 256, blocks=6, stride=2)
        self.layer4 = stage(1024, 512, blocks=3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        feature8 = self.layer2(self.layer1(x))
        feature16 = self.layer3(feature8)
        return feature8, feature16, self.layer4(feature16)


def stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = Bottleneck(in_channels, channels, stride)
    return nn.Sequential(first, *(Bottleneck(4 * channels, channels) for _ in range(blocks - 1)))


class Bottleneck(nn.Module):
    def __init__(self, in_channels: int, channels: int, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, 4 * channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * channels)
        self.downsample = None
        if in_channels != 4 * channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, 4 * channels, 1, stride=stride, bias=False), nn.BatchNorm2d(4 * channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return F.relu(shortcut + self.bn3(self.conv3(x)))


class FeaturePyramid(nn.Module):
    """What the coarse features know, added to the finer ones."""

    def __init__(self, in_channels: int, channels: int):
        super().__init__()
        self.output1, self.output2, self.output3 = (conv_bn(c, channels, 1, relu=True) for c in in_channels)
        self.merge1, self.merge2 = (conv_bn(channels, channels, 3, relu=True) for _ in range(2))

    def forward(self, features: Tensor) -> Tensor:
        feature8, feature16, feature32 = features
        out32 = self.output3(feature32)
        out16 = self.output2(feature16)
        out16 = self.merge2(out16 + F.interpolate(out32, out16.shape[2:], mode="nearest"))
        out8 = self.output1(feature8)
        out8 = self.merge1(out8 + F.interpolate(out16, out8.shape[2:], mode="nearest"))
        return out8, out16, out32


class ContextModule(nn.Module):
    """SSH's: surroundings of 3, 5 and 7 cells, by stacked 3x3 convolutions. (facexlib's spelling, x and X.)"""

    def __init__(self, channels: int):
        super().__init__()
        self.conv3X3 = conv_bn(channels, channels // 2, 3)  # noqa: N815
        self.conv5X5_1 = conv_bn(channels, channels // 4, 3, relu=True)
        self.conv5X5_2 = conv_bn(channels // 4, channels // 4, 3)
        self.conv7X7_2 = conv_bn(channels // 4, channels // 4, 3, relu=True)
        self.conv7x7_3 = conv_bn(channels // 4, channels // 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.conv5X5_1(x)
        return F.relu(torch.cat([self.conv3X3(x), self.conv5X5_2(inner), self.conv7x7_3(self.conv7X7_2(inner))], dim=1))


def conv_bn(in_channels: int, channels: int, kernel_size: int, relu: bool = False) -> nn.Sequential:
    layers = [
        nn.Conv2d(in_channels, channels, kernel_size, padding=kernel_size // 2, bias=False),
        nn.BatchNorm2d(channels),
    ]
    return nn.Sequential(*layers, *([nn.ReLU()] if relu else []))


class Head(nn.Module):
    """`values` numbers for each of the anchors of each cell."""

    def __init__(self, channels: int, values: int, num_anchors: int):
        super().__init__()
        self.values = values
        self.conv1x1 = nn.Conv2d(channels, values * num_anchors, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv1x1(x).permute(0, 2, 3, 1).reshape(x.shape[0], -1, self.values)  # (B, h·w·anchors, values)


def anchors(height: int, width: int) -> Tensor:
    """Centre and size of every anchor of a picture, as shares of its width and height: (A, 4) x, y, w, h."""
    rows = []
    for stride, sizes in zip(STRIDES, ANCHOR_SIZES, strict=True):
        y, x, size = numpy.meshgrid(
            (numpy.arange(math.ceil(height / stride)) + 0.5) * stride,
            (numpy.arange(math.ceil(width / stride)) + 0.5) * stride,
            sizes,
            indexing="ij",
        )
        rows.append(numpy.stack([x / width, y / height, size / width, size / height], axis=-1).reshape(-1, 4))
    return torch.from_numpy(numpy.concatenate(rows)).float()


def decode(boxes: Tensor, landmarks: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Offsets from anchors (A, 4), (A, 10) -> pixels: (A, 4) x1, y1, x2, y2 and (A, 10) five times x, y."""
    prior = anchors(height, width).to(boxes.device)
    center, size = prior[:, :2], prior[:, 2:]
    centers = center + CENTER_VARIANCE * boxes[:, :2] * size
    half = size * torch.exp(SIZE_VARIANCE * boxes[:, 2:]) / 2
    points = center[:, None] + CENTER_VARIANCE * landmarks.reshape(-1, 5, 2) * size[:, None]
    scale = torch.tensor([width, height], device=boxes.device)
    return torch.cat([centers - half, centers + half], dim=1) * scale.repeat(2), (points * scale).flatten(1)


def non_maximum_suppression(boxes: numpy.ndarray, max_overlap: float) -> list[int]:
    """Greedy non-maximum suppression: indices of the boxes (N, 4), best first, that overlap no better one by more."""
    kept = []
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    left = numpy.arange(len(boxes))
    while len(left):
        best, left = left[0], left[1:]
        kept.append(best)
        corner1 = numpy.maximum(boxes[best, :2], boxes[left, :2])
        corner2 = numpy.minimum(boxes[best, 2:], boxes[left, 2:])
        common = (corner2 - corner1).clip(min=0).prod(axis=1)
        left = left[common / (area[best] + area[left] - common) <= max_overlap]
    return kept


class RetinaFaceDetector:
    """The network with its rules: (H, W, 3) uint8 RGB -> list of `Face`, best first."""

    def __init__(
        self, model: "RetinaFace", device: str = "cpu", min_score: float = MIN_SCORE, max_overlap: float = MAX_OVERLAP
    ):
        self.model, self.device = model.to(device), device
        self.min_score, self.max_overlap = min_score, max_overlap

    @torch.inference_mode()
    def __call__(self, image: numpy.ndarray) -> list[Face]:
        bgr = torch.from_numpy(image[..., ::-1].astype(numpy.float32)) - torch.tensor(MEAN_BGR)
        boxes, scores, landmarks = self.model(bgr.permute(2, 0, 1)[None].to(self.device))
        boxes, landmarks = decode(boxes[0], landmarks[0], *image.shape[:2])
        scores = scores[0, :, 1]
        best = scores.argsort(descending=True, stable=True)
        best = best[scores[best] > self.min_score]
        boxes, scores, landmarks = (values[best].cpu().numpy() for values in (boxes, scores, landmarks))
        return [
            Face(tuple(boxes[i].tolist()), float(scores[i]), landmarks[i].reshape(5, 2))
            for i in non_maximum_suppression(boxes, self.max_overlap)
        ]


def load_retinaface(path: str | Path, device: str = "cpu", refetch: str = "") -> "RetinaFaceDetector":
    """The detector with the weights of `detection_Resnet50_Final.pth`.

    Raises:
        WeightsError: the file is damaged, holds code, or is another network's.
    """
    return RetinaFaceDetector(load_network(RetinaFace(), path, "facexlib's RetinaFace", refetch), device)
