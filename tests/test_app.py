"""`faic app`: what the page does with photographs and answers; the page and the notebook's button in a real browser."""

import dataclasses
import importlib.util
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import skimage.data
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import save_file
from scipy.stats import binomtest

import faic.app
import faic.colorize
from faic.app import Uploads, bundle_results, colorize_uploads, copy_uploads, describe_uploads, model_choices
from faic.app import opened_in_jupyter, show_uploads
from faic.cli import main
from faic.color import rgb_to_lab
from faic.colorize import RunColorizer, read_record, run_colorize
from faic.core import write_json
from faic.forced_choice import _JUDGE_JS, Experiment, judge_number, keep_answer, next_pair, open_experiment, plan_trials
from faic.forced_choice import obvious_fake, read_photographs
from faic.judges import SIDES, Answer, _wilson_interval, fool_rate, read_answers, store_answer
from faic.notes import example_selection
from faic.presets import make_trainee
from faic.runs import Run
from faic.score_tables import judges_table

ROOT = Path(__file__).resolve().parents[1]
JUDGE = "0123456789abcdef"
RUNS = ["a run", "another run"]


def paint(gray, generators):
    """A color of each random number."""
    color = torch.rand(1, 3, 1, 1, generator=generators[0]) * 0.4 - 0.2
    return (gray + color).clamp(0, 1)


def colorizer(run=None):
    return RunColorizer(run, 1, paint, 32, "lab", torch.device("cpu"), dict(run="a run"))


@pytest.fixture
def opened(monkeypatch):
    """Stands for a trained run."""
    monkeypatch.setattr(faic.colorize, "open_run_colorizer", lambda *arguments: colorizer())


@pytest.fixture
def uploads(tmp_path):
    """Four files as a browser hands them over, two of one name and one that is broken, and the names of their owner."""
    noise = np.random.default_rng(0).integers(0, 256, (3, 40, 50, 3), dtype=np.uint8)
    names = ["grand mother (1).png", "IMG_1.png", "IMG_1.png", "broken.png"]
    files = [tmp_path / f"upload{i}" for i in range(4)]
    for file, pixels in zip(files, noise):
        Image.fromarray(pixels).save(file, "PNG")
    files[3].write_bytes(files[0].read_bytes()[:200])
    return list(zip(map(str, files), names))


def pixels(file):
    return np.asarray(Image.open(file))


def test_the_page_colorizes_as_the_command_does_to_the_bit(uploads, opened, tmp_path):
    """With the owner's names, which belong to the seed; a broken file costs the others nothing."""
    parameters, progress = dict(seed=3, samples=2, strength=0.7), []
    files = copy_uploads(uploads, tmp_path / "copies")
    found = colorize_uploads(files, tmp_path / "page", lambda *done: progress.append(done), **parameters)
    command = run_colorize([str(file) for file in files], out=str(tmp_path / "command"), **parameters)
    assert list(found.made) == files[:3] and sorted(count for count, _ in progress) == [1, 2, 3, 4]
    assert len({target.name for target in found.results()}) == 6
    for file, targets in found.made.items():
        for ours, theirs in zip(targets, command.done[file], strict=True):
            assert (pixels(ours) == pixels(theirs)).all() and read_record(ours) == read_record(theirs)
    assert (pixels(found.results()[0]) != pixels(found.results()[1])).any()
    assert list(found.reasons) == ["broken.png"] and not found.error
    assert "<p>3 photographs colorized.</p>" in describe_uploads(found) and "broken.png" in describe_uploads(found)


def test_a_caution_is_on_the_page(uploads, tmp_path, monkeypatch):
    run = Run(tmp_path, dict(made=dict(caution="It was trained with 9 photographs.")))
    monkeypatch.setattr(faic.colorize, "open_run_colorizer", lambda *arguments: colorizer(run))
    found = colorize_uploads(copy_uploads(uploads[:1], tmp_path / "copies"), tmp_path / "out")
    assert "<p>It was trained with 9 photographs.</p>" in describe_uploads(found)


def test_several_results_are_a_zip_and_one_is_itself(uploads, opened, tmp_path):
    found = colorize_uploads(copy_uploads(uploads, tmp_path / "copies"), tmp_path / "out")
    with zipfile.ZipFile(bundle_results(found.results(), tmp_path)) as bundle:
        assert sorted(bundle.namelist()) == ["IMG_1.png", "IMG_1.png.png", "grand mother (1).png"]
        assert bundle.read("IMG_1.png") == (tmp_path / "out" / "IMG_1.png").read_bytes()
    assert bundle_results(found.results()[:1], tmp_path) == str(found.results()[0])
    assert bundle_results([], tmp_path) is None
    shown = show_uploads(found, tmp_path / "shown")
    assert [s.caption for s in shown] == ["grand mother (1).png", "IMG_1.png", "IMG_1.png"]
    gray = pixels(shown[0].before).astype(int)
    assert np.ptp(gray, axis=2).max() <= 2 and np.ptp(pixels(shown[0].after).astype(int), axis=2).max() > 20


