"""The backends: one implementation of the contract in `em_kernels.ops.backend` each."""
