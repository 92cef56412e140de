"""Installs the package that nbdev exports, and the notebooks that `faic run` executes; settings.ini holds the rest."""

import shlex
import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

NOTEBOOKS = ("phase1", "phase2", "inference_time", "results", "failures", "colorize")


class BuildPy(build_py):
    """Copy the notebooks into the package that is built; an editable install reads them from nbs/."""

    def run(self):
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib, "faic", "notebooks")
        self.mkpath(str(target))
        for name in NOTEBOOKS:
            shutil.copy(Path(__file__).with_name("nbs") / f"{name}.ipynb", target)


config = ConfigParser(delimiters=["="])
config.read(Path(__file__).with_name("settings.ini"), encoding="utf-8")
settings = config["DEFAULT"]

setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    keywords=settings["keywords"],
    author=settings["author"],
    license="Apache-2.0",
    url=settings["git_url"],
    cmdclass={"build_py": BuildPy},
    packages=find_packages(include=["faic", "faic.*"]),
    package_data={"faic": ["weights/*"]},
    python_requires=f">={settings['min_python']}",
    install_requires=shlex.split(settings["requirements"]),
    extras_require={
        extra: shlex.split(settings[f"{extra}_requirements"])
        for extra in ("dev", "cluster", "watch", "formats", "onnx", "docs", "app")
    },
    entry_points={
        "console_scripts": ["faic=faic.cli:main"],
        "nbdev": [f"faic={settings['lib_path']}._modidx:d"],
    },
)
