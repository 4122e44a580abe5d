"""What compare_optimizers.py is made of: protocol, optimizers, tasks, runs, report."""
