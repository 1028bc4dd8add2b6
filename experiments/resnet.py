"""Residual networks for small images, after He et al., "Deep Residual Learning" (2015), section 4.2."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import resnet18


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters (option A)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.padding = (out_channels - in_channels) // 2

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, H / stride, W / stride)."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.padding:
            # Option A: every second pixel, and zeros for the channels that the input does not have.
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(out + x)


class CifarResNet(nn.Module):
    """Three stages of ``n_blocks`` blocks each, of ``6 * n_blocks + 2`` layers in all.

    Shapes:
        (N, in_channels, H, W) to (N, num_classes).

    Args:
        n_blocks: blocks a stage; 3 makes ResNet-20, 9 makes ResNet-56.
        num_classes: outputs.
        in_channels: channels of the images.
        widths: channels of the three stages, each even more than the one before.
        stem_stride: stride of the first convolution; 2 reads large images at a quarter of the cost.
    """

    def __init__(
        self,
        n_blocks: int,
        num_classes: int = 10,
        in_channels: int = 3,
        widths: Sequence[int] = (16, 32, 64),
        stem_stride: int = 1,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, stride=stem_stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.layer1 = _stage(n_blocks, widths[0], widths[0], stride=1)
        self.layer2 = _stage(n_blocks, widths[0], widths[1], stride=2)
        self.layer3 = _stage(n_blocks, widths[1], widths[2], stride=2)
        self.linear = nn.Linear(widths[2], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                # He et al., "Delving Deep into Rectifiers" (2015), which section 4.2 refers to.
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Class scores of a batch of images."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        logits: Tensor = self.linear(out.mean(dim=(2, 3)))
        return logits


def _stage(n_blocks: int, in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    first = Block(in_channels, out_channels, stride)
    return nn.Sequential(first, *(Block(out_channels, out_channels, 1) for _ in range(n_blocks - 1)))


def resnet18_cifar(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """The ResNet-18 of torchvision for 32x32 images: a 3x3 first convolution of stride 1, and no max pooling."""
    model: nn.Module = resnet18(num_classes=num_classes)
    model.conv1 = nn.Conv2d(in_channels, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    return model
