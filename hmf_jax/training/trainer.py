"""The names of `loop`, `report`, `diagnosis` and `flops`, which were this one file."""

from hmf_jax.training.diagnosis import find_not_finite
from hmf_jax.training.flops import PEAK_FLOPS, peak_flops, training_flops
from hmf_jax.training.loop import Batch, Step, data_shard, place, train
from hmf_jax.training.report import METRICS, plot_loss, read_metrics

__all__ = [
    "METRICS",
    "PEAK_FLOPS",
    "Batch",
    "Step",
    "data_shard",
    "find_not_finite",
    "peak_flops",
    "place",
    "plot_loss",
    "read_metrics",
    "train",
    "training_flops",
]
