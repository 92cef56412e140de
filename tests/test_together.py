"""Several processes make the learning curve and the scores of one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import together


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What one process finds and what two find; they run side by side."""
    out = tmp_path_factory.mktemp("together") / "two.json"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    two = subprocess.Popen([*torchrun, together.__file__, str(out)], env=environment, **pipes)
    one = together.find_all(out.with_suffix(".one"))
    output, _ = two.communicate()
    assert two.returncode == 0, output[-3000:]
    return json.loads(json.dumps(one)), json.loads(Path(out).read_text())


@pytest.mark.parametrize("name", together.TRAINEES)
def test_two_processes_train_as_one(both, name):
    """Batches of 3 and of 1: uneven shares, and a process without an image; in float64 only a mistake differs."""
    one, two = (found[name] for found in both)
    assert len(one["losses"]) == len(two["losses"]) == 12
    for a, b in zip(one["losses"], two["losses"]):
        assert a.keys() == b.keys() and b == pytest.approx(a, rel=1e-8)
    assert two["weights"] == pytest.approx(one["weights"], rel=1e-8)
    assert one["losses"][-1] != pytest.approx(one["losses"][0], rel=1e-3), "nothing was learned"


def test_two_processes_score_as_one(both):
    """47 and 21 photographs: uneven shares, and not a digit more or less."""
    one, two = (found["evaluation"] for found in both)
    assert two == one and one["rows"]["model"]["n"] == 47 and len(one["samples"]) == 8
