"""The CUDA C++ kernels of csrc/: the compiled module `slicegpt._C`, and launchers on torch tensors."""
