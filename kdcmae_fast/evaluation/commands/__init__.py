"""Command lines of the evaluations: arguments in, one library call, text out."""
