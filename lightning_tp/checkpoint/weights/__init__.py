"""Read and write weights in the formats of other libraries: safetensors, Hugging Face, `torch.save`, distributed checkpoint."""
