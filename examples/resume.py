"""Train, keep checkpoints with Orbax, and go on from the newest one that can be read.

    python examples/resume.py --directory runs/first --steps 200

Stop it whenever you like, with Ctrl-C or ``kill -9``, and give the same line again: it goes on
from the last checkpoint and ends with the bits of a run that was never stopped. The optimizer's
state is arrays alone (the PRNG key is raw data, and each step folds its number into it), so
nothing about LAMA needs saving beyond ``opt_state``.

It trains on all devices there are, parameters and moments split between them; another number of
devices may take over. ``two_processes.py`` runs the same training on several machines.
"""

import argparse
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lama_optax import hutchinson, lama_adam, layer_report

# The curvature is estimated at every fourth step: a run may well stop between two estimates.
OPTIMIZER = lama_adam(1e-2, sensitivity=3.0, estimator=hutchinson(num_probes=4), update_interval=4)


def loss_fn(params, batch):
    """Mean squared error of a network 16-32-8."""
    inputs, targets = batch
    hidden = jnp.tanh(inputs @ params["hidden"]["kernel"] + params["hidden"]["bias"][None, :])
    outputs = hidden @ params["head"]["kernel"] + params["head"]["bias"][None, :]
    return jnp.mean((outputs - targets) ** 2)


def init(optimizer):
    """All that a run must remember: parameters, the optimizer's state and the step."""
    keys = jax.random.split(jax.random.key(42))
    params = {
        "hidden": {"kernel": 0.3 * jax.random.normal(keys[0], (16, 32)), "bias": jnp.zeros(32)},
        "head": {"kernel": 0.3 * jax.random.normal(keys[1], (32, 8)), "bias": jnp.zeros(8)},
    }
    return {"params": params, "opt_state": optimizer.init(params), "step": jnp.zeros((), jnp.int32)}


def batch_at(step, mesh):
    """The batch of one step. It depends on nothing but the step, so a resumed run sees it too."""
    rng = np.random.default_rng(step)
    inputs = rng.normal(size=(64, 16)).astype(np.float32)
    targets = np.sin(inputs[:, :8] + inputs[:, 8:])
    sharding = NamedSharding(mesh, P("devices"))
    # Each process hands over the rows of its own devices.
    return tuple(
        jax.make_array_from_callback(rows.shape, sharding, rows.__getitem__)
        for rows in (inputs, targets)
    )


def split_rows(mesh, tree):
    """Shardings: matrices split by rows between the devices (FSDP), the rest on each device."""

    def sharding(leaf):
        is_split = leaf.ndim == 2 and leaf.shape[0] % mesh.size == 0
        return NamedSharding(mesh, P("devices") if is_split else P())

    return jax.tree.map(sharding, tree)


def restore_newest(manager, template):
    """The newest checkpoint that can be read whole; None where there is none at all."""
    steps = sorted(manager.all_steps(), reverse=True)
    for i, step in enumerate(steps):
        try:
            restored = manager.restore(step, args=ocp.args.StandardRestore(template))
        except Exception as error:
            print(f"checkpoint {step} cannot be read: {str(error)[:200]}", flush=True)
            if jax.process_count() > 1:
                raise  # The other processes may have read theirs: a person must decide.
        else:
            for unreadable in steps[:i]:  # Out of the way of the new one, but not deleted.
                path = Path(manager.directory) / str(unreadable)
                path.rename(path.with_name(f"unreadable-{unreadable}"))
            manager.reload()
            return restored
    if steps:
        raise ValueError(f"none of the checkpoints {steps} in {manager.directory} can be read.")
    return None


def train(directory, steps, *, optimizer=OPTIMIZER, save_every=10, pause=0.0):
    """Trains up to ``steps`` in all, from the last checkpoint in ``directory`` on."""
    mesh = jax.make_mesh((jax.device_count(),), ("devices",), axis_types=(AxisType.Auto,))
    shapes = jax.eval_shape(lambda: init(optimizer))
    shardings = split_rows(mesh, shapes)

    def step_fn(state, batch):
        params = state["params"]
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, opt_state = optimizer.update(
            grads, state["opt_state"], params, value_fn=lambda p: loss_fn(p, batch)
        )
        params = optax.apply_updates(params, updates)
        return {"params": params, "opt_state": opt_state, "step": state["step"] + 1}, loss

    step_fn = jax.jit(step_fn, donate_argnums=0, out_shardings=(shardings, None))
    options = ocp.CheckpointManagerOptions(max_to_keep=3)
    with ocp.CheckpointManager(Path(directory).absolute(), options=options) as manager:
        template = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            *(shapes, shardings),
        )
        state = restore_newest(manager, template)
        if state is None:
            state = jax.jit(lambda: init(optimizer), out_shardings=shardings)()
        start = int(state["step"])
        print(f"start at step {start} of {steps}", flush=True)
        for step in range(start, steps):
            state, loss = step_fn(state, batch_at(step, mesh))
            print(f"step {step + 1} loss {float(loss):.6f}", flush=True)
            if (step + 1) % save_every == 0 or step + 1 == steps:
                manager.save(step + 1, args=ocp.args.StandardSave(state))
            time.sleep(pause)
    return state


def parse_arguments(parser):
    """The arguments of `train`, also for ``two_processes.py``."""
    parser.add_argument("--directory", required=True, help="of the checkpoints")
    parser.add_argument("--steps", type=int, default=200, help="to train in all")
    parser.add_argument("--save-every", type=int, default=10, help="steps")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds after each step")
    return parser.parse_args()


def main(args):
    """Trains and prints what the optimizer knows about each layer."""
    state = train(args.directory, args.steps, save_every=args.save_every, pause=args.pause)
    for name, entry in layer_report(state["opt_state"], state["params"]).items():
        known = {key: value for key, value in entry.items() if value is not None}
        print(name, " ".join(f"{key} {value:.6g}" for key, value in known.items()), flush=True)


if __name__ == "__main__":
    main(parse_arguments(argparse.ArgumentParser(description=__doc__.splitlines()[0])))
