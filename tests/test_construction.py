"""Making an optimizer computes nothing, so that `jax.distributed.initialize` may come after it."""

import subprocess
import sys

SCRIPT = """
import socket
import jax
from lama_optax import lama_adam, track_curvature, track_noise_scale
makes = (lama_adam(1e-3), track_curvature(), track_noise_scale())
with socket.socket() as free:
    free.bind(("localhost", 0))
    address = f"localhost:{free.getsockname()[1]}"
jax.distributed.initialize(address, num_processes=1, process_id=0)
"""


def test_construction_leaves_the_devices_alone():
    subprocess.run([sys.executable, "-c", SCRIPT], check=True, timeout=120)
