"""The policies that come with the product: which of all places that fit is best. Pure, in columns.

What a policy must be is `manager.core.placement.Policy`; one of somebody else's comes by an entry point (`manager.policies`).
"""

from typing import Final

import numpy as np

from manager.core.placement import Demand, Floats, Options, Policy


class FirstFit:
    """The first node that fits, in the order of names."""

    name: Final = "first_fit"

    def scores(self, options: Options, demand: Demand) -> Floats:  # noqa: ARG002
        """All are equally good."""
        return np.zeros(len(options.row))


class BestFit:
    """The devices with the least free memory that still hold it."""

    name: Final = "best_fit"

    def scores(self, options: Options, demand: Demand) -> Floats:  # noqa: ARG002
        """What is free on the devices that it would take, in bytes."""
        free: Floats = options.table.memory_bytes[options.row[:, None], options.devices].sum(axis=1).astype(np.float64)
        return free


BEST_FIT: Final[Policy] = BestFit()
POLICIES: Final[dict[str, Policy]] = {policy.name: policy for policy in (FirstFit(), BEST_FIT)}
DEFAULT_POLICY: Final[Policy] = BEST_FIT
"""What decides where nothing else was set."""
