"""Everything that needs a GPU, as one command for a machine that is there for minutes and has no network.

README.md lists what to run and what is carried.

python tests/trials/gpu.py pack /my/tiny-imagenet       chunks of photographs, to be carried there
python tests/trials/gpu.py check speed --out OUT        there: is everything right, and how fast is it?
python tests/trials/gpu.py train --out OUT              there: the whole study
python tests/trials/gpu.py collect OUT                  what came back becomes runs
python tests/trials/gpu.py --rehearse                   all of it on the CPU at toy size, within a minute
"""

import argparse
import contextlib
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

TRIALS = Path(__file__).resolve().parent
sys.path[:0] = [str(TRIALS.parents[1]), str(TRIALS.parent), str(TRIALS)]
os.environ.setdefault("TQDM_DISABLE", "1")  # one line an item, no bars
os.environ["OMP_NUM_THREADS"] = "1"  # processes are forked: GNU OpenMP hangs in a child whose parent had several threads
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the GPU is opened
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # a look for GPUs must not keep forked processes from them

LIMITS = dict(check=150, speed=150, train=500)
ROOM = 40 * 2**30  # bytes of memory that the runs of a study may take
STAGES = ("pack", "check", "speed", "train", "collect")


def parse(words):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "stages",
        nargs="*",
        metavar="STAGE",
        help=f"of {', '.join(STAGES)}, in this order; pack and collect take a folder after them",
    )
    p.add_argument(
        "--rehearse", action="store_true", help="all stages, or those that are named, on the CPU at toy size"
    )
    p.add_argument(
        "--out", type=Path, default=Path("gpu-out"), help="folder for what the stages write; it is what comes back"
    )
    p.add_argument(
        "--limit",
        type=lambda text: [float(x) for x in text.split(",")],
        help=f"seconds of each stage, with commas; without it {LIMITS}",
    )
    p.add_argument("--device", default="cuda")
    p.add_argument(
        "--photos",
        type=Path,
        default=Path(".gpu"),
        help="folder with photos-1.npz, photos-2.npz, ...: chunks that pack has written",
    )
    p.add_argument(
        "--work",
        type=Path,
        default=work_folder(),
        help="of train: what stays on the machine between two commands",
    )
    p.add_argument("--only", default="", choices=("", "phase2"), help="of train: no phase 1, so that days are longer")
    p.add_argument(
        "--winners",
        default="",
        help="of train --only phase2: variants, e.g. pix2pix=default,coltran=adam; "
        "without it those of the first command on this machine, else the paper's",
    )
    p.add_argument("--seed", type=int, default=0, help="of train: the first seed of phase 2")
    p.add_argument("--seeds", type=int, default=1, help="of train: how many seeds of phase 2 share the time")
    p.add_argument("--day", type=float, default=0.0, help="of train: seconds of a day; 0 takes what the time allows")
    p.add_argument("--side", type=int, default=64, help="of pack: px")
    p.add_argument(
        "--count",
        type=int,
        default=2500,
        help="of pack: photographs to validate, and to test; 18 times as many are to train on",
    )
    p.add_argument(
        "--sizes", default="24,40", help="of pack: most MiB of the first chunk, the second, ...; never above 40"
    )
    p.add_argument(
        "--quality", type=int, default=92, help="of pack: WebP's, for photographs that are no JPEGs of this side"
    )
    p.add_argument("--name", default="", help="of collect: of the photographs; without it that of the runs")
    options = p.parse_args(words)
    options.folder = options.stages.pop() if options.stages and options.stages[-1] not in STAGES else None
    unknown = [s for s in options.stages if s not in STAGES]
    if unknown or (not options.stages and not options.rehearse):
        p.error(f"expected stages of {', '.join(STAGES)}, or --rehearse; found {', '.join(unknown) or 'none'}")
    if ({"pack", "collect"} & set(options.stages)) and not options.folder and not options.rehearse:
        p.error(f"{options.stages[0]} needs a folder, e.g. gpu.py {options.stages[0]} /my/photographs")
    return options


def work_folder():
    """Where a machine keeps what it works on: in memory where there is much, as large weights wait for a disk."""
    memory, disk = Path("/dev/shm"), Path(tempfile.gettempdir())
    found = [folder / "faic-gpu" for folder in (memory, disk) if (folder / "faic-gpu").exists()]
    roomy = memory.exists() and shutil.disk_usage(memory).free > ROOM
    return found[0] if found else (memory if roomy else disk) / "faic-gpu"


def pairs(text):
    """'a=b,c=d' as a dict."""
    return dict(item.split("=", 1) for item in text.split(",") if item)