def test_what_stops_everything_is_said_without_folders(uploads, opened, tmp_path, monkeypatch):
    made = colorize_uploads(copy_uploads(uploads[:1], tmp_path / "a"), tmp_path / "out").results()
    again = copy_uploads([(str(made[0]), "again.png")], tmp_path / "b")
    found = colorize_uploads(again, tmp_path / "out2")
    assert found.error.startswith("again.png holds no photograph, only results of FAIC")
    monkeypatch.undo()
    monkeypatch.setenv("FAIC_RUNS", str(tmp_path / "runs"))
    found = colorize_uploads(copy_uploads(uploads, tmp_path / "c"), tmp_path / "out3")
    assert "has no trained run of phase 2" in describe_uploads(found) and not found.made
    assert model_choices() == []


@pytest.mark.parametrize("name", ["../../up.png", "c:\\x\\up.png", "<img src=x>.png", "."])
def test_a_name_from_outside_is_text(uploads, tmp_path, name):
    (copy,) = copy_uploads([(uploads[0][0], name)], tmp_path / "copies")
    assert copy.parent == tmp_path / "copies" / "0" and copy.is_file()
    text = describe_uploads(Uploads(reasons={name: "<b>"}, error=""))
    assert "<img" not in text and "<b><b>" not in text


LONG = "\u8272" * 100  # 300 bytes


@pytest.mark.parametrize(
    "name", [f"{LONG}.jpg", LONG, "..", "a/..", "a\0b.png", "\ud800.png", "a." + "b" * 300]
)
def test_no_name_of_an_upload_costs_the_others(uploads, opened, tmp_path, name):
    """Too long for a disk, no name of a file, a zero byte, half of a character; and an upload that is lost."""
    files = copy_uploads([(uploads[0][0], name), (str(tmp_path / "lost"), "lost.png"), uploads[1]], tmp_path / "copies")
    found = colorize_uploads(files, tmp_path / "out", samples=2, compare=True)
    assert [file.parent.name for file in found.made] == ["0", "2"] and list(found.reasons) == ["lost.png"]
    if name.endswith(".jpg"):
        assert files[0].name.startswith(LONG[:50]) and files[0].suffix == ".jpg"


# which one is real?


@pytest.fixture
def experiment(tmp_path):
    run = Run(tmp_path / "a run", dict(model="pix2pix", phase="phase2", preset="smoke"))
    photographs = {f"{i}.png": Image.effect_noise((30, 20), 50 + i).convert("RGB") for i in range(12)}
    return Experiment(tmp_path / "answers", photographs, {"a run": colorizer(run)})


def test_trials_are_random_blind_and_the_same_for_a_judge():
    names = [f"{i}.jpg" for i in range(60)]
    trials = plan_trials(JUDGE, names, RUNS)
    assert trials == plan_trials(JUDGE, names, RUNS) != plan_trials(JUDGE[::-1], names, RUNS)
    assert len(trials) == 44 and sum(not t.run for t in trials) == 4
    assert [t.number for t in trials] == list(range(44))
    pairs = [(t.photograph, t.run) for t in trials if t.run]
    assert len(pairs) == 40 and [run for _, run in pairs].count("a run") == 20
    many = [t for i in range(200) for t in plan_trials(f"{i:016x}", names, RUNS)]
    assert abs(np.mean([t.real == "left" for t in many]) - 0.5) < 0.03
    first_check = [next(t.number for t in plan_trials(f"{i:016x}", names, RUNS) if not t.run) for i in range(50)]
    assert len(set(first_check)) > 8


@pytest.mark.parametrize("count, pairs, checks", [(3, 1, 2), (10, 8, 2), (20, 16, 4), (43, 39, 4), (90, 40, 4)])
def test_a_judge_sees_each_photograph_once(count, pairs, checks):
    """The runs take turns; each meets each photograph with some judges; a check is as likely on any photograph."""
    names = [f"{i}.jpg" for i in range(count)]
    met, checked = set(), []
    for i in range(300):
        trials = plan_trials(f"{i:016x}", names, RUNS)
        of_runs = [t.run for t in trials if t.run]
        assert len({t.photograph for t in trials}) == len(trials) == pairs + checks and len(of_runs) == pairs
        assert abs(of_runs.count(RUNS[0]) - of_runs.count(RUNS[1])) <= 1
        met |= {(t.photograph, t.run) for t in trials}
        checked += [t.photograph for t in trials if not t.run]
    assert len(met) == 3 * count
    assert max(checked.count(name) for name in names) < 2.5 * 300 * checks / count


