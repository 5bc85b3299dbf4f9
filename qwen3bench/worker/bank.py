"""One set of weights on the device that every cell shares."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from qwen3bench.config.model_config import ModelConfig
from qwen3bench.model.build import build_model
from qwen3bench.model.checkpoint import EMBEDDING, HEAD
from qwen3bench.model.qwen3 import Qwen3Model
from qwen3bench.model.weights import load_weights
from qwen3bench.record.design import Cell
from qwen3bench.worker.training import TrainingState


class Bank:
    """Weights loaded once; each model built from it is a view on them.

    So 32 cells fit where one does, and every cell reads the same bytes at the same addresses. The one extra tensor is
    the head of the cells without `tie`. `training` is what their training steps share.
    """

    def __init__(
        self,
        config: ModelConfig,
        source: str,
        device: torch.device,
        dtype: torch.dtype,
        seed: int,
        options: Mapping[str, Mapping[str, Any]],
    ) -> None:
        self.config = config
        self.dtype = dtype
        self.training = TrainingState()
        self.options = options
        weights = load_weights(source, config, device=device, dtype=dtype, seed=seed)
        head, embedding = weights[HEAD], weights[EMBEDDING]
        shared = head.data_ptr() == embedding.data_ptr()
        self.weights = {**weights, HEAD: head.clone() if shared else head}
        self._tied = weights if shared else self.weights  # with the copy each cell that ties would compare the two

    def build(self, cell: Cell) -> Qwen3Model:
        """The model of a cell, its parameters views on the bank."""
        weights = self._tied if "tie" in cell else self.weights
        model = build_model(self.config, {name: self.options.get(name, {}) for name in cell}, weights)
        model.may_train_shared = True  # `training` puts the weights back
        return model
