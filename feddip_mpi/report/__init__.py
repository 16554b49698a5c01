"""Pictures of runs, plans and partitions."""
