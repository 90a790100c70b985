"""From `recipe=NAME key=value ...` to a typed `TrainConfig`, with Hydra's compose API.

A recipe is a Hydra primary config: its defaults list starts from `base` (conf/base.yaml) or from
another recipe and overrides groups; its body holds single values. Group choices
(`engine=deepspeed`) go through Hydra; single values (`data.seq_len=512`) are parsed by Hydra's
grammar and written into the typed tree, so that a key exists because the schema has it, not because
some YAML happens to name it.

conf/ and recipes/ are read from the source checkout, or from inside the installed package. Recipes
in ./recipes of the working folder are found too and win over shipped ones of the same name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError

from fa3_train.train.config import (
    ConfigError,
    TrainConfig,
    near_misses,
    resolve,
    schema_paths,
    unknown_key,
)

DEFAULT_RECIPE = "quickstart"
_BASE = "base"


@dataclass(frozen=True)
class Recipe:
    """A recipe file and the line that describes it."""

    name: str
    path: Path
    description: str
    shipped: bool


def _shipped(folder: str) -> Path:
    """conf/ or recipes/: beside the package in a source checkout, inside it when installed."""
    package = Path(__file__).resolve().parent.parent
    for candidate in (package.parent / folder, package / folder):
        if (candidate / f"{_BASE if folder == 'conf' else DEFAULT_RECIPE}.yaml").is_file():
            return candidate
    raise ConfigError(f"the package at {package} lacks its {folder}/ folder: reinstall fa3_train")


def conf_dir() -> Path:
    """Folder of the config groups."""
    return _shipped("conf")


def recipe_dirs() -> list[Path]:
    """Folders that hold recipes, the user's ./recipes first."""
    shipped = _shipped("recipes")
    own = Path.cwd() / "recipes"
    return [shipped] if not own.is_dir() or own.samefile(shipped) else [own, shipped]


def recipes() -> dict[str, Recipe]:
    """All recipes by name; a user's recipe hides a shipped one of the same name.

    Only the description is read here, so that a broken file spoils nothing but itself.
    """
    found: dict[str, Recipe] = {}
    shipped = _shipped("recipes")
    for folder in recipe_dirs():
        for path in sorted(folder.glob("*.yaml")):
            text = path.read_text(encoding="utf-8")
            match = re.search(r"^description:\s*(.+)$", text, re.MULTILINE)
            description = match.group(1).strip().strip("\"'") if match else "(no description)"
            found.setdefault(path.stem, Recipe(path.stem, path, description, folder == shipped))
    return found


def groups() -> dict[str, list[str]]:
    """Config groups and their options, e.g. {'engine': ['deepspeed', 'fsdp2', 'torch'], ...}."""
    return {
        folder.name: sorted(path.stem for path in folder.glob("*.yaml"))
        for folder in sorted(conf_dir().iterdir())
        if folder.is_dir() and any(folder.glob("*.yaml"))
    }


def load(overrides: list[str]) -> TrainConfig:
    """The typed configuration for command-line words such as `recipe=llama3_8b run.steps=10`.

    Raises ConfigError: unknown recipe, group option or key (with near misses), wrong type, a word
    that is not an override. Combinations are judged by `config_rules.check`.
    """
    parsed = _parse(overrides)
    name = DEFAULT_RECIPE
    choices: list[str] = []
    values: list[Override] = []
    options = groups()
    for item in parsed:
        key = item.key_or_group
        if item.type is not OverrideType.CHANGE or item.is_sweep_override():
            raise ConfigError(f"'{item.input_line}': only key=value is accepted here")
        if key == "recipe":
            name = str(item.value())
        elif key in options:
            choice = str(item.value())
            _expect(choice, options[key], key)
            choices.append(f"{key}={choice}")
        elif key not in schema_paths():
            raise unknown_key(key)
        else:
            values.append(item)
    config = OmegaConf.structured(resolve(_compose(name, choices)))
    for item in values:
        config = _assign(config, item)
    return resolve(config)


def _parse(words: list[str]) -> list[Override]:
    for word in words:
        if "=" not in word:
            hint = near_misses(word, [*recipes(), *schema_paths()])
            raise ConfigError(
                f"'{word}' is not key=value" + (f"; did you mean {hint[0]}?" if hint else "")
            )
    parser = OverridesParser.create()
    found: list[Override] = []
    for word in words:
        try:
            found.extend(parser.parse_overrides([word]))
        except HydraException as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(
                f"{word}: {reason} (quote a value that has special characters: key='\"...\"')"
            ) from None
    return found


def _expect(choice: str, known: list[str], group: str) -> None:
    if choice not in known:
        hint = near_misses(choice, known)
        raise ConfigError(
            f"{group}={choice}: there is no such {group}; "
            + (f"did you mean {', '.join(hint)}? " if hint else "")
            + f"Known: {', '.join(known)}"
        )


def _compose(name: str, choices: list[str]) -> dict[str, Any]:
    known = recipes()
    _expect(name, sorted(known), "recipe")
    home = known[name].path.parent
    search = [f"file://{folder}" for folder in (*recipe_dirs(), conf_dir()) if folder != home]
    quoted = ",".join(f"'{place}'" for place in search)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(config_dir=str(home), version_base="1.3"):
            composed = compose(
                config_name=name,
                overrides=[f"hydra.searchpath=[{quoted}]", "hydra.job.chdir=false", *choices],
            )
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        text = "; ".join(line.strip() for line in str(error).splitlines()[:2] if line.strip())
        raise ConfigError(f"recipe {known[name].path}: {text}") from None
    values: Any = OmegaConf.to_container(composed)
    return {**values, "recipe": name}


def _assign(config: Any, item: Override) -> Any:
    key = item.key_or_group
    nested = item.value()
    for part in reversed(key.split(".")):
        nested = {part: nested}
    try:
        return OmegaConf.merge(config, nested)
    except ConfigKeyError as error:  # inside a value: optimizer={lrr: 1}
        raise unknown_key(error.full_key or key) from None
    except OmegaConfBaseException as error:
        raise ConfigError(f"{key}: {str(error).splitlines()[0]}") from None
