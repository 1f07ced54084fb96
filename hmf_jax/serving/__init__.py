"""An OpenAI-compatible HTTP server over `hmf_jax.engine` and `hmf_jax.text`.

Needs the extra `serve`: pip install "hmf-jax[serve]".
"""
