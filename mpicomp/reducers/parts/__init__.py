"""What reducers share."""
