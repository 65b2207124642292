"""Metrics on functions, pulled back to parameters: residuals, energies, quantum states, the Hessian."""
