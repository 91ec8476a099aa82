"""What the project exists for: planning, copying, accounting for and recovering exports. Knows ports only."""
