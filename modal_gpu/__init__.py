"""The same pipeline on rented GPUs. The only package that imports modal."""
