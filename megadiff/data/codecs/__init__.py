"""Members of a sample to clean states and back, one kind of field a file."""
