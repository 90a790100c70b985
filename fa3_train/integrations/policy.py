"""What happens when a framework asks for something that these kernels do not do.

    error   raise :class:`UnsupportedRequest` with the reason (the default)
    warn    call what was there before the swap; counted per reason, logged once per reason

There is no silent mode: a swap that quietly runs another kernel is how people end up publishing
numbers of code that never ran. :func:`fallback_counts` tells how often each reason occurred, so a
test or a dashboard can insist on none.
"""

from __future__ import annotations

import collections
import logging
from collections.abc import Callable
from typing import Any

from fa3_train.checks import ArgumentError

__all__ = ["MODES", "Policy", "UnsupportedRequest", "fallback_counts", "reset_fallback_counts"]

MODES = ("error", "warn")

_log = logging.getLogger("fa3_train.integrations")
_counts: collections.Counter[tuple[str, str]] = collections.Counter()


class UnsupportedRequest(ArgumentError):
    """A framework asked for an option that the swapped-in attention does not serve."""


def fallback_counts() -> dict[tuple[str, str], int]:
    """{(integration, reason): calls that went to the original code} since the last reset."""
    return dict(_counts)


def reset_fallback_counts() -> None:
    _counts.clear()


class Policy:
    """One integration's answer to unsupported requests.

    Args:
        integration: name used in messages and counts.
        mode: ``error`` or ``warn``.
    """

    def __init__(self, integration: str, mode: str = "error") -> None:
        if mode not in MODES:
            raise ArgumentError(f"policy: must be one of {list(MODES)}, got {mode!r}")
        self.integration = integration
        self.mode = mode

    def refuse(self, reason: str, fallback: Callable[[], Any] | None = None) -> Any:
        """Raise, or run ``fallback`` and return its result.

        Raises:
            UnsupportedRequest: in mode ``error``, or where nothing can be fallen back to.
        """
        if self.mode == "error" or fallback is None:
            raise UnsupportedRequest(f"{self.integration}: {reason}")
        key = (self.integration, reason)
        _counts[key] += 1
        if _counts[key] == 1:
            _log.warning("%s: %s; the original attention runs instead", *key)
        return fallback()
