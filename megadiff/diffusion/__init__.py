"""Mathematics only: processes, times, objective, guidance, sampler. No parameters, no collectives, random numbers by key."""
