"""How ranks share a metric: strategies for one process, data-parallel ranks and sharded models."""
