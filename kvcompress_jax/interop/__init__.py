"""Where JAX meets other frameworks: the only importers of torch and vLLM. Nothing else of the
package imports from here."""
