"""MobileNet-V2 for small images, after Sandler et al., "Inverted Residuals and Linear Bottlenecks" (2018)."""

from torch import nn
from torchvision.models import mobilenet_v2


def mobilenet_v2_cifar(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """The MobileNet-V2 of torchvision for 32x32 images: stride 1 in the stem and in the first down-sampling block.

    Channels, expansions and names are those of the original; the last stage sees 4x4 pixels.
    """
    model: nn.Module = mobilenet_v2(num_classes=num_classes)
    strided = [module for module in model.modules() if isinstance(module, nn.Conv2d) and module.stride == (2, 2)]
    stem, first = strided[:2]
    for layer in (stem, first):
        layer.stride = (1, 1)
    if in_channels != stem.in_channels:
        stem.in_channels = in_channels
        stem.weight = nn.Parameter(stem.weight.new_empty(stem.out_channels, in_channels, *stem.kernel_size))
        nn.init.kaiming_normal_(stem.weight, mode="fan_out")
    return model
