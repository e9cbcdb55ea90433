"""`bench churn`: machines that come, stall and die while a swarm trains."""
