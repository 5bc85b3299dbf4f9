"""The settings of a small run: three blocks in one process, whatever they tell."""

SMALL = (
    "model=tiny",
    "workload=prefill",
    "device=cpu",
    "measure.target=0.00001",
    "measure.min_blocks=3",
    "measure.max_blocks=3",
    "measure.min_processes=1",
    "measure.blocks_per_process=2",
)
