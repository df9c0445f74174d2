"""The round: strategies, what a client does, aggregation, the simulation."""
