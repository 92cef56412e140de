"""The data of the whole study, measured: preparation, loading, resizing, batches, a kill, and an evaluation.

    python tests/trials/full_data.py FOLDER [--photographs ../shared/photos256] [--images 20000] [--side 256]
        [--load-side 286] [--evaluated 5000] [--keep]

It needs a folder of photographs, gigabytes of disk and minutes. FOLDER is made, and emptied again at the end but for
report.md. It gets `--images` photographs: links to those of `--photographs` under new names, or copies where the disk
is another. The photographs therefore come from the page cache, and the seconds hold no time of a slow disk. Every step
is a process of its own. Memory is RssAnon of /proc/<pid>/status, read 50 times per second: what a process itself
holds, without the pages of mapped files, which the kernel takes back when it needs them. VmHWM is the peak with those
pages. Needs Linux.
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
MB, GB = 10**6, 10**9


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
    rest = sum(f.stat().st_size for f in photos.folder.iterdir() if f.suffix != ".u8")
    return dict(fingerprint=photos.fingerprint, bytes=(photos.folder / "pixels.u8").stat().st_size, rest=rest)


def load(a):
    began = time.perf_counter()
    from faic.dataset import load_photos  # and torch, which takes most of a short step

    imported = time.perf_counter() - began
    began = time.perf_counter()
    photos = load_photos(a.folder / "photos", a.side)
    return dict(imported=imported, loaded=time.perf_counter() - began, fingerprint=photos.fingerprint)


def resize(a):
    from faic.dataset import resized_for_crops

    photos = photographs(a)
    array = resized_for_crops(photos, a.load_side)
    size = sum(f.stat().st_size for f in photos.folder.glob(f"train-{a.load_side}-*"))
    return dict(images=len(array), bytes=size)


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
        rate, cpu = made / (time.perf_counter() - began), time.process_time() - cpu
        found[size] = dict(batches_per_second=rate, cpu_ms_per_image=1000 * cpu / made / size)
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
    feature_net, batches_seen = efficientnet_lite0(), []
    feature_net.register_forward_hook(lambda net, images, output: batches_seen.append(len(images[0])))
    rows, _ = evaluate(gray_baseline, photos, "test", feature_net)
    return dict(images_seen=sum(batches_seen), threads=torch.get_num_threads(), row=rows["photograph"])


STEPS = dict(prepare=prepare, load=load, resize=resize, batches=batches, evaluation=evaluation)


def memory(pid, field):
    """Bytes of a field of a process's status; 0 when the process is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    found = [int(line.split()[1]) for line in lines if line.startswith(field + ":")]
    return 1024 * found[0] if found else 0


def start(a, step, runs):
    environment = dict(os.environ, FAIC_RUNS=str(a.folder / runs))
    sizes = ["--images", a.images, "--side", a.side, "--load-side", a.load_side, "--evaluated", a.evaluated]
    command = [sys.executable, __file__, str(a.folder), *map(str, sizes), "--step", step]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def measure(a, step, runs="runs"):
    """What a step returned, and its seconds, CPU seconds and peaks of memory."""
    before, began = os.times(), time.perf_counter()
    process, anonymous, peak = start(a, step, runs), 0, 0
    while process.poll() is None:
        anonymous, peak = max(anonymous, memory(process.pid, "RssAnon")), max(peak, memory(process.pid, "VmHWM"))
        time.sleep(0.02)
    wall, after = time.perf_counter() - began, os.times()
    if process.returncode:
        raise SystemExit(f"{step} stopped with exit code {process.returncode}")
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    found = json.loads(process.stdout.read().splitlines()[-1])
    found |= dict(wall=wall, cpu=cpu, anonymous=anonymous, peak=peak)
    print(step, json.dumps(found), flush=True)
    return found


