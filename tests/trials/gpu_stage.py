"""Stages that cannot waste a machine's time: lanes of guarded items, and on disk whatever is known after each.

A lane is a process that does its items one after the other. The parent touches no GPU, so it can end a lane that hangs
and start another one for the items that are left. What was found is in <out>/<stage>.json after each item.
"""

import gc
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable

GRACE = 10  # seconds that an item may take to notice that its time is over
BROKEN = (
    "CUDA error",
    "cuDNN error",
    "CUBLAS_STATUS",
    "device-side assert",
    "unspecified launch failure",
)  # nothing works in such a process


@dataclass(frozen=True)
class Item:
    """A piece of a stage: a function of the seconds that it has; returns a dict, with a sentence under 'line'."""

    name: str
    work: Callable
    limit: float = 60  # seconds
    least: float = 2  # seconds without which it is not begun
    reserve: float = 0  # seconds that are left to the items after it


@dataclass
class Lane:
    """Items of one process; make() is called in it and returns them."""

    name: str
    make: Callable
    wave: int = 0  # lanes of a wave begin together, when all lanes of the wave before have ended
    records: list = field(default_factory=list)


class TooLong(BaseException):
    """An item's time is over."""


def now():
    return time.monotonic()  # the same clock in all processes


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps(value, indent=1, default=plain) + "\n")
    os.replace(part, path)


def plain(value):
    """What JSON cannot hold: numbers of NumPy and torch, paths."""
    return value.item() if hasattr(value, "item") else str(value)


def sentence(error):
    """An error in at most 300 characters, with the place in this repository where it was raised."""
    places = [f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)]
    ours = [p for p in places if re.match(r"(gpu|test_|throughput|[a-z0-9_]+\.py)", p)]
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return f"{text[:240]} ({' < '.join(reversed(ours[-3:]))})"


KEPT = {}  # what the running item has found so far


def keep(**found):
    """Remember what an item has found, for the case that it does not end well."""
    KEPT.update(found)


def run_item(item, seconds):
    """A record of an item: state 'done' or 'failed', seconds, what it found or its error."""
    began = now()
    KEPT.clear()

    def over(number, frame):
        raise TooLong(f"longer than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        found = dict(item.work(seconds) or {})
        record = dict(state="done", line=found.pop("line", ""), found=found)
    except (Exception, TooLong, SystemExit) as error:
        record = dict(state="failed", error=sentence(error), trace=traceback.format_exc()[-2000:], found=dict(KEPT))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    return dict(name=item.name, **record, seconds=round(now() - began, 2))


def tidy():
    """Free what an item left on the device; False where the device is lost."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    except RuntimeError:
        return False
    return True


def show(stage, record):
    what = record.get("line") or record.get("error")
    what = f": {what}" if what else ""
    print(f"{stage} {record['name']}: {record['state']}, {record['seconds']:.1f} s{what}", flush=True)


def work_lane(stage, lane, path, deadline):
    """In a lane's own process: the items that have no record yet. 75 where another process must go on."""
    for item in lane.make():
        if any(r["name"] == item.name for r in lane.records):
            continue
        left = deadline - item.reserve - now()
        if left < item.least:
            lane.records.append(
                dict(
                    name=item.name,
                    state="skipped",
                    error=f"{max(0, left):.0f} s left, it takes {item.least:.0f}",
                    seconds=0.0,
                )
            )
        else:
            seconds = min(item.limit, left)
            lane.records.append(dict(name=item.name, state="running", seconds=0.0, began=now(), until=now() + seconds))
            write_json(path, lane.records)
            lane.records[-1] = run_item(item, seconds)
        write_json(path, lane.records)
        show(stage, lane.records[-1])
        if any(word in lane.records[-1].get("error", "") for word in BROKEN) or not tidy():
            return 75
    return 0


def start(stage, lane, path, deadline):
    """Fork a lane's process; it leads a group, so that all that it starts can be ended with it."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        code = work_lane(stage, lane, path, deadline)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def end(pid):
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def reread(lane, path):
    if path.exists():
        lane.records = json.loads(path.read_text())


def close_running(stage, lane, path, error):
    """The record of an item whose process is gone."""
    for record in lane.records:
        if record["state"] == "running":
            record |= dict(state="failed", error=error, seconds=round(now() - record.pop("began"), 2))
            record.pop("until")
            show(stage, record)
    write_json(path, lane.records)


def supervise(stage, out, limit, lanes, about=None, changed=None):
    """Run a stage's lanes for at most `limit` seconds: its report. `changed` is called when an item begins or ends."""
    began, out = now(), Path(out)
    out.mkdir(parents=True, exist_ok=True)
    deadline, report = began + limit, out / f"{stage}.json"
    scratch, written = Path(tempfile.mkdtemp(prefix="faic-stage-")), None
    paths = {lane.name: scratch / f"{lane.name}.json" for lane in lanes}

    def summary(state):
        items = {lane.name: lane.records for lane in lanes}
        return dict(
            stage=stage, state=state, seconds=round(now() - began, 1), limit=limit, **(about or {}), lanes=items
        )

    for wave in sorted({lane.wave for lane in lanes}):
        alive = {
            lane.name: (lane, start(stage, lane, paths[lane.name], deadline)) for lane in lanes if lane.wave == wave
        }
        while alive:
            time.sleep(0.1)
            for name, (lane, pid) in list(alive.items()):
                done, status = os.waitpid(pid, os.WNOHANG)
                reread(lane, paths[name])
                running = next((r for r in lane.records if r["state"] == "running"), None)
                if done:
                    end(pid)  # what it left behind
                    code = os.waitstatus_to_exitcode(status)
                    close_running(stage, lane, paths[name], f"its process ended ({code})")
                    again = code != 0 and (code == 75 or running) and now() < deadline
                    if code and not again:
                        print(f"{stage}: lane {name} ended with {code}", flush=True)
                    alive.pop(name)
                    if again:
                        alive[name] = (lane, start(stage, lane, paths[name], deadline))
                elif now() > deadline + GRACE or (running and now() > running["until"] + GRACE):
                    end(pid)
                    os.waitpid(pid, 0)
                    reread(lane, paths[name])
                    close_running(stage, lane, paths[name], "it did not stop in time, and its process was ended")
                    alive.pop(name)
                    if now() < deadline:
                        alive[name] = (lane, start(stage, lane, paths[name], deadline))
            if written != (known := [lane.records for lane in lanes]):
                written = known
                write_json(report, summary("running"))
                if changed:
                    changed()
    found = summary("done")
    write_json(report, found)
    shutil.rmtree(scratch)
    states = [r["state"] for lane in lanes for r in lane.records]
    print(
        f"{stage}: {states.count('done')} of {len(states)} items done, "
        f"{found['seconds']:.1f} s of {limit:.0f} s, {report}",
        flush=True,
    )
    return found


def failed(report):
    """The items of a report that are not done: 'lane item: why'."""
    lanes = report["lanes"].items()
    return [f"{lane} {r['name']}: {r.get('error')}" for lane, records in lanes for r in records if r["state"] != "done"]


def check_out(value):
    """The folder that a stage writes to."""
    path = Path(value).expanduser().resolve()
    path.mkdir(parents=True, exist_ok=True)
    return path
