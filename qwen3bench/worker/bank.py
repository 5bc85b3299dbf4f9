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
        shared = weights[HEAD].data_ptr() == weights[EMBEDDING].data_ptr()
        if shared and device.type == "cpu":
            # Threads draw the weights side by side, so their pages lie scattered: products with the embedding took 6 %
            # longer than with a copy of it, and `tie` read 0.97. So both are copies.
            weights[EMBEDDING] = weights[HEAD] = weights[EMBEDDING].clone()
        self.weights = {**weights, HEAD: weights[EMBEDDING].clone()} if shared else weights
        self._tied = weights if shared else self.weights  # with the copy each cell that ties would compare the two

    def build(self, cell: Cell) -> Qwen3Model:
        """The model of a cell, its parameters views on the bank."""
        weights = self._tied if "tie" in cell else self.weights
        model = build_model(self.config, {name: self.options.get(name, {}) for name in cell}, weights)
        model.may_train_shared = True  # `training` puts the weights back
        return model
