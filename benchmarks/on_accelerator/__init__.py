"""What `accelerator.py` runs, one module a part, each in a process of its own."""
