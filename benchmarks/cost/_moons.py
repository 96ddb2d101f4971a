"""Seeds per second: `benchmarks.moons`, many at once, against one after another in PyTorch."""

import dataclasses
import functools
import importlib.util
import statistics
from collections.abc import Iterator
from typing import Any

from benchmarks.cost._memory import in_child
from benchmarks.lab._environment import NOT_INSTALLED
from benchmarks.lab._jobs import Job, Settings
from benchmarks.moons._settings import Settings as MoonsSettings
from benchmarks.moons._settings import available_cores

TORCH_EPOCHS = 5


def jobs(settings: Settings) -> Iterator[Job]:
    """Units of the section ``"moons"``."""
    if settings.quick:
        return
    # 40 seeds are what a run of `make moons` trains at once.
    sizes = {"seeds": 40, "epochs": MoonsSettings.epochs, "blocks": 3}
    child = functools.partial(in_child, "moons", sizes, available_cores())
    yield Job({"section": "moons", "what": "jax", **sizes}, child)
    yield Job({"section": "moons", "what": "torch", "epochs": TORCH_EPOCHS}, torch_seconds)


def jax_seconds(seeds: int, epochs: int, blocks: int) -> dict[str, list[float]]:
    """Seconds a step and seed of the vmapped training, for exact products and differences."""
    from benchmarks.moons._train import Trainer

    trainer = Trainer(dataclasses.replace(MoonsSettings(), seeds=seeds, epochs=epochs))
    seconds: dict[str, list[float]] = {"lama": [], "lama_fd": []}
    (block,) = trainer.blocks(seeds)
    for _ in range(blocks):
        for arm, found in seconds.items():
            found.append(trainer.train_block(arm, block, 1e-3, 0.01)[1])
    return seconds


def torch_seconds() -> dict[str, Any]:
    """Seconds a step of the paper's algorithm, one seed; the median of three short trainings."""
    if importlib.util.find_spec("torch") is None:
        return {"missing": NOT_INSTALLED}
    import torch

    from benchmarks.cost._torch_moons import seconds_per_step
    from benchmarks.lab._data import moons

    x, y = (torch.from_numpy(array[:700]) for array in moons(42))
    threads = torch.get_num_threads()
    found = {}
    try:
        # One thread is the faster choice for matrices as small as these: the better is taken.
        for count in sorted({1, threads}):
            torch.set_num_threads(count)
            runs = [seconds_per_step(x, y, epochs=TORCH_EPOCHS) for _ in range(3)]
            found[str(count)] = statistics.median(runs)
    finally:
        torch.set_num_threads(threads)
    return {"by_threads": found, "seconds": min(found.values())}