def kill_a_third_in(a, runs):
    """Kill a preparation when about a third is done; returns how many files were done."""
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
    """What the steps took, as Markdown, with a projection to the paper's number of photographs."""
    times, limit = FULL / a.images, {"prepare": 1000, "evaluation": 4000, "evaluation again": 4000}
    columns = ["step", "s", "CPU s", "memory of its own, MB", "with mapped pages, MB", "limit, MB", f"CPU s at {FULL}"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, f in found.items():
        grows = not name.startswith(("evaluation", "batches"))
        cells = [name, f"{f['wall']:.1f}", f"{f['cpu']:.1f}", f"{f['anonymous'] / MB:.0f}", f"{f['peak'] / MB:.0f}"]
        cells += [str(limit.get(name, "")), f"{f['cpu'] * (times if grows else 1):.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *sentences(a, found, times)])


def sentences(a, found, times):
    """The findings that are no column of the table."""
    prepared, resized, loaded, killed = (found[name] for name in ("prepare", "resize", "load", "resumed"))
    sizes = prepared["bytes"] / GB, prepared["rest"] / GB, resized["bytes"] / GB
    disk, full = (f"{p:.2f} GB of pixels, {r:.3f} GB of lists" for p, r, _ in (sizes, [times * s for s in sizes]))
    first, again = found["evaluation"]["images_seen"], found["evaluation again"]["images_seen"]
    yield f"- {a.images} photographs at {a.side}x{a.side}; only batches and evaluation ({a.evaluated}) do not grow."
    yield f"- Disk: {disk}, {sizes[2]:.2f} GB resized to {a.load_side} ({resized['images']} photographs)."
    yield f"- Disk at {FULL} photographs: {full}, {times * sizes[2]:.1f} GB resized."
    yield f"- Loading again: {loaded['imported']:.1f} s of imports, then {loaded['loaded']:.2f} s."
    yield f"- Loading {FULL} photographs again, projected: {times * loaded['loaded']:.1f} s."
    for size, b in found["batches"].items():
        if size.isdigit():
            rate, cost = b["batches_per_second"], b["cpu_ms_per_image"]
            yield f"- Batches of {size}: {rate:.0f} per second, {cost:.2f} CPU ms per image."
    yield f"- Killed after {killed['done']} files and resumed: fingerprint {killed['fingerprint']}."
    yield f"- Undisturbed: fingerprint {prepared['fingerprint']}."
    yield f"- Images that the feature network saw: {first} in the first evaluation, {again} in the second."


def check(a, found):
    """Killed, loaded and undisturbed data are the same; features of photographs are computed once."""
    fingerprints = {found[name]["fingerprint"] for name in ("resumed", "prepare", "load")}
    assert len(fingerprints) == 1, fingerprints
    first, again = found["evaluation"], found["evaluation again"]
    assert first["row"].keys() == again["row"].keys()
    assert (first["images_seen"], again["images_seen"]) == (3 * a.evaluated, a.evaluated)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--photographs", type=Path, default=Path(__file__).resolve().parents[3] / "shared" / "photos256"
    )
    for name, value in dict(images=20_000, side=256, load_side=286, evaluated=5_000).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--keep", action="store_true", help="leave everything there")
    parser.add_argument("--step", choices=list(STEPS), help=argparse.SUPPRESS)
    a = parser.parse_args()
    a.folder = a.folder.resolve()
    if a.step:
        print(json.dumps(STEPS[a.step](a)))
        return
    if not a.photographs.is_dir():
        raise SystemExit(f"expected a folder of photographs, found none at {a.photographs}; give one: --photographs")
    link_photographs(a.photographs, a.folder / "photos", a.images)
    try:
        found = {step: measure(a, step) for step in ("prepare", "load", "resize", "batches")}
        done = kill_a_third_in(a, "killed")
        found["resumed"] = dict(measure(a, "prepare", "killed"), done=done)
        shutil.rmtree(a.folder / "killed")
        found["evaluation"] = measure(a, "evaluation")
        found["evaluation again"] = measure(a, "evaluation")
        report = table(a, found)
        (a.folder / "report.md").write_text(report + "\n")
        print("\n" + report)
        check(a, found)
    finally:
        if not a.keep:
            for name in ("photos", "runs", "killed"):
                shutil.rmtree(a.folder / name, ignore_errors=True)


if __name__ == "__main__":
    main()
