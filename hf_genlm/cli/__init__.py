"""The command line: options, progress display, and one thin module per verb. Only these modules print."""
