"""Training through compressed collectives."""
