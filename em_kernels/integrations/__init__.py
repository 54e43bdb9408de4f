"""What fits em_kernels into other packages: nothing in em_kernels imports it, and importing it changes nothing."""
