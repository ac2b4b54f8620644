# SPDX-License-Identifier: Apache-2.0
"""Rewards, which score images against their prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from inspect import signature
from typing import Any

from torch import Tensor

from chunkgrpo.imported_code import import_named
from chunkgrpo.rewards.answers import as_scores
from chunkgrpo.rewards.protocol import GroupwiseReward, Reward, RewardError
from chunkgrpo.rewards.scoring import Scorer, score

__all__ = [
    "BUILT_IN",
    "FunctionReward",
    "GroupwiseReward",
    "Reward",
    "RewardError",
    "Scorer",
    "make_reward",
    "score",
]

BUILT_IN = {
    "shapes": ("chunkgrpo.rewards.shapes", "ShapesReward"),
    "clip": ("chunkgrpo.rewards.clip", "ClipReward"),
    "pickscore": ("chunkgrpo.rewards.pickscore", "PickScoreReward"),
    "hpsv2": ("chunkgrpo.rewards.hpsv2", "HpsV2Reward"),
    "hpsv3": ("chunkgrpo.rewards.hpsv3", "HpsV3Reward"),
    "image_reward": ("chunkgrpo.rewards.image_reward", "ImageRewardReward"),
    "aesthetic": ("chunkgrpo.rewards.aesthetic", "AestheticReward"),
    "siglip": ("chunkgrpo.rewards.siglip", "SiglipReward"),
    "ocr": ("chunkgrpo.rewards.ocr", "OcrReward"),
    "geneval": ("chunkgrpo.rewards.geneval", "GenEvalReward"),
    "vlm_judge": ("chunkgrpo.rewards.vlm_judge", "VlmJudgeReward"),
    "jpeg_compressibility": ("chunkgrpo.rewards.jpeg", "JpegCompressibility"),
    "jpeg_incompressibility": ("chunkgrpo.rewards.jpeg", "JpegIncompressibility"),
    "brightness": ("chunkgrpo.rewards.brightness", "BrightnessReward"),
    "image_health": ("chunkgrpo.rewards.image_health", "ImageHealthReward"),
    "remote": ("chunkgrpo.rewards.remote", "RemoteReward"),
}


class FunctionReward:
    """A plain function ``(images, prompts) -> scores`` as a reward.

    A function with an attribute ``groupwise = True`` gets the group size as third argument, see
    :class:`GroupwiseReward`; one with ``needs_metadata = True`` the prompts' metadata, last. With
    ``share = True`` its scores are shown in per cent.
    """

    def __init__(self, name: str, function: Any) -> None:
        self.name, self.function = name, function
        self.groupwise = bool(getattr(function, "groupwise", False))
        self.needs_metadata = bool(getattr(function, "needs_metadata", False))
        self.share = bool(getattr(function, "share", False))

    def __call__(self, images: Tensor, prompts: Sequence[str], *more: Any) -> Tensor:
        """Score images."""
        return as_scores(self.function(images, prompts, *more), self.name)


def make_reward(name: str, options: Mapping[str, Any] | None = None) -> Reward:
    """Build a reward from its name, from ``package.module:function``, or from a server's address.

    Args:
        name: A name, an import path or an address; a path may also lead to a class or an object
            (:func:`imported_reward`).
        options: Arguments of the constructor.

    Raises:
        ValueError: If no reward has that name, the import path leads nowhere, or no server answers.
    """
    name, options = _spelled_out(name, options or {})
    if name in BUILT_IN:
        module, attribute = BUILT_IN[name]
        return constructed(name, getattr(import_module(module), attribute), options)
    return imported_reward(name, options)


def _spelled_out(name: str, options: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Return the name of a built-in reward or an import path, and the options.

    Raises:
        ValueError: If it is neither.
    """
    if name.startswith(("http://", "https://")):
        return "remote", {"url": name, **options}
    if name in BUILT_IN or ":" in name:
        return name, options
    known = ", ".join(BUILT_IN)
    raise ValueError(
        f"unknown reward {name!r}; known: {known}, package.module:function or http://host:port"
    )


def check_reward(name: str, options: Mapping[str, Any]) -> None:
    """Refuse a reward that does not exist or does not take its options; nothing is loaded.

    Args:
        name: As for :func:`make_reward`. What an import path leads to is not looked at.
        options: Arguments of the constructor.

    Raises:
        ValueError: If there is no such reward, or it takes other options.
    """
    name, options = _spelled_out(name, options)
    if name in BUILT_IN:
        module, attribute = BUILT_IN[name]
        check_options(name, getattr(import_module(module), attribute), options)


def check_options(name: str, kind: Any, options: Mapping[str, Any]) -> None:
    """Refuse options that a reward's class does not take, and missing ones that it needs.

    Raises:
        ValueError: With the options, and how to give them.
    """
    try:
        parameters = signature(kind).parameters.values()
    except (TypeError, ValueError):  # a class of an extension module has no signature
        parameters = ()
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    takes_any = not parameters or any(p.kind == p.VAR_KEYWORD for p in parameters)
    surplus = [option for option in options if option not in {p.name for p in named}]
    if surplus and not takes_any:
        raise ValueError(
            f"reward {name!r} does not take these options: {', '.join(surplus)}; it takes "
            f"{', '.join(p.name for p in named) or 'none'}"
        )
    missing = [p.name for p in named if p.default is p.empty and p.name not in options]
    if missing:
        example = ", ".join(f"{option}: {option.upper()}" for option in missing)
        raise ValueError(
            f"reward {name!r} needs the option{'s' * (len(missing) > 1)} {' and '.join(missing)}; "
            f"give {'them' if len(missing) > 1 else 'it'} in a recipe, or by --set "
            f"'rewards=[{{name: {name}, options: {{{example}}}}}]' (and evaluation.reward likewise "
            "if it is to judge); to serve it: --option NAME=VALUE"
        )


def constructed(name: str, kind: Any, options: Mapping[str, Any]) -> Any:
    """Call a reward's class with its options.

    Raises:
        ValueError: If there is an option that it does not take, or it lacks one that it needs; the
            message names the options and says how to give them.
    """
    check_options(name, kind, options)
    try:
        return kind(**options)
    except TypeError as error:
        raise ValueError(f"reward {name!r} does not take these options: {error}") from error


def imported_reward(path: str, options: Mapping[str, Any]) -> Reward:
    """Return the reward at ``package.module:attribute``: a function, a class or an object.

    A class is called with the options; functions and objects take none.

    Raises:
        ValueError: If there is no such object, it cannot score, or it does not take the options.
    """
    try:
        found = import_named(path)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"reward {path!r} cannot be imported: {error}") from error
    if isinstance(found, type):
        found = constructed(path, found, options)
    elif options:
        raise ValueError(
            f"reward {path!r} is no class and takes no options, but has {', '.join(options)}; make "
            "it a class that takes them in its constructor"
        )
    if not callable(found):
        raise ValueError(
            f"reward {path!r} is a {type(found).__name__}, which cannot be called; it must be a "
            "function (images, prompts) -> scores, or a class whose objects are called so"
        )
    # Named by its path, not by __name__, which a decorator may have changed.
    if isinstance(found, Reward) and isinstance(found.name, str):
        return found
    return FunctionReward(path.partition(":")[2], found)
