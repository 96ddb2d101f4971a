"""Starts the example scripts as processes of their own, bounded in time, and reads what they leave.

What a run leaves is its last checkpoint: parameters, the optimizer's state and the step.
"""

import contextlib
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
TIMEOUT = 120  # seconds for one run; a run takes about 5 on an idle machine


def environment(devices):
    """Of a run on so many virtual devices, compiled with less of LLVM's work, to be quick."""
    paths = [str(EXAMPLES), str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }


@contextlib.contextmanager
def started(*commands, devices):
    """Python processes that run at the same time; those still running at the end are killed.

    They are killed after `TIMEOUT` too, so that reading from a silent one ends.
    """
    processes = []

    def kill():
        for process in processes:
            process.kill()

    timer = threading.Timer(TIMEOUT, kill)
    timer.start()
    try:
        for command in commands:
            processes.append(
                subprocess.Popen(
                    [sys.executable, *map(str, command)],
                    env=environment(devices),
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
        yield processes
    finally:
        timer.cancel()
        kill()
        for process in processes:
            process.wait()
            process.stdout.close()


def finish(*commands, devices):
    """Runs the commands together to their ends and returns what each printed."""
    with started(*commands, devices=devices) as processes:
        printed = [process.communicate()[0] for process in processes]
        for process, text in zip(processes, printed, strict=True):
            assert process.returncode == 0, text
    return printed


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def example():
    """The module ``examples/resume.py``."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        import resume
    finally:
        sys.path.remove(str(EXAMPLES))
    return resume


def checkpoint(directory, step, optimizer=None):
    """The checkpoint of one step on one device, whatever devices wrote it."""
    resume = example()
    template = jax.eval_shape(lambda: resume.init(optimizer or resume.OPTIMIZER))
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), template
    )
    with ocp.CheckpointManager(Path(directory).absolute()) as manager:
        return manager.restore(step, args=ocp.args.StandardRestore(target))


def assert_equal_states(actual, expected, tolerance):
    """Compares two states leaf by leaf: to the bit where ``tolerance`` is 0.

    Otherwise absolutely for entries below 1, relatively for those above.
    """
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    for a, b in pairs:
        assert a.dtype == b.dtype
        if tolerance:
            difference = np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64))
            assert np.all(difference <= tolerance * np.maximum(1, np.abs(b)))
        else:
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
