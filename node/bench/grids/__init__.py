"""Grid files of the convergence benchmark."""
