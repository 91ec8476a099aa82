"""What the service does with instances: import and store, retrieve, search, delete. Speaks to ports only."""
