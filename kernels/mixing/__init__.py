"""Dense mixing of channels."""
