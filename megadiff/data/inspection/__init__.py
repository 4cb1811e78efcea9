"""Are they whole, what is in them, how do they look."""
