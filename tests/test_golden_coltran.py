"""ColTran against numbers of the official code.

A set has configs.json, whose keys are <case>_<network>, and files whose names begin with a case: <key>_variables.npz,
<key>_io.npz and others. golden.py lists where sets lie. A set without variables is completed by the recipe of its
README.
"""

import json

import numpy as np
import pytest
import torch
from golden import DEVICE, close, close_loss, normal, sets, skipped, tensor

from faic.axial import ConditioningConfig
from faic.color import luma
from faic.coltran import (
    Colorizer,
    ColTran,
    Upsampler,
    bins_to_rgb,
    bits_per_symbol,
    center_crop_resize,
    resize_area,
    rgb_to_bins,
    upsample_nearest,
)
from faic.coltran_checkpoints import load_coltran, official_colorizer, official_layout, official_state, renumber_layers
from faic.coltran_sampler import (
    RowBuffers,
    make_cached_sampler,
    outer_decode_row,
    prepare_row,
    sample_naive,
    sample_row,
    upsample,
)
from faic.core import Budget
from faic.layers import count_params
from faic.runs import Run
from faic.tf_checkpoints import EMA_SUFFIX, read_tf_checkpoint, tensor_places
from faic.train import train_step
from faic.trainer import Trainer

LOGITS, PROBABILITIES = 2e-4, 1e-5  # absolute
LOSS = 1e-5  # relative
TIE = 1e-3  # where the best two logits are closer than this, the argmax is not compared
SCALES = {"bias": 0.3, "beta": 0.3, "position_embedding": 0.5, "relative_attention_bias": 0.7}


