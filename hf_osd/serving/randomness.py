"""Where the randomness of one `generate` call comes from."""

import torch


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
        device = generator.device if generator is not None else torch.device("cpu")
        self._seed = int(torch.randint(2**62, (), generator=generator, device=device))

    def on(self, device: torch.device) -> torch.Generator:
        """Return the generator of a device."""
        if device not in self._by_device:
            # The draft's device must not repeat the target's numbers: their independence makes sampling lossless.
            seed = self._seed + len(self._by_device)
            self._by_device[device] = torch.Generator(device).manual_seed(seed)
        return self._by_device[device]
