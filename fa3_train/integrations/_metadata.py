"""Answers to importlib.metadata for packages that are not on disk.

Frameworks look flash attention up by the name of its distribution before they import it.
"""

from __future__ import annotations

import importlib.metadata
from typing import Any

__all__ = ["Distribution", "Finder"]


class Distribution(importlib.metadata.Distribution):
    """Metadata of a package that is not on disk."""

    def __init__(self, name: str, version: str, top_level: str) -> None:
        self._texts = {
            "METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
            "top_level.txt": top_level + "\n",
        }

    def read_text(self, filename: str) -> str | None:
        return self._texts.get(filename)

    def locate_file(self, path: Any) -> Any:
        return path


class Finder(importlib.metadata.DistributionFinder):
    """Answers importlib.metadata for what ``flash_attn.install`` has put into sys.modules."""

    def __init__(self) -> None:
        self.distributions: dict[str, Distribution] = {}

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        return None

    def find_distributions(self, context: Any = importlib.metadata.DistributionFinder.Context()):  # noqa: B008
        wanted = None if context.name is None else context.name.lower().replace("_", "-")
        return [d for name, d in self.distributions.items() if wanted in (None, name)]
