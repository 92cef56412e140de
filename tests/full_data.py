"""The data of the whole study, measured: preparation, loading, enlarging, batches, a kill, and an evaluation of 5000 photographs.

Not a test of `make test` (its name does not begin with test_): it needs a folder of photographs, gigabytes of disk and minutes.

    python tests/full_data.py FOLDER [--photographs ../shared/photos256] [--images 20000] [--side 256] [--load-side 286] [--evaluated 5000] [--keep]

FOLDER (made, and emptied again at the end but for report.md) gets `--images` photographs, links to those of `--photographs` under new names, or
copies where the disk is another; so they come from the page cache, and the seconds hold no time of a slow disk. Every step is a process of its own.
Memory is RssAnon of /proc/<pid>/status, looked at 50 times a second: what a process itself holds, without the pages of mapped files, which the
kernel takes back when it needs them. VmHWM is the peak with those pages. Needs Linux.
"""

import argparse
import dataclasses
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

FULL = 100_000  # photographs of the paper


def link_photographs(source, folder, count):
    """`count` files in folder, made of those in source again and again."""
    folder.mkdir(parents=True)
    files = sorted(f for f in source.iterdir() if f.is_file())
    for i, f in zip(range(count), itertools.cycle(files)):
        target = folder / f"{i:06}{f.suffix}"
        try:
            os.link(f, target)
        except OSError:
            shutil.copy2(f, target)


# The steps: functions of the arguments that return what they found; each runs in a fresh process.


def photographs(a):
    from faic.dataset import load_photos

    return load_photos(a.folder / "photos", a.side)


def prepare(a):
    photos = photographs(a)
    return dict(
        fingerprint=photos.fingerprint,
        bytes=(photos.folder / "pixels.u8").stat().st_size,
        rest=sum(f.stat().st_size for f in photos.folder.iterdir() if f.suffix != ".u8"),
    )


def load(a):
    began = time.perf_counter()
    from faic.dataset import load_photos  # and torch: the greater part of a short step

    imported = time.perf_counter() - began
    began = time.perf_counter()
    photos = load_photos(a.folder / "photos", a.side)
    return dict(imported=imported, loaded=time.perf_counter() - began, fingerprint=photos.fingerprint)


def enlarge(a):
    from faic.dataset import resized_for_crops

    photos = photographs(a)
    array = resized_for_crops(photos, a.load_side)
    return dict(images=len(array), bytes=sum(f.stat().st_size for f in photos.folder.glob(f"train-{a.load_side}-*")))


def batches(a, seconds=10):
    from faic.batches import training_batches
    from faic.dataset import resized_for_crops

    photos, found = photographs(a), {}
    array = resized_for_crops(photos, a.load_side)
    for size in (4, 32):
        stream = training_batches(array, photos.splits["train"], size, seed=0, crop=a.side)
        next(stream)
        began, cpu, made = time.perf_counter(), time.process_time(), 0
        while time.perf_counter() - began < seconds:
            next(stream)
            made += 1
        found[size] = dict(
            batches_per_second=made / (time.perf_counter() - began),
            cpu_ms_per_image=1000 * (time.process_time() - cpu) / made / size,
        )
        stream.close()
    return found


def evaluation(a):
    import torch

    from faic.evaluate import evaluate, gray_baseline
    from faic.metrics import efficientnet_lite0

    photos, n = photographs(a), a.evaluated
    rows = torch.arange(len(photos.array)).numpy()
    splits = dict(photos.splits, test=rows[-n:], validation=rows[-2 * n : -n])  # as many as in the paper's split
    photos = dataclasses.replace(photos, splits=splits, fingerprint=f"full{n}-{photos.fingerprint}")
    feature_net, seen = efficientnet_lite0(), []
    feature_net.register_forward_hook(lambda net, images, output: seen.append(len(images[0])))
    rows, _ = evaluate(gray_baseline, photos, "test", feature_net)
    return dict(judged=sum(seen), threads=torch.get_num_threads(), row=rows["photograph"])


STEPS = dict(prepare=prepare, load=load, enlarge=enlarge, batches=batches, evaluation=evaluation)


def memory(pid, field):
    try:
        line = next(
            (l for l in Path(f"/proc/{pid}/status").read_text().splitlines() if l.startswith(field + ":")), "_ 0"
        )
    except (FileNotFoundError, ProcessLookupError):
        line = "_ 0"
    return int(line.split()[1]) * 1024


def start(a, step, runs):
    environment = dict(os.environ, FAIC_RUNS=str(a.folder / runs))
    mine = [
        str(a.folder),
        "--images",
        str(a.images),
        "--side",
        str(a.side),
        "--load-side",
        str(a.load_side),
        "--evaluated",
        str(a.evaluated),
    ]
    return subprocess.Popen(
        [sys.executable, __file__, *mine, "--step", step], env=environment, stdout=subprocess.PIPE, text=True
    )


