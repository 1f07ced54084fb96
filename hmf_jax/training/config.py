"""The names of `schema`, `run` and `plan`, which were this one file."""

from hmf_jax.training.plan import plan
from hmf_jax.training.run import fine_tune
from hmf_jax.training.schema import TrainConfig

__all__ = ["TrainConfig", "fine_tune", "plan"]