def test_each_answer_is_stored_at_once_and_a_judge_goes_on_where_he_stopped(experiment):
    pair = next_pair(experiment, JUDGE)
    assert (pair["done"], pair["total"]) == (0, 12) and "photograph" not in pair and "real" not in pair
    for _ in range(5):
        given = dict(judge=JUDGE, trial=pair["trial"], side="left", ms=512.4)
        keep_answer(experiment, given)
        keep_answer(experiment, given | dict(side="right"))  # a second click, or a second window
        pair = next_pair(experiment, JUDGE)
    frame = read_answers(experiment.folder)
    assert list(frame) == [f.name for f in dataclasses.fields(Answer)]
    assert frame["trial"].tolist() == [0, 1, 2, 3, 4] == list(range(pair["trial"])) and pair["done"] == 5
    assert set(frame["answer"]) == {"left"} and set(frame["ms"]) == {512}
    for row, trial in zip(frame.itertuples(), experiment.trials(JUDGE)):
        assert (row.photograph, row.real, row.check) == (trial.photograph, trial.real, not trial.run)
        assert (row.model, row.run) == (("", "") if row.check else ("pix2pix", "a run"))
    with open(experiment.folder / f"{JUDGE}.jsonl", "a") as file:  # a crash tears the last line
        file.write('\n{"judge": "0123')
    keep_answer(experiment, dict(judge=JUDGE, trial=5, side="right", ms=1))
    assert read_answers(experiment.folder)["trial"].tolist() == [0, 1, 2, 3, 4, 5]


def answer_all(experiment):
    """Answer what is left; the answers, and how many pairs were left."""
    pair = next_pair(experiment, JUDGE)
    left = pair["total"] - pair["done"]
    while "trial" in pair:
        keep_answer(experiment, dict(judge=JUDGE, trial=pair["trial"], side="left", ms=500))
        pair = next_pair(experiment, JUDGE)
    assert pair["done"] == pair["total"]
    return read_answers(experiment.folder), left


def test_a_judge_who_returns_gets_the_pairs_that_are_new(experiment):
    """Of other runs, and of another folder, where positions mean other pairs; no answer is lost or asked for again."""
    first, _ = answer_all(experiment)
    other = dataclasses.replace(experiment, colorizers={"another run": colorizer()})
    both, _ = answer_all(other)
    assert set(both["run"]) == {"", *RUNS}
    planned = {(t.photograph, t.run) for e in (experiment, other) for t in e.trials(JUDGE)}
    assert set(zip(both["photograph"], both["run"])) == planned and len(both) == len(planned)
    more = dataclasses.replace(experiment, photographs=experiment.photographs | {"new.png": Image.new("RGB", (30, 20))})
    frame, left = answer_all(more)
    assert 0 < left < len(first) and frame.iloc[len(both):]["photograph"].eq("new.png").any()
    assert not frame.duplicated(["photograph", "run"]).any()


def test_both_pictures_of_a_pair_look_alike_to_a_program(experiment):
    pair = next_pair(experiment, JUDGE)
    files = [urllib.request.urlopen(pair[side]).read() for side in SIDES]
    images = [Image.open(io.BytesIO(file)) for file in files]
    assert images[0].size == images[1].size and images[0].quantization == images[1].quantization
    assert not any(image.getexif() or image.info.get("comment") for image in images)


@pytest.mark.parametrize(
    "wrong",
    [
        *(dict(judge=judge) for judge in ("../../../etc", "", None, 0)),
        *(dict(side=side) for side in ("both", ["left"], None)),
        *(dict(trial=trial) for trial in (12, -1, "x", 0.0, True, None)),
        *(dict(ms=ms) for ms in (1e300, 10**400, 1e9, -1, float("nan"), "x", True, None)),
    ],
)
def test_what_is_no_answer_is_not_stored(experiment, wrong):
    with pytest.raises(ValueError, match="16 digits|no answer"):
        keep_answer(experiment, dict(judge=JUDGE, trial=0, side="left", ms=9) | wrong)
    assert not experiment.folder.exists() and len(judge_number("")) == 16


