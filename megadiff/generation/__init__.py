"""From a request to samples in a folder."""
