"""Make features of Lightning right on a mesh: precision, metrics, averaging, tuner, batch size."""
