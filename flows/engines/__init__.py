"""Where jobs run: on this machine, or on a Ray cluster. Only what runs there, `driver`, `attempt` and `worker`, imports ray."""
