"""Codecs beside memcpy, NumPy, torch and bitsandbytes."""
