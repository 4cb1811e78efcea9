"""Names inside a run's folder that more than one room reads or writes."""

RUN = "run.yaml"
"""The resolved run."""
DONE = "DONE"
"""In a stage's folder: it has been trained to its end."""
