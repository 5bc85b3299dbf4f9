"""Matrix products that several cells have in common, computed once.

On a CPU nine tenths of the gate's time are products with weights that all cells share, and most cells give many of
these the very numbers that another gave. Each cell still runs on every case. Where it multiplies numbers by a weight
that were multiplied by it before, bit for bit, it gets a copy of the product kept from then.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

KEPT_BYTES = 2**31  # of products: twice what 32 cells of Qwen3-0.6B leave, less than the gate's weights in float64

_Key = tuple[object, ...]


class KeptProducts(TorchFunctionMode):
    """A context in which `F.linear` with shared weights is computed once for each input.

    `share` says which weights these are. They are kept alive, so that no other tensor can lie where they do, and one
    that is changed in place counts as another. The products used longest ago go first where they need more than
    `most_bytes`.
    """

    def __init__(self, most_bytes: int = KEPT_BYTES) -> None:
        super().__init__()
        self.found = self.computed = 0
        self._most_bytes = most_bytes
        self._bytes = 0
        self._shared: dict[int, Tensor] = {}  # by the address of the storage
        self._kept: OrderedDict[_Key, Tensor] = OrderedDict()

    def share(self, weights: Collection[Tensor]) -> None:
        """Let products with these weights be kept."""
        self._shared |= {weight.untyped_storage().data_ptr(): weight for weight in weights}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Compute a function of torch, or take what is kept of it."""
        if func is not F.linear or kwargs or len(args) > 3 or any(each is not None for each in args[2:]):
            return func(*args, **(kwargs or {}))
        key = self._key(*args[:2])
        if key is None:
            return func(*args)
        if key in self._kept:
            self.found += 1
            self._kept.move_to_end(key)
        else:
            self.computed += 1
            product = func(*args)
            self._keep(key, product)
            return product
        return self._kept[key].clone()

    def _key(self, given: Tensor, weight: Tensor) -> _Key | None:
        """What a product is equal by; None where the weight is not shared."""
        if weight.is_inference() or weight.untyped_storage().data_ptr() not in self._shared:
            return None
        numbers = given.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
        return (
            hashlib.sha1(numbers, usedforsecurity=False).digest(),
            *(tuple(given.shape), given.stride(), given.dtype),
            *(weight.data_ptr(), tuple(weight.shape), weight.stride(), weight.dtype, weight._version),
            torch.get_num_threads(),
        )

    def _keep(self, key: _Key, product: Tensor) -> None:
        self._kept[key] = product.clone()
        self._bytes += product.nbytes
        while self._bytes > self._most_bytes:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes
