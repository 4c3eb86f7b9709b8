"""The layers of the package, read from its syntax trees: imports point down, and one file knows TRL."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import hf_osd

PACKAGE = Path(hf_osd.__file__).parent
ONLY_TRL_IMPORTER = "learning.trainer"

# A module may import from its own component and from those of a lower number. Equal numbers keep apart.
LAYERS = {
    "cli": 15,
    "bench": 14,  # views of one evaluation
    "demo": 14,
    "design": 14,
    "verify": 14,
    "evaluation": 13,
    "generation": 12,
    "decoding": 11,
    "resolving": 11,
    "metrics": 11,
    "monitoring": 11,
    "assistant": 10,
    "routes": 9,
    "team": 8,  # the drafts of one batch
    "learning_draft": 7,  # it joins serving and learning
    "saving": 6,
    "route_folders": 6,
    "tokenizing": 6,  # what each draft reads
    "reporting": 6,  # of the journal; the assistant offers it
    "serving": 5,
    "learning": 5,
    "routing": 5,  # which draft serves a prompt
    "stats": 5,
    "drafts": 4,
    "storage": 4,  # of records, whatever they are for
    "budget": 3,  # serving earns, learning spends
    "journal": 3,  # what learning tells reports
    "records": 3,
    "config": 2,
    "_compat": 1,
    "precision": 1,
    "_caches": 0,
    "errors": 0,
}


def modules(root: Path) -> dict[str, Path]:
    """Map dotted names inside the package to files; a folder's `__init__` has the folder's name, the root's is ''."""
    names = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def imports(name: str, root: Path, known: dict[str, Path]) -> Iterator[str]:
    """Yield what a module imports, at any depth: names inside the package start with '.', others are as written."""
    path = known[name]
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (_inside(alias.name, root) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (_member(_inside(node.module or "", root), alias.name, known) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [part for part in package if part][: len(package) - node.level + 1]
            source = "." + ".".join([*base, *((node.module or "").split(".") if node.module else [])])
            yield from (_member(source, alias.name, known) for alias in node.names)


def _inside(module: str, root: Path) -> str:
    head, _, rest = module.partition(".")
    return "." + rest if head == root.name else module


def _member(source: str, name: str, known: dict[str, Path]) -> str:
    """Resolve `from source import name` to the submodule where `name` is one."""
    joined = f"{source.rstrip('.')}.{name}" if source != "." else f".{name}"
    return joined if source.startswith(".") and joined[1:] in known else source


def violations(root: Path) -> list[str]:
    """Say what breaks the layers of the package in `root`."""
    known = modules(root)
    graph = {name: {target for target in imports(name, root, known) if target != f".{name}"} for name in known}
    found = [line for name in known if name for line in _violations_of(name, graph[name])]
    return found + [f"cycle: {' -> '.join(cycle)}" for cycle in _cycles(graph)]


def _violations_of(name: str, targets: set[str]) -> Iterator[str]:
    component = name.split(".")[0]
    if component not in LAYERS:
        yield f"{name}: component {component!r} has no layer, add it to LAYERS"
        return
    for target in sorted(targets):
        if target.split(".")[0] == "trl" and name != ONLY_TRL_IMPORTER:
            yield f"{name} imports trl, which only {ONLY_TRL_IMPORTER} may"
        if target.startswith("."):
            other = target[1:].split(".")[0]
            if other != component and LAYERS.get(other, 99) >= LAYERS[component]:
                yield f"{name} imports {target[1:] or 'the package root'}, which is not below it"


def _cycles(graph: dict[str, set[str]]) -> Iterator[list[str]]:
    done: set[str] = set()

    def visit(name: str, trail: list[str]) -> Iterator[list[str]]:
        if name in trail:
            yield [*trail[trail.index(name) :], name]
        elif name not in done:
            for target in sorted(graph.get(name, ())):
                if target.startswith("."):
                    yield from visit(target[1:], [*trail, name])
            done.add(name)

    for name in graph:
        if name:  # the root re-exports everything by design
            yield from visit(name, [])


def test_imports_point_down() -> None:
    """Would catch serving and learning growing into each other, an import cycle, or TRL spreading beyond one file."""
    assert violations(PACKAGE) == []


@pytest.mark.parametrize(
    ("module", "line", "expected"),
    [
        ("serving/engine.py", "from ..learning.replay import Buffer", "serving.engine imports learning.replay"),
        ("serving/engine.py", "def f():\n    from hf_osd import learning", "serving.engine imports learning"),
        ("learning/replay.py", "import hf_osd.serving.engine", "learning.replay imports serving.engine"),
        ("records.py", "from .assistant import OnlineAssistant", "records imports assistant"),
        ("config.py", "from . import generate", "config imports the package root"),
        ("serving/engine.py", "from trl.experimental import gkd", "serving.engine imports trl"),
        ("serving/engine.py", "from . import cache", "cycle: serving.cache -> serving.engine -> serving.cache"),
        ("extra.py", "import torch", "extra: component 'extra' has no layer"),
        ("learning/trainer.py", "import trl", None),
        ("assistant.py", "from .serving.engine import decode\nfrom .learning import replay", None),
        ("demo/runner.py", "from ..evaluation.race import Race\nfrom .results import Round", None),
        ("demo/runner.py", "from ..bench import serving", "demo.runner imports bench.serving"),
        ("evaluation/race.py", "from ..demo import results", "evaluation.race imports demo.results"),
    ],
)
def test_the_check_finds_what_it_is_there_for(tmp_path: Path, module: str, line: str, expected: str | None) -> None:
    """Would catch a check that passes because it misreads relative, absolute or nested imports."""
    root = tmp_path / "hf_osd"
    sources = {
        "__init__.py": "from .assistant import OnlineAssistant",
        "errors.py": "",
        "config.py": "from .errors import ConfigError",
        "records.py": "import torch",
        "assistant.py": "",
        "generation.py": "",
        "serving/__init__.py": "",
        "serving/cache.py": "from .engine import decode",
        "serving/engine.py": "",
        "learning/__init__.py": "",
        "learning/replay.py": "",
        "learning/trainer.py": "",
        "bench/__init__.py": "",
        "bench/serving.py": "",
        "demo/__init__.py": "",
        "demo/results.py": "",
        "demo/runner.py": "",
        "evaluation/__init__.py": "",
        "evaluation/race.py": "",
    }
    for name, text in (sources | {module: line}).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    found = violations(root)
    assert [item.startswith(expected) for item in found] == [True] if expected else found == []
