"""Where a program will run, known when it is traced."""

import jax


def platform() -> str:
    """Where what is being traced will run: `cpu`, `gpu` or `tpu`."""
    device = jax.config.jax_default_device  # type: ignore[attr-defined]
    return getattr(device, "platform", device) or jax.default_backend()
