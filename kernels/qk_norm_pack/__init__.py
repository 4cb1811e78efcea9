"""Norms, rotation and packing of queries, keys and values, for attention that reads them packed."""
