"""Keeps a trainer that runs in a thread from disturbing the rest of the process."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any


@contextmanager
def global_seed_untouched(*modules: ModuleType) -> Iterator[None]:
    """
    Keep `Trainer.__init__` from seeding the global generators, which serving samples from.

    Restoring their state afterwards would leave a moment in which another thread samples from a seeded one. Only the
    calling thread skips the seeding; trainers of others are not affected.

    Args:
        modules (`ModuleType`): Those that call their own `set_seed`.
    """
    owner = threading.get_ident()
    originals = [module.set_seed for module in modules]

    def for_others(original: Callable[..., None]) -> Callable[..., None]:
        def set_seed(*args: Any, **kwargs: Any) -> None:
            if threading.get_ident() != owner:
                original(*args, **kwargs)

        return set_seed

    for module, original in zip(modules, originals, strict=True):
        module.set_seed = for_others(original)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for module, original in zip(modules, originals, strict=True):
            module.set_seed = original  # type: ignore[attr-defined]
