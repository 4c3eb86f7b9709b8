"""The one import that takes seconds, put off until there is something to train."""

import random
import sys
from types import ModuleType


def import_distillation() -> ModuleType:
    """Import the module that imports TRL, seconds at the first time, and leave the global random state as it was."""
    state = random.getstate()
    first = f"{__package__}.distillation" not in sys.modules
    from . import distillation

    if first:  # rich, which comes with TRL, draws from it while it is imported
        random.setstate(state)
    return distillation
