"""The names of the files in a checkpoint folder. torch and Lightning give the first two; the others are of this package."""

METADATA = ".metadata"  # of torch's distributed checkpoint: which file has which box of which tensor
META = "meta.pt"  # of Lightning: everything but the tensors of the model and of the optimizers
PLAN = "plan.json"  # how the model was split, for people
MANIFEST = "manifest.json"  # the length and the checksum of each file; written last
SHARDED = "lightning_tp_sharded"  # a folder with the DTensors of callbacks and hooks: see `references.py`
UNFINISHED = ".lightning_tp_unfinished"  # in a store without renames: this folder was begun, and has no manifest yet
NAMES = {METADATA, META, PLAN, MANIFEST, SHARDED, UNFINISHED}
