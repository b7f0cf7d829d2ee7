"""`python -m dflash_jax` is `dflash-jax`."""

from dflash_jax.cli import main

if __name__ == "__main__":
    main(prog_name="dflash-jax")
