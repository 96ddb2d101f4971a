"""A run that was stopped and resumed by Orbax ends as the run that never was.

The runs are ``examples/resume.py`` in processes of their own: 20 steps without a stop, or 7, a stop
and 13 more. Its optimizer estimates the curvature at every fourth step, so that step 7 lies
between two estimates, and it folds the step's number into a key that the state holds as raw data.
"""

import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from example_runs import EXAMPLES, assert_equal_states, checkpoint, example, finish, started

from lama_optax import lam, lama_adam

STOP, STEPS = 7, 20
WITH_MULTI_STEPS = """
import optax, resume, sys
optimizer = optax.MultiSteps(resume.OPTIMIZER, every_k_schedule=2)
resume.train(sys.argv[1], int(sys.argv[2]), optimizer=optimizer)
"""


def plain(directory, steps):
    script = EXAMPLES / "resume.py"
    return (script, "--directory", directory, "--steps", steps, "--save-every", 4)


def accumulating(directory, steps):
    return ("-c", WITH_MULTI_STEPS, directory, steps)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """Directories with the checkpoints of unbroken runs and of runs stopped at step 7."""
    root = tmp_path_factory.mktemp("runs")
    finish(
        plain(root / "unbroken", STEPS),
        plain(root / "stopped", STOP),
        accumulating(root / "unbroken_accumulating", STEPS),
        accumulating(root / "stopped_accumulating", STOP),
        devices=1,
    )
    return root


def goes_on(printed, step):
    return f"start at step {step} of {STEPS}" in printed


def copy_of_stopped(stopped, tmp_path):
    """Checkpoints of steps 4 and 7."""
    return shutil.copytree(stopped / "stopped", tmp_path / "copy")


def cut(path):
    """Cuts a file short, as a full disk or a lost machine does."""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def cut_data(directory):
    """Cuts all data files: which of them holds what is used depends on the order of the writes."""
    paths = [path for path in files(directory) if path.parent.name == "d"]
    assert paths
    for path in paths:
        cut(path)


def files(directory):
    return sorted(path for path in directory.rglob("*") if path.is_file())


@pytest.mark.slow
def test_resumed_in_a_new_process_to_the_bit(stopped, tmp_path):
    directory = copy_of_stopped(stopped, tmp_path)
    lama = checkpoint(directory, STOP)["opt_state"][0]
    assert lama.count == STOP
    assert STOP % 4 != 0  # in the middle of an update interval
    assert np.all(lama.curvature != 0)
    (printed,) = finish(plain(directory, STEPS), devices=1)
    assert goes_on(printed, STOP)
    assert_equal_states(checkpoint(directory, STEPS), checkpoint(stopped / "unbroken", STEPS), 0)


@pytest.mark.slow
def test_resumed_with_multi_steps_to_the_bit(stopped):
    optimizer = optax.MultiSteps(example().OPTIMIZER, every_k_schedule=2)
    directory = stopped / "stopped_accumulating"
    state = checkpoint(directory, STOP, optimizer)["opt_state"]
    assert state.mini_step == 1  # in the middle of an accumulation
    (printed,) = finish(accumulating(directory, STEPS), devices=1)
    assert goes_on(printed, STOP)
    assert_equal_states(
        checkpoint(directory, STEPS, optimizer),
        checkpoint(stopped / "unbroken_accumulating", STEPS, optimizer),
        0,
    )


@pytest.mark.slow
def test_resumed_on_another_number_of_devices(stopped, tmp_path):
    """Whole arrays on one device, then split between eight.

    The tolerance is that of sharded.py, and for the same reason: sums in another order.
    """
    directory = copy_of_stopped(stopped, tmp_path)
    (printed,) = finish(plain(directory, STEPS), devices=8)
    assert goes_on(printed, STOP)
    assert_equal_states(checkpoint(directory, STEPS), checkpoint(stopped / "unbroken", STEPS), 1e-6)


@pytest.mark.slow
def test_checkpoint_cut_short_is_refused_and_the_one_before_used(stopped, tmp_path):
    directory = copy_of_stopped(stopped, tmp_path)
    cut_data(directory / "7")
    (printed,) = finish(plain(directory, STEPS), devices=1)
    assert "checkpoint 7 cannot be read" in printed
    assert goes_on(printed, 4)
    assert (directory / "unreadable-7").is_dir()
    assert_equal_states(checkpoint(directory, STEPS), checkpoint(stopped / "unbroken", STEPS), 0)


