"""Small models: layers of few bits, and what else makes a model smaller before it travels."""
