"""The networks of Han et al. (2015) for 28x28 digits."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn


def lenet_300_100(num_classes: int = 10) -> nn.Module:
    """Fully connected layers of 300, 100 and 10 units (LeCun et al. 1998)."""
    layers = {"fc1": nn.Linear(784, 300), "relu1": nn.ReLU(), "fc2": nn.Linear(300, 100), "relu2": nn.ReLU()}
    return nn.Sequential(OrderedDict(flatten=nn.Flatten(), **layers, fc3=nn.Linear(100, num_classes)))


def lenet_5(num_classes: int = 10) -> nn.Module:
    """The LeNet-5 that comes with Caffe, which is the paper's: two convolutions, two fully connected layers."""
    convolutions = {"conv1": nn.Conv2d(1, 20, 5), "pool1": nn.MaxPool2d(2), "conv2": nn.Conv2d(20, 50, 5)}
    head = {"fc1": nn.Linear(800, 500), "relu": nn.ReLU(), "fc2": nn.Linear(500, num_classes)}
    return nn.Sequential(OrderedDict(**convolutions, pool2=nn.MaxPool2d(2), flatten=nn.Flatten(), **head))
