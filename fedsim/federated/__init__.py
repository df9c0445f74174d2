"""A federated round: strategies, the work of a client, aggregation, the simulation."""
