"""The versions that pyproject.toml promises are those that the test matrix runs with."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent


def floors():
    """The oldest version of each package that pyproject.toml allows."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(one for name in extras if name != "dev" for one in extras[name])]
    found = (re.match(r"([\w-]+)>=([\d.]+)", one) for one in wanted)
    return {match[1]: match[2] for match in found if match}


def pinned(name):
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))


def test_the_oldest_versions_are_the_floors():
    """Catches a floor that is raised or lowered, and never run."""
    oldest = pinned("constraints-oldest.txt")
    assert oldest.keys() == floors().keys()
    for package, floor in floors().items():
        assert (oldest[package].removesuffix(".*") + ".0").startswith(floor.removesuffix(".0")), package


def test_development_is_inside_the_ranges():
    """Catches a development set that pip would refuse, and one that lags behind what the matrix calls the newest."""
    used = pinned("constraints.txt")
    for package, floor in floors().items():
        version = [int(part) for part in used[package].split(".") if part != "*"]
        assert version >= [int(part) for part in floor.split(".")][: len(version)], package
    assert pinned("constraints-newest.txt").items() <= used.items()
