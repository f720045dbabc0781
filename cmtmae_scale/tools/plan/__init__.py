"""The plan of a run on a cluster: memory, time, cost and traffic, before any GPU is rented."""
