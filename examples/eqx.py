"""Train an Equinox network, and log every layer's curvature.

    python examples/eqx.py --steps 300 --log runs/eqx
    tensorboard --logdir runs

What this library adds to a training script are the lines marked with "curvature". The log is
``log.jsonl``, a line for every tenth step, and TensorBoard's where tensorboardX is installed.
"""

import argparse
import contextlib
import json
from pathlib import Path

import equinox as eqx
import jax
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from lama_optax import fisher, layer_report, supervised, track_curvature

try:
    from tensorboardX import SummaryWriter
except ImportError:
    SummaryWriter = None


@eqx.filter_jit
def train_step(model, opt_state, tx, x, y):
    """One step on one batch."""
    # A module also holds what is not trained, such as its activation function: params are the
    # arrays that have a gradient.
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def apply_fn(params, x):  # a module takes one example, vmap a batch
        return jax.vmap(eqx.combine(params, static))(x)

    task = supervised(apply_fn, x, y)  # the loss, and what an estimator of curvature needs
    loss, grads = jax.value_and_grad(task["value_fn"])(params)  # or eqx.filter_value_and_grad
    updates, opt_state = tx.update(grads, opt_state, params, **task)  # curvature
    return eqx.apply_updates(model, updates), opt_state, loss


def main(args):
    """Trains, logs, and prints the accuracy on held-out digits."""
    images, labels = load_digits(return_X_y=True)
    images = images.astype(np.float32) / 16
    train_x, test_x, train_y, test_y = train_test_split(images, labels, random_state=0)

    schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-3, args.steps // 10, args.steps)
    tx = optax.chain(
        track_curvature(fisher(), update_interval=10),  # curvature
        # Weight decay on matrices alone.
        optax.adamw(schedule, mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params)),
    )
    model = eqx.nn.MLP(64, 10, width_size=64, depth=2, key=jax.random.key(0))
    opt_state = tx.init(eqx.filter(model, eqx.is_inexact_array))

    args.log.mkdir(parents=True, exist_ok=True)
    writer = SummaryWriter(str(args.log)) if SummaryWriter else contextlib.nullcontext()
    with (args.log / "log.jsonl").open("w") as lines, writer as board:
        for step in range(args.steps):
            rows = np.random.default_rng(step).choice(len(train_x), 64, replace=False)
            model, opt_state, loss = train_step(model, opt_state, tx, train_x[rows], train_y[rows])
            if step % 10 == 0:
                numbers, params = {"loss": float(loss)}, eqx.filter(model, eqx.is_inexact_array)
                numbers |= layer_report(opt_state, params, flat=True)  # curvature
                print(json.dumps({"step": step} | numbers), file=lines, flush=True)
                for name, value in numbers.items() if board else ():
                    board.add_scalar(name, value, step)

    logits = jax.vmap(model)(test_x)
    print(f"accuracy {np.mean(np.argmax(logits, axis=-1) == test_y):.1%}, log in {args.log}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--log", type=Path, default=Path("runs/eqx"), help="folder of the log")
    main(parser.parse_args())
