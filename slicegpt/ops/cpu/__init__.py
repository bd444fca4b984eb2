"""The CPU kernels of csrc/cpu/: the compiled module `slicegpt._cpu`, and launchers on torch tensors."""
