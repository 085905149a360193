"""Where jobs run: on this machine, or on a Ray cluster. Only what runs there, `cluster` and `worker`, imports ray."""
