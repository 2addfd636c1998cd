"""The paper's network: the CNN of PyTorch's CIFAR-10 tutorial."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class PaperCNN(nn.Module):
    """Two convolutions and three linear layers; 62,006 parameters for 3x32x32 images and 10 classes.

    The tutorial applies ReLU before max-pooling. Both are monotone, so they commute: pooling first
    gives the same function, and its gradients, with a quarter of the work for the ReLU.
    """

    def __init__(self, image_shape: tuple[int, int, int] = (3, 32, 32), classes: int = 10) -> None:
        super().__init__()
        channels, height, width = image_shape
        self.conv1 = nn.Conv2d(channels, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        features = 16 * _side(_side(height)) * _side(_side(width))
        if min(_side(_side(height)), _side(_side(width))) < 1:
            raise ValueError("two 5x5 convolutions with pooling need images of at least 16x16")
        self.fc1 = nn.Linear(features, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(F.max_pool2d(self.conv1(images), 2))
        x = F.relu(F.max_pool2d(self.conv2(x), 2))
        x = F.relu(self.fc1(x.flatten(1)))
        x = F.relu(self.fc2(x))
        scores: Tensor = self.fc3(x)
        return scores


def _side(pixels: int) -> int:
    """Side of a square after a 5x5 convolution and a pooling by 2."""
    return (pixels - 4) // 2
