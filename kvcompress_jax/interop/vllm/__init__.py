"""KV compression inside vLLM: installing the package is enough.

`plugin` is what vLLM finds by entry point. `platform` checks the configuration at start and puts
in the attention `backend`; `carve` divides the memory that vLLM gives each layer among the pools of
`kvcompress_jax.paged`; `floors` asks for more of it where layers never go below level 1; `blocks`
decides, once a step and for all layers, which of vLLM's blocks is raw, sealed, refined; `layer`
does it in one layer's memory; `compute` is the JAX part of that.
`offload` keeps compressed pages below the device, in host memory and in a folder.
`stats`, `worker`, `frontend` and `metrics` bring the figures to where users look for them.
"""
