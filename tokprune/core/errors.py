"""Exceptions of tokprune. A message says what was asked, what was found and what to use instead."""

from __future__ import annotations

from typing import Any


class TokPruneError(ValueError):
    """Base of all errors of this package."""


class UnknownNameError(TokPruneError):
    """No method, model adapter or task has this name."""


class OptionError(TokPruneError):
    """A method has no such option, or the option's value is not allowed."""


class UnknownOptionError(OptionError):
    """A method has no such option."""


class PluginError(TokPruneError):
    """What another package offers through an entry point, or a file of the user's own, cannot be used."""


class MethodError(TokPruneError, RuntimeError):
    """The class of a method does not return what it has to: nothing, or a wrong shape, type or count."""


class UnsupportedModelError(TokPruneError):
    """The model has no adapter, or is wrapped in a way that hooks cannot follow."""


class MissingSignalError(TokPruneError):
    """The method needs something that this model's vision tower does not supply."""


class BudgetError(TokPruneError):
    """The budget is malformed or outside what the method can meet."""


class AlreadyAttachedError(TokPruneError, RuntimeError):
    """The model already has an attachment."""


class NothingPrunedError(TokPruneError, RuntimeError):
    """Pictures went through the model below a full budget, yet no token was dropped."""


class UnsupportedCacheError(TokPruneError, RuntimeError):
    """The KV cache is of a kind, or in a state, that pruned sequences cannot use."""


class BadFeaturesError(TokPruneError, RuntimeError):
    """The vision tower or the projector produced NaN."""


class ModelChangedError(TokPruneError, RuntimeError):
    """Parts of the model were replaced after it was attached, so hooks would miss what it runs."""


class NotCopyableError(TokPruneError, TypeError):
    """An attached model was copied or pickled."""


class SavedError(TokPruneError):
    """An attachment cannot be saved, or what was saved cannot be used: the folder, its files or the model."""


class TaskError(TokPruneError):
    """A task, its pictures or its folder cannot be used."""


class RunError(TokPruneError):
    """A run cannot start or continue: the model, the output folder or the settings."""


class AlarmError(TokPruneError):
    """A comparison was run and written to its end, and its figures are doubtful."""


def shown(value: Any) -> str:
    """A value in one line of at most 60 characters, for a message."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # Python prints no whole numbers of thousands of digits
        return "a number too long to show"
    return text if len(text) <= 60 else f"{text[:57]}..."


def why_unloadable(error: Exception) -> str:
    """Why transformers cannot load a model, in one line."""
    said = str(error).strip()
    if "trust_remote_code" in said:
        return "it needs remote code, which tokprune never runs; use a model that transformers supports itself."
    return (said.splitlines() or [type(error).__name__])[0]


class NotCopyable:
    """Base of objects in hooks: a copy would still act on the original model, so copying raises."""

    def __deepcopy__(self, memo):
        raise NotCopyableError("an attached model cannot be copied: call attachment.detach() first")

    def __reduce_ex__(self, protocol):
        raise NotCopyableError("an attached model cannot be pickled: call attachment.detach() first")
