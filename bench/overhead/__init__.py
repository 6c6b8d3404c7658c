"""What DDP with mpicomp costs beside the network."""
