"""The file for ``lighteval custom``: ``lighteval custom model_name=...,dtype=float32 lighteval_model.py TASKS``.

In place of a name stand the arguments that ``lighteval accelerate`` takes. lighteval looks here for a class of its own base.
"""

from __future__ import annotations

from typing import Any

from lighteval.models.abstract_model import LightevalModel

from detinfer.integrations import enforced, lighteval


class Detinfer(LightevalModel):  # type: ignore[misc]
    """One of lighteval's transformers models, wrapped (``lighteval.Enforced``)."""

    def __new__(cls, config: Any) -> Any:
        """The wrapped model that ``config.model_name`` names with its arguments."""
        from lighteval.models.transformers.transformers_model import TransformersModel, TransformersModelConfig

        inner = TransformersModel(TransformersModelConfig.from_args(config.model_name))
        return lighteval.wrap(inner, enforced.defaults or enforced.Terms())
