"""Functions that stand in front of others and hand over what they do not serve.

A function learns deep inside that it does not serve a call. With something behind it, that is not
yet a refusal: it unwinds to the wrapper, which asks the policy.
"""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable
from typing import Any, NoReturn

from fa3_train.integrations.policy import Policy

__all__ = ["refuse", "to_original"]

_behind: contextvars.ContextVar[bool] = contextvars.ContextVar("behind", default=False)


class _Unserved(Exception):
    """On its way to the wrapper."""


def refuse(policy: Policy, reason: str) -> NoReturn:
    """Leave the function: to the wrapper of :func:`to_original`, or by the policy's error."""
    if _behind.get():
        raise _Unserved(reason)
    policy.refuse(reason)
    raise AssertionError  # without a fallback the policy raised


def to_original(
    function: Callable[..., Any], original: Callable[..., Any] | None, rule: Policy
) -> Callable[..., Any]:
    """``function``, whose refusals go to ``original`` where there is one, by ``rule``."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        token = _behind.set(original is not None)
        try:
            return function(*args, **kwargs)
        except _Unserved as reason:
            assert original is not None
            return rule.refuse(str(reason), lambda: original(*args, **kwargs))
        finally:
            _behind.reset(token)

    return call
