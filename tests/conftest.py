"""What holds for every test: strict promotion, eight virtual devices, and quick compilation.

A test compiles for seconds what runs for milliseconds, so LLVM does not optimize here, and XLA
is told to compile quickly: jaxlib 0.10 by writing its kernels the older way, in half the time,
later ones by a preset. What the tests look at (values, fusion, partitioning, memory, what is sent
between devices) XLA decides before. A test that compares two programs to the bit asks for
`optimized`: users compile with everything on.
"""

import gc
import importlib.metadata
import os
import resource
import sys

# Before jax is imported.
OLDER = importlib.metadata.version("jaxlib").startswith("0.10.")
QUICK = "--xla_cpu_use_fusion_emitters=false" if OLDER else "--xla_cpu_opt_preset=FAST_COMPILE"
os.environ.setdefault("XLA_FLAGS", f"--xla_force_host_platform_device_count=8 {QUICK}")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jax
import pytest


@pytest.fixture(autouse=True)
def strict_promotion(request):
    """Our own code never promotes implicitly; others' code (optax.adam, flax) does."""
    dtype_rule = "standard" if request.node.get_closest_marker("standard_promotion") else "strict"
    rank_rule = "allow" if dtype_rule == "standard" else "raise"
    with jax.numpy_dtype_promotion(dtype_rule), jax.numpy_rank_promotion(rank_rule):
        yield


@pytest.fixture(scope="module", autouse=True)
def bounded_memory():
    """Compiled programs add up to gigabytes, but files share many small ones: first they stay."""
    yield
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, on macOS bytes
    if peak * (1 if sys.platform == "darwin" else 1024) > 2**30:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def x64():
    """Double precision, for comparisons with NumPy references."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def optimized():
    """Compiles as users do."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)
