"""Study the matmuls of a training step at each size of the tensor-parallel axis; `study_matmuls.py` is its command line."""
