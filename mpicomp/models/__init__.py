"""Small models: what makes a model smaller before it travels."""
