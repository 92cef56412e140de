"""What ColTran's notebook cannot say: the fast sampler on a GPU, and at the paper's size."""

import pytest
import torch

from faic.coltran import Colorizer, Upsampler, init_weights
from faic.coltran_sampler import coltran_colorizer, make_cached_sampler, sample_naive
from faic.core import make_generator


def generators(*images):
    return [make_generator(0, i) for i in images]


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device: the captured graph of the pixel loop can't be tried"
)
def test_fast_sampler_on_cuda_equals_plain_on_cpu():
    net = init_weights(Colorizer(8, 8, 32, 4, 32, outer_layers=2, inner_layers=2)).double()
    gray = torch.randint(256, (3, 8, 8), generator=make_generator(1))
    cases = [(t, norm, seeds) for t in (0, 1) for norm in ("row", "image") for seeds in ((0, 1, 2), (3, 4, 5))]
    plain = {c: sample_naive(net, gray, generators(*c[2]), c[0], c[1])["symbols"] for c in cases}
    net.cuda()
    samplers = {
        (t, norm): make_cached_sampler(net, 3, t, norm) for t, norm, _ in cases
    }  # each is replayed for a second batch
    for t, norm, seeds in cases:
        assert torch.equal(samplers[t, norm](gray.cuda(), generators(*seeds)).cpu(), plain[t, norm, seeds]), (
            t,
            norm,
            seeds,
        )


@pytest.mark.slow
def test_paper_size_drawn_symbols_do_not_depend_on_the_batch():
    nets = [
        init_weights(n, 3).eval() for n in (Colorizer(), Upsampler("color", 64, 64), Upsampler("spatial", 256, 256))
    ]
    gray = torch.randint(256, (2, 64, 64), generator=make_generator(1))
    nets[0].double()
    together = make_cached_sampler(nets[0], 2)(gray, generators(0, 1))
    alone = torch.cat([make_cached_sampler(nets[0], 1)(gray[i : i + 1], generators(i)) for i in range(2)])
    assert torch.equal(together, alone)
    nets[0].float()
    rgb = coltran_colorizer(*nets)(torch.rand(1, 1, 256, 256, generator=make_generator(2)), generators(0))
    assert rgb.shape == (1, 3, 256, 256) and 0 <= rgb.min() and rgb.max() <= 1
