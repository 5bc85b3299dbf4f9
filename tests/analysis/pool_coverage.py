"""How often intervals from several machines hold the truth: simulated pools, each through the whole analysis.

`python tests/analysis/pool_coverage.py` prints the table of docs/how-we-measure.md; it takes a minute or two.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from qwen3bench.analysis.contrasts import contrasts, every_cell, shapley_contrasts
from qwen3bench.analysis.nested import Measured, Nested, nested
from qwen3bench.analysis.variance import clustered

FACTORS = ("a", "b", "c")
BLOCKS = 3  # in each process
KINDS = {"main effects": slice(0, 3), "interactions": slice(3, 7), "Shapley": slice(7, 10), "speed-ups": slice(10, 17)}


@dataclass(frozen=True)
class World:
    """How machines, cards and processes differ, as the standard deviation of a main effect between them.

    `cards`, `processes`: of each machine, as many as are named, again from the first where there are more machines.
    `two_kinds`: machines differ by plus or minus `machine_sd`, as if there were two makes of them.
    """

    machine_sd: float
    machines: int
    card_sd: float = 0.0
    process_sd: float = 0.002
    block_sd: float = 0.003
    cards: tuple[int, ...] = (1,)
    processes: tuple[int, ...] = (3,)
    two_kinds: bool = False


def pools(world: World, count: int, seed: int = 0) -> Nested:
    """`count` pools of machines whose true effects are all nil."""
    rng = np.random.default_rng(seed)
    cells = every_cell(len(FACTORS))
    ratios = np.eye(len(cells))[1:] - np.eye(len(cells))[0]
    matrix = np.vstack([contrasts(FACTORS, cells).matrix, shapley_contrasts(len(FACTORS)), ratios])
    scale = 1 / np.sqrt(
        (matrix[0] ** 2).sum()
    )  # of a cell, whose main effect then has the standard deviation asked for

    def differ(sd: float, *shape: int) -> NDArray[np.float64]:
        return rng.normal(0, sd * scale, (count, *shape, len(cells)))

    found, card, machine = [], [], []
    for m in range(world.machines):
        of_machine = differ(world.machine_sd, 1)
        if world.two_kinds:
            of_machine = np.sign(rng.normal(size=(count, 1, 1))) * matrix[0] * world.machine_sd / (matrix[0] ** 2).sum()
        processes = world.processes[m % len(world.processes)]
        process = np.repeat(np.arange(processes), BLOCKS)
        for c in range(world.cards[m % len(world.cards)]):
            y = of_machine + differ(world.card_sd, 1) + differ(world.process_sd, processes)[:, process]
            found.append(clustered(y + differ(world.block_sd, len(process)), process, matrix))
            card.append(f"{m}.{c}")
            machine.append(str(m))
    told = (np.stack([getattr(each, name) for each in found], axis=-2) for name in ("estimate", "se", "df"))
    return nested(Measured(*told, card, machine))


def coverage(pooled: Nested) -> NDArray[np.float64]:
    """How often each effect's 95 % interval holds the truth, which is nil."""
    return (np.abs(pooled.pooled.estimate) <= pooled.pooled.half_width(0.95)).mean(axis=0)


WORLDS = {
    "one card a machine": World(0, 0),
    "cards differ by 0.1 %; 1, 2 and 8 of them": World(0, 0, card_sd=0.001, cards=(1, 2, 8)),
    "2 and 9 processes": World(0, 0, processes=(2, 9)),
    "two kinds of machines": World(0, 0, two_kinds=True),
}


def main(count: int = 10_000) -> None:
    """Print the table: the lowest and the highest coverage among all effects, and the median half-width."""
    print("| machines | differ by | " + " | ".join(WORLDS) + " | half-width |\n|" + " --- |" * (len(WORLDS) + 3))
    for machines in (2, 3, 8):
        for sd in (0.0, 0.003, 0.02):
            told = [pools(replace(world, machines=machines, machine_sd=sd), count) for world in WORLDS.values()]
            covered = [coverage(each) for each in told]
            half = np.median(told[0].pooled.half_width(0.95)[:, 0])
            cells = [f"{100 * each.min():.1f} to {100 * each.max():.1f} %" for each in covered]
            print(f"| {machines} | {100 * sd:g} % | {' | '.join(cells)} | ±{100 * half:.2g} % |", flush=True)


if __name__ == "__main__":
    main()
