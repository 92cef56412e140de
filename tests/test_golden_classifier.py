"""The classifier against numbers of the official code.

A set has arrays.npz; the weights follow from the names of the tensors (`official_state`); golden.py lists where sets
lie. The set that the repository keeps is a part of the full one, so only the largest set is compared.
"""

import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden import DEVICE, SLACK, Golden, close, close_loss, close_stats, normal, sets, stats_of
from PIL import Image

from faic.classifier import (
    RELEASED_SCALE,
    ECCV16,
    annealed_mean,
    check_sides,
    classification_loss,
    color_classes,
    gray_mask,
    load_eccv16,
    nearest_classes,
    pixel_divergences,
    rebalancing_factors,
    soft_encode,
)
from faic.color import lab_to_rgb, rgb_to_lab
from faic.layers import count_params


def official_state(names, shapes, seed):
    """Name -> tensor: the weights that the set's README describes."""
    state = {}
    for name, shape in zip(names, shapes):
        z = normal(name, shape, seed)
        if name.endswith("num_batches_tracked"):
            z = np.zeros(shape)
        elif name.endswith("running_var"):
            z = 0.7 + 0.3 * np.abs(z)
        elif name.endswith(("bias", "running_mean")):
            z = 0.3 * z
        elif len(shape) == 1:
            z = 1 + 0.3 * z
        elif name == "model_out.weight":
            z = 0.6 * z
        elif name == "model8.6.weight":
            z = 3 * z / np.sqrt(256)
        elif name == "model8.0.weight":
            z = z * np.sqrt(2 / (512 * 4))
        else:
            z = z * np.sqrt(2 / np.prod(shape[1:]))
        state[name] = torch.tensor(np.asarray(z, dtype=np.int64 if name.endswith("tracked") else np.float32))
    return state


class ClassifierGolden(Golden):
    """One set of the classifier, and the network with its weights."""

    def __init__(self, folder):
        super().__init__(folder)
        self.shapes = [[int(n) for n in s.strip("[]").split(",") if n.strip()] for s in self.names("param_shapes")]
        self.state = official_state(self.names("param_names"), self.shapes, self.config["seed"])

    def net(self):
        net = ECCV16()
        net.load_state_dict(self.state)
        return net.eval().to(DEVICE)


def size(parameter):
    """Bytes of a set's arrays; 0 where there is no set."""
    (folder,) = parameter.values
    return (folder / "arrays.npz").stat().st_size if folder else 0


@pytest.fixture(scope="module", params=[max(sets("classifier"), key=size)])
def classifier(request):
    return ClassifierGolden(request.param)


def dense(indices, weights):
    """Weights at indices, (B,n,h,w) both, as (B,313,h,w)."""
    return torch.zeros(len(weights), 313, *weights.shape[2:], device=DEVICE).scatter_(1, indices.long(), weights)


