"""Strictness for every test: no implicit promotion of dtype or rank, eight virtual devices."""

import os

# Before jax is imported: the devices that the sharding tests train on.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import pytest


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "standard_promotion: runs code of others that needs implicit promotion"
    )


@pytest.fixture(autouse=True)
def strict_promotion(request):
    """Our own code never promotes implicitly; others' code (optax.adam, flax) does."""
    dtype_rule = "standard" if request.node.get_closest_marker("standard_promotion") else "strict"
    rank_rule = "allow" if dtype_rule == "standard" else "raise"
    with jax.numpy_dtype_promotion(dtype_rule), jax.numpy_rank_promotion(rank_rule):
        yield


@pytest.fixture
def x64():
    """Double precision, for comparisons with NumPy references."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def fast_compilation():
    """For tests that compile for seconds what runs for milliseconds: LLVM need not try hard."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
