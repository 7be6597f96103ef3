"""Edge vectors -> radial functions with a smooth cut-off, and spherical harmonics."""
