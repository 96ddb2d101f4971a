"""Layer-adaptive optimizers for JAX and Optax, with the curvature of every layer."""

from lama_optax._accumulation import mean_value_fn as mean_value_fn
from lama_optax._alias import lam as lam
from lama_optax._alias import lama_adam as lama_adam
from lama_optax._lam import LamState as LamState
from lama_optax._lam import lam_scale as lam_scale
from lama_optax._lama import LamaState as LamaState
from lama_optax._lama import lama_scale as lama_scale
from lama_optax._layers import layer_names as layer_names
from lama_optax._layers import stacked as stacked
from lama_optax._report import layer_report as layer_report
from lama_optax.estimators import Estimator as Estimator
from lama_optax.estimators import LayerCurvature as LayerCurvature
from lama_optax.estimators import exact_trace as exact_trace
from lama_optax.estimators import flipout as flipout
from lama_optax.estimators import gauss_newton as gauss_newton
from lama_optax.estimators import hutchinson as hutchinson
from lama_optax.estimators import layer_curvature as layer_curvature

__version__ = "0.1.0"
