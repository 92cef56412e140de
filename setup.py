"""Installs the package that nbdev exports; everything it says stands in settings.ini."""
import shlex
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

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
    packages=find_packages(include=["faic", "faic.*"]),
    python_requires=f">={settings['min_python']}",
    install_requires=shlex.split(settings["requirements"]),
    extras_require={
        extra: shlex.split(settings[f"{extra}_requirements"]) for extra in ("dev", "cluster", "watch", "formats")
    },
    entry_points={
        "console_scripts": ["faic=faic.cli:main"],
        "nbdev": [f"faic={settings['lib_path']}._modidx:d"],
    },
)
