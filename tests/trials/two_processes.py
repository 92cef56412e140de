"""How far two processes' losses are from one's: 60 steps of each trainee in float32, and a picture of both curves.

    python tests/trials/two_processes.py [--steps 60] [--processes 2] [--out two_processes.png]

In float64 one process and two agree to 1e-8, which test_together.py checks. In float32 the order of a sum changes the
seventh digit. Adam amplifies that where a gradient is near zero, and so does the VQGAN's choice of codes.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

TOGETHER = Path(__file__).resolve().parents[1] / "together.py"


def losses_of(processes, steps):
    """Name of a trainee -> the losses of each step, a dict each."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        environment = os.environ | dict(OMP_NUM_THREADS="1", FAIC_RUNS=f"{folder}/runs")
        subprocess.run([*command, TOGETHER, out, "float32", str(steps)], check=True, env=environment)
        return {name: found["losses"] for name, found in json.loads(out.read_text()).items() if "losses" in found}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("two_processes.png"))
    options = parser.parse_args()
    one, many = losses_of(1, options.steps), losses_of(options.processes, options.steps)
    figure, axes = plt.subplots(2, len(one), figsize=(2.1 * len(one), 3.2), layout="constrained", sharex=True)
    for (above, below), name in zip(axes.T, one):
        term = list(one[name][0])[-1]
        a, b = (np.array([step[term] for step in found[name]]) for found in (one, many))
        apart = abs(a - b) / abs(a)
        print(f"{name}: loss {term} differs by at most {apart.max():.1e} in {options.steps} steps")
        above.plot(a, lw=3, color="0.75", label="one process")
        above.plot(b, lw=1, label=f"{options.processes} processes")
        below.semilogy(apart + 1e-9, lw=0.8)
        above.set(title=f"{name}: {term}")
        below.set(xlabel="step", ylim=(1e-9, 1))
    axes[0, 0].legend(frameon=False, fontsize=7)
    axes[1, 0].set_ylabel("relative difference")
    figure.savefig(options.out)


if __name__ == "__main__":
    main()
