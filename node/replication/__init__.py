"""What a stage's replicas do together: counting, averaging, committing, taking over state."""
