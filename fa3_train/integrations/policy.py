"""What happens when a framework asks for something that these kernels do not do.

    error   raise :class:`UnsupportedRequest` with the reason (the default)
    warn    call what was there before the swap and count the call

Either way each reason is logged once: as an error, or as a warning. Where there was nothing before
the swap (context parallelism, Ulysses), or what was there is not at hand, ``warn`` raises as well.

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
_logged: set[tuple[str, str, int]] = set()


class UnsupportedRequest(ArgumentError):
    """A framework asked for an option that the swapped-in attention does not serve."""


def fallback_counts() -> dict[tuple[str, str], int]:
    """{(integration, reason): calls that went to the original code} since the last reset."""
    return dict(_counts)


def reset_fallback_counts() -> None:
    """Forget the counts; reasons are logged again."""
    _counts.clear()
    _logged.clear()


def _log_once(integration: str, reason: str, level: int, consequence: str) -> None:
    if (integration, reason, level) not in _logged:
        _logged.add((integration, reason, level))
        _log.log(level, "%s: %s; %s", integration, reason, consequence)


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
            _log_once(self.integration, reason, logging.ERROR, "refused")
            raise UnsupportedRequest(f"{self.integration}: {reason}")
        _counts[self.integration, reason] += 1
        _log_once(self.integration, reason, logging.WARNING, "the original attention runs instead")
        return fallback()
