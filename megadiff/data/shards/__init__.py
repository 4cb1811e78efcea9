"""Tar shards: their form, their manifests, reading and keeping them. Knows no codec."""
