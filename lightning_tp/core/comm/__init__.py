"""The mesh, the tensor-parallel axis, and the collectives on it."""
