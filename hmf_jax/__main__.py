"""`python -m hmf_jax` is `hmf-jax`."""

from hmf_jax.cli import main

if __name__ == "__main__":
    main()
