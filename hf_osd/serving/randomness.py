"""Where the randomness of one `generate` call comes from."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def _draw_seed(generator: torch.Generator | None) -> int:
    device = generator.device if generator is not None else torch.device("cpu")
    return int(torch.randint(2**62, (), generator=generator, device=device))


@contextmanager
def seeded(generator: torch.Generator | None) -> Iterator[None]:
    """
    Let code that knows only torch's global state draw from a generator.

    Args:
        generator (`torch.Generator`, *optional*): The user's; without one, the global state is used as it is.
    """
    if generator is None:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(_draw_seed(generator))
        yield


class Randomness:
    """
    One generator a device, all derived from one seed.

    A call draws its seed from the user's generator or, once, from torch's global state: `torch.manual_seed` before
    `generate` makes the call repeatable, and whatever runs beside it (an update in another thread) cannot disturb it.

    Args:
        generator (`torch.Generator`, *optional*): The user's; used itself on its own device.
    """

    def __init__(self, generator: torch.Generator | None = None) -> None:
        self._by_device: dict[torch.device, torch.Generator] = {}
        if generator is not None:
            self._by_device[generator.device] = generator
        self._seed = _draw_seed(generator)

    def on(self, device: torch.device) -> torch.Generator:
        """Return the generator of a device."""
        if device not in self._by_device:
            # The draft's device must not repeat the target's numbers: their independence makes sampling lossless.
            seed = self._seed + len(self._by_device)
            self._by_device[device] = torch.Generator(device).manual_seed(seed)
        return self._by_device[device]
