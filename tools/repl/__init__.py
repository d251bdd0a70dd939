"""python -m tools.repl: talk to a model."""
