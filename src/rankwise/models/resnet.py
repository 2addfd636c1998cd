"""Residual networks for small images (He et al. 2015, arXiv:1512.03385)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


def _convolve(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """A 3x3 convolution and its batch normalisation."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs)
    )


class _Block(nn.Module):
    """Two convolutions around a short cut."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.first = _convolve(inputs, outputs, stride)
        self.second = _convolve(outputs, outputs)
        self.short_cut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.short_cut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(F.relu(self.first(x))) + self.short_cut(x))


class ResNet18(nn.Sequential):
    """ResNet-18 in its CIFAR form: a 3x3 stem without pooling, four stages of two blocks."""

    def __init__(self, image_shape: tuple[int, int, int] = (3, 32, 32), classes: int = 10) -> None:
        stages: list[nn.Module] = []
        inputs = 64
        for outputs, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
            stages += [_Block(inputs, outputs, stride), _Block(outputs, outputs)]
            inputs = outputs
        super().__init__(
            _convolve(image_shape[0], 64),
            nn.ReLU(),
            *stages,
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(512, classes),
        )


class _Residual(nn.Module):
    """Two convolutions of the same width, added to their input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = _convolve(width, width)
        self.second = _convolve(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.relu(self.second(F.relu(self.first(x))))


class _Scale(nn.Module):
    """Its input, times a constant."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class ResNet9(nn.Sequential):
    """A short residual network, as in DAWNBench's fast CIFAR-10 entries (D. Page, 2018).

    Its last product is scaled by 1/8, as there: 512 maxima of images make large outputs, which diverge
    at the rates that the rest of the network learns best with.
    """

    def __init__(self, image_shape: tuple[int, int, int] = (3, 32, 32), classes: int = 10) -> None:
        super().__init__(
            _convolve(image_shape[0], 64),
            nn.ReLU(),
            _convolve(64, 128),
            nn.ReLU(),
            nn.MaxPool2d(2),
            _Residual(128),
            _convolve(128, 256),
            nn.ReLU(),
            nn.MaxPool2d(2),
            _convolve(256, 512),
            nn.ReLU(),
            nn.MaxPool2d(2),
            _Residual(512),
            nn.AdaptiveMaxPool2d(1),
            nn.Flatten(),
            nn.Linear(512, classes),
            _Scale(0.125),
        )