def test_names_shapes_and_numbers_of_weights(classifier, tmp_path):
    with torch.device("meta"):
        net = ECCV16()
    assert list(net.state_dict()) == classifier.names("param_names")
    assert [list(p.shape) for p in net.state_dict().values()] == classifier.shapes
    assert count_params(net) == count_params(net, only_trained=True) == int(classifier["num_params"]) == 32_236_011
    close_stats(stats_of(classifier.state, classifier.names("param_names")), classifier["weight_stats"].cpu(), 1e-5)
    file = tmp_path / "colorization_release_v2-00000000.pth"
    torch.save(classifier.state, file)
    assert all(torch.equal(v, classifier.state[k]) for k, v in load_eccv16(file).state_dict().items())
    torch.save(classifier.state | {"model9.0.weight": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match="model9.0.weight"):
        load_eccv16(file)


@torch.no_grad()
@pytest.mark.parametrize("size", [0, 1])
def test_forward(classifier, size):
    net, blocks = classifier.net(), []
    for k in range(1, 9):
        getattr(net, f"model{k}").register_forward_hook(lambda _, __, out: blocks.append(out))
    golden = {k.removeprefix(f"f{size}_"): classifier[k] for k in classifier.arrays if k.startswith(f"f{size}_")}
    close(net(golden["L"]), golden["ab"], 3e-3)
    close_stats(stats_of(dict(enumerate(blocks)), range(8)), golden["block_stats"], 1e-5)
    for k in range(1, 8):
        close(blocks[k - 1][0, :, 1, 2], golden[f"block{k}_ex0_px"], 3e-5)
    logits = blocks[-1]
    kept = ("logits_s3", logits[:, :, ::3, 1::3]) if "logits_s3" in golden else ("logits", logits)
    close(kept[1], golden[kept[0]], 1e-4)
    close(logits.softmax(1).amax(1), golden["softmax_max"], 2e-5)
    close(net.model_out(logits.softmax(1)), golden["ab_quarter_raw"], 2e-5)
    clear = golden["argmax_gap"] > 1e-3
    assert clear.any() and torch.equal(logits.argmax(1)[clear], golden["argmax"].long()[clear])


@torch.no_grad()
def test_sizes(classifier):
    """Only multiples of 8 come back at their own size; others are refused before they are colorized."""
    net = ECCV16(width=1).eval().to(DEVICE)
    for height, width, h, w, *out in classifier.arrays["odd_sizes"].tolist():
        L = torch.zeros(1, 1, height, width, device=DEVICE)
        assert net.logits(L).shape[2:] == (h, w) and list(net(L).shape[2:]) == out
        if [height, width] == out:
            check_sides(height, width)
        else:
            with pytest.raises(ValueError, match=f"would have {out[0]}x{out[1]}"):
                check_sides(height, width)


@torch.no_grad()
def test_train_mode(classifier):
    net, logits = classifier.net().train(), []
    net.model8.register_forward_hook(lambda _, __, out: logits.append(out))
    close(net(classifier["t_L"]), classifier["t_ab"], 5e-2)
    close(logits[0][0], classifier["t_logits_ex0"], 3e-3)
    state = net.state_dict()
    close_stats(stats_of(state, classifier.names("t_bn_names")), classifier["t_bn_stats"], 1e-5)
    for name in (k for k in classifier.arrays if k.startswith("t_bn/")):
        close(state[name.removeprefix("t_bn/")], classifier[name], 1e-5)


@pytest.mark.parametrize("mode, tolerances", [("g", (1e-5, 5e-5)), ("gt", (2e-2, 3e-2))])
def test_gradients(classifier, mode, tolerances):
    """The weighted cross entropy that the official layers minimize, which differs from the divergence by a constant.

    In double precision: a few inputs of a ReLU are so close to zero that the rounding of some CPUs moves them across.
    """
    net = classifier.net().train(mode == "gt").double()
    target = dense(*(classifier[f"g_target_{k}"].permute(0, 3, 1, 2) for k in ("idx", "w"))).double()
    weight, logits = classifier["g_weight"][:, 0].double(), net.logits(classifier["t_L"].double())
    loss = classification_loss(pixel_divergences(logits, target, weight))
    loss.backward()
    cross_entropy = -(weight[:, None] * target * logits.log_softmax(1)).sum() / len(logits)
    close_loss(cross_entropy, classifier[f"{mode}_loss"], 1e-5)
    gradients = {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
    names = classifier.names("g_names")
    assert list(gradients) == names and "model_out.weight" not in names
    close_stats(stats_of(gradients, names), classifier[f"{mode}_stats"], tolerances[0])
    stored = [k.removeprefix(f"{mode}/") for k in classifier.arrays if k.startswith(f"{mode}/")]
    assert stored
    for name in stored:
        golden = classifier[f"{mode}/{name}"]
        assert (gradients[name] - golden).norm() <= tolerances[1] * SLACK * golden.norm()


@pytest.mark.parametrize("picture", [0, 1])
def test_pictures(classifier, picture):
    """Our steps make the official ones: resize to the network's size, Lab of both, colors back to the own size."""
    p = {
        k.removeprefix(f"p{picture}_"): classifier[k].cpu()
        for k in classifier.arrays
        if k.startswith(f"p{picture}_") and classifier.arrays[k].dtype.kind != "U"
    }
    if not p:
        pytest.skip("this set leaves the picture out")
    rgb = Image.fromarray(p["rgb"].numpy())
    small = np.asarray(rgb.resize(p["HW"].tolist()[::-1], Image.Resampling.BICUBIC))
    close(torch.tensor(small), p["resized_u8"], 0)
    for pixels, golden in ((rgb, "L_orig"), (small, "L_net")):
        lab = rgb_to_lab(torch.tensor(np.asarray(pixels) / 255).permute(2, 0, 1)[None])
        close(lab[:, :1], p[golden], 1e-5)
    for ab, out in (("ab", "out"), ("ab2", "out2")):
        if out in p:
            colors = F.interpolate(p[ab], p["L_orig"].shape[2:], mode="bilinear", align_corners=False)
            close(lab_to_rgb(torch.cat([p["L_orig"], colors], 1))[0].permute(1, 2, 0), p[out], 2e-5)


def test_classes(classifier):
    close(color_classes(), classifier["pts_in_hull"], 0)


def test_lab(classifier):
    close(rgb_to_lab(classifier["bgr"].flip(1).double() / 255), classifier["bgr_lab"], 5e-5)


@pytest.mark.parametrize("neighbors", [10, 5])
def test_soft_encoding(classifier, neighbors):
    sigma = 5.0 if neighbors == 10 else classifier.config["sigma5"]
    target, nearest = soft_encode(classifier["ab"], neighbors, sigma)
    golden = dense(classifier[f"enc{neighbors}_idx"], classifier[f"enc{neighbors}_w"])
    close(target, golden, 1e-6)
    assert torch.equal(nearest, golden.argmax(1))
    if neighbors == 10:
        decoded = torch.einsum("bqhw,qc->bchw", target.double(), color_classes().to(DEVICE).double())
        close(decoded, classifier["dec_of_enc10"], 2e-5)


def test_ties(classifier):
    """Where several classes are the tenth, only the weights are defined."""
    points = classifier["tie_points"].T[None, :, :, None]
    weights = soft_encode(points)[0].squeeze().T
    close(weights.sort(1, descending=True).values[:, :10], classifier["tie_weights_sorted"], 1e-6)
    assert nearest_classes(points, 1)[0].shape == (1, 1, len(points[0, 0]), 1)


def test_rebalancing(classifier):
    prior = classifier.arrays["prior_probs"]
    mix = classifier["prior_mix"]
    close(0.5 * torch.tensor(prior) + 0.5 / 313, mix, 1e-9 * float(mix.min()))
    factors = rebalancing_factors(prior)
    assert np.allclose(factors, classifier.arrays["prior_factor"], rtol=1e-9, atol=0)
    assert np.isclose(factors @ prior, 1) and [round(f(factors), 2) for f in (np.min, np.max)] == [0.10, 6.17]
    nearest = soft_encode(classifier["ab"])[1]
    close(torch.tensor(factors, device=DEVICE)[nearest][:, None].float(), classifier["boost"], 1e-6)


OTHER = {"g50": (1.0, 0.5), "g00": (1.0, 0.0), "g100": (1.0, 1.0), "a50": (0.5, 0.5)}


@pytest.mark.parametrize("name", [*OTHER, "opt"])
def test_other_strengths_of_rebalancing(classifier, name):
    alpha, gamma = OTHER.get(name, classifier.arrays["opt_alpha_gamma"])
    golden = classifier.arrays[f"random_prior_factor_{name}"]
    assert np.allclose(rebalancing_factors(classifier.arrays["random_prior"], alpha, gamma), golden, rtol=1e-9, atol=0)


def test_a_class_that_never_occurs(classifier):
    """The official code then makes every factor NaN; ours stay finite."""
    assert np.isnan(classifier.arrays["zero_prior_factor"]).all()
    factors, prior = rebalancing_factors(classifier.arrays["zero_prior"]), classifier.arrays["zero_prior"]
    assert np.isfinite(factors).all() and np.isclose(factors @ prior, 1)
    assert factors[prior == 0].min() == factors.max()


def test_gray_photographs(classifier):
    mask = gray_mask(classifier["mask_ab"])[:, None]
    close(mask.expand_as(classifier["mask"]), classifier["mask"], 0)


def test_loss(classifier):
    """Its value ignores the weights; its gradient has them."""
    ab, logits = classifier["loss_ab"], classifier["logits"].requires_grad_()
    target, nearest = soft_encode(ab)
    factors = torch.tensor(rebalancing_factors(classifier.arrays["prior_probs"]), device=DEVICE)
    weight = (factors[nearest] * gray_mask(ab)).float()
    close(weight[:, None], classifier["loss_boost"] * classifier["loss_mask"], 1e-6)
    loss = classification_loss(pixel_divergences(logits, target, weight))
    close_loss(loss.detach(), classifier["loss"], 1e-5)
    (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
    close(gradient, classifier["grad_weighted"], 1e-5)
    plain = classification_loss(pixel_divergences(logits, target, torch.ones_like(weight)))
    assert plain.item() == loss.item()
    (gradient,) = torch.autograd.grad(plain, logits)
    close_stats(stats_of({0: gradient}, [0]), classifier["grad_unweighted_stats"][None], 1e-5)


def test_annealed_mean(classifier):
    logits = classifier["anneal_logits"]
    close(annealed_mean(logits, 1 / RELEASED_SCALE), classifier["anneal_ab"], 5e-4)
    close(annealed_mean(logits.double()), classifier["anneal_ab_T038"], 2e-5)  # NumPy's, in float64


def test_gray_files(classifier):
    """The official loader repeats the gray channel; so does Pillow's conversion, which this study uses."""
    if "gray_png" not in classifier:
        pytest.skip("this set leaves the gray file out")
    file = io.BytesIO()
    Image.fromarray(classifier.arrays["gray_png"]).save(file, "png")
    close(torch.tensor(np.asarray(Image.open(file).convert("RGB"))), torch.tensor(classifier.arrays["gray_loaded"]), 0)
