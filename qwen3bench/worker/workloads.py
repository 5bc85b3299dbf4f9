"""What a cell is asked to do: prefill, decode, generate, over inputs that every cell shares; `training` has `train`.

A workload turns a model into a list of steps, functions without arguments that launch one forward each. A timed value
is the time of all its steps, one after another; only `generate` has more than one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from qwen3bench.config.settings import Settings
from qwen3bench.model.cache import KVCache
from qwen3bench.model.decoder import Decoder, Forward

Step = Callable[[], Tensor]
T = TypeVar("T")


@dataclass(frozen=True)
class WorkloadSize:
    """How large a workload is: sequences, tokens of each prompt, tokens to generate.

    Of training also the precision, and the norm that gradients are clipped to where they are. Of a prefill
    `logits_to_keep`: 1 where the last token's logits are computed alone, 0 for all.
    """

    name: str
    batch_size: int
    prompt_tokens: int
    new_tokens: int
    precision: str | None = None
    clip: float | None = None
    logits_to_keep: int = 0

    @property
    def cache_capacity(self) -> int:
        """Positions that the KV cache holds; 0 where the workload has no cache."""
        return {
            "prefill": 0,
            "train": 0,
            "decode": self.prompt_tokens + 1,
            "generate": self.prompt_tokens + self.new_tokens,
        }[self.name]


def workload_sizes(settings: Settings) -> list[WorkloadSize]:
    """How large each workload of resolved settings is."""
    return [
        WorkloadSize(
            name,
            sizes.batch_size,
            sizes.prompt_tokens or 1,
            sizes.new_tokens,
            sizes.precision,
            sizes.clip,
            sizes.logits_to_keep,
        )
        for name, sizes in settings.workloads.items()
    ]


class Workload:
    """A workload's inputs on a device: seeded random token ids, and the KV cache where there is one."""

    output = "logits are"  # what a step returns, in words

    def __init__(
        self,
        size: WorkloadSize,
        model: Decoder,
        seed: int = 0,
    ) -> None:
        self.size = size
        weight = model.tok_emb.weight
        generator = torch.Generator().manual_seed(seed)
        shape = (size.batch_size, size.prompt_tokens)
        ids = torch.randint(model.config.vocab_size, shape, generator=generator)
        self.prompt = ids.to(weight.device)
        self.token = self.prompt[:, -1:].clone()
        self.cache: KVCache | None = None
        if size.cache_capacity:
            self.cache = KVCache(model.config, size.batch_size, size.cache_capacity, weight.device, weight.dtype)
        if size.name == "decode":
            with torch.inference_mode():
                model(self.prompt, self.cache, logits_to_keep=1)

    @property
    def cache_bytes(self) -> int:
        """What the KV cache occupies, in bytes."""
        return self.cache.num_bytes if self.cache is not None else 0

    def steps(self, model: Forward) -> list[Step]:
        """The forwards of one timed value, each launching its work and returning logits (b, t, vocabulary).

        `model` is called as a Decoder is.
        """
        prompt, token, cache, n = self.prompt, self.token, self.cache, self.size.prompt_tokens
        if self.size.name == "prefill":
            kept = self.size.logits_to_keep
            return [lambda: model(prompt, logits_to_keep=kept)]
        if self.size.name == "decode":
            return [lambda: model(token, cache, start=n)]

        def greedy(tokens: Tensor, start: int) -> Step:
            def step() -> Tensor:
                logits = model(tokens, cache, start=start, logits_to_keep=1)
                token.copy_(logits.argmax(dim=-1))
                return logits

            return step

        return [greedy(prompt, 0)] + [greedy(token, n + i) for i in range(self.size.new_tokens - 1)]

    def restore(self) -> None:
        """Put back what its steps change: nothing here, as a cache is written over."""

    def refill(self) -> None:
        """Put random numbers, always the same, where a decode step reads what a model wrote into the cache before it.

        So cells whose outputs are compared bit for bit read the same, whichever of them filled the cache.
        """
        if self.cache is not None and self.size.name == "decode":
            generator = torch.Generator(self.cache.keys.device).manual_seed(0)
            for stored in (self.cache.keys, self.cache.values):
                stored.normal_(generator=generator)

    def forwards(self, model: Forward) -> list[Step]:
        """The forwards of `steps` alone, each returning logits."""
        return self.steps(model)


def keeping_output(step: Callable[[], T], outputs: list[T]) -> Callable[[], T]:
    """The step, its output the one in `outputs`."""

    def run() -> T:
        outputs.clear()  # first, or two of them would be in memory at once
        outputs.append(step())
        return outputs[0]

    return run
