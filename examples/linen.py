"""Train a Flax Linen network with BatchNorm and dropout, and log every layer's curvature.

    python examples/linen.py --steps 300 --log runs/linen
    tensorboard --logdir runs

What this library adds to a training script are the four lines marked with "curvature". The log is
``log.jsonl``, a line for every tenth step, and TensorBoard's where tensorboardX is installed.
"""

import argparse
import contextlib
import json
from pathlib import Path

import jax
import numpy as np
import optax
from flax import linen as nn
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from lama_optax import fisher, layer_report, supervised, track_curvature
from lama_optax.flax import TrainState  # passes on what `supervised` makes

try:
    from tensorboardX import SummaryWriter
except ImportError:
    SummaryWriter = None


class CNN(nn.Module):
    """Two convolutions of stride 2, and a dense layer."""

    @nn.compact
    def __call__(self, x, train):
        """Logits of pictures, shape (n, 8, 8, 1)."""
        for width in (16, 32):
            x = nn.Conv(width, (3, 3), strides=2, use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        x = nn.Dropout(0.2, deterministic=not train)(x.reshape(len(x), -1))
        return nn.Dense(10)(x)


class State(TrainState):
    """Also holds BatchNorm's running means and variances."""

    batch_stats: dict


@jax.jit
def train_step(state, x, y, dropout_key):
    """One step on one batch."""

    def forward(params, x):  # logits, and the collections that the forward pass updated
        variables = {"params": params, "batch_stats": state.batch_stats}
        rngs = {"dropout": dropout_key}
        return state.apply_fn(variables, x, train=True, rngs=rngs, mutable=["batch_stats"])

    def loss_fn(params):
        logits, updated = forward(params, x)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return losses.mean(), updated["batch_stats"]

    (loss, batch_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    task = supervised(lambda params, x: forward(params, x)[0], x, y)  # curvature
    return state.apply_gradients(grads=grads, batch_stats=batch_stats, **task), loss  # curvature


def main(args):
    """Trains, logs, and prints the accuracy on held-out digits."""
    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8, 1).astype(np.float32) / 16
    train_x, test_x, train_y, test_y = train_test_split(images, labels, random_state=0)

    schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-3, args.steps // 10, args.steps)
    tx = optax.chain(
        track_curvature(fisher(), update_interval=10),  # curvature
        # Weight decay on kernels alone: they have more than one axis.
        optax.adamw(schedule, mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params)),
    )
    model = CNN()
    variables = model.init(jax.random.key(0), train_x[:1], train=False)
    state = State.create(apply_fn=model.apply, tx=tx, **variables)

    args.log.mkdir(parents=True, exist_ok=True)
    writer = SummaryWriter(str(args.log)) if SummaryWriter else contextlib.nullcontext()
    with (args.log / "log.jsonl").open("w") as lines, writer as board:
        for step in range(args.steps):
            rows = np.random.default_rng(step).choice(len(train_x), 64, replace=False)
            key = jax.random.fold_in(jax.random.key(1), step)
            state, loss = train_step(state, train_x[rows], train_y[rows], key)
            if step % 10 == 0:
                numbers = {"loss": float(loss)}
                numbers |= layer_report(state.opt_state, state.params, flat=True)  # curvature
                print(json.dumps({"step": step} | numbers), file=lines, flush=True)
                for name, value in numbers.items() if board else ():
                    board.add_scalar(name, value, step)

    variables = {"params": state.params, "batch_stats": state.batch_stats}
    logits = model.apply(variables, test_x, train=False)
    print(f"accuracy {np.mean(np.argmax(logits, axis=-1) == test_y):.1%}, log in {args.log}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--log", type=Path, default=Path("runs/linen"), help="folder of the log")
    main(parser.parse_args())
