"""The only room that imports deepspeed: takes an objective and micro-batches, makes optimizer steps."""
