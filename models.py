"""The paper's networks, for any number of channels, image size and number of classes.

model = models.build("lenet", channels=1, size=28, classes=10)     # 132,220 parameters
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LeNet(nn.Module):
    """Two convolutions and two linear layers, with batch norm after all but the last, as in the published script.

    Max-pooling and ReLU commute, so pooling first gives the same function, and ReLU processes only a ninth (a quarter)
    of the elements. Images under 28 pixels are upsampled, since nothing would remain of them after the second pooling.
    """

    def __init__(self, channels: int, size: int, classes: int, dropout: float):
        super().__init__()
        self.features = nn.Sequential(
            nn.Upsample(size=28, mode="bilinear") if size < 28 else nn.Identity(),
            *(nn.Conv2d(channels, 20, 5), nn.BatchNorm2d(20), nn.MaxPool2d(3), nn.ReLU(), nn.Dropout(dropout)),
            *(nn.Conv2d(20, 50, 5), nn.BatchNorm2d(50), nn.MaxPool2d(2), nn.ReLU(), nn.Dropout(dropout)),
        )
        side = ((max(size, 28) - 4) // 3 - 4) // 2
        self.classifier = nn.Sequential(
            *(nn.Linear(50 * side * side, 500), nn.BatchNorm1d(500), nn.ReLU(), nn.Dropout(dropout)),
            nn.Linear(500, classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images).flatten(1))


class AllCNN(nn.Sequential):
    """Convolutions only, each with batch norm and ReLU, as in the authors' code: 1,667,166 parameters on CIFAR-10.

    All-CNN-C (Springenberg et al., 2014) has no batch norm, and 1x1 kernels in its eighth layer. The first three layers
    have `width` channels, the others twice that number.
    """

    def __init__(self, channels: int, size: int, classes: int, dropout: float, width: int = 96):
        def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> list[nn.Module]:
            layer = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2)
            return [layer, nn.BatchNorm2d(outputs), nn.ReLU()]

        wide = 2 * width
        super().__init__(
            nn.Dropout(0.2 if dropout else 0.0),
            *(*conv(channels, width), *conv(width, width), *conv(width, width, stride=2), nn.Dropout(dropout)),
            *(*conv(width, wide), *conv(wide, wide), *conv(wide, wide, stride=2), nn.Dropout(dropout)),
            *(*conv(wide, wide), *conv(wide, wide), *conv(wide, classes, kernel=1)),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        )


class WideBlock(nn.Module):
    """A pre-activation residual block. If the width changes, the shortcut is a 1x1 convolution of the input."""

    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float):
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.shortcut = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.conv1(F.relu(self.norm1(images)))
        return self.shortcut(images) + self.conv2(self.dropout(F.relu(self.norm2(hidden))))


class WideResNet(nn.Sequential):
    """WRN-depth-width (Zagoruyko and Komodakis, 2016): three groups of (depth - 4) / 6 blocks, 16, 32, 64 times width.

    Initialization follows that paper: convolutions He-normal by fan-out, batch norm 1 and 0, linear bias 0.
    """

    def __init__(self, depth: int, width: int, channels: int, size: int, classes: int, dropout: float):
        widths = [16, 16 * width, 32 * width, 64 * width]
        blocks = [
            WideBlock(widths[group] if block == 0 else widths[group + 1], widths[group + 1], stride, dropout)
            for group in range(3)
            for block in range((depth - 4) // 6)
            for stride in [2 if group > 0 and block == 0 else 1]
        ]
        super().__init__(
            nn.Conv2d(channels, 16, 3, padding=1, bias=False),
            *blocks,
            *(nn.BatchNorm2d(widths[3]), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
            nn.Linear(widths[3], classes),
        )
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self[-1].bias)


# Default training settings of each network. An epoch is L passes over the data. Dropout, weight decay, epochs and
# lr drops are from the authors' run scripts, except lenet's epochs and drops and allcnn's dropout (Springenberg's).
# Batch size 128 and lr 0.1 are the same throughout the paper.
RECIPES = {
    "lenet": dict(dataset="mnist", epochs=2.0, lr_drops=[1.0], weight_decay=0.0, dropout=0.25),
    "allcnn": dict(dataset="cifar10", epochs=10.0, lr_drops=[2.0, 4.0, 6.0], weight_decay=1e-3, dropout=0.5),
    "wrn-28-10": dict(dataset="cifar10", epochs=5.0, lr_drops=[1.0, 2.0, 3.0], weight_decay=5e-4, dropout=0.25),
    "wrn-16-4": dict(dataset="svhn", epochs=5.0, lr_drops=[1.0, 2.0, 3.0], weight_decay=5e-4, dropout=0.4),
}
COMMON = dict(lr=0.1, lr_decay=0.2, momentum=0.9, batch_size=128)


def build(name: str, channels: int, size: int, classes: int, dropout: float | None = None) -> nn.Module:
    """Return a network of `RECIPES` that maps images (B, channels, size, size) to logits (B, classes).

    Its weights are channels_last, which is 1.5 times faster for LeNet on a CPU; its inputs should be too.
    """
    if dropout is None:
        dropout = RECIPES[name]["dropout"]
    if name == "lenet":
        model = LeNet(channels, size, classes, dropout)
    elif name == "allcnn":
        model = AllCNN(channels, size, classes, dropout)
    else:
        _, depth, width = name.split("-")
        model = WideResNet(int(depth), int(width), channels, size, classes, dropout)
    return model.to(memory_format=torch.channels_last)
