"""Do the lowest versions that settings.ini allows still work?

Makes an environment with every requirement at its lower bound, imports every module of faic there, and runs the tests
below. An upper bound is not tried: constraints.txt holds the versions that `make test` runs with.

    python3.11 tests/trials/floors.py /tmp/floors

The folder needs 6 GB where pip takes torch's CUDA build. What follows the folder goes to pip, e.g. --index-url. A
folder that is there already is used again.
"""

import os
import re
import shlex
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EXTRAS = ("dev", "cluster", "watch", "formats", "app")
GROUPS = ("requirements", *(f"{extra}_requirements" for extra in EXTRAS))
TESTS = (
    "test_golden_pix2pix",
    "test_golden_vqgan",
    "test_data",
    "test_loop",
    "test_results",
    "test_places",
    "test_phases",
)


def settings():
    """The section of settings.ini."""
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]


def floors():
    """Each requirement's name and lower bound; ValueError where one states none."""
    found = {}
    for group in GROUPS:
        for requirement in shlex.split(settings()[group]):
            name, bound = re.fullmatch(r"([\w-]+)(.*)", requirement).groups()
            lowest = re.search(r"[>=]=([\w.]+)", bound)
            if lowest is None:
                raise ValueError(f"{group} in settings.ini: {requirement} states no lower bound; write {name}>=VERSION")
            if found.setdefault(name, lowest[1]) != lowest[1]:
                raise ValueError(f"{group} in settings.ini: {name} has two lower bounds, {found[name]} and {lowest[1]}")
    return found


def main(folder, *pip_options):
    lowest = settings()["min_python"]
    if sys.version.split()[0].rsplit(".", 1)[0] != lowest:
        sys.exit(f"the lowest Python is {lowest}, and this is {sys.version.split()[0]}: start it with python{lowest}")
    python = Path(folder).resolve() / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    exactly = [f"{name}=={version}" for name, version in floors().items()]
    subprocess.run([python, "-m", "pip", "install", "--quiet", *pip_options, *exactly], check=True)
    os.environ["PYTHONPATH"] = str(ROOT)
    modules = [f"faic.{f.stem}" for f in sorted((ROOT / "faic").glob("[!_]*.py"))]
    subprocess.run([python, "-c", f"import {', '.join(modules)}"], cwd=ROOT, check=True)
    print(f"{len(modules)} modules are imported by Python {lowest} with", *exactly, sep="\n  ")
    tests = [f"tests/{name}.py" for name in TESTS]
    sys.exit(subprocess.run([python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests], cwd=ROOT).returncode)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(*sys.argv[1:])