@pytest.mark.slow
def test_nothing_is_trained_over_checkpoints_that_cannot_be_read(stopped, tmp_path):
    directory = copy_of_stopped(stopped, tmp_path)
    for step in ("4", "7"):
        cut_data(directory / step)
    before = files(directory)
    with started(plain(directory, STEPS), devices=1) as (run,):
        printed = run.communicate()[0]
    assert run.returncode != 0
    assert "none of the checkpoints [7, 4]" in printed
    assert "start at step" not in printed
    assert files(directory) == before


def cut_each_file(directory):
    """Restores with one file after another cut; prints how many cuts were refused."""
    expected = checkpoint(directory, STOP)
    refused = 0
    for path in files(directory / str(STOP)):
        whole = path.read_bytes()
        cut(path)
        try:
            actual = checkpoint(directory, STOP)
        except Exception:  # Orbax raises ValueError, FileNotFoundError, JSONDecodeError and others
            refused += 1
        else:
            assert_equal_states(actual, expected, 0)
        path.write_bytes(whole)
    print(f"refused {refused}")


@pytest.mark.slow
def test_no_cut_file_restores_other_numbers(stopped, tmp_path):
    """Whichever file is cut: an error, or (what is cut was not needed) the numbers saved."""
    directory = copy_of_stopped(stopped, tmp_path)
    # In a process of its own, since Orbax leaves coroutines un-awaited when one of the reads that
    # it made together fails: a warning that Python raises at any time later.
    code = "import pathlib, sys, test_checkpoints as t; t.cut_each_file(pathlib.Path(sys.argv[1]))"
    (printed,) = finish(("-c", code, directory), devices=1)
    assert int(printed.rpartition("refused ")[2].split()[0]) >= 2


KEYS = {
    "seed": lambda: 7,
    "typed": lambda: jax.random.key(7),
    "raw": lambda: jax.random.PRNGKey(7),
    "rbg": lambda: jax.random.key(7, impl="rbg"),
}


@pytest.mark.parametrize("key", KEYS)
def test_the_state_is_plain_numeric_arrays(key):
    """Typed PRNG keys are what breaks checkpoints (Orbax issues 620 and 2540)."""
    params = {"w": jnp.ones(3), "half": jnp.ones(2, jnp.bfloat16)}

    def value_fn(p):
        return jnp.sum(p["w"] ** 2) + jnp.sum(p["half"].astype(jnp.float32) ** 2)

    adam = lama_adam(1e-2, key=KEYS[key](), update_interval=1)
    for tx in (adam, lam(1e-2), optax.chain(optax.clip(1.0), adam)):
        state = tx.init(params)
        grads = jax.grad(value_fn)(params)
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
        updated = jax.eval_shape(
            functools.partial(tx.update, value_fn=value_fn), grads, state, params
        )
        for leaf in jax.tree.leaves((state, updated)):
            assert not jnp.issubdtype(leaf.dtype, jax.dtypes.extended)
            assert jnp.issubdtype(leaf.dtype, jnp.number)


@pytest.mark.parametrize("key", ["typed", "rbg"])
def test_saved_and_restored_state_goes_on_to_the_bit(key, tmp_path):
    """In one process; ``rbg`` keys have other data than the default's."""
    tx = lama_adam(1e-2, sensitivity=3.0, key=KEYS[key](), update_interval=1)
    params = {"w": jnp.asarray([0.5, -1.0, 2.0]), "v": jnp.asarray([[1.0, 0.2]])}

    def value_fn(p):
        return jnp.sum(jnp.sin(p["w"])) * jnp.sum(p["v"] ** 3) ** 2

    @jax.jit
    def step(params, state):
        grads = jax.grad(value_fn)(params)
        updates, state = tx.update(grads, state, params, value_fn=value_fn)
        return optax.apply_updates(params, updates), state

    saved = step(params, tx.init(params))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", saved)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", saved)
    assert_equal_states(step(*restored), step(*saved), 0)
