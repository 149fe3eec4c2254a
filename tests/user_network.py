"""A network as a user may bring it, for tests of the methods that read a teacher's BatchNorm layers."""

import torch
from torch import nn

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Small(nn.Module):
    """A user's own network with two BatchNorm layers and four classes; float64 where a test asks for it."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.default_generator.manual_seed(5)
            self.body = nn.Sequential(
                nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AvgPool2d(2),
                nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
            )  # fmt: skip
            self.head = nn.Linear(48, 4)
            for m in self.modules():
                if isinstance(m, nn.BatchNorm2d):
                    nn.init.uniform_(m.running_mean, -0.5, 0.5)
                    nn.init.uniform_(m.running_var, 0.5, 2)
                    nn.init.uniform_(m.weight, 0.5, 2)

    def forward(self, x):
        return self.head(self.body(x))
