"""A first convolution that whitens what it sees, found from training images and not trained."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankwise.errors import ModelError

EPSILON = 5e-4
"""Added to each variance, as a part of their mean, so that directions without any do not become noise."""


def whiten(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Make the first convolution of `model` whiten its patches of the images in `batches`, each float32
    [samples, channels, height, width].

    With v the eigenvectors and s the eigenvalues of the patches' covariance, the filters are v / sqrt(s) for
    the largest, and the same with the other sign (Page 2018; Jordan 2024, arXiv:2404.00498). If there are
    fewer filters than that they hold as many pairs as fit; what is over keeps its values. The filters are
    frozen, and so is a bias, at 0. Raises ModelError for a model that has no such convolution.
    """
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    if first is None or (first.groups, first.dilation) != (1, (1, 1)) or first.out_channels < 2:
        raise ModelError(
            "--whitening was given, but the model does not begin with a convolution of plain patches that "
            "has 2 filters or more: leave it out"
        )
    variances, directions = torch.linalg.eigh(patch_covariance(batches, first.kernel_size))
    pairs = min(first.out_channels // 2, len(variances))
    # The largest come last.
    scaled = directions / (variances + EPSILON * variances.mean()).sqrt()
    filters = scaled.T.flip(0)[:pairs].reshape(pairs, -1, *first.kernel_size)
    first.requires_grad_(False)
    first.weight[: 2 * pairs] = torch.cat([filters, -filters]).to(first.weight.dtype)
    if first.bias is not None:
        # Trained, it alone would ask for gradients of what goes into the second layer, the largest of all.
        first.bias.zero_()


def patch_covariance(batches: Iterable[Tensor], size: tuple[int, ...]) -> Tensor:
    """The covariance [d, d] of all patches of this size (height, width), in float64, where d is channels x
    height x width of a patch."""
    count, total, products = 0, torch.zeros(()), torch.zeros(())
    for images in batches:
        patches = F.unfold(images, size).double()
        count += patches.shape[0] * patches.shape[2]
        total = total + patches.sum((0, 2))
        products = products + torch.einsum("nip,njp->ij", patches, patches)
    mean = total / count
    return products / count - torch.outer(mean, mean)
