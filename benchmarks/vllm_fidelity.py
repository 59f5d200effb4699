"""See `in_vllm/fidelity.py`."""

from in_vllm.fidelity import main

if __name__ == "__main__":
    main()
