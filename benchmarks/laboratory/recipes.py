"""Learning recipes, read from TOML: a recipe is fields of `OnlineConfig` and nothing else."""

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_osd import OnlineConfig

RECIPES = Path(__file__).with_name("recipes.toml")
STATIC, BASELINE, OFFLINE = "static", "algorithm_1", "offline"
# What is run unless recipes are named.
USUAL = (STATIC, BASELINE, "defaults", OFFLINE)


@dataclass(frozen=True)
class Recipe:
    """
    One way to learn.

    Attributes:
        name (`str`): `"FAMILY"`, or `"FAMILY@VALUE"` for one of a sweep.
        family (`str`): Its table in the TOML.
        config (`Mapping[str, Any]`): Fields of `OnlineConfig`.
        epochs (`int`): 0 learns online; otherwise this often over the whole stream, before it is scored.
        router (`str`): Name of a router, where there are drafts by route: `"key"` (the domain), `"topic"` or
            `"language"`.
    """

    name: str
    family: str
    config: Mapping[str, Any] = field(default_factory=dict)
    epochs: int = 0
    router: str = ""

    def online_config(self, **more: Any) -> OnlineConfig:
        """
        Return the library's settings, for the inline mode, which is deterministic.

        Raises:
            ValueError: A field is unknown or out of its range.
        """
        try:
            return OnlineConfig(**{**self.config, "background": False, **more})
        except (TypeError, ValueError) as error:
            raise ValueError(f"recipe {self.name!r}: {error}") from error


def load_recipes(path: Path = RECIPES) -> list[Recipe]:
    """
    Read all recipes of a file, sweeps spread out, and check them.

    Raises:
        ValueError: A table or a field is wrong.
    """
    tables = tomllib.loads(path.read_text(encoding="utf-8"))
    recipes = [recipe for family, table in tables.items() for recipe in _spread(family, table)]
    for recipe in recipes:
        recipe.online_config()
    return recipes


def _spread(family: str, table: Mapping[str, Any]) -> Iterator[Recipe]:
    if unknown := table.keys() - {"about", "config", "sweep", "kind", "epochs", "router"}:
        raise ValueError(f"recipe {family!r} has unknown keys: {', '.join(sorted(unknown))}")
    config = table.get("config", {})
    epochs = table.get("epochs", 3) if table.get("kind") == "offline" else 0
    sweep = table.get("sweep", {})
    router = table.get("router", "")
    if not sweep:
        yield Recipe(family, family, config, epochs, router)
    elif len(sweep) > 1:
        raise ValueError(f"recipe {family!r} sweeps more than one field: {', '.join(sweep)}")
    for name, values in sweep.items():
        for value in values:
            yield Recipe(f"{family}@{value}", family, {**config, name: value}, epochs, router)


def choose(recipes: Sequence[Recipe], names: Sequence[str]) -> list[Recipe]:
    """
    Return the recipes of some names or families, in the order of the file; `"all"` are all.

    Raises:
        ValueError: A name is unknown.
    """
    known = {name for recipe in recipes for name in (recipe.name, recipe.family)}
    if unknown := set(names) - known - {"all"}:
        raise ValueError(f"no recipe {', '.join(sorted(unknown))}; there are {', '.join(sorted(known))}")
    return [recipe for recipe in recipes if {"all", recipe.name, recipe.family} & set(names)]
