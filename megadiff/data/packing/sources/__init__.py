"""Where raw pairs come from, one kind of source a file."""