def test_a_line_that_is_no_answer_costs_nobody_else_an_answer(experiment):
    keep_answer(experiment, dict(judge=JUDGE, trial=0, side="left", ms=9))
    line = json.loads((experiment.folder / f"{JUDGE}.jsonl").read_text())
    wrong = [dict(ms=int(1e300)), dict(ms=0.5), dict(trial=10**30), dict(trial=True), dict(real="up"), dict(check=1)]
    lines = [json.dumps(line | dict(judge="f" * 16) | change) for change in wrong]
    (experiment.folder / "another.jsonl").write_text("\n".join(lines))
    assert read_answers(experiment.folder)["judge"].tolist() == [JUDGE]
    assert next_pair(experiment, JUDGE[::-1])["done"] == 0


def test_photographs_without_colors_are_not_judged(tmp_path, monkeypatch):
    Image.new("RGB", (40, 40), "gray").save(tmp_path / "gray.png")
    (tmp_path / "letter.txt").write_text("Dear")
    monkeypatch.setattr("faic.forced_choice.open_run_colorizer", lambda name: colorizer())
    colors = [f"{color}.png" for color in ("blue", "green", "red")]
    for i, name in enumerate(colors):
        with pytest.raises(ValueError, match=f"at least 3 photographs with colors in .* found {i}"):
            open_experiment(photographs=str(tmp_path))
        Image.new("RGB", (40, 40), name.removesuffix(".png")).save(tmp_path / name)
    assert sorted(read_photographs(str(tmp_path))) == colors
    assert sorted(open_experiment(photographs=str(tmp_path)).photographs) == colors


def test_photographs_are_known_by_their_paths_and_results_are_none(opened, tmp_path):
    """A result beside its photograph is no photograph; equal names in two folders are two photographs."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.fromarray(skimage.data.coffee()).save(tmp_path / name / "cup.png")
    run_colorize(str(tmp_path / "a" / "cup.png"), out=str(tmp_path / "out"))
    shutil.copy(tmp_path / "out" / "cup.png", tmp_path / "a" / "made.png")
    shutil.rmtree(tmp_path / "out")
    assert sorted(read_photographs(str(tmp_path))) == ["a/cup.png", "b/cup.png"]


def test_the_fake_of_an_attention_check_is_a_rainbow():
    """Two turns of the hue from left to right; the lightness of a mild photograph stays."""
    gray = Image.new("RGB", (65, 4), (128, 128, 128))
    lab = rgb_to_lab(torch.tensor(np.asarray(obvious_fake(gray))).permute(2, 0, 1)[None])[0, :, 0]
    turns = torch.atan2(lab[2], lab[1]) / (2 * torch.pi)
    assert ((turns - torch.linspace(0, 2, 65) + 0.5) % 1 - 0.5).abs().max() < 0.03
    assert (lab[0] - rgb_to_lab(torch.full((1, 3, 1, 1), 128 / 255))[0, 0, 0]).abs().max() < 2


JUDGE_PAGE = """
const node = value => ({value, style: {}, classList: {add() {}, remove() {}}, disabled: true, handlers: {},
  addEventListener(name, f) {this.handlers[name] = f}, click() {this.handlers.click()}, matches() {},
  async decode() {}});
const nodes = {}, images = [node(), node()], buttons = [node('left'), node('right')], answers = [];
const element = {querySelector: name => nodes[name] ??= node(),
  querySelectorAll: name => name.includes('img') ? images : name.includes('button') ? buttons : []};
