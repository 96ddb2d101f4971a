"""Train a Flax NNX network with BatchNorm and dropout, and log every layer's curvature.

    python examples/nnx.py --steps 300 --log runs/nnx
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
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from lama_optax import fisher, layer_report, supervised, track_curvature
from lama_optax.flax import nnx_apply_fn  # makes a function of params from the model

try:
    from tensorboardX import SummaryWriter
except ImportError:
    SummaryWriter = None


class MLP(nnx.Module):
    """Three dense layers."""

    def __init__(self, rngs):
        self.first = nnx.Linear(64, 64, rngs=rngs)
        self.norm = nnx.BatchNorm(64, rngs=rngs)
        self.second = nnx.Linear(64, 64, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.head = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x):
        """Logits of pictures, shape (n, 64)."""
        x = nnx.relu(self.norm(self.first(x)))
        return self.head(self.dropout(nnx.relu(self.second(x))))


@nnx.jit
def train_step(model, optimizer, x, y):
    """One step on one batch; changes the model and the optimizer."""

    def loss_fn(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

    # Before the gradient, which advances dropout's counter: so both see the same mask.
    task = supervised(nnx_apply_fn(model), x, y)  # curvature
    loss, grads = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, grads, **task)  # curvature
    return loss


def main(args):
    """Trains, logs, and prints the accuracy on held-out digits."""
    images, labels = load_digits(return_X_y=True)
    images = images.astype(np.float32) / 16
    train_x, test_x, train_y, test_y = train_test_split(images, labels, random_state=0)

    schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-3, args.steps // 10, args.steps)
    tx = optax.chain(
        track_curvature(fisher(), update_interval=10),  # curvature
        # Weight decay on kernels alone: they have more than one axis.
        optax.adamw(schedule, mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params)),
    )
    model = MLP(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    model.train()
    args.log.mkdir(parents=True, exist_ok=True)
    writer = SummaryWriter(str(args.log)) if SummaryWriter else contextlib.nullcontext()
    with (args.log / "log.jsonl").open("w") as lines, writer as board:
        for step in range(args.steps):
            rows = np.random.default_rng(step).choice(len(train_x), 64, replace=False)
            loss = train_step(model, optimizer, train_x[rows], train_y[rows])
            if step % 10 == 0:
                numbers, params = {"loss": float(loss)}, nnx.state(model, nnx.Param)
                numbers |= layer_report(optimizer.opt_state, params, flat=True)  # curvature
                print(json.dumps({"step": step} | numbers), file=lines, flush=True)
                for name, value in numbers.items() if board else ():
                    board.add_scalar(name, value, step)

    model.eval()
    accuracy = np.mean(np.argmax(model(test_x), axis=-1) == test_y)
    print(f"accuracy {accuracy:.1%}, log in {args.log}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--log", type=Path, default=Path("runs/nnx"), help="folder of the log")
    main(parser.parse_args())
