"""python -m tools.monitor: watch runs in the terminal. It reads run directories through feste.run.follow only."""
