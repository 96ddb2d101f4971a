"""Random programs: flipout in both scopes and gauss_newton against the exact matrices.

A failure names the seed; ``python -m tests.fuzz SEED`` prints the program and the comparison.
"""

import jax
import pytest
from fuzz import compare
from fuzz.program import PARTS, program

pytestmark = pytest.mark.usefixtures("x64")

NUM_PROGRAMS = 110  # each part stands in seven of them or more
# Few that compile fast; all others run in `make test-all`.
QUICK = (18,)


@pytest.mark.parametrize(
    "seed",
    [
        pytest.param(seed, marks=() if seed in QUICK else pytest.mark.slow)
        for seed in range(NUM_PROGRAMS)
    ],
)
def test_estimates_are_exact_or_unbiased(seed):
    chosen = program(seed)
    wrong = compare.failures(chosen)
    if seed % 10 == 9:
        jax.clear_caches()  # compiled programs would fill the memory
    assert not wrong, "\n".join([f"seed {seed}:", *chosen.description, *wrong])


@pytest.mark.slow
def test_the_comparison_sees_a_bias(monkeypatch):
    traces = compare._traces
    monkeypatch.setattr(
        compare, "_traces", lambda *args: (1.2 * traces(*args)[0], traces(*args)[1])
    )
    assert {line.partition(":")[0] for line in compare.failures(program(0))} == {
        "flipout joint",
        "flipout block",
        "gauss_newton",
    }


@pytest.mark.slow
def test_the_programs_hold_every_part():
    seeds = range(NUM_PROGRAMS)
    names = {name.partition("_")[2] for seed in seeds for name in program(seed).params}
    assert names == set(PARTS)
