"""A feature network for tests that need scores but not their meaning."""

import torch


class QuarterColors(torch.nn.Module):
    """A feature network that costs nothing: the mean colors of an image's four quarters; counts its images."""

    network_name, num_features = "quarters", 12
    images = 0

    def forward(self, rgb):
        self.images += len(rgb)
        quarters = torch.nn.functional.adaptive_avg_pool2d(rgb, 2).flatten(1)
        return quarters, quarters.softmax(1)
