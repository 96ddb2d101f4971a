"""Two processes train as one does; when one dies the other says so, and both go on.

The processes are ``examples/two_processes.py``, started as a user starts them, with four virtual
devices each and parameters, moments and batch split between all eight: neither process could go
on alone. The collectives between them run over loopback.
"""

import os
import signal
import time

import pytest
from example_runs import EXAMPLES, assert_equal_states, checkpoint, finish, free_port, started

pytestmark = pytest.mark.slow

STEPS = 20
# The sums over the batch are taken in another order between processes than within one: some 1e-7
# of a gradient, hence of an update of length 1e-2. Measured after 20 steps: 1e-7.
TOLERANCE = 1e-6
HEARTBEAT = 5  # seconds until a silent process counts as dead


def commands(directory, *options):
    """Of process 0 and process 1 of one run."""
    script = EXAMPLES / "two_processes.py"
    address = f"127.0.0.1:{free_port()}"
    shared = ("--directory", directory, "--steps", STEPS, "--coordinator", address, *options)
    return [(script, "--process", process, *shared) for process in (0, 1)]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """The run of one process with eight devices."""
    directory = tmp_path_factory.mktemp("one")
    finish((EXAMPLES / "resume.py", "--directory", directory, "--steps", STEPS), devices=8)
    return checkpoint(directory, STEPS)


def test_two_processes_train_as_one_does(tmp_path, one_process):
    first, second = finish(*commands(tmp_path), devices=4)
    assert_equal_states(checkpoint(tmp_path, STEPS), one_process, TOLERANCE)
    # Both know the same: losses and, at the end, the report of each layer.
    lines = [
        [line for line in text.splitlines() if line.startswith(("step", "hidden", "head"))]
        for text in (first, second)
    ]
    assert len(lines[0]) == STEPS + 2
    assert lines[0] == lines[1]


def test_one_process_killed_ends_the_other_and_both_resume(tmp_path, one_process):
    slow = ("--save-every", 4, "--pause", 0.3, "--heartbeat", HEARTBEAT)
    with started(*commands(tmp_path, *slow), devices=4) as (survivor, victim):
        if not any(line.startswith("step 10 ") for line in victim.stdout):
            pytest.fail("process 1 ended before it could be killed: " + survivor.communicate()[0])
        os.kill(victim.pid, signal.SIGKILL)
        killed = time.monotonic()
        said = survivor.communicate()[0]
    assert survivor.returncode != 0
    assert time.monotonic() - killed < 60  # on a busy machine; else about HEARTBEAT
    assert "another task died" in said
    assert f"step {STEPS} " not in said
    # Steps 4 and 8 were kept: 8 unless the kill came while it was being written.
    for text in finish(*commands(tmp_path), devices=4):
        assert f"start at step 8 of {STEPS}" in text or f"start at step 4 of {STEPS}" in text
    assert_equal_states(checkpoint(tmp_path, STEPS), one_process, TOLERANCE)
