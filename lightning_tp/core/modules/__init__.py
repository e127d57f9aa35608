"""Work on `nn.Module` objects: swap classes, find repeated blocks, rewrite functions, defer initialization."""
