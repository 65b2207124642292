"""How a forward pass is followed: which op used which parameter, and the rows that its curvature is made of."""
