"""Layer-adaptive optimizers for JAX and Optax, with the curvature of every layer."""

from lama_optax.curvature.exact import exact_trace as exact_trace
from lama_optax.curvature.fisher import fisher as fisher
from lama_optax.curvature.flipout import flipout as flipout
from lama_optax.curvature.gauss_newton import gauss_newton as gauss_newton
from lama_optax.curvature.hutchinson import hutchinson as hutchinson
from lama_optax.curvature.measure import layer_curvature as layer_curvature
from lama_optax.curvature.protocol import Estimator as Estimator
from lama_optax.curvature.protocol import LayerCurvature as LayerCurvature
from lama_optax.curvature.supervised import grouped_value_and_grad as grouped_value_and_grad
from lama_optax.curvature.supervised import mean_value_fn as mean_value_fn
from lama_optax.curvature.supervised import supervised as supervised
from lama_optax.curvature.track import CurvatureState as CurvatureState
from lama_optax.curvature.track import track_curvature as track_curvature
from lama_optax.layers import Layers as Layers
from lama_optax.layers import layer_names as layer_names
from lama_optax.layers import stacked as stacked
from lama_optax.noise_scale import NoiseScaleState as NoiseScaleState
from lama_optax.noise_scale import track_noise_scale as track_noise_scale
from lama_optax.optimizers.alias import lam as lam
from lama_optax.optimizers.alias import lama_adam as lama_adam
from lama_optax.optimizers.lam import LamState as LamState
from lama_optax.optimizers.lam import lam_scale as lam_scale
from lama_optax.optimizers.lama import LamaState as LamaState
from lama_optax.optimizers.lama import lama_scale as lama_scale
from lama_optax.report import layer_report as layer_report
from lama_optax.report import noise_report as noise_report

__version__ = "0.2.0"