let press = null;
globalThis.document = {addEventListener: (name, f) => {press = key => f({key, preventDefault() {}})}};
globalThis.localStorage = {getItem() {}, setItem() {}};
const pair = {judge: 'j', done: 0, total: 9, trial: 0};
const server = {begin: async () => pair, answer: async given => {answers.push(given.side); return pair}};
const settle = () => new Promise(done => setTimeout(done, 20));
new Function('element', 'server', 'setTimeout', SCRIPT)(element, server, f => setImmediate(f));
(async () => {
  element.querySelector('.fc-begin').click(); await settle();
  for (const shown of [null, {}]) {
    buttons.forEach(b => {b.offsetParent = shown}); press('ArrowLeft'); await settle();
  }
  console.log(JSON.stringify(answers));
})();
"""


def test_arrow_keys_answer_only_while_the_tab_is_shown():
    """The page's own script on a stand-in for the browser: a hidden element has no offsetParent."""
    if shutil.which("node") is None:
        pytest.skip("no node: apt-get install nodejs")
    program = JUDGE_PAGE.replace("SCRIPT", json.dumps(_JUDGE_JS))
    done = subprocess.run(["node", "-e", program], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == '["left"]', done.stderr


def people(name, fooled, passes, rng, pairs=60, run="a run"):
    """Answers of a judge who is fooled with a probability, and passes attention checks with another."""
    rows = []
    for trial in range(pairs + 5):
        check, real = trial >= pairs, SIDES[rng.integers(2)]
        wrong = rng.random() >= passes if check else rng.random() < fooled
        answer = SIDES[1 - SIDES.index(real)] if wrong else real
        rows.append(Answer(name, trial, f"{trial}.jpg", "", "" if check else run, real, answer, check, 700))
    return rows


def as_frame(answers):
    return pd.DataFrame(map(vars, answers))


def test_a_guesser_has_one_half_within_wilsons_interval():
    """In about 95 of 100 studies of 55 to 65 pairs: 0.95 within four standard errors of 200 studies."""
    rng, covered = np.random.default_rng(0), []
    for _ in range(200):
        found = fool_rate(as_frame(people("a", 0.5, 1, rng, pairs=int(rng.integers(55, 66)))))
        covered.append(found.low <= 0.5 <= found.high)
    assert abs(np.mean(covered) - 0.95) < 0.062


@pytest.mark.parametrize("judges", [2, 3, 5, 10, 20])
@pytest.mark.parametrize("rate, deviation", [(0.05, 0), (0.3, 0), (0.3, 0.05), (0.3, 0.15), (0.5, 0.15)])
def test_the_interval_covers_the_rate_of_people_who_differ(judges, rate, deviation):
    """At least 0.92 of 1000 studies, 0.95 less four standard errors, of 20 to 40 answers a judge; within [0, 1]."""
    rng, covered = np.random.default_rng(judges), 0
    size = rate * (1 - rate) / deviation**2 - 1 if deviation else 0
    for _ in range(1000):
        rates = rng.beta(rate * size, (1 - rate) * size, judges) if size else np.full(judges, rate)
        answers = rng.integers(20, 41, judges)
        low, high = _wilson_interval(rng.binomial(answers, rates), answers)
        assert 0 <= low <= high <= 1
        covered += low <= rate <= high
    assert covered > 920
    if judges >= 10:
        assert covered < 999 and high - low < 0.4  # no interval that says nothing


def test_the_fool_rate_by_hand():
    """Wilson's formula itself; a perfect judge is never fooled; who fails the checks is left out and counted."""
    rng = np.random.default_rng(0)
    sharp, half = people("sharp", 0, 1, rng), people("half", 0.5, 1, rng)
    asleep, unchecked = people("asleep", 0.5, 0, rng), people("new", 1, 1, rng)[:20]
    perfect = fool_rate(as_frame(sharp))
    assert (perfect.rate, perfect.low, perfect.answers, perfect.judges, perfect.left_out) == (0, 0, 60, 1, 0)
    found = fool_rate(as_frame(sharp + half + asleep + unchecked), ["a run"])
    assert (found.answers, found.judges, found.left_out) == (120, 2, 2)
    alone = fool_rate(as_frame(half))
    wilson = binomtest(round(60 * alone.rate), 60).proportion_ci(method="wilson")
    assert (alone.low, alone.high) == pytest.approx((wilson.low, wilson.high), abs=1e-6)
    effect = np.var([0, alone.rate], ddof=1) / 2 / (found.rate * (1 - found.rate) / 120)  # of two judges with equal n
    p, n, z = found.rate, 120 / effect, 12.7062047  # t with one degree of freedom
    middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    width = z / (1 + z**2 / n) * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5
    assert (found.low, found.high) == pytest.approx((middle - width, middle + width), abs=1e-6)
    assert np.isnan(fool_rate(as_frame(sharp), ["another run"]).rate)


def test_the_table_of_judges_has_the_fool_rate_when_there_are_answers(tmp_path, monkeypatch):
    monkeypatch.setenv("FAIC_RUNS", str(tmp_path))
    selection = example_selection()
    assert set(judges_table(selection).view.loc["fool rate"]) == {"not run"}
    run = selection.find("phase2", "pix2pix")
    for answer in people("a", 0.25, 1, np.random.default_rng(0), run=run.path.name):
        store_answer(tmp_path / "answers", answer)
    table = judges_table(selection)
    found = fool_rate(read_answers(), [run.path.name])
    shown = f"{found.rate:.1%} [{found.low:.1%}, {found.high:.1%}]"
    assert table.view.loc[["fool rate", "people", "answers of people"], "Pix2Pix"].tolist() == [shown, "1", "60"]
    assert table.view.loc["fool rate", "BBDM"] == "not run"
    assert table.frame.set_index("entry").loc["Pix2Pix", "fool rate high"] == pytest.approx(found.high)
    assert any("Left out: 0" in note for note in table.notes)
    for answer in people("a", 0.25, 1, np.random.default_rng(1), run="released classifier"):
        store_answer(tmp_path / "answers", answer)
    notes = judges_table(selection).notes
    assert any(note.startswith("Released classifier weights: fool rate") and "judges: 1, answers: 60" in note for note in notes)


# the command and the notebook


def test_without_gradio_the_command_says_what_to_install(monkeypatch):
    monkeypatch.setattr(faic.app, "find_spec", lambda name: None)
    done = CliRunner().invoke(main, ["app"])
    assert done.exit_code == 1 and "-m pip install 'gradio>=6.31,<7'" in done.output


def test_the_page_is_for_this_computer_alone(monkeypatch):
    calls = []
    monkeypatch.setattr(faic.app, "require_gradio", lambda: None)
    monkeypatch.setattr(faic.app, "serve_page", lambda *arguments: calls.append(arguments))
    for words in ([], ["--host", "0.0.0.0", "--port", "8000", "--no-browser"]):
        assert CliRunner().invoke(main, ["app", *words]).exit_code == 0
    assert [call[:3] for call in calls] == [("127.0.0.1", None, True), ("0.0.0.0", 8000, False)]


SERVE = """
import sys, types
import faic.app
page = types.SimpleNamespace(launch=lambda **options: None, local_url="serving", close=lambda verbose: print("closed"))
faic.app.make_page = lambda work, tabs: page
faic.app.page_theme = lambda: None
faic.app.serve_page()
"""


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="this system has no SIGHUP")
@pytest.mark.parametrize("nohup", [False, True])
def test_uploads_are_deleted_when_the_terminal_is_closed(tmp_path, nohup):
    """The terminal cannot be written any more, and sends SIGHUP twice; under nohup the page stays."""
    code = f"import signal; signal.signal(signal.SIGHUP, signal.{'SIG_IGN' if nohup else 'SIG_DFL'})\n{SERVE}"
    environment = os.environ | dict(TMPDIR=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().startswith("serving") and list(tmp_path.glob("faic-app-*"))
    process.stdout.close()
    for _ in range(2):
        process.send_signal(signal.SIGHUP)
    if nohup:
        time.sleep(0.2)
        assert process.poll() is None
        process.terminate()
    process.wait(20)
    assert not list(tmp_path.glob("faic-app-*"))


def test_the_page_says_where_photographs_go_also_to_a_visitor():
    assert "this computer" not in faic.app._HEAD and "computer that runs this page" in faic.app._HEAD


@pytest.mark.parametrize(
    "command, session, expected",
    [
        ("jupyter-lab --no-browser", True, True),
        ("python -m jupyterlab faic", True, True),
        ("jupyterhub-singleuser", True, True),
        ("jupyter-lab", False, False),
        ("papermill colorize.ipynb out.ipynb", True, False),
        ("jupyter-nbconvert --execute colorize.ipynb", True, False),
        ("python -m faic run colorize", True, False),
    ],
)
def test_the_button_is_offered_where_a_person_can_press_it(monkeypatch, command, session, expected):
    monkeypatch.setattr(faic.app, "kernel_shell", lambda: object())
    monkeypatch.setattr(faic.app, "launch_command", lambda: command)
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    if session:
        monkeypatch.setenv("JPY_SESSION_NAME", "colorize.ipynb")
    assert opened_in_jupyter() is expected


# in a browser

TRAIN = dict(side=64, width=16, dropout=0.5, gan_mode="vanilla", lambda_l1=100.0, lr=2e-4, beta1=0.5, beta2=0.999)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder of runs with one network as it is before training."""
    folder = tmp_path_factory.mktemp("app") / "runs"
    run = folder / "phase2-pix2pix-default-smoke-s0-000000"
    made = dict(time="2026-01-01T00:00:00+00:00", components={}, sampling="batch_norm=image")
    options = dict(phase="phase2", model="pix2pix", variant="default", preset="smoke", seed=0, train=TRAIN, made=made)
    options["data"] = dict(fingerprint="000000000000", name="embedded", side=64)
    write_json(run / "options.json", options)
    networks = make_trainee("pix2pix", TRAIN).networks()
    tensors = {f"{n}.{k}": t.contiguous() for n, net in networks.items() for k, t in net.state_dict().items()}
    save_file(tensors, run / "day-1.safetensors")
    return folder


@pytest.fixture(scope="module")
def chromium():
    """A headless browser."""
    reason = "playwright is not installed: pip install playwright"
    playwright = pytest.importorskip("playwright.sync_api", reason=reason)
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("no chromium: apt-get install chromium")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(words, port, cwd, **environment):
    """Start a server and wait until it answers."""
    process = subprocess.Popen(
        [sys.executable, "-m", *words],
        cwd=cwd,
        env=os.environ | environment | dict(PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines = []
    threading.Thread(target=lambda: lines.extend(process.stdout), daemon=True).start()
    for _ in range(600):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=5).close()
            return process
        except OSError:
            assert process.poll() is None, "".join(lines)
            time.sleep(0.1)
    raise AssertionError("no answer after a minute:\n" + "".join(lines))


@pytest.fixture(scope="module")
def address(runs, tmp_path_factory):
    """Where `faic app` serves."""
    if importlib.util.find_spec("gradio") is None:
        pytest.skip("gradio is not installed: pip install -e '.[app]'")
    port, folder = free_port(), tmp_path_factory.mktemp("server")
    words = ["faic", "app", "--no-browser", "--port", str(port), "--answers", str(folder / "answers")]
    process = start(words, port, folder, FAIC_RUNS=str(runs), TMPDIR=str(folder))
    yield f"http://127.0.0.1:{port}", folder
    process.terminate()
    assert process.wait(20) == 0
    assert not list(folder.glob("faic-app-*")), "uploads and results are deleted at the end"


def open_page(chromium, url, width=1280):
    """A page of the app, and what it asked of other hosts or reported as an error."""
    page, trouble = chromium.new_page(viewport=dict(width=width, height=900)), []
    inside = (url, "data:", "blob:")
    page.on("request", lambda r: None if r.url.startswith(inside) else trouble.append(r.url))
    page.on("pageerror", lambda e: trouble.append(str(e)))
    page.on("console", lambda m: trouble.append(m.text) if m.type == "error" else None)
    page.goto(url)
    page.wait_for_selector("#faic-start")
    return page, trouble


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 420])
def test_photographs_in_a_browser(chromium, address, runs, tmp_path, monkeypatch, width):
    """Upload, result, slider, choice, ZIP; a broken file among good ones; the same pixels as `faic colorize`."""
    url, _ = address
    for name in ("astronaut", "coffee"):
        Image.fromarray(getattr(skimage.data, name)()).convert("L").save(tmp_path / f"{name} (1).png")
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no more")
    (tmp_path / "letter <b>.txt").write_text("Dear grandmother")
    files = [f for f in sorted(tmp_path.iterdir()) if f.is_file()]
    page, trouble = open_page(chromium, url, width)
    page.wait_for_function("document.querySelector('#faic-model input').value == 'Pix2Pix'")
    page.locator("#faic-drop input[type=file]").set_input_files(files)
    page.wait_for_function("document.querySelector('#faic-drop').innerText.includes('letter')")
    page.locator("#faic-seed input").fill("7")
    page.locator("#faic-strength input[type=number]").fill("0.6")
    page.keyboard.press("Tab")
    page.wait_for_timeout(300)
    page.click("#faic-start")
    page.wait_for_selector("#faic-gallery img", timeout=60_000)
    report = page.inner_text("#faic-report")
    assert "2 photographs colorized." in report and "2 could not be:" in report
    assert "letter <b>.txt: not an image" in report and "broken.jpg: " in report
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    slider = page.locator("#faic-slider img")
    before = [slider.nth(i).get_attribute("src") for i in range(2)]
    assert len(set(before)) == 2
    page.locator("#faic-gallery .grid-container button").nth(1).click()
    page.wait_for_function(f"document.querySelector('#faic-slider img').src != {json.dumps(before[0])}")
    with page.expect_download() as download:
        page.click("#faic-download")
    download.value.save_as(tmp_path / "colorized.zip")
    monkeypatch.setenv("FAIC_RUNS", str(runs))
    words = ["colorize", *map(str, files), "-o", str(tmp_path / "out"), "--seed", "7", "--strength", "0.6"]
    assert CliRunner().invoke(main, words).exit_code == 1  # for the broken one
    with zipfile.ZipFile(tmp_path / "colorized.zip") as bundle:
        assert sorted(bundle.namelist()) == ["astronaut (1).png", "coffee (1).png"]
        for name in bundle.namelist():
            assert (pixels(io.BytesIO(bundle.read(name))) == pixels(tmp_path / "out" / name)).all(), name
    assert not trouble
    page.close()


@pytest.mark.slow
def test_the_examples_and_no_photograph(chromium, address):
    page, trouble = open_page(chromium, address[0])
    page.click("#faic-start")
    page.wait_for_function("document.querySelector('#faic-report').innerText.includes('Drop a photograph first')")
    page.click("#faic-example")
    page.wait_for_function("document.querySelector('#faic-drop').innerText.includes('chelsea')")
    page.click("#faic-start")
    page.wait_for_function("document.querySelector('#faic-report').innerText.includes('3 photographs colorized')")
    assert not trouble
    page.close()


@pytest.mark.slow
def test_which_one_is_real_in_a_browser(chromium, address):
    """Consent, three pairs of a second each, by button and by key; what was stored; going on in another browser."""
    url, folder = address
    page, trouble = open_page(chromium, url)
    page.get_by_role("tab", name="Which one is real?").click()
    assert "If you agree, each answer is stored" in page.inner_text(".fc-consent")
    assert not (folder / "answers").exists()
    page.click(".fc-begin")
    for i in range(3):
        images, buttons = page.locator(".fc-stage img"), page.locator(".fc-buttons button")
        images.first.and_(page.locator(".on")).wait_for(timeout=60_000)
        began = time.monotonic()
        assert buttons.first.is_disabled() and not images.nth(1).is_visible()
        page.wait_for_selector(".fc-buttons button:enabled")
        assert 1.8 < time.monotonic() - began < 5
        assert not images.first.is_visible() and not images.nth(1).is_visible()
        page.keyboard.press("ArrowRight") if i == 1 else buttons.first.click()
        page.wait_for_function(f"document.querySelector('.fc-count').innerText.includes('Pair {i + 2} of')")
    page.wait_for_selector(".fc-buttons button:enabled")
    page.get_by_role("tab", name="Colorize").click()
    page.keyboard.press("ArrowLeft")  # in another tab: no answer
    page.wait_for_timeout(500)
    judge = page.evaluate("localStorage.getItem('faic-judge')")
    frame = read_answers(folder / "answers")
    assert frame["answer"].tolist() == ["left", "right", "left"] and frame["trial"].tolist() == [0, 1, 2]
    assert set(frame["judge"]) == {judge} and frame["ms"].between(0, 5000).all()
    assert not trouble
    page.close()
    page, _ = open_page(chromium, url)
    page.get_by_role("tab", name="Which one is real?").click()
    page.fill(".fc-number", "no number")
    page.click(".fc-begin")
    page.wait_for_function("document.querySelector('.fc-error').innerText.includes('16 digits')")
    page.fill(".fc-number", judge)
    page.click(".fc-begin")
    page.wait_for_function("document.querySelector('.fc-count').innerText.includes('Pair 4 of')")
    page.close()


@pytest.mark.slow
def test_the_upload_button_in_jupyterlab(chromium, runs, tmp_path):
    """The notebook `colorize`, opened without a photograph: upload, answer, a broken file."""
    pytest.importorskip("jupyterlab", reason="JupyterLab is not installed: pip install -e '.[dev]'")
    shutil.copy(ROOT / "nbs" / "colorize.ipynb", tmp_path)
    Image.fromarray(skimage.data.astronaut()).save(tmp_path / "grandmother.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "grandmother.png").read_bytes()[:900])
    port = free_port()
    words = ["jupyterlab", "--no-browser", "--allow-root", f"--port={port}", "--IdentityProvider.token="]
    process = start(words, port, tmp_path, FAIC_RUNS=str(runs), JUPYTER_CONFIG_DIR=str(tmp_path / "config"))
    try:
        page = chromium.new_page(viewport=dict(width=1280, height=1000))
        page.goto(f"http://127.0.0.1:{port}/lab/tree/colorize.ipynb")
        page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=60_000)
        page.get_by_text("| Idle").wait_for(timeout=120_000)  # before, JupyterLab asks for a kernel
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_text("Run All Cells", exact=True).click()
        upload = page.locator(".widget-upload")
        upload.wait_for(timeout=120_000)
        with page.expect_file_chooser() as chooser:
            upload.click()
        chooser.value.set_files([tmp_path / "grandmother.png", tmp_path / "broken.png"])
        answer = page.locator(".jp-OutputArea img").first
        answer.wait_for(timeout=60_000)
        assert len(answer.get_attribute("src")) > 100_000  # a picture, not a blank one
        shown = page.inner_text(".jp-Notebook")
        assert "broken.png: " in shown and "grandmother.png" in shown and "Traceback" not in shown
        assert (tmp_path / "colorized" / "grandmother.png").exists()
        page.close()
    finally:
        process.terminate()
        process.wait(20)
