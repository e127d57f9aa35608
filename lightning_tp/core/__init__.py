"""What everything else is built on: collectives, changes to modules, operators on shards."""
