"""The ops of kernels/ beside what users would run instead, in one run: time, floor, memory, error."""
