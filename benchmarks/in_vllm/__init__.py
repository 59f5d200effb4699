"""vLLM's real engine as it is and with its KV cache compressed, a process for each."""
