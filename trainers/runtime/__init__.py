"""Where training runs: processes, shards, memory, interrupts."""
