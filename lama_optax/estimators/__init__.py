"""Estimators of each layer's average curvature: one file an estimator, one protocol."""

from lama_optax.estimators._exact import exact_trace as exact_trace
from lama_optax.estimators._flipout import flipout as flipout
from lama_optax.estimators._gauss_newton import gauss_newton as gauss_newton
from lama_optax.estimators._hutchinson import hutchinson as hutchinson
from lama_optax.estimators._protocol import Estimator as Estimator
from lama_optax.estimators._protocol import LayerCurvature as LayerCurvature
from lama_optax.estimators._protocol import layer_curvature as layer_curvature
