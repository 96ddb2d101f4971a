"""Train a network of plain arrays, and log every layer's curvature by an estimator of your choice.

    python examples/plain.py --steps 300 --log runs/plain --estimator fisher
    tensorboard --logdir runs

What this library adds to a training script are the lines marked with "curvature". The log is
``log.jsonl``, a line for every tenth step, and TensorBoard's where tensorboardX is installed.
"""

import argparse
import contextlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import lama_optax
from lama_optax import layer_report, supervised, track_curvature

try:
    from tensorboardX import SummaryWriter
except ImportError:
    SummaryWriter = None

ESTIMATORS = ["fisher", "hutchinson", "flipout", "gauss_newton", "exact_trace"]


def init(key, sizes=(64, 32, 10)):
    """Parameters of dense layers between these widths."""
    keys = jax.random.split(key, len(sizes) - 1)
    return {
        f"dense_{i}": {"w": jax.random.normal(k, (m, n)) * (2 / m) ** 0.5, "b": jnp.zeros(n)}
        for i, (k, m, n) in enumerate(zip(keys, sizes[:-1], sizes[1:], strict=True))
    }


def apply_fn(params, x):
    """Logits of pictures, shape (n, 64)."""
    *hidden, last = params.values()
    for layer in hidden:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return x @ last["w"] + last["b"]


def main(args):
    """Trains, logs, and prints the accuracy on held-out digits."""
    images, labels = load_digits(return_X_y=True)
    images = images.astype(np.float32) / 16
    train_x, test_x, train_y, test_y = train_test_split(images, labels, random_state=0)

    schedule = optax.warmup_cosine_decay_schedule(0.0, 1e-2, args.steps // 10, args.steps)
    estimator = getattr(lama_optax, args.estimator)()
    tx = optax.chain(
        track_curvature(estimator, update_interval=10),  # curvature
        # Weight decay on matrices alone.
        optax.adamw(schedule, mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params)),
    )
    params = init(jax.random.key(0))
    opt_state = tx.init(params)

    @jax.jit
    def train_step(params, opt_state, x, y):
        task = supervised(apply_fn, x, y)  # the loss, and what an estimator of curvature needs
        loss, grads = jax.value_and_grad(task["value_fn"])(params)
        updates, opt_state = tx.update(grads, opt_state, params, **task)  # curvature
        return optax.apply_updates(params, updates), opt_state, loss

    args.log.mkdir(parents=True, exist_ok=True)
    writer = SummaryWriter(str(args.log)) if SummaryWriter else contextlib.nullcontext()
    with (args.log / "log.jsonl").open("w") as lines, writer as board:
        for step in range(args.steps):
            rows = np.random.default_rng(step).choice(len(train_x), 64, replace=False)
            params, opt_state, loss = train_step(params, opt_state, train_x[rows], train_y[rows])
            if step % 10 == 0:
                numbers = {"loss": float(loss)}
                numbers |= layer_report(opt_state, params, flat=True)  # curvature
                print(json.dumps({"step": step} | numbers), file=lines, flush=True)
                for name, value in numbers.items() if board else ():
                    board.add_scalar(name, value, step)

    accuracy = np.mean(np.argmax(apply_fn(params, test_x), axis=-1) == test_y)
    print(f"accuracy {accuracy:.1%}, log in {args.log}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--log", type=Path, default=Path("runs/plain"), help="folder of the log")
    parser.add_argument("--estimator", choices=ESTIMATORS, default="fisher")
    main(parser.parse_args())
