"""Train a small language model and draw the curvature of all of its layers.

    python examples/transformer.py --steps 400 --log runs/transformer

The text is Python's own help, so nothing is downloaded. The run takes a minute on one core and
writes ``log.jsonl`` and, where matplotlib is installed, ``curvature.png``.
"""

import argparse
import json
from pathlib import Path
from pydoc_data.topics import topics

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from lama_optax import fisher, layer_report, supervised, track_curvature


class Block(nn.Module):
    """Attention and two dense layers, each after a layer norm."""

    width: int

    @nn.compact
    def __call__(self, x, mask):
        """Vectors of the same shape, (n, t, width)."""
        h = nn.LayerNorm(name="norm_1")(x)
        x = x + nn.MultiHeadDotProductAttention(4, name="attention")(h, h, mask=mask)
        h = nn.Dense(4 * self.width, name="up")(nn.LayerNorm(name="norm_2")(x))
        return x + nn.Dense(self.width, name="down")(nn.gelu(h))


class Transformer(nn.Module):
    """A decoder of characters, 0.47 million parameters."""

    depth: int = 4
    width: int = 96

    @nn.compact
    def __call__(self, tokens):
        """Logits of the next character, shape (n, t, 128), of characters, shape (n, t)."""
        mask = nn.make_causal_mask(tokens)
        positions = jnp.arange(tokens.shape[-1])
        x = nn.Embed(128, self.width, name="tokens")(tokens)
        x = x + nn.Embed(tokens.shape[-1], self.width, name="positions")(positions)
        for i in range(self.depth):
            x = Block(self.width, name=f"block_{i}")(x, mask)
        return nn.Dense(128, name="head")(nn.LayerNorm(name="norm")(x))


def main(args):
    """Trains, logs, and draws."""
    text = "".join(topics[name] for name in sorted(topics)).encode("ascii", "replace")
    characters = np.frombuffer(text, np.uint8).astype(np.int32)
    length = 64

    model = Transformer()
    params = model.init(jax.random.key(0), jnp.zeros((1, length), jnp.int32))["params"]
    schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-3, args.steps // 10, args.steps)
    tx = optax.chain(
        track_curvature(fisher(), update_interval=5),
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params)),
    )
    opt_state = tx.init(params)

    @jax.jit
    def train_step(params, opt_state, tokens):
        task = supervised(
            lambda params, x: model.apply({"params": params}, x), tokens[:, :-1], tokens[:, 1:]
        )
        loss, grads = jax.value_and_grad(task["value_fn"])(params)
        updates, opt_state = tx.update(grads, opt_state, params, **task)
        return optax.apply_updates(params, updates), opt_state, loss

    history = []
    for step in range(args.steps):
        starts = np.random.default_rng(step).integers(len(characters) - length, size=(16, 1))
        tokens = characters[starts + np.arange(length + 1)]
        params, opt_state, loss = train_step(params, opt_state, tokens)
        if step % 10 == 0 or step == args.steps - 1:
            numbers = layer_report(opt_state, params, flat=True)
            history.append({"step": step, "loss": float(loss)} | numbers)
            print(f"step {step} loss {loss:.3f}", flush=True)

    args.log.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row) + "\n" for row in history]
    (args.log / "log.jsonl").write_text("".join(lines))
    try:
        from lama_optax.plot import plot_report
    except ImportError:
        print("no picture: matplotlib is not installed")
    else:
        figure = plot_report(history)
        last = {key[10:]: x for key, x in numbers.items() if key.startswith("curvature/")}
        high, low = max(last, key=last.get), min(last, key=last.get)
        times = last[high] / last[low]
        figure.suptitle(f"In the end {high} is curved {times:.0f} times as much as {low}")
        figure.savefig(args.log / "curvature.png", dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--log", type=Path, default=Path("runs/transformer"), help="folder")
    main(parser.parse_args())
