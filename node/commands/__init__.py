"""One module per command of the command line; none imports torch before it has to."""
