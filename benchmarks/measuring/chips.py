"""Chips to compile for, which need not be there."""

import sys

from measuring.examples import UserError, topologies

CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "h100": "h100:1"}


def target(chip: str) -> topologies.Target:
    """Returns what to compile for, or exits; call it before anything else uses JAX.

    Args:
        chip: One of `CHIPS`, or a topology.
    """
    try:
        return topologies.target(CHIPS.get(chip, chip))
    except UserError as error:
        sys.exit(str(error))
