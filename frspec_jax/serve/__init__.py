"""A server that the openai client and a browser talk to: `python -m frspec_jax.serve --ckpt CKPT`.

It stands above the library: nothing else in `frspec_jax` imports it, and its packages come with the extra
`frspec-jax[serve]`.
"""
