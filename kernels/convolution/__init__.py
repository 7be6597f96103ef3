"""Edge-aligned convolution: neighbours' scalars and vectors -> harmonics-resolved densities of each atom."""
