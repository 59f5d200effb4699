"""What can be known of the GPU kernels without a GPU, and what to measure with one."""
