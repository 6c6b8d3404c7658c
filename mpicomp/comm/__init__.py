"""Everything that calls MPI: communicators, their collectives, waiting, agreement, exits."""
