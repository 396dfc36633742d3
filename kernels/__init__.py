"""The ops of hftcore: what each means (reference), and its Triton, native C++ and plain-torch implementations."""
