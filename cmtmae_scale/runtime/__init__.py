"""Process facts: ranks, collectives, logging."""