def measured(a, step, runs="runs"):
    """What a step returned, and its seconds, CPU seconds and peaks of memory."""
    before, began = os.times(), time.perf_counter()
    process, anonymous, whole = start(a, step, runs), 0, 0
    while process.poll() is None:
        anonymous, whole = max(anonymous, memory(process.pid, "RssAnon")), max(whole, memory(process.pid, "VmHWM"))
        time.sleep(0.02)
    wall, after = time.perf_counter() - began, os.times()
    if process.returncode:
        raise SystemExit(f"{step} stopped with exit code {process.returncode}")
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    found = dict(
        json.loads(process.stdout.read().splitlines()[-1]), wall=wall, cpu=cpu, anonymous=anonymous, whole=whole
    )
    print(step, json.dumps(found), flush=True)
    return found


def killed(a, runs):
    """Kill a preparation when about a third is done; how many files that were."""
    process, done = start(a, "prepare", runs), 0
    while done < a.images // 3:
        assert process.poll() is None, "it ended before it was killed"
        time.sleep(0.2)
        log = next((a.folder / runs).glob("data-*/manifest.jsonl"), None)
        done = log.read_text(errors="replace").count("\n") if log else 0
    process.send_signal(signal.SIGKILL)
    process.wait()
    return done


def table(a, found):
    gb, mb, times = 1e9, 1e6, FULL / a.images
    limit = {"prepare": "1000 MB", "evaluation": "4000 MB", "evaluation again": "4000 MB"}
    lines = [
        f"| step | s | CPU s | memory of its own, MB | with mapped pages, MB | limit | CPU s at {FULL} |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, f in found.items():
        grows = not name.startswith(("evaluation", "batches"))
        full = f"{f['cpu'] * times:.0f}" if grows else f"{f['cpu']:.0f}"
        lines.append(
            f"| {name} | {f['wall']:.1f} | {f['cpu']:.1f} | {f['anonymous'] / mb:.0f} | {f['whole'] / mb:.0f} | {limit.get(name, '')} | {full} |"
        )
    p, e, n = found["prepare"], found["enlarge"], a.evaluated
    lines += [
        "",
        f"- {a.images} photographs at {a.side}x{a.side}; every CPU s grows with their number but those of batches and evaluation ({n} photographs).",
        f"- Disk: {p['bytes'] / gb:.2f} GB prepared, {p['rest'] / mb:.1f} MB beside it, {e['bytes'] / gb:.2f} GB enlarged to {a.load_side} ({e['images']} photographs); "
        f"at {FULL}: {p['bytes'] * times / gb:.1f}, {p['rest'] * times / gb:.2f} and {e['bytes'] * times / gb:.1f} GB.",
        f"- Loading again, after {found['load']['imported']:.1f} s of imports: {found['load']['loaded']:.2f} s; at {FULL}: {found['load']['loaded'] * times:.1f} s.",
        *(
            f"- Batches of {size} from the enlarged array: {b['batches_per_second']:.0f} a second, {b['cpu_ms_per_image']:.2f} CPU ms an image."
            for size, b in found["batches"].items()
            if size.isdigit()
        ),
        f"- Killed after {found['resumed']['done']} files and resumed: fingerprint {found['resumed']['fingerprint']}; undisturbed {p['fingerprint']}.",
        f"- Images judged: {found['evaluation']['judged']} in the first evaluation, {found['evaluation again']['judged']} in the second.",
    ]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--photographs", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "photos256"
    )
    for name, value in dict(images=20_000, side=256, load_side=286, evaluated=5_000).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--keep", action="store_true", help="leave everything there")
    parser.add_argument("--step", choices=list(STEPS), help=argparse.SUPPRESS)
    a = parser.parse_args()
    a.folder = a.folder.resolve()
    if a.step:
        return print(json.dumps(STEPS[a.step](a)))
    if not a.photographs.is_dir():
        raise SystemExit(f"{a.photographs} is no folder of photographs; give one with --photographs")
    link_photographs(a.photographs, a.folder / "photos", a.images)
    try:
        found = {step: measured(a, step) for step in ("prepare", "load", "enlarge", "batches")}
        done = killed(a, "killed")
        found["resumed"] = dict(measured(a, "prepare", "killed"), done=done)
        shutil.rmtree(a.folder / "killed")
        found["evaluation"] = measured(a, "evaluation")
        found["evaluation again"] = measured(a, "evaluation")
        report = table(a, found)
        (a.folder / "report.md").write_text(report + "\n")
        print("\n" + report)
        assert found["resumed"]["fingerprint"] == found["prepare"]["fingerprint"] == found["load"]["fingerprint"]
        assert found["evaluation"]["row"].keys() == found["evaluation again"]["row"].keys()
        assert (found["evaluation"]["judged"], found["evaluation again"]["judged"]) == (3 * a.evaluated, a.evaluated)
    finally:
        if not a.keep:
            for name in ("photos", "runs", "killed"):
                shutil.rmtree(a.folder / name, ignore_errors=True)


if __name__ == "__main__":
    main()
