"""Apply a checked plan to a model: split parameters, bind styles, then activation checkpointing, compile, FSDP2 and materialization."""
