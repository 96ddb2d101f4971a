"""Prints a program's parts and what is wrong with its estimates: ``python -m tests.fuzz 7 8``."""

import sys
import time

import jax

from .compare import failures
from .program import program

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_disable_most_optimizations", True)

for argument in sys.argv[1:]:
    first, _, last = argument.partition("-")
    for seed in range(int(first), int(last or first) + 1):
        begin = time.perf_counter()
        chosen = program(seed)
        print(f"{seed}: {'; '.join(chosen.description)}", flush=True)
        for message in failures(chosen):
            print(f"  {message}", flush=True)
        if seed % 10 == 9:
            jax.clear_caches()  # else a long run fills the memory with compiled programs
        print(f"  {time.perf_counter() - begin:.1f} s", flush=True)
