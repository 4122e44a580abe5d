"""What compare_optimizers.py is made of: methods, runs, search, table and figures."""