def procedural(name, shape, seed):
    """Weights as the sets' README describes them: random numbers that depend on the variable's name and a seed."""
    z, kind = normal(name, shape, seed), name.rsplit("/", 1)[1].removesuffix(":0")
    if kind == "kernel":
        inputs = shape[0] * shape[1] if name.endswith("/output/kernel:0") else shape[0]
        z = z / np.sqrt(inputs) * (3 if "auto_logits" in name or "parallel_logits" in name else 1)
    elif kind == "spatial_average":
        z = 1 + 0.5 * z
    elif kind == "gamma":
        z = 1 + 0.3 * z
    else:
        z = SCALES[kind.rstrip("_01")] * z
        if kind == "bias" and "conditional_layer_norm" in name:
            z[: len(z) // 2] += 1
    return z.astype(np.float32)


def network(config):
    """An untrained network of the official configuration."""
    model, size = config["model"], (config["height"], config["width"])
    if "decoder" not in model:
        widths = model["hidden_size"], model["num_heads"], model["ff_size"]
        return Upsampler(model["name"].split("_")[0], *size, *widths, model["num_encoder_layers"])
    e, d = model["encoder"], model["decoder"]
    conditions = ConditioningConfig(
        "".join(t for t in "qkv" if d[f"cond_att_{t}"]),
        d["cond_att_scale"],
        d["cond_att_act"],
        d["cond_mlp"] or "",
        d["cond_mlp_act"],
        d["cond_ln_sp_ave"] if d["cond_ln"] else "",
        d["cond_ln_seq"],
        d["cond_ln_act"],
    )
    return Colorizer(
        *size,
        model["hidden_size"],
        d["num_heads"],
        d["ff_size"],
        e["num_encoder_layers"],
        d["num_outer_layers"],
        d["num_inner_layers"],
        e["num_heads"],
        e["ff_size"],
        conditions,
        d["skip"],
        "encoder" in model["stage"],
    )


def variable_shapes(net):
    """Official name, layers renumbered -> shape."""
    return {name: shape for mapping in official_layout(net) for name, shape in mapping.shapes.items()}


def recipe(net, names, seed):
    """The official arrays of a network, made by the recipe; `names` may be those of a network with more layers."""
    official = renumber_layers(names)
    return {official[n]: procedural(official[n], shape, seed) for n, shape in variable_shapes(net).items()}


class Case:
    """One network of one case: its configuration, weights and files."""

    def __init__(self, folder, key):
        self.folder, self.key, self.config = folder, key, json.loads((folder / "configs.json").read_text())[key]

    def load(self, suffix):
        file = self.folder / f"{self.key}_{suffix}.npz"
        if not file.exists():
            pytest.skip(f"no {file.name} in {self.folder}")
        return dict(np.load(file))

    def variables(self, net):
        """The official arrays: from a file or, where the set has none, by the recipe; the io file has the names."""
        if (self.folder / f"{self.key}_variables.npz").exists():
            return self.load("variables")
        return recipe(net, (str(n) for n in self.load("io")["variable_names"]), self.config["weight_seed"])

    def net(self):
        net = network(self.config)
        net.load_state_dict(official_state(self.variables(net), net, self.key))
        return net.eval().to(DEVICE)


def folders():
    """(folder, its pytest id) of all sets."""
    return [(s.values[0], s.id) for s in sets("coltran", "configs.json") if s.values[0]]


def cases(network):
    """All cases of a network in all sets, as pytest parameters."""
    found = []
    for folder, name in folders():
        keys = [key for key in json.loads((folder / "configs.json").read_text()) if key.endswith(network)]
        found += [pytest.param(Case(folder, key), id=f"{name}-{key}") for key in keys]
    return found or [skipped("coltran", f"configuration of a {network}")]


def files(pattern):
    """(folder, what the star stands for) of all files of this pattern in all sets, as pytest parameters."""
    found, (start, _, end) = [], pattern.partition("*")
    for folder, name in folders():
        for file in sorted(folder.glob(pattern)):
            star = file.name.removeprefix(start).removesuffix(end)
            found.append(pytest.param((folder, star), id=f"{name}-{file.name}"))
    return found or [skipped("coltran", pattern)]


def channels_first(images):
    """(B,H,W,3) of a file to (B,3,H,W) long."""
    return tensor(images).long().movedim(-1, 1)


def gray_of(pixels):
    """(B,3,H,W) long to ColTran's gray, (B,H,W) long."""
    return (luma(pixels.to(torch.uint8), "coltran") * 255).round().long()[:, 0]


def compare(golden, tolerance, **ours):
    """Compare what the file has of ours, perhaps only of the first images; returns how many arrays that were."""
    stored = [(value, golden[n]) for name, value in ours.items() for n in (name, f"{name}_ex0") if n in golden]
    for value, array in stored:
        close(value[: len(array)], array, tolerance)
    return len(stored)


def compare_losses(golden, **ours):
    assert any(name in golden for name in ours)
    for name, value in ours.items():
        if name in golden:
            close_loss(value, golden[name], LOSS)


def top_gap(logits):
    first, second = logits.topk(2, -1).values.unbind(-1)
    return first - second


@torch.no_grad()
def check_teacher_forcing(net, golden):
    rgb = channels_first(golden["rgb"])
    gray, labels = gray_of(rgb), rgb_to_bins(rgb)
    close(gray[..., None], golden["gray"], 0)
    close(labels, golden["labels"], 0)
    z = net.encode(gray)
    out = net(z, labels)
    assert not out["above"][:, 0].any()
    assert compare(golden, LOGITS, z=z, h_upper=out["above"], h_inner=out["inner"], dec_logits=out["logits"])
    losses = dict(loss_auto=bits_per_symbol(out["logits"], labels))
    if net.aux is not None:
        logits = net.aux(z)
        losses["loss_encoder"] = bits_per_symbol(logits, labels)
        losses["total_loss_099_001"] = 0.99 * losses["loss_auto"] + 0.01 * losses["loss_encoder"]
        compare(golden, LOGITS, enc_logits=logits)
        close(bins_to_rgb(logits.argmax(-1)).movedim(1, -1), golden["parallel_image"], 0)
    compare_losses(golden, **losses)


@torch.no_grad()
def check_greedy(net, golden):
    """Greedy symbols of the naive and of the cached sampler, exactly; float64 must not change a symbol either."""
    gray, symbols = tensor(golden["gray"])[..., 0].long(), tensor(golden["argmax_bins"]).long()
    naive = sample_naive(net, gray, temperature=0)
    close(naive["symbols"], symbols, 0)
    close(bins_to_rgb(naive["symbols"]).movedim(1, -1), golden["argmax_image"], 0)
    close(make_cached_sampler(net, len(gray), temperature=0)(gray), symbols, 0)
    probabilities = naive["logits"].softmax(-1)
    compare(golden, PROBABILITIES, argmax_proba=probabilities)
    compare(golden, LOGITS, argmax_logit_gap=top_gap(naive["logits"]))
    if "teacher_forced_vs_sampler_max_dproba" in golden:
        forced = net(net.encode(gray), symbols)["logits"].softmax(-1)
        close((forced - probabilities).abs().max(), golden["teacher_forced_vs_sampler_max_dproba"], PROBABILITIES)
    double = net.double()
    close(sample_naive(double, gray, temperature=0)["symbols"], symbols, 0)
    close(make_cached_sampler(double, len(gray), temperature=0)(gray), symbols, 0)


@pytest.mark.parametrize("case", cases("_colorizer"))
def test_teacher_forcing(case):
    check_teacher_forcing(case.net(), case.load("io"))


@pytest.mark.parametrize("case", cases("_colorizer"))
def test_greedy(case):
    check_greedy(case.net(), case.load("io"))


@pytest.mark.parametrize("case", cases("_upsampler"))
@torch.no_grad()
def test_upsampler(case):
    net, golden = case.net(), case.load("io")
    rgb, step = channels_first(golden["rgb"]), int(golden.get("logit_stride", 1))
    gray, suffix = gray_of(rgb), "_strided" if "logit_stride" in golden else ""
    close(gray[..., None], golden["gray"], 0)
    if net.kind == "color":
        coarse = rgb // 32
        compare(golden, 0, bits=coarse.movedim(1, -1))
    else:
        low = resize_area(rgb, rgb.shape[2] // 4, rgb.shape[3] // 4)
        coarse = upsample_nearest(low)
        compare(golden, 0, low=low.movedim(1, -1), low_up=coarse.movedim(1, -1))
    channel, images = tensor(golden["channel_index"]).long(), torch.arange(len(rgb), device=DEVICE)
    train = net(coarse[images, channel], channel, gray)
    each = torch.stack([net(coarse[:, c], torch.full((len(rgb),), c, device=DEVICE), gray) for c in range(3)], 3)
    compare(golden, LOGITS, **{f"logits_train{suffix}": train[:, ::step, ::step, None]})
    compare(golden, LOGITS, **{f"logits_eval{suffix}": each[:, ::step, ::step]})
    train_bits, each_bits = bits_per_symbol(train, rgb[images, channel]), bits_per_symbol(each, rgb.movedim(1, -1))
    compare_losses(golden, loss_train=train_bits, loss_eval=each_bits)
    sure = torch.tensor(golden["argmax_logit_gap"]).float() >= TIE
    for ours in (each.argmax(-1), upsample(net, coarse if net.kind == "color" else low, gray).movedim(1, -1)):
        close(ours[sure], golden["argmax"][sure.numpy()], 0)


@pytest.mark.parametrize("found", files("*_end_to_end.npz"))
@torch.no_grad()
def test_end_to_end(found):
    folder, name = found
    golden = dict(np.load(folder / f"{name}_end_to_end.npz"))
    keys = [f"{name}_{network}" for network in ("colorizer", "color_upsampler", "spatial_upsampler")]
    colorizer, color_upsampler, spatial_upsampler = (Case(folder, key).net() for key in keys)
    rgb = center_crop_resize(channels_first(golden["image"][None]), golden["gray"].shape[1])
    gray, gray_low = gray_of(rgb), gray_of(resize_area(rgb, *golden["gray_low"].shape[1:3]))
    stage1 = bins_to_rgb(make_cached_sampler(colorizer, 1, temperature=0)(gray_low))
    stage2 = upsample(color_upsampler, stage1 // 32, gray_low)
    ours = dict(
        gray=gray[:, None],
        gray_low=gray_low[:, None],
        stage1=stage1,
        stage2=stage2,
        stage2_up=upsample_nearest(stage2),
        final=upsample(spatial_upsampler, stage2, gray),
    )
    for n, image in ours.items():
        close(image.movedim(1, -1), golden[n], 0)


@pytest.mark.parametrize("found", files("*_colorizer_gradients.npz"))
def test_gradients(found):
    folder, name = found
    case, golden = Case(folder, f"{name}_colorizer"), dict(np.load(folder / f"{name}_colorizer_gradients.npz"))
    net, rgb = case.net(), channels_first(np.load(folder / f"{name}_train_io.npz")["batches"][0])
    z, symbols = net.encode(gray_of(rgb)), rgb_to_bins(rgb)
    auto, aux = bits_per_symbol(net(z, symbols)["logits"], symbols), bits_per_symbol(net.aux(z), symbols)
    (0.99 * auto + 0.01 * aux).backward()
    frozen = {n: np.zeros_like(a) for n, a in case.variables(net).items() if n not in golden}
    expected = official_state(golden | frozen, net)
    trained = {n: p.grad for n, p in net.named_parameters() if p.requires_grad}
    assert sum(g.numel() for g in trained.values()) == sum(a.size for a in golden.values())
    for n, g in trained.items():
        scale = expected[n].abs().max()
        close(g / scale, expected[n] / scale, 3e-5)


def trained_states(case, final_variables):
    """Our state dicts of the final weights and of their averages, from two files or else from the checkpoint."""
    if not final_variables.exists():
        path = case.folder / f"{case.key}_checkpoint"
        return [load_coltran(network(case.config), path, ema=ema).state_dict() for ema in (False, True)]
    net, final = network(case.config), dict(np.load(final_variables))
    averages = dict(np.load(str(final_variables).replace("variables", "ema")))
    return official_state(final, net), official_state(final | averages, net)


@pytest.mark.parametrize("found", files("*_train_io.npz"))
def test_training_steps(found, tmp_path):
    """The training loop makes the official steps of RMSprop and of the moving average.

    RMSprop divides a gradient by its own size, so where a gradient is tiny, rounding decides the step.
    """
    folder, name = found
    case, golden = Case(folder, f"{name}_colorizer"), dict(np.load(folder / f"{name}_train_io.npz"))
    if case.config["height"] != case.config["width"]:
        pytest.skip("ColTran trains on squares")
    model = ColTran(4 * case.config["height"], dim=8, heads=1, ff=8)
    model.net = case.net()
    batches, lr = [channels_first(b).float() / 255 for b in golden["batches"]], 3e-4
    options = dict(optimizer="rmsprop", lr=lr, schedule="constant", batch_size=len(batches[0]), seed=0)
    options |= dict(ema=dict(decay=0.999, start=0, every=1))
    array, budget = np.zeros((1, 1, 1, 3), np.uint8), Budget(len(batches), "steps")
    trainer = Trainer(model, Run(tmp_path, options), array, np.arange(1), budget, options, device=DEVICE)
    tiny = {n: torch.zeros_like(p, dtype=torch.bool) for n, p in model.net.named_parameters()}
    for rgb, losses in zip(batches, golden["losses_auto_enc_total"]):
        seen = train_step(trainer, dict(index=torch.arange(len(rgb)), rgb=rgb))
        trainer.step += 1
        for term, value in zip(("auto", "aux", "net"), losses):
            close_loss(seen[term], value, LOSS)
        for n, p in trainer.networks["net"].named_parameters():
            if p.requires_grad:
                tiny[n] |= (p.grad != 0) & (p.grad.abs() < 1e-5)
    final, average = trained_states(case, folder / f"{name}_train_final_variables.npz")

    def check(net, expected, tolerance, tolerance_of_tiny):
        for n, p in net.named_parameters():
            difference = (p.detach() - expected[n].to(DEVICE)).abs()
            allowed = torch.where(tiny[n], tolerance_of_tiny, tolerance)
            assert (difference <= allowed).all(), f"{n}: {difference.max().item()}"

    check(trainer.networks["net"], final, 1e-5, 2 * len(batches) * lr)
    check(trainer.ema["net"].module, average, 1e-6, 1e-5)


@pytest.mark.parametrize("found", files("*_colorizer_checkpoint"))
def test_checkpoint(found):
    """A checkpoint that TensorFlow wrote: all keys and numbers, and what the official code computes with them."""
    folder, name = found
    case, path = Case(folder, f"{name}_colorizer"), folder / f"{name}_colorizer_checkpoint"
    if (keys := folder / f"{path.name}_keys.json").exists():
        assert {k: list(place.shape) for k, place in tensor_places(path)[0].items()} == json.loads(keys.read_text())
    arrays = read_tf_checkpoint(path)
    for kind, ending in (("variables", ":0"), ("ema", EMA_SUFFIX)):
        if (file := folder / f"{name}_train_final_{kind}.npz").exists():
            golden = dict(np.load(file))
            assert len(golden) and all(np.array_equal(arrays[n.replace(":0", ending)], a) for n, a in golden.items())
    net, raw = official_colorizer(path).to(DEVICE), load_coltran(network(case.config), path, ema=False)
    assert {n: t.shape for n, t in net.state_dict().items()} == {n: t.shape for n, t in raw.state_dict().items()}
    assert not torch.equal(net.head.weight.cpu(), raw.head.weight)
    golden = dict(np.load(folder / f"{name}_restored_ema_io.npz"))
    check_teacher_forcing(net, golden)
    check_greedy(net, golden)


@pytest.mark.parametrize("folder", sets("coltran", "configs.json"))
def test_recipe_of_the_weights(folder):
    """The weights in the files are those of the recipe, so a set need not store them."""
    configs = json.loads((folder / "configs.json").read_text())
    stored = {key: dict(np.load(f)) for key in configs if (f := folder / f"{key}_variables.npz").exists()}
    if not stored:
        pytest.skip(f"no weights in {folder}")
    for key, arrays in stored.items():
        for n, a in arrays.items():
            assert np.array_equal(a, procedural(n, a.shape, configs[key]["weight_seed"])), (key, n)


@pytest.mark.parametrize("found", files("variables_*.json"))
def test_variables(found):
    """Official variables and our parameters correspond one to one, with the same shapes."""
    golden = json.loads((found[0] / f"variables_{found[1]}.json").read_text())
    shapes = {v["name"]: tuple(v["shape"]) for v in golden["variables"]}
    height, width = (next(s[0] for n, s in shapes.items() if n.endswith(f"position_embedding_{i}:0")) for i in (0, 1))
    with torch.device("meta"):
        net = network(dict(model=golden["config"], height=height, width=width))
    ours = {n: tuple(shape) for n, shape in variable_shapes(net).items()}
    assert ours == {n: shapes[official] for n, official in renumber_layers(shapes).items()}
    assert (count_params(net), count_params(net, only_trained=True)) == (golden["total"], golden["trainable"])


@pytest.mark.parametrize("found", files("preprocess_*.npz"))
def test_preprocessing(found):
    folder, name = found
    golden = dict(np.load(folder / f"preprocess_{name}.npz"))
    image = channels_first(golden["image"][None])
    ours = dict(square=center_crop_resize(image), graymode_square=center_crop_resize(image[:, :1]))
    low = golden["low"].shape[:2]
    ours |= dict(low=resize_area(ours["square"], *low), graymode_low=resize_area(ours["graymode_square"], *low))
    ours["gray_low"] = gray_of(ours["low"])[:, None]
    assert len(ours.keys() & golden.keys()) >= 3
    for n in ours.keys() & golden.keys():
        close(ours[n][0].movedim(0, -1), golden[n], 0)


def paper_size(folder, net, table, seed):
    """A network of the paper's size with the recipe's weights, and their sum of magnitudes; `table` has the names."""
    file = folder / f"variables_{table}.json"
    if not file.exists():
        pytest.skip(f"no {file.name} in {folder}")
    arrays = recipe(net, (v["name"] for v in json.loads(file.read_text())["variables"]), seed)
    net.load_state_dict(official_state(arrays, net))
    return net.eval().to(DEVICE), sum(np.abs(a, dtype=np.float64).sum() for a in arrays.values())


def at(logits, positions):
    return logits[0, positions[:, 0], positions[:, 1]]


@pytest.mark.parametrize("found", files("P_paper_size.npz"))
@torch.no_grad()
def test_paper_size_colorizer(found):
    """Teacher forcing, and two greedy rows of the cached sampler.

    The naive sampler's rows are checked by teacher forcing on the expected symbols: by induction it draws the same.
    """
    folder = found[0]
    golden = dict(np.load(folder / "P_paper_size.npz"))
    net, total = paper_size(folder, Colorizer(), "colorizer_paper_1layer", 5100)
    assert (count_params(net), count_params(net, only_trained=True)) == tuple(golden["colorizer_num_params"])
    assert total == pytest.approx(float(golden["colorizer_abs_sum"]), rel=1e-9)
    rgb = channels_first(golden["rgb"])
    gray, labels = gray_of(rgb), rgb_to_bins(rgb)
    z = net.encode(gray)
    logits, enc_logits = net(z, labels)["logits"], net.aux(z)
    close(at(logits, golden["positions"]), golden["dec_logits_at"], LOGITS)
    close(at(enc_logits, golden["positions"]), golden["enc_logits_at"], LOGITS)
    compare_losses(golden, loss_auto=bits_per_symbol(logits, labels), loss_encoder=bits_per_symbol(enc_logits, labels))
    for ours, name in ((logits, "dec_argmax"), (enc_logits, "enc_argmax")):
        sure = (top_gap(ours)[0] >= TIE).cpu()
        close(ours.argmax(-1)[0][sure], golden[name][sure.numpy()], 0)

    symbols = tensor(golden["greedy_first_rows_bins"]).long()
    rows = len(symbols)
    canvas = torch.zeros_like(labels)
    canvas[0, :rows] = symbols
    forced = net(z, canvas, "row")["logits"][0, :rows]
    close(forced.argmax(-1), symbols, 0)
    close(top_gap(forced), golden["greedy_first_rows_gap"], LOGITS)

    buffers, above = RowBuffers(net, 1, temperature=0), torch.zeros_like(z[:, 0])
    inner_terms = [block.norm_terms(z, "row") for block in net.inner]
    outer_terms = [block.norm_terms(z, "image") for block in net.outer]
    cache = [[z.new_zeros(1, *z.shape[2:0:-1], z.shape[3]) for _ in range(2)] for _ in net.outer[::2]]
    for r in range(rows):
        prepare_row(buffers, r, z, above, inner_terms, torch.no_grad)
        sample_row(buffers)
        close(buffers.drawn.T, symbols[r : r + 1], 0)
        above = outer_decode_row(net, r, buffers.drawn.T, z, outer_terms, cache)


@pytest.mark.parametrize("found", files("P_paper_size.npz"))
@torch.no_grad()
def test_paper_size_color_upsampler(found):
    folder = found[0]
    golden = dict(np.load(folder / "P_paper_size.npz"))
    net, _ = paper_size(folder, Upsampler("color", 64, 64), "color_upsampler", 5101)
    assert count_params(net) == golden["color_num_params"]
    rgb = channels_first(golden["rgb"])
    logits = torch.stack([net(rgb[:, c] // 32, tensor([c]), gray_of(rgb)) for c in range(3)], 3)
    close(at(logits, golden["positions"]), golden["color_logits_at"], LOGITS)
    sure = torch.tensor(golden["color_gap"]).float() >= TIE
    close(logits.argmax(-1)[0][sure], golden["color_argmax"][sure.numpy()], 0)


@pytest.mark.slow
@pytest.mark.parametrize("found", files("P_paper_size.npz"))
@torch.no_grad()
def test_paper_size_spatial_upsampler(found):
    folder = found[0]
    golden = dict(np.load(folder / "P_paper_size.npz"))
    net, _ = paper_size(folder, Upsampler("spatial", 256, 256), "spatial_upsampler", 5102)
    assert count_params(net) == golden["spatial_num_params"]
    rgb = channels_first(golden["rgb256"])
    logits = net(upsample_nearest(resize_area(rgb, 64, 64))[:, 1], tensor([1]), gray_of(rgb))
    close(at(logits, golden["positions256"]), golden["spatial_logits_at_channel1"], LOGITS)
    logits = logits[:, ::4, ::4]
    sure = (top_gap(logits)[0] >= TIE).cpu()
    close(logits.argmax(-1)[0][sure], golden["spatial_argmax_channel1_strided4"][sure.numpy()], 0)
