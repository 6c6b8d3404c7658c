"""Hosts as network namespaces of one machine."""
