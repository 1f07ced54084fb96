raise ImportError(
    "hmf_jax.compose is a function; the module is called hmf_jax.composition, and picaso_weights "
    "lies in hmf_jax.mixers.mamba2."
)
