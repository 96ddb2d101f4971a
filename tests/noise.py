"""What the tests of the noise scale share: gradients of single examples, and what a state holds."""

import jax
import numpy as np

from lama_optax import noise_report, track_noise_scale


def tracker(**options):
    return track_noise_scale(**({"update_interval": 1} | options))


def modules(tree, leading=0):
    """Every module's entries side by side in float64, after all of them together ("total")."""
    parts = {
        name: np.concatenate(
            [np.reshape(x, (*x.shape[:leading], -1)) for x in jax.tree.leaves(module)], -1
        ).astype(np.float64)
        for name, module in tree.items()
    }
    return {"total": np.concatenate(list(parts.values()), -1)} | parts


def example_gradients(losses_fn, params):
    """One gradient an example, of the mean over its predictions: name -> (n, size)."""

    def examples(p):
        losses = losses_fn(p)
        return losses.reshape(losses.shape[0], -1).mean(1)

    return modules(jax.jit(jax.jacrev(examples))(params), leading=1)


def averages(state, params):
    """What the state holds of each name: tr(Sigma) / scale and |G|^2 / scale."""
    report = noise_report(state, params)
    order = [*range(1, len(report)), 0]  # the total is the arrays' last
    return dict(zip([list(report)[i] for i in order], np.asarray(state.mean).T, strict=True))
