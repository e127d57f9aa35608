"""Make features of Lightning right on a mesh: precision, metrics, averaging, finetuning, tuner, batch size."""
