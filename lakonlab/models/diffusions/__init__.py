"""What is trained and sampled: flows, their schedules and solvers, and pi-Flow."""
