"""A project of the user's with ten switches of its own over five parts, most of which others of them change too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

SOURCE = '''"""Ten ways to compute the same."""

from dataclasses import replace

import torch
import torch.nn.functional as F


def flat_norm(parts):
    class FlatNorm(parts.norm):
        def forward(self, x):
            return super().forward(x.reshape(-1, x.shape[-1])).view_as(x)

    return replace(parts, norm=FlatNorm)


def halved_norm(parts):
    class HalvedNorm(parts.norm):
        def forward(self, x):
            rows = x.reshape(-1, x.shape[-1])
            return torch.cat([super(HalvedNorm, self).forward(half) for half in rows.chunk(2)]).view_as(x)

    return replace(parts, norm=HalvedNorm)


def copied_norm(parts):
    class CopiedNorm(parts.norm):
        def forward(self, x):
            return super().forward(x.clone())

    return replace(parts, norm=CopiedNorm)


class Around:
    """What it is given, all but what a subclass does otherwise."""

    def __init__(self, inner):
        self.inner = inner

    def __getattr__(self, name):
        return getattr(self.inner, name)


class SwappedSum(Around):
    def add(self, x, change):
        return self.inner.add(change, x)


class CopiedSum(Around):
    def add(self, x, change):
        return self.inner.add(x, change.clone())


class StoredHeads(Around):
    def __call__(self, q, k, v, mask, mask_scores):
        return self.inner(q.contiguous(), k.contiguous(), v.contiguous(), mask, mask_scores)


class HalvedHeads(Around):
    def __call__(self, q, k, v, mask, mask_scores):
        halves = zip(q.chunk(2, 1), k.chunk(2, 1), v.chunk(2, 1), strict=True)
        return torch.cat([self.inner(*half, mask, mask_scores) for half in halves], 1)


class CopiedMask(Around):
    def dense(self, *given):
        return self.inner.dense(*given).clone()


def swapped_sum(parts):
    return replace(parts, residual=SwappedSum(parts.residual))


def copied_sum(parts):
    return replace(parts, residual=CopiedSum(parts.residual))


def stored_heads(parts):
    return replace(parts, attend=StoredHeads(parts.attend))


def halved_heads(parts):
    return replace(parts, attend=HalvedHeads(parts.attend))


def copied_mask(parts):
    return replace(parts, mask=CopiedMask(parts.mask))


def opened(mlp):
    """The feed-forward with two finer parts, which each of its switches replaces."""
    if hasattr(mlp, "activation"):
        return mlp

    class Opened(mlp):
        def activation(self, x):
            return F.silu(x)

        def product(self, gate, up):
            return gate * up

        def forward(self, x):
            return self.fc3(self.product(self.activation(self.fc1(x)), self.fc2(x)))

    return Opened


def plain_silu(parts):
    class PlainSilu(opened(parts.mlp)):
        def activation(self, x):
            return x * torch.sigmoid(x)

    return replace(parts, mlp=PlainSilu)


def swapped_product(parts):
    class SwappedProduct(opened(parts.mlp)):
        def product(self, gate, up):
            return up * gate

    return replace(parts, mlp=SwappedProduct)
'''
# The lines of each YAML file beyond its name and its function.
TEN = {
    "flat_norm": "commutes: [norm, halved_norm, copied_norm]",
    "halved_norm": "commutes: [norm, flat_norm, copied_norm]",
    "copied_norm": "commutes: [norm, flat_norm, halved_norm]",
    "swapped_sum": "part: residual\ncommutes: all",
    "copied_sum": "part: residual\ncommutes: all",
    "stored_heads": "commutes: all",
    "halved_heads": "commutes: all",
    "copied_mask": "commutes: [mask]",
    "plain_silu": "part: mlp.activation",
    "swapped_product": "part: mlp.product",
}


def write_lab(directory: Path, declared: Mapping[str, str] = TEN) -> Path:
    """Write `lab/switches.py` and `own/opt/*.yaml` into a directory; the folder for `--config-dir`."""
    (directory / "lab").mkdir(parents=True)
    (directory / "lab" / "switches.py").write_text(SOURCE, encoding="utf-8")
    folder = directory / "own"
    (folder / "opt").mkdir(parents=True)
    for name, text in _files(declared):
        (folder / "opt" / f"{name}.yaml").write_text(text, encoding="utf-8")
    return folder


def _files(declared: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for place, (name, text) in enumerate(declared.items()):
        yield name, f"# @package opt.{name}\n_target_: lab.switches.{name}\norder: {200 + place}\n{text}\n"
