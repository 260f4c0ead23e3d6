"""Where arithmetic is done, by torch's names."""

from __future__ import annotations

from wemoe_plugin.errors import WemoeError


def check_device(name: str) -> None:
    """Refuse a device that is not there; for ``cpu`` torch need not be imported.

    Raises:
        WemoeError: torch does not know it or cannot use it.
    """
    if name == "cpu":
        return
    import torch

    try:
        torch.zeros(1, device=name).cpu()  # the device meta has no values
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise WemoeError(f"--device {name}: cannot be used: {str(error).splitlines()[0]}") from None
