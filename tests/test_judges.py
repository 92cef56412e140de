"""The judges of the table of judges, each against an independent computation."""

import numpy as np
import pytest
import skimage.color
import skimage.data
import torch

from faic import metrics as M
from faic.color import ciede2000, rgb_to_lab
from faic.core import make_generator
from faic.intervals import colorfulness_differences, summarize


def noise(*shape, seed=0):
    return torch.randint(256, shape, dtype=torch.uint8, generator=make_generator("judges", seed))


def channels_last(images):
    return images.permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 2e-3)])
def test_ciede2000_is_scikit_images(dtype, tolerance):
    """On noise, on near grays, and on pairs where one color or both have no hue."""
    a, b = noise(2, 3, 64, 64), noise(2, 3, 64, 64, seed=1)
    near = (a[:, :1].int() + noise(2, 3, 64, 64, seed=2) % 3).clamp(max=255).to(torch.uint8)
    for x, y in ((a, b), (near, near.flip(3)), (a, near), (a[:, :1].expand_as(a), b), (a, a)):
        labs = [rgb_to_lab(z.to(dtype) / 255) for z in (x, y)]
        theirs = skimage.color.deltaE_ciede2000(*(channels_last(lab.double()) for lab in labs))
        np.testing.assert_allclose(ciede2000(*labs).numpy(), theirs, atol=tolerance)
    no_hue = torch.tensor([[50.0, 0.0, 0.0], [40.0, 0.0, 0.0], [60.0, 10.0, -20.0]], dtype=dtype)
    x, y = (no_hue[list(rows)].T[None, :, None] for rows in ((0, 0, 2), (1, 2, 0)))
    theirs = skimage.color.deltaE_ciede2000(channels_last(x), channels_last(y))
    np.testing.assert_allclose(ciede2000(x, y).numpy(), theirs, atol=tolerance)


def test_image_scores_hold_ciede2000_and_both_colorfulnesses():
    real, fake = noise(5, 3, 16, 16) / 255, noise(5, 3, 16, 16, seed=1) / 255
    scores = M.image_scores(fake, real)
    labs = [skimage.color.rgb2lab(channels_last(x)) for x in (fake, real)]
    np.testing.assert_allclose(scores["CIEDE2000"], skimage.color.deltaE_ciede2000(*labs).mean((1, 2)), rtol=1e-5)
    np.testing.assert_array_equal(scores["photographs' colorfulness"], M.image_scores(real, real)["colorfulness"])


def test_both_differences_of_colorfulness_by_hand():
    rng = np.random.default_rng(0)
    real = rng.gamma(4, 8, 200)
    fake = real * 0.8 + rng.normal(0, 6, 200)
    found = colorfulness_differences(fake, real)
    means, each = found["colorfulness difference of means"], found["colorfulness difference per image"]
    assert means[0] == pytest.approx(abs(fake.mean() - real.mean()))
    assert each[0] == pytest.approx(sum(abs(f - r) for f, r in zip(fake, real)) / 200)
    error = 1.96 * (fake - real).std(ddof=1) / 200**0.5
    assert means[1:] == pytest.approx((means[0] - error, means[0] + error), rel=0.1)


def test_the_interval_of_the_difference_of_means_covers():
    """Also where the true difference is 0, and the absolute value folds the interval."""
    for true in (0.0, 1.0):
        covered = []
        for seed in range(150):
            rng = np.random.default_rng(seed)
            real = rng.gamma(4, 8, 60)
            fake = real + rng.normal(true, 5, 60)
            _, low, high = colorfulness_differences(fake, real, seed)["colorfulness difference of means"]
            covered.append(low <= true <= high)
        assert np.mean(covered) > 0.9, (true, np.mean(covered))


def test_a_row_holds_the_cheap_judges():
    real = noise(12, 3, 16, 16) / 255
    row = summarize(M.image_scores(real.roll(1, 0), real), None, None, None, "Net")
    for name in ("CIEDE2000", "colorfulness difference of means", "colorfulness difference per image"):
        assert row[f"{name} low"] <= row[name] <= row[f"{name} high"], name
    assert row["colorfulness difference of means"] == pytest.approx(0, abs=1e-9)  # the same images in another order
