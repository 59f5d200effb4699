"""See `in_vllm/speed.py`."""

from in_vllm.speed import main

if __name__ == "__main__":
    main()
