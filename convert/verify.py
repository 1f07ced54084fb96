raise ImportError("hmf_jax.convert.verify is now hmf_jax.verify.")
