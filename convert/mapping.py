raise ImportError("hmf_jax.convert.mapping is now hmf_jax.table and hmf_jax.convert.rows.")
