"""What the golden tests share: where the sets lie, how numbers are compared, and the recipes of stored weights.

A golden set is a folder <root>/<model>/ of numbers that the official code produced. The repository keeps a small set
of each model in tests/golden. The tests also use ../shared/golden where that folder exists. The environment variable
FAIC_GOLDEN names a folder that replaces both. Shapes, sizes and options come from the files. Each tolerance is that
of the set's README.

FAIC_GOLDEN_DEVICE names a device other than the CPU. FAIC_GOLDEN_REPORT names a file that gets a line of JSON for
each comparison. FAIC_GOLDEN_SLACK multiplies all tolerances, so that a device that rounds differently is compared to
the end.
"""

import json
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from faic.vqgan import VQModel

TESTS = Path(__file__).parent
DEVICE = torch.device(os.environ.get("FAIC_GOLDEN_DEVICE", "cpu"))
SLACK = float(os.environ.get("FAIC_GOLDEN_SLACK", 1))
if os.environ.get("FAIC_GOLDEN"):
    ROOTS = [Path(os.environ["FAIC_GOLDEN"]).resolve()]
else:
    ROOTS = [TESTS / "golden", TESTS.parents[1] / "shared" / "golden"]
if DEVICE.type == "cuda":  # the official code's products were float32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


def skipped(model, missing):
    """A pytest parameter of a test that has nothing to compare with."""
    reason = f"no {missing} of {model} under {', '.join(map(str, ROOTS))}"
    return pytest.param(None, id=model, marks=pytest.mark.skip(reason=reason))


def sets(model, marker="arrays.npz"):
    """All golden sets of a model, as pytest parameters whose ids contain the model's name."""
    found = []
    for root in ROOTS:
        for folder in {file.parent for file in root.rglob(marker)}:
            name = folder.relative_to(root.parent)
            if any(model in piece for piece in name.parts):
                found.append(pytest.param(folder, id=f"{model}-{root.parent.name}/{name}"))
    return sorted(found, key=lambda parameter: parameter.values[0]) or [skipped(model, "golden set")]


def tensor(array):
    return torch.tensor(array, device=DEVICE)


class Golden:
    """One set: its arrays as tensors, and its configuration."""

    def __init__(self, folder):
        self.folder = folder
        self.arrays = dict(np.load(folder / "arrays.npz", allow_pickle=False))
        self.config = json.loads(str(self.arrays["config"]))

    def __getitem__(self, name):
        return tensor(self.arrays[name])

    def __contains__(self, name):
        return name in self.arrays

    def names(self, name):
        """An array of names as a list of strings."""
        return [str(n) for n in self.arrays[name]]


# Comparisons.


def report(worst, tolerance):
    """Append a line of JSON about one comparison to the file that FAIC_GOLDEN_REPORT names."""
    file = os.environ.get("FAIC_GOLDEN_REPORT")
    if file:
        test = os.environ["PYTEST_CURRENT_TEST"].split("::")[-1].removesuffix(" (call)")
        with open(file, "a") as f:
            f.write(json.dumps(dict(test=test, worst=worst, tolerance=tolerance)) + "\n")


def close(ours, golden, tolerance):
    """Compare all numbers with an absolute tolerance."""
    ours, golden = torch.as_tensor(ours).detach().cpu().double(), torch.as_tensor(golden).cpu().double()
    assert ours.shape == golden.shape
    worst = (ours - golden).abs().max().item()
    report(worst, float(tolerance))
    assert worst <= tolerance * SLACK, f"largest difference {worst:.2e}, tolerance {tolerance:.0e}"


def close_loss(ours, golden, rtol):
    """Compare one number with a relative tolerance."""
    worst = abs(float(ours) - float(golden)) / abs(float(golden))
    report(worst, rtol)
    assert worst <= rtol * SLACK, f"loss {float(ours)}, official {float(golden)}"


def stats_of(state, names):
    """(sum, sum of |x|, L2 norm) of each named tensor in float64."""
    rows = [state[n].double() for n in names]
    return torch.stack([torch.stack([x.sum(), x.abs().sum(), x.norm()]) for x in rows])


def close_stats(ours, golden, rtol=1e-3):
    """Compare statistics with a relative tolerance; sums, which may cancel, on the scale of the sum of magnitudes."""
    scale = golden[:, 1:2].clamp_min(1e-12)
    sums, sizes = (ours - golden).abs()[:, :1] / scale, (ours - golden).abs()[:, 1:] - 1e-9
    worst = torch.maximum(sums.max(), (sizes / golden[:, 1:].abs().clamp_min(1e-300)).max()).item()
    report(worst, rtol)
    assert worst <= rtol * SLACK


# Weights that a set does not store.


def normal(name, shape, seed):
    """Random numbers that depend on a tensor's name, its shape and a seed alone, float64."""
    rng = np.random.RandomState((zlib.crc32(name.encode()) + seed) % 2**32)
    return rng.standard_normal(int(np.prod(shape))).reshape(shape)


def recipe(shapes, seed):
    """name -> random tensor: weights of norms around 1, other weights scaled by their number of inputs."""
    state = {}
    for name, shape in shapes.items():
        z = normal(name, shape, seed)
        if name.endswith("embedding.weight"):
            z = 0.7 * z
        elif len(shape) > 1:
            z = z / np.sqrt(np.prod(shape[1:]))
        elif name.endswith("weight"):
            z = 1 + 0.2 * z
        else:
            z = 0.1 * z
        state[name] = torch.tensor(z.astype(np.float32))
    return state


def first_stage(config):
    """An untrained first stage of LDM's configuration; a level attends where its nominal side is listed."""
    c, attends = config["ddconfig"], config["ddconfig"].get("attn_type") != "none"
    levels = [i for i in range(len(c["ch_mult"])) if attends and c["resolution"] // 2**i in c["attn_resolutions"]]
    return VQModel(
        ch=c["ch"],
        ch_mult=tuple(c["ch_mult"]),
        num_res_blocks=c["num_res_blocks"],
        attn_levels=tuple(levels),
        z_channels=c["z_channels"],
        embed_dim=config["embed_dim"],
        n_embed=config["n_embed"],
        mid_attn=attends,
        in_channels=c["in_channels"],
        out_channels=c["out_ch"],
    )


def code_gap(net, z):
    """Smallest difference between the second smallest and the smallest squared distance to a code."""
    distances = torch.cdist(z.movedim(1, -1).flatten(0, 2).double(), net.quantize.embedding.weight.double()) ** 2
    first, second = distances.topk(2, 1, largest=False).values.unbind(1)
    return (second - first).min()
