"""The nine works of the page, each run through this library and held beside its paper."""
