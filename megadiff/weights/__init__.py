"""Names and numbers on disk: checkpoints, exports, the released network; never deepspeed."""
