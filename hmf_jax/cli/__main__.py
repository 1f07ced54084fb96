"""`python -m hmf_jax.cli` is `hmf-jax`."""

from hmf_jax.cli import main

if __name__ == "__main__":
    main()
