"""From a trace to bytes, FLOPs, communication and seconds on given hardware."""
