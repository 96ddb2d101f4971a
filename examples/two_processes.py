"""The training of ``resume.py`` on more than one process: for when one machine is too small.

Start it once a process; here two on one machine, with four virtual devices each::

    export JAX_NUM_CPU_DEVICES=4
    python examples/two_processes.py --process 0 --directory runs/two &
    python examples/two_processes.py --process 1 --directory runs/two

On several machines ``--coordinator`` is an address of process 0 that all of them reach, and
``--directory`` lies on a disk that they share. JAX and the optimizer see one array whose pieces
lie on all devices: no line of the training differs, and the optimizer takes no ``axis_name``.

When a process dies the others end with an error that names it, within the heartbeat's time.
Give the same lines again to go on from the last checkpoint.
"""

import argparse

import jax
import resume

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--process", type=int, required=True, help="this one's number, from 0")
    parser.add_argument("--processes", type=int, default=2, help="how many there are")
    parser.add_argument("--coordinator", default="127.0.0.1:29500", help="host:port of process 0")
    parser.add_argument(
        "--heartbeat", type=int, default=10, help="seconds until one counts as dead"
    )
    args = resume.parse_arguments(parser)
    jax.distributed.initialize(
        args.coordinator,
        num_processes=args.processes,
        process_id=args.process,
        initialization_timeout=60,
        heartbeat_timeout_seconds=args.heartbeat,
    )
    resume.main(args)