def run_stage(stage, o, limit):
    """One stage; its report, or what it found."""
    if stage == "pack":
        from gpu_photos import pack

        counts = dict(train=18 * o.count, validation=o.count, test=o.count)
        return pack(o.folder, o.photos, o.side, counts, [float(s) * 2**20 for s in o.sizes.split(",")], o.quality)
    if stage == "collect":
        from gpu_collect import collect

        return collect(o.folder, o.name or name_of(o.folder))
    if stage == "train":
        from gpu_train import train_stage

        chunks, seeds = sorted(o.photos.glob("photos-*.npz")), range(o.seed, o.seed + o.seeds)
        plan = dict(only=o.only, wanted=pairs(o.winners), seeds=tuple(seeds), day=o.day)
        return train_stage(o.out, o.device, o.rehearse, limit, chunks, o.work, **plan)
    import gpu_check
    import gpu_speed
    from gpu_stage import supervise

    lanes = dict(check=gpu_check, speed=gpu_speed)[stage].lanes(o.device, o.rehearse)
    return supervise(stage, o.out, limit, lanes)


def name_of(folder):
    """The photographs' name in the runs that came back."""
    import json
    import tarfile

    for file in Path(folder).rglob("runs.tar.xz"):
        with tarfile.open(file) as tar:
            for member in tar:
                if member.name.endswith("options.json"):
                    return json.load(tar.extractfile(member))["data"]["name"]
    return "embedded"


def rehearse(o):
    """Every stage at toy size, from photographs to runs; the items that were not done."""
    from gpu_stage import failed

    from faic.dataset import load_photos

    stages, wrong = o.stages or STAGES, []
    limits = dict(check=300, speed=300, train=300)  # where other work slows it down
    with tempfile.TemporaryDirectory(prefix="faic-rehearsal-") as folder:
        root = Path(folder)
        os.environ |= dict(FAIC_RUNS=str(root / "runs"), FAIC_FIGURES=str(root / "figures"))
        o.out, o.photos, o.work = root / "out", root / "packed", root / "work"
        toy_photographs(root / "toys", load_photos().array)
        o.side, o.count, o.sizes = 32, 4, f"{20000 / 2**20},{80000 / 2**20}"
        for stage in stages:
            began = time.monotonic()
            o.folder = root / "toys" if stage == "pack" else o.out
            if stage == "train" and "pack" not in stages:
                raise SystemExit("a rehearsal of train needs pack before it")
            os.environ["FAIC_RUNS"] = str(root / "runs")
            with no_gpu_here():
                report = run_stage(stage, o, limits.get(stage, 60))
            wrong += failed(report) if stage in limits else []
            print(f"rehearsal of {stage}: {time.monotonic() - began:.1f} s", flush=True)
    return wrong


def keep_chunks(o):
    """Chunks that this command brought stay on the machine for the next one."""
    kept = o.work / "photographs" / "chunks"
    kept.mkdir(parents=True, exist_ok=True)
    for chunk in sorted(o.photos.glob("photos-*.npz")):
        shutil.copyfile(chunk, kept / chunk.name)


@contextlib.contextmanager
def no_gpu_here():
    """An error where this process, from which others are forked, asks for GPUs: they could not use one any more."""
    import torch

    mine, plain = os.getpid(), {n: getattr(torch.cuda, n) for n in ("is_available", "device_count", "init")}

    def guarded(name):
        def ask(*args):
            if os.getpid() == mine:
                raise RuntimeError(f"torch.cuda.{name} was called before processes are forked")
            return plain[name](*args)

        return ask

    try:
        for name in plain:
            setattr(torch.cuda, name, guarded(name))
        yield
    finally:
        for name, function in plain.items():
            setattr(torch.cuda, name, function)


def toy_photographs(folder, array):
    """A folder as a user has it: JPEGs of the wanted side, one of another, a gray one."""
    from PIL import Image

    for i, pixels in enumerate(array[::2]):
        picture = Image.fromarray(pixels)
        if i % 50 != 7:
            picture = picture.resize((32, 32))
        if i % 50 == 3:
            picture = picture.convert("L")
        file = folder / f"class{i % 3}" / f"{i:03}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        picture.save(file, quality=75)


def main(words=None):
    o = parse(words)
    began = time.monotonic()
    if o.rehearse:
        wrong = rehearse(o)
        print(
            f"rehearsal: {time.monotonic() - began:.1f} s; "
            + ("\n".join(["not done:", *wrong]) if wrong else "everything was done"),
            flush=True,
        )
        return 1 if wrong else 0
    if o.device != "cpu" and {"check", "speed", "train"} & set(o.stages):
        print(f"{', '.join(o.stages)} on {o.device}; results in {o.out}", flush=True)
        keep_chunks(o)
    limits = dict(zip([s for s in o.stages if s in LIMITS], o.limit or []))
    for stage in o.stages:
        run_stage(stage, o, limits.get(stage, LIMITS.get(stage)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
